"""Measure inference and whole commands beside the alternatives, in one run: `make bench`.

    python -m tests.benchmarks.run [--keras FILE] [--data-dir DIR] [--rounds N] [--quick]

Prints the machine and Markdown tables of medians. Every command and contender runs once in each round, in a
process of its own, on the CPU; nothing else should run.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

import numpy as np

from data.cifar10 import DataError, load_test
from models.common.cli import positive_int, print_error
from models.common.job import ROOT, Job, JobError
from tests.benchmarks.contenders import CONTENDERS

BUNDLED = ROOT / "checkpoints" / "resnet8_keras.h5"
OURS, *_, LIMIT = CONTENDERS
MODULE = "tests.benchmarks.contenders"
PACKAGES = ("torch", "tensorflow", "keras", "onnxruntime", "tf2onnx", "onnx2torch", "numpy")
TORCH_H5PY, IMPORT_KERAS = 'python -c "import torch, h5py"', 'python -c "import keras"'
IMAGES, FILE_COUNTS = 10_000, (1, 10, 50)
QUICK_IMAGES, QUICK_FILE_COUNTS = 1_000, (1, 2)


def python(*arguments):
    """Run Python in the repository; return the seconds and its largest process's peak memory in MB.

    Raises RuntimeError if it fails. The memory, `ru_maxrss`, begins with the peak of this process: torch must
    not be imported here.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"{' '.join(command[1:])[:200]}: {last}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return seconds, usage.ru_maxrss * unit / 1e6


def medians(costs):
    """Return the median of each of the values in which the costs, tuples of numbers, agree."""
    return tuple(map(median, zip(*costs, strict=True)))


def inference_seconds(results):
    """Return the seconds of inference of all models in evaluate.py's results."""
    metrics = json.loads((results / "metrics.json").read_text())
    return sum(each["throughput"]["seconds"] for each in (metrics, *metrics.get("compared", ())))


def measure_commands(keras_file, data, folder, rounds):
    """Return seconds and memory by command; `resnet8.pt` and its JSON stay in `folder`."""
    checkpoint, results = folder / "resnet8.pt", folder / "results"
    evaluate = ["evaluate.py", checkpoint, *data, "--output", results]
    commands = {
        'python -c "import torch"': ["-c", "import torch"],
        TORCH_H5PY: ["-c", "import torch, h5py"],
        IMPORT_KERAS: ["-c", "import keras"],
        "convert.py --no-verify": ["convert.py", "--no-verify", keras_file, "-o", checkpoint],
        "convert.py": ["convert.py", keras_file, "-o", checkpoint],
        "convert.py, back to Keras": ["convert.py", checkpoint, "-o", folder / "back.h5"],
        "evaluate.py, the first time": evaluate,
        "evaluate.py, repeated": evaluate,
    }
    costs, inference = {name: [] for name in commands}, []
    for _ in range(rounds):
        for cache in folder.glob("*.npz"):
            cache.unlink()
        for name, arguments in commands.items():
            costs[name].append(python(*arguments))
        inference.append(inference_seconds(results))
    return {name: medians(each) for name, each in costs.items()}, median(inference)


def measure_files(checkpoint, counts, rounds):
    """Return seconds without inference, and memory, of one evaluate.py by its number of files."""
    files, results = [], checkpoint.with_name("results")
    for index in range(max(counts)):
        files.append(checkpoint.with_name(f"copy{index}.pt"))
        for suffix in (".pt", ".json"):
            shutil.copy(checkpoint.with_suffix(suffix), files[-1].with_suffix(suffix))
    costs = {count: [] for count in counts}
    for _ in range(rounds):
        for count, each in costs.items():
            options = ["--data", "sample", "--no-keras", "--output", results]
            seconds, memory = python("evaluate.py", *files[:count], *options)
            each.append((seconds - inference_seconds(results), memory))
    return {count: medians(each) for count, each in costs.items()}


def race(names, images, request, rounds):
    """Run contenders in turns on (N, C, H, W) uint8 images.

    Returns the results of those that can run here, with the median of the seconds, and one line for each of
    the others.
    """
    results, failures = {name: [] for name in names}, {}
    for _ in range(rounds):
        for name in names:
            if name not in failures:
                try:
                    answer, arrays = Job(MODULE).run({"name": name, **request}, {"images": images})
                    results[name].append({**answer, **arrays})
                except JobError as error:
                    failures[name] = str(error)
    finished = {name: each for name, each in results.items() if name not in failures}
    seconds = {name: median(one["seconds"] for one in each) for name, each in finished.items()}
    return {name: {**each[0], "seconds": seconds[name]} for name, each in finished.items()}, failures


def markdown(title, headings, rows):
    """Return a Markdown table; all columns but the first are numbers."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(first, *others):
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        return f"| {' | '.join([first.ljust(widths[0]), *cells])} |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"\n**{title}**\n", line(*headings), rule, *(line(*row) for row in rows)])


def commands_table(costs):
    bases = costs[TORCH_H5PY][0], costs[IMPORT_KERAS][0]
    rows = [
        [name, f"{seconds:.2f}", *(f"{seconds / base:.2f} x" for base in bases), f"{memory:,.0f}"]
        for name, (seconds, memory) in costs.items()
    ]
    headings = ["seconds", "of the import of torch and h5py", "of the import of Keras", "peak memory, MB"]
    return markdown("Whole commands, imports included", ["whole command", *headings], rows)


def files_table(costs):
    further = per_further_file(costs)
    rows = [[str(n), f"{cost[0]:.2f}", further.get(n, ""), f"{cost[1]:,.0f}"] for n, cost in costs.items()]
    title = "evaluate.py --no-keras, without the inference, by the number of files in one call"
    headings = ["files", "seconds", "milliseconds a file beyond the first", "peak memory, MB"]
    return markdown(title, headings, rows)


def per_further_file(costs):
    """Return the milliseconds of each file beyond the first, which pays for the imports."""
    first = costs[1][0]
    return {n: f"{1e3 * (cost[0] - first) / (n - 1):,.0f}" for n, cost in costs.items() if n > 1}


def inference_table(results, images):
    headings = ["batch size", "seconds", "images per second", "time, ours = 1", "time, limit = 1"]
    headings += ["MB after imports", "peak MB", "same class as ours"]
    ours, rows = results[OURS], []
    for name, each in results.items():
        row = [f"{each['seconds']:.3f}", f"{images / each['seconds']:,.0f}"]
        bases = ours["seconds"], results[LIMIT]["seconds"]
        row += [f"{each['seconds'] / base:.2f}" for base in bases]
        row += [f"{each[memory]:,.0f}" for memory in ("imports", "memory")]
        same = f"{int((each['classes'] == ours['classes']).sum()):,}"
        rows.append([name, "", *row, ""] if name == LIMIT else [name, str(each["batch_size"]), *row, same])
    return markdown(f"Inference, {images:,} images in memory", ["inference", *headings], rows)


def machine():
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    versions = {distribution.name: distribution.version for distribution in distributions()}
    versions = {"Python": platform.python_version()} | {n: versions[n] for n in PACKAGES if n in versions}
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{cpu}, {os.cpu_count()} cores; {platform.system()} {platform.release()}; {software}; {date.today()}"
    )


def measure(keras_file, data_dir, rounds, quick):
    """Measure and print everything. Raises DataError, OSError, or RuntimeError for a failing command."""
    os.environ["CUDA_VISIBLE_DEVICES"], os.environ["TF_CPP_MIN_LOG_LEVEL"] = "-1", "2"
    count, file_counts = (QUICK_IMAGES, QUICK_FILE_COUNTS) if quick else (IMAGES, FILE_COUNTS)
    dataset = load_test(data_dir, "sample" if quick else "auto")
    print(f"{machine()}; model {keras_file.name}; {dataset.name}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = ["--data", dataset.part or "full", *(["--data-dir", data_dir] if data_dir else [])]
        keras_file = shutil.copy(keras_file, folder / "resnet8.h5")  # the cache of predictions is beside it
        costs, inference = measure_commands(keras_file, data, folder, rounds)
        print(commands_table(costs), f"\n\nThe repeated evaluate.py has {inference:.2f} s of inference.")
        checkpoint = folder / "resnet8.pt"
        print(files_table(measure_files(checkpoint, file_counts, rounds)), flush=True)

        paths = {"pt": str(checkpoint), "keras": str(keras_file), "onnx": str(folder / "resnet8.onnx")}
        paths |= {"tflite": str(folder / "int8.tflite"), "int8": str(folder / "int8.pt")}
        try:
            Job(MODULE).run({"keras_file": paths["keras"], "onnx_file": paths["onnx"]}, {})
        except JobError as error:
            print(f"no ONNX file: {error}", file=sys.stderr)
        try:
            request = {"keras_file": paths["keras"], "tflite_file": paths["tflite"]}
            Job(MODULE).run(request, {"images": dataset.images[:100]})
            python("convert.py", paths["tflite"], "-o", paths["int8"])
        except (JobError, RuntimeError) as error:
            print(f"no int8 file: {error}", file=sys.stderr)
        metadata = json.loads(checkpoint.with_suffix(".json").read_text())
        inputs = {"pytorch": metadata["input"], "keras": metadata["source"]["input"]}
        inputs = {name: {key: each[key] for key in ("mean", "std")} for name, each in inputs.items()}
        images = np.resize(dataset.images, (count, *dataset.images.shape[1:]))  # repeated if too few
        results, failures = race(CONTENDERS, images, {"normalization": inputs, **paths}, rounds)
    for name, reason in failures.items():
        print(f"{name} cannot run here: {reason}", file=sys.stderr)
    if not {OURS, LIMIT} <= set(results):
        raise RuntimeError("no inference to compare with")
    print(inference_table(results, count))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--keras", metavar="FILE", type=Path, default=BUNDLED, help="Keras ResNet8 (the bundled one)")
    add("--data-dir", metavar="DIR", type=Path, help="folder of CIFAR-10 (data)")
    add("--rounds", metavar="N", type=positive_int, default=3, help="rounds (3)")
    add("--quick", action="store_true", help="1,000 images and few files, to test the benchmark")
    options = parser.parse_args()
    try:
        data_dir = options.data_dir and options.data_dir.resolve()
        measure(options.keras.resolve(), data_dir, options.rounds, options.quick)
    except (DataError, OSError, RuntimeError) as error:
        print_error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
