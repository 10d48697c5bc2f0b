"""Development certificates: what Flower and TLS ask of them."""

from __future__ import annotations

import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from bayesfed.deployment.certificates import main


def test_files(tmp_path, capsys) -> None:
    folder = tmp_path / "made"
    main([str(folder), "--nodes", "2", "--host", "superlink", "--host", "10.0.0.7"])
    names = ["ca.crt", "ca.key", "server.key", "server.pem", "sn1", "sn1.pub", "sn2", "sn2.pub"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in ("ca.key", "server.key", "sn1", "sn2"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    ssl.create_default_context(cafile=str(folder / "ca.crt"))
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "server.pem", folder / "server.key")
    server, ca = (x509.load_pem_x509_certificate((folder / n).read_bytes()) for n in ("server.pem", "ca.crt"))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["superlink"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    key = load_ssh_private_key((folder / "sn1").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert load_ssh_public_key((folder / "sn1.pub").read_bytes()) == key.public_key()
    before = (folder / "ca.crt").read_bytes()
    with pytest.raises(SystemExit):
        main([str(folder)])
    assert (folder / "ca.crt").read_bytes() == before
