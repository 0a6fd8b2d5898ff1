"""The benchmark's contenders: they agree, and one that cannot run is reported. No timing is asserted."""

import numpy as np
import torch

from models.resnet8 import ResNet8
from tests.benchmarks import run


def test_contenders_agree_and_failures_are_reported(tmp_path):
    torch.manual_seed(0)
    torch.save(ResNet8().state_dict(), tmp_path / "model.pt")
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), np.uint8)
    scaling = ([0.0] * 3, [255.0] * 3)
    job = {
        "pt": str(tmp_path / "model.pt"),
        "keras": "",
        "onnx": str(tmp_path / "missing.onnx"),
        "scaling": {"pytorch": scaling, "keras": scaling},
    }
    names = (run.OURS, run.UNFOLDED, run.PLAIN, run.ONNX_RUNTIME)
    results = run.race({name: (name, images) for name in names}, job, rounds=2)

    assert list(results) == list(names)
    for name in (run.UNFOLDED, run.PLAIN):
        assert (results[name].classes == results[run.OURS].classes).all()
        assert 0 < results[name].imports <= results[name].memory
    assert isinstance(results[run.ONNX_RUNTIME], str)
    assert "\n" not in results[run.ONNX_RUNTIME]
    markdown = run.as_markdown(run.inference_table(results, len(images)))
    assert f"| {run.PLAIN}" in markdown and "cannot run here: " in markdown


def test_a_file_beyond_the_first_costs_what_the_first_does_not():
    files = {1: run.Cost(2.0, 400), 11: run.Cost(2.5, 400)}
    assert run.per_further_file(files) == {11: 50.0}
