"""CIFAR-10 as numpy arrays: the official test and training sets, and parts of the test set.

Parts are the bundled sample, and MLPerf Tiny's images to judge and to calibrate int8 models by.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images";
https://www.cs.toronto.edu/~kriz/cifar.html. All is read as records of its binary version: one label byte
(0 to 9), then 3,072 pixel bytes: the 32 x 32 red plane row by row, then green, then blue.
"""

import hashlib
import os
import socket
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path

import numpy as np

from data.files import write_atomically

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD_BYTES = 1 + 3 * 32 * 32

ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # from the page above
BINARY_FOLDER, PYTHON_FOLDER = "cifar-10-batches-bin", "cifar-10-batches-py"
BATCH_RECORDS = 10_000
BATCHES = {  # split -> file -> SHA-256, of the members of the official archive
    "test": {"test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"},
    "training": {
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    },
}
SAMPLE_FILE = Path(__file__).with_name("cifar10-sample-1000.bin")  # data/README.md shows how it was made
SAMPLE_RECORDS = 1_000
SAMPLE_SHA256 = "2874326af7bc2185faa47540a6da15a077e5b66659f8e479abb9ab628170fa86"
# mlcommons/tiny, benchmark/training/image_classification/get_perf_samples_idxs.py
PERF_SEED, PERF_IMAGES_PER_CLASS = 8108, 20
CALIBRATION_FILE = Path(__file__).with_name("mlperf-tiny-calibration.txt")  # its source: data/README.md
CALIBRATION_SHA256 = "b29cc155c261fc951e9084f80e064882d8b8f88e0a88dcee72d2691a691305b0"
NETWORK_TIMEOUT = 20.0  # seconds without a byte


class DataError(Exception):
    """The data cannot be had; the message is one line for the user."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, and what to call them."""

    name: str  # "CIFAR-10 test set", "CIFAR-10 sample", "MLPerf Tiny perf set" or "... calibration set"
    images: np.ndarray  # (N, 3, 32, 32) uint8, NCHW, RGB
    labels: np.ndarray  # (N,) int64, 0 to 9
    sha256: str  # hex digest of the N records, whichever version they were read from
    notice: str = ""  # one line for the user, when these are fewer images than asked for
    part: str = ""  # of the test set: "sample", "perf" or "calibration"; "" for all of it

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return an image, (3, 32, 32) uint8, and its label; so a torch `DataLoader` takes a `Dataset`."""
        return self.images[index], int(self.labels[index])

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self):,} images)"

    @property
    def is_sample(self) -> bool:
        """Whether it is the bundled sample of the test set."""
        return self.part == "sample"


@contextmanager
def _os_errors_as_data_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(str(error)) from error


PARTS = ("auto", "full", "sample", "perf", "calibration")  # what `load_test` can return


@_os_errors_as_data_errors()
def load_test(data_dir: str | Path, which: str = "auto", download: bool = False) -> Dataset:
    """Return the official test set of 10,000 images, or a part of it.

    `which` is "full", the official test set: the binary, else the Python version in `data_dir`, else (with
    `download`) what is fetched into `data_dir`; "sample", the 1,000 bundled images of it; "auto", the first
    of these that is there; or, of the official test set, MLPerf Tiny's images, in its order: "perf", the 200
    that its runner judges by, or "calibration", the 500 for quantization.
    Raises DataError when the data is missing, is not what it should be, or cannot be downloaded; ValueError
    for another `which`.
    """
    if which not in PARTS:
        raise ValueError(f"which is {which!r}, expected one of {', '.join(PARTS)}")
    data_dir, notice = Path(data_dir), ""
    if which != "sample":
        records = _official_records(data_dir, "test", download)
        if records is not None:
            return _part_of_test_set(records, which)
        if which != "auto":
            raise DataError(f"{_not_found(data_dir, 'test')}: --download gets it")
        notice = f"{_not_found(data_dir, 'test')}: using 1,000 of its 10,000 images; --download gets them all"
    records = _read(SAMPLE_FILE, SAMPLE_RECORDS, SAMPLE_SHA256)
    return _dataset("CIFAR-10 sample", records, notice, "sample")


@_os_errors_as_data_errors()
def load_train(data_dir: str | Path, download: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the official training set: (50000, 3, 32, 32) uint8 images, NCHW, and (50000,) uint8 labels.

    Searches and raises as `load_test` does with "full".
    """
    data_dir = Path(data_dir)
    records = _official_records(data_dir, "training", download)
    if records is None:
        raise DataError(f"{_not_found(data_dir, 'training')}: --download gets it")
    return _images_and_labels(records)


def perf_indices(labels: np.ndarray) -> np.ndarray:
    """Return which of the test set's images MLPerf Tiny's runner judges by: (200,) int64, in its order.

    `labels` are the whole test set's, (10000,), in the official order. Drawn as `get_perf_samples_idxs.py` of
    mlcommons/tiny draws them: 20 of each class, then all shuffled.
    """
    random = np.random.default_rng(PERF_SEED)
    classes = [np.flatnonzero(labels == label) for label in range(len(CLASS_NAMES))]
    drawn = [random.choice(indices, PERF_IMAGES_PER_CLASS, replace=False) for indices in classes]
    indices = np.concatenate(drawn)
    random.shuffle(indices)
    return indices


@_os_errors_as_data_errors()
def calibration_indices() -> np.ndarray:
    """Return which of the test set's images MLPerf Tiny calibrates by: (500,) int64, in its order.

    Raises DataError when their file is missing or damaged.
    """
    content = _checked(CALIBRATION_FILE.read_bytes(), CALIBRATION_SHA256, CALIBRATION_FILE)
    return np.loadtxt(content.decode().splitlines(), np.int64).ravel()


def _part_of_test_set(records: bytes, which: str) -> Dataset:
    """Return all of the test set's records, or MLPerf Tiny's."""
    if which in ("auto", "full"):
        return _dataset("CIFAR-10 test set", records)
    table = np.frombuffer(records, np.uint8).reshape(-1, RECORD_BYTES)
    indices = perf_indices(table[:, 0]) if which == "perf" else calibration_indices()
    return _dataset(f"MLPerf Tiny {which} set", table[indices].tobytes(), part=which)


def _not_found(data_dir: Path, split: str) -> str:
    return f"no complete CIFAR-10 {split} set in {data_dir} ({BINARY_FOLDER} or {PYTHON_FOLDER})"


def _dataset(name: str, records: bytes, notice: str = "", part: str = "") -> Dataset:
    images, labels = _images_and_labels(records)
    return Dataset(name, images, labels.astype(np.int64), hashlib.sha256(records).hexdigest(), notice, part)


def _images_and_labels(records: bytes) -> tuple[np.ndarray, np.ndarray]:
    table = np.frombuffer(records, np.uint8).reshape(-1, RECORD_BYTES)
    return table[:, 1:].copy().reshape(-1, 3, 32, 32), table[:, 0].copy()


def _official_records(data_dir: Path, split: str, download: bool) -> bytes | None:
    """Return the records of the "test" or "training" set, or None when `data_dir` does not hold them.

    `data_dir` may also be the official folder itself.
    """
    if data_dir.absolute().name in (BINARY_FOLDER, PYTHON_FOLDER):
        data_dir = data_dir.absolute().parent
    try:
        return _binary_version(data_dir, split)
    except FileNotFoundError:
        pass
    if (data_dir / PYTHON_FOLDER).is_dir():
        return _python_version(data_dir.absolute(), split)
    if download:
        _download(data_dir)
        return _binary_version(data_dir, split)
    return None


def _binary_version(data_dir: Path, split: str) -> bytes:
    folder = data_dir / BINARY_FOLDER
    return b"".join(_read(folder / name, BATCH_RECORDS, sha256) for name, sha256 in BATCHES[split].items())


def _read(path: Path, records: int, sha256: str) -> bytes:
    """Return the content of a file of so many records, once its size and SHA-256 are seen to be right."""
    size, expected = path.stat().st_size, records * RECORD_BYTES
    if size != expected:
        raise DataError(f"{path}: {size:,} bytes, expected {expected:,}: damaged, delete or restore it")
    return _checked(path.read_bytes(), sha256, path)


def _checked(content: bytes, sha256: str, path: Path) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{path}: SHA-256 {found}, expected {sha256}: damaged, delete or restore it")
    return content


def _download(data_dir: Path) -> None:
    """Fetch the official archive and put its batches into `data_dir`, each one whole and checked."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cifar-10-download-", dir=data_dir) as folder:
        archive = Path(folder).absolute() / "cifar-10-binary.tar.gz"
        _fetch(ARCHIVE_URL, ARCHIVE_MD5, archive, NETWORK_TIMEOUT)
        wanted = {f"{BINARY_FOLDER}/{name}": sha256 for s in BATCHES.values() for name, sha256 in s.items()}
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isreg() and member.name in wanted:  # nothing else in it is ever written
                    content = tar.extractfile(member).read()
                    content = _checked(content, wanted[member.name], archive / member.name)
                    write_atomically(data_dir / member.name, methodcaller("write", content))


# torchvision is imported where it is needed: it takes seconds. A process that imports TensorFlow too must
# have imported torchvision first, as `models/keras/train.py` does: the other order is a segmentation fault.


@contextmanager
def _torchvision() -> Iterator[None]:
    """Show what torchvision prints on a terminal only, and never on stdout; raise DataError with one line."""
    with ExitStack() as stack:
        shown = sys.stderr if sys.stderr.isatty() else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(shown))
        stack.enter_context(redirect_stderr(shown))
        try:
            yield
        except Exception as error:  # whatever damaged pickles and an unforeseen server lead torchvision to
            raise DataError(" ".join(str(error).split()) or type(error).__name__) from error


@_torchvision()
def _python_version(data_dir: Path, split: str) -> bytes:
    """Return the records of the pickled Python version; torchvision checks its MD5 before unpickling."""
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(data_dir, train=split == "training")
    except RuntimeError as error:  # torchvision's text advises a keyword argument of its own
        problem = "a file is missing or its MD5 is not the official one: delete or restore it"
        raise DataError(f"{data_dir}/{PYTHON_FOLDER}: {problem}") from error
    planes = dataset.data.transpose(0, 3, 1, 2).reshape(len(dataset), -1)  # from torchvision's NHWC
    return np.column_stack([np.array(dataset.targets, np.uint8), planes]).tobytes()


@_torchvision()
def _fetch(url: str, md5: str, path: Path, timeout: float) -> None:
    """Download `url` to `path`, with a progress bar, and check it; give up after `timeout` silent seconds."""
    from http.client import HTTPException

    from torchvision.datasets.utils import download_url

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)  # download_url itself would wait for ever
    try:
        download_url(url, path.parent, path.name, md5)
    except RuntimeError as error:
        raise DataError(f"cannot download {url}: cut short, or another file (MD5 is not {md5})") from error
    except (OSError, HTTPException) as error:
        raise DataError(f"cannot download {url}: {error}") from error
    finally:
        socket.setdefaulttimeout(before)
