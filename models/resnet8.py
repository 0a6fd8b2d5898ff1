"""ResNet8 for CIFAR-10 in PyTorch: the architecture.

    layer                      output (C x H x W)    parameters    multiply-accumulates
    conv1   3x3                16 x 32 x 32                448                 442,368
    bn1                        16 x 32 x 32            32 + 32
    layer1.conv1 3x3           16 x 32 x 32              2,320               2,359,296
    layer1.bn1                 16 x 32 x 32            32 + 32
    layer1.conv2 3x3           16 x 32 x 32              2,320               2,359,296
    layer1.bn2                 16 x 32 x 32            32 + 32
    layer2.conv1 3x3 /2        32 x 16 x 16              4,640               1,179,648
    layer2.bn1                 32 x 16 x 16            64 + 64
    layer2.conv2 3x3           32 x 16 x 16              9,248               2,359,296
    layer2.bn2                 32 x 16 x 16            64 + 64
    layer2.downsample 1x1 /2   32 x 16 x 16                544                 131,072
    layer3.conv1 3x3 /2        64 x  8 x  8             18,496               1,179,648
    layer3.bn1                 64 x  8 x  8          128 + 128
    layer3.conv2 3x3           64 x  8 x  8             36,928               2,359,296
    layer3.bn2                 64 x  8 x  8          128 + 128
    layer3.downsample 1x1 /2   64 x  8 x  8              2,112                 131,072
    avgpool                    64
    fc                         10                          650                     640
    total                                       78,186 + 480              12,501,632

Parameters are trainable + statistics (running mean and variance of BatchNorm): 78,666 in all, as counted by
Keras. The 3x3 convolutions have Keras's 'same' padding, every convolution has a bias, the shortcuts of stages
2 and 3 are 1x1 convolutions without BatchNorm, and a ReLU follows every BatchNorm except the second of a
block, where it follows the addition.

Sources: MLPerf Tiny's image classification reference (Banbury et al. 2021, arXiv:2106.07597; mlcommons/tiny,
benchmark/training/image_classification/keras_model.py, `resnet_v1_eembc`), after He et al. 2015
(arXiv:1512.03385). Module names are torchvision's (torchvision/models/resnet.py).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.fx.wrap  # one FX node: `max` cannot be traced with a symbolic size
def same_padding(size: int, kernel: int, stride: int) -> int:
    """Return the total 'same' padding of an axis, in pixels."""
    return max((size - 1) // stride * stride + kernel - size, 0)


class SamePadConv2d(nn.Conv2d):
    """A strided convolution with TensorFlow's 'same' padding: ceil(size / stride) outputs for every size.

    If the padding is odd, the extra pixel is at the bottom or right. An even size with kernel 3 and stride 2
    is padded by (0, 1); PyTorch's `padding=1` is (1, 1) and gives other outputs. Source:
    https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        height = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
        width = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
        x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution in a strided block."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, bn_eps: float, bn_momentum: float
    ) -> None:
        super().__init__()
        conv = SamePadConv2d(in_channels, channels, 3, stride) if stride > 1 else None
        self.conv1 = conv or nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels, bn_eps, bn_momentum)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels, bn_eps, bn_momentum)
        self.downsample = nn.Conv2d(in_channels, channels, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut  # in place, as in torchvision
        return self.relu(x)


class ResNet8(nn.Module):
    """ResNet8: (N, in_channels, H, W) images to (N, num_classes) logits.

    `width` is the number of filters of the first stage; the second has twice, the third four times as many.
    `bn_eps` and `bn_momentum` default to Keras's epsilon 1e-3 and momentum 0.99, which is 0.01 in PyTorch
    (https://keras.io/api/layers/normalization_layers/batch_normalization/).
    """

    def __init__(
        self,
        num_classes: int = 10,
        width: int = 16,
        in_channels: int = 3,
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width, bn_eps, bn_momentum)
        self.relu = nn.ReLU()
        self.layer1 = BasicBlock(width, width, 1, bn_eps, bn_momentum)
        self.layer2 = BasicBlock(width, 2 * width, 2, bn_eps, bn_momentum)
        self.layer3 = BasicBlock(2 * width, 4 * width, 2, bn_eps, bn_momentum)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) images to (N, num_classes) logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], bn_eps: float = 1e-3, bn_momentum: float = 0.01
    ) -> "ResNet8":
        """Build a network in eval mode from a state_dict; sizes are inferred from the shapes.

        Raises ValueError with one line if it is not one of a ResNet8.
        """
        try:
            num_classes = state["fc.weight"].shape[0]
            width, in_channels, *_ = state["conv1.weight"].shape
            with torch.device("meta"):  # allocates nothing: a file may have any width
                model = cls(num_classes, width, in_channels, bn_eps, bn_momentum)
            model.load_state_dict(state, assign=True)
        except KeyError as error:
            raise ValueError(f"not a ResNet8 state_dict: {error} is missing") from None
        except (RuntimeError, IndexError, ValueError) as error:
            reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:3]) or str(error)
            raise ValueError(f"not a ResNet8 state_dict: {reasons}") from None
        return model.eval()

    @classmethod
    def from_checkpoint(cls, path: str | Path, map_location: str | torch.device = "cpu") -> "ResNet8":
        """Load a checkpoint written by `convert.py`, in eval mode; sizes are inferred from its tensors.

        Requires the repository around this file. BatchNorm's epsilon and momentum, and the model's attribute
        `normalization` (`models/normalization.py`), are read from the JSON beside the checkpoint; defaults if
        missing. Runs no code from the file (`weights_only=True`). Raises OSError if a file cannot be read,
        ValueError with one line if it is not a ResNet8 state_dict.
        """
        from models.checkpoint import read_checkpoint  # everything else in this file depends only on torch

        checkpoint = read_checkpoint(Path(path), cls)
        if checkpoint.read_note:
            warnings.warn(checkpoint.read_note, stacklevel=2)
        return checkpoint.model.to(map_location)
