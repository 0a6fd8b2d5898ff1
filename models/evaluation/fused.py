"""ResNet8 with oneDNN's fused operators: convolution, BatchNorm, addition and ReLU in one pass.

PyTorch's compiler uses these operators (torch/_inductor/fx_passes/mkldnn_fusion.py). They are internal, so
`fuse` returns None where they are missing, fail, or differ from the plain network.
"""

import torch
from torch import Tensor, nn

from models.resnet8 import ResNet8
from models.transforms import fold_batch_norm, rotate_180

CHECKED = 16  # images: in float64 they take 7 ms, and 64, whose tensors leave the caches, 90 ms
ROUNDING = 1e-6  # of a probability in float32; on some processors the plain network's is 3e-6


def fuse(model: ResNet8, images: Tensor) -> "FusedResNet8 | None":
    """Return a fused float32 network for the CPU, or None if it is not as exact.

    `images` is a batch of normalized (N, C, H, W) float32 images, in the shape of all later batches; the
    first `CHECKED` are compared. The fused network's probabilities may differ from the float64 network's by
    twice the plain network's largest difference, plus `ROUNDING`.
    """
    try:
        with torch.inference_mode():
            shape, images = images.shape, images[:CHECKED]
            folded = fold_batch_norm(model)  # in float64
            exact = folded(images.double()).softmax(1)
            fused = FusedResNet8(folded.float(), shape)
            outputs = fused(images.flip(2, 3)), model(images)
            error, plain_error = ((logits.double().softmax(1) - exact).abs().max() for logits in outputs)
    except (AttributeError, RuntimeError, ValueError):  # no such operator, not for this CPU, an odd size
        return None
    return fused if error <= 2 * plain_error + ROUNDING else None


class FusedResNet8:
    """Map (N, C, H, W) float32 images, rotated and channels-last, to (N, num_classes) logits.

    Rotated by 180 degrees the padding is symmetric (`models.transforms.rotate_180`): no padded copy is made.
    """

    def __init__(self, folded: ResNet8, shape: torch.Size) -> None:
        """Pack the weights into the layout that is fastest for batches of `shape`.

        Raises ValueError unless the image size is a multiple of 4.
        """
        self.fc, self.packed = folded.fc, {}
        rotated, scales = rotate_180(folded, tuple(shape[2:])), {"layer2": 2, "layer3": 4}
        for name, conv in rotated.named_modules():
            if isinstance(conv, nn.Conv2d):
                if name.endswith("downsample"):
                    conv = folded.get_submodule(name)  # 1x1 at pixels 1, 3, ... instead of padded 2x2
                scale = scales.get(name.partition(".")[0], 1) // conv.stride[0]
                size = [shape[0], conv.in_channels, shape[2] // scale, shape[3] // scale]
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
