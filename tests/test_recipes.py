"""README's recipes ('From here') do what they say, on the bundled images."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.recipes import ALONE, LARGE, read_recipes

RECIPES = [name for name in read_recipes()[1] if name not in LARGE or importlib.util.find_spec(LARGE[name])]
pytestmark = pytest.mark.long
# of 1,000 images: the least that have the original's class, and the most that a logit may differ by
EXPECTED = {
    "Prune": (700, None),
    "int8": (950, None),
    "Export": (1000, 1e-4),
    "ONNX": (1000, 1e-2),
    "ExecuTorch": (1000, 1e-2),
    "safetensors": (1000, 0),
    "Golden vectors": (1000, 1e-2),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all in one process: each costs what PyTorch's start does."""
    path = tmp_path_factory.mktemp("recipes") / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.recipes", "--json", path, *RECIPES]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(results, name):
    found = results[name]
    assert "error" not in found, found["error"]
    if name == ALONE:
        assert found["printed"].startswith("cat: ")  # the first bundled image shows one
    elif name == "Fine-tune":
        assert found["accuracy"] >= found["original"]  # trained on the very images
    else:
        same, difference = EXPECTED[name]
        assert found["same_prediction"] >= same
        assert difference is None or found["logits"] <= difference
        assert abs(found["accuracy"] - found["original"]) <= 0.2


def test_every_recipe_has_a_test():
    assert set(read_recipes()[1]) == {ALONE, "Fine-tune", *EXPECTED}
