"""From a Keras file's layers to a PyTorch network: its size, its tensors by the mapping, and its input.

`matching.py` has told which layer is which, `models/mapping.py` has the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from models.common.errors import KerasFileError
from models.keras.file import KerasFile, Layer
from models.mapping import MAPPING
from models.resnet8 import ResNet8
from models.scaling import LARGEST, Scaling


def build_model(places: dict[str, Layer]) -> ResNet8:
    """Return a ResNet8 of the file's size, without memory for it."""
    conv1, norm, fc = places["conv1"], places["bn1"], places["fc"]
    kernels = {layer.name: layer.arrays.get("kernel", np.empty(0)) for layer in (conv1, fc)}
    if kernels[conv1.name].ndim != 4 or kernels[fc.name].ndim != 2:
        raise KerasFileError(
            f"layers '{conv1.name}' and '{fc.name}': kernels with 4 and 2 axes were expected"
        )
    with torch.device("meta"):  # a file can claim any width: only `load_tensors` allocates
        return ResNet8(
            num_classes=kernels[fc.name].shape[1],
            width=kernels[conv1.name].shape[3],
            in_channels=kernels[conv1.name].shape[2],
            bn_eps=norm.config["epsilon"],
            bn_momentum=round(1 - norm.config["momentum"], 12),
        )


@dataclass(frozen=True)
class Row:
    """One tensor's way from Keras to PyTorch."""

    layer: str
    variable: str
    axes: tuple[int, ...]  # axis i of the PyTorch tensor is axis axes[i] of the Keras tensor
    key: str
    source: np.ndarray | None  # None: the layer has no such variable, the tensor is constant
    absent: float | None  # then: what Keras computes with
    shape: tuple[int, ...]  # PyTorch's

    def tensor(self) -> np.ndarray:
        """Return the PyTorch tensor, float32. Raises KerasFileError if a value does not fit float32."""
        if self.source is None:
            return np.full(self.shape, self.absent, np.float32)
        with np.errstate(over="ignore"):
            array = self.source.transpose(self.axes).astype(np.float32)
        if not np.isfinite(array).all():
            raise KerasFileError(f"layer '{self.layer}': {self.variable} holds values too large for float32")
        return np.ascontiguousarray(array)


def map_tensors(places: dict[str, Layer], model: ResNet8) -> list[Row]:
    """Return the mapping, row by row. Raises KerasFileError naming the row whose shape does not fit."""
    state, rows = model.state_dict(), []
    for place, layer in places.items():
        for name, parameter, axes, _, absent in MAPPING.get(layer.class_name, ()):
            key, source = f"{place}.{parameter}", layer.arrays.get(name)
            shape = tuple(state[key].shape)
            if source is not None and (
                source.ndim != len(axes) or tuple(source.shape[axis] for axis in axes) != shape
            ):
                expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
                raise KerasFileError(
                    f"layer '{layer.name}': {name} has shape {source.shape}, expected {expected} ({key})"
                )
            rows.append(Row(layer.name, name, axes, key, source, absent, shape))
    return rows


def load_tensors(model: ResNet8, rows: list[Row]) -> None:
    """Load every row's tensor into the network; `num_batches_tracked`, which has no row, is 0."""
    tensors = {row.key: torch.from_numpy(row.tensor()) for row in rows}
    untracked = {key: torch.tensor(0) for key in model.state_dict() if key not in tensors}
    model.load_state_dict({**untracked, **tensors}, assign=True)


def input_normalization(file: KerasFile, places: dict[str, Layer], keras_input: Scaling) -> Scaling:
    """Return the scaling that takes a pixel to what conv1 reads.

    `keras_input` takes it to what the Keras model reads; its own Rescaling and Normalization layers come on
    top. Formulas: keras.io/api/layers/preprocessing_layers, numerical/normalization and
    image_preprocessing/rescaling. Raises KerasFileError when a layer is no scaling a channel.
    """

    def as_float32(values: object) -> np.ndarray:  # Keras rounds these numbers, whatever it computes in
        return np.asarray(values, np.float32).astype(np.float64)

    mean, std = np.asarray(keras_input.mean, np.float64), np.asarray(keras_input.std, np.float64)
    channels = (file.input_shape[2],)
    for layer in file.layers[: file.layers.index(places["input"]) + 1]:
        try:
            if layer.class_name == "Rescaling":
                scale, offset = (as_float32(layer.config[key]) for key in ("scale", "offset"))
                with np.errstate(all="ignore"):  # a scale of 0 is refused below
                    mean, std = mean - offset * std / scale, std / scale
            elif layer.class_name == "Normalization":
                values = layer.arrays or layer.config
                deviation = np.maximum(np.sqrt(as_float32(values["variance"]).ravel()), 1e-7)
                mean, std = mean + as_float32(values["mean"]).ravel() * std, std * deviation
            mean, std = np.broadcast_to(mean, channels), np.broadcast_to(std, channels)
        except (KeyError, TypeError, ValueError):
            raise KerasFileError(
                f"layer '{layer.name}' ({layer.class_name}): not a scaling a channel"
            ) from None
    if not (np.abs([mean, std]) <= LARGEST).all() or not std.all():
        raise KerasFileError(f"the input scaling comes to mean {mean.tolist()} and std {std.tolist()}")
    return Scaling(mean.tolist(), std.tolist())
