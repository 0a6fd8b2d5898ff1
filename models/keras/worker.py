"""Python processes that answer requests: where HDF5 and Keras run, away from PyTorch.

Importing torchvision after tensorflow crashes the interpreter, and damaged bytes can crash the HDF5 library.
In a process of its own, neither takes the conversion with it; and its start-up overlaps ours. A message is a
JSON object and any number of arrays, sent through a pipe as JSON and raw bytes: no pickle, either way.
"""

from __future__ import annotations  # `--keras-python` may name an older Python

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from models.common.errors import printable

ROOT = Path(__file__).resolve().parents[2]


START_SECONDS = 600  # for the imports of a slow machine
FILES = "RESNET8_WORKER_FILES"  # the environment's name of how a worker's temporary folders begin


class WorkerError(Exception):
    """The worker refused or did not start (`status` is None), or ended with `status`; `log` is its stderr."""

    def __init__(self, message: str, status: int | None = None, log: str = "") -> None:
        super().__init__(message)
        self.status, self.log = status, log


class Worker:
    """A process that runs `python -m MODULE`, whose `main` calls `serve`.

    It is started at once, so that its imports overlap what the caller does next, and again after it has died.
    """

    def __init__(self, module: str, python: str = sys.executable) -> None:
        """Start it; raises WorkerError if `python` cannot be run."""
        self.module, self.python = module, python
        self._start()

    def _start(self) -> None:
        self.is_ready, self.files = False, f"resnet8-{uuid.uuid4().hex}-"
        program = shutil.which(self.python)
        if program is None:
            raise WorkerError(f"cannot run {self.python}: there is no such program")
        search = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        try:
            self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
            self.process = subprocess.Popen(
                [os.path.abspath(program), "-m", self.module],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search), FILES: self.files},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                start_new_session=True,  # Ctrl-C is for the command, which ends its workers
            )
        except OSError as error:
            raise WorkerError(f"cannot run {self.python}: {error.strerror}") from None
        for pipe in (self.process.stdin, self.process.stdout):
            _widen(pipe)

    def ask(self, request: dict, arrays: dict[str, np.ndarray] | None = None, timeout: float = 600) -> tuple:
        """Return the worker's answer to `request`: (dict, arrays by name).

        Raises WorkerError when it refuses (with its own message), dies, or takes over `timeout` seconds. They
        count from when it is ready: imports take long on a slow machine.
        """
        if self.process.poll() is not None:
            self.close()
            self._start()
        if not self.is_ready:
            try:
                self._within(START_SECONDS, lambda: _receive(self.process.stdout))
            except WorkerError as error:  # it is no answer to this request
                reason = error.log.strip().splitlines()[-1:]
                raise WorkerError(": ".join([f"{error} as it started", *reason]), log=error.log) from None
            self.is_ready = True

        def exchange() -> tuple:
            _send(self.process.stdin, request, arrays or {})
            return _receive(self.process.stdout)

        answer, answered = self._within(timeout, exchange)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer, answered

    def _within(self, seconds: float, act: Callable[[], tuple]) -> tuple:
        """Do something with the process; raises WorkerError when it dies, or takes over so many seconds."""
        timer = threading.Timer(seconds, self.process.kill)
        try:
            timer.start()
            return act()
        except RuntimeError as error:  # there can be no further thread
            raise WorkerError(f"{self.module}: {error}") from None
        except (EOFError, OSError):
            status = self.process.wait()
            after = f" after {seconds:.0f} s" if not timer.is_alive() else ""
            run_by = "" if self.python == sys.executable else f", run by {self.python},"
            message = f"{self.module}{run_by} ended with status {status}{after}"
            raise WorkerError(message, status, self.log()) from None
        finally:
            timer.cancel()

    def log(self) -> str:
        """Return what the process has written to its stderr, as a terminal may print it; "" once closed."""
        try:
            self.stderr.seek(0)
            content = self.stderr.read()
        except ValueError:  # the owner, in another thread, has closed it
            return ""
        return "\n".join(map(printable, content.decode(errors="replace").split("\n")))

    def close(self) -> None:
        """End the process, and remove what it has in temporary folders."""
        self.process.kill()
        self.process.wait()
        for folder in Path(tempfile.gettempdir()).glob(f"{self.files}*"):
            shutil.rmtree(folder, ignore_errors=True)
        self.process.stdin.close()
        self.process.stdout.close()
        self.stderr.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve(
    answer: Callable[[dict, dict[str, np.ndarray]], tuple], refusals: tuple[type[Exception], ...]
) -> None:
    """Answer requests from stdin with `answer(request, arrays) -> (dict, arrays)` until stdin ends.

    An exception of a type in `refusals` is an answer too; any other ends the process.
    """
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    try:
        _send(replies, {}, {})  # all is imported
        while True:
            request, arrays = _receive(requests)
            try:
                _send(replies, *answer(request, arrays))
            except refusals as error:
                _send(replies, {"error": str(error)}, {})
    except (EOFError, BrokenPipeError):  # its owner has ended
        return


def temporary_folder() -> tempfile.TemporaryDirectory:
    """Return a temporary folder for a worker, which its owner removes when it ends the process."""
    return tempfile.TemporaryDirectory(prefix=os.environ.get(FILES))


def _widen(pipe: BinaryIO) -> None:
    """Let a pipe hold 1 MB in place of 64 KB, where the system has that: arrays pass in fewer turns."""
    with suppress(ImportError, AttributeError, OSError):  # Linux alone has it, and a limit may forbid it
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**20)


def _send(pipe: BinaryIO, message: dict, arrays: dict[str, np.ndarray]) -> None:
    layout = [(name, np.asarray(array).dtype.str, np.shape(array)) for name, array in arrays.items()]
    header = json.dumps([message, layout]).encode()
    pipe.write(struct.pack("<Q", len(header)) + header)
    for array in arrays.values():
        pipe.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # no copy
    pipe.flush()


def _receive(pipe: BinaryIO) -> tuple[dict, dict[str, np.ndarray]]:
    (size,) = struct.unpack("<Q", _read(pipe, 8))
    message, layout = json.loads(_read(pipe, size))
    arrays = {}
    for name, dtype, shape in layout:
        content = _read(pipe, np.dtype(dtype).itemsize * math.prod(shape))
        arrays[name] = np.frombuffer(content, dtype).reshape(shape)
    return message, arrays


def _read(pipe: BinaryIO, size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content
