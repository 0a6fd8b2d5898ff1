"""models/resnet8.py: the architecture, tracing and export, and padding equal to Keras's."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from models import resnet8
from models.resnet8 import ResNet8, SamePadConv2d
from tests.evaluating import random_model
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
    """Return (output shape without the batch, multiply-accumulates per image) by name of each leaf module."""
    costs = {}

    def hook(name, module, inputs, output):
        weight = getattr(module, "weight", None) if isinstance(module, (nn.Conv2d, nn.Linear)) else None
        macs = 0 if weight is None else output[0].numel() * weight[0].numel()
        costs[name] = (tuple(output.shape[1:]), macs)

    for name in leaf_names(model):
        model.get_submodule(name).register_forward_hook(partial(hook, name))
    model(images)
    return costs


# The architecture


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
        counts = parameters_of(module), statistics_of(module)
        assert (number(trainable), number(statistics)) == counts, row[0]
        assert number(row["macs"]) == macs, row[0]
        if isinstance(module, nn.Conv2d):
            assert module.kernel_size == (int(row["kernel"]),) * 2, row[0]
            assert module.stride == (int(row["stride"] or 1),) * 2, row[0]
    (total,) = re.findall(r"^ {4}total +([\d,]+) \+ (\d+) +([\d,]+)$", resnet8.__doc__, re.MULTILINE)
    assert tuple(map(number, total)) == (78_186, 480, 12_501_632) and "78,666" in resnet8.__doc__
    assert (parameters_of(model), statistics_of(model)) == (78_186, 480)
    assert sum(macs for _, macs in costs.values()) == 12_501_632


def leaf_names(model):
    return [name for name, module in model.named_modules() if not list(module.children())]


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


# Tracing


@pytest.fixture
def batches():
    """Return batches of images of even and odd sizes, so that each strided convolution pads each way."""
    torch.manual_seed(3)
    sizes = [(4, 32, 32), (1, 21, 30), (3, 33, 47), (2, 20, 15), (5, 19, 22)]
    return [torch.randn(count, 3, height, width) * 50 for count, height, width in sizes]


def exported(model):
    """Return the model exported for any batch size, height and width."""
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (torch.randn(4, 3, 24, 27),), dynamic_shapes=(any_size,)).module()


TRACED = {"fx": torch.fx.symbolic_trace, "script": torch.jit.script, "export": exported}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("how", TRACED)
def test_traced_network_computes_the_same(model, batches, how):
    """Bit for bit, for every size: quantization tools and exporters use these."""
    traced = TRACED[how](model.eval())
    with torch.no_grad():
        for images in batches:
            assert torch.equal(traced(images), model(images)), images.shape


# 'same' padding


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stride", STRIDES)
def test_same_padding_is_keras(reference, kernel, stride):
    """Heights 1 to 12 with widths 12 to 1, against Keras's Conv2D in float64."""
    conv = SamePadConv2d(2, 3, kernel, stride).double()
    conv.weight.data = torch.from_numpy(reference[f"same:{kernel}:kernel"].transpose(3, 2, 0, 1).copy())
    conv.bias.data = torch.from_numpy(reference[f"same:{kernel}:bias"])
    image = torch.from_numpy(reference["same:image"]).permute(0, 3, 1, 2)
    for size in SIZES:
        expected = reference[f"same:{kernel}:{stride}:{size}"].transpose(0, 3, 1, 2)
        output = conv(image[:, :, :size, : 13 - size]).detach().numpy()
        assert output.shape == expected.shape == (1, 3, -(-size // stride), -(-(13 - size) // stride))
        assert np.abs(output - expected).max() <= 1e-12, size


def test_the_file_works_alone_in_another_project(tmp_path):
    """Copied into an empty folder, with torch and nothing else to import."""
    shutil.copy(resnet8.__file__, tmp_path)
    torch.save(random_model().state_dict(), tmp_path / "model.pt")
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
    command = [sys.executable, "-W", "ignore", "-c", program, "model.pt"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    with torch.inference_mode():
        expected = ResNet8.from_checkpoint(tmp_path / "model.pt")(torch.full((1, 3, 32, 32), 128.0))
    assert torch.allclose(torch.tensor(json.loads(alone.stdout)), expected, rtol=1e-5)
