"""What bayesfed does on a GPU: is it right, does it wait for the device, and how long does it take?

``python benchmarks/gpu_check.py --out gpu.json`` from a checkout, on a machine with Python 3.12, torch and NumPy (no
Flower, Hydra or Ray); under eight minutes on one GPU. ``--tiny`` runs small sizes, as a test on a CPU does. Prints a
table, and JSON as its last line.

- ``error``: three steps of a learner in float32 on the device against float64 on the CPU with the same noise, relative
to the change. - ``waits``: whether a step of it waits for the device (``torch.cuda.set_sync_debug_mode("error")``);
null on a CPU. - ``ms``, ``over_adamw``, ``peak_mb``: a step at each size, its ratio to torch's fused AdamW, and the
device's memory. - ``compiled_ms``: the same with ``torch.compile`` around IVON's update; null where it can't be
compiled. - ``clients``, ``samples``: C clients side by side (``torch.vmap``) and S posterior samples at once, over one
after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bayesfed.problem.models import MLP
from bayesfed.seeding import torch_generator
from benchmarks.client_batching import compare, problems_of, seconds, solver_of
from benchmarks.ivon_step import training_step
from clients.noise import Noise
from clients.optim import IVON, LMD, SRVN

SIZES = {
    178_110: [200, 100],
    1_250_000: [1000, 450],
    11_000_000: [3000, 2790],
}  # parameters: hidden widths of 784-...-10
Optimizer = Any

LEARNERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "ivon": lambda p: IVON(p, lr=0.01, ess=1e4, beta2=0.99, prior_precision=10.0, noise="normal"),
    "ivon scalar": lambda p: IVON(p, lr=0.01, ess=1e4, beta2=0.99, hess_structure="scalar", noise="normal"),
    "srvn": lambda p: SRVN(p, lr=0.01, ess=1e4, noise="normal"),
    "lmd": lambda p: LMD(p, lr=0.01, noise="normal"),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def step_of(
    make: Callable[[list[nn.Parameter]], Optimizer], hidden: list[int], device: str, dtype: torch.dtype, batch: int = 32
) -> tuple[Callable[[], None], Callable[[], Tensor], Optimizer]:
    """A training step of a perceptron on random data, its parameters (P,) in float64 on the CPU, and the optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MLP((784,), 10, hidden=hidden).to(device, dtype)
    generator = torch_generator(0, "data")
    x = torch.randn(batch, 784, generator=generator).to(device, dtype)
    y = torch.randint(10, (batch,), generator=generator).to(device)
    optimizer = make(list(model.parameters()))
    step = training_step(model, optimizer, x, y)
    return step, lambda: torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()]), optimizer


def exactness(name: str, device: str, hidden: list[int]) -> float:
    """Largest difference after three steps, relative to the largest change of a parameter."""
    fill, results = Noise.fill, []
    for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
        generator = torch_generator(1, "noise")

        def drawn(self: Noise, out: Tensor, generator: torch.Generator = generator) -> Tensor:
            return out.copy_(torch.randn(out.shape, generator=generator, dtype=torch.float64))

        Noise.fill = drawn  # type: ignore[method-assign]
        try:
            step, parameters, optimizer = step_of(LEARNERS[name], hidden, where, dtype)
            if hasattr(optimizer, "native"):
                optimizer.native = False  # the C function draws its own noise
            before = parameters()
            for _ in range(3):
                step()
            results.append(parameters() - before)
        finally:
            Noise.fill = fill  # type: ignore[method-assign]
    return float((results[1] - results[0]).abs().max() / results[0].abs().max())


def waits(name: str, device: str, hidden: list[int]) -> bool | None:
    """Whether a step waits for the device; None on a CPU, which has nothing to wait for."""
    if device == "cpu":
        return None
    step, _, _ = step_of(LEARNERS[name], hidden, device, torch.float32)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        print(f"{name} waits for the device: {error}", file=sys.stderr)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def milliseconds(step: Callable[[], None], device: str, steps: int) -> float:
    """Median over blocks of ten steps, each waited for."""
    times = []
    for turn in range(2 + max(1, steps // 10)):
        started = time.perf_counter()
        for _ in range(10):
            step()
        if device != "cpu":
            torch.cuda.synchronize()
        if turn >= 2:
            times.append((time.perf_counter() - started) * 100)
    return statistics.median(times)


def compiled(hidden: list[int], device: str, steps: int) -> float | None:
    """A step of IVON with its update inside ``torch.compile``."""
    try:
        step, _, optimizer = step_of(LEARNERS["ivon"], hidden, device, torch.float32)
        optimizer.step = torch.compile(optimizer.step)
        return milliseconds(step, device, steps)
    except Exception as error:  # no compiler, or something it can't trace: that is a result, too
        print(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def sizes(device: str, tiny: bool) -> list[dict[str, Any]]:
    """IVON against fused AdamW."""
    rows, steps = [], 10 if tiny else 200
    for hidden in [[20]] if tiny else SIZES.values():
        ms, peak = {}, {}
        for name in ("ivon", "adamw"):
            if device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            step, parameters, _ = step_of(LEARNERS[name], hidden, device, torch.float32)
            ms[name] = milliseconds(step, device, steps)
            peak[name] = None if device == "cpu" else round(torch.cuda.max_memory_allocated() / 1e6, 1)
        rows.append({
            "parameters": parameters().numel(), "ivon_ms": ms["ivon"], "adamw_ms": ms["adamw"],
            "over_adamw": ms["ivon"] / ms["adamw"], "ivon_peak_mb": peak["ivon"], "adamw_peak_mb": peak["adamw"],
            "compiled_ms": None if tiny else compiled(hidden, device, steps),
        })  # fmt: skip
    return rows


def side_by_side(device: str, tiny: bool) -> list[dict[str, Any]]:
    """Clients in one batch over one after the other."""
    rows = []
    for parameters in (1000,) if tiny else (1000, 10_000, 100_000):
        for client in ("ivon", "sgd"):
            problems = problems_of(client, parameters, 2 if tiny else 32, 16 if tiny else 64, torch.device(device))
            alone, together = compare(solver_of(client, 16), problems, 1 if tiny else 3)
            rows.append({"client": client, "parameters": parameters, "times_as_fast": alone / together})
    return rows


def samples_at_once(device: str, tiny: bool) -> list[dict[str, Any]]:
    """Posterior samples by ``torch.vmap`` over one after the other, for a forward pass on 512 inputs."""
    rows, draws, where = [], 4 if tiny else 16, torch.device(device)
    for hidden in [[20]] if tiny else list(SIZES.values())[:2]:
        model = MLP((784,), 10, hidden=hidden).to(device)
        x = torch.randn(512, 784, device=device)
        several = {n: torch.stack([p.detach()] * draws) for n, p in model.named_parameters()}
        single = [{n: p[i] for n, p in several.items()} for i in range(draws)]

        def one(values: dict[str, Tensor], model: nn.Module = model, x: Tensor = x) -> Tensor:
            return torch.func.functional_call(model, values, (x,))

        ways: dict[str, Callable[[], object]] = {
            "once": lambda one=one, several=several: torch.vmap(one)(several),  # type: ignore[misc]
            "each": lambda one=one, single=single: [one(values) for values in single],  # type: ignore[misc]
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        with torch.no_grad():
            for turn in range(3 if tiny else 12):
                for name, work in ways.items():
                    elapsed = seconds(work, where)
                    if turn:
                        times[name].append(elapsed)
        ratio = statistics.median(times["each"]) / max(statistics.median(times["once"]), 1e-9)
        rows.append({"hidden": hidden, "samples": draws, "times_as_fast": ratio})
    return rows


def measure(device: str, tiny: bool) -> dict[str, Any]:
    """All of it."""
    hidden = [8] if tiny else [64, 32]
    started = time.perf_counter()
    learners = [
        {"learner": name, "error": exactness(name, device, hidden), "waits": waits(name, device, hidden)}
        for name in LEARNERS
    ]
    return {
        "device": torch.cuda.get_device_name(0) if device != "cpu" else "cpu", "torch": torch.__version__,
        "learners": learners, "sizes": sizes(device, tiny), "clients": side_by_side(device, tiny),
        "samples": samples_at_once(device, tiny), "seconds": time.perf_counter() - started,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    args = parser.parse_args()
    result = measure(args.device, args.tiny)
    for section in ("learners", "sizes", "clients", "samples"):
        print(f"\n{section}")
        for row in result[section]:
            print("  " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
