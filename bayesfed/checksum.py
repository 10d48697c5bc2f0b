"""Digests of what is kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

SHA256, XXH3 = "sha256", "xxh3"
DIGESTS: dict[str, Callable[[bytes], Any]] = {SHA256: hashlib.sha256, XXH3: xxhash.xxh3_64}


def file_digest(path: Path) -> str:
    """XXH3 of a file's bytes; of a folder, of the names and bytes of the :func:`files_of` it, but those of runs in
    it."""
    state = DIGESTS[XXH3](b"")
    files = files_of(path)
    runs = {file.parent for file in files if file.name == "config.yaml"} - {path}  # with data.path=. they grow
    for file in (file for file in files if runs.isdisjoint(file.parents)):
        state.update(b"" if file == path else file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                state.update(block)
    return state.hexdigest()


def data_digest(path: object) -> str | None:
    """:func:`file_digest` of what ``data.path`` names; None if it names nothing that is there."""
    return file_digest(Path(path)) if isinstance(path, str) and os.path.exists(path) else None


def files_of(path: Path) -> list[Path]:
    """The files in a folder and the folders below it by name, without what is hidden; a file itself."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def checksum(tensors: Mapping[str, Tensor], text: str = "", digest: str = SHA256) -> str:
    """Digest of ``text`` and of names, dtypes, shapes and values of ``tensors`` (hexadecimal).

    ``digest`` is ``SHA256``, or ``XXH3`` (64 bits), which finds damage as well and takes 1/20 of the time.
    """
    state = DIGESTS[digest](text.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
