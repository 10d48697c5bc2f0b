"""Networks. Each is an ``nn.Module`` built from the data's shape: ``Model(input_shape, num_outputs, **options)``.

Inputs are (B, *input_shape) floats, outputs (B, num_outputs). All build under ``torch.device("meta")``.
"""

from bayesfed.problem.models.cnn import CNNAcar, CNNZenke
from bayesfed.problem.models.perceptron import MLP, Linear
from bayesfed.problem.models.resnet import ResNet20

__all__ = ["MLP", "CNNAcar", "CNNZenke", "Linear", "ResNet20"]
