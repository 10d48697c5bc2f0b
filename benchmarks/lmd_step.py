"""Time of one training step of LMD against torch's fused AdamW, measured alternately in one run.

``python benchmarks/lmd_step.py [--model mlp|cnn|cnn_zenke|cnn_acar] [--json]``: zero_grad, sample, forward, backward
and update, batch 32 (medians in milliseconds of processor time, which other jobs disturb less). ``lmd_no_noise`` has
sigma = 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ivon_step import MODELS, TURN, steps
from clients.optim import LMD

LEARNERS = {
    "lmd": lambda params: LMD(params),
    "lmd_no_noise": lambda params: LMD(params, sigma=0.0),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
}


def measure(model: str, batch: int, repeats: int) -> dict[str, object]:
    """Median milliseconds of each learner's step, ``TURN`` steps of each in turn, and ratios."""
    made = {name: steps(model, make, batch) for name, make in LEARNERS.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats // TURN + 2):
        for name, (step, _) in made.items():
            for _ in range(TURN):
                start = time.process_time()
                step()
                if turn >= 2:
                    times[name].append(time.process_time() - start)
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return {
        **{f"{name}_ms": round(value, 4) for name, value in ms.items()},
        "lmd_over_adamw": round(ms["lmd"] / ms["adamw_fused"], 3),
        "lmd_no_noise_over_adamw": round(ms["lmd_no_noise"] / ms["adamw_fused"], 3),
        "model": model,
        "parameters": made["lmd"][1],
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", choices=sorted(MODELS), default="mlp")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(args.model, args.batch, args.repeats)
    print(json.dumps(result) if args.json else "\n".join(f"{key:<24} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
