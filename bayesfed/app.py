"""The Flower apps: the same ServerApp and ClientApp for every engine and for deployment."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from logging import getLogger
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from omegaconf import DictConfig, OmegaConf

from bayesfed import accelerate, profiling
from bayesfed.configured import build
from bayesfed.errors import InputError
from bayesfed.host import own_packages
from bayesfed.problem import Problem
from bayesfed.problem.build import build_problem, origins
from bayesfed.problem.own_client import place
from bayesfed.wire import DTYPES
from bayesfed.wire.flower_version import error_reply

log = getLogger("bayesfed")
Plain = dict[str, Any]


def plain(cfg: DictConfig) -> Plain:
    """A configuration as plain values that can travel to workers (without Hydra's own section)."""
    values = OmegaConf.to_container(OmegaConf.create({k: v for k, v in cfg.items() if k != "hydra"}), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def problem_of(config: Plain) -> Problem:
    """The problem a configuration describes; loaded once per process, and again when a class or a file it is made of
    has changed."""
    keys = ("data", "partition", "model", "likelihood", "seed")
    own = config.get("own_client")  # on a SuperNode that holds data of its own
    described = {**{k: config[k] for k in keys}, "shift": config.get("shift"), "own": own}
    described |= {"dtype": config["dtype"], "validation": config["eval"]["validation"]}
    return _problem(json.dumps(described), origins(config))


def note_unused_partition(cfg: DictConfig, problem: Problem) -> None:
    """Say so where the user chose a partition and the data's client column decides who holds what."""
    overrides = cfg.hydra.overrides.task if "hydra" in cfg else []
    chosen = [text for text in overrides if text.lstrip("+").startswith(("partition=", "partition."))]
    if problem.split_by_data and chosen and cfg.partition.name != "natural_id":
        log.warning("the data's client column decides the split; %s has no effect", " ".join(chosen))


@lru_cache(maxsize=2)
def _problem(text: str, made_of: tuple[object, ...]) -> Problem:
    config = json.loads(text)
    problem = build_problem(config, config["seed"], config["validation"])
    return problem if config["own"] is None else place(problem, config["own"])


def device_of(config: Plain) -> torch.device:
    """The device a configuration means on this machine (inside a Ray worker: the one Ray assigned to it).

    Raises:
        InputError: it has none.
    """
    name = config["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError("device", name, "no name of a device; use cpu, cuda, cuda:0 ... or auto") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError("device", name, f"PyTorch sees {count} CUDA devices here; use device=cpu or device=auto")
    return device


@lru_cache(maxsize=2)
@profiling.timed("start-up")
def _trainer(text: str, sites: str, app: str) -> Any:
    own_packages()
    config = json.loads(text)
    cfg = OmegaConf.create(config)
    strategy = build(cfg.strategy, "strategy", cfg.seed)
    return strategy.client(
        name=cfg.strategy.name,
        family=strategy.family,
        solver=build(cfg.client, "client", cfg.seed),
        problem=problem_of(config),
        sites=Path(sites),
        seed=cfg.seed,
        dtype=DTYPES[cfg.dtype],
        device=device_of(config),
        wire_format=cfg.wire,
    )


def _set_up(mode: str, *key: str) -> Any:
    """This process's handler, in a process that computes as the run says: Ray's and Flower's workers and SuperNodes
    start here."""
    accelerate.start(mode)
    return _trainer(*key)


@lru_cache(maxsize=2)
def _strategy(text: str, sites: str, app: str) -> Any:
    """The strategy, to sum replies where they are made."""
    cfg, trainer = OmegaConf.create(json.loads(text)), _trainer(text, sites, app)
    strategy = build(cfg.strategy, "strategy", cfg.seed)
    strategy.setup(
        trainer.initial.cpu(), len(trainer.problem.clients), cfg.seed, cfg.get("wire", "full"), cfg.get("limits")
    )
    return strategy


class SimulationApp(ClientApp):
    """A ClientApp that can also serve several clients at once and sum their replies, for engines that run many in one
    process.

    Args:
        trainer: makes, or finds, this process's handler.
        strategy: makes, or finds, a strategy like the server's.
        profiler: records this process's work.
    """

    def __init__(
        self, trainer: Callable[[], Any], strategy: Callable[[], Any], profiler: profiling.Profiler | None = None
    ):
        super().__init__()
        self._trainer, self._strategy, self._profiler = trainer, strategy, profiler

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply. Whatever a client raises is that client's failure, and here, where server and clients are one
        party, all of it is told."""
        try:
            return self.serve(message, context)
        except Exception as error:
            return error_reply(message, error)

    def serve(self, message: Message, context: Context) -> Message:
        """The reply, or what the client raises."""
        return super().__call__(message, context)

    def prepare(self) -> None:
        """Load data and model before the first message comes."""
        with profiling.recording(self._profiler):
            self._trainer()

    def fold(self, messages: Sequence[Message], replies: Sequence[Message]) -> list[Message]:
        """The replies of a group of clients with one sum instead of posteriors, see ``FederatedStrategy.fold``."""
        with profiling.recording(self._profiler), profiling.span("fold"):
            return self._strategy().fold(messages, replies)

    def train_many(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """The replies in the order of the messages; a client that fails gives an error reply.

        A handler that has no ``train_many``, or fails in it, gets the messages one by one.
        """
        try:
            with profiling.recording(self._profiler):
                trainer = self._trainer()
                if hasattr(trainer, "train_many"):
                    with profiling.span("train"):
                        replies = trainer.train_many(messages, contexts)
                    return self._timed(replies)
        except Exception as error:
            log.warning("%d messages are served one by one: %s: %s", len(messages), type(error).__name__, error)
        return [self(message, context) for message, context in zip(messages, contexts, strict=True)]

    def _timed(self, replies: list[Message]) -> list[Message]:
        """Let the metrics of the first reply that has some say what this process did since the last time, and which one
        it is."""
        if self._profiler is not None:
            for reply in replies:
                metrics = None if reply.has_error() else reply.content.get("metrics")
                if isinstance(metrics, MetricRecord):
                    metrics.update({**self._profiler.drain(), "worker": profiling.worker_number()})
                    break
        return replies


@lru_cache(maxsize=2)
def _profiler(text: str, app: str) -> profiling.Profiler | None:
    """What records the clients' work in this process, if the configuration asks for it."""
    config = json.loads(text)
    return profiling.Profiler.on(device_of(config)) if config.get("profile") else None


def client_app(config: Plain, sites: Path | str) -> SimulationApp:
    """The ClientApp of a run: which solver it uses is decided here, from local configuration, never by a message.

    Args:
        config: the composed configuration.
        sites: folder for the durable sites of the clients that this process serves.
    """
    # the last part is this app's own: what an earlier run of this process read or built is not taken for this run's.
    # (Copies of the app that travel to another process share what they build there.)
    key = json.dumps(config), str(Path(sites).resolve()), uuid4().hex
    trainer = partial(_set_up, config["accelerate"], *key)
    app = SimulationApp(trainer, partial(_strategy, *key), _profiler(key[0], key[2]))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with profiling.recording(app._profiler):
            handler = trainer()
            with profiling.span("train"):
                reply = handler.train(message, context)
        return app._timed([reply])[0]

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        with profiling.recording(app._profiler):
            handler = trainer()
            with profiling.span("evaluation"):
                return handler.evaluate(message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        with profiling.recording(app._profiler):
            handler = trainer()
        return handler.query(message, context)

    return app
