"""Likelihoods p(y | f(x)): what a model's outputs mean, what they predict and how that is scored. One file each."""

from bayesfed.problem.likelihood.base import Likelihood, Predictive
from bayesfed.problem.likelihood.categorical import Categorical
from bayesfed.problem.likelihood.gaussian import Gaussian

__all__ = ["Categorical", "Gaussian", "Likelihood", "Predictive"]
