"""Damages all other files that are read: `.pt`, its JSON, the kept Keras answers, CIFAR-10, other formats.

`python -m tests.fuzz --kind KIND` calls it. Each file ends read whole or refused in one line,
and nothing is written; the process may take no more than MEMORY beyond what it had.
"""

import hashlib
import io
import json
import pickle
import random
import resource
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data import cifar10
from data.cifar10 import CLASS_NAMES, RECORD_BYTES, DataError, load_test
from evaluate import load_checkpoint
from models.evaluation.baseline import log_softmax, read_answers
from models.keras.worker import Worker
from models.resnet8 import ResNet8
from tests.keras_files.damage import BYTES, edit_json
from tests.runtime_files import write_exported, write_onnx, write_tflite

MEMORY = 2 * 2**30  # bytes of address space
SLOW = 10  # seconds

METADATA = {
    "architecture": {"num_classes": 10, "width": 16, "in_channels": 3, "bn_eps": 1e-3, "bn_momentum": 0.01},
    "source": {"file": "model.h5", "sha256": "0" * 64, "input": {"mean": [0.0] * 3, "std": [1.0] * 3}},
    "input": {"layout": "NCHW", "shape": [3, 32, 32], "mean": [0.0] * 3, "std": [255.0] * 3},
    "verification": None,
    "sha256": "1" * 64,
}


class Silent:
    """Takes notes, and shows none."""

    def add(self, line: str) -> None:
        assert len(line.splitlines()) == 1, f"not one line: {line!r}"


def saved(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def damage_bytes(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    kind, data = rng.choice(BYTES), bytearray(content)
    kind(data, rng)
    return kind.__name__, bytes(data)


# --- What is damaged, and what must come of it -----------------------------------------------------------


def damage_records(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Change the archive that torch.save writes: records left out, renamed, twice, compressed, swapped."""
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
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w", compression) as target:
        for name, record in members:
            target.writestr(name, record)
    return kind, buffer.getvalue()


def wrong_tensors(state: dict, rng: random.Random) -> tuple[str, bytes]:
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


def fuzz_pt(folder: Path) -> tuple[Callable, Callable]:
    """A `.pt`, of both formats of torch.save: a network of finite weights, or a refusal."""
    torch.manual_seed(0)
    state = ResNet8().state_dict()
    sources = [saved(state), saved({"state_dict": state, "epoch": 1})]
    old = saved(state, _use_new_zipfile_serialization=False)

    def damage(rng: random.Random) -> tuple[str, bytes]:
        choice = rng.random()
        if choice < 0.35:
            return wrong_tensors(state, rng)
        if choice < 0.65:
            return damage_records(rng.choice(sources), rng)
        return damage_bytes(rng.choice([*sources, old]), rng)

    def read(content: bytes) -> None:
        path = folder / "model.pt"
        path.write_bytes(content)
        with warnings.catch_warnings(action="ignore"):
            model = ResNet8.from_checkpoint(path)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), "not finite"

    return damage, read


def fuzz_json(folder: Path) -> tuple[Callable, Callable]:
    """The JSON beside a `.pt`: a scaling that can be fed, or a refusal."""
    (folder / "model.pt").write_bytes(saved(ResNet8().state_dict()))
    source, dataset = json.dumps(METADATA), load_test(folder / "none", "sample")

    def damage(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.7:
            return "edit_json", edit_json(source, rng).encode()
        return damage_bytes(source.encode(), rng)

    def read(content: bytes) -> None:
        (folder / "model.json").write_bytes(content)
        checkpoint = load_checkpoint(folder / "model.pt", dataset, Silent())
        mean, std = checkpoint.scaling.mean, checkpoint.scaling.std
        assert len(mean) == len(std) == 3 and np.isfinite([*mean, *std]).all() and all(std)

    return damage, read


def fuzz_npz(folder: Path) -> tuple[Callable, Callable]:
    """The kept Keras answers: just what was kept, or asked for again."""
    answers, key = np.random.default_rng(0).random((100, 10), np.float32), "the key"
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), logits=answers, format=np.array("a .h5"))

    def read(content: bytes) -> None:
        path = folder / "model.keras.npz"
        path.write_bytes(content)
        found = read_answers(path, key, answers.shape, Silent())
        if found is None:
            raise ValueError("made again")
        assert np.array_equal(found[0], log_softmax(answers)) and found[1] == "a .h5", (
            "other answers than were kept"
        )

    return lambda rng: damage_bytes(buffer.getvalue(), rng), read


def fuzz_cifar(folder: Path) -> tuple[Callable, Callable]:
    """CIFAR-10 in both versions, 20 images that are the official ones here: these images, or an error."""
    from torchvision.datasets import CIFAR10

    records = np.random.default_rng(0).integers(0, 256, (20, RECORD_BYTES), np.uint8)
    records[:, 0] %= 10
    binary = records.tobytes()
    cifar10.BATCHES = {"test": {"test_batch.bin": hashlib.sha256(binary).hexdigest()}}
    cifar10.BATCH_RECORDS = len(records)
    batch = {"data": records[:, 1:].copy(), "labels": records[:, 0].tolist()}
    python, meta = pickle.dumps(batch, 2), pickle.dumps({"label_names": list(CLASS_NAMES)}, 2)
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in (("test", python), ("meta", meta))}
    CIFAR10.train_list, CIFAR10.test_list = [], [["test_batch", md5["test"]]]
    CIFAR10.meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["meta"]}
    files = {
        "binary": (folder / "binary" / cifar10.BINARY_FOLDER / "test_batch.bin", binary),
        "python": (folder / "python" / cifar10.PYTHON_FOLDER / "test_batch", python),
        "meta": (folder / "python" / cifar10.PYTHON_FOLDER / "batches.meta", meta),
    }
    for path, _ in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)

    def damage(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(list(files))
        for path, content in files.values():
            path.write_bytes(content)
        kind, content = damage_bytes(files[name][1], rng)
        return f"{name}: {kind}", f"{name}\n".encode() + content

    def read(content: bytes) -> None:
        name, _, content = content.partition(b"\n")
        path, _ = files[name.decode()]
        path.write_bytes(content)
        found = load_test(path.parents[1], "full")
        assert found.sha256 == hashlib.sha256(binary).hexdigest(), "other images"

    return damage, read


def fuzz_safetensors(folder: Path) -> tuple[Callable, Callable]:
    """A safetensors file with its scaling: a network of finite weights, or a refusal."""
    from safetensors.torch import save

    said = {"input": json.dumps(METADATA["input"])}
    source, dataset = save(ResNet8().state_dict(), said), load_test(folder / "none", "sample")
    header = int.from_bytes(source[:8], "little")

    def damage(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.5:
            return damage_bytes(source, rng)
        edited = edit_json(source[8 : 8 + header].decode(), rng).encode()
        return "edit_json", len(edited).to_bytes(8, "little") + edited + source[8 + header :]

    def read(content: bytes) -> None:
        (folder / "model.safetensors").write_bytes(content)
        model = load_checkpoint(folder / "model.safetensors", dataset, Silent()).model
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), "not finite"

    return damage, read


def fuzz_runtime(write: Callable, *variants: dict) -> Callable[[Path], tuple[Callable, Callable]]:
    """A network of another format, run by its library: outputs of ten classes, or a refusal."""

    def fuzz(folder: Path) -> tuple[Callable, Callable]:
        sources = [write(folder / "source", **variant).read_bytes() for variant in variants]
        dataset, worker = load_test(folder / "none", "sample"), Worker("models.evaluation.runner")

        def damage(rng: random.Random) -> tuple[str, bytes]:
            source = rng.choice(sources)
            if source.startswith(b"PK") and rng.random() < 0.7:
                return damage_graph(source, rng) if rng.random() < 0.7 else damage_records(source, rng)
            ends = rng.choice([0, 0, min(3000, len(source))])  # where the graph is, not the weights
            if not ends:
                return damage_bytes(source, rng)
            start, end = source[:ends], source[-ends:]
            kind, part = damage_bytes(start, rng)
            if rng.random() < 0.5:
                return f"{kind} at its start", part + source[ends:]
            kind, part = damage_bytes(end, rng)
            return f"{kind} at its end", source[:-ends] + part

        def read(content: bytes) -> None:
            (folder / "model").write_bytes(content)
            model = load_checkpoint(folder / "model", dataset, Silent(), runner=worker).model
            assert model(dataset.images[:3].astype(np.float32)).shape == (3, 10)

        for source in sources:  # whole ones are read, and the library is imported by now
            read(source)
        return damage, read

    return fuzz


def damage_graph(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Change the JSON of a network that torch.export wrote, or of its weights."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        chosen = rng.choice([name for name in source.namelist() if name.endswith(".json")])
        for name in source.namelist():
            record = source.read(name)
            target.writestr(name, edit_json(record.decode(), rng) if name == chosen else record)
    return f"edit_json of {chosen.rpartition('/')[2]}", buffer.getvalue()


KINDS = {
    "pt": fuzz_pt,
    "json": fuzz_json,
    "npz": fuzz_npz,
    "cifar": fuzz_cifar,
    "safetensors": fuzz_safetensors,
    "onnx": fuzz_runtime(write_onnx, {}, {"quantized": True, "dtype": "int8"}),
    "tflite": fuzz_runtime(write_tflite, {}, {"dtype": "uint8", "softmax": True}),
    "pt2": fuzz_runtime(write_exported, {}, {"softmax": True, "decompose": True}),
}


def run(kind: str, count: int, seed: int) -> tuple[Counter, list[str]]:
    """Read `count` damaged files; return how often each (damage, outcome) came up, and what went wrong.

    Outcomes are "converted" (read whole), "refused" and "failed".
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory() as name:
        damage, read = KINDS[kind](Path(name))
        for number in range(count):
            how, content = damage(random.Random(f"{seed} {number}"))
            started, result = time.monotonic(), "converted"
            try:
                read(content)
            except (ValueError, OSError, DataError) as error:
                result = "refused" if len(str(error).splitlines()) == 1 else "failed"
                failures += [f"{seed} {number} {how}: not one line: {error}"] if result == "failed" else []
            except Exception as error:
                result = "failed"
                failures.append(f"{seed} {number} {how}: {type(error).__name__}: {error}")
            if time.monotonic() - started > SLOW:
                failures.append(f"{seed} {number} {how}: took {time.monotonic() - started:.0f} s")
            counts[how, result] += 1
        left = [path for path in Path(name).rglob(".*.tmp")]
        failures += [f"left {left}"] if left else []
    return counts, failures
