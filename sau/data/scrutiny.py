"""What may be wrong with a defender's clean pictures, by looking at them."""

import hashlib

from sau.data.images import Images
from sau.errors import DataError

OVERLAP = 0.01  # share of the clean pictures that may be among the test pictures; official sets have a few twins


def scrutinise(clean: Images, test: Images, batch_size: int) -> list[str]:
    """What to know about the clean pictures before a result is believed, a line each.

    Raises DataError if more than `OVERLAP` of them are test pictures: no figure would mean anything.
    """
    known, sums = {*_sums(test)}, _sums(clean)
    shared = sum(one in known for one in sums)
    if shared > OVERLAP * len(clean):
        raise DataError(
            f"{shared} of {len(clean)} clean pictures are test pictures, too; give the defense pictures of its own"
        )
    missing = sorted({*range(clean.num_classes)} - {*clean.labels.tolist()})
    notes = []
    if shared:
        notes.append(f"{shared} of {len(clean)} clean pictures are test pictures, too")
    if missing:
        names = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        notes.append(f"the clean pictures have none of {len(missing)} of {clean.num_classes} classes: {names}")
    if twins := len(sums) - len({*sums}):
        notes.append(f"{twins} of {len(clean)} clean pictures are copies of others")
    if len(clean) < batch_size:
        notes.append(f"{len(clean)} clean pictures are less than a batch of {batch_size}")
    return notes


def _sums(images: Images) -> list[bytes]:
    return [hashlib.sha256(pixels.tobytes()).digest() for pixels in images.pixels.cpu().numpy()]
