"""Equal seed and configuration give equal bits: in process, on Ray with any number of workers, on Flower, and
resumed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bayesfed
from bayesfed.runs.directory import read_jsonl

DIGITS = ["experiment=digits_het10", "eval.every=9", "eval.samples=2", "display=false", "figures=false"]
SAMPLED = [*DIGITS, "strategy.fraction=0.5", "client.keep_momentum=true", "client.epochs=1"]


# summed in groups of eight
MANY = [*DIGITS, "partition=iid", "partition.num_clients=70", "rounds=2", "client.epochs=1"]


def digits(path: Path, *overrides: str, base: list[str] = DIGITS) -> Path:
    return bayesfed.run([*base, *overrides, f"hydra.run.dir={path}"]).run_dir


@pytest.fixture(scope="session")
def inline(tmp_path_factory) -> Path:
    return digits(tmp_path_factory.mktemp("inline") / "run", "rounds=3", "engine=inline")


@pytest.fixture(scope="session")
def inline_sampled(tmp_path_factory) -> Path:
    return digits(tmp_path_factory.mktemp("inline") / "sampled", "rounds=3", "engine=inline", base=SAMPLED)


def test_inline_again(inline, tmp_path, digest):
    assert digest(digits(tmp_path / "again", "rounds=3", "engine=inline")) == digest(inline)


def test_another_seed_gives_other_bits(inline, tmp_path, digest):
    assert digest(digits(tmp_path / "seed", "rounds=3", "engine=inline", "seed=2")) != digest(inline)


@pytest.mark.engines
def test_ray_without_compiled_functions(tmp_path, digest, ray_with_three_slots):
    plain = ["rounds=3", "accelerate=off"]
    found = digest(digits(tmp_path / "inline", *plain, "engine=inline"))
    assert digest(digits(tmp_path / "ray", *plain, "engine=ray", "engine.num_workers=2")) == found


@pytest.mark.engines
@pytest.mark.parametrize("workers", [1, 3])
def test_ray(inline, tmp_path, digest, ray_with_three_slots, workers):
    assert digest(digits(tmp_path / "ray", "rounds=3", "engine=ray", f"engine.num_workers={workers}")) == digest(inline)


@pytest.mark.engines
def test_flower(inline, tmp_path, digest):
    assert digest(digits(tmp_path / "flower", "rounds=3", "engine=flower")) == digest(inline)


@pytest.mark.engines
def test_resumed_on_ray_with_client_sampling_and_kept_momentum(inline_sampled, tmp_path, digest, ray_with_three_slots):
    run_dir = digits(tmp_path / "half", "rounds=2", "engine=inline", base=SAMPLED)
    bayesfed.run([f"resume={run_dir}", "rounds=3", "engine=ray", "engine.num_workers=2"])
    assert digest(run_dir) == digest(inline_sampled)


HARD = [
    *SAMPLED,
    "system.stragglers=0.5",
    "system.dropout=0.2",
    "system.deadline=2.5",
    "eval.personalized=true",
    "rounds=2",
]


@pytest.fixture(scope="session")
def inline_hard(tmp_path_factory) -> Path:
    return digits(tmp_path_factory.mktemp("inline") / "hard", "engine=inline", base=HARD)


@pytest.mark.engines
@pytest.mark.parametrize("engine", [("ray", 2), ("flower", 1)], ids=str)
def test_stragglers_dropouts_and_personalised_evaluation(inline_hard, tmp_path, digest, ray_with_three_slots, engine):
    name, workers = engine
    run_dir = digits(tmp_path / "run", f"engine={name}", f"engine.num_workers={workers}", base=HARD)
    assert digest(run_dir) == digest(inline_hard)
    mine, theirs = (read_jsonl(path / "client_tests.jsonl") for path in (run_dir, inline_hard))
    assert mine == theirs
    assert sum("personalized/accuracy" in line for line in mine) == 10
    mine, theirs = (read_jsonl(path / "rounds.jsonl") for path in (run_dir, inline_hard))
    for one, other in zip(mine, theirs, strict=True):
        for key in ("clients/failed", "bytes/down", "bytes/up", "gradients/total"):
            assert one.get(key) == other.get(key)
    assert sum(record.get("clients/failed", 0) for record in mine) > 0


def test_stragglers_and_dropouts_resumed(inline_hard, tmp_path, digest):
    run_dir = digits(tmp_path / "half", "rounds=1", base=[o for o in HARD if not o.startswith("rounds")])
    bayesfed.run([f"resume={run_dir}", "rounds=2"])
    assert digest(run_dir) == digest(inline_hard)
    last = [line for line in read_jsonl(run_dir / "client_tests.jsonl") if line["round"] == 2]
    assert last == read_jsonl(inline_hard / "client_tests.jsonl")


@pytest.mark.engines
@pytest.mark.parametrize("options", [["strategy=bayes_admm"], ["strategy=fedavg", "wire=float16"]], ids=str)
def test_groups_of_clients_summed_in_the_workers(tmp_path, digest, ray_with_three_slots, options):
    inline = digits(tmp_path / "inline", "engine=inline", *options, base=MANY)
    ray = digits(tmp_path / "ray", "engine=ray", "engine.num_workers=2", *options, base=MANY)
    assert digest(ray) == digest(inline)
    for name in ("bytes/up", "clients/replied", "admm/primal_mean"):
        one, other = (read_jsonl(path / "rounds.jsonl")[-1][name] for path in (inline, ray))
        assert one == pytest.approx(other, rel=1e-12), name


@pytest.mark.parametrize("base", ["all", "sampled"])
def test_resumed_after_round_2(inline, inline_sampled, tmp_path, digest, base):
    base, whole = (DIGITS, inline) if base == "all" else (SAMPLED, inline_sampled)
    run_dir = digits(tmp_path / "half", "rounds=2", "engine=inline", base=base)
    assert digest(run_dir) != digest(whole)
    bayesfed.run([f"resume={run_dir}", "rounds=3"])
    assert digest(run_dir) == digest(whole)


@pytest.mark.parametrize("strategy", ["bayes_admm", "fedprox"])
@pytest.mark.parametrize("wire", ["float16", "bfloat16"])
def test_resumed_after_round_2_in_16_bits(tmp_path, digest, wire, strategy):
    base = [
        "experiment=linreg",
        f"strategy={strategy}",
        f"wire={wire}",
        "eval.samples=2",
        "display=false",
        "figures=false",
    ]
    base += ["strategy.family=diagonal"] if strategy == "bayes_admm" else []
    whole = digits(tmp_path / "whole", "rounds=4", "strategy.fraction=0.6", base=base)
    run_dir = digits(tmp_path / "half", "rounds=2", "strategy.fraction=0.6", base=base)
    assert digest(run_dir) != digest(whole)
    bayesfed.run([f"resume={run_dir}", "rounds=4"])
    assert digest(run_dir) == digest(whole)


def test_killed_in_round_3_and_resumed(inline, tmp_path, digest):
    run_dir = tmp_path / "killed"
    kill_in_round([*DIGITS, "rounds=3", "engine=inline", f"hydra.run.dir={run_dir}"], run_dir, 3)
    assert digest(run_dir) != digest(inline)
    bayesfed.run([f"resume={run_dir}"])
    assert digest(run_dir) == digest(inline)


def kill_in_round(overrides: list[str], run_dir: Path, round: int) -> None:
    """Run in a process of its own; SIGKILL it when a client has finished ``round``."""
    code = "import sys; from bayesfed.cli import main; main(sys.argv[1:])"
    child = subprocess.Popen([sys.executable, "-c", code, *overrides], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        clients = run_dir / "clients.jsonl"
        while not (clients.exists() and clients.read_text().count(f'"round": {round}, "client":')):
            assert child.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
