"""FT: plain fine-tuning on the clean images, the first control of every comparison."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from sau.defense.base import TrainingDefense
from sau.evaluate import batch_accuracy
from sau.types import Labels, Pixels


@dataclass(frozen=True, kw_only=True)
class FT(TrainingDefense):
    """Minimise CE(h(x), y) over all weights, batch norm in train mode."""

    name: ClassVar[str] = "ft"
    graph_safe: ClassVar[bool] = True
    compiles: ClassVar[bool] = True

    augment: bool = True

    def supports_microbatch(self) -> bool:
        return True

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        logits = state["model"](x)
        loss = F.cross_entropy(logits, y)
        state["descent"](loss)
        return {"loss": loss, "clean_acc": batch_accuracy(logits, y)}
