"""models/graph.py: the table is our network's, files' layers find their places, other networks none."""

import json
import operator
import random
import re
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from torch import fx, nn

from convert import convert_file
from models.conversion.stages import print_known
from models.graph import GRAPH, KNOWN_FILES, KNOWN_WIDTHS
from models.keras.file import read_keras_file
from models.resnet8 import BasicBlock, ResNet8
from tests.conftest import ROOT
from tests.keras_files.edits import edit_config
from tests.keras_files.networks import WRITERS
from tests.keras_files.references import MODELS
from tests.keras_files.refused import REFUSED, WEIGHTS_ALONE_REFUSED

SHARED_FILE = ROOT.parent / "shared/keras/pretrainedResnet.h5"  # the MLPerf Tiny model, Keras 2.4.0


# The table and our own network


class EveryLayer(fx.Tracer):
    """Traces down to the modules that have none inside."""

    def is_leaf_module(self, module, name):
        return not list(module.children())


def traced_edges(model):
    """Return the places that each place of a network reads, by GRAPH's names, as torch.fx finds them."""
    modules = dict(model.named_modules())
    places, edges = {}, {}  # a node's place; the places that a place reads
    for node in EveryLayer().trace(model).nodes:
        sources = [places[source] for source in node.all_input_nodes]
        if node.op == "placeholder":
            places[node] = "input"
        elif node.op == "output" or node.target is torch.flatten:
            places[node] = sources[0]
        else:
            if node.target in (operator.add, operator.iadd):
                place = f"{sources[0].rpartition('.')[0]}.add"
            elif isinstance(modules[node.target], nn.ReLU) and "." in node.target:  # a block's runs twice
                place = f"{node.target}{1 + (f'{node.target}1' in edges)}"
            else:
                place = node.target
            assert place not in edges, f"{place} runs twice"
            places[node], edges[place] = place, sorted(sources)
    return edges


def test_graph_is_the_networks_own():
    """The two statements of the architecture agree: the same places, and for each the same that it reads."""
    assert traced_edges(ResNet8()) == {place: sorted(row.reads) for place, row in GRAPH.items()}


def test_graph_has_the_networks_layers():
    """And at each place is the same layer: its kind, and a convolution's kernel, strides and filters."""
    model = ResNet8(width=5)
    kinds = {nn.Conv2d: "Conv2D", nn.BatchNorm2d: "BatchNormalization", nn.ReLU: "ReLU", nn.Linear: "Dense"}
    kinds[nn.AdaptiveAvgPool2d] = "GlobalAveragePooling2D"
    for place, (required, _, filters) in GRAPH.items():
        if place.endswith(".add"):
            assert required["class_name"] == ["Add"]
            continue
        name = place.rstrip("12") if ".relu" in place else place
        module = model.get_submodule(name)
        (kind,) = [kind for module_class, kind in kinds.items() if isinstance(module, module_class)]
        assert kind == required["class_name"][0], place
        if kind == "Conv2D":
            assert [list(module.kernel_size)] == required["kernel_size"], place
            assert [list(module.stride)] == required["strides"], place
            assert module.out_channels == 5 * filters, place


def test_a_network_without_one_of_its_relus_is_another(monkeypatch):
    """The first of the two tests above is no idle one."""

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x += shortcut
        return x

    monkeypatch.setattr(BasicBlock, "forward", forward)
    expected = {place: sorted(row.reads) for place, row in GRAPH.items()}
    found = traced_edges(ResNet8())
    assert expected.keys() - found.keys() == {f"layer{number}.relu2" for number in (1, 2, 3)}
    assert found["avgpool"] == ["layer3.add"]


# Which model it is


@pytest.mark.parametrize("width", KNOWN_WIDTHS)
def test_known_multiply_accumulates(width):
    counted = []
    model = ResNet8(width=width).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda module, _, output: counted.append(output[0].numel() * module.weight[0].numel())
            )
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    assert sum(counted) == KNOWN_WIDTHS[width][1]


KNOWN = {  # (SHA-256, network, image size) -> what is named of it
    ("other", (10, 16, 3), (32, 32)): "16 IC01 12.5",
    ("other", (10, 40, 3), (32, 32)): "40 IC02 76.5",
    ("other", (10, 26, 3), (32, 32)): "26 pretrainedResnet.h5 32.6",
    (*KNOWN_FILES, (10, 16, 3), (32, 32)): "IC01 12.5",
    ("other", (10, 17, 3), (32, 32)): "",
    ("other", (100, 16, 3), (32, 32)): "",
    ("other", (10, 16, 1), (32, 32)): "",
    ("other", (10, 16, 3), (64, 64)): "",
    ("other", (10, 16, 3), (None, None)): "",
}


@pytest.mark.parametrize("known", KNOWN)
def test_which_model_it_is(capsys, known):
    sha256, network, size = known

    def said_of(sha256):
        with torch.device("meta"):
            print_known(SimpleNamespace(sha256=sha256, input_shape=[*size, network[2]]), ResNet8(*network))
        return capsys.readouterr().out

    said = said_of(sha256)
    assert len(said.splitlines()) == bool(KNOWN[known])
    assert all(word in said for word in KNOWN[known].split())
    assert (said == said_of("other")) == (sha256 == "other")  # a shape may be another's


def test_which_file_it_is(reader, tmp_path, capsys):
    if not SHARED_FILE.exists():
        pytest.skip(f"{SHARED_FILE} is not there")
    convert_file(SHARED_FILE, tmp_path / "model.pt", reader)
    lines = capsys.readouterr().out.splitlines()
    assert "2.4.0" in lines[0] and "IC01" in lines[1]


# The graph, not the order or the names


def inputs_of(entry):
    """Return the layers that an entry of model_config reads, in its order."""
    if entry["inbound_nodes"] and isinstance(entry["inbound_nodes"][0], list):  # Keras 2
        return [source for source, *_ in entry["inbound_nodes"][0]]
    return re.findall(r'"keras_history": \["([^"]+)"', json.dumps(entry["inbound_nodes"]))


def rewrite(path, target, rng, order=False, names=False, adds=False, keras2=False):
    """Write a `.h5` file that says the same in another way.

    `order` shuffles the layers; `names` gives each layer another's name or a misleading one; `adds` swaps
    what each Add adds; `keras2` writes inbound_nodes as Keras 2 does.
    """
    shutil.copy(path, target)
    target.chmod(0o644)
    with h5py.File(target, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        layers = config["config"]["layers"]
        for entry in layers:
            sources = inputs_of(entry)
            if adds and entry["class_name"] == "Add":
                assert len(sources) == 2
                nodes = entry["inbound_nodes"][0]
                (nodes if isinstance(nodes, list) else nodes["args"][0]).reverse()
                assert inputs_of(entry) == sources[::-1]
            if keras2 and sources:
                entry["inbound_nodes"] = [[[source, 0, 0, {}] for source in inputs_of(entry)]]
        if order:
            rng.shuffle(layers)
        if names:
            old = [entry["config"]["name"] for entry in layers]
            new = old[: len(old) // 2] + [
                f"conv2d_{index}_dense" for index in range(len(old) - len(old) // 2)
            ]
            rng.shuffle(new)
            new_name = dict(zip(old, new, strict=True))

            def renamed(value):
                if isinstance(value, dict):
                    return {key: renamed(item) for key, item in value.items()}
                if isinstance(value, list):
                    return [renamed(item) for item in value]
                return new_name.get(value, value) if isinstance(value, str) else value

            config = renamed(config)
            weights = file["model_weights"]
            for name in old:
                weights.move(name, f"moving:{name}")
            for name in old:
                weights.move(f"moving:{name}", new_name[name])
            listed = [
                new_name[text if isinstance(text, str) else text.decode()]
                for text in weights.attrs["layer_names"]
            ]
            weights.attrs["layer_names"] = listed
        file.attrs["model_config"] = json.dumps(config)


REWRITTEN = {
    "order": {"order": True},
    "names": {"names": True},
    "adds": {"adds": True},
    "all": {"order": True, "names": True, "adds": True},
    "keras2": {"order": True, "names": True, "adds": True, "keras2": True},
}


@pytest.mark.parametrize("how", REWRITTEN)
@pytest.mark.parametrize("name", [*MODELS, "shared"])
def test_order_and_names_say_nothing(reference_files, reader, tmp_path, name, how):
    path = SHARED_FILE if name == "shared" else reference_files / f"{name}.h5"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    convert_file(path, tmp_path / "plain.pt", reader)
    expected = torch.load(tmp_path / "plain.pt", weights_only=True)
    for seed in range(3):
        rewrite(path, tmp_path / "rewritten.h5", random.Random(seed), **REWRITTEN[how])
        convert_file(tmp_path / "rewritten.h5", tmp_path / "rewritten.pt", reader)
        state = torch.load(tmp_path / "rewritten.pt", weights_only=True)
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_rewriting_really_moves_names_and_order(reference_files, tmp_path, reader):
    """The test above is no idle one: by its names or its order, the rewritten file is another network."""
    rewrite(reference_files / "odd.h5", tmp_path / "odd.h5", random.Random(0), **REWRITTEN["all"])
    before, after = (read_keras_file(path / "odd.h5", reader) for path in (reference_files, tmp_path))

    def names_in_order(file):
        return [entry["config"]["name"] for entry in file.config["config"]["layers"]]

    assert names_in_order(before) != names_in_order(after)
    kernels = [{layer.name: layer.arrays.get("kernel") for layer in file.layers} for file in (before, after)]
    kernels = [{name: kernel for name, kernel in found.items() if kernel is not None} for found in kernels]
    assert len(kernels[0]) == len(kernels[1]) == 10
    assert not [name for name in kernels[0] if np.array_equal(kernels[0][name], kernels[1].get(name))]


# What is no ResNet8 is refused, in one line that names the layer, what it is and what was expected


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_computes_something_else(keras_files, refusal, name, suffix, writer):
    message = refusal(keras_files / writer / "refused" / f"{name}{suffix}")
    words = set(re.findall(r"[\w.-]+", message.lower()))
    missing = [word for word in REFUSED[name][1].lower().split() if not any(word in found for found in words)]
    assert not missing, f"{missing} not in: {message}"
    assert "Error" not in message, message


def test_another_network_is_told_that_first(keras_files, refusal):
    """And a ResNet8 with one odd layer is told of that layer."""
    for name in ("perceptron", "depthwise_separable", "two_stages"):
        message = refusal(keras_files / "keras" / "refused" / f"{name}.keras")
        counts = re.findall(r"\b\d+\b", message)[:6]  # what it has, and a ResNet8
        assert {"9", "1", "7"} <= set(counts), message
    message = refusal(keras_files / "keras" / "refused" / "conv_tanh.keras")
    assert "odd" in message and "BatchNormalization" not in message


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", WEIGHTS_ALONE_REFUSED)
def test_refuses_weights_alone_of_another_network(keras_files, refusal, name, writer):
    message = refusal(keras_files / writer / "refused" / f"{name}.weights.h5")
    words = WEIGHTS_ALONE_REFUSED[name].split()
    assert all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message) for word in words), message


@pytest.mark.parametrize("name", ["no_scale", "no_center"])
def test_refuses_weights_alone_that_are_not_unique(keras_files, refusal, name):
    """Three vectors may be gamma or beta with the statistics: only names could tell."""
    message = refusal(keras_files / "keras" / f"{name}.weights.h5")
    assert all(word in message for word in ("batch_normalization", "gamma", "beta")), message


@pytest.mark.parametrize("writer", WRITERS)
def test_refuses_weights_alone_of_nested_models(keras_files, refusal, writer):
    """Running numbers order the layers of one model, but not those of a model and of another inside it."""
    message = refusal(keras_files / writer / "nested_stages.weights.h5")
    assert "functional/batch_normalization" in message and "(4,)" in message


def test_refuses_channels_first(keras_files, refusal, tmp_path):
    """Keras on a CPU cannot build it, but a file can say it; nothing else about the file would change."""
    path = tmp_path / "model.h5"
    path.write_bytes((keras_files / "keras" / "plain.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        config = file.attrs["model_config"]
        changed = config.replace('"data_format": "channels_last"', '"data_format": "channels_first"', 1)
        assert changed != config
        file.attrs["model_config"] = changed
    message = refusal(path)
    assert all(word in message for word in ("conv2d", "data_format", "channels_first", "channels_last"))


# The configuration of a model in a model


def test_layer_called_as_another_inside_a_model_is_refused(edited, refusal):
    """The tanh `odd` in the model `m` would give way to a layer beside `m` that is called m/odd."""

    def change(config):
        return json.loads(json.dumps(config).replace('"drop"', '"m/odd"'))

    message = refusal(edited(edit_config(change), "refused/nested_tanh.h5"))
    assert "m/odd" in message


def test_model_inside_that_is_called_with_two_inputs_is_refused(edited, refusal):
    """Though it has one: the other would be left out."""

    def change(config):
        (model,) = [entry for entry in config["config"]["layers"] if "layers" in entry["config"]]
        call = model["inbound_nodes"][0]
        call["args"] = [call["args"] * 2]

    message = refusal(edited(edit_config(change), "nested.h5"))
    assert "functional" in message and re.search(r"\b2\b", message)


def test_input_that_is_no_input_layer_is_refused(edited, refusal):
    """Keras would cut off what stands before it."""

    def change(config):
        config["config"]["input_layers"] = ["re_lu", 0, 0]

    message = refusal(edited(edit_config(change)))
    assert "re_lu" in message and "InputLayer" in message


def test_layer_with_two_names_is_refused(edited, refusal):
    """The graph would go by one of them, and the tensors by the other."""

    def change(config):
        first, second = [entry for entry in config["config"]["layers"] if entry["class_name"] == "ReLU"][:2]
        first["config"]["name"], second["config"]["name"] = "re_lu_1", "re_lu"

    message = refusal(edited(edit_config(change)))
    assert re.search(r"\bre_lu\b", message) and "re_lu_1" in message


@pytest.mark.parametrize("epsilon", [-1.0, float("nan"), "0.001", None, True, 10**400, [0.001]])
def test_epsilon_that_is_none_is_refused(edited, refusal, epsilon):
    def change(config):
        for layer in config["config"]["layers"]:
            if layer["class_name"] == "BatchNormalization":
                layer["config"]["epsilon"] = epsilon

    assert "epsilon" in refusal(edited(edit_config(change)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": 1e-300}, {"offset": float("inf")}])
def test_rescaling_that_is_none_is_refused(edited, refusal, options):
    """In one line, without a warning of numpy's beside it."""

    def change(config):
        (layer,) = [layer for layer in config["config"]["layers"] if layer["class_name"] == "Rescaling"]
        layer["config"] |= options

    assert "inf" in refusal(edited(edit_config(change), "rescaling.h5"))
