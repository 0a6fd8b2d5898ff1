"""The networks of the command line: read, seen to fit the data, and what their images come to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data.cifar10 import CLASS_NAMES, Dataset
from models.common.kinds import RUNTIMES, Kind, kind_of
from models.common.terminal import Notes
from models.evaluation.metrics import Predictions
from models.evaluation.runtimes import Runtime, read_runtime
from models.keras.worker import Worker

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint

# torch, and what imports it, is imported where it is first needed: `evaluate.py --help` needs none.


def load_checkpoint(
    path: Path,
    dataset: Dataset,
    notes: Notes,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    like: Checkpoint | None = None,
    dtype: str = "float32",
    key: str | None = None,
    runner: Worker | None = None,
) -> Checkpoint:
    """Load a network that fits the data. Raises OSError, or ValueError with one line.

    `mean` and `std` (a value, or one a channel, in pixel units) go before what its JSON says; without either
    it is fed as the checkpoint `like`, or plain pixels. `key` names one of several state_dicts in the file;
    one of another format is run by `runner`.
    """
    import torch

    from models.checkpoint import read_checkpoint

    needed = [*dataset.images.shape[1:]]
    if kind_of(path) in RUNTIMES:
        checkpoint = read_runtime(path, tuple(needed), runner)
        channels, classes = needed[0], checkpoint.model.classes
    else:
        bits = torch.float64 if dtype == "float64" else torch.float32
        checkpoint = read_checkpoint(path, bits, key)
        channels, classes = checkpoint.model.conv1.in_channels, checkpoint.model.fc.out_features
    if checkpoint.read_as:
        notes.add(checkpoint.read_as)
    described, described_in = checkpoint.metadata.get("input", {}), path.with_suffix(".json")
    shape = [channels, *described.get("shape", [None] * 3)[1:]]
    if any(size not in (None, wanted) for size, wanted in zip(shape, needed, strict=True)):
        raise ValueError(f"{path}: takes images of shape {shape}, CIFAR-10's are {needed}")
    if classes != len(CLASS_NAMES):
        raise ValueError(f"{path}: has {classes} classes, CIFAR-10 has {len(CLASS_NAMES)}")
    if mean or std:
        checkpoint = checkpoint.fed(mean, std)
    elif "mean" not in described or "std" not in described:
        assumed = f"fed as {like.path.name}" if like else "pixels from 0 to 255 are assumed"
        checkpoint = replace(checkpoint, scaling=like.scaling) if like else checkpoint
        lacks = "does not say" if described_in.exists() else "is not there to say"
        notes.add(
            f"{described_in} {lacks} what {path.name} is fed: {assumed}"
            + ("" if like else "; --mean and --std say it, or a copy of the original's .json under that name")
        )
    if "sha256" in checkpoint.metadata and not checkpoint.is_as_converted:
        notes.add(
            f"{path} has changed since {described_in.name} was written (fine-tuned?): its SHA-256 differs"
        )
    return checkpoint


def predictor(dataset: Dataset, options: argparse.Namespace) -> Callable[..., Predictions]:
    """Return the function that predicts all images as the command line says: `(checkpoint, name, fold)`.

    It folds BatchNorm if `fold`; and of several files, in float32 on a CPU, each that `fuse` finds as exact.
    """
    import torch

    from models.evaluation import inference
    from models.evaluation.fused import fuse

    device = inference.choose_device(options.device, options.dtype)
    suitable = inference.batches_for(device)
    batch_size, workers = options.batch_size or suitable[0], options.workers or suitable[1]

    def predict(checkpoint: Checkpoint, name: str, fold: bool = False) -> Predictions:
        scaling, path, model = checkpoint.scaling, checkpoint.path, checkpoint.model
        if isinstance(model, Runtime):  # which shares the cores among threads of its own
            finish = model.log_probabilities
            found = inference.measure(model, dataset, scaling, name, batch_size, 1, path, finish)
            ran = {"device": "cpu", "dtype": model.takes["dtype"], "batch_norm_folded": None}
            return replace(found, throughput={**found.throughput, **ran}, format=model.format)
        prepared = None
        if (fold or options.compare) and (device.type, options.dtype) == ("cpu", "float32"):
            prepared = fuse(model, torch.from_numpy(scaling.of(dataset.images[:batch_size])).float())
        is_fused = prepared is not None
        prepared = prepared or inference.prepare(model, device, getattr(torch, options.dtype), fold)
        found = inference.measure(prepared, dataset, scaling, name, batch_size, workers, path)
        ran = {"device": device.type, "dtype": options.dtype}
        ran |= {"batch_norm_folded": fold or is_fused, "fused_operators": is_fused}
        return replace(
            found,
            throughput={**found.throughput, **ran},
            format="safetensors" if kind_of(path) is Kind.SAFETENSORS else "",
            sparsity=inference.sparsity(model),
            network=inference.network_size(model, dataset.images.shape[1:]),
        )

    return predict
