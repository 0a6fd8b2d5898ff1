"""What the tests of several rooms share: Keras files and references, written once; the processes behind them.

The tests run on all cores, in processes of their own (pytest-xdist). What takes seconds to make is made once:
for all of them (`written`), or in one of them, which runs the tests that need it (`TOGETHER`).
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a core: more threads would only be in their way
    os.environ["OMP_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = "1"

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from convert import convert_file
from models.common.errors import KerasFileError
from models.conversion.matching import match_graph
from models.conversion.tensors import map_tensors
from models.keras.file import read_keras_file, start_reader
from models.keras.process import KerasProcess
from models.resnet8 import ResNet8
from tests.evaluating import converted, real, sample  # noqa: F401  # fixtures
from tests.keras_files.networks import WRITERS

ROOT = Path(__file__).parents[1]
TOGETHER = {  # how the names of tests begin that share what is made in seconds -> what that is
    "tests/test_proof.py": "keras",
    "tests/test_recipes.py": "recipes",
    "tests/test_back": "back",
    "tests/test_convert.py::test_damaged_sample": "keras",
    "tests/test_faults.py": "keras",
    "tests/test_formats.py::test_softmax": "keras",
    "tests/test_evaluate.py": "converted",
    "tests/test_training.py": "training",
    "tests/evaluation/test_baseline.py": "converted",
    "tests/evaluation/test_results.py": "converted",
    "tests/evaluation/test_runtimes.py": "converted",
}


class Scheduling(LoadScopeScheduling):
    """Gives out test by test, to whichever process is free, but those of a group in TOGETHER all to one."""

    def _split_scope(self, nodeid):
        return next((group for start, group in TOGETHER.items() if nodeid.startswith(start)), nodeid)


def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    """Put first what takes long, so that no process is left alone with it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Return a function that returns a folder which Python programs have filled.

    The first of the tests' processes that asks for `name` runs the programs, each with the arguments that
    `programs` maps its part of the folder to; the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the folder above all processes'

    def write(name, programs):
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                run_programs({folder / part: arguments for part, arguments in programs.items()})
                done.touch()
        return folder

    return write


def run_programs(programs):
    """Run `python -m MODULE FOLDER ...` for each folder's (module, further arguments), all at once."""
    command = [sys.executable, "-W", "ignore", "-m"]
    processes = []
    for folder, (module, *arguments) in programs.items():
        folder.mkdir(parents=True, exist_ok=True)
        program = [*command, module, folder, *arguments]
        processes.append(subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, log = process.communicate(timeout=600)
        assert process.returncode == 0, log[-3000:]


@pytest.fixture(scope="session")
def keras_files(written):
    """Return the folder with `keras/` and `tf_keras/`, each as `tests.keras_files.writer` writes it."""
    return written("keras_files", {writer: ("tests.keras_files.writer", writer) for writer in WRITERS})


@pytest.fixture(scope="session")
def expected(keras_files):
    """Return Keras's float64 results by writer: `VARIANT:images` and `VARIANT:outputs`."""
    return {writer: np.load(keras_files / writer / "expected.npz") for writer in WRITERS}


@pytest.fixture(scope="session")
def reference_files(written):
    """Return the folder that `tests.keras_files.references` writes, with a Keras file for each of MODELS."""
    return written("references", {"": ("tests.keras_files.references",)})


@pytest.fixture(scope="session")
def reference(reference_files):
    """Return what Keras computed with them, in float64."""
    with np.load(reference_files / "reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def reader():
    with start_reader() as worker:
        yield worker


class RememberingKeras(KerasProcess):
    """Keras itself, asked only once for the same thing: what it computes does not depend on our mistakes."""

    def __init__(self):
        super().__init__()
        self.answers = {}

    def load(self, file):
        if file.sha256 not in self.answers:
            self.answers = {file.sha256: super().load(file)}
        return self.answers[file.sha256]

    def activations(self, *asked):
        return self.remembered(super().activations, *asked)

    def predict(self, *asked):
        return self.remembered(super().predict, *asked)

    def remembered(self, ask, images, *options):
        pixels = hashlib.sha256(np.ascontiguousarray(images)).digest()
        key = (ask.__name__, pixels, images.shape, str(images.dtype), str(options))
        if key not in self.answers:
            self.answers[key] = ask(images, *options)
        return self.answers[key]


@pytest.fixture(scope="session")
def keras():
    with RememberingKeras() as process:
        yield process


@pytest.fixture
def refusal(reader, tmp_path):
    """Return a function that converts a file that must be refused, and returns what the message says.

    It sees to it that the message is one line, and that an older output is untouched.
    """
    folder = tmp_path / "outputs"
    folder.mkdir()
    output = folder / "model.pt"
    old = {output: b"old checkpoint", output.with_suffix(".json"): b"old metadata"}

    def refuse(path, **options):
        for name, content in old.items():
            name.write_bytes(content)
        with pytest.raises(KerasFileError) as caught:
            convert_file(Path(path), output, reader, **options)
        assert {name: name.read_bytes() for name in folder.iterdir()} == old
        message = str(caught.value)
        assert len(message.splitlines()) == 1, message
        return message.removeprefix(f"{path}: ")

    return refuse


@pytest.fixture
def old_outputs(tmp_path):
    """Return a path where an older checkpoint and its JSON lie, and a function that sees if they still do.

    By the JSON, `convert.py` wrote them, so it may replace them.
    """
    path = tmp_path / "out" / "model.pt"
    path.parent.mkdir()
    content = b"old checkpoint"
    metadata = {"architecture": {"bn_eps": 1}, "source": {"file": "old.h5"}}
    metadata = json.dumps({**metadata, "sha256": hashlib.sha256(content).hexdigest()})
    contents = {path: content, path.with_suffix(".json"): metadata.encode()}
    for file, content in contents.items():
        file.write_bytes(content)

    def untouched():
        return {file: file.read_bytes() for file in path.parent.iterdir()} == contents

    return path, untouched


@pytest.fixture
def locked(reference_files):
    """Return a folder with a Keras file, `odd.h5`, into which nobody can write, not even the tests as root.

    Until the end of the test, its process is another user's then: let this be the last of its fixtures.
    """
    users, root = os.getresuid(), os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(reference_files / "odd.h5", folder)
        os.chmod(folder, 0o555)
        os.setresuid(*((65534, 65534, 0) if root else users))
        yield Path(folder)
        os.setresuid(*users)
        os.chmod(folder, 0o755)


@pytest.fixture
def network(reference_files, reader, tmp_path):
    """Return a function that converts one of MODELS: (the network in float64, the rows of the mapping)."""

    def convert_model(name):
        convert_file(reference_files / f"{name}.h5", tmp_path / "model.pt", reader)
        model = ResNet8.from_checkpoint(tmp_path / "model.pt").double()
        file = read_keras_file(reference_files / f"{name}.h5", reader)
        return model, map_tensors(match_graph(file), model)

    return convert_model


@pytest.fixture
def edited(keras_files, tmp_path):
    """Return a function that copies a valid file and has it changed by `edit(h5py.File)`."""

    def make(edit, name="plain.h5", writer="keras"):
        path = tmp_path / Path(name).name
        path.write_bytes((keras_files / writer / name).read_bytes())
        with h5py.File(path, "r+") as file:
            edit(file)
        return path

    return make
