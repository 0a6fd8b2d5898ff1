"""The terminal: options and printing that the commands share, a reader that goes away, and Ctrl-C."""

from __future__ import annotations

import argparse
import difflib
import gc
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from models.common.errors import one_line, printable
from models.common.tuning import COLLECT_AFTER

if TYPE_CHECKING:
    from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ends: 128 + SIGINT


def run(command: Callable[[], int]) -> int:
    """Run a command; return its exit status.

    Ctrl-C ends it with one line, and so does a machine that has no more memory or threads. A reader of its
    output that goes away (`| head -1`) ends the printing, not the work; if the output cannot be written
    otherwise (a full disk), that is said when the work is done. A letter that the terminal's encoding lacks
    is printed as its code, as on stderr.
    """
    gc.set_threshold(COLLECT_AFTER)
    # Python has no stdout when it is closed (`>&-`)
    stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    stdout.reconfigure(errors="backslashreplace")
    sys.stdout = output = _Output(stdout)
    try:
        status = command()
        output.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (MemoryError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't start new thread" not in str(error):
            raise
        print_error(f"cannot go on: {one_line(error)}")
        return 1
    if output.error:
        print_error(f"cannot write to stdout: {output.error.strerror}")
    gc.freeze()  # what is left ends with the process: looking through it for garbage takes a quarter second
    return status or int(output.error is not None)


def beside_the_scripts(name: str) -> Path:
    """Return a path in the repository, relative to the current folder if that is the repository."""
    path = ROOT / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class Parser(argparse.ArgumentParser):
    """The parser of a command line, which says first what is wrong with it, and last where to read on."""

    def __init__(self, documentation: str | None, **options: object) -> None:
        """`documentation` is a docstring, whose first line `--help` shows; None as `python -OO` has it."""
        super().__init__(description=(documentation or "").partition("\n")[0], **options)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, with the option that may be meant, and exit with status 2."""
        known = list(self._option_string_actions)
        for given in re.findall(r"--[\w-]+", message):
            longer = [option for option in known if option.startswith(f"{given}-") and "choice" in message]
            meant = longer if given in known else difflib.get_close_matches(given, known, 1, 0.75)
            message += f" (did you mean {meant[0]}?)" if meant else ""
        self.exit(2, f"{self.prog}: error: {message}\nsee {self.prog} --help\n")


def a_file(given: str) -> Path:
    """Return the path of a file, for an option; a path that has no name is a folder's."""
    path = Path(given)
    if not path.name:
        raise argparse.ArgumentTypeError(f"'{given}' is no file")
    return path


def add_scaling(parser: argparse._ActionsContainer, model: str) -> None:
    """Add --mean and --std, which say what `model` is fed."""
    parser.add_argument("--mean", type=float, nargs="+", help=f"{model} is fed (pixel - mean) / std,")
    parser.add_argument("--std", type=float, nargs="+", help="pixels 0 to 255; one value, or one a channel")


def add_key(parser: argparse._ActionsContainer) -> None:
    """Add --key, which names one of several state_dicts."""
    parser.add_argument("--key", metavar="NAME", help="which state_dict of a .pt that holds several, by name")


def check_scaling(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with status 2 when --mean and --std make no sense."""
    if options.std and not all(value > 0 for value in options.std):
        parser.error("--std must be above 0")


def add_keras_python(parser: argparse._ActionsContainer) -> None:
    """Add --keras-python."""
    parser.add_argument(
        "--keras-python",
        metavar="PYTHON",
        default=sys.executable,
        help="the Python that has Keras (this one)",
    )


def print_summary(outcomes: list[tuple[Path, dict | None, str]]) -> None:
    """Print one line a file: what came of it."""
    from rich.table import Table

    headings = ("file", "result", "float64 difference", "output, or why not")
    table = Table(*headings, box=None, padding=(0, 1), show_edge=False)
    for path, metadata, detail in outcomes:
        verification = metadata and metadata["verification"]
        difference = f"{verification['float64']['probabilities']:.1e}" if verification else ""
        difference = difference or ("not verified" if metadata else "")
        table.add_row(str(path), "converted" if metadata else "refused", difference, printable(detail))
    print()
    print_table(table)


def print_error(message: str) -> None:
    """Print what went wrong, one line on stderr."""
    print(f"error: {printable(message)}", file=sys.stderr)


def print_note(note: str, indent: str = "") -> None:
    """Print a note: on a terminal wrapped to its width, between words; in a pipe as one line."""
    text = printable(f"{indent}note: {note}")
    print(wrapped(text, f"{indent}  ") if sys.stdout.isatty() else text, flush=True)


@dataclass
class Notes:
    """Lines for the user, printed as they come up and kept for metrics.txt and metrics.json."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Print a line and keep it, once."""
        line = printable(line)
        if line not in self.lines:
            self.lines.append(line)
            print_note(line)


def output_width() -> int:
    """Return how many columns a table may take: the terminal's, at least 80; in a pipe 80."""
    return max(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 80


def wrapped(text: str, indent: str) -> str:
    """Return text in lines as wide as the terminal, broken between words, all but the first indented."""
    width = shutil.get_terminal_size().columns
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, width, subsequent_indent=indent, **options)


def print_table(table: Table) -> None:
    """Print a table, a line a row; on a terminal that is too narrow for it, a line a cell."""
    from rich.console import Console

    # names come from files: `[/x]` in one is no style of rich's, and `:x:` no picture
    wide = Console(markup=False, emoji=False, highlight=False, width=10_000, file=io.StringIO())
    needed = wide.measure(table).maximum
    if sys.stdout.isatty() and needed > shutil.get_terminal_size().columns:
        headings = [str(column.header) for column in table.columns]
        longest = max(map(len, headings))
        for cells in zip(*(column.cells for column in table.columns), strict=True):
            for heading, cell in zip(headings, cells, strict=True):
                print(wrapped(f"  {heading:<{longest}}  {cell}", " " * (longest + 4)).rstrip())
            print()
        return
    wide.print(table)
    print("\n".join(line.rstrip() for line in wide.file.getvalue().splitlines()))


def progress_bar(description: str) -> Callable[[Iterable, int], Iterable]:
    """Return the `track` of `inference.predict`: a progress bar on a terminal, none elsewhere."""
    if not sys.stderr.isatty():
        return lambda batches, total: batches

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    console = Console(stderr=True, emoji=False)
    return lambda batches, total: track(batches, escape(description), total, console=console, transient=True)


class _Output:
    """Stdout, whose other end may be closed, or full, or a terminal that obeys control codes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.error = stream, None

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        shown = "\n".join(map(printable, text.split("\n")))  # names of files, and what they hold
        self._try(lambda: self._stream.write(shown))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.error = error
            # to nowhere with what is written from now on, and with what the buffer still holds at the exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
