"""Where a run's numbers go besides its directory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from bayesfed.errors import InputError, choice
from bayesfed.foreign import plain_text
from bayesfed.overrides import parse
from bayesfed.runs.directory import RunDirectory

PATIENCE = 30.0  # seconds that wandb may take to start (90 by default)
_VARIABLES = {
    "project": "WANDB_PROJECT", "group": "WANDB_RUN_GROUP", "name": "WANDB_NAME", "id": "WANDB_RUN_ID",
    "dir": "WANDB_DIR", "mode": "WANDB_MODE",
}  # fmt: skip

log = getLogger("bayesfed")


class NoLogger:
    """The run directory only."""

    def begin(self, run_dir: Path, config: dict[str, Any]) -> None:
        """A run starts or is resumed."""

    def log(self, record: dict[str, Any]) -> None:
        """One object of ``rounds.jsonl``."""

    def end(self, summary: dict[str, Any]) -> None:
        """``summary.json``, when the run ends."""


class Guarded(NoLogger):
    """A logger that never ends a run: its first error is a warning, and the run goes on without it.

    Args:
        logger: anything with the methods of :class:`NoLogger`.
        name: of the logger, for the warning.
    """

    def __init__(self, logger: NoLogger, name: str):
        self._logger: NoLogger | None = logger
        self._name = name

    def begin(self, run_dir: Path, config: dict[str, Any]) -> None:
        """A run starts or is resumed."""
        self._call("begin", run_dir, config)

    def log(self, record: dict[str, Any]) -> None:
        """One object of ``rounds.jsonl``."""
        self._call("log", record)

    def end(self, summary: dict[str, Any]) -> None:
        """``summary.json``, when the run ends."""
        self._call("end", summary)

    def _call(self, method: str, *args: Any) -> None:
        if self._logger is None:
            return
        try:
            getattr(self._logger, method)(*args)
        except Exception as error:
            self._logger = None
            reason = plain_text(f"{type(error).__name__}: {error}")
            log.warning("logger=%s: %s; the run goes on without it", self._name, reason)


class WandbLogger(NoLogger):
    """Weights & Biases: offline without an API key, into the run directory; wandb's own environment variables hold
    where a key here is null.

    The jobs of a sweep are named after what was swept over, and grouped by the sweep's folder.

    Args:
        project: wandb's; None: ``$WANDB_PROJECT``, else ``bayesfed``.
        entity, group, tags: as wandb's.
        mode: ``online``, ``offline``, ``disabled``; None: ``$WANDB_MODE``, else online with an API key, else offline.

    Raises:
        InputError: unknown mode, or wandb isn't installed.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
    ):
        if mode is not None:
            choice("mode", mode, ("online", "offline", "disabled"))
        if find_spec("wandb") is None:
            raise InputError("name", "wandb", "install wandb, or use logger=none")
        self.settings = {"project": project, "entity": entity, "group": group, "tags": list(tags) or None, "mode": mode}
        self._run: Any = None

    def begin(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Open the wandb run; a resumed run goes on under the same id. Offline, if wandb can't be reached."""
        import wandb

        arguments = self._arguments(run_dir.resolve(), config)
        try:
            self._run = self._init(arguments, config)
        except wandb.errors.Error as error:
            if arguments["mode"] in ("offline", "disabled"):
                raise
            log.warning("logger=wandb: offline (%s); send it later with wandb sync", plain_text(error))
            fresh = secrets.token_hex(4)  # wandb keeps the other id for the run that did not start
            (run_dir / "wandb" / "id").write_text(fresh)
            self._run = self._init({**arguments, "id": fresh, "mode": "offline", "resume": None}, config)
        if self._run.offline:  # sent by `wandb sync`, this part takes the place of those before: it holds all rounds
            for record in RunDirectory(run_dir).rounds():
                self.log(record)

    def _arguments(self, run_dir: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Those of ``wandb.init``: what the user set, else nothing where an environment variable says it, else our
        defaults."""
        id_file = run_dir / "wandb" / "id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        name, group = sweep_job(run_dir, config)
        mode = None if _has_key() else "offline"
        ours = {
            "project": "bayesfed", "group": group, "name": name, "id": id_file.read_text(),
            "dir": str(run_dir), "mode": mode,
        }  # fmt: skip
        chosen: dict[str, Any] = {key: None if _VARIABLES[key] in os.environ else value for key, value in ours.items()}
        chosen |= {key: value for key, value in self.settings.items() if value is not None}
        wanted = chosen["mode"] or os.environ.get(_VARIABLES["mode"])
        return {**chosen, "resume": None if wanted in ("offline", "disabled") else "allow"}

    @staticmethod
    def _init(arguments: dict[str, Any], config: dict[str, Any]) -> Any:
        import wandb

        patience: dict[str, Any] = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": PATIENCE}
        return wandb.init(**arguments, config=config, settings=wandb.Settings(silent=True, **patience))

    def log(self, record: dict[str, Any]) -> None:
        """The numbers of a round, with the round as step."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        self._run.log(numbers, step=int(record["round"]))

    def end(self, summary: dict[str, Any]) -> None:
        """Write the summary and close the run."""
        if self._run is not None:
            self._run.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
            self._run.finish(exit_code=0 if summary.get("status") == "finished" else 1)


def sweep_job(run_dir: Path, config: dict[str, Any]) -> tuple[str, str | None]:
    """A run's name and group: in a sweep its number with what was swept over (``3 seed=2,strategy=fedavg``), and the
    sweep's folder."""
    file = run_dir.parent / "multirun.yaml"  # Hydra's
    if not file.is_file():
        return run_dir.name, None
    keys = [o.key_or_group for o in parse(OmegaConf.load(file).hydra.overrides.task) if o.is_sweep_override()]
    values = {key: OmegaConf.select(OmegaConf.create(config), key) for key in keys}
    swept = [f"{key}={value.name if OmegaConf.is_config(value) else value}" for key, value in values.items()]
    return " ".join([run_dir.name, ",".join(swept)]).strip(), run_dir.parent.name


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    host = urlsplit(wandb.Settings().base_url).hostname or ""
    try:
        return host in Path(os.environ.get("NETRC") or Path.home() / ".netrc").expanduser().read_text()
    except (OSError, RuntimeError, UnicodeDecodeError):  # none, or not readable, or there is no home folder
        return False
