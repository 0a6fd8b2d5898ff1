"""evaluate.score: any function of a batch, measured as by the command; layer activations by name."""

import copy
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import DataParallel
from torch.optim.swa_utils import AveragedModel

from data.cifar10 import Dataset
from evaluate import compare, score
from models.normalization import USUAL, Normalization
from models.resnet8 import ResNet8
from models.transforms import fold_batch_norm, layer_activations
from tests.evaluating import random_model, save, scaling

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # random weights are near chance
NORMALIZATION = {"mean": [120.0] * 3, "std": [64.0] * 3}


@pytest.fixture(scope="module")
def dataset(sample):
    return replace(sample, images=sample.images[:250], labels=sample.labels[:250])


def test_a_network_has_the_normalization_of_its_json(tmp_path, dataset):
    """Arguments override it."""
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    model = ResNet8.from_checkpoint(tmp_path / "model.pt")
    expected = score(random_model(), dataset, **NORMALIZATION)
    for network in (model, fold_batch_norm(model), copy.deepcopy(model)):
        predictions = score(network, dataset)
        assert asdict(predictions.normalization) == NORMALIZATION
        assert predictions.metrics["correct"] == expected.metrics["correct"]
    for arguments, mean, std in (
        ({"mean": 0, "std": np.float32(255)}, [0.0] * 3, [255.0] * 3),
        ({"std": [1, 2, 3]}, [120.0] * 3, [1.0, 2.0, 3.0]),
    ):
        assert asdict(score(model, dataset, **arguments).normalization) == {"mean": mean, "std": std}


@pytest.mark.parametrize(
    "wrap", [AveragedModel, DataParallel, lambda model: DataParallel(AveragedModel(model))]
)
def test_a_wrapped_network_has_the_normalization_of_the_one_inside(dataset, wrap):
    model = random_model()
    model.normalization = Normalization(**NORMALIZATION)
    assert asdict(score(wrap(model).eval(), dataset).normalization) == NORMALIZATION


def test_a_layer_named_normalization_is_none(dataset):
    model = random_model()
    model.normalization = torch.nn.Identity()
    assert score(model, dataset).normalization.is_identity


@pytest.mark.parametrize("index", range(len(USUAL)))
def test_a_usual_normalization_that_is_better_is_named_where_none_is_given(dataset, index):
    right = Normalization.usual(3)[index]
    known = {image.tobytes(): label for image, label in zip(dataset.images, dataset.labels, strict=True)}

    def network(batch):  # right for known images in the right normalization
        pixels = batch.numpy() * np.reshape(right.std, (3, 1, 1))
        pixels = np.rint(pixels + np.reshape(right.mean, (3, 1, 1))).clip(0, 255).astype(np.uint8)
        return np.eye(10)[[known.get(image.tobytes(), 0) for image in pixels]]

    def refusing(batch):
        assert batch.min() >= 0 and batch.max() > 1
        return network(batch)

    assert score(refusing, dataset, name="odd").normalization.is_identity
    for given, count in (({}, index > 0), ({"std": 3.0}, 1), (asdict(right), 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            score(network, dataset, name="odd", **given)
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == count and all("odd" in message for message in messages)
        for values in asdict(right).values():
            assert all((f"{values}" in message) == (not given) for message in messages)


@pytest.mark.parametrize(("correct", "warns"), [(49, True), (50, False)])
def test_near_chance_warns(dataset, correct, warns):
    classes = np.where(np.arange(250) < correct, dataset.labels, (dataset.labels + 1) % 10)
    images = np.zeros_like(dataset.images)
    images[:, 0, 0, 0] = classes
    images = replace(dataset, images=images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score(
            lambda batch: 255 * (batch[:, 0, 0, :1] - torch.arange(10) / 255).abs().neg(),
            images,
            name="odd",
            std=255,
        )
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == warns and all("odd" in each and "255" in each for each in messages)


CALLABLES = {
    "lambda": lambda model: lambda batch: model(batch),
    "numpy in and out": lambda model: lambda batch: model(torch.from_numpy(batch.numpy())).numpy(),
    "folded": lambda model: fold_batch_norm(model).float(),
    "float64": lambda model: fold_batch_norm(model),
    "another dtype out": lambda model: lambda batch: model(batch).double(),
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_any_function_of_a_batch(dataset, kind):
    original = score(random_model(), dataset, **NORMALIZATION, name="original")
    other = score(CALLABLES[kind](random_model()), dataset, **NORMALIZATION, name=kind)
    pair = compare(original, other)
    assert pair["models"] == ["original", kind]
    assert pair["same_prediction"] == 250 and pair["mcnemar_p"] == 1
    assert pair["max_abs_probability_difference"] < 1e-4


def test_batches_are_contiguous_float32_and_have_every_image_once(dataset):
    batches = []

    def network(batch):
        batches.append(batch.clone())
        assert batch.dtype == torch.float32 and batch.is_contiguous()
        return F.one_hot(torch.arange(len(batch)) % 10, 10).float()

    predictions = score(network, dataset, std=1, batch_size=75)  # known: no other is tried
    assert [len(batch) for batch in batches] == [75, 75, 75, 25, 75, 75]  # the last are compared
    assert torch.equal(torch.cat(batches[:4]), torch.from_numpy(dataset.images).float())  # pixels, in order
    assert (predictions.classes == np.concatenate([np.arange(n) % 10 for n in (75, 75, 75, 25)])).all()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda batch: torch.full((len(batch), 10), torch.nan), "NaN"),
        (lambda batch: torch.full((len(batch), 10), torch.inf), "infinite"),
        (lambda batch: torch.zeros(len(batch), 7), r"\(250, 7\)"),
        (lambda batch: torch.zeros(1, 10), r"\(3, 10\)"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(dataset, network, words):
    with pytest.raises(ValueError, match=f"odd: .*{words}"):
        score(network, dataset, name="odd")


def test_a_network_in_train_mode_is_refused_and_unchanged(dataset):
    """BatchNorm would use each batch's statistics, and update its own."""
    model = random_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"tuned: bn1 .*eval\(\)"):
        score(model, dataset, name="tuned")
    with pytest.raises(ValueError, match=r"bn1 .*eval\(\)"):
        layer_activations(model, torch.zeros(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def head(*layers):
    """Return a random network with further layers after its logits."""
    return nn.Sequential(random_model(), *layers).eval()


MODEL, TRAINING = head(), head(nn.BatchNorm1d(10))
TRAINING[1].train()
DEPENDENT = {  # network, a word of the message
    "BatchNorm1d": (TRAINING, r"1 .*eval\(\)"),
    "Dropout": (nn.Sequential(random_model(), nn.Dropout(0.1)), r"1 .*eval\(\)"),
    "function in train mode": (lambda batch: TRAINING(batch), "batch"),
    "no running statistics": (head(nn.BatchNorm1d(10, track_running_stats=False)), "batch"),
    "mean of the batch": (lambda batch: MODEL(batch - batch.mean(0)), "batch"),
    "random": (lambda batch: MODEL(batch) + torch.rand(len(batch), 10), "run"),
    "dynamic quantization": (lambda batch: quantize_dynamic(MODEL, {nn.Linear})(batch), "batch"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.ao
@pytest.mark.parametrize("kind", DEPENDENT)
def test_outputs_that_depend_on_the_batch_are_refused(dataset, kind):
    network, words = DEPENDENT[kind]
    with pytest.raises(ValueError, match=f"odd: .*{words}"):
        score(network, dataset, **NORMALIZATION, name="odd")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_dependence_on_the_batch(dataset, dtype):
    network = head(nn.Dropout(0.1), nn.Softmax(1)).to(dtype)
    assert score(network, dataset, **NORMALIZATION, batch_size=64).outputs == "probabilities"


def test_a_normalization_has_one_value_or_one_per_channel(dataset):
    with pytest.raises(ValueError, match=r"mean.*2.*3"):
        score(random_model(), dataset, mean=[0.0, 0.0])
    one, each = (score(random_model(), dataset, [120.0] * n, [64.0] * n) for n in (1, 3))
    assert np.array_equal(one.log_probabilities, each.log_probabilities)
    assert one.normalization == each.normalization


@pytest.mark.parametrize("classes", [2, 100, 1000])
def test_a_data_set_has_its_own_classes(classes):
    """Other images and labels than CIFAR-10's; uint8 labels, as files often have them."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (300, 3, 40, 48), np.uint8)
    labels = random.integers(0, min(classes, 256), 300).astype(np.uint8)
    names = tuple(f"class {number}" for number in range(classes))
    dataset = Dataset("mine", images, labels, class_names=names)
    network = ResNet8(num_classes=classes, width=2).eval()
    with torch.inference_mode():
        predicted = network(torch.from_numpy(images).float()).argmax(1).numpy()
    first, second = (score(network, dataset, name=name) for name in ("first", "second"))
    assert first.metrics["correct"] == (predicted == labels).sum()
    assert list(first.metrics["per_class_accuracy"]) == list(names)
    assert np.shape(first.metrics["confusion_matrix"]) == (classes, classes)
    assert compare(first, second)["same_prediction"] == 300
    with pytest.raises(ValueError, match="shape"):
        score(ResNet8(num_classes=classes + 1).eval(), dataset)
