"""Stochastic controlled averaging."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bayesfed.families import PointMass
from bayesfed.federation.client.assignment import Assignment
from bayesfed.federation.client.contribution import Contribution
from bayesfed.federation.client.handler import Trainer
from bayesfed.federation.client.sites import Record
from bayesfed.federation.local import LocalPath, LocalProblem, LocalSolution
from bayesfed.federation.server.strategy import Reply, Sent, Sums
from bayesfed.settings import setting
from strategies.fedavg import FedAvg


class ScaffoldClient(Trainer):
    """Client side of SCAFFOLD (Karimireddy et al. 2020).

    Keeps its control variate ``c_k`` (P,) in float64; gets ``control`` = c, uploads ``control_change`` =
    ``c_k' - c_k``. ``c_k`` follows what the upload decodes to, so that the server's weighted sum of them agrees to
    rounding.

    Raises:
        ValueError: the solver takes no gradient steps.
    """

    received: ClassVar[tuple[str, ...]] = ("control",)
    returned: ClassVar[tuple[str, ...]] = ("control_change",)
    remembers: ClassVar[bool] = True

    def pose(self, assignment: Assignment) -> LocalProblem:
        correction = assignment.vectors["control"].to(torch.float64) - self._control(assignment)
        path = LocalPath(linear=correction.to(self.model.vector), keep_gradient=True)
        return replace(assignment.problem, path=path)

    def answer(self, assignment: Assignment, solution: LocalSolution) -> Contribution:
        if solution.gradient is None:
            raise ValueError(
                f"strategy=scaffold needs a client that takes gradient steps; {type(self.solver).__name__} does not"
            )
        change = solution.gradient.to(dtype=torch.float64, device="cpu") - self._control(assignment)
        return Contribution(solution.posterior, {"control_change": change})

    def settle(self, assignment: Assignment, solution: LocalSolution, sent: Contribution) -> Record:
        return {"control": self._control(assignment) + sent.vectors["control_change"].to(torch.float64)}

    def _control(self, assignment: Assignment) -> Tensor:
        zero = torch.zeros(self.model.dim, dtype=torch.float64, device="cpu")
        return assignment.state.get("control", zero)


@dataclass(kw_only=True, eq=False)
class Scaffold(FedAvg):
    r"""SCAFFOLD (Karimireddy et al., ICML 2020), minimising ``sum_k p_k l_k(w)/N_k``, p_k = ``N_k/N`` or ``1/K``:

        client   steps along  grad l_k/N_k - c_k + c  from w_g, to w_k
        dual     c_k' = mean of the loss gradients it saw on the way
        upload   w_k and c_k' - c_k
        server   w_g += eta sum_P p_k (w_k - w_g) / sum_P p_k,     c += sum_P p_k (c_k' - c_k)

    With SGD at a constant rate the mean of the gradients *is* the paper's option II, ``c_k - c + (w_g - w_k)/(steps
    lr)``; written like this it also holds for Adam, momentum and schedules. The paper has ``p_k = 1/K``; sizes are its
    weighted form, whose optimum is the pooled one. ``c = sum_k p_k c_k`` always, absent clients included.

    Relation: a control variate ``-c_k + c`` plays the part of a dual: at the optimum ``c_k = grad l_k/N_k``, as
    ``eta_k = -grad l_k/tau`` in BayesADMM, but there is no proximal term: stability comes from small local steps.
    State: ``c_k`` on clients, c on the server. Traffic: 2P numbers each way.

    Args:
        server_step: eta.
        weighting: ``examples`` or ``uniform``.

    Raises:
        InputError: a value out of range.
    """

    name = "scaffold"
    asks = frozenset({"path"})
    client = ScaffoldClient
    received: ClassVar[tuple[str, ...]] = ("control_change",)

    server_step: float = setting(1.0, above=0)
    weighting: str = setting("examples", choices=("examples", "uniform"))

    # -- state --------------------------------------------------------------------------------------------------------

    def prepare(self, initial: Tensor) -> None:
        """The server starts at the network initialisation, c at 0."""
        super().prepare(initial)
        self.control = torch.zeros_like(initial, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """c."""
        return {"control": self.control}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        self.control = tensors["control"]

    # -- one round ----------------------------------------------------------------------------------------------------

    def extra(self) -> dict[str, Tensor]:
        """c goes to the clients."""
        return {"control": self.control}

    def empty(self) -> Sums:
        """``sum_k n_k w_k``, ``sum_k n_k`` and ``sum_k n_k (c_k' - c_k)``; n_k is ``N_k`` or 1."""
        return super().empty() | {"change": self.zeros()}

    def accumulate(self, sums: Sums, reply: Reply[PointMass]) -> dict[str, float]:
        """Add a client's weights and the change of its control variate."""
        weight = reply.num_examples if self.weighting == "examples" else 1
        sums["change"].add_(reply.extra["control_change"], alpha=weight)
        return self.add_weighted(sums, reply, weight)

    def combine(self, sums: Sums, sent: Sent[PointMass], replies: int) -> dict[str, float]:
        """Both steps of the server."""
        total = self.num_examples if self.weighting == "examples" else self.num_clients
        mean = sums["weighted"] / sums["examples"]
        self.posterior = PointMass((sent.mean + self.server_step * (mean - sent.mean)).to(self.dtype))
        self.control.add_(sums["change"], alpha=1 / total)
        return {"dual/norm": float(self.control.norm())}
