"""Each concern has one home: nothing is written twice, and everybody knows where to look."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from toys import REPOSITORY, environment

PACKAGE = REPOSITORY / "sau"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in FILES}
NAMES = list(TREES)


NODES = {name: list(ast.walk(tree)) for name, tree in TREES.items()}
CALLS = {
    name: {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)} for name, nodes in NODES.items()
}


def files_with(wanted: Callable[[ast.AST], bool]) -> set[str]:
    return {name for name, nodes in NODES.items() if any(map(wanted, nodes))}


def calling(*names: str) -> set[str]:
    """Files that call one of these: a dotted name as it is written, or a plain one as a function or a method."""
    return {name for name, calls in CALLS.items() if any({call, call.split(".")[-1]} & {*names} for call in calls)}


def importing(*modules: str) -> set[str]:
    def wanted(node: ast.AST) -> bool:
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        return any(name == module or name.startswith(module + ".") for name in found for module in modules)

    return files_with(wanted)


def test_a_concern_has_one_home():
    assert importing("pickle") <= {"data/readers.py", "compat/torch_file.py"}
    assert calling("torch.load") <= {"record/folder.py", "compat/torch_file.py"}
    assert importing("yaml") <= {"errors.py", "config.py", "settings.py", "record/folder.py"}
    assert (importing("torch.optim") | calling("backward", "SGD", "Adam", "AdamW")) <= {"optim.py"}
    assert calling("fsync", "NamedTemporaryFile") <= {"files.py"}
    seeds = calling("manual_seed", "RandomState", "Random") - {"cli.py", "attack/base.py", "util.py"}
    assert all(name.startswith("data/") for name in seeds)


def test_torch_loads_tensors_and_plain_values_only():
    calls = [node for nodes in NODES.values() for node in nodes if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert loads and all("weights_only=True" in ast.unparse(call) for call in loads)


def test_nothing_is_executed_that_was_read():
    assert calling("exec", "system", "popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load") == set()

    def dangerous(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        plain_eval = ast.unparse(node.func) == "eval"  # not `.eval()`, the mode of a network
        return plain_eval or "shell" in {word.arg for word in node.keywords}

    assert files_with(dangerous) == set()


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_the_scripts_of_a_folder_are_the_same_bytes(kind):
    scripts = sorted((REPOSITORY / kind).iterdir())
    assert len(scripts) >= 3 and {script.suffix for script in scripts} == {".py"}
    assert len({script.read_bytes() for script in scripts}) == 1
    assert len(scripts[0].read_text().splitlines()) <= 12


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_files_and_functions_stay_short():
    long = [name for name in NAMES if len((PACKAGE / name).read_text().splitlines()) > 300]
    long += [f"{name}: {function}" for name in NAMES for function, lines in functions(TREES[name]) if lines > 60]
    assert long == []


def test_every_module_and_public_thing_says_what_it_is():
    """Except methods that implement one that is documented in a base class."""
    silent = []
    for name in NAMES:
        silent += [name] if not name.endswith("__init__.py") and not ast.get_docstring(TREES[name]) else []
        for node in TREES[name].body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                network = isinstance(node, ast.ClassDef) and any("Module" in ast.unparse(b) for b in node.bases)
                silent += [f"{name}: {node.name}"] if not ast.get_docstring(node) and not network else []
    assert silent == []


def test_importing_the_package_is_cheap():
    """It loads neither torch nor anything else that takes its time."""
    code = "import sys; before = set(sys.modules); import sau; print(*(set(sys.modules) - before))"
    env = environment(PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["sau"]


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
