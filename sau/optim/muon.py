"""Muon: steps whose directions are all equally strong (Jordan et al., "Muon: An optimizer for hidden layers in neural
networks", 2024, kellerjordan.github.io/posts/muon).

    B <- mu B + G,      U = G + mu B,      W <- (1 - lr wd) W - lr polar(U)

for the weight W of a convolution, as the matrix [out, in * height * width]; a weight is taken for one if it has three
dimensions or more, as a transformer's tokens have, too. polar(U) is P Q^T of the singular value decomposition
U = P S Q^T. Whatever else moves, linear layers (here the last one), batch norm and biases, steps along U.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ODD = (3.4445, -4.7750, 2.0315)  # a s + b s^3 + c s^5 takes small singular values up steeply and keeps all below 1.3
TIMES = 3


def polar(matrix: Tensor) -> Tensor:
    """About P Q^T of `matrix` [m, n]: the polynomial ODD, applied TIMES times to the singular values.

    With A = X X^T, X <- (a + b A + c A^2) X is that polynomial, and A commutes with every factor; so all factors are
    made from the first A, on the shorter side of the matrix, and X is multiplied once.
    """
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp_min(1e-7)
    a, b, c = ODD
    gram, product = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(TIMES):
        factor = b * gram + c * gram @ gram
        factor.diagonal().add_(a)
        gram, product = factor @ gram @ factor, factor @ product
    x = product @ x
    return x if len(matrix) <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """The optimiser of this file.

    Args:
        params: whatever is to move.
        lr: learning rate, of convolutions and of the others.
        momentum: mu.
        weight_decay: wd.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(gradient)
        step = gradient.add(state["momentum"], alpha=group["momentum"])
        if step.dim() > 2:
            step = polar(step.flatten(1)).reshape(step.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"])
