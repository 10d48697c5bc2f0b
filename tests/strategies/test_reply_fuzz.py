"""The reply parser on arbitrary content: a checked reply or ``BadMessage``, never anything else, and never a changed
sum.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bayesfed import wire
from bayesfed.federation.server.limits import Limits
from bayesfed.federation.server.replies import GroupSums
from bayesfed.federation.server.round import Sent
from bayesfed.wire.flower_version import error_reply, set_identity
from bayesfed.wire.records import _header
from strategies import BayesADMM, FedAvg

pytestmark = pytest.mark.faults
P = 4
NUMPY = "numpy.ndarray"


def made(kind: str):
    strategy = FedAvg() if kind == "point" else BayesADMM(family=kind, rho=0.5, damping=0.5, temperature=1.0)
    strategy.setup(torch.zeros(P), 3)
    return strategy


def absorb(strategy, reply: Message, sums: GroupSums | None = None) -> None:
    """Read, check and add up a reply of round 1."""
    strategy.absorb(sums or GroupSums(strategy.empty), strategy.read(reply, 1, Sent(strategy.posterior)), 1)


set_identity()
MADE = {kind: made(kind) for kind in ("point", "isotropic", "diagonal", "full")}
ASKED = Message(RecordDict(), 1, "train", group_id="1")


def mutated(data: bytes, edits: list[tuple[int, int]], cut: int) -> bytes:
    out = bytearray(data)
    for position, value in edits:
        out[position % len(out)] = value
    return bytes(out[: len(out) - cut % len(out)])


numbers = st.one_of(st.floats(width=32), st.sampled_from([0.0, -1.0, 1.0, 3e38, math.inf, math.nan]))
shapes = st.sampled_from([(), (P,), (P, P), (P + 1,), (0,), (1, P), (P, 1)])
values = st.builds(
    lambda numbers, shape, dtype: np.resize(np.array(numbers, dtype=np.float64), shape).astype(dtype),
    st.lists(numbers, min_size=1, max_size=P),
    shapes,
    st.sampled_from(["float32", "float64", "float16", "int64", ">f4"]),
)
edits = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4)
arrays = st.one_of(
    st.builds(lambda v: Array(v), values),
    st.builds(
        lambda v, e, c: Array(str(v.dtype), v.shape, NUMPY, mutated(Array(v).data, e, c)),
        values,
        edits,
        st.integers(0, 30),
    ),
    st.builds(
        lambda d, s, t, b: Array(d, s, t, b),
        st.text(max_size=5),
        shapes,
        st.sampled_from([NUMPY, "", "pickle"]),
        st.binary(max_size=90),
    ),
    st.builds(lambda n: Array("float32", (n,), NUMPY, _header(np.dtype("float32"), (n,))), st.integers(0, 2**62)),
)
positive = st.floats(0.015625, 128.0, width=32)
sound = st.builds(  # posteriors of the three families, most of them good
    lambda mean, precision, shape: wire.pack(
        {
            "mean": torch.tensor(mean),
            "precision": torch.diag(torch.tensor(precision))
            if len(shape) == 2
            else torch.tensor(precision)[: shape[0]].reshape(shape)
            if shape
            else torch.tensor(precision[0]),
        }
    ),
    st.lists(st.one_of(positive, numbers), min_size=P, max_size=P),
    st.lists(st.one_of(positive, positive, numbers), min_size=P, max_size=P),
    st.sampled_from([(), (P,), (P, P)]),
)
names = st.sampled_from(["mean", "precision", "x", ""])
records = st.one_of(
    sound,
    st.builds(ArrayRecord, st.dictionaries(names, arrays, max_size=3)),
    st.builds(lambda m, p: ArrayRecord({"mean": m, "precision": p}), arrays, arrays),
    st.builds(lambda m: ArrayRecord({"mean": m}), arrays),
)
scalars = st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(), st.sampled_from([0, 1, 1.0, 5]))
metrics = st.one_of(
    st.builds(lambda n, f: MetricRecord({"round": 1, "num-examples": n, "floored": f}), scalars, scalars),
    st.builds(
        lambda d: MetricRecord(d),
        st.dictionaries(
            st.sampled_from(["round", "num-examples", "loss", "floored"]),
            st.one_of(scalars, st.lists(st.floats(), max_size=2)),
        ),
    ),
    st.just(MetricRecord({"round": 1, "num-examples": 3})),
    st.just(ConfigRecord({"round": 1, "num-examples": 3})),
)
points = sound.map(lambda record: ArrayRecord({"mean": record["mean"]}))
contents = st.one_of(
    st.builds(
        lambda p: RecordDict({"posterior": p, "metrics": MetricRecord({"round": 1, "num-examples": 3})}),
        st.one_of(sound, points),
    ),
    st.builds(
        lambda p, m, drop: RecordDict({n: r for n, r in (("posterior", p), ("metrics", m)) if n != drop}),
        records,
        metrics,
        st.sampled_from(["", "", "", "posterior", "metrics"]),
    ),
)


@pytest.mark.parametrize("kind", list(MADE))
def test_any_content(kind: str) -> None:
    """2,500 cases for each family: 10,000."""
    strategy, outcomes = MADE[kind], {"accepted": 0, "refused": 0}

    @settings(max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(contents)
    def check(content: RecordDict) -> None:
        sums = GroupSums(strategy.empty)
        before = {name: value.clone() for name, value in sums.total.items()}
        try:
            absorb(strategy, Message(content, reply_to=ASKED), sums)
        except wire.BadMessage:
            outcomes["refused"] += 1
            assert all(torch.equal(value, before[name]) for name, value in sums.total.items())
        else:
            outcomes["accepted"] += 1
            assert all(bool(value.isfinite().all()) for value in sums.total.values())

    check()
    assert sum(outcomes.values()) >= 400
    assert outcomes["accepted"] > 0


def test_error_reply_is_a_refusal() -> None:
    for kind, strategy in MADE.items():
        with pytest.raises(wire.BadMessage, match="RuntimeError: broke"):
            absorb(strategy, error_reply(ASKED, RuntimeError("broke"))), kind


def good(mean: float = 0.5, precision: float = 2.0, **metrics: float) -> Message:
    record = wire.pack({"mean": torch.full((P,), mean), "precision": torch.full((P,), precision)})
    content = RecordDict({"posterior": record, "metrics": MetricRecord({"round": 1, "num-examples": 3, **metrics})})
    return Message(content, reply_to=ASKED)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (good(mean=math.nan), "mean"),
        (good(mean=math.inf), "mean"),
        (good(precision=-1.0), "precision"),
        (good(precision=0.0), "precision"),
        (good(mean=60.0), "norm 120, limits.mean_norm=100"),
        (good(precision=2e4), "limits.precision=10000"),
        (good(round=0), "reply is of round 0"),
        (good(**{"num-examples": math.inf}), "num-examples is inf"),
        (good(**{"num-examples": math.nan}), "num-examples is nan"),
        (good(**{"num-examples": 0}), "num-examples is 0"),
        (good(**{"x" * 500: 1.0}), "limits.reply_bytes"),
    ],
)
def test_bounds(reply: Message, reason: str) -> None:
    strategy = made("diagonal")
    strategy.reader.limits = Limits(mean_norm=100, precision=1e4, reply_bytes=800)
    absorb(strategy, good())
    with pytest.raises(wire.BadMessage, match=reason):
        absorb(strategy, reply)


def test_a_header_that_claims_too_much_costs_no_memory() -> None:
    header = _header(np.dtype("float32"), (1 << 40,))
    for data in (header, header + bytes(16)):
        record = ArrayRecord({"mean": Array("float32", (P,), NUMPY, data)})
        with pytest.raises(wire.BadMessage, match="shape"):
            wire.unpack(record, {"mean": (P,)}, torch.float32)
