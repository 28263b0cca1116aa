"""The risks of SAU's paper (Wei, Zhang, Zha, Wu, NeurIPS 2023, section 3), bounded from below by what a search finds.

With h the network in question, h_b the backdoored one, g the trigger, t its label, D the clean pictures, D' those whose
label is not t, and S = {e : |e| <= eps, x + e in [0, 1]}:

    R_cl(h)    = mean over D    1[h(x) != y]
    R_bd(h)    = mean over D'   1[h(g(x)) = t]
    R_adv(h)   = mean over D'   max_{e in S}  1[h(x+e) != y]
    R_share(h) = mean over D'   max_{e in S}  1[h(x+e) = h_b(x+e)  and  h(x+e) != y]

One e that makes an indicator 1, a witness, settles its maximum; where none is found it may still exist. A witness for
R_share is one for R_adv, so R_share <= R_adv holds for what is found, too. Where g(x) - x lies in S (Assumption (a))
and h_b answers t, a picture that h answers with t has a witness for R_share: R_bd <= R_share + 1 - R_bd(h_b).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sau.data.images import Images, paired, sample, to_float
from sau.defense.sau import SAU
from sau.errors import DataError
from sau.evaluate import Share, answering, figures
from sau.models import check_labels, check_logits, grad_enabled, logits_of
from sau.seeds import seeded
from sau.types import Flags, Labels, Pixels
from sau.witness import BATCH, Hunt, Search


@dataclass(frozen=True, eq=False)
class Found:
    """What was found, picture by picture; N pictures in D, M in D'.

    Args:
        wrong: [N], h errs on x.
        target: [M], h answers g(x) with t; None without a trigger.
        planted: [M], h_b does.
        inside: [M], g(x) - x lies in S.
        adv: [M], a witness for R_adv was found.
        share: [M], one for R_share.
        blind: [M], one for R_share was found without starting from g(x) - x.
        by_sau: [M], SAU's inner search, as released but kept in S, ends at one for R_share.
        kind: [M], type of the example that maximises h's cross-entropy: 0 none, 1 (I) h and h_b answer the same wrong
            class, 2 (II) h alone errs, 3 (III) both err, differently.
        answer: [M], the class that h gives to that example.
        example: [M, C, H, W], its perturbation.
        witness: [M, C, H, W], the perturbation of a witness for R_share; 0 where there is none.
        passes: forward passes of one network a picture of D' (a gradient counts as one more).
        least: the same without the pictures that only fill batches.
    """

    wrong: Bool[Tensor, " all"]
    target: Flags | None
    planted: Flags | None
    inside: Flags | None
    adv: Flags
    share: Flags
    blind: Flags
    by_sau: Flags
    kind: Labels
    answer: Labels
    example: Pixels
    witness: Pixels
    passes: float
    least: float

    def shares(self) -> dict[str, Share]:
        """The risks with their counts: r_cl, r_bd, r_adv, r_share, r_share_blind, r_share_sau, type1, type2, type3,
        in_ball, and r_bd_in_ball where a trigger lies in S; those of the trigger only where there is one."""
        kinds = {f"type{i}": _share(self.kind == i) for i in (1, 2, 3)}
        found = {"r_cl": _share(self.wrong), "r_adv": _share(self.adv), "r_share": _share(self.share)}
        found |= {"r_share_blind": _share(self.blind), "r_share_sau": _share(self.by_sau), **kinds}
        if self.target is not None and self.inside is not None:
            found |= {"r_bd": _share(self.target), "in_ball": _share(self.inside)}
            if self.inside.any():
                found["r_bd_in_ball"] = _share(self.target[self.inside])
        return found

    def row(self) -> dict[str, float]:
        """r_cl, r_bd, r_adv, r_share, r_share_sau, type1, type2 and type3 in percent, for `metrics.jsonl`."""
        found = self.shares()
        names = ("r_cl", "r_bd", "r_adv", "r_share", "r_share_sau", "type1", "type2", "type3")
        return {name: found[name].percent for name in names if name in found}

    def summary(self) -> dict[str, Any]:
        """Every share in percent, its Wilson interval and counts, the bound, and the cost."""
        return {**figures(self.shares()), "bound": self.bound(), "passes": round(self.passes, 2)}

    def bound(self) -> dict[str, float] | None:
        """R_bd and R_share + 1 - R_bd(h_b), in percent, of the pictures whose trigger lies in S; None if none does."""
        if self.target is None or self.planted is None or self.inside is None or not self.inside.any():
            return None
        target, planted, share = (_share(flags[self.inside]) for flags in (self.target, self.planted, self.share))
        most = min(share.hits + planted.total - planted.hits, share.total)
        return {"r_bd": target.percent, "at_most": Share(most, share.total).percent}  # rounded once, to stay a bound


def _share(flags: Flags) -> Share:
    return Share(int(flags.sum()), len(flags))


def measure(
    model: nn.Module,
    reference: nn.Module,
    clean: Images,
    triggered: Images | None = None,
    search: Search | None = None,
    *,
    seed: int = 0,
) -> Found:
    """Look for witnesses.

    Args:
        model: h, pixels in [0, 1] -> logits; the modes of both networks are left as they were.
        reference: h_b, the network before purification.
        clean: D; its labels are y.
        triggered: g(x) for D', with t as labels and each with the `index` that x has in `clean`; None where no trigger
            is known: D' is then D, and no search starts from a trigger.
        search: how; default is L_inf with radius 0.2.
        seed: of the random places that searches start from.

    Raises DataError for other data, pictures that are no pairs or lie elsewhere than the networks, or none, and for
    networks of other classes; ConfigError for those that end in softmax; TrainingError for logits that are not finite.
    """
    if not isinstance(clean, Images) or not isinstance(triggered, Images | None):
        raise DataError("risks are measured on Images; Images.clean(pixels, labels, num_classes) makes them")
    if len(clean) == 0 or (triggered is not None and len(triggered) == 0):
        raise DataError("no pictures to measure risks on; give at least one")
    every = torch.arange(len(clean), device=clean.labels.device)
    place = every if triggered is None else paired(clean, triggered)
    chosen = clean[place]
    eager = partial(torch.compiler.set_stance, "force_eager")  # batches are of many sizes; it holds once it is made
    with grad_enabled(clean.pixels.device), answering(model, reference), seeded(seed), eager():
        _check_networks((model, reference), chosen)
        hunt = Hunt(model, reference, to_float(chosen.pixels), chosen.labels, search or Search())
        return _found(hunt, clean, triggered, place)


def _check_networks(networks: tuple[nn.Module, nn.Module], chosen: Images) -> None:
    places = {chosen.pixels.device, *(weight.device for network in networks for weight in network.parameters())}
    if len(places) > 1:
        where = " and ".join(sorted(map(str, places)))
        raise DataError(f"the networks and the pictures lie on {where}; bring them to one device with their .to(...)")
    with torch.no_grad():
        some = [logits_of(network, to_float(chosen.pixels[:8])) for network in networks]
    for logits in some:
        check_logits(logits)
    classes, others = (logits.shape[1] for logits in some)
    if classes != others or classes < 2:
        raise DataError(f"the networks have {classes} and {others} classes; allowed is the same number, 2 and more")
    check_labels(chosen.labels, classes)


def gauge(
    reference: nn.Module, clean: Images, triggered: Images | None, count: int, search: Search, seed: int
) -> Callable[[nn.Module], Found]:
    """Measures the risks of one network after the other on the same sample, with the same search."""
    some, bad = sample(clean, triggered, count, seed)
    return lambda model: measure(model, reference, some, bad, search, seed=seed)


def _by_sau(hunt: Hunt, a: Labels, r: Labels) -> Flags:
    """Where SAU's inner search leads to a shared example; a and r are the answers on x."""
    search = SAU(norm=hunt.search.norm, eps=hunt.search.eps, adv_lr=hunt.search.eps, clip_pixels=True)
    delta = torch.zeros_like(hunt.x)
    for at in torch.arange(len(a), device=a.device).split(BATCH):
        x, y = hunt.x[at], hunt.y[at]
        delta[at], _ = search.shared_pgd(hunt.model, hunt.reference, x, y, a[at], r[at])
    hunt.count(4 * search.adv_steps * len(a), 4 * search.adv_steps * len(a))
    ends = (hunt.answers(network, hunt.x + delta) for network in (hunt.model, hunt.reference))
    return hunt.note(delta, *ends) == 1


def _found(hunt: Hunt, clean: Images, triggered: Images | None, place: Labels) -> Found:
    x = hunt.x
    answers = hunt.answers(hunt.model, to_float(clean.pixels))
    a = answers[place]
    r = hunt.answers(hunt.reference, x)
    hunt.note(torch.zeros_like(x), a, r)  # e = 0 lies in S
    by_sau = _by_sau(hunt, a, r)
    example = hunt.strongest()
    a, r = (hunt.answers(network, x + example) for network in (hunt.model, hunt.reference))
    kind, answer = hunt.note(example, a, r), a
    for _ in range(hunt.search.restarts - 1):
        hunt.adversarial(hunt.random())
    for _ in range(hunt.search.restarts):
        hunt.shared(hunt.random())
    blind = hunt.share.clone()
    target = planted = inside = None
    if triggered is not None:
        g = to_float(triggered.pixels)
        inside = hunt.search.ball.contains(g - x)
        a, r = hunt.answers(hunt.model, g), hunt.answers(hunt.reference, g)
        hunt.note(g - x, a, r, inside)
        begin = hunt.search.ball.into(x, g - x)
        hunt.shared(begin)
        hunt.adversarial(begin)
        target, planted = a == triggered.labels, r == triggered.labels
    return Found(
        wrong=answers != clean.labels,
        target=target,
        planted=planted,
        inside=inside,
        adv=hunt.adv,
        share=hunt.share,
        blind=blind,
        by_sau=by_sau,
        kind=kind,
        answer=answer,
        example=example,
        witness=hunt.witness,
        passes=hunt.done / len(x),
        least=hunt.least / len(x),
    )
