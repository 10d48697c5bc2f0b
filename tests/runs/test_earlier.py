"""Run directories that an earlier version made (commit 90d44db, ``rounds=2``): they load, and they go on as they would
have there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import bayesfed
from bayesfed.runs.posterior_file import save_posterior

EARLIER = Path(__file__).parent / "earlier"
RUNS = sorted(folder.name for folder in EARLIER.iterdir() if folder.is_dir())


@pytest.fixture
def run(request, tmp_path):
    return Path(shutil.copytree(EARLIER / request.param, tmp_path / request.param))


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_loads(run):
    trained = bayesfed.load(run)
    save_posterior(run / "again.safetensors", trained.posterior, {})
    saved, again = load_file(run / "posterior.safetensors"), load_file(run / "again.safetensors")
    assert saved.keys() == again.keys()
    assert all((again[name] == value).all() for name, value in saved.items())


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_goes_on_as_it_would_have(run):
    """NAME.safetensors is the posterior after four rounds of that version; another processor may round differently."""
    result = bayesfed.run([f"resume={run}", "rounds=4", "figures=false", "display=false"])
    reached = load_file(run / "posterior.safetensors")
    for name, expected in load_file(EARLIER / f"{run.name}.safetensors").items():
        if name == "precision" and expected.isinf().all():  # of a point
            assert reached[name].isinf().all()
            continue
        gap = reached[name].double() - expected.double()
        assert float(gap.norm()) <= 1e-4 * float(expected.double().norm()), name
    assert [line["round"] for line in result.rounds] == [0, 1, 2, 3, 4]
