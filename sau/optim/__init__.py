"""Gradient descent: its settings (`Training`) and the step down a loss (`descent`)."""

from sau.optim.training import DESCENT, Optimizer, Schedule, Training, adam

__all__ = ["DESCENT", "Optimizer", "Schedule", "Training", "adam"]
