"""How a client's dual moves: along the difference of natural parameters, of expectation parameters, or of point estimates."""

from __future__ import annotations

import torch

from bayesfed.families import NaturalParameters, PointMass
from bayesfed.federation.local import Posterior

KINDS = ("natural", "expectation")


def difference(kind: str, posterior: Posterior, server: Posterior) -> NaturalParameters:
    """What the dual moves along, in float64.

    Args:
        kind: ``natural``: ``lambda_k - lambda_g`` (Bayesian duality). ``expectation``: ``mu_k - mu_g`` (Bregman ADMM, Wang and Banerjee
            2014).
        posterior, server: ``q_k`` as the server will see it, and ``q_g``. Of two point masses the difference is ``(w_k - w_g, 0)``.
    """
    own, other = posterior.to(torch.float64), server.to(torch.float64)
    if isinstance(own, PointMass) or isinstance(other, PointMass):
        gap = own.mean - other.mean
        return NaturalParameters(PointMass.name, gap, gap.new_zeros(()))
    if kind == "natural":
        return own.natural - other.natural
    (first, second), (first_server, second_server) = own.expectation, other.expectation
    return NaturalParameters(own.name, first - first_server, second - second_server)
