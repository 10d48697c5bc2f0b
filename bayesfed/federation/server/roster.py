"""Which node holds which partition."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from logging import getLogger

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from bayesfed import wire
from bayesfed.errors import RunFailed
from bayesfed.federation.server.delivery import activated
from bayesfed.wire.flower_version import AWAY, reason

log = getLogger("bayesfed")
LONGEST_START = 300.0  # seconds to wait for clients before the first round
PATIENCE = 5.0  # seconds that a round waits for nodes it has not asked before
USUAL = 60.0  # seconds within which a node usually answers
AGAIN, LONGEST_PAUSE = 5.0, 600.0  # seconds until a node whose answer was no good is asked again: first, and at most


@dataclass
class Asked:
    """What is known of a node.

    Attributes:
        active: when it was activated last, as of the latest question: a node started anew may be another client.
        since: when it was asked (``time.monotonic()``).
        question: the message's id until it is answered.
        client: the partition it says it holds; None: it did not say, or its answer was refused.
        reason: why it was refused.
        refusals: how often in a row.
        due: when it may be asked again.
    """

    active: str
    since: float = 0.0
    question: str = ""
    client: int | None = None
    reason: str = ""
    refusals: int = 0
    due: float = 0.0


class Roster:
    """The node of each client. Flower's node ids are random, so every node is asked which partition it holds.

    What counts is how many *clients* are there, not how many nodes answered: one whose question failed, or who claims a
    client that is taken, is nobody. As long as a client is missing, nodes are asked again between rounds: those that
    were refused after pauses that double up to ``LONGEST_PAUSE``, and nobody waits for their answers.

    Args:
        num_clients: how many there should be; 0: as many as there are nodes.
        sizes: gets the number of examples each partition has, as its node says.
        shape: what every node's data must have in common, see :meth:`bayesfed.federation.client.handler.Trainer.query`.

    Attributes:
        nodes: partition id -> node id.
    """

    def __init__(self, num_clients: int, sizes: dict[int, int] | None = None, shape: Mapping[str, int] | None = None):
        self.shape = shape or {}
        self.num_clients, self.sizes = num_clients, {} if sizes is None else sizes
        self.nodes: dict[int, int] = {}
        self._asked: dict[int, Asked] = {}  # by node, in the order in which they were first seen
        self._reason = "no client connected"

    def gather(self, grid: Grid, timeout: float) -> None:
        """Wait for the clients before the first round.

        Args:
            grid: reaches the nodes.
            timeout: seconds to wait for them (at most 300).

        Raises:
            RunFailed: there is none.
        """
        deadline = time.monotonic() + min(timeout, LONGEST_START)
        while True:
            online = _online(grid)
            self._ask(grid, online)
            self._assign(online, said=False)
            if self._complete(grid, online) or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if not self.nodes:
            raise RunFailed(self._reason)
        if missing := [client for client in range(self.num_clients) if client not in self.nodes]:
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            log.warning("%d of %d clients are missing so far: %s", len(missing), self.num_clients, shown)

    def update(self, grid: Grid) -> None:
        """Take in nodes that connected, or recovered, since.

        Clients that were missing, and SuperNodes without a registered key that were started anew, which Flower takes
        for others. A client whose node is online keeps it; else it goes to the node that said first to hold it.
        """
        if _local(grid):  # all nodes are there from the start
            return
        deadline = time.monotonic() + PATIENCE
        while True:
            online = _online(grid)
            holders = [(node, self._asked[node]) for node in self.nodes.values()]
            unchanged = all(online.get(node) == asked.active and not asked.question for node, asked in holders)
            if unchanged and len(self.nodes) >= self.num_clients:
                return
            self._ask(grid, online)
            self._assign(online, said=True)
            new = any(a.question and not a.refusals and a.since >= deadline - PATIENCE for a in self._asked.values())
            if not new or time.monotonic() > deadline:
                return
            time.sleep(0.1)

    def _complete(self, grid: Grid, online: dict[int, str]) -> bool:
        """Whether there is nobody to wait for before round 1."""
        heard = [node for node in online if (a := self._asked[node]).client is not None or a.refusals]
        if _local(grid):
            return len(heard) == len(online)
        if self.num_clients:
            return len(self.nodes) >= self.num_clients
        late = time.monotonic() - USUAL
        return bool(self.nodes) and all(node in heard or self._asked[node].since < late for node in online)

    def _ask(self, grid: Grid, online: dict[int, str]) -> None:
        """Ask the nodes whose turn it is, and take in the answers that have come."""
        now = time.monotonic()
        due = [node for node in online if self._due(node, online[node], now)]
        messages = [Message(RecordDict(), node, MessageType.QUERY, group_id="roster") for node in due]
        for node in due:
            asked = self._asked.setdefault(node, Asked(online[node]))
            if asked.active != online[node]:  # started anew: what it said does not count until it says it again
                asked.refusals = 0
            asked.active, asked.since, asked.question = online[node], now, ""
        if _local(grid):
            replies: Iterable[Message] = grid.send_and_receive(messages, timeout=USUAL) if messages else ()
            for reply in replies:
                self._take(reply, reply.metadata.src_node_id)
            return
        questions = list(grid.push_messages(messages)) if messages else []
        if len(questions) == len(due):
            for node, question in zip(due, questions, strict=True):
                self._asked[node].question = question
        waiting = {asked.question: node for node, asked in self._asked.items() if asked.question}
        for reply in grid.pull_messages(list(waiting)) if waiting else ():
            asked_for = waiting.get(reply.metadata.reply_to_message_id)
            away = reply.has_error() and reply.error.code in AWAY
            if asked_for is not None and (away or reply.metadata.src_node_id == asked_for):
                self._take(reply, asked_for)

    def _due(self, node: int, active: str, now: float) -> bool:
        asked = self._asked.get(node)
        if asked is None or asked.active != active:
            return True
        open_question = asked.question and now - asked.since < LONGEST_PAUSE
        return not open_question and asked.client is None and now >= asked.due

    def _take(self, reply: Message, node: int) -> None:
        """An answer."""
        asked = self._asked[node]
        asked.question = ""
        if reply.has_error() and reply.error.code in AWAY:
            asked.due = time.monotonic() + 0.5  # Flower's word for a node that is away; it may be back in a moment
            return
        try:
            if reply.has_error():
                raise wire.BadMessage(reason(reply))
            client, size = _who(reply.content.get("client"), self.num_clients)
            _same_problem(reply.content.get("client"), self.shape, client)
            if size and self.sizes.get(client, size) != size and client in self.nodes:
                raise wire.BadMessage(f"client {client} had {self.sizes[client]} examples and now has {size}")
        except wire.BadMessage as error:
            self._release(node, None)
            self._refuse(node, str(error))
            asked.refusals += 1
            asked.due = time.monotonic() + min(AGAIN * 2 ** (asked.refusals - 1), LONGEST_PAUSE)
            return
        self._release(node, client)
        asked.client, asked.refusals = client, 0
        if size:
            self.sizes.setdefault(client, size)

    def _release(self, node: int, client: int | None) -> None:
        """``node`` is ``client`` and no other any more."""
        before = self._asked[node].client
        self._asked[node].client = client
        if before is not None and before != client and self.nodes.get(before) == node:
            log.warning("client %d is missing: node %d does not answer for it any more", before, node)
            del self.nodes[before]

    def _assign(self, online: dict[int, str], said: bool) -> None:
        """Give clients that are missing or not online to the nodes that say they are them; ``said``: and log each."""
        for node, asked in self._asked.items():
            client = asked.client
            if client is None or node not in online or self.nodes.get(client) == node:
                continue
            if self.nodes.get(client) in online:
                self._refuse(node, f"client {client} is node {self.nodes[client]} already")
                continue
            if said:
                log.warning("client %d is node %d from now on", client, node)
            self.nodes[client], asked.reason = node, ""
            self.nodes = dict(sorted(self.nodes.items()))

    def _refuse(self, node: int, reason: str) -> None:
        asked = self._asked[node]
        if asked.reason != reason:  # not in every round
            log.warning("node %d is left out: %s", node, reason)
        asked.reason = self._reason = reason


def _local(grid: Grid) -> bool:
    """Whether it is one of bayesfed's engines."""
    return hasattr(grid, "stream")


def _online(grid: Grid) -> dict[int, str]:
    """The nodes that are online, and when each was activated last."""
    return dict.fromkeys(grid.get_node_ids(), "") if _local(grid) else activated(grid)


def _who(answer: object, num_clients: int) -> tuple[int, int]:
    """Partition id and number of examples (0 if not given) as a node says.

    Raises:
        BadMessage: a value is missing or out of range.
    """
    partition = int(wire.value(answer, "partition-id", int))
    if partition < 0 or (num_clients and partition >= num_clients):
        raise wire.BadMessage(f"value 'partition-id' is {partition}, there are {num_clients} clients")
    size = 0
    if isinstance(answer, ConfigRecord) and "num-examples" in answer:
        size = int(wire.value(answer, "num-examples", int))
        if not 1 <= size <= 10**15:
            raise wire.BadMessage(f"value 'num-examples' is {size}, out of range")
    return partition, size


def _same_problem(answer: object, shape: Mapping[str, int], partition: int) -> None:
    """Compare a node's numbers of features and outputs, and the digests of names, with the federation's.

    Raises:
        BadMessage: they differ.
    """
    for name, ours in shape.items():
        if isinstance(answer, ConfigRecord) and name in answer and (theirs := wire.value(answer, name, int)) != ours:
            if name == "names" and 0 in (theirs, ours):  # there are none to compare
                continue
            if name == "names":
                fix = "have other column or class names, or another order"
                raise wire.BadMessage(
                    f"the data of client {partition} {fix}; data.features and data.classes say which, for all"
                )
            fix = "; data.classes says how many classes there are, for all" if name == "outputs" else ""
            raise wire.BadMessage(
                f"the data of client {partition} have {theirs} {name}, the federation has {ours}{fix}"
            )
