"""Convert an int8 TensorFlow Lite ResNet8 to PyTorch, and verify every byte.

`convert_int8` is the caller's side. `python -m models.conversion.int8` reads the file, matches its operators
to OPERATORS by the graph, and runs LiteRT's reference kernels (BUILTIN_REF).
"""

from __future__ import annotations

import os
from collections import namedtuple
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cifar10 import load_test
from models.common.cli import VerificationError, echo, one_line, printable
from models.common.files import Format, detect_format, json_path, read_metadata, sha256_of
from models.common.job import Job, JobError, Message, limit_resources, serve
from models.graph import KNOWN_FILES
from models.normalization import Normalization

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint

IMAGES = 200  # compared; every tenth is random
MEMORY, CPU_SECONDS = 4 * 2**30, 60  # IC02 takes 8 s
CONV, ADD, POOL = ["CONV_2D"], ["ADD"], ["AVERAGE_POOL_2D", "MEAN"]
OPERATORS = {  # module of QuantizedResNet8: kinds, inputs, fused activation, kernel, stride
    "conv1": (CONV, ["quantize"], "RELU", 3, 1),
    "layer1.conv1": (CONV, ["conv1"], "RELU", 3, 1),
    "layer1.conv2": (CONV, ["layer1.conv1"], "NONE", 3, 1),
    "layer1": (ADD, ["layer1.conv2", "conv1"], "RELU"),
    "layer2.conv1": (CONV, ["layer1"], "RELU", 3, 2),
    "layer2.conv2": (CONV, ["layer2.conv1"], "NONE", 3, 1),
    "layer2.downsample": (CONV, ["layer1"], "NONE", 1, 2),
    "layer2": (ADD, ["layer2.conv2", "layer2.downsample"], "RELU"),
    "layer3.conv1": (CONV, ["layer2"], "RELU", 3, 2),
    "layer3.conv2": (CONV, ["layer3.conv1"], "NONE", 3, 1),
    "layer3.downsample": (CONV, ["layer2"], "NONE", 1, 2),
    "layer3": (ADD, ["layer3.conv2", "layer3.downsample"], "RELU"),
    "avgpool": (POOL, ["layer3"], "NONE"),
    "fc": (["FULLY_CONNECTED"], ["avgpool"], "NONE"),
    "softmax": (["SOFTMAX"], ["fc"], "NONE"),  # optional
}
SHAPE_OPERATORS = ("SHAPE", "STRIDED_SLICE", "PACK")  # compute the shape of a RESHAPE if the batch is free
NAMES = {  # of an option's values, as in LiteRT's schema.fbs
    "fusedActivationFunction": ("NONE", "RELU", "RELU_N1_TO_1", "RELU6", "TANH", "SIGN_BIT"),
    "padding": ("SAME", "VALID"),
}


def convert_int8(path: Path, output: Path, verbose: bool = False) -> dict:
    """Convert an int8 TensorFlow Lite file, verify it, and write `output` and its JSON; return the JSON.

    Raises ValueError for another network, VerificationError for an operator whose bytes differ from LiteRT's,
    OSError for `output`; then nothing is written.
    """
    content, images = np.fromfile(path, np.uint8), load_test(which="sample").images[:IMAGES]
    job = Job("models.conversion.int8")  # its imports overlap torch's
    import torch

    from models.checkpoint import write_checkpoint
    from models.conversion.stages import stage
    from models.resnet8_int8 import QuantizedResNet8
    from models.transforms import layer_activations

    echo(printable(f"{path}: TensorFlow Lite, int8"))
    if (sha256 := sha256_of(path)) in KNOWN_FILES:
        echo(f"  {KNOWN_FILES[sha256]}")
    with stage("operators") as lines:
        try:
            answer, arrays = job.run({}, {"content": content, "images": images})
            state = {name: torch.from_numpy(arrays.pop(name)) for name in answer["state"]}
            model = QuantizedResNet8.from_state_dict(state)
        except JobError as error:
            raise ValueError(f"{'damaged: ' * error.crashed}{error}") from None
        except RuntimeError as error:  # shapes
            raise ValueError(one_line(error)) from None
        lines.append(f"{len(answer['kinds'])} operators with {len(state)} tensors matched")
    for name, value in state.items() if verbose else ():
        echo(f"    {name:<30} {tuple(value.shape) or value.item()}")
    with stage("outputs") as lines:
        computed = layer_activations(model, torch.from_numpy(arrays["images"]))
        for node, kind in answer["kinds"].items():
            size, different = arrays[node].size, (computed[node].ravel() != arrays[node].ravel()).sum()
            if different:
                reason = f"{different:,} of {size:,} bytes differ from LiteRT's reference kernels"
                raise VerificationError(f"{node} ({kind}): {reason}; expected none")
        size = sum(computed[node].size for node in answer["kinds"])
        lines.append(
            f"{size:,} bytes of {IMAGES} images equal to LiteRT {answer['litert']}'s reference kernels"
        )

    num_classes, width, channels = len(model.fc.bias), *model.conv1.weight.shape[:2]
    mean, std = model.pixels.zero_point.item(), 1 / model.pixels.scale.item()
    source = {"file": os.path.relpath(path, output.parent), "sha256": sha256}
    described = {"layout": "NCHW", "shape": list(arrays["images"].shape[1:]), "range": [0, 255]}
    metadata = {
        "architecture": {"num_classes": num_classes, "width": width, "in_channels": channels},
        "source": {**source, "format": "TensorFlow Lite, int8"},
        "input": {**described, "mean": [mean] * channels, "std": [std] * channels},
        "verification": {"litert": answer["litert"], "images": IMAGES, "bytes": size, "different_bytes": 0},
        "versions": {"torch": version("torch")},
    }
    metadata = write_checkpoint(output, model, metadata)
    echo(f"  wrote {output} and {json_path(output)}")
    return metadata


def read_int8(path: Path) -> Checkpoint | None:
    """Return the int8 network in a checkpoint, which takes pixels; None for another file.

    Its source is no baseline: LiteRT's file. Raises OSError, or ValueError with one line.
    """
    from models.checkpoint import Checkpoint, load_torch
    from models.resnet8_int8 import QuantizedResNet8

    state = load_torch(path) if detect_format(path) is Format.TORCH else None
    if not isinstance(state, dict) or "quantize.scale" not in state:
        return None
    try:
        model = QuantizedResNet8.from_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an int8 ResNet8 ({one_line(error)})") from None
    pixels, metadata = Normalization.from_args(model.conv1.weight.shape[1]), read_metadata(path)
    metadata = {**metadata, "source": {}, "input": {**asdict(pixels), **metadata.get("input", {})}}
    return Checkpoint(path, model, sha256_of(path), pixels, metadata)


# --- In the job -------------------------------------------------------------------------------------------


Operator = namedtuple("Operator", "kind inputs output options")  # inputs and output: numbers of tensors


def read_operators(content: bytes) -> list[Operator]:
    """Return the operators of a TensorFlow Lite file; the output of a RESHAPE is replaced by its input."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    kinds = {code: name for name, code in vars(schema.BuiltinOperator).items()}
    codes = [max(each.builtinCode, each.deprecatedBuiltinCode) for each in model.operatorCodes]
    (graph,), operators, reshaped = model.subgraphs, [], {}
    for each in graph.operators:
        kind, output = kinds[codes[each.opcodeIndex]], int(each.outputs[0])
        inputs = [reshaped.get(number, number) for number in map(int, each.inputs)]
        if kind == "RESHAPE":
            reshaped[output] = inputs[0]
        elif kind not in SHAPE_OPERATORS:
            options = vars(each.builtinOptions) if each.builtinOptions else {}
            operators.append(Operator(kind, inputs, output, options))
    return operators


def match_operators(operators: list[Operator], interpreter: object) -> tuple[dict, dict, dict]:
    """Return the state_dict of a QuantizedResNet8, and the output tensor and kind of each module's operator.

    Raises JobError, which names the operator, for a graph or options that the network does not have.
    """
    tensors, (pixels,) = interpreter.get_tensor_details(), interpreter.get_input_details()
    state, outputs, kinds = {}, {}, {}

    def check(what: str, value: object, *expected: object) -> None:
        if value not in expected:
            raise JobError(f"{what} is {value}; expected {' or '.join(expected)}")

    def add(node: str, tensor: int, *dtypes: str) -> None:
        check(f"{node}: dtype", np.dtype(tensors[tensor]["dtype"]).name, *dtypes)
        steps = tensors[tensor]["quantization_parameters"]
        state[f"{node}.scale"], state[f"{node}.zero_point"] = steps["scales"][0], steps["zero_points"][0]
        outputs[node] = tensor

    add("pixels", pixels["index"], "uint8", "int8")
    if operators[0].kind == "QUANTIZE":
        add("quantize", operators[0].output, "int8")
        kinds["quantize"] = operators.pop(0).kind
    else:
        add("quantize", pixels["index"], "int8")
        state["pixels.zero_point"] += 128  # of uint8 pixels
    for node, (expected, inputs, activation, *sizes) in OPERATORS.items():
        sources = {outputs[each] for each in inputs}
        readers = [each for each in operators if sources & set(each.inputs)]
        fitting = [
            each
            for each in readers
            if each.kind in expected
            and sources == set(outputs.values()) & set(each.inputs)
            and (not sizes or tensors[each.inputs[1]]["shape"][1] == sizes[0])
        ]
        if node == "softmax" and not fitting:
            continue
        if len(fitting) != 1:
            found = ", ".join(each.kind for each in readers) or "none"
            check(f"{node}: operator after {' and '.join(inputs)}", found, f"one {' or '.join(expected)}")
        operators.remove(fitting[0])
        kinds[node], (_, *constants), output, options = fitting[0]
        required = {"fusedActivationFunction": activation}
        required |= {"strideH": sizes[1], "strideW": sizes[1]} if sizes else {}
        required |= {"padding": "SAME"} if sizes[:1] == [3] else {}  # equal to VALID for 1x1
        for option in required.keys() & options.keys():
            value = NAMES[option][options[option]] if option in NAMES else options[option]
            check(f"{node} ({kinds[node]}): {option}", str(value), str(required[option]))
        add(node, output, "int8")
        if sizes or node == "fc":
            weight, *bias = (interpreter.get_tensor(number) for number in constants if number >= 0)
            check(f"{node} ({kinds[node]}): dtype of the weight", weight.dtype.name, "int8")
            scales = tensors[constants[0]]["quantization_parameters"]["scales"]
            state[f"{node}.weight"] = weight.transpose(0, 3, 1, 2) if sizes else weight[:, :, None, None]
            state[f"{node}.weight_scale"] = np.broadcast_to(scales, len(weight))
            state[f"{node}.bias"] = bias[0] if bias else np.zeros(len(weight), np.int32)
    state["avgpool.is_mean"] = np.bool_(kinds["avgpool"] == "MEAN")
    others = [each.kind for each in operators if each.kind != "DEQUANTIZE" or each.inputs[0] != output]
    check("operator after the last", ", ".join(others) or "none", "none")
    return state, outputs, kinds


def run_reference(interpreter: object, sample: np.ndarray, outputs: dict[str, int]) -> dict[str, np.ndarray]:
    """Return the `images` that are run, (N, C, H, W) uint8, and every output for them, channels last.

    `sample` is repeated or cut to the size of the input.
    """
    (pixels,) = interpreter.get_input_details()
    _, height, width, channels = pixels["shape"]
    images = np.tile(sample, (1, channels // 3 + 1, height // 32 + 1, width // 32 + 1))
    images = images[:, :channels, :height, :width].copy()
    images[::10] = np.random.default_rng(0).integers(0, 256, images[::10].shape)
    computed = {node: [] for node in outputs}
    for image in images.transpose(0, 2, 3, 1)[:, None]:
        is_uint8 = pixels["dtype"] == np.uint8
        interpreter.set_tensor(pixels["index"], image if is_uint8 else (image ^ 128).view(np.int8))
        interpreter.invoke()
        for node, tensor in outputs.items():
            computed[node].append(interpreter.get_tensor(tensor))
    return {"images": images, **{node: np.concatenate(values) for node, values in computed.items()}}


def run_task(_: dict, arrays: dict[str, np.ndarray]) -> Message:
    """Read the TensorFlow Lite file in `content` and run it on `images`. Raises JobError with one line."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as error:
        raise JobError(f"needs: pip install ai-edge-litert ({one_line(error)})") from None
    limit_resources(MEMORY, CPU_SECONDS)
    content = arrays["content"].tobytes()
    settings = {"experimental_op_resolver_type": OpResolverType.BUILTIN_REF}
    try:
        interpreter = Interpreter(model_content=content, experimental_preserve_all_tensors=True, **settings)
        state, outputs, kinds = match_operators(read_operators(content), interpreter)
        interpreter.allocate_tensors()
        computed = run_reference(interpreter, arrays["images"], {node: outputs[node] for node in kinds})
    except JobError:
        raise
    except Exception as error:  # damage raises anything
        raise JobError(f"damaged, or not an int8 ResNet8 ({one_line(error)})") from None
    answer = {"state": list(state), "kinds": kinds, "litert": version("ai-edge-litert")}
    return answer, {**{name: np.asarray(value) for name, value in state.items()}, **computed}


if __name__ == "__main__":
    serve(run_task)
