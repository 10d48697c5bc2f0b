"""A wrong CA, plain text and a node without a registered key do not get in."""

from __future__ import annotations

import signal
import time

import pytest

from bayesfed.deployment.certificates import make, node_key

pytestmark = pytest.mark.deployment


@pytest.fixture(scope="module", autouse=True)
def _the_right_nodes_get_in(nodes, wait_for) -> None:
    """What the tests below look for is seen when a node is let in."""
    wait_for(lambda: nodes.online() == 3, 120, "registered nodes with their keys")
    assert nodes.entries() >= 3
    assert all("SuperNode ID" in nodes.log(f"supernode{node}") for node in (1, 2, 3))


@pytest.fixture
def refused(nodes):
    """Start node 4, which would get in, with these options: it must say why it is outside, and not be in."""

    def check(reason: str, **options: str | None) -> None:
        before = nodes.entries()
        stranger = nodes.supernode(4, max_retries="1", max_wait_time="5", **options)
        end = time.monotonic() + 120
        while stranger.poll() is None and reason not in nodes.log("supernode4") and time.monotonic() < end:
            time.sleep(0.1)
        online = nodes.online()  # while it runs, if it does
        nodes.end("supernode4")
        text = nodes.log("supernode4")
        (nodes.folder / "supernode4.log").unlink()
        assert reason in text, text[-2000:]
        assert "SuperNode ID" not in text
        assert (online, nodes.entries()) == (3, before)

    return check


def test_wrong_ca(refused, tmp_path) -> None:
    make(tmp_path / "other", 0, ["localhost"])
    refused("CERTIFICATE_VERIFY_FAILED", root_certificates=f"{tmp_path / 'other' / 'ca.crt'}")


def test_plain_text(refused) -> None:
    refused("Failed to initialize the connection", root_certificates=None, insecure="", auth_supernode_private_key=None)


def test_key_that_nobody_registered(refused, tmp_path) -> None:
    node_key(tmp_path / "stranger")
    refused("Failed to activate SuperNode", auth_supernode_private_key=f"{tmp_path / 'stranger'}")


def test_no_key(refused) -> None:
    refused("SuperNodes must be registered", auth_supernode_private_key=None)


def test_the_same_node_as_it_should_be(nodes, wait_for) -> None:
    nodes.supernode(4)
    wait_for(lambda: nodes.online() == 4, 60, "node 4 gets in")
    nodes.end("supernode4", signal.SIGTERM)
    wait_for(lambda: nodes.online() == 3, 60, "node 4 leaves")


def test_plain_text_run_command(nodes) -> None:
    config = nodes.home / "config.toml"
    text = config.read_text()
    config.write_text(text + f'\n[superlink.plain]\naddress = "127.0.0.1:{nodes.control}"\ninsecure = true\n')
    assert nodes.flwr("list", "loopback").exit_code == 0
    assert nodes.flwr("list", "plain").exit_code != 0
