"""Every partitioner by its name in the configuration: a valid split, the property it is named for, and errors that say
what to type.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bayesfed.app import plain, problem_of
from bayesfed.config import compose_config
from bayesfed.errors import InputError
from bayesfed.problem.build import build_problem
from bayesfed.problem.partition import GroupedNaturalId

NAMES = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "conf" / "partition").glob("*.yaml"))
EXAMPLES = 1438  # of digits' training set
IDS = np.repeat(np.arange(7), [30, 10, 25, 15, 40, 20, 10])  # 150 examples of seven writers
pytestmark = pytest.mark.filterwarnings("ignore:Classes")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Two features and three classes, with a column that says who an example is from."""
    path = tmp_path_factory.mktemp("table") / "mine.npz"
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(160, 2)), generator.integers(0, 3, 160)
    np.savez(path, x=x[:150], y=y[:150], client=IDS + 100, x_test=x[150:], y_test=y[150:])
    return path


def rows_of(problem) -> list[np.ndarray]:
    return [client.index.numpy() for client in problem.clients]


def sizes_of(problem) -> np.ndarray:
    return np.array([len(client) for client in problem.clients])


def near(sizes: np.ndarray, weights: np.ndarray) -> bool:
    """Whether sizes are the shares of all examples, rounded (the largest client takes the rest)."""
    shares = weights / weights.sum() * sizes.sum()
    return bool((abs(sizes - shares) <= len(sizes)).all())


def classes_of(problem) -> np.ndarray:
    return (problem.label_counts > 0).sum(1)


def distance(problem) -> float:
    """Mean total variation between a client's labels and all labels."""
    counts = problem.label_counts
    shares = counts / counts.sum(1, keepdims=True)
    return float(0.5 * abs(shares - counts.sum(0) / counts.sum()).sum(1).mean())


def brightness_of(problem) -> list[np.ndarray]:
    return [client.x[client.index].double().flatten(1).mean(1).numpy() for client in problem.clients]


def sorted_by_brightness(problem) -> bool:
    means = brightness_of(problem)
    return all(a.max() <= b.min() for a, b in pairwise(means))


CASES = {
    "iid": ({"num_clients": 7}, lambda p: np.ptp(sizes_of(p)) <= 1 and distance(p) < 0.15),
    "linear": ({"num_clients": 5}, lambda p: near(sizes_of(p), np.arange(1, 6))),
    "square": ({"num_clients": 5}, lambda p: near(sizes_of(p), np.arange(1, 6) ** 2)),
    "exponential": ({"num_clients": 5}, lambda p: near(sizes_of(p), np.exp(np.arange(1, 6)))),
    "id_to_size": ({"num_clients": 5, "power": 0.5}, lambda p: near(sizes_of(p), np.sqrt(np.arange(1, 6)))),
    "size": ({"sizes": [40, 700, 3]}, lambda p: sizes_of(p).tolist() == [40, 700, 3]),
    "dirichlet": ({"num_clients": 6, "alpha": 0.2}, lambda p: distance(p) > 0.4 and sizes_of(p).min() >= 10),
    "inner_dirichlet": (
        {"sizes": [300, 200, 100], "alpha": 0.2},
        lambda p: sizes_of(p).tolist() == [300, 200, 100] and distance(p) > 0.3,
    ),
    "dirichlet_sizes_and_classes": (
        {"num_clients": 6, "alpha_classes": 0.3},
        lambda p: sizes_of(p).sum() == EXAMPLES and distance(p) > 0.3,
    ),
    "two_classes_per_client": (
        {"num_clients": 10, "examples_per_class": 20},
        lambda p: (classes_of(p) == 2).all() and (p.label_counts[p.label_counts > 0] == 20).all(),
    ),
    "pathological": ({"num_clients": 10, "num_classes_per_client": 3}, lambda p: (classes_of(p) <= 3).all()),
    "shard": ({"num_clients": 10, "num_shards_per_client": 2}, lambda p: (classes_of(p) <= 4).all()),
    "distribution": (
        {"num_clients": 10, "num_classes_per_client": 2, "at_least": 7},
        lambda p: (classes_of(p) == 2).all() and (p.label_counts[p.label_counts > 0] >= 7).all(),
    ),
    "continuous": ({"num_clients": 6, "strictness": 1.0}, sorted_by_brightness),
    "natural_id": ({}, lambda p: sizes_of(p).tolist() == np.bincount(IDS).tolist()),
    "grouped_natural_id": ({"group_size": 3}, lambda p: sizes_of(p).tolist() == [65, 75, 10]),
}  # fmt: skip


def split(config, table: Path, name: str, seed: int = 1, **changes):
    options = CASES[name][0] | changes
    data = {"name": "npz", "path": str(table)} if "natural" in name else "digits"
    return build_problem(config(data=data, partition={"name": name, **options}), seed)


def test_every_name_is_here():
    assert sorted(CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_split_with_its_property(config, table, name):
    problem = split(config, table, name)
    rows = np.concatenate(rows_of(problem))
    assert len(np.unique(rows)) == len(rows), "an example has two owners"
    if "natural" not in name:  # a table's test rows are part of its array
        assert rows.min() >= 0
        assert len(rows) <= EXAMPLES
    assert sizes_of(problem).min() >= 1
    assert CASES[name][1](problem), (sizes_of(problem), problem.label_counts)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"natural_id", "grouped_natural_id"}))
def test_the_seed_decides_alone(config, table, name):
    def drawn(seed: int) -> list[list[int]]:
        changes = {"strictness": 0.5} if name == "continuous" else {}
        return [rows.tolist() for rows in rows_of(split(config, table, name, seed, **changes))]

    first = drawn(3)
    np.random.seed(0)  # noqa: NPY002 - disturbs what must not matter
    assert drawn(3) == first
    assert drawn(4) != first


def test_groups_of_ids_are_whole_and_in_their_order(config, table):
    problem = split(config, table, "grouped_natural_id")
    with np.load(table) as arrays:
        owners = [sorted(set(arrays["client"][rows])) for rows in rows_of(problem)]
    assert owners == [[100, 101, 102], [103, 104, 105], [106]]


@pytest.mark.parametrize(
    ("mode", "sizes"), [("allow-smaller", 3), ("allow-bigger", 2), ("drop-reminder", 2)]
)  # the name is flwr-datasets'
def test_ids_left_over(config, table, mode, sizes):
    data = {"name": "npz", "path": str(table)}
    problem = build_problem(
        config(data=data, partition={"name": "grouped_natural_id", "group_size": 3, "mode": mode}), 1
    )
    assert len(problem.clients) == sizes
    assert sizes_of(problem).sum() == (140 if mode == "drop-reminder" else 150)


def test_without_strictness_continuous_is_iid(config):
    problem = build_problem(config(partition={"name": "continuous", "num_clients": 6, "strictness": 0.0}), 1)
    centres = [means.mean() for means in brightness_of(problem)]
    everything = np.concatenate(brightness_of(problem))
    assert np.ptp(centres) < 0.3 * everything.std()


def test_continuous_by_target_splits_a_regression(config):
    data = {"name": "linreg", "num_clients": 1, "examples_per_client": 300}
    partition = {"name": "continuous", "num_clients": 3, "by": "target", "strictness": 1.0}
    found = config(data=data, partition=partition, likelihood="gaussian")
    found["data"]["num_clients"] = 1
    with pytest.raises(InputError, match="num_clients"):  # its client column says who is who
        build_problem(found, 1)


def test_sizes_may_leave_examples_unused_but_not_exceed_them(config):
    with pytest.raises(InputError, match=r"partition\.sizes=\[2000, 1\]: sum to 2001, there are only 1438"):
        build_problem(config(partition={"name": "size", "sizes": [2000, 1]}), 1)
    with pytest.raises(InputError, match=r"partition\.sizes=\[2000, 1\]: sum to 2001"):
        build_problem(config(partition={"name": "inner_dirichlet", "sizes": [2000, 1]}), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["partition=contiuous"], r"partition=contiuous: no such option; did you mean 'continuous'"),
        (["partition=continuous", "partition.strictness=1.5"], r"partition\.strictness=1\.5: must be .*<= 1"),
        (["partition=continuous", "partition.by=colour"], r"partition\.by=colour: valid: mean, target"),
        (
            ["partition=distribution", "partition.num_clients=15"],
            r"partition\.num_clients=15: must be a multiple of .*\(10\)",
        ),
        (["partition=distribution", "partition.sigma=-1"], r"partition\.sigma=-1: must be a finite number >= 0"),
        (["partition=distribution", "partition.at_least=1000"], r"partition=distribution: flwr-datasets cannot split"),
        (
            ["partition=distribution", "partition.num_classes_per_client=0"],
            r"num_classes_per_client=0: must be a whole",
        ),
        (["partition=id_to_size", "partition.power=-2"], r"partition\.power=-2: must be a finite number >= 0"),
        (["partition=id_to_size", "partition.power=big"], r"partition\.power=big: must be a number"),
        (["partition=size", "partition.sizes=[]"], r"partition\.sizes=\[\]: name the number of examples"),
        (["partition=size", "partition.sizes=[10,0]"], r"partition\.sizes=0: must be a whole number >= 1"),
        (["partition=size", "partition.sizes=[1.5]"], r"partition\.sizes=\[1\.5\]: must be a list of a whole number"),
        (
            ["partition=size", "partition.num_clients=4"],
            r"partition\.num_clients=4: sizes has 3 entries; leave num_clients null",
        ),
        (["partition=inner_dirichlet", "partition.alpha=0"], r"partition\.alpha=0: must be a finite number > 0"),
        (["partition=grouped_natural_id", "partition.mode=strickt"], r"mode=strickt: did you mean 'strict'"),
        (["partition=grouped_natural_id", "partition.group_size=0"], r"group_size=0: must be a whole number >= 1"),
        (["partition=grouped_natural_id"], r"partition=grouped_natural_id: the data have no client column: add one"),
        (
            ["partition=linear", "partition.num_clients=2000"],
            r"num_clients=2000: there are only 1438 training examples",
        ),
    ],
)
def test_errors_name_field_value_and_fix(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        problem_of(plain(compose_config(overrides)))
    assert "\n" not in str(error.value)


def test_a_number_of_clients_that_the_groups_do_not_have(config, table):
    data = {"name": "npz", "path": str(table)}
    with pytest.raises(InputError, match=r"num_clients=5: .*gives 3 groups; leave it null"):
        build_problem(config(data=data, partition={"name": "grouped_natural_id", "group_size": 3, "num_clients": 5}), 1)


def test_strict_groups_must_come_out_even():
    with pytest.raises(InputError, match="partition=grouped_natural_id: flwr-datasets cannot split"):
        GroupedNaturalId(group_size=3, mode="strict").split(None, 150, 1, IDS)
