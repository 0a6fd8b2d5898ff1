"""models/checkpoint.py: state_dicts of training loops are read, all others refused in one line."""

import copy
import json
import struct
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from models.checkpoint import read_checkpoint, save_checkpoint
from models.normalization import Normalization
from models.resnet8 import ResNet8
from models.transforms import fold_batch_norm
from tests.evaluating import evaluated, random_model, refused, save

INPUT = {"shape": [3, 32, 32], "mean": [120.0] * 3, "std": [64.0] * 3}


def saved(path, content):
    torch.save(content, path)
    return path


def refusal(path):
    """Return the message of the refusal: one line, after the path."""
    with pytest.raises(ValueError) as caught:
        read_checkpoint(path, ResNet8)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path.parent) in message
    return message.removeprefix(f"{path}: ")


# A network and its JSON


def test_from_checkpoint(tmp_path):
    torch.manual_seed(2)
    model = ResNet8(num_classes=7, width=8, in_channels=1, bn_eps=5e-3, bn_momentum=0.3).train()
    with torch.no_grad():
        model(torch.randn(8, 1, 16, 16))  # changes the running statistics
    images, path = torch.randn(3, 1, 20, 20), saved(tmp_path / "model.pt", model.eval().state_dict())
    with pytest.warns(UserWarning, match="epsilon"):
        loaded = ResNet8.from_checkpoint(path)
    assert (loaded.bn1.eps, loaded.layer3.bn2.momentum) == (1e-3, 0.01)  # without a JSON: Keras's defaults
    assert not torch.allclose(loaded(images), model(images))
    (tmp_path / "model.json").write_text(json.dumps({"architecture": {"bn_eps": 5e-3, "bn_momentum": 0.3}}))
    for loaded in (ResNet8.from_checkpoint(path), ResNet8.from_checkpoint(str(path), torch.device("cpu"))):
        assert not loaded.training and torch.equal(loaded(images), model(images))
        assert {(m.eps, m.momentum) for m in loaded.modules() if isinstance(m, nn.BatchNorm2d)} == {
            (5e-3, 0.3)
        }
        assert loaded.normalization == Normalization([0.0], [1.0])


def test_notes_name_the_values_that_the_json_lacks(tmp_path):
    save(random_model(), tmp_path / "model.pt", architecture={"bn_eps": 1e-3}, input=INPUT)
    (note,) = read_checkpoint(tmp_path / "model.pt", ResNet8).notes
    assert "model.json" in note and "momentum" in note and "mean" not in note and "epsilon" not in note
    overridden = read_checkpoint(tmp_path / "model.pt", ResNet8).with_normalization(None, [2.0])
    assert overridden.normalization == Normalization([120.0] * 3, [2.0] * 3)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("", ""),
        ("[]", "object"),
        ("{", ""),
        ("[" * 100_000, ""),
        ('{"architecture": null}', "architecture"),
        ('{"architecture": {"bn_eps": "0.001"}}', "architecture.bn_eps"),
        ('{"architecture": {"bn_momentum": true}}', "architecture.bn_momentum"),
        ('{"source": {"file": 3}}', "source.file"),
        ('{"source": {"input": {"std": [0]}}}', "source.input.std"),
        ('{"input": {"mean": "120"}}', "input.mean"),
        ('{"input": {"mean": [NaN]}}', "input.mean"),
        (f'{{"input": {{"mean": [{"1" * 400}]}}}}', "input.mean"),
        ('{"input": {"shape": [3, 32, 2000]}}', "input.shape"),
    ],
)
def test_damaged_json_is_named_with_its_key(tmp_path, content, key):
    path = saved(tmp_path / "model.pt", random_model(width=1).state_dict())
    (tmp_path / "model.json").write_text(content)
    message = refusal(path)
    assert message.startswith(f"{tmp_path / 'model.json'}: ") and key in message


@pytest.mark.parametrize("metadata", [{"input": INPUT}, {"source": {"input": INPUT}}])
def test_normalization_of_another_number_of_channels_is_refused(tmp_path, metadata):
    save(random_model(in_channels=1), tmp_path / "model.pt", **metadata)
    assert "mean" in refusal(tmp_path / "model.pt")


# What training loops save


def prefixed(prefix, m):
    return {f"{prefix}{name}": value for name, value in m.state_dict().items()}


def pruned(model, remove=False):
    model = copy.deepcopy(model)
    for module in (model.conv1, model.layer3.conv2, model.fc):
        prune.l1_unstructured(module, "weight", amount=0.3)
        if remove:
            prune.remove(module, "weight")
    return model.state_dict()


def cast(dtype):
    return lambda model: copy.deepcopy(model).to(dtype).state_dict()


def without_biases(model):
    """Return a state_dict without the convolutions' biases, which become 0 in the model."""
    names = [f"{name}.bias" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for name in names:
        nn.init.zeros_(model.get_parameter(name))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in names}


def metrics(model):
    """Return a Lightning checkpoint with a metric's counters."""
    counters = {f"train_acc.{name}": torch.zeros(10, dtype=torch.int64) for name in ("tp", "fp")}
    return {"state_dict": {**counters, **prefixed("model.", model)}}


LINEAR = nn.Sequential(nn.Linear(2, 2)).state_dict()
LOOP = {  # values beside the weights
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"params": [0]}]},
    "epoch": 3,
    "name": "run",
}
MASKED = "pruned weights multiplied by their masks"
WAYS = {  # saved content -> note
    "plain": (lambda m: m.state_dict(), ""),
    "Lightning": (lambda m: {"state": prefixed("net.", m), **LOOP}, "under 'state', without 'net.'"),
    "loop": (lambda m: {"model_state_dict": m.state_dict(), **LOOP}, "under 'model_state_dict'"),
    "torch.compile": (lambda m: prefixed("_orig_mod.", m), "without '_orig_mod.'"),
    "DataParallel": (lambda m: nn.DataParallel(m).state_dict(), "without 'module.'"),
    "AveragedModel": (lambda m: AveragedModel(m).state_dict(), "without 'module.'"),
    "compiled average": (lambda m: prefixed("_orig_mod.", AveragedModel(m)), "without '_orig_mod.module.'"),
    "float16": (cast(torch.float16), "float16 weights as float32"),
    "bfloat16": (cast(torch.bfloat16), "bfloat16 weights as float32"),
    "float64": (cast(torch.float64), "float64 weights as float32"),
    "pruned": (pruned, MASKED),
    "pruned in a loop": (lambda m: {"weights": pruned(m), **LOOP}, f"under 'weights', {MASKED}"),
    "module in net": (lambda m: {"net": prefixed("module.net.", m)}, "under 'net', without 'module.net.'"),
    "deep": (lambda m: {"a": {"b": {"ema": m.state_dict()}}}, "under 'a', under 'b', under 'ema'"),
    "twice the same": (lambda m: dict.fromkeys(["model", "net"], m.state_dict()), "under 'model'"),
    "no biases": (without_biases, "zeros for 9 convolution biases that it lacks"),
    "metrics": (
        metrics, "under 'state_dict', without 'model.', 2 integer tensors ignored: train_acc.tp ..."
    ),
    "beside another": (lambda m: {"teacher": LINEAR, "student": m.state_dict()}, "under 'student'"),
}  # fmt: skip
ROUNDING = {"float16": 0.01, "bfloat16": 0.1}  # largest difference of a weight


@pytest.mark.parametrize("way", WAYS)
def test_state_dicts_of_training_loops_are_read_with_one_note(tmp_path, way):
    make, note = WAYS[way]
    model = random_model()
    path = saved(tmp_path / "model.pt", make(model))
    (tmp_path / "model.json").write_text('{"architecture": {"bn_eps": 1e-3}}')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = ResNet8.from_checkpoint(path).state_dict()
    assert [str(warning.message).partition(": ")[2] for warning in caught] == ([note] if note else [])
    expected = pruned(model, remove=True) if "pruned" in way else model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert (tensor - expected[name]).abs().max() <= ROUNDING.get(way, 0), name


def test_float64_weights_are_read_exactly_in_float64(tmp_path):
    model = random_model().double()
    with torch.no_grad():
        model.fc.bias += 1e-12  # lost in float32
    path = save(model, tmp_path / "model.pt", architecture={"bn_eps": 1e-3})
    exact, rounded = (read_checkpoint(path, ResNet8, dtype) for dtype in (torch.float64, torch.float32))
    state = exact.model.state_dict()
    assert exact.read_note == "" and all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert rounded.read_note and not torch.equal(rounded.model.fc.bias.double(), model.fc.bias)


def averaged(model):
    """Return the weights and their moving average, as saved by timm."""
    slow = copy.deepcopy(model)
    with torch.no_grad():
        slow.fc.bias += 1
    return {"model": model.state_dict(), "ema": slow.state_dict(), "epoch": 1}


def test_key_selects_one_of_several(tmp_path):
    """Also in evaluate.py, for every file that holds several; a plain state_dict needs no key."""
    model = random_model(width=2)
    run = saved(tmp_path / "run.pt", averaged(model))
    save(model, tmp_path / "plain.pt", input=INPUT)
    biases = {key: read_checkpoint(run, ResNet8, key=key).model.fc.bias for key in ("model", "ema")}
    assert torch.allclose(biases["ema"] - biases["model"], torch.ones(10))
    with pytest.raises(ValueError, match=r"--key best: .*'model', 'ema'"):
        read_checkpoint(run, ResNet8, key="best")
    files = ("plain.pt", "run.pt", "--no-keras")
    assert "--key" in refused(*files, cwd=tmp_path)
    stdout, metrics = evaluated(*files, "--key", "model", cwd=tmp_path)
    assert metrics["pairs"][0]["max_abs_probability_difference"] == 0 and "under 'model'" in stdout


@pytest.mark.parametrize("where", [lambda x: x, lambda x: {"state_dict": x}], ids=["flat", "nested"])
def test_key_selects_one_of_several_prefixes(tmp_path, where):
    networks = {f"{name}.": random_model(seed) for seed, name in enumerate(("student", "teacher"))}
    tensors = {key: value for prefix, m in networks.items() for key, value in prefixed(prefix, m).items()}
    path = saved(tmp_path / "run.pt", where(tensors))
    for prefix, model in networks.items():
        read = read_checkpoint(path, ResNet8, key=prefix.rstrip("."))
        assert torch.equal(read.model.fc.weight, model.fc.weight) and f"'{prefix}'" in read.read_note
    assert all(word in refusal(path) for word in ("student'", "teacher'", "--key"))


def test_key_is_for_files_with_several(tmp_path):
    run = saved(tmp_path / "run.pt", {"state_dict": random_model().state_dict(), "epoch": 1})
    assert "under 'state_dict'" in read_checkpoint(run, ResNet8, key="ema").read_note


def test_key_without_a_state_dict_selects_no_other(tmp_path):
    run = saved(tmp_path / "run.pt", {"model": random_model().state_dict(), "ema": {}})
    with pytest.raises(ValueError, match=r"--key ema: .*'model'"):
        read_checkpoint(run, ResNet8, key="ema")
    run = saved(tmp_path / "run.pt", dict.fromkeys(["model", "ema"], random_model().state_dict()))
    for key in (None, "model", "ema"):  # a loop may save the same dict twice, before its average has begun
        assert f"under '{key or 'model'}'" in read_checkpoint(run, ResNet8, key=key).read_note


# State_dicts that are refused


class Options:
    """An object, as some training loops save beside the weights."""


def changed(name, change):
    """Return a function that returns a state_dict with one tensor changed."""
    return lambda m: {**m.state_dict(), name: change(m.state_dict()[name.replace("_mask", "")])}


def without(name):
    return lambda m: {key: value for key, value in m.state_dict().items() if key != name}


def quantized(tensor):
    with warnings.catch_warnings(action="ignore"):  # deprecated, but old files have such tensors
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.conv1)
    return {"net": model.state_dict()}


REFUSED = {  # saved content -> words of the message
    "other names": (lambda m: {"net": LINEAR}, "'net' 2 conv1.weight 0.weight"),
    "no conv1": (without("conv1.weight"), "54 conv1.weight missing"),
    "no statistics": (without("layer2.bn1.running_var"), "layer2.bn1.running_var"),
    "one more": (lambda m: {**m.state_dict(), "layer4.bias": torch.ones(1)}, "layer4.bias"),
    "beside a loss": (lambda m: {"loss.w": torch.ones(2), **prefixed("net.", m)}, "56 loss.w unexpected"),
    "weight_norm": (weight_norm, "56 conv1.weight missing conv1.parametrizations.weight.original0"),
    "another shape": (changed("layer3.conv2.bias", lambda t: t[:5]), "layer3.conv2.bias"),
    "a scalar": (changed("fc.weight", lambda t: t.sum()), "ResNet8"),
    "a vector": (changed("conv1.weight", lambda t: t.flatten()), "ResNet8"),
    "a tensor": (lambda m: m.fc.weight.detach(), "Tensor"),
    "a list": (lambda m: list(m.parameters()), "list torch.save"),
    "nothing": (lambda m: {"state_dict": {}, "epoch": 1}, "torch.save"),
    "a number as value": (lambda m: {**m.state_dict(), "epoch": 3}, "'epoch' int"),
    "a number as name": (lambda m: {**m.state_dict(), 7: torch.ones(1)}, "torch.save"),
    "an optimizer": (lambda m: LOOP, "'optimizer.state.0' 1 conv1.weight momentum_buffer"),
    "too deep": (lambda m: {"a": {"b": {"c": {"d": m.state_dict()}}}}, "'a'"),
    "a whole model": (lambda m: m, "objects ResNet8"),
    "an object": (lambda m: {"net": m.state_dict(), "options": Options()}, "objects Options torch.save"),
    "a namespace": (lambda m: {"net": m.state_dict(), "args": Namespace()}, "objects argparse.Namespace"),
    "several": (averaged, "'model' 'ema' --key"),
    "a mask alone": (changed("conv1.weight_mask", torch.ones_like), "conv1.weight_mask conv1.weight_orig"),
    "a mask of another shape": (lambda m: {**pruned(m), "fc.weight_mask": torch.ones(1)}, "fc.weight_mask"),
    "float8": (changed("fc.weight", lambda t: t.to(torch.float8_e4m3fn)), "fc.weight float8_e4m3fn"),
    "float8 mask": (changed("fc.weight_mask", lambda t: t.to(torch.float8_e4m3fn)), "fc.weight_mask float8"),
    "complex": (changed("fc.bias", lambda t: t.to(torch.complex64)), "fc.bias complex64"),
    "int8": (changed("fc.weight", lambda t: t.to(torch.int8)), "fc.weight int8 score"),
    "quantized": (changed("fc.weight", quantized), "fc.weight quantized score"),
    "NaN": (changed("fc.weight", lambda t: t * torch.nan), "fc.weight NaN"),
    "too large": (changed("fc.weight", lambda t: t.double() * 1e300), "fc.weight float32"),
    "negative variance": (changed("bn1.running_var", lambda t: -1 - t * 0), "bn1.running_var negative"),
    "sparse": (changed("fc.weight", lambda t: t.to_sparse()), "fc.weight 640"),
    "expanded": (changed("fc.weight", lambda t: torch.zeros(()).expand(10, 64)), "fc.weight 640"),
    "meta": (changed("fc.weight", lambda t: t.to("meta")), "fc.weight meta"),
    "width 0": (lambda m: ResNet8(width=0).state_dict(), "conv1.weight (0,"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # of width 0
@pytest.mark.parametrize("name", REFUSED)
def test_other_content_is_refused_in_one_line(tmp_path, name):
    make, words = REFUSED[name]
    message = refusal(saved(tmp_path / "model.pt", make(random_model())))
    assert all(word in message for word in words.split()), message


# Files that are refused


def test_compressed_records_are_refused_before_unpacking(tmp_path, monkeypatch):
    """Torch would unpack them to any size."""
    path = saved(tmp_path / "model.pt", random_model().state_dict())
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    monkeypatch.setattr(torch, "load", None)  # not called
    assert "compressed" in refusal(tmp_path / "x.pt")


def test_records_larger_than_the_file_are_refused(tmp_path):
    """By the archive's table, which determines the size to read."""
    path = saved(tmp_path / "model.pt", random_model().state_dict())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    row = content.index(largest.filename.encode(), archive.start_dir) - 46
    assert content[row : row + 4] == b"PK\x01\x02"
    content[row + 20 : row + 28] = struct.pack("<II", 2**31, 2**31)  # both sizes
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "model.pt"
    for name, word in {"constants.pkl": "torch.jit", "models/model.json": "torch.export"}.items():
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"model/{name}", "{}")
        assert word in refusal(path)
    whole = saved(path, random_model().state_dict()).read_bytes()
    for content, word in {
        b"": "empty",
        b"\x89HDF\r\n\x1a\n": "HDF5",
        b"version https://git-lfs": "git lfs pull",
        b"\x1c\0\0\0TFL3": "evaluate.py",
        b"PK\x03\x04 and no more": "damaged",
        b"plain text": "damaged",
        whole[:-1000]: "damaged",
    }.items():
        path.write_bytes(content)
        assert word in refusal(path)
    for file in (tmp_path / "none.pt", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError):
            read_checkpoint(file, ResNet8)


def test_no_code_of_a_file_is_run(tmp_path):
    class Mark:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    path = saved(tmp_path / "model.pt", {**random_model().state_dict(), "fc.bias": Mark()})
    torch.load(path, weights_only=False)
    (tmp_path / "mark").unlink()  # the file would have written it
    assert "objects" in refusal(path)
    assert not (tmp_path / "mark").exists()


def test_safetensors_metadata_is_checked(tmp_path):
    from safetensors.torch import save_file

    path, state = tmp_path / "model.safetensors", random_model().state_dict()
    save_file(state, path, metadata={"input": json.dumps({"mean": "120"})})
    assert "input.mean" in refusal(path)
    save_file(state, path, metadata={"input": "[" * 100_000})
    assert "damaged" in refusal(path)
    save_file(state, path, metadata={"input": json.dumps(INPUT)})
    read = read_checkpoint(path, ResNet8)
    assert read.normalization == Normalization([120.0] * 3, [64.0] * 3) and "epsilon" in read.read_note
    described = {"input": json.dumps(INPUT), "architecture": json.dumps({"bn_eps": 1e-5})}
    save_file(state, path, metadata=described)
    read = read_checkpoint(path, ResNet8)
    assert (read.model.bn1.eps, read.read_note) == (1e-5, "")


# Saving a network derived from a checkpoint


def test_fine_tuned_network_keeps_input_and_source(tmp_path):
    """Its JSON has no SHA-256 and no verification: `convert.py` did not write it."""
    source, described = {"file": "model.h5", "sha256": "0" * 64}, {"architecture": {"bn_eps": 5e-3}}
    model = save(
        random_model(), tmp_path / "model.pt", input=INPUT, source=source, sha256="1" * 64, **described
    )
    (tmp_path / "sub").mkdir()
    save_checkpoint(ResNet8.from_checkpoint(model), tmp_path / "sub/tuned.pt", like=model)
    tuned = read_checkpoint(tmp_path / "sub/tuned.pt", ResNet8)
    assert (tuned.normalization, tuned.model.bn1.eps) == (Normalization([120.0] * 3, [64.0] * 3), 5e-3)
    assert (tmp_path / "sub" / tuned.metadata["source"]["file"]).resolve() == tmp_path / "model.h5"
    assert tuned.origin == "0" * 64 and not tuned.is_as_converted
    assert not {"sha256", "verification"} & tuned.metadata.keys()


def test_saved_network_has_its_own_sizes_and_constants(tmp_path):
    save(random_model(), tmp_path / "model.pt", architecture={"num_classes": 10, "bn_eps": 1e-3})
    expected = {"num_classes": 100, "width": 4, "in_channels": 3, "bn_eps": 1e-5, "bn_momentum": 0.1}
    other = random_model(**expected)
    for name, model in (("plain.pt", other), ("parallel.pt", nn.DataParallel(other))):
        save_checkpoint(model, tmp_path / name, like=tmp_path / "model.pt")
        loaded = read_checkpoint(tmp_path / name, ResNet8)
        assert (loaded.model.bn1.eps, loaded.model.layer3.bn2.momentum) == (1e-5, 0.1)
        assert loaded.metadata["architecture"] == expected


def test_saving_replaces_no_json_of_another_file(tmp_path):
    save(model := random_model(), tmp_path / "model.pt", input=INPUT)
    before = (tmp_path / "model.json").read_bytes()
    save_checkpoint(model, tmp_path / "model.pth", like=tmp_path / "model.pt")
    assert (tmp_path / "model.json").read_bytes() == before
    assert read_checkpoint(tmp_path / "model.pth", ResNet8).metadata["input"] == INPUT
    with pytest.raises(ValueError, match=r"folded\.pt: "):
        save_checkpoint(fold_batch_norm(model), tmp_path / "folded.pt", like=tmp_path / "model.pt")
    assert not (tmp_path / "folded.pt").exists() and not (tmp_path / "folded.json").exists()
