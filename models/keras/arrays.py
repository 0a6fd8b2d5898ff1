"""Each layer's tensors, in every format in which Keras saves them.

A `.h5` of Keras 2 or 3 lists its layers and their tensors by name, in the order of saving. A `.keras` archive
and a `.weights.h5` are a store: a layer goes by its class and a running number, its tensors by "0", "1", ...
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from models.common.errors import KerasFileError
from models.keras.container import MAX_OBJECTS, as_string, lists_names
from models.keras.file import running_number
from models.keras.layers import is_model, own_name
from models.mapping import saved_variables

if TYPE_CHECKING:
    import h5py

# --- Whole models: the configuration says what each layer has ---------------------------------------------


def saved_arrays(model: dict, weights: h5py.Group) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of each layer of a whole model, by `model/layer` and variable.

    Raises KerasFileError, naming the layer, when its tensors are not those that its configuration asks for.
    """
    store = weights.get("layers", weights.get("_layer_checkpoint_dependencies"))
    return dict(listed_arrays(model, weights) if lists_names(weights) else store_arrays(model, store, ""))


def expected_variables(entry: dict) -> list[str]:
    """Return the names of the arrays that a layer of this configuration has, in the order of saving."""
    if entry["class_name"] == "Normalization":  # unless its mean and variance stand in the configuration
        return ["mean", "variance", "count"] if entry["config"].get("mean") is None else []
    return saved_variables(entry["class_name"], entry["config"])


def listed_arrays(model: dict, weights: h5py.Group) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield each layer's arrays from a `.h5` file: one group for each layer of the outermost model."""
    for entry in model["config"]["layers"]:
        name = own_name(entry)
        if not is_model(entry):
            expected = expected_variables(entry)
            yield name, named_variables(name, group_tensors(weights, name), expected) if expected else {}
            continue
        saved = group_tensors(weights, name)
        for path, inner in nested_entries(entry, f"{name}/"):  # a nested model's tensors lie in its one group
            own = {
                key: value for key, value in saved.items() if key.split("/")[-2:-1] == [path.split("/")[-1]]
            }
            expected = expected_variables(inner)
            yield path, named_variables(path, own, expected) if expected else {}


def nested_entries(model: dict, prefix: str) -> Iterator[tuple[str, dict]]:
    """Yield the path and the entry of every layer of a nested model, and of the models in it."""
    for entry in model["config"]["layers"]:
        path = f"{prefix}{own_name(entry)}"
        if is_model(entry):
            yield from nested_entries(entry, f"{path}/")
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
        lora = "; Keras's .keras has LoRA's in the kernel" if "lora_kernel_a" in by_variable else ""
        raise KerasFileError(
            f"layer '{layer}' has the tensors {sorted(by_variable)}, expected {sorted(expected)}{lora}"
        )
    shapes = {variable: getattr(dataset, "shape", None) for variable, dataset in by_variable.items()}
    if list(shapes) != expected and list(shapes.values()) == [shapes[variable] for variable in expected]:
        raise KerasFileError(
            f"layer '{layer}': saved as {', '.join(shapes)} (some of them frozen?), which Keras takes for "
            f"{', '.join(expected)}; save the model as .keras"
        )
    return {variable: read_array(by_variable[variable]) for variable in expected}


def store_arrays(
    model: dict, store: h5py.Group | None, prefix: str
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield each layer's arrays from a `.keras` archive, where a layer goes by its class and a number."""
    counts: dict[str, int] = {}
    for entry in model["config"]["layers"]:
        snake = snake_case(entry["class_name"] if entry["class_name"] != "Model" else "Functional")
        number = counts[snake] = counts.get(snake, -1) + 1
        path = f"{prefix}{own_name(entry)}"
        key = f"{snake}_{number}" if number else snake
        group = store.get(key) if store is not None else None
        if is_model(entry):
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


# --- Weights alone ----------------------------------------------------------------------------------------


def saved_groups(weights: h5py.Group) -> Iterable[tuple[str, dict[str, np.ndarray]]]:
    """Return the groups of tensors of a file that holds weights alone: a name a layer, in saved order.

    A group's tensors go by their variable where the file names them, else by "0", "1", ... in saved order.
    """
    return listed_groups(weights) if lists_names(weights) else store_groups(weights, "")


def listed_groups(weights: h5py.Group) -> Iterable[tuple[str, dict[str, np.ndarray]]]:
    """Return the groups of a `.h5` file, with those of a nested model as `model/layer`."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for layer in long_attribute(weights, "layer_names"):
        tensors = {key: read_array(dataset) for key, dataset in group_tensors(weights, layer).items()}
        check_saved_order(layer, tensors)
        own: dict[str, dict[str, np.ndarray]] = {}
        for key, array in tensors.items():
            owner, variable = ("/" + key).rsplit("/", 1)
            name, variable = f"{layer}{owner}" if owner.strip("/") != layer else layer, variable.split(":")[0]
            if name in groups or variable in own.setdefault(name, {}):
                raise KerasFileError(f"layer '{name}' is there twice, or has two tensors called {variable}")
            own[name][variable] = array
        groups |= own
    return groups.items()


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


def store_groups(group: h5py.Group, path: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield the groups of a `.weights.h5` file, which lie at `path` in it."""
    import h5py

    others = ("vars", "optimizer", "metrics", "seed_generator")
    for name in sorted(group, key=running_number):
        member = group[name]
        if name == "vars" and len(member):
            arrays = [read_array(member[key]) for key in sorted(member, key=running_number)]
            layer = re.sub(r"(^|/)(layers|_layer_checkpoint_dependencies)/", r"\1", path)
            yield layer, {str(index): array for index, array in enumerate(arrays)}
        elif isinstance(member, h5py.Group) and name not in others:
            yield from store_groups(member, f"{path}/{name}" if path else name)


# --- What a file holds ------------------------------------------------------------------------------------


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
    return [as_string(value) for part in parts for value in np.atleast_1d(group.attrs[part]).tolist()]


def read_array(dataset: h5py.Dataset) -> np.ndarray:
    """Return a float tensor as it is stored."""
    import h5py

    is_tensor = isinstance(dataset, h5py.Dataset) and dataset.shape is not None
    if is_tensor and dataset.dtype == np.dtype("V2"):  # bfloat16: the upper half of a float32
        return (np.asarray(dataset[()]).view("<u2").astype("<u4") << 16).view("<f4").astype(np.float32)
    if not is_tensor or dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8:
        raise KerasFileError(f"{dataset.name} is not a tensor of floating-point numbers")
    return np.asarray(dataset[()]).astype(dataset.dtype.newbyteorder("="))
