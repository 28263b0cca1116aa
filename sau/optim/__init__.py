"""Gradient descent: its settings (`Training`), the step down a loss (`descent`) and Muon."""

from sau.optim.training import DESCENT, Optimizer, Schedule, Training, adam

__all__ = ["DESCENT", "Optimizer", "Schedule", "Training", "adam"]
