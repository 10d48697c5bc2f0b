"""LMD: log-normal multiplicative dynamics, an optimizer that learns log-normal posteriors.

After Nishida, Kiral, Bannai, Khan, Möllenhoff, "Log-Normal Multiplicative Dynamics" (arXiv 2506.17768). Its text could
not be read when this was written: the form of the update follows reviews of it, constants and the derivation are ours
(docs/learners_lmd.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError, choice, integer, number
from bayesfed.families import LogNormal
from bayesfed.seeding import torch_generator
from clients.flat import FlatParameters
from clients.lmd.state import Additive, Multiplicative
from clients.lmd.step import REGULARISERS
from clients.noise import Noise
from clients.optimizer import COPIED, PosteriorOptimizer, trainable


class LMD(PosteriorOptimizer):
    r"""Learn ``w = u - v``, ``u = m+ exp(sigma xi+)``, ``v = m- exp(sigma xi-)``: medians m > 0 that move by factors.

    Use::

        with optimizer.sampled_params(train=True):   # repeat for more Monte Carlo samples: their statistics average
            loss = ...                               # MEAN loss of the minibatch, at a sample
            loss.backward()
        optimizer.step()

    or ``optimizer.step(closure)``, which draws ``mc_samples`` samples. A loop without either (``loss.backward()``,
    ``optimizer.step()``) works too: its gradient is taken at the mean, without noise. Outside the context the
    parameters are ``E[w] = (m+ - m-) e^(sigma^2/2)``.
    One step, with the gradient g of a sample, elementwise for both parts (``z = log m``)::

        G+ = u g,  G- = -v g                                         averaged over samples
        D  = beta1 M + (1 - beta1) G + prior_precision (z - prior_log_median) + site_linear - site_quadratic z
        z  = z - lr [ sign(D) + R(m) - temperature ]                 R: weight-scaled decay, outside sign and momentum
        M  = beta2 M + (1 - beta2) G

    With ``signed=False`` the sign is dropped and ``- temperature``, the gradient of the entropy, belongs to G: with
    ``beta1 = beta2`` this is the Lie-group rule (arXiv 2303.04397) with log-normal noise, whose fixed point is that of
    ``E[loss] - temperature H(q)``.

    ``R`` by ``regulariser`` (u stands for either part; a persistent gradient sign drives it up to where R = 1)::

        l1          decay E[u]                       exponential prior; caps E[u] at 1/decay
        l2          decay E[u^2]                     half-Gaussian prior; caps E[u^2] at 1/decay
        weight      decay E[u w], decay E[-v w]      decay/2 E[w^2]
        lognormal   decay (log m - log prior_median) log-normal prior of variance 1/decay, entropy at temperature 1

    Without decay medians grow without bound, and low-precision forward passes break down.

    Args:
        params: parameters, or groups of them with own values of all numbers below. They become views of one vector per
            group (see :class:`clients.flat.FlatParameters`), so build the optimizer after ``model.to()``. Their values
            are the initial E[w]; values loaded into the model or edited later are split anew, with the momentum kept.
        lr: > 0 (0 allowed): a signed step moves a median by at most the factor ``exp(lr)``, so doubling takes
            ``0.69/lr`` steps.
        sigma: standard deviation of log u, >= 0 (0: no noise).
        beta1, beta2: decay of the momentum in the update and in the memory, in [0, 1).
        decay: strength of R, >= 0.
        regulariser: see above.
        temperature: weight of the entropy, >= 0.
        prior_median: of ``regulariser="lognormal"``, > 0.
        offset: E of the smaller part at the start, > 0; None is half the standard deviation of each tensor, 0.05 for
            constant ones.
        signed: see above.
        multiplicative: False (for a group) treats its parameters as ordinary weights with sign momentum and decoupled
            decay, ``w = w - lr [sign(D) + decay w]``, without noise.
        mc_samples: samples per step of the closure form.
        weights: what the parameters are outside the context: ``mean``, or ``median`` = m+ - m-.
        noise: ``normal`` or ``quantile`` (faster on CPUs), see :mod:`clients.noise`.
        prior_log_median, prior_precision, site_linear, site_quadratic: terms of a federated objective in the
            logarithms, in units of the mean loss: (2, P) for all multiplicative parameters, and numbers.
        generator: source of the noise, on the parameters' device. Default: one keyed by ``torch.initial_seed()``.

    State: log-medians and momenta, (2, P) each, float32 or wider.

    Raises:
        InputError: an argument is out of range, naming it.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        sigma: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99,
        decay: float = 0.1,
        regulariser: str = "l1",
        temperature: float = 0.0,
        prior_median: float = 1.0,
        offset: float | None = None,
        signed: bool = True,
        multiplicative: bool = True,
        mc_samples: int = 1,
        weights: str = "mean",
        noise: str = "quantile",
        *,
        prior_log_median: Tensor | None = None,
        prior_precision: float = 0.0,
        site_linear: Tensor | None = None,
        site_quadratic: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        mc_samples = integer("mc_samples", mc_samples, at_least=1)
        choice("weights", weights, ("mean", "median"))
        choice("noise", noise, ("quantile", "normal"))
        prior_precision = number("prior_precision", prior_precision, at_least=0)
        site_quadratic = number("site_quadratic", site_quadratic)
        if prior_precision and prior_log_median is None:
            raise InputError("prior_log_median", None, "is needed with prior_precision")
        self.mc_samples, self.weights = mc_samples, weights
        self._groups: list[Multiplicative | Additive] = []
        self._prepare()
        defaults = {
            "lr": lr, "sigma": sigma, "beta1": beta1, "beta2": beta2, "decay": decay, "regulariser": regulariser,
            "temperature": temperature, "prior_median": prior_median, "offset": offset, "signed": signed,
            "multiplicative": multiplicative,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._pull(prior_log_median, prior_precision, site_linear, site_quadratic)
        trainable(self._flats)
        device = self.param_groups[0]["params"][0].device
        self._deferred = device.type != "cpu"
        self.generator = generator or torch_generator(torch.initial_seed(), "lmd", device=device)
        self._noise = Noise(noise, self.generator)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it starts at its own values with an empty momentum."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["lr"] = number("lr", group["lr"], at_least=0)
        group["sigma"] = number("sigma", group["sigma"], at_least=0)
        group["beta1"] = number("beta1", group["beta1"], at_least=0, at_most=1 - 1e-12)
        group["beta2"] = number("beta2", group["beta2"], at_least=0, at_most=1 - 1e-12)
        group["decay"] = number("decay", group["decay"], at_least=0)
        choice("regulariser", group["regulariser"], (*REGULARISERS, "lognormal"))
        group["temperature"] = number("temperature", group["temperature"], at_least=0)
        group["prior_median"] = number("prior_median", group["prior_median"], above=0)
        group["offset"] = number("offset", group["offset"], above=0, optional=True)
        if group["regulariser"] == "lognormal" and group["temperature"]:
            raise InputError(
                "temperature", group["temperature"], "must be 0 with regulariser=lognormal, which includes it"
            )
        flat = FlatParameters(group["params"], group.get("param_names"))
        kind = Multiplicative if group["multiplicative"] else Additive
        self._groups.append(kind(group, flat, self.state[_key(group, flat)], self.weights))

    def _pull(self, median: Tensor | None, precision: float, linear: Tensor | None, quadratic: float) -> None:
        """Hand every multiplicative group its columns of the federated terms, as ``constant + slope z``."""
        groups = [g for g in self._groups if isinstance(g, Multiplicative)]
        sizes = [g.flat.vector.numel() for g in groups]
        for name, value in (("prior_log_median", median), ("site_linear", linear)):
            if value is not None and tuple(value.shape) != (2, sum(sizes)):
                raise InputError(name, f"shape {tuple(value.shape)}", f"must have shape (2, {sum(sizes)})")
        if median is None and linear is None and not quadratic:
            return
        constant = torch.zeros(2, sum(sizes), dtype=torch.float64, device=groups[0].flat.vector.device)
        if median is not None:
            constant.sub_(median, alpha=precision)
        if linear is not None:
            constant.add_(linear)
        for g, columns in zip(groups, constant.split(sizes, 1), strict=True):
            g.pull = columns.to(g.log_median.dtype), precision - quadratic

    @property
    def _flats(self) -> list[FlatParameters]:
        return [g.flat for g in self._groups]

    def _draw(self, train: bool) -> None:
        for g in self._groups:
            g.follow()
            g.draw(self._noise)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _follow(self) -> None:
        """Take over weights that were loaded or edited since the last step."""
        for g in self._groups if not self._inside else ():
            g.flat.attach()
            g.follow()

    def _attach(self) -> None:
        for g in self._groups:
            if g.flat.attach():
                g.follow()

    def _take(self) -> list[Tensor] | None:
        found = [g.take() for g in self._groups]
        return [g.slope for g in self._groups] if any(found) else None

    def _add(self) -> None:
        for g in self._groups:
            g.add(first=self._samples == 0)

    def _statistics(self) -> list[Tensor]:
        return [g.gradient for g in self._groups]

    def _connect(self) -> None:
        for g in self._groups:
            g.connect()

    def _without_samples(self, found: bool) -> None:
        """The gradient at the mean."""
        self._follow()
        for g in self._groups if found else ():
            g.flat.look()
            g.stay()
        if not found or not self._collect():
            raise RuntimeError(
                f"no parameter got a gradient: call loss.backward() first, inside sampled_params(train=True) ({COPIED})"
            )

    def _update(self) -> None:
        for g in self._groups:
            g.step(self._samples, self._good)

    # -- the posterior --------------------------------------------------------------------------------------------

    @property
    def log_median(self) -> Tensor:
        """Logarithms of (m+, m-) of all multiplicative parameters, (2, P), a copy."""
        self._follow()
        return torch.cat([g.log_median for g in self._groups if isinstance(g, Multiplicative)], 1)

    @property
    def mean(self) -> Tensor:
        """E[w] of all parameters, (P,), a copy."""
        self._follow()
        return torch.cat([g.mean() for g in self._groups])

    @property
    def posterior(self) -> LogNormal:
        """The posterior of all parameters, if they are multiplicative and share ``sigma`` > 0.

        Raises:
            ValueError: they do not.
        """
        sigmas = {group["sigma"] if group["multiplicative"] else 0.0 for group in self.param_groups}
        if len(sigmas) > 1 or 0.0 in sigmas:
            raise ValueError(f"a log-normal posterior has one sigma > 0 for all parameters, here {sorted(sigmas)}")
        log_median = self.log_median.flatten()
        return LogNormal.from_log_median(log_median, log_median.new_tensor(sigmas.pop() ** -2))

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_log_median(self, log_median: Tensor, reset: bool = True) -> None:
        """Continue from medians, (2, P) or (2P,) over all multiplicative parameters; ``reset``: forget momenta."""
        groups = [g for g in self._groups if isinstance(g, Multiplicative)]
        sizes = [g.flat.vector.numel() for g in groups]
        for g, columns in zip(groups, log_median.view(2, -1).split(sizes, 1), strict=True):
            g.log_median.copy_(columns)
            if reset:
                g.momentum.zero_()
            g.refresh()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer with that of its noise; the parameters follow from it."""
        self._follow()
        return {**super().state_dict(), "generator": self.generator.get_state()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, and with it the values of the parameters (but those of additive groups).

        Raises:
            ValueError: the groups or their sizes do not match.
        """
        generator, saved_groups = self._own(state_dict, "generator"), state_dict["param_groups"]
        states = []
        for g, group, saved in zip(self._groups, self.param_groups, saved_groups, strict=False):
            place = [p is _key(group, g.flat) for p in group["params"]].index(True)
            states.append(state_dict["state"].get(saved["params"][place] if place < len(saved["params"]) else None, {}))
            if {k: v.shape for k, v in states[-1].items()} != {k: v.shape for k, v in g.state.items()}:
                raise ValueError("the saved optimizer has other parameters or kinds of groups than this one")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "generator"})
        for g, group, state in zip(self._groups, self.param_groups, states, strict=True):
            g.group = group
            g.load(state)  # torch casts state to the parameters' dtype, which may be narrower
            self.state[_key(group, g.flat)] = g.state
        self.generator.set_state(generator.cpu())
        self._forget()


def _key(group: dict[str, Any], flat: FlatParameters) -> Tensor:
    """The parameter under which torch's ``state`` has the group's."""
    return (flat.parameters or group["params"])[0]
