"""A Keras file's layers, each in its place in the network: by the graph, never by names or order.

The table of places is GRAPH in `models/graph.py`.
"""

from collections import Counter
from collections.abc import Iterable

from models.common.errors import KerasFileError
from models.graph import GRAPH, INPUT_SCALING, SOFTMAX
from models.keras.file import KerasFile, Layer
from models.mapping import MAPPING


def match_graph(file: KerasFile) -> dict[str, Layer]:
    """Return the file's layer for each row of GRAPH, for "input", and for "softmax" if there is one.

    "input" is what conv1 reads: the InputLayer, or the last of the Rescaling and Normalization layers on it.
    Raises KerasFileError, naming the layer, what it is and what was expected, for anything but a ResNet8; for
    a network of other layers altogether, that is said first.
    """
    try:
        return find_places(file)
    except KerasFileError as error:
        raise KerasFileError(f"{other_network(file)}{error}") from None


def other_network(file: KerasFile) -> str:
    """Return how a message begins: what the file has in place of a ResNet8's layers; "" if it has as many."""

    def counted(class_names: Iterable[str]) -> str:
        counts = Counter(class_names)
        return ", ".join(f"{counts[class_name]} {class_name}" for class_name in MAPPING)

    expected = counted(place.required["class_name"][0] for place in GRAPH.values())
    found = counted(layer.class_name for layer in file.layers)
    return "" if found == expected else f"not a ResNet8, which has {expected}; here are {found}: "


def find_places(file: KerasFile) -> dict[str, Layer]:
    """Return what `match_graph` does."""
    sources = sources_of(file)
    unplaced = [layer for layer in file.layers[1:] if not layer.is_identity]
    places = {"input": file.layers[0]}
    for layer in unplaced.copy():
        if layer.class_name in INPUT_SCALING and sources[layer.name] == [places["input"].name]:
            check_options(layer, INPUT_SCALING[layer.class_name], "input")
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
