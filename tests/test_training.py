"""The training of the bundled model: its batches, loss, statistics and average, and how it resumes.

Keras runs in one process of its own, which imports this file and runs the functions in the first half.
"""

import contextlib
import io
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from convert import convert_file
from models.common.cli import KerasFileError

pytestmark = pytest.mark.long
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (256, 3, 32, 32), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 256, dtype=np.uint8)
EPOCHS = 2

# --- In the process of Keras ------------------------------------------------------------------------------


def run_eagerly():
    """Import Keras, and compile no step: tracing takes seconds."""
    from models.keras import train

    assert train.keras.backend.backend() == "tensorflow"
    sys.modules["tensorflow"].config.run_functions_eagerly(True)


def untrained(folder, width=4):
    from models.keras import train

    train.keras.utils.set_random_seed(1)
    path = folder / "teacher.h5"
    train.resnet8(width=width).save(path)
    return path


def losses(logits, targets):
    from models.keras import train

    return np.asarray(train.loss(targets, logits))


def batches_of_epochs(folder, epochs):
    """Return the first batch of each epoch, and the teacher's logits for the images of the first."""
    from models.keras import train

    teacher = train.read_model(untrained(folder))
    data = train.AugmentedImages(IMAGES, LABELS, 0, teacher)
    batches = []
    for epoch in epochs:
        data.draw(epoch)
        batches.append((*data[1], data.order[128:256]))
    assert len(data) == 2
    return batches, teacher.predict_on_batch(batches[0][0])


def statistics(count):
    """Measure statistics over `count` batches; return the means of the first layer's outputs, and more."""
    from models.keras import train

    train.keras.utils.set_random_seed(0)
    model = train.resnet8(width=4)
    batches = train.AugmentedImages(IMAGES[: 128 * count], LABELS[: 128 * count], 0, None)
    train.measure_statistics(model, batches)
    conv, norm = model.layers[1:3]
    means = [np.mean(conv(batches[step][0]), axis=(0, 1, 2), dtype=np.float64) for step in range(count)]
    outputs = [np.asarray(model(batches[0][0], training=training)) for training in (False, True)]
    return np.mean(means, axis=0), np.asarray(norm.moving_mean), norm.momentum, outputs


def training(folder, stop=False):
    """Train a student with validation; with `stop`, interrupt it before its last epoch."""
    from models.keras import train

    def draw_or_stop(data, epoch):
        if stop and epoch == EPOCHS - 1:
            raise KeyboardInterrupt
        draw(data, epoch)

    train.WARMUP_EPOCHS = 1
    teacher, output, printed = untrained(folder), folder / "model.h5", io.StringIO()
    draw, train.AugmentedImages.draw = train.AugmentedImages.draw, draw_or_stop
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(KeyboardInterrupt):
            train.train(IMAGES, LABELS, output, EPOCHS, width=4, holdout=128, teacher=teacher)
    finally:
        train.AugmentedImages.draw = draw
    return printed.getvalue()


def refused_teachers(folder):
    """Return the messages for a teacher with code in it and for weights alone, and the files written."""
    from models.keras import train

    pixels = train.keras.Input((32, 32, 3))
    train.keras.Model(pixels, train.keras.layers.Lambda(lambda x: x)(pixels)).save(folder / "code.h5")
    train.resnet8(width=4).save_weights(folder / "alone.weights.h5")
    messages = []
    for teacher in ("code.h5", "alone.weights.h5"):
        try:
            train.train(IMAGES, LABELS, folder / "output.h5", 1, teacher=folder / teacher)
        except KerasFileError as error:
            messages.append(str(error))
    return messages, sorted(path.name for path in folder.iterdir())


def command(*arguments):
    """Run the command; return its status and its stderr."""
    from models.keras import train

    sys.argv = ["train", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        return train.main(), printed.getvalue()


# --- In the process of pytest ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    """Return a function that runs one of the functions above in the process of Keras."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), run_eagerly) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def test_loss_is_hintons(run):
    """The labels' cross-entropy; with a teacher, a tenth of it and 0.9 T^2 times the teacher's at T = 2."""
    logits, teacher = np.random.default_rng(0).normal(0, 3, (2, 5, 10)).astype(np.float32)
    labels = np.arange(5, dtype=np.float32)[:, None]

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    with_labels = -log_softmax(logits)[range(5), range(5)]
    with_teacher = -(np.exp(log_softmax(teacher / 2)) * log_softmax(logits / 2)).sum(axis=1)
    assert run(losses, logits, labels) == pytest.approx(with_labels, rel=1e-5)
    expected = 0.1 * with_labels + 0.9 * 4 * with_teacher
    assert run(losses, logits, np.hstack([labels, teacher])) == pytest.approx(expected, rel=1e-5)


def test_batches_are_augmented_images_their_labels_and_the_teachers_logits(run, tmp_path):
    """They follow from the epoch alone; every image is one of the 81 shifts and 2 flips of its own."""
    (first, other, again), logits = run(batches_of_epochs, tmp_path, [3, 4, 3])
    for one, same in zip(first, again, strict=True):
        assert np.array_equal(one, same)
    images, targets, order = first
    assert (images.shape, images.dtype) == ((128, 32, 32, 3), np.float32)
    assert not np.array_equal(order, other[2])
    assert np.array_equal(targets[:, 0], LABELS[order]) and np.array_equal(targets[:, 1:], logits)
    seen = set()
    for image, index in zip(images, order, strict=True):
        padded = np.pad(IMAGES[index].transpose(1, 2, 0), [(4, 4), (4, 4), (0, 0)])
        shifted = {
            (row, column): padded[row : row + 32, column : column + 32] for row, column in np.ndindex(9, 9)
        }
        seen |= {
            (*shift, flip)
            for shift, pixels in shifted.items()
            for flip in (1, -1)
            if np.array_equal(pixels[:, ::flip], image)
        }
    assert 60 < len(seen) <= 128  # 128 draws of 162 hit 88 in the mean


def test_statistics_are_those_of_the_weights(run):
    """The mean over all batches; over a single batch, inference computes the same as training."""
    mean, moving_mean, momentum, _ = run(statistics, 2)
    assert moving_mean == pytest.approx(
        mean, abs=1e-4 * np.abs(mean).max()
    )  # a float32 sum of 131,072 values
    assert momentum == 0.99
    inference, in_training = run(statistics, 1)[3]
    assert inference == pytest.approx(in_training, abs=1e-3)


def test_a_stopped_training_resumes_exactly_and_its_file_converts(run, tmp_path):
    """The file has the averaged weights, not those of the last step."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    assert "Epoch 1/2" in run(training, straight)
    run(training, stopped, True)
    assert not (stopped / "model.h5").exists()
    resumed = run(training, stopped)
    assert "Epoch 1/2" not in resumed and "Epoch 2/2" in resumed and "128" in resumed

    for folder in (straight, stopped):
        convert_file(folder / "model.h5", folder / "model.pt")
    assert (straight / "model.pt").read_bytes() == (stopped / "model.pt").read_bytes()
    logs = [(folder / "model.training" / "log.csv").read_text() for folder in (straight, stopped)]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 1 + EPOCHS

    kernel = torch.load(straight / "model.pt", weights_only=True)["conv1.weight"].permute(2, 3, 1, 0).numpy()
    (backup_file,) = Path(straight, "model.training", "backup").glob("*.weights.h5")
    with h5py.File(backup_file) as backup:
        assert not np.array_equal(backup["layers/conv2d/vars/0"], kernel)
        assert any(np.array_equal(value, kernel) for value in backup["optimizer/vars"].values())


def test_a_teacher_with_code_or_weights_alone_is_refused(run, tmp_path):
    (code, alone), files = run(refused_teachers, tmp_path)
    assert "code.h5" in code and "Lambda" in code
    assert "alone.weights.h5" in alone
    assert files == ["alone.weights.h5", "code.h5"]


def test_missing_data_is_one_line(run, tmp_path):
    status, printed = run(command, "--data-dir", str(tmp_path))
    assert status == 1
    assert len(printed.splitlines()) == 1 and str(tmp_path) in printed
