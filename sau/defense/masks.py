"""Batch norms under masks: what ANP learns on, and any method that learns which channels a network can do without."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sau.defense.pruning import Norms
from sau.types import Logits, Pixels


class Perturbable:
    """A network as a function of the masks and perturbations of its batch norms, all of them side by side [C].

    It holds the weights fixed and has buffers of its own, so neither weights nor running statistics of `model` change.
    Weights that `model` is given later count, as those of a checkpoint.
    """

    def __init__(self, model: nn.Module, norms: Norms) -> None:
        self.model, self.norms = model, norms
        self.fixed: dict[str, Tensor] = {}
        # Each module once, whatever names it has, and every place of a shared weight.
        for name, module in model.named_modules():
            inside, places = f"{name}." if name else "", {"recurse": False, "remove_duplicate": False}
            self.fixed |= {inside + own: weight.detach() for own, weight in module.named_parameters(**places)}
            self.fixed |= {inside + own: buffer.clone() for own, buffer in module.named_buffers(**places)}

    @property
    def scale(self) -> Tensor:
        """[C], the scales of all batch norms."""
        return torch.cat([norm.weight.detach() for norm in self.norms.values()])

    @property
    def shift(self) -> Tensor:
        """[C], their shifts."""
        return torch.cat([norm.bias.detach() for norm in self.norms.values()])

    def __call__(self, x: Pixels, mask: Tensor, noise: Tensor | None = None) -> Logits:
        """Logits with scale w * (mask + xi) and shift b * (1 + zeta), where noise [2, C] is (xi, zeta), or no noise."""
        xi, zeta = noise if noise is not None else (0.0, 0.0)
        scales, shifts = self.split(self.scale * (mask + xi)), self.split(self.shift * (1 + zeta))
        changed = {f"{name}.weight": scale for name, scale in scales.items()}
        changed |= {f"{name}.bias": shift for name, shift in shifts.items()}
        return functional_call(self.model, {**self.fixed, **changed}, (x,), tie_weights=False)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """[C] of all batch norms as [C] of each one."""
        return dict(zip(self.norms, values.split([norm.num_features for norm in self.norms.values()]), strict=True))
