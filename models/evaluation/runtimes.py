"""Networks of other formats, as something to evaluate: TensorFlow Lite, ONNX and torch.export's `.pt2`.

Their libraries run them in a process of its own (`runner.py`, which says what each may run). What a network
takes, its layout, dtype and quantization, is read from the file; what it is fed stands in the JSON of its
name, as for a `.pt`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cifar10 import Dataset, calibration_indices
from data.files import sha256_of
from models.common.kinds import RUNTIMES, Kind, kind_of
from models.evaluation.baseline import log_softmax
from models.evaluation.metrics import Predictions
from models.files.metadata import read_metadata
from models.keras.worker import Worker, WorkerError
from models.scaling import Scaling

if TYPE_CHECKING:
    import torch

    from models.checkpoint import Checkpoint

MAX_SECONDS = 120  # for a batch, or the start of a library; no network here comes near it
# Probabilities of 10 classes sum to 1 but for their rounding: half a step each, or what float16 loses.
MAX_FLOAT_ERROR = 0.01


def start_runner(paths: list[Path]) -> AbstractContextManager[Worker | None]:
    """Start the process that networks of other formats need, if one of the files is such. Raises OSError."""
    needed = any(kind_of(path) in RUNTIMES for path in paths)
    return Worker("models.evaluation.runner") if needed else nullcontext()


class Runtime:
    """A network of another format: a function of a (N, C, H, W) float32 batch, its input's real values.

    It returns (N, classes) float64 outputs, dequantized, and is called from one thread at a time. One is open
    at a time: a new one takes the place of the last.
    """

    def __init__(self, path: Path, kind: Kind, image_shape: tuple[int, ...], runner: Worker) -> None:
        """Open it for images of shape (C, H, W). Raises ValueError with one line."""
        self.path, self.runner = path, runner
        answer, _ = self._ask({"kind": kind.name, "path": str(path.absolute())}, {})
        self.format, self.takes, self.returns = (answer[name] for name in ("format", "takes", "returns"))
        channels, *size = image_shape
        layouts = {"NCHW": [channels, *size], "NHWC": [*size, channels]}
        fits = [name for name, shape in layouts.items() if _fits(self.takes["shape"][1:], shape)]
        if len(self.takes["shape"]) != 4 or not fits:
            takes = f"takes images of shape {self.takes['shape'][1:]}"
            raise ValueError(f"{path}: {takes}, CIFAR-10's are {list(image_shape)}")
        self.layout = fits[0]
        self.classes = self(np.zeros((1, *image_shape), np.float32)).shape[1]

    def __call__(self, batch: torch.Tensor | np.ndarray) -> np.ndarray:
        """Return the outputs. Raises ValueError with one line."""
        real = np.asarray(batch)  # of the CPU
        real = real.transpose(0, 2, 3, 1) if self.layout == "NHWC" else real
        _, arrays = self._ask({}, {"images": _stored(real, **self.takes)})
        outputs = arrays["outputs"]
        if outputs.ndim < 2 or outputs.size != len(outputs) * outputs.shape[1]:
            raise ValueError(f"{self.path}: the network's outputs have shape {outputs.shape}")
        return _real(outputs.reshape(len(outputs), -1), **self.returns)

    def log_probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Return what `log_probabilities` makes of the outputs."""
        return log_probabilities(outputs, self.returns["scale"] or 0)

    def _ask(self, request: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
        try:
            return self.runner.ask(request, arrays, timeout=MAX_SECONDS)
        except WorkerError as error:
            reason = f"damaged: its library fails on it ({error})" if error.status else error
            raise ValueError(f"{self.path}: {reason}") from None


def log_probabilities(outputs: np.ndarray, step: float = 0) -> np.ndarray:
    """Return the logarithms of (N, classes) probabilities, or of what logits are; float64.

    Outputs from 0 to 1 that sum to 1, but for their rounding to multiples of `step`, are probabilities. One
    that is rounded to 0 is taken as half a step, the most that it can have been (without steps as float32's
    smallest): its logarithm, and with it the loss, would be infinite.
    """
    error = np.abs(outputs.sum(axis=1) - 1).max()
    if outputs.min() < 0 or outputs.max() > 1 or error > max(MAX_FLOAT_ERROR, outputs.shape[1] * step / 2):
        return log_softmax(outputs)
    return np.log(np.maximum(outputs, step / 2 or np.finfo(np.float32).tiny))


def _fits(shape: list[int | None], needed: list[int]) -> bool:
    return len(shape) == len(needed) and all(n in (None, m) for n, m in zip(shape, needed, strict=True))


def _stored(real: np.ndarray, dtype: str, scale: float | None, zero_point: int, **_: object) -> np.ndarray:
    """Return real values as a network takes them: the nearest that its integers can say, or floats."""
    if np.dtype(dtype).kind not in "iu":
        return real.astype(dtype)
    limits = np.iinfo(dtype)
    steps = np.rint(real.astype(np.float64) / (scale or 1)) + zero_point
    return steps.clip(limits.min, limits.max).astype(dtype)


def _real(stored: np.ndarray, scale: float | None, zero_point: int, **_: object) -> np.ndarray:
    return (stored.astype(np.float64) - zero_point) * (scale or 1)


def read_runtime(path: Path, image_shape: tuple[int, ...], runner: Worker) -> Checkpoint:
    """Return a network of another format, and what the JSON of its name says of it.

    Raises OSError, or ValueError with one line.
    """
    from models.checkpoint import Checkpoint

    metadata = read_metadata(path)
    metadata.pop("sha256", None)  # that of a `.pt` of its name
    model = Runtime(path, kind_of(path), image_shape, runner)
    scaling = Scaling.given(image_shape[0]).updated(metadata.get("input", {}))
    return Checkpoint(path, model, sha256_of(path), scaling, metadata, read_as="")


def calibration_note(predictions: Predictions, dataset: Dataset) -> str:
    """Return an int8 file's accuracy on the images that MLPerf Tiny does not calibrate by; "" for others.

    An int8 network has most likely seen those when its steps were chosen.
    """
    if dataset.part or "int8" not in predictions.format:
        return ""
    others = np.delete(np.arange(len(dataset.labels)), calibration_indices())
    right = int((predictions.classes == dataset.labels)[others].sum())
    share = f"{100 * right / len(others):.2f} % ({right:,} of {len(others):,})"
    return f"{predictions.name}: {share} without MLPerf Tiny's 500 calibration images"
