"""The rules of the house, read from the sources themselves."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "routing": {"routing"},
    "moe": {"routing", "moe"},
    "training": {"routing", "moe", "training"},
}
OURS = {*MAY_IMPORT, "tests", "benchmarks"}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST, inside_functions: bool = True) -> Iterator[str]:
    """Dotted names of everything imported; `from a import b` gives `a.b`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, inside_functions)


def within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def wrong_floor(package: str, tree: ast.AST) -> list[str]:
    """Imports that point up, sideways or nowhere (relative ones hide where they point)."""
    banned = {
        *OURS - MAY_IMPORT[package],
        *({"deepspeed", "torch.distributed"} if package != "training" else ()),
    }
    return [name for name in imports(tree) if name[0] == "." or any(within(name, b) for b in banned)]


def runs_loaded_code(tree: ast.AST) -> list[str]:
    """Uses of loaders that execute what they load."""
    picklers = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.load")
    found = [name for name in imports(tree) if any(within(name, p) for p in picklers)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append("torch.load")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_keeps_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text())
    relative = path.relative_to(ROOT)
    assert wrong_floor(relative.parts[0], tree) == []
    assert runs_loaded_code(tree) == []
    if relative != Path("training/engine.py"):
        assert [n for n in imports(tree, inside_functions=False) if within(n, "deepspeed")] == []


def test_every_package_is_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("package", "source", "expected"),
    [
        ("routing", "import moe.encoder", ["moe.encoder"]),
        ("routing", "def f():\n    from moe import block", ["moe.block"]),
        ("routing", "from . import losses", ["..losses"]),
        ("moe", "from routing import Router", []),
        ("moe", "from training.engine import Engine", ["training.engine.Engine"]),
        ("moe", "import torch.distributed as dist", ["torch.distributed"]),
        ("moe", "from torch import distributed", ["torch.distributed"]),
        ("moe", "def f():\n    import deepspeed.moe", ["deepspeed.moe"]),
        ("training", "import deepspeed, moe.block", []),
        ("training", "from tests.oracles import route", ["tests.oracles.route"]),
    ],
)
def test_floor_checker_sees(package: str, source: str, expected: list[str]) -> None:
    assert wrong_floor(package, ast.parse(source)) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = torch.load(f)", ["torch.load"]),
        ("from torch import load", ["torch.load"]),
        ("import pickle", ["pickle"]),
        ("np.load(f, allow_pickle=True)", ["allow_pickle"]),
        ("np.load(f, allow_pickle=False)", []),
        ("safetensors.torch.load_file(f)", []),
    ],
)
def test_pickle_checker_sees(source: str, expected: list[str]) -> None:
    assert runs_loaded_code(ast.parse(source)) == expected


def test_module_level_means_outside_functions() -> None:
    tree = ast.parse("try:\n    import deepspeed\nexcept ImportError: ...\ndef f():\n    import torch")
    assert list(imports(tree, inside_functions=False)) == ["deepspeed"]
