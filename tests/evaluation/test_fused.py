"""models/evaluation/fused.py: the network's own numbers, or no fused network."""

import pytest
import torch

from models.evaluation import fused, inference
from models.normalization import Normalization
from tests.evaluating import HAS_FUSED_OPERATORS, random_model

needs_onednn = pytest.mark.skipif(not HAS_FUSED_OPERATORS, reason="this PyTorch has no fused operators")


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_onednn
@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((64, 3, 32, 32), {}),
        ((16, 3, 32, 32), {"width": 40, "num_classes": 7}),
        ((5, 1, 20, 36), {"in_channels": 1, "width": 3}),
    ],
)
def test_outputs_equal_the_plain_network(shape, arguments):
    model, batch = random_model(**arguments), images(*shape)
    network = fused.fuse(model, batch)
    assert isinstance(network, fused.FusedResNet8)
    with torch.inference_mode():
        for size in (shape[0], 1, 3):  # the last batch is short
            others = images(size, *shape[1:], seed=1)
            assert torch.allclose(network(others.flip(2, 3)), model(others), rtol=1e-4, atol=1e-5)


@needs_onednn
def test_predict_rotates_its_images(sample):
    model, normalization = random_model(), Normalization.from_args(3, 120.0, 64.0)
    network = fused.fuse(model, torch.from_numpy(normalization(sample.images[:64])).float())
    plain = inference.prepare(model, torch.device("cpu"), torch.float32)
    expected, outputs = (
        inference.predict(each, sample.images[:150], normalization, 64, 2) for each in (plain, network)
    )
    assert abs(expected - outputs).max() < 1e-4


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_missing_operators_and_odd_sizes_leave_the_plain_network(monkeypatch, error):
    assert fused.fuse(random_model(), images(4, 3, 30, 30)) is None

    def missing(*_):
        raise error("no such operator")

    monkeypatch.setattr(fused.FusedResNet8, "_convolve", missing)
    assert fused.fuse(random_model(), images(4, 3, 32, 32)) is None


def not_rotated(patch):
    patch.setattr(fused, "rotate_180", lambda model, size: model)


def slightly_off(patch):
    """1e-4 of a probability: a hundred times float32's rounding."""
    convolve = fused.FusedResNet8._convolve

    def scaled(network, x, name, after="relu"):
        return convolve(network, x, name, after) * (1 + 1e-4 * (name == "conv1"))

    patch.setattr(fused.FusedResNet8, "_convolve", scaled)


@needs_onednn
@pytest.mark.parametrize("mistake", [not_rotated, slightly_off])
def test_other_numbers_leave_the_plain_network(monkeypatch, mistake):
    mistake(monkeypatch)
    assert fused.fuse(random_model(), images(64, 3, 32, 32)) is None
