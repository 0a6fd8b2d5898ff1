"""A fault at every write of the commands: after a kill or on a full disk, each file is complete, old or new.

What a killed process leaves is what other processes see at that moment. So a command runs once, and its
folder is checked before each step that changes it; `tests/test_files.py` kills processes.
"""

import errno
import hashlib
import io
import json
import os
import time
import zipfile

import numpy as np
import pytest

import convert
from convert import convert_back, convert_file
from models.common.job import JobError
from models.evaluation import baseline
from models.keras.file import read_keras_file
from models.keras.reference import Keras, replace_config
from models.normalization import Normalization
from tests.evaluating import command, random_model, save
from tests.faults import at_every_step, check_whole, file_size_limit, files_in, full_from

STEPS = {"open", "write", "fsync", "replace", "unlink"}


def has_leftovers(folder):
    """Whether there are files in a folder that `files_in` does not return."""
    return sum(path.is_file() for path in folder.rglob("*")) > len(files_in(folder))


@pytest.fixture(params=["forward", "back"])
def conversion(request, reference_files, keras, tmp_path, monkeypatch):
    """Return (run, folder, old, new): a conversion into a folder, and its files before and after."""
    monkeypatch.setattr(convert, "verification_json", lambda *_, **versions: versions)  # no date
    source, checkpoint, folder = reference_files / "odd.h5", tmp_path / "checkpoint.pt", tmp_path / "out"
    convert_file(source, checkpoint)

    def run():
        if request.param == "forward":
            convert_file(source, folder / "model.pt")
        else:
            convert_back(checkpoint, folder / "model.h5", keras, verify=False)

    run()
    new = files_in(folder)
    old = {name: b"old " + name.encode() for name in new}
    restore(folder, old)
    return run, folder, old, new


def restore(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_conversion_killed_before_any_step(conversion):
    run, folder, old, new = conversion
    seen = []
    with at_every_step(folder, lambda number, kind: seen.append(files_in(folder))) as kinds:
        run()
    for files in seen:
        check_whole(files, old, new)
    assert seen[0] == old and files_in(folder) == new
    assert any(old != files != new for files in seen)  # between two renames
    assert set(kinds) >= STEPS and (kinds.count("open"), kinds.count("replace")) == (2, 2)


def test_conversion_on_a_full_disk(conversion):
    """From any step on: the error names one of the outputs."""
    run, folder, old, new = conversion
    for step in range(100):
        restore(folder, old)
        try:
            with at_every_step(folder, full_from(step)):
                run()
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC and error.filename in {str(folder / name) for name in new}
            check_whole(files_in(folder), old, new)
            assert not has_leftovers(folder)
    assert 8 < step < 99 and files_in(folder) == new


# Files written by evaluate.py


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """Return (run, folder, old): an evaluation, its folder, and the files of one of another model before."""

    def run_keras(file, bn_eps, images, *_):
        seed = int(hashlib.sha256(file.read_bytes()).hexdigest()[:8], 16)
        return np.random.default_rng(seed).normal(size=(len(images), 10)).astype(np.float32), ".h5"

    def run(*options):
        done = command("model.pt", "--workers", "1", *options, cwd=tmp_path)
        return done.returncode, done.stderr.splitlines()

    def write_model(seed):
        (tmp_path / "model.h5").write_bytes(b"Keras file %d" % seed)
        source = {"file": "model.h5", "sha256": hashlib.sha256(b"Keras file %d" % seed).hexdigest()}
        save(random_model(seed, width=2), tmp_path / "model.pt", source=source)

    monkeypatch.setattr(baseline, "run_keras", run_keras)
    write_model(0)
    assert run("--report") == (0, [])
    write_model(1)
    return run, tmp_path, files_in(tmp_path)


RESULTS = {f"results/{name}" for name in ("metrics.txt", "metrics.json", "report.png")}


def test_evaluation_killed_before_any_step(evaluation):
    run, folder, old = evaluation
    seen = []
    with at_every_step(folder, lambda number, kind: seen.append(files_in(folder))) as kinds:
        assert run("--report") == (0, [])
    new = files_in(folder)
    for files in seen:
        check_whole(files, old, new)
    (cache,) = new.keys() - old.keys()
    assert cache.endswith(".npz") and {name for name in new if new[name] != old.get(name)} == RESULTS | {
        cache
    }
    assert seen[0] == old and set(kinds) >= STEPS and kinds.count("replace") == len(RESULTS) + 1
    assert not has_leftovers(folder)


def test_evaluation_on_a_full_disk(evaluation):
    """The error names one of the results."""
    run, folder, old = evaluation
    for kind in ("write", "replace"):
        with at_every_step(
            folder / "results", lambda step, each, kind=kind: kind == each and full_from(0)(step, each)
        ):
            status, (line,) = run()
        assert status == 1 and os.strerror(errno.ENOSPC) in line and ".tmp" not in line
        assert any(name in line for name in RESULTS)
        files = files_in(folder)
        assert {name: files[name] for name in old} == old and not has_leftovers(folder)


# Files written for Keras


def test_full_disk_is_not_taken_for_a_file_that_keras_cannot_read(reference_files):
    """Otherwise the reference would be a model rebuilt from our reader's graph, as for files of Keras 2."""
    file = read_keras_file(reference_files / "odd.h5")
    with file_size_limit(20_000):
        keras = Keras()  # its process inherits the limit
    with keras, pytest.raises(JobError, match="OSError"):
        keras.reference(file, *[np.zeros((1, 4, 21, 30))] * 2, Normalization.from_args(4))


def test_archive_for_keras_in_1970(monkeypatch):
    """ZIP has no date before 1980; the clock of a machine without a battery starts in 1970."""
    names, content = ["config.json", "metadata.json", "model.weights.h5"], io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with zipfile.ZipFile(io.BytesIO(replace_config(content.getvalue(), {"checked": True}))) as archive:
        assert sorted(archive.namelist()) == names
        assert json.loads(archive.read("config.json")) == {"checked": True}
