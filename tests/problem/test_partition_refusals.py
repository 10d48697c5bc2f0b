"""What flwr-datasets can't do is one line in this configuration's words, and it warns of nothing."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest

from bayesfed.app import note_unused_partition, plain, problem_of
from bayesfed.config import compose_config
from bayesfed.errors import InputError
from bayesfed.problem import partition
from bayesfed.problem.partition.flower import WORDS, FlowerPartitioner

PARTITIONERS = [getattr(partition, name) for name in partition.__all__]
RENAMED = {t: o for p in PARTITIONERS if issubclass(p, FlowerPartitioner) for t, o in p.options.items() if t != o}
THEIRS = sorted({*WORDS, *RENAMED} - {"partition", "partitions"})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["partition=shard", "partition.num_clients=1000"], "num_shards_per_client=2: 1000 clients need 2000 shards"),
        (["partition=dirichlet", "partition.alpha=0.001"], "min_partition_size=10"),
        (["partition=dirichlet", "partition.num_clients=200", "partition.alpha=0.1"], "min_partition_size=10"),
        (["partition=pathological", "partition.num_classes_per_client=11"], "`num_classes_per_client`=11"),
        (["partition=distribution", "partition.at_least=1000"], "`at_least`=1000"),
        (["partition=distribution", "partition.num_classes_per_client=11"], "num_classes_per_client"),
        (["partition=inner_dirichlet", "partition.num_clients=1400", "partition.alpha=0.001"], ""),
        (["partition=exponential", "partition.num_clients=1000"], ""),
        (["partition=square", "partition.num_clients=1400"], ""),
        (["partition=id_to_size", "partition.power=400"], ""),
    ],
)
def test_one_line_in_our_words(overrides, said, recwarn):
    try:
        found = problem_of(plain(compose_config(overrides)))
    except InputError as error:
        text = str(error)
        assert said in text
        assert "\n" not in text
        assert len(text) < 500
        assert not [word for word in THEIRS if word in text]
    else:  # it can be done after all, or leaves clients out, which is said
        assert not said
        assert len(found.clients) >= 1
    assert [w for w in recwarn if "datasets" in str(w.filename) or issubclass(w.category, RuntimeWarning)] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["partition=size", "partition.sizes=[1,1,1000]"],
        ["partition=pathological", "partition.num_clients=2"],
        ["partition=inner_dirichlet", "partition.alpha=0.01"],
    ],
)
def test_no_warning_of_the_library_and_the_hosts_filters_stay(overrides):
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem_of(plain(compose_config([*overrides, "seed=3"])))
    assert [str(w.message) for w in caught if w.category in (UserWarning, RuntimeWarning)] == []
    assert list(warnings.filters) == before


class Broken(FlowerPartitioner):
    name = "broken"
    kind = "IidPartitioner"

    def __init__(self, error: Exception):
        super().__init__(3)
        self.error = error

    def arguments(self, clients, seed):
        raise self.error


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), KeyError("label"), RuntimeError("a\nb"), AttributeError("num_partitions")]
)
def test_whatever_the_library_raises(error):
    with pytest.raises(InputError, match="partition=broken: flwr-datasets cannot split the data: ") as caught:
        Broken(error).split(np.arange(30) % 3, 30, 1)
    assert "\n" not in str(caught.value)


def test_a_partition_beside_a_client_column(tmp_path, caplog):
    x = np.random.default_rng(0).normal(size=(60, 2))
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(60) % 2, client=np.arange(60) % 3)
    data = ["data=npz", f"data.path={tmp_path / 'd.npz'}"]

    def said(*overrides: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bayesfed"):
            cfg = compose_config([*data, *overrides])
            note_unused_partition(cfg, problem_of(plain(cfg)))
        return caplog.messages

    assert said() == said("partition=natural_id") == said("partition=grouped_natural_id") == []
    assert said("partition=dirichlet", "partition.alpha=0.01") == [
        "the data's client column decides the split; partition=dirichlet partition.alpha=0.01 has no effect"
    ]
