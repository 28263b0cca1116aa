"""BEC, the backdoor existence coefficient (Zhu, Liang, Wu, NeurIPS 2024): how much of the backdoored network's
reaction to the trigger is left in a network, whatever it answers.

    TAC_c = mean |a_c(x~) - a_c(x)|_2                 how much channel c of a layer of h_b changes with the trigger
    s(h)  = mean over layers of CKA(h_b, h)           of the tenth of the channels with the largest TAC, on triggered x~
    BEC   = (s(h) - s(clean)) / (1 - s(clean))        1 for h_b itself, 0 for the clean network

with linear CKA(X, Y) = <H XX' H, H YY' H> / (|H XX' H| |H YY' H|), H the centring matrix, pictures as rows.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sau.data.images import Images, to_float
from sau.defense.hooks import forward_hooks
from sau.models import full_precision
from sau.types import Labels

KEPT = 0.1  # share of a layer's channels, rounded up
PAIRS, LOOKED_AT, BLOCK = 2200, 500, 250  # pictures for TAC; for CKA; at a time
ASIDE = ("shortcut", "downsample")  # in the names of convolutions beside the main path
Chosen = dict[str, Labels]  # channels by layer


def layers(model: nn.Module) -> list[str]:
    """The convolutions on the main path without the first one, by name."""
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return [name for name in every[1:] if not any(word in name for word in ASIDE)]


def busiest(model: nn.Module, clean: Images, triggered: Images) -> Chosen:
    """The channels of each layer of the backdoored `model` that change most with the trigger.

    Args:
        model: h_b.
        clean: x; the first 2,200 count.
        triggered: the same pictures with the trigger, in that order.
    """
    sums: dict[str, Tensor] = {}
    names = layers(model)
    for at in torch.arange(min(PAIRS, len(clean))).split(BLOCK):
        x, g = (dict(_outputs(model, part[at], names)) for part in (clean, triggered))
        for name in names:
            change = torch.linalg.vector_norm((g[name] - x[name]).flatten(2), dim=2).sum(0)
            sums[name] = sums[name] + change if name in sums else change
    return {name: tac.topk(math.ceil(KEPT * len(tac))).indices for name, tac in sums.items()}


def similarity(reference: nn.Module, model: nn.Module, triggered: Images, chosen: Chosen) -> dict[str, float]:
    """CKA of each layer between h_b and `model`, which has the same layers, on the first 500 triggered pictures."""
    pictures = triggered[torch.arange(min(LOOKED_AT, len(triggered)))]
    theirs, ours = (_features(network, pictures, chosen) for network in (reference, model))
    return {name: cka(theirs[name], ours[name]) for name in chosen}


def cka(x: Float[Tensor, "n f"], y: Float[Tensor, "n g"]) -> float:
    """Linear centred kernel alignment of two sets of features of n pictures, 0 to 1; 0 where one does not vary."""
    first, second = (_centred(part.double() @ part.double().T) for part in (x, y))
    scale = float(first.norm() * second.norm())
    return float((first * second).sum()) / scale if scale > 0 else 0.0


def existence(similarities: Mapping[str, float], clean: str) -> dict[str, float | None]:
    """BEC by network, from s(h): h_b has 1 and the network `clean` has 0; None if those two are alike."""
    lowest = similarities[clean]
    return {name: (s - lowest) / (1 - lowest) if lowest < 1 else None for name, s in similarities.items()}


def stretched(similarities: Mapping[str, float], attacked: str) -> dict[str, float | None]:
    """The scale of the released figure: 0 for the least of the networks compared, 1 for the most and for h_b.

    It tells their order, not how much is left: whichever network is most alike has a 1. None if all are alike.
    """
    others = [s for name, s in similarities.items() if name != attacked]
    low, high = min(others, default=0.0), max(others, default=0.0)
    return {
        name: 1.0 if name == attacked else (s - low) / (high - low) if high > low else None
        for name, s in similarities.items()
    }


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _features(model: nn.Module, pictures: Images, chosen: Chosen) -> dict[str, Tensor]:
    """[N, channels x height x width] of the chosen channels, by layer."""
    found: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for at in torch.arange(len(pictures)).split(BLOCK):
        for name, output in _outputs(model, pictures[at], list(chosen)):
            found[name].append(output[:, chosen[name]].flatten(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def _outputs(model: nn.Module, pictures: Images, names: Sequence[str]) -> list[tuple[str, Tensor]]:
    """What each layer answers. A layer that NPD put a polarizer before answers under its old name."""
    found: list[tuple[str, Tensor]] = []

    def keep(name: str, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((name, output.clone()))  # networks may change it in place

    with full_precision(model), forward_hooks((model.get_submodule(name), partial(keep, name)) for name in names):
        model(to_float(pictures.pixels))
    return found
