"""What clean pictures alone can say about a backdoor: where adversarial examples lead, and how small a patch sends
pictures to a class. Hints, not tests: each stands beside what a network without a backdoor would show.

The patches are those of Neural Cleanse (see `sau.defense.nc`). With n_1..n_K, the mask norms of the smallest
ones, the index is the largest (med - n_c) / MAD (see `sau.defense.nc`). Neural Cleanse flags a class above 2, which
clean networks pass, too. So the index is ranked among those of N clean ones: p = (1 + those that reach it) / (1 + N).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import nn

from sau.data.images import Images, sample, to_float
from sau.defense.nc import Inversion, Patches, anomaly
from sau.evaluate import Proportion
from sau.loop import Session
from sau.risk import Found
from sau.runtime.batchnorm import shared_weight_twin
from sau.seeds import seeded

PICTURES, BATCH = 320, 32  # ten updates a pass, as the published search has on 2,500 pictures in batches of 250


@dataclass(frozen=True)
class Reversal:
    """What was found.

    Args:
        norms: |m_c|_1 of the smallest patch of each class, in pixels.
        label: the class with the smallest patch.
        index: its anomaly index; None where the norms do not allow one: with two classes, which lie equally far from
            their median, and where half of the norms are the median.
    """

    norms: tuple[float, ...]
    label: int
    index: float | None

    def summary(self, clean: Sequence[float]) -> dict[str, Any]:
        """For a report; `clean` are the indices of clean networks that were searched alike."""
        index = self.index
        said = {"norms": [round(norm, 2) for norm in self.norms], "class": self.label}
        said |= {"index": None if index is None else round(index, 2)}
        if index is None or not clean:
            return {**said, "clean_networks": len(clean), "clean_above": None, "p": None}
        reached = sum(other >= index for other in clean)
        p = round((1 + reached) / (1 + len(clean)), 3)
        return {**said, "clean_networks": len(clean), "clean_above": reached, "p": p}

    def text(self, clean: Sequence[float]) -> str:
        """The same as a line."""
        said = self.summary(clean)
        smallest = f"smallest patch: class {self.label}, {min(self.norms):.1f} pixels"
        if self.index is None:
            return smallest
        smallest += f", index {self.index:.1f}"
        if not clean:
            return f"{smallest}; no clean network with as many classes was searched for as long on as few pictures"
        beside = f"{said['clean_above']} of {len(clean)} clean networks in clean_indices.json reach that"
        return f"{smallest}; {beside} (p {said['p']})"


def reverse(model: nn.Module, images: Images, passes: int, seed: int = 0) -> Reversal:
    """Invert a patch for every class of `model`, which stays as it is.

    Args:
        model: [B, C, H, W] in [0, 1] -> logits.
        images: clean pictures with labels, on the model's device; at most 320 of them, drawn by `seed`, are used.
        passes: walks through the pictures, 1 and more.
        seed: of the choice and the order of the pictures.
    """
    some = sample(images, None, PICTURES, seed)[0]
    batches = some.batches(BATCH, seed=seed)
    patches = Patches(images.num_classes, 1, to_float(some.pixels[:1]), Inversion.init_cost)
    with seeded(seed), torch.compiler.set_stance("force_eager"):  # open classes become fewer, and batches with them
        Inversion(nc_epoch=passes).invert(shared_weight_twin(model), batches, patches, Session(say=lambda line: None))
    norms = patches.found()[2]
    label = int(norms.argmin())
    index = float(anomaly(norms)[label])
    return Reversal(tuple(norms.tolist()), label, index if len(norms) > 2 and math.isfinite(index) else None)


def clean_indices(passes: int, classes: int, pictures: int) -> list[float]:
    """Indices of clean networks with so many classes, if `scripts/clean_indices.py` searched them for so long, and on
    as many pictures: fewer than `PICTURES` make fewer updates."""
    content = json.loads((resources.files("sau") / "clean_indices.json").read_text())
    alike = content["passes"] == passes and pictures >= PICTURES
    return [network["index"] for network in content["networks"] if alike and network["classes"] == classes]


def concentration(found: Found, classes: int) -> dict[str, Any]:
    """Where the adversarial examples of a network lead; a backdoor draws them to its class.

    Returns `class`, what most of them are answered with; `share`, how many percent, with its Wilson `interval`; `even`,
    what that would be if they spread evenly; `count`, the examples that change the answer; `by_class`, percent of each.
    """
    flipped = found.answer[found.kind > 0]
    if len(flipped) == 0:
        return {"class": None, "share": 0.0, "interval": None, "even": 0.0, "count": 0, "by_class": []}
    counts = torch.bincount(flipped, minlength=classes).tolist()
    top = max(range(classes), key=counts.__getitem__)
    most = Proportion(counts[top], len(flipped))
    return {
        "class": top,
        "share": most.percent,
        "interval": list(most.interval),
        "even": round(100 / classes, 2),
        "count": len(flipped),
        "by_class": [Proportion(count, len(flipped)).percent for count in counts],
    }
