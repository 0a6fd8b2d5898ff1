"""What each usual mistake of a Keras-to-PyTorch conversion costs, in test accuracy, made on purpose.

    python -m tests.benchmarks.pitfalls CHECKPOINT.pt [--data-dir DIR]

Each row undoes one thing that `convert.py` and `models/resnet8.py` get right, and evaluates the result.
"""

import argparse
import copy
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.cifar10 import DataError, load_test

# torch, and what imports it, is imported after the options: `--help` needs none.


def main() -> None:
    """Evaluate the model as it is, then with each mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    arguments = parser.parse_args()

    import torch

    from models.checkpoint import read_metadata
    from models.resnet8 import ResNet8
    from tests.benchmarks.mistakes import INPUT_MISTAKES, MODEL_MISTAKES, accuracy

    try:
        if any(read_metadata(arguments.checkpoint).get("input", {}).get("mean", [])):
            parser.error("the mistakes in the input assume a model that takes raw pixels")
        data = load_test(arguments.data_dir)
        right = ResNet8.from_checkpoint(arguments.checkpoint)
    except (DataError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)

    table = Table("mistake", f"accuracy on {data.name}", box=None, show_edge=False)
    table.add_row("none", f"{accuracy(right, images, labels, lambda x: x):.2%}")
    for mistake in MODEL_MISTAKES:
        wrong = copy.deepcopy(right)
        mistake(wrong)
        table.add_row(mistake.__doc__.strip(), f"{accuracy(wrong, images, labels, lambda x: x):.2%}")
    for mistake in INPUT_MISTAKES:
        table.add_row(mistake.__doc__.strip(), f"{accuracy(right, images, labels, mistake):.2%}")
    Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    main()
