"""The CIFAR-10 readers, the bundled sample, and the download (from a server on this machine)."""

import hashlib
import http.server
import io
import os
import pickle
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
    CLASS_NAMES,
    RECORD_BYTES,
    DataError,
    calibration_indices,
    load_test,
    load_train,
    perf_indices,
)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TEST_BATCH = SHARED / "cifar-10-batches-bin" / "test_batch.bin"
needs_test_set = pytest.mark.skipif(
    not TEST_BATCH.exists(), reason=f"the full test set, {TEST_BATCH}, is absent"
)


@pytest.fixture
def tiny(monkeypatch):
    """A stand-in for the official batches: 20 records each; returns file name -> bytes."""
    rng = np.random.default_rng(0)
    content = {}
    for batches in cifar10.BATCHES.values():
        for name in batches:
            records = rng.integers(0, 256, (20, RECORD_BYTES), np.uint8)
            records[:, 0] %= 10
            content[name] = records.tobytes()
    digests = {
        split: {name: hashlib.sha256(content[name]).hexdigest() for name in batches}
        for split, batches in cifar10.BATCHES.items()
    }
    monkeypatch.setattr(cifar10, "BATCHES", digests)
    monkeypatch.setattr(cifar10, "BATCH_RECORDS", 20)
    return content


def write_binary_version(data_dir, content):
    folder = data_dir / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, records in content.items():
        (folder / name).write_bytes(records)
    return folder


def training_records(content):
    return b"".join(content[f"data_batch_{i}.bin"] for i in range(1, 6))


def to_records(images, labels):
    return np.column_stack([labels.astype(np.uint8), images.reshape(len(images), -1)]).tobytes()


def one_line_error(function, *arguments, **options):
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# The bundled sample


def test_sample_is_a_hundred_of_each_class():
    sample = load_test(Path("/nowhere"), "sample")
    assert (sample.name, sample.notice) == ("CIFAR-10 sample", "")
    assert (sample.images.shape, sample.images.dtype) == ((1000, 3, 32, 32), np.uint8)
    assert (sample.labels.shape, sample.labels.dtype) == ((1000,), np.int64)
    assert np.bincount(sample.labels).tolist() == [100] * 10
    assert sample.images.flags.c_contiguous
    assert sample.images.flags.writeable  # torch.from_numpy warns of arrays that are not
    assert sample.sha256 == hashlib.sha256(to_records(sample.images, sample.labels)).hexdigest()
    assert sample.sha256 == hashlib.sha256(cifar10.SAMPLE_FILE.read_bytes()).hexdigest()


@needs_test_set
def test_readme_snippet_makes_the_sample_byte_for_byte(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-batches-bin").symlink_to(TEST_BATCH.parent)
    readme = (ROOT / "data" / "README.md").read_text()
    snippet = readme.split("## How the sample was made")[1].split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    made = (tmp_path / "data" / "cifar10-sample-1000.bin").read_bytes()
    assert made == cifar10.SAMPLE_FILE.read_bytes()
    assert hashlib.sha256(made).hexdigest() in readme
    assert cifar10.BATCHES["test"]["test_batch.bin"] in readme


@needs_test_set
def test_sample_is_the_first_hundred_of_each_class_in_the_official_order():
    seen, expected = [0] * 10, b""
    official = TEST_BATCH.read_bytes()
    for start in range(0, len(official), RECORD_BYTES):
        label = official[start]
        seen[label] += 1
        if seen[label] <= 100:
            expected += official[start : start + RECORD_BYTES]
    assert cifar10.SAMPLE_FILE.read_bytes() == expected


def test_damaged_sample_is_refused(tmp_path, monkeypatch):
    content = bytearray(cifar10.SAMPLE_FILE.read_bytes())
    content[5000] ^= 1
    damaged = tmp_path / "sample.bin"
    damaged.write_bytes(content)
    monkeypatch.setattr(cifar10, "SAMPLE_FILE", damaged)
    assert str(damaged) in one_line_error(load_test, tmp_path)
    damaged.unlink()
    assert str(damaged) in one_line_error(load_test, tmp_path, "sample")


# A data set


def test_a_path_may_be_a_string(tmp_path, tiny):
    assert load_test("/nowhere", "sample").is_sample
    write_binary_version(tmp_path, tiny)
    assert load_test(str(tmp_path)).sha256 == load_test(tmp_path).sha256
    assert np.array_equal(load_train(str(tmp_path))[0], load_train(tmp_path)[0])


def test_another_part_is_an_error_and_not_the_whole():
    with pytest.raises(ValueError) as caught:
        load_test(SHARED, "perv")
    assert all(part in str(caught.value) for part in ("perv", *cifar10.PARTS))


def test_a_torch_data_loader_takes_a_data_set():
    from torch.utils.data import DataLoader

    sample = load_test("/nowhere", "sample")
    assert len(sample) == 1000
    image, label = sample[7]
    assert np.array_equal(image, sample.images[7]) and label == sample.labels[7]
    images, labels = next(iter(DataLoader(sample, batch_size=64)))
    assert (images.shape, str(images.dtype)) == ((64, 3, 32, 32), "torch.uint8")
    assert np.array_equal(images, sample.images[:64])
    assert np.array_equal(labels, sample.labels[:64])
    assert len(list(sample)) == 1000  # it ends


def test_a_data_set_is_shown_in_a_line():
    shown = repr(load_test("/nowhere", "sample"))
    assert "CIFAR-10 sample" in shown and "1,000" in shown and "\n" not in shown


# MLPerf Tiny's images


@needs_test_set
@pytest.mark.parametrize(("part", "images"), [("perf", 200), ("calibration", 500)])
def test_mlperf_tiny_images_are_the_official_ones_in_their_order(part, images):
    test_set, found = load_test(SHARED), load_test(SHARED, part)
    official = np.load(SHARED / "mlperf_tiny" / f"{part}_samples_idxs.npy")
    indices = perf_indices(test_set.labels) if part == "perf" else calibration_indices()
    assert np.array_equal(indices, official) and indices.dtype == np.int64
    assert (found.name, found.part, len(found)) == (f"MLPerf Tiny {part} set", part, images)
    assert np.array_equal(found.images, test_set.images[official])
    assert np.array_equal(found.labels, test_set.labels[official])
    assert found.sha256 == hashlib.sha256(to_records(found.images, found.labels)).hexdigest()


@needs_test_set
def test_perf_images_are_twenty_of_each_class():
    assert np.bincount(load_test(SHARED, "perf").labels).tolist() == [20] * 10


def test_calibration_images_can_be_had_without_the_test_set():
    """But for five, they are none of the runner's."""
    indices = calibration_indices()
    assert len(set(indices)) == 500 and indices.min() == 18 and indices.max() == 9950
    assert indices[:3].tolist() == [5802, 6250, 8108]


@needs_test_set
def test_five_calibration_images_are_perf_images():
    assert len({*calibration_indices()} & {*perf_indices(load_test(SHARED).labels)}) == 5


@pytest.mark.parametrize("part", ["perf", "calibration"])
def test_mlperf_tiny_images_need_the_test_set(tmp_path, part):
    """The bundled sample holds but some of them."""
    message = one_line_error(load_test, tmp_path, part)
    assert str(tmp_path) in message and "--download" in message


def test_a_damaged_list_of_the_calibration_images_is_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "calibration.txt"
    monkeypatch.setattr(cifar10, "CALIBRATION_FILE", damaged)
    assert str(damaged) in one_line_error(calibration_indices)
    damaged.write_text("1 2 3\n")
    message = one_line_error(calibration_indices)
    assert str(damaged) in message and hashlib.sha256(b"1 2 3\n").hexdigest() in message


# The binary version


@needs_test_set
@pytest.mark.parametrize("which", ["auto", "full"])
def test_official_test_set(which):
    test_set = load_test(SHARED, which)
    assert (test_set.name, test_set.notice) == ("CIFAR-10 test set", "")
    assert (test_set.images.shape, test_set.images.dtype) == ((10000, 3, 32, 32), np.uint8)
    assert np.bincount(test_set.labels).tolist() == [1000] * 10
    assert test_set.sha256 == "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"
    assert to_records(test_set.images, test_set.labels) == TEST_BATCH.read_bytes()


@needs_test_set
def test_class_names_are_the_official_ones():
    assert tuple((TEST_BATCH.parent / "batches.meta.txt").read_text().split()) == CLASS_NAMES


def test_planes_rows_and_columns(tmp_path, monkeypatch):
    record = bytes([7]) + bytes(range(256)) * 12
    write_binary_version(tmp_path, {"test_batch.bin": record})
    monkeypatch.setattr(cifar10, "BATCHES", {"test": {"test_batch.bin": hashlib.sha256(record).hexdigest()}})
    monkeypatch.setattr(cifar10, "BATCH_RECORDS", 1)
    one = load_test(tmp_path)
    assert one.labels.tolist() == [7]
    for channel, row, column in [(0, 0, 0), (0, 0, 31), (0, 1, 0), (1, 2, 3), (2, 31, 30)]:
        assert one.images[0, channel, row, column] == record[1 + 1024 * channel + 32 * row + column]


def test_training_set(tmp_path, tiny):
    write_binary_version(tmp_path, tiny)
    images, labels = load_train(tmp_path)
    assert (images.shape, images.dtype) == ((100, 3, 32, 32), np.uint8)
    assert (labels.shape, labels.dtype) == ((100,), np.uint8)
    assert to_records(images, labels) == training_records(tiny)


@pytest.mark.parametrize("which", ["auto", "full"])
@pytest.mark.parametrize("change", ["cut", "longer", "empty", "one bit"])
@pytest.mark.parametrize("download", [False, True])
def test_damaged_test_set_is_an_error_and_never_the_sample(tmp_path, tiny, which, change, download):
    content = tiny["test_batch.bin"]
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    damaged = {"cut": content[:-1], "longer": content + b"\0", "empty": b"", "one bit": flipped}[change]
    folder = write_binary_version(tmp_path, {"test_batch.bin": damaged})
    message = one_line_error(load_test, tmp_path, which, download=download)
    assert str(folder / "test_batch.bin") in message
    if change == "one bit":
        assert hashlib.sha256(damaged).hexdigest() in message
        assert hashlib.sha256(content).hexdigest() in message
    else:
        assert f"{len(damaged):,} bytes" in message
        assert f"{len(content):,}" in message
    assert (folder / "test_batch.bin").read_bytes() == damaged  # the user's file, left alone


def test_damaged_training_batch_is_an_error(tmp_path, tiny):
    tiny["data_batch_3.bin"] = tiny["data_batch_2.bin"]
    folder = write_binary_version(tmp_path, tiny)
    message = one_line_error(load_train, tmp_path)
    assert str(folder / "data_batch_3.bin") in message
    assert hashlib.sha256(tiny["data_batch_3.bin"]).hexdigest() in message


def test_without_data_auto_is_the_sample_with_a_notice_and_no_network(tmp_path, monkeypatch):
    for function in ("_python_version", "_fetch"):
        monkeypatch.setattr(cifar10, function, lambda *arguments: pytest.fail(f"called {arguments}"))
    for data_dir in (tmp_path, tmp_path / "absent"):
        sample = load_test(data_dir)
        assert sample.name == "CIFAR-10 sample"
        for part in ("1,000", "10,000", "--download", str(data_dir)):
            assert part in sample.notice
        assert "\n" not in sample.notice
        assert "--download" in one_line_error(load_test, data_dir, "full")
        assert "--download" in one_line_error(load_train, data_dir)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_training_set_is_an_error(tmp_path, tiny):
    del tiny["data_batch_4.bin"]
    write_binary_version(tmp_path, tiny)
    assert str(tmp_path) in one_line_error(load_train, tmp_path)


def test_os_errors_are_one_line(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert str(file) in one_line_error(load_test, file)
    assert str(file) in one_line_error(load_train, file)
    assert str(file) in one_line_error(load_test, file / "below", download=True)


def test_reading_imports_no_framework():
    code = (
        "import sys; from pathlib import Path\n"
        "from data.cifar10 import load_test; load_test(Path('/nowhere'))\n"
        "print({'torch', 'torchvision', 'tensorflow', 'keras', 'h5py'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout == "set()\n"


# The Python version


def write_python_version(data_dir, content):
    """Pickle the batches as the official Python version does; return torchvision's lists of MD5 for them."""
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    md5 = {}
    for name, records in content.items():
        table = np.frombuffer(records, np.uint8).reshape(-1, RECORD_BYTES)
        batch = {"data": table[:, 1:].copy(), "labels": table[:, 0].tolist(), "filenames": [""] * len(table)}
        pickled = pickle.dumps(batch, protocol=2)
        (folder / name.removesuffix(".bin")).write_bytes(pickled)
        md5[name.removesuffix(".bin")] = hashlib.md5(pickled).hexdigest()
    meta = pickle.dumps({"label_names": list(CLASS_NAMES)}, protocol=2)
    (folder / "batches.meta").write_bytes(meta)
    return {
        "train_list": [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)],
        "test_list": [["test_batch", md5["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()},
    }


def test_python_version_gives_the_same_as_the_binary_version(tmp_path, tiny, monkeypatch):
    from torchvision.datasets import CIFAR10

    for attribute, value in write_python_version(tmp_path / "py", tiny).items():
        monkeypatch.setattr(CIFAR10, attribute, value)
    write_binary_version(tmp_path / "bin", tiny)
    from_pickles, from_records = load_test(tmp_path / "py"), load_test(tmp_path / "bin")
    assert from_pickles.name == from_records.name == "CIFAR-10 test set"
    assert from_pickles.sha256 == from_records.sha256 == hashlib.sha256(tiny["test_batch.bin"]).hexdigest()
    assert to_records(from_pickles.images, from_pickles.labels) == tiny["test_batch.bin"]
    assert to_records(*load_train(tmp_path / "py")) == training_records(tiny)

    (tmp_path / "py" / "cifar-10-batches-py" / "data_batch_2").unlink()
    message = one_line_error(load_train, tmp_path / "py", download=True)
    assert str(tmp_path / "py" / "cifar-10-batches-py") in message


class LeavesAMark:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_the_official_folder_itself_can_be_named(tmp_path, tiny, monkeypatch):
    """As well as the folder that it lies in; also as the current folder; in both versions."""
    from torchvision.datasets import CIFAR10

    for attribute, value in write_python_version(tmp_path / "py", tiny).items():
        monkeypatch.setattr(CIFAR10, attribute, value)
    write_binary_version(tmp_path / "bin", tiny)
    for version in ("py", "bin"):
        folder = tmp_path / version / f"cifar-10-batches-{version}"
        monkeypatch.chdir(folder)
        for named in (folder, Path(".")):
            assert load_test(named, "full").name == "CIFAR-10 test set"
            assert to_records(*load_train(named)) == training_records(tiny)


def test_python_version_with_a_wrong_md5_is_refused_before_unpickling(tmp_path):
    mark = tmp_path / "mark"
    hostile = pickle.dumps(LeavesAMark(mark))
    pickle.loads(hostile)
    assert mark.is_dir()  # so it is not for want of trying that there is none below
    mark.rmdir()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ["test_batch", "batches.meta", *(f"data_batch_{i}" for i in range(1, 6))]:
        (folder / name).write_bytes(hostile)
    for load in (load_test, load_train):
        message = one_line_error(load, tmp_path)
        assert str(folder) in message
        assert "MD5" in message
    assert not mark.exists()


def test_python_version_is_read_for_the_training(tmp_path, tiny):
    """The training's process has torchvision first and then TensorFlow: the other order crashes Python."""
    lists = write_python_version(tmp_path, tiny)
    code = (
        "import sys; from models.keras import train; assert 'tensorflow' not in sys.modules\n"
        "from torchvision.datasets import CIFAR10\n"
        f"for name, value in {lists}.items(): setattr(CIFAR10, name, value)\n"
        "from models.keras import training; assert 'tensorflow' in sys.modules\n"
        "training.train = lambda images, labels, *_: print(images.shape, labels[:5].tolist())\n"
        f"sys.argv = ['train', '--data-dir', {str(tmp_path)!r}]; train.main()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    labels = [tiny["data_batch_1.bin"][i * RECORD_BYTES] for i in range(5)]
    assert run.stdout == f"(100, 3, 32, 32) {labels}\n", run.stderr


# The download


def make_archive(members):
    """Return a .tar.gz of `members`: name -> bytes, or name -> str for a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def serve(monkeypatch):
    """Return a function that serves an archive on 127.0.0.1 and makes it the official one."""
    released, servers = threading.Event(), []

    def start(archive, behaviour="whole", status=200):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if behaviour == "silent":
                    released.wait()
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(archive)))
                self.end_headers()
                self.wfile.write(archive if behaviour == "whole" else archive[: len(archive) // 2])
                if behaviour == "stalls":
                    released.wait()

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(cifar10, "ARCHIVE_URL", url)
        monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(archive).hexdigest())
        return server

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield start
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def files_below(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()
    }


def official_members(content):
    return {f"cifar-10-batches-bin/{name}": records for name, records in content.items()}


def test_download(tmp_path, tiny, serve, capfd):
    data_dir = tmp_path / "new folder"
    serve(make_archive({"cifar-10-batches-bin/readme.html": b"<p>", **official_members(tiny)}))
    test_set = load_test(data_dir, download=True)
    assert (test_set.name, test_set.notice) == ("CIFAR-10 test set", "")
    assert to_records(test_set.images, test_set.labels) == tiny["test_batch.bin"]
    assert files_below(data_dir) == official_members(tiny)
    assert sorted(path.name for path in data_dir.iterdir()) == ["cifar-10-batches-bin"]
    assert capfd.readouterr() == ("", "")  # a progress bar is for a terminal
    assert socket.getdefaulttimeout() is None


def test_progress_is_shown_on_a_terminal_and_never_on_stdout(tmp_path, tiny, serve, capfd, monkeypatch):
    serve(make_archive(official_members(tiny)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_test(tmp_path, download=True)
    out, err = capfd.readouterr()
    assert (out, "100" in err) == ("", True)


def test_download_is_not_repeated(tmp_path, tiny, serve):
    server = serve(make_archive(official_members(tiny)))
    images, labels = load_train(tmp_path, download=True)
    assert to_records(images, labels) == training_records(tiny)
    server.shutdown()
    server.server_close()
    assert np.array_equal(load_train(tmp_path, download=True)[0], images)
    assert load_test(tmp_path, "full", download=True).sha256 == load_test(tmp_path).sha256


def assert_nothing_left(data_dir):
    assert files_below(data_dir) == {}
    assert list(data_dir.iterdir()) == []
    assert load_test(data_dir).name == "CIFAR-10 sample"


@pytest.mark.parametrize(
    ("behaviour", "status", "reason"),
    [
        ("closes early", 200, ""),
        ("silent", 200, ""),
        ("stalls", 200, ""),
        ("whole", 404, "404"),
        ("whole", 503, "503"),
    ],
)
@pytest.mark.parametrize("load", [load_test, load_train])
def test_failing_servers(tmp_path, tiny, serve, monkeypatch, behaviour, status, reason, load):
    serve(make_archive(official_members(tiny)), behaviour, status)
    monkeypatch.setattr(cifar10, "NETWORK_TIMEOUT", 0.3)
    message = one_line_error(load, tmp_path, download=True)
    assert cifar10.ARCHIVE_URL in message
    assert reason in message
    assert socket.getdefaulttimeout() is None
    assert_nothing_left(tmp_path)


def test_another_archive_is_refused(tmp_path, tiny, serve, monkeypatch):
    serve(make_archive(official_members(tiny)))
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", "0" * 32)
    assert "0" * 32 in one_line_error(load_test, tmp_path, download=True)
    assert_nothing_left(tmp_path)


def test_connection_refused(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setattr(cifar10, "ARCHIVE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar.gz")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        message = one_line_error(load_test, tmp_path, download=True)
    assert cifar10.ARCHIVE_URL in message
    assert_nothing_left(tmp_path)


def test_only_regular_members_of_expected_names_are_written(tmp_path, tiny, serve):
    members = official_members(tiny)
    del members["cifar-10-batches-bin/test_batch.bin"]
    data_dir = tmp_path / "data"
    strangers = {
        "../outside": b"x",
        str(tmp_path / "absolute"): b"x",
        "cifar-10-batches-bin/../../outside": b"x",
        "cifar-10-batches-bin/extra.bin": b"x",
        "cifar-10-batches-bin/test_batch.bin": "data_batch_1.bin",
    }
    serve(make_archive({**strangers, **members}))
    assert "test_batch.bin" in one_line_error(load_test, data_dir, download=True)
    assert files_below(tmp_path) == {f"data/{name}": content for name, content in members.items()}


def test_archive_with_a_damaged_member_is_refused(tmp_path, tiny, serve):
    members = official_members(tiny)
    members["cifar-10-batches-bin/test_batch.bin"] = b"\0" * 20 * RECORD_BYTES
    serve(make_archive({"cifar-10-batches-bin/test_batch.bin": b"", **members}))
    assert "test_batch.bin" in one_line_error(load_test, tmp_path, download=True)
    assert_nothing_left(tmp_path)


def test_interrupted_download_leaves_nothing(tmp_path, tiny, monkeypatch):
    def interrupted(url, md5, path, timeout):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar10, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_test(tmp_path, download=True)
    assert_nothing_left(tmp_path)


def test_disk_full_while_unpacking_leaves_whole_files_only(tmp_path, tiny, serve, monkeypatch):
    serve(make_archive(official_members(tiny)))
    write, written = cifar10.write_atomically, []

    def until_full(path, write_content):
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        write(path, write_content)
        written.append(path)

    monkeypatch.setattr(cifar10, "write_atomically", until_full)
    assert "No space left" in one_line_error(load_train, tmp_path, download=True)
    left = files_below(tmp_path)
    assert len(left) == 3
    assert left.items() <= official_members(tiny).items()
    assert str(tmp_path) in one_line_error(load_train, tmp_path)


@pytest.mark.parametrize(
    ("error", "words"), [(EOFError("Ran out\n of input"), "Ran out of input"), (MemoryError(), "MemoryError")]
)
def test_whatever_torchvision_raises_is_one_line(tmp_path, monkeypatch, error, words):
    from torchvision.datasets import CIFAR10

    def fail(*arguments, **options):
        print("torchvision's own words")
        raise error

    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(CIFAR10, "__init__", fail)
    assert words in one_line_error(load_test, tmp_path)
