"""The machine and the process that bayesfed runs in: what it takes, and what it leaves as it found it."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from bayesfed import host
from bayesfed.compare.grid import grid
from bayesfed.compare.runner import default_jobs
from bayesfed.config import compose_config
from bayesfed.errors import InputError
from bayesfed.evaluation import outputs
from bayesfed.overrides import parse
from bayesfed.problem.data.decoding import decoded


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [
        (4, None, 4),
        (4, "max 100000", 4),
        (4, "150000 100000", 2),
        (4, "50000 100000", 1),
        (2, "800000 100000", 2),
        (1, None, 1),
    ],
)
def test_allowed_cores(monkeypatch, tmp_path, affinity, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)), raising=False)
    monkeypatch.setattr(host, "QUOTA", tmp_path / "cpu.max")
    if quota:
        host.QUOTA.write_text(quota + "\n")
    assert host.cores() == expected
    assert outputs._cores(torch.device("cpu")) == expected
    assert default_jobs(grid(parse(["experiment=linreg"]))) == expected


def test_without_affinity_the_machine_counts(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(host, "QUOTA", tmp_path / "none")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert host.cores() == 7


@pytest.mark.engines
def test_one_ray_worker_for_an_allowed_core(tmp_path):
    program = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import bayesfed, ray\n"
        "bayesfed.run(['experiment=linreg', 'rounds=1', 'eval.samples=1', 'display=false', 'figures=false',"
        "'engine=ray'])\n"
        "print('slots', int(ray.cluster_resources()['CPU']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "slots 1" in done.stdout


# -- packages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["strategies", "clients"])
@pytest.mark.parametrize("file", ["__init__.py", "../{name}.py"])
def test_a_package_that_hides_ours_is_named(tmp_path, name, file):
    (tmp_path / name).mkdir()
    path = (tmp_path / name / file.format(name=name)).resolve()
    path.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "bayesfed", "rounds=1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    found = path.parent if path.stem == "__init__" else path
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: package {name}={found}: hides bayesfed's own package")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_workers_take_the_packages_that_the_server_takes(tmp_path, engine):
    """The command doesn't look for packages in the working directory; Ray puts it first on its workers."""
    for name in ("strategies", "clients"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the user\\'s own')")
    quick = ["experiment=linreg", "rounds=1", "eval.samples=1", "figures=false", "hydra.run.dir=r", f"engine={engine}"]
    program = "import sys; sys.path.remove(''); from bayesfed.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, *quick]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = (tmp_path / "r" / "clients.jsonl").read_text()
    assert '"accepted": true' in lines, done.stderr
    assert '"accepted": false' not in lines


# -- the process -------------------------------------------------------------------------------------------------------


def state() -> dict[str, object]:
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("flwr", "bayesfed", "ray", "matplotlib"))]
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tobytes(),  # noqa: NPY002
        "torch": torch.get_rng_state().numpy().tobytes(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "logging": [(one.level, list(one.handlers), list(one.filters), one.propagate) for one in loggers],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "denormal": torch.tensor(1e-40).mul(1).item(),
        "folder": Path.cwd(),
        "arguments": list(sys.argv),
        "backend": matplotlib.rcParams["backend"],
        "style": dict(matplotlib.rcParams),
        "numpy errors": np.geterr(),
    }


@pytest.mark.parametrize(
    "overrides", [[], ["figures=true", "display=true"], ["client.lr=-1"]], ids=["run", "drawn", "refused"]
)
def test_a_run_leaves_the_process_as_it_was(tmp_path, monkeypatch, overrides):
    import bayesfed

    torch.set_num_threads(2)
    monkeypatch.chdir(tmp_path)
    quick = ["rounds=1", "strategy=fedavg", "client.epochs=1", "eval.samples=2", "figures=false", "display=false"]
    bayesfed.run(
        [*quick, "rounds=0", "hydra.run.dir=first"]
    )  # scikit-learn and SciPy, once imported, set some of their own
    before, path = state(), list(sys.path)
    try:
        bayesfed.run([*quick, *overrides])
    except InputError:
        assert overrides == ["client.lr=-1"]
    after = state()
    assert [key for key in before if after[key] != before[key]] == []
    assert sys.path == path


def test_importing_and_running_draw_no_random_number_of_the_users():
    program = "import random; random.seed(3); import bayesfed; bayesfed.run, bayesfed.load; print(random.random())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == random.Random(3).random()


# -- no home folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def images() -> list[bytes]:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(stream, "png")
    return [stream.getvalue()]


def test_images_without_a_home_folder(monkeypatch, images):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BAYESFED_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert decoded("some", "key", lambda: images).ravel().tolist() == list(range(12))


@pytest.mark.parametrize("home", ["missing/below", "file"])
def test_images_in_a_home_folder_that_is_none(monkeypatch, tmp_path, images, home):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("BAYESFED_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / home))
    assert decoded("some", "key", lambda: images).ravel().tolist() == list(range(12))


def test_composing_never_needs_a_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    assert compose_config([]).seed == 1
