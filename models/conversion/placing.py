"""A ResNet8's graph, in Keras's terms, for tensors that come without one: weights alone, and a state_dict.

All of it is derived from GRAPH, the one statement of the network in `models/graph.py`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from models.common.errors import KerasFileError
from models.graph import GRAPH
from models.keras.file import KerasFile, Layer, check_values, running_number
from models.mapping import MAPPING
from models.scaling import Scaling

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


def graph_of(
    state: Mapping[str, np.ndarray], image_size: tuple[int | None, int | None], norm: dict[str, float]
) -> list[Layer]:
    """Return the layers of a ResNet8's state_dict, in Keras's terms, named after their places.

    `state` has float32 arrays by PyTorch's keys, whose axes are permuted back; `norm` has epsilon and
    momentum of the BatchNormalizations.
    """

    def permuted_back(place: str, class_name: str, _: tuple[int, ...]) -> Saved:
        return place.replace(".", "_"), {
            variable.name: state[f"{place}.{variable.parameter}"].transpose(np.argsort(variable.axes))
            for variable in MAPPING.get(class_name, ())
        }

    width, channels, *_ = state["conv1.weight"].shape
    return keras_layers(channels, width, len(state["fc.bias"]), image_size, norm, permuted_back)


def with_rescaling(layers: list[Layer], scaling: Scaling) -> list[Layer]:
    """Return the layers with a Rescaling after the input, which scales the pixels."""
    scale = [1 / value for value in scaling.std]
    offset = [0 - value * factor for value, factor in zip(scaling.mean, scale, strict=True)]  # 0, not -0
    one_for_all = len(set(zip(scale, offset, strict=True))) == 1
    config = {"scale": scale[0], "offset": offset[0]} if one_for_all else {"scale": scale, "offset": offset}
    first, second, *others = layers
    rescaling = Layer("rescaling", "Rescaling", {"name": "rescaling", **config}, (first.name,))
    return [first, rescaling, replace(second, inputs=("rescaling",)), *others]


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
    names = [layer.name for layer in layers]
    twice = [name for name in names if names.count(name) > 1]
    if twice:  # by its name goes what a layer reads
        raise KerasFileError(f"two layers are called '{twice[0]}'")
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
