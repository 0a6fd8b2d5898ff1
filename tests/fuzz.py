"""Damages Keras files in every way and sees to it that each is converted, or refused in one line.

    python -m tests.fuzz [--kind KIND] [--count N] [--seed S] [--files DIR] [--keep DIR]

Other kinds of files are damaged by `tests/fuzz_others.py`, and read or refused. Keras files:
The first DIR is what `tests.keras_files.writer` has written (it is called if there is none); how files are
damaged stands in `tests/keras_files/damage.py`. Prints what came of them; exits 1 if anything else than those
two outcomes did.
"""

import argparse
import contextlib
import io
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from convert import convert_file
from models.common.errors import KerasFileError, VerificationError
from models.keras.file import start_reader
from models.keras.worker import Worker
from tests.keras_files.damage import damage
from tests.keras_files.networks import WRITERS

# torch, and what imports it, is imported where it is needed: `--help` needs none.

SOURCES = """
    keras/plain.h5 keras/plain.keras keras/plain.weights.h5 keras/nested_deep.h5 keras/compiled.keras
    tf_keras/plain.h5 tf_keras/plain.keras tf_keras/plain.weights.h5 tf_keras/plain.legacy.h5
    tf_keras/nested_stages.keras tf_keras/normalization_adapted.h5 tf_keras/compiled.h5
""".split()
KINDS = ("keras", "pt", "json", "npz", "cifar", "safetensors", "onnx", "tflite", "pt2")
SLOW = 30  # seconds; no file comes near it unless something hangs


def outcome(path: Path, folder: Path, reader: Worker) -> str:
    """Convert a file into `folder`; return "converted", or the message with which it was refused.

    Raises AssertionError when the result is no whole one, or the message no single line; anything else that
    it raises is not what `convert_file` promises.
    """
    import torch

    from models.resnet8 import ResNet8

    output = folder / "model.pt"
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_file(path, output, reader)
    except (KerasFileError, VerificationError) as error:
        result = str(error)
        assert len(result.splitlines()) == 1 and len(result) < 2000, f"not one line: {result!r}"
        assert not list(folder.iterdir()), f"left {list(folder.iterdir())}"
    else:
        result = "converted"
        assert {file.name for file in folder.iterdir()} == {"model.pt", "model.json"}
        state = ResNet8.from_checkpoint(output).state_dict()
        assert all(torch.isfinite(tensor).all() for tensor in state.values()), "not finite"
        for file in folder.iterdir():
            file.unlink()
    seconds = time.monotonic() - started
    assert seconds < SLOW, f"took {seconds:.0f} s"
    return result


def run(files: Path, count: int, seed: int, keep: Path | None = None) -> tuple[Counter, list[str]]:
    """Convert `count` damaged files; return how often each (kind, outcome) came up, and what went wrong.

    Outcomes are "converted", "refused", and "crashed the reader", which is a refusal too.
    """
    contents = {name: (files / name).read_bytes() for name in SOURCES}
    counts, failures = Counter(), []
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, start_reader() as reader:
        path, outputs = Path(folder) / "model.h5", Path(folder) / "outputs"
        outputs.mkdir()
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            name = SOURCES[number % len(SOURCES)]
            kind, content = damage(contents[name], rng)
            path.write_bytes(content)
            try:
                result = outcome(path, outputs, reader)
            except Exception as error:
                failures.append(f"{seed} {number} {name} {kind}: {type(error).__name__}: {error}")
                result = "failed"
                for file in outputs.iterdir():
                    file.unlink()
            message = result.removeprefix(f"{path}: ")
            short = result if result in ("converted", "failed") else "refused"
            if short == "refused" and reader.process.poll() is not None:
                short = "crashed the reader"
            if keep and short in ("failed", "crashed the reader"):
                (keep / f"{seed}-{number}").write_bytes(content)
            if keep:
                message = repr(message)[1:-1]
                with (keep / "messages.txt").open("a") as log:
                    log.write(f"{seed}-{number}\t{name}\t{kind}\t{message}\n")
            counts[kind, short] += 1
    return counts, failures


def main() -> int:
    """Run it and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="keras")
    parser.add_argument("--files", type=Path, help="a folder that tests.keras_files.writer has written")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="keep odd files here, and all messages")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.files or Path(folder)
        if not arguments.files and arguments.kind == "keras":
            for writer in WRITERS:
                subprocess.run(
                    [sys.executable, "-m", "tests.keras_files.writer", files / writer, writer], check=True
                )
        started = time.monotonic()
        if arguments.kind == "keras":
            counts, failures = run(files, arguments.count, arguments.seed, arguments.keep)
        else:
            from tests import fuzz_others

            counts, failures = fuzz_others.run(arguments.kind, arguments.count, arguments.seed)
    outcomes = ("converted", "refused", "crashed the reader", "failed")
    print(f"{'damage':28}" + "".join(f"{name:>20}" for name in outcomes))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:28}" + "".join(f"{counts[kind, name]:20,}" for name in outcomes))
    totals = [sum(number for (_, name), number in counts.items() if name == wanted) for wanted in outcomes]
    print(f"{'total':28}" + "".join(f"{number:20,}" for number in totals))
    print(f"{arguments.count:,} files, seed {arguments.seed}, {time.monotonic() - started:.0f} s")
    print(*failures, sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
