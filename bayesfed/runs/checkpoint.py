"""Server state on disk: one file a round, written atomically, the two newest kept."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesfed.errors import InputError

_FILE = re.compile(r"server-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after ``round`` (random streams are keyed, so no generator state).

    Attributes:
        round: last finished round.
        tensors: posterior (``posterior.*``) and the strategy's sums.
        state: plain values: which client's reply was accepted when, totals.
    """

    round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write atomically, then drop all but the two newest."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"server-{self.round:06d}.safetensors"
        temporary = path.with_suffix(".partial")
        metadata = {"bayesfed": json.dumps({"round": self.round, **self.state}, sort_keys=True)}
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, temporary, metadata=metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        for old in _files(folder)[:-2]:
            old.unlink(missing_ok=True)

    @classmethod
    def latest(cls, folder: Path) -> Checkpoint:
        """The newest readable checkpoint.

        Raises:
            InputError: there is none.
        """
        for path in reversed(_files(folder)):
            try:
                with safe_open(path, framework="pt") as file:
                    state = json.loads((file.metadata() or {})["bayesfed"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, KeyError, json.JSONDecodeError, OSError):
                continue
            return cls(state.pop("round"), {name: torch.clone(value) for name, value in tensors.items()}, state)
        raise InputError("resume", folder.parent, "has no readable checkpoint; start the run anew in another folder")


def _files(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _FILE.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.stem.removeprefix("server-")))
