"""Who is which client: strangers and failures don't count as clients, and who comes late or recovers joins."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from bayesfed.federation.server.roster import PATIENCE, Roster
from bayesfed.wire.flower_version import CLIENT_RAISED, set_identity

MUTE, BROKEN = "mute", "broken"


@dataclass
class Node:
    """Connects at ``at`` seconds and answers what ``says(now)`` gives: (client, examples), MUTE or BROKEN."""

    says: object
    at: float = 0.0
    until: float = 1e9
    activated: str = "once"
    work: float = 1.0
    asked: list[float] = field(default_factory=list)


class Link:
    """What the roster uses of Flower's grid, with a clock of its own."""

    def __init__(self, **nodes: Node):
        set_identity()
        self.nodes = {int(name.removeprefix("n")): node for name, node in nodes.items()}
        self.now, self.sent = 0.0, {}

    def get_nodes(self):
        online = {k: n for k, n in self.nodes.items() if n.at <= self.now < n.until}
        return [SimpleNamespace(node_id=k, last_activated_at=n.activated) for k, n in online.items()]

    def push_messages(self, messages):
        for message in messages:
            self.nodes[message.metadata.dst_node_id].asked.append(self.now)
            message.metadata.__dict__["_message_id"] = f"m{len(self.sent)}"
            self.sent[f"m{len(self.sent)}"] = message, self.now
            yield f"m{len(self.sent) - 1}"

    def pull_messages(self, ids):
        for name in ids:
            message, at = self.sent[name]
            node = self.nodes[message.metadata.dst_node_id]
            said = node.says(at) if callable(node.says) else node.says
            if said == MUTE or self.now < at + node.work:
                continue
            if said == BROKEN:
                yield Message(Error(CLIENT_RAISED, "<class 'OSError'>:<'no disk\x1b[31m'>"), reply_to=message)
            else:
                client = ConfigRecord({"partition-id": said[0], "num-examples": said[1]})
                yield Message(RecordDict({"client": client}), reply_to=message)


@pytest.fixture
def link(monkeypatch):
    """``link(n1=Node(...), ...)`` whose clock is everybody's."""

    def made(**nodes: Node) -> Link:
        one = Link(**nodes)
        monkeypatch.setattr(time, "monotonic", lambda: one.now)
        monkeypatch.setattr(time, "sleep", lambda seconds: setattr(one, "now", one.now + max(seconds, 1e-3)))
        return one

    return made


def gathered(link: Link, clients: int, timeout: float = 100.0) -> Roster:
    roster = Roster(clients)
    roster.gather(link, timeout)
    return roster


def test_a_stranger_with_a_taken_id_does_not_end_the_wait(link, caplog) -> None:
    """The fourth client connects after 40 s; two strangers claim client 1 from the start."""
    grid = link(
        n1=Node((0, 5)), n2=Node((1, 6)), n3=Node((2, 7)), n4=Node((1, 6)), n5=Node((1, 9)), n9=Node((3, 8), at=40)
    )
    roster = gathered(grid, 4)
    assert (roster.nodes, roster.sizes) == ({0: 1, 1: 2, 2: 3, 3: 9}, {0: 5, 1: 6, 2: 7, 3: 8})
    assert 40 <= grid.now < 43
    assert caplog.text.count("node 4 is left out: client 1 is node 2 already") == 1
    assert grid.nodes[4].asked == [0.0]  # its answer is known
    assert len(grid.nodes[5].asked) <= 5  # another size, which may change


def test_a_client_whose_first_question_fails_is_asked_again(link, caplog) -> None:
    """Its disk is mounted after 20 s; nothing that it says reaches the log as control."""
    grid = link(n1=Node((0, 5)), n2=Node(lambda now: BROKEN if now < 20 else (1, 6)))
    assert gathered(grid, 2).nodes == {0: 1, 1: 2}
    assert 20 < grid.now < 45
    assert len(grid.nodes[2].asked) <= 5
    assert caplog.text.count("node 2 is left out: OSError: no disk\\x1b[31m") == 1


def test_it_recovers_between_rounds(link, caplog) -> None:
    grid = link(n1=Node((0, 5)), n2=Node(lambda now: BROKEN if now < 2000 else (1, 6)))
    roster = gathered(grid, 2)
    assert roster.nodes == {0: 1}
    assert "1 of 2 clients are missing so far: 1" in caplog.text
    while grid.now < 3000:
        before = grid.now
        roster.update(grid)
        assert grid.now - before <= 0.01  # nobody waits for a node whose last answer was no good
        grid.now += 30
    assert roster.nodes == {0: 1, 1: 2}
    assert len([at for at in grid.nodes[2].asked if at < 2000]) <= 12
    assert "client 1 is node 2 from now on" in caplog.text


def test_a_node_that_never_answers_does_not_block_rounds(link) -> None:
    grid = link(n1=Node((0, 5)), n2=Node(MUTE))
    roster = gathered(grid, 2, timeout=30)
    assert roster.nodes == {0: 1}
    began = grid.now
    for _ in range(100):
        roster.update(grid)
    assert grid.now - began <= PATIENCE + 1
    assert grid.nodes[2].asked == [0.0]


def test_strangers_by_the_dozen_cost_a_bounded_number_of_questions(link) -> None:
    strangers = {f"n{k}": Node((0, 6)) for k in range(10, 60)}
    grid = link(n1=Node((0, 5)), **strangers)
    roster = gathered(grid, 2, timeout=10)
    for _ in range(1000):
        roster.update(grid)
        grid.now += 10
    assert roster.nodes == {0: 1}
    assert max(len(node.asked) for node in grid.nodes.values()) <= 30  # in three hours


def test_the_first_to_claim_a_client_holds_it_until_it_leaves(link) -> None:
    """Known limit; then the node that was refused takes its place without being asked again."""
    grid = link(n1=Node((0, 5)), n8=Node((1, 6), until=500), n2=Node((1, 6), at=3))
    roster = gathered(grid, 2)
    grid.nodes[1].until = 100  # something is missing: the newcomer is asked
    grid.now = 200
    roster.update(grid)
    assert roster.nodes == {0: 1, 1: 8}
    grid.nodes[1].until = 1e9
    grid.now = 600
    roster.update(grid)
    assert roster.nodes == {0: 1, 1: 2}
    assert len(grid.nodes[2].asked) == 1


def test_a_node_that_was_started_anew_as_another_client(link, caplog) -> None:
    """With a registered key it stays the same node; what it was is missing, what it is now is there."""
    grid = link(n1=Node((0, 5)), n2=Node((1, 6)))
    roster = gathered(grid, 3, timeout=10)
    grid.nodes[2].says, grid.nodes[2].activated = (2, 9), "twice"
    roster.update(grid)
    assert (roster.nodes, roster.sizes[2]) == ({0: 1, 2: 2}, 9)
    assert "client 1 is missing: node 2 does not answer for it any more" in caplog.text
    grid.nodes[7] = Node((1, 6))
    roster.update(grid)
    assert roster.nodes == {0: 1, 1: 7, 2: 2}


def test_a_client_whose_data_changed_is_left_out(link, caplog) -> None:
    grid = link(n1=Node((0, 5)), n2=Node((1, 6)))
    roster = gathered(grid, 2)
    grid.nodes[2].says, grid.nodes[2].activated = (1, 60), "twice"
    roster.update(grid)
    assert (roster.nodes, roster.sizes) == ({0: 1}, {0: 5, 1: 6})
    assert "client 1 had 6 examples and now has 60" in caplog.text


@pytest.mark.parametrize(
    "said", [(0, 5), (7, 5), (-1, 5), ("a\x1b" * 1000, 5), (1, 0), (1, 10**16), (2**62, 5), BROKEN]
)
def test_what_a_node_may_say(link, caplog, said) -> None:
    """Any answer but client 1's own leaves client 1 missing, and its words are one short printable line."""
    grid = link(n1=Node((0, 5)), n2=Node(said))
    assert gathered(grid, 2, timeout=30).nodes == {0: 1}
    lines = [record.getMessage() for record in caplog.records]
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) < 500
    assert any("node 2 is left out" in line for line in lines)


def test_as_many_clients_as_nodes(link) -> None:
    """Without a number the first answer is not taken for all, and a mute node is not waited for beyond a minute."""
    grid = link(n1=Node((0, 5)), n2=Node((1, 6), work=20), n3=Node(MUTE))
    assert gathered(grid, 0).nodes == {0: 1, 1: 2}
    assert 60 <= grid.now < 63
