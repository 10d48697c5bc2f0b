"""Which figures a run gets and what they show."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from bayesfed.families import DiagonalGaussian, PointMass
from bayesfed.runs.figures import (
    label_distribution,
    learning_curves,
    make_figures,
    precision_figure,
    reliability_diagram,
    series,
)
from bayesfed.runs.posterior_file import save_posterior

ROUNDS = [
    {
        "round": t,
        "mean/accuracy": 90.0 + t,
        "mean/nll": 0.3,
        "mean/ece": 2.0,
        "bayes/accuracy": 91.0 + t,
        "bayes/nll": 0.2,
        "bayes/ece": 1.0,
        "posterior/precision_min": 1.0 + t,
        "posterior/precision_mean": 2.0 + t,
        "posterior/precision_max": 3.0 + t,
        "guard/count": 0,
    }
    for t in range(4)
]
RELIABILITY = {
    "bins": 2,
    "mean": {"confidence": [None, 0.8], "accuracy": [None, 0.7], "count": [0, 10]},
    "bayes": {"confidence": [0.4, 0.8], "accuracy": [0.5, 0.8], "count": [3, 7]},
}


def write_run(path, rounds, posterior):
    (path / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds))
    save_posterior(path / "posterior.safetensors", posterior, {})


def test_a_classification_run_gets_four_figures_and_equal_runs_equal_files(tmp_path):
    write_run(tmp_path, ROUNDS, DiagonalGaussian.from_mean_precision(torch.zeros(50), torch.linspace(1, 9, 50)))
    counts = np.array([[5, 0], [1, 7], [0, 3]])
    written = make_figures(tmp_path, label_counts=counts, reliability=RELIABILITY)
    assert [p.name for p in written] == [
        "learning_curves.png",
        "label_distribution.png",
        "reliability.png",
        "precision.png",
    ]
    assert all(imread(p).std() > 0.05 for p in written)  # not blank
    before = [p.read_bytes() for p in written]
    make_figures(tmp_path, label_counts=counts, reliability=RELIABILITY)
    assert [p.read_bytes() for p in written] == before


def test_figures_that_do_not_apply_are_not_written(tmp_path):
    rounds = [
        {"round": 0, "mean/rmse": 1.0, "mean/nll": 2.0, "posterior/precision_min": None},
        {"round": 1, "mean/rmse": 0.5, "mean/nll": math.nan, "posterior/precision_min": math.inf},
    ]
    write_run(tmp_path, rounds, PointMass(torch.zeros(3)))
    assert make_figures(tmp_path, label_counts=None, reliability=None) == [tmp_path / "figures/learning_curves.png"]


def test_an_empty_run_gets_none(tmp_path):
    assert make_figures(tmp_path, label_counts=None, reliability=None) == []


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def test_learning_curves_skip_rounds_without_evaluation():
    rounds = [*ROUNDS, {"round": 4}, {"round": 5, "mean/accuracy": math.nan, "bayes/accuracy": None}]
    accuracy, nll, ece = learning_curves(rounds).axes
    assert [a.get_ylabel() for a in (accuracy, nll, ece)] == ["accuracy (%)", "NLL (nats per example)", "ECE (%)"]
    assert lines(accuracy)["at the posterior mean"].get_ydata().tolist() == [90, 91, 92, 93]
    assert lines(accuracy)["Bayesian model average"].get_ydata().tolist() == [91, 92, 93, 94]


def test_regression_shows_rmse_instead():
    rounds = [{"round": t, "mean/rmse": 1 / (t + 1), "mean/nll": -1.0, "bayes/nll": -1.5} for t in range(3)]
    rmse, nll = learning_curves(rounds).axes
    assert rmse.get_ylabel() == "RMSE (units of the target)"
    assert nll.get_yscale() == "linear"  # a density may exceed 1: a negative NLL has no logarithm


def test_a_point_estimate_has_one_line():
    rounds = [{"round": t, "mean/nll": 1.0, "bayes/nll": 1.0} for t in range(3)]
    figure = learning_curves(rounds)
    assert len(figure.axes[0].get_lines()) == 1
    assert not figure.legends


@pytest.mark.parametrize("shape", [(1, 1), (10, 10), (100, 10), (10, 100), (500, 62)])
def test_label_distribution_of_any_size(shape):
    counts = np.random.default_rng(0).integers(0, 9, shape) + 1
    figure = label_distribution(counts)
    figure.canvas.draw()
    sizes = [bar.get_height() for bar in figure.axes[0].patches]
    assert sizes == counts.sum(1).tolist()
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), counts.T)


def test_no_examples_no_label_distribution():
    assert label_distribution(np.zeros((3, 2), dtype=int)) is None


def test_reliability_leaves_out_empty_bins():
    upper, lower = reliability_diagram(RELIABILITY).axes
    assert lines(upper)["at the posterior mean"].get_xdata().tolist() == [0.8]
    assert lines(upper)["Bayesian model average"].get_ydata().tolist() == [0.5, 0.8]
    assert [p.get_data().values.tolist() for p in lower.patches] == [[0, 10], [3, 7]]


def test_every_parameter_is_in_the_histogram():
    final = 10.0 ** np.random.default_rng(0).normal(size=997)
    over_rounds, histogram = precision_figure(ROUNDS, final).axes
    assert sum(bar.get_height() for bar in histogram.patches) == 997
    assert set(lines(over_rounds)) == {"smallest", "mean", "largest"}


def test_one_shared_precision_is_one_line_without_histogram():
    rounds = [
        {"round": t, "posterior/precision_min": 2.0 + t, "posterior/precision_max": 2.0 + t, "guard/count": t}
        for t in range(3)
    ]
    over_rounds, guard = precision_figure(rounds, np.array([4.0])).axes
    assert len(over_rounds.get_lines()) == 1
    assert [bar.get_height() for bar in guard.patches] == [0, 1, 2]


def test_series_keeps_finite_numbers():
    rounds = [{"round": t, "a": v} for t, v in enumerate([1, None, math.nan, math.inf, -2.0])] + [{"round": 5}]
    assert [v.tolist() for v in series(rounds, "a")] == [[0, 4], [1, -2]]
    assert [v.tolist() for v in series(rounds, "a", positive=True)] == [[0], [1]]
