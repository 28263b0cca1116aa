"""The networks that generate Input-Aware's triggers (Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.models import Normalized
from sau.types import Pixels


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    norm = nn.BatchNorm2d(outputs, momentum=0.05)
    return nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU(inplace=True)


class Generator(nn.Module):
    """An encoder of three stages, each halving the image, and a decoder: [B, inputs, H, W] -> [B, outputs, H, W]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        down, up = ((inputs, 32), (32, 64), (64, 128)), ((128, 64), (64, 32), (32, outputs))
        self.down = nn.ModuleList(nn.Sequential(*_block(a, b), *_block(b, b)) for a, b in down)
        self.middle = nn.Sequential(*_block(128, 128))
        stages = [nn.Sequential(*_block(a, a), *_block(a, b)) for a, b in up]
        del stages[-1][-1]  # the ReLU at the end
        self.up = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for stage in self.down:
            x = stage(x)
            sizes.append(x.shape[-2:])
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for stage in self.up:
            x = stage(F.interpolate(x, size=sizes.pop(), mode="bilinear"))
        return x


class TriggerGenerators(nn.Module):
    """The generators of patterns and of masks, pixels in and out, which go through tanh `tanh` times. They see images
    normalised, as the classifier `like` does. `graph_safe`: a step of theirs may be replayed as a CUDA graph."""

    def __init__(self, channels: int, like: nn.Module, tanh: int, epsilon: float) -> None:
        super().__init__()
        self.tanh, self.epsilon, self.graph_safe = tanh, epsilon, True
        mean = std = None
        if isinstance(like, Normalized) and like.mean is not None and like.std is not None:
            mean, std = like.mean.flatten().tolist(), like.std.flatten().tolist()
        self.pattern_net = Normalized(Generator(channels, channels).to(memory_format=torch.channels_last), mean, std)
        self.mask_net = Normalized(Generator(1, channels).to(memory_format=torch.channels_last), mean, std)
        self.register_buffer("std", torch.tensor(std or [1.0] * channels).view(1, -1, 1, 1))
        self._first = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def restarted(self) -> "TriggerGenerators":
        """The generators with their first weights, from which each training begins."""
        self.load_state_dict(self._first)
        self.zero_grad()  # `--accumulate` would add to those of the training before
        return self

    def pattern(self, x: Pixels) -> Pixels:
        """p = g(P(x)) in (0, 1), [B, C, H, W]."""
        return self._squash(self.pattern_net(x))

    def mask(self, x: Pixels) -> Tensor:
        """m = h(g(M(x))) in (0, 1), [B, 1, H, W]."""
        return torch.tanh(20 * self._squash(self.mask_net(x)) - 10) / (2 + self.epsilon) + 0.5

    def forward(self, x: Pixels, source: Pixels | None = None) -> tuple[Pixels, Pixels]:
        """`x` with the trigger of `source` (by default its own), and the pattern of that trigger."""
        source = x if source is None else source
        pattern = self.pattern(source)
        return x + (pattern - x) * self.mask(source), pattern

    def _squash(self, u: Tensor) -> Tensor:
        for _ in range(self.tanh):
            u = torch.tanh(u)
        return u / (2 + self.epsilon) + 0.5
