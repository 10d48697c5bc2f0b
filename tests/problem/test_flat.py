"""Parameters and gradients as vectors."""

from __future__ import annotations

import torch
from torch import nn

from bayesfed.problem.flat import FlatModel


def test_gradients_are_gathered_in_parameter_order_and_zero_where_there_is_none():
    model = FlatModel(nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 2)}), torch.float64)
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    for scale in (1.0, -2.0):  # nothing of the first pass is left in the second
        (scale * model.module["used"](x).sum()).backward()
        model.gather_grad()
        assert model.grad.tolist() == [scale, 2 * scale, 3 * scale] * 2 + [scale] * 2 + [0.0] * 6
        assert all(p.grad is None for p in model.parameters)


def test_all_gradients():
    model = FlatModel(nn.Linear(2, 1), torch.float64)
    model.module(torch.ones(4, 2, dtype=torch.float64)).mean().backward()
    model.gather_grad()
    assert model.grad.tolist() == [1.0, 1.0, 1.0]
