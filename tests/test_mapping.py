"""models/mapping.py: every tensor to PyTorch and back, against Keras's own layers."""

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from models.keras.file import read_keras_file
from models.mapping import MAPPING
from tests.keras_files.references import MODELS


@pytest.mark.parametrize("class_name", MAPPING)
def test_one_layer_computes_what_keras_computes(reference, class_name):
    """With Keras's weights, permuted by MAPPING; the inverse permutations give them back bit for bit."""
    layer = {
        "Conv2D": lambda: nn.Conv2d(4, 5, (3, 2)),
        "BatchNormalization": lambda: nn.BatchNorm2d(6, eps=1e-3),
        "Dense": lambda: nn.Linear(7, 5),
    }[class_name]()
    state = {}
    for variable in MAPPING[class_name]:
        keras = reference[f"{class_name}:{variable.name}"]
        state[variable.parameter] = torch.from_numpy(keras.transpose(variable.axes).copy())
        assert sorted(variable.axes) == list(range(keras.ndim))
        back = state[variable.parameter].numpy().transpose(np.argsort(variable.axes))
        assert np.array_equal(back, keras)
    layer = layer.double().eval()
    layer.load_state_dict(state, strict=False)
    assert set(layer.state_dict()) - set(state) <= {"num_batches_tracked"}
    images = torch.from_numpy(reference[f"{class_name}:input"])
    with torch.inference_mode():
        outputs = layer(images.movedim(-1, 1)).movedim(1, -1).numpy()
    assert outputs.shape == reference[f"{class_name}:output"].shape
    assert np.abs(outputs - reference[f"{class_name}:output"]).max() <= 1e-13


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_there_and_back(reference_files, network, name):
    """The mapping has every tensor of both sides once; read backwards, it gives the Keras file's arrays."""
    model, rows = network(name)
    state = {key: value.numpy() for key, value in model.float().state_dict().items()}
    assert {row.key for row in rows} == {key for key in state if not key.endswith("num_batches_tracked")}
    assert len({row.key for row in rows}) == len(rows)
    back = {(row.layer, row.variable): state[row.key].transpose(np.argsort(row.axes)) for row in rows}
    saved = {
        (layer.name, variable): array
        for layer in read_keras_file(reference_files / f"{name}.h5").layers
        for variable, array in layer.arrays.items()
    }
    assert back.keys() == saved.keys()
    with h5py.File(reference_files / f"{name}.h5") as file:
        for (layer, variable), array in saved.items():
            assert np.array_equal(back[layer, variable], array)
            assert np.array_equal(file["model_weights"][layer][layer][variable], array)
