"""Keras, running elsewhere: the side that asks. `models/keras/server.py` answers."""

from __future__ import annotations

import sys

import numpy as np

from models.keras.file import KerasFile
from models.worker import Worker


class KerasProcess:
    """A Keras that runs elsewhere. It starts at once, and loads one model at a time."""

    def __init__(self, python: str = sys.executable) -> None:
        """Start it; raises WorkerError if `python` cannot be run."""
        self.worker = Worker("models.keras.server", python)

    def load(self, file: KerasFile) -> dict:
        """Load a model, as float32 and as float64 arithmetic with its weights in float32.

        The answer holds `keras` (its version), `trainable` and `statistics` (numbers of parameters), and
        `rebuilt`: None when Keras read the file by itself, else why it could not, and was given the graph
        and the arrays that our reader had found. Raises WorkerError when Keras is missing or fails.
        """
        arrays = {
            f"{layer.name}:{variable}": array
            for layer in file.layers
            for variable, array in layer.arrays.items()
        }
        graph = [(layer.name, layer.class_name, layer.config, layer.inputs) for layer in file.layers]
        request = {"do": "load", "config": file.config, "graph": graph}
        return self.worker.ask(request, {"content": np.frombuffer(file.content, np.uint8), **arrays})[0]

    def activations(
        self,
        images: np.ndarray,
        mean: list[float],
        std: list[float],
        dtype: str,
        layers: list[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return every layer's output, by layer name (`model/layer` in a nested model), channels last.

        `images` is (N, C, H, W), uint8 or float64 pixels; the model is fed (images - mean) / std, computed in
        float64, with a value a channel. `dtype`, float32 or float64, is what the model computes in; `layers`
        names the only ones to return. Raises WorkerError when Keras fails.
        """
        request = {"do": "activations", "mean": mean, "std": std, "dtype": dtype, "layers": layers}
        return self.worker.ask(request, {"images": images})[1]

    def close(self) -> None:
        """End the process."""
        self.worker.close()

    def __enter__(self) -> KerasProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
