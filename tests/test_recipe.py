"""Recipes: which one is in force, and what the short one changes."""

import pytest
from toys import QUICK

from sau.attack import BadNet, WaNet
from sau.command.request import Request
from sau.defense import SAU
from sau.optim import Training
from sau.settings.run import AttackRun, DefenseRun


def settled(*flags: str, dataset: str = "cifar10", method: type = BadNet) -> tuple:
    request = Request("x", method, (AttackRun, Training, method), [*flags, "--device", "cpu"])
    return request.recipe(), *request.settle(request.recipe()[0], dataset)


def test_fast_is_for_attacks_beforehand():
    """On any device, as asked."""
    (recipe, why), run, training, _ = settled("--recipe", "fast")
    assert (recipe, why, run.recipe, run.width, training.epochs) == ("fast", "as asked", "fast", 64, 24)
    (recipe, why), _, training, _ = settled("--recipe", "fast", method=WaNet)
    assert recipe == "paper" and "poisoned beforehand" in why and training.epochs == 100


@pytest.mark.parametrize(("recorded", "full"), [("fast", "paper"), ("cpu", "cpu")])
def test_a_defense_takes_the_whole_recipe(recorded, full):
    assert Request("x", SAU, (DefenseRun, SAU), []).recipe(recorded)[0] == full
    assert Request("x", SAU, (DefenseRun, SAU), ["--recipe", "fast", "--device", "cpu"]).recipe("cpu")[0] == "paper"


def test_data_sets_without_a_fast_recipe_say_so(refused):
    line = refused("attack", "badnet", "--dataset", "digits", "--recipe", "fast", *QUICK)
    assert "recipe is fast, which digits does not have; allowed is paper" in line


def test_a_recipe_that_is_gone_is_refused(refused):
    line = refused("attack", "badnet", "--recipe", "fast_cpu", *QUICK)
    assert "--recipe is 'fast_cpu'; allowed is one of auto, paper, cpu, fast" in line
