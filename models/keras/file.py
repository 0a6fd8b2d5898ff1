"""A Keras model file, and its layers in one form, whatever its format.

`read_keras_file` takes `.h5` whole models and weights of Keras 2 and 3, `.keras` archives, `.weights.h5`.
They are read with h5py, json and zipfile: never through Keras, and running no code from them. The reading
happens in a process of its own (`models/keras/reader.py`), because damaged bytes can crash the HDF5 library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.files import read_regular
from models.common.errors import KerasFileError
from models.common.kinds import Kind, kind_of, refusal
from models.keras.worker import Worker, WorkerError

# What is read at most. A ResNet8 of width 256 has 20 million parameters: 80 MB, and its optimizer's state.
MAX_FILE_BYTES = 256 * 2**20
NO_KERAS_FILE = "neither an HDF5 file nor a .keras archive"
MAX_SECONDS = 15  # damage can make the HDF5 library loop for ever

# Layers that do nothing at inference.
TRAINING_LAYERS = set(
    """
    Dropout SpatialDropout2D GaussianNoise GaussianDropout AlphaDropout ActivityRegularization
    RandomFlip RandomRotation RandomTranslation RandomZoom RandomContrast RandomBrightness
    RandomHeight RandomWidth RandomErasing RandomHue RandomSaturation RandomSharpness
    """.split()
)
HALF_FLOATS = ("float16", "bfloat16")
FLOATS = (*HALF_FLOATS, "float32", "float64")  # Keras 3.5 to 3.8 casts to the dtype of its policy


@dataclass(frozen=True)
class Layer:
    """One layer of the graph. A layer of a nested model is named `model/layer`."""

    name: str
    class_name: str
    config: dict
    inputs: tuple[str, ...]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # by variable; as stored, in Keras's layout

    @property
    def is_identity(self) -> bool:
        """Whether it computes nothing at inference (a Flatten only says the same in another shape)."""
        linear = self.class_name == "Activation" and self.config.get("activation") == "linear"
        cast = self.class_name == "Cast" and self.config.get("dtype") in FLOATS
        return linear or cast or self.class_name == "Flatten" or self.class_name in TRAINING_LAYERS


@dataclass(frozen=True)
class KerasFile:
    """A Keras model file: its bytes, and its layers in graph order (a layer follows all its inputs).

    A file that holds weights alone says nothing of a graph. As it is read, its layers are the groups of
    tensors in saved order: they have a name and arrays, and no more. `placing.py` gives them places.
    """

    path: Path
    sha256: str
    content: bytes
    format: str  # what a person reads, such as "Keras 2.4.0 .h5 whole model"
    keras_version: str | None
    config: dict | None  # the checked configuration; None when the file has only weights
    layers: tuple[Layer, ...]  # the first is the InputLayer, the last is the output
    assumed: str | None = None  # what the file does not say and was assumed; None for a whole model
    names_tensors: bool = True  # False: weights alone whose arrays go by "0", "1", ... in saved order

    @property
    def input_shape(self) -> list[int | None]:
        """The model's input shape, [height, width, channels]; height and width may be None: any.

        Raises KerasFileError when the input is no image.
        """
        config = self.layers[0].config
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        is_image = isinstance(shape, list) and len(shape) == 4 and isinstance(shape[3], int)
        if not is_image or not all(
            size is None or (isinstance(size, int) and 0 < size <= 1024) for size in shape[1:]
        ):
            raise KerasFileError(f"the input's shape is {shape}, expected (None, height, width, channels)")
        return shape[1:]

    @property
    def output_layer(self) -> Layer:
        """The layer that computes the output."""
        return next(layer for layer in reversed(self.layers) if not layer.is_identity)

    @property
    def returns_probabilities(self) -> bool:
        """Whether the output has been through a softmax; otherwise it is logits."""
        output = self.output_layer
        return output.class_name == "Softmax" or output.config.get("activation") == "softmax"

    @property
    def notes(self) -> list[str]:
        """What is to be said of the file: what was assumed, and what of it is not float32."""
        arrays = [
            array for layer in self.layers for array in layer.arrays.values() if array.dtype.kind == "f"
        ]
        stored = {str(array.dtype) for array in arrays} - {"float32"}
        policies = set()
        for layer in self.layers[1:]:  # an input's dtype is no policy: pixels may be uint8
            policy = layer.config.get("dtype", "float32")
            if isinstance(policy, dict) and isinstance(policy.get("config"), dict):  # as Keras 3 writes it
                policy = policy["config"].get("name")
            policies.add(f"{policy!s:.40}")
        policies -= {"float32"}
        notes = [self.assumed] if self.assumed else []
        fed = self.layers[0].config.get("dtype")
        if fed in HALF_FLOATS:
            notes.append(f"{fed} input: Keras rounds what it is fed (not whole pixels), PyTorch does not")
        if fed == "float64":
            notes.append("float64 input, converted to float32")
        notes += [f"{', '.join(sorted(stored))} weights, converted to float32"] if stored else []
        return notes + (
            [f"dtype policy {', '.join(sorted(policies))}, converted to float32"] if policies else []
        )


def start_reader() -> Worker:
    """Start the process that `read_keras_file` needs."""
    return Worker("models.keras.reader")


def read_keras_file(path: Path, reader: Worker) -> KerasFile:
    """Read a Keras model or weights file of any format; its kind is told from its content.

    Raises KerasFileError with one line, which does not name the file, when it cannot be read, is damaged, or
    is not what it should be.
    """
    try:
        if kind_of(path) is Kind.SAVED_MODEL:
            raise KerasFileError(refusal(Kind.SAVED_MODEL, NO_KERAS_FILE))
        content = read_regular(path, MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KerasFileError(f"cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise KerasFileError(f"larger than {MAX_FILE_BYTES >> 20} MiB, no ResNet8")
    return read_keras_content(path, content, reader)


def read_keras_content(path: Path, content: bytes, reader: Worker) -> KerasFile:
    """Do what `read_keras_file` does, for the content of a file that is, or will be, at `path`."""
    try:
        reply, arrays = reader.ask({}, {"content": np.frombuffer(content, np.uint8)}, timeout=MAX_SECONDS)
    except WorkerError as error:
        reason = f"damaged: the HDF5 library fails on it ({error})" if error.status else error
        raise KerasFileError(str(reason)) from None
    layers = unpack_layers(reply.pop("layers"), arrays)
    sha256 = hashlib.sha256(content).hexdigest()
    return KerasFile(path=path, sha256=sha256, content=content, layers=layers, **reply)


def pack_layers(layers: Iterable[Layer]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Return layers as a process sends them: a JSON list, and the arrays by `index of the layer:variable`."""
    layers = list(layers)
    return [{**vars(layer), "arrays": list(layer.arrays)} for layer in layers], {
        f"{index}:{variable}": array
        for index, layer in enumerate(layers)
        for variable, array in layer.arrays.items()
    }


def unpack_layers(described: list[dict], arrays: dict[str, np.ndarray]) -> tuple[Layer, ...]:
    """Return the layers of which `pack_layers` made this."""
    return tuple(
        Layer(
            **{**layer, "inputs": tuple(layer["inputs"])}
            | {"arrays": {variable: arrays[f"{index}:{variable}"] for variable in layer["arrays"]}}
        )
        for index, layer in enumerate(described)
    )


def check_values(layers: Iterable[Layer]) -> None:
    """Raise KerasFileError, naming the layer, for a value that is NaN or infinite, or a negative variance."""
    for layer in layers:
        for variable, array in layer.arrays.items():
            if not np.isfinite(array).all():
                raise KerasFileError(f"layer '{layer.name}': {variable} has values that are NaN or infinite")
            if variable in ("moving_variance", "variance") and (array < 0).any():
                raise KerasFileError(f"layer '{layer.name}': {variable} is negative ({array.min():g})")


def running_number(name: str) -> tuple[str, int]:
    """Return `conv2d_3` as ("conv2d", 3), and `conv2d` as ("conv2d", 0)."""
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdecimal() else (name, 0)
