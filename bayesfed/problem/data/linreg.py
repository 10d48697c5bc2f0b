"""Synthetic linear regression whose pooled posterior is known in closed form."""

from __future__ import annotations

import numpy as np

from bayesfed.errors import integer, number
from bayesfed.problem.data.source import Loaded, Source
from bayesfed.seeding import numpy_generator


class LinearRegression(Source):
    """y = w'x + noise with one true w ~ N(0, I) and covariates that differ between clients.

    Client k draws x ~ N(shift_k, diag(scale_k^2)) with shift_k ~ N(0, heterogeneity^2 I) and
    log scale_k ~ N(0, (heterogeneity/2)^2 I). The test rows come from all clients in turn. Everything is float64.
    The data set brings its own client column, so the partitioner is skipped.

    Args:
        num_features: dimension of x.
        num_clients: K.
        examples_per_client: N_k, equal for all.
        noise_precision: 1 / variance of the noise; ``likelihood.precision`` should equal it.
        heterogeneity: spread of the clients' means and scales; 0 = identically distributed clients.
        num_test: test rows.
        fraction: see ``Source``.
        scaling: see ``Source``.

    Raises:
        InputError: naming the option.
    """

    def __init__(
        self,
        *,
        num_features: int = 5,
        num_clients: int = 5,
        examples_per_client: int = 50,
        noise_precision: float = 4.0,
        heterogeneity: float = 1.0,
        num_test: int = 200,
        fraction: float = 1.0,
        scaling: str = "raw",
    ):
        super().__init__(fraction=fraction, scaling=scaling)
        integer("num_features", num_features, at_least=1)
        integer("num_clients", num_clients, at_least=1)
        integer("examples_per_client", examples_per_client, at_least=1)
        integer("num_test", num_test, at_least=1)
        number("noise_precision", noise_precision, above=0)
        number("heterogeneity", heterogeneity, at_least=0)
        self.num_features, self.num_clients, self.num_test = num_features, num_clients, num_test
        self.examples_per_client = examples_per_client
        self.noise_precision, self.heterogeneity = float(noise_precision), float(heterogeneity)

    def load(self, seed: int) -> Loaded:
        weights = numpy_generator(seed, "linreg", "weights").standard_normal(self.num_features)
        client = np.repeat(np.arange(self.num_clients), self.examples_per_client)
        x, y = self._draw(seed, "train", client, weights)
        test_x, test_y = self._draw(seed, "test", np.arange(self.num_test) % self.num_clients, weights)
        return Loaded(x, y, test_x, test_y, client=client)

    def _draw(self, seed: int, split: str, client: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = np.empty((len(client), self.num_features))
        noise = np.empty(len(client))
        for k in range(self.num_clients):
            spread = numpy_generator(seed, "linreg", "client", k).standard_normal((2, self.num_features))
            shift, scale = self.heterogeneity * spread[0], np.exp(0.5 * self.heterogeneity * spread[1])
            generator, rows = numpy_generator(seed, "linreg", split, k), np.flatnonzero(client == k)
            x[rows] = shift + scale * generator.standard_normal((len(rows), self.num_features))
            noise[rows] = generator.standard_normal(len(rows)) / np.sqrt(self.noise_precision)
        return x, x @ weights + noise
