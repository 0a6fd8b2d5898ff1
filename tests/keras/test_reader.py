"""models/keras/reader.py, config.py and file.py: files that convert, and files that are refused.

Each refusal is of a valid file changed in one place. The message names the layer, key or tensor.
"""

import io
import json
import re
import resource
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from convert import convert_file
from models.common.cli import KerasFileError
from models.common.job import limit_resources
from models.keras.config import check_classes
from models.keras.file import Layer, read_keras_file
from tests.keras_files import reading
from tests.keras_files.edits import KERNEL, edit_config, first_of, replace_kernel, with_options, without
from tests.keras_files.networks import WRITERS

# --- Formats ----------------------------------------------------------------------------------------------


def test_content_determines_the_format(keras_files, tmp_path):
    for name, other, kind in (("model.h5", "plain.keras", ".keras"), ("model.keras", "plain.h5", ".h5")):
        shutil.copy(keras_files / "keras" / other, tmp_path / name)
        assert kind in read_keras_file(tmp_path / name).format


@pytest.mark.real_jobs
def test_job_reads_the_same(keras_files):
    """The job itself, not this process."""
    path = keras_files / "keras" / "nested.keras"
    file, (fields, arrays) = read_keras_file(path), reading.read_in_fork(path.read_bytes())
    assert (file.format, file.config) == (fields["format"], fields["config"])
    assert [(layer.name, list(layer.inputs)) for layer in file.layers] == [
        (layer["name"], layer["inputs"]) for layer in fields["layers"]
    ]
    read = [array for layer in file.layers for array in layer.arrays.values()]
    assert len(read) == len(arrays) == 34 + 14
    assert all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(read, arrays.values(), strict=True)
    )


@pytest.mark.real_jobs
@pytest.mark.parametrize("code", ["os.abort()", "while True: pass"], ids=["crash", "endless loop"])
def test_job_that_dies_is_a_damaged_file(keras_files, monkeypatch, tmp_path, code):
    """`sitecustomize` runs in the job before the reader."""
    patch = f"import os, models.keras.reader as r\nr.MAX_CPU_SECONDS = 1\ndef read(content):\n    {code}\n"
    (tmp_path / "sitecustomize.py").write_text(f"{patch}r.read_content = read\nr.main()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KerasFileError, match="damaged"):
        read_keras_file(keras_files / "keras" / "plain.h5")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"GIF89a", "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n", "damaged"),
        (b"PK\x03\x04", "damaged"),
    ],
)
def test_not_a_keras_file(refusal, tmp_path, content, words):
    (tmp_path / "model.h5").write_bytes(content)
    assert words in refusal(tmp_path / "model.h5")


def test_unreadable_or_large(keras_files, refusal, tmp_path, monkeypatch):
    assert "No such file" in refusal(tmp_path / "absent.h5")
    assert "directory" in refusal(tmp_path)
    (tmp_path / "saved_model.pb").touch()
    assert "SavedModel" in refusal(tmp_path)
    monkeypatch.setattr("models.keras.file.MAX_FILE_BYTES", 1000)
    assert "larger" in refusal(keras_files / "keras" / "plain.h5")


# --- Files with one change --------------------------------------------------------------------------------


def renamed(name):
    def change(config):
        entry = first_of(config, "ReLU")
        entry["name"] = entry["config"]["name"] = name

    return edit_config(change)


def reads(class_name, source):
    return edit_config(lambda c: first_of(c, class_name).update(inbound_nodes=[[[source, 0, 0, {}]]]))


def added(class_name, **options):
    """Add a layer that no layer reads."""

    def change(config):
        entry = {"class_name": class_name, "config": {"name": "odd", **options}, "inbound_nodes": []}
        if class_name != "InputLayer":
            entry["inbound_nodes"] = [[[first_of(config, "InputLayer")["config"]["name"], 0, 0, {}]]]
        config["config"]["layers"].append(entry)

    return edit_config(change)


def two_names(config):
    first, second = [entry for entry in config["config"]["layers"] if entry["class_name"] == "ReLU"][:2]
    first["config"]["name"], second["config"]["name"] = "re_lu_1", "re_lu"


def two_inputs(config):
    """Call the nested model with two inputs, though it has one."""
    (model,) = [entry for entry in config["config"]["layers"] if "layers" in entry["config"]]
    call = model["inbound_nodes"][0]
    call["args"] = [call["args"] * 2]


def nested_name(config):
    """Name a layer like the path of a nested one."""
    return json.loads(json.dumps(config).replace('"drop"', '"m/odd"'))


def middle_input(config):
    config["config"]["input_layers"] = ["re_lu", 0, 0]


def delete(name):
    return lambda file: file.__delitem__(name)


def move(source, target):
    return lambda file: file.move(source, target)


def saved_as(layer, *names):
    """Save a layer's tensors in another order."""
    value = [f"{layer}/{name}" for name in names]
    return lambda file: file[f"model_weights/{layer}"].attrs.__setitem__("weight_names", value)


def with_tensors(group, **tensors):
    """Add tensors to a layer of `plain.h5`, or to a new one of weights alone."""

    def edit(file):
        parent = file.get("model_weights", file)
        if group not in parent:
            parent.attrs["layer_names"] = [*parent.attrs["layer_names"], group]
        attributes = parent.require_group(group).attrs
        attributes["weight_names"] = [*attributes.get("weight_names", []), *tensors]
        for name, shape in tensors.items():
            parent[group][name] = np.zeros(shape, np.float32)

    return edit


def subclassed(file):
    file.move("layers", "others")
    file.move("others/dense", "fc")


def first_tensor(file, value):
    names = []
    file.visititems(lambda name, member: names.append(name) if isinstance(member, h5py.Dataset) else None)
    del file[names[0]]
    file[names[0]] = value


def array(value):
    return replace_kernel(lambda file, name: file.__setitem__(name, value))


def value(variable, number):
    name = f"model_weights/batch_normalization_3/batch_normalization_3/{variable}"
    return lambda file: file[name].__setitem__(2, number)


SHAPE = (3, 3, 3, 4)


def of(class_name, **options):
    return "plain.h5", with_options(class_name, **options)


LINK, NORM = h5py.ExternalLink("other.h5", "secret"), "batch_normalization"
DTYPES = {  # of the first kernel: no numbers, or not those of a kernel
    "long doubles": np.zeros(SHAPE, np.longdouble),
    "strings": np.full(SHAPE, b"x"),
    "compound": np.zeros((3, 3), [("a", "<f4", (100,))]),
    "no data": h5py.Empty("f4"),
    "external link": LINK,
    "soft link": h5py.SoftLink("/model_weights/dense"),
    "dangling link": h5py.SoftLink("/nowhere"),
}
EPSILONS = (-1.0, float("nan"), "0.001", None, 10**400)
# fmt: off
REFUSED = {  # changed part -> file, edit, words of the message
    "no weights": ("plain.h5", delete("model_weights"), "model_weights"),
    "other program": ("plain.h5", lambda file: file.attrs.__delitem__("model_config"), "Keras"),
    "subclassed model": ("plain.weights.h5", subclassed, "subclassed keras.Model"),
    "number as a name": ("plain.h5", renamed(5), "int string"),
    "repeated name": ("plain.h5", renamed("re_lu_1"), "'re_lu_1' twice"),
    "name with a colon": ("plain.h5", renamed("re:lu"), "'re:lu' colon"),
    "name with control codes": ("plain.h5", renamed("re\x1blu"), "'re?lu'"),
    "two names": ("plain.h5", edit_config(two_names), "'re_lu' 're_lu_1'"),
    "name of a nested layer": ("refused/nested_tanh.h5", edit_config(nested_name), "'m/odd' twice"),
    "second input": ("plain.h5", added("InputLayer", batch_shape=[None, 16, 16, 3]), "inputs"),
    "input in the middle": ("plain.h5", edit_config(middle_input), "'re_lu' InputLayer"),
    "nested model with two inputs": ("nested.h5", edit_config(two_inputs), "model 2 inputs"),
    "layer without readers": ("plain.h5", added("ReLU"), "'odd' ReLU output"),
    "loop": ("plain.h5", reads("ReLU", "re_lu"), "'re_lu' itself"),
    "missing input": ("plain.h5", reads("ReLU", "ghost"), "'ghost'"),
    "missing input of the input": ("nested_deep.h5", reads("InputLayer", "ghost"), "'ghost'"),
    "two tensors of one name": ("plain.h5", with_tensors("conv2d", **{"other/kernel": 4}), "'conv2d' kernel"),
    "missing group": ("plain.h5", delete("model_weights/dense"), "'dense'"),
    "missing tensor": ("plain.h5", delete(KERNEL), "'conv2d' kernel"),
    "LoRA beside the kernel": (
        "plain.h5", with_tensors("dense", **{"dense/lora_kernel_a": 2, "dense/lora_kernel_b": 2}),
        "'dense' lora_kernel_a .keras",
    ),
    "frozen gamma": (  # Keras saves it after beta, and loads one for the other
        "plain.h5", saved_as(f"{NORM}_3", "beta", "gamma", "moving_mean", "moving_variance"),
        f"'{NORM}_3' beta, gamma frozen",
    ),
    **{name: ("plain.h5", array(data), f"/{KERNEL}") for name, data in DTYPES.items()},
    "large doubles": ("plain.h5", array(np.full(SHAPE, 1e300)), "'conv2d' kernel float32"),
    "scalar": ("plain.h5", array(1.0), "'conv2d' axes"),
    "named type": ("plain.h5", array(np.dtype("f4")), "kernel"),
    "group": ("plain.h5", replace_kernel(lambda file, name: file.create_group(name)), KERNEL),
    "NaN": ("plain.h5", value("gamma", float("nan")), f"'{NORM}_3' gamma NaN"),
    "infinity": ("plain.h5", value("beta", float("inf")), f"'{NORM}_3' beta infinite"),
    "negative variance": ("plain.h5", value("moving_variance", -0.5), f"'{NORM}_3' -0.5"),
    "flat input": (*of("InputLayer", batch_shape=[None, 16, 3]), "16, 3"),
    "empty input": (*of("InputLayer", batch_shape=[None, 0, 16, 3]), "0, 16, 3"),
    "padded pooling": (
        "average_pooling.h5", with_options("AveragePooling2D", padding="same", strides=[1, 1]),
        "'average_pooling2d' padding",
    ),
    "pooling that keeps its axes": (
        *of("GlobalAveragePooling2D", keepdims=True), "'global_average_pooling2d' axes"
    ),
    "channels first": (*of("Conv2D", data_format="channels_first"), "'conv2d' data_format"),
    "no padding": ("plain.h5", without("Conv2D", "padding"), "'conv2d' padding 'valid'"),  # Keras's default
    "no strides": ("plain.h5", without("Conv2D", "strides"), "strides [1, 1] [2, 2]"),
    "no activation": ("epsilon_momentum.h5", without("Activation", "activation"), "activation None relu"),
    "two scales": ("rescaling.h5", with_options("Rescaling", scale=[1.0, 2.0]), "'rescaling'"),
    "scale 0": ("rescaling.h5", with_options("Rescaling", scale=0.0), "mean std"),
    "tiny scale": ("rescaling.h5", with_options("Rescaling", scale=1e-300), "mean std"),
    "infinite offset": ("rescaling.h5", with_options("Rescaling", offset=float("inf")), "mean std"),
    "external link in weights": ("plain.weights.h5", lambda file: first_tensor(file, LINK), "link"),
    "array as configuration": (
        "plain.h5", lambda file: file.attrs.create("model_config", [b"{}"] * 3), "string"
    ),
    "control codes in weights": ("plain.weights.h5", move("layers/dense", "layers/den\x1bse"), "'den?se'"),
    "weights of one name": ("plain.weights.h5", move(f"layers/{NORM}_1", NORM), f"two '{NORM}'"),
    "tensor of no layer": (
        "plain.weights.h5", lambda file: file.__setitem__("layers/odd/vars/0", np.zeros((2, 3, 4))),
        "'odd' (2, 3, 4)",
    ),
    "cycle": ("plain.weights.h5", lambda file: file["layers"].__setitem__("again", file["/"]), ""),
    **{f"epsilon {e!s:.9}": (*of("BatchNormalization", epsilon=e), NORM) for e in EPSILONS},
}
# fmt: on


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", REFUSED)
def test_changed_file_is_refused(edited, refusal, what):
    name, edit, words = REFUSED[what]
    message = refusal(edited(edit, name))
    assert all(word in message for word in words.split()), message
    assert "damaged" not in message or what == "cycle"


@pytest.mark.parametrize(
    "tensors", [{"m/x/kernel:0": SHAPE, "m/x/kernel:1": SHAPE}, {"m/x/a:0": 4, "m/y/b:0": 4}]
)
def test_weights_of_several_layers_are_refused(edited, refusal, tensors):
    assert "'m'" in refusal(edited(with_tensors("m", **tensors), "plain.legacy.h5", "tf_keras"))


@pytest.mark.parametrize("name", ["nested_stages", "nested_deep", "nested_frozen", "nested_partly_frozen"])
def test_weights_of_nested_models_are_refused(keras_files, refusal, name):
    """Keras 2 saves statistics and frozen layers after the others: the order does not name the layers."""
    assert "whole model" in refusal(keras_files / "tf_keras" / f"{name}.legacy.h5")


def named_argument(config):
    """Call the convolutions as `layer(inputs=x)`."""
    for entry in config["config"]["layers"]:
        if entry["class_name"] == "Conv2D":
            (node,) = entry["inbound_nodes"]
            node["kwargs"], node["args"] = {"inputs": node["args"][0]}, []


CONVERTED = {  # change without effect
    "named argument": ("plain.h5", edit_config(named_argument)),
    "pooling of one window": (
        "average_pooling.h5",
        with_options("AveragePooling2D", padding="same", strides=[4, 4]),
    ),
    "no epsilon": ("plain.h5", without("BatchNormalization", "epsilon")),  # Keras's defaults
    "no momentum": ("plain.h5", without("BatchNormalization", "momentum")),
    "no offset": ("rescaling.h5", without("Rescaling", "offset")),
    "frozen kernel": ("plain.h5", saved_as("dense", "bias", "kernel")),  # Keras finds the shapes wrong
}


@pytest.mark.parametrize("what", CONVERTED)
def test_change_without_effect_converts(keras_files, edited, tmp_path, what):
    name, edit = CONVERTED[what]
    convert_file(keras_files / "keras" / name, tmp_path / "a.pt")
    convert_file(edited(edit, name), tmp_path / "b.pt")
    a, b = (torch.load(tmp_path / f"{which}.pt", weights_only=True) for which in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_lora_of_an_archive_is_in_the_kernel(keras_files, archive):
    """Keras must not add it again."""
    with zipfile.ZipFile(keras_files / "keras" / "plain.keras") as file:
        config = json.loads(file.read("config.json"))
    config["config"]["layers"][-1]["config"] |= {"lora_rank": 2, "lora_alpha": 2}
    file = read_keras_file(archive(config__json=json.dumps(config)))
    assert file.layers[-1].arrays["kernel"].shape == (16, 7) and "lora" not in json.dumps(file.config)


@pytest.mark.parametrize(("dtype", "is_identity"), [("float16", True), ("float64", True), ("uint8", False)])
def test_cast_is_an_identity_unless_to_integers(dtype, is_identity):
    assert Layer("cast", "Cast", {"dtype": dtype}, ()).is_identity is is_identity


# --- No code ----------------------------------------------------------------------------------------------


def test_lambda_is_refused_and_never_run(keras_files, tmp_path, command):
    """The whole command, which would verify with Keras: the writer saw this code leave its mark in Keras."""
    files = [keras_files / writer / "hostile" / f"lambda{s}" for writer in WRITERS for s in (".h5", ".keras")]
    for index, file in enumerate(files):
        shutil.copy(file, tmp_path / f"{index}{file.suffix}")
    status, _, errors = command(*sorted(tmp_path.iterdir()), "-o", tmp_path / "out")
    assert status == 1 and len(errors) == len(files), errors
    assert all("Lambda" in error and "'odd'" in error for error in errors)
    assert not (tmp_path / "out").exists() and not list(keras_files.glob("*/hostile/mark"))


SMUGGLED = [
    {"module": "os", "class_name": "Zeros", "config": {}, "registered_name": None},
    {"module": "keras.src.utils.os", "class_name": "Zeros", "config": {}},
    {"module": "subprocess", "class_name": "Popen", "config": {"args": "touch mark"}},
    {"module": "builtins", "class_name": "function", "config": "exec"},
    {"class_name": "__numpy__", "config": {"value": [1], "dtype": "object"}},
    {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}},
    {"class_name": "Lambda", "config": {"name": "f", "function": ["4wEAAAA=", None, None]}},
    {"class_name": "TFOpLambda", "config": {"name": "f", "function": "io.read_file"}},
    {"class_name": "TimeDistributed", "config": {"layer": {"class_name": "Lambda", "config": {}}}},
    {"module": "keras", "class_name": "Zeros", "config": {}, "registered_name": "evil>Zeros"},
    {"class_name": "evil>Zeros", "config": {}},
    {"class_name": ["Zeros"], "config": {}},
    {"module": "keras.models", "class_name": "load_model", "config": {"filepath": "/tmp/x"}},
    {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "http://127.0.0.1"}},
    {"class_name": "TFSMLayer", "config": {"filepath": "/tmp/x"}},
    *(
        {"class_name": "Cast", "name": "x", "module": "keras.src.ops.core", "config": {"dtype": dtype}}
        for dtype in ("uint8", "int32", None, {"class_name": "DTypePolicy"})
    ),
]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("QConv2D", "QKeras"),
        ("Larq>QuantConv2D", "Larq"),
        ("QuantizeWrapperV2", "tfmot"),
        ("PruneLowMagnitude", "strip_pruning"),
        ("QuantizedDTypePolicy", "quantize()"),
        ("Int8QuantizationConfig", "quantize()"),
    ],
)
def test_class_of_a_known_library_is_named(name, word):
    with pytest.raises(KerasFileError, match=re.escape(word)) as caught:
        check_classes({"layers": [{"class_name": name, "config": {"name": "odd"}}]})
    assert name in str(caught.value) and "'odd'" in str(caught.value)


@pytest.mark.parametrize("smuggled", SMUGGLED, ids=lambda value: str(value.get("class_name")))
def test_other_class_is_refused_at_any_depth(smuggled):
    for _ in range(3):
        with pytest.raises(KerasFileError):
            check_classes({"layers": [{"class_name": "Conv2D", "config": {"kernel_initializer": smuggled}}]})
        smuggled = {"class_name": "Zeros", "config": {"x": [smuggled]}}
    check_classes({"layers": [{"class_name": "Cast", "config": {"dtype": "float16"}}]})


def test_class_outside_the_layers_is_refused_or_removed(archive, keras_files):
    with zipfile.ZipFile(keras_files / "keras" / "plain.keras") as file:
        config = json.loads(file.read("config.json"))
    for key in ("compile_config", "build_config", "anything"):
        path = archive(config__json=json.dumps({**config, key: {"optimizer": SMUGGLED[2]}}))
        if key == "compile_config":
            assert "Popen" not in json.dumps(read_keras_file(path).config)
        else:
            with pytest.raises(KerasFileError, match="Popen"):
                read_keras_file(path)


# --- Data outside the file, and data without bounds -------------------------------------------------------


def external(file, name):
    file.create_dataset(name, SHAPE, np.float32, external=[("/etc/hostname", 0, 432)])


def virtual(file, name):
    layout = h5py.VirtualLayout(SHAPE, np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "secret", SHAPE)
    file.create_virtual_dataset(name, layout)


def huge(file, name):
    file.create_dataset(name, (2**38,), np.float32, chunks=(2**20,))  # 1 TB, none of it stored


def huge_contiguous(file, name):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2**38,)), creation)


def huge_chunk(file, name):
    file.create_dataset(name, (2**9, 2**8, 2**6, 2**6), np.float32, chunks=(2**9, 2**8, 2**6, 2**6))


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
    data = file.create_dataset(name, SHAPE, np.float32, chunks=SHAPE, compression=9)
    checksum = struct.pack(">I", (2**30 % 65521) << 16 | 1)
    data.id.write_direct_chunk((0,) * 4, b"\x78\x9c" + block * 64 + b"\x03\x00" + checksum)


def large_elements(file, name):
    file.create_dataset(name, (3, 3), np.dtype(("V", 2**24)))


@pytest.mark.parametrize(
    "make", [external, virtual, huge, huge_contiguous, huge_chunk, compressed, overfull_chunk, large_elements]
)
def test_data_elsewhere_or_without_bounds_is_refused(edited, refusal, forked_reader, tmp_path, make):
    """With the limits on the job's memory and time."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.ones(SHAPE, np.float32)
    message = refusal(edited(replace_kernel(make)))
    assert make not in (external, virtual) or f"/{KERNEL}" in message


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory as Linux does")
@pytest.mark.parametrize("width", [20_000, 1_000_000])
def test_claimed_width_takes_no_memory(edited, refusal, width):
    """Such a network has 18 GB of weights, or far more."""
    path = edited(array(np.zeros((3, 3, 3, width), np.int8)))
    limits = {limit: resource.getrlimit(limit) for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU)}
    limit_resources(memory=800 * 2**20, cpu_seconds=60)
    try:
        message = refusal(path)
    finally:
        for limit, values in limits.items():
            resource.setrlimit(limit, values)
    assert "bias" in message and f"({width},)" in message


# --- Archives and JSON ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config__json", "metadata__json", "model__weights__h5"])
def test_missing_member_is_named(archive, refusal, name):
    assert name.replace("__", ".") in refusal(archive(**{name: None}))


def test_zip_bomb_is_refused(archive, refusal, forked_reader):
    path = archive(zipfile.ZIP_DEFLATED, config__json=b" " * 2**25)
    assert path.stat().st_size < 2**18 and "config.json would unpack to 33,554,432" in refusal(path)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 2**25), struct.pack("<I", 1000)))
    refusal(path)  # the declared size is wrong
    assert "config.json" in refusal(archive(config__json='"' + "x" * 5 * 2**20 + '"'))


def test_encrypted_member_is_refused(archive, refusal):
    path = archive()
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in refusal(path)


def test_layer_of_an_archive_with_too_few_tensors_is_refused(archive, keras_files, refusal):
    with zipfile.ZipFile(keras_files / "keras" / "plain.keras") as file:
        content = io.BytesIO(file.read("model.weights.h5"))
    with h5py.File(content, "r+") as file:
        del file["layers/dense/vars/1"]
    message = refusal(archive(model__weights__h5=content.getvalue()))
    assert "'dense'" in message and "kernel, bias" in message


JSON = {
    "very deep": "[" * 10**6,
    "quotes": '"' + r"\"" * 10**6,
    "number": '{"a": ' + "1" * 10**6 + "}",
    "array": "[1, 2]",
    "nothing": "",
    "bytes": b'{"a": "\xff"}',
    "empty": "{}",
    "no layers": '{"class_name": "Functional", "config": {}}',
    "empty layers": '{"class_name": "Functional", "config": {"layers": []}}',
    "no object": '{"class_name": "Functional", "config": {"layers": [1, 2]}}',
}


@pytest.mark.parametrize("source", JSON.values(), ids=JSON)
def test_odd_json_is_refused(archive, edited, refusal, source):
    assert refusal(archive(config__json=source))
    if len(source) < 60_000:  # an attribute holds no more
        assert refusal(edited(lambda file: file.attrs.__setitem__("model_config", source)))


def test_used_up_memory_is_reported(monkeypatch):
    monkeypatch.setattr("models.keras.reader.read_content", lambda content: bytes(2**60))
    with pytest.raises(KerasFileError, match="memory"):
        reading.read_safely({}, {"content": np.zeros(1, np.uint8)})
