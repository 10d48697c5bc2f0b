"""Arrays in messages: the same bytes as Flower's own, and the same errors for what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from bayesfed import wire


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 4)])
def test_packed_arrays_are_flowers_own(dtype, shape):
    value = torch.arange(12).to(dtype)[: int(np.prod(shape))].reshape(shape)
    packed = wire.pack({"a": value})["a"]
    own = Array(value.numpy())
    assert (packed.dtype, packed.shape, packed.stype, packed.data) == (own.dtype, own.shape, own.stype, own.data)


def test_a_transposed_matrix_arrives_as_it_is():
    value = torch.arange(6.0).reshape(2, 3).T
    record = wire.pack({"a": value})
    assert torch.equal(wire.unpack(record, {"a": (3, 2)}, torch.float32)["a"], value)


def test_unpacking_can_widen_and_never_shares_the_messages_memory():
    record = wire.pack({"a": torch.tensor([1.5, 2.0])})
    wide = wire.unpack(record, {"a": (2,)}, torch.float32, to=torch.float64)["a"]
    assert wide.dtype == torch.float64
    narrow = wire.unpack(record, {"a": (2,)}, torch.float32)["a"]
    narrow.zero_()
    assert wire.unpack(record, {"a": (2,)}, torch.float32)["a"].tolist() == [1.5, 2.0] == wide.tolist()


@pytest.mark.parametrize(
    "array", [Array(np.zeros(3, np.float32)), Array(np.zeros(2)), Array("float32", (2,), "numpy.ndarray", b"nonsense")]
)
def test_other_shapes_dtypes_and_garbage_are_refused(array):
    with pytest.raises(wire.BadMessage, match="array 'a'"):
        wire.unpack(ArrayRecord({"a": array}), {"a": (2,)}, torch.float32)


def test_fortran_order_written_by_others_is_read():
    values = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert wire.unpack(ArrayRecord({"a": Array(values)}), {"a": (2, 3)}, torch.float32)["a"].tolist() == values.tolist()
