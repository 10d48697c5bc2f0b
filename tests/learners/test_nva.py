"""NVA (arXiv 2501.04667): targets, fixed points, estimators, and federated search."""

import math

import pytest
import torch

from clients.gaussian_steps import retract
from clients.optim import nva

DTYPE = torch.float64
CENTRES = torch.tensor([[0, 1], [math.cos(math.pi / 6), -0.5], [-math.cos(math.pi / 6), -0.5]], dtype=DTYPE)
MODES = torch.tensor([[0, 0.5109], [0.4424, -0.2554], [-0.4424, -0.2554], [0, 0]], dtype=DTYPE)
HIMMELBLAU = torch.tensor([[3, 2], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848126]], dtype=DTYPE)
CAMEL = torch.tensor([[0.089842, -0.712656], [-0.089842, 0.712656]], dtype=DTYPE)


def himmelblau(x):
    return -((x[:, 0] ** 2 + x[:, 1] - 11) ** 2) - (x[:, 0] + x[:, 1] ** 2 - 7) ** 2


def camel(x):
    a, b = x[:, 0] ** 2, x[:, 1] ** 2
    return -(4 - 2.1 * a + a**2 / 3) * a - x[:, 0] * x[:, 1] + (4 - 4 * b) * b


def bowl(h, centre):
    return lambda x: -0.5 * (torch.tensor(h, dtype=DTYPE) * (x - torch.tensor(centre, dtype=DTYPE)) ** 2).sum(-1)


def hits(places, means, radius=0.1):
    return int((torch.cdist(places, means).amin(1) < radius).sum())


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


# -- the targets ------------------------------------------------------------------------------------------------------


def test_the_target_has_the_four_modes(triangle):
    assert triangle(MODES).tolist() == pytest.approx([-2.147175] * 3 + [-2.147617], abs=2e-6)


@pytest.mark.parametrize(
    ("variance", "count", "radius"),
    [(0.25, 3, 0.9923), (0.5, 3, 0.7164), (0.52, 4, None), (0.54, 4, None), (0.55, 1, None), (0.6, 1, None)],
)
def test_how_many_modes_a_triangle_mixture_has(variance, count, radius):
    """Newton from a grid on the closed-form derivatives: 3 modes, then 4 with the centre, then the centre alone."""
    q = nva.Mixture(CENTRES, variance * torch.eye(2, dtype=DTYPE).repeat(3, 1, 1), torch.full((3,), 1 / 3, dtype=DTYPE))
    axis = torch.linspace(-1.2, 1.2, 41, dtype=DTYPE)
    x = torch.cartesian_prod(axis, axis)
    for _ in range(40):
        gradient, hessian = q.derivatives(x)
        x = x - torch.linalg.lstsq(hessian, gradient[:, :, None]).solution[:, :, 0].clamp(-0.2, 0.2)
    gradient, hessian = q.derivatives(x)
    found = x[(gradient.norm(dim=1) < 1e-10) & (torch.linalg.eigvalsh(hessian)[:, -1] < -1e-6) & (x.norm(dim=1) < 2)]
    modes = nva.modes(nva.Mixture(found, torch.empty(0), torch.empty(0)), q.log_density, radius=1e-4)[0]
    assert len(modes) == count
    if radius is not None:
        assert modes.norm(dim=1).tolist() == pytest.approx([radius] * 3, abs=1e-4)


def test_mixture_derivatives_against_autograd(mixture):
    q = mixture([[0.0, 1.0], [2.0, -1.0]], [[0.5, 2.0], [1.0, 0.3]], [0.3, 0.7])
    x = normal(5, 2, seed=0)
    gradient, hessian = q.derivatives(x)
    for point, g, h in zip(x, gradient, hessian, strict=True):

        def single(p):
            return q.log_density(p[None])[0]

        torch.testing.assert_close(g, torch.func.grad(single)(point))
        torch.testing.assert_close(h, torch.func.hessian(single)(point))


# -- search -----------------------------------------------------------------------------------------------------------


# more seeds and components: benchmarks/nva_modes.py


@pytest.mark.slow
def test_eight_components_find_all_four_modes(triangle):
    """The median distance of a component to its mode is 0.013 to 0.025 in the paper."""
    means = nva.maximize(triangle, 2, 8, 3000, 0).means
    assert hits(MODES, means) == 4
    assert float(torch.cdist(means, MODES).amin(1).median()) < 0.03


@pytest.mark.slow
def test_without_fitness_shaping_the_black_box_fails_at_this_schedule(triangle):
    assert hits(MODES, nva.maximize(triangle, 2, 4, 3000, 0, "stein").means) <= 1


@pytest.mark.slow
def test_himmelblau_and_camel():
    """At least 3 of 4 maxima with K = 12; both of camel with K = 8."""
    means = nva.maximize(himmelblau, 2, 12, 3000, 1, init_range=5.0).means
    assert hits(HIMMELBLAU, means) >= 3
    assert float(torch.cdist(means, HIMMELBLAU).amin(1).median()) < 1e-3
    assert hits(CAMEL, nva.maximize(camel, 2, 8, 3000, 0).means) == 2


def test_derivatives_find_all_maxima_of_himmelblau_in_200_steps():
    found = nva.maximize(
        himmelblau, 2, 12, 200, 0, "hessian", samples=4, step_size=0.01, temperature=100.0, init_range=5.0
    )
    assert hits(HIMMELBLAU, found.means) == 4


def test_modes_are_the_distinct_ones_best_first(mixture):
    q = mixture([[3.0, 2.0], [3.01, 2.0], [0.0, 0.0], [-3.779310, -3.283186]], [[1.0, 1.0]] * 4, [0.25] * 4)
    places, heights = nva.modes(q, himmelblau)
    assert places.tolist() == [[3.0, 2.0], [-3.779310, -3.283186], [0.0, 0.0]]
    assert heights.tolist() == sorted(heights.tolist(), reverse=True)
    assert len(nva.modes(q, himmelblau, drop=1.0)[0]) == 2


def test_cma_es_finds_one_maximum_a_run():
    """The same budget of 36,000 evaluations: CMA-ES converges to one maximum, NVA keeps several."""
    cma = pytest.importorskip("cma")
    options = {"seed": 1, "verbose": -9, "maxfevals": 36_000, "bounds": [-5, 5]}
    best, _ = cma.fmin2(lambda x: -float(himmelblau(torch.tensor(x, dtype=DTYPE)[None])), [0.0, 0.0], 2.0, options)
    assert hits(HIMMELBLAU, torch.tensor(best, dtype=DTYPE)[None]) == 1
    assert (
        hits(HIMMELBLAU, nva.maximize(himmelblau, 2, 12, 36_000 // (12 * 16), 0, step_size=1e-3, init_range=5.0).means)
        > 1
    )


# -- fixed points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("omega", [1.0, 2.0])
def test_quadratic_at_fixed_temperature_reaches_the_gibbs_density(omega):
    found = nva.maximize(
        bowl([1.0, 4.0], [1.0, -0.5]),
        2,
        1,
        300,
        0,
        "hessian",
        temperature=omega,
        cooling=0.0,
        step_size=0.1,
        damping=0.0,
    )
    torch.testing.assert_close(
        found.covariances[0], torch.diag(omega / torch.tensor([1.0, 4.0], dtype=DTYPE)), rtol=1e-8, atol=1e-9
    )
    assert found.means[0].tolist() == pytest.approx([1.0, -0.5], abs=1e-8)


def test_covariances_follow_the_temperature_down():
    """Annealed: Sigma is about omega_i (-hess l)^-1 at the end."""
    found = nva.maximize(bowl([1.0, 4.0], [1.0, -0.5]), 2, 1, 400, 0, "hessian", step_size=0.05, cooling=0.5)
    omega = 1 / 401**0.5
    torch.testing.assert_close(
        found.covariances[0], omega * torch.diag(torch.tensor([1.0, 0.25], dtype=DTYPE)), rtol=0.1, atol=1e-6
    )


@pytest.mark.parametrize("estimator", ["hessian", "stein"])
def test_a_mixture_is_the_fixed_point_of_its_own_log_density(mixture, estimator):
    truth = mixture([[0.0, 1.0], [2.0, -1.0], [-1.0, -1.0]], [[0.5, 2.0], [1.0, 0.3], [0.2, 0.2]], [0.2, 0.3, 0.5])
    found = nva.maximize(
        truth.log_density, 2, 3, 20, 0, estimator, temperature=1.0, cooling=0.0, step_size=0.1, damping=0.0, init=truth
    )  # fmt: skip
    for name in ("means", "covariances", "weights"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=1e-9, atol=1e-9)


def test_weights_of_separated_modes_at_fixed_temperature(mixture):
    """pi_k is proportional to exp(l_k / omega) |H_k|^(-1/2)."""
    omega, heights, curvatures = 0.5, [0.0, 0.4], [[1.0, 1.0], [4.0, 1.0]]

    def target(x):
        one, two = bowl(curvatures[0], [-10.0, 0.0]), bowl(curvatures[1], [10.0, 0.0])
        return torch.logsumexp(torch.stack([one(x) + heights[0], two(x) + heights[1]]), 0)

    found = nva.maximize(
        target, 2, 2, 300, 0, "hessian", temperature=omega, cooling=0.0, step_size=0.1, damping=0.0,
        init=mixture([[-9.0, 0.5], [9.5, 0.0]], [[1.0, 1.0]] * 2, [0.5, 0.5]),
    )  # fmt: skip
    expected = torch.tensor([math.exp(heights[0] / omega), math.exp(heights[1] / omega) / 2], dtype=DTYPE)
    torch.testing.assert_close(found.weights, expected / expected.sum(), rtol=1e-6, atol=0)


# -- components among themselves --------------------------------------------------------------------------------------


def two_wells(x):
    return torch.logsumexp(torch.stack([bowl([4.0, 4.0], [side, 0.0])(x) for side in (-1.5, 1.5)]), 0)


def from_one_point(mixture, seed, temperature):
    start = mixture([[0.0, 0.0]] * 2, [[0.5, 0.5]] * 2, [0.3, 0.7])
    settings = {"temperature": temperature, "cooling": 0.0, "step_size": 0.1, "damping": 0.0, "samples": 8}
    return nva.maximize(two_wells, 2, 2, 150, seed, "hessian", init=start, **settings)


def test_components_at_one_point_are_separated_by_sampling_alone(mixture, with_noise):
    with_noise(lambda noise: noise[:1].expand_as(noise))
    found = from_one_point(mixture, 0, 1.0)
    assert torch.equal(found.means[0], found.means[1])
    assert torch.equal(found.covariances[0], found.covariances[1])
    torch.testing.assert_close(found.weights, torch.tensor([0.3, 0.7], dtype=DTYPE), rtol=1e-9, atol=0)


def test_entropy_repels(mixture):
    """At temperature 1 two components from one point end in different wells, for every seed; almost without entropy not
    always.
    """

    def apart(temperature):
        return [bool(from_one_point(mixture, seed, temperature).means[:, 0].prod() < -1) for seed in range(8)]

    assert apart(1.0) == [True] * 8
    assert 0 < sum(apart(1e-6)) < 8


def test_components_beyond_the_number_of_modes_share_them():
    found = nva.maximize(
        himmelblau, 2, 12, 200, 0, "hessian", samples=4, step_size=0.01, temperature=100.0, init_range=5.0
    )
    places, heights = nva.modes(found, himmelblau, radius=0.5)
    assert hits(HIMMELBLAU, places) == len(places) == 4
    assert float(heights[-1]) > -0.1


def test_seeds_are_keyed_and_global_random_state_means_nothing(triangle):
    one = nva.maximize(triangle, 2, 3, 5, 3)
    torch.manual_seed(99)
    assert torch.equal(one.means, nva.maximize(triangle, 2, 3, 5, 3).means)
    assert not torch.equal(one.means, nva.maximize(triangle, 2, 3, 5, 4).means)


# -- estimators -------------------------------------------------------------------------------------------------------


def test_a_flat_objective_gives_no_drift():
    """Over 20,000 components with random ranks both estimates average to 0 (4 standard errors)."""
    offsets = normal(20_000, 16, 2, seed=5)
    weights = nva.rank_weights(normal(20_000, 16, seed=6), 4)
    gradient, hessian = nva.stein(weights, offsets, torch.eye(2, dtype=DTYPE).repeat(20_000, 1, 1))
    for estimate in (gradient, hessian):
        assert bool((estimate.mean(0).abs() < 4 * estimate.std(0) / 20_000**0.5).all())


def test_rank_weights_are_those_of_the_spec():
    a = torch.log(torch.tensor(5.0, dtype=DTYPE)) - torch.log(torch.arange(1, 5, dtype=DTYPE))
    weights = nva.rank_weights(torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]], dtype=DTYPE), 4)
    torch.testing.assert_close(
        weights, (a / a.sum())[[3, 0, 2, 1]].new_tensor([*(a / a.sum())[[3, 0, 2, 1]], 0.0])[None]
    )


def test_precisions_stay_positive_and_weights_bounded_at_any_step_size():
    root = normal(50, 3, 3, seed=7)
    precision, direction = root @ root.mT + torch.eye(3), 100 * normal(50, 3, 3, seed=8)
    for rho in (1e-3, 1.0, 1e3):
        new = retract(precision, torch.linalg.inv(precision), direction + direction.mT, rho)
        assert float((torch.linalg.eigvalsh(new)[:, 0] / torch.linalg.eigvalsh(new)[:, -1]).min()) > -1e-14
    steep = nva.maximize(lambda x: 1e4 * x[:, 0], 2, 4, 20, 0, step_size=1e-3)
    assert float(steep.weights.sum()) == pytest.approx(1)
    assert float(steep.weights.max() / steep.weights.min()) <= math.exp(20) * (1 + 1e-9)


def test_stein_identities():
    """E f S d and E f (S d d^T S - S) are E grad f and E hess f: cos(a x) under a Gaussian, a million samples, 5e-3."""
    a, mean = torch.tensor([1.0, -0.5], dtype=DTYPE), torch.tensor([0.3, 0.7], dtype=DTYPE)
    factor = torch.tensor([[0.8, 0.0], [0.3, 0.6]], dtype=DTYPE)
    offsets = normal(1_000_000, 2, seed=9) @ factor.T
    values = torch.cos((mean + offsets) @ a)
    precision = torch.cholesky_inverse(factor)
    gradient, hessian = nva.stein(values[None] / len(values), offsets[None], precision[None])
    damped = math.exp(-0.5 * float((factor.T @ a).square().sum()))
    torch.testing.assert_close(gradient[0], -a * torch.sin(a @ mean) * damped, rtol=0, atol=5e-3)
    torch.testing.assert_close(hessian[0], -torch.outer(a, a) * torch.cos(a @ mean) * damped, rtol=0, atol=5e-3)


def test_replies_with_derivatives_are_exact_and_differentiate_once():
    calls = []

    def term(x):
        calls.append(len(x))
        return himmelblau(x)

    points = normal(3, 4, 2, seed=10)
    value, gradient, hessian = nva.reply(term, points, "hessian")
    assert calls == [12]
    flat = points.flatten(0, 1)
    single = [torch.func.hessian(lambda p: himmelblau(p[None])[0])(p) for p in flat]
    torch.testing.assert_close(hessian, torch.stack(single).view(3, 4, 2, 2).mean(1))
    torch.testing.assert_close(value, himmelblau(flat).view(3, 4).mean(1))
    slope = [torch.func.grad(lambda p: himmelblau(p[None])[0])(p) for p in flat]
    torch.testing.assert_close(gradient, torch.stack(slope).view(3, 4, 2).mean(1))
    linear = nva.reply(lambda x: x.sum(1), points, "hessian")
    assert float(linear[2].abs().max()) == 0


# -- federated search --------------------------------------------------------------------------------------------------

FIRST = lambda x: -((x[:, 0] ** 2 + x[:, 1] - 11) ** 2)  # noqa: E731 - a curve of maxima each
SECOND = lambda x: -((x[:, 0] + x[:, 1] ** 2 - 7) ** 2)  # noqa: E731


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("hessian", {"step_size": 0.01, "temperature": 100.0, "samples": 4}),
        ("stein", {"step_size": 1e-6}),
        ("fitness", {"step_size": 1e-3}),
    ],
)  # fmt: skip
def test_clients_with_terms_of_the_objective_find_what_one_machine_finds(estimator, options):
    ours = nva.maximize_federated([FIRST, SECOND], 2, 6, 60, 0, estimator, init_range=5.0, **options)
    central = nva.maximize(himmelblau, 2, 6, 60, 0, estimator, init_range=5.0, **options)
    torch.testing.assert_close(ours.means, central.means, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours.covariances, central.covariances, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours.weights, central.weights, rtol=1e-7, atol=1e-7)


def test_no_client_alone_knows_the_maxima_but_the_federation_finds_them():
    options = {"samples": 4, "step_size": 0.01, "temperature": 100.0, "init_range": 5.0}
    together = nva.maximize_federated([FIRST, SECOND], 2, 12, 200, 0, "hessian", **options)
    alone = nva.maximize(FIRST, 2, 12, 200, 0, "hessian", **options)
    assert hits(HIMMELBLAU, together.means) == 4
    assert hits(HIMMELBLAU, alone.means) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "rank"}, "fitness"),
        ({"samples": 3}, "parents"),
        ({"step_size": 0.0}, "step_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"log_density": lambda x: x}, "log_density"),
        ({"log_density": lambda x: x[:, 0].log()}, "values that are not finite"),
        ({"log_density": lambda x: (x[:, 0] * 0).sqrt(), "estimator": "hessian"}, "derivatives that are not finite"),
    ],
)
def test_errors(triangle, change, message):
    settings = {"log_density": triangle, "dim": 2, "num_components": 3, "num_steps": 5, "seed": 0}
    with pytest.raises(ValueError, match=message):
        nva.maximize(**settings | change)
