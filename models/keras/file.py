"""A Keras model file, and its layers in one form for all formats.

`read_keras_file` reads `.h5` whole models and weights of Keras 2 and 3, `.keras` archives and `.weights.h5`,
with h5py, json and zipfile: never through Keras, and without running code from them. It reads in a job
(`models/keras/reader.py`), because damaged bytes can crash the HDF5 library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models.common.cli import KerasFileError
from models.common.files import KERAS_FORMATS, detect_format, read_regular, refusal
from models.common.job import Job, JobError

# Largest file to read: a ResNet8 of width 256 has 20 million parameters, 80 MB, and its optimizer's state.
MAX_FILE_BYTES = 256 * 2**20

EXPECTED = "expected an HDF5 file or a .keras archive"
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
        """Whether it computes nothing at inference (a Flatten only changes the shape)."""
        linear = self.class_name == "Activation" and self.config.get("activation") == "linear"
        cast = self.class_name == "Cast" and self.config.get("dtype") in FLOATS
        return linear or cast or self.class_name == "Flatten" or self.class_name in TRAINING_LAYERS


@dataclass(frozen=True)
class KerasFile:
    """A Keras model file: its bytes, and its layers in graph order (a layer follows all its inputs).

    A file of weights alone has no graph: its layers are the groups of tensors in saved order, with a name and
    arrays only. `place_weights` (`models/conversion/match.py`) adds the graph.
    """

    path: Path
    sha256: str
    content: bytes
    format: str  # for people, such as "Keras 2.4.0 .h5 whole model"
    keras_version: str | None
    config: dict | None  # the checked configuration; None for weights alone
    layers: tuple[Layer, ...]  # the first is the InputLayer, the last is the output
    assumed: str | None = None  # properties assumed for weights alone; None for a whole model
    names_tensors: bool = True  # False: weights alone whose arrays are named "0", "1", ... in saved order

    @property
    def input_shape(self) -> list[int | None]:
        """The model's input shape, [height, width, channels]; height and width may be None: any.

        Raises KerasFileError when the input is no image.
        """
        config = self.layers[0].config
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        is_image = isinstance(shape, list) and len(shape) == 4 and shape[3] is not None
        sizes = [size for size in shape[1:] if size is not None] if is_image else [0]
        if not all(isinstance(size, int) and 0 < size <= 1024 for size in sizes):
            raise KerasFileError(f"the input's shape is {shape}, expected (None, height, width, channels)")
        return shape[1:]

    @property
    def output_layer(self) -> Layer:
        """The layer that computes the output."""
        return next(layer for layer in reversed(self.layers) if not layer.is_identity)

    @property
    def returns_probabilities(self) -> bool:
        """Whether the output is a softmax's; otherwise it is logits."""
        output = self.output_layer
        return output.class_name == "Softmax" or output.config.get("activation") == "softmax"

    @property
    def notes(self) -> list[str]:
        """Notes for the user: assumptions, and dtypes other than float32."""
        arrays = [array for layer in self.layers for array in layer.arrays.values()]
        stored = {str(array.dtype) for array in arrays if array.dtype.kind == "f"} - {"float32"}
        policies = set()
        for layer in self.layers[1:]:  # an input's dtype is no policy: pixels may be uint8
            policy = layer.config.get("dtype", "float32")
            if isinstance(policy, dict) and isinstance(policy.get("config"), dict):  # as Keras 3 writes it
                policy = policy["config"].get("name")
            policies.add(f"{policy!s:.40}")
        notes, dtype = [self.assumed] if self.assumed else [], self.layers[0].config.get("dtype")
        if dtype in HALF_FLOATS:
            notes.append(f"{dtype} input: Keras rounds images to it (unless whole pixels), PyTorch does not")
        inputs = {"float64"} if dtype == "float64" else set()
        for kind, dtypes in ("input", inputs), ("weights", stored), ("dtype policy", policies - {"float32"}):
            notes += [f"{', '.join(sorted(dtypes))} {kind}, converted to float32"] if dtypes else []
        return notes


def read_keras_file(path: Path) -> KerasFile:
    """Read a Keras model or weights file; its content determines the format, not its name.

    Raises KerasFileError with one line, without the path, for a file that cannot be read, is damaged, or is
    not a Keras file.
    """
    try:
        found = detect_format(path)
        if reason := refusal(found, KERAS_FORMATS, EXPECTED):
            raise KerasFileError(reason)
        content = read_regular(path, MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KerasFileError(f"cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise KerasFileError(f"larger than {MAX_FILE_BYTES >> 20} MiB, not a ResNet8")
    return read_keras_content(path, content)


def read_keras_content(path: Path, content: bytes) -> KerasFile:
    """Read the content of a file that is, or will be, at `path`, as `read_keras_file` does."""
    try:
        arrays = {"content": np.frombuffer(content, np.uint8)}
        answer, arrays = Job("models.keras.reader").run({}, arrays)
    except JobError as error:
        reason = f"damaged: the HDF5 library fails on it ({error})" if error.crashed else str(error)
        raise KerasFileError(reason) from None
    layers = unpack_layers(answer.pop("layers"), arrays)
    sha256 = hashlib.sha256(content).hexdigest()
    return KerasFile(path=path, sha256=sha256, content=content, layers=layers, **answer)


def pack_layers(layers: Iterable[Layer]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Return layers as a job sends them: a JSON list, and arrays named `INDEX:VARIABLE`."""
    described, arrays = [], {}
    for index, layer in enumerate(layers):
        described.append({**vars(layer), "arrays": list(layer.arrays)})
        arrays.update({f"{index}:{variable}": array for variable, array in layer.arrays.items()})
    return described, arrays


def unpack_layers(described: list[dict], arrays: dict[str, np.ndarray]) -> tuple[Layer, ...]:
    """Return the layers from which `pack_layers` made this."""
    layers = []
    for index, layer in enumerate(described):
        own = {variable: arrays[f"{index}:{variable}"] for variable in layer["arrays"]}
        layers.append(Layer(**{**layer, "inputs": tuple(layer["inputs"]), "arrays": own}))
    return tuple(layers)


def check_values(layers: Iterable[Layer]) -> None:
    """Raise KerasFileError, which names the layer, for a NaN or infinite value, or a negative variance."""
    for layer in layers:
        for variable, array in layer.arrays.items():
            if not np.isfinite(array).all():
                raise KerasFileError(f"layer '{layer.name}': {variable} has values that are NaN or infinite")
            if variable in ("moving_variance", "variance") and (array < 0).any():
                raise KerasFileError(f"layer '{layer.name}': {variable} is negative ({array.min():g})")


def running_number(name: str) -> tuple[str, int]:
    """Return ("conv2d", 3) for `conv2d_3`, and ("conv2d", 0) for `conv2d`."""
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdecimal() else (name, 0)
