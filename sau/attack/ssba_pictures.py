"""Pictures that were poisoned elsewhere, one file for each split, as the benchmark has them for SSBA."""

from pathlib import Path

import numpy as np

from sau.data.arrays import read_array
from sau.data.images import Images
from sau.errors import DataError


def ready_pictures(path: str, images: Images, all_of_it: bool) -> np.ndarray:
    """A poisoned version of every picture of the split that `images` are from, or are; DataError if they do not fit."""
    array, (c, h, w) = read_array(Path(path)), images.pixels.shape[1:]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (h, w, c):
        got = f"{array.dtype} {array.shape}"
        raise DataError(f"{path} holds {got}, wanted is uint8 (N, {h}, {w}, {c}); save pictures of this size")
    if int(array[:100].max()) <= 1:
        raise DataError(f"{path} begins with pictures within 0..1; allowed are grey levels, 0..255")
    needed = int(images.index.max()) + 1 if len(images) else 0
    if len(array) < needed or (all_of_it and len(images) == needed != len(array)):
        raise DataError(f"{path} holds {len(array)} pictures, the split has {needed}; give one for each, in order")
    return array
