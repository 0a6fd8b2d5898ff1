# ruff: noqa: N803, N806  # K is the Keras library, L its layers
"""ResNet8s in Keras, in every variant that can be converted.

Weights are random, BatchNorm's statistics, gamma and beta too, so that no swap can hide. Nothing here imports
Keras: functions that build a network receive the library, Keras 3 or tf_keras.
"""

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

WRITERS = ("keras", "tf_keras")
SHAPE = (16, 16, 3)
WIDTH = 4  # few numbers, so that a damaged byte often matters
CLASSES = 7


def resnet8(
    K: ModuleType,
    shape: tuple = SHAPE,
    width: int = WIDTH,
    classes: int = CLASSES,
    conv: dict | None = None,
    norm: dict | None = None,
    change: dict | None = None,
    rename: Callable[[str], str] | None = None,
    shortcut_first: bool = False,
    nest_stages: bool = False,
    widths: tuple = (1, 2, 4),
    strides: tuple = (1, 2, 2),
) -> object:
    """Return a ResNet8 with options `conv` and `norm` for its layers.

    `change` maps a node such as `layer2.bn1` to a function (layers, x) -> x that replaces the layer; None
    removes it.
    """
    L, change = K.layers, change or {}

    def name(place: str) -> dict:
        return {"name": rename(place)} if rename else {}

    def put(place: str, x: object, layer: Callable, **options: object) -> object:
        if place in change:
            return change[place](L, x) if change[place] else x
        return layer(**options, **name(place))(x)

    def put_conv(place: str, x: object, filters: int, kernel: int = 3, stride: int = 1) -> object:
        options = {"strides": stride, "padding": "same", **(conv or {})}
        return put(place, x, L.Conv2D, filters=filters, kernel_size=kernel, **options)

    def stage(at: str, x: object, filters: int, stride: int) -> object:
        def shortcut() -> object:
            return x if stride == 1 else put_conv(f"{at}.downsample", x, filters, 1, stride)

        early = shortcut() if shortcut_first else None
        y = put_conv(f"{at}.conv1", x, filters, 3, stride)
        y = put(f"{at}.relu1", put(f"{at}.bn1", y, L.BatchNormalization, **(norm or {})), L.ReLU)
        y = put_conv(f"{at}.conv2", y, filters)
        y = put(f"{at}.bn2", y, L.BatchNormalization, **(norm or {}))
        y = put(f"{at}.add", [early, y] if shortcut_first else [y, shortcut()], L.Add)
        return put(f"{at}.relu2", y, L.ReLU)

    inputs = x = K.Input(shape, **name("input"))
    x = put("input", x, L.Layer) if "input" in change else x
    x = put("bn1", put_conv("conv1", x, width), L.BatchNormalization, **(norm or {}))
    x = put("relu1", x, L.ReLU)
    for index, (factor, stride) in enumerate(zip(widths, strides, strict=True), start=1):
        if nest_stages:
            inner = K.Input(x.shape[1:])
            x = K.Model(inner, stage(f"layer{index}", inner, factor * width, stride), name=f"stage{index}")(x)
        else:
            x = stage(f"layer{index}", x, factor * width, stride)
    x = put("avgpool", x, L.GlobalAveragePooling2D)
    return K.Model(inputs, put("fc", x, L.Dense, units=classes, activation="softmax"))


@dataclass(frozen=True)
class Variant:
    """A network, its dtype policy, and the formats of weights alone that can be converted."""

    build: Callable[[ModuleType], object]
    policy: str = "float32"
    weights_alone: tuple[str, ...] = (".weights.h5", ".legacy.h5")
    writers: tuple[str, ...] = WRITERS
    bn_eps: float = 1e-3  # for weights alone, which do not have it
    pixels: bool = False  # takes images from 0 to 255


def variant(policy: str = "float32", writers: tuple = WRITERS, **options: object) -> Variant:
    """Return the Variant that is `resnet8` with `options`."""
    more = {key: options.pop(key) for key in ("weights_alone", "bn_eps", "pixels") if key in options}
    return Variant(lambda K: resnet8(K, **options), policy, writers=writers, **more)


def misleading(place: str) -> str:
    """Return a misleading name for a layer."""
    rng = random.Random(place)
    return f"{rng.choice(['conv2d', 'dense', 'add', 'batch_normalization', 'x'])}_{rng.randrange(10**6)}"


def each(places: str, function: Callable | None) -> dict:
    """Return a `change` of several nodes, such as `layer1.relu1 layer1.relu2`."""
    return {place: function for place in places.split()}


RELUS = "relu1 " + " ".join(f"layer{index}.relu{number}" for index in (1, 2, 3) for number in (1, 2))


def pooled_by(size: object, **options: object) -> dict:
    return {"avgpool": lambda L, x: L.Flatten()(L.AveragePooling2D(size, **options)(x))}


def dense_then(make: Callable | None) -> dict:
    def head(L: ModuleType, x: object) -> object:
        logits = L.Dense(CLASSES)(x)
        return make(L)(logits) if make else logits

    return {"fc": head}


def adapted(L: ModuleType, x: object, axis: int | None = -1) -> object:
    layer = L.Normalization(axis=axis)
    layer.adapt(np.random.default_rng(0).uniform(0, 255, (8, *SHAPE)).astype(np.float32) * [0.5, 0.8, 1.0])
    return layer(x)


def cast(_: ModuleType, x: object) -> object:
    """An operation, as Keras 3.5 to 3.8 has before every layer of a mixed policy."""
    return importlib.import_module("keras").ops.cast(x, "float64")


def operation(name: str) -> Callable:
    """Return a layer of no class: an operation of Keras 3, or for Keras 2 of TensorFlow."""

    def call(L: ModuleType, x: object) -> object:
        is_keras2 = "tf_keras" in L.__name__
        library = importlib.import_module("tensorflow" if is_keras2 else "keras.ops")
        return getattr(library.nn, name)(x)

    return call


def padded_conv(filters: int, strides: int, zeros: object) -> Callable:
    return lambda L, x: L.Conv2D(filters, 3, strides)(L.ZeroPadding2D(zeros)(x))


def noisy(K: ModuleType) -> object:
    """Augmentation, dropout and noise in all usual places."""

    def augmented(L: ModuleType, x: object) -> object:
        if K.__name__ == "keras" or K.backend.floatx() != "float64":  # tf_keras cannot build these in float64
            x = L.RandomZoom(0.1)(L.RandomRotation(0.1)(L.RandomFlip("horizontal")(x)))
            x = L.RandomContrast(0.1)(x)
        return L.GaussianNoise(0.1)(x)

    change = {
        "input": augmented,
        "relu1": lambda L, x: L.Dropout(0.3)(L.ReLU()(x)),
        "layer1.relu2": lambda L, x: L.SpatialDropout2D(0.3)(L.ReLU()(x)),
        "layer2.downsample": lambda L, x: L.GaussianDropout(0.1)(
            L.Conv2D(2 * WIDTH, 1, 2, padding="same")(x)
        ),
        "avgpool": lambda L, x: L.Dropout(0.5)(L.GlobalAveragePooling2D()(x)),
    }
    return resnet8(K, change=change)


def nested(K: ModuleType) -> object:
    """A whole model inside a functional one, behind an input layer."""
    inputs = K.Input(SHAPE)
    return K.Model(inputs, resnet8(K)(K.layers.Rescaling(1 / 255)(inputs)))


def dict_output(K: ModuleType) -> object:
    model = resnet8(K)
    return K.Model(model.input, {"probabilities": model.output})


def integer_input(K: ModuleType) -> object:
    inputs = K.Input(SHAPE, dtype="uint8")
    return K.Model(inputs, resnet8(K)(K.layers.Rescaling(1 / 127.5, offset=-1)(inputs)))


def nested_frozen(K: ModuleType) -> object:
    """Transfer learning as in Keras's guides: the nested model is called with training=False."""
    inputs = K.Input(SHAPE)
    backbone = resnet8(K, change=each("fc", None))
    backbone.trainable = False
    return K.Model(inputs, K.layers.Dense(CLASSES, activation="softmax")(backbone(inputs, training=False)))


def nested_partly_frozen(K: ModuleType) -> object:
    """A convolution of the nested model is frozen: Keras 2's save_weights saves it after the others."""
    inputs = K.Input(SHAPE)
    backbone = resnet8(K, change=each("fc", None))
    [layer for layer in backbone.layers if isinstance(layer, K.layers.Conv2D)][1].trainable = False
    return K.Model(inputs, K.layers.Dense(CLASSES, activation="softmax")(backbone(inputs)))


def nested_deep(K: ModuleType) -> object:
    """Sequential of augmentation, of a model in a model, and of the head."""
    L = K.layers
    backbone = resnet8(K, change=each("fc", None))
    inputs = K.Input(SHAPE)
    middle = K.Model(inputs, backbone(inputs), name="middle")
    augmentation = K.Sequential([L.RandomFlip("horizontal")], name="augmentation")
    return K.Sequential([K.Input(SHAPE), augmentation, middle, L.Dropout(0.2), L.Dense(CLASSES, "softmax")])


def compiled(K: ModuleType) -> object:
    """A network after a step of training: the file has an optimizer's state and a loss."""
    model = resnet8(
        K, conv={"kernel_initializer": "he_normal", "kernel_regularizer": K.regularizers.L2(1e-4)}
    )
    model.compile(K.optimizers.Adam(1e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    tensorflow = importlib.import_module("tensorflow")
    tensorflow.config.run_functions_eagerly(True)  # compiling a step takes seconds
    model.fit(np.zeros((2, *SHAPE), np.float32), np.zeros(2), verbose=0)
    tensorflow.config.run_functions_eagerly(False)
    model.layers[3].trainable = False
    return model


def at_input(layer: Callable, **options: object) -> Variant:
    """Return a variant with a layer at the input, which takes pixels from 0 to 255."""
    return variant(change={"input": layer}, weights_alone=(), pixels=True, **options)


# Numbers that float32 represents exactly: tf_keras, and Keras 3 in arrays, do not round them to it.
SCALES, OFFSETS = np.array([1 / 256, 1 / 128, 1 / 64]), np.array([0, -1, 0.5], np.float32)
EXACT_FRACTIONS = {"mean": [0.5, 0.46875, 0.4375], "variance": [0.0625, 0.03125, 0.125]}
ROUNDED = {"mean": [125.3, 123.0, 113.9], "variance": [3969.1, 3856, 4452]}
WITH_NUMBERS = (".weights.h5",)  # nested models: Keras 2's order of saving does not name the layers

KERAS3 = ("keras",)  # variants whose configuration and weights Keras 2 writes as in another variant
# fmt: off
VARIANTS = {
    "plain": variant(),
    "shortcut_first": variant(shortcut_first=True, rename=misleading),
    "full_size": variant(width=16, classes=10, shape=(32, 32, 3)),
    "gray": variant(shape=(28, 28, 1), classes=2, writers=KERAS3),
    "four_channels": variant(  # the width: the first kernel has the shape of the next two
        shape=(16, 16, 4), writers=KERAS3
    ),
    "odd_input": variant(shape=(33, 21, 3), writers=KERAS3),
    "any_input": variant(shape=(None, None, 3)),
    "no_bias": variant(
        conv={"use_bias": False},
        change={"fc": lambda L, x: L.Dense(CLASSES, "softmax", use_bias=False)(x)},
    ),
    "no_scale": variant(norm={"scale": False}, weights_alone=(".legacy.h5",)),
    "no_center": variant(norm={"center": False}, weights_alone=(".legacy.h5",)),
    "no_scale_no_center": variant(norm={"scale": False, "center": False}, writers=KERAS3),
    "epsilon_momentum": variant(
        norm={"epsilon": 1e-5, "momentum": 0.9},
        change=each(RELUS, lambda L, x: L.Activation("relu")(L.Activation("linear")(x))),
        bn_eps=1e-5,
    ),
    "average_pooling": variant(change=pooled_by(4), writers=KERAS3),
    "average_pooling_oblong": variant(shape=(64, 48, 3), classes=100, change=pooled_by((16, 12), strides=1)),
    "softmax_layer": variant(change=dense_then(lambda L: L.Softmax())),
    "softmax_activation": variant(change=dense_then(lambda L: L.Activation("softmax")), writers=KERAS3),
    "softmax_then_identities": variant(change=dense_then(
        lambda L: lambda x: L.Dropout(0.1)(L.Activation("linear")(L.Activation("softmax")(x)))
    )),
    "logits": variant(change=dense_then(None)),
    "noisy": Variant(noisy),
    "rescaling": at_input(lambda L, x: L.Rescaling(1 / 255)(x), writers=KERAS3),
    "rescaling_offset": at_input(lambda L, x: L.Rescaling(1 / 127.5, offset=-1)(x)),
    "rescaling_numpy": at_input(lambda L, x: L.Rescaling(SCALES, offset=OFFSETS)(x), writers=KERAS3),
    "normalization_rounded": at_input(lambda L, x: L.Normalization(**ROUNDED)(x), writers=KERAS3),
    "normalization_adapted": at_input(adapted),
    "normalization_of_all": at_input(lambda L, x: adapted(L, x, None), writers=KERAS3),
    "rescaling_normalization": at_input(
        lambda L, x: L.Normalization(**EXACT_FRACTIONS)(L.Rescaling(1 / 255)(x))
    ),
    "nested": Variant(nested, weights_alone=(), pixels=True),
    "dict_output": Variant(dict_output),
    "integer_input": Variant(integer_input, weights_alone=(), pixels=True, writers=KERAS3),
    "nested_stages": variant(nest_stages=True, weights_alone=()),
    "nested_deep": Variant(nested_deep, weights_alone=WITH_NUMBERS),
    "nested_frozen": Variant(nested_frozen, weights_alone=WITH_NUMBERS),
    "nested_partly_frozen": Variant(nested_partly_frozen, weights_alone=WITH_NUMBERS),
    "compiled": Variant(compiled),
    "valid_where_equal": variant(writers=KERAS3, change={
        "layer2.downsample": lambda L, x: L.Conv2D(2 * WIDTH, 1, 2)(x),
        "layer3.downsample": lambda L, x: L.Conv2D(4 * WIDTH, 1, 2)(x),
    }),
    "operations": variant(change={
        **each("layer1.add layer2.add layer3.add", lambda L, x: x[0] + x[1]),
        **each(RELUS, operation("relu")),
        "fc": lambda L, x: operation("softmax")(L, L.Dense(CLASSES)(x)),
    }),
    "zero_padding": variant(shape=(20, 17, 3), writers=KERAS3, change={  # the zeros of 'same'
        "conv1": padded_conv(WIDTH, 1, 1),
        "layer2.conv1": padded_conv(2 * WIDTH, 2, ((0, 1), (1, 1))),
        "layer3.conv1": padded_conv(4 * WIDTH, 2, ((0, 1), (1, 1))),
    }),
    "casts": variant(writers=KERAS3, change={
        "input": cast,
        "relu1": lambda L, x: cast(L, L.ReLU()(x)),
        "fc": lambda L, x: cast(L, L.Dense(CLASSES, activation="softmax")(x)),
    }),
    "float16": variant("float16", writers=KERAS3),
    "float64": variant("float64"),
    "bfloat16": variant("bfloat16", writers=KERAS3),
    "mixed_float16": variant("mixed_float16"),
    "mixed_bfloat16": variant("mixed_bfloat16", writers=KERAS3),
}
# fmt: on
# Whose outputs are computed in float64, by another model with the same weights; other outputs are float32.
IN_FLOAT64 = "plain full_size nested nested_deep dict_output casts rescaling_normalization".split()
FORMATS = {  # suffix: the reader's name for it, writers
    ".h5": (".h5 whole model", WRITERS),
    ".keras": (".keras archive", WRITERS),
    ".weights.h5": (".weights.h5 weights", WRITERS),
    ".legacy.h5": (".h5 weights", ("tf_keras",)),
}
ONLY = {  # the other variants have the same configuration and weights in these formats as in another one
    ("keras", ".keras"): """
        plain shortcut_first full_size any_input no_bias no_scale epsilon_momentum rescaling_numpy
        rescaling_normalization logits noisy normalization_adapted nested dict_output integer_input
        nested_stages nested_deep nested_frozen compiled operations casts float16 float64 mixed_float16
    """.split(),
    ("keras", ".weights.h5"): """
        plain shortcut_first full_size gray four_channels no_bias no_scale_no_center epsilon_momentum logits
        noisy nested_deep nested_frozen nested_partly_frozen compiled float16 bfloat16
    """.split(),
    (
        "tf_keras",
        ".keras",
    ): "plain shortcut_first noisy nested nested_deep normalization_adapted operations".split(),
    ("tf_keras", ".weights.h5"): "plain shortcut_first nested_deep full_size".split(),
}


def is_converted(writer: str, suffix: str, name: str) -> bool:
    """Return whether a variant's file of a writer and a format is converted by the tests."""
    return (
        writer in FORMATS[suffix][1]
        and writer in VARIANTS[name].writers
        and suffix in (".h5", ".keras", *VARIANTS[name].weights_alone)
        and name in ONLY.get((writer, suffix), VARIANTS)
    )


def randomize(model: object, rng: np.random.Generator) -> None:
    """Draw every weight so that logits are near 1; a Normalization keeps its own."""
    values = []
    for variable in model.weights:
        name = getattr(variable, "path", variable.name).split("/")[-1].split(":")[0]
        shape = tuple(variable.shape)
        if name == "kernel":
            gain = 2 if len(shape) == 4 else 0.02
            values.append(rng.normal(0, (gain / np.prod(shape[:-1])) ** 0.5, shape))
        elif name in ("gamma", "moving_variance"):
            values.append(rng.uniform(0.5, 2, shape))
        elif name in ("bias", "beta", "moving_mean"):
            values.append(rng.normal(0, 0.5, shape))
        else:
            values.append(np.asarray(variable))
    model.set_weights(values)
