"""Exponential families: the posteriors that clients and server exchange as natural parameters."""

from bayesfed.errors import choice
from bayesfed.families.elementwise import DiagonalGaussian, IsotropicGaussian
from bayesfed.families.full import FullGaussian
from bayesfed.families.gaussian import Gaussian
from bayesfed.families.natural import NaturalParameters
from bayesfed.families.point import PointMass

GAUSSIANS: dict[str, type[Gaussian]] = {
    family.name: family for family in (IsotropicGaussian, DiagonalGaussian, FullGaussian)
}
FAMILIES: dict[str, type[Gaussian] | type[PointMass]] = {**GAUSSIANS, PointMass.name: PointMass}


def gaussian(name: str) -> type[Gaussian]:
    """The Gaussian family called ``name``: ``isotropic``, ``diagonal`` or ``full``."""
    choice("family", name, GAUSSIANS)
    return GAUSSIANS[name]


__all__ = [
    "FAMILIES",
    "GAUSSIANS",
    "DiagonalGaussian",
    "FullGaussian",
    "Gaussian",
    "IsotropicGaussian",
    "NaturalParameters",
    "PointMass",
    "gaussian",
]
