"""Searches for adversarial examples of one network and for those that two networks share.

Both climb in S = {e : |e| <= eps, x + e in [0, 1]}: the first one the cross-entropy CE(h(x+e), y), the second one the
distance from the goal itself, with m_c(z) = z_c - max_{j != c} z_j the margin of class c,

    max_{c != y}  min(0, m_c(h(x+e))) + min(0, m_c(h_b(x+e)))

which is 0 exactly where h and h_b answer the same class other than y.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.config import check
from sau.errors import require
from sau.evaluate import predict
from sau.models import logits_of
from sau.perturb import RADII, Ball, Bounded, is_radius, unsettled
from sau.types import Change, Flags, Labels, Logits, PerImage, Pixels

BATCH = 256  # pictures a pass
SPARSE = 0.01  # share of the values that a step in the L1 norm moves (Tramer and Boneh 2019)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Projected gradient steps in S.

    Args:
        norm: of the ball: L_inf, L2 or L1.
        eps: its radius, in [0, 1] pixels: above 0 and, in L_inf, below 1.
        steps: of each search.
        step_size: length of a step in that norm; None means 2.5 eps / steps.
        restarts: searches from random places, for each risk.
    """

    norm: Bounded = "L_inf"
    eps: float = 0.2
    steps: int = 20
    step_size: float | None = None
    restarts: int = 2

    def __post_init__(self) -> None:
        check(self, " of the risks' search")
        for name, fine, allowed in (
            ("eps", is_radius(self.eps, self.norm), RADII),
            ("steps", self.steps >= 1, "1 and more"),
            ("step_size", self.step_size is None or is_radius(self.step_size, self.norm), f"none, or {RADII}"),
            ("restarts", self.restarts >= 1, "1 and more"),
        ):
            require(f"{name} of the risks' search", getattr(self, name), fine, allowed)

    @property
    def ball(self) -> Ball:
        """S."""
        return Ball(norm=self.norm, eps=self.eps, clip=True)

    def move(self, x: Pixels, delta: Change, gradient: Change) -> Change:
        """One step of steepest ascent in the norm."""
        size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        flat = gradient.flatten(1)
        if self.norm == "L_inf":
            direction = flat.sign()
        elif self.norm == "L2":
            direction = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
        else:
            k = max(1, int(SPARSE * flat.shape[1]))
            top = flat.abs().topk(k, 1).indices
            direction = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign() / k)
        return self.ball.into(x, delta + size * direction.view_as(x))


def kinds(answer: Labels, answer_ref: Labels, y: Labels) -> Labels:
    """The types of examples x + e by the answers of h and h_b on them.

    0: h is right; 1 (I, shared): both give the same wrong class; 2 (II): h_b is right; 3 (III): wrong, but differently.
    """
    return torch.where(answer == answer_ref, 1, torch.where(answer_ref == y, 2, 3)) * (answer != y)


def margins(z: Logits) -> Tensor:
    """[B, K]: by how much each class beats all others; above 0 only for the answer."""
    first, second = z.topk(2, 1).values.unbind(1)
    answer = F.one_hot(z.argmax(1), z.shape[1]).bool()
    return z - torch.where(answer, second[:, None], first[:, None])


def shared_margin(u: Logits, v: Logits, y: Labels) -> PerImage:
    """How far both networks are from answering one class other than y: 0 where they do, else below 0.

    The maximum over c != y of min(0, margin of c in u) + min(0, margin of c in v).
    """
    both = margins(u).clamp_max(0) + margins(v).clamp_max(0)
    return both.scatter(1, y[:, None], -torch.inf).amax(1)


class Hunt:
    """Pictures x [M, C, H, W] in [0, 1] with labels y, and the witnesses found for them so far.

    Attributes:
        adv: [M], some e in S makes h err.
        share: [M], some e in S makes h and h_b answer the same class other than y.
        witness: [M, C, H, W], that e of `share`; 0 where there is none.
        done: forward passes of one network so far (a gradient counts as one more).
        least: the same without the pictures that only fill buckets.
    """

    def __init__(self, model: nn.Module, reference: nn.Module, x: Pixels, y: Labels, search: Search) -> None:
        self.model, self.reference, self.x, self.y, self.search = model, reference, x, y, search
        self.adv, self.share = (torch.zeros_like(y, dtype=torch.bool) for _ in range(2))
        self.witness = torch.zeros_like(x)
        self.done = self.least = 0

    def random(self) -> Change:
        """A place in S for every picture."""
        return self.search.ball.start(self.x, "random")

    @torch.no_grad()
    def answers(self, model: nn.Module, x: Pixels) -> Labels:
        """Classes that `model` gives to x."""
        self.count(len(x), len(x))
        return predict(model, x, BATCH)

    def note(
        self, delta: Change, a: Labels, r: Labels, where: Flags | None = None, index: Labels | None = None
    ) -> Labels:
        """Take h's answers `a` and h_b's answers `r` on x[index] + delta for witnesses, `where` delta lies in S.

        Returns their types, see `kinds`.
        """
        index = torch.arange(len(self.y), device=self.y.device) if index is None else index
        where = torch.ones_like(index, dtype=torch.bool) if where is None else where
        types = kinds(a, r, self.y[index])
        new = (types == 1) & where & ~self.share[index]
        self.witness[index[new]] = delta[new]
        self.adv[index] |= (types > 0) & where
        self.share[index] |= (types == 1) & where
        return types

    def strongest(self) -> Change:
        """For every picture the e with the largest cross-entropy of h on one full search, as training would use it."""
        best, highest = torch.zeros_like(self.x), torch.full_like(self.x[:, 0, 0, 0], -torch.inf)

        def keep(at: Labels, delta: Change, loss: PerImage) -> None:
            better = loss > highest[at]
            best[at[better]], highest[at[better]] = delta[better], loss[better]

        self._climb(self._alone, self.random(), lambda: torch.ones_like(self.adv), keep)
        return best

    def adversarial(self, delta: Change) -> None:
        """Search for witnesses of `adv` from `delta`, where there is none yet."""
        self._climb(self._alone, delta, lambda: ~self.adv)

    def shared(self, delta: Change) -> None:
        """Search for witnesses of `share` from `delta`, where there is none yet."""
        self._climb(self._together, delta, lambda: ~self.share, networks=2)

    def _alone(self, at: Labels, delta: Change) -> PerImage:
        z = logits_of(self.model, self.x[at] + delta)
        self.adv[at] |= z.argmax(1) != self.y[at]
        return F.cross_entropy(z, self.y[at], reduction="none")

    def _together(self, at: Labels, delta: Change) -> PerImage:
        u, v = (logits_of(network, self.x[at] + delta) for network in (self.model, self.reference))
        self.note(delta.detach(), u.argmax(1), v.argmax(1), index=at)
        return shared_margin(u, v, self.y[at])

    def _climb(
        self,
        goal: Callable[[Labels, Change], PerImage],
        delta: Change,
        left: Callable[[], Flags],
        keep: Callable[[Labels, Change, PerImage], None] | None = None,
        networks: int = 1,
    ) -> None:
        """`steps` steps up `goal` for the pictures that are `left`, and a look at where the last one leads."""
        delta = delta.clone()
        for step in range(self.search.steps + 1):
            settled, last = ~left(), step == self.search.steps
            needed = int((~settled).sum())
            # Those that fill the last bucket climb on; their witness is kept.
            active = unsettled(settled)
            passes = networks * (1 if last else 2)
            self.count(passes * len(active), passes * needed)
            for at in active.split(BATCH) if needed else ():
                d = delta[at].requires_grad_(not last)
                with torch.set_grad_enabled(not last):
                    height = goal(at, d)
                if keep is not None:
                    keep(at, d.detach(), height.detach())
                if not last:
                    (gradient,) = torch.autograd.grad(height.sum(), d)  # no weight gradients
                    delta[at] = self.search.move(self.x[at], d.detach(), gradient)

    def count(self, done: int, least: int) -> None:
        """Add to the passes."""
        self.done += done
        self.least += least
