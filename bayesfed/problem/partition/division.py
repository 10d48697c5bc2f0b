"""Who holds which training rows: by the data's client column if there is one, else by the partitioner."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from logging import getLogger

import numpy as np

from bayesfed.errors import InputError
from bayesfed.foreign import plain_text
from bayesfed.problem.data.source import Loaded
from bayesfed.problem.partition.partitioner import NO_CLIENTS, Partitioner

log = getLogger("bayesfed")


@dataclass(frozen=True)
class Division:
    """Who holds what.

    Attributes:
        parts: rows of each client that has any.
        owner: the client (-1: none) of every row of the data, if these have a client column.
        names: of the clients, as that column calls them; None: 0..K-1.
    """

    parts: list[np.ndarray]
    owner: np.ndarray | None = None
    names: list[str] | None = None


def divide(
    data: Loaded, y: np.ndarray, classes: bool, train: np.ndarray, partitioner: Partitioner, seed: int
) -> Division:
    """Divide the rows ``train`` among clients; those that get none are left out, which is logged.

    Raises:
        InputError: the column gives another number of clients than was asked for, or no client gets any row.
    """
    parts, names = _by_partitioner(data, y, classes, train, partitioner, seed)
    held = [k for k, part in enumerate(parts) if len(part)]
    if not held:
        raise InputError("partition", partitioner.name, "gave no client any example")
    if len(held) < len(parts):
        absent = ", ".join(name for name, part in zip(names, parts, strict=False) if not len(part))
        named = f" ({plain_text(absent, 200)})" if absent else ""
        text = "%d of %d clients got no example and are left out%s; %d remain"
        log.warning(text, len(parts) - len(held), len(parts), named, len(held))
    parts = [parts[k] for k in held]
    if data.client is None:
        return Division(parts)
    names = [names[k] for k in held]
    distinct, codes = np.unique(data.client, return_inverse=True)
    client_of = np.full(len(distinct), -1)
    for k, part in enumerate(parts):
        client_of[codes[part]] = k
    return Division(parts, client_of[codes], None if names == [str(k) for k in range(len(parts))] else names)


def _by_partitioner(
    data: Loaded, y: np.ndarray, classes: bool, train: np.ndarray, partitioner: Partitioner, seed: int
) -> tuple[list[np.ndarray], list[str]]:
    """Rows of each client and, with a client column, its name."""
    grouped = partitioner.needs_values == "client"
    if data.client is not None and not grouped:
        return _by_column(data.client, train, partitioner)
    if data.client is None and grouped:
        raise InputError("partition", partitioner.name, NO_CLIENTS)
    values = _values(partitioner.needs_values, data, y, train)
    positions = partitioner.split(y[train] if classes else None, len(train), seed, values)
    parts = [train[part] for part in positions]
    if data.client is None:
        return parts, []
    if partitioner.num_clients not in (None, len(parts)):
        fix = f"the data's client column gives {len(parts)} groups; leave it null"
        raise InputError("num_clients", partitioner.num_clients, fix)
    return parts, [_name(np.unique(data.client[part])) for part in parts]


def _by_column(client: np.ndarray, train: np.ndarray, partitioner: Partitioner) -> tuple[list[np.ndarray], list[str]]:
    ids = np.unique(client)
    if partitioner.num_clients not in (None, len(ids)):
        fix = f"the data's client column has {len(ids)} distinct ids and decides the split; leave it null"
        raise InputError("num_clients", partitioner.num_clients, fix)
    order = train[np.argsort(client[train], kind="stable")]
    return np.split(order, np.searchsorted(client[order], ids)[1:]), [_name([each]) for each in ids]


def _name(ids: Iterable[object]) -> str:
    return plain_text("+".join(map(str, ids)), 60)


def _values(kind: str, data: Loaded, y: np.ndarray, train: np.ndarray) -> np.ndarray | None:
    """What a partitioner wants to know of each training example, see ``Partitioner.needs_values``."""
    if kind == "client":
        assert data.client is not None
        return data.client[train]
    if kind == "target":
        return y[train].reshape(len(train), -1)[:, 0]
    if kind == "mean":
        if isinstance(data.x, dict):
            raise InputError("partition.by", kind, "needs inputs of one array; use target")
        return np.array([data.x[row].mean(dtype=np.float64) for row in train])
    return None
