"""The network of pfl-research's CIFAR10 benchmark (``simple_cnn``), from its list of layers."""

from __future__ import annotations

from torch import Tensor, nn


class SimpleCNN(nn.Module):
    """Two 3x3 convolutions (32, 64 channels), 2x2 max-pooling, a hidden layer of 128: 1,626,442 parameters for 32x32x3.

    Args:
        input_shape: (height, width, channels): images come channels last.
        num_outputs: classes.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int):
        super().__init__()
        height, width, channels = input_shape
        features = 64 * ((height - 4) // 2) * ((width - 4) // 2)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(features, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, num_outputs),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_outputs) of images (B, height, width, channels)."""
        return self.layers(images.permute(0, 3, 1, 2))
