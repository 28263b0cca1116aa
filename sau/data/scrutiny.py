"""What may be wrong with a defender's pictures, by looking at them."""

import hashlib

from torch import Tensor

from sau.data.images import Images
from sau.errors import DataError

OVERLAP = 0.01  # share of the clean pictures that may be among the test pictures; official sets have a few twins


def scrutinise(given: Images, test: Images, batch_size: int, kind: str = "clean") -> list[str]:
    """What to know about a defender's pictures, of which `kind` they are, before a result is believed, a line each.

    Raises DataError if more than `OVERLAP` of them are test pictures: no figure would mean anything.
    """
    known, sums = {*_sums(test)}, _sums(given)
    shared = sum(one in known for one in sums)
    if shared > OVERLAP * len(given):
        raise DataError(
            f"{shared} of {len(given)} {kind} pictures are test pictures, too; give the defense pictures of its own"
        )
    notes = []
    if shared:
        notes.append(f"{shared} of {len(given)} {kind} pictures are test pictures, too")
    if twins := len(sums) - len({*sums}):
        notes.append(f"{twins} of {len(given)} {kind} pictures are copies of others")
    return notes + remarks(given.labels.bincount(minlength=given.num_classes), batch_size, kind)


def remarks(counts: Tensor, batch_size: int, kind: str = "clean") -> list[str]:
    """What the numbers of a defender's pictures alone say, a line each.

    Args:
        counts: how many there are of each class [K].
        batch_size: of the method; 0 where the caller makes the batches.
        kind: of the pictures.
    """
    notes, total, missing = [], int(counts.sum()), (counts == 0).nonzero().flatten().tolist()
    if missing:
        names = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        notes.append(f"the {kind} pictures have none of {len(missing)} of {len(counts)} classes: {names}")
    if total < batch_size:
        notes.append(f"{total} {kind} pictures are less than a batch of {batch_size}")
    return notes


def _sums(images: Images) -> list[bytes]:
    return [hashlib.sha256(pixels.tobytes()).digest() for pixels in images.pixels.cpu().numpy()]
