"""D3, Distance-Driven Detoxification (Wei, Liu, Zha, ICCV 2025): as far from the backdoored weights as the clean loss
allows.

Near the backdoored weights W0 the loss of the backdoor grows with the square of the distance, that of clean images
hardly. So the distance of a few weights is what is trained for, and the clean loss is a budget of eps an image:

    min_W  lambda * mean_i max(0, CE_i - eps)  -  sum_{W in S} |W - W0|_2      subject to |W| = |W0| for W in S,

where all weights of the network are trained, but only those in S (the classifier's) are measured and kept on their
sphere; without it, longer weights would be distance for nothing. With a the angle between W and W0, the pull of the
distance along the sphere is cos(a / 2): 0.71 at right angles, where W starts, and 0 at -W0, where nothing is left to
gain. For lambda above 1 the sum is divided by lambda + 1, so that the size of a step depends on it less.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.config import param
from sau.data.batches import first_batch
from sau.defense.base import TrainingDefense
from sau.defense.fst import FixedNormWeight, uniform
from sau.errors import ConfigError
from sau.evaluate import batch_accuracy
from sau.models.normalized import classifier, require_plain_weight, resolve_layer
from sau.types import Batched, Labels, Logits, Pixels, Scalar

Start = Literal["random", "near", "middle", "far", "noise"]


def hinge(z: Logits, y: Labels, eps: float) -> Scalar:
    """Mean of max(0, CE_i - eps): an image whose loss is below eps has no gradient."""
    return (F.cross_entropy(z, y, reduction="none") - eps).clamp_min(0).mean()


class D3(TrainingDefense):
    """Drive the classifier away from the backdoored one while the clean loss stays within its budget."""

    name = "d3"
    watched = "excess"
    graph_safe = True
    compiles = True

    wd: float = 0.0
    augment: bool = True
    penalty: float = param(0.5, "lambda; 0.5 as released, 10 in the paper", gt=0, aliases=("lmd", "lambda"))
    eps: float = param(0.1, "clean loss of an image that costs nothing, in nats", ge=0)
    start: Start = param("random", "first W: random on the sphere, near (W0), middle (0), far (-W0), W0 + noise")
    layers: tuple[str, ...] = param((), "layers whose weights make S; empty: the linear layer that makes the logits")

    @torch.no_grad()
    def prepare(self, model: nn.Module, batches: Batched) -> dict[str, Any]:
        """Put every W where it starts."""
        spheres = [FixedNormWeight(weight) for weight in self.driven(model, first_batch(batches)[0][:1])]
        for sphere in spheres:
            if self.start == "random":
                sphere.weight.copy_(uniform(sphere.origin, 0.5))
                sphere.project()
            elif self.start == "noise":
                sphere.weight.add_(sphere.origin.std() * torch.randn(sphere.origin.shape).to(sphere.origin))
            else:
                sphere.weight.mul_({"near": 1, "middle": 0, "far": -1}[self.start])
        return {**super().prepare(model, batches), "spheres": spheres}

    def driven(self, model: nn.Module, x: Pixels) -> list[Tensor]:
        """The weights in S; `x` is an image to see by which layers run."""
        if not self.layers:
            return [classifier(model, x, self.name).weight]
        advice = "name one of its layers with --layers, or none for the one that makes the logits"
        places = [model.get_submodule(resolve_layer(model, name, advice)) for name in self.layers]
        found = [m for place in places for m in place.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        if not found:
            raise ConfigError(f"layers is {','.join(self.layers)}, but no convolution or linear layer is inside")
        weights = [require_plain_weight(layer, self.name).weight for layer in found]
        return list({id(weight): weight for weight in weights}.values())

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        spheres = state["spheres"]
        logits = state["model"](x)
        excess = hinge(logits, y, self.eps)
        distance = torch.stack([sphere.distance() for sphere in spheres]).sum()
        loss = self.penalty * excess - distance
        state["descent"](loss / (self.penalty + 1) if self.penalty > 1 else loss)
        for sphere in spheres:
            sphere.project()
        return {"loss": loss, "excess": excess, "distance": distance, "clean_acc": batch_accuracy(logits, y)}
