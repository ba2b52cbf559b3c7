"""Training: `sluice train` calls `train`; needs the extra `train`.

samples ── fit ─────┐
   └──── baselines ─┴─ judge ── run ── a version in the registry, with its card
             metrics ┘     pictures, card ┘
"""

from serve_app.train.fit import FitConfig
from serve_app.train.run import Progress, TrainConfig, Trained, train

__all__ = ["FitConfig", "Progress", "TrainConfig", "Trained", "train"]
