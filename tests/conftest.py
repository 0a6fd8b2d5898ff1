"""Keras files, written once by Keras itself in processes of their own; the process that reads them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert import convert_file
from models.keras_file import KerasFileError, start_reader
from tests.keras_models import WRITERS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def keras_files(tmp_path_factory):
    """Return the folder with `keras/` and `tf_keras/`, each as `tests.keras_models` writes it."""
    folder = tmp_path_factory.mktemp("keras_files")
    command = [sys.executable, "-W", "ignore", "-m", "tests.keras_models"]
    processes = [
        subprocess.Popen([*command, folder / writer, writer], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for writer in WRITERS
    ]
    for process in processes:
        _, log = process.communicate(timeout=600)
        assert process.returncode == 0, log[-3000:]
    return folder


@pytest.fixture(scope="session")
def expected(keras_files):
    """Return Keras's float64 results by writer: `VARIANT:images` and `VARIANT:outputs`."""
    return {writer: np.load(keras_files / writer / "expected.npz") for writer in WRITERS}


@pytest.fixture(scope="session")
def reader():
    with start_reader() as worker:
        yield worker


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
