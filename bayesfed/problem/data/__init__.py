"""Data sources. Each is a class built from its options whose ``load(seed)`` gives a ``Loaded`` data set."""

from bayesfed.problem.data.digits import Digits
from bayesfed.problem.data.images import Images
from bayesfed.problem.data.linreg import LinearRegression
from bayesfed.problem.data.npz import Npz
from bayesfed.problem.data.source import Loaded, Source
from bayesfed.problem.data.table import Table

Parquet = Table  # as stored runs call it, which are compared with what is asked for when they go on

__all__ = ["Digits", "Images", "LinearRegression", "Loaded", "Npz", "Parquet", "Source", "Table"]
