"""Fast inference: the logits of many uint8 images, on one device or on all cores of a CPU."""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.cifar10 import Dataset
from models.checkpoint import Checkpoint
from models.common.files import Format, detect_format
from models.evaluation.fused import FusedResNet8, fuse
from models.evaluation.metrics import BATCH_EFFECT, Predictions, check_outputs, depends_on_batch
from models.evaluation.runtimes import CORES, measure_file
from models.normalization import Normalization
from models.resnet8 import ResNet8
from models.resnet8_int8 import QuantizedResNet8
from models.transforms import layer_activations, layer_in_train_mode


def choose_device(name: str = "auto", dtype: str = "float32") -> torch.device:
    """Return the device "cpu", "cuda" or "mps"; "auto" is the fastest available.

    Raises ValueError if this machine does not have it, or it does not support `dtype`.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_available in available.items() if is_available)
    if not available[name]:
        raise ValueError(f"--device {name}: not available on this machine, or in this PyTorch")
    if (name, dtype) == ("mps", "float64"):
        raise ValueError("--dtype float64: not supported by mps devices")
    return torch.device(name)


def batches_for(device: torch.device) -> tuple[int, int]:
    """Return the default batch size and number of workers of a device.

    On a CPU one worker per core, with batches whose activations fit the core's caches; a GPU needs large
    batches, and distributes them over its own cores.
    """
    return (64, CORES) if device.type == "cpu" else (1024, 1)


def prepare(model: ResNet8, device: torch.device, dtype: torch.dtype) -> ResNet8:
    """Return a copy of `model` for `predict`: on `device`, in `dtype`, channels-last."""
    torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 bits of a float32's mantissa: 1e-3, not 1e-6
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True  # saves a pass over the memory; nothing else reads a ReLU's input here
    return model.to(dtype).to(device, memory_format=torch.channels_last)


def network_size(model: ResNet8, image_shape: tuple[int, ...]) -> dict:
    """Return the parameters, the trainable ones among them, and the multiply-accumulates per (C, H, W) image.

    The other parameters are BatchNorm's running statistics. Multiply-accumulates are counted for convolutions
    and the last layer, padding included: 12,501,632 for width 16. PyTorch's FlopCounterMode gives the same
    number, but imports the compiler: 1 s.
    """
    trainable = sum(parameter.numel() for parameter in model.parameters())
    statistics = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    activations = layer_activations(model, torch.zeros(1, *image_shape, dtype=model.conv1.weight.dtype))
    macs = sum(  # every position of a channel uses every weight once
        activations[name][0, ..., 0].size * layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    )
    return {"parameters": trainable + statistics, "trainable": trainable, "multiply_accumulates": macs}


def sparsity(model: nn.Module) -> float:
    """Return the fraction of weights of convolutions and linear layers that are 0."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    return (weights == 0).double().mean().item()


def predict(
    network: Callable[[Tensor], Tensor | np.ndarray],
    images: np.ndarray,
    normalization: Normalization,
    batch_size: int,
    workers: int,
    name: str = "",
) -> np.ndarray:
    """Return the (N, classes) float64 logits for (N, C, H, W) uint8 images.

    `network` is the result of `prepare` or `fuse`, or any function of a batch. A module's input is in its own
    dtype and on its own device, any other function's is float32 on the CPU. The cores are shared among
    `workers` threads, each of which runs whole batches: PyTorch releases Python's lock in its operators, and
    no core waits for another after every layer. A progress bar shows `name`.
    """
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    parameter = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    device, dtype = parameter.device, parameter.dtype
    is_resnet8 = isinstance(network, ResNet8 | FusedResNet8)
    layout = torch.channels_last if is_resnet8 else torch.contiguous_format
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32  # of the normalization
    mean, std = (
        torch.tensor(values, dtype=arithmetic, device=device).view(-1, 1, 1)
        for values in (normalization.mean, normalization.std)
    )
    pixels = torch.from_numpy(images)
    if device.type == "cuda":
        pixels = pixels.pin_memory()  # copies then overlap the arithmetic

    def logits_from(start: int) -> Tensor:
        with torch.inference_mode():
            batch = pixels[start : start + batch_size].to(device, non_blocking=True)
            if isinstance(network, FusedResNet8):
                batch = batch.flip(2, 3)  # while they are bytes
            batch = batch.to(arithmetic, memory_format=layout)
            if not normalization.is_identity:
                batch = batch.sub_(mean).div_(std)
            return torch.as_tensor(network(batch.to(dtype)))

    starts = range(0, len(pixels), batch_size)
    # glibc returns freed memory to the system, to fetch it again page by page for the next batch: a third of
    # the time. Once it has seen a large block freed, it keeps as much (man mallopt, M_MMAP_THRESHOLD).
    torch.empty(31 * 2**20, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        with ThreadPoolExecutor(workers) as pool:
            logits = list(track(pool.map(logits_from, starts), len(starts), name))
    finally:
        torch.set_num_threads(threads)
    return torch.cat(logits).cpu().double().numpy()


def track(batches: Iterable, total: int, name: str) -> Iterable:
    """Show a progress bar on stderr, if that is a terminal, while iterating."""
    if not sys.stderr.isatty():
        return batches
    from rich import progress
    from rich.console import Console
    from rich.markup import escape

    return progress.track(batches, escape(name), total, console=Console(stderr=True), transient=True)


def measure(
    network: Callable[[Tensor], Tensor | np.ndarray],
    dataset: Dataset,
    normalization: Normalization,
    name: str,
    batch_size: int,
    workers: int,
    path: Path | None,
) -> Predictions:
    """Return the predictions of a network, as `predict` takes it, for a data set, and the time.

    `path` is its file, if any. Raises ValueError if the network is in train mode, if the outputs of an image
    depend on the rest of its batch, or for outputs of a wrong shape, NaN or infinite.
    """
    if isinstance(network, nn.Module) and (layer := layer_in_train_mode(network)):
        raise ValueError(f"{path or name}: {layer} is in train mode; call network.eval() first")
    start = time.perf_counter()
    logits = predict(network, dataset.images, normalization, batch_size, workers, name)
    seconds = time.perf_counter() - start
    check_outputs(path or name, logits, dataset)
    first, settings = dataset.images[:batch_size], (normalization, batch_size, workers, name)
    is_resnet8 = isinstance(network, ResNet8 | FusedResNet8)  # in eval mode: no need for the check, 60 ms
    run = partial(predict, network)
    if not is_resnet8 and depends_on_batch(first, logits[:batch_size], lambda each: run(each, *settings)):
        is_training = isinstance(network, nn.Module) and network.training
        advice = "; it is in train mode: call network.eval() first" if is_training else ""
        raise ValueError(f"{path or name}: {BATCH_EFFECT}{advice}")
    throughput = {
        "seconds": seconds,
        "images_per_second": len(logits) / seconds,
        "batch_size": batch_size,
        "workers": workers,
    }
    return Predictions.from_outputs(name, path, logits, dataset, normalization, throughput)


def predictor(dataset: Dataset, options: argparse.Namespace) -> Callable[..., Predictions]:
    """Return a function `(checkpoint, name)` that predicts all images, with the command line's options.

    In float32 on a CPU, a network runs with fused operators if `fuse` finds them as exact.
    """
    device = choose_device(options.device, options.dtype)
    default_size, default_workers = batches_for(device)
    batch_size, workers = options.batch_size or default_size, options.workers or default_workers

    def predict_checkpoint(checkpoint: Checkpoint, name: str) -> Predictions:
        normalization, path, model = checkpoint.normalization, checkpoint.path, checkpoint.model
        if model is None:
            is_assumed = checkpoint.assumes_normalization
            allowed = options.allow_code, is_assumed, options.kernels
            return measure_file(path, dataset, normalization, name, *allowed)
        if isinstance(model, QuantizedResNet8):
            where = torch.device("cpu") if device.type == "mps" else device  # which lacks float64
            quantized, pixels = model.to(where), Normalization.from_args(dataset.images.shape[1])
            predictions = measure(
                lambda batch: quantized(batch.to(where), dequantize=True),
                dataset,
                pixels,
                name,
                batch_size,
                workers,
                path,
            )
            ran = {"device": where.type, "dtype": "int8", "batch_norm_folded": None}
            return replace(predictions, throughput={**predictions.throughput, **ran}, format="int8")
        fused = None
        if (device.type, options.dtype) == ("cpu", "float32"):
            fused = fuse(model, torch.from_numpy(normalization(dataset.images[:batch_size])).float())
        network = fused or prepare(model, device, getattr(torch, options.dtype))
        predictions = measure(network, dataset, normalization, name, batch_size, workers, path)
        is_fused = fused is not None
        ran = {"device": device.type, "dtype": options.dtype}
        ran |= {"batch_norm_folded": is_fused, "fused_operators": is_fused}
        return replace(
            predictions,
            throughput={**predictions.throughput, **ran},
            format="safetensors" if detect_format(path) is Format.SAFETENSORS else "",
            sparsity=sparsity(model),
            network=network_size(model, dataset.images.shape[1:]),
        )

    return predict_checkpoint
