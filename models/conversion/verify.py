"""Numerical verification: every layer's activations and the probabilities, against Keras."""

from __future__ import annotations

import numpy as np
import torch

from data.cifar10 import load_test
from models.common.cli import VerificationError
from models.graph import GRAPH
from models.keras.file import KerasFile, Layer
from models.normalization import Normalization
from models.resnet8 import ResNet8
from models.transforms import layer_activations

# Bounds on the difference from Keras. In float64 two equal networks differ only by rounding: by 3e-13 in the
# activations of the MLPerf Tiny model, by 7e-15 in its probabilities.
MAX_ACTIVATION_DIFFERENCE = 1e-10  # float64, for activations up to USUAL_ACTIVATION; relative for larger ones
USUAL_ACTIVATION = 2000  # the largest are 1,461 (bundled model) and 559 (MLPerf Tiny), in conv1
MAX_PROBABILITY_DIFFERENCE = {"float64": 1e-12, "float32": 1e-4}
LAYER_IMAGES = 32  # compared on every layer: 70 MB of float64 activations at width 16


def probe_images(shape: list[int | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, C, H, W) float64 pixels, 0-255: images for all layers, and images for the output alone.

    `shape` is a Keras input shape, [height, width, channels]. Half of the former are random, all others are
    the bundled CIFAR-10 images. All are whole numbers, exact in any dtype of a Keras input.
    """
    height, width, channels = shape[0] or 32, shape[1] or 32, shape[2]
    real = load_test(which="sample").images.astype(np.float64)
    pad = [(0, 0), (0, max(0, channels - 3)), (0, max(0, height - 32)), (0, max(0, width - 32))]
    real = np.pad(real, pad, mode="wrap")[:, :channels, :height, :width]
    half = LAYER_IMAGES // 2
    random = np.random.default_rng(0).integers(0, 256, (half, channels, height, width)).astype(np.float64)
    return np.concatenate([real[:half], random]), real[half:]


def compare_numbers(
    file: KerasFile,
    matched: dict[str, Layer],
    model: ResNet8,
    images: np.ndarray,
    others: np.ndarray,
    normalization: Normalization,
    reference: dict[str, np.ndarray],
) -> dict:
    """Compare PyTorch with Keras's outputs, `reference`; return the largest differences by dtype.

    `matched` has the Keras layer of each node, `images` and `others` are from `probe_images`. Every layer's
    activations are compared on `images`, the float32 probabilities on `others` too; a softmax counts as a
    layer. Raises VerificationError for a difference above its bound; float32 activations have none.
    """
    has_softmax = matched["fc"].config.get("activation") == "softmax"  # compared by its probabilities
    nodes = [node for node in GRAPH if node != "fc" or not has_softmax]
    results, compared, largest = {}, set(), 0.0
    for dtype in ("float64", "float32"):
        torch_dtype = getattr(torch, dtype)
        network = model.to(torch_dtype).eval()
        inputs = torch.from_numpy(normalization(images)).to(torch_dtype)
        activations, differences = layer_activations(network, inputs), [0.0]
        for node in nodes:  # in graph order: the first layer that differs is the wrong one
            keras = reference.get(f"{dtype}/{matched[node].name}")
            if keras is None:  # `a + b`, which Keras before 3.0 does not record
                continue
            compared.add(node)
            largest = max(largest, largest_value(keras))
            differences.append(largest_difference(activations[node], keras))
            if dtype == "float64":
                where = f"{node} (Keras layer '{matched[node].name}')"
                check_bound(where, differences[-1], dtype, MAX_ACTIVATION_DIFFERENCE)
        logits = [torch.from_numpy(activations["fc"])]
        if dtype == "float32":
            inputs = torch.from_numpy(normalization(others)).to(torch_dtype)
            with torch.inference_mode():
                logits += [network(batch) for batch in inputs.split(100)]
        keras = torch.from_numpy(reference[dtype])
        keras = keras if file.returns_probabilities else keras.softmax(1)
        difference = float((torch.cat(logits).softmax(1) - keras).abs().max())
        check_bound("probabilities", difference, dtype, MAX_PROBABILITY_DIFFERENCE[dtype])
        results[dtype] = {"activations": max(differences), "probabilities": difference}
    model.float()
    layers = len(compared) + file.returns_probabilities
    return {"layers": layers, "largest_activation": largest, **results}


def largest_difference(pytorch: np.ndarray, keras: np.ndarray) -> float:
    """Return the largest absolute difference of two (N, ..., channels) activations.

    Rounding errors grow with the values. In a channel whose largest Keras activation is n times
    USUAL_ACTIVATION, differences are divided by n. A channel whose values mostly cancel or are cut by a ReLU
    carries the rounding of its inputs: its n is at least the median channel's.
    """
    keras = keras.reshape(pytorch.shape)
    differences = np.abs(pytorch - keras)
    if largest_value(keras) > USUAL_ACTIVATION:
        channels = np.abs(keras).reshape(-1, keras.shape[-1]).max(axis=0)
        scale = np.maximum(channels, np.median(channels)) / USUAL_ACTIVATION
        differences /= np.maximum(scale, 1)
    return float(differences.max())


def largest_value(values: np.ndarray) -> float:
    """Return the largest absolute value; NaN if any value is."""
    return float(max(values.max(), -values.min()))


def check_bound(where: str, difference: float, dtype: str, bound: float) -> None:
    """Raise VerificationError if a difference is above its bound, or NaN."""
    if not difference <= bound:
        expected = f"expected at most {bound:.0e}"
        raise VerificationError(
            f"first difference from Keras in {where}: {difference:.1e} in {dtype}; {expected}"
        )


def format_results(results: dict) -> list[str]:
    """Return the lines printed for the results of a verification."""
    keras, lines = f"Keras {results['keras']}", []
    if reason := results["rebuilt"]:
        lines.append(f"{keras} could not load the file; model rebuilt from its layers: {reason}")
    lines.append(f"{results['layers']} layers against {keras}, on real and random images")
    for dtype in ("float64", "float32"):
        bound = f"(at most {MAX_ACTIVATION_DIFFERENCE:.0e})" if dtype == "float64" else ""
        lines.append(f"{dtype}  activations    {results[dtype]['activations']:.1e}  {bound}")
        bound = f"(at most {MAX_PROBABILITY_DIFFERENCE[dtype]:.0e})"
        lines.append(f"{'':7}  probabilities  {results[dtype]['probabilities']:.1e}  {bound}")
    if (largest := results["largest_activation"]) > USUAL_ACTIVATION:
        scale = f"scaled by {USUAL_ACTIVATION:,} / {largest:,.0f}"
        lines.append(f"largest activation {largest:,.0f}; the differences above are {scale}")
    return lines
