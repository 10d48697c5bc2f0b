"""What a stranger writes, in any kind of message: nothing of it reaches a terminal as control, and no file grows by
it.
"""

from __future__ import annotations

import json
import logging

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from bayesfed import wire
from bayesfed.deployment import command
from bayesfed.federation.server.ask import ask
from bayesfed.runs.json_log import JsonLog
from bayesfed.wire import size as message_size
from bayesfed.wire.flower_version import CLIENT_RAISED, raised, reason, set_identity
from bayesfed.wire.size import message_bytes

P = 5
NASTY = "\x1b]0;owned\x07\x1b[31m[bold red]x[/]\u202e\r\n<script>alert(1)</script>\x00\x9b2J\u2028"
LONG = NASTY * (20_000_000 // len(NASTY))


def error(message: Message, text: str) -> Message:
    return Message(Error(CLIENT_RAISED, text), reply_to=message)


def clean(text: str) -> bool:
    return all(line.isprintable() for line in text.splitlines()) and "\r" not in text


METRICS = {"num-examples": 1, "round": 1}
ARRAYS = {"mean": torch.zeros(P), "precision": torch.ones(P)}
CONTENT = {
    "array names": lambda: RecordDict(
        {"posterior": wire.pack({NASTY: torch.zeros(P)}), "metrics": MetricRecord(METRICS)}
    ),
    "stype": lambda: RecordDict(
        {
            "posterior": ArrayRecord({n: Array("float32", (P,), LONG, b"") for n in ARRAYS}),
            "metrics": MetricRecord(METRICS),
        }
    ),
    "header": lambda: RecordDict(
        {
            "posterior": ArrayRecord(
                {
                    n: Array(
                        "float32",
                        (P,),
                        "numpy.ndarray",
                        b"\x93NUMPY\x01\x00\x76\x00" + (b"{'descr': '" + NASTY.encode() * 9)[:118],
                    )
                    for n in ARRAYS
                }
            ),
            "metrics": MetricRecord(METRICS),
        }
    ),
    "metric names": lambda: RecordDict(
        {
            "posterior": wire.pack(ARRAYS),
            "metrics": MetricRecord({**METRICS, NASTY: 1.0, LONG[:200_000]: 2.0, "accepted": 0, "reason": 1.0}),
        }
    ),
    "many metrics": lambda: RecordDict(
        {
            "posterior": wire.pack(ARRAYS),
            "metrics": MetricRecord({**METRICS, **{f"{k}{NASTY}": 1.0 for k in range(5000)}}),
        }
    ),
    "record names": lambda: RecordDict({NASTY: MetricRecord(METRICS)}),
}


@pytest.fixture
def kept(tmp_path, capfd):
    """``kept()``: all that a log file and the terminal hold."""
    (tmp_path / "log.jsonl").touch()
    log, file, shown = logging.getLogger("bayesfed"), JsonLog(tmp_path / "log.jsonl"), logging.lastResort
    for handler in (file, shown):
        log.addHandler(handler)
    yield lambda: (
        [json.loads(line)["message"] for line in (tmp_path / "log.jsonl").read_text().splitlines()],
        "".join(capfd.readouterr()),
    )
    for handler in (file, shown):
        log.removeHandler(handler)


def check(kept, callbacks) -> None:
    said, terminal = kept()
    lines = [json.dumps(metrics) for metrics in callbacks.metrics.values()]
    lines += [json.dumps(done) for done in callbacks.done.values()]
    assert all(clean(line) for line in [*said, terminal, *lines])
    assert sum(map(len, [*said, terminal, *lines])) < 20_000
    assert "\x1b" not in terminal


@pytest.mark.parametrize("text", [NASTY, LONG, f"<class 'a.Kind'>:<'{LONG}'>"])
def test_error_replies(posterior, strategy, scripted, callbacks, kept, text: str) -> None:
    """To TRAIN, QUERY and EVALUATE messages."""

    class Grid(scripted):
        def stream(self, messages, *, timeout=None):
            for message in messages:
                node, kind = message.metadata.dst_node_id, message.metadata.message_type
                if (kind, node) in (("query", 5), ("train", 3)) or kind == "evaluate":
                    yield error(message, text)
                else:
                    yield from super().stream([message])

    made = strategy()
    grid = Grid(6, lambda c, r: posterior("diagonal", c, r))
    made.start(grid, num_rounds=1, callbacks=callbacks)
    assert callbacks.metrics[1]["clients/replied"] == 4
    assert sorted(callbacks.reasons(1)) == [2]
    assert ask(made, grid, 1, "personalize", {"samples": 2}) == {}
    check(kept, callbacks)


@pytest.mark.parametrize("case", CONTENT)
def test_names_and_values(posterior, strategy, scripted, callbacks, kept, case: str) -> None:
    taken: list[dict[str, float]] = []
    done = callbacks.client_done
    callbacks.client_done = lambda round, client, metrics, reason: (
        taken.append(metrics or {}),
        done(round, client, metrics, reason),
    )
    made = strategy()
    made.reader.limits.__dict__["reply_bytes"] = 10**9  # or the longest are refused for their size
    made.start(
        scripted(6, lambda c, r: CONTENT[case]() if c == 2 else posterior("diagonal", c, r)),
        num_rounds=1,
        callbacks=callbacks,
    )
    assert (case == "metric names") == (2 not in callbacks.reasons(1))
    names = [name for metrics in taken for name in metrics]
    assert all(name.isprintable() for name in names)
    assert max(map(len, names)) < 150
    assert not {"accepted", "reason"} & set(names)  # these are the server's to say
    check(kept, callbacks)


def test_flowers_own_form_is_a_sentence() -> None:
    set_identity()
    asked = Message(RecordDict(), 3, "train", group_id="1")
    reply = error(asked, "<class 'bayesfed.wire.BadMessage'>:<'array 'mean' has shape (6,)'>")
    assert reason(reply) == "BadMessage: array 'mean' has shape (6,)"
    assert raised(error(asked, "<class 'bayesfed.wire.Diverged'>:<'it's away'>"), wire.Diverged)
    assert reason(Message(Error(7), reply_to=asked)) == "error 7"


def test_long_texts_are_not_remembered() -> None:
    """The sizes of names are; a stranger's reasons would fill the memory."""
    set_identity()
    message_size._short.cache_clear()
    asked = Message(RecordDict(), 3, "train", group_id="1")
    assert message_bytes(error(asked, "é" * 1_000_000)) == 2_000_000 + 2 + 4
    assert message_size._short.cache_info().currsize == 0


def test_values_of_a_message(kept) -> None:
    with pytest.raises(wire.BadMessage) as raised:
        wire.value(ConfigRecord({"rho": LONG}), "rho", float)
    assert clean(str(raised.value))
    assert len(str(raised.value)) < 400


def test_what_the_superlink_says(monkeypatch, capsys) -> None:
    said = json.dumps({"success": False, "error-message": NASTY + "x" * 1_000_000})
    monkeypatch.setattr(command, "_flwr", lambda *words: command.subprocess.CompletedProcess(words, 1, said, ""))
    assert command.deploy(["nowhere", "experiment=linreg"]) == 1
    error = capsys.readouterr().err
    assert clean(error)
    assert len(error) < 5000
