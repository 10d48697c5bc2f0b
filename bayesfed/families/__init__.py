"""Exponential families: the posteriors that clients and server exchange as natural parameters."""

from bayesfed.errors import choice
from bayesfed.families.base import ExponentialFamily
from bayesfed.families.elementwise import DiagonalGaussian, IsotropicGaussian
from bayesfed.families.full import FullGaussian
from bayesfed.families.gaussian import Gaussian
from bayesfed.families.lognormal import LogNormal
from bayesfed.families.natural import NaturalParameters
from bayesfed.families.point import PointMass

GAUSSIANS: dict[str, type[Gaussian]] = {
    family.name: family for family in (IsotropicGaussian, DiagonalGaussian, FullGaussian)
}
EXPONENTIAL: dict[str, type[ExponentialFamily]] = {**GAUSSIANS, LogNormal.name: LogNormal}
FAMILIES: dict[str, type[ExponentialFamily] | type[PointMass]] = {**EXPONENTIAL, PointMass.name: PointMass}


def gaussian(name: str) -> type[Gaussian]:
    """The Gaussian family called ``name``: ``isotropic``, ``diagonal`` or ``full``."""
    choice("family", name, GAUSSIANS)
    return GAUSSIANS[name]


def exponential(name: str) -> type[ExponentialFamily]:
    """The family with natural parameters called ``name``: one of the Gaussians, or ``lognormal``."""
    choice("family", name, EXPONENTIAL)
    return EXPONENTIAL[name]


__all__ = [
    "EXPONENTIAL",
    "FAMILIES",
    "GAUSSIANS",
    "DiagonalGaussian",
    "ExponentialFamily",
    "FullGaussian",
    "Gaussian",
    "IsotropicGaussian",
    "LogNormal",
    "NaturalParameters",
    "PointMass",
    "exponential",
    "gaussian",
]
