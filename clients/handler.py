"""What a client does with a message: check it, solve the local problem, keep the site, reply."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from bayesfed import seeding, wire
from bayesfed.families import FAMILIES, Gaussian, NaturalParameters
from bayesfed.problem import Problem
from bayesfed.problem.flat import FlatModel
from bayesfed.profiling import span
from clients.local import LocalProblem, Solver
from clients.sites import DiskSites, SiteStore


@dataclass(frozen=True)
class Method:
    """The plain values of a TRAIN message.

    Attributes:
        name: strategy that sent it; must be the one this client is configured for.
        round: communication round, from 1.
        accepted: last round in which the server accepted this client's reply; 0 = never.
        durable: the same, as of the server's last checkpoint.
        rho, damping, temperature, proximal, learn_precision: of the local problem and the dual step.
        lr_factor: learning-rate schedule at this round.
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

    @classmethod
    def parse(cls, record: object) -> Method:
        """Read and check the values.

        Raises:
            wire.BadMessage: a value is missing, of the wrong type or out of range.
        """
        kinds = {"str": str, "int": int, "float": float, "bool": bool}
        values: dict[str, Any] = {n: wire.value(record, n, kinds[str(kind)]) for n, kind in cls.__annotations__.items()}
        method = cls(**values)
        ranges = {
            "round": method.round >= 1,
            "accepted": 0 <= method.accepted < method.round,
            "durable": 0 <= method.durable <= method.accepted,
            "rho": math.isfinite(method.rho) and method.rho >= 0,
            "damping": 0 <= method.damping <= 1,
            "temperature": math.isfinite(method.temperature) and method.temperature > 0,
            "proximal": math.isfinite(method.proximal) and method.proximal >= 0,
            "lr_factor": math.isfinite(method.lr_factor) and method.lr_factor >= 0,
        }
        for name, good in ranges.items():
            if not good:
                raise wire.BadMessage(f"value '{name}' is {getattr(method, name)!r}, out of range")
        return method


class Trainer:
    """Client side of all strategies whose local problem is :class:`clients.local.LocalProblem`.

    With damping gamma > 0 the client keeps a site and, after solving,

        eta_k <- eta_k + gamma rho (lambda_k - lambda_g)

    in float64 from the very arrays on the wire, so that the server's ``sum_k eta_k`` agrees to rounding (spec 1.3).

    Args:
        name: the strategy this client takes messages from.
        family: name of the posterior family.
        solver: local solver.
        problem: data, model, likelihood.
        sites: store of the clients' records, or a folder for one.
        seed: the run's seed.
        dtype: of the model and of the arrays on the wire.
        device: where the model is trained.
    """

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
    ):
        self.name, self.family, self.solver = name, FAMILIES[family], solver
        self.problem, self.seed, self.dtype = problem, seed, dtype
        self.sites = DiskSites(sites) if isinstance(sites, Path) else sites
        self.model = FlatModel(problem.build_model(seed), dtype, device)
        self.initial = self.model.vector.clone()
        shapes: dict[str, tuple[int, ...]] = {"mean": (self.model.dim,)}
        if issubclass(self.family, Gaussian):
            shapes["precision"] = tuple(self.family.precision_shape(self.model.dim))
        self.shapes = shapes

    def query(self, message: Message, context: Context) -> Message:
        """Who this node is: its partition id and number of examples."""
        client = self._partition(context)
        info = ConfigRecord({"partition-id": client, "num-examples": len(self.problem.clients[client])})
        return Message(RecordDict({"client": info}), reply_to=message)

    def train(self, message: Message, context: Context) -> Message:
        """Solve the local problem posed by ``message`` and reply with the local posterior."""
        started = time.perf_counter()
        client = self._partition(context)
        method = Method.parse(message.content.get("method"))
        if method.name != self.name:
            raise wire.BadMessage(
                f"this client is set up for strategy '{self.name}', the message is of '{method.name}'"
            )
        received = wire.unpack(message.content.get("posterior"), self.shapes, self.dtype)
        server = self.family.from_arrays(received)

        keeps_site = method.damping > 0 and isinstance(server, Gaussian)
        stateful = keeps_site or bool(getattr(self.solver, "keep_momentum", False))
        record = self.sites.open(client, method.round, method.accepted, method.durable) if stateful else None
        memory = dict(record) if record else {}
        site: NaturalParameters | None = None
        if keeps_site and isinstance(server, Gaussian):
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
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seeding.derive(self.seed, "dropout", client, method.round))
            with span("solve"):
                solution = self.solver.solve(local)

        posterior = solution.posterior.to(dtype=self.dtype, device="cpu")
        metrics = {**solution.metrics, "num-examples": len(local.data), "round": method.round}
        kept = {name: value.cpu() for name, value in solution.memory.items()}
        if site is not None and isinstance(server, Gaussian) and isinstance(posterior, Gaussian):
            with span("dual"):
                increment = posterior.to(torch.float64).natural - server.to(torch.float64).natural
                site = site.clone().add_(increment, method.damping * method.rho)
            if not bool(site.isfinite()):  # refuse it here: once accepted it would stay in the server's sum
                raise ValueError("the site is not finite; use a smaller damping or learning rate, or a larger rho")
            kept |= {"site.first": site.first, "site.second": site.second}
            metrics["dual-norm"] = float(site.norm())
        if stateful:
            self.sites.save(client, method.round, kept)
        metrics["seconds"] = time.perf_counter() - started
        content = RecordDict({"posterior": self._arrays(posterior), "metrics": MetricRecord(dict(metrics))})
        return Message(content, reply_to=message)

    @staticmethod
    def _arrays(posterior) -> ArrayRecord:
        return wire.pack(posterior.arrays())

    def _partition(self, context: Context) -> int:
        client = context.node_config.get("partition-id")
        if not isinstance(client, int) or not 0 <= client < len(self.problem.clients):
            raise wire.BadMessage(
                f"node config partition-id={client} is not one of the {len(self.problem.clients)} clients of this problem"
            )
        return client
