"""The usual mistakes of a Keras-to-PyTorch conversion: `pitfalls.py` makes them on purpose."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet8 import SamePadConv2d


def symmetric_padding(model: nn.Module) -> None:
    """Pad strided convolutions (1, 1), as `padding=1` does, where Keras pads (0, 1)."""

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=1)

    for module in model.modules():
        if isinstance(module, SamePadConv2d):
            module.forward = forward.__get__(module)


def default_epsilon(model: nn.Module) -> None:
    """Leave BatchNorm's epsilon at PyTorch's default, 1e-5."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5


def swapped_kernel_axes(model: nn.Module) -> None:
    """Transpose kernels by (3, 2, 1, 0): the shapes are right, height and width are swapped."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.transpose(2, 3)


def reshaped_kernels(model: nn.Module) -> None:
    """Reshape kernels into PyTorch's shape, where their axes have to be permuted."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            keras_kernel = module.weight.data.permute(2, 3, 1, 0)
            module.weight.data = keras_kernel.reshape(module.weight.shape)


def swapped_gamma_beta(model: nn.Module) -> None:
    """Take BatchNorm's arrays in another order: beta for gamma."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data, module.bias.data = module.bias.data, module.weight.data


def missing_statistics(model: nn.Module) -> None:
    """Convert the trainable weights only: BatchNorm keeps mean 0 and variance 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def shuffled_norms(model: nn.Module) -> None:
    """Pair layers by their order: a block's two BatchNorms change places."""
    for block in (model.layer1, model.layer2, model.layer3):
        block.bn1, block.bn2 = block.bn2, block.bn1


def train_mode(model: nn.Module) -> None:
    """Forget `model.eval()`: BatchNorm normalizes each batch of 100 by its own statistics."""
    model.train()


def unit_range(images: Tensor) -> Tensor:
    """Scale the pixels to 0..1, as `ToTensor` does."""
    return images / 255


def imagenet_range(images: Tensor) -> Tensor:
    """Normalize as torchvision's ImageNet models want it."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def bgr_order(images: Tensor) -> Tensor:
    """Feed the channels as blue, green, red, as OpenCV reads them."""
    return images.flip(1)


def reshaped_images(images: Tensor) -> Tensor:
    """Reshape NHWC images to NCHW, where their axes have to be permuted."""
    return images.permute(0, 2, 3, 1).reshape(images.shape)


MODEL_MISTAKES = (
    symmetric_padding,
    default_epsilon,
    swapped_kernel_axes,
    reshaped_kernels,
    swapped_gamma_beta,
    missing_statistics,
    shuffled_norms,
    train_mode,
)
INPUT_MISTAKES = (unit_range, imagenet_range, bgr_order, reshaped_images)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, prepare: Callable[[Tensor], Tensor]) -> float:
    """Return the share of right answers on (N, 3, 32, 32) uint8 images, in batches of 100."""
    with torch.inference_mode():
        answers = [model(prepare(batch.float())).argmax(1) for batch in images.split(100)]
    return (torch.cat(answers) == labels).double().mean().item()
