"""ResNet8 in int8: the integer arithmetic of TensorFlow Lite's reference kernels, byte for byte.

    module             operator         formula                             source, in lite/kernels/internal
    quantize           QUANTIZE         a * (A / Y)                         reference/requantize.h
    convolutions       CONV_2D          (bias + sum(a * w)) * (A * W / Y)   reference/integer_ops/conv.h
    layer1 to layer3   ADD              (a' + b') * (t / (2**20 * Y))       reference/add.h
    avgpool            AVERAGE_POOL_2D  sum(a) / count, zero points kept    reference/integer_ops/pooling.h
                       or MEAN          sum(a) * (A / Y) / count            reference/reduce.h
    fc                 FULLY_CONNECTED  as CONV_2D                          .../fully_connected.h
    softmax, optional  SOFTMAX          in float32; TFLM: fixed point       ../activations.cc; .../softmax.h

TFLM: TensorFlow Lite for Microcontrollers. a, b, w are int8 inputs and weights minus zero points; A, B, W, Y
the float32 scales of inputs, weights (per channel), output; a' = 2**20 * a * (A / t), t = 2 * max(A, B).
Factors in parentheses are float64, rounded to multiplier * 2**(shift - 31) (`QuantizeMultiplier`,
quantization_util.cc). A product is rounded twice (`MultiplyByQuantizedMultiplier`, common.h): divided by
2**31, ties up, then by 2**-shift, ties away from 0 (as AVERAGE_POOL_2D's mean); in LiteRT's FULLY_CONNECTED
once, ties up. Then the zero point is added and the result clamped. Sums are exact in any order: at width 16
below 2**25; float64 is exact to 2**53, and float32, used where a layer's bound allows it, to 2**24.
"""

import torch
from torch import Tensor, nn


def fixed_point(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int64 multipliers and shifts of float64 factors."""
    mantissa, shift = torch.frexp(factor)
    multiplier = torch.floor(mantissa * 2**31 + 0.5).long()
    return multiplier >> (multiplier >> 31), shift + (multiplier >> 31)  # if rounded up to 2**31


def high_product(a: Tensor, b: Tensor | int) -> Tensor:
    """Return int64 a * b / 2**31, halves up (`SaturatingRoundingDoublingHighMul`)."""
    return (a * b).add_(2**30).bitwise_right_shift_(31)


def shift_right(x: Tensor, bits: Tensor | int) -> Tensor:
    """Return int64 x / 2**bits, halves away from 0 (`RoundingDivideByPOT`)."""
    half = (torch.ones_like(x[:1]) << bits) >> 1
    return ((x >> 63) * (half > 0)).add_(x).add_(half).bitwise_right_shift_(bits)


def rescale(x: Tensor, factor: Tensor, count: int = 1, once: bool = False) -> Tensor:
    """Return int64 x * factor / count, rounded twice or once."""
    multiplier, shift = fixed_point(factor)
    if once:
        return (x * multiplier + (1 << (30 - shift))) >> (31 - shift)
    bits = (31 + shift).clamp(0, min(count.bit_length() - 1, 32))  # `QuantizedMeanOrSum`; 0 if count is 1
    multiplier, shift = (multiplier << bits) // count, shift - bits
    return shift_right(high_product(x << shift.clamp(min=0), multiplier), (-shift).clamp(min=0))


class Quantize(nn.Module):
    """QUANTIZE, and the base of all operators: scale and zero point of an output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def forward(self, x: Tensor, source: "Quantize", count: int = 1) -> Tensor:
        """Map integers with the scale and zero point of `source`, or sums of `count`, to int8."""
        factor = source.scale.double() / self.scale.double()
        return self.finish(rescale(x.long() - source.zero_point * count, factor, count))

    def finish(self, x: Tensor, relu: bool = False) -> Tensor:
        """Add the zero point, the lowest value after a ReLU, to int64 values; clamp them to int8."""
        return (x + self.zero_point).clamp_(int(self.zero_point) if relu else -128, 127).to(torch.int8)


class Convolution(Quantize):
    """CONV_2D with 'same' padding by the zero point, or FULLY_CONNECTED as a 1x1 convolution."""

    def __init__(self, *shape: int, stride: int = 1, relu: bool = False, once: bool = False) -> None:
        super().__init__()
        self.stride, self.relu, self.once = stride, relu, once
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(shape[0], dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(shape[0]))

    def forward(self, x: Tensor, source: Quantize) -> Tensor:
        """Map int8 (N, in, H, W), the output of `source`, to int8 (N, out, H / stride, W / stride)."""
        kernel, stride = self.weight.shape[-1], self.stride
        missing = [max((size - 1) // stride * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
        bound = 255 * int(self.weight.int().abs().sum((1, 2, 3)).max())  # of a sum
        dtype = torch.float32 if bound < 2**24 and x.device.type == "cpu" else torch.float64
        padding = [part for size in missing for part in (size // 2, size - size // 2)]
        x = nn.functional.pad(x.to(dtype) - source.zero_point, padding)
        sums = torch.conv2d(x, self.weight.to(dtype), stride=stride).round_().long()
        factor = (source.scale.double() * self.weight_scale.double() / self.scale.double()).view(-1, 1, 1)
        return self.finish(rescale(sums + self.bias.view(-1, 1, 1), factor, once=self.once), self.relu)


class Block(Quantize):
    """Two convolutions, a shortcut, and ADD with a ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, in_channels, 3, 3, stride=stride, relu=True)
        self.conv2 = Convolution(channels, channels, 3, 3)
        self.downsample = Convolution(channels, in_channels, 1, 1, stride=stride) if stride > 1 else None

    def forward(self, x: Tensor, source: Quantize) -> Tensor:
        """Map int8 (N, in, H, W), the output of `source`, to (N, channels, H / stride, W / stride)."""
        y = self.conv2(self.conv1(x, source), self.conv1)
        if self.downsample is not None:
            x, source = self.downsample(x, source), self.downsample
        twice, total = 2 * torch.maximum(self.conv2.scale, source.scale).double(), 0
        for values, operator in ((y, self.conv2), (x, source)):  # by a table of 256 values, which is faster
            table = (torch.arange(-128, 128, device=x.device) - operator.zero_point) << 20
            total = total + rescale(table, operator.scale.double() / twice)[values.long() + 128]
        return self.finish(rescale(total, twice / (2**20 * self.scale.double())), relu=True)


class Pool(Quantize):
    """AVERAGE_POOL_2D over the whole feature map or, if the buffer `is_mean` is true, MEAN."""

    def forward(self, x: Tensor, source: Quantize) -> Tensor:
        """Map int8 (N, C, H, W), the output of `source`, to (N, C, 1, 1)."""
        sums, count = x.long().sum((2, 3), keepdim=True), x.shape[2] * x.shape[3]
        if self.is_mean:
            return super().forward(sums, source, count)
        half = torch.where(sums > 0, count // 2, -(count // 2))
        return torch.div(sums + half, count, rounding_mode="trunc").to(torch.int8)


class Softmax(Quantize):
    """LiteRT's SOFTMAX, in float32."""

    def forward(self, x: Tensor, source: Quantize) -> Tensor:
        """Map int8 logits (N, classes, 1, 1), the output of `source`, to int8 probabilities."""
        table = (torch.arange(256, device=x.device) * -source.scale).double().exp().float()
        powers = table[x.amax(1, keepdim=True).long() - x.long()]
        total = sum(powers.split(1, dim=1))  # one by one: the order changes a float32 sum
        return self.finish(torch.floor((powers * (1 / (total * self.scale))).double() + 0.5).long())


class FixedPointSoftmax(Quantize):
    """TFLM's SOFTMAX: gemmlowp's `exp_on_negative_values` and `one_over_one_plus_x_for_x_in_0_1`."""

    def forward(self, x: Tensor, source: Quantize) -> Tensor:
        """Map int8 logits (N, classes, 1, 1), the output of `source`, to int8 probabilities."""
        multiplier, shift = fixed_point((source.scale.double() * 2**26).clamp(max=2**31 - 1))
        n = torch.arange(0, -256, -1, device=x.device)
        a = high_product(n << shift, multiplier)  # n * scale with 26 fractional bits
        quarter = (a & (2**24 - 1)) - 2**24
        b = (quarter << 5) + 2**28  # plus 1/8, 31 fractional bits, for a Taylor series around -1/8
        square = high_product(b, b)
        series = shift_right(high_product(square, square), 2) + high_product(square, b)
        series = b + shift_right(high_product(series, 715827883) + square, 1)  # 2**31 / 3
        table = 1895147668 + high_product(series, 1895147668)  # 2**31 * exp(-1/8)
        factors = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)  # 2**31 * exp(-2**k)
        for bit, factor in enumerate(factors, 24):  # k from -2 to 4
            table = torch.where((quarter - a) & 2**bit != 0, high_product(table, factor), table)
        table = torch.where(-n > 31 * 2**26 // 2**shift, 0, table)
        table[0] = 2**31 - 1
        powers = table[x.amax(1, keepdim=True).long() - x.long()]
        total = shift_right(powers, 12).sum(1, keepdim=True)  # 19 fractional bits
        headroom = 32 - torch.frexp(total.double())[1].long()
        half = (total << headroom) // 2
        b = 1515870810 + high_product(half, -1010580540)  # 48/17 and -32/17 with 29 fractional bits
        for _ in range(3):  # Newton's steps
            b = b + (high_product(b, 2**29 - high_product(half, b)) << 2)
        return self.finish(shift_right(high_product((b << 1).clamp(max=2**31 - 1), powers), 35 - headroom))


class QuantizedResNet8(nn.Module):
    """ResNet8 in int8, with the arithmetic of `kernels` "litert" (BUILTIN_REF) or "tflm"."""

    def __init__(self, num_classes: int, width: int, in_channels: int, softmax: bool, kernels: str) -> None:
        super().__init__()
        self.pixels, self.quantize = Quantize(), Quantize()
        self.conv1 = Convolution(width, in_channels, 3, 3, relu=True)
        self.layer1 = Block(width, width, 1)
        self.layer2 = Block(width, 2 * width, 2)
        self.layer3 = Block(2 * width, 4 * width, 2)
        self.avgpool = Pool()
        self.avgpool.register_buffer("is_mean", torch.tensor(False))
        self.fc = Convolution(num_classes, 4 * width, 1, 1, once={"litert": True, "tflm": False}[kernels])
        self.softmax = (Softmax() if kernels == "litert" else FixedPointSoftmax()) if softmax else None

    def forward(self, x: Tensor, dequantize: bool = False) -> Tensor:
        """Map (N, in_channels, H, W) pixels 0-255 to (N, num_classes) int8; with `dequantize`, to float32."""
        last, *operators = self.children()  # in the order of __init__
        for operator in operators:
            x, last = operator(x, last), operator
        return ((x.float() - last.zero_point) * last.scale if dequantize else x).flatten(1)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], kernels: str = "litert") -> "QuantizedResNet8":
        """Build a network; sizes are inferred from the shapes. Raises KeyError or RuntimeError for others."""
        width, in_channels, *_ = state["conv1.weight"].shape
        model = cls(len(state["fc.bias"]), width, in_channels, "softmax.scale" in state, kernels)
        model.load_state_dict(state)
        return model.eval()

    @classmethod
    def from_checkpoint(cls, path: str, kernels: str = "litert") -> "QuantizedResNet8":
        """Load a checkpoint that `convert.py` wrote for a .tflite file; runs no code from it."""
        return cls.from_state_dict(torch.load(path, map_location="cpu", weights_only=True), kernels)
