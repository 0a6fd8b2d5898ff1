"""HDF5 files and `.keras` archives: opened, with a bound on everything they may hold.

Formats: https://keras.io/guides/serialization_and_saving/, and keras/src/legacy/saving/legacy_h5_format.py
and keras/src/saving/saving_lib.py of Keras 3.15.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from typing import TYPE_CHECKING

from models.common.errors import KerasFileError
from models.common.kinds import Kind, kind_of_content, refusal
from models.keras.file import FLOATS, MAX_FILE_BYTES, NO_KERAS_FILE, TRAINING_LAYERS

if TYPE_CHECKING:
    import h5py

MAX_CONFIG_BYTES = 4 * 2**20
MAX_CONFIG_DEPTH = 64
MAX_OBJECTS = 10_000

# Every class that a configuration may name: one that names another never reaches Keras. Those of the last
# three lines are harmless, and refused by `conversion/matching.py`, which can say where and why.
KERAS_CLASSES = TRAINING_LAYERS | set(
    """
    Functional Model Sequential InputLayer __keras_tensor__ DTypePolicy Policy SeedGenerator
    Conv2D BatchNormalization Activation ReLU Softmax Add Dense Flatten Cast
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
    r"|ops\.(numpy|core)|(backend\.)?dtype_policies(\.dtype_policy)?|mixed_precision))?"
)


def open_container(content: bytes) -> tuple[h5py.Group, dict | None, str | None, str]:
    """Return the HDF5 group that holds a file's weights, its configuration, Keras version and kind.

    The configuration is None when the file has only weights. Raises KerasFileError when the content is no
    Keras file, keeps data outside itself, or declares more than it can hold.
    """
    found = kind_of_content(io.BytesIO(content))
    if found is Kind.HDF5:
        file, config, version, kind = open_hdf5(content)
    elif found in (Kind.KERAS, Kind.ZIP):
        file, config, version, kind = open_archive(content)
    elif found is Kind.EMPTY:
        raise KerasFileError("is empty")
    elif found is Kind.UNKNOWN:
        raise KerasFileError(NO_KERAS_FILE)
    else:
        raise KerasFileError(refusal(found, NO_KERAS_FILE))
    return file if config is None else file.get("model_weights", file), config, version, kind


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
    if lists_names(file):
        return file, None, version, ".h5 weights"
    if "layers" in file or "_layer_checkpoint_dependencies" in file:
        return file, None, version, ".weights.h5 weights"
    if any(isinstance(group, h5py.Group) and "vars" in group for group in file.values()):
        raise KerasFileError(
            "weights of a subclassed model, which say nothing of its graph: save it whole, with "
            "x = keras.Input((32, 32, 3)): keras.Model(x, model.call(x)).save('model.keras')"
        )
    raise KerasFileError(
        "an HDF5 file, but not of Keras: neither model_config, nor layer_names, nor a group layers"
    )


def lists_names(weights: h5py.Group) -> bool:
    """Whether the weights lie as in a `.h5`: a group a layer, whose attributes list the tensors' names."""
    return "layer_names" in weights.attrs or "layer_names0" in weights.attrs


def open_archive(content: bytes) -> tuple[h5py.File, dict, str | None, str]:
    """Return a `.keras` archive's weights file, configuration, Keras version and kind."""
    import h5py

    limits = {
        "metadata.json": MAX_CONFIG_BYTES,
        "config.json": MAX_CONFIG_BYTES,
        "model.weights.h5": MAX_FILE_BYTES,
    }
    archive = zipfile.ZipFile(io.BytesIO(content))
    members = set()
    for info in archive.infolist():
        if info.filename in members:
            raise KerasFileError(f"the archive holds {info.filename} twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise KerasFileError(f"{info.filename} is encrypted, or compressed otherwise than by deflate")
        if info.file_size > limits.get(info.filename, MAX_FILE_BYTES) or info.file_size > 100 * len(content):
            raise KerasFileError(f"{info.filename} would unpack to {info.file_size:,} bytes: no ResNet8")
        members.add(info.filename)
    for name in limits:
        if name not in members:
            raise KerasFileError(f"an archive without {name}: not a .keras file")
    version = parse_json(archive.read("metadata.json").decode(), "metadata.json").get("keras_version")
    config = parse_json(archive.read("config.json").decode(), "config.json")
    weights = archive.read("model.weights.h5")
    file = h5py.File(io.BytesIO(weights), "r")
    check_objects(file, len(weights))
    return file, config, as_string(version) if version else None, ".keras archive"


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
    return as_string(group.attrs[name])


def as_string(value: object) -> str:
    """Return what must be a string; HDF5 may give it as bytes."""
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


def numbers_of(value: object) -> object:
    """Return the list of numbers that a configuration has as a NumPy array; anything else as it is."""
    array = (
        value.get("config") if isinstance(value, dict) and value.get("class_name") == "__numpy__" else None
    )
    if not isinstance(array, dict) or array.get("dtype") not in ("float32", "float64"):
        return value
    numbers = array.get("value")
    listed = numbers if isinstance(numbers, list) else [numbers]
    return numbers if all(type(number) in (int, float) for number in listed) else value


def check_classes(config: dict) -> None:
    """Refuse a configuration with which Keras would do anything but build its own known layers.

    Drops `compile_config`, the optimizer and loss: nothing that we need, and it names classes; and what says
    that a layer trains by LoRA, which `.keras` has added to the kernel. NumPy's arrays become lists.
    """
    pending: list[object] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        if not isinstance(value, dict):
            continue
        for key in ("compile_config", "lora_rank", "lora_alpha"):
            value.pop(key, None)
        for key, inner in value.items():
            value[key] = numbers_of(inner)
        pending += value.values()
        name = value.get("class_name")
        if (name is not None and "config" in value) or "module" in value or "registered_name" in value:
            inner = value.get("config")
            layer = inner.get("name", value.get("name", "")) if isinstance(inner, dict) else inner
            where = f"layer '{layer}'" if isinstance(layer, str) and layer else "model_config"
            if not isinstance(name, str) or name not in KERAS_CLASSES:
                raise KerasFileError(
                    f"{where} is of class {name}: a custom class, or none of a ResNet8's; never run"
                )
            dtype = inner.get("dtype") if isinstance(inner, dict) else None
            if name == "Cast" and dtype not in FLOATS:
                raise KerasFileError(f"{where} (Cast): dtype is {dtype!r:.60}, expected a floating-point one")
            module, registered = value.get("module"), value.get("registered_name")
            if module is not None and not (isinstance(module, str) and KERAS_MODULE.fullmatch(module)):
                raise KerasFileError(
                    f"{where}: {name} is to come from module {module}: not Keras's; never run"
                )
            if registered is not None and registered != name:
                raise KerasFileError(
                    f"{where}: {name} is registered as {registered}: a custom class; never run"
                )
