"""What the tests of whole optimizers share: SteepestDescent of every kind, by name."""

from __future__ import annotations

CASES = {
    "depth 1": {},
    "depth 1, momentum, normalized": {"betas": (0.9, 0.99), "normalize": True, "coupled_weight_decay": 0.05},
    "full": {"depth": 3, "storage": "full", "init": "balanced", "coupled_weight_decay": 0.05},
    "full, momentum": {"depth": 3, "storage": "full", "init": "balanced", "betas": (0.9, 0.99)},
    "tied": {"depth": 5, "init": "lambda", "scale": 0.7},
    "tied, momentum": {"depth": 5, "init": "lambda", "scale": 0.7, "betas": (0.9, 0.99), "maximize": True},
    "implicit": {"depth": 3, "storage": "implicit", "init": "lambda", "scale": 0.7},
}
