"""data/files.py: a file is written whole or not at all."""

import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.files import check_writable, read_regular, sha256_of, write_atomically, write_files
from tests.faults import at_every_step, check_whole, files_in, full_from, write_two

ROOT = Path(__file__).resolve().parent.parent
NEW = {"one": b"new one " * 3, "two": b"new two " * 3}  # as `write_two` writes them


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


def test_folder_without_permission(locked):
    content = (locked / "odd.h5").read_bytes()
    with pytest.raises(PermissionError):
        write_atomically(locked / "odd.h5", lambda target: target.write(b"content"))
    assert (locked / "odd.h5").read_bytes() == content


# What is no regular file, and symbolic links


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_reads_regular_files_alone(old, pipe):
    (one, _), _ = old
    assert (read_regular(one), read_regular(one, 3), read_regular(one, 99)) == (
        b"old one",
        b"old",
        b"old one",
    )
    for read in (read_regular, sha256_of):
        for path in (pipe, Path("/dev/zero")):
            with pytest.raises(OSError) as caught:
                read(path)
            assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(path))
        with pytest.raises(IsADirectoryError):
            read(one.parent)
    assert read_regular(Path("/proc/self/status")) == b""  # its size; reading /proc/kmsg would wait


def test_replaces_regular_files_alone(old, pipe):
    (one, _), untouched = old
    (link := one.with_name("link")).symlink_to("/dev/null")
    for path in (pipe, Path("/dev/null"), link):
        with pytest.raises(OSError) as caught:
            write_files({one: lambda target: target.write(b"1"), path: lambda target: target.write(b"2")})
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(path))
    assert pipe.is_fifo() and Path("/dev/null").is_char_device()
    pipe.unlink()
    link.unlink()
    assert untouched()


def test_link_stays_and_its_target_is_written(old):
    (one, two), _ = old
    folder = one.parent / "elsewhere"
    folder.mkdir()
    links = {one.parent / "to one": one, one.parent / "to new": folder / "new"}
    for link, target in links.items():
        link.symlink_to(target)
    write_files({link: lambda target: target.write(b"new") for link in links})
    assert all(link.is_symlink() and target.read_bytes() == b"new" for link, target in links.items())
    assert sorted(one.parent.iterdir()) == sorted([*links, one, two, folder])
    assert list(folder.iterdir()) == [folder / "new"]


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "a", lambda target: target.write(b"content"))
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(tmp_path / "a"))
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_file_keeps_its_mode(old, mode):
    (one, _), _ = old
    one.chmod(mode)
    write_atomically(one, lambda target: target.write(b"1"))
    assert one.stat().st_mode & 0o777 == mode and one.read_bytes() == b"1"


# Before the work


def test_what_cannot_be_written_is_found_before_and_nothing_is_made(old):
    (one, two), _ = old
    two.unlink()
    two.mkdir()
    assert check_writable([one, one.parent / "new" / "folder" / "file"]) is None
    for path, error, in_the_way in (
        (two, IsADirectoryError, two),
        (one / "file", NotADirectoryError, one),
        (one / "new" / "folder" / "file", NotADirectoryError, one),
    ):
        with pytest.raises(error) as caught:
            check_writable([one.parent / "good", path])
        assert caught.value.filename == str(in_the_way)
    assert sorted(one.parent.iterdir()) == [one, two]


def test_locked_folder_is_found_before(locked):
    for path in (locked / "odd.h5", locked / "new" / "file"):
        with pytest.raises(PermissionError) as caught:
            check_writable([path])
        assert caught.value.filename == str(locked)


# On the disk, and what a process that was killed has left


def test_content_is_on_the_disk_before_it_is_in_place(old, monkeypatch):
    """A rename may reach the disk before the content that was not synced: an empty file after a crash."""
    (one, two), _ = old
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", path, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def noted_replace(source, target):
        events.append(("replace", Path(source), Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_files({one: lambda target: target.write(b"1"), two: lambda target: target.write(b"22")})
    (_, first, size), (_, second, second_size), *replaced, (kind, folder, _) = events
    assert (size, second_size) == (1, 2)
    assert replaced == [("replace", first, one), ("replace", second, two)]
    assert (kind, folder) == ("sync", one.parent)  # the names


def test_leftovers_of_dead_processes_are_removed_and_those_of_live_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "file"
    leftovers = [tmp_path / f".{path.name}.{pid}.tmp" for pid in (dead.pid, os.getppid(), 10**30)]
    others = [
        tmp_path / f".other.{dead.pid}.tmp",
        tmp_path / f".file.{dead.pid}.tmp.old",
        tmp_path / ".file.tmp",
    ]
    for file in leftovers + others:
        file.write_bytes(b"half of")
    write_atomically(path, lambda target: target.write(b"content"))
    assert sorted(tmp_path.iterdir()) == sorted([path, *leftovers[1:], *others])


# A fault at every step


def test_killed_before_every_step_leaves_each_file_whole(tmp_path):
    """By SIGKILL before the first step, the second, ... until the process gets through."""
    statuses, found = [], []
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        old = {"one": b"old one", "two": b"old two"}
        for name, content in old.items():
            (folder / name).write_bytes(content)
        run = subprocess.run([sys.executable, "-m", "tests.faults", str(step), folder], cwd=ROOT, check=False)
        statuses.append(run.returncode)
        found.append(files_in(folder))
        check_whole(found[-1], old, NEW)
        write_two(folder)  # what is left is not in the way, and removed
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == NEW
        if run.returncode == 0:
            break
    assert statuses == [-signal.SIGKILL] * (len(statuses) - 1) + [0]
    assert len(statuses) > 2 * (len(["open", "write", "write", "write", "fsync", "replace"]))
    assert found[0] == old and found[-1] == NEW
    assert any(old != each != NEW for each in found)  # between the two renames, where each of them is whole


def test_disk_that_is_full_at_any_step_leaves_each_file_whole(old):
    (one, two), _ = old
    folder, before = one.parent, files_in(one.parent)
    for step in itertools.count():
        for name, content in before.items():
            (folder / name).write_bytes(content)
        try:
            with at_every_step(folder, full_from(step)):
                write_two(folder)
        except OSError as error:
            assert error.errno == 28 and error.filename in (str(one), str(two))  # not the temporary file
            failed = True
        else:
            failed = False
        check_whole(files_in(folder), before, NEW)
        assert sorted(folder.iterdir()) == [one, two]  # nothing half is left
        if not failed:
            break
    assert step > 10 and files_in(folder) == NEW


@pytest.mark.parametrize("limit", [0, 1, 8, 23, 24])
def test_file_size_limit_leaves_each_file_whole(old, limit):
    (one, _), untouched = old
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # Python ignores SIGXFSZ: it is an error
    try:
        write_two(one.parent)
    except OSError as error:
        assert limit < 24 and error.filename == str(one)
    else:
        assert limit == 24
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert untouched() if limit < 24 else files_in(one.parent) == NEW


# Two at once


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="sees who waits for a lock in /proc")
def test_two_writers_leave_the_files_of_one(old):
    """The second starts while the first is between its two renames."""
    (one, two), _ = old
    code = (
        "import sys; from pathlib import Path; from data.files import write_files\n"
        "write_files({Path(name): lambda target: target.write(b'of the second') for name in sys.argv[1:]})"
    )
    others = []

    def waits(pid):
        locks = Path("/proc/locks").read_text().splitlines()
        return any(f" {pid} " in lock for lock in locks if "->" in lock)

    def act(number, kind):
        if kind == "replace" and kinds.count(kind) == 2:
            others.append(subprocess.Popen([sys.executable, "-c", code, one, two], cwd=ROOT))
            while others[0].poll() is None and not waits(others[0].pid):
                time.sleep(0.01)

    with at_every_step(one.parent, act) as kinds:
        write_two(one.parent)
    assert others[0].wait() == 0
    assert {one.read_bytes(), two.read_bytes()} == {b"of the second"}
    assert sorted(one.parent.iterdir()) == [one, two]  # no lock file
