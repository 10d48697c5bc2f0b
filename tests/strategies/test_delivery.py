"""Messages over a SuperLink that loses nodes: each is answered once, by the node it went to, as long as that node
returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from bayesfed.federation.server import delivery
from bayesfed.federation.server.delivery import deliver
from bayesfed.federation.server.roster import Roster
from bayesfed.wire.flower_version import set_identity

pytestmark = pytest.mark.faults
GONE = Error(5, "the node is not available")


@dataclass
class Node:
    """``work`` seconds for a message; ``away`` are the times in which it is not there: it forgets what it had when they
    begin.
    """

    work: float = 2.0
    away: tuple[tuple[float, float], ...] = ()
    noticed: bool = True  # whether the SuperLink sees it leave

    def online(self, now: float) -> bool:
        return not any(start <= now < end for start, end in self.away)

    def activated(self, now: float) -> str:
        return str(max((end for _, end in self.away if end <= now), default=0.0))


class SuperLink:
    """What ``deliver`` uses of Flower's grid, with a clock of its own. Like Flower, it delivers a message once."""

    def __init__(self, nodes: dict[int, Node]):
        set_identity()
        self.nodes, self.now, self.count = nodes, 0.0, 0
        self.sent: dict[str, tuple[Message, float]] = {}
        self.attempts: list[int] = []

    def get_nodes(self):
        online = {k: n for k, n in self.nodes.items() if n.online(self.now) or not n.noticed}
        return [SimpleNamespace(node_id=k, last_activated_at=n.activated(self.now)) for k, n in online.items()]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            self.count += 1
            ids.append(f"m{self.count}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent[ids[-1]] = message, self.now
            self.attempts.append(message.metadata.dst_node_id)
        return ids

    def pull_messages(self, ids):
        for name in ids:
            message, at = self.sent[name]
            node = self.nodes[message.metadata.dst_node_id]
            if any(at < start <= at + node.work for start, _ in node.away):  # it died with the message
                if node.noticed and not node.online(self.now):
                    yield self.reply(message, GONE)
            elif not node.online(self.now) and node.noticed:
                yield self.reply(message, GONE)
            elif node.online(self.now) and self.now >= at + node.work:
                yield self.reply(message, RecordDict({"metrics": MetricRecord({"attempt": int(name[1:])})}))

    @staticmethod
    def reply(message: Message, content: Error | RecordDict) -> Message:
        made = Message(content, reply_to=message)
        if isinstance(content, Error):  # the SuperLink's own word
            made.metadata.__dict__["_src_node_id"] = 1
        return made


@pytest.fixture
def run(monkeypatch):
    def run(
        nodes: dict[int, Node], timeout: float = 1000.0, grid: type[SuperLink] = SuperLink, gone: set[int] | None = None
    ):
        link = grid(nodes)
        monkeypatch.setattr(delivery.time, "monotonic", lambda: link.now)
        monkeypatch.setattr(delivery.time, "sleep", lambda seconds: setattr(link, "now", link.now + max(seconds, 1e-3)))
        messages = [
            Message(RecordDict({"method": ConfigRecord({"round": 1})}), k, "train", group_id="1") for k in nodes
        ]
        came = [
            (reply.metadata.src_node_id, reply.has_error(), link.now)
            for reply in deliver(link, messages, timeout, gone)
        ]
        return link, came

    return run


def test_replies_come_one_by_one_in_the_order_of_arrival(run) -> None:
    link, came = run({10: Node(9.0), 11: Node(1.0), 12: Node(5.0)})
    assert [(node, failed) for node, failed, _ in came] == [(11, False), (12, False), (10, False)]
    assert [round(at) for _, _, at in came] == pytest.approx([1, 5, 9], abs=3)
    assert link.attempts == [10, 11, 12]


@pytest.mark.parametrize("noticed", [True, False])
def test_a_restarted_node_gets_its_message_again(run, noticed: bool) -> None:
    """Killed while it worked and back 40 s later, whether or not the SuperLink had noticed."""
    link, came = run({10: Node(), 11: Node(10.0, ((5.0, 45.0),), noticed)})
    assert [(node, failed) for node, failed, _ in came] == [(10, False), (11, False)]
    assert link.attempts == [10, 11, 11]
    assert 55 <= came[1][2] <= 62


def test_a_node_that_stays_away_is_given_up(run) -> None:
    link, came = run({10: Node(), 11: Node(10.0, ((5.0, 1e9),))})
    assert [(node, failed) for node, failed, _ in came] == [(10, False), (11, True)]
    assert 120 <= came[1][2] <= 140
    assert link.attempts == [10, 11]


def test_a_node_that_is_away_at_first_is_waited_for_but_not_twice(run) -> None:
    gone: set[int] = set()
    link, came = run({10: Node(), 11: Node(10.0, ((0.0, 50.0),))}, gone=gone)
    assert [(node, failed) for node, failed, _ in came] == [(10, False), (11, False)]
    assert link.attempts == [10, 11, 11]
    assert gone == set()
    _, came = run({10: Node(), 11: Node(10.0, ((0.0, 1e9),))}, gone=gone)
    assert [(node, failed, at > 100) for node, failed, at in came] == [(10, False, False), (11, True, True)]
    assert gone == {11}
    _, came = run({10: Node(), 11: Node(10.0, ((0.0, 1e9),))}, gone=gone)
    assert [(node, failed) for node, failed, _ in came] == [(11, True), (10, False)]
    assert came[0][2] < 1
    run({11: Node()}, gone=gone)
    assert gone == set()


def test_a_node_that_dies_of_every_attempt_is_given_up(run) -> None:
    """After three attempts, however often it returns."""
    dying = tuple((t + 1.0, t + 20.0) for t in range(0, 1000, 20))
    link, came = run({11: Node(25.0, dying)})
    assert [(node, failed) for node, failed, _ in came] == [(11, True)]
    assert link.attempts == [11] * 3


def test_the_deadline_ends_it(run) -> None:
    _, came = run({10: Node(1.0), 11: Node(1e6)}, timeout=30.0)
    assert [node for node, _, _ in came] == [10]


def test_a_reply_from_another_node_does_not_count(run) -> None:
    """The answer of node 11 to the message of node 10."""

    class Confused(SuperLink):
        @staticmethod
        def reply(message, content):
            made = SuperLink.reply(message, content)
            if made.metadata.src_node_id == 10:
                made.metadata.__dict__["_src_node_id"] = 11
            return made

    _, came = run({10: Node(), 11: Node()}, grid=Confused)
    assert sorted((node, failed) for node, failed, _ in came) == [(10, True), (11, False)]


def test_messages_that_the_superlink_does_not_take(run) -> None:
    class Full(SuperLink):
        def push_messages(self, messages):
            return []

    _, came = run({10: Node(), 11: Node()}, grid=Full)
    assert [(node, failed) for node, failed, _ in came] == [(10, True), (11, True)]


# -- nodes that come later ---------------------------------------------------------------------------------------------


class Asked(SuperLink):
    """Nodes say which partition they hold, with how many examples: ``said[node]``; who is online is up to the test."""

    def __init__(self, said: dict[int, tuple[int, int]]):
        super().__init__({})
        self.said, self.queries = said, 0
        self.nodes = {node: Node(0.0) for node in said}

    def get_node_ids(self):
        return list(self.nodes)

    def pull_messages(self, ids):
        for name in ids:
            message, _ = self.sent[name]
            if message.metadata.dst_node_id in self.nodes:
                self.queries += 1
                partition, size = self.said[message.metadata.dst_node_id]
                info = ConfigRecord({"partition-id": partition, "num-examples": size})
                yield self.reply(message, RecordDict({"client": info}))

    def online(self, *nodes: int) -> None:
        self.nodes = {node: Node(0.0) for node in nodes}


@pytest.fixture
def asked(monkeypatch):
    def asked(said: dict[int, tuple[int, int]], *first: int) -> tuple[Asked, Roster]:
        link, made = Asked(said), Roster(2)
        monkeypatch.setattr(delivery.time, "monotonic", lambda: link.now)
        monkeypatch.setattr(delivery.time, "sleep", lambda seconds: setattr(link, "now", link.now + max(seconds, 1e-3)))
        link.online(*first)
        made.gather(link, 10.0)
        return link, made

    return asked


def test_a_node_that_was_started_anew_is_known_by_its_partition_id(asked) -> None:
    """Without a registered key it has a new node id. While Flower still believes in the old node, that one stays."""
    link, roster = asked({10: (0, 5), 11: (1, 7), 12: (1, 7)}, 10, 11)
    link.online(10, 11, 12)
    roster.update(link)
    assert (roster.nodes, link.queries) == ({0: 10, 1: 11}, 2)  # nobody is missing: nobody is asked
    link.online(10, 12)
    for _ in range(3):
        roster.update(link)
    assert (roster.nodes, link.queries) == ({0: 10, 1: 12}, 3)


def test_a_client_that_connects_late_is_taken_in(asked) -> None:
    link, roster = asked({10: (0, 5), 11: (1, 7)}, 10)
    assert (roster.nodes, roster.sizes) == ({0: 10}, {0: 5})
    link.online(10, 11)
    roster.update(link)
    assert (roster.nodes, roster.sizes) == ({0: 10, 1: 11}, {0: 5, 1: 7})


def test_nobody_takes_the_place_of_a_client_that_is_there(asked) -> None:
    """Nor with other data, or under an id that does not exist; a client that nobody else holds keeps its node while it
    is away.
    """
    link, roster = asked({10: (0, 5), 11: (1, 7), 12: (0, 5), 13: (1, 8), 14: (2, 7)}, 10, 11)
    link.online(10, 12, 13, 14)
    for _ in range(2):
        roster.update(link)
    assert (roster.nodes, roster.sizes) == ({0: 10, 1: 11}, {0: 5, 1: 7})
    link.online(12)
    roster.update(link)
    assert roster.nodes == {0: 12, 1: 11}
    link.online(10, 11, 12)  # the first is back
    roster.update(link)
    assert roster.nodes == {0: 12, 1: 11}
    link.online(10, 11)
    roster.update(link)
    assert roster.nodes == {0: 10, 1: 11}
