"""Read a Keras file in a job: `python -m models.keras.reader` does the work of `read_keras_file`.

Formats: https://keras.io/guides/serialization_and_saving/, and keras/src/legacy/saving/legacy_h5_format.py
and keras/src/saving/saving_lib.py of Keras 3.15. A `.h5` lists its layers and their tensors by name, in the
order of saving. A `.keras` archive and a `.weights.h5` are a store: a layer's key is its class and a number,
its tensors are "0", "1", ...
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace

os.environ["HDF5_PLUGIN_PRELOAD"] = "::"  # before h5py: a file must not make HDF5 load a filter plugin
import h5py
import numpy as np

from models.common.cli import KerasFileError, one_line, printable
from models.common.files import Format, detect_content
from models.common.job import Message, limit_resources, serve
from models.keras.config import as_string, check_classes, graph_layers, is_model, own_name, parse_json
from models.keras.file import EXPECTED, MAX_FILE_BYTES, Layer, check_values, pack_layers, running_number
from models.mapping import saved_variables

NamedArrays = tuple[str, dict[str, np.ndarray]]  # a layer's name, and its arrays by variable
MAX_CPU_SECONDS = 15  # damage can make the HDF5 library loop forever
LISTS = ("layer_names", "layer_names0")  # attributes of the weights in a `.h5`: names of its groups
STORES = ("layers", "_layer_checkpoint_dependencies")  # groups of a store, of Keras 3 and of Keras 2


def read_limited(request: dict, arrays: dict[str, np.ndarray]) -> Message:
    """Limit this process's memory and CPU time, then run `read_safely`."""
    limit_resources(memory=2**29 + 8 * arrays["content"].nbytes, cpu_seconds=MAX_CPU_SECONDS)
    return read_safely(request, arrays)


def read_safely(_: dict, arrays: dict[str, np.ndarray]) -> Message:
    """Return the fields and arrays of a file's `content`, as `read_content` does.

    Raises KerasFileError with one line for any content that is not a valid Keras file.
    """
    try:
        return read_content(arrays["content"].tobytes())
    except KerasFileError:
        raise
    except MemoryError:
        raise KerasFileError("reading it takes more memory than a file of its size should") from None
    except Exception as error:  # damaged bytes make h5py, zipfile and this code raise exceptions of any type
        raise KerasFileError(f"damaged, or not written by Keras ({one_line(error)})") from None


def read_content(content: bytes) -> Message:
    """Return `KerasFile`'s fields as a JSON object, and the layers' arrays as `pack_layers` names them.

    Raises KerasFileError with one line, and for damaged bytes any exception of h5py, zipfile and json.
    """
    weights, config, version, kind = open_container(content)
    if config is None:
        groups = listed_groups(weights) if is_listed(weights) else store_groups(weights, "")
        layers = [Layer(name, "", {}, (), arrays) for name, arrays in groups]
    else:
        check_classes(config)
        store = find_store(weights)
        saved = dict(
            listed_arrays(config, weights) if is_listed(weights) else store_arrays(config, store, "")
        )
        layers = [replace(layer, arrays=saved.get(layer.name, {})) for layer in graph_layers(config)]
        check_values(layers)
    version = version and printable(version[:40])
    described, arrays = pack_layers(layers)
    return {
        "format": f"Keras {version} {kind}" if version else kind,
        "keras_version": version,
        "config": config,
        "names_tensors": config is not None or is_listed(weights),
        "layers": described,
    }, arrays


# --- Containers -------------------------------------------------------------------------------------------


def open_container(content: bytes) -> tuple[h5py.Group, dict | None, str | None, str]:
    """Return the HDF5 group with a file's weights, its configuration, Keras version and kind.

    The configuration is None for weights alone. Raises KerasFileError for another format, and for a file that
    has data in other files.
    """
    found = detect_content(io.BytesIO(content))
    if found is Format.HDF5:
        return open_hdf5(content)
    if found is Format.KERAS or (found is Format.UNKNOWN and content.startswith(b"PK")):
        return open_archive(content)
    raise KerasFileError(f"is {found.value}; {EXPECTED}")


def open_hdf5(content: bytes) -> tuple[h5py.Group, dict | None, str | None, str]:
    """Open a `.h5` file, as `open_container` does."""
    file = h5py.File(io.BytesIO(content), "r")
    check_objects(file)
    version = as_string(file.attrs["keras_version"]) if "keras_version" in file.attrs else None
    if "model_config" in file.attrs:
        if "model_weights" not in file:
            raise KerasFileError("has a model_config but no group model_weights")
        config = parse_json(as_string(file.attrs["model_config"]), "model_config")
        return file["model_weights"], config, version, ".h5 whole model"
    if is_listed(file):
        return file, None, version, ".h5 weights"
    if find_store(file) is not None:
        return file, None, version, ".weights.h5 weights"
    if any(isinstance(group, h5py.Group) and "vars" in group for group in file.values()):
        raise KerasFileError(
            "weights of a subclassed model, without its graph: save it whole, with "
            "x = keras.Input((32, 32, 3)): keras.Model(x, model.call(x)).save('model.keras')"
        )
    raise KerasFileError("an HDF5 file, but not of Keras: no model_config, layer_names or group layers")


def open_archive(content: bytes) -> tuple[h5py.Group, dict, str | None, str]:
    """Open a `.keras` archive, as `open_container` does."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    for info in archive.infolist():
        if info.file_size > min(MAX_FILE_BYTES, 100 * len(content)):
            raise KerasFileError(f"{info.filename} would unpack to {info.file_size:,} bytes: not a ResNet8")
    missing = {"metadata.json", "config.json", "model.weights.h5"} - set(archive.namelist())
    if missing:
        raise KerasFileError(f"an archive without {min(missing)}: not a .keras file")
    version = parse_json(archive.read("metadata.json").decode(), "metadata.json").get("keras_version")
    config = parse_json(archive.read("config.json").decode(), "config.json")
    file = h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r")
    check_objects(file)
    return file, config, as_string(version) if version else None, ".keras archive"


def check_objects(file: h5py.File) -> None:
    """Refuse data in other files: soft and external links, external storage, virtual data sets."""

    def stored_elsewhere(name: str, member: object) -> str | None:
        return name if isinstance(member, h5py.Dataset) and (member.is_virtual or member.external) else None

    # the first name that h5py receives from a function ends the search
    if name := file.visititems_links(lambda name, link: None if isinstance(link, h5py.HardLink) else name):
        raise KerasFileError(f"/{name} is a soft or external link; a Keras file has none")
    if name := file.visititems(stored_elsewhere):
        raise KerasFileError(f"/{name} has its data in another file; a Keras file does not")


def is_listed(weights: h5py.Group) -> bool:
    """Whether the weights are as in a `.h5`: one group per layer, with the tensors' names as attributes."""
    return any(name in weights.attrs for name in LISTS)


def find_store(group: h5py.Group | None) -> h5py.Group | None:
    """Return the group with the layers of a store; None if there is none."""
    names = [name for name in STORES if group is not None and name in group]
    return group[names[0]] if names else None


# --- Whole models: the variables of each layer follow from the configuration ------------------------------


def expected_variables(entry: dict) -> list[str]:
    """Return the names of the arrays of a layer with this configuration, in saved order."""
    if entry["class_name"] == "Normalization":  # its mean and variance can be in the configuration
        return ["mean", "variance", "count"] if entry["config"].get("mean") is None else []
    return saved_variables(entry["class_name"], entry["config"])


def listed_arrays(model: dict, weights: h5py.Group) -> Iterator[NamedArrays]:
    """Yield each layer's arrays from a `.h5` file: one group for each layer of the outermost model."""
    for entry in model["config"]["layers"]:
        name = own_name(entry)
        expected = {path: expected_variables(layer) for path, layer in flat_entries(entry, name)}
        saved = group_tensors(weights, name) if any(expected.values()) else {}
        for path, variables in expected.items():
            own = saved
            if is_model(entry):  # its group has the tensors of all layers in it
                layer = path.rpartition("/")[2]
                own = {key: tensor for key, tensor in saved.items() if key.split("/")[-2:-1] == [layer]}
            if variables:
                yield path, named_arrays(path, own, variables)


def flat_entries(entry: dict, path: str) -> Iterator[tuple[str, dict]]:
    """Yield the path and the configuration of a layer, or of every layer in a nested model."""
    if is_model(entry):
        for inner in entry["config"]["layers"]:
            yield from flat_entries(inner, f"{path}/{own_name(inner)}")
    else:
        yield path, entry


def named_arrays(layer: str, saved: dict[str, h5py.Dataset], expected: list[str]) -> dict[str, np.ndarray]:
    """Return a layer's arrays by variable, from tensors with names such as `conv2d/kernel:0`."""
    tensors = {variable_of(key): tensor for key, tensor in saved.items()}
    if len(tensors) < len(saved):
        raise KerasFileError(f"layer '{layer}' has two tensors of one name: {', '.join(saved)}")
    if set(tensors) != set(expected):
        lora = "; a .keras file has LoRA's in the kernel" if "lora_kernel_a" in tensors else ""
        raise KerasFileError(
            f"layer '{layer}' has the tensors {sorted(tensors)}, expected {sorted(expected)}{lora}"
        )
    shapes = {variable: getattr(tensor, "shape", None) for variable, tensor in tensors.items()}
    if list(shapes) != expected and list(shapes.values()) == [shapes[variable] for variable in expected]:
        raise KerasFileError(
            f"layer '{layer}': saved as {', '.join(shapes)} (some of them frozen?), which Keras loads as "
            f"{', '.join(expected)}; save the model as .keras"
        )
    return {variable: read_array(tensors[variable]) for variable in expected}


def variable_of(key: str) -> str:
    """Return `kernel` for a tensor named `conv2d/kernel:0`."""
    return key.rpartition("/")[2].partition(":")[0]


def store_arrays(model: dict, store: h5py.Group | None, prefix: str) -> Iterator[NamedArrays]:
    """Yield each layer's arrays from a store, in which a layer's key is its class and a number."""
    counts: dict[str, int] = {}
    for entry in model["config"]["layers"]:
        snake = snake_case(entry["class_name"] if entry["class_name"] != "Model" else "Functional")
        number = counts[snake] = counts.get(snake, -1) + 1
        key, path = f"{snake}_{number}" if number else snake, f"{prefix}{own_name(entry)}"
        group = store.get(key) if store is not None else None
        if is_model(entry):
            yield from store_arrays(entry, find_store(group), f"{path}/")
            continue
        expected = expected_variables(entry)
        saved = {} if group is None or "vars" not in group else dict(group["vars"].items())
        if expected and sorted(saved) != [str(index) for index in range(len(expected))]:
            raise KerasFileError(
                f"layer '{path}' has {len(saved)} tensors in {key}, expected {', '.join(expected)}"
            )
        yield path, {variable: read_array(saved[str(index)]) for index, variable in enumerate(expected)}


def snake_case(class_name: str) -> str:
    """Return a class name as in a store's keys: conv2d for Conv2D, re_lu for ReLU."""
    spaced = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", class_name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", spaced).lower()


# --- Weights alone: groups of tensors in saved order ------------------------------------------------------


def listed_groups(weights: h5py.Group) -> Iterator[NamedArrays]:
    """Yield the groups of a `.h5` file. Raises KerasFileError for the group of a nested model."""
    for layer in long_attribute(weights, "layer_names"):
        tensors = group_tensors(weights, layer)
        variables = [variable_of(key) for key in tensors]
        if len({key.rpartition("/")[0] for key in tensors}) > 1 or len(set(variables)) < len(variables):
            raise KerasFileError(f"'{layer}' has the tensors of several layers; save the whole model")
        if tensors:
            yield layer, dict(zip(variables, map(read_array, tensors.values()), strict=True))


def store_groups(group: h5py.Group, path: str) -> Iterator[NamedArrays]:
    """Yield the groups of a `.weights.h5` file below `path`, with arrays named "0", "1", ..."""
    others = ("vars", "optimizer", "metrics", "seed_generator")
    for name in sorted(group, key=running_number):
        member = group[name]
        if name == "vars" and len(member):
            arrays = [read_array(member[key]) for key in sorted(member, key=running_number)]
            layer = "/".join(part for part in path.split("/") if part not in STORES)
            yield layer, {str(index): array for index, array in enumerate(arrays)}
        elif isinstance(member, h5py.Group) and name not in others:
            yield from store_groups(member, f"{path}/{name}" if path else name)


# --- HDF5 -------------------------------------------------------------------------------------------------


def group_tensors(weights: h5py.Group, layer: str) -> dict[str, h5py.Dataset]:
    """Return the tensors of a layer's group in a `.h5` file, by name, in saved order."""
    if layer not in weights:
        raise KerasFileError(f"layer '{layer}' has no group in {weights.name}")
    group = weights[layer]
    names = long_attribute(group, "weight_names")
    for name in names:
        if name not in group:
            raise KerasFileError(f"layer '{layer}': the tensor {name} is missing")
    return {name: group[name] for name in names}


def long_attribute(group: h5py.Group, name: str) -> list[str]:
    """Return a list of names; Keras splits one above HDF5's limit of 64 kB into `name0`, `name1`, ..."""
    parts = [name] if name in group.attrs else []
    while f"{name}{len(parts)}" in group.attrs and parts[:1] != [name]:
        parts.append(f"{name}{len(parts)}")
    return [as_string(value) for part in parts for value in np.atleast_1d(group.attrs[part]).tolist()]


def read_array(dataset: h5py.Dataset) -> np.ndarray:
    """Return a tensor in its own dtype, bfloat16 as float32. Raises KerasFileError for other data."""
    is_tensor = isinstance(dataset, h5py.Dataset) and dataset.shape is not None
    if is_tensor and dataset.dtype == np.dtype("V2"):  # bfloat16: the upper half of a float32
        return (np.asarray(dataset[()]).view("<u2").astype("<u4") << 16).view("<f4").astype(np.float32)
    if not is_tensor or dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8:
        raise KerasFileError(f"{dataset.name} is not a tensor of floating-point numbers")
    return np.asarray(dataset[()]).astype(dataset.dtype.newbyteorder("="))


def main() -> None:
    """Run the job."""
    serve(read_limited, refusals=(KerasFileError,))


if __name__ == "__main__":
    main()
