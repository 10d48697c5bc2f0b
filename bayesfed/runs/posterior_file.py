"""``posterior.safetensors``: the posterior of a run with all that is needed to build its model again.

Tensors ``mean`` and ``precision``, and those that make up the family where they are others; ``fixed.NAME``, where the
model has frozen parameters or buffers; one metadata key, ``bayesfed``, with JSON: ``family``, ``format`` and ``model``
(as ``Problem.description()``), and ``xxh3``, a checksum of it all. Everything goes into one key with sorted JSON
because safetensors writes several metadata keys in random order; so equal posteriors are equal files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bayesfed.checksum import XXH3, checksum
from bayesfed.errors import InputError
from bayesfed.families import FAMILIES, ExponentialFamily, PointMass
from bayesfed.lock import PARTIAL

FILE_NAME = "posterior.safetensors"
METADATA_KEY = "bayesfed"
FORMAT = 1
FIXED = "fixed."  # before the names of the model's frozen parameters and buffers


def save_posterior(
    path: str | Path,
    posterior: ExponentialFamily | PointMass,
    model_description: dict[str, Any],
    fixed: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write ``posterior`` to ``path``, atomically: a reader sees the old file or the new one, never a part.

    Args:
        path: the file to write or replace.
        posterior: a member of ``bayesfed.families``; its dtype is kept. A point mass has precision inf, shape ().
        model_description: plain JSON, as ``Problem.description()`` gives it.
        fixed: what else makes up the model, as ``FlatModel.fixed`` gives it.
    """
    path = Path(path)
    metadata = {"family": posterior.name, "format": FORMAT, "model": model_description}
    # clones, because safetensors refuses tensors that share memory (views of one message buffer)
    values = {"mean": posterior.mean, "precision": posterior.precision, **posterior.arrays()}
    values |= {f"{FIXED}{name}": value for name, value in (fixed or {}).items()}
    tensors = {n: value.detach().cpu().clone(memory_format=torch.contiguous_format) for n, value in values.items()}
    metadata[XXH3] = checksum(tensors, json.dumps(metadata, sort_keys=True), XXH3)
    content = save(tensors, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_posterior(path: str | Path) -> tuple[ExponentialFamily | PointMass, dict[str, Any]]:
    """Read what :func:`save_posterior` wrote.

    Returns:
        the posterior, on the CPU in the dtype it was saved with, and the model description.

    Raises:
        InputError: the file is missing, damaged, not written by bayesfed, or of a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("path", path, f"no such file; {FILE_NAME} is written by bayesfed run")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise InputError("path", path, f"not a readable safetensors file ({error})") from error
    if text is None:
        raise InputError("path", path, f"not a posterior of bayesfed (no metadata key {METADATA_KEY!r})")
    try:
        metadata = json.loads(text)
        expected = metadata.pop(XXH3, None)  # the first files had none
        if expected not in (None, checksum(tensors, json.dumps(metadata, sort_keys=True), XXH3)):
            raise InputError("path", path, "is damaged (wrong checksum)")
        if metadata["format"] != FORMAT:
            raise InputError("path", path, f"has format {metadata['format']}, this bayesfed reads format {FORMAT}")
        family, description = metadata["family"], metadata["model"]
        if family not in FAMILIES:
            raise InputError("path", path, f"unknown family {family!r}; valid: {', '.join(sorted(FAMILIES))}")
        arrays = {name: value for name, value in tensors.items() if not name.startswith(FIXED)}
        return FAMILIES[family].from_arrays(arrays), description
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError("path", path, f"not a valid posterior of bayesfed ({error})") from error


def load_fixed(path: str | Path) -> dict[str, torch.Tensor]:
    """The model's frozen parameters and buffers in a file that :func:`load_posterior` reads."""
    with safe_open(Path(path), framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(FIXED)]  # noqa: SIM118 - not a dict
        return {name.removeprefix(FIXED): file.get_tensor(name) for name in names}
