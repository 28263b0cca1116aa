"""Re-activation by a universal perturbation (Zhu, Liang, Wu, "Breaking the False Sense of Security in Backdoor Defense
through Re-Activation Attack", NeurIPS 2024): the network stays, the trigger is changed by one D for all pictures.

    min_D  mean CE(h(x~ + D), t)  -  mean log(1.0001 - max_{k != t} p_k(x~ + D)),     |D|_inf <= eps,  x~ + D in [0, 1]

over triggered training pictures x~, by plain gradient steps as long as eps times the gradient, which at the published
eps of 0.05 is the published rate; on several networks in turn for one that is not known.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sau.data.images import Images, to_float
from sau.defense.npd import held_losses
from sau.seeds import generator
from sau.types import Labels, Pixels, Universal

BATCH = 128  # as released


def universal(
    models: Sequence[nn.Module], pictures: Images, budgets: Sequence[float], *, steps: int, seed: int = 0
) -> Iterator[tuple[float, Universal]]:
    """(eps, D) for one budget after the other, D [1, C, H, W] with |D|_inf <= eps.

    Each budget, which should be no smaller than the one before, begins where the last one ended; the first one begins
    anywhere in its ball.

    Args:
        models: frozen, in eval mode; each step asks the next one in turn.
        pictures: what D is fitted to; their labels are where it shall lead.
        budgets: radii of the ball in [0, 1] pixels.
        steps: gradient steps of each network for each budget, of 128 pictures.
        seed: of the start and the order of pictures.
    """
    draw = generator(seed)
    delta = noise(pictures, budgets[0], draw)
    batches, turn = _batches(len(pictures), draw), 0
    for eps in budgets:
        for _ in range(steps * len(models)):
            batch = next(batches)
            x, t = to_float(pictures.pixels[batch]), pictures.labels[batch]
            delta = (delta - eps * _gradient(models[turn % len(models)], x, t, delta)).clamp(-eps, eps)
            turn += 1
        yield eps, delta


def noise(pictures: Images, eps: float, draw: torch.Generator) -> Universal:
    """A perturbation [1, C, H, W] drawn evenly from the ball: where the search begins, and a control by itself."""
    shape = (1, *pictures.pixels.shape[1:])
    return ((2 * torch.rand(shape, generator=draw) - 1) * eps).to(pictures.pixels.device)


def shifted(pictures: Images, delta: Universal) -> Pixels:
    """The pictures with D, cut to [0, 1]."""
    return (to_float(pictures.pixels) + delta).clamp(0, 1)


def _gradient(model: nn.Module, x: Pixels, target: Labels, delta: Universal) -> Universal:
    d = delta.clone().requires_grad_()
    reached, others, _ = held_losses(model((x + d).clamp(0, 1)), target, target)
    (gradient,) = torch.autograd.grad(reached + others, d)
    return gradient


def _batches(count: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Whole batches of shuffled places, without end."""
    while True:
        order = torch.randperm(count, generator=draw)
        yield from order[: count - count % BATCH].split(BATCH) if count >= BATCH else (order,)
