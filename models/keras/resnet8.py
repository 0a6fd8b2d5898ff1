"""The Keras equivalent of `models/resnet8.py`: the same network, layer for layer.

Three stages of one residual block, of 16, 32 and 64 filters; 78,666 parameters. Architecture: MLPerf Tiny's
image classification reference (Banbury et al. 2021, arXiv:2106.07597; mlcommons/tiny,
`benchmark/training/image_classification/keras_model.py`), after He et al. 2015, arXiv:1512.03385.
"""

import keras
from keras import layers


def resnet8(
    num_classes: int = 10, width: int = 16, input_shape: tuple[int, int, int] = (32, 32, 3)
) -> keras.Model:
    """Build an untrained ResNet8: (N, H, W, C) float32 pixels, 0-255, to (N, num_classes) probabilities."""

    def conv(filters: int, kernel_size: int = 3, strides: int = 1) -> layers.Conv2D:
        return layers.Conv2D(filters, kernel_size, strides, padding="same", kernel_initializer="he_normal")

    def block(x: keras.KerasTensor, filters: int, strides: int) -> keras.KerasTensor:
        y = layers.ReLU()(layers.BatchNormalization()(conv(filters, strides=strides)(x)))
        y = layers.BatchNormalization()(conv(filters)(y))
        shortcut = x if strides == 1 else conv(filters, kernel_size=1, strides=strides)(x)
        return layers.ReLU()(layers.Add()([y, shortcut]))

    inputs = layers.Input(input_shape)
    x = layers.ReLU()(layers.BatchNormalization()(conv(width)(inputs)))
    x = block(x, width, strides=1)
    x = block(x, 2 * width, strides=2)
    x = block(x, 4 * width, strides=2)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(num_classes, activation="softmax")(x)
    return keras.Model(inputs, outputs, name="resnet8")
