"""models/resnet8_int8.py and models/conversion/int8.py: int8 files as integer arithmetic, byte for byte."""

import ast
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models import resnet8_int8
from models.common.cli import VerificationError
from models.common.files import sha256_of
from models.common.job import Job
from models.conversion import int8
from models.conversion.int8 import convert_int8
from models.graph import KNOWN_FILES
from models.resnet8_int8 import Convolution, QuantizedResNet8
from models.transforms import layer_activations
from tests.evaluating import NOT_A_PYTHON, SHARED, evaluated, refused, with_few_images
from tests.int8_files import random_int8, write_int8

REFERENCE = SHARED / "mlperf_tiny/pretrainedResnet_quant.tflite"
CASES = {  # arguments of random_int8 and of write_int8
    "plain": ({}, {}),
    "uint8 in, float32 out": ({"seed": 1}, {"inputs": "uint8", "outputs": "float32"}),
    "MEAN, 100 classes, no softmax": ({"classes": 100, "softmax": False, "is_mean": True}, {}),
    "3 classes, no bias, no RESHAPE, odd size": (
        {"width": 5, "classes": 3, "has_bias": False},
        {"reshape": False, "image": (21, 30)},
    ),
}
# SHA-256 of the outputs of TensorFlow Lite Micro for "plain" and the first 100 images of the sample
TFLM = "f51f7f041e5963b5516592139d0a87fb199aab1581716b4333e2b33d0fa28ae8"


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Run the job in this process, which saves the imports."""

    class InProcess:
        def __init__(self, module):
            assert module == "models.conversion.int8"

        def run(self, request, arrays):
            answer, arrays = int8.run_task(json.loads(json.dumps(request)), arrays)
            return answer, {name: np.array(value) for name, value in arrays.items()}

    monkeypatch.setattr(int8, "Job", InProcess)
    monkeypatch.setattr(int8, "limit_resources", lambda *_: None)
    monkeypatch.setattr(int8, "IMAGES", 20)


@pytest.fixture
def plain(tmp_path):
    return write_int8(tmp_path / "plain.tflite", random_int8())


# --- Conversion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_byte_equals_the_reference_kernels(tmp_path, sample, case):
    """The tensors of the file, its sizes, and all outputs, compared by `convert_int8`."""
    network, file = CASES[case]
    original = random_int8(**network)
    path = write_int8(tmp_path / "model.tflite", original, **file)
    metadata = convert_int8(path, tmp_path / "model.pt")
    model = QuantizedResNet8.from_checkpoint(tmp_path / "model.pt")
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert metadata == json.loads((tmp_path / "model.json").read_text())
    assert metadata["source"]["file"] == "model.tflite"
    assert metadata["input"]["shape"] == [3, *file.get("image", (32, 32))]
    assert metadata["verification"]["different_bytes"] == 0
    assert metadata["verification"]["bytes"] > 20 * 20_000
    outputs = model(torch.from_numpy(sample.images[:50]))
    assert outputs.dtype == torch.int8 and len(outputs.unique()) > 50  # not saturated


@pytest.mark.skipif(not REFERENCE.exists(), reason="no MLPerf Tiny files in ../shared")
def test_the_reference_of_mlperf_tiny(tmp_path):
    metadata = convert_int8(REFERENCE, tmp_path / "reference.pt")
    assert metadata["verification"]["bytes"] == 20 * 114_772


def test_the_command_converts_files_without_keras(tmp_path, monkeypatch, command, plain):
    """In a job; a damaged file is one line, and a file of others is not replaced."""
    monkeypatch.setattr(int8, "Job", Job)
    (tmp_path / "cut.tflite").write_bytes(plain.read_bytes()[:3000])
    (tmp_path / "model.pt").write_text("of others")
    write_int8(tmp_path / "model.tflite", random_int8(seed=1))
    monkeypatch.setitem(KNOWN_FILES, sha256_of(plain), "a known file")
    names = ["plain.tflite", "cut.tflite", "model.tflite"]
    files = [tmp_path / name for name in names]
    status, out, err = command(*files, "-v", "--keras-python", NOT_A_PYTHON)
    assert status == 1 and (tmp_path / "plain.pt").exists() and not (tmp_path / "cut.pt").exists()
    assert "a known file" in out and "layer3.downsample.weight" in out and str(tmp_path / "plain.pt") in out
    assert [line.split(": ")[1] for line in err] == list(map(str, files[1:]))
    assert "damaged" in err[0] and "--force" in err[1]
    assert (tmp_path / "model.pt").read_text() == "of others"


# --- What the verification finds ---------------------------------------------------------------------------


def replaced(name, function):
    """Return a function that replaces one of the module by `function(original, ...)`."""
    original = getattr(resnet8_int8, name)
    return lambda patch: patch.setattr(
        resnet8_int8, name, lambda *arguments, **options: function(original, *arguments, **options)
    )


def padded(value, symmetric=False):
    original = torch.nn.functional.pad

    def pad(x, padding):
        return original(x, [max(padding)] * 4 if symmetric else padding, value=value)

    return lambda patch: patch.setattr(torch.nn.functional, "pad", pad)


def changed(name):
    original = QuantizedResNet8.from_state_dict

    def load(state):
        return original({**state, name: state[name] + 1})

    return lambda patch: patch.setattr(QuantizedResNet8, "from_state_dict", load)


MUTATIONS = {  # -> the first operator that differs
    "rounded once": (
        replaced("rescale", lambda rescale, x, factor, *_, **__: rescale(x, factor, once=True)),
        "conv1",
    ),
    "ties to even": (replaced("shift_right", lambda _, x, bits: (x / 2.0**bits).round().long()), "conv1"),
    "padding of 1": (padded(1.0), "conv1"),
    "symmetric padding": (padded(0.0, symmetric=True), "layer2.conv1"),
    "bias": (changed("layer1.conv1.bias"), "layer1.conv1"),
    "zero point": (changed("layer2.conv2.zero_point"), "layer2.conv2"),
    "weight": (changed("layer3.downsample.weight"), "layer3.downsample"),
    "dense layer rounded twice": (
        lambda patch: patch.setattr(
            QuantizedResNet8,
            "from_state_dict",
            lambda state, load=QuantizedResNet8.from_state_dict: load(state, "tflm"),
        ),
        "fc",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_one_wrong_byte_is_found(tmp_path, monkeypatch, plain, mutation):
    """The first operator that differs is named, and nothing is written."""
    mutate, operator = MUTATIONS[mutation]
    mutate(monkeypatch)
    with pytest.raises(VerificationError, match=rf"^{operator} \("):
        convert_int8(plain, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == [plain]


def option(index, **options):
    """Return a function that changes options of an operator of the file."""

    def edit(file):
        for name, value in options.items():
            setattr(file.graph.operators[index].builtinOptions, name, value)

    return edit


def kind(index, name):
    """Return a function that changes the kind of an operator of the file."""

    def edit(file):
        file.model.operatorCodes[index].builtinCode = getattr(file.schema.BuiltinOperator, name)
        file.model.operatorCodes[index].deprecatedBuiltinCode = file.model.operatorCodes[index].builtinCode

    return edit


REFUSED = {  # a file's change -> words of the message
    "activation": (option(1, fusedActivationFunction=3), ["layer1.conv1", "RELU6", "expected RELU"]),
    "stride": (option(4, strideH=1), ["layer2.conv1", "strideH is 1", "expected 2"]),
    "padding": (option(0, padding=1), ["conv1", "VALID", "expected SAME"]),
    "no ReLU after ADD": (option(3, fusedActivationFunction=0), ["layer1 (ADD)", "NONE", "expected RELU"]),
    "kind": (kind(0, "DEPTHWISE_CONV_2D"), ["conv1", "DEPTHWISE_CONV_2D", "expected one CONV_2D"]),
    "order": (kind(3, "MUL"), ["layer1", "MUL", "expected one ADD"]),
    "another operator": (kind(15, "LOGISTIC"), ["LOGISTIC", "expected"]),
}


@pytest.mark.parametrize("change", REFUSED)
def test_another_network_is_refused(tmp_path, change):
    edit, words = REFUSED[change]
    path = write_int8(tmp_path / "model.tflite", random_int8(), edit=edit)
    with pytest.raises(ValueError) as caught:
        convert_int8(path, tmp_path / "model.pt")
    assert all(word in str(caught.value) for word in words), caught.value
    assert list(tmp_path.iterdir()) == [path]


# --- evaluate.py ------------------------------------------------------------------------------------------


def test_evaluate_scores_it_as_litert_does(tmp_path, monkeypatch, sample, plain):
    """The same probabilities as the file with the reference kernels; the table shows int8 and the kernels."""
    convert_int8(plain, tmp_path / "model.pt")
    with_few_images(monkeypatch, sample)
    options = ("--kernels", "reference", "--no-keras")
    stdout, metrics = evaluated("model.pt", "plain.tflite", *options, cwd=tmp_path)
    (pair,), (compared,) = metrics["pairs"], metrics["compared"]
    assert pair["same_prediction"] == 100 and pair["max_abs_probability_difference"] == 0
    assert (metrics["format"], compared["throughput"]["kernels"]) == ("int8", "reference")
    rows = [line.split() for line in stdout.splitlines() if "int8" in line]
    assert rows[0][0] == "model.pt" and rows[0][-1] == "int8"
    assert rows[1][0] == "plain.tflite" and rows[1][-1] == "reference"


def test_a_damaged_int8_checkpoint_is_refused(tmp_path):
    state = random_int8().state_dict()
    del state["layer1.conv1.weight"]
    torch.save(state, tmp_path / "model.pt")
    assert "layer1.conv1.weight" in refused("model.pt", cwd=tmp_path)


# --- The network -----------------------------------------------------------------------------------------


def test_micro_kernels_differ_in_the_dense_layer_and_softmax(sample):
    """Outputs of TensorFlow Lite Micro, recorded; LiteRT's differ in a few bytes, by 1."""
    state, pixels = random_int8().state_dict(), torch.from_numpy(sample.images[:100])
    litert, micro = (QuantizedResNet8.from_state_dict(state, kernels) for kernels in ("litert", "tflm"))
    outputs = micro(pixels)
    assert hashlib.sha256(outputs.numpy().tobytes()).hexdigest() == TFLM
    different = (outputs.int() - litert(pixels)).abs()
    assert 0 < (different > 0).sum() < 300
    both = [layer_activations(model, pixels) for model in (litert, micro)]
    differ = [name for name in both[0] if not np.array_equal(both[0][name], both[1][name])]
    assert differ == ["fc", "softmax"]


def test_micro_kernels(plain, sample):
    """The same with tflite-micro, where it is installed."""
    runtime = pytest.importorskip("tflite_micro.python.tflite_micro.runtime")
    interpreter, outputs = runtime.Interpreter.from_file(str(plain)), []
    for image in sample.images[:100].transpose(0, 2, 3, 1):
        interpreter.set_input((image ^ 128).view(np.int8)[None], 0)
        interpreter.invoke()
        outputs.append(interpreter.get_output(0)[0].copy())
    assert hashlib.sha256(np.array(outputs).tobytes()).hexdigest() == TFLM


def test_it_needs_torch_alone():
    tree = ast.parse(Path(resnet8_int8.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", None) or node.names[0].name for node in imports} == {"torch"}


def test_batches_dtypes_and_real_values(sample):
    model, pixels = random_int8(), torch.from_numpy(sample.images[:5])
    outputs = model(pixels)
    assert torch.equal(outputs, torch.cat([model(image) for image in pixels.split(1)]))
    assert torch.equal(outputs, model(pixels.float()))
    real = model(pixels, dequantize=True)
    assert torch.equal(real, (outputs.float() + 128) / 256)
    assert (real.sum(1) - 1).abs().max() < 0.05


def test_large_sums_are_exact():
    """Above 2**24 float32 would round: the widest weights, in int64."""
    convolution, source = Convolution(1, 2000, 1, 1), resnet8_int8.Quantize()
    convolution.weight.fill_(127)
    convolution.bias.fill_(-127 * 255 * 2000)
    source.zero_point.fill_(-128)
    x = torch.full((1, 2000, 1, 1), 127, dtype=torch.int8)
    assert convolution(x, source).item() == 0
    x[0, 0] = 126
    assert convolution(x, source).item() == -127


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_another_state_dict_is_refused(change):
    state = random_int8().state_dict()
    if change == "missing":
        del state["layer1.conv1.weight"]
    else:
        state["layer1.conv1.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"layer1\.conv1\.weight"):
        QuantizedResNet8.from_state_dict(state)
