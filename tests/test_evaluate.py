"""evaluate.py: its figures against independent ones, the Keras probabilities that it keeps, speed-ups that
change nothing, and the command from the outside."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import models.report
from convert import convert_file
from data.cifar10 import CLASS_NAMES, load_test
from evaluate import Predictions, compare, log_softmax, mcnemar_p, short_names, wilson_interval
from models import inference
from models.resnet8 import ResNet8

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
REAL_MODEL = next(
    (
        path
        for path in (ROOT / "checkpoints/resnet8_keras.h5", SHARED / "keras/pretrainedResnet.h5")
        if path.exists()
    ),
    None,
)
needs_real_model = pytest.mark.skipif(
    REAL_MODEL is None, reason="no Keras model in checkpoints/ or ../shared"
)
NOT_A_PYTHON = "/nonexistent/python"


def random_model(seed=0, **arguments):
    """A ResNet8 with random weights and random statistics, so that folding has something to do."""
    torch.manual_seed(seed)
    model = ResNet8(**arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                torch.nn.init.normal_(tensor)
    return model.eval()


def save(model, path, **metadata):
    """Save a checkpoint, and its JSON if there is anything to say in it."""
    torch.save(model.state_dict(), path)
    if metadata:
        path.with_suffix(".json").write_text(json.dumps(metadata))
    return path


def scaling(mean, std):
    return {"shape": [3, 32, 32], "mean": [mean] * 3, "std": [std] * 3}


def command(*arguments, cwd, **options):
    """Run evaluate.py in `cwd` on the bundled sample."""
    arguments = [sys.executable, ROOT / "evaluate.py", *arguments, "--data", "sample", "--output", "results"]
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run([str(a) for a in arguments], cwd=cwd, **options)


def evaluated(*arguments, cwd, status=0):
    """Run it, and return (stdout, metrics.json)."""
    done = command(*arguments, cwd=cwd)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, json.loads((cwd / "results/metrics.json").read_text())


def refused(*arguments, cwd, status=1, **options):
    """Run it; it must fail with one line and write nothing. Returns the line."""
    before = sorted(cwd.rglob("*"))
    done = command(*arguments, cwd=cwd, **options)
    assert done.returncode == status, (done.stdout, done.stderr)
    assert sorted(cwd.rglob("*")) == before
    assert "Traceback" not in done.stderr
    if status == 1:
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture(scope="module")
def sample():
    return load_test(Path("/nowhere"), "sample")


@pytest.fixture(scope="module")
def converted(tmp_path_factory, reader):
    """The real model, converted, and a first run of evaluate.py on it: (folder, stdout, metrics)."""
    folder = tmp_path_factory.mktemp("converted")
    shutil.copy(REAL_MODEL, folder / "model.h5")
    convert_file(folder / "model.h5", folder / "model.pt", reader)
    return folder, *evaluated("model.pt", cwd=folder)


@pytest.fixture
def real(converted, tmp_path):
    """A copy of that folder, to be changed, with the Keras probabilities that the first run kept."""
    folder = tmp_path / "real"
    shutil.copytree(converted[0], folder, ignore=shutil.ignore_patterns("results"))
    return folder


# The figures


def test_metrics_agree_with_plain_pytorch(tmp_path, sample):
    model = random_model()
    save(model, tmp_path / "model.pt", input=scaling(120.0, 64.0))
    _, metrics = evaluated("model.pt", "--no-keras", cwd=tmp_path)

    labels = torch.from_numpy(sample.labels)
    with torch.inference_mode():
        logits = model((torch.from_numpy(sample.images).float() - 120) / 64).double()
    predicted = logits.argmax(1)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for true, guess in zip(labels, predicted, strict=True):
        confusion[true, guess] += 1
    ours = metrics["pytorch"]
    assert ours["correct"] == int((predicted == labels).sum())
    assert ours["accuracy"] == ours["correct"] / 1000
    assert ours["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert ours["confusion_matrix"] == confusion.tolist()
    per_class = {
        name: (predicted[labels == i] == i).double().mean().item() for i, name in enumerate(CLASS_NAMES)
    }
    assert ours["per_class_accuracy"] == pytest.approx(per_class)
    assert metrics["checkpoint"] == "model.pt"
    assert metrics["dataset"] == {"name": sample.name, "images": 1000, "sha256": sample.sha256}
    assert metrics["keras"] is None and metrics["agreement"] is None
    throughput = metrics["throughput"]
    assert throughput["images_per_second"] == pytest.approx(1000 / throughput["seconds"])
    assert (throughput["dtype"], throughput["batch_norm_folded"]) == ("float32", False)
    assert metrics["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_published_values(correct, images, low, high):
    assert wilson_interval(correct, images) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(images - correct, images)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1), (5, 5, 1), (0, 5, 2 / 32), (1, 5, 14 / 64), (9, 1, 22 / 1024), (8, 2, 112 / 1024)],
)
def test_mcnemar_is_a_sign_test(first, second, p):
    assert mcnemar_p(first, second) == mcnemar_p(second, first) == p


def test_mcnemar_of_many_images_nears_the_normal_distribution():
    first, second = 4900, 5100
    z = (second - first - 1) / (first + second) ** 0.5  # with Edwards's continuity correction
    assert mcnemar_p(first, second) == pytest.approx(torch.erfc(torch.tensor(z / 2**0.5)).item(), rel=1e-3)
    assert mcnemar_p(0, 10_000) == 0.0


def test_compare_counts_image_by_image():
    def model(name, classes):
        return Predictions(name, Path(name), log_softmax(5.0 * np.eye(10)[classes]), np.arange(4))

    pair = compare(model("a", [0, 1, 9, 9]), model("b", [0, 9, 2, 3]))
    assert pair["models"] == ["a", "b"]
    assert (pair["same_prediction"], pair["accuracy_difference"]) == (1, 0.25)
    assert pair["mcnemar_p"] == 1.0  # one against two
    peak, rest = np.exp(5) / (np.exp(5) + 9), 1 / (np.exp(5) + 9)
    assert pair["max_abs_probability_difference"] == pytest.approx(peak - rest)


def test_short_names():
    assert short_names([Path("a/x.pt"), Path("b/x.pt"), Path("b/y.pt")]) == ["a/x.pt", "b/x.pt", "y.pt"]


# Inference


def plain(model, images, mean, std):
    with torch.inference_mode():
        shape = (1, -1, 1, 1)
        batch = (torch.from_numpy(images).double() - torch.tensor(mean).view(shape)) / torch.tensor(std).view(
            shape
        )
        return model.double()(batch).numpy()


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("model", [{}, {"in_channels": 1}, {"width": 5, "num_classes": 100}], ids=str)
def test_inference_computes_the_model_folded_or_not(model, fold, sample):
    channels = model.get("in_channels", 3)
    images, mean, std = sample.images[:70, :channels], [100.0, 120.0, 140.0][:channels], [50.0] * channels
    model = random_model(**model)
    prepared = inference.prepare(model, torch.device("cpu"), torch.float64, fold)
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in prepared.modules())
    assert norms == (0 if fold else 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = inference.predict(prepared, images, mean, std, 32, 2)
    assert logits.dtype == np.float64
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    np.testing.assert_allclose(logits, plain(model, images, mean, std), rtol=1e-10, atol=1e-10)


def test_threads_and_batch_size_change_no_prediction(sample):
    model = inference.prepare(random_model(), torch.device("cpu"), torch.float32)
    threads = torch.get_num_threads()
    results = [
        inference.predict(model, sample.images[:130], [0.0] * 3, [64.0] * 3, batch_size, workers)
        for batch_size, workers in [(32, 1), (32, 2), (32, 5), (7, 3), (1000, 2)]
    ]
    assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(results[1], results[0])  # the same batches: the same numbers, in order
    np.testing.assert_array_equal(results[2], results[0])
    for other in results[3:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_the_normalization_in_float32(sample):
    """Around mean 1000, bfloat16 pixels would be multiples of 4 and more."""
    images, mean, std = sample.images[:64], [1000.0] * 3, [64.0] * 3
    seen = []
    model = inference.prepare(random_model(), torch.device("cpu"), torch.bfloat16)
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    logits = inference.predict(model, images, mean, std, 64, 1)
    assert np.isfinite(logits).all()
    exact = ((torch.from_numpy(images).float() - 1000) / 64).bfloat16().float()
    assert torch.equal(seen[0], exact)


# The Keras baseline


@needs_real_model
def test_agrees_with_keras(converted):
    folder, stdout, metrics = converted
    assert metrics["agreement"]["same_prediction"] == 1000
    assert metrics["agreement"]["max_abs_probability_difference"] < 1e-5
    assert metrics["keras"]["correct"] == metrics["pytorch"]["correct"] > 800
    assert metrics["keras"]["loss"] == pytest.approx(metrics["pytorch"]["loss"], abs=1e-6)
    assert metrics["keras"]["confusion_matrix"] == metrics["pytorch"]["confusion_matrix"]
    assert metrics["keras"]["file"] == "model.h5"
    assert metrics["throughput"]["batch_norm_folded"] is True
    assert "asking Keras about 1,000 images" in stdout
    assert {path.name for path in folder.iterdir()} == {
        *("model.h5", "model.pt", "model.json", "model.keras.npz", "results")
    }


@needs_real_model
def test_the_second_run_needs_no_keras(converted, real):
    stdout, metrics = evaluated("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
    assert "asking Keras" not in stdout
    assert metrics["keras"] == converted[2]["keras"]
    assert metrics["agreement"] == converted[2]["agreement"]


@needs_real_model
def test_the_second_run_imports_no_large_library(real):
    code = f"""
import runpy, sys
sys.argv = ["evaluate.py", "model.pt", "--data", "sample"]
try:
    runpy.run_path({str(ROOT / "evaluate.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
large = {{"torchvision", "matplotlib", "tensorflow", "keras", "h5py"}} & set(sys.modules)
sys.exit(f"imported: {{large}}" if large else 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=real, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x55
    path.write_bytes(content)


def pickled(path):
    np.savez(path, key=np.array({"a": 1}, dtype=object), probabilities=np.zeros((1000, 10), np.float32))


def another_shape(path):
    with np.load(path) as content:
        key = content["key"]
    np.savez(path, key=key, probabilities=np.zeros((999, 10), np.float32))


@needs_real_model
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-2000]),
        lambda path: path.write_bytes(b""),
        lambda path: flip(path, 0.5),
        pickled,
        another_shape,
    ],
    ids=["cut", "empty", "flipped bit", "pickle", "another shape"],
)
def test_damaged_probabilities_are_noticed(real, damage):
    damage(real / "model.keras.npz")
    line = refused("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)  # so it does ask Keras again
    assert NOT_A_PYTHON in line and "--no-keras" in line


@needs_real_model
def test_damaged_probabilities_are_made_again(converted, real):
    flip(real / "model.keras.npz", 0.5)
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert "model.keras.npz is damaged: made again" in stdout
    assert metrics["keras"] == converted[2]["keras"]
    stdout, _ = evaluated("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
    assert "damaged" not in stdout


@needs_real_model
@pytest.mark.parametrize("change", ["scaling", "Keras file"])
def test_stale_probabilities_are_noticed(real, change):
    metadata = json.loads((real / "model.json").read_text())
    if change == "scaling":
        metadata["source"]["input"]["mean"] = [1.0, 2.0, 3.0]
    else:  # the same HDF5 content, another file
        with (real / "model.h5").open("ab") as file:
            file.write(bytes(8))
        metadata["source"]["sha256"] = hashlib.sha256((real / "model.h5").read_bytes()).hexdigest()
    (real / "model.json").write_text(json.dumps(metadata))
    done = command("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
    assert done.returncode == 1
    assert "is of another Keras file, other images or another scaling: made again" in done.stdout


@needs_real_model
def test_probabilities_that_cannot_be_kept_are_used_all_the_same(real):
    (real / "model.keras.npz").unlink()
    (real / "model.keras.npz").mkdir()
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert "model.keras.npz cannot be written" in stdout
    assert metrics["agreement"]["same_prediction"] == 1000


@needs_real_model
def test_folds_only_as_long_as_keras_agrees(real):
    """Probabilities that are 2e-5 off pass for Keras's, and are further off than folding may be."""
    with np.load(real / "model.keras.npz") as content:
        key, probabilities = content["key"], content["probabilities"].copy()
    probabilities[0] += np.where(probabilities[0] > 0.5, -2e-5, 2e-5)
    np.savez(real / "model.keras.npz", key=key, probabilities=probabilities)
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert "unfolded" in stdout
    assert metrics["throughput"]["batch_norm_folded"] is False
    assert metrics["agreement"]["max_abs_probability_difference"] == pytest.approx(2e-5, rel=0.2)


@needs_real_model
def test_baseline_that_is_gone_or_another_is_said(real):
    with (real / "model.h5").open("ab") as file:
        file.write(b"x")
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert "no Keras baseline: model.h5 is not what model.pt was converted from" in stdout
    assert metrics["keras"] is None
    (real / "model.h5").unlink()
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert "no Keras baseline: model.h5, the source in model.json, is not there" in stdout
    assert metrics["throughput"]["batch_norm_folded"] is False
    line = refused("model.pt", "--max-drop", "0.01", cwd=real)  # a guard that cannot guard must not pass
    assert "--max-drop" in line


@needs_real_model
def test_fine_tuned_checkpoint_is_told_from_the_converted_one(real):
    model = ResNet8.from_checkpoint(real / "model.pt")
    with torch.no_grad():
        model.fc.bias[3] += 5
    torch.save(model.state_dict(), real / "model.pt")
    stdout, metrics = evaluated(
        "model.pt", "--keras-python", NOT_A_PYTHON, "--max-drop", 0.02, cwd=real, status=3
    )
    assert "model.pt has changed since model.json was written" in stdout
    assert metrics["throughput"]["batch_norm_folded"] is False
    assert metrics["agreement"]["same_prediction"] < 1000
    assert metrics["pytorch"]["correct"] < metrics["keras"]["correct"] - 20


# --compare, --min-accuracy, --max-drop


@needs_real_model
def test_compare(real):
    model = ResNet8.from_checkpoint(real / "model.pt")
    save(model, real / "same [1].pt", input=scaling(0.0, 1.0))
    with torch.no_grad():
        model.fc.bias[3] += 5
    for name in "abc":
        save(model, real / f"worse_{name}.pt", input=scaling(0.0, 1.0))
    others = ["same [1].pt", "worse_a.pt", "worse_b.pt", "worse_c.pt"]
    stdout, metrics = evaluated("model.pt", "--compare", *others, cwd=real)
    assert [other["checkpoint"] for other in metrics["compared"]] == others
    pairs = {tuple(pair["models"]): pair for pair in metrics["pairs"]}
    assert len(pairs) == 6 * 5 / 2
    same, worse = pairs["model.pt", "same [1].pt"], pairs["model.pt", "worse_a.pt"]
    assert (same["same_prediction"], same["max_abs_probability_difference"]) == (1000, 0)
    lost = metrics["compared"][1]["correct"] - metrics["pytorch"]["correct"]
    assert worse["accuracy_difference"] == lost / 1000 < 0
    assert worse["mcnemar_p"] < 1e-3
    rows = {line.split("  ")[0]: line for line in stdout.splitlines()}
    assert rows["same [1].pt vs Keras"].endswith("p = 1.00: chance")
    assert "chance" not in rows["worse_a.pt vs Keras"]
    assert max(map(len, stdout.split("\n\n", 1)[1].splitlines())) <= 80
    done = command("model.pt", "--compare", "worse_a.pt", "--no-keras", "--max-drop", "0.01", cwd=real)
    assert done.returncode == 3
    assert done.stderr.startswith("shortfall: worse_a.pt: accuracy ")


@needs_real_model
def test_guards(converted, real):
    accuracy = converted[2]["pytorch"]["accuracy"]
    evaluated("model.pt", "--min-accuracy", accuracy, "--max-drop", 0, cwd=real)
    done = command("model.pt", "--min-accuracy", accuracy + 0.001, cwd=real)
    assert done.returncode == 3
    assert (
        done.stderr == f"shortfall: model.pt: accuracy {accuracy:.4f}, --min-accuracy {accuracy + 0.001:g}\n"
    )
    assert (real / "results/metrics.json").exists()  # it falls short, and says by how much


# The command from the outside


@needs_real_model
def test_output_in_a_pipe_is_plain_text_of_80_columns(converted):
    folder, stdout, _ = converted
    tables = stdout.split("\n\n", 1)[1]
    written = (folder / "results/metrics.txt").read_text()
    for text in (tables, written.split("note:")[0]):
        assert text.isascii() and text.replace("\n", "").isprintable()
        assert max(map(len, text.splitlines())) <= 80
    assert "accuracy" in tables and "95 % interval" in tables
    assert "Confusion matrix of model.pt" in written
    assert tables.split("\n\nwrote")[0].strip() in written


def test_near_chance_names_the_scaling(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(0.0, 255.0))
    stdout, metrics = evaluated("model.pt", "--no-keras", cwd=tmp_path)
    assert metrics["pytorch"]["accuracy"] < 0.2
    (hint,) = [note for note in metrics["notes"] if "near chance" in note]
    assert hint in stdout
    assert "input scaling" in hint and "convert.py" in hint and "--std" in hint and "255.0" in hint


def test_checkpoint_without_json(tmp_path):
    save(random_model(), tmp_path / "model.pt")
    stdout, _ = evaluated("model.pt", cwd=tmp_path)
    assert "model.json does not say what model.pt is fed: pixels from 0 to 255 are assumed" in stdout
    assert "no Keras baseline: model.json names no source file" in stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype(tmp_path, dtype):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    arguments = ["--no-keras", "--dtype", dtype, "--batch-size", 50, "--workers", 1, "--device", "cpu"]
    _, metrics = evaluated("model.pt", *arguments, cwd=tmp_path)
    found = {name: metrics["throughput"][name] for name in ("dtype", "batch_size", "workers", "device")}
    assert found == {"dtype": dtype, "batch_size": 50, "workers": 1, "device": "cpu"}


@needs_real_model
def test_report(real):
    evaluated("model.pt", "--report", cwd=real)
    content = (real / "results/report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") >= 1000  # pixels wide


def test_report_without_anything_to_compare(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    evaluated("model.pt", "--no-keras", "--report", cwd=tmp_path)
    assert (tmp_path / "results/report.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments",
    [
        ["--min-accuracy", "87"],
        ["--max-drop", "-0.1"],
        ["--max-drop", "0.1", "--no-keras"],
        ["--batch-size", "0"],
        ["--workers", "two"],
        ["--dtype", "float16"],
        ["--keras", "a.h5", "--no-keras"],
        ["a.pt", "b.pt"],
    ],
    ids=" ".join,
)
def test_usage_errors(tmp_path, arguments):
    assert "usage:" in refused(*arguments, cwd=tmp_path, status=2)


class Bomb:
    """What leaves a mark on disk when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def traced(model, path):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 32, 32)), path)


def cut(model, path):
    save(model, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(name, tensor):
    return lambda model, path: torch.save({**model.state_dict(), name: tensor}, path)


HOSTILE = {
    "pickle bomb": (lambda _, path: torch.save({"a": Bomb(path.parent / "MARK")}, path), "code or objects"),
    "old pickle bomb": (
        lambda _, path: torch.save(
            {"a": Bomb(path.parent / "MARK")}, path, _use_new_zipfile_serialization=False
        ),
        "code or objects",
    ),
    "raw pickle bomb": (
        lambda _, path: path.write_bytes(pickle.dumps(Bomb(path.parent / "MARK"))),
        "code or",
    ),
    "TorchScript": (traced, "not a PyTorch file"),
    "whole module": (lambda model, path: torch.save(model, path), "code or objects"),
    "other model": (lambda _, path: save(torch.nn.Linear(2, 2), path), "not a ResNet8's state_dict"),
    "wrapped": (lambda model, path: torch.save({"state_dict": model.state_dict()}, path), "tensors by name"),
    "list": (lambda _, path: torch.save([1], path), "expected a state_dict"),
    "cut": (cut, "damaged"),
    "empty": (lambda _, path: path.write_bytes(b""), "damaged"),
    "text": (lambda _, path: path.write_text("hello\n" * 99), "damaged"),
    "folder": (lambda _, path: path.mkdir(), "Is a directory"),
    "missing": (lambda _, path: None, "No such file"),
    "extra tensor": (changed("extra", torch.zeros(2)), '"extra"'),
    "scalar": (changed("conv1.weight", torch.zeros(())), "not a ResNet8's state_dict"),
    "name that is a number": (changed(1, torch.zeros(2)), "expected a state_dict"),
    "integers": (changed("fc.weight", torch.zeros(10, 64, dtype=torch.int8)), "fc.weight is torch.int8"),
    "sparse": (changed("fc.weight", torch.zeros(10, 64).to_sparse()), "fc.weight"),
    "a huge shape without values": (
        changed("conv1.weight", torch.zeros(1).expand(10**5, 3, 3, 3)),
        "2,700,000",
    ),
    "a wide first layer alone": (changed("conv1.weight", torch.zeros(20_000, 3, 3, 3)), "size mismatch"),
    "NaN": (changed("fc.bias", torch.full((10,), torch.nan)), "NaN"),
    "one channel": (lambda _, path: save(random_model(in_channels=1), path), "images of shape [1,"),
    "seven classes": (lambda _, path: save(random_model(num_classes=7), path), "has 7 classes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints_get_one_line(tmp_path, case):
    write, expected = HOSTILE[case]
    path = tmp_path / f"{case}.pt"
    write(random_model(), path)
    limit = 8 << 30  # bytes of address space: what a file claims must not take the machine's memory
    line = refused(
        path.name, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    )
    assert expected in line and path.name in line
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[1]", "holds a JSON list"),
        ('{"architecture": 3}', "architecture is 3, expected an object"),
        ('{"architecture": {"bn_eps": "small"}}', 'architecture.bn_eps is "small", expected a number'),
        ('{"input": []}', "input is [], expected an object"),
        ('{"input": {"mean": 0, "std": [1, 1, 1]}}', "input.mean is 0, expected a list of numbers"),
        ('{"input": {"mean": [0, 0, NaN], "std": [1, 1, 1]}}', "input.mean"),
        ('{"input": {"mean": [0, 0, 0], "std": [1, 0, 1]}}', "input.std"),
        ('{"input": {"mean": [0], "std": [1, 1, 1]}}', "input.mean has 1 values, expected 3"),
        ('{"input": {"shape": [3, 96, 96]}}', "images of shape [3, 96, 96]"),
        ('{"source": {"file": 1, "sha256": "0"}}', "source.file is 1, expected a string"),
        ('{"source": {"input": {"mean": ["a"]}}}', "source.input.mean"),
        ('{"sha256": null}', "sha256 is null"),
    ],
)
def test_wrong_json_gets_one_line(tmp_path, text, expected, monkeypatch, capsys):
    save(random_model(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "model.pt", "--data", "sample"])
    assert evaluate.main() == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and len(line.splitlines()) == 1
    assert expected in line
    assert not (tmp_path / "results").exists()


def test_other_errors_get_one_line(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(0.0, 1.0))
    assert "nowhere.h5: No such file" in refused("model.pt", "--keras", "nowhere.h5", cwd=tmp_path)
    (tmp_path / "noise.h5").write_bytes(b"noise")
    assert "noise.h5: neither an HDF5 file" in refused("model.pt", "--keras", "noise.h5", cwd=tmp_path)
    assert "python convert.py" in refused(cwd=tmp_path)
    assert "--compare" not in refused("model.pt", "--compare", "other.pt", cwd=tmp_path)
    if not torch.cuda.is_available():
        assert "--device cuda" in refused("model.pt", "--device", "cuda", cwd=tmp_path)


def test_results_that_cannot_be_written(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(0.0, 1.0))
    (tmp_path / "results").write_text("a file")
    assert "results" in refused("model.pt", "--no-keras", cwd=tmp_path)
    assert (tmp_path / "results").read_text() == "a file"


def test_a_crash_while_writing_leaves_the_old_results(tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("crash")

    save(random_model(), tmp_path / "model.pt", input=scaling(0.0, 1.0))
    evaluated("model.pt", "--no-keras", cwd=tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.report, "draw_report", crash)
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "model.pt", "--no-keras", "--data", "sample", "--report"]
    )
    with pytest.raises(RuntimeError, match="crash"):
        evaluate.main()
    assert {path: path.read_bytes() for path in (tmp_path / "results").iterdir()} == before
