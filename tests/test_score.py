"""evaluate.score: any function of a batch, measured as the command measures a checkpoint."""

import copy
import inspect
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluate import compare, score
from models.activations import layer_activations
from models.equivalents import fold_batch_norm
from models.graph import GRAPH
from models.resnet8 import ResNet8
from tests.evaluating import evaluated, has_line, random_model, save, scaling

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # random weights are near chance
FED = {"mean": [120.0] * 3, "std": [64.0] * 3}


def test_it_is_what_the_command_measures(tmp_path, sample):
    model = random_model()
    save(model, tmp_path / "model.pt", input=scaling(120.0, 64.0))
    _, metrics = evaluated("model.pt", "--no-keras", cwd=tmp_path)
    found = score(model, sample, **FED)
    assert metrics["pytorch"].keys() == found.metrics.keys()
    assert metrics["pytorch"]["confusion_matrix"] == found.metrics["confusion_matrix"]
    assert metrics["pytorch"]["per_class_accuracy"] == found.metrics["per_class_accuracy"]
    assert metrics["pytorch"]["loss"] == pytest.approx(found.metrics["loss"], rel=1e-6)
    assert asdict(found.scaling) == FED


def test_a_network_knows_what_it_is_fed(tmp_path, sample):
    """`from_checkpoint` reads it from the JSON; what `score` is told goes before it."""
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    sample = replace(sample, images=sample.images[:200], labels=sample.labels[:200])
    model = ResNet8.from_checkpoint(tmp_path / "model.pt")
    expected = score(random_model(), sample, **FED)
    for network in (model, fold_batch_norm(model), copy.deepcopy(model)):
        found = score(network, sample)
        assert asdict(found.scaling) == FED and found.metrics["correct"] == expected.metrics["correct"]
    told = score(model, sample, mean=0, std=np.float32(255))
    assert asdict(told.scaling) == {"mean": [0.0] * 3, "std": [255.0] * 3}
    assert asdict(score(model, sample, std=[1, 2, 3]).scaling) == {
        "mean": [120.0] * 3,
        "std": [1.0, 2.0, 3.0],
    }


def test_near_chance_is_said(sample):
    def network(correct):
        wrong = (sample.labels + 1) % 10
        classes = torch.from_numpy(np.where(np.arange(1000) < correct, sample.labels, wrong))
        return iter(F.one_hot(classes, 10).float().split(100))

    for correct, warns in ((190, True), (500, False)):
        outputs = network(correct)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            score(lambda batch, outputs=outputs: next(outputs), sample, name="odd", std=255)
        told = [str(warning.message) for warning in caught]
        assert len(told) == warns
        assert all(has_line(line, "odd", "[0.0, 0.0, 0.0]", "[255.0, 255.0, 255.0]") for line in told)


def exported(model):
    batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=batch).module()


CALLABLES = {
    "module": lambda model: model,
    "lambda": lambda model: lambda batch: model(batch),
    "numpy in and out": lambda model: lambda batch: model(torch.from_numpy(batch.numpy())).numpy(),
    "torch.export": exported,
    "torch.jit": lambda model: torch.jit.script(model),
    "folded": lambda model: fold_batch_norm(model).float(),
    "float64": lambda model: fold_batch_norm(model),
    "another dtype out": lambda model: lambda batch: model(batch).double(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", CALLABLES)
def test_any_function_of_a_batch(sample, kind):
    model = random_model()
    original = score(model, sample, **FED, name="original")
    other = score(CALLABLES[kind](random_model()), sample, **FED, name=kind)
    pair = compare(original, other)
    assert pair["models"] == ["original", kind]
    assert pair["same_prediction"] == 1000 and pair["mcnemar_p"] == 1
    assert pair["max_abs_probability_difference"] < 1e-4


def test_batches_are_contiguous_float32_and_hold_every_image_once(sample):
    seen = []

    def network(batch):
        seen.append(batch.clone())
        assert batch.dtype == torch.float32 and batch.is_contiguous()
        return F.one_hot(torch.arange(len(batch)) % 10, 10).float()

    found = score(network, sample, batch_size=300)
    assert [len(batch) for batch in seen] == [300, 300, 300, 100]
    assert torch.equal(torch.cat(seen), torch.from_numpy(sample.images).float())  # plain pixels, in order
    assert (found.classes == np.concatenate([np.arange(n) % 10 for n in (300, 300, 300, 100)])).all()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda batch: torch.full((len(batch), 10), torch.nan), "NaN"),
        (lambda batch: torch.full((len(batch), 10), torch.inf), ""),
        (lambda batch: torch.zeros(len(batch), 7), r"shape \(1000, 7\)"),
        (lambda batch: torch.zeros(1, 10), r"shape \(10, 10\)"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(sample, network, words):
    with pytest.raises(ValueError, match=f"odd.*{words}"):
        score(network, sample, name="odd")


def test_a_network_in_train_mode_is_refused_and_unchanged(sample):
    """Its BatchNorms would use each batch's statistics, and take them into their own."""
    model = random_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tuned.*eval\(\)"):
        score(model, sample, name="tuned")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_scaling_of_another_number_of_channels_is_refused(sample):
    with pytest.raises(ValueError, match=r"mean.*2.*3"):
        score(random_model(), sample, mean=[0.0, 0.0])
    one, each = (score(random_model(), sample, [120.0] * n, [64.0] * n) for n in (1, 3))
    assert np.array_equal(one.log_probabilities, each.log_probabilities) and one.scaling == each.scaling


def test_layer_activations_leave_no_hooks_when_the_network_fails(sample):
    model = random_model()
    with pytest.raises(TypeError):
        layer_activations(model, sample.images[:4])  # an array, no tensor
    assert not any(module._forward_hooks for module in model.modules())


def test_every_layers_activations_by_name():
    """For golden vectors: channels last, under the names of the table, and the last are the logits."""
    model, images = random_model(), torch.randn(2, 3, 32, 32)
    found = layer_activations(model, images)
    assert set(found) == set(GRAPH)
    assert found["conv1"].shape == (2, 32, 32, 16) and found["layer3.add"].shape == (2, 8, 8, 64)
    with torch.inference_mode():
        assert np.array_equal(found["fc"], model(images).numpy())
        assert np.array_equal(found["conv1"], model.conv1(images).permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("function", [score, compare, layer_activations, fold_batch_norm])
def test_public_functions_are_documented(function):
    assert "Return" in inspect.getdoc(function) or "Feed" in inspect.getdoc(function)
