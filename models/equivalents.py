"""Networks that compute what a ResNet8 computes, in another form."""

import copy

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
