"""Convert a Keras ResNet8 to PyTorch, and prove that nothing changed.

    python convert.py [KERAS_FILE ...] [-o OUT.pt]

reads the Keras file without running any of it, finds every layer's place by following the graph, permutes
the axes of its tensors into PyTorch's layout, compares every layer's activations with Keras's own, and writes
OUT.pt, a plain state_dict, and OUT.json, which says where it came from and what it wants to be fed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cifar10 import DataError, load_test
from data.files import write_files
from models.keras_file import TRAINING_LAYERS, KerasFile, KerasFileError, Layer, read_keras_file, start_reader
from models.keras_process import KerasProcess
from models.worker import Worker, WorkerError

if TYPE_CHECKING:
    import torch

    from models.resnet8 import ResNet8

# torch is imported where it is first needed: by then Keras and the reader are starting in their processes.

DEFAULT_INPUT = Path("checkpoints/resnet8_keras.h5")
DEFAULT_OUTPUT = Path("checkpoints/resnet8.pt")

# How far PyTorch may be from Keras. In float64 two right networks differ by rounding alone: 3e-13 was
# measured on the activations of the MLPerf Tiny model, 7e-15 on its probabilities.
MAX_ACTIVATION_DIFFERENCE = 1e-10  # float64
MAX_PROBABILITY_DIFFERENCE = {"float64": 1e-12, "float32": 1e-4}

# --- 1. The graph: what each layer of a ResNet8 is, and which layers it reads ---------------------------


def conv(kernel: int, stride: int) -> dict:
    """Return what a Conv2D must have. A 1x1 window needs no padding: 'valid' and 'same' are the same."""
    return {
        "class_name": ["Conv2D"],
        "kernel_size": [[kernel, kernel]],
        "strides": [[stride, stride]],
        "padding": ["same", "valid"] if kernel == 1 else ["same"],
        "dilation_rate": [[1, 1]],
        "groups": [1],
        "activation": ["linear", None],
        "data_format": ["channels_last", None],
    }


BATCH_NORM = {"class_name": ["BatchNormalization"], "axis": [-1, 3, [3], [-1]], "renorm": [False]}
RELU = {
    "class_name": ["ReLU", "Activation"],
    "activation": ["relu"],
    "max_value": [None],
    "negative_slope": [0],
    "threshold": [0],
}
ADD = {"class_name": ["Add"]}
POOL = {"class_name": ["GlobalAveragePooling2D", "AveragePooling2D"], "data_format": ["channels_last", None]}
DENSE = {"class_name": ["Dense"], "activation": ["softmax", "linear", None]}
SOFTMAX = {"class_name": ["Softmax", "Activation"], "activation": ["softmax"], "axis": [-1, [-1]]}

GRAPH = {
    # PyTorch's name: (what Keras's layer must be, the layers that it reads)
    "conv1": (conv(3, 1), ["input"]),
    "bn1": (BATCH_NORM, ["conv1"]),
    "relu": (RELU, ["bn1"]),
    "layer1.conv1": (conv(3, 1), ["relu"]),
    "layer1.bn1": (BATCH_NORM, ["layer1.conv1"]),
    "layer1.relu1": (RELU, ["layer1.bn1"]),
    "layer1.conv2": (conv(3, 1), ["layer1.relu1"]),
    "layer1.bn2": (BATCH_NORM, ["layer1.conv2"]),
    "layer1.add": (ADD, ["layer1.bn2", "relu"]),
    "layer1.relu2": (RELU, ["layer1.add"]),
    "layer2.conv1": (conv(3, 2), ["layer1.relu2"]),
    "layer2.bn1": (BATCH_NORM, ["layer2.conv1"]),
    "layer2.relu1": (RELU, ["layer2.bn1"]),
    "layer2.conv2": (conv(3, 1), ["layer2.relu1"]),
    "layer2.bn2": (BATCH_NORM, ["layer2.conv2"]),
    "layer2.downsample": (conv(1, 2), ["layer1.relu2"]),
    "layer2.add": (ADD, ["layer2.bn2", "layer2.downsample"]),
    "layer2.relu2": (RELU, ["layer2.add"]),
    "layer3.conv1": (conv(3, 2), ["layer2.relu2"]),
    "layer3.bn1": (BATCH_NORM, ["layer3.conv1"]),
    "layer3.relu1": (RELU, ["layer3.bn1"]),
    "layer3.conv2": (conv(3, 1), ["layer3.relu1"]),
    "layer3.bn2": (BATCH_NORM, ["layer3.conv2"]),
    "layer3.downsample": (conv(1, 2), ["layer2.relu2"]),
    "layer3.add": (ADD, ["layer3.bn2", "layer3.downsample"]),
    "layer3.relu2": (RELU, ["layer3.add"]),
    "avgpool": (POOL, ["layer3.relu2"]),
    "fc": (DENSE, ["avgpool"]),
}

IDENTITY = TRAINING_LAYERS | {"Flatten"}  # layers that are stepped over
INPUT_SCALING = {"Rescaling", "Normalization"}


def match_graph(file: KerasFile) -> dict[str, Layer]:
    """Return the file's layer for each row of GRAPH, for "input", and for "softmax" if there is one.

    "input" is what conv1 reads: the InputLayer, or the last of the Rescaling and Normalization layers on it.
    Raises KerasFileError, naming the layer, what it is and what was expected, for anything but a ResNet8.
    """
    by_name = {layer.name: layer for layer in file.layers}

    def is_identity(layer: Layer) -> bool:
        linear = layer.class_name == "Activation" and layer.config.get("activation") == "linear"
        return layer.class_name in IDENTITY or linear

    def reads(layer: Layer) -> list[str]:
        sources = []
        for name in layer.inputs:
            while is_identity(by_name[name]):
                name = by_name[name].inputs[0]
            sources.append(name)
        return sorted(sources)

    unplaced = [layer for layer in file.layers[1:] if not is_identity(layer)]
    places = {"input": file.layers[0]}
    for layer in unplaced.copy():
        if layer.class_name in INPUT_SCALING and reads(layer) == [places["input"].name]:
            places["input"] = layer
            unplaced.remove(layer)

    def place(point: str, required: dict, sources: list[str]) -> None:
        names = sorted(places[source].name for source in sources)
        expected = f"{' or '.join(required['class_name'])} as {point}"
        readers = [layer for layer in unplaced if reads(layer) == names]
        fits = [layer for layer in readers if layer.class_name in required["class_name"]]
        if len(readers) > 1:  # a strided block's first convolution and its shortcut read the same layer
            fits = [
                layer for layer in fits if layer.config.get("kernel_size") in required.get("kernel_size", [])
            ]
        if len(fits) != 1:
            found = readers or [layer for layer in unplaced if set(reads(layer)) & set(names)]
            is_there = " and ".join(
                f"{layer.class_name} '{layer.name}' of {reads(layer)}"
                + (f" (kernel_size {layer.config['kernel_size']})" if "kernel_size" in layer.config else "")
                for layer in found
            )
            if "kernel_size" in required:
                expected += f" (kernel_size {required['kernel_size'][0]})"
            raise KerasFileError(f"after {names}: found {is_there or 'nothing'}, expected one {expected}")
        check_options(fits[0], required, point)
        places[point] = fits[0]
        unplaced.remove(fits[0])

    for point, (required, sources) in GRAPH.items():
        place(point, required, sources)
    if unplaced and places["fc"].config.get("activation") != "softmax":
        place("softmax", SOFTMAX, ["fc"])
    if unplaced:
        raise KerasFileError(
            f"layer '{unplaced[0].name}' ({unplaced[0].class_name}) has no place in a ResNet8"
        )
    check_pooling(file, places)
    check_batch_norms(places)
    return places


def check_options(layer: Layer, required: dict, point: str) -> None:
    """Raise KerasFileError if an option that changes the function is not what `point` of the graph needs."""
    for option, allowed in required.items():
        value = layer.config.get(option, allowed[0]) if option != "class_name" else layer.class_name
        if value not in allowed:
            expected = f"expected {allowed[0]!r} ({point})"
            raise KerasFileError(
                f"layer '{layer.name}' ({layer.class_name}): {option} is {value!r:.60}, {expected}"
            )


def check_pooling(file: KerasFile, places: dict[str, Layer]) -> None:
    """Raise KerasFileError unless the pooling covers the whole map and leaves (N, channels)."""
    pool = places["avgpool"]
    shape = input_shape(file)
    if pool.class_name == "AveragePooling2D":
        whole = [-(-size // 4) for size in shape[:2] if size is not None]
        if pool.config.get("pool_size") != whole:
            size = pool.config.get("pool_size")
            raise KerasFileError(
                f"layer '{pool.name}': pool_size is {size}, expected {whole}, the whole map (avgpool)"
            )
        if pool.config.get("padding", "valid") != "valid" and pool.config.get("strides") != whole:
            raise KerasFileError(f"layer '{pool.name}': padding is not 'valid' (avgpool)")
    keeps_axes = pool.class_name == "AveragePooling2D" or pool.config.get("keepdims")
    if keeps_axes and not any(layer.class_name == "Flatten" for layer in file.layers):
        raise KerasFileError(
            f"layer '{pool.name}' keeps its axes and no Flatten follows: the output is no vector"
        )


def check_batch_norms(places: dict[str, Layer]) -> None:
    """Raise KerasFileError unless all BatchNormalizations have one epsilon and one momentum, as ours have."""
    norms = [layer for layer in places.values() if layer.class_name == "BatchNormalization"]
    for option in ("epsilon", "momentum"):
        for layer in norms:
            value, first = layer.config.get(option), norms[0].config.get(option)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise KerasFileError(
                    f"layer '{layer.name}': {option} is {value!r}, expected a number from 0 to 1"
                )
            if value != first:
                reason = f"{option} is {value}, but {first} in '{norms[0].name}'; one for all was expected"
                raise KerasFileError(f"layer '{layer.name}': {reason}")


def input_shape(file: KerasFile) -> list[int | None]:
    """Return the model's input shape, [height, width, channels]; height and width may be None: any."""
    config = file.layers[0].config
    shape = config.get("batch_shape") or config.get("batch_input_shape")
    is_image = isinstance(shape, list) and len(shape) == 4 and isinstance(shape[3], int)
    if not is_image or not all(
        size is None or (isinstance(size, int) and 0 < size <= 1024) for size in shape[1:]
    ):
        raise KerasFileError(f"the input's shape is {shape}, expected (None, height, width, channels)")
    return shape[1:]


# --- 2. The mapping: every tensor, its axes in PyTorch's order, and its PyTorch key ---------------------

TRANSFORMS = {
    # Keras's variable: (PyTorch's parameter, the Keras axis of each PyTorch axis)
    "Conv2D": {
        "kernel": ("weight", (3, 2, 0, 1)),  # (height, width, in, out) -> (out, in, height, width)
        "bias": ("bias", (0,)),
    },
    "BatchNormalization": {
        "gamma": ("weight", (0,)),
        "beta": ("bias", (0,)),
        "moving_mean": ("running_mean", (0,)),
        "moving_variance": ("running_var", (0,)),
    },
    "Dense": {
        "kernel": ("weight", (1, 0)),  # (in, out) -> (out, in)
        "bias": ("bias", (0,)),
    },
}
# What Keras computes with where a layer has no such variable (use_bias, scale or center is False).
CONSTANTS = {"bias": 0.0, "gamma": 1.0, "beta": 0.0}


@dataclass(frozen=True)
class Row:
    """One tensor's way from Keras to PyTorch."""

    layer: str
    variable: str
    axes: tuple[int, ...]  # axis i of the PyTorch tensor is axis axes[i] of the Keras tensor
    key: str
    source: np.ndarray | None  # None: the layer has no such variable, the tensor is constant
    shape: tuple[int, ...]  # PyTorch's

    def tensor(self) -> np.ndarray:
        """Return the PyTorch tensor, float32. Raises KerasFileError if a value does not fit float32."""
        if self.source is None:
            return np.full(self.shape, CONSTANTS[self.variable], np.float32)
        with np.errstate(over="ignore"):
            array = self.source.transpose(self.axes).astype(np.float32)
        if not np.isfinite(array).all():
            raise KerasFileError(f"layer '{self.layer}': {self.variable} holds values too large for float32")
        return np.ascontiguousarray(array)


def map_tensors(places: dict[str, Layer], model: ResNet8) -> list[Row]:
    """Return the mapping table. Raises KerasFileError naming the row whose shape does not fit."""
    state, rows = model.state_dict(), []
    for point, layer in places.items():
        for variable, (parameter, axes) in TRANSFORMS.get(layer.class_name, {}).items():
            key, source = f"{point}.{parameter}", layer.arrays.get(variable)
            shape = tuple(state[key].shape)
            if source is not None and (
                source.ndim != len(axes) or tuple(source.shape[a] for a in axes) != shape
            ):
                expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
                raise KerasFileError(
                    f"layer '{layer.name}': {variable} has shape {source.shape}, expected {expected} ({key})"
                )
            rows.append(Row(layer.name, variable, axes, key, source, shape))
    return rows


def build_model(places: dict[str, Layer]) -> tuple[ResNet8, dict]:
    """Return an untrained ResNet8 of the file's size, and its arguments."""
    from models.resnet8 import ResNet8

    conv1, norm, fc = places["conv1"], places["bn1"], places["fc"]
    kernels = {layer.name: layer.arrays.get("kernel", np.empty(0)) for layer in (conv1, fc)}
    if kernels[conv1.name].ndim != 4 or kernels[fc.name].ndim != 2:
        raise KerasFileError(
            f"layers '{conv1.name}' and '{fc.name}': kernels with 4 and 2 axes were expected"
        )
    arguments = {
        "num_classes": kernels[fc.name].shape[1],
        "width": kernels[conv1.name].shape[3],
        "in_channels": kernels[conv1.name].shape[2],
        "bn_eps": norm.config["epsilon"],
        "bn_momentum": round(1 - norm.config["momentum"], 12),
    }
    return ResNet8(**arguments), arguments


def count_parameters(model: ResNet8) -> tuple[int, int]:
    """Return the numbers of trainable parameters and of statistics (without `num_batches_tracked`)."""
    statistics = [
        buffer for name, buffer in model.named_buffers() if not name.endswith("num_batches_tracked")
    ]
    return sum(p.numel() for p in model.parameters()), sum(buffer.numel() for buffer in statistics)


# --- 3. The input: what the network is to be fed ---------------------------------------------------------


def input_normalization(
    file: KerasFile, places: dict[str, Layer], mean: list, std: list
) -> tuple[list, list]:
    """Return the (mean, std) a channel, in pixel units, that take a pixel to what conv1 reads.

    `mean` and `std` take it to what the Keras model reads; its own Rescaling and Normalization layers come on
    top. Formulas: keras.io/api/layers/preprocessing_layers, numerical/normalization and
    image_preprocessing/rescaling.
    """

    def as_float32(values: object) -> np.ndarray:  # Keras rounds these numbers, whatever it computes in
        return np.asarray(values, np.float32).astype(np.float64)

    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    for layer in file.layers[: file.layers.index(places["input"]) + 1]:
        try:
            if layer.class_name == "Rescaling":
                scale, offset = (as_float32(layer.config[key]) for key in ("scale", "offset"))
                mean, std = mean - offset * std / scale, std / scale
            elif layer.class_name == "Normalization":
                values = layer.arrays or layer.config
                deviation = np.maximum(np.sqrt(as_float32(values["variance"]).ravel()), 1e-7)
                mean, std = mean + as_float32(values["mean"]).ravel() * std, std * deviation
                if layer.config.get("invert"):
                    raise KerasFileError(f"layer '{layer.name}': invert is True, expected False")
            mean, std = (
                np.broadcast_to(mean, (input_shape(file)[2],)),
                np.broadcast_to(std, (input_shape(file)[2],)),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, KerasFileError):
                raise
            raise KerasFileError(
                f"layer '{layer.name}' ({layer.class_name}): not a scaling a channel"
            ) from None
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std != 0).all()):
        raise KerasFileError(f"the input scaling comes to mean {mean.tolist()} and std {std.tolist()}")
    return mean.tolist(), std.tolist()


# --- 4. The proof: every layer's activations, against Keras ----------------------------------------------


class VerificationError(Exception):
    """The network does not compute what Keras computes. The message names the first layer that differs."""


def test_images(shape: list[int | None]) -> dict[str, np.ndarray]:
    """Return (N, channels, height, width) float64 pixels, 0 to 255: the bundled images, and random ones."""
    height, width, channels = shape[0] or 32, shape[1] or 32, shape[2]
    real = load_test(Path(), "sample").images.astype(np.float64)
    wrap = [(0, 0), (0, max(0, channels - 3)), (0, max(0, height - 32)), (0, max(0, width - 32))]
    real = np.pad(real, wrap, mode="wrap")[:, :channels, :height, :width]
    return {"real": real, "random": np.random.default_rng(0).uniform(0, 255, (100, channels, height, width))}


def pytorch_activations(model: ResNet8, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Return every layer's output for (N, C, H, W) images, by GRAPH's names, channels last as in Keras."""
    import torch

    found: dict[str, np.ndarray] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        found[name] = value.movedim(1, -1).numpy().copy()  # the addition works in place

    def watch(name: str, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: object, inputs: tuple, output: torch.Tensor) -> None:
            if not name.endswith(".relu"):
                keep(name, output)
            elif f"{name}1" not in found:  # a block's ReLU runs twice: after bn1, and after the addition
                keep(f"{name}1", output)
            else:
                keep(f"{name.removesuffix('relu')}add", inputs[0])
                keep(f"{name}2", output)

        return module.register_forward_hook(hook)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [watch(name, module) for name, module in leaves]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of (N, classes) logits."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def verify_numbers(
    file: KerasFile,
    places: dict[str, Layer],
    model: ResNet8,
    keras: KerasProcess,
    keras_input: tuple[list, list],
    pytorch_input: tuple[list, list],
) -> dict:
    """Compare PyTorch with Keras on real and random images, and return the largest differences by dtype.

    The probabilities are compared on all images, every layer's activations on the first 100 real ones and on
    the random ones. Raises VerificationError when one is beyond its bound; WorkerError when Keras fails.
    """
    import torch

    def normalize(images: np.ndarray, mean: list, std: list) -> np.ndarray:
        return (images - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))

    def compare(point: str, ours: np.ndarray, theirs: np.ndarray) -> float:
        difference = float(np.max(np.abs(ours - theirs.reshape(ours.shape))))
        bound = MAX_PROBABILITY_DIFFERENCE[dtype] if point == "probabilities" else MAX_ACTIVATION_DIFFERENCE
        if not difference <= bound and (
            point == "probabilities" or dtype == "float64"
        ):  # NaN is beyond every bound
            where = point if point == "probabilities" else f"{point} (Keras's '{places[point].name}')"
            size = f"{difference:.1e} in {dtype}, at most {bound:.0e} expected"
            raise VerificationError(f"the first difference from Keras is in {where}: {size}")
        return difference

    output, results, compared = file.layers[-1].name, {}, set()
    for dtype in ("float64", "float32"):
        network = model.to(getattr(torch, dtype)).eval()
        results[dtype] = {"activations": 0.0, "probabilities": 0.0}
        for images in test_images(input_shape(file)).values():
            theirs_input = normalize(images, *keras_input).transpose(0, 2, 3, 1)
            ours_input = torch.from_numpy(normalize(images, *pytorch_input)).to(getattr(torch, dtype))
            theirs = keras.activations(theirs_input[:100], dtype)
            ours = pytorch_activations(network, ours_input[:100])
            for point in GRAPH:  # in the graph's order: the first that differs is the one that is wrong
                is_logits = point != "fc" or places["fc"].config.get("activation") != "softmax"
                if is_logits and places[point].name in theirs:
                    compared.add(point)
                    difference = compare(point, ours[point], theirs[places[point].name])
                    results[dtype]["activations"] = max(results[dtype]["activations"], difference)
            outputs = keras.activations(theirs_input, dtype, [output])[output]
            with torch.inference_mode():
                logits = network(ours_input).numpy()
            probabilities = outputs if file.returns_probabilities else softmax(outputs)
            difference = compare("probabilities", softmax(logits), probabilities)
            results[dtype]["probabilities"] = max(results[dtype]["probabilities"], difference)
    model.float()
    return {"layers": len(compared), **results}


# --- 5. The command --------------------------------------------------------------------------------------


@contextmanager
def stage(name: str) -> Iterator[list[str]]:
    """Print a stage of the validation as passed, with the figures put into the list, or as failed."""
    figures: list[str] = []
    try:
        yield figures
    except Exception:
        print(f"  {name:<11} failed")
        raise
    for index, line in enumerate(figures):
        print((f"  {name:<11} passed  {line}" if index == 0 else f"{'':22}{line}").rstrip())


def convert_file(
    path: Path,
    output: Path,
    reader: Worker,
    keras: KerasProcess | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    bn_eps: float = 1e-3,
    verbose: bool = False,
) -> dict:
    """Convert one Keras file, verify it if there is a Keras process, write `output` and its JSON; return it.

    `mean` and `std` (a value, or one a channel, in pixel units) say what the Keras model is fed:
    (pixel - mean) / std. Raises KerasFileError, VerificationError, WorkerError, OSError; writes nothing then.
    """
    file = read_keras_file(path, reader, bn_eps)
    print(f"{path}: {file.format}")
    if file.assumed:
        print(f"  note: {file.assumed}")
    for note in precision_notes(file):
        print(f"  note: {note}")

    with stage("layers") as figures:
        places = match_graph(file)
        weighted = sum(layer.class_name in TRANSFORMS for layer in places.values())
        figures.append(f"{weighted} with weights and {len(file.layers) - weighted} others, each in its place")

    model, arguments = build_model(places)
    channels = arguments["in_channels"]
    keras_input = (broadcast("--mean", mean or [0.0], channels), broadcast("--std", std or [1.0], channels))
    pytorch_input = input_normalization(file, places, *keras_input)

    with stage("shapes") as figures:
        rows = map_tensors(places, model)
        figures.append(f"{len(rows)} tensors")
    if verbose:
        print_rows(rows)

    with stage("parameters") as figures:
        loaded = keras.load(file) if keras else None
        figures.append(compare_counts(rows, model, loaded))

    import torch

    tensors = {row.key: torch.from_numpy(row.tensor()) for row in rows}
    model.load_state_dict({**model.state_dict(), **tensors})  # num_batches_tracked stays 0

    results = None
    if keras:
        with stage("numbers") as figures:
            if loaded["rebuilt"]:
                figures.append(f"Keras {loaded['keras']} got the graph from us: {loaded['rebuilt']}")
            results = verify_numbers(file, places, model, keras, keras_input, pytorch_input)
            figures.append(
                f"{results['layers']} layers against Keras {loaded['keras']}, on real and random images"
            )
            for dtype in ("float64", "float32"):
                found = results[dtype]
                bound = f"(at most {MAX_ACTIVATION_DIFFERENCE:.0e})" if dtype == "float64" else ""
                figures.append(f"{dtype}  activations    {found['activations']:.1e}  {bound}")
                bound = f"(at most {MAX_PROBABILITY_DIFFERENCE[dtype]:.0e})"
                figures.append(f"{'':7}  probabilities  {found['probabilities']:.1e}  {bound}")
            results = {"keras": loaded["keras"], "rebuilt": loaded["rebuilt"], **results}
    else:
        print("  numbers     not verified (--no-verify)")

    checkpoint = io.BytesIO()
    torch.save(model.state_dict(), checkpoint)
    metadata = {
        "architecture": arguments,
        "source": {
            "file": os.path.relpath(path, output.parent),
            "sha256": file.sha256,
            "format": file.format,
            "keras_version": file.keras_version,
            "assumed": file.assumed,
            "input": {"mean": keras_input[0], "std": keras_input[1]},
        },
        "input": {
            "layout": "NCHW",
            "shape": [channels, *input_shape(file)[:2]],
            "range": [0, 255],
            "mean": pytorch_input[0],
            "std": pytorch_input[1],
        },
        "verification": results,
        "versions": {name: version(name) for name in ("torch", "numpy", "h5py")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sha256": hashlib.sha256(checkpoint.getvalue()).hexdigest(),
    }
    content = json.dumps(metadata, indent=2) + "\n"
    json_path = output.with_suffix(".json")
    write_files(
        {
            output: lambda target: target.write(checkpoint.getvalue()),
            json_path: lambda target: target.write(content.encode()),
        }
    )
    print(f"  wrote {output} and {json_path}")
    return metadata


def precision_notes(file: KerasFile) -> list[str]:
    """Return what is to be said of weights and policies that are not float32."""
    arrays = [array for layer in file.layers for array in layer.arrays.values() if array.dtype.kind == "f"]
    stored = {str(array.dtype) for array in arrays} - {"float32"}
    policies = set()
    for layer in file.layers:
        policy = layer.config.get("dtype", "float32")
        if isinstance(policy, dict) and isinstance(policy.get("config"), dict):  # as Keras 3 writes it
            policy = policy["config"].get("name")
        policies.add(f"{policy!s:.40}")
    policies -= {"float32"}
    notes = [f"{', '.join(sorted(stored))} weights, converted to float32"] if stored else []
    return notes + ([f"dtype policy {', '.join(sorted(policies))}, converted to float32"] if policies else [])


def broadcast(option: str, values: list[float], channels: int) -> list[float]:
    """Return one value a channel. Raises KerasFileError if there are neither one nor `channels` values."""
    if len(values) not in (1, channels):
        raise KerasFileError(
            f"{option} has {len(values)} values, but the model's input has {channels} channels"
        )
    return values * channels if len(values) == 1 else values


def compare_counts(rows: list[Row], model: ResNet8, loaded: dict | None) -> str:
    """Return the parameter counts of both sides in words. Raises VerificationError if they differ.

    Keras's side is counted by Keras, or from the file when it does not run. Constants that stand in for
    variables that the file does not have are PyTorch's alone.
    """
    sources = [row for row in rows if row.source is not None]
    statistics = sum(row.source.size for row in sources if row.variable.startswith("moving_"))
    keras = (sum(row.source.size for row in sources) - statistics, statistics)
    if loaded:
        keras = (loaded["trainable"], loaded["statistics"])
    constants = sum(int(np.prod(row.shape)) for row in rows if row.source is None)
    trainable, statistics = count_parameters(model)
    if (trainable - constants, statistics) != keras:
        raise VerificationError(
            f"Keras has {keras[0]:,} trainable parameters and {keras[1]:,} statistics, "
            f"PyTorch {trainable - constants:,} and {statistics:,}"
        )
    added = f", and {constants:,} constants for variables that Keras leaves out" if constants else ""
    return f"{keras[0]:,} trainable + {keras[1]:,} statistics = {sum(keras):,}, on both sides{added}"


def print_rows(rows: list[Row]) -> None:
    """Print the mapping table, one row a tensor."""
    from rich.console import Console
    from rich.table import Table

    table = Table("Keras", "shape", "axes", "PyTorch", "shape", box=None, padding=(0, 1), show_edge=False)
    for row in rows:
        shape = "absent" if row.source is None else str(row.source.shape)
        axes = (
            f"= {CONSTANTS[row.variable]:g}"
            if row.source is None
            else str(row.axes)
            if len(row.axes) > 1
            else "as is"
        )
        table.add_row(f"{row.layer}/{row.variable}", shape, axes, row.key, str(row.shape))
    Console(highlight=False, width=160).print(table)  # wide enough for the names, whatever the terminal


def print_summary(outcomes: list[tuple[Path, dict | None, str]]) -> None:
    """Print one line a file: what came of it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "result", "float64 difference", "", box=None, padding=(0, 1), show_edge=False)
    for path, metadata, detail in outcomes:
        verification = metadata and metadata["verification"]
        difference = f"{verification['float64']['probabilities']:.1e}" if verification else ""
        table.add_row(str(path), "converted" if metadata else "refused", difference, detail)
    print()
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def parse_arguments() -> argparse.Namespace:
    """Return the command line; exits with status 2 when it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", metavar="KERAS_FILE", type=Path, nargs="*", help=f"default: {DEFAULT_INPUT}")
    parser.add_argument(
        "-o", "--output", metavar="OUT", type=Path, help="the .pt to write; a folder for several files"
    )
    parser.add_argument("--mean", type=float, nargs="+", help="the Keras model is fed (pixel - mean) / std,")
    parser.add_argument("--std", type=float, nargs="+", help="pixels 0 to 255; one value, or one a channel")
    parser.add_argument(
        "--bn-eps", type=float, default=1e-3, help="epsilon to assume for weights alone (0.001)"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare with Keras (needs no tensorflow)"
    )
    parser.add_argument(
        "--keras-python", default=sys.executable, help="the Python that has Keras (default: this one)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print the mapping, one row a tensor")
    arguments = parser.parse_args()

    if arguments.std and not all(value > 0 for value in arguments.std):
        parser.error("--std must be above 0")
    if not 0 < arguments.bn_eps < 1:
        parser.error("--bn-eps must be between 0 and 1")
    arguments.files = arguments.files or [DEFAULT_INPUT]
    arguments.outputs = [
        DEFAULT_OUTPUT if path == DEFAULT_INPUT else path.with_suffix(".pt") for path in arguments.files
    ]
    if arguments.output and (len(arguments.files) > 1 or arguments.output.is_dir()):
        if arguments.output.suffix in (".pt", ".pth") and not arguments.output.is_dir():
            parser.error(f"-o {arguments.output}: several files need a folder")
        arguments.outputs = [arguments.output / output.name for output in arguments.outputs]
    elif arguments.output:
        arguments.outputs = [arguments.output]
    twice = {output for output in arguments.outputs if arguments.outputs.count(output) > 1}
    if twice:
        parser.error(f"two of the files would be written to {min(twice)}")
    sources = {path.resolve() for path in arguments.files}
    for output in arguments.outputs:
        if output.suffix == ".json":
            parser.error(f"-o {output}: the .json beside the checkpoint would be written over it")
        if sources & {output.resolve(), output.with_suffix(".json").resolve()}:
            parser.error(f"{output} and its .json would be written over a Keras file: name another with -o")
    return arguments


WITHOUT_KERAS = "; --no-verify converts without the comparison with Keras"


def main() -> int:
    """Convert the files of the command line; return the exit status."""
    arguments = parse_arguments()
    keras, outcomes = None, []
    with start_reader() as reader:
        try:
            keras = None if arguments.no_verify else KerasProcess(arguments.keras_python)
            for path, output in zip(arguments.files, arguments.outputs, strict=True):
                try:
                    metadata = convert_file(
                        path,
                        output,
                        reader,
                        keras,
                        arguments.mean,
                        arguments.std,
                        arguments.bn_eps,
                        arguments.verbose,
                    )
                    outcomes.append((path, metadata, str(output)))
                except (KerasFileError, VerificationError, WorkerError, DataError, OSError) as error:
                    message = str(error)
                    if isinstance(error, OSError):
                        message = f"cannot write {output} and its .json: {error.strerror}"
                    if isinstance(error, WorkerError):
                        print(error.log, file=sys.stderr, end="")
                        message += WITHOUT_KERAS
                    message = message if message.startswith(str(path)) else f"{path}: {message}"
                    print(f"error: {message}", file=sys.stderr)
                    outcomes.append((path, None, message.removeprefix(f"{path}: ")))
        except WorkerError as error:
            print(f"error: {error}{WITHOUT_KERAS}", file=sys.stderr)
            return 1
        finally:
            if keras:
                keras.close()
    if len(outcomes) > 1:
        print_summary(outcomes)
    return int(any(metadata is None for _, metadata, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
