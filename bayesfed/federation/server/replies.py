"""Replies of a round: their stream, their order, their groups, and what they report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from logging import getLogger

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from bayesfed.federation.server.delivery import deliver
from bayesfed.profiling import each

log = getLogger("bayesfed")
Sums = dict[str, Tensor]
GROUPS = 16  # at most as many partial sums in a round of up to 512 clients; more clients, more groups
LARGEST_GROUP = 32


def group_size(sampled: int) -> int:
    """How many clients, in the order of their ids, are summed on their own before their sum is added to the server's.

    Such a group can be summed where its clients run, or on the server: an engine is free to choose for each group. The
    size depends on nothing but the number of sampled clients, so that floating-point sums, and with them all results,
    are the same on every engine.
    """
    size = 1  # a power of two, so that groups and batches of clients (engine.clients_per_batch) fit into each other
    while size < LARGEST_GROUP and size * GROUPS < sampled:
        size *= 2
    return size


class GroupSums:
    """Sums over clients in order, each group of them on its own before it is added to the total.

    Args:
        empty: makes sums over no clients.
        size: of a group; with 1 clients are added to the total, which gives the same bits.
    """

    def __init__(self, empty: Callable[[], Sums], size: int = 1):
        self.empty, self.size, self.total = empty, size, empty()
        self._group: Sums | None = None  # no memory for groups that come as one
        self._position = 0

    def next(self) -> None:
        """The next client's turn."""
        if self._position % self.size == 0:
            self.close()
        self._position += 1

    @property
    def group(self) -> Sums:
        """What the client is to be added to."""
        if self.size == 1:
            return self.total
        if self._group is None:
            self._group = self.empty()
        return self._group

    def add_whole(self, sums: Sums) -> None:
        """Add a group that was summed elsewhere."""
        for name, value in sums.items():
            self.total[name].add_(value)

    def close(self) -> None:
        """Add the last group."""
        if self._group is not None:
            self.add_whole(self._group)
        self._group = None


def stream(grid: Grid, messages: Iterable[Message], timeout: float, fold: int, gone: set[int]) -> Iterable[Message]:
    """Replies as they arrive, from bayesfed's engines or from the nodes of a SuperLink.

    A grid that ``folds`` is told the group size: it may sum the replies of a group where the clients run. For ``gone``
    see :func:`bayesfed.federation.server.delivery.deliver`.
    """
    streaming: Callable[..., Iterable[Message]] = getattr(grid, "stream", None) or partial(deliver, grid, gone=gone)
    options = {"fold": fold} if getattr(grid, "folds", False) else {}
    return each("waiting", streaming(messages, timeout=timeout, **options))


def in_order(sampled: dict[int, int], replies: Iterable[Message]) -> Iterator[tuple[int, Message | None]]:
    """Pair clients, ascending, with their replies; None for those that never came. Early replies wait."""
    clients = {node: client for client, node in sampled.items()}
    waiting: dict[int, Message] = {}
    order = iter(sorted(sampled))
    due = next(order, None)
    for reply in replies:
        client = clients.get(reply.metadata.src_node_id)
        if client is None or client in waiting or due is None or client < due:
            log.warning("reply of node %d was not asked for", reply.metadata.src_node_id)
            continue
        waiting[client] = reply
        while due is not None and due in waiting:
            yield due, waiting.pop(due)
            due = next(order, None)
    while due is not None:
        yield due, waiting.pop(due, None)
        due = next(order, None)


def reported(metrics: list[dict[str, float]], dim: int) -> dict[str, float]:
    """What the round's accepted clients reported, as numbers of the round (``dim`` is P)."""
    held = int(sum(min(max(m.get("floored", 0), 0), dim) for m in metrics))
    return {
        **_mean_and_max(metrics, "residual", "admm/primal"),
        **_mean_and_max(metrics, "dual-norm", "admm/dual_norm"),
        **_mean_and_max(metrics, "hessian-moved", "hessian/moved", largest=False),
        **_mean_and_max(metrics, "loss", "clients/loss", largest=False),
        "guard/clients": held,
    }


def _mean_and_max(metrics: list[dict[str, float]], key: str, name: str, largest: bool = True) -> dict[str, float]:
    values = [m[key] for m in metrics if key in m]
    if not values:
        return {}
    mean = sum(values) / len(values)
    return {f"{name}_mean": mean, f"{name}_max": max(values)} if largest else {name: mean}
