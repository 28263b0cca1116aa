"""FT: plain fine-tuning on the clean images, the first control of every comparison."""

from sau.defense.base import TrainingDefense


class FT(TrainingDefense):
    """Minimise CE(h(x), y) over all weights, batch norm in train mode."""

    name = "ft"
    compiles = True

    augment: bool = True
