"""Data sets: where they lie, how they become `Images`, and what is checked before."""

SIDE = 1024  # pixels of the largest picture
