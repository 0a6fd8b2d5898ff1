"""models/common/terminal.py on a terminal of 80 columns, and in a pipe."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pty = pytest.importorskip("pty")


def on_a_terminal(program, columns=80):
    """Run a Python program on a terminal; return its lines."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS=str(columns), TERM="dumb", PYTHONPATH=str(ROOT))
        os.execv(sys.executable, [sys.executable, "-c", program])
    output = b""
    try:
        while chunk := os.read(terminal, 65536):
            output += chunk
    except OSError:  # its other end is closed
        pass
    os.waitpid(pid, 0)
    return output.decode().replace("\r", "").splitlines()


def in_a_pipe(program):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


NAME = "batch_normalization_1/moving_variance"
ROWS = f"""
import numpy as np
from models.conversion.stages import print_rows
from models.conversion.tensors import Row
array = np.zeros((3, 3, 16, 32), np.float32)
print_rows([Row({NAME!r}, "kernel", (3, 2, 0, 1), "layer2.downsample.weight", array, None, (32, 16, 3, 3))])
"""
SUMMARY = """
from pathlib import Path
from models.common.terminal import print_summary
done = {"verification": {"float64": {"probabilities": 4e-15}}}
print_summary([
    (Path("a.h5"), done, "a.pt"), (Path("b.h5"), {"verification": None}, "b.pt"),
    (Path("c.h5"), None, "layer 'x' (Conv2D): strides is [1, 1], expected [2, 2] (layer2.conv1), and so on"),
])
"""
NOTE = f"""
from models.common.terminal import print_note
print_note("{"some-words " * 20}{NAME}", indent="  ")
"""


@pytest.mark.parametrize("program", [ROWS, SUMMARY, NOTE], ids=["rows", "summary", "note"])
def test_fits_a_terminal_of_80_columns_with_names_whole(program):
    lines = on_a_terminal(program)
    assert lines and max(map(len, lines)) <= 80
    whole = " ".join(" ".join(in_a_pipe(program)).split())
    assert {word for line in lines for word in line.split()} >= set(whole.split()) - {"Keras", "shape"}


def test_names_are_printed_as_they_are():
    """They come from files: a bracket is no style, a colon no picture, and nothing else ends the command."""
    lines = in_a_pipe("""
from pathlib import Path
from models.common.terminal import print_summary
print_summary([(Path("a[bold].h5"), None, "layer 'x[/y]' :smile: is odd"), (Path("b.h5"), None, "w" * 1500)])
""")
    assert "a[bold].h5" in lines[2] and "layer 'x[/y]' :smile: is odd" in lines[2]
    assert lines[3].endswith("  " + "w" * 1500)


def test_a_pipe_gets_a_line_a_row_without_padding():
    for program, rows in ((ROWS, 2), (SUMMARY, 5), (NOTE, 1)):
        lines = in_a_pipe(program)
        assert len(lines) == rows
        assert all(line == line.rstrip() for line in lines)


def test_summary_has_a_title_for_every_column_and_says_what_is_not_verified():
    _, heading, first, second, third = in_a_pipe(SUMMARY)
    assert heading.split("  ")[-1].strip() == "output, or why not"
    assert "4.0e-15" in first and "not verified" in second and "refused" in third


COMMANDS = {
    "convert.py": ["convert.py"],
    "evaluate.py": ["evaluate.py"],
    "training": ["-m", "models.keras.train"],
    "fuzz": ["-m", "tests.fuzz"],
    "benchmark": ["-m", "tests.benchmarks.run"],
    "pitfalls": ["-m", "tests.benchmarks.pitfalls"],
    "recipes": ["-m", "tests.recipes"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_quick(name, tmp_path):
    """It imports nothing that takes seconds, and so shows no log of TensorFlow's."""
    for library in ("tensorflow", "keras", "torch", "torchvision", "matplotlib"):
        (tmp_path / f"{library}.py").write_text("raise SystemExit('imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, *COMMANDS[name], "--help"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("usage: ")
