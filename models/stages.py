"""The stages that both directions of a conversion go through, each printed as it passes.

A Keras file is matched to the network, its tensors are mapped, and the network is proven to be Keras's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING

from models.graph import match_graph
from models.keras.file import KerasFile, Layer
from models.keras.process import KerasProcess
from models.mapping import MAPPING
from models.proof import Scaling, compare_counts, compare_numbers, compare_tensors, figures_of
from models.tensors import Row, map_tensors
from models.terminal import print_table

if TYPE_CHECKING:
    from models.resnet8 import ResNet8


def match(file: KerasFile) -> dict[str, Layer]:
    """Return each layer in its place in the network, and print that stage."""
    with stage("layers") as figures:
        places = match_graph(file)
        weighted = sum(layer.class_name in MAPPING for layer in places.values())
        figures.append(f"{weighted} with weights and {len(file.layers) - weighted} others, each in its place")
    return places


def map_rows(places: dict[str, Layer], model: ResNet8, verbose: bool, is_loaded: bool = False) -> list[Row]:
    """Return the mapping, tensor by tensor, and print that stage.

    A network that is loaded already must have the very tensors of the file. Raises VerificationError if not.
    """
    with stage("shapes") as figures:
        rows = map_tensors(places, model)
        if is_loaded:
            compare_tensors(rows, model)
        figures.append(f"{len(rows)} tensors" + (", bit for bit the checkpoint's" if is_loaded else ""))
    if verbose:
        print_rows(rows)
    return rows


def prove_counts(file: KerasFile, rows: list[Row], model: ResNet8, keras: KerasProcess | None) -> dict | None:
    """Compare the numbers of parameters, and print that stage; return Keras's word on the file, if it runs.

    Raises VerificationError when they differ.
    """
    with stage("parameters") as figures:
        loaded = keras.load(file) if keras else None
        figures.append(compare_counts(rows, model, loaded))
    return loaded


def prove_numbers(
    file: KerasFile,
    places: dict[str, Layer],
    model: ResNet8,
    keras: KerasProcess,
    loaded: dict | None,
    keras_input: Scaling,
    pytorch_input: Scaling,
) -> dict | None:
    """Compare the network with the model that Keras has `loaded`, and print that stage; return the figures.

    They are None when Keras has loaded none. Raises VerificationError, which names the first layer that
    differs.
    """
    if loaded is None:
        print("  numbers     not verified (--no-verify)")
        return None
    with stage("numbers") as figures:
        results = compare_numbers(file, places, model, keras, keras_input, pytorch_input)
        results = {"keras": loaded["keras"], "rebuilt": loaded["rebuilt"], **results}
        figures += figures_of(results)
    return results


def input_metadata(layout: str, shape: list[int | None], mean: list[float], std: list[float]) -> dict:
    """Return what the JSON says of a network's input: (pixel - mean) / std, pixels 0 to 255."""
    return {"layout": layout, "shape": shape, "range": [0, 255], "mean": mean, "std": std}


def verified_by(results: dict | None, **versions: str) -> dict:
    """Return what both directions' JSON says of the proof: its figures, by which versions, and when.

    `versions` are those of libraries in other processes that have written the file.
    """
    return {
        "verification": results,
        "versions": {**{name: version(name) for name in ("torch", "numpy", "h5py")}, **versions},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


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


def print_rows(rows: list[Row]) -> None:
    """Print the mapping table, one row a tensor."""
    from rich.table import Table

    table = Table("Keras", "shape", "axes", "PyTorch", "shape", box=None, padding=(0, 1), show_edge=False)
    for row in rows:
        shape = "absent" if row.source is None else str(row.source.shape)
        axes = f"= {row.absent:g}" if row.source is None else str(row.axes) if len(row.axes) > 1 else "as is"
        table.add_row(f"{row.layer}/{row.variable}", shape, axes, row.key, str(row.shape))
    print_table(table)
