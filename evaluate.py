"""Evaluate a ResNet8 checkpoint on CIFAR-10, against the Keras model that it was converted from.

    python evaluate.py [CHECKPOINT] [OTHER ...]

feeds every test image to the network, prints its accuracy beside Keras's, and writes metrics.txt and
metrics.json. Keras runs once: its probabilities are kept beside the checkpoint, and later runs need no
TensorFlow. OTHER files are evaluated alike: what did a change cost? A file is a state_dict (.pt,
.safetensors), or what was made of one: ONNX, TensorFlow Lite, torch.export's .pt2.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # `python -I` and -P look for nothing here

from data.cifar10 import PARTS, DataError, Dataset, load_test
from models.common.terminal import (
    Notes,
    Parser,
    a_file,
    add_keras_python,
    add_key,
    add_scaling,
    beside_the_scripts,
    check_scaling,
    output_width,
    print_error,
    run,
)
from models.evaluation.baseline import keras_baseline
from models.evaluation.loading import load_checkpoint, predictor
from models.evaluation.metrics import (
    Predictions,
    check_guards,
    compare,
    near_chance_notes,
    short_names,
)
from models.evaluation.results import Evaluation, check_results, write_results
from models.evaluation.runtimes import calibration_note, start_runner
from models.keras.worker import WorkerError
from models.scaling import Scaling

if TYPE_CHECKING:
    import torch

    from models.checkpoint import Checkpoint

# torch, and what imports it, is imported where it is first needed: `--help` and a wrong option need none.

# BatchNorm may be folded into the convolutions, which is faster: in a file that is evaluated alone as long as
# no probability is further than this from Keras's; of several files `predictor` decides on each.
MAX_FOLDED_DIFFERENCE = 1e-5
SHORTFALL = 3  # the exit status for --min-accuracy and --max-drop


def main() -> int:
    """Evaluate; return the exit status."""
    options = parse_arguments()
    try:
        return evaluate(options)
    except WorkerError as error:
        print(error.log, file=sys.stderr, end="")
        message = f"{error}; --no-keras evaluates without the baseline"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if options.is_default and error.filename == str(options.checkpoint):
            message += "; python convert.py makes it"
    except (DataError, ValueError) as error:
        message = str(error)
    print_error(message)
    return 1


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate the checkpoints of the command line, print and write the results, return the exit status."""
    notes = Notes()
    check_results(options.output, options.report, [options.checkpoint, *options.compare])  # before the work
    dataset = load_test(options.data_dir, options.data, options.download)
    if dataset.notice:
        notes.add(dataset.notice)

    # Load and predict: one at a time, so that memory does not grow
    predict, files = predictor(dataset, options), [options.checkpoint, *options.compare]
    name, *compared_names = short_names(files)
    with start_runner(files) as runner:
        fit = {"dtype": options.dtype, "key": options.key, "runner": runner}
        checkpoint = load_checkpoint(options.checkpoint, dataset, notes, options.mean, options.std, **fit)
        may_fold = checkpoint.is_as_converted and not options.compare and options.dtype == "float32"
        ours = None if may_fold else predict(checkpoint, name)
        compared, origins = [], {name: checkpoint.origin}
        for path, compared_name in zip(options.compare, compared_names, strict=True):
            other = load_checkpoint(path, dataset, notes, like=checkpoint, **fit)
            compared.append(predict(other, compared_name))
            origins[compared_name] = other.origin
    keras = None
    if not options.no_keras:
        keras = keras_baseline(checkpoint, options.keras, origins, dataset, options.keras_python, notes)
    if options.max_drop is not None and not keras and not compared:
        raise ValueError("--max-drop: there is neither a Keras baseline nor a --compare to measure a drop by")
    ours = ours or predict_folded(predict, checkpoint, name, keras, notes)

    # Print and write
    guards = check_guards([ours, *compared], keras or ours, options.min_accuracy, options.max_drop)
    evaluation = Evaluation(
        dataset, checkpoint, ours, keras, compared, notes.lines, guards, options.per_class
    )
    print(f"\n{evaluation.summary(output_width())}")
    for near_chance in near_chance_notes(ours, compared, keras, options.mean or options.std):
        notes.add(near_chance)
    for each in (ours, *compared):
        if note := calibration_note(each, dataset):
            notes.add(note)
    written = write_results(evaluation, options.output, options.report)
    print(f"wrote {', '.join(map(str, written))}")
    return print_shortfalls(guards)


def print_shortfalls(guards: list[dict]) -> int:
    """Print which bounds of --min-accuracy and --max-drop are not met; return the exit status."""
    unmet = [guard for guard in guards if not guard["met"]]
    for guard in unmet:
        below = f" below {guard['below']}" if "below" in guard else ""
        measured = f"{guard['checkpoint']}: accuracy {guard['measured']:.4f}{below}"
        print(f"shortfall: {measured}, {guard['guard']} {guard['bound']:g}", file=sys.stderr)
    return SHORTFALL if unmet else 0


def predict_folded(
    predict: Callable, checkpoint: Checkpoint, name: str, keras: Predictions | None, notes: Notes
) -> Predictions:
    """Predict with BatchNorm folded, which changes the rounding, as long as Keras is there to hold it to."""
    if keras:
        ours = predict(checkpoint, name, fold=True)
        if compare(keras, ours)["max_abs_probability_difference"] <= MAX_FOLDED_DIFFERENCE:
            return ours
        notes.add(
            f"folded, a probability was {MAX_FOLDED_DIFFERENCE:g} or more from Keras's: unfolded instead"
        )
    return predict(checkpoint, name)


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
    """Feed a data set to a network, and measure how long that takes.

    `network` is any function of a (N, 3, 32, 32) float32 tensor that gives (N, 10) logits, a tensor or an
    array: quantized, exported, compiled, or of another runtime. It is fed (pixel - mean) / std, `mean` and
    `std` a value, or one a channel, in pixel units; without them what `ResNet8.from_checkpoint` has read of
    it, or else plain pixels, 0 to 255. `workers` threads call it at a time. Warns when it is near chance, as
    it is when it is fed wrongly. Raises ValueError when it is in train mode, or its outputs are none, NaN or
    infinite.
    """
    from models.evaluation.inference import measure

    known = getattr(network, "scaling", None) or Scaling.given(dataset.images.shape[1])
    scaling = known.overruled(mean, std)
    found = measure(network, dataset, scaling, name, batch_size, workers, path)
    if found.is_near_chance:
        fed = f"mean {scaling.mean}, std {scaling.std}"
        warnings.warn(f"{name} is near chance: most likely it is to be fed otherwise ({fed})", stacklevel=2)
    return found


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

    parser = Parser(__doc__)
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        type=a_file,
        help="CHECKPOINT (checkpoints/resnet8.pt), and files to compare it with: "
        ".pt, .safetensors, .onnx, .tflite, .pt2",
    )
    add = parser.add_argument_group("images").add_argument
    add("--data-dir", metavar="DIR", type=Path, help="where CIFAR-10 is (data)")
    add("--data", choices=PARTS, default="auto", help="the test set, 1,000 of it, MLPerf Tiny's 200 or 500")
    add("--download", action="store_true", help="download the test set into --data-dir if it is not there")
    group = parser.add_argument_group("what the files do not say")
    add_scaling(group, "CHECKPOINT")
    add_key(group)
    group = parser.add_argument_group("what it is compared with")
    add = group.add_argument
    add("--compare", metavar="OTHER", type=a_file, nargs="+", default=[], help="more FILEs, after the others")
    add("--keras", metavar="KERAS_FILE", type=a_file, help="the baseline (what CHECKPOINT came from)")
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
    add("--per-class", action="store_true", help="accuracy per class, however many models there are")
    add("--min-accuracy", metavar="A", type=fraction, help="exit with status 3 below this fraction")
    add("--max-drop", metavar="D", type=fraction, help="and if further below Keras, or else CHECKPOINT")
    options = parser.parse_intermixed_args()
    options.checkpoint, *others = options.files or [beside_the_scripts("checkpoints/resnet8.pt")]
    options.is_default, options.compare = not options.files, others + options.compare
    check_scaling(parser, options)
    if options.keras and options.no_keras:
        parser.error("--keras and --no-keras exclude each other")
    if options.max_drop is not None and options.no_keras and not options.compare:
        parser.error("--max-drop needs a Keras baseline or a --compare to measure a drop by")
    if options.data_dir and options.data == "auto":
        options.data = "full"  # a folder that was named and does not hold it is a mistake
    options.data_dir = options.data_dir or beside_the_scripts("data")
    return options


if __name__ == "__main__":
    sys.exit(run(main))
