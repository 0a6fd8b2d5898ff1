"""models/keras/file.py: what is read as a Keras file, and its numbers."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from convert import convert_file
from models.keras.file import Layer, read_keras_file


def test_kind_is_told_from_the_content(keras_files, reader, tmp_path):
    shutil.copy(keras_files / "keras" / "plain.keras", tmp_path / "model.h5")
    shutil.copy(keras_files / "keras" / "plain.h5", tmp_path / "model.keras")
    for name, kind in (("model.h5", ".keras"), ("model.keras", ".h5")):
        assert kind in convert_file(tmp_path / name, tmp_path / "a.pt", reader)["source"]["format"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"GIF89a", "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "LFS"),
        (b"\x89HDF\r\n\x1a\n", ""),
        (b"PK\x03\x04", ""),
    ],
)
def test_refuses_what_is_no_keras_file(refusal, tmp_path, content, words):
    (tmp_path / "model.h5").write_bytes(content)
    assert words in refusal(tmp_path / "model.h5")


def test_refuses_what_cannot_be_read(refusal, tmp_path):
    refusal(tmp_path / "absent.h5")
    refusal(tmp_path)


def test_refuses_hdf5_of_another_program(refusal, tmp_path):
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file["x"] = [1.0]
    assert "Keras" in refusal(tmp_path / "model.h5")


def test_refuses_weights_of_a_subclassed_model(edited, refusal):
    """By its attributes' names, in no order; the message says how to save it whole."""

    def edit(file):
        file.move("layers", "others")
        file.move("others/dense", "fc")

    assert "keras.Model" in refusal(edited(edit, "plain.weights.h5"))


def test_refuses_what_keras_loads_in_another_order(edited, refusal, reader, tmp_path):
    """With gamma frozen alone, Keras saves it after beta, and loads one for the other."""
    name = "batch_normalization_3"

    def reorder(file, name, names):
        attributes = file[f"model_weights/{name}"].attrs
        assert [one.split("/")[-1] for one in attributes["weight_names"]] != names
        attributes["weight_names"] = [f"{name}/{variable}" for variable in names]

    saved = ["beta", "gamma", "moving_mean", "moving_variance"]
    message = refusal(edited(lambda file: reorder(file, name, saved)))
    assert all(words in message for words in (name, "beta, gamma, moving_mean", "gamma, beta, moving_mean"))
    # Keras sees that a kernel is no bias, and has the arrays from us
    path = edited(lambda file: reorder(file, "dense", ["bias", "kernel"]))
    convert_file(path, tmp_path / "a.pt", reader)


def test_lora_is_in_the_kernel_of_an_archive_and_beside_it_in_hdf5(
    keras_files, archive, edited, refusal, reader
):
    """So Keras is not to add it again; `.h5` has what it consists of."""
    with zipfile.ZipFile(keras_files / "keras" / "plain.keras") as file:
        config = json.loads(file.read("config.json"))
    config["config"]["layers"][-1]["config"] |= {"lora_rank": 2, "lora_alpha": 2}
    file = read_keras_file(archive(config__json=json.dumps(config)), reader)
    assert file.layers[-1].class_name == "Dense" and file.layers[-1].arrays["kernel"].shape == (16, 7)
    assert "lora" not in json.dumps(file.config)

    def edit(file):
        group = file["model_weights/dense"]
        for name in ("lora_kernel_a", "lora_kernel_b"):
            group[f"dense/{name}"] = np.zeros((2, 2), np.float32)
        names = [*group.attrs["weight_names"], "dense/lora_kernel_a", "dense/lora_kernel_b"]
        group.attrs["weight_names"] = names

    message = refusal(edited(edit))
    assert all(word in message for word in ("dense", "lora_kernel_a", ".keras")), message


def test_refuses_weights_alone_of_partly_frozen_models(keras_files, refusal):
    """Keras 2 saves the frozen layers after the others: two convolutions of one shape would change places."""
    message = refusal(keras_files / "tf_keras" / "nested_partly_frozen.legacy.h5")
    assert re.search(r"\bmodel_\d+\b", message), message


@pytest.mark.parametrize(
    "saved",
    [{"m/x": ["kernel:0", "kernel:1"]}, {"m": ["x/kernel:0"], "m/x": ["m/x/bias:0"]}],
    ids=["two kernels", "two layers"],
)
def test_refuses_weights_alone_that_are_not_of_one_layer(edited, refusal, saved):
    """Two kernels of one layer; and a layer `m/x` beside a layer x of the model m."""

    def edit(file):
        file.attrs["layer_names"] = [*file.attrs["layer_names"], *saved]
        for layer, tensors in saved.items():
            group = file.require_group(layer)
            group.attrs["weight_names"] = tensors
            for tensor in tensors:
                group[tensor] = np.zeros((3, 3, 3, 4) if "kernel" in tensor else 4, np.float32)

    message = refusal(edited(edit, "plain.legacy.h5", "tf_keras"))
    assert "m/x" in message


@pytest.mark.parametrize(
    ("source", "target"),
    [("batch_normalization_1", "batch_normalization"), ("dense", "layers/#relu")],
    ids=["outside of layers", "a name of our own"],
)
def test_refuses_weights_alone_with_two_layers_of_one_name(edited, refusal, source, target):
    """By their names go what they read and their arrays; `#relu` we call the ReLU that such a file lacks."""
    path = edited(lambda file: file.move(f"layers/{source}", target), "plain.weights.h5")
    assert Path(target).name in refusal(path)


NUMBERS = {
    "gamma": (float("nan"), "NaN"),
    "beta": (float("inf"), "inf"),
    "moving_mean": (float("-inf"), "inf"),
    "moving_variance": (-0.5, "-0.5"),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("format", ["h5", "legacy.h5"])
def test_impossible_numbers_are_named(edited, refusal, format, name):
    value, word = NUMBERS[name]

    def edit(file):
        group = file["model_weights"] if format == "h5" else file
        group[f"batch_normalization_3/batch_normalization_3/{name}:0"][2] = value

    message = refusal(edited(edit, f"plain.{format}", "tf_keras"))
    assert all(named in message for named in ("batch_normalization_3", name, word)), message


@pytest.mark.parametrize(("dtype", "is_identity"), [("float16", True), ("float64", True), ("uint8", False)])
def test_a_cast_computes_nothing_unless_it_rounds_to_integers(dtype, is_identity):
    assert Layer("cast", "Cast", {"dtype": dtype}, ()).is_identity is is_identity
