"""Inference: speed-ups that change nothing."""

import numpy as np
import pytest
import torch

from models.evaluation import inference
from models.scaling import Scaling
from tests.evaluating import random_model


def plain(model, images, mean, std):
    with torch.inference_mode():
        shape = (1, -1, 1, 1)
        batch = (torch.from_numpy(images).double() - torch.tensor(mean).view(shape)) / torch.tensor(std).view(
            shape
        )
        return model.double()(batch).numpy()


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("model", [{}, {"in_channels": 1}, {"width": 5, "num_classes": 100}], ids=str)
def test_inference_computes_the_model_folded_or_not(model, fold, sample):
    channels = model.get("in_channels", 3)
    images, mean, std = sample.images[:70, :channels], [100.0, 120.0, 140.0][:channels], [50.0] * channels
    model = random_model(**model)
    prepared = inference.prepare(model, torch.device("cpu"), torch.float64, fold)
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in prepared.modules())
    assert norms == (0 if fold else 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = inference.predict(prepared, images, Scaling(mean, std), 32, 2)
    assert logits.dtype == np.float64
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    np.testing.assert_allclose(logits, plain(model, images, mean, std), rtol=1e-10, atol=1e-10)


def test_threads_and_batch_size_change_no_prediction(sample):
    model = inference.prepare(random_model(), torch.device("cpu"), torch.float32)
    threads = torch.get_num_threads()
    results = [
        inference.predict(model, sample.images[:130], Scaling.given(3, std=[64.0]), batch_size, workers)
        for batch_size, workers in [(32, 1), (32, 2), (32, 5), (7, 3), (1000, 2)]
    ]
    assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(results[1], results[0])  # the same batches: the same numbers, in order
    np.testing.assert_array_equal(results[2], results[0])
    for other in results[3:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_the_normalization_in_float32(sample):
    """Around mean 1000, bfloat16 pixels would be multiples of 4 and more."""
    images, mean, std = sample.images[:64], [1000.0] * 3, [64.0] * 3
    seen = []
    model = inference.prepare(random_model(), torch.device("cpu"), torch.bfloat16)
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    logits = inference.predict(model, images, Scaling(mean, std), 64, 1)
    assert np.isfinite(logits).all()
    exact = ((torch.from_numpy(images).float() - 1000) / 64).bfloat16().float()
    assert torch.equal(seen[0], exact)
