"""models/checkpoint.py: a `.pt` file is loaded, or refused in one line, and never runs code."""

import io
import json
import re
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from models.keras.reader import limit_memory
from models.resnet8 import ResNet8


@pytest.fixture
def checkpoint(tmp_path):
    """Return an unusual ResNet8's checkpoint, the model, and the path of its JSON, which is not there."""
    torch.manual_seed(2)
    model = ResNet8(num_classes=7, width=8, in_channels=1, bn_eps=5e-3, bn_momentum=0.3).train()
    with torch.no_grad():
        model(torch.randn(8, 1, 16, 16))  # statistics of their own
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    return path, model.eval(), tmp_path / "model.json"


def test_from_checkpoint_finds_the_shape(checkpoint):
    path, model, json_path = checkpoint
    json_path.write_text(json.dumps({"architecture": {"bn_eps": 5e-3, "bn_momentum": 0.3}}))
    loaded = ResNet8.from_checkpoint(path)
    assert not loaded.training
    assert (loaded.fc.out_features, loaded.conv1.out_channels, loaded.conv1.in_channels) == (7, 8, 1)
    norms = [m for m in loaded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(5e-3, 0.3)] * 7
    images = torch.randn(3, 1, 20, 20)
    assert torch.equal(loaded(images), model(images))
    assert torch.equal(ResNet8.from_checkpoint(str(path), torch.device("cpu"))(images), model(images))


def test_from_checkpoint_without_json_has_kerass_defaults(checkpoint):
    path, model, _ = checkpoint
    loaded = ResNet8.from_checkpoint(path)
    assert (loaded.bn1.eps, loaded.layer3.bn2.momentum) == (1e-3, 0.01)
    images = torch.randn(3, 1, 20, 20)
    assert not torch.allclose(loaded(images), model(images))  # 5e-3 is what this network was trained with


def test_plain_recipe(tmp_path):
    torch.manual_seed(0)
    model = ResNet8()
    torch.save(model.state_dict(), tmp_path / "resnet8.pt")
    loaded = ResNet8()
    loaded.load_state_dict(torch.load(tmp_path / "resnet8.pt", weights_only=True))
    loaded.eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))


@pytest.fixture
def unread(monkeypatch):
    """See that a file is refused before torch reads it."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch reads it"))


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


BAD = {  # what is saved, from a good state_dict -> what the message names
    "other names": (lambda state: {f"x{name}": value for name, value in state.items()}, "fc.weight"),
    "no conv1": (lambda state: without(state, "conv1.weight"), "conv1.weight"),
    "no statistics": (lambda state: without(state, "layer2.bn1.running_var"), "layer2.bn1.running_var"),
    "one more": (lambda state: {**state, "layer4.conv1.weight": torch.zeros(1)}, "layer4.conv1.weight"),
    "another shape": (lambda state: {**state, "layer3.conv2.bias": torch.zeros(5)}, "layer3.conv2.bias"),
    "a scalar": (lambda state: {**state, "fc.weight": torch.zeros(())}, "ResNet8"),
    "a vector": (lambda state: {**state, "conv1.weight": torch.zeros(8)}, "ResNet8"),
    "a tensor": (lambda state: state["fc.weight"], "Tensor"),
    "a list": (lambda state: list(state.values()), "list"),
    "a number among them": (lambda state: {**state, "epoch": 3}, "epoch"),
    "a whole model": (lambda state: ResNet8(), "ResNet8"),
}


@pytest.mark.parametrize("name", BAD)
def test_from_checkpoint_refuses_in_one_line(checkpoint, name):
    path, model, _ = checkpoint
    change, named = BAD[name]
    torch.save(change(model.state_dict()), path)
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        ResNet8.from_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value).splitlines()) == 1


def test_from_checkpoint_refuses_an_empty_file(checkpoint):
    path, _, _ = checkpoint
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
        ResNet8.from_checkpoint(path)


@pytest.mark.usefixtures("unread")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory as Linux does")
@pytest.mark.parametrize("width", [1, 3_000_000])
def test_from_checkpoint_refuses_compressed_records_before_unpacking(checkpoint, width):
    """torch.save writes none, and torch would unpack one to any size: here 0.3 MB to 324 MB."""
    path, model, _ = checkpoint
    torch.save({**model.state_dict(), "conv1.bias": torch.zeros(width * 27)}, path)
    packed = path.with_name("packed.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    limit_memory(200 * 2**20)
    try:
        with pytest.raises(ValueError) as caught:
            ResNet8.from_checkpoint(packed)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert str(caught.value).startswith(f"{packed}: ") and len(str(caught.value).splitlines()) == 1


@pytest.mark.usefixtures("unread")
def test_from_checkpoint_refuses_records_larger_than_the_file(checkpoint):
    """By the archive's own table, which says what would be read."""
    path, _, _ = checkpoint
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    at = content.index(largest.filename.encode(), archive.start_dir) - 46  # of its row in the table
    assert content[at : at + 4] == b"PK\x01\x02"
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)  # both sizes
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
        ResNet8.from_checkpoint(path)


@pytest.mark.usefixtures("unread")
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_from_checkpoint_refuses_a_record_that_is_there_twice(checkpoint):
    """Readers differ in which of the two they take: what is checked may not be what is loaded."""
    path, _, _ = checkpoint
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data/0"))
        archive.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
        ResNet8.from_checkpoint(path)


def archive_of(name):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "{}")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", ""),
        (b"\x89HDF\r\n\x1a\n", "(?=.*HDF5).*convert.py"),
        (archive_of("config.json"), "(?=.*Keras).*convert.py"),
        (archive_of("other"), ""),
        (b"plain text", ""),
    ],
)
def test_from_checkpoint_says_what_another_file_is(checkpoint, content, named):
    path, _, _ = checkpoint
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + f".*{named}"):
        ResNet8.from_checkpoint(path)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_from_checkpoint_tells_other_archives_of_torch(checkpoint):
    """As what they are, with what to do: they are not damaged."""
    path, _, _ = checkpoint
    inputs = torch.zeros(1, 1)
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), inputs), path)
    with pytest.raises(ValueError, match=r"(?=.*TorchScript).*torch\.jit\.load"):
        ResNet8.from_checkpoint(path)
    torch.export.save(torch.export.export(nn.Linear(1, 1), (inputs,)), path)
    with pytest.raises(ValueError, match=r"torch\.export\.load"):
        ResNet8.from_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x89HDF\r\n\x1a\n", b"no checkpoint"])
def test_from_checkpoint_refuses_what_is_no_checkpoint(checkpoint, content):
    path, _, _ = checkpoint
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        ResNet8.from_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value).splitlines()) == 1


def test_from_checkpoint_refuses_a_file_cut_short(checkpoint):
    path, _, _ = checkpoint
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
        ResNet8.from_checkpoint(path)


def test_from_checkpoint_without_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ResNet8.from_checkpoint(tmp_path / "none.pt")
    with pytest.raises(OSError):
        ResNet8.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"architecture": []}',
        '{"architecture": null}',
        '{"architecture": {"bn_eps": "0.001"}}',
        '{"architecture": {"bn_eps": null}}',
        '{"architecture": {"bn_momentum": []}}',
        '{"architecture": {"bn_eps": true}}',
    ],
)
def test_from_checkpoint_refuses_a_bad_json_in_one_line(checkpoint, content):
    path, _, json_path = checkpoint
    json_path.write_text(content)
    with pytest.raises(ValueError) as caught:
        ResNet8.from_checkpoint(path)
    assert str(caught.value).startswith(f"{json_path}: ") and len(str(caught.value).splitlines()) == 1


def test_from_checkpoint_runs_no_code(checkpoint, tmp_path):
    class Mark:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    path, model, _ = checkpoint
    torch.save({**model.state_dict(), "fc.bias": Mark()}, path)
    torch.load(path, weights_only=False)
    (tmp_path / "mark").unlink()  # it is there: the file would have run its code
    with pytest.raises(ValueError, match=r"io\.open"):
        ResNet8.from_checkpoint(path)
    assert not (tmp_path / "mark").exists()
