"""NC, Neural Cleanse (Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", S&P 2019), as the benchmark runs it.

For each class c a patch with the mask m_c is inverted (see `inversion`). A backdoor is a short way to its class, so its
patch is small. With n_c = |m_c|_1, class c is flagged if

    n_c <= med   and   (med - n_c) / MAD > 2,      med = median(n),  MAD = 1.4826 * median|n - med|

Then the network is fine-tuned on clean pictures, of which some carry the patches of the flagged classes and keep their
true labels. Without a flagged class it stays as it is.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sau.config import param
from sau.defense.ft import FT
from sau.defense.inputs import Kept, rebatched, unaugmented
from sau.defense.inversion import Inversion, Patches
from sau.errors import ConfigError
from sau.loop import Session
from sau.types import Batched, Labels, Pixels


def anomaly(norms: Tensor) -> Tensor:
    """(med - n) / MAD of every class, positive where the mask is smaller than the median's; 0 where it is the median's.

    The median of an even number is the mean of the two in the middle.
    """
    below = norms.quantile(0.5) - norms
    return torch.where(below == 0, 0.0, below / (1.4826 * below.abs().quantile(0.5)))


@dataclass(frozen=True, kw_only=True)
class NC(FT, Inversion):
    """Invert a patch for every class, flag the classes whose patch is too small, unlearn it by fine-tuning."""

    name: ClassVar[str] = "nc"
    adapting: ClassVar[tuple[str, ...]] = (*FT.adapting, "nc_epoch")
    lengths: ClassVar[tuple[str, ...]] = ("epochs", "nc_epoch")
    compiles: ClassVar[bool] = False  # each class that leaves the inversion would be a size to compile anew
    searches: ClassVar[bool] = True
    ignored: ClassVar[dict[str, str]] = {
        "cleaning_ratio": "--ratio says how many clean pictures there are",
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

    def run(self, model: nn.Module, batches: Batched, session: Session) -> None:
        plain, _ = unaugmented(batches)
        kept = Kept(plain)
        with torch.no_grad():
            classes = model(kept.x[:1]).shape[1]
        if classes < 3:  # two norms lie equally far from their median, so neither stands out
            raise ConfigError(f"nc compares a class with the others: the network has {classes} classes, needed are 3")
        patches = Patches(classes, self.restarts, kept.x[:1], self.init_cost)
        if not session.restore_later_stage(kept=kept, patches=patches):  # else the fine-tuning was under way
            self.invert(model, batches if self.augment_inversion else plain, patches, session, kept=kept)
            if session.limit is not None and session.limit.ended:
                session.say("no class is flagged, for the inversion was not finished")
                return
            self.report(patches, session)
        session.findings.update(self.findings(patches))
        if self.flagged(patches.found()[2]):
            stamped = rebatched(*self.stamped(kept, patches), self.batch_size, batches)
            state = {**self.prepare(model, len(stamped)), "patches": patches, "kept": kept}
            self.rounds(state, stamped, session.for_stage(1))

    def stamped(self, kept: Kept, patches: Patches) -> tuple[Pixels, Labels]:
        """The clean pictures, their last part stamped once for each flagged class, all under their true labels."""
        masks, patterns, norms = patches.found()
        x, y, flagged = kept.x, kept.y, self.flagged(norms)
        first = len(y) - max(1, round(self.unlearning_ratio * len(y)))
        stamped = [x[first:] + masks[c] * (patterns[c] - x[first:]) for c in flagged]
        return torch.cat([x[:first], *stamped]), torch.cat([y[:first]] + [y[first:]] * len(flagged))

    def flagged(self, norms: Tensor) -> list[int]:
        """The classes whose mask is an outlier on the small side."""
        return (anomaly(norms) > self.index_threshold).nonzero().flatten().tolist()

    def findings(self, patches: Patches) -> dict[str, Any]:
        """For `summary.json`: the flagged classes, and of each class the anomaly index (None where it is infinite, the
        MAD being 0) and the mask's norm in pixels."""
        norms = patches.found()[2]
        index = [round(value, 4) if math.isfinite(value) else None for value in anomaly(norms).tolist()]
        return {
            "flagged": self.flagged(norms),
            "anomaly_index": index,
            "mask_norm": [round(n, 4) for n in norms.tolist()],
        }

    def report(self, patches: Patches, session: Session) -> None:
        """Say what was found."""
        norms = patches.found()[2]
        index, flagged = anomaly(norms), self.flagged(norms)
        for c in flagged:
            session.say(f"class {c} is flagged: mask norm {float(norms[c]):.4g}, anomaly index {float(index[c]):.3g}")
        text = f"largest anomaly index {float(index.max()):.3g}, median mask norm {float(norms.quantile(0.5)):.4g}"
        session.say(text if flagged else f"no class is flagged and the network stays as it is: {text}")
