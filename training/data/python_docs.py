"""The text every Python carries: its own documentation, some 2 MB of English, no download."""

import ast
import importlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

_NOT_DOCUMENTATION = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}


def python_docs() -> Iterator[str]:
    """The running Python's documentation, in an order that depends on nothing but its version.

    A document is a class's docstrings joined by blank lines, those of a module and its functions, or a topic of
    `help()`: small enough that the held-out ones resemble the others. A docstring appears once, however many
    classes inherit it.
    """
    seen: set[str] = set()
    for docstrings in _documents():
        fresh = []
        for docstring in map(inspect.cleandoc, docstrings):
            if docstring and docstring not in seen:
                seen.add(docstring)
                fresh.append(docstring)
        if fresh:
            yield "\n\n".join(fresh)


def _documents() -> Iterator[list[str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not _NOT_DOCUMENTATION.intersection(path.relative_to(library).parts):
            yield from source_docstrings(path)
    for name in sorted(sys.builtin_module_names):
        yield from builtin_docstrings(name)
    for topic in _topics():
        yield [topic]


def source_docstrings(path: Path) -> list[list[str]]:
    """Docstrings of a module with its functions, then of each of its classes, every list from top to bottom.

    They are read from the source: importing could do anything.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the standard library's own invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # a template or a test case of a broken file
    classes = [statement for statement in tree.body if isinstance(statement, ast.ClassDef)]
    rest = ast.Module([statement for statement in tree.body if statement not in classes], [])
    return [_docstrings_within(part) for part in (rest, *classes)]


def builtin_docstrings(name: str) -> Iterator[list[str]]:
    """The same of a module compiled into the interpreter. Only C objects count: programs replace others."""
    module = importlib.import_module(name)
    members = [member for _, member in sorted(vars(module).items())]
    yield _docstrings_of([module, *filter(inspect.isbuiltin, members)])
    for member in filter(inspect.isclass, members):
        attributes = [attribute for _, attribute in sorted(vars(member).items())]
        yield _docstrings_of([member, *(a for a in attributes if inspect.isroutine(a) or inspect.isdatadescriptor(a))])


def _docstrings_within(tree: ast.AST) -> list[str]:
    documented = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    documented.sort(key=lambda node: getattr(node, "lineno", 0))
    return [docstring for node in documented if (docstring := ast.get_docstring(node))]


def _docstrings_of(objects: Iterable[object]) -> list[str]:
    docstrings = (getattr(value, "__doc__", None) for value in objects)
    return [docstring for docstring in docstrings if isinstance(docstring, str)]


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return []
    return [text for _, text in sorted(topics.items())]
