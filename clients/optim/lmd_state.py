"""State of a parameter group of LMD: log-medians of two parts per weight, or ordinary weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesfed.families.lognormal import SMALLEST_OFFSET, split_mean
from clients.optim.flat import FlatParameters
from clients.optim.lmd_update import REGULARISERS, lmd_step
from clients.optim.noise import Noise


class Multiplicative:
    """Weights ``u - v``.

    Args:
        group: the optimizer's settings, read at every step.
        flat: the parameters; their values are the initial E[w].
        state: the optimizer's, to put log-medians and momenta (2, P) into.
        weights: ``mean`` or ``median``, what the parameters are between steps.

    Attributes:
        means: (2, P) E[u] and E[v] at the current medians.
        parts: (2, P) u and v behind the parameters' current values.
        pull: constant (2, P) and slope of the federated terms, None without.
    """

    def __init__(self, group: dict[str, Any], flat: FlatParameters, state: dict[str, Any], weights: str):
        self.group, self.flat, self.state, self.weights = group, flat, state, weights
        dtype = torch.promote_types(flat.vector.dtype, torch.float32)
        pieces = [
            split_mean(view.to(dtype).flatten(), _offset(view, group["offset"]), group["sigma"] ** 2)
            for view in flat.views
        ]
        self.log_median = state["log_median"] = torch.cat(pieces, 1)
        self.momentum = state["momentum"] = torch.zeros_like(self.log_median)
        self.means, self.parts = torch.empty_like(self.log_median), torch.empty_like(self.log_median)
        self.gradient = torch.empty_like(self.log_median)
        self.sample = torch.empty_like(flat.vector)
        self.sample_views = flat.split(self.sample)
        self._slope = torch.empty_like(flat.vector)
        self.pull: tuple[Tensor, float] | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the means and the parameters from the medians."""
        variance = self.group["sigma"] ** 2
        torch.add(self.log_median, 0.5 * variance, out=self.means).exp_()
        torch.sub(self.means[0], self.means[1], out=self.flat.vector)
        if self.weights == "median":
            self.flat.vector.mul_(math.exp(-0.5 * variance))

    def mean(self) -> Tensor:
        """E[w], (P,)."""
        return self.means[0] - self.means[1]

    @torch.no_grad()
    def draw(self, noise: Noise) -> None:
        """Show the parameters at a sample."""
        if sigma := self.group["sigma"]:
            noise.fill(self.parts.view(-1))
            torch.add(self.log_median, self.parts, alpha=sigma, out=self.parts).exp_()
        else:
            self.parts.copy_(self.means)
        torch.sub(self.parts[0], self.parts[1], out=self.sample)
        self.flat.show(self.sample_views)

    def stay(self) -> None:
        """The next gradient is that at the parameters between steps."""
        factor = math.exp(-0.5 * self.group["sigma"] ** 2) if self.weights == "median" else 1.0
        torch.mul(self.means, factor, out=self.parts)

    def collect(self, first: bool) -> bool:
        """Add ``(u g, -v g)``; False if there is no gradient."""
        found = self.flat.take_gradients(self._slope)
        if first:
            torch.mul(self.parts, self._slope, out=self.gradient)
            self.gradient[1].neg_()
        else:
            self.gradient[0].addcmul_(self.parts[0], self._slope)
            self.gradient[1].addcmul_(self.parts[1], self._slope, value=-1)
        return found

    def step(self, samples: int) -> None:
        """Move the medians."""
        group = self.group
        if samples > 1:
            self.gradient.div_(samples)
        lmd_step(
            self.log_median,
            self.momentum,
            self.gradient,
            self.regulariser(),
            decay=group["decay"],
            lr=group["lr"],
            beta1=group["beta1"],
            beta2=group["beta2"],
            signed=group["signed"],
            temperature=group["temperature"],
            pull=self.pull,
            work=self.parts,
        )
        self.refresh()

    def regulariser(self) -> Tensor:
        """R at strength 1, (2, P), at the current medians."""
        name = self.group["regulariser"]
        if name == "lognormal":
            return self.log_median - math.log(self.group["prior_median"])
        return REGULARISERS[name](self.means, self.group["sigma"] ** 2)

    def load(self, saved: dict[str, Any]) -> None:
        """Continue from saved state."""
        self.log_median.copy_(saved["log_median"])
        self.momentum.copy_(saved["momentum"])
        self.state = {"log_median": self.log_median, "momentum": self.momentum}
        self.refresh()


class Additive:
    """Ordinary weights, by sign momentum with decoupled decay; arguments and methods as above."""

    def __init__(self, group: dict[str, Any], flat: FlatParameters, state: dict[str, Any], weights: str):
        self.group, self.flat, self.state = group, flat, state
        self.momentum = state["momentum"] = torch.zeros_like(flat.vector)
        self.gradient, self._slope = torch.empty_like(flat.vector), torch.empty_like(flat.vector)

    def mean(self) -> Tensor:
        return self.flat.vector.clone()

    def draw(self, noise: Noise) -> None:
        """Nothing to draw: the weights are what they are."""

    stay = refresh = lambda self: None

    def collect(self, first: bool) -> bool:
        found = self.flat.take_gradients(self._slope)
        self.gradient.copy_(self._slope) if first else self.gradient.add_(self._slope)
        return found

    def step(self, samples: int) -> None:
        group = self.group
        lmd_step(
            self.flat.vector,
            self.momentum,
            self.gradient.div_(samples),
            self.flat.vector,
            decay=group["decay"],
            lr=group["lr"],
            beta1=group["beta1"],
            beta2=group["beta2"],
            signed=group["signed"],
        )

    def load(self, saved: dict[str, Any]) -> None:
        self.momentum.copy_(saved["momentum"])
        self.state = {"momentum": self.momentum}


def _offset(values: Tensor, given: float | None) -> Tensor | float:
    """``given``, or half the standard deviation of a tensor; a constant one (a bias, a gain) has none."""
    if given is not None:
        return given
    half = 0.5 * values.double().std(correction=0)
    varies = half > 1e-4 * values.abs().max()  # the computed spread of equal numbers need not be 0
    return torch.where(varies, half, SMALLEST_OFFSET).to(torch.promote_types(values.dtype, torch.float32))
