"""Three rivals in the order of work of their public code, written from its description, to compare speed with.

They compute what ours compute, up to random draws; what differs is the work that is done for nothing: gradients
of weights that do not move, graphs that are kept, and features that are computed again for every layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def i_bau_round(model: nn.Module, batches: list[Batch], adam: torch.optim.Optimizer, steps: int = 5) -> None:
    """One round of i-BAU: a pass over the perturbation, then an update for each batch."""
    model.eval()
    delta = torch.zeros_like(batches[0][0][:1], requires_grad=True)
    sgd = torch.optim.SGD([delta], lr=10)
    for x, _ in batches:
        with torch.no_grad():
            answers = model(x).argmax(1)
        sgd.zero_grad()
        inner = 0.001 * delta.square().sum() - F.cross_entropy(model(x + delta), answers)
        inner.backward(retain_graph=True)  # of all weights too
        sgd.step()
    weights = list(model.parameters())
    for x, y in batches:
        d = delta.detach().clone().requires_grad_()
        carried = torch.zeros(len(x), 1, 1, 1, device=x.device)
        carried[torch.randperm(len(x))[: max(1, len(x) // 100)]] = 1
        outer = F.cross_entropy(model(x + carried * d), y)
        g_d, *g_w = torch.autograd.grad(outer, [d, *weights], retain_graph=True)
        x0, y0 = batches[0]
        inner = 0.001 * d.square().sum() - F.cross_entropy(model(x0 + d), y0)
        (slope,) = torch.autograd.grad(inner, d, create_graph=True)
        mapped, v = d - 0.1 * slope, torch.zeros_like(d)
        for _ in range(steps):
            (turned,) = torch.autograd.grad(mapped, d, v, retain_graph=True)
            v = turned + g_d
        implicit = torch.autograd.grad(mapped, weights, v, allow_unused=True)
        adam.zero_grad()
        for weight, direct, part in zip(weights, g_w, implicit, strict=True):
            weight.grad = direct if part is None else direct + part
        adam.step()


def nad_step(student: nn.Module, teacher: nn.Module, batch: Batch, sgd: torch.optim.Optimizer) -> None:
    """One step of NAD on PreAct-ResNet18: every level's features by a forward pass of their own."""
    (x, y), student_parts, teacher_parts = batch, list(student.children()), list(teacher.children())
    student.train()
    teacher.eval()
    loss = F.cross_entropy(student(x), y)
    for cut, beta in ((4, 500), (5, 1000), (6, 1000)):  # to layer3, to layer4, to the pooling
        ours = nn.Sequential(*student_parts[:cut])(x)
        with torch.no_grad():
            theirs = nn.Sequential(*teacher_parts[:cut])(x)
        loss = loss + beta * F.mse_loss(_attention(ours), _attention(theirs))
    sgd.zero_grad()
    loss.backward()
    sgd.step()


def _attention(f: Tensor) -> Tensor:
    maps = f.abs().square().sum(1, keepdim=True)
    return maps / (torch.linalg.vector_norm(maps, dim=(2, 3), keepdim=True) + 1e-6)


class Perturbed(nn.Module):
    """A batch norm under a mask and a perturbation, which can be switched off."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm, self.on = norm, True
        self.mask = nn.Parameter(torch.ones_like(norm.weight))
        self.xi, self.zeta = (nn.Parameter(torch.zeros_like(norm.weight)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        scale, shift = (self.mask + self.xi, 1 + self.zeta) if self.on else (self.mask, torch.ones_like(self.zeta))
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight * scale, norm.bias * shift, self.training, 0.1, norm.eps
        )


def perturb(model: nn.Module) -> list[Perturbed]:
    """Put every batch norm of `model` under a mask and a perturbation."""
    found = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                found.append(Perturbed(child))
                setattr(parent, name, found[-1])
    return found


def anp_iteration(model: nn.Module, norms: list[Perturbed], batch: Batch, sgd: torch.optim.Optimizer) -> None:
    """One iteration of ANP; every backward pass reaches all weights."""
    x, y = batch
    model.train()
    noise = [p for norm in norms for p in (norm.xi, norm.zeta)]
    with torch.no_grad():
        for p in noise:
            p.uniform_(-0.4, 0.4)
    model.zero_grad()
    for norm in norms:
        norm.on = True
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for p in noise:
            p += 0.4 * p.grad.sign()
    sgd.zero_grad()
    perturbed = F.cross_entropy(model(x), y)
    for norm in norms:
        norm.on = False
    (0.2 * F.cross_entropy(model(x), y) + 0.8 * perturbed).backward()
    sgd.step()
    with torch.no_grad():
        for norm in norms:
            norm.mask.clamp_(0, 1)
