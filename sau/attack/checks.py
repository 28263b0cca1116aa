"""Whether a network and images can be trained on."""

import copy

import torch
from torch import Tensor, nn

from sau.data.images import Images, to_float
from sau.errors import ConfigError, DataError
from sau.evaluate import answering
from sau.models import check_initialised, check_labels, check_logits, logits_of
from sau.seeds import seeded


def check_victim(model: nn.Module, images: Images) -> None:
    """Refuse what cannot be trained: ConfigError for weights that are frozen or get no gradient, DataError for pictures
    that do not fit."""
    if not isinstance(images, Images) or not len(images):
        what = "none" if isinstance(images, Images) else f"a {type(images).__name__}"
        raise DataError(f"the pictures to train on are {what}, allowed are Images, at least one; see Images.clean")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the network is a {type(model).__name__}, allowed is a torch.nn.Module")
    check_initialised(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("the weights of the network are frozen, so nothing would learn; call requires_grad_() on it")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ConfigError("the network was made under inference_mode, so its weights cannot learn; make it outside")
    with torch.inference_mode(False), torch.enable_grad(), answering(model):
        logits = logits_of(model, to_float(images.pixels[:8]))
    check_labels(images.labels, logits.shape[1])
    check_logits(logits)
    if not logits.requires_grad and not _learns(model, to_float(images.pixels[:1])):
        raise ConfigError(
            "what the network answers has no gradient to its weights, so nothing would learn; take no_grad, detach or "
            "numpy out of its forward"
        )


def _learns(model: nn.Module, x: Tensor) -> bool:
    """Whether what `model` answers in train mode has a gradient; asked of a copy, whose statistics may move."""
    with torch.inference_mode(False), torch.enable_grad(), seeded(0):
        return bool(copy.deepcopy(model).train()(torch.cat([x, x])).requires_grad)
