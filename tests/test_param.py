"""Parameters: every type, bound and choice of every command is tried, as `param` states them."""

import math
import typing
from typing import Any

import pytest
from toys import toy_images

from sau.attack import ATTACKS, LF, SIG, SSBA, WaNet
from sau.audit import AuditConfig
from sau.config import Option, options
from sau.defense import ANP, AT, BNP, DEFENSES, NAD, NPD, RNP, SAU
from sau.errors import ConfigError
from sau.optim import Training
from sau.quality import of_attack
from sau.risk import Search
from sau.run import AttackRun, DefenseRun, OwnRun
from sau.settings import Settings

CLASSES = [AttackRun, DefenseRun, OwnRun, AuditConfig, Training, Search, *ATTACKS.values(), *DEFENSES.values()]
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def scalar(option: Option) -> type:
    """int or float: the type that the bounds of a parameter are of."""
    parts = [part for part in typing.get_args(option.hint) if part not in (type(None), ...)]
    return parts[0] if parts else option.hint


def at_bounds(option: Option, allowed: bool) -> list[Any]:
    """Values next to the bounds, or on them, that are allowed, or not."""
    step = 1 if scalar(option) is int else 1e-6
    off = {"ge": 0, "gt": step, "le": 0, "lt": -step} if allowed else {"ge": -step, "gt": 0, "le": step, "lt": 0}
    numbers = [scalar(option)(bound + off[name]) for name, bound in option.bounds.items()]
    return [(n,) * max(1, len(option.default)) for n in numbers] if isinstance(option.default, tuple) else numbers


@each_class
def test_every_bound_holds(cls):
    bounded = [option for option in options(cls).values() if option.range]
    assert bounded or not options(cls) or cls.__name__ == "BadNet"
    for option in bounded:
        for value in at_bounds(option, allowed=False):
            with pytest.raises(ConfigError) as refusal:
                cls(**{option.name: value})
            assert all(part in str(refusal.value) for part in (option.name, repr(value), option.range))
        assert [option.parse(value) for value in at_bounds(option, True)] == at_bounds(option, True)


@each_class
def test_every_type_and_choice_holds(cls, unchecked):
    for option in options(cls).values():
        wrong = [b"x", [b"x"]]
        wrong += [math.nan, math.inf, True, "1"] if scalar(option) in (int, float) else []
        wrong += ["nonsense"] if typing.get_origin(option.hint) is typing.Literal else []
        for value in wrong:
            with pytest.raises(ConfigError, match=option.name):
                cls(**{option.name: value})


# What no single parameter can tell.
TOGETHER = [
    (Training, {"min_lr": 0.5, "lr": 0.1}),
    (Training, {"adam_betas": (0.9,)}),
    (Training, {"steplr_gamma": 1.0, "lr_scheduler": "ReduceLROnPlateau"}),
    (LF, {"lf_optimise": True, "lowFrequencyPatternPath": "pattern.npy"}),
    (LF, {"lf_optimise": True, "attack_label_trans": "all2all"}),
    (SSBA, {"attack_test_replace_imgs_path": "test.npy"}),
    (SIG, {"attack_label_trans": "all2all"}),
    (WaNet, {"pratio": 0.5}),
    (ANP, {"pruning_number": 1.5}),
    (ANP, {"pruning_number": 1.0}),
    (ANP, {"pruning_max": 1.5}),
    (ANP, {"pruning_step": 0.0}),
    (ANP, {"pruning_max": 5.5, "pruning_by": "number"}),
    (ANP, {"pruning_step": 0.05, "pruning_by": "number", "pruning_max": 5.0}),
    (ANP, {"pruning_number": 2.5, "pruning_by": "number"}),
    (RNP, {"pruning_step": 1e-9}),
    (BNP, {"u_max": 1.0, "u_min": 2.0}),
    (NAD, {"layers": ("a", "b", "c", "d")}),
    (NAD, {"layers": ("a", "a")}),
    (AuditConfig, {"parts": ()}),
    (AuditConfig, {"shots": ()}),
    (AuditConfig, {"eps": (0.1, 0.05)}),
    (AuditConfig, {"seeds": (0, 0)}),
    (OwnRun, {"clean_dir": "clean"}),
    (OwnRun, {"std": (0.2, 0.2), "mean": (0.5, 0.5)}),
    (OwnRun, {"std": (0.2,), "mean": (0.5,) * 3}),
    (DefenseRun, {"ratio": 0.0}),
    *((SAU, {name: value}) for name in ("eps", "adv_lr") for value in (1.0, 8.0)),
    (AT, {"eps": 1.0}),
    (NPD, {"eps": 8.0, "norm": "L_inf"}),
    (Search, {"eps": 8.0}),
    (SAU, {"warps": 0.4, "patches": 0.6}),
    (Search, {"step_size": 8.0}),
    (DefenseRun, {"risk_eps": 8.0}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "wrong"), TOGETHER, ids=str)
def test_parameters_that_do_not_go_together_are_refused(cls, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).removeprefix("risk_")):
        cls(**wrong)


def test_radii_of_l2_are_sums_over_pixels():
    assert SAU(norm="L2", eps=8.0).eps == 8 and SAU(eps=8 / 255, adv_lr=1 / 255).eps == 8 / 255
    attack, images = ATTACKS["blended"](), toy_images(8)
    with pytest.raises(ConfigError, match="radius is 8.0"):
        of_attack(images, attack.poison_test(images), 8.0)


@pytest.mark.parametrize(("flag", "value", "allowed"), [
    ("--sig_delta", "0", "above 0 and up to 255"), ("--sig_delta", "x", "a finite number"),
    ("--epochs", "-1", "at least 0"),
])  # fmt: skip
def test_a_refusal_names_flag_value_and_range(flag, value, allowed):
    with pytest.raises(ConfigError) as refusal:
        Settings("x", SIG, (AttackRun, Training, SIG), [flag, value]).settle("cpu", "digits")
    assert str(refusal.value) == f"{flag} is '{value}'; allowed is {allowed}"


def test_a_subclass_changes_a_default_and_keeps_the_rest():
    lr, wider = options(SAU)["lr"], options(ATTACKS["inputaware"])["pratio"]
    assert (lr.default, lr.bounds, lr.help) == (1e-4, {"gt": 0}, options(Training)["lr"].help)
    assert (wider.bounds, wider.aliases) == ({"ge": 0, "le": 0.5}, ("poison_ratio",))


@pytest.mark.parametrize("body", [{"epochs": 7}, {"name": "a", "__annotations__": {"name": str}}])
def test_a_parameter_without_its_type_and_a_fact_with_one_are_refused(body):
    with pytest.raises(TypeError, match=f"{[*body][0]} would"):
        type("Own", (Training,), body)
