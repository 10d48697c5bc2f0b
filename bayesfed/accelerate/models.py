"""A model's fast paths."""

from __future__ import annotations

from typing import Any

from bayesfed.accelerate.layers import quicken
from bayesfed.accelerate.perceptron import PerceptronGradient
from bayesfed.accelerate.switch import enabled


def prepare(model: Any) -> None:
    """Give a ``FlatModel`` quicker layers and, where there is one, a function for loss and gradient in one call."""
    if enabled():
        quicken(model.module)
        model.gradient = PerceptronGradient.of(model)
