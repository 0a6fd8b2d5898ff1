"""Convert a Keras ResNet8 to PyTorch, or back, and prove that nothing changed.

    python convert.py [KERAS_FILE ...] [-o OUT.pt]
    python convert.py CHECKPOINT.pt [-o OUT.h5]

reads the Keras file without running any of it, finds every layer's place by following the graph, permutes
the axes of its tensors into PyTorch's layout, compares every layer's activations with Keras's own, and writes
OUT.pt, a plain state_dict, and OUT.json, which says where it came from and what it wants to be fed.

A checkpoint goes the same way back: Keras builds and saves the model, and what it saved is read, matched and
compared as any Keras file is, before OUT.h5 (or OUT.keras) and OUT.h5.json are written.

The rooms behind it: `models/keras/` reads Keras files and runs Keras, `models/graph.py` has the table of the
network and matches a file to it, `models/mapping.py` has the table of transposes and renames, which
`models/tensors.py` applies, `models/proof.py` compares, `models/checkpoint.py` reads and writes; both
directions share the stages of `models/stages.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from data.cifar10 import DataError
from models.errors import OutputExistsError, VerificationError
from models.keras.file import read_keras_content, read_keras_file, start_reader
from models.keras.process import KerasProcess
from models.paths import KERAS_SUFFIXES, check_outputs, is_checkpoint, json_of
from models.placing import graph_of, with_graph, with_rescaling
from models.proof import compare_scaling
from models.stages import input_metadata, map_rows, match, prove_counts, prove_numbers, verified_by
from models.tensors import build_model, input_normalization, load_tensors
from models.terminal import (
    add_keras_python,
    add_scaling,
    beside_the_scripts,
    check_scaling,
    describe_input,
    one_a_channel,
    print_note,
    print_summary,
    run,
)
from models.worker import Worker, WorkerError

# torch is imported where it is first needed: by then Keras and the reader are starting in their processes.

DEFAULT_INPUT = "checkpoints/resnet8_keras.h5"  # beside this script
FAILURES = (ValueError, OutputExistsError, VerificationError, WorkerError, DataError, OSError)
WRITES_KERAS = "; a Keras file is written by Keras, so this way needs it"
WITHOUT_KERAS = "; --no-verify converts without the comparison with Keras"


def main() -> int:
    """Convert the files of the command line; return the exit status."""
    options = parse_arguments()
    asks_keras = bool(options.checkpoints) or not options.no_verify
    outcomes = []
    try:
        with (
            start_reader() as reader,
            KerasProcess(options.keras_python) if asks_keras else nullcontext() as keras,
        ):
            for path, output in zip(options.files, options.outputs, strict=True):
                common = path, output, reader, keras, options.mean, options.std
                verify, verbose = not options.no_verify, options.verbose
                try:
                    check_outputs(output, options.force)
                    if path in options.checkpoints:
                        metadata = convert_back(*common, options.rescaling, verify, verbose)
                    else:
                        metadata = convert_file(*common, options.bn_eps, verify, verbose)
                    outcomes.append((path, metadata, str(output)))
                except FAILURES as error:
                    message = str(error).removeprefix(f"{path}: ")
                    if isinstance(error, OSError):  # what cannot be read is a KerasFileError or a ValueError
                        message = f"cannot write {output} and its .json: {error.strerror}"
                    if isinstance(error, WorkerError):
                        print(error.log, file=sys.stderr, end="")
                        message += WRITES_KERAS if path in options.checkpoints else WITHOUT_KERAS
                    print(f"error: {path}: {message}", file=sys.stderr)
                    outcomes.append((path, None, message))
    except WorkerError as error:
        print(f"error: {error}{WRITES_KERAS if options.checkpoints else WITHOUT_KERAS}", file=sys.stderr)
        return 1
    if len(outcomes) > 1:
        print_summary(outcomes)
    return int(any(metadata is None for _, metadata, _ in outcomes))


def convert_file(
    path: Path,
    output: Path,
    reader: Worker,
    keras: KerasProcess | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    bn_eps: float = 1e-3,
    verify: bool = True,
    verbose: bool = False,
) -> dict:
    """Convert one Keras file, verify it if there is a Keras process, write `output` and its JSON; return it.

    `mean` and `std` (a value, or one a channel, in pixel units) say what the Keras model is fed:
    (pixel - mean) / std. Raises KerasFileError, VerificationError, WorkerError, OSError; writes nothing then.
    """
    # Read: the file's layers in one form, whatever its format
    file = with_graph(read_keras_file(path, reader), bn_eps)
    print(f"{path}: {file.format}")
    for note in file.notes:
        print_note(note, indent="  ")

    # Match: each layer in its place in the network
    places = match(file)

    # Map: each tensor, its axes in PyTorch's order, under its PyTorch key
    from models.checkpoint import write_checkpoint, written_metadata

    model, arguments = build_model(places)
    channels, written = arguments["in_channels"], written_metadata(path, file.sha256).get("input", {})
    keras_input = (
        one_a_channel("--mean", mean or written.get("mean", [0.0]), channels),
        one_a_channel("--std", std or written.get("std", [1.0]), channels),
    )
    pytorch_input = input_normalization(file, places, *keras_input)
    rows = map_rows(places, model, verbose)

    # Prove: nothing is missing, and every layer computes what Keras's computes
    loaded = prove_counts(file, rows, model, keras if verify else None)
    load_tensors(model, rows)
    results = prove_numbers(file, places, model, keras, loaded, keras_input, pytorch_input)

    # Write: the state_dict, and what there is to know about it
    metadata = {
        "architecture": arguments,
        "source": {
            "file": os.path.relpath(path, output.parent),
            "sha256": file.sha256,
            "format": file.format,
            "keras_version": file.keras_version,
            "assumed": file.assumed,
            "input": {"mean": keras_input[0], "std": keras_input[1]},
        },
        "input": input_metadata("NCHW", [channels, *file.input_shape[:2]], *pytorch_input),
        **verified_by(results),
    }
    metadata = write_checkpoint(output, model, metadata)
    print(f"  wrote {output} and {json_of(output)}")
    return metadata


def convert_back(
    path: Path,
    output: Path,
    reader: Worker,
    keras: KerasProcess,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    rescaling: bool = False,
    verify: bool = True,
    verbose: bool = False,
) -> dict:
    """Convert one checkpoint to Keras, write `output` (.h5 or .keras) and its JSON; return the latter.

    `mean` and `std` (a value, or one a channel, in pixel units) say what the network is fed, where its JSON
    does not; the Keras model is fed the same, or, with `rescaling`, plain pixels. Raises ValueError for what
    is no checkpoint, VerificationError, WorkerError, OSError; writes nothing then.
    """
    # Read: the network, what it is fed, and BatchNorm's constants
    from models.checkpoint import read_checkpoint, write_with_json
    from models.resnet8 import ResNet8

    try:
        checkpoint = read_checkpoint(ResNet8, path).fed(mean, std)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    model, arguments = checkpoint.model, checkpoint.arguments
    channels, *image_size = checkpoint.input_shape
    print(f"{path}: PyTorch state_dict")
    for note in checkpoint.notes:
        print_note(note, indent="  ")

    # Map: each tensor, its axes in Keras's order, in its place in the graph; then Keras builds and saves it
    norm = {"epsilon": arguments["bn_eps"], "momentum": round(1 - arguments["bn_momentum"], 12)}
    layers = graph_of({key: value.numpy() for key, value in model.state_dict().items()}, image_size, norm)
    keras_input = pytorch_input = (checkpoint.mean, checkpoint.std)
    if rescaling:
        layers = with_rescaling(layers, *pytorch_input)
        keras_input = ([0.0] * channels, [1.0] * channels)
    content = keras.build(layers, output.suffix)

    # Match: what Keras saved is read as any Keras file is, and every tensor is the one that it was
    file = read_keras_content(output, content, reader)
    places = match(file)
    if rescaling:
        pytorch_input = input_normalization(file, places, *keras_input)
        compare_scaling(pytorch_input, (checkpoint.mean, checkpoint.std))
    rows = map_rows(places, model, verbose, is_loaded=True)

    # Prove: nothing is missing, and every layer computes what PyTorch's computes
    loaded = prove_counts(file, rows, model, keras if verify else None)
    results = prove_numbers(file, places, model, keras, loaded, keras_input, pytorch_input)

    # Write: the Keras file, and what there is to know about it
    metadata = {
        "architecture": arguments,
        "source": {
            "file": os.path.relpath(path, output.parent),
            "sha256": checkpoint.sha256,
            "format": "PyTorch state_dict",
            "input": {"mean": checkpoint.mean, "std": checkpoint.std},
        },
        "input": input_metadata("NHWC", [*image_size, channels], *keras_input),
        **verified_by(results, keras=file.keras_version),
        "sha256": file.sha256,
    }
    write_with_json(output, file.content, metadata)
    print(f"  {describe_input('the Keras model', *keras_input)}")
    print(f"  wrote {output} and {json_of(output)}")
    return metadata


def parse_arguments() -> argparse.Namespace:
    """Return the command line; exits with status 2 when it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", metavar="FILE", type=Path, nargs="*", help=f"Keras files, or checkpoints ({DEFAULT_INPUT})"
    )
    add = parser.add_argument_group("what is written").add_argument
    add("-o", "--output", metavar="OUT", help="the .pt, .h5 or .keras; a folder for several files")
    add("--force", action="store_true", help="replace files that convert.py did not write")
    add("-v", "--verbose", action="store_true", help="print the mapping, one row a tensor")
    group = parser.add_argument_group("what the files do not say")
    add_scaling(group, "the model")
    group.add_argument("--bn-eps", type=float, default=1e-3, help="epsilon of Keras weights alone (0.001)")
    group.add_argument(
        "--rescaling", action="store_true", help="back to Keras: it is to scale its own pixels"
    )
    group = parser.add_argument_group("the proof")
    group.add_argument(
        "--no-verify", action="store_true", help="do not compare with Keras (needs no tensorflow)"
    )
    add_keras_python(group)
    arguments = parser.parse_args()

    check_scaling(parser, arguments)
    if not 0 < arguments.bn_eps < 1:
        parser.error("--bn-eps must be between 0 and 1")
    bundled = beside_the_scripts(DEFAULT_INPUT)
    arguments.files = arguments.files or [bundled]
    arguments.checkpoints = [path for path in arguments.files if is_checkpoint(path)]
    arguments.outputs = [
        path.with_name("resnet8.pt")
        if path.absolute() == bundled.absolute()
        else path.with_suffix(".h5" if path in arguments.checkpoints else ".pt")
        for path in arguments.files
    ]
    if arguments.rescaling and len(arguments.checkpoints) < len(arguments.files):
        parser.error("--rescaling is for checkpoints: a Keras file has its own, or none")
    if arguments.output:
        output = Path(arguments.output)
        is_folder = output.is_dir() or arguments.output.endswith(("/", os.sep))
        if len(arguments.files) > 1 and output.suffix in (".pt", ".pth", *KERAS_SUFFIXES) and not is_folder:
            parser.error(f"-o {output}: several files need a folder")
        if len(arguments.files) > 1 or is_folder:
            arguments.outputs = [output / path.name for path in arguments.outputs]
        else:
            arguments.outputs = [output]
    twice = {output for output in arguments.outputs if arguments.outputs.count(output) > 1}
    if twice:
        parser.error(f"two of the files would be written to {min(twice)}")
    sources = {path.resolve() for path in arguments.files}
    for path, output in zip(arguments.files, arguments.outputs, strict=True):
        if (path in arguments.checkpoints) != (output.suffix in KERAS_SUFFIXES):
            wanted = (
                "a checkpoint becomes .h5 or .keras"
                if path in arguments.checkpoints
                else "that is a Keras file's"
            )
            parser.error(f"-o {output}: {wanted} ({path})")
        if output.suffix == ".json":
            parser.error(f"-o {output}: the .json beside the checkpoint would be written over it")
        if sources & {output.resolve(), json_of(output).resolve()}:
            kind = "a checkpoint" if arguments.checkpoints else "a Keras file"
            parser.error(f"{output} and its .json would be written over {kind}: name another with -o")
    return arguments


if __name__ == "__main__":
    sys.exit(run(main))
