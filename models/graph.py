"""The network as Keras layers: for each node its required layer options and its inputs (the table GRAPH).

Pure data, and the only description of the network in Keras's terms. `models/conversion/match.py` finds each
node's layer in a file, and builds the graph for files that hold weights alone. This file does not use
`models/resnet8.py`, so the two are independent; a test compares them.
"""

from typing import NamedTuple


class Node(NamedTuple):
    """A node of the graph."""

    required: dict[str, list]  # option of the Keras layer -> allowed values, the usual one first
    inputs: list[str]  # names of the nodes that it reads
    filters: int = 0  # of a convolution, in multiples of the network's width


def conv(kernel: int, stride: int) -> dict[str, list]:
    """Return the required options of a Conv2D. For a 1x1 kernel 'valid' and 'same' padding are equal."""
    return {
        "class_name": ["Conv2D"],
        "kernel_size": [[kernel, kernel]],
        "strides": [[stride, stride]],
        "padding": ["same", "valid"] if kernel == 1 else ["same"],
        "dilation_rate": [[1, 1]],
        "groups": [1],
        "activation": ["linear", None],
        "data_format": ["channels_last", None],
    }


BATCH_NORM = {"class_name": ["BatchNormalization"], "axis": [-1, 3, [3], [-1]], "renorm": [False]}
RELU = {
    "class_name": ["ReLU", "Activation"],
    "activation": ["relu"],
    "max_value": [None],
    "negative_slope": [0],
    "threshold": [0],
}
ADD = {"class_name": ["Add"]}
POOL = {"class_name": ["GlobalAveragePooling2D", "AveragePooling2D"], "data_format": ["channels_last", None]}
DENSE = {"class_name": ["Dense"], "activation": ["softmax", "linear", None]}
SOFTMAX = {"class_name": ["Softmax", "Activation"], "activation": ["softmax"], "axis": [-1, [-1]]}

GRAPH = {  # by PyTorch module name
    "conv1": Node(conv(3, 1), ["input"], 1),
    "bn1": Node(BATCH_NORM, ["conv1"]),
    "relu": Node(RELU, ["bn1"]),
    "layer1.conv1": Node(conv(3, 1), ["relu"], 1),
    "layer1.bn1": Node(BATCH_NORM, ["layer1.conv1"]),
    "layer1.relu1": Node(RELU, ["layer1.bn1"]),
    "layer1.conv2": Node(conv(3, 1), ["layer1.relu1"], 1),
    "layer1.bn2": Node(BATCH_NORM, ["layer1.conv2"]),
    "layer1.add": Node(ADD, ["layer1.bn2", "relu"]),
    "layer1.relu2": Node(RELU, ["layer1.add"]),
    "layer2.conv1": Node(conv(3, 2), ["layer1.relu2"], 2),
    "layer2.bn1": Node(BATCH_NORM, ["layer2.conv1"]),
    "layer2.relu1": Node(RELU, ["layer2.bn1"]),
    "layer2.conv2": Node(conv(3, 1), ["layer2.relu1"], 2),
    "layer2.bn2": Node(BATCH_NORM, ["layer2.conv2"]),
    "layer2.downsample": Node(conv(1, 2), ["layer1.relu2"], 2),
    "layer2.add": Node(ADD, ["layer2.bn2", "layer2.downsample"]),
    "layer2.relu2": Node(RELU, ["layer2.add"]),
    "layer3.conv1": Node(conv(3, 2), ["layer2.relu2"], 4),
    "layer3.bn1": Node(BATCH_NORM, ["layer3.conv1"]),
    "layer3.relu1": Node(RELU, ["layer3.bn1"]),
    "layer3.conv2": Node(conv(3, 1), ["layer3.relu1"], 4),
    "layer3.bn2": Node(BATCH_NORM, ["layer3.conv2"]),
    "layer3.downsample": Node(conv(1, 2), ["layer2.relu2"], 4),
    "layer3.add": Node(ADD, ["layer3.bn2", "layer3.downsample"]),
    "layer3.relu2": Node(RELU, ["layer3.add"]),
    "avgpool": Node(POOL, ["layer3.relu2"]),
    "fc": Node(DENSE, ["avgpool"]),
}

DEFAULTS = {  # Keras's value of an option that a configuration lacks, where GRAPH's first one is another
    "Conv2D": {"kernel_size": None, "strides": [1, 1], "padding": "valid"},
    "ZeroPadding2D": {"padding": [[1, 1], [1, 1]]},
    "BatchNormalization": {"epsilon": 1e-3, "momentum": 0.99},
    "Activation": {"activation": None},
    "AveragePooling2D": {"pool_size": [2, 2]},
    "Rescaling": {"offset": 0.0},
}
OPERATIONS = {  # operation (Keras 3), or function of a TFOpLambda (Keras 2) -> layer that computes the same
    "Relu": "ReLU",
    "nn.relu": "ReLU",
    "nn.softmax": "Softmax",
    "math.add": "Add",
    "__operators__.add": "Add",  # x + y
}

INPUT_NORMALIZATION = {  # layers allowed between input and conv1, with one value per channel or one for all
    "Rescaling": {},
    "Normalization": {"axis": [-1, 3, [-1], [3], None, []], "invert": [False]},
}

# MLPerf Tiny's image classification models all have this graph: IC01, IC02 (since April 2026), and another
# file that was published as IC01 for some weeks. Source: mlcommons/tiny,
# benchmark/training/image_classification/trained_models/
KNOWN_FILES = {  # by SHA-256: pretrainedResnet.h5, pretrainedResnet_quant.tflite
    "5f938a8eea605438cc7360aa13c987bc6d7bd0c8d931b2917361ae7ae4eeda2f": "MLPerf Tiny IC01",
    "3c002613d1b2475eb51dd78dfb85a546c8ae658dee71cf6ade43b022fe205415": "MLPerf Tiny IC01, int8",
    # pretrainedResnet_large_float.tflite of v1.4, as quoted by a public copy; the file was not at hand
    "fb17ae9c1b6d0e5bd97f0f35024f207556261d7310b249716c87cc0628214b0e": "MLPerf Tiny IC02",
}
KNOWN_WIDTHS = {  # for 10 classes of 3 x 32 x 32 images: model with this width, multiply-accumulates
    16: ("MLPerf Tiny IC01", 12_501_632),
    26: ("mlcommons/tiny's temporary pretrainedResnet.h5 of 2026", 32_562_192),
    40: ("MLPerf Tiny IC02", 76_473_920),
}
