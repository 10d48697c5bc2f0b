"""Feature and concept shift: what sets a client's examples apart besides their labels and number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesfed.errors import InputError, integer, number, settings_of
from bayesfed.problem.inputs import Shape
from bayesfed.seeding import numpy_generator


@dataclass(frozen=True)
class Shift:
    """How much clients differ; every draw is keyed by the seed and the client (or its group).

    Args:
        rotation: images of a client are rotated by one angle from U(-rotation, rotation), degrees in [0, 180]; corners
            are 0.
        contrast: one factor about mid-range, log-uniform between 1/(1 + contrast) and 1 + contrast.
        brightness: one offset from U(-brightness, brightness), relative to the largest value, in [0, 1].
        colour: one gain per channel from U(1 - colour, 1 + colour), in [0, 1]; needs images with several channels.
        labels: share of the classes, in [0, 1], that a client permutes among each other (concept shift); at least two.
        groups: number of distinct draws, shared by clients at random and evenly; null = every client its own.

    Raises:
        InputError: a value out of range.
    """

    rotation: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    colour: float = 0.0
    labels: float = 0.0
    groups: int | None = None

    def __post_init__(self) -> None:
        number("shift.rotation", self.rotation, at_least=0, at_most=180)
        number("shift.contrast", self.contrast, at_least=0)
        for name in ("brightness", "colour", "labels"):
            number(f"shift.{name}", getattr(self, name), at_least=0, at_most=1)
        integer("shift.groups", self.groups, at_least=1, optional=True)

    @classmethod
    def of(cls, section: Mapping[str, Any] | None) -> Shift:
        """From the configuration; nothing there is no shift.

        Raises:
            InputError: an unknown key or a value out of range.
        """
        return cls(**settings_of(section, cls, "shift"))

    @property
    def on_features(self) -> bool:
        """Whether inputs change."""
        return any((self.rotation, self.contrast, self.brightness, self.colour))

    def draw(
        self, seed: int, clients: int, shape: Shape, num_classes: int | None, maximum: float
    ) -> list[ClientShift | None]:
        """What each client's examples go through; None where nothing changes.

        Args:
            seed: of the run.
            clients: K.
            shape: of one input.
            num_classes: C; None for a regression.
            maximum: largest value an input can hold.

        Raises:
            InputError: the data have no images, channels or classes to shift.
        """
        self._check(shape, num_classes)
        if not (self.on_features or self.labels):
            return [None] * clients
        variants = list(range(clients))
        if self.groups is not None:
            groups = [k % self.groups for k in range(clients)]
            variants = numpy_generator(seed, "shift", "groups").permutation(groups).tolist()
        drawn = {v: self._one(seed, v, shape, num_classes, maximum) for v in sorted(set(variants))}
        return [drawn[v] for v in variants]

    def _one(self, seed: int, variant: int, shape: Shape, num_classes: int | None, maximum: float) -> ClientShift:
        # a stream each: one shift leaves the others as they are
        def uniform(purpose: str, size: int | None = None) -> Any:
            return numpy_generator(seed, "shift", purpose, variant).uniform(-1.0, 1.0, size)

        gains = tuple((1 + self.colour * uniform("colour", shape[0])).tolist()) if self.colour else ()
        return ClientShift(
            variant=variant,
            angle=float(self.rotation * uniform("rotation")) + 0.0,
            contrast=math.exp(math.log1p(self.contrast) * uniform("contrast")),
            brightness=float(self.brightness * uniform("brightness")) + 0.0,  # no -0
            gains=gains,
            labels=_permutation(seed, variant, self.labels, num_classes),
            maximum=maximum,
        )

    def _check(self, shape: Shape, num_classes: int | None) -> None:
        for name in ("rotation", "contrast", "brightness", "colour"):
            if getattr(self, name) and (isinstance(shape, dict) or len(shape) != 3):
                raise InputError(f"shift.{name}", getattr(self, name), f"needs images, examples have shape {shape}")
        if self.colour and shape[0] < 2:
            fix = f"needs images with several channels, these have {shape[0]}; use shift.contrast or shift.brightness"
            raise InputError("shift.colour", self.colour, fix)
        if self.labels and num_classes is None:
            raise InputError("shift.labels", self.labels, "needs classes, this is a regression")


@dataclass(frozen=True, eq=False)
class ClientShift:
    """The shift of one client.

    Attributes:
        variant: number of the draw; clients of a group share it.
        angle: degrees, counter-clockwise.
        contrast: factor about mid-range.
        brightness: offset, relative to ``maximum``.
        gains: one per channel; empty for none.
        labels: (C,) label that examples of each class get; empty for no change.
        maximum: largest value an input can hold.
    """

    variant: int
    angle: float
    contrast: float
    brightness: float
    gains: tuple[float, ...]
    labels: tuple[int, ...]
    maximum: float
    _maps: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def inputs(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) as stored, in floating point, as this client sees them: a new tensor, or ``x`` itself."""
        if self.angle:
            x = self._rotated(x)
        if self.gains:
            x = x * torch.tensor(self.gains, dtype=x.dtype, device=x.device)[:, None, None]
        if self.contrast != 1.0 or self.brightness:
            middle = self.maximum / 2
            x = (x - middle) * self.contrast + (middle + self.brightness * self.maximum)
        return x if self.only_rotates else x.clamp_(0, self.maximum)

    def targets(self, y: Tensor) -> Tensor:
        """Labels (B,) as this client sees them."""
        return y if not self.labels else torch.tensor(self.labels, dtype=y.dtype, device=y.device)[y]

    @property
    def on_features(self) -> bool:
        """Whether inputs change."""
        return bool(self.angle) or not self.only_rotates

    @property
    def only_rotates(self) -> bool:
        """Whether values keep their range by themselves."""
        return not self.gains and self.contrast == 1.0 and not self.brightness

    def description(self) -> dict[str, Any]:
        """Plain values."""
        return {k: v for k, v in asdict(self).items() if not k.startswith("_")}

    def _rotated(self, x: Tensor) -> Tensor:
        """Bilinear rotation about the centre: a pixel is the weighted sum of four others, the same four in every
        image."""
        height, width = x.shape[-2:]
        key = (height, width, x.dtype, x.device)
        if key not in self._maps:
            index, weight = _rotation(height, width, self.angle)
            self._maps[key] = index.to(x.device), weight.to(device=x.device, dtype=x.dtype)
        index, weight = self._maps[key]
        flat = x.flatten(-2)
        turned = sum(flat[..., i] * w for i, w in zip(index, weight, strict=True))
        assert isinstance(turned, Tensor)
        return turned.view(x.shape)


def _rotation(height: int, width: int, degrees: float) -> tuple[Tensor, Tensor]:
    """Source pixels (4, H*W) of each pixel of the rotated image, and their weights, 0 outside of the image."""
    angle = math.radians(degrees)
    cos, sin = (round(f(angle), 12) for f in (math.cos, math.sin))  # exact for quarter turns
    row, column = np.mgrid[0:height, 0:width].astype(np.float64)
    dy, dx = row - (height - 1) / 2, column - (width - 1) / 2
    source_x = cos * dx - sin * dy + (width - 1) / 2
    source_y = sin * dx + cos * dy + (height - 1) / 2
    low_x, low_y = np.floor(source_x), np.floor(source_y)
    indices, weights = [], []
    for up in (0, 1):
        for right in (0, 1):
            x, y = low_x + right, low_y + up
            weight = (1 - np.abs(source_x - x)) * (1 - np.abs(source_y - y))
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            indices.append(np.where(inside, y * width + x, 0).astype(np.int64).ravel())
            weights.append(np.where(inside, weight, 0.0).ravel())
    return torch.from_numpy(np.stack(indices)), torch.from_numpy(np.stack(weights))


def _permutation(seed: int, variant: int, share: float, num_classes: int | None) -> tuple[int, ...]:
    """A share of the classes in a cycle; empty for none."""
    if not share or num_classes is None:
        return ()
    count = max(2, round(share * num_classes))
    cycle = numpy_generator(seed, "shift", "labels", variant).choice(num_classes, count, replace=False)
    labels = np.arange(num_classes)
    labels[cycle] = np.roll(cycle, 1)
    return tuple(labels.tolist())
