"""An attacked network and its pictures, to and from a record: all that a defense needs, without trigger code."""

import torch

from sau.data.images import Images
from sau.errors import RecordError
from sau.models import Normalized, build
from sau.record import Record


def save(record: Record, model: Normalized, poisoned: Images, triggered: Images) -> None:
    """Store the weights, the poisoned training pictures (those whose role is not clean) and the triggered test set."""
    record.save_tensors("model", model.net.state_dict())
    kept = poisoned[(poisoned.role > 0).nonzero().flatten()]
    for part, images in (("poisoned", kept), ("triggered", triggered)):
        if len(images):
            record.save_tensors(part, images.tensors())


def load_model(record: Record) -> Normalized:
    """The network of a checked record, on the CPU; RecordError if the weights are not those of the named network."""
    made = record.config["model"]
    model = build(made["name"], made["classes"], width=made["width"], mean=made["mean"], std=made["std"])
    weights, own = record.load_tensors("model"), model.net.state_dict()
    for name in {**own, **weights}:
        got, wanted = (tuple(part[name].shape) if name in part else "nothing" for part in (weights, own))
        if got != wanted:
            raise RecordError(
                f"{record.path}: {name} has {got}, but {made['name']} of width {made['width']} has {wanted}"
            )
    model.net.load_state_dict(weights)
    return model.eval()


def load_images(record: Record, part: str, device: torch.device) -> Images | None:
    """The `triggered` or `poisoned` pictures of a checked record; None for a clean network, which has none."""
    if not (record.path / f"{part}.safetensors").is_file():
        return None
    return Images(**record.load_tensors(part), num_classes=record.config["model"]["classes"]).to(device)
