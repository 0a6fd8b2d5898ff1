"""A fault at every write of the commands: what a kill or a full disk leaves is whole, each file old or new.

A process that is killed leaves what another process sees at that moment: so a command runs once, and what its
folder holds is looked at before each step that changes it. `tests/test_files.py` kills processes.
"""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest

import convert
from convert import convert_back, convert_file
from models.evaluation import baseline
from models.keras.file import read_keras_file
from models.keras.process import KerasProcess
from models.keras.server import with_config
from models.keras.worker import WorkerError
from tests.conftest import ROOT
from tests.evaluating import command, random_model, save
from tests.faults import at_every_step, check_whole, files_in, full_from

STEPS = {"open", "write", "fsync", "replace", "unlink"}


class Conversion:
    """A conversion, forward or back, over the files that an older one has left."""

    def __init__(self, direction, reference_files, reader, keras, folder):
        self.folder = folder / direction
        self.folder.mkdir()
        self.output = self.folder / ("model.pt" if direction == "forward" else "model.h5")
        source = reference_files / "odd.h5"
        if direction == "forward":
            self.run = lambda: convert_file(source, self.output, reader)
        else:
            checkpoint = folder / "checkpoint.pt"
            convert_file(source, checkpoint, reader)
            self.run = lambda: convert_back(checkpoint, self.output, reader, keras, verify=False)
        self.run()
        self.new = files_in(self.folder)
        self.old = {name: b"old " + name.encode() for name in self.new}
        self.restore()

    def restore(self):
        for name, content in self.old.items():
            (self.folder / name).write_bytes(content)


@pytest.fixture(params=["forward", "back"])
def conversion(request, reference_files, reader, keras, tmp_path, monkeypatch):
    """Return it. Keras builds its model only once, and the JSON has no date: each time all is the same."""
    built = {}

    def build(layers, suffix):
        built[suffix] = built.get(suffix) or original(layers, suffix)
        return built[suffix]

    original = keras.build
    monkeypatch.setattr(keras, "build", build)
    monkeypatch.setattr(convert, "proof_of", lambda results, **versions: {"verification": results})
    return Conversion(request.param, reference_files, reader, keras, tmp_path)


def walk(folder, old, new, run):
    """Run what writes; see before each step that every file is whole. Returns the kinds of the steps."""
    seen = []

    def look(number, kind):
        seen.append(files_in(folder))
        check_whole(seen[-1], old, new)

    with at_every_step(folder, look) as kinds:
        run()
    assert seen[0] == old and files_in(folder) == new
    assert any(old != each != new for each in seen)  # between two renames
    return kinds


def test_conversion_killed_before_any_step(conversion):
    kinds = walk(conversion.folder, conversion.old, conversion.new, conversion.run)
    assert set(kinds) >= STEPS and [kinds.count(kind) for kind in ("open", "replace")] == [2, 2]


def test_conversion_whose_disk_is_full_from_any_step(conversion):
    for step in range(100):
        conversion.restore()
        try:
            with at_every_step(conversion.folder, full_from(step)):
                conversion.run()
        except OSError as error:
            assert error.errno == 28
            assert error.filename in {str(conversion.folder / name) for name in conversion.new}
            check_whole(files_in(conversion.folder), conversion.old, conversion.new)
            assert {path.name for path in conversion.folder.iterdir()} == conversion.new.keys()
        else:
            break
    assert 8 < step < 99 and files_in(conversion.folder) == conversion.new


@contextmanager
def file_size_limit(size):
    """Let no file grow larger. Python ignores SIGXFSZ, so that it is an error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_conversion_under_a_file_size_limit(conversion):
    sizes = sorted(map(len, conversion.new.values()))
    for limit in (0, 1, sizes[0] - 1, sizes[0], sizes[1] - 1):
        with pytest.raises(OSError) as caught, file_size_limit(limit):
            conversion.run()
        assert caught.value.errno == errno.EFBIG
        assert files_in(conversion.folder) == conversion.old
        assert {path.name for path in conversion.folder.iterdir()} == conversion.new.keys()
    with file_size_limit(sizes[1]):
        conversion.run()
    assert files_in(conversion.folder) == conversion.new


def test_command_that_is_killed_while_it_writes(reference_files, old_outputs, tmp_path):
    """The real command and the real signal, at two of the points where the walk above has looked."""
    output, _ = old_outputs
    old = files_in(output.parent)
    processes = []
    for kind, number in (("write", 1), ("replace", 1)):
        folder = shutil.copytree(output.parent, tmp_path / f"{kind}{number}")
        code = (
            "import os, signal, sys, convert\n"
            "from pathlib import Path\n"
            "from tests.faults import at_every_step\n"
            "folder, kind, number = Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])\n"
            "def act(step, found):\n"
            "    if found == kind and kinds.count(kind) == number + 1: os.kill(os.getpid(), signal.SIGKILL)\n"
            "sys.argv = ['convert.py', sys.argv[1], '--no-verify', '-o', sys.argv[2]]\n"
            "with at_every_step(folder, act) as kinds: convert.main()"
        )
        arguments = map(str, (reference_files / "odd.h5", folder / output.name, folder, kind, number))
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        processes.append((kind, folder, process))
    for kind, folder, process in processes:
        assert process.wait() == -signal.SIGKILL
        changed = {name for name, content in files_in(folder).items() if content != old[name]}
        assert changed == ({output.name} if kind == "replace" else set())
        assert len(list(folder.iterdir())) > len(old)  # its temporary files stay


# What evaluate.py writes: metrics.txt, metrics.json, report.png, and the kept Keras answers


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """Return (folder, change, run): a folder to evaluate in, where all that is written has been, once.

    `change()` makes another checkpoint of it, and another Keras file, whose answers come from elsewhere here.
    """
    folder = tmp_path / "evaluation"
    folder.mkdir()

    def answers(file, bn_eps, images, *scaling):
        seed = int(hashlib.sha256(file.read_bytes()).hexdigest()[:8], 16)
        return np.random.default_rng(seed).dirichlet(np.ones(10), len(images)).astype(np.float32), ".h5"

    monkeypatch.setattr(baseline, "ask_keras", answers)

    def change(seed):
        (folder / "model.h5").write_bytes(b"Keras file %d" % seed)
        source = {"file": "model.h5", "sha256": hashlib.sha256(b"Keras file %d" % seed).hexdigest()}
        save(random_model(seed, width=2), folder / "model.pt", source=source)

    def run():
        done = command("model.pt", "--report", "--workers", "1", cwd=folder)
        return done.returncode, done.stderr.splitlines()

    change(0)
    assert run() == (0, [])
    return folder, change, run


WRITTEN = {"model.keras-sample.npz", "results/metrics.txt", "results/metrics.json", "results/report.png"}


def check_results(found, old):
    """See that each file that an evaluation writes is there, and is either the old one or a whole one."""
    assert found.keys() == old.keys()
    for name in WRITTEN:
        if found[name] != old[name]:
            ends = {"npz": b"\0\0", "txt": b"\n", "json": b"}\n", "png": b"IEND\xaeB`\x82"}
            assert found[name].endswith(ends[name.split(".")[-1]]), name
    json.loads(found["results/metrics.json"])


def test_evaluation_killed_before_any_step(evaluation):
    folder, change, run = evaluation
    change(1)
    old, seen = files_in(folder), []
    with at_every_step(folder, lambda number, kind: seen.append(files_in(folder))) as kinds:
        assert run() == (0, [])
    new = files_in(folder)
    assert set(kinds) >= STEPS and kinds.count("replace") == len(WRITTEN)
    assert {name for name in new if new[name] != old[name]} == WRITTEN
    for found in seen:
        check_whole(found, old, new)
    assert seen[0] == old
    assert len({tuple(found.values()) for found in seen}) == 1 + len(WRITTEN)  # one file after the other
    assert sorted(path.name for path in folder.rglob(".*")) == []


def test_evaluation_whose_disk_is_full(evaluation):
    """From any step of the last three files on: an error that names one of them; no half of any."""
    folder, change, run = evaluation
    change(1)
    old = files_in(folder)
    with at_every_step(folder / "results", lambda number, kind: None) as kinds:
        run()
    for step in (0, kinds.index("write"), kinds.index("fsync"), kinds.index("replace"), len(kinds) - 5):
        for name in WRITTEN:
            (folder / name).write_bytes(old[name])
        with at_every_step(folder / "results", full_from(step)):
            status, errors = run()
        check_results(files_in(folder), old)
        if kinds[step:].count("replace"):
            (line,) = errors
            assert status == 1 and os.strerror(28) in line, line
            assert any(name in line for name in WRITTEN) and ".tmp" not in line
        assert sorted(path.name for path in folder.rglob(".*")) == []


def test_kept_answers_that_cannot_be_written(evaluation):
    """The evaluation goes on, and says that the next one will ask again."""
    folder, change, run = evaluation
    change(1)
    old = files_in(folder)
    largest = max(len(old[name]) for name in WRITTEN - {"model.keras-sample.npz"})
    for limit in (0, 1000, len(old["model.keras-sample.npz"]) - 1):
        with file_size_limit(limit):
            status, errors = run()
        found = files_in(folder)
        assert found["model.keras-sample.npz"] == old["model.keras-sample.npz"]
        check_results(found, old)
        assert (status, len(errors)) == ((0, 0) if limit >= largest else (1, 1)), errors
    assert os.listdir(folder / "results") and sorted(path.name for path in folder.rglob(".*")) == []


# What Keras reads, in a folder of its own


def test_keras_on_a_full_disk_is_no_file_that_it_cannot_read(reference_files, reader, keras):
    """Else the proof would go on with the graph that our reader has found, as with a file of Keras 2."""
    file = read_keras_file(reference_files / "odd.h5", reader)
    KerasProcess.load(keras, file)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = resource.prlimit(keras.process.pid, resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(WorkerError, match="OSError"):
            KerasProcess.load(keras, file)
        with pytest.raises(WorkerError):
            keras.build(file.layers, ".h5")
    finally:
        resource.prlimit(keras.process.pid, resource.RLIMIT_FSIZE, limits)
    assert KerasProcess.load(keras, file)["rebuilt"] is None


def test_archive_for_keras_whatever_the_clock(keras_files, monkeypatch):
    """ZIP knows no date before 1980, and a machine without a battery starts in 1970."""
    content = (keras_files / "keras" / "plain.keras").read_bytes()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with zipfile.ZipFile(io.BytesIO(with_config(content, {"checked": True}))) as archive:
        assert sorted(archive.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]
        assert json.loads(archive.read("config.json")) == {"checked": True}
