"""What is released: wheel and source archive, built here and installed where the checkout is not.

The environment is a new one; only the libraries are those that run the tests, through a .pth file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import camoxpert

pytest.importorskip("build", reason="build is not installed")
pytest.importorskip("setuptools", reason="setuptools is not installed")

ROOT = Path(__file__).parents[2]
FOLDERS = ("camoxpert", "tests", "docs", "configs", "tools", "examples", "benchmarks")


def clean() -> dict[str, str]:
    """Return an environment in which the checkout cannot be found."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def call(*words: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd, env=clean(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (wheel, source archive); the wheel is built from the archive."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    # A build leaves files beside the sources: not in the checkout.
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=source)
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    again = tmp_path_factory.mktemp("again")
    call(sys.executable, "-m", "build", "--no-isolation", "-w", "-o", again, ".", cwd=source)
    (direct,) = again.glob("*.whl")
    assert contents(direct) == contents(wheel)
    return wheel, archive


def contents(wheel: Path) -> dict[str, str]:
    """Return name -> hash of every file of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        return {name: hashlib.sha256(file.read(name)).hexdigest() for name in file.namelist()}


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of programs of an environment that has the wheel."""
    home = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    (packages,) = home.glob("lib/python*/site-packages")
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
    call(
        sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet",
        "--no-deps", "--no-index", "--disable-pip-version-check", built[0], cwd=home,
    )  # fmt: skip
    return programs


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = set(contents(built[0]))
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "camoxpert").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert ours <= names, ours - names
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == ours
    assert "camoxpert/py.typed" in names and "camoxpert/pages/templates/report.html.j2" in names
    assert any(name.endswith("licenses/LICENSE") for name in information)


def test_the_archive_is_the_checkout(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    expected = {
        *("Makefile", "mkdocs.yml", "train_ultimate.py", "CHANGELOG.md", "SECURITY.md"),
        *("docs/index.md", "docs/images/demo.jpg", "configs/demo.yaml", "tools/demo.py"),
        *("tests/conftest.py", "tests/golden/format_1.json", "CITATION.cff"),
    }
    assert expected <= names, expected - names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith("runs")]


def test_the_installed_program_answers_without_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    where = "import camoxpert; print(camoxpert.__file__, camoxpert.__version__)"
    place, version = call(installed / "python", "-c", where, cwd=tmp_path).split()
    assert Path(place).is_relative_to(installed.parent) and version == camoxpert.__version__
    said = call(installed / "camoxpert", "--version", cwd=tmp_path)
    assert said == f"camoxpert {camoxpert.__version__}\n"
    assert "exit codes" in call(installed / "camoxpert", "--help", cwd=tmp_path)
    assert "--dataset-path" in call(installed / "camoxpert", "train", "--help", cwd=tmp_path)


def test_the_installed_program_works(installed: Path, tmp_path: Path) -> None:
    program = installed / "camoxpert"
    scene = ("--train", 1, "--test", 3, "--size", 32)
    call(program, "synthesize", "toy", "data", *scene, cwd=tmp_path)
    masks = tmp_path / "data" / "TestDataset" / "toy" / "GT"
    call(program, "evaluate", "--predictions", masks, "--gt", masks, "-o", "out", cwd=tmp_path)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Smeasure" in page or "S-measure" in page


def test_the_version_is_told_everywhere_alike() -> None:
    version = camoxpert.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.M)
    assert released, f"CHANGELOG.md has no section of {version}"
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {released[1]}\n" in citation
    assert f"camoxpert-{version}-py3-none-any.whl" in (ROOT / "docs" / "install.md").read_text()
    first, *_ = re.findall(r"^## (.+)$", changelog, re.M)
    assert first == "[Unreleased]"
    sections = set(re.findall(r"^### (.+)$", changelog, re.M))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
