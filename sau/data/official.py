"""The official data sets in numbers: what tells a subset, what a grid checks beforehand, what foreign folders hold."""

from dataclasses import dataclass

from sau.data.images import Images


@dataclass(frozen=True)
class Official:
    """A whole data set.

    Args:
        classes: how many it has.
        train: training pictures; where the set exists in several sizes, the benchmark's first.
        test: test pictures.
        even: whether all classes have equally many training pictures.
    """

    classes: int
    train: tuple[int, ...]
    test: int
    even: bool = True


# GTSRB's training archive has 39,209 pictures, the one that torchvision fetches 26,640.
OFFICIAL = {
    "cifar10": Official(10, (50_000,), 10_000),
    "cifar100": Official(100, (50_000,), 10_000),
    "gtsrb": Official(43, (39_209, 26_640), 12_630, even=False),
    "tiny": Official(200, (100_000,), 10_000),
}


def subset_note(name: str, train: Images, test: Images) -> str | None:
    """One line if a data set is not the whole official one; None if it is, or if there is no official one."""
    whole = OFFICIAL.get(name)
    if whole is None or (len(train) in whole.train and len(test) == whole.test):
        return None
    return (
        f"subset of {name}: {len(train):,} of {whole.train[0]:,} training and {len(test):,} of {whole.test:,} test "
        f"pictures; no figure from it speaks for {name}"
    )
