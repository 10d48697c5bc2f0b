"""The order in which Ray workers get their work."""

from __future__ import annotations

import math

import pytest

from bayesfed.engine.ray_grid import unit_sizes
from bayesfed.engine.ray_schedule import LARGEST_BATCH, Schedule


def drain(schedule: Schedule, workers: int = 2) -> list[list[int]]:
    """Hand out everything, each call answered before the next."""
    calls, turn = [], 0
    while chosen := schedule.next(turn % workers):
        calls.append(chosen)
        for unit in chosen:
            schedule.done(unit)
        turn += 1
    return calls


def test_long_units_go_longest_first():
    seconds = [1.0, 5.0, 2.0, 9.0, 3.0]
    order = [unit for (unit,) in drain(Schedule(seconds, [None] * 5, 2, 100))]
    assert order == [3, 1, 4, 2, 0]


def test_no_more_answers_wait_than_the_window_allows():
    seconds = [0.1, *range(1, 40)]
    schedule = Schedule(seconds, [None] * 40, 2, window=6)
    handed = []
    while chosen := schedule.next(0):
        handed += chosen  # nothing is answered
    assert sorted(handed) == [0, 1, 2, 3, 4, 5]
    schedule.done(3)
    assert schedule.next(0) == []
    schedule.done(0)
    assert schedule.next(0) == [6]
    assert schedule.left == 33


def test_short_units_go_out_together_in_order():
    schedule = Schedule([0.002] * 1000, [None] * 1000, 2, 10_000)
    calls = drain(schedule)
    assert [unit for call in calls for unit in call] == list(range(1000))
    assert len(calls[0]) == 10
    assert len(drain(Schedule([1e-6] * 1000, [None] * 1000, 1, 10_000))[0]) == LARGEST_BATCH
    # every worker gets some, and gives answers while the others are busy
    assert [len(call) for call in drain(Schedule([1e-6] * 8, [None] * 8, 2, 10_000))] == [4, 4]


def test_calls_get_shorter_towards_the_end_but_stay_worth_their_cost():
    lengths = [len(call) for call in drain(Schedule([0.0005] * 100, [None] * 100, 2, 10_000))]
    assert lengths == [25, 19, 14, 11, 8, 6, 5, 4, 4, 4]


def test_unknown_units_take_as_long_as_the_shortest_seen():
    schedule = Schedule([math.inf] * 100, [None] * 100, 2, 1000)
    assert schedule.next(0) == [0]
    assert schedule.next(1) == [1]
    schedule.done(0, 3.0)  # loaded the data
    assert schedule.next(0) == [2]
    schedule.done(2, 0.004)
    assert schedule.next(0) == [3, 4, 5, 6, 7]


def test_a_worker_keeps_its_clients_where_that_costs_nothing():
    schedule = Schedule([1.0, 1.1, 1.0, 0.2], [0, 1, 1, 0], 2, 100)
    assert schedule.next(0) == [0]
    assert schedule.next(1) == [1]
    assert schedule.next(0) == [2]  # the short one can wait, though it is this worker's own


def test_units_of_a_dead_worker_go_out_alone():
    schedule = Schedule([0.001] * 10, [None] * 10, 1, 100)
    lost = schedule.next(0)
    assert lost == [0, 1, 2, 3, 4]
    schedule.again(lost)
    assert drain(schedule, 1)[:6] == [[0], [1], [2], [3], [4], [5, 6, 7]]


@pytest.mark.parametrize(
    ("messages", "size", "workers", "groups"),
    [(50, 4, 2, 10), (50, 1, 2, 0), (7, 4, 2, 0), (10_000, 32, 2, 310), (50, 4, 32, 0)],
)
def test_the_last_units_are_single_messages(messages: int, size: int, workers: int, groups: int) -> None:
    sizes = unit_sizes(messages, size, workers, whole=False)
    assert sizes == [size] * groups + [1] * (messages - size * groups)
    assert len(sizes) - groups >= min(messages, size * workers)


def test_units_trained_side_by_side_stay_whole() -> None:
    assert unit_sizes(70, 32, 2, whole=True) == [32, 32, 6]


def test_a_second_call_is_given_while_the_others_have_enough_to_do():
    schedule = Schedule([1.2, 0.2, 0.2, 0.2, 0.1, 0.1], [None] * 6, 2, 100)
    assert schedule.next(0) == [0]
    assert not schedule.outlasts(1.2)  # 0.8 s are left: the first worker must not take more
    assert schedule.outlasts(0.8)
    schedule.next(1)
    assert schedule.outlasts(0.6)
    assert not schedule.outlasts(0.7)
    schedule.again([1])
    assert schedule.outlasts(0.8)
    narrow = Schedule([1.0] * 9, [None] * 9, 2, window=3)
    narrow.next(0)
    assert narrow.outlasts(2.0)
    assert not narrow.outlasts(2.1)  # what the window holds back is not there yet
    three = Schedule([0.5] * 7, [None] * 7, 3, 100)
    three.next(0)
    assert three.outlasts(1.5)  # two other workers share 3 s
    assert not three.outlasts(1.6)


def test_unknown_units_count_as_equal_for_a_second_call():
    schedule = Schedule([math.inf] * 6, [None] * 6, 2, 100)
    for _ in range(2):
        schedule.next(0)
    assert schedule.outlasts(math.inf)
    schedule.next(1)
    assert not schedule.outlasts(math.inf)
