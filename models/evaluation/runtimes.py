"""TensorFlow Lite, ONNX and torch.export files, run by their own libraries.

`measure_file` is the caller's side; `python -m models.evaluation.runtimes` runs all images through one file.
A file that crashes its library, or takes too much memory or time, costs that file only. LiteRT and ONNX
Runtime run their built-in operators only; `torch.export.load` can run code from the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from data.cifar10 import Dataset
from models.common.cli import one_line
from models.common.files import Format, detect_format, read_regular
from models.common.job import Job, JobError, Message, limit_resources, serve
from models.evaluation.metrics import Predictions, check_outputs, log_softmax
from models.normalization import Normalization

SECONDS = 600  # for all images, imports included
MEMORY = 4 * 2**30  # bytes of address space, in addition to the library's own
BATCH_SIZE = 64  # if the file accepts any
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MAX_FLOAT_ERROR = 0.01  # of the sum of 10 probabilities, in float16 too


def measure_file(
    path: Path, dataset: Dataset, normalization: Normalization, name: str, allow_code: bool
) -> Predictions:
    """Return the predictions of the network in a file. Raises ValueError with one line."""
    file_format = detect_format(path)
    if file_format is Format.EXPORTED and not allow_code:
        raise ValueError(f"{path}: can run code when loaded; if you trust its author, add --allow-code")
    request = {"path": str(path.absolute()), "format": file_format.name}
    request["normalization"] = asdict(normalization)
    try:
        job = Job("models.evaluation.runtimes")
        answer, arrays = job.run(request, {"images": dataset.images}, SECONDS)
    except JobError as error:
        reason = f"damaged: its library fails on it ({error})" if error.crashed else error
        raise ValueError(f"{path}: {reason}") from None
    outputs = arrays["outputs"].reshape(len(arrays["outputs"]), -1)
    check_outputs(path, outputs, dataset)
    predicted, description = log_probabilities(outputs, answer.pop("step")), answer.pop("description")
    throughput = {"images_per_second": len(dataset) / answer["seconds"], "workers": 1, "device": "cpu"}
    throughput |= {"batch_norm_folded": None, **answer}
    labels, names = dataset.labels, dataset.class_names
    return Predictions(
        name, path, predicted, labels, normalization, throughput, description, class_names=names
    )


def log_probabilities(outputs: np.ndarray, step: float = 0) -> np.ndarray:
    """Return the float64 log-probabilities of (N, classes) probabilities or logits.

    Outputs from 0 to 1 that sum to 1, up to their quantization in multiples of `step`, are probabilities. One
    that is quantized to 0 counts as half a step (without steps, as float32's smallest normal number): its
    logarithm, and with it the loss, would be infinite.
    """
    error = np.abs(outputs.sum(axis=1) - 1).max()
    if outputs.min() < 0 or outputs.max() > 1 or error > max(MAX_FLOAT_ERROR, outputs.shape[1] * step / 2):
        return log_softmax(outputs)
    return np.log(np.maximum(outputs, step / 2 or np.finfo(np.float32).tiny))


# --- In the job -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """An input or output. Its real values are (stored - zero_point) * scale, or the stored ones."""

    shape: list[int | None]  # the batch first; None accepts any size
    dtype: str  # numpy's name
    scale: float | None = None
    zero_point: int = 0

    def quantize(self, real: np.ndarray) -> np.ndarray:
        """Return real values in the tensor's dtype."""
        if np.dtype(self.dtype).kind not in "iu":
            return real.astype(self.dtype)
        limits = np.iinfo(self.dtype)
        steps = np.rint(real.astype(np.float64) / (self.scale or 1)) + self.zero_point
        return steps.clip(limits.min, limits.max).astype(self.dtype)

    def dequantize(self, stored: np.ndarray) -> np.ndarray:
        """Return the real values, float64."""
        return (stored.astype(np.float64) - self.zero_point) * (self.scale or 1)


@dataclass(frozen=True)
class Network:
    """A network in its library, ready to run."""

    description: str  # format and int8, for people
    input: Tensor
    output: Tensor
    run: Callable[[np.ndarray], np.ndarray]


def open_tflite(path: Path) -> Network:
    """Open a TensorFlow Lite file in LiteRT, which runs most operators with XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=CORES)
    details = only(interpreter.get_input_details()), only(interpreter.get_output_details())
    tensors = []
    for each in details:
        shape = [None if size < 0 else int(size) for size in each["shape_signature"]]
        scale, zero_point = each["quantization"]  # (0.0, 0) if not quantized
        tensors.append(Tensor(shape, np.dtype(each["dtype"]).name, float(scale) or None, int(zero_point)))
    is_int8 = any(each["dtype"] == np.int8 for each in interpreter.get_tensor_details())
    input_index, output_index = (each["index"] for each in details)

    def run(batch: np.ndarray) -> np.ndarray:
        if list(interpreter.get_input_details()[0]["shape"]) != list(batch.shape):
            interpreter.resize_tensor_input(input_index, batch.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(input_index, batch)
        interpreter.invoke()
        return interpreter.get_tensor(output_index)

    return Network(f"TensorFlow Lite{', int8' if is_int8 else ''}", *tensors, run)


def open_onnx(path: Path) -> Network:
    """Open an ONNX file in ONNX Runtime, on the CPU."""
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = CORES
    session_options.log_severity_level = 4  # errors are raised
    session = onnxruntime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
    ends = only(session.get_inputs()), only(session.get_outputs())
    dtypes = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    tensors = []
    for each, operator in zip(ends, ("DequantizeLinear", "QuantizeLinear"), strict=True):
        dtype = dtypes.get(each.type, each.type.removeprefix("tensor(").removesuffix(")"))
        steps = onnx_quantization(path, each.name, operator) if np.dtype(dtype).kind in "iu" else ()
        shape = [size if isinstance(size, int) and size > 0 else None for size in each.shape]
        tensors.append(Tensor(shape, dtype, *steps))
    content = read_regular(path)
    is_int8 = any(operator in content for operator in (b"DequantizeLinear", b"QLinearConv", b"ConvInteger"))
    input_name, output_names = ends[0].name, [ends[1].name]
    return Network(
        f"ONNX{', int8' if is_int8 else ''}",
        *tensors,
        lambda batch: session.run(output_names, {input_name: batch})[0],
    )


def onnx_quantization(path: Path, name: str, operator: str) -> tuple[float, int] | tuple[()]:
    """Return scale and zero point of an input or output, from the `operator` that (de)quantizes it.

    Operators that only move values may be between them. Returns () for plain integers, such as pixels.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer if len(each.dims) < 2}
    is_input = operator == "DequantizeLinear"
    for _ in graph.node:
        by_name = {(node.input if is_input else node.output)[0]: node for node in graph.node if node.input}
        node = by_name.get(name)
        if node is None or node.op_type not in (operator, "Transpose", "Reshape", "Identity", "Squeeze"):
            return ()
        if node.op_type == operator:
            scale, *zero_point = (values[each] for each in node.input[1:3])
            return scale.item(), int(zero_point[0].item()) if zero_point else 0
        name = (node.output if is_input else node.input)[0]
    return ()


def open_exported(path: Path) -> Network:
    """Load an archive of `torch.export.save`, which can run code from it."""
    import torch
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  # defines torchao's operators

    program = torch.export.load(path)
    input_name = only(program.graph_signature.user_inputs)
    only(program.graph_signature.user_outputs)
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == input_name)
    shape = [size if isinstance(size, int) else None for size in value.shape]
    module = program.module()
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed memory is kept from now on, as in `inference.predict`

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(batch)).float().numpy()

    dtype = str(value.dtype).removeprefix("torch.")
    return Network("torch.export", Tensor(shape, dtype), Tensor([], "float32"), run)


def only(ends: list) -> object:
    """Return the only input or output of a network."""
    if len(ends) != 1:
        raise JobError(f"has {len(ends)} inputs or outputs, expected one of each")
    return ends[0]


# Format -> function that opens it, its library, and the packages to install.
OPENERS = {
    Format.TFLITE: (open_tflite, "ai_edge_litert", "ai-edge-litert"),
    Format.ONNX: (open_onnx, "onnxruntime", "onnxruntime onnx"),
    Format.EXPORTED: (open_exported, "torch", "torch"),
}


def run_task(request: dict, arrays: dict[str, np.ndarray]) -> Message:
    """Run (N, C, H, W) uint8 `images` through the network at `path`. Raises JobError with one line."""
    file_format = Format[request["format"]]
    opener, library, packages = OPENERS[file_format]
    try:
        import_module(library)
        limit_resources(MEMORY, SECONDS * CORES)
        network = opener(Path(request["path"]))
        return run_network(network, arrays["images"], Normalization(**request["normalization"]))
    except JobError:
        raise
    except ImportError as error:
        reason = f"is {file_format.value}, which needs: pip install {packages} ({one_line(error)})"
        raise JobError(reason) from None
    except Exception as error:  # a damaged file can raise anything
        raise JobError(f"cannot be run: {one_line(error)}") from None


def run_network(network: Network, images: np.ndarray, normalization: Normalization) -> Message:
    """Return the dequantized outputs and the time; an image pads the last batch."""
    shape, layouts = network.input.shape, ((0, 1, 2, 3), (0, 2, 3, 1))  # NCHW, NHWC
    axes = next((axes for axes in layouts if fits(shape, [images.shape[axis] for axis in axes])), None)
    if axes is None:
        raise JobError(f"takes images of shape {shape[1:]}, CIFAR-10's are {list(images.shape[1:])}")
    size, outputs = shape[0] or BATCH_SIZE, []
    start = time.perf_counter()
    for index in range(0, len(images), size):
        pixels = images[index : index + size]
        padded = np.concatenate([pixels, np.repeat(pixels[:1], size - len(pixels), axis=0)])
        batch = network.input.quantize(normalization(padded).transpose(axes))
        outputs.append(network.run(np.ascontiguousarray(batch))[: len(pixels)])
    computed = {"outputs": network.output.dequantize(np.concatenate(outputs))}
    answer = {"seconds": time.perf_counter() - start, "batch_size": size, "dtype": network.input.dtype}
    return {**answer, "description": network.description, "step": network.output.scale or 0}, computed


def fits(shape: list[int | None], images: list[int]) -> bool:
    """Whether an input of this shape accepts images of this shape; the first axis is the batch."""
    return len(shape) == 4 and all(n in (None, m) for n, m in zip(shape[1:], images[1:], strict=True))


if __name__ == "__main__":
    serve(run_task)
