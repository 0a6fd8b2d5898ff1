"""Keras, in a process of its own: `python -m models.keras.server` answers `KerasProcess`'s requests.

It needs keras and numpy, not torch or h5py of this environment: `--keras-python` may name another one.
"""

from __future__ import annotations

import gc
import inspect
import io
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

try:
    import numpy as np
except ImportError as error:  # a Python without numpy has no Keras
    sys.exit(f"{sys.executable} cannot import Keras ({error}): install tensorflow, or name another Python")

from models.common.errors import one_line
from models.common.tuning import COLLECT_AFTER
from models.keras.file import FLOATS, HALF_FLOATS, Layer, unpack_layers
from models.keras.worker import WorkerError, serve, temporary_folder
from models.scaling import Scaling

BATCH_SIZE = 100  # the fastest of 16 to 1,000, with a thread a core
TRAINING_ONLY = ("_initializer", "_regularizer", "_constraint")


class Server:
    """Answers the requests of `KerasProcess`."""

    def __init__(self) -> None:
        self.config, self.weights = {}, []  # of the model that is loaded
        self.models: dict[str, object] = {}  # built of them, by dtype
        self.functions: dict[tuple, Callable] = {}  # and compiled, by dtype and the layer without its softmax
        self.renamed: dict[str, str] = {}  # a layer's name in the rebuilt model -> in the file

    def respond(self, request: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
        """Call the method that `request` names; raises WorkerError with one line when Keras cannot."""
        try:
            return getattr(self, request.pop("do"))(arrays, **request)
        except Exception as error:
            raise WorkerError(f"Keras fails on the model: {one_line(error)}") from None

    def load(self, arrays: dict[str, np.ndarray], config: dict | None, layers: list) -> tuple[dict, dict]:
        """Load a model from the file's bytes, or from the layers found in it; its weights become float32."""
        import keras

        content, rebuilt = arrays.pop("content").tobytes(), "the file holds weights alone"
        self.models, self.functions, self.renamed, model = {}, {}, {}, None
        if config is not None:
            with temporary_folder() as folder:
                path = Path(folder) / ("model.keras" if content.startswith(b"PK") else "model.h5")
                path.write_bytes(with_config(content, config))
                try:
                    model, rebuilt = keras.models.load_model(path, compile=False), None
                except Exception as error:
                    if isinstance(error, MemoryError) or getattr(error, "errno", None):
                        raise  # the machine fails, not Keras on the file
                    rebuilt = one_line(error)
        if model is None:
            model, self.renamed = rebuild(unpack_layers(layers, arrays))
        self.config = json.loads(model.to_json())
        self.weights = [np.asarray(weight).astype(np.float32) for weight in model.get_weights()]
        trainable, statistics = count_parameters(model)
        reply = {
            "keras": keras.__version__,
            "trainable": trainable,
            "statistics": statistics,
            "rebuilt": rebuilt,
        }
        return reply, {}

    def build(self, arrays: dict[str, np.ndarray], layers: list, suffix: str) -> tuple[dict, dict]:
        """Return the content of the file that Keras saves for these layers."""
        model, _ = rebuild(unpack_layers(layers, arrays), keep_names=True)
        with temporary_folder() as folder:
            path = Path(folder) / f"model{suffix}"
            path.write_bytes(bytes(2**20 + 2 * sum(array.nbytes for array in arrays.values())))
            path.unlink()  # there is room for it: on a full disk the HDF5 library crashes
            model.save(path)
            return {}, {"content": np.frombuffer(path.read_bytes(), np.uint8)}

    def activations(
        self, arrays: dict[str, np.ndarray], scaling: dict, dtype: str
    ) -> tuple[dict, dict[str, np.ndarray]]:
        """Run the model on `images`, scaled, and return what each layer made of them."""
        model, outputs = self.model_in(dtype), {}

        def record(path: str, call: object) -> object:
            def recorded(*args: object, **kwargs: object) -> object:
                result = call(*args, **kwargs)
                outputs[path] = np.asarray(result)
                return result

            return recorded

        calls = [(self.renamed.get(path, path), layer, layer.call) for path, layer in flat_layers(model)]
        for path, layer, call in calls:
            layer.call = record(path, call)
        model(scaled(arrays["images"], scaling, dtype), training=False)
        for _, layer, call in calls:
            layer.call = call
        return {}, outputs

    def predict(
        self, arrays: dict[str, np.ndarray], scaling: dict, dtype: str, logits_of: str | None = None
    ) -> tuple[dict, dict[str, np.ndarray]]:
        """Return what the model makes of `images`, scaled: compiled, as `Model.predict` is, on every core."""
        function, images = self.function_in(dtype, logits_of), arrays["images"]

        def outputs_from(start: int) -> np.ndarray:
            return np.asarray(function(scaled(images[start : start + BATCH_SIZE], scaling, dtype)))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outputs = pool.map(outputs_from, range(0, len(images), BATCH_SIZE))
            return {}, {"outputs": np.concatenate(list(outputs))}

    def model_in(self, dtype: str) -> object:
        """Return the model that computes in `dtype`, built once."""
        import keras

        if dtype not in self.models:
            config = with_dtype(self.config, dtype)
            for layer, own in zip(config["config"]["layers"], self.config["config"]["layers"], strict=True):
                if own["class_name"] == "InputLayer" and own["config"].get("dtype") in HALF_FLOATS:
                    layer["config"]["dtype"] = own["config"]["dtype"]  # it rounds what the model is fed
            model = keras.models.model_from_json(json.dumps(config))
            model.set_weights(self.weights)
            for _, layer in flat_layers(model):
                if hasattr(layer, "finalize_state"):  # a Normalization computes with copies of its weights
                    layer.finalize_state()
            self.models[dtype] = model
        return self.models[dtype]

    def function_in(self, dtype: str, logits_of: str | None) -> Callable:
        """Return that model, compiled once for batches of any size; without the softmax of one layer."""
        import tensorflow as tf

        if (dtype, logits_of) not in self.functions:
            model = self.model_in(dtype)
            batches = tf.TensorSpec([None, *model.input_shape[1:]], dtype)

            @tf.function(input_signature=[batches], autograph=False)
            def function(images: tf.Tensor) -> tf.Tensor:
                (outputs,) = tf.nest.flatten(model(images, training=False))  # they may lie in a dict
                return outputs

            layers = {self.renamed.get(path, path): layer for path, layer in flat_layers(model)}
            with without_softmax(layers[logits_of]) if logits_of else nullcontext():
                self.functions[dtype, logits_of] = function.get_concrete_function()
        return self.functions[dtype, logits_of]


@contextmanager
def without_softmax(layer: object) -> Iterator[None]:
    """Let a layer give its logits, which say more: a probability of 1e-50 is 0 in float32."""
    name = "activation" if hasattr(layer, "activation") else "call"  # Dense and Activation, or Softmax
    softmax = getattr(layer, name)
    setattr(layer, name, lambda inputs, **options: inputs)
    try:
        yield
    finally:
        setattr(layer, name, softmax)


def scaled(pixels: np.ndarray, scaling: dict, dtype: str) -> np.ndarray:
    """Return (N, C, H, W) pixels as the model takes them: scaled, channels last, in `dtype`."""
    return Scaling(**scaling).of(pixels).transpose(0, 2, 3, 1).astype(dtype)


def with_config(content: bytes, config: dict) -> bytes:
    """Return a file's content with `config`, which our reader has checked, in the place of its own."""
    target = io.BytesIO()
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as archive:
            for name in ("metadata.json", "model.weights.h5"):
                archive.writestr(zipfile.ZipInfo(name), source.read(name))  # of no date, whatever the clock
            archive.writestr(zipfile.ZipInfo("config.json"), json.dumps(config))
    else:
        import h5py

        target.write(content)
        with h5py.File(target, "r+") as file:
            file.attrs["model_config"] = json.dumps(config)
    return target.getvalue()


def rebuild(layers: Iterable[Layer], keep_names: bool = False) -> tuple[object, dict[str, str]]:
    """Return the Keras model of these layers, and for each of its layers' names theirs.

    A name that our reader found, such as `model/layer`, may be none that Keras takes.
    """
    import keras

    tensors, names = {}, {}
    for each in layers:
        if each.class_name == "InputLayer":
            shape = each.config.get("batch_shape") or each.config["batch_input_shape"]
            dtype = each.config.get("dtype") if each.config.get("dtype") in FLOATS else "float32"
            name = each.name if keep_names else None
            first = tensors[each.name] = keras.Input(shape[1:], name=name, dtype=dtype)
            continue
        if each.class_name == "Cast":  # in float32 and float64 it does nothing
            tensors[each.name] = tensors[each.inputs[0]]
            continue
        layer_class = getattr(keras.layers, each.class_name)
        # initializers and the like change nothing here, and older versions spell them differently
        known = inspect.signature(layer_class.__init__).parameters
        options = {
            key: value
            for key, value in each.config.items()
            if key in known and not key.endswith(TRAINING_ONLY)
        }
        if each.class_name == "BatchNormalization":
            options["axis"] = -1  # Keras 2 writes [3]
        name = each.name if keep_names else f"layer_{len(names)}"
        layer = layer_class(**options | {"name": name, "dtype": "float32"})
        names[layer.name] = each.name
        sources = [tensors[source] for source in each.inputs]
        tensors[each.name] = layer(sources if len(sources) > 1 else sources[0])
        if each.arrays:
            layer.set_weights(list(each.arrays.values()))
    return keras.Model(first, tensors[each.name], name="resnet8"), names


def with_dtype(value: object, dtype: str) -> object:
    """Return a configuration in which every layer computes in `dtype`."""
    if isinstance(value, dict):
        return {key: dtype if key == "dtype" else with_dtype(item, dtype) for key, item in value.items()}
    return [with_dtype(item, dtype) for item in value] if isinstance(value, list) else value


def flat_layers(model: object, prefix: str = "") -> list[tuple[str, object]]:
    """Return (path, layer) of every layer, those of nested models included."""
    found = []
    for layer in model.layers:
        path = f"{prefix}{layer.name}"
        found += flat_layers(layer, f"{path}/") if hasattr(layer, "layers") else [(path, layer)]
    return found


def count_parameters(model: object) -> tuple[int, int]:
    """Return the numbers of trainable parameters and of statistics, of the layers that ours has too."""

    def count(variables: list) -> int:
        return int(sum(np.prod(variable.shape) for variable in variables))

    layers = [
        layer
        for _, layer in flat_layers(model)
        if type(layer).__name__ in ("Conv2D", "BatchNormalization", "Dense")
    ]
    for layer in layers:
        layer.trainable = True  # a frozen layer's kernels are parameters all the same
    trainable = sum(count(layer.trainable_weights) for layer in layers)
    return trainable, sum(count(layer.non_trainable_weights) for layer in layers)


def main() -> None:
    """Serve `KerasProcess`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the reference is the CPU's arithmetic
    os.environ["KERAS_BACKEND"] = "tensorflow"
    gc.set_threshold(COLLECT_AFTER)
    warnings.simplefilter("ignore")  # of Keras's own code: PYTHONWARNINGS=error would make errors of them
    sys.modules["matplotlib"] = None  # Keras would import it, to draw figures, which takes a quarter second
    try:
        import keras  # imported while the caller reads and maps the file

        keras.backend.set_floatx("float32")  # whatever the user's keras.json says: a file says its own
        keras.backend.set_image_data_format("channels_last")
        respond = Server().respond
    except ImportError as error:
        reason = f"{sys.executable} cannot import Keras ({error}): install tensorflow, or name another Python"

        def respond(request: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
            raise WorkerError(reason)

    serve(respond, refusals=(WorkerError,))


if __name__ == "__main__":
    main()
