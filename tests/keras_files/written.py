"""Use a Keras file written by convert.py as people do: infer, train, and list its variables.

    python -m tests.keras_files.written FOLDER

FOLDER has `model.h5`, `model.keras` (the same model) and `inputs.npz`: `pixels` (uint8), `images` (the
model's input in training) and `labels`. It gets `computed.npz`: the `passes` of `references.py`, and
`SUFFIX:DTYPE`, the outputs for the pixels in both dtypes.
"""

import os
import sys
from pathlib import Path

import numpy as np

from tests.keras_files.references import passes


def main() -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import keras
    import tensorflow as tf

    folder = Path(sys.argv[1])
    inputs, found = np.load(folder / "inputs.npz"), {}
    for suffix in (".h5", ".keras"):
        model = keras.models.load_model(folder / f"model{suffix}")
        for dtype in ("uint8", "float32"):
            found[f"{suffix}:{dtype}"] = np.asarray(model(inputs["pixels"].astype(dtype), training=False))
    found |= passes(keras, tf, model, inputs["images"], inputs["labels"])
    np.savez(folder / "computed.npz", **found)


if __name__ == "__main__":
    main()
