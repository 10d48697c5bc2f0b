"""What makes bayesfed faster and changes results to rounding at most: one switch, ``accelerate=auto|off``.

A process chooses once (:func:`start`, :func:`running`); whoever builds a model to train or evaluate gives it to
:func:`prepare`; a learner with a C twin asks for the :func:`functions`. Nothing outside imports the modules in here.
"""

from bayesfed.accelerate.library import functions, suits
from bayesfed.accelerate.models import prepare
from bayesfed.accelerate.optimizers import bare_step
from bayesfed.accelerate.switch import MODES, enabled, running, start

__all__ = ["MODES", "bare_step", "enabled", "functions", "prepare", "running", "start", "suits"]
