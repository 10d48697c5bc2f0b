"""Messages to the nodes of a SuperLink: replies as they come, and once more to a node that was restarted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from logging import getLogger

from flwr.app import Error, Message
from flwr.serverapp import Grid

from bayesfed.wire.flower_version import AWAY

log = getLogger("bayesfed")
RETURN = 120.0  # seconds that a node may be away
ATTEMPTS = 3  # times that a message goes out
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 3.0  # seconds between two looks; Flower's own loop takes the longest


@dataclass
class Errand:
    """A message on its way.

    Attributes:
        message: as it was first sent.
        active: when its node was activated last, as of the latest attempt; "" = the node was away.
        attempts: times it was sent.
        lost: when the SuperLink gave the latest attempt up (``time.monotonic()``), and the reason; None: it did not.
    """

    message: Message
    active: str = ""
    attempts: int = 0
    lost: tuple[float, Error] | None = None

    @property
    def node(self) -> int:
        """The node it goes to."""
        return self.message.metadata.dst_node_id


def deliver(grid: Grid, messages: Iterable[Message], timeout: float, gone: set[int] | None = None) -> Iterator[Message]:
    """Send ``messages``, one to a node, and yield the replies as they come, for ``timeout`` seconds at most.

    A SuperNode that is killed takes the message it was working on with it, and Flower does not deliver one twice. So a
    message goes out again when its node is back (the SuperLink says when a node was activated last): solving a round
    again gives the same site and the same reply. A node that stays away for ``RETURN`` seconds yields an error reply.

    A reply counts for the node to which the message it answers was sent (Flower's ``reply_to_message_id``), and only if
    it comes from there.

    Args:
        grid: reaches the nodes.
        messages: to send.
        timeout: seconds.
        gone: nodes that were given up before and are not waited for if they are still away; kept up to date.
    """
    gone = set() if gone is None else gone
    deadline = time.monotonic() + timeout
    waiting = [Errand(message) for message in messages]
    asked: dict[str, Errand] = {}  # by the message id of each attempt
    _send(grid, waiting, asked, activated(grid))
    pause = getattr(grid, "pull_interval", FIRST_PAUSE)
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(list(asked)) if asked else ():
            errand = asked.pop(reply.metadata.reply_to_message_id, None)
            if errand is None or errand not in waiting:
                continue
            if reply.has_error() and reply.error.code in AWAY:
                if errand not in asked.values():  # no other attempt is under way
                    errand.lost = time.monotonic(), reply.error
                continue
            waiting.remove(errand)
            gone.discard(errand.node)
            if reply.metadata.src_node_id == errand.node:
                yield reply
            else:
                log.warning("node %d answered in the place of node %d", reply.metadata.src_node_id, errand.node)
                yield Message(Error(0, "the reply came from another node"), reply_to=errand.message)
        active = activated(grid) if waiting else {}
        again = [
            e for e in waiting if e.node in active and (e.lost or e.active != active[e.node]) and e.attempts < ATTEMPTS
        ]
        for errand in again:
            log.warning("node %d gets its message again: it was restarted, or its reply was lost", errand.node)
        _send(grid, again, asked, active)
        for errand in list(waiting):
            if errand.lost is None:
                continue
            since, error = errand.lost
            if errand.node in gone or errand.attempts >= ATTEMPTS or time.monotonic() - since > RETURN:
                waiting.remove(errand)
                gone.add(errand.node)
                yield Message(error, reply_to=errand.message)
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())) if waiting else 0.0)
        pause = min(1.3 * pause, LONGEST_PAUSE)


def _send(grid: Grid, errands: list[Errand], asked: dict[str, Errand], active: dict[int, str]) -> None:
    """One more attempt at each errand."""
    if not errands:
        return
    messages = [e.message if e.attempts == 0 else _copy(e.message) for e in errands]
    identifiers = list(grid.push_messages(messages))
    if len(identifiers) != len(messages):  # Flower's word for a payload that is too large
        identifiers = [""] * len(messages)
    for errand, identifier in zip(errands, identifiers, strict=True):
        errand.attempts, errand.active, errand.lost = errand.attempts + 1, active.get(errand.node, ""), None
        if identifier:
            asked[identifier] = errand
        else:
            errand.lost = time.monotonic(), Error(0, "the SuperLink did not take the message")


def _copy(message: Message) -> Message:
    meta = message.metadata
    return Message(message.content, meta.dst_node_id, meta.message_type, group_id=meta.group_id)


def activated(grid: Grid) -> dict[int, str]:
    """When each node that is online was activated last."""
    return {node.node_id: node.last_activated_at for node in grid.get_nodes()}
