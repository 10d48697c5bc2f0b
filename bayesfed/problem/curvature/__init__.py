"""Curvature of a summed loss: products with its Hessian and Gauss-Newton matrix, the latter's diagonal, all entries."""

from bayesfed.problem.curvature.ggn import ggn_diagonal
from bayesfed.problem.curvature.loss import SummedLoss
from bayesfed.problem.curvature.products import ggn_vp, hvp

__all__ = ["SummedLoss", "ggn_diagonal", "ggn_vp", "hvp"]
