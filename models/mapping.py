"""The mapping: every variable of a Keras layer and its PyTorch parameter.

Pure data, used in both directions. Every entry permutes axes: from left to right a Keras file becomes a
state_dict, from right to left a state_dict becomes a Keras file, bit for bit. `models/graph.py` identifies
the layers.

Variables: https://keras.io/api/layers/; parameters: https://pytorch.org/docs/stable/nn.html.
"""

from typing import NamedTuple


class Variable(NamedTuple):
    """A variable of a Keras layer and the PyTorch parameter that it becomes."""

    name: str  # in Keras
    parameter: str  # in PyTorch
    axes: tuple[int, ...]  # axis i of the PyTorch tensor is axis axes[i] of the Keras tensor
    enabled_by: str | None = None  # option of the Keras layer; if False, the variable is missing
    default: float | None = None  # constant that Keras computes with if the variable is missing


# fmt: off
MAPPING = {  # by Keras class; variables in the order in which Keras saves them
    "Conv2D": (
        #        Keras              PyTorch        axes          enabled by  default
        Variable("kernel",          "weight",      (3, 2, 0, 1)),  # (H, W, in, out) -> (out, in, H, W)
        Variable("bias",            "bias",        (0,),         "use_bias", 0.0),
    ),
    "Dense": (
        Variable("kernel",          "weight",      (1, 0)),        # (in, out) -> (out, in)
        Variable("bias",            "bias",        (0,),         "use_bias", 0.0),
    ),
    "BatchNormalization": (
        Variable("gamma",           "weight",      (0,),         "scale",    1.0),
        Variable("beta",            "bias",        (0,),         "center",   0.0),
        Variable("moving_mean",     "running_mean", (0,)),
        Variable("moving_variance", "running_var", (0,)),
    ),
}
# fmt: on


def saved_variables(class_name: str, config: dict) -> list[str]:
    """Return the names of the variables of a Keras layer with this configuration, in saved order."""
    return [
        variable.name for variable in MAPPING.get(class_name, ()) if config.get(variable.enabled_by, True)
    ]
