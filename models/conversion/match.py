"""Matching of a Keras file's layers to the nodes of GRAPH (`models/graph.py`), by the graph alone.

Layer names and their order are ignored. The second half builds the graph for tensors that come without one:
weights alone, and a state_dict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from models.common.cli import KerasFileError
from models.graph import GRAPH, INPUT_NORMALIZATION, SOFTMAX
from models.keras.file import KerasFile, Layer, check_values, running_number
from models.mapping import MAPPING
from models.normalization import Normalization


def match_graph(file: KerasFile) -> dict[str, Layer]:
    """Return the file's layer for each node of GRAPH, for "input", and for "softmax" if it has one.

    "input" is the layer that conv1 reads: the InputLayer, or the last of the Rescaling and Normalization
    layers after it. Raises KerasFileError with the layer, its class or option, and the expected one; for a
    network with other numbers of layers, with these numbers first.
    """
    try:
        return match_nodes(file)
    except KerasFileError as error:
        found = count_classes(layer.class_name for layer in file.layers)
        other = "" if found == EXPECTED else f"not a ResNet8, which has {EXPECTED}; found {found}: "
        raise KerasFileError(f"{other}{error}") from None


def count_classes(class_names: Iterable[str]) -> str:
    """Return the numbers of layers with weights as text, by class."""
    counts = Counter(class_names)
    return ", ".join(f"{counts[class_name]} {class_name}" for class_name in MAPPING)


EXPECTED = count_classes(node.required["class_name"][0] for node in GRAPH.values())


def match_nodes(file: KerasFile) -> dict[str, Layer]:
    """Match all layers, as `match_graph` does."""
    inputs = inputs_of(file)
    unmatched = [layer for layer in file.layers[1:] if not layer.is_identity]
    sides = file.input_shape[:2] if merge_paddings(unmatched, inputs) else [None, None]
    matched, reduction = {"input": file.layers[0]}, {"input": 1}  # of the image's size, by node
    for layer in unmatched.copy():
        if layer.class_name in INPUT_NORMALIZATION and inputs[layer.name] == [matched["input"].name]:
            check_options(layer, INPUT_NORMALIZATION[layer.class_name], "input")
            matched["input"] = layer
            unmatched.remove(layer)

    def match(node: str, required: dict[str, list], sources: list[str]) -> None:
        names = sorted(matched[source].name for source in sources)
        matched[node] = find_layer(node, required, names, unmatched, inputs)
        unmatched.remove(matched[node])

    for node, (required, sources, _) in GRAPH.items():
        before, stride = reduction[sources[0]], usual_options(required).get("strides", [1])[0]
        reduction[node] = before * stride
        if required.get("kernel_size") == [[3, 3]] and (stride == 1 or None not in sides):
            zeros = [[1, 1] if stride == 1 else [-(-side // before) % 2, 1] for side in sides]
            required = {**required, "padding": [*required["padding"], zeros]}  # 'same' adds these
        match(node, required, sources)
    if unmatched and matched["fc"].config.get("activation") != "softmax":
        match("softmax", SOFTMAX, ["fc"])
    if unmatched:
        raise KerasFileError(
            f"layer '{unmatched[0].name}' ({unmatched[0].class_name}): not part of a ResNet8"
        )
    check_pooling(file, matched["avgpool"])
    check_batch_norms([layer for layer in matched.values() if layer.class_name == "BatchNormalization"])
    return matched


def merge_paddings(layers: list[Layer], inputs: dict[str, list[str]]) -> bool:
    """Make each ZeroPadding2D the padding option of the one 'valid' convolution after it, in place.

    Return whether there was one.
    """
    length = len(layers)
    for padding in [layer for layer in layers if layer.class_name == "ZeroPadding2D"]:
        readers = [layer for layer in layers if inputs[layer.name] == [padding.name]]
        is_last = padding.config.get("data_format") in ("channels_last", None)
        if is_last and [each.config.get("padding") for each in readers] == ["valid"]:
            config = {**readers[0].config, "padding": padding.config["padding"]}
            layers[layers.index(readers[0])] = replace(readers[0], config=config)
            inputs[readers[0].name] = inputs[padding.name]
            layers.remove(padding)
    return len(layers) < length


def inputs_of(file: KerasFile) -> dict[str, list[str]]:
    """Return the sorted names of each layer's input layers, with identity layers skipped."""
    by_name = {layer.name: layer for layer in file.layers}

    def source(name: str) -> str:
        while by_name[name].is_identity:
            name = by_name[name].inputs[0]
        return name

    return {layer.name: sorted(map(source, layer.inputs)) for layer in file.layers}


def find_layer(
    node: str, required: dict[str, list], names: list[str], unmatched: list[Layer], inputs: dict
) -> Layer:
    """Return the only layer with the inputs `names` and the class and options required by the node."""
    readers = [layer for layer in unmatched if inputs[layer.name] == names]
    fits = [layer for layer in readers if layer.class_name in required["class_name"]]
    if len(readers) > 1:  # a strided block's first convolution and its shortcut have the same input
        fits = [layer for layer in fits if layer.config.get("kernel_size") in required.get("kernel_size", [])]
    if len(fits) != 1:
        candidates = readers or [layer for layer in unmatched if set(inputs[layer.name]) & set(names)]
        found = " and ".join(
            f"{layer.class_name} '{layer.name}' of {inputs[layer.name]}{kernel_size(layer.config)}"
            for layer in candidates
        )
        expected = f"{' or '.join(required['class_name'])} as {node}{kernel_size(usual_options(required))}"
        raise KerasFileError(f"after {names}: found {found or 'nothing'}, expected one {expected}")
    check_options(fits[0], required, node)
    return fits[0]


def usual_options(required: dict[str, list]) -> dict:
    """Return the first allowed value of each required option."""
    return {option: allowed[0] for option, allowed in required.items()}


def kernel_size(options: dict) -> str:
    """Return a layer's kernel size as text for a message, "" if it has none."""
    return f" (kernel_size {options['kernel_size']})" if "kernel_size" in options else ""


def check_options(layer: Layer, required: dict[str, list], node: str) -> None:
    """Raise KerasFileError for an option that changes the layer's function."""
    options = {**layer.config, "class_name": layer.class_name}
    for option, allowed in required.items():
        value = options.get(option, allowed[0])
        if value not in allowed:
            other = ", PyTorch's padding=1 and another function" if value == [[1, 1], [1, 1]] else ""
            reason = f"{option} is {value!r:.60}{other}, expected {allowed[0]!r} ({node})"
            raise KerasFileError(f"layer '{layer.name}' ({layer.class_name}): {reason}")


def check_pooling(file: KerasFile, pool: Layer) -> None:
    """Raise KerasFileError unless the pooling covers the whole feature map and its output is a vector."""
    is_sized = pool.class_name == "AveragePooling2D"
    if is_sized:
        size, whole = pool.config.get("pool_size"), [-(-side // 4) for side in file.input_shape[:2] if side]
        if size != whole:
            raise KerasFileError(f"layer '{pool.name}': pool_size is {size}, expected {whole} (avgpool)")
        if pool.config.get("padding", "valid") != "valid" and pool.config.get("strides") != whole:
            raise KerasFileError(f"layer '{pool.name}': expected padding 'valid' (avgpool)")
    has_flatten = any(layer.class_name == "Flatten" for layer in file.layers)
    if (is_sized or pool.config.get("keepdims")) and not has_flatten:
        raise KerasFileError(f"layer '{pool.name}' keeps the spatial axes; expected a Flatten after it")


def check_batch_norms(norms: list[Layer]) -> None:
    """Raise KerasFileError unless all BatchNormalizations have the same epsilon and momentum."""
    for option in ("epsilon", "momentum"):
        first = norms[0].config.get(option)
        for layer in norms:
            value = layer.config.get(option)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise KerasFileError(f"layer '{layer.name}': {option} is {value!r}, expected a number 0-1")
            if value != first:
                expected = f"expected {first} as in '{norms[0].name}'"
                raise KerasFileError(f"layer '{layer.name}': {option} is {value}, {expected}")


# --- Graphs for tensors without one -----------------------------------------------------------------------

NamedArrays = tuple[str, dict[str, np.ndarray]]  # a layer's name, and its arrays by variable


def keras_layers(
    channels: int,
    width: int,
    classes: int,
    image_size: tuple[int | None, int | None],
    norm: dict[str, float],
    weights_of: Callable[[str, str, tuple[int, ...]], NamedArrays],
) -> list[Layer]:
    """Return the layers of a ResNet8 in graph order, as GRAPH defines them.

    `weights_of(node, class_name, shape)` returns the name and the arrays of a node's layer; `shape` is the
    shape of its first array, () if it has none. `norm` has epsilon and momentum.
    """
    name, _ = weights_of("input", "InputLayer", ())
    layers = [Layer(name, "InputLayer", {"name": name, "batch_shape": [None, *image_size, channels]}, ())]
    names, outputs = {"input": name}, {"input": channels}  # by node: layer name, number of output channels
    for node, (required, sources, filters) in GRAPH.items():
        inputs = outputs[sources[0]]
        outputs[node] = classes if node == "fc" else filters * width or inputs
        options = usual_options(required)
        class_name = options.pop("class_name")
        shape, size = {
            "Conv2D": ((*options.get("kernel_size", ()), inputs, outputs[node]), {"filters": outputs[node]}),
            "BatchNormalization": ((inputs,), norm),
            "Dense": ((inputs, classes), {"units": classes}),
        }.get(class_name, ((), {}))
        name, arrays = weights_of(node, class_name, shape)
        enabled = {v.enabled_by: v.name in arrays for v in MAPPING.get(class_name, ()) if v.enabled_by}
        config = {"name": name, **options, **enabled, **size}
        layers.append(Layer(name, class_name, config, tuple(names[source] for source in sources), arrays))
        names[node] = name
    return layers


def layers_of_state_dict(
    state: Mapping[str, np.ndarray], image_size: tuple[int | None, int | None], norm: dict[str, float]
) -> list[Layer]:
    """Return the Keras layers of a ResNet8's state_dict, named after their nodes.

    `state` has float32 arrays by PyTorch key, whose axes are permuted back; `norm` has epsilon and momentum.
    """

    def weights_of(node: str, class_name: str, _: tuple[int, ...]) -> NamedArrays:
        return node.replace(".", "_"), {
            variable.name: state[f"{node}.{variable.parameter}"].transpose(np.argsort(variable.axes))
            for variable in MAPPING.get(class_name, ())
        }

    width, channels, *_ = state["conv1.weight"].shape
    return keras_layers(channels, width, len(state["fc.bias"]), image_size, norm, weights_of)


def add_rescaling(layers: list[Layer], normalization: Normalization) -> list[Layer]:
    """Return the layers with a Rescaling layer after the input, which normalizes pixels 0-255."""
    scale = [1 / value for value in normalization.std]
    offset = [0 - value * factor for value, factor in zip(normalization.mean, scale, strict=True)]  # not -0
    one_for_all = len(set(zip(scale, offset, strict=True))) == 1
    config = {"scale": scale[0], "offset": offset[0]} if one_for_all else {"scale": scale, "offset": offset}
    first, second, *others = layers
    rescaling = Layer("rescaling", "Rescaling", {"name": "rescaling", **config}, (first.name,))
    return [first, rescaling, replace(second, inputs=("rescaling",)), *others]


def place_weights(file: KerasFile, bn_eps: float = 1e-3) -> KerasFile:
    """Return the file; if it holds weights alone, with the graph of a ResNet8 added.

    Weights are matched by shape and saved order. `bn_eps` is the BatchNormalization epsilon to assume.
    Raises KerasFileError if they are not a ResNet8's, or their order is ambiguous.
    """
    if file.config is not None:
        return file
    unplaced = sort_weights(file.layers)
    _, _, channels, width = unplaced["Conv2D"][0].arrays["kernel"].shape
    classes = unplaced["Dense"][0].arrays["kernel"].shape[1]

    def weights_of(node: str, class_name: str, shape: tuple[int, ...]) -> NamedArrays:
        if class_name not in MAPPING:
            return f"#{node}", {}
        fits = [layer for layer in unplaced[class_name] if next(iter(layer.arrays.values())).shape == shape]
        stems = {running_number(layer.name)[0] for layer in fits}
        if len(stems) > 1 and not file.names_tensors:  # only numbers in names give the order
            names = ", ".join(f"'{layer.name}'" for layer in fits)
            raise KerasFileError(f"{names} have shape {shape}, and their order is not in the file")
        if not fits:
            raise KerasFileError(f"no tensor of shape {shape} left for {node}, with width {width}")
        unplaced[class_name].remove(fits[0])
        return fits[0].name, fits[0].arrays

    norm = {"epsilon": bn_eps, "momentum": 0.99}
    layers = tuple(keras_layers(channels, width, classes, (32, 32), norm, weights_of))
    names = [layer.name for layer in layers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise KerasFileError(f"two layers have the name '{twice[0]}'")
    check_values(layers)
    assumed = (
        "weights alone, matched by shape and saved order; assumed: BatchNormalization epsilon "
        f"{bn_eps:g} (--bn-eps) and momentum 0.99, 'same' padding, strides 1, 2, 2, ReLU, softmax, "
        "32 x 32 inputs"
    )
    return replace(file, layers=layers, assumed=assumed)


def sort_weights(saved: tuple[Layer, ...]) -> dict[str, list[Layer]]:
    """Return the layers of a file of weights alone by class, in saved order; their tensors give the class.

    Raises KerasFileError unless there are as many of each class as in a ResNet8.
    """
    layers: dict[str, list[Layer]] = {class_name: [] for class_name in MAPPING}
    for layer in saved:
        if not layer.name.isprintable():
            raise KerasFileError(f"layer '{layer.name}' has control codes in its name")
        class_name, variables = class_of(layer)
        arrays = dict(zip(variables, layer.arrays.values(), strict=False))
        layers[class_name].append(replace(layer, class_name=class_name, arrays=arrays))

    found = count_classes(name for name, members in layers.items() for _ in members)
    if found != EXPECTED:
        raise KerasFileError(f"found weights of {found}; a ResNet8 has {EXPECTED}")
    return layers


def class_of(layer: Layer) -> tuple[str, list[str]]:
    """Return the class and the variables of a layer that is known by its tensors alone."""
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
            f"'{layer.name}' has three tensors: gamma or beta is missing, which is ambiguous"
        )
    shapes = [array.shape for array in layer.arrays.values()]
    raise KerasFileError(f"'{layer.name}' has tensors of shapes {shapes}: not a layer of a ResNet8")
