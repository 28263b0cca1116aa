"""The examples of CONTRIBUTING.md are code: what they promise is tried."""

import importlib.util
import re
import sys
from pathlib import Path

import torch
from toys import REPOSITORY

from sau.compat import weights
from sau.compat.weights import guess
from sau.data.sources import SOURCES, load
from sau.evaluate import score
from sau.loop import Session
from sau.models import MODELS, build
from sau.optim import Training


def blocks() -> dict[str, str]:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"```python (\w+)\n(.*?)```", text, re.S))


def test_the_examples_for_contributors_work(tmp_path: Path, monkeypatch):
    """An attack, a defense, a data set and a network, as CONTRIBUTING.md spells them, through one run of each."""
    modules = {}
    for name, code in blocks().items():
        (tmp_path / f"example_{name}.py").write_text(code)
        spec = importlib.util.spec_from_file_location(f"example_{name}", tmp_path / f"example_{name}.py")
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"example_{name}", modules[name])
        spec.loader.exec_module(modules[name])
    try:
        train, test = load("stripes")
        origin = SOURCES["stripes"]
    finally:
        del SOURCES["stripes"]
    try:
        plain = build("plain", 7, width=5, mean=origin.mean, std=origin.std)
        torch.save(plain.net.state_dict(), tmp_path / "plain.pt")
        known = guess(weights.read(tmp_path / "plain.pt"))
    finally:
        del MODELS["plain"]
    assert known is not None and (known.name, known.width, known.classes) == ("plain", 5, 7)
    assert plain(train.pixels[:3] / 255).shape == (3, 7)
    attack, quiet = modules["attack"].Frame(pratio=0.2), Session(say=lambda text: None)
    torch.manual_seed(67280421310721)  # four epochs are not enough from every start
    net = build("preactresnet18", 2, width=4, mean=origin.mean, std=origin.std)
    recipe = Training(epochs=4, batch_size=32, lr=0.05, lr_scheduler="constant")
    attack.fit(net, attack.poison_train(train, 0), recipe, session=quiet)
    triggered = attack.poison_test(test)
    assert score(net, test, triggered).acc.percent > 90
    fixed = modules["defense"].LastLayer(epochs=1).purify(net, test, session=quiet)
    assert score(fixed, test, triggered).acc.percent > 90
