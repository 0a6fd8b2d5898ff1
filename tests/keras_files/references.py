"""Write Keras's float64 results: single layers, padding, and whole models in both modes.

    python -m tests.keras_files.references OUT_DIR

OUT_DIR gets `NAME.h5` for each of MODELS, and `reference.npz`. Keras runs in this process alone.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

# name -> (classes, width, input shape). The odd one goes from 21 x 30 over 11 x 15 to 6 x 8: 'same' padding
# of odd and even sizes; it has as many channels as filters, so that no shape distinguishes a kernel's axes.
MODELS = {"resnet8": (10, 16, (32, 32, 3)), "odd": (7, 4, (21, 30, 4))}
BATCH = 8

SIZES, KERNELS, STRIDES = range(1, 13), range(1, 6), range(1, 4)


def same_padding(keras, rng) -> dict:
    """Return convolutions with 'same' padding for images of every size, kernel and stride."""
    image = rng.normal(size=(1, 12, 12, 2))
    found = {"same:image": image}
    for kernel in KERNELS:
        weights = [rng.normal(size=(kernel, kernel, 2, 3)), rng.normal(size=3)]
        found[f"same:{kernel}:kernel"], found[f"same:{kernel}:bias"] = weights
        for stride in STRIDES:
            layer = keras.layers.Conv2D(3, kernel, stride, padding="same", dtype="float64")
            layer.build(image.shape)
            layer.set_weights(weights)
            for size in SIZES:
                output = layer(image[:, :size, : 13 - size])
                found[f"same:{kernel}:{stride}:{size}"] = np.asarray(output)
    return found


def single_layers(keras, rng, randomize) -> dict:
    """Return the weights, an input and its output for each class of layer."""
    layers = {
        "Conv2D": (keras.layers.Conv2D(5, (3, 2), dtype="float64"), (2, 9, 8, 4)),
        "BatchNormalization": (keras.layers.BatchNormalization(dtype="float64"), (2, 3, 4, 6)),
        "Dense": (keras.layers.Dense(5, dtype="float64"), (2, 7)),
    }
    found = {}
    for name, (layer, shape) in layers.items():
        found[f"{name}:input"] = rng.normal(size=shape)
        layer.build(shape)
        randomize(layer, rng)
        found[f"{name}:output"] = np.asarray(layer(found[f"{name}:input"], training=False))
        found |= {f"{name}:{variable.name}": np.asarray(variable) for variable in layer.weights}
    return found


def passes(keras, tf, model, images, labels) -> dict:
    """Return a model's outputs, loss, gradients and, after the pass, statistics, in float64 in both modes."""
    from models.keras.reference import with_dtype

    twin = keras.models.model_from_json(json.dumps(with_dtype(json.loads(model.to_json()), "float64")))
    found = {"images": images, "labels": labels}
    for mode in ("eval", "train"):
        twin.set_weights(model.get_weights())
        with tf.GradientTape() as tape:
            probabilities = twin(images, training=mode == "train")
            loss = -tf.reduce_mean(tf.math.log(tf.gather(probabilities, labels, axis=1, batch_dims=1)))
        gradients = tape.gradient(loss, [variable.value for variable in twin.trainable_variables])
        found[f"{mode}:probabilities"] = probabilities.numpy()
        found[f"{mode}:loss"] = loss.numpy()
        for variable, gradient in zip(twin.trainable_variables, gradients, strict=True):
            found[f"{mode}:gradient:{variable.path}"] = gradient.numpy()
        for variable in twin.non_trainable_variables:
            found[f"{mode}:statistics:{variable.path}"] = np.asarray(variable)
    return found


def whole_model(name, keras, tf, rng, folder, randomize) -> dict:
    """Write NAME.h5; return its `passes`."""
    from models.keras.resnet8 import resnet8

    classes, width, shape = MODELS[name]
    model = resnet8(classes, width, shape)
    randomize(model, rng)
    model.save(folder / f"{name}.h5")
    images, labels = rng.normal(size=(BATCH, *shape)), rng.integers(0, classes, BATCH)
    found = passes(keras, tf, model, images, labels)
    return {f"{name}:{key}": value for key, value in found.items()}


def main() -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import keras
    import tensorflow as tf

    from tests.keras_files.networks import randomize

    folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
    found = same_padding(keras, rng) | single_layers(keras, rng, randomize)
    for name in MODELS:
        found |= whole_model(name, keras, tf, rng, folder, randomize)
    np.savez(folder / "reference.npz", **found)


if __name__ == "__main__":
    main()
