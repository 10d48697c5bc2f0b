"""From configuration to ``Problem``: load, hold out, partition, scale, check."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from bayesfed.errors import InputError, number
from bayesfed.problem.configured import construct, naming, plain
from bayesfed.problem.data.sampling import hold_out
from bayesfed.problem.data.source import Loaded, Source
from bayesfed.problem.examples import Examples
from bayesfed.problem.likelihood import Categorical, Likelihood
from bayesfed.problem.partition.partitioner import Partitioner
from bayesfed.problem.problem import Problem, check_model
from bayesfed.problem.scaling import fit_scaling
from bayesfed.seeding import numpy_generator


def build_problem(cfg: Mapping[str, Any] | DictConfig, seed: int, validation: float = 0.0) -> Problem:
    """Build the problem of a run; everything random in it depends on ``seed`` alone.

    Args:
        cfg: with the groups ``data``, ``partition``, ``model``, ``likelihood``; each has ``_target_`` and options.
        seed: of the run.
        validation: fraction of the training data held out, before partitioning, and evaluated instead of the test set.

    Raises:
        InputError: on options or data that cannot be used, naming ``group.option``.
    """
    number("eval.validation", validation, at_least=0)
    if validation >= 1:
        raise InputError("eval.validation", validation, "must be below 1")
    configs = {group: plain(group, cfg) for group in ("data", "partition", "model", "likelihood")}
    source = construct("data", configs["data"], Source)  # type: ignore[type-abstract]
    partitioner = construct("partition", configs["partition"], Partitioner)  # type: ignore[type-abstract]
    likelihood = construct("likelihood", configs["likelihood"], Likelihood)  # type: ignore[type-abstract]
    with naming("data"):
        data = source.load(seed)
    y, test_y, num_classes = _targets(data, likelihood)
    train, validated = _training_rows(data, y, source.fraction, seed, validation, num_classes is not None)
    with naming("data"):
        scaling = fit_scaling(source.scaling, data.x, train, data.maximum)
    num_outputs = num_classes if num_classes is not None else likelihood.num_outputs(y)
    input_shape = tuple(data.x.shape[1:])
    check_model(configs["model"], input_shape, num_outputs)
    with naming("partition"):
        parts = _partition(data, y if num_classes is not None else None, train, partitioner, seed)

    x_rows, y_rows = torch.from_numpy(data.x), torch.from_numpy(y)
    clients = [Examples(x_rows, y_rows, torch.from_numpy(rows), scaling) for rows in parts]
    if validation > 0:
        test = Examples(x_rows, y_rows, torch.from_numpy(validated), scaling)
    else:
        test_x = x_rows if data.test_x is data.x else torch.from_numpy(data.test_x)
        rows = None if data.test_rows is None else torch.from_numpy(data.test_rows)
        test = Examples(test_x, torch.from_numpy(test_y), rows, scaling)
    counts = None
    if num_classes is not None:
        counts = np.stack([np.bincount(y[rows], minlength=num_classes) for rows in parts])
    return Problem(
        clients=clients,
        test=test,
        evaluated_on="validation" if validation > 0 else "test",
        likelihood=likelihood,
        input_shape=input_shape,
        num_outputs=num_outputs,
        scaling=scaling,
        num_classes=num_classes,
        label_counts=counts,
        model=configs["model"],
        likelihood_config=configs["likelihood"],
    )


def _targets(data: Loaded, likelihood: Likelihood) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Checked targets of both sets, and the number of classes (None for regression)."""
    y, test_y = likelihood.targets(data.y), likelihood.targets(data.test_y)
    if not isinstance(likelihood, Categorical):
        return y, test_y, None
    if data.num_classes is not None:
        return y, test_y, data.num_classes
    num_classes = max(likelihood.num_outputs(y), likelihood.num_outputs(test_y))
    if num_classes > len(y) + len(test_y):
        fix = (
            f"needs labels 0..C-1, the largest is {num_classes - 1} in {len(y)} rows: number the classes consecutively"
        )
        raise InputError("likelihood", likelihood.name, fix)
    if num_classes < 2:
        raise InputError("likelihood", likelihood.name, "needs at least two classes, all labels are 0")
    return y, test_y, num_classes


def _training_rows(
    data: Loaded, y: np.ndarray, fraction: float, seed: int, validation: float, classes: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to validate on, drawn per client (if there is a client column) and class."""
    rows = np.arange(len(data.x)) if data.train_rows is None else data.train_rows
    strata = [column for column in (data.client, y if classes else None) if column is not None]
    if fraction < 1:
        available = len(rows)
        rows, _ = hold_out(rows, strata, fraction, numpy_generator(seed, "data", "fraction"))
        if len(rows) == 0:
            raise InputError("data.fraction", fraction, f"leaves none of {available} training examples")
    if validation == 0:
        return rows, rows[:0]
    validated, kept = hold_out(rows, strata, validation, numpy_generator(seed, "data", "validation"))
    if len(validated) == 0 or len(kept) == 0:
        fix = f"holds out {len(validated)} of {len(rows)} training examples, keeps {len(kept)}; both need at least one"
        raise InputError("eval.validation", validation, fix)
    return kept, validated


def _partition(
    data: Loaded, labels: np.ndarray | None, train: np.ndarray, partitioner: Partitioner, seed: int
) -> list[np.ndarray]:
    """Rows of each client that has any; by client column if there is one, else by the partitioner."""
    if data.client is None:
        positions = partitioner.split(None if labels is None else labels[train], len(train), seed)
        parts = [train[part] for part in positions]
    else:
        ids = np.unique(data.client)
        if partitioner.num_clients not in (None, len(ids)):
            fix = f"the data's client column has {len(ids)} distinct ids and decides the split; leave it null"
            raise InputError("num_clients", partitioner.num_clients, fix)
        order = train[np.argsort(data.client[train], kind="stable")]
        parts = np.split(order, np.searchsorted(data.client[order], ids)[1:])
    kept = [part for part in parts if len(part)]
    if not kept:
        raise InputError("partition", partitioner.name, "gave no client any example")
    if len(kept) < len(parts):
        text = f"{len(parts) - len(kept)} of {len(parts)} clients got no example and are left out; {len(kept)} remain"
        warnings.warn(text, stacklevel=3)
    return kept
