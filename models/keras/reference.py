"""Keras as a job: reference activations, predictions, and building a model from layers.

`Keras` is the caller's side; `python -m models.keras.reference` runs the task, and needs keras and numpy, not
torch: `--keras-python` may be the Python of another environment.
"""

from __future__ import annotations

import gc
import inspect
import io
import json
import os
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

try:
    import numpy as np
except ImportError as error:  # a Python without numpy has no Keras
    sys.exit(f"{sys.executable} cannot import Keras ({error}): install tensorflow, or choose another Python")

from models.common.cli import GC_THRESHOLD, one_line
from models.common.job import Job, JobError, Message, serve
from models.keras.file import FLOATS, HALF_FLOATS, KerasFile, Layer, pack_layers, unpack_layers
from models.normalization import Normalization

BATCH_SIZE = 100  # the fastest of 16 to 1,000, with one thread per core
TRAINING_ONLY = ("_initializer", "_regularizer", "_constraint")  # of no effect, and other names in Keras 2


class Keras:
    """Keras jobs, one per call. The first process starts in the constructor: Keras takes 3 s to import."""

    def __init__(self, python: str = sys.executable) -> None:
        """Start the first process. Raises JobError if `python` cannot be run, or lacks Keras."""
        if python == sys.executable and find_spec("keras") is None:
            raise JobError(f"{python} has no Keras: pip install tensorflow, or choose --keras-python")
        self.python, self.started = python, Job("models.keras.reference", python)

    def reference(
        self, file: KerasFile, images: np.ndarray, others: np.ndarray, normalization: Normalization
    ) -> Message:
        """Return Keras's outputs for (N, C, H, W) pixels, as `compute_reference` does. Raises JobError."""
        request = {"task": "reference", "normalization": asdict(normalization)}
        return self._run_file(request, file, images=images, others=others)

    def predict(
        self,
        file: KerasFile,
        images: np.ndarray,
        normalization: Normalization,
        logits_of: Layer | None = None,
    ) -> np.ndarray:
        """Return (N, classes) float32 outputs for (N, C, H, W) pixels. Raises JobError.

        `logits_of` is the layer whose softmax is removed: a probability of 1e-50 is 0 in float32.
        """
        request = {"task": "predict", "normalization": asdict(normalization)}
        request["logits_of"] = logits_of.name if logits_of else None
        return self._run_file(request, file, images=images)[1]["outputs"]

    def build(
        self,
        layers: list[Layer],
        suffix: str,
        images: np.ndarray,
        others: np.ndarray,
        normalization: Normalization,
    ) -> tuple[bytes, Message]:
        """Save a model file (.h5 or .keras) with these layers; return its content and its `reference`."""
        described, arrays = pack_layers(layers)
        request = {"task": "build", "normalization": asdict(normalization), "suffix": suffix}
        request["layers"] = described
        answer, arrays = self._run(request, {**arrays, "images": images, "others": others})
        return arrays.pop("content").tobytes(), (answer, arrays)

    def _run_file(self, request: dict, file: KerasFile, **images: np.ndarray) -> Message:
        described, arrays = pack_layers(file.layers)
        content = np.frombuffer(file.content, np.uint8)
        request = {**request, "config": file.config, "layers": described}
        return self._run(request, {**arrays, **images, "content": content})

    def _run(self, request: dict, arrays: dict[str, np.ndarray]) -> Message:
        job, self.started = self.started or Job("models.keras.reference", self.python), None
        return job.run(request, arrays)

    def __enter__(self) -> Keras:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.started:
            self.started.close()


# --- In the job -------------------------------------------------------------------------------------------


def build_model(request: dict, arrays: dict) -> Message:
    """Save a model with these layers; return the file's `content` and the reference of the saved file."""
    import keras

    model, _ = rebuild(unpack_layers(request["layers"], arrays), keep_names=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{request['suffix']}"
        model.save(path)
        content = np.frombuffer(path.read_bytes(), np.uint8)
        saved = keras.models.load_model(path, compile=False)  # written above: it has no foreign code
    answer, computed = compute_reference(saved, {}, None, request, arrays)
    return answer, {**computed, "content": content}


def compute_reference(model: object, names: dict, reason: str | None, request: dict, arrays: dict) -> Message:
    """Compute activations and outputs in float64 and float32.

    For `images`: every layer's output (`float64/NAME`, channels last) and the model's (`float64`); in float32
    the model's for `others` too. The answer has Keras's version, the numbers of `trainable` parameters and of
    `statistics`, and the reason why the model was rebuilt from its layers (`rebuilt`), or None.
    """
    import keras

    computed, normalization = {}, request["normalization"]
    for dtype in ("float64", "float32"):
        network = in_dtype(model, dtype)
        predicted = [predict(network, arrays["others"], normalization)] if dtype == "float32" else []
        output, activations = run_layers(network, normalized(arrays["images"], normalization, dtype))
        computed[dtype] = np.concatenate([output, *predicted])
        computed.update({f"{dtype}/{names.get(path, path)}": value for path, value in activations.items()})
    return {"keras": keras.__version__, "rebuilt": reason, **count_parameters(model)}, computed


def compute_outputs(model: object, names: dict, request: dict, arrays: dict) -> Message:
    """Compute the float32 `outputs` for `images`, without the softmax of the layer `logits_of`."""
    model = in_dtype(model, "float32")
    if request["logits_of"]:
        layers = {names.get(path, path): layer for path, layer in flat_layers(model)}
        layer = layers[request["logits_of"]]
        option = "activation" if hasattr(layer, "activation") else "call"  # the latter for a Softmax layer
        setattr(layer, option, lambda inputs, **_: inputs)
    return {}, {"outputs": predict(model, arrays["images"], request["normalization"])}


def load(request: dict, arrays: dict) -> tuple[object, dict[str, str], str | None]:
    """Load a file's `content`; return the model, its layers' original names, and why it was rebuilt or None.

    Keras reads the file with the configuration that our reader has checked, instead of the file's own. If
    Keras cannot, the model is rebuilt from the layers that our reader found.
    """
    import keras

    content, reason = arrays["content"].tobytes(), "the file holds weights alone"
    if request["config"] is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("model.keras" if content.startswith(b"PK") else "model.h5")
            path.write_bytes(replace_config(content, request["config"]))
            try:
                return keras.models.load_model(path, compile=False), {}, None
            except Exception as error:
                if isinstance(error, MemoryError) or getattr(error, "errno", None):
                    raise  # a failure of the machine
                reason = one_line(error)
    return *rebuild(unpack_layers(request["layers"], arrays)), reason


def replace_config(content: bytes, config: dict) -> bytes:
    """Return a file's content with `config` instead of its own configuration."""
    target = io.BytesIO()
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as archive:
            for name in ("metadata.json", "model.weights.h5"):
                archive.writestr(zipfile.ZipInfo(name), source.read(name))  # without a date
            archive.writestr(zipfile.ZipInfo("config.json"), json.dumps(config))
    else:
        import h5py

        target.write(content)
        with h5py.File(target, "r+") as file:
            file.attrs["model_config"] = json.dumps(config)
    return target.getvalue()


def rebuild(layers: Iterable[Layer], keep_names: bool = False) -> tuple[object, dict[str, str]]:
    """Build a Keras model from layers; return it, and the layers' original names by their names in it.

    An original name such as `model/layer` may not be valid in Keras, so names are numbers by default.
    """
    import keras

    tensors, names = {}, {}
    for each in layers:
        name = each.name if keep_names else f"layer_{len(tensors)}"
        if each.class_name == "InputLayer":
            shape = each.config.get("batch_shape") or each.config["batch_input_shape"]
            dtype = each.config.get("dtype") if each.config.get("dtype") in FLOATS else "float32"
            first = tensors[each.name] = keras.Input(shape[1:], name=name, dtype=dtype)
            continue
        if each.class_name == "Cast":  # no effect in float32 and float64
            tensors[each.name] = tensors[each.inputs[0]]
            continue
        layer_class = getattr(keras.layers, each.class_name)
        known = inspect.signature(layer_class.__init__).parameters.keys() & each.config.keys()
        options = {key: each.config[key] for key in known if not key.endswith(TRAINING_ONLY)}
        if each.class_name == "BatchNormalization":
            options["axis"] = -1  # Keras 2 writes [3]
        layer = layer_class(**{**options, "name": name, "dtype": "float32"})
        names[name] = each.name
        sources = [tensors[source] for source in each.inputs]
        tensors[each.name] = layer(sources if len(sources) > 1 else sources[0])
        if each.arrays:
            layer.set_weights(list(each.arrays.values()))
    return keras.Model(first, tensors[each.name], name="resnet8"), names


def in_dtype(model: object, dtype: str) -> object:
    """Return a copy of the model that computes in `dtype`, with its weights rounded to float32."""
    import keras

    source = json.loads(model.to_json())
    config = with_dtype(source, dtype)
    for index, layer in enumerate(source["config"]["layers"]):
        if layer["class_name"] == "InputLayer" and layer["config"].get("dtype") in HALF_FLOATS:
            config["config"]["layers"][index] = layer  # it rounds the images
    copy = keras.models.model_from_json(json.dumps(config))
    copy.set_weights([np.asarray(weight).astype(np.float32) for weight in model.get_weights()])
    for _, layer in flat_layers(copy):
        if hasattr(layer, "finalize_state"):  # Normalization computes with copies of its weights
            layer.finalize_state()
    return copy


def with_dtype(value: object, dtype: str) -> object:
    """Return a configuration with every "dtype" replaced."""
    if isinstance(value, dict):
        return {key: dtype if key == "dtype" else with_dtype(item, dtype) for key, item in value.items()}
    return [with_dtype(item, dtype) for item in value] if isinstance(value, list) else value


def run_layers(model: object, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the model's output, and every layer's by name (`model/layer` in a nested model), channels last.

    It computes in the dtype of the images; `Model.predict` would round float64 images to float32.
    """
    import tensorflow as tf

    recorded = {}

    def record(path: str, call: Callable, *args: object, **kwargs: object) -> object:
        result = call(*args, **kwargs)
        recorded[path] = np.asarray(result)
        return result

    for path, layer in flat_layers(model):
        layer.call = partial(record, path, layer.call)
    output = tf.nest.flatten(model(images, training=False))[0]  # it may be in a list or a dict
    return np.asarray(output), recorded


def predict(model: object, pixels: np.ndarray, normalization: dict) -> np.ndarray:
    """Return a float32 model's (N, classes) outputs for (N, C, H, W) pixels: compiled, on every core."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, *model.input_shape[1:]], "float32")], autograph=False)
    def compiled(images: tf.Tensor) -> tf.Tensor:
        return tf.nest.flatten(model(images, training=False))[0]

    def run_batch(start: int) -> np.ndarray:
        batch = pixels[start : start + BATCH_SIZE]
        return np.asarray(compiled(normalized(batch, normalization, "float32")))

    compiled.get_concrete_function()  # before the threads
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(run_batch, range(0, len(pixels), BATCH_SIZE))))


def normalized(pixels: np.ndarray, normalization: dict, dtype: str) -> np.ndarray:
    """Return (N, C, H, W) pixels as the model's input: normalized, channels last, in `dtype`."""
    return Normalization(**normalization)(pixels).transpose(0, 2, 3, 1).astype(dtype)


def flat_layers(model: object, prefix: str = "") -> list[tuple[str, object]]:
    """Return (path, layer) of every layer, also of nested models, and of Keras 3's operations."""
    layers = []
    for layer in getattr(model, "operations", model.layers):
        path = f"{prefix}{layer.name}"
        layers += flat_layers(layer, f"{path}/") if hasattr(layer, "layers") else [(path, layer)]
    return layers


def count_parameters(model: object) -> dict[str, int]:
    """Return the numbers of parameters, frozen ones included, and of statistics, of the layers in MAPPING."""
    counts = {"trainable": 0, "statistics": 0}
    for _, layer in flat_layers(model):
        if type(layer).__name__ in ("Conv2D", "BatchNormalization", "Dense"):
            for weight in layer.weights:  # Keras 2 writes `layer/moving_mean:0`
                kind = "statistics" if "/moving_" in f"/{weight.name}" else "trainable"
                counts[kind] += int(np.prod(weight.shape))
    return counts


def run_task(request: dict, arrays: dict[str, np.ndarray]) -> Message:
    """Run the task `request["task"]`. Raises JobError with one line."""
    try:
        if request["task"] == "build":
            return build_model(request, arrays)
        model, names, reason = load(request, arrays)
        if request["task"] == "predict":
            return compute_outputs(model, names, request, arrays)
        return compute_reference(model, names, reason, request, arrays)
    except Exception as error:
        raise JobError(f"Keras fails on the model: {one_line(error)}") from None


def main() -> None:
    """Import Keras, while the caller reads the file, then run the task."""
    gc.set_threshold(GC_THRESHOLD)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the reference is CPU arithmetic
    os.environ["KERAS_BACKEND"] = "tensorflow"
    warnings.simplefilter("ignore")  # PYTHONWARNINGS=error would make errors of Keras's own warnings
    sys.modules["matplotlib"] = None  # Keras would import it: 0.25 s
    try:
        import keras
    except ImportError as error:
        sys.exit(f"{sys.executable} cannot import Keras ({error}): install tensorflow, or see --keras-python")
    keras.backend.set_floatx("float32")  # regardless of the user's keras.json
    keras.backend.set_image_data_format("channels_last")
    serve(run_task)
    gc.freeze()  # no last search for garbage: 1 s


if __name__ == "__main__":
    tempfile.tempdir = sys.argv[1]  # removed by the caller, even if it ends this process
    main()
