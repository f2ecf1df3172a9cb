"""Imports point down only; the house keeps its shape."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "camoxpert"
LEAVES = {"data", "models", "losses", "metrics"}
# What each part may import; everything else of the package is above it or beside it.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "config": {"errors"},
    **{leaf: {"config", "files", "errors"} for leaf in LEAVES},
    "observe": {"config", "files", "errors"},
    "training": {"observe", *LEAVES, "config", "files", "errors"},
    "doctor": {*LEAVES, "config", "files", "errors"},
    "inference": {"training", "observe", *LEAVES, "config", "files", "errors"},
    "benchmark": {"inference", "training", "observe", *LEAVES, "config", "files", "errors"},
    "cli": {
        "doctor",
        "benchmark",
        "inference",
        "training",
        "observe",
        *LEAVES,
        "config",
        "files",
        "errors",
    },
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
