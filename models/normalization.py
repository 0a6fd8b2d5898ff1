"""Input normalization: (pixel - mean) / std, for pixel values 0-255."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

LIMIT = 1e30  # largest mean or std; float32 arithmetic with it does not overflow
USUAL = (  # mean and std of the usual input normalizations; their names and sources
    (0, 1),  # pixels 0-255: mlcommons/tiny's ResNet8
    (0, 255),  # 0 to 1: torchvision.transforms.ToTensor
    (127.5, 127.5),  # -1 to 1: keras.applications.imagenet_utils.preprocess_input, mode "tf"
    (128, 128),  # about -1 to 1: IMAGE_MEAN and IMAGE_STD of TensorFlow Lite's Android examples
    (128, 1),  # pixels - 128: the bytes of int8 inputs of scale 1, zero point -128
    ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),  # CIFAR-10's: all pixels of its 50,000 training images
    ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),  # ImageNet's: torchvision's models, times 255
)


@dataclass(frozen=True)
class Normalization:
    """Input normalization with one mean and one std per channel, in pixel units."""

    mean: list[float]
    std: list[float]

    @classmethod
    def from_args(
        cls, channels: int, mean: ArrayLike | None = None, std: ArrayLike | None = None
    ) -> Normalization:
        """Build from `--mean` and `--std`: a scalar, or one value per channel; None is 0 and 1.

        Raises ValueError for a value that is not finite, a std of 0, or a wrong number of values.
        """
        values = {}
        for name, value in {"mean": 0 if mean is None else mean, "std": 1 if std is None else std}.items():
            numbers = np.ravel(np.asarray(value, np.float64)).tolist()
            if not all(abs(number) <= LIMIT for number in numbers) or (name == "std" and 0 in numbers):
                raise ValueError(f"{name} is {numbers}; expected finite numbers up to {LIMIT:g}, std not 0")
            if len(numbers) not in (1, channels):
                raise ValueError(f"{name} has {len(numbers)} values, but the input has {channels} channels")
            values[name] = numbers * channels if len(numbers) == 1 else numbers
        return cls(**values)

    @classmethod
    def from_json(cls, described: dict, channels: int) -> Normalization:
        """Build from `mean` and `std` of a checked JSON object, lists with one value per channel.

        A missing key is 0 or 1. Raises ValueError for a wrong number of values.
        """
        for name in ("mean", "std"):
            if name in described and len(described[name]) != channels:
                size = len(described[name])
                raise ValueError(
                    f"{name} in the JSON has {size} values, expected one per channel, {channels}"
                )
        return cls.from_args(channels, described.get("mean"), described.get("std"))

    def override(self, mean: ArrayLike | None, std: ArrayLike | None) -> Normalization:
        """Return a copy with mean and/or std overridden, given as in `from_args`."""
        mean, std = self.mean if mean is None else mean, self.std if std is None else std
        return Normalization.from_args(len(self.mean), mean, std)

    @classmethod
    def usual(cls, channels: int) -> list[Normalization]:
        """Build the usual normalizations of images with so many channels."""
        return [cls.from_args(channels, *each) for each in USUAL if np.size(each[0]) in (1, channels)]

    @property
    def options(self) -> str:
        """The same as options of the command line, such as "--mean 0 --std 255"."""
        values = (each[:1] if len(set(each)) == 1 else each for each in (self.mean, self.std))
        mean, std = (" ".join(f"{value:g}" for value in each) for each in values)
        return f"--mean {mean} --std {std}"

    @property
    def is_identity(self) -> bool:
        """Whether pixels are passed through unchanged."""
        return not any(self.mean) and all(value == 1 for value in self.std)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Normalize (N, C, H, W) pixels in float64; the identity returns `pixels` itself."""
        if self.is_identity:
            return pixels
        mean, std = (np.reshape(values, (-1, 1, 1)) for values in (self.mean, self.std))
        return (pixels.astype(np.float64) - mean) / std

    def __str__(self) -> str:
        if self.is_identity:
            return "pixels 0-255"
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"(pixel - mean) / std, mean {mean}, std {std}"


def own_normalization(network: object) -> Normalization | None:
    """Return `network.normalization`, also of a network inside DataParallel or AveragedModel."""
    while network is not None:
        normalization = getattr(network, "normalization", None)
        if isinstance(normalization, Normalization):
            return normalization
        network = getattr(network, "module", None)
    return None


def fraction_note(mean: list[float] | None, std: list[float] | None) -> str | None:
    """Return a note if `--mean` and `--std` look like torchvision's Normalize, for pixels 0-1."""
    if not mean or not std or max(map(abs, mean + std)) >= 1:
        return None
    options = Normalization([255 * value for value in mean], [255 * value for value in std]).options
    return f"--mean and --std below 1 are usually of pixels 0-1 (ToTensor); for pixels 0-255: {options}"
