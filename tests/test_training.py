"""The training of the bundled baseline: its layers, its teacher, its average, and that it can be stopped."""

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
images = rng.integers(0, 256, (640, 3, 32, 32), dtype=np.uint8)
labels = rng.integers(0, 10, 640, dtype=np.uint8)
folder = Path(*sys.argv[1:2])
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

LOSS = """
logits, teacher = rng.normal(0, 3, (2, 5, 10)).astype(np.float32)
true = np.arange(5)[:, None]
losses = twin.loss(true, logits), twin.loss(np.hstack([true, teacher]), logits)
print(json.dumps([np.asarray(value).tolist() for value in (logits, teacher, *losses)]))
"""

# the targets of three epochs, the third with the images of the first; then a resumed training's second epoch
TARGETS = """
twin.TEACHER_ROUNDS = 2
teacher = twin.without_softmax(twin.resnet8(width=4))
batches = twin.AugmentedImages(images, labels, 0, 0, teacher, folder)
errors, flipped, in_order, largest = [], [], [], 0
for epoch in range(3):
    shown, targets = (np.concatenate(parts) for parts in zip(*(batches[i] for i in range(len(batches)))))
    for found, pixels in ((errors, shown), (flipped, shown[:, :, ::-1])):
        found.append(float(np.abs(targets[:, 1:] - teacher.predict_on_batch(pixels)).max()))
    largest = max(largest, float(np.abs(targets[:, 1:]).max()))
    in_order.append(shown[np.argsort(batches.order)])
    assert (targets[:, 0] == labels[batches.order]).all()
    batches.on_epoch_end()
same = [(in_order[0] == other).all(axis=(1, 2, 3)).mean() for other in in_order]

def broken(*_):
    raise AssertionError("asked again")

teacher.predict_on_batch = broken
again = twin.AugmentedImages(images, labels, 0, 1, teacher, folder)
errors.append(float(np.abs(teacher(again[0][0]) - again[0][1][:, 1:]).max()))
print(json.dumps([errors, flipped, same, largest]))
"""

STATISTICS = """
model = twin.resnet8(batch_norm=twin.FusedBatchNormalization)
for weight in model.trainable_variables:
    weight.assign(weight + rng.normal(0, 0.1, weight.shape))
batches = twin.AugmentedImages(images, labels, 0)
twin.measure_statistics(model, batches)
conv, norm = model.layers[1:3]
ones = tf.ones(16)  # a batch's mean as the training takes it: a float32 sum of 131,072 values is off by 1e-4
means = [
    tf.compat.v1.nn.fused_batch_norm(conv(batches[step][0]), ones, ones)[1] for step in range(len(batches))
]
mean = np.mean(means, 0, np.float64)
print(json.dumps([mean.tolist(), norm.moving_mean.numpy().tolist(), norm.momentum]))

# over a single batch, inference is what training computes
batches = twin.AugmentedImages(images[:128], labels[:128], 0)
twin.measure_statistics(model, batches)
print(json.dumps([model(batches[0][0], training=training).numpy().tolist() for training in (True, False)]))
"""

AVERAGE = """
for twin.EMA_MOMENTUM in (1.0, 0.0):
    output = folder / "trained" / f"{twin.EMA_MOMENTUM}.h5"
    twin.train(images[:256], labels[:256], 2, output, 0, 0, 4, None, False)
    twin.keras.utils.set_random_seed(0)
    start, end = twin.resnet8(width=4).get_weights(), twin.keras.models.load_model(output).get_weights()
    print(json.dumps([float(np.abs(a - b).max()) for a, b in zip(start, end) if a.ndim == 4]))
"""

# from the file of the last training, whose start an average that takes in nothing keeps; from one of another
# width, and from one with code in it
START = """
twin.EMA_MOMENTUM = 1.0
started = folder / "trained" / "started.h5"
twin.train(images[:256], labels[:256], 1, started, 1, 0, 4, None, False, output)
start, end = (twin.keras.models.load_model(file).get_weights() for file in (output, started))
pixels = twin.keras.Input((32, 32, 3))
code = folder / "trained" / "code.h5"
twin.keras.Model(pixels, twin.keras.layers.Lambda(lambda x: x)(pixels)).save(code)
refused = []
for size, file in ((8, output), (4, code)):
    try:
        twin.train(images[:256], labels[:256], 1, code.with_name("refused.h5"), 1, 0, size, None, False, file)
    except twin.KerasFileError as error:
        refused.append(str(error))
left = [file.name for file in code.parent.glob("*refused*")]
print(json.dumps([[float(np.abs(a - b).max()) for a, b in zip(start, end) if a.ndim == 4], refused, left]))
"""

# the network as it is and in bfloat16: logits, the types that its layers compute in, and those of its weights
BFLOAT16 = """
model = twin.without_softmax(twin.resnet8(batch_norm=twin.FusedBatchNormalization))
batch = rng.integers(0, 256, (64, 32, 32, 3)).astype(np.float32)
twin.measure_statistics(model, twin.AugmentedImages(images, labels, 0))
outputs = [model(batch)]
twin.in_bfloat16(model)
outputs += [model(batch)]
types = [layer.compute_dtype for layer in model.layers], [weight.dtype for weight in model.weights]
print(json.dumps([*(np.asarray(logits).tolist() for logits in outputs), outputs[1].dtype.name, *types]))

# trained so, the file is as ever
twin.train(images[:256], labels[:256], 1, folder / "trained/bfloat16.h5", 0, 0, 4, None, True)
trained = twin.keras.models.load_model(folder / "trained/bfloat16.h5")
print(json.dumps([layer.compute_dtype for layer in trained.layers]))
"""

# an untrained teacher, and three epochs, one of them for the warm-up
TRAINING = """
twin.WARMUP_EPOCHS, twin.TEACHER_ROUNDS = 1, 2

def train(folder):
    folder.mkdir(parents=True, exist_ok=True)
    twin.keras.utils.set_random_seed(1)
    twin.resnet8(width=4).save(folder / "teacher.h5")
    twin.train(images[:384], labels[:384], 3, folder / "model.h5", 0, 128, 4, folder / "teacher.h5", False)
    model = twin.keras.models.load_model(folder / "model.h5")
    print(json.dumps([weight.tolist() for weight in model.get_weights()]))
"""

STOPPED = """
class Stopped(twin.AugmentedImages):
    def on_epoch_end(self):
        if self.epoch == 2:  # Keras calls this once before the first epoch: that is the end of the second
            raise KeyboardInterrupt
        super().on_epoch_end()

train(folder / "trained/straight")
uninterrupted, twin.AugmentedImages = twin.AugmentedImages, Stopped
try:
    train(folder / "trained/stopped")
except KeyboardInterrupt:
    twin.AugmentedImages = uninterrupted
"""


def run_keras(program: str, *arguments: object) -> str:
    """Run a program in a process of its own, as Keras needs; return what it printed."""
    command = [sys.executable, "-c", SET_UP + program, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Run what tries a part of the training, in one process: what each printed, and the logits' folder."""
    folder = tmp_path_factory.mktemp("parts")
    printed = run_keras(
        BATCH_NORM + LOSS + TARGETS + STATISTICS + BFLOAT16 + TRAINING + STOPPED + AVERAGE + START, folder
    )
    found = [json.loads(line) for line in printed.splitlines() if line.startswith(("[", "{"))]
    batch_norm, loss, targets, first, single, bfloat16, trained, weights, *averages, start = found
    seen = {"batch norm": batch_norm, "loss": loss, "targets": targets, "statistics": (first, single)}
    seen |= {"bfloat16": (*bfloat16, trained), "start": start}
    return {**seen, "weights": weights, "averages": averages}, folder


def test_fused_batch_normalization_computes_what_keras_does(parts):
    """Forward, gradients, statistics and inference; only the variance of the batch is the unbiased one."""
    seen = parts[0]["batch norm"]
    plain, fused = ([np.array(value) for value in values] for values in seen.values())
    n = 128 * 8 * 8
    *_, gamma, beta, mean, variance, inference = zip(plain, fused, strict=True)
    batch = (variance[0] - 0.99) / 0.01
    assert variance[1] == pytest.approx(0.99 + 0.01 * batch * n / (n - 1), rel=1e-6)
    for one, other in [*zip(plain[:4], fused[:4], strict=True), gamma, beta, mean, inference]:
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4 * np.abs(one).max())


def test_loss_is_hintons(parts):
    """The labels' cross-entropy; with a teacher, a tenth of it and 0.9 T^2 times the teacher's at T = 2."""
    logits, teacher, alone, taught = map(np.array, parts[0]["loss"])

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    of_labels = -log_softmax(logits)[range(5), range(5)]
    of_teacher = -(np.exp(log_softmax(teacher / 2)) * log_softmax(logits / 2)).sum(axis=1)
    assert alone == pytest.approx(of_labels, rel=1e-5)
    assert taught == pytest.approx(0.1 * of_labels + 0.9 * 4 * of_teacher, rel=1e-5)


def test_targets_are_what_the_teacher_says_of_the_image_shown(parts):
    """For two rounds of shifts and flips, which come in turn; the teacher is asked once for each."""
    (errors, flipped, same, largest), folder = parts[0]["targets"], parts[1]
    assert max(errors) < 2**-10 * largest  # the last bit of the largest logit, in float16
    assert min(flipped) > 1
    assert same[1] < 0.05  # the same shift and flip by chance: 1 of 162
    assert same[2] == 1
    assert sorted(file.name for file in folder.glob("*.*")) == ["logits-0.npy", "logits-1.npy"]


def test_statistics_are_those_of_the_weights(parts):
    """The first layer's mean is the average over all batches of images, shifted and flipped."""
    first, single = parts[0]["statistics"]
    mean, moving_mean, momentum = first
    assert moving_mean == pytest.approx(mean, rel=1e-4, abs=1e-3)
    assert momentum == 0.99  # as it was
    assert np.array(single[1]) == pytest.approx(np.array(single[0]), abs=1e-3)


def test_bfloat16_is_only_what_the_layers_compute_in(parts):
    """Weights, logits and the file stay float32; the logits differ as numbers of 8 bits do."""
    plain, rounded, of_logits, of_layers, of_weights, of_file = parts[0]["bfloat16"]
    error = np.abs(np.array(rounded) - plain).max() / np.abs(plain).max()
    assert 2**-16 < error < 2**-5
    assert of_layers == ["bfloat16"] * (len(of_layers) - 1) + ["float32"]
    assert {of_logits, *of_weights, *of_file} == {"float32"}


def test_the_file_holds_the_average_of_the_weights(parts):
    """An average that takes in nothing has the first step's weights, whose learning rate is 0."""
    kept, moved = parts[0]["averages"]
    assert max(kept) == 0
    assert min(moved) > 1e-3


def test_training_starts_from_a_file_of_its_width(parts):
    """The weights of the first step, whose learning rate is 0, are the file's.

    A file of another width, or with code in it, is refused, and nothing is written.
    """
    moved, (of_width, of_code), left = parts[0]["start"]
    assert max(moved) == 0
    assert "0.0.h5" in of_width and "width" in of_width
    assert "code.h5" in of_code and "Lambda" in of_code
    assert left == []


def test_stopped_training_resumes_where_it_was(parts):
    """Stopped in its second epoch and started again, it goes on from the first as if it never had been."""
    straight, stopped = (parts[1] / "trained" / name for name in ("straight", "stopped"))
    assert not (stopped / "model.h5").exists()
    resumed = run_keras(TRAINING + "train(folder)", stopped)
    assert "Epoch 1/3" not in resumed
    assert "Epoch 3/3" in resumed
    for one, other in zip(parts[0]["weights"], json.loads(resumed.splitlines()[-1]), strict=True):
        assert np.array_equal(one, other)

    logs = [(folder / "model.training" / "log.csv").read_text() for folder in (straight, stopped)]
    assert len(logs[0].splitlines()) == 1 + 3  # the heading, and a line an epoch
    assert logs[1] == logs[0]
    assert (stopped / "model.training" / "curves.png").exists()


def test_missing_data_is_one_line(tmp_path):
    """No data, no training; the message says where it was looked for, with status 1."""
    command = [sys.executable, "-m", "models.keras.train", "--data-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert str(tmp_path) in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
