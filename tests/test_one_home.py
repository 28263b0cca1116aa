"""Each concern has one home: nothing is written twice, and everybody knows where to look."""

import ast
import sys

import pytest
from toys import REPOSITORY

from sau.attack import ATTACKS
from sau.defense import DEFENSES

METHODS = {"attack": ATTACKS, "defense": DEFENSES}
PACKAGE = REPOSITORY / "sau"
TREES = {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def test_torch_loads_tensors_and_plain_values_only():
    """What else runs code that was read is refused by ruff: pickles, eval, exec, shells, YAML's other loaders."""
    nodes = [ast.unparse(node) for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in nodes if call.startswith("torch.load(")]
    assert loads and all("weights_only=True" in call for call in loads)


@pytest.mark.parametrize("kind", METHODS)
def test_the_scripts_of_a_folder_are_its_methods_and_the_same_bytes(kind):
    scripts = sorted((REPOSITORY / kind).iterdir())
    assert [script.name for script in scripts] == sorted(f"{name}.py" for name in METHODS[kind])
    assert len({script.read_bytes() for script in scripts}) == 1
    assert len(scripts[0].read_text().splitlines()) <= 12


def test_files_and_functions_stay_short():
    long = [name for name in TREES if len((PACKAGE / name).read_text().splitlines()) > 300]
    for name, tree in TREES.items():
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        long += [f"{name}: {node.name}" for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    assert long == []


def test_requirements_cover_the_imports():
    """Every third-party module that the package imports is installed with it, or only where it is asked for."""
    required = (REPOSITORY / "requirements.txt").read_text() + (REPOSITORY / "setup.py").read_text()
    distribution = {"skimage": "scikit-image", "yaml": "PyYAML", "PIL": "Pillow", "sklearn": "scikit-learn"}
    third = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            third |= {name.split(".")[0] for name in names} - {"sau", ""}
    third -= set(sys.stdlib_module_names)
    assert [name for name in sorted(third) if distribution.get(name, name) not in required] == []
