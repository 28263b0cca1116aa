"""Every defense, with settings for networks and images of toys."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from sau.defense import ANP, AT, BNP, CLP, D3, EP, FP, FST, FT, FTSAM, IBAU, NAD, NC, NPD, RNP, SAU, SAUSAM, Defense


@dataclass(frozen=True)
class Row:
    """A method with small settings, which change the weights of a tiny network in a fraction of a second.

    Args:
        defense: the method.
        rounds: whether it trains all weights, round by round, and in nothing but rounds.
        random: whether its result depends on the seed; not where it draws nothing.
        images: whether its result depends on the images; not where the weights alone say what is pruned."""

    defense: Defense
    rounds: bool = True
    random: bool = True
    pictures: bool = True


# No threshold of its own would prune some channels of all the networks of the tests.
SEARCH = {"pruning_number": None, "pruning_max": 1.0, "pruning_step": 0.02, "acc_ratio": 0.99}
ROWS = {
    "sau": Row(SAU(epochs=2, batch_size=8, lr=0.01, adv_steps=2)),
    "sau-sam": Row(SAUSAM(epochs=2, batch_size=8, lr=0.01, rho=0.5)),
    "ft": Row(FT(epochs=2, batch_size=8, lr=0.01)),
    "ft-sam": Row(FTSAM(epochs=2, batch_size=8, lr=0.01, rho=0.5)),
    "d3": Row(D3(epochs=2, batch_size=8, lr=0.01)),
    "fst": Row(FST(epochs=2, batch_size=8, lr=0.01)),
    "npd": Row(NPD(epochs=2, warm_epochs=1, batch_size=8, lr=0.01, target_layer_name="features.3"), rounds=False),
    "at": Row(AT(epochs=2, batch_size=8, lr=0.01, adv_steps=2)),
    "anp": Row(ANP(nb_iter=3, batch_size=8, lr=0.1, pruning_by="number", pruning_number=3.0), rounds=False),
    "clp": Row(CLP(u=0.0, batch_size=8), rounds=False, random=False, pictures=False),
    "bnp": Row(BNP(u=0.0, batch_size=8, augment=False), rounds=False, random=False),
    "ep": Row(EP(u=0.0, batch_size=8, augment=False), rounds=False),
    "i-bau": Row(IBAU(epochs=2, batch_size=8, lr=0.01)),
    # Below the median is flagged: after two passes no patch of an untrained network is an outlier.
    "nc": Row(NC(epochs=1, batch_size=8, nc_epoch=2, index_threshold=0.0), rounds=False),
    "fp": Row(FP(epochs=1, batch_size=8, lr=0.01), rounds=False),
    "nad": Row(NAD(te_epochs=1, epochs=1, batch_size=8, lr=0.01), rounds=False),
    "rnp": Row(RNP(batch_size=8, unlearning_epochs=1, recovering_epochs=2, recovering_lr=8.0, **SEARCH), rounds=False),
}


def rows(wanted: Callable[[Row], bool] = lambda row: True) -> pytest.MarkDecorator:
    found = {name: row.defense for name, row in ROWS.items() if wanted(row)}
    return pytest.mark.parametrize("defense", found.values(), ids=found)


each = rows()
each_in_rounds = rows(lambda row: row.rounds)
each_at_random = rows(lambda row: row.random)
