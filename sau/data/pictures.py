"""Reading picture files; every refusal says in one line which file and what is allowed."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from sau.errors import DataError
from sau.files import mistaken
from sau.types import Bytes

LARGEST = 64_000_000  # pixels; a small file can unpack to gigabytes, so its header is read first
_FORMATS = "PNG", "JPEG", "WEBP", "BMP", "PPM"
_HEAD = 200  # bytes of a file that tell what it is
_DEPTH = 24  # where a PNG says how many bits a channel has: signature 8, length 4, "IHDR" 4, width 4, height 4


def read_picture(path: str | Path) -> Image.Image:
    """An RGB picture from a PNG, JPEG, WebP, BMP or PPM file, whatever its name ends in.

    Gray, black-and-white and palette pictures are converted, and an opaque alpha channel is left out. Of a phone's JPEG
    with several pictures the first one counts. As in torchvision, the rotation that a camera notes in EXIF is not
    applied.

    Raises:
        DataError: the file is missing, empty, damaged or no such picture; has more than `LARGEST` pixels, more than
            8 bits a channel, transparent pixels, CMYK colours or several frames.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is refused here, or harmless (odd EXIF blocks)
            head = file.read(_HEAD)
            if what := mistaken(head):
                raise DataError(f"{path} {what}")
            file.seek(0)
            with Image.open(file, formats=_FORMATS) as picture:
                _check(path, picture, head)
                return _opaque(path, picture)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a PNG, JPEG, WebP, BMP or PPM picture, or its header is damaged") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path} has too many pixels, allowed are {LARGEST:,}; make it smaller") from None
    except Exception as error:  # the decoders raise a dozen types on damaged files
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise DataError(f"cannot read the picture {path}: {reason or type(error).__name__}") from None


def _check(path: str | Path, picture: Image.Image, head: bytes) -> None:
    """Refuse by the header, before anything is decoded."""
    width, height = picture.size
    if width * height > LARGEST:
        raise DataError(f"{path} has {width}x{height} pixels, allowed are {LARGEST:,}; make it smaller")
    if picture.mode not in ("RGB", "L", "1", "P", "RGBA", "LA", "PA"):
        raise DataError(f"{path} has mode {picture.mode}; allowed is an 8-bit picture in colour or gray")
    if picture.format == "PNG":
        if head[12:16] != b"IHDR" or head[_DEPTH] > 8:  # Pillow cuts 16-bit RGB to 8 bits without a word
            raise DataError(f"{path} has more than 8 bits a channel or a damaged header; allowed are 8 bits")
    if picture.format in ("PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1:
        raise DataError(f"{path} is animated; allowed is a single picture")
    if picture.format == "PPM" and _largest_value(picture) > 255:
        raise DataError(f"{path} has values up to {_largest_value(picture)}; allowed are 8 bits, values up to 255")


def _opaque(path: str | Path, picture: Image.Image) -> Image.Image:
    """The picture as RGB; DataError if a pixel of it is transparent."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise DataError(f"{path} has transparent pixels; put it on a background of one colour first")
    return picture.convert("RGB")


def native_size(path: str | Path) -> tuple[int, int]:
    """Width and height by the header of a picture that `read_picture` has read before."""
    with Image.open(path, formats=_FORMATS) as picture:
        return picture.size


def _largest_value(picture: Image.Image) -> int:
    """The largest value that a PPM's header allows; its plain decoder is told none when that is 255."""
    arguments = picture.tile[0].args if hasattr(picture, "tile") else ()
    return next((value for value in arguments if isinstance(value, int)), 0) if isinstance(arguments, tuple) else 0


def fit(picture: Image.Image, height: int, width: int) -> Tensor:
    """The picture squeezed to height x width (bilinear, antialiased) as float [3, H, W] on the scale 0..255."""
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32).transpose(2, 0, 1).copy())


def read_all(paths: Sequence[str], size: int, title: str) -> Bytes:
    """Every picture squeezed to size x size, uint8 [N, 3, size, size], with a progress bar on a terminal."""
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for slot, path in zip(pixels, tqdm(paths, desc=title, unit="picture", disable=None, leave=False), strict=True):
        slot.copy_(fit(read_picture(path), size, size))  # whole numbers, so the conversion is exact
    return pixels
