"""Files, read without waiting for ever, and written whole or not at all."""

from __future__ import annotations  # `--keras-python` may name an older Python

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """Return a file's content, or the first `limit` bytes of it.

    Raises OSError for what is no regular file, since a pipe or a device may never end. For the same reason no
    more is read than the file says that it holds: those of /proc say nothing.
    """
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        return file.read(size if limit is None else min(size, limit))


def check_regular(path: Path) -> None:
    """Raise OSError where a path leads to neither a file nor a folder; a folder has an error of its own."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "Not a file, but a pipe or a device", str(path))


def write_files(writers: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """Call each path's writer with a temporary binary file beside it; when all are on the disk, rename them.

    If a writer raises, or the process dies in it, whatever was at the paths before is still there, untouched.
    No other process renames its files between ours. A symbolic link stays, and so does a file's mode. Raises
    OSError, which names the path that cannot be written.
    """
    check_writable(writers)
    targets = {path: _target(path) for path in writers}
    temporary = {path: file.with_name(f".{file.name}.{os.getpid()}.tmp") for path, file in targets.items()}
    folders = {file.parent for file in targets.values()}
    try:
        for path, write in writers.items():
            with _naming(path):
                targets[path].parent.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(targets[path])
                with temporary[path].open("wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())  # else the rename may reach the disk before the content does
                if targets[path].exists():
                    shutil.copymode(targets[path], temporary[path])
        with _locked(folders):
            for path in writers:
                with _naming(path):
                    temporary[path].replace(targets[path])
        for folder in folders:
            _sync_folder(folder)
    finally:
        for file in temporary.values():
            with suppress(OSError):
                file.unlink()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write one file, as `write_files` does."""
    write_files({path: write})


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256, as hex digits. Raises OSError as `read_regular` does."""
    return hashlib.sha256(read_regular(path)).hexdigest()


def check_writable(paths: Iterable[Path]) -> None:
    """Raise OSError, naming what is in the way, if a file cannot be written. Nothing is made or changed."""
    for path in paths:
        target = _target(path)
        folder = target.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if target.is_dir():  # renaming would fail, when other files may have been renamed
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if target.exists():
            check_regular(path)  # a file in the place of /dev/null would be the end of it
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _target(path: Path) -> Path:
    """Return what is to be written for a path: where it leads, if it is a symbolic link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def _locked(folders: Iterable[Path]) -> Iterator[None]:
    """Keep other processes that do the same out of these folders, where the system has such locks."""
    with ExitStack() as stack:
        for folder in sorted(folders):  # in the same order everywhere, so that no two wait for each other
            with suppress(ImportError, OSError):  # Windows and some network disks have none
                import fcntl

                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)  # which unlocks it
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name in an OSError the path that the user knows, not the temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote `path`."""
    if os.name != "posix":  # elsewhere os.kill(pid, 0) is no question
        return
    for file in path.parent.iterdir():
        process = re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)\.tmp", file.name)
        try:
            if process:
                os.kill(int(process[1]), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (OSError, OverflowError):  # it is another user's, and alive
            pass


def _sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
