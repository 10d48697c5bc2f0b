import numpy as np
import pytest
import torch

from bayesfed.problem import Examples, Scaling
from bayesfed.problem.scaling import fit_scaling

ALL = np.arange


def test_raw_is_the_identity():
    x = np.array([[0.0, 300.0]])
    scaling = fit_scaling("raw", x, ALL(1), 255.0)
    assert scaling.is_identity
    assert scaling(torch.from_numpy(x)).tolist() == [[0.0, 300.0]]


def test_unit_divides_by_the_sources_maximum():
    scaling = fit_scaling("unit", np.array([[3, 8]], dtype=np.uint8), ALL(1), 16.0)
    assert scaling(torch.tensor([[0, 8, 16]], dtype=torch.uint8)).tolist() == [[0.0, 0.5, 1.0]]


def test_unit_without_maximum_maps_each_features_training_range():
    x = np.array([[1.0, -2.0], [3.0, 2.0], [99.0, 99.0]])
    scaling = fit_scaling("unit", x, ALL(2), None)  # the last row is not for training
    assert scaling(torch.from_numpy(x)).tolist() == [[0.0, 0.0], [1.0, 1.0], [49.0, 25.25]]


def test_standardize_is_per_feature_for_tables():
    x = np.random.default_rng(0).normal([5.0, -1e6], [2.0, 0.01], (5000, 2))
    scaled = fit_scaling("standardize", x, ALL(5000), None)(torch.from_numpy(x))
    torch.testing.assert_close(scaled.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_standardize_is_per_channel_for_images():
    x = np.random.default_rng(0).integers(0, 256, (4500, 3, 2, 2), dtype=np.uint8)  # more than one chunk
    scaling = fit_scaling("standardize", x, ALL(4500), 255.0)
    assert scaling.offset.shape == (3, 1, 1)
    np.testing.assert_allclose(scaling.offset[:, 0, 0], x.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(1 / scaling.factor[:, 0, 0], x.std(axis=(0, 2, 3)), rtol=1e-12)


def test_constant_features_are_centred_not_stretched():
    x = np.full((10, 1), 0.1)
    scaling = fit_scaling("standardize", x, ALL(10), None)
    assert scaling(torch.tensor([[1.1]], dtype=torch.float64)).item() == pytest.approx(1.0)


def test_float64_is_scaled_before_it_is_narrowed():
    x = torch.tensor([[1e8 + 1.0]], dtype=torch.float64)
    scaling = Scaling(torch.tensor(1e8), torch.tensor(1.0))
    assert scaling(x, torch.float32).item() == 1.0  # 1e8 + 1 is not a float32


def test_description_restores_the_same_bits():
    scaling = Scaling(torch.tensor([[[1 / 3]]], dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64))
    again = Scaling.from_description(scaling.description())
    assert torch.equal(again.offset, scaling.offset)
    assert torch.equal(again.factor, scaling.factor)


@pytest.fixture
def examples():
    x = torch.arange(20, dtype=torch.uint8).reshape(10, 2)
    return Examples(x, torch.arange(10), torch.tensor([8, 2, 5]), Scaling(torch.tensor(1.0), torch.tensor(0.5)))


def test_batch_gathers_casts_and_scales(examples):
    x, y = examples.batch(torch.tensor([2, 0]), torch.float64, "cpu")
    assert x.dtype == torch.float64
    assert x.tolist() == [[4.5, 5.0], [7.5, 8.0]]
    assert y.dtype == torch.int64
    assert y.tolist() == [5, 8]


def test_batch_by_slice_equals_batch_by_positions(examples):
    for part in (slice(None), slice(1, 3)):
        by_slice = examples.batch(part, torch.float32, "cpu")
        by_index = examples.batch(torch.arange(3)[part], torch.float32, "cpu")
        assert torch.equal(by_slice[0], by_index[0])
        assert torch.equal(by_slice[1], by_index[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaling_never_writes_to_the_stored_rows(dtype):
    x = torch.ones(4, 2, dtype=dtype)
    examples = Examples(x, torch.zeros(4), None, Scaling(torch.tensor(1.0), torch.tensor(2.0)))
    for positions in (slice(None), torch.arange(4)):
        assert examples.batch(positions, dtype, "cpu")[0].sum() == 0
    assert x.sum() == 8


def test_identity_on_a_slice_copies_nothing():
    x = torch.ones(4, 2)
    assert Examples(x, torch.zeros(4)).batch(slice(1, 3), torch.float32, "cpu")[0].data_ptr() == x[1].data_ptr()


def test_float_targets_are_cast_and_subsets_are_views(examples):
    floats = Examples(examples.x, torch.linspace(0, 1, 10, dtype=torch.float64), examples.index)
    assert floats.batch(slice(0, 2), torch.float32, "cpu")[1].dtype == torch.float32
    subset = examples.subset(torch.tensor([2, 1]))
    assert len(subset) == 2
    assert subset.targets().tolist() == [5, 2]
    assert subset.x is examples.x
    assert subset.scaling is examples.scaling
    assert Examples(examples.x, examples.y).subset(torch.tensor([7])).targets().tolist() == [7]
