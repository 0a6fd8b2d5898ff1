"""README's road to TensorFlow Lite ('And back'): PyTorch, `convert.py`, int8, with the accuracy of float."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from convert import convert_back, convert_file
from models.resnet8 import ResNet8
from tests.conftest import ROOT
from tests.evaluating import REAL_MODEL, needs_real_model


def recipe():
    """The code under README's heading TensorFlow Lite."""
    section = re.search(r"^### TensorFlow Lite$(.*?)^##", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    return code


@pytest.mark.long
@needs_real_model
def test_recipe(reader, keras, sample, tmp_path):
    convert_file(REAL_MODEL, tmp_path / "model.pt", reader)
    convert_back(tmp_path / "model.pt", tmp_path / "model.h5", reader, keras, verify=False)
    with torch.inference_mode():
        logits = ResNet8.from_checkpoint(tmp_path / "model.pt")(torch.from_numpy(sample.images).float())
    accuracy = float((logits.argmax(1).numpy() == sample.labels).mean())

    command = [sys.executable, "-W", "ignore", "-c", recipe()]
    quiet = {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **quiet}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (int8,) = re.findall(r"^int8: ([\d.]+) %$", done.stdout, re.MULTILINE)
    assert np.abs(float(int8) / 100 - accuracy) <= 0.02 and accuracy > 0.85
    weights = sum(tensor.numel() for tensor in torch.load(tmp_path / "model.pt", weights_only=True).values())
    assert weights < (tmp_path / "model_int8.tflite").stat().st_size < 2 * weights  # a byte a weight
