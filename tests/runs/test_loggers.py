"""Weights & Biases without a key: offline, into the run directory."""

from __future__ import annotations

import socket
import time

import pytest

from bayesfed.errors import InputError
from bayesfed.runs import loggers


def test_nothing_is_logged_by_default(run):
    assert not (run("rounds=1").run_dir / "wandb").exists()


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def test_offline_without_a_key(run, no_key, monkeypatch):
    pytest.importorskip("wandb")
    connect = socket.socket.connect

    def local_only(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), (
            f"connects to {address}"
        )
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    result = run("rounds=2", "logger=wandb")
    assert result.summary["status"] == "finished"
    (folder,) = (result.run_dir / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 20
    while b"finished" not in log.read_bytes():  # wandb's own process writes it, a moment later
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert b"mean/nll" in log.read_bytes()
    assert (result.run_dir / "wandb" / "id").read_text() in log.name


def test_a_key_means_online(no_key, monkeypatch):
    assert not loggers._has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert loggers._has_key()


def test_bad_mode():
    with pytest.raises(InputError, match=r"mode=onlin: did you mean 'online'"):
        loggers.WandbLogger(mode="onlin")
