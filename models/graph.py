"""What each layer of a ResNet8 is in Keras's terms, and which layers it reads: the table GRAPH.

It is the only statement of the network in Keras's terms. `match_graph` finds each row's layer in a file, by
the graph and never by names or order; `with_graph` places weights that come without a graph. It does not use
`models/resnet8.py`, so that a mistake there cannot match itself; a test holds the two together.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from models.errors import KerasFileError
from models.keras.arrays import running_number
from models.keras.file import KerasFile, Layer, check_values
from models.mapping import MAPPING


class Place(NamedTuple):
    """A place in the network."""

    required: dict[str, list]  # what Keras's layer must have: option -> allowed values, the usual one first
    reads: list[str]  # the places that it reads
    filters: int = 0  # a convolution's, in multiples of the network's width


def conv(kernel: int, stride: int) -> dict[str, list]:
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

GRAPH = {  # by PyTorch's names
    "conv1": Place(conv(3, 1), ["input"], 1),
    "bn1": Place(BATCH_NORM, ["conv1"]),
    "relu": Place(RELU, ["bn1"]),
    "layer1.conv1": Place(conv(3, 1), ["relu"], 1),
    "layer1.bn1": Place(BATCH_NORM, ["layer1.conv1"]),
    "layer1.relu1": Place(RELU, ["layer1.bn1"]),
    "layer1.conv2": Place(conv(3, 1), ["layer1.relu1"], 1),
    "layer1.bn2": Place(BATCH_NORM, ["layer1.conv2"]),
    "layer1.add": Place(ADD, ["layer1.bn2", "relu"]),
    "layer1.relu2": Place(RELU, ["layer1.add"]),
    "layer2.conv1": Place(conv(3, 2), ["layer1.relu2"], 2),
    "layer2.bn1": Place(BATCH_NORM, ["layer2.conv1"]),
    "layer2.relu1": Place(RELU, ["layer2.bn1"]),
    "layer2.conv2": Place(conv(3, 1), ["layer2.relu1"], 2),
    "layer2.bn2": Place(BATCH_NORM, ["layer2.conv2"]),
    "layer2.downsample": Place(conv(1, 2), ["layer1.relu2"], 2),
    "layer2.add": Place(ADD, ["layer2.bn2", "layer2.downsample"]),
    "layer2.relu2": Place(RELU, ["layer2.add"]),
    "layer3.conv1": Place(conv(3, 2), ["layer2.relu2"], 4),
    "layer3.bn1": Place(BATCH_NORM, ["layer3.conv1"]),
    "layer3.relu1": Place(RELU, ["layer3.bn1"]),
    "layer3.conv2": Place(conv(3, 1), ["layer3.relu1"], 4),
    "layer3.bn2": Place(BATCH_NORM, ["layer3.conv2"]),
    "layer3.downsample": Place(conv(1, 2), ["layer2.relu2"], 4),
    "layer3.add": Place(ADD, ["layer3.bn2", "layer3.downsample"]),
    "layer3.relu2": Place(RELU, ["layer3.add"]),
    "avgpool": Place(POOL, ["layer3.relu2"]),
    "fc": Place(DENSE, ["avgpool"]),
}

INPUT_SCALING = {"Rescaling", "Normalization"}


# --- A file's layers, each in its place ------------------------------------------------------------------


def match_graph(file: KerasFile) -> dict[str, Layer]:
    """Return the file's layer for each row of GRAPH, for "input", and for "softmax" if there is one.

    "input" is what conv1 reads: the InputLayer, or the last of the Rescaling and Normalization layers on it.
    Raises KerasFileError, naming the layer, what it is and what was expected, for anything but a ResNet8.
    """
    sources = sources_of(file)
    unplaced = [layer for layer in file.layers[1:] if not layer.is_identity]
    places = {"input": file.layers[0]}
    for layer in unplaced.copy():
        if layer.class_name in INPUT_SCALING and sources[layer.name] == [places["input"].name]:
            places["input"] = layer
            unplaced.remove(layer)

    def fill(place: str, required: dict[str, list], reads: list[str]) -> None:
        names = sorted(places[read].name for read in reads)
        places[place] = find_layer(place, required, names, unplaced, sources)
        unplaced.remove(places[place])

    for place, (required, reads, _) in GRAPH.items():
        fill(place, required, reads)
    if unplaced and places["fc"].config.get("activation") != "softmax":
        fill("softmax", SOFTMAX, ["fc"])
    if unplaced:
        raise KerasFileError(
            f"layer '{unplaced[0].name}' ({unplaced[0].class_name}) has no place in a ResNet8"
        )
    check_pooling(file, places["avgpool"])
    check_batch_norms([layer for layer in places.values() if layer.class_name == "BatchNormalization"])
    return places


def sources_of(file: KerasFile) -> dict[str, list[str]]:
    """Return the sorted names of the layers that each layer reads, by name, identities stepped over."""
    by_name = {layer.name: layer for layer in file.layers}

    def source(name: str) -> str:
        while by_name[name].is_identity:
            name = by_name[name].inputs[0]
        return name

    return {layer.name: sorted(map(source, layer.inputs)) for layer in file.layers}


def find_layer(
    place: str, required: dict[str, list], names: list[str], unplaced: list[Layer], sources: dict
) -> Layer:
    """Return the one layer that reads the layers `names` and is what the place requires."""
    readers = [layer for layer in unplaced if sources[layer.name] == names]
    fits = [layer for layer in readers if layer.class_name in required["class_name"]]
    if len(readers) > 1:  # a strided block's first convolution and its shortcut read the same layer
        fits = [layer for layer in fits if layer.config.get("kernel_size") in required.get("kernel_size", [])]
    if len(fits) != 1:
        found = readers or [layer for layer in unplaced if set(sources[layer.name]) & set(names)]
        is_there = " and ".join(
            f"{layer.class_name} '{layer.name}' of {sources[layer.name]}"
            + (f" (kernel_size {layer.config['kernel_size']})" if "kernel_size" in layer.config else "")
            for layer in found
        )
        expected = f"{' or '.join(required['class_name'])} as {place}"
        if "kernel_size" in required:
            expected += f" (kernel_size {required['kernel_size'][0]})"
        raise KerasFileError(f"after {names}: found {is_there or 'nothing'}, expected one {expected}")
    check_options(fits[0], required, place)
    return fits[0]


def check_options(layer: Layer, required: dict[str, list], place: str) -> None:
    """Raise KerasFileError if an option that changes the function is not what the place needs."""
    for option, allowed in required.items():
        value = layer.config.get(option, allowed[0]) if option != "class_name" else layer.class_name
        if value not in allowed:
            expected = f"expected {allowed[0]!r} ({place})"
            raise KerasFileError(
                f"layer '{layer.name}' ({layer.class_name}): {option} is {value!r:.60}, {expected}"
            )


def check_pooling(file: KerasFile, pool: Layer) -> None:
    """Raise KerasFileError unless the pooling covers the whole map and leaves (N, channels)."""
    if pool.class_name == "AveragePooling2D":
        whole = [-(-size // 4) for size in file.input_shape[:2] if size is not None]
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


def check_batch_norms(norms: list[Layer]) -> None:
    """Raise KerasFileError unless all BatchNormalizations have one epsilon and one momentum, as ours have."""
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


# --- The graph for tensors that come without one ----------------------------------------------------------

Saved = tuple[str, dict[str, np.ndarray]]  # a layer's name, and its arrays by variable


def keras_layers(
    channels: int,
    width: int,
    classes: int,
    image_size: tuple[int | None, int | None],
    norm: dict[str, float],
    saved: Callable[[str, str, tuple[int, ...]], Saved],
) -> list[Layer]:
    """Return a ResNet8's layers in Keras's terms, in graph order, as GRAPH states them.

    `saved(place, class_name, shape)` gives the name and the arrays of the layer at a place, whose first array
    has that shape (() where it has none); `norm` has epsilon and momentum.
    """
    name, _ = saved("input", "InputLayer", ())
    layers = [Layer(name, "InputLayer", {"name": name, "batch_shape": [None, *image_size, channels]}, ())]
    names, outputs = {"input": name}, {"input": channels}  # of each place: its layer, its channels
    for place, (required, reads, filters) in GRAPH.items():
        inputs = outputs[reads[0]]
        outputs[place] = classes if place == "fc" else filters * width or inputs
        options = {option: allowed[0] for option, allowed in required.items()}
        class_name = options.pop("class_name")
        shapes = {
            "Conv2D": (*options.get("kernel_size", ()), inputs, outputs[place]),
            "BatchNormalization": (inputs,),
            "Dense": (inputs, outputs[place]),
        }
        name, arrays = saved(place, class_name, shapes.get(class_name, ()))
        switches = {v.switch: v.name in arrays for v in MAPPING.get(class_name, ()) if v.switch}
        size = {
            "Conv2D": {"filters": outputs[place]},
            "Dense": {"units": classes},
            "BatchNormalization": norm,
        }
        config = {"name": name, **options, **switches, **size.get(class_name, {})}
        layers.append(Layer(name, class_name, config, tuple(names[read] for read in reads), arrays))
        names[place] = name
    return layers


def with_graph(file: KerasFile, bn_eps: float = 1e-3) -> KerasFile:
    """Return the file; if it holds weights alone, in a ResNet8's graph, where they have their places.

    They are placed by their shapes and their saved order. `bn_eps` is the BatchNormalization epsilon to
    assume. Raises KerasFileError with one line when they are not a ResNet8's, or their order is not certain.
    """
    if file.config is not None:
        return file
    unplaced = sort_weights(file.layers)
    _, _, channels, width = unplaced["Conv2D"][0].arrays["kernel"].shape
    classes = unplaced["Dense"][0].arrays["kernel"].shape[1]

    def take(place: str, class_name: str, shape: tuple[int, ...]) -> Saved:
        if class_name not in MAPPING:
            return f"#{place}", {}
        fits = [layer for layer in unplaced[class_name] if next(iter(layer.arrays.values())).shape == shape]
        stems = {running_number(layer.name)[0] for layer in fits}
        if len(stems) > 1 and not file.names_tensors:  # only running numbers tell the order
            names = ", ".join(f"'{layer.name}'" for layer in fits)
            raise KerasFileError(f"{names} have shape {shape}, and weights alone do not say which is first")
        if not fits:
            raise KerasFileError(
                f"no tensor of shape {shape} is left in the file, as a ResNet8 of width {width} needs"
            )
        unplaced[class_name].remove(fits[0])
        return fits[0].name, fits[0].arrays

    norm = {"epsilon": bn_eps, "momentum": 0.99}
    layers = tuple(keras_layers(channels, width, classes, (32, 32), norm, take))
    check_values(layers)
    assumed = (
        "weights alone, placed by shape and saved order; assumed: BatchNormalization epsilon "
        f"{bn_eps:g} (--bn-eps) and momentum 0.99, 'same' padding, strides 1, 2, 2, ReLU, softmax, "
        "32 x 32 inputs"
    )
    return replace(file, layers=layers, assumed=assumed)


def sort_weights(saved: tuple[Layer, ...]) -> dict[str, list[Layer]]:
    """Return the layers of a file of weights alone by their class, which their tensors tell, in saved order.

    Raises KerasFileError when they are not as many of each class as a ResNet8 has.
    """
    layers: dict[str, list[Layer]] = {class_name: [] for class_name in MAPPING}
    for layer in saved:
        if not layer.name.isprintable():
            raise KerasFileError(f"layer '{layer.name}' has control codes in its name")
        class_name, variables = class_of(layer)
        arrays = dict(zip(variables, layer.arrays.values(), strict=False))
        layers[class_name].append(replace(layer, class_name=class_name, arrays=arrays))

    expected = Counter(place.required["class_name"][0] for place in GRAPH.values())
    if any(len(found) != expected[class_name] for class_name, found in layers.items()):
        order = ("Conv2D", "BatchNormalization", "Dense")
        conv, norm, dense = (len(layers[class_name]) for class_name in order)
        raise KerasFileError(
            f"holds {conv} convolutions, {norm} BatchNormalizations and {dense} dense layers; "
            "a ResNet8 has {}, {} and {}".format(*(expected[class_name] for class_name in order))
        )
    return layers


def class_of(layer: Layer) -> tuple[str, list[str]]:
    """Return the class of a layer that is known by its tensors alone, and what these are."""
    ranks = [array.ndim for array in layer.arrays.values()]
    if ranks in ([4], [4, 1]):
        return "Conv2D", ["kernel", "bias"]
    if ranks in ([2], [2, 1]):
        return "Dense", ["kernel", "bias"]
    if {"moving_mean", "moving_variance"} <= layer.arrays.keys():
        return "BatchNormalization", list(layer.arrays)
    if ranks in ([1, 1], [1, 1, 1, 1]):  # without names, these are all, or the statistics alone
        variables = [variable.name for variable in MAPPING["BatchNormalization"]]
        return "BatchNormalization", variables[-len(ranks) :]
    if ranks == [1, 1, 1]:
        raise KerasFileError(
            f"'{layer.name}' has three tensors: gamma or beta is missing, and weights alone do not say which"
        )
    shapes = [array.shape for array in layer.arrays.values()]
    raise KerasFileError(f"'{layer.name}' has tensors of shapes {shapes}: no layer of a ResNet8")
