"""Reading a Keras model file with h5py, json and zipfile: never through Keras, and running no code from it.

`read_keras_file` returns the file's layers in one form, whatever its format: `.h5` whole models and weights
of Keras 2 and 3, `.keras` archives, `.weights.h5`. The reading happens in a process of its own (`python -m
models.keras_file`), because damaged bytes can crash the HDF5 library.

Formats: https://keras.io/guides/serialization_and_saving/, and keras/src/legacy/saving/legacy_h5_format.py
and keras/src/saving/saving_lib.py of Keras 3.15.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.worker import Worker, WorkerError, serve

if TYPE_CHECKING:
    import h5py

# What is read at most. A ResNet8 of width 256 has 20 million parameters: 80 MB, and its optimizer's state.
MAX_FILE_BYTES = 256 * 2**20
MAX_CONFIG_BYTES = 4 * 2**20
MAX_CONFIG_DEPTH = 64
MAX_OBJECTS = 10_000
MAX_SECONDS = 15  # damage can make the HDF5 library loop for ever

# A layer's arrays, in the order in which Keras saves them.
VARIABLES = {
    "Conv2D": ("kernel", "bias"),
    "Dense": ("kernel", "bias"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Normalization": ("mean", "variance", "count"),
}
# The configuration's switches that leave an array out.
SWITCHES = {"bias": "use_bias", "gamma": "scale", "beta": "center"}

# Layers that do nothing at inference.
TRAINING_LAYERS = set(
    """
    Dropout SpatialDropout2D GaussianNoise GaussianDropout AlphaDropout ActivityRegularization
    RandomFlip RandomRotation RandomTranslation RandomZoom RandomContrast RandomBrightness
    RandomHeight RandomWidth RandomErasing RandomHue RandomSaturation RandomSharpness
    """.split()
)
# Every class that a configuration may name: one that names another never reaches Keras. Those of the last
# three lines are harmless, and refused by `convert.py`, which can say where and why.
KERAS_CLASSES = TRAINING_LAYERS | set(
    """
    Functional Model Sequential InputLayer __keras_tensor__ DTypePolicy Policy SeedGenerator
    Conv2D BatchNormalization Activation ReLU Softmax Add Dense Flatten
    GlobalAveragePooling2D AveragePooling2D Rescaling Normalization
    Zeros Ones Constant Orthogonal Identity VarianceScaling RandomNormal RandomUniform TruncatedNormal
    HeNormal HeUniform GlorotNormal GlorotUniform LecunNormal LecunUniform
    L1 L2 L1L2 OrthogonalRegularizer MaxNorm NonNeg UnitNorm MinMaxNorm
    DepthwiseConv2D SeparableConv2D Conv2DTranspose Conv1D Conv3D ZeroPadding2D Cropping2D Resizing Reshape
    MaxPooling2D GlobalMaxPooling2D Subtract Multiply Average Maximum Concatenate Permute UpSampling2D
    LeakyReLU PReLU ELU LayerNormalization GroupNormalization CenterCrop RandomCrop Embedding
    """.split()
)
KERAS_MODULE = re.compile(
    r"(tf_keras|keras|keras\.src|tf_keras\.src)"
    r"(\.(layers|models|initializers|regularizers|constraints|random|(engine|models)\.(functional|sequential|training)"
    r"|ops\.numpy|(backend\.)?dtype_policies(\.dtype_policy)?|mixed_precision))?"
)


class KerasFileError(ValueError):
    """The file cannot be converted. The message is one line: what is wrong, where, what was expected."""

    def __init__(self, message: str) -> None:
        # names in the file may be of any length, and hold control codes for the terminal
        super().__init__("".join(c if c.isprintable() else "?" for c in message[:1000]))


@dataclass(frozen=True)
class Layer:
    """One layer of the graph. A layer of a nested model is named `model/layer`."""

    name: str
    class_name: str
    config: dict
    inputs: tuple[str, ...]
    arrays: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # by variable name; as stored, in Keras's layout


@dataclass(frozen=True)
class KerasFile:
    """A Keras model file: its bytes, and its layers in graph order (a layer follows all its inputs)."""

    path: Path
    sha256: str
    content: bytes
    format: str  # what a person reads, such as "Keras 2.4.0 .h5 whole model"
    keras_version: str | None
    config: dict | None  # the checked configuration; None when the file has only weights
    layers: tuple[Layer, ...]  # the first is the InputLayer, the last is the output
    assumed: str | None  # what the file does not say and was assumed; None for a whole model

    @property
    def returns_probabilities(self) -> bool:
        """Whether the output has been through a softmax; otherwise it is logits."""
        output = self.layers[-1]
        return output.class_name == "Softmax" or output.config.get("activation") == "softmax"


def start_reader() -> Worker:
    """Start the process that `read_keras_file` needs."""
    return Worker("models.keras_file")


def read_keras_file(path: Path, reader: Worker, bn_eps: float = 1e-3) -> KerasFile:
    """Read a Keras model or weights file of any format; its kind is told from its content.

    `bn_eps` is the BatchNormalization epsilon to assume for a file that holds weights alone.
    Raises KerasFileError with one line when it cannot be read, is damaged, or is not what it should be.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KerasFileError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise KerasFileError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, no ResNet8")
    try:
        answer, arrays = reader.ask(
            {"bn_eps": bn_eps}, {"content": np.frombuffer(content, np.uint8)}, timeout=MAX_SECONDS
        )
    except WorkerError as error:
        reason = f"damaged: the HDF5 library fails on it ({error})" if error.status else error
        raise KerasFileError(f"{path}: {reason}") from None
    layers = tuple(
        Layer(
            layer["name"],
            layer["class_name"],
            layer["config"],
            tuple(layer["inputs"]),
            {variable: arrays[f"{layer['name']}:{variable}"] for variable in layer["variables"]},
        )
        for layer in answer["layers"]
    )
    return KerasFile(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        content=content,
        format=answer["format"],
        keras_version=answer["keras_version"],
        config=answer["config"],
        layers=layers,
        assumed=answer["assumed"],
    )


# What follows runs in the reading process.


def read_content(content: bytes, bn_eps: float) -> tuple[dict, dict[str, np.ndarray]]:
    """Return `KerasFile`'s fields as a JSON object, and the arrays by `layer:variable`."""
    if content.startswith(b"\x89HDF\r\n\x1a\n"):
        file, config, version, kind = open_hdf5(content)
    elif content.startswith(b"PK\x03\x04"):
        file, config, version, kind = open_archive(content)
    elif content.startswith(b"version https://git-lfs"):
        raise KerasFileError("is a Git LFS pointer, not the model itself: run 'git lfs pull'")
    else:
        raise KerasFileError("neither an HDF5 file nor a .keras archive")

    if config is None:
        layers, assumed = match_weights(saved_groups(file), bn_eps)
    else:
        check_classes(config)
        groups = file.get("model_weights", file)
        layers, assumed = list(graph_layers(config, groups)), None
    arrays = {}
    for layer in layers:
        for variable, array in layer.arrays.items():
            arrays[f"{layer.name}:{variable}"] = array
            if not np.isfinite(array).all():
                raise KerasFileError(f"layer '{layer.name}': {variable} has values that are NaN or infinite")
            if variable in ("moving_variance", "variance") and (array < 0).any():
                raise KerasFileError(f"layer '{layer.name}': {variable} is negative ({array.min():g})")
    fields = {
        "format": f"Keras {version} {kind}" if version else kind,
        "keras_version": version,
        "config": config,
        "assumed": assumed,
        "layers": [
            {
                "name": layer.name,
                "class_name": layer.class_name,
                "config": layer.config,
                "inputs": layer.inputs,
                "variables": list(layer.arrays),
            }
            for layer in layers
        ],
    }
    return fields, arrays


def open_hdf5(content: bytes) -> tuple[h5py.File, dict | None, str | None, str]:
    """Return a `.h5` file that keeps nothing outside itself, its configuration, Keras version and kind."""
    import h5py

    file = h5py.File(io.BytesIO(content), "r")
    check_objects(file, len(content))
    version = string_attribute(file, "keras_version") if "keras_version" in file.attrs else None
    if "model_config" in file.attrs:
        if "model_weights" not in file:
            raise KerasFileError("has a model_config but no group model_weights")
        config = parse_json(string_attribute(file, "model_config"), "model_config")
        return file, config, version, ".h5 whole model"
    if "layer_names" in file.attrs or "layer_names0" in file.attrs:
        return file, None, version, ".h5 weights"
    if "layers" in file or "_layer_checkpoint_dependencies" in file:
        return file, None, version, ".weights.h5 weights"
    raise KerasFileError(
        "an HDF5 file, but not of Keras: neither model_config, nor layer_names, nor a group layers"
    )


def open_archive(content: bytes) -> tuple[h5py.File, dict, str | None, str]:
    """Return a `.keras` archive's weights file, configuration, Keras version and kind."""
    limits = {
        "metadata.json": MAX_CONFIG_BYTES,
        "config.json": MAX_CONFIG_BYTES,
        "model.weights.h5": MAX_FILE_BYTES,
    }
    archive = zipfile.ZipFile(io.BytesIO(content))
    members = {}
    for info in archive.infolist():
        if info.filename in members:
            raise KerasFileError(f"the archive holds {info.filename} twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise KerasFileError(f"{info.filename} is encrypted, or compressed otherwise than by deflate")
        if info.file_size > limits.get(info.filename, MAX_FILE_BYTES) or info.file_size > 100 * len(content):
            raise KerasFileError(f"{info.filename} would unpack to {info.file_size:,} bytes: no ResNet8")
        members[info.filename] = info
    for name in limits:
        if name not in members:
            raise KerasFileError(f"an archive without {name}: not a .keras file")
    version = parse_json(archive.read("metadata.json").decode(), "metadata.json").get("keras_version")
    config = parse_json(archive.read("config.json").decode(), "config.json")
    import h5py

    weights = archive.read("model.weights.h5")
    file = h5py.File(io.BytesIO(weights), "r")
    check_objects(file, len(weights))
    return file, config, text(version) if version else None, ".keras archive"


def parse_json(source: str, name: str) -> dict:
    """Return a JSON object; refuses one that is too large or nested too deep."""
    if len(source) > MAX_CONFIG_BYTES:
        raise KerasFileError(f"{name} is {len(source):,} bytes long, no ResNet8's")
    try:
        value = json.loads(source)
    except RecursionError:
        raise KerasFileError(f"{name} is nested hundreds of levels deep, no ResNet8's") from None
    except ValueError as error:
        raise KerasFileError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise KerasFileError(f"{name} is a JSON {type(value).__name__}, expected an object")
    level, depth = [value], 0
    while level:
        level = [
            item
            for outer in level
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    if depth > MAX_CONFIG_DEPTH:
        raise KerasFileError(f"{name} is nested {depth} levels deep, no ResNet8's")
    return value


def string_attribute(group: h5py.Group, name: str) -> str:
    """Return an attribute that is one string."""
    if group.attrs.get_id(name).shape != ():
        raise KerasFileError(f"the attribute {name} is an array, expected one string")
    return text(group.attrs[name])


def text(value: object) -> str:
    """Return an attribute that HDF5 may give as bytes or as str."""
    value = value.decode() if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise KerasFileError(f"holds a {type(value).__name__} where a string was expected")
    return value


def check_objects(file: h5py.File, size: int) -> None:
    """Refuse links, data kept elsewhere, and more data than a file of `size` bytes can hold."""
    import h5py

    groups, seen, declared = [file], {h5py.h5o.get_info(file.id).addr}, 0
    while groups:
        group = groups.pop()
        for name in group:
            where = f"{group.name.rstrip('/')}/{name}"
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise KerasFileError(f"{where} is a soft or external link; a Keras file has none")
            member = group[name]
            address = h5py.h5o.get_info(member.id).addr
            if address in seen:  # perhaps a cycle
                raise KerasFileError(f"{where} is the same HDF5 object as another; a Keras file shares none")
            seen.add(address)
            if len(seen) > MAX_OBJECTS:
                raise KerasFileError(f"holds more than {MAX_OBJECTS:,} HDF5 objects, no ResNet8")
            if isinstance(member, h5py.Group):
                groups.append(member)
            elif isinstance(member, h5py.Dataset):
                if member.is_virtual or member.external:
                    raise KerasFileError(f"{where} keeps its data in another file; a Keras file does not")
                if member.id.get_create_plist().get_nfilters():  # such data may unpack to any size
                    raise KerasFileError(f"{where} is compressed; Keras writes none such (h5repack -f NONE)")
                chunk = math.prod(member.chunks or ()) * member.dtype.itemsize
                declared += max(math.prod(member.shape or ()) * member.dtype.itemsize, chunk)
                if declared > size:
                    tensor = f"{member.dtype} {member.shape or ''}".strip()
                    raise KerasFileError(f"{where} is declared as {tensor}: more than the file can hold")
            else:
                raise KerasFileError(f"{where} is a {type(member).__name__}; a Keras file has none")


def check_classes(config: dict) -> None:
    """Refuse a configuration with which Keras would do anything but build its own known layers."""
    pending: list[object] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        if not isinstance(value, dict):
            continue
        value.pop(
            "compile_config", None
        )  # the optimizer and loss: nothing that we need, and it names classes
        pending += value.values()
        name = value.get("class_name")
        if (name is not None and "config" in value) or "module" in value or "registered_name" in value:
            inner = value.get("config")
            layer = inner.get("name", "") if isinstance(inner, dict) else inner
            where = f"layer '{layer}'" if isinstance(layer, str) and layer else "model_config"
            if not isinstance(name, str) or name not in KERAS_CLASSES:
                raise KerasFileError(
                    f"{where} is of class {name}: a custom class, or none of a ResNet8's; never run"
                )
            module, registered = value.get("module"), value.get("registered_name")
            if module is not None and not (isinstance(module, str) and KERAS_MODULE.fullmatch(module)):
                raise KerasFileError(
                    f"{where}: {name} is to come from module {module}: not Keras's; never run"
                )
            if registered is not None and registered != name:
                raise KerasFileError(
                    f"{where}: {name} is registered as {registered}: a custom class; never run"
                )


def graph_layers(model: dict, weights: h5py.Group) -> Iterator[Layer]:
    """Yield a configuration's layers in graph order, those of nested models among them, with their arrays."""
    flat: dict[str, Layer] = {}
    output = flatten(model, "", None, flat, saved_arrays(model, weights))
    if sum(layer.class_name == "InputLayer" for layer in flat.values()) != 1:
        raise KerasFileError("has several inputs; a ResNet8 has one")

    ordered: dict[str, None] = {}
    pending, waiting = [output], set()
    while pending:  # depth first: a layer is done when all its inputs are
        name = pending[-1]
        if name not in flat:
            raise KerasFileError(f"layer '{name}' is an input of another, but is not in the file")
        missing = [source for source in flat[name].inputs if source not in ordered]
        if missing and name in waiting:
            raise KerasFileError(f"layer '{name}' is an input of itself")
        if missing:
            waiting.add(name)
            pending += missing
        else:
            ordered[pending.pop()] = None
    unused = [name for name in flat if name not in ordered]
    if unused:
        raise KerasFileError(
            f"layer '{unused[0]}' ({flat[unused[0]].class_name}) does not lead to the output"
        )
    for name in ordered:
        yield flat[name]


def flatten(model: dict, prefix: str, source: str | None, flat: dict[str, Layer], arrays: dict) -> str:
    """Put the layers of `model`, which reads layer `source`, into `flat`; return its output layer's name."""
    config = model["config"]
    sequential = model["class_name"] == "Sequential"
    entries = config["layers"]
    names = {}  # of a layer in this model -> of the layer in the flat graph that gives its output
    previous = source
    if sequential and source is None and entries[0]["class_name"] != "InputLayer":
        shape = config.get("build_input_shape") or entries[0]["config"].get("batch_input_shape")
        entries = [{"class_name": "InputLayer", "config": {"name": "input", "batch_shape": shape}}, *entries]
    pending = []
    for entry in entries:
        layer_config = entry["config"]
        name, class_name = text(entry.get("name") or layer_config["name"]), text(entry["class_name"])
        if name in names or ":" in name or not name.isprintable():
            raise KerasFileError(f"layer '{name}' is there twice, or its name has a colon or control codes")
        inputs = [previous] if sequential and class_name != "InputLayer" else node_inputs(entry, name)
        if class_name == "InputLayer" and source is not None:
            names[name] = source
            continue
        names[name] = previous = f"{prefix}{name}"
        pending.append((entry, f"{prefix}{name}", inputs))
        if sequential and "layers" in layer_config:
            names[name] = previous = flatten(entry, f"{prefix}{name}/", inputs[0], flat, arrays)
            pending.pop()

    def resolve(name: str) -> str:
        if name not in names:
            raise KerasFileError(f"layer '{prefix}{name}' is an input of another, but is not in the file")
        return names[name]

    nested = [(entry, path, inputs) for entry, path, inputs in pending if "layers" in entry["config"]]
    for entry, path, inputs in nested:  # in the file's order, in which a model follows its inputs
        names[text(entry["config"]["name"])] = flatten(entry, f"{path}/", resolve(inputs[0]), flat, arrays)
    for entry, path, inputs in pending:
        if "layers" not in entry["config"]:
            sources = tuple(inputs if sequential else map(resolve, inputs))
            flat[path] = Layer(path, entry["class_name"], entry["config"], sources, arrays.get(path, {}))
    return previous if sequential else resolve(single_output(config))


def single_output(config: dict) -> str:
    """Return the name of a Functional model's only output layer."""
    outputs = config["output_layers"]
    outputs = outputs if isinstance(outputs[0], list) else [outputs]
    if len(outputs) != 1:
        raise KerasFileError(f"has {len(outputs)} outputs; a ResNet8 has one")
    return text(outputs[0][0])


def node_inputs(entry: dict, name: str) -> list[str]:
    """Return the names of the layers that a layer reads, in its own order."""
    nodes = entry.get("inbound_nodes", [])
    if len(nodes) > 1:
        raise KerasFileError(f"layer '{name}' is used {len(nodes)} times; a ResNet8 shares none")
    found: list[str] = []

    def check_arguments(arguments: dict) -> None:
        for key, value in arguments.items():  # such as training=True, which is another function
            values = value if isinstance(value, list) else [value]
            if key != "inputs" and not all(item is None or item is False for item in values):
                raise KerasFileError(
                    f"layer '{name}' is called with {key}={value!r:.60}, expected no argument"
                )

    def collect(value: object) -> None:
        if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":  # Keras 3
            found.append(text(value["config"]["keras_history"][0]))
        elif isinstance(value, list) and len(value) >= 3 and isinstance(value[0], str):
            found.append(value[0])  # Keras 2: [name, 0, 0, {arguments}]
            if len(value) > 3:
                check_arguments(value[3])
                collect(value[3:])
        elif isinstance(value, dict) and "kwargs" in value:  # Keras 3: {"args": [...], "kwargs": {...}}
            # it writes training=True for every augmentation layer, and overrides that at inference
            is_augmentation = str(entry["class_name"]).startswith("Random")
            check_arguments({**value["kwargs"], **({"training": None} if is_augmentation else {})})
            collect(list(value.values()))
        elif isinstance(value, (list, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    collect(nodes)
    return found


def saved_arrays(model: dict, weights: h5py.Group) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of each layer of a whole model, by `model/layer` and variable."""
    store = weights.get("layers", weights.get("_layer_checkpoint_dependencies"))
    legacy = "layer_names" in weights.attrs or "layer_names0" in weights.attrs
    return dict(legacy_arrays(model, weights) if legacy else store_arrays(model, store, ""))


def expected_variables(entry: dict) -> list[str]:
    """Return the names of the arrays that a layer of this configuration has, in the order of saving."""
    config = entry["config"]
    if entry["class_name"] == "Normalization" and config.get("mean") is not None:
        return []  # its mean and variance stand in the configuration
    variables = VARIABLES.get(entry["class_name"], ())
    return [variable for variable in variables if config.get(SWITCHES.get(variable), True)]


def legacy_arrays(model: dict, weights: h5py.Group) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield each layer's arrays from a `.h5` file: one group for each layer of the outermost model."""
    for entry in model["config"]["layers"]:
        name = entry["config"]["name"]
        if "layers" not in entry["config"]:
            expected = expected_variables(entry)
            yield name, named_variables(name, group_tensors(weights, name), expected) if expected else {}
            continue
        saved = group_tensors(weights, name)
        for path, inner in leaves(entry, f"{name}/"):  # a nested model's tensors all lie in its one group
            own = {
                key: value for key, value in saved.items() if key.split("/")[-2:-1] == [path.split("/")[-1]]
            }
            expected = expected_variables(inner)
            yield path, named_variables(path, own, expected) if expected else {}


def leaves(model: dict, prefix: str) -> Iterator[tuple[str, dict]]:
    """Yield every layer of a nested model with its path."""
    for entry in model["config"]["layers"]:
        path = f"{prefix}{entry['config']['name']}"
        if "layers" in entry["config"]:
            yield from leaves(entry, f"{path}/")
        else:
            yield path, entry


def named_variables(layer: str, saved: dict[str, h5py.Dataset], expected: list[str]) -> dict[str, np.ndarray]:
    """Return a layer's arrays by variable, from tensors with names such as `conv2d/kernel:0`."""
    by_variable: dict[str, h5py.Dataset] = {}
    for key, dataset in saved.items():
        variable = key.split("/")[-1].split(":")[0]
        if variable in by_variable:
            raise KerasFileError(f"layer '{layer}' has two tensors called {variable}")
        by_variable[variable] = dataset
    if set(by_variable) != set(expected):
        raise KerasFileError(
            f"layer '{layer}' has the tensors {sorted(by_variable)}, expected {sorted(expected)}"
        )
    return {variable: read_array(by_variable[variable]) for variable in expected}


def group_tensors(weights: h5py.Group, layer: str) -> dict[str, h5py.Dataset]:
    """Return the tensors of a layer's group in a `.h5` file, by name, in the order of saving."""
    if layer not in weights:
        raise KerasFileError(f"layer '{layer}' has no group in {weights.name}")
    group = weights[layer]
    names = long_attribute(group, "weight_names")
    for name in names:
        if name not in group:
            raise KerasFileError(f"layer '{layer}': the tensor {name} is missing")
    return {name: group[name] for name in names}


def long_attribute(group: h5py.Group, name: str) -> list[str]:
    """Return a list of names; Keras splits one over HDF5's limit of 64 kB into `name0`, `name1`, ..."""
    parts = [name] if name in group.attrs else []
    while f"{name}{len(parts)}" in group.attrs and parts[:1] != [name]:
        parts.append(f"{name}{len(parts)}")
    for part in parts:
        attribute = group.attrs.get_id(part)
        if math.prod(attribute.shape) > MAX_OBJECTS:
            raise KerasFileError(f"{group.name}: {part} is declared with {attribute.shape} names")
    return [text(value) for part in parts for value in np.atleast_1d(group.attrs[part]).tolist()]


def store_arrays(model: dict, store: h5py.Group, prefix: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield each layer's arrays from a `.keras` archive, where a layer goes by its class and a number."""
    counts: dict[str, int] = {}
    for entry in model["config"]["layers"]:
        snake = snake_case(entry["class_name"] if entry["class_name"] != "Model" else "Functional")
        number = counts[snake] = counts.get(snake, -1) + 1
        path = f"{prefix}{entry['config']['name']}"
        key = f"{snake}_{number}" if number else snake
        group = store.get(key) if store is not None else None
        if "layers" in entry["config"]:
            inner = (
                None if group is None else group.get("layers", group.get("_layer_checkpoint_dependencies"))
            )
            yield from store_arrays(entry, inner, f"{path}/")
            continue
        expected = expected_variables(entry)
        saved = {} if group is None or "vars" not in group else dict(group["vars"].items())
        if expected and sorted(saved) != sorted(str(index) for index in range(len(expected))):
            raise KerasFileError(
                f"layer '{path}' has {len(saved)} tensors in {key}, expected {', '.join(expected)}"
            )
        yield path, {variable: read_array(saved[str(index)]) for index, variable in enumerate(expected)}


def snake_case(class_name: str) -> str:
    """Return a class name as Keras's store spells it: Conv2D is conv2d, ReLU is re_lu."""
    spaced = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", class_name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", spaced).lower()


def read_array(dataset: h5py.Dataset) -> np.ndarray:
    """Return a float tensor as it is stored."""
    import h5py

    is_tensor = isinstance(dataset, h5py.Dataset) and dataset.shape is not None
    if not is_tensor or dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8:
        raise KerasFileError(f"{dataset.name} is not a tensor of floating-point numbers")
    return np.asarray(dataset[()]).astype(dataset.dtype.newbyteorder("="))


def saved_groups(file: h5py.File) -> list[tuple[str, dict[str, np.ndarray] | list[np.ndarray]]]:
    """Return the tensors of a file that holds weights alone, a group a layer, in saved order.

    A group's tensors are a dict where the file names them (Keras 2's `.h5`), else a list.
    """
    import h5py

    if "layer_names" in file.attrs or "layer_names0" in file.attrs:
        groups: dict[str, dict[str, np.ndarray]] = {}
        for layer in long_attribute(file, "layer_names"):
            tensors = {key: read_array(dataset) for key, dataset in group_tensors(file, layer).items()}
            check_saved_order(layer, tensors)
            for key, array in tensors.items():
                owner, variable = ("/" + key).rsplit("/", 1)
                group = groups.setdefault(f"{layer}{owner}" if owner.strip("/") != layer else layer, {})
                group[variable.split(":")[0]] = array
        return list(groups.items())

    found: list[tuple[str, list[np.ndarray]]] = []
    others = ("vars", "optimizer", "metrics", "seed_generator")

    def visit(group: h5py.Group, path: str) -> None:
        for name in sorted(group, key=running_number):
            member = group[name]
            if name == "vars" and len(member):
                found.append((path, [read_array(member[key]) for key in sorted(member, key=running_number)]))
            elif isinstance(member, h5py.Group) and name not in others:
                visit(member, f"{path}/{name}" if path else name)

    visit(file, "")
    return [
        (re.sub(r"(^|/)(layers|_layer_checkpoint_dependencies)/", r"\1", path), arrays)
        for path, arrays in found
    ]


def check_saved_order(layer: str, tensors: dict[str, np.ndarray]) -> None:
    """Refuse the tensors of a model inside a model whose layers were not saved in their order.

    Keras 2 saves what is trained first and then the rest: statistics come last, or, in a model that is frozen
    as a whole, after their layer's gamma and beta. With some layers frozen, these come after the others.
    """
    places: dict[str, list[int]] = {}
    for place, key in enumerate(tensors):
        places.setdefault(key.rpartition("/")[0], []).append(place)
    keys = list(tensors)
    statistics = ["/moving_" in f"/{key}" for key in keys]
    norms = [found for found in places.values() if statistics[found[-1]]]
    shapes = [tensors[key].shape for key in keys]
    convolutions = [
        found for found in places.values() if len(shapes[found[0]]) == 4 and shapes[found[0]][:2] != (1, 1)
    ]
    if len(norms) < 2 and len(convolutions) < 2:
        return
    whole = [found[-1] - found[0] == len(found) - 1 for found in norms]
    in_order = all(whole) or (not any(whole) and statistics == sorted(statistics))
    first_norm = min((found[0] for found in norms), default=len(keys))
    if not in_order or sum(found[0] < first_norm for found in convolutions) != 1:
        raise KerasFileError(
            f"the layers of model '{layer}' are not saved in their order, as happens when some of them are "
            "frozen, and weights alone do not say which is which; save the whole model"
        )


def running_number(name: str) -> tuple[str, int]:
    """Return `conv2d_3` as ("conv2d", 3), and `conv2d` as ("conv2d", 0)."""
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdecimal() else (name, 0)


def match_weights(groups: list, bn_eps: float) -> tuple[list[Layer], str]:
    """Give tensors without a graph their places in a ResNet8, by their shapes and their saved order."""
    convolutions: list[tuple[str, dict[str, np.ndarray]]] = []
    norms: list[tuple[str, dict[str, np.ndarray]]] = []
    dense: list[tuple[str, dict[str, np.ndarray]]] = []
    for name, arrays in groups:
        if not name.isprintable():
            raise KerasFileError(f"layer '{name}' has control codes in its name")
        tensors = list(arrays.values()) if isinstance(arrays, dict) else arrays
        ranks = [array.ndim for array in tensors]
        if ranks[:1] in ([4], [2]) and ranks[1:] in ([], [1]):
            (convolutions if ranks[0] == 4 else dense).append(
                (name, dict(zip(("kernel", "bias"), tensors, strict=False)))
            )
        elif isinstance(arrays, dict) and {"moving_mean", "moving_variance"} <= set(arrays):
            norms.append((name, arrays))
        elif ranks in ([1, 1], [1, 1, 1, 1]):
            norms.append(
                (name, dict(zip(VARIABLES["BatchNormalization"][-len(ranks) :], tensors, strict=True)))
            )
        elif ranks == [1, 1, 1]:
            raise KerasFileError(
                f"'{name}' has three tensors: gamma or beta is missing, and weights alone do not say which"
            )
        elif ranks:
            shapes = [array.shape for array in tensors]
            raise KerasFileError(f"'{name}' has tensors of shapes {shapes}: no layer of a ResNet8")
    if (len(convolutions), len(norms), len(dense)) != (9, 7, 1):
        raise KerasFileError(
            f"holds {len(convolutions)} convolutions, {len(norms)} BatchNormalizations and "
            f"{len(dense)} dense layers; a ResNet8 has 9, 7 and 1"
        )
    _, _, channels, width = convolutions[0][1]["kernel"].shape
    classes = dense[0][1]["kernel"].shape[1]
    has_order = all(isinstance(arrays, dict) for _, arrays in groups)  # else only running numbers tell it

    def take(candidates: list, shape: tuple[int, ...]) -> tuple[str, dict[str, np.ndarray]]:
        fitting = [
            (name, arrays) for name, arrays in candidates if next(iter(arrays.values())).shape == shape
        ]
        stems = {running_number(name)[0] for name, _ in fitting}
        if len(stems) > 1 and not has_order:
            names = ", ".join(f"'{name}'" for name, _ in fitting)
            raise KerasFileError(f"{names} have shape {shape}, and weights alone do not say which is first")
        if fitting:
            candidates.remove(fitting[0])
            return fitting[0]
        raise KerasFileError(
            f"no tensor of shape {shape} is left in the file, as a ResNet8 of width {width} needs"
        )

    layers = [Layer("input", "InputLayer", {"name": "input", "batch_shape": [None, 32, 32, channels]}, ())]

    def add(
        class_name: str, config: dict, sources: tuple[str, ...], saved: tuple[str, dict] | None = None
    ) -> str:
        name, arrays = saved or (f"{snake_case(class_name)}#{len(layers)}", {})
        if class_name == "BatchNormalization":
            config = {
                "axis": -1,
                "epsilon": bn_eps,
                "momentum": 0.99,
                "scale": "gamma" in arrays,
                "center": "beta" in arrays,
            }
        layers.append(Layer(name, class_name, {"name": name, **config}, sources, arrays))
        return name

    def conv(source: str, kernel: int, inputs: int, filters: int, stride: int) -> str:
        saved = take(convolutions, (kernel, kernel, inputs, filters))
        config = {"filters": filters, "kernel_size": [kernel] * 2, "strides": [stride] * 2, "padding": "same"}
        return add("Conv2D", {**config, "use_bias": "bias" in saved[1]}, (source,), saved)

    def norm(source: str, filters: int) -> str:
        return add("BatchNormalization", {}, (source,), take(norms, (filters,)))

    def relu(source: str) -> str:
        return add("ReLU", {}, (source,))

    x = relu(norm(conv("input", 3, channels, width, 1), width))
    for inputs, filters, stride in ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
        y = relu(norm(conv(x, 3, inputs, filters, stride), filters))
        y = norm(conv(y, 3, filters, filters, 1), filters)
        shortcut = x if stride == 1 else conv(x, 1, inputs, filters, stride)
        x = relu(add("Add", {}, (y, shortcut)))
    x = add("GlobalAveragePooling2D", {}, (x,))
    saved = take(dense, (4 * width, classes))
    add("Dense", {"units": classes, "activation": "softmax", "use_bias": "bias" in saved[1]}, (x,), saved)
    assumed = (
        "weights alone, placed by shape and saved order; assumed: BatchNormalization epsilon "
        f"{bn_eps:g} (--bn-eps) and momentum 0.99, 'same' padding, strides 1, 2, 2, ReLU, softmax, "
        "32 x 32 inputs"
    )
    return layers, assumed


def answer(request: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """Answer one request of `read_keras_file`."""
    content = arrays["content"].tobytes()
    limit_memory(2**29 + 8 * len(content))
    try:
        return read_content(content, request["bn_eps"])
    except KerasFileError:
        raise
    except MemoryError:
        raise KerasFileError("reading it takes more memory than a file of its size should") from None
    except Exception as error:  # whatever damaged bytes or an odd configuration lead h5py, zipfile and us to
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise KerasFileError(f"damaged, or not as Keras writes it ({words})") from None


def limit_memory(more: int) -> None:
    """Let this process take `more` bytes than it has now, where the system can limit that (Linux)."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main() -> None:
    """Serve `read_keras_file`."""
    os.environ["HDF5_PLUGIN_PRELOAD"] = "::"  # a file must not make HDF5 load a filter plugin
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:  # Windows
        pass
    import h5py  # noqa: F401  # imported while the caller imports torch

    serve(answer, refusals=(KerasFileError,))


if __name__ == "__main__":
    main()
