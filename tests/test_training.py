"""The training of the bundled baseline: its own BatchNormalization, and what happens when it is stopped."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.long

SET_UP = """
import json, sys
from pathlib import Path

import numpy as np

from models.keras import training as twin

rng = np.random.default_rng(0)
"""

BATCH_NORM = """
import tensorflow as tf

x = tf.constant(rng.normal(3, 2, (128, 8, 8, 6)), tf.float32)
seen = {}
for kind in (twin.keras.layers.BatchNormalization, twin.FusedBatchNormalization):
    layer = kind()
    layer.build(x.shape)
    layer.set_weights([np.linspace(0.5, 1.5, 6), np.linspace(-1, 1, 6), np.zeros(6), np.ones(6)])
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x, training=True) ** 3)
    gradients = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
    seen[kind.__name__] = [loss, *gradients, *layer.get_weights(), layer(x, training=False)]
print(json.dumps({name: [np.asarray(value).tolist() for value in values] for name, values in seen.items()}))
"""

# a small set of noise, and three epochs, one of them for the warm-up
TRAINING = """
images = rng.integers(0, 256, (640, 3, 32, 32), dtype=np.uint8)
labels = rng.integers(0, 10, 640, dtype=np.uint8)
twin.WARMUP_EPOCHS = 1
folder = Path(sys.argv[1])

class Stopped(twin.AugmentedImages):
    def on_epoch_end(self):
        if self.epoch == 2:  # Keras calls this once before the first epoch: that is the end of the second
            raise KeyboardInterrupt
        super().on_epoch_end()

if sys.argv[2] == "stop":
    twin.AugmentedImages = Stopped
try:
    twin.train(images, labels, epochs=3, output=folder / "model.h5", seed=0, holdout=128)
except KeyboardInterrupt:
    print("stopped")
"""


def run_keras(program: str, *arguments: object) -> str:
    """Run a program in a process of its own, as Keras needs; return what it printed."""
    command = [sys.executable, "-c", SET_UP + program, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_fused_batch_normalization_computes_what_keras_does():
    """Forward, gradients, statistics and inference; only the variance of the batch is the unbiased one."""
    seen = json.loads(run_keras(BATCH_NORM).splitlines()[-1])
    plain, fused = ([np.array(value) for value in values] for values in seen.values())
    n = 128 * 8 * 8
    *_, gamma, beta, mean, variance, inference = zip(plain, fused, strict=True)
    batch = (variance[0] - 0.99) / 0.01
    assert variance[1] == pytest.approx(0.99 + 0.01 * batch * n / (n - 1), rel=1e-6)
    for one, other in [*zip(plain[:4], fused[:4], strict=True), gamma, beta, mean, inference]:
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4 * np.abs(one).max())


def test_stopped_training_resumes_where_it_was(tmp_path):
    """Stopped in its second epoch and started again, it goes on from the first as if it never had been."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    run_keras(TRAINING, straight, "run")
    assert "stopped" in run_keras(TRAINING, stopped, "stop")
    assert not (stopped / "model.h5").exists()
    assert "Epoch 1/3" not in run_keras(TRAINING, stopped, "run")

    logs = [
        np.genfromtxt(folder / "model.training" / "log.csv", delimiter=",") for folder in (straight, stopped)
    ]
    assert len(logs[0]) == 1 + 3  # the heading, and a line an epoch
    assert logs[1][1:] == pytest.approx(logs[0][1:], rel=1e-4)
    assert (stopped / "model.training" / "curves.png").exists()


def test_missing_data_is_one_line(tmp_path):
    """No data, no training; the message says what to do, with status 1."""
    command = [sys.executable, "-m", "models.keras.train", "--data-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: no complete CIFAR-10 training set in")
    assert "Traceback" not in run.stderr
