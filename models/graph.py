"""What each layer of a ResNet8 is in Keras's terms, and which layers it reads: the table GRAPH.

Pure data, and the only statement of the network in Keras's terms. `models/conversion/matching.py` finds each
row's layer in a file; `models/conversion/placing.py` derives from it the graph of tensors that come without
one. It does not use `models/resnet8.py`, so that a mistake there cannot match itself; a test holds the two
together.
"""

from typing import NamedTuple


class Place(NamedTuple):
    """A place in the network."""

    required: dict[str, list]  # what Keras's layer must have: option -> allowed values, the usual one first
    reads: list[str]  # the places that it reads
    filters: int = 0  # a convolution's, in multiples of the network's width


def conv(kernel: int, stride: int) -> dict[str, list]:
    """Return what a Conv2D must have. A 1x1 window needs no padding: 'valid' and 'same' are the same."""
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

GRAPH = {  # by PyTorch's names
    "conv1": Place(conv(3, 1), ["input"], 1),
    "bn1": Place(BATCH_NORM, ["conv1"]),
    "relu": Place(RELU, ["bn1"]),
    "layer1.conv1": Place(conv(3, 1), ["relu"], 1),
    "layer1.bn1": Place(BATCH_NORM, ["layer1.conv1"]),
    "layer1.relu1": Place(RELU, ["layer1.bn1"]),
    "layer1.conv2": Place(conv(3, 1), ["layer1.relu1"], 1),
    "layer1.bn2": Place(BATCH_NORM, ["layer1.conv2"]),
    "layer1.add": Place(ADD, ["layer1.bn2", "relu"]),
    "layer1.relu2": Place(RELU, ["layer1.add"]),
    "layer2.conv1": Place(conv(3, 2), ["layer1.relu2"], 2),
    "layer2.bn1": Place(BATCH_NORM, ["layer2.conv1"]),
    "layer2.relu1": Place(RELU, ["layer2.bn1"]),
    "layer2.conv2": Place(conv(3, 1), ["layer2.relu1"], 2),
    "layer2.bn2": Place(BATCH_NORM, ["layer2.conv2"]),
    "layer2.downsample": Place(conv(1, 2), ["layer1.relu2"], 2),
    "layer2.add": Place(ADD, ["layer2.bn2", "layer2.downsample"]),
    "layer2.relu2": Place(RELU, ["layer2.add"]),
    "layer3.conv1": Place(conv(3, 2), ["layer2.relu2"], 4),
    "layer3.bn1": Place(BATCH_NORM, ["layer3.conv1"]),
    "layer3.relu1": Place(RELU, ["layer3.bn1"]),
    "layer3.conv2": Place(conv(3, 1), ["layer3.relu1"], 4),
    "layer3.bn2": Place(BATCH_NORM, ["layer3.conv2"]),
    "layer3.downsample": Place(conv(1, 2), ["layer2.relu2"], 4),
    "layer3.add": Place(ADD, ["layer3.bn2", "layer3.downsample"]),
    "layer3.relu2": Place(RELU, ["layer3.add"]),
    "avgpool": Place(POOL, ["layer3.relu2"]),
    "fc": Place(DENSE, ["avgpool"]),
}

INPUT_SCALING = {  # the layers that may stand between the input and conv1, one value a channel or one for all
    "Rescaling": {},
    "Normalization": {"axis": [-1, 3, [-1], [3], None, []], "invert": [False]},
}

# Which model it is, where that can be told. MLPerf Tiny's image classification models are all this network:
# IC01, since April 2026 beside IC02, and for some weeks another in the place of IC01. Source: mlcommons/tiny,
# benchmark/training/image_classification/trained_models/
KNOWN_FILES = {  # by SHA-256; this is pretrainedResnet.h5
    "5f938a8eea605438cc7360aa13c987bc6d7bd0c8d931b2917361ae7ae4eeda2f": "MLPerf Tiny IC01",
}
KNOWN_WIDTHS = {  # for 10 classes of 32 x 32 images in 3 channels: whose shape it is; multiply-accumulates
    16: ("MLPerf Tiny IC01", 12_501_632),
    26: ("pretrainedResnet.h5 for some weeks of 2026", 32_562_192),
    40: ("MLPerf Tiny IC02", 76_473_920),
}
