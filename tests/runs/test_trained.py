"""Using a trained posterior."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bayesfed.errors import InputError
from bayesfed.evaluation import evaluate
from bayesfed.families import DiagonalGaussian, PointMass
from bayesfed.problem import build_problem
from bayesfed.problem.flat import FlatModel
from bayesfed.runs.posterior_file import save_posterior
from bayesfed.runs.trained import load
from bayesfed.seeding import torch_generator


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Writes a run directory of a linear model on 2 inputs, scaled by (x - 1) * 0.5."""

    def restore(description, seed):
        module = nn.Linear(2, description["outputs"], bias=False)
        likelihood = SimpleNamespace(name=description["likelihood"], precision=4.0)
        return module, lambda x, dtype: (x.to(dtype) - 1) * 0.5, likelihood

    monkeypatch.setattr("bayesfed.problem.restore_model", restore, raising=False)

    def make(likelihood="categorical", outputs=3, point=False, dtype=torch.float64):
        mean = torch.arange(2 * outputs, dtype=dtype) / 10
        precision = torch.full((2 * outputs,), 10.0, dtype=dtype)
        posterior = PointMass(mean) if point else DiagonalGaussian.from_mean_precision(mean, precision)
        description = {"input_shape": [2], "outputs": outputs, "likelihood": likelihood}
        save_posterior(tmp_path / "posterior.safetensors", posterior, description)
        return load(tmp_path)

    return make


X = np.array([[1, 2], [3, 4], [0, 9]], dtype=np.uint8)
SCALED = (torch.tensor(X.astype(float)) - 1) * 0.5


def test_prediction_at_the_mean_scales_the_inputs(make_run):
    run = make_run()
    expected = (SCALED @ run.posterior.mean.view(3, 2).T).softmax(1)
    for x in (X, torch.tensor(X), X.tolist()):
        torch.testing.assert_close(run.predict(x, samples=0), expected)


def test_averaged_prediction_is_a_distribution_keyed_by_the_seed(make_run):
    run = make_run()
    p = run.predict(X)
    assert p.shape == (3, 3)
    torch.testing.assert_close(p.sum(1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(p, run.predict(X))
    assert not torch.equal(p, run.predict(X, seed=1))
    # averaging over parameters flattens a prediction that is far from the decision boundary
    assert run.predict(X, samples=500)[2].max() < run.predict(X, samples=0)[2].max()


def test_regression_gives_mean_and_variance_with_noise(make_run):
    run = make_run("gaussian", outputs=1)
    mean, variance = run.predict(X, samples=4000)
    spread = SCALED.square().sum(1) / 10
    assert mean.shape == variance.shape == (3,)
    assert ((mean - SCALED @ run.posterior.mean).abs() < 4 * (spread / 4000).sqrt()).all()
    assert (((variance - 0.25) / spread - 1).abs() < 4 * math.sqrt(2 / 4000)).all()
    mean, variance = run.predict(X, samples=0)
    torch.testing.assert_close(mean, SCALED @ run.posterior.mean)
    assert variance.tolist() == [0.25] * 3


def test_several_outputs_keep_their_axis(make_run):
    mean, variance = make_run("gaussian", outputs=2).predict(X)
    assert mean.shape == variance.shape == (3, 2)


def test_the_dtype_is_that_of_the_run(make_run):
    assert make_run(dtype=torch.float32).predict(X).dtype == torch.float32


def test_a_point_estimate_predicts_the_same_for_any_number_of_samples(make_run):
    run = make_run(point=True)
    assert torch.equal(run.predict(X, samples=7), run.predict(X, samples=0))


def test_batches_do_not_change_a_prediction(make_run, monkeypatch):
    run = make_run()
    whole = run.predict(X)
    monkeypatch.setattr("bayesfed.runs.trained.CPU_BATCH", 2)
    torch.testing.assert_close(run.predict(X), whole, rtol=1e-12, atol=0)


def test_sampled_models_are_independent(make_run):
    run = make_run()
    first, second = run.sample(2)
    assert not torch.equal(first.weight, second.weight)
    assert torch.equal(first.weight, run.sample(1)[0].weight)
    with torch.no_grad():
        first.weight.zero_()
    assert second.weight.count_nonzero() == 6
    assert not first.training
    mean = run.mean_model()
    assert torch.equal(mean.weight.flatten(), run.posterior.mean)
    torch.testing.assert_close(mean(SCALED).softmax(1), run.predict(X, samples=0))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((4, 3)), r"x=array of shape \(4, 3\): must have shape \(N, 2\)"),
        (np.zeros(2), r"\(N, 2\)"),
        (np.zeros((0, 2)), "N >= 1"),
        (3.0, r"\(N, 2\)"),
        ([["a", "b"]], "hold numbers"),
        ([[1.0, math.nan]], "must be finite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make_run, x, message):
    with pytest.raises(InputError, match=message):
        make_run().predict(x)


def test_a_negative_number_of_samples_is_refused(make_run):
    with pytest.raises(InputError, match="samples=-1"):
        make_run().predict(X, samples=-1)


def test_summary_and_rounds_come_along_even_after_a_crash(make_run, tmp_path):
    assert make_run().summary == {}
    assert make_run().rounds == []
    (tmp_path / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    (tmp_path / "rounds.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"rou')
    run = load(tmp_path)
    assert run.summary["status"] == "interrupted"
    assert [r["round"] for r in run.rounds] == [0, 1]


def test_a_directory_without_a_posterior_is_no_run(tmp_path):
    with pytest.raises(InputError, match="not a finished or interrupted"):
        load(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        load(tmp_path / "typo")


def test_a_real_problem_survives_the_file(tmp_path):
    """Raw inputs through ``load(...).predict`` give what evaluating the problem's own examples gives."""
    groups = {
        "data": {"_target_": "bayesfed.problem.data.Digits", "name": "digits", "scaling": "standardize"},
        "partition": {"_target_": "bayesfed.problem.partition.Iid", "name": "iid", "num_clients": 4},
        "model": {"_target_": "bayesfed.problem.models.MLP", "name": "mlp", "hidden": [8]},
        "likelihood": {"_target_": "bayesfed.problem.likelihood.Categorical", "name": "categorical"},
    }
    problem = build_problem(groups, 1, 0.0)
    model = FlatModel(problem.build_model(1), dtype=torch.float64)
    posterior = DiagonalGaussian.from_mean_precision(model.vector.clone(), torch.full((model.dim,), 50.0))
    save_posterior(tmp_path / "posterior.safetensors", posterior, problem.description())
    scores = evaluate(
        model, posterior, problem.test, problem.likelihood, samples=3, generator=torch_generator(7, "predict")
    )
    test = problem.test
    raw = test.x if test.index is None else test.x[test.index]
    p = load(tmp_path).predict(raw.numpy(), samples=3, seed=7)
    of_label = p[torch.arange(len(p)), test.targets()]
    assert -of_label.log().mean().item() == pytest.approx(scores["bayes/nll"], rel=1e-12)
