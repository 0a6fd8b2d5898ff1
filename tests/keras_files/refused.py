# ruff: noqa: N803  # K is the Keras library, L its layers
"""Networks that are no ResNet8, and what the refusal of each must say."""

from collections.abc import Callable
from types import ModuleType

import numpy as np

from tests.keras_files.networks import (
    CLASSES,
    SHAPE,
    WIDTH,
    Variant,
    dense_then,
    each,
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
    """A model inside reads, as two inputs, a ReLU and what it is of: the shortcut is not of the ReLU."""
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
    """A layer, `drop`, and after it a model inside, `m`, that begins with a tanh."""
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
    """The beginning of a MobileNet, whose very first layer is another."""
    inputs = K.Input(SHAPE)
    x = K.layers.Conv2D(WIDTH, 3, 2, padding="same", name="odd")(inputs)
    for filters in (WIDTH, 2 * WIDTH):
        x = K.layers.ReLU()(K.layers.BatchNormalization()(K.layers.DepthwiseConv2D(3, padding="same")(x)))
        x = K.layers.ReLU()(K.layers.BatchNormalization()(K.layers.Conv2D(filters, 1)(x)))
    return K.Model(inputs, K.layers.Dense(CLASSES, "softmax")(K.layers.GlobalAveragePooling2D()(x)))


def custom(K: ModuleType, name: str) -> Callable:
    """Return a `change` into a registered layer of our own called `name`."""
    register = (
        K.utils.register_keras_serializable("evil")
        if hasattr(K.utils, "register_keras_serializable")
        else None
    )
    register = register or K.saving.register_keras_serializable("evil")
    content = {"call": lambda self, x: x * 2, "__module__": "__main__"}  # as from somebody's script
    layer = register(type(name, (K.layers.Layer,), content))
    return lambda L, x: layer(name="odd")(x)


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


def behind(place_layer: Callable, layer: Callable) -> Callable:
    return lambda L, x: layer(L, place_layer(L, x))


SHORTCUT = {"filters": 2 * WIDTH, "kernel_size": 1, "strides": 2, "padding": "same"}

# What must be refused: name -> (network, words that the message must hold: where, what, what was expected).
REFUSED: dict[str, tuple[Variant, str]] = {
    "tanh": (variant(change=each("layer1.relu1", named("Activation", "tanh"))), "odd tanh relu"),
    "leaky_relu": (variant(change=each("layer1.relu1", named("LeakyReLU"))), "odd LeakyReLU ReLU"),
    "relu6": (variant(change=each("layer1.relu1", named("ReLU", max_value=6.0))), "odd max_value 6"),
    "relu_slope": (
        variant(change=each("layer1.relu1", named("ReLU", negative_slope=0.1))),
        "odd negative_slope 0.1",
    ),
    "relu_threshold": (
        variant(change=each("layer1.relu1", named("ReLU", threshold=0.5))),
        "odd threshold 0.5",
    ),
    "elu": (variant(change=each("layer3.relu2", named("Activation", "elu"))), "odd elu relu"),
    "conv_tanh": (variant(change=each("layer1.conv2", conv_with(activation="tanh"))), "odd activation tanh"),
    "conv_relu": (variant(change=each("layer1.conv2", conv_with(activation="relu"))), "odd activation relu"),
    "subtract": (variant(change=each("layer2.add", named("Subtract"))), "odd Subtract Add"),
    "multiply": (variant(change=each("layer2.add", named("Multiply"))), "odd Multiply Add"),
    "average": (variant(change=each("layer2.add", named("Average"))), "odd Average Add"),
    "norm_in_training": (
        variant(change=each("layer1.bn1", lambda L, x: L.BatchNormalization(name="odd")(x, training=True))),
        "odd training true",
    ),
    "dropout_in_training": (
        variant(change=each("relu1", lambda L, x: L.Dropout(0.5, name="odd")(L.ReLU()(x), training=True))),
        "odd training true",
    ),
    "no_skip": (variant(change=each("layer1.add", lambda L, x: x[0])), "Add"),
    "add_itself": (variant(change=each("layer1.add", lambda L, x: L.Add(name="odd")([x[0], x[0]]))), "odd"),
    "add_three": (
        variant(change=each("layer1.add", lambda L, x: L.Add(name="odd")([*x, x[1]]))),
        "odd Add layer1.add",
    ),
    "shortcut_relu": (
        variant(
            change=each("layer2.downsample", behind(conv_with(**SHORTCUT | {"name": "cut"}), named("ReLU")))
        ),
        "odd ReLU",
    ),
    "shortcut_norm": (
        variant(
            change=each(
                "layer2.downsample",
                behind(conv_with(**SHORTCUT | {"name": "cut"}), named("BatchNormalization")),
            )
        ),
        "odd BatchNormalization",
    ),
    "shortcut_conv_on_stage1": (
        variant(
            change=each("layer1.add", lambda L, x: L.Add()([x[0], L.Conv2D(WIDTH, 1, name="odd")(x[1])]))
        ),
        "odd Conv2D",
    ),
    "no_last_relu": (variant(change=each("layer3.relu2", None)), "ReLU"),
    "no_first_relu": (variant(change=each("relu1", None)), "ReLU"),
    "no_norm": (variant(change=each("layer2.bn2", None)), "BatchNormalization"),
    "preactivation": (
        variant(
            change=each("layer1.bn1", named("ReLU"))
            | each("layer1.relu1", named("BatchNormalization"))
            | {"layer1.relu1": lambda L, x: L.BatchNormalization(name="late")(x)}
        ),
        "odd ReLU BatchNormalization",
    ),
    "dilation": (variant(change=each("layer1.conv1", conv_with(dilation_rate=2))), "odd dilation_rate 2 1"),
    "groups": (variant(change=each("layer1.conv1", conv_with(groups=2))), "odd groups 2 1"),
    "kernel_5": (variant(change=each("layer1.conv1", conv_with(kernel_size=5))), "odd kernel_size 5 3"),
    "shortcut_3x3": (
        variant(change=each("layer2.downsample", conv_with(**SHORTCUT | {"kernel_size": 3}))),
        "odd Conv2D layer2.conv1",
    ),
    "max_pooling": (
        variant(change=each("avgpool", lambda L, x: L.GlobalMaxPooling2D(name="odd")(x))),
        "odd GlobalMaxPooling2D",
    ),
    "max_pooling_inside": (
        variant(change=each("relu1", lambda L, x: L.MaxPooling2D(2, name="odd")(L.ReLU()(x)))),
        "odd MaxPooling2D",
    ),
    "partial_pooling": (variant(change=pooled_by(2, name="odd")), "odd pool_size 2 4"),
    "pooling_same": (variant(change=pooled_by(5, padding="same", name="odd")), "odd 5"),
    "flatten": (variant(change=each("avgpool", named("Flatten"))), "Dense GlobalAveragePooling2D"),
    "sigmoid": (variant(change=each("fc", named("Dense", CLASSES, "sigmoid"))), "odd sigmoid softmax"),
    "dense_relu": (variant(change=each("fc", named("Dense", CLASSES, "relu"))), "odd relu softmax"),
    "sigmoid_layer": (
        variant(change=dense_then(lambda L: L.Activation("sigmoid", name="odd"))),
        "odd sigmoid",
    ),
    "softmax_twice": (
        variant(change=each("fc", lambda L, x: L.Softmax(name="odd")(L.Dense(CLASSES, "softmax")(x)))),
        "odd",
    ),
    "dense_twice": (variant(change=each("fc", lambda L, x: L.Dense(5, name="odd")(L.Dense(9)(x)))), "Dense"),
    "valid_padding": (
        variant(change=each("conv1", conv_with(padding="valid"))),
        "odd valid same",
    ),
    "valid_strided": (
        variant(
            shape=(17, 17, 3),
            change=each("layer2.conv1", lambda L, x: L.ZeroPadding2D(1, name="odd")(x))
            | {
                "layer2.conv1": lambda L, x: L.Conv2D(2 * WIDTH, 3, 2, name="odd")(
                    L.ZeroPadding2D(1, name="pad")(x)
                )
            },
        ),
        "Conv2D layer2.conv1",
    ),
    "stride_first": (variant(change=each("conv1", conv_with(strides=2))), "odd strides 2 1"),
    "other_strides": (variant(strides=(1, 2, 1), widths=(1, 2, 2)), ""),
    "epsilons_differ": (
        variant(change=each("layer2.bn1", named("BatchNormalization", epsilon=1e-5))),
        "odd epsilon 1e-05 0.001",
    ),
    "shared": (Variant(shared_layer), "shared 2"),
    "two_outputs": (Variant(two_outputs), "2 output"),
    "two_inputs": (Variant(two_inputs), "2 input"),
    "nested_two_inputs": (Variant(nested_two_inputs), "odd 2 input"),
    "nested_tanh": (Variant(nested_tanh), "odd Activation Conv2D conv1"),
    "extra_conv": (
        variant(
            change=each("relu1", lambda L, x: L.Conv2D(WIDTH, 3, padding="same", name="odd")(L.ReLU()(x)))
        ),
        "odd Conv2D",
    ),
    "rescaling_inside": (
        variant(change=each("relu1", lambda L, x: L.Rescaling(2.0, name="odd")(L.ReLU()(x)))),
        "odd Rescaling",
    ),
    "normalization_of_rows": (
        variant(shape=(3, 16, 3), change={"input": adapted_over(1)}),
        "odd Normalization axis 1 -1 input",
    ),
    "normalization_of_columns": (
        variant(shape=(16, 3, 3), change={"input": adapted_over(2)}),
        "odd Normalization axis 2 -1 input",
    ),
    "normalization_inverted": (
        variant(
            change={"input": named("Normalization", mean=[1.0, 2, 3], variance=[1.0, 2, 3], invert=True)}
        ),
        "odd invert True False",
    ),
    "norm_of_input": (
        variant(change={"input": lambda L, x: L.BatchNormalization(name="odd")(x)}),
        "odd BatchNormalization",
    ),
    "depthwise": (
        variant(change=each("layer1.conv1", named("DepthwiseConv2D", 3, padding="same"))),
        "odd DepthwiseConv2D Conv2D",
    ),
    "layer_norm": (variant(change=each("layer1.bn1", named("LayerNormalization"))), "odd LayerNormalization"),
    "two_stages": (variant(widths=(1, 2), strides=(1, 2)), ""),
    "four_stages": (variant(widths=(1, 2, 4, 8), strides=(1, 2, 2, 2)), ""),
    "width_not_doubling": (variant(widths=(1, 3, 4)), f"{3 * WIDTH} {2 * WIDTH}"),
    "width_constant": (variant(widths=(1, 1, 1)), f"{WIDTH} {2 * WIDTH}"),
    "norm_axis_1": (variant(change=each("layer1.bn1", named("BatchNormalization", axis=1))), "odd axis 1"),
    "perceptron": (Variant(perceptron), "7 BatchNormalization 0 2 Dense conv1"),
    "depthwise_separable": (Variant(depthwise_separable), "9 Conv2D 3 strides 2 1 odd"),
    "custom_layer": (
        Variant(lambda K: resnet8(K, change=each("relu1", custom(K, "Custom")))),
        "odd Custom",
    ),
    "custom_named_relu": (
        Variant(lambda K: resnet8(K, change=each("relu1", custom(K, "ReLU")))),
        "odd evil ReLU",
    ),
}
# The same of those whose weights alone must be refused too: each number stands there by itself.
WEIGHTS_ALONE_REFUSED = {
    "extra_conv": "10 9 7 1",
    "shortcut_norm": "8 9 7 1",
    "no_norm": "6 9 7 1",
    "two_stages": "6 5 9 7 1",
    "four_stages": "12 9 7 1",
    "dense_twice": "2 9 7 1",
    "two_outputs": "2 9 7 1",
    "kernel_5": f"(3, 3, {WIDTH}, {WIDTH})",
    "shortcut_3x3": f"(1, 1, {WIDTH}, {2 * WIDTH})",
    "width_not_doubling": f"{2 * WIDTH}",
    "flatten": f"({4 * WIDTH}, {CLASSES})",
    "groups": f"(3, 3, {WIDTH}, {WIDTH})",
}
