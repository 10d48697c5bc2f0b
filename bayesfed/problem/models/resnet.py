"""ResNet-20 for small images, without batch statistics: its parameters are its whole state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesfed.errors import choice
from bayesfed.problem.models.cnn import image_shape


class FilterResponseNorm(nn.Module):
    """``gamma x / sqrt(mean over pixels of x^2 + eps) + beta`` per channel (Singh and Krishnan, 2020).

    Args:
        channels: C of inputs (B, C, H, W).
        eps: keeps the division finite.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        power = x.square().mean(dim=(2, 3), keepdim=True)
        return self.gamma * x * torch.rsqrt(power + self.eps) + self.beta


class ThresholdedLinearUnit(nn.Module):
    """``max(x, threshold)`` with a learned threshold per channel: the activation that filter response norm needs."""

    def __init__(self, channels: int):
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.threshold)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def _relu(channels: int) -> nn.Module:
    return nn.ReLU()


NORMS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "group": (_group_norm, _relu),
    "frn": (FilterResponseNorm, ThresholdedLinearUnit),
}


class _Block(nn.Module):
    """Two 3x3 convolutions; the shortcut (option A) subsamples and pads with zero channels, so it has no parameters."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: str):
        super().__init__()
        normalise, activate = NORMS[norm]
        self.stride, self.extra = stride, fan_out - fan_in
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.norm1, self.act1 = normalise(fan_out), activate(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2, self.act2 = normalise(fan_out), activate(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return self.act2(y + x)


class ResNet20(nn.Module):
    """ResNet-20 of He et al. (2016), widths 16, 32, 64 with three blocks each.

    275,572 parameters on 3 channels, 100 classes with ``norm=group``.

    Args:
        input_shape: (channels, height, width).
        num_outputs: columns of the output.
        norm: ``group`` (GroupNorm with 2 groups, ReLU) or ``frn`` (filter response norm, thresholded linear unit).

    Raises:
        InputError: on an unknown norm or on data that are not images.
    """

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, norm: str = "group"):
        super().__init__()
        choice("norm", norm, NORMS)
        channels, _, _ = image_shape(input_shape, "resnet20", smallest=8)
        normalise, activate = NORMS[norm]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False),
            *(normalise(16), activate(16)),
        )
        blocks, fan_in = [], 16
        for width in (16, 32, 64):
            for position in range(3):
                blocks.append(_Block(fan_in, width, 2 if position == 0 and width > 16 else 1, norm))
                fan_in = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
