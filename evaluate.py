"""Evaluate a ResNet8 checkpoint on CIFAR-10, against the Keras model that it was converted from.

    python evaluate.py [CHECKPOINT]

feeds every test image to the network, prints its accuracy beside Keras's, and writes metrics.txt and
metrics.json. Keras runs once: its probabilities are kept beside the checkpoint, and later runs need no
TensorFlow. `--compare OTHER.pt` evaluates other checkpoints alike: what did a change cost?
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cifar10 import CLASS_NAMES, DataError, Dataset, load_test
from data.files import check_writable
from models.evaluation.baseline import baseline_name, find_baseline, keras_predictions, will_ask_keras
from models.evaluation.metrics import (
    Predictions,
    check_guards,
    compare,
    near_chance_notes,
    short_names,
)
from models.evaluation.results import RESULTS, Evaluation, Notes, progress_bar, write_results
from models.keras.process import KerasProcess
from models.terminal import (
    add_keras_python,
    add_scaling,
    beside_the_scripts,
    check_scaling,
    one_a_channel,
    run,
)
from models.worker import WorkerError

if TYPE_CHECKING:
    import torch

    from models.checkpoint import Checkpoint

# torch, and what imports it, is imported where it is first needed: `--help` and a wrong option need none.

# BatchNorm may be folded into the convolutions, which is faster, as long as no probability is further than
# this from Keras's.
MAX_FOLDED_DIFFERENCE = 1e-5
SHORTFALL = 3  # the exit status for --min-accuracy and --max-drop


def main() -> int:
    """Evaluate; return the exit status."""
    options = parse_arguments()
    try:
        # Keras takes seconds to start: where it is asked before all else, it does so while torch is imported
        asked_first = not options.no_keras and not options.compare  # these are predicted, and timed, before
        is_asked = asked_first and will_ask_keras(options.checkpoint, options.keras)
        with KerasProcess(options.keras_python) if is_asked else nullcontext() as keras:
            return evaluate(options, keras)
    except WorkerError as error:
        print(error.log, file=sys.stderr, end="")
        message = f"{error}; --no-keras evaluates without the baseline"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if options.is_default and error.filename == str(options.checkpoint):
            message += "; python convert.py makes it"
    except (DataError, ValueError) as error:
        message = str(error)
    print(f"error: {message}", file=sys.stderr)
    return 1


def evaluate(options: argparse.Namespace, keras_process: KerasProcess | None) -> int:
    """Evaluate the checkpoints of the command line, print and write the results, return the exit status."""
    notes = Notes()
    # before the work, not after it
    check_writable(options.output / name for name in RESULTS[: 2 + options.report])
    dataset = load_test(options.data_dir, options.data, options.download)
    if dataset.notice:
        notes.add(dataset.notice)

    # Load, and predict.
    from models.evaluation.inference import choose_device  # and with it torch

    name, *compared_names = short_names([options.checkpoint, *options.compare])
    predict = partial(
        predict_all,
        dataset=dataset,
        device=choose_device(options.device, options.dtype),
        dtype=options.dtype,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    checkpoint = load_checkpoint(
        options.checkpoint, dataset, notes, options.mean, options.std, dtype=options.dtype
    )
    # One at a time, so that memory does not grow; before Keras, so that a bad one shows early.
    compared, origins = [], {name: checkpoint.origin}
    for path, compared_name in zip(options.compare, compared_names, strict=True):
        other = load_checkpoint(path, dataset, notes, like=checkpoint, dtype=options.dtype)
        compared.append(predict(other, compared_name))
        origins[compared_name] = other.origin

    # Compare with Keras.
    keras_file = None if options.no_keras else find_baseline(checkpoint, options.keras, notes)
    if options.max_drop is not None and not keras_file and not compared:
        raise ValueError("--max-drop: there is neither a Keras baseline nor a --compare to measure a drop by")
    keras = None
    if keras_file:
        keras_name, python = baseline_name(keras_file, name, origins, notes), options.keras_python
        keras = keras_predictions(keras_name, keras_file, checkpoint, dataset, python, notes, keras_process)
    # Folding BatchNorm changes the rounding, so it takes a reference to hold it to. Checkpoints that are
    # compared are all run alike: not folded.
    fold = bool(keras) and checkpoint.is_as_converted and not compared and options.dtype == "float32"
    ours = predict(checkpoint, name, fold=fold)
    if fold and compare(keras, ours)["max_abs_probability_difference"] > MAX_FOLDED_DIFFERENCE:
        notes.add(
            f"folded, a probability was {MAX_FOLDED_DIFFERENCE:g} or more from Keras's: unfolded instead"
        )
        ours = predict(checkpoint, name)

    # Print and write.
    for near_chance in near_chance_notes(ours, compared, keras, options.mean or options.std):
        notes.add(near_chance)
    guards = check_guards([ours, *compared], keras or ours, options.min_accuracy, options.max_drop)
    evaluation = Evaluation(dataset, checkpoint, ours, keras, compared, notes.lines, guards)
    print(f"\n{evaluation.summary}")
    written = write_results(evaluation, options.output, options.report)
    print(f"wrote {', '.join(map(str, written))}")

    unmet = [guard for guard in guards if not guard["met"]]
    for guard in unmet:
        below = f" below {guard['below']}" if "below" in guard else ""
        measured = f"{guard['checkpoint']}: accuracy {guard['measured']:.4f}{below}"
        print(f"shortfall: {measured}, {guard['guard']} {guard['bound']:g}", file=sys.stderr)
    return SHORTFALL if unmet else 0


def load_checkpoint(
    path: Path,
    dataset: Dataset,
    notes: Notes,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    like: Checkpoint | None = None,
    dtype: str = "float32",
) -> Checkpoint:
    """Load a checkpoint that fits the data. Raises OSError, or ValueError with one line.

    `mean` and `std` (a value, or one a channel, in pixel units) go before what its JSON says; without either
    it is fed as the checkpoint `like`, or plain pixels.
    """
    import torch

    from models.checkpoint import read_checkpoint
    from models.resnet8 import ResNet8

    checkpoint = read_checkpoint(ResNet8, path, dtype=torch.float64 if dtype == "float64" else torch.float32)
    if checkpoint.read_as:
        notes.add(checkpoint.read_as)
    channels, classes = checkpoint.model.conv1.in_channels, checkpoint.model.fc.out_features
    described, described_in = checkpoint.metadata.get("input", {}), path.with_suffix(".json")
    shape = [channels, *described.get("shape", [None] * 3)[1:]]
    if any(size not in (None, needed) for size, needed in zip(shape, dataset.images.shape[1:], strict=True)):
        raise ValueError(
            f"{path}: takes images of shape {shape}, CIFAR-10's are {[*dataset.images.shape[1:]]}"
        )
    if classes != len(CLASS_NAMES):
        raise ValueError(f"{path}: has {classes} classes, CIFAR-10 has {len(CLASS_NAMES)}")
    if mean or std:
        checkpoint = checkpoint.fed(mean, std)
    elif "mean" not in described or "std" not in described:
        assumed = f"fed as {like.path.name}" if like else "pixels from 0 to 255 are assumed"
        checkpoint = replace(checkpoint, mean=like.mean, std=like.std) if like else checkpoint
        notes.add(
            f"{described_in} does not say what {path.name} is fed: {assumed}"
            + ("" if like else "; --mean and --std say it, or a copy of the original's .json under that name")
        )
    if "sha256" in checkpoint.metadata and not checkpoint.is_as_converted:
        notes.add(
            f"{path} has changed since {described_in.name} was written (fine-tuned?): its SHA-256 differs"
        )
    return checkpoint


def predict_all(
    checkpoint: Checkpoint,
    name: str,
    dataset: Dataset,
    device: torch.device,
    dtype: str,
    batch_size: int | None,
    workers: int | None,
    fold: bool = False,
) -> Predictions:
    """Return what a checkpoint's network makes of the images, on a device, in a dtype, folded or not.

    `batch_size` and `workers` are the command line's; None suits the device.
    """
    import torch

    from models.evaluation import inference

    model = inference.prepare(checkpoint.model, device, getattr(torch, dtype), fold)
    suitable = inference.batches_for(device)
    batch_size, workers = batch_size or suitable[0], workers or suitable[1]
    found = score(model, dataset, checkpoint.mean, checkpoint.std, name, batch_size, workers, checkpoint.path)
    ran = {"device": device.type, "dtype": dtype, "batch_norm_folded": fold}
    return replace(found, throughput={**found.throughput, **ran})


def score(
    network: Callable[[torch.Tensor], torch.Tensor | np.ndarray],
    dataset: Dataset,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    name: str = "network",
    batch_size: int = 100,
    workers: int = 1,
    path: Path | None = None,
) -> Predictions:
    """Feed a data set to a network, and measure how long that takes.

    `network` is any function of a (N, 3, 32, 32) float32 tensor that gives (N, 10) logits, a tensor or an
    array: quantized, exported, compiled, or of another runtime. It is fed (pixel - mean) / std, `mean` and
    `std` a value, or one a channel, in pixel units; without them plain pixels, 0 to 255. `workers` threads
    call it at a time. Raises ValueError when it is in train mode, or its outputs are none, NaN or infinite.
    """
    import torch

    from models.evaluation import inference

    channels = dataset.images.shape[1]
    mean = one_a_channel("mean", mean or [0.0], channels)
    std = one_a_channel("std", std or [1.0], channels)
    modules = network.modules() if isinstance(network, torch.nn.Module) else ()
    if any(isinstance(module, torch.nn.BatchNorm2d) and module.training for module in modules):
        raise ValueError(f"{path or name}: is in train mode, in which every batch changes it: network.eval()")
    start = time.perf_counter()
    logits = inference.predict(network, dataset.images, mean, std, batch_size, workers, progress_bar(name))
    seconds = time.perf_counter() - start
    if logits.shape != (len(dataset.labels), len(CLASS_NAMES)):
        raise ValueError(f"{path or name}: the network's outputs have shape {logits.shape}")
    if not np.isfinite(logits).all():
        raise ValueError(f"{path or name}: the network's outputs are NaN or infinite")
    throughput = {
        "seconds": seconds,
        "images_per_second": len(logits) / seconds,
        "batch_size": batch_size,
        "workers": workers,
    }
    log_probabilities = torch.from_numpy(logits).log_softmax(dim=1).numpy()
    return Predictions(name, path, log_probabilities, dataset.labels, mean, std, throughput)


def parse_arguments() -> argparse.Namespace:
    """Return the command line; exits with status 2 when it makes no sense."""

    def count(given: str) -> int:
        value = int(given)
        if value < 1:
            raise ValueError
        return value

    def fraction(given: str) -> float:
        value = float(given)
        if not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(f"{given} is not a fraction from 0 to 1 (0.87 is 87 %)")
        return value

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a .pt file (checkpoints/resnet8.pt)")
    add = parser.add_argument_group("images").add_argument
    add("--data-dir", metavar="DIR", type=Path, help="where CIFAR-10 is (data)")
    add("--data", choices=("auto", "full", "sample"), default="auto", help="the test set, or 1,000 of it")
    add("--download", action="store_true", help="download the test set into --data-dir if it is not there")
    add_scaling(parser.add_argument_group("what CHECKPOINT is fed, if its .json does not say"), "CHECKPOINT")
    group = parser.add_argument_group("what it is compared with")
    add = group.add_argument
    add("--compare", metavar="OTHER.pt", type=Path, nargs="+", default=[], help="evaluate these beside it")
    add("--keras", metavar="KERAS_FILE", type=Path, help="the baseline (the file that CHECKPOINT came from)")
    add("--no-keras", action="store_true", help="no baseline")
    add_keras_python(group)
    add = parser.add_argument_group("how it is computed").add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(auto: the fastest)")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="(float32)")
    add("--batch-size", metavar="N", type=count, help="images at a time (CPU: 64, else 1024)")
    add("--workers", metavar="N", type=count, help="threads that run a batch each (CPU: one a core, else 1)")
    add = parser.add_argument_group("results").add_argument
    add("--output", metavar="DIR", type=Path, default=Path("results"), help="metrics.txt, .json (results)")
    add("--report", action="store_true", help="draw report.png too")
    add("--min-accuracy", metavar="A", type=fraction, help="exit with status 3 below this fraction")
    add("--max-drop", metavar="D", type=fraction, help="and if further below Keras, or else CHECKPOINT")
    options = parser.parse_args()
    check_scaling(parser, options)
    if options.keras and options.no_keras:
        parser.error("--keras and --no-keras exclude each other")
    if options.max_drop is not None and options.no_keras and not options.compare:
        parser.error("--max-drop needs a Keras baseline or a --compare to measure a drop by")
    options.is_default = options.checkpoint is None
    options.checkpoint = options.checkpoint or beside_the_scripts("checkpoints/resnet8.pt")
    if options.data_dir and options.data == "auto":
        options.data = "full"  # a folder that was named and does not hold it is a mistake
    options.data_dir = options.data_dir or beside_the_scripts("data")
    return options


if __name__ == "__main__":
    sys.exit(run(main))
