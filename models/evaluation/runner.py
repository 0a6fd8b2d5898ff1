"""Networks of other formats, run by their own libraries: the process that answers `runtimes.Runtime`.

    python -m models.evaluation.runner

In a process of its own, no library meets another's threads or memory, and a file that crashes one, or takes
too much memory or time, costs that file only. What each format may run:

    TensorFlow Lite  the operators built into LiteRT; one of the file's own, or TensorFlow's, is refused.
                     LiteRT does not verify a file before it reads it, so a damaged one can crash it.
    ONNX             the operators built into ONNX Runtime; libraries of others are loaded only by name, and
                     none is named here. Weights may lie in another file of the same folder.
    torch.export     the operators that `exported.py` lists; nothing is unpickled, and no code evaluated.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from models.common.errors import one_line
from models.common.kinds import Kind
from models.keras.reader import limit_memory
from models.keras.worker import serve

MEMORY = 4 * 2**30  # bytes of address space that a network may take: a thread's stack and arena take 72 MiB
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RunnerError(Exception):
    """The file cannot be run. The message is one line, which does not name the file."""


@dataclass(frozen=True)
class Tensor:
    """What a network takes or returns: with a scale, (stored - zero_point) * scale is the real value."""

    shape: list[int | None]  # the batch first; None where any size goes
    dtype: str  # numpy's name
    scale: float | None = None
    zero_point: int = 0


@dataclass(frozen=True)
class Network:
    """A network that is ready to run."""

    format: str  # what a person reads
    takes: Tensor
    returns: Tensor
    run: Callable[[np.ndarray], np.ndarray] = field(repr=False)


def open_tflite(path: Path) -> Network:
    """Open a TensorFlow Lite file in LiteRT, whose XNNPACK runs what it can."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=CORES)
    takes = only(interpreter.get_input_details(), "inputs")
    returns = only(interpreter.get_output_details(), "outputs")
    tensors = []
    for each in (takes, returns):
        shape = [None if size < 0 else int(size) for size in each["shape_signature"]]
        scale, zero_point = each["quantization"]  # (0.0, 0) where there is none
        tensors.append(Tensor(shape, np.dtype(each["dtype"]).name, float(scale) or None, int(zero_point)))
    weights = {each["dtype"] for each in interpreter.get_tensor_details() if len(each["shape"]) == 4}

    def run(batch: np.ndarray) -> np.ndarray:
        if list(interpreter.get_input_details()[0]["shape"]) != list(batch.shape):
            interpreter.resize_tensor_input(takes["index"], batch.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(takes["index"], batch)
        interpreter.invoke()
        return interpreter.get_tensor(returns["index"])

    return Network(f"TensorFlow Lite{', int8' if np.int8 in weights else ''}", *tensors, run)


def open_onnx(path: Path) -> Network:
    """Open an ONNX file in ONNX Runtime, on the CPU."""
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = CORES
    session_options.log_severity_level = 4  # errors are raised
    session = onnxruntime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
    takes, returns = only(session.get_inputs(), "inputs"), only(session.get_outputs(), "outputs")
    dtypes = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    tensors = []
    for each, quantizes in ((takes, "DequantizeLinear"), (returns, "QuantizeLinear")):
        dtype = dtypes.get(each.type, each.type.removeprefix("tensor(").removesuffix(")"))
        steps = onnx_quantization(path, each.name, quantizes) if np.dtype(dtype).kind in "iu" else ()
        shape = [size if isinstance(size, int) and size > 0 else None for size in each.shape]
        tensors.append(Tensor(shape, dtype, *steps))
    form = "ONNX, int8" if tensors[0].scale else "ONNX"
    return Network(form, *tensors, lambda batch: session.run([returns.name], {takes.name: batch})[0])


def onnx_quantization(path: Path, name: str, quantizes: str) -> tuple[float, int] | tuple[()]:
    """Return the scale and the zero point of an input or an output: they stand in the node that reads it.

    Nodes that only move values may lie between. Returns () where integers mean themselves, as pixels do.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer if len(each.dims) < 2}
    ahead = quantizes == "DequantizeLinear"
    for _ in graph.node:
        ends = {(node.input if ahead else node.output)[0]: node for node in graph.node if node.input}
        node = ends.get(name)
        if node is None or node.op_type not in (quantizes, "Transpose", "Reshape", "Identity", "Squeeze"):
            return ()
        if node.op_type == quantizes:
            scale, *zero = (values[each] for each in node.input[1:3])
            return scale.item(), int(zero[0].item()) if zero else 0
        name = (node.output if ahead else node.input)[0]
    return ()


def open_exported(path: Path) -> Network:
    """Open an archive of `torch.export.save`."""
    import torch

    from models.evaluation.exported import Exported

    network = Exported(path)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed memory is kept from now on, as in `inference.predict`
    takes = Tensor(network.shape, str(network.dtype).removeprefix("torch."))
    returns = Tensor([None, None], "float32")
    return Network(
        "torch.export", takes, returns, lambda batch: network(torch.from_numpy(batch)).float().numpy()
    )


def only(found: list, what: str) -> object:
    """Return the one of a network's inputs or outputs."""
    if len(found) != 1:
        raise RunnerError(f"has {len(found)} {what}, expected one")
    return found[0]


# A kind -> what opens it, its library, and how that is installed.
OPENS = {
    Kind.TFLITE: (open_tflite, "ai_edge_litert", "ai-edge-litert"),
    Kind.ONNX: (open_onnx, "onnxruntime", "onnxruntime"),
    Kind.EXPORTED: (open_exported, "torch", "torch"),
}
network: Network  # the one that is open


def answer(request: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """Open the file at `path`, of `kind`, and say what it takes and returns; or run a batch of `images`.

    Raises RunnerError with one line.
    """
    global network
    try:
        if "path" not in request:
            return {}, {"outputs": run_batch(arrays["images"])}
        kind = Kind[request["kind"]]
        opens, library, package = OPENS[kind]
        try:
            __import__(library)
        except ImportError as error:
            needed = f"is {kind.value}, which needs: pip install {package}"
            raise RunnerError(needed if error.name == library else f"{needed} ({one_line(error)})") from None
        limit_memory(MEMORY)
        network = opens(Path(request["path"]))
        described = {"takes": asdict(network.takes), "returns": asdict(network.returns)}
        return {"format": network.format, **described}, {}
    except RunnerError:
        raise
    except ModuleNotFoundError as error:
        raise RunnerError(f"has quantized inputs, which need: pip install {error.name}") from None
    except ValueError as error:  # ours, and the libraries' own refusals
        message = str(error).removeprefix(f"{request.get('path')}: ")
        raise RunnerError(" ".join(message.split())[:300]) from None
    except Exception as error:  # whatever a damaged or an odd file leads a library to
        raise RunnerError(f"cannot be run: {one_line(error)}") from None


def run_batch(images: np.ndarray) -> np.ndarray:
    """Return the outputs, in batches as large as the network wants; the last is filled up with an image."""
    size = network.takes.shape[0] or len(images)
    outputs = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        filled = np.concatenate([batch, np.repeat(images[:1], size - len(batch), axis=0)])
        outputs.append(network.run(filled)[: len(batch)])
    return np.concatenate(outputs)


def main() -> None:
    """Serve `runtimes.Runtime`."""
    serve(answer, refusals=(RunnerError,))


if __name__ == "__main__":
    main()
