"""models/transforms.py: equivalent networks equal the original; activations of every layer."""

import contextlib
from functools import partial

import pytest
import torch
from torch import nn

from models.graph import GRAPH
from models.resnet8 import SamePadConv2d
from models.transforms import (
    fold_batch_norm,
    layer_activations,
    pad_symmetrically,
    rotate_180,
    transfer_weights,
)
from tests.evaluating import random_model
from tests.other_classes import EmlEda, ExecuTorch, MLCommons
from tests.recipes import read_recipes

LOGITS = 3e-14  # bound in float64, relative to the largest logit


def assert_rotation_is_equal(model, images):
    with torch.inference_mode():
        expected = model(images)
        logits = rotate_180(model, images.shape[2:])(images.flip(2, 3))
    assert (logits - expected).abs().max() <= LOGITS * max(1, expected.abs().max())


@pytest.mark.parametrize(("width", "classes", "channels"), [(16, 10, 3), (5, 7, 1)])
@pytest.mark.parametrize("size", [(4, 4), (8, 20), (64, 36)])
def test_rotated_network_is_equal(width, classes, channels, size):
    model = random_model(width=width, num_classes=classes, in_channels=channels).double()
    assert_rotation_is_equal(model, 255 * torch.rand(3, channels, *size, dtype=torch.float64))


def test_rotated_network_is_equal_on_real_images(sample):
    model, images = random_model().double(), torch.from_numpy(sample.images[:10]).double()
    assert_rotation_is_equal(model, images)
    assert_rotation_is_equal(fold_batch_norm(model), images)
    with torch.inference_mode():  # a network that ignores the rotation would differ
        assert (rotate_180(model)(images) - model(images)).abs().max() > 1e-3


def test_rotated_network_has_symmetric_padding():
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotated = rotate_180(model)
    convolutions = [module for module in rotated.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 9 and not any(isinstance(conv, SamePadConv2d) for conv in convolutions)
    assert {(conv.kernel_size, conv.padding) for conv in convolutions} == {((3, 3), (1, 1)), ((2, 2), (0, 0))}
    assert not any(module.training for module in rotated.modules())
    state = model.state_dict()  # the original is unchanged
    assert state.keys() == rotated.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in state.items())


@pytest.mark.parametrize("size", [(33, 32), (32, 31), (30, 32), (6, 6)])
def test_rotation_refuses_sizes_where_it_would_differ(size):
    model, images = random_model(), torch.rand(1, 3, *size)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        rotate_180(model, size)
    with torch.inference_mode(), contextlib.suppress(RuntimeError):  # the refusal is needed
        assert (rotate_180(model)(images.flip(2, 3)) - model(images)).abs().max() > 1e-3


@pytest.mark.parametrize(("width", "size"), [(16, (32, 32)), (5, (4, 4)), (5, (8, 20))])
def test_network_with_4x4_kernels_is_equal(width, size):
    model, images = random_model(width=width).double(), 255 * torch.rand(3, 3, *size, dtype=torch.float64)
    padded, before = pad_symmetrically(model), model.state_dict()
    with torch.inference_mode():
        assert (padded(images) - model(images)).abs().max() <= LOGITS * model(images).abs().max()
    convolutions = [module for module in padded.modules() if isinstance(module, nn.Conv2d)]
    assert {(c.kernel_size, c.stride, c.padding) for c in convolutions} == {
        ((3, 3), (1, 1), (1, 1)),
        ((4, 4), (2, 2), (1, 1)),
        ((1, 1), (2, 2), (0, 0)),
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def other_names(repository):
    """Return the names of a class's layers by those of ResNet8, from the table in RECIPES.md."""
    namespace = {}
    exec(read_recipes()["Other PyTorch classes"].blocks[0][1], namespace)
    return dict(zip(namespace["own"].split(), namespace["others"][repository].split(), strict=True))


@pytest.mark.parametrize(
    ("repository", "build", "strided"),
    [
        ("mlcommons/tiny", MLCommons, (4, 4)),
        ("eml-eda/pytorch-benchmarks", EmlEda, (4, 4)),
        ("ExecuTorch", ExecuTorch, (4, 4)),
        ("ExecuTorch", partial(ExecuTorch, is_aligned=True), (3, 3)),
    ],
)
def test_other_classes_with_transferred_weights_are_equal(sample, repository, build, strided):
    """They differ from Keras in biases, epsilon and padding."""
    model, images = random_model().double(), torch.from_numpy(sample.images[:10]).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network, names = build().double(), other_names(repository)
    for _ in range(2):  # the second time its kernels are 4x4 already
        assert transfer_weights(model, network, names) is network
    with torch.inference_mode():
        assert (network(images) - model(images)).abs().max() <= LOGITS * model(images).abs().max()
    assert network.get_submodule(names["layer2.conv1"]).kernel_size == strided
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_transferring_weights_to_missing_layers_is_an_error():
    model, names = random_model(), other_names("mlcommons/tiny")
    with pytest.raises(AttributeError):
        transfer_weights(model, MLCommons(), names | {"fc": "head"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        transfer_weights(random_model(width=8), MLCommons(), names)
    del names["layer2.downsample"]
    with pytest.raises(RuntimeError, match=r"second_stack.residual.weight"):
        transfer_weights(model, MLCommons(), names)


def test_folded_network_is_equal(sample):
    model, images = random_model().double(), torch.from_numpy(sample.images[:10]).double()
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.inference_mode():
        assert (folded(images) - model(images)).abs().max() <= LOGITS * model(images).abs().max()
    folded = fold_batch_norm(random_model().train())
    assert not folded.training and folded.fc.weight.dtype == torch.float64


def test_layer_activations(sample):
    """Every node of GRAPH, channels last, before the addition changes it in place."""
    model, images = random_model(), torch.from_numpy(sample.images[:4]).float()
    activations = layer_activations(model, images)
    assert activations.keys() == GRAPH.keys()
    with torch.inference_mode():
        assert torch.equal(torch.from_numpy(activations["fc"]), model(images))
    assert activations["layer2.conv1"].shape == (4, 16, 16, 32)
    for name in ("layer1", "layer3"):
        shortcut = activations["relu" if name == "layer1" else f"{name}.downsample"]
        assert (activations[f"{name}.add"] == activations[f"{name}.bn2"] + shortcut).all()
        assert (activations[f"{name}.relu2"] == activations[f"{name}.add"].clip(0)).all()
    with pytest.raises(TypeError):
        layer_activations(model, sample.images[:4])  # an array, not a tensor
    assert not any(module._forward_hooks for module in model.modules())  # also after the error
    model.layer2.bn1.train()
    with pytest.raises(ValueError, match="train mode"):
        layer_activations(model, images)
