"""Damages files of every format that is read; each must be read whole, or refused in one line.

    python -m tests.fuzz [--kind KIND] [--count N] [--seed S] [--files DIR]

A file that is read has finite weights, or exactly the content it had; a refusal leaves no output. What can
crash a library, HDF5 or that of another format, is read in a fork. Prints a table; exits 1 after any other
outcome, such as another exception, a message of two lines, more than MEMORY bytes or SLOW seconds.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from convert import convert_file
from data import cifar10
from data.cifar10 import RECORD_BYTES, DataError, load_test
from evaluate import load_checkpoint
from models.common.cli import VerificationError
from models.common.job import JobError
from models.evaluation import runtimes
from models.evaluation.baseline import read_cache, write_cache
from models.resnet8 import ResNet8
from tests.keras_files.damage import BYTES, damage, edit_json
from tests.keras_files.networks import WRITERS
from tests.keras_files.reading import ForkedReader
from tests.runtime_files import write_onnx, write_tflite

OPTIONS = argparse.Namespace(mean=None, std=None, dtype="float32", key=None)  # of evaluate.py

MEMORY = 2 * 2**30  # bytes of address space, in addition to what the process has
SLOW = 30  # seconds; only a hang takes as long
REFUSALS = (ValueError, OSError, DataError, JobError, VerificationError)
OUTCOMES = ("read", "refused", "failed")
KERAS_FILES = """
    keras/plain.h5 keras/plain.keras keras/plain.weights.h5 keras/nested_deep.h5 keras/compiled.keras
    tf_keras/plain.h5 tf_keras/plain.keras tf_keras/plain.weights.h5 tf_keras/plain.legacy.h5
    tf_keras/nested.keras tf_keras/normalization_adapted.h5 tf_keras/compiled.h5
""".split()
METADATA = {
    "architecture": {"num_classes": 10, "width": 16, "in_channels": 3, "bn_eps": 1e-3, "bn_momentum": 0.01},
    "source": {"file": "model.h5", "sha256": "0" * 64, "input": {"mean": [0.0] * 3, "std": [1.0] * 3}},
    "input": {"layout": "NCHW", "shape": [3, 32, 32], "mean": [0.0] * 3, "std": [255.0] * 3},
    "verification": None,
    "sha256": "1" * 64,
}

# Each function of KINDS returns two functions: `damage(rng)`, which returns the kind of damage and a content,
# and `read(content)`, which raises one of REFUSALS if it is refused.


class OneLineNotes:
    """Checks notes, and prints none."""

    def add(self, line):
        assert len(line.splitlines()) == 1, f"not one line: {line!r}"


class ForkedRuntime:
    """Runs a file of another format in a fork, with the interface of `Job`; an import takes 1 s in a job."""

    def __init__(self, module):
        self.task = import_module(module).run_task

    def run(self, request, arrays, timeout):
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=self.answer, args=(sender, request, arrays))
        child.start()
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            answer = JobError("ended without an answer", crashed=True)
        child.join()
        if isinstance(answer, JobError):
            raise answer
        return answer

    def answer(self, sender, request, arrays):
        try:
            sender.send(self.task(request, arrays))
        except JobError as error:
            sender.send(error)


def few_images(count=3):
    sample = load_test(which="sample")
    return cifar10.Dataset("a few", sample.images[:count], sample.labels[:count], "0" * 64)


def check_finite(model):
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), "not finite"


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def damage_bytes(content, rng):
    kind, data = rng.choice(BYTES), bytearray(content)
    kind(data, rng)
    return kind.__name__, bytes(data)


def damage_records(content, rng):
    """Change an archive of torch.save: records left out, renamed, twice, compressed, swapped, grown."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        members = [(name, source.read(name)) for name in source.namelist()]
    kind = rng.choice(["left out", "renamed", "twice", "compressed", "swapped", "grown", "bytes of one"])
    index, other = rng.randrange(len(members)), rng.randrange(len(members))
    name, record = members[index]
    if kind == "left out":
        del members[index]
    elif kind == "renamed":
        members[index] = (rng.choice(["x", "../x", f"{name}x", "archive/constants.pkl"]), record)
    elif kind == "twice":
        members.append((name, record[::-1]))
    elif kind == "swapped":
        members[index], members[other] = (name, members[other][1]), (members[other][0], record)
    elif kind == "grown":
        members[index] = (name, record * rng.choice([2, 100]))
    elif kind == "bytes of one" and len(record) > 1:
        members[index] = (name, damage_bytes(record, rng)[1])
    buffer = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name, record in members:
            target.writestr(name, record)
    return kind, buffer.getvalue()


def wrong_tensors(state, rng):
    """Save something else than a ResNet8's state_dict."""
    state = dict(state)
    key = rng.choice(list(state))
    tensor = state[key]
    value = rng.choice([float("nan"), float("inf"), -1.0, 1e39])
    changes = {
        "missing": lambda: state.pop(key),
        "renamed": lambda: state.update({rng.choice(["x", f"module.{key}", 3, ""]): state.pop(key)}),
        "reshaped": lambda: state.update({key: tensor.reshape(1, -1)}),
        "another size": lambda: state.update({key: torch.zeros(rng.choice([0, 1, 7, 10**6]))}),
        "another type": lambda: state.update({key: tensor.to(rng.choice([torch.int8, torch.complex64]))}),
        "one value": lambda: state.update({key: torch.full_like(tensor.double(), value)}),
        "no tensor": lambda: state.update({key: rng.choice([None, 3, "x", [1], {}])}),
        "expanded": lambda: state.update({key: torch.zeros(1).expand(10**9)}),
        "sparse": lambda: state.update({key: tensor.double().to_sparse()}),
        "wrapped": lambda: state.update({"state_dict": dict(state)}),
        "half": lambda: state.update({name: each.half() for name, each in state.items()}),
    }
    kind = rng.choice(list(changes))
    changes[kind]()
    return kind, saved(state)


def fuzz_keras(folder, files):
    """Convert Keras files of every format."""
    contents = [(files / name).read_bytes() for name in KERAS_FILES]
    path, outputs = folder / "model.h5", folder / "outputs"
    outputs.mkdir()

    def read(content):
        path.write_bytes(content)
        for file in outputs.iterdir():
            file.unlink()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                convert_file(path, outputs / "model.pt")
        except REFUSALS:
            assert not list(outputs.iterdir()), f"left {list(outputs.iterdir())}"
            raise
        assert {file.name for file in outputs.iterdir()} == {"model.pt", "model.json"}
        check_finite(ResNet8.from_checkpoint(outputs / "model.pt"))

    return lambda rng: damage(rng.choice(contents), rng), read


def fuzz_pt(folder, files):
    """Read `.pt` files, of both formats of torch.save."""
    state = ResNet8().state_dict()
    sources = [saved(state), saved({"state_dict": state, "epoch": 1})]
    old = saved(state, _use_new_zipfile_serialization=False)

    def damage(rng):
        choice = rng.random()
        if choice < 0.35:
            return wrong_tensors(state, rng)
        if choice < 0.65:
            return damage_records(rng.choice(sources), rng)
        return damage_bytes(rng.choice([*sources, old]), rng)

    def read(content):
        (folder / "model.pt").write_bytes(content)
        check_finite(ResNet8.from_checkpoint(folder / "model.pt"))

    return damage, read


def fuzz_json(folder, files):
    """Read the JSON beside a `.pt`."""
    (folder / "model.pt").write_bytes(saved(ResNet8().state_dict()))
    source, dataset = json.dumps(METADATA), few_images()

    def damage(rng):
        if rng.random() < 0.7:
            return "edit_json", edit_json(source, rng).encode()
        return damage_bytes(source.encode(), rng)

    def read(content):
        (folder / "model.json").write_bytes(content)
        normalization = load_checkpoint(folder / "model.pt", dataset, OneLineNotes(), OPTIONS).normalization
        mean, std = normalization.mean, normalization.std
        assert len(mean) == len(std) == 3 and np.isfinite([*mean, *std]).all() and all(std)

    return damage, read


def fuzz_npz(folder, files):
    """Read the cache of Keras's predictions: as it was written, or not at all."""
    path, dataset = folder / "model.keras-0.npz", few_images(100)
    cached = np.log(np.random.default_rng(0).random((100, 10)))
    write_cache([path], cached, "a .h5", OneLineNotes())
    source = path.read_bytes()

    def read(content):
        path.write_bytes(content)
        read_back = read_cache(path, dataset, OneLineNotes())
        if read_back is None:
            raise ValueError("damaged: Keras runs again")
        assert np.array_equal(read_back[0], cached) and read_back[1] == "a .h5", "another cache"

    return lambda rng: damage_bytes(source, rng), read


def fuzz_cifar(folder, files):
    """Read CIFAR-10 in both versions, with 20 images as the official ones."""
    records = np.random.default_rng(0).integers(0, 256, (20, RECORD_BYTES), np.uint8)
    pickled = pickle.dumps({b"data": records[:, 1:], b"labels": records[:, 0].tolist()}, protocol=2)
    binary_name = f"{cifar10.BINARY_FOLDER}/test_batch.bin"
    contents = {binary_name: records.tobytes(), f"{cifar10.PYTHON_FOLDER}/test_batch": pickled}
    sha256 = cifar10.SHA256[binary_name] = hashlib.sha256(records.tobytes()).hexdigest()
    cifar10.PYTHON_MD5["test_batch"] = hashlib.md5(pickled).hexdigest()

    def damage(rng):
        name = rng.choice(list(contents))
        kind, content = damage_bytes(contents[name], rng)
        return kind, f"{name}\n".encode() + content

    def read(content):
        name, _, content = content.partition(b"\n")
        with tempfile.TemporaryDirectory(dir=folder) as data_dir:
            path = Path(data_dir, name.decode())
            path.parent.mkdir()
            path.write_bytes(content)
            assert load_test(data_dir, "full").sha256 == sha256, "other images"

    return damage, read


def fuzz_safetensors(folder, files):
    """Read a safetensors file with its normalization."""
    from safetensors.torch import save

    source, dataset = save(ResNet8().state_dict(), {"input": json.dumps(METADATA["input"])}), few_images()
    header = int.from_bytes(source[:8], "little")

    def damage(rng):
        if rng.random() < 0.5:
            return damage_bytes(source, rng)
        edited = edit_json(source[8 : 8 + header].decode(), rng).encode()
        return "edit_json", len(edited).to_bytes(8, "little") + edited + source[8 + header :]

    def read(content):
        (folder / "model.safetensors").write_bytes(content)
        check_finite(load_checkpoint(folder / "model.safetensors", dataset, OneLineNotes(), OPTIONS).model)

    return damage, read


def fuzz_runtime(suffix, library, write, *variants):
    """Run a network of another format in its library."""

    def fuzz(folder, files):
        import_module(library)
        sources = [write(folder / "source", **variant).read_bytes() for variant in variants]
        dataset, path = few_images(), folder / f"model{suffix}"

        def damage(rng):
            source = rng.choice(sources)
            ends = rng.choice([0, 0, min(3000, len(source))])  # where the graph is, not the weights
            if not ends:
                return damage_bytes(source, rng)
            if rng.random() < 0.5:
                kind, part = damage_bytes(source[:ends], rng)
                return f"{kind} at its start", part + source[ends:]
            kind, part = damage_bytes(source[-ends:], rng)
            return f"{kind} at its end", source[:-ends] + part

        def read(content):
            path.write_bytes(content)
            checkpoint = load_checkpoint(path, dataset, OneLineNotes(), OPTIONS)
            assert checkpoint.model is None
            predictions = runtimes.measure_file(path, dataset, checkpoint.normalization, "model", False)
            assert predictions.log_probabilities.shape == (3, 10)

        for source in sources:
            read(source)
        return damage, read

    return fuzz


KINDS = {
    "keras": fuzz_keras,
    "pt": fuzz_pt,
    "json": fuzz_json,
    "npz": fuzz_npz,
    "cifar": fuzz_cifar,
    "safetensors": fuzz_safetensors,
    "onnx": fuzz_runtime(".onnx", "onnxruntime", write_onnx, {}, {"quantized": True, "dtype": "int8"}),
    "tflite": fuzz_runtime(
        ".tflite", "ai_edge_litert.interpreter", write_tflite, {}, {"dtype": "uint8", "softmax": True}
    ),
}


@contextlib.contextmanager
def limited_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(kind, count, seed, files):
    """Read `count` damaged files; return the counts by (damage, outcome), and a line for each failure.

    `files` is the folder of the Keras files that `tests.keras_files.writer` wrote.
    """
    torch.manual_seed(0)
    counts, failures = Counter(), []
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.dict(cifar10.SHA256),
        mock.patch.dict(cifar10.PYTHON_MD5),
        mock.patch("models.keras.file.Job", ForkedReader),
        mock.patch("models.evaluation.runtimes.Job", ForkedRuntime),
        warnings.catch_warnings(action="ignore"),
    ):
        damage_one, read = KINDS[kind](Path(name), files)
        for number in range(count):
            how, content = damage_one(random.Random(f"{seed} {number}"))
            started, outcome, problem = time.monotonic(), "read", ""
            try:
                with limited_memory():
                    read(content)
            except REFUSALS as error:
                outcome, message = "refused", str(error)
                if len(message.splitlines()) != 1 or len(message) > 2000:
                    problem = f"not one line: {message!r}"
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if time.monotonic() - started > SLOW:
                problem = f"took {time.monotonic() - started:.0f} s"
            if problem:
                outcome = "failed"
                failures.append(f"{seed} {number} {how}: {problem}")
            counts[how, outcome] += 1
        left = list(Path(name).rglob(".*.tmp"))
        failures += [f"left {left}"] if left else []
    return counts, failures


def main():
    """Run it and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="keras")
    parser.add_argument("--files", type=Path, help="folder written by tests.keras_files.writer")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = options.files or Path(folder)
        if not options.files and options.kind == "keras":
            for writer in WRITERS:
                command = [sys.executable, "-m", "tests.keras_files.writer", files / writer, writer]
                subprocess.run(command, check=True)
        counts, failures = run(options.kind, options.count, options.seed, files)
    print(f"{'damage':28}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for how in sorted({how for how, _ in counts}):
        print(f"{how:28}" + "".join(f"{counts[how, name]:10,}" for name in OUTCOMES))
    totals = [sum(number for (_, name), number in counts.items() if name == outcome) for outcome in OUTCOMES]
    print(f"{'total':28}" + "".join(f"{number:10,}" for number in totals))
    print(*failures, sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
