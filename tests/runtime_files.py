"""Writes networks of other formats, without TensorFlow: one linear layer, whose outputs numpy knows too.

Each sees every pixel with a weight of its own, so that a wrong layout or scale changes all outputs. The
weights are 8-bit integers times WEIGHT_STEP, exact in every format.
"""

import io
import json
import zipfile
from functools import cache

import numpy as np
import torch

WEIGHT_STEP = 1e-5
IMAGE = (3, 32, 32)
LOGIT_STEP, LOGIT_ZERO = 0.25, 3  # of quantized outputs
PROBABILITY_STEP = 1 / 256


def integers(classes=10):
    """The weights over WEIGHT_STEP, (classes, 3, 32, 32) int8."""
    return np.random.default_rng(0).integers(-127, 128, (classes, *IMAGE)).astype(np.int8)


def logits_of(images):
    """What the network makes of (N, 3, 32, 32) images, (N, 10) float64."""
    return np.einsum("nchw,kchw->nk", images.astype(np.float64), integers() * WEIGHT_STEP)


def write_tflite(path, dtype="float32", batch=-1, softmax=False, classes=10, image=(32, 32, 3), inputs=1):
    """A FULLY_CONNECTED of pixels, channels last; int8 and uint8 inputs have scale 1."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    kinds, ops = schema.TensorType, schema.BuiltinOperator
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.subgraphs, model.description = 3, [graph], "a linear layer"
    model.buffers, model.operatorCodes = [schema.BufferT()], []
    graph.tensors, graph.operators = [], []

    def tensor(name, shape, kind, scale=None, zero_point=0, data=None, signature=None):
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, shape, kind, 0
        made.shapeSignature = signature
        if scale:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = [scale], [zero_point]
        if data is not None:
            made.buffer = len(model.buffers)
            model.buffers.append(schema.BufferT())
            model.buffers[-1].data = np.frombuffer(data.tobytes(), np.uint8)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def operator(code, inputs, outputs, options=None, kind=0):
        made = schema.OperatorCodeT()
        made.builtinCode, made.deprecatedBuiltinCode = code, min(code, 127)
        made.version = 4 if code == ops.FULLY_CONNECTED else 2
        model.operatorCodes.append(made)
        call = schema.OperatorT()
        call.opcodeIndex, call.inputs, call.outputs = len(model.operatorCodes) - 1, inputs, outputs
        call.builtinOptions, call.builtinOptionsType = options, kind
        graph.operators.append(call)

    is_float, size = dtype == "float32", max(batch, 1)
    inner = kinds.FLOAT32 if is_float else kinds.INT8
    outer = {"float32": kinds.FLOAT32, "int8": kinds.INT8, "uint8": kinds.UINT8}[dtype]
    steps = {"float32": (), "int8": (1.0, -128), "uint8": (1.0, 0)}[dtype]
    taken = [
        tensor(f"pixels{n}", [size, *image], outer, *steps, signature=[batch, *image]) for n in range(inputs)
    ]
    images = taken[0]
    if dtype == "uint8":
        images = tensor("pixels_int8", [size, *image], inner, 1.0, -128, signature=[batch, *image])
        operator(ops.QUANTIZE, [taken[0]], [images])
    rows = integers(classes).transpose(0, 2, 3, 1).reshape(classes, -1)[:, : int(np.prod(image))]
    weights = (rows * np.float32(WEIGHT_STEP)).astype(np.float32) if is_float else rows
    scale = () if is_float else (WEIGHT_STEP, 0)
    filters = tensor("weights", list(rows.shape), inner, *scale, data=weights)
    steps = () if is_float else (LOGIT_STEP, LOGIT_ZERO)
    given = tensor("logits", [size, classes], inner, *steps, signature=[batch, classes])
    options = schema.FullyConnectedOptionsT()
    operator(
        ops.FULLY_CONNECTED,
        [images, filters, -1],
        [given],
        options,
        schema.BuiltinOptions.FullyConnectedOptions,
    )
    if softmax:
        steps = () if is_float else (PROBABILITY_STEP, -128)
        outputs = tensor("probabilities", [size, classes], inner, *steps, signature=[batch, classes])
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        operator(ops.SOFTMAX, [given], [outputs], options, schema.BuiltinOptions.SoftmaxOptions)
        given = outputs
    graph.inputs, graph.outputs = taken, [given]
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())
    return path


def write_onnx(
    path, dtype="float32", layout="NCHW", batch="N", softmax=False, classes=10, quantized=False, domain=""
):
    """A Gemm of the flattened pixels; integer inputs are cast, or dequantized with scale 1."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shape = IMAGE if layout == "NCHW" else (32, 32, 3)
    weights = integers(classes) if layout == "NCHW" else integers(classes).transpose(0, 2, 3, 1)
    inner = np.float16 if dtype == "float16" else np.float32
    values = {"weights": (weights.reshape(classes, -1).T * WEIGHT_STEP).astype(inner)}
    nodes, name = [], "pixels"
    zero = 0 if dtype == "uint8" else -128
    if quantized:
        values |= {"one": np.float32(1), "zero": np.array(zero, dtype)}
        values |= {"step": np.float32(LOGIT_STEP), "logit_zero": np.int8(LOGIT_ZERO)}
        nodes.append(helper.make_node("DequantizeLinear", [name, "one", "zero"], ["real"]))
    elif np.dtype(dtype).kind in "iu":
        nodes.append(helper.make_node("Cast", [name], ["real"], to=TensorProto.FLOAT))
    name = "real" if nodes else name
    nodes.append(helper.make_node("Flatten", [name], ["flat"], domain=domain))
    nodes.append(helper.make_node("MatMul", ["flat", "weights"], ["logits"]))
    if softmax:
        nodes.append(helper.make_node("Softmax", ["logits"], ["outputs"]))
    if quantized:
        nodes.append(helper.make_node("QuantizeLinear", ["logits", "step", "logit_zero"], ["outputs"]))
    given = TensorProto.INT8 if quantized else helper.np_dtype_to_tensor_dtype(np.dtype(inner))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("pixels", kind, [batch, *shape])],
        [
            helper.make_tensor_value_info(
                "outputs" if softmax or quantized else "logits", given, [batch, classes]
            )
        ],
        [numpy_helper.from_array(value, key) for key, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="a linear layer")
    onnx.save(model, path)
    return path


class Linear(torch.nn.Module):
    """The network in PyTorch."""

    def __init__(self, classes=10, softmax=False):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.from_numpy(integers(classes).reshape(classes, -1) * WEIGHT_STEP).float()
        )
        self.softmax = softmax

    def forward(self, images):
        logits = torch.nn.functional.linear(images.flatten(1), self.weight)
        return logits.softmax(1) if self.softmax else logits


def write_exported(path, network=None, batch=None, image=IMAGE, decompose=False, **options):
    """What `torch.export.save` writes, for any batch or one of a fixed size."""
    if network:
        path.write_bytes(exported(network, batch, image, decompose))
    else:
        path.write_bytes(exported_linear(batch, decompose, **options))
    return path


def exported(network, batch, image, decompose):
    """The content of a `.pt2`."""
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (torch.zeros(batch or 2, *image),), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program.run_decompositions() if decompose else program, buffer)
    return buffer.getvalue()


@cache  # an export takes a second
def exported_linear(batch, decompose, **options):
    """The linear layer's."""
    return exported(Linear(**options), batch, IMAGE, decompose)


def edit_exported(path, edit):
    """Have `edit(name, content)` change the records of an archive, which lie in a folder; None drops one."""
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in records.items():
            changed = edit(name.partition("/")[2], content)
            if changed is not None:
                target.writestr(name, changed)
    return path


def edit_graph(path, edit):
    """Have `edit(dict)` change the JSON of an archive's network."""

    def change(name, content):
        if name != "models/model.json":
            return content
        model = json.loads(content)
        edit(model)
        return json.dumps(model).encode()

    return edit_exported(path, change)
