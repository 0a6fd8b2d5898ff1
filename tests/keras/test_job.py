"""models/common/job.py: tasks that answer, refuse, crash and hang; this file is the job's module."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from models.common.job import ROOT, Job, JobError, serve


def task(request, arrays):
    match request["task"]:
        case "echo":
            print("printed by a library")
            return request, arrays
        case "refuse":
            raise JobError("no such layer")
        case "abort":
            os.abort()
        case "hang":
            time.sleep(600)
    raise RuntimeError("unexpected")


def job():
    return Job("tests.keras.test_job")


def test_arrays_there_and_back():
    arrays = {
        "float16": np.arange(6, dtype=np.float16).reshape(2, 3),
        "not contiguous": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        "big-endian": np.arange(3, dtype=">f4"),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4), np.float32),
        "a/b:0": np.array([np.nan, np.inf, -0.0]),
    }
    request = {"task": "echo", "text": "ü\n\0", "number": 0.1, "nothing": None}
    answer, returned = job().run(request, arrays)
    assert answer == request and list(returned) == list(arrays)
    for name, array in arrays.items():
        assert (returned[name].dtype, returned[name].shape) == (array.dtype, array.shape)
        assert returned[name].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("name", "crashed", "words"),
    [("refuse", False, "no such layer"), ("abort", True, "-6"), ("other", True, "RuntimeError: unexpected")],
)
def test_failure(name, crashed, words):
    with pytest.raises(JobError) as caught:
        job().run({"task": name}, {})
    assert caught.value.crashed is crashed and words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert ("Traceback" in caught.value.log) == (name == "other")


@pytest.mark.parametrize("name", ["/nowhere/python", "no-such-python", "/"])
def test_missing_program(name):
    with pytest.raises(JobError, match=name):
        Job("tests.keras.test_job", name)


def test_timeout_ends_the_process_and_removes_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(JobError) as caught, job() as hanging:
        assert list(tmp_path.iterdir()) == [hanging.folder]
        hanging.run({"task": "hang"}, {}, timeout=1)
    assert caught.value.crashed and hanging.process.returncode == -signal.SIGKILL
    with job():
        pass  # never run
    assert not list(tmp_path.iterdir())


def test_ends_when_its_owner_is_killed():
    code = "from tests.keras.test_job import *; print(job().process.pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        owner.kill()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


if __name__ == "__main__":
    serve(task)
