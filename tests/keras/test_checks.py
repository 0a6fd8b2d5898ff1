"""The checks of the rooms that read Keras files which no network needs: each is tried by itself.

A valid file is changed in one place, and the refusal names what is wrong.
"""

import io
import json
import os
import re
import zipfile

import h5py
import numpy as np
import pytest
import torch

from convert import convert_file
from models.common.errors import KerasFileError
from models.keras import file as keras_file
from models.keras import reader as reading
from tests.keras_files.edits import KERNEL, edit_config, replace_kernel


def first_of(config, class_name):
    return next(entry for entry in config["config"]["layers"] if entry["class_name"] == class_name)


def renamed(name):
    def change(config):
        entry = first_of(config, "ReLU")
        entry["name"] = entry["config"]["name"] = name

    return edit_config(change)


def reads(class_name, source):
    """Let the first layer of a class read the layer `source`."""

    def change(config):
        first_of(config, class_name)["inbound_nodes"] = [[[source, 0, 0, {}]]]

    return edit_config(change)


def added(class_name, **options):
    """Add a layer that nothing reads."""

    def change(config):
        name = {"name": "odd"}
        entry = {"class_name": class_name, **name, "config": {**name, **options}, "inbound_nodes": []}
        if class_name != "InputLayer":
            entry["inbound_nodes"] = [[[first_of(config, "InputLayer")["config"]["name"], 0, 0, {}]]]
        config["config"]["layers"].append(entry)

    return edit_config(change)


def with_options(class_name, **options):
    return edit_config(lambda config: first_of(config, class_name)["config"].update(options))


def delete(name):
    return lambda file: file.__delitem__(name)


def named(variable):
    """Add a tensor to the first convolution, of a name that it may have already."""

    def edit(file):
        group = file["model_weights/conv2d"]
        group[variable] = np.zeros(4, np.float32)
        group.attrs["weight_names"] = [*group.attrs["weight_names"], variable]

    return edit


def many_names(file):
    file["model_weights/conv2d"].attrs["weight_names"] = np.full(20_000, b"x")


def of(array):
    return replace_kernel(lambda file, name: file.__setitem__(name, array))


def one_axis(file):
    dense = "model_weights/dense/dense/kernel"
    del file[dense]
    file[dense] = np.zeros(7, np.float32)


REFUSED = {  # what is changed -> (the file, the change, what the message names)
    "no weights": ("plain.h5", delete("model_weights"), "model_weights"),
    "long JSON": (
        "plain.h5",
        lambda file: file.attrs.__setitem__("model_config", '"' + "x" * 5 * 2**20 + '"'),
        "model_config 5,242,882",
    ),
    "a number as a name": ("plain.h5", renamed(5), ""),
    "a name that is there twice": ("plain.h5", renamed("re_lu_1"), "re_lu_1"),
    "a name with a colon": (
        "plain.h5",
        renamed("re:lu"),
        "re:lu",
    ),
    "a name with control codes": ("plain.h5", renamed("re\x1blu"), "re?lu"),
    "a second input": (
        "plain.h5",
        added("InputLayer", batch_shape=[None, 16, 16, 3]),
        "input",
    ),
    "a layer that leads nowhere": (
        "plain.h5",
        added("ReLU"),
        "odd ReLU",
    ),
    "a layer that reads itself": ("plain.h5", reads("ReLU", "re_lu"), "re_lu"),
    "a layer that reads none": (
        "plain.h5",
        reads("ReLU", "ghost"),
        "ghost",
    ),
    "an input that reads none": (
        "nested_deep.h5",
        reads("InputLayer", "ghost"),
        "ghost",
    ),
    "two tensors of a name": (
        "plain.h5",
        named("other/kernel"),
        "conv2d kernel",
    ),
    "a layer without its group": (
        "plain.h5",
        delete("model_weights/dense"),
        "dense",
    ),
    "a tensor that is missing": (
        "plain.h5",
        delete(KERNEL),
        "conv2d/kernel",
    ),
    "many names": (
        "plain.h5",
        many_names,
        "model_weights/conv2d weight_names",
    ),
    "long doubles": (
        "plain.h5",
        of(np.zeros((3, 3, 3, 4), np.longdouble)),
        KERNEL,
    ),
    "large doubles": (
        "plain.h5",
        of(np.full((3, 3, 3, 4), 1e300)),
        "conv2d kernel float32",
    ),
    "a kernel of the head with one axis": (
        "plain.h5",
        one_axis,
        "conv2d dense",
    ),
    "an input that is no image": (
        "plain.h5",
        with_options("InputLayer", batch_shape=[None, 16, 3]),
        "[None, 16, 3]",
    ),
    "an input of no size": (
        "plain.h5",
        with_options("InputLayer", batch_shape=[None, 0, 16, 3]),
        "[None, 0, 16, 3]",
    ),
    "a pooling that is padded": (
        "average_pooling.h5",
        with_options("AveragePooling2D", padding="same", strides=[1, 1]),
        "average_pooling2d padding",
    ),
    "a pooling that keeps its axes": (
        "plain.h5",
        with_options("GlobalAveragePooling2D", keepdims=True),
        "global_average_pooling2d Flatten",
    ),
    "a scale for two channels": (
        "rescaling.h5",
        with_options("Rescaling", scale=[1.0, 2.0]),
        "rescaling Rescaling",
    ),
    "control codes in weights alone": (
        "plain.weights.h5",
        lambda file: file.move("layers/dense", "layers/den\x1bse"),
        "den?se",
    ),
    "a tensor of no layer": (
        "plain.weights.h5",
        lambda file: file.__setitem__("layers/odd/vars/0", np.zeros((2, 3, 4), np.float32)),
        "odd (2, 3, 4)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_changed_is_refused(edited, refusal, what):
    name, edit, words = REFUSED[what]
    message = refusal(edited(edit, name))
    assert all(word in message for word in words.split()), message


def other_nodes(config):
    """Call the convolutions by the name of their argument, as `layer(inputs=x)` is saved."""
    for entry in config["config"]["layers"]:
        if entry["class_name"] == "Conv2D":
            (node,) = entry["inbound_nodes"]
            node["kwargs"], node["args"] = {"inputs": node["args"][0]}, []


CONVERTED = {  # what is changed, and changes nothing
    "a named argument": ("plain.h5", edit_config(other_nodes)),
    "a pooling whose one window is whole": (
        "average_pooling.h5",
        with_options("AveragePooling2D", padding="same", strides=[4, 4]),
    ),
}


@pytest.mark.parametrize("what", CONVERTED)
def test_what_changes_nothing_converts(keras_files, edited, reader, tmp_path, what):
    name, edit = CONVERTED[what]
    convert_file(keras_files / "keras" / name, tmp_path / "a.pt", reader)
    convert_file(edited(edit, name), tmp_path / "b.pt", reader)
    a, b = (torch.load(tmp_path / f"{which}.pt", weights_only=True) for which in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_convolution_that_is_saved_late_is_refused(edited, refusal):
    """Of weights alone, of a model in a model: the first one, which is frozen, comes after the first norm."""

    def edit(file):
        (group,) = [group for group in file.values() if len(group.attrs["weight_names"]) > 20]
        kernel, bias, *others = group.attrs["weight_names"]
        group.attrs["weight_names"] = [*others, kernel, bias]

    message = refusal(edited(edit, "nested_frozen.legacy.h5", "tf_keras"))
    assert re.search(r"\bmodel_\d+\b", message), message


# Archives


def with_member(path, edit):
    """Change the weights of an archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    content = io.BytesIO(members["model.weights.h5"])
    with h5py.File(content, "r+") as file:
        edit(file)
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in {**members, "model.weights.h5": content.getvalue()}.items():
            archive.writestr(name, member)
    return path


def test_layer_of_an_archive_with_too_few_tensors_is_refused(archive, refusal):
    path = with_member(archive(), lambda file: file.__delitem__("layers/dense/vars/1"))
    message = refusal(path)
    assert all(word in message for word in ("dense", "1", "kernel", "bias")), message


def test_encrypted_member_is_refused(archive, refusal):
    path = archive()
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "metadata.json" in refusal(path)


def test_large_configuration_is_refused_before_it_is_unpacked(archive, refusal):
    path = archive(config__json=json.dumps(os.urandom(5 * 2**19).hex()))
    message = refusal(path)
    assert "config.json" in message and "5,242,882" in message


def test_small_bomb_is_refused(archive, refusal):
    """Whose size is none too large, but for so small a file."""
    path = archive(zipfile.ZIP_DEFLATED, extra=bytes(2**24))
    message = refusal(path)
    assert "extra" in message and "16,777,216" in message
    assert path.stat().st_size < 2**24 / 100


# Sizes


def test_large_file_is_refused(keras_files, refusal, monkeypatch):
    monkeypatch.setattr(keras_file, "MAX_FILE_BYTES", 1000)
    refusal(keras_files / "keras" / "plain.h5")


def test_memory_that_runs_out_is_told(monkeypatch):
    def out_of_memory(content):
        raise MemoryError

    monkeypatch.setattr(reading, "limit_memory", lambda more: None)
    monkeypatch.setattr(reading, "read_content", out_of_memory)
    with pytest.raises(KerasFileError, match="memory"):
        reading.read_safely({}, {"content": np.zeros(1, np.uint8)})
