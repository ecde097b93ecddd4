"""Imports point backwards along the line that the package's README draws, lazy ones and those for types, too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path("badloss_jax")
LINE = """
    core -> settings -> models, data, attacks -> trajectories -> training -> scoring -> defenses -> config -> sweep
    -> evaluation -> report -> runs -> benchmarks -> cli
"""
PLACE = {room.strip(): place for place, rooms in enumerate(LINE.split("->")) for room in rooms.split(",")}
FILES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")}


def imports(module):
    """Yields (what a module imports of the package, as a module, and where that stands)."""
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{FILES[module]}:{node.lineno}: a relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]
            names = [name if name in FILES else node.module for name in names]
        for name in names:
            if name.split(".")[0] == "badloss_jax":
                yield name, f"{FILES[module]}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"


def room(module):
    return module.split(".")[1]


def test_imports_point_backwards():
    wrong = []
    for module in FILES.keys() - {"badloss_jax", "badloss_jax.__main__"}:
        for other, line in imports(module):
            if other == "badloss_jax" or (room(other) != room(module) and PLACE[room(other)] >= PLACE[room(module)]):
                wrong.append(line)
    assert not wrong, "against the arrow:\n" + "\n".join(sorted(wrong))


def test_no_circle():
    graph = {module: {other for other, _ in imports(module) if other != module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
        lines = [line for a, b in zip(circle[1:], circle, strict=False) for other, line in imports(a) if other == b]
        raise AssertionError("a circle:\n" + "\n".join(lines)) from None


def test_files_are_rooms():
    assert not [str(path) for path in FILES.values() if len(path.read_text("utf-8").splitlines()) > 400]
