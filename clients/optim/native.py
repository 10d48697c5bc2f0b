"""IVON's step as two C functions (``ivon_kernel.py``), compiled once with the system's C compiler.

A chain of torch operations reads and writes a vector some thirty times a step; these functions read and write each once. They
take half a second to compile at their first use on a machine and lie in the cache folder (``$BAYESFED_CACHE``, else
``~/.cache/bayesfed``) afterwards. Without a C compiler the torch operations are used; results agree to rounding.
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

from bayesfed.cache import cache_folder, whole_file
from clients.optim.ivon_kernel import SOURCE
from clients.optim.ivon_state import Group
from clients.optim.ivon_update import step_numbers
from clients.optim.noise import Noise, quantile_points

log = getLogger("bayesfed")
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


class _Term(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("number", ctypes.c_float))


class _Numbers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_float) for name in ("scale", "c", "share", "debias", "rate", "lift", "clip"))


def draw(g: Group, noise: Tensor, scale: float, source: Noise) -> None:
    """``noise`` = z root and ``g.sample`` = mean + scale noise, with the z that ``source.fill`` would give next."""
    points = quantile_points(torch.float32)
    vectors = g.flat.vector, g.root, noise, g.sample
    for start, bits in source.picks(noise.numel()):
        mean, root, out, sample = (v.data_ptr() + 4 * start for v in vectors)
        length = min(noise.numel() - start, 4 * bits.numel())
        _functions().ivon_draw(length, bits.data_ptr(), points.data_ptr(), mean, root, scale, out, sample)


def update(group: dict[str, Any], g: Group, debias: float, rescale: bool) -> None:
    """Both updates of :mod:`clients.optim.ivon_update` after a single sample."""
    gradients = [g.gradient] if g.released is None else [piece.resolve_neg().contiguous() for piece in g.released]
    factor, lift = (g.damping, group["hess_init"]) if rescale else (0.0, 1.0)
    terms = [
        v.expand_as(g.total).contiguous() if isinstance(v, Tensor) else v for v in (g.slope, g.offset, factor, g.bound)
    ]
    scale, c, share, _, rate, clip = step_numbers(group, debias)
    numbers = _Numbers(c * scale, c, share, debias, rate, lift, clip)
    pieces = len(gradients)
    _functions().ivon_update(
        pieces,
        (ctypes.c_int64 * pieces)(*[piece.numel() for piece in gradients]),
        (ctypes.c_void_p * pieces)(*[piece.data_ptr() for piece in gradients]),
        *[v.data_ptr() for v in (g.noise, g.flat.vector, g.total, g.root, g.momentum)],
        (_Term * 4)(*[_Term(v.data_ptr(), 0.0) if isinstance(v, Tensor) else _Term(None, v) for v in terms]),
        ctypes.byref(numbers),
    )
    g.released = None


def suits(g: Group) -> bool:
    """Whether the functions can work on this group: float32 vectors on a CPU, and no threads that they would leave idle."""
    kind = g.total.device.type, g.total.dtype
    return kind == ("cpu", torch.float32) and g.total.dim() == 1 and torch.get_num_threads() == 1


def available() -> bool:
    """Whether the functions could be compiled."""
    return _functions() is not None


@lru_cache
def _functions() -> Any:
    """The compiled functions; None (and one line in the log) without a compiler."""
    wanted = os.environ.get("CC") or "cc"
    compiler = shlex.split(wanted)
    if not compiler or shutil.which(compiler[0]) is None:
        log.info(
            "no C compiler (%s): a step of IVON takes longer (docs/performance.md); results agree to rounding", wanted
        )
        return None
    reason = ""
    for flags in (FLAGS, PLAIN):
        try:
            functions = _load(compiler, flags)
        except (OSError, subprocess.SubprocessError) as error:
            reason = reason or getattr(error, "stderr", None) or str(error)
            continue
        address, count = ctypes.c_void_p, ctypes.c_int64
        functions.ivon_draw.argtypes = (count, *[address] * 4, ctypes.c_float, *[address] * 2)
        functions.ivon_update.argtypes = (count, *[address] * 9)
        functions.ivon_draw.restype = functions.ivon_update.restype = None
        return functions
    log.warning(
        "a step of IVON takes longer (docs/performance.md): %s did not give a library that loads: %s", wanted, reason
    )
    return None


def _load(compiler: Sequence[str], flags: Sequence[str]) -> ctypes.CDLL:
    """The shared library for this processor: from the cache, or compiled and put there if the folder can be written to.

    Raises:
        OSError, subprocess.SubprocessError: it could not be compiled or loaded.
    """
    key = "\n".join([SOURCE, *compiler, *flags, _processor()])
    name = f"ivon-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.so"
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        cached = cache_folder() / name
        if _trusted(cached):
            return ctypes.CDLL(str(cached))
    with tempfile.TemporaryDirectory(prefix="bayesfed-") as folder:
        made = Path(folder) / name
        _compile(compiler, flags, made)
        functions = ctypes.CDLL(str(made))  # stays loaded when the file is gone
        with suppress(OSError, RuntimeError):
            library = made.read_bytes()
            with whole_file(cache_folder() / name) as stream:
                stream.write(library + _digest(library))
    return functions


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
    command = [*compiler, *flags, "-o", str(to), "-x", "c", "-", "-lm"]
    subprocess.run(command, input=SOURCE, check=True, capture_output=True, text=True, timeout=120)


def _processor() -> str:
    """What ``-march=native`` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    known = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(known)}))
