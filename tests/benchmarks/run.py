"""How fast this is, side by side with the alternatives, in one run: `make bench`.

    python -m tests.benchmarks.run [--keras FILE] [--data-dir DIR]

measures whole commands, inference, and how their costs grow, each in rounds in which everything takes its
turn, and takes medians over the rounds. Prints tables, and writes them with the machine's name to
results/benchmark.md, and the curves to results/benchmark.png. On the CPU; about 6 minutes on 2 cores, which
should have nothing else to do.
"""

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from data.cifar10 import DataError, load_test
from data.files import write_files
from models.keras.worker import ROOT, Worker, WorkerError
from tests.benchmarks.contenders import CONTENDERS

BUNDLED = ROOT / "checkpoints" / "resnet8_keras.h5"
OURS, UNFOLDED, PLAIN, KERAS, _, ONNX_RUNTIME, ONNX_SESSIONS, _, LIMIT = CONTENDERS
ENOUGH = 30  # seconds of running, after which a contender sits out the other rounds
MODULE = "tests.benchmarks.contenders"
PACKAGES = ("torch", "tensorflow", "keras", "onnxruntime", "tf2onnx", "onnx2torch", "numpy")
NOTES = f"""\
Medians over rounds in which everything takes its turn; whoever has run for {ENOUGH} s sits out the others.
Each contender has a process of its own, with its default threads; several batch sizes were tried first for
Keras and ONNX Runtime, and the fastest taken. The limit is the time that as many multiply-accumulates take as
one large float32 matrix product (1,024 x 1,024) on all cores.
`evaluate.py` normalizes the uint8 images in its own time, all others find float32 images in their layout.
'Peak' is a process's largest resident memory, for a contender with the images in it (as uint8, and as float32
where it takes that); a whole command counts as its largest process, which is Keras where it takes part."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    images: int  # for the contenders
    rounds: int  # of the contenders
    slow_rounds: int  # of whole commands, and of the curves
    image_counts: tuple[int, ...]
    file_counts: tuple[int, ...]  # converted in one call, not verified; the first is 1
    verified_counts: tuple[int, ...]  # and verified; the first is 1
    evaluated_counts: tuple[int, ...]  # checkpoints evaluated in one call; the first is 1


FULL = Size(10_000, 7, 3, (1_000, 5_000, 10_000, 20_000), (1, 10, 50, 100), (1, 5), (1, 10, 50))
QUICK = Size(1_000, 1, 1, (500, 1_000), (1, 5), (1, 2), (1, 2, 3))


# --- 1. Whole commands -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    memory: float  # the largest process's peak resident memory, in MB


def python(*arguments: object) -> Cost:
    """Run Python with `arguments`, in the repository. Raises RuntimeError when it fails.

    The memory is `ru_maxrss`, of the command and of the processes that it waited for, and begins with the
    peak of this process: torch must not be imported here.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"{' '.join(map(str, arguments))[:200]}: {last}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return Cost(seconds, usage.ru_maxrss * unit / 1e6)


def middle(costs: list[Cost]) -> Cost:
    """Return the medians."""
    return Cost(median(cost.seconds for cost in costs), median(cost.memory for cost in costs))


TORCH, TORCH_H5PY = 'python -c "import torch"', 'python -c "import torch, h5py"'
IMPORT_KERAS = 'python -c "import keras"'
CONVERT, VERIFY = "convert.py --no-verify", "convert.py"
FIRST, REPEATED = "evaluate.py, the first time", "evaluate.py, repeated"
MANY = "evaluate.py --no-keras, without the inference"


def measure_commands(
    keras_file: Path, data: list, folder: Path, rounds: int
) -> tuple[dict[str, Cost], float]:
    """Return the cost of each command, and the seconds of inference in the repeated `evaluate.py`."""
    checkpoint = folder / "resnet8.pt"
    evaluate = ["evaluate.py", checkpoint, *data, "--output", folder]
    commands = {
        TORCH: ["-c", "import torch"],
        TORCH_H5PY: ["-c", "import torch, h5py"],
        IMPORT_KERAS: ["-c", "import keras"],
        CONVERT: ["convert.py", "--no-verify", keras_file, "-o", checkpoint],
        VERIFY: ["convert.py", keras_file, "-o", checkpoint],
        FIRST: evaluate,
        REPEATED: evaluate,
    }
    costs, inference = {name: [] for name in commands}, []
    for _ in range(rounds):
        for cache in folder.glob("resnet8.keras*.npz"):
            cache.unlink()
        for name, arguments in commands.items():
            costs[name].append(python(*arguments))
        inference.append(json.loads((folder / "metrics.json").read_text())["throughput"]["seconds"])
    return {name: middle(found) for name, found in costs.items()}, median(inference)


def measure_files(
    keras_file: Path, folder: Path, counts: tuple[int, ...], rounds: int, *options: str
) -> dict:
    """Return the cost of converting so many files in one call, by their number."""
    files = [folder / f"{index}.h5" for index in range(max(counts))]
    for file in files:
        shutil.copy(keras_file, file)
    costs = {count: [] for count in counts}
    for _ in range(rounds):
        for count, found in costs.items():
            found.append(python("convert.py", *options, *files[:count], "-o", folder))
    return {count: middle(found) for count, found in costs.items()}


def measure_evaluated(folder: Path, counts: tuple[int, ...], rounds: int) -> dict[int, Cost]:
    """Return the cost of evaluating so many checkpoints in one call, without the inference, by number."""
    files = [folder / f"run{index}.pt" for index in range(max(counts))]
    for file in files:
        shutil.copy(folder / "resnet8.pt", file)
        shutil.copy(folder / "resnet8.json", file.with_suffix(".json"))
    costs = {count: [] for count in counts}
    for _ in range(rounds):
        for count, found in costs.items():
            first, *others = files[:count]
            compared = ["--compare", *others] if others else []
            options = ["--data", "sample", "--no-keras", "--output", folder]
            cost = python("evaluate.py", first, *compared, *options)
            metrics = json.loads((folder / "metrics.json").read_text())
            inference = sum(each["throughput"]["seconds"] for each in (metrics, *metrics["compared"]))
            found.append(replace(cost, seconds=cost.seconds - inference))
    return {count: middle(found) for count, found in costs.items()}


# --- 2. Inference ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a contender took."""

    seconds: float
    batch_size: int
    imports: float  # peak memory after its imports, in MB
    memory: float  # at the end, with the images, once as uint8 and once as it takes them
    classes: np.ndarray  # (N,) predicted


def race(entries: dict[object, tuple[str, np.ndarray]], job: dict, rounds: int) -> dict[object, Result | str]:
    """Let contenders take turns; return what each took, or in one line why it cannot run here.

    `entries` has a contender and its (N, C, H, W) uint8 images for each key.
    """
    workers = {key: Worker(MODULE) for key in entries}
    answers: dict[object, dict] = {key: {} for key in entries}  # by the names of Result
    seconds: dict[object, list[float]] = {key: [] for key in entries}
    failures: dict[object, str] = {}

    def ask(key: object, request: dict, arrays: dict | None = None) -> None:
        if key not in failures:
            try:
                answer, answered = workers[key].ask(request, arrays)
                answers[key].update(answer, **answered)
            except WorkerError as error:
                failures[key] = str(error)

    try:
        for key, (name, images) in entries.items():
            ask(key, {"do": "start", "name": name})
            ask(key, {"do": "load", **job}, {"images": images})
        for _ in range(rounds):
            for key in entries:
                if sum(seconds[key]) < ENOUGH:
                    ask(key, {"do": "run"})
                    seconds[key].append(answers[key].get("seconds", 0.0))
    finally:
        for worker in workers.values():
            worker.close()
    return {
        key: failures.get(key) or Result(**{**answers[key], "seconds": median(seconds[key])})
        for key in entries
    }


def export_onnx(keras_file: Path, onnx_file: Path) -> None:
    """Convert with tf2onnx, in a process of its own. A failure shows in the contenders that need the file."""
    with Worker(MODULE) as worker:
        try:
            worker.ask({"do": "export", "keras_file": str(keras_file), "onnx_file": str(onnx_file)})
        except WorkerError as error:
            print(f"note: no ONNX file: {error}", flush=True)


# --- 3. What is printed and written ----------------------------------------------------------------------


def commands_table(costs: dict[str, Cost]) -> Table:
    """Return the table of the whole commands."""
    table = Table("whole command", title="Whole commands, imports included")
    references = {"of the import of\ntorch and h5py": TORCH_H5PY, "of the import of\nKeras": IMPORT_KERAS}
    for name in ("seconds", *references, "peak memory,\nMB"):
        table.add_column(name, justify="right")
    for name, cost in costs.items():
        ratios = [f"{cost.seconds / costs[reference].seconds:.2f} x" for reference in references.values()]
        table.add_row(name, f"{cost.seconds:.2f}", *ratios, f"{cost.memory:,.0f}")
    return table


def inference_table(results: dict[str, Result | str], images: int) -> Table:
    """Return the table of the contenders."""
    table = Table("inference", title=f"Inference, {images:,} images in memory")
    headings = (
        "batch\nsize",
        "seconds",
        "images\nper second",
        "time,\nours = 1",
        "time,\nlimit = 1",
        "MB after\nimports",
        "peak\nMB",
        "same class\nas ours",
    )
    for name in headings:
        table.add_column(name, justify="right")
    ours, limit = results[OURS], results.get(LIMIT)
    for name, result in results.items():
        if isinstance(result, str):
            table.add_row(name, *[""] * (len(headings) - 1), f"cannot run here: {result}")
            continue
        is_network = name != LIMIT
        of_limit = f"{result.seconds / limit.seconds:.2f}" if isinstance(limit, Result) else ""
        table.add_row(
            name,
            str(result.batch_size) if is_network else "",
            f"{result.seconds:.3f}",
            f"{images / result.seconds:,.0f}",
            f"{result.seconds / ours.seconds:.2f}",
            of_limit,
            f"{result.imports:,.0f}",
            f"{result.memory:,.0f}",
            f"{int((result.classes == ours.classes).sum()):,}" if is_network else "",
        )
    return table


def growth_tables(
    images: dict[int, Result], files: dict[int, Cost], verified: dict[int, Cost], evaluated: dict[int, Cost]
) -> list[Table]:
    """Return the tables of the curves."""
    of_images = Table("images", title="evaluate.py's inference, by the number of images")
    for name in ("seconds", "microseconds\nan image", "peak memory, MB"):
        of_images.add_column(name, justify="right")
    for count, result in images.items():
        each = 1e6 * result.seconds / count
        of_images.add_row(f"{count:,}", f"{result.seconds:.3f}", f"{each:.1f}", f"{result.memory:,.0f}")
    tables = [of_images]
    for command, costs in ((CONVERT, files), (VERIFY, verified), (MANY, evaluated)):
        table = Table("files", title=f"{command}, by the number of files in one call")
        for name in ("seconds", "milliseconds a file\nbeyond the first", "peak memory, MB"):
            table.add_column(name, justify="right")
        further = per_further_file(costs)
        for count, cost in costs.items():
            each = f"{further[count]:,.0f}" if count in further else ""
            table.add_row(f"{count:,}", f"{cost.seconds:.2f}", each, f"{cost.memory:,.0f}")
        tables.append(table)
    return tables


def per_further_file(files: dict[int, Cost]) -> dict[int, float]:
    """Return the milliseconds that each file beyond the first takes: the first pays for the imports."""
    return {n: 1e3 * (cost.seconds - files[1].seconds) / (n - 1) for n, cost in files.items() if n > 1}


def targets_table(
    costs: dict[str, Cost],
    inference: float,
    results: dict[str, Result | str],
    files: dict[int, Cost],
    verified: dict[int, Cost],
    evaluated: dict[int, Cost],
) -> Table:
    """Return the table of the targets: what was asked for, what was measured, and whether that is enough."""
    table = Table("target", "at least", "at most", "measured", "reached", title="Targets")

    def row(what: str, measured: float, form: str, least: float = -np.inf, most: float = np.inf) -> None:
        bounds = [form.format(bound) if np.isfinite(bound) else "" for bound in (least, most)]
        table.add_row(what, *bounds, form.format(measured), "yes" if least <= measured <= most else "no")

    def compare(name: str, **bounds: float) -> None:
        if isinstance(results[name], str):
            table.add_row(f"{name}: time, ours = 1", "", "", "cannot run here", "")
        else:
            row(f"{name}: time, ours = 1", results[name].seconds / results[OURS].seconds, "{:.2f}", **bounds)

    runtimes = [results[n] for n in (ONNX_RUNTIME, ONNX_SESSIONS) if isinstance(results[n], Result)]
    if runtimes:
        best = min(result.seconds for result in runtimes)
        row(f"{OURS}: time, ONNX Runtime at its best = 1", results[OURS].seconds / best, "{:.2f}", most=1.05)
    compare(KERAS)
    compare(PLAIN)
    keras = costs[IMPORT_KERAS].seconds
    row(f"{VERIFY}, of the import of Keras", costs[VERIFY].seconds / keras, "{:.2f} x", most=1.5)
    row(f"{VERIFY}, its larger process", costs[VERIFY].memory, "{:,.0f} MB", most=1300)
    further = 1e-3 * max(per_further_file(verified).values())
    row(f"{VERIFY}, a further file", further, "{:.2f} s", most=2)
    row(f"{FIRST}, of the import of Keras", costs[FIRST].seconds / keras, "{:.2f} x", most=1.5)
    floor, repeated = costs[TORCH_H5PY], costs[REPEATED]
    row(
        f"{CONVERT}, of the import of torch and h5py",
        costs[CONVERT].seconds / floor.seconds,
        "{:.2f} x",
        most=1.25,
    )
    beyond = repeated.seconds - floor.seconds - inference
    row(f"{REPEATED}, beyond that import and {inference:.2f} s of inference", beyond, "{:.2f} s", most=0.5)
    row(f"{CONVERT}, memory beyond that import", costs[CONVERT].memory - floor.memory, "{:.0f} MB", most=60)
    beyond = repeated.memory - costs[TORCH].memory
    row(f"{REPEATED}, memory beyond the import of torch", beyond, "{:.0f} MB", most=250)
    noise = 5  # MB by which the same command differs from run to run
    several = {count: cost for count, cost in evaluated.items() if count > 1}  # with a table of pairs
    for command, found in ((CONVERT, files), (MANY, several)):
        first, last = min(found), max(found)
        growth = found[last].memory - found[first].memory
        row(f"{command}, memory that {last - first} more files add", growth, "{:.0f} MB", most=noise)
    return table


def draw_curves(file: io.BufferedIOBase, images: dict[int, Result], files: dict[int, Cost]) -> None:
    """Write a PNG of the two curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    left.plot(list(images), [1e6 * result.seconds / n for n, result in images.items()], "o-", color="#0072B2")
    left.set(title="evaluate.py's inference", xlabel="images", ylabel="microseconds an image")
    left.xaxis.set_major_formatter("{x:,.0f}")
    further = per_further_file(files)
    right.plot(list(further), list(further.values()), "o-", color="#0072B2")
    right.set(title="convert.py --no-verify", xlabel="files in one call", ylabel="ms a file beyond the first")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=130)


def machine() -> str:
    """Return what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    installed = {distribution.name: distribution.version for distribution in distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    software = f"{system}; Python {platform.python_version()}, {versions}"
    return f"{cpu}, {os.cpu_count()} cores, {software}; {date.today()}."


def as_markdown(table: Table) -> str:
    """Return a table as Markdown."""
    for column in table.columns:
        column.header = column.header.replace("\n", " ")
    table.box, title, table.title = box.MARKDOWN, table.title, None
    console = Console(file=io.StringIO(), width=300, no_color=True)
    console.print(table)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
    return f"**{title}**\n\n" + "\n".join(lines)


# --- 4. The command --------------------------------------------------------------------------------------


def measure(keras_file: Path, data_dir: Path, output: Path, size: Size) -> None:
    """Measure everything, print the tables and write them to `output`.

    Raises DataError, OSError, or RuntimeError with one line when a command of ours fails.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # all that is started here runs on the CPU
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # the commands first: while this process is small (see `python`)
        console.print("whole commands ...")
        dataset = load_test(data_dir)
        data = ["--data-dir", data_dir, "--data", "full"]
        if dataset.is_sample or size.images == QUICK.images:
            data = ["--data", "sample"]
        name, keras_file = keras_file.name, shutil.copy(keras_file, folder / "resnet8.h5")  # for its answers
        costs, inference = measure_commands(keras_file, data, folder, size.slow_rounds)
        files = measure_files(keras_file, folder, size.file_counts, size.slow_rounds, "--no-verify")
        verified = measure_files(keras_file, folder, size.verified_counts, 1)
        evaluated = measure_evaluated(folder, size.evaluated_counts, size.slow_rounds)

        console.print("inference ...")
        metadata = json.loads((folder / "resnet8.json").read_text())
        inputs = {"pytorch": metadata["input"], "keras": metadata["source"]["input"]}
        job = {
            "pt": str(folder / "resnet8.pt"),
            "keras": str(keras_file),
            "onnx": str(folder / "resnet8.onnx"),
            "scaling": {name: (fed["mean"], fed["std"]) for name, fed in inputs.items()},
        }
        export_onnx(keras_file, folder / "resnet8.onnx")

        def some(count: int) -> np.ndarray:
            return np.resize(dataset.images, (count, *dataset.images.shape[1:]))  # repeated as need be

        results = race({name: (name, some(size.images)) for name in CONTENDERS}, job, size.rounds)
        if isinstance(results[OURS], str):
            raise RuntimeError(f"{OURS}: {results[OURS]}")
        images = race({count: (OURS, some(count)) for count in size.image_counts}, job, size.slow_rounds)

    tables = [
        inference_table(results, size.images),
        commands_table(costs),
        targets_table(costs, inference, results, files, verified, evaluated),
        *growth_tables(images, files, verified, evaluated),
    ]
    head = f"{machine()} Model: {name}; data: {dataset.name}"
    console.print(head)
    for table in tables:
        console.print("", table)
    parts = ["# Benchmark", head, NOTES, *map(as_markdown, tables), "![How cost grows](benchmark.png)"]
    writers = {
        output / "benchmark.md": lambda file: file.write(("\n\n".join(parts) + "\n").encode()),
        output / "benchmark.png": lambda file: draw_curves(file, images, files),
    }
    write_files(writers)
    console.print(f"\nwrote {' and '.join(map(str, writers))}")


def parse_arguments() -> argparse.Namespace:
    """Return the command line; exits with status 2 when it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--keras", metavar="FILE", type=Path, default=BUNDLED, help="a Keras ResNet8 (the bundled one)")
    add("--data-dir", metavar="DIR", type=Path, default=ROOT / "data", help="where CIFAR-10 is (data)")
    add("--output", metavar="DIR", type=Path, default=Path("results"), help="for benchmark.md and .png")
    add("--rounds", metavar="N", type=int, help=f"of the inference ({FULL.rounds}); all others at most 3")
    add("--quick", action="store_true", help="1,000 images, 1 round: does it work?")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not options.keras.is_file():
        parser.error(f"--keras: there is no {options.keras}")
    return options


def main() -> int:
    """Measure, print and write; return the exit status."""
    options = parse_arguments()
    size = QUICK if options.quick else FULL
    rounds = options.rounds or size.rounds
    size = replace(size, rounds=rounds, slow_rounds=min(rounds, size.slow_rounds))
    try:
        measure(options.keras.resolve(), options.data_dir.resolve(), options.output, size)
    except (DataError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
