"""Writes int8 ResNet8 networks with random weights as TensorFlow Lite files, without TensorFlow."""

import numpy as np
import torch

from models.resnet8_int8 import Block, Convolution, QuantizedResNet8


class TFLiteWriter:
    """Writes a TensorFlow Lite file of one graph, tensor by tensor and operator by operator."""

    def __init__(self):
        from ai_edge_litert import schema_py_generated as schema

        self.schema, self.model, self.graph = schema, schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.subgraphs, self.model.description = 3, [self.graph], "a test"
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.graph.tensors, self.graph.operators = [], []

    def tensor(self, name, shape, dtype, steps=(), data=None):
        """Add a tensor, of constants if it has `data`; `steps` are scales and zero points."""
        made = self.schema.TensorT()
        made.name, made.shape, made.buffer = name, [max(shape[0], 1), *shape[1:]], 0
        made.type, made.shapeSignature = getattr(self.schema.TensorType, np.dtype(dtype).name.upper()), shape
        if len(steps):
            made.quantization = self.schema.QuantizationParametersT()
            made.quantization.scale = np.atleast_1d(steps[0]).astype(np.float32)
            made.quantization.zeroPoint = np.atleast_1d(steps[1]).astype(np.int64)
        if data is not None:
            made.buffer = len(self.model.buffers)
            self.model.buffers.append(self.schema.BufferT())
            self.model.buffers[-1].data = np.frombuffer(np.asarray(data).astype(dtype).tobytes(), np.uint8)
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def operator(self, name, inputs, output, kind="", **options):
        """Add an operator, with options of the schema's class `kind` + "Options"; return its output."""
        made, call = self.schema.OperatorCodeT(), self.schema.OperatorT()
        made.builtinCode = getattr(self.schema.BuiltinOperator, name)
        made.deprecatedBuiltinCode = min(made.builtinCode, 127)
        made.version = {"FULLY_CONNECTED": 4, "CONV_2D": 3, "RESHAPE": 1}.get(name, 2)
        call.opcodeIndex, call.inputs, call.outputs = len(self.model.operatorCodes), inputs, [output]
        if kind:
            call.builtinOptions = getattr(self.schema, f"{kind}OptionsT")()
            call.builtinOptionsType = getattr(self.schema.BuiltinOptions, f"{kind}Options")
            for option, value in options.items():
                setattr(call.builtinOptions, option, value)
        self.model.operatorCodes.append(made)
        self.graph.operators.append(call)
        return output

    def write(self, path, inputs, outputs):
        """Write the file; return its path."""
        import flatbuffers

        self.graph.inputs, self.graph.outputs = inputs, outputs
        builder = flatbuffers.Builder(0)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        path.write_bytes(builder.Output())
        return path


def random_int8(width=4, classes=10, softmax=True, seed=0, is_mean=False, has_bias=True):
    """Return a QuantizedResNet8 with random weights, whose values mostly fit int8."""
    model, random = QuantizedResNet8(classes, width, 3, softmax, "litert"), np.random.default_rng(seed)
    model.pixels.zero_point.fill_(0)
    model.quantize.zero_point.fill_(-128)
    for name, module in model.named_modules():
        if isinstance(module, Convolution):
            shape = tuple(module.weight.shape)
            weight = random.integers(-100, 101, shape)
            weight -= weight.mean((1, 2, 3), keepdims=True).round().astype(int)  # else outputs are all equal
            module.weight.copy_(torch.from_numpy(weight))
            module.bias.copy_(torch.from_numpy(random.integers(-3000, 3000, shape[0]).astype(np.int32)))
            scales = random.uniform(1, 2, shape[0]) / (50 * np.sqrt(np.prod(shape[1:])))
            module.weight_scale.copy_(torch.from_numpy(scales))
        if hasattr(module, "zero_point") and name not in ("pixels", "quantize"):
            is_rectified = isinstance(module, Block) or name.endswith("conv1")
            module.zero_point.fill_(-128 if is_rectified else int(random.integers(-20, 20)))
            module.scale.fill_(random.uniform(0.8, 1.2))
    model.avgpool.is_mean.fill_(is_mean)
    if not is_mean:
        for buffer in ("scale", "zero_point"):
            getattr(model.avgpool, buffer).copy_(getattr(model.layer3, buffer))
    model.fc.scale.fill_(0.05)
    model.fc.weight_scale.mul_(0.1)
    model.fc.bias.mul_(has_bias)
    if softmax:
        model.softmax.scale.fill_(1 / 256)
        model.softmax.zero_point.fill_(-128)
    return model


def write_int8(
    path, model, inputs="int8", outputs="int8", reshape=True, image=(32, 32), edit=None, **changed
):
    """Write a QuantizedResNet8 as TensorFlow Lite; `changed` are options of its first convolution.

    `edit(writer)` changes the file before it is written.
    """
    file, (height, width) = TFLiteWriter(), image
    channels, classes = model.conv1.weight.shape[1], len(model.fc.bias)

    def steps(module):
        return module.scale.item(), module.zero_point.item()

    def convolution(name, module, source, x, height, width, **changed):
        weight = module.weight.numpy().transpose(0, 2, 3, 1)
        scales, bias = module.weight_scale.numpy(), module.bias.numpy()
        kind, options = "Conv2D", {"strideH": module.stride, "strideW": module.stride, "padding": 0}
        options |= {"dilationHFactor": 1, "dilationWFactor": 1}
        height, width = (-(-side // module.stride) for side in (height, width))
        shape = [1, height, width, len(weight)]
        if name == "fc":
            weight, kind, options, shape = (
                weight.reshape(len(weight), -1),
                "FullyConnected",
                {},
                [1, len(weight)],
            )
        if len(set(scales)) == 1:
            scales = scales[:1]
        options = {"fusedActivationFunction": int(module.relu), **options, **changed}
        constants = [
            file.tensor(f"{name} weight", weight.shape, "int8", (scales, np.zeros(len(scales), int)), weight),
            file.tensor(
                f"{name} bias", bias.shape, "int32", (scales * source.scale.item(), 0 * scales), bias
            ),
        ]
        constants = constants if bias.any() else [constants[0], -1]
        output = file.tensor(name, shape, "int8", steps(module))
        operator = "FULLY_CONNECTED" if name == "fc" else "CONV_2D"
        return file.operator(operator, [x, *constants], output, kind, **options), height, width

    pixels = file.tensor("pixels", [1, *image, channels], inputs, steps(model.quantize))
    x, source = pixels, model.quantize
    if inputs == "uint8":
        file.graph.tensors[pixels].quantization.zeroPoint = [model.pixels.zero_point.item()]
        file.graph.tensors[pixels].quantization.scale = [model.pixels.scale.item()]
        quantized = file.tensor("quantize", [1, *image, channels], "int8", steps(source))
        x = file.operator("QUANTIZE", [pixels], quantized, "Quantize")
    x, height, width = convolution("conv1", model.conv1, source, x, height, width, **changed)
    source = model.conv1
    for stage in (1, 2, 3):
        name, block = f"layer{stage}", getattr(model, f"layer{stage}")
        y, *inner = convolution(f"{name}.conv1", block.conv1, source, x, height, width)
        y, *inner = convolution(f"{name}.conv2", block.conv2, block.conv1, y, *inner)
        if block.downsample is not None:
            x, *inner = convolution(f"{name}.downsample", block.downsample, source, x, height, width)
        height, width = inner
        total = file.tensor(name, [1, height, width, len(block.conv2.bias)], "int8", steps(block))
        x = file.operator("ADD", [x, y], total, "Add", fusedActivationFunction=1)
        source = block
    features = len(source.conv2.bias)
    if model.avgpool.is_mean:
        axes = file.tensor("axes", [2], "int32", data=[1, 2])
        pooled = file.tensor("avgpool", [1, features], "int8", steps(model.avgpool))
        x = file.operator("MEAN", [x, axes], pooled, "Reducer", keepDims=False)
    else:
        pooled = file.tensor("avgpool", [1, 1, 1, features], "int8", steps(model.avgpool))
        window = {"filterHeight": height, "filterWidth": width, "strideH": height, "strideW": width}
        x = file.operator("AVERAGE_POOL_2D", [x], pooled, "Pool2D", padding=1, **window)
        if reshape:
            flat = file.tensor("flat", [1, features], "int8", steps(model.avgpool))
            shape = file.tensor("shape", [2], "int32", data=[1, features])
            x = file.operator("RESHAPE", [x, shape], flat, "Reshape", newShape=[1, features])
    x, *_ = convolution("fc", model.fc, model.avgpool, x, 1, 1)
    last = model.fc
    if model.softmax is not None:
        last = model.softmax
        probabilities = file.tensor("softmax", [1, classes], "int8", steps(last))
        x = file.operator("SOFTMAX", [x], probabilities, "Softmax", beta=1.0)
    if outputs == "float32":
        x = file.operator("DEQUANTIZE", [x], file.tensor("real", [1, classes], "float32"), "Dequantize")
    if edit:
        edit(file)
    return file.write(path, [pixels], [x])
