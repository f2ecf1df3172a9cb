"""A Hub on the loopback, and this process pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub import TOKEN, Hub, Repo, serving
from huggingface_hub import constants


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return an empty Hub; huggingface_hub asks it, with the token of ``owner`` and a new cache."""
    with serving() as served:
        # Read from the environment when huggingface_hub was imported.
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def shared(hub: Hub, tiny_run: Path) -> Repo:
    """Return the repository ``owner/beetle`` with the tiny run's model, as a push makes it."""
    files = {path.name: path.read_bytes() for path in (tiny_run / "model").iterdir()}
    hub.repos["owner/beetle"] = repo = Repo()
    repo.commit(files)
    return repo
