"""models/conversion/proof.py: every mistake is found, and the first layer that it makes differ is named."""

import re
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from convert import convert_file
from models import resnet8
from models.common.errors import VerificationError
from models.conversion import proof, stages
from models.conversion.matching import match_graph
from models.conversion.proof import count_parameters
from models.conversion.tensors import map_tensors
from models.graph import GRAPH
from models.keras.file import read_keras_file
from models.mapping import MAPPING
from models.resnet8 import ResNet8
from models.scaling import Scaling

INPUT = {"mean": [120.0], "std": [64.0]}  # what the random networks are fed is of the order of 1
PLAIN = {"mean": [0.0], "std": [1.0]}


def change_mapping(class_name, changes):
    """Return a mistake: the table's entries for a layer, by variable, changed."""
    variables = tuple(variable._replace(**changes.get(variable.name, {})) for variable in MAPPING[class_name])
    return lambda patch: patch.setitem(MAPPING, class_name, variables)


def change_rows(change):
    """Return a mistake: the mapping's rows, by key, changed."""

    def apply(patch):
        def mistaken(places, model):
            rows = {row.key: row for row in map_tensors(places, model)}
            change(rows)
            return list(rows.values())

        patch.setattr(stages, "map_tensors", mistaken)

    return apply


def swap_sources(rows, one, other):
    for variable in ("weight", "bias", "running_mean", "running_var"):
        if f"{one}.{variable}" in rows:
            a, b = rows[f"{one}.{variable}"], rows[f"{other}.{variable}"]
            rows[a.key], rows[b.key] = replace(a, source=b.source), replace(b, source=a.source)


def change_model(change):
    """Return a mistake: the network itself changed."""

    def apply(patch):
        build = stages.build_model

        def mistaken(places):
            model = build(places)
            change(model)
            return model

        patch.setattr(stages, "build_model", mistaken)

    return apply


def symmetric_padding(patch):
    patch.setattr(resnet8, "SamePadConv2d", lambda *arguments: nn.Conv2d(*arguments, padding=1))


def no_shortcut(patch):
    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))

    patch.setattr(resnet8.BasicBlock, "forward", forward)


def changed_source(key, change):
    return change_rows(lambda rows: rows.update({key: replace(rows[key], source=change(rows[key].source))}))


MISTAKES = {  # what is done wrong -> the first layer that computes something else
    "two BatchNorms swapped": (
        change_rows(lambda rows: swap_sources(rows, "layer1.bn1", "layer1.bn2")),
        "layer1.bn1",
    ),
    "two convolutions swapped": (
        change_rows(lambda rows: swap_sources(rows, "layer1.conv1", "layer1.conv2")),
        "layer1.conv1",
    ),
    "mean and beta swapped": (
        change_mapping(
            "BatchNormalization",
            {"beta": {"parameter": "running_mean"}, "moving_mean": {"parameter": "bias"}},
        ),
        "bn1",
    ),
    "height and width swapped": (
        change_mapping("Conv2D", {"kernel": {"axes": (3, 2, 1, 0)}}),
        "conv1",
    ),
    "in and out of a square kernel swapped": (
        change_rows(
            lambda rows: rows.update(
                {"layer3.conv2.weight": replace(rows["layer3.conv2.weight"], axes=(2, 3, 0, 1))}
            )
        ),
        "layer3.conv2",
    ),
    "red and blue swapped": (changed_source("conv1.weight", lambda kernel: kernel[:, :, ::-1]), "conv1"),
    "PyTorch's epsilon": (
        change_model(lambda model: [setattr(m, "eps", 1e-5) for m in model.modules() if hasattr(m, "eps")]),
        "bn1",
    ),
    "one epsilon": (change_model(lambda model: setattr(model.layer2.bn2, "eps", 1.001e-3)), "layer2.bn2"),
    "an epsilon that is NaN": (
        change_model(lambda model: setattr(model.layer3.bn1, "eps", float("nan"))),
        "layer3.bn1",
    ),
    "symmetric padding": (symmetric_padding, "layer2.conv1"),
    "no shortcut": (no_shortcut, "layer1.add"),
    "a ReLU that does nothing": (
        change_model(lambda model: setattr(model, "relu", nn.Identity())),
        "relu",
    ),
    "the pooling takes the maximum": (
        change_model(lambda model: setattr(model, "avgpool", nn.AdaptiveMaxPool2d(1))),
        "avgpool",
    ),
    "a bias left out": (changed_source("layer2.downsample.bias", np.zeros_like), "layer2.downsample"),
    "weights rounded to float16": (
        changed_source("layer3.downsample.weight", lambda kernel: kernel.astype(np.float16)),
        "layer3.downsample",
    ),
    "two classes swapped": (
        changed_source("fc.weight", lambda kernel: kernel[:, [1, 0, *range(2, kernel.shape[1])]]),
        "probabilities",
    ),
    "a bias of the head off by 1e-10": (
        changed_source("fc.bias", lambda bias: bias.astype(np.float64) + 1e-5 * np.eye(len(bias))[0]),
        "probabilities",
    ),
    "the input not normalized": (
        lambda patch: patch.setattr(stages, "input_normalization", lambda *_: Scaling([0.0], [1.0])),
        "conv1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verification_names_the_first_wrong_layer(
    reference_files, reader, keras, old_outputs, monkeypatch, capsys, mistake
):
    make, place = MISTAKES[mistake]
    output, untouched = old_outputs
    make(monkeypatch)
    with pytest.raises(VerificationError) as caught:
        convert_file(reference_files / "odd.h5", output, reader, keras, **INPUT)
    message = str(caught.value)
    assert names_place(message, place) and "float64" in message and len(message.splitlines()) == 1
    assert re.search(r"numbers +failed", capsys.readouterr().out)
    assert untouched()


def names_place(message, place):
    """See whether a message names a place, and not another whose name ends or begins as this one's."""
    return re.search(rf"(?<![\w.]){re.escape(place)}(?!\w|\.\w)", message)


def test_verification_names_keras_layer(reference_files, reader, keras, tmp_path, monkeypatch):
    """The name in the message is the layer's in the Keras file."""
    name = match_graph(read_keras_file(reference_files / "odd.h5", reader))["layer2.bn2"].name
    MISTAKES["one epsilon"][0](monkeypatch)
    with pytest.raises(VerificationError) as caught:
        convert_file(reference_files / "odd.h5", tmp_path / "model.pt", reader, keras, **INPUT)
    assert "layer2.bn2" in str(caught.value) and name in str(caught.value)


def test_verification_counts_parameters(reference_files, reader, keras, old_outputs, monkeypatch, capsys):
    output, untouched = old_outputs
    change_rows(lambda rows: rows.pop("layer1.bn1.bias"))(monkeypatch)
    loaded = keras.load(read_keras_file(reference_files / "odd.h5", reader))
    trainable, statistics = loaded["trainable"], loaded["statistics"]
    assert (trainable, statistics) == count_parameters(ResNet8(7, 4, 4))
    for wrong in ({"trainable": trainable + 4}, {"statistics": statistics - 4}):
        monkeypatch.setattr(keras, "load", lambda file, wrong=wrong: {**loaded, **wrong})
        with pytest.raises(VerificationError) as caught:
            convert_file(reference_files / "odd.h5", output, reader, keras, **INPUT)
        counts = [trainable, statistics, *wrong.values()]
        assert all(f"{count:,}" in str(caught.value) for count in counts)
    assert re.search(r"parameters +failed", capsys.readouterr().out)
    assert untouched()


def test_verification_passes_and_compares_every_layer(reference_files, reader, keras, tmp_path, monkeypatch):
    held = []  # (dtype, place)
    check = proof.check

    def watched(where, difference, dtype, bound):
        held.append((dtype, where.split(" ")[0]))
        return check(where, difference, dtype, bound)

    monkeypatch.setattr(proof, "check", watched)
    metadata = convert_file(reference_files / "odd.h5", tmp_path / "model.pt", reader, keras, **INPUT)
    # Keras's fc has been through the softmax: the probabilities
    layers = {("float64", place) for place in set(GRAPH) - {"fc"}}
    assert set(held) == layers | {("float64", "probabilities"), ("float32", "probabilities")}
    assert held[: len(GRAPH)] == [("float64", place) for place in GRAPH if place != "fc"] + [
        ("float64", "probabilities")
    ]
    results = metadata["verification"]
    assert results["layers"] == len(GRAPH) - 1
    assert results["rebuilt"] is None
    assert 0 < results["float64"]["activations"] <= 1e-10
    assert 0 < results["float64"]["probabilities"] <= 1e-12
    assert 1e-9 < results["float32"]["probabilities"] <= 1e-4
    assert ResNet8.from_checkpoint(tmp_path / "model.pt").bn1.running_mean.dtype == torch.float32


def test_verification_takes_real_and_random_images(reference_files, reader, keras, tmp_path, monkeypatch):
    """Every layer on 100 of each in both arithmetics, the float32 probabilities on all others too."""
    asked = {}

    def count(name):
        ask = getattr(keras, name)

        def counted(images, scaling, dtype):
            asked.setdefault((name, dtype), []).append(images)
            return ask(images, scaling, dtype)

        monkeypatch.setattr(keras, name, counted)

    count("activations")
    count("predict")
    convert_file(reference_files / "odd.h5", tmp_path / "model.pt", reader, keras, **INPUT)
    real, random = proof.probe_images([21, 30, 4]).values()
    assert real.shape == (1000, 4, 21, 30) and random.shape == (100, 4, 21, 30)
    on_layers = np.concatenate([real[:100], random])
    expected = {
        ("activations", "float64"): on_layers,
        ("activations", "float32"): on_layers,
        ("predict", "float32"): real[100:],
    }
    assert set(asked) == set(expected)
    for key, images in expected.items():
        assert np.array_equal(np.concatenate(asked[key]), images), key


# The bound is that of activations of usual size, and grows with them: so does their rounding


@pytest.fixture(scope="module")
def large(reference_files, reader, tmp_path_factory):
    """Return a file whose first kernel is 1275 times as large, and so is every activation after it."""
    path = tmp_path_factory.mktemp("large") / "large.h5"
    path.write_bytes((reference_files / "odd.h5").read_bytes())
    name = match_graph(read_keras_file(path, reader))["conv1"].name
    with h5py.File(path, "r+") as file:
        kernel = file[f"model_weights/{name}/{name}/kernel"]
        kernel[...] = kernel[()] * 1275
    return path


def test_large_activations_have_a_larger_bound(large, reader, keras, tmp_path, capsys):
    results = convert_file(large, tmp_path / "model.pt", reader, keras, **PLAIN)["verification"]
    assert 0 < results["float64"]["activations"] <= 1e-10 and results["float64"]["probabilities"] <= 1e-12
    reach = results["largest_activation"]
    assert reach > 1e5
    printed = capsys.readouterr().out
    assert f"{reach:,.0f}" in printed and "2,000" in printed


SMALL_MISTAKES = {
    "PyTorch's epsilon": MISTAKES["PyTorch's epsilon"],
    "one epsilon": MISTAKES["one epsilon"],
    "weights rounded to float16": MISTAKES["weights rounded to float16"],
    "a weight off by 1e-6 of itself": (
        changed_source("layer2.conv2.weight", lambda kernel: off_by(kernel, 1e-6)),
        "layer2.conv2",
    ),
    "a weight of the first kernel off by 1e-6 of itself": (
        changed_source("conv1.weight", lambda kernel: off_by(kernel, 1e-6)),
        "conv1",
    ),
}


def off_by(kernel, fraction):
    """Return the kernel with one of its values changed by a fraction of it."""
    changed = kernel.astype(np.float64)
    changed[1, 1, 0, 0] *= 1 + fraction
    assert (changed.astype(np.float32) != kernel).sum() == 1
    return changed


@pytest.mark.parametrize("mistake", SMALL_MISTAKES)
def test_small_mistakes_among_large_activations_are_found(
    large, reader, keras, tmp_path, monkeypatch, mistake
):
    make, place = SMALL_MISTAKES[mistake]
    make(monkeypatch)
    with pytest.raises(VerificationError) as caught:
        convert_file(large, tmp_path / "model.pt", reader, keras, **PLAIN)
    message = str(caught.value)
    assert names_place(message, place) and "float64" in message and "1e-10" in message


@pytest.mark.parametrize("usual", [1e-3, 1.0, 1999.0])
def test_a_difference_of_usual_activations_counts_as_it_is(usual):
    theirs = np.full((2, 5, 5, 8), usual)
    ours = theirs.copy()
    ours[1, 2, 3, 4] += 2**-30
    assert proof.largest_difference(ours, theirs) == np.max(np.abs(ours - theirs)) > 0


def test_one_huge_channel_hides_nothing_in_the_others():
    theirs = np.ones((2, 5, 5, 8))
    theirs[..., 0] = 1e12
    ours = theirs.copy()
    ours[1, 2, 3, 0] *= 1 + 4e-16  # its own rounding
    assert 0 < proof.largest_difference(ours, theirs) <= 1e-10
    ours[1, 2, 3, 4] += 1e-9
    assert proof.largest_difference(ours, theirs) == pytest.approx(1e-9)
    assert np.isnan(proof.largest_difference(ours * np.nan, theirs))
    assert np.isnan(proof.largest_difference(ours, theirs * np.nan))


# The proof runs what the file says, not what most files say


def test_a_half_precision_input_rounds(keras_files, reader, keras, tmp_path, capsys):
    """Pixels are exact in it; what they are scaled to is not, and then Keras computes something else."""
    path = keras_files / "keras" / "float16.h5"
    convert_file(path, tmp_path / "model.pt", reader, keras, **PLAIN)
    note = read_keras_file(path, reader).notes[0]
    assert "float16" in note and note in capsys.readouterr().out
    with pytest.raises(VerificationError) as caught:
        convert_file(path, tmp_path / "model.pt", reader, keras, mean=[0.0], std=[255.0])
    assert names_place(str(caught.value), "conv1") and "float64" in str(caught.value)
    float32 = keras.predict(np.full((1, 3, 16, 16), 100.1), Scaling.given(3))
    assert np.array_equal(float32, keras.predict(np.full((1, 3, 16, 16), 100.125), Scaling.given(3)))


def test_one_output_in_a_dict_is_that_output(keras_files, reader, keras, tmp_path):
    for name in ("dict_output.h5", "dict_output.keras"):
        results = convert_file(keras_files / "keras" / name, tmp_path / "model.pt", reader, keras, **PLAIN)
        assert results["verification"]["float64"]["probabilities"] <= 1e-12


def test_float32_has_its_bound(reference_files, reader, keras, old_outputs, monkeypatch):
    output, untouched = old_outputs
    monkeypatch.setitem(proof.MAX_PROBABILITY_DIFFERENCE, "float32", 1e-12)
    with pytest.raises(VerificationError) as caught:
        convert_file(reference_files / "odd.h5", output, reader, keras, **INPUT)
    assert all(word in str(caught.value) for word in ("probabilities", "float32", "1e-12"))
    assert untouched()
