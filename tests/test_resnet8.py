"""models/resnet8.py: the network's shape, its padding against Keras's, and loading a checkpoint."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from models import resnet8
from models.resnet8 import ResNet8, SamePadConv2d
from tests.keras_reference import KERNELS, SIZES, STRIDES, write_references


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    return write_references(tmp_path_factory.getbasetemp())[1]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ResNet8()


def statistics_of(module):
    return sum(b.numel() for name, b in module.named_buffers() if not name.endswith("num_batches_tracked"))


def parameters_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def layer_costs(model, images):
    """Return each leaf module's (output shape without the batch, multiply-accumulates an image), by name."""
    found = {}

    def watch(name, module):
        def hook(module, inputs, output):
            macs = 0
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                macs = output[0].numel() * module.weight[0].numel()
            found[name] = (tuple(output.shape[1:]), macs)

        module.register_forward_hook(hook)

    for name, module in model.named_modules():
        if not list(module.children()):
            watch(name, module)
    model(images)
    return found


# The architecture


def test_counts(model):
    assert parameters_of(model) == 78_186
    assert statistics_of(model) == 480
    assert sum(macs for _, macs in layer_costs(model, torch.zeros(2, 3, 32, 32)).values()) == 12_501_632


DOCUMENTED = re.compile(
    r" {4}(?P<name>[a-z]\w*(?:\.\w+)?) +(?:(?P<kernel>\d)x\d +)?(?:/(?P<stride>\d) +)?"
    r"(?P<shape>\d+(?: x +\d+)*)(?: {2,}(?P<parameters>[\d,]+(?: \+ \d+)?))?(?: {2,}(?P<macs>[\d,]+))?"
)


def number(text):
    return int(text.replace(",", "")) if text else 0


def test_docstring_table_is_the_model(model):
    """Every row's name, kernel, stride, output shape, parameters and multiply-accumulates."""
    rows = [DOCUMENTED.fullmatch(line) for line in resnet8.__doc__.splitlines()]
    rows = [row for row in rows if row]
    costs = layer_costs(model, torch.zeros(2, 3, 32, 32))
    assert [row["name"] for row in rows] == [name for name in leaf_names(model) if "relu" not in name]
    for row in rows:
        module = model.get_submodule(row["name"])
        shape, macs = costs[row["name"]]
        assert tuple(map(int, re.findall(r"\d+", row["shape"]))) == tuple(s for s in shape if s > 1), row[0]
        trainable, _, statistics = (row["parameters"] or "").partition(" + ")
        assert (number(trainable), number(statistics)) == (parameters_of(module), statistics_of(module)), row[
            0
        ]
        assert number(row["macs"]) == macs, row[0]
        if isinstance(module, nn.Conv2d):
            assert module.kernel_size == (int(row["kernel"]),) * 2, row[0]
            assert module.stride == (int(row["stride"] or 1),) * 2, row[0]
    (total,) = re.findall(r"^ {4}total +([\d,]+) \+ (\d+) +([\d,]+)$", resnet8.__doc__, re.MULTILINE)
    assert tuple(map(number, total)) == (78_186, 480, 12_501_632)
    assert "78,666" in resnet8.__doc__


def leaf_names(model):
    return [name for name, module in model.named_modules() if not list(module.children())]


def test_state_dict_keys(model):
    """Torchvision's names; other code and older checkpoints rely on them."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = []
    for block in ("", "layer1.", "layer2.", "layer3."):
        for index in (1, 2) if block else (1,):
            expected += [f"{block}conv{index}.weight", f"{block}conv{index}.bias"]
            expected += [f"{block}bn{index}.{name}" for name in norm]
        if block in ("layer2.", "layer3."):
            expected += [f"{block}downsample.weight", f"{block}downsample.bias"]
    assert list(model.state_dict()) == [*expected, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (3, 32, 32)),
        ({"num_classes": 100, "width": 64}, (3, 32, 32)),
        ({"num_classes": 2, "width": 5, "in_channels": 1}, (1, 28, 28)),
        ({"in_channels": 6}, (6, 33, 47)),
        ({}, (3, 1, 1)),
        ({}, (3, 96, 1)),
    ],
)
def test_any_size_gives_logits(arguments, shape):
    outputs = ResNet8(**arguments).eval()(torch.randn(2, *shape) * 10)
    assert outputs.shape == (2, arguments.get("num_classes", 10))
    assert not torch.allclose(outputs.sum(dim=1), torch.ones(2))  # not probabilities


def test_batchnorm_options_reach_every_layer():
    norms = [m for m in ResNet8(bn_eps=2e-3, bn_momentum=0.2).modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(2e-3, 0.2)] * 7
    norms = [m for m in ResNet8().modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(1e-3, 0.01)] * 7  # Keras's defaults


def test_training_learns():
    """Twenty steps of SGD fit one batch; every weight that matters changes, and every statistic."""
    torch.manual_seed(1)
    model = ResNet8(width=8)
    images, labels = torch.randn(16, 3, 12, 12), torch.arange(16) % 10
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert all(parameter.grad is not None for parameter in model.parameters())
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    # in train mode a BatchNorm takes away what the bias before it adds: its gradient is rounding alone
    assert [name for name in same if not re.search(r"conv\d\.bias", name)] == []


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 21, 30)])
def test_export(model, shape):
    """`torch.export` takes the model as it is, for one batch size and for any."""
    model.eval()
    images = torch.randn(4, *shape)
    fixed = torch.export.export(model, (images,)).module()
    batch = torch.export.Dim("batch", min=1, max=1024)
    dynamic = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
    assert torch.equal(fixed(images), model(images))
    for size in (1, 7):
        images = torch.randn(size, *shape)
        torch.testing.assert_close(dynamic(images), model(images))
    with pytest.raises(Exception, match=r"shape|guard|Guard"):
        fixed(images)


# 'same' padding


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stride", STRIDES)
def test_same_padding_is_keras(reference, kernel, stride):
    """Heights 1 to 40 with widths 40 to 1, against Keras's Conv2D in float64."""
    conv = SamePadConv2d(2, 3, kernel, stride).double()
    conv.weight.data = torch.from_numpy(reference[f"same:{kernel}:kernel"].transpose(3, 2, 0, 1).copy())
    conv.bias.data = torch.from_numpy(reference[f"same:{kernel}:bias"])
    image = torch.from_numpy(reference["same:image"]).permute(0, 3, 1, 2)
    for size in SIZES:
        expected = reference[f"same:{kernel}:{stride}:{size}"].transpose(0, 3, 1, 2)
        ours = conv(image[:, :, :size, : 41 - size]).detach().numpy()
        assert ours.shape == expected.shape == (1, 3, -(-size // stride), -(-(41 - size) // stride))
        assert np.abs(ours - expected).max() <= 1e-12, size


def test_pytorchs_own_padding_is_not_same(reference):
    """The mistake that SamePadConv2d prevents: right for odd sizes, wrong for even ones."""
    conv = nn.Conv2d(2, 3, 3, 2, padding=1).double()
    conv.weight.data = torch.from_numpy(reference["same:3:kernel"].transpose(3, 2, 0, 1).copy())
    conv.bias.data = torch.from_numpy(reference["same:3:bias"])
    image = torch.from_numpy(reference["same:image"]).permute(0, 3, 1, 2)
    for size in SIZES:
        ours = conv(image[:, :, :size, : 41 - size]).detach().numpy()
        difference = np.abs(ours - reference[f"same:3:2:{size}"].transpose(0, 3, 1, 2)).max()
        assert difference > 0.1, size  # size or 41 - size is even


# Loading


@pytest.fixture
def checkpoint(tmp_path):
    """Return an unusual ResNet8's checkpoint, the model, and the path of its JSON, which is not there."""
    torch.manual_seed(2)
    model = ResNet8(num_classes=7, width=8, in_channels=1, bn_eps=5e-3, bn_momentum=0.3).train()
    with torch.no_grad():
        model(torch.randn(8, 1, 16, 16))  # statistics of their own
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    return path, model.eval(), tmp_path / "model.json"


def test_from_checkpoint_finds_the_shape(checkpoint):
    path, model, json_path = checkpoint
    json_path.write_text(json.dumps({"architecture": {"bn_eps": 5e-3, "bn_momentum": 0.3}}))
    loaded = ResNet8.from_checkpoint(path)
    assert not loaded.training
    assert (loaded.fc.out_features, loaded.conv1.out_channels, loaded.conv1.in_channels) == (7, 8, 1)
    norms = [m for m in loaded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(5e-3, 0.3)] * 7
    images = torch.randn(3, 1, 20, 20)
    assert torch.equal(loaded(images), model(images))
    assert torch.equal(ResNet8.from_checkpoint(str(path), torch.device("cpu"))(images), model(images))


def test_from_checkpoint_without_json_has_kerass_defaults(checkpoint):
    path, model, _ = checkpoint
    loaded = ResNet8.from_checkpoint(path)
    assert (loaded.bn1.eps, loaded.layer3.bn2.momentum) == (1e-3, 0.01)
    images = torch.randn(3, 1, 20, 20)
    assert not torch.allclose(loaded(images), model(images))  # 5e-3 is what this network was trained with


def test_plain_recipe(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "resnet8.pt")
    loaded = ResNet8()
    loaded.load_state_dict(torch.load(tmp_path / "resnet8.pt", weights_only=True))
    loaded.eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


BAD = {  # what is saved, from a good state_dict -> words of the message
    "other names": (lambda state: {f"module.{name}": value for name, value in state.items()}, "fc.weight"),
    "no conv1": (lambda state: without(state, "conv1.weight"), "conv1.weight"),
    "no statistics": (lambda state: without(state, "layer2.bn1.running_var"), "layer2.bn1.running_var"),
    "one more": (lambda state: {**state, "layer4.conv1.weight": torch.zeros(1)}, "layer4.conv1.weight"),
    "another shape": (lambda state: {**state, "layer3.conv2.bias": torch.zeros(5)}, "layer3.conv2.bias"),
    "a scalar": (lambda state: {**state, "fc.weight": torch.zeros(())}, "not a ResNet8"),
    "a vector": (lambda state: {**state, "conv1.weight": torch.zeros(8)}, "not a ResNet8"),
    "a tensor": (lambda state: state["fc.weight"], "Tensor"),
    "a list": (lambda state: list(state.values()), "list"),
    "a number among them": (lambda state: {**state, "epoch": 3}, "state_dict"),
    "a whole model": (lambda state: ResNet8(), "objects"),
}


@pytest.mark.parametrize("name", BAD)
def test_from_checkpoint_refuses_in_one_line(checkpoint, name):
    path, model, _ = checkpoint
    change, words = BAD[name]
    torch.save(change(model.state_dict()), path)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ResNet8.from_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x89HDF\r\n\x1a\n", b"no checkpoint"])
def test_from_checkpoint_refuses_what_is_no_checkpoint(checkpoint, content):
    path, _, _ = checkpoint
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        ResNet8.from_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value).splitlines()) == 1


def test_from_checkpoint_refuses_a_file_cut_short(checkpoint):
    path, _, _ = checkpoint
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged"):
        ResNet8.from_checkpoint(path)


def test_from_checkpoint_without_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ResNet8.from_checkpoint(tmp_path / "none.pt")
    with pytest.raises(OSError):
        ResNet8.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"architecture": []}',
        '{"architecture": null}',
        '{"architecture": {"bn_eps": "0.001"}}',
        '{"architecture": {"bn_eps": null}}',
        '{"architecture": {"bn_momentum": []}}',
        '{"architecture": {"bn_eps": true}}',
    ],
)
def test_from_checkpoint_refuses_a_bad_json_in_one_line(checkpoint, content):
    path, _, json_path = checkpoint
    json_path.write_text(content)
    with pytest.raises(ValueError) as caught:
        ResNet8.from_checkpoint(path)
    assert str(caught.value).startswith(f"{json_path}: ") and len(str(caught.value).splitlines()) == 1


def test_from_checkpoint_runs_no_code(checkpoint, tmp_path):
    class Mark:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    path, model, _ = checkpoint
    torch.save({**model.state_dict(), "fc.bias": Mark()}, path)
    torch.load(path, weights_only=False)
    (tmp_path / "mark").unlink()  # it is there: the file would have run its code
    with pytest.raises(ValueError, match="code or objects"):
        ResNet8.from_checkpoint(path)
    assert not (tmp_path / "mark").exists()
