"""FT: plain fine-tuning on the clean images, the first control of every comparison."""

from dataclasses import dataclass
from typing import ClassVar

from sau.defense.base import TrainingDefense


@dataclass(frozen=True, kw_only=True)
class FT(TrainingDefense):
    """Minimise CE(h(x), y) over all weights, batch norm in train mode."""

    name: ClassVar[str] = "ft"
    compiles: ClassVar[bool] = True

    augment: bool = True

    def supports_microbatch(self) -> bool:
        return True
