"""What a run is about: data sets, partitioners, models, likelihoods.

``build.build_problem`` turns the four configuration groups into a ``Problem``: one view of the data per client, the
rows that are evaluated, and a way to build the model.
"""

from bayesfed.problem.examples import Examples
from bayesfed.problem.likelihood import Categorical, Gaussian, Likelihood
from bayesfed.problem.problem import Problem, restore_model
from bayesfed.problem.scaling import Scaling

__all__ = [
    "Categorical",
    "Examples",
    "Gaussian",
    "Likelihood",
    "Problem",
    "Scaling",
    "restore_model",
]
