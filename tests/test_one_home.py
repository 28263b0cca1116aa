"""What has one home stays there (CONTRIBUTING.md, "How the library is cut"), and files stay short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toys import REPOSITORY

CORE = sorted((REPOSITORY / "sau").rglob("*.py"))
TEXTS = {file.relative_to(REPOSITORY).as_posix(): file.read_text() for file in CORE}

HOMES = {
    r"\bargparse\b": {"sau/config.py"},
    r"^import yaml|yaml\.(safe_)?(load|dump|compose)": {"sau/yamlfile.py", "sau/record.py"},
    r"(?<!safetensors\.)\btorch\.save\(": {"sau/record.py", "sau/export.py"},
    r"(?<!safetensors\.)\btorch\.load\(": {"sau/record.py", "sau/foreign.py"},
    r"\bpickle\.Unpickler\b": {"sau/data/cifar.py"},
    r"^\s*(for epoch in|while .*epoch)": {"sau/loop.py"},
    r"\.backward\(\)": {"sau/optim.py", "sau/device.py"},  # the second times a step that moves nothing
    r"torch\.optim\.(SGD|Adam)": {"sau/optim.py"},
    r"\bmanual_seed\(": {"sau/cli.py", "sau/data/images.py", "sau/defense/inputs.py"},
    r"(?<!\w)print\(": {"sau/cli.py", "sau/record.py", "sau/data/cifar.py", "sau/data/cache.py"},
    r"deepcopy\(": {"sau/defense/base.py", "sau/defense/sau.py"},
    r"sys\.path": set(),
    r"0\.4914": {"sau/data/sources.py"},
    r"\.add_argument\(": {"sau/config.py"},
    r"weights_only=False|allow_pickle=True": set(),
}


@pytest.mark.parametrize(("pattern", "homes"), HOMES.items(), ids=HOMES)
def test_one_home(pattern, homes):
    found = {name for name, text in TEXTS.items() if re.search(pattern, text, re.M)}
    assert found == homes


def test_loads_are_restricted():
    for name, text in TEXTS.items():
        for call in re.findall(r"(?<!safetensors\.)torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, name


def test_files_and_functions_stay_short():
    for name, text in TEXTS.items():
        assert text.count("\n") <= 210, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 60, f"{name}: {node.name}"


def test_a_folder_of_scripts_holds_one_script():
    """The name of the file is the name of the method; nothing else may differ."""
    for folder in ("attack", "defense"):
        assert len({file.read_text() for file in (REPOSITORY / folder).glob("*.py")}) == 1


def test_importing_the_package_is_cheap():
    code = "import sys, sau; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPOSITORY).returncode == 0


def blocks() -> dict[str, str]:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"```python (\w+)\n(.*?)```", text, re.S))


def test_the_examples_for_contributors_work(tmp_path: Path, monkeypatch):
    """An attack, a defense and a data set, as CONTRIBUTING.md spells them, through one run of each."""
    import importlib.util

    from sau import loop
    from sau.data.sources import SOURCES, load
    from sau.evaluate import score
    from sau.models import build
    from sau.optim import Training

    modules = {}
    monkeypatch.setattr("sau.data.sources.SOURCES", SOURCES)
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
    attack, quiet = modules["attack"].Frame(pratio=0.2), loop.Session(say=lambda text: None)
    net = build("preactresnet18", 2, width=4, mean=origin.mean, std=origin.std)
    recipe = Training(epochs=4, batch_size=32, lr=0.05, lr_scheduler="constant")
    attack.fit(net, attack.poison_train(train, 0), recipe, session=quiet)
    triggered = attack.poison_test(test)
    assert score(net, test, triggered).acc.percent > 90
    fixed = modules["defense"].LastLayer(epochs=1).purify(net, test, session=quiet)
    assert score(fixed, test, triggered).acc.percent > 90
