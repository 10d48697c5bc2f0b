"""Many small clients side by side on one device: one row of state per client, one forward and backward pass for all.

Below some ten thousand parameters a training step costs dispatch, not arithmetic, and C clients cost C times that.
Here their parameters are the rows of one matrix (C, P) and ``torch.vmap`` runs the model on all rows at once. Every
client sees the mini-batches, the noise and the number of steps it would see alone, so the results agree to rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesfed.families import PointMass
from bayesfed.families.elementwise import ElementwiseGaussian
from bayesfed.federation.local import LocalProblem, LocalSolution
from bayesfed.problem import Examples
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.inputs import Inputs, each
from clients.training import GradientSolver

OVERHEAD = (
    3  # what a step of all clients costs, in steps of one (benchmarks/client_batching.py: even at 2 to 4 clients)
)
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what :func:`separable` found


def can_batch(problems: Sequence[LocalProblem]) -> bool:
    """Whether these problems can be solved side by side.

    They must share model, likelihood, data arrays and family (not the full Gaussian, whose precision is a matrix for
    each client), and the model must treat examples separately, without state or randomness of its own (see
    :func:`separable`).
    """
    if len(problems) < 2:
        return False
    first = problems[0]
    alike = all(
        p.model is first.model
        and p.likelihood is first.likelihood
        and p.data.x is first.data.x
        and p.data.y is first.data.y
        and p.data.scaling is first.data.scaling
        and p.data.shift is None
        and type(p.server) is type(first.server)
        and (p.site is None) == (first.site is None)
        and p.path.keep_gradient == first.path.keep_gradient
        and p.path.observer is None
        for p in problems
    )
    return alike and isinstance(first.server, PointMass | ElementwiseGaussian) and separable(first)


def separable(problem: LocalProblem) -> bool:
    """Whether ``torch.vmap`` can run the model in training mode, and an example's output depends on that example alone.

    Tried once per model on two examples, which finds dropout (vmap refuses to draw), batch statistics (padding would
    count) and what vmap has no rule for. Buffers rule it out too: the module might write to them.
    """
    module = problem.model.module
    if module not in _KNOWN:
        _KNOWN[module] = not any(True for _ in module.buffers()) and _try(problem)
    return _KNOWN[module]


@torch.no_grad()
def _try(problem: LocalProblem) -> bool:
    model, data = problem.model, problem.data
    shared = Examples(data.x, data.y, None, data.scaling)
    x, _ = shared.batch(torch.tensor([0, len(shared) - 1], device="cpu"), problem.dtype, problem.device)
    vector = problem.initial
    model.module.train()
    try:
        together = stacked(model)(_named(model, vector.expand(2, -1)), each(lambda v: v.expand(2, *v.shape), x))
        alone = functional_call(model.module, model.named(vector), (each(lambda v: v[:1], x),))
    except Exception:  # whatever it is, it shows again, with its cause, when the client is trained alone
        return False
    return torch.allclose(together[1, 0], alone[0], rtol=1e-3, atol=1e-5)


def stacked(model: FlatModel) -> Callable[[dict[str, Tensor], Inputs], Tensor]:
    """The model as a function of parameters (C, ...) by name and inputs (C, B, ...); outputs (C, B, ...)."""

    def call(parameters: dict[str, Tensor], x: Inputs) -> Tensor:
        return functional_call(model.module, parameters, (x,))

    return torch.vmap(call)


def loners(steps: Sequence[int]) -> int:
    """How many clients, of those with the most steps, are better trained alone (``steps`` descending).

    A step of any number of clients costs about as much as three of one client, so the last ones at work should not be
    few: leaving out the first j saves ``3 (steps[0] - steps[j])`` and costs the sum of their steps.
    """
    ends = [*steps, 0]
    saved = [OVERHEAD * (ends[0] - end) - alone for end, alone in zip(ends, accumulate(ends, initial=0), strict=False)]
    return max(range(len(ends)), key=saved.__getitem__)


class BatchingSolver(GradientSolver):
    """A solver by mini-batches that can run clients side by side: subclasses add :meth:`solve_together`."""

    batches: ClassVar[bool] = True

    @abstractmethod
    def solve_together(self, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
        """:meth:`solve` for several clients at once, given by number of steps, most first; :func:`can_batch` holds."""

    def solve_many(self, problems: Sequence[LocalProblem]) -> list[LocalSolution]:
        """The last clients at work alone (:func:`loners`), the others side by side, if :func:`can_batch` holds."""
        for problem in problems:
            self.require(problem)
        if not can_batch(problems):
            return super().solve_many(problems)
        steps = [p.steps(self.epochs, self.batch_size) for p in problems]
        order = sorted(range(len(steps)), key=lambda i: -steps[i])
        ranked = [problems[i] for i in order]
        alone = loners([steps[i] for i in order])
        solutions = super().solve_many(ranked[:alone])
        if ranked[alone:]:
            solutions += self.solve_together(ranked[alone:])
        return [solutions[order.index(i)] for i in range(len(order))]


class SideBySide:
    """C clients whose number of steps descends, so that those still at work are always the first rows.

    Args:
        problems: row k of every matrix belongs to ``problems[k]``.
        solver: its settings of local training.

    Attributes:
        steps: how many each client does.
        losses: (C,) sums of the mini-batches' losses so far, see :class:`Gradients`.
    """

    def __init__(self, problems: Sequence[LocalProblem], solver: GradientSolver):
        self.problems, self.solver, first = problems, solver, problems[0]
        epochs, batch_size = solver.epochs, solver.batch_size
        self._schedules = [solver.rates(p) for p in problems]
        self.steps = [schedule.horizon for schedule in self._schedules]
        self.model, self.dtype, self.device = first.model, first.dtype, first.device
        self.model.module.train()
        self.losses = torch.zeros(len(problems), dtype=self.dtype, device=self.device)
        self._data = Examples(first.data.x, first.data.y, None, first.data.scaling)
        self._batch_size = batch_size
        self._sizes = np.array([p.num_examples for p in self.problems])
        self._per_epoch = -(-self._sizes // batch_size)
        # rows of the data arrays in the order of use, client after client, epoch after epoch
        self._rows = torch.cat([_rows(p, order) for p in self.problems for order in p.orders(epochs)])
        self._starts = np.concatenate([[0], np.cumsum(epochs * self._sizes)[:-1]])

    def segments(self) -> Iterator[tuple[int, range]]:
        """``(active, steps)``: during ``steps`` the first ``active`` clients are at work."""
        begun = 0
        for active in range(len(self.steps), 0, -1):
            end = self.steps[active - 1]
            if end > begun:
                yield active, range(begun, end)
                begun = end

    def batch(self, step: int, active: int) -> tuple[Inputs, Tensor, Tensor]:
        """The mini-batches of ``step`` (from 0).

        Returns:
            x (A, B, ...), y (A, B) or (A, B, D), and weights (A, B): 1/b for each of the b examples of a client's
            mini-batch and 0 for padding, which repeats its last one (and so can't bring a nan that isn't there).
        """
        sizes = self._sizes[:active]
        epoch, turn = np.divmod(step, self._per_epoch[:active])
        first = self._starts[:active] + epoch * sizes + turn * self._batch_size
        count = np.minimum(self._batch_size, sizes - turn * self._batch_size)[:, None]
        column = np.arange(int(count.max()))
        places = first[:, None] + np.minimum(column, count - 1)
        rows = self._rows[torch.from_numpy(places.ravel())]
        x, y = self._data.batch(rows, self.dtype, self.device)
        weights = torch.from_numpy((column < count) / count).to(device=self.device, dtype=self.dtype)
        shape = weights.shape
        return each(lambda v: v.view(*shape, *v.shape[1:]), x), y.view(*shape, *y.shape[1:]), weights

    def rates(self, step: int, active: int) -> list[float]:
        """The learning rates of ``step``, one per client at work."""
        pairs = zip(self.problems[:active], self._schedules, strict=False)
        return [self.solver.lr * problem.lr_factor * factor(step) for problem, factor in pairs]

    def column(self, values: Sequence[float]) -> Tensor:
        """One number per client, (C, 1), in the model's dtype (computed in double precision before)."""
        return torch.tensor(values, dtype=torch.float64, device="cpu").to(device=self.device, dtype=self.dtype)[:, None]

    def matrix(self, rows: Sequence[Tensor]) -> Tensor:
        """One vector (P,) or number () per client as a new matrix (C, P) or (C, 1)."""
        return torch.stack([row.to(device=self.device, dtype=self.dtype).reshape(-1) for row in rows])

    def remembered(self, name: str) -> Tensor:
        """What the clients' ``memory`` holds under ``name``, (C, P); 0 for those that have none."""
        return self.matrix([p.memory.get(name, torch.zeros_like(p.initial)) for p in self.problems])


class Gradients:
    """Gradients of the mean losses of the first A clients, at points whose memory they share.

    Args:
        clients: the batch; gets the losses added.
        points: (A, P) contiguous; may be written to between calls.

    Attributes:
        matrix: (A, P) the gradients of the last call.
    """

    def __init__(self, clients: SideBySide, points: Tensor):
        mixed = clients.solver.amp != "none"
        self._mixed = partial(torch.autocast, clients.device.type, torch.bfloat16) if mixed else nullcontext
        self._call, self._likelihood = stacked(clients.model), clients.problems[0].likelihood
        self._leaves = {name: view.detach().requires_grad_() for name, view in _named(clients.model, points).items()}
        self._losses = clients.losses[: len(points)]
        self.matrix = torch.empty_like(points)

    def __call__(self, x: Inputs, y: Tensor, weights: Tensor) -> None:
        """Differentiate at mini-batches as :meth:`SideBySide.batch` gives them."""
        with torch.enable_grad():
            with self._mixed():
                outputs = self._call(self._leaves, x)
            losses = self._likelihood.losses(outputs.to(weights.dtype).flatten(0, 1), y.flatten(0, 1))
            means = (losses.view_as(weights) * weights).sum(1)
            # a client's loss depends on its own row only, so the gradient of the sum is all gradients
            leaves = list(self._leaves.values())
            pieces = torch.autograd.grad(means.sum(), leaves, allow_unused=True, materialize_grads=True)
        torch.cat([piece.flatten(1) for piece in pieces], dim=1, out=self.matrix)
        self._losses.add_(means.detach())

    def clip(self, bound: float) -> None:
        """Scale each row down to norm ``bound``, as ``torch.nn.utils.clip_grad_norm_`` does."""
        norms = torch.linalg.vector_norm(self.matrix, dim=1, keepdim=True)
        self.matrix.mul_((bound / (norms + 1e-6)).clamp_(max=1.0))


def _rows(problem: LocalProblem, order: Tensor) -> Tensor:
    return order if problem.data.index is None else problem.data.index[order]


def _named(model: FlatModel, points: Tensor) -> dict[str, Tensor]:
    """Views of ``points`` (C, P) by parameter name, (C, ...)."""
    pieces = points.split(model.sizes, dim=1)
    shapes = (p.shape for p in model.parameters)
    return {n: v.view(len(points), *s) for n, v, s in zip(model.names, pieces, shapes, strict=True)}
