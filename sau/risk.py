"""The risks of SAU's paper (Wei, Zhang, Zha, Wu, NeurIPS 2023, section 3), bounded from below by what a search finds.

With h the network in question, h_b the backdoored one, g the trigger, t its label, D the clean images, D' those whose
label is not t, and S = {e : |e| <= eps, x + e in [0, 1]}:

    R_cl(h)    = mean over D    1[h(x) != y]
    R_bd(h)    = mean over D'   1[h(g(x)) = t]
    R_adv(h)   = mean over D'   max_{e in S}  1[h(x+e) != y]
    R_share(h) = mean over D'   max_{e in S}  1[h(x+e) = h_b(x+e)  and  h(x+e) != y]

One e that makes an indicator 1, a witness, settles its maximum; where none is found it may still exist. A witness for
R_share is one for R_adv, so R_share <= R_adv holds for what is found, too. Where g(x) - x lies in S (Assumption (a))
and h_b answers t, an image that h answers with t has a witness for R_share: R_bd <= R_share + 1 - R_bd(h_b).

The search for R_adv climbs the cross-entropy CE(h(x+e), y), that for R_share the distance from the goal itself, with
m_c(z) = z_c - max_{j != c} z_j the margin of class c,

    max_{c != y}  min(0, m_c(h(x+e))) + min(0, m_c(h_b(x+e)))

which is 0 exactly where h and h_b answer the same class other than y.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from sau.config import check, param
from sau.data.batches import seeded
from sau.data.images import Images, paired, sample, to_float
from sau.defense.sau import SAU, example_types, unsettled
from sau.errors import DataError
from sau.evaluate import Proportion, figures, predict
from sau.models.normalized import check_labels, check_logits, eval_mode, grad_enabled, logits_of
from sau.pgd import Ball, Bounded, length, pgd, require_radius
from sau.types import Change, Flags, Labels, Logits, PerImage, Pixels

BATCH = 256  # images a pass
SPARSE = 0.01  # share of the values that a step in the L1 norm moves (Tramer and Boneh 2019)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How the risks are searched for: steepest ascent in S, with x + e in [0, 1]."""

    norm: Bounded = param("L_inf", "norm of the ball")
    eps: float = param(0.2, "radius of the ball, in [0, 1] pixels; in L_inf below 1")
    steps: int = param(20, "steps of each search", ge=1)
    step_size: float | None = param(None, "length of a step in that norm; None means 2.5 eps / steps")
    restarts: int = param(2, "searches from random places, for each risk", ge=1)

    def __post_init__(self) -> None:
        check(self, " of the risks' search")
        for name in ("eps", "step_size"):
            if (value := getattr(self, name)) is not None:
                require_radius(f"{name} of the risks' search", value, self.norm)

    @property
    def ball(self) -> Ball:
        return Ball(norm=self.norm, eps=self.eps, clip=True)

    def ascend(self, objective: Callable[[Change], PerImage], x: Pixels, e: Change) -> Change:
        size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        return pgd(objective, x, e, self.ball, steps=1, lr=size, direction=partial(steepest, norm=self.norm))


def steepest(gradient: Change, norm: Bounded) -> Change:
    """The direction of length 1 in `norm` that climbs most; in L1 shared by the largest 1 % of the values."""
    if norm == "L_inf":
        return gradient.sign()
    if norm == "L2":
        return gradient / length(gradient, "L2").clamp_min(1e-30).view(-1, 1, 1, 1)
    flat = gradient.flatten(1)
    k = max(1, int(SPARSE * flat.shape[1]))
    top = flat.abs().topk(k, 1).indices
    return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign() / k).view_as(gradient)


@dataclass(frozen=True, eq=False)
class Found:
    """What was found, image by image; N images in D, M in D'. What is about the trigger is None without one."""

    wrong: Bool[Tensor, " all"]  # [N], h errs on x
    target: Flags | None  # [M], h answers g(x) with t
    planted: Flags | None  # [M], h_b does
    inside: Flags | None  # [M], g(x) - x lies in S
    adv: Flags  # [M], a witness for R_adv was found
    share: Flags  # [M], one for R_share
    blind: Flags  # [M], one for R_share was found without starting from g(x) - x
    by_sau: Flags  # [M], SAU's inner search, as released but kept in S, ends at one for R_share
    kind: Labels  # [M], type of the example that maximises h's cross-entropy, see `sau.defense.sau.example_types`
    example: Pixels  # [M, C, H, W], its perturbation
    witness: Pixels  # [M, C, H, W], the perturbation of a witness for R_share; 0 where there is none
    passes: float  # forward passes of one network an image of D' (a gradient counts as one more)

    def shares(self) -> dict[str, Proportion]:
        """The risks with their counts: r_cl, r_bd, r_adv, r_share, r_share_blind, r_share_sau, type1, type2, type3,
        in_ball, and r_bd_in_ball where a trigger lies in S; those of the trigger only where there is one."""
        found = {"r_cl": self.wrong, "r_adv": self.adv, "r_share": self.share, "r_share_blind": self.blind}
        found |= {"r_share_sau": self.by_sau, **{f"type{i}": self.kind == i for i in (1, 2, 3)}}
        if self.target is not None and self.inside is not None:
            found |= {"r_bd": self.target, "in_ball": self.inside}
            found |= {"r_bd_in_ball": self.target[self.inside]} if self.inside.any() else {}
        return {name: _proportion(flags) for name, flags in found.items()}

    def row(self) -> dict[str, float]:
        """r_cl, r_bd, r_adv, r_share, r_share_sau, type1, type2 and type3 in percent, for `metrics.jsonl`."""
        found = self.shares()
        names = ("r_cl", "r_bd", "r_adv", "r_share", "r_share_sau", "type1", "type2", "type3")
        return {name: found[name].percent for name in names if name in found}

    def summary(self) -> dict[str, Any]:
        """Every proportion in percent, its Wilson interval and counts, the bound, and the cost."""
        return {**figures(self.shares()), "bound": self.bound(), "passes": round(self.passes, 2)}

    def bound(self) -> dict[str, float] | None:
        """R_bd and R_share + 1 - R_bd(h_b), in percent, of the images whose trigger lies in S; None if none does."""
        if self.target is None or self.planted is None or self.inside is None or not self.inside.any():
            return None
        target, planted, share = (_proportion(flags[self.inside]) for flags in (self.target, self.planted, self.share))
        most = min(share.hits + planted.total - planted.hits, share.total)
        return {"r_bd": target.percent, "at_most": Proportion(most, share.total).percent}  # rounded once: still a bound


def _proportion(flags: Tensor) -> Proportion:
    return Proportion(int(flags.sum()), len(flags))


def measure(
    model: nn.Module, reference: nn.Module, clean: Images, triggered: Images | None = None,
    search: Search | None = None, *, seed: int = 0,
) -> Found:  # fmt: skip
    """Look for witnesses.

    Args:
        model: h, pixels in [0, 1] -> logits; the modes of both networks are left as they were.
        reference: h_b, the network before purification.
        clean: D; its labels are y.
        triggered: g(x) for D', with t as labels and each with the `index` that x has in `clean`; None where no trigger
            is known: D' is then D, and no search starts from a trigger.
        search: how; default is L_inf with radius 0.2.
        seed: of the random places that searches start from.

    Raises DataError for no images or images that are no pairs, and for networks of other classes; ConfigError for those
    that end in softmax; TrainingError for logits that are not finite.
    """
    if len(clean) == 0 or (triggered is not None and len(triggered) == 0):
        raise DataError("no images to measure risks on; give at least one")
    place = torch.arange(len(clean), device=clean.labels.device) if triggered is None else paired(clean, triggered)
    chosen = clean[place]
    eager = partial(torch.compiler.set_stance, "force_eager")  # batches are of many sizes; it holds once it is made
    with grad_enabled(clean.pixels.device), eval_mode(model, reference), seeded(seed), eager():
        logits, others = (logits_of(network, to_float(chosen.pixels[:8])) for network in (model, reference))
        check_logits(logits)
        check_logits(others)
        if logits.shape != others.shape or logits.shape[1] < 2:
            counts = f"{logits.shape[1]} and {others.shape[1]}"
            raise DataError(f"the networks have {counts} classes; allowed is the same number, 2 and more")
        check_labels(chosen.labels, logits.shape[1])
        hunt = AdversarialSearch(model, reference, to_float(chosen.pixels), chosen.labels, search or Search())
        return hunt.run(clean, triggered, place)


def risk_meter(
    reference: nn.Module, clean: Images, triggered: Images | None, count: int, search: Search, seed: int
) -> Callable[[nn.Module], Found]:
    """Measures the risks of one network after the other on the same sample, with the same search."""
    some, bad = sample(clean, triggered, count, seed)
    return lambda model: measure(model, reference, some, bad, search, seed=seed)


def passes(search: Search, triggered: bool) -> int:
    """About as many passes of an image as `measure` takes where it finds no witness."""
    return 4 * SAU.adv_steps + 6 * search.steps * (search.restarts + triggered)


def margins(z: Logits) -> Tensor:
    """[B, K]: by how much each class beats all others; above 0 only for the answer."""
    first, second = z.topk(2, 1).values.unbind(1)
    answer = F.one_hot(z.argmax(1), z.shape[1]).bool()
    return z - torch.where(answer, second[:, None], first[:, None])


def shared_margin(u: Logits, v: Logits, y: Labels) -> PerImage:
    """The maximum over c != y of min(0, margin of c in u) + min(0, margin of c in v)."""
    both = margins(u).clamp_max(0) + margins(v).clamp_max(0)
    return both.scatter(1, y[:, None], -torch.inf).amax(1)


class AdversarialSearch:
    """Images x [M, C, H, W] in [0, 1] with labels y, and the witnesses found for them so far: `adv`, `share`, `witness`
    and, for all images together, `passes` are as in `Found`."""

    def __init__(self, model: nn.Module, reference: nn.Module, x: Pixels, y: Labels, search: Search) -> None:
        self.model, self.reference, self.x, self.y, self.search = model, reference, x, y, search
        self.adv, self.share = (torch.zeros_like(y, dtype=torch.bool) for _ in range(2))
        self.witness = torch.zeros_like(x)
        self.passes = 0

    def run(self, clean: Images, triggered: Images | None, place: Labels) -> Found:
        """All that `Found` has; x are the images of `clean` at `place`, from which the triggered ones are made."""
        x, ball = self.x, self.search.ball
        every = self._predict(self.model, to_float(clean.pixels))
        answer, planted = every[place], self._predict(self.reference, x)
        self.note(torch.zeros_like(x), answer, planted)  # e = 0 lies in S
        delta = self.as_sau(answer, planted)
        by_sau = self.note(delta, *self._answers(x + delta)) == 1
        example = self.strongest()
        kind = self.note(example, *self._answers(x + example))
        for _ in range(self.search.restarts - 1):
            self._climb(self._alone, ball.start(x, "random"), self.adv)
        for _ in range(self.search.restarts):
            self._climb(self._together, ball.start(x, "random"), self.share)
        blind, of_trigger = self.share.clone(), dict[str, Flags | None](target=None, planted=None, inside=None)
        if triggered is not None:
            g = to_float(triggered.pixels)
            inside, (a, r) = ball.contains(g - x), self._answers(g)
            self.note((g - x)[inside], a[inside], r[inside], inside.nonzero()[:, 0])
            begin = ball.into(x, g - x)
            self._climb(self._together, begin, self.share)
            self._climb(self._alone, begin, self.adv)
            of_trigger = {"target": a == triggered.labels, "planted": r == triggered.labels, "inside": inside}
        return Found(
            wrong=every != clean.labels, **of_trigger, adv=self.adv, share=self.share, blind=blind, by_sau=by_sau,
            kind=kind, example=example, witness=self.witness, passes=self.passes / len(x),
        )  # fmt: skip

    def _predict(self, model: nn.Module, x: Pixels) -> Labels:
        self.passes += len(x)
        return predict(model, x, BATCH)

    def _answers(self, x: Pixels) -> tuple[Labels, Labels]:
        """Classes that h and h_b give to x."""
        return self._predict(self.model, x), self._predict(self.reference, x)

    def note(self, delta: Change, a: Labels, r: Labels, index: Labels | None = None) -> Labels:
        """Take h's answers `a` and h_b's answers `r` on x[index] + delta, which lies in S, for witnesses.

        Returns their types, see `example_types`.
        """
        index = torch.arange(len(self.y), device=self.y.device) if index is None else index
        types = example_types(a, r, self.y[index])
        new = (types == 1) & ~self.share[index]
        self.witness[index[new]] = delta[new]
        self.adv[index] |= types > 0
        self.share[index] |= types == 1
        return types

    def as_sau(self, a: Labels, r: Labels) -> Change:
        """Where SAU's inner search leads; a and r are the answers of h and h_b on x."""
        sau = SAU(norm=self.search.norm, eps=self.search.eps, adv_lr=self.search.eps, clip_pixels=True)
        delta = torch.zeros_like(self.x)
        for at in torch.arange(len(a), device=a.device).split(BATCH):
            delta[at], _ = sau.shared_pgd(self.model, self.reference, self.x[at], self.y[at], a[at], r[at])
        self.passes += 4 * sau.adv_steps * len(a)
        return delta

    def strongest(self) -> Change:
        """For every image the e with the largest cross-entropy of h on one full search, as training would use it."""
        best, highest = torch.zeros_like(self.x), torch.full_like(self.x[:, 0, 0, 0], -torch.inf)

        def goal(at: Labels, delta: Change) -> PerImage:
            loss = self._alone(at, delta)
            better = loss.detach() > highest[at]
            best[at[better]], highest[at[better]] = delta.detach()[better], loss.detach()[better]
            return loss

        self._climb(goal, self.search.ball.start(self.x, "random"), torch.zeros_like(self.adv))
        return best

    def _alone(self, at: Labels, delta: Change) -> PerImage:
        self.passes += (1 + delta.requires_grad) * len(at)
        z = logits_of(self.model, self.x[at] + delta)
        self.adv[at] |= z.argmax(1) != self.y[at]
        return F.cross_entropy(z, self.y[at], reduction="none")

    def _together(self, at: Labels, delta: Change) -> PerImage:
        self.passes += 2 * (1 + delta.requires_grad) * len(at)
        u, v = (logits_of(network, self.x[at] + delta) for network in (self.model, self.reference))
        self.note(delta.detach(), u.argmax(1), v.argmax(1), at)
        return shared_margin(u, v, self.y[at])

    def _climb(self, goal: Callable[[Labels, Change], PerImage], delta: Change, settled: Flags) -> None:
        """`steps` steps up `goal`, which may settle images, for those that are not, and a look at where the last one
        leads."""
        delta = delta.clone()
        for step in range(self.search.steps + 1):
            last, active = step == self.search.steps, unsettled(settled)
            for at in active.split(BATCH) if len(active) else ():
                if last:
                    with torch.no_grad():
                        goal(at, delta[at])
                else:  # images that only fill batches move, too, but what was found for them is kept
                    delta[at] = self.search.ascend(partial(goal, at), self.x[at], delta[at])
