"""LMD as a ``torch.optim.Optimizer``: loops, checkpoints, options, errors."""

import pytest
import torch

from bayesfed.errors import InputError
from clients.optim import LMD

F64 = {"dtype": torch.float64}


def leaf(*values):
    return torch.tensor(values, **F64).requires_grad_()


def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))


def xor(n=400):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(5))
    return x, (x[:, 0] * x[:, 1] > 0).long()


@pytest.mark.parametrize("loop", ["samples", "closure", "plain", "unsigned", "groups"])
def test_learns_in_every_kind_of_loop(loop):
    model, (x, y) = mlp(), xor()
    options = {"lr": 0.03, "generator": torch.Generator().manual_seed(0)}
    if loop == "unsigned":
        options |= {"signed": False, "lr": 10.0, "beta2": 0.9, "decay": 1e-4}
    params = model.parameters()
    if loop == "groups":
        biases = [p for n, p in model.named_parameters() if "bias" in n]
        params = [{"params": [p for n, p in model.named_parameters() if "weight" in n]}]
        params.append({"params": biases, "multiplicative": False, "lr": 0.01, "decay": 0.0})
    optimizer = LMD(params, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    start = torch.nn.functional.cross_entropy(model(x), y).item()
    for _ in range(300):
        if loop == "plain":
            closure()
            optimizer.step()
        elif loop == "closure":
            optimizer.step(closure)
        else:
            with optimizer.sampled_params(train=True):
                closure()
            optimizer.step()
        scheduler.step()
    assert start > 0.6
    assert torch.nn.functional.cross_entropy(model(x), y).item() < 0.25


def test_samples_average_and_the_closure_is_the_context():
    """Two samples by hand, by closure, and their average gradient."""
    results = []
    for by_closure in (True, False):
        p = leaf(0.3, -0.2)
        optimizer = LMD([p], lr=0.05, signed=False, mc_samples=2, generator=torch.Generator().manual_seed(7))

        def loss(p=p):
            value = (p - 1).pow(4).sum()
            value.backward()
            return value

        if by_closure:
            optimizer.step(loss)
        else:
            for _ in range(2):
                with optimizer.sampled_params(train=True):
                    loss()
            optimizer.step()
        results.append(optimizer.log_median)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_with_the_same_bits(dtype, tmp_path):
    def train(model, optimizer, steps):
        x, y = xor(50)
        for _ in range(steps):
            with optimizer.sampled_params(train=True):
                torch.nn.functional.cross_entropy(model(x.to(dtype)).float(), y).backward()
            optimizer.step()

    def fresh():
        model = mlp().to(dtype)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "sigma": 0.3}]
        return model, LMD(groups, generator=torch.Generator().manual_seed(1))

    model, optimizer = fresh()
    train(model, optimizer, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "both.pt")
    train(model, optimizer, 5)
    other, restored = fresh()
    saved = torch.load(tmp_path / "both.pt")
    other.load_state_dict(saved["model"])
    restored.load_state_dict(saved["optimizer"])
    train(other, restored, 5)
    assert restored.log_median.dtype == torch.float32
    assert torch.equal(optimizer.log_median, restored.log_median)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_median_weights():
    p = leaf(0.3, -0.2)
    optimizer = LMD([p], sigma=0.5, weights="median", offset=0.1)
    m = optimizer.log_median.exp()
    torch.testing.assert_close(p.detach(), m[0] - m[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(optimizer.mean, torch.tensor([0.3, -0.2], **F64), rtol=1e-12, atol=0)


def test_exceptions_leave_the_mean():
    p = leaf(0.3, -0.2)
    optimizer = LMD([p])
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
        raise ZeroDivisionError
    assert torch.equal(p.detach(), optimizer.mean)
    with pytest.raises(RuntimeError, match="no parameter got a gradient"):
        optimizer.step()
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match="nested"), optimizer.sampled_params():
        pass


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": -1.0}, "lr"),
        ({"sigma": -0.1}, "sigma"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 1.0}, "beta2"),
        ({"decay": -0.1}, "decay"),
        ({"regulariser": "l3"}, "regulariser"),
        ({"offset": 0.0}, "offset"),
        ({"temperature": 1.0, "regulariser": "lognormal"}, "temperature"),
        ({"mc_samples": 0}, "mc_samples"),
        ({"weights": "mode"}, "weights"),
        ({"prior_precision": 1.0}, "prior_log_median"),
        ({"site_linear": torch.zeros(4)}, "site_linear"),
    ],
)
def test_errors_name_the_argument(options, field):
    with pytest.raises(InputError) as error:
        LMD([leaf(1.0, 2.0)], **options)
    assert error.value.field == field


def test_posterior_needs_one_sigma():
    a, b = leaf(1.0, 2.0), leaf(3.0)
    optimizer = LMD([{"params": [a]}, {"params": [b], "sigma": 0.2}])
    with pytest.raises(ValueError, match="one sigma"):
        _ = optimizer.posterior
