"""What every command is asked: the flags of a run beside those of its method."""

from dataclasses import dataclass
from typing import Literal

from sau.data.sources import check_share
from sau.errors import require
from sau.perturb import RADII, Bounded, is_radius
from sau.quality import RADIUS
from sau.witness import Search

RecipeName = Literal["paper", "cpu", "fast"]
RECIPES: dict[str, str] = {
    "paper": "the published settings; the default on CUDA",
    "cpu": "a narrow network and few epochs; the default without CUDA",
    "fast": "an attack's network in a fraction of the time of paper, on CUDA",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every command is asked.

    Args:
        dataset: cifar10, cifar100, gtsrb, tiny (Tiny ImageNet), digits (small, needs no files) or folder (your own
            pictures, in train/CLASS/ and test/CLASS/ of dataset_path); of a defense the record's.
        dataset_path: folder that holds the data sets, in the benchmark's or in torchvision's layout; a defense looks
            where the attack found them.
        model: preactresnet18, or a classifier of torchvision by its name, like vgg19_bn; of a defense the record's.
        recipe: shipped settings to start from: paper (as published), cpu (narrow network, few epochs), or auto, which
            is paper on CUDA and cpu elsewhere; a defense takes the recipe of the record. fast trains a victim in a
            quarter of paper's epochs; defenses, and attacks inside the batches, then have those of paper.
        device: auto, cpu, cuda or one like cuda:1.
        amp: true is bf16, false is fp32; auto is bf16 where the device has bf16 arithmetic, else fp32.
        threads: CPU threads; 0 means OMP_NUM_THREADS where it is set, else the cores that are free.
        compile: run the network through torch.compile (attacks, sau, at, ft, fp, fst and d3). CUDA graphs need no flag:
            on CUDA the updates of attacks, sau, at, ft, ft-sam, fst, d3 and nc are captured and repeated.
        max_minutes: ends the updates in time for the run to end after so many minutes; none means no limit.
        random_seed: of the weights, of the order of pictures and of every choice of pictures.
        record_root: folder of the result folders.
        overwrite: discard what is in the result folder.
        eval_every: epochs between two evaluations; the last epoch is always evaluated.
        frequency_save: epochs between two copies of the weights that are kept; 0 means none.
        save_folder_name: result folder, of an attack below record_root (none makes one of the time and the attack), of
            a defense below `defense` in the attack's folder (none means the defense's name), of a network of your own
            below record_root (none means its file and the defense).
        yaml_path: YAML file with any of these settings.
    """

    dataset: str = "cifar10"
    dataset_path: str = "./data"
    model: str = "preactresnet18"
    recipe: Literal["auto", RecipeName] = "auto"
    device: str = "auto"
    amp: bool | None = None
    threads: int = 0
    compile: bool = False
    max_minutes: float | None = None
    random_seed: int = 0
    record_root: str = "./record"
    overwrite: bool = False
    eval_every: int = 10
    frequency_save: int = 0
    save_folder_name: str | None = None
    yaml_path: str | None = None

    def __post_init__(self) -> None:
        for name, fine, allowed in (
            ("eval_every", self.eval_every >= 1, "1 and more"),
            ("frequency_save", self.frequency_save >= 0, "0 and more"),
            ("max_minutes", self.max_minutes is None or self.max_minutes > 0, "above 0, and none"),
            ("random_seed", 0 <= self.random_seed < 2**32, f"0..{2**32 - 1}"),
        ):
            require(name, getattr(self, name), fine, allowed)


@dataclass(frozen=True, kw_only=True)
class AttackRun(Run):
    """What an attack is asked besides its own hyperparameters.

    Args:
        width: channels of preactresnet18's first stage; the published network has 64, torchvision's have no width.
        img_size: height and width of the pictures in pixels (gtsrb, tiny, folder); none means the data set's own.
        bd_yaml_path: YAML file with settings of the attack; it beats yaml_path.
        attack: the attack's name, which the script already says; another one is refused.
        trigger_radius: of the L-infinity ball, in [0, 1] pixels, that the summary counts triggers in (0.2: SAU's).
    """

    width: int = 64
    img_size: int | None = None
    bd_yaml_path: str | None = None
    attack: str | None = None
    trigger_radius: float = RADIUS

    def __post_init__(self) -> None:
        super().__post_init__()
        require("trigger_radius", self.trigger_radius, is_radius(self.trigger_radius, "L_inf"), RADII)


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
    risk_norm: Bounded = Search.norm
    risk_eps: float = Search.eps
    risk_steps: int = Search.steps
    risk_restarts: int = Search.restarts

    def __post_init__(self) -> None:
        super().__post_init__()
        require("risk_samples", self.risk_samples, self.risk_samples >= 1, "1 and more")
        if self.index is None:
            check_share(self.ratio)
        self.search()

    def search(self) -> Search:
        """How the risks are searched; ConfigError if it cannot be."""
        return Search(norm=self.risk_norm, eps=self.risk_eps, steps=self.risk_steps, restarts=self.risk_restarts)


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """What a defense is asked about a network of your own; all but `model_file` and `clean_dir` may be left out.

    Args:
        model_file: .pt, .pth, .ckpt or .safetensors file with the weights of a network of yours, instead of
            result_file; it is read without running anything in it.
        clean_dir: folder with a folder of clean pictures for each class; numbered by the class names in model_file, if
            it has them, else in order (2 before 10).
        arch: auto finds the network by names and shapes of the weights; or its name, or module:function, which is
            imported and called without arguments.
        model_prefix: what the names of its weights begin with where the file holds several networks, like
            state_dict_ema.
        trust_code: allow module:function, which runs that code.
        mean: per-channel mean (of pixels in [0, 1]) that the network expects to be subtracted, like 0.49,0.48,0.45.
        std: per-channel standard deviation that it expects to be divided by.
        input_size: height and width that the pictures are brought to.
        check_share: share of each class's pictures that measures and is not purified with, in (0, 1).
        reversal_passes: passes of the search for the smallest patch of each class, before and after; 0 leaves it out.
            The clean networks beside it were searched with 40.
    """

    model_file: str | None = None
    clean_dir: str | None = None
    arch: str = "auto"
    model_prefix: str | None = None
    trust_code: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    input_size: int = 32
    check_share: float = 0.2
    reversal_passes: int = 40

    def __post_init__(self) -> None:
        for name, fine, allowed in (
            (
                "clean_dir",
                (self.model_file is None) == (self.clean_dir is None),
                "a folder of pictures, with model_file",
            ),
            ("std", len(self.mean) == len(self.std) in (0, 1, 3), "as many values as mean: none, 1 or 3"),
            ("std", all(value > 0 for value in self.std), "above 0"),
            ("input_size", self.input_size >= 1, "1 and more"),
            ("check_share", 0 < self.check_share < 1, "above 0, below 1"),
            ("reversal_passes", self.reversal_passes >= 0, "0 and more"),
        ):
            require(name, getattr(self, name), fine, allowed)
