"""The diagonal of the generalised Gauss-Newton matrix, by torch.func."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, hessian, vjp, vmap

from clients.local import LocalProblem


def ggn_diagonal(problem: LocalProblem, vector: Tensor, memory_mb: float = 128) -> tuple[Tensor, int]:
    """``diag sum_n J_n^T L_n J_n`` of the client's summed loss, (P,) in the model's dtype, and how many gradients of one example it took.

    ``J_n`` (C, P) is the Jacobian of example n's outputs, ``L_n`` (C, C) the Hessian of its loss in the outputs. With ``L_n = R R^T`` each column of R
    needs one vector-Jacobian product, and the diagonal is the sum of their squares: never negative, no P x P matrix, C gradients an example.
    The model is in eval mode: derivatives through dropout have no meaning here.

    Args:
        problem: gives model, data and likelihood.
        vector: (P,) where.
        memory_mb: bound on the gradients that are held at once.
    """
    model, data = problem.model, problem.data
    parameters = model.named(vector.detach())

    def outputs(x: Tensor, values: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(model.module, values, (x[None],))[0]
        return result

    def squares(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        found, pullback = vjp(lambda values: outputs(x, values), parameters)[:2]
        curvature = hessian(lambda f: problem.likelihood.loss(f[None], y[None]))(found)
        values, vectors = torch.linalg.eigh(curvature)
        root = vectors * values.clamp_min(0).sqrt()  # a convex loss has none below 0 but by rounding
        (gradients,) = vmap(pullback)(root.mT)
        return {name: gradient.square().sum(0) for name, gradient in gradients.items()}

    model.module.eval()
    with torch.no_grad():
        probe, _ = data.batch(slice(0, 1), problem.dtype, problem.device)
        width = outputs(probe[0], parameters).numel()
        per_example = vector.element_size() * vector.numel() * (width + 1)
        rows = max(1, min(len(data), int(memory_mb * 1e6 / per_example)))
        total = torch.zeros_like(vector)
        for start in range(0, len(data), rows):
            x, y = data.batch(slice(start, start + rows), problem.dtype, problem.device)
            pieces = vmap(squares)(x, y)
            total += torch.cat([pieces[name].sum(0).reshape(-1) for name in model.names])
    return total, width * len(data)
