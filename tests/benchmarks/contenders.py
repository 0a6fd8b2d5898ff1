"""The contenders of the benchmark, each in a process of its own: `python -m tests.benchmarks.contenders`.

A contender is a function that loads its model and returns three things: `run(images, batch_size)`, which is
what is timed; the images as it takes them; and the batch sizes worth trying. `evaluate.py`'s inference takes
uint8 images and normalizes them in its own time; all others find float32 images, normalized, in their own
layout.
"""

import importlib
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.keras.worker import serve
from models.scaling import Scaling

Run = Callable[[np.ndarray, int], np.ndarray]  # images, batch size -> (N, classes) logits or probabilities
Contender = tuple[Run, np.ndarray, list[int]]

MULTIPLY_ACCUMULATES = 12_501_632  # an image's, in the network of width 16 (models/resnet8.py)
TRIAL_IMAGES = 1_000  # on which the batch sizes are tried


@dataclass(frozen=True)
class Job:
    """What every contender is given: the same model in three formats, and the images."""

    images: np.ndarray  # (N, C, H, W) uint8
    pt: str
    keras: str
    onnx: str
    scaling: dict[str, tuple[list, list]]  # "pytorch", "keras" -> (mean, std) a channel, in pixel units

    def normalized(self, framework: str) -> np.ndarray:
        """Return the images as a framework's model takes them, (N, C, H, W) float32."""
        mean, std = (np.float32(values).reshape(-1, 1, 1) for values in self.scaling[framework])
        return (self.images - mean) / std

    def channels_last(self) -> np.ndarray:
        """Return the images as the Keras model, and the ONNX made of it, take them: (N, H, W, C) float32."""
        return np.ascontiguousarray(self.normalized("keras").transpose(0, 2, 3, 1))


def evaluate_folded(job: Job, fold: bool = True) -> Contender:
    """Load evaluate.py's inference, with its defaults."""
    import torch

    from models.evaluation import inference
    from models.evaluation.fused import fuse
    from models.resnet8 import ResNet8

    device = inference.choose_device("cpu")
    model = ResNet8.from_checkpoint(job.pt)
    batch_size, workers = inference.batches_for(device)
    mean, std = job.scaling["pytorch"]
    first = torch.from_numpy(job.normalized("pytorch")[:batch_size]).float()
    model = (fold and fuse(model, first)) or inference.prepare(model, device, torch.float32, fold)

    def run(images: np.ndarray, size: int) -> np.ndarray:
        return inference.predict(model, images, Scaling(mean, std), size, workers)

    return run, job.images, [batch_size]


def evaluate_unfolded(job: Job) -> Contender:
    """Load evaluate.py's inference, its BatchNorms left as they are."""
    return evaluate_folded(job, fold=False)


def plain_loop(job: Job) -> Contender:
    """Load what one writes first: the module, batches of 128, PyTorch's own threads."""
    from models.resnet8 import ResNet8

    return torch_loop(ResNet8.from_checkpoint(job.pt)), job.normalized("pytorch"), [128]


def onnx2torch(job: Job) -> Contender:
    """Load the module that onnx2torch makes of tf2onnx's file; batches of 128, PyTorch's own threads."""
    from onnx2torch import convert

    return torch_loop(convert(job.onnx).eval()), job.channels_last(), [128]


def torch_loop(model: Callable) -> Run:
    """Return a loop over batches."""
    import torch

    def run(images: np.ndarray, size: int) -> np.ndarray:
        with torch.inference_mode():
            return torch.cat([model(batch) for batch in torch.from_numpy(images).split(size)]).numpy()

    return run


def keras(job: Job) -> Contender:
    """Load Keras, on the backend of KERAS_BACKEND."""
    import keras

    model = keras.models.load_model(job.keras, compile=False)

    def run(images: np.ndarray, size: int) -> np.ndarray:
        return model.predict(images, batch_size=size, verbose=0)

    return run, job.channels_last(), [32, 128, 256, 1000]


def onnxruntime(job: Job, sessions: int = 1) -> Contender:
    """Load ONNX Runtime with its own threads, or as `sessions` single-threaded sessions side by side."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 0 if sessions == 1 else 1  # 0: as it likes, one a core
    loaded = [onnxruntime.InferenceSession(job.onnx, options) for _ in range(sessions)]
    name = loaded[0].get_inputs()[0].name

    def run(images: np.ndarray, size: int) -> np.ndarray:
        batches = [images[start : start + size] for start in range(0, len(images), size)]

        def share(index: int) -> list[np.ndarray]:
            return [loaded[index].run(None, {name: batch})[0] for batch in batches[index::sessions]]

        with ThreadPoolExecutor(sessions) as pool:
            outputs: list = [None] * len(batches)
            for index, found in enumerate(pool.map(share, range(sessions))):
                outputs[index::sessions] = found
        return np.concatenate(outputs)

    return run, job.channels_last(), [16, 32, 64, 100]


def onnxruntime_sessions(job: Job) -> Contender:
    """Load ONNX Runtime as one single-threaded session a core."""
    return onnxruntime(job, sessions=os.cpu_count() or 1)


def matrix_product(job: Job) -> Contender:
    """Return the limit: as many multiply-accumulates as the images need, as one large matrix product."""
    import torch

    a, b = torch.rand(2, 1024, 1024)
    products = torch.empty(1024, 1024)

    def run(images: np.ndarray, size: int) -> np.ndarray:
        with torch.inference_mode():
            for _ in range(round(len(images) * MULTIPLY_ACCUMULATES / 1024**3)):
                torch.mm(a, b, out=products)
        return np.zeros((len(images), 1), np.float32)

    return run, job.images, [1]


CONTENDERS = {  # its name in the tables: (what loads it, what it imports)
    "evaluate.py, BatchNorm folded": (evaluate_folded, ["torch"]),
    "evaluate.py, not folded": (evaluate_unfolded, ["torch"]),
    "plain NCHW PyTorch loop": (plain_loop, ["torch"]),
    "Keras predict": (keras, ["keras"]),
    "Keras predict, torch backend": (keras, ["keras"]),
    "ONNX Runtime, its own threads": (onnxruntime, ["onnxruntime"]),
    "ONNX Runtime, a session a core": (onnxruntime_sessions, ["onnxruntime"]),
    "tf2onnx and onnx2torch": (onnx2torch, ["onnx2torch"]),
    "the limit: a matrix product": (matrix_product, ["torch"]),
}


# --- The process of one contender ------------------------------------------------------------------------


class Server:
    """Answers the benchmark's requests: `start` once, `load` once, then `run` once a round."""

    def answer(self, request: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
        """Answer one request; whatever it raises is told in one line."""
        try:
            return getattr(self, request.pop("do"))(arrays, **request)
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error

    def start(self, arrays: dict, name: str) -> tuple[dict, dict]:
        """Import what the contender needs."""
        self.load_contender, modules = CONTENDERS[name]
        if name.endswith("torch backend"):
            os.environ["KERAS_BACKEND"] = "torch"
        for module in modules:
            importlib.import_module(module)
        return {"imports": peak_memory()}, {}

    def load(self, arrays: dict[str, np.ndarray], **job: object) -> tuple[dict, dict]:
        """Load the model, warm up, and find the fastest batch size."""
        self.contender, self.images, sizes = self.load_contender(Job(images=arrays["images"], **job))

        def trial(size: int) -> float:  # the first run of two may have to compile
            return min(self.timed(self.images[:TRIAL_IMAGES], size)[0] for _ in range(2))

        seconds = {size: trial(size) for size in sizes}
        self.batch_size = min(seconds, key=seconds.get)
        return {"batch_size": self.batch_size}, {}

    def run(self, arrays: dict) -> tuple[dict, dict[str, np.ndarray]]:
        """Run once over all images."""
        seconds, outputs = self.timed(self.images, self.batch_size)
        return {"seconds": seconds, "memory": peak_memory()}, {"classes": outputs.argmax(axis=1)}

    def timed(self, images: np.ndarray, batch_size: int) -> tuple[float, np.ndarray]:
        """Return the seconds of one run, and its outputs."""
        start = time.perf_counter()
        outputs = self.contender(images, batch_size)
        return time.perf_counter() - start, outputs

    def export(self, arrays: dict, keras_file: str, onnx_file: str) -> tuple[dict, dict]:
        """Write the Keras model as ONNX, with tf2onnx."""
        import keras
        import tf2onnx

        start = time.perf_counter()
        model = keras.models.load_model(keras_file, compile=False)
        tf2onnx.convert.from_keras(model, output_path=onnx_file)
        return {"seconds": time.perf_counter() - start}, {}


def peak_memory() -> float:
    """Return this process's peak resident memory so far, in MB.

    On Linux `ru_maxrss` begins with the peak of the process that started this one; VmHWM does not.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024 / 1e6


if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = "tensorflow"
    serve(Server().answer, refusals=(RuntimeError,))
