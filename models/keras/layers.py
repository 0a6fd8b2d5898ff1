"""A model configuration's layers in graph order, those of nested models among them."""

from __future__ import annotations

from collections.abc import Iterator

from models.common.errors import KerasFileError
from models.keras.container import as_string
from models.keras.file import Layer


def graph_layers(model: dict) -> Iterator[Layer]:
    """Yield a configuration's layers, without their arrays, each after all its inputs; the output is last.

    Raises KerasFileError, naming the layer, unless one input leads through every layer to one output.
    """
    layers: dict[str, Layer] = {}
    output = inline_nested(model, "", None, layers)
    if sum(layer.class_name == "InputLayer" for layer in layers.values()) != 1:
        raise KerasFileError("has several inputs; a ResNet8 has one")

    ordered: dict[str, None] = {}
    pending, waiting = [output], set()
    while pending:  # depth first: a layer is done when all its inputs are
        name = pending[-1]
        if name not in layers:
            raise KerasFileError(f"layer '{name}' is an input of another, but is not in the file")
        missing = [source for source in layers[name].inputs if source not in ordered]
        if missing and name in waiting:
            raise KerasFileError(f"layer '{name}' is an input of itself")
        if missing:
            waiting.add(name)
            pending += missing
        else:
            ordered[pending.pop()] = None
    unused = [name for name in layers if name not in ordered]
    if unused:
        raise KerasFileError(
            f"layer '{unused[0]}' ({layers[unused[0]].class_name}) does not lead to the output"
        )
    for name in ordered:
        yield layers[name]


def inline_nested(model: dict, prefix: str, source: str | None, layers: dict[str, Layer]) -> str:
    """Put the layers of `model` into `layers`, by path; return the path of the one that gives its output.

    A layer's path is `prefix` and its name. A nested model reads the layer at path `source`, and its own
    InputLayer stands for that one; the outermost model has an InputLayer that is one, and no source.
    """
    config = model["config"]
    inline = inline_sequential if model["class_name"] == "Sequential" else inline_functional
    return inline(config, prefix, source, layers)


def inline_sequential(config: dict, prefix: str, source: str | None, layers: dict[str, Layer]) -> str:
    """Do what `inline_nested` does, for a model in which every layer reads the one before it."""
    entries = config["layers"]
    if source is None and entries[0]["class_name"] != "InputLayer":  # Keras may leave it out
        shape = config.get("build_input_shape") or entries[0]["config"].get("batch_input_shape")
        entries = [{"class_name": "InputLayer", "config": {"name": "input", "batch_shape": shape}}, *entries]
    previous = source
    for name, class_name, entry in named_entries(entries):
        path = f"{prefix}{name}"
        inputs = node_inputs(entry, name) if class_name == "InputLayer" else [previous]
        if class_name == "InputLayer" and source is not None:
            continue  # it stands for `source`
        if is_model(entry):
            previous = inline_nested(entry, f"{path}/", inputs[0], layers)
        else:
            add_layer(Layer(path, class_name, entry["config"], tuple(inputs)), layers)
            previous = path
    return previous


def inline_functional(config: dict, prefix: str, source: str | None, layers: dict[str, Layer]) -> str:
    """Do what `inline_nested` does, for a model whose layers say by name which ones they read."""
    first = single_end(config, "input", prefix)
    outputs: dict[str, str] = {}  # name in this model -> path of the layer that gives its output
    own: list[tuple[str, dict, list[str]]] = []  # path, entry, names of the layers that it reads
    for name, class_name, entry in named_entries(config["layers"]):
        inputs = node_inputs(entry, name)
        if name == first and class_name != "InputLayer":
            raise KerasFileError(f"layer '{prefix}{name}' ({class_name}) is an input, expected an InputLayer")
        if name == first and source is not None:
            outputs[name] = source
        else:
            outputs[name] = f"{prefix}{name}"
            own.append((outputs[name], entry, inputs))

    def resolve(name: str) -> str:
        if name not in outputs:
            raise KerasFileError(f"layer '{prefix}{name}' is an input of another, but is not in the file")
        return outputs[name]

    for path, entry, inputs in own:  # in the file's order, in which a model follows its inputs
        if is_model(entry):
            if len(inputs) != 1:
                raise KerasFileError(f"model '{path}' has {len(inputs)} inputs; a ResNet8 has one")
            output = inline_nested(entry, f"{path}/", resolve(inputs[0]), layers)
            outputs[own_name(entry)] = output
    for path, entry, inputs in own:  # now that every nested model's output is known
        if not is_model(entry):
            reads = tuple(map(resolve, inputs))
            add_layer(Layer(path, entry["class_name"], entry["config"], reads), layers)
    return resolve(single_end(config, "output", prefix))


def add_layer(layer: Layer, layers: dict[str, Layer]) -> None:
    """Put a layer into `layers`, by its path; a layer called `m/x` may not stand beside a model m's x."""
    if layer.name in layers:
        raise KerasFileError(f"layer '{layer.name}' is there twice: by its name, and in a model by its path")
    layers[layer.name] = layer


def named_entries(entries: list) -> Iterator[tuple[str, str, dict]]:
    """Yield the name, class name and entry of every layer in a model's configuration.

    Raises KerasFileError for a name that is there twice, cannot be one, or is not the only one of its layer.
    """
    names = set()
    for entry in entries:
        name, class_name = as_string(entry.get("name") or own_name(entry)), as_string(entry["class_name"])
        if name in names or ":" in name or not name.isprintable():
            raise KerasFileError(f"layer '{name}' is there twice, or its name has a colon or control codes")
        if name != own_name(entry):  # the graph would go by one, the tensors by the other
            raise KerasFileError(f"layer '{name}' is also called '{own_name(entry)}'")
        names.add(name)
        yield name, class_name, entry


def own_name(entry: dict) -> str:
    """Return the name in a layer's configuration; an operation such as Cast has it beside that."""
    return as_string(entry["config"].get("name", entry.get("name")))


def is_model(entry: dict) -> bool:
    """Whether an entry in a model's configuration is a model and not a layer."""
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


def node_inputs(entry: dict, name: str) -> list[str]:
    """Return the names of the layers that a layer reads, in its own order."""
    nodes = entry.get("inbound_nodes", [])
    if len(nodes) > 1:
        raise KerasFileError(f"layer '{name}' is used {len(nodes)} times; a ResNet8 shares none")
    found: list[str] = []

    def check_arguments(arguments: dict) -> None:
        for key, value in arguments.items():  # such as training=True, which is another function
            values = value if isinstance(value, list) else [value]
            if key != "inputs" and not all(item is None or item is False for item in values):
                raise KerasFileError(
                    f"layer '{name}' is called with {key}={value!r:.60}, expected no argument"
                )

    def collect(value: object) -> None:
        if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":  # Keras 3
            found.append(as_string(value["config"]["keras_history"][0]))
        elif isinstance(value, list) and len(value) >= 3 and isinstance(value[0], str):
            found.append(value[0])  # Keras 2: [name, 0, 0, {arguments}]
            if len(value) > 3:
                check_arguments(value[3])
                collect(value[3:])
        elif isinstance(value, dict) and "kwargs" in value:  # Keras 3: {"args": [...], "kwargs": {...}}
            # it writes training=True for every augmentation layer, and overrides that at inference
            is_augmentation = str(entry["class_name"]).startswith("Random")
            check_arguments({**value["kwargs"], **({"training": None} if is_augmentation else {})})
            collect(list(value.values()))
        elif isinstance(value, (list, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    collect(nodes)
    return found
