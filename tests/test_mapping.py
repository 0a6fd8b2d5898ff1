"""models/mapping.py and tensors.py: every tensor's way, against Keras's own layers, and back."""

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from models.keras.file import read_keras_file
from models.mapping import MAPPING
from tests.keras_files.edits import replace_kernel
from tests.keras_files.references import MODELS


@pytest.mark.parametrize("class_name", MAPPING)
def test_transforms_of_a_layer(reference, class_name):
    """One layer with Keras's weights, permuted by MAPPING, computes what Keras's layer computes."""
    layer = {
        "Conv2D": lambda: nn.Conv2d(4, 5, (3, 2)),
        "BatchNormalization": lambda: nn.BatchNorm2d(6, eps=1e-3),
        "Dense": lambda: nn.Linear(7, 5),
    }[class_name]()
    state = {
        parameter: torch.from_numpy(reference[f"{class_name}:{name}"].transpose(axes).copy())
        for name, parameter, axes, *_ in MAPPING[class_name]
    }
    layer = layer.double().eval()
    layer.load_state_dict(state, strict=False)
    assert set(layer.state_dict()) - set(state) <= {"num_batches_tracked"}
    images = torch.from_numpy(reference[f"{class_name}:input"])
    with torch.inference_mode():
        outputs = layer(images.movedim(-1, 1)).movedim(1, -1).numpy()
    assert outputs.shape == reference[f"{class_name}:output"].shape
    assert np.abs(outputs - reference[f"{class_name}:output"]).max() <= 1e-14 * 10


@pytest.mark.parametrize(
    ("class_name", "variable"),
    [(class_name, variable.name) for class_name in MAPPING for variable in MAPPING[class_name]],
)
def test_every_transform_has_an_inverse(reference, class_name, variable):
    """The transforms are permutations: the inverse one gives back the Keras tensor, bit for bit."""
    (axes,) = [known.axes for known in MAPPING[class_name] if known.name == variable]
    array = reference[f"{class_name}:{variable}"]
    assert sorted(axes) == list(range(array.ndim))
    there = array.transpose(axes)
    assert there.shape == tuple(array.shape[axis] for axis in axes)
    assert np.array_equal(there.transpose(np.argsort(axes)), array)


@pytest.mark.parametrize("name", MODELS)
def test_mapping_carries_every_weight_there_and_back(reference_files, network, reader, name):
    """The table names every tensor of both sides once; read backwards, it gives back the Keras file."""
    model, rows = network(name)
    state = {key: value.numpy() for key, value in model.float().state_dict().items()}
    assert {row.key for row in rows} == {key for key in state if not key.endswith("num_batches_tracked")}
    assert len({row.key for row in rows}) == len(rows)
    back = {(row.layer, row.variable): state[row.key].transpose(np.argsort(row.axes)) for row in rows}
    saved = {
        (layer.name, variable): array
        for layer in read_keras_file(reference_files / f"{name}.h5", reader).layers
        for variable, array in layer.arrays.items()
    }
    assert back.keys() == saved.keys()
    assert all(np.array_equal(back[key], saved[key]) for key in saved)
    with h5py.File(reference_files / f"{name}.h5") as file:  # and what our reader read is what is in the file
        for (layer, variable), array in saved.items():
            assert np.array_equal(file["model_weights"][layer][layer][variable], array)


def test_float64_weights_beyond_float32_are_refused(edited, refusal):
    def make(file, name):
        file[name] = np.full((3, 3, 3, 4), 1e300)

    assert "float32" in refusal(edited(replace_kernel(make)))
