"""The five stages of a conversion, whichever way it goes, each printed as it passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from models.common.errors import printable
from models.conversion.matching import match_graph
from models.conversion.proof import compare_counts, compare_numbers, compare_tensors, figures_of
from models.conversion.tensors import Row, build_model, input_normalization, load_tensors, map_tensors
from models.graph import KNOWN_FILES, KNOWN_WIDTHS
from models.keras.file import KerasFile
from models.keras.process import KerasProcess
from models.mapping import MAPPING
from models.resnet8 import ResNet8
from models.scaling import Scaling


@dataclass(frozen=True)
class Proven:
    """A network that computes what a Keras file does, what each of them is fed, and how far they differ."""

    model: ResNet8
    keras_input: Scaling
    pytorch_input: Scaling
    results: dict | None  # None: not compared, for want of Keras


def prove(
    file: KerasFile,
    mean: list[float] | None,
    std: list[float] | None,
    keras: KerasProcess | None,
    verbose: bool = False,
    model: ResNet8 | None = None,
) -> Proven:
    """Match a Keras file to the network, map its tensors, and compare the two, layer by layer.

    `mean` and `std` say what the Keras model is fed. The network is made of the file, unless `model` is what
    the file was made of: then its tensors must be the very same. Without `keras` no numbers are compared.
    Raises KerasFileError, VerificationError or WorkerError.
    """
    with stage("layers") as figures:
        places = match_graph(file)
        is_given, model = model is not None, model or build_model(places)
        print_known(file, model)
        weighted = sum(layer.class_name in MAPPING for layer in places.values())
        figures.append(f"{weighted} with weights and {len(file.layers) - weighted} others, each in its place")

    keras_input = Scaling.given(model.conv1.in_channels, mean, std)
    pytorch_input = input_normalization(file, places, keras_input)

    with stage("shapes") as figures:
        rows = map_tensors(places, model)
        if is_given:
            compare_tensors(rows, model)
        figures.append(f"{len(rows)} tensors" + (", bit for bit the checkpoint's" if is_given else ""))
    if verbose:
        print_rows(rows)

    with stage("parameters") as figures:
        loaded = keras.load(file) if keras else None
        figures.append(compare_counts(rows, model, loaded))
    if not is_given:
        load_tensors(model, rows)

    if loaded is None:
        print("  numbers     not verified (--no-verify)")
        return Proven(model, keras_input, pytorch_input, None)
    with stage("numbers") as figures:
        found = compare_numbers(file, places, model, keras, keras_input, pytorch_input)
        results = {"keras": loaded["keras"], "rebuilt": loaded["rebuilt"], **found}
        figures += figures_of(results)
    return Proven(model, keras_input, pytorch_input, results)


@contextmanager
def stage(name: str) -> Iterator[list[str]]:
    """Print a stage of the validation as passed, with the figures put into the list, or as failed."""
    figures: list[str] = []
    try:
        yield figures
    except Exception:
        print(f"  {name:<11} failed")
        raise
    for index, line in enumerate(figures):
        print((f"  {name:<11} passed  {line}" if index == 0 else f"{'':22}{line}").rstrip())


def print_known(file: KerasFile, model: ResNet8) -> None:
    """Print which model it is, where the file's SHA-256 or the network's shape tells."""
    size = (model.fc.out_features, model.conv1.in_channels, *file.input_shape[:2])
    if model.conv1.out_channels in KNOWN_WIDTHS and size == (10, 3, 32, 32):
        width = model.conv1.out_channels
        name, macs = KNOWN_WIDTHS[width]
        which = KNOWN_FILES.get(file.sha256) or f"width {width}: the shape of {name}"
        print(f"  {which}; {macs / 1e6:.1f} M multiply-accumulates")


def print_rows(rows: list[Row]) -> None:
    """Print the mapping: each layer's name in Keras and in PyTorch, and below it a row a tensor.

    A row holds its name, its shape and the order of its axes in Keras, and its name and shape in PyTorch.
    """
    cells = {}
    for row in rows:
        shape = "absent" if row.source is None else str(row.source.shape)
        axes = f"= {row.absent:g}" if row.source is None else str(row.axes) if len(row.axes) > 1 else "as is"
        place, _, parameter = row.key.rpartition(".")
        cells.setdefault((row.layer, place), []).append(
            (row.variable, shape, axes, parameter, str(row.shape))
        )
    widths = [max(map(len, column)) for column in zip(*chain(*cells.values()), strict=True)]
    for (layer, place), of_layer in cells.items():
        print(printable(f"  {layer} -> {place}"))
        for row in of_layer:
            print("    " + " ".join(map(str.ljust, row, widths)).rstrip())
