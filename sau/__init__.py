"""Backdoor attacks and defenses for image classifiers; the heart is Shared Adversarial Unlearning.

What most scripts need is here, and imported on first use, since it takes PyTorch along:

    SAU         the defense; `SAU().purify(model, loader)` (all: `sau.defense`)
    BadNet      the attack with a patch (all: `sau.attack`)
    Images      images with labels and what an attack did to them
    Normalized  a network that expects normalised pixels, as one that takes pixels in [0, 1]
    score       ACC, ASR and R-ACC of a network
    der         what a defense gained and cost: the defense effectiveness rating of two scores
"""

from os import environ as _environ

__version__ = "0.1.0"

# Threads that wait for each other sleep instead of spinning: faster where other programs need the cores, a tenth slower
# where none does (docs/performance.md). OpenMP reads this when PyTorch is imported.
_environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TYPE_CHECKING = False  # as `typing` has it, whose import takes a while
if TYPE_CHECKING:
    from sau.attack import BadNet as BadNet
    from sau.data.images import Images as Images
    from sau.defense import SAU as SAU
    from sau.evaluate import der as der
    from sau.evaluate import score as score
    from sau.models import Normalized as Normalized

_MODULES = {
    "BadNet": "sau.attack",
    "Images": "sau.data.images",
    "Normalized": "sau.models",
    "SAU": "sau.defense",
    "der": "sau.evaluate",
    "score": "sau.evaluate",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'sau' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
