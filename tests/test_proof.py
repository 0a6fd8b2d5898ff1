"""models/conversion/verify.py: every mistake is found, and the first layer that differs is named."""

import re
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from convert import convert_file
from models import resnet8
from models.common.cli import VerificationError
from models.conversion import stages, verify
from models.conversion.match import match_graph
from models.conversion.stages import count_parameters, map_tensors
from models.graph import GRAPH
from models.keras.file import read_keras_file
from models.mapping import MAPPING
from models.normalization import Normalization
from models.resnet8 import ResNet8

INPUT = {"mean": [120.0], "std": [64.0]}  # inputs of the random networks are of the order of 1


# Mistakes: functions of a MonkeyPatch


def table(class_name, **changes):
    """Change the entries of MAPPING for a class, by variable."""
    variables = tuple(v._replace(**changes.get(v.name, {})) for v in MAPPING[class_name])
    return lambda patch: patch.setitem(MAPPING, class_name, variables)


def rows(change):
    """Change the rows of the mapping, by key."""

    def apply(patch):
        def mistaken(matched, model):
            mapping = {row.key: row for row in map_tensors(matched, model)}
            change(mapping)
            return list(mapping.values())

        patch.setattr(stages, "map_tensors", mistaken)

    return apply


def row(key, **values):
    return rows(lambda mapping: mapping.update({key: replace(mapping[key], **values)}))


def array(key, change):
    def apply(mapping):
        mapping[key] = replace(mapping[key], keras_array=change(mapping[key].keras_array))

    return rows(apply)


def swapped(one, other):
    """Swap the tensors of two layers."""

    def change(mapping):
        for key in [key for key in mapping if key.startswith(f"{one}.")]:
            a, b = mapping[key], mapping[key.replace(one, other)]
            mapping[a.key] = replace(a, keras_array=b.keras_array)
            mapping[b.key] = replace(b, keras_array=a.keras_array)

    return rows(change)


def model(change):
    """Change the network."""

    def apply(patch):
        build = stages.build_model

        def mistaken(matched):
            network = build(matched)
            change(network)
            return network

        patch.setattr(stages, "build_model", mistaken)

    return apply


def attribute(path, name, value):
    return model(lambda network: setattr(network.get_submodule(path), name, value))


def pytorch_epsilon(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5


def symmetric_padding(patch):
    patch.setattr(resnet8, "SamePadConv2d", lambda *arguments: nn.Conv2d(*arguments, padding=1))


def no_shortcut(patch):
    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))

    patch.setattr(resnet8.BasicBlock, "forward", forward)


def not_normalized(patch):
    patch.setattr(stages, "input_normalization", lambda *_: Normalization([0.0], [1.0]))


def off_by(fraction):
    """Return a function that changes one value of a kernel by a fraction of it."""

    def change(kernel):
        changed = kernel.astype(np.float64)
        changed[1, 1, 0, 0] *= 1 + fraction
        assert (changed.astype(np.float32) != kernel).sum() == 1
        return changed

    return change


MISTAKES = {  # mistake -> first layer that differs
    "two BatchNorms swapped": (swapped("layer1.bn1", "layer1.bn2"), "layer1.bn1"),
    "two convolutions swapped": (swapped("layer1.conv1", "layer1.conv2"), "layer1.conv1"),
    "mean and beta swapped": (
        table("BatchNormalization", beta={"parameter": "running_mean"}, moving_mean={"parameter": "bias"}),
        "bn1",
    ),
    "height and width swapped": (table("Conv2D", kernel={"axes": (3, 2, 1, 0)}), "conv1"),
    "in and out of a square kernel swapped": (row("layer3.conv2.weight", axes=(2, 3, 0, 1)), "layer3.conv2"),
    "red and blue swapped": (array("conv1.weight", lambda kernel: kernel[:, :, ::-1]), "conv1"),
    "PyTorch's epsilon": (model(pytorch_epsilon), "bn1"),
    "one epsilon": (attribute("layer2.bn2", "eps", 1.001e-3), "layer2.bn2"),
    "an epsilon that is NaN": (attribute("layer3.bn1", "eps", float("nan")), "layer3.bn1"),
    "symmetric padding": (symmetric_padding, "layer2.conv1"),
    "no shortcut": (no_shortcut, "layer1.add"),
    "no ReLU": (attribute("", "relu", nn.Identity()), "relu"),
    "pooling by maximum": (attribute("", "avgpool", nn.AdaptiveMaxPool2d(1)), "avgpool"),
    "a bias left out": (array("layer2.downsample.bias", np.zeros_like), "layer2.downsample"),
    "weights rounded to float16": (
        array("layer3.downsample.weight", lambda kernel: kernel.astype(np.float16)),
        "layer3.downsample",
    ),
    "two classes swapped": (
        array("fc.weight", lambda kernel: kernel[:, [1, 0, *range(2, kernel.shape[1])]]),
        "probabilities",
    ),
    "a bias of the head off by 1e-5": (
        array("fc.bias", lambda bias: bias.astype(np.float64) + 1e-5 * np.eye(len(bias))[0]),
        "probabilities",
    ),
    "input not normalized": (not_normalized, "conv1"),
}
SMALL_MISTAKES = {  # also found among large activations
    **{name: MISTAKES[name] for name in ("PyTorch's epsilon", "one epsilon", "weights rounded to float16")},
    "a weight off by 1e-6 of itself": (array("layer2.conv2.weight", off_by(1e-6)), "layer2.conv2"),
    "a first weight off by 1e-6 of itself": (array("conv1.weight", off_by(1e-6)), "conv1"),
}


def assert_found(path, output, keras, node, **normalization):
    """Check that the verification fails in float64, in one line that names the node and the layer."""
    with pytest.raises(VerificationError) as caught:
        convert_file(path, output, keras, **normalization)
    message = str(caught.value)
    assert re.search(rf" in {re.escape(node)}[ :]", message) and "float64" in message, message
    assert len(message.splitlines()) == 1
    if node in GRAPH:
        assert f"'{match_graph(read_keras_file(path))[node].name}'" in message


@pytest.mark.parametrize("mistake", MISTAKES)
def test_first_wrong_layer_is_named(reference_files, keras, old_outputs, monkeypatch, capsys, mistake):
    make, node = MISTAKES[mistake]
    output, untouched = old_outputs
    make(monkeypatch)
    assert_found(reference_files / "odd.h5", output, keras, node, **INPUT)
    assert re.search(r"^  outputs +failed$", capsys.readouterr().out, re.MULTILINE)
    assert untouched()


def test_parameters_are_counted(reference_files, keras, old_outputs, monkeypatch, capsys):
    output, untouched = old_outputs
    rows(lambda mapping: mapping.pop("layer1.bn1.bias"))(monkeypatch)
    for count, wrong in (("trainable", 4), ("statistics", -4)):

        def miscount(*arguments, count=count, wrong=wrong):
            answer, arrays = type(keras).reference(keras, *arguments)
            assert (answer["trainable"], answer["statistics"]) == count_parameters(ResNet8(7, 4, 4))
            return {**answer, count: answer[count] + wrong}, arrays

        monkeypatch.setattr(keras, "reference", miscount)
        with pytest.raises(VerificationError, match="statistics"):
            convert_file(reference_files / "odd.h5", output, keras, **INPUT)
    assert re.search(r"^  parameters +failed$", capsys.readouterr().out, re.MULTILINE)
    assert untouched()


def test_every_layer_is_compared_on_real_and_random_images(reference_files, keras, tmp_path, monkeypatch):
    """In both dtypes on 16 of each; the float32 probabilities on all other real images too."""
    bounds, requested = [], []
    check_bound = verify.check_bound
    monkeypatch.setattr(
        verify, "check_bound", lambda where, *rest: bounds.append((where, *rest)) or check_bound(where, *rest)
    )
    monkeypatch.setattr(
        keras, "reference", lambda *given: requested.append(given) or type(keras).reference(keras, *given)
    )
    metadata = convert_file(reference_files / "odd.h5", tmp_path / "model.pt", keras, **INPUT)
    nodes = [node for node in GRAPH if node != "fc"]  # Keras's fc has a softmax: the probabilities
    compared = [(where.split(" ")[0], dtype, bound) for where, _, dtype, bound in bounds]
    assert compared == [
        *((node, "float64", 1e-10) for node in nodes),
        ("probabilities", "float64", 1e-12),
        ("probabilities", "float32", 1e-4),
    ]
    ((_, images, others, normalization),) = requested
    assert images.shape == (32, 4, 21, 30) and others.shape == (984, 4, 21, 30)
    real, random = images[:16], images[16:]
    assert np.array_equal(real[:, 3], real[:, 0]) and not np.array_equal(random[:, 3], random[:, 0])
    assert len(np.unique(random)) == 256
    assert normalization == Normalization.from_args(4, **INPUT)
    results = metadata["verification"]
    assert (results["layers"], results["rebuilt"]) == (len(GRAPH), None)
    assert 0 < results["float64"]["activations"] <= 1e-10
    assert 0 < results["float64"]["probabilities"] <= 1e-12
    assert 1e-9 < results["float32"]["probabilities"] <= 1e-4
    assert ResNet8.from_checkpoint(tmp_path / "model.pt").bn1.running_mean.dtype == torch.float32


# The bound on activations grows with large ones, whose rounding grows too


@pytest.fixture(scope="module")
def large(reference_files, tmp_path_factory):
    """Return a file whose first kernel, and so every activation, is 1275 times as large."""
    path = tmp_path_factory.mktemp("large") / "large.h5"
    path.write_bytes((reference_files / "odd.h5").read_bytes())
    name = match_graph(read_keras_file(path))["conv1"].name
    with h5py.File(path, "r+") as file:
        kernel = file[f"model_weights/{name}/{name}/kernel"]
        kernel[...] = kernel[()] * 1275
    return path


def test_large_activations(large, keras, tmp_path, capsys):
    results = convert_file(large, tmp_path / "model.pt", keras)["verification"]
    assert 0 < results["float64"]["activations"] <= 1e-10 and results["float64"]["probabilities"] <= 1e-12
    assert results["largest_activation"] > 1e5
    output = capsys.readouterr().out
    assert f"{results['largest_activation']:,.0f}" in output and "--std 255" in output
    convert_file(large, tmp_path / "model.pt", keras, std=[2.0])
    assert "largest activation" in (output := capsys.readouterr().out) and "--std" not in output


@pytest.mark.parametrize("mistake", SMALL_MISTAKES)
def test_small_mistakes_among_large_activations(large, keras, tmp_path, monkeypatch, mistake):
    make, node = SMALL_MISTAKES[mistake]
    make(monkeypatch)
    assert_found(large, tmp_path / "model.pt", keras, node)


def test_differences_of_usual_activations_are_not_scaled():
    for usual in (1e-3, 1.0, 1999.0):
        keras = np.full((2, 5, 5, 8), usual)
        pytorch = keras.copy()
        pytorch[1, 2, 3, 4] += 2**-30
        assert verify.largest_difference(pytorch, keras) == np.max(np.abs(pytorch - keras)) > 0


def test_one_huge_channel_hides_nothing_in_the_others():
    keras = np.ones((2, 5, 5, 8))
    keras[..., 0] = 1e12
    pytorch = keras.copy()
    pytorch[1, 2, 3, 0] *= 1 + 4e-16  # its own rounding
    assert 0 < verify.largest_difference(pytorch, keras) <= 1e-10
    pytorch[1, 2, 3, 4] += 1e-9
    assert verify.largest_difference(pytorch, keras) == pytest.approx(1e-9)
    assert np.isnan(verify.largest_difference(pytorch * np.nan, keras))
    assert np.isnan(verify.largest_difference(pytorch, keras * np.nan))


# Keras computes with the file's own input and output


def test_half_precision_input_is_rounded(keras_files, keras, tmp_path):
    """Whole pixels are exact in float16; normalized ones are not, and then Keras computes something else."""
    path = keras_files / "keras" / "float16.h5"
    convert_file(path, tmp_path / "model.pt", keras)
    assert_found(path, tmp_path / "model.pt", keras, "conv1", std=[255.0])


@pytest.mark.parametrize("name", ["dict_output.keras", "integer_input.keras"])
def test_unusual_inputs_and_outputs(keras_files, keras, tmp_path, name):
    results = convert_file(keras_files / "keras" / name, tmp_path / "model.pt", keras)["verification"]
    assert results["rebuilt"] is None
    assert results["float64"]["activations"] <= 1e-10 and results["float64"]["probabilities"] <= 1e-12
