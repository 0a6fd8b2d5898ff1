"""Fast inference: the logits of many uint8 images, on one device or on all cores of a CPU."""

import copy
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.cifar10 import CLASS_NAMES, Dataset
from models.common.terminal import progress_bar
from models.common.tuning import torch_threads
from models.equivalents import fold_batch_norm
from models.evaluation.baseline import log_softmax
from models.evaluation.fused import FusedResNet8
from models.evaluation.metrics import Predictions
from models.resnet8 import ResNet8
from models.scaling import Scaling


def choose_device(name: str = "auto", dtype: str = "float32") -> torch.device:
    """Return the device named "cpu", "cuda" or "mps", or with "auto" the fastest there is.

    Raises ValueError when this machine does not have it, or it does not compute in `dtype`.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"--device {name}: this machine, or this PyTorch, has none")
    if (name, dtype) == ("mps", "float64"):
        raise ValueError("--dtype float64: an mps device has none")
    return torch.device(name)


def batches_for(device: torch.device) -> tuple[int, int]:
    """Return the batch size and the number of workers that suit a device.

    On a CPU one worker a core, with batches whose activations fit the core's caches; a GPU wants large
    batches, and shares them among its own cores.
    """
    if device.type != "cpu":
        return 1024, 1
    return 64, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(model: ResNet8, device: torch.device, dtype: torch.dtype, fold: bool = False) -> ResNet8:
    """Return a copy of `model` for `predict`: on `device`, in `dtype`, channels-last, folded or not."""
    torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 bits of a float32's mantissa: 1e-3, not 1e-6
    model = fold_batch_norm(model) if fold else copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True  # saves a pass over the memory; nothing else reads a ReLU's input here
    return model.to(dtype).to(device, memory_format=torch.channels_last)


def network_size(model: ResNet8, image_shape: tuple[int, ...]) -> dict:
    """Return a network's parameters, the trainable ones among them, and multiply-accumulates an image.

    The other parameters are BatchNorm's running means and variances. Counted are the products in convolutions
    and in the last layer, those with the padding's zeros too, for one image of shape (C, H, W): 12,501,632
    for a ResNet8 of width 16, as its docstring has them.
    """
    products = []

    def count(layer: nn.Conv2d | nn.Linear, _: tuple, output: Tensor) -> None:
        products.append(output[0, 0].numel() * layer.weight.numel())  # every place meets every weight once

    model = copy.deepcopy(model)  # the hooks go with it
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, *image_shape, dtype=model.conv1.weight.dtype))
    trainable = sum(parameter.numel() for parameter in model.parameters())
    statistics = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    return {
        "parameters": trainable + statistics,
        "trainable": trainable,
        "multiply_accumulates": sum(products),
    }


def predict(
    network: Callable[[Tensor], Tensor | np.ndarray],
    images: np.ndarray,
    scaling: Scaling,
    batch_size: int,
    workers: int,
    track: Callable[[Iterable, int], Iterable] = lambda batches, total: batches,
) -> np.ndarray:
    """Return the (N, classes) float64 logits of (N, C, H, W) uint8 images, which are scaled.

    `network` is what `prepare` returns, or any function of a batch; a module is fed in its own dtype, on its
    own device, anything else float32 on the CPU. The cores are shared among `workers` threads, each of which
    runs whole batches: PyTorch releases Python's lock in its operators, and no core waits for another after
    every layer. `track(batches, total)` may wrap the iterator over the batches, to show progress.
    """
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    parameter = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    device, dtype = parameter.device, parameter.dtype
    is_ours = isinstance(network, ResNet8 | FusedResNet8)
    layout = torch.channels_last if is_ours else torch.contiguous_format
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32  # of the normalization
    mean, std = (
        torch.tensor(v, dtype=arithmetic, device=device).view(-1, 1, 1) for v in (scaling.mean, scaling.std)
    )
    pixels = torch.from_numpy(images)
    if device.type == "cuda":
        pixels = pixels.pin_memory()  # so that a copy can go on beside the arithmetic

    def logits_from(start: int) -> Tensor:
        with torch.inference_mode():
            batch = pixels[start : start + batch_size].to(device, non_blocking=True)
            if isinstance(network, FusedResNet8):
                batch = batch.flip(2, 3)  # while they are bytes
            batch = batch.to(arithmetic, memory_format=layout)
            if not scaling.is_plain:
                batch = batch.sub_(mean).div_(std)
            return torch.as_tensor(network(batch.to(dtype)))

    starts = range(0, len(pixels), batch_size)
    # glibc returns freed memory to the system, to fetch it again page by page for the next batch: a third of
    # the time. Once it has seen a large block freed, it keeps as much (man mallopt, M_MMAP_THRESHOLD).
    torch.empty(31 * 2**20, dtype=torch.uint8)
    with torch_threads(max(1, torch.get_num_threads() // workers)), ThreadPoolExecutor(workers) as pool:
        logits = list(track(pool.map(logits_from, starts), len(starts)))
    return torch.cat(logits).cpu().double().numpy()


def sparsity(model: nn.Module) -> float:
    """Return which part of the weights of convolutions and linear layers is 0."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    return (weights == 0).double().mean().item()


def measure(
    network: Callable[[Tensor], Tensor | np.ndarray],
    dataset: Dataset,
    scaling: Scaling,
    name: str,
    batch_size: int,
    workers: int,
    path: Path | None,
    finish: Callable[[np.ndarray], np.ndarray] = log_softmax,
) -> Predictions:
    """Return what a network makes of a data set, and how long that took.

    `network` is what `predict` takes, `workers` threads call it at a time; `path` is the file that it is of,
    if any. `finish` makes (N, classes) log-probabilities of all outputs; without it they are logits. Raises
    ValueError when it is in train mode, or its outputs are none, NaN or infinite.
    """
    modules = network.modules() if isinstance(network, nn.Module) else ()
    if any(isinstance(module, nn.BatchNorm2d) and module.training for module in modules):
        raise ValueError(f"{path or name}: is in train mode, in which every batch changes it: network.eval()")
    start = time.perf_counter()
    logits = predict(network, dataset.images, scaling, batch_size, workers, progress_bar(name))
    seconds = time.perf_counter() - start
    if logits.shape != (len(dataset.labels), len(CLASS_NAMES)):
        raise ValueError(f"{path or name}: the network's outputs have shape {logits.shape}")
    if not np.isfinite(logits).all():
        raise ValueError(f"{path or name}: the network's outputs are NaN or infinite")
    throughput = {
        "seconds": seconds,
        "images_per_second": len(logits) / seconds,
        "batch_size": batch_size,
        "workers": workers,
    }
    return Predictions(name, path, finish(logits), dataset.labels, scaling, throughput)
