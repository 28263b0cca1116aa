"""The test plan's rows that no other file has: names, spoiled folders, leakage, small clean sets."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from defense_rows import ROWS
from torch import nn
from toys import QUICK, quiet, same_weights, the_error, tiny_net, toy_images

from sau.data.images import to_float
from sau.data.sources import check_clean_set
from sau.defense import CLP, EP, FT
from sau.errors import DataError
from sau.loop import Session

# P1: names


def test_results_that_would_go_through_a_link_are_not_written(victim, tmp_path, here, script):
    """A record that was downloaded may have links in the places of what is made from it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("defense", "audit", "figures"):
        (victim / name).symlink_to(outside)
    status, _, err = here("defense", "ft", "--result_file", "victim", "--epochs", "1", *QUICK)
    assert status == 2 and "is a link that leads out" in the_error(err)
    small = "--samples 20 --threads 1 --device cpu --parts relearn --epochs 1 --shots 1".split()
    for argv in (("audit.py", "--result_file", "victim", *small), ("figures.py", "victim")):
        status, _, err = script(*argv)
        assert status == 2 and "is a link that leads out" in err.splitlines()[-1]
    assert not any(outside.iterdir())


# V4: clean sets


@pytest.mark.parametrize("shared", [2, 3, 200])
def test_up_to_a_hundredth_of_a_clean_set_may_be_test_images(shared):
    clean, test = toy_images(200, seed=1), toy_images(200)
    pixels = torch.cat([test.pixels[:shared], clean.pixels[shared:]])
    if shared == 2:
        notes = check_clean_set(replace(clean, pixels=pixels), test)
        assert notes == ["2 of 200 clean images are test images, too"]
    else:
        with pytest.raises(DataError, match=f"{shared} of 200"):
            check_clean_set(replace(clean, pixels=pixels), test)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (range(40), []),
        ([2], ["none of 3 of 4 classes: 0, 1, 3"]),
        ([0, 1, 2, 3, 3, 2], ["2 of 6 clean images are copies of others"]),
    ],
)
def test_small_and_lopsided_clean_sets_are_noted(rows, words):
    notes = check_clean_set(toy_images(40, seed=6)[torch.tensor([*rows])], toy_images(8, seed=5))
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize(
    ("defense", "count", "wanted"),
    [
        (FT(epochs=0, batch_size=8), 1, ["have none of 3 of 4 classes: 0, 1, 3"]),
        (EP(batch_size=8), 2, ["the poisoned images have none of 2"]),
        (CLP(batch_size=8), 1, []),  # looks at no images
    ],
    ids=["clean", "poisoned", "blind"],
)
def test_a_notebook_is_told_what_a_command_says_of_the_clean_set(defense, count, wanted):
    some, said = toy_images(40, seed=6)[torch.arange(2, 2 + count)], list[str]()
    for data in ((some.pixels, some.labels), [(some.pixels, some.labels)]):
        said.clear()
        defense.purify(tiny_net(), data, session=Session(say=said.append))
        notes = [line for line in said if line.startswith("note: ")]
        assert len(notes) == len(wanted) and all(text in note for text, note in zip(wanted, notes, strict=True))
    said.clear()
    defense.purify(tiny_net(), data, session=Session(say=said.append, data_checked=True))
    assert not any(line.startswith("note: ") for line in said)


def test_the_record_keeps_what_was_said_of_the_clean_set(victim, tmp_path, here):
    (tmp_path / "one.txt").write_text("5\n")
    flags = ("--result_file", "victim", "--index", "one.txt", "--epochs", "1", *QUICK)
    status, out, err = here("defense", "ft", *flags)
    assert status == 0 and out.count("note: the clean images have none of 9 of 10 classes") == 1, err
    notes = yaml.safe_load((victim / "defense" / "ft" / "config.yaml").read_text())["notes"]
    assert len(notes) == 1 and "9 of 10 classes" in notes[0]


# E2: no defense sees the test sets


@pytest.mark.parametrize("name", [name for name in ROWS])
def test_a_defense_never_asks_for_the_test_sets(name):
    """Whatever the judge would say: without `select=oracle` it is not asked, and the weights are the same bytes."""

    def judge(model: nn.Module) -> Any:
        pytest.fail("a defense asked for scores on the test sets")

    images = toy_images(20)
    pair = to_float(images.pixels), images.labels
    one = ROWS[name].defense.purify(tiny_net(), pair, session=quiet())
    other = ROWS[name].defense.purify(tiny_net(), pair, session=Session(say=lambda text: None, judge=judge))
    assert same_weights(one, other)
