"""IVON's C functions against its torch operations, and what happens where they cannot be used."""

from __future__ import annotations

import copy
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bayesfed import accelerate
from bayesfed.accelerate import library
from bayesfed.seeding import torch_generator
from clients.ivon import fused
from clients.optim import IVON

torch.set_num_threads(1)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
SIZES = (1500, 3, 2 * 1024 + 5)  # pieces shorter and longer than a block, and no multiple of a noise point
TOTAL = sum(SIZES)


@pytest.fixture
def fresh() -> Iterator[None]:
    """The choice of functions is made anew in the test and forgotten after it."""
    library._compiled.cache_clear()
    yield
    library._compiled.cache_clear()


def vectors(seed: int, low: float, high: float) -> Tensor:
    return torch.rand(TOTAL, generator=torch_generator(seed, "vector")) * (high - low) + low


def build(native: bool, **options) -> tuple[IVON, list[nn.Parameter]]:
    params = [nn.Parameter(piece.clone()) for piece in vectors(1, -0.3, 0.3).split(SIZES)]
    settings = {"lr": 0.02, "ess": 500.0, "beta2": 0.9, "generator": torch_generator(2, "noise")}
    with accelerate.running("auto" if native else "off"):
        return IVON(params, **{**settings, **options}), params


def optimizer_of(params: list[nn.Parameter], native: bool) -> IVON:
    with accelerate.running("auto" if native else "off"):
        return IVON(params, lr=0.1, ess=50.0, generator=torch_generator(2, "noise"))


def train(optimizer: IVON, params: list[nn.Parameter], steps: int = 6) -> None:
    target = vectors(3, -1, 1).split(SIZES)
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            sum((torch.cos(p - t) * (1 + t)).sum() for p, t in zip(params, target, strict=True)).backward()
        optimizer.step()


VECTORS = {
    "prior_mean": vectors(4, -0.1, 0.1),
    "prior_precision": vectors(5, 2.0, 9.0),
    "site_linear": vectors(6, -0.1, 0.1),
    "site_quadratic": vectors(7, -0.01, 0.2),
}
CASES = {
    "numbers": {"weight_decay": 0.3},
    "vectors": VECTORS,
    "a vector and numbers": {"prior_precision": VECTORS["prior_precision"], "site_linear": 0.1},
    "not rescaled": {**VECTORS, "rescale_lr": False},
    "clipped": {**VECTORS, "clip_radius": 0.05},
    "held at the floor": {**VECTORS, "min_precision": 0.95, "hess": 0.001},
    "no momentum": {"beta1": 0.0, "debias": False},
    "normal noise": {**VECTORS, "noise": "normal"},
    "antithetic": {**VECTORS, "antithetic": True},
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torch_to_rounding(case: str) -> None:
    (one, params), (other, same) = build(True, **CASES[case]), build(False, **CASES[case])
    assert one.native
    assert not other.native
    train(one, params)
    train(other, same)
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    if case == "held at the floor":
        assert 0 < one.floored() < TOTAL
        assert one.floored() == other.floored()
    torch.testing.assert_close(one.mean, other.mean, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(one.precision, other.precision, rtol=2e-5, atol=0)
    torch.testing.assert_close(one.momentum()[0], other.momentum()[0], rtol=2e-5, atol=2e-5)


@needs_compiler
def test_draws_are_those_of_torch() -> None:
    (one, params), (other, same) = build(True, **VECTORS), build(False, **VECTORS)
    for train_mode in (True, False):
        with one.sampled_params(train=train_mode), other.sampled_params(train=train_mode):
            for p, q in zip(params, same, strict=True):
                torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)
            sum(p.sum() for p in (*params, *same)).backward()


@needs_compiler
def test_gradients_need_not_be_contiguous_or_separate() -> None:
    """A transposed gradient, as autograd may leave it, and gradients preset as pieces of one vector."""
    results = []
    for native in (True, False):
        p = nn.Parameter(torch.linspace(-1, 1, 35).reshape(5, 7))
        optimizer = optimizer_of([p], native)
        with optimizer.sampled_params(train=True):
            p.grad = torch.linspace(0, 1, 35).reshape(7, 5).T
        optimizer.step()
        results.append(optimizer.mean)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    results = []
    for native in (True, False):
        params = [nn.Parameter(torch.full((n,), 0.5)) for n in (3, 4)]
        gradient = torch.zeros(7)
        params[0].grad, params[1].grad = gradient[:3], gradient[3:]
        optimizer = optimizer_of(params, native)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                (params[0].square().sum() + params[1].sum()).backward()
            optimizer.step()
        results.append(optimizer.mean)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*dropped a sample")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_touches_nothing(bad: float) -> None:
    optimizer, params = build(True, clip_radius=0.5, min_precision=0.5)
    for piece, place in ((0, 0), (1, 1), (-1, -1)):
        before = optimizer.mean, optimizer.precision
        for value in (bad, 3.4e38):  # the largest numbers are finite
            with optimizer.sampled_params(train=True):
                for p in params:
                    p.grad = torch.full_like(p, 0.1)
                params[piece].grad.view(-1)[place] = value
            if value == bad:
                optimizer.step()
                assert torch.equal(optimizer.mean, before[0])
                assert torch.equal(optimizer.precision, before[1])
        assert optimizer._settle()
        assert optimizer._samples == 1
        optimizer.zero_grad()
    assert optimizer.refused == 3


@needs_compiler
def test_state_goes_from_one_to_the_other() -> None:
    one, params = build(True, **VECTORS)
    train(one, params, 2)
    other, same = build(False, **VECTORS)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for p, q in zip(params, same, strict=True):
        q.data.copy_(p.data)
    train(one, params, 2)
    train(other, same, 2)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-5, atol=1e-6)


def test_left_alone_where_it_does_not_fit(monkeypatch) -> None:
    def chosen(**options) -> bool:
        dtype = options.pop("dtype", torch.float32)
        return IVON([nn.Parameter(torch.zeros(5, dtype=dtype))], lr=0.1, ess=5.0, **options).native

    assert chosen() == fused.available()
    with accelerate.running("off"):
        assert not chosen()
    assert not chosen(hess_structure="scalar")
    assert not chosen(dtype=torch.float64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not chosen()


def test_without_a_compiler_torch_does_it(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO, logger="bayesfed"):
        optimizer, params = build(True)
    assert not optimizer.native
    assert "no C compiler (no-such-compiler)" in caplog.text
    train(optimizer, params)
    assert optimizer.mean.isfinite().all()


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, caplog, tmp_path) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'cannot find crt1.o' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert not build(True)[0].native
    assert f"{broken} did not give a library" in caplog.text
    assert "cannot find crt1.o" in caplog.text


@needs_compiler
@pytest.mark.parametrize("writable", [True, False])
def test_compiled_once_into_the_cache_folder_if_that_can_be(fresh, monkeypatch, tmp_path, writable: bool) -> None:
    folder = tmp_path / "cache"
    if not writable:
        folder.write_text("a file where the folder should be")
    monkeypatch.setenv("BAYESFED_CACHE", str(folder))
    assert fused.available()
    assert build(True)[0].native
    assert [file.suffix for file in folder.glob("*")] == ([".so"] if writable else [])
    library._compiled.cache_clear()
    if writable:
        monkeypatch.setattr(library, "_compile", None)  # would fail if it were called again
        assert fused.available()


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "empty", "others may write"])
def test_a_library_that_cannot_be_trusted_is_compiled_anew(fresh, monkeypatch, tmp_path, damage: str) -> None:
    """A truncated library would kill the process when it is loaded; one that others can write to runs their code."""
    monkeypatch.setenv("BAYESFED_CACHE", str(tmp_path))
    assert fused.available()
    (file,) = tmp_path.glob("*.so")
    whole = file.read_bytes()
    if damage == "others may write":
        file.chmod(0o666)
    else:
        file.write_bytes(whole[: len(whole) // 3 if damage == "cut" else 0])
    library._compiled.cache_clear()
    compiled = []
    compile_ = library._compile
    monkeypatch.setattr(library, "_compile", lambda *given: (compiled.append(given), compile_(*given)))
    assert fused.available()
    assert len(compiled) == 1
    assert library._trusted(file)


@needs_compiler
def test_no_home_folder_is_no_obstacle(fresh, monkeypatch) -> None:
    monkeypatch.setenv("BAYESFED_CACHE", "~nobody-of-this-name/cache")
    assert fused.available()


@needs_compiler
def test_the_compiler_may_have_options(fresh, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("BAYESFED_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "cc -O1")
    assert fused.available()


@needs_compiler
def test_a_gradient_that_torch_negates_when_it_is_read() -> None:
    results = []
    for native in (True, False):
        p = nn.Parameter(torch.zeros(5))
        optimizer = optimizer_of([p], native)
        with optimizer.sampled_params(train=True):
            p.grad = torch._neg_view(torch.ones(5))
        optimizer.step()
        results.append(optimizer.mean)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_state_of_another_structure_is_refused() -> None:
    one, _ = build(True, hess_structure="scalar")
    with pytest.raises(ValueError, match="hess_structure=diagonal"):
        build(True)[0].load_state_dict(one.state_dict())


def test_an_app_bundle_takes_the_sources_of_the_installed_package_if_they_are_of_its_version(monkeypatch, tmp_path):
    beside = {name: library._source(name) for name in library.SOURCES}
    assert beside == {name: Path(library.__file__).with_name(name) for name in library.SOURCES}
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(Path(__file__).parents[2])])
    assert {name: library._source(name) for name in library.SOURCES} == beside
    other = tmp_path / "bayesfed" / "accelerate"
    other.mkdir(parents=True)
    for name in library.SOURCES:
        (other / name).write_text("int another_version;")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert [library._source(name) for name in library.SOURCES] == [None, None]
