"""What a client's images and labels go through, against independent implementations and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from bayesfed.errors import InputError
from bayesfed.problem.build import build_problem
from bayesfed.problem.shift import ClientShift, Shift

MAXIMUM = 16.0
IMAGES = torch.rand(3, 2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * MAXIMUM


def one(**changes) -> ClientShift:
    plain = {
        "variant": 0,
        "angle": 0.0,
        "contrast": 1.0,
        "brightness": 0.0,
        "gains": (),
        "labels": (),
        "maximum": MAXIMUM,
    }
    return ClientShift(**plain | changes)


def drawn(
    clients: int = 8, seed: int = 1, shape=(2, 7, 6), classes: int | None = 10, **shift
) -> list[ClientShift | None]:
    return Shift(**shift).draw(seed, clients, shape, classes, MAXIMUM)


# -- what happens to an example ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_exact_and_counter_clockwise(turns):
    square = IMAGES[..., :6, :]
    assert torch.equal(one(angle=90.0 * turns).inputs(square), torch.rot90(square, turns, (-2, -1)))


@pytest.mark.parametrize("angle", [-170.0, -33.3, 5.0, 45.0, 120.0])
def test_other_angles_are_scipys_bilinear_rotation(angle):
    expected = ndimage.rotate(IMAGES.numpy(), angle, axes=(-1, -2), reshape=False, order=1, mode="grid-constant")
    np.testing.assert_allclose(one(angle=angle).inputs(IMAGES).numpy(), expected, atol=1e-9)


def test_contrast_brightness_and_colour():
    seen = one(contrast=1.5, brightness=-0.1, gains=(0.5, 1.2)).inputs(IMAGES)
    gained = IMAGES * torch.tensor([0.5, 1.2], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(seen, ((gained - 8) * 1.5 + 8 - 1.6).clamp(0, MAXIMUM), rtol=1e-12, atol=1e-12)
    assert seen.max() <= MAXIMUM
    assert seen.min() >= 0


def test_nothing_is_done_where_nothing_changes():
    assert one().inputs(IMAGES) is IMAGES
    labels = torch.arange(4)
    assert one().targets(labels) is labels
    assert one(labels=(1, 2, 0, 3)).targets(torch.tensor([0, 1, 2, 3, 0])).tolist() == [1, 2, 0, 3, 1]


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_draws_lie_in_their_ranges_and_spread_over_them():
    found = drawn(400, rotation=30.0, contrast=1.0, brightness=0.2, colour=0.4)
    for values, low, high in (
        ([s.angle for s in found], -30, 30),
        ([math.log2(s.contrast) for s in found], -1, 1),
        ([s.brightness for s in found], -0.2, 0.2),
        ([g for s in found for g in s.gains], 0.6, 1.4),
    ):
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.06 * (high - low))


@pytest.mark.parametrize(("share", "moved"), [(0.01, 2), (0.3, 3), (0.75, 8), (1.0, 10)])
def test_labels_are_permuted_in_a_cycle(share, moved):
    permutations = [s.labels for s in drawn(labels=share)]
    for labels in permutations:
        assert sorted(labels) == list(range(10))
        assert sum(c != label for c, label in enumerate(labels)) == moved
    assert len(set(permutations)) > 1


def test_a_stream_for_each_purpose_and_client():
    few, many, more = (
        drawn(k, rotation=30.0, **o) for k, o in ((4, {}), (9, {}), (4, {"contrast": 1.0, "labels": 0.5}))
    )
    assert [s.angle for s in few] == [s.angle for s in many[:4]] == [s.angle for s in more]
    assert [s.angle for s in drawn(4, seed=2, rotation=30.0)] != [s.angle for s in few]
    assert len({s.angle for s in many}) == 9


def test_groups_share_draws_evenly():
    found = drawn(9, rotation=30.0, labels=0.5, groups=3)
    angles = [s.angle for s in found]
    assert sorted(angles.count(a) for a in set(angles)) == [3, 3, 3]
    assert len({(s.angle, s.labels) for s in found}) == 3
    assert [s.variant for s in found] != [0, 1, 2, 0, 1, 2, 0, 1, 2]  # which client is in which group is drawn too


def test_off_is_off():
    assert drawn() == [None] * 8
    assert not Shift.of(None).on_features


# -- in a problem ------------------------------------------------------------------------------------------------------


def test_clients_train_and_are_tested_on_what_they_see_the_server_on_the_originals(config):
    plain = config(partition={"name": "iid", "num_clients": 4})
    shift = {"rotation": 40.0, "contrast": 0.5, "labels": 0.4}
    before, after = build_problem(plain, 1), build_problem({**plain, "shift": shift}, 1)
    assert before.clients[0].shift is None
    rows = slice(0, 5)
    for k in range(4):
        for one_set, other in ((before.clients[k], after.clients[k]), (before.client_tests[k], after.client_tests[k])):
            assert torch.equal(one_set.index, other.index)
            x, y = one_set.batch(rows, torch.float64, "cpu")
            seen, labels = other.batch(rows, torch.float64, "cpu")
            maximum = 1.0  # both are scaled to [0, 1]
            s = other.shift
            turned = ClientShift(0, s.angle, s.contrast, s.brightness, (), s.labels, maximum)
            torch.testing.assert_close(seen, turned.inputs(x), atol=1e-6, rtol=0)
            assert torch.equal(labels, turned.targets(y))
            assert torch.equal(other.targets()[rows], labels)
        moved = np.zeros_like(before.label_counts[k])
        moved[np.array(after.clients[k].shift.labels)] = before.label_counts[k]
        assert after.label_counts[k].tolist() == moved.tolist()
    assert after.test.shift is None
    assert torch.equal(
        after.test.batch(rows, torch.float32, "cpu")[0], before.test.batch(rows, torch.float32, "cpu")[0]
    )


def test_subsets_keep_the_shift(config):
    problem = build_problem({**config(), "shift": {"rotation": 40.0}}, 1)
    part = problem.clients[0].subset(torch.tensor([3, 1]))
    expected = problem.clients[0].batch(torch.tensor([3, 1]), torch.float32, "cpu")[0]
    assert torch.equal(part.batch(slice(None), torch.float32, "cpu")[0], expected)


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        ({"rotation": -1}, r"shift\.rotation=-1: must be a finite number >= 0 and <= 180"),
        ({"rotation": 181}, r"shift\.rotation=181"),
        ({"contrast": -0.5}, r"shift\.contrast=-0\.5: must be"),
        ({"brightness": 1.5}, r"shift\.brightness=1\.5"),
        ({"labels": "half"}, r"shift\.labels=half: must be a"),
        ({"groups": 0}, r"shift\.groups=0: must be a whole number >= 1"),
        ({"rotatoin": 3}, r"shift\.rotatoin=3: no such key; did you mean 'rotation'"),
        ({"colour": 0.5}, r"shift\.colour=0\.5: needs images with several channels, these have 1"),
    ],
)
def test_errors_name_field_value_and_fix(config, shift, message):
    with pytest.raises(InputError, match=message):
        build_problem({**config(), "shift": shift}, 1)


def test_tables_have_no_angles_and_regressions_no_labels(config):
    linreg = config(data="linreg", partition="natural_id", likelihood="gaussian")
    with pytest.raises(InputError, match=r"shift\.rotation=10: needs images, examples have shape"):
        build_problem({**linreg, "shift": {"rotation": 10}}, 1)
    with pytest.raises(InputError, match=r"shift\.labels=0\.5: needs classes, this is a regression"):
        build_problem({**linreg, "shift": {"labels": 0.5}}, 1)
