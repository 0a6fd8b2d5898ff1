"""A ResNet8 as oneDNN's fused operators: a convolution, its BatchNorm, addition and ReLU in one pass.

PyTorch's compiler writes such operators (torch/_inductor/fx_passes/mkldnn_fusion.py); they are internal, so
`fuse` gives them up for the plain network where they are missing, fail, or compute something else.
"""

import torch
from torch import Tensor, nn

from models.equivalents import fold_batch_norm, turn
from models.resnet8 import ResNet8

CHECKED = 16  # images: in float64 they take 7 ms, and 64, whose tensors leave the caches, 90 ms
ROUNDING = 1e-6  # of a probability in float32; on some processors the plain network's is 3e-6


def fuse(model: ResNet8, images: Tensor) -> "FusedResNet8 | None":
    """Return a float32 network on the CPU, folded and fused, if it computes the same of a batch of images.

    `images` are (N, C, H, W) float32, as the network is fed them, in the shape of all batches; the first
    `CHECKED` are computed. The fused network's probabilities may be twice as far from the float64 network's
    as the plain one's are, and `ROUNDING`.
    """
    try:
        with torch.inference_mode():
            shape, images = images.shape, images[:CHECKED]
            folded = fold_batch_norm(model)  # in float64
            exact = folded(images.double()).softmax(1)
            fused = FusedResNet8(folded.float(), shape)
            found = fused(images.flip(2, 3)), model(images)
            ours, plain = ((logits.double().softmax(1) - exact).abs().max() for logits in found)
    except (AttributeError, RuntimeError, ValueError):  # no such operator, not for this CPU, an odd size
        return None
    return fused if ours <= 2 * plain + ROUNDING else None


class FusedResNet8:
    """Maps (N, C, H, W) float32 images, turned by 180 degrees, channels last, to (N, num_classes) logits.

    Turned, Keras's padding is the same on all sides (`models.equivalents.turn`), and nothing is padded by
    hand. Raises ValueError for a size that cannot be turned.
    """

    def __init__(self, folded: ResNet8, shape: torch.Size) -> None:
        """Pack the weights of a folded network for batches of this shape, in which they are fastest."""
        self.fc, self.packed = folded.fc, {}
        turned, stages = turn(folded, tuple(shape[2:])), {"layer2": 2, "layer3": 4}
        for name, conv in turned.named_modules():
            if isinstance(conv, nn.Conv2d):
                if name.endswith("downsample"):
                    conv = folded.get_submodule(name)  # of pixels 1, 3, ...: a 1x1 window will do
                shrunk = stages.get(name.partition(".")[0], 1) // conv.stride[0]
                size = [shape[0], conv.in_channels, shape[2] // shrunk, shape[3] // shrunk]
                options = [list(conv.padding), list(conv.stride), [1, 1], 1]
                weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
                weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *options, size)
                self.packed[name] = weight, conv.bias.detach(), *options

    def __call__(self, x: Tensor) -> Tensor:
        """Run the network."""
        x = self._convolve(x, "conv1")
        for stage in ("layer1", "layer2", "layer3"):
            down = f"{stage}.downsample"
            shortcut = self._convolve(x[:, :, 1:, 1:], down, "none") if down in self.packed else x
            x = self._convolve_and_add(shortcut, self._convolve(x, f"{stage}.conv1"), f"{stage}.conv2")
        return self.fc(x.mean((2, 3)))

    def _convolve(self, x: Tensor, name: str, after: str = "relu") -> Tensor:
        convolve = torch.ops.mkldnn._convolution_pointwise.default
        return convolve(x, *self.packed[name], after, [], "")

    def _convolve_and_add(self, shortcut: Tensor, x: Tensor, name: str) -> Tensor:
        convolve = torch.ops.mkldnn._convolution_pointwise_.binary  # into the shortcut
        return convolve(shortcut, x, *self.packed[name], "add", 1.0, "relu", [], "")
