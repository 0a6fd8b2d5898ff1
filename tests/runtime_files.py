"""Writes small networks in other formats, without TensorFlow: one linear layer, which numpy computes too.

Every pixel has a weight of its own, so a wrong layout or scale changes all outputs. The weights are 8-bit
integers times WEIGHT_STEP, exact in every format.
"""

from functools import cache

import numpy as np
import torch

WEIGHT_STEP = 1e-5
IMAGE = (3, 32, 32)
LOGIT_STEP, LOGIT_ZERO = 0.25, 3  # of quantized outputs
PROBABILITY_STEP = 1 / 256  # of LiteRT
CALIBRATED_STEP = 1 / 255  # of the other libraries, which derive it from the largest probability


def integers(classes=10):
    """Return the weights over WEIGHT_STEP, (classes, 3, 32, 32) int8."""
    return np.random.default_rng(0).integers(-127, 128, (classes, *IMAGE)).astype(np.int8)


def logits_of(images):
    """Return the network's (N, 10) float64 logits for (N, 3, 32, 32) images."""
    return np.einsum("nchw,kchw->nk", images.astype(np.float64), integers() * WEIGHT_STEP)


def write_tflite(
    path,
    dtype="float32",
    batch=-1,
    softmax=False,
    classes=10,
    image=(32, 32, 3),
    inputs=1,
    scale=1.0,
    float_outputs=False,
):
    """Write a FULLY_CONNECTED of pixels, channels last; int8 and uint8 inputs of pixel * `scale`."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    kinds, ops = schema.TensorType, schema.BuiltinOperator
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.subgraphs, model.description = 3, [graph], "a linear layer"
    model.buffers, model.operatorCodes = [schema.BufferT()], []
    graph.tensors, graph.operators = [], []

    def tensor(name, shape, kind, steps=(), data=None):
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, [max(shape[0], 1), *shape[1:]], kind, 0
        made.shapeSignature = shape
        if steps:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = [[each] for each in steps]
        if data is not None:
            made.buffer = len(model.buffers)
            model.buffers.append(schema.BufferT())
            model.buffers[-1].data = np.frombuffer(data.tobytes(), np.uint8)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def operator(code, inputs, output, options=None, kind=0):
        made = schema.OperatorCodeT()
        made.builtinCode, made.deprecatedBuiltinCode = code, min(code, 127)
        made.version = 4 if code == ops.FULLY_CONNECTED else 2
        model.operatorCodes.append(made)
        call = schema.OperatorT()
        call.opcodeIndex, call.inputs, call.outputs = len(model.operatorCodes) - 1, inputs, [output]
        call.builtinOptions, call.builtinOptionsType = options, kind
        graph.operators.append(call)
        return output

    is_float = dtype == "float32"
    inner = kinds.FLOAT32 if is_float else kinds.INT8
    outer = {"float32": kinds.FLOAT32, "int8": kinds.INT8, "uint8": kinds.UINT8}[dtype]
    steps = {"float32": (), "int8": (scale, -128), "uint8": (scale, 0)}[dtype]
    pixels = [tensor(f"pixels{n}", [batch, *image], outer, steps) for n in range(inputs)]
    images = pixels[0]
    if dtype == "uint8":
        images = operator(ops.QUANTIZE, [images], tensor("int8", [batch, *image], inner, (scale, -128)))
    rows = integers(classes).transpose(0, 2, 3, 1).reshape(classes, -1)[:, : int(np.prod(image))]
    weights = (rows * np.float32(WEIGHT_STEP)).astype(np.float32) if is_float else rows
    steps = () if is_float else (WEIGHT_STEP / scale, 0)
    filters = tensor("weights", list(rows.shape), inner, steps, weights)
    outputs = tensor("logits", [batch, classes], inner, () if is_float else (LOGIT_STEP, LOGIT_ZERO))
    kind = schema.BuiltinOptions.FullyConnectedOptions
    operator(ops.FULLY_CONNECTED, [images, filters, -1], outputs, schema.FullyConnectedOptionsT(), kind)
    if softmax:
        steps = () if is_float else (PROBABILITY_STEP, -128)
        options, logits = schema.SoftmaxOptionsT(), outputs
        options.beta = 1.0
        outputs = tensor("probabilities", [batch, classes], inner, steps)
        operator(ops.SOFTMAX, [logits], outputs, options, schema.BuiltinOptions.SoftmaxOptions)
    if float_outputs:
        outputs = operator(ops.DEQUANTIZE, [outputs], tensor("floats", [batch, classes], kinds.FLOAT32))
    graph.inputs, graph.outputs = pixels, [outputs]
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())
    return path


def write_onnx(
    path, dtype="float32", layout="NCHW", batch="N", softmax=False, classes=10, quantized=False, domain=""
):
    """Write a MatMul of the flattened pixels; integer inputs are cast, or dequantized with scale 1.

    With `quantized`, inputs are also float32, quantized first; then the outputs are float32 too.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    is_integer = np.dtype(dtype).kind in "iu"
    shape = IMAGE if layout == "NCHW" else (32, 32, 3)
    weights = integers(classes) if layout == "NCHW" else integers(classes).transpose(0, 2, 3, 1)
    inner = np.float16 if dtype == "float16" else np.float32
    values = {"weights": (weights.reshape(classes, -1).T * WEIGHT_STEP).astype(inner)}
    zero = np.int8(-128) if dtype == "int8" else np.uint8(0)
    values |= {"one": np.float32(1), "zero": zero}
    step, output_zero = (CALIBRATED_STEP, np.uint8(0)) if softmax else (LOGIT_STEP, np.int8(LOGIT_ZERO))
    values |= {"step": np.float32(step), "output_zero": output_zero}
    nodes = []

    def node(operator, *inputs, **options):
        nodes.append(helper.make_node(operator, inputs, [f"{operator}{len(nodes)}"], **options))
        return nodes[-1].output[0]

    name = "pixels"
    if quantized:
        name = name if is_integer else node("QuantizeLinear", name, "one", "zero")
        name = node("DequantizeLinear", name, "one", "zero")
    elif is_integer:
        name = node("Cast", name, to=TensorProto.FLOAT)
    name = node("MatMul", node("Flatten", name, domain=domain), "weights")
    name = node("Softmax", name) if softmax else name
    if quantized:
        name = node("QuantizeLinear", name, "step", "output_zero")
        name = name if is_integer else node("DequantizeLinear", name, "step", "output_zero")
    kinds = [np.dtype(dtype), output_zero.dtype if quantized and is_integer else np.dtype(inner)]
    kinds = list(map(helper.np_dtype_to_tensor_dtype, kinds))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("pixels", kinds[0], [batch, *shape])],
        [helper.make_tensor_value_info(name, kinds[1], [batch, classes])],
        [numpy_helper.from_array(value, key) for key, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


class Linear(torch.nn.Module):
    """The network in PyTorch; `quantized` rounds pixels and probabilities with torchao's operators."""

    def __init__(self, classes=10, softmax=False, quantized=False, float_outputs=True):
        super().__init__()
        weights = integers(classes).reshape(classes, -1) * WEIGHT_STEP
        self.weight, self.softmax = torch.nn.Parameter(torch.from_numpy(weights).float()), softmax
        self.quantized, self.float_outputs = quantized, float_outputs

    def forward(self, images):
        images = self.rounded(images, 1.0) if self.quantized else images
        outputs = torch.nn.functional.linear(images.flatten(1), self.weight)
        outputs = outputs.softmax(1) if self.softmax else outputs
        if self.quantized and self.softmax:
            outputs = self.rounded(outputs, CALIBRATED_STEP, self.float_outputs)
        return outputs

    def rounded(self, values, step, dequantized=True):
        operators, steps = torch.ops.quantized_decomposed, (step, 0, 0, 255, torch.uint8)
        values = operators.quantize_per_tensor(values, *steps)
        return operators.dequantize_per_tensor(values, *steps) if dequantized else values


def write_exported(path, network=None, batch=None, image=IMAGE, **options):
    """Write a `torch.export.save` archive of a network, by default Linear, for any batch or one size."""
    program = export(network, batch, image) if network else export_linear(batch, **options)
    torch.export.save(program, path)
    return path


def export(network, batch=None, image=IMAGE):
    """Return the exported program of a network."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  # defines torchao's operators

    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    return torch.export.export(network, (torch.zeros(batch or 2, *image),), dynamic_shapes=shapes)


@cache  # an export takes a second
def export_linear(batch, **options):
    """Return the exported program of a linear layer."""
    return export(Linear(**options), batch)
