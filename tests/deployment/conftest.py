"""A SuperLink and SuperNodes as processes on loopback, with TLS and SuperNode authentication."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from flwr.cli.app import app
from typer.testing import CliRunner, Result

import bayesfed
from bayesfed.deployment.certificates import make
from bayesfed.runs.directory import read_jsonl

RUN = [
    "data=npz",
    "model=linear",
    "likelihood=categorical",
    "partition=iid",
    "client.epochs=1",
    "eval.samples=4",
    "device=cpu",
    "figures=false",
]
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


# Flower's SuperNode with shorter waits. It looks for messages every 0.3 s instead of 3 s, and can come back after it
# was killed when
# the SuperLink has missed its heartbeats for 20 s instead of 60 s (Flower allows no less).
QUICK_SUPERNODE = """
import time
from types import SimpleNamespace
from flwr.client.grpc_rere_client import connection
from flwr.supercore import heartbeat
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
connection.HEARTBEAT_DEFAULT_INTERVAL = heartbeat.HEARTBEAT_DEFAULT_INTERVAL = 10
start_client_internal.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10))
flower_supernode()
"""


class Loopback:
    """Starts and ends the processes; their output lies in ``folder/NAME.log``."""

    def __init__(self, folder: Path):
        self.folder, self.certificates = folder, folder / "certificates"
        make(self.certificates, 4, ["localhost", "127.0.0.1"])
        self.fleet, self.control, *self.runtime = free_ports(6)
        self.home = folder / "home"
        self.home.mkdir()
        config = f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{self.control}"\n'
        (self.home / "config.toml").write_text(config + f'root-certificates = "{self.certificates / "ca.crt"}"\n')
        self.environment = os.environ | {
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "BAYESFED_RUNS": str(folder / "runs"),
            "BAYESFED_SITES": str(folder / "sites"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.run = [*RUN, f"data.path={folder}/all.npz"]

    def config(self, node: int) -> str:
        """The ``--node-config`` of a node, which holds a file of its own."""
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
            "superlink",
            str(BIN / "flower-superlink"),
            "--database",
            f"{self.folder}/superlink.db",
            "--ssl-ca-certfile",
            f"{made}/ca.crt",
            "--ssl-certfile",
            f"{made}/server.pem",
            "--ssl-keyfile",
            f"{made}/server.key",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            "--fleet-api-address",
            f"127.0.0.1:{self.fleet}",
            "--port",
            str(self.control),
        )
        for port in (self.fleet, self.control):
            wait(lambda port=port: listens(port), 60, f"port {port}")

    def register(self, node: int) -> None:
        key = self.certificates / f"sn{node}.pub"
        done = self.flwr("supernode", "register", str(key), "loopback")
        assert done.exit_code == 0, done.output

    def supernode(self, node: int, **options: str | None) -> subprocess.Popen[bytes]:
        """Node 1, 2, 3 or 4; options replace or (None) leave out the command's own."""
        given = {
            "root-certificates": f"{self.certificates}/ca.crt", "superlink": f"127.0.0.1:{self.fleet}",
            "port": str(self.runtime[node - 1]), "node-config": self.config(node),
            "auth-supernode-private-key": f"{self.certificates}/sn{node}",
        } | {key.replace("_", "-"): value for key, value in options.items()}  # fmt: skip
        words = [word for key, value in given.items() if value is not None for word in (f"--{key}", value) if word]
        return self.start(f"supernode{node}", sys.executable, "-c", QUICK_SUPERNODE, *words)

    def restart(self, node: int) -> None:
        """Start a killed SuperNode, as a service manager would: at once, and again when the SuperLink has missed it,
        until it is in.
        """

        def accepted() -> bool:
            if self.processes[name].poll() is not None and self.online() < 3:
                self.supernode(node)
            return "SuperNode ID" in self.log(name)[before:]

        name = f"supernode{node}"
        before = len(self.log(name))
        self.supernode(node)
        wait(accepted, 120, f"{name} is back")

    def entries(self) -> int:
        """How many times the SuperLink let a node in."""
        return self.log("superlink").count("[Fleet.ActivateNode] Activated node_id=")

    def online(self) -> int:
        """How many SuperNodes the SuperLink has."""
        with mock.patch("sys.__stdout__", io.StringIO()) as stdout:  # where Flower prints JSON
            done = self.flwr("supernode", "list", "loopback", "--format", "json")
        assert done.exit_code == 0, done.output
        return sum(node["status"] == "online" for node in json.loads(stdout.getvalue())["nodes"])

    def flwr(self, *words: str) -> Result:
        """Flower's command, in this process: a new one would need seconds to start."""
        return CliRunner().invoke(app, words, env={"FLWR_HOME": str(self.home), "FLWR_DISABLE_UPDATE_CHECK": "1"})

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


@pytest.fixture(scope="session")
def wait_for():
    """``wait_for(condition, seconds, what)``."""
    return wait


def write_data(folder) -> None:
    """One file with everything and a client column, and one for each client with its rows only; all share the test
    set.
    """
    g = np.random.default_rng(5)
    centres = g.normal(size=(3, 6)).astype(np.float32)
    y, test_y = g.integers(0, 3, 120), np.arange(30) % 3
    x = (centres[y] + g.normal(size=(120, 6))).astype(np.float32)
    test_x = (centres[test_y] + g.normal(size=(30, 6))).astype(np.float32)
    client = np.sort(g.integers(0, 3, 120))
    np.savez(folder / "all.npz", x=x, y=y, client=client, x_test=test_x, y_test=test_y)
    for k in range(3):
        np.savez(folder / f"client{k}.npz", x=x[client == k], y=y[client == k], x_test=test_x, y_test=test_y)


@pytest.fixture(scope="session")
def nodes(tmp_path_factory):
    """A SuperLink that knows the keys of nodes 1 to 4, and SuperNodes 1 to 3; one for all tests, as each process takes
    seconds to start.
    """
    made = Loopback(tmp_path_factory.mktemp("loopback"))
    try:
        write_data(made.folder)
        made.superlink()
        for node in (1, 2, 3, 4):
            made.register(node)
        for node in (1, 2, 3):
            made.supernode(node)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def inline(nodes):
    """Two rounds in one process; the server's file serves for evaluation."""
    return bayesfed.run([*nodes.run, "rounds=2", "display=false", f"hydra.run.dir={nodes.folder}/inline"])


@pytest.fixture(scope="session")
def deployed(nodes):
    """The same on the SuperLink: its run directory."""
    code, output = nodes.deploy(*nodes.run, "rounds=2", "hydra.run.dir=deployed")
    assert code == 0, output[-3000:] + nodes.log("supernode1")[-2000:]
    return nodes.folder / "runs" / "deployed"


@pytest.fixture(scope="session")
def reached():
    """``reached(run_dir, 3)()``: whether a run has recorded round 3."""
    return lambda run_dir, round: lambda: any(line["round"] >= round for line in read_jsonl(run_dir / "rounds.jsonl"))
