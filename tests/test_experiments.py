"""The seven settings of spec table 3.1: every number, the parameter counts, and a local step of one client."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bayesfed.app import plain, problem_of
from bayesfed.config import compose_config
from bayesfed.configured import build
from bayesfed.families import DiagonalGaussian
from bayesfed.federation.local import LocalProblem
from bayesfed.problem.flat import FlatModel

COLUMNS = [
    "rounds",
    "epochs",
    "batch",
    "lr",
    "schedule",
    "beta2",
    "h0",
    "tau",
    "S0",
    "gamma",
    "rho",
    "fraction",
    "scaling",
    "parameters",
]
MLP, ZENKE, ACAR, RESNET = 178_110, 1_250_858, 797_962, 275_572
TABLE = {
    "fmnist_homog10": (50, 10, 32, 5e-5, "constant", 0.9998, 0.001, 0.001, 0.5, 0.001, 0.1, 0.1, "raw", MLP),
    "fmnist_het10": (50, 10, 32, 5e-5, "cosine", 0.9998, 0.001, 0.001, 1.0, 0.001, 0.2, 0.1, "raw", MLP),
    "fmnist_het100": (50, 10, 32, 5e-5, "cosine", 0.9999, 0.0005, 0.001, 0.1, 0.001, 0.1, 1.0, "raw", MLP),
    "cifar10_zenke": (50, 25, 64, 1e-3, "cosine", 0.99999, 0.02, 0.1, 100, 0.1, 0.5, 1.0, "unit", ZENKE),
    "cifar10_acar": (50, 25, 64, 5e-3, "cosine", 0.99998, 0.1, 0.1, 0.5, 0.1, 1.0, 1.0, "unit", ACAR),
    "mnist_het": (100, 10, 64, 2e-2, "cosine", 0.9998, 0.005, 0.01, 0.01, 0.1, 5.0, 1.0, "unit", MLP),
    "cifar100_resnet20": (100, 25, 64, 1e-3, "cosine", 0.99999, 0.1, 0.1, 0.5, 0.1, 0.5, 1.0, "unit", RESNET),
}


@pytest.mark.parametrize("name", TABLE)
def test_hyper_parameters(name):
    cfg = compose_config([f"experiment={name}", "data.path=anywhere"])
    c, s = cfg.client, cfg.strategy
    found = (
        cfg.rounds,
        c.epochs,
        c.batch_size,
        c.lr,
        c.schedule,
        c.beta2,
        c.hess_init,
        s.temperature,
        s.prior_precision,
        s.damping,
        s.rho,
        cfg.data.fraction,
        cfg.data.scaling,
    )
    assert dict(zip(COLUMNS, found, strict=False)) == dict(zip(COLUMNS, TABLE[name][:-1], strict=False))
    assert (s.family, c.name, c.beta1, c.mc_samples, c.clip_radius) == ("diagonal", "ivon", 0.9, 1, float("inf"))
    if c.schedule == "cosine":
        assert c.schedule_rounds == cfg.rounds


@pytest.mark.parametrize("name", TABLE)
def test_one_local_step(name):
    data = Path(os.environ.get("BAYESFED_DATA", ""))
    cfg = compose_config([f"experiment={name}"])
    if not (os.environ.get("BAYESFED_DATA") and (data / cfg.data.name).is_dir()):
        pytest.skip("BAYESFED_DATA is not set")
    torch.set_num_threads(1)
    problem = problem_of(plain(cfg))
    model = FlatModel(problem.build_model(1))
    assert model.dim == TABLE[name][-1]
    server = DiagonalGaussian.isotropic(torch.zeros(model.dim), cfg.strategy.prior_precision)
    one_batch = problem.clients[0].subset(torch.arange(min(64, len(problem.clients[0]))))
    local = LocalProblem(
        model=model,
        initial=model.vector.clone(),
        data=one_batch,
        likelihood=problem.likelihood,
        server=server,
        site=None,
        rho=cfg.strategy.rho,
        temperature=cfg.strategy.temperature,
        proximal=0.0,
        learn_precision=True,
        round=1,
        client=0,
        seed=1,
    )
    cfg.client.epochs = 1
    solution = build(cfg.client, "client").solve(local)
    assert 0 < solution.metrics["loss"] < 100  # at a sample of a still wide posterior
    moved = (solution.posterior.mean - local.initial).abs()
    assert 0 < float(moved.max()) < 10
    # in round 1 the client starts at h = hess_init: S = S_0 + h0 N/(tau rho), and a step changes h by at most a half
    start = cfg.strategy.prior_precision + cfg.client.hess_init * len(one_batch) / (
        cfg.strategy.temperature * cfg.strategy.rho
    )
    assert float(solution.posterior.precision.median()) == pytest.approx(start, rel=0.05)
