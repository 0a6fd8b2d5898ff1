"""Train the Keras ResNet8 on CIFAR-10, alone or with a teacher: the same network, but wider.

    python -m models.keras.train --data-dir DIR --width 48 --epochs 32 --holdout 5000 --output teacher.h5
    python -m models.keras.train --data-dir DIR --teacher teacher.h5 --epochs 300 --output student.h5

The folder beside the output has the log, and the backup from which a stopped training resumes. Method: He et
al. 2015, section 4.2, with a warmed-up cosine schedule and averaged weights; a student also learns the
teacher's probabilities (Hinton et al. 2015, arXiv:1503.02531, section 2).
"""

import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

from data.cifar10 import DataError, load_train
from models.common.cli import KerasFileError, echo, in_repository, make_parser, positive_int, print_error, run
from models.keras.file import read_keras_file
from models.keras.reference import rebuild
from models.keras.resnet8 import resnet8

BATCH_SIZE = 128
LEARNING_RATE, WARMUP_EPOCHS, MOMENTUM = 0.1, 5, 0.9
# Keras's weight decay is decoupled from the momentum: 5e-3 is 5e-3 * (1 - 0.9) = 5e-4 in `torch.optim.SGD`.
WEIGHT_DECAY, STUDENT_WEIGHT_DECAY = 5e-3, 1.5e-3  # checkpoints/README.md has the trials
CROP_PADDING = 4  # pixels, black
EMA_MOMENTUM = 0.999  # of the average of the weights, per step: about the last 2.5 epochs
TEMPERATURE = 2.0  # of the teacher's and the student's probabilities
TEACHER_WEIGHT = 0.9  # of the teacher's part of the loss; the rest is the labels'


class AugmentedImages(keras.utils.PyDataset):
    """Batches of (128, 32, 32, 3) float32 images, shuffled, shifted and flipped at random, and their targets.

    Targets are (128, 1 or 11) float32: the label and, with a teacher, its logits for the augmented image.
    All depend on seed and epoch alone, so that a resumed training has the same batches.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, seed: int, teacher: keras.Model | None
    ) -> None:
        """Prepare (N, 3, 32, 32) uint8 images; `teacher` returns logits."""
        super().__init__()
        self.labels, self.seed, self.teacher = labels, seed, teacher
        border = (CROP_PADDING, CROP_PADDING)
        padded = np.pad(images, [(0, 0), (0, 0), border, border])
        self.windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[-2:], axis=(2, 3))
        self.draw(epoch=0)

    def draw(self, epoch: int) -> None:
        """Draw the order, shifts and flips of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        self.order = rng.permutation(len(self.labels))
        self.shifts = rng.integers(0, 2 * CROP_PADDING + 1, (2, len(self.labels)))
        self.flips = rng.random(len(self.labels)) < 0.5

    def __len__(self) -> int:
        return len(self.labels) // BATCH_SIZE  # the last, smaller batch is dropped

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
        rows, columns = self.shifts[:, chosen]
        batch = self.windows[chosen, :, rows, columns].transpose(0, 2, 3, 1)  # NCHW -> NHWC
        batch = np.where(self.flips[chosen, None, None, None], batch[:, :, ::-1], batch).astype(np.float32)
        targets = self.labels[chosen, None].astype(np.float32)
        if self.teacher:
            targets = np.hstack([targets, self.teacher.predict_on_batch(batch)])
        return batch, targets


def loss(targets: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return (N,) cross-entropies of logits with the labels and, if targets have them, the teacher's logits.

    The teacher's part is scaled by the squared temperature, so that the gradients of both are of one size.
    """
    with_labels = keras.losses.sparse_categorical_crossentropy(targets[:, 0], logits, from_logits=True)
    if targets.shape[1] == 1:  # no teacher, or validation
        return with_labels
    soft, logits = tf.nn.softmax(targets[:, 1:] / TEMPERATURE), logits / TEMPERATURE
    with_teacher = keras.losses.categorical_crossentropy(soft, logits, from_logits=True)
    return (1 - TEACHER_WEIGHT) * with_labels + TEACHER_WEIGHT * TEMPERATURE**2 * with_teacher


def accuracy(targets: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return (N,) float32: 1 where the largest logit is the label's."""
    return keras.metrics.sparse_categorical_accuracy(targets[:, 0], logits)


def read_model(path: Path) -> keras.Model:
    """Rebuild the model of a Keras file from the layers that our reader found: Keras would run code from it.

    Raises KerasFileError if the file cannot be read or contains weights alone.
    """
    try:
        file = read_keras_file(path)
    except KerasFileError as error:  # its message does not name the file
        raise KerasFileError(f"{path}: {error}") from None
    if file.config is None:
        raise KerasFileError(f"{path}: contains weights alone; expected a whole model")
    return rebuild(file.layers)[0]


def measure_statistics(model: keras.Model, batches: AugmentedImages) -> None:
    """Set BatchNormalization's moving statistics to their averages over `batches`.

    Those from the training belong to the weights of its last steps, not to the averaged weights.
    """
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momentum = norms[0].momentum
    for step in range(len(batches)):
        for layer in norms:
            layer.momentum = step / (step + 1)  # the plain average of all batches so far
        model(batches[step][0], training=True)
    for layer in norms:
        layer.momentum = momentum


def train(
    images: np.ndarray,
    labels: np.ndarray,
    output: Path,
    epochs: int,
    width: int = 16,
    holdout: int = 0,
    teacher: Path | None = None,
    seed: int = 0,
) -> None:
    """Train on (N, 3, 32, 32) uint8 images and their (N,) labels; the last `holdout` are for validation.

    Resumes a stopped training. Raises KerasFileError, before it writes anything, if `teacher` cannot be read.
    """
    keras.utils.set_random_seed(seed)
    model, teacher_model = resnet8(width=width), read_model(teacher) if teacher else None
    for network in filter(None, (model, teacher_model)):
        network.layers[-1].activation = keras.activations.linear  # logits instead of probabilities
    split, folder = len(images) - holdout, output.with_suffix(".training")
    folder.mkdir(parents=True, exist_ok=True)
    batches = AugmentedImages(images[:split], labels[:split], seed, teacher_model)
    validation = (images[split:].transpose(0, 2, 3, 1).astype(np.float32), labels[split:, None])
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=LEARNING_RATE,
        warmup_steps=WARMUP_EPOCHS * len(batches),
        decay_steps=max(1, epochs - WARMUP_EPOCHS) * len(batches),
    )
    decay = STUDENT_WEIGHT_DECAY if teacher else WEIGHT_DECAY
    optimizer = keras.optimizers.SGD(  # at the end of `fit`, the averages replace the weights
        schedule, MOMENTUM, nesterov=True, weight_decay=decay, use_ema=True, ema_momentum=EMA_MOMENTUM
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(optimizer, loss=loss, metrics=[accuracy])
    # At an epoch's end Keras waits for tf.data's tuning thread, which sleeps as long as the epoch took
    # (TensorFlow 2.21). Debug mode has no such thread.
    tf.data.experimental.enable_debug_mode()
    model.fit(
        batches,
        shuffle=False,  # the batches are shuffled already, reproducibly
        epochs=epochs,
        validation_data=validation if holdout else None,
        verbose="auto" if sys.stdout.isatty() else 2,
        callbacks=[
            keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False),
            keras.callbacks.CSVLogger(folder / "log.csv", append=True),
            keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: batches.draw(epoch)),
        ],
    )
    measure_statistics(model, AugmentedImages(images[:split], labels[:split], seed, teacher=None))
    if holdout:
        echo(f"held-out accuracy {model.evaluate(*validation, verbose=0)[1]:.2%} of {holdout:,} images")
    model.layers[-1].activation = keras.activations.softmax
    partial = output.with_name(f".{output.stem}.partial.h5")
    model.save(partial, include_optimizer=False)
    partial.replace(output)
    echo(f"{output}: {model.count_params():,} parameters, trained for {epochs} epochs on {split:,} images")


def main() -> int:
    """Parse the command line and train; return the exit status."""
    parser = make_parser(__doc__, prog="python -m models.keras.train")
    add = parser.add_argument
    add("--data-dir", type=Path, help="CIFAR-10 folder (data or ~/.keras/datasets)")
    add("--download", action="store_true", help="download CIFAR-10 into --data-dir if it is missing")
    add("--epochs", type=positive_int, default=300, help="passes over the training images (300)")
    add("--width", type=positive_int, default=16, help="filters of the first stage (16)")
    add("--holdout", type=int, default=0, help="training images kept for validation (0)")
    add("--teacher", type=Path, help="trained Keras file whose probabilities are learned too")
    add("--seed", type=int, default=0, help="seed of weights and augmentation (0)")
    add("--output", type=Path, default=in_repository("checkpoints/resnet8_keras.h5"), help="Keras file (.h5)")
    options = vars(parser.parse_args())
    try:
        images, labels = load_train(options.pop("data_dir"), options.pop("download"))
        train(images, labels, **options)
    except (DataError, KerasFileError) as error:
        print_error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
