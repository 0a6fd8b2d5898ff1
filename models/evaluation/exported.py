"""Networks that `torch.export.save` wrote (`.pt2`), run here node by node, without `torch.export.load`.

That function runs what a file says: it unpickles its sample inputs without a check, and evaluates the sizes
in it as Python (both tried with torch 2.14). Read here are two JSON files and the plain values of tensors;
and a node may call only what stands in OPERATORS: functions of tensors and numbers, none of which opens a
file, or calls anything else.

The format: torch/_export/serde/schema.py and torch/export/pt2_archive/constants.py of PyTorch 2.14.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models.files.state_dict import stored_records

# What a node may call: the operators of exported networks, in training's and in the decomposed form.
OPERATORS = set(
    """
    conv2d.default convolution.default linear.default addmm.default mm.default matmul.default bmm.default
    batch_norm.default _native_batch_norm_legit_no_training.default _native_batch_norm_legit.no_stats
    relu.default relu_.default hardtanh.default hardtanh_.default clamp.default clamp_min.default
    add.Tensor add_.Tensor add.Scalar sub.Tensor mul.Tensor mul.Scalar div.Tensor div.Scalar neg.default
    sqrt.default rsqrt.default reciprocal.default round.default
    constant_pad_nd.default pad.default cat.default slice.Tensor select.int
    adaptive_avg_pool2d.default avg_pool2d.default mean.dim mean.default sum.dim_IntList amax.default
    max_pool2d.default
    flatten.using_ints view.default _unsafe_view.default reshape.default squeeze.dim squeeze.dims
    unsqueeze.default permute.default transpose.int t.default expand.default clone.default alias.default
    detach.default detach_.default contiguous.default dropout.default dropout_.default
    softmax.int _softmax.default log_softmax.int _log_softmax.default exp.default
    to.dtype _to_copy.default sym_size.int lift_fresh_copy.default
    """.split()
)
QUANTIZED = {  # of torchao and torch.ao, PT2E
    f"{verb}_per_{part}.{form}"
    for verb in ("quantize", "dequantize")
    for part in ("tensor", "channel")
    for form in ("default", "tensor")
}
# Of sizes
ARITHMETIC = {name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "getitem")}
# The numbers of ScalarType and MemoryFormat in the schema
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
MAX_JSON_BYTES = 16 * 2**20


class Exported:
    """A network of a `.pt2`: a function of one tensor, that returns one tensor.

    `shape` (None where any size goes, first the batch) and `dtype` are those of what it takes.
    """

    def __init__(self, path: Path) -> None:
        """Read it. Raises ValueError with one line, and for damaged files KeyError and the like."""
        read = stored_records(path)
        models = [name for name in read if name.startswith("models/") and name.endswith(".json")]
        if len(models) != 1:
            raise ValueError(
                f"holds {len(models)} networks as PyTorch 2.9 or newer writes them, expected one: "
                "save it again with torch.export.save"
            )
        name = models[0].removeprefix("models/").removesuffix(".json")
        module = _json(read[models[0]])["graph_module"]
        graph, signature = module["graph"], module["signature"]
        weights = _tensors(read, "data/weights/", f"data/weights/{name}_weights_config.json")
        constants = _tensors(read, "data/constants/", f"data/constants/{name}_constants_config.json")

        self.known, inputs = {}, []  # the tensors by the names of the graph
        for spec in signature["input_specs"]:
            ((role, said),) = spec.items()
            if role == "user_input":
                inputs.append(said["arg"]["as_tensor"]["name"])
            elif role in ("parameter", "buffer"):
                persistent = said.get("persistent", True)
                self.known[said["arg"]["name"]] = (weights if persistent else constants)[said[f"{role}_name"]]
            elif role == "tensor_constant":
                self.known[said["arg"]["name"]] = constants[said["tensor_constant_name"]]
            else:
                raise ValueError(f"takes a {role}, expected one tensor")
        outputs = [
            s["user_output"]["arg"]["as_tensor"] for s in signature["output_specs"] if "user_output" in s
        ]
        if (len(inputs), len(outputs), len(signature["output_specs"])) != (1, 1, 1):
            raise ValueError(
                "expected a network of one input and one output, that changes nothing of its own"
            )
        self.input, self.output = inputs[0], outputs[0]["name"]
        taken = graph["tensor_values"][self.input]
        self.shape = [size.get("as_int") for size in taken["sizes"]]
        self.dtype = DTYPES[taken["dtype"]]
        self.nodes = [(_operator(node["target"]), node["inputs"], node["outputs"]) for node in graph["nodes"]]

    def __call__(self, batch: Tensor) -> Tensor:
        """Return what the network makes of a batch."""
        values = {**self.known, self.input: batch}
        with torch.inference_mode():
            for call, inputs, outputs in self.nodes:
                arguments = {each["name"]: _value(each["arg"], values) for each in inputs}
                found = call(arguments)
                names = [name for each in outputs for name in _names(each)]
                for key, value in zip(
                    names, found if isinstance(found, tuple | list) else [found], strict=True
                ):
                    values[key] = value
        return values[self.output]


def _operator(target: str) -> Callable[[dict], object]:
    """Return what a node calls, as a function of its arguments by name. Raises ValueError for any other."""
    room, _, name = target.removeprefix("torch.ops.").partition(".")
    if room == "_operator" and name in ARITHMETIC:
        return lambda arguments: ARITHMETIC[name](*arguments.values())
    if room == "quantized_decomposed" and name in QUANTIZED:
        from torch.ao.quantization.fx import _decomposed  # noqa: F401  # which defines them
    elif not (target.startswith("torch.ops.aten.") and name in OPERATORS):
        raise ValueError(f"calls {target:.80}, which no network here needs; never run")
    packet, _, overload = name.partition(".")
    called = getattr(getattr(getattr(torch.ops, room), packet), overload)
    return lambda arguments: called(**arguments)


def _value(argument: dict, values: dict) -> object:
    """Return what an argument of a node is: a value of the graph, or what stands in it."""
    ((kind, said),) = argument.items()
    if kind in ("as_tensor", "as_optional_tensor") and "name" in said:
        return values[said["name"]]
    if kind == "as_tensors":
        return [values[each["name"]] for each in said]
    if kind in ("as_sym_int", "as_sym_ints"):
        sizes = [
            values[each["as_name"]] if "as_name" in each else int(each["as_int"])
            for each in ([said] if kind == "as_sym_int" else said)
        ]
        return sizes[0] if kind == "as_sym_int" else sizes
    if kind == "as_none" or (kind == "as_optional_tensor" and "as_none" in said):
        return None
    if kind == "as_scalar_type":
        return DTYPES[said]
    if kind == "as_memory_format":
        return MEMORY_FORMATS[said]
    if kind == "as_layout":
        return torch.strided
    if kind == "as_device":
        return torch.device("cpu")
    if kind in ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string"):
        return said
    raise ValueError(f"a node takes a {kind:.40}, expected tensors and numbers")


def _names(output: dict) -> list[str]:
    """Return the names of what a node returns."""
    ((kind, said),) = output.items()
    return [each["name"] for each in said] if kind == "as_tensors" else [said.get("name") or said["as_name"]]


def _json(content: Callable[[], bytes]) -> dict:
    text = content()
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"its JSON is {len(text):,} bytes long, no ResNet8's")
    return json.loads(text)


def _tensors(read: dict[str, Callable[[], bytes]], folder: str, config: str) -> dict[str, Tensor]:
    """Return the tensors by name that a JSON record lists and other records hold, as plain values."""
    found = {}
    for name, payload in _json(read[config])["config"].items():
        if payload["use_pickle"]:
            raise ValueError(
                f"{name:.80} is a pickled tensor, which is not loaded: contiguous() before export"
            )
        meta = payload["tensor_meta"]
        values = torch.frombuffer(
            bytearray(read[f"{folder}{payload['path_name']}"]()), dtype=DTYPES[meta["dtype"]]
        )
        sizes, strides = ([int(each["as_int"]) for each in meta[key]] for key in ("sizes", "strides"))
        if math.prod(sizes) > values.numel():
            raise ValueError(f"{name:.80} has not the {math.prod(sizes):,} values that its shape says")
        found[name] = values.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"]))
    return found
