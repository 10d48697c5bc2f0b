"""What an import, a constructor and a run leave of the process they happen in; what is imported when."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
"""
OPTIMIZERS = """
import os, random, sys, warnings
import numpy as np, torch
def state():
    methods = {n: vars(m) if hasattr(m, "__dict__") else None for n, m in vars(torch.optim.Optimizer).items()}
    inner = {n: dict(vars(m.__wrapped__)) for n, m in vars(torch.optim.Optimizer).items() if hasattr(m, "__wrapped__")}
    return {
        "environment": dict(os.environ), "optimizer": (dict(vars(torch.optim.Optimizer)), inner),
        "threads": torch.get_num_threads(),
        "denormal": float(torch.tensor(1e-40) * 1), "dtype": torch.get_default_dtype(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(), "torch": torch.get_rng_state().tolist(),
        "warnings": list(warnings.filters), "grad": torch.is_grad_enabled(),
    }
torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])  # torch imports more at its first optimizer
before = state()
import bayesfed, bayesfed.families, bayesfed.accelerate, clients.ivon, clients.srvn, clients.lmd
from clients.optim import IVON, LMD, SRVN
bayesfed.load
assert {k for k, v in state().items() if v != before[k]} == set(), [k for k, v in state().items() if v != before[k]]
for build in (
    lambda p: IVON(p, lr=0.1, ess=10), lambda p: SRVN(p, lr=0.1, ess=10), lambda p: LMD(p, lr=0.1),
):
    build([torch.nn.Parameter(torch.ones(3))])
changed = [k for k, v in state().items() if v != before[k]]
assert not changed, changed
print("as it was")
"""


def python(code: str, *args: str, code_expected: int = 0) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == code_expected, done.stderr
    return done.stdout + done.stderr


def test_optimizers_leave_the_process_as_it_was() -> None:
    assert "as it was" in python(OPTIMIZERS)


def test_learners_work_with_torch_alone() -> None:
    """On a machine with neither Flower, Hydra nor Ray."""
    blocked = {"flwr", "ray", "hydra", "omegaconf", "rich", "sklearn", "scipy", "matplotlib", "xxhash", "psutil"}
    code = BLOCK.format(blocked=blocked) + (
        "import bayesfed.accelerate, bayesfed.families, clients.exact, clients.ivon, clients.laplace\n"
        "import clients.lmd, clients.nva, clients.optim, clients.point, clients.srvn, clients.von\n"
        "import bayesfed.federation.local\nprint('imported')"
    )
    assert "imported" in python(code)


CLI = BLOCK.format(blocked={"torch"}) + "from bayesfed.cli import main; main()"


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["--help"], 0, "usage: bayesfed"),
        (["run", "--help"], 0, "strategy: "),
        (["compare", "--help"], 0, "usage: bayesfed compare"),
        (["comparee"], 2, "did you mean 'compare'"),
        (["strateg=fedavg"], 2, "did you mean 'strategy'"),
        (["client.lrr=3"], 2, "did you mean 'lr'"),
    ],
)
def test_help_and_a_wrong_key_need_no_torch(args: list[str], code: int, told: str) -> None:
    assert told in python(CLI, *args, code_expected=code)


PAGES = """
import bayesfed.runs.launch as launch
def pages(cfg, *args):
    import torch
    large = torch.zeros(1 << 23)
    address, here = large.data_ptr(), False
    for line in open("/proc/self/smaps"):
        first, *rest = line.split()
        if not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            here = low <= address < high
        elif here and first == "VmFlags:":
            print("large pages" if "hg" in rest else "usual pages")
    raise KeyboardInterrupt
launch.run_config = pages
from bayesfed.cli import main
main()
"""


@pytest.mark.parametrize(("mode", "kind"), [("auto", "large"), ("off", "usual")])
def test_the_command_asks_for_large_pages_before_the_first_tensor(mode: str, kind: str) -> None:
    assert f"{kind} pages" in python(PAGES, "rounds=1", f"accelerate={mode}", code_expected=130)
