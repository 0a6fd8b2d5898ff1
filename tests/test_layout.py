"""Imports point one way: a table of what each room may import, and no circle."""

import ast
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

# A room -> the rooms of ours that it may import: files, and folders, whose own files may import each other.
MAY_IMPORT = {
    "convert.py": "models/conversion models/checkpoint.py models/files models/keras models/common data",
    "evaluate.py": "models/evaluation models/checkpoint.py models/scaling.py models/keras models/common data",
    "models/resnet8.py": "models/files",
    "models/graph.py": "",
    "models/mapping.py": "",
    "models/scaling.py": "",
    "models/activations.py": "models/resnet8.py",
    "models/equivalents.py": "models/resnet8.py",
    "models/checkpoint.py": "models/resnet8.py models/scaling.py models/files data/files.py",
    "models/conversion": (
        "models/resnet8.py models/graph.py models/mapping.py models/scaling.py models/activations.py "
        "models/keras models/common data"
    ),
    "models/evaluation": (
        "models/resnet8.py models/equivalents.py models/scaling.py models/checkpoint.py "
        "models/files models/keras models/conversion/placing.py models/common data"
    ),
    "models/keras": "models/mapping.py models/scaling.py models/common data",
    "models/files": "models/scaling.py models/common data/files.py",
    "models/common": "data/files.py",
    "data": "",
}
MAY_IMPORT = {room: others.split() for room, others in MAY_IMPORT.items()}


def product_files():
    """Return the product's files by module name, the empty `__init__.py` aside."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("data/*.py")]
    names = {path.relative_to(ROOT): path for path in files if path.name != "__init__.py"}
    return {".".join(name.with_suffix("").parts): path for name, path in names.items()}


def imports(nodes):
    """Return the modules that syntax nodes import, and the names from them, which may be modules too."""
    read = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            read |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return read


def arrows():
    """Return which files each file of ours imports, wherever in it, for types alone too."""
    files = product_files()
    found = {}
    for name, path in files.items():
        read = imports(list(ast.walk(ast.parse(path.read_text())))) & files.keys() - {name}
        found[path.relative_to(ROOT).as_posix()] = {
            files[other].relative_to(ROOT).as_posix() for other in read
        }
    return found


def posix(path):
    return path.relative_to(ROOT).as_posix()


def room_of(file):
    return next(room for room in MAY_IMPORT if file == room or file.startswith(f"{room}/"))


def test_every_file_imports_what_its_room_may():
    found = arrows()
    assert len(found) > 30 and "models/graph.py" in found["models/conversion/matching.py"]
    wrong = [
        f"{file} imports {other}"
        for file, read in found.items()
        for other in read
        if room_of(file) != room_of(other)
        and not any(other == may or other.startswith(f"{may}/") for may in MAY_IMPORT[room_of(file)])
    ]
    assert wrong == []


def test_every_room_of_the_table_is_there_and_uses_what_it_may():
    """A line that nothing needs any more goes."""
    found = arrows()
    for room, may in MAY_IMPORT.items():
        read = set().union(*(others for file, others in found.items() if room_of(file) == room))
        assert any(room_of(file) == room for file in found), room
        idle = [one for one in may if not any(other == one or other.startswith(f"{one}/") for other in read)]
        assert idle == [], (room, idle)


def test_there_is_no_circle():
    tuple(TopologicalSorter(arrows()).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    "file", ["models/resnet8.py", "models/graph.py", "models/mapping.py", "models/scaling.py"]
)
def test_the_front_row_imports_nothing_of_ours_at_its_top(file):
    top = imports(ast.parse((ROOT / file).read_text()).body)
    assert not [name for name in top if name.partition(".")[0] in ("models", "data", "tests")]
    others = {name.partition(".")[0] for name in top}
    assert others <= {"resnet8.py": {"torch", "warnings", "collections", "pathlib"}}.get(
        file.rpartition("/")[2], {"__future__", "typing", "math", "dataclasses", "numpy"}
    )
