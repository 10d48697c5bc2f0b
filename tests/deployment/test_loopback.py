"""Real processes over gRPC with TLS and authentication: the same bits as in one process, whatever is killed on the
way.
"""

from __future__ import annotations

import signal

import pytest

import bayesfed
from bayesfed.runs.checkpoint import Checkpoint
from bayesfed.runs.directory import read_jsonl

pytestmark = pytest.mark.deployment


def test_same_bits_as_in_one_process(nodes, inline, deployed, digest) -> None:
    assert [line["clients/failed"] for line in read_jsonl(deployed / "rounds.jsonl")[1:]] == [0, 0], (
        deployed / "log.jsonl"
    ).read_text()
    assert digest(deployed) == digest(inline.run_dir)
    names = {path.parent.name for path in (nodes.folder / "sites").rglob("*.safetensors")}
    assert names == {"client-00000", "client-00001", "client-00002"}


@pytest.mark.faults
def test_killed_supernode_and_killed_superlink(nodes, inline, deployed, digest, wait_for, reached) -> None:
    """A SuperNode dies (SIGKILL) with a message in hand and is started again; the SuperLink dies with its ServerApp and
    the run is resumed: the same bits as if nothing had happened."""
    overrides = [*nodes.run, "rounds=4", "resume=deployed"]
    first = nodes.deploying(*overrides)
    before = nodes.log("supernode2").count("Receiving: train message")
    wait_for(lambda: nodes.log("supernode2").count("Receiving: train message") > before, 120, "round 3")
    nodes.end("supernode2")
    nodes.restart(2)
    wait_for(reached(deployed, 3), 120, "round 3 goes on")
    nodes.end("superlink", signal.SIGKILL)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 1, output
    assert Checkpoint.latest(deployed / "checkpoint").round == 3

    nodes.superlink()
    for node in (1, 2, 3):
        if nodes.processes[f"supernode{node}"].poll() is not None:
            nodes.restart(node)
    wait_for(lambda: nodes.online() == 3, 120, "all nodes are back")
    code, output = nodes.deploy(*overrides)
    assert code == 0, output[-3000:]
    longer = bayesfed.run([f"resume={inline.run_dir}", "rounds=4", "display=false"])
    assert digest(deployed) == digest(longer.run_dir)
    lines = read_jsonl(deployed / "rounds.jsonl")
    assert [(line["round"], line["clients/replied"]) for line in lines[1:]] == [(t, 3) for t in range(1, 5)]
