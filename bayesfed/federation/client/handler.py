"""What a client does with a message: check it, solve the local problem, keep the site, reply."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from bayesfed import wire
from bayesfed.accelerate.undecorated import spare_dynamo
from bayesfed.errors import InputError
from bayesfed.evaluation import evaluate
from bayesfed.families import FAMILIES, ExponentialFamily, NaturalParameters
from bayesfed.families.natural import all_finite
from bayesfed.federation import duals
from bayesfed.federation.client.sites import DiskSites, Record, SiteStore
from bayesfed.federation.client.solution import checked
from bayesfed.federation.local import LocalProblem, LocalSolution, Posterior, Solver
from bayesfed.problem import Problem
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.model_check import Constants
from bayesfed.profiling import span
from bayesfed.wire.flower_version import error_reply

log = getLogger("bayesfed")
STATE = "state."  # before the names of what `Trainer.settle` keeps, in a client's record


@dataclass(frozen=True)
class Method:
    """The plain values of a TRAIN message.

    Attributes:
        name: strategy that sent it; must be the one this client is configured for.
        round: communication round, from 1.
        accepted: last round in which the server accepted this client's reply; 0 = never.
        durable: the same, as of the server's last checkpoint.
        older: the same, as of the checkpoint before that.
        rho, damping, temperature, proximal, learn_precision: of the local problem and the dual step.
        lr_factor: learning-rate schedule at this round.
        dual: what the dual moves along, see :func:`bayesfed.federation.duals.coordinates`.
        size_scale: weight of the *summed* loss of point estimates; 0: the mean loss has weight 1.
        work: share of its local steps that the client does, see :class:`bayesfed.system.System`.
    """

    name: str
    round: int
    accepted: int
    durable: int
    rho: float
    damping: float
    temperature: float
    proximal: float
    learn_precision: bool
    lr_factor: float
    dual: str = "natural"
    size_scale: float = 0.0
    work: float = 1.0
    older: int = 0

    @classmethod
    def parse(cls, record: object) -> Method:
        """Read and check the values.

        Raises:
            wire.BadMessage: a value is missing, of the wrong type or out of range.
        """
        kinds = {"str": str, "int": int, "float": float, "bool": bool}
        optional = {
            n for n in cls.__annotations__ if hasattr(cls, n) and isinstance(record, ConfigRecord) and n not in record
        }
        values: dict[str, Any] = {
            n: getattr(cls, n) if n in optional else wire.value(record, n, kinds[str(kind)])
            for n, kind in cls.__annotations__.items()
        }
        method = cls(**values)
        ranges = {
            "round": method.round >= 1,
            "accepted": 0 <= method.accepted < method.round,
            "durable": 0 <= method.durable <= method.accepted,
            "older": 0 <= method.older <= method.durable,
            "rho": math.isfinite(method.rho) and method.rho >= 0,
            "damping": 0 <= method.damping <= 1,
            "temperature": math.isfinite(method.temperature) and method.temperature > 0,
            "proximal": math.isfinite(method.proximal) and method.proximal >= 0,
            "lr_factor": math.isfinite(method.lr_factor) and method.lr_factor >= 0,
            "dual": method.dual in duals.KINDS,
            "size_scale": math.isfinite(method.size_scale) and method.size_scale >= 0,
            "work": 0 < method.work <= 1,
        }
        for name, good in ranges.items():
            if not good:
                raise wire.BadMessage(f"value '{name}' is {getattr(method, name)!r}, out of range")
        return method


@dataclass(frozen=True)
class Task:
    """A message as a local problem.

    Attributes:
        message: to reply to.
        method: its values.
        server: ``q_g`` as received, on the CPU.
        site: ``eta_k`` in float64, on the CPU; None if there are no duals.
        stateful: whether the client keeps a record of this round.
        local: the problem to solve.
        settings: all plain values of the message, for handlers that read more of them.
        extra: the further vectors of the message, in the model's dtype, on the CPU.
        state: what :meth:`Trainer.settle` kept in the client's last accepted round.
    """

    message: Message
    method: Method
    server: Posterior
    site: NaturalParameters | None
    stateful: bool
    local: LocalProblem
    settings: Mapping[str, Any]
    extra: Record
    state: Record


class Trainer:
    """Client side of all strategies whose local problem is :class:`bayesfed.federation.local.LocalProblem`.

    With damping gamma > 0 the client keeps a site and, after solving,

        eta_k <- eta_k + gamma rho (lambda_k - lambda_g)

    in float64 from what the message and its own reply decode to, so that the server's ``sum_k eta_k`` agrees to rounding (spec 1.3).
    For point estimates the step is ``gamma proximal (w_k - w_g)``.

    A method that needs more of its clients subclasses this and names the subclass as its strategy's ``client``: vectors that travel besides
    posteriors are named in ``received`` and ``returned``, :meth:`pose` changes the local problem, :meth:`answer` what is
    uploaded, and :meth:`settle` what is kept, as durable as the site.

    Args:
        name: the strategy this client takes messages from.
        family: name of the posterior family.
        solver: local solver.
        problem: data, model, likelihood.
        sites: store of the clients' records, or a folder for one.
        seed: the run's seed.
        dtype: of the model and of the arrays on the wire.
        device: where the model is trained.
        wire_format: how posteriors travel, see :class:`bayesfed.wire.Codec`.
    """

    received: ClassVar[tuple[str, ...]] = ()  # names of further vectors (P,) in messages
    returned: ClassVar[tuple[str, ...]] = ()  # and in replies
    remembers: ClassVar[bool] = False  # whether `settle` keeps something

    def __init__(
        self,
        *,
        name: str,
        family: str,
        solver: Solver,
        problem: Problem,
        sites: SiteStore | Path,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        wire_format: str = "full",
    ):
        spare_dynamo()
        self.name, self.family, self.solver = name, FAMILIES[family], solver
        self.problem, self.seed, self.dtype = problem, seed, dtype
        self.sites = DiskSites(sites) if isinstance(sites, Path) else sites
        self.model = FlatModel(problem.build_model(seed), dtype, device)
        self.initial = self.model.vector.clone()
        self.constants = Constants(self.model, problem.model)
        self._sent: object = None  # the posterior received last, and what it decodes to
        self._server: Posterior
        self.codec = wire.Codec(wire_format, self.family.array_shapes(self.model.dim), dtype)
        vector = (self.model.dim,)
        self._extra_in = wire.Codec(wire_format, dict.fromkeys(self.received, vector), dtype)
        self._extra_out = wire.Codec(wire_format, dict.fromkeys(self.returned, vector), dtype)
        self._extra: tuple[object, Record] = (None, {})

    # -- what a method may change ---------------------------------------------------------------------------------------

    def pose(self, task: Task) -> LocalProblem:
        """The problem to solve, from ``task.local`` and what the message and the client's state say."""
        return task.local

    def answer(self, task: Task, solution: LocalSolution) -> tuple[Posterior, Record]:
        """What to upload: a posterior, and the vectors named in ``returned``."""
        return solution.posterior, {}

    def settle(self, task: Task, solution: LocalSolution, sent: Posterior, extra: Record) -> Record:
        """What to keep for the next round; ``sent`` and ``extra`` are :meth:`answer` as the server decodes it."""
        return {}

    # -- messages -------------------------------------------------------------------------------------------------------

    def query(self, message: Message, context: Context) -> Message:
        """Who this node is: its partition id and number of examples; and what all clients' data have in common."""
        client = self._partition(context)
        size = len(self.problem.clients[client])
        info = ConfigRecord({"partition-id": client, "num-examples": size, **self.problem.shape})
        return Message(RecordDict({"client": info}), reply_to=message)

    def train(self, message: Message, context: Context) -> Message:
        """Solve the local problem posed by ``message`` and reply with the local posterior."""
        started = time.perf_counter()
        task = self._read(message, context)
        return self._reply(task, self._solve(task), started)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Personalize: solve the local problem as :meth:`train` would, keep nothing, and test the local posterior.

        The reply holds numbers only: ``num-examples`` (of the client's own test distribution), ``gradient-evaluations``, and the
        scores of :func:`bayesfed.evaluation.evaluate` as ``mean/...`` and ``bayes/...``.
        """
        task = self._read(message, context)
        client = task.local.client
        tests = self.problem.client_tests[client]
        if len(tests) == 0:
            raise ValueError("the test set has no example of this client's classes")
        solution = self._solve(task)
        posterior = solution.posterior.to(dtype=self.dtype, device=self.model.vector.device)
        scores = evaluate(
            self.model, posterior, tests, self.problem.likelihood,
            samples=wire.value(message.content["evaluation"], "samples", int),
            generator=task.local.generator("personalized", self.model.vector.device),
        )  # fmt: skip
        spent = {k: v for k, v in solution.metrics.items() if k == "gradient-evaluations"}
        metrics = MetricRecord({**scores, **spent, "num-examples": len(tests), "round": task.method.round})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def train_many(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """What :meth:`train` replies to each message, or an error reply where it raises; solved side by side if the solver can.

        If that fails, for whatever reason, the clients are trained one by one, so that only those at fault fail. The metric
        ``seconds`` of clients solved side by side is an equal share of the time.
        """
        started = time.perf_counter()
        replies: dict[int, Message] = {}
        tasks: dict[int, Task] = {}
        for place, (message, context) in enumerate(zip(messages, contexts, strict=True)):
            with _answered(message, place, replies):
                tasks[place] = self._read(message, context)
        solutions = dict(zip(tasks, self._solve_many(list(tasks.values())), strict=False))
        share = (time.perf_counter() - started) / max(len(tasks), 1)
        for place, task in tasks.items():
            began = time.perf_counter() - (share if solutions else 0.0)
            with _answered(task.message, place, replies):
                replies[place] = self._reply(task, solutions.get(place) or self._solve(task), began)
        return [replies[place] for place in range(len(messages))]

    def _read(self, message: Message, context: Context) -> Task:
        """The local problem that a message poses."""
        client = self._partition(context)
        method = Method.parse(message.content.get("method"))
        if method.name != self.name:
            raise wire.BadMessage(
                f"this client is set up for strategy '{self.name}', the message is of '{method.name}'"
            )
        sent = message.content.get("posterior")
        if sent is None or sent is not self._sent:  # engines give all clients of a round the same object
            self._server = self.family.from_arrays(self.codec.decode(sent))
            self._sent = sent
        server = self._server
        settings = message.content["method"]

        keeps_site = method.damping > 0 and (isinstance(server, ExponentialFamily) or method.proximal > 0)
        stateful = keeps_site or self.remembers or bool(getattr(self.solver, "keep_momentum", False))
        record = (
            self.sites.open(client, method.round, method.accepted, method.durable, method.older) if stateful else None
        )
        memory = dict(record) if record else {}
        state = {n.removeprefix(STATE): memory.pop(n) for n in list(memory) if n.startswith(STATE)}
        site: NaturalParameters | None = None
        if keeps_site:
            site = server.zero(server.mean.to(torch.float64))
            if record:
                site = NaturalParameters(site.family, memory.pop("site.first"), memory.pop("site.second"))

        device = self.model.vector.device
        local = LocalProblem(
            model=self.model,
            initial=self.initial,
            data=self.problem.clients[client],
            likelihood=self.problem.likelihood,
            server=server.to(device=device),
            site=None if site is None else site.to(device=device),
            rho=method.rho,
            temperature=method.temperature,
            proximal=method.proximal,
            learn_precision=method.learn_precision,
            round=method.round,
            client=client,
            seed=self.seed,
            lr_factor=method.lr_factor,
            memory={name: value.to(device) for name, value in memory.items()},
            loss_scale=method.size_scale * len(self.problem.clients[client]) or 1.0,
            work=method.work,
        )
        extra = self._extra_of(message)
        task = Task(message, method, server, site, stateful, local, dict(settings), extra, state)
        posed = self.pose(task)
        self.solver.require(posed)
        return replace(task, local=posed)

    def _extra_of(self, message: Message) -> Record:
        """The further vectors of a message; decoded once for all clients of a round that share them."""
        if not self.received:
            return {}
        record = message.content.get("extra")
        if record is None or record is not self._extra[0]:
            self._extra = record, self._extra_in.decode(record)
        return self._extra[1]

    def _solve(self, task: Task) -> LocalSolution:
        with self.constants.unchanged(), task.local.keyed_dropout(), span("solve"):
            return checked(self.solver.solve(task.local), task.local, self.solver)

    def _solve_many(self, tasks: list[Task]) -> list[LocalSolution]:
        """The solutions of all tasks; none if they have to be solved one by one."""
        if not self.solver.batches or len(tasks) < 2:
            return []
        try:
            with self.constants.unchanged(), span("solve"):
                solutions = self.solver.solve_many([task.local for task in tasks])
            return [checked(s, task.local, self.solver) for s, task in zip(solutions, tasks, strict=True)]
        except Exception as error:  # one client's failure must not become that of the others
            log.warning("%d clients are trained one by one: %s: %s", len(tasks), type(error).__name__, error)
            return []

    def _reply(self, task: Task, solution: LocalSolution, started: float) -> Message:
        """Keep the site and the solver's memory, and send the posterior back."""
        method, server, site = task.method, task.server, task.site
        chosen, further = self.answer(task, solution)
        solved = chosen.to(dtype=self.dtype, device="cpu")
        arrays, values = self.codec.encode(solved.arrays(), server.arrays())
        posterior = type(solved)(**values)  # as the server will see it; what is wrong with it is for the server to say
        who = {"client": task.local.client, "round": method.round}
        metrics = {**solution.metrics, "num-examples": len(task.local.data), **who}
        kept = {name: value.cpu() for name, value in solution.memory.items()}
        content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {"posterior": arrays}
        extra: Record = {}
        if self.returned:
            vectors = {name: value.to(dtype=self.dtype, device="cpu") for name, value in further.items()}
            content["extra"], extra = self._extra_out.encode(vectors)
        if site is not None:
            with span("dual"):
                step = method.damping * (method.rho if isinstance(server, ExponentialFamily) else method.proximal)
                own, other = (duals.coordinates(method.dual, q) for q in (posterior, server))
                site = site.clone().add_(duals.change(own, other), step)
            if not bool(site.isfinite()):  # refuse it here: once accepted it would stay in the server's sum
                raise wire.Diverged("the site is not finite; use a smaller damping or learning rate, or a larger rho")
            kept |= {"site.first": site.linear, "site.second": site.quadratic}
            metrics["dual-norm"] = float(site.norm())
        if self.remembers:
            state = self.settle(task, solution, posterior, extra)
            if not all(all_finite(value) for value in state.values()):
                raise wire.Diverged("the client's state is not finite; use a smaller learning rate")
            kept |= {f"{STATE}{name}": value for name, value in state.items()}
        if task.stateful:
            self.sites.save(task.local.client, method.round, kept)
        metrics["seconds"] = time.perf_counter() - started
        content["metrics"] = MetricRecord(dict(metrics))
        return Message(RecordDict(content), reply_to=task.message)

    def _partition(self, context: Context) -> int:
        client = context.node_config.get("partition-id")
        if client is None:
            raise wire.BadMessage("the node does not say which client it is: it needs partition-id in its node config")
        if not isinstance(client, int) or not 0 <= client < len(self.problem.clients):
            fix = f"must be one of the {len(self.problem.clients)} clients of this problem, which count from 0"
            raise InputError("partition-id", client, fix)
        return client


@contextmanager
def _answered(message: Message, place: int, replies: dict[int, Message]) -> Iterator[None]:
    """An exception in the block becomes the reply at ``place``."""
    try:
        yield
    except Exception as error:  # whatever a client raises is that client's failure
        replies[place] = error_reply(message, error)
