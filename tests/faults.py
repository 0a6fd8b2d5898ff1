"""Faults at every step of writing: a process that is killed, a disk that is full.

    python -m tests.faults STEP FOLDER

writes FOLDER/one and FOLDER/two, and kills itself before that step of it.
"""

import os
import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.files import write_files


class CountedFile:
    """A file whose every `write` is a step, and is seen by whoever reads the file from then on."""

    def __init__(self, file, step):
        self.file, self.step = file, step

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.step("write")
        written = self.file.write(content)
        self.file.flush()
        return written

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


@contextmanager
def at_every_step(folder, act):
    """Call `act(number, kind)` before each step that changes something in `folder`; yield the kinds so far.

    Steps are: mkdir, open, write, fsync, replace, unlink.
    """
    kinds = []

    def step(kind):
        kinds.append(kind)
        act(len(kinds) - 1, kind)

    def is_inside(path):
        return Path(path).absolute().is_relative_to(folder)

    def hooked(kind):
        original = getattr(Path, kind)

        def change(path, *arguments, **options):
            if is_inside(path):
                step(kind)
            return original(path, *arguments, **options)

        return change

    open_file, fsync = Path.open, os.fsync

    def open_counted(path, mode="r", *arguments, **options):
        if "w" not in mode or not is_inside(path):
            return open_file(path, mode, *arguments, **options)
        step("open")
        return CountedFile(open_file(path, mode, *arguments, **options), step)

    def fsync_counted(descriptor):
        step("fsync")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        for kind in ("mkdir", "replace", "unlink"):
            patch.setattr(Path, kind, hooked(kind))
        patch.setattr(Path, "open", open_counted)
        patch.setattr(os, "fsync", fsync_counted)
        yield kinds


def kill_before(step):
    """Return what ends this process before that step."""
    return lambda number, kind: os.kill(os.getpid(), signal.SIGKILL) if number == step else None


def full_from(step):
    """Return what finds the disk full from that step on, where bytes are needed: nothing is removed."""

    def act(number, kind):
        if number >= step and kind != "unlink":
            raise OSError(28, os.strerror(28), "a name that no user knows")

    return act


def files_in(folder):
    """Return what is in a folder, by name, but for the temporary files of `write_files`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not re.fullmatch(r"\..+\.\d+\.tmp", path.name)
    }


def check_whole(found, old, new):
    """See that each file is there whole: as it was, or as it was to be, and nothing else is."""
    assert found.keys() <= new.keys()
    assert old.keys() <= found.keys()
    for name, content in found.items():
        assert content in (old.get(name), new[name]), f"{name}: {len(content)} bytes, neither old nor new"


def write_two(folder):
    """Write the two files, each in several pieces."""

    def write(text):
        return lambda target: [target.write(text.encode()) for _ in range(3)]

    write_files({folder / "one": write("new one "), folder / "two": write("new two ")})


if __name__ == "__main__":
    with at_every_step(Path(sys.argv[2]), kill_before(int(sys.argv[1]))):
        write_two(Path(sys.argv[2]))
