# ruff: noqa: N803, N806  # K is the Keras library, L its layers
"""Write Keras files of ResNet8s, in every variant and format, and Keras's outputs of each.

    python -m tests.keras_files.writer OUT_DIR keras|tf_keras

Keras 3 writes the present formats, tf_keras those of Keras 2. OUT_DIR gets the files of each of VARIANTS
that `is_converted` or EXTRA lists, `.legacy.h5` by `save_weights` of Keras 2, and `expected.npz`:
`VARIANT:images` and `VARIANT:outputs`, float32, or float64 with weights rounded to float32 (IN_FLOAT64).
`refused/` gets REFUSED (`.h5` by Keras 3, `.keras` by tf_keras), `hostile/` files with code.
"""

import gc
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

from tests.keras_files.networks import (
    FORMATS,
    IN_FLOAT64,
    VARIANTS,
    WRITERS,
    each,
    is_converted,
    randomize,
    resnet8,
)
from tests.keras_files.refused import REFUSED, REFUSED_BY_BOTH, WEIGHTS_ALONE_REFUSED

# Files that are refused, damaged, or compared with the other formats
NESTED = ("nested_stages", "nested_deep", "nested_frozen", "nested_partly_frozen")
EXTRA = {
    ("keras", ".weights.h5"): ("no_scale", "no_center", "nested_stages"),
    ("tf_keras", ".weights.h5"): ("nested_stages",),
    ("tf_keras", ".legacy.h5"): NESTED,
}


def set_dtype(K: ModuleType, policy: str, floatx: str) -> None:
    """Set the dtype policy and the default dtype of Keras."""
    K.backend.set_floatx(floatx)
    (K.config.set_dtype_policy if hasattr(K, "config") else K.mixed_precision.set_global_policy)(policy)


def write_variant(K: ModuleType, name: str, folder: Path, rng: np.random.Generator) -> dict:
    """Write a variant's files; return its images and outputs."""
    chosen, library = VARIANTS[name], K.__name__
    floatx = chosen.policy if chosen.policy in ("float16", "float64") else "float32"
    set_dtype(K, chosen.policy, floatx)
    model = chosen.build(K)
    randomize(model, rng)
    for suffix in FORMATS:
        if is_converted(library, suffix, name) or name in EXTRA.get((library, suffix), ()):
            save = model.save_weights if suffix in (".weights.h5", ".legacy.h5") else model.save
            save(folder / f"{name}{suffix}")

    twin = model
    if chosen.policy != "float32" or name in IN_FLOAT64:
        set_dtype(K, "float64", "float64")
        twin = chosen.build(K)
        twin.set_weights([np.asarray(weight).astype(np.float32) for weight in model.get_weights()])
        for layer in twin.layers:
            if hasattr(layer, "finalize_state"):
                layer.finalize_state()
    height, width, channels = (size or 24 for size in model.input_shape[1:])
    images = (
        rng.integers(0, 256, (3, height, width, channels)).astype(np.float64)
        if chosen.pixels
        else rng.normal(0, 1, (3, height, width, channels)).astype(np.float32).astype(np.float64)
    )
    outputs = twin(images.astype(K.backend.floatx()), training=False)
    outputs = outputs["probabilities"] if isinstance(outputs, dict) else outputs
    return {f"{name}:images": images, f"{name}:outputs": np.asarray(outputs)}


def write_hostile(K: ModuleType, folder: Path) -> None:
    """Write models with a Lambda layer whose code leaves a mark, and check that it does in Keras."""
    mark = folder / "mark"
    code = eval(f"lambda x: (__import__('pathlib').Path({str(mark)!r}).touch(), x)[1]")
    model = resnet8(K, change=each("relu1", lambda L, x: L.Lambda(code, name="odd")(x)))
    for suffix in (".h5", ".keras"):
        path = folder / f"lambda{suffix}"
        model.save(path)
        mark.unlink(missing_ok=True)
        K.models.load_model(path, safe_mode=False)
        mark.unlink()  # fails unless Keras has run the code


def main() -> None:
    """Write everything."""
    folder, library = Path(sys.argv[1]), sys.argv[2]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    gc.disable()  # it takes a tenth of the time
    K = importlib.import_module(library)
    rng = np.random.default_rng(WRITERS.index(library))
    for name in ("", "refused", "hostile"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    expected = {}
    for name, chosen in VARIANTS.items():
        if library in chosen.writers:
            expected |= write_variant(K, name, folder, rng)
    np.savez(folder / "expected.npz", **expected)

    set_dtype(K, "float32", "float32")
    suffix = {"keras": ".h5", "tf_keras": ".keras"}[library]
    for name, (chosen, _) in REFUSED.items():
        weights_alone = name in WEIGHTS_ALONE_REFUSED[library]
        if library == "keras" or name in REFUSED_BY_BOTH or weights_alone:
            model = chosen.build(K)
            model.save(folder / "refused" / f"{name}{suffix}")
            if weights_alone:
                model.save_weights(folder / "refused" / f"{name}.weights.h5")
    write_hostile(K, folder / "hostile")


if __name__ == "__main__":
    main()
