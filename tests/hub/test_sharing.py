"""Models pushed to the Hub, and repositories that mean harm."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.hub import TOKEN, Hub, Repo, cut_off
from helpers.printed import complained
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save

import camoxpert
from camoxpert.cli import main
from camoxpert.errors import ConfigError
from camoxpert.runs import share
from camoxpert.runs.checkpoint import load_checkpoint, resolve_checkpoint
from camoxpert.runs.hub import WEIGHTS

ROOT = Path(__file__).parents[2]
FOREIGN = b"---\nlibrary_name: transformers\n---\n# A model\n"
OURS = ["README.md", "config.json", "model.safetensors"]


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
        text = complained(capsys)
        assert "holds no model.safetensors" in text and "best.pt" in text and "\x1b" not in text
        assert not hub.asked("/resolve/") and not (tmp_path / "ran").exists()

    def test_a_pickle_named_as_weights_is_not_run(self, hub: Hub, tmp_path: Path, capsys) -> None:
        repo = hub.repos["evil/model"] = Repo()
        repo.commit({WEIGHTS: pickle.dumps(Ran(tmp_path / "ran"))})
        assert main(["evaluate", "hf:evil/model"]) == 4
        assert "cannot be read as safetensors" in complained(capsys)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("file", "size"), [(WEIGHTS, 2**40), ("config.json", 2**21), (WEIGHTS, 0)]
    )
    def test_a_file_that_is_too_large_is_not_downloaded(
        self, shared: Repo, hub: Hub, capsys, file: str, size: int
    ) -> None:
        shared.sizes[file] = size
        assert main(["evaluate", "hf:owner/beetle"]) == 4
        assert f"{file} is {size / 1e6:.1f} MB, and at most" in complained(capsys)
        assert not hub.asked("/resolve/")

    def test_another_size_than_announced_is_refused(self, shared: Repo, capsys) -> None:
        shared.sizes[WEIGHTS] = 1000
        assert main(["evaluate", "hf:owner/beetle"]) == 4
        assert "changed on the Hub while it was downloaded" in complained(capsys)

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
        text = complained(capsys)
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
        assert "not recorded" in complained(capsys)
        assert (
            load_checkpoint(resolve_checkpoint(Path("hf:owner/beetle"))).config.model.weights == ""
        )

    def test_settings_that_do_not_go_with_the_weights(self, shared: Repo, capsys) -> None:
        about = json.loads(shared.commits[shared.branches["main"]]["config.json"])
        about["config"]["model"]["top_k"] = 1
        shared.commit({"config.json": json.dumps(about).encode()})
        assert main(["evaluate", "hf:owner/beetle"]) == 4
        assert "config.json holds other settings than model.safetensors" in complained(capsys)


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
        assert "README.md exists" in complained(capsys) and readme.read_text() == "my project"

    def test_a_save_that_was_killed_is_repeated(
        self, tiny_run: Path, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        def killed(path: Path, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        words = ["share", str(tiny_run), "--save", str(tmp_path / "out")]
        with monkeypatch.context() as patch:
            patch.setattr(share, "write_bytes", killed)
            with contextlib.suppress(KeyboardInterrupt):
                main(words)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json"]
        assert main(words) == 0
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == OURS

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
        assert says in complained(capsys) and repo.branches == before

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
        text = complained(capsys)
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
        assert says in complained(capsys)

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
