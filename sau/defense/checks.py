"""What a defense is given, checked, and what it leaves behind.

The network is copied, and given back as it came; clean images come batch by batch, on its device and in [0, 1]. At the
end stands a verdict that needs no trigger: the smallest shared patch.

A backdoor is a small change that sends any image to one class. For a class c a patch is a mask m in [0, 1]^(H x W) and
a pattern p, applied as x' = (1 - m) x + m p; of those that send 9 of 10 clean images of other classes to c the search
keeps the one with the smallest |m|_1 (Neural Cleanse, Wang et al., S&P 2019). It looks at the attacked network h_b.
Then the smallest of these patches is grown, from where it is, until it sends half of the images to its class in h_b and
in the purified h alike: a shared adversarial example of SAU that is the same for all images. A backdoor that survives,
if only on a part of the images, keeps its patch far smaller than those of the other classes.
"""

import math
import timeit
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sau.data.batches import Batches, first_batch, seeded, unaugmented
from sau.data.images import check_counts
from sau.device import free_memory
from sau.errors import ConfigError, TrainingError, lacks_memory
from sau.loop import RunContext, forecast
from sau.models import normalized
from sau.pgd import CLASSES, STEPS, SUSPICIOUS, patch_of_each_class, smallest_patches
from sau.types import Batched, Labels, Pixels

MAX_ACC_DROP, GOOD_ACC = 0.1, 0.95  # shares of the clean images; from the second on nothing is wrong
LARGE = 1e9  # bytes of an update that are worth a line
SHUFFLED = 20  # images that chance does not sort by class
SEARCH_IMAGES = 40  # at most, of the verdict's first search
GROW_IMAGES, GROW_SHARE = 60, 0.5  # of its second one, and what the grown patch must lead


def has_batch_norm(model: nn.Module) -> bool:
    """Whether it has batch norm."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def unwrap(model: Any) -> nn.Module:
    """The network itself, where torch.compile wrapped it; ConfigError for what cannot be purified."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"model is {type(model).__name__}, allowed is an nn.Module; load its weights into one")
    normalized.check_initialised(model)
    if not (parameters := list(model.parameters())):
        raise ConfigError("the network has no weights (parameters), so that there is nothing to purify")
    if short := [p.dtype for p in parameters if p.is_floating_point() and p.itemsize < 4]:
        raise ConfigError(f"weights are {short[0]}, which loses small updates; give model.float()")
    return model


def copy_to(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` on `device`, in eval mode, without gradients and compiled layers."""
    mine = normalized.copied(model).to(device)
    mine.zero_grad()
    for module in list(mine.modules()):  # hooks, by which methods look into a network, do not run in compiled layers
        for name, layer in list(module._modules.items()):  # a layer may have several names
            if layer is not None and hasattr(layer, "_orig_mod"):
                setattr(module, name, layer._orig_mod)
    mine.eval()
    return normalized.to_channels_last(mine)


def restore(mine: nn.Module, model: nn.Module, frozen: Iterable[nn.Parameter]) -> nn.Module:
    """`mine`, once a copy of `model`, with those weights frozen, and with that one's memory format and device."""
    for parameter in frozen:
        parameter.requires_grad_(False)
    mine.zero_grad()  # or the caller's optimiser would repeat the last step of the defense
    if all(parameter.is_contiguous() for parameter in model.parameters()):  # files of tensors want that
        mine.to(memory_format=torch.contiguous_format)
    mine.eval()  # a user's own `eval` and `train` may return nothing
    return mine.to(next(model.parameters()).device)


def check_gradients(method: Any, model: nn.Module, x: Pixels) -> bool:
    """Whether a verdict is possible: `method` follows gradients on clean images, and the logits of `model` have one to
    its images `x`. ConfigError if they are probabilities, or have none to the weights, or to the images where `method`
    needs that."""
    if method.gradients == "none":
        return False
    with torch.enable_grad():
        normalized.check_logits(z := normalized.logits_of(model, x := x[:8].detach().requires_grad_()))
        into = (x, *model.parameters())
        images, *weights = torch.autograd.grad(z.sum(), into, allow_unused=True) if z.requires_grad else (None,)
    follows = {"images": images is not None, "weights": any(gradient is not None for gradient in weights)}
    if missing := [name for name in ("weights", method.gradients) if not follows[name]]:
        advice = "take no_grad, detach or numpy out of its forward, or try clp, bnp or ep"
        raise ConfigError(f"the logits have no gradient to the {missing[0]}, as {method.name} needs; {advice}")
    return follows["images"] and method.data_use != "poisoned"


def search_seconds(model: nn.Module, x: Pixels) -> float:
    """About what the verdict's searches take, where a gradient takes as long as a pass."""
    few = x[:8]
    with torch.no_grad():
        classes = model(few).shape[1]  # this pass also sets the device up
        times = timeit.repeat(lambda: float(model(few).sum()), number=1, repeat=4)  # the number waits for the device
    passes = 2 * STEPS * min(CLASSES, classes) * min(SEARCH_IMAGES, len(x))
    return passes * min(times) / len(few)  # some waited for other programs


def check_cost(
    method: Any, model: nn.Module, x: Pixels, batches: Batched, images: int, verdict: bool, say: Callable[[str], None]
) -> bool:
    """Before updates on `images` like `x`, in `batches`: say what they and the searches for patches, of SAU and for the
    verdict if there is one, take where that is much. Where there is less memory, warn, or have the network compute its
    activations twice; returns whether it does."""
    if method.gradients == "none":
        return False
    searches = verdict + (3 if getattr(method, "patches", 0) else 0)  # SAU's are six, of half as many images
    forecast("the search for patches", searches * search_seconds(model, x) if searches else 0.0, say)
    count = min(batches.size, images) if isinstance(batches, Batches) else len(x)
    count = max(count, images - count * (len(batches) - 1))  # the last batch may have a few more
    needed, free = update_bytes(model, x, count), free_memory(x.device)
    if twice := needed > free and checkpointed(getattr(model, "net", model)):
        say("activations are computed twice (activation checkpointing), for memory would not hold them")
        needed = update_bytes(model, x, count)
    takes = f"memory: an update on {count} images takes about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if needed > free:
        say(f"warning: {takes}; give smaller batches or images")
    elif needed > LARGE:
        say(takes)
    return twice


def checkpointed(net: Any) -> bool:
    """Turn activation checkpointing on in a network of timm or open_clip that supports it; returns whether it was
    off. Batch norm would count images twice in its statistics."""
    if has_batch_norm(net) or getattr(net, "grad_checkpointing", False):
        return False
    try:
        net.set_grad_checkpointing()
    except (AttributeError, AssertionError):  # of another library, or not supported
        return False
    return True


def update_bytes(model: nn.Module, x: Pixels, count: int) -> float:
    """About what an update on `count` images takes: three times the tensors that a forward pass keeps, for two losses
    and their gradients, and six times the weights. The peaks of tests/test_given.py are within a factor of two."""
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(x := x[:8].detach().requires_grad_())  # while they live, no other has their place
    del logits
    activations = sum(size for place, size in kept.items() if place not in fixed)
    return 3 * activations * count / len(x) + 6 * sum(weight.nbytes for weight in model.parameters())


def check_weights(model: nn.Module) -> None:
    """TrainingError if a weight, or a buffer that is saved, is not finite."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not normalized.is_finite(tensor):
            raise TrainingError(f"{name} of the network holds NaN or infinity")


def predictions(model: nn.Module, batches: Batched) -> tuple[Tensor, Tensor, int]:
    """Of the clean images as they are: predicted and given labels [N], and how many classes the network has."""
    answers, labels, classes = list[Tensor](), list[Tensor](), 0
    for x, y, *_ in unaugmented(batches):
        logits = normalized.logits_of(model, x)
        classes = logits.shape[1]
        answers.append(logits.argmax(1))
        labels.append(y.clone())  # a loader may fill the same tensor again
    normalized.check_labels(torch.cat(labels), classes)
    return torch.cat(answers), torch.cat(labels), classes


def correct_if_normalised(model: normalized.Normalized, batches: Batched) -> int:
    """How many clean images `model`, which does not normalise, classifies correctly if its images are normalised, with
    the mean and deviation of a batch of them."""
    x, _ = first_batch(unaugmented(batches))
    stats = x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).clamp_min(1e-3).tolist()
    answers, labels, _ = predictions(normalized.Normalized(model.net, *stats, model.amp).to(x.device), batches)
    return int((answers == labels).sum())


@torch.no_grad()
def check_before(method: Any, model: normalized.Normalized, batches: Batched, session: RunContext) -> tuple[float, int]:
    """Say the share of clean images that `model` classifies correctly, and warn of what stands out.

    Returns that share and the number of images. Raises TrainingError for weights that are not finite, DataError for
    labels of no class.
    """
    check_weights(model)
    answers, labels, classes = predictions(model, batches)
    right, total, kind = int((answers == labels).sum()), len(labels), method.data_use.replace("none", "clean")
    session.say(f"the network classifies {right:,} of {total:,} {kind} images correctly ({100 * right / total:.1f} %)")
    half_way = total * (1 + 1 / classes) / 2  # from chance to all; an attacked network has nearly its full ACC
    if right < half_way:
        usual = "check mean and std, the order of the channels and of the classes, and the size of the images"
        few = f"the network classifies only {right:,} of {total:,} {kind} images correctly"
        session.say(f"warning: {few}; {usual}, unless it was trained too little")
    more = correct_if_normalised(model, batches) if model.mean is None and right < GOOD_ACC * total else 0
    if more > right + max(MAX_ACC_DROP * total, 5):
        found = f"on normalised images it classifies {more:,} of {total:,} correctly"
        session.say(f"warning: {found}; give the mean and std that the network was trained with")
    if method.data_use != "none":
        counts, runs = labels.bincount(minlength=classes), 1 + int((labels.diff() != 0).sum())
        present = int(counts.count_nonzero())
        if 1 < present and runs <= present and len(batches) > 1 and total >= max(SHUFFLED, 2 * present):
            session.say("warning: the loader gives the images class by class; give one that shuffles")
        if (joined := getattr(batches, "joined", 1)) > 1:
            session.say(f"note: the loader's batches of one image are joined to batches of {joined}")
        for missing in check_counts(counts, kind):
            session.say(f"warning: {missing}; the network may forget them" if kind == "clean" else f"note: {missing}")
    return right / total, total


@torch.no_grad()
def check_after(method: Any, model: nn.Module, batches: Batched, before: float, session: RunContext) -> None:
    """TrainingError if a weight is not finite. Warns if many clean images that were classified correctly `before` no
    longer are, as after a jump of the loss in the last rounds: the one harm that a defender sees."""
    check_weights(model.eval())
    if method.data_use == "poisoned":  # without its backdoor a network errs on the attacker's images
        return
    answers, labels, _ = predictions(model, batches)
    after = float((answers == labels).double().mean())
    if before - after > MAX_ACC_DROP:
        fell = f"the accuracy on the clean images fell from {100 * before:.0f} to {100 * after:.0f} %"
        session.say(f"warning: {fell}; try a smaller --lr, fewer --epochs or other settings")


# The verdict


def verdict_of(
    attacked: nn.Module, purified: nn.Module, x: Pixels, y: Labels, say: Callable[[str], None]
) -> dict[str, Any]:
    """The verdict on two networks in eval mode, from a few clean images, said and returned; {} with a warning where
    memory ran out. Weights of `attacked` take no gradients from then on.

    Returns sizes of patches in pixels, None where no patch works:
        sizes: by class, the smallest that sends 9 of 10 images there in the attacked network.
        before, typical: their minimum and median (of two classes the maximum).
        after: that of `before`, grown until it sends half of the images there in both networks.
        doubts: whether `after` is below half of `typical`.
    """
    x, y, attacked = x[:GROW_IMAGES], y[:GROW_IMAGES], attacked.requires_grad_(False)
    old, new = attacked.state_dict(), purified.state_dict()
    if old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old):
        say("warning: the defense changed no weight")
    say("last, the smallest patches are searched, of the network before and after")  # a minute or two on a CPU
    try:
        with seeded(1):
            few = x[:SEARCH_IMAGES], y[:SEARCH_IMAGES]
            classes, masks, patterns, sizes = patch_of_each_class(attacked, *few)
            one = sizes.argmin().view(1)
            after = smallest_patches([purified, attacked], GROW_SHARE, x, y, classes[one], masks[one], patterns[one])[2]
    except (RuntimeError, MemoryError) as error:  # the defense itself is done, and its result must not be lost
        if not lacks_memory(error):
            raise
        advice = f"a batch_size below {SEARCH_IMAGES} makes it smaller"
        say(f"warning: no verdict, because its search ran out of memory; {advice}")
        return {}
    two = len(sizes) == 2 and bool(sizes.isfinite().all())
    typical = sizes.max() if two else sizes.median()  # torch's median of two is the smaller
    found = {"before": float(sizes.min()), "after": float(after), "typical": float(typical)}
    by_class = dict(zip(map(str, classes.tolist()), sizes.tolist(), strict=True))
    doubts = found["after"] < SUSPICIOUS * found["typical"]
    verdict = {**rounded(found), "doubts": doubts, "sizes": rounded(by_class)}
    for line in lines(verdict):
        say(line)
    return verdict


def rounded(sizes: Mapping[str, float]) -> dict[str, float | None]:
    """Sizes as a record keeps them; None for an infinite one."""
    return {name: None if math.isinf(size) else round(size, 3) for name, size in sizes.items()}


def lines(verdict: Mapping[str, Any]) -> list[str]:
    """What `verdict_of` found in words, after a warning where there are doubts."""
    before, after, typical = (
        "none" if verdict[name] is None else f"{verdict[name]:.1f} pixels" for name in ("before", "after", "typical")
    )
    found = f"smallest patch that leads images to one class: {before} before, {after} after (other classes: {typical})"
    doubts = "the backdoor may stay: a small patch still leads both networks to one class; try other settings"
    return [f"warning: {doubts} or more clean images"] * verdict["doubts"] + [f"{found}; this is no proof"]
