"""Where a run's numbers go besides its directory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bayesfed.errors import InputError, choice


class NoLogger:
    """The run directory only."""

    def begin(self, run_dir: Path, config: dict[str, Any]) -> None:
        """A run starts or is resumed."""

    def log(self, record: dict[str, Any]) -> None:
        """One object of ``rounds.jsonl``."""

    def end(self, summary: dict[str, Any]) -> None:
        """``summary.json``, when the run ends."""


class WandbLogger(NoLogger):
    """Weights & Biases: offline without an API key, into the run directory.

    Args:
        project, entity, group, tags: as wandb's.
        mode: ``online``, ``offline``, ``disabled``; None: online with an API key, else offline.

    Raises:
        InputError: unknown mode.
    """

    def __init__(
        self,
        project: str = "bayesfed",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
    ):
        if mode is not None:
            choice("mode", mode, ("online", "offline", "disabled"))
        self.settings: dict[str, Any] = {"project": project, "entity": entity, "group": group, "tags": list(tags)}
        self.mode = mode
        self._run: Any = None

    def begin(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Open the wandb run; a resumed run goes on under the same id."""
        try:
            import wandb
        except ImportError as error:
            raise InputError("logger", "wandb", "install wandb, or use logger=none") from error
        mode: Any = self.mode or ("online" if _has_key() else "offline")
        id_file = run_dir / "wandb" / "id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            **self.settings,
            mode=mode,
            dir=str(run_dir),
            name=run_dir.name,
            id=id_file.read_text(),
            resume="allow" if mode == "online" else None,
            config=config,
            settings=wandb.Settings(silent=True),
        )

    def log(self, record: dict[str, Any]) -> None:
        """The numbers of a round, with the round as step."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        self._run.log(numbers, step=int(record["round"]))

    def end(self, summary: dict[str, Any]) -> None:
        """Write the summary and close the run."""
        if self._run is not None:
            self._run.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
            self._run.finish(exit_code=0 if summary.get("status") == "finished" else 1)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path.home() / ".netrc"
    return netrc.exists() and "api.wandb.ai" in netrc.read_text()
