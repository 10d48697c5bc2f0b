"""What a run leaves behind: files, keys, metadata."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from flwr.common.serde import error_to_proto, recorddict_to_proto
from omegaconf import OmegaConf
from safetensors import safe_open

import bayesfed
from bayesfed.engine.inline import InlineGrid
from bayesfed.errors import InputError
from bayesfed.runs.directory import RunDirectory, clean, read_jsonl, write_text

QUIET = ["display=false", "figures=false", "eval.samples=2", "client.epochs=1", "model.hidden=[8]"]
CLASSIFICATION = {f"{kind}/{name}" for kind in ("mean", "bayes") for name in ("accuracy", "nll", "ece", "brier")}
REGRESSION = {"mean/rmse", "mean/nll", "bayes/rmse", "bayes/nll"}
PRECISION = {"posterior/precision_min", "posterior/precision_mean", "posterior/precision_max"}
ROUND = {
    "clients/sampled", "clients/replied", "clients/failed", "clients/loss", "bytes/down", "bytes/up",
    "seconds/round", "seconds/train", "admm/primal_mean", "admm/primal_max", "guard/clients",
}  # fmt: skip
DUAL = {"dual/norm", "admm/dual", "admm/dual_norm_mean", "admm/dual_norm_max", "guard/count"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return bayesfed.run([*QUIET, "rounds=4", f"hydra.run.dir={tmp_path_factory.mktemp('digits') / 'run'}"])


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory):
    overrides = ["strategy=fedavg", "rounds=2", f"hydra.run.dir={tmp_path_factory.mktemp('fedavg') / 'run'}"]
    return bayesfed.run([*QUIET, *overrides])


def files(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and "sites" not in p.parts}


def test_files(digits):
    expected = {"config.yaml", "rounds.jsonl", "clients.jsonl", "log.jsonl", "summary.json", "posterior.safetensors"}
    assert files(digits.run_dir) == expected | {f"checkpoint/server-00000{r}.safetensors" for r in (3, 4)}


def test_rounds_have_exactly_these_keys(digits):
    lines = [json.loads(line) for line in (digits.run_dir / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    start = {"round", "seconds/total", "gradients/total"} | CLASSIFICATION | PRECISION
    assert set(lines[0]) == start
    for line in lines[1:]:
        assert set(line) == start | ROUND | DUAL | {"hessian/moved"}
    assert lines == digits.rounds


def test_rounds_of_a_regression(run):
    lines = run("rounds=1").rounds
    start = {"round", "seconds/total", "gradients/total"} | REGRESSION | PRECISION
    assert set(lines[0]) == start
    assert set(lines[1]) == start | ROUND | DUAL


def test_rounds_of_a_point_estimate(fedavg):
    assert set(fedavg.rounds[0]) == {"round", "seconds/total", "gradients/total"} | CLASSIFICATION
    assert set(fedavg.rounds[1]) == {"round", "seconds/total", "gradients/total"} | CLASSIFICATION | ROUND
    for line in fedavg.rounds:  # a point mass: averaging models changes nothing
        assert line["bayes/nll"] == line["mean/nll"]


def test_values_are_in_their_units(digits):
    for line in digits.rounds:
        assert 0 <= line["mean/accuracy"] <= 100
        assert 0 <= line["mean/ece"] <= 100
        assert 0 <= line["mean/brier"] <= 2
    assert abs(digits.rounds[0]["mean/nll"] - math.log(10)) < 1e-6  # the server starts at the prior mean 0
    assert max(line["mean/accuracy"] for line in digits.rounds) > 20
    totals = [line["seconds/total"] for line in digits.rounds]
    assert totals == sorted(totals)
    assert totals[-1] == pytest.approx(sum(line["seconds/round"] for line in digits.rounds[1:]))


def test_summary(digits):
    summary = json.loads((digits.run_dir / "summary.json").read_text())
    last = {key: value for key, value in digits.rounds[-1].items() if key != "round"}
    rest = {
        "method": "bayes_admm", "family": "diagonal", "client": "ivon", "seed": 1, "rounds": 4, "status": "finished",
        "parameters": 64 * 8 + 8 + 8 * 10 + 10, "clients": 10, "evaluated_on": "test",
        "bytes/total": 4 * (last["bytes/down"] + last["bytes/up"]),
    }  # fmt: skip
    expected = last | rest
    assert {key: summary[key] for key in expected} == expected
    assert summary["wall_clock"] >= last["seconds/total"]
    for key in CLASSIFICATION:
        values = [line[key] for line in digits.rounds[1:]]
        assert summary[f"last3/{key}"] == pytest.approx(sum(values[-3:]) / 3)
        assert summary[f"best/{key}"] == (max if "accuracy" in key else min)(values)
    assert {"torch", "flwr", "ray", "numpy", "hydra-core", "bayesfed"} <= set(summary["versions"])
    assert summary["versions"]["torch"] == torch.__version__
    assert set(summary["git_commit"]) <= set("0123456789abcdef")
    assert summary == digits.summary


def test_posterior_file(digits):
    with safe_open(digits.run_dir / "posterior.safetensors", framework="pt") as file:
        metadata = file.metadata()
        shapes = {name: (tuple(t.shape), t.dtype) for name in file.keys() if (t := file.get_tensor(name)) is not None}  # noqa: SIM118
    assert shapes == {"mean": ((610,), torch.float32), "precision": ((610,), torch.float32)}
    assert set(metadata) == {"bayesfed"}
    described = json.loads(metadata["bayesfed"])
    assert set(described) == {"family", "format", "model", "xxh3"}
    assert described["family"] == "diagonal"
    assert json.dumps(described, sort_keys=True) == metadata["bayesfed"]
    assert digits.posterior.dim == 610


def test_clients_file(digits):
    lines = read_jsonl(digits.run_dir / "clients.jsonl")
    assert [(line["round"], line["client"]) for line in lines] == [(r, c) for r in (1, 2, 3, 4) for c in range(10)]
    for line in lines:
        assert line["accepted"] is True
        assert {"loss", "num-examples", "seconds", "residual", "dual-norm"} <= set(line)
    sizes = [line["num-examples"] for line in lines[:10]]
    assert sizes == [line["num-examples"] for line in lines[10:20]]


def test_stored_configuration_runs_again_to_the_same_bits(digits, tmp_path, digest):
    stored = OmegaConf.load(digits.run_dir / "config.yaml")
    assert "hydra" not in stored
    assert stored.client.lr == 0.02  # tuned values included
    assert stored.client.schedule_rounds == 4
    overrides = [
        f"{group}.{key}={value}" for group in ("strategy", "client") for key, value in stored[group].items()
        if key not in ("_target_", "name", "default_client") and value is not None and not OmegaConf.is_list(value)
    ]  # fmt: skip
    again = bayesfed.run([*QUIET, "rounds=4", *overrides, f"hydra.run.dir={tmp_path / 'again'}"])
    assert digest(again.run_dir) == digest(digits.run_dir)


@pytest.mark.parametrize("wire", ["full", "float16", "bfloat16"])
@pytest.mark.parametrize("strategy", ["bayes_admm", "fedprox"])
def test_bytes_are_those_of_flowers_messages(tmp_path, monkeypatch, sabotage, strategy, wire):
    """To the byte, also of what is refused: an error, and a reply of another round."""
    sent = {"down": 0, "up": 0}
    stream = InlineGrid.stream

    def size(message) -> int:
        if message.metadata.message_type != "train":
            return 0
        proto = error_to_proto(message.error) if message.has_error() else recorddict_to_proto(message.content)
        return len(proto.SerializeToString())

    def counting(self, messages, *, timeout=None):
        messages = list(messages)
        sent["down"] += sum(size(message) for message in messages)
        for reply in stream(self, messages, timeout=timeout):
            if reply.metadata.src_node_id == 3 and reply.metadata.message_type == "train":
                reply.content["metrics"]["round"] = 200
            sent["up"] += size(reply)
            yield reply

    def fail(solution):
        raise RuntimeError("out of memory")

    sabotage(fail, client=1, round=2)
    monkeypatch.setattr(InlineGrid, "stream", counting)
    base = ["experiment=linreg", f"strategy={strategy}", f"wire={wire}", "rounds=3", "display=false", "figures=false"]
    family = ["strategy.family=diagonal", "strategy.damping=0.3"] if strategy == "bayes_admm" else []
    result = bayesfed.run([*base, *family, "eval.samples=4", f"hydra.run.dir={tmp_path / 'run'}"])
    assert [line["clients/failed"] for line in result.rounds[1:]] == [1, 2, 1]
    assert sent["down"] == sum(line["bytes/down"] for line in result.rounds[1:])
    assert sent["up"] == sum(line["bytes/up"] for line in result.rounds[1:])
    assert result.summary["bytes/total"] == sent["down"] + sent["up"]


def test_evaluating_now_and_then(run):
    rounds = run("rounds=5", "eval.every=2", "eval.bayes_every=4").rounds
    assert [line["round"] for line in rounds if "mean/nll" in line] == [0, 2, 4, 5]
    assert [line["round"] for line in rounds if "bayes/nll" in line] == [0, 4, 5]


def test_no_round_at_all_is_a_run(run):
    result = run("rounds=0")
    assert [line["round"] for line in result.rounds] == [0]
    assert result.summary["status"] == "finished"
    assert torch.equal(result.posterior.mean, torch.zeros_like(result.posterior.mean))


def test_used_directory_is_refused(run):
    first = run("rounds=1")
    before = (first.run_dir / "rounds.jsonl").read_text()
    with pytest.raises(InputError, match="already holds a run"):
        run("rounds=2")
    assert (first.run_dir / "rounds.jsonl").read_text() == before


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "rounds.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"rou')
    assert read_jsonl(tmp_path / "rounds.jsonl") == [{"round": 0}, {"round": 1}]
    run = RunDirectory(tmp_path)
    run.truncate("rounds", 0)
    run.append("rounds", {"round": 1, "loss": math.nan})
    assert read_jsonl(tmp_path / "rounds.jsonl") == [{"round": 0}, {"round": 1, "loss": None}]


def test_json_has_no_nan():
    assert clean({"a": math.inf, "b": 1.0, "c": "x"}) == {"a": None, "b": 1.0, "c": "x"}
