"""Pictures that were poisoned elsewhere, one file for each split, as the benchmark has them for SSBA."""

from pathlib import Path

import numpy as np

from sau.data.decode import read_array
from sau.data.images import Images
from sau.errors import DataError


def ready_pictures(path: str, images: Images, all_of_it: bool) -> np.ndarray:
    """A poisoned version of every picture of the split that `images` are from, or are; DataError if they do not fit."""
    array, (c, h, w) = read_array(Path(path)), images.pixels.shape[1:]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (h, w, c):
        got = f"{array.dtype} {array.shape}"
        raise DataError(f"{path} holds {got}, wanted is uint8 (N, {h}, {w}, {c}); save pictures of this size")
    needed = int(images.index.max()) + 1 if len(images) else 0
    if len(array) < needed or (all_of_it and len(images) == needed != len(array)):
        raise DataError(f"{path} holds {len(array)} pictures, the split has {needed}; give one for each, in order")
    return array


def fitting(path: str, array: np.ndarray, images: Images) -> np.ndarray:
    """The rows of `array` that replace `images`; DataError if some were never written, or never poisoned, or are of
    other pictures."""
    rows, index = array[images.index.cpu().numpy()], images.index.tolist()
    if not index:
        return rows
    found, real = (pixels.reshape(len(rows), -1) for pixels in (rows, images.pixels.permute(0, 2, 3, 1).cpu().numpy()))
    blank = (found.min(1) == found.max(1)) & (real.min(1) < real.max(1))
    if blank.any():
        first = index[int(blank.argmax())]
        raise DataError(
            f"{path} holds one colour where picture {first} should be, and {int(blank.sum())} such rows in "
            "all; give a poisoned version of each picture"
        )
    if int(found.max()) <= 1:
        raise DataError(f"{path} holds pictures within 0..1; allowed are grey levels, 0..255")
    same = (found == real).all(1)
    if same.any():
        first = index[int(same.argmax())]
        raise DataError(
            f"{path} holds picture {first} as it was, and {int(same.sum())} of {len(rows)} that are wanted; give a "
            "poisoned version of each picture"
        )
    apart, others = (
        float(np.square(found.astype(np.float32) - real[order]).mean())
        for order in (slice(None), np.roll(np.arange(len(rows)), 1))
    )
    if len(rows) > 1 and 2 * apart > others:
        raise DataError(
            f"{path} holds pictures that are as far from these as these from each other; give poisoned "
            "versions of this split, in its order"
        )
    return rows
