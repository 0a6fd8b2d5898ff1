"""models/keras/worker.py: processes that answer, refuse, die and start again.

The worker of these tests is this file: `python -m tests.keras.test_worker`.
"""

import os
import sys
import time

import numpy as np
import pytest

from models.keras.worker import Worker, WorkerError, serve


class RefusalError(Exception):
    pass


def answer(request, arrays):
    if request["do"] == "echo":
        return {**request, "pid": os.getpid()}, arrays
    if request["do"] == "print":
        print("a library prints this")
        os.write(1, b"and C code that\n")
        return {}, {}
    if request["do"] == "refuse":
        raise RefusalError(request["why"])
    if request["do"] == "crash":
        os.abort()
    if request["do"] == "exit":
        sys.exit("said on the way out")
    if request["do"] == "hang":
        time.sleep(600)
    raise RuntimeError("unforeseen")


@pytest.fixture(scope="module")
def worker():
    with Worker("tests.keras.test_worker") as process:
        yield process


def test_arrays_there_and_back(worker):
    arrays = {
        "float16": np.arange(6, dtype=np.float16).reshape(2, 3),
        "not contiguous": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        "big-endian": np.arange(3, dtype=">f4"),
        "scalar": np.float64(3.5),
        "empty": np.zeros((0, 4), np.float32),
        "of special values": np.array([np.nan, np.inf, -0.0]),
        "large": np.random.default_rng(0).integers(0, 256, 5_000_000).astype(np.uint8),
    }
    request = {"do": "echo", "text": "ü\n\0", "number": 0.1, "nothing": None}
    message, answered = worker.ask(request, arrays)
    assert {key: message[key] for key in request} == request
    assert list(answered) == list(arrays)
    for name, array in arrays.items():
        assert answered[name].dtype == array.dtype and answered[name].shape == array.shape
        assert answered[name].tobytes() == array.tobytes()


def test_what_it_prints_is_no_answer(worker):
    assert worker.ask({"do": "print"}) == ({}, {})
    assert "and C code that" in worker.log()


def test_refusal_is_an_answer(worker):
    pid = worker.ask({"do": "echo"})[0]["pid"]
    with pytest.raises(WorkerError, match=r"^no such layer$") as caught:
        worker.ask({"do": "refuse", "why": "no such layer"})
    assert caught.value.status is None
    assert worker.ask({"do": "echo"})[0]["pid"] == pid


@pytest.mark.parametrize(
    ("do", "status", "log"),
    [("crash", -6, ""), ("exit", 1, "said on the way out"), ("fail", 1, "RuntimeError: unforeseen")],
)
def test_death_is_reported_and_it_starts_again(worker, do, status, log):
    pid = worker.ask({"do": "echo"})[0]["pid"]
    with pytest.raises(WorkerError, match=f"tests.keras.test_worker ended with status {status}") as caught:
        worker.ask({"do": do})
    assert caught.value.status == status and log in caught.value.log
    assert worker.ask({"do": "echo"})[0]["pid"] != pid


def test_time_limit(worker):
    worker.ask({"do": "echo"})
    with pytest.raises(WorkerError, match=r"ended with status -9 after 1 s"):
        worker.ask({"do": "hang"}, timeout=1)
    assert worker.ask({"do": "echo"})[0]["do"] == "echo"


@pytest.mark.parametrize("python", ["/nowhere/python", "no-such-python", "/"])
def test_program_that_cannot_run(python):
    with pytest.raises(WorkerError, match=f"cannot run {python}: "):
        Worker("tests.keras.test_worker", python)


def test_ends_with_its_owner(worker):
    """A process whose pipe closes ends by itself: none is left behind when the command is killed."""
    with Worker("tests.keras.test_worker") as other:
        other.ask({"do": "echo"})
        other.process.stdin.close()
        assert other.process.wait(timeout=60) == 0


if __name__ == "__main__":
    serve(answer, refusals=(RefusalError,))
