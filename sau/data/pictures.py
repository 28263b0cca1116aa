"""Reading picture files that a user names; every refusal says which file and what is allowed."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sau.errors import DataError

LARGEST = 64_000_000  # pixels; a small file can unpack to gigabytes, so its header is read first


def read_picture(path: str | Path) -> Image.Image:
    """An RGB picture from a PNG, JPEG, BMP or PPM file; DataError for anything else, for alpha and for animations."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "BMP", "PPM")) as picture:
            width, height = picture.size
            if width * height > LARGEST:
                raise DataError(f"{path} has {width}x{height} pixels, allowed are {LARGEST:,}; make it smaller")
            if picture.mode not in ("RGB", "L", "1", "P") or "transparency" in picture.info:
                raise DataError(f"{path} has mode {picture.mode}; allowed is an 8-bit picture without transparency")
            if getattr(picture, "n_frames", 1) > 1:
                raise DataError(f"{path} is animated; allowed is a single picture")
            return picture.convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a PNG, JPEG, BMP or PPM picture") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read the picture {path}: {error}") from None


def fit(picture: Image.Image, height: int, width: int) -> Tensor:
    """The picture squeezed to height x width (bilinear, antialiased) as float [3, H, W] on the scale 0..255."""
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32).transpose(2, 0, 1).copy())
