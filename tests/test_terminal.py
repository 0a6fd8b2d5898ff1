"""models/common/terminal.py on a terminal of 80 columns, and in a pipe."""

import io
import os
import re
import subprocess
import sys

import pytest

from models.common import terminal
from models.common.errors import printable
from models.common.terminal import Parser
from models.keras.worker import Worker, WorkerError
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
    assert {word for line in lines for word in line.split()} >= set(whole.split())


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
    heading, first, second, third = (re.split(" {2,}", line.strip()) for line in in_a_pipe(SUMMARY)[1:])
    assert len(heading) == len(first) == len(second) == 4 and len(third) == 3
    assert first[0::2] == ["a.h5", "4.0e-15"] and first[1] == second[1] != third[1]


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


# Text from files, on its way to the terminal


FAKE = "\x1b[2K\x9b1A\r\n  numbers     passed  \u202e"


def test_control_codes_of_files_reach_no_terminal():
    lines = on_a_terminal(f"""
import sys
from pathlib import Path
from models.common.terminal import Notes, print_error, print_note, print_summary, run
fake = {FAKE!r}
def command():
    print(f"wrote {{fake}}")
    print_note(fake)
    notes = Notes()
    notes.add(fake)
    assert notes.lines[0].isprintable()
    print_summary([(Path("a.h5"), None, fake), (Path("b.h5"), None, "")])
    print_error(fake)
    return 0
run(command)
""")
    assert all(line.isprintable() for line in lines), lines
    assert sum(line.startswith("  numbers     passed") for line in lines) == 1  # but from us, who may
    assert sum("passed" in line for line in lines) == 5


def test_name_of_a_layer_is_one_row():
    rows = ROWS.replace(repr(NAME), repr(f"conv{FAKE}"))
    assert rows != ROWS
    lines = in_a_pipe(rows)
    assert len(lines) == len(in_a_pipe(ROWS)) and "conv?[2K?1A??  numbers     passed  ?" in "".join(lines)


def test_names_that_a_terminal_prints_are_left_alone():
    for text in ("größe 模型 b\u3000c\u00a0d", "a\tb\x1bc"):
        assert printable(text) == text.replace("\t", "?").replace("\x1b", "?")


def test_log_of_a_process_is_printable():
    with Worker("tests.test_terminal") as worker, pytest.raises(WorkerError) as caught:
        worker.ask({})
    assert "?[2K" in caught.value.log and all(line.isprintable() for line in caught.value.log.split("\n"))


# Options that are not right


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data_dir", "x"], {"--data_dir", "--data-dir"}),
        (["--data_dir=x"], {"--data_dir", "--data-dir"}),
        (["--data", "x"], {"--data", "--data-dir"}),
        (["--device", "x"], {"--device"}),
        (["--epochs"], {"--epochs"}),
    ],
)
def test_what_is_wrong_is_said_first(capsys, arguments, expected):
    parser = Parser("A command.\n\nAnd more.", prog="command.py")
    parser.add_argument("--data-dir")
    parser.add_argument("--data", choices=("full", "sample"))
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--verbose")
    assert parser.description == "A command."
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert caught.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("command.py: ") and arguments[-1] in first
    assert set(re.findall(r"--[\w-]+", first)) == expected  # what is wrong, and what may be meant
    assert "command.py --help" in second


@pytest.mark.parametrize("script", ["convert.py", "evaluate.py"])
@pytest.mark.parametrize("name", ["", ".", "/"])
def test_path_without_a_name_is_no_file(script, name):
    run = subprocess.run([sys.executable, ROOT / script, name], capture_output=True, text=True)
    assert run.returncode == 2
    assert f"'{name}'" in run.stderr.splitlines()[0] and "Traceback" not in run.stderr


# How Python is started, and what the machine lets it do


@pytest.mark.parametrize("script", ["convert.py", "evaluate.py"])
@pytest.mark.parametrize(("options", "environment"), [(["-OO", "-I"], {}), ([], {"PYTHONSAFEPATH": "1"})])
def test_scripts_run_however_python_is_started(tmp_path, script, options, environment):
    command = [sys.executable, *options, ROOT / script, "none.pt"]
    command += ["-o", "none.keras"] if script == "convert.py" else ["--no-keras"]
    env = {**os.environ, **environment}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (run.returncode, len(run.stderr.splitlines())) == (1, 1), run.stderr
    assert "none.pt" in run.stderr


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't start new thread"), OSError(28, "full")]
)
def test_machine_that_has_no_more_is_one_line(capsys, monkeypatch, error):
    def command():
        raise error

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    assert terminal.run(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert type(error).__name__ in line and str(error) in line


def test_mistake_of_ours_is_none_of_the_machine(monkeypatch):
    def command():
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(RuntimeError):
        terminal.run(command)


if __name__ == "__main__":  # the worker of a test above
    sys.exit(FAKE)
