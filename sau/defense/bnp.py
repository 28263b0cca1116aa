"""BNP, pruning by batch-norm statistics (Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons",
NeurIPS 2022).

The running statistics of a batch norm were collected on poisoned images. Where clean images give a channel another
distribution, the rest came from the trigger. Both taken as Gaussians, channel c scores

    KL(clean || running) = 1/2 ln(var_run / var) + (var + (mean - mean_run)^2) / (2 var_run) - 1/2

with mean and var of the batch norm's input over clean images and positions. Channels whose score stands out in their
layer are pruned.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from sau.config import param
from sau.defense import pruning
from sau.models.normalized import forward_hooks
from sau.types import Batched


class BNP(pruning.ChannelOutlierPruning):
    """Prune the channels whose clean statistics differ most from the running ones."""

    name = "bnp"

    batch_size: int = param(256, "images a forward pass; the statistics are those of all clean images")
    augment: bool = param(True, "crop and flip the clean images as in training, where the running statistics come from")

    def scores(self, model: nn.Module, batches: Batched) -> pruning.ByNorm:
        norms = pruning.batch_norms(model, self.name, running=True)
        moments: dict[str, Tensor] = {}  # [3, C]: how many values, their sum, the sum of their squares

        def add(name: str, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            values = inputs[0].double().transpose(0, 1).flatten(1)  # [C, B * H * W]
            batch = torch.stack([torch.ones_like(values).sum(1), values.sum(1), values.square().sum(1)])
            moments[name] = moments.get(name, 0) + batch

        with forward_hooks((norm, partial(add, name)) for name, norm in norms.items()):
            for x, *_ in batches:
                model(x)
        scores = {}
        for name, (count, total, squares) in moments.items():
            norm, mean = norms[name], total / count
            var = (squares / count - mean.square()).clamp_min(0) + norm.eps  # eps as in the batch norm: never 0
            running_mean, running_var = (norm.get_buffer(f"running_{kind}").double() for kind in ("mean", "var"))
            running = Normal(running_mean, (running_var + norm.eps).sqrt(), validate_args=False)
            scores[name] = kl_divergence(Normal(mean, var.sqrt(), validate_args=False), running)
        return scores
