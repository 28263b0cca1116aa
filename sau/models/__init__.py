"""The networks by name, each taking pixels in [0, 1]."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from sau.errors import ConfigError, DataError
from sau.models.preact_resnet import PreActResNet18
from sau.models.zoo import torchvision_names, torchvision_net

GRAPHS = 64  # of one network: a size of batch is one, of each of its copies, and memory may halve them more than once
MODELS: dict[str, Callable[..., nn.Module]] = {"preactresnet18": PreActResNet18}


class Normalized(nn.Module):
    """A network that owns its normalisation and its precision: pixels in [0, 1] in, float logits out.

    Args:
        net: takes normalised pictures [B, C, H, W], returns logits [B, K].
        mean: per-channel mean of the pixels in [0, 1], or None for no normalisation.
        std: per-channel standard deviation, given together with `mean`.
        amp: run `net` under bf16 autocast (weights stay as they are).

    `compiled` is None, or a mode of torch.compile for passes that gradients are asked of; a copy compiles anew. Other
    passes, whose batches come in other sizes, are not worth it. What cannot be compiled runs as it stands, after a
    warning.
    """

    compiled: str | None
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, net: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, amp: bool = False
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ConfigError("mean and std belong together; give both or neither")
        if std is not None and not all(value > 0 for value in std):
            raise ConfigError(f"std is {tuple(std)}, allowed are values above 0, one for each channel")
        self.net, self.amp, self.compiled = net, amp, None
        for name, values in (("mean", mean), ("std", std)):
            stats = None if values is None else torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, stats, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        else:
            x = x.clone()  # some networks change their input in place
        if self.compiled is None:
            return self._logits(x)
        if self.net._compiled_call_impl is None:  # copies of a module leave it behind
            torch._dynamo.config.recompile_limit = GRAPHS
            with torch._dynamo.config.patch(wrap_top_frame=True):  # or torch 2.10 passes over a Sequential
                self.net.compile(mode=self.compiled, dynamic=False)
        with nullcontext() if torch.is_grad_enabled() else torch.compiler.set_stance("force_eager"):
            try:
                return self._logits(x)
            except torch._dynamo.exc.TorchDynamoException as error:  # the compiler's, not the network's
                reason = " ".join(str(error).split())[:200]
        warnings.warn(f"the network cannot be compiled and runs as it stands: {reason}", stacklevel=2)
        self.compiled = self.net._compiled_call_impl = None
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16) if self.amp else nullcontext():
            answer = self.net(x)
        if not isinstance(answer, Tensor):
            mode = "train" if self.net.training else "eval"
            kind = type(answer).__name__
            raise DataError(f"in {mode} mode the network answers with {kind}, allowed are logits [{len(x)}, classes]")
        return answer.float() if self.amp else answer


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Inside, no part of `model` turns autocast on, and convolutions of CUDA keep all bits of fp32 (by default they
    keep ten). A `Normalized` would turn it on again inside any outer context."""
    owners = [module for module in model.modules() if isinstance(module, Normalized) and module.amp]
    shortened = False
    if any(parameter.is_cuda for parameter in model.parameters()):
        with suppress(RuntimeError):  # where torch was told by its newer flags, these stand
            shortened = torch.backends.cudnn.allow_tf32
    try:
        if shortened:
            torch.backends.cudnn.allow_tf32 = False
        for module in owners:
            module.amp = False
        yield
    finally:
        if shortened:
            torch.backends.cudnn.allow_tf32 = True
        for module in owners:
            module.amp = True


def has_width(name: str) -> bool:
    """Whether a network comes in widths; those of torchvision do not."""
    return name in MODELS


def check_name(name: str, width: int | None) -> None:
    """Refuse a network that `build` would not build: ConfigError for an unknown name, and for a width as below."""
    if not has_width(name) and name not in torchvision_names():
        raise ConfigError(f"unknown model {name!r}; choose {', '.join(MODELS)} or one of torchvision's, like vgg19_bn")
    if width is not None and (width < 1 or not has_width(name)):
        raise ConfigError(
            f"width is {width}, allowed is 1 and more for {', '.join(MODELS)}, and none for other networks"
        )


def build(
    name: str,
    num_classes: int,
    *,
    width: int | None = None,
    shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float],
    std: Sequence[float],
    amp: bool = False,
) -> Normalized:
    """A new network by name, in the memory layout that convolutions are fastest in.

    Args:
        name: one of `MODELS`, or a classifier of torchvision, like vgg19_bn.
        num_classes: how many logits it has.
        width: channels of the first stage for networks of `MODELS`; None means the published width.
        shape: channels, height and width of the pictures.
        mean: see `Normalized`.
        std: see `Normalized`.
        amp: see `Normalized`.

    Raises ConfigError for an unknown name, for a width below 1, and for a width where the network has none.
    """
    check_name(name, width)
    if has_width(name):
        net = MODELS[name](num_classes=num_classes, **({} if width is None else {"width": width}))
    else:
        net = torchvision_net(name, num_classes, (shape[0], shape[1], shape[2]))
    return Normalized(quick(net), mean, std, amp)


def layout(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The state dict of the network that `make` makes, without memory for its values where that is possible.

    torchvision's RegNet reads values while it is built; it has no width, so that its name bounds its size.
    """
    try:
        with torch.device("meta"):
            return make().state_dict()
    except NotImplementedError:
        return make().state_dict()


def quick(net: nn.Module) -> nn.Module:
    """`net`, its convolutions in the memory layout that they are fastest in, where torch can be trusted with it."""
    if not _narrow(net):
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    return net


def laid_as(net: nn.Module, other: nn.Module) -> nn.Module:
    """`net`, its parameters in plain order in memory if those of `other` are: files of tensors want that."""
    if all(parameter.is_contiguous() for parameter in other.parameters()):
        for parameter in net.parameters():
            parameter.data = parameter.data.contiguous()
    return net


def _narrow(net: nn.Module) -> bool:
    """Whether torch's CPU kernels would write past their memory in channels_last (seen with torch 2.15).

    It is the weight gradient of a strided 1x1 convolution of 8 or fewer fp32 channels; up to 15 none is trusted.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    return any(c.kernel_size == (1, 1) and c.stride != (1, 1) and c.in_channels < 16 for c in convolutions)
