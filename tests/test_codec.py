"""16-bit messages: what a receiver gets, what is refused, and that nothing is lost for good."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesfed import wire
from bayesfed.errors import InputError
from bayesfed.seeding import torch_generator
from bayesfed.wire.size import record_bytes

P = 4000
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # largest relative error of rounding
TINY = 2.0**-25  # float16: half the spacing around zero
PRECISIONS = {"diagonal": (P,), "isotropic": (), "point": None}


def arrays(family: str, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Means like weights of a network, precisions over several orders of magnitude around 3000."""
    g = torch_generator(1, family, seed)
    made = {"mean": 0.3 * torch.randn(P, generator=g, dtype=torch.float64)}
    if (shape := PRECISIONS[family]) is not None:
        made["precision"] = 3000 * (1.5 * torch.randn(shape, generator=g, dtype=torch.float64)).exp()
    return {name: value.to(dtype) for name, value in made.items()}


def codec(format: str, family: str, dtype: torch.dtype = torch.float32) -> wire.Codec:
    return wire.Codec(format, {n: tuple(v.shape) for n, v in arrays(family, 0, dtype).items()}, dtype)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def near(server: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """What a client makes of it: means moved by about 1e-3, precisions by some percent."""
    g = torch_generator(2, seed)
    moved = {"mean": server["mean"] + 1e-3 * torch.randn(P, generator=g)}
    if "precision" in server:
        factor = (0.05 * torch.randn(server["precision"].shape, generator=g)).exp()
        moved["precision"] = server["precision"] * factor
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", PRECISIONS)
def test_full_keeps_every_bit(family: str, dtype: torch.dtype) -> None:
    made, sent = codec("full", family, dtype), arrays(family, 1, dtype)
    record, values = made.encode(sent)
    assert set(record) == set(sent)
    assert {array.dtype for array in record.values()} == {str(dtype).removeprefix("torch.")}
    assert same(values, sent)
    assert same(made.decode(record), sent)
    assert same(made.decode(made.encode(sent, values)[0], values), sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", PRECISIONS)
@pytest.mark.parametrize("format", HALF_ULP)
def test_both_sides_get_the_same_numbers(format: str, family: str, dtype: torch.dtype) -> None:
    """The sender's copy is, to the bit, what another codec reads, in both directions."""
    sent = arrays(family, 1, dtype)
    record, values = codec(format, family, dtype).encode(sent)
    received = codec(format, family, dtype).decode(record)
    assert same(received, values)
    assert {v.dtype for v in received.values()} == {dtype}
    answer, solved = codec(format, family, dtype).encode(arrays(family, 2, dtype), received)
    assert same(codec(format, family, dtype).decode(answer, received), solved)


@pytest.mark.parametrize("family", PRECISIONS)
@pytest.mark.parametrize("format", HALF_ULP)
def test_errors_are_those_of_rounding(format: str, family: str) -> None:
    """Down: relative to the mean, and to the precision's distance (in logarithms) from the scale. Up: relative to the
    change.
    """
    server, made, ulp = arrays(family, 1, torch.float64), codec(format, family, torch.float64), HALF_ULP[format]
    record, received = made.encode(server)
    assert bool(((received["mean"] - server["mean"]).abs() <= ulp * server["mean"].abs() + TINY).all())
    client = near(received, 3)
    _, answer = made.encode(client, received)
    change = (client["mean"] - received["mean"]).abs()
    assert bool(((answer["mean"] - client["mean"]).abs() <= ulp * change + TINY).all())
    if "precision" not in server:
        return
    scale = record[f"{format}/precision_scale"].numpy()
    assert scale == pytest.approx(float(server["precision"].log().mean().exp()), rel=1e-12)
    distance = (server["precision"] / float(scale)).log().abs()
    assert bool(((received["precision"] / server["precision"]).log().abs() <= ulp * distance + TINY).all())
    distance = (client["precision"] / received["precision"]).log().abs()
    assert bool(((answer["precision"] / client["precision"]).log().abs() <= ulp * distance + TINY).all())


@pytest.mark.parametrize("family", PRECISIONS)
@pytest.mark.parametrize("format", HALF_ULP)
def test_half_the_bytes_of_float32(format: str, family: str) -> None:
    sent = arrays(family, 1)
    full = record_bytes("posterior", codec("full", family).encode(sent)[0])
    record, received = codec(format, family).encode(sent)
    answer, _ = codec(format, family).encode(sent, received)
    entries = sum(v.numel() for v in sent.values())
    for half in (record, answer):
        assert abs(full - record_bytes("posterior", half) - 2 * entries) < 300  # names, and the scale
        kinds = {n: array.dtype for n, array in half.items() if not n.endswith("scale")}
        assert set(kinds.values()) == {"uint16" if format == "bfloat16" else "float16"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", HALF_ULP)
def test_an_answer_that_changes_nothing_decodes_to_the_same_bits(format: str, dtype: torch.dtype) -> None:
    made = codec(format, "diagonal", dtype)
    _, received = made.encode(arrays("diagonal", 1, dtype))
    assert same(made.encode(received, received)[1], received)


@pytest.mark.parametrize("precision", [1.0, 0.1, 3.3, 12345.678, 1e-6, 1e12])
@pytest.mark.parametrize("format", HALF_ULP)
def test_one_precision_for_all_travels_unchanged(format: str, precision: float) -> None:
    """The prior's, in round 1 and with covariance=fixed."""
    sent = {"mean": torch.zeros(P), "precision": torch.full((P,), precision)}
    assert same(codec(format, "diagonal").encode(sent)[1], sent)


@pytest.mark.parametrize(
    ("format", "name", "value", "text"),
    [
        (
            "float16",
            "mean",
            7e4,
            r"mean can't be sent as float16 in 1 of 4000 entries, first entry 7: 70000 .*65504.*wire=full",
        ),
        ("float16", "mean", -1e30, "first entry 7: -1e\\+30"),
        ("bfloat16", "mean", 1e39, "mean can't be sent as bfloat16 .*1e\\+39"),
        ("float16", "mean", math.nan, "first entry 7: nan"),
        ("bfloat16", "mean", math.inf, "first entry 7: inf"),
        ("float16", "precision", 0.0, "precision can't be sent .*first entry 7: 0 "),
        ("bfloat16", "precision", -2.0, "precision can't be sent .*first entry 7: -2 .*positive"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(format: str, name: str, value: float, text: str) -> None:
    made = codec(format, "diagonal", torch.float64)
    _, received = made.encode(arrays("diagonal", 1, torch.float64))
    answer = {n: v.clone() for n, v in received.items()}
    answer[name][7] = value
    with pytest.raises(ValueError, match=text):
        made.encode(answer, received)
    if name == "mean":
        with pytest.raises(ValueError, match=text):
            made.encode(answer)


def test_bfloat16_takes_what_float16_does_not() -> None:
    sent = arrays("diagonal", 1)
    sent["mean"][3] = 1e20
    received = codec("bfloat16", "diagonal").encode(sent)[1]
    assert float(received["mean"][3]) == pytest.approx(1e20, rel=2**-8)


def test_precisions_over_the_whole_range_of_float32() -> None:
    sent = {"mean": torch.zeros(P), "precision": torch.logspace(-37, 38, P)}
    for format, ulp in HALF_ULP.items():
        received = codec(format, "diagonal").encode(sent)[1]["precision"]
        assert bool((received > 0).all())
        # the logarithms lie within 87 of the scale's
        assert float((received.double() / sent["precision"].double()).log().abs().max()) <= 87 * ulp


@pytest.mark.parametrize("mine", wire.FORMATS)
@pytest.mark.parametrize("theirs", wire.FORMATS)
@pytest.mark.parametrize("answer", [False, True])
def test_another_format_is_refused(mine: str, theirs: str, answer: bool) -> None:
    """Also a server's message taken for an answer, and the other way round."""
    sent = arrays("diagonal", 1)
    reference = sent if answer else None
    record = codec(theirs, "diagonal").encode(sent, reference)[0]
    if mine == theirs:
        codec(mine, "diagonal").decode(record, reference)
        if mine != "full":
            with pytest.raises(wire.BadMessage, match="expected arrays"):
                codec(mine, "diagonal").decode(record, None if answer else sent)
        return
    with pytest.raises(wire.BadMessage, match=f"travel in format '{theirs}', this side is set up for wire={mine}"):
        codec(mine, "diagonal").decode(record, reference)


@pytest.mark.parametrize("format", HALF_ULP)
def test_malformed_arrays_are_refused(format: str) -> None:
    made, sent = codec(format, "diagonal"), arrays("diagonal", 1)
    name = f"{format}/mean"
    for change, text in (
        (torch.zeros(P), f"array '{name}' has dtype float32, expected torch."),
        (torch.zeros(P + 1, dtype=torch.float16), f"array '{name}' has shape"),
    ):
        record = made.encode(sent)[0]
        record[name] = wire.pack({name: change})[name]
        with pytest.raises(wire.BadMessage, match=text):
            made.decode(record)
    record = made.encode(sent)[0]
    del record[name]
    with pytest.raises(wire.BadMessage, match="expected arrays"):
        made.decode(record)
    with pytest.raises(wire.BadMessage, match="got NoneType"):
        made.decode(None)


@pytest.mark.parametrize(
    ("format", "shapes", "text"),
    [
        (
            "float32",
            {"mean": (3,)},
            "wire=float32: did you mean 'bfloat16'|wire=float32: .*valid: bfloat16, float16, full",
        ),
        ("float16", {"mean": (3,), "precision": (3, 3)}, "wire=float16: a full covariance .* use wire=full"),
        ("bfloat16", {"mean": (1,), "precision": (1, 1)}, "use wire=full"),
    ],
)
def test_formats_that_can_not_be(format: str, shapes: dict, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        wire.Codec(format, shapes, torch.float32)
    assert caught.value.field == "wire"


@pytest.mark.parametrize("format", HALF_ULP)
def test_steps_below_the_spacing_add_up(format: str) -> None:
    """A server near 1 whose clients move it by 1e-5 (precision: 0.01 %) a round, 500 rounds."""
    made, step, factor = codec(format, "diagonal"), 1e-5, 1e-4
    server = {"mean": torch.linspace(0.9, 1.1, P), "precision": torch.logspace(1, 5, P)}
    start = server
    for _ in range(500):
        _, sent = made.encode(server)
        client = {"mean": sent["mean"] + step, "precision": sent["precision"] * math.exp(factor)}
        _, answer = made.encode(client, sent)
        server = made.keep_rounding(answer, server, sent)
    assert np.abs((server["mean"] - start["mean"]).numpy() - 500 * step).max() < 0.02 * 500 * step
    assert np.abs((server["precision"] / start["precision"]).log().numpy() - 500 * factor).max() < 0.02 * 500 * factor
