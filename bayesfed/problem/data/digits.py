"""scikit-learn's 1,797 handwritten digits: real data that need no download."""

from __future__ import annotations

import numpy as np

from bayesfed.problem.data.sampling import hold_out
from bayesfed.problem.data.source import Loaded, Source


class Digits(Source):
    """8x8 images with values 0..16 (Alpaydin and Kaynak, 1998), ten classes, as (N, 1, 8, 8) uint8.

    The split is the same for every seed: 1,438 training and 359 test images, stratified by class.

    Args:
        fraction: see ``Source``.
        scaling: see ``Source``; ``unit`` divides by 16.
    """

    def __init__(self, *, fraction: float = 1.0, scaling: str = "unit"):
        super().__init__(fraction=fraction, scaling=scaling)

    def load(self, seed: int) -> Loaded:
        from sklearn.datasets import load_digits  # slow to import

        pixels, labels = load_digits(return_X_y=True)
        x, y = pixels.astype(np.uint8).reshape(-1, 1, 8, 8), labels.astype(np.int64)
        test, train = hold_out(np.arange(len(x)), [y], 0.2, np.random.default_rng(0))
        return Loaded(x, y, x, y, train, test, num_classes=10, maximum=16.0)
