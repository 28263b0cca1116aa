"""What every command is asked: the flags of a run beside those of its method."""

from dataclasses import dataclass
from typing import Literal

from sau.config import check, param
from sau.data.sources import check_share
from sau.errors import require
from sau.pgd import Bounded, Search
from sau.quality import RADIUS

RecipeName = Literal["paper", "cpu", "fast"]
RECIPES: dict[str, str] = {
    "paper": "the published settings; the default on CUDA",
    "cpu": "a narrow network and few epochs; the default without CUDA",
    "fast": "an attack's network in a fraction of the time of paper, on CUDA",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every command is asked."""

    dataset: str = param(
        "cifar10",
        "cifar10, cifar100, gtsrb, tiny (Tiny ImageNet), digits (small, needs no files) or folder (your own "
        "images, in train/CLASS/ and test/CLASS/ of dataset_path); of a defense the record's",
    )
    dataset_path: str = param(
        "./data",
        "folder that holds the data sets, in the benchmark's or in torchvision's layout; a defense looks where the "
        "attack found them",
    )
    model: str = param(
        "preactresnet18",
        "preactresnet18, or a classifier of torchvision by its name, like vgg19_bn; of a defense the record's",
    )
    recipe: Literal["auto", RecipeName] = param(
        "auto",
        "shipped settings to start from: paper (as published), cpu (narrow network, few epochs), or auto, which is "
        "paper on CUDA and cpu elsewhere; a defense takes the recipe of the record. fast trains a victim in a "
        "quarter of paper's epochs; defenses, and attacks inside the batches, then have those of paper",
    )
    device: str = param("auto", "auto, cpu, cuda or one like cuda:1")
    amp: bool | None = param(
        None, "true is bf16, false is fp32; auto is bf16 where the device has bf16 arithmetic, else fp32"
    )
    threads: int = param(0, "CPU threads; 0 means OMP_NUM_THREADS where it is set, else all cores")
    compile: bool = param(
        False,
        "run the network through torch.compile (attacks, sau, at, ft, fp, fst and d3). CUDA graphs need no flag: "
        "on CUDA the updates of attacks, sau, at, ft, ft-sam, fst, d3 and nc are captured and repeated",
    )
    max_minutes: float | None = param(
        None, "ends the updates in time for the run to end after so many minutes; none means no limit", gt=0
    )
    random_seed: int = param(0, "of the weights, of the order of images and of every choice of images", ge=0, lt=2**32)
    record_root: str = param("./record", "folder of the result folders")
    overwrite: bool = param(False, "discard what is in the result folder")
    eval_every: int = param(10, "epochs between two evaluations; the last epoch is always evaluated", ge=1)
    frequency_save: int = param(0, "epochs between two copies of the weights that are kept; 0 means none", ge=0)
    save_folder_name: str | None = param(
        None,
        "result folder, of an attack below record_root (none makes one of the time and the attack), of a defense "
        "below `defense` in the attack's folder (none means the defense's name), of a network of your own below "
        "record_root (none means its file and the defense)",
    )
    yaml_path: str | None = param(None, "YAML file with any of these settings")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class AttackRun(Run):
    """What an attack is asked besides its own hyperparameters."""

    width: int = param(
        64, "channels of preactresnet18's first stage; the published network has 64, torchvision's have no width"
    )
    img_size: int | None = param(
        None, "height and width of the images in pixels (gtsrb, tiny, folder); none means the data set's own"
    )
    bd_yaml_path: str | None = param(None, "YAML file with settings of the attack; it beats yaml_path")
    attack: str | None = param(None, "the attack's name, which the script already says; another one is refused")
    trigger_radius: float = param(
        RADIUS, "of the L-infinity ball, in [0, 1] pixels, that the summary counts triggers in (0.2: SAU's)", gt=0, lt=1
    )


@dataclass(frozen=True, kw_only=True)
class DefenseRun(Run):
    """What a defense is asked besides its own hyperparameters."""

    result_file: str | None = param(
        None, "result folder of the attack, ours or BackdoorBench's: a name below record_root, or a path"
    )
    ratio: float = param(0.05, "share of the clean training set that the defender has")
    index: str | None = param(None, "file with the indices of the defender's images, one a line; beats ratio")
    track_risk: bool = param(
        False, "at every evaluation, before and after, also measure the risks R_cl, R_bd, R_adv and R_share"
    )
    risk_samples: int = param(1000, "test images that the risks are measured on", ge=1)
    risk_norm: Bounded = param(Search.norm, "norm of the ball that is searched")
    risk_eps: float = param(Search.eps, "its radius, in [0, 1] pixels; in L_inf below 1", gt=0)
    risk_steps: int = param(Search.steps, "gradient steps of each search", ge=1)
    risk_restarts: int = param(Search.restarts, "searches from random places", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index is None:
            check_share(self.ratio)
        self.search()

    def search(self) -> Search:
        """How the risks are searched; ConfigError if it cannot be."""
        return Search(norm=self.risk_norm, eps=self.risk_eps, steps=self.risk_steps, restarts=self.risk_restarts)


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
