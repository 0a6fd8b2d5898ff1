"""The networks of models/equivalents.py compute what the ResNet8 computes that they are made of."""

import contextlib

import pytest
import torch
from torch import nn

from models.equivalents import fold_batch_norm, turn
from models.resnet8 import SamePadConv2d
from tests.evaluating import random_model

LOGITS = 3e-14  # of the largest logit, in float64


def assert_turned_is_the_same(model, images):
    with torch.inference_mode():
        expected = model(images)
        found = turn(model, images.shape[2:])(images.flip(2, 3))
    assert (found - expected).abs().max() <= LOGITS * max(1, expected.abs().max())


@pytest.mark.parametrize("width, classes, channels", [(16, 10, 3), (26, 10, 3), (40, 7, 1)])
@pytest.mark.parametrize("height, columns", [(32, 32), (4, 4), (8, 20), (64, 36)])
def test_turned(width, classes, channels, height, columns):
    model = random_model(width=width, num_classes=classes, in_channels=channels).double()
    assert_turned_is_the_same(model, 255 * torch.rand(3, channels, height, columns, dtype=torch.float64))


def test_turned_on_real_images(sample):
    model = random_model().double()
    images = torch.from_numpy(sample.images[:100]).double()
    assert_turned_is_the_same(model, images)
    assert_turned_is_the_same(fold_batch_norm(model), images)


def test_turned_pads_symmetrically_and_has_layers_of_pytorch_alone():
    model = random_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    turned = turn(model)
    convolutions = [module for module in turned.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 9 and not any(isinstance(conv, SamePadConv2d) for conv in convolutions)
    assert {(conv.kernel_size, conv.padding) for conv in convolutions} == {((3, 3), (1, 1)), ((2, 2), (0, 0))}
    assert not any(module.training for module in turned.modules())
    state = model.state_dict()  # the original is as it was
    assert state.keys() == turned.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in state.items())


@pytest.mark.parametrize("size", [(33, 32), (32, 31), (30, 32), (6, 6)])
def test_turned_refuses_sizes_on_which_it_would_differ(size):
    with pytest.raises(ValueError, match=rf"\b{size[0]}\b.*\b{size[1]}\b"):
        turn(random_model(), size)
    model, images = random_model(), torch.rand(1, 3, *size)
    with torch.inference_mode(), contextlib.suppress(RuntimeError):  # so that the refusal is a needed one
        assert (turn(model)(images.flip(2, 3)) - model(images)).abs().max() > 1e-3


def test_the_original_cannot_be_fed_turned_images_instead(sample):
    """The test above would see a network that ignores the turning."""
    model, images = random_model().double(), torch.from_numpy(sample.images[:10]).double()
    with torch.inference_mode():
        assert (turn(model)(images) - model(images)).abs().max() > 1e-3
