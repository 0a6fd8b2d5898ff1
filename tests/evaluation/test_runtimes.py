"""models/evaluation/runtimes.py: other formats: inputs, quantization, damage, code."""

import hashlib
import io
import json
import os
import shutil
import sys
import threading
import zipfile
from contextlib import suppress
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from data.cifar10 import load_test
from models.common.files import detect_format
from models.common.job import Job
from models.evaluation import inference, runtimes
from models.evaluation.metrics import log_softmax
from models.evaluation.runtimes import measure_file
from models.normalization import Normalization
from tests.evaluating import NOT_A_PYTHON, SHARED, evaluated, random_model, refused, save, scaling
from tests.runtime_files import (
    CALIBRATED_STEP,
    LOGIT_STEP,
    PROBABILITY_STEP,
    Linear,
    logits_of,
    write_exported,
    write_onnx,
    write_tflite,
)

PIXELS = Normalization.from_args(3)


@pytest.fixture(scope="module")
def dataset(sample):
    """150 images: the last batch is short."""
    return replace(sample, images=sample.images[:150], labels=sample.labels[:150])


@pytest.fixture
def in_process(monkeypatch):
    """Run the task of a job in this process, which saves the start of a process and of its libraries."""

    class InProcess:
        def __init__(self, module):
            assert module == "models.evaluation.runtimes"

        def run(self, request, arrays, _):
            return runtimes.run_task(json.loads(json.dumps(request)), arrays)

    monkeypatch.setattr(runtimes, "Job", InProcess)
    monkeypatch.setattr(runtimes, "limit_resources", lambda *_: None)


# --- Numbers ---------------------------------------------------------------------------------------------

ROUNDED = LOGIT_STEP / 2 + 1e-3  # how far a quantized logit may be; in float32: 1e-3
CASES = {  # function that writes the file, its options, its format, largest difference of a logit
    "TFLite": (write_tflite, {}, "TensorFlow Lite", 1e-3),
    "TFLite, one image": (write_tflite, {"batch": 1}, "TensorFlow Lite", 1e-3),
    "TFLite, 7 images, int8": (write_tflite, {"batch": 7, "dtype": "int8"}, "TensorFlow Lite, int8", ROUNDED),
    "TFLite, uint8": (write_tflite, {"dtype": "uint8"}, "TensorFlow Lite, int8", ROUNDED),
    "TFLite, softmax": (write_tflite, {"softmax": True}, "TensorFlow Lite", 1e-3),
    "ONNX": (write_onnx, {}, "ONNX", 1e-3),
    "ONNX, channels last": (write_onnx, {"layout": "NHWC", "batch": 1}, "ONNX", 1e-3),
    "ONNX, pixels": (write_onnx, {"dtype": "uint8", "layout": "NHWC"}, "ONNX", 1e-3),
    "ONNX, int8": (write_onnx, {"dtype": "int8", "quantized": True}, "ONNX, int8", ROUNDED),
    "ONNX, uint8": (write_onnx, {"dtype": "uint8", "quantized": True}, "ONNX, int8", ROUNDED),
    "ONNX, int8 inside": (write_onnx, {"quantized": True}, "ONNX, int8", ROUNDED),
    "ONNX, float16": (write_onnx, {"dtype": "float16"}, "ONNX", 0.5),
    "ONNX, softmax": (write_onnx, {"softmax": True}, "ONNX", 1e-3),
    "pt2": (write_exported, {}, "torch.export", 1e-3),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_numpy(tmp_path, dataset, in_process, case):
    """For every layout, dtype, quantization and batch size; probabilities are told from logits."""
    write, options, description, bound = CASES[case]
    path = write(tmp_path / "network", **options)
    if write is write_onnx:
        path = path.rename(tmp_path / "network.onnx")
    predictions = measure_file(path, dataset, PIXELS, "it", allow_code=True)
    logits = logits_of(dataset.images)
    assert np.abs(logits).max() > 4  # else every bound would hold
    assert np.abs(predictions.log_probabilities - log_softmax(logits)).max() <= 2 * bound
    assert predictions.format == description
    assert predictions.throughput["batch_size"] == (options.get("batch") or 64)


QUANTIZED = {  # function that writes a file with quantized probabilities, its options
    "TFLite": (write_tflite, {"dtype": "int8"}),
    "TFLite, float outputs": (write_tflite, {"dtype": "int8", "float_outputs": True}),
    "ONNX": (write_onnx, {"dtype": "int8", "quantized": True}),
    "ONNX, float outputs": (write_onnx, {"quantized": True}),
    "pt2": (write_exported, {"quantized": True, "float_outputs": False}),
    "pt2, float outputs": (write_exported, {"quantized": True}),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_probabilities_have_the_step_of_the_file(tmp_path, dataset, in_process, case):
    """Also of few images. A probability of 0 counts as half a step in the loss alone."""
    write, options = QUANTIZED[case]
    path = write(tmp_path / "network.onnx", softmax=True, **options)
    step = PROBABILITY_STEP if write is write_tflite else CALIBRATED_STEP
    for count in (3, 150):
        few = replace(dataset, images=dataset.images[:count], labels=dataset.labels[:count])
        predictions = measure_file(path, few, PIXELS, "it", True)
        expected = np.exp(log_softmax(logits_of(few.images)))
        # a logit is rounded to LOGIT_STEP before the softmax: a probability changes by as much, relatively
        assert np.abs(predictions.probabilities - expected).max() <= LOGIT_STEP / 2 + step
        assert predictions.probabilities.min() == 0
        assert np.exp(predictions.log_probabilities.min()) == pytest.approx(step / 2)
        assert (predictions.outputs, predictions.step) == ("probabilities", pytest.approx(step))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integer_inputs_take_the_bytes_if_the_normalization_is_assumed(tmp_path, dataset, in_process, dtype):
    """Whatever their scale. A known normalization is quantized; if that clips all pixels, a note names it."""
    path = write_tflite(tmp_path / "network.tflite", dtype=dtype, scale=1 / 255)
    assumed = measure_file(path, dataset, Normalization.from_args(3, 5.0), "it", False, is_assumed=True)
    known = measure_file(path, dataset, Normalization.from_args(3, std=255.0), "it", False)
    assert assumed.normalization == PIXELS and not assumed.notes and not known.notes
    for predictions in (assumed, known):
        difference = predictions.log_probabilities - log_softmax(logits_of(dataset.images))
        assert np.abs(difference).max() <= 2 * ROUNDED
    (note,) = measure_file(path, dataset, PIXELS, "it", False).notes
    assert note.startswith("it: ") and "--std" in note


def cast_input(graph):
    graph.node.insert(0, onnx.helper.make_node("Cast", ["pixels"], ["cast"], to=onnx.TensorProto.INT8))
    graph.node[1].input[0] = "cast"


def second_reader(graph):
    graph.node.append(onnx.helper.make_node("DequantizeLinear", ["pixels", "step", "output_zero"], ["other"]))


def cast_output(graph, dtype="int8"):
    output = graph.output[0]
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph.node.append(onnx.helper.make_node("Cast", [output.name], ["last"], to=dtype))
    output.name, output.type.tensor_type.elem_type = "last", dtype


def cast_output_to_float(graph):
    cast_output(graph, "float32")


@pytest.mark.parametrize("change", [cast_input, second_reader, cast_output, cast_output_to_float])
def test_a_scale_that_is_not_certain_is_not_used(tmp_path, dataset, in_process, change):
    """Inputs take the bytes; outputs are refused."""
    path = write_onnx(tmp_path / "d.onnx", dtype="int8", quantized=True)
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    if "output" in change.__name__:
        with pytest.raises(ValueError, match=r"d\.onnx: .*DequantizeLinear"):
            measure_file(path, dataset, PIXELS, "it", False)
    else:
        predictions = measure_file(path, dataset, PIXELS, "it", False)
        expected = log_softmax(logits_of(dataset.images))
        assert np.abs(predictions.log_probabilities - expected).max() <= 2 * ROUNDED


def test_an_exported_resnet8_is_normalized_per_batch(tmp_path, dataset, in_process):
    model, normalization = random_model(width=4), Normalization([120.0, 110.0, 100.0], [64.0] * 3)
    write_exported(tmp_path / "model.pt2", model)
    predictions = measure_file(tmp_path / "model.pt2", dataset, normalization, "it", True)
    expected = inference.measure(model, dataset, normalization, "model", 64, 1, None)
    np.testing.assert_allclose(predictions.log_probabilities, expected.log_probabilities, atol=1e-4)


@pytest.mark.skipif(not (SHARED / "mlperf_tiny").is_dir(), reason="no MLPerf Tiny files in ../shared")
@pytest.mark.parametrize(("kernels", "right"), [("xnnpack", 174), ("reference", 175)])
def test_the_mlperf_tiny_int8_file_has_its_known_accuracy(in_process, kernels, right):
    """Of the benchmark's 200 images; on TensorFlow Lite Micro 175."""
    path = SHARED / "mlperf_tiny/pretrainedResnet_quant.tflite"
    predictions = measure_file(path, load_test(SHARED, "perf"), PIXELS, "it", False, kernels=kernels)
    assert (predictions.classes == predictions.labels).sum() == right
    assert predictions.throughput["kernels"] == kernels


# --- The command line ------------------------------------------------------------------------------------


def test_files_of_every_format_in_one_call(tmp_path):
    """In jobs, with relative paths; formats are detected from the content, bounds hold for all."""
    save(random_model(), tmp_path / "a.pt", input=scaling(0.0, 1.0))
    write_tflite(tmp_path / "c", dtype="int8")
    write_onnx(tmp_path / "d.onnx", softmax=True)
    write_exported(tmp_path / "e.pt2", quantized=True)
    files = ("a.pt", "c", "d.onnx", "--compare", "e.pt2")
    options = ("--no-keras", "--allow-code", "--min-accuracy", "1")
    _, metrics = evaluated(*files, *options, cwd=tmp_path, status=3)
    others = [("c", "TensorFlow Lite, int8"), ("d.onnx", "ONNX"), ("e.pt2", "torch.export")]
    assert metrics["checkpoint"] == "a.pt"
    assert [(each["checkpoint"], each["format"]) for each in metrics["compared"]] == others
    assert [guard["checkpoint"] for guard in metrics["guards"]] == ["a.pt", "c", "d.onnx", "e.pt2"]
    pairs = {tuple(pair["models"]): pair for pair in metrics["pairs"]}
    assert pairs["d.onnx", "e.pt2"]["max_abs_probability_difference"] < 1e-4
    assert pairs["c", "d.onnx"]["max_abs_probability_difference"] < LOGIT_STEP
    assert any("d.onnx" in note and "a.pt" in note for note in metrics["notes"])  # its normalization
    read = [metrics["outputs"], *(each["outputs"] for each in metrics["compared"])]
    assert read == ["logits", "logits", "probabilities", "logits"]


def test_the_first_file_may_be_of_another_format(tmp_path, in_process):
    """Its normalization is from --mean and --std, else from its JSON; it has no Keras baseline of its own."""
    write_onnx(tmp_path / "d.onnx")
    (tmp_path / "d.onnx.json").write_text(json.dumps({"input": scaling(0.0, 2.0)}))
    _, metrics = evaluated("d.onnx", cwd=tmp_path)
    assert metrics["throughput"]["dtype"] == "float32" and metrics["keras"] is None
    assert metrics["input"]["std"] == [2.0] * 3 and metrics["sparsity"] is None
    _, other = evaluated("d.onnx", "--no-keras", "--std", 255, cwd=tmp_path)
    assert other["input"]["std"] == [255.0] * 3
    assert other["pytorch"]["loss"] != pytest.approx(metrics["pytorch"]["loss"])


# --- safetensors -----------------------------------------------------------------------------------------


def test_safetensors_have_their_normalization_and_sparsity(tmp_path):
    """The normalization in their metadata has precedence over the JSON's."""
    model, metadata = random_model(width=4), {"input": json.dumps(scaling(120.0, 64.0))}
    with torch.no_grad():
        model.layer3.conv2.weight.zero_()
    save(model, tmp_path / "a.pt", input=scaling(120.0, 64.0))
    save_file(model.state_dict(), tmp_path / "b.safetensors", metadata)
    save_file(model.state_dict(), tmp_path / "c.safetensors")
    (tmp_path / "b.safetensors.json").write_text(json.dumps({"input": scaling(0.0, 1.0), "sha256": "0" * 64}))
    _, metrics = evaluated("a.pt", "b.safetensors", "c.safetensors", "--no-keras", cwd=tmp_path)
    assert [pair["max_abs_probability_difference"] for pair in metrics["pairs"]] == [0, 0, 0]
    fraction = 9 * 16 * 16 / sum(p.numel() for p in model.parameters() if p.ndim > 1)
    for each in metrics["compared"]:
        assert each["input"] == metrics["input"] and each["format"] == "safetensors"
        assert each["sparsity"] == metrics["sparsity"] == pytest.approx(fraction)
    assert not any("modified" in note for note in metrics["notes"])


METADATA = ["{", "[" * 100_000, "3", '{"mean": [0, 0, 0], "std": [1, 0, 1]}', '{"mean": [0], "std": [1]}']


@pytest.mark.parametrize("metadata", [*METADATA, "cut"])
def test_damaged_safetensors_are_refused(tmp_path, metadata):
    path = tmp_path / "b.safetensors"
    save_file(random_model(width=2).state_dict(), path, None if metadata == "cut" else {"input": metadata})
    if metadata == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    assert "b.safetensors" in refused(path.name, "--no-keras", cwd=tmp_path)


# --- Refused files ---------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def constant(path):
    """Write a network whose output does not depend on the batch size."""

    class Constant(torch.nn.Module):
        def forward(self, images):
            return images[:1].flatten(1)[:, :10]

    write_exported(path, Constant())


class Centered(Linear):
    """A network whose outputs depend on the mean of its batch."""

    def forward(self, images):
        return super().forward(images - images.mean(0))


TRAINING = torch.nn.Sequential(torch.nn.BatchNorm2d(3), Linear()).train()
REFUSED = {  # file -> function that writes it, and words of the message
    "cut.onnx": (lambda path: cut(write_onnx(path)), ""),
    "classes.tflite": (lambda path: write_tflite(path, classes=7), "7"),
    "classes.onnx": (lambda path: write_onnx(path, classes=7), "7"),
    "constant.pt2": (constant, "shape"),
    "shape.tflite": (lambda path: write_tflite(path, image=(16, 16, 3)), "[16, 16, 3]"),
    "shape.pt2": (lambda path: write_exported(path, torch.nn.Flatten(), image=(1, 28, 28)), "[1, 28, 28]"),
    "two.tflite": (lambda path: write_tflite(path, inputs=2), "2 inputs"),
    "custom.onnx": (lambda path: write_onnx(path, domain="evil"), "export it"),
    "batch.pt2": (lambda path: write_exported(path, Centered()), "batch"),
    "one batch.pt2": (lambda path: write_exported(path, Centered(), batch=7), "batch"),
    "train.pt2": (lambda path: write_exported(path, TRAINING), "batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_run_is_refused_in_one_line(tmp_path, dataset, in_process, name):
    write, words = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(ValueError) as caught:
        measure_file(tmp_path / name, dataset, PIXELS, name, True)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / name}: ") and words in line and len(line.splitlines()) == 1


def test_a_damaged_file_is_refused_before_keras_runs(tmp_path):
    """In a job: LiteRT crashes on such a file."""
    cut(write_tflite(tmp_path / "cut.tflite"))
    save(random_model(width=2), tmp_path / "a.pt", input=scaling(120.0, 64.0))
    assert "cut.tflite" in refused("a.pt", "cut.tflite", "--keras-python", NOT_A_PYTHON, cwd=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_an_exported_network_runs_code_only_if_allowed(tmp_path, dataset, in_process):
    path, mark, bomb = write_exported(tmp_path / "model.pt2"), tmp_path / "mark", io.BytesIO()

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    torch.save({"x": Bomb()}, bomb)
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in records.items():
            target.writestr(name, bomb.getvalue() if "data/sample_inputs" in name else content)
    with pytest.raises(ValueError, match="--allow-code"):
        measure_file(path, dataset, PIXELS, "it", allow_code=False)
    assert not mark.exists()
    with suppress(ValueError):  # pytest fails on torch's own log message
        measure_file(path, dataset, PIXELS, "it", allow_code=True)
    assert mark.exists()  # so the option is needed


def test_an_external_weight_counts_and_is_not_read_from_another_folder(tmp_path, dataset, in_process):
    (tmp_path / "sub").mkdir()
    path = write_onnx(tmp_path / "sub/d.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="d.data", size_threshold=0)
    # beside it, as torch.onnx.export writes it
    _, metrics = evaluated("sub/d.onnx", "--no-keras", cwd=tmp_path)
    content = path.read_bytes() + (tmp_path / "sub/d.data").read_bytes()
    assert metrics["checkpoint_sha256"] == hashlib.sha256(content).hexdigest()
    assert metrics["file_bytes"] == len(content) > 4 * 3072 * 10
    shutil.move(tmp_path / "sub/d.data", tmp_path / "d.d")
    path.write_bytes(path.read_bytes().replace(b"d.data", b"../d.d"))
    with pytest.raises(ValueError, match=r"d\.onnx: .*External data path"):
        measure_file(path, dataset, PIXELS, "it", False)


@pytest.mark.parametrize("library", ["onnxruntime", "onnx", "ai_edge_litert"])
def test_a_missing_library_is_named_with_its_pip_command(tmp_path, dataset, in_process, monkeypatch, library):
    path = tmp_path / "network.onnx"
    if library == "ai_edge_litert":
        write_tflite(path)
    else:
        write_onnx(path, dtype="int8", quantized=True)
    monkeypatch.setitem(sys.modules, library, None)  # as Python marks a module that it could not find
    with pytest.raises(ValueError, match=f"{detect_format(path).value}.*pip install .*{library[:4]}"):
        measure_file(path, dataset, PIXELS, "it", False)


def test_a_library_that_crashes_or_hangs_costs_its_file_only(tmp_path, dataset, monkeypatch):
    path = write_onnx(tmp_path / "d.onnx")

    class Killed(Job):
        def run(self, *arguments):
            threading.Timer(0.1, self.process.kill).start()
            return super().run(*arguments)

    for name, value, words in (("SECONDS", 0.01, r"0\.01 s"), ("Job", Killed, "status -9")):
        with monkeypatch.context() as patch:
            patch.setattr(runtimes, name, value)
            with pytest.raises(ValueError, match=rf"d\.onnx: damaged.*{words}"):
                measure_file(path, dataset, PIXELS, "it", False)
