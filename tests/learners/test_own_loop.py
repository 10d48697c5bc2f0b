"""The posterior optimizers in somebody's own training loop: what goes wrong there touches nothing, or is said."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesfed import accelerate
from bayesfed.errors import InputError
from bayesfed.seeding import torch_generator
from clients.noise import Noise
from clients.optim import IVON, LMD, SRVN

torch.set_num_threads(1)
X = torch.randn(64, 5, generator=torch_generator(1, "x"))
Y = X.sum(1, keepdim=True)
BAD = X.clone()
BAD[0, 0] = math.nan
INFINITE = X.clone()
INFINITE[0, 0] = math.inf  # the loss is finite, the gradient is not


def plain_ivon(params, **options) -> IVON:
    with accelerate.running("off"):
        return IVON(params, **options)


LEARNERS = {
    "ivon": lambda p, **o: IVON(p, **{"lr": 0.1, "ess": 64, "beta2": 0.99} | o),
    "ivon torch": lambda p, **o: plain_ivon(p, **{"lr": 0.1, "ess": 64, "beta2": 0.99} | o),
    "ivon scalar": lambda p, **o: IVON(p, **{"lr": 0.1, "ess": 64, "beta2": 0.99, "hess_structure": "scalar"} | o),
    "ivon antithetic": lambda p, **o: IVON(p, **{"lr": 0.1, "ess": 64, "beta2": 0.99, "antithetic": True} | o),
    "srvn": lambda p, **o: SRVN(p, **{"lr": 0.05, "ess": 64, "lr_covariance": 0.005, "beta1": 0.9} | o),
    "srvn full": lambda p, **o: SRVN(p, **{"lr": 0.05, "ess": 64, "lr_covariance": 0.005, "covariance": "full"} | o),
    "lmd": lambda p, **o: LMD(p, **{"lr": 0.02} | o),
    "lmd additive": lambda p, **o: LMD(p, **{"lr": 0.02, "multiplicative": False} | o),
}
# as on a GPU, but for SRVN, which reads numbers from the device in every step
CASES = [(name, deferred) for name in LEARNERS for deferred in (False, True) if not (deferred and "srvn" in name)]
every = pytest.mark.parametrize("name", LEARNERS)
one_each = pytest.mark.parametrize("name", ["ivon", "srvn", "lmd"])
pytestmark = pytest.mark.filterwarnings("ignore:.*dropped a sample")


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def build(name: str, model: nn.Module, **options):
    return LEARNERS[name](model.parameters(), generator=torch_generator(2, "noise"), **options)


def backward(model: nn.Module, x: Tensor = X, scale: float = 1.0) -> Tensor:
    loss = scale * (model(x) - Y).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer, steps: int = 1, x: Tensor = X, samples: int = 1) -> None:
    for _ in range(steps):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                backward(model, x)
        optimizer.step()


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def spread_of(optimizer) -> Tensor:
    """What the optimizer knows beside the mean."""
    if isinstance(optimizer, LMD):
        momenta = [g.momentum.flatten() for g in optimizer._groups]
        return torch.cat([*momenta, *(g.log_median.flatten() for g in optimizer._groups if hasattr(g, "log_median"))])
    momentum = optimizer._state._momentum if isinstance(optimizer, SRVN) else optimizer.momentum()[0]
    return torch.cat([optimizer.precision.flatten(), *([] if momentum is None else [momentum])])


def same(one, other) -> bool:
    return torch.equal(values(one[0]), values(other[0])) and torch.equal(spread_of(one[1]), spread_of(other[1]))


# -- a bad batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "deferred"), [case for case in CASES if case[0] != "ivon antithetic"])
@pytest.mark.parametrize("form", ["zero_grad", "continue", "step"])
def test_a_skipped_batch_leaves_no_trace(name, deferred, form):
    """In every form training goes on as if the bad batch had only drawn noise."""
    model, clean = network(), network()
    optimizer, reference = build(name, model), build(name, clean)
    optimizer._deferred = deferred
    if deferred:
        optimizer.native = False
    for i in range(4):
        with optimizer.sampled_params(train=True):
            loss = (model(BAD if i == 1 else X) - Y).square().mean()
            if form == "continue" and not loss.isfinite():
                continue
            loss.backward()
        if form == "zero_grad" and not loss.isfinite():
            optimizer.zero_grad()
            continue
        optimizer.step()
    train(clean, reference)
    with reference.sampled_params():
        pass
    train(clean, reference, 2)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if deferred else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(values(model), values(clean), **tolerance)
    torch.testing.assert_close(spread_of(optimizer), spread_of(reference), **tolerance)
    assert optimizer.refused == (1 if form == "step" else 0)


@pytest.mark.parametrize(("name", "deferred"), CASES)
@pytest.mark.parametrize("x", [BAD, INFINITE], ids=["nan", "infinite"])
def test_a_step_without_a_good_sample_changes_nothing(name, x, deferred):
    model = network()
    optimizer = build(name, model)
    optimizer._deferred = deferred
    for steps in (0, 2):
        train(model, optimizer, steps)
        before = values(model), spread_of(optimizer)
        train(model, optimizer, 1, x, samples=2)
        assert torch.equal(values(model), before[0])
        assert torch.equal(spread_of(optimizer), before[1])
    assert optimizer.refused == 4


@pytest.mark.parametrize(("name", "deferred"), [case for case in CASES if case[0] != "ivon antithetic"])
@pytest.mark.parametrize("order", [(0,), (1,), (0, 2)])
def test_the_good_samples_of_a_step_are_used(name, order, deferred):
    """A step with a refused sample is the step of the others alone."""
    model, clean = network(), network()
    optimizer, reference = (
        build("ivon torch" if name == "ivon" else name, model),
        build(name, clean),
    )
    optimizer._deferred = deferred
    for step in range(2):
        for i in range(len(order) + 2):
            bad = step == 1 and i in order
            with optimizer.sampled_params(train=True):
                backward(model, BAD if bad else X)
            with reference.sampled_params(train=not bad):
                None if bad else backward(clean)
        optimizer.step()
        reference.step()
    tolerance = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(values(model), values(clean), **tolerance)
    torch.testing.assert_close(spread_of(optimizer), spread_of(reference), **tolerance)


@one_each
def test_refused_samples_are_said_once_and_counted(name):
    model = network()
    optimizer = build(name, model)
    with pytest.warns(UserWarning, match="not finite") as said:
        train(model, optimizer, 3, BAD)
    assert len(said) == 1
    assert optimizer.refused == 3


def test_lmd_learns_after_a_bad_batch_and_in_the_plain_loop():
    model = network()
    optimizer = build("lmd", model)
    for i in range(301):
        optimizer.zero_grad()
        backward(model, BAD if i == 1 else X)
        optimizer.step()
    assert optimizer.refused == 1
    assert float((model(X) - Y).square().mean()) < 0.1


def test_exact_hessians_that_are_not_finite_are_refused():
    model = network()
    optimizer = build("srvn full", model, curvature="hessian", mc_samples=0)
    before = values(model), optimizer.factor.clone()
    optimizer.step(lambda: (model(BAD) - Y).square().mean())
    assert torch.equal(values(model), before[0])
    assert torch.equal(optimizer.factor, before[1])
    assert optimizer.refused == 1


@every
def test_zero_grad_between_blocks_drops_samples_and_in_closures_it_does_not(name):
    model, other = network(), network()
    optimizer, reference = build(name, model), build(name, other)
    with optimizer.sampled_params(train=True):
        backward(model, X * 3)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError):
        optimizer.step()
    with reference.sampled_params():
        pass
    optimizer.mc_samples = 2
    if name == "ivon antithetic":
        reference._groups[0].pair = optimizer._groups[0].pair

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    optimizer.step(closure)
    train(other, reference, samples=2)
    assert same((model, optimizer), (other, reference))


# -- mixed precision, clipping, accumulation ---------------------------------------------------------------------------


@every
@pytest.mark.parametrize("form", ["plain", "unscale in the block", "unscale after it"])
def test_grad_scaler_gives_the_steps_without_it(name, form):
    model, other = network(), network()
    optimizer, reference = build(name, model), build(name, other)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(4):
        x = BAD if i == 1 else X
        with optimizer.sampled_params(train=True):
            scaler.scale((model(x) - Y).square().mean()).backward()
            if "in" in form.split():
                scaler.unscale_(optimizer)
        if "after" in form.split():
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        train(other, reference, 1, x)
    assert scaler.get_scale() == 512.0  # it saw the bad batch
    assert same((model, optimizer), (other, reference))  # powers of two
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # infinite gradients are how the scaler finds its scale
        with optimizer.sampled_params(train=True):
            scaler.scale((model(BAD) - Y).square().mean()).backward()
        scaler.step(optimizer)


@every
def test_grad_scaler_with_several_samples(name):
    model, other = network(), network()
    optimizer, reference = build(name, model), build(name, other)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                scaler.scale((model(X) - Y).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    train(other, reference, 2, samples=3)
    assert same((model, optimizer), (other, reference))
    before = values(model)
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            scaler.scale((model(X) - Y).square().mean()).backward()
    scaler.unscale_(optimizer)  # reaches the last one only
    with pytest.raises(RuntimeError, match="last sample only"):
        scaler.step(optimizer)
    assert torch.equal(values(model), before)


@every
def test_clipping_after_the_block_is_clipping_in_it(name):
    models = network(), network()
    optimizers = [build(name, model) for model in models]
    for _ in range(2):
        for inside, model, optimizer in zip((True, False), models, optimizers, strict=True):
            with optimizer.sampled_params(train=True):
                backward(model)
                if inside:
                    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if not inside:
                assert torch.equal(nn.utils.clip_grad_norm_(model.parameters(), 0.1), norm)
            optimizer.step()
    assert float(norm) > 0.1
    assert same((models[0], optimizers[0]), (models[1], optimizers[1]))


@one_each
def test_several_backward_passes_in_a_block_add_up(name):
    model, other = network(), network()
    optimizer, reference = build(name, model), build(name, other)
    with optimizer.sampled_params(train=True):
        for part in (slice(0, 32), slice(32, 64)):
            (0.5 * (model(X[part]) - Y[part]).square().mean()).backward()
    optimizer.step()
    train(other, reference)
    torch.testing.assert_close(values(model), values(other), rtol=1e-5, atol=1e-6)


@one_each
@pytest.mark.parametrize("returned", [None, 1.5])
def test_closures_may_return_nothing(name, returned):
    model = network()
    optimizer = build(name, model, mc_samples=2)
    before = values(model)
    loss = optimizer.step(lambda: [backward(model), returned][1])
    assert loss is None if returned is None else float(loss) == returned
    assert not torch.equal(values(model), before)


# -- freezing ----------------------------------------------------------------------------------------------------------


@every
def test_frozen_parameters_keep_value_and_precision_and_have_no_noise(name):
    model = network()
    optimizer = build(name, model)
    train(model, optimizer, 3)
    model[0].requires_grad_(False)
    if name == "srvn full":
        with pytest.raises(RuntimeError, match="frozen"):
            train(model, optimizer)
        return
    first = values(model[0])
    known = spread_of(optimizer).clone()
    with optimizer.sampled_params():
        assert torch.equal(values(model[0]), first)
        assert name == "lmd additive" or not torch.equal(values(model[2]), values(network()[2]))
    train(model, optimizer, 3)
    train(model, optimizer, 2, samples=2)
    assert torch.equal(values(model[0]), first)
    after = spread_of(optimizer)
    size, total = first.numel(), values(model).numel()
    rows = after.numel() // total
    changed = (after != known)[: rows * total].view(rows, total)
    if name == "ivon scalar":  # one precision for all
        changed = changed[1:]
    assert not bool(changed[:, :size].any())
    assert bool(changed[:, size:].any(1).all())
    model[0].requires_grad_(True)
    train(model, optimizer)
    assert not torch.equal(values(model[0]), first)


@every
def test_a_parameter_frozen_at_construction_cannot_join_unsaid(name):
    model = network()
    model[0].requires_grad_(False)
    optimizer = build(name, model)
    first = values(model[0])
    train(model, optimizer, 2)
    assert torch.equal(values(model[0]), first)
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"number 0, of shape \(8, 5\), number 1, of shape \(8,\) requires"):
        train(model, optimizer)
    assert torch.equal(values(model[0]), first)


@pytest.mark.parametrize("name", ["ivon", "ivon torch", "ivon scalar", "lmd", "lmd additive"])
def test_groups_may_be_frozen_and_parameters_empty(name):
    model = network()
    model[0].requires_grad_(False)
    model.extra = nn.Parameter(torch.empty(0, 3))
    groups = [{"params": list(part.parameters())} for part in (model[0], model[2])]
    groups[1]["params"].append(model.extra)
    optimizer = LEARNERS[name](groups, generator=torch_generator(2, "noise"))
    before = values(model[0]), values(model[2])
    for samples in (1, 2):
        train(model, optimizer, 1, samples=samples)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(values(model[0]), before[0])
    assert not torch.equal(values(model[2]), before[1])
    assert optimizer.mean.numel() == 9
    with pytest.raises(InputError, match="trainable"):
        LEARNERS[name](model[0].parameters())


# -- copies and states -------------------------------------------------------------------------------------------------


def _through_file(pair):
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), _through_file])
def test_a_copy_goes_on_with_the_same_bits_and_on_its_own(name, way):
    model = network()
    optimizer = build(name, model)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)  # hangs a method of this optimizer on it
    train(model, optimizer, 3)
    other, copied = way((model, optimizer))
    assert same((model, optimizer), (other, copied))
    before = values(other)
    for samples in (1, 2):
        train(model, optimizer, 2, samples=samples)
    assert torch.equal(values(other), before)
    for samples in (1, 2):
        train(other, copied, 2, samples=samples)
    assert same((model, optimizer), (other, copied))
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match="outside"):
        way((model, optimizer))


@one_each
def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own(name):
    model = network()
    optimizer = build(name, model)
    train(model, optimizer, 2)
    before = values(model), optimizer.mean
    alone = copy.deepcopy(optimizer)
    with alone.sampled_params(train=True):
        sum(p.square().sum() for p in alone.param_groups[0]["params"]).backward()
    alone.step()
    assert torch.equal(values(model), before[0])
    assert torch.equal(optimizer.mean, before[1])
    assert not torch.equal(alone.mean, before[1])


@pytest.mark.parametrize(
    ("name", "other"), [(a, b) for a in LEARNERS for b in ("adam", "ivon", "srvn", "lmd") if not a.startswith(b)]
)
def test_states_of_other_optimizers_are_refused_before_anything_is_taken_over(name, other):
    model, source = network(), network()
    optimizer = build(name, model)
    foreign = torch.optim.Adam(source.parameters(), lr=7.0) if other == "adam" else build(other, source, lr=7.0)
    if other == "adam":
        backward(source)
        foreign.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    assert optimizer.param_groups[0]["lr"] != 7.0
    assert str(optimizer.state_dict()) == str(before)


def test_lmd_refuses_the_state_of_other_parameters_or_kinds():
    model = network()
    optimizer = build("lmd", model, lr=0.03)
    for state in (build("lmd", nn.Linear(2, 2)), build("lmd additive", network())):
        with pytest.raises(ValueError, match="other parameters or kinds"):
            optimizer.load_state_dict(state.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize("name", ["ivon", "srvn"])
def test_distributed_checkpoints_say_what_to_do(name):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = network()
    optimizer = build(name, model)
    train(model, optimizer)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"save optimizer\.state_dict"):
        get_optimizer_state_dict(model, optimizer)
    assert torch.equal(values(model), before)


# -- settings that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["diagonal", "scalar"])
def test_weight_decay_can_be_scheduled(structure):
    """As if built with it: h stays, delta is the new one."""
    results = []
    for later in (True, False):
        model = network()
        optimizer = build(
            "ivon", model, weight_decay=10.0 if later else 0.5, hess_structure=structure, rescale_lr=False
        )
        h = optimizer.hess
        optimizer.param_groups[0]["weight_decay"] = 0.5
        torch.testing.assert_close(optimizer.precision, 64 * (h + 0.5))
        torch.testing.assert_close(optimizer.hess, h)
        train(model, optimizer, 20)
        results.append((values(model), optimizer.precision))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_a_prior_precision_stays_when_ess_changes():
    model = network()
    optimizer = build("ivon", model, prior_precision=4.0)
    h = optimizer.hess
    optimizer.param_groups[0]["ess"] = 128
    torch.testing.assert_close(optimizer.precision, 128 * h + 4.0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    with pytest.raises(InputError, match="prior_precision"):
        train(model, optimizer)


def test_weight_decay_after_a_restored_state():
    model = network()
    optimizer = build("ivon", model, weight_decay=0.5)
    optimizer.load_state_dict(copy.deepcopy(build("ivon", network(), weight_decay=0.25).state_dict()))
    h = optimizer.hess
    optimizer.param_groups[0]["weight_decay"] = 1.0
    torch.testing.assert_close(optimizer.precision, 64 * (h + 1.0))


def test_sigma_of_lmd_can_be_scheduled():
    model = network()
    optimizer = build("lmd", model, sigma=0.5)
    median = optimizer.log_median.exp()
    optimizer.param_groups[0]["sigma"] = 0.1
    torch.testing.assert_close(optimizer.mean, (median[0] - median[1]) * math.exp(0.005))
    torch.testing.assert_close(values(model), optimizer.mean)
    optimizer.param_groups[0]["multiplicative"] = False
    with pytest.raises(InputError, match="multiplicative"):
        train(model, optimizer)


@pytest.mark.parametrize("weights", ["mean", "median"])
@pytest.mark.parametrize("edit", ["load", "in place", "data", "replaced"])
def test_lmd_takes_over_weights_that_are_loaded_or_edited(edit, weights):
    model, other = network(), network()
    optimizer = build("lmd", model, weights=weights)
    train(model, optimizer, 2)
    untouched = optimizer.log_median[:, 48:]
    new = torch.randn(8, 5, generator=torch_generator(3, "new"))
    if edit == "load":
        other.load_state_dict(model.state_dict())
        other[0].weight.data = new
        model.load_state_dict(other.state_dict())
    elif edit == "in place":
        with torch.no_grad():
            model[0].weight.copy_(new)
    elif edit == "data":
        model[0].weight.data.copy_(new)
    else:
        model[0].weight.data = new.clone()
    torch.testing.assert_close(optimizer.mean[:40], new.flatten())
    assert torch.equal(optimizer.log_median[:, 48:], untouched)
    train(model, optimizer, 1)
    assert float((model[0].weight - new).abs().max()) < 0.1


@every
def test_weights_replaced_between_block_and_step_are_those_that_step(name):
    model, other = network(), network()
    optimizer, twin = build(name, model), build(name, other)
    for network_, optimizer_ in ((model, optimizer), (other, twin)):
        with optimizer_.sampled_params(train=True):
            backward(network_)
    new = torch.randn(8, 5, generator=torch_generator(3, "new"))
    model[0].weight.data = new.clone()
    other[0].weight.data.copy_(new)  # in place
    torch.testing.assert_close(optimizer.mean[:40], new.flatten())
    model[0].weight.data = new.clone()  # again: nobody asks for the mean before the step
    optimizer.step(), twin.step()
    assert float((model[0].weight - new).abs().max()) < 0.2
    torch.testing.assert_close(optimizer.mean[:40], model[0].weight.detach().flatten())
    if not name.startswith("lmd") or name == "lmd additive":
        assert torch.equal(optimizer.mean, twin.mean)
    with optimizer.sampled_params():
        before = model[0].weight.clone()
        mean = optimizer.mean
        assert torch.equal(model[0].weight, before)  # a sample is nobody's edit
    assert torch.equal(optimizer.mean, mean)


@one_each
def test_a_copy_of_the_optimizer_alone_says_so(name):
    model = network()
    optimizer = copy.deepcopy(build(name, model))
    with optimizer.sampled_params(train=True):
        backward(model)
    with pytest.raises(RuntimeError, match=r"no parameter got a gradient.*copy model and optimizer together"):
        optimizer.step()


@one_each
def test_numbers_of_numpy_and_torch(name):
    model, other = network(), network()
    typed = {"lr": torch.tensor(0.0625), "mc_samples": np.int64(2)} | ({} if name == "lmd" else {"ess": np.int64(64)})
    plain = {"lr": 0.0625, "mc_samples": 2} | ({} if name == "lmd" else {"ess": 64})
    optimizer, reference = build(name, model, **typed), build(name, other, **plain)
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert type(optimizer.mc_samples) is int
    optimizer.step(lambda: backward(model))
    reference.step(lambda: backward(other))
    assert same((model, optimizer), (other, reference))


# -- modes and memory --------------------------------------------------------------------------------------------------


@every
def test_evaluation_under_inference_mode_comes_first(name):
    model, other = network(), network()
    optimizer, reference = build(name, model), build(name, other)
    with torch.inference_mode(), optimizer.sampled_params():
        model(X)
    with reference.sampled_params(), torch.no_grad():
        other(X)
    train(model, optimizer, 1)
    with optimizer.sampled_params(train=True):
        backward(model)
    with torch.inference_mode(), optimizer.sampled_params():  # collects the sample before
        model(X)
    with optimizer.sampled_params(train=True):
        backward(model)
    optimizer.step()
    train(other, reference, 1)
    with reference.sampled_params(train=True):
        backward(other)
    with reference.sampled_params():
        pass
    with reference.sampled_params(train=True):
        backward(other)
    reference.step()
    assert same((model, optimizer), (other, reference))


def test_the_noise_of_another_mode():
    noise = Noise("quantile", torch_generator(1, "noise"))
    with torch.inference_mode():
        noise.fill(torch.empty(9))
        noise.fill(torch.empty(10))
    out = noise.fill(torch.empty(10))
    again = torch_generator(1, "noise")
    other = Noise("quantile", again)
    other.fill(torch.empty(9)), other.fill(torch.empty(10))
    assert torch.equal(out, other.fill(torch.empty(10)))


@one_each
def test_channels_last_weights_are_refused(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(memory_format=torch.channels_last)
    with pytest.raises(InputError, match="channels_last"):
        build(name, model)
    build(name, model.to(memory_format=torch.contiguous_format))


# -- several processes -------------------------------------------------------------------------------------------------


def _curvature(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, float] = {}
    x = torch.tensor([[1.0], [2.0]])
    for form in ("bare", "no_sync", "wrapped"):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = IVON(
            model.parameters(), lr=0.01, ess=50.0, beta2=0.98, sync=True, generator=torch_generator(rank, form)
        )
        try:
            tail = []
            for step in range(300):
                with optimizer.sampled_params(train=True):
                    if form == "no_sync":
                        with wrapped.no_sync():
                            (3 * (wrapped(x) - x).square()).mean().backward()
                    else:
                        (3 * ((wrapped if form == "wrapped" else model)(x) - x).square()).mean().backward()
                optimizer.step()
                if step >= 100:
                    tail.append(float(optimizer.hess))
            found[form] = sum(tail) / len(tail)
        except RuntimeError as error:
            found[form] = float("averaged over the ranks already" in str(error))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_curvature_of_two_ranks(tmp_path: Path):
    """The Hessian of the mean loss is 15; gradients that DDP has averaged would give half of it."""
    torch.multiprocessing.start_processes(_curvature, args=(str(tmp_path),), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == other
    assert one["bare"] == pytest.approx(15, rel=0.2)
    assert one["no_sync"] == pytest.approx(15, rel=0.2)
    assert one["wrapped"] == 1.0
