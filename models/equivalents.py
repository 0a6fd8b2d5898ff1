"""Networks that compute what a ResNet8 computes, in another form."""

import copy

import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.resnet8 import ResNet8


def fold_batch_norm(model: ResNet8) -> ResNet8:
    """Return a float64 copy, for inference, whose convolutions do the work of the BatchNorms that follow.

    In eval mode a BatchNorm multiplies and adds constants for each channel; so do the weights and the bias of
    the convolution before it. Only the rounding differs.
    """
    model = copy.deepcopy(model).double().eval()  # so that the new weights are rounded once
    for block in list(model.modules()):
        for name, module in list(block.named_children()):
            if isinstance(module, nn.BatchNorm2d):
                conv = name.replace("bn", "conv")  # bn1 follows conv1, bn2 follows conv2
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), module))
                setattr(block, name, nn.Identity())
    return model


def turn(model: ResNet8, image_size: tuple[int, int] = (32, 32)) -> ResNet8:
    """Return a copy that takes images turned by 180 degrees, and whose padding is symmetric throughout.

    `turn(model)(images.flip(2, 3))` are the logits of `model(images)`; only the rounding differs. It is for
    compilers and accelerators that pad all sides alike. On an even size Keras pads a strided 3x3 convolution
    by (0, 1). With image and kernels turned that is (1, 0), and so is `padding=1`, whose far pixel no window
    reads. The strided 1x1 shortcut reads the pixels 0, 2, ...; turned, they are 1, 3, ...: the far ones of
    all 2x2 windows, so it becomes a 2x2 convolution whose three other weights are 0.

    `image_size` is the images' height and width. Raises ValueError unless both are multiples of 4, since both
    strided stages need an even size.
    """
    if any(side % 4 for side in image_size):
        height, width = image_size
        raise ValueError(f"images of {height} x {width} pixels: both must be multiples of 4 to be turned")
    turned = copy.deepcopy(model)
    for block in list(turned.modules()):
        for name, conv in list(block.named_children()):
            if isinstance(conv, nn.Conv2d):
                setattr(block, name, _turned_convolution(conv))
    return turned


def _turned_convolution(conv: nn.Conv2d) -> nn.Conv2d:
    weight = conv.weight.detach().flip(2, 3)
    if conv.kernel_size == (1, 1):
        weight = F.pad(weight, (1, 0, 1, 0))
    kernel = weight.shape[-1]
    turned = nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel, conv.stride, padding=1 if kernel == 3 else 0
    )
    turned.weight, turned.bias = nn.Parameter(weight), conv.bias
    return turned.train(conv.training)
