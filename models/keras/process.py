"""Keras, running elsewhere: the side that asks. `models/keras/server.py` answers."""

from __future__ import annotations

import sys
from dataclasses import asdict

import numpy as np

from models.keras.file import KerasFile, Layer, pack_layers
from models.keras.worker import Worker
from models.scaling import Scaling


class KerasProcess(Worker):
    """A Keras that runs elsewhere. It starts at once, and loads one model at a time."""

    def __init__(self, python: str = sys.executable) -> None:
        """Start it; raises WorkerError if `python` cannot be run."""
        super().__init__("models.keras.server", python)

    def load(self, file: KerasFile) -> dict:
        """Load a model, as float32 and as float64 arithmetic with its weights in float32.

        The answer holds `keras` (its version), `trainable` and `statistics` (numbers of parameters), and
        `rebuilt`: None when Keras read the file by itself, else why it could not, and was given the graph
        and the arrays that our reader had found. Raises WorkerError when Keras is missing or fails.
        """
        layers, arrays = pack_layers(file.layers)
        request = {"do": "load", "config": file.config, "layers": layers}
        return self.ask(request, {"content": np.frombuffer(file.content, np.uint8), **arrays})[0]

    def activations(self, images: np.ndarray, scaling: Scaling, dtype: str) -> dict[str, np.ndarray]:
        """Return every layer's output, by layer name (`model/layer` in a nested model), channels last.

        `images` is (N, C, H, W), uint8 or float64 pixels, which are scaled in float64. `dtype`, float32 or
        float64, is what the model computes in. Raises WorkerError when Keras fails.
        """
        request = {"do": "activations", "scaling": asdict(scaling), "dtype": dtype}
        return self.ask(request, {"images": images})[1]

    def predict(
        self, images: np.ndarray, scaling: Scaling, dtype: str = "float32", logits_of: Layer | None = None
    ) -> np.ndarray:
        """Return the model's (N, classes) outputs, for images as `activations` takes them, and faster.

        `logits_of` is the output layer when its softmax is to be left out.
        """
        request = {"do": "predict", "scaling": asdict(scaling), "dtype": dtype}
        request |= {"logits_of": logits_of.name} if logits_of else {}
        return self.ask(request, {"images": images})[1]["outputs"]

    def build(self, layers: list[Layer], suffix: str) -> bytes:
        """Return the content of the model file that Keras writes for a graph and its arrays.

        `suffix` is .h5 or .keras. Raises WorkerError when Keras is missing or fails.
        """
        described, arrays = pack_layers(layers)
        request = {"do": "build", "layers": described, "suffix": suffix}
        return self.ask(request, arrays)[1]["content"].tobytes()
