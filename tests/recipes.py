"""Run the recipes of RECIPES.md: `make recipes`.

    python -m tests.recipes [--data-dir DIR] [--checkpoint MODEL.pt] [--keras-file MODEL.h5] [RECIPE ...]

Each runs after the first lines of its chapter, each chapter in a process of its own, in a folder with
`checkpoints/resnet8.pt` (by default the bundled model, converted), the Keras file and `data`. Prints the
results beside the original's. Without --data-dir the 1,000 bundled images replace all others, and the
recipes' commands, which need the whole test set, are skipped.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from data import cifar10

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "RECIPES.md"
BUNDLED = ROOT / "checkpoints/resnet8_keras.h5"
ALONE = "Classify an image"  # without the first lines of its chapter
LARGE = {"ExecuTorch": "executorch"}  # packages that `make test` does not install
OTHER_CLASS = "from tests.other_classes import MLCommons as Resnet8v1EEMBC\n"  # utils/model.py of its recipe
SIZES = {"perf": 200, "calibration": 500}


class Recipe(NamedTuple):
    """A recipe and the first lines of its chapter."""

    chapter: str
    opening: str
    blocks: list[tuple[str, str]]  # ("python" or "sh", text), in order


def read_recipes() -> dict[str, Recipe]:
    """Return the recipes by their headings."""
    found = {}
    for chapter, text in read_chapters().items():
        opening, *parts = re.split(r"^### (.*)$", text, flags=re.MULTILINE)
        opening = "".join(text for _, text in blocks_of(opening))
        for name, part in zip(parts[::2], parts[1::2], strict=True):
            found[name] = Recipe(chapter, "" if name == ALONE else opening, blocks_of(part))
    return found


def read_chapters() -> dict[str, str]:
    """Return the chapters by their headings."""
    _, *parts = re.split(r"^## (.*)$", RECIPES.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Return the code and the commands in a part of RECIPES.md."""
    return re.findall(r"^```(python|sh)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_recipe(name: str, recipe: Recipe, data_dir: Path | None) -> dict:
    """Run a recipe in the current folder; return its results, or the error's traceback."""
    namespace: dict = {}
    output, start = io.StringIO(), cpu_seconds()
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(located(recipe.opening), "opening", "exec"), namespace)
            for language, text in recipe.blocks:
                if language == "python":
                    exec(compile(located(text), name, "exec"), namespace)
                elif data_dir:
                    run_commands(text, data_dir)
    except Exception:
        return {"error": traceback.format_exc(), "printed": output.getvalue()}
    found = {"cpu_seconds": cpu_seconds() - start, "printed": output.getvalue()}
    if "result" in namespace:
        original, result = namespace["original"], namespace["result"]
        logits = np.abs(result.log_probabilities - original.log_probabilities).max()
        pair = namespace["compare"](original, result)
        found |= {"accuracy": result.metrics["accuracy"], "logits": float(logits), **pair}
        found["original"] = original.metrics["accuracy"]
    return found


def located(code: str) -> str:
    """Return code with the repository's path; the folder has a checkpoint of its own."""
    code = code.replace("/path/to/this/repository/checkpoints", "checkpoints")
    return code.replace("/path/to/this/repository", str(ROOT))


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children."""
    return sum(os.times()[:4])


def run_commands(text: str, data_dir: Path) -> None:
    """Run the commands of a recipe and print their output."""
    for line in text.splitlines():
        print(f"$ {line}")
        _, script, *arguments = shlex.split(line)
        data = ["--data-dir", data_dir] if script == "evaluate.py" else []
        command = [sys.executable, ROOT / script, *arguments, *data]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout)
        if done.returncode:
            raise RuntimeError(f"{line}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


def prepare_folder(folder: Path, data_dir: Path | None, checkpoint: Path | None, keras_file: Path) -> None:
    """Put the checkpoint, the Keras file, the data and a photograph into a folder."""
    (folder / "checkpoints").mkdir()
    (folder / "data").mkdir()
    shutil.copy(keras_file, folder / "pretrainedResnet.h5")
    if not data_dir:
        shutil.copy(keras_file, folder / "model.h5")  # output of a recipe's command
    else:
        for found in data_dir.glob("cifar-10-batches-*"):
            (folder / "data" / found.name).symlink_to(found)
    if checkpoint:
        shutil.copy(checkpoint, folder / "checkpoints/resnet8.pt")
        shutil.copy(checkpoint.with_suffix(".json"), folder / "checkpoints/resnet8.json")
    else:
        command = ["convert.py", "--no-verify", "-o", folder / "checkpoints/resnet8.pt"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (folder / "utils").mkdir()
    (folder / "utils/model.py").write_text(OTHER_CLASS)
    from PIL import Image

    sample = cifar10.load_test(which="sample")
    Image.fromarray(sample.images[0].transpose(1, 2, 0)).save(folder / "photo.png")


def replace_images_by_the_sample() -> None:
    """Replace all other images by bundled ones."""
    sample = cifar10.load_test(which="sample")

    def part(_: Path | None = None, which: str = "auto", download: bool = False) -> cifar10.Dataset:
        count = SIZES.get(which, len(sample))
        chosen = slice(None, None, len(sample) // count)
        return replace(sample, images=sample.images[chosen], labels=sample.labels[chosen])

    cifar10.load_test = part
    cifar10.load_train = lambda *_, **__: (sample.images, sample.labels.astype(np.uint8))


def run_chapter(names: list[str], folder: Path, data_dir: Path | None) -> dict[str, dict]:
    """Run recipes of one chapter in this process, in a prepared folder."""
    recipes = read_recipes()
    sys.path[:0] = [str(ROOT), str(folder)]
    if not data_dir:
        replace_images_by_the_sample()
    os.chdir(folder)
    cifar10.DATA_DIR = folder / "data"
    return {name: run_recipe(name, recipes[name], data_dir) for name in names}


def run_in_processes(names: list[str], folder: Path, data_dir: Path | None) -> dict[str, dict]:
    """Run recipes, each chapter in a process of its own: TensorFlow and torchvision crash in one process."""
    recipes, results = read_recipes(), {}
    for chapter in dict.fromkeys(recipes[name].chapter for name in names):
        chosen = [name for name in names if recipes[name].chapter == chapter]
        code = (
            "import json, sys; from pathlib import Path; from tests.recipes import run_chapter\n"
            "names, folder, data_dir, answer = json.loads(sys.argv[1])\n"
            "results = run_chapter(names, Path(folder), data_dir and Path(data_dir))\n"
            "Path(answer).write_text(json.dumps(results))"
        )
        answer = folder / "results.json"
        arguments = json.dumps([chosen, str(folder), data_dir and str(data_dir), str(answer)])
        command = [sys.executable, "-W", "ignore", "-c", code, arguments]
        log = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True).stderr
        if not answer.is_file():
            raise RuntimeError(f"the process of '{chapter}' ended\n{log}")
        results |= json.loads(answer.read_text())
        answer.unlink()
    return results


def results_table(results: dict[str, dict]) -> Table:
    """Return the table of RECIPES.md."""
    table = Table("recipe", box=None, show_edge=False)
    for heading in ("accuracy", "same class", "McNemar's p", "largest difference\nof a logit", "CPU seconds"):
        table.add_column(heading, justify="right")
    for name, found in results.items():
        seconds = f"{found.get('cpu_seconds', 0):.0f}"
        if "accuracy" in found:
            p = found["mcnemar_p"]
            figures = [f"{found['accuracy']:.2%}", f"{found['same_prediction']:,}", f"{p:.2g}"]
            table.add_row(name, *figures, f"{found['logits']:.1e}", seconds)
        else:
            last = found.get("error", found["printed"]).strip().rpartition("\n")[2]
            table.add_row(name, last, "", "", "", seconds)
    return table


def main() -> int:
    """Run the recipes; exit with status 1 if one fails."""
    recipes = read_recipes()
    parser = argparse.ArgumentParser(prog="python -m tests.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="RECIPE", nargs="*", help=", ".join(recipes))
    parser.add_argument("--data-dir", type=Path, help="folder of the test and training sets")
    parser.add_argument("--checkpoint", type=Path, help="a .pt with its .json (the bundled model's)")
    parser.add_argument("--keras-file", type=Path, default=BUNDLED, help="for TensorFlow Lite (bundled)")
    parser.add_argument("--folder", type=Path, help="run in this empty folder and keep the files written")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    if unknown := set(options.names) - set(recipes):
        parser.error(f"no recipe called {min(unknown)}")

    data_dir, checkpoint = (path and path.resolve() for path in (options.data_dir, options.checkpoint))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).resolve()
        prepare_folder(folder, data_dir, checkpoint, options.keras_file)
        results = run_in_processes(options.names or list(recipes), folder, data_dir)
    if options.json:
        options.json.write_text(json.dumps(results))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(results_table(results))
    for name, found in results.items():
        if "error" in found:
            print(f"\n{name}:\n{found['error']}", file=sys.stderr)
    return int(any("error" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
