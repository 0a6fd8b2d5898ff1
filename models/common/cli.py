"""Terminal input and output of the commands: options, messages, errors, Ctrl-C, a closed or full stdout."""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT
# Importing torch or Keras creates 200,000 to 500,000 objects that stay. The default threshold of 700 searches
# them for garbage again and again; with this one the imports take a sixth less time.
GC_THRESHOLD = 10_000
_stdout_errors: list[OSError] = []  # of `echo`, other than a closed pipe


class KerasFileError(ValueError):
    """A Keras file that cannot be converted; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message[:1000]))  # names in the file can be of any length


class OutputExistsError(Exception):
    """An output path holds a file that `convert.py` did not write; the message is one line."""


class VerificationError(Exception):
    """PyTorch and Keras differ; the message names the first layer that differs."""


def printable(text: str) -> str:
    """Replace control codes, which file names and files may contain, by question marks; one line."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else "?" for c in text)


def one_line(error: Exception) -> str:
    """Return an exception's type and message as one line of at most 200 characters."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:200])


def run(command: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    The status is 130 after Ctrl-C, and 1 if memory, threads or disk space run out, or stdout was full.
    """
    gc.set_threshold(GC_THRESHOLD)
    _stdout_errors.clear()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # None after `>&-`
    sys.stdout.reconfigure(errors="backslashreplace")  # characters that the terminal's encoding lacks
    try:
        status = command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (MemoryError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't start new thread" not in str(error):
            raise
        print_error(one_line(error))
        return 1
    if _stdout_errors:
        print_error(f"cannot write to stdout: {_stdout_errors[0].strerror}")
        status = status or 1
    gc.freeze()  # no last search for garbage: 0.25 s
    return status


def echo(text: str = "") -> None:
    """Print text to stdout. If stdout is closed (`| head -1`) or full, drop later text; the work goes on."""
    try:
        print("\n".join(map(printable, text.split("\n"))), flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _stdout_errors.append(error)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # also for the text that is still in the buffer
        os.close(devnull)


def print_error(message: str) -> None:
    """Print an error, one line on stderr."""
    print(f"error: {printable(message)}", file=sys.stderr)


def format_table(rows: list[list[str]], gap: int = 2, left: tuple[str, ...] = ("format",)) -> str:
    """Return rows, the first of them headings, as an aligned table of plain text.

    The first column and those with a heading in `left` are left-aligned; `gap` is the space between columns.
    """
    from rich.console import Console
    from rich.table import Table

    headings, *rows = rows
    table = Table(box=None, show_edge=False, padding=(0, gap, 0, 0))
    for heading in headings:
        side = "left" if heading in (headings[0], *left) else "right"
        table.add_column(heading, justify=side, vertical="bottom")
    for row in rows:
        table.add_row(*map(printable, row))  # names and a Keras file's version may be any text
    plain = {"color_system": None, "markup": False, "emoji": False, "highlight": False}
    console = Console(file=io.StringIO(), width=10_000, **plain)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().split("\n")).rstrip("\n")


@dataclass
class Notes:
    """Notes to the user: printed at once, and kept for metrics.txt and metrics.json."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Print and keep a line, once."""
        line = printable(line)
        if line not in self.lines:
            self.lines.append(line)
            echo(f"note: {line}")


def check_installed(module: str, packages: str, user: str) -> None:
    """Raise ValueError, with pip's command for `packages`, if a module that `user` needs is missing."""
    if find_spec(module) is None:
        raise ValueError(f"{user} needs: pip install {packages}")


def in_repository(name: str) -> Path:
    """Return a path in the repository, relative to the current folder if that is the repository."""
    path = ROOT / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def make_parser(docstring: str | None, **options: object) -> argparse.ArgumentParser:
    """Return a parser described by a docstring's first line; `python -OO` has no docstrings."""
    return argparse.ArgumentParser(description=(docstring or "").partition("\n")[0], **options)


def add_shared_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that both commands have."""
    add = parser.add_argument
    add(
        "--mean",
        type=float,
        nargs="+",
        help="mean of the input normalization, (pixel - mean) / std, for pixels 0-255: "
        "one value, or one per channel (default: from the JSON beside FILE, else 0)",
    )
    add(
        "--std",
        type=positive_float,
        nargs="+",
        help="std of the input normalization, like --mean (default: from the JSON, else 1)",
    )
    add("--key", metavar="NAME", help="state_dict to read from a file with several, such as ema")
    add(
        "--keras-python",
        metavar="PYTHON",
        default=sys.executable,
        help="Python interpreter with Keras (default: the current one)",
    )


def file_path(text: str) -> Path:
    """Parse an option: the path of a file, which has a name."""
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"'{text}' is not a file")
    return Path(text)


def positive_float(text: str) -> float:
    """Parse an option: a number above 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def positive_int(text: str) -> int:
    """Parse an option: a whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def unit_interval(text: str) -> float:
    """Parse an option: a fraction from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction from 0 to 1 (0.87 is 87 %)")
    return float(text)
