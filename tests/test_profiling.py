"""Spans: how they nest and add up, and that they are nothing while nothing records."""

from __future__ import annotations

import json

import pytest

from bayesfed import profiling
from bayesfed.profiling import Node, Profiler, each, inside, occupied, recording, span, timed


def seconds(tree: Node) -> dict[str, float]:
    return {path: node.seconds for path, node in tree.paths()}


def calls(tree: Node) -> dict[str, int]:
    return {path: node.calls for path, node in tree.paths()}


def test_spans_nest_and_add_up(clock):
    @timed("update")
    def update():
        clock.sleep(2)

    with recording(Profiler()) as profiler:
        for _ in range(3):
            with span("solve"):
                clock.sleep(1)
                update()
        update()
    assert seconds(profiler.root) == {"solve": 9, "solve/update": 6, "update": 2}
    assert calls(profiler.root) == {"solve": 3, "solve/update": 3, "update": 1}
    assert profiler.root.children["solve"].own == 3


def test_each_counts_what_it_takes_to_get_the_items_and_not_what_is_done_with_them(clock):
    def items():
        for item in "abc":
            clock.sleep(1)
            yield item
        clock.sleep(0.5)

    with recording(Profiler()) as profiler:
        for _ in each("data", items()):
            clock.sleep(10)
    assert seconds(profiler.root) == {"data": 3.5}
    assert calls(profiler.root) == {"data": 3}


def test_inside_tells_the_edges_of_a_context_from_its_body(clock):
    class Context:
        def __enter__(self):
            clock.sleep(1)
            return "value"

        def __exit__(self, kind, error, traceback):
            clock.sleep(2)
            return kind is KeyError

    with recording(Profiler()) as profiler, inside(Context(), "sampling", "gradient") as value:
        clock.sleep(5)
        raise KeyError  # the context swallows it
    assert value == "value"
    assert seconds(profiler.root) == {"sampling": 3, "gradient": 5}
    assert calls(profiler.root) == {"sampling": 2, "gradient": 1}


def test_an_exception_closes_its_spans(clock):
    with recording(Profiler()) as profiler:
        with pytest.raises(IndexError), span("a"), span("b"):  # noqa: PT012 - the spans are what is tested
            clock.sleep(1)
            raise IndexError
        with span("c"):
            clock.sleep(1)
    assert seconds(profiler.root) == {"a": 1, "a/b": 1, "c": 1}


def test_a_profiler_inside_another_takes_over_for_a_while(clock):
    with recording(Profiler()) as outer, span("waiting"):
        with recording(Profiler()) as inner, span("train"):
            clock.sleep(1)
        with recording(None), span("more"):
            clock.sleep(2)
    assert seconds(outer.root) == {"waiting": 3, "waiting/more": 2}
    assert seconds(inner.root) == {"train": 1}


def test_trees_travel_as_flat_numbers(clock):
    profiler, total = Profiler(), Node()
    for _ in range(2):
        with recording(profiler), span("solve"):
            clock.sleep(1)
            with span("update"):
                clock.sleep(0.5)
        numbers = profiler.drain()
        assert numbers == {
            "time/solve": 1.5, "calls/solve": 1, "time/solve/update": 0.5, "calls/solve/update": 1,
        }  # fmt: skip
        total.add_numbers({**numbers, "loss": 7.0})
    assert seconds(total) == {"solve": 3, "solve/update": 1}
    assert calls(total) == {"solve": 2, "solve/update": 2}
    assert Node.from_plain(json.loads(json.dumps(total.plain()))) == total
    assert profiler.drain() == {}


def test_settling_charges_what_no_span_covers(clock):
    profiler = Profiler(ago=4)
    with recording(profiler):
        with span("start-up"), span("load"):
            clock.sleep(1)
        clock.sleep(2)
        profiler.settle("start-up", "engine")
    assert seconds(profiler.root) == {"start-up": 7, "start-up/load": 1, "start-up/engine": 6}
    assert profiler.elapsed() == 7


def test_on_a_gpu_both_ends_of_a_span_wait_for_it(clock):
    log = []
    profiler = Profiler(synchronise=lambda: (log.append(clock.now), clock.sleep(1)))
    with recording(profiler), span("update"):
        clock.sleep(2)
    assert log == [0, 3]
    assert seconds(profiler.root) == {"update": 3}  # the work queued before it is not its own


def test_nothing_happens_while_nothing_records():
    assert profiling.current() is None
    assert span("a") is span("b")
    items, context = iter([1]), span("c")
    assert each("data", items) is items
    assert inside(context, "a", "b") is context
    occupied(0, "train", 1.0, 1)
    with pytest.raises(KeyError), span("a"):
        raise KeyError
    assert not hasattr(span("a"), "__dict__")
