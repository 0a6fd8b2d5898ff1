"""models/common/kinds.py: what a file is, told from its content; files of other kinds are named."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
from models.common.kinds import OTHER_SUFFIXES, Kind, kind_of, kind_of_content
from models.files.metadata import is_checkpoint
from tests.evaluating import ROOT, has_line, random_model
from tests.runtime_files import write_exported, write_onnx, write_tflite


def archive(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return buffer.getvalue()


def header(text):
    return len(text).to_bytes(8, "little") + text


CONTENTS = {
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), Kind.HDF5),
    "HDF5, its magic cut": (b"\x89HDF\r\n", Kind.UNKNOWN),
    "Keras archive": (archive("metadata.json", "config.json", "model.weights.h5"), Kind.KERAS),
    "a part of one": (archive("config.json"), Kind.KERAS),
    "torch.save": (archive("model/data.pkl", "model/data/0"), Kind.TORCH),
    "TorchScript": (archive("model/data.pkl", "model/constants.pkl", "model/code/x.py"), Kind.TORCHSCRIPT),
    "torch.export": (archive("m/models/model.json", "m/data/weights/weight_0"), Kind.EXPORTED),
    "torch.export of 2.6": (archive("serialized_exported_program.json"), Kind.EXPORTED),
    "npz": (archive("weights.npy"), Kind.ZIP),
    "damaged archive": (b"PK\x03\x04" + bytes(99), Kind.ZIP),
    "TFLite": (b"\x1c\0\0\0TFL3" + bytes(99), Kind.TFLITE),
    "safetensors": (header(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}') + b"1", Kind.SAFETENSORS),
    "a huge header": ((2**40).to_bytes(8, "little") + b"{}" + bytes(9), Kind.UNKNOWN),
    "ONNX": (b"\x08\x0a\x12\x01x\x1a\x011\x28\x05\x32\x02no\x3a\x05graph", Kind.ONNX),
    "ONNX, its graph cut": (b"\x08\x0a\x3a\xff\x01graph", Kind.ONNX),
    "ONNX, a long description": (b"\x08\x0a\x32\x80\x10" + b"x" * 2048 + b"\x3a\x01g", Kind.ONNX),
    "a string longer than the file": (b"\x08\x0a\x12\x7fx\x3a\x01g", Kind.UNKNOWN),
    "another message": (b"\x08\x0a\x9a\x01\x01x\x3a\x01g", Kind.UNKNOWN),
    "no version": (b"\x12\x01x\x3a\x01g", Kind.UNKNOWN),
    "two versions": (b"\x08\x0a\x08\x0a\x3a\x01g", Kind.UNKNOWN),
    "no graph": (b"\x08\x0a\x12\x01x", Kind.UNKNOWN),
    "pickle": (pickle.dumps({"a": 1}), Kind.UNKNOWN),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", Kind.LFS),
    "JSON": (b'{"a": [1, 2]}', Kind.TEXT),
    "text": ("täglich\n".encode() * 99, Kind.TEXT),
    "a letter cut by the end of what is read": (b"x" * 255 + "ä".encode() * 9, Kind.TEXT),
    "Latin-1": ("täglich\n".encode("latin-1"), Kind.UNKNOWN),
    "empty": (b"", Kind.EMPTY),
    "zeros": (bytes(999), Kind.UNKNOWN),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), Kind.UNKNOWN),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_a_kind_is_told_from_the_content(tmp_path, name):
    content, kind = CONTENTS[name]
    assert kind_of_content(io.BytesIO(content)) is kind
    (tmp_path / "model.pt").write_bytes(content)
    assert kind_of(tmp_path / "model.pt") is kind


def test_what_libraries_write_is_told(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x"
    for write, kind in (
        (write_tflite, Kind.TFLITE),
        (write_onnx, Kind.ONNX),
        (write_exported, Kind.EXPORTED),
    ):
        assert kind_of(write(path)) is kind
    torch.save(random_model(width=1).state_dict(), path)
    assert kind_of(path) is Kind.TORCH
    save_file({"a": torch.zeros(2)}, path)
    assert kind_of(path) is Kind.SAFETENSORS
    assert is_checkpoint(path)


def test_only_regular_files_are_opened(tmp_path):
    """A FIFO that nobody writes to would be waited for."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError) as caught:
        kind_of(tmp_path / "fifo")
    assert caught.value.filename == str(tmp_path / "fifo")
    assert kind_of(tmp_path) is Kind.FOLDER
    (tmp_path / "saved_model.pb").touch()
    assert kind_of(tmp_path) is Kind.SAVED_MODEL
    with pytest.raises(FileNotFoundError):
        kind_of(tmp_path / "missing")


def saved_model(path):
    path.mkdir()
    (path / "saved_model.pb").touch()


OTHERS = {  # a file -> what writes it, and what convert.py names: what it is, and what takes it
    "lite.tflite": (write_tflite, "TensorFlow Lite", "evaluate.py"),
    "o.onnx": (write_onnx, "ONNX", "evaluate.py"),
    "h5.h5": (write_onnx, "ONNX", "evaluate.py"),
    "pt.pt": (write_onnx, "ONNX", "evaluate.py"),
    "e.pt2": (write_exported, "torch.export", "evaluate.py"),
    "folder": (saved_model, "SavedModel", ".keras"),
    "text.json": (lambda path: path.write_text(json.dumps({"class_name": "Model"})),),
    "n.npz": (lambda path: np.savez(path, a=np.zeros(2)), "metadata.json"),
    "pipe.h5": (os.mkfifo,),
    "pipe2.pt": (os.mkfifo,),
}


def test_convert_names_what_is_of_another_kind(tmp_path):
    """In one run, one line a file, and nothing is written."""
    for name, (write, *_) in OTHERS.items():
        write(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, ROOT / "convert.py", *OTHERS, "--no-verify", "-o", "out/"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    for (name, (_, *words)), line in zip(OTHERS.items(), done.stderr.splitlines(), strict=True):
        assert has_line(line, name, *words), line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pipe_into_convert_is_one_line(tmp_path):
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    command = f"cat m.h5 | {sys.executable} {ROOT / 'convert.py'} /dev/stdin --no-verify -o m.pt"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "/dev/stdin" in line


@pytest.mark.parametrize("suffix", [*OTHER_SUFFIXES, ".ONNX"])
def test_a_state_dict_is_not_called_as_another_format(tmp_path, suffix):
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ValueError, match=rf"out\{suffix}"):
        convert.jobs_of([tmp_path / "m.h5"], str(tmp_path / f"out{suffix}"))


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.ckpt", "m.bin", "m.v1", "m"])
def test_other_names_are_as_they_were(tmp_path, name):
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (job,) = convert.jobs_of([tmp_path / "m.h5"], str(tmp_path / name))
    assert job.output == tmp_path / name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_file_of_no_size_is_not_opened():
    """/proc/kmsg would wait until the kernel has something to say."""
    assert kind_of(Path("/proc/self/status")) is Kind.EMPTY
