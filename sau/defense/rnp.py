"""RNP, Reconstructive Neuron Pruning (Li, Lyu, Ma, Koren, Lyu, Li, Jiang, ICML 2023).

Three stages, on clean pairs (x, y) alone, from the backdoored network h:

    unlearn   max_w  CE(h_w(x), y)            until the accuracy of an epoch is at most clean_threshold: h' forgets the
                                              clean task and is left with the backdoor
    recover   min_m  alpha * CE(h'_m(x), y)   m in [0, 1]: h'_m is h' with every scale of its batch norms times its m
    prune     scale of h = 0 where m <= pruning_number

The channels whose masks fall are those that keep h' from the clean task: they serve the backdoor.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.config import param
from sau.data.batches import count_batches
from sau.defense.base import Defense
from sau.defense.pruning import ByNorm, Clean, MaskPruning, batch_norms, learn_masks, masked_logits
from sau.evaluate import batch_accuracy
from sau.loop import RunContext
from sau.models.normalized import copied
from sau.optim import DESCENT, Training
from sau.types import Batched, Labels, Pixels


class RNP(MaskPruning):
    """Unlearn the clean task and prune the channels that hinder its recovery."""

    name = "rnp"
    ignored = {
        **dict.fromkeys(DESCENT, "each stage has settings of its own, like --unlearning_lr and --recovering_lr"),
        "pruning_by": "masks are pruned up to a threshold, --pruning_number",
        "mask_file": "the masks are not kept",
    }

    unlearning_epochs: int = param(20, "most epochs of gradient ascent", ge=0)
    unlearning_lr: float = param(0.01, "learning rate of the ascent", gt=0)
    schedule: tuple[int, ...] = param((10, 20), "epochs at which that rate drops to a tenth, like 10,20")
    clean_threshold: float = param(0.20, "training accuracy of an epoch that ends the ascent", ge=0, le=1)
    recovering_epochs: int = param(20, "epochs that the masks are trained", ge=0)
    recovering_lr: float = param(0.2, "learning rate of the masks", gt=0)
    alpha: float = param(0.2, "weight of the loss that trains the masks", gt=0)
    pruning_number: float | None = param(0.70, "masks up to this are pruned; none means to search", ge=0, lt=1)
    pruning_max: float = param(0.90, "highest threshold of the search", gt=0, le=1)

    def adapted(self, model: nn.Module, images: int, per_epoch: int | None = None) -> Defense:
        """Batches of at least 32, two an epoch up to the paper's 500 images. More images make more, at a tenth of the
        paper's rate, by which one epoch of ascent would destroy the network. A recipe's rate is replaced as well."""
        size = self.batch_of(images, 500)
        more = (per_epoch or count_batches(images, size)) > 2
        return replace(self, batch_size=size, unlearning_lr=0.001 if more else 0.01)

    def learn(self, model: nn.Module, clean: Clean, batches: Batched, session: RunContext) -> ByNorm:
        unlearned = copied(model).train()
        self.unlearn(unlearned, batches, session)
        norms = batch_norms(unlearned.requires_grad_(False), self.name)
        sgd = Training(epochs=self.recovering_epochs, lr=self.recovering_lr, lr_scheduler="constant", wd=0.0)

        def losses(mask: Tensor, x: Pixels, y: Labels) -> dict[str, Tensor]:
            logits = masked_logits(unlearned, norms, x, mask)
            return {"loss": self.alpha * F.cross_entropy(logits, y), "clean_acc": batch_accuracy(logits, y)}

        later = session.for_stage(1)
        return learn_masks(norms, losses, batches, sgd, later, "recovering", "recovering_lr", unlearned=unlearned)

    def unlearn(self, unlearned: nn.Module, batches: Batched, session: RunContext) -> None:
        """Gradient ascent in place, until an epoch's accuracy is at most the threshold."""
        training = Training(lr=self.unlearning_lr, lr_scheduler="MultiStepLR", steplr_milestones=self.schedule)
        descent = training.descent(unlearned.parameters(), len(batches))

        def step(x: Pixels, y: Labels) -> dict[str, Tensor]:
            logits = unlearned(x)
            loss = F.cross_entropy(logits, y)
            descent(-loss, clip=20.0)
            return {"loss": loss, "clean_acc": batch_accuracy(logits, y)}

        def end_epoch(losses: dict[str, float]) -> bool:
            descent.end_epoch(losses["loss"])
            return losses["clean_acc"] <= 100 * self.clean_threshold

        loop.run(
            step, batches, self.unlearning_epochs, end_epoch=end_epoch, session=session,
            state={"unlearned": unlearned, "descent": descent},  # not "model", whose scores would be logged
            label="unlearning", rate="unlearning_lr",
        )  # fmt: skip
