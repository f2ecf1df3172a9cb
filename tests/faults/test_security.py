"""Untrusted files: checkpoints, settings, tables, names, pages and pictures never run code, reach
outside their folder or leak a secret."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers.pages import active_parts

from camoxpert.cli import main
from camoxpert.config import Config, load_config, to_dict
from camoxpert.errors import ConfigError
from camoxpert.runs.checkpoint import FORMAT

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-is-the-token"
EVIL = '"><img src=x onerror=alert(1)>'

SOURCES = [
    *sorted((ROOT / "camoxpert").rglob("*.py")),
    *sorted((ROOT / "tools").glob("*.py")),
    ROOT / "train_ultimate.py",
]
# Modules that run code from a file or unpack an archive: none is needed, so none is allowed.
# zipfile is allowed: it verifies the checksums of checkpoints, and unpacks nothing.
MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("tarfile", "pty", "hydra"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("torch.hub.load", "torch.jit.load", "shutil.unpack_archive", "hydra.utils.instantiate"),
}


def dangers(source: str) -> list[str]:
    """Name what a source does that could run code from a file, a setting or a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n for n in names if n in CALLS or n.split(".")[0] in MODULES]
            found += [n for n in names if n in ("torch.load", "numpy.load")]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if name in CALLS or name.endswith((".extractall", ".extract", ".unpack_archive")):
                found.append(name)
            if name.endswith("torch.load") and words.get("weights_only") is not True:
                found.append("torch.load without weights_only=True")
            loose = (
                words.get("allow_pickle") or words.get("shell") or words.get("trust_remote_code")
            )
            if loose or (None in words and name.startswith("subprocess")):
                found.append(f"{name}({loose})")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_code_from_files_and_no_archive_is_extracted(path: Path) -> None:
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=flag)",
        "eval(text)", "exec(text)", "import pickle", "from pickle import loads", "import tarfile",
        "yaml.load(text, Loader=yaml.Loader)", "np.load(p, allow_pickle=True)",
        "subprocess.run(line, shell=True)", "os.system(line)", "from os import system",
        "archive.extractall(folder)", "archive.extract(name)", "shutil.unpack_archive(p)",
        "from torch import load",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "subprocess.run(x, **options)",
    ],
)  # fmt: skip
def test_the_check_sees_each_danger(source: str) -> None:
    assert dangers(source)
    assert not dangers("model.eval(); yaml.safe_load(t); torch.load(p, weights_only=True)")


def test_torch_is_new_enough_to_read_weights_safely() -> None:
    """CVE-2026-24747 is a hole in the weights_only reader itself, closed in 2.10."""
    least = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert least is not None and [int(n) for n in least[1].split(".")] >= [2, 10]
    assert [int(n) for n in torch.__version__.split(".")[:2]] >= [2, 10]


def test_timm_reads_downloaded_weights_without_code() -> None:
    from timm.models import _builder, _hub

    assert inspect.signature(_hub.load_state_dict_from_hf).parameters["weights_only"].default
    source = inspect.getsource(_builder.load_pretrained)
    assert source.count("load_state_dict_from_url(") == source.count("weights_only=True")


class Touch:
    """Creates a file when unpickled, as a hostile checkpoint could."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile(folder: Path, kind: str) -> tuple[Path, Path]:
    """Write a file with a payload; return it and the file that the payload would create."""
    touched, path = folder / "touched", folder / "evil.pt"
    values = {"format": FORMAT, "config": to_dict(Config()), "model": {"w": torch.zeros(2)}}
    if kind == "zip":
        torch.save({**values, "extra": Touch(touched)}, path)
    elif kind == "old":
        torch.save({**values, "extra": Touch(touched)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Touch(touched)))
    return path, touched


@pytest.mark.parametrize("kind", ["zip", "old", "plain pickle"])
def test_a_hostile_checkpoint_is_refused_everywhere(
    train, toy_data: Path, tmp_path: Path, capsys, kind: str
) -> None:
    path, touched = hostile(tmp_path, kind)
    out = str(tmp_path / "out")
    photos = str(toy_data / "TestDataset" / "toy" / "Imgs")
    assert main(["evaluate", str(path), "--data", str(toy_data), "-o", out]) == 4
    assert main(["predict", str(path), photos, "-o", out]) == 4
    assert train("--resume-from", str(path)) == 4
    assert train("--weights", str(path), "--epochs", "1") == 4
    assert not touched.exists()
    assert "Traceback" not in capsys.readouterr().err
    # Control: the payload works where code is allowed.
    if kind == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert touched.exists()


BOMB = "\n".join(
    [f"a0: &a0 [{'x, ' * 9}x]", *(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}1]" for i in range(1, 12))]
)
REPEATED = "run: {dir: xxxxxxxxxx, " + ", ".join(
    f"n{i}: '{(f'${{run.n{i - 1}}}' if i else '${run.dir}') * 10}'" for i in range(9)
)
SETTINGS = {
    "an object": "run: {name: !!python/object/apply:os.system ['touch touched']}",
    "a new object": "!!python/object/new:subprocess.Popen [['touch', 'touched']]",
    "a path object": "run: {name: !!python/object/apply:pathlib.Path [touched]}",
    "a module": "run: !!python/module:os",
    "aliases": BOMB,
    "references": REPEATED + "}",
    "brackets": "[" * 300_000,
    "dashes": "- " * 300_000,
    "a long number": f"train: {{epochs: {'9' * 5000}}}",
    "a date": "train: {epochs: 2024-99-99}",
    "the environment": "run: {name: '${oc.env:CAMO_SECRET}'}",
    "the environment behind a reference": "run: {dir: a, name: '${run.dir}${oc.env:CAMO_SECRET}'}",
    "a resolver put together": "run: {dir: env, name: '${oc.${run.dir}:CAMO_SECRET}'}",
    "an escaped resolver": 'run: {name: "\\x24{oc.env:CAMO_SECRET}"}',
    "a list of resolvers": "data: {roots: ['${oc.env:CAMO_SECRET}']}",
    "decoding": "run: {name: '${oc.decode:${oc.env:CAMO_SECRET}}'}",
    "a resolver as a key": "'${oc.env:CAMO_SECRET}': 1",
    "a class to build": "model: {_target_: os.system, command: touch touched}",
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_hostile_settings_are_refused(kind: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAMO_SECRET", SECRET)
    Path("c.yaml").write_text(SETTINGS[kind])
    # It would print and exit with 0 if it were accepted.
    assert main(["train", "--config", "c.yaml", "--print-config"]) == 2
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "Traceback" not in said and SECRET not in said and len(said) < 2000
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_references_inside_the_file_still_work(tmp_path: Path) -> None:
    text = "run: {dir: out, name: 'a-${run.dir}-${train.epochs}'}\n"
    text += "train: {epochs: 7, router_warmup: '${train.epochs}'}"
    (tmp_path / "c.yaml").write_text(text)
    config = load_config(file=tmp_path / "c.yaml")
    assert config.run.name == "a-out-7" and config.train.router_warmup == 7


@pytest.mark.parametrize("text", ["2024-99-99", "9" * 5000, "[" * 5000])
def test_hostile_overrides_are_a_paragraph(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_config(overrides=[f"train.epochs={text}"])
    assert len(str(caught.value)) < 300


def test_a_run_saves_no_secret_and_its_page_runs_nothing(
    train, tmp_path: Path, monkeypatch
) -> None:
    """The run's name holds a resolver and HTML: both stay plain text."""
    monkeypatch.setenv("CAMO_SECRET", SECRET)
    name = "${oc.env:CAMO_SECRET}" + EVIL
    assert train("--epochs", "1", "--run-name", name) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    saved = {path.name for path in files}
    assert {"config.yaml", "run.json", "report.html", "metrics.jsonl", "best.pt"} <= saved
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    page = next(path for path in files if path.name == "report.html").read_text()
    assert active_parts(page) == []
    assert "onerror=alert" in page, "the name is shown, as text"


def test_a_foreign_runs_records_cannot_write_its_page(tmp_path: Path) -> None:
    from camoxpert.files import write_json
    from camoxpert.pages.report import write_report
    from camoxpert.runs.log import RunLog

    bad = "<script>alert(1)</script>"
    log = RunLog(tmp_path, tensorboard=False)
    log.write({"kind": "event", "epoch": bad, "text": bad})
    log.write({"kind": "validation", "epoch": bad, "best": True, "scores": {"MAE": bad}})
    level = {"usage": [0.99, 0.01], "entropy": 0.5, "max_violation": 0.5}
    record = {"kind": "routing", "epoch": bad, "experts": [bad, EVIL], "levels": {bad: level}}
    log.write(record)
    log.close()
    write_json(tmp_path / "run.json", {"status": bad, "device": EVIL, "argv": [bad, EVIL]})
    entry = {"dataset": bad, "num_images": bad, "scores": {"MAE": 0.1}}
    write_json(tmp_path / "evaluation" / "x.json", entry)
    (tmp_path / "config.yaml").write_text(f"run: {{name: '{bad}'}}")
    page = write_report(tmp_path).read_text()
    assert active_parts(page) == []
    assert page.count("&lt;script&gt;") >= 8


def test_the_page_reader_sees_what_runs_or_loads() -> None:
    for evil in (
        "<script>x</script>", "<img src='http://a/b.png'>", "<p onclick='x'>", f"<p a='{EVIL}'>"
        f'<p a="{EVIL}">', "<link rel=stylesheet href=//cdn/x.css>", "<style>@import 'x'</style>",
        "<div style='background:url(http://x)'>", "<a href='javascript:x'>", "<iframe>",
    ):  # fmt: skip
        assert active_parts(evil), evil
    assert not active_parts("<img src='data:image/png;base64,xx' alt='&lt;script&gt;'>")


def test_nothing_written_recommends_serving_to_the_whole_network() -> None:
    texts = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml")]
    texts += [*ROOT.glob("notebooks/*"), *SOURCES, ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    words = re.compile(r"--bind_all|--host[= ]0\.0\.0\.0|share\s*=\s*True|server_name=.0\.0\.0\.0")
    assert len(texts) > 20
    assert not [path for path in texts if path.is_file() and words.search(path.read_text())]
