"""convert.py on checkpoints: the written Keras file has the same tensors and computes the same."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import convert
from convert import convert_back, convert_file
from models.checkpoint import save_checkpoint
from models.common.cli import KerasFileError, VerificationError
from models.common.job import JobError
from models.conversion import match
from models.conversion.match import add_rescaling, layers_of_state_dict, match_graph
from models.conversion.stages import map_tensors
from models.graph import GRAPH
from models.keras.file import read_keras_file
from models.resnet8 import ResNet8
from tests.conftest import ROOT, STAGES, files_in, passed_stages, run_programs
from tests.test_parity import assert_loss_and_gradients_are_keras

BUNDLED = ROOT / "checkpoints/resnet8_keras.h5"
pytestmark = pytest.mark.long
INPUT = {"mean": [120.0], "std": [64.0]}  # inputs of the random networks are of the order of 1


@pytest.fixture
def checkpoint(reference_files, tmp_path):
    """Return a checkpoint of a random ResNet8 of odd sizes, with its JSON, in a folder of its own."""
    shutil.copy(reference_files / "odd.h5", tmp_path / "source.h5")
    convert_file(tmp_path / "source.h5", tmp_path / "here" / "odd.pt", **INPUT)
    return tmp_path / "here" / "odd.pt"


def assert_same_tensors(one, other):
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    assert list(one) == list(other)
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key


def assert_verified(metadata):
    results = metadata["verification"]
    assert results["rebuilt"] is None and results["layers"] == len(GRAPH)
    assert 0 < results["float64"]["activations"] <= 1e-10
    assert results["float64"]["probabilities"] <= 1e-12
    assert results["float32"]["probabilities"] <= 1e-4


# There and back again


ROUND_TRIPS = [
    *("any_input.keras", "epsilon_momentum.h5", "no_scale.keras"),
    BUNDLED,
]


@pytest.mark.parametrize("name", ROUND_TRIPS, ids=lambda name: Path(name).name)
def test_round_trip(keras_files, keras, tmp_path, name):
    """Keras to PyTorch to Keras to PyTorch: no tensor changes, and Keras computes the same as PyTorch."""
    source = keras_files / "keras" / name  # or `name` itself, if absolute
    written = tmp_path / "new" / f"written{'.keras' if source.suffix == '.h5' else '.h5'}"
    there = convert_file(source, tmp_path / "first.pt")
    back = convert_back(tmp_path / "first.pt", written, keras)
    assert set(files_in(written.parent)) == {written.name, f"{written.name}.json"}
    assert_verified(back)
    again = convert_file(written, tmp_path / "last.pt")
    assert_same_tensors(tmp_path / "first.pt", tmp_path / "last.pt")
    assert again["architecture"] == back["architecture"] == there["architecture"]
    assert again["input"] == there["input"]
    file = read_keras_file(written)
    assert written.suffix in file.format and "Keras 3" in file.format and file.notes == []
    assert {layer.name for layer in file.layers} == {"input", *(node.replace(".", "_") for node in GRAPH)}
    assert file.returns_probabilities


# The command and its files


def test_verified_conversion(checkpoint, tmp_path, monkeypatch):
    """The command as a process: stages, two files, nothing else changed; whatever the user's settings."""
    (tmp_path / "keras.json").write_text(
        '{"floatx": "float16", "backend": "jax", "image_data_format": "channels_first"}'
    )
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    before = files_in(checkpoint.parent)
    program = [sys.executable, "-W", "ignore", ROOT / "convert.py", "odd.pt", "-v"]
    result = subprocess.run(program, cwd=checkpoint.parent, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert passed_stages(result.stdout) == STAGES
    assert "note:" not in result.stdout
    assert re.search(r"^  fc -> fc\n    kernel +\(16, 7\) +\(1, 0\) +weight +\(7, 16\)$", result.stdout, re.M)
    after = files_in(checkpoint.parent)
    assert set(after) == {"odd.pt", "odd.json", "odd.h5", "odd.h5.json"}
    assert before.items() <= after.items()
    configs = [layer.config for layer in read_keras_file(checkpoint.with_suffix(".h5")).layers]
    assert configs[0]["dtype"] == "float32" and "float16" not in json.dumps(configs)

    metadata = json.loads(after["odd.h5.json"])
    assert metadata["architecture"] == json.loads(before["odd.json"])["architecture"]
    normalization = {"mean": [120.0] * 4, "std": [64.0] * 4}
    assert metadata["source"] == {
        "file": "odd.pt",
        "sha256": hashlib.sha256(before["odd.pt"]).hexdigest(),
        "format": "PyTorch state_dict",
        "input": normalization,
    }
    assert metadata["input"] == {"layout": "NHWC", "shape": [21, 30, 4], "range": [0, 255], **normalization}
    assert metadata["sha256"] == hashlib.sha256(after["odd.h5"]).hexdigest()
    assert set(metadata["versions"]) == {"torch", "numpy", "h5py", "keras"}
    assert metadata["verification"]["keras"] == metadata["versions"]["keras"]
    assert_verified(metadata)


def test_same_checkpoint_gives_the_same_h5(checkpoint, keras, tmp_path):
    hashes = set()
    for name in ("a.h5", "b.h5"):
        keras.answers.clear()
        hashes.add(convert_back(checkpoint, tmp_path / name, keras, verify=False)["sha256"])
    assert len(hashes) == 1


def test_options_and_assumptions(checkpoint, command):
    """Without a JSON: Keras's epsilon and momentum, and pixels, or the options. They override a JSON."""

    def normalization(*options):
        status, out, _ = command(checkpoint, "--no-verify", *options)
        assert status == 0
        metadata = json.loads((checkpoint.parent / "odd.h5.json").read_text())
        notes = " ".join(line for line in out.splitlines() if "note:" in line)
        return metadata["input"]["mean"], metadata["input"]["std"], metadata["input"]["shape"], notes

    assert normalization("--mean", 1, 2, 3, 4) == ([1.0, 2.0, 3.0, 4.0], [64.0] * 4, [21, 30, 4], "")
    checkpoint.with_suffix(".json").unlink()
    *values, notes = normalization()
    assert values == [[0.0] * 4, [1.0] * 4, [32, 32, 4]]
    assert all(text in notes for text in ("odd.json", "0.001", "0.01", "32 x 32", "255"))


class Hostile:
    def __reduce__(self):
        return print, ("code of the file ran",)


def infinite(path):
    state = ResNet8().state_dict()
    state["fc.weight"][3] = float("inf")
    torch.save(state, path)


def with_damaged_json(path):
    torch.save(ResNet8().state_dict(), path)
    path.with_suffix(".json").write_text("{")


REFUSED = {
    "code": lambda path: torch.save({"conv1.weight": Hostile()}, path),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "infinite": infinite,
    "an invalid JSON": with_damaged_json,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(command, tmp_path, kind):
    path = tmp_path / "model.pt"
    REFUSED[kind](path)
    before = files_in(tmp_path)
    status, out, errors = command(path)
    assert (status, out, len(errors)) == (1, "", 1)
    assert errors[0].startswith(f"error: {path}: ") and "Traceback" not in errors[0]
    assert files_in(tmp_path) == before


# Rescaling


def test_rescaling(checkpoint, keras, tmp_path):
    """The Keras model takes pixels; the file alone gives back the normalization, rounded to float32."""
    normalization = {"mean": [120.0, 1.5, 0.0, 3.1], "std": [64.0, 0.7, 255.0, 1.0]}
    metadata = convert_back(checkpoint, tmp_path / "model.h5", keras, **normalization, rescaling=True)
    assert metadata["input"]["mean"] == [0.0] * 4 and metadata["input"]["std"] == [1.0] * 4
    assert metadata["source"]["input"] == normalization
    assert_verified(metadata)
    layers = read_keras_file(tmp_path / "model.h5").layers
    assert [layer.name for layer in layers[:3]] == ["input", "rescaling", "conv1"]
    assert layers[1].class_name == "Rescaling"

    (tmp_path / "model.h5.json").unlink()
    again = convert_file(tmp_path / "model.h5", tmp_path / "again.pt")
    assert_same_tensors(checkpoint, tmp_path / "again.pt")
    for name, values in normalization.items():
        assert again["input"][name] == pytest.approx(values, rel=2e-7, abs=0)
    convert_back(tmp_path / "again.pt", tmp_path / "more.keras", keras, rescaling=True, verify=False)
    assert convert_file(tmp_path / "more.keras", tmp_path / "more.pt")["input"] == again["input"]


def test_rescaling_layer_comes_back(keras_files, keras, tmp_path):
    """With exactly the numbers of the Keras file that had one."""
    there = convert_file(keras_files / "keras" / "rescaling_offset.h5", tmp_path / "first.pt")
    convert_back(tmp_path / "first.pt", tmp_path / "model.keras", keras, rescaling=True, verify=False)
    layer = read_keras_file(tmp_path / "model.keras").layers[1]
    assert layer.class_name == "Rescaling" and np.ndim(layer.config["scale"]) == 0
    again = convert_file(tmp_path / "model.keras", tmp_path / "last.pt")
    assert again["input"] == there["input"]


def test_json_is_for_its_very_file(checkpoint, keras, tmp_path):
    convert_back(checkpoint, tmp_path / "model.h5", keras, verify=False)
    assert convert_file(tmp_path / "model.h5", tmp_path / "a.pt")["input"]["std"] == [64.0] * 4
    shutil.copy(tmp_path / "source.h5", tmp_path / "model.h5")
    assert convert_file(tmp_path / "model.h5", tmp_path / "a.pt")["input"]["std"] == [1.0] * 4


# Trained networks


@pytest.fixture(scope="module")
def used(reference_files, keras, tmp_path_factory):
    """Return a folder with a trained checkpoint and its Keras files, Keras's results, and images for PyTorch.

    The images, (N, H, W, C), are normalized as by the Rescaling layer of the Keras files.
    """
    folder = tmp_path_factory.mktemp("used")
    convert_file(reference_files / "odd.h5", folder / "odd.pt", **INPUT)
    model, rng = ResNet8.from_checkpoint(folder / "odd.pt").train(), np.random.default_rng(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 4, 21, 30)), torch.arange(8) % 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint(model.eval(), folder / "tuned.pt", like=folder / "odd.pt")
    for suffix in (".h5", ".keras"):
        convert_back(folder / "tuned.pt", folder / f"model{suffix}", keras, rescaling=True, verify=False)
    pixels = rng.integers(0, 256, (8, 21, 30, 4)).astype(np.uint8)
    labels = rng.integers(0, 7, 8)
    np.savez(folder / "inputs.npz", pixels=pixels, images=pixels.astype(np.float64), labels=labels)
    run_programs({folder: ("tests.keras_files.written",)})
    described = convert_file(folder / "model.h5", folder / "again.pt")["input"]
    images = (pixels - np.array(described["mean"])) / described["std"]
    with np.load(folder / "computed.npz") as arrays:
        return folder, dict(arrays), images


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_written_model_trains_as_the_network(used, mode):
    folder, computed, images = used
    model = ResNet8.from_checkpoint(folder / "tuned.pt").double()
    mapping = map_tensors(match_graph(read_keras_file(folder / "model.h5")), model)
    assert_loss_and_gradients_are_keras({**computed, "images": images}, model, mapping, mode)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_written_model_takes_integers(used, suffix):
    """uint8 pixels give the same as float32 pixels."""
    folder, computed, images = used
    assert np.array_equal(computed[f"{suffix}:uint8"], computed[f"{suffix}:float32"])
    model = ResNet8.from_checkpoint(folder / "tuned.pt")
    with torch.inference_mode():
        pytorch = model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).softmax(1).numpy()
    assert np.abs(pytorch - computed[f"{suffix}:uint8"]).max() <= 1e-6
    assert np.abs(np.diff(pytorch, axis=0)).max() > 1e-2


# Mistakes: functions of a MonkeyPatch


def change_layers(change):
    """Change the layers that Keras builds, by name."""

    def apply(patch):
        def mistaken(*arguments):
            layers = {layer.name: layer for layer in layers_of_state_dict(*arguments)}
            change(layers)
            return list(layers.values())

        patch.setattr(convert, "layers_of_state_dict", mistaken)

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


def swap_gamma_and_beta(layers):
    arrays = layers["layer1_bn2"].arrays
    arrays = {**arrays, "gamma": arrays["beta"], "beta": arrays["gamma"]}
    layers["layer1_bn2"] = replace(layers["layer1_bn2"], arrays=arrays)


def pytorch_epsilon(patch):
    def mistaken(state, size, norm):
        return layers_of_state_dict(state, size, {**norm, "epsilon": 1e-5})

    patch.setattr(convert, "layers_of_state_dict", mistaken)


MISTAKES = {  # mistake -> error, what its message names, whether the numbers differ
    "no kernel permuted back": (
        lambda patch: patch.setattr(match.np, "argsort", lambda axes: range(len(axes))),
        (JobError, ["conv1"], False),
    ),
    "a kernel's height and width swapped": (
        change_array("layer2_conv2", "kernel", lambda kernel: kernel.transpose(1, 0, 2, 3)),
        (VerificationError, ["layer2.conv2.weight", "'layer2_conv2'", "kernel"], False),
    ),
    "gamma and beta swapped": (
        change_layers(swap_gamma_and_beta),
        (VerificationError, ["layer1.bn2.weight", "'layer1_bn2'", "gamma"], False),
    ),
    "a bias off by one float32": (
        change_array("fc", "bias", lambda bias: np.nextafter(bias, np.float32(9))),
        (VerificationError, ["fc.bias", "'fc'"], False),
    ),
    "one epsilon": (
        change_config("layer3_bn1", epsilon=1.001e-3),
        (KerasFileError, ["'layer3_bn1'", "epsilon", "0.001001"], False),
    ),
    "no padding": (
        change_config("conv1", padding="valid"),
        (KerasFileError, ["'conv1'", "padding", "'valid'"], False),
    ),
    "PyTorch's epsilon": (pytorch_epsilon, (VerificationError, ["in bn1 ", "float64"], True)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_found(checkpoint, keras, monkeypatch, capsys, mistake):
    """The layer is named, and nothing is written."""
    make, (kind, words, is_numeric) = MISTAKES[mistake]
    before = files_in(checkpoint.parent)
    make(monkeypatch)
    with pytest.raises(kind) as caught:
        convert_back(checkpoint, checkpoint.parent / "odd.h5", keras)
    message = str(caught.value)
    assert all(word in message for word in words) and len(message.splitlines()) == 1, message
    assert bool(re.search(r"^  outputs +failed$", capsys.readouterr().out, re.MULTILINE)) == is_numeric
    assert files_in(checkpoint.parent) == before


def test_wrong_rescaling_is_found(checkpoint, keras, monkeypatch):
    def mistaken(layers, normalization):
        return add_rescaling(layers, replace(normalization, mean=[-value for value in normalization.mean]))

    before = files_in(checkpoint.parent)
    monkeypatch.setattr(convert, "add_rescaling", mistaken)
    with pytest.raises(VerificationError, match="Rescaling"):
        convert_back(checkpoint, checkpoint.parent / "odd.h5", keras, rescaling=True, verify=False)
    assert files_in(checkpoint.parent) == before
