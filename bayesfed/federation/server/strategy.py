"""The loop that all strategies share: seeded sampling, streamed replies in client order, resume, callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import getLogger
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from bayesfed import seeding, wire
from bayesfed.errors import RunDiverged, RunFailed, integer, number
from bayesfed.federation.server.callbacks import Callbacks
from bayesfed.federation.server.limits import Limits
from bayesfed.federation.server.method import NEUTRAL, Method
from bayesfed.federation.server.outliers import Outliers
from bayesfed.federation.server.personalize import personalize
from bayesfed.federation.server.reading import Posterior, Read, Reader
from bayesfed.federation.server.replies import GroupSums, Tally, group_size, in_order, reported, stream
from bayesfed.federation.server.replies import Sums as Sums  # a part of this module's interface
from bayesfed.federation.server.roster import Roster
from bayesfed.metrics import plain_numbers
from bayesfed.profiling import span, timed
from bayesfed.system import Fate
from bayesfed.wire.size import message_bytes, record_bytes

log = getLogger("bayesfed")


class FederatedStrategy(Method[Posterior], Strategy):
    """Base of bayesfed's strategies: a subclass says what it sends and how it combines what comes back.

    A subclass implements the abstract methods of :class:`bayesfed.federation.server.method.Method` and names its ``family``. A method that needs more of a
    reply than its posterior implements ``add`` instead of ``accumulate``; vectors that travel besides posteriors are given by ``extra`` and
    named in ``received``. Replies are consumed one at a time **in the order of partition ids**, whatever the order of arrival,
    in groups whose size depends only on how many clients are sampled, so that floating-point sums don't depend on the engine;
    memory is O(P) plus the replies that arrived early. An engine may sum a group where its clients run (:meth:`fold`).

    Args:
        fraction: share of the clients sampled each round, in (0, 1].
        min_replies: a round with fewer accepted replies stops the run.
        timeout: seconds to wait for the replies of a round.

    Raises:
        InputError: a value out of range.
    """

    def __init__(self, *, fraction: float = 1.0, min_replies: int = 1, timeout: float = 86400.0):
        number("fraction", fraction, above=0, at_most=1)
        integer("min_replies", min_replies, at_least=1)
        number("timeout", timeout, above=0)
        self.fraction, self.min_replies, self.timeout = float(fraction), min_replies, float(timeout)
        self.posterior: Posterior
        self.sent: Posterior  # what this round's messages decode to: `posterior` itself with wire=full
        self.accepted: dict[int, int] = {}  # partition id -> last round whose reply was counted
        self.durable: dict[int, int] = {}  # the same, as of the last checkpoint
        self.older: dict[int, int] = {}  # and as of the one before, in case the last one is damaged
        self.num_clients = 0
        self.sizes: dict[int, int] = {}  # partition id -> number of examples
        self.shape: dict[str, int] = {}  # what every node's data have in common
        self.seed = 0
        self._callbacks: Callbacks | None = None
        self._held = 0  # precisions at their floor
        self._tally = Tally()
        self._roster: Roster | None = None
        self._outliers = Outliers(math.inf, math.inf, {}, True)  # until a round begins
        self._gone: set[int] = set()  # nodes that are not waited for
        self._folding: object = None  # the message a fold was last prepared for
        self._folds = False  # whether the grid sums groups
        self.lr_factor: Callable[[int], float] = lambda round: 1.0
        # simulated: what clients manage in a round
        self.fates: Callable[[Sequence[int], int], dict[int, Fate]] | None = None

    # -- set-up -----------------------------------------------------------------------------------------------------

    def setup(
        self,
        initial: Tensor,
        num_clients: int,
        seed: int = 0,
        wire_format: str = "full",
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell the strategy the size of the problem; ``initial`` (P,) has the dtype of models and server.

        ``limits`` are the arguments of :class:`bayesfed.federation.server.limits.Limits`.

        Raises:
            InputError: ``wire_format`` can't carry this posterior.
        """
        integer("num_clients", num_clients, at_least=1)
        self.num_clients, self.seed = num_clients, seed
        self.dtype = initial.dtype
        self.prepared(initial.detach().cpu())
        shapes = {name: tuple(value.shape) for name, value in self.posterior.arrays().items()}
        self.codec = wire.Codec(wire_format, shapes, self.dtype)
        self._extra_out = wire.Codec(wire_format, dict.fromkeys(self.extra(), (initial.numel(),)), self.dtype)
        extra_in = wire.Codec(wire_format, dict.fromkeys(self.received, (initial.numel(),)), self.dtype)
        self.reader = Reader(type(self.posterior), self.codec, extra_in, Limits(**(limits or {})))
        self.sent = self.posterior

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
            roster = self._roster = Roster(self.num_clients, self.sizes, self.shape)
            roster.gather(grid, self.timeout)
        if not self.num_clients:
            if initial_arrays is None or "mean" not in initial_arrays:
                raise ValueError("call setup() first or give initial_arrays with an array 'mean'")
            self.setup(torch.from_numpy(initial_arrays["mean"].numpy()), len(roster.nodes))
        self.summary()
        result = Result()
        arrays = wire.pack(self.posterior.arrays())
        for current in range(first_round, num_rounds + 1):
            with span("round"):
                with span("messages"):
                    messages = self.configure_train(current, arrays, train_config or ConfigRecord(), grid)
                size = group_size(len(self._tally.sampled)) if self.streams else 1
                replies = stream(grid, messages, timeout or self.timeout, size, self._gone)
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
        """One message a sampled client: the server's posterior and the values of the local problem."""
        nodes = self._connected(grid)
        self._folds = self.streams and bool(getattr(grid, "folds", False))
        clients = self.sample(server_round)
        missing = [client for client in clients if client not in nodes]
        self._tally = Tally(sampled={c: nodes[c] for c in clients if c in nodes})
        local = hasattr(grid, "stream")
        compared = not local or group_size(len(self._tally.sampled)) == 1  # else engines may sum where clients run
        self._outliers = self.reader.limits.outliers(self.sizes, compared, trusted=local)
        self._tally.failed = dict.fromkeys(missing, "not connected")
        if self._callbacks:
            self._callbacks.begin_round(server_round, clients)
        fates = self.fates(clients, server_round) if self.fates else {}
        reached = dict(self._tally.sampled)
        for client in reached:
            if client in fates and fates[client].lost:
                self._lose(server_round, client, fates[client].lost)
        settings = NEUTRAL | self.local_settings()
        arrays = self._encoded(arrays, server_round)
        records: dict[str, ArrayRecord | ConfigRecord] = {"posterior": arrays}
        if further := self.extra():
            records["extra"] = self._encoded_extra(further, server_round)
        size = sum(record_bytes(name, record) for name, record in records.items())
        messages = []
        methods: dict[tuple[int, int, int, float], ConfigRecord] = {}  # most clients get the same record
        sizes: dict[tuple[int, int, int, float], int] = {}
        for client, node in reached.items():
            work = fates[client].work if client in fates else 1.0
            accepted, durable, older = (rounds.get(client, 0) for rounds in (self.accepted, self.durable, self.older))
            seen = accepted, durable, older, work
            if seen not in methods:
                methods[seen] = ConfigRecord(
                    {
                        **config,
                        **settings,
                        "name": self.name,
                        "round": server_round,
                        "accepted": accepted,
                        "durable": durable,
                        "older": older,
                        "lr_factor": self.lr_factor(server_round),
                        **({"work": work} if work < 1 else {}),
                    }
                )
                sizes[seen] = size + record_bytes("method", methods[seen])
            self._tally.down += sizes[seen]  # a client whose reply is lost was sent the model all the same
            if client not in self._tally.sampled:
                continue
            content = RecordDict({**records, "method": methods[seen]})
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
        exact, self.posterior = self.posterior, self.sent  # clients' answers are relative to what they were sent
        self.begin()
        sums = GroupSums(self.empty, group_size(len(tally.sampled)))
        client_metrics: list[dict[str, float]] = []
        for client, found in self._outliers.vetted(self._read_all(replies, server_round)):
            sums.next()
            metrics: dict[str, float] | None = None
            try:
                metrics = self._add(sums, found, server_round)
            except ValueError as error:  # wire.BadMessage, or what a method can't add
                refusal = str(error)
                if isinstance(error, wire.Diverged):
                    tally.diverged.append(client)
            if metrics is None:
                tally.failed[client] = refusal
            else:
                tally.replied[client] = metrics
                client_metrics.append(metrics)
            self._report(server_round, client, metrics, "" if metrics is not None else refusal)
        sums.close()

        if len(tally.replied) < self.min_replies:
            self.posterior = exact
            shortage = tally.shortage(server_round, len(self.sample(server_round)), self.min_replies)
            raise (RunDiverged if shortage.startswith("diverged: ") else RunFailed)(shortage)
        with span("combine"):
            metrics = self.combined(sums.total, len(tally.replied), server_round)
            if exact is not self.sent:
                kept = self.codec.keep_rounding(self.posterior.arrays(), exact.arrays(), self.sent.arrays())
                self.posterior = cast(Posterior, type(self.posterior).from_arrays(kept))
        for client in tally.replied:
            self.accepted[client] = server_round
        metrics |= reported(client_metrics, self.posterior.dim)
        held = int(metrics["guard/clients"])
        if held > 2 * self._held:  # every count is in the log of rounds; say it again only when it grows
            self._held = held
            log.warning("round %d: %d client precisions held at their floor (client.min_precision)", server_round, held)
        metrics |= tally.counts(len(self.sample(server_round)))
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

    def personalize(self, grid: Grid, server_round: int, samples: int) -> dict[int, dict[str, float]]:
        """Test every client's local posterior, started from the server's: see :func:`bayesfed.federation.server.personalize.personalize`."""
        self._connected(grid)
        return personalize(self, grid, server_round, samples)

    def sample(self, server_round: int) -> list[int]:
        """The partition ids that take part, ascending: keyed by (seed, round), never by node ids."""
        count = max(1, round(self.fraction * self.num_clients))
        if count >= self.num_clients:
            return list(range(self.num_clients))
        generator = seeding.numpy_generator(self.seed, "participants", server_round)
        return sorted(generator.choice(self.num_clients, count, replace=False).tolist())

    # -- details ----------------------------------------------------------------------------------------------------

    def fold(self, messages: Sequence[Message], replies: Sequence[Message]) -> list[Message]:
        """Sum the replies of a group to ``messages`` where they were made, as the server would.

        Returns:
            One reply per client: its numbers, or why it is refused, without its posterior. The first that is not refused also
            holds the sums over the group.
        """
        record = messages[0].content["posterior"]
        if record is not self._folding:
            self.sent = cast(Posterior, type(self.posterior).from_arrays(self.codec.decode(record)))
            self.posterior, self._folding = self.sent, record
            self.begin()
        server_round = wire.value(messages[0].content["method"], "round", int)
        sums, first = GroupSums(self.empty), None
        for reply in replies:
            if reply.has_error():
                continue
            size = message_bytes(reply)
            try:
                metrics = self._absorb(sums, reply, server_round)
            except ValueError as error:  # wire.BadMessage, or what a method can't add
                refused = ConfigRecord(
                    {"reason": str(error), "diverged": isinstance(error, wire.Diverged), "bytes": size}
                )
                reply.content = RecordDict({"refused": refused})
            else:
                reply.content = RecordDict({"metrics": MetricRecord({**metrics, "bytes": size})})
                first = first or reply
        if first is not None:
            first.content["sums"] = wire.pack(sums.total)
        return list(replies)

    def _connected(self, grid: Grid) -> dict[int, int]:
        """The node of each client that connected."""
        if self._roster is None:
            self._roster = Roster(self.num_clients, self.sizes, self.shape)
            self._roster.gather(grid, self.timeout)
        self._roster.update(grid)
        return self._roster.nodes

    def _encoded(self, arrays: ArrayRecord, server_round: int) -> ArrayRecord:
        """The posterior as it travels; ``sent`` is what it decodes to."""
        self.sent = self.posterior
        if self.codec.format == "full":
            return arrays
        try:
            record, values = self.codec.encode(self.posterior.arrays())
        except ValueError as error:
            raise RunFailed(f"round {server_round}: the server's {error}") from error
        self.sent = cast(Posterior, type(self.posterior).from_arrays(values))
        return record

    def _encoded_extra(self, vectors: dict[str, Tensor], server_round: int) -> ArrayRecord:
        try:
            return self._extra_out.encode({name: value.to(self.dtype) for name, value in vectors.items()})[0]
        except ValueError as error:
            raise RunFailed(f"round {server_round}: the server's {error}") from error

    def _counted(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies, with their size added to the tally: whatever becomes of them, they were sent."""
        for reply in replies:
            counted: Any = 0
            if self._folds and not reply.has_error() and "posterior" not in reply.content:  # by the worker
                counted = next((record["bytes"] for record in reply.content.values() if "bytes" in record), 0)
            self._tally.up += counted or message_bytes(reply)
            yield reply

    def _read_all(
        self, replies: Iterable[Message], server_round: int
    ) -> Iterator[tuple[int, Read[Posterior] | ValueError]]:
        """Clients in order, with their checked replies or what is wrong with them."""
        for client, reply in in_order(self._tally.sampled, self._counted(replies)):
            try:
                if reply is None:
                    raise wire.BadMessage("no reply before the timeout")
                read = self._read(reply, server_round, client)
                self._outliers.check_examples(client, read.metrics["num-examples"])
            except ValueError as error:
                yield client, error
            else:
                yield client, read

    def _absorb(self, sums: GroupSums, reply: Message, server_round: int) -> dict[str, float]:
        """Check a reply before any state changes, then add it to ``sums``.

        Raises:
            wire.BadMessage, ValueError: what is wrong with it.
        """
        return self._add(sums, self._read(reply, server_round), server_round)

    @timed("read")
    def _read(self, reply: Message, server_round: int, client: int | None = None) -> Read[Posterior]:
        """A reply (of ``client``), checked: see :meth:`bayesfed.federation.server.reading.Reader.checked`."""
        return self.reader.checked(reply, server_round, client, self.sent.arrays(), self._folds)

    def _add(self, sums: GroupSums, read: Read[Posterior] | ValueError, server_round: int) -> dict[str, float]:
        """Add a reply to ``sums``, or raise what is wrong with it; its metrics and the method's."""
        if isinstance(read, ValueError):
            raise read
        if read.reply is not None:
            with span("accumulate"):
                added = self.add(sums.group, read.reply)
            try:
                return read.metrics | plain_numbers(added, f"{type(self).__name__}.accumulate")
            except ValueError as error:  # the method's fault, and its sums have the reply already
                raise RunFailed(f"round {server_round}: {error}") from error
        if read.sums is not None:  # of its whole group, checked and made by this run's own worker
            shapes = {name: tuple(value.shape) for name, value in sums.total.items()}
            sums.add_whole(wire.unpack(read.sums, shapes, torch.float64, copy=False))
        return read.metrics

    def _lose(self, server_round: int, client: int, reason: str) -> None:
        """A sampled client whose reply never counts (simulated): it is not asked to work."""
        del self._tally.sampled[client]
        self._tally.failed[client] = reason
        if self._callbacks:
            self._callbacks.client_done(server_round, client, None, reason)

    def _report(self, server_round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        if metrics is None:
            log.warning("round %d: client %d left out: %s", server_round, client, reason)
        if self._callbacks:
            self._callbacks.client_done(server_round, client, metrics, reason)
