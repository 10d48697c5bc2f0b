"""The diagonal of the generalised Gauss-Newton matrix: by torch.func, or for perceptrons from their layers alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vjp, vmap

from bayesfed.problem.examples import Examples
from bayesfed.problem.flat import FlatModel, eval_mode
from bayesfed.problem.inputs import each
from bayesfed.problem.likelihood import Likelihood


def ggn_diagonal(
    model: FlatModel, likelihood: Likelihood, data: Examples, vector: Tensor, memory_mb: float = 128
) -> tuple[Tensor, int]:
    """``diag sum_n J_n^T L_n J_n`` (P,) in the model's dtype, and how many gradients of one example it took.

    ``J_n`` (C, P) is the Jacobian of example n's outputs, ``L_n`` (C, C) the Hessian of its loss in the outputs. With
    ``L_n = R R^T`` each column of R needs one vector-Jacobian product, and the diagonal is the sum of their squares:
    never negative, no P x P matrix, C gradients an example. The model is in eval mode: derivatives through dropout have
    no meaning here.

    An example's gradient of a linear layer is the outer product of its output gradient b and its input a, so its
    squares summed over examples are ``(b^2)^T a^2``: a model of such layers alone needs no gradients of single examples
    (hundreds of times faster).

    Args:
        model: its parameters are not touched.
        likelihood: of the outputs.
        data: N examples.
        vector: (P,) where.
        memory_mb: bound on the gradients that are held at once.
    """
    device, total = model.vector.device, torch.zeros_like(vector)
    with eval_mode(model.module):
        probe, _ = data.batch(slice(0, 1), vector.dtype, device)
        with torch.no_grad():
            width = functional_call(model.module, model.named(vector.detach()), (probe,)).numel()
        layers = _linear_layers(model, vector, probe)
        held = vector.numel() if not layers else sum(layer.in_features + layer.out_features for layer in layers)
        rows = max(1, min(len(data), int(memory_mb * 1e6 / (vector.element_size() * held * (width + 1)))))
        for start in range(0, len(data), rows):
            x, y = data.batch(slice(start, start + rows), vector.dtype, device)
            if layers:
                total += _of_layers(model, likelihood, vector, layers, x, y)
            else:
                total += _of_examples(model, likelihood, vector, x, y)
    return total, width * len(data)


def _root(likelihood: Likelihood, outputs: Tensor, y: Tensor) -> Tensor:
    """R (C, C) of one example's loss at its ``outputs`` (C,)."""
    curvature = hessian(lambda f: likelihood.loss(f[None], y[None]))(outputs)
    values, vectors = torch.linalg.eigh(curvature)
    return vectors * values.clamp_min(0).sqrt()  # a convex loss has none below 0 but by rounding


def _of_examples(model: FlatModel, likelihood: Likelihood, vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The diagonal over a batch (P,), from the gradients of every example."""

    def outputs(x: Tensor, named: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(model.module, named, (each(lambda v: v[None], x),))[0]
        return result

    def squares(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        values, pullback = vjp(lambda named: outputs(x, named), model.named(vector.detach()))[:2]
        (gradients,) = vmap(pullback)(_root(likelihood, values, y).mT)
        return {name: gradient.square().sum(0) for name, gradient in gradients.items()}

    with torch.no_grad():
        pieces = vmap(squares)(x, y)
    return torch.cat([pieces[name].sum(0).reshape(-1) for name in model.names])


def _of_layers(
    model: FlatModel, likelihood: Likelihood, vector: Tensor, layers: list[nn.Linear], x: Tensor, y: Tensor
) -> Tensor:
    """The same from the inputs and output gradients of linear layers."""
    with _recorded(layers) as calls:
        outputs = functional_call(model.module, _leaves(model, vector), (x,))
    roots = vmap(lambda f, target: _root(likelihood, f, target))(outputs.detach(), y)
    total = torch.zeros_like(vector)
    pieces = dict(zip(map(id, model.parameters), model.split(total), strict=True))
    ends = [calls[layer][0][1] for layer in layers]
    for column in range(roots.shape[2]):
        slopes = torch.autograd.grad(outputs, ends, roots[:, :, column], retain_graph=True)
        for layer, slope in zip(layers, slopes, strict=True):
            inputs = calls[layer][0][0].detach()
            if id(layer.weight) in pieces:
                pieces[id(layer.weight)].addmm_(slope.square().mT, inputs.square())
            if id(layer.bias) in pieces:
                pieces[id(layer.bias)].add_(slope.square().sum(0))
    return total


def _linear_layers(model: FlatModel, vector: Tensor, probe: Tensor) -> list[nn.Linear]:
    """The linear layers, if they hold all trainable parameters, are called once with (B, in) and use them as usual.

    Otherwise (convolutions, sequences, shared or transformed weights) none.
    """
    module, trainable = model.module, {id(p) for p in model.parameters}
    owners = [(m, p) for m in module.modules() for p in m.parameters(recurse=False) if id(p) in trainable]
    layers = list(dict.fromkeys(m for m, _ in owners if isinstance(m, nn.Linear)))
    if len(owners) != len(trainable) or {id(p) for m, p in owners if m in layers} != trainable:
        return []
    named = _leaves(model, vector)
    with _recorded(layers) as calls:
        outputs = functional_call(module, named, (probe,))
    if any(len(calls[layer]) != 1 or calls[layer][0][0].dim() != 2 for layer in layers):
        return []
    ends = [calls[layer][0][1] for layer in layers]
    slopes = torch.autograd.grad(outputs.sum(), [*ends, *named.values()], allow_unused=True)
    if any(slope is None for slope in slopes):
        return []
    expected = {}
    for layer, slope in zip(layers, slopes, strict=False):
        expected[id(layer.weight)] = slope.mT @ calls[layer][0][0].detach()
        expected[id(layer.bias)] = slope.sum(0)
    gradients = zip(model.parameters, slopes[len(ends) :], strict=True)
    return layers if all(torch.allclose(expected[id(p)], g, rtol=1e-3) for p, g in gradients) else []


def _leaves(model: FlatModel, vector: Tensor) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in model.named(vector).items()}


@contextmanager
def _recorded(layers: list[nn.Linear]) -> Iterator[dict[nn.Linear, list[tuple[Tensor, Tensor]]]]:
    """Input and output of every call of the layers."""
    calls: dict[nn.Linear, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: calls[layer].append((inputs[0], output)))
        for layer in layers
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
