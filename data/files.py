"""Writing files whole or not at all."""

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_files(writers: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """Call each path's writer with a temporary binary file beside it; when all are on the disk, rename them.

    If a writer raises, or the process dies in it, whatever was at the paths before is still there, untouched.
    Raises OSError, which names the path that cannot be written.
    """
    check_writable(writers)
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            with _naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(path)
                with temporary[path].open("wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())  # else the rename may reach the disk before the content does
        for path in writers:
            with _naming(path):
                temporary[path].replace(path)
        for folder in {path.parent for path in writers}:
            _sync_folder(folder)
    finally:
        for file in temporary.values():
            with suppress(OSError):
                file.unlink()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write one file, as `write_files` does."""
    write_files({path: write})


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256, as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_writable(paths: Iterable[Path]) -> None:
    """Raise OSError, naming what is in the way, if a file cannot be written. Nothing is made or changed."""
    for path in paths:
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if path.is_dir():  # renaming would fail, when other files may have been renamed
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


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
