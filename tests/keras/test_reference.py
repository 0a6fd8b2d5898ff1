"""models/keras/reference.py: outputs and activations of Keras, against its own in float64."""

import numpy as np
import pytest

from models.common.job import JobError
from models.conversion.match import place_weights
from models.keras.file import read_keras_file
from models.normalization import Normalization
from tests.keras_files.edits import edit_config

NORMALIZATION = Normalization.from_args(3)


def images_of(expected, writer, name):
    """Return a variant's (N, C, H, W) images and its outputs."""
    return expected[writer][f"{name}:images"].transpose(0, 3, 1, 2), expected[writer][f"{name}:outputs"]


@pytest.mark.parametrize(
    ("name", "rebuilt"),  # Keras 3 does not load the nested models in Keras 2's archives
    [
        ("nested.h5", False),
        ("dict_output.h5", False),
        ("nested_deep.keras", True),
        ("full_size.weights.h5", True),
    ],
)
def test_every_layer_is_recorded(keras_files, expected, keras, name, rebuilt):
    file = place_weights(read_keras_file(keras_files / "tf_keras" / name))
    images, outputs = images_of(expected, "tf_keras", name.split(".")[0])
    answer, arrays = keras.reference(file, images, images, NORMALIZATION)
    assert bool(answer["rebuilt"]) is rebuilt
    weighted = [layer.name for layer in file.layers if layer.arrays]
    assert len(weighted) == 17 and {f"float64/{layer}" for layer in weighted} <= arrays.keys()
    assert np.abs(arrays["float64"] - outputs).max() <= 1e-14
    last = f"float64/{file.output_layer.name}"
    assert np.array_equal(arrays["float64"], arrays[last]) and arrays[last].dtype == np.float64


@pytest.mark.parametrize(
    "name", ["softmax_layer.h5", "softmax_activation.h5", "nested.h5", "operations.keras"]
)
def test_softmax_is_removed(keras_files, expected, keras, name):
    file = read_keras_file(keras_files / "keras" / name)
    images, outputs = images_of(expected, "keras", name.split(".")[0])
    logits = keras.predict(file, images, NORMALIZATION, file.output_layer)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.abs(probabilities - outputs).max() <= 1e-5
    assert np.abs(keras.predict(file, images, NORMALIZATION) - outputs).max() <= 1e-5
    assert logits.dtype == np.float32 and np.abs(logits - outputs).max() > 0.1


def test_output_in_a_list(edited, keras, expected):
    path = edited(edit_config(lambda config: config["config"].update(output_layers=[["dense", 0, 0]])))
    images, outputs = images_of(expected, "keras", "plain")
    assert np.abs(keras.predict(read_keras_file(path), images, NORMALIZATION) - outputs).max() <= 1e-5


def test_failure_is_one_line(keras_files, keras):
    file = read_keras_file(keras_files / "keras" / "plain.h5")
    with pytest.raises(JobError, match="Keras") as caught:
        keras.predict(file, np.zeros((1, 5, 16, 16)), Normalization.from_args(5))
    assert len(str(caught.value).splitlines()) == 1
