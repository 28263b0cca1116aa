"""SAU, Shared Adversarial Unlearning (Wei, Zhang, Zha, Wu, NeurIPS 2023).

With h the network being purified (softmax p), h_b the backdoored one (softmax q), a ball S and clean pairs (x, y); in
the code h is `model`, h_b `reference` and e `delta`:

    inner   max_{e in S}  l3 * 1/2 [CE(h(x+e), y) + CE(h_b(x+e), y)]  -  l4 * JS(p(x+e), q(x+e))
    outer   min_h         l1 * CE(h(x), y)  +  l2 * 1[s != y] * -log(1 - p_s(x+e)),     s = argmax h_b(x+e)

An example is shared (type I) if both networks answer the same wrong class; the outer problem makes h either right on it
or wrong in another way than h_b. These are the paper's formulas; `success`, `stop_fooled`, `clip_pixels`, `outer_mask`
and `clamp_loss` are where its released code departs from them, and stand as released. Not in the paper are `patches`
and `warps`, where some x + e are x under one patch or warp for all images, `weight_adv`, the weight of CE(h(x+e), y) in
the outer loss, and `distill`, the share of q(x) in the labels of its first term.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.config import param
from sau.data.batches import first_batch
from sau.defense.base import ENOUGH, AdversarialTraining, Defense, is_published
from sau.defense.checks import has_batch_norm
from sau.evaluate import AT_ONCE_ON_CPU
from sau.graphs import fixed_norms, frozen_forward
from sau.models.normalized import copied
from sau.pgd import PATCHES_HELP, WARPS_HELP, SharedPatches, SharedWarps
from sau.types import Batched, Change, Flags, Labels, Logits, PerImage, Pixels, Scalar

Network = Callable[[Tensor], Tensor]
BATCH_MULTIPLE = 32


def jensen_shannon(z: Logits, z_ref: Logits) -> PerImage:
    """JS divergence, in nats, of the softmax of two logits; probabilities are clamped at 1e-8 from below."""
    p, q = z.softmax(1).clamp_min(1e-8), z_ref.softmax(1).clamp_min(1e-8)
    m = (p + q) / 2
    return 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(1)


def unsharing_loss(z: Logits, s: Labels, mask: Flags, clamped: bool = True) -> Scalar:
    """Mean over the batch of mask * -log(1 - p_s).

    As released (`clamped`) there is no gradient where p_s is below 0.001, less and less where 1 - p_s is below 1e-6.
    1 - p_s has its two equal forms there, the sum of the other classes and the complement, which differ in rounding.
    """
    if not clamped:
        return mask.to(z.dtype) @ (z.logsumexp(1) - z.scatter(1, s[:, None], -torch.inf).logsumexp(1)) / len(z)
    p = z.softmax(1)
    p_s = p.gather(1, s[:, None])[:, 0]
    others = p.scatter(1, s[:, None], 0.0).sum(1)
    twice = (1e-6 + others.clamp_max(0.999)).log() + (1 + 1e-6 - p_s.clamp_min(0.001)).log()
    return -0.5 * (mask * twice).sum() / len(z)


def example_types(answer: Labels, answer_ref: Labels, y: Labels) -> Labels:
    """The types of examples x + e by the answers of h and h_b on them: 0 h is right; 1 (I, shared) both give the same
    wrong class; 2 (II) h_b is right; 3 (III) both are wrong, but differently."""
    return torch.where(answer == answer_ref, 1, torch.where(answer_ref == y, 2, 3)) * (answer != y)


def unsettled(settled: Flags) -> Tensor:
    """Places [M] of the images that are not settled, and of some that are, so that M is a multiple of 32, or all:
    every new batch size costs the convolutions a set-up."""
    size = -(-int((~settled).sum()) // BATCH_MULTIPLE) * BATCH_MULTIPLE
    return settled.to(torch.uint8).argsort(stable=True)[:size]


class SAU(AdversarialTraining):
    """Unlearn the adversarial examples that fool the backdoored and the purified network alike."""

    name = "sau"
    graph_safe = True
    unread = ("lr_scheduler", "amp")
    later = ("patches", "clamp_loss", "distill", "warps")

    outer_steps: int = param(1, "weight updates a batch, all from the same perturbations", ge=1)
    weight_clean: float = param(1.0, "l1, lambda_1 of the paper: the clean loss", ge=0, aliases=("lmd_1",))
    distill: float = param(0.0, "share of h_b's probabilities in the labels of the clean loss", ge=0, le=1)
    weight_adv: float = param(0.0, "adversarial training on x + e; not in the paper", ge=0, aliases=("lmd_2",))
    weight_shared: float = param(1.0, "l2, lambda_2 of the paper: the shared risk", ge=0, aliases=("lmd_3",))
    inner_adv: float = param(0.01, "l3, lambda_3 of the paper: both networks err", ge=0, aliases=("beta_1",))
    inner_shared: float = param(1.0, "l4, lambda_4 of the paper: they err alike", ge=0, aliases=("beta_2",))
    patches: float = param(0.0, PATCHES_HELP, ge=0, lt=1)
    warps: float = param(0.0, WARPS_HELP, ge=0, lt=1)
    train_mode: bool = param(False, "use batch statistics, and update the running ones, in the outer step")
    success: Literal["prediction", "label"] = param(
        "prediction", "fooled: the answer differs from the clean one (prediction, as released) or the label (paper)"
    )
    stop_fooled: bool = param(True, "drop a network's term once it is fooled, an image once it is shared (as released)")
    outer_mask: Literal["moved", "wrong"] = param(
        "moved", "moved (as released): s must also differ from h_b's answer to the clean image; wrong: it need not"
    )
    clamp_loss: bool = param(
        True, "as released: the shared loss has no gradient where p_s is below 0.001 or 1 - p_s far below 1e-6"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("warps", self.patches + self.warps < 1, "below 1 together with patches")

    def adapted(self, model: nn.Module, images: int, per_epoch: int | None = None) -> Defense:
        """For PreAct-ResNet18 also a quarter of that rate, l2 2, the exact loss, whose gradient does not fade, and a
        patch on half of the images. On other networks most images get a patch, and twice as many updates half the rate;
        with batch norm x + e also teaches its label. There, few images would not teach again what h_b knows, so most of
        their labels are its own; as WaNet would stay then, a fifth of them is warped."""
        found: SAU = super().adapted(model, images, per_epoch)
        if found is self:
            return self
        if is_published(model):
            return replace(found, lr=found.lr / 4, weight_shared=2.0, clamp_loss=False, patches=0.5)
        longer = replace(found, patches=0.8, epochs=2 * found.epochs, lr=found.lr / 2)
        if not has_batch_norm(model):
            return longer
        few: dict[str, Any] = {"patches": 0.65, "warps": 0.2, "distill": 0.8} if images < ENOUGH else {}
        return replace(longer, weight_adv=0.3, **few)

    def prepare(self, model: nn.Module, batches: Batched) -> dict[str, Any]:
        reference = copied(model).eval().requires_grad_(False)
        descent = self.descent(model.parameters(), len(batches) * self.outer_steps)
        state = {"model": model.eval(), "_reference": reference, "descent": descent, **frozen_forward(model)}
        return {**state, **self.start_shared(reference, batches)}

    def start_shared(self, reference: nn.Module, batches: Batched) -> dict[str, Any]:
        """The patches, the warps and what moves them, where some images get one."""
        state: dict[str, Any] = {}
        if self.patches:
            patches = SharedPatches(reference, *first_batch(batches))
            state |= {"patches": patches, "patch_descent": patches.descent()}
        if self.warps:
            warps = SharedWarps(reference, *first_batch(batches))
            state |= {"warps": warps, "warp_descent": warps.descent()}
        return state

    def supports_microbatch(self) -> bool:
        return self.outer_steps == 1

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        """The search of the inner problem, and the updates of the outer one."""
        model, reference = state["model"].eval(), state["_reference"]  # one that ran out of memory may be in train mode
        with fixed_norms(model, x):
            with torch.set_grad_enabled(not self.train_mode):
                z = model(x)  # its graph serves the outer loss, so the clean pass is made once
            with torch.no_grad():
                clean_ref = (z_ref := reference(x)).argmax(1)
            delta, s = self.search(state, x, y, z.argmax(1), clean_ref)
            mask = s != y if self.outer_mask == "wrong" else (s != y) & (s != clean_ref)
            report: dict[str, Tensor] = {}
            for _ in range(self.outer_steps):
                if self.train_mode:  # statistics over clean and perturbed images together, as released
                    z, z_adv = model.train()(torch.cat([x, x + delta])).chunk(2)
                    model.eval()
                else:
                    z, z_adv = model(x) if report else z, model(x + delta)
                clean, shared = F.cross_entropy(z, y), unsharing_loss(z_adv, s, mask, self.clamp_loss)
                if self.distill:
                    clean = (1 - self.distill) * clean + self.distill * F.cross_entropy(z, z_ref.softmax(1))
                loss = self.weight_clean * clean + self.weight_shared * shared
                losses = {"clean_loss": clean, "shared_loss": shared}
                if self.weight_adv:
                    losses["adv_loss"] = F.cross_entropy(z_adv, y)
                    loss = loss + self.weight_adv * losses["adv_loss"]
                state["descent"](loss)
                types = example_types(z_adv.argmax(1), s, y)
                counts = {f"train_type{kind}": (types == kind).sum() for kind in (1, 2, 3)}
                report = report or {"loss": loss, **losses, **counts}
        return report

    def search(
        self, state: dict[str, Any], x: Pixels, y: Labels, clean: Labels, clean_ref: Labels
    ) -> tuple[Change, Labels]:
        """e and s of `shared_pgd`; the first images, as many as `patches` and `warps` say, have e from these."""
        model, reference = state.get("frozen", state["model"]), state["_reference"]
        patched, warped = (int(share * len(x)) for share in (self.patches, self.warps))
        n = patched + warped
        delta, s = self.shared_pgd(model, reference, x[n:], y[n:], clean[n:], clean_ref[n:])
        if not n:
            return delta, s
        moving = (("patches", "patch_descent", x[:patched]), ("warps", "warp_descent", x[patched:n]))
        shared = [state[kind].ascend((model, reference), state[how], part) for kind, how, part in moving if len(part)]
        with torch.no_grad():
            answers = reference(changed := torch.cat(shared)).argmax(1)
        return torch.cat([changed - x[:n], delta]), torch.cat([answers, s])

    def shared_pgd(
        self, model: Network, reference: Network, x: Pixels, y: Labels, clean: Labels, clean_ref: Labels
    ) -> tuple[Change, Labels]:
        """The inner problem, by sign steps: the perturbations e, and s, the answers of h_b on x + e.

        `clean` and `clean_ref` are the answers of h and h_b on x. With `stop_fooled` a network's cross-entropy counts
        until it is fooled, JS until the image is shared; then it has no gradient and stays where it is. So on the CPU,
        which searches a batch in chunks, shared images leave theirs (`unsettled`). Elsewhere counting them would make
        the device wait, and compiled networks know few sizes.
        """
        n, may_shrink = len(x), x.device.type == "cpu" and not getattr(reference, "compiled", False)
        base, base_ref = (clean, clean_ref) if self.success == "prediction" else (y, y)
        ball = self.ball
        delta, s = ball.start(x, self.pgd_init), clean_ref.clone()
        for active in torch.arange(n, device=x.device).split(AT_ONCE_ON_CPU if may_shrink else n):
            for _ in range(self.adv_steps):
                d = delta[active].requires_grad_()
                z, z_ref = model(x[active] + d), reference(x[active] + d)
                answer, answer_ref = z.argmax(1), z_ref.argmax(1)
                fooled, fooled_ref = answer != base[active], answer_ref != base_ref[active]
                shared = fooled & fooled_ref & (answer == answer_ref)
                # Minus the inner objective: l4 * JS - l3 * 1/2 [CE + CE_b].
                ce, ce_ref = (F.cross_entropy(logits, y[active], reduction="none") for logits in (z, z_ref))
                js = jensen_shannon(z, z_ref)
                if self.stop_fooled:
                    ce, ce_ref, js = ~fooled * ce, ~fooled_ref * ce_ref, ~shared * js
                loss = self.inner_shared * js.sum() - self.inner_adv * (ce.sum() + ce_ref.sum()) / 2
                (gradient,) = torch.autograd.grad(loss / n, d)  # with respect to d alone: no weight gradients
                delta[active] = ball.into(x[active], d.detach() - self.adv_lr * gradient.sign())
                if may_shrink and self.stop_fooled:
                    s[active] = answer_ref  # final for those that leave; found anew below for the others
                    active = active[unsettled(shared)]
                    if not len(active):
                        break
            if len(active):
                with torch.no_grad():
                    s[active] = reference(x[active] + delta[active]).argmax(1)
        return delta, s
