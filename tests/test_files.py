"""data/files.py: a file is written whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.files import write_atomically, write_files

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def old(tmp_path):
    """Return two paths where something is, and a function that sees if the folder is as it was."""
    contents = {tmp_path / "one": b"old one", tmp_path / "two": b"old two"}
    for path, content in contents.items():
        path.write_bytes(content)
    return list(contents), lambda: {path: path.read_bytes() for path in tmp_path.iterdir()} == contents


def failing(target):
    target.write(b"half of")
    raise RuntimeError("in the middle")


def test_writes_into_new_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, lambda target: target.write(b"content"))
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


def test_replaces_all_files(old):
    (one, two), untouched = old
    write_files({one: lambda target: target.write(b"1"), two: lambda target: target.write(b"2")})
    assert (one.read_bytes(), two.read_bytes()) == (b"1", b"2")
    assert sorted(one.parent.iterdir()) == [one, two]
    assert not untouched()


@pytest.mark.parametrize("first", [True, False])
def test_writer_that_raises_leaves_all_old_files(old, first):
    (one, two), untouched = old
    writers = {one: failing, two: lambda target: target.write(b"2")}
    with pytest.raises(RuntimeError, match="in the middle"):
        write_files(writers if first else dict(reversed(writers.items())))
    assert untouched()


def test_writer_that_raises_leaves_no_new_file(tmp_path):
    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "file", failing)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_in_place_before_all_is_written(old):
    (one, two), _ = old
    seen = []

    def last(target):
        target.write(b"2")
        seen.append((one.read_bytes(), two.read_bytes()))

    write_files({one: lambda target: target.write(b"1"), two: last})
    assert seen == [(b"old one", b"old two")]


def test_interrupt_leaves_the_old_file(old):
    (one, _), untouched = old

    def interrupted(target):
        target.write(b"half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(one, interrupted)
    assert untouched()


def test_killed_process_leaves_the_old_files(old):
    (one, two), _ = old
    code = (
        "import os, signal, sys; from pathlib import Path; from data.files import write_files\n"
        "def killed(target): target.write(b'half of'); target.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_files({Path(sys.argv[1]): lambda target: target.write(b'1'), Path(sys.argv[2]): killed})"
    )
    run = subprocess.run([sys.executable, "-c", code, one, two], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
    assert (one.read_bytes(), two.read_bytes()) == (b"old one", b"old two")
    assert write_atomically(one, lambda target: target.write(b"1")) is None  # what is left is not in the way
    assert one.read_bytes() == b"1"


def test_folder_in_the_way(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", lambda target: target.write(b"content"))
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_folder_in_the_way_of_the_second(old):
    (one, two), _ = old
    two.unlink()
    two.mkdir()
    with pytest.raises(OSError):
        write_files({one: lambda target: target.write(b"1"), two: lambda target: target.write(b"2")})
    assert one.read_bytes() == b"old one"
    assert sorted(one.parent.iterdir()) == [one, two]


def test_file_in_the_place_of_a_folder(old):
    (one, _), untouched = old
    with pytest.raises(OSError):
        write_atomically(one / "file", lambda target: target.write(b"content"))
    assert untouched()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(old):
    (one, _), untouched = old
    one.parent.chmod(0o555)
    with pytest.raises(PermissionError):
        write_atomically(one, lambda target: target.write(b"content"))
    one.parent.chmod(0o755)
    assert untouched()
