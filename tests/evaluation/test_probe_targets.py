"""What it took to reach an accuracy."""

from __future__ import annotations

import pytest

import bayesfed
from bayesfed.evaluation.probes.targets import Targets


def to_targets(rounds, targets):
    return Targets(target_accuracy=targets).in_summary(rounds)


def record(round: int, accuracy: float | None, kind: str = "bayes", **more) -> dict:
    found = {
        "round": round,
        "bytes/down": 10.0,
        "bytes/up": 5.0,
        "gradients/total": 100.0 * round,
        "seconds/total": 2.0 * round,
        "posterior/precision_mean": 1.0 + round,
    }
    return {**found, **({} if accuracy is None else {f"{kind}/accuracy": accuracy}), **more}


def test_the_first_time_counts():
    rounds = [record(0, 10.0, **{"bytes/down": 0, "bytes/up": 0}), record(1, 55.0), record(2, 48.0), record(3, 80.0)]
    found = to_targets(rounds, [50, 80.0, 99.5])
    assert [found[f"to_target/50/{c}"] for c in ("rounds", "bytes", "gradients", "seconds")] == [1, 15, 100, 2]
    assert [found[f"to_target/80/{c}"] for c in ("rounds", "bytes", "gradients", "seconds")] == [3, 45, 300, 6]
    assert [found[f"to_target/99.5/{c}"] for c in ("rounds", "bytes", "gradients", "seconds")] == [None] * 4


def test_rounds_without_evaluation_are_paid_for():
    rounds = [record(0, 10.0), record(1, None), record(2, None), record(3, 70.0)]
    assert to_targets(rounds, [60])["to_target/60/bytes"] == 60  # round 0 counts 15 here


def test_the_averaged_prediction_counts_where_there_is_one():
    rounds = [record(1, 40.0, **{"mean/accuracy": 90.0}), record(2, 85.0, **{"mean/accuracy": 90.0})]
    assert to_targets(rounds, [80])["to_target/80/rounds"] == 2
    assert to_targets([record(1, 90.0, "mean")], [80])["to_target/80/rounds"] == 1


def test_the_mean_counts_under_a_precision_that_nobody_learned():
    fixed = {"mean/accuracy": 90.0, "posterior/precision_mean": 7.0}
    rounds = [record(1, 40.0, **fixed), record(2, 85.0, **fixed)]
    assert to_targets(rounds, [80])["to_target/80/rounds"] == 1


def test_no_target_says_nothing():
    assert to_targets([record(1, 90.0)], []) == {}


def test_in_a_run(tmp_path):
    common = ["rounds=2", "client.epochs=2", "eval.samples=2", "display=false", "figures=false"]
    result = bayesfed.run([*common, "strategy=fedavg", "eval.target_accuracy=[20,99.9]", f"hydra.run.dir={tmp_path}/r"])
    first = next(r for r in result.rounds if r["bayes/accuracy"] >= 20)
    assert result.summary["to_target/20/rounds"] == first["round"]
    sent = sum(r.get("bytes/down", 0) + r.get("bytes/up", 0) for r in result.rounds[: first["round"] + 1])
    assert result.summary["to_target/20/bytes"] == pytest.approx(sent)
    assert result.summary["to_target/99.9/rounds"] is None
