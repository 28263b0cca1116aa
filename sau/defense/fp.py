"""FP, Fine-Pruning (Liu, Dolan-Gavitt, Garg, RAID 2018): prune the units that clean images activate least, then tune.

Unit j has the mean activation a_j = mean over clean x of f_j(x), signed, the network being in eval mode. With the units
in rising order of a, and ACC_n the accuracy without the first n of them, FP prunes the largest n = k, 2k, 3k, ...
before the first one with (ACC_0 - ACC_n) / ACC_0 > acc_ratio, where k = ceil(once_prune_ratio * number of units). Then
it minimises CE(h(x), y) over the weights that are left: those of a pruned unit are zero after every update.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from sau.config import param
from sau.data.batches import stack_batches
from sau.defense import pruning
from sau.defense.base import Select, TrainingDefense
from sau.errors import ConfigError
from sau.evaluate import predict
from sau.loop import RunContext
from sau.models.normalized import classifier, forward_hooks, require_plain_weight
from sau.types import Batched, Pixels

Unit = Literal["linear_input", "last_conv"]


class FP(TrainingDefense):
    """Prune the units that are least active on clean images, then fine-tune the others."""

    name = "fp"
    compiles = True
    graph_safe = False  # Python prunes after every update
    ignored = dict.fromkeys(
        ("num_classes", "input_height", "input_width", "input_channel", "attack", "poison_rate", "target_type")
        + ("target_label", "trigger_type"),
        "the record knows classes, images and attack",
    )

    augment: bool = True
    unit: Unit = param("linear_input", "inputs of the last linear layer, or channels of the last convolution")
    acc_ratio: float = param(0.1, "share of the accuracy that pruning may cost", ge=0, le=1)
    once_prune_ratio: float = param(0.01, "share of the units that a step of pruning takes", gt=0, le=1)
    held_back: float = param(0.2, "share of each class's clean images that the accuracy is measured on", gt=0, lt=1)
    select: Select = param("defender", "whose accuracy: of the held-back images, or (oracle) of the test set")

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        clean = stack_batches(batches)
        layers = unit_layers(model, clean[0][:1], self.unit)
        (name,) = (name for name, layer in model.named_modules() if layer is layers[0])
        units = layers[0].get_parameter("weight").shape[1 if self.unit == "linear_input" else 0]
        pruned = nn.Parameter(torch.zeros(units, dtype=torch.bool, device=clean[0].device), requires_grad=False)
        if session.last_checkpoint is None:  # otherwise `pruned` is in the checkpoint
            held = None
            if self.select == "defender":  # the oracle measures on the test set, so that all clean images may rank
                clean, held = pruning.hold_out(*clean, self.held_back)
            rank = activations(model, layers[-1], clean[0]).argsort(stable=True).argsort()
            step = max(1, math.ceil(units * self.once_prune_ratio - 1e-9))
            counts = range(step, units, step)
            levels = [pruning.PruningLevel(f"{n} of {units}, {self.unit}", {name: rank < n}) for n in counts]
            if chosen := pruning.choose(model, levels, held, self.acc_ratio, session, by_asr=False):
                pruned.copy_(chosen.pruned[name])
        level = pruning.PruningLevel(self.unit, {name: pruned})
        state = {**self.prepare(model, batches), "pruned": nn.ParameterList([pruned])}
        # Every update moves the pruned weights, too.
        state["descent"].optimizer.register_step_post_hook(lambda *_: level.prune(model))
        self.train(state, batches, session)


def unit_layers(model: nn.Module, x: Pixels, unit: Unit) -> list[nn.Module]:
    """The layer whose weights a unit has, and those that its output then passes, in the order in which they run on `x`.

    The linear layer that makes the logits; or the convolution that runs last, or the batch norm that takes its output,
    and a ReLU. ConfigError if there is no such layer.
    """
    if unit == "linear_input":
        return [classifier(model, x, "fp", "--unit last_conv")]
    found: list[nn.Module] = []
    for layer, feeder in pruning.trace(model, x, nn.Conv2d, *pruning.NORMS, nn.ReLU):
        follows = bool(found) and feeder is found[-1]
        if isinstance(layer, nn.Conv2d) or (follows and isinstance(layer, pruning.NORMS)):
            found = [layer]
        elif follows:
            found.append(layer)
    if not found:
        raise ConfigError("the network has no Conv2d, which unit last_conv of fp prunes; try --unit linear_input")
    if found[0].weight is None:
        what = "its last convolution is followed by a batch norm without weights, which would undo the pruning"
        raise ConfigError(f"{what}; try --unit linear_input")
    return [require_plain_weight(layer, "fp") for layer in found]


def activations(model: nn.Module, layer: nn.Module, x: Pixels) -> Tensor:
    """Mean activation [units] over images and positions: of the inputs of a linear layer, else of the outputs."""
    sums: list[Tensor] = []

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        f = inputs[0].movedim(-1, 1) if isinstance(module, nn.Linear) else output
        sums.append(f.float()[..., None].flatten(2).mean(2).sum(0))

    with forward_hooks([(layer, add)]):
        predict(model, x)
    return torch.stack(sums).sum(0) / len(x)
