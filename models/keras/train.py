"""Train the Keras ResNet8 on CIFAR-10, alone or with a teacher, the same network but wider.

    python -m models.keras.train --data-dir DIR --width 48 --epochs 32 --holdout 5000 --output teacher.h5
    python -m models.keras.train --data-dir DIR --teacher teacher.h5 --epochs 300 --output student.h5

Each trains `models/keras/resnet8.py` and writes its file; started again, it goes on from where it stopped.
"""

import sys
from pathlib import Path

from data.cifar10 import DataError, load_train
from models.common.errors import KerasFileError
from models.common.terminal import Parser, beside_the_scripts


def main() -> None:
    """Parse the command line and train."""
    parser = Parser(__doc__, prog="python -m models.keras.train")
    parser.add_argument(
        "--data-dir", type=Path, default=beside_the_scripts("data"), help="holds cifar-10-batches-bin/ (data)"
    )
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument(
        "--output", type=Path, default=beside_the_scripts("checkpoints/resnet8_keras.h5"), help="the .h5"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--holdout", type=int, default=0, help="training images kept for validation (default: 0)"
    )
    parser.add_argument(
        "--download", action="store_true", help="download CIFAR-10 into DATA_DIR if it is not there"
    )
    parser.add_argument("--width", type=int, default=16, help="filters of the first stage (default: 16)")
    parser.add_argument("--teacher", type=Path, help="a trained Keras file to learn from, too")
    parser.add_argument("--start", type=Path, help="a trained Keras file of that width to start from")
    parser.add_argument(
        "--bfloat16", action="store_true", help="compute in bfloat16, where the processor is fast at it"
    )
    options = parser.parse_args()
    try:
        images, labels = load_train(options.data_dir, options.download)
        # torchvision before TensorFlow, since the other order crashes Python; both take seconds to import
        import torchvision  # noqa: F401

        from models.keras.training import train

        train(
            images,
            labels,
            options.epochs,
            options.output,
            options.seed,
            options.holdout,
            options.width,
            options.teacher,
            options.bfloat16,
            options.start,
        )
    except (DataError, KerasFileError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
