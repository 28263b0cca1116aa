"""What every command is asked, and the way from a command line, YAML files and a record to all of its objects.

Precedence: flag > YAML named by the user > record > shipped YAML > default.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sau import flags
from sau.config import Method, Option, check, options, param
from sau.defense.base import Defense
from sau.device import choose_device
from sau.errors import ConfigError, require
from sau.flags import IGNORED, Setting, read_yaml, shipped
from sau.optim import Training
from sau.run import AttackRun, Run

FILES = ("yaml_path", "bd_yaml_path")  # flags that name YAML files, in rising precedence
THEIRS = {"num_workers", "pin_memory", "non_blocking", "prefetch"}  # keys that tell a file of BackdoorBench
FAST = {"fast": "paper"}  # a short recipe for the attacked network alone, and the recipe that it shortens


# Parameters of a defense that are about the record of an attack, not about a network of your own.
OF_RECORDS = ("dataset", "dataset_path", "model", "ratio", "index")


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """What a defense is asked about a network of your own; all but `model_file` and `clean_dir` may be left out."""

    model_file: str | None = param(
        None,
        ".pt, .pth, .ckpt or .safetensors file with the weights of a network of yours, instead of result_file; it "
        "is read without running anything in it",
    )
    clean_dir: str | None = param(
        None,
        "folder with a folder of clean images for each class; numbered by the class names in model_file, if it has "
        "them, else in order (2 before 10)",
    )
    arch: str = param(
        "auto",
        "auto finds the network by names and shapes of the weights; or its name, or module:function, which is "
        "imported and called without arguments",
    )
    model_prefix: str | None = param(
        None, "what the names of its weights begin with where the file holds several networks, like state_dict_ema"
    )
    trust_code: bool = param(False, "allow module:function, which runs that code")
    mean: tuple[float, ...] = param(
        (), "per-channel mean (of pixels in [0, 1]) that the network expects to be subtracted, like 0.49,0.48,0.45"
    )
    std: tuple[float, ...] = param((), "per-channel standard deviation that it expects to be divided by", gt=0)
    input_size: int = param(32, "height and width that the images are brought to", ge=1)
    check_share: float = param(0.2, "share of each class's images that measures and is not purified with", gt=0, lt=1)
    reversal_passes: int = param(
        40,
        "passes of the search for the smallest patch of each class, before and after; 0 leaves it out. The clean "
        "networks beside it were searched with 40",
        ge=0,
    )

    def __post_init__(self) -> None:
        check(self)
        both = (self.model_file is None) == (self.clean_dir is None)
        require("clean_dir", self.clean_dir, both, "a folder of images, with model_file")
        fits = len(self.mean) == len(self.std) in (0, 1, 3)
        require("std", self.std, fits, "as many values as mean: none, 1 or 3")


class Settings:
    """A command line, its YAML files and the shipped ones, on their way to objects.

    Args:
        command: as the user typed it, for help.
        method: the attack or defense.
        sections: dataclasses whose parameters are flags, the method among them.
        argv: the flags.
    """

    def __init__(self, command: str, method: type[Method], sections: Sequence[type], argv: Sequence[str]) -> None:
        self.command, self.method, self.sections = command, method, sections
        self.kind = "attack" if AttackRun in sections else "defense"
        self.ignored: dict[str, str] = {}  # flags without effect here, and why
        self.known: dict[str, Option] = {}
        for section in (method, *sections):  # its own defaults and texts beat those of general sections
            for name, option in options(section).items():
                others = tuple(other for other, ours in method.training_aliases.items() if ours == name)
                self.known.setdefault(name, replace(option, aliases=option.aliases + others))
        of_defenses = {} if self.kind == "attack" else {"width": "it is that of the weights"}
        reasons = {**IGNORED, **of_defenses, **method.ignored}
        self.groups = self._groups()
        self.given = flags.parse_flags(self.groups, argv, reasons)
        self.reasons, self.help_wanted = reasons, self.given.pop("help", None)
        self.files = [self._read(name) for name in FILES if name in self.given and name in self.known]
        self.early = {name: each for file in self.files for name, each in file.settings.items()} | self.given
        self.asked = {*self.early}  # what the user gave, by flag or file
        self.ignored |= {name: why for name, why in reasons.items() if name in self.asked - self.known.keys()}

    def _read(self, flag: str) -> flags.YamlFile:
        """A YAML file that the user named; of BackdoorBench's own some keys are dropped that its code does not read."""
        file = read_yaml(Path(self.given[flag].value), self.known, self.reasons)
        for name in FILES:
            if name in file.settings and name in self.known:
                raise ConfigError(f"{file.settings[name].origin} names a further file; give it as --{name}")
        if file.settings.keys() & THEIRS:
            for name in file.settings.keys() & {*self.method.unread}:
                del file.settings[name]
                self.ignored[name] = "BackdoorBench does not read this key of its file either"
        return file

    def _groups(self) -> dict[str, list[Option]]:
        """Every parameter once, by the heading of help that it stands under: the method's own come first."""
        shared = {**options(Training), "augment": None}
        runs = [name for section in self.sections if issubclass(section, Run) for name in options(section)]
        headings: dict[str, list[str]] = {
            self.method.name: [name for name in options(self.method) if name not in shared],
            "training": [name for name in self.known if name in shared],
            "the run": runs,
            "a network of your own": [*options(OwnRun)] if OwnRun in self.sections else [],
        }
        groups, seen = dict[str, list[Option]](), set[str]()
        for heading, names in headings.items():
            groups[heading] = [self.known[name] for name in names if name not in seen]
            seen |= {*names}
        return {heading: members for heading, members in groups.items() if members}

    def help(self, recipe: str, dataset: str, record: Mapping[str, Any] | None = None) -> None:
        """Print the help or the configuration, with the values that these flags would run with, and leave, if asked."""
        if self.help_wanted is None:
            return
        layers = self._layers(recipe, dataset, record or {})
        shown = {**flags.values(layers, self.known), "recipe": recipe, "dataset": dataset}
        about = " ".join((self.method.__doc__ or "").split("\n\n")[0].split())
        if self.help_wanted.value == "config":
            others = {*FILES, "save_folder_name", "overwrite"}
            if OwnRun in self.sections:
                others |= {*OF_RECORDS} if "model_file" in self.asked else {*options(OwnRun)}
            members = [option for group in self.groups.values() for option in group if option.name not in others]
            print(flags.config_text(about, members, shown))
        else:
            needs = "" if self.kind == "attack" else " --result_file FOLDER | --model_file FILE --clean_dir FOLDER"
            here = f"In [ ] is what this command would run with: recipe {recipe}, data set {dataset}."
            reasons = self.reasons if self.help_wanted.value == "all" else None
            usage = f"{self.command}{needs} [flags]"
            print(flags.parser(self.groups, shown, reasons, usage, f"{about} {here}").format_help())
        raise SystemExit(0)

    def get(self, name: str) -> Any:
        """What the flags or the user's YAML files say about a parameter, whatever the recipe; None if nothing."""
        return flags.values({name: self.early[name]}, self.known).get(name) if name in self.early else None

    @cached_property
    def device(self) -> torch.device:
        """The device that was asked for; ConfigError if this machine does not have it."""
        return choose_device(self.get("device") or "auto")

    def recipe(self, recorded: str | None = None) -> tuple[str, str]:
        """The recipe in force and why it is that one; `recorded` is that of the attack."""
        chosen, why = self.get("recipe") or "auto", "as asked"
        if chosen == "auto" and recorded is None:
            return (
                ("paper", "the default on CUDA") if self.device.type == "cuda" else ("cpu", "the default without CUDA")
            )
        if chosen == "auto":
            chosen, why = str(recorded), "as the attack"
        if (fitting := self.fitting(chosen)) != chosen:
            why += f", {chosen} being for images that are poisoned beforehand"
        return fitting, why

    def fitting(self, recipe: str) -> str:
        """The recipe; of a fast one, which is for attacks before training, the usual one elsewhere."""
        beforehand = self.kind == "attack" and not getattr(self.method, "in_batch", False)
        return recipe if beforehand else FAST.get(recipe, recipe)

    def settle(self, recipe: str, dataset: str, record: Mapping[str, Any] | None = None) -> list[Any]:
        """The sections as objects.

        Args:
            recipe: the recipe in force.
            dataset: the data set in force.
            record: what the record says; a flag or YAML key that contradicts its data set or network is refused.
        """
        found = flags.values(self._layers(recipe, dataset, record or {}), self.known)
        return [flags.build(section, {**found, "recipe": recipe, "dataset": dataset}) for section in self.sections]

    def _layers(self, recipe: str, dataset: str, record: Mapping[str, Any]) -> dict[str, Setting]:
        """Every setting that is not its default, by precedence."""
        layers: dict[str, Setting] = {}
        if self.kind == "attack" and (path := shipped("recipe", dataset)) is not None:
            layers.update(read_yaml(path, self.known).overlaid(recipe, dataset))
        if recipe in FAST and "epochs" not in layers:
            raise ConfigError(f"recipe is {recipe}, which {dataset} does not have; allowed is {FAST[recipe]}")
        if (path := shipped(self.kind, self.method.name)) is not None:
            layers.update(read_yaml(path, self.known).overlaid(FAST.get(recipe, recipe), dataset))
        given = {
            name: each for file in self.files for name, each in file.overlaid(recipe, dataset).items()
        } | self.given
        for name in ("dataset", "model", "width", "num_classes"):
            if record.get(name) is not None and name in given and str(given[name].value) != str(record[name]):
                raise ConfigError(
                    f"{given[name].origin} is {given[name].value!r}, but the record has {record[name]!r}; leave it out"
                )
        layers.update({name: Setting(value, f"record: {name}") for name, value in record.items()})
        self.asked |= given.keys()
        return {**layers, **given}

    def has(self, name: str) -> bool:
        """Whether the user gave it, by flag or file."""
        return name in self.asked

    @property
    def without_effect(self) -> str:
        """The flags without effect that the user gave, and why; empty if there are none."""
        origins = {name: each.origin for name, each in self.given.items() if each.origin.startswith("--")}
        return "; ".join(f"{origins.get(name, f'--{name}')}: {why}" for name, why in self.ignored.items())

    def ignore(self, names: Iterable[str], reason: str) -> None:
        """Remember which of these flags, that are for another kind of command, the user gave."""
        self.ignored.update(dict.fromkeys((name for name in names if name in self.asked), reason))

    def adapted(self, method: Defense, model: nn.Module, images: int) -> Defense:
        """`method` as the clean set asks for it (`Defense.adapted`), unless the user has set what follows from it."""
        return method if self.asked & {*method.adapting} else method.adapted(model, images)
