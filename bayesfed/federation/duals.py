"""How a client's dual moves: one law for the clients, which keep the duals, and the server, which keeps their sum."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from bayesfed.families import NaturalParameters, PointMass
from bayesfed.federation.local import Posterior

KINDS = ("natural", "expectation")
Coordinates = TypeVar("Coordinates", NaturalParameters, Tensor)


def coordinates(kind: str, posterior: Posterior) -> NaturalParameters:
    """What a dual moves along, in float64; ``(w, 0)`` of a point mass.

    Args:
        kind: ``natural``: lambda (Bayesian duality). ``expectation``: mu (Bregman ADMM, Wang and Banerjee 2014).
        posterior: ``q_k`` as the server will see it, or ``q_g``.
    """
    wide = posterior.to(torch.float64)
    if isinstance(wide, PointMass):
        return NaturalParameters(PointMass.name, wide.mean, wide.mean.new_zeros(()))
    return wide.natural if kind == "natural" else NaturalParameters(wide.name, *wide.expectation)


def change(total: Coordinates, server: Coordinates, count: int = 1) -> Coordinates:
    """``sum_k (x_k - x_g)``: times ``gamma rho`` it is what the duals of ``count`` clients change by.

    Args:
        total: ``sum_k x_k``, the clients' :func:`coordinates`.
        server: ``x_g``, as it was sent to them.
        count: how many clients ``total`` sums.
    """
    return total - (server if count == 1 else server * count)
