"""Imports point down only; the house keeps its shape."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "camoxpert"
# The rooms of the house from the bottom up; a room imports from lower layers and its own.
LAYERS = (
    {"errors", "stop", "text", "files", "console"},
    {"config", "metrics", "runtime"},
    {"models", "runs"},
    {"data", "losses", "pages"},
    {"inference", "synthesis", "doctor"},
    {"evaluation"},
    {"training", "export"},
    {"serve", "benchmark", "profile"},
    {"cli"},
)
# Inside a layer each of these is above the ones it names; the others do not know each other.
BESIDE = {
    "console": {"stop", "errors"},
    "files": {"stop", "errors"},
    "stop": {"errors"},
    "runtime": {"config"},
    "profile": {"benchmark"},
    "benchmark": {"profile"},
}
ALLOWED = {
    room: set().union(*LAYERS[:level]) | BESIDE.get(room, set())
    for level, layer in enumerate(LAYERS)
    for room in layer
}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(source: str) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module]
                if node.module != "camoxpert"
                else [f"camoxpert.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("camoxpert.")}
    return parts


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    above = imported_parts(path.read_text()) - ALLOWED[part] - {part}
    assert not above, f"{path.name} in {part} imports {above}"


def test_the_check_sees_a_forbidden_import() -> None:
    source = (
        "def f():\n    from camoxpert.training.trainer import train\n    import camoxpert.cli\n"
    )
    assert imported_parts(source) - ALLOWED["models"] == {"training", "cli"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_front_door_is_short() -> None:
    assert len((ROOT.parent / "train_ultimate.py").read_text().splitlines()) <= 20
