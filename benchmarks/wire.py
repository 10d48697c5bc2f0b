"""Accuracy against bytes: posteriors that travel in full, in float16 and in bfloat16.

    python benchmarks/wire.py --seeds 1 2 3 --json

Runs ``digits_het10`` in process with ``bayes_admm`` (diagonal, ``ivon``) and ``fedavg`` (``adam``) in every wire
format, with their tuned values. Bytes are those of Flower's messages down and up (``bytes/down`` + ``bytes/up``);
accuracy and NLL are those of the server's posterior after the last round, model-averaged (for ``fedavg`` that is the
mean), as mean +- standard deviation over the seeds. Training is chaotic: one bit that differs in round 1 gives another
run. So the last column is the NLL less that of ``wire=full`` with the same seed, +- standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bayesfed
from bayesfed.runs.directory import clean
from bayesfed.wire import FORMATS

METHODS = ("bayes_admm", "fedavg")


def last_round(method: str, wire: str, seed: int, rounds: int) -> dict[str, float]:
    """The numbers of the last round of one run."""
    with tempfile.TemporaryDirectory() as folder:
        result = bayesfed.run(
            [
                "experiment=digits_het10", f"strategy={method}", f"wire={wire}", f"seed={seed}", f"rounds={rounds}",
                f"eval.every={rounds}", "engine=inline", "checkpoint.every=0", "display=false", "figures=false",
                f"hydra.run.dir={folder}/run",
            ]
        )  # fmt: skip
    return {**result.rounds[-1], "bytes": result.summary["bytes/total"]}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (nan for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def measure(rounds: int, seeds: list[int]) -> list[dict[str, object]]:
    """One row per method and format."""
    rows: list[dict[str, object]] = []
    for method in METHODS:
        full: list[float] = []
        for wire in FORMATS:
            runs = [last_round(method, wire, seed, rounds) for seed in seeds]
            nll = [run["bayes/nll"] for run in runs]
            full = full or nll
            accuracies = [run["bayes/accuracy"] for run in runs]
            accuracy, accuracy_sd = spread(accuracies)
            change, change_sd = spread([a - b for a, b in zip(nll, full, strict=True)])
            total = statistics.mean(run["bytes"] for run in runs)
            rows.append(
                {
                    "method": method, "wire": wire, "bytes_per_round": total / rounds, "bytes_total": total,
                    "accuracy": accuracy, "accuracy_sd": accuracy_sd, "nll": spread(nll)[0], "nll_sd": spread(nll)[1],
                    "nll_less_full": change, "nll_less_full_se": change_sd / math.sqrt(len(seeds)),
                    "accuracy_by_seed": accuracies, "nll_by_seed": nll,
                }
            )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | wire | kB a round | MB in all | accuracy % | NLL | NLL less full's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            "| {method} | {wire} | {0:.1f} | {1:.2f} | {accuracy:.2f} ± {accuracy_sd:.2f} | {nll:.4f} ± {nll_sd:.4f} | "
            "{nll_less_full:+.4f} ± {nll_less_full_se:.4f} |".format(
                row["bytes_per_round"] / 1e3, row["bytes_total"] / 1e6, **row
            )
        )
    return "\n".join(lines)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=20, help="rounds of each run (default: 20)")
    parser.add_argument("--seeds", type=positive, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = measure(args.rounds, args.seeds)
    if args.json:
        print(json.dumps({"rounds": args.rounds, "seeds": args.seeds, "rows": [clean(row) for row in rows]}))
        return
    print(f"digits_het10, {args.rounds} rounds, seeds {', '.join(map(str, args.seeds))}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
