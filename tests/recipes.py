"""Runs the recipes of README's section 'From here', as they stand there: `make recipes`.

    python -m tests.recipes [--data-dir DIR] [--checkpoint MODEL.pt] [--json FILE] [RECIPE ...]

Each is run after the section's opening lines, in a folder of its own that has `checkpoints/resnet8.pt` (the
bundled model, converted, unless another is named) and `data`. Prints what each one's network makes of the
images beside the original. Without --data-dir, on the 1,000 bundled images, which are trained on, too.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ALONE = "Classify an image"  # without the opening lines
LARGE = {"ExecuTorch": "executorch"}  # what `make test` does not install


def read_recipes() -> tuple[str, dict[str, str]]:
    """Return the opening lines, and each recipe's code by its heading."""
    section = re.search(r"^## From here$(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)[1]
    opening, *parts = re.split(r"^### (.*)$", section, flags=re.MULTILINE)

    def code(text: str) -> str:
        return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))

    return code(opening), {name: code(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def run_recipe(name: str, opening: str, code: str) -> dict:
    """Run a recipe in the current folder; return what came of it, or the error's traceback."""
    here = 'from_checkpoint("/path/to/this/repository/checkpoints'  # the folder has a checkpoint of its own
    code = code.replace(here, 'from_checkpoint("checkpoints').replace("/path/to/this/repository", str(ROOT))
    namespace: dict = {}
    output, start = io.StringIO(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(output):
            exec(compile("" if name == ALONE else opening, "opening", "exec"), namespace)
            exec(compile(code, name, "exec"), namespace)
    except Exception:
        return {"error": traceback.format_exc()}
    found = {"seconds": time.perf_counter() - start, "printed": output.getvalue()}
    if "result" in namespace:
        original, result = namespace["original"], namespace["result"]
        logits = np.abs(result.log_probabilities - original.log_probabilities).max()
        pair = namespace["compare"](original, result)
        found |= {"accuracy": result.metrics["accuracy"], "logits": float(logits), **pair}
        found["original"] = original.metrics["accuracy"]
    return found


def prepare_folder(folder: Path, data_dir: Path | None, checkpoint: Path | None) -> None:
    """Put the checkpoint, the data and a photograph into a folder."""
    (folder / "checkpoints").mkdir()
    (folder / "data").mkdir()
    if data_dir:
        for found in data_dir.resolve().glob("cifar-10-batches-*"):
            (folder / "data" / found.name).symlink_to(found)
    if checkpoint:
        shutil.copy(checkpoint, folder / "checkpoints/resnet8.pt")
        shutil.copy(checkpoint.with_suffix(".json"), folder / "checkpoints/resnet8.json")
    else:
        command = ["convert.py", "--no-verify", "-o", folder / "checkpoints/resnet8.pt"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    from PIL import Image

    from data import cifar10

    sample = cifar10.load_test(folder / "none")
    Image.fromarray(sample.images[0].transpose(1, 2, 0)).save(folder / "photo.png")
    if not data_dir:
        cifar10.load_train = lambda *_: (sample.images, sample.labels.astype(np.uint8))


def results_table(results: dict[str, dict]) -> Table:
    """Return the table that README shows."""
    table = Table("recipe", box=None, show_edge=False)
    for heading in ("accuracy", "same class", "McNemar's p", "largest difference\nof a logit", "seconds"):
        table.add_column(heading, justify="right")
    for name, found in results.items():
        if "accuracy" in found:
            p = found["mcnemar_p"]
            figures = [f"{found['accuracy']:.2%}", f"{found['same_prediction']:,}", f"{p:.2g}"]
            table.add_row(name, *figures, f"{found['logits']:.1e}", f"{found['seconds']:.0f}")
        else:
            last = found.get("error", found.get("printed", "")).strip().rpartition("\n")[2]
            table.add_row(name, last)
    return table


def main() -> int:
    """Run the recipes; exit with status 1 if one fails."""
    opening, recipes = read_recipes()
    parser = argparse.ArgumentParser(prog="python -m tests.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="RECIPE", nargs="*", help=", ".join(recipes))
    parser.add_argument("--data-dir", type=Path, help="holds the test set, and the training set to fine-tune")
    parser.add_argument("--checkpoint", type=Path, help="a .pt with its .json (the bundled model's)")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    if unknown := set(options.names) - set(recipes):
        parser.error(f"no recipe called {min(unknown)}")

    sys.path.insert(0, str(ROOT))
    checkpoint = options.checkpoint and options.checkpoint.resolve()
    with tempfile.TemporaryDirectory() as folder:
        prepare_folder(Path(folder), options.data_dir, checkpoint)
        os.chdir(folder)
        results = {name: run_recipe(name, opening, recipes[name]) for name in options.names or recipes}
        os.chdir(ROOT)
    if options.json:
        options.json.write_text(json.dumps(results))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(results_table(results))
    for name, found in results.items():
        if "error" in found:
            print(f"\n{name}:\n{found['error']}", file=sys.stderr)
    return int(any("error" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
