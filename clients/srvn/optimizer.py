"""SRVN: a square-root variational Newton optimizer that learns a Gaussian posterior, full or diagonal.

Written from the equations of Kumar, Möllenhoff, Khan and Lucchi 2025 (arXiv 2507.07853, Algorithm 1), with the prior
and site terms of arXiv 2506.13150.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError, choice, integer, number
from bayesfed.seeding import torch_generator
from clients.flat import FlatParameters
from clients.noise import Noise
from clients.optimizer import PosteriorOptimizer, trainable
from clients.srvn.state import State
from clients.srvn.step import precision_from_factor
from clients.srvn.terms import as_factor, as_vector, derivatives


class SRVN(PosteriorOptimizer):
    r"""Learn ``q = N(m, C C^T)`` by minimising ``ess E_q[mean loss] + E_q[-log prior] - temperature H(q)``.

    Used as :class:`clients.optim.IVON`: the MEAN loss of a minibatch and its ``backward()`` inside
    ``with optimizer.sampled_params(train=True)`` (the statistics of several blocks average), then ``optimizer.step()``;
    or ``optimizer.step(closure)``. Outside the context the parameters are the mean m. One step, with ``g`` and ``H``
    the expected gradient and Hessian of
    ess * (mean loss + v^T theta - theta^T V theta / 2) + S0/2 ||theta - prior_mean||^2::

        A = C^T H C - temperature I
        C = C - lr_covariance C tril[A]              tril: lower triangle, its diagonal halved
        m = m - lr C C^T g                           old C

    No inverse, no solve. Diagonal: c = c - lr_covariance/2 c (c^2 h - temperature). In the paper both rates are one,
    rho; near the optimum errors of mean and covariance shrink by exactly 1 - rho a step, however badly conditioned the
    problem is.

    Memory P + P^2 numbers and O(P^3) a step for ``full``; 4P and O(P) for ``diagonal``.

    Args:
        params: parameters, in one group. They become views of one vector (:class:`clients.flat.FlatParameters`), so
            build the optimizer after ``model.to()``.
        lr: rate of the mean, relative to Newton's step, >= 0.
        ess: effective sample size, > 0: the number of examples (over the temperature of a tempered likelihood).
        covariance: ``diagonal`` or ``full``.
        curvature: ``stein``: from gradients alone, C^T H C = E[noise grad^T] C; noisy, so lr_covariance should be
            small. ``hessian``: E_q of the loss' Hessian (Price's theorem), P backward passes a sample;
            ``step(closure)`` only, whose closure returns the loss without calling backward.
        mc_samples: samples per step of the closure form; 0 (``hessian`` only) takes gradient and Hessian at the mean.
        lr_covariance: rate of the covariance, >= 0; default lr.
        beta1: momentum of the mean loss' gradient, in [0, 1), debiased; 0 as in the paper.
        temperature: gamma > 0, weight of the entropy; 1 gives the posterior.
        init_precision: of q, > 0: a number, (P,), or for ``full`` (P, P); default ess + prior_precision. Start with too
            small a covariance rather than too large a one.
        prior_mean: a number or (P,), default 0.
        prior_precision: S0 >= 0, a number, (P,), or for ``full`` (P, P).
        site_linear: v, a number or (P,), in units of the mean loss, default 0.
        site_quadratic: V, like prior_precision but of any sign, in units of the mean loss, default 0. A dual with
            natural parameters (v_k, -V_k/2) (Bayesian ADMM) has v = tau v_k/N_k, V = tau V_k/N_k.
        on_breakdown: what to do about a step that is too long for the curvature (see :func:`clients.optim.srvn_step`):
            ``shrink`` reduces both rates, per coordinate if diagonal, so that no diagonal entry of C falls by more than
            the fraction ``max_change`` (counted in ``reductions``); ``raise`` raises ValueError once one would not stay
            positive.
        max_change: in (0, 1).
        min_precision: for ``diagonal``: smallest precision relative to the prior's, in [0, 1). Expected Hessians are
            indefinite, and c would then grow without end.
        antithetic: take every second training sample at the mirror image of the one before. With both in one step
            (mc_samples=2), ``stein`` is free of the noise of the gradient at the mean (data against prior or sites).
        noise: ``normal`` or ``quantile``, see :mod:`clients.noise`.
        generator: source of the noise, on the parameters' device. Default: one keyed by ``torch.initial_seed()``.

    Raises:
        InputError: an argument is out of range, naming it.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        params: Any,
        lr: float,
        ess: float,
        covariance: str = "diagonal",
        curvature: str = "stein",
        mc_samples: int = 1,
        *,
        lr_covariance: float | None = None,
        beta1: float = 0.0,
        temperature: float = 1.0,
        init_precision: Any = None,
        prior_mean: Any = 0.0,
        prior_precision: Any = 1.0,
        site_linear: Any = 0.0,
        site_quadratic: Any = 0.0,
        on_breakdown: str = "shrink",
        max_change: float = 0.5,
        min_precision: float = 0.0,
        antithetic: bool = False,
        noise: str = "normal",
        generator: torch.Generator | None = None,
    ):
        choice("covariance", covariance, ("diagonal", "full"))
        choice("curvature", curvature, ("stein", "hessian"))
        choice("on_breakdown", on_breakdown, ("shrink", "raise"))
        choice("noise", noise, ("normal", "quantile"))
        lr = number("lr", lr, at_least=0)
        lr_covariance = number("lr_covariance", lr_covariance, at_least=0, optional=True)
        mc_samples = integer("mc_samples", mc_samples, at_least=0 if curvature == "hessian" else 1)
        self._prepare()
        super().__init__(params, {"lr": lr, "lr_covariance": lr_covariance})
        group = self.param_groups[0]
        self._flat = FlatParameters(group["params"], group.get("param_names"))
        trainable([self._flat])
        self.curvature, self.mc_samples, self.antithetic = curvature, mc_samples, antithetic
        self._state = State(
            self._flat, covariance == "full", curvature == "hessian", ess=ess, beta1=beta1, temperature=temperature,
            init_precision=init_precision, prior_mean=prior_mean, prior_precision=prior_precision,
            site_linear=site_linear, site_quadratic=site_quadratic,
            max_change=max_change if on_breakdown == "shrink" else None, min_precision=min_precision,
        )  # fmt: skip
        self._sample = torch.empty_like(self._flat.vector)
        self._drawn = self._slope = self._state.work  # noise and gradient of the block's sample
        self._connect()
        self._pair: Tensor | None = None
        self.generator = generator or torch_generator(torch.initial_seed(), "srvn", device=self._flat.vector.device)
        self._noise = Noise(noise, self.generator)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Used by the constructor; the covariance is that of one group."""
        if self.param_groups:
            raise InputError("params", "a further group", "put all parameters into one group")
        super().add_param_group(param_group)

    @property
    def vector(self) -> Tensor:
        """The mean m (P,): the parameters' own memory."""
        return self._flat.vector

    @property
    def factor(self) -> Tensor:
        """C, (P, P) or (P,) if diagonal."""
        return self._state.factor

    @property
    def reductions(self) -> int:
        """How many steps were shortened, see ``on_breakdown``."""
        return self._state.reductions

    # -- sampling -----------------------------------------------------------------------------------------------------

    @property
    def _flats(self) -> list[FlatParameters]:
        return [self._flat]

    def _draw(self, train: bool) -> None:
        if train and self.curvature == "hessian":
            raise RuntimeError("curvature='hessian' differentiates the loss itself: use optimizer.step(closure)")
        noise = self._sample_noise(train)
        self._show(noise)
        if train:
            self._drawn = noise

    @torch.no_grad()
    def _sample_noise(self, train: bool) -> Tensor:
        """Standard normal noise (P,)."""
        if train and self._pair is not None:
            noise, self._pair = -self._pair, None
            return noise
        noise = self._noise.fill(torch.empty_like(self.vector))
        if train and self.antithetic:
            self._pair = noise.clone() if self._flat.frozen else noise
        return noise

    def _show(self, noise: Tensor | None) -> None:
        """The parameters at m + C noise (``None``: at the mean)."""
        flat = self._flat
        if flat.frozen and (self.factor.ndim == 2 or self.curvature == "hessian"):
            raise RuntimeError(
                "a parameter was frozen: covariance=full and curvature=hessian need all it was built with"
            )
        if noise is not None:
            for part in flat.frozen:
                noise[part].zero_()
            add = torch.addcmul if self.factor.ndim == 1 else torch.addmv
            add(flat.vector, self.factor, noise, out=self._sample)
            flat.show(self._sample_views)

    def _take(self) -> list[Tensor] | None:
        self._slope = self._state.gradient if self._samples == 0 else self._state.work
        return [self._slope] if self._flat.take_gradients(self._slope) else None

    def _add(self) -> None:
        self._state.add(self._drawn, self._slope, first=self._samples == 0)

    def _statistics(self) -> list[Tensor]:
        return [self._state.gradient, self._state.products]

    def _connect(self) -> None:
        self._sample_views = self._flat.split(self._sample)

    def _differentiate(self, closure: Callable[[], Tensor], noise: Tensor | None) -> Tensor:
        """Add gradient and Hessian of the loss at a sample to the statistics of the step; returns the loss."""
        with self._block(lambda: self._show(noise), train=False), torch.enable_grad():
            loss = closure()
            found = derivatives(loss, self._flat.parameters, full=self._state.full)
        if self._finite(list(found)):
            self._state.add_derivatives(*found, first=self._samples == 0)
            self._samples += 1
        else:
            self._refuse()
        return loss.detach()

    def _evaluate(self, closure: Callable[[], Tensor]) -> Tensor | None:
        if self.curvature == "stein":
            return super()._evaluate(closure)
        draws = [self._sample_noise(True) if self.mc_samples else None for _ in range(max(self.mc_samples, 1))]
        return torch.stack([self._differentiate(closure, noise) for noise in draws]).mean()

    # -- the step -----------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        lr, lr_covariance = self.param_groups[0]["lr"], self.param_groups[0]["lr_covariance"]
        self._state.step(self._samples, float(lr), float(lr if lr_covariance is None else lr_covariance))

    # -- the posterior ------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """The mean of q, (P,), a copy."""
        self._attach()
        return self.vector.clone()

    @property
    def covariance(self) -> Tensor:
        """C C^T, (P, P), or c^2, (P,)."""
        return self.factor**2 if self.factor.ndim == 1 else self.factor @ self.factor.mT

    @property
    def precision(self) -> Tensor:
        """The inverse of the covariance, (P, P) or (P,)."""
        return precision_from_factor(self.factor)

    @property
    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and precision of q: what :class:`bayesfed.families.FullGaussian` or ``DiagonalGaussian`` are made of."""
        return self.mean, self.precision

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_posterior(self, mean: Any = None, precision: Any = None, reset: bool = True) -> None:
        """Continue from another Gaussian.

        Args:
            mean: a number or (P,); ``None`` keeps the parameters.
            precision: like ``init_precision``; ``None`` keeps the covariance.
            reset: forget the momentum.

        Raises:
            InputError: wrong size, not finite, or not positive.
        """
        if self._inside:
            raise RuntimeError("set_posterior() cannot be called inside sampled_params()")
        if mean is not None:
            self._flat.attach()
            self.vector.copy_(as_vector("mean", mean, self._flat))
        if precision is not None:
            self._state.factor = as_factor("precision", precision, self._flat, self._state.full)
        self._forget()
        self._pair = None
        if reset:
            self._state.forget()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters (the mean) that the next step depends on, the noise stream included.

        Take it between steps: samples collected for an unfinished step are not in it.
        """
        own = self._state.saved() | {"_pair": self._pair, "generator": self.generator.get_state()}
        return {**super().state_dict(), "srvn": own}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the parameters have to be restored with the model.

        Raises:
            ValueError: it is a state of another optimizer, or the sizes do not match.
        """
        own = self._own(state_dict, "srvn")
        if own["factor"].shape != self.factor.shape:
            raise ValueError(f"the saved factor has shape {tuple(own['factor'].shape)}, not {tuple(self.factor.shape)}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "srvn"})
        self.generator.set_state(own["generator"].cpu())
        self._state.load(own)
        self._pair = None if own["_pair"] is None else own["_pair"].to(self.factor, copy=True)
        self._forget()
