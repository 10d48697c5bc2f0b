"""What is kept of a user's model, from the run to ``bayesfed.load``."""

# ruff: noqa: NPY002 - the global generator is what these tests are about
from __future__ import annotations

import copy
import json
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bayesfed
from bayesfed.app import plain, problem_of
from bayesfed.config import compose_config
from bayesfed.errors import InputError, RunFailed
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.model_state import Constants
from bayesfed.runs.directory import RunDirectory

MODELS = '''
import random

import numpy as np
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, input_shape, num_outputs):
        super().__init__()
        self.body, self.head = nn.Linear(64, 8), nn.Linear(8, num_outputs)

    def forward(self, x):
        return self.head(self.features(x.flatten(1)).relu())

    def features(self, x):
        return self.body(x)


class Pretrained(Plain):
    built = 0

    def __init__(self, input_shape, num_outputs, weights=None):
        super().__init__(input_shape, num_outputs)
        Pretrained.built += 1
        self.body.load_state_dict(torch.load(weights, weights_only=True))
        self.body.requires_grad_(False)


class FrozenLayer(Plain):
    def __init__(self, *shape, **named):
        super().__init__(*shape, **named)
        self.body.requires_grad_(False)


class ConstantBuffers(Plain):
    def __init__(self, *shape, **named):
        super().__init__(*shape, **named)
        self.register_buffer("scale", torch.randn(8))
        self.register_buffer("picked", torch.randperm(8), persistent=False)

    def features(self, x):
        return self.body(x)[:, self.picked] * self.scale


class PlainAttributes(Plain):
    """Drawn by three generators, registered nowhere."""

    def __init__(self, *shape, **named):
        super().__init__(*shape, **named)
        self.scale, self.shift, self.factor = torch.randn(8), np.random.normal(size=8), random.gauss(0, 1)

    def features(self, x):
        return self.body(x) * self.scale + torch.as_tensor(self.shift, dtype=x.dtype) * self.factor


class DrawnByNumPy(Plain):
    """Trainable weights from other generators than torch's."""

    def __init__(self, *shape, **named):
        super().__init__(*shape, **named)
        with torch.no_grad():
            self.body.weight.copy_(torch.from_numpy(np.random.normal(size=(8, 64)) / 8))
            self.head.bias.fill_(random.random())


class Tied(Plain):
    def __init__(self, *shape, **named):
        super().__init__(*shape, **named)
        self.middle = nn.Linear(8, 8)
        self.again = self.middle

    def features(self, x):
        return self.again(self.middle(self.body(x)))


class KeepsFeatures(Plain):
    """As many do: what the forward computes is kept in an attribute, and read back."""

    def features(self, x):
        self.kept = self.body(x)
        return self.kept + 0


class Noisy(Plain):
    """Draws in training."""

    def features(self, x):
        noise = np.random.normal(size=8) + random.gauss(0, 1) if self.training else 0.0
        return self.body(x) + torch.as_tensor(noise, dtype=x.dtype)


class Counts(Plain):
    """Seen by no check on a few rows: a buffer that every third training forward changes."""

    def __init__(self, *shape, **named):
        super().__init__(*shape, **named)
        self.register_buffer("total", torch.zeros(()))
        self.forwards = 0

    def features(self, x):
        self.forwards += self.training
        if self.training and self.forwards % 3 == 0:
            self.total += x.detach().mean()
        return self.body(x) + self.total
'''
NAMES = ["Plain", "FrozenLayer", "ConstantBuffers", "PlainAttributes", "DrawnByNumPy", "Tied", "KeepsFeatures"]
TRAINING = ["Noisy", "Counts"]  # show themselves in training only


def module_of(folder: Path) -> str:
    """A name of its own for each test's module: Python keeps what it imported."""
    return f"own_{folder.name}".replace("-", "_")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """``own("Tied", "rounds=1")``: a run with that model of a module in the working directory."""
    module = module_of(tmp_path)
    (tmp_path / f"{module}.py").write_text(MODELS)
    for name in [*NAMES, *TRAINING]:
        path = tmp_path / "conf" / "model" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"_target_: {module}.{name}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def start(model: str, *overrides: str, to: str = "run"):
        settings = [
            f"model={model}",
            "strategy=fedavg",
            "rounds=1",
            "client.epochs=1",
            "display=false",
            "figures=false",
        ]
        return bayesfed.run([*settings, f"hydra.run.dir={tmp_path / to}", *overrides])

    return start


def evaluated_rows(run_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    test = problem_of(plain(RunDirectory(run_dir).config())).test
    return test.x if test.index is None else test.x[test.index], test.targets()


def accuracy(trained: bayesfed.TrainedRun, x: torch.Tensor, y: torch.Tensor) -> float:
    return 100 * float((trained.predict(x, samples=0).argmax(1) == y).double().mean())


@pytest.mark.parametrize("model", NAMES)
def test_what_is_loaded_predicts_as_the_run_did(own, model):
    found = own(model)
    x, y = evaluated_rows(found.run_dir)
    trained = bayesfed.load(found.run_dir)
    assert accuracy(trained, x, y) == pytest.approx(found.summary["mean/accuracy"], abs=1e-9)
    mean = trained.mean_model()
    assert torch.equal(
        mean(trained.scaling(x)).softmax(1), bayesfed.load(found.run_dir).mean_model()(trained.scaling(x)).softmax(1)
    )


@pytest.mark.parametrize("model", ["FrozenLayer", "ConstantBuffers"])
def test_the_posterior_file_alone_holds_the_whole_model(own, model, tmp_path):
    found = own(model)
    x, y = evaluated_rows(found.run_dir)
    (found.run_dir / "config.yaml").unlink()  # and with it the seed
    assert accuracy(bayesfed.load(found.run_dir), x, y) == pytest.approx(found.summary["mean/accuracy"], abs=1e-9)


def test_a_pretrained_model_keeps_its_weights_and_only_what_is_trainable_travels(own, tmp_path):
    body = torch.nn.Linear(64, 8)
    torch.save(body.state_dict(), tmp_path / "body.pt")
    text = f"_target_: {module_of(tmp_path)}.Pretrained\nweights: {tmp_path / 'body.pt'}\n"
    (tmp_path / "conf" / "model" / "Pretrained.yaml").write_text(text)
    found = own("Pretrained", "partition.num_clients=2", "engine=inline")
    assert sys.modules[module_of(tmp_path)].Pretrained.built == 3  # server, check, clients
    held = load_file(found.run_dir / "posterior.safetensors")
    assert torch.equal(held["fixed.body.weight"], body.weight)
    assert torch.equal(held["fixed.body.bias"], body.bias)
    assert held["mean"].numel() == found.summary["parameters"] == 8 * 10 + 10
    assert found.summary["bytes/up"] < 2 * 4 * 90 + 4000


def test_a_file_from_before_fixed_tensors_were_kept_loads_by_the_seed(own, monkeypatch):
    monkeypatch.setattr("bayesfed.problem.flat.FlatModel.fixed", property(lambda self: {}))
    found = own("FrozenLayer", "seed=3")
    assert set(load_file(found.run_dir / "posterior.safetensors")) == {"mean", "precision"}
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(found.run_dir.parent))
    assert accuracy(bayesfed.load(found.run_dir), *evaluated_rows(found.run_dir)) == pytest.approx(
        found.summary["mean/accuracy"]
    )


def test_only_models_with_other_state_have_more_in_their_file(own):
    assert set(load_file(own("Plain", to="a").run_dir / "posterior.safetensors")) == {"mean", "precision"}
    held = load_file(own("FrozenLayer", to="b").run_dir / "posterior.safetensors")
    assert set(held) == {"mean", "precision", "fixed.body.weight", "fixed.body.bias"}


@pytest.mark.parametrize("batch", [1, 5])
def test_a_buffer_that_changes_later_fails_every_client_and_reaches_none(own, tmp_path, batch):
    with pytest.raises(RunFailed, match=r"training changes the buffer 'total'.*GroupNorm.*keep other buffers constant"):
        own("Counts", f"engine.clients_per_batch={batch}", "client.epochs=3")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    assert len(reasons) == 10
    assert len(set(reasons)) == 1


def test_constants_are_put_back():
    module = torch.nn.BatchNorm1d(2)
    constants = Constants(model := FlatModel(module), {"name": "mine"})
    before = {name: value.clone() for name, value in model.fixed.items()}

    def ended_by(error):
        with constants.unchanged():
            module(torch.randn(4, 2, generator=torch.Generator().manual_seed(1)))
            module.num_batches_tracked = torch.ones(3)
            if error:
                raise error

    with pytest.raises(InputError, match="'running_mean'"):
        ended_by(None)
    with pytest.raises(KeyError, match="own"):  # what the client raised is what it says
        ended_by(KeyError("own"))
    assert model.fixed.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.fixed.items())
    with constants.unchanged():
        module.eval()(torch.ones(4, 2))


@pytest.mark.parametrize("model", ["DrawnByNumPy", "PlainAttributes", "Noisy"])
def test_equal_runs_have_equal_bits_and_the_hosts_generators_go_on_undisturbed(own, model):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    undisturbed = random.random(), np.random.normal(), float(torch.randn(()))  # np.random.normal keeps a second draw
    after = random.random(), np.random.normal(), float(torch.randn(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert (random.random(), np.random.normal(), float(torch.randn(()))) == undisturbed
    first = own(model, to="a")
    random.seed(), np.random.seed(), torch.seed()
    second = own(model, to="b")
    other = own(model, "seed=2", to="c")
    files = [(r.run_dir / "posterior.safetensors").read_bytes() for r in (first, second, other)]
    assert files[0] == files[1] != files[2]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert (random.random(), np.random.normal(), float(torch.randn(()))) == undisturbed
    bayesfed.load(first.run_dir)
    problem_of(plain(compose_config([f"model={model}", "seed=7"]))).build_model(7)
    assert (random.random(), np.random.normal(), float(torch.randn(()))) == after


def test_resuming_keeps_the_frozen_layer(own):
    whole = own("FrozenLayer", "rounds=2", to="whole")
    own("FrozenLayer", to="parts")
    resumed = bayesfed.run([f"resume={whole.run_dir.parent / 'parts'}", "rounds=2"])
    assert (
        load_file(resumed.run_dir / "posterior.safetensors").keys()
        == load_file(whole.run_dir / "posterior.safetensors").keys()
    )
    for name, value in load_file(whole.run_dir / "posterior.safetensors").items():
        assert torch.equal(value, load_file(resumed.run_dir / "posterior.safetensors")[name]), name


@pytest.mark.parametrize("model", ["FrozenLayer", "ConstantBuffers", "KeepsFeatures"])
def test_clients_side_by_side_train_the_same_model(own, model):
    alone, together = own(model, to="a"), own(model, "engine.clients_per_batch=5", to="b")
    held = [load_file(result.run_dir / "posterior.safetensors") for result in (alone, together)]
    for name, value in held[0].items():
        torch.testing.assert_close(held[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
def test_copies_of_a_trained_run_predict_alike(own, again):
    trained = bayesfed.load(own("FrozenLayer", "strategy=bayes_admm", "client.epochs=1").run_dir)
    x, _ = evaluated_rows(trained.run_dir)
    expected = trained.predict(x, samples=3)
    assert torch.equal(again(trained).predict(x, samples=3), expected)
    assert not torch.equal(again(trained).predict(x, samples=3, seed=1), expected)


def test_a_model_from_another_folder_says_which(own, tmp_path, monkeypatch):
    found, module = own("Plain", to="runs/first"), module_of(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(tmp_path)])
    with pytest.raises(InputError, match=r"model\._target_") as refused:
        bayesfed.load(found.run_dir)
    assert f"it lies in {tmp_path.resolve()}: start there" in str(refused.value)
    (tmp_path / f"{module}.py").rename(tmp_path / "moved.py")
    with pytest.raises(InputError, match=f"start in the folder that holds {module}.py"):
        bayesfed.load(found.run_dir)


def test_a_changed_class_is_refused(own, tmp_path, monkeypatch):
    found = own("ConstantBuffers")
    module = sys.modules[module_of(tmp_path)]
    monkeypatch.setattr(module.ConstantBuffers, "__init__", module.Plain.__init__)
    with pytest.raises(InputError, match=r"holds 'picked' \(8,\), which its model has not: the class has changed"):
        bayesfed.load(found.run_dir)
