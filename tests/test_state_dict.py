"""models/files/state_dict.py: what training loops make of a state_dict is undone, with one note."""

import argparse
import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from models.checkpoint import read_checkpoint, save_checkpoint, write_checkpoint
from models.common.errors import OutputExistsError
from models.equivalents import fold_batch_norm
from models.resnet8 import ResNet8
from models.scaling import Scaling
from tests.evaluating import evaluated, random_model, refused, save, scaling


def lightning(model):
    """What Lightning's trainer saves of a module that has the network as `self.model`."""
    module = nn.Module()
    module.model = model
    return {"state_dict": module.state_dict(), "epoch": 3, "lr_schedulers": [], "hparams_name": "kwargs"}


def loop(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "loss": 0.1,
    }


def prefixed(prefix, model):
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}


def pruned(model):
    model = copy.deepcopy(model)
    for module in (model.conv1, model.layer3.conv2, model.fc):
        prune.l1_unstructured(module, "weight", amount=0.3)
    return model.state_dict()


WAYS = {  # how it is saved -> what the note names
    "plain": (lambda model: model.state_dict(), ""),
    "Lightning": (lightning, "'state_dict' 'model.'"),
    "loop": (loop, "'model_state_dict'"),
    "under model": (lambda model: {"model": model.state_dict(), "epoch": 1}, "'model'"),
    "torch.compile": (lambda model: torch.compile(model).state_dict(), "'_orig_mod.'"),
    "DataParallel": (lambda model: nn.DataParallel(model).state_dict(), "'module.'"),
    "AveragedModel": (lambda model: AveragedModel(model).state_dict(), "'module.'"),
    "compiled DataParallel": (
        lambda model: torch.compile(nn.DataParallel(model)).state_dict(),
        "'_orig_mod.' 'module.'",
    ),
    "averaged in a loop": (
        lambda model: {"state_dict": AveragedModel(model).state_dict()},
        "'state_dict' 'module.'",
    ),
    "float16": (lambda model: copy.deepcopy(model).half().state_dict(), "float16 float32"),
    "bfloat16": (lambda model: copy.deepcopy(model).bfloat16().state_dict(), "bfloat16 float32"),
    "float64": (lambda model: copy.deepcopy(model).double().state_dict(), "float64 float32"),
    "pruned": (pruned, "pruned"),
    "under net": (lambda model: {"net": model.state_dict(), "best": 0.9}, "'net'"),
    "as net": (lambda model: prefixed("net.", model), "'net.'"),
    "compiled in a module": (
        lambda model: {"net": prefixed("module.backbone.net.", model)},
        "'net' 'module.' 'backbone.net.'",
    ),
    "deep": (lambda model: {"a": {"b": {"ema": model.state_dict()}}}, "'a' 'b' 'ema'"),
    "pruned in a loop": (
        lambda model: {"weights": pruned(model)},
        "'weights' pruned",
    ),
    "twice the same": (
        lambda model: dict.fromkeys(["model", "net"], model.state_dict()),
        "'model'",
    ),
    "beside another network's": (
        lambda model: {"teacher": nn.Linear(2, 2).state_dict(), "student": model.state_dict()},
        "'student'",
    ),
}
ROUNDED = {"float16": 0.01, "bfloat16": 0.1}  # how far a weight may be from what it was


def rightly_saved(way, model):
    """Return the state_dict that a way of saving stands for."""
    if not way.startswith("pruned"):
        return model.state_dict()
    model = copy.deepcopy(model)
    for module in (model.conv1, model.layer3.conv2, model.fc):
        prune.l1_unstructured(module, "weight", amount=0.3)
        prune.remove(module, "weight")
    return model.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_what_training_loops_save_is_loaded_with_one_note(tmp_path, way):
    make, named = WAYS[way]
    model = random_model()
    torch.save(make(model), tmp_path / "model.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = ResNet8.from_checkpoint(tmp_path / "model.pt")
    notes = [str(warning.message) for warning in caught]
    assert len(notes) == bool(named)
    assert all(name in note for note in notes for name in ("model.pt", *named.split()))
    right = rightly_saved(way, model)
    assert loaded.state_dict().keys() == right.keys()
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert (tensor - right[key]).abs().max() <= ROUNDED.get(way, 0), key


def noted(stdout, *named):
    """Whether one of the notes names all of that."""
    notes = [line for line in stdout.splitlines() if line.startswith("note: ")]
    return any(all(name in note for name in named) for note in notes)


def test_evaluate_notes_it_for_the_checkpoint_and_for_what_is_compared(tmp_path):
    model = random_model()
    save(model, tmp_path / "model.pt", input=scaling(120.0, 64.0))
    torch.save(lightning(model), tmp_path / "last.ckpt")
    torch.save(pruned(model), tmp_path / "masked.pt")
    stdout, metrics = evaluated("last.ckpt", "--no-keras", "--std", 64, "--mean", 120, cwd=tmp_path)
    assert noted(stdout, "last.ckpt", "'state_dict'", "'model.'")
    alone = metrics["pytorch"]
    stdout, metrics = evaluated("model.pt", "--no-keras", "--compare", "last.ckpt", "masked.pt", cwd=tmp_path)
    assert alone["confusion_matrix"] == metrics["pytorch"]["confusion_matrix"]
    assert metrics["pairs"][0]["max_abs_probability_difference"] == 0
    assert metrics["pairs"][1]["max_abs_probability_difference"] > 0
    assert sum("'model.'" in note or "pruned" in note for note in metrics["notes"]) == 2


def test_a_double_file_keeps_its_bits_in_float64(tmp_path):
    model = random_model().double()
    with torch.no_grad():
        model.fc.bias += 1e-12  # lost in float32
    torch.save(model.state_dict(), tmp_path / "model.pt")
    kept = read_checkpoint(tmp_path / "model.pt", dtype=torch.float64)
    assert kept.read_as == ""
    assert all(torch.equal(kept.model.state_dict()[key], value) for key, value in model.state_dict().items())
    rounded = read_checkpoint(tmp_path / "model.pt")
    assert not torch.equal(rounded.model.fc.bias.double(), model.fc.bias)


def test_dtype_float64_computes_with_every_bit_of_a_double_file(tmp_path):
    """And there is nothing to note. In float32 the file is what it was rounded to, and a note says so."""
    model = random_model()
    save(model, tmp_path / "single.pt", input=scaling(120.0, 64.0))
    model.double()
    with torch.no_grad():
        model.fc.bias[0] *= 1 + 1e-9  # lost in float32, whose steps are 6e-8 at the least
    save(model, tmp_path / "double.pt", input=scaling(120.0, 64.0))
    arguments = ["single.pt", "--no-keras", "--compare", "double.pt"]
    stdout, metrics = evaluated(*arguments, "--dtype", "float64", cwd=tmp_path)
    assert 0 < metrics["pairs"][0]["max_abs_probability_difference"] < 1e-9
    assert not noted(stdout, "double.pt", "float64", "float32")
    stdout, metrics = evaluated(*arguments, cwd=tmp_path)
    assert metrics["pairs"][0]["max_abs_probability_difference"] == 0
    assert noted(stdout, "double.pt", "float64", "float32")


def mask_alone(model):
    return {**model.state_dict(), "conv1.weight_mask": torch.ones(16, 3, 3, 3)}


def averaged(model):
    """What timm's and many other loops save: the weights, and their moving average."""
    slow = copy.deepcopy(model)
    with torch.no_grad():
        slow.fc.bias += 1
    return {"model": model.state_dict(), "ema": slow.state_dict(), "epoch": 1}


class Hyperparameters:
    """What a training loop may save of its own: an object."""


def packed(model):
    with warnings.catch_warnings(action="ignore"):  # deprecated, and still what old quantized files hold
        weight = torch.quantize_per_tensor(model.fc.weight.detach(), 0.1, 0, torch.qint8)
    return {**model.state_dict(), "fc.weight": weight}


def with_tensor(name, change):
    return lambda model: {**model.state_dict(), name: change(model.state_dict()[name.replace("_mask", "")])}


def float8(tensor):
    return tensor.to(torch.float8_e4m3fn)


HOW = "torch.save"
REFUSED = {  # what is saved -> what the message names of it, and of how to save it instead
    "an object beside it": (
        lambda model: {"state_dict": model.state_dict(), "hparams": Hyperparameters()},
        ["Hyperparameters", HOW],
    ),
    "the command line beside it": (
        lambda model: {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)},
        ["argparse.Namespace", HOW],
    ),
    "several": (averaged, ["'model'", "'ema'", "--key"]),
    "another network under its key": (
        lambda model: {"net": nn.Linear(2, 2).state_dict()},
        ["'net'", "OrderedDict", HOW],
    ),
    "too deep": (
        lambda model: {"a": {"b": {"c": {"d": model.state_dict()}}}},
        ["'a'", HOW],
    ),
    "a mask alone": (mask_alone, ["conv1.weight_mask", "conv1.weight_orig"]),
    "float8": (with_tensor("fc.weight", float8), ["fc.weight", "float8_e4m3fn", "float32"]),
    "a mask in float8": (
        with_tensor("fc.weight_mask", float8),
        ["fc.weight_mask", "float8_e4m3fn", "float32"],
    ),
    "a number as a name": (lambda model: {**model.state_dict(), 7: torch.ones(1)}, ["7", "Tensor"]),
    "NaN": (
        with_tensor("fc.weight", lambda tensor: tensor * torch.nan),
        ["fc.weight", "NaN"],
    ),
    "too large": (
        with_tensor("fc.weight", lambda tensor: tensor.double() * 1e300),
        ["fc.weight", "float32"],
    ),
    "a negative variance": (
        with_tensor("bn1.running_var", lambda tensor: -1 - tensor * 0),
        ["bn1.running_var", "-1"],
    ),
    "sparse": (
        with_tensor("fc.weight", lambda tensor: tensor.to_sparse()),
        ["fc.weight", "640"],
    ),
    "expanded": (
        with_tensor("fc.weight", lambda tensor: torch.zeros(()).expand(10, 64)),
        ["fc.weight", "640"],
    ),
    "a mask of another shape": (
        lambda model: {**pruned(model), "fc.weight_mask": torch.ones(1)},
        ["fc.weight_mask", "fc.weight_orig"],
    ),
    "no values": (
        with_tensor("fc.weight", lambda tensor: tensor.to("meta")),
        ["fc.weight", "(10, 64)", "meta"],
    ),
    "width 0": (lambda model: ResNet8(width=0).state_dict(), ["(0,"]),
    "two networks": (
        lambda model: {f"{part}.{key}": value for part in "ab" for key, value in model.state_dict().items()},
        ["fc.weight", "ResNet8"],
    ),
    "quantized": (
        lambda model: {**model.state_dict(), "fc.weight": torch.zeros(10, 64, dtype=torch.int8)},
        ["fc.weight", "int8", "score"],
    ),
    "quantized tensor": (packed, ["fc.weight", "quantized", "score"]),
    "beside a loss's weights": (
        lambda model: {
            "criterion.weight": torch.ones(10),
            **{f"model.{name}": value for name, value in model.state_dict().items()},
        },
        ["'fc.weight'", "model.fc.weight", "ResNet8"],
    ),
    "tensors in a list": (lambda model: list(model.parameters()), ["list", HOW]),
    "an optimizer": (
        lambda model: torch.optim.SGD(model.parameters()).state_dict(),
        ["'state'", HOW],
    ),
    "nothing under its key": (lambda model: {"state_dict": {}, "epoch": 1}, ["ResNet8"]),
    "a number under its key": (lambda model: {"state_dict": 3}, ["'state_dict'", HOW]),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # of width 0
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_it_is(tmp_path, name):
    make, named = REFUSED[name]
    torch.save(make(random_model()), tmp_path / "model.pt")
    with pytest.raises(ValueError) as caught:
        ResNet8.from_checkpoint(tmp_path / "model.pt")
    message, prefix = str(caught.value), f"{tmp_path / 'model.pt'}: "
    assert message.startswith(prefix) and len(message.splitlines()) == 1
    assert all(each in message.removeprefix(prefix) for each in named), message


def test_safetensors_whose_metadata_is_not_as_convert_writes_it(tmp_path):
    from safetensors.torch import save_file

    said = {"input": json.dumps({"mean": "120"})}
    save_file(random_model().state_dict(), tmp_path / "model.safetensors", metadata=said)
    with pytest.raises(ValueError, match=r"model\.safetensors: (?=.*input\.mean).*120"):
        ResNet8.from_checkpoint(tmp_path / "model.safetensors")


def test_key_takes_one_of_several(tmp_path):
    """In evaluate.py for every file that holds several; a plain state_dict has no keys, and needs none."""
    model = random_model()
    torch.save(averaged(model), tmp_path / "run.pt")
    save(model, tmp_path / "plain.pt", input=scaling(120.0, 64.0))
    taken = {key: read_checkpoint(tmp_path / "run.pt", key=key) for key in ("model", "ema")}
    difference = taken["ema"].model.fc.bias - taken["model"].model.fc.bias
    assert torch.allclose(difference, torch.ones(10))
    assert "run.pt" in taken["ema"].read_as and "'ema'" in taken["ema"].read_as
    with pytest.raises(ValueError, match=r"(?=.*--key)(?=.*best)(?=.*'model').*'ema'"):
        read_checkpoint(tmp_path / "run.pt", key="best")
    files = ("plain.pt", "--no-keras", "--compare", "run.pt")
    assert "--key" in refused(*files, cwd=tmp_path)
    stdout, metrics = evaluated(*files, "--key", "model", cwd=tmp_path)
    assert metrics["pairs"][0]["max_abs_probability_difference"] == 0
    assert noted(stdout, "run.pt", "'model'")
    _, metrics = evaluated(*files, "--key", "ema", cwd=tmp_path)
    assert metrics["pairs"][0]["max_abs_probability_difference"] > 0


def test_a_key_that_is_not_there_takes_no_other(tmp_path):
    torch.save({"model": random_model().state_dict(), "ema": {}}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"(?=.*--key)(?=.*ema).*'model'"):
        read_checkpoint(tmp_path / "run.pt", key="ema")


def test_a_fine_tuned_network_is_saved_with_what_is_known_of_it(tmp_path):
    """Its JSON says what it is fed and where its Keras file is, and not that convert.py wrote it."""
    model = random_model(bn_eps=5e-3)
    source = {"file": "model.h5", "sha256": "0" * 64}
    described = {"architecture": {"bn_eps": 5e-3, "bn_momentum": 0.01}, "sha256": "1" * 64, "source": source}
    save(model, tmp_path / "model.pt", input=scaling(120.0, 64.0), verification={"layers": 27}, **described)
    (tmp_path / "sub").mkdir()
    save_checkpoint(model, tmp_path / "sub/tuned.pt", like=tmp_path / "model.pt")
    tuned = read_checkpoint(tmp_path / "sub/tuned.pt")
    assert (tuned.scaling, tuned.model.bn1.eps) == (Scaling([120.0] * 3, [64.0] * 3), 5e-3)
    assert (tmp_path / "sub" / tuned.metadata["source"]["file"]).resolve() == tmp_path / "model.h5"
    assert tuned.origin == "0" * 64
    assert not tuned.is_as_converted
    assert not {"sha256", "verification"} & tuned.metadata.keys()


def test_a_network_is_saved_with_its_own_sizes_and_constants(tmp_path):
    """`like` has others; and one in a DataParallel is the one that is in it."""
    save(random_model(), tmp_path / "model.pt", architecture={"num_classes": 10, "bn_eps": 1e-3})
    other = random_model(num_classes=100, width=4, bn_eps=1e-5, bn_momentum=0.1)
    for name, model in (("plain.pt", other), ("parallel.pt", nn.DataParallel(other))):
        save_checkpoint(model, tmp_path / name, like=tmp_path / "model.pt")
        saved = read_checkpoint(tmp_path / name)
        assert (saved.model.bn1.eps, saved.model.layer3.bn2.momentum) == (1e-5, 0.1)
        constants = {"bn_eps": 1e-5, "bn_momentum": 0.1}
        sizes = {"num_classes": 100, "width": 4, "in_channels": 3}
        assert saved.metadata["architecture"] == {**sizes, **constants}


def test_a_folded_network_is_not_saved(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    with pytest.raises(ValueError, match=r"folded\.pt: .*BatchNorm"):
        save_checkpoint(fold_batch_norm(random_model()), tmp_path / "folded.pt", like=tmp_path / "model.pt")
    assert not (tmp_path / "folded.pt").exists() and not (tmp_path / "folded.json").exists()


def test_a_saved_network_takes_no_json_of_another(tmp_path):
    model = random_model()
    write_checkpoint(tmp_path / "model.pt", model, {"input": scaling(120.0, 64.0)})
    before = (tmp_path / "model.json").read_bytes()
    with pytest.raises(OutputExistsError, match=r"(?=.*model\.json).*model\.pt\b"):
        save_checkpoint(model, tmp_path / "model.pth", like=tmp_path / "model.pt")
    assert (tmp_path / "model.json").read_bytes() == before and not (tmp_path / "model.pth").exists()
    save_checkpoint(model, tmp_path / "model.pt", like=tmp_path / "model.pt")  # its own
    assert "sha256" not in read_checkpoint(tmp_path / "model.pt").metadata


def test_each_key_of_one_state_dict_takes_it(tmp_path):
    """A loop may save the same dict twice, before its average has begun."""
    torch.save(dict.fromkeys(["model", "ema"], random_model().state_dict()), tmp_path / "model.pt")
    for key in (None, "model", "ema"):
        assert f"'{key or 'model'}'" in read_checkpoint(tmp_path / "model.pt", key=key).read_as
