"""What every layer of a ResNet8 makes of images: for the proof, and for golden vectors."""

import numpy as np
import torch

from models.resnet8 import ResNet8


def layer_activations(model: ResNet8, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Return every layer's output for (N, C, H, W) images, by GRAPH's names, channels last as in Keras."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        found[name] = value.movedim(1, -1).numpy().copy()  # the addition works in place

    def watch(name: str, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: object, inputs: tuple, output: torch.Tensor) -> None:
            if not name.endswith(".relu"):
                keep(name, output)
            elif f"{name}1" not in found:  # a block's ReLU runs twice: after bn1, and after the addition
                keep(f"{name}1", output)
            else:
                keep(f"{name.removesuffix('relu')}add", inputs[0])
                keep(f"{name}2", output)

        return module.register_forward_hook(hook)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [watch(name, module) for name, module in leaves]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
