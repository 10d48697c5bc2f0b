"""What a client does with a message: check it, solve the local problem, keep the site, reply."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import ClassVar, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from bayesfed import accelerate, wire
from bayesfed.errors import InputError
from bayesfed.families import FAMILIES, ExponentialFamily
from bayesfed.federation.client.assignment import Assignment, LocalSettings
from bayesfed.federation.client.contribution import Contribution, Line, Narrow, Transform
from bayesfed.federation.client.memory import Memory
from bayesfed.federation.client.questions import QUESTIONS, Question, asked
from bayesfed.federation.client.sites import DiskSites, Record, SiteStore
from bayesfed.federation.client.solution import checked
from bayesfed.federation.local import LocalProblem, LocalSolution, Solver
from bayesfed.problem import Problem
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.model_state import Constants
from bayesfed.profiling import span
from bayesfed.wire.flower_version import error_reply

log = getLogger("bayesfed")


class Trainer:
    """Client side of all strategies whose local problem is :class:`bayesfed.federation.local.LocalProblem`.

    With damping gamma > 0 the client keeps a site and, after solving,

        eta_k <- eta_k + gamma rho (lambda_k - lambda_g)

    in float64 from what the message and its own reply decode to, so that the server's ``sum_k eta_k`` agrees to
    rounding (docs/method.md 2). For point estimates the step is ``gamma proximal (w_k - w_g)``.

    A method that needs more of its clients subclasses this and names the subclass as its strategy's ``client``: vectors
    that travel besides posteriors are named in ``received`` and ``returned``, :meth:`pose` changes the local problem,
    :meth:`answer` what is uploaded, and :meth:`settle` what is kept, as durable as the site.

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
        transforms: what every contribution goes through before it is encoded, in this order.
    """

    received: ClassVar[tuple[str, ...]] = ()  # names of further vectors (P,) in messages
    returned: ClassVar[tuple[str, ...]] = ()  # and in replies
    remembers: ClassVar[bool] = False  # whether `settle` keeps something
    questions: ClassVar[Mapping[str, Question]] = QUESTIONS  # what it answers besides training

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
        transforms: Sequence[Transform] = (),
    ):
        self.name, self.family, self.solver = name, FAMILIES[family], solver
        self.problem, self.seed, self.dtype = problem, seed, dtype
        self.sites = DiskSites(sites) if isinstance(sites, Path) else sites
        self.model = FlatModel(problem.build_model(seed), dtype, device)
        accelerate.prepare(self.model)
        self.initial = self.model.vector.clone()
        self.constants = Constants(self.model, problem.model)
        self.line = Line(self.family, self.model.dim, dtype, wire_format, self.received, self.returned)
        self.transforms: tuple[Transform, ...] = (*transforms, Narrow(dtype))

    # -- what a method may change -------------------------------------------------------------------------------------

    def pose(self, assignment: Assignment) -> LocalProblem:
        """The problem to solve, from ``assignment.problem`` and what the message and the client's state say."""
        return assignment.problem

    def answer(self, assignment: Assignment, solution: LocalSolution) -> Contribution:
        """What to upload: a posterior, the vectors named in ``returned``, and metrics besides the solution's."""
        return Contribution(solution.posterior)

    def settle(self, assignment: Assignment, solution: LocalSolution, sent: Contribution) -> Record:
        """What to keep for the next round; ``sent`` is the contribution as the server decodes it."""
        return {}

    # -- messages -----------------------------------------------------------------------------------------------------

    def query(self, message: Message, context: Context) -> Message:
        """Who this node is: its partition id and number of examples; and what all clients' data have in common."""
        client = self._partition(context)
        size = len(self.problem.clients[client])
        info = ConfigRecord({"partition-id": client, "num-examples": size, **self.problem.shape})
        return Message(RecordDict({"client": info}), reply_to=message)

    def train(self, message: Message, context: Context) -> Message:
        """Solve the local problem posed by ``message`` and reply with the local posterior."""
        started = time.perf_counter()
        assignment = self._read(message, context)
        return self._reply(assignment, self._solve(assignment), started)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Answer the question that ``message`` names: numbers only, and keep nothing (:mod:`.questions`)."""
        question, parameters = asked(message.content.get("question"), self.questions)
        assignment = self._read(message, context)
        answer = question(self.problem, assignment, lambda: self._solve(assignment), parameters)
        metrics = MetricRecord({**answer, "round": assignment.settings.round})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def train_many(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """What :meth:`train` replies to each message, or an error reply where it raises.

        Solved side by side if the solver can. If that fails, for whatever reason, the clients are trained one by one,
        so that only those at fault fail. The metric ``seconds`` of clients solved side by side is an
        equal share of the time.
        """
        started = time.perf_counter()
        replies: dict[int, Message] = {}
        assignments: dict[int, Assignment] = {}
        for place, (message, context) in enumerate(zip(messages, contexts, strict=True)):
            with _answered(message, place, replies):
                assignments[place] = self._read(message, context)
        solutions = dict(zip(assignments, self._solve_many(list(assignments.values())), strict=False))
        share = (time.perf_counter() - started) / max(len(assignments), 1)
        for place, assignment in assignments.items():
            began = time.perf_counter() - (share if solutions else 0.0)
            with _answered(assignment.message, place, replies):
                replies[place] = self._reply(assignment, solutions.get(place) or self._solve(assignment), began)
        return [replies[place] for place in range(len(messages))]

    def _read(self, message: Message, context: Context) -> Assignment:
        """The local problem that a message poses."""
        client = self._partition(context)
        settings = LocalSettings.parse(message.content.get("method"), self.name)
        values = cast(ConfigRecord, message.content["method"])
        server, vectors = self.line.decode(message.content)

        keeps_site = settings.damping > 0 and (isinstance(server, ExponentialFamily) or settings.proximal > 0)
        stateful = keeps_site or self.remembers or bool(getattr(self.solver, "keep_momentum", False))
        rounds = settings.round, settings.accepted, settings.durable, settings.older
        zero = server.zero(server.mean.to(torch.float64)) if keeps_site else None
        memory = Memory.of(self.sites.open(client, *rounds) if stateful else None, zero)

        device, data = self.model.vector.device, self.problem.clients[client]
        problem = LocalProblem(
            model=self.model,
            initial=self.initial,
            data=data,
            likelihood=self.problem.likelihood,
            server=server.to(device=device),
            site=None if memory.site is None else memory.site.to(device=device),
            rho=settings.rho,
            temperature=settings.temperature,
            proximal=settings.proximal,
            learn_precision=settings.learn_precision,
            round=settings.round,
            client=client,
            seed=self.seed,
            lr_factor=settings.lr_factor,
            memory={name: value.to(device) for name, value in memory.solver.items()},
            loss_scale=settings.size_scale * len(data) or 1.0,
            work=settings.work,
        )
        assignment = Assignment(message, settings, server, memory, stateful, problem, values, vectors)
        posed = self.pose(assignment)
        self.solver.require(posed)
        return replace(assignment, problem=posed)

    def _solve(self, assignment: Assignment) -> LocalSolution:
        problem = assignment.problem
        with self.constants.unchanged(), problem.keyed_dropout(), span("solve"):
            return checked(self.solver.solve(problem), problem, self.solver)

    def _solve_many(self, assignments: list[Assignment]) -> list[LocalSolution]:
        """The solutions of all of them; none if they have to be solved one by one."""
        if not self.solver.batches or len(assignments) < 2:
            return []
        problems = [assignment.problem for assignment in assignments]
        try:
            with self.constants.unchanged(), span("solve"):
                solutions = self.solver.solve_many(problems)
            return [checked(s, problem, self.solver) for s, problem in zip(solutions, problems, strict=True)]
        except Exception as error:  # one client's failure must not become that of the others
            log.warning("%d clients are trained one by one: %s: %s", len(problems), type(error).__name__, error)
            return []

    def _reply(self, assignment: Assignment, solution: LocalSolution, started: float) -> Message:
        """Send what the client contributes, and keep what follows from it as the server will see it."""
        settings, problem, server = assignment.settings, assignment.problem, assignment.server
        contribution = self.answer(assignment, solution)
        if not isinstance(contribution, Contribution):
            returned = type(contribution).__name__
            raise ValueError(f"{type(self).__name__}.answer must return a Contribution, not {returned}")
        contribution = replace(contribution, metrics={**solution.metrics, **contribution.metrics})
        for transform in self.transforms:
            contribution = transform(contribution, assignment)
        arrays, sent = self.line.encode(contribution, server)
        metrics = {**sent.metrics, "num-examples": len(problem.data), "client": problem.client, "round": settings.round}
        with span("dual"):
            step = settings.damping * (settings.rho if isinstance(server, ExponentialFamily) else settings.proximal)
            memory = assignment.memory.moved(settings.dual, sent.posterior, server, step)
        if memory.site is not None:
            metrics["dual-norm"] = float(memory.site.norm())
        state = self.settle(assignment, solution, sent) if self.remembers else {}
        memory = replace(memory, state=state, solver=solution.memory)
        memory.check()
        if assignment.stateful:
            self.sites.save(problem.client, settings.round, memory.record())
        metrics["seconds"] = time.perf_counter() - started
        content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
            **arrays,
            "metrics": MetricRecord(dict(metrics)),
        }
        return Message(RecordDict(content), reply_to=assignment.message)

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
