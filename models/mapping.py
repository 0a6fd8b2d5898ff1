"""The mapping: every variable of a Keras layer, and the PyTorch parameter that it becomes.

Pure data, read in both directions: every transform permutes axes, so that from left to right a Keras file
becomes a state_dict, and from right to left a state_dict becomes a Keras file, bit for bit. Which layer is
which is told by `models/graph.py`.

Variables: https://keras.io/api/layers/; parameters: https://pytorch.org/docs/stable/nn.html.
"""

from typing import NamedTuple


class Variable(NamedTuple):
    """A variable of a Keras layer, and the parameter of the PyTorch module that it becomes."""

    name: str  # Keras's
    parameter: str  # PyTorch's
    axes: tuple[int, ...]  # axis i of the PyTorch tensor is axis axes[i] of the Keras tensor
    switch: str | None = None  # the Keras layer's option that leaves the variable out when it is False
    absent: float | None = None  # what Keras computes with then


# fmt: off
MAPPING = {  # by Keras's class; a layer's variables in the order in which Keras saves them
    "Conv2D": (
        #        Keras              PyTorch        axes          switch      if absent
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
    """Return the names of the variables that a Keras layer of this configuration has, in saved order."""
    return [variable.name for variable in MAPPING.get(class_name, ()) if config.get(variable.switch, True)]
