"""The networks that make triggers.

Input-Aware's generators (Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", 2020); and SSBA's encoder and decoder,
which hide a code in an image and read it again, after StegaStamp (Tancik, Mildenhall, Ng, "StegaStamp: Invisible
Hyperlinks in Physical Photographs", CVPR 2020), at the sizes of the benchmark's. The names of SSBA's weights are those
of published encoders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.data.batches import quantise, to_float
from sau.models import Normalized
from sau.types import Pixels

CODE_SIDE = 16  # side of the image that the code is drawn as, then enlarged; the encoder halves images as often (2**4)
DEPTHS = (32, 32, 64, 128, 256)  # channels of conv1 to conv5, each after the first at half the size


# Input-Aware


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    norm = nn.BatchNorm2d(outputs, momentum=0.05)
    return nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU(inplace=True)


class Generator(nn.Module):
    """An encoder of three stages, each halving the image, and a decoder: [B, inputs, H, W] -> [B, outputs, H, W]."""

    def __init__(self, inputs: int, outputs: int) -> None:
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
        self.mask_net = Normalized(Generator(channels, 1).to(memory_format=torch.channels_last), mean, std)
        self.std: Tensor = nn.Buffer(torch.tensor(std or [1.0] * channels).view(1, -1, 1, 1))
        self._first = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def restarted(self) -> "TriggerGenerators":
        """The generators with their first weights, from which each training begins."""
        self.load_state_dict(self._first)
        self.zero_grad()  # `--accumulate` would add to those of the training before
        return self

    def mask(self, x: Pixels) -> Tensor:
        """m = h(g(M(x))) in (0, 1), [B, 1, H, W]."""
        return torch.tanh(20 * self._squash(self.mask_net(x)) - 10) / (2 + self.epsilon) + 0.5

    def forward(self, x: Pixels, source: Pixels | None = None) -> tuple[Pixels, Pixels]:
        """`x` with the trigger of `source` (by default its own), and that one's pattern, p = g(P(source)) in (0, 1)."""
        source = x if source is None else source
        pattern = self._squash(self.pattern_net(source))
        return x + (pattern - x) * self.mask(source), pattern

    def _squash(self, u: Tensor) -> Tensor:
        for _ in range(self.tanh):
            u = torch.tanh(u)
        return u / (2 + self.epsilon) + 0.5


# SSBA


def _start(layer: nn.Module) -> None:
    """He's initialisation: with torch's own a code fades on its way through 16 layers and is not found for long."""
    if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


class Encoder(nn.Module):
    """A code of so many `bits` and images of so many `channels` in, images that carry it out: a U-Net that sees both
    side by side. Its output is the image, through a sigmoid, unless it `adds` to it."""

    def __init__(self, bits: int, channels: int = 3, adds: bool = False) -> None:
        super().__init__()
        self.adds = adds
        self.secret_dense = nn.Linear(bits, 3 * CODE_SIDE**2)
        inputs = given = channels + 3
        for i, width in enumerate(DEPTHS, 1):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, width, 3, stride=2 if i > 1 else 1, padding=1))
            inputs = width
        for i, width in enumerate(DEPTHS[3::-1], 6):
            self.add_module(f"up{i}", nn.Conv2d(inputs, width, 2))
            beside = width + given if i == 9 else width  # the last one sees the input again
            self.add_module(f"conv{i}", nn.Conv2d(width + beside, width, 3, padding=1))
            inputs = width
        self.conv10 = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.residual = nn.Conv2d(inputs, channels, 1)
        self.apply(_start)

    def forward(self, code: Tensor, x: Pixels) -> Pixels:
        """`x` [B, C, H, W], sides divisible by 16, with `code` [B, bits]; may leave [0, 1] if it `adds`."""
        drawn = F.relu(self.secret_dense(code)).view(-1, 3, CODE_SIDE, CODE_SIDE)
        given = torch.cat([F.interpolate(drawn, size=x.shape[-2:]), x], 1)
        features = [given]
        for i in range(1, 6):
            features.append(F.relu(self.get_submodule(f"conv{i}")(features[-1])))
        h = features[5]
        for i in range(6, 10):
            up = F.pad(F.interpolate(h, scale_factor=2), (0, 1, 0, 1))
            beside = [features[10 - i], F.relu(self.get_submodule(f"up{i}")(up))]
            h = F.relu(self.get_submodule(f"conv{i}")(torch.cat(beside + features[:1] * (i == 9), 1)))
        made = self.residual(F.relu(self.conv10(h)))
        return x + made if self.adds else made.sigmoid()


class Decoder(nn.Module):
    """Images [B, C, side, side] in, one logit for every bit of their code out."""

    def __init__(self, bits: int, side: int, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in ((32, 2), (32, 1), (64, 2), (64, 1), (64, 2), (128, 2), (128, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.ReLU()]
            channels = width
        self.decoder = nn.Sequential(*layers, nn.Flatten())
        left = -(-side // 32)  # each of the five halvings rounds up
        self.dense = nn.Sequential(nn.Linear(channels * left**2, 512), nn.ReLU(), nn.Linear(512, bits))
        self.apply(_start)

    def forward(self, x: Pixels) -> Tensor:
        return self.dense(self.decoder(x))


class FixedCodeEncoder(nn.Module):
    """A trigger: a trained encoder and the `code` [bits] of zeros and ones that it puts into every image."""

    def __init__(self, encoder: Encoder, code: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.figures: dict[str, float] = {}  # what was measured while the encoder was trained
        self.code: Tensor = nn.Buffer(code)

    def forward(self, x: Pixels, codes: Tensor | None = None) -> Pixels:
        """`x` [B, C, H, W] in [0, 1] with the code, or `codes` [B, bits]; in blocks, for the encoder needs memory."""
        codes = self.code.expand(len(x), -1) if codes is None else codes
        blocks = zip(codes.split(250), x.split(250), strict=True)
        return torch.cat([self.encoder(code, block).clamp(0, 1) for code, block in blocks])


def stored(x: Pixels) -> Pixels:
    """Images as they are stored: clipped to [0, 1] and 8 bits deep.

    The gradient is that of the clip, and straight through the 8 bits (Bengio, Leonard, Courville, "Estimating or
    Propagating Gradients Through Stochastic Neurons", 2013). Straight through the clip, too, an encoder would drift far
    from [0, 1] while w is 0.
    """
    clipped = x.clamp(0, 1)
    return clipped + (to_float(quantise(x)) - clipped).detach()


def psnr(x: Pixels, y: Pixels) -> Tensor:
    """10 log10(1 / mean (x - y)^2) of every pair of images in [0, 1]: decibels [B], 99 at most."""
    return -10 * (x - y).square().flatten(1).mean(1).clamp_min(10**-9.9).log10()


@torch.no_grad()
def measured(trigger: FixedCodeEncoder, decoder: Decoder, x: Pixels) -> dict[str, float]:
    """How well drawn codes are read from 8-bit images, in percent, and the mean PSNR with the attack's code in dB.

    The attack's own code says nothing of the first: at one bit a decoder that always answers 1 would read it.
    """
    bits = torch.randint(2, (len(x), len(trigger.code))).to(x)
    right = ((decoder(stored(trigger(x, bits))) > 0) == (bits > 0)).float().mean()
    return {"percent_of_bits_right": 100 * float(right), "psnr_in_db": float(psnr(stored(trigger(x)), x).mean())}
