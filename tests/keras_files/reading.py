"""Keras files read without a reader job, which takes 0.4 CPU s to start: in this process, or in a fork of it.

monkeypatch.setattr("models.keras.file.Job", InProcessReader)  # intact files
monkeypatch.setattr("models.keras.file.Job", ForkedReader)  # damaged files, which can crash HDF5; Linux
"""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.connection import Connection

import numpy as np

from models.common.cli import KerasFileError
from models.common.job import JobError, Message
from models.keras.reader import read_limited, read_safely


class InProcessReader:
    """Read in this process, with the interface of `Job`."""

    def __init__(self, module: str) -> None:
        assert module == "models.keras.reader"

    def run(self, request: dict, arrays: dict[str, np.ndarray]) -> Message:
        """Return the answer of the job. Raises JobError."""
        try:
            answer, arrays = read_safely(request, arrays)
        except KerasFileError as error:
            raise JobError(str(error)) from None
        return json.loads(json.dumps(answer)), arrays

    def close(self) -> None:
        """Do nothing: there is no process."""


class ForkedReader(InProcessReader):
    """Read in a fork of this process, with the job's limits on memory and CPU time."""

    def run(self, request: dict, arrays: dict[str, np.ndarray]) -> Message:
        """Return the answer of the job. Raises JobError, also when the child crashes."""
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=_answer, args=(sender, request, arrays))
        child.start()
        sender.close()
        try:
            answer, arrays = receiver.recv()
        except EOFError:
            child.join()
            raise JobError(f"ended with status {child.exitcode}", crashed=True) from None
        child.join()
        if "error" in answer:
            raise JobError(answer["error"])
        return json.loads(json.dumps(answer)), arrays


def read_in_fork(content: bytes) -> Message:
    """Return the fields and arrays of a file's content. Raises KerasFileError."""
    try:
        return ForkedReader("models.keras.reader").run({}, {"content": np.frombuffer(content, np.uint8)})
    except JobError as error:
        raise KerasFileError(str(error)) from None


def _answer(sender: Connection, request: dict, arrays: dict[str, np.ndarray]) -> None:
    try:
        answer = read_limited(request, arrays)
    except KerasFileError as error:
        answer = {"error": str(error)}, {}
    sender.send(answer)
