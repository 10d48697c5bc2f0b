"""MX formats: the vectors, algebra and error sizes of the OCP specification."""

import pytest
import torch

from bayesfed.lowprecision import quantize_mx

BLOCK = torch.tensor([7.9, 6.9, 5, 2.5, 0.25, 0.24, -1.25, 0.74])
VECTORS = {
    ("e2m1", "even"): [6, 6, 4, 2, 0, 0, -1, 0.5],
    ("e2m1", "away"): [6, 6, 6, 3, 0.5, 0, -1.5, 0.5],
    ("e2m3", "even"): [7.5, 7, 5, 2.5, 0.25, 0.25, -1.25, 0.75],
    ("e2m3", "away"): [7.5, 7, 5, 2.5, 0.25, 0.25, -1.25, 0.75],
    ("e3m2", "even"): [7, 7, 5, 2.5, 0.25, 0.25, -1.25, 0.75],
    ("e3m2", "away"): [7, 7, 5, 2.5, 0.25, 0.25, -1.25, 0.75],
}
FORMATS = ["e2m1", "e2m3", "e3m2", "e4m3"]


@pytest.mark.parametrize(("fmt", "rounding"), VECTORS)
def test_vectors(fmt, rounding):
    assert quantize_mx(BLOCK, fmt, rounding=rounding).tolist() == VECTORS[fmt, rounding]


@pytest.mark.parametrize("rounding", ["away", "even"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_idempotent_odd_and_equivariant_to_powers_of_two(fmt, rounding):
    x = torch.randn(7, 75, generator=torch.Generator().manual_seed(0))
    once = quantize_mx(x, fmt, rounding=rounding)
    assert torch.equal(quantize_mx(once, fmt, rounding=rounding), once)
    assert torch.equal(quantize_mx(-x, fmt, rounding=rounding), -once)
    assert torch.equal(quantize_mx(x * 2.0**-20, fmt, rounding=rounding), once * 2.0**-20)


@pytest.mark.parametrize(
    ("fmt", "error", "flushed"),
    [("e2m1", 0.115, 0.088), ("e3m2", 0.054, 0.003), ("e2m3", 0.028, 0.022), ("e4m3", 0.030, 0)],
)
def test_error_on_normal_values(fmt, error, flushed):
    x = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = quantize_mx(x, fmt)
    assert float((q - x).norm() / x.norm()) == pytest.approx(error, abs=0.001)
    assert float((q == 0).double().mean()) == pytest.approx(flushed, abs=0.001)


def test_blocks_run_along_the_axis():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantize_mx(x, "e2m1", axis=0), quantize_mx(x.T, "e2m1").T)
    separate = torch.cat([quantize_mx(x[:32].T, "e2m1"), quantize_mx(x[32:].T, "e2m1")], -1).T
    assert torch.equal(quantize_mx(x, "e2m1", axis=0), separate)


@pytest.mark.parametrize("flush", [False, True])  # as in processes that train
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_shape_and_dtype(dtype, flush):
    torch.set_flush_denormal(flush)
    try:
        q = quantize_mx(torch.zeros(2, 5, dtype=dtype), "e4m3")
        small = torch.full((2, 5), 2.0**-120)
        assert torch.equal(quantize_mx(small, "e4m3"), small)
    finally:
        torch.set_flush_denormal(False)
    assert q.dtype == dtype
    assert q.shape == (2, 5)
    assert torch.equal(q, torch.zeros(2, 5, dtype=dtype))


def test_a_block_out_of_range_is_nan_and_leaves_its_neighbours():
    x = torch.ones(64, dtype=torch.float64)
    x[0] = 2.0**140
    q = quantize_mx(x, "e2m1")
    assert bool(q[:32].isnan().all())
    assert torch.equal(q[32:], x[32:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fmt": "e5m2"}, "e2m1"),
        ({"fmt": "e2m1", "rounding": "up"}, "away"),
        ({"fmt": "e2m1", "block_size": 0}, "block_size"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        quantize_mx(BLOCK, **options)
