"""The figures of each part of an audit, as rows: `part`, `curve`, `network`, `x`, `seed`, and shares of pictures.

`x` is what the attacker spent: poisoned pictures (relearn), the radius eps (white, transfer); or the share of the way
from the attacked weights (path). `curve` tells apart what stands beside each other in a part.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from sau.audit import coefficient
from sau.audit.asked import Asked
from sau.audit.case import NONE, Case, Network
from sau.audit.path import STEPS, between, settled
from sau.audit.reactivate import noise, shifted, universal
from sau.audit.relearn import mixture, relearn
from sau.data.images import Images
from sau.evaluate import asr_and_racc, figures, score
from sau.seeds import generator
from sau.types import Pixels

RELEASED, FRESH = "released", "fresh"  # re-learning: augmented once, or every batch anew
BETWEEN, ANEW = "statistics between", "statistics anew"  # the path: of batch norm
TRIGGER, ALONE, NOISE = "trigger + D", "D alone", "trigger + noise"  # what a perturbation is added to
Row = dict[str, Any]


class Measure:
    """Measures one thing on one network after the other.

    Args:
        case: the networks and pictures.
        asked: how much the attacker may spend.
    """

    def __init__(self, case: Case, asked: Asked) -> None:
        self.case, self.asked = case, asked

    def before(self, network: Network) -> list[Row]:
        """ACC, ASR and R-ACC of a network as it is."""
        found = score(network.model, self.case.test, self.case.triggered).summary()
        return [{"part": "before", "curve": "", "network": network.name, "x": 0, "seed": 0, **found}]

    def relearned(self, network: Network, curve: str, seed: int, shots: int) -> list[Row]:
        """The same after RA with so many poisons."""
        case, fresh = self.case, curve == FRESH
        first, later = (None, case.augment) if fresh else (case.augment, None)
        pictures = mixture(case.train, case.poisons, shots, share=self.asked.share, seed=seed, augment=first)
        again = relearn(network.model, pictures, epochs=self.asked.epochs, seed=seed, augment=later)
        found = score(again, case.test, case.triggered).summary()
        return [{"part": "relearn", "curve": curve, "network": network.name, "x": shots, "seed": seed, **found}]

    def walked(self, network: Network, curve: str) -> list[Row]:
        """The same along the path from the attacked network to a purified one."""
        case, found = self.case, []
        pictures = mixture(case.train, case.poisons, 0, share=self.asked.share, seed=0)
        for s in STEPS:
            model = between(case.networks[NONE].model, network.model, s)
            model = settled(model, pictures, case.augment) if curve == ANEW else model
            shares = score(model, case.test, case.triggered).summary()
            found.append({"part": "path", "curve": curve, "network": network.name, "x": s, "seed": 0, **shares})
        return found

    def white(self, network: Network, curve: str, seed: int) -> list[Row]:
        """D fitted to the network itself, on triggered pictures or on clean ones alone.

        With the trigger also: noise of the same size, and the same D on the controls.
        """
        fitted, shown = self._poisons(self.asked.pictures, seed), self.case.triggered
        if curve == ALONE:
            fitted, shown = _led(self.case.train[fitted.index], fitted), _led(self.case.untriggered, shown)
        found = [self._row("white", curve, network, 0.0, seed, shown)]
        for eps, delta in universal([network.model], fitted, self.asked.eps, steps=self.asked.steps, seed=seed):
            pixels = shifted(shown, delta)
            if curve == TRIGGER:
                random = shifted(shown, noise(shown, eps, generator(seed)))
                found.append(self._row("white", NOISE, network, eps, seed, shown, random))
                for other in [] if network.control else self.case.controls:
                    row = self._row("white", f"same D on {other.name}", other, eps, seed, shown, pixels)
                    found.append({**row, "network": network.name})
            found.append(self._row("white", curve, network, eps, seed, shown, pixels))
        return found

    def transferred(self, surrogates: Sequence[Network], targets: Sequence[Network], seed: int) -> list[Row]:
        """D fitted to the surrogates, a step on each in turn, and measured on the targets, which it never asked."""
        fitted, shown = self._poisons(self.asked.pictures, seed), self.case.triggered
        models = [network.model for network in surrogates]
        found = [self._row("transfer", TRIGGER, target, 0.0, seed, shown) for target in targets]
        for eps, delta in universal(models, fitted, self.asked.eps, steps=self.asked.steps, seed=seed):
            pixels = shifted(shown, delta)
            found += [self._row("transfer", TRIGGER, target, eps, seed, shown, pixels) for target in targets]
        return found

    def alike(self, network: Network) -> list[Row]:
        """How alike the network's reaction to the trigger is to the attacked one's: `s`, the mean of `layers`."""
        by_layer = coefficient.similarity(
            self.case.networks[NONE].model, network.model, self.case.triggered, self._busiest
        )
        mean = sum(by_layer.values()) / len(by_layer)
        return [{"part": "bec", "curve": "", "network": network.name, "x": 0, "seed": 0, "s": mean, "layers": by_layer}]

    @cached_property
    def _busiest(self) -> coefficient.Chosen:
        return coefficient.busiest(self.case.networks[NONE].model, self.case.untriggered, self.case.triggered)

    def _poisons(self, count: int, seed: int) -> Images:
        """Some triggered training pictures, the first of the same order whatever the count."""
        order = torch.randperm(len(self.case.poisons), generator=generator(seed))
        return self.case.poisons[order[:count]]

    def _row(
        self, part: str, curve: str, network: Network, x: int | float, seed: int, shown: Images,
        pixels: Pixels | None = None,
    ) -> Row:  # fmt: skip
        """ASR and R-ACC on the pictures that are shown, or on these pixels in their place."""
        asr, racc = asr_and_racc(
            network.model, shown.pixels if pixels is None else pixels, shown.labels, shown.true_labels
        )
        shares = figures({"asr": asr, "racc": racc})
        return {"part": part, "curve": curve, "network": network.name, "x": x, "seed": seed, **shares}


def _led(clean: Images, wanted: Images) -> Images:
    """Clean pictures with the labels that the attacker wants for them."""
    return Images(clean.pixels, wanted.labels, wanted.true_labels, clean.role, clean.index, clean.num_classes)
