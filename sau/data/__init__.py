"""Data sets: `Images`, random augmentation, the readers of image files, and the data sets by name."""
