"""Faults of the program: leaks, uninitialised memory, evaluation that depends on the batch,
optional parts that fail, and help that must not import torch."""

from __future__ import annotations

import ast
import gc
import os
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import TINY_SETTINGS, train_in
from hypothesis import given, settings
from hypothesis import strategies as st

from camoxpert.config import build_config
from camoxpert.data.files.manifest import load_eval
from camoxpert.data.loader import device_batches
from camoxpert.errors import CheckpointError
from camoxpert.evaluation.model import evaluate_model
from camoxpert.evaluation.options import ScoringOptions
from camoxpert.evaluation.output import OutputFolder
from camoxpert.files import read_jsonl
from camoxpert.inference.predictor import load_predictor
from camoxpert.losses import total_loss
from camoxpert.models.camoxpert import build_model
from camoxpert.models.moe import DISPATCH, MoE
from camoxpert.models.router import choose
from camoxpert.runs import log as runlog
from camoxpert.runs.log import RunLog
from camoxpert.runtime import gpu
from camoxpert.runtime.gpu import GpuMonitor
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training import trainer
from camoxpert.training.compiling import compile_model
from camoxpert.training.prepare import prepare
from camoxpert.training.stages import training_loader
from camoxpert.training.steplog import LateReader

ROOT = Path(__file__).parents[2]
TINY = {
    **TINY_SETTINGS,
    "train.batch_size": 2,
    "optim.lr": 1e-3,
}


def tiny(data: Path, **values: object):
    named = {key.replace("__", "."): value for key, value in values.items()}
    return prepare(build_config({**TINY, "data.roots": [str(data)], **named}))


class TestLeaks:
    """Memory and tensors of a run, measured at the same point of an epoch."""

    @staticmethod
    def census() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    @staticmethod
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def figures(self, data: Path, folder: Path, monkeypatch, steps: tuple[int, int]) -> list:
        """Train, and return (tensors, resident bytes) after each of two steps."""
        run = tiny(data, train__epochs=-(-steps[1] // 15), data__val_fraction=0.0)
        seen, count = [], 0
        original = trainer.train_step

        def watched(*words, **options):
            nonlocal count
            values = original(*words, **options)
            count += 1
            if count in steps:
                seen.append((self.census(), self.resident()))
            return values

        monkeypatch.setattr(trainer, "train_step", watched)
        train_in(run, folder, tensorboard=True)
        return seen

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        generate_toy(tmp_path / "toy", num_train=30, num_test=0, size=40, difficulty=0.1, seed=0)
        return tmp_path / "toy"

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figures")
    def test_two_hundred_steps_keep_nothing(self, data: Path, tmp_path: Path, monkeypatch) -> None:
        (early, small), (late, large) = self.figures(data, tmp_path / "r", monkeypatch, (50, 200))
        assert late == early
        assert large <= 1.05 * small

    def test_a_reader_that_hoards_is_noticed(self, data: Path, tmp_path: Path, monkeypatch) -> None:
        hoard = []
        original = LateReader.push

        def push(self, values, note=None):
            hoard.append(values["loss"])
            return original(self, values, note)

        monkeypatch.setattr(LateReader, "push", push)
        (early, _), (late, _) = self.figures(data, tmp_path / "r", monkeypatch, (20, 35))
        assert late - early == 15


@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_no_parameter_is_left_as_memory_was_found(family: str, monkeypatch) -> None:
    """Every tensor that torch.empty makes starts as NaN: a missing initialisation would show."""
    config = build_config({**TINY, "model.expert_family": family, "model.shared_expert": "edge"})
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    made = poisoned(monkeypatch)
    model = build_model(config.model).eval()
    assert len(made) > 20
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert not tensor.is_meta and tensor.isfinite().all(), name
    assert model(images).logits_B1HW.isfinite().all()


def test_an_initialisation_left_out_is_noticed(monkeypatch) -> None:
    config = build_config({**TINY, "model.expert_family": "uniform"})
    monkeypatch.setattr(torch.nn.init, "uniform_", lambda tensor, *bounds, **named: tensor)
    poisoned(monkeypatch)
    model = build_model(config.model)
    lost = {name for name, p in model.named_parameters() if not p.isfinite().all()}
    assert any("enter_EDC" in name for name in lost)


def poisoned(monkeypatch) -> list[int]:
    """Let torch.empty return NaN; return a list that counts its tensors."""
    made: list[int] = []
    original = torch.empty

    def empty(*shape, **options):
        tensor = original(*shape, **options)
        if tensor.is_floating_point() and not tensor.is_meta:
            made.append(tensor.numel())
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    return made


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (8, 0), (3, 2), (8, 2)])
def test_scores_depend_on_neither_batch_workers_nor_order(
    batch_size: int, workers: int, tiny_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """To the last bit: scores, per-image rows and the hash of the data.

    The number of images of a forward pass is checked as well: a convolution of this size rounds the
    same for any number, a large one does not.
    """
    predictor = load_predictor(tiny_run)
    manifest = load_eval(toy_data)["toy"]
    sizes: list[int] = []
    predictor.model.register_forward_pre_hook(lambda model, words: sizes.append(len(words[0])))

    def scored(name: str, size: int, count: int, backwards: bool):
        pairs = manifest.pairs[::-1] if backwards else manifest.pairs
        options = ScoringOptions(gallery=0, intervals=False)
        with OutputFolder(tmp_path / name) as folder:
            (result,) = evaluate_model(
                predictor,
                {"toy": replace(manifest, pairs=pairs)},
                options,
                batch_size=size,
                num_workers=count,
                output=folder,
            )
            folder.finish()
        rows = (tmp_path / name / "per_image" / "tiny" / "toy.csv").read_text().splitlines()
        seen = tuple(sizes)
        sizes.clear()
        return result.scores, result.data_hash, sorted(rows), seen

    expected = scored("a", 2, 0, False)
    assert sum(expected[3]) == len(manifest)
    assert scored("b", batch_size, workers, False) == expected
    scores, *others = scored("c", batch_size, workers, True)
    assert tuple(others) == expected[1:]
    # The order of the sums differs: the mean may differ in its last bit, but no image's score.
    assert scores == pytest.approx(expected[0], rel=1e-14)


@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("constant", [0.0, 200.0, -200.0])
def test_batches_without_object_or_background_have_a_finite_step(
    fill: int, constant: float
) -> None:
    torch.manual_seed(0)
    # Every loss there is; at 200 the probabilities are exactly 0 and 1.
    every = {f"loss.{name}": 1.0 for name in ("structure", "bce", "iou", "dice")}
    config = build_config({**TINY, **every})
    model = build_model(config.model).train()
    output = model(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    output = output._replace(logits_B1HW=output.logits_B1HW * (constant == 0) + constant)
    loss, terms = total_loss(output, torch.full((2, 1, 32, 32), fill / 255.0), config.loss)
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_uniform_family_compiles_once_and_learns_the_same(toy_data: Path, monkeypatch) -> None:
    """No graph break, one graph per shape, and the loss of the uncompiled model."""
    from torch._dynamo.utils import counters

    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, *words, **named: original(
            module, *words, **named | {"backend": "aot_eager"}
        ),
    )
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        run = tiny(
            toy_data, model__expert_family="uniform", train__batch_size=6, train__use_ema=False
        )
        if compiled:
            compile_model(run.model)
        loader = training_loader(run, 6)
        loader.set_epoch(0)
        batches = device_batches(loader, run.device)
        losses.append([float(trainer.train_step(run, [b])["loss"]) for b, _ in batches])
        loader.close()
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 6),
    experts=st.integers(1, 5),
    share=st.floats(0, 1),
    pattern=st.sampled_from(["random", "tied", "one expert", "one left out"]),
    family=st.sampled_from(["specialist", "uniform"]),
)
def test_any_routing_gives_the_loops_output_and_gradients(
    batch: int, experts: int, share: float, pattern: str, family: str
) -> None:
    top_k = 1 + round(share * (experts - 1))
    torch.manual_seed(batch)
    moe = MoE(8, num_experts=experts, top_k=top_k, family=family)
    logits = torch.randn(batch, experts)
    if pattern == "tied":
        logits.zero_()
    elif pattern == "one expert":
        logits[:, -1] += 30
    elif pattern == "one left out":
        logits[:, 0] -= 30
    routing = choose(logits, top_k)
    assert routing.experts_BK.shape == (batch, top_k)
    assert all(len(set(row)) == top_k for row in routing.experts_BK.tolist())
    x = torch.randn(batch, 8, 3, 3)
    found = {}
    for name in DISPATCH if family == "uniform" else ("loop", "sorted", "dense"):
        moe.zero_grad()
        leaf, gates = x.clone().requires_grad_(), routing.gates_BK.clone().requires_grad_()
        y = DISPATCH[name](moe.experts, leaf, routing._replace(gates_BK=gates), None)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        own = [p.grad for p in moe.experts.parameters()]
        found[name] = [y.detach(), leaf.grad, gates.grad, *own]
    for name, tensors in found.items():
        for mine, loops in zip(tensors, found["loop"], strict=True):
            zero = torch.zeros(1)
            torch.testing.assert_close(
                zero if mine is None else mine,
                torch.zeros_like(zero if mine is None else mine) if loops is None else loops,
                rtol=1e-4, atol=1e-5, msg=name,
            )  # fmt: skip


MISTAKES = (
    ["synthesize", "compose", "--csv", "a.csv", "-o", "out", "--decoys", "2"],
    ["synthesize", "relight", "--csv", "a.csv", "-o", "out", "--per-image", "0"],
    ["train", "--lrr", "3"],
    ["train", "--lr", "fast"],
    ["train", "--scheduler", "cosin"],
    ["train", "--top-k", "9"],
    ["train", "--config", "twice.yaml"],
    ["train", "--config", "evil.yaml"],
    ["train", "optim.lrr=1"],
    ["train", "--no-amp", "--precision", "bf16"],
    ["train"],
    ["trian"],
    ["evaluate", "--gt", "x"],
    ["predict", "x"],
)
HELP = (
    *(["--help"], ["--version"], *([c, "--help"] for c in ("train", "evaluate", "predict"))),
    *(["synthesize", kind, "--help"] for kind in ("relight", "compose")),
)


def test_mistakes_and_help_are_answered_without_torch(tmp_path: Path) -> None:
    """Check the imports rather than the time, which depends on the machine."""
    (tmp_path / "twice.yaml").write_text("optim: {lr: 1}\noptim: {lr: 2}")
    (tmp_path / "evil.yaml").write_text("run: {name: !!python/object/apply:os.system [x]}")
    code = (
        "import sys, io, contextlib\n"
        "from camoxpert.cli import main\n"
        f"for typed, code in [(m, 2) for m in {MISTAKES!r}] + [(h, 0) for h in {HELP!r}]:\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as err, "
        "contextlib.redirect_stdout(io.StringIO()):\n"
        "        try: got = main(typed)\n"
        "        except SystemExit as left: got = left.code\n"
        "    assert got == code, (typed, got, err.getvalue())\n"
        "    assert 'Traceback' not in err.getvalue(), typed\n"
        "heavy = {'torch', 'numpy', 'timm', 'cv2', 'albumentations', 'matplotlib', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    words = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


OPTIONAL = {"matplotlib", "tensorboard", "pynvml", "skimage"}


def imported_at_once(source: str) -> set[str]:
    """Return the packages that a module imports outside functions."""
    found = set()
    waiting = list(ast.parse(source).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return {"tensorboard" if "tensorboard" in name else name.split(".")[0] for name in found}


def test_optional_packages_are_imported_where_they_are_used() -> None:
    """At the top of a file a missing package would end every command, and no test in a process
    that has it loaded would notice."""
    for path in (ROOT / "camoxpert").rglob("*.py"):
        assert not OPTIONAL & imported_at_once(path.read_text()), path
    for source in (
        "import matplotlib.figure",
        "class A:\n    import pynvml",
        "try:\n    from torch.utils.tensorboard import SummaryWriter\nfinally:\n    x = 1",
    ):
        assert OPTIONAL & imported_at_once(source)
    assert not OPTIONAL & imported_at_once("def f():\n    import matplotlib")


class TestOptionalParts:
    def test_a_run_continues_without_any_of_them(
        self, train, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        """TensorBoard and matplotlib cannot be imported: a warning and a sentence in the report."""
        for name in ("torch.utils.tensorboard", "tensorboard", "matplotlib", "matplotlib.figure"):
            monkeypatch.setitem(sys.modules, name, None)
        assert train("--epochs", "1", "--tensorboard", "--run-name", "r") == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
        assert len(said) == 1 and "not available" in said[0]
        assert "No chart of training loss" in (tmp_path / "r" / "report.html").read_text()
        assert (tmp_path / "r" / "evaluation" / "scores.json").is_file()
        assert not list((tmp_path / "r").glob("events*"))

    def test_a_disk_that_fills_up_under_tensorboard(self, tmp_path: Path, capsys) -> None:
        """Its thread fails; the next call notices, warns, and does not wait for the thread."""
        log = RunLog(tmp_path, tensorboard=True)
        log.scalars(1, {"a": 1.0})
        thread = log._writer.file_writer.event_writer._async_writer

        class Full:
            def write(self, data: bytes) -> None:
                raise OSError(28, "No space left on device")

            flush = close = lambda self: self.write(b"")

        thread._writer = thread._worker._record_writer = Full()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("threading.excepthook", lambda caught: None)
            log.scalars(2, {"a": 1.0})
            # The thread fails on this event before the next one is added.
            thread._worker.join(10)
        assert not thread._worker.is_alive()
        for step in range(3, 40):
            log.scalars(step, {"a": 1.0, "b": 2.0})
            log.image("c", np.zeros((4, 4, 3), np.uint8), step)
            log.write({"step": step})
        log.close()
        said = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
        assert len(said) == 1 and "No space left" in said[0] and "the run continues" in said[0]
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 37

    def test_nvml_that_fails_half_way_leaves_the_last_reading(self, monkeypatch) -> None:
        nvml, calls = types.ModuleType("pynvml"), []

        def rates(handle: object) -> types.SimpleNamespace:
            calls.append(handle)
            if len(calls) > 2:
                raise RuntimeError("GPU is lost")
            return types.SimpleNamespace(gpu=40)

        nvml.nvmlInit = lambda: None
        nvml.nvmlDeviceGetHandleByIndex = lambda index: index
        nvml.nvmlDeviceGetUtilizationRates = rates
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(gpu, "PERIOD_SECONDS", 0.001)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with GpuMonitor("cuda:0") as monitor:
                monitor._thread.join(10)
                assert monitor.utilisation() == 40 and monitor.text() == "gpu=40%"
                assert monitor.memory() is None
        assert len(calls) == 3, "it does not ask a lost device again"


class TestRecords:
    def test_a_full_disk_is_a_paragraph(self, tmp_path: Path, monkeypatch) -> None:
        log = RunLog(tmp_path, tensorboard=False)
        log.write({"step": 1})

        class Full:
            def write(self, text: str) -> None:
                raise OSError(28, "No space left on device")

            def close(self) -> None:
                raise OSError(28, "No space left on device")

        honest, log._file = log._file, Full()
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            log.write({"step": 2})
        said = str(caught.value)
        assert str(tmp_path) in said and "MB are free there" in said
        assert "The checkpoints already written are intact" in said
        assert caught.value.exit_code == 4
        log.close()
        honest.close()

        def full(*words: object, **named: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(runlog, "write_bytes", full)
        log = RunLog(tmp_path, tensorboard=False)
        with pytest.raises(CheckpointError, match="No space left"):
            log.truncate_after(1)
        assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]

    def test_a_vanished_folder_is_a_paragraph(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        log = RunLog(folder, tensorboard=False)
        log.write({"step": 1})
        (folder / "metrics.jsonl").unlink()
        folder.rmdir()
        with pytest.raises(CheckpointError, match="No such file or directory") as caught:
            log.write({"step": 2})
        assert str(folder) in str(caught.value) and "The folder is gone" in str(caught.value)
        log.close()
        assert not folder.exists()
