"""Loss and gradient of a perceptron by one C function.

Of a forward and backward pass of an MLP with 178,110 parameters on a batch of 32, torch spends 40 % between the matrix
products: making the graph, walking it, and a dozen small operations. The C function (``perceptron.c``) makes the same
products, with the same BLAS, and nothing but loops around them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayesfed.accelerate.layers import watched
from bayesfed.accelerate.library import MOST_LAYERS, functions, suits

ACTIVATIONS = {nn.Sigmoid: 0, nn.ReLU: 1}  # as the C source numbers them


class PerceptronGradient:
    """Does ``loss = cross_entropy(model(x), y); loss.backward()`` in one call; make it with :meth:`of`.

    Values and gradients are torch's to rounding. Where torch's own pass means more than these numbers (another loss,
    gradients that add to others, frozen parameters, hooks, emulated low precision, labels out of range) it gives up,
    see :meth:`__call__`.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Linear], activation: int):
        self._parameters, self._activation = model.parameters, activation
        self._biased = [layer.bias is not None for layer in layers]
        self._widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
        self._parts = list(model.module.modules())
        self._work = torch.empty(0)

    @classmethod
    def of(cls, model: Any) -> PerceptronGradient | None:
        """For a flat model whose class says it is a ``chain`` of linear layers and sigmoids or ReLUs; else None.

        Also None for other than float32 on a CPU with one torch thread.
        """
        if "chain" not in vars(type(model.module)):  # inherited, it may not be all that the class computes
            return None
        chain: list[Any] = model.module.chain
        linear, between = chain[::2], chain[1::2]
        kinds = {type(layer) for layer in between} or {nn.ReLU}
        # large matrices are multiplied by oneDNN, see bayesfed.accelerate.layers
        small = all(type(layer) is nn.Linear and layer.in_features > 0 for layer in linear)
        suited = small and len(kinds) == 1 and kinds <= ACTIVATIONS.keys() and len(linear) <= MOST_LAYERS
        owned = [p for layer in linear for p in (layer.weight, layer.bias) if p is not None]
        same = len(owned) == len(model.parameters) and all(p is q for p, q in zip(owned, model.parameters, strict=True))
        if not (suited and same and suits(model.vector) and _multiply() and functions()):
            return None
        return cls(model, linear, ACTIVATIONS[kinds.pop()])

    def __call__(self, loss_of: Any, x: Any, y: Tensor) -> Tensor | None:
        """The mean loss of a batch, (), with its gradient in the parameters' ``grad``; None: nothing done, torch has to
        do it.

        Args:
            loss_of: the loss of outputs and targets.
            x: (B, ...) float32.
            y: (B,) int64.
        """
        if loss_of is not functional.cross_entropy or not isinstance(x, Tensor) or not self._suits(x, y):
            return None
        batch, layers = len(x), len(self._widths) - 1
        rows = x.reshape(batch, -1).contiguous()
        labels = y.contiguous()
        gradients = [torch.empty_like(p) for p in self._parameters]
        loss = torch.empty(())
        size = 2 * batch * sum(self._widths[1:])
        if self._work.numel() < size:
            self._work = torch.empty(size)
        failed = functions().perceptron(
            _multiply(),
            layers,
            (ctypes.c_int64 * (layers + 1))(*self._widths),
            batch,
            self._activation,
            rows.data_ptr(),
            labels.data_ptr(),
            *self._addresses(self._parameters),
            *self._addresses(gradients),
            self._work.data_ptr(),
            loss.data_ptr(),
        )
        if failed:
            return None
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _suits(self, x: Tensor, y: Tensor) -> bool:
        kinds = (x.dtype, y.dtype, x.device.type, y.device.type) == (torch.float32, torch.int64, "cpu", "cpu")
        usual = x.layout == y.layout == torch.strided and not x.is_neg() and not x.requires_grad
        shapes = x.dim() > 0 and len(x) > 0 and x.numel() == len(x) * self._widths[0] and tuple(y.shape) == (len(x),)
        if not (kinds and usual and shapes and torch.is_grad_enabled() and not watched()):
            return False
        return not any(map(_altered, self._parts)) and all(map(_ready, self._parameters))

    def _addresses(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """Arrays of pointers to the weights and to the biases (or NULL) of all layers."""
        each = iter(tensors)
        weights, biases = [], []
        for biased in self._biased:
            weights.append(next(each).data_ptr())
            biases.append(next(each).data_ptr() if biased else None)
        kind = ctypes.c_void_p * len(weights)
        return kind(*weights), kind(*biases)


def _altered(part: nn.Module) -> bool:
    """Whether somebody waits for the module's own forward or backward pass, or has replaced it."""
    hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    return bool(hooks) or "forward" in part.__dict__


def _ready(p: Tensor) -> bool:
    """Whether a parameter wants its gradient as it is, and has none to which it would be added."""
    hooked = p._backward_hooks or p._post_accumulate_grad_hooks
    return p.requires_grad and p.grad is None and not hooked and p.dtype == torch.float32 and p.is_contiguous()


@lru_cache
def _multiply() -> Any:
    """The address of torch's ``sgemm``; None where it has none that can be called."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            found = ctypes.cast(ctypes.CDLL(str(folder / name)).sgemm_, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
        return found.value if sys.byteorder == "little" else None
    return None
