"""Model configurations: checked against a whitelist of classes, and converted to layers in graph order."""

from __future__ import annotations

import json
import re
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from models.common.cli import KerasFileError
from models.graph import DEFAULTS, OPERATIONS
from models.keras.file import FLOATS, TRAINING_LAYERS, Layer

MAX_CONFIG_BYTES = 4 * 2**20

# Classes allowed in a configuration; one with any other never reaches Keras. Classes in the last three lines
# are harmless, and refused by `conversion/match.py`, which names the node.
KERAS_CLASSES = TRAINING_LAYERS | set(
    """
    Functional Model Sequential InputLayer __keras_tensor__ DTypePolicy Policy SeedGenerator
    Conv2D BatchNormalization Activation ReLU Softmax Add Dense Flatten Cast Relu TFOpLambda
    GlobalAveragePooling2D AveragePooling2D Rescaling Normalization
    Zeros Ones Constant Orthogonal Identity VarianceScaling RandomNormal RandomUniform TruncatedNormal
    HeNormal HeUniform GlorotNormal GlorotUniform LecunNormal LecunUniform
    L1 L2 L1L2 OrthogonalRegularizer MaxNorm NonNeg UnitNorm MinMaxNorm
    DepthwiseConv2D SeparableConv2D Conv2DTranspose Conv1D Conv3D ZeroPadding2D Cropping2D Resizing Reshape
    MaxPooling2D GlobalMaxPooling2D Subtract Multiply Average Maximum Concatenate Permute UpSampling2D
    LeakyReLU PReLU ELU LayerNormalization GroupNormalization CenterCrop RandomCrop Embedding
    """.split()
)
CUSTOM_CLASSES = {  # pattern of a class name, without its package -> library and next step
    "PruneLowMagnitude": "tfmot's: save tfmot.sparsity.keras.strip_pruning(model)",
    r"QuantizedDTypePolicy|Int\dQuantization|AbsMaxQuantizer": "Keras's: save it before quantize()",
    "Quantize": "tfmot's: export the model to .tflite, which evaluate.py evaluates",
    "Quant": "Larq's, which computes with quantized weights: save the float model",
    "Q": "QKeras's, which computes with quantized weights: save the float model",
}
KERAS_MODULE = re.compile(
    r"(tf_keras|keras|keras\.src|tf_keras\.src)"
    r"(\.(layers|models|initializers|regularizers|constraints|random|(engine|models)\.(functional|sequential|training)"
    r"|ops\.(numpy|core|nn)|layers\.core\.tf_op_layer"
    r"|(backend\.)?dtype_policies(\.dtype_policy)?|mixed_precision))?"
)


def parse_json(source: str, name: str) -> dict:
    """Return a JSON object. Raises KerasFileError if it is too large or nested too deep."""
    if len(source) > MAX_CONFIG_BYTES:
        raise KerasFileError(f"{name} has {len(source):,} bytes, too many for a ResNet8")
    try:
        value = json.loads(source)
    except RecursionError:
        raise KerasFileError(f"{name} is nested hundreds of levels deep") from None
    except ValueError as error:
        raise KerasFileError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise KerasFileError(f"{name} is a JSON {type(value).__name__}, expected an object")
    return value


def as_string(value: object) -> str:
    """Return a string, which HDF5 may return as bytes. Raises KerasFileError for another type."""
    value = value.decode() if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise KerasFileError(f"holds a value of type {type(value).__name__}, expected a string")
    return value


def check_classes(config: dict) -> None:
    """Raise KerasFileError for a configuration that makes Keras do more than build its own known layers.

    Removes `compile_config` (optimizer and loss, which are not needed and name classes), and the options of
    LoRA, which a `.keras` file has added to the kernel. NumPy arrays become lists.
    """
    pending: list[object] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        if isinstance(value, dict):
            for key in ("compile_config", "lora_rank", "lora_alpha"):
                value.pop(key, None)
            value.update({key: plain_numbers(inner) for key, inner in value.items()})
            pending += value.values()
            is_object = value.get("class_name") is not None and "config" in value
            if is_object or "module" in value or "registered_name" in value:
                check_class(value)


def plain_numbers(value: object) -> object:
    """Return a serialized NumPy array of floats as a list of numbers; anything else unchanged."""
    is_array = isinstance(value, dict) and value.get("class_name") == "__numpy__"
    array = value.get("config") if is_array else None
    if not isinstance(array, dict) or array.get("dtype") not in ("float32", "float64"):
        return value
    numbers = array.get("value")
    listed = numbers if isinstance(numbers, list) else [numbers]
    return numbers if all(type(number) in (int, float) for number in listed) else value


def check_class(value: dict) -> None:
    """Raise KerasFileError, which names the layer, unless an object is of an allowed class of Keras."""
    name, inner = value.get("class_name"), value.get("config")
    options = inner if isinstance(inner, dict) else {}
    layer = options.get("name", value.get("name", "")) if isinstance(inner, dict) else inner
    where = f"layer '{layer}'" if isinstance(layer, str) and layer else "model_config"
    advice = "custom classes are not supported"
    if not isinstance(name, str) or name not in KERAS_CLASSES:
        class_name = str(name).rpartition(">")[2]
        known = [text for pattern, text in CUSTOM_CLASSES.items() if re.match(pattern, class_name)]
        reason = f"of class {name}" + (f" ({known[0]})" if known else "")
        raise KerasFileError(f"{where} is {reason}, which a ResNet8 does not have; {advice}")
    if name == "Cast" and options.get("dtype") not in FLOATS:
        dtype = f"{options.get('dtype')!r:.60}"
        raise KerasFileError(f"{where} (Cast): dtype is {dtype}, expected a floating-point dtype")
    if name == "TFOpLambda" and options.get("function") not in list(OPERATIONS):  # of any type
        raise KerasFileError(f"{where} is the operation {options.get('function')!r:.60}; {advice}")
    module, registered = value.get("module"), value.get("registered_name")
    if module is not None and not (isinstance(module, str) and KERAS_MODULE.fullmatch(module)):
        raise KerasFileError(f"{where}: {name} is from module {module}, expected one of Keras; {advice}")
    if registered is not None and registered != name:
        raise KerasFileError(f"{where}: {name} is registered as {registered}; {advice}")


def graph_layers(model: dict) -> list[Layer]:
    """Return a configuration's layers, without their arrays, each after all its inputs; the output is last.

    Raises KerasFileError, which names the layer, unless one input leads through every layer to one output.
    """
    layers: dict[str, Layer] = {}
    output = add_model(model, "", None, layers)
    if sum(layer.class_name == "InputLayer" for layer in layers.values()) != 1:
        raise KerasFileError("has several inputs; a ResNet8 has one")
    inputs = {name: layer.inputs for name, layer in layers.items()}
    try:
        order = list(TopologicalSorter(inputs).static_order())
    except CycleError as error:
        raise KerasFileError(f"layer '{error.args[1][0]}' is an input of itself") from None
    used = {output}.union(*inputs.values())
    for name in order:
        if name not in layers:
            raise KerasFileError(f"layer '{name}' is an input of another, but is not in the file")
        if name not in used:
            raise KerasFileError(f"layer '{name}' ({layers[name].class_name}) does not lead to the output")
    return [layers[name] for name in order]


def add_model(model: dict, prefix: str, source: str | None, layers: dict[str, Layer]) -> str:
    """Add the layers of `model` to `layers`, by path (`prefix` and name); return its output layer's path.

    The InputLayer of a nested model is replaced by the layer at path `source`; the outermost model has none.
    """
    is_sequential = model["class_name"] == "Sequential"
    entries = by_name(sequential_entries(model["config"]) if is_sequential else model["config"]["layers"])
    inputs = {name: input_names(entry, name) for name, entry in entries.items()}
    if is_sequential:
        names = list(entries)
        first, last = names[0], names[-1]
        inputs.update({name: [previous] for previous, name in pairwise(names)})
    else:
        first, last = (single_end(model["config"], end, prefix) for end in ("input", "output"))
    outputs = {name: f"{prefix}{name}" for name in entries}  # path of the layer that computes the output
    if first in entries:
        class_name = entries[first]["class_name"]
        if class_name != "InputLayer":
            raise KerasFileError(
                f"layer '{prefix}{first}' ({class_name}) is an input, expected an InputLayer"
            )
        if source is not None:
            outputs[first] = source
            del entries[first]

    def resolve(name: str) -> str:
        if name not in outputs:
            raise KerasFileError(f"layer '{prefix}{name}' is an input of another, but is not in the file")
        return outputs[name]

    for name, entry in entries.items():  # a nested model follows its inputs in the file
        if is_model(entry):
            if len(inputs[name]) != 1:
                raise KerasFileError(
                    f"model '{prefix}{name}' has {len(inputs[name])} inputs; a ResNet8 has one"
                )
            outputs[name] = add_model(entry, f"{prefix}{name}/", resolve(inputs[name][0]), layers)
    for name, entry in entries.items():  # every nested model's output is known now
        path = f"{prefix}{name}"
        if path in layers and not is_model(entry):  # named `m/x`, beside layer x of a nested model m
            raise KerasFileError(f"layer '{path}' is there twice: by its name, and in a model by its path")
        if not is_model(entry):
            layers[path] = as_layer(path, entry, tuple(map(resolve, inputs[name])))
    return resolve(last)


def as_layer(path: str, entry: dict, inputs: tuple[str, ...]) -> Layer:
    """Return an entry as a layer, with Keras's defaults; an operation as the layer that computes the same."""
    class_name, config = entry["class_name"], entry["config"]
    operation = config["function"] if class_name == "TFOpLambda" else class_name
    class_name = OPERATIONS.get(operation, class_name)
    return Layer(path, class_name, {**DEFAULTS.get(class_name, {}), **config}, inputs)


def sequential_entries(config: dict) -> list[dict]:
    """Return the entries of a Sequential model, with its InputLayer, which Keras may omit."""
    entries = config["layers"]
    if entries[0]["class_name"] == "InputLayer":
        return entries
    shape = config.get("build_input_shape") or entries[0]["config"].get("batch_input_shape")
    return [{"class_name": "InputLayer", "config": {"name": "input", "batch_shape": shape}}, *entries]


def by_name(entries: list[dict]) -> dict[str, dict]:
    """Return layers by name. Raises KerasFileError for a name that is invalid, repeated or ambiguous."""
    named: dict[str, dict] = {}
    for entry in entries:
        name = as_string(entry.get("name") or own_name(entry))
        if name in named or ":" in name or not name.isprintable():
            raise KerasFileError(f"layer '{name}' is there twice, or its name has a colon or control codes")
        if name != own_name(entry):  # the graph would use one, the tensors the other
            raise KerasFileError(f"layer '{name}' is also called '{own_name(entry)}'")
        named[name] = {**entry, "class_name": as_string(entry["class_name"])}
    return named


def own_name(entry: dict) -> str:
    """Return the name in a layer's configuration; an operation such as Cast has it beside that."""
    return as_string(entry["config"].get("name", entry.get("name")))


def is_model(entry: dict) -> bool:
    """Whether an entry in a model's configuration is a nested model."""
    return "layers" in entry["config"]


def single_end(config: dict, end: str, prefix: str) -> str:
    """Return the name of the only "input" or "output" layer of the Functional model at `prefix`."""
    ends = config[f"{end}_layers"]
    ends = list(ends.values()) if isinstance(ends, dict) else ends
    ends = ends if isinstance(ends[0], list) else [ends]
    if len(ends) != 1:
        model = f"model '{prefix.rstrip('/')}' " if prefix else ""
        raise KerasFileError(f"{model}has {len(ends)} {end}s; a ResNet8 has one")
    return as_string(ends[0][0])


def input_names(entry: dict, name: str) -> list[str]:
    """Return the names of a layer's input layers, in its own order.

    Raises KerasFileError for a layer that is called twice, or with an argument such as training=True. A
    TFOpLambda has its second input as the argument y.
    """
    nodes = entry.get("inbound_nodes", [])
    if len(nodes) > 1:
        raise KerasFileError(f"layer '{name}' is used {len(nodes)} times; a ResNet8 shares none")
    names: list[str] = []
    allowed = ("inputs", "y", "name") if entry["class_name"] == "TFOpLambda" else ("inputs",)

    def check_arguments(arguments: dict) -> None:
        for key, value in arguments.items():
            values = value if isinstance(value, list) else [value]
            if key not in allowed and not all(item is None or item is False for item in values):
                raise KerasFileError(
                    f"layer '{name}' is called with {key}={value!r:.60}, expected no argument"
                )

    def collect(value: object) -> None:
        if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":  # Keras 3
            names.append(as_string(value["config"]["keras_history"][0]))
        elif isinstance(value, list) and len(value) >= 3 and isinstance(value[0], str):
            names.append(value[0])  # Keras 2: [name, 0, 0, {arguments}]
            if len(value) > 3:
                check_arguments(value[3])
                collect(value[3:])
        elif isinstance(value, dict):
            if "kwargs" in value:  # Keras 3: {"args": [...], "kwargs": {...}}
                # it writes training=True for every augmentation layer, and overrides it at inference
                is_augmentation = entry["class_name"].startswith("Random")
                check_arguments({**value["kwargs"], **({"training": None} if is_augmentation else {})})
            collect(list(value.values()))
        elif isinstance(value, list):
            for item in value:
                collect(item)

    collect(nodes)
    return names
