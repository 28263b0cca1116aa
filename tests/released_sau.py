"""The released order of work of SAU, step by step and in the letters of its description: slow on purpose.

`sau.defense.sau` does the same with less work. This module says what "the same" means, for the tests, and what "less"
means, for the benchmark. Nothing here is shared with the library.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReleasedSAU:
    """One batch of SAU as released: `perturb` is the inner maximisation, `step` is that and the outer minimisation.

    `h` is purified in place, `h_b` the backdoored network, which keeps gradients that nobody reads, as in the release.
    Options have the release's names; `test_sau.OURS` says which of ours they are."""

    def __init__(
        self,
        h: nn.Module,
        h_b: nn.Module,
        *,
        lr: float = 1e-4,
        trigger_norm: float = 0.2,
        norm_type: str = "L_inf",
        adv_lr: float = 0.2,
        adv_steps: int = 5,
        pgd_init: str = "max",
        beta_1: float = 0.01,
        beta_2: float = 1.0,
        lmd_1: float = 1.0,
        lmd_2: float = 0.0,
        lmd_3: float = 1.0,
        outer_steps: int = 1,
        train_mode: bool = False,
    ) -> None:
        self.h, self.h_b = h.eval(), h_b.eval().requires_grad_(True)
        self.rho, self.norm_type, self.eta, self.T, self.pgd_init = trigger_norm, norm_type, adv_lr, adv_steps, pgd_init
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.lmd_1, self.lmd_2, self.lmd_3 = lmd_1, lmd_2, lmd_3
        self.outer_steps, self.train_mode = outer_steps, train_mode
        self.optimizer = torch.optim.Adam(h.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0, amsgrad=True)

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Search delta by T sign steps; ends early when the whole batch is shared."""
        fill = {"zero": 0.0, "max": self.rho, "min": -self.rho}[self.pgd_init]
        delta = self._project(torch.full_like(x, fill))
        for _ in range(self.T):
            delta = delta.detach().requires_grad_(True)
            clean, clean_b = self.h(x), self.h_b(x)  # constant in the loop, and yet computed in every step
            u, v = self.h(x + delta), self.h_b(x + delta)
            moved, moved_b = u.argmax(1) != clean.argmax(1), v.argmax(1) != clean_b.argmax(1)
            shared = moved & moved_b & (u.argmax(1) == v.argmax(1))
            if shared.all():
                break
            l_adv, l_js = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
            if (~moved).any():
                l_adv = l_adv - F.cross_entropy(u[~moved], y[~moved], reduction="sum")
            if (~moved_b).any():
                l_adv = l_adv - F.cross_entropy(v[~moved_b], y[~moved_b], reduction="sum")
            l_js = l_js + self._js(u[~shared], v[~shared]).sum()
            loss = self.beta_1 * l_adv / (2 * len(x)) + self.beta_2 * l_js / len(x)
            loss.backward()  # reaches the weights of both networks, where nothing reads it
            delta = self._project(delta.detach() - self.eta * delta.grad.sign())
        return delta.detach()

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Purify h on one batch; returns the losses before the first update."""
        delta = self.perturb(x, y)
        losses: dict[str, Tensor] = {}
        for _ in range(self.outer_steps):
            if self.train_mode:
                self.h.train()
            z, z_adv = self.h(torch.cat([x, x + delta])).chunk(2)
            clean_b, adv_b = self.h_b(x), self.h_b(x + delta)
            l_cl, l_at = F.cross_entropy(z, y), F.cross_entropy(z_adv, y)
            l_sh = self._shared(z_adv, adv_b.argmax(1), clean_b.argmax(1), y)
            loss = self.lmd_1 * l_cl + self.lmd_2 * l_at + self.lmd_3 * l_sh
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.h.eval()
            if not losses:
                losses = {"loss": loss, "clean_loss": l_cl, "adv_loss": l_at, "shared_loss": l_sh}
        return {name: value.detach() for name, value in losses.items()}

    @staticmethod
    def _js(u: Tensor, v: Tensor) -> Tensor:
        """Jensen-Shannon divergence of each pair of softmax outputs, in nats."""
        p, q = torch.softmax(u, dim=1).clamp(min=1e-8), torch.softmax(v, dim=1).clamp(min=1e-8)
        m = (p + q) / 2
        return 0.5 * (p * torch.log(p / m)).sum(1) + 0.5 * (q * torch.log(q / m)).sum(1)

    @staticmethod
    def _shared(z_adv: Tensor, s: Tensor, r_0: Tensor, y: Tensor) -> Tensor:
        """L_sh: -log(1 - p_s) in both of its forms, over the samples on which h_b left its clean answer and y."""
        chosen = (s != y) & (s != r_0)
        if not chosen.any():
            return torch.zeros((), device=z_adv.device)
        z, s = z_adv[chosen], s[chosen]
        is_s = F.one_hot(s, z.shape[1]).bool()
        first = torch.softmax(z, dim=1)[~is_s].view(len(z), -1).sum(1)
        second = torch.softmax(z, dim=1)[is_s]
        forms = torch.log(1e-6 + first.clamp(max=0.999)) + torch.log(1 + 1e-6 - second.clamp(min=0.001))
        return -0.5 * forms.sum() / len(z_adv)

    def _project(self, delta: Tensor) -> Tensor:
        """Back into the ball; L1 and L2 sample by sample, each with a look at its length."""
        if self.norm_type == "L_inf":
            return delta.clamp(-self.rho, self.rho)
        if self.norm_type == "Reg":
            return delta
        delta = delta.clone()
        for i in range(len(delta)):
            length = delta[i].norm(p=1 if self.norm_type == "L1" else 2)
            if length > self.rho:
                delta[i] *= self.rho / length
        return delta
