"""A SuperNode that stands still: the others go on without it after the deadline."""

from __future__ import annotations

import os
import signal

import pytest
from safetensors.torch import load_file

from bayesfed.runs.checkpoint import Checkpoint
from bayesfed.runs.directory import read_jsonl

pytestmark = [pytest.mark.deployment, pytest.mark.faults]


def test_a_slow_client_is_left_out_and_returns(nodes, deployed, wait_for, reached) -> None:
    """Client 2's machine stops (SIGSTOP) with the message of round 1 in hand and wakes up when that round is over: its
    late reply does not count, its reply to round 2 does, and the server's sum of sites is that of the clients'."""
    run_dir = nodes.folder / "runs" / "slow"
    usual = max(r.get("seconds/train", 0) for r in read_jsonl(deployed / "rounds.jsonl"))
    deadline = round(min(100, max(15, 2 * usual)))  # for clients that do their best here; Flower gives a node up later
    settings = ["rounds=2", "strategy.damping=0.5", f"strategy.timeout={deadline}", "hydra.run.dir=slow"]
    others = set((nodes.folder / "sites").iterdir())
    before = nodes.log("supernode3").count("Receiving: train message")
    run = nodes.deploying(*nodes.run, *settings)
    stopped = nodes.processes["supernode3"].pid
    try:
        wait_for(lambda: nodes.log("supernode3").count("Receiving: train message") > before, 120, "round 1")
        os.killpg(stopped, signal.SIGSTOP)
        wait_for(reached(run_dir, 1), deadline + 60, "the end of round 1")
    finally:
        os.killpg(stopped, signal.SIGCONT)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output[-3000:]
    seen = {(line["round"], line["client"]): line for line in read_jsonl(run_dir / "clients.jsonl")}
    assert len(seen) == 6
    assert {key: line.get("reason") for key, line in seen.items() if not line["accepted"]} == {
        (1, 2): "no reply before the timeout"
    }
    rounds = read_jsonl(run_dir / "rounds.jsonl")
    assert (
        deadline - 1 < rounds[1]["seconds/train"] < deadline + 60
    )  # the client woke up after it; a busy machine adds seconds
    assert [line["clients/replied"] for line in rounds[1:]] == [2, 3]
    server = Checkpoint.latest(run_dir / "checkpoint").tensors
    mine = set((nodes.folder / "sites").iterdir()) - others
    sites = [load_file(path) for folder in mine for path in folder.rglob("round-000002.safetensors")]
    assert len(sites) == 3
    for mine, theirs in (("hsum.first", "site.first"), ("hsum.second", "site.second")):
        total, largest = sum(site[theirs] for site in sites), max(float(site[theirs].abs().max()) for site in sites)
        assert float((server[mine] - total).abs().max()) <= 1e-12 * largest
