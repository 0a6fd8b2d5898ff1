"""models/keras/container.py: no file runs code, reads another file, or is read in two ways."""

import json
import re
import struct
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest

from models.common.errors import KerasFileError
from models.keras.container import check_classes
from models.keras.file import read_keras_file
from tests.conftest import ROOT
from tests.keras_files.edits import KERNEL, edit_config, replace_kernel
from tests.keras_files.networks import WRITERS

# --- No code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("writer", WRITERS)
def test_lambda_is_refused_by_name_and_never_run(keras_files, refusal, writer, suffix):
    """The writer has seen this file's code leave its mark when Keras loads it."""
    folder = keras_files / writer / "hostile"
    message = refusal(folder / f"lambda{suffix}")
    assert "odd" in message and "Lambda" in message, message
    assert not (folder / "mark").exists()


def test_lambda_never_reaches_the_keras_process(keras_files, tmp_path):
    """The whole command, which would verify with Keras."""
    folder = keras_files / "keras" / "hostile"
    for suffix in (".h5", ".keras"):
        result = subprocess.run(
            [sys.executable, ROOT / "convert.py", folder / f"lambda{suffix}", "-o", tmp_path / "model.pt"],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert result.returncode == 1
        assert re.fullmatch(rf"error: .*lambda{suffix}.*Lambda.*\n", result.stderr), result.stderr
    assert not (folder / "mark").exists() and not list(tmp_path.iterdir())


SMUGGLED = {
    "module": {"module": "os", "class_name": "Zeros", "config": {}, "registered_name": None},
    "submodule": {"module": "keras.src.utils.os", "class_name": "Zeros", "config": {}},
    "subprocess": {"module": "subprocess", "class_name": "Popen", "config": {"args": "touch mark"}},
    "builtin": {"module": "builtins", "class_name": "function", "config": "exec"},
    "numpy": {"class_name": "__numpy__", "config": {"value": [1], "dtype": "object"}},
    "lambda": {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}},
    "lambda_layer": {"class_name": "Lambda", "config": {"name": "f", "function": ["4wEAAAA=", None, None]}},
    "wrapper": {"class_name": "TimeDistributed", "config": {"layer": {"class_name": "Lambda", "config": {}}}},
    "registered": {"module": "keras", "class_name": "Zeros", "config": {}, "registered_name": "evil>Zeros"},
    "registered_class": {"class_name": "evil>Zeros", "config": {}},
    "no_string": {"class_name": ["Zeros"], "config": {}},
    "load_model": {"module": "keras.models", "class_name": "load_model", "config": {"filepath": "/tmp/x"}},
    "get_file": {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "http://127.0.0.1"}},
    "tfsm_layer": {"class_name": "TFSMLayer", "config": {"filepath": "/tmp/x"}},
}  # fmt: skip
ODD = {"module": "os", "submodule": "keras.src.utils.os", "registered": "evil>Zeros", "no_string": "Zeros"}


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("name", SMUGGLED)
def test_nested_class_is_refused(edited, refusal, name, depth):
    """However deep it stands in the configuration: in an initializer, or in a list in a dictionary in it."""
    smuggled = SMUGGLED[name]
    for _ in range(depth):
        smuggled = {"class_name": "Zeros", "config": {"x": [smuggled]}}

    def change(config):
        layer = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Conv2D")
        layer["config"]["kernel_initializer"] = smuggled

    message = refusal(edited(edit_config(change)))
    odd = ODD.get(name) or SMUGGLED[name]["class_name"]
    assert re.search(rf"\b{odd}\b", message), message


@pytest.mark.parametrize("place", ["compile_config", "build_config", "anything"])
def test_class_outside_the_layers_is_refused_or_dropped(archive, keras_files, reader, tmp_path, place):
    with zipfile.ZipFile(keras_files / "keras" / "plain.keras") as file:
        config = json.loads(file.read("config.json"))
    config[place] = {"optimizer": SMUGGLED["subprocess"]}
    path = archive(config__json=json.dumps(config))
    if place == "compile_config":  # Keras is not given it
        assert "Popen" not in json.dumps(read_keras_file(path, reader).config)
    else:
        with pytest.raises(KerasFileError, match="Popen"):
            read_keras_file(path, reader)


# --- No other file ---------------------------------------------------------------------------------------


def other_file(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["secret"] = np.ones((3, 3, 3, 4), np.float32)
    return path


def external_storage(file, name):
    file.create_dataset(name, (3, 3, 3, 4), np.float32, external=[("/etc/hostname", 0, 432)])


def virtual_data(file, name):
    layout = h5py.VirtualLayout((3, 3, 3, 4), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "secret", (3, 3, 3, 4))
    file.create_virtual_dataset(name, layout)


OUTSIDE = {
    "external_link": (
        lambda file, name: file.__setitem__(name, h5py.ExternalLink("other.h5", "secret")),
        "link",
    ),
    "soft_link": (lambda file, name: file.__setitem__(name, h5py.SoftLink("/model_weights/dense")), "link"),
    "dangling_link": (lambda file, name: file.__setitem__(name, h5py.SoftLink("/nowhere")), "link"),
    "external_storage": (external_storage, ""),
    "virtual_data": (virtual_data, ""),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_outside_the_file_is_refused(edited, refusal, tmp_path, name):
    other_file(tmp_path)
    make, words = OUTSIDE[name]
    message = refusal(edited(replace_kernel(make)))
    assert words in message and KERNEL in message, message


@pytest.mark.parametrize("format", ["legacy.h5", "weights.h5"])
def test_data_outside_a_weights_file_is_refused(edited, refusal, tmp_path, format):
    other_file(tmp_path)

    def edit(file):
        names = []
        file.visititems(lambda name, member: names.append(name) if isinstance(member, h5py.Dataset) else None)
        del file[names[0]]
        file[names[0]] = h5py.ExternalLink("other.h5", "secret")

    assert "link" in refusal(edited(edit, f"plain.{format}", "tf_keras"))


def test_cycle_of_hard_links_ends(edited, refusal):
    message = refusal(edited(lambda file: file["model_weights"].__setitem__("again", file["/"])))
    assert "model_weights/again" in message


def test_more_objects_than_any_model_has_are_refused(edited, refusal):
    def edit(file):
        for number in range(10_001):
            file.create_group(f"extra/{number}")

    assert "10,000" in refusal(edited(edit))


# --- Archives and JSON -----------------------------------------------------------------------------------


def test_zip_bomb_is_refused(archive, refusal):
    path = archive(zipfile.ZIP_DEFLATED, config__json=b" " * 2**28)
    assert path.stat().st_size < 2**20
    message = refusal(path)
    assert "config.json" in message and "268,435,456" in message


def test_zip_bomb_with_a_small_declared_size_is_refused(archive, refusal):
    """The sizes in the archive's headers lie."""
    path = archive(zipfile.ZIP_DEFLATED, config__json=b" " * 2**28)
    content = path.read_bytes().replace(struct.pack("<I", 2**28), struct.pack("<I", 1000))
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(archive, refusal, compression):
    assert "metadata.json" in refusal(archive(compression))


def test_member_that_stands_twice_is_refused(archive, refusal):
    """Two readers may take different ones."""
    path = archive()
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("config.json", "{}")
    assert "config.json" in refusal(path)


@pytest.mark.parametrize("name", ["config__json", "metadata__json", "model__weights__h5"])
def test_member_that_is_missing_is_named(archive, refusal, name):
    assert name.replace("__", ".") in refusal(archive(**{name: None}))


JSON = {
    "deep": ('{"a":' * 100 + "1" + "}" * 100, "101"),
    "very deep": ("[" * 10**6, "config"),  # config.json or model_config
    "quotes": ('"' + r"\"" * 10**6, "JSON"),
    "long": ('"' + "x" * 5 * 2**20 + '"', "5,242,882"),
    "number": ('{"a": ' + "1" * 10**6 + "}", "JSON"),
    "array": ("[1, 2]", "JSON"),
    "nothing": ("", "JSON"),
    "empty": ("{}", ""),
    "no layers": ('{"class_name": "Functional", "config": {}}', ""),
    "empty layers": ('{"class_name": "Functional", "config": {"layers": []}}', ""),
    "no object": ('{"class_name": "Functional", "config": {"layers": [1, 2]}}', ""),
}


@pytest.mark.parametrize("name", JSON)
def test_odd_json_is_refused(archive, edited, refusal, name):
    source, words = JSON[name]
    assert words in refusal(archive(config__json=source))
    if len(source) < 60_000:  # an attribute holds no more
        assert words in refusal(edited(lambda file: file.attrs.__setitem__("model_config", source)))


def test_bytes_that_are_no_text_are_refused(archive, refusal):
    refusal(archive(config__json=b'{"a": "\xff"}'))


@pytest.mark.parametrize("dtype", ["uint8", "int32", None, {"class_name": "DTypePolicy"}])
def test_a_cast_that_rounds_never_reaches_keras(dtype):
    cast = {
        "class_name": "Cast",
        "name": "cast",
        "module": "keras.src.ops.core",
        "config": {"dtype": "float16"},
    }
    check_classes({"layers": [cast]})
    cast["config"]["dtype"] = dtype
    with pytest.raises(KerasFileError, match=r"Cast.*dtype|dtype.*Cast"):
        check_classes({"layers": [cast]})
