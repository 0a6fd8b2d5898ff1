"""Faults at every step of writing: a process that is killed, a disk that is full."""

import os
import re
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest


class CountedFile:
    """A file whose every `write` is a step, and is flushed."""

    def __init__(self, file, step):
        self.file, self.step = file, step

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.step("write")
        size = self.file.write(content)
        self.file.flush()
        return size

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


def full_from(step):
    """Return an `act` that finds the disk full from that step on, where bytes are needed."""

    def act(number, kind):
        if number >= step and kind != "unlink":
            raise OSError(28, os.strerror(28), "a temporary name")

    return act


@contextmanager
def file_size_limit(size):
    """Limit the size of files, in bytes. Python ignores SIGXFSZ, so that exceeding it is an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def files_in(folder):
    """Return the content of the files in a folder, by name, without the temporary files of `write_files`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not re.fullmatch(r"\..+\.\d+\.tmp", path.name)
    }


def check_whole(files, old, new):
    """Check that each file is complete, old or new, and that there are no others."""
    assert old.keys() <= files.keys() <= new.keys()
    for name, content in files.items():
        assert content in (old.get(name), new[name]), f"{name}: {len(content)} bytes, neither old nor new"
