"""Convert a Keras ResNet8 to PyTorch, or back, and prove that nothing changed.

    python convert.py [KERAS_FILE ...] [-o OUT.pt]
    python convert.py CHECKPOINT.pt [-o OUT.h5]

reads the Keras file without running any of it, finds every layer's place by following the graph, permutes
the axes of its tensors into PyTorch's layout, compares every layer's activations with Keras's own, and writes
OUT.pt, a plain state_dict, and OUT.json, which says where it came from and what it wants to be fed.

A checkpoint goes the same way back: Keras builds and saves the model, and what it saved is read, matched and
compared as any Keras file is, before OUT.h5 (or OUT.keras) and OUT.h5.json are written.

The rooms behind it: `models/keras/` reads Keras files and runs Keras, `models/conversion/` matches, maps and
proves, in the five stages of its `stages.py`, by the table of `models/mapping.py`; `models/checkpoint.py` is
the PyTorch side.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # `python -I` and -P look for nothing here

from data.cifar10 import DataError
from models.common.errors import OutputExistsError, VerificationError, printable
from models.common.kinds import OTHER_SUFFIXES
from models.common.terminal import (
    Parser,
    a_file,
    add_keras_python,
    add_key,
    add_scaling,
    beside_the_scripts,
    check_scaling,
    print_error,
    print_note,
    print_summary,
    run,
)
from models.conversion.placing import graph_of, with_graph, with_rescaling
from models.files.metadata import (
    KERAS_SUFFIXES,
    check_outputs,
    is_checkpoint,
    json_of,
    write_with_json,
    written_metadata,
)
from models.keras.file import read_keras_content, read_keras_file, start_reader
from models.keras.process import KerasProcess
from models.keras.worker import Worker, WorkerError

# What needs torch is imported where a file is converted: by then Keras and the reader are starting.

DEFAULT_INPUT = "checkpoints/resnet8_keras.h5"  # beside this script
FAILURES = (ValueError, OutputExistsError, VerificationError, WorkerError, DataError, OSError)
WRITES_KERAS = "; a Keras file is written by Keras, so this way needs it"
WITHOUT_KERAS = "; --no-verify converts without the comparison with Keras"


class Job(NamedTuple):
    """A file of the command line, and what it becomes."""

    path: Path
    output: Path
    is_back: bool  # whether it is a checkpoint, on its way back to Keras

    @property
    def hint(self) -> str:
        """What to do without Keras."""
        return WRITES_KERAS if self.is_back else WITHOUT_KERAS


def main() -> int:
    """Convert the files of the command line; return the exit status."""
    options = parse_arguments()
    back = [job for job in options.jobs if job.is_back]
    asks_keras = bool(back) or not options.no_verify
    try:
        with (
            start_reader() as reader,
            KerasProcess(options.keras_python) if asks_keras else nullcontext() as keras,
        ):
            outcomes = [convert(job, options, reader, keras) for job in options.jobs]
    except WorkerError as error:
        print_error(f"{error}{(back or options.jobs)[0].hint}")
        return 1
    if len(outcomes) > 1:
        print_summary(outcomes)
    return int(any(metadata is None for _, metadata, _ in outcomes))


def convert(
    job: Job, options: argparse.Namespace, reader: Worker, keras: KerasProcess | None
) -> tuple[Path, dict | None, str]:
    """Convert one file; return its path, metadata and output, or None and why not, which is printed."""
    path, output, is_back = job
    fed, verify, verbose = (options.mean, options.std), not options.no_verify, options.verbose
    try:
        check_outputs(output, options.force, path)
        if is_back:
            rescaling, key = options.rescaling, options.key
            metadata = convert_back(path, output, reader, keras, *fed, rescaling, verify, verbose, key)
        else:
            against = keras if verify else None
            metadata = convert_file(path, output, reader, against, *fed, options.bn_eps, verbose)
        return path, metadata, str(output)
    except FAILURES as error:
        message = str(error).removeprefix(f"{path}: ")
        if isinstance(error, OSError):  # what cannot be read is a KerasFileError or a ValueError
            message = f"cannot write {output} and its .json: {error.strerror}"
        if isinstance(error, WorkerError):
            print(error.log, file=sys.stderr, end="")
            message += job.hint
        print_error(f"{path}: {message}")
        return path, None, message


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
    # Read: the file's layers in one form, whatever its format, and what its model is fed
    file = with_graph(read_keras_file(path, reader), bn_eps)
    introduce(path, file.format, file.notes)
    written = written_metadata(path, file.sha256).get("input", {})
    mean, std = mean or written.get("mean"), std or written.get("std")

    # Match, map, and prove that every layer computes what Keras's computes
    from models.checkpoint import architecture_of, write_checkpoint
    from models.conversion.stages import prove

    proven = prove(file, mean, std, keras, verbose)

    # Write: the state_dict, and what there is to know about it
    architecture = architecture_of(proven.model)
    metadata = {
        "architecture": architecture,
        "source": {
            "file": os.path.relpath(path, output.parent),
            "sha256": file.sha256,
            "format": file.format,
            "keras_version": file.keras_version,
            "assumed": file.assumed,
            "input": asdict(proven.keras_input),
        },
        "input": {
            "layout": "NCHW",
            "shape": [architecture["in_channels"], *file.input_shape[:2]],
            "range": [0, 255],
            **asdict(proven.pytorch_input),
        },
        **proof_of(proven.results),
    }
    metadata = write_checkpoint(output, proven.model, metadata)
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
    key: str | None = None,
) -> dict:
    """Convert one checkpoint to Keras, write `output` (.h5 or .keras) and its JSON; return the latter.

    `mean` and `std` (a value, or one a channel, in pixel units) say what the network is fed, where its JSON
    does not; the Keras model is fed the same, or, with `rescaling`, plain pixels. `key` names one of several
    state_dicts in the file. Raises ValueError for what is no checkpoint, VerificationError, WorkerError,
    OSError; writes nothing then.
    """
    from models.checkpoint import architecture_of, read_checkpoint
    from models.conversion.proof import compare_scaling
    from models.conversion.stages import prove

    # Read: the network, what it is fed, and BatchNorm's constants
    try:
        checkpoint = read_checkpoint(path, key=key).fed(mean, std)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    scaling, architecture = checkpoint.scaling, architecture_of(checkpoint.model)
    channels, *image_size = checkpoint.input_shape
    introduce(path, "PyTorch state_dict", checkpoint.notes)

    # Build: Keras is given the graph and its arrays, and saves it; what it saved is read as any Keras file is
    norm = {"epsilon": architecture["bn_eps"], "momentum": round(1 - architecture["bn_momentum"], 12)}
    state = {key: value.numpy() for key, value in checkpoint.model.state_dict().items()}
    layers = graph_of(state, image_size, norm)
    layers = with_rescaling(layers, scaling) if rescaling else layers
    file = read_keras_content(output, keras.build(layers, output.suffix), reader)
    mean, std = (None, None) if rescaling else (scaling.mean, scaling.std)

    # Match, map, and prove that every layer computes what PyTorch's computes
    proven = prove(file, mean, std, keras if verify else None, verbose, checkpoint.model)
    compare_scaling(proven.pytorch_input, scaling)

    # Write: the Keras file, and what there is to know about it
    metadata = {
        "architecture": architecture,
        "source": {
            "file": os.path.relpath(path, output.parent),
            "sha256": checkpoint.sha256,
            "format": "PyTorch state_dict",
            "input": asdict(scaling),
        },
        "input": {
            "layout": "NHWC",
            "shape": [*image_size, channels],
            "range": [0, 255],
            **asdict(proven.keras_input),
        },
        **proof_of(proven.results, keras=file.keras_version),
        "sha256": file.sha256,
    }
    write_with_json(output, file.content, metadata)
    print(f"  {proven.keras_input.says('the Keras model')}")
    print(f"  wrote {output} and {json_of(output)}")
    return metadata


def introduce(path: Path, kind: str, notes: list[str]) -> None:
    """Print which file it is, and what is to be said of it."""
    print(printable(f"{path}: {kind}"))
    for note in notes:
        print_note(note, indent="  ")


def proof_of(results: dict | None, **versions: str) -> dict:
    """Return what the JSON says of the proof: its figures, by which versions of what, and when.

    `versions` are those of libraries in other processes that have written the file.
    """
    return {
        "verification": results,
        "versions": {**{name: version(name) for name in ("torch", "numpy", "h5py")}, **versions},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def parse_arguments() -> argparse.Namespace:
    """Return the command line; exits with status 2 when it makes no sense."""
    parser = Parser(__doc__)
    parser.add_argument(
        "files", metavar="FILE", type=a_file, nargs="*", help=f"Keras files, or checkpoints ({DEFAULT_INPUT})"
    )
    add = parser.add_argument_group("what is written").add_argument
    add("-o", "--output", metavar="OUT", help="the .pt, .h5 or .keras; a folder for several files")
    add("--force", action="store_true", help="replace files that convert.py did not write")
    add("-v", "--verbose", action="store_true", help="print the mapping, one row a tensor")
    group = parser.add_argument_group("what the files do not say")
    add_scaling(group, "the model")
    group.add_argument("--bn-eps", type=float, default=1e-3, help="epsilon of Keras weights alone (0.001)")
    add_key(group)
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
    try:
        arguments.jobs = jobs_of(arguments.files, arguments.output or "")
    except ValueError as error:
        parser.error(str(error))
    if arguments.rescaling and not all(job.is_back for job in arguments.jobs):
        parser.error("--rescaling is for checkpoints: a Keras file has its own, or none")
    return arguments


def jobs_of(files: list[Path], output: str) -> list[Job]:
    """Return what each file becomes. Raises ValueError with one line where `-o output` makes no sense."""
    bundled = beside_the_scripts(DEFAULT_INPUT)
    jobs = []
    for path in files or [bundled]:
        is_back = is_checkpoint(path)
        becomes = path.with_suffix(".h5" if is_back else ".pt")
        if path.absolute() == bundled.absolute():
            becomes = path.with_name("resnet8.pt")
        jobs.append(Job(path, becomes, is_back))
    if output:
        is_folder = Path(output).is_dir() or output.endswith(("/", os.sep))
        if len(jobs) > 1 and Path(output).suffix in (".pt", ".pth", *KERAS_SUFFIXES) and not is_folder:
            raise ValueError(f"-o {output}: several files need a folder")
        into = len(jobs) > 1 or is_folder
        jobs = [job._replace(output=Path(output, job.output.name) if into else Path(output)) for job in jobs]
    outputs, sources = [job.output for job in jobs], {os.path.realpath(job.path) for job in jobs}
    for path, output, is_back in jobs:
        if outputs.count(output) > 1:
            raise ValueError(f"two of the files would be written to {output}")
        if is_back != (output.suffix in KERAS_SUFFIXES):
            wanted = "a checkpoint becomes .h5 or .keras" if is_back else "that is a Keras file's"
            raise ValueError(f"-o {output}: {wanted} ({path})")
        if output.suffix.lower() in OTHER_SUFFIXES:
            raise ValueError(f"-o {output}: what is written is a PyTorch state_dict; call it .pt")
        if output.suffix == ".json":
            raise ValueError(f"-o {output}: the .json beside the checkpoint would be written over it")
        if sources & {os.path.realpath(output), os.path.realpath(json_of(output))}:
            kind = "a checkpoint" if any(job.is_back for job in jobs) else "a Keras file"
            raise ValueError(f"{output} and its .json would be written over {kind}: name another with -o")
    return jobs


if __name__ == "__main__":
    sys.exit(run(main))
