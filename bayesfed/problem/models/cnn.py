"""The two convolutional networks of the Bayes-ADMM experiments (arXiv 2506.13150)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bayesfed.errors import InputError
from bayesfed.problem.models.perceptron import check_bool, one_shape


class CNNZenke(nn.Module):
    """CifarNet of Zenke et al. (2017): 2x(conv3-32), pool, 2x(conv3-64), pool, fc512; dropout .25, .25, .5.

    The first convolution of each pair keeps the image size, the second does not pad: 1,250,858 parameters on
    3x32x32, 10 classes.

    Args:
        input_shape: (channels, height, width).
        num_outputs: columns of the output.
        dropout: whether dropout is on in training mode. It draws from torch's global generator: seed it at each step.
    """

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, dropout: bool = True):
        super().__init__()
        channels, height, width = image_shape(input_shape, "cnn_zenke", smallest=10)
        check_bool("dropout", dropout)
        rates = (0.25, 0.25, 0.5) if dropout else (0.0, 0.0, 0.0)
        rows, columns = (((side - 2) // 2 - 2) // 2 for side in (height, width))
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Dropout(rates[0])),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Dropout(rates[1])),
            *(nn.Flatten(), nn.Linear(64 * rows * columns, 512), nn.ReLU(), nn.Dropout(rates[2])),
            nn.Linear(512, num_outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class CNNAcar(nn.Module):
    """CNN of Acar et al. (FedDyn, 2021): 2x(conv5-64 unpadded, pool), fc384, fc192.

    797,962 parameters on 3x32x32, 10 classes.

    Args:
        input_shape: (channels, height, width).
        num_outputs: columns of the output.
    """

    def __init__(self, input_shape: Sequence[int], num_outputs: int):
        super().__init__()
        channels, height, width = image_shape(input_shape, "cnn_acar", smallest=16)
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * rows * columns, 384), nn.ReLU()),
            *(nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, num_outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def image_shape(input_shape: Sequence[int], model: str, smallest: int) -> tuple[int, int, int]:
    """``input_shape`` as (channels, height, width).

    Raises:
        InputError: if the examples are not images of at least ``smallest`` x ``smallest`` pixels.
    """
    shape = one_shape(input_shape, model)
    if len(shape) != 3 or min(shape[1:]) < smallest:
        fix = f"needs images (channels, height, width) of at least {smallest}x{smallest} pixels, "
        raise InputError("model", model, fix + f"the data's examples have shape {shape}; use model=mlp or model=linear")
    return shape
