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
from bayesfed.foreign import plain_text
from bayesfed.lock import PARTIAL

log = getLogger("bayesfed")
_FILE = re.compile(r"server-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after ``round`` (random streams are keyed, so no generator state).

    Attributes:
        round: last finished round.
        tensors: posterior (``posterior.*``) and the strategy's sums.
        state: plain values: which client's reply was accepted when, also as of the checkpoint before (``durable``),
            totals.
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
        temporary = path.with_suffix(PARTIAL)
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
            with contextlib.suppress(OSError):
                old.unlink()

    @classmethod
    def latest(cls, folder: Path, last: int | None = None) -> Checkpoint:
        """The newest readable checkpoint: one that is cut off or whose checksum is wrong is passed over, with a
        warning.

        Args:
            folder: of the checkpoints.
            last: the last round that ``rounds.jsonl`` knows; later checkpoints are passed over.

        Raises:
            InputError: there is none.
        """
        faults = []
        for path in reversed(_files(folder)):
            try:
                checkpoint = cls._read(path)
                if last is not None and checkpoint.round > last:
                    raise ValueError(f"rounds.jsonl lacks round {last + 1}")
            except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
                faults.append(f"{path.name} is not used: {plain_text(error)}")
                continue
            for fault in faults:
                log.warning("checkpoint %s", fault)
            return checkpoint
        fix = "; ".join(["has no readable checkpoint", *faults, "start the run anew in another folder"])
        raise InputError("resume", folder.parent, fix)

    @classmethod
    def _read(cls, path: Path) -> Checkpoint:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})["bayesfed"])
            tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        if "sha256" in stored:  # files from before checksums hold the state itself
            if stored["sha256"] != checksum(tensors, stored["state"]):
                raise ValueError("wrong checksum")
            stored = json.loads(stored["state"])
        return cls(stored.pop("round"), tensors, stored)


def _files(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if _FILE.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(files, key=lambda path: int(path.stem.removeprefix("server-")))
