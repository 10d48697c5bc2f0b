"""Training does not import torch._dynamo, and steps without torch's wrappers are the same steps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bayesfed.accelerate import bare_step

RUN = """
import sys
from bayesfed.cli import main
sys.argv = ["bayesfed", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
print("dynamo" if "torch._dynamo" in sys.modules else "spared")
"""


@pytest.mark.parametrize("choice", [["client=ivon"], ["strategy=fedavg", "client=adamw"]])
def test_a_run_does_not_import_dynamo(choice: list[str], tmp_path) -> None:
    options = ["rounds=1", "client.epochs=1", "figures=false", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", RUN, *options, *choice], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "spared"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.AdamW, {"weight_decay": 0.2}),
    ],
)
def test_a_bare_step_is_the_optimizers(kind, options) -> None:
    def train(bare: bool) -> torch.Tensor:
        weights = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = kind([weights], lr=0.1, **options)
        step = bare_step(optimizer) if bare else optimizer.step
        for _ in range(3):
            (weights - 2).square().sum().backward()
            step()
            weights.grad = None
        return weights.detach()

    assert torch.equal(train(bare=True), train(bare=False))
