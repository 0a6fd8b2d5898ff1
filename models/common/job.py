"""One task in a separate Python process: a JSON request and arrays in, a JSON answer and arrays out.

HDF5, Keras and the inference runtimes run this way: a crash, an endless loop or a conflict between libraries
ends one task, not the command. Request and answer are `.npz` files in a temporary folder, without pickle.
"""

from __future__ import annotations  # `--keras-python` may be an older Python

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from models.common.cli import printable

ROOT = Path(__file__).resolve().parents[2]
Message = tuple[dict, "dict[str, np.ndarray]"]


class JobError(Exception):
    """A job that was refused with one line, was not started, or `crashed`; `log` is its output then."""

    def __init__(self, message: str, crashed: bool = False, log: str = "") -> None:
        super().__init__(message)
        self.crashed, self.log = crashed, log


class Job:
    """A process `python -m MODULE FOLDER` that runs one task."""

    def __init__(self, module: str, python: str = sys.executable) -> None:
        """Start the process: its imports overlap the caller's. Raises JobError if `python` cannot be run."""
        self.module = module
        program = os.path.abspath(shutil.which(python) or python)
        try:
            self.temporary = tempfile.TemporaryDirectory(prefix="resnet8-")
            self.folder = Path(self.temporary.name)
            search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            with (self.folder / "log").open("wb") as log:
                self.process = subprocess.Popen(
                    [program, "-m", module, self.folder],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": search},
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                )
        except OSError as error:
            raise JobError(f"cannot run {python}: {error.strerror}") from None

    def run(self, request: dict, arrays: dict[str, np.ndarray], timeout: float = 600) -> Message:
        """Run the task, for at most `timeout` seconds, and return its answer. Raises JobError."""
        with self:
            try:
                _save(self.folder / "request.npz", request, arrays)
                self.process.communicate(b"go\n", timeout)
            except subprocess.TimeoutExpired:
                raise JobError(f"{self.module} took over {timeout:g} s", crashed=True) from None
            except OSError as error:
                raise JobError(f"cannot write to {self.folder}: {error.strerror}") from None
            answer_file = self.folder / "answer.npz"
            if self.process.returncode or not answer_file.exists():
                log = (self.folder / "log").read_text(errors="replace")
                log = "\n".join(map(printable, log.split("\n")))
                status = f"{self.module} ended with status {self.process.returncode}"
                raise JobError(": ".join([status, *log.splitlines()[-1:]]), crashed=True, log=log)
            answer, answer_arrays = _load(answer_file)
        if "error" in answer:
            raise JobError(answer["error"])
        return answer, answer_arrays

    def close(self) -> None:
        """End the process and remove its folder."""
        self.process.kill()
        self.process.communicate()
        self.temporary.cleanup()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve(task: Callable[[dict, dict[str, np.ndarray]], Message], refusals: tuple = (JobError,)) -> None:
    """Run the task of this process; an exception of a type in `refusals` becomes its answer."""
    folder = Path(sys.argv[1])
    if not sys.stdin.readline():  # the caller has ended
        return
    try:
        answer = task(*_load(folder / "request.npz"))
    except refusals as error:
        answer = {"error": str(error)}, {}
    _save(folder / "answer.npz", *answer)


def limit_resources(memory: int, cpu_seconds: int) -> None:
    """Limit this process to so many more bytes and CPU seconds, on systems that can (Linux).

    CPU time, unlike wall time, does not depend on the load of the machine.
    """
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    for limit, value in (
        (resource.RLIMIT_AS, used + memory),
        (resource.RLIMIT_CPU, int(seconds) + cpu_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _save(path: Path, message: dict, arrays: dict[str, np.ndarray]) -> None:
    header = np.array(json.dumps([message, list(arrays)]))
    with path.open("wb") as file:
        np.savez(file, header, *arrays.values())


def _load(path: Path) -> Message:
    with np.load(path, allow_pickle=False) as content:
        message, names = json.loads(str(content["arr_0"]))
        return message, {name: content[f"arr_{index}"] for index, name in enumerate(names, 1)}
