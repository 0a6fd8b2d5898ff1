"""Several hundred damaged files of each kind but Keras's own (tests/keras/test_fuzz.py)."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fuzz_others import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_whole_or_refused_in_one_line(kind):
    """In a process of its own, whose memory is limited."""
    count, least = (100, 20) if kind in ("safetensors", "onnx", "tflite", "pt2") else (300, 100)
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--kind", kind, "--count", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (total,) = [line.split() for line in done.stdout.splitlines() if line.startswith("total")]
    read, refused = int(total[1]), int(total[2])
    assert read + refused == count
    assert refused > least and (read > 0 or kind == "cifar")  # the damage was neither harmless nor total
