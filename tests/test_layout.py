"""Imports point one way: no circle, and no room imports a command."""

import ast
from graphlib import TopologicalSorter

from tests.conftest import ROOT

COMMANDS = {"convert", "evaluate"}


def imports():
    """Return the modules of ours that each product module imports, wherever in it, for types alone too."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("data/*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    found = {}
    for name, path in names.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text()))]
        read = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                read |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = read & names.keys() - {name}
    return found


def test_no_import_circle_and_no_room_imports_a_command():
    found = imports()
    assert len(found) > 30 and "models.graph" in found["models.stages"]
    tuple(TopologicalSorter(found).static_order())  # raises CycleError, which names the circle
    assert [name for name, read in found.items() if read & COMMANDS] == []
