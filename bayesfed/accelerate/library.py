"""The C functions (``*.c`` beside this file): compiled once, as one library, with the system's C compiler.

They take less than a second to compile at their first use on a machine and lie in the cache folder
(``$BAYESFED_CACHE``, else ``~/.cache/bayesfed``) afterwards. Without a C compiler torch's operations are used; results
agree to rounding. So it is in an app that Flower bundled: 1.39 takes no ``.c`` files (``FAB_INCLUDE_PATTERNS``, which
an app can't extend).
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
SOURCES = tuple(Path(__file__).with_name(name) for name in ("ivon.c", "perceptron.c"))
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
    if not all(source.is_file() for source in SOURCES):
        log.info(
            "no C sources in this app bundle: training takes longer (docs/performance.md); results agree to rounding"
        )
        return None
    if not compiler or shutil.which(compiler[0]) is None:
        log.info("no C compiler (%s): training takes longer (docs/performance.md); results agree to rounding", wanted)
        return None
    reason = ""
    for flags in (FLAGS, PLAIN):
        try:
            library = _load(compiler, flags)
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


def _load(compiler: Sequence[str], flags: Sequence[str]) -> ctypes.CDLL:
    """The shared library for this processor: from the cache, or compiled and put there if the folder can be written to.

    Raises:
        OSError, subprocess.SubprocessError: it could not be compiled or loaded.
    """
    sources = [source.read_text() for source in SOURCES]
    key = "\n".join([*sources, str(MOST_LAYERS), *compiler, *flags, _processor()])
    name = f"native-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.so"
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        cached = cache_folder() / name
        if _trusted(cached):
            return ctypes.CDLL(str(cached))
    with tempfile.TemporaryDirectory(prefix="bayesfed-") as folder:
        made = Path(folder) / name
        _compile(compiler, flags, made)
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


def _compile(compiler: Sequence[str], flags: Sequence[str], to: Path) -> None:
    command = [*compiler, *flags, f"-DMOST_LAYERS={MOST_LAYERS}", "-o", str(to), *map(str, SOURCES), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def _processor() -> str:
    """What ``-march=native`` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    known = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(known)}))
