"""What IVON keeps for one group of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError, number
from clients.flat import FlatParameters, spread
from clients.ivon.step import hold

VECTORS = ("prior_mean", "prior_precision", "site_linear", "site_quadratic", "hess")  # arguments for all groups or one
_GIVEN = ("initial", "damping", "delta", "prior_mean", "site_linear", "site_quadratic", "pair")
SAVED = ("momentum", "total", *_GIVEN)  # what the next step depends on


@dataclass
class Group:
    """Buffers of one parameter group; vectors are (P,), numbers stand for constant vectors."""

    flat: FlatParameters
    sample: Tensor  # what the parameters are while a context is open, work space otherwise
    noise: Tensor  # z root of a step's first sample; afterwards the sum of z root g over its samples
    work: Tensor  # z root of later samples
    gradient: Tensor  # its sum over samples
    momentum: Tensor
    delta: float | Tensor  # prior precision / ess
    prior_mean: float | Tensor
    site_linear: float | Tensor
    site_quadratic: float | Tensor
    damping: float | Tensor  # delta as the curvature sees it: delta, or its mean over all parameters if isotropic
    total: Tensor  # h + damping, > 0
    root: Tensor  # 1 / sqrt(total)
    initial: Tensor  # h at the start; () if it was constant
    bound: float | Tensor = 0.0  # smallest total
    slope: float | Tensor = 0.0  # gradient of prior and sites at m: slope * m - offset
    offset: float | Tensor = 0.0
    extra: Tensor | None = None  # gradient of the second and later samples of a step
    pieces: list[Tensor] | None = None  # gradient of the only sample of a step, as autograd made it
    pair: Tensor | None = None  # z of the last sample, whose mirror image is due (antithetic)
    sample_views: list[Tensor] = field(default_factory=list)  # pieces of it, shaped like the parameters
    told: tuple[float, float] = (0.0, 1.0)  # the weight_decay and ess that delta belongs to
    fixed: bool = False  # delta is a prior precision over ess, not weight_decay

    def connect(self) -> None:
        """Make the views of the vectors."""
        self.sample_views = self.flat.split(self.sample)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pieces": None, "sample_views": []}

    def gather(self) -> None:
        """Put a gradient that is in pieces into the vector."""
        if self.pieces is not None:
            torch._foreach_copy_(self.flat.split(self.gradient), self.pieces)
            self.pieces = None

    def refresh(self, min_precision: float) -> None:
        """Recompute what follows from the total, delta, the prior mean and the sites."""
        self.slope, self.offset, self.bound = objective(
            self.delta, self.damping, self.prior_mean, self.site_linear, self.site_quadratic, min_precision,
            self.total.dtype,
        )  # fmt: skip
        torch.rsqrt(self.total, out=self.root)

    @property
    def hess(self) -> Tensor:
        """h: the curvature of the mean loss, less V."""
        return self.total - self.damping

    def load(self, saved: dict[str, Any], settings: dict[str, Any]) -> None:
        """Take over what another group with these settings had under ``SAVED``; to be followed by :meth:`refresh`."""
        like = self.momentum
        self.momentum.copy_(saved["momentum"])
        self.total.copy_(saved["total"])
        for name in _GIVEN:
            value = saved[name]
            setattr(self, name, value.to(like.device, like.dtype, copy=True) if isinstance(value, Tensor) else value)
        self.told = settings["weight_decay"], settings["ess"]
        self.fixed = isinstance(self.delta, Tensor) or self.delta != settings["weight_decay"]


def objective(
    delta: float | Tensor,
    damping: float | Tensor,
    prior_mean: float | Tensor,
    linear: float | Tensor,
    quadratic: float | Tensor,
    min_precision: float,
    dtype: torch.dtype,
) -> tuple[Any, Any, Any]:
    """What prior and sites (v, V) contribute to a step (:mod:`clients.ivon.step`); numbers where all of it are numbers.

    Returns:
        slope ``delta - V``, offset ``delta prior_mean - v``, and the smallest ``h + delta``: ``min_precision`` of
        ``damping``, or what rounding in ``dtype`` leaves of it.
    """
    return delta - quadratic, delta * prior_mean - linear, damping * max(min_precision, torch.finfo(dtype).eps)


def check_group(group: dict[str, Any]) -> None:
    """Check the settings of a group and make them Python's numbers.

    Raises:
        InputError: one is out of range.
    """
    group["lr"] = number("lr", group["lr"], at_least=0)
    group["ess"] = number("ess", group["ess"], above=0)
    group["hess_init"] = number("hess_init", group["hess_init"])
    group["beta1"] = number("beta1", group["beta1"], at_least=0)
    if group["beta1"] >= 1:
        raise InputError("beta1", group["beta1"], "must be a finite number >= 0 and < 1")
    group["beta2"] = number("beta2", group["beta2"], at_least=0, at_most=1)
    group["weight_decay"] = number("weight_decay", group["weight_decay"], at_least=0)
    group["clip_radius"] = number("clip_radius", group["clip_radius"], above=0, finite=False)


def build_group(group: dict[str, Any], flat: FlatParameters, shared: dict[str, Any]) -> Group:
    """The buffers of a group, from its own vector arguments (taken out of ``group``) or its share of the optimizer's.

    Raises:
        InputError: an argument does not fit the parameters.
    """
    like = flat.vector
    values: dict[str, Any] = {}
    for name in VECTORS:
        own = group.pop(name, None)
        value = shared[name] if own is None else spread(name, own, [flat])[0]
        values[name] = value.to(torch.promote_types(value.dtype, like.dtype)) if isinstance(value, Tensor) else value

    def ready(value: float | Tensor | None) -> float | Tensor:
        return value.to(like.dtype) if isinstance(value, Tensor) else value or 0.0

    precision = values["prior_precision"]
    delta = ready(group["weight_decay"] if precision is None else precision / group["ess"])
    if not torch.as_tensor(delta).is_meta and bool((torch.as_tensor(delta) < 0).any()):
        raise InputError("prior_precision", "negative", "must be >= 0")
    hess = ready(group["hess_init"] if values["hess"] is None else values["hess"])
    initial = torch.as_tensor(hess, dtype=like.dtype, device=like.device).clone()
    made = Group(
        flat=flat,
        sample=torch.empty_like(like),
        noise=torch.empty_like(like),
        work=torch.empty_like(like),
        gradient=torch.empty_like(like),
        momentum=torch.zeros_like(like),
        delta=delta,
        prior_mean=ready(values["prior_mean"]),
        site_linear=ready(values["site_linear"]),
        site_quadratic=ready(values["site_quadratic"]),
        damping=delta,
        total=torch.zeros_like(like).add_(initial).add_(delta),
        root=torch.empty_like(like),
        initial=initial,
        told=(group["weight_decay"], group["ess"]),
        fixed=precision is not None,
    )
    made.connect()
    return made


def finish_groups(
    groups: Sequence[Group], settings: Sequence[dict[str, Any]], hess_structure: str, min_precision: float
) -> None:
    """Check the curvature; in the isotropic family, give all groups the same one-number h and damping.

    Raises:
        InputError: the groups do not fit together, or h + delta is not positive.
    """
    first = groups[0]
    if any(g.total.device != first.total.device for g in groups):
        raise InputError("params", "several devices", "put all parameters on one device")
    if hess_structure == "scalar":
        for name in ("ess", "hess_init", "beta2"):
            if len({group[name] for group in settings}) > 1:
                raise InputError(name, "different between groups", "must be the same with hess_structure=scalar")
        total, damping = (
            average([g.total for g in groups], groups),
            average([g.delta for g in groups], groups),
        )
        root, initial = torch.empty_like(total), total - damping
        for g in groups:
            g.total, g.root, g.initial, g.damping = total, root, initial, damping
    for g in groups:
        if g.total.numel() and not g.total.is_meta and not bool(g.total.amin() > 0):
            raise InputError("hess", "not positive definite", "h + delta must be > 0 everywhere")
        g.refresh(min_precision)


def follow(groups: Sequence[Group], settings: Sequence[dict[str, Any]], min_precision: float) -> None:
    """Let delta follow ``weight_decay`` and ``ess`` where the settings changed; h stays.

    Raises:
        InputError: ``weight_decay`` was changed where a prior precision replaces it.
    """
    if all(g.told == (group["weight_decay"], group["ess"]) for g, group in zip(groups, settings, strict=True)):
        return
    deltas = []
    for g, group in zip(groups, settings, strict=True):
        (decay, ess), (old_decay, old_ess) = (group["weight_decay"], group["ess"]), g.told
        if g.fixed and decay != old_decay:
            raise InputError("weight_decay", decay, "cannot be changed where prior_precision replaces it")
        deltas.append(g.delta * (old_ess / ess) if g.fixed else number("weight_decay", decay, at_least=0))
    shared = groups[0].total.dim() == 0
    dampings = [average(deltas, groups)] * len(groups) if shared else deltas
    for g, damping in list(zip(groups, dampings, strict=True))[: 1 if shared else None]:
        g.total.add_(damping - g.damping)
    for g, group, delta, damping in zip(groups, settings, deltas, dampings, strict=True):
        g.delta, g.damping, g.told = delta, damping, (group["weight_decay"], group["ess"])
        g.refresh(min_precision)
        hold(g.total, g.bound)
        torch.rsqrt(g.total, out=g.root)


def average(values: Sequence[float | Tensor], groups: Sequence[Group]) -> Tensor:
    """Mean over all parameters of one number or vector per group, as a tensor of shape ()."""
    like, total = groups[0].flat.vector, sum(g.flat.vector.numel() for g in groups)
    result = torch.zeros((), dtype=like.dtype, device=like.device)
    for value, g in zip(values, groups, strict=True):
        share = g.flat.vector.numel() / total
        if not share:
            continue
        result.add_(value.mean() if isinstance(value, Tensor) else value, alpha=share)
    return result
