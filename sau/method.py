"""What attacks and defenses have in common: hyperparameters that are their signature, and a training step."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sau.config import check, describe
from sau.errors import DataError, require
from sau.files import checksum


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method is a frozen set of hyperparameters; whatever changes while it runs lives in the state of `prepare`.

    `ignored` maps flags of the benchmark that have no effect here to the reason, `training_aliases` the benchmark's
    names for settings of the victim's training to ours, where only this method has them.
    """

    name: ClassVar[str] = ""
    compiles: ClassVar[bool] = False  # whether torch.compile may run its network, which has no hooks and steady sizes
    training_aliases: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[dict[str, str]] = {}
    unread: ClassVar[tuple[str, ...]] = ()  # keys of the benchmark's own file of the method that its code does not read
    files: ClassVar[tuple[str, ...]] = ()  # parameters that name files, whose content is part of what a run is

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        cls.__doc__ = (cls.__doc__ or "").rstrip() + describe(cls)

    def __post_init__(self) -> None:
        check(self)

    def params(self) -> dict[str, Any]:
        """The hyperparameters, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def contents(self) -> dict[str, str]:
        """The SHA-256 of each file that is given; of a record's folder, that of the weights. DataError if one cannot be
        read."""
        sums = {}
        for name in self.files:
            if (given := getattr(self, name)) is not None:
                path = Path(given) / "model.safetensors" if Path(given).is_dir() else Path(given)
                try:
                    sums[f"{name}_sha256"] = checksum(path)
                except DataError as error:
                    bare = path != Path(given) and not path.exists()
                    said = f"{given} is a folder without {path.name}" if bare else error
                    raise DataError(f"{name}: {said}; name a file that is there") from None
        return sums

    def identity(self) -> dict[str, Any]:
        """`params` as they determine a result: of a file that is given the content, for the place differs between
        machines."""
        sums = self.contents()
        return {name: value for name, value in self.params().items() if f"{name}_sha256" not in sums} | sums

    def step(self, state: dict[str, Any], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One update from a batch (x [B, C, H, W] in [0, 1], y [B]); returns what to report: scalars, averaged by
        epoch, or integer counts, summed."""
        raise TypeError(f"{type(self).__name__} has no step of its own; it must define one or override the caller")

    def end_epoch(self, state: dict[str, Any], losses: dict[str, float]) -> bool | None:
        """After each epoch, with its mean losses: move the learning-rate schedule. True ends the training early."""
        state["descent"].end_epoch(losses["loss"])
        return None

    def splits(self) -> bool:
        """Whether `step` makes one update, of `state["descent"]`, from a mean over the pictures of its batch; such a
        batch may go through in parts when memory does not hold it."""
        return False

    def repeats(self) -> bool:
        """Whether `step` has the device do the same each time, with one update of each `Descent` in its state; CUDA may
        then repeat a captured step, whose Python does not run again."""
        return False

    def require(self, name: str, ok: bool, allowed: str) -> None:
        """Refuse a hyperparameter: ConfigError with its name, its value and what is allowed."""
        require(name, getattr(self, name), ok, allowed)
