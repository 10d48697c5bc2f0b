"""From configuration to ``Problem``: load, hold out, partition, scale, check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from logging import getLogger
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from bayesfed.configured import build, group_of, naming, resolve
from bayesfed.errors import InputError, number
from bayesfed.problem.client_tests import client_tests
from bayesfed.problem.data.sampling import hold_out
from bayesfed.problem.data.source import Loaded, Source
from bayesfed.problem.examples import Examples
from bayesfed.problem.inputs import shape_of, tensors
from bayesfed.problem.labels import coded
from bayesfed.problem.likelihood import Categorical, Likelihood
from bayesfed.problem.partition.division import divide
from bayesfed.problem.partition.partitioner import Partitioner
from bayesfed.problem.problem import Problem, build_model
from bayesfed.problem.ranges import check_ranges, warn_of_sizes
from bayesfed.problem.scaling import fit_scaling
from bayesfed.problem.shift import ClientShift, Shift
from bayesfed.seeding import global_generators, numpy_generator

log = getLogger("bayesfed")


def build_problem(cfg: Mapping[str, Any] | DictConfig, seed: int, validation: float = 0.0) -> Problem:
    """Build the problem of a run; everything random in it depends on ``seed`` alone.

    Args:
        cfg: with the groups ``data``, ``partition``, ``model``, ``likelihood``; each has ``_target_`` and options. A
            section ``shift`` has the values of :class:`bayesfed.problem.shift.Shift`.
        seed: of the run.
        validation: fraction of the training data held out, before partitioning, and evaluated instead of the test set.

    Raises:
        InputError: on options or data that cannot be used, naming ``group.option``.
    """
    number("eval.validation", validation, at_least=0, below=1)
    configs = {group: group_of(cfg, group) for group in ("data", "partition", "model", "likelihood")}
    shift = Shift.of(group_of(cfg, "shift") if cfg.get("shift") else None)
    source = build(configs["data"], "data", seed, Source)
    partitioner = build(configs["partition"], "partition", seed, Partitioner)
    partitioner.name = configs["partition"].get("name", partitioner.name)
    likelihood = build(configs["likelihood"], "likelihood", seed, Likelihood)
    with naming("data"), global_generators(seed, "data"):
        data = source.load(seed)
    y, test_y, num_classes, names = _targets(data, likelihood, partitioner)
    train, validated = _training_rows(data, y, source.fraction, seed, validation, num_classes is not None)
    with naming("data"), np.errstate(over="ignore", invalid="ignore"):  # said by check_ranges
        scaling = fit_scaling(source.scaling, data.x, train, data.maximum)
    if data.own:
        check_ranges(data, scaling, source.scaling, likelihood, cfg.get("dtype", "float32"))
        warn_of_sizes(data, scaling, likelihood, train)
    num_outputs = num_classes if num_classes is not None else likelihood.num_outputs(y)
    input_shape = shape_of(data.x)
    arguments = configs["model"], input_shape, num_outputs, seed
    model = build_model(*arguments)  # refuses bad options before the split takes its time
    shifts_of = partial(
        shift.draw, seed, shape=input_shape, num_classes=num_classes, maximum=_maximum(shift, data, train)
    )
    shifts_of(clients=1)  # says what can't be shifted before the split takes its time
    with naming("partition"), global_generators(seed, "partition"):
        division = divide(data, y, num_classes is not None, train, partitioner, seed)
    shifts = shifts_of(clients=len(division.parts))

    x_rows, y_rows = tensors(data.x), torch.from_numpy(y)
    clients = [
        Examples(x_rows, y_rows, torch.from_numpy(rows), scaling, shifted)
        for rows, shifted in zip(division.parts, shifts, strict=True)
    ]
    if validation > 0:
        test = Examples(x_rows, y_rows, torch.from_numpy(validated), scaling)
    else:
        test_x = x_rows if data.test_x is data.x else tensors(data.test_x)
        rows = None if data.test_rows is None else torch.from_numpy(data.test_rows)
        test = Examples(test_x, torch.from_numpy(test_y), rows, scaling)
    held = counts = None
    if num_classes is not None:
        held = np.stack([np.bincount(y[rows], minlength=num_classes) for rows in division.parts])
        counts = np.stack([_seen(of_client, shifted) for of_client, shifted in zip(held, shifts, strict=True)])
    own_rows = client_tests(
        np.arange(len(test.y)) if test.index is None else test.index.numpy(),
        None if num_classes is None else test.targets().numpy(),
        held,
        seed,
        len(division.parts),
        division.owner[test.index.numpy()]
        if division.owner is not None and test.x is x_rows and test.index is not None
        else None,
    )
    own = [
        replace(test, index=torch.from_numpy(rows), shift=shifted)
        for rows, shifted in zip(own_rows, shifts, strict=True)
    ]
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
        client_tests=own,
        classes=names,
        client_names=division.names,
        columns=None if data.columns is None else list(data.columns),
        split_by_data=data.client is not None and partitioner.needs_values != "client",
        spare=[(arguments, model)],
    )


def origins(cfg: Mapping[str, Any] | DictConfig) -> tuple[object, ...]:
    """What a problem is made of besides its configuration: the classes it names, and the state of their files.

    Hashable; two are equal as long as :func:`build_problem` would give the same again.

    Raises:
        InputError: as :func:`build_problem` on the options of the data.
    """
    configs = {group: group_of(cfg, group) for group in ("data", "partition", "likelihood")}
    source = build(configs["data"], "data", None, Source)
    return (*(resolve(config, group) for group, config in configs.items()), source.stamps())


def _seen(counts: np.ndarray, shift: ClientShift | None) -> np.ndarray:
    """(C,) examples per class after a client's permutation of its labels."""
    if shift is None or not shift.labels:
        return counts
    seen = np.zeros_like(counts)
    np.add.at(seen, np.asarray(shift.labels), counts)
    return seen


def _maximum(shift: Shift, data: Loaded, train: np.ndarray) -> float:
    """The largest value an input can hold, if it matters."""
    if data.maximum is not None or not shift.on_features or isinstance(data.x, dict):
        return data.maximum or 1.0
    return float(data.x[train].max())


def _targets(
    data: Loaded, likelihood: Likelihood, partitioner: Partitioner
) -> tuple[np.ndarray, np.ndarray, int | None, list[str] | None]:
    """Checked targets of both sets, the number of classes (None for regression) and their names (None: 0..C-1)."""
    if isinstance(likelihood, Categorical) and data.num_classes is None:
        return coded(data.y, data.test_y, data.classes, likelihood, alone=partitioner.alone)
    if not isinstance(likelihood, Categorical):
        if data.classes is not None:
            raise InputError(
                "data.classes", data.classes, f"likelihood={likelihood.name} has no classes; leave it null"
            )
        for y in (data.y, data.test_y):
            if y.dtype.kind == "U":
                raise InputError(*data.target, f"column must hold numbers for likelihood={likelihood.name}, holds text")
    num_classes = data.num_classes if isinstance(likelihood, Categorical) else None
    return likelihood.targets(data.y), likelihood.targets(data.test_y), num_classes, None


def _training_rows(
    data: Loaded, y: np.ndarray, fraction: float, seed: int, validation: float, classes: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to validate on, drawn per client (if there is a client column) and class."""
    rows = np.arange(len(data.y)) if data.train_rows is None else data.train_rows
    strata = [column for column in (data.client, y if classes else None) if column is not None]
    if fraction < 1:
        available = len(rows)
        rows, _ = hold_out(rows, strata, fraction, numpy_generator(seed, "data", "fraction"))
        if len(rows) == 0:
            raise InputError("data.fraction", fraction, f"leaves none of {available} training examples")
    if validation == 0:
        return rows, rows[:0]
    validated, left = hold_out(rows, strata, validation, numpy_generator(seed, "data", "validation"))
    if len(validated) == 0 or len(left) == 0:
        fix = f"holds out {len(validated)} of {len(rows)} training examples, keeps {len(left)}; both need at least one"
        raise InputError("eval.validation", validation, fix)
    return left, validated
