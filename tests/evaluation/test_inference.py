"""models/evaluation/inference.py: the plain network's numbers, whatever speeds it up; the network's size."""

import sys
from io import StringIO

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import resnet8
from models.evaluation import inference
from models.normalization import Normalization
from tests.evaluating import random_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("arguments", [{}, {"in_channels": 1}, {"width": 5, "num_classes": 100}], ids=str)
def test_logits_equal_the_plain_network(arguments, sample):
    channels = arguments.get("in_channels", 3)
    normalization = Normalization([100.0, 120.0, 140.0][:channels], [50.0] * channels)
    images, model = sample.images[:70, :channels], random_model(**arguments)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = inference.predict(inference.prepare(model, CPU, torch.float64), images, normalization, 32, 2)
    assert logits.dtype == np.float64
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.inference_mode():
        expected = model.double()(torch.from_numpy(normalization(images))).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)


def test_threads_and_batch_size_change_no_prediction(sample):
    model = inference.prepare(random_model(), CPU, torch.float32)
    threads = torch.get_num_threads()
    first, *others = [
        inference.predict(model, sample.images[:130], Normalization.from_args(3, std=64.0), size, workers)
        for size, workers in [(32, 1), (32, 2), (32, 5), (7, 3), (1000, 2)]
    ]
    assert torch.get_num_threads() == threads
    for other in others[:2]:  # the same batches: the same numbers, in order
        np.testing.assert_array_equal(other, first)
    for other in others[2:]:
        np.testing.assert_allclose(other, first, rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_the_normalization_in_float32(sample):
    """Around mean 1000, bfloat16 pixels would be multiples of 4 and more."""
    inputs, normalization = [], Normalization([1000.0] * 3, [64.0] * 3)
    model = inference.prepare(random_model(), CPU, torch.bfloat16)
    model.conv1.register_forward_pre_hook(lambda _, batch: inputs.append(batch[0].float()))
    logits = inference.predict(model, sample.images[:64], normalization, 64, 1)
    assert np.isfinite(logits).all()
    expected = ((torch.from_numpy(sample.images[:64]).float() - 1000) / 64).bfloat16().float()
    assert torch.equal(inputs[0], expected)


def test_a_progress_bar_shows_any_name_on_a_terminal_only(monkeypatch):
    class Terminal(StringIO):
        def isatty(self):
            return True

    for stderr, is_shown in ((StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert list(inference.track(iter("ab"), 2, "[/red] x.pt")) == ["a", "b"]
        assert ("[/red] x.pt" in stderr.getvalue()) == is_shown


def test_a_device_or_dtype_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert inference.choose_device("auto").type == "mps" and inference.choose_device("cpu").type == "cpu"
    for name, dtype in (("cuda", "float32"), ("mps", "float64")):
        with pytest.raises(ValueError, match=f"--d.*{name}"):
            inference.choose_device(name, dtype)


def test_the_network_size_equals_the_docstring_and_pytorchs_count():
    trainable, statistics, macs = (
        int(word.replace(",", ""))
        for word in resnet8.__doc__.partition("    total")[2].splitlines()[0].replace("+", "").split()
    )
    size = inference.network_size(random_model(), (3, 32, 32))
    assert list(size.values()) == [trainable + statistics, trainable, macs]
    wide = random_model(width=5, in_channels=1, num_classes=7).double()
    with FlopCounterMode(display=False) as counter:
        wide(torch.zeros(1, 1, 24, 40, dtype=torch.float64))
    size = inference.network_size(wide, (1, 24, 40))
    assert size["multiply_accumulates"] == counter.get_total_flops() / 2
    assert size["parameters"] - size["trainable"] == 2 * (3 * 5 + 2 * 10 + 2 * 20)
