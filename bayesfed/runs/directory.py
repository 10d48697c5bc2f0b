"""The run directory: what a run leaves behind, and how it is written without tearing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bayesfed import commands
from bayesfed.configured import GROUPS
from bayesfed.errors import InputError
from bayesfed.foreign import plain_text
from bayesfed.lock import PARTIAL, reason
from bayesfed.runs.reading import MALFORMED, damaged, is_a, no_number, read_json, read_jsonl, read_text

LOGS: dict[str, dict[str, type]] = {  # <name>.jsonl, with the keys that every line has
    "rounds": {"round": int},
    "clients": {"round": int, "client": int, "accepted": bool},
    "client_tests": {"round": int, "client": int},
}
PACKAGES = ("bayesfed", "flwr", "torch", "ray", "hydra-core", "numpy")


class RunDirectory:
    """Paths and atomic writes of one run.

    Attributes:
        path: the folder; holds ``config.yaml``, ``rounds.jsonl``, ``clients.jsonl``, ``summary.json``,
            ``posterior.safetensors``, ``checkpoint/`` and ``figures/``.
        lock: descriptor of the lock file (:func:`bayesfed.lock.alone`), for child processes to inherit; -1 = not
            locked.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.lock = -1
        self._logs: dict[str, TextIO] = {}

    def create(self, cfg: DictConfig) -> None:
        """Begin a new run; the caller holds the lock.

        Raises:
            InputError: the folder already holds a run, or can't be written.
        """
        if os.path.lexists(self.config_path):
            fix = f"continue it with {self.resume}, or name another folder"
            if self.is_run and not self.resumable:
                fix = "name another folder, or remove it"
            raise InputError("hydra.run.dir", self.path, f"already holds a run; {fix}")
        self.write_config({key: value for key, value in cfg.items() if key not in ("hydra", "resume")}, "hydra.run.dir")

    def write_config(self, cfg: Any, field: str) -> None:
        """Write ``config.yaml``.

        Raises:
            InputError: for the directory named by ``field``: it can't be written.
        """
        try:
            values = {key: value for key, value in cfg.items() if key != "rounds"}
            values["rounds"] = cfg["rounds"]  # last: a file that was cut off lacks it
            write_text(self.config_path, OmegaConf.to_yaml(OmegaConf.create(values), resolve=True))
        except OSError as error:
            raise InputError(field, self.path, f"can't be written ({reason(error)})") from error

    @classmethod
    def open(cls, path: Path | str, field: str = "resume") -> RunDirectory:
        """An existing run.

        Raises:
            InputError: the folder holds no run; it was named by ``field``.
        """
        run = cls(Path(path).expanduser())
        if not run.is_run:
            raise InputError(
                field,
                plain_text(path),
                "is not a run directory (no config.yaml); bayesfed list FOLDER names those in a folder",
            )
        return run

    @property
    def is_run(self) -> bool:
        return os.path.isfile(self.config_path)

    @property
    def fresh(self) -> bool:
        """Whether the run ended before it left anything to go on with, or to lose: it begins again with round 0."""
        results = any(self.checkpoints.glob("server-*.safetensors")) or os.path.lexists(self.posterior_path)
        return not results and all(line["round"] < 1 for line in self.rounds())

    @property
    def resumable(self) -> bool:
        """Whether :func:`bayesfed.runs.launch.prepare` has something to go on with, as far as file names show."""
        try:
            return self.is_run and (any(self.checkpoints.glob("server-*.safetensors")) or self.fresh)
        except InputError:
            return False

    @property
    def resume(self) -> str:
        """The override that resumes the run."""
        return commands.override("resume", self.path)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def posterior_path(self) -> Path:
        return self.path / "posterior.safetensors"

    @property
    def deployment_path(self) -> Path:
        """Only runs of ``bayesfed deploy`` have it: ``run_dir`` as given there, and the ``overrides``."""
        return self.path / "deployment.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def sites(self) -> Path:
        return self.checkpoints / "sites"

    def stored(self) -> DictConfig:
        """``config.yaml`` as it is.

        Raises:
            InputError: it is damaged.
        """
        text = read_text(self.config_path) or ""
        if not text.endswith("\n"):
            raise damaged(self.config_path, "it is cut off")
        try:
            cfg = OmegaConf.create(text)
            values = OmegaConf.to_container(cfg, resolve=True)
        except (YAMLError, OmegaConfBaseException, *MALFORMED) as error:
            raise damaged(self.config_path, plain_text(str(error).splitlines()[0])) from error
        if not isinstance(values, dict):
            raise damaged(self.config_path, "it holds no settings")
        for group in GROUPS:
            for key in ("name", "_target_"):
                if not isinstance(values.get(group), dict) or not isinstance(values[group].get(key), str):
                    raise damaged(self.config_path, f"{group}.{key} is missing")
        if not is_a(values.get("rounds"), int):
            raise damaged(self.config_path, "rounds is not a whole number")
        assert isinstance(cfg, DictConfig)
        return cfg

    def config(self) -> DictConfig:
        """The configuration the run was started with (and last resumed with); keys that its bayesfed did not know have
        today's defaults.

        Raises:
            InputError: ``config.yaml`` is damaged.
        """
        from bayesfed.config import with_defaults  # imports torch, which `bayesfed list` has no use for

        return with_defaults(self.stored())

    def rounds(self) -> list[dict[str, Any]]:
        """``rounds.jsonl`` as a list."""
        return self.lines("rounds")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """``name``.jsonl, one of ``LOGS``, as a list.

        Raises:
            InputError: it is damaged.
        """
        records = read_jsonl(self.path / f"{name}.jsonl")
        for number, record in enumerate(records, 1):
            for key, kind in LOGS[name].items():
                if not is_a(record.get(key), kind):
                    fault = (
                        f"line {number} has no '{key}'"
                        if key not in record
                        else f"'{key}' of line {number} is no {kind.__name__}"
                    )
                    raise damaged(self.path / f"{name}.jsonl", fault)
            if wrong := no_number(record):
                raise damaged(self.path / f"{name}.jsonl", f"'{plain_text(wrong)}' of line {number} is no number")
        return records

    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty while the run has not ended once.

        Raises:
            InputError: it is damaged.
        """
        summary = read_json(self.path / "summary.json")
        for key, kind in {"method": str, "status": str, "rounds": int}.items():
            if summary and not is_a(summary.get(key), kind):
                raise damaged(self.path / "summary.json", f"'{key}' is no {kind.__name__}")
        if wrong := no_number(summary):
            raise damaged(self.path / "summary.json", f"'{plain_text(wrong)}' is no number")
        return summary

    def deployment(self) -> dict[str, Any] | None:
        """``deployment.json``; None = the run was not deployed.

        Raises:
            InputError: it is damaged.
        """
        deployment = read_json(self.path / "deployment.json")
        overrides = deployment.get("overrides")
        if deployment and not (
            isinstance(deployment.get("run_dir"), str)
            and isinstance(overrides, list)
            and all(isinstance(text, str) for text in overrides)
        ):
            raise damaged(self.path / "deployment.json", "needs run_dir and overrides")
        return deployment or None

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one line to ``name``.jsonl."""
        file = self._logs.get(name)
        if file is None:
            file = self._logs[name] = (self.path / f"{name}.jsonl").open("a", encoding="utf-8")
        file.write(json.dumps(clean(record)) + "\n")
        file.flush()

    def close(self) -> None:
        """Close the logs; the next :meth:`append` opens its log anew."""
        while self._logs:
            with suppress(OSError):  # what could not be written was said by `append`
                self._logs.popitem()[1].close()

    def truncate(self, name: str, last_round: int) -> None:
        """Drop the lines of later rounds (a resumed run writes them again)."""
        self.close()
        path = self.path / f"{name}.jsonl"
        records = [line for line in self.lines(name) if line["round"] <= last_round]
        text = "".join(json.dumps(record) + "\n" for record in records)
        if os.path.isfile(path) and path.read_text(encoding="utf-8") != text:
            write_text(path, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_text(self.path / "summary.json", json.dumps(clean(summary), indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def clean(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan or infinity: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def provenance() -> dict[str, Any]:
    """Git commit of bayesfed's checkout (if it is one) and versions of the packages that matter."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=False
        )
        commit = done.stdout.strip() or None
    except OSError:
        commit = None
    return {"git_commit": commit, "versions": versions}
