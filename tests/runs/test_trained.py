"""Using a trained posterior."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from torch import nn

import bayesfed
from bayesfed.errors import InputError
from bayesfed.evaluation import evaluate
from bayesfed.families import DiagonalGaussian, PointMass
from bayesfed.problem import Categorical, Gaussian
from bayesfed.problem.build import build_problem
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.scaling import Scaling
from bayesfed.runs.posterior_file import save_posterior
from bayesfed.seeding import torch_generator
from bayesfed.uses.trained import load


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Writes a run directory of a linear model on 2 inputs, scaled by (x - 1) * 0.5."""

    def restore(description, seed):
        module = nn.Linear(2, description["outputs"], bias=False)
        likelihood = Gaussian(4.0) if description["likelihood"] == "gaussian" else Categorical()
        return module, Scaling(torch.tensor(1.0), torch.tensor(0.5)), likelihood

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
    monkeypatch.setattr("bayesfed.uses.trained.CPU_BATCH", 2)
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


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_threads_get_what_one_call_after_the_other_gets(make_run, likelihood):
    run = make_run(likelihood)
    inputs = [np.random.default_rng(i).normal(size=(2000, 2)) for i in range(4)]
    jobs = [(x, samples, seed) for x in inputs for samples, seed in [(0, 0), (8, 0), (8, 1)]]

    def predict(job):
        x, samples, seed = job
        found = run.predict(x, samples=samples, seed=seed)
        return found if isinstance(found, torch.Tensor) else torch.cat(found)

    alone = [predict(job) for job in jobs]
    mean = run.mean_model().weight.clone()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(predict, jobs * 3))
        means = [future.result().weight for future in [pool.submit(run.mean_model) for _ in range(8)]]
    assert all(torch.equal(found, alone[i % len(jobs)]) for i, found in enumerate(together))
    assert all(torch.equal(found, mean) for found in means)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


HOSTS = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("host", HOSTS)
def test_what_the_host_switched_on_changes_nothing(make_run, host, dtype):
    before = make_run(dtype=dtype)
    expected, drawn = before.predict(X, samples=4), before.sample(2)
    with HOSTS[host]():
        run = load(before.run_dir)
        inside, samples, mean = run.predict(X, samples=4), run.sample(2), run.mean_model()
    assert torch.equal(inside, expected)
    assert not inside.is_inference()
    assert torch.equal(run.predict(X, samples=4), expected)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(samples, drawn, strict=True))
    for model in [*samples, mean]:  # as good as any for training on
        assert model.weight.requires_grad
        model(SCALED.to(dtype)).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert model.weight.grad.abs().sum() > 0
    assert torch.equal(run.predict(X, samples=4), expected)


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {
    "reversed": lambda x: x[::-1].copy()[::-1],
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "Fortran": np.asfortranarray,
    "big-endian": lambda x: x.astype(">f8"),
    "big-endian float32": lambda x: x.astype(">f4"),
    "big-endian int16": lambda x: x.astype(">i2"),
    "read-only": frozen,
    "list": lambda x: x.tolist(),
    "tuples": lambda x: tuple(map(tuple, x.tolist())),
    "DataFrame": lambda x: pandas.DataFrame(x, columns=["a", "b"]),
    "reversed DataFrame": lambda x: pandas.DataFrame(x[::-1], columns=["a", "b"])[::-1],
    "mixed DataFrame": lambda x: pandas.DataFrame({"a": x[:, 0].astype(np.uint8), "b": x[:, 1].astype(np.float32)}),
    "requires gradients": lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True),
    "sparse": lambda x: torch.tensor(x).to_sparse(),
    **{
        kind: lambda x, kind=kind: x.astype(kind)
        for kind in ("f2", "f4", "f8", "g", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")
    },
    **{
        f"torch {t}": lambda x, t=t: torch.tensor(x, dtype=t)
        for t in (torch.float16, torch.bfloat16, torch.uint8, torch.int16)
    },
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_taken_however_they_lie(make_run, layout):
    run = make_run()
    assert torch.equal(run.predict(LAYOUTS[layout](X.astype(float)), samples=0), run.predict(X, samples=0))


@pytest.mark.filterwarnings("error")
def test_truth_values_are_numbers(make_run):
    truths = X > 2
    assert torch.equal(make_run().predict(truths), make_run().predict(truths.astype(float)))


@pytest.mark.parametrize(
    "x",
    [
        np.array([[1, 2]], dtype=object),
        np.array([[1 + 1j, 2]]),
        torch.tensor([[1 + 1j, 2]]),
        [[1, None]],
        [[1, 2], [3]],
        np.array([["a", "b"]]),
        pandas.DataFrame({"a": [1], "b": ["x"]}),
        np.array([["2020-01-01"] * 2], dtype="M8[D]"),
        None,
        "ab",
        torch.empty(3, 2, device="meta"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_holds_no_numbers_is_refused(make_run, x):
    with pytest.raises(InputError, match=r"^x=.*: must have shape \(N, 2\) and hold numbers"):
        make_run().predict(x)


def test_numbers_of_samples_may_be_numpys_or_torchs(make_run):
    run = make_run()
    for four in (np.int64(4), torch.tensor(4), np.array(4)):
        assert torch.equal(run.predict(X, samples=four), run.predict(X, samples=4))
    assert len(run.sample(np.int32(2))) == 2


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


def test_columns_of_a_data_frame_are_taken_by_name(tmp_path):
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame({"a": rng.normal(size=40), "y": np.arange(40) % 2, "b": 100 + rng.normal(size=40)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = [
        "data=csv",
        f"data.path={tmp_path / 't.csv'}",
        "data.target=y",
        "partition.num_clients=2",
        "strategy=fedavg",
        "client.epochs=1",
    ]
    bayesfed.run([*data, "rounds=1", "display=false", "figures=false", f"hydra.run.dir={tmp_path / 'run'}"])
    run = load(tmp_path / "run")
    assert run.columns == run.model_description["columns"] == ["a", "b"]
    expected = run.predict(frame[["a", "b"]].to_numpy())
    for x in (frame, frame[["b", "a"]], frame[["a", "b"]], pyarrow.table(frame[["b", "y", "a"]])):
        assert torch.equal(run.predict(x), expected)
    assert not torch.equal(run.predict(frame[["b", "a"]].to_numpy()), expected)
    with pytest.raises(InputError, match="x=DataFrame without column 'b': needs a, b"):
        run.predict(frame[["a", "y"]])


def test_without_columns_a_data_frame_is_taken_by_position(make_run):
    run = make_run()
    assert run.columns is None
    assert torch.equal(run.predict(pandas.DataFrame(X, columns=["b", "a"])), run.predict(X))


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
