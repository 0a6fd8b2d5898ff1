"""models/common/cli.py: what reaches the terminal, exit statuses, options."""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.common import cli
from models.common.job import Job, JobError
from tests.evaluating import ROOT

CODES = "\x1b[2K\x9b1A\r\n  numbers     passed  \u202e"  # control codes that would forge a line


def program(code, redirection="", **environment):
    """Run a command that executes `code` with `run`, in a shell; return the finished process."""
    lines = ["import sys", "from models.common.cli import *", "def command():", code, "    return 0"]
    script = "\n".join([*lines, "sys.exit(run(command))"])
    shell = f"set -o pipefail; {sys.executable} -c '{script}' {redirection}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("redirection", "status"), [("| head -1", 0), (">&-", 0), ("> /dev/full", 1), ("> /dev/null", 0)]
)
def test_work_goes_on_without_stdout(tmp_path, redirection, status):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    work = f'    for n in range(5): echo("x" * 100000)\n    open("{tmp_path}/work", "w").close()'
    done = program(work, redirection)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, status), done.stderr
    assert (tmp_path / "work").exists()


def test_no_file_is_opened_as_stdout(tmp_path):
    """After `>&-` the first file would be file descriptor 1, which libraries print to."""
    done = program(f'    file = open("{tmp_path}/file", "w"); assert file.fileno() > 2', ">&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_letters_that_the_terminal_lacks_are_escaped():
    done = program('    echo("gr\\u00f6\\u00dfe")', PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "gr\\xf6\\xdfe\n")


def test_control_codes_reach_no_terminal(capsys):
    cli.echo(CODES)
    (notes := cli.Notes()).add(CODES)
    notes.add(CODES)
    cli.print_error(CODES)
    stdout, stderr = capsys.readouterr()
    assert all(line.isprintable() for line in (stdout + stderr).splitlines()) and len(notes.lines) == 1
    assert sum(line.startswith("  numbers     passed") for line in stdout.splitlines()) == 1  # of echo
    assert len(stderr.splitlines()) == 1 and notes.lines[0].isprintable()
    for text in ("größe 模型 b\u3000c\u00a0d", "a\tb\x1bc"):
        assert cli.printable(text) == text.replace("\t", "?").replace("\x1b", "?")


def test_control_codes_of_a_job_reach_no_terminal(tmp_path):
    (python := tmp_path / "python").write_text("#!/bin/sh\nprintf '\\033[2Kforged\\033[1A'; exit 1\n")
    python.chmod(0o755)
    with pytest.raises(JobError) as caught:
        Job("module", str(python)).run({}, {})
    assert caught.value.crashed and str(caught.value).endswith("?[2Kforged?[1A")
    assert caught.value.log == "?[2Kforged?[1A"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError(), 1),
        (OSError(28, "full"), 1),
        (RuntimeError("can't start new thread"), 1),
        (RuntimeError("a bug"), None),
    ],
)
def test_exit_status(capsys, monkeypatch, error, status):
    def command():
        raise error

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    if status is None:
        with pytest.raises(RuntimeError):
            cli.run(command)
    else:
        assert cli.run(command) == status
        assert len(capsys.readouterr().err.splitlines()) == 1


# Options


@pytest.mark.parametrize(
    ("parse", "right", "wrong"),
    [
        (cli.file_path, "x.h5", ("", ".", "/")),
        (cli.positive_float, "0.5", ("0", "-1", "nan", "x")),
        (cli.positive_int, "3", ("0", "1.5", "x")),
        (cli.unit_interval, "0.87", ("87", "-0.1", "nan")),
    ],
)
def test_options_are_parsed(capsys, parse, right, wrong):
    parser = argparse.ArgumentParser()
    parser.add_argument("--option", type=parse)
    assert str(parser.parse_args(["--option", right]).option) == right
    for text in wrong:
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([f"--option={text}"])
        assert caught.value.code == 2 and "--option" in capsys.readouterr().err


COMMANDS = {
    "convert.py": ["convert.py"],
    "evaluate.py": ["evaluate.py"],
    "benchmark": ["-m", "tests.benchmarks.run"],
    "recipes": ["-m", "tests.recipes"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_no_large_library(name, tmp_path):
    for library in ("tensorflow", "keras", "torch", "torchvision", "matplotlib"):
        (tmp_path / f"{library}.py").write_text("raise SystemExit('imported')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, *COMMANDS[name], "--help"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("options", [["-OO", "-I"], []])
@pytest.mark.parametrize("script", ["convert.py", "evaluate.py"])
def test_commands_start_however_python_does(tmp_path, script, options):
    command, env = [sys.executable, *options, ROOT / script], {**os.environ, "PYTHONSAFEPATH": "1"}
    for argument, status in (("--help", 0), ("--unknown", 2)):
        done = subprocess.run([*command, argument], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == status and "usage: " in done.stdout + done.stderr


def test_jobs_start_however_python_does(tmp_path):
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    command = [sys.executable, ROOT / "convert.py", "m.h5", "--no-verify"]
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: m.h5: damaged") and "OSError" in line
