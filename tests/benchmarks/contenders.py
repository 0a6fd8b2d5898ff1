"""The inference contenders of the benchmark; each runs as a job: `python -m tests.benchmarks.contenders`.

A contender loads its model and returns a function `(images, batch_size) -> (N, classes) outputs`, which is
timed, the images in its layout, and the batch sizes to try. `evaluate.py`'s inference normalizes uint8 images
in its own time; all others receive normalized float32 images.
"""

import importlib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.common.cli import one_line
from models.common.job import JobError, serve
from models.normalization import Normalization

MULTIPLY_ACCUMULATES = 12_501_632  # per image, for width 16 (models/resnet8.py)
TRIAL_IMAGES = 1_000  # for the choice of the batch size


@dataclass(frozen=True)
class Files:
    """The same model in three formats, in int8 in two, and the images."""

    images: np.ndarray  # (N, C, H, W) uint8
    pt: str
    keras: str
    onnx: str
    tflite: str
    int8: str  # the .pt of `tflite`
    normalization: dict[str, dict]  # "pytorch", "keras" -> the arguments of `Normalization`

    def channels_first(self, framework="pytorch"):
        """Return the input of a framework's model in float32; `Normalization` would need float64's memory."""
        values = (self.normalization[framework][name] for name in ("mean", "std"))
        mean, std = (np.float32(each).reshape(-1, 1, 1) for each in values)
        return (self.images - mean) / std

    def channels_last(self):
        return np.ascontiguousarray(self.channels_first("keras").transpose(0, 2, 3, 1))


def evaluate_folded(files, fold=True):
    import torch

    from models.evaluation import inference
    from models.evaluation.fused import fuse
    from models.resnet8 import ResNet8

    device, model = inference.choose_device("cpu"), ResNet8.from_checkpoint(files.pt)
    batch_size, workers = inference.batches_for(device)
    first = torch.from_numpy(files.channels_first()[:batch_size])
    model = (fold and fuse(model, first)) or inference.prepare(model, device, torch.float32)
    normalization = Normalization(**files.normalization["pytorch"])

    def run(images, size):
        return inference.predict(model, images, normalization, size, workers)

    return run, files.images, [batch_size]


def evaluate_unfolded(files):
    return evaluate_folded(files, fold=False)


def torch_loop(model):
    import torch

    def run(images, size):
        with torch.inference_mode():
            return torch.cat([model(batch) for batch in torch.from_numpy(images).split(size)]).numpy()

    return run


def plain_loop(files):
    from models.resnet8 import ResNet8

    return torch_loop(ResNet8.from_checkpoint(files.pt)), files.channels_first(), [128]


def onnx2torch(files):
    from onnx2torch import convert

    return torch_loop(convert(files.onnx).eval()), files.channels_last(), [128]


def keras(files):
    import keras

    model = keras.models.load_model(files.keras, compile=False)

    def run(images, size):
        return model.predict(images, batch_size=size, verbose=0)

    return run, files.channels_last(), [32, 128, 256, 1000]


def onnxruntime(files, sessions=1):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 0 if sessions == 1 else 1  # 0: one per core
    loaded = [onnxruntime.InferenceSession(files.onnx, options) for _ in range(sessions)]
    name = loaded[0].get_inputs()[0].name

    def run(images, size):
        batches = [images[start : start + size] for start in range(0, len(images), size)]

        def share(index):
            return [loaded[index].run(None, {name: batch})[0] for batch in batches[index::sessions]]

        outputs = [None] * len(batches)
        with ThreadPoolExecutor(sessions) as pool:
            for index, computed in enumerate(pool.map(share, range(sessions))):
                outputs[index::sessions] = computed
        return np.concatenate(outputs)

    return run, files.channels_last(), [16, 32, 64, 100]


def onnxruntime_sessions(files):
    return onnxruntime(files, sessions=os.cpu_count() or 1)


def int8_pytorch(files):
    from models.evaluation import inference
    from models.resnet8_int8 import QuantizedResNet8

    model, pixels = QuantizedResNet8.from_checkpoint(files.int8), Normalization.from_args(3)
    batch_size, workers = inference.batches_for(inference.choose_device("cpu"))

    def run(images, size):
        return inference.predict(model, images, pixels, size, workers)

    return run, files.images, [batch_size]


def litert_reference(files):
    """LiteRT's reference kernels, which have no threads: an interpreter a core."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    settings = {"experimental_op_resolver_type": OpResolverType.BUILTIN_REF}
    loaded = [Interpreter(files.tflite, **settings) for _ in range(os.cpu_count() or 1)]
    for interpreter in loaded:
        interpreter.allocate_tensors()
    (pixels,), (probabilities,) = loaded[0].get_input_details(), loaded[0].get_output_details()

    def run(images, size):
        def share(index):
            outputs = []
            for image in images[index :: len(loaded)]:
                loaded[index].set_tensor(pixels["index"], image[None])
                loaded[index].invoke()
                outputs.append(loaded[index].get_tensor(probabilities["index"]))
            return np.concatenate(outputs)

        outputs = np.empty((len(images), *probabilities["shape"][1:]), np.int8)
        with ThreadPoolExecutor(len(loaded)) as pool:
            for index, computed in enumerate(pool.map(share, range(len(loaded)))):
                outputs[index :: len(loaded)] = computed
        return outputs

    return run, np.ascontiguousarray((files.images ^ 128).view(np.int8).transpose(0, 2, 3, 1)), [1]


def matrix_product(files):
    import torch

    a, b = torch.rand(2, 1024, 1024)
    product = torch.empty(1024, 1024)

    def run(images, size):
        with torch.inference_mode():
            for _ in range(round(len(images) * MULTIPLY_ACCUMULATES / 1024**3)):
                torch.mm(a, b, out=product)
        return np.zeros((len(images), 1), np.float32)

    return run, files.images, [1]


CONTENDERS = {  # name in the tables -> (function that loads it, library)
    "evaluate.py, BatchNorm folded": (evaluate_folded, "torch"),
    "evaluate.py, not folded": (evaluate_unfolded, "torch"),
    "plain NCHW PyTorch loop": (plain_loop, "torch"),
    "Keras predict": (keras, "keras"),
    "Keras predict, torch backend": (keras, "keras"),
    "ONNX Runtime, its own threads": (onnxruntime, "onnxruntime"),
    "ONNX Runtime, a session a core": (onnxruntime_sessions, "onnxruntime"),
    "tf2onnx and onnx2torch": (onnx2torch, "onnx2torch"),
    "evaluate.py, int8": (int8_pytorch, "torch"),
    "LiteRT's reference kernels, int8": (litert_reference, "ai_edge_litert"),
    "the limit: a matrix product": (matrix_product, "torch"),
}


def run_contender(name, **files):
    """Run a contender over all images, at its fastest batch size."""
    load, library = CONTENDERS[name]
    os.environ["KERAS_BACKEND"] = "torch" if name.endswith("torch backend") else "tensorflow"
    importlib.import_module(library)
    imports = peak_memory()
    run, images, sizes = load(Files(**files))

    def timed(images, batch_size):
        start = time.perf_counter()
        outputs = run(images, batch_size)
        return time.perf_counter() - start, outputs

    trials = {size: min(timed(images[:TRIAL_IMAGES], size)[0] for _ in range(2)) for size in sizes}
    batch_size = min(trials, key=trials.get)
    seconds, outputs = timed(images, batch_size)
    answer = {"seconds": seconds, "batch_size": batch_size, "imports": imports, "memory": peak_memory()}
    return answer, {"classes": outputs.argmax(axis=1)}


def export_onnx(keras_file, onnx_file):
    """Write the Keras model as ONNX, with tf2onnx."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tf2onnx

    model = keras.models.load_model(keras_file, compile=False)
    tf2onnx.convert.from_keras(model, output_path=onnx_file)
    return {}, {}


def export_int8(keras_file, tflite_file, images):
    """Write the Keras model as int8 TensorFlow Lite, calibrated on (N, C, H, W) uint8 images."""
    import keras
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(keras.models.load_model(keras_file, compile=False))
    inputs = images.transpose(0, 2, 3, 1)[:, None].astype(np.float32)
    converter.representative_dataset = lambda: ([image] for image in inputs)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    Path(tflite_file).write_bytes(converter.convert())
    return {}, {}


def peak_memory():
    """Return this process's peak resident memory in MB; `ru_maxrss` begins with its parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024 / 1e6


def run_task(request, arrays):
    try:
        if "tflite_file" in request:
            return export_int8(**request, **arrays)
        return export_onnx(**request) if "onnx_file" in request else run_contender(**request, **arrays)
    except Exception as error:  # a contender's libraries may be missing, or fail
        raise JobError(one_line(error)) from None


if __name__ == "__main__":
    serve(run_task)
