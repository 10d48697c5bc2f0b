"""The posterior that IVON has learned: to be read, set, saved and copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError
from clients.flat import FlatParameters, spread
from clients.ivon.state import SAVED, Group, average, follow
from clients.optimizer import PosteriorOptimizer


class IVONPosterior(PosteriorOptimizer):
    """``q = N(m, 1 / (ess (h + delta)))`` over the parameters of all groups, and what else IVON keeps between steps."""

    hess_structure: str
    min_precision: float
    generator: torch.Generator | None
    _groups: list[Group]
    _steps: int
    _idle: Tensor | None  # how many of the steps changed nothing, if deferred

    @property
    def _flats(self) -> list[FlatParameters]:
        return [g.flat for g in self._groups]

    def _connect(self) -> None:
        for g in self._groups:
            g.connect()

    def _join(self, values: list[Tensor]) -> Tensor:
        pieces = [v.expand_as(g.flat.vector) for v, g in zip(values, self._groups, strict=True)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)

    @property
    def mean(self) -> Tensor:
        """The mean of q over all trainable parameters, (P,), a copy."""
        self._attach()
        return self._join([g.flat.vector for g in self._groups])

    @property
    def hess(self) -> Tensor:
        """h, (P,), a copy: the curvature of the mean loss, less V."""
        return self._join([g.hess for g in self._groups])

    @property
    def precision(self) -> Tensor:
        """ess (h + delta), (P,)."""
        follow(self._groups, self.param_groups, self.min_precision)
        groups = zip(self.param_groups, self._groups, strict=True)
        return self._join([g.total * group["ess"] for group, g in groups])

    @property
    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and precision of q."""
        return self.mean, self.precision

    def hessian_moved(self, threshold: float = 0.1) -> Tensor:
        """The share of entries of h that differ from their initial value by more than ``threshold`` of it, shape ()."""
        return self._join(
            [((g.hess - g.initial).abs() > threshold * g.initial.abs()).float() for g in self._groups]
        ).mean()

    def floored(self) -> Tensor:
        """How many entries of h are at the bound that ``min_precision`` sets, shape ()."""
        held = [g.total <= g.bound if self.min_precision else torch.zeros_like(g.total) for g in self._groups]
        return self._join([h.float() for h in held]).sum()

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_posterior(self, mean: Any = None, precision: Any = None, reset: bool = True) -> None:
        """Continue from another Gaussian: the parameters become ``mean`` and h = precision / ess - delta.

        Args:
            mean: over all parameters, like ``prior_mean``; ``None`` keeps the parameters.
            precision: likewise, > 0; ``None`` keeps h. In the isotropic family its mean is used.
            reset: forget the momentum and restart its debiasing.

        Raises:
            InputError: wrong size, not finite, or a precision that is not positive.
        """
        if self._inside:
            raise RuntimeError("set_posterior() cannot be called inside sampled_params()")
        flats = self._flats
        follow(self._groups, self.param_groups, self.min_precision)
        if mean is not None:
            for g, value in zip(self._groups, spread("mean", mean, flats), strict=True):
                g.flat.attach()
                g.flat.vector.copy_(value) if isinstance(value, Tensor) else g.flat.vector.fill_(value)
        if precision is not None:
            values = spread("precision", precision, flats)
            if any(not torch.as_tensor(v).is_meta and not bool(torch.as_tensor(v).amin() > 0) for v in values):
                raise InputError("precision", "not positive", "must be > 0 everywhere")
            for group, g, value in zip(self.param_groups, self._groups, values, strict=True):
                if self.hess_structure == "scalar":
                    value = average(values, self._groups)
                start = value / group["ess"]
                g.total.copy_(start) if isinstance(start, Tensor) else g.total.fill_(start)
                g.initial = g.hess
                torch.rsqrt(g.total, out=g.root)
        self._forget()
        if reset:
            self._steps, self._idle = 0, None
            for g in self._groups:
                g.momentum.zero_()

    def momentum(self) -> tuple[Tensor, int]:
        """The momentum (P,), a copy, and how many steps it has seen (its debiasing needs both)."""
        return self._join([g.momentum for g in self._groups]), self._changes()

    def _changes(self) -> int:
        """The steps that changed something."""
        return self._steps - (0 if self._idle is None else int(self._idle))

    @torch.no_grad()
    def load_momentum(self, momentum: Tensor, steps: int) -> None:
        """Go on with a momentum from :meth:`momentum`."""
        sizes = [g.momentum.numel() for g in self._groups]
        for g, part in zip(self._groups, momentum.split(sizes), strict=True):
            g.momentum.copy_(part)
        self._steps, self._idle = steps, None

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters (the mean) that the next step depends on, the noise stream included.

        Take it between steps: samples collected for an unfinished step are not in it.
        """
        own = {
            "steps": self._changes(),
            "groups": [{name: getattr(g, name) for name in SAVED} for g in self._groups],
            "generator": None if self.generator is None else self.generator.get_state(),
        }
        return {**super().state_dict(), "ivon": own}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the parameters have to be restored with the model.

        Raises:
            ValueError: it is a state of another optimizer, or the groups or their sizes do not match.
        """
        own = self._own(state_dict, "ivon")
        sizes = [g.flat.vector.numel() for g in self._groups]
        if [saved["momentum"].numel() for saved in own["groups"]] != sizes:
            raise ValueError(f"the saved optimizer has other parameters than this one ({sizes} per group)")
        if any(saved["total"].shape != g.total.shape for g, saved in zip(self._groups, own["groups"], strict=True)):
            raise ValueError(f"the saved optimizer is not of hess_structure={self.hess_structure}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "ivon"})
        for g, saved, group in zip(self._groups, own["groups"], self.param_groups, strict=True):
            g.load(saved, group)
            g.refresh(self.min_precision)
        self._steps, self._idle = own["steps"], None
        self._forget()
        if self.generator is not None and own["generator"] is not None:
            self.generator.set_state(own["generator"].cpu())
