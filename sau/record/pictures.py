"""The pictures of a result folder."""

from sau.data.images import Images
from sau.errors import DataError, RecordError
from sau.record.folder import Record


def load_images(record: Record, part: str) -> Images | None:
    """The `triggered` or `poisoned` pictures of a checked record; None for a clean network, which has none."""
    if not (record.path / f"{part}.safetensors").is_file():
        return None
    try:
        found = Images.restore(record.load_tensors(part), record.config["model"]["classes"])
        if (got := list(found.pixels.shape[1:])) != (wanted := record.config["model"]["shape"]):
            raise DataError(f"stored pictures are {got}, but the network takes {wanted}")
        return found
    except DataError as error:
        raise RecordError(f"{record.path / part}.safetensors: {error}") from None
