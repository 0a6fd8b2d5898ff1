"""Evaluate ResNet8 checkpoints on CIFAR-10, and compare them with their Keras model and with each other.

    python evaluate.py [FILE ...]

Runs all test images through each model, prints tables, and writes metrics.txt and metrics.json. Keras runs
once per file: its predictions are cached beside the Keras file. A model is a state_dict (.pt, .safetensors)
or an export of one: ONNX, TensorFlow Lite, torch.export (.pt2).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # for `python -I` and `python -P`

from data.cifar10 import PARTS, DataError, Dataset, load_test
from models.common import cli
from models.common.files import (
    RUNTIME_FORMATS,
    check_package,
    detect_format,
    json_path,
    read_metadata,
    sha256_of,
)
from models.common.job import JobError
from models.evaluation.baseline import keras_baseline
from models.evaluation.metrics import (
    TRIAL_IMAGES,
    Predictions,
    better_normalization,
    check_guards,
    compare,  # noqa: F401  # for `from evaluate import compare, score`
    near_chance_notes,
    short_names,
)
from models.evaluation.results import Evaluation, calibration_notes, check_results, write_results
from models.normalization import Normalization, fraction_note, own_normalization

if TYPE_CHECKING:  # torch takes seconds to import, and is not needed for `--help` or usage errors
    import numpy as np
    import torch
    from numpy.typing import ArrayLike

    from models.checkpoint import Checkpoint

SHORTFALL = 3  # exit status: --min-accuracy or --max-drop not met


def main() -> int:
    """Parse the command line and evaluate; return the exit status."""
    options = parse_arguments()
    try:
        return evaluate(options)
    except JobError as error:
        print(error.log, file=sys.stderr, end="")
        message = f"{error}; --no-keras evaluates without the baseline"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if options.is_default and error.filename == str(options.files[0]):
            message += "; create it with: python convert.py"
    except (DataError, ValueError) as error:
        message = str(error)
    cli.print_error(message)
    return 1


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate the files of the command line, print and write the results; return the exit status."""
    notes, files, names = cli.Notes(), options.files, short_names(options.files)

    # Check inputs and outputs before the expensive steps
    check_results(options.output)
    if options.report:
        cli.check_installed("matplotlib", "matplotlib", "--report")
    for path in filter(None, [*files, options.keras]):
        check_package(path)  # raises OSError for a missing file
    dataset = load_test(options.data_dir, options.data, options.download)
    if dataset.notice:
        notes.add(dataset.notice)
    from models.evaluation.inference import predictor

    predict = predictor(dataset, options)
    if note := fraction_note(options.mean, options.std):
        notes.add(note)

    # Run the images through one model after the other, then through Keras
    checkpoints, predictions, hashes = [], [], []
    for path, name in zip(files, names, strict=True):
        like = checkpoints[0] if checkpoints else None
        checkpoints.append(load_checkpoint(path, dataset, notes, options, like))
        predictions.append(predict(checkpoints[-1], name))
        hashes.append(predictions[-1].sha256 or checkpoints[-1].sha256)
        if predictions[-1].normalization != checkpoints[-1].normalization:
            notes.add(f"{path.name} has integer inputs: using {predictions[-1].normalization}")
        for note in predictions[-1].notes:
            notes.add(note)
    first, ours, compared, keras = checkpoints[0], predictions[0], predictions[1:], None
    if not options.no_keras:
        origins = {name: each.origin for name, each in zip(names, checkpoints, strict=True)}
        keras = keras_baseline(first, options.keras, origins, dataset, options.keras_python, notes)
    if keras and (options.mean or options.std) and keras.normalization != ours.normalization:
        notes.add(f"--mean and --std are for {first.path} alone: {keras.path} takes {keras.normalization}")
    if options.max_drop is not None and not keras and not compared:
        raise ValueError("--max-drop needs a Keras baseline or another file to measure a drop from")

    # Print and write
    guards = check_guards(predictions, keras or ours, options.min_accuracy, options.max_drop)
    evaluation = Evaluation(dataset, ours, keras, compared, hashes, notes.lines, guards, options.per_class)
    cli.echo(f"\n{evaluation.summary()}")
    found = [result_notes(*pair, dataset, options) for pair in zip(checkpoints, predictions, strict=True)]
    found += [near_chance_notes([keras] if keras else []), calibration_notes(dataset, predictions)]
    for note in chain(*found):
        notes.add(note)
    written = write_results(evaluation, options.output, options.report)
    cli.echo(f"wrote {', '.join(map(str, written))}")
    return print_shortfalls(guards)


def load_checkpoint(
    path: Path,
    dataset: Dataset,
    notes: cli.Notes,
    options: argparse.Namespace,
    like: Checkpoint | None = None,
) -> Checkpoint:
    """Load a model that fits the data. Raises OSError, or ValueError with one line.

    `like` is the first file's checkpoint, None for the first file. Normalization of the first file: `--mean`
    and `--std`, else its JSON, else pixels 0-255; of another: its JSON, else `like`'s. For ONNX,
    TensorFlow Lite and torch.export files the checkpoint's `model` is None.
    """
    import torch

    from models.checkpoint import Checkpoint, read_checkpoint
    from models.conversion.int8 import read_int8
    from models.resnet8 import ResNet8

    channels, classes = dataset.images.shape[1], len(dataset.class_names)
    if detect_format(path) in RUNTIME_FORMATS:
        metadata = read_metadata(path)
        try:
            normalization = Normalization.from_json(metadata.get("input", {}), channels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        checkpoint = Checkpoint(path, None, sha256_of(path), normalization, metadata)
    else:
        precision = torch.float64 if options.dtype == "float64" else torch.float32
        try:
            checkpoint = read_checkpoint(path, ResNet8, precision, options.key)
        except ValueError:
            checkpoint = read_int8(path)
            if checkpoint is None:
                raise
        classes, channels = len(checkpoint.model.fc.bias), checkpoint.model.conv1.weight.shape[1]
    if checkpoint.read_note:
        notes.add(checkpoint.read_note)
    described, json_name = checkpoint.metadata.get("input", {}), json_path(path).name
    shape, needed = [channels, *(described.get("shape") or [None] * 3)[1:]], list(dataset.images.shape[1:])
    if any(size not in (None, right) for size, right in zip(shape, needed, strict=True)):
        raise ValueError(f"{path}: expects images of shape {shape}; CIFAR-10 images are {needed}")
    if classes != len(dataset.class_names):
        raise ValueError(f"{path}: has {classes} classes; CIFAR-10 has {len(dataset.class_names)}")
    is_given = bool(options.mean or options.std)
    if is_given and not like:
        checkpoint = checkpoint.with_normalization(options.mean, options.std)
    elif "mean" not in described or "std" not in described:
        normalization = like.normalization if like else checkpoint.normalization
        checkpoint = replace(checkpoint, normalization=normalization, assumes_normalization=not is_given)
        missing = f"no mean and std in {json_name}" if checkpoint.metadata else f"no {json_name}"
        if like:
            notes.add(f"{missing}: using {like.path.name}'s input normalization for {path.name}")
        else:
            notes.add(f"{missing}: assuming pixels 0-255 for {path.name}; override with --mean and --std")
    if "sha256" in checkpoint.metadata and not checkpoint.is_as_converted:
        notes.add(f"{path} was modified after conversion (fine-tuned?): {json_name} has another SHA-256")
    if checkpoint.known:
        cli.echo(checkpoint.known)
    return checkpoint


def result_notes(
    checkpoint: Checkpoint, predictions: Predictions, dataset: Dataset, options: argparse.Namespace
) -> list[str]:
    """Return notes on a model near chance, or whose assumed normalization is worse than a usual one."""
    from models.evaluation.inference import predictor

    notes = near_chance_notes([predictions])
    if not checkpoint.assumes_normalization and not notes:
        return []
    identity = Normalization.from_args(dataset.images.shape[1])
    network = replace(checkpoint, normalization=identity, assumes_normalization=False)
    better = better_normalization(predictions, dataset, lambda trial: predictor(trial, options)(network, ""))
    if better is None:
        return notes
    text, normalization = better
    if len(options.files) == 1:
        return [f"{text} {normalization.options}"]
    described = json.dumps({"input": asdict(normalization)})  # the options are for the first file
    return [f"{text} {described} in {json_path(checkpoint.path)}"]


def print_shortfalls(guards: list[dict]) -> int:
    """Print the thresholds that are not met to stderr; return the exit status."""
    unmet = [guard for guard in guards if not guard["met"]]
    for guard in unmet:
        below = f" below {guard['below']}" if "below" in guard else ""
        measured = f"{guard['checkpoint']}: accuracy {guard['measured']:.4f}{below}"
        print(cli.printable(f"shortfall: {measured}, {guard['guard']} {guard['bound']:g}"), file=sys.stderr)
    return SHORTFALL if unmet else 0


def score(
    network: Callable[[torch.Tensor], torch.Tensor | np.ndarray],
    dataset: Dataset,
    mean: ArrayLike | None = None,
    std: ArrayLike | None = None,
    name: str = "network",
    batch_size: int = 100,
    workers: int = 1,
    path: Path | None = None,
) -> Predictions:
    """Evaluate any network on a data set, and measure its speed.

    `network` maps (N, C, H, W) float32 images to (N, classes) logits or probabilities, a tensor or an array:
    quantized, exported, compiled, or of another library. Its input is (pixel - mean) / std, for pixels 0-255;
    `mean` and `std` are scalars or one value per channel. Default: the normalization read by
    `ResNet8.from_checkpoint`, else pixels 0-255, and a warning names a usual one that is better. Also warns
    if the accuracy is near chance. `workers` is the number of threads. Raises ValueError if `network` is in
    train mode, or if its outputs depend on the rest of the batch, have a wrong shape or are not finite.
    """
    from models.evaluation.inference import measure

    known, identity = own_normalization(network), Normalization.from_args(dataset.images.shape[1])
    run = partial(measure, network, name=name, batch_size=batch_size, workers=workers, path=path)
    predictions, better = run(dataset, (known or identity).override(mean, std)), None
    if known is None and mean is None and std is None:
        images = -(-TRIAL_IMAGES // batch_size) * batch_size  # whole batches: some networks take no others
        better = better_normalization(predictions, dataset, lambda trial: run(trial, identity), images)
    notes = near_chance_notes([predictions])
    if better:
        notes = [f"{better[0]} mean={better[1].mean}, std={better[1].std}"]
    for note in predictions.notes + notes:
        warnings.warn(note, stacklevel=2)
    return predictions


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; `files` includes `--compare`. Exit with status 2 if it is wrong."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        type=cli.file_path,
        help="model to evaluate (default: checkpoints/resnet8.pt), and further models to compare with it: "
        ".pt, .safetensors, .onnx, .tflite, .pt2",
    )
    add = parser.add_argument_group("images").add_argument
    add("--data-dir", metavar="DIR", type=Path, help="CIFAR-10 folder (default: data or ~/.keras/datasets)")
    add(
        "--data",
        choices=PARTS,
        default="auto",
        help="full test set, 1,000-image sample, or MLPerf Tiny's 200 (perf) or 500 (calibration) images "
        "(default: auto, the full test set, else, without --data-dir, the sample)",
    )
    add("--download", action="store_true", help="download the test set to --data-dir if missing")
    cli.add_shared_options(parser.add_argument_group("input"))
    add = parser.add_argument_group("comparison").add_argument
    add("--compare", metavar="OTHER", type=cli.file_path, nargs="+", default=[], help="same as further FILEs")
    add(
        "--keras",
        metavar="KERAS_FILE",
        type=cli.file_path,
        help="Keras file to compare with (default: the source of the first FILE)",
    )
    add("--no-keras", action="store_true", help="evaluate without a baseline")
    add = parser.add_argument_group("computation").add_argument
    add(
        "--allow-code",
        action="store_true",
        help="load .pt2 files, which can execute code; use only with trusted files",
    )
    add(
        "--kernels",
        choices=("xnnpack", "reference"),
        help="LiteRT's kernels for .tflite files; reference: slower, closest to microcontrollers "
        "(default: xnnpack; for --data perf: reference)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="(default: the fastest)",
    )
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="(default: float32)")
    add("--batch-size", metavar="N", type=cli.positive_int, help="images per batch (default: 64, GPU 1024)")
    add("--workers", metavar="N", type=cli.positive_int, help="threads (default: one per core, GPU 1)")
    add = parser.add_argument_group("results").add_argument
    add(
        "--output", metavar="DIR", type=Path, default=Path("results"), help="output folder (default: results)"
    )
    add("--report", action="store_true", help="also draw report.png")
    add("--per-class", action="store_true", help="print accuracy per class even for several files")
    add(
        "--min-accuracy",
        metavar="A",
        type=cli.unit_interval,
        help="exit with status 3 if an accuracy is below A (0 to 1)",
    )
    add(
        "--max-drop",
        metavar="D",
        type=cli.unit_interval,
        help="exit with status 3 if an accuracy is more than D below Keras (without Keras: the first FILE)",
    )
    options = parser.parse_intermixed_args()
    options.is_default = not options.files
    options.kernels = options.kernels or ("reference" if options.data == "perf" else "xnnpack")
    options.files = (options.files or [cli.in_repository("checkpoints/resnet8.pt")]) + options.compare
    if options.keras and options.no_keras:
        parser.error("--keras and --no-keras cannot be combined")
    if options.max_drop is not None and options.no_keras and len(options.files) == 1:
        parser.error("--max-drop needs a Keras baseline or another file to measure a drop from")
    return options


if __name__ == "__main__":
    sys.exit(cli.run(main))
