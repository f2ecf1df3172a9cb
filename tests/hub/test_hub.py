"""Models on the Hub: pushed, read by every command, offline afterwards, and refused in words."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.hub import TOKEN, Hub, Repo
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


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed to stderr, on one line."""
    return " ".join(capsys.readouterr().err.split())


def cut_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub to a port on which nothing listens."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


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
        assert "Write hf:USER/NAME" in said(capsys) and not hub.requests

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
        assert "the local copy, which is the newest" in said(capsys)
        new = shared.commit({"README.md": b"other"})
        assert resolve_checkpoint(Path("hf:owner/beetle")).parent.name == new


def test_crossval_knows_what_a_model_saw(
    shared: Repo, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shared weights name the hash of their data; a model of other data is warned of."""
    words = ["crossval", "--init-from", "hf:owner/beetle", "--dry-run", "--no-pretrained"]
    words += ["-o", str(tmp_path / "cv"), "--cache-dir", str(tmp_path / "cache")]
    assert main([*words, "--dataset-path", str(toy_data)]) == 3
    assert "--init-from hf:owner/beetle was trained on these images" in said(capsys)
    generate_toy(tmp_path / "other", num_train=6, num_test=1, size=32, difficulty=0.3, seed=9)
    assert main([*words, "--dataset-path", str(tmp_path / "other")]) == 0
    assert "--init-from hf:owner/beetle: what it was trained on is not recorded" in said(capsys)


class TestOffline:
    """After the first time no network is needed."""

    def test_without_the_hub_the_local_copy_is_used_and_named(
        self, shared: Repo, hub: Hub, monkeypatch, capsys
    ) -> None:
        file = resolve_checkpoint(Path("hf:owner/beetle"))
        assert "hf:owner/beetle: downloaded (revision" in said(capsys)
        hub.broken = True
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "the Hub cannot answer now (HTTP 503): the local copy" in said(capsys)
        cut_off(hub, monkeypatch)
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "cannot be reached (ConnectError): the local copy (revision" in said(capsys)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "HF_HUB_OFFLINE is set: the local copy" in said(capsys)

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
        text = said(capsys)
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
        assert "is damaged (its sha256 differs). Delete" in said(capsys)

    def test_a_cache_without_links(self, shared: Repo, hub: Hub, capsys) -> None:
        """As on Windows: the Hub knows the hash, and without it a note says that none is known."""
        file = resolve_checkpoint(Path("hf:owner/beetle"))
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
        said(capsys)
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "not known" not in said(capsys)
        hub.broken = True
        assert resolve_checkpoint(Path("hf:owner/beetle")) == file
        assert "the local copy, whose sha256 is not known here" in said(capsys)
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
        return said(capsys)

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


class Ran:
    """Unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


class TestHostile:
    """A repository of somebody who wishes ill."""

    def test_only_two_files_are_ever_asked_for(
        self, shared: Repo, hub: Hub, tmp_path: Path
    ) -> None:
        trap = tmp_path / "ran"
        shared.commit(
            {
                "best.pt": pickle.dumps(Ran(trap)),
                "pytorch_model.bin": pickle.dumps(Ran(trap)),
                "modeling.py": f"import os; os.mkdir({str(trap)!r})".encode(),
                "../../../escaped": b"x",
                "/etc/escaped": b"x",
                "..\\escaped": b"x",
                "sub/model.safetensors": b"x",
            }
        )
        before = {p for p in tmp_path.parent.rglob("*escaped*")}
        file = resolve_checkpoint(Path("hf:owner/beetle"))
        load_checkpoint(file)
        asked = {request.rpartition("/")[2] for request in hub.asked("/resolve/")}
        assert asked == {"model.safetensors", "config.json"}
        assert sorted(p.name for p in file.parent.iterdir()) == ["config.json", WEIGHTS]
        assert not trap.exists() and {p for p in tmp_path.parent.rglob("*escaped*")} == before

    def test_pickles_alone_are_no_model(self, hub: Hub, tmp_path: Path, capsys) -> None:
        repo = hub.repos["evil/model"] = Repo()
        repo.commit({"best.pt": pickle.dumps(Ran(tmp_path / "ran")), "\x1b[2J../x": b""})
        assert main(["evaluate", "hf:evil/model"]) == 4
        text = said(capsys)
        assert "holds no model.safetensors" in text and "best.pt" in text and "\x1b" not in text
        assert not hub.asked("/resolve/") and not (tmp_path / "ran").exists()

    def test_a_pickle_named_as_weights_is_not_run(self, hub: Hub, tmp_path: Path, capsys) -> None:
        repo = hub.repos["evil/model"] = Repo()
        repo.commit({WEIGHTS: pickle.dumps(Ran(tmp_path / "ran"))})
        assert main(["evaluate", "hf:evil/model"]) == 4
        assert "cannot be read as safetensors" in said(capsys)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("file", "size"), [(WEIGHTS, 2**40), ("config.json", 2**21), (WEIGHTS, 0)]
    )
    def test_a_file_that_is_too_large_is_not_downloaded(
        self, shared: Repo, hub: Hub, capsys, file: str, size: int
    ) -> None:
        shared.sizes[file] = size
        assert main(["evaluate", "hf:owner/beetle"]) == 4
        assert f"{file} is {size / 1e6:.1f} MB, and at most" in said(capsys)
        assert not hub.asked("/resolve/")

    def test_another_size_than_announced_is_refused(self, shared: Repo, capsys) -> None:
        shared.sizes[WEIGHTS] = 1000
        assert main(["evaluate", "hf:owner/beetle"]) == 4
        assert "changed on the Hub while it was downloaded" in said(capsys)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda c: c["model"].update(run_code="x"), "run_code"),
            (lambda c: c["model"].update(backbone="hf-hub:evil/net"), "Unknown backbone"),
            (lambda c: c["model"].update(num_experts="many"), "num_experts"),
            (lambda c: c["data"].update(img_size=-1), "img_size"),
            # Petabytes, if they were built.
            (lambda c: c["model"].update(width=2**20), "describe another network"),
            (lambda c: c["model"].update(num_experts=10**9), "num_experts is 1000000000"),
        ],
    )
    def test_settings_that_are_none_are_refused(
        self, shared: Repo, hub: Hub, tiny_run: Path, toy_data: Path, capsys, change, says: str
    ) -> None:
        with safe_open(tiny_run / "model" / WEIGHTS, "pt") as file:
            about = json.loads(file.metadata()["camoxpert"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(about["config"])
        shared.commit(
            {
                WEIGHTS: save(weights, {"camoxpert": json.dumps(about)}),
                "config.json": json.dumps({"library_name": "camoxpert", **about}).encode(),
            }
        )
        assert main(["evaluate", "hf:owner/beetle", "--data", str(toy_data)]) in (2, 4)
        text = said(capsys)
        assert says in text and "Traceback" not in text

    def test_places_of_this_machine_cannot_be_named(
        self, shared: Repo, tiny_run: Path, toy_data: Path, capsys
    ) -> None:
        """Without --data the run's own test sets are scored: a stranger's file names none."""
        with safe_open(tiny_run / "model" / WEIGHTS, "pt") as file:
            about = json.loads(file.metadata()["camoxpert"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about["config"]["data"]["roots"] = [str(toy_data)]
        about["config"]["model"]["weights"] = "/etc/passwd"
        del shared.commits[shared.branches["main"]]["config.json"]
        shared.commit({WEIGHTS: save(weights, {"camoxpert": json.dumps(about)})})
        assert main(["evaluate", "hf:owner/beetle"]) == 3
        assert "not recorded" in said(capsys)
        assert (
            load_checkpoint(resolve_checkpoint(Path("hf:owner/beetle"))).config.model.weights == ""
        )

    def test_settings_that_do_not_go_with_the_weights(self, shared: Repo, capsys) -> None:
        about = json.loads(shared.commits[shared.branches["main"]]["config.json"])
        about["config"]["model"]["top_k"] = 1
        shared.commit({"config.json": json.dumps(about).encode()})
        assert main(["evaluate", "hf:owner/beetle"]) == 4
        assert "config.json holds other settings than model.safetensors" in said(capsys)


class TestSharing:
    """``save_pretrained``, ``push_to_hub`` and the command."""

    def test_a_saved_model_is_the_same(
        self, tiny_run: Path, tmp_path: Path, toy_data: Path
    ) -> None:
        model = camoxpert.load(tiny_run)
        folder = model.save_pretrained(tmp_path / "beetle")
        assert sorted(p.name for p in folder.iterdir()) == OURS
        again = camoxpert.load(folder)
        photo = sorted((toy_data / "TestDataset" / "toy" / "Imgs").iterdir())[0]
        one, other = (m.predict(str(photo)).probability_HW for m in (model, again))
        assert (one == other).all()
        # Over itself, and from itself: nothing is lost.
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        again.save_pretrained(folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before

    def test_the_card_says_what_is_known(self, tiny_run: Path) -> None:
        text = (tiny_run / "model" / "README.md").read_text()
        front = yaml.safe_load(text.split("---\n")[1])
        scores = json.loads((tiny_run / "evaluation" / "scores.json").read_text())["results"][0]
        (result,) = front["model-index"][0]["results"]
        assert result["dataset"]["name"] == "toy"
        told = {metric["type"]: metric["value"] for metric in result["metrics"]}
        assert told["Smeasure"] == round(scores["scores"]["Smeasure"], 4)
        low, high = scores["intervals"]["Smeasure"]
        row = f"| Smeasure | {scores['scores']['Smeasure']:.3f} | {low:.3f} to {high:.3f} |"
        assert row in text and "8 test images" in text
        info = json.loads((tiny_run / "run.json").read_text())
        assert info["data_hash"] in text
        assert "license" not in front and "named no licence" in text
        assert "random weights: no weights of others" in text
        assert "no presence head" in text

    def test_licences_of_backbones(self) -> None:
        from camoxpert.config import ModelConfig
        from camoxpert.runs.origin import backbone_origin

        of = {
            name: backbone_origin(ModelConfig(backbone=name))
            for name in ("edgenext_small", "convnextv2_tiny", "tiny_test")
        }
        assert of["edgenext_small"]["license"] == "mit"
        assert of["edgenext_small"]["hub"] == "timm/edgenext_small.usi_in1k"
        assert of["convnextv2_tiny"]["license"] == "cc-by-nc-4.0"
        assert of["tiny_test"]["source"] == "none"
        tagged = backbone_origin(ModelConfig(backbone="edgenext_small.usi_in1k"))
        assert tagged == of["edgenext_small"]
        file = backbone_origin(ModelConfig(weights="x.pth"))
        assert (file["source"], file["license"]) == ("file", "unknown")

    def test_a_folder_with_files_of_others_is_kept(
        self, tiny_run: Path, tmp_path: Path, capsys
    ) -> None:
        readme = tmp_path / "README.md"
        readme.write_text("my project")
        assert main(["share", str(tiny_run), "--save", str(tmp_path)]) == 2
        assert "README.md exists" in said(capsys) and readme.read_text() == "my project"

    def test_push_and_read_back(self, hub: Hub, tiny_run: Path, tmp_path: Path, capsys) -> None:
        words = ["share", str(tiny_run), "--to", "hf:owner/moth", "--license", "mit", "--private"]
        assert main([*words, "--message", "first"]) == 0
        assert f"{hub.address}/owner/moth" in capsys.readouterr().out
        repo = hub.repos["owner/moth"]
        files = repo.commits[repo.branches["main"]]
        assert sorted(files) == OURS and repo.private and hub.messages == ["first"]
        card = files["README.md"].decode()
        assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
        assert "camoxpert predict hf:owner/moth photos/" in card and "under mit" in card
        best = load_checkpoint(resolve_checkpoint(tiny_run)).evaluated_weights
        read = load_checkpoint(resolve_checkpoint(Path("hf:owner/moth"))).evaluated_weights
        assert all(torch.equal(read[name], best[name]) for name in best)
        # A copy of the copy keeps scores, licence and origin.
        assert main(["share", "hf:owner/moth", "--save", str(tmp_path / "copy")]) == 0
        assert (tmp_path / "copy" / "config.json").read_bytes() == files["config.json"]

    def test_a_branch_is_created(self, hub: Hub, shared: Repo, tiny_run: Path) -> None:
        model = camoxpert.load(tiny_run)
        page = model.push_to_hub("owner/beetle@v2", licence="mit")
        assert page.startswith(f"{hub.address}/owner/beetle/tree/v2")
        assert shared.branches["v2"] != shared.branches["main"]

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ({"README.md": FOREIGN, "config.json": b"{}", WEIGHTS: b"x"}, "a model of trans"),
            # Its weights have other names: the card alone would go.
            ({"README.md": FOREIGN, "pytorch_model.bin": b"x"}, "a push would replace README.md"),
            ({"README.md": b"# My project"}, "files that CamoXpert did not share"),
            ({"README.md": b"---\nlicense: mit\n---\nmy words"}, "did not share"),
            ({"README.md": b"---\n[: no yaml\n---\n"}, "did not share"),
            ({"README.md": b"---\nlicense: mit\n---\n", WEIGHTS: b"x"}, "did not share"),
            ({WEIGHTS: b"x"}, "did not share"),
            ({"config.json": b'{"library_name": "timm"}'}, "a model of timm"),
        ],
    )
    @pytest.mark.parametrize("branch", ["", "@v2", "@new"])
    def test_models_and_cards_of_others_are_kept(
        self, hub: Hub, tiny_run: Path, capsys, files: dict[str, bytes], says: str, branch: str
    ) -> None:
        repo = hub.repos["owner/bert"] = Repo()
        repo.commit(files)
        repo.commit(files, "v2")
        before = dict(repo.branches)
        assert main(["share", str(tiny_run), "--to", f"hf:owner/bert{branch}"]) == 2
        assert says in said(capsys) and repo.branches == before

    def test_the_branch_counts_that_is_pushed_to(
        self, hub: Hub, shared: Repo, tiny_run: Path, capsys
    ) -> None:
        ours = dict(shared.commits[shared.branches["main"]])
        shared.branches["theirs"] = ""
        shared.commit({"README.md": FOREIGN, "config.json": b"{}", WEIGHTS: b"x"}, "theirs")
        kept = shared.branches["theirs"]
        model = camoxpert.load(tiny_run)
        with pytest.raises(ConfigError, match="beetle@theirs holds a model of transformers"):
            model.push_to_hub("owner/beetle@theirs")
        assert shared.branches["theirs"] == kept
        # The other way round: main is of others, the branch is ours.
        shared.branches["main"], shared.branches["ours"] = kept, shared.branches["main"]
        model.push_to_hub("owner/beetle@ours", licence="mit")
        assert shared.branches["main"] == kept
        assert shared.commits[shared.branches["ours"]][WEIGHTS] != ours[WEIGHTS]

    @pytest.mark.parametrize("branch", ["", "@v2"])
    @pytest.mark.parametrize(
        "change",
        [
            {},
            # Edited on the page of the Hub.
            {"README.md": b"# My words"},
            {"config.json": b"{}"},
        ],
    )
    def test_a_model_of_ours_is_updated(
        self, shared: Repo, tiny_run: Path, change: dict[str, bytes], branch: str
    ) -> None:
        before = shared.commit(change)
        camoxpert.load(tiny_run).push_to_hub(f"owner/beetle{branch}")
        after = shared.branches[branch[1:] or "main"]
        assert after != before and sorted(shared.commits[after]) == OURS
        assert b"library_name: camoxpert" in shared.commits[after]["README.md"]

    @pytest.mark.parametrize(
        "files",
        [
            {".gitattributes": b""},
            {"README.md": b"---\nlicense: mit\n---\n"},
            {"README.md": b"---\r\nlicense: mit\r\n---\r\n\r\n"},
            {"photo.jpg": b"x"},
        ],
    )
    def test_a_repository_without_a_model_is_filled(
        self, hub: Hub, tiny_run: Path, files: dict[str, bytes]
    ) -> None:
        repo = hub.repos["owner/moth"] = Repo()
        repo.commit(files)
        camoxpert.load(tiny_run).push_to_hub("owner/moth")
        assert set(OURS) <= set(repo.commits[repo.branches["main"]])

    def test_nothing_is_pushed_to_a_commit(self, shared: Repo, hub: Hub, tiny_run: Path) -> None:
        model = camoxpert.load(tiny_run)
        with pytest.raises(ConfigError, match="a commit never changes"):
            model.push_to_hub(f"owner/beetle@{shared.branches['main']}")
        assert not hub.requests

    @pytest.mark.parametrize("fault", ["token", "owner", "cut off", "offline"])
    def test_a_push_that_cannot_be(
        self, hub: Hub, tiny_run: Path, monkeypatch, capsys, fault: str
    ) -> None:
        name = "hf:somebody/moth" if fault == "owner" else "hf:owner/moth"
        if fault == "token":
            monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
        elif fault == "cut off":
            cut_off(hub, monkeypatch)
        elif fault == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert main(["share", str(tiny_run), "--to", name]) == 4
        text = said(capsys)
        expected = {
            "token": "does not let you write there",
            "owner": "does not let you write there",
            "cut off": "was not pushed: the Hugging Face Hub cannot be reached",
            "offline": "was not pushed: HF_HUB_OFFLINE is set",
        }
        assert expected[fault] in text and "Traceback" not in text and TOKEN not in text
        assert not hub.repos

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ([], "Say where to"),
            (["--save", "d", "--private"], "belong to --to"),
            (["--to", "nowhere"], "Write hf:USER/NAME"),
            (["--save", "d", "--license", "MIT License"], "in small letters"),
        ],
    )
    def test_flags(self, words: list[str], says: str, capsys) -> None:
        assert main(["share", "runs/x", *words]) == 2
        assert says in said(capsys)

    def test_an_exported_model_has_no_weights_to_share(self, tmp_path: Path, tiny_run) -> None:
        model = camoxpert.load(tiny_run)
        model.exported = object()
        with pytest.raises(ConfigError, match="was exported"):
            model.save_pretrained(tmp_path / "x")

    def test_older_folders_without_settings_beside_them_are_read(
        self, tiny_run: Path, tmp_path: Path
    ) -> None:
        shutil.copy(tiny_run / "model" / WEIGHTS, tmp_path)
        assert camoxpert.load(tmp_path).config.data.img_size == 32
