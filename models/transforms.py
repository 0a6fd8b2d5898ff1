"""Networks equivalent to a ResNet8: folded, with symmetric padding, of another class; its activations.

`model` is a `ResNet8`; this file works with any class of the same modules.
"""

import copy
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def layer_in_train_mode(network: nn.Module) -> str | None:
    """Return the name of the first BatchNorm or Dropout in train mode, which would change the outputs."""
    types = nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd
    layers = ((name, each) for name, each in network.named_modules() if isinstance(each, types))
    return next((name or "it" for name, each in layers if each.training and getattr(each, "p", 1)), None)


def layer_activations(model: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Capture intermediate activations with forward hooks.

    Returns every layer's output for (N, C, H, W) normalized `images`, by the names of GRAPH
    (`models/graph.py`), channels last as in Keras, in the dtype of `images`. Raises ValueError in train mode.
    """
    if layer := layer_in_train_mode(model):
        raise ValueError(f"{layer} is in train mode; call model.eval() first")
    activations: dict[str, np.ndarray] = {}

    def store(name: str, value: torch.Tensor) -> None:
        activations[name] = value.movedim(1, -1).numpy().copy()  # a copy: the addition works in place

    def hook(name: str, _: object, inputs: tuple, output: torch.Tensor) -> None:
        if not name.endswith(".relu"):
            store(name, output)
        elif f"{name}1" not in activations:  # a block calls its ReLU twice: after bn1 and after the addition
            store(f"{name}1", output)
        else:
            store(f"{name.removesuffix('relu')}add", inputs[0])
            store(f"{name}2", output)

    leaves = [  # and the blocks of a QuantizedResNet8, which have an output scale of their own
        (name, module)
        for name, module in model.named_modules()
        if not list(module.children()) or hasattr(module, "scale")
    ]
    handles = [module.register_forward_hook(partial(hook, name)) for name, module in leaves]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return activations


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the preceding convolution; return a float64 copy in eval mode.

    In eval mode a BatchNorm is a multiplication and an addition per channel, which the convolution's weight
    and bias can absorb. Only rounding differs.
    """
    model = copy.deepcopy(model).double().eval()  # float64: the new weights are rounded once
    for block in list(model.modules()):
        for name, module in list(block.named_children()):
            if isinstance(module, nn.BatchNorm2d):
                conv = name.replace("bn", "conv")  # bn1 follows conv1, bn2 follows conv2
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), module))
                setattr(block, name, nn.Identity())
    return model


def pad_symmetrically(model: nn.Module) -> nn.Module:
    """Return a copy whose strided 3x3 convolutions are 4x4 ones with symmetric padding, `padding=1`.

    Keras pads them by (0, 1) on an even size. A row and a column of zeros before the kernel read the first
    padded pixels. Equal up to rounding for image sizes that are multiples of 4. For compilers that only
    support symmetric padding; a 32 x 32 image takes 14,336,640 multiply-accumulates instead of 12,501,632.
    """
    padded = copy.deepcopy(model)
    for block in (padded.layer2, padded.layer3):
        block.conv1 = _kernel_4x4(block.conv1)
    return padded


def _kernel_4x4(conv: nn.Conv2d) -> nn.Conv2d:
    padded = nn.Conv2d(conv.in_channels, conv.out_channels, 4, 2, 1, bias=conv.bias is not None)
    padded.weight, padded.bias = nn.Parameter(F.pad(conv.weight.detach(), (1, 0, 1, 0))), conv.bias
    return padded.train(conv.training)


def transfer_weights(model: nn.Module, network: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """Give a ResNet8 of another class the weights of `model`; return it in eval mode, its outputs equal.

    `names` maps every layer with weights, from its name in `model` to the one in `network`. Three differences
    are absorbed, and then only rounding differs, for image sizes that are multiples of 4:

    - strided 3x3 convolutions with `padding=1` are replaced by 4x4 ones, as by `pad_symmetrically`
    - a convolution without bias: the bias goes into the running mean of the BatchNorm that follows it, or
      from a shortcut, which has none, into the bias of the block's second BatchNorm
    - another BatchNorm epsilon: the running variance changes by the difference

    Raises AttributeError for a layer that does not exist, and RuntimeError if a layer is missing in `names`
    or has another shape.
    """
    source = copy.deepcopy(model).double()
    for name, other in names.items():
        parent, _, last = name.rpartition(".")
        block, own = source.get_submodule(parent), source.get_submodule(name)
        layer = network.get_submodule(other)
        if isinstance(layer, nn.BatchNorm2d):
            own.running_var += own.eps - layer.eps
        elif layer.bias is None and last == "downsample":
            block.bn2.bias.data += own.bias.data
        elif layer.bias is None:
            block.get_submodule(last.replace("conv", "bn")).running_mean -= own.bias.data
        if getattr(layer, "padding", None) == (1, 1) and layer.stride == (2, 2):
            padded = _kernel_4x4(own)
            setattr(block, last, padded)
            padded = copy.deepcopy(padded).to(layer.weight)  # dtype and device
            padded.bias = layer.bias
            network.set_submodule(other, padded)
    state = {}
    for name, other in names.items():
        own = source.get_submodule(name).state_dict()
        state |= {f"{other}.{key}": own[key] for key in network.get_submodule(other).state_dict()}
    network.load_state_dict(state)
    return network.eval()


def rotate_180(model: nn.Module, image_size: tuple[int, int] = (32, 32)) -> nn.Module:
    """Return a copy for images rotated by 180 degrees, with symmetric padding in every layer.

    `rotate_180(model)(images.flip(2, 3))` equals `model(images)` up to rounding. Keras pads a strided 3x3
    convolution by (0, 1) on an even size. With image and kernels rotated this becomes (1, 0), which equals
    `padding=1`, since no window reaches the last padded pixel. The strided 1x1 shortcut reads pixels 0, 2,
    ...; rotated, these are the last pixels of all 2x2 windows, so it becomes a 2x2 convolution with three
    weights of 0.

    Raises ValueError unless `image_size` (height, width) is a multiple of 4 on both axes: both strided
    stages need an even size.
    """
    if any(side % 4 for side in image_size):
        raise ValueError(f"image size {image_size[0]} x {image_size[1]}: rotation needs multiples of 4")
    rotated = copy.deepcopy(model)
    for block in list(rotated.modules()):
        for name, conv in list(block.named_children()):
            if isinstance(conv, nn.Conv2d):
                setattr(block, name, _rotated_convolution(conv))
    return rotated


def _rotated_convolution(conv: nn.Conv2d) -> nn.Conv2d:
    weight = conv.weight.detach().flip(2, 3)
    if conv.kernel_size == (1, 1):
        weight = F.pad(weight, (1, 0, 1, 0))
    kernel = weight.shape[-1]
    rotated = nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel, conv.stride, padding=1 if kernel == 3 else 0
    )
    rotated.weight, rotated.bias = nn.Parameter(weight), conv.bias
    return rotated.train(conv.training)
