"""The loop that all strategies share: seeded sampling, streamed replies in client order, resume, callbacks."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from logging import getLogger
from typing import Generic, Protocol, TypeVar, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from bayesfed import seeding, wire
from bayesfed.errors import RunFailed, integer, number
from bayesfed.families import Gaussian, PointMass
from bayesfed.profiling import each, span, timed

log = getLogger("bayesfed")
Posterior = TypeVar("Posterior", bound=Gaussian | PointMass)


class Callbacks(Protocol):
    """What a run wants to know while a strategy works (log, checkpoint, display)."""

    def begin_round(self, round: int, sampled: list[int]) -> None:
        """Messages to the clients ``sampled`` are about to go out."""

    def client_done(self, round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        """A reply was accepted (``metrics``) or refused (None, with the ``reason``)."""

    def end_round(self, round: int, metrics: dict[str, float]) -> None:
        """The server's posterior is the new one."""


@dataclass
class Tally:
    """What happened in the current round.

    Attributes:
        sampled: partition ids, ascending, with the node each lives on.
        replied: accepted clients with their metrics.
        failed: refused or missing clients with the reason.
        down, up: payload bytes.
    """

    sampled: dict[int, int] = field(default_factory=dict)
    replied: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    down: int = 0
    up: int = 0


class FederatedStrategy(Strategy, Generic[Posterior]):
    """Base of bayesfed's strategies: a subclass says what it sends and how it combines what comes back.

    A subclass implements :meth:`prepare`, :meth:`local_settings`, :meth:`begin`, :meth:`accumulate`, :meth:`combine` and names
    its ``family``. Replies are consumed one at a time **in the order of partition ids**, whatever the order of arrival, so that
    floating-point sums don't depend on the engine; memory is O(P) plus the replies that arrived early.

    Args:
        fraction: share of the clients sampled each round, in (0, 1].
        min_replies: a round with fewer accepted replies stops the run.
        timeout: seconds to wait for the replies of a round.

    Raises:
        InputError: a value out of range.
    """

    name: str
    family: str = PointMass.name

    def __init__(self, *, fraction: float = 1.0, min_replies: int = 1, timeout: float = 86400.0):
        number("fraction", fraction, above=0, at_most=1)
        integer("min_replies", min_replies, at_least=1)
        number("timeout", timeout, above=0)
        self.fraction, self.min_replies, self.timeout = float(fraction), min_replies, float(timeout)
        self.posterior: Posterior
        self.accepted: dict[int, int] = {}  # partition id -> last round whose reply was counted
        self.durable: dict[int, int] = {}  # the same, as of the last checkpoint
        self.num_clients = 0
        self.seed = 0
        self._callbacks: Callbacks | None = None
        self._held = 0
        self._tally = Tally()
        self._nodes: dict[int, int] = {}
        self.lr_factor: Callable[[int], float] = lambda round: 1.0

    # -- what a strategy is -----------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, initial: Tensor) -> None:
        """Set ``self.posterior`` (and sums) before round 1 from the network initialisation (P,)."""

    @abstractmethod
    def local_settings(self) -> dict[str, float | bool]:
        """Values of the local problem: rho, damping, temperature, proximal, learn_precision."""

    @abstractmethod
    def begin(self) -> None:
        """Reset this round's sums."""

    @abstractmethod
    def accumulate(self, posterior: Posterior, num_examples: int) -> dict[str, float]:
        """Add one client's posterior (float64, CPU); returns numbers to log for this client."""

    @abstractmethod
    def combine(self, replies: int) -> dict[str, float]:
        """Update ``self.posterior`` from the sums of ``replies`` clients; returns numbers to log."""

    def tensors(self) -> dict[str, Tensor]:
        """Server state besides the posterior, for checkpoints."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`; called after :meth:`prepare`."""

    # -- set-up -----------------------------------------------------------------------------------------------------

    def setup(self, initial: Tensor, num_clients: int, seed: int = 0) -> None:
        """Tell the strategy the size of the problem; ``initial`` (P,) has the dtype of the wire."""
        integer("num_clients", num_clients, at_least=1)
        self.num_clients, self.seed = num_clients, seed
        self.dtype = initial.dtype
        self.prepare(initial.detach().cpu())

    def summary(self) -> None:
        """Log the settings, as Flower's strategies do."""
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_") and isinstance(v, int | float | str)}
        log.info("%s: %s", type(self).__name__, ", ".join(f"{k}={v}" for k, v in sorted(settings.items())))

    # -- the loop ---------------------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        first_round: int = 1,
        callbacks: Callbacks | None = None,
    ) -> Result:
        """Run rounds ``first_round`` ... ``num_rounds``.

        Flower's signature and result; in addition the loop can begin anywhere (resume) and reports to ``callbacks``. If
        :meth:`setup` was not called, ``initial_arrays`` must hold one array ``mean`` (P,), and every node is a client.

        Raises:
            RunFailed: fewer than ``min_replies`` clients replied in a round.
        """
        self._callbacks = callbacks
        with span("start-up"), span("roster"):
            self._nodes = self._roster(grid)
        if not self.num_clients:
            if initial_arrays is None or "mean" not in initial_arrays:
                raise ValueError("call setup() first or give initial_arrays with an array 'mean'")
            self.setup(torch.from_numpy(initial_arrays["mean"].numpy()), len(self._nodes))
        self.summary()
        result = Result()
        arrays = wire.pack(self.posterior.arrays())
        for current in range(first_round, num_rounds + 1):
            with span("round"):
                with span("messages"):
                    messages = self.configure_train(current, arrays, train_config or ConfigRecord(), grid)
                replies = _stream(grid, messages, timeout or self.timeout)
                updated, metrics = self.aggregate_train(current, replies)
            if updated is not None:
                arrays = result.arrays = updated
            if metrics is not None:
                result.train_metrics_clientapp[current] = metrics
            if evaluate_fn is not None and (evaluated := evaluate_fn(current, arrays)) is not None:
                result.evaluate_metrics_serverapp[current] = evaluated
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per sampled client: the server's posterior and the values of the local problem."""
        if not self._nodes:
            self._nodes = self._roster(grid)
        clients = self.sample(server_round)
        missing = [client for client in clients if client not in self._nodes]
        self._tally = Tally(sampled={c: self._nodes[c] for c in clients if c in self._nodes})
        self._tally.failed = dict.fromkeys(missing, "not connected")
        if self._callbacks:
            self._callbacks.begin_round(server_round, clients)
        settings = {"damping": 0.0, "proximal": 0.0, "rho": 0.0, "temperature": 1.0, "learn_precision": True}
        settings |= self.local_settings()
        size = wire.nbytes(arrays)
        messages = []
        for client, node in self._tally.sampled.items():
            method = ConfigRecord(
                {
                    **config,
                    **settings,
                    "name": self.name,
                    "round": server_round,
                    "accepted": self.accepted.get(client, 0),
                    "durable": self.durable.get(client, 0),
                    "lr_factor": self.lr_factor(server_round),
                }
            )
            self._tally.down += size
            content = RecordDict({"posterior": arrays, "method": method})
            messages.append(Message(content, node, MessageType.TRAIN, group_id=str(server_round)))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Consume the replies in client order as they come, then update the posterior.

        Raises:
            RunFailed: too few replies.
        """
        tally = self._tally
        self.begin()
        client_metrics: list[dict[str, float]] = []
        for client, reply in _in_order(tally.sampled, replies):
            reason = "no reply before the timeout"
            if reply is not None:
                try:
                    posterior, metrics = self._read(reply, server_round)
                except (wire.BadMessage, ValueError) as error:
                    reason = str(error)
                else:
                    tally.up += wire.nbytes(reply.content["posterior"])  # type: ignore[arg-type]
                    with span("accumulate"):
                        wide = cast(Posterior, posterior.to(torch.float64))
                        metrics |= self.accumulate(wide, int(metrics["num-examples"]))
                    tally.replied[client] = metrics
                    client_metrics.append(metrics)
                    self._report(server_round, client, metrics, "")
                    continue
            tally.failed[client] = reason
            self._report(server_round, client, None, reason)

        if len(tally.replied) < self.min_replies:
            reasons = "; ".join(f"client {c}: {r}" for c, r in sorted(tally.failed.items())[:3])
            raise RunFailed(
                f"round {server_round}: {len(tally.replied)} of {len(self.sample(server_round))} clients replied, "
                f"strategy.min_replies={self.min_replies} ({reasons})"
            )
        with span("combine"):
            metrics = self.combine(len(tally.replied))
        for client in tally.replied:
            self.accepted[client] = server_round
        metrics |= _mean_and_max(client_metrics, "residual", "admm/primal")
        metrics |= _mean_and_max(client_metrics, "dual-norm", "admm/dual_norm")
        metrics |= _mean_and_max(client_metrics, "hessian-moved", "hessian/moved", largest=False)
        metrics |= _mean_and_max(client_metrics, "loss", "clients/loss", largest=False)
        held = int(sum(m.get("floored", 0) for m in client_metrics))
        if held > 2 * self._held:  # every count is in the log of rounds; say it again only when it grows
            self._held = held
            log.warning("round %d: %d client precisions held at their floor (client.min_precision)", server_round, held)
        metrics |= {
            "guard/clients": held,
            "clients/sampled": len(self.sample(server_round)),
            "clients/replied": len(tally.replied),
            "clients/failed": len(tally.failed),
            "bytes/down": tally.down,
            "bytes/up": tally.up,
        }
        if self._callbacks:
            self._callbacks.end_round(server_round, metrics)
        return wire.pack(self.posterior.arrays()), MetricRecord(dict(metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation happens on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Evaluation happens on the server."""
        return None

    def sample(self, server_round: int) -> list[int]:
        """The partition ids that take part, ascending: keyed by (seed, round), never by node ids."""
        count = max(1, round(self.fraction * self.num_clients))
        if count >= self.num_clients:
            return list(range(self.num_clients))
        generator = seeding.numpy_generator(self.seed, "participants", server_round)
        return sorted(generator.choice(self.num_clients, count, replace=False).tolist())

    # -- details ----------------------------------------------------------------------------------------------------

    @timed("read")
    def _read(self, reply: Message, server_round: int) -> tuple[Posterior, dict[str, float]]:
        """Check a reply before any state changes."""
        if reply.has_error():
            raise wire.BadMessage(reply.error.reason or f"error {reply.error.code}")
        shapes = {name: tuple(value.shape) for name, value in self.posterior.arrays().items()}
        arrays = wire.unpack(reply.content.get("posterior"), shapes, self.dtype)
        record = reply.content.get("metrics")
        if not isinstance(record, MetricRecord):
            raise wire.BadMessage("metrics are missing")
        metrics = {name: value for name, value in record.items() if isinstance(value, int | float)}
        if metrics.get("round") != server_round:
            raise wire.BadMessage(f"reply is of round {metrics.get('round')}")
        if not metrics.get("num-examples", 0) >= 1:
            raise wire.BadMessage(f"num-examples is {metrics.get('num-examples')}")
        return cast(Posterior, type(self.posterior).from_arrays(arrays)), metrics

    def _report(self, server_round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        if metrics is None:
            log.warning("round %d: client %d left out: %s", server_round, client, reason)
        if self._callbacks:
            self._callbacks.client_done(server_round, client, metrics, reason)

    def _roster(self, grid: Grid) -> dict[int, int]:
        """Partition id -> node id. Flower's node ids are random, so every node is asked once which partition it holds."""
        deadline = time.monotonic() + min(self.timeout, 300)
        nodes: dict[int, int] = {}
        refused: dict[int, str] = {}
        while True:
            known = {*nodes.values(), *refused}
            new = [node for node in grid.get_node_ids() if node not in known]
            messages = [Message(RecordDict(), node, MessageType.QUERY, group_id="roster") for node in new]
            for reply in grid.send_and_receive(messages, timeout=60) if messages else ():
                if reply.has_error():
                    refused[reply.metadata.src_node_id] = reply.error.reason or f"error {reply.error.code}"
                    log.warning("node %d did not say who it is: %s", *list(refused.items())[-1])
                    continue
                nodes[int(wire.value(reply.content.get("client"), "partition-id", int))] = reply.metadata.src_node_id
            if len(nodes) + len(refused) >= max(self.num_clients, 1) or time.monotonic() > deadline:
                if not nodes:
                    raise RunFailed(next(iter(refused.values()), "no client connected"))
                return dict(sorted(nodes.items()))
            time.sleep(0.5)


def _stream(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterable[Message]:
    """Replies as they arrive where the grid can (bayesfed's engines), else all at once."""
    stream = getattr(grid, "stream", None)
    if stream:
        return each("waiting", stream(messages, timeout=timeout))
    with span("waiting"):
        return grid.send_and_receive(messages, timeout=timeout)


def _in_order(sampled: dict[int, int], replies: Iterable[Message]) -> Iterator[tuple[int, Message | None]]:
    """Pair clients, ascending, with their replies; None for those that never came. Early replies wait."""
    clients = {node: client for client, node in sampled.items()}
    waiting: dict[int, Message] = {}
    order = iter(sorted(sampled))
    due = next(order, None)
    for reply in replies:
        client = clients.get(reply.metadata.src_node_id)
        if client is None or client in waiting or due is None or client < due:
            log.warning("reply of node %d was not asked for", reply.metadata.src_node_id)
            continue
        waiting[client] = reply
        while due is not None and due in waiting:
            yield due, waiting.pop(due)
            due = next(order, None)
    while due is not None:
        yield due, waiting.pop(due, None)
        due = next(order, None)


def _mean_and_max(metrics: list[dict[str, float]], key: str, name: str, largest: bool = True) -> dict[str, float]:
    values = [m[key] for m in metrics if key in m]
    if not values:
        return {}
    mean = sum(values) / len(values)
    return {f"{name}_mean": mean, f"{name}_max": max(values)} if largest else {name: mean}
