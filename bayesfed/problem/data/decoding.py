"""Decode a set of compressed images once and keep the pixels in a memory-mapped file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from logging import getLogger

import numpy as np

from bayesfed.cache import cache_folder, whole_file
from bayesfed.errors import InputError

log = getLogger("bayesfed")
_LAYOUT = "NCHW-1"  # part of the key: change it when the stored layout changes
_BATCH = 256  # images a thread decodes at a time


def decoded(name: str, key: str, encoded: Callable[[], Iterable[bytes]]) -> np.ndarray:
    """(N, C, H, W) uint8 pixels of the images that ``encoded`` yields, from the cache if they are there.

    Args:
        name: readable part of the cache file's name.
        key: identifies the content (source, size, modification time).
        encoded: gives the compressed images; called only if the cache has no entry.

    Returns:
        A memory map in copy-on-write mode: torch accepts it without a warning, and writes never reach the file.

    Raises:
        InputError: on an image that can't be decoded or differs in size, naming its row.
    """
    digest = hashlib.blake2b(f"{_LAYOUT}|{key}".encode(), digest_size=12).hexdigest()
    try:
        file = cache_folder() / f"{name}-{digest}.npy"
        cached = file.is_file()
    except (RuntimeError, OSError):  # there is no home folder, or nobody may look into it
        return _decode(name, list(encoded()))
    if not cached:
        pixels = _decode(name, list(encoded()))
        try:
            with whole_file(file) as stream:
                np.save(stream, pixels)
        except OSError as error:
            log.warning("cannot cache decoded images in %s (%s); set BAYESFED_CACHE", file.parent, error)
            return pixels
    return np.load(file, mmap_mode="c")


def _decode(name: str, images: list[bytes]) -> np.ndarray:
    from PIL import Image

    if not images:
        raise InputError("path", name, "holds no images")
    try:
        grey = Image.open(io.BytesIO(images[0])).mode in ("1", "L")
    except Exception:
        grey = False  # the loop below names the row
    mode = "L" if grey else "RGB"

    def read(images: list[bytes]) -> list[np.ndarray | str]:
        return [_pixels(image, mode) for image in images]

    out: np.ndarray | None = None
    batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    with ThreadPoolExecutor() as pool:  # decompression runs outside the interpreter lock
        for row, pixels in enumerate(chain.from_iterable(pool.map(read, batches))):
            if isinstance(pixels, str):
                raise InputError("path", name, f"image in row {row} cannot be decoded ({pixels})")
            if out is None:
                out = np.empty((len(images), *pixels.shape), dtype=np.uint8)
            if pixels.shape != out.shape[1:]:
                fix = f"image in row {row} has shape {pixels.shape}, the first one {out.shape[1:]}"
                raise InputError("path", name, fix)
            out[row] = pixels
    assert out is not None
    return out


def _pixels(image: bytes, mode: str) -> np.ndarray | str:
    """(C, H, W) uint8, or what is wrong with the image."""
    from PIL import Image

    try:
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert(mode), dtype=np.uint8)
    except Exception as error:  # PIL raises errors of many kinds on damaged files
        return str(error) or type(error).__name__
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
