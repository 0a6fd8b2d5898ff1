"""Files made to do harm: none runs code, reads another file, or takes time or memory to refuse."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from models.keras_file import KerasFileError, read_keras_file, start_reader
from tests.conftest import ROOT
from tests.keras_models import WRITERS

KERNEL = "model_weights/conv2d/conv2d/kernel"  # of `plain.h5`, as Keras 3 writes it
MEMORY = 1_000 * 2**20  # what the reading process may take at most, Python, NumPy and HDF5 included


@pytest.fixture
def edited(keras_files, tmp_path):
    """Return a function that copies a valid file and has it changed by `edit(h5py.File)`."""

    def make(edit, name="plain.h5", writer="keras"):
        path = tmp_path / Path(name).name
        path.write_bytes((keras_files / writer / name).read_bytes())
        with h5py.File(path, "r+") as file:
            edit(file)
        return path

    return make


@pytest.fixture
def archive(keras_files, tmp_path):
    """Return a function that copies `plain.keras` with members replaced, added, or (None) left out."""

    def make(compression=zipfile.ZIP_STORED, **members):
        members = {name.replace("__", "."): content for name, content in members.items()}
        path = tmp_path / "model.keras"
        with (
            zipfile.ZipFile(keras_files / "keras" / "plain.keras") as source,
            zipfile.ZipFile(path, "w", compression) as target,
        ):
            for name in {**dict.fromkeys(source.namelist()), **members}:
                content = members[name] if name in members else source.read(name)
                if content is not None:
                    target.writestr(name, content)
        return path

    return make


def edit_config(change):
    """Return an edit of a whole model's configuration."""

    def edit(file):
        config = json.loads(file.attrs["model_config"])
        changed = change(config) or config
        file.attrs["model_config"] = json.dumps(changed)

    return edit


def replace_kernel(make, name=KERNEL):
    def edit(file):
        del file[name]
        make(file, name)

    return edit


# --- No code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("writer", WRITERS)
def test_lambda_is_refused_by_name_and_never_run(keras_files, refusal, writer, suffix):
    """The writer has seen this file's code leave its mark when Keras loads it."""
    folder = keras_files / writer / "hostile"
    message = refusal(folder / f"lambda{suffix}")
    assert re.search(r"layer 'odd' is of class Lambda", message), message
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
        assert re.fullmatch(r"error: \S+: .*Lambda.*\n", result.stderr), result.stderr
    assert not (folder / "mark").exists() and not list(tmp_path.iterdir())


SMUGGLED = {
    "module": {"module": "os", "class_name": "Zeros", "config": {}, "registered_name": None},
    "submodule": {"module": "keras.src.utils.os", "class_name": "Zeros", "config": {}},
    "subprocess": {"module": "subprocess", "class_name": "Popen", "config": {"args": "touch mark"}},
    "builtin": {"module": "builtins", "class_name": "function", "config": "exec", "registered_name": "function"},
    "numpy": {"class_name": "__numpy__", "config": {"value": [1], "dtype": "object"}},
    "lambda": {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}},
    "lambda_layer": {"class_name": "Lambda", "config": {"name": "f", "function": ["4wEAAAA=", None, None]}},
    "wrapper": {"class_name": "TimeDistributed", "config": {"layer": {"class_name": "Lambda", "config": {}}}},
    "registered": {"module": "keras.initializers", "class_name": "Zeros", "config": {}, "registered_name": "evil>Zeros"},
    "registered_class": {"class_name": "evil>Zeros", "config": {}},
    "no_string": {"class_name": ["Zeros"], "config": {}},
    "load_model": {"module": "keras.models", "class_name": "load_model", "config": {"filepath": "/tmp/x"}},
    "get_file": {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "http://127.0.0.1"}},
    "tfsm_layer": {"class_name": "TFSMLayer", "config": {"filepath": "/tmp/x"}},
}  # fmt: skip


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
    assert "never run" in message, message


@pytest.mark.parametrize("place", ["compile_config", "build_config", "anything"])
def test_class_outside_the_layers_is_refused_or_dropped(archive, keras_files, reader, tmp_path, place):
    with zipfile.ZipFile(keras_files / "keras" / "plain.keras") as file:
        config = json.loads(file.read("config.json"))
    config[place] = {"optimizer": SMUGGLED["subprocess"]}
    path = archive(config__json=json.dumps(config))
    if place == "compile_config":  # Keras is not given it
        assert "Popen" not in json.dumps(read_keras_file(path, reader).config)
    else:
        with pytest.raises(KerasFileError, match="Popen.*never run"):
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
    "external_link": (lambda file, name: file.__setitem__(name, h5py.ExternalLink("other.h5", "secret")), "link"),
    "soft_link": (lambda file, name: file.__setitem__(name, h5py.SoftLink("/model_weights/dense")), "link"),
    "dangling_link": (lambda file, name: file.__setitem__(name, h5py.SoftLink("/nowhere")), "link"),
    "external_storage": (external_storage, "another file"),
    "virtual_data": (virtual_data, "another file"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_outside_the_file_is_refused(edited, refusal, tmp_path, name):
    other_file(tmp_path)
    make, words = OUTSIDE[name]
    message = refusal(edited(replace_kernel(make)))
    assert words in message and f"/{KERNEL}" in message, message


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
    assert "HDF5 objects" in refusal(edited(lambda file: file["model_weights"].__setitem__("again", file["/"])))


# --- No memory, no time ----------------------------------------------------------------------------------


def peak_memory(path):
    """Read a file in a process of its own and return (message, the largest memory it had, in bytes)."""
    with start_reader() as worker:
        with pytest.raises(KerasFileError) as caught:
            read_keras_file(path, worker)
        status = Path(f"/proc/{worker.process.pid}/status")
        assert worker.process.poll() is None, f"the reader died: {caught.value}"
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return str(caught.value), peak


def huge(file, name):
    file.create_dataset(name, (2**38,), np.float32, chunks=(2**20,))  # 1 TB, of which nothing is stored


def huge_contiguous(file, name):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2**38,)), creation)


def huge_chunk(file, name):
    file.create_dataset(name, (3, 3, 3, 4), np.float32, maxshape=(None,) * 4, chunks=(2**9, 2**8, 2**6, 2**6))


def compressed(file, name):
    """A gigabyte of zeros in a megabyte."""
    data = file.create_dataset(name, (2**14, 2**14), np.float32, chunks=(2**10, 2**14), compression=9)
    for row in range(0, 2**14, 2**10):
        data[row : row + 2**10] = 0


def large_elements(file, name):
    file.create_dataset(name, (3, 3), np.dtype(("V", 2**24)))


def variable_strings(file, name):
    file.create_dataset(name, (3, 3, 3, 4), h5py.string_dtype())


def compound(file, name):
    file.create_dataset(name, (3, 3), np.dtype([("a", "<f4", (100,)), ("b", h5py.string_dtype())]))


def empty(file, name):
    file[name] = h5py.Empty("f4")


def scalar(file, name):
    file[name] = 1.0


def named_type(file, name):
    file[name] = np.dtype("f4")


def group_instead(file, name):
    file.create_group(name)


TENSORS = {
    "1 TB": (huge, "declared as"),
    "1 TB contiguous": (huge_contiguous, "declared as"),
    "2 GB chunk": (huge_chunk, "declared as"),
    "compressed": (compressed, "declared as"),
    "large elements": (large_elements, "declared as"),
    "strings": (variable_strings, "not a tensor"),
    "compound": (compound, "tensor"),
    "empty": (empty, "declared as"),
    "scalar": (scalar, "shape"),
    "named type": (named_type, "Datatype"),
    "group": (group_instead, "not a tensor"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_that_is_none_is_refused(edited, refusal, name):
    make, words = TENSORS[name]
    message = refusal(edited(replace_kernel(make)))
    assert words in message and ("kernel" in message or "conv2d" in message), message


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("name", ["1 TB", "1 TB contiguous", "2 GB chunk", "compressed", "large elements"])
def test_large_tensor_takes_no_memory(edited, name):
    message, peak = peak_memory(edited(replace_kernel(TENSORS[name][0])))
    assert TENSORS[name][1] in message and peak < MEMORY
