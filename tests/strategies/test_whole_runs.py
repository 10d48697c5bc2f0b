"""Every strategy, with the client that comes with it, on real data: sampled, resumed, and on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

import bayesfed

STRATEGIES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "strategy").glob("*.yaml"))
STATEFUL = [
    "bregman_admm",
    "fedadam",
    "fedadmm",
    "fedavgm",
    "feddyn",
    "fedlap",
    "fedlap_cov",
    "fedyogi",
    "pvi",
    "scaffold",
]
ON_RAY = ["fedlap_cov", "krum", "scaffold"]
QUICK = [
    "experiment=digits_het10",
    "strategy.fraction=0.3",
    "client.epochs=1",
    "eval.every=9",
    "eval.samples=2",
    "display=false",
    "figures=false",
]


def start(path: Path, name: str, *overrides: str):
    early = ["strategy.burn_in_rounds=1"] if name == "fedpa" else []
    return bayesfed.run([*QUICK, f"strategy={name}", *early, *overrides, f"hydra.run.dir={path}"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_rounds_with_the_default_client(tmp_path, name: str) -> None:
    """30 % of the clients; every reply is accepted and the posterior moves."""
    result = start(tmp_path / "run", name, "rounds=2")
    assert [r["clients/replied"] for r in result.rounds[1:]] == [3, 3]
    assert sum(r["guard/count"] for r in result.rounds[1:] if "guard/count" in r) == 0
    assert result.summary["mean/accuracy"] > 5
    assert result.rounds[-1]["admm/primal_mean"] > 0


@pytest.mark.parametrize("name", STATEFUL)
def test_resumed_runs_have_the_same_bits(tmp_path, digest, name: str) -> None:
    whole = start(tmp_path / "whole", name, "rounds=3", "strategy.fraction=0.6").run_dir
    half = start(tmp_path / "half", name, "rounds=2", "strategy.fraction=0.6").run_dir
    bayesfed.run([f"resume={half}", "rounds=3"])
    assert digest(half) == digest(whole)


@pytest.mark.engines
@pytest.mark.parametrize("name", ON_RAY)
def test_the_same_bits_on_ray(tmp_path, digest, ray_with_three_slots, name: str) -> None:
    """Vectors beside the posterior, durable state, sums in workers (70 clients) and rules that need all replies."""
    many = [
        "partition=iid",
        "partition.num_clients=70",
        "strategy.fraction=1",
        "rounds=2",
        "engine.clients_per_batch=1",
    ]
    inline = start(tmp_path / "inline", name, *many).run_dir
    ray = start(tmp_path / "ray", name, *many, "engine=ray", "engine.num_workers=2").run_dir
    assert digest(ray) == digest(inline)
