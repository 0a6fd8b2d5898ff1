"""models/keras/worker.py: processes that answer, refuse, die and start again.

The worker of these tests is this file: `python -m tests.keras.test_worker`.
"""

import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from models.keras.worker import START_SECONDS, Worker, WorkerError, serve, temporary_folder


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
    if request["do"] == "hold a folder":
        with temporary_folder():
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


def test_its_temporary_folder_is_removed_with_it(tmp_path, monkeypatch):
    """When the command is interrupted; a worker that is killed cannot do it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "of others").mkdir()
    with ThreadPoolExecutor(1) as pool:
        with Worker("tests.keras.test_worker") as other:
            asked = pool.submit(other.ask, {"do": "hold a folder"})
            while len(list(tmp_path.iterdir())) < 2:
                assert not asked.done()
                time.sleep(0.01)
        assert list(tmp_path.iterdir()) == [tmp_path / "of others"]
        with pytest.raises(WorkerError, match="ended with status -9"):
            asked.result()
    assert other.log() == ""  # what a thread finds that comes to it after its owner closed it


def test_time_counts_from_when_it_is_ready(monkeypatch):
    """Its imports may take longer than an answer: on a slow machine, that is no fault of the file."""
    limits = []

    class Timer(threading.Timer):
        def __init__(self, seconds, act):
            super().__init__(seconds, act)
            limits.append(seconds)

    monkeypatch.setattr(threading, "Timer", Timer)
    with Worker("tests.keras.test_worker") as other:
        for _ in range(2):
            other.ask({"do": "echo"}, timeout=60)
    assert limits == [START_SECONDS, 60, 60]


def test_one_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setenv("SIZE", "of no number")
    with Worker("tests.keras.test_worker") as broken:
        with pytest.raises(
            WorkerError, match=r"status 1 as it started: ValueError: .*of no number"
        ) as caught:
            broken.ask({"do": "echo"})
        assert caught.value.status is None and "Traceback" in caught.value.log


def test_without_a_temporary_folder(monkeypatch):
    def full():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(WorkerError, match=r"^cannot run .*: No usable temporary directory"):
        Worker("tests.keras.test_worker")


def test_without_a_further_thread(worker, monkeypatch):
    def none(timer):
        raise RuntimeError("can't start new thread")

    worker.ask({"do": "echo"})
    with monkeypatch.context() as patch:
        patch.setattr(threading.Timer, "start", none)
        with pytest.raises(WorkerError, match="can't start new thread"):
            worker.ask({"do": "echo"})
    assert worker.ask({"do": "echo"})[0]["do"] == "echo"


if __name__ == "__main__":
    int(os.environ.get("SIZE", 0))  # as an import that fails
    serve(answer, refusals=(RefusalError,))
