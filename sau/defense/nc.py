"""NC, Neural Cleanse (Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", S&P 2019), as the benchmark runs it.

For every class c the smallest patch that sends clean images to c is inverted,

    min_{m, p}  CE(h((1 - m) x + m p), c)  +  cost_c * |m|_1,      m = tanh(u)/2 + 1/2 [H, W],  p likewise [C, H, W]

The cost of a class rises while its patch works and falls while it does not. A backdoor is a short way to its class, so
its patch is small. With n_c = |m_c|_1, class c is flagged if

    n_c <= med   and   (med - n_c) / MAD > 2,      med = median(n),  MAD = 1.4826 * median|n - med|

Then the network is fine-tuned on clean images, of which some carry the patches of the flagged classes and keep their
true labels. Without a flagged class it stays as it is.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sau import loop
from sau.config import param
from sau.data.batches import rebatch, stack_batches, unaugmented
from sau.defense.base import TrainingDefense
from sau.errors import ConfigError
from sau.loop import RunContext
from sau.optim import adam
from sau.pgd import stamped_losses, under_patch
from sau.types import Batched, Labels, Pixels

SWITCHED_ON = 1e-3  # what a cost that begins at 0 becomes
GROUP = 10  # classes in one forward pass; more need more memory


def unit(logits: Tensor) -> Tensor:
    """From any number to (0, 1), as masks and patterns are made; the benchmark's 1e-7 keeps it off the ends."""
    return logits.tanh() / (2 + 1e-7) + 0.5


def anomaly(norms: Tensor) -> Tensor:
    """(med - n) / MAD of every class; of an even number the median is the mean of the two in the middle."""
    below = norms.quantile(0.5) - norms
    return torch.where(below == 0, 0.0, below / (1.4826 * below.abs().quantile(0.5)))


class Patches(nn.Module):
    """A patch being inverted for each class, for images `like` [1, C, H, W]; `cost` weighs the norm at first."""

    def __init__(self, classes: int, like: Pixels, cost: float) -> None:
        super().__init__()
        zeros, (_, channels, *sides) = torch.zeros(classes, device=like.device), like.shape
        self.mask = nn.Parameter(like.new_ones(classes, 1, *sides))
        self.pattern = nn.Parameter(like.new_ones(classes, channels, *sides))
        # The smallest that worked in (0, 1), else those of the first pass, and the norm at which it worked.
        self.best_mask: Tensor = nn.Buffer(unit(self.mask.detach()))
        self.best_pattern: Tensor = nn.Buffer(unit(self.pattern.detach()))
        self.best: Tensor = nn.Buffer(zeros + math.inf)
        self.cost: Tensor = nn.Buffer(zeros + cost)
        self.open: Tensor = nn.Buffer(zeros == 0)  # whether the inversion goes on
        self.passes: Tensor = nn.Buffer(torch.zeros((), dtype=torch.int64))
        for name in ("hits", "norms", "above", "below", "still", "raised", "lowered"):
            self.register_buffer(name, zeros.clone())

    @property
    def sizes(self) -> Tensor:
        """|m|_1 of the best patch of each class [K]."""
        return self.best_mask.flatten(1).sum(1)


class NC(TrainingDefense):
    """Search the smallest patch of every class, flag classes with a much smaller one, unlearn it by fine-tuning."""

    name = "nc"
    retired = {"restarts": 1, "group": 10}
    lengths = ("epochs", "nc_epoch")
    gradients = "images"
    ignored = {
        "cleaning_ratio": "--ratio says how many clean images there are",
        "EPSILON": "it is 1e-7, as in the benchmark",
        "use_norm": "the norm of a mask is its sum",
        "to_file": "what is found stands in summary.json",
        "n_times_test": "a test set is evaluated once",
    }

    epochs: int = param(100, "passes of the fine-tuning")
    augment: bool = param(True, "crop and flip the images of the fine-tuning, stamped ones included")
    augment_inversion: bool = param(False, "crop and flip during the inversion too, as the benchmark does")
    index_threshold: float = param(2.0, "anomaly index above which a class is flagged", ge=0)
    unlearning_ratio: float = param(0.2, "share of the clean images that are stamped for the fine-tuning", gt=0, le=1)
    nc_epoch: int = param(80, "passes over the clean images to invert the patches, at most", ge=1)
    mask_lr: float = param(0.1, "learning rate of masks and patterns (Adam with betas 0.5 and 0.9)", gt=0)
    init_cost: float = param(1e-3, "weight of the mask's norm at the start; 0, as in the paper, is raised later", ge=0)
    atk_succ_threshold: float = param(98.0, "percent of images that a patch must send to its class", ge=0, le=100)
    patience: int = param(5, "passes in a row above or below that share after which the cost rises or falls", ge=1)
    cost_multiplier: float = param(2.0, "factor by which the cost rises; it falls by this to the power of 1.5", gt=1)
    early_stop: bool = param(True, "stop the inversion of a class when its patch no longer shrinks")
    early_stop_threshold: float = param(0.99, "share of the last best norm below which a patch shrinks", ge=0, le=1)
    early_stop_patience: int = param(25, "passes in a row without shrinking after which it stops", ge=1)
    inversion_share: float = param(1.0, "share of each batch that the inversion looks at", gt=0, le=1)

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        x, y = stack_batches(batches)
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        if classes < 3:  # two norms lie equally far from their median, so neither stands out
            raise ConfigError(f"nc compares a class with the others: the network has {classes} classes, needed are 3")
        patches = Patches(classes, x[:1], self.init_cost)
        if not session.restore_later_stage(patches=patches):  # else the fine-tuning was under way
            self.invert(model, batches if self.augment_inversion else unaugmented(batches), patches, session)
            if session.limit is not None and session.limit.ended:
                session.say("no class is flagged, because the search was not finished")
                return
        norms = patches.sizes
        flagged, index = self.flagged(norms), [round(value, 4) for value in anomaly(norms).tolist()]
        finite = [value if math.isfinite(value) else None for value in index]  # else the MAD was 0
        rounded = [round(norm, 4) for norm in norms.tolist()]
        session.findings.update(flagged=flagged, anomaly_index=finite, mask_norm=rounded)
        text = f"largest anomaly index {max(index):.3g}, median mask norm {float(norms.quantile(0.5)):.4g}"
        session.say(f"flagged classes: {', '.join(map(str, flagged)) or 'none, so the network stays as it is'}; {text}")
        if flagged:
            stamped = rebatch(*self.stamped(x, y, patches), batches)
            self.train({**self.prepare(model, stamped), "patches": patches}, stamped, session.for_stage(1))

    def stamped(self, x: Pixels, y: Labels, patches: Patches) -> tuple[Tensor, Tensor]:
        """The clean images, their last part stamped once for each flagged class, all under their true labels."""
        masks, patterns, flagged = patches.best_mask, patches.best_pattern, self.flagged(patches.sizes)
        first = len(y) - max(1, round(self.unlearning_ratio * len(y)))
        stamped = [under_patch(x[first:], masks[c], patterns[c]) for c in flagged]
        return torch.cat([x[:first], *stamped]), torch.cat([y[:first]] + [y[first:]] * len(flagged))

    def flagged(self, norms: Tensor) -> list[int]:
        """The classes whose mask is an outlier on the small side."""
        return (anomaly(norms) > self.index_threshold).nonzero().flatten().tolist()

    def invert(self, model: nn.Module, batches: Batched, patches: Patches, session: RunContext) -> None:
        """Move `patches` in place over `batches`. `model` is left in eval mode; all of its weights take gradients."""
        model.eval().requires_grad_(False)
        descent = adam(self.mask_lr, adam_betas=(0.5, 0.9)).descent(patches.parameters(), len(batches))
        state = {"patches": patches, "descent": descent}
        loop.run(
            partial(self.invert_step, model, state), batches, self.nc_epoch, state=state,
            end_epoch=partial(self.end_pass, patches, len(batches)), session=session, label="inversion", rate="mask_lr",
        )  # fmt: skip
        model.requires_grad_(True)

    def invert_step(self, model: nn.Module, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        """One update of the patches whose inversion goes on."""
        patches, descent, x = state["patches"], state["descent"], x[: math.ceil(self.inversion_share * len(x))]
        parts = patches.open.nonzero().flatten().split(GROUP)
        entropies, hits = list[Tensor](), list[Tensor]()
        for i, part in enumerate(parts):
            mask, pattern = unit(patches.mask[part]), unit(patches.pattern[part])
            losses, led = stamped_losses([model], x, part, mask, pattern)
            entropies.append(losses.mean(1))
            hits.append(led.float().mean(1))
            norm = mask.flatten(1).sum(1)
            patches.norms[part] += norm.detach()
            patches.hits[part] += hits[-1]
            descent.first, descent.last = i == 0, i == len(parts) - 1
            descent((entropies[-1] + patches.cost[part] * norm).sum())  # zero for rows that have stopped
        loss, success = torch.cat(entropies).detach().mean(), 100 * torch.cat(hits).mean()
        return {"loss": loss, "success": success, "open": patches.open.float().sum()}

    @torch.no_grad()
    def end_pass(self, s: Any, steps: int, losses: dict[str, float]) -> bool:
        """Keep better patches, stop those that no longer shrink, move the costs; True when all have stopped. `s` are
        the patches; success and norm are means over the `steps` updates of the pass."""
        works, norm = 100 * s.hits / steps >= self.atk_succ_threshold, s.norms / steps
        better = s.open & works & (norm < s.best)
        last, s.best = s.best, torch.where(better, norm, s.best)
        keep = better if int(s.passes) else s.open  # the first pass's patch stands in until one works
        s.best_mask[keep], s.best_pattern[keep] = unit(s.mask[keep]), unit(s.pattern[keep])
        s.still = torch.where(s.best.isfinite() & (s.best >= self.early_stop_threshold * last), s.still + 1, 0)
        if self.early_stop:
            s.open &= ~((s.raised > 0) & (s.lowered > 0) & (s.still >= self.early_stop_patience))
        s.above, s.below = torch.where(works, s.above + 1, 0), torch.where(works, 0, s.below + 1)
        up, down = s.above >= self.patience, s.below >= self.patience
        begins = up & (s.cost == 0)
        s.cost = s.cost * torch.where(up, self.cost_multiplier, torch.where(down, self.cost_multiplier**-1.5, 1.0))
        s.above[up], s.below[down] = 0, 0
        s.cost[begins], s.above[begins] = SWITCHED_ON, 1  # as published, that pass counts for the next rise
        s.raised, s.lowered = torch.where(begins, 0, s.raised + up), torch.where(begins, 0, s.lowered + down)
        s.hits.zero_(), s.norms.zero_(), s.passes.add_(1)
        return not bool(s.open.any())
