"""models/resnet8.py: the network's shape, what traces and compiles it, and its padding against Keras's."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from models import resnet8
from models.resnet8 import ResNet8, SamePadConv2d
from tests.keras_files.references import KERNELS, SIZES, STRIDES


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


# Tracing


@pytest.fixture
def batches():
    """Return batches of images of even and odd sizes, so that each strided convolution pads each way."""
    torch.manual_seed(3)
    sizes = [(4, 32, 32), (1, 21, 30), (3, 33, 47), (2, 20, 15), (5, 19, 22)]
    return [torch.randn(count, 3, height, width) * 50 for count, height, width in sizes]


def exported(model):
    """Return the model as `torch.export` has it, for any batch, height and width."""
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (torch.randn(4, 3, 24, 27),), dynamic_shapes=(any_size,)).module()


TRACED = {"fx": torch.fx.symbolic_trace, "script": torch.jit.script, "export": exported}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("how", TRACED)
def test_traced_network_computes_the_same(model, batches, how):
    """Bit for bit, for every size: quantization tools and exporters see the network through these."""
    traced = TRACED[how](model.eval())
    with torch.no_grad():
        for images in batches:
            assert torch.equal(traced(images), model(images)), images.shape


class FormerSamePadConv2d(nn.Conv2d):
    """The same padding as a list, which nothing could trace; left out where it is 0."""

    def forward(self, x):
        padding = []
        for axis in (1, 0):  # F.pad takes the width's padding first
            size, stride = x.shape[2 + axis], self.stride[axis]
            outputs = (size + stride - 1) // stride
            total = max((outputs - 1) * stride + self.kernel_size[axis] - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(x, padding) if any(padding) else x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_network_computes_what_it_did_before_it_could_be_traced(model, batches, monkeypatch, dtype):
    monkeypatch.setattr(resnet8, "SamePadConv2d", FormerSamePadConv2d)
    former = ResNet8()
    assert isinstance(former.layer2.conv1, FormerSamePadConv2d)
    former.load_state_dict(model.state_dict())
    model, former = model.to(dtype).eval(), former.to(dtype).eval()
    with torch.no_grad():
        for images in [*batches, torch.randn(2, 3, 1, 1), torch.randn(2, 3, 2, 5)]:
            assert torch.equal(model(images.to(dtype)), former(images.to(dtype))), images.shape


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stride", STRIDES)
def test_padding_is_what_it_was_before_it_could_be_traced(kernel, stride):
    torch.manual_seed(4)
    conv, former = SamePadConv2d(2, 3, kernel, stride), FormerSamePadConv2d(2, 3, kernel, stride)
    former.load_state_dict(conv.state_dict())
    for size in SIZES:
        image = torch.randn(1, 2, size, 41 - size)
        assert torch.equal(conv(image), former(image)), size


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


def test_the_file_works_alone_in_another_project(converted, tmp_path):
    """Copied into an empty folder, with torch and nothing else to import."""
    shutil.copy(resnet8.__file__, tmp_path)
    program = """
import sys
class Blocked:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "h5py", "rich", "tensorflow", "torchvision", "models", "data"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked)
import torch
from resnet8 import ResNet8
state = torch.load(sys.argv[1], weights_only=True)
loaded, made = ResNet8(), ResNet8.from_state_dict(state)
loaded.load_state_dict(state)
images = 255 * torch.rand(2, 3, 32, 32)
assert torch.equal(loaded.eval()(images), made(images)) and made(images).shape == (2, 10)
print(made(torch.full((1, 3, 32, 32), 128.0)).tolist())
"""
    command = [sys.executable, "-W", "ignore", "-c", program, converted[0] / "model.pt"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    with torch.inference_mode():
        here = ResNet8.from_checkpoint(converted[0] / "model.pt")(torch.full((1, 3, 32, 32), 128.0))
    assert torch.allclose(torch.tensor(json.loads(alone.stdout)), here, rtol=1e-5)
