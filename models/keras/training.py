"""The training of the Keras ResNet8 on CIFAR-10, with TensorFlow; `models/keras/train.py` is its command."""

import csv
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from models.common.errors import KerasFileError
from models.keras.file import read_keras_file, start_reader
from models.keras.resnet8 import resnet8
from models.keras.server import rebuild

# The recipe: the usual CIFAR-10 one (He et al. 2015, section 4.2), longer, with a warmed-up cosine schedule.
# Keras's weight decay is decoupled from the momentum: 5e-3 is 5e-3 * (1 - 0.9) = 5e-4 in `torch.optim.SGD`.
# A student takes less, since it is short of its teacher on the images that it learns (checkpoints/README.md).
BATCH_SIZE = 128
LEARNING_RATE = 0.1
WARMUP_EPOCHS = 5
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-3
STUDENT_WEIGHT_DECAY = 1.5e-3
CROP_PADDING = 4  # pixels, black
EMA_MOMENTUM = 0.999  # of the average of the weights, a step: the last 2.5 epochs or so
TEMPERATURE = 2.0  # of the teacher's and the student's probabilities
TEACHER_WEIGHT = 0.9  # of the teacher's part of the loss; the rest is the labels'
TEACHER_ROUNDS = 16  # ways each image is shifted and flipped when there is a teacher: one an epoch, in turn


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
    """Shuffled batches of (N, 32, 32, 3) float32 images, randomly shifted and flipped, and their targets.

    A target is the label and, with a teacher, the teacher's ten logits for the image as shifted and flipped:
    (N, 1 or 11) float32. Every epoch's order, shifts and flips follow from (seed, epoch) alone, so a resumed
    training sees the images that an uninterrupted one would have seen. With a teacher, the shifts and flips
    are back after TEACHER_ROUNDS epochs, and its logits lie in `logits_dir` by then.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        seed: int,
        first_epoch: int = 0,
        teacher: keras.Model | None = None,
        logits_dir: Path | None = None,
    ) -> None:
        """Take (N, 3, 32, 32) uint8 `images`, (N,) `labels` and a model from pixels to logits."""
        super().__init__()
        self.labels, self.seed, self.epoch = labels, seed, first_epoch
        self.teacher, self.logits_dir = teacher, logits_dir
        border = [(0, 0), (0, 0), (CROP_PADDING, CROP_PADDING), (CROP_PADDING, CROP_PADDING)]
        padded = np.pad(images, border)
        self.windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[-2:], axis=(2, 3))
        self._draw()

    def _draw(self) -> None:
        self.order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.labels))
        augmentation = self.epoch % TEACHER_ROUNDS if self.teacher else self.epoch
        rng = np.random.default_rng([self.seed, augmentation, 1])  # 1: not the numbers of the order
        self.shifts = rng.integers(0, 2 * CROP_PADDING + 1, (2, len(self.labels)))
        self.flips = rng.random(len(self.labels)) < 0.5
        self.targets = self.labels[:, None].astype(np.float32)
        if self.teacher:
            logits = self._teacher_logits(self.logits_dir / f"logits-{augmentation}.npy")
            self.targets = np.hstack([self.targets, logits])

    def _teacher_logits(self, file: Path) -> np.ndarray:
        """Return the teacher's (N, 10) float16 logits for all images, from `file` if it is there."""
        if not file.exists():
            chunks = np.array_split(np.arange(len(self.labels)), -(-len(self.labels) // 500))
            logits = [self.teacher.predict_on_batch(self._augmented(chunk)) for chunk in chunks]
            partial = file.with_suffix(".partial.npy")
            np.save(partial, np.concatenate(logits).astype(np.float16))
            partial.replace(file)
        return np.load(file)

    def _augmented(self, chosen: np.ndarray) -> np.ndarray:
        """Return the images of the indices `chosen`, shifted and flipped, as the network takes them."""
        rows, columns = self.shifts[:, chosen]
        batch = self.windows[chosen, :, rows, columns].transpose(0, 2, 3, 1)  # NCHW -> NHWC
        batch = np.where(self.flips[chosen, None, None, None], batch[:, :, ::-1], batch)
        return batch.astype(np.float32)

    def __len__(self) -> int:
        return len(self.labels) // BATCH_SIZE  # the short last batch is dropped

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
        return self._augmented(chosen), self.targets[chosen]

    def on_epoch_end(self) -> None:
        """Draw the next epoch's order, shifts and flips; Keras calls this."""
        self.epoch += 1
        self._draw()


def loss(targets: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return the (N,) cross-entropies of (N, 10) logits with the labels and, if there is one, the teacher.

    Hinton et al. 2015, arXiv:1503.02531, section 2: probabilities at TEMPERATURE, times its square so that
    the gradients of both parts are of one size. The teacher's entropy, which is constant, is left in.
    """
    of_labels = keras.losses.sparse_categorical_crossentropy(targets[:, 0], logits, from_logits=True)
    if targets.shape[1] == 1:
        return of_labels
    of_teacher = keras.losses.categorical_crossentropy(
        tf.nn.softmax(targets[:, 1:] / TEMPERATURE), logits / TEMPERATURE, from_logits=True
    )
    return (1 - TEACHER_WEIGHT) * of_labels + TEACHER_WEIGHT * TEMPERATURE**2 * of_teacher


def accuracy(targets: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return for each of N images whether the largest logit is its label's: 1 or 0."""
    return keras.metrics.sparse_categorical_accuracy(targets[:, 0], logits)


def read_model(path: Path) -> keras.Model:
    """Return the model of a Keras file, as our reader found it: Keras would run code from the file.

    Raises KerasFileError with one line when it cannot be read, or holds weights alone.
    """
    try:
        with start_reader() as reader:
            file = read_keras_file(path, reader)
    except KerasFileError as error:  # which does not name the file
        raise KerasFileError(f"{path}: {error}") from None
    if file.config is None:
        raise KerasFileError(f"{path}: holds weights alone, expected a whole model")
    return rebuild(file.layers)[0]


def without_softmax(model: keras.Model) -> keras.Model:
    """Let a ResNet8 return logits, as the losses want them; return it."""
    model.layers[-1].activation = keras.activations.linear
    return model


def in_bfloat16(model: keras.Model) -> keras.Model:
    """Let all layers of a ResNet8 but its last compute in bfloat16, their weights still float32; return it.

    On a processor that multiplies bfloat16, an epoch then takes 0.57 of its time at width 48 and 0.68 at 16
    (Zen 4); on a Xeon without AMX it takes longer, 1.6 and 1.3 times.
    """
    for layer in model.layers[:-1]:
        layer.dtype_policy = "mixed_bfloat16"
    return model


def measure_statistics(model: keras.Model, batches: AugmentedImages) -> None:
    """Set every FusedBatchNormalization's moving mean and variance to their averages over `batches`.

    Those of the training belong to the weights of its last steps, not to the average of the weights.
    """
    normalizations = [layer for layer in model.layers if isinstance(layer, FusedBatchNormalization)]
    momenta = [layer.momentum for layer in normalizations]
    for step in range(len(batches)):
        for layer in normalizations:
            layer.momentum = step / (step + 1)  # the plain average of the batches so far
        model(batches[step][0], training=True)
    for layer, momentum in zip(normalizations, momenta, strict=True):
        layer.momentum = momentum


def train(
    images: np.ndarray,
    labels: np.ndarray,
    epochs: int,
    output: Path,
    seed: int,
    holdout: int,
    width: int,
    teacher: Path | None,
    bfloat16: bool,
    start: Path | None = None,
) -> None:
    """Train on (N, 3, 32, 32) uint8 images and their labels, less the last `holdout`, which validate.

    Reads the Keras file `teacher`, if there is one, whose logits are learned too, and `start`, if there is
    one, whose weights the training starts from. Writes `output`; the backup that a stopped training resumes
    from, the teacher's logits, the log and the curves lie in a folder beside it. Raises KerasFileError,
    before it writes anything, if it cannot read one of the two or `start` is not a ResNet8 of that width.
    """
    split = len(images) - holdout
    work_dir = output.with_suffix(".training")
    log = work_dir / "log.csv"
    epochs_done = max(0, len(log.read_text().splitlines()) - 1) if log.exists() else 0

    # At an epoch's end Keras waits for the thread that tunes tf.data, which sleeps ever longer, as long as
    # the epoch (TensorFlow 2.21). There is nothing to tune here, and this turns it off.
    tf.data.experimental.enable_debug_mode()
    keras.utils.set_random_seed(seed)
    model = without_softmax(resnet8(width=width, batch_norm=FusedBatchNormalization))
    if start:
        weights = read_model(start).get_weights()
        if [weight.shape for weight in weights] != [weight.shape for weight in model.get_weights()]:
            raise KerasFileError(f"{start}: the weights are not those of a ResNet8 of width {width}")
        model.set_weights(weights)
    teacher_model = without_softmax(read_model(teacher)) if teacher else None
    work_dir.mkdir(parents=True, exist_ok=True)
    if bfloat16:
        model, teacher_model = in_bfloat16(model), teacher_model and in_bfloat16(teacher_model)
    batches = AugmentedImages(images[:split], labels[:split], seed, epochs_done, teacher_model, work_dir)
    validation = (images[split:].transpose(0, 2, 3, 1).astype(np.float32), labels[split:, None])
    optimizer = keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0,
            warmup_target=LEARNING_RATE,
            warmup_steps=WARMUP_EPOCHS * len(batches),
            decay_steps=max(1, epochs - WARMUP_EPOCHS) * len(batches),
        ),
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=STUDENT_WEIGHT_DECAY if teacher else WEIGHT_DECAY,
        use_ema=True,  # Keras puts the averages in the place of the weights at the end
        ema_momentum=EMA_MOMENTUM,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(optimizer, loss=loss, metrics=[accuracy])
    model.fit(
        batches,
        shuffle=False,  # `batches` are shuffled; Keras would change their order in another way after a stop
        epochs=epochs,
        validation_data=validation if holdout else None,
        verbose="auto" if sys.stdout.isatty() else 2,
        callbacks=[
            keras.callbacks.BackupAndRestore(work_dir / "backup", delete_checkpoint=False),
            keras.callbacks.CSVLogger(log, append=True),
        ],
    )
    measure_statistics(model, AugmentedImages(images[:split], labels[:split], seed, epochs))

    trained = resnet8(width=width)  # the same network, of Keras's own layers, with the softmax
    trained.set_weights(model.get_weights())
    partial = output.with_name(f".{output.stem}.partial.h5")
    trained.save(partial, include_optimizer=False)
    partial.replace(output)
    plot_curves(log, work_dir / "curves.png")
    print(f"{output}: {trained.count_params():,} parameters, trained for {epochs} epochs on {split:,} images")
    if holdout:
        print(f"held-out accuracy {model.evaluate(*validation, verbose=0)[1]:.2%} of {holdout:,} images")


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
