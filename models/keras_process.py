"""Keras, in a process of its own: `python -m models.keras_process` answers `KerasModel`'s requests.

It needs keras and numpy, not torch or h5py of this environment: `--keras-python` may name another one.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

try:
    import numpy as np
except ImportError as error:  # a Python without numpy has no Keras
    sys.exit(f"{sys.executable} cannot import Keras ({error}): install tensorflow, or name another Python")

from models.keras_file import KerasFile
from models.worker import Worker, WorkerError, serve


class KerasProcess:
    """A Keras that runs elsewhere. It starts at once, and loads one model at a time."""

    def __init__(self, python: str = sys.executable) -> None:
        """Start it; raises WorkerError if `python` cannot be run."""
        self.worker = Worker("models.keras_process", python)

    def load(self, file: KerasFile) -> dict:
        """Load a model, as float32 and as float64 arithmetic with its weights in float32.

        The answer holds `keras` (its version), `trainable` and `statistics` (numbers of parameters), and
        `rebuilt`: None when Keras read the file by itself, else why it could not, and was given the graph
        and the arrays that our reader had found. Raises WorkerError when Keras is missing or fails.
        """
        arrays = {
            f"{layer.name}:{variable}": array
            for layer in file.layers
            for variable, array in layer.arrays.items()
        }
        graph = [(layer.name, layer.class_name, layer.config, layer.inputs) for layer in file.layers]
        request = {"do": "load", "config": file.config, "graph": graph}
        answer, _ = self.worker.ask(request, {"content": np.frombuffer(file.content, np.uint8), **arrays})
        return answer

    def activations(
        self, images: np.ndarray, dtype: str, layers: list[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Return every layer's output, by layer name (`model/layer` in a nested model).

        `images` is (N, H, W, C) of any float type, as the model takes them; `dtype` is float32 or float64;
        `layers` names the only ones to return.
        """
        return self.worker.ask({"do": "activations", "dtype": dtype, "layers": layers}, {"images": images})[1]

    def predict(self, images: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
        """Return what the model makes of `(images - mean) / std`, as (N, classes) float32.

        `images` is (N, C, H, W) uint8; `mean` and `std` have a value a channel, in pixel units.
        """
        request = {"do": "predict", "mean": list(mean), "std": list(std)}
        return self.worker.ask(request, {"images": images})[1]["outputs"]

    def close(self) -> None:
        """End the process."""
        self.worker.close()

    def __enter__(self) -> KerasProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# What follows runs in the Keras process.

BATCH_SIZE = 100
TRAINING_ONLY = ("_initializer", "_regularizer", "_constraint")


def load_file(content: bytes, config: dict) -> object:
    """Return a file's Keras model. Keras is given `config`, which our reader has checked, not the file's."""
    import keras

    with tempfile.TemporaryDirectory() as folder:
        if content.startswith(b"PK"):
            path = Path(folder) / "model.keras"
            with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(path, "w") as target:
                for name in ("metadata.json", "model.weights.h5"):
                    target.writestr(name, source.read(name))
                target.writestr("config.json", json.dumps(config))
        else:
            import h5py

            path = Path(folder) / "model.h5"
            path.write_bytes(content)
            with h5py.File(path, "r+") as file:
                file.attrs["model_config"] = json.dumps(config)
        return keras.models.load_model(path, compile=False)


def rebuild(graph: list, arrays: dict[str, np.ndarray]) -> tuple[object, dict[str, str]]:
    """Return the Keras model of a graph and arrays that our reader found, and its layers' names there."""
    import keras

    tensors, names = {}, {}
    for name, class_name, config, inputs in graph:
        if class_name == "InputLayer":
            shape = config.get("batch_shape") or config["batch_input_shape"]
            first = tensors[name] = keras.Input(shape[1:])
            continue
        layer_class = getattr(keras.layers, class_name)
        # initializers and the like change nothing here, and older versions spell them differently
        known = inspect.signature(layer_class.__init__).parameters
        options = {
            key: value for key, value in config.items() if key in known and not key.endswith(TRAINING_ONLY)
        }
        if class_name == "BatchNormalization":
            options["axis"] = -1  # Keras 2 writes [3]
        layer = layer_class(**{**options, "name": f"layer_{len(names)}", "dtype": "float32"})
        names[layer.name] = name
        sources = [tensors[source] for source in inputs]
        tensors[name] = layer(sources if len(sources) > 1 else sources[0])
        values = [array for key, array in arrays.items() if key.rpartition(":")[0] == name]
        if values:
            layer.set_weights(values)
    return keras.Model(first, tensors[name]), names


def with_dtype(value: object, dtype: str) -> object:
    """Return a configuration in which every layer computes in `dtype`."""
    if isinstance(value, dict):
        return {key: dtype if key == "dtype" else with_dtype(item, dtype) for key, item in value.items()}
    return [with_dtype(item, dtype) for item in value] if isinstance(value, list) else value


def leaves(model: object, prefix: str = "") -> list[tuple[str, object]]:
    """Return (path, layer) of every layer, those of nested models included."""
    found = []
    for layer in model.layers:
        path = f"{prefix}{layer.name}"
        found += leaves(layer, f"{path}/") if hasattr(layer, "layers") else [(path, layer)]
    return found


class Server:
    """Answers the requests of `KerasProcess`."""

    def __init__(self) -> None:
        self.models: dict[str, object] = {}  # by dtype
        self.renamed: dict[str, str] = {}  # a layer's name in the rebuilt model -> in the file

    def answer(self, request: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
        """Answer one request; raises WorkerError with one line when Keras cannot."""
        try:
            return getattr(self, request.pop("do"))(arrays, **request)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise WorkerError(f"Keras fails on the model: {reason}") from None

    def load(self, arrays: dict[str, np.ndarray], config: dict | None, graph: list) -> tuple[dict, dict]:
        """Load a model from the file's bytes, or from its graph and arrays."""
        import keras

        content, rebuilt = arrays.pop("content").tobytes(), "the file holds weights alone"
        self.models, self.renamed, model = {}, {}, None
        if config is not None:
            try:
                model = load_file(content, config)
            except Exception as error:
                rebuilt = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if model is None:
            model, self.renamed = rebuild(graph, arrays)
        else:
            rebuilt = None
        weights = [np.asarray(weight).astype(np.float32) for weight in model.get_weights()]
        for dtype in ("float32", "float64"):
            copy = keras.models.model_from_json(json.dumps(with_dtype(json.loads(model.to_json()), dtype)))
            copy.set_weights(weights)
            for _, layer in leaves(copy):
                if hasattr(layer, "finalize_state"):  # a Normalization computes with copies of its weights
                    layer.finalize_state()
            self.models[dtype] = copy

        def count(variables: list) -> int:
            return int(sum(np.prod(variable.shape) for variable in variables))

        layers = [
            layer
            for _, layer in leaves(model)
            if type(layer).__name__ in ("Conv2D", "BatchNormalization", "Dense")
        ]
        for layer in layers:
            layer.trainable = True  # a frozen layer's kernels are parameters all the same
        trainable = sum(count(layer.trainable_weights) for layer in layers)
        statistics = sum(count(layer.non_trainable_weights) for layer in layers)
        answer = {
            "keras": keras.__version__,
            "trainable": trainable,
            "statistics": statistics,
            "rebuilt": rebuilt,
        }
        return answer, {}

    def activations(
        self, arrays: dict[str, np.ndarray], dtype: str, layers: list[str] | None
    ) -> tuple[dict, dict]:
        """Run the model on `images` and return what each layer made of them."""
        model, outputs = self.models[dtype], {}

        def record(path: str, call: object) -> object:
            def recorded(*args: object, **kwargs: object) -> object:
                result = call(*args, **kwargs)
                outputs.setdefault(path, []).append(np.asarray(result))
                return result

            return recorded

        calls = [(self.renamed.get(path, path), layer, layer.call) for path, layer in leaves(model)]
        for path, layer, call in calls:
            if layers is None or path in layers:
                layer.call = record(path, call)
        images = arrays["images"].astype(dtype)
        for start in range(0, len(images), BATCH_SIZE):
            model(images[start : start + BATCH_SIZE], training=False)
        for _, layer, call in calls:
            layer.call = call
        return {}, {path: np.concatenate(batches) for path, batches in outputs.items()}

    def predict(
        self, arrays: dict[str, np.ndarray], mean: list, std: list
    ) -> tuple[dict, dict[str, np.ndarray]]:
        """Return the float32 model's outputs."""
        pixels = arrays["images"].transpose(0, 2, 3, 1).astype(np.float32)
        images = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        return {}, {"outputs": self.models["float32"].predict(images, batch_size=BATCH_SIZE, verbose=0)}


def main() -> None:
    """Serve `KerasProcess`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the reference is the CPU's arithmetic
    os.environ["KERAS_BACKEND"] = "tensorflow"
    try:
        import keras  # noqa: F401  # imported while the caller reads and maps the file

        answer = Server().answer
    except ImportError as error:
        reason = f"{sys.executable} cannot import Keras ({error}): install tensorflow, or name another Python"

        def answer(request: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
            raise WorkerError(reason)

    serve(answer, refusals=(WorkerError,))


if __name__ == "__main__":
    main()
