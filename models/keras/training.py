"""The training of the Keras ResNet8 on CIFAR-10, with TensorFlow; `models/keras/train.py` is its command."""

import csv
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from models.keras.resnet8 import resnet8

# The recipe: the usual CIFAR-10 one (He et al. 2015, section 4.2), longer, with a warmed-up cosine schedule.
# Keras's weight decay is decoupled from the momentum: 1e-3 is 1e-3 * (1 - 0.9) = 1e-4 in `torch.optim.SGD`.
# All in float32: on a Xeon without AMX, bfloat16 takes 1.3 times as long at width 16 and 1.6 times at 48.
BATCH_SIZE = 128
LEARNING_RATE = 0.1
WARMUP_EPOCHS = 5
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3
CROP_PADDING = 4  # pixels, black


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """BatchNormalization that trains in one operation, which halves the time of an epoch on a CPU.

    Keras computes the same in a dozen. The variables are the same; the moving variance takes in the batch's
    unbiased variance, n / (n - 1) times what Keras takes, where n is at least 8,192.
    """

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return (N, H, W, C) `inputs`, normalized, in their dtype."""
        if not training:
            return super().call(inputs)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma.value, self.beta.value, epsilon=self.epsilon
        )
        for average, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            average.assign(self.momentum * average + (1 - self.momentum) * batch)
        return outputs


class AugmentedImages(keras.utils.PyDataset):
    """Shuffled batches of (N, 32, 32, 3) float32 images, randomly shifted and flipped, and their labels.

    Every epoch's order, shifts and flips follow from (seed, epoch) alone, so a resumed training sees the
    images that an uninterrupted one would have seen.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int, first_epoch: int = 0) -> None:
        """Take (N, 3, 32, 32) uint8 `images` and (N,) `labels`."""
        super().__init__()
        self.labels, self.seed, self.epoch = labels, seed, first_epoch
        border = [(0, 0), (0, 0), (CROP_PADDING, CROP_PADDING), (CROP_PADDING, CROP_PADDING)]
        padded = np.pad(images, border)
        self.windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[-2:], axis=(2, 3))
        self._draw()

    def _draw(self) -> None:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.order = rng.permutation(len(self.labels))
        self.shifts = rng.integers(0, 2 * CROP_PADDING + 1, (2, len(self.labels)))
        self.flips = rng.random(len(self.labels)) < 0.5

    def __len__(self) -> int:
        return len(self.labels) // BATCH_SIZE  # the short last batch is dropped

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
        rows, columns = self.shifts[:, chosen]
        batch = self.windows[chosen, :, rows, columns].transpose(0, 2, 3, 1)  # NCHW -> NHWC
        batch = np.where(self.flips[chosen, None, None, None], batch[:, :, ::-1], batch)
        return batch.astype(np.float32), self.labels[chosen]

    def on_epoch_end(self) -> None:
        """Draw the next epoch's order, shifts and flips; Keras calls this."""
        self.epoch += 1
        self._draw()


def train(images: np.ndarray, labels: np.ndarray, epochs: int, output: Path, seed: int, holdout: int) -> None:
    """Train on (N, 3, 32, 32) uint8 images and their labels, less the last `holdout`, which validate.

    Writes `output`; the backup that a stopped training resumes from, the log and the curves lie in a folder
    beside it.
    """
    split = len(images) - holdout
    work_dir = output.with_suffix(".training")
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / "log.csv"
    epochs_done = max(0, len(log.read_text().splitlines()) - 1) if log.exists() else 0

    keras.utils.set_random_seed(seed)
    batches = AugmentedImages(images[:split], labels[:split], seed, epochs_done)
    validation = (
        (images[split:].transpose(0, 2, 3, 1).astype(np.float32), labels[split:]) if holdout else None
    )
    optimizer = keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0,
            warmup_target=LEARNING_RATE,
            warmup_steps=WARMUP_EPOCHS * len(batches),
            decay_steps=max(1, epochs - WARMUP_EPOCHS) * len(batches),
        ),
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model = resnet8(batch_norm=FusedBatchNormalization)
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        batches,
        shuffle=False,  # `batches` are shuffled; Keras would change their order in another way after a stop
        epochs=epochs,
        validation_data=validation,
        verbose="auto" if sys.stdout.isatty() else 2,
        callbacks=[
            keras.callbacks.BackupAndRestore(work_dir / "backup", delete_checkpoint=False),
            keras.callbacks.CSVLogger(log, append=True),
        ],
    )

    trained = resnet8()  # the same network, of Keras's own layers
    trained.set_weights(model.get_weights())
    partial = output.with_name(f".{output.stem}.partial.h5")
    trained.save(partial, include_optimizer=False)
    partial.replace(output)
    plot_curves(log, work_dir / "curves.png")
    print(f"{output}: {trained.count_params():,} parameters, trained for {epochs} epochs on {split:,} images")


def plot_curves(log: Path, figure_path: Path) -> None:
    """Draw accuracy and loss per epoch from Keras's CSV log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with log.open() as file:
        rows = list(csv.DictReader(file))
    epochs = range(1, len(rows) + 1)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, quantity in zip(axes, ("accuracy", "loss"), strict=True):
        axis.plot(epochs, [float(row[quantity]) for row in rows], label="training (augmented)")
        if rows[0].get(f"val_{quantity}", "NA") != "NA":  # "NA": trained without validation
            axis.plot(epochs, [float(row[f"val_{quantity}"]) for row in rows], label="validation")
        axis.set(xlabel="epoch", ylabel=quantity)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(figure_path, dpi=120)
