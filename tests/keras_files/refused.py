# ruff: noqa: N803  # K is the Keras library, L its layers
"""Networks that are not a ResNet8, and words of the message that refuses each."""

from collections.abc import Callable
from types import ModuleType

import numpy as np

from tests.keras_files.networks import (
    CLASSES,
    SHAPE,
    WIDTH,
    Variant,
    each,
    padded_conv,
    pooled_by,
    resnet8,
    variant,
)


def two_outputs(K: ModuleType) -> object:
    model = resnet8(K)
    return K.Model(model.input, [model.output, K.layers.Dense(3)(model.layers[-2].output)])


def two_inputs(K: ModuleType) -> object:
    model, second = resnet8(K), K.Input(SHAPE)
    return K.Model([model.input, second], K.layers.Add()([model.output, resnet8(K)(second)]))


def nested_two_inputs(K: ModuleType) -> object:
    """A nested model's inputs are a ReLU and the input of that ReLU, which is the shortcut's."""
    model = resnet8(K)
    add, relu, *last = model.layers[-12:]  # from layer2.add on
    assert isinstance(add, K.layers.Add), "layer2.add has moved"
    first, second = K.Input(relu.output.shape[1:]), K.Input(relu.output.shape[1:])
    shortcut = [layer for layer in last if getattr(layer, "kernel_size", None) == (1, 1)]
    x, cut = first, second
    for layer in last:
        if layer in shortcut:
            cut = layer(cut)
        else:
            x = layer([x, cut] if isinstance(layer, K.layers.Add) else x)
    head = K.Model([first, second], x, name="odd")
    return K.Model(model.input, head([relu.output, add.output]))


def nested_tanh(K: ModuleType) -> object:
    """A layer `drop`, followed by a nested model `m` that begins with a tanh."""
    inputs = K.Input(SHAPE)
    model = resnet8(K, change={"input": named("Activation", "tanh")})
    inside = K.Model(model.input, model.output, name="m")
    return K.Model(inputs, inside(K.layers.Dropout(0.1, name="drop")(inputs)))


def shared_layer(K: ModuleType) -> object:
    conv = K.layers.Conv2D(WIDTH, 3, padding="same", name="shared")
    return resnet8(K, change=each("layer1.conv1 layer1.conv2", lambda L, x: conv(x)))


def perceptron(K: ModuleType) -> object:
    return K.Sequential([K.Input((48,)), K.layers.Dense(9, "relu"), K.layers.Dense(CLASSES, "softmax")])


def depthwise_separable(K: ModuleType) -> object:
    """The beginning of a MobileNet, with another first layer."""
    inputs = K.Input(SHAPE)
    x = K.layers.Conv2D(WIDTH, 3, 2, padding="same", name="odd")(inputs)
    for filters in (WIDTH, 2 * WIDTH):
        x = K.layers.ReLU()(K.layers.BatchNormalization()(K.layers.DepthwiseConv2D(3, padding="same")(x)))
        x = K.layers.ReLU()(K.layers.BatchNormalization()(K.layers.Conv2D(filters, 1)(x)))
    return K.Model(inputs, K.layers.Dense(CLASSES, "softmax")(K.layers.GlobalAveragePooling2D()(x)))


def custom(name: str) -> Variant:
    """Return a network with a custom layer, registered as `name`."""

    def build(K: ModuleType) -> object:
        utils = K.utils if hasattr(K.utils, "register_keras_serializable") else K.saving
        content = {"call": lambda self, x: x * 2, "__module__": "__main__"}  # as in a user's script
        layer = utils.register_keras_serializable("evil")(type(name, (K.layers.Layer,), content))
        return resnet8(K, change={"relu1": lambda L, x: layer(name="odd")(x)})

    return Variant(build)


def conv_with(**options: object) -> Callable:
    options = {"filters": WIDTH, "kernel_size": 3, "padding": "same", "name": "odd", **options}
    return lambda L, x: L.Conv2D(**options)(x)


def named(layer: str, *arguments: object, **options: object) -> Callable:
    return lambda L, x: getattr(L, layer)(*arguments, name="odd", **options)(x)


def adapted_over(axis: int) -> Callable:
    """Return a Normalization of three rows or columns, where there are three channels too."""

    def normalized(L: ModuleType, x: object) -> object:
        layer = L.Normalization(axis=axis, name="odd")
        scales = np.reshape([0.2, 0.5, 1.0], [3 if at == axis else 1 for at in range(4)])
        layer.adapt((np.random.default_rng(0).uniform(0, 255, (8, *x.shape[1:])) * scales).astype(np.float32))
        return layer(x)

    return normalized


def after_relu(layer: str, *arguments: object, **options: object) -> Callable:
    """Return a `change` that adds a layer after a ReLU."""
    return lambda L, x: named(layer, *arguments, **options)(L, L.ReLU()(x))


def after_shortcut(layer: str) -> Callable:
    """Return a `change` that adds a layer after a shortcut's convolution."""
    return lambda L, x: named(layer)(L, conv_with(**SHORTCUT, name="cut")(L, x))


def at(node: str, change: Callable | None, words: str, **options: object) -> tuple[Variant, str]:
    """Return a row of REFUSED: a network with another layer at one node."""
    return variant(change={node: change}, **options), words


SHORTCUT = {"filters": 2 * WIDTH, "kernel_size": 1, "strides": 2, "padding": "same"}
VALUES = [1.0, 2.0, 3.0]

# fmt: off
# Networks by name, each with words of the message: layer, its class or option, the expected one
REFUSED: dict[str, tuple[Variant, str]] = {
    "tanh": at("layer1.relu1", named("Activation", "tanh"), "odd tanh relu"),
    "relu6": at("layer1.relu1", named("ReLU", max_value=6.0), "odd max_value 6"),
    "relu_slope": at("layer1.relu1", named("ReLU", negative_slope=0.1), "odd negative_slope 0.1"),
    "relu_threshold": at("layer1.relu1", named("ReLU", threshold=0.5), "odd threshold 0.5"),
    "conv_tanh": at("layer1.conv2", conv_with(activation="tanh"), "odd activation tanh"),
    "conv_relu": at("layer1.conv2", conv_with(activation="relu"), "odd activation relu"),
    "dilation": at("layer1.conv1", conv_with(dilation_rate=2), "odd dilation_rate 2 1"),
    "groups": at("layer1.conv1", conv_with(groups=2), "odd groups 2 1"),
    "kernel_5": at("layer1.conv1", conv_with(kernel_size=5), "odd kernel_size 5 3"),
    "valid_padding": at("conv1", conv_with(padding="valid"), "odd valid same"),
    "pytorch_padding": at(
        "layer2.conv1", padded_conv(2 * WIDTH, 2, 1), "Conv2D padding 1 PyTorch same layer2.conv1"
    ),
    "depthwise": at(
        "layer1.conv1", named("DepthwiseConv2D", 3, padding="same"), "odd DepthwiseConv2D Conv2D"
    ),
    "extra_conv": at("relu1", after_relu("Conv2D", WIDTH, 3, padding="same"), "odd Conv2D"),
    "subtract": at("layer2.add", named("Subtract"), "odd Subtract Add"),
    "no_skip": at("layer1.add", lambda L, x: x[0], "Add"),
    "add_itself": at("layer1.add", lambda L, x: L.Add(name="odd")([x[0], x[0]]), "odd"),
    "add_three": at("layer1.add", lambda L, x: L.Add(name="odd")([*x, x[1]]), "odd Add layer1.add"),
    "shortcut_norm": at("layer2.downsample", after_shortcut("BatchNormalization"), "odd BatchNormalization"),
    "shortcut_3x3": at(
        "layer2.downsample", conv_with(**SHORTCUT | {"kernel_size": 3}), "odd Conv2D layer2.conv1"
    ),
    "shortcut_conv_on_stage1": at(
        "layer1.add", lambda L, x: L.Add()([x[0], L.Conv2D(WIDTH, 1, name="odd")(x[1])]), "odd Conv2D"
    ),
    "norm_in_training": at(
        "layer1.bn1", lambda L, x: L.BatchNormalization(name="odd")(x, training=True), "odd training true"
    ),
    "norm_of_input": at("input", named("BatchNormalization"), "odd BatchNormalization"),
    "norm_axis_1": at("layer1.bn1", named("BatchNormalization", axis=1), "odd axis 1"),
    "epsilons_differ": at(
        "layer2.bn1", named("BatchNormalization", epsilon=1e-5), "odd epsilon 1e-05 0.001"
    ),
    "no_norm": at("layer2.bn2", None, "BatchNormalization"),
    "no_last_relu": at("layer3.relu2", None, "ReLU"),
    "preactivation": (
        variant(change={
            "layer1.bn1": named("ReLU"), "layer1.relu1": lambda L, x: L.BatchNormalization(name="late")(x)
        }),
        "odd ReLU BatchNormalization",
    ),
    "max_pooling": at("avgpool", named("GlobalMaxPooling2D"), "odd GlobalMaxPooling2D"),
    "partial_pooling": (variant(change=pooled_by(2, name="odd")), "odd pool_size 2 4"),
    "pooling_same": (variant(change=pooled_by(5, padding="same", name="odd")), "odd 5"),
    "flatten": at("avgpool", named("Flatten"), "Dense GlobalAveragePooling2D"),
    "sigmoid": at("fc", named("Dense", CLASSES, "sigmoid"), "odd sigmoid softmax"),
    "dense_twice": at("fc", lambda L, x: L.Dense(5, name="odd")(L.Dense(9)(x)), "Dense"),
    "softmax_twice": at("fc", lambda L, x: L.Softmax(name="odd")(L.Dense(CLASSES, "softmax")(x)), "odd"),
    "rescaling_inside": at("relu1", after_relu("Rescaling", 2.0), "odd Rescaling"),
    "normalization_of_rows": at(
        "input", adapted_over(1), "odd Normalization axis 1 -1 input", shape=(3, 16, 3)
    ),
    "normalization_inverted": at(
        "input", named("Normalization", mean=VALUES, variance=VALUES, invert=True), "odd invert True False"
    ),
    "other_strides": (variant(strides=(1, 2, 1), widths=(1, 2, 2)), ""),
    "two_stages": (variant(widths=(1, 2), strides=(1, 2)), ""),
    "width_not_doubling": (variant(widths=(1, 3, 4)), f"{3 * WIDTH} {2 * WIDTH}"),
    "shared": (Variant(shared_layer), "shared 2"),
    "two_outputs": (Variant(two_outputs), "2 output"),
    "two_inputs": (Variant(two_inputs), "2 input"),
    "nested_two_inputs": (Variant(nested_two_inputs), "odd 2 input"),
    "nested_tanh": (Variant(nested_tanh), "odd Activation Conv2D conv1"),
    "perceptron": (Variant(perceptron), "7 BatchNormalization 0 2 Dense conv1"),
    "depthwise_separable": (Variant(depthwise_separable), "9 Conv2D 3 strides 2 1 odd"),
    "custom_layer": (custom("Custom"), "odd Custom"),
    "custom_named_relu": (custom("ReLU"), "odd evil ReLU"),
}
# fmt: on
# Weights alone that are refused too, by writer; each number is a word of the message.
WEIGHTS_ALONE_REFUSED = {
    "keras": {
        "extra_conv": "10 9 7 1",
        "shortcut_norm": "8 9 7 1",
        "no_norm": "6 9 7 1",
        "two_stages": "6 5 9 7 1",
        "dense_twice": "2 9 7 1",
        "two_outputs": "2 9 7 1",
        "kernel_5": f"(3, 3, {WIDTH}, {WIDTH})",
        "shortcut_3x3": f"(1, 1, {WIDTH}, {2 * WIDTH})",
        "width_not_doubling": f"{2 * WIDTH}",
        "flatten": f"({4 * WIDTH}, {CLASSES})",
        "groups": f"(3, 3, {WIDTH}, {WIDTH})",
    },
    "tf_keras": {"extra_conv": "10 9 7 1", "kernel_5": f"(3, 3, {WIDTH}, {WIDTH})"},
}
# Networks that are written by Keras 2 too, whose configurations differ in slopes, calls and nesting.
REFUSED_BY_BOTH = """
    relu6 relu_slope add_itself norm_in_training norm_axis_1 normalization_inverted shared two_inputs
    nested_two_inputs nested_tanh custom_named_relu
""".split()
