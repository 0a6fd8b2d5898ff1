"""The recipes of RECIPES.md, run on the bundled images."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from data.cifar10 import load_test
from models.checkpoint import read_checkpoint
from models.resnet8 import ResNet8
from tests.conftest import ROOT
from tests.recipes import ALONE, LARGE, read_recipes

RECIPES = [name for name in read_recipes() if name not in LARGE or importlib.util.find_spec(LARGE[name])]
pytestmark = pytest.mark.long
# of 1,000 images: minimum with the original's class, and maximum difference of a logit
EXPECTED = {
    "Prune": (850, None),
    "int8": (950, None),
    "Export": (1000, 1e-4),
    "ONNX": (1000, 1e-2),
    "ExecuTorch": (1000, 1e-2),
    "safetensors": (1000, 0),
    "Golden vectors": (1000, 1e-2),
    "Symmetric padding": (1000, 1e-4),
    "Other PyTorch classes": (1000, 1e-4),
}
OTHER_CLASSES = "Other images and classes"
MLPERF_TINY = "MLPerf Tiny, closed division", "MLPerf Tiny, the runner's files"
ON_TFLITE = {"TensorFlow Lite, int8", *MLPERF_TINY, "int8 golden vectors"}
OPERATORS = ["ADD", "CONV_2D", "FULLY_CONNECTED", "MEAN", "SOFTMAX"]  # of a network with global pooling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run all recipes, each chapter in one process, with a checkpoint that takes pixels / 255."""
    folder = tmp_path_factory.mktemp("recipes")
    results, checkpoint = folder.with_suffix(".json"), folder.with_suffix(".pt")
    convert = [sys.executable, "convert.py", "--no-verify", "-o", checkpoint]
    subprocess.run(convert, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    state, described = torch.load(checkpoint), json.loads(checkpoint.with_suffix(".json").read_text())
    state["conv1.weight"] *= 255
    torch.save(state, checkpoint)
    described["input"] |= {"std": [255.0] * 3}
    checkpoint.with_suffix(".json").write_text(json.dumps(described))
    command = [sys.executable, "-m", "tests.recipes", "--folder", folder, "--json", results]
    command += ["--checkpoint", checkpoint, *RECIPES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert results.is_file(), done.stderr
    results.rename(folder / "found.json")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(results, name):
    found = results[name]
    assert "error" not in found, found["error"]
    if name == ALONE:
        assert found["printed"].startswith("cat")  # the first bundled image shows one
    elif name == OTHER_CLASSES:
        accuracies = re.findall(r"^(\w+) +(\d+\.\d)%$", found["printed"], re.MULTILINE)
        assert [class_name for class_name, _ in accuracies] == "bird cat deer dog frog horse".split()
        assert all(float(accuracy) > 75 for _, accuracy in accuracies)
    elif name == "Fine-tune":
        assert found["accuracy"] >= found["original"]  # trained on the very images
    elif name not in ON_TFLITE:
        same, difference = EXPECTED[name]
        assert found["same_prediction"] >= same
        assert difference is None or found["logits"] <= difference
        assert abs(found["accuracy"] - found["original"]) <= 0.2


def test_every_recipe_has_a_test():
    assert set(read_recipes()) == {ALONE, "Fine-tune", OTHER_CLASSES, *EXPECTED, *ON_TFLITE}


def test_fine_tuning_shows_loss_and_held_out_accuracy(results):
    assert re.search(r"\b1\b.*\b0\.\d+\b.*\d%", results["Fine-tune"]["printed"])


def test_int8_file_has_its_normalization(folder):
    assert (folder / "int8.pt2").is_file()
    described = json.loads((folder / "int8.pt2.json").read_text())
    assert described == {"input": {"mean": [0.0] * 3, "std": [255.0] * 3}}


def test_pruned_weights_are_saved_and_stay_zero(results, folder):
    """Training without the mask would fill them."""
    model = read_checkpoint(folder / "pruned.pt", ResNet8).model
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.3, abs=1e-4)
    before, sparsity, *_ = re.findall(r"[\d.]+(?=%)", results["Prune"]["printed"])
    assert sparsity == "30.00" and results["Prune"]["accuracy"] > float(before) / 100


# TensorFlow Lite


def litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    (fed,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert fed["dtype"] == given["dtype"] == np.int8
    assert fed["quantization"] == (1.0, -128)
    return interpreter, fed["index"], given["index"]


@pytest.mark.parametrize("name", ["model_int8.tflite", "pretrainedResnet_int8.tflite"])
def test_int8_files_are_as_good_as_the_network(folder, results, sample, name):
    """With few operators, for firmware, a batch of 1, and one scale for the weights of the last layer."""
    assert (folder / name).stat().st_size < 120_000  # a byte a weight
    interpreter, fed, given = litert(folder / name)
    operators = {each["op_name"] for each in interpreter._get_ops_details()}
    assert sorted(operators - {"DELEGATE"}) == OPERATORS
    right = 0
    for image, label in sample:
        interpreter.set_tensor(fed, (image.transpose(1, 2, 0).astype(np.int16) - 128).astype(np.int8)[None])
        interpreter.invoke()
        right += interpreter.get_tensor(given).argmax() == label
    assert abs(right / 1000 - results["Export"]["original"]) <= 0.01
    scales = [
        len(tensor["quantization_parameters"]["scales"])
        for tensor in interpreter.get_tensor_details()
        if tensor["shape"].tolist() == [10]  # Dense's bias; XNNPACK has changed what is said of the weights
    ]
    assert scales == [1]


def test_tensorflow_recipes_print_their_lines_only(results):
    printed = [results[name]["printed"].splitlines() for name in RECIPES if name in ON_TFLITE]
    assert [len(lines) for lines in printed] == [0, 1, 1, 4], printed


def test_images_and_labels_of_the_runner(folder):
    """Red, green and blue of each pixel in turn; CIFAR-10 has planes."""
    lines = [line.split(",") for line in (folder / "ic01/y_labels.csv").read_text().splitlines()]
    chosen = load_test(which="sample")
    assert len(lines) == 200 == len(list((folder / "ic01").glob("*.bin")))
    for number in (0, 7, 199):  # every fifth image of the sample
        image, label = chosen[5 * number]
        name, classes, given = lines[number]
        assert (classes, int(given)) == ("10", label)
        assert (folder / "ic01" / name).read_bytes() == image.transpose(1, 2, 0).tobytes()


def test_int8_golden_vectors_are_the_reference_kernels(folder, sample):
    """conv1 in integers, rounded twice, computed by numpy; XNNPACK's single rounding differs."""
    with np.load(folder / "golden_int8.npz") as content:
        found = dict(content)
    pixels = found["quantize"].astype(np.int64)
    assert np.array_equal(pixels, sample.images[:10].transpose(0, 2, 3, 1).astype(int) - 128)
    kernel, outputs = found["conv1.weight"].transpose(0, 2, 3, 1).astype(np.int64), found["conv1"]
    scale, zero = found["conv1.scale"].astype(float), found["conv1.zero_point"]
    factors = found["quantize.scale"].astype(float) * found["conv1.weight_scale"]

    padded = np.pad(pixels - found["quantize.zero_point"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = found["conv1.bias"].astype(np.int64) + sum(
        padded[:, row : row + 32, column : column + 32] @ kernel[:, row, column].T
        for row in range(3)
        for column in range(3)
    )
    mantissa, exponent = np.frexp(factors / scale)

    def rounded(values, bits):  # half away from zero
        half = 1 << (bits.astype(np.int64) - 1)
        return np.sign(values) * ((np.abs(values) + half) >> bits.astype(np.int64))

    doubled = rounded(sums * np.round(mantissa * 2**31).astype(np.int64), np.full(16, 31))
    expected = np.clip(rounded(doubled, -exponent) + zero, -128, 127)
    assert np.array_equal(outputs, expected)
    once = np.clip(np.rint(sums.astype(np.float32) * (factors / scale).astype(np.float32)) + zero, -128, 127)
    assert (outputs != once).any()
