"""Writing files whole or not at all."""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO


def write_files(writers: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """Call each path's writer with a temporary binary file beside it; when all are written, rename them.

    If a writer raises, or the process dies in it, whatever was at the paths before is still there, untouched.
    Raises OSError when a folder cannot be written to.
    """
    for path in writers:
        if path.is_dir():  # renaming would fail, when the others may have been renamed
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary[path].open("wb") as file:
                write(file)
        for path in writers:
            temporary[path].replace(path)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write one file, as `write_files` does."""
    write_files({path: write})
