"""The proof: parameter counts, every layer's activations and the probabilities, against Keras."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from data.cifar10 import load_test
from models.activations import layer_activations
from models.common.errors import VerificationError
from models.common.tuning import torch_threads
from models.conversion.tensors import Row
from models.graph import GRAPH
from models.keras.file import HALF_FLOATS, KerasFile, Layer
from models.keras.process import KerasProcess
from models.resnet8 import ResNet8
from models.scaling import Scaling

# How far PyTorch may be from Keras. In float64 two right networks differ by rounding alone: 3e-13 was
# measured on the activations of the MLPerf Tiny model, 7e-15 on its probabilities.
MAX_ACTIVATION_DIFFERENCE = 1e-10  # float64, of activations up to USUAL_ACTIVATION; of larger ones a fraction
USUAL_ACTIVATION = 2000  # 1,461 and 559 are the largest of the bundled and of the MLPerf Tiny model, in conv1
MAX_PROBABILITY_DIFFERENCE = {"float64": 1e-12, "float32": 1e-4}
MAX_SCALING_DIFFERENCE = 1e-6  # relative: Keras holds a Rescaling's numbers in float32
EVERY_LAYER = 100  # images, real and random, on which every layer is compared
BATCH_SIZE = 25  # whose activations in float64 take 50 MB on each side


def compare_counts(rows: list[Row], model: ResNet8, loaded: dict | None) -> str:
    """Return the parameter counts of both sides in words. Raises VerificationError if they differ.

    Keras's side is counted by Keras, or from the file when it does not run. Constants that stand in for
    variables that the file does not have are PyTorch's alone.
    """
    sources = [row for row in rows if row.source is not None]
    statistics = sum(row.source.size for row in sources if row.variable.startswith("moving_"))
    keras = (sum(row.source.size for row in sources) - statistics, statistics)
    if loaded:
        keras = (loaded["trainable"], loaded["statistics"])
    constants = sum(int(np.prod(row.shape)) for row in rows if row.source is None)
    trainable, statistics = count_parameters(model)
    if (trainable - constants, statistics) != keras:
        raise VerificationError(
            f"Keras has {keras[0]:,} trainable parameters and {keras[1]:,} statistics, "
            f"PyTorch {trainable - constants:,} and {statistics:,}"
        )
    added = f", and {constants:,} constants for variables that Keras leaves out" if constants else ""
    return f"{keras[0]:,} trainable + {keras[1]:,} statistics = {sum(keras):,}, on both sides{added}"


def count_parameters(model: ResNet8) -> tuple[int, int]:
    """Return the numbers of trainable parameters and of statistics (without `num_batches_tracked`)."""
    statistics = [
        buffer for name, buffer in model.named_buffers() if not name.endswith("num_batches_tracked")
    ]
    return sum(p.numel() for p in model.parameters()), sum(buffer.numel() for buffer in statistics)


def compare_tensors(rows: list[Row], model: ResNet8) -> None:
    """Raise VerificationError unless every tensor of the network is in its row, bit for bit."""
    state = model.state_dict()
    for row in rows:
        if not np.array_equal(row.tensor(), state[row.key].numpy()):
            raise VerificationError(f"{row.key} is not what Keras's '{row.layer}' has as its {row.variable}")


def compare_scaling(found: Scaling, expected: Scaling) -> None:
    """Raise VerificationError unless a Rescaling layer does what is expected, but for float32's rounding."""
    both = [[*each.mean, *each.std] for each in (found, expected)]
    if not np.allclose(*both, rtol=MAX_SCALING_DIFFERENCE, atol=0):
        raise VerificationError(f"the Rescaling layer's mean and std are {both[0]}, expected {both[1]}")


def compare_numbers(
    file: KerasFile,
    places: dict[str, Layer],
    model: ResNet8,
    keras: KerasProcess,
    keras_input: Scaling,
    pytorch_input: Scaling,
) -> dict:
    """Compare PyTorch with Keras on real and random images, and return the largest differences by dtype.

    Every layer's activations and the probabilities are compared on 100 real and 100 random images; the
    float32 probabilities on the other real ones too. Raises VerificationError when one is beyond its bound;
    WorkerError when Keras fails.
    """
    real, random = probe_images(file.input_shape).values()
    if file.layers[0].config.get("dtype") in HALF_FLOATS:
        random = random.round()  # whole pixels are exact in it; what is not, Keras rounds
    on_layers = in_batches(np.concatenate([real[:EVERY_LAYER], random[:EVERY_LAYER]]))
    others = real[EVERY_LAYER:]
    results = {dtype: {"activations": 0.0, "probabilities": 0.0} for dtype in ("float64", "float32")}
    compared, largest = set(), 0.0

    def fed(images: np.ndarray, dtype: str) -> torch.Tensor:
        return torch.from_numpy(pytorch_input.of(images)).to(getattr(torch, dtype))

    def compare_layers(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], dtype: str) -> None:
        nonlocal largest
        # in the graph's order: the first that differs is the one that is wrong
        for place in GRAPH:
            # Keras's fc may have been through a softmax: then it is compared with the probabilities
            comparable = place != "fc" or places["fc"].config.get("activation") != "softmax"
            name = places[place].name
            if comparable and name in theirs:
                compared.add(place)
                largest = max(largest, largest_value(theirs[name]))
                difference = largest_difference(ours[place], theirs[name])
                results[dtype]["activations"] = max(results[dtype]["activations"], difference)
                if dtype == "float64":
                    check(f"{place} (Keras's '{name}')", difference, dtype, MAX_ACTIVATION_DIFFERENCE)

    def compare_outputs(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> None:
        outputs = torch.tensor(theirs) if file.returns_probabilities else torch.tensor(theirs).softmax(1)
        difference = largest_difference(torch.from_numpy(ours).softmax(1).numpy(), outputs.numpy())
        results[dtype]["probabilities"] = max(results[dtype]["probabilities"], difference)
        check("probabilities", difference, dtype, MAX_PROBABILITY_DIFFERENCE[dtype])

    # both frameworks compute at the same time: PyTorch's other threads, waiting, would hold Keras's cores
    with torch_threads(1), ThreadPoolExecutor(1) as other, torch.inference_mode():
        for dtype in results:
            network = model.to(getattr(torch, dtype)).eval()
            for images in on_layers:
                asked = other.submit(keras.activations, images, keras_input, dtype)
                ours = layer_activations(network, fed(images, dtype))
                theirs = asked.result()
                compare_layers(ours, theirs, dtype)
                last = next(layer.name for layer in reversed(file.layers) if layer.name in theirs)
                compare_outputs(ours["fc"], theirs[last], dtype)
        if len(others):
            asked = other.submit(keras.predict, others, keras_input, "float32")
            logits = [network(fed(images, "float32")) for images in in_batches(others)]
            compare_outputs(torch.cat(logits).numpy(), asked.result(), "float32")
    model.float()
    return {"layers": len(compared), "largest_activation": largest, **results}


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference between two arrays of as many values, `ours` of (N, ..., channels).

    Rounding grows with the values: in a channel that reaches n times USUAL_ACTIVATION, as Keras computes it,
    a difference counts 1/n. A channel that a ReLU leaves little of has the rounding of what it was made of:
    it counts as large as the median channel.
    """
    theirs = theirs.reshape(ours.shape)
    differences = np.abs(ours - theirs)
    if largest_value(theirs) > USUAL_ACTIVATION:
        channels = np.abs(theirs).reshape(-1, theirs.shape[-1]).max(axis=0)
        times_usual = np.maximum(channels, np.median(channels)) / USUAL_ACTIVATION
        differences /= np.maximum(times_usual, 1)
    return float(differences.max())


def largest_value(values: np.ndarray) -> float:
    """Return how far the values reach from 0; NaN if one is."""
    return float(max(values.max(), -values.min()))


def check(where: str, difference: float, dtype: str, bound: float) -> None:
    """Raise VerificationError if a difference is beyond its bound, as NaN is."""
    if not difference <= bound:
        raise VerificationError(
            f"the first difference from Keras is in {where}: {difference:.1e} in {dtype}, "
            f"at most {bound:.0e} expected"
        )


def in_batches(images: np.ndarray) -> list[np.ndarray]:
    """Return images in batches."""
    return [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]


def figures_of(results: dict) -> list[str]:
    """Return the lines that say how far PyTorch is from Keras, from the results of a verification."""
    keras, lines = f"Keras {results['keras']}", []
    if results["rebuilt"]:
        lines.append(f"{keras} got the graph from us: {results['rebuilt']}")
    lines.append(f"{results['layers']} layers against {keras}, on real and random images")
    for dtype in ("float64", "float32"):
        found = results[dtype]
        bound = f"(at most {MAX_ACTIVATION_DIFFERENCE:.0e})" if dtype == "float64" else ""
        lines.append(f"{dtype}  activations    {found['activations']:.1e}  {bound}")
        bound = f"(at most {MAX_PROBABILITY_DIFFERENCE[dtype]:.0e})"
        lines.append(f"{'':7}  probabilities  {found['probabilities']:.1e}  {bound}")
    if results["largest_activation"] > USUAL_ACTIVATION:
        reach = f"activations reach {results['largest_activation']:,.0f}"
        lines.append(f"{reach}: differences are those of {USUAL_ACTIVATION:,}")
    return lines


def probe_images(shape: list[int | None]) -> dict[str, np.ndarray]:
    """Return (N, channels, height, width) float64 pixels, 0 to 255: the bundled images, and random ones."""
    height, width, channels = shape[0] or 32, shape[1] or 32, shape[2]
    real = load_test(Path(), "sample").images.astype(np.float64)
    wrap = [(0, 0), (0, max(0, channels - 3)), (0, max(0, height - 32)), (0, max(0, width - 32))]
    real = np.pad(real, wrap, mode="wrap")[:, :channels, :height, :width]
    return {"real": real, "random": np.random.default_rng(0).uniform(0, 255, (100, channels, height, width))}
