"""What is no ResNet8 is refused, in one line that names the layer, what it is and what was expected."""

import re

import h5py
import pytest

from tests.keras_models import REFUSED, WEIGHTS_ALONE_REFUSED, WRITERS


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_computes_something_else(keras_files, refusal, name, suffix, writer):
    message = refusal(keras_files / writer / "refused" / f"{name}{suffix}")
    words = set(re.findall(r"[\w.-]+", message.lower()))
    missing = [word for word in REFUSED[name][1].lower().split() if not any(word in found for found in words)]
    assert not missing, f"{missing} not in: {message}"
    assert "damaged" not in message and "Error" not in message, message


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", WEIGHTS_ALONE_REFUSED)
def test_refuses_weights_alone_of_another_network(keras_files, refusal, name, writer):
    message = refusal(keras_files / writer / "refused" / f"{name}.weights.h5")
    assert all(word in message for word in WEIGHTS_ALONE_REFUSED[name].split()), message


@pytest.mark.parametrize("name", ["no_scale", "no_center"])
def test_refuses_weights_alone_that_are_not_unique(keras_files, refusal, name):
    """Three vectors may be gamma or beta with the statistics: only names could tell."""
    assert "gamma or beta" in refusal(keras_files / "keras" / f"{name}.weights.h5")


@pytest.mark.parametrize("writer", WRITERS)
def test_refuses_weights_alone_of_nested_models(keras_files, refusal, writer):
    """Running numbers order the layers of one model, but not those of a model and of another inside it."""
    message = refusal(keras_files / writer / "nested_stages.weights.h5")
    assert re.search(
        r"'batch_normalization', 'functional/batch_normalization'.*do not say which is first", message
    )


def test_refuses_weights_alone_of_partly_frozen_models(keras_files, refusal):
    """Keras 2 saves the frozen layers after the others: two convolutions of one shape would change places."""
    message = refusal(keras_files / "tf_keras" / "nested_partly_frozen.legacy.h5")
    assert re.search(r"layers of model 'model.*' are not saved in their order.*frozen", message)


def test_refuses_channels_first(keras_files, refusal, tmp_path):
    """Keras on a CPU cannot build it, but a file can say it; nothing else about the file would change."""
    path = tmp_path / "model.h5"
    path.write_bytes((keras_files / "keras" / "plain.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        config = file.attrs["model_config"]
        changed = config.replace('"data_format": "channels_last"', '"data_format": "channels_first"', 1)
        assert changed != config
        file.attrs["model_config"] = changed
    assert re.search(
        r"layer 'conv2d.*data_format is 'channels_first', expected 'channels_last'", refusal(path)
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "neither an HDF5 file nor a .keras archive"),
        (b"GIF89a", "neither an HDF5 file nor a .keras archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (b"\x89HDF\r\n\x1a\n", "damaged"),
        (b"PK\x03\x04", "damaged"),
    ],
)
def test_refuses_what_is_no_keras_file(refusal, tmp_path, content, words):
    (tmp_path / "model.h5").write_bytes(content)
    assert words in refusal(tmp_path / "model.h5")


def test_refuses_what_cannot_be_read(refusal, tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.h5")
    assert "directory" in refusal(tmp_path)


def test_refuses_hdf5_of_another_program(refusal, tmp_path):
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file["x"] = [1.0]
    assert "not of Keras" in refusal(tmp_path / "model.h5")
