"""The CIFAR-10 readers, the bundled sample, and the download (from a server on this machine)."""

import hashlib
import http.server
import io
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from data import cifar10
from data.cifar10 import (
    BINARY_FOLDER,
    CLASS_NAMES,
    PYTHON_FOLDER,
    RECORD_BYTES,
    SHA256,
    DataError,
    calibration_indices,
    load_test,
    load_train,
    perf_indices,
)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TEST_BATCH = SHARED / BINARY_FOLDER / "test_batch.bin"
needs_test_set = pytest.mark.skipif(not TEST_BATCH.exists(), reason=f"no {TEST_BATCH}")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Make 20 random records each the official batches; return their content by path in the data folder."""
    rng = np.random.default_rng(0)
    content = {}
    for name in SHA256:
        records = rng.integers(0, 256, (20, RECORD_BYTES), np.uint8)
        records[:, 0] %= 10
        content[name] = records.tobytes()
    monkeypatch.setattr(cifar10, "SHA256", {n: hashlib.sha256(c).hexdigest() for n, c in content.items()})
    monkeypatch.setattr(cifar10, "DATA_DIR", tmp_path / "data")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return content


@pytest.fixture
def pickled(tiny, monkeypatch):
    """Return the `tiny` batches in the Python version, by path."""
    content = {}
    for name, records in tiny.items():
        table = np.frombuffer(records, np.uint8).reshape(-1, RECORD_BYTES)
        batch = {b"data": table[:, 1:].copy(), b"labels": table[:, 0].tolist()}
        content[f"{PYTHON_FOLDER}/{Path(name).stem}"] = pickle.dumps(batch, protocol=2)
    md5 = {Path(name).name: hashlib.md5(batch).hexdigest() for name, batch in content.items()}
    monkeypatch.setattr(cifar10, "PYTHON_MD5", md5)
    return content


def write(data_dir, content):
    for name, data in content.items():
        (data_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (data_dir / name).write_bytes(data)


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records_of_test_set(tiny):
    return tiny[f"{BINARY_FOLDER}/test_batch.bin"]


def training_records(tiny):
    return b"".join(tiny[f"{BINARY_FOLDER}/data_batch_{i}.bin"] for i in range(1, 6))


def to_records(images, labels):
    return np.column_stack([labels.astype(np.uint8), images.reshape(len(images), -1)]).tobytes()


def data_error(function, *arguments, **options):
    """Return the message of the DataError, which is one line."""
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


# The bundled files


def test_sample_is_a_hundred_of_each_class():
    sample = load_test("/nowhere", "sample")
    assert (sample.name, sample.part, sample.notice) == ("CIFAR-10 sample", "sample", "")
    assert (sample.images.shape, sample.images.dtype) == ((1000, 3, 32, 32), np.uint8)
    assert (sample.labels.shape, sample.labels.dtype) == ((1000,), np.int64)
    assert np.bincount(sample.labels).tolist() == [100] * 10
    assert sample.images.flags.c_contiguous and sample.images.flags.writeable  # as torch.from_numpy requires
    assert to_records(sample.images, sample.labels) == cifar10.SAMPLE_FILE.read_bytes()
    assert sample.sha256 == hashlib.sha256(cifar10.SAMPLE_FILE.read_bytes()).hexdigest()
    assert repr(sample) == "Dataset('CIFAR-10 sample', 1,000 images)"


@needs_test_set
def test_readme_snippet_writes_the_sample(tmp_path):
    """Byte for byte: the first hundred of each class, in the official order."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / BINARY_FOLDER).symlink_to(TEST_BATCH.parent)
    readme = (ROOT / "data" / "README.md").read_text()
    snippet = readme.split("## Creating the sample")[1].split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    made = (tmp_path / "data" / "cifar10-sample-1000.bin").read_bytes()
    assert made == cifar10.SAMPLE_FILE.read_bytes()
    assert hashlib.sha256(made).hexdigest() in readme and SHA256[f"{BINARY_FOLDER}/test_batch.bin"] in readme


@pytest.mark.parametrize(
    ("constant", "load"),
    [("SAMPLE_FILE", lambda: load_test(which="sample")), ("CALIBRATION_FILE", calibration_indices)],
)
def test_a_damaged_bundled_file_is_refused(tmp_path, monkeypatch, constant, load):
    content = bytearray(getattr(cifar10, constant).read_bytes())
    content[500] ^= 1
    damaged = tmp_path / "damaged"
    monkeypatch.setattr(cifar10, constant, damaged)
    with pytest.raises(OSError, match=str(damaged)):
        load()
    damaged.write_bytes(content)
    assert str(damaged) in data_error(load)


def test_a_torch_data_loader_takes_a_data_set():
    from torch.utils.data import DataLoader

    sample = load_test("/nowhere", "sample")
    images, labels = next(iter(DataLoader(sample, batch_size=64)))
    assert (images.shape, str(images.dtype)) == ((64, 3, 32, 32), "torch.uint8")
    assert np.array_equal(images, sample.images[:64]) and np.array_equal(labels, sample.labels[:64])
    assert len(sample) == len(list(sample)) == 1000  # the iteration ends


# MLPerf Tiny's images


@needs_test_set
@pytest.mark.parametrize(("part", "count"), [("perf", 200), ("calibration", 500)])
def test_mlperf_tiny_images_are_the_official_ones_in_their_order(part, count):
    test_set, dataset = load_test(SHARED), load_test(SHARED, part)
    official = np.load(SHARED / "mlperf_tiny" / f"{part}_samples_idxs.npy")
    indices = perf_indices(test_set.labels) if part == "perf" else calibration_indices()
    assert np.array_equal(indices, official) and indices.dtype == np.int64
    assert (dataset.name, dataset.part, len(dataset)) == (f"MLPerf Tiny {part} set", part, count)
    records = to_records(test_set.images[official], test_set.labels[official])
    assert to_records(dataset.images, dataset.labels) == records
    assert dataset.sha256 == hashlib.sha256(records).hexdigest()
    if part == "perf":
        assert np.bincount(dataset.labels).tolist() == [20] * 10
        assert len({*calibration_indices()} & {*indices}) == 5


def test_calibration_indices_need_no_test_set():
    indices = calibration_indices()
    assert len(set(indices)) == 500 and indices.min() == 18 and indices.max() == 9950
    assert indices[:3].tolist() == [5802, 6250, 8108]


# The binary version


@needs_test_set
def test_official_test_set():
    for which in ("auto", "full"):
        test_set = load_test(SHARED, which)
        assert (test_set.name, test_set.part, test_set.notice) == ("CIFAR-10 test set", "", "")
        assert np.bincount(test_set.labels).tolist() == [1000] * 10
        assert to_records(test_set.images, test_set.labels) == TEST_BATCH.read_bytes()
        assert test_set.sha256 == SHA256[f"{BINARY_FOLDER}/test_batch.bin"]
    assert tuple((TEST_BATCH.parent / "batches.meta.txt").read_text().split()) == CLASS_NAMES


def test_planes_rows_and_columns(tmp_path, tiny):
    write(tmp_path, tiny)
    record = tiny[f"{BINARY_FOLDER}/test_batch.bin"][:RECORD_BYTES]
    image, label = load_test(tmp_path)[0]
    assert label == record[0]
    for channel, row, column in [(0, 0, 0), (0, 0, 31), (0, 1, 0), (1, 2, 3), (2, 31, 30)]:
        assert image[channel, row, column] == record[1 + 1024 * channel + 32 * row + column]


@pytest.mark.parametrize("version", ["binary", "Python"])
def test_both_versions_are_the_same_records(tmp_path, tiny, pickled, monkeypatch, version):
    """Also where the official folder itself is named, and where it is the current folder."""
    content = tiny if version == "binary" else pickled
    write(tmp_path, content)
    folder = tmp_path / Path(next(iter(content))).parent
    monkeypatch.chdir(folder)
    for data_dir in (tmp_path, str(tmp_path), folder, "."):
        test_set, (images, labels) = load_test(data_dir, "full"), load_train(data_dir)
        assert to_records(test_set.images, test_set.labels) == tiny[f"{BINARY_FOLDER}/test_batch.bin"]
        assert test_set.sha256 == cifar10.SHA256[f"{BINARY_FOLDER}/test_batch.bin"]
        assert (images.shape, images.dtype, labels.dtype) == ((100, 3, 32, 32), np.uint8, np.uint8)
        assert to_records(images, labels) == training_records(tiny)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "one bit"])
def test_a_damaged_batch_is_an_error_and_never_the_sample(tmp_path, tiny, damage):
    for name, load in (("test_batch.bin", load_test), ("data_batch_3.bin", load_train)):
        content = tiny[f"{BINARY_FOLDER}/{name}"]
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        damaged = {"cut": content[:-1], "longer": content + b"\0", "empty": b"", "one bit": flipped}[damage]
        tiny[f"{BINARY_FOLDER}/{name}"] = damaged
        write(tmp_path, tiny)
        for download in (False, True):
            assert str(tmp_path / BINARY_FOLDER / name) in data_error(load, tmp_path, download=download)
        assert files_below(tmp_path) == tiny  # the user's files, unchanged


class LeavesAMark:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_with_another_md5_is_not_unpickled(tmp_path, pickled):
    mark = tmp_path / "mark"
    hostile = pickle.dumps(LeavesAMark(mark))
    pickle.loads(hostile)
    mark.rmdir()  # so the pickle works
    write(tmp_path, dict.fromkeys(pickled, hostile))
    for load, name in ((load_test, "test_batch"), (load_train, "data_batch_1")):
        assert str(tmp_path / PYTHON_FOLDER / name) in data_error(load, tmp_path, download=True)
    assert not mark.exists()


# Missing data


def test_without_data_auto_is_the_sample_with_a_notice_and_no_network(tmp_path, tiny, monkeypatch):
    """Only where no folder is named: a named one without the whole set is an error."""
    monkeypatch.setattr(cifar10, "_download", lambda *arguments: pytest.fail("downloads"))
    del tiny[f"{BINARY_FOLDER}/test_batch.bin"], tiny[f"{BINARY_FOLDER}/data_batch_4.bin"]
    write(tmp_path / "incomplete", tiny)
    write(tmp_path / "data", {f"{PYTHON_FOLDER}/data_batch_2": b"without the others"})
    sample = load_test()
    assert sample.name == "CIFAR-10 sample" and "\n" not in sample.notice
    assert all(word in sample.notice for word in ("1,000", "--download", str(cifar10.DATA_DIR)))
    for data_dir in (None, tmp_path / "absent", str(tmp_path / "incomplete")):
        where = str(data_dir or cifar10.DATA_DIR)
        for part in ("auto", "full", "perf", "calibration")[data_dir is None :]:
            message = data_error(load_test, data_dir, part)
            assert "--download" in message and where in message
        message = data_error(load_train, data_dir)
        assert "--download" in message and where in message
    assert {path.name for path in tmp_path.iterdir()} == {"incomplete", "data"}


@pytest.mark.parametrize(
    "place", [PYTHON_FOLDER, f"{PYTHON_FOLDER}-target/{PYTHON_FOLDER}", f"{PYTHON_FOLDER}/{PYTHON_FOLDER}"]
)
def test_the_copy_of_keras_is_used_where_no_folder_is_named(tmp_path, tiny, pickled, place):
    datasets = tmp_path / "keras/datasets"
    write(datasets / place, {Path(name).name: content for name, content in pickled.items()})
    (datasets / f"{PYTHON_FOLDER}-target_archive").touch()  # as Keras leaves it
    assert (
        load_test().sha256
        == load_test(which="full").sha256
        == hashlib.sha256(records_of_test_set(tiny)).hexdigest()
    )
    assert to_records(*load_train()) == training_records(tiny)
    data_error(load_test, tmp_path / "data")


def test_another_part_is_an_error_and_not_the_whole():
    with pytest.raises(ValueError, match=r"perv.*calibration"):
        load_test(SHARED, "perv")


def test_a_file_where_a_folder_is_expected_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for load in (load_test, load_train):
        with pytest.raises(OSError, match=str(file)):
            load(file)
        with pytest.raises(OSError, match=str(file)):
            load(file, download=True)


def test_reading_imports_no_framework():
    code = (
        "import sys; from data.cifar10 import load_test; load_test()\n"
        "print({'torch', 'torchvision', 'tensorflow', 'keras', 'h5py'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout == "set()\n"


# Archives and the download


def make_archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def archives(tiny, pickled, monkeypatch):
    """Return both archives of the `tiny` batches by name, with a file that is not unpacked."""
    contents = {}
    for name, batches in (("cifar-10-binary.tar.gz", tiny), ("cifar-10-python.tar.gz", pickled)):
        folder = Path(next(iter(batches))).parent
        contents[name] = make_archive({f"{folder}/readme.html": b"<p>", **batches})
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(cifar10, "ARCHIVES", checksums)
    return contents


@pytest.mark.parametrize("version", ["binary", "python"])
def test_an_archive_on_disk_is_used(tmp_path, tiny, pickled, archives, version):
    name = f"cifar-10-{version}.tar.gz"
    write(tmp_path, {name: archives[name]})
    assert to_records(*load_train(tmp_path)) == training_records(tiny)
    assert load_test(tmp_path).sha256 == hashlib.sha256(records_of_test_set(tiny)).hexdigest()
    unpacked = tiny if version == "binary" else pickled
    assert files_below(tmp_path) == {name: archives[name], **unpacked}


def test_a_damaged_archive_is_an_error(tmp_path, archives):
    write(tmp_path, {name: content[:-1] for name, content in archives.items()})
    for download in (False, True):
        assert "cifar-10-binary.tar.gz" in data_error(load_test, tmp_path, download=download)
    assert len(files_below(tmp_path)) == 2


@pytest.fixture
def serve(archives, monkeypatch):
    """Return a function that starts mirrors on 127.0.0.1, one a behaviour, and returns their requests."""
    released, servers = threading.Event(), []

    def start(*behaviours):
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                _, behaviour, name = self.path.split("/")
                content, status, first = archives[name], 200, 0
                wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
                if wanted and behaviour != "no-ranges":
                    first = int(wanted[1])
                    status = 206 if first < len(content) else 416
                requests.append((behaviour, first))
                if behaviour == "garbled":
                    self.wfile.write(b"no HTTP\r\n\r\n")
                    return
                self.send_response(404 if behaviour == "404" else status)
                content = b"<p>" if behaviour == "other" else content[first:]
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                broken = behaviour in ("closes-early", "stalls")
                self.wfile.write(content[: len(content) // 2] if broken else content)
                if behaviour == "stalls":
                    released.wait()

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        urls = [f"{address}/{behaviour}/cifar-10-binary.tar.gz" for behaviour in behaviours]
        monkeypatch.setattr(cifar10, "MIRRORS", urls)
        return requests

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(cifar10, "NETWORK_TIMEOUT", 0.3)
    yield start
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("terminal", [False, True])
def test_download(tmp_path, tiny, serve, capfd, monkeypatch, terminal):
    """From the first mirror that has it, with progress on a terminal alone; and only once."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    data_dir = tmp_path / "new folder"
    requests = serve("404", "other", "garbled", "whole", "404")
    test_set = load_test(data_dir, download=True)
    assert (test_set.name, test_set.notice) == ("CIFAR-10 test set", "")
    assert to_records(*load_train(data_dir, download=True)) == training_records(tiny)
    assert load_test(data_dir, "full", download=True).sha256 == test_set.sha256
    assert requests == [("404", 0), ("other", 0), ("garbled", 0), ("whole", 0)]
    assert files_below(data_dir) == tiny and len(list(data_dir.iterdir())) == 1
    out, err = capfd.readouterr()
    assert out == "" and bool(err) == terminal


def test_a_download_completes_a_folder_and_replaces_nothing(tmp_path, tiny, serve):
    serve("whole")
    kept = {f"{BINARY_FOLDER}/data_batch_2.bin": b"damaged", f"{BINARY_FOLDER}/notes": b"mine", "other": b"x"}
    write(tmp_path, kept)
    assert load_test(tmp_path, download=True).name == "CIFAR-10 test set"
    assert files_below(tmp_path) == tiny | kept


@pytest.mark.parametrize("behaviour", ["closes-early", "stalls"])
def test_a_broken_download_is_continued(tmp_path, tiny, archives, serve, behaviour):
    """By any mirror, also in a later call; a server that only sends the whole file does so."""
    serve(behaviour)
    data_error(load_test, tmp_path, download=True)
    ((name, part),) = files_below(tmp_path).items()
    assert name == "cifar-10-binary.tar.gz.part" and archives["cifar-10-binary.tar.gz"].startswith(part)
    for rest, first in (("whole", len(part)), ("no-ranges", 0)):
        write(tmp_path / rest, {name: part})
        requests = serve("404", rest)
        assert load_test(tmp_path / rest, download=True).name == "CIFAR-10 test set"
        assert requests == [("404", len(part)), (rest, first)] and part
        assert files_below(tmp_path / rest) == tiny


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("stalls", "timed out"), ("garbled", "no HTTP"), ("404", "404"), ("other", "official")],
)
def test_failing_servers(tmp_path, serve, behaviour, reason):
    serve(behaviour, "404")
    for load in (load_test, load_train):
        message = data_error(load, tmp_path, download=True)
        assert reason in message and message.count("127.0.0.1") == 2 and "404" in message
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        cifar10.MIRRORS[:] = [f"http://127.0.0.1:{unused.getsockname()[1]}/cifar-10-binary.tar.gz"]
        assert "refused" in data_error(load_test, tmp_path, download=True)
    assert not any(path.name != "cifar-10-binary.tar.gz.part" for path in tmp_path.iterdir())


def test_a_disk_full_while_batches_are_moved_leaves_whole_files(tmp_path, tiny, serve, monkeypatch):
    """And the archive, so that nothing is downloaded again."""
    requests = serve("whole")
    rename, moved = Path.rename, []

    def until_full(path, target):
        if len(moved) == 3:
            raise OSError(28, "No space left on device", str(path))
        moved.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", until_full)
    assert "No space left" in data_error(load_train, tmp_path, download=True)
    left = files_below(tmp_path)
    size = len(left.pop("cifar-10-binary.tar.gz.part"))
    assert len(left) == 3 and left.items() <= tiny.items()
    monkeypatch.setattr(Path, "rename", rename)
    assert to_records(*load_train(tmp_path, download=True)) == training_records(tiny)
    assert requests == [("whole", 0), ("whole", size)] and files_below(tmp_path) == tiny


def test_mirrors_have_official_archives():
    assert {url.rpartition("/")[2] for url in cifar10.MIRRORS} == set(cifar10.ARCHIVES)
    assert all(url.startswith("https://") for url in cifar10.MIRRORS)
