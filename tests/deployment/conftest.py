"""A SuperLink and SuperNodes as processes on loopback, with TLS and SuperNode authentication."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bayesfed.deployment.certificates import make
from bayesfed.runs.directory import read_jsonl

RUN = ["data=npz", "model=linear", "likelihood=categorical", "partition=iid", "client.epochs=1", "eval.samples=4", "device=cpu", "figures=false"]  # fmt: skip
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


# A killed node can come back when the SuperLink has missed its heartbeats: after 30 s instead of Flower's 60 s.
QUICK_HEARTBEAT = """
import sys
from flwr.supernode.cli.flower_supernode import flower_supernode
for module in list(sys.modules.values()):
    if getattr(module, "HEARTBEAT_DEFAULT_INTERVAL", None) is not None:
        module.HEARTBEAT_DEFAULT_INTERVAL = 15
flower_supernode()
"""


class Loopback:
    """Starts and ends the processes; their output lies in ``folder/NAME.log``."""

    def __init__(self, folder: Path):
        self.folder, self.certificates = folder, folder / "certificates"
        make(self.certificates, 3, ["localhost", "127.0.0.1"])
        self.fleet, self.control, *self.runtime = free_ports(8)
        self.home = folder / "home"
        self.home.mkdir()
        config = f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{self.control}"\n'
        (self.home / "config.toml").write_text(config + f'root-certificates = "{self.certificates / "ca.crt"}"\n')
        self.environment = os.environ | {
            "FLWR_HOME": str(self.home), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "BAYESFED_RUNS": str(folder / "runs"), "BAYESFED_SITES": str(folder / "sites"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.run = [*RUN, f"data.path={folder}/all.npz"]

    def config(self, node: int) -> str:
        """The ``--node-config`` of node 1, 2 or 3, which holds a file of its own."""
        return f'partition-id={node - 1} data-path="{self.folder}/client{node - 1}.npz" device="cpu"'

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["nice", "-n", "5", *command], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=self.environment, cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        return self.processes[name]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def end(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.wait(20)

    def superlink(self) -> None:
        made = self.certificates
        self.start(
            "superlink", str(BIN / "flower-superlink"), "--database", f"{self.folder}/superlink.db", "--ssl-ca-certfile", f"{made}/ca.crt", "--ssl-certfile", f"{made}/server.pem",
            "--ssl-keyfile", f"{made}/server.key", "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            "--fleet-api-address", f"127.0.0.1:{self.fleet}", "--port", str(self.control),
        )  # fmt: skip
        for port in (self.fleet, self.control):
            wait(lambda port=port: listens(port), 60, f"port {port}")

    def register(self, node: int) -> None:
        key = self.certificates / f"sn{node}.pub"
        done = self.call("flwr", "supernode", "register", str(key), "loopback")
        assert done.returncode == 0, done.stdout + done.stderr

    def supernode(self, node: int, config: str, **options: str | None) -> subprocess.Popen[bytes]:
        """Node ``node`` (1, 2, 3); options replace or (None) leave out the command's own."""
        given = {
            "root-certificates": f"{self.certificates}/ca.crt", "superlink": f"127.0.0.1:{self.fleet}",
            "port": str(self.runtime[node - 1]), "node-config": config,
            "auth-supernode-private-key": f"{self.certificates}/sn{node}",
        } | {key.replace("_", "-"): value for key, value in options.items()}  # fmt: skip
        words = [word for key, value in given.items() if value is not None for word in (f"--{key}", value) if word]
        return self.start(f"supernode{node}", sys.executable, "-c", QUICK_HEARTBEAT, *words)

    def restart(self, node: int, config: str) -> None:
        """Start a killed SuperNode, again and again as a service manager would, until it is in."""

        def accepted() -> bool:
            if self.processes[f"supernode{node}"].poll() is not None:
                self.supernode(node, config)
            return "SuperNode ID" in self.log(f"supernode{node}")[before:]

        before = len(self.log(f"supernode{node}"))
        self.supernode(node, config)
        wait(accepted, 120, f"supernode{node} is back")

    def online(self) -> int:
        """How many SuperNodes the SuperLink has."""
        done = self.call("flwr", "supernode", "list", "loopback", "--format", "json")
        assert done.returncode == 0, done.stdout + done.stderr
        return sum(node["status"] == "online" for node in json.loads(done.stdout)["nodes"])

    def call(self, *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]], env=self.environment, cwd=self.folder, text=True, capture_output=True,
            timeout=timeout, check=False,
        )  # fmt: skip

    def deploying(self, *overrides: str) -> subprocess.Popen[str]:
        """``bayesfed deploy loopback ...``, started."""
        command = [sys.executable, "-c", "from bayesfed.cli import main; main()", "deploy", "loopback", *overrides]
        return subprocess.Popen(
            command, env=self.environment, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def deploy(self, *overrides: str) -> tuple[int | None, str]:
        """The same, waited for: exit code and output."""
        process = self.deploying(*overrides)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def close(self) -> None:
        for name in list(self.processes):
            self.end(name, signal.SIGTERM if name == "superlink" else signal.SIGKILL)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def loopback(tmp_path_factory):
    """With a running SuperLink that knows the keys of nodes 1 to 3."""
    made = Loopback(tmp_path_factory.mktemp("loopback"))
    try:
        made.superlink()
        for node in (1, 2, 3):
            made.register(node)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def wait_for():
    """``wait_for(condition, seconds, what)``."""
    return wait


def write_data(folder) -> None:
    """One file with everything and a client column, and one for each client with its rows only; all share the test set."""
    g = np.random.default_rng(5)
    centres = g.normal(size=(3, 6)).astype(np.float32)
    y, test_y = g.integers(0, 3, 120), np.arange(30) % 3
    x = (centres[y] + g.normal(size=(120, 6))).astype(np.float32)
    test_x = (centres[test_y] + g.normal(size=(30, 6))).astype(np.float32)
    client = np.sort(g.integers(0, 3, 120))
    np.savez(folder / "all.npz", x=x, y=y, client=client, x_test=test_x, y_test=test_y)
    for k in range(3):
        np.savez(folder / f"client{k}.npz", x=x[client == k], y=y[client == k], x_test=test_x, y_test=test_y)


@pytest.fixture(scope="module")
def nodes(loopback):
    """With three SuperNodes."""
    write_data(loopback.folder)
    for node in (1, 2, 3):
        loopback.supernode(node, loopback.config(node))
    return loopback


@pytest.fixture(scope="session")
def reached():
    """``reached(run_dir, 3)()``: whether a run has recorded round 3."""
    return lambda run_dir, round: lambda: any(line["round"] >= round for line in read_jsonl(run_dir / "rounds.jsonl"))
