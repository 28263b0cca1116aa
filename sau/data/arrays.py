"""Arrays in `.npy` files, read without running anything."""

from pathlib import Path

import numpy as np

from sau.errors import DataError


def read_array(path: Path) -> np.ndarray:
    """The numbers in a .npy file, mapped rather than read; DataError if it is none or holds something else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or "it is none, is cut short, or holds Python objects"
        raise DataError(f"cannot read {path} as a .npy file of numbers: {reason}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif" or array.size == 0:
        raise DataError(f"{path} holds no array of real numbers; give one made with numpy.save")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path} holds NaN or infinity; allowed are finite numbers")
    return array
