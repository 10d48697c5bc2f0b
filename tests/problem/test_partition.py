import re

import numpy as np
import pytest

from bayesfed.errors import InputError
from bayesfed.problem.partition import (
    Dirichlet,
    DirichletSizesAndClasses,
    Exponential,
    Iid,
    Linear,
    NaturalId,
    Pathological,
    Shard,
    Square,
    TwoClassesPerClient,
)
from bayesfed.problem.partition.dirichlet import class_counts
from bayesfed.problem.partition.two_classes import choose_pairs

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
COMPLETE = [
    Iid(7),
    DirichletSizesAndClasses(7),
    DirichletSizesAndClasses(100, alpha_sizes=0.1, alpha_classes=0.05),
    Dirichlet(7, min_partition_size=1),
    Linear(7),
    Square(7),
    Exponential(4),
]


@pytest.mark.parametrize("partitioner", COMPLETE, ids=lambda p: f"{p.name}-{p.num_clients}")
def test_every_example_has_exactly_one_owner(partitioner):
    parts = partitioner.split(LABELS, 1000, seed=3)
    assert len(parts) == partitioner.num_clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))


@pytest.mark.parametrize(
    "partitioner", [*COMPLETE, Pathological(5), Shard(5), TwoClassesPerClient(20, examples_per_class=25)]
)
@pytest.mark.filterwarnings("ignore:Classes")
def test_the_seed_decides_alone(partitioner):
    def flat(seed):
        return [part.tolist() for part in partitioner.split(LABELS, 1000, seed)]

    first = flat(3)
    np.random.seed(0)  # noqa: NPY002 - disturbs what must not matter
    assert flat(3) == first
    assert flat(4) != first


def test_iid_sizes_differ_by_at_most_one():
    assert sorted(len(part) for part in Iid(7).split(None, 1000, 1)) == [142] + [143] * 6


def test_ten_clients_by_default():
    assert len(Iid().split(None, 1000, 1)) == 10


@pytest.mark.parametrize("size", [1, 2, 7, 100, 6000])
def test_class_counts_are_the_rounded_shares_up_to_the_absorbed_rest(size):
    generator = np.random.default_rng(size)
    for _ in range(50):
        weights = generator.dirichlet(np.full(20, 0.3))
        counts = class_counts(weights, size)
        assert counts.sum() == size
        assert (counts >= 0).all()
        plain = np.round(size * weights)
        plain[plain == 1] = 2
        assert abs(counts - plain).sum() == abs(size - plain.sum())  # nothing else was moved


def test_class_counts_bump_single_examples():
    assert class_counts(np.array([1.0, 99.0]), 100).tolist() == [2, 98]
    assert class_counts(np.zeros(2), 10).tolist() == [5, 5]


def test_huge_concentrations_give_the_equal_split():
    parts = DirichletSizesAndClasses(10, alpha_sizes=1e15, alpha_classes=1e15).split(LABELS, 1000, 1)
    for part in parts:
        assert np.bincount(LABELS[part], minlength=10).tolist() == [10] * 10


def test_two_classes_of_equal_size_per_client():
    parts = TwoClassesPerClient(20, examples_per_class=25).split(LABELS, 1000, 1)
    for part in parts:
        counts = np.bincount(LABELS[part], minlength=10)
        assert sorted(counts[counts > 0]) == [25, 25]
    rows = np.concatenate(parts)
    assert len(rows) == 1000
    assert len(np.unique(rows)) == 1000


def test_a_class_that_runs_out_is_shared_with_a_warning(caplog):
    parts = TwoClassesPerClient(20, examples_per_class=30).split(LABELS, 1000, 1)
    (said,) = caplog.messages
    assert re.fullmatch(
        r"two_classes_per_client: classes ran out \d+ times; those clients share examples with others", said
    )
    assert [len(part) for part in parts] == [60] * 20


@pytest.mark.parametrize("clients", [1, 2, 3, 9, 100])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_pairs_differ_and_spread_for_every_seed(clients, classes):
    for seed in range(20):  # the reference loops for ever on some of these
        pairs = choose_pairs(clients, classes, np.random.default_rng(seed))
        assert len(pairs) == clients
        assert all(a != b for a, b in pairs)
        uses = np.bincount(np.array(pairs).ravel(), minlength=classes)
        assert uses.max() <= -(-2 * clients // classes) + 1


def test_pathological_clients_hold_two_classes():
    for part in Pathological(10, class_assignment="deterministic").split(LABELS, 1000, 1):
        assert len(np.unique(LABELS[part])) == 2


def test_sizes_grow_linearly():
    sizes = [len(part) for part in Linear(4).split(None, 1000, 1)]
    assert sizes == [100, 200, 300, 400]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Iid(0), "num_clients=0: must be a whole number >= 1"),
        (lambda: Iid(2.5), "num_clients=2.5"),
        (lambda: DirichletSizesAndClasses(alpha_sizes=0), "alpha_sizes=0"),
        (lambda: DirichletSizesAndClasses(alpha_classes=float("nan")), "alpha_classes=nan"),
        (lambda: Dirichlet(alpha=-1), "alpha=-1"),
        (lambda: Pathological(class_assignment="randon"), "did you mean 'random'"),
        (lambda: TwoClassesPerClient(examples_per_class=0), "examples_per_class=0"),
        (lambda: Shard(num_shards_per_client=0), "num_shards_per_client=0"),
        (lambda: Iid(1001).split(LABELS, 1000, 1), "num_clients=1001: there are only 1000 training examples"),
        (lambda: DirichletSizesAndClasses().split(None, 1000, 1), "needs class labels"),
        (lambda: TwoClassesPerClient().split(LABELS, 1000, 1), "examples_per_class=300: class 0 has only 100"),
        (lambda: TwoClassesPerClient(2).split(LABELS * 0, 1000, 1), "needs at least two classes"),
        (lambda: NaturalId().split(LABELS, 1000, 1), "natural_id: the data have no client column"),
        (lambda: Exponential(10).split(None, 1000, 1), "partition=exponential: flwr-datasets cannot split"),
        (lambda: Dirichlet(100, alpha=0.05).split(LABELS, 1000, 1), "partition=dirichlet: flwr-datasets cannot split"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_errors_say_what_to_change(build, message):
    with pytest.raises(InputError, match=message):
        build()
