"""Every variant, format and writer: PyTorch computes what Keras computes."""

import json
import re

import numpy as np
import pytest
import torch

from convert import convert_file
from models.conversion.match import place_weights
from models.keras.file import read_keras_file
from models.resnet8 import ResNet8
from tests.keras_files.networks import CLASSES, FORMATS, SHAPE, VARIANTS, WIDTH, WRITERS, is_converted

MATRIX = [
    (writer, suffix, name)
    for suffix in FORMATS
    for name in VARIANTS
    for writer in WRITERS
    if is_converted(writer, suffix, name)
]


def log_probabilities(outputs):
    """Return the log-probabilities for a Keras model's outputs, probabilities or logits."""
    is_probabilities = (outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1)
    outputs = torch.from_numpy(outputs).double()
    return outputs.log() if is_probabilities else outputs.log_softmax(dim=1)


@pytest.mark.parametrize(("writer", "suffix", "name"), MATRIX)
def test_computes_what_keras_computes(keras_files, expected, tmp_path, writer, suffix, name):
    path, output = keras_files / writer / f"{name}{suffix}", tmp_path / "model.pt"
    metadata = convert_file(path, output, bn_eps=VARIANTS[name].bn_eps)
    assert FORMATS[suffix][0] in metadata["source"]["format"]
    assert (metadata["source"]["assumed"] is None) == (suffix in (".h5", ".keras"))

    images = expected[writer][f"{name}:images"]
    images = (images - metadata["input"]["mean"]) / metadata["input"]["std"]
    network = ResNet8.from_checkpoint(output).double()
    with torch.inference_mode():
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    outputs = expected[writer][f"{name}:outputs"]
    keras = log_probabilities(outputs)
    assert keras.min() > -30 and keras.max() < -1e-6  # a saturated softmax would hide differences
    assert (logits.log_softmax(dim=1) - keras).abs().max() <= (1e-9 if outputs.dtype == np.float64 else 1e-5)


@pytest.mark.parametrize(
    ("writer", "name", "is_softmax"),
    [
        ("keras", "softmax_then_identities.h5", True),  # taken as logits, they would get another softmax
        ("keras", "logits.weights.h5", True),  # weights alone: assumed
        ("keras", "logits.keras", False),
        ("tf_keras", "nested.h5", True),
        ("tf_keras", "noisy.keras", True),
        ("tf_keras", "shortcut_first.legacy.h5", True),
        ("keras", "operations.keras", True),
        ("tf_keras", "operations.h5", True),  # Keras 3 cannot load it
        ("keras", "zero_padding.h5", True),
    ],
)
def test_keras_agrees(keras_files, keras, tmp_path, writer, name, is_softmax):
    path = keras_files / writer / name
    assert place_weights(read_keras_file(path)).returns_probabilities is is_softmax
    verification = convert_file(path, tmp_path / "model.pt", keras)["verification"]
    assert verification["float64"]["activations"] <= 1e-10
    assert verification["float64"]["probabilities"] <= 1e-12


def test_images_discriminate(expected):
    """Each model has other outputs for each image, so that equality is no accident."""
    for writer in WRITERS:
        outputs = [expected[writer][name] for name in expected[writer].files if name.endswith(":outputs")]
        assert len(outputs) == sum(writer in variant.writers for variant in VARIANTS.values())
        assert all(np.abs(np.diff(output, axis=0)).max() > 1e-4 for output in outputs)
        assert len({output.tobytes() for output in outputs}) == len(outputs)


def test_metadata_of_a_file(keras_files, tmp_path):
    folder = keras_files / "keras"
    metadata = convert_file(folder / "epsilon_momentum.keras", tmp_path / "a.pt")
    assert metadata["architecture"] == {
        "num_classes": CLASSES, "width": WIDTH, "in_channels": SHAPE[2], "bn_eps": 1e-5, "bn_momentum": 0.1,
    }  # fmt: skip
    assert metadata["input"]["shape"] == [SHAPE[2], *SHAPE[:2]]
    metadata = convert_file(folder / "rescaling_offset.h5", tmp_path / "b.pt")
    assert metadata["input"]["mean"] == pytest.approx([127.5] * 3)
    assert metadata["input"]["std"] == pytest.approx([127.5] * 3)
    assert metadata["source"]["input"] == {"mean": [0, 0, 0], "std": [1, 1, 1]}


def test_notes_of_assumptions_and_dtypes(keras_files, tmp_path, capsys):
    for suffix in (".weights.h5", ".legacy.h5"):
        convert_file(keras_files / "tf_keras" / f"plain{suffix}", tmp_path / "a.pt", bn_eps=1e-4)
        printed = capsys.readouterr().out
        assert all(word in printed for word in ("weights alone", "assumed", "epsilon 0.0001", "--bn-eps"))
        assert json.loads((tmp_path / "a.json").read_text())["architecture"]["bn_eps"] == 1e-4
    for name in ("float16", "float64", "mixed_float16"):
        convert_file(keras_files / "keras" / f"{name}.keras", tmp_path / "a.pt")
        printed = capsys.readouterr().out
        assert re.search(rf"{name} dtype policy.*converted to float32", printed)
        assert (f"note: {name} input" in printed) == (name != "mixed_float16")
