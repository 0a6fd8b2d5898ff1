"""models/common/files.py: formats are detected, files are written completely or not at all."""

import errno
import io
import itertools
import os
import pickle
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
from models.common.files import (
    Format,
    check_writable,
    detect_content,
    detect_format,
    is_checkpoint,
    json_path,
    read_metadata,
    read_regular,
    sha256_of,
    write_atomically,
    write_files,
)
from tests.evaluating import random_model
from tests.faults import at_every_step, check_whole, files_in, full_from
from tests.runtime_files import write_onnx, write_tflite

OLD = {"one": b"old one", "two": b"old two"}
NEW = {"one": b"new one " * 3, "two": b"new two " * 3}


@pytest.fixture
def old(tmp_path):
    """Return the paths of the files of OLD, and a function: whether the folder is unchanged."""
    for name, content in OLD.items():
        (tmp_path / name).write_bytes(content)
    return *[tmp_path / name for name in OLD], lambda: files_in(tmp_path) == OLD


def write_new(folder):
    """Write the files of NEW, each in three pieces."""

    def writer(content):
        return lambda file: [file.write(content[:8]) for _ in range(3)]

    write_files({folder / name: writer(content) for name, content in NEW.items()})


# Completely or not at all


def test_writes_into_new_folders_and_replaces_files(old):
    one, _, _ = old
    path = one.parent / "new" / "folder" / "file"
    write_files({path: lambda file: file.write(b"content"), one: lambda file: file.write(b"1")})
    assert (path.read_bytes(), one.read_bytes()) == (b"content", b"1")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [True, False])
def test_writer_that_raises_changes_nothing(old, error, first):
    one, two, is_unchanged = old

    def fail(file):
        file.write(b"half of")
        raise error

    writers = {one: fail, two: lambda file: file.write(b"2"), two.with_name("new"): lambda file: None}
    with pytest.raises(error):
        write_files(writers if first else dict(reversed(writers.items())))
    assert is_unchanged() and len(list(one.parent.iterdir())) == 2


def test_killed_before_any_step_leaves_each_file_whole(tmp_path):
    """By SIGKILL before the first step, the second, ... until the process finishes."""
    kept = []

    def kill_before(step):
        return lambda number, _: number == step and os.kill(os.getpid(), signal.SIGKILL)

    for step in itertools.count():
        for name, content in OLD.items():
            (tmp_path / name).write_bytes(content)
        if (child := os.fork()) == 0:
            with at_every_step(tmp_path, kill_before(step)):
                write_new(tmp_path)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        kept.append(files_in(tmp_path))
        check_whole(kept[-1], OLD, NEW)
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert len(kept) > 2 * len(["open", "write", "write", "write", "fsync", "replace"])
    assert kept[0] == OLD and kept[-1] == NEW
    assert any(OLD != each != NEW for each in kept)  # between the two renames


def test_full_disk_at_any_step_leaves_each_file_whole(old):
    one, two, _ = old
    for step in itertools.count():
        for name, content in OLD.items():
            (one.parent / name).write_bytes(content)
        try:
            with at_every_step(one.parent, full_from(step)) as kinds:
                write_new(one.parent)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC and error.filename in (str(one), str(two))
            check_whole(files_in(one.parent), OLD, NEW)
            assert sorted(one.parent.iterdir()) == [one, two]
    assert step > 10 and files_in(one.parent) == NEW
    assert [kind for kind in kinds if kind in ("fsync", "replace")] == ["fsync"] * 2 + ["replace"] * 2


def test_link_and_mode_stay(old):
    one, _, _ = old
    one.chmod(0o600)
    (folder := one.parent / "elsewhere").mkdir()
    links = {one.parent / "to one": one, one.parent / "to new": folder / "new"}
    for link, target in links.items():
        link.symlink_to(target)
    write_files({link: lambda file: file.write(b"new") for link in links})
    assert all(link.is_symlink() and target.read_bytes() == b"new" for link, target in links.items())
    assert one.stat().st_mode & 0o777 == 0o600 and list(folder.iterdir()) == [folder / "new"]


# Files that cannot be read or written


def test_only_regular_files_are_read_and_replaced(old):
    one, _, is_unchanged = old
    os.mkfifo(pipe := one.with_name("pipe"))
    (link := one.with_name("link")).symlink_to("/dev/null")
    for path in (pipe, Path("/dev/zero"), link):
        for act in (read_regular, sha256_of, detect_format, check_writable):
            with pytest.raises(OSError) as caught:
                act(path)
            assert caught.value.errno == errno.EINVAL and caught.value.filename == str(path)
        with pytest.raises(OSError):
            write_files({one: lambda file: file.write(b"1"), path: lambda file: file.write(b"2")})
    assert pipe.is_fifo() and link.is_symlink() and Path("/dev/null").is_char_device()
    assert [read_regular(one, limit) for limit in (None, 3, 99)] == [b"old one", b"old", b"old one"]
    with pytest.raises(IsADirectoryError):
        read_regular(one.parent)
    link.unlink()
    assert is_unchanged()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_files_of_proc_are_empty():
    """Their size is 0; opening /proc/kmsg would block."""
    assert read_regular(Path("/proc/self/status")) == b""
    assert detect_format(Path("/proc/self/status")) is Format.EMPTY


def test_obstacles_are_found_before_writing(old):
    one, two, _ = old
    (folder := one.with_name("folder")).mkdir()
    assert check_writable(one) is check_writable(folder / "new" / "file") is None
    for path, error, obstacle in (
        (folder, IsADirectoryError, folder),
        (one / "file", NotADirectoryError, one),
        (one / "new" / "file", NotADirectoryError, one),
    ):
        for act in (check_writable, lambda path: write_files(dict.fromkeys((two, path), lambda _: None))):
            with pytest.raises(error) as caught:
                act(path)
            assert caught.value.filename == str(obstacle)
    assert two.read_bytes() == OLD["two"] and len(list(one.parent.iterdir())) == 3


def test_locked_folder_is_found_before_writing(locked):
    content = (locked / "odd.h5").read_bytes()
    for path in (locked / "odd.h5", locked / "new" / "file"):
        for act in (check_writable, lambda path: write_atomically(path, lambda file: file.write(b"1"))):
            with pytest.raises(PermissionError) as caught:
                act(path)
            assert caught.value.filename == str(locked)
    assert (locked / "odd.h5").read_bytes() == content


# Formats


def archive(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return buffer.getvalue()


def header(text):
    return len(text).to_bytes(8, "little") + text


CONTENTS = {
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), Format.HDF5),
    "HDF5, its magic cut": (b"\x89HDF\r\n", Format.UNKNOWN),
    "Keras archive": (archive("metadata.json", "config.json", "model.weights.h5"), Format.KERAS),
    "a part of one": (archive("config.json"), Format.KERAS),
    "torch.save": (archive("model/data.pkl", "model/data/0"), Format.TORCH),
    "TorchScript": (archive("model/data.pkl", "model/constants.pkl", "model/code/x.py"), Format.TORCHSCRIPT),
    "torch.export": (archive("m/models/model.json", "m/data/weights/weight_0"), Format.EXPORTED),
    "torch.export of 2.6": (archive("serialized_exported_program.json"), Format.EXPORTED),
    "npz": (archive("weights.npy"), Format.ZIP),
    "damaged archive": (b"PK\x03\x04" + bytes(99), Format.ZIP),
    "TFLite": (b"\x1c\0\0\0TFL3" + bytes(99), Format.TFLITE),
    "safetensors": (header(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'), Format.SAFETENSORS),
    "a huge header": ((2**40).to_bytes(8, "little") + b"{}" + bytes(9), Format.UNKNOWN),
    "pickle": (pickle.dumps({"a": 1}), Format.UNKNOWN),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", Format.LFS),
    "a path": (b"../models/resnet 8.h5\n", Format.LINK),
    "a path of Windows": (b"..\\models\\resnet8.keras", Format.LINK),
    "a sentence": (b"Convert model.h5 first", Format.UNKNOWN),
    "HDF5, LF": (b"\x89HDF\n\x1a\n" + bytes(99), Format.LINE_ENDS),
    "HDF5, CRLF": (b"\x89HDF\r\r\n\x1a\r\n" + bytes(99), Format.LINE_ENDS),
    "a page": (b"\n\n<!DOCTYPE html>\n<html lang=en>", Format.WEB_PAGE),
    "another page": (b"<html><head>", Format.WEB_PAGE),
    "AppleDouble": (b"\0\5\x16\7\0\2\0\0Mac OS X", Format.APPLE_DOUBLE),
    "TensorFlow's list": (b'model_checkpoint_path: "ckpt-1"\n', Format.TF_CHECKPOINT),
    "text": ("täglich\n".encode() * 99, Format.UNKNOWN),
    "empty": (b"", Format.EMPTY),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_format_is_detected_by_content(tmp_path, name):
    content, expected = CONTENTS[name]
    assert detect_content(io.BytesIO(content)) is expected
    (tmp_path / "model.pt").write_bytes(content)
    assert detect_format(tmp_path / "model.pt") is expected


def test_files_of_libraries_and_folders_are_detected(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.onnx"
    for write, expected in (
        (write_tflite, Format.TFLITE),
        (write_onnx, Format.ONNX),
        (lambda path: torch.save(random_model(width=1).state_dict(), path), Format.TORCH),
        (lambda path: save_file({"a": torch.zeros(2)}, path), Format.SAFETENSORS),
    ):
        write(path)
        assert detect_format(path) is expected
        assert is_checkpoint(path) == (expected in (Format.TORCH, Format.SAFETENSORS))
    assert detect_format(tmp_path) is Format.FOLDER
    (tmp_path / "saved_model.pb").touch()
    assert detect_format(tmp_path) is Format.SAVED_MODEL
    with pytest.raises(FileNotFoundError):
        detect_format(tmp_path / "missing")


def saved_model(path):
    path.mkdir()
    (path / "saved_model.pb").touch()


OTHERS = {  # a file -> how it is written, and a word about its format or the next step
    "lite.tflite": (write_tflite, "float32"),
    "pt.pt": (write_onnx, "damaged"),
    "e.pt2": (lambda path: path.write_bytes(archive("m/models/model.json")), "torch.export"),
    "l.pt": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "page.h5": (lambda path: path.write_text("<!DOCTYPE html>"), "raw file"),
    "._x.h5": (lambda path: path.write_bytes(b"\0\5\x16\7" + bytes(99)), "'._'"),
    "ends.h5": (lambda path: path.write_bytes(b"\x89HDF\n\x1a\n" + bytes(99)), "binary"),
    "link.keras": (lambda path: path.write_text("../other/model.keras"), "symbolic link"),
    "ckpt.index": (lambda path: path.write_bytes(bytes(99)), "model.save"),
    "ckpt.data-00000-of-00001": (lambda path: path.write_bytes(bytes(99)), "model.save"),
    "x.weights.json": (lambda path: path.write_text('{"weight_map": {}}'), "sharded"),
    "folder": (saved_model, "SavedModel"),
    "text.json": (lambda path: path.write_text("{}"), "unknown"),
    "n.npz": (lambda path: np.savez(path, a=np.zeros(2)), "ZIP"),
    "pipe.h5": (os.mkfifo, "pipe"),
    "pipe.pt": (os.mkfifo, "pipe"),
}


def test_convert_names_other_formats(tmp_path, monkeypatch, capsys):
    """One line per file, and nothing is written."""
    for name, (write, _) in OTHERS.items():
        write(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert.py", *OTHERS, "--no-verify", "-o", "out/"])
    assert convert.main() == 1
    for (name, (_, word)), line in zip(OTHERS.items(), capsys.readouterr().err.splitlines(), strict=True):
        assert line.startswith(f"error: {name}: ") and word in line, line
    assert sorted(tmp_path.rglob("*")) == before


# The JSON beside a file


def test_no_two_files_share_a_json(tmp_path):
    names = ["x.pt", "x.pth", "x.h5", "x.keras", "x.safetensors", "x.tflite"]
    paths = [json_path(tmp_path / name).name for name in names]
    assert paths[:2] == ["x.json", "x.pth.json"] and len(set(paths)) == len(names)


def test_json_of_earlier_versions_is_read(tmp_path):
    (tmp_path / "x.json").write_text('{"architecture": {"bn_eps": 0.5}}')
    for name in ("x.pth", "x.safetensors"):
        assert read_metadata(tmp_path / name)["architecture"] == {"bn_eps": 0.5}
    assert read_metadata(tmp_path / "x.tflite") == read_metadata(tmp_path / "x.h5") == {}
    (tmp_path / "x.pth.json").write_text("{}")
    assert read_metadata(tmp_path / "x.pth") == {}
