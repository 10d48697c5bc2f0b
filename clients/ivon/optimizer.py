"""IVON: a variational Newton optimizer that learns a diagonal (or isotropic) Gaussian posterior.

Written from the equations of Shen et al., "Variational Learning is Effective for Large Deep Networks" (arXiv
2402.17641, Algorithm 1), with the prior and site terms of arXiv 2506.13150: :mod:`clients.ivon.step`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bayesfed.errors import choice, integer, number
from bayesfed.seeding import torch_generator
from clients.flat import FlatParameters, spread
from clients.ivon import fused
from clients.ivon.posterior import IVONPosterior
from clients.ivon.ranks import sum_ranks
from clients.ivon.state import VECTORS, Group, average, build_group, check_group, finish_groups, follow
from clients.ivon.step import draw, hess_step, mean_step
from clients.ivon.step import number as constant
from clients.noise import Noise
from clients.optimizer import trainable


class IVON(IVONPosterior):
    r"""Learn ``q = N(m, 1 / (ess (h + delta)))`` by minimising ``ess E_q[mean loss] + KL(q || prior)``.

    Use::

        with optimizer.sampled_params(train=True):   # repeat for more Monte Carlo samples: their statistics average
            loss = ...                               # MEAN loss of the minibatch, at a sample of q
            loss.backward()
        optimizer.step()

    or ``optimizer.step(closure)``, which draws ``mc_samples`` samples. Outside the context the parameters are the mean
    m. One step, with ``g`` and ``z`` the gradient and the standard normal noise of the sample::

        hhat = sqrt(ess (h + delta)) z g - V                                                   averaged over samples
        mom  = beta1 mom + (1 - beta1) g
        h    = beta2 h + (1 - beta2) hhat + (1 - beta2)^2 (h - hhat)^2 / (2 (h + delta))       old h on the right
        u    = [mom / (1 - beta1^t) + delta (m - prior_mean) + v - V m] / (h + delta)          new h
        m    = m - lr * clip(u, -clip_radius, clip_radius)

    Args:
        params: parameters, or groups of them with own ``lr, ess, hess_init, beta1, beta2, weight_decay, clip_radius``
            and vector arguments. Parameters become views of one vector per group (:mod:`clients.flat`): build the
            optimizer after ``model.to()``, and ``clone()`` what you save of a part of the model.
        lr: learning rate, > 0 (0 allowed).
        ess: effective sample size lambda, > 0: the number of examples (over the temperature).
        hess_init: initial h; ``rescale_lr`` uses it even if ``hess`` is given.
        beta1, beta2: momentum of the gradient, in [0, 1), and of h, in [0, 1].
        weight_decay: delta, the prior precision over ess; replaced by ``prior_precision``.
        mc_samples: samples per step of the closure form.
        hess_approx: ``price`` only. (The squared-gradient form of ivon-opt has another, batch-dependent scale.)
        clip_radius: bound on each entry of u.
        sync: average the statistics over the ranks of torch.distributed; every rank needs its own noise, and its own
            gradient: no DistributedDataParallel, or ``no_sync()`` (the first step raises RuntimeError otherwise).
        debias: divide the momentum by 1 - beta1^t. (h is never debiased.)
        rescale_lr: multiply lr by hess_init + delta, elementwise if delta is a vector.
        prior_mean: a number, a vector over all parameters, or a list of these per group; default 0.
        prior_precision: likewise; then delta = prior_precision / ess.
        site_linear: v, likewise, in units of the mean loss; default 0.
        site_quadratic: V, likewise. A dual or site with natural parameters (v_k, -V_k / 2), which the objective
            *subtracts from the posterior* (Bayesian ADMM: E_q[l_k] / tau + <eta_k, mu> + rho KL), has
            v = tau v_k / N_k and V = tau V_k / N_k; it adds + (v - V m) to the gradient and - V to hhat.
        hess: initial h instead of ``hess_init`` (may be negative as long as h + delta > 0).
        hess_structure: ``diagonal``, or ``scalar``: hhat and delta are averaged over all parameters, so that h + delta
            is one number (the natural gradient in the isotropic family). Groups then share ess, hess_init and beta2.
        min_precision: smallest precision relative to the prior's: h + delta >= min_precision * delta, in [0, 1).
            :meth:`floored` counts the entries held there (docs/method.md 8).
        noise: ``normal`` draws with ``Tensor.normal_``; ``quantile`` is faster on CPUs, see :mod:`clients.noise`.
        antithetic: every second training sample mirrors the one before: terms of odd order in the noise cancel.
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
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: str = "price",
        clip_radius: float = math.inf,
        sync: bool = False,
        debias: bool = True,
        rescale_lr: bool = True,
        *,
        prior_mean: Any = None,
        prior_precision: Any = None,
        site_linear: Any = None,
        site_quadratic: Any = None,
        hess: Any = None,
        hess_structure: Literal["diagonal", "scalar"] = "diagonal",
        min_precision: float = 0.0,
        noise: Literal["quantile", "normal"] = "quantile",
        antithetic: bool = False,
        generator: torch.Generator | None = None,
    ):
        mc_samples = integer("mc_samples", mc_samples, at_least=1)
        choice("hess_approx", hess_approx, ["price"])
        choice("hess_structure", hess_structure, ["diagonal", "scalar"])
        choice("noise", noise, ["quantile", "normal"])
        self.min_precision = min_precision = number("min_precision", min_precision, at_least=0, at_most=1 - 1e-9)
        self.mc_samples, self.sync, self.debias, self.rescale_lr = mc_samples, sync, debias, rescale_lr
        self.hess_structure, self.antithetic = hess_structure, antithetic
        self._groups = []
        self._steps, self._idle = 0, None
        self._built = False
        self._prepare()
        given = (prior_mean, prior_precision, site_linear, site_quadratic, hess)
        names = "lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius"
        super().__init__(
            params, dict(zip(names, (lr, ess, hess_init, beta1, beta2, weight_decay, clip_radius), strict=True))
        )
        flats = [FlatParameters(group["params"], group.get("param_names")) for group in self.param_groups]
        trainable(flats)
        shared = {
            name: [None] * len(flats) if value is None else spread(name, value, flats)
            for name, value in zip(VECTORS, given, strict=True)
        }
        for index, flat in enumerate(flats):
            own = {name: values[index] for name, values in shared.items()}
            self._groups.append(build_group(self.param_groups[index], flat, own))
        self._built = True
        finish_groups(self._groups, self.param_groups, hess_structure, min_precision)
        device = self._groups[0].total.device
        self._deferred = device.type != "cpu" and not sync
        if generator is None and device.type != "meta":
            generator = torch_generator(torch.initial_seed(), "ivon", device=device)
        self.generator = generator
        self._noise = Noise(noise, generator)
        self.native = fused.available() and all(fused.suits(g) for g in self._groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it starts at its own ``hess_init`` with an empty momentum."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        if self._built:
            flat = FlatParameters(group["params"], group.get("param_names"))
            self._groups.append(build_group(group, flat, dict.fromkeys(VECTORS)))
            finish_groups(self._groups, self.param_groups, self.hess_structure, self.min_precision)
            self.native = self.native and fused.suits(self._groups[-1])

    def _draw(self, train: bool) -> None:
        """Show the parameters at a sample; the noise of the first training sample has to outlive the context."""
        follow(self._groups, self.param_groups, self.min_precision)
        for group, g in zip(self.param_groups, self._groups, strict=True):
            noise = g.noise if train and self._samples == 0 else g.work
            scale = group["ess"] ** -0.5
            if self.native and self._noise.kind == "quantile" and not self.antithetic:
                fused.draw(g, noise, scale, self._noise)
            else:
                self._fill(g, noise, train)
                draw(g.flat.vector, g.root, noise, scale, out=g.sample)
            for part in g.flat.frozen:
                noise[part].zero_()
                g.sample[part].copy_(g.flat.vector[part])
            g.flat.show(g.sample_views)

    def _fill(self, g: Group, noise: Tensor, train: bool) -> None:
        """Standard normal noise; every second training sample mirrors the one before if ``antithetic``."""
        if train and g.pair is not None:
            torch.neg(g.pair, out=noise)
            g.pair = None
        else:
            self._noise.fill(noise)
            g.pair = noise.clone() if train and self.antithetic else None

    @property
    def _fused(self) -> bool:
        """Whether a step after a single sample is the C function's."""
        return self.native and not self.sync and not self._deferred

    def _take(self) -> list[Tensor] | None:
        found, taken = False, []
        for g in self._groups:
            if self._samples:
                into = g.extra = torch.empty_like(g.gradient) if g.extra is None else g.extra
            else:
                into = g.gradient
                # the C function uses a lone sample's gradients where autograd left them: one pass over the memory less
                g.pieces = g.flat.release_gradients() if self._fused else None
                if g.pieces is not None:
                    found = True
                    taken += g.pieces
                    continue
            found |= g.flat.take_gradients(into)
            taken.append(into)
        return taken if found else None

    def _finite(self, taken: list[Tensor]) -> bool:
        return fused.finite(taken) if self.native else super()._finite(taken)

    def _add(self) -> None:
        """Add the sample's gradient g and ``z root g`` to the statistics of the step."""
        for g in self._groups if self._samples else ():
            g.gather()
            assert g.extra is not None  # taken
            if self._samples == 1:
                g.noise.mul_(g.gradient)
            g.noise.addcmul_(g.work, g.extra)
            g.gradient.add_(g.extra)

    def _statistics(self) -> list[Tensor]:
        for g in self._groups:
            g.gather()
        return [v for g in self._groups for v in ((g.gradient, g.noise) if self._samples > 1 else (g.gradient,))]

    def _update(self) -> None:
        follow(self._groups, self.param_groups, self.min_precision)
        samples, alive = self._samples, None
        lone = self._fused and samples == 1
        if not lone:
            samples = self._average()
        if not samples:
            return
        self._steps += 1
        steps: int | Tensor = self._steps
        if self._good is not None:
            alive = self._good > 0
            self._idle = ~alive + (0 if self._idle is None else self._idle)
            steps = (self._steps - self._idle).clamp(min=1)
        products = self.sync or self._samples > 1  # else the noise is still z root
        if self.hess_structure == "scalar":
            self._shared_hess_step(products, alive)
        for group, g in zip(self.param_groups, self._groups, strict=True):
            debias = 1 - group["beta1"] ** steps if self.debias else 1.0
            diagonal = (g.total, g.root) if self.hess_structure == "diagonal" else ()
            with g.flat.keeping(g.flat.vector, g.momentum, *diagonal):
                if lone:
                    fused.update(group, g, debias, self.rescale_lr)
                    continue
                if diagonal:
                    factors = g.noise, constant(1.0, g.noise) if products else g.gradient
                    self._hess_step(group, g, *factors, g.slope, g.work, alive)
                self._mean_step(group, g, debias, alive)

    def _average(self) -> int:
        """Turn gradients, and their products with the noise, into averages over the samples; how many there are.

        The noise of a step's only sample stays as it is, unless other ranks' products are added.
        """
        samples = self._samples
        for g in self._groups:
            g.gather()
            if samples == 1 and self.sync:
                g.noise.mul_(g.gradient)
            elif not samples:  # all refused: other ranks go on
                g.noise.zero_(), g.gradient.zero_()
        if self.sync:
            samples = sum_ranks([(g.gradient, g.noise) for g in self._groups], samples, check=self._steps == 0)
        if samples > 1:
            count = samples if self._good is None else self._good.clamp(min=1)
            for g in self._groups:
                g.gradient.div_(count), g.noise.div_(count)
        return samples

    @staticmethod
    def _hess_step(
        group: dict[str, Any], g: Group, first: Tensor, second: Tensor, slope: Any, work: Tensor, alive: Tensor | None
    ) -> None:
        share = 1 - group["beta2"]
        weight = share * math.sqrt(group["ess"])
        hess_step(
            g.total, g.root, first, second, slope, g.bound, weight=weight, share=share, work=work, alive=alive
        )  # fmt: skip

    def _shared_hess_step(self, products: bool, alive: Tensor | None) -> None:
        """The step of the one h of the isotropic family, with hhat averaged over all parameters."""
        g = self._groups[0]
        count = sum(p.numel() for other in self._groups for p in other.flat.parameters if p.requires_grad)
        sums = [other.noise.sum() if products else torch.dot(other.noise, other.gradient) for other in self._groups]
        product = torch.stack(sums).sum().to(g.total.dtype)
        slope = g.damping - average([other.site_quadratic for other in self._groups], self._groups)
        each = constant(1 / count, product)
        self._hess_step(self.param_groups[0], g, product, each, slope, torch.empty_like(g.total), alive)

    def _mean_step(self, group: dict[str, Any], g: Group, debias: float | Tensor, alive: Tensor | None) -> None:
        like = g.flat.vector
        share: float | Tensor = 1 - group["beta1"]
        rate: float | Tensor = -float(group["lr"])
        if self.rescale_lr:
            rate = (group["hess_init"] + g.damping) * rate
        if alive is not None:
            rate, share = (alive * rate).to(like.dtype), (alive * share).to(like.dtype)
        debias = debias.to(like.dtype) if isinstance(debias, Tensor) else debias
        numbers: dict[str, Any] = {"share": share, "debias": debias, "rate": rate, "clip_radius": group["clip_radius"]}
        mean_step(like, g.momentum, g.gradient, g.total, g.slope, g.offset, work=g.sample, **numbers)
