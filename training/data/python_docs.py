"""The text every Python carries: its own documentation, some 2 MB of English, no download."""

import ast
import importlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_NOT_DOCUMENTATION = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}


def python_docs() -> Iterator[str]:
    """The running Python's documentation, in an order that depends on nothing but its version.

    A document is a module's docstrings joined by blank lines, or a topic of `help()`. A docstring appears
    once, however many classes inherit it.
    """
    seen: set[str] = set()
    for docstrings in _modules():
        fresh = []
        for docstring in map(inspect.cleandoc, docstrings):
            if docstring and docstring not in seen:
                seen.add(docstring)
                fresh.append(docstring)
        if fresh:
            yield "\n\n".join(fresh)


def _modules() -> Iterator[list[str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not _NOT_DOCUMENTATION.intersection(path.relative_to(library).parts):
            yield source_docstrings(path)
    for name in sorted(sys.builtin_module_names):
        yield list(builtin_docstrings(name))
    for topic in _topics():
        yield [topic]


def source_docstrings(path: Path) -> list[str]:
    """A module's docstrings from top to bottom, read from its source: importing could do anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the standard library's own invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # a template or a test case of a broken file
    documented = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    documented.sort(key=lambda node: getattr(node, "lineno", 0))
    return [docstring for node in documented if (docstring := ast.get_docstring(node))]


def builtin_docstrings(name: str) -> Iterator[str]:
    """Docstrings of a module compiled into the interpreter. Only C objects count: programs replace others."""
    module = importlib.import_module(name)
    yield from _docstring(module)
    for _, member in sorted(vars(module).items()):
        if inspect.isclass(member):
            yield from _docstring(member)
            for _, attribute in sorted(vars(member).items()):
                if inspect.isroutine(attribute) or inspect.isdatadescriptor(attribute):
                    yield from _docstring(attribute)
        elif inspect.isbuiltin(member):
            yield from _docstring(member)


def _docstring(value: object) -> Iterator[str]:
    docstring = getattr(value, "__doc__", None)
    if isinstance(docstring, str):
        yield docstring


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return []
    return [text for _, text in sorted(topics.items())]
