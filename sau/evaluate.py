"""Every number in every table: ACC, ASR, R-ACC and DER, in percent, with counts and intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sau.data.batches import in_range, to_float
from sau.data.images import Augment, Images
from sau.errors import DataError, TrainingError, lacks_memory
from sau.models.normalized import check_labels, classifier, eval_mode, forward_hooks, logits_of

# In percent, for the words of `conclusion`: at most this ASR is left of a backdoor that is gone, which costs no more
# ACC than this, and at least this R-ACC is right again.
GONE, MAX_COST, MIN_RACC = 10.0, 5.0, 70.0
LEARNED = 0.2  # of the way from chance to all images: of a network that is worse an ASR says nothing
NORM_BATCH = 256  # images at a time for statistics of batch norm
AT_ONCE, AT_ONCE_ON_CPU = 500, 128  # images; the caches of a CPU do not hold the activations of more


@dataclass(frozen=True)
class Proportion:
    """`hits` of `total` images, at least one."""

    hits: int
    total: int

    @property
    def exact(self) -> float:
        return 100 * self.hits / self.total

    @property
    def percent(self) -> float:
        """`exact`, rounded to two decimals as the published tables are."""
        return round(self.exact, 2)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval in percent (Wilson 1927), two decimals; right also at 0 and 100 %."""
        z, n, p = 1.959963984540054, self.total, self.hits / self.total
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return round(100 * max(0.0, centre - half), 2), round(100 * min(1.0, centre + half), 2)

    def __str__(self) -> str:
        """Like `98.33 % [96.41, 99.23]`: the percentage and its interval."""
        low, high = self.interval
        return f"{self.percent:.2f} % [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Score:
    """What a network does on the two test sets.

    Args:
        acc: clean test images classified as their true label (ACC).
        asr: triggered test images classified as the attack's label (ASR); None without triggered images.
        racc: the same images classified as their true label (R-ACC); None without triggered images.
    """

    acc: Proportion
    asr: Proportion | None = None
    racc: Proportion | None = None

    def shares(self) -> dict[str, Proportion | None]:
        return dict(vars(self))

    def __str__(self) -> str:
        """One line, like `ACC 98.33 % [96.41, 99.23]  ASR ...  R-ACC ...`; ACC alone without triggered images."""
        shares = {"ACC": self.acc, "ASR": self.asr, "R-ACC": self.racc}
        return "  ".join(f"{name} {share}" for name, share in shares.items() if share is not None)

    def summary(self) -> dict[str, Any]:
        """`acc, asr, racc` as percentages, their Wilson intervals and counts; what `summary.json` stores."""
        return figures(self.shares())


def batch_accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Percent of a batch that is classified correctly, on its device; for progress, not for tables."""
    return 100 * (logits.argmax(1) == y).float().mean()


def figures(shares: Mapping[str, Proportion | None]) -> dict[str, Any]:
    """Proportions by name as percentages, their Wilson intervals and counts."""
    out: dict[str, Any] = {name: share.percent if share else None for name, share in shares.items()}
    for name, share in shares.items():
        if share:
            out[f"{name}_interval"] = list(share.interval)
            out[f"{name}_count"] = [share.hits, share.total]
    return out


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, batch_size: int | None = None, labels: tuple[Tensor, ...] = ()) -> Tensor:
    """Classes [N] that `model`, in eval mode, gives to `pixels` [N, C, H, W] (uint8, or float in [0, 1]).

    `batch_size` images go through it at once, or as many as suit the device, and fewer where memory does not hold
    them. Raises TrainingError if a logit is not finite: a broken network has no accuracy; DataError for `labels` that
    are no classes of the network.
    """
    device = next(model.parameters(), pixels).device
    size, at = batch_size or (AT_ONCE_ON_CPU if device.type == "cpu" else AT_ONCE), 0
    answers, finite = list[Tensor](), torch.ones((), dtype=torch.bool, device=device)
    with eval_mode(model):
        while at < max(1, len(pixels)):  # no images have an answer, too: no classes
            try:  # a copy, for some networks change their input in place
                logits = logits_of(model, to_float(pixels[at : at + size].to(device, copy=True)))
            except RuntimeError as error:
                if size == 1 or not lacks_memory(error):
                    raise
                size = -(-size // 2)
                continue
            for each in () if answers else labels:
                check_labels(each, logits.shape[1])
            finite &= logits.isfinite().all()
            answers.append(logits.argmax(1))
            at += size
    if not finite:
        raise TrainingError("the logits of the network are NaN or infinite; its weights are broken")
    return torch.cat(answers).to(pixels.device)


@torch.no_grad()
def last_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """[N, F] on the CPU: the input of the linear layer that makes the logits of `pixels`, which are as in `predict`, in
    eval mode. ConfigError if none does."""
    kept, device = list[Tensor](), next(model.parameters()).device
    with eval_mode(model):
        layer = classifier(model, to_float(pixels[:2].to(device)), "a look at features", "another network")
        with forward_hooks([(layer, lambda layer, given, output: kept.append(given[0].float().flatten(1).cpu()))]):
            predict(model, pixels)
    return torch.cat(kept)


def score(model: nn.Module, clean: Images | Sequence[Any], triggered: Images | Sequence[Any] | None = None) -> Score:
    """ACC on the clean test set, ASR and R-ACC from one pass over the triggered one.

    Args:
        model: pixels in [0, 1] -> logits; its mode is left as it was.
        clean: `Images`, or (pixels, labels).
        triggered: `Images` without the target class, or (pixels, attack's labels, true labels); None if there are none.

    Pixels [N, C, H, W] are uint8 or float in [0, 1], labels whole numbers [N]; arrays and lists are taken, too. Raises
    DataError for labels of another shape or kind, and where the attack's label is the true one; TrainingError as
    `predict`.
    """
    if isinstance(clean, Images):
        clean = (clean.pixels, clean.labels)
    if not isinstance(clean, tuple | list) or len(clean) != 2:
        raise DataError(f"the test set is a {type(clean).__name__}; allowed are Images or (pixels, labels)")
    (acc,) = proportions(model, *map(torch.as_tensor, clean))
    if triggered is None or len(triggered) == 0:
        return Score(acc)
    if isinstance(triggered, Images):
        triggered = (triggered.pixels, triggered.labels, triggered.true_labels)
    if not isinstance(triggered, tuple | list) or len(triggered) != 3:
        given = type(triggered).__name__
        raise DataError(f"triggered is a {given}; allowed are Images or (pixels, labels, true labels)")
    pixels, labels, true = map(torch.as_tensor, triggered)
    scores = proportions(model, pixels, labels, true)
    if already := int((labels == true).sum()):
        raise DataError(f"{already} triggered images are of the class that the attack wants; leave them out")
    return Score(acc, *scores)


def proportions(model: nn.Module, pixels: Tensor, *labels: Tensor) -> list[Proportion]:
    """How many of the images, at least one, are classified as each of the labels [N] has it.

    DataError unless there is a whole number, a class of the network, for each image: other shapes would be broadcast.
    """
    for each in labels:
        if each.shape != pixels.shape[:1] or each.dtype == torch.bool or each.is_floating_point() or not len(each):
            found = f"{len(pixels)} images have labels {list(each.shape)} of {each.dtype}"
            raise DataError(f"{found}, allowed is one whole number for each of at least one image")
    advice = "give pixels before normalisation, and the network as sau.models.Normalized(model, mean, std)"
    pixels = in_range(pixels.detach(), advice) if pixels.is_floating_point() else pixels
    predictions = predict(model, pixels, labels=labels)
    return [Proportion(int((predictions == each).sum()), len(each)) for each in labels]


def der(before: Score, after: Score) -> float | None:
    """Defense effectiveness rating in percent: [max(0, ASR drop) - max(0, ACC drop) + 100] / 2 (FT-SAM, eq. 6).

    50 means that nothing changed, 100 that an ASR of 100 vanished at no cost; None where there is no ASR.
    """
    if before.asr is None or after.asr is None:
        return None
    gain = max(0.0, before.asr.exact - after.asr.exact)
    cost = max(0.0, before.acc.exact - after.acc.exact)
    return round((gain - cost + 100) / 2, 2)


def table(rows: dict[str, Score]) -> str:
    """The scores as text, one row each, with intervals, and DER against the first row."""
    first, width = next(iter(rows.values())), max(8, *(len(name) + 1 for name in rows))
    lines = [" " * width + "".join(f"{name + ' %':>24}" for name in ("ACC", "ASR", "R-ACC")) + f"{'DER %':>9}"]
    for name, row in rows.items():
        rating = der(first, row) if row is not first else None
        cells = [str(share).replace(" %", "") if share else "-" for share in row.shares().values()]
        last = "-" if rating is None else f"{rating:.2f}"
        lines.append(f"{name:{width}}" + "".join(f"{cell:>24}" for cell in cells) + f"{last:>9}")
    return "\n".join(lines)


def has_learned(acc: Proportion, classes: int) -> bool:
    """Whether the accuracy is well above chance; a network with a single answer may have an ASR of 100 %."""
    return acc.exact / 100 >= LEARNED + (1 - LEARNED) / classes


@torch.no_grad()
def reestimate_statistics(model: nn.Module, images: Images, augment: Augment | None = None) -> bool:
    """Make the statistics of the batch norms of `model` the means over the batches of `images`, augmented; dropout
    stays off, unlike in `torch.optim.swa_utils.update_bn`. Returns whether there are such norms."""
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # all batches count alike
        norm.train()
    for x, *_ in images.batches(NORM_BATCH, seed=0, augment=augment) if norms else ():
        model(x)
    model.eval()
    return bool(norms)


def conclusion(before: Score, after: Score, took: bool = True, images: bool = True) -> str:
    """What a defense did, in words: what became of ASR, ACC and R-ACC, and what to try next, a line each.

    Args:
        before: of the attacked network.
        after: of the purified one.
        took: whether the attack passed its gate; if not, there is nothing to say about the backdoor.
        images: whether the defense looks at images, so that more of them may help.
    """
    lost = round(before.acc.percent - after.acc.percent, 2)
    cost = f"It cost {lost:.2f} points of accuracy" if lost > 0 else "It cost no accuracy"
    cost = f"{cost}: ACC {_change(before.acc, after.acc)}"
    if before.asr is None or after.asr is None:
        return f"There was no backdoor to remove.\n{cost}"
    asr, racc = _change(before.asr, after.asr), _change(before.racc, after.racc)
    if not took or before.asr.percent <= GONE:
        first = f"The attack did not take, so nothing can be said of the backdoor: ASR {asr}"
        return f"{first}\n{cost}\nNext: an attack with a higher ASR or ACC, then this defense again."
    more = "more clean images (--ratio) or " if images else ""
    right = bool(after.racc and after.racc.percent >= MIN_RACC)
    if after.asr.percent > GONE:
        first = "weaker, but not gone" if after.asr.percent <= before.asr.percent / 2 else "still there"
        third = "Triggered images with their true label"
        advice = f"{more}another defense; settings chosen by these figures would be chosen by the test set"
    else:
        first = "gone"
        third = "Triggered images get their true label again" if right else "The trigger still leads to wrong labels"
        advice = f"{more}milder settings, chosen on clean images and not by these figures"
        if right and lost <= MAX_COST:
            advice = "other attacks and seeds; scripts/audit.py tries to bring the backdoor back"
    return f"The backdoor is {first}: ASR {asr}\n{cost}\n{third}: R-ACC {racc}\nNext: {advice}."


def _change(before: Proportion | None, after: Proportion | None) -> str:
    return " -> ".join(f"{share.percent:.2f}" for share in (before, after) if share is not None) + " %."
