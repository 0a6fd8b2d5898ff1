"""Stages of a conversion in either direction, each printed when it passes or fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from models.common.cli import KerasFileError, VerificationError, echo
from models.common.job import Message
from models.conversion.match import match_graph
from models.conversion.verify import USUAL_ACTIVATION, compare_numbers, format_results, probe_images
from models.graph import KNOWN_FILES, KNOWN_WIDTHS
from models.keras.file import KerasFile, Layer
from models.mapping import MAPPING
from models.normalization import LIMIT, Normalization
from models.resnet8 import ResNet8

# Keras's answer for the two arrays of `probe_images` and the input normalization
Reference = Callable[[np.ndarray, np.ndarray, Normalization], Message]

MAX_NORMALIZATION_DIFFERENCE = 1e-6  # relative: Keras stores a Rescaling's numbers in float32


@dataclass(frozen=True)
class Conversion:
    """A network equal to a Keras file, both input normalizations, and the verification's results."""

    model: ResNet8
    keras_input: Normalization
    pytorch_input: Normalization
    results: dict | None  # None: not verified


def verify(
    file: KerasFile,
    mean: list[float] | None,
    std: list[float] | None,
    reference: Reference | None,
    verbose: bool = False,
    model: ResNet8 | None = None,
) -> Conversion:
    """Match a Keras file to the network, map its tensors, and compare both layer by layer.

    `mean` and `std` are the Keras model's input normalization. The network is built from the file; if `model`
    is given, the file was written from it, and their tensors must be equal bit for bit. Without `reference`
    no numbers are compared. Raises KerasFileError, VerificationError or JobError.
    """
    with stage("layers") as lines:
        matched = match_graph(file)
        is_back, model = model is not None, model or build_model(matched)
        print_known(file, model)
        weighted = sum(layer.class_name in MAPPING for layer in matched.values())
        total = len(matched) - 1  # without the input
        lines.append(f"{total} layers: {weighted} with weights, {total - weighted} without")

    keras_input = Normalization.from_args(model.conv1.in_channels, mean, std)
    pytorch_input = input_normalization(file, matched, keras_input)

    with stage("shapes") as lines:
        mapping = map_tensors(matched, model)
        lines.append(f"{len(mapping)} tensors")
        if is_back:
            compare_tensors(mapping, model)
            lines[0] += ", equal to the checkpoint's bit for bit"
    if verbose:
        print_mapping(mapping)

    images, others = probe_images(file.input_shape)
    answer, arrays = reference(images, others, keras_input) if reference else (None, {})
    with stage("parameters") as lines:
        lines.append(compare_counts(mapping, model, answer))
    if not is_back:
        load_tensors(model, mapping)

    if answer is None:
        echo("  outputs     not verified (--no-verify)")
        return Conversion(model, keras_input, pytorch_input, None)
    with stage("outputs") as lines:
        differences = compare_numbers(file, matched, model, images, others, pytorch_input, arrays)
        results = {"keras": answer["keras"], "rebuilt": answer["rebuilt"], **differences}
        lines += format_results(results)
        if results["largest_activation"] > USUAL_ACTIVATION and pytorch_input.is_identity:
            lines.append("was the model trained on pixels / 255? then convert it with --std 255")
    return Conversion(model, keras_input, pytorch_input, results)


@contextmanager
def stage(name: str) -> Iterator[list[str]]:
    """Print a stage as passed, with the lines appended to the yielded list, or as failed."""
    lines: list[str] = []
    try:
        yield lines
    except Exception:
        echo(f"  {name:<11} failed")
        raise
    for index, line in enumerate(lines):
        echo((f"  {name:<11} passed  {line}" if index == 0 else f"{'':22}{line}").rstrip())


def build_model(matched: dict[str, Layer]) -> ResNet8:
    """Return a ResNet8 with the file's width, classes, channels and BatchNorm constants, without memory."""
    conv1, norm, fc = matched["conv1"], matched["bn1"], matched["fc"]
    kernels = [layer.arrays.get("kernel", np.empty(0)) for layer in (conv1, fc)]
    if [kernel.ndim for kernel in kernels] != [4, 2]:
        raise KerasFileError(f"layers '{conv1.name}' and '{fc.name}': expected kernels with 4 and 2 axes")
    with torch.device("meta"):  # allocates nothing: the width in a file may be arbitrarily large
        return ResNet8(
            num_classes=kernels[1].shape[1],
            width=kernels[0].shape[3],
            in_channels=kernels[0].shape[2],
            bn_eps=norm.config["epsilon"],
            bn_momentum=round(1 - norm.config["momentum"], 12),
        )


@dataclass(frozen=True)
class TensorMapping:
    """One row of the mapping: a Keras variable and its PyTorch tensor."""

    layer: str  # Keras layer name
    variable: str
    axes: tuple[int, ...]  # axis i of the PyTorch tensor is axis axes[i] of the Keras tensor
    key: str  # in the state_dict
    keras_array: np.ndarray | None  # None: the layer lacks the variable, the tensor is constant
    default: float | None  # the constant
    shape: tuple[int, ...]  # of the PyTorch tensor

    def tensor(self) -> np.ndarray:
        """Return the PyTorch tensor, float32. Raises KerasFileError for a value above float32's range."""
        if self.keras_array is None:
            return np.full(self.shape, self.default, np.float32)
        with np.errstate(over="ignore"):
            array = self.keras_array.transpose(self.axes).astype(np.float32)
        if not np.isfinite(array).all():
            raise KerasFileError(f"layer '{self.layer}': {self.variable} has values too large for float32")
        return np.ascontiguousarray(array)


def map_tensors(matched: dict[str, Layer], model: ResNet8) -> list[TensorMapping]:
    """Return the mapping of all tensors. Raises KerasFileError for a wrong shape, naming layer and tensor."""
    state, mapping = model.state_dict(), []
    for node, layer in matched.items():
        for name, parameter, axes, _, default in MAPPING.get(layer.class_name, ()):
            key, array = f"{node}.{parameter}", layer.arrays.get(name)
            shape = tuple(state[key].shape)
            expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
            if array is not None and array.shape != expected:
                raise KerasFileError(
                    f"layer '{layer.name}': {name} has shape {array.shape}, expected {expected} ({key})"
                )
            mapping.append(TensorMapping(layer.name, name, axes, key, array, default, shape))
    return mapping


def load_tensors(model: ResNet8, mapping: list[TensorMapping]) -> None:
    """Load all mapped tensors into the network; `num_batches_tracked`, which Keras lacks, becomes 0."""
    tensors = {row.key: torch.from_numpy(row.tensor()) for row in mapping}
    untracked = {key: torch.tensor(0) for key in model.state_dict() if key not in tensors}
    model.load_state_dict({**untracked, **tensors}, assign=True)


def compare_tensors(mapping: list[TensorMapping], model: ResNet8) -> None:
    """Raise VerificationError unless every mapped tensor equals the network's bit for bit."""
    state = model.state_dict()
    for row in mapping:
        if not np.array_equal(row.tensor(), state[row.key].numpy()):
            raise VerificationError(f"{row.key} differs from {row.variable} of Keras layer '{row.layer}'")


def compare_counts(mapping: list[TensorMapping], model: ResNet8, answer: dict | None) -> str:
    """Compare the parameter counts of both networks; return them as text.

    Keras's counts are from its answer, without Keras from the file. Constants instead of variables missing in
    the file are counted for PyTorch alone. Raises VerificationError if counts differ.
    """
    stored = [row for row in mapping if row.keras_array is not None]
    statistics = sum(row.keras_array.size for row in stored if row.variable.startswith("moving_"))
    keras = (sum(row.keras_array.size for row in stored) - statistics, statistics)
    if answer:
        keras = (answer["trainable"], answer["statistics"])
    constants = sum(int(np.prod(row.shape)) for row in mapping if row.keras_array is None)
    trainable, statistics = count_parameters(model)
    if (trainable - constants, statistics) != keras:
        raise VerificationError(
            f"Keras has {keras[0]:,} trainable parameters and {keras[1]:,} statistics, "
            f"PyTorch {trainable - constants:,} and {statistics:,}"
        )
    added = f", and {constants:,} constants for variables missing in Keras" if constants else ""
    return f"{keras[0]:,} trainable + {keras[1]:,} statistics = {sum(keras):,}, in both networks{added}"


def count_parameters(model: ResNet8) -> tuple[int, int]:
    """Return the numbers of trainable parameters and of running statistics."""
    statistics = [b for name, b in model.named_buffers() if not name.endswith("num_batches_tracked")]
    return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in statistics)


def check_normalization(actual: Normalization, expected: Normalization) -> None:
    """Raise VerificationError if a Rescaling layer differs from a normalization by more than rounding."""
    values = [[*each.mean, *each.std] for each in (actual, expected)]
    if not np.allclose(*values, rtol=MAX_NORMALIZATION_DIFFERENCE, atol=0):
        raise VerificationError(f"Rescaling layer has mean and std {values[0]}, expected {values[1]}")


def input_normalization(
    file: KerasFile, matched: dict[str, Layer], keras_input: Normalization
) -> Normalization:
    """Return the PyTorch network's input normalization.

    It is the Keras model's, `keras_input`, followed by the file's own Rescaling and Normalization layers.
    Formulas: keras.io/api/layers/preprocessing_layers, numerical/normalization and
    image_preprocessing/rescaling. Raises KerasFileError for a layer that is not one scale per channel.
    """

    def as_float32(values: object) -> np.ndarray:  # Keras rounds these numbers in every dtype policy
        return np.asarray(values, np.float32).astype(np.float64)

    mean, std = np.asarray(keras_input.mean, np.float64), np.asarray(keras_input.std, np.float64)
    channels = (file.input_shape[2],)
    for layer in file.layers[: file.layers.index(matched["input"]) + 1]:
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
                f"layer '{layer.name}' ({layer.class_name}): expected one scale per channel"
            ) from None
    if not (np.abs([mean, std]) <= LIMIT).all() or not std.all():
        raise KerasFileError(f"input normalization with mean {mean.tolist()} and std {std.tolist()}")
    return Normalization(mean.tolist(), std.tolist())


def print_known(file: KerasFile, model: ResNet8) -> None:
    """Print the published model that a file is, by SHA-256, or resembles, by its shape."""
    width, shape = model.conv1.out_channels, (model.fc.out_features, *file.input_shape)
    if width in KNOWN_WIDTHS and shape == (10, 32, 32, 3):
        name, macs = KNOWN_WIDTHS[width]
        title = KNOWN_FILES.get(file.sha256) or f"width {width}: the architecture of {name}"
        echo(f"  {title}; {macs / 1e6:.1f} M multiply-accumulates")


def print_mapping(mapping: list[TensorMapping]) -> None:
    """Print a heading per layer (Keras name -> PyTorch name) and a row per tensor.

    A row has the Keras variable, its shape and axis order, and the PyTorch parameter and its shape.
    """
    layers = {}
    for row in mapping:
        if row.keras_array is None:
            shape, axes = "missing", f"= {row.default:g}"
        else:
            shape, axes = str(row.keras_array.shape), str(row.axes) if len(row.axes) > 1 else "as is"
        node, _, parameter = row.key.rpartition(".")
        cells = (row.variable, shape, axes, parameter, str(row.shape))
        layers.setdefault(f"{row.layer} -> {node}", []).append(cells)
    widths = [max(map(len, column)) for column in zip(*chain(*layers.values()), strict=True)]
    for heading, rows in layers.items():
        echo(f"  {heading}")
        for cells in rows:
            echo("    " + " ".join(map(str.ljust, cells, widths)).rstrip())
