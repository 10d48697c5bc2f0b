import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf

from bayesfed.errors import InputError
from bayesfed.problem import Gaussian, restore_model
from bayesfed.problem.build import build_problem
from bayesfed.problem.data import Digits

CONF = Path(__file__).resolve().parents[2] / "conf"
FILES = sorted(file for group in ("data", "partition", "model", "likelihood") for file in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_each_yaml_lists_every_option_with_its_default(file):
    options = yaml.safe_load(file.read_text())
    assert options.pop("name") == file.stem
    parameters = inspect.signature(get_class(options.pop("_target_"))).parameters
    given = {"input_shape", "num_outputs"} if file.parent.name == "model" else set()
    assert set(options) == set(parameters) - given
    for key, value in options.items():
        default = parameters[key].default
        if default is not inspect.Parameter.empty:
            assert value == (list(default) if isinstance(default, tuple) else default), key


def test_digits(problem):
    result = problem(partition={"name": "iid", "num_clients": 6})
    assert (len(result.clients), sum(map(len, result.clients)), len(result.test)) == (6, 1438, 359)
    assert result.input_shape == (1, 8, 8)
    assert result.num_outputs == result.num_classes == 10
    assert result.evaluated_on == "test"
    assert result.label_counts.shape == (6, 10)
    for k, examples in enumerate(result.clients):
        assert torch.bincount(examples.targets(), minlength=10).tolist() == result.label_counts[k].tolist()
    x, y = result.test.batch(slice(None), torch.float32, "cpu")
    assert x.min() == 0
    assert x.max() == 1
    assert x.shape == (359, 1, 8, 8)
    assert torch.bincount(y).min() >= 34  # stratified: 174 to 183 images a class


def test_the_test_set_of_digits_does_not_depend_on_the_seed(problem):
    assert torch.equal(problem(seed=1).test.index, problem(seed=2).test.index)


def test_train_and_test_rows_are_disjoint(problem):
    result = problem()
    rows = torch.cat([result.test.index, *(examples.index for examples in result.clients)])
    assert sorted(rows.tolist()) == list(range(1797))


def test_the_split_depends_on_the_seed_alone(problem):
    def rows(seed):
        return [e.index.tolist() for e in problem(seed=seed, partition="dirichlet_sizes_and_classes").clients]

    first = rows(5)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - disturbs what must not matter
    assert rows(5) == first
    assert rows(6) != first


def test_fraction_keeps_the_share_of_each_class(problem):
    whole = problem().label_counts.sum(axis=0)
    part = problem(data={"name": "digits", "fraction": 0.25}).label_counts.sum(axis=0)
    assert part.sum() == round(1438 * 0.25)
    assert (abs(part - 0.25 * whole) <= 1).all()


def test_validation_comes_from_the_training_data(problem):
    plain, tuning = problem(), problem(validation=0.2)
    assert tuning.evaluated_on == "validation"
    assert len(tuning.test) == round(1438 * 0.2)
    train = set(torch.cat([e.index for e in tuning.clients]).tolist())
    held, test = set(tuning.test.index.tolist()), set(plain.test.index.tolist())
    assert not train & held
    assert not test & (train | held)
    assert len(train) + len(held) == 1438
    counts = torch.bincount(tuning.test.targets(), minlength=10).numpy()
    assert (abs(counts - 0.2 * plain.label_counts.sum(axis=0)) <= 1).all()
    assert torch.equal(tuning.test.index, problem(validation=0.2).test.index)


def test_empty_clients_are_dropped_with_a_warning(problem, caplog):
    split = {"name": "dirichlet_sizes_and_classes", "num_clients": 200, "alpha_sizes": 0.05}
    result = problem(partition=split)
    empty = 200 - len(result.clients)
    assert caplog.messages == [f"{empty} of 200 clients got no example and are left out; {len(result.clients)} remain"]
    assert 0 < len(result.clients) < 200
    assert min(map(len, result.clients)) > 0
    assert len(result.label_counts) == len(result.clients)
    assert result.label_counts.sum() == 1438


def test_linear_regression_matches_its_description(problem):
    data = {"name": "linreg", "num_clients": 3, "examples_per_client": 4000, "num_features": 2, "noise_precision": 4.0}
    result = problem(data=data, likelihood={"name": "gaussian", "precision": 4.0})
    assert [len(e) for e in result.clients] == [4000] * 3
    assert len(result.test) == 200
    batches = [e.batch(slice(None), torch.float64, "cpu") for e in result.clients]
    fits = [torch.linalg.lstsq(x, y[:, None]).solution[:, 0] for x, y in batches]
    for fit in fits[1:]:
        torch.testing.assert_close(fit, fits[0], atol=0.1, rtol=0)  # one true weight vector
    for x, y in batches:
        assert (y - x @ fits[0]).var().item() == pytest.approx(0.25, rel=0.1)
    means = torch.stack([x.mean(0) for x, _ in batches])
    assert means.std(0).min() > 0.1  # different covariates


def test_linear_regression_without_heterogeneity(problem):
    data = {"name": "linreg", "heterogeneity": 0.0, "examples_per_client": 4000}
    for examples in problem(data=data, likelihood="gaussian").clients:
        x, _ = examples.batch(slice(None), torch.float64, "cpu")
        assert x.mean(0).abs().max() < 0.1
        assert (x.std(0) - 1).abs().max() < 0.1


def test_initial_parameters_depend_on_the_seed_and_leave_the_global_generator_alone(problem):
    result = problem(model="mlp")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = torch.nn.utils.parameters_to_vector(result.build_model(1).parameters())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    second = torch.nn.utils.parameters_to_vector(result.build_model(1).parameters())
    other = torch.nn.utils.parameters_to_vector(result.build_model(2).parameters())
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32
    assert not first.is_meta


@pytest.mark.parametrize("scaling", ["unit", "standardize"])
def test_description_is_json_and_restores_the_predictor(problem, scaling):
    mlp = {"name": "mlp", "hidden": [5], "activation": "tanh"}
    result = problem(data={"name": "digits", "scaling": scaling}, model=mlp)
    model, restored_scaling, likelihood = restore_model(json.loads(json.dumps(result.description())))
    original = result.build_model(1)
    model.load_state_dict(original.state_dict())
    raw, (scaled, y) = result.test.x[result.test.index], result.test.batch(slice(None), torch.float32, "cpu")
    assert torch.equal(model(restored_scaling(raw)), original(scaled))
    assert likelihood.loss(model(scaled), y) == result.likelihood.loss(original(scaled), y)


def test_description_keeps_the_noise_precision(problem):
    result = problem(data="linreg", likelihood={"name": "gaussian", "precision": 3.0})
    likelihood = restore_model(result.description())[2]
    assert isinstance(likelihood, Gaussian)
    assert likelihood.precision == 3.0


def test_omegaconf_and_plain_dict_give_the_same_problem(config):
    plain = config(partition="dirichlet_sizes_and_classes", model="mlp")
    a, b = build_problem(plain, 1, 0.0), build_problem(OmegaConf.create(plain), 1, 0.0)
    assert [e.index.tolist() for e in a.clients] == [e.index.tolist() for e in b.clients]
    assert a.description() == b.description()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"data": {"name": "digits", "fraction": 0.0}}, r"data\.fraction=0\.0: .*> 0 and <= 1"),
        ({"data": {"name": "digits", "fraction": 1.5}}, r"data\.fraction=1\.5"),
        ({"data": {"name": "digits", "fraction": 1e-6}}, r"data\.fraction=1e-06: leaves none of 1438"),
        ({"data": {"name": "digits", "scaling": "units"}}, r"data\.scaling=units: did you mean 'unit'"),
        ({"data": {"name": "digits", "scalin": "raw"}}, r"data\.scalin=raw: no such key; did you mean 'scaling'"),
        ({"partition": {"name": "iid", "num_clients": 0}}, r"partition\.num_clients=0"),
        ({"partition": {"name": "iid", "num_clients": 1439}}, r"partition\.num_clients=1439: there are only 1438"),
        ({"partition": "natural_id"}, "partition=natural_id: the data have no client column"),
        ({"partition": "two_classes_per_client"}, r"partition\.examples_per_class=300: class \d has only"),
        ({"model": "cnn_zenke"}, r"model=cnn_zenke: needs images .*\(1, 8, 8\)"),
        ({"model": {"name": "mlp", "hidden": [0]}}, r"model\.hidden=0"),
        (
            {"model": {"name": "mlp", "_target_": "bayesfed.problem.models.MPL"}},
            r"model\._target_=.*cannot be imported",
        ),
        ({"model": {"name": "mlp", "_target_": "pathlib.Path"}}, r"model\._target_=pathlib\.Path: must be a subclass"),
        ({"likelihood": "gaussian"}, "likelihood=gaussian: needs float targets"),
        ({"likelihood": {"name": "gaussian", "precision": -1}}, r"likelihood\.precision=-1"),
        ({"data": "linreg"}, "likelihood=categorical: needs whole-number labels"),
        ({"data": {"name": "linreg", "noise_precision": 0}}, r"data\.noise_precision=0"),
    ],
)
def test_errors_name_group_and_option(problem, groups, message):
    with pytest.raises(InputError, match=message):
        problem(**groups)


@pytest.mark.parametrize(
    ("validation", "message"),
    [(1.0, ">= 0 and < 1"), (-0.1, ">= 0"), (1e-6, "holds out 0 of 1438"), (0.9999, "keeps 0")],
)
def test_validation_is_checked(problem, validation, message):
    with pytest.raises(InputError, match=rf"eval\.validation=.*{message}"):
        problem(validation=validation)


def test_a_missing_group_is_named(config):
    groups = config()
    del groups["model"]
    with pytest.raises(InputError, match="no group 'model'"):
        build_problem(groups, 1, 0.0)


class Noisy(Digits):
    """A source that draws from NumPy's global generator."""

    def __init__(self, **options):
        super().__init__(**options)
        self.shift = np.random.normal()  # noqa: NPY002

    def load(self, seed):
        data = super().load(seed)
        noise = np.random.normal(size=data.x.shape).astype(np.float32)  # noqa: NPY002
        return replace(data, x=data.x + noise + np.float32(self.shift))


def test_every_process_loads_the_same_data(config, monkeypatch):
    groups = config()
    monkeypatch.setattr("bayesfed.problem.data.Noisy", Noisy, raising=False)
    groups["data"]["_target_"] = "bayesfed.problem.data.Noisy"
    first, again, other = (build_problem(groups, seed).clients[0].x for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
