"""Convert a Keras ResNet8 to PyTorch, and prove that nothing changed.

    python convert.py [KERAS_FILE ...] [-o OUT.pt]

reads the Keras file without running any of it, finds every layer's place by following the graph, permutes
the axes of its tensors into PyTorch's layout, compares every layer's activations with Keras's own, and writes
OUT.pt, a plain state_dict, and OUT.json, which says where it came from and what it wants to be fed.

The rooms behind it: `models/keras/` reads Keras files and runs Keras, `models/graph.py` has the table of the
network and matches a file to it, `models/mapping.py` has the table of transposes and renames, which
`models/tensors.py` applies, `models/proof.py` compares, `models/checkpoint.py` writes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from data.cifar10 import DataError
from data.files import check_writable, sha256_of
from models.errors import KerasFileError, OutputExistsError, VerificationError
from models.graph import match_graph, with_graph
from models.keras.file import KerasFile, read_keras_file, start_reader
from models.keras.process import KerasProcess
from models.mapping import MAPPING
from models.proof import (
    MAX_ACTIVATION_DIFFERENCE,
    MAX_PROBABILITY_DIFFERENCE,
    compare_counts,
    compare_numbers,
)
from models.tensors import (
    Row,
    build_model,
    input_normalization,
    load_tensors,
    map_tensors,
    one_a_channel,
)
from models.terminal import add_scaling, beside_the_scripts, check_scaling, run
from models.worker import Worker, WorkerError

# torch is imported where it is first needed: by then Keras and the reader are starting in their processes.

DEFAULT_INPUT = "checkpoints/resnet8_keras.h5"  # beside this script
FAILURES = (KerasFileError, OutputExistsError, VerificationError, WorkerError, DataError, OSError)
WITHOUT_KERAS = "; --no-verify converts without the comparison with Keras"


def main() -> int:
    """Convert the files of the command line; return the exit status."""
    arguments = parse_arguments()
    keras, outcomes = None, []
    with start_reader() as reader:
        try:
            keras = None if arguments.no_verify else KerasProcess(arguments.keras_python)
            for path, output in zip(arguments.files, arguments.outputs, strict=True):
                try:
                    check_outputs(output, output.with_suffix(".json"), arguments.force)
                    metadata = convert_file(
                        path,
                        output,
                        reader,
                        keras,
                        arguments.mean,
                        arguments.std,
                        arguments.bn_eps,
                        arguments.verbose,
                    )
                    outcomes.append((path, metadata, str(output)))
                except FAILURES as error:
                    message = str(error)
                    if isinstance(error, OSError):  # reading has errors of its own
                        message = f"cannot write {output} and its .json: {error.strerror}"
                    if isinstance(error, WorkerError):
                        print(error.log, file=sys.stderr, end="")
                        message += WITHOUT_KERAS
                    print(f"error: {path}: {message}", file=sys.stderr)
                    outcomes.append((path, None, message))
        except WorkerError as error:
            print(f"error: {error}{WITHOUT_KERAS}", file=sys.stderr)
            return 1
        finally:
            if keras:
                keras.close()
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
    verbose: bool = False,
) -> dict:
    """Convert one Keras file, verify it if there is a Keras process, write `output` and its JSON; return it.

    `mean` and `std` (a value, or one a channel, in pixel units) say what the Keras model is fed:
    (pixel - mean) / std. Raises KerasFileError, VerificationError, WorkerError, OSError; writes nothing then.
    """
    # Read: the file's layers in one form, whatever its format
    file = with_graph(read_keras_file(path, reader), bn_eps)
    print(f"{path}: {file.format}")
    for note in notes_on(file):
        print(f"  note: {note}")

    # Match: each layer in its place in the network
    with stage("layers") as figures:
        places = match_graph(file)
        weighted = sum(layer.class_name in MAPPING for layer in places.values())
        figures.append(f"{weighted} with weights and {len(file.layers) - weighted} others, each in its place")

    # Map: each tensor, its axes in PyTorch's order, under its PyTorch key
    model, arguments = build_model(places)
    channels = arguments["in_channels"]
    keras_input = (
        one_a_channel("--mean", mean or [0.0], channels),
        one_a_channel("--std", std or [1.0], channels),
    )
    pytorch_input = input_normalization(file, places, *keras_input)
    with stage("shapes") as figures:
        rows = map_tensors(places, model)
        figures.append(f"{len(rows)} tensors")
    if verbose:
        print_rows(rows)

    # Prove: nothing is missing, and every layer computes what Keras's computes
    with stage("parameters") as figures:
        loaded = keras.load(file) if keras else None
        figures.append(compare_counts(rows, model, loaded))

    load_tensors(model, rows)
    results = None
    if keras:
        with stage("numbers") as figures:
            results = compare_numbers(file, places, model, keras, keras_input, pytorch_input)
            results = {"keras": loaded["keras"], "rebuilt": loaded["rebuilt"], **results}
            figures += describe(results)
    else:
        print("  numbers     not verified (--no-verify)")

    # Write: the state_dict, and what there is to know about it
    from models.checkpoint import write_checkpoint

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
        "input": {
            "layout": "NCHW",
            "shape": [channels, *file.input_shape[:2]],
            "range": [0, 255],
            "mean": pytorch_input[0],
            "std": pytorch_input[1],
        },
        "verification": results,
        "versions": {name: version(name) for name in ("torch", "numpy", "h5py")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    metadata = write_checkpoint(output, model, metadata)
    print(f"  wrote {output} and {output.with_suffix('.json')}")
    return metadata


def check_outputs(output: Path, json_path: Path, force: bool) -> None:
    """Raise OutputExistsError unless nothing is there, or what `convert.py` wrote and nobody has changed.

    The JSON has the SHA-256 of what was written with it; `force` replaces whatever is there. Raises OSError
    when the files cannot be written.
    """
    check_writable([output, json_path])
    if force:
        return
    written = None
    if json_path.exists():
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # it is not ours
            metadata = json.loads(json_path.read_text())
            written = metadata["architecture"] and metadata["source"] and metadata["sha256"]
        if not written:
            raise OutputExistsError(f"{json_path} is not of convert.py's writing; --force replaces it")
    if output.exists() and sha256_of(output) != written:
        raise OutputExistsError(f"{output} is not as convert.py wrote it (fine-tuned?); --force replaces it")


def notes_on(file: KerasFile) -> list[str]:
    """Return what is to be said of a file: what was assumed, and what of it is not float32."""
    arrays = [array for layer in file.layers for array in layer.arrays.values() if array.dtype.kind == "f"]
    stored = {str(array.dtype) for array in arrays} - {"float32"}
    policies = set()
    for layer in file.layers:
        policy = layer.config.get("dtype", "float32")
        if isinstance(policy, dict) and isinstance(policy.get("config"), dict):  # as Keras 3 writes it
            policy = policy["config"].get("name")
        policies.add(f"{policy!s:.40}")
    policies -= {"float32"}
    notes = [file.assumed] if file.assumed else []
    notes += [f"{', '.join(sorted(stored))} weights, converted to float32"] if stored else []
    return notes + ([f"dtype policy {', '.join(sorted(policies))}, converted to float32"] if policies else [])


@contextmanager
def stage(name: str) -> Iterator[list[str]]:
    """Print a stage of the validation as passed, with the figures put into the list, or as failed."""
    figures: list[str] = []
    try:
        yield figures
    except Exception:
        print(f"  {name:<11} failed")
        raise
    for index, line in enumerate(figures):
        print((f"  {name:<11} passed  {line}" if index == 0 else f"{'':22}{line}").rstrip())


def describe(results: dict) -> list[str]:
    """Return the lines that say how far PyTorch is from Keras, from the results of the verification."""
    keras, lines = f"Keras {results['keras']}", []
    if results["rebuilt"]:
        lines.append(f"{keras} got the graph from us: {results['rebuilt']}")
    lines.append(f"{results['layers']} layers against {keras}, on real and random images")
    for dtype in ("float64", "float32"):
        found = results[dtype]
        bound = f"(at most {MAX_ACTIVATION_DIFFERENCE:.0e})" if dtype == "float64" else ""
        lines.append(f"{dtype}  activations    {found['activations']:.1e}  {bound}")
        bound = f"(at most {MAX_PROBABILITY_DIFFERENCE[dtype]:.0e})"
        lines.append(f"{'':7}  probabilities  {found['probabilities']:.1e}  {bound}")
    return lines


def print_rows(rows: list[Row]) -> None:
    """Print the mapping table, one row a tensor."""
    from rich.console import Console
    from rich.table import Table

    table = Table("Keras", "shape", "axes", "PyTorch", "shape", box=None, padding=(0, 1), show_edge=False)
    for row in rows:
        shape = "absent" if row.source is None else str(row.source.shape)
        axes = f"= {row.absent:g}" if row.source is None else str(row.axes) if len(row.axes) > 1 else "as is"
        table.add_row(f"{row.layer}/{row.variable}", shape, axes, row.key, str(row.shape))
    Console(highlight=False, width=160).print(table)  # wide enough for the names, whatever the terminal


def print_summary(outcomes: list[tuple[Path, dict | None, str]]) -> None:
    """Print one line a file: what came of it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "result", "float64 difference", "", box=None, padding=(0, 1), show_edge=False)
    for path, metadata, detail in outcomes:
        verification = metadata and metadata["verification"]
        difference = f"{verification['float64']['probabilities']:.1e}" if verification else ""
        table.add_row(str(path), "converted" if metadata else "refused", difference, detail)
    print()
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def parse_arguments() -> argparse.Namespace:
    """Return the command line; exits with status 2 when it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", metavar="KERAS_FILE", type=Path, nargs="*", help=f"default: {DEFAULT_INPUT}")
    parser.add_argument("-o", "--output", metavar="OUT", help="the .pt to write; a folder for several files")
    parser.add_argument("--force", action="store_true", help="replace files that convert.py did not write")
    add_scaling(parser, "the Keras model")
    parser.add_argument(
        "--bn-eps", type=float, default=1e-3, help="epsilon to assume for weights alone (0.001)"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare with Keras (needs no tensorflow)"
    )
    parser.add_argument(
        "--keras-python", default=sys.executable, help="the Python that has Keras (default: this one)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print the mapping, one row a tensor")
    arguments = parser.parse_args()

    check_scaling(parser, arguments)
    if not 0 < arguments.bn_eps < 1:
        parser.error("--bn-eps must be between 0 and 1")
    bundled = beside_the_scripts(DEFAULT_INPUT)
    arguments.files = arguments.files or [bundled]
    arguments.outputs = [
        path.with_name("resnet8.pt") if path.absolute() == bundled.absolute() else path.with_suffix(".pt")
        for path in arguments.files
    ]
    if arguments.output:
        output = Path(arguments.output)
        is_folder = output.is_dir() or arguments.output.endswith(("/", os.sep))
        if len(arguments.files) > 1 and output.suffix in (".pt", ".pth") and not is_folder:
            parser.error(f"-o {output}: several files need a folder")
        if len(arguments.files) > 1 or is_folder:
            arguments.outputs = [output / path.name for path in arguments.outputs]
        else:
            arguments.outputs = [output]
    twice = {output for output in arguments.outputs if arguments.outputs.count(output) > 1}
    if twice:
        parser.error(f"two of the files would be written to {min(twice)}")
    sources = {path.resolve() for path in arguments.files}
    for output in arguments.outputs:
        if output.suffix == ".json":
            parser.error(f"-o {output}: the .json beside the checkpoint would be written over it")
        if sources & {output.resolve(), output.with_suffix(".json").resolve()}:
            parser.error(f"{output} and its .json would be written over a Keras file: name another with -o")
    return arguments


if __name__ == "__main__":
    sys.exit(run(main))
