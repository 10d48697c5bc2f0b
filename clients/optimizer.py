"""What the posterior optimizers share: samples are shown in blocks and collected, or refused, with their gradients."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError
from bayesfed.families.natural import all_finite
from clients.flat import FlatParameters

# Schedulers and GradScaler hang these on an optimizer; views are made anew.
_TRANSIENT = ("step", "grad_scale", "found_inf", "_sample_views")

COPIED = "copied optimizers hold copies of the parameters: copy model and optimizer together"


class PosteriorOptimizer(torch.optim.Optimizer):
    """An optimizer whose gradients are taken at samples of its posterior, inside ``sampled_params(train=True)``.

    The gradient of a block stays in ``p.grad`` until the next block or :meth:`step`, which collect it; up to then
    ``unscale_`` of a GradScaler and gradient clipping act on it, and :meth:`zero_grad` drops it and everything else
    collected since the last step. A sample whose gradient is not finite is refused there: it touches nothing, is
    counted in :attr:`refused` and warned of once. Steps use the others; a step without any changes nothing.

    Parameters that do not require a gradient when a sample is drawn are frozen: no noise, no update.

    On a GPU no step waits for that check (``_deferred``): a refused sample counts as zeros, and a flag that stays on
    the device undoes the step's effect if there is no other. SRVN, and IVON with ``sync``, read numbers from the device
    in every step anyway.
    """

    mc_samples: int
    sync = False
    _step_supports_amp_scaling = True  # GradScaler.step() then hands over its scale instead of skipping the step itself
    _deferred = False

    def _prepare(self) -> None:
        """To be called before the constructor of ``torch.optim.Optimizer``."""
        self._inside = self._warned = False
        self._bad = 0  # refused samples
        self._lost: Tensor | None = None  # the same on the device, shape ()
        self._forget()

    def _forget(self) -> None:
        self._samples = 0  # collected and kept since the last step; if deferred, collected
        self._good: Tensor | None = None  # how many of them are finite, shape (), if deferred
        self._turned_down = 0  # refused since the last step
        self._pending = False  # a block's gradient is still in the parameters

    # -- what a learner gives -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _flats(self) -> list[FlatParameters]:
        """The parameters of every group."""

    @abstractmethod
    def _draw(self, train: bool) -> None:
        """Show the parameters at a sample."""

    @abstractmethod
    def _take(self) -> list[Tensor] | None:
        """Take the sample's gradient out of the parameters into vectors of one's own; ``None`` if there is none."""

    @abstractmethod
    def _add(self) -> None:
        """Add what was taken to the statistics of the step, which are those of ``_samples`` samples so far."""

    @abstractmethod
    def _statistics(self) -> list[Tensor]:
        """The sums over samples, proportional to their gradients."""

    @abstractmethod
    def _update(self) -> None:
        """The step itself, from the statistics of ``_samples`` samples."""

    @abstractmethod
    def _connect(self) -> None:
        """Make the views again that a copy does not bring along."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def _attach(self) -> None:
        """Take over parameters whose ``.data`` was replaced; inside a block they are a sample."""
        for flat in self._flats if not self._inside else ():
            flat.attach()

    # -- samples ------------------------------------------------------------------------------------------------------

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Put a sample of q into the parameters; on leaving, they are what they were, bit for bit.

        Args:
            train: collect the gradient of the block for :meth:`step`. Gradients from before the block are cleared when
                it is entered, so nothing accumulates over blocks; several backward passes in one block do. A block that
                is left before ``backward()`` collects nothing. Clip the gradient inside the block (or, of a step's only
                sample, before the step).

        Raises:
            RuntimeError: the contexts are nested, or a parameter requires a gradient that did not when the optimizer
                was built. After an exception in the block, everything collected since the last step is dropped.
        """
        with self._block(lambda: self._draw(train), train):
            yield

    @contextmanager
    def _block(self, draw: Callable[[], None], train: bool) -> Iterator[None]:
        if self._inside:
            raise RuntimeError("sampled_params() cannot be nested")
        self._settle()
        self._inside = True
        try:
            self._enter(draw, train)
            yield
            self._pending = train
        except BaseException:
            self._forget()
            for flat in self._flats if train else ():
                flat.clear_gradients()
            raise
        finally:
            for flat in self._flats:
                flat.show(flat.views)
            self._inside = False

    @torch.inference_mode(False)  # what is made here has to live longer than the caller's mode
    @torch.no_grad()
    def _enter(self, draw: Callable[[], None], train: bool) -> None:
        for flat in self._flats:
            flat.attach()
            flat.look()
            if train:
                flat.clear_gradients()
        draw()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _settle(self) -> bool:
        """Collect the sample whose gradient is in the parameters, if there is one; False if a block left none."""
        if not self._pending:
            return True
        self._pending = False
        return self._collect()

    def _collect(self) -> bool:
        taken = self._take()
        if taken is None:
            return False
        if self._deferred:
            bound = torch.stack([torch.linalg.vector_norm(v, torch.inf) for v in taken if v.numel()])
            fine = (bound < torch.inf).all()  # False for nan
            for vector in taken:
                vector.masked_fill_(~fine, 0.0)
            self._good = fine.int() if self._good is None else self._good + fine
            self._lost = (~fine).int() if self._lost is None else self._lost + ~fine
        elif not self._finite(taken):
            self._refuse()
            return True
        self._add()
        self._samples += 1
        return True

    def _finite(self, taken: list[Tensor]) -> bool:
        return all(all_finite(vector) for vector in taken)

    def _refuse(self) -> None:
        """Count a sample whose gradient is not finite."""
        self._bad += 1
        self._turned_down += 1
        if not self._warned and not hasattr(self, "found_inf"):  # GradScaler looks for the scale that way
            self._warned = True
            refusal = "dropped a sample whose gradient is not finite (said once; `refused` counts them)"
            warnings.warn(f"{type(self).__name__} {refusal}", stacklevel=2)

    @property
    def refused(self) -> int:
        """How many samples were dropped because their gradient was not finite (waits for a GPU)."""
        return self._bad + int(self._lost or 0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and drop what was collected since the last step: the way to skip a batch.

        Inside a block (closures do that) it clears the gradients only.
        """
        if not self._inside:
            self._forget()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = None if set_to_none else p.grad.detach().zero_()

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update the posterior from the samples collected since the last step; without a finite one nothing changes.

        Args:
            closure: computes the mean loss, calls ``backward`` and returns the loss; called ``mc_samples`` times.

        Returns:
            The loss averaged over the closure's samples, if there is a closure that returns it.

        Raises:
            RuntimeError: nothing was collected, or it is called inside the context.
        """
        if self._inside:
            raise RuntimeError("step() must follow a completed `with optimizer.sampled_params(train=True):` block")
        loss = None if closure is None else self._evaluate(closure)
        if hasattr(self, "found_inf"):
            self._unscale()
        found = self._settle()
        if not self._samples and not self._turned_down:
            self._without_samples(found)
        try:
            if self._samples or self.sync:
                self._attach()
                self._update()
        finally:
            self._forget()
        return loss

    def _without_samples(self, found: bool) -> None:
        if not found:
            raise RuntimeError(
                f"no parameter got a gradient: call loss.backward() inside sampled_params(train=True) ({COPIED})"
            )
        raise RuntimeError(
            "step() must follow a completed `with optimizer.sampled_params(train=True):` block "
            "(torch.distributed.checkpoint steps without one: save optimizer.state_dict() itself)"
        )

    def _evaluate(self, closure: Callable[[], Tensor]) -> Tensor | None:
        """Collect ``mc_samples`` samples; the closure's mean loss over them, ``None`` if it returns none."""
        total: Tensor | None = None
        for _ in range(self.mc_samples):
            with self.sampled_params(train=True), torch.enable_grad():
                value = closure()
            if value is not None:
                share = torch.as_tensor(value).detach() / self.mc_samples
                total = share if total is None else total + share
        return total

    def _unscale(self) -> None:
        """Undo the scale of the GradScaler whose ``step`` this is."""
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            if self._samples:
                raise RuntimeError(
                    "scaler.unscale_() reaches the last sample only: with several samples in a step leave it out, "
                    "scaler.step() does it"
                )
            return
        inverse = scale.double().reciprocal().float() if scale.device.type != "mps" else scale.reciprocal()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        for value in [*gradients, *(self._statistics() if self._samples else [])]:
            value.mul_(inverse.to(value.device))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but samples of an unfinished step; copies and pickles go with those of the parameters."""
        if self._inside:
            raise RuntimeError("copy the optimizer outside sampled_params(): inside, the parameters are a sample")
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_") and k not in _TRANSIENT}

    @torch.inference_mode(False)
    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inside" in state:  # a copy; load_state_dict hands over states and groups only
            self._forget()
            self._connect()

    def _own(self, state_dict: dict[str, Any], key: str) -> Any:
        """The entry ``key`` of a :meth:`state_dict`, which only this kind of optimizer writes.

        Raises:
            ValueError: it is not there.
        """
        if key not in state_dict:
            raise ValueError(
                f"a state of another optimizer than {type(self).__name__} (or one through "
                "torch.distributed.checkpoint, which drops what it does not know)"
            )
        return state_dict[key]


def trainable(flats: list[FlatParameters]) -> None:
    """Raise InputError if no parameter of any group requires a gradient."""
    if not any(flat.parameters for flat in flats):
        raise InputError("params", "no trainable parameters", "give at least one that requires grad")
