"""models/evaluation/runtimes.py: networks of other formats are fed, run and read as their files say."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data.cifar10 import calibration_indices
from models.common.kinds import kind_of
from models.common.terminal import Notes
from models.evaluation import inference, runner
from models.evaluation.loading import load_checkpoint
from models.evaluation.metrics import Predictions
from models.evaluation.runtimes import Runtime, calibration_note, log_probabilities, read_runtime
from models.keras.worker import Worker
from models.resnet8 import ResNet8
from models.scaling import Scaling
from tests.evaluating import (
    NOT_A_PYTHON,
    ROOT,
    SHARED,
    evaluated,
    has_line,
    needs_real_model,
    random_model,
    refused,
    save,
    scaling,
)
from tests.runtime_files import (
    IMAGE,
    LOGIT_STEP,
    PROBABILITY_STEP,
    edit_exported,
    edit_graph,
    logits_of,
    write_exported,
    write_onnx,
    write_tflite,
)


@pytest.fixture(scope="module")
def worker():
    with Worker("models.evaluation.runner") as process:
        yield process


# --- What a network makes of images ------------------------------------------------------------------------

CASES = {  # (what writes it, its format, how far a logit may be: half a step and rounding)
    "TFLite": (write_tflite, {}, "TensorFlow Lite", 1e-3),
    "TFLite, one image": (write_tflite, {"batch": 1}, "TensorFlow Lite", 1e-3),
    "TFLite, 7 images, int8": (write_tflite, {"batch": 7, "dtype": "int8"}, None, LOGIT_STEP / 2 + 1e-3),
    "TFLite, uint8": (write_tflite, {"dtype": "uint8"}, None, LOGIT_STEP / 2 + 1e-3),
    "TFLite, softmax": (write_tflite, {"softmax": True}, "TensorFlow Lite", 1e-3),
    "ONNX": (write_onnx, {}, "ONNX", 1e-3),
    "ONNX, channels last": (write_onnx, {"layout": "NHWC", "batch": 1}, "ONNX", 1e-3),
    "ONNX, 7 images": (write_onnx, {"batch": 7}, "ONNX", 1e-3),
    "ONNX, pixels": (write_onnx, {"dtype": "uint8", "layout": "NHWC"}, "ONNX", 1e-3),
    "ONNX, int8": (write_onnx, {"dtype": "int8", "quantized": True}, "ONNX, int8", LOGIT_STEP / 2 + 1e-3),
    "ONNX, uint8": (write_onnx, {"dtype": "uint8", "quantized": True}, "ONNX, int8", LOGIT_STEP / 2 + 1e-3),
    "ONNX, float16": (write_onnx, {"dtype": "float16"}, "ONNX", 0.5),
    "ONNX, softmax": (write_onnx, {"softmax": True}, "ONNX", 1e-3),
    "pt2": (write_exported, {}, "torch.export", 1e-3),
    "pt2, 7 images": (write_exported, {"batch": 7}, "torch.export", 1e-3),
    "pt2, softmax": (write_exported, {"softmax": True, "decompose": True}, "torch.export", 1e-3),
}


def measured(path, dataset, worker):
    """What `evaluate.py` makes of a file: its Predictions, and the format that the file is said to be of."""
    found = read_runtime(path, IMAGE, worker)
    finish = found.model.log_probabilities
    return inference.measure(
        found.model, dataset, found.scaling, "it", 64, 1, path, finish
    ), found.model.format


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_numpy_computes(tmp_path, sample, worker, case):
    """Whatever its layout, dtype, quantization and batch; probabilities are told from logits."""
    write, options, form, most = CASES[case]
    found, said = measured(write(tmp_path / "network", **options), sample, worker)
    if form:
        assert said == form
    logits = logits_of(sample.images)
    assert np.abs(logits).max() > 4  # else every bound would hold
    right = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    difference = np.abs(found.log_probabilities - right)
    assert difference.max() <= 2 * most
    assert found.log_probabilities.shape == (1000, 10)


def test_quantized_probabilities_are_read_and_have_a_floor(tmp_path, sample, worker):
    path = write_tflite(tmp_path / "network", dtype="int8", softmax=True)
    found, _ = measured(path, sample, worker)
    logits = logits_of(sample.images)
    right = np.exp(logits - logits.max(1, keepdims=True))
    right /= right.sum(1, keepdims=True)
    # a logit is rounded to LOGIT_STEP before its softmax: a probability moves by at most that part of itself
    assert np.abs(found.probabilities - right).max() <= LOGIT_STEP / 2 + PROBABILITY_STEP
    smallest = found.probabilities.min()
    assert smallest == pytest.approx(PROBABILITY_STEP / 2) and (right < PROBABILITY_STEP / 2).any()


def test_what_are_probabilities():
    """They lie in 0..1 and sum to 1 but for their rounding; logits do not."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(100, 10)) * 5
    right = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(log_probabilities(logits), right, atol=1e-12)
    np.testing.assert_allclose(log_probabilities(np.exp(right)), right, atol=1e-12)
    np.testing.assert_allclose(log_probabilities(right), right, atol=1e-12)  # of a log-softmax
    sigmoid = 1 / (1 + np.exp(-logits))  # in 0..1, and no probabilities of ten classes
    expected = sigmoid - np.log(np.exp(sigmoid).sum(1, keepdims=True))
    np.testing.assert_allclose(log_probabilities(sigmoid), expected, atol=1e-12)
    rounded = np.rint(np.exp(right) * 256) / 256
    assert np.abs(rounded.sum(1) - 1).max() > 0 and (rounded == 0).any()
    found = log_probabilities(rounded, 1 / 256)
    np.testing.assert_array_equal(np.exp(found[rounded == 0]).round(12), np.round(1 / 512, 12))
    np.testing.assert_allclose(np.exp(found[rounded > 0]), rounded[rounded > 0])
    hard = np.eye(10)
    assert np.isfinite(log_probabilities(hard)).all()
    assert log_probabilities(hard)[0, 1] == pytest.approx(np.log(np.finfo(np.float32).tiny))


@pytest.mark.parametrize("decompose", [False, True])
def test_an_exported_resnet8_computes_what_it_did(tmp_path, sample, worker, decompose):
    """All of its operators, in both forms that torch.export has, and with what is fed as the JSON says."""
    model = random_model()
    write_exported(tmp_path / "model.pt2", model, decompose=decompose)
    (tmp_path / "model.json").write_text(json.dumps({"input": scaling(120.0, 64.0)}))
    found, _ = measured(tmp_path / "model.pt2", sample, worker)
    right = inference.measure(model, sample, Scaling([120.0] * 3, [64.0] * 3), "right", 64, 1, None)
    assert found.scaling == right.scaling
    np.testing.assert_allclose(found.log_probabilities, right.log_probabilities, atol=1e-4)


def test_a_quantized_pt2_runs(tmp_path, sample, worker):
    """As the int8 recipe makes it: its operators are torchao's."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model = random_model(width=4)
    batch = ({0: torch.export.Dim("batch")},)
    example = (torch.zeros(2, *IMAGE),)
    images = torch.from_numpy(sample.images[:64]).float()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    exported = torch.export.export(model, example, dynamic_shapes=batch, strict=True)
    prepared = prepare_pt2e(exported.module(), quantizer)
    prepared(images)
    converted = convert_pt2e(prepared)
    torch.export.save(torch.export.export(converted, example, dynamic_shapes=batch), tmp_path / "int8.pt2")
    network = Runtime(tmp_path / "int8.pt2", kind_of(tmp_path / "int8.pt2"), IMAGE, worker)
    with torch.inference_mode():
        np.testing.assert_allclose(network(images), converted(images).numpy(), atol=1e-4)


# --- The command line --------------------------------------------------------------------------------------


def test_files_of_every_format_in_one_call(tmp_path):
    """The first is CHECKPOINT; formats are told from the content; bounds hold for all."""
    save(random_model(), tmp_path / "a.pt", input=scaling(0.0, 1.0))
    write_tflite(tmp_path / "c", dtype="int8")  # no suffix: the content tells
    write_onnx(tmp_path / "d.onnx", softmax=True)
    write_exported(tmp_path / "e.pt2")
    stdout, metrics = evaluated("a.pt", "c", "d.onnx", "e.pt2", "--no-keras", cwd=tmp_path)
    assert [each["checkpoint"] for each in metrics["compared"]] == ["c", "d.onnx", "e.pt2"]
    assert metrics["checkpoint"] == "a.pt"
    pairs = {tuple(pair["models"]): pair for pair in metrics["pairs"]}
    assert pairs["d.onnx", "e.pt2"]["max_abs_probability_difference"] < 1e-4
    assert pairs["c", "d.onnx"]["max_abs_probability_difference"] < LOGIT_STEP
    assert has_line(stdout, "d.json", "d.onnx", "a.pt")
    for line in ("c: c, TensorFlow Lite", "d.onnx: d.onnx, ONNX", "e.pt2: e.pt2, torch.export"):
        assert f"{line}" in stdout
    files = ("a.pt", "c", "--compare", "d.onnx", "--no-keras", "--min-accuracy", "1")
    _, metrics = evaluated(*files, cwd=tmp_path, status=3)
    assert [guard["checkpoint"] for guard in metrics["guards"]] == ["a.pt", "c", "d.onnx"]


def test_checkpoint_may_be_of_another_format(tmp_path):
    """It is fed as --mean and --std or the JSON of its name say, and has no Keras baseline of its own."""
    write_onnx(tmp_path / "d.onnx")
    (tmp_path / "d.json").write_text(json.dumps({"input": scaling(0.0, 1.0), "sha256": "0" * 64}))
    stdout, right = evaluated("d.onnx", cwd=tmp_path)
    (line,) = [line for line in stdout.splitlines() if "d.json" in line]
    assert "--keras" in line  # and not that it has changed: the JSON's SHA-256 is that of a `.pt` of its name
    assert right["throughput"]["dtype"] == "float32" and right["keras"] is None
    _, other = evaluated("d.onnx", "--no-keras", "--std", 255, cwd=tmp_path)
    assert other["input"]["std"] == [255.0] * 3
    assert other["pytorch"]["loss"] != pytest.approx(right["pytorch"]["loss"])


@needs_real_model
def test_an_exported_checkpoint_has_its_keras_baseline(real):
    """Its JSON is that of the `.pt` of its name."""
    write_exported(real / "model.pt2", ResNet8.from_checkpoint(real / "model.pt"))
    stdout, metrics = evaluated("model.pt2", cwd=real)
    assert metrics["agreement"]["same_prediction"] == 1000
    assert ".npz" not in stdout  # Keras is not asked: the answers are kept


def test_sparsity_is_that_of_the_weights(tmp_path, monkeypatch):
    import evaluate

    model = random_model()
    with torch.no_grad():
        model.layer3.conv2.weight.zero_()
    save(model, tmp_path / "a.pt", input=scaling(0.0, 1.0))
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    write_onnx(tmp_path / "d.onnx")
    seen = []
    monkeypatch.setattr(
        evaluate, "write_results", lambda evaluation, *_: seen.extend(evaluation.all_predictions) or []
    )
    with pytest.raises(FileNotFoundError):  # of the results, which are not written here
        evaluated("a.pt", "b.safetensors", "d.onnx", "--no-keras", cwd=tmp_path)
    part = 36_864 / (78_666 - 480 - sum(p.numel() for p in model.parameters() if p.ndim == 1))
    assert [each.sparsity for each in seen] == [pytest.approx(part), pytest.approx(part), None]
    assert [each.format for each in seen] == ["", "safetensors", "ONNX"]


@pytest.mark.skipif(not (SHARED / "mlperf_tiny").is_dir(), reason="no MLPerf Tiny files in ../shared")
def test_the_mlperf_tiny_int8_file_scores_what_is_known_of_it(tmp_path):
    """8,697 of the 10,000 test images, as LiteRT with XNNPACK scores it, and 174 of its runner's 200."""
    quantized = SHARED / "mlperf_tiny/pretrainedResnet_quant.tflite"
    for part, correct in (("full", 8697), ("perf", 174)):
        options = ["--data-dir", SHARED, "--data", part, "--no-keras", "--output", tmp_path / part]
        command = [sys.executable, ROOT / "evaluate.py", quantized, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / part / "metrics.json").read_text())
        assert metrics["pytorch"]["correct"] == correct
        told = ("pretrainedResnet_quant.tflite", "86.92", "8,257", "9,500", "500")
        assert any(has_line(note, *told) for note in metrics["notes"]) == (part == "full")


def test_an_int8_files_accuracy_is_given_without_the_calibration_images(sample):
    """Here all of these are right, and none of the others."""
    labels, size = np.zeros(10_000, np.int64), (10_000, 10)
    scores = np.zeros(size)
    scores[:, 1] = 1
    scores[calibration_indices(), 0] = 2

    class Full:
        part = ""

    Full.labels = labels
    predictions = Predictions(
        "x.tflite", None, scores, labels, Scaling.given(3), format="TensorFlow Lite, int8"
    )
    assert has_line(calibration_note(predictions, Full), "x.tflite", "0.00", "0", "9,500", "500")
    plain = Predictions("x.tflite", None, scores, labels, Scaling.given(3), format="TensorFlow Lite")
    assert calibration_note(plain, Full) == ""
    assert calibration_note(predictions, sample) == ""


# --- safetensors -------------------------------------------------------------------------------------------


def test_safetensors_are_read_with_their_scaling(tmp_path):
    """What its metadata says of it goes before a JSON of its name."""
    model = random_model()
    save(model, tmp_path / "a.pt", input=scaling(120.0, 64.0))
    save_file(model.state_dict(), tmp_path / "b.safetensors", {"input": json.dumps(scaling(120.0, 64.0))})
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    (tmp_path / "b.json").write_text(json.dumps({"input": scaling(0.0, 1.0), "sha256": "0" * 64}))
    stdout, metrics = evaluated("a.pt", "b.safetensors", "a.safetensors", "--no-keras", cwd=tmp_path)
    assert [pair["max_abs_probability_difference"] for pair in metrics["pairs"]] == [0, 0, 0]
    assert all(each["input"] == metrics["input"] for each in metrics["compared"])
    assert "a.json" not in stdout and "b.json" not in stdout


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{", "input"),
        ("[" * 100_000, "input"),
        ("3", "input 3"),
        ('{"mean": [0, 0, 0], "std": [1, 0, 1]}', "input.std"),
        ('{"mean": [0], "std": [1]}', "input.mean 1 3"),
    ],
)
def test_a_scaling_that_is_none_is_refused(tmp_path, said, words):
    save_file(random_model().state_dict(), tmp_path / "b.safetensors", {"input": said})
    line = refused("b.safetensors", "--no-keras", cwd=tmp_path)
    assert has_line(line, "b.safetensors", *words.split())


def test_a_safetensors_file_of_another_network_or_damaged_is_refused(tmp_path):
    save_file(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    assert "a.safetensors" in refused("a.safetensors", cwd=tmp_path)
    save_file(random_model().state_dict(), tmp_path / "b.safetensors")
    content = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(content[:-4])
    assert "b.safetensors" in refused("b.safetensors", cwd=tmp_path)


# --- What is refused ---------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def calling(target, **arguments):
    """Have the first node of an exported network call something else."""

    def edit(path):
        write_exported(path)
        inputs = [{"name": name, "arg": {"as_string": value}, "kind": 1} for name, value in arguments.items()]

        def change(model):
            model["graph_module"]["graph"]["nodes"][0] |= {"target": target, "inputs": inputs}

        edit_graph(path, change)

    return edit


def pickled(path):
    """Have a weight be a pickle, which torch.export.load would run."""
    mark = path.parent / "MARK"
    buffer = io.BytesIO()
    torch.save(Bomb(mark), buffer)

    def change(name, content):
        if name.endswith("weights_config.json"):
            config = json.loads(content)
            for payload in config["config"].values():
                payload["use_pickle"] = True
            return json.dumps(config).encode()
        return buffer.getvalue() if name == "data/weights/weight_0" else content

    edit_exported(write_exported(path), change)


class Bomb:
    """What leaves a mark on disk when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def older(path):
    """As PyTorch 2.6 names the record of an exported network."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("serialized_exported_program.json", "{}")


def compressed(path):
    write_exported(path)
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in records.items():
            target.writestr(name, content)


REFUSED = {  # a file -> what writes it, and what the line names
    "cut.tflite": (lambda path: cut(write_tflite(path)),),
    "cut.onnx": (lambda path: cut(write_onnx(path)),),
    "cut.pt2": (lambda path: cut(write_exported(path)),),
    "classes.tflite": (lambda path: write_tflite(path, classes=7), "7", "10"),
    "classes.onnx": (lambda path: write_onnx(path, classes=7), "7", "10"),
    "classes.pt2": (lambda path: write_exported(path, classes=7), "7", "10"),
    "shape.tflite": (
        lambda path: write_tflite(path, image=(16, 16, 3)),
        "[16, 16, 3]",
        "[3, 32, 32]",
    ),
    "shape.pt2": (
        lambda path: write_exported(path, torch.nn.Flatten(), image=(1, 28, 28)),
        "[1, 28, 28]",
        "[3, 32, 32]",
    ),
    "two.tflite": (lambda path: write_tflite(path, inputs=2), "2"),
    "custom.onnx": (lambda path: write_onnx(path, domain="evil"), "evil"),
    "system.pt2": (calling("torch.os.system", command="touch MARK"), "torch.os.system"),
    "file.pt2": (
        calling("torch.ops.aten.from_file.default", filename="MARK"),
        "torch.ops.aten.from_file.default",
    ),
    "older.pt2": (older, "0", "2.9"),
    "packed.pt2": (compressed,),
    "pickle.pt2": (pickled, "weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_gets_one_line(tmp_path, sample, worker, name):
    write, *words = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(tmp_path / name, sample, Notes(), runner=worker)
    line = str(caught.value)
    assert str(tmp_path / name) in line and len(line.splitlines()) == 1, line
    assert has_line(line.replace(str(tmp_path / name), ""), *words), line
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("name", ["cut.tflite", "classes.onnx"])
def test_it_is_refused_before_keras_is_asked(tmp_path, name):
    """Whichever place it has on the command line."""
    REFUSED[name][0](tmp_path / name)
    save(random_model(), tmp_path / "a.pt", input=scaling(120.0, 64.0))
    for files in ((name,), ("a.pt", name)):
        assert name in refused(*files, "--keras-python", NOT_A_PYTHON, cwd=tmp_path)


BOMBS = {  # what torch.export.load runs (torch 2.14.1), and is not read here
    "sample inputs": lambda mark: (
        lambda name, content: saved(Bomb(mark)) if name.startswith("data/sample_inputs") else content
    ),
    "a size": lambda mark: (
        lambda name, content: (
            content.replace(
                b'"expr_str": "s77"', f"\"expr_str\": \"__import__('os').system('touch {mark}')\"".encode()
            )
            if name == "models/model.json"
            else content
        )
    ),
}


def saved(content):
    buffer = io.BytesIO()
    torch.save({"x": content}, buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BOMBS)
def test_code_in_an_exported_network_is_never_run(tmp_path, worker, name):
    path, mark = write_exported(tmp_path / "model.pt2"), tmp_path / "MARK"
    before = path.read_bytes()
    edit_exported(path, BOMBS[name](mark))
    assert path.read_bytes() != before
    read_runtime(path, IMAGE, worker)
    assert not mark.exists()


def test_an_external_weight_of_another_folder_is_not_read(tmp_path, worker):
    import onnx

    (tmp_path / "sub").mkdir()
    path = write_onnx(tmp_path / "sub/d.onnx")
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="d.data", size_threshold=0)
    read_runtime(path, IMAGE, worker)  # beside it, as torch.onnx.export writes it
    shutil.move(tmp_path / "sub/d.data", tmp_path / "d.data")
    path.write_bytes(path.read_bytes().replace(b"d.data", b"../d.d"))
    shutil.move(tmp_path / "d.data", tmp_path / "d.d")
    with pytest.raises(ValueError, match=r"d\.onnx"):
        read_runtime(path, IMAGE, worker)


@pytest.mark.parametrize("library", ["onnxruntime", "ai_edge_litert"])
def test_a_missing_library_is_one_line_with_what_installs_it(tmp_path, monkeypatch, library):
    package = library.replace("_", "-")
    write = {"onnxruntime": write_onnx, "ai_edge_litert": write_tflite}[library]
    kind = kind_of(write(tmp_path / "network"))
    monkeypatch.setitem(sys.modules, library, None)  # as Python keeps what it could not find
    with pytest.raises(runner.RunnerError, match=f"pip install {package}"):
        runner.answer({"kind": kind.name, "path": str(tmp_path / "network")}, {})


def test_a_library_that_crashes_costs_its_file_alone(tmp_path, worker):
    """The process is ended as a crash ends it; the next file has a new one."""
    path = write_onnx(tmp_path / "d.onnx")
    network = Runtime(path, kind_of(path), IMAGE, worker)
    threading.Timer(0.2, worker.process.kill).start()
    with pytest.raises(ValueError, match=r"d\.onnx.*-9"):
        while True:
            network(np.zeros((64, *IMAGE), np.float32))
    assert Runtime(path, kind_of(path), IMAGE, worker).classes == 10


def test_paths_relative_to_the_current_folder_are_found(tmp_path, worker, monkeypatch):
    """The process has a current folder of its own."""
    write_onnx(tmp_path / "d.onnx")
    monkeypatch.chdir(tmp_path)
    assert read_runtime(Path("d.onnx"), IMAGE, worker).model.classes == 10
