"""Convert a Keras or int8 TensorFlow Lite ResNet8 to PyTorch, or back to Keras, and verify the outputs.

    python convert.py [KERAS_FILE ...] [-o OUT.pt]
    python convert.py CHECKPOINT.pt [-o OUT.h5]
    python convert.py INT8.tflite [-o OUT.pt]

From Keras: read the file without running code from it, match its layers by their graph, permute the axes of
their tensors to PyTorch's layout, compare every layer's activations with Keras, and write OUT.pt (a
state_dict) and OUT.json (provenance and input normalization).

Back to Keras: build and save the model with Keras, then read, match and compare the saved file as above, and
write OUT.h5 (or OUT.keras) and OUT.h5.json.

Implementation: `models/keras/` reads Keras files and runs Keras, `models/conversion/` matches, maps and
verifies, `models/mapping.py` is the table of tensors, `models/checkpoint.py` reads and writes PyTorch files.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # `python -I` and -P do not add it

from data.cifar10 import DataError
from models.common.cli import (
    OutputExistsError,
    VerificationError,
    add_shared_options,
    echo,
    file_path,
    format_table,
    make_parser,
    print_error,
    printable,
    run,
)
from models.common.files import check_outputs, json_path, metadata_if_current, write_with_json
from models.common.job import JobError
from models.conversion.match import add_rescaling, layers_of_state_dict, place_weights
from models.conversion.plan import DEFAULT_INPUT, Task, plan
from models.keras.file import read_keras_content, read_keras_file
from models.keras.reference import Keras
from models.normalization import Normalization, fraction_note

# torch is imported inside the functions, so that the processes of Keras and the reader start first.

FAILURES = (ValueError, OutputExistsError, VerificationError, JobError, DataError, OSError)


def main() -> int:
    """Convert the files of the command line; return the exit status."""
    options = parse_arguments()
    if note := fraction_note(options.mean, options.std):
        echo(f"note: {note}")
    tasks = [task for task in options.tasks if not task.refusal]
    to_keras = any(task.to_keras for task in tasks)
    needs_keras = to_keras or not (options.no_verify or all(task.is_int8 for task in tasks))
    try:
        with Keras(options.keras_python) if needs_keras else nullcontext() as keras:
            outcomes = [convert(task, options, keras) for task in options.tasks]
    except JobError as error:
        print_error(f"{error}; {advice_without_keras(to_keras)}")
        return 1
    if len(outcomes) > 1:
        print_summary(options.tasks, outcomes)
    return int(any(metadata is None for metadata, _ in outcomes))


def convert(task: Task, options: argparse.Namespace, keras: Keras | None) -> tuple[dict | None, str]:
    """Convert one file; return (metadata, output), or (None, error message) after printing it."""
    path, output, to_keras, is_int8, reason = task
    shared = {"mean": options.mean, "std": options.std, "verbose": options.verbose}
    try:
        if reason:
            raise ValueError(reason)
        check_outputs(output, options.force, path)
        if is_int8:
            from models.conversion.int8 import convert_int8

            return convert_int8(path, output, options.verbose), str(output)
        if to_keras:
            back = {"rescaling": options.rescaling, "verify": not options.no_verify, "key": options.key}
            return convert_back(path, output, keras, **shared, **back), str(output)
        keras = None if options.no_verify else keras
        return convert_file(path, output, keras, **shared, bn_eps=options.bn_eps), str(output)
    except FAILURES as error:
        message = str(error).removeprefix(f"{path}: ")
        if isinstance(error, OSError):  # a write error: read errors are KerasFileError or ValueError
            message = f"cannot write {output} and its JSON: {error.strerror}"
        if isinstance(error, JobError):
            for line in error.log.splitlines()[:-1]:  # the last line is in the message
                print(line, file=sys.stderr)
            message += f"; {advice_without_keras(to_keras)}"
        print_error(f"{path}: {message}")
        return None, message


def convert_file(
    path: Path,
    output: Path,
    keras: Keras | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    bn_eps: float = 1e-3,
    verbose: bool = False,
) -> dict:
    """Convert a Keras file, verify it if `keras` is given, and write `output` and its JSON; return the JSON.

    `mean` and `std` (a scalar or one value per channel, in pixel units) are the input normalization of the
    Keras model. Raises KerasFileError, VerificationError, JobError or OSError; then nothing is written.
    """
    # Read: the layers, independent of the format, and the input normalization
    with ThreadPoolExecutor(1) as thread:  # read while torch is imported: saves 0.4 s
        reading = thread.submit(read_keras_file, path)
        from models.checkpoint import architecture_of, write_checkpoint
        from models.conversion.stages import verify
    file = place_weights(reading.result(), bn_eps)
    print_source(path, file.format, file.notes)
    described = metadata_if_current(path, file.sha256).get("input", {})
    mean, std = mean or described.get("mean"), std or described.get("std")

    # Match, map and verify
    reference = partial(keras.reference, file) if keras else None
    conversion = verify(file, mean, std, reference, verbose)

    # Write the state_dict and its JSON
    source = {
        "file": os.path.relpath(path, output.parent),
        "sha256": file.sha256,
        "format": file.format,
        "keras_version": file.keras_version,
        "assumed": file.assumed,
        "input": asdict(conversion.keras_input),
    }
    height, width, channels = file.input_shape
    images = {"layout": "NCHW", "shape": [channels, height, width], "range": [0, 255]}
    metadata = {
        "architecture": architecture_of(conversion.model),
        "source": source,
        "input": images | asdict(conversion.pytorch_input),
        **verification_json(conversion.results),
    }
    metadata = write_checkpoint(output, conversion.model, metadata)
    echo(f"  wrote {output} and {json_path(output)}")
    return metadata


def convert_back(
    path: Path,
    output: Path,
    keras: Keras,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    rescaling: bool = False,
    verify: bool = True,
    verbose: bool = False,
    key: str | None = None,
) -> dict:
    """Convert a checkpoint to Keras; write `output` (.h5 or .keras) and its JSON; return the JSON.

    `mean` and `std` (a scalar or one value per channel, in pixel units) override the input normalization of
    the JSON. The Keras model expects the same; with `rescaling` it has a Rescaling layer and takes pixels
    0-255. `key` selects one of several state_dicts. Raises ValueError for an invalid checkpoint,
    VerificationError, JobError or OSError; then nothing is written.
    """
    from models.checkpoint import architecture_of, read_checkpoint
    from models.conversion import stages
    from models.conversion.verify import probe_images
    from models.resnet8 import ResNet8

    # Read: the network, its input normalization, BatchNorm epsilon and momentum
    try:
        checkpoint = read_checkpoint(path, ResNet8, key=key).with_normalization(mean, std)
    except OSError as error:
        raise ValueError(str(error.strerror)) from None
    normalization, architecture = checkpoint.normalization, architecture_of(checkpoint.model)
    channels, *image_size = checkpoint.input_shape
    print_source(path, "PyTorch state_dict", checkpoint.notes)

    # Build and save the model with Keras, then read the saved file
    norm = {"epsilon": architecture["bn_eps"], "momentum": round(1 - architecture["bn_momentum"], 12)}
    state = {name: value.numpy() for name, value in checkpoint.model.state_dict().items()}
    layers, keras_input = layers_of_state_dict(state, image_size, norm), normalization
    if rescaling:
        layers, keras_input = add_rescaling(layers, normalization), Normalization.from_args(channels)
    images, others = probe_images([*image_size, channels])
    content, reference = keras.build(layers, output.suffix, images, others, keras_input)
    file = read_keras_content(output, content)

    # Match, map and verify
    answer = (lambda *_: reference) if verify else None
    conversion = stages.verify(file, keras_input.mean, keras_input.std, answer, verbose, checkpoint.model)
    stages.check_normalization(conversion.pytorch_input, normalization)

    # Write the Keras file and its JSON
    source = {
        "file": os.path.relpath(path, output.parent),
        "sha256": checkpoint.sha256,
        "format": "PyTorch state_dict",
        "input": asdict(normalization),
    }
    images = {"layout": "NHWC", "shape": [*image_size, channels], "range": [0, 255]}
    metadata = {
        "architecture": architecture,
        "source": source,
        "input": images | asdict(conversion.keras_input),
        **verification_json(conversion.results, keras=file.keras_version),
        "sha256": file.sha256,
    }
    write_with_json(output, file.content, metadata)
    echo(f"  input of the Keras model: {conversion.keras_input}")
    echo(f"  wrote {output} and {json_path(output)}")
    return metadata


def print_source(path: Path, file_format: str, notes: list[str]) -> None:
    """Print a file's name, format and notes."""
    echo(printable(f"{path}: {file_format}"))
    for note in notes:
        echo(printable(f"  note: {note}"))


def print_summary(tasks: list[Task], outcomes: list[tuple[dict | None, str]]) -> None:
    """Print one row per file: result, largest difference of the probabilities, and output or error."""
    headings = ["file", "result", "difference", "output or error"]
    rows = [headings]
    for task, (metadata, detail) in zip(tasks, outcomes, strict=True):
        result, difference = "failed", ""
        if metadata:
            results = metadata["verification"]
            result = "converted"
            difference = "every byte equal" if results else "not verified"
            if results and "float64" in results:
                difference = f"{results['float64']['probabilities']:.1e}"
        rows.append([str(task.path), result, difference, detail])
    echo("\n" + format_table(rows, left=tuple(headings)))


def advice_without_keras(to_keras: bool) -> str:
    """Return the hint printed when Keras is unavailable."""
    return "writing a Keras file requires Keras" if to_keras else "--no-verify converts without Keras"


def verification_json(results: dict | None, **versions: str) -> dict:
    """Return the JSON entries about the verification; `versions`: libraries of the Keras process."""
    return {
        "verification": results,
        "versions": {**{name: version(name) for name in ("torch", "numpy", "h5py")}, **versions},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; exit with status 2 if it is wrong."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    help_text = f"Keras file, checkpoint or int8 .tflite (default: {DEFAULT_INPUT})"
    add("files", metavar="FILE", type=file_path, nargs="*", help=help_text)
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", metavar="OUT", help="output file, or a folder (default: beside the input)")
    add("--force", action="store_true", help="overwrite files not written by convert.py, or modified since")
    add("-v", "--verbose", action="store_true", help="print the mapping, one row per tensor")
    group = parser.add_argument_group("input")
    add_shared_options(group)
    add = group.add_argument
    add(
        "--bn-eps",
        type=float,
        default=1e-3,
        help="BatchNormalization epsilon of weights-only files (default: 0.001)",
    )
    add(
        "--rescaling",
        action="store_true",
        help="for a checkpoint: add a Rescaling layer with its input normalization",
    )
    add = parser.add_argument_group("verification").add_argument
    add("--no-verify", action="store_true", help="skip the comparison with Keras (TensorFlow not required)")
    options = parser.parse_args()
    if not 0 < options.bn_eps < 1:
        parser.error("--bn-eps must be between 0 and 1")
    try:
        options.tasks = plan(options.files, options.output or "")
    except ValueError as error:
        parser.error(str(error))
    if options.rescaling and not all(task.to_keras for task in options.tasks):
        parser.error("--rescaling requires a PyTorch checkpoint as input")
    return options


if __name__ == "__main__":
    sys.exit(run(main))
