"""convert.py: the mapping, parity with Keras in both modes, the verification, and the command."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import convert
from convert import GRAPH, TRANSFORMS, VerificationError, convert_file, map_tensors, match_graph
from models import resnet8
from models.keras_file import read_keras_file
from models.keras_process import KerasProcess
from models.resnet8 import ResNet8
from tests.keras_reference import BATCH, MODELS, ROOT, write_references

SHARED_FILE = ROOT.parent / "shared/keras/pretrainedResnet.h5"  # the MLPerf Tiny model, Keras 2.4.0


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    return write_references(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def folder(references):
    """Return the folder of the Keras files, one for each of MODELS."""
    return references[0]


@pytest.fixture(scope="session")
def reference(references):
    """Return what Keras computed with them, in float64."""
    return references[1]


@pytest.fixture
def converted(folder, reader, tmp_path):
    """Return a function that converts one of MODELS: (the network in float64, the rows of the mapping)."""

    def convert_model(name):
        convert_file(folder / f"{name}.h5", tmp_path / "model.pt", reader)
        model = ResNet8.from_checkpoint(tmp_path / "model.pt").double()
        file = read_keras_file(folder / f"{name}.h5", reader)
        return model, map_tensors(match_graph(file), model)

    return convert_model


# The mapping


@pytest.mark.parametrize("class_name", TRANSFORMS)
def test_transforms_of_a_layer(reference, class_name):
    """One layer with Keras's weights, permuted by TRANSFORMS, computes what Keras's layer computes."""
    layer = {
        "Conv2D": lambda: nn.Conv2d(4, 5, (3, 2)),
        "BatchNormalization": lambda: nn.BatchNorm2d(6, eps=1e-3),
        "Dense": lambda: nn.Linear(7, 5),
    }[class_name]()
    state = {
        parameter: torch.from_numpy(reference[f"{class_name}:{variable}"].transpose(axes).copy())
        for variable, (parameter, axes) in TRANSFORMS[class_name].items()
    }
    layer = layer.double().eval()
    layer.load_state_dict(state, strict=False)
    assert set(layer.state_dict()) - set(state) <= {"num_batches_tracked"}
    images = torch.from_numpy(reference[f"{class_name}:input"])
    with torch.inference_mode():
        outputs = layer(images.movedim(-1, 1)).movedim(1, -1).numpy()
    assert outputs.shape == reference[f"{class_name}:output"].shape
    assert np.abs(outputs - reference[f"{class_name}:output"]).max() <= 1e-14 * 10


@pytest.mark.parametrize(
    ("class_name", "variable"), [(name, variable) for name in TRANSFORMS for variable in TRANSFORMS[name]]
)
def test_every_transform_has_an_inverse(reference, class_name, variable):
    """The transforms are permutations: the inverse one gives back the Keras tensor, bit for bit."""
    _, axes = TRANSFORMS[class_name][variable]
    array = reference[f"{class_name}:{variable}"]
    assert sorted(axes) == list(range(array.ndim))
    there = array.transpose(axes)
    assert there.shape == tuple(array.shape[axis] for axis in axes)
    assert np.array_equal(there.transpose(np.argsort(axes)), array)


@pytest.mark.parametrize("name", MODELS)
def test_mapping_carries_every_weight_there_and_back(folder, converted, reader, name):
    """The table names every tensor of both sides once; read backwards, it gives back the Keras file."""
    model, rows = converted(name)
    state = {key: value.numpy() for key, value in model.float().state_dict().items()}
    assert {row.key for row in rows} == {key for key in state if not key.endswith("num_batches_tracked")}
    assert len({row.key for row in rows}) == len(rows)
    back = {(row.layer, row.variable): state[row.key].transpose(np.argsort(row.axes)) for row in rows}
    saved = {
        (layer.name, variable): array
        for layer in read_keras_file(folder / f"{name}.h5", reader).layers
        for variable, array in layer.arrays.items()
    }
    assert back.keys() == saved.keys()
    assert all(np.array_equal(back[key], saved[key]) for key in saved)
    with h5py.File(folder / f"{name}.h5") as file:  # and what our reader read is what is in the file
        for (layer, variable), array in saved.items():
            assert np.array_equal(file["model_weights"][layer][layer][variable], array)


# Parity, in float64


def keras_tensor(reference, prefix, row):
    """Return a Keras gradient or statistic in PyTorch's layout, by the same transform as its variable."""
    return reference[f"{prefix}:{row.layer}/{row.variable}"].transpose(row.axes)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_keras(reference, converted, name, mode):
    """Fine-tuning starts where Keras stopped: outputs, loss, and the gradient of every weight."""
    model, rows = converted(name)
    model.train(mode == "train")
    images = torch.from_numpy(reference[f"{name}:images"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(reference[f"{name}:labels"])
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()

    probabilities = logits.softmax(dim=1).detach().numpy()
    assert np.abs(probabilities - reference[f"{name}:{mode}:probabilities"]).max() <= 1e-12
    assert abs(loss.item() - reference[f"{name}:{mode}:loss"]) <= 1e-12
    trained = [row for row in rows if not row.variable.startswith("moving_")]
    assert len(trained) == len(list(model.parameters())) == 34
    largest = {}
    for row in trained:
        ours = model.get_parameter(row.key).grad.numpy()
        theirs = keras_tensor(reference, f"{name}:{mode}:gradient", row)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 1e-9, row.key
        largest[row.key] = np.abs(theirs).max()
    # no two zeros are compared, but for the biases that a BatchNorm takes away again in train mode
    vanishing = {key for key, value in largest.items() if value < 1e-5}
    before_norm = {f"{place}.bias" for place in GRAPH if re.search(r"conv\d$", place)}
    assert vanishing == (before_norm if mode == "train" else set())


@pytest.mark.parametrize("name", MODELS)
def test_statistics_after_a_step_differ_by_bessels_factor(reference, converted, name):
    """What one batch adds to BatchNorm's statistics.

    Both take (1 - momentum) of the batch's mean and variance over n = images x height x width values. Keras
    3 takes the biased variance, sum / n; PyTorch, for `running_var` alone, the unbiased sum / (n - 1). So
    what is added to PyTorch's is n / (n - 1) of what is added to Keras's, and nothing else differs.
    """
    model, rows = converted(name)
    images = torch.from_numpy(reference[f"{name}:images"]).permute(0, 3, 1, 2)
    values = {}  # n, by BatchNorm

    def count(norm, module):
        module.register_forward_hook(
            lambda module, inputs, output: values.update({norm: output[:, 0].numel()})
        )

    for norm, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            count(norm, module)
    before = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.train()(images)
    assert min(values.values()) == BATCH * -(-MODELS[name][2][0] // 4) * -(-MODELS[name][2][1] // 4)
    after = model.state_dict()

    checked = 0
    for row in rows:
        if row.variable.startswith("moving_"):
            kept = (1 - model.bn1.momentum) * before[row.key]
            ours = after[row.key].numpy() - kept
            theirs = keras_tensor(reference, f"{name}:train:statistics", row) - kept
            n = values[row.key.rpartition(".")[0]]
            factor = n / (n - 1) if row.variable == "moving_variance" else 1
            assert np.abs(ours - factor * theirs).max() <= 1e-12, row.key
            assert np.abs(ours).max() > 1e-4, row.key
            unmoved = keras_tensor(reference, f"{name}:eval:statistics", row)
            assert np.array_equal(unmoved, before[row.key])  # in eval mode Keras's stay, as PyTorch's do
            checked += 1
    assert checked == 14


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
def test_order_and_names_say_nothing(folder, reader, tmp_path, name, how):
    path = SHARED_FILE if name == "shared" else folder / f"{name}.h5"
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


def test_rewriting_really_moves_names_and_order(folder, tmp_path, reader):
    """The test above is no idle one: by its names or its order, the rewritten file is another network."""
    rewrite(folder / "odd.h5", tmp_path / "odd.h5", random.Random(0), **REWRITTEN["all"])
    before, after = (read_keras_file(path / "odd.h5", reader) for path in (folder, tmp_path))

    def names_in_order(file):
        return [entry["config"]["name"] for entry in file.config["config"]["layers"]]

    assert names_in_order(before) != names_in_order(after)
    kernels = [{layer.name: layer.arrays.get("kernel") for layer in file.layers} for file in (before, after)]
    kernels = [{name: kernel for name, kernel in found.items() if kernel is not None} for found in kernels]
    assert len(kernels[0]) == len(kernels[1]) == 10
    assert not [name for name in kernels[0] if np.array_equal(kernels[0][name], kernels[1].get(name))]


# The verification


class RememberingKeras(KerasProcess):
    """Keras itself, asked only once for the same thing: what it computes does not depend on our mistakes."""

    def __init__(self):
        super().__init__()
        self.answers = {}

    def load(self, file):
        if file.sha256 not in self.answers:
            self.answers = {file.sha256: super().load(file)}
        return self.answers[file.sha256]

    def activations(self, images, dtype, layers=None):
        key = (hashlib.sha256(np.ascontiguousarray(images)).digest(), dtype, str(layers))
        if key not in self.answers:
            self.answers[key] = super().activations(images, dtype, layers)
        return self.answers[key]


@pytest.fixture(scope="module")
def keras():
    with RememberingKeras() as process:
        yield process


INPUT = {"mean": [120.0], "std": [64.0]}  # what the random networks are fed is of the order of 1


def change_rows(change):
    """Return a mistake: the mapping's rows, by key, changed."""

    def apply(patch):
        def mistaken(places, model):
            rows = {row.key: row for row in map_tensors(places, model)}
            change(rows)
            return list(rows.values())

        patch.setattr(convert, "map_tensors", mistaken)

    return apply


def swap_sources(rows, one, other):
    for variable in ("weight", "bias", "running_mean", "running_var"):
        if f"{one}.{variable}" in rows:
            a, b = rows[f"{one}.{variable}"], rows[f"{other}.{variable}"]
            rows[a.key], rows[b.key] = replace(a, source=b.source), replace(b, source=a.source)


def change_model(change):
    """Return a mistake: the network itself changed."""

    def apply(patch):
        build = convert.build_model

        def mistaken(places):
            model, arguments = build(places)
            change(model)
            return model, arguments

        patch.setattr(convert, "build_model", mistaken)

    return apply


def symmetric_padding(patch):
    patch.setattr(resnet8, "SamePadConv2d", lambda *arguments: nn.Conv2d(*arguments, padding=1))


def no_shortcut(patch):
    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))

    patch.setattr(resnet8.BasicBlock, "forward", forward)


def changed_source(key, change):
    return change_rows(lambda rows: rows.update({key: replace(rows[key], source=change(rows[key].source))}))


MISTAKES = {  # what is done wrong -> the first layer that computes something else
    "two BatchNorms swapped": (
        change_rows(lambda rows: swap_sources(rows, "layer1.bn1", "layer1.bn2")),
        "layer1.bn1",
    ),
    "two convolutions swapped": (
        change_rows(lambda rows: swap_sources(rows, "layer1.conv1", "layer1.conv2")),
        "layer1.conv1",
    ),
    "mean and beta swapped": (
        lambda patch: patch.setitem(
            TRANSFORMS,
            "BatchNormalization",
            TRANSFORMS["BatchNormalization"]
            | {"beta": ("running_mean", (0,)), "moving_mean": ("bias", (0,))},
        ),
        "bn1",
    ),
    "height and width swapped": (
        lambda patch: patch.setitem(TRANSFORMS["Conv2D"], "kernel", ("weight", (3, 2, 1, 0))),
        "conv1",
    ),
    "in and out of a square kernel swapped": (
        change_rows(
            lambda rows: rows.update(
                {"layer3.conv2.weight": replace(rows["layer3.conv2.weight"], axes=(2, 3, 0, 1))}
            )
        ),
        "layer3.conv2",
    ),
    "red and blue swapped": (changed_source("conv1.weight", lambda kernel: kernel[:, :, ::-1]), "conv1"),
    "PyTorch's epsilon": (
        change_model(lambda model: [setattr(m, "eps", 1e-5) for m in model.modules() if hasattr(m, "eps")]),
        "bn1",
    ),
    "one epsilon": (change_model(lambda model: setattr(model.layer2.bn2, "eps", 1.001e-3)), "layer2.bn2"),
    "an epsilon that is NaN": (
        change_model(lambda model: setattr(model.layer3.bn1, "eps", float("nan"))),
        "layer3.bn1",
    ),
    "symmetric padding": (symmetric_padding, "layer2.conv1"),
    "no shortcut": (no_shortcut, "layer1.add"),
    "a ReLU that does nothing": (
        change_model(lambda model: setattr(model, "relu", nn.Identity())),
        "relu",
    ),
    "the pooling takes the maximum": (
        change_model(lambda model: setattr(model, "avgpool", nn.AdaptiveMaxPool2d(1))),
        "avgpool",
    ),
    "a bias left out": (changed_source("layer2.downsample.bias", np.zeros_like), "layer2.downsample"),
    "weights rounded to float16": (
        changed_source("layer3.downsample.weight", lambda kernel: kernel.astype(np.float16)),
        "layer3.downsample",
    ),
    "two classes swapped": (
        changed_source("fc.weight", lambda kernel: kernel[:, [1, 0, *range(2, kernel.shape[1])]]),
        "probabilities",
    ),
    "a bias of the head off by 1e-10": (
        changed_source("fc.bias", lambda bias: bias.astype(np.float64) + 1e-5 * np.eye(len(bias))[0]),
        "probabilities",
    ),
    "the input not normalized": (
        lambda patch: patch.setattr(convert, "input_normalization", lambda *_: ([0.0], [1.0])),
        "conv1",
    ),
}


@pytest.fixture
def old_outputs(tmp_path):
    """Return a path where an older checkpoint and its JSON lie, and a function that sees if they still do."""
    path = tmp_path / "out" / "model.pt"
    path.parent.mkdir()
    contents = {path: b"old checkpoint", path.with_suffix(".json"): b"old metadata"}
    for file, content in contents.items():
        file.write_bytes(content)

    def untouched():
        return {file: file.read_bytes() for file in path.parent.iterdir()} == contents

    return path, untouched


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verification_names_the_first_wrong_layer(
    folder, reader, keras, old_outputs, monkeypatch, capsys, mistake
):
    make, point = MISTAKES[mistake]
    output, untouched = old_outputs
    make(monkeypatch)
    with pytest.raises(VerificationError) as caught:
        convert_file(folder / "odd.h5", output, reader, keras, **INPUT)
    message = str(caught.value)
    assert re.match(
        rf"the first difference from Keras is in {re.escape(point)}( \(Keras's '\w+'\))?: ", message
    )
    assert " in float64, at most " in message and len(message.splitlines()) == 1
    assert "  numbers     failed\n" in capsys.readouterr().out
    assert untouched()


def test_verification_names_keras_layer(folder, reader, keras, tmp_path, monkeypatch):
    """The name in the message is the layer's in the Keras file."""
    name = match_graph(read_keras_file(folder / "odd.h5", reader))["layer2.bn2"].name
    MISTAKES["one epsilon"][0](monkeypatch)
    with pytest.raises(VerificationError, match=rf"in layer2\.bn2 \(Keras's '{name}'\)"):
        convert_file(folder / "odd.h5", tmp_path / "model.pt", reader, keras, **INPUT)


def test_verification_counts_parameters(folder, reader, keras, old_outputs, monkeypatch, capsys):
    output, untouched = old_outputs
    change_rows(lambda rows: rows.pop("layer1.bn1.bias"))(monkeypatch)
    loaded = keras.load(read_keras_file(folder / "odd.h5", reader))
    trainable, statistics = loaded["trainable"], loaded["statistics"]
    assert (trainable, statistics) == convert.count_parameters(ResNet8(7, 4, 4))
    for wrong in ({"trainable": trainable + 4}, {"statistics": statistics - 4}):
        monkeypatch.setattr(keras, "load", lambda file, wrong=wrong: {**loaded, **wrong})
        with pytest.raises(
            VerificationError, match=r"Keras has [\d,]+ trainable .* PyTorch [\d,]+ and [\d,]+"
        ):
            convert_file(folder / "odd.h5", output, reader, keras, **INPUT)
    assert "  parameters  failed\n" in capsys.readouterr().out
    assert untouched()


def test_verification_passes_and_compares_every_layer(folder, reader, keras, tmp_path, monkeypatch):
    compared = set()
    activations = convert.pytorch_activations

    class Watched(dict):
        def __getitem__(self, point):
            compared.add(point)
            return super().__getitem__(point)

    monkeypatch.setattr(
        convert, "pytorch_activations", lambda model, images: Watched(activations(model, images))
    )
    metadata = convert_file(folder / "odd.h5", tmp_path / "model.pt", reader, keras, **INPUT)
    assert compared == set(GRAPH) - {"fc"}  # Keras's fc has been through the softmax: the probabilities
    results = metadata["verification"]
    assert results["rebuilt"] is None
    assert 0 < results["float64"]["activations"] <= 1e-10
    assert 0 < results["float64"]["probabilities"] <= 1e-12
    assert 1e-9 < results["float32"]["probabilities"] <= 1e-4
    assert ResNet8.from_checkpoint(tmp_path / "model.pt").bn1.running_mean.dtype == torch.float32


def test_float32_has_its_bound(folder, reader, keras, old_outputs, monkeypatch):
    output, untouched = old_outputs
    monkeypatch.setitem(convert.MAX_PROBABILITY_DIFFERENCE, "float32", 1e-12)
    with pytest.raises(VerificationError, match=r"in probabilities: .* in float32, at most 1e-12 expected"):
        convert_file(folder / "odd.h5", output, reader, keras, **INPUT)
    assert untouched()


# The command, from the outside


def run(*arguments, cwd=ROOT, env=None):
    """Run convert.py and return what came of it; none of its messages may be a traceback."""
    result = subprocess.run(
        [sys.executable, ROOT / "convert.py", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in result.stdout + result.stderr
    return result


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs the command in this process: (exit status, stdout, lines of stderr)."""

    def run_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        try:
            status = convert.main()
        except SystemExit as error:
            status = error.code
        output = capsys.readouterr()
        return status, output.out, output.err.splitlines()

    return run_main


@pytest.fixture
def model_file(folder, tmp_path):
    return shutil.copy(folder / "odd.h5", tmp_path / "some.model.h5")


@pytest.fixture
def no_keras(tmp_path):
    """Return an environment where importing Keras or torchvision fails, and a function: what was tried."""
    blocked, tried = tmp_path / "blocked", tmp_path / "tried"
    blocked.mkdir()
    for name in ("tensorflow", "keras", "tf_keras", "torchvision", "matplotlib"):
        code = f"open({str(tried)!r}, 'a').write({name + ' '!r}); raise ImportError('{name} is blocked')"
        (blocked / f"{name}.py").write_text(code)
    return {"PYTHONPATH": str(blocked)}, lambda: tried.read_text().split() if tried.exists() else []


def test_verified_conversion(model_file, tmp_path):
    """The whole command, once: its stages, its two files, and what they say."""
    output = tmp_path / "new folder" / "out.pt"
    result = run("some.model.h5", "-o", output, "--mean", 120, "--std", 60, 61, 62, 63, "-v", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"some\.model\.h5: Keras 3[\d.]+ \.h5 whole model", lines[0])
    stages = [line.split()[0] for line in lines if re.match(r"  \w+ +passed  ", line)]
    assert stages == ["layers", "shapes", "parameters", "numbers"]
    trainable, statistics = convert.count_parameters(ResNet8(7, 4, 4))
    assert (
        f"{trainable:,} trainable + {statistics:,} statistics = {trainable + statistics:,}, on both sides"
        in (result.stdout)
    )
    assert lines[-1] == f"  wrote {output} and {output.with_suffix('.json')}"
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.json", "out.pt"]

    metadata = json.loads(output.with_suffix(".json").read_text())
    assert metadata["architecture"] == {
        "num_classes": 7,
        "width": 4,
        "in_channels": 4,
        "bn_eps": 1e-3,
        "bn_momentum": 0.01,
    }
    source = metadata["source"]
    assert (output.parent / source["file"]).resolve() == model_file.resolve()
    assert source["sha256"] == hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert lines[0].endswith(source["format"]) and source["keras_version"] in source["format"]
    scaling = {"mean": [120.0] * 4, "std": [60.0, 61.0, 62.0, 63.0]}
    assert source["input"] == scaling
    assert metadata["input"] == {"layout": "NCHW", "shape": [4, 21, 30], "range": [0, 255], **scaling}
    assert metadata["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert metadata["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    verification = metadata["verification"]
    assert verification["keras"] == source["keras_version"]
    assert verification["float64"]["activations"] <= 1e-10
    assert verification["float64"]["probabilities"] <= 1e-12
    assert verification["float32"]["probabilities"] <= 1e-4
    assert f"{verification['float64']['probabilities']:.1e}" in result.stdout

    state = torch.load(output, weights_only=True)
    assert type(state).__name__ in ("dict", "OrderedDict")
    assert {type(value) for value in state.values()} == {torch.Tensor}
    ResNet8(7, 4, 4).load_state_dict(state)
    with h5py.File(model_file) as file:
        kernel = file["model_weights"]["dense_2"]["dense_2"]["kernel"][()]
    assert np.array_equal(state["fc.weight"], kernel.T)
    table = [line.split() for line in lines if re.search(r"\w/\w+ +\(", line)]
    assert {row[0].split("/")[1] for row in table} == {
        "kernel",
        "bias",
        "gamma",
        "beta",
        "moving_mean",
        "moving_variance",
    }
    (row,) = [line for line in lines if "fc.weight" in line]
    assert re.fullmatch(r" *dense_2/kernel +\(16, 7\) +\(1, 0\) +fc\.weight +\(7, 16\) *", row)
    assert all(any(f" {key} " in line for line in lines) for key in state if "tracked" not in key)


def test_no_verify_imports_no_keras(model_file, tmp_path, no_keras):
    """Neither the command nor the process that reads the file; the checkpoint lies beside the file."""
    env, tried = no_keras
    result = run(model_file, "--no-verify", env=env)
    assert (result.returncode, result.stderr, tried()) == (0, "", [])
    assert "  numbers     not verified (--no-verify)\n" in result.stdout
    assert json.loads((tmp_path / "some.model.json").read_text())["verification"] is None
    ResNet8.from_checkpoint(tmp_path / "some.model.pt")


def test_without_keras(model_file, tmp_path, no_keras):
    env, tried = no_keras
    result = run(model_file, env=env)
    assert result.returncode == 1
    (message,) = result.stderr.splitlines()
    assert message.startswith(f"error: {model_file}: ") and "keras is blocked" in message
    assert "tensorflow" in message and "--no-verify" in message
    assert tried() == ["keras"]
    assert not (tmp_path / "some.model.pt").exists()


def test_command_loads_neither_hdf5_nor_torchvision(model_file):
    """In this process: reading and comparing are done in others."""
    code = (
        "import sys; sys.argv = ['convert.py', sys.argv[1], '--no-verify']; import convert; convert.main()\n"
        "loaded = {'torchvision', 'tensorflow', 'keras', 'h5py', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, model_file], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


def python_that(tmp_path, *, options="", name="python"):
    """Write a Python interpreter that differs from ours."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {options} "$@"\n')
    path.chmod(0o755)
    return path


def test_keras_python_without_numpy(model_file, tmp_path, command):
    """A bare Python has no tensorflow either; no traceback of ours is shown."""
    status, _, errors = command(model_file, "--keras-python", python_that(tmp_path, options="-S"))
    assert status == 1
    assert "Traceback" not in " ".join(errors)
    assert any("cannot import Keras" in line and "tensorflow" in line for line in errors)
    assert "--no-verify" in errors[-1]
    assert not (tmp_path / "some.model.pt").exists()


def test_keras_python_is_the_callers_path(model_file, tmp_path, command, monkeypatch):
    """A relative path is relative to where the command is run, not to the repository."""
    python_that(tmp_path, options="-S", name="other-python")
    monkeypatch.chdir(tmp_path)
    status, _, errors = command(model_file, "--keras-python", "bin/other-python")
    assert status == 1 and any("cannot import Keras" in line for line in errors)


@pytest.mark.parametrize("python", ["/nowhere/python", "no-such-python-in-path", "/"])
def test_keras_python_that_cannot_run(model_file, tmp_path, command, python):
    status, _, errors = command(model_file, "--keras-python", python)
    assert status == 1
    assert len(errors) == 1 and errors[0].startswith("error: ") and python in errors[0]
    assert "--no-verify" in errors[0]
    assert not (tmp_path / "some.model.pt").exists()


def test_defaults(folder, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, errors = command("--no-verify")
    assert status == 1
    assert len(errors) == 1 and "checkpoints/resnet8_keras.h5" in errors[0] and "No such file" in errors[0]
    Path("checkpoints").mkdir()
    shutil.copy(folder / "resnet8.h5", "checkpoints/resnet8_keras.h5")
    assert command("--no-verify")[0] == 0
    metadata = json.loads(Path("checkpoints/resnet8.json").read_text())
    assert metadata["source"]["file"] == "resnet8_keras.h5"
    assert metadata["input"] == {
        "layout": "NCHW",
        "shape": [3, 32, 32],
        "range": [0, 255],
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    model = ResNet8()
    model.load_state_dict(torch.load("checkpoints/resnet8.pt", weights_only=True))


def test_output_into_a_folder(model_file, tmp_path, command):
    (tmp_path / "results").mkdir()
    status, _, _ = command(model_file, "--no-verify", "-o", tmp_path / "results")
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "some.model.json",
        "some.model.pt",
    ]
    metadata = json.loads((tmp_path / "results" / "some.model.json").read_text())
    assert metadata["source"]["file"] == "../some.model.h5"


def test_several_files_one_failing(folder, tmp_path):
    bad = tmp_path / "bad.h5"
    bad.write_bytes(b"no Keras file")
    missing = tmp_path / "missing.h5"
    results = tmp_path / "results"
    result = run(folder / "resnet8.h5", bad, missing, folder / "odd.h5", "--no-verify", "-o", results)
    assert result.returncode == 1
    errors = result.stderr.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"error: {bad}: ") and errors[1].startswith(f"error: {missing}: ")
    summary = result.stdout.partition("\n\n")[2]
    outcomes = dict(re.findall(r"^ *(\S+) +(converted|refused) ", summary, re.MULTILINE))
    assert {Path(path).name: outcome for path, outcome in outcomes.items()} == {
        "resnet8.h5": "converted",
        "bad.h5": "refused",
        "missing.h5": "refused",
        "odd.h5": "converted",
    }
    expected = ["odd.json", "odd.pt", "resnet8.json", "resnet8.pt"]
    assert sorted(path.name for path in results.iterdir()) == expected


def test_usage_errors(model_file, folder, tmp_path, command):
    twin = tmp_path / "twin" / "some.model.h5"
    json_source = Path(shutil.copy(model_file, tmp_path / "some.json"))
    for arguments, words in {
        (model_file, twin, "-o", tmp_path): "written to",
        (model_file, model_file): "written to",
        (model_file, tmp_path / "some.model.keras"): "written to",
        (model_file, twin, "-o", tmp_path / "one.pt"): "folder",
        (model_file, "-o", model_file): "over a Keras file",
        (model_file, "-o", tmp_path / "twin" / ".." / "some.model.h5"): "over a Keras file",
        (json_source,): "over a Keras file",
        (model_file, "-o", tmp_path / "some.json"): ".json",
        (model_file, "--mean", "red"): "--mean",
        (model_file, "--std", "0"): "--std",
        (model_file, "--std", "-1"): "--std",
        (model_file, "--std", "nan"): "--std",
        (model_file, "--mean"): "--mean",
        (model_file, "--epochs", "3"): "--epochs",
    }.items():
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        status, out, errors = command(*arguments, "--no-verify")
        assert (status, out) == (2, ""), arguments
        assert errors[-1].startswith("convert.py: error: ") and words in errors[-1], arguments
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
    assert run("--no-such-option").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mean", "1", "2"], "--mean has 2 values, but the model's input has 4 channels"),
        (["--std", "1", "2", "3"], "--std has 3 values, but the model's input has 4 channels"),
        (["--mean", "nan"], "nan"),
        (["--std", "inf"], "inf"),
    ],
)
def test_wrong_scaling(model_file, tmp_path, command, arguments, words):
    status, _, errors = command(model_file, "--no-verify", *arguments)
    assert status == 1
    assert len(errors) == 1 and errors[0].startswith(f"error: {model_file}: ") and words in errors[0]
    assert not (tmp_path / "some.model.pt").exists()


def test_file_that_is_none(tmp_path, command):
    for path, words in ((tmp_path / "missing.h5", "No such file"), (tmp_path, "Is a directory")):
        status, _, errors = command(path, "--no-verify", "-o", tmp_path / "out.pt")
        assert (status, errors) == (
            1,
            [f"error: {path}: cannot be read: {words}" + " or directory" * ("No" in words)],
        )


def test_output_that_cannot_be_written(model_file, tmp_path, command):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder" / "some.model.pt").mkdir(parents=True)
    places = {tmp_path / "file" / "out.pt": None, tmp_path / "folder": tmp_path / "folder" / "some.model.pt"}
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        places[tmp_path / "locked" / "out.pt"] = None
    for place, output in places.items():
        before = sorted(tmp_path.rglob("*"))
        status, _, errors = command(model_file, "--no-verify", "-o", place)
        assert status == 1
        assert len(errors) == 1
        assert errors[0].startswith(f"error: {model_file}: cannot write {output or place} ")
        assert sorted(tmp_path.rglob("*")) == before


def test_folder_in_the_place_of_the_json(model_file, old_outputs, command):
    output, _ = old_outputs
    output.with_suffix(".json").unlink()
    output.with_suffix(".json").mkdir()
    status, _, errors = command(model_file, "--no-verify", "-o", output)
    assert (status, len(errors)) == (1, 1)
    assert output.read_bytes() == b"old checkpoint"


def test_damaged_sample_is_one_line(model_file, folder, reader, keras, old_outputs, command, monkeypatch):
    output, untouched = old_outputs

    def damaged(*arguments):
        raise convert.DataError("data/cifar10-sample-1000.bin: damaged")

    monkeypatch.setattr(convert, "load_test", damaged)
    monkeypatch.setattr(convert, "KerasProcess", lambda python: keras)
    monkeypatch.setattr(keras, "close", lambda: None)
    status, _, errors = command(model_file, "-o", output)
    assert (status, errors) == (1, [f"error: {model_file}: data/cifar10-sample-1000.bin: damaged"])
    assert untouched()


def test_full_disk_leaves_the_old_files(model_file, old_outputs, command, monkeypatch):
    output, untouched = old_outputs
    write_files = convert.write_files

    def until_full(writers):
        def full(target):
            target.write(b"{")
            raise OSError(28, "No space left on device")

        write_files({path: full if path.suffix == ".json" else write for path, write in writers.items()})

    monkeypatch.setattr(convert, "write_files", until_full)
    status, _, errors = command(model_file, "--no-verify", "-o", output)
    assert status == 1
    assert len(errors) == 1 and "No space left on device" in errors[0]
    assert untouched()


def test_killed_while_writing_leaves_the_old_files(model_file, old_outputs):
    output, _ = old_outputs
    code = (
        "import os, signal, sys, convert\n"
        "write_files = convert.write_files\n"
        "def killed(writers):\n"
        "    def kill(target): target.write(b'{'); target.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write_files({p: kill if p.suffix == '.json' else write for p, write in writers.items()})\n"
        "convert.write_files = killed\n"
        f"sys.argv = ['convert.py', {str(model_file)!r}, '--no-verify', '-o', {str(output)!r}]\n"
        "convert.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert output.read_bytes() == b"old checkpoint"
    assert output.with_suffix(".json").read_bytes() == b"old metadata"
