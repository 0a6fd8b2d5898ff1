"""convert.py on checkpoints: the Keras file that it writes holds the same tensors and computes the same."""

import hashlib
import json
import pickle
import re
import shutil
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import convert
from convert import convert_back, convert_file
from evaluate import score
from models import resnet8
from models.checkpoint import read_checkpoint, save_checkpoint
from models.common.errors import KerasFileError, VerificationError
from models.common.terminal import Notes
from models.conversion import placing, proof
from models.conversion.matching import match_graph
from models.conversion.placing import graph_of, with_rescaling
from models.conversion.tensors import map_tensors
from models.evaluation.baseline import find_baseline
from models.graph import GRAPH
from models.keras.file import read_keras_file
from models.keras.process import KerasProcess
from models.keras.worker import WorkerError
from models.mapping import MAPPING
from models.resnet8 import ResNet8
from models.scaling import Scaling
from tests.conftest import ROOT, run_programs
from tests.evaluating import SHARED, refused
from tests.keras_files.networks import VARIANTS
from tests.test_formats import log_probabilities
from tests.test_parity import assert_loss_and_gradients_are_keras

BUNDLED = ROOT / "checkpoints/resnet8_keras.h5"
MLPERF_TINY = SHARED / "keras/pretrainedResnet.h5"
pytestmark = pytest.mark.long
INPUT = {"mean": [120.0], "std": [64.0]}  # what the random networks are fed is of the order of 1
LAYERS = ["input", *(place.replace(".", "_") for place in GRAPH)]


@pytest.fixture
def checkpoint(reference_files, reader, tmp_path):
    """Return a checkpoint of a random ResNet8 of odd sizes, with its JSON, in a folder of its own."""
    shutil.copy(reference_files / "odd.h5", tmp_path / "source.h5")
    folder = tmp_path / "here"
    convert_file(tmp_path / "source.h5", folder / "odd.pt", reader, **INPUT)
    return folder / "odd.pt"


PLAIN = Scaling.given(3)


@pytest.fixture
def command(reader, keras, monkeypatch, capsys):
    """Return a function that runs convert.py in this process: (exit status, stdout, lines of stderr)."""
    monkeypatch.setattr(convert, "start_reader", lambda: nullcontext(reader))  # one is there

    def run(*arguments, process=lambda python: nullcontext(keras)):
        monkeypatch.setattr(convert, "KerasProcess", process)
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = convert.main()
        except SystemExit as error:
            status = error.code
        output = capsys.readouterr()
        return status, output.out, output.err.splitlines()

    return run


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_tensors(one, other):
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    assert list(one) == list(other)
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key


# --- There and back again --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(keras_files, expected, reader, keras, tmp_path, name):
    """Keras to PyTorch to Keras to PyTorch: no tensor has changed, nor what Keras computes."""
    writers = VARIANTS[name].writers
    writer = writers[list(VARIANTS).index(name) % len(writers)]
    suffix = {"keras": ".h5", "tf_keras": ".keras"}[writer]
    first, written, last = (tmp_path / name for name in ("first.pt", f"written{suffix}", "last.pt"))
    there = convert_file(keras_files / writer / f"{name}{suffix}", first, reader)
    back = convert_back(first, written, reader, keras, verify=False)
    again = convert_file(written, last, reader)
    assert_same_tensors(first, last)
    assert again["architecture"] == back["architecture"] == there["architecture"]
    assert again["input"] == there["input"]

    images = expected[writer][f"{name}:images"].transpose(0, 3, 1, 2)
    keras.load(read_keras_file(written, reader))
    outputs = keras.activations(images, PLAIN.updated(back["input"]), "float64")["fc"]
    theirs = log_probabilities(expected[writer][f"{name}:outputs"]).exp().numpy()
    assert np.abs(outputs - theirs).max() <= 1e-12


@pytest.mark.parametrize("path", [BUNDLED, MLPERF_TINY], ids=["bundled", "MLPerf Tiny"])
def test_round_trip_of_real_models(path, reader, keras, sample, tmp_path):
    if not path.exists():
        pytest.skip(f"no {path}")
    convert_file(path, tmp_path / "first.pt", reader)
    convert_back(tmp_path / "first.pt", tmp_path / "written.h5", reader, keras, verify=False)
    convert_file(tmp_path / "written.h5", tmp_path / "last.pt", reader)
    assert_same_tensors(tmp_path / "first.pt", tmp_path / "last.pt")
    outputs = []
    for each in (path, tmp_path / "written.h5"):
        file = read_keras_file(each, reader)
        keras.load(file)
        found = keras.activations(sample.images[:20], PLAIN, "float64")
        outputs.append(found[file.layers[-1].name])
    assert np.abs(outputs[0] - outputs[1]).max() <= 1e-12
    assert np.abs(np.diff(outputs[0], axis=0)).max() > 0.1


# --- The command -----------------------------------------------------------------------------------------


def test_verified_conversion(checkpoint, command, monkeypatch):
    """The whole command: its stages, its two files, what they say, and what is left alone."""
    monkeypatch.chdir(checkpoint.parent)
    before = files_in(checkpoint.parent)
    status, out, errors = command("odd.pt", "-v")
    assert (status, errors) == (0, [])
    lines = out.splitlines()
    assert lines[0].startswith("odd.pt: ") and "state_dict" in lines[0]
    stages = [line.split()[0] for line in lines if re.match(r"  \w+ +passed  ", line)]
    assert stages == ["layers", "shapes", "parameters", "numbers"]
    assert "note:" not in out
    assert re.search(r"^  shapes .*\b48\b", out, re.MULTILINE)
    assert re.search(r"^  fc -> fc\n    kernel +\(16, 7\) +\(1, 0\) +weight +\(7, 16\)$", out, re.MULTILINE)
    assert "120, 120, 120, 120" in out and "64, 64, 64, 64" in out
    assert lines[-1].count("odd.h5") == 2 and "odd.h5.json" in lines[-1]
    after = files_in(checkpoint.parent)
    assert set(after) == {"odd.pt", "odd.json", "odd.h5", "odd.h5.json"}
    assert before.items() <= after.items()

    metadata, of_checkpoint = json.loads(after["odd.h5.json"]), json.loads(before["odd.json"])
    assert metadata["architecture"] == of_checkpoint["architecture"]
    scaling = {"mean": [120.0] * 4, "std": [64.0] * 4}
    assert metadata["source"].pop("format") in lines[0]
    assert metadata["source"] == {
        "file": "odd.pt",
        "sha256": hashlib.sha256(before["odd.pt"]).hexdigest(),
        "input": scaling,
    }
    assert metadata["input"] == {"layout": "NHWC", "shape": [21, 30, 4], "range": [0, 255], **scaling}
    assert metadata["sha256"] == hashlib.sha256(after["odd.h5"]).hexdigest()
    assert set(metadata["versions"]) == {"torch", "numpy", "h5py", "keras"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", metadata["date"])
    found = metadata["verification"]
    assert found["keras"] == metadata["versions"]["keras"] and found["rebuilt"] is None
    assert found["layers"] == len(GRAPH) - 1
    assert 0 < found["float64"]["activations"] <= 1e-10
    assert 0 < found["float64"]["probabilities"] <= 1e-12
    assert 0 < found["float32"]["probabilities"] <= 1e-4


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_written_file(keras_files, reader, keras, tmp_path, suffix):
    """Its layers are called after their places, and are what the checkpoint and its JSON say."""
    convert_file(keras_files / "keras" / "epsilon_momentum.keras", tmp_path / "model.pt", reader)
    output = tmp_path / "new" / f"other{suffix}"
    convert_back(tmp_path / "model.pt", output, reader, keras, verify=False)
    assert set(files_in(output.parent)) == {f"other{suffix}", f"other{suffix}.json"}
    file = read_keras_file(output, reader)
    assert suffix in file.format and "Keras 3" in file.format
    assert sorted(layer.name for layer in file.layers) == sorted(LAYERS)
    assert file.input_shape == [16, 16, 3]
    assert file.notes == []
    by_name = {layer.name: layer for layer in file.layers}
    assert by_name["fc"].config["activation"] == "softmax" and file.returns_probabilities
    norms = [layer.config for layer in file.layers if layer.class_name == "BatchNormalization"]
    assert [(norm["epsilon"], norm["momentum"]) for norm in norms] == [(1e-5, 0.9)] * 7


def test_settings_of_the_user_change_nothing(
    checkpoint, keras_files, reader, tmp_path, few_images, monkeypatch
):
    """Keras's keras.json, which says what dtype is meant where none is said; and Python's warnings."""
    (tmp_path / "keras.json").write_text('{"floatx": "float16", "image_data_format": "channels_first"}')
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    with KerasProcess() as process:
        for suffix in (".h5", ".keras"):
            path = tmp_path / f"model{suffix}"
            convert_back(checkpoint, path, reader, process, rescaling=True)
            layers = read_keras_file(path, reader).layers
            assert layers[0].config["dtype"] == "float32" and '"float16"' not in json.dumps(
                [layer.config for layer in layers]
            )
        alone = keras_files / "keras" / "plain.weights.h5"
        assert convert_file(alone, tmp_path / "alone.pt", reader, process, **INPUT)["verification"]["rebuilt"]


def test_same_checkpoint_gives_the_same_h5(checkpoint, reader, keras, tmp_path):
    written = [
        convert_back(checkpoint, tmp_path / f"{name}.h5", reader, keras, verify=False)["sha256"]
        for name in ("a", "b")
    ]
    assert written[0] == written[1]


@pytest.fixture
def few_images(monkeypatch, sample):
    """Let the proof take fewer images, where how many it takes is not the point."""
    few = replace(sample, images=sample.images[:10], labels=sample.labels[:10])
    monkeypatch.setattr(proof, "load_test", lambda *_: few)
    monkeypatch.setattr(proof, "EVERY_LAYER", 10)


def test_any_input_size_is_proven(keras_files, reader, keras, tmp_path, few_images):
    convert_file(keras_files / "keras" / "any_input.h5", tmp_path / "model.pt", reader)
    metadata = convert_back(tmp_path / "model.pt", tmp_path / "model.keras", reader, keras)
    assert metadata["input"]["shape"] == [None, None, 3]
    assert metadata["verification"]["float64"]["activations"] <= 1e-10
    assert read_keras_file(tmp_path / "model.keras", reader).input_shape == [None, None, 3]


def test_says_what_it_assumes(checkpoint, command):
    """Without a JSON: Keras's epsilon and momentum, and pixels as they are, unless the options say it."""
    checkpoint.with_suffix(".json").unlink()
    status, out, _ = command(checkpoint, "--no-verify")
    assert status == 0
    (note,) = [line for line in out.splitlines() if "note:" in line]
    for named in ("odd.json", "epsilon", "0.001", "0.01", "32", "odd.pt", "255"):
        assert named in note
    assert any("255" in line for line in out.splitlines() if line != note)
    metadata = json.loads((checkpoint.parent / "odd.h5.json").read_text())
    assert metadata["input"]["shape"] == [32, 32, 4] and metadata["verification"] is None
    assert (metadata["input"]["mean"], metadata["input"]["std"]) == ([0.0] * 4, [1.0] * 4)

    status, out, _ = command(checkpoint, "--no-verify", "--mean", 1, 2, 3, 4, "--std", 5)
    assert status == 0
    (note,) = [line for line in out.splitlines() if "note:" in line]
    assert "32" in note and "255" not in note
    assert "1, 2, 3, 4" in out and "5, 5, 5, 5" in out
    metadata = json.loads((checkpoint.parent / "odd.h5.json").read_text())
    assert (metadata["input"]["mean"], metadata["input"]["std"]) == ([1.0, 2.0, 3.0, 4.0], [5.0] * 4)
    status, _, errors = command(checkpoint, "--no-verify", "--mean", 1, 2)
    message = errors[0].removeprefix(f"error: {checkpoint}: ")
    assert status == 1 and all(named in message for named in ("--mean", "2", "4"))


def test_what_training_loops_save(checkpoint, command, reader, tmp_path):
    """It is taken as evaluate.py takes it, and a note says what was done."""
    state = {f"module.{key}": value for key, value in torch.load(checkpoint, weights_only=True).items()}
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"epoch": 3, "model": half}, tmp_path / "epoch3.pt")
    status, out, _ = command(tmp_path / "epoch3.pt", "--no-verify")
    assert status == 0 and "'model'" in out and "'module.'" in out and "float16" in out
    convert_file(tmp_path / "epoch3.h5", tmp_path / "again.pt", reader)
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert all(
        torch.equal(again[key.removeprefix("module.")], half[key].to(state[key].dtype)) for key in half
    )


def test_options_go_before_the_json(checkpoint, command):
    assert command(checkpoint, "--no-verify", "--mean", 7)[0] == 0
    scaling = json.loads((checkpoint.parent / "odd.h5.json").read_text())["input"]
    assert (scaling["mean"], scaling["std"]) == ([7.0] * 4, [64.0] * 4)


def test_both_ways_in_one_call(checkpoint, keras_files, command, tmp_path):
    """What a file is, is told from its content, not its name; one that fails does not stop the others."""
    names = ["odd.pt", "plain.keras", "bad.pt", "gray.pt", "weights.h5"]
    shutil.copy(checkpoint, tmp_path / "weights.h5")  # a checkpoint, by its content
    shutil.copy(checkpoint, tmp_path / "odd.pt")
    shutil.copy(keras_files / "keras" / "plain.keras", tmp_path)
    shutil.copy(keras_files / "keras" / "gray.h5", tmp_path / "gray.pt")  # a Keras file, by its content
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    status, out, errors = command(*(tmp_path / name for name in names), "--no-verify", "-o", tmp_path / "out")
    assert status == 1
    assert len(errors) == 1 and errors[0].startswith(f"error: {tmp_path / 'bad.pt'}: ")
    written = {"odd.h5", "plain.pt", "gray.pt", "weights.h5"}
    jsons = {"odd.h5.json", "plain.json", "gray.json", "weights.h5.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written | jsons
    table = out.rpartition("\n\n")[2]
    assert (table.count(" converted "), table.count(" refused ")) == (4, 1)


def test_nothing_that_is_not_ours_is_written_over(checkpoint, command):
    target = checkpoint.parent / "odd.h5"
    for owned in (target, checkpoint.parent / "odd.h5.json"):
        owned.write_bytes(b"somebody's")
        before = files_in(checkpoint.parent)
        status, _, errors = command(checkpoint, "--no-verify")
        assert status == 1 and len(errors) == 1 and "--force" in errors[0] and owned.name in errors[0]
        assert files_in(checkpoint.parent) == before
        assert command(checkpoint, "--no-verify", "--force")[0] == 0
        assert command(checkpoint, "--no-verify")[0] == 0  # its own it may replace
        for written in (target, checkpoint.parent / "odd.h5.json"):
            written.unlink()


def test_usage_errors(checkpoint, keras_files, command, tmp_path):
    keras_file = keras_files / "keras" / "plain.h5"
    other = shutil.copy(checkpoint, tmp_path / "other.pt")
    for arguments, named in {
        (checkpoint, "-o", tmp_path / "new.pt"): "new.pt",
        (keras_file, "-o", tmp_path / "new.h5"): "new.h5",
        (keras_file, "--rescaling"): "--rescaling",
        (checkpoint, other, "-o", tmp_path / "new.h5"): "new.h5",
        (checkpoint, keras_file, "--rescaling", "-o", tmp_path / "out"): "--rescaling",
    }.items():
        status, _, errors = command(*arguments, "--no-verify")
        assert status == 2 and named in errors[0], arguments
    assert not (tmp_path / "new.h5").exists()


def test_without_keras(checkpoint, command, monkeypatch, tmp_path):
    """Keras writes the file, so that not even --no-verify does without."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "keras.py").write_text("raise ImportError('keras is blocked')")
    monkeypatch.setenv("PYTHONPATH", str(blocked))
    before = files_in(checkpoint.parent)
    status, _, errors = command(checkpoint, "--no-verify", process=KerasProcess)
    assert (status, len(errors)) == (1, 1)
    assert errors[0].startswith(f"error: {checkpoint}: ") and sys.executable in errors[0]
    assert "keras is blocked" in errors[0] and "tensorflow" in errors[0]
    assert "--no-verify" not in errors[0]
    status, _, errors = command(checkpoint, "--keras-python", "/nowhere/python", process=KerasProcess)
    assert (status, len(errors)) == (1, 1)
    assert "/nowhere/python" in errors[0] and "--no-verify" not in errors[0]
    assert files_in(checkpoint.parent) == before


class Hostile:
    def __reduce__(self):
        return print, ("code of the file has run",)


def changed(key, change):
    def write(path):
        state = ResNet8().state_dict()
        change(state[key])
        torch.save(state, path)

    return write


def torchscript(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"model/{name}", b"")


def with_json(content):
    def write(path):
        torch.save(ResNet8().state_dict(), path)
        path.with_suffix(".json").write_text(content)

    return write


def cut_short(path):
    torch.save(ResNet8().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])


REFUSED = {
    "foreign": lambda path: torch.save(nn.Linear(3, 4).state_dict(), path),
    "a module": lambda path: torch.save(nn.Linear(3, 4), path),
    "a list": lambda path: torch.save([1], path),
    "hostile": lambda path: torch.save({"conv1.weight": Hostile()}, path),
    "a hostile pickle": lambda path: path.write_bytes(pickle.dumps(Hostile(), protocol=4)),
    "an old hostile pickle": lambda path: path.write_bytes(pickle.dumps(Hostile(), protocol=2)),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "cut short": cut_short,
    "TorchScript": torchscript,
    "NaN": changed("layer2.bn1.weight", lambda tensor: tensor[3].fill_(float("nan"))),
    "infinite": changed("fc.weight", lambda tensor: tensor[3].fill_(float("inf"))),
    "a negative variance": changed("bn1.running_var", lambda tensor: tensor[3].fill_(-1)),
    "no JSON": with_json("{"),
    "a wrong JSON": with_json('{"input": {"std": [0, 1, 1]}}'),
    "a wrong epsilon": with_json('{"architecture": {"bn_eps": -1}}'),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_the_words_of_evaluate(command, tmp_path, capsys, kind):
    path = tmp_path / "model.pt"
    REFUSED[kind](path)
    message = refused(path, cwd=tmp_path).removeprefix("error: ").removeprefix(f"{path}: ")
    before = files_in(tmp_path)
    status, out, errors = command(path)
    assert (status, errors) == (1, [f"error: {path}: {message.rstrip()}"])
    assert "has run" not in out + capsys.readouterr().out
    assert files_in(tmp_path) == before


def test_file_that_is_none(command, tmp_path):
    status, _, errors = command(tmp_path / "missing.pt")
    assert (status, len(errors)) == (1, 1) and errors[0].startswith(f"error: {tmp_path / 'missing.pt'}: ")


# --- Rescaling, and pixels -------------------------------------------------------------------------------


def test_rescaling(checkpoint, reader, keras, tmp_path, few_images):
    """The Keras model takes pixels, and gives back what the network is fed: as float32 holds it."""
    scaling = {"mean": [120.0, 1.5, 0.0, 3.1], "std": [64.0, 0.7, 255.0, 1.0]}
    metadata = convert_back(checkpoint, tmp_path / "model.h5", reader, keras, **scaling, rescaling=True)
    assert metadata["input"]["mean"] == [0.0] * 4 and metadata["input"]["std"] == [1.0] * 4
    assert metadata["source"]["input"] == scaling
    assert metadata["verification"]["float64"]["activations"] <= 1e-10
    file = read_keras_file(tmp_path / "model.h5", reader)
    assert [layer.name for layer in file.layers[:3]] == ["input", "rescaling", "conv1"]
    assert file.layers[1].class_name == "Rescaling"

    (tmp_path / "model.h5.json").unlink()  # the file alone says it
    again = convert_file(tmp_path / "model.h5", tmp_path / "again.pt", reader)
    assert_same_tensors(checkpoint, tmp_path / "again.pt")
    for name, values in scaling.items():
        assert again["input"][name] == pytest.approx(values, rel=2e-7, abs=0)
    convert_back(tmp_path / "again.pt", tmp_path / "more.keras", reader, keras, rescaling=True, verify=False)
    more = convert_file(tmp_path / "more.keras", tmp_path / "more.pt", reader)
    assert more["input"] == again["input"]
    assert_same_tensors(checkpoint, tmp_path / "more.pt")


@pytest.mark.parametrize("name", ["rescaling", "rescaling_offset", "integer_input"])
def test_rescaling_layer_comes_back(keras_files, reader, keras, tmp_path, name):
    """A network whose Keras file had one: the same numbers, exactly."""
    there = convert_file(keras_files / "keras" / f"{name}.h5", tmp_path / "first.pt", reader)
    convert_back(tmp_path / "first.pt", tmp_path / "model.keras", reader, keras, rescaling=True, verify=False)
    layer = read_keras_file(tmp_path / "model.keras", reader).layers[1]
    assert layer.class_name == "Rescaling" and np.ndim(layer.config["scale"]) == 0
    again = convert_file(tmp_path / "model.keras", tmp_path / "last.pt", reader)
    assert again["input"] == there["input"]


def test_written_file_alone_is_fed_pixels(checkpoint, reader, keras, tmp_path):
    """What it is fed stands in its JSON, which holds for that very file."""
    convert_back(checkpoint, tmp_path / "model.h5", reader, keras, verify=False)
    assert convert_file(tmp_path / "model.h5", tmp_path / "a.pt", reader)["input"]["std"] == [64.0] * 4
    other = shutil.copy(checkpoint.parent.parent / "source.h5", tmp_path / "model.h5")
    assert convert_file(Path(other), tmp_path / "a.pt", reader)["input"]["std"] == [1.0] * 4


@pytest.fixture(scope="module")
def used(reference_files, reader, keras, tmp_path_factory):
    """Return the folder of a network that was trained and converted, and what Keras computed with it."""
    folder = tmp_path_factory.mktemp("used")
    convert_file(reference_files / "odd.h5", folder / "odd.pt", reader, **INPUT)
    model, rng = ResNet8.from_checkpoint(folder / "odd.pt").train(), np.random.default_rng(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 4, 21, 30)), torch.arange(8) % 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint(model.eval(), folder / "tuned.pt", like=folder / "odd.pt")
    for suffix in (".h5", ".keras"):
        convert_back(
            folder / "tuned.pt", folder / f"model{suffix}", reader, keras, rescaling=True, verify=False
        )
    pixels = rng.integers(0, 256, (8, 21, 30, 4)).astype(np.uint8)
    labels = rng.integers(0, 7, 8)
    np.savez(folder / "inputs.npz", pixels=pixels, images=pixels.astype(np.float64), labels=labels)
    run_programs({folder: ("tests.keras_files.written",)})
    with np.load(folder / "computed.npz") as arrays:
        return folder, dict(arrays)


def fed(folder, images, reader):
    """Return (N, H, W, C) pixels as the network is fed them: as the written file's Rescaling makes them."""
    scaling = convert_file(folder / "model.h5", folder / "again.pt", reader)["input"]
    return PLAIN.updated(scaling).of(images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_written_model_trains_as_the_network(used, reader, mode):
    folder, computed = used
    images = fed(folder, computed["images"], reader).transpose(0, 2, 3, 1)
    model = ResNet8.from_checkpoint(folder / "tuned.pt").double()
    rows = map_tensors(match_graph(read_keras_file(folder / "model.h5", reader)), model)
    assert_loss_and_gradients_are_keras({**computed, "images": images}, model, rows, mode)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_written_model_takes_integers(used, reader, suffix):
    """uint8 pixels, as cameras and files have them, give what float32 pixels give."""
    folder, computed = used
    assert np.array_equal(computed[f"{suffix}:uint8"], computed[f"{suffix}:float32"])
    model = ResNet8.from_checkpoint(folder / "tuned.pt")
    with torch.inference_mode():
        ours = model(torch.from_numpy(fed(folder, computed["images"], reader)).float()).softmax(1).numpy()
    assert np.abs(ours - computed[f"{suffix}:uint8"]).max() <= 1e-6
    assert np.abs(np.diff(ours, axis=0)).max() > 1e-2


def test_integer_input_is_proven(keras_files, reader, keras, tmp_path, few_images):
    """Forward: a Keras model whose input is declared uint8."""
    path = keras_files / "keras" / "integer_input.keras"
    found = convert_file(path, tmp_path / "model.pt", reader, keras)["verification"]
    assert found["rebuilt"] is None
    assert found["float64"]["activations"] <= 1e-10 and found["float64"]["probabilities"] <= 1e-12


# --- Fine-tuned ------------------------------------------------------------------------------------------


def test_fine_tuned_network_scores_the_same(reader, keras, sample, tmp_path, few_images):
    """Image by image; its JSON is the one that save_checkpoint writes."""
    convert_file(BUNDLED, tmp_path / "original.pt", reader)
    model = ResNet8.from_checkpoint(tmp_path / "original.pt")
    before = score(model, sample)
    images, labels = torch.from_numpy(sample.images).float(), torch.from_numpy(sample.labels).long()
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
    for batch in torch.arange(len(labels)).split(200):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint(model.eval(), tmp_path / "tuned.pt", like=tmp_path / "original.pt")
    metadata = convert_back(tmp_path / "tuned.pt", tmp_path / "tuned.keras", reader, keras)
    assert metadata["verification"]["float64"]["activations"] <= 1e-10
    ours = score(model, sample)
    theirs = keras.predict(sample.images, PLAIN)
    assert np.array_equal(ours.classes, theirs.argmax(axis=1))
    assert np.abs(ours.probabilities - theirs).max() <= 1e-5
    assert 20 < (ours.classes != before.classes).sum() < 500

    # evaluate.py --keras FILE: these are two files of one model, a stranger's is named
    tuned = read_checkpoint(tmp_path / "tuned.pt")
    (tmp_path / "stranger.keras").write_bytes(b"another")
    for file, named in (
        (tmp_path / "tuned.keras", []),
        (BUNDLED, []),
        (tmp_path / "stranger.keras", ["stranger.keras"]),
    ):
        find_baseline(tuned, file, notes := Notes())
        assert len(notes.lines) == len(named) and all(name in notes.lines[0] for name in named)


# --- Mistakes --------------------------------------------------------------------------------------------


def change_layers(change):
    """Return a mistake: the layers that Keras is given, by name, changed."""

    def apply(patch):
        def mistaken(*arguments):
            layers = {layer.name: layer for layer in graph_of(*arguments)}
            change(layers)
            return list(layers.values())

        patch.setattr(convert, "graph_of", mistaken)

    return apply


def change_array(name, variable, change):
    def apply(layers):
        arrays = {**layers[name].arrays, variable: change(layers[name].arrays[variable])}
        layers[name] = replace(layers[name], arrays=arrays)

    return change_layers(apply)


def change_config(name, **options):
    def apply(layers):
        layers[name] = replace(layers[name], config={**layers[name].config, **options})

    return change_layers(apply)


def change_table(class_name, changes):
    """Return a mistake: the table itself wrong, so that it is wrong both ways, and undoes itself."""
    variables = tuple(variable._replace(**changes.get(variable.name, {})) for variable in MAPPING[class_name])
    return lambda patch: patch.setitem(MAPPING, class_name, variables)


def swap_gamma_and_beta(layers):
    arrays = layers["layer1_bn2"].arrays
    arrays = {**arrays, "gamma": arrays["beta"], "beta": arrays["gamma"]}
    layers["layer1_bn2"] = replace(layers["layer1_bn2"], arrays=arrays)


def symmetric_padding(patch):
    patch.setattr(resnet8, "SamePadConv2d", lambda *arguments: nn.Conv2d(*arguments, padding=1))


def wrong_epsilon(patch):
    patch.setattr(
        convert, "graph_of", lambda state, size, norm: graph_of(state, size, {**norm, "epsilon": 1e-5})
    )


def not_permuted_back(patch):
    patch.setattr(placing.np, "argsort", lambda axes: range(len(axes)))


PROOF = ["float64", "1e-10"]
MISTAKES = {  # what is done wrong -> the error, and what its message names
    "no kernel permuted back": (not_permuted_back, WorkerError, ["conv1"]),
    "a kernel's height and width swapped": (
        change_array("layer2_conv2", "kernel", lambda kernel: kernel.transpose(1, 0, 2, 3)),
        VerificationError,
        ["layer2.conv2.weight", "layer2_conv2", "kernel"],
    ),
    "in and out of a square kernel swapped": (
        change_array("layer3_conv2", "kernel", lambda kernel: kernel.transpose(0, 1, 3, 2)),
        VerificationError,
        ["layer3.conv2.weight", "layer3_conv2", "kernel"],
    ),
    "height and width swapped by the table": (
        change_table("Conv2D", {"kernel": {"axes": (3, 2, 1, 0)}}),
        VerificationError,
        ["conv1", *PROOF],
    ),
    "gamma and beta swapped": (
        change_layers(swap_gamma_and_beta),
        VerificationError,
        ["layer1.bn2.weight", "layer1_bn2", "gamma"],
    ),
    "gamma and beta swapped by the table": (
        change_table("BatchNormalization", {"gamma": {"parameter": "bias"}, "beta": {"parameter": "weight"}}),
        VerificationError,
        ["bn1", *PROOF],
    ),
    "mean and variance swapped by the table": (
        change_table(
            "BatchNormalization",
            {"moving_mean": {"parameter": "running_var"}, "moving_variance": {"parameter": "running_mean"}},
        ),
        (VerificationError, KerasFileError),
        ["bn1"],
    ),
    "PyTorch's epsilon": (wrong_epsilon, VerificationError, ["bn1", *PROOF]),
    "one epsilon": (
        change_config("layer3_bn1", epsilon=1.001e-3),
        KerasFileError,
        ["layer3_bn1", "epsilon", "0.001001", "0.001", "bn1"],
    ),
    "PyTorch's padding": (symmetric_padding, VerificationError, ["layer2.conv1", *PROOF]),
    "no padding": (
        change_config("conv1", padding="valid"),
        KerasFileError,
        ["conv1", "Conv2D", "padding", "valid", "same"],
    ),
    "a bias off by one float32": (
        change_array("fc", "bias", lambda bias: np.nextafter(bias, np.float32(9))),
        VerificationError,
        ["fc.bias", "fc", "bias"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_found(checkpoint, reader, keras, monkeypatch, capsys, mistake):
    """The layer is named, and nothing is written."""
    make, kind, named = MISTAKES[mistake]
    before = files_in(checkpoint.parent)
    make(monkeypatch)
    with pytest.raises(kind) as caught:
        convert_back(checkpoint, checkpoint.parent / "odd.h5", reader, keras)
    message = str(caught.value)
    assert all(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message) for name in named), message
    assert len(message.splitlines()) == 1
    assert ("  numbers     failed\n" in capsys.readouterr().out) == ("float64" in message)
    assert files_in(checkpoint.parent) == before


def test_wrong_rescaling_is_found(checkpoint, reader, keras, monkeypatch):
    before = files_in(checkpoint.parent)
    monkeypatch.setattr(
        convert,
        "with_rescaling",
        lambda layers, fed: with_rescaling(layers, Scaling([-value for value in fed.mean], fed.std)),
    )
    with pytest.raises(VerificationError, match="Rescaling"):
        convert_back(checkpoint, checkpoint.parent / "odd.h5", reader, keras, rescaling=True, verify=False)
    assert files_in(checkpoint.parent) == before
