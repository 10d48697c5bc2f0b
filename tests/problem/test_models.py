import pytest
import torch

from bayesfed.errors import InputError
from bayesfed.problem.models import MLP, CNNAcar, CNNZenke, Linear, ResNet20

CIFAR = (3, 32, 32)
BUILD = {
    "linear": lambda: Linear((1, 8, 8), 10),
    "mlp": lambda: MLP((1, 28, 28), 10, hidden=[200, 100], activation="sigmoid"),
    "cnn_zenke": lambda: CNNZenke(CIFAR, 10),
    "cnn_acar": lambda: CNNAcar(CIFAR, 10),
    "resnet20": lambda: ResNet20(CIFAR, 100),
    "resnet20_frn": lambda: ResNet20(CIFAR, 100, norm="frn"),
}
SHAPES = {"linear": (1, 8, 8), "mlp": (1, 28, 28)}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("linear", 650), ("mlp", 178_110), ("cnn_zenke", 1_250_858), ("cnn_acar", 797_962), ("resnet20", 275_572)],
)
def test_parameter_counts_of_the_specification(name, parameters):
    with torch.device("meta"):
        assert count(BUILD[name]()) == parameters


def test_filter_response_norm_adds_one_threshold_per_channel():
    with torch.device("meta"):
        assert count(BUILD["resnet20_frn"]()) == 275_572 + 7 * 16 + 6 * 32 + 6 * 64


@pytest.mark.parametrize("name", BUILD)
def test_models_build_and_run_on_meta(name):
    with torch.device("meta"):
        model = BUILD[name]()
    x = torch.empty(2, *SHAPES.get(name, CIFAR), device="meta")
    assert model(x).shape == (2, 100 if "resnet" in name else 10)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", BUILD)
def test_parameters_are_the_whole_state(name):
    with torch.device("meta"):
        assert not list(BUILD[name]().buffers())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 30, 34)])
@pytest.mark.parametrize("model", [CNNZenke, CNNAcar, ResNet20])
def test_convolutional_models_fit_other_image_sizes(model, shape):
    assert model(shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


def test_smallest_images_that_are_accepted_run():
    assert CNNZenke((1, 10, 10), 3).eval()(torch.zeros(1, 1, 10, 10)).shape == (1, 3)
    assert CNNAcar((1, 16, 16), 3)(torch.zeros(1, 1, 16, 16)).shape == (1, 3)
    assert ResNet20((1, 8, 8), 3)(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize("norm", ["group", "frn"])
def test_an_example_does_not_see_the_others_of_its_batch(norm):
    model = ResNet20((1, 8, 8), 3, norm=norm).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-10, atol=1e-12)


def test_linear_is_linear():
    model = Linear((2, 2), 3, bias=False).double()
    x = torch.randn(5, 2, 2, dtype=torch.float64)
    assert torch.allclose(model(x), x.reshape(5, 4) @ model.layer.weight.T)
    assert count(Linear((4,), 3)) == 15
    assert count(model) == 12


def test_mlp_without_hidden_layers_is_linear():
    assert count(MLP((4,), 3, hidden=[])) == 15
    assert count(MLP((4,), 3, hidden=[2], bias=False)) == 14


def test_dropout_can_be_switched_off():
    model = CNNZenke((1, 12, 12), 2, dropout=False).train()
    x = torch.ones(1, 1, 12, 12)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("model", [CNNZenke, CNNAcar, ResNet20])
@pytest.mark.parametrize("shape", [(13,), (28, 28), (1, 7, 32)])
def test_convolutional_models_refuse_what_is_no_image(model, shape):
    with pytest.raises(InputError, match=r"model=\w+: needs images .*use model=mlp"):
        model(shape, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP((4,), 2, activation="rely"), "activation=rely: did you mean 'relu'"),
        (lambda: MLP((4,), 2, hidden=[8, 0]), "hidden=0: must be a whole number >= 1"),
        (lambda: MLP((4,), 2, hidden=64), "hidden=64: must be a list"),
        (lambda: Linear((4,), 2, bias="false"), "bias=false: must be true or false"),
        (lambda: CNNZenke(CIFAR, 2, dropout=0.5), "dropout=0.5: must be true or false"),
        (lambda: ResNet20(CIFAR, 2, norm="batch"), "norm=batch: .*valid: frn, group"),
    ],
)
def test_bad_options_are_named(build, message):
    with pytest.raises(InputError, match=message):
        build()
