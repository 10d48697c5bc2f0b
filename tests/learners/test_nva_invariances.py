"""NVA changes nothing where nothing should: constants, scales, ranks, translations, rotations."""

import pytest
import torch

from clients.optim import nva

DTYPE = torch.float64


def test_a_constant_changes_nothing(triangle):
    plain, shifted = (nva.maximize(lambda x, c=c: triangle(x) + c, 2, 3, 50, 3) for c in (0.0, 8.0))
    torch.testing.assert_close(plain.means, shifted.means)
    torch.testing.assert_close(plain.weights, shifted.weights)
    assert float(plain.weights.sum()) == pytest.approx(1)


def test_scale_of_objective_and_temperature_together_changes_nothing_with_one_component(triangle):
    one = nva.maximize(triangle, 2, 1, 50, 3, step_size=0.01)
    two = nva.maximize(lambda x: 4 * triangle(x), 2, 1, 50, 3, step_size=0.01, temperature=4.0)
    assert torch.equal(one.means, two.means)
    assert torch.equal(one.covariances, two.covariances)


def test_ranks_alone_matter_at_temperature_zero(triangle):
    one = nva.maximize(triangle, 2, 3, 50, 3, temperature=0.0, step_size=0.01)
    two = nva.maximize(lambda x: torch.exp(3 * triangle(x)), 2, 3, 50, 3, temperature=0.0, step_size=0.01)
    assert torch.equal(one.means, two.means)
    assert torch.equal(one.covariances, two.covariances)


def test_translation(triangle, mixture):
    start, shift = (
        mixture([[0.0, 1.0], [1.0, -1.0]], [[1.0, 1.0]] * 2, [0.5, 0.5]),
        torch.tensor([2.0, -1.0], dtype=DTYPE),
    )
    moved = nva.Mixture(start.means + shift, start.covariances, start.weights)
    one = nva.maximize(triangle, 2, 2, 50, 3, init=start, step_size=0.01)
    two = nva.maximize(lambda x: triangle(x - shift), 2, 2, 50, 3, init=moved, step_size=0.01)
    torch.testing.assert_close(two.means, one.means + shift, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(two.covariances, one.covariances, rtol=1e-9, atol=1e-9)


def rotation(angle):
    turn = torch.tensor(angle, dtype=DTYPE)
    return torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])


def mapped(q, change):
    return nva.Mixture(q.means @ change.T, change @ q.covariances @ change.T, q.weights)


@pytest.mark.parametrize("estimator", nva.ESTIMATORS)
@pytest.mark.parametrize(
    ("change", "variances", "steps"),
    [
        (rotation(0.7), [[0.6, 0.6], [1.3, 1.3]], 1),
        (torch.diag(torch.tensor([-1.0, 1.0], dtype=DTYPE)), [[0.6, 0.9], [1.3, 0.4]], 30),
    ],
)
def test_rotation_is_exact_where_the_factor_turns_with_the_covariance(
    triangle, mixture, with_noise, estimator, change, variances, steps
):
    """Cholesky factors do so for multiples of the identity, and for reflections of the axes; then turned noise gives
    turned paths.
    """
    start = mixture([[0.0, 1.0], [1.0, -0.5]], variances, [0.3, 0.7])
    one = nva.maximize(triangle, 2, 2, steps, 3, estimator, init=start, step_size=0.01)
    with_noise(lambda noise: noise @ change.T)
    two = nva.maximize(
        lambda x: triangle(x @ change), 2, 2, steps, 3, estimator, init=mapped(start, change), step_size=0.01
    )
    expected = mapped(one, change)
    for name in ("means", "covariances", "weights"):
        torch.testing.assert_close(getattr(two, name), getattr(expected, name), rtol=1e-8, atol=1e-9)
    assert float((one.means - start.means).norm()) > 1e-3


def test_rotation_in_law(mixture):
    """300 components without entropy are as many independent runs: their first two moments turn with the target (5
    standard errors).
    """
    change, slope = rotation(0.7), torch.tensor([[3.0, 1.0], [1.0, 0.5]], dtype=DTYPE)
    start = mixture([[1.0, -0.5]] * 300, [[0.3, 1.5]] * 300, [1 / 300] * 300)
    tilted = mapped(start, rotation(0.4))  # no axes to align with

    def run(target, init, seed):
        return nva.maximize(target, 2, 300, 4, seed, init=init, temperature=0.0, step_size=0.05)

    one = run(lambda x: -((x @ slope) * x).sum(1), tilted, 3)
    two = run(lambda x: -((x @ change @ slope) * (x @ change)).sum(1), mapped(tilted, change), 4)
    expected = mapped(one, change)
    for name in ("means", "covariances"):
        ours, turned = getattr(two, name), getattr(expected, name)
        error = (ours.var(0) / 300 + turned.var(0) / 300).sqrt()
        assert bool(((ours.mean(0) - turned.mean(0)).abs() < 5 * error).all())
    assert float((one.means.mean(0) - tilted.means[0]).norm()) > 0.1
