"""Linear model and multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from bayesfed.errors import InputError, choice, integer
from bayesfed.problem.inputs import Shape

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}


class Linear(nn.Module):
    """``f(x) = W flatten(x) + b``.

    Args:
        input_shape: of one example; it is flattened.
        num_outputs: columns of the output.
        bias: whether there is a ``b``.
    """

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, bias: bool = True):
        super().__init__()
        check_bool("bias", bias)
        self.layer = nn.Linear(math.prod(one_shape(input_shape, "linear")), num_outputs, bias=bias)

    @property
    def chain(self) -> list[nn.Module]:
        """The layers: all that happens to a flattened input."""
        return [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class MLP(nn.Module):
    """Fully connected layers with one activation between them.

    Args:
        input_shape: of one example; it is flattened.
        num_outputs: columns of the output.
        hidden: width of each hidden layer; empty gives a linear model.
        activation: ``sigmoid``, ``relu``, ``tanh`` or ``gelu``.
        bias: whether the layers have biases.

    Raises:
        InputError: on a width below 1 or an unknown activation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        bias: bool = True,
    ):
        super().__init__()
        choice("activation", activation, ACTIVATIONS)
        check_bool("bias", bias)
        if isinstance(hidden, int | str):
            raise InputError("hidden", hidden, "must be a list of layer widths, e.g. [64,64]")
        for width in hidden:
            integer("hidden", width, at_least=1)
        sizes = [math.prod(one_shape(input_shape, "mlp")), *hidden, num_outputs]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers[:-1])

    @property
    def chain(self) -> list[nn.Module]:
        """The layers: all that happens to a flattened input."""
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


def one_shape(input_shape: Shape, model: str) -> tuple[int, ...]:
    """The shape, if inputs are one array.

    Raises:
        InputError: they are several.
    """
    if isinstance(input_shape, dict):
        raise InputError("model", model, f"takes one array, the data give {', '.join(sorted(input_shape))}")
    return tuple(input_shape)


def check_bool(field: str, value: object) -> None:
    """Refuse anything but true and false: ``"false"`` would count as true."""
    if not isinstance(value, bool):
        raise InputError(field, value, "must be true or false")
