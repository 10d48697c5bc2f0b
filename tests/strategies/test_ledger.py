"""Which rounds of a client count: now, as of the last checkpoint, and as of the one before."""

import json

from bayesfed.federation.server.ledger import Ledger


def test_a_client_hears_of_three_states_of_the_server() -> None:
    ledger = Ledger()
    assert ledger.rounds(3) == {"accepted": 0, "durable": 0, "older": 0}
    ledger.accept([0, 3], 1)
    ledger.saved()
    ledger.accept([3], 2)
    ledger.saved()
    ledger.accept([0, 3], 4)
    assert ledger.rounds(3) == {"accepted": 4, "durable": 2, "older": 1}
    assert ledger.rounds(0) == {"accepted": 4, "durable": 1, "older": 1}
    assert ledger.rounds(1) == {"accepted": 0, "durable": 0, "older": 0}


def test_a_checkpoint_brings_back_what_it_and_the_one_before_it_knew() -> None:
    ledger, states = Ledger(), []
    for round in (1, 2, 3):
        ledger.accept([0, 1] if round < 3 else [1], round)
        states.append(json.loads(json.dumps(ledger.state())))
        ledger.saved()
    again = Ledger()
    again.load(states[2])
    assert again == Ledger({0: 2, 1: 3}, {0: 2, 1: 3}, {0: 2, 1: 2})
    again.load(states[1])  # the newest is damaged
    assert again.rounds(1) == {"accepted": 2, "durable": 2, "older": 1}
    again.load({"accepted": {"1": 5}})  # as the first bayesfed wrote it
    assert again.rounds(1) == {"accepted": 5, "durable": 5, "older": 5}


def test_what_was_saved_does_not_change_later() -> None:
    ledger = Ledger()
    ledger.accept([0], 1)
    state = ledger.state()
    ledger.saved()
    ledger.accept([0], 2)
    assert (state["accepted"], ledger.durable) == ({0: 1}, {0: 1})
