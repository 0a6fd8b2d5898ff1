"""Fixtures for the tests of the Keras readers."""

import zipfile

import pytest

from tests.keras_files.reading import ForkedReader


@pytest.fixture
def forked_reader(monkeypatch):
    """Read Keras files in a fork, with the job's limits."""
    monkeypatch.setattr("models.keras.file.Job", ForkedReader)


@pytest.fixture
def archive(keras_files, tmp_path):
    """Return a function that copies `plain.keras` with members replaced, added, or (None) left out."""

    def make(compression=zipfile.ZIP_STORED, **members):
        members = {name.replace("__", "."): content for name, content in members.items()}
        path = tmp_path / "model.keras"
        with (
            zipfile.ZipFile(keras_files / "keras" / "plain.keras") as source,
            zipfile.ZipFile(path, "w", compression) as target,
        ):
            for name in {**dict.fromkeys(source.namelist()), **members}:
                content = members[name] if name in members else source.read(name)
                if content is not None:
                    target.writestr(name, content)
        return path

    return make
