"""Development certificates and keys: a CA, the SuperLink's certificate, one key pair for each SuperNode.

    python -m bayesfed.deployment.certificates DIR --nodes 3 --host superlink --host localhost

For development only: the CA's key lies beside the rest. In production use your own CA, make each SuperNode's key on its
own machine (``ssh-keygen -t ecdsa -b 384 -N "" -f sn``) and move only the ``.pub`` file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey


def make(folder: Path, nodes: int, hosts: Sequence[str], days: int = 365) -> None:
    """Write ``ca.crt``, ``ca.key``, ``server.pem``, ``server.key`` and ``sn1``, ``sn1.pub`` ... into ``folder``.

    Private keys get mode 600. Keys are EC P-384, as Flower wants them.

    Raises:
        FileExistsError: ``folder`` holds a CA already.
    """
    if (folder / "ca.crt").exists():
        raise FileExistsError(f"{folder / 'ca.crt'} exists; choose another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca_name, name = (_name(text) for text in ("bayesfed development CA", hosts[0]))
    ca = _certificate(ca_name, ca_name, ca_key.public_key(), days)
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ca = ca.add_extension(_usage(sign=True), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = ca.add_extension(identifier, critical=False)
    server = _certificate(name, ca_name, key.public_key(), days)
    server = server.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    server = server.add_extension(_usage(sign=False), critical=True)
    server = server.add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
    server = server.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    server = server.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )
    for stem, builder in (("ca.crt", ca), ("server.pem", server)):
        signed = builder.sign(ca_key, hashes.SHA384())
        (folder / stem).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    _write_key(folder / "ca.key", ca_key)
    _write_key(folder / "server.key", key)
    for node in range(1, nodes + 1):
        node_key(folder / f"sn{node}")


def node_key(path: Path) -> None:
    """A SuperNode's private key at ``path`` and its public key at ``path``.pub, in OpenSSH's formats."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(path.name + ".pub").write_bytes(public + b"\n")


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int):
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))


def _usage(sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign, key_cert_sign=sign, crl_sign=sign, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _write_key(path: Path, key: Key, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8) -> None:
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make development certificates and keys.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=3, help="SuperNode key pairs to make (default 3)")
    parser.add_argument("--host", action="append", help="name or IP of the SuperLink (default localhost, 127.0.0.1)")
    parser.add_argument("--days", type=int, default=365, help="validity (default 365)")
    options = parser.parse_args(argv)
    try:
        make(options.folder, options.nodes, options.host or ["localhost", "127.0.0.1"], options.days)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
