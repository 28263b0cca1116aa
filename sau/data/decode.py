"""Image files as tensors, decoded once and then read from a cache."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import safetensors.torch
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from sau.errors import DataError, SauError, first_line
from sau.files import write

_VERSION = 2  # of the cache and of the decoding; a change decodes everything anew


class Preparation(NamedTuple):
    """How images become pixels: squeezed, or as a network's own library makes them."""

    size: int
    apply: Callable[[Image.Image], Tensor]  # RGB to pixels [3, size, size] on the scale 0..255
    text: str  # says it in full


def read_image(path: str | Path) -> Image.Image:
    """An RGB image from a PNG, JPEG, WebP, BMP or PPM file, whatever its name ends in, as torchvision reads it: the
    rotation that a camera notes in EXIF is not applied. DataError unless it is an 8-bit image in colour or gray."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "PPM")) as image:
                if image.mode not in ("RGB", "L", "1", "P", "RGBA", "LA", "PA"):
                    raise ValueError(f"its mode is {image.mode}; allowed is an 8-bit image in colour or gray")
                return image.convert("RGB")
    except Exception as error:  # the decoders raise a dozen types on damaged files
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise DataError(f"cannot read the image {path}: {reason}") from None


def image_to_tensor(image: Image.Image, height: int, width: int) -> Tensor:
    """The image squeezed to height x width (bilinear, antialiased) as float [3, H, W] on the scale 0..255."""
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32).transpose(2, 0, 1).copy())


def read_array(path: Path) -> np.ndarray:
    """The numbers in a .npy file, memory-mapped; DataError if it holds anything but finite numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype.kind not in "uif" or array.size == 0 or not np.isfinite(array).all():
            raise ValueError("allowed are finite numbers, as numpy.save writes them")
    except (OSError, ValueError, EOFError, SyntaxError, AttributeError) as error:
        raise DataError(f"cannot read {path} as a .npy file of numbers: {first_line(error)}") from None
    return array


def cache_folder() -> Path:
    """`$SAU_CACHE`, else `$XDG_CACHE_HOME/sau`, else `~/.cache/sau`; RuntimeError if there is no home either."""
    if os.environ.get("SAU_CACHE"):
        return Path(os.environ["SAU_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sau"


def cached(
    key_parts: Iterable[str], make: Callable[[], dict[str, Tensor]], what: str = "decoded images",
    say: Callable[[str], None] = print,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors that `make` returns, from a file in `cache_folder()`, which is written where there is none.

    `key_parts` determine the result. Of several processes that want the same tensors one makes them. A damaged file is
    made again, and a folder that cannot be written costs the cache, not the run; `say` prints a line that names `what`
    it is. The tensors are memory-mapped; writing into them changes neither the file nor what others see.
    """
    with ExitStack() as stack:
        try:
            key = json.dumps([_VERSION, PIL.__version__, *key_parts])
            path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path.with_suffix(".lock")))
            if path.exists():  # another process may have made it meanwhile
                return safetensors.torch.load_file(path)
        except SafetensorError as error:
            say(f"{path} is damaged ({first_line(error)}); it is made again")
        except (OSError, RuntimeError) as error:
            say(f"warning: {what}: not cached ({first_line(error)}); SAU_CACHE names another folder")
            return make()
        tensors = {name: tensor.contiguous() for name, tensor in make().items()}
        try:
            write(path, safetensors.torch.save(tensors))
            say(f"{what}: cached in {path} ({path.stat().st_size / 1e6:,.1f} MB)")
        except (OSError, SauError) as error:
            say(f"warning: {what}: not cached ({first_line(error)}); SAU_CACHE names another folder")
        return tensors
