"""What SRVN takes and differentiates: arguments in the covariance's shape, and a loss' gradient and Hessian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError
from clients.flat import FlatParameters, spread
from clients.srvn.step import factor_from_precision

ROWS = 64  # of the Hessian, differentiated together


def as_vector(field: str, value: Any, flat: FlatParameters) -> Tensor:
    """A number or vector as (P,)."""
    return torch.zeros_like(flat.vector) + spread(field, value, [flat])[0]


def as_quadratic(field: str, value: Any, flat: FlatParameters, full: bool) -> Tensor:
    """A number, vector or symmetric matrix as (P, P) if ``full``, else a number or vector as (P,).

    Raises:
        InputError: naming ``field``; the shape does not fit.
    """
    if isinstance(value, Tensor) and value.ndim == 2:
        size = flat.vector.numel()
        if not full or value.shape != (size, size):
            matrix = f" or (with covariance=full) of shape ({size}, {size})"
            raise InputError(field, f"shape {tuple(value.shape)}", f"must be a number, of shape ({size},){matrix}")
        return value.detach().to(flat.vector)
    vector = as_vector(field, value, flat)
    return torch.diag(vector) if full else vector


def as_factor(field: str, precision: Any, flat: FlatParameters, full: bool) -> Tensor:
    """The C of a precision given like :func:`as_quadratic`'s value.

    Raises:
        InputError: naming ``field``; the shape does not fit, or it is not positive.
    """
    matrix = as_quadratic(field, precision, flat, full)
    try:
        return factor_from_precision(matrix)
    except ValueError as error:
        raise InputError(field, "given", f"{error}; must be positive") from None


def times(quadratic: Tensor, vector: Tensor) -> Tensor:
    """A (P, P) or diagonal (P,) matrix times a vector (P,)."""
    return quadratic * vector if quadratic.ndim == 1 else quadratic @ vector


def derivatives(loss: object, parameters: list[Tensor], full: bool) -> tuple[Tensor, Tensor]:
    """A loss' gradient (P,) and its Hessian: (P, P) if ``full``, else the diagonal (P,).

    Raises:
        InputError: the closure returned no tensor.
    """
    if not isinstance(loss, Tensor):
        raise InputError("closure", type(loss).__name__, "must return the loss with curvature=hessian")
    pieces = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    slope = torch.cat([piece.reshape(-1) for piece in pieces])
    size = slope.numel()
    hessian = torch.zeros((size, size) if full else (size,), dtype=slope.dtype, device=slope.device)
    eye = torch.eye(size, dtype=slope.dtype, device=slope.device)
    for first in range(0, size, ROWS) if slope.requires_grad else ():  # not where it is linear in all parameters
        directions = eye[first : first + ROWS]
        pieces = torch.autograd.grad(
            slope, parameters, directions, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
        rows = torch.cat([piece.reshape(len(directions), -1) for piece in pieces], 1)
        hessian[first : first + ROWS] = rows if full else rows[:, first : first + ROWS].diagonal()
    return slope.detach(), hessian
