"""A converted network trains as in Keras, in float64: loss, gradients and statistics, in both modes."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from models.graph import GRAPH
from tests.keras_files.references import BATCH, MODELS


def keras_tensor(computed, prefix, row):
    """Return a Keras gradient or statistic in PyTorch's layout, permuted like its variable."""
    return computed[f"{prefix}:{row.layer}/{row.variable}"].transpose(row.axes)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_keras(reference, network, name, mode):
    """Fine-tuning starts where Keras stopped: outputs, loss, and the gradient of every weight."""
    computed = {key.removeprefix(f"{name}:"): value for key, value in reference.items()}
    assert_loss_and_gradients_are_keras(computed, *network(name), mode)


def assert_loss_and_gradients_are_keras(computed, model, rows, mode):
    """Check the outputs, loss and gradients of a float64 network against Keras's, `computed`."""
    model.train(mode == "train")
    model.zero_grad()
    images = torch.from_numpy(computed["images"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(computed["labels"])
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()

    probabilities = logits.softmax(dim=1).detach().numpy()
    assert np.abs(probabilities - computed[f"{mode}:probabilities"]).max() <= 1e-12
    assert abs(loss.item() - computed[f"{mode}:loss"]) <= 1e-12
    trained = [row for row in rows if not row.variable.startswith("moving_")]
    assert len(trained) == len(list(model.parameters())) == 34
    largest = {}
    for row in trained:
        pytorch = model.get_parameter(row.key).grad.numpy()
        keras = keras_tensor(computed, f"{mode}:gradient", row)
        assert pytorch.shape == keras.shape
        assert np.abs(pytorch - keras).max() <= 1e-9, row.key
        largest[row.key] = np.abs(keras).max()
    # no zeros are compared, except for the biases before a BatchNorm, which subtracts them in train mode
    vanishing = {key for key, value in largest.items() if value < 1e-5}
    before_norm = {f"{node}.bias" for node in GRAPH if re.search(r"conv\d$", node)}
    assert vanishing == (before_norm if mode == "train" else set())


@pytest.mark.parametrize("name", MODELS)
def test_statistics_after_a_step_differ_by_bessels_factor(reference, network, name):
    """What one batch adds to BatchNorm's statistics.

    Both take (1 - momentum) of the batch's mean and variance over n = images x height x width values. Keras
    3 takes the biased variance, sum / n; PyTorch, for `running_var` alone, the unbiased sum / (n - 1). So
    what is added to PyTorch's is n / (n - 1) of what is added to Keras's, and nothing else differs.
    """
    model, rows = network(name)
    images = torch.from_numpy(reference[f"{name}:images"]).permute(0, 3, 1, 2)
    values = {}  # n, by BatchNorm

    def count(norm, module):
        module.register_forward_hook(
            lambda module, inputs, output: values.update({norm: output[:, 0].numel()})
        )

    for norm, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            count(norm, module)
    before = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.train()(images)
    assert min(values.values()) == BATCH * -(-MODELS[name][2][0] // 4) * -(-MODELS[name][2][1] // 4)
    after = model.state_dict()

    checked = 0
    for row in rows:
        if row.variable.startswith("moving_"):
            kept = (1 - model.bn1.momentum) * before[row.key]
            ours = after[row.key].numpy() - kept
            theirs = keras_tensor(reference, f"{name}:train:statistics", row) - kept
            n = values[row.key.rpartition(".")[0]]
            factor = n / (n - 1) if row.variable == "moving_variance" else 1
            assert np.abs(ours - factor * theirs).max() <= 1e-12, row.key
            assert np.abs(ours).max() > 1e-4, row.key
            unmoved = keras_tensor(reference, f"{name}:eval:statistics", row)
            assert np.array_equal(unmoved, before[row.key])  # in eval mode Keras's stay, as PyTorch's do
            checked += 1
    assert checked == 14
