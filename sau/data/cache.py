"""Decoded pictures on disk, so that the second start of a run opens one file in place of 100,000."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import PIL
import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sau.errors import SauError
from sau.files import write

_FORMAT = 1  # of the file and of the decoding; a change makes everything anew


def cache_folder() -> Path:
    """`$SAU_CACHE`, else `$XDG_CACHE_HOME/sau`, else `~/.cache/sau`; RuntimeError if there is no home either."""
    if os.environ.get("SAU_CACHE"):
        return Path(os.environ["SAU_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sau"


def cached(key_parts: Iterable[str], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` returns: from `cache_folder()` if it is there whole, else made and kept there.

    The file is written under another name and renamed: of two processes that both make it, the last one wins, and none
    reads half a file. Its SHA-256 is compared each time; a damaged or foreign file costs a line and is made again. A
    folder that is full or cannot be written costs a line, not the run. The tensors lie in the mapped file, whose memory
    processes share; writing into them changes neither the file nor what others see.

    Args:
        key_parts: texts that determine the result, beside the versions of this module and of Pillow. For picture files
            these are their paths, sizes in bytes and times of change: as good as their content without reading
            100,000 files, unless somebody replaces one by another of the same size and sets back its time.
        make: computes the tensors, on the CPU; its errors pass through and nothing is kept.
    """
    key = _key(key_parts)
    try:
        path = cache_folder() / f"{key}.safetensors"
        if path.exists():
            return _read(path, key)
    except (ValueError, SafetensorError) as error:
        print(f"{path} is damaged or another data set's ({error}); decoding again", flush=True)
    except (OSError, RuntimeError) as error:
        print(f"the decoded pictures cannot be read back ({error}); decoding again", flush=True)
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    try:
        path = cache_folder() / f"{key}.safetensors"
        write(path, safetensors.torch.save(tensors, {"key": key, "sha256": _digest(tensors)}))
        print(f"decoded pictures kept in {path} ({path.stat().st_size / 1e6:,.1f} MB)", flush=True)
    except (OSError, RuntimeError, SauError) as error:
        print(f"the decoded pictures are not kept ({str(error).split(';')[0]}); SAU_CACHE names another folder")
    return tensors


def _key(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in (str(_FORMAT), PIL.__version__, *parts):
        content = part.encode(errors="surrogateescape")  # file names need not be UTF-8
        digest.update(b"%d:%b" % (len(content), content))  # the length keeps ("ab", "c") from being ("a", "bc")
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if about.get("key") != key:
        raise ValueError("its key is another one")
    if about.get("sha256") != _digest(tensors):
        raise ValueError("SHA-256 differs")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
