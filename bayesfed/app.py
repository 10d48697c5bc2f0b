"""The Flower apps: the same ServerApp and ClientApp for every engine and for deployment."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from bayesfed import profiling
from bayesfed.config import build
from bayesfed.problem import Problem, build_problem
from bayesfed.wire import DTYPES

Plain = dict[str, Any]


def plain(cfg: DictConfig) -> Plain:
    """A configuration as plain values that can travel to workers (without Hydra's own section)."""
    values = OmegaConf.to_container(OmegaConf.create({k: v for k, v in cfg.items() if k != "hydra"}), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def problem_of(config: Plain) -> Problem:
    """The problem a configuration describes; loaded once per process."""
    keys = ("data", "partition", "model", "likelihood", "seed")
    return _problem(json.dumps({**{k: config[k] for k in keys}, "validation": config["eval"]["validation"]}))


@lru_cache(maxsize=2)
def _problem(text: str) -> Problem:
    config = json.loads(text)
    return build_problem(config, config["seed"], config["validation"])


def device_of(config: Plain) -> torch.device:
    """The device a configuration means on this machine (inside a Ray worker: the one Ray assigned to it)."""
    name = config["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@lru_cache(maxsize=2)
@profiling.timed("start-up")
def _trainer(text: str, sites: str) -> Any:
    config = json.loads(text)
    cfg = OmegaConf.create(config)
    return get_class(cfg.strategy.get("handler", cfg.handler))(
        name=cfg.strategy.name,
        family=build(cfg.strategy, "strategy").family,
        solver=build(cfg.client, "client"),
        problem=problem_of(config),
        sites=Path(sites),
        seed=cfg.seed,
        dtype=DTYPES[cfg.dtype],
        device=device_of(config),
    )


@lru_cache(maxsize=2)
def _profiler(text: str, sites: str) -> profiling.Profiler | None:
    """What records the clients' work in this process, if the configuration asks for it."""
    config = json.loads(text)
    return profiling.Profiler.on(device_of(config)) if config.get("profile") else None


def client_app(config: Plain, sites: Path | str) -> ClientApp:
    """The ClientApp of a run: which solver it uses is decided here, from local configuration, never by a message.

    Args:
        config: the composed configuration.
        sites: folder for the durable sites of the clients that this process serves.
    """
    text, folder = json.dumps(config), str(sites)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        profiler = _profiler(text, folder)
        with profiling.recording(profiler):
            trainer = _trainer(text, folder)
            with profiling.span("train"):
                reply = trainer.train(message, context)
        if profiler is not None:
            _add_times(reply, profiler)
        return reply

    @app.query()
    def query(message: Message, context: Context) -> Message:
        with profiling.recording(_profiler(text, folder)):
            trainer = _trainer(text, folder)
        return trainer.query(message, context)

    return app


def _add_times(reply: Message, profiler: profiling.Profiler) -> None:
    """Let the reply's metrics say what this process did since its last reply, and which process it is."""
    metrics = reply.content.get("metrics")
    if isinstance(metrics, MetricRecord):
        metrics.update({**profiler.drain(), "worker": profiling.worker_number()})
