"""Models on the Hub: pushed, read by every command, offline afterwards, and refused in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub import Hub, Repo, cut_off
from helpers.printed import complained
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save

import camoxpert
from camoxpert.cli import main
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.runs.checkpoint import load_checkpoint, resolve_checkpoint
from camoxpert.runs.hub import WEIGHTS, HubName, hub_name, repo_of
from camoxpert.synthesis.toy import generate_toy

ROOT = Path(__file__).parents[2]
FOREIGN = b"---\nlibrary_name: transformers\n---\n# A model\n"
OURS = ["README.md", "config.json", "model.safetensors"]


class TestNames:
    """What is a name of the Hub."""

    @pytest.mark.parametrize(
        ("text", "repo", "revision"),
        [
            ("hf:user/name", "user/name", ""),
            ("hf:user/name@v1.0", "user/name", "v1.0"),
            ("hf:user/name@refs/pr/1", "user/name", "refs/pr/1"),
            (Path("hf://user/na.me-2"), "user/na.me-2", ""),
            ("user/name@main", "user/name", "main"),
        ],
    )
    def test_parts(self, text: str, repo: str, revision: str) -> None:
        assert hub_name(text) == HubName(repo, revision)

    @pytest.mark.parametrize(
        "text",
        [
            *("hf:", "hf:name", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b@", "hf:a/b@../x"),
            *("hf:a/b@/etc", "hf:a b/c", "hf:a--b/c", "hf:a/b\n", "hf:é/b"),
        ],
    )
    def test_what_is_none_asks_nothing(self, text: str, hub: Hub, capsys) -> None:
        assert main(["serve", text]) == 2
        assert "Write hf:USER/NAME" in complained(capsys) and not hub.requests

    def test_an_address_of_a_page_is_answered_with_the_name(self, capsys) -> None:
        assert main(["predict", "https://huggingface.co/a/b/tree/main", "x", "-o", "o"]) in (3, 4)
        with pytest.raises(CheckpointError, match=r"write hf:a/b,"):
            resolve_checkpoint(Path("https://huggingface.co/a/b/tree/main"))

    def test_a_name_that_ends_like_an_exported_file_is_on_the_hub(self, hub: Hub) -> None:
        with pytest.raises(CheckpointError, match=r"no model a/b\.onnx on the Hub"):
            camoxpert.load("hf:a/b.onnx")


class TestReading:
    """Every command takes the name, and gives what the run gives."""

    def test_commands_take_it(
        self, shared: Repo, hub: Hub, tiny_run: Path, toy_data: Path, tmp_path: Path, monkeypatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        images = str(toy_data / "TestDataset" / "toy" / "Imgs")
        for model, out in (("hf:owner/beetle", "a"), (str(tiny_run), "b")):
            assert main(["predict", model, images, "-o", out, "--save", "map"]) == 0
        maps = [sorted(Path(out, "maps").iterdir()) for out in "ab"]
        assert len(maps[0]) == 8
        assert [p.read_bytes() for p in maps[0]] == [p.read_bytes() for p in maps[1]]
        assert main(["evaluate", "hf:owner/beetle", "--data", str(toy_data)]) == 0
        found = json.loads(Path("evaluation/beetle/scores.json").read_text())["results"]
        run = json.loads((tiny_run / "evaluation" / "scores.json").read_text())["results"]
        assert found[0]["method"] == "beetle" and found[0]["scores"] == run[0]["scores"]
        (score,) = camoxpert.evaluate("hf:owner/beetle@main", str(toy_data), intervals=False)
        assert score.scores == run[0]["scores"]
        # Workers read the file that the first process found.
        assert main(["predict", "hf:owner/beetle", images, "-o", "c", "--devices", "cpu,cpu"]) == 0
        assert hub.asked("resolve/main/model.safetensors") == [
            "HEAD /owner/beetle/resolve/main/model.safetensors",
            "GET /owner/beetle/resolve/main/model.safetensors",
        ]

    def test_export_and_serve_take_it(self, shared: Repo, tmp_path: Path, monkeypatch) -> None:
        served = []
        monkeypatch.setattr(
            "camoxpert.serve.server.serve", lambda server, model, **more: served.append(model)
        )
        assert main(["serve", "hf:owner/beetle", "--port", "0"]) == 0
        assert repo_of(served[0].checkpoint.path) == "owner/beetle"
        exported = []
        monkeypatch.setattr(
            "camoxpert.export.job.export_model",
            lambda model, *rest: exported.append(model),
        )
        words = ["export", "hf:owner/beetle", "-o", str(tmp_path / "m.onnx")]
        monkeypatch.setattr("camoxpert.export.job.written_files", lambda made: ())
        assert main(words) == 0 and main([*words, "--static"]) == 0
        assert [repo_of(resolve_checkpoint(model)) for model in exported] == ["owner/beetle"] * 2

    def test_training_starts_from_it(self, shared: Repo, train, tmp_path: Path) -> None:
        words = ("--init-from", "hf:owner/beetle", "--epochs", "1", "--stage1-epochs", "0")
        assert train(*words, "--run-name", "tuned", "--no-test") == 0
        info = json.loads((tmp_path / "tuned" / "run.json").read_text())
        file = resolve_checkpoint(Path("hf:owner/beetle"))
        assert info["files"]["model.init_from"] == file.resolve().name
        about = json.loads((tmp_path / "tuned" / "model" / "config.json").read_text())
        assert about["backbone_weights"]["source"] == "model"
        assert about["config"]["model"]["init_from"] == ""

    def test_it_teaches_and_gives_masks(
        self, shared: Repo, train, toy_data: Path, tmp_path: Path, monkeypatch
    ) -> None:
        words = ("--teacher", "hf:owner/beetle", "--epochs", "1", "--stage1-epochs", "0")
        assert train(*words, "--run-name", "taught", "--no-test") == 0
        info = json.loads((tmp_path / "taught" / "run.json").read_text())
        file = resolve_checkpoint(Path("hf:owner/beetle"))
        assert info["files"]["data.teacher"] == file.resolve().name
        from camoxpert.synthesis.masks import kind_of

        assert kind_of("hf:owner/beetle") == "model"
        with pytest.raises(CheckpointError, match="no model owner/none on the Hub"):
            kind_of("hf:owner/none")

    def test_revisions(self, shared: Repo, hub: Hub, tiny_run: Path) -> None:
        first = shared.branches["main"]
        saved = load_checkpoint(resolve_checkpoint(tiny_run / "model"))
        with safe_open(tiny_run / "model" / WEIGHTS, "pt") as file:
            metadata = file.metadata()
        doubled = {name: t * 2 for name, t in saved.values["model"].items()}
        second = shared.commit({WEIGHTS: save(doubled, metadata)})
        shared.branches["v1"] = first
        name = next(iter(doubled))

        def value(revision: str) -> torch.Tensor:
            model = camoxpert.load(f"hf:owner/beetle{revision}")
            return model.checkpoint.evaluated_weights[name]

        assert torch.equal(value(""), doubled[name])
        for revision in ("@v1", f"@{first}"):
            assert torch.equal(value(revision), saved.values["model"][name])
        assert torch.equal(value(f"@{second}"), doubled[name])

    def test_a_moved_branch_is_followed(self, shared: Repo, hub: Hub, capsys) -> None:
        old = resolve_checkpoint(Path("hf:owner/beetle"))
        assert resolve_checkpoint(Path("hf:owner/beetle")) == old
        assert "the local copy, which is the newest" in complained(capsys)
        new = shared.commit({"README.md": b"other"})
        assert resolve_checkpoint(Path("hf:owner/beetle")).parent.name == new


def test_crossval_knows_what_a_model_saw(
    shared: Repo, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shared weights name the hash of their data; a model of other data is warned of."""
    words = ["crossval", "--init-from", "hf:owner/beetle", "--dry-run", "--no-pretrained"]
    words += ["-o", str(tmp_path / "cv"), "--cache-dir", str(tmp_path / "cache")]
    assert main([*words, "--dataset-path", str(toy_data)]) == 3
    assert "--init-from hf:owner/beetle was trained on these images" in complained(capsys)
    generate_toy(tmp_path / "other", num_train=6, num_test=1, size=32, difficulty=0.3, seed=9)
    assert main([*words, "--dataset-path", str(tmp_path / "other")]) == 0
    assert "--init-from hf:owner/beetle: what it was trained on is not recorded" in complained(
        capsys
    )


class TestOffline:
    """After the first time no network is needed."""

    def test_without_the_hub_the_local_copy_is_used_and_named(
        self, shared: Repo, hub: Hub, monkeypatch, capsys
    ) -> None:
        file = resolve_checkpoint(Path("hf:owner/beetle"))
        assert "hf:owner/beetle: downloaded (revision" in complained(capsys)
        hub.broken = True
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "the Hub cannot answer now (HTTP 503): the local copy" in complained(capsys)
        cut_off(hub, monkeypatch)
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "cannot be reached (ConnectError): the local copy (revision" in complained(capsys)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "HF_HUB_OFFLINE is set: the local copy" in complained(capsys)

    def test_a_commit_needs_no_question(self, shared: Repo, hub: Hub) -> None:
        name = Path(f"hf:owner/beetle@{shared.branches['main']}")
        file = resolve_checkpoint(name)
        asked = len(hub.requests)
        assert resolve_checkpoint(name) == file and len(hub.requests) == asked

    @pytest.mark.parametrize("why", ["offline", "cut off"])
    def test_without_a_copy_one_paragraph_says_what_to_do(
        self, shared: Repo, hub: Hub, monkeypatch, capsys, why: str
    ) -> None:
        cut_off(hub, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", why == "offline")
        assert main(["evaluate", "hf:owner/beetle"]) == 4
        text = complained(capsys)
        reason = "HF_HUB_OFFLINE is set" if why == "offline" else "cannot be reached"
        assert reason in text and "Run this once with a connection" in text
        assert "Traceback" not in text

    def test_a_damaged_copy_is_seen(self, shared: Repo, hub: Hub, capsys) -> None:
        file = resolve_checkpoint(Path("hf:owner/beetle"))
        blob = file.resolve()
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
        assert main(["evaluate", "hf:owner/beetle"]) == 4
        assert "is damaged (its sha256 differs). Delete" in complained(capsys)

    def test_a_cache_without_links(self, shared: Repo, hub: Hub, capsys) -> None:
        """As on Windows: the Hub knows the hash, and without it a note says that none is known."""
        file = resolve_checkpoint(Path("hf:owner/beetle"))
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
        complained(capsys)
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "not known" not in complained(capsys)
        hub.broken = True
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "the local copy, whose sha256 is not known here" in complained(capsys)
        hub.broken = False
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="its sha256 differs"):
            resolve_checkpoint(Path("hf:owner/beetle"))

    def test_by_the_environment_as_users_set_it(
        self, shared: Repo, hub: Hub, toy_data: Path, tmp_path: Path
    ) -> None:
        """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, in a process of its own."""
        photo = sorted((toy_data / "TestDataset" / "toy" / "Imgs").iterdir())[0]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
        }
        words = ["predict", "hf:owner/beetle", str(photo), "-o", str(tmp_path / "out")]
        command = [sys.executable, "-m", "camoxpert", *words, "--overwrite"]
        texts = []
        for more in ({}, {"HF_HUB_OFFLINE": "1"}):
            done = subprocess.run(
                command, env={**environment, **more}, capture_output=True, text=True, timeout=250
            )
            assert done.returncode == 0, done.stderr
            texts.append(done.stderr)
        assert "downloaded" in texts[0] and "HF_HUB_OFFLINE is set: the local copy" in texts[1]


class TestRefusals:
    """One paragraph, exit code 4, and nothing of the Hub's own words in the way."""

    def refusal(self, name: str, capsys) -> str:
        assert main(["evaluate", name]) == 4
        return complained(capsys)

    def test_no_such_revision(self, shared: Repo, capsys) -> None:
        text = self.refusal("hf:owner/beetle@v9", capsys)
        assert "owner/beetle on the Hub has no revision v9" in text

    def test_a_revision_that_is_gone_is_not_read_from_the_cache(self, shared: Repo, capsys) -> None:
        shared.branches["old"] = shared.branches["main"]
        resolve_checkpoint(Path("hf:owner/beetle@old"))
        del shared.branches["old"]
        assert "has no revision old" in self.refusal("hf:owner/beetle@old", capsys)

    def test_no_such_repository_and_a_private_one_look_the_same(
        self, shared: Repo, monkeypatch, capsys
    ) -> None:
        assert "no model owner/bee on the Hub, or it is private" in self.refusal(
            "hf:owner/bee", capsys
        )
        shared.private = True
        resolve_checkpoint(Path("hf:owner/beetle"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
        text = self.refusal("hf:owner/beetle", capsys)
        assert "or it is private" in text and "hf auth login" in text and "HF_TOKEN" in text

    def test_gated(self, shared: Repo, monkeypatch, capsys) -> None:
        shared.gated = True
        monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
        text = self.refusal("hf:owner/beetle", capsys)
        assert "Ask for access on its page, https://huggingface.co/owner/beetle" in text

    def test_the_library_is_missing(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ConfigError, match=r"pip install 'camoxpert\[hub\]'"):
            camoxpert.load("hf:owner/beetle")
