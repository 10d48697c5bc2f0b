"""Sizes worked out without serialising, against what Flower serialises: equal to the byte (tolerance 0)."""

from __future__ import annotations

import time

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import error_to_proto, recorddict_to_proto

from bayesfed import wire
from bayesfed.wire.flower_version import error_reply, set_identity
from bayesfed.wire.size import message_bytes, record_bytes

SHAPES = {"point": lambda p: {"mean": (p,)}, "diagonal": lambda p: {"mean": (p,), "precision": (p,)}}
SHAPES |= {
    "isotropic": lambda p: {"mean": (p,), "precision": ()},
    "full": lambda p: {"mean": (p,), "precision": (p, p)},
}
METHOD = ConfigRecord(
    {
        "name": "bayes_admm", "round": 4, "accepted": 3, "durable": 0, "rho": 0.5, "damping": 0.0, "temperature": 1.0,
        "proximal": 0.0, "learn_precision": True, "lr_factor": 1.0,
    }
)  # fmt: skip
METRICS = MetricRecord({"loss": 0.1, "num-examples": 300, "round": 64, "seconds": 0.0})


def message(**records) -> Message:
    set_identity()
    return Message(RecordDict(records), 1, "train")


def serialised(message: Message) -> int:
    return recorddict_to_proto(message.content).ByteSize()


DIMS = (1, 2, 63, 64, 127, 128, 1000, 16_384, 1_000_000)
CASES = [(family, dim, format) for family in SHAPES if family != "full" for dim in DIMS for format in wire.FORMATS]
CASES += [("full", dim, "full") for dim in DIMS if dim <= 1000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "dim", "format"), CASES)
def test_training_messages_and_replies(family: str, dim: int, dtype: torch.dtype, format: str) -> None:
    """Around every size at which a length takes one byte more."""
    shapes = SHAPES[family](dim)
    codec = wire.Codec(format, shapes, dtype)
    arrays = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    down, received = codec.encode(arrays)
    up, _ = codec.encode(arrays, received)
    for sent in (message(posterior=down, method=METHOD), message(posterior=up, metrics=METRICS)):
        assert message_bytes(sent) == serialised(sent)
        assert message_bytes(sent) == sum(record_bytes(name, record) for name, record in sent.content.items())


VALUES = [
    *(0, 1, -1, 63, 64, -64, -65, 8191, 8192, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), 2**63, 2**64 - 1),
    *(0.0, -1.5, float("nan"), True, False, "", "a", "ä" * 70, b"", b"\x00" * 200),
    *([], [0.0, 1.0], [1, -300, 2**40], [2**63, 1], [True, False], ["", "abc", "ü"], [b"", b"ab"], [1.0] * 40),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: repr(v)[:20])
def test_values(value) -> None:
    records = {"config": ConfigRecord({"key": value, "é": value})}
    numbers = value if isinstance(value, list) else [value]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        records["metrics"] = MetricRecord({"key": value, "another": 1})
    sent = message(**records)
    assert message_bytes(sent) == serialised(sent)


def test_odd_contents() -> None:
    garbled = ArrayRecord({"mean": Array(dtype="float32", shape=(300, 0), stype="numpy.ndarray", data=b"")})
    for sent in (message(), message(posterior=garbled), message(posterior=ArrayRecord(), metrics=MetricRecord())):
        assert message_bytes(sent) == serialised(sent)


@pytest.mark.parametrize("reason", ["", "out of memory", "é" * 100])
def test_an_error_has_the_size_of_its_reason(reason: str) -> None:
    reply = error_reply(message(method=METHOD), RuntimeError(reason))
    assert message_bytes(reply) == error_to_proto(reply.error).ByteSize() > len(reason)


def test_the_time_does_not_depend_on_the_size_of_the_arrays() -> None:
    """Well below 20 microseconds; the bound leaves room for a busy machine."""
    arrays = wire.pack({"mean": torch.zeros(5_000_000), "precision": torch.ones(5_000_000)})
    sent, best = message(posterior=arrays, metrics=METRICS), 1.0
    for _ in range(200):
        started = time.perf_counter()
        message_bytes(sent)
        best = min(best, time.perf_counter() - started)
    assert best < 100e-6
