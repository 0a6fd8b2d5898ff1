"""An archive with other members."""

import zipfile

import pytest


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
