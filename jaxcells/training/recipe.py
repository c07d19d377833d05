"""How a network is trained, in plain values."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained; configs/default.py says what every value may be.

    Attributes:
      model: arguments of `create_model` but `num_classes`.
      seed: of initialisation, order and augmentation.
      batch_size: over all devices.
      num_epochs: passes over the training split.
      learning_rate: see `optim.make_schedule`.
      momentum: see `optim.make_optimizer`.
      weight_decay: see `optim.make_optimizer`.
      schedule: see `optim.make_schedule`.
      label_smoothing: see `steps.cross_entropy`.
      class_weights: "none" or "balanced".
      freeze: regular expressions over parameter paths, see `training.freeze`.
      freeze_epochs: for how many epochs these stay frozen; 0 for all.
      multipliers: see `optim.make_optimizer`.
      augmentation: {name: strength}, see `augment.augment`.
      normalize: see `normalization.fit_normalization`.
      every_steps: save within an epoch too, every so many steps; 0 saves after each epoch.
    """

    model: Mapping[str, Any]
    seed: int
    batch_size: int
    num_epochs: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    label_smoothing: float = 0.0
    class_weights: str = "none"
    freeze: tuple[str, ...] = ()
    freeze_epochs: int = 0
    multipliers: tuple[tuple[str, float], ...] = ()
    augmentation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    normalize: str = "auto"
    every_steps: int = 0
