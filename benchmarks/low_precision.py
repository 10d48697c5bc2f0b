"""Training with a low-precision forward pass: LMD, AdamW and Madam on a small character model, in fp32, MXFP6 and
MXFP4.

    python benchmarks/low_precision.py run --out docs/results/low_precision   # goes on where it was stopped
    python benchmarks/low_precision.py run --out DIR --seconds 200            # stop after the run under way then
    python benchmarks/low_precision.py report --out DIR [--json]                # table, DIR.png

The model is GPT-2's in small (two layers, 64 wide, 4 heads, 32 characters of context, no biases), on the English
captions of Multi30k in lower case. Operands of all products (linear layers and attention) are rounded in the forward
pass, backward is exact (`bayesfed.lowprecision`). Every optimizer has one learning rate (and LMD one decay), chosen in
fp32 on seed 0 (`tune`), and a cosine to 0. LMD is evaluated at its mean weights; "LMD, no decay" is the control, the
same without its weight-scaled decay. Each run is one line in DIR.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.parquet as parquet
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesfed.lowprecision import MXForward
from bayesfed.seeding import torch_generator
from clients.optim import LMD

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 32, 16
FORMATS = {"fp32": None, "MXFP6 E2M3": "e2m3", "MXFP6 E3M2": "e3m2", "MXFP4 E2M1": "e2m1"}
RATES = {"LMD": 0.08, "AdamW": 0.006, "Madam": 0.08, "LMD, no decay": 0.08}  # the best of `tune`
DECAY = 0.1  # of LMD, tuned as well
GRIDS = {"LMD": (0.02, 0.04, 0.08), "AdamW": (0.0015, 0.003, 0.006, 0.012), "Madam": (0.02, 0.04, 0.08, 0.16)}
DECAYS = (0.1, 0.3, 1.0)
COLOURS = {"LMD": "#0072B2", "AdamW": "#D55E00", "Madam": "#009E73", "LMD, no decay": "#777777"}


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterModel(nn.Module):
    """GPT-2's architecture: (B, T) characters to (B, T, vocabulary) logits of the next ones."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                scale = 0.05 / math.sqrt(2 * LAYERS) if name.endswith(("out.weight", "down.weight")) else 0.05
                nn.init.normal_(p, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        places = self.place(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.token(x) + places)))
        return logits


class Madam(torch.optim.Optimizer):
    """Multiplicative Adam (Bernstein et al. 2020): ``w <- w exp(-lr sign(w) g/rms(g))``, |w| at most ``scale`` times
    its initial rms.
    """

    def __init__(self, params: Any, lr: float = 0.01, scale: float = 3.0, bound: float = 10.0, beta: float = 0.999):
        super().__init__(params, {"lr": lr, "scale": scale, "bound": bound, "beta": beta})
        self._steps = 0
        for group in self.param_groups:
            for p in group["params"]:
                limit = scale * p.detach().square().mean().sqrt()
                self.state[p] = {"limit": limit, "square": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._steps += 1
        for group in self.param_groups:
            debias = 1 - group["beta"] ** self._steps
            for p in group["params"]:
                state = self.state[p]
                state["square"].lerp_(p.grad.square(), 1 - group["beta"])
                relative = p.grad / (state["square"] / debias).sqrt().clamp_(min=1e-30)
                p.mul_(torch.exp(-group["lr"] * p.sign() * relative.clamp_(-group["bound"], group["bound"])))
                p.copy_(torch.minimum(torch.maximum(p, -state["limit"]), state["limit"]))


def text() -> tuple[Tensor, Tensor, int]:
    """Characters of the training and validation captions, and the size of the vocabulary."""
    folder = Path(os.environ.get("BAYESFED_DATA", "data")) / "multi30k_en_de"
    parts = [
        "\n".join(parquet.read_table(folder / f"{n}.parquet")["en"].to_pylist()).lower()
        for n in ("train", "validation")
    ]
    letters = {c: i for i, c in enumerate(sorted(set(parts[0])))}
    train, held = (torch.tensor([letters[c] for c in part if c in letters]) for part in parts)
    return train, held, len(letters)


def batch(stream: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``size`` random windows (B, T) and the characters that follow theirs."""
    starts = torch.randint(len(stream) - CONTEXT - 1, (size,), generator=generator)
    windows = stream[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def optimizer_of(name: str, model: nn.Module, lr: float, decay: float | None, seed: int) -> torch.optim.Optimizer:
    """The contestant; betas of momentum 0.9 everywhere, other values its authors' defaults."""
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)
    if name == "Madam":
        return Madam(model.parameters(), lr=lr)
    decay = 0.0 if name == "LMD, no decay" else DECAY if decay is None else decay
    return LMD(model.parameters(), lr=lr, sigma=0.1, decay=decay, generator=torch_generator(seed, "noise"))


def train(name: str, fmt: str | None, seed: int, steps: int, lr: float, decay: float | None = None) -> dict[str, Any]:
    """One run: validation loss (nats per character) and next-character accuracy over training, at the mean weights, in
    the run's format.
    """
    stream, held, vocabulary = text()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CharacterModel(vocabulary)
    optimizer = optimizer_of(name, model, lr, decay, seed)
    generator = torch_generator(seed, "batches")
    precision: Callable[[], Any] = (lambda: MXForward(fmt)) if fmt else nullcontext
    test = batch(held, 256, torch_generator(0, "validation"))
    curve: list[tuple[int, float, float, float]] = []
    started = time.process_time()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with precision():
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def evaluate(step: int) -> None:
        with torch.no_grad(), precision():
            logits = model(test[0]).flatten(0, 1)
        y = test[1].flatten()
        accuracy = 100 * float((logits.argmax(1) == y).float().mean())
        largest = max(float(p.detach().abs().max()) for p in model.parameters())
        curve.append((step, float(F.cross_entropy(logits, y)), accuracy, largest))

    evaluate(0)
    for step in range(1, steps + 1):
        x, y = batch(stream, BATCH, generator)
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        if isinstance(optimizer, LMD):
            with optimizer.sampled_params(train=True):
                loss_of(x, y).backward()
        else:
            optimizer.zero_grad()
            loss_of(x, y).backward()
        optimizer.step()
        if step % (steps // 10) == 0:
            evaluate(step)
    return {
        "optimizer": name,
        "format": fmt or "fp32",
        "seed": seed,
        "steps": steps,
        "lr": lr,
        "loss": curve[-1][1],
        "accuracy": curve[-1][2],
        "largest_weight": curve[-1][3],
        "curve": curve,
        "seconds": round(time.process_time() - started, 1),
    }


def records(path: Path) -> list[dict[str, Any]]:
    """The runs made so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(out: Path, seeds: int, steps: int, seconds: float) -> bool:
    """Make the runs that are missing; whether all are there now."""
    path, started = out.with_suffix(".jsonl"), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["optimizer"], r["format"], r["seed"], r["steps"]) for r in records(path)}
    for seed in range(1, seeds + 1):
        for fmt in (None, "e2m1", "e2m3", "e3m2"):  # the most telling first
            for name, lr in RATES.items():
                if (name, fmt or "fp32", seed, steps) in done:
                    continue
                if time.perf_counter() - started > seconds:
                    return False
                record = train(name, fmt, seed, steps, lr)
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print({k: v for k, v in record.items() if k != "curve"}, flush=True)
    return True


def tune(steps: int) -> None:
    """Final loss of each learning rate (and LMD's decay) in fp32 on seed 0."""
    for name, rates in GRIDS.items():
        for decay in DECAYS if name == "LMD" else (None,):
            for lr in rates:
                print(name, lr, decay, round(train(name, None, 0, steps, lr, decay)["loss"], 4), flush=True)


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds by optimizer and format."""
    rows = []
    for name in RATES:
        for label, fmt in FORMATS.items():
            chosen = [r for r in found if r["optimizer"] == name and r["format"] == (fmt or "fp32")]
            if not chosen:
                continue
            row: dict[str, Any] = {"optimizer": name, "format": label, "seeds": len(chosen)}
            for key in ("loss", "accuracy", "largest_weight"):
                values = torch.tensor([r[key] for r in chosen], dtype=torch.float64)
                row[key] = float(values.mean())
                row[f"{key}_std"] = float(values.std()) if len(chosen) > 1 else 0.0
            rows.append(row)
    return rows


def spread(row: dict[str, Any], key: str, digits: int) -> str:
    """The mean over seeds, with their standard deviation if there are several."""
    mean = f"{row[key]:.{digits}f}"
    return mean if row["seeds"] == 1 else f"{mean} ± {row[f'{key}_std']:.{digits}f}"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Validation loss over training, one panel a format; lines are means over seeds, bands their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    first = None
    for place, (label, fmt) in enumerate(FORMATS.items(), start=1):
        axis = first = figure.add_subplot(1, len(FORMATS), place, sharey=first)
        for name, colour in COLOURS.items():
            curves = [r["curve"] for r in found if r["optimizer"] == name and r["format"] == (fmt or "fp32")]
            if not curves:
                continue
            losses = torch.tensor([[row[1] for row in curve] for curve in curves], dtype=torch.float64)
            losses = losses.nan_to_num(nan=1e9)
            x, style = [row[0] for row in curves[0]], "--" if "no decay" in name else "-"
            last = float(losses[:, -1].mean())
            label = f"{name}: {last:.2f}" if last < 100 else f"{name}: {last:.1g}"
            axis.plot(x, losses.mean(0), style, color=colour, label=label)
            axis.fill_between(x, losses.amin(0), losses.amax(0), color=colour, alpha=0.2, linewidth=0)
        axis.set(
            title=label,
            xlabel="step",
            ylim=(1.2, 4.4),
            ylabel="validation loss (nats/character)" if place == 1 else None,
        )
        axis.legend(frameon=False, fontsize=8, title="at the end")
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run, tune or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "tune", "report"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/low_precision"), help="path without suffix")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--json", action="store_true", help="the report as a JSON list")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "tune":
        tune(args.steps)
    elif args.command == "run":
        print("complete" if run(args.out, args.seeds, args.steps, args.seconds) else "to be continued")
    else:
        found = records(args.out.with_suffix(".jsonl"))
        rows = summary(found)
        draw(found, args.out.with_suffix(".png"))
        if args.json:
            print(json.dumps(rows))
            return
        print("| optimizer | forward | seeds | loss | accuracy % | largest weight |\n|---|---|---|---|---|---|")
        for r in rows:
            print(
                f"| {r['optimizer']} | {r['format']} | {r['seeds']} | {spread(r, 'loss', 3)} "
                f"| {spread(r, 'accuracy', 1)} | {r['largest_weight']:.3g} |"
            )


if __name__ == "__main__":
    main()
