"""Backdoor attacks and defenses for image classifiers; the heart is Shared Adversarial Unlearning."""

__version__ = "0.1.0"
