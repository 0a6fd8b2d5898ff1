"""What a network is fed: (pixel - mean) / std, of pixels from 0 to 255."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

LARGEST = 1e30  # a number of a size that float32 can compute with


@dataclass(frozen=True)
class Scaling:
    """A network is fed (pixel - mean) / std: both have a value a channel, in pixel units."""

    mean: list[float]
    std: list[float]

    @classmethod
    def given(cls, channels: int, mean: ArrayLike | None = None, std: ArrayLike | None = None) -> Scaling:
        """Return what --mean and --std say, a value or one a channel; without them, pixels as they are.

        Raises ValueError with one line when a value is not finite, or there are too few or too many.
        """
        given = {"mean": 0.0 if mean is None else mean, "std": 1.0 if std is None else std}
        values = {name: np.ravel(np.asarray(found, np.float64)).tolist() for name, found in given.items()}
        for name, found in values.items():
            if not all(abs(value) <= LARGEST for value in found):  # NaN neither
                raise ValueError(f"--{name} is {found}, expected finite numbers, at most {LARGEST:g}")
            if len(found) not in (1, channels):
                problem = f"has {len(found)} values, but the model's input has {channels} channels"
                raise ValueError(f"--{name} {problem}")
        return cls(*(found * channels if len(found) == 1 else found for found in values.values()))

    def overruled(self, mean: ArrayLike | None, std: ArrayLike | None) -> Scaling:
        """Return it with what is given, as `given` takes it, in the place of its own."""
        return Scaling.given(
            len(self.mean), self.mean if mean is None else mean, self.std if std is None else std
        )

    def updated(self, described: dict) -> Scaling:
        """Return it with the mean and the std that a JSON object has, where it has them."""
        return Scaling(described.get("mean", self.mean), described.get("std", self.std))

    @property
    def is_plain(self) -> bool:
        """Whether the network is fed pixels as they are."""
        return not any(self.mean) and all(value == 1 for value in self.std)

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """Return what the network is fed of (N, C, H, W) pixels: themselves, or else float64."""
        if self.is_plain:
            return pixels
        mean, std = (np.reshape(values, (-1, 1, 1)) for values in (self.mean, self.std))
        return (pixels.astype(np.float64) - mean) / std

    def says(self, model: str) -> str:
        """Return in words what `model` is fed."""
        if self.is_plain:
            return f"{model} is fed pixels, 0 to 255"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{model} is fed (pixel - mean) / std, pixels 0 to 255,\n  mean {mean}; std {std}"
