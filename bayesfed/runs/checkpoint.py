"""Server state on disk: one file a round, written atomically and with a checksum, the two newest kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesfed.checksum import checksum
from bayesfed.errors import InputError, RunFailed

log = getLogger("bayesfed")
_FILE = re.compile(r"server-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after ``round`` (random streams are keyed, so no generator state).

    Attributes:
        round: last finished round.
        tensors: posterior (``posterior.*``) and the strategy's sums.
        state: plain values: which client's reply was accepted when, also as of the checkpoint before (``durable``), totals.
    """

    round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write atomically, then drop all but the two newest.

        Raises:
            RunFailed: the disk is full or can't be written; the older checkpoints are as they were.
        """
        path = folder / f"server-{self.round:06d}.safetensors"
        temporary = path.with_suffix(".partial")
        state = json.dumps({"round": self.round, **self.state}, sort_keys=True)
        tensors = {name: value.contiguous() for name, value in self.tensors.items()}
        # one key: safetensors orders several at random
        metadata = {"bayesfed": json.dumps({"sha256": checksum(tensors, state), "state": state})}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata=metadata)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise RunFailed(f"the checkpoint of round {self.round} can't be written to {folder}: {error}") from error
        for old in _files(folder)[:-2]:
            old.unlink(missing_ok=True)

    @classmethod
    def latest(cls, folder: Path) -> Checkpoint:
        """The newest readable checkpoint: one that is cut off or whose checksum is wrong is passed over, with a warning.

        Raises:
            InputError: there is none.
        """
        for path in reversed(_files(folder)):
            try:
                with safe_open(path, framework="pt") as file:
                    stored = json.loads((file.metadata() or {})["bayesfed"])
                    tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
                if "sha256" in stored:  # files from before checksums hold the state itself
                    if stored["sha256"] != checksum(tensors, stored["state"]):
                        raise ValueError("wrong checksum")
                    stored = json.loads(stored["state"])
                return cls(stored.pop("round"), tensors, stored)
            except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
                log.warning("checkpoint %s is not used: %s", path.name, error)
        raise InputError("resume", folder.parent, "has no readable checkpoint; start the run anew in another folder")


def _files(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _FILE.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.stem.removeprefix("server-")))
