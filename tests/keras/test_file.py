"""models/keras/file.py: what is read as a Keras file, and its numbers."""

import re
import shutil

import h5py
import pytest

from convert import convert_file


def test_kind_is_told_from_the_content(keras_files, reader, tmp_path):
    shutil.copy(keras_files / "keras" / "plain.keras", tmp_path / "model.h5")
    shutil.copy(keras_files / "keras" / "plain.h5", tmp_path / "model.keras")
    assert (
        ".keras archive" in convert_file(tmp_path / "model.h5", tmp_path / "a.pt", reader)["source"]["format"]
    )
    assert (
        ".h5 whole" in convert_file(tmp_path / "model.keras", tmp_path / "a.pt", reader)["source"]["format"]
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "neither an HDF5 file nor a .keras archive"),
        (b"GIF89a", "neither an HDF5 file nor a .keras archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (b"\x89HDF\r\n\x1a\n", "damaged"),
        (b"PK\x03\x04", "damaged"),
    ],
)
def test_refuses_what_is_no_keras_file(refusal, tmp_path, content, words):
    (tmp_path / "model.h5").write_bytes(content)
    assert words in refusal(tmp_path / "model.h5")


def test_refuses_what_cannot_be_read(refusal, tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.h5")
    assert "directory" in refusal(tmp_path)


def test_refuses_hdf5_of_another_program(refusal, tmp_path):
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file["x"] = [1.0]
    assert "not of Keras" in refusal(tmp_path / "model.h5")


def test_refuses_weights_alone_of_partly_frozen_models(keras_files, refusal):
    """Keras 2 saves the frozen layers after the others: two convolutions of one shape would change places."""
    message = refusal(keras_files / "tf_keras" / "nested_partly_frozen.legacy.h5")
    assert re.search(r"layers of model 'model.*' are not saved in their order.*frozen", message)


NUMBERS = {
    "gamma": (float("nan"), "gamma has values that are NaN or infinite"),
    "beta": (float("inf"), "beta has values that are NaN or infinite"),
    "moving_mean": (float("-inf"), "moving_mean has values that are NaN or infinite"),
    "moving_variance": (-0.5, "moving_variance is negative (-0.5)"),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("format", ["h5", "legacy.h5"])
def test_impossible_numbers_are_named(edited, refusal, format, name):
    value, words = NUMBERS[name]

    def edit(file):
        group = file["model_weights"] if format == "h5" else file
        group[f"batch_normalization_3/batch_normalization_3/{name}:0"][2] = value

    message = refusal(edited(edit, f"plain.{format}", "tf_keras"))
    assert message.startswith("layer 'batch_normalization_3") and words in message, message
