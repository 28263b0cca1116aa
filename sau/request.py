"""What a command is asked: the run-level flags, and how they come together with YAML files and records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from sau import config
from sau.config import Option, Setting
from sau.errors import ConfigError
from sau.machine.device import choose_device
from sau.method import Method
from sau.witness import Search
from sau.yamlfile import read_yaml, shipped


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every command is asked.

    Args:
        dataset: cifar10, cifar100, gtsrb, tiny (Tiny ImageNet), digits (small, needs no files) or folder (your own
            pictures, in train/CLASS/ and test/CLASS/ of dataset_path).
        dataset_path: folder that holds the data sets, in the benchmark's or in torchvision's layout.
        model: preactresnet18, or a classifier of torchvision by its name, like vgg19_bn.
        recipe: shipped settings to start from: paper (as published), cpu (narrow network, few epochs), or auto, which
            is paper on CUDA and cpu elsewhere; a defense takes the recipe of the record. fast trains a victim in a
            fraction of that (fast_cpu without CUDA); defenses, and attacks inside the batches, then have those of
            paper or cpu.
        device: auto, cpu, cuda or one like cuda:1.
        devices: cuda devices that share the run, each with a part of every batch (cpu: processes); above 1 for attacks
            that poison before training, sau and at.
        amp: true is bf16, false is fp32; auto measures which is faster.
        threads: CPU threads; 0 means all cores.
        compile: torch.compile of the network: on, off, graphs (with CUDA graphs), or auto, which is on where the run is
            long enough on CUDA and off on the CPU, where it saves little and changes the rounding.
        max_minutes: ends the updates in time for the run to end after so many minutes; none means no limit.
        random_seed: of the weights, of the order of pictures and of every choice of pictures.
        record_root: folder of the result folders.
        overwrite: discard what is in the result folder.
        eval_every: epochs between two evaluations; the last epoch is always evaluated.
        frequency_save: epochs between two copies of the weights that are kept; 0 means none.
        save_folder_name: result folder, of an attack below record_root (none makes one of the time and the attack), of
            a defense below `defense` in the attack's folder (none means the defense's name).
        yaml_path: YAML file with any of these settings.
    """

    dataset: str = "cifar10"
    dataset_path: str = "./data"
    model: str = "preactresnet18"
    recipe: Literal["auto", "paper", "cpu", "fast", "fast_cpu"] = "auto"
    device: str = "auto"
    devices: int = 1
    amp: bool | None = None
    threads: int = 0
    compile: Literal["auto", "on", "off", "graphs"] = "auto"
    max_minutes: float | None = None
    random_seed: int = 0
    record_root: str = "./record"
    overwrite: bool = False
    eval_every: int = 10
    frequency_save: int = 0
    save_folder_name: str | None = None
    yaml_path: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("eval_every", 1), ("frequency_save", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, allowed is {least} and more")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ConfigError(f"max_minutes is {self.max_minutes:g}, allowed is above 0, and none")
        if not 0 <= self.random_seed < 2**32:
            raise ConfigError(f"random_seed is {self.random_seed}, allowed is 0..{2**32 - 1}")


@dataclass(frozen=True, kw_only=True)
class AttackRun(Run):
    """What an attack is asked besides its own hyperparameters.

    Args:
        width: channels of preactresnet18's first stage; the published network has 64, torchvision's have no width.
        img_size: height and width of the pictures in pixels (gtsrb, tiny, folder); none means the data set's own.
        bd_yaml_path: YAML file with settings of the attack; it beats yaml_path.
        attack: the attack's name, which the script already says; another one is refused.
    """

    width: int = 64
    img_size: int | None = None
    bd_yaml_path: str | None = None
    attack: str | None = None


@dataclass(frozen=True, kw_only=True)
class DefenseRun(Run):
    """What a defense is asked besides its own hyperparameters.

    Args:
        result_file: result folder of the attack, ours or BackdoorBench's: a name below record_root, or a path.
        ratio: share of the clean training set that the defender has.
        index: file with the indices of the defender's pictures, one a line; beats ratio.
        track_risk: at every evaluation, before and after, also measure the risks R_cl, R_bd, R_adv and R_share.
        risk_samples: test pictures that the risks are measured on.
        risk_norm: norm of the ball that is searched.
        risk_eps: its radius, in [0, 1] pixels.
        risk_steps: gradient steps of each search.
        risk_restarts: searches from random places.
    """

    result_file: str | None = None
    ratio: float = 0.05
    index: str | None = None
    track_risk: bool = False
    risk_samples: int = 1000
    risk_norm: Literal["L_inf", "L2", "L1"] = "L_inf"
    risk_eps: float = 0.2
    risk_steps: int = 20
    risk_restarts: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.risk_samples < 1:
            raise ConfigError(f"risk_samples is {self.risk_samples}, allowed is 1 and more")
        self.search()

    def search(self) -> Search:
        """How the risks are searched; ConfigError if it cannot be."""
        return Search(norm=self.risk_norm, eps=self.risk_eps, steps=self.risk_steps, restarts=self.risk_restarts)


FAST = {"fast": "paper", "fast_cpu": "cpu"}  # and the recipe that each is a short one of


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
        self.method, self.sections = method, sections
        self.known: dict[str, Option] = {}
        for section in sections:
            found = config.options(section, method.aliases)
            self.known.update({name: option for name, option in found.items() if name not in self.known})
        for option in config.options(method).values():  # its own defaults and texts beat those of general sections
            self.known[option.name] = option
        about = " ".join((method.__doc__ or "").split("\n\n")[0].split())
        self.given = config.flags(command, about, sections, argv, method.aliases)
        self.ignored = [name for name in config.IGNORED if name in self.given]

    def _files(self, recipe: str | None = None, dataset: str | None = None) -> dict[str, Setting]:
        found: dict[str, Setting] = {}
        for flag in self.files:
            if flag in self.given:
                path = Path(self.given[flag].value)
                found.update(read_yaml(path, self.known, recipe=recipe, dataset=dataset))
        return found

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
        elif chosen == "fast" and not cuda:
            chosen, why = "fast_cpu", "fast, without CUDA"
        if chosen in FAST and (AttackRun not in self.sections or getattr(self.method, "in_batch", False)):
            return FAST[chosen], f"{why}, {chosen} being for pictures that are poisoned beforehand"
        return chosen, why

    def settle(self, kind: str, recipe: str, dataset: str, record: Mapping[str, Any] | None = None) -> list[Any]:
        """The sections as objects, by the precedence of `sau.config`.

        Args:
            kind: "attack" or "defense", the folder of the method's shipped YAML.
            recipe: the recipe in force.
            dataset: the data set in force.
            record: what the record says; a flag or YAML key that contradicts its data set or model is refused.
        """
        layers: dict[str, Setting] = {}
        for folder, name in (("recipe", dataset), (kind, self.method.name)):
            path = shipped(folder, name)
            if path is not None and (folder != "recipe" or kind == "attack"):
                case = recipe if folder == "recipe" else FAST.get(recipe, recipe)  # `fast` is about the victim alone
                layers.update(read_yaml(path, self.known, recipe=case, dataset=dataset))
            if folder == "recipe" and recipe in FAST and "epochs" not in layers:
                raise ConfigError(f"recipe is {recipe}, which {dataset} does not have; allowed is {FAST[recipe]}")
        said = {**self._files(recipe, dataset), **self.given}
        record = record or {}
        for name in ("dataset", "model"):
            if name in record and name in said and said[name].value != record[name]:
                raise ConfigError(
                    f"{said[name].origin} is {said[name].value!r}, but the record has {record[name]!r}; leave it out"
                )
        layers.update({name: Setting(value, f"record: {name}") for name, value in record.items()})
        layers.update(said)
        found = config.values(layers, self.known)
        return [config.build(section, {**found, "recipe": recipe, "dataset": dataset}) for section in self.sections]
