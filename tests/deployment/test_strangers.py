"""A wrong CA, plain text and a node without a registered key do not get in."""

from __future__ import annotations

import signal
import time

import pytest

from bayesfed.deployment.certificates import make, node_key

pytestmark = pytest.mark.deployment


@pytest.fixture(scope="module", autouse=True)
def _the_right_node_gets_in(loopback, wait_for) -> None:
    """What the tests below look for is seen when a node is let in; then it leaves, and nobody is online."""
    loopback.supernode(3, "partition-id=2")
    wait_for(lambda: loopback.online() == 1, 60, "a registered node with its key")
    assert entries(loopback) == 1
    loopback.end("supernode3", signal.SIGTERM)
    wait_for(lambda: loopback.online() == 0, 60, "the node has left")


def entries(loopback) -> int:
    """How many times the SuperLink let a node in."""
    return loopback.log("superlink").count("[Fleet.ActivateNode] Activated node_id=")


@pytest.fixture
def refused(loopback):
    """Start a SuperNode with these options: it must say why it is outside, and not be in, then and some seconds later."""

    def check(reason: str, **options: str | None) -> None:
        start, before = len(loopback.log("supernode3")), entries(loopback)
        node = loopback.supernode(3, "partition-id=2", max_retries="1", max_wait_time="5", **options)
        end = time.monotonic() + 120
        while node.poll() is None and reason not in loopback.log("supernode3")[start:] and time.monotonic() < end:
            time.sleep(0.2)
        online = loopback.online()  # while it runs, if it does
        loopback.end("supernode3")
        text = loopback.log("supernode3")[start:]
        assert reason in text, text[-2000:]
        assert "SuperNode ID" not in text
        assert (online, entries(loopback)) == (0, before)

    return check


def test_wrong_ca(loopback, refused, tmp_path) -> None:
    make(tmp_path / "other", 0, ["localhost"])
    refused("CERTIFICATE_VERIFY_FAILED", root_certificates=f"{tmp_path / 'other' / 'ca.crt'}")


def test_plain_text(loopback, refused) -> None:
    refused("Failed to initialize the connection", root_certificates=None, insecure="", auth_supernode_private_key=None)


def test_key_that_nobody_registered(loopback, refused, tmp_path) -> None:
    node_key(tmp_path / "stranger")
    refused("Failed to activate SuperNode", auth_supernode_private_key=f"{tmp_path / 'stranger'}")


def test_no_key(loopback, refused) -> None:
    refused("SuperNodes must be registered", auth_supernode_private_key=None)


def test_plain_text_run_command(loopback) -> None:
    config = loopback.home / "config.toml"
    text = config.read_text()
    config.write_text(text + f'\n[superlink.plain]\naddress = "127.0.0.1:{loopback.control}"\ninsecure = true\n')
    done = loopback.call("flwr", "list", "plain")
    assert done.returncode != 0
