"""SRVN: a square-root variational Newton optimizer that learns a Gaussian posterior, full or diagonal.

Written from the equations of Kumar, Möllenhoff, Khan and Lucchi 2025 (arXiv 2507.07853, Algorithm 1), with the prior and site
terms of arXiv 2506.13150.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError, choice, integer, number
from bayesfed.seeding import torch_generator
from clients.optim.flat import FlatParameters, mean_loss
from clients.optim.noise import Noise
from clients.optim.srvn_terms import add_derivatives, as_factor, as_quadratic, as_vector, times
from clients.optim.srvn_update import factor_step, precision_from_factor, precondition, step_limit, whiten


class SRVN(torch.optim.Optimizer):
    r"""Learn ``q = N(m, C C^T)`` by minimising ``ess E_q[mean loss] + E_q[-log prior] - temperature H(q)``.

    Use, as with :class:`clients.optim.IVON`::

        with optimizer.sampled_params(train=True):   # repeat for more Monte Carlo samples: their statistics average
            loss = ...                               # MEAN loss of the minibatch, at a sample of q
            loss.backward()
        optimizer.step()

    or ``optimizer.step(closure)``. Outside the context the parameters are the mean m. One step, with ``g`` and ``H`` the
    expected gradient and Hessian of ess * (mean loss + v^T theta - theta^T V theta / 2) + S0/2 ||theta - prior_mean||^2::

        A = C^T H C - temperature I
        C = C - lr_covariance C tril[A]              tril: lower triangle, its diagonal halved
        m = m - lr C C^T g                           old C

    No inverse, no solve. Diagonal: c = c - lr_covariance/2 c (c^2 h - temperature). In the paper both rates are one, rho; near the
    optimum errors of mean and covariance shrink by exactly 1 - rho a step, however badly conditioned the problem is.

    Memory P + P^2 numbers and O(P^3) a step for ``full``; 4P and O(P) for ``diagonal``.

    Args:
        params: parameters, in one group. They become views of one vector (:class:`clients.optim.flat.FlatParameters`), so build
            the optimizer after ``model.to()``.
        lr: rate of the mean, relative to Newton's step, >= 0.
        ess: effective sample size, > 0: the number of examples (over the temperature of a tempered likelihood).
        covariance: ``diagonal`` or ``full``.
        curvature: ``stein``: from gradients alone, C^T H C = E[noise grad^T] C; noisy, so lr_covariance should be small.
            ``hessian``: E_q of the loss' Hessian (Price's theorem), P backward passes a sample; ``step(closure)`` only, whose
            closure returns the loss without calling backward.
        mc_samples: samples per step of the closure form; 0 (``hessian`` only) takes gradient and Hessian at the mean.
        lr_covariance: rate of the covariance, >= 0; default lr.
        beta1: momentum of the mean loss' gradient, in [0, 1), debiased; 0 as in the paper.
        temperature: gamma > 0, weight of the entropy; 1 gives the posterior.
        init_precision: of q, > 0: a number, (P,), or for ``full`` (P, P); default ess + prior_precision. Start with too small a
            covariance rather than too large a one.
        prior_mean: a number or (P,), default 0.
        prior_precision: S0 >= 0, a number, (P,), or for ``full`` (P, P).
        site_linear: v, a number or (P,), in units of the mean loss, default 0.
        site_quadratic: V, like prior_precision but of any sign, in units of the mean loss, default 0. A dual with natural
            parameters (v_k, -V_k/2) (Bayesian ADMM) has v = tau v_k/N_k, V = tau V_k/N_k.
        on_breakdown: what to do about a step that is too long for the curvature (see :func:`clients.optim.srvn_step`): ``shrink``
            reduces both rates, per coordinate if diagonal, so that no diagonal entry of C falls by more than the fraction
            ``max_change`` (counted in ``reductions``); ``raise`` raises ValueError once one would not stay positive.
        max_change: in (0, 1).
        min_precision: for ``diagonal``: smallest precision relative to the prior's, in [0, 1). Expected Hessians are
            indefinite, and c would then grow without end.
        antithetic: take every second training sample at the mirror image of the one before. With both in one step
            (mc_samples=2), ``stein`` is free of the noise that the gradient at the mean brings (data against prior or sites).
        noise: ``normal`` or ``quantile``, see :mod:`clients.optim.noise`.
        generator: source of the noise, on the parameters' device. Default: one keyed by ``torch.initial_seed()``.

    Raises:
        InputError: an argument is out of range, naming it.
    """

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
        number("lr", lr, at_least=0)
        number("lr_covariance", lr_covariance, at_least=0, optional=True)
        number("ess", ess, above=0)
        number("temperature", temperature, above=0)
        number("max_change", max_change, above=0, at_most=1 - 1e-9)
        number("beta1", beta1, at_least=0, at_most=1 - 1e-9)
        number("min_precision", min_precision, at_least=0, at_most=1 - 1e-9)
        integer("mc_samples", mc_samples, at_least=0 if curvature == "hessian" else 1)
        if covariance == "full" and min_precision > 0:
            raise InputError("min_precision", min_precision, "must be 0 with covariance=full")
        self._flat: FlatParameters | None = None
        super().__init__(params, {"lr": lr, "lr_covariance": lr_covariance})
        self._flat = FlatParameters(self.param_groups[0]["params"])
        if len(self.param_groups) > 1:
            raise InputError("params", f"{len(self.param_groups)} groups", "put all parameters into one group")
        self.ess, self.covariance_kind, self.curvature, self.mc_samples = ess, covariance, curvature, mc_samples
        self.beta1, self.temperature, self.antithetic = beta1, temperature, antithetic
        self.on_breakdown, self.max_change, self.min_precision = on_breakdown, max_change, min_precision

        full, flat = covariance == "full", self._flat
        prior = as_quadratic("prior_precision", prior_precision, flat, full)
        self._anchor = prior - ess * as_quadratic("site_quadratic", site_quadratic, flat, full)
        pull = times(prior, as_vector("prior_mean", prior_mean, flat))
        self._offset = pull - ess * as_vector("site_linear", site_linear, flat)
        if init_precision is None:
            init_precision = prior + as_quadratic("ess", ess, flat, full)
        self.factor = as_factor("init_precision", init_precision, flat, full)
        self._largest = (min_precision * prior).rsqrt() if min_precision else None
        self._momentum = torch.zeros_like(self._flat.vector) if beta1 else None
        self._steps = self._samples = self.reductions = 0
        self._inside = False
        self._gradient = torch.zeros_like(self._flat.vector)  # sum over samples, once there are any
        self._products = torch.zeros_like(self.factor)  # of noise * gradient, or of Hessians, likewise
        self._sample, self._work = torch.empty_like(self._flat.vector), torch.empty_like(self._flat.vector)
        self._sample_views = self._flat.split(self._sample)
        self._pair: Tensor | None = None
        if generator is None:
            generator = torch_generator(torch.initial_seed(), "srvn", device=self._flat.vector.device)
        self.generator = generator
        self._noise = Noise(noise, generator)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Used by the constructor; the covariance is that of one group."""
        if self._flat is not None:
            raise InputError("params", "a further group", "put all parameters into one group")
        super().add_param_group(param_group)

    @property
    def vector(self) -> Tensor:
        """The mean m (P,): the parameters' own memory."""
        assert self._flat is not None
        return self._flat.vector

    # -- sampling -----------------------------------------------------------------------------------------------------

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Put a sample of q into the parameters; on leaving, the mean is back bit for bit.

        Args:
            train: collect the gradient of the block for :meth:`step`; gradients from before the block are cleared.

        Raises:
            RuntimeError: the contexts are nested, or ``train`` with ``curvature="hessian"``. After an exception in the block,
                everything collected since the last step is dropped.
        """
        if train and self.curvature == "hessian":
            raise RuntimeError("curvature='hessian' differentiates the loss itself: use optimizer.step(closure)")
        noise = self._draw(train)
        with self._at(noise):
            if train:
                self._flat.clear_gradients()  # type: ignore[union-attr]
            yield
            if train:
                self._collect(noise)

    @torch.no_grad()
    def _draw(self, train: bool) -> Tensor:
        """Standard normal noise (P,)."""
        if train and self._pair is not None:
            noise, self._pair = -self._pair, None
            return noise
        noise = self._noise.fill(torch.empty_like(self.vector))
        if train and self.antithetic:
            self._pair = noise
        return noise

    @contextmanager
    def _at(self, noise: Tensor | None) -> Iterator[None]:
        """The parameters at m + C noise (``None``: at the mean) inside the block."""
        flat = self._flat
        assert flat is not None
        if self._inside:
            raise RuntimeError("sampled_params() cannot be nested")
        self._inside = True
        try:
            flat.attach()
            if noise is not None:
                with torch.no_grad():
                    add = torch.addcmul if self.factor.ndim == 1 else torch.addmv
                    add(flat.vector, self.factor, noise, out=self._sample)
                flat.show(self._sample_views)
            yield
        except BaseException:
            self._samples = 0
            flat.clear_gradients()
            raise
        finally:
            flat.show(flat.views)
            self._inside = False

    @torch.no_grad()
    def _collect(self, noise: Tensor) -> None:
        """Add a sample's gradient and its product with the noise to the statistics of the step."""
        first = self._samples == 0
        gradient = self._gradient if first else self._work
        if not self._flat.take_gradients(gradient):  # type: ignore[union-attr]
            raise RuntimeError("no parameter got a gradient: call loss.backward() inside sampled_params(train=True)")
        if not first:
            self._gradient += gradient
        if self.factor.ndim == 1:
            torch.mul(noise, gradient, out=self._products) if first else self._products.addcmul_(noise, gradient)
        else:
            torch.outer(noise, gradient, out=self._products) if first else self._products.addr_(noise, gradient)
        self._samples += 1

    def _differentiate(self, closure: Callable[[], Tensor], noise: Tensor | None) -> Tensor:
        """Add gradient and Hessian of the loss at a sample to the statistics of the step; returns the loss."""
        if self._samples == 0:
            self._gradient.zero_(), self._products.zero_()
        with self._at(noise), torch.enable_grad():
            loss = closure()
            add_derivatives(loss, self._flat.parameters, self._gradient, self._products)  # type: ignore[union-attr]
        self._samples += 1
        return loss.detach()

    def _evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        """Collect the samples of a step through the closure; its mean loss over them."""
        if self.curvature == "stein":
            return mean_loss(self, closure)
        draws = [self._draw(True) if self.mc_samples else None for _ in range(max(self.mc_samples, 1))]
        return torch.stack([self._differentiate(closure, noise) for noise in draws]).mean()

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update the posterior from the samples collected since the last step.

        Args:
            closure: returns the mean loss; called ``mc_samples`` times at samples of q. With ``curvature="stein"`` it calls
                ``backward`` too.

        Returns:
            The loss averaged over the closure's samples, if there is a closure.

        Raises:
            RuntimeError: nothing was collected.
            ValueError: breakdown, with ``on_breakdown="raise"``; the posterior is left as it was.
        """
        loss = None if closure is None else self._evaluate(closure)
        if self._samples == 0 or self._inside:
            raise RuntimeError("step() must follow a completed `with optimizer.sampled_params(train=True):` block")
        self._steps += 1
        gradient, scale, self._samples = self._gradient, self.ess / self._samples, 0
        if self._momentum is not None:
            self._momentum.lerp_(gradient.mul_(scale), 1 - self.beta1)
            torch.div(self._momentum, 1 - self.beta1**self._steps, out=gradient)
        else:
            gradient.mul_(scale)
        group = self.param_groups[0]
        lr = float(group["lr"])
        rates = lr, lr if group["lr_covariance"] is None else float(group["lr_covariance"])
        update = self._update_diagonal if self.factor.ndim == 1 else self._update_full
        update(gradient, scale, *rates)
        return loss

    def _update_full(self, gradient: Tensor, scale: float, lr: float, lr_covariance: float) -> None:
        """The step from the data's expected gradient and ``scale`` times the statistics; prior and sites enter exactly."""
        factor, products = self.factor, scale * self._products
        if self.curvature == "hessian":
            white = whiten(factor, products + self._anchor)
        else:
            products = products @ factor
            white = 0.5 * (products + products.mT) + whiten(factor, self._anchor)
        if self.on_breakdown == "shrink":
            short = min(1.0, float(step_limit(white, self.temperature, self.max_change)) / max(lr_covariance, 1e-30))
            self.reductions += short < 1
            lr, lr_covariance = lr * short, lr_covariance * short
        slope = gradient + self._anchor @ self.vector - self._offset
        self.factor = factor_step(factor, white, lr_covariance, self.temperature)
        self.vector.sub_(precondition(factor, slope), alpha=lr)

    def _update_diagonal(self, gradient: Tensor, scale: float, lr: float, lr_covariance: float) -> None:
        """The same elementwise and in place: on networks new memory costs more than arithmetic."""
        factor, variance, white = self.factor, self._work, self._products
        torch.mul(factor, factor, out=variance)
        if self.curvature == "hessian":
            white.mul_(scale).add_(self._anchor).mul_(variance)
        else:
            white.mul_(factor).mul_(scale).addcmul_(variance, self._anchor)
        fall = white.sub_(self.temperature).mul_(0.5 * lr_covariance)  # c becomes c (1 - fall)
        gradient.addcmul_(self._anchor, self.vector).sub_(self._offset).mul_(variance)
        largest = float(fall.max())
        if self.on_breakdown == "shrink" and largest > self.max_change:
            gradient.mul_(self.max_change / fall.clamp_min(self.max_change))
            fall.clamp_(max=self.max_change)
            self.reductions += 1
        elif not largest < 1:
            limit = lr_covariance / largest
            raise ValueError(f"SR-VN broke down: lr_covariance={lr_covariance:g} must be below {limit:.4g} here")
        self.vector.sub_(gradient, alpha=lr)
        factor.mul_(fall.neg_().add_(1))
        if self._largest is not None:
            torch.minimum(factor, self._largest, out=factor)

    # -- the posterior ------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """The mean of q, (P,), a copy."""
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
            self._flat.attach()  # type: ignore[union-attr]
            self.vector.copy_(as_vector("mean", mean, self._flat))  # type: ignore[arg-type]
        if precision is not None:
            full = self.covariance_kind == "full"
            self.factor = as_factor("precision", precision, self._flat, full)  # type: ignore[arg-type]
        self._samples, self._pair = 0, None
        if reset:
            self._steps = 0
            if self._momentum is not None:
                self._momentum.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters (the mean) that the next step depends on, the noise stream included.

        Take it between steps: samples collected for an unfinished step are not in it.
        """
        own = {name: getattr(self, name) for name in ("factor", "_momentum", "_anchor", "_offset", "_pair")}
        own |= {"_largest": self._largest, "_steps": self._steps, "reductions": self.reductions}
        return {**super().state_dict(), "srvn": own | {"generator": self.generator.get_state()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the parameters have to be restored with the model.

        Raises:
            ValueError: the sizes do not match.
        """
        own = dict(state_dict["srvn"])
        if own["factor"].shape != self.factor.shape:
            raise ValueError(
                f"the saved factor has shape {tuple(own['factor'].shape)}, this one {tuple(self.factor.shape)}"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "srvn"})
        self.generator.set_state(own.pop("generator").cpu())
        for name, value in own.items():
            setattr(self, name, value.to(self.factor, copy=True) if isinstance(value, Tensor) else value)
        self._samples = 0
