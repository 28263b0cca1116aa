"""Every number in every table: ACC, ASR, R-ACC and DER, in percent, with counts and intervals."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sau.data.images import Images, in_range, to_float
from sau.errors import ConfigError, DataError, TrainingError, lacks_memory
from sau.models import check_labels, logits_of

# In percent, for the words of a verdict: at most this ASR is left of a backdoor that is gone, which costs no more ACC
# than this, and at least this R-ACC is right again.
GONE, COST, RIGHT = 10.0, 5.0, 70.0
AT_ONCE, AT_ONCE_ON_CPU = 500, 128  # pictures; the caches of a CPU do not hold the activations of more


@dataclass(frozen=True)
class Share:
    """`hits` of `total` pictures.

    Args:
        hits: pictures that count.
        total: pictures looked at, at least 1.
    """

    hits: int
    total: int

    @property
    def exact(self) -> float:
        """100 * hits / total."""
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
        acc: clean test pictures classified as their true label (ACC).
        asr: triggered test pictures classified as the attack's label (ASR); None without triggered pictures.
        racc: the same pictures classified as their true label (R-ACC); None without triggered pictures.
    """

    acc: Share
    asr: Share | None = None
    racc: Share | None = None

    def shares(self) -> dict[str, Share | None]:
        """By the names that files have for them."""
        return {"acc": self.acc, "asr": self.asr, "racc": self.racc}

    def __str__(self) -> str:
        """One line, like `ACC 98.33 % [96.41, 99.23]  ASR ...  R-ACC ...`; ACC alone without triggered images."""
        shares = {"ACC": self.acc, "ASR": self.asr, "R-ACC": self.racc}
        return "  ".join(f"{name} {share}" for name, share in shares.items() if share is not None)

    def summary(self) -> dict[str, Any]:
        """`acc, asr, racc` as percentages, their Wilson intervals and counts; what `summary.json` stores."""
        return figures(self.shares())


def percent_right(logits: Tensor, y: Tensor) -> Tensor:
    """Percent of a batch that is answered rightly, on its device; no figure of a table, but of progress."""
    return 100 * (logits.argmax(1) == y).float().mean()


def figures(shares: Mapping[str, Share | None]) -> dict[str, Any]:
    """Shares by name as percentages, their Wilson intervals and counts."""
    out: dict[str, Any] = {name: share.percent if share else None for name, share in shares.items()}
    for name, share in shares.items():
        if share:
            out[f"{name}_interval"] = list(share.interval)
            out[f"{name}_count"] = [share.hits, share.total]
    return out


@contextmanager
def answering(*networks: nn.Module) -> Iterator[None]:
    """Inside, the networks are in eval mode; then each of their modules is in its own mode again."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def predict(model: nn.Module, pixels: Tensor, batch_size: int | None = None) -> Tensor:
    """Classes [N] that `model`, in eval mode, gives to `pixels` [N, C, H, W] (uint8, or float in [0, 1]).

    `batch_size` pictures go through it at once, or as many as suit the device, and fewer where memory does not hold
    them. Raises TrainingError if a logit is not finite: a broken network has no accuracy.
    """
    return _answers(model, pixels, batch_size)[0]


@torch.no_grad()
def _answers(model: nn.Module, pixels: Tensor, batch_size: int | None = None) -> tuple[Tensor, int]:
    """What `predict` returns, and how many classes the network has."""
    device = next(model.parameters(), pixels).device
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, allowed is 1 and more, or none")
    size = batch_size or (AT_ONCE_ON_CPU if device.type == "cpu" else AT_ONCE)
    answers, finite, at, classes = [], torch.ones((), dtype=torch.bool, device=device), 0, 0
    with answering(model):
        while at < max(1, len(pixels)):  # no pictures, too, have an answer: no classes
            try:  # a copy, for some networks change their input in place
                logits = logits_of(model, to_float(pixels[at : at + size].to(device, copy=True)))
            except RuntimeError as error:
                if size == 1 or not lacks_memory(error):
                    raise
                size = -(-size // 2)
                continue
            finite &= logits.isfinite().all()
            answers.append(logits.argmax(1))
            at, classes = at + size, logits.shape[1]
    if not finite:
        raise TrainingError("the network answers with NaN or infinite logits; its weights are broken")
    return torch.cat(answers).to(pixels.device), classes


def score(
    model: nn.Module, clean: Images | tuple[Tensor, Tensor], triggered: Images | tuple[Tensor, Tensor, Tensor] | None
) -> Score:
    """ACC on the clean test set, ASR and R-ACC from one pass over the triggered one.

    Args:
        model: pixels in [0, 1] -> logits; its mode is left as it was.
        clean: `Images`, or (pixels, labels).
        triggered: `Images` without the target class, or (pixels, attack's labels, true labels); None if there are none.

    Pixels are as `predict` has them, labels whole numbers [N]. Raises DataError for labels of another shape or kind,
    TrainingError as `predict`.
    """
    pixels, labels = (clean.pixels, clean.labels) if isinstance(clean, Images) else _fitting("clean", clean, 2)
    acc = accuracy(model, pixels, labels)
    if triggered is None or len(triggered) == 0:
        return Score(acc)
    if isinstance(triggered, Images):
        return Score(acc, *led(model, triggered.pixels, triggered.labels, triggered.true_labels))
    return Score(acc, *led(model, *_fitting("triggered", triggered, 3)))


def _fitting(what: str, given: Any, parts: int) -> tuple[Tensor, ...]:
    """`given` as it is; DataError unless it is pixels and labels for each of them: other shapes would be broadcast."""
    if not (isinstance(given, tuple | list) and len(given) == parts and all(isinstance(t, Tensor) for t in given)):
        raise DataError(f"{what} is {type(given).__name__}, allowed is Images or {parts} tensors, pixels first")
    pixels, *labels = given
    for those in labels:
        if those.shape != pixels.shape[:1] or those.dtype == torch.bool or those.is_floating_point() or not len(those):
            raise DataError(
                f"{what} has {len(pixels)} pictures and labels {list(those.shape)} of {those.dtype}, allowed is one "
                "whole number for each of at least one picture"
            )
    if pixels.is_floating_point():
        pixels = in_range(pixels.detach())
    return pixels, *labels


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> Share:
    """The share of pictures, at least one, that are answered with their label."""
    pixels, labels = _fitting("pictures", (pixels, labels), 2)
    return _right(_answers(model, pixels), labels)[0]


def led(model: nn.Module, pixels: Tensor, target: Tensor, truth: Tensor) -> tuple[Share, Share]:
    """Where pictures, at least one, lead: shares of those answered with `target` (ASR) and with `truth` (R-ACC)."""
    pixels, target, truth = _fitting("triggered", (pixels, target, truth), 3)
    asr, racc = _right(_answers(model, pixels), target, truth)
    return asr, racc


def _right(given: tuple[Tensor, int], *labels: Tensor) -> list[Share]:
    """How many of the answers, given with the number of classes, are as each of `labels` [N] has them."""
    answers, classes = given
    for those in labels:
        check_labels(those, classes)
    return [Share(int((answers == those).sum()), len(those)) for those in labels]


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
        cells = [
            f"{share.percent:.2f} [{share.interval[0]:.2f}, {share.interval[1]:.2f}]" if share else "-"
            for share in (row.acc, row.asr, row.racc)
        ]
        last = "-" if rating is None else f"{rating:.2f}"
        lines.append(f"{name:{width}}" + "".join(f"{cell:>24}" for cell in cells) + f"{last:>9}")
    return "\n".join(lines)


def verdict(before: Score, after: Score, took: bool = True, images: bool = True) -> str:
    """What a defense did, in words: what became of ASR, ACC and R-ACC, and what to try next, a line each.

    Args:
        before: of the attacked network.
        after: of the purified one.
        took: whether the attack had its gate; if not, there is nothing to say about the backdoor.
        images: whether the defense looks at images, so that more of them may help.
    """
    lost = round(before.acc.percent - after.acc.percent, 2)
    cost = f"It cost {lost:.2f} points of accuracy" if lost > 0 else "It cost no accuracy"
    lines = [f"{cost}: {_change('ACC', before.acc, after.acc)}."]
    if before.asr is None or after.asr is None or before.racc is None or after.racc is None:
        return "\n".join(["There was no backdoor to remove.", *lines])
    asr, racc = _change("ASR", before.asr, after.asr), _change("R-ACC", before.racc, after.racc)
    more = "more clean images (--ratio) or " if images else ""
    if not took or before.asr.percent <= GONE:
        first = f"No verdict on the backdoor, for the attack did not take: {asr}."
        return "\n".join([first, *lines, "Next: an attack that takes, then this defense again."])
    gone, right = after.asr.percent <= GONE, after.racc.percent >= RIGHT
    if gone:
        lines.insert(0, f"The backdoor is gone: {asr}.")
        again = "Triggered images get their true label again" if right else "The trigger still leads to wrong labels"
        lines.append(f"{again}: {racc}.")
    else:
        weak = after.asr.percent <= before.asr.percent / 2
        lines.insert(0, f"The backdoor is {'weaker, but not gone' if weak else 'still there'}: {asr}.")
        lines.append(f"Triggered images with their true label: {racc}.")
    if gone and right and lost <= COST:
        lines.append("Next: other attacks and seeds; scripts/audit.py tries to bring the backdoor back.")
    elif gone:
        lines.append(f"Next: {more}milder settings, chosen on clean images and not by these figures.")
    else:
        lines.append(f"Next: {more}another defense; settings chosen by these figures would be chosen by the test set.")
    return "\n".join(lines)


def _change(name: str, before: Share, after: Share) -> str:
    return f"{name} {before.percent:.2f} -> {after.percent:.2f} %"
