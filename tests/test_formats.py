"""Every variant, format and writer: what PyTorch computes is what Keras computes, in float64."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from convert import convert_file
from models.keras.file import read_keras_file
from models.resnet8 import ResNet8
from tests.conftest import ROOT
from tests.keras_files.networks import CLASSES, SHAPE, VARIANTS, WIDTH, WRITERS

FORMATS = {  # suffix: who writes it, the suffix that the reader calls it by
    ".h5": (WRITERS, ".h5"),
    ".keras": (WRITERS, ".keras"),
    ".weights.h5": (WRITERS, ".weights.h5"),
    ".legacy.h5": (("tf_keras",), ".h5"),
}
MATRIX = [
    (writer, suffix, name)
    for suffix, (writers, _) in FORMATS.items()
    for name, variant in VARIANTS.items()
    for writer in writers
    if writer in variant.writers and suffix in (".h5", ".keras", *variant.weights_alone)
]


def log_probabilities(outputs):
    """Return the log-probabilities of what a Keras model returns, probabilities or logits."""
    is_probabilities = (outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1)
    outputs = torch.from_numpy(outputs)
    return outputs.log() if is_probabilities else outputs.log_softmax(dim=1)


@pytest.mark.parametrize(("writer", "suffix", "name"), MATRIX)
def test_computes_what_keras_computes(keras_files, expected, reader, tmp_path, writer, suffix, name):
    path, output = keras_files / writer / f"{name}{suffix}", tmp_path / "model.pt"
    metadata = convert_file(path, output, reader, bn_eps=VARIANTS[name].bn_eps)
    assert re.search(rf"(?<!\w){re.escape(FORMATS[suffix][1])}\b", metadata["source"]["format"])
    assert (metadata["source"]["assumed"] is None) == (suffix in (".h5", ".keras"))

    images = expected[writer][f"{name}:images"]
    images = (images - metadata["input"]["mean"]) / metadata["input"]["std"]
    network = ResNet8.from_checkpoint(output).double()
    with torch.inference_mode():
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    keras = log_probabilities(expected[writer][f"{name}:outputs"])
    assert keras.min() > -30 and keras.max() < -1e-6  # a saturated softmax would hide differences
    assert (logits.log_softmax(dim=1) - keras).abs().max() <= 1e-9


@pytest.mark.parametrize("writer", WRITERS)
def test_softmax_followed_by_identities_gives_probabilities(keras_files, reader, keras, tmp_path, writer):
    """What Keras returns is compared as what it is: as logits it would have another softmax taken of it."""
    path = keras_files / writer / "softmax_then_identities.h5"
    assert read_keras_file(path, reader).returns_probabilities
    metadata = convert_file(path, tmp_path / "model.pt", reader, keras)
    assert metadata["verification"]["float64"]["probabilities"] <= 1e-12
    assert not read_keras_file(keras_files / writer / "logits.h5", reader).returns_probabilities


def test_images_discriminate(expected):
    """Each of the models returns something else for each image, so that an equality says something."""
    for writer in WRITERS:
        outputs = [expected[writer][name] for name in expected[writer].files if name.endswith(":outputs")]
        assert len(outputs) == sum(writer in variant.writers for variant in VARIANTS.values())
        assert all(np.abs(np.diff(output, axis=0)).max() > 1e-4 for output in outputs)
        assert len({output.tobytes() for output in outputs}) == len(outputs)


def test_metadata_says_what_the_file_says(keras_files, reader, tmp_path):
    folder = keras_files / "keras"
    metadata = convert_file(folder / "epsilon_momentum.keras", tmp_path / "a.pt", reader)
    assert metadata["architecture"] == {
        "num_classes": CLASSES, "width": WIDTH, "in_channels": SHAPE[2], "bn_eps": 1e-5, "bn_momentum": 0.1,
    }  # fmt: skip
    assert metadata["input"]["shape"] == [SHAPE[2], *SHAPE[:2]]
    metadata = convert_file(folder / "rescaling_offset.h5", tmp_path / "b.pt", reader)
    assert metadata["input"]["mean"] == pytest.approx([127.5] * 3)
    assert metadata["input"]["std"] == pytest.approx([127.5] * 3)
    assert metadata["source"]["input"] == {"mean": [0, 0, 0], "std": [1, 1, 1]}


def test_says_what_was_assumed_and_converted(keras_files, reader, tmp_path, capsys):
    for suffix in (".weights.h5", ".legacy.h5"):
        convert_file(keras_files / "tf_keras" / f"plain{suffix}", tmp_path / "a.pt", reader, bn_eps=1e-4)
        printed = capsys.readouterr().out
        assert all(word in printed for word in ("0.0001", "--bn-eps"))
        assert json.loads((tmp_path / "a.json").read_text())["architecture"]["bn_eps"] == 1e-4
    for policy, count in (("float16", 3), ("float64", 3), ("mixed_float16", 1)):  # input, weights, policy
        path = keras_files / "keras" / f"{policy}.keras"
        convert_file(path, tmp_path / "a.pt", reader)
        printed, notes = capsys.readouterr().out, read_keras_file(path, reader).notes
        assert len(notes) == count and all(policy in note and note in printed for note in notes)
        assert re.search(rf"{policy}.*float32", notes[-1])


@pytest.mark.long
def test_many_files_verified_by_keras_in_one_call(keras_files, tmp_path):
    """The command goes on after a failure, and Keras agrees with every other file, whatever its format."""
    chosen = {
        "keras": [
            "plain.h5",
            "normalization_adapted.keras",
            "nested_deep.keras",
            "logits.weights.h5",
            "float16.h5",
        ],
        "tf_keras": ["nested.h5", "noisy.keras", "renamed.legacy.h5", "gray.h5"],
    }
    paths = []
    for writer, names in chosen.items():
        for name in names:
            path = tmp_path / f"{writer}_{name}".replace(".legacy", "_legacy").replace(".weights", "_weights")
            paths.append(shutil.copy(keras_files / writer / name, path))
    refused = shutil.copy(keras_files / "keras" / "refused" / "subtract.h5", tmp_path / "subtract.h5")
    paths.insert(2, refused)

    command = [sys.executable, ROOT / "convert.py", *paths, "-o", tmp_path / "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert result.returncode == 1, result.stderr
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error"], result.stderr
    assert str(refused) in result.stderr
    *_, table = result.stdout.split("\n\n")
    assert (table.count(" converted "), table.count(" refused ")) == (len(paths) - 1, 1)
    converted = [path for path in paths if path != refused]
    names = {f"{path.stem}{suffix}" for path in converted for suffix in (".pt", ".json")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for path in converted:
        verification = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())["verification"]
        assert verification["float64"]["activations"] <= 1e-10
        assert verification["float64"]["probabilities"] <= 1e-12
