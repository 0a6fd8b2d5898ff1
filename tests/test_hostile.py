"""Files made to do harm: none runs code, reads another file, or takes time or memory to refuse."""

import json
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
MEMORY = 800 * 2**20  # what the reading process may take at most, Python, NumPy and HDF5 included


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
        with pytest.raises(KerasFileError, match=r"Popen.*never run"):
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
    message = refusal(edited(lambda file: file["model_weights"].__setitem__("again", file["/"])))
    assert "/model_weights/again is the same HDF5 object as another" in message


def test_more_objects_than_any_model_has_are_refused(edited, refusal):
    def edit(file):
        for number in range(10_001):
            file.create_group(f"extra/{number}")

    assert "HDF5 objects" in refusal(edited(edit))


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
    chunk = zlib.compress(bytes(2**26))
    for row in range(0, 2**14, 2**10):
        data.id.write_direct_chunk((row, 0), chunk)


def overfull_chunk(file, name):
    """A chunk of the declared size that unpacks to a gigabyte: 64 times the same deflate block."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH)
    data = file.create_dataset(name, (3, 3, 3, 4), np.float32, chunks=(3, 3, 3, 4), compression=9)
    data.id.write_direct_chunk(
        (0, 0, 0, 0), b"\x78\x9c" + block * 64 + b"\x03\x00" + struct.pack(">I", (2**30 % 65521) << 16 | 1)
    )


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
    "compressed": (compressed, "is compressed"),
    "overfull chunk": (overfull_chunk, "is compressed"),
    "large elements": (large_elements, "declared as"),
    "strings": (variable_strings, "not a tensor"),
    "compound": (compound, "tensor"),
    "empty": (empty, "not a tensor"),
    "scalar": (scalar, "axes"),
    "named type": (named_type, "Datatype"),
    "group": (group_instead, "not a tensor"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_that_is_none_is_refused(edited, refusal, name):
    make, words = TENSORS[name]
    message = refusal(edited(replace_kernel(make)))
    assert words in message and ("kernel" in message or "conv2d" in message), message


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize(
    "name", ["1 TB", "1 TB contiguous", "2 GB chunk", "compressed", "overfull chunk", "large elements"]
)
def test_large_tensor_takes_no_memory(edited, name):
    message, peak = peak_memory(edited(replace_kernel(TENSORS[name][0])))
    assert TENSORS[name][1] in message and peak < MEMORY


def many_large(file):
    """A thousand tensors, each no larger than the file, of which nothing is stored."""
    for number in range(1000):
        file.create_dataset(f"model_weights/x{number}", (2**15,), np.float32)


def test_many_declared_tensors_take_no_memory(edited):
    message, peak = peak_memory(edited(many_large))
    assert "more than the file can hold" in message and peak < MEMORY


def test_one_string_read_many_times_is_bounded(edited):
    """HDF5 would read four thousand names that all lie in one place as four gigabytes."""
    path = edited(lambda file: None, "plain.h5", "tf_keras")
    large, count = b"x" * 2**20, 4000
    with h5py.File(path, "r+") as file:
        group = file["model_weights/conv2d"]
        group.attrs.create("weight_names", [large, *[b"y%04d" % number for number in range(count - 1)]],
                           dtype=h5py.string_dtype())  # fmt: skip
    content = bytearray(path.read_bytes())
    # a reference is the string's length, its heap's address and its number there: all become the first one's
    at = content.index(struct.pack("<I", len(large)))
    while content.count(content[at : at + 16]) == 0 or content[at + 16 : at + 20] != struct.pack("<I", 5):
        at = content.index(struct.pack("<I", len(large)), at + 1)
    content[at : at + 16 * count] = content[at : at + 16] * count
    path.write_bytes(content)
    message, peak = peak_memory(path)
    assert "memory" in message or "damaged" in message, message
    assert peak < MEMORY


def test_large_attribute_is_no_configuration(edited, refusal):
    def edit(file):
        file.attrs.create("model_config", [file.attrs["model_config"]] * 3, dtype=h5py.string_dtype())

    assert "model_config is an array" in refusal(edited(edit))


# --- Archives and JSON -----------------------------------------------------------------------------------


def test_zip_bomb_is_refused(archive, refusal):
    path = archive(zipfile.ZIP_DEFLATED, config__json=b" " * 2**28)
    assert path.stat().st_size < 2**20
    assert re.search(r"config.json would unpack to 268,435,456 bytes", refusal(path))


def test_zip_bomb_takes_no_memory(archive):
    message, peak = peak_memory(archive(zipfile.ZIP_DEFLATED, **{"model__weights__h5": bytes(2**28)}))
    assert "would unpack" in message and peak < MEMORY


def test_zip_bomb_with_a_small_declared_size_is_refused(archive, refusal):
    """The sizes in the archive's headers lie."""
    path = archive(zipfile.ZIP_DEFLATED, config__json=b" " * 2**28)
    content = path.read_bytes().replace(struct.pack("<I", 2**28), struct.pack("<I", 1000))
    path.write_bytes(content)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(archive, refusal, compression):
    assert "compressed otherwise" in refusal(archive(compression))


def test_member_that_stands_twice_is_refused(archive, refusal):
    """Two readers may take different ones."""
    path = archive()
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("config.json", "{}")
    assert "config.json twice" in refusal(path)


@pytest.mark.parametrize("name", ["config__json", "metadata__json", "model__weights__h5"])
def test_member_that_is_missing_is_named(archive, refusal, name):
    assert f"without {name.replace('__', '.')}" in refusal(archive(**{name: None}))


JSON = {
    "deep": ('{"a":' * 100 + "1" + "}" * 100, "nested 101 levels deep"),
    "very deep": ("[" * 10**6, "nested hundreds of levels deep"),
    "quotes": ('"' + r"\"" * 10**6, "not JSON"),
    "long": ('"' + "x" * 5 * 2**20 + '"', "no ResNet8"),
    "number": ('{"a": ' + "1" * 10**6 + "}", "not JSON"),
    "array": ("[1, 2]", "JSON list, expected an object"),
    "nothing": ("", "not JSON"),
    "empty": ("{}", "damaged, or not as Keras writes it"),
    "no layers": ('{"class_name": "Functional", "config": {}}', "not as Keras writes it"),
    "empty layers": ('{"class_name": "Functional", "config": {"layers": []}}', "not as Keras writes it"),
    "no object": ('{"class_name": "Functional", "config": {"layers": [1, 2]}}', "not as Keras writes it"),
}


@pytest.mark.parametrize("name", JSON)
def test_odd_json_is_refused(archive, edited, refusal, name):
    source, words = JSON[name]
    assert words in refusal(archive(config__json=source))
    if len(source) < 60_000:  # an attribute holds no more
        assert words in refusal(edited(lambda file: file.attrs.__setitem__("model_config", source)))


def test_bytes_that_are_no_text_are_refused(archive, refusal):
    assert "damaged" in refusal(archive(config__json=b'{"a": "\xff"}'))


# --- Numbers ---------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("epsilon", [-1.0, float("nan"), "0.001", None, True, 10**400, [0.001]])
def test_epsilon_that_is_none_is_refused(edited, refusal, epsilon):
    def change(config):
        for layer in config["config"]["layers"]:
            if layer["class_name"] == "BatchNormalization":
                layer["config"]["epsilon"] = epsilon

    assert "epsilon" in refusal(edited(edit_config(change)))


def test_float64_weights_beyond_float32_are_refused(edited, refusal):
    def make(file, name):
        file[name] = np.full((3, 3, 3, 4), 1e300)

    assert "too large for float32" in refusal(edited(replace_kernel(make)))
