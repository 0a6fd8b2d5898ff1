"""models/keras/container.py and reader.py: no file takes time or memory to refuse."""

import re
import resource
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from models.common.errors import KerasFileError
from models.keras.file import read_keras_file, start_reader
from models.keras.reader import limit_memory
from tests.keras_files.edits import replace_kernel

MEMORY = 800 * 2**20  # what the reading process may take at most, Python, NumPy and HDF5 included


def peak_memory(path):
    """Read a file in a process of its own and return (message, the largest memory it had, in bytes)."""
    with start_reader() as worker:
        with pytest.raises(KerasFileError) as caught:
            read_keras_file(path, worker)
        status = Path(f"/proc/{worker.process.pid}/status")
        assert worker.process.poll() is None, f"the reader died: {caught.value}"
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return str(caught.value), peak


def huge(file, name):
    file.create_dataset(name, (2**38,), np.float32, chunks=(2**20,))  # 1 TB, of which nothing is stored


def huge_contiguous(file, name):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2**38,)), creation)


def huge_chunk(file, name):
    file.create_dataset(name, (3, 3, 3, 4), np.float32, maxshape=(None,) * 4, chunks=(2**9, 2**8, 2**6, 2**6))


def compressed(file, name):
    """A gigabyte of zeros in a megabyte."""
    data = file.create_dataset(name, (2**14, 2**14), np.float32, chunks=(2**10, 2**14), compression=9)
    chunk = zlib.compress(bytes(2**26))
    for row in range(0, 2**14, 2**10):
        data.id.write_direct_chunk((row, 0), chunk)


def overfull_chunk(file, name):
    """A chunk of the declared size that unpacks to a gigabyte: 64 times the same deflate block."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH)
    data = file.create_dataset(name, (3, 3, 3, 4), np.float32, chunks=(3, 3, 3, 4), compression=9)
    data.id.write_direct_chunk(
        (0, 0, 0, 0), b"\x78\x9c" + block * 64 + b"\x03\x00" + struct.pack(">I", (2**30 % 65521) << 16 | 1)
    )


def large_elements(file, name):
    file.create_dataset(name, (3, 3), np.dtype(("V", 2**24)))


def variable_strings(file, name):
    file.create_dataset(name, (3, 3, 3, 4), h5py.string_dtype())


def compound(file, name):
    file.create_dataset(name, (3, 3), np.dtype([("a", "<f4", (100,)), ("b", h5py.string_dtype())]))


def empty(file, name):
    file[name] = h5py.Empty("f4")


def scalar(file, name):
    file[name] = 1.0


def named_type(file, name):
    file[name] = np.dtype("f4")


def group_instead(file, name):
    file.create_group(name)


TENSORS = {
    "1 TB": (huge, f"{2**38}"),
    "1 TB contiguous": (huge_contiguous, f"{2**38}"),
    "2 GB chunk": (huge_chunk, "(3, 3, 3, 4)"),
    "compressed": (compressed, "compress"),
    "overfull chunk": (overfull_chunk, "compress"),
    "large elements": (large_elements, "(3, 3)"),
    "strings": (variable_strings, ""),
    "compound": (compound, ""),
    "empty": (empty, ""),
    "scalar": (scalar, ""),
    "named type": (named_type, "Datatype"),
    "group": (group_instead, ""),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_that_is_none_is_refused(edited, refusal, name):
    make, words = TENSORS[name]
    message = refusal(edited(replace_kernel(make)))
    assert words in message and ("kernel" in message or "conv2d" in message), message


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize(
    "name", ["1 TB", "1 TB contiguous", "2 GB chunk", "compressed", "overfull chunk", "large elements"]
)
def test_large_tensor_takes_no_memory(edited, name):
    message, peak = peak_memory(edited(replace_kernel(TENSORS[name][0])))
    assert TENSORS[name][1] in message and peak < MEMORY


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory as Linux does")
@pytest.mark.parametrize("width", [20_000, 1_000_000])
def test_wide_first_kernel_takes_no_memory(edited, refusal, width):
    """A network of the width that it claims would have 18 GB of weights, or far more."""

    def wide(file, name):
        file[name] = np.zeros((3, 3, 3, width), np.int8)

    path = edited(replace_kernel(wide))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    limit_memory(MEMORY)
    try:
        message = refusal(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert all(word in message for word in ("(4,)", f"({width},)", "conv1.bias")), message


def many_large(file):
    """A thousand tensors, each no larger than the file, of which nothing is stored."""
    for number in range(1000):
        file.create_dataset(f"model_weights/x{number}", (2**15,), np.float32)


def test_many_declared_tensors_take_no_memory(edited):
    message, peak = peak_memory(edited(many_large))
    assert "model_weights/x" in message and peak < MEMORY


def test_one_string_read_many_times_is_bounded(edited):
    """HDF5 would read four thousand names that all lie in one place as four gigabytes."""
    path = edited(lambda file: None, "plain.h5", "tf_keras")
    large, count = b"x" * 2**20, 4000
    with h5py.File(path, "r+") as file:
        group = file["model_weights/conv2d"]
        group.attrs.create("weight_names", [large, *[b"y%04d" % number for number in range(count - 1)]],
                           dtype=h5py.string_dtype())  # fmt: skip
    content = bytearray(path.read_bytes())
    # a reference is the string's length, its heap's address and its number there: all become the first one's
    at = content.index(struct.pack("<I", len(large)))
    while content.count(content[at : at + 16]) == 0 or content[at + 16 : at + 20] != struct.pack("<I", 5):
        at = content.index(struct.pack("<I", len(large)), at + 1)
    content[at : at + 16 * count] = content[at : at + 16] * count
    path.write_bytes(content)
    _, peak = peak_memory(path)
    assert peak < MEMORY


def test_zip_bomb_takes_no_memory(archive):
    message, peak = peak_memory(archive(zipfile.ZIP_DEFLATED, **{"model__weights__h5": bytes(2**28)}))
    assert "model.weights.h5" in message and peak < MEMORY


def test_large_attribute_is_no_configuration(edited, refusal):
    def edit(file):
        file.attrs.create("model_config", [file.attrs["model_config"]] * 3, dtype=h5py.string_dtype())

    assert "model_config" in refusal(edited(edit))
