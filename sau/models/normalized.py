"""A network that takes pixels in [0, 1], with its normalisation and precision; checks of its logits; its layers."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sau.errors import ConfigError, DataError, SauError, first_line, lacks_memory

Layer = TypeVar("Layer", bound=nn.Module)


class Normalized(nn.Module):
    """A network that owns its normalisation and its precision: pixels in [0, 1] in, float logits out.

    Args:
        net: takes normalised images [B, C, H, W], returns logits [B, K].
        mean: per-channel mean of the pixels in [0, 1], or None for no normalisation.
        std: per-channel standard deviation, given together with `mean`.
        amp: run `net` under bf16 autocast (weights stay as they are).

    `compiled`: whether passes with gradients go through torch.compile (without, batches have too many sizes).
    `graph_safe`: whether a step of its training may be replayed as a CUDA graph (`sau.graphs`).
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, net: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, amp: bool = False
    ) -> None:
        super().__init__()
        self.net, self.amp, self.compiled = net, amp, False
        self.graph_safe: bool = True
        self._compiled_net = 0  # `id` of the network that was compiled; a copy, which has another, compiles anew
        for name, values in zip(("mean", "std"), statistics(mean, std), strict=True):
            stats = None if values is None else torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, stats, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # A clone, for some networks change their input in place.
        x = x.clone() if self.mean is None or self.std is None else (x - self.mean) / self.std
        if self.compiled and self._compiled_net != id(self.net):
            self.net.compile(dynamic=False)
            self._compiled_net = id(self.net)
        eager = self.compiled and not torch.is_grad_enabled()
        stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
        # No cache: inside an outer context, of a caller's, it would keep the weights of before an update.
        cast = torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if self.amp else nullcontext()
        with stance, cast:
            logits = self.net(x)
        return at_least_fp32(require_tensor(self.net, logits))


def require_tensor(network: nn.Module, answer: Any) -> Tensor:
    """`answer`, the output of `network`; DataError unless it is a tensor."""
    if not isinstance(answer, Tensor):
        mode = "train" if network.training else "eval"
        raise DataError(f"in {mode} mode the network returns {type(answer).__name__}, allowed are logits [B, K]")
    return answer


def check_initialised(model: nn.Module) -> None:
    """ConfigError for a lazy layer that has not run yet."""
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        raise ConfigError("a lazy layer of the network has no weights yet; run it once on some images first")


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all values of a parameter or buffer are finite, as a tensor; buffers may hold -inf, as masks do."""
    finite = tensor.isfinite()
    return (finite if isinstance(tensor, nn.Parameter) else finite | (tensor == -torch.inf)).all()


def statistics(mean: Any, std: Any) -> tuple[list[float], list[float]] | tuple[None, None]:
    """`mean` and `std` of the pixels in [0, 1] as a number for each channel; ConfigError if they cannot be."""
    if mean is None and std is None:
        return None, None
    with suppress(TypeError, ValueError):  # refused below, like every other wrong value
        found = [float(value) for value in mean], [float(value) for value in std]
        if len(found[0]) == len(found[1]) and all(0 <= m <= 1 for m in found[0]) and all(s > 0 for s in found[1]):
            return found
    allowed = "both or neither, a number for each channel: mean 0 to 1, as of pixels in [0, 1] (divide by 255)"
    raise ConfigError(f"mean is {mean} and std is {std}, allowed are {allowed}, and std above 0")


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of `model` at `x`, in 32 bits at least; DataError unless they have the shape [B, K]."""
    try:
        logits: Tensor = model(x)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:  # torchvision's transformers assert sizes
        if isinstance(error, SauError) or lacks_memory(error) or "CUDA error" in str(error):  # not about the images
            raise
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {x.dtype}
        advice = "images.float()" if kinds == {torch.float32} else "model.float()"
        why = "".join(f"; weights are {kind}, images {x.dtype}, so give {advice}" for kind in kinds)
        text = f"the network does not accept images of shape {tuple(x.shape)}: {first_line(error)}{why}"
        raise DataError(text) from None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        got = tuple(getattr(logits, "shape", ())) or type(logits).__name__
        raise DataError(f"the network answers {len(x)} images with {got}, allowed are logits [{len(x)}, classes]")
    return at_least_fp32(logits)


def check_labels(labels: Tensor, classes: int) -> None:
    """DataError unless `labels`, at least one, are classes of a network that has `classes` of them."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels range over {low}..{high}, but the network has {classes} classes, 0..{classes - 1}")


def check_logits(logits: Tensor) -> None:
    """ConfigError for probabilities: a cross-entropy of them has hardly a gradient. Log-probabilities are logits."""
    sums = logits.double().sum(1)
    if logits.shape[1] > 1 and bool((logits >= 0).all() and ((sums - 1).abs() < 0.01).all()):
        raise ConfigError("the network answers with probabilities, allowed are logits; take the softmax out of it")


def to_channels_last(net: nn.Module) -> nn.Module:
    """`net`, its convolutions in channels_last, where they are fastest, unless torch's kernels are unsafe there.

    Those of the CPU would write past their memory (seen with torch 2.15) in the weight gradient of a strided 1x1
    convolution of 8 or fewer fp32 channels; up to 15 none is trusted.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    if not any(c.kernel_size == (1, 1) and c.stride != (1, 1) and c.in_channels < 16 for c in convolutions):
        for convolution in convolutions:
            convolution.to(memory_format=torch.channels_last)
    return net


def at_least_fp32(logits: Tensor) -> Tensor:
    """`logits` in 32 bits at least; a network that turns autocast on by itself answers in fewer."""
    return logits.float() if logits.is_floating_point() and logits.itemsize < 4 else logits


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Inside, the networks are in eval mode; then each of their modules is in its own mode again."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def grad_enabled(device: torch.device) -> Iterator[None]:
    """Inside, gradients are on and autocast is off, whatever the caller's contexts say.

    torch's error about a batch of one image in batch norm is a DataError that says what to do.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        advice = "batch norm in train mode needs two; give more images or another batch_size"
        raise DataError(f"a batch has one image, but {advice}") from None


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Inside, no part of `model` turns autocast on, and convolutions of CUDA keep all bits of fp32 (TF32 is off)."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Normalized) and module.amp:
                module.amp = False
                stack.callback(setattr, module, "amp", True)
        with suppress(RuntimeError):  # raised where the newer flags of torch were set; these stand
            if torch.backends.cudnn.allow_tf32:
                torch.backends.cudnn.allow_tf32 = False
                stack.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
        yield


# Layers


def copied(model: Layer, memo: Mapping[int, Tensor] | None = None) -> Layer:
    """A copy of `model`; tensors whose id is in `memo` are replaced by its values. Activations that a layer keeps in an
    attribute (`self.features = x`, or a dict, list or tuple) are detached: torch cannot copy a tensor with a graph."""
    kept = [value for module in model.modules() for value in vars(module).values()]
    kept += [x for held in kept if isinstance(held, dict) for x in held.values()]
    kept += [x for held in kept if isinstance(held, list | tuple) for x in held]
    graphs = {id(x): x.detach() for x in kept if isinstance(x, Tensor) and not x.is_leaf}
    return copy.deepcopy(model, graphs | dict(memo or {}))


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Inside, each layer calls its hook (layer, inputs, output) after its forward pass."""
    with ExitStack() as stack:
        for layer, hook in hooks:
            stack.enter_context(layer.register_forward_hook(hook))
        yield


def classifier(model: nn.Module, x: Tensor, method: str, instead: str = "ft or sau") -> nn.Linear:
    """The linear layer whose output the logits of `x` are, or else that runs last; ConfigError if it does not make the
    logits or `method` cannot set it."""
    ran: list[tuple[nn.Linear, Tensor]] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad(), forward_hooks((layer, lambda layer, _, z: ran.append((layer, z))) for layer in linear):
        logits = model(x)
    ran = [each for each in ran if torch.equal(at_least_fp32(each[1]), logits)] or ran[-1:]
    if not ran or ran[-1][0].out_features != logits.shape[1]:
        needs = f"as {method} needs; try {instead}"
        raise ConfigError(f"no Linear layer makes the network's {logits.shape[1]} logits, {needs}")
    return require_plain_weight(ran[-1][0], method)


def require_plain_weight(layer: Layer, method: str) -> Layer:
    """`layer`; ConfigError if its weight is computed from other parameters, so that `method` cannot set it."""
    if hasattr(layer, "weight") and "weight" not in layer._parameters:  # spectral_norm computes it in each pass
        how = "parametrize.remove_parametrizations or remove_spectral_norm of torch.nn.utils"
        raise ConfigError(f"a weight that {method} sets is computed from others, as by spectral norm; call {how} first")
    return layer


def resolve_layer(model: nn.Module, name: str, advice: str) -> str:
    """The full name in `model` of the layer `name` of the user's own network, to which wrappers add prefixes.

    Of several layers whose names end in `name` the outermost is meant. ConfigError with `advice` if there is none, or
    more than one.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    ends = [full for full in layers if f".{full}".endswith(f".{name}")]
    depth = min((full.count(".") for full in ends), default=0)
    found = {layers[full] for full in ends if full.count(".") == depth}
    if len(found) != 1 or not name:
        raise ConfigError(f"the network has {'several layers' if found else 'no layer'} named {name!r}; {advice}")
    return next(full for full, module in model.named_modules() if module in found)
