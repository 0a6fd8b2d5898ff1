"""The benchmark's contenders and tables, and the usual mistakes. No timing is asserted."""

import numpy as np
import torch

from models.resnet8 import ResNet8
from tests.benchmarks import pitfalls, run


def test_contenders_agree_and_failures_are_reported(tmp_path):
    torch.manual_seed(0)
    torch.save(ResNet8().state_dict(), tmp_path / "model.pt")
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), np.uint8)
    normalization = {"mean": [0.0] * 3, "std": [255.0] * 3}
    request = {name: str(tmp_path / name) for name in ("keras", "onnx", "tflite", "int8")} | {
        "pt": str(tmp_path / "model.pt")
    }
    request["normalization"] = {"pytorch": normalization, "keras": normalization}
    plain, onnx = "plain NCHW PyTorch loop", "ONNX Runtime, its own threads"
    results, failures = run.race([run.OURS, plain, onnx, run.LIMIT], images, request, rounds=1)

    assert list(failures) == [onnx] and len(failures[onnx].splitlines()) == 1
    for name in (run.OURS, plain):
        assert np.array_equal(results[name]["classes"], results[run.OURS]["classes"])
        assert 0 < results[name]["imports"] <= results[name]["memory"]
    table = run.inference_table(results, len(images)).splitlines()
    assert len({len(line) for line in table[3:]}) == 1 and len(table) == 5 + 3
    assert plain in table[6] and " 40 |" in table[6]


def test_every_mistake_changes_the_network_or_its_input():
    torch.manual_seed(0)
    model = ResNet8(width=4).eval()
    images = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        labels = model(images.float()).argmax(1)
    accuracies = dict(pitfalls.accuracies(model, images, labels))
    assert accuracies.pop("none") == 1 and len(accuracies) == 12
    assert 0 <= min(accuracies.values()) < 1  # of an untrained model, which has few classes
