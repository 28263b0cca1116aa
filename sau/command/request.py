"""A command line, YAML files and a record, on their way to objects."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from sau.config import Method, Option, options
from sau.defense.base import Defense
from sau.errors import ConfigError
from sau.optim import Training
from sau.runtime.device import choose_device
from sau.settings import config
from sau.settings.config import Setting
from sau.settings.run import OF_RECORDS, AttackRun, OwnRun, Run
from sau.settings.yamlfile import read_yaml, shipped

# Asked for before the recipe and the data set are known.
EARLY = {"dataset", "recipe", "device", "record_root", "result_file", "model_file"}
THEIRS = {"num_workers", "pin_memory", "non_blocking", "prefetch"}  # keys that tell a file of BackdoorBench
FAST = {"fast": "paper"}  # a short recipe, and the one that it shortens


class Request:
    """A command line, its YAML files and the shipped ones, on their way to objects.

    Args:
        command: as the user typed it, for help.
        method: the attack or defense.
        sections: dataclasses whose parameters are flags, the method among them.
        argv: the flags.
    """

    files: ClassVar[tuple[str, ...]] = ("yaml_path", "bd_yaml_path")  # in rising precedence

    def __init__(self, command: str, method: type[Method], sections: Sequence[type], argv: Sequence[str]) -> None:
        self.method, self.sections, self.unread = method, sections, set[str]()
        self.known: dict[str, Option] = {}
        for section in (method, *sections):  # its own defaults and texts beat those of general sections
            for name, option in options(section).items():
                others = tuple(other for other, ours in method.training_aliases.items() if ours == name)
                self.known.setdefault(name, replace(option, aliases=option.aliases + others))
        self.command = command
        of_defenses = {} if AttackRun in sections else {"width": "it is that of the weights"}
        self.reasons = {**config.IGNORED, **of_defenses, **method.ignored}
        self.kind = "attack" if AttackRun in sections else "defense"
        self.given = config.flags(self._groups(), argv, self.reasons)
        self.wanted_help = self.given.pop("help", None)
        self.asked = {*self._files(), *self.given}  # what the user gave, by flag or file
        self.ignored = {name: why for name, why in self.reasons.items() if name in self.asked - self.known.keys()}
        self.ignored |= dict.fromkeys(sorted(self.unread), "BackdoorBench does not read this key of its file either")

    def _files(self, recipe: str | None = None, dataset: str | None = None) -> dict[str, Setting]:
        found: dict[str, Setting] = {}
        for flag in self.files:
            if flag in self.given and flag in self.known:
                path = Path(self.given[flag].value)
                said = read_yaml(path, self.known, recipe=recipe, dataset=dataset, ignored=self.reasons)
                if said.keys() & THEIRS:
                    self.unread |= said.keys() & {*self.method.unread}
                    said = {name: setting for name, setting in said.items() if name not in self.unread}
                for name in {*self.files} & self.known.keys() & said.keys():
                    raise ConfigError(f"{said[name].origin} names a further file; give it as --{name}")
                found.update(said)
        return found

    def _groups(self) -> dict[str, list[Option]]:
        """Every parameter once, by the heading of help that it stands under: the method's own come first."""
        shared = {**options(Training), "augment": None}
        headings: dict[str, list[str]] = {
            self.method.name: [name for name in options(self.method) if name not in shared],
            "training": [name for name in self.known if name in shared],
            "the run": [name for section in self.sections if issubclass(section, Run) for name in options(section)],
            "a network of your own": [*options(OwnRun)] if OwnRun in self.sections else [],
        }
        groups, seen = dict[str, list[Option]](), set[str]()
        for heading, names in headings.items():
            groups[heading] = [self.known[name] for name in names if name not in seen]
            seen |= {*names}
        return {heading: members for heading, members in groups.items() if members}

    def help(self, recipe: str, dataset: str, record: Mapping[str, Any] | None = None) -> None:
        """Print the help and leave, if that is asked for: with the values that these flags would run with."""
        if self.wanted_help is None:
            return
        layers = self._layers(recipe, dataset, record or {})
        shown = {**config.values(layers, self.known), "recipe": recipe, "dataset": dataset}
        about = " ".join((self.method.__doc__ or "").split("\n\n")[0].split())
        if self.wanted_help.value == "config":
            print(config.config_text(about, self._written_to_file(), shown))
            raise SystemExit(0)
        needs = "" if self.kind == "attack" else " --result_file FOLDER | --model_file FILE --clean_dir FOLDER"
        print(
            config.help_text(
                f"{self.command}{needs} [flags]",
                f"{about} In [ ] is what this command would run with: recipe {recipe}, data set {dataset}.",
                self._groups(),
                shown,
                self.reasons if self.wanted_help.value == "all" else None,
            )
        )
        raise SystemExit(0)

    def _written_to_file(self) -> list[Option]:
        """The parameters that `--print_config` writes: those that this kind of command reads."""
        others = {*self.files, "save_folder_name", "overwrite", "print_config"}
        if OwnRun in self.sections:
            own = "model_file" in self.given
            others |= {*OF_RECORDS} if own else {*options(OwnRun)}
        return [option for members in self._groups().values() for option in members if option.name not in others]

    def said(self, name: str) -> Any:
        """What the flags or the user's YAML files say about a parameter, or None."""
        return config.values({**self._files(), **self.given}, self.known).get(name)

    def recipe(self, recorded: str | None = None) -> tuple[str, str]:
        """The recipe in force and why it is that one; `recorded` is that of the attack."""
        chosen, why = self.said("recipe") or "auto", "as asked"
        cuda = choose_device(self.said("device") or "auto").type == "cuda"
        if chosen == "auto" and recorded is not None:
            chosen, why = recorded, "as the attack"
        elif chosen == "auto":
            return ("paper", "the default on CUDA") if cuda else ("cpu", "the default without CUDA")
        if (fitting := self.fitting(chosen)) != chosen:
            return fitting, f"{why}, {chosen} being for pictures that are poisoned beforehand"
        return chosen, why

    def fitting(self, recipe: str) -> str:
        """The recipe; of a fast one, which is about the victim alone, the usual one where it cannot be had."""
        beforehand = self.kind == "attack" and not getattr(self.method, "in_batch", False)
        return recipe if beforehand else FAST.get(recipe, recipe)

    def settle(self, recipe: str, dataset: str, record: Mapping[str, Any] | None = None) -> list[Any]:
        """The sections as objects, by the precedence of `sau.settings.config`.

        Args:
            recipe: the recipe in force.
            dataset: the data set in force.
            record: what the record says; a flag or YAML key that contradicts its data set or network is refused.
        """
        layers = self._layers(recipe, dataset, record or {})
        found = config.values(layers, self.known)
        return [config.build(section, {**found, "recipe": recipe, "dataset": dataset}) for section in self.sections]

    def _layers(self, recipe: str, dataset: str, record: Mapping[str, Any]) -> dict[str, Setting]:
        """Every setting that is not its default, by precedence."""
        layers: dict[str, Setting] = {}
        if self.kind == "attack" and (path := shipped("recipe", dataset)) is not None:
            layers.update(read_yaml(path, self.known, recipe=recipe, dataset=dataset))
        if recipe in FAST and "epochs" not in layers:
            raise ConfigError(f"recipe is {recipe}, which {dataset} does not have; allowed is {FAST[recipe]}")
        if (path := shipped(self.kind, self.method.name)) is not None:  # `fast` is about the victim alone
            layers.update(read_yaml(path, self.known, recipe=FAST.get(recipe, recipe), dataset=dataset))
        said = {**self._files(recipe, dataset), **self.given}
        early = {**self._files(), **self.given}
        for name in EARLY & said.keys():
            if said[name] != early.get(name):
                raise ConfigError(
                    f"{said[name].origin}: {name} cannot depend on the recipe or the data set; set it for all"
                )
        self.asked |= said.keys()
        for name in ("dataset", "model", "width", "num_classes"):
            if record.get(name) is not None and name in said and str(said[name].value) != str(record[name]):
                raise ConfigError(
                    f"{said[name].origin} is {said[name].value!r}, but the record has {record[name]!r}; leave it out"
                )
        layers.update({name: Setting(value, f"record: {name}") for name, value in record.items()})
        layers.update(said)
        return layers

    def ignore(self, names: Iterable[str], reason: str) -> None:
        """Remember which of these flags, that are for another kind of command, the user gave."""
        self.ignored.update(dict.fromkeys((name for name in names if name in self.asked), reason))

    def adapted(self, method: Defense, model: nn.Module, images: int) -> Defense:
        """`method` as the clean set asks for it (`Defense.adapted`), unless the user has set what follows from it."""
        return method if self.asked & {*method.adapting} else method.adapted(model, images)
