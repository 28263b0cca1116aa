"""What a trigger is made from, triggers that are one tensor, and the cache of triggers that take long to make."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import sau
from sau.data.batches import Augment
from sau.data.decode import cache_folder, cached, image_to_tensor, read_image
from sau.data.images import Images
from sau.data.sources import fingerprint
from sau.errors import DataError, RecordError
from sau.loop import RunContext
from sau.optim import Training
from sau.record.folder import Record, digest

Made = tuple[dict[str, Tensor], dict[str, float]]  # tensors, and figures about them


@dataclass(frozen=True, eq=False)
class TriggerContext:
    """What a trigger is made from: clean training `images` on the device to work on, a `model` like the one to attack,
    which is not changed, its future training by `recipe` and `augment`, a `seed`, and progress to `session`."""

    images: Images
    model: nn.Module
    recipe: Training
    augment: Augment | None
    seed: int
    session: RunContext


class TensorTrigger(nn.Module):
    """A trigger that is one tensor: an image [C, H, W], a change of images, or what a warp is drawn from. `weights` are
    those of DFBA's network that answers to it, and not kept with it."""

    def __init__(self, values: Tensor, figures: Mapping[str, float] | None = None, weights: Any = None) -> None:
        super().__init__()
        self.figures, self.weights = figures or {}, weights
        self.values: Tensor = nn.Buffer(values)

    def for_shape(self, shape: tuple[int, ...]) -> Tensor:
        """The image; DataError if its shape is another one."""
        if self.values.shape != shape:
            raise DataError(f"the trigger was made for images {tuple(self.values.shape)}, these are {shape}")
        return self.values


def file_trigger(path: str | None, height: int, width: int) -> TensorTrigger | None:
    """The image of a file as [3, H, W] in [0, 1], resized; None without a file."""
    return None if path is None else TensorTrigger(image_to_tensor(read_image(path), height, width) / 255)


def trigger_image(
    trigger: TensorTrigger | None, path: str | None, default: Callable[[int, int], Tensor], x: Tensor
) -> Tensor:
    """The image to stamp on `x` [B, C, H, W], as [C, H, W]: of the trigger, else of the file, else `default(H, W)`."""
    height, width = x.shape[-2:]
    made = trigger or file_trigger(path, height, width)
    image = made.for_shape((3, height, width)) if made else default(height, width)
    return (image.mean(0, keepdim=True) if x.shape[1] == 1 else image).to(x)


def cached_trigger(
    name: str, identity: Mapping[str, Any], build: Callable[[RunContext], Made], context: TriggerContext
) -> Made:
    """What `build` returns, on the CPU; from the cache if it was made before. An interrupted training resumes.

    `identity` is what determines the result, as JSON has it, beside the images and the kind of their device, the number
    of threads, on which rounding depends, and the version of the library. `build` takes the session to train with.
    """
    images, session = context.images, context.session
    data = {"data": fingerprint(images), "device": images.pixels.device.type}
    key = digest({**identity, **data, "sau": sau.__version__, "threads": torch.get_num_threads()})
    checkpoints: list[Record | None] = []  # one, unless the cache has the trigger

    def make() -> dict[str, Tensor]:
        session.say(f"making {name}, once for all runs with these settings")
        checkpoints.append(_checkpoint(f"{name}-{key[:16]}", session.say))
        tensors, figures = build(replace(session, stage=0, checkpoint=checkpoints[0]))
        numbers = {f"figures.{each}": torch.tensor(value, dtype=torch.float64) for each, value in figures.items()}
        return {each: tensor.detach().cpu() for each, tensor in tensors.items()} | numbers

    found = cached([name, key], make, name, session.say)
    for checkpoint in filter(None, checkpoints):
        shutil.rmtree(checkpoint.path)
    numbers = [each for each in found if each.startswith("figures.")]
    figures = {each.removeprefix("figures."): float(found.pop(each)) for each in numbers}
    session.say(f"{name}: {describe_figures(figures)}{'' if checkpoints else '; from the cache'}")
    return found, figures


def _checkpoint(name: str, say: Callable[[str], None]) -> Record | None:
    """The checkpoint of an unfinished trigger; None where nothing can be written."""
    try:
        record = Record(cache_folder() / "unfinished" / name)
        record.path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # `cached` has warned
        return None
    try:
        record.load()
    except RecordError as error:
        say(f"{str(error).split(';')[0]}; it is made again")
        shutil.rmtree(record.path)
        record.path.mkdir()
    return record


def network_digest(network: nn.Module) -> str:
    """SHA-256 over a network's printed form, its tensors (those of its normalisation too) and its precision."""
    amp = "amp" if getattr(network, "amp", False) else ""
    total = hashlib.sha256(f"{network}{amp}".encode())
    for key, tensor in {**network.state_dict(), **dict(network.named_buffers())}.items():
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def same_trigger(record: Record, trigger: nn.Module | None) -> str | None:
    """A trigger's digest, for the configuration; None without one. RecordError if the record was begun with another
    trigger, as when it was trained again with other threads: the network has seen the first."""
    found = None if trigger is None else network_digest(trigger)
    if record.config.get("trigger_digest", found) != found:
        what = f"{record.path} began with another trigger, which was trained with other threads or on another machine"
        raise RecordError(f"{what}; repeat it as it was, choose another name, or --overwrite")
    return found


def describe_figures(figures: Mapping[str, float]) -> str:
    """Figures in a line."""
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in figures.items())
