"""Each client's own test distribution."""

from __future__ import annotations

import numpy as np
import pytest

from bayesfed.problem.build import build_problem
from bayesfed.problem.client_tests import LEAST, client_tests, proportional

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 300))
ROWS = np.arange(1200) + 5000


def test_proportions_by_largest_remainder():
    plenty = np.full(3, 1000)
    assert proportional([1, 1, 2], plenty, 100).tolist() == [25, 25, 50]
    assert proportional([1, 1, 1], plenty, 100).tolist() == [34, 33, 33]
    assert proportional([5, 0, 95], plenty, 10).tolist() == [1, 0, 9]  # 0.5 and 9.5: the first of equal remainders
    assert proportional([0, 0, 0], plenty, 10).tolist() == [0, 0, 0]


def test_a_scarce_class_limits_the_set_not_its_proportions():
    assert proportional([1, 1], np.array([10, 1000]), 200).tolist() == [10, 10]
    assert proportional([1, 3], np.array([1000, 30]), 200).tolist() == [10, 30]
    assert proportional([1, 1], np.array([0, 1000]), 200).tolist() == [0, 200]  # a class that the test set lacks


def test_sizes_and_proportions():
    counts = np.array([[10, 10, 0, 0], [0, 0, 1, 3], [5, 5, 5, 5]])
    sets = client_tests(ROWS, LABELS, counts, 1, 3)
    for rows, held in zip(sets, counts, strict=True):
        assert len(np.unique(rows)) == len(rows) == 400  # N_test / K, above LEAST
        assert (np.diff(rows) > 0).all()
        assert np.bincount(LABELS[rows - 5000], minlength=4).tolist() == (400 * held / held.sum()).tolist()


def test_many_clients_get_enough_and_each_its_own_stream():
    counts = np.tile([1, 1, 1, 1], (50, 1))
    sets = client_tests(ROWS, LABELS, counts, 1, 50)
    assert {len(rows) for rows in sets} == {LEAST}
    assert len({tuple(rows) for rows in sets}) == 50
    again = client_tests(ROWS, LABELS, counts, 1, 50)
    assert all(np.array_equal(a, b) for a, b in zip(sets, again, strict=True))
    other = client_tests(ROWS, LABELS, counts, 2, 50)
    assert not np.array_equal(sets[0], other[0])


def test_a_client_whose_classes_the_test_set_lacks_has_no_test():
    counts = np.array([[0, 0, 0, 0, 9], [1, 1, 1, 1, 1]])
    first, second = client_tests(ROWS, LABELS, counts, 1, 2)
    assert len(first) == 0
    assert len(second) == 600


def test_regressions_share_the_distribution_of_all():
    sets = client_tests(ROWS, None, None, 1, 3)
    assert [len(np.unique(rows)) for rows in sets] == [400] * 3


def test_where_the_data_say_whose_a_test_row_is_it_is_theirs(config, tmp_path):
    generator = np.random.default_rng(0)
    client = np.repeat([7, 3, 9], [40, 60, 50])
    np.savez(tmp_path / "mine.npz", x=generator.normal(size=(150, 2)), y=generator.integers(0, 3, 150), client=client)
    problem = build_problem(config(data={"name": "npz", "path": str(tmp_path / "mine.npz")}, partition="natural_id"), 1)
    owners = [set(client[tests.index.numpy()]) for tests in problem.client_tests]
    assert owners == [{3}, {7}, {9}]
    assert sum(len(tests) for tests in problem.client_tests) == len(problem.test)


def test_in_a_problem(problem):
    found = problem(partition={"name": "dirichlet_sizes_and_classes", "num_clients": 5, "alpha_classes": 0.3})
    for tests, held in zip(found.client_tests, found.label_counts, strict=True):
        shares = np.bincount(tests.targets().numpy(), minlength=10) / len(tests)
        assert shares == pytest.approx(held / held.sum(), abs=1.01 / len(tests))
        assert set(tests.index.tolist()) <= set(found.test.index.tolist())
