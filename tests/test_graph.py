"""models/graph.py: the table describes our network, layers match by the graph, other networks are refused."""

import json
import operator
import random
import re
import shutil
from types import SimpleNamespace

import h5py
import pytest
import torch
from torch import fx, nn

from convert import convert_file
from models.conversion.stages import print_known
from models.graph import GRAPH, KNOWN_FILES, KNOWN_WIDTHS
from models.resnet8 import ResNet8
from tests.conftest import ROOT
from tests.keras_files.networks import WRITERS
from tests.keras_files.refused import REFUSED, REFUSED_BY_BOTH, WEIGHTS_ALONE_REFUSED

SHARED_FILE = ROOT.parent / "shared/keras/pretrainedResnet.h5"  # the MLPerf Tiny model, Keras 2.4.0

# --- The table and our own network ------------------------------------------------------------------------


class EveryLayer(fx.Tracer):
    """Traces down to the modules without submodules."""

    def is_leaf_module(self, module, name):
        return not list(module.children())


def traced_edges(model):
    """Return the sorted inputs of each node of a network, by GRAPH's names, as torch.fx finds them."""
    modules = dict(model.named_modules())
    names, edges = {}, {}  # of torch.fx's nodes
    for node in EveryLayer().trace(model).nodes:
        sources = [names[source] for source in node.all_input_nodes]
        if node.op == "placeholder":
            names[node] = "input"
        elif node.op == "output" or node.target is torch.flatten:
            names[node] = sources[0]
        else:
            if node.target in (operator.add, operator.iadd):
                name = f"{sources[0].rpartition('.')[0]}.add"
            elif isinstance(modules[node.target], nn.ReLU) and "." in node.target:  # a block's runs twice
                name = f"{node.target}{1 + (f'{node.target}1' in edges)}"
            else:
                name = node.target
            assert name not in edges, f"{name} runs twice"
            names[node], edges[name] = name, sorted(sources)
    return edges


def test_graph_is_the_networks_own():
    assert traced_edges(ResNet8()) == {name: sorted(node.inputs) for name, node in GRAPH.items()}


def test_graph_has_the_networks_layers():
    model = ResNet8(width=5)
    classes = {
        "Conv2d": "Conv2D",
        "SamePadConv2d": "Conv2D",
        "BatchNorm2d": "BatchNormalization",
        "AdaptiveAvgPool2d": "GlobalAveragePooling2D",
        "Linear": "Dense",
    }
    for node, (required, _, filters) in GRAPH.items():
        if node.endswith(".add"):
            assert required["class_name"] == ["Add"]
            continue
        module = model.get_submodule(node.rstrip("12") if ".relu" in node else node)
        name = type(module).__name__
        assert classes.get(name, name) == required["class_name"][0], node
        if isinstance(module, nn.Conv2d):
            assert [list(module.kernel_size)] == required["kernel_size"], node
            assert [list(module.stride)] == required["strides"], node
            assert module.out_channels == 5 * filters, node


# --- Published models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", KNOWN_WIDTHS)
def test_known_multiply_accumulates(width):
    counted, model = [], ResNet8(width=width).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, _, out: counted.append(out[0].numel() * m.weight[0].numel())
            )
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    assert sum(counted) == KNOWN_WIDTHS[width][1]


@pytest.mark.parametrize(
    ("sha256", "network", "size", "words"),
    [
        ("other", (10, 16, 3), (32, 32), "width 16 IC01 12.5"),
        ("other", (10, 40, 3), (32, 32), "width 40 IC02 76.5"),
        ("other", (10, 26, 3), (32, 32), "width 26 pretrainedResnet.h5 32.6"),
        (next(iter(KNOWN_FILES)), (10, 16, 3), (32, 32), "IC01 12.5"),
        ("other", (10, 17, 3), (32, 32), ""),
        ("other", (100, 16, 3), (32, 32), ""),
        ("other", (10, 16, 1), (32, 32), ""),
        ("other", (10, 16, 3), (64, 64), ""),
        ("other", (10, 16, 3), (None, None), ""),
    ],
)
def test_known_models_are_named(capsys, sha256, network, size, words):
    with torch.device("meta"):
        print_known(SimpleNamespace(sha256=sha256, input_shape=[*size, network[2]]), ResNet8(*network))
    printed = capsys.readouterr().out
    assert all(word in printed for word in words.split()) and bool(printed) == bool(words)
    assert ("width" in printed) == ("width" in words)


# --- The graph, not the order or the names ----------------------------------------------------------------


def inputs_of(entry):
    """Return the names of the input layers of an entry of model_config, in its order."""
    if entry["inbound_nodes"] and isinstance(entry["inbound_nodes"][0], list):  # Keras 2
        return [source for source, *_ in entry["inbound_nodes"][0]]
    return re.findall(r'"keras_history": \["([^"]+)"', json.dumps(entry["inbound_nodes"]))


def renamed(value, names):
    if isinstance(value, dict):
        return {key: renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def rewrite(path, target, rng, order=False, names=False, adds=False, keras2=False):
    """Write an equal `.h5` file in another way.

    `order` shuffles the layers; `names` gives each layer another's name or a misleading one; `adds` swaps the
    inputs of each Add; `keras2` writes inbound_nodes as Keras 2 does.
    """
    shutil.copy(path, target)
    target.chmod(0o644)
    with h5py.File(target, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        layers = config["config"]["layers"]
        for entry in layers:
            sources = inputs_of(entry)
            if adds and entry["class_name"] == "Add":
                nodes = entry["inbound_nodes"][0]
                (nodes if isinstance(nodes, list) else nodes["args"][0]).reverse()
                assert inputs_of(entry) == sources[::-1] and len(sources) == 2
            if keras2 and sources:
                entry["inbound_nodes"] = [[[source, 0, 0, {}] for source in inputs_of(entry)]]
        if order:
            rng.shuffle(layers)
        if names:
            old = [entry["config"]["name"] for entry in layers]
            half = len(old) // 2
            new = old[:half] + [f"conv2d_{index}_dense" for index in range(len(old) - half)]
            rng.shuffle(new)
            new_names = dict(zip(old, new, strict=True))
            config, weights = renamed(config, new_names), file["model_weights"]
            for name in old:
                weights.move(name, f"moving:{name}")
            for name in old:
                weights.move(f"moving:{name}", new_names[name])
            listed = [
                str(name, "utf-8") if isinstance(name, bytes) else name
                for name in weights.attrs["layer_names"]
            ]
            weights.attrs["layer_names"] = [new_names[name] for name in listed]
        file.attrs["model_config"] = json.dumps(config)


REWRITTEN = {
    "all": {"order": True, "names": True, "adds": True},
    "keras2": {"order": True, "names": True, "adds": True, "keras2": True},
}


@pytest.mark.parametrize("how", REWRITTEN)
@pytest.mark.parametrize("name", ["odd", "shared"])
def test_order_and_names_are_not_used(reference_files, tmp_path, name, how):
    path = SHARED_FILE if name == "shared" else reference_files / f"{name}.h5"
    if not path.exists():
        pytest.skip(f"{path} not found")
    convert_file(path, tmp_path / "plain.pt")
    expected = torch.load(tmp_path / "plain.pt", weights_only=True)
    for seed in range(2):
        rewrite(path, tmp_path / "rewritten.h5", random.Random(seed), **REWRITTEN[how])
        convert_file(tmp_path / "rewritten.h5", tmp_path / "rewritten.pt")
        state = torch.load(tmp_path / "rewritten.pt", weights_only=True)
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)


# --- Other networks are refused, naming the layer, its class or option and the expected one ---------------


@pytest.mark.parametrize(
    ("writer", "name"),
    [("keras", name) for name in REFUSED] + [("tf_keras", name) for name in REFUSED_BY_BOTH],
)
def test_another_function_is_refused(keras_files, refusal, writer, name):
    suffix = {"keras": ".h5", "tf_keras": ".keras"}[writer]
    message = refusal(keras_files / writer / "refused" / f"{name}{suffix}")
    words = set(re.findall(r"[\w.-]+", message.lower()))
    missing = [word for word in REFUSED[name][1].lower().split() if not any(word in found for found in words)]
    assert not missing, f"{missing} not in: {message}"
    assert "damaged" not in message and "Error" not in message, message


def test_another_network_is_described_first(keras_files, refusal):
    """A ResNet8 with one other layer is described by that layer."""
    folder = keras_files / "keras" / "refused"
    for name in ("perceptron", "depthwise_separable", "two_stages"):
        assert refusal(folder / f"{name}.h5").startswith("not a ResNet8")
    assert refusal(folder / "conv_tanh.h5").startswith("layer 'odd' (Conv2D)")


@pytest.mark.parametrize(
    ("writer", "name"), [(writer, name) for writer, names in WEIGHTS_ALONE_REFUSED.items() for name in names]
)
def test_weights_alone_of_another_network_are_refused(keras_files, refusal, writer, name):
    message = refusal(keras_files / writer / "refused" / f"{name}.weights.h5")
    assert all(word in message for word in WEIGHTS_ALONE_REFUSED[writer][name].split()), message


@pytest.mark.parametrize("name", ["no_scale", "no_center"])
def test_weights_alone_without_gamma_or_beta_are_refused(keras_files, refusal, name):
    """Three vectors can be gamma or beta with the statistics: only names could tell."""
    assert "gamma or beta" in refusal(keras_files / "keras" / f"{name}.weights.h5")


@pytest.mark.parametrize("writer", WRITERS)
def test_weights_alone_of_nested_models_are_refused(keras_files, refusal, writer):
    """Running numbers order the layers of one model, but not those of a model and of another inside it."""
    message = refusal(keras_files / writer / "nested_stages.weights.h5")
    assert "'batch_normalization'" in message and "'functional/batch_normalization'" in message
