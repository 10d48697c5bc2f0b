"""Random streams keyed by what they are for.

Every draw in bayesfed comes from a generator keyed by ``(seed, *key)``, where the key names the client, the round and
the purpose. Results therefore do not depend on which process ran a client, on how many workers there are, or on the
order in which replies arrive; and a resumed run needs no generator state.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a wrong key is answered before either is imported
    import numpy as np
    import torch

_GLOBAL = threading.RLock()  # the global generators are one per process


def derive(seed: int, *key: int | str) -> int:
    """A 63-bit seed for the stream named by ``key`` (e.g. ``derive(1, "noise", client, round)``)."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on ``device`` for the stream named by ``key``."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(derive(seed, *key))
    return generator


def numpy_generator(seed: int, *key: int | str) -> np.random.Generator:
    """A NumPy generator for the stream named by ``key``."""
    import numpy as np

    return np.random.default_rng(derive(seed, *key))


@contextmanager
def global_generators(seed: int, *key: int | str) -> Iterator[None]:
    """Let what draws from the global generators of Python, NumPy and torch (on the CPU) draw the stream named by
    ``key`` in the block.

    Other people's constructors do. Afterwards the generators are as they were.
    """
    derived = derive(seed, *key)
    import numpy as np
    import torch

    with _GLOBAL, torch.random.fork_rng(devices=[]):
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that others draw from
        try:
            random.seed(derived)
            np.random.seed(derived % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(derived)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
