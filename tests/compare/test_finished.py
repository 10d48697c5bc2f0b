"""What a comparison takes for done."""

from __future__ import annotations

import numpy as np
import pytest

import bayesfed
from bayesfed.app import plain
from bayesfed.compare.child import finished
from bayesfed.config import compose_config
from bayesfed.errors import InputError


def test_a_run_on_data_that_changed_is_not_done(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2
    np.savez(tmp_path / "d.npz", x=x, y=y)
    settings = [
        "data=npz",
        f"data.path={tmp_path}/d.npz",
        "partition=iid",
        "partition.num_clients=2",
        "strategy=fedavg",
        "rounds=1",
        "figures=false",
        "display=false",
    ]
    bayesfed.run([*settings, f"hydra.run.dir={tmp_path}/run"])
    config = plain(compose_config(settings))
    assert finished(tmp_path / "run", config)
    np.savez(tmp_path / "d.npz", x=x, y=1 - y)
    with pytest.raises(InputError, match="other data"):
        finished(tmp_path / "run", config)
