"""Parameters and gradients as vectors."""

from __future__ import annotations

import torch
from torch import nn

from bayesfed.problem.flat import FlatModel


def test_gradients_are_those_of_the_last_pass_and_zero_where_there_is_none():
    model = FlatModel(nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 2)}), torch.float64)
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    for scale in (1.0, -2.0):
        (scale * model.module["used"](x).sum()).backward()
        weight, bias, *unused = model.gradients()
        assert weight.tolist() == [[scale, 2 * scale, 3 * scale]] * 2
        assert bias.tolist() == [scale] * 2
        assert all(g.count_nonzero() == 0 for g in unused)
        assert all(p.grad is g for p, g in zip(model.parameters, model.gradients(), strict=True))
        model.drop_grad()
        assert all(p.grad is None for p in model.parameters)


def test_split_gives_views_shaped_like_the_parameters():
    model = FlatModel(nn.Linear(2, 3), torch.float64)
    vector = torch.arange(9.0)
    weight, bias = model.split(vector)
    assert weight.tolist() == [[0, 1], [2, 3], [4, 5]]
    bias.zero_()
    assert vector[6:].count_nonzero() == 0
