"""The notebooks run from the first cell to the last in smoke mode, with what Kaggle gives them.

Nothing here is skipped: without nbclient this file cannot be imported, and that is a failure.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from helpers.notebooks import (
    LIMIT,
    NOTEBOOKS,
    ROOT,
    WHEEL,
    environment,
    execute,
    printed,
    shown,
    write_cod10k,
    write_maps,
    write_wheel,
)

from camoxpert.cli import main

NAMES = ("kaggle_train", "kaggle_evaluate", "explain")
SHARED_CELLS = ("helpers", "helpers-text", "install", "install-text", "settings-text")


@pytest.fixture(scope="session")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data sets attached as Kaggle shows them."""
    root = tmp_path_factory.mktemp("kaggle_input")
    data = write_cod10k(root / "datasets" / "somebody" / "cod10k" / "COD10K-v3")
    write_wheel(root / "camoxpert-wheels")
    for name, strength in (("Rival", 0.9), ("Blind", 0.0)):
        write_maps(root / "other-models" / "maps" / name, data, strength=strength)
    return root


@pytest.fixture
def in_smoke_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that executes a notebook; the second value is its /kaggle/working."""

    def call(name: str, inputs: Path, **more: str) -> tuple[Any, Path]:
        working, site = tmp_path / "working", tmp_path / "site"
        working.mkdir()
        for key, value in (environment(inputs, working, site) | more).items():
            monkeypatch.setenv(key, value)
        read = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        book = execute(read, working)
        assert (site / "camoxpert" / "__init__.py").is_file(), "the wheel was not installed"
        assert f"camoxpert {WHEEL}" in printed(book, "install")
        return book, working

    return call


@pytest.fixture(scope="session")
def with_a_model(attached: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the inputs with the output of a training beside them."""
    root = tmp_path_factory.mktemp("with_a_model")
    for folder in attached.iterdir():
        (root / folder.name).symlink_to(folder)
    shutil.copytree(tiny_run, root / "notebooks" / "me" / "train" / "runs" / "tiny")
    return root


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 60)
def test_training_on_two_devices(attached: Path, in_smoke_mode: Callable[..., Any]) -> None:
    """torchrun starts two processes; the report and the scores are shown."""
    book, working = in_smoke_mode("kaggle_train", attached, CAMOXPERT_SMOKE_GPUS="2")
    run = working / "runs" / "cod10k"
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "finished" and info["batch"]["processes"] == 2
    # The two images without an object of each split are left out.
    assert info["images"]["training"] + info["images"]["validation"] == 24
    (result,) = json.loads((run / "evaluation" / "scores.json").read_text())["results"]
    assert result["dataset"] == "COD10K" and result["num_images"] == 8
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in (run / "model").iterdir()) == names
    assert "--nproc_per_node 2" in printed(book, "train") and "a new run" in printed(book, "resume")
    (page,) = shown(book, "result", "text/html")
    assert page.startswith("<iframe srcdoc=") and "COD10K" in page
    assert "Smeasure" in shown(book, "result", "text/markdown")[0]


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 60)
def test_training_continues_the_previous_version(
    attached: Path,
    in_smoke_mode: Callable[..., Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that stopped after two of its six steps is attached; the notebook trains the rest."""
    inputs = tmp_path_factory.mktemp("previous")
    for folder in attached.iterdir():
        (inputs / folder.name).symlink_to(folder)
    previous = inputs / "notebooks" / "me" / "train" / "runs"
    stop_after(2, words_of_the_notebook(inputs, previous), monkeypatch)
    before = json.loads((previous / "cod10k" / "run.json").read_text())
    assert before["status"] == "stopped"
    book, working = in_smoke_mode("kaggle_train", inputs)
    assert "continues the run of" in printed(book, "resume")
    said = printed(book, "train")
    assert "resumed     step_00000002.pt" in said and "torch.distributed" not in said
    run = working / "runs" / "cod10k"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    index = json.loads((run / "checkpoints" / "index.json").read_text())
    assert max(entry["step"] for entry in index) == 6


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 60)
def test_evaluating(with_a_model: Path, in_smoke_mode: Callable[..., Any]) -> None:
    """The model alone, then beside the maps of two others, with intervals and differences."""
    book, working = in_smoke_mode("kaggle_evaluate", with_a_model)
    (alone,) = json.loads((working / "evaluation" / "scores.json").read_text())["results"]
    assert alone["num_images"] == 8 and alone["intervals"]["Smeasure"]
    together = json.loads((working / "comparison" / "scores.json").read_text())
    scores = {row["method"]: row["scores"] for row in together["results"]}
    assert scores.keys() == {"ours", "Rival", "Blind"}
    assert scores["Rival"]["wFmeasure"] > 0.6 > scores["Blind"]["wFmeasure"]
    # The maps are those that the checkpoint's own scores are of, in 256 levels.
    assert scores["ours"]["MAE"] == pytest.approx(alone["scores"]["MAE"], abs=0.003)
    assert " to " in shown(book, "maps", "text/markdown")[0]
    assert len(shown(book, "curves", "image/png")) == 1
    assert "Rival" in printed(book, "curves") and "wFmeasure" in printed(book, "curves")


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 60)
def test_explaining(with_a_model: Path, in_smoke_mode: Callable[..., Any]) -> None:
    """Experts of three images, routing over the test set, and the images that fail."""
    book, working = in_smoke_mode("explain", with_a_model)
    out = working / "explain"
    pictures = sorted(path.name for path in out.glob("image_*.png"))
    assert len(pictures) == len(shown(book, "images", "image/png")) == 3
    assert not [name for name in pictures if "NonCAM" in name]
    assert "stride 32" in printed(book, "routing") and "texture" in printed(book, "routing")
    assert (out / "usage.png").is_file() and (out / "size.png").is_file()
    assert "Aquatic/Crab" in printed(book, "failures")
    names = re.findall(r"COD10K-CAM-\S+", printed(book, "worst"))
    assert len(names) == 6
    table = next((out / "evaluation" / "per_image").glob("*/*.csv")).read_text()
    assert all(name in table for name in names)


def words_of_the_notebook(inputs: Path, runs: Path) -> list[str]:
    """Return the words of ``camoxpert`` that the training notebook runs, with other runs."""
    cells = sources("kaggle_train")
    cells["train"] = cells["train"].rpartition("run(*program")[0]
    chosen = "\n".join(cells[key] for key in ("settings", "helpers", "smoke", "data", "train"))
    values: dict[str, Any] = {"__name__": "notebook"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment(inputs, runs.parent, runs).items():
            patch.setenv(key, value)
        exec(compile(chosen, "kaggle_train", "exec"), values)
    return [str(word) for word in (*values["words"], *values["MORE"])]


def stop_after(steps: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a deadline after some optimizer steps, as the end of a session would."""
    from camoxpert.stop import DEADLINE_CODE, Stop
    from camoxpert.training import trainer

    taken: list[int] = []
    honest = trainer.train_step

    def step(*given: Any, **named: Any) -> Any:
        taken.append(1)
        return honest(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        patch.setattr(Stop, "code", lambda stop: DEADLINE_CODE if len(taken) >= steps else 0)
        assert main(words) == DEADLINE_CODE


def book_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return found


def sources(name: str) -> dict[str, str]:
    return {cell["id"]: "".join(cell["source"]) for cell in book_of(name)["cells"]}


def test_a_notebook_that_hangs_is_ended(tmp_path: Path) -> None:
    """Together with the command that it waits for."""
    cell = nbformat.v4.new_code_cell(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(900)'])\n"
        "open('pid', 'w').write(str(child.pid))\nchild.wait()"
    )
    with pytest.raises(TimeoutError, match="longer than 15 seconds"):
        execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path, limit=15.0)
    started = tmp_path / "pid"
    while started.is_file() and is_running(int(started.read_text())):
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "State:\tZ" not in status


def test_every_notebook_is_executed_here() -> None:
    source = Path(__file__).read_text()
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)
    assert all(f'in_smoke_mode("{name}"' in source for name in NAMES)
    assert not re.search(r"import" + r"orskip|pytest\.sk" + "ip|mark.sk" + "ip", source)


def test_outputs_are_stripped_and_a_notebook_with_them_is_named(tmp_path: Path) -> None:
    tool = load_tool()
    assert all(tool.stripped(book_of(name)) == book_of(name) for name in NAMES)
    run = book_of("explain")
    code = next(cell for cell in run["cells"] if cell["cell_type"] == "code")
    code |= {"execution_count": 3, "outputs": [{"output_type": "stream", "text": "x"}]}
    run["metadata"]["widgets"] = {}
    tool.FOLDER = tmp_path
    (tmp_path / "explain.ipynb").write_text(json.dumps(run))
    assert tool.main(check=True) == 1 and tool.main(check=False) == 0
    assert tool.main(check=True) == 0
    text = (tmp_path / "explain.ipynb").read_text()
    assert text == (NOTEBOOKS / "explain.ipynb").read_text()


def load_tool() -> Any:
    from importlib import util

    spec = util.spec_from_file_location("notebooks_tool", ROOT / "tools" / "notebooks.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_cells(name: str) -> None:
    """Ids are readable and unique, cells short, and no command's exit code is lost."""
    nbformat.validate(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4))
    cells = book_of(name)["cells"]
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z-]+", i) for i in ids)
    assert ids.index("settings") == 2, "settings come first"
    for key, source in sources(name).items():
        assert len(source.splitlines()) <= 50, key
        lines = [line.strip() for line in source.splitlines()]
        assert not [line for line in lines if line.startswith(("!", "%"))], key
        assert "os.system" not in source and "/work/" not in source


def test_what_the_notebooks_share_is_equal() -> None:
    for key in SHARED_CELLS:
        assert len({sources(name)[key] for name in NAMES}) == 1, key


def test_a_command_that_fails_stops_the_notebook(tmp_path: Path, monkeypatch) -> None:
    """``run`` raises for a code that is not expected, and only then."""
    monkeypatch.setenv("CAMOXPERT_KAGGLE_WORKING", str(tmp_path))
    monkeypatch.setenv("CAMOXPERT_KAGGLE_INPUT", str(tmp_path))
    values: dict[str, Any] = {}
    exec(sources("kaggle_train")["helpers"], values)
    leave = [sys.executable, "-c", "import sys; print('said'); sys.exit(75)"]
    assert values["run"](*leave, ok=(0, 75)) == 75
    with pytest.raises(RuntimeError, match="exit code 75"):
        values["run"](*leave)
    with pytest.raises(FileNotFoundError, match="Attach it"):
        values["first"]("auto", ["Train/GT_Object"], "COD10K")
