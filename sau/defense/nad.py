"""NAD, Neural Attention Distillation (Li, Lyu, Koren, Lyu, Li, Ma, ICLR 2021).

The attention map of features f [B, C, H, W] is A(f) = sum over c of |f_c|^p, and divided by its length it is
a(f) = A / (||A||_2 + 1e-6), both [B, H, W]. A teacher h_t is fine-tuned from the backdoored network; then the student
h, which starts from the backdoored network again, is trained by

    min_h  CE(h(x), y)  +  sum over l of beta_l * mean (a(f_l(x)) - a(f_t,l(x)))^2

where the mean goes over images and positions, and f_l, f_t,l are the features of layer l of student and teacher.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.config import param
from sau.data.batches import first_batch
from sau.defense.base import TrainingDefense
from sau.errors import ConfigError
from sau.loop import RunContext
from sau.models.normalized import at_least_fp32, copied, eval_mode, forward_hooks, resolve_layer
from sau.optim import Schedule
from sau.types import Batched, Labels, Pixels

POOLINGS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class NAD(TrainingDefense):
    """Fine-tune while the attention maps stay close to those of a teacher, itself fine-tuned."""

    name = "nad"
    unread = ("epochs",)
    lengths = ("epochs", "te_epochs")
    files = ("teacher_model_loc",)
    ignored = {"momentum": "the optimiser has --sgd_momentum, there too"}

    augment: bool = True
    epochs: int = param(10, "epochs of the student (the benchmark trains te_epochs instead)")
    lr_scheduler: Schedule | None = "constant"
    te_epochs: int = param(10, "epochs of the teacher", ge=0)
    beta1: float = param(500.0, "weight of the attention in the first layer", ge=0)
    beta2: float = param(1000.0, "the same for the second layer", ge=0)
    beta3: float = param(1000.0, "the same for the third one, where `layers` names three", ge=0)
    p: float = param(2.0, "power of the features in an attention map", gt=0)
    layers: tuple[str, ...] = param((), "up to three, like layer2,layer3; empty: the two deepest with feature maps")
    teacher_model_loc: str | None = param(None, "trained teacher: .safetensors file or folder of a finished run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("layers", len(set(self.layers)) == len(self.layers) <= 3, "up to three different names")

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        layers = attention_layers(model, first_batch(batches)[0][:1], self.layers)
        weights = dict(zip(layers, (self.beta1, self.beta2, self.beta3), strict=False))
        terms = (f"{name.removeprefix('net.')} (weight {beta:g})" for name, beta in weights.items())
        session.say(f"attention of {', '.join(terms)}")
        teacher = copied(model)
        if self.teacher_model_loc is not None:
            from sau.record.attack_result import load_weights  # and all that reads records, where it is needed alone

            load_weights(teacher, Path(self.teacher_model_loc))
        else:
            plan = replace(self, epochs=self.te_epochs)  # fine-tunes a copy of the network, which becomes the teacher
            state = plan.prepare(teacher, batches)
            step, end_epoch = partial(TrainingDefense.step, plan, state), partial(plan.end_epoch, state)
            kept = {"teacher": teacher, "descent": state["descent"]}  # without "model": nobody wants its scores
            loop.run(step, batches, plan.epochs, state=kept, end_epoch=end_epoch, session=session, label="teacher")
        state = {"teacher": teacher.eval().requires_grad_(False), "weights": weights}
        self.train({**self.prepare(model, batches), **state}, batches, session.for_stage(1))

    def supports_microbatch(self) -> bool:
        return True

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        weights = state["weights"]
        with torch.no_grad():
            _, theirs = features(state["teacher"], weights, x)
        logits, ours = features(state["model"], weights, x)
        clean, distilled = F.cross_entropy(logits, y), logits.new_zeros(())
        for name, beta in weights.items():
            maps = attention(ours[name], self.p), attention(theirs[name], self.p)
            distilled = distilled + beta * F.mse_loss(*maps)
        loss = clean + distilled
        state["descent"](loss)
        return {"loss": loss, "clean_loss": clean, "attention_loss": distilled}


def attention(f: Tensor, p: float) -> Tensor:
    """Normalised attention maps [B, H, W] of features [B, C, H, W]; a map of one position is the constant 1."""
    maps = at_least_fp32(f).abs().pow(p).sum(1)  # sums over channels need more than bf16
    return maps / (torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True) + 1e-6)


def features(model: nn.Module, layers: Iterable[str], x: Pixels) -> tuple[Tensor, dict[str, Tensor]]:
    """What the network answers with, and its layers, by name, in the order in which they end."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found[name] = output.clone()  # a ReLU that works in place may follow

    with forward_hooks((model.get_submodule(name), partial(keep, name)) for name in layers):
        return model(x), found


def attention_layers(model: nn.Module, x: Pixels, wanted: Sequence[str] = ()) -> list[str]:
    """The full names of the layers whose attention counts: those that the user named, or the two deepest stages.

    A stage is what has feature maps of one size; it ends with the outermost layer that has it, and of these with the
    one that runs last. Maps of one position do not count, nor do adaptive poolings, which may blow them up again.
    ConfigError for a layer without feature maps.
    """
    computed = "parametrizations."  # layers that make another one's weight, which may have four dimensions, too
    layers = {name: module for name, module in model.named_modules() if name and computed not in name}
    with torch.no_grad(), eval_mode(model):
        sizes = {name: f.shape[2:] for name, f in features(model, layers, x)[1].items() if f.ndim == 4}
    names = [resolve_layer(model, name, "give --layers with feature maps [B, C, H, W]") for name in wanted]
    if without := [name for name in names if name not in sizes]:
        raise ConfigError(f"the layer {without[0]} has no feature maps [B, C, H, W]; give other --layers")
    if names:
        return names
    ends: dict[torch.Size, str] = {}
    for name, size in sizes.items():
        outermost = name.count(".") <= ends.get(size, name).count(".")
        if size.numel() > 1 and outermost and not isinstance(layers[name], POOLINGS):
            ends[size] = name
    if not ends:
        raise ConfigError("the network has no layer with feature maps [B, C, H, W], which nad distils; try ft or sau")
    deep = sorted(ends, key=torch.Size.numel)[:2]
    return [ends[size] for size in reversed(deep)]
