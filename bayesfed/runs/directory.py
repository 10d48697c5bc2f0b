"""The run directory: what a run leaves behind, and how it is written without tearing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from bayesfed.config import LimitsSchema
from bayesfed.errors import InputError

PACKAGES = ("bayesfed", "flwr", "torch", "ray", "hydra-core", "numpy")


class RunDirectory:
    """Paths and atomic writes of one run.

    Attributes:
        path: the folder; holds ``config.yaml``, ``rounds.jsonl``, ``clients.jsonl``, ``summary.json``,
            ``posterior.safetensors``, ``checkpoint/`` and ``figures/``.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._logs: dict[str, TextIO] = {}

    @classmethod
    def create(cls, path: Path | str, cfg: DictConfig) -> RunDirectory:
        """A new run.

        Raises:
            InputError: the folder already holds a run, or can't be written.
        """
        run = cls(path)
        if run.config_path.exists():
            raise InputError(
                "hydra.run.dir", path, f"already holds a run; continue it with resume={path}, or name another folder"
            )
        plain = {key: value for key, value in cfg.items() if key not in ("hydra", "resume")}
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            write_text(run.config_path, OmegaConf.to_yaml(OmegaConf.create(plain), resolve=True))
        except OSError as error:
            raise InputError("hydra.run.dir", path, f"can't be written ({error}); name another folder") from error
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """An existing run.

        Raises:
            InputError: the folder holds no run.
        """
        run = cls(path)
        if not run.config_path.is_file():
            raise InputError("resume", path, "is not a run directory (no config.yaml)")
        return run

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

    def config(self) -> DictConfig:
        """The configuration the run was started with (and last resumed with)."""
        cfg = OmegaConf.load(self.config_path)
        assert isinstance(cfg, DictConfig)
        cfg.setdefault("wire", "full")  # runs from before it could be chosen
        cfg["limits"] = asdict(LimitsSchema()) | dict(cfg.get("limits") or {})  # or from before all of them were there
        return cfg

    def rounds(self) -> list[dict[str, Any]]:
        """``rounds.jsonl`` as a list."""
        return read_jsonl(self.path / "rounds.jsonl")

    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty while the run has not ended once."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one line to ``name``.jsonl."""
        file = self._logs.get(name)
        if file is None:
            file = self._logs[name] = (self.path / f"{name}.jsonl").open("a")
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
        if not path.is_file():
            return
        kept = [r for r in read_jsonl(path) if r["round"] <= last_round]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_text(self.path / "summary.json", json.dumps(clean(summary), indent=2, sort_keys=True) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; [] if there is none. A last line that was cut off in writing is left out.

    Raises:
        InputError: another line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for position, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if position < len(lines) - 1:
                raise InputError("run_dir", path.parent, f"line {position + 1} of {path.name} is not JSON") from error
    return records


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
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
