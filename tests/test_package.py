"""The package as a newcomer meets it: its names, its output in Python, and what it is called when it is installed."""

import re
from pathlib import Path

from toys import pair, tiny_net, toy_images

import sau
from sau import loop
from sau.attack import BadNet
from sau.defense import FT
from sau.optim import Training


def test_the_names_at_the_top_are_those_of_their_modules():
    from sau import attack, data, defense, evaluate, models

    homes = {
        "SAU": defense, "BadNet": attack, "Images": data.images, "Normalized": models, "score": evaluate,
        "der": evaluate,
    }  # fmt: skip
    assert {name: getattr(sau, name) for name in homes} == {name: getattr(home, name) for name, home in homes.items()}
    documented = re.findall(r"^    (\w+) ", sau.__doc__, re.M)
    assert {*documented} == {*homes} == {*sau._MODULES} and {*homes} <= {*dir(sau)}
    declared = re.findall(r"^    from sau\.\S+ import \w+ as (\w+)$", Path(sau.__file__).read_text(), re.M)
    assert {*declared} == {*homes}


def test_without_progress_only_warnings_are_printed(monkeypatch, capsys):
    (x, y), hidden = pair(24), []
    net = FT(epochs=30, lr=0.05, batch_size=8).purify(tiny_net(), (x, y), settings="as_given")
    monkeypatch.setattr(loop, "tqdm", lambda batches, *args, **given: hidden.append(given["disable"]) or batches)
    FT(epochs=2).purify(net, (x, y), settings="as_given")
    assert capsys.readouterr().out and hidden == [None, None]  # as tqdm decides
    FT(epochs=2).purify(net, (x, y), progress=False, settings="as_given")
    images = BadNet(pratio=0.2).poison_train(toy_images(40), 0)
    BadNet().fit(tiny_net(), images, Training(epochs=1, batch_size=20, lr_scheduler="constant"), progress=False)
    assert capsys.readouterr() == ("", "") and hidden[2:] == [True] * 3
    FT(epochs=1).purify(net, (x, (y + 1) % 4), progress=False)
    assert all(line.startswith("warning: ") for line in capsys.readouterr().out.splitlines())
