"""Test accuracy after each usual mistake of a Keras-to-PyTorch conversion.

    python -m tests.benchmarks.pitfalls CHECKPOINT.pt [--data-dir DIR]

Each row undoes one thing that `convert.py` and `models/resnet8.py` get right. A mistake is a function that
changes the model, or one that returns the images in another form; its docstring is the row's name.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.cifar10 import DataError, load_test
from models.common.cli import print_error
from models.resnet8 import ResNet8, SamePadConv2d


def layers(model: nn.Module, kind: type) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, kind))


def symmetric_padding(model: nn.Module) -> None:
    """strided convolutions padded (1, 1), as `padding=1` does, where Keras pads (0, 1)"""

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=1)

    for module in layers(model, SamePadConv2d):
        module.forward = forward.__get__(module)


def default_epsilon(model: nn.Module) -> None:
    """BatchNorm's epsilon left at PyTorch's 1e-5 (Keras: 1e-3)"""
    for module in layers(model, nn.BatchNorm2d):
        module.eps = 1e-5


def swapped_kernel_axes(model: nn.Module) -> None:
    """kernels transposed by (3, 2, 1, 0): right shape, height and width swapped"""
    for module in layers(model, nn.Conv2d):
        module.weight.data = module.weight.data.transpose(2, 3)


def reshaped_kernels(model: nn.Module) -> None:
    """kernels reshaped instead of transposed"""
    for module in layers(model, nn.Conv2d):
        module.weight.data = module.weight.data.permute(2, 3, 1, 0).reshape(module.weight.shape)


def swapped_gamma_beta(model: nn.Module) -> None:
    """BatchNorm's gamma and beta swapped"""
    for module in layers(model, nn.BatchNorm2d):
        module.weight.data, module.bias.data = module.bias.data, module.weight.data


def missing_statistics(model: nn.Module) -> None:
    """trainable weights only, BatchNorm's statistics left at 0 and 1"""
    for module in layers(model, nn.BatchNorm2d):
        module.reset_running_stats()


def shuffled_norms(model: nn.Module) -> None:
    """a block's two BatchNorms swapped, as pairing by order can do"""
    for block in (model.layer1, model.layer2, model.layer3):
        block.bn1, block.bn2 = block.bn2, block.bn1


def unit_range(images: Tensor) -> Tensor:
    """pixels scaled to 0..1, as `ToTensor` does"""
    return images / 255


def imagenet_range(images: Tensor) -> Tensor:
    """ImageNet's mean and standard deviation"""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def bgr_order(images: Tensor) -> Tensor:
    """channels as blue, green, red"""
    return images.flip(1)


def reshaped_images(images: Tensor) -> Tensor:
    """images reshaped from NHWC instead of transposed"""
    return images.permute(0, 2, 3, 1).reshape(images.shape)


def train_mode(model: nn.Module) -> None:
    """`eval()` forgotten: statistics of each batch of 100"""
    model.train()


MODEL_MISTAKES = [symmetric_padding, default_epsilon, swapped_kernel_axes, reshaped_kernels]
MODEL_MISTAKES += [swapped_gamma_beta, missing_statistics, shuffled_norms]
INPUT_MISTAKES = [unit_range, imagenet_range, bgr_order, reshaped_images]


def accuracies(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the name of each mistake, "none" first, and its accuracy on (N, 3, 32, 32) uint8 images."""

    def accuracy(model: nn.Module, prepare: Callable[[Tensor], Tensor]) -> float:
        with torch.inference_mode():
            classes = [model(prepare(batch.float())).argmax(1) for batch in images.split(100)]
        return (torch.cat(classes) == labels).double().mean().item()

    def after(mistake: Callable) -> tuple[str, float]:
        if mistake in INPUT_MISTAKES:
            return mistake.__doc__, accuracy(model, mistake)
        wrong = copy.deepcopy(model)
        mistake(wrong)
        return mistake.__doc__, accuracy(wrong, lambda batch: batch)

    yield "none", accuracy(model, lambda batch: batch)
    yield from map(after, [*MODEL_MISTAKES, *INPUT_MISTAKES, train_mode])


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-10 (data)")
    options = parser.parse_args()
    try:
        data, model = load_test(options.data_dir), ResNet8.from_checkpoint(options.checkpoint)
        if not model.normalization.is_identity:
            raise ValueError(f"{options.checkpoint}: normalizes its input; expected a model of raw pixels")
    except (DataError, ValueError, OSError) as error:
        print_error(str(error))
        return 1
    print(f"| mistake | accuracy on {data.name} |\n|---|---|")
    for name, accuracy in accuracies(model, torch.from_numpy(data.images), torch.from_numpy(data.labels)):
        print(f"| {name} | {accuracy:.2%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
