"""TensorFlow Lite, ONNX and torch.export files, run by their own libraries.

`measure_file` is the caller's side; `python -m models.evaluation.runtimes` runs all images through one file.
A file that crashes its library, or takes too much memory or time, costs that file only. LiteRT and ONNX
Runtime run their built-in operators only; `torch.export.load` can run code from the file.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np

from data.cifar10 import Dataset
from models.common.cli import one_line
from models.common.files import PACKAGES, Format, detect_format, read_regular
from models.common.job import Job, JobError, Message, limit_resources, serve
from models.evaluation.metrics import BATCH_EFFECT, Predictions, check_outputs, depends_on_batch
from models.normalization import Normalization

SECONDS = 600  # for all images, imports included
MEMORY = 4 * 2**30  # bytes of address space, in addition to the library's own
BATCH_SIZE = 64  # if the file accepts any
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BYTES = {"uint8": 0, "int8": -128}  # dtype -> what a pixel of 0 is stored as
LAST_OPERATOR = "expected floats, with DequantizeLinear as the last operator"
MOVES = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # of ONNX; values stay
FEW_VALUES = 16  # fewer in quantized inputs, but not in the pixels: they were clipped or rounded
MISSING_OPERATOR = "No Op registered|not a registered|NOT_IMPLEMENTED"  # in ONNX Runtime's errors


def measure_file(
    path: Path,
    dataset: Dataset,
    normalization: Normalization,
    name: str,
    allow_code: bool,
    is_assumed: bool = False,
    kernels: str = "xnnpack",
) -> Predictions:
    """Return the predictions of the network in a file. Raises ValueError with one line.

    8-bit inputs take the pixels' bytes (int8: minus 128) if the normalization `is_assumed`. `kernels` are
    LiteRT's, "xnnpack" or "reference".
    """
    file_format = detect_format(path)
    if file_format is Format.EXPORTED and not allow_code:
        raise ValueError(f"{path}: can run code when loaded; if you trust its author, add --allow-code")
    request = {"path": str(path.absolute()), "format": file_format.name}
    request |= {"normalization": asdict(normalization), "is_assumed": is_assumed}
    request["settings"] = [kernels] if file_format is Format.TFLITE else []
    try:
        job = Job("models.evaluation.runtimes")
        answer, arrays = job.run(request, {"images": dataset.images}, SECONDS)
    except JobError as error:
        reason = f"damaged: its library fails on it ({error})" if error.crashed else error
        raise ValueError(f"{path}: {reason}") from None
    outputs = arrays["outputs"].reshape(len(arrays["outputs"]), -1)
    check_outputs(path, outputs, dataset)
    is_float = file_format is not Format.ONNX or answer["step"] or (outputs % 1).any()
    if not is_float and np.abs(outputs).max() > 1:
        raise ValueError(f"{path}: all outputs are integers, of an unknown scale; {LAST_OPERATOR}")
    throughput = {"images_per_second": len(dataset) / answer["seconds"], "workers": 1, "device": "cpu"}
    throughput |= {"batch_norm_folded": None} | ({"kernels": kernels} if request["settings"] else {})
    throughput |= {key: answer[key] for key in ("seconds", "batch_size", "dtype")}
    external = tuple(path.parent / each for each in answer["external_data"])
    content = b"".join(map(read_regular, (path, *external))) if external else None
    return Predictions.from_outputs(
        name,
        path,
        outputs,
        dataset,
        Normalization(**answer["normalization"]),
        throughput,
        answer["step"],
        format=answer["description"],
        is_clipped=answer["is_clipped"],
        external_data=external,
        sha256=hashlib.sha256(content).hexdigest() if external else None,
    )


# --- In the job -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """An input or output. The real values of integers are (stored - zero_point) * scale.

    Floats that were dequantized inside the file have the scale of that; an integer output has a scale, too.
    """

    shape: list[int | None]  # the batch first; None accepts any size
    dtype: str  # numpy's name
    scale: float | None = None
    zero_point: int = 0

    @property
    def is_integer(self) -> bool:
        """Whether it is stored as integers."""
        return "int" in self.dtype

    def quantize(self, real: np.ndarray) -> np.ndarray:
        """Return real values in the tensor's dtype."""
        if not self.is_integer:
            return real.astype(self.dtype)
        limits = np.iinfo(self.dtype)
        steps = np.rint(real.astype(np.float64) / (self.scale or 1)) + self.zero_point
        return steps.clip(limits.min, limits.max).astype(self.dtype)

    def dequantize(self, stored: np.ndarray) -> np.ndarray:
        """Return the real values, float64."""
        if not self.is_integer:
            return stored.astype(np.float64)
        if self.scale is None:
            raise JobError(f"has {self.dtype} outputs of an unknown scale; {LAST_OPERATOR}")
        return (stored.astype(np.float64) - self.zero_point) * self.scale


@dataclass(frozen=True)
class Network:
    """A network in its library, ready to run."""

    description: str  # format and int8, for people
    input: Tensor
    output: Tensor
    run: Callable[[np.ndarray], np.ndarray]
    external_data: tuple[str, ...] = ()  # further files, relative to the file's folder


def open_tflite(path: Path, kernels: str) -> Network:
    """Open a TensorFlow Lite file in LiteRT, for XNNPACK, its default, or the reference kernels."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolvers = {"xnnpack": OpResolverType.AUTO, "reference": OpResolverType.BUILTIN_REF}
    resolver = resolvers[kernels]
    interpreter = Interpreter(str(path), num_threads=CORES, experimental_op_resolver_type=resolver)
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
    content = read_regular(path)
    is_int8 = any(operator in content for operator in (b"DequantizeLinear", b"QLinearConv", b"ConvInteger"))
    graph, external_data = None, set()
    if is_int8 or b"\n\x08location" in content:  # a protobuf string of 8 bytes: the key of external data
        import onnx

        graph = onnx.load(path, load_external_data=False).graph
        entries = (entry for tensor in graph.initializer for entry in tensor.external_data)
        external_data = {entry.value for entry in entries if entry.key == "location"}
    tensors = []
    for each in ends:
        dtype = dtypes.get(each.type, each.type.removeprefix("tensor(").removesuffix(")"))
        shape = [size if isinstance(size, int) and size > 0 else None for size in each.shape]
        steps = onnx_quantization(graph, path.parent, each.name, "int" in dtype) if graph else ()
        tensors.append(Tensor(shape, dtype, *steps))
    input_name, output_names = ends[0].name, [ends[1].name]
    return Network(
        f"ONNX{', int8' if is_int8 else ''}",
        *tensors,
        lambda batch: session.run(output_names, {input_name: batch})[0],
        tuple(sorted(external_data)),
    )


def onnx_quantization(graph: object, folder: Path, name: str, is_integer: bool) -> tuple:
    """Return scale and zero point of an input or output from the operators that (de)quantize it.

    `graph` is an onnx.GraphProto, `folder` has its external data. Operators that only move values may be
    between them. Returns () unless all readers have the same scale.
    """
    from onnx.numpy_helper import from_array, to_array

    tensors = {each.name: each for each in graph.initializer}
    values = {node.output[0]: node.attribute[0] for node in graph.node if node.op_type == "Constant"}
    floats = {name: from_array(np.float32(each.f)) for name, each in values.items() if each.name != "value"}
    tensors |= {name: each.t for name, each in values.items()} | floats
    is_input = name in {each.name for each in graph.input}
    operator = "QuantizeLinear" if is_integer and not is_input else "DequantizeLinear"
    moves = MOVES if is_integer else (*MOVES, "Cast")
    found, names = set(), [name]
    for name in names:  # which grows
        for node in graph.node:
            if name not in (node.input if is_input else node.output) or node.op_type == "Shape":
                continue
            constants = [tensors.get(each) for each in node.input[1:3] if each]
            if node.op_type == operator and None not in constants:
                values = (to_array(each, str(folder)) for each in constants)
                found.add(tuple(each.item() for each in values if each.size == 1))
            elif node.op_type in moves:
                names.append((node.output if is_input else node.input)[0])
            else:
                found.add(())
    return found.pop() if len(found) == 1 else ()


def open_exported(path: Path) -> Network:
    """Load an archive of `torch.export.save`, which can run code from it."""
    import torch
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  # defines torchao's operators

    program = torch.export.load(path)
    input_name = only(program.graph_signature.user_inputs)
    output_name = only(program.graph_signature.user_outputs)
    nodes = {node.name: node for node in program.graph.nodes}
    values = [nodes[name].meta["val"] for name in (input_name, output_name)]
    dtypes = [str(value.dtype).removeprefix("torch.") for value in values]
    shape = [size if isinstance(size, int) else None for size in values[0].shape]
    module = program.module()
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed memory is kept from now on, as in `inference.predict`

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(batch)).float().numpy()

    node = nodes[output_name]
    while any(move in str(node.target) for move in ("aten.view", "aten.reshape", "aten.permute")):
        node = node.args[0]
    is_known = "quantize_per_tensor.default" in str(node.target)  # dequantize_per_tensor, too
    quantization = node.args[1:3] if is_known else ()
    return Network("torch.export", Tensor(shape, dtypes[0]), Tensor([], dtypes[1], *quantization), run)


def only(ends: list) -> object:
    """Return the only input or output of a network."""
    if len(ends) != 1:
        raise JobError(f"has {len(ends)} inputs or outputs, expected one of each")
    return ends[0]


OPENERS = {Format.TFLITE: open_tflite, Format.ONNX: open_onnx, Format.EXPORTED: open_exported}


def run_task(request: dict, arrays: dict[str, np.ndarray]) -> Message:
    """Run (N, C, H, W) uint8 `images` through the network at `path`. Raises JobError with one line."""
    file_format = Format[request["format"]]
    library, packages = PACKAGES.get(file_format, ("torch", "torch"))
    try:
        import_module(library)
        limit_resources(MEMORY, SECONDS * CORES)
        network = OPENERS[file_format](Path(request["path"]), *request["settings"])
        normalization = Normalization(**request["normalization"])
        return run_network(network, arrays["images"], normalization, request["is_assumed"])
    except JobError:
        raise
    except ImportError as error:
        reason = f"is {file_format.value}, which needs: pip install {packages} ({one_line(error)})"
        raise JobError(reason) from None
    except Exception as error:  # a damaged file can raise anything
        lacks = "; export it with an operator that it has" if re.search(MISSING_OPERATOR, str(error)) else ""
        raise JobError(f"cannot be run: {one_line(error)}{lacks}") from None


def run_network(
    network: Network, images: np.ndarray, normalization: Normalization, is_assumed: bool
) -> Message:
    """Return the dequantized outputs and the time; an image pads the last batch."""
    shape, layouts = network.input.shape, ((0, 1, 2, 3), (0, 2, 3, 1))  # NCHW, NHWC
    axes = next((axes for axes in layouts if fits(shape, [images.shape[axis] for axis in axes])), None)
    if axes is None:
        raise JobError(f"takes images of shape {shape[1:]}, CIFAR-10's are {list(images.shape[1:])}")
    size, outputs, tensor = shape[0] or BATCH_SIZE, [], network.input
    if tensor.dtype in BYTES and (is_assumed or (tensor.scale is None and normalization.is_identity)):
        tensor = replace(tensor, scale=1, zero_point=BYTES[tensor.dtype])
        normalization = Normalization.from_args(images.shape[1])

    def run(pixels: np.ndarray) -> np.ndarray:
        padded = np.concatenate([pixels, np.repeat(pixels[:1], size - len(pixels), axis=0)])
        batch = tensor.quantize(normalization(padded).transpose(axes))
        return network.output.dequantize(network.run(np.ascontiguousarray(batch)))[: len(pixels)]

    start = time.perf_counter()
    for index in range(0, len(images), size):
        outputs.append(run(images[index : index + size]))
    seconds = time.perf_counter() - start
    if depends_on_batch(images[:size], outputs[0], run):
        raise JobError(BATCH_EFFECT)
    sample = images[:BATCH_SIZE]
    values = len(np.unique(tensor.quantize(normalization(sample)))) if tensor.is_integer else FEW_VALUES
    answer = {"seconds": seconds, "batch_size": size, "dtype": tensor.dtype}
    answer |= {"description": network.description, "step": network.output.scale or 0.0}
    answer |= {"is_clipped": values < min(FEW_VALUES, len(np.unique(sample)))}
    answer |= {"normalization": asdict(normalization), "external_data": network.external_data}
    return answer, {"outputs": np.concatenate(outputs)}


def fits(shape: list[int | None], images: list[int]) -> bool:
    """Whether an input of this shape accepts images of this shape; the first axis is the batch."""
    return len(shape) == 4 and all(n in (None, m) for n, m in zip(shape[1:], images[1:], strict=True))


if __name__ == "__main__":
    serve(run_task)
