"""From a command line, YAML files and a record to the objects of a command.

Precedence: flag > YAML named by the user > record > shipped YAML > default.
"""

import argparse
import math
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml

from sau.attack import ATTACKS
from sau.config import Option, Setting, load_yaml, nearest, once, options, settings_of, split_hint, values, written
from sau.data.sources import SOURCES
from sau.defense import DEFENSES
from sau.device import choose_device
from sau.errors import ConfigError
from sau.optim import Method, Training
from sau.run import RECIPES, AttackRun, OwnRun, Run

METHODS: dict[str, Mapping[str, type[Method]]] = {"attack": ATTACKS, "defense": DEFENSES}
FILES = ("yaml_path", "bd_yaml_path")  # flags that name YAML files, in rising precedence
# Needed before the recipe and the data set are known, so that they cannot depend on these.
EARLY = ("dataset", "recipe", "device", "record_root", "result_file", "model_file")
FAST = {"fast": "paper"}  # a short recipe for the attacked network alone, and the recipe that it shortens
OF_RECORDS = ("dataset", "dataset_path", "model", "ratio", "index")  # not about a network of your own
SHORT = {"num_workers": "-n", "pin_memory": "-pm", "non_blocking": "-nb", "prefetch": "-pf"}  # flags of BackdoorBench
# Flags of BackdoorBench that have no effect here; accepted with one warning, so that old command lines keep working.
IGNORED = {
    **dict.fromkeys(SHORT, "images lie on the device, so nothing loads or copies them"),
    "git_hash": "the record has the commit in any case",
    "checkpoint_load": "an interrupted run resumes by repeating its command",
    "checkpoint_save": "the checkpoint lies in the record",
    "log": "the log lies in the record",
    "random_crop": "the attack crops as its data set says",
    "random_rotation": "the attack rotates nothing",
}
HELP = {
    "--help": "these flags and their values here",
    "--help_all": "also other names of the flags, and flags of BackdoorBench without effect",
    "--print_config": "print all settings as a YAML file for --yaml_path",
}
Layers = dict[str, dict[str, Setting]]  # of a YAML file by case: "" is every one, then recipes and data sets


def read_yaml(path: Path, known: Mapping[str, Option], ignored: Collection[str] = IGNORED) -> Layers:
    """The settings of a YAML file that may set `known`, those below `recipes:` and `datasets:` by case; `ignored` are
    keys without effect. ConfigError for unknown keys and for cases that do not exist."""
    content, found = load_yaml(path), Layers()
    datasets = [*SOURCES, *(f"{dataset}.{recipe}" for dataset in SOURCES for recipe in RECIPES)]
    for kind, allowed in (("recipes", [*RECIPES]), ("datasets", datasets)):
        for case, each in settings_of(content.pop(kind, {}), f"{path}: {kind}", {}, allowed).items():
            found[case] = settings_of(each.value, each.origin, known, ignored)
            if early := [found[case][name].origin for name in EARLY if name in found[case]]:
                raise ConfigError(f"{early[0]} cannot depend on the recipe or the data set; set it for all")
    return {"": settings_of(content, path, known, ignored), **found}


def overlaid(file: Layers, recipe: str, dataset: str) -> dict[str, Setting]:
    """The settings of a file, over them the recipe's, over these the data set's, over these `DATASET.RECIPE`'s."""
    cases = ("", recipe, dataset, f"{dataset}.{recipe}")
    return {name: setting for case in cases for name, setting in file.get(case, {}).items()}


def shipped(kind: str, name: str, known: Mapping[str, Option]) -> Layers:
    """The YAML that comes with the library, `configs/KIND/NAME.yaml`; in a wheel it lies inside the package."""
    here = Path(__file__).resolve().parent
    places = [root / "configs" / kind / f"{name}.yaml" for root in (here, here.parent)]
    return next((read_yaml(path, known) for path in places if path.is_file()), {})


# Flags


class Parser(argparse.ArgumentParser):
    """Flags by their whole names, after `description`, a docstring, as it stands; a mistake is a ConfigError."""

    def __init__(self, description: str | None = None, **given: Any) -> None:
        how: Any = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
        super().__init__(description=cleandoc(description or ""), formatter_class=how, allow_abbrev=False, **given)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        text = " ".join(values) if isinstance(values, list) else values
        once(vars(namespace), self.dest, Setting(text, str(option_string)))


def sentence(kind: str, method: type[Method]) -> str:
    """What a method does: the first sentence of an attack's page, or of a defense's class, without its citation."""
    doc = sys.modules[method.__module__].__doc__ if kind == "attack" else method.__doc__
    text = re.sub(r" \(.*?\)", "", " ".join((doc or "").split("\n\n")[0].split()))
    return re.split(r"(?<=\w)\. ", text)[0].rstrip(".:")


def _metavar(hint: Any) -> str:
    kind, parts, _ = split_hint(hint)
    if kind is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    return _metavar(parts[0]) if parts else str(kind.__name__).upper()


def config_text(about: str, members: Iterable[Option], shown: Mapping[str, Any]) -> str:
    """A YAML file with these parameters and the values in force, `shown`, each below its help text."""
    lines = [f"# {about}"]
    for option in members:
        value = shown.get(option.name, option.default)
        lines += textwrap.wrap(option.about, 118, initial_indent="# ", subsequent_indent="# ")
        plain = list(value) if isinstance(value, tuple) else written(value, option.hint) if value is None else value
        lines.append(yaml.safe_dump({option.name: plain}, default_flow_style=True, width=math.inf).strip()[1:-1])
    return "\n".join(lines)


class Settings:
    """A command line, its YAML files and the shipped ones, on their way to the objects of `sections`: dataclasses whose
    parameters are the flags, the method among them. `command` is what the user typed, for help."""

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
        self.reasons = {**IGNORED, **of_defenses, **method.ignored}
        known, unknown = self._parser({}, True).parse_known_args(argv)
        self.given: dict[str, Any] = vars(known)  # by the flags, not yet converted
        self.help_wanted: Any = self.given.pop("help", None)
        if unknown and self.help_wanted not in ("--help", "--help_all"):  # help is given beside mistakes, too
            every = [f"--{name}" for each in self.known.values() for name in (each.name, *each.aliases)]
            raise ConfigError(f"{unknown[0]!r} is no flag{nearest(unknown[0].split('=')[0], every)}; see --help")
        self.files = [self._read(name) for name in FILES if name in self.given and name in self.known]
        self.early = {name: each for file in self.files for name, each in file[""].items()} | self.given
        self.asked = {*self.early}  # what the user gave, by flag or file
        self.ignored |= {name: why for name, why in self.reasons.items() if name in self.asked - self.known.keys()}

    def _parser(self, shown: Mapping[str, Any], everything: bool, about: str = "") -> Parser:
        """The flags; `shown` are the values in force, `everything` has other names and flags without effect as well."""
        needs = "" if self.kind == "attack" else " --result_file FOLDER | --model_file FILE --clean_dir FOLDER"
        made = Parser(
            textwrap.fill(about), argument_default=argparse.SUPPRESS, prog=self.command,
            usage=f"{self.command}{needs} [flags]", add_help=False,
        )  # fmt: skip
        for title, members in self._groups().items():
            group = made.add_argument_group(title)
            for option in members:
                names = [f"--{name}" for name in (option.name, *(option.aliases if everything else ()))]
                how: dict[str, Any] = {"nargs": "?", "const": "true"} if option.hint is bool else {}
                if split_hint(option.hint)[0] is tuple:
                    how = {"nargs": "+"}  # a list may also be written with spaces
                text = f"{option.about} [{written(shown.get(option.name, option.default), option.hint) or 'none'}]"
                how |= {"metavar": _metavar(option.hint), "help": text.replace("%", "%%")}
                group.add_argument(*names, dest=option.name, action=_Once, **how)
        group = made.add_argument_group("help")
        for flag, text in HELP.items():
            names = ["-h", flag] if flag == "--help" else [flag]
            group.add_argument(*names, dest="help", action="store_const", const=flag, help=text)
        group = made.add_argument_group("accepted for old command lines, without effect")
        for name in (name for name in self.reasons if everything and name not in self.known):
            short = [SHORT[name]] if name in SHORT else []
            how = {"nargs": "*", "metavar": "X", "help": self.reasons[name]}
            group.add_argument(f"--{name}", *short, dest=name, action=_Once, **how)
        return made

    def _groups(self) -> dict[str, list[Option]]:
        """Every parameter once, by the heading of help that it stands under: the method's own come first."""
        headings = {"training": {*options(Training), "augment"}}
        headings |= {"the run": {name for each in self.sections if Run in each.__mro__ for name in options(each)}}
        headings |= {"a network of your own": {*options(OwnRun)}}
        groups: dict[str, list[Option]] = {self.method.name: [], **{heading: [] for heading in headings}}
        for name, option in self.known.items():
            groups[next((title for title, own in headings.items() if name in own), self.method.name)].append(option)
        return {heading: members for heading, members in groups.items() if members}

    def _read(self, flag: str) -> Layers:
        """A YAML file that the user named; of BackdoorBench's own some keys are dropped that its code does not read."""
        known = {name: option for name, option in self.known.items() if name not in FILES}
        file = read_yaml(Path(self.given[flag].value), known, self.reasons)
        own = file[""]
        if own.keys() & SHORT.keys():  # keys that tell a file of BackdoorBench
            for name in own.keys() & {*self.method.unread}:
                del own[name]
                self.ignored[name] = "BackdoorBench does not read this key of its file either"
        return file

    def help(self, recipe: str, dataset: str, record: Mapping[str, Any] | None = None) -> None:
        """Print the help or the configuration, with the values that these flags would run with, and leave, if asked."""
        if self.help_wanted is None:
            return
        shown = self._values(recipe, dataset, record or {})
        about = sentence(self.kind, self.method) + "."
        if self.help_wanted == "--print_config":
            others = {*FILES, "save_folder_name", "overwrite"}
            if OwnRun in self.sections:
                others |= {*OF_RECORDS} if "model_file" in self.asked else {*options(OwnRun)}
            members = [option for group in self._groups().values() for option in group if option.name not in others]
            print(config_text(about, members, shown))
        else:
            about += f" [ ] shows the values of this command: recipe {recipe}, data set {dataset}."
            print(self._parser(shown, self.help_wanted == "--help_all", about).format_help())
        raise SystemExit(0)

    def get(self, name: str) -> Any:
        """What the flags or the user's YAML files say about a parameter, whatever the recipe; else its default."""
        return values({name: self.early[name]}, self.known)[name] if name in self.early else self.known[name].default

    @cached_property
    def device(self) -> torch.device:
        """The device that was asked for; ConfigError if this machine does not have it."""
        return choose_device(self.get("device"))

    def recipe(self, recorded: str | None = None) -> tuple[str, str]:
        """The recipe in force and why it is that one; `recorded` is that of the attack."""
        chosen, why = self.get("recipe"), "as asked"
        if chosen == "auto" and recorded is not None:
            chosen, why = str(recorded), "as the attack"
        elif chosen == "auto":
            cuda = self.device.type == "cuda"
            chosen, why = ("paper", "the default on CUDA") if cuda else ("cpu", "the default without CUDA")
        if (fitting := self.fitting(chosen)) != chosen:
            why += f", {chosen} being for images that are poisoned beforehand"
        return fitting, why

    def fitting(self, recipe: str) -> str:
        """The recipe; of a fast one, which is for attacks before training, the usual one elsewhere."""
        beforehand = self.kind == "attack" and not getattr(self.method, "in_batch", False)
        return recipe if beforehand else FAST.get(recipe, recipe)

    def settle(self, recipe: str, dataset: str, record: Mapping[str, Any] | None = None) -> list[Any]:
        """The sections as objects, for the recipe and the data set in force; prints the help and leaves instead where
        that was asked for. A flag or YAML key that contradicts the data set or network of the `record` is refused."""
        self.help(recipe, dataset, record)
        found = self._values(recipe, dataset, record or {})
        return [cls(**{name: found[name] for name in options(cls) if name in found}) for cls in self.sections]

    def _values(self, recipe: str, dataset: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Every value that is not its default, by precedence."""
        layers: dict[str, Setting] = {}
        if self.kind == "attack":
            layers = overlaid(shipped("recipe", dataset, self.known), recipe, dataset)
        if recipe in FAST and "epochs" not in layers:
            raise ConfigError(f"recipe is {recipe}, which {dataset} does not have; allowed is {FAST[recipe]}")
        layers |= overlaid(shipped(self.kind, self.method.name, self.known), FAST.get(recipe, recipe), dataset)
        self.usual = values(layers, self.known)
        given = {name: each for file in self.files for name, each in overlaid(file, recipe, dataset).items()}
        given |= self.given
        for name in ("dataset", "model", "width", "num_classes"):
            if record.get(name) is not None and name in given and str(given[name].value) != str(record[name]):
                raise ConfigError(f"{given[name]}, but the record has {record[name]!r}; leave it out")
        self.asked |= given.keys()
        over = {name: Setting(value, f"record: {name}") for name, value in record.items()} | given
        return {**self.usual, **values(over, self.known), "recipe": recipe, "dataset": dataset}

    def replaced(self) -> dict[str, Any]:
        """What the user gave, by name, with the values that would hold otherwise: shipped ones, or defaults."""
        return {name: self.usual.get(name, self.known[name].default) for name in self.asked & self.known.keys()}

    def ignore(self, names: Iterable[str], reason: str) -> None:
        """Remember which of these flags, that are for another kind of command, the user gave."""
        self.ignored |= {name: reason for name in names if name in self.asked}
