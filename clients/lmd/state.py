"""State of a parameter group of LMD: log-medians of two parts per weight, or ordinary weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError
from bayesfed.families.lognormal import SMALLEST_OFFSET, split_mean
from bayesfed.families.natural import all_finite
from clients.flat import FlatParameters
from clients.lmd.step import REGULARISERS, lmd_step
from clients.noise import Noise


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
        self.log_median = state["log_median"] = (
            torch.cat(pieces, 1) if pieces else flat.vector.to(dtype).view(1, 0).repeat(2, 1)
        )
        self.momentum = state["momentum"] = torch.zeros_like(self.log_median)
        self.means, self.parts = torch.empty_like(self.log_median), torch.empty_like(self.log_median)
        self.gradient = torch.empty_like(self.log_median)
        self.sample = torch.empty_like(flat.vector)
        self.slope = torch.empty_like(flat.vector)
        self.pull: tuple[Tensor, float] | None = None
        self.connect()
        self.refresh()

    def connect(self) -> None:
        """Make the views."""
        self.sample_views = self.flat.split(self.sample)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sample_views": []}

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the means and the parameters from the medians."""
        self._sigma = self.group["sigma"]
        torch.add(self.log_median, 0.5 * self._sigma**2, out=self.means).exp_()
        self._weights(out=self.flat.vector)
        self._versions = [p._version for p in self.flat.parameters]

    def _weights(self, out: Tensor) -> Tensor:
        """What the parameters are between steps, (P,)."""
        torch.sub(self.means[0], self.means[1], out=out)
        return out.mul_(math.exp(-0.5 * self._sigma**2)) if self.weights == "median" else out

    def follow(self) -> None:
        """Split the weights that are not what the last refresh wrote; take over another sigma.

        Raises:
            InputError: the new weights are not finite, or the group is to be multiplicative no more.
        """
        _same_kind(self.group, True)
        flat, versions = self.flat, [p._version for p in self.flat.parameters]
        if flat.vector.is_cpu or versions != self._versions:  # comparing waits for a GPU
            kept = flat.split(self._weights(out=self.sample))
            columns = [part.split(flat.sizes) for part in self.log_median]
            for view, old, plus, minus in zip(flat.views, kept, *columns, strict=True):
                if _same_bits(view, old):
                    continue
                if not all_finite(view):
                    raise InputError("params", "not finite", "LMD needs finite weights")
                values = view.to(self.log_median.dtype).flatten()
                new = split_mean(values, _offset(view, self.group["offset"]), self.group["sigma"] ** 2)
                plus.copy_(new[0]), minus.copy_(new[1])
                self._sigma = math.nan
        if self._sigma != self.group["sigma"]:
            self.refresh()
        self._versions = versions

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
        for part in self.flat.frozen:
            self.sample[part].copy_(self.flat.vector[part])
        self.flat.show(self.sample_views)

    def stay(self) -> None:
        """The next gradient is that at the parameters between steps."""
        factor = math.exp(-0.5 * self.group["sigma"] ** 2) if self.weights == "median" else 1.0
        torch.mul(self.means, factor, out=self.parts)

    def take(self) -> bool:
        """Take the gradient into ``slope`` (P,); False if there is none."""
        return self.flat.take_gradients(self.slope)

    def add(self, first: bool) -> None:
        """Add ``(u g, -v g)``."""
        if first:
            torch.mul(self.parts, self.slope, out=self.gradient)
            self.gradient[1].neg_()
        else:
            self.gradient[0].addcmul_(self.parts[0], self.slope)
            self.gradient[1].addcmul_(self.parts[1], self.slope, value=-1)

    def step(self, samples: int, good: Tensor | None) -> None:
        """Move the medians; ``good``: how many of the samples count, () on the device, None for all."""
        group = self.group
        _average(self.gradient, samples, good)
        with self.flat.keeping(self.log_median, self.momentum):
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
                alive=None if good is None else good > 0,
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
        self.gradient, self.slope = torch.empty_like(flat.vector), torch.empty_like(flat.vector)

    def mean(self) -> Tensor:
        return self.flat.vector.clone()

    def draw(self, noise: Noise) -> None:
        """Nothing to draw: the weights are what they are."""

    stay = refresh = connect = lambda self: None

    def follow(self) -> None:
        _same_kind(self.group, False)

    def take(self) -> bool:
        return self.flat.take_gradients(self.slope)

    def add(self, first: bool) -> None:
        self.gradient.copy_(self.slope) if first else self.gradient.add_(self.slope)

    def step(self, samples: int, good: Tensor | None) -> None:
        group = self.group
        _average(self.gradient, samples, good)
        with self.flat.keeping(self.flat.vector, self.momentum):
            lmd_step(
                self.flat.vector,
                self.momentum,
                self.gradient,
                self.flat.vector,
                decay=group["decay"],
                lr=group["lr"],
                beta1=group["beta1"],
                beta2=group["beta2"],
                signed=group["signed"],
                alive=None if good is None else good > 0,
            )

    def load(self, saved: dict[str, Any]) -> None:
        self.momentum.copy_(saved["momentum"])
        self.state = {"momentum": self.momentum}


def _average(gradient: Tensor, samples: int, good: Tensor | None) -> None:
    """Divide the sum over samples by their number."""
    if samples > 1:
        gradient.div_(samples if good is None else good.clamp(min=1))


def _same_kind(group: dict[str, Any], multiplicative: bool) -> None:
    if bool(group["multiplicative"]) != multiplicative:
        raise InputError("multiplicative", group["multiplicative"], "cannot be changed: build the optimizer anew")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that holds for nan too."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(whole), b.view(whole))


def _offset(values: Tensor, given: float | None) -> Tensor | float:
    """``given``, or half the standard deviation of a tensor; a constant one (a bias, a gain) has none."""
    if given is not None:
        return given
    if not values.numel():
        return SMALLEST_OFFSET
    half = 0.5 * values.double().std(correction=0)
    varies = half > 1e-4 * values.abs().max()  # the computed spread of equal numbers need not be 0
    return torch.where(varies, half, SMALLEST_OFFSET).to(torch.promote_types(values.dtype, torch.float32))
