"""The C functions (``*.c`` beside this file): compiled once, as one library, with the system's C compiler.

They take less than a second to compile at their first use on a machine and lie in the cache folder
(``$BAYESFED_CACHE``, else ``~/.cache/bayesfed``) afterwards. Without a C compiler torch's operations are used; results
agree to rounding. Flower 1.39 takes no ``.c`` files into an app's bundle (``FAB_INCLUDE_PATTERNS``, which an app can't
extend): there the sources are those of the bayesfed that the node has installed, if they are of this version.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesfed.accelerate.switch import enabled
from bayesfed.cache import cache_folder, whole_file

log = getLogger("bayesfed")
SOURCES = {"ivon.c": "dc87179c9c9320e5e8424f43", "perceptron.c": "54c9a6e8b936ccd672ac0915"}  # and their digests
MOST_LAYERS = 32  # of a perceptron
FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
DIGEST = 32  # bytes
PLAIN = ("-O3", "-fPIC", "-shared")  # for compilers and processors that know none of the others


def suits(vector: Tensor) -> bool:
    """Whether the functions can work on such vectors: float32 on a CPU, and no torch threads that they would leave
    idle.
    """
    return (vector.device.type, vector.dtype) == ("cpu", torch.float32) and torch.get_num_threads() == 1


def functions() -> Any:
    """The compiled functions; None with ``accelerate=off``, and (and one line in the log) without sources or a
    compiler.
    """
    return _compiled() if enabled() else None


@lru_cache
def _compiled() -> Any:
    wanted = os.environ.get("CC") or "cc"
    compiler = shlex.split(wanted)
    sources = [path for path in map(_source, SOURCES) if path is not None]
    if len(sources) < len(SOURCES):
        log.info(
            "no bayesfed of this version is installed beside the app bundle, which holds no C sources: training takes "
            "longer (docs/performance.md); results agree to rounding"
        )
        return None
    if not compiler or shutil.which(compiler[0]) is None:
        log.info("no C compiler (%s): training takes longer (docs/performance.md); results agree to rounding", wanted)
        return None
    reason = ""
    for flags in (FLAGS, PLAIN):
        try:
            library = _load(compiler, flags, sources)
        except (OSError, subprocess.SubprocessError) as error:
            reason = reason or getattr(error, "stderr", None) or str(error)
            continue
        address, count = ctypes.c_void_p, ctypes.c_int64
        library.ivon_draw.argtypes = (count, *[address] * 4, ctypes.c_float, *[address] * 2)
        library.ivon_update.argtypes = (count, *[address] * 9)
        library.all_finite.argtypes = (count, address, address)
        library.all_finite.restype = ctypes.c_int
        library.ivon_draw.restype = library.ivon_update.restype = None
        library.perceptron.argtypes = (address, count, address, count, ctypes.c_int, *[address] * 8)
        library.perceptron.restype = ctypes.c_int
        return library
    log.warning("training takes longer (docs/performance.md): %s did not give a library that loads: %s", wanted, reason)
    return None


def _source(name: str) -> Path | None:
    """A C source of this version: beside this file, or in another copy of bayesfed that could be imported."""
    for folder in (Path(__file__).parent, *(Path(entry, "bayesfed", "accelerate") for entry in sys.path)):
        with suppress(OSError):
            file = folder / name
            if hashlib.blake2b(file.read_bytes(), digest_size=12).hexdigest() == SOURCES[name]:
                return file
    return None


def _load(compiler: Sequence[str], flags: Sequence[str], sources: Sequence[Path]) -> ctypes.CDLL:
    """The shared library for this processor: from the cache, or compiled and put there if the folder can be written to.

    Raises:
        OSError, subprocess.SubprocessError: it could not be compiled or loaded.
    """
    key = "\n".join([*SOURCES.values(), str(MOST_LAYERS), *compiler, *flags, _processor()])
    name = f"native-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.so"
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        cached = cache_folder() / name
        if _trusted(cached):
            return ctypes.CDLL(str(cached))
    with tempfile.TemporaryDirectory(prefix="bayesfed-") as folder:
        made = Path(folder) / name
        _compile(compiler, flags, sources, made)
        loaded = ctypes.CDLL(str(made))  # stays loaded when the file is gone
        with suppress(OSError, RuntimeError):
            library = made.read_bytes()
            with whole_file(cache_folder() / name) as stream:
                stream.write(library + _digest(library))
    return loaded


def _trusted(file: Path) -> bool:
    """Whether a library is whole (its digest follows it: loading a damaged one kills the process) and nobody else's."""
    if not file.is_file():
        return False
    status = file.stat()
    own = status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    data = file.read_bytes()
    return own and len(data) > DIGEST and _digest(data[:-DIGEST]) == data[-DIGEST:]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def _compile(compiler: Sequence[str], flags: Sequence[str], sources: Sequence[Path], to: Path) -> None:
    command = [*compiler, *flags, f"-DMOST_LAYERS={MOST_LAYERS}", "-o", str(to), *map(str, sources), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def _processor() -> str:
    """What ``-march=native`` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    known = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(known)}))
