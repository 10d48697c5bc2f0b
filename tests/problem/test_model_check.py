"""Own models that can't be trained, kept or told apart are refused on two rows; all others pass."""

from __future__ import annotations

import random
import sys
import types
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn

from bayesfed.errors import InputError
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.model_check import check_forward

# ruff: noqa: NPY002 - the global generators are part of what is tested


class Own(nn.Module):
    def __init__(self, input_shape, num_outputs):
        super().__init__()
        self.body, self.head = nn.Linear(64, 6), nn.Linear(6, num_outputs)
        self.num_outputs = num_outputs

    def forward(self, x):
        return self.head(self.features(x.flatten(1)).tanh())

    def features(self, x):
        return self.body(x)


def own(init=None, features=None, forward=None):
    """An ``Own`` with some of its methods replaced; ``init`` comes after its constructor."""
    methods = {"features": features, "forward": forward}

    class Changed(Own):
        def __init__(self, input_shape, num_outputs):
            super().__init__(input_shape, num_outputs)
            if init:
                init(self)

    for name, method in methods.items():
        if method:
            setattr(Changed, name, method)
    return Changed


def setting(**attributes):
    def init(self):
        for name, value in attributes.items():
            setattr(self, name, value() if callable(value) and not isinstance(value, nn.Module) else value)

    return init


def buffer(value):
    return lambda self: self.register_buffer("extra", value())


def sharing_memory(self):
    self.other = nn.Linear(64, 6)
    self.other.weight.data = self.body.weight.data


def counting(self, x):
    self.extra += 1
    return self.body(x)


def remembering(self, x):
    if self.training:
        self.seen = self.seen + 1.0
    return self.body(x) * self.seen


def failing(self, x):
    raise ZeroDivisionError("no luck")


def raising(self):
    raise ZeroDivisionError("no luck")


def tuple_of(self, x):
    return Own.forward(self, x), x


def detached(self, x):
    with torch.no_grad():
        return Own.forward(self, x)


def in_place(self, x):
    return self.body(x.relu_())


def overwritten(self, x):
    h = self.body(x.flatten(1)).exp()
    return self.head(h * h.mul_(2))


_made = count()

REFUSED = {
    "too few outputs": (own(init=setting(head=lambda: nn.Linear(6, 7))), r"output \(2, 7\), needs \(2, 10\)"),
    "too many outputs": (own(init=setting(head=lambda: nn.Linear(6, 13))), r"output \(2, 13\), needs \(2, 10\)"),
    "one vector": (own(forward=lambda self, x: Own.forward(self, x)[0]), r"output \(10,\), needs \(2, 10\)"),
    "an axis too many": (own(forward=lambda self, x: Own.forward(self, x)[..., None]), r"output \(2, 10, 1\)"),
    "rows merged": (own(forward=lambda self, x: Own.forward(self, x).mean(0, keepdim=True)), r"output \(1, 10\)"),
    "tuple": (own(forward=tuple_of), "output is a tuple, needs a tensor"),
    "dict": (own(forward=lambda self, x: {"logits": Own.forward(self, x)}), "output is a dict, needs a tensor"),
    "None": (own(forward=lambda self, x: None), "output is a NoneType"),
    "whole numbers": (
        own(forward=lambda self, x: Own.forward(self, x).long()),
        "output is int64, needs floating point",
    ),
    "lazy layer": (
        own(init=setting(body=lambda: nn.LazyLinear(6))),
        "'body.weight' has no shape before the first forward",
    ),
    "lazy norm": (own(init=setting(norm=nn.LazyBatchNorm1d)), "'norm.weight' has no shape"),
    "all frozen": (own(init=lambda self: self.requires_grad_(False)), "has no trainable parameters"),
    "complex parameter": (
        own(init=setting(w=lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)))),
        "'w' is complex64",
    ),
    "complex buffer": (own(init=buffer(lambda: torch.ones(2, dtype=torch.complex64))), "'extra' is complex64"),
    "parameters on one memory": (own(init=sharing_memory), "'body.weight' and 'other.weight' share memory"),
    "forward raises": (
        own(features=failing),
        r"forward .* fails: ZeroDivisionError: no luck \(test_model_check.py, line \d+\)",
    ),
    "forward of another shape": (
        own(init=setting(body=lambda: nn.Linear(63, 6))),
        "fails: RuntimeError: mat1 and mat2 shapes",
    ),
    "no forward": (own(forward=nn.Module.forward), "fails: NotImplementedError"),
    "constructor raises": (own(init=raising), "its constructor fails: ZeroDivisionError: no luck"),
    "no super().__init__": (
        type("Bare", (Own,), {"__init__": lambda self, input_shape, num_outputs: setattr(self, "a", nn.ReLU())}),
        "constructor fails: AttributeError",
    ),
    "constructor without shapes": (
        type("Bare", (Own,), {"__init__": lambda self: None}),
        "its constructor must take input_shape and num_outputs",
    ),
    "no gradient": (own(forward=detached), "does not depend on a trainable parameter"),
    "gradient impossible": (
        own(forward=overwritten),
        "the gradient fails: RuntimeError: .* modified by an inplace operation",
    ),
    "input overwritten": (own(features=in_place), "writes to its input"),
    "batch norm": (
        own(init=setting(norm=lambda: nn.BatchNorm1d(6)), features=lambda self, x: self.norm(self.body(x))),
        "'norm.running_mean'.*GroupNorm",
    ),
    "instance norm with statistics": (
        own(
            init=setting(norm=lambda: nn.InstanceNorm1d(6, track_running_stats=True)),
            features=lambda self, x: self.norm(self.body(x).reshape(-1, 6, 1).expand(-1, 6, 2))[..., 0],
        ),
        "'norm.running_mean'",
    ),
    "spectral norm": (
        own(init=lambda self: nn.utils.parametrizations.spectral_norm(self.body)),
        r"buffer 'body\.parametrizations\.weight\.0\._u'",
    ),
    "counting buffer": (
        own(init=buffer(lambda: torch.tensor(0)), features=counting),
        "training changes the buffer 'extra'",
    ),
    "unregistered state": (
        own(init=setting(seen=0.0), features=remembering),
        "training mode changes what it predicts later",
    ),
    "NumPy's own generator": (
        own(init=lambda self: nn.init.constant_(self.body.bias, np.random.default_rng().normal())),
        "'body.bias' differs between two models built from one seed",
    ),
    "drawn from elsewhere, unregistered": (
        own(
            init=setting(scale=lambda: np.random.default_rng().normal(5)),
            features=lambda self, x: self.body(x) * self.scale,
        ),
        "predict differently",
    ),
    "another structure each time": (
        own(init=lambda self: self.add_module(f"extra{next(_made)}", nn.Linear(1, 1))),
        "'extra.*' differs",
    ),
}

ACCEPTED = {
    "plain": Own,
    "frozen layer": own(init=lambda self: self.body.requires_grad_(False)),
    "constant buffer": own(init=buffer(lambda: torch.randn(6)), features=lambda self, x: self.body(x) * self.extra),
    "buffer of whole numbers": own(
        init=buffer(lambda: torch.randperm(6)), features=lambda self, x: self.body(x)[:, self.extra]
    ),
    "buffer with nan": own(init=buffer(lambda: torch.tensor(torch.nan))),
    "frozen whole numbers": own(init=setting(codes=lambda: nn.Parameter(torch.arange(3), requires_grad=False))),
    "one layer twice": own(init=lambda self: setattr(self, "again", self.body)),
    "tied weights": own(
        init=lambda self: setattr(self, "other", nn.Linear(64, 6)) or setattr(self.other, "weight", self.body.weight)
    ),
    "unused layer": own(init=setting(unused=lambda: nn.Linear(2, 2))),
    "dropout": own(features=lambda self, x: nn.functional.dropout(self.body(x), 0.5, self.training)),
    "random in evaluation": own(features=lambda self, x: nn.functional.dropout(self.body(x), 0.5, True)),
    "random by NumPy": own(features=lambda self, x: self.body(x) * np.random.normal()),
    "random from elsewhere": own(
        init=setting(g=np.random.default_rng), features=lambda self, x: self.body(x) * self.g.normal()
    ),
    "drawn by NumPy and random": own(
        init=lambda self: nn.init.constant_(self.body.bias, np.random.normal() + random.gauss(0, 1))
    ),
    "batch norm without statistics": own(
        init=setting(norm=lambda: nn.BatchNorm1d(6, track_running_stats=False)),
        features=lambda self, x: self.norm(self.body(x)),
    ),
    "group norm": own(init=setting(norm=lambda: nn.GroupNorm(2, 6)), features=lambda self, x: self.norm(self.body(x))),
    "keeps its features": own(features=lambda self, x: setattr(self, "kept", self.body(x)) or self.kept),
    "recurrent": own(
        init=setting(cell=lambda: nn.LSTM(8, 6, batch_first=True)),
        features=lambda self, x: self.cell(x.view(-1, 8, 8))[0][:, -1],
    ),
    "sparse embedding": own(
        init=setting(table=lambda: nn.Embedding(17, 6, sparse=True)),
        features=lambda self, x: self.table(x.long().clamp(0, 16)).mean(1),
    ),
    "constructor that looks at numbers": own(init=lambda self: setattr(self, "gain", self.body.weight.std().item())),
    "double precision by itself": own(init=lambda self: self.double()),
}


@pytest.fixture
def checked(problem, monkeypatch):
    """Check a class as the model of the digits, as a run does before anything else."""

    def check(model, dtype=torch.float32):
        module = types.ModuleType("own_model_module")
        module.Model = model
        monkeypatch.setitem(sys.modules, module.__name__, module)
        named = {"name": "own", "_target_": "own_model_module.Model"}
        changed = replace(problem(), model=named)
        check_forward(changed, FlatModel(changed.build_model(1), dtype), 1)

    return check


@pytest.mark.parametrize("case", REFUSED)
def test_refused(checked, case):
    model, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as refused:
        checked(model)
    assert refused.value.field.startswith("model")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(checked, case, dtype):
    checked(ACCEPTED[case], dtype)
