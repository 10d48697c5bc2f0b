"""Random streams keyed by what they are for.

Every draw in bayesfed comes from a generator keyed by ``(seed, *key)``, where the key names the client, the round and the
purpose. Results therefore do not depend on which process ran a client, on how many workers there are, or on the order
in which replies arrive; and a resumed run needs no generator state.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *key: int | str) -> int:
    """A 63-bit seed for the stream named by ``key`` (e.g. ``derive(1, "noise", client, round)``)."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on ``device`` for the stream named by ``key``."""
    generator = torch.Generator(device=device)
    generator.manual_seed(derive(seed, *key))
    return generator


def numpy_generator(seed: int, *key: int | str) -> np.random.Generator:
    """A NumPy generator for the stream named by ``key``."""
    return np.random.default_rng(derive(seed, *key))
