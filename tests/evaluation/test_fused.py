"""models/evaluation/fused.py: the network's own numbers, or no fused network at all."""

import pytest
import torch

from models.evaluation import fused, inference
from models.scaling import Scaling
from tests.evaluating import HAS_FUSED_OPERATORS, random_model

CPU = torch.device("cpu")
PLAIN = Scaling.given(3, 120.0, 64.0)
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
def test_it_computes_what_the_network_does(shape, arguments):
    model, batch = random_model(**arguments), images(*shape)
    network = fused.fuse(model, batch)
    assert isinstance(network, fused.FusedResNet8)
    with torch.inference_mode():
        for size in (shape[0], 1, 3):  # batches of other sizes too: the last is short
            others = images(size, *shape[1:], seed=1)
            assert torch.allclose(network(others.flip(2, 3)), model(others), rtol=1e-4, atol=1e-5)


@needs_onednn
def test_it_is_used_as_the_folded_network_is(sample):
    model = random_model()
    network = fused.fuse(model, torch.from_numpy(PLAIN.of(sample.images[:64])).float())
    folded = inference.prepare(model, CPU, torch.float32, fold=True)
    plain, found = (inference.predict(each, sample.images, PLAIN, 64, 2) for each in (folded, network))
    assert abs(plain - found).max() < 1e-4 and (plain.argmax(1) == found.argmax(1)).all()


def test_a_size_that_cannot_be_turned_is_left_to_the_plain_network():
    assert fused.fuse(random_model(), images(4, 3, 30, 30)) is None


def test_a_cpu_or_a_pytorch_without_the_operators_is_left_to_the_plain_network(monkeypatch):
    for error in (AttributeError, RuntimeError):

        def missing(*_, error=error):
            raise error("no such operator")

        monkeypatch.setattr(fused.FusedResNet8, "_convolve", missing)
        assert fused.fuse(random_model(), images(4, 3, 32, 32)) is None


@needs_onednn
def test_other_numbers_are_left_to_the_plain_network(monkeypatch):
    """A kernel that is not turned, as a mistake or another PyTorch could have it."""
    monkeypatch.setattr(fused, "turn", lambda model, size: model)
    assert fused.fuse(random_model(), images(4, 3, 32, 32)) is None


@needs_onednn
def test_a_small_difference_counts(monkeypatch):
    """1e-4 of a probability: a hundred times float32's rounding."""
    convolve = fused.FusedResNet8._convolve

    def off(network, x, name, after="relu"):
        return convolve(network, x, name, after) * (1 + 1e-4 * (name == "conv1"))

    monkeypatch.setattr(fused.FusedResNet8, "_convolve", off)
    assert fused.fuse(random_model(), images(64, 3, 32, 32)) is None
