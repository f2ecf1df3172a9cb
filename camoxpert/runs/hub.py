"""Models on the Hugging Face Hub: ``hf:USER/NAME@REVISION`` in, a verified local file out; and
back.

Two files of a repository are ever asked for, by name: weights that cannot hold code, and their
settings. They lie in the cache of huggingface_hub, so that other tools, ``HF_HOME`` and
``HF_HUB_OFFLINE`` mean what their users expect. Nothing here imports torch.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camoxpert import console
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.files import file_digest, read_json
from camoxpert.text import shorten

PREFIX = "hf:"
WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.json", "README.md"
PUSHED = (WEIGHTS, SETTINGS, CARD)
LIBRARY = "camoxpert"
"""What ``library_name`` says in the card and the settings of our models."""
MOST_BYTES = {WEIGHTS: 8 * 2**30, SETTINGS: 2**20}
"""The files that are downloaded, each with its largest size. The largest networks of timm take
about 7 GB."""
WAIT = 10.0
"""Seconds to wait for the Hub's first answer."""
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,254}")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TRANSPORT = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
"""Packages whose exceptions say that the Hub was not reached; releases of huggingface_hub differ in
which of them they use."""


@dataclass(frozen=True)
class HubName:
    """A model on the Hub.

    Attributes:
        repo: ``USER/NAME``.
        revision: branch, tag or commit; "": the newest of the main branch.
    """

    repo: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def is_hub_name(model: str | Path) -> bool:
    """Return whether a model is named as one of the Hub; a local file of that name needs its whole
    path."""
    return str(model).startswith(PREFIX)


def hub_name(text: str | Path) -> HubName:
    """Return what ``hf:USER/NAME@REVISION``, or the same without ``hf:``, names.

    Raises:
        ConfigError: it names nothing on the Hub.
    """
    # Path turns hf://user into hf:/user.
    rest = str(text).removeprefix(PREFIX).lstrip("/")
    repo, at, revision = rest.partition("@")
    parts = repo.split("/")
    named = len(parts) == 2 and all(PART.fullmatch(part) for part in parts)
    sound = not at or (REVISION.fullmatch(revision) and "//" not in revision)
    if not named or not sound or ".." in rest or "--" in repo:
        raise ConfigError(
            f"{str(text)!r} is not the name of a model on the Hugging Face Hub. Write "
            f"{PREFIX}USER/NAME, or {PREFIX}USER/NAME@REVISION with a branch, tag or commit."
        )
    return HubName(repo, revision)


def hub_address(text: str | Path) -> str:
    """Return ``hf:USER/NAME`` for an address of a page of the Hub; "" for other text."""
    # Path turns https://host into https:/host.
    found = re.match(r"https?:/{1,2}(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", str(text))
    return f"{PREFIX}{found[1]}" if found else ""


def fetch(name: HubName) -> Path:
    """Return the local file of a model's weights; download it where it is not there yet.

    Without the Hub the local copy is used, and a note says so. Every use compares the copy with its
    hash.

    Raises:
        CheckpointError: no such model or revision, not one of ours, too large, damaged, or neither
            the Hub nor a local copy can be had.
        ConfigError: huggingface_hub is not installed.
    """
    hub = _library()
    local = _local_copy(hub, name)
    if local is not None and COMMIT.fullmatch(name.revision):
        # What a commit holds never changes.
        return _verified(name, local, "the local copy")
    try:
        info = hub.HfApi().model_info(
            name.repo, revision=name.revision or None, files_metadata=True, timeout=WAIT
        )
    except Exception as error:
        unreachable = why_unreachable(error)
        if not unreachable:
            raise _refused(name, error) from error
        if local is None:
            raise CheckpointError(
                f"{name} is not on this machine, and {unreachable}. Run this once with a "
                "connection; later calls use the local copy. For a machine without one, download "
                f"on another (`camoxpert share {name} --save DIR`) and give the folder."
            ) from error
        return _verified(name, local, f"{unreachable}: the local copy")
    sizes = _checked_files(name, info.siblings or ())
    digest = _digest_of(info.siblings or ())
    if local is not None and local.parent.name == info.sha:
        return _verified(name, local, "the local copy, which is the newest", digest)
    path = _download(hub, name, str(info.sha), sizes)
    return _verified(name, path, "downloaded", digest)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"Models on the Hugging Face Hub need huggingface-hub: pip install 'camoxpert[hub]' "
            f"({error})."
        ) from error
    return huggingface_hub


def _local_copy(hub: Any, name: HubName) -> Path | None:
    """Return the weights in the cache that a name meant when it was last downloaded."""
    found = hub.try_to_load_from_cache(name.repo, WEIGHTS, revision=name.revision or None)
    return Path(found) if isinstance(found, str) else None


def _checked_files(name: HubName, listed: Sequence[Any]) -> dict[str, int]:
    """Return the sizes of the files to download.

    Raises:
        CheckpointError: the weights are missing, or a file is too large.
    """
    found = {str(file.rfilename): file for file in listed}
    if WEIGHTS not in found:
        others = shorten([ascii(other)[1:-1] for other in sorted(found)]) or "nothing"
        raise CheckpointError(
            f"{name} holds no {WEIGHTS}, so it is not a model that CamoXpert shared (it holds "
            f"{others}). Files of other formats are not read: they could hold code."
        )
    sizes = {}
    for file, most in MOST_BYTES.items():
        if file not in found:
            continue
        size = found[file].size
        if not isinstance(size, int) or not 0 < size <= most:
            shown = "of unknown size" if not isinstance(size, int) else f"{size / 1e6:.1f} MB"
            raise CheckpointError(
                f"{name}: {file} is {shown}, and at most {most / 1e6:.0f} MB are read. Nothing was "
                "downloaded: this is not a model that CamoXpert shared."
            )
        sizes[file] = size
    return sizes


def _download(hub: Any, name: HubName, commit: str, sizes: dict[str, int]) -> Path:
    """Download files, the weights last: where they are, everything is."""
    path = Path()
    for file in sorted(sizes, key=lambda file: file == WEIGHTS):
        try:
            path = Path(hub.hf_hub_download(name.repo, file, revision=name.revision or None))
        except Exception as error:
            unreachable = why_unreachable(error)
            if not unreachable and not isinstance(error, (OSError, ValueError)):
                raise
            reason = unreachable or " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{name}: {file} could not be downloaded ({reason}). Run the same command again."
            ) from error
        if path.parent.name != commit or path.stat().st_size != sizes[file]:
            raise CheckpointError(
                f"{name} changed on the Hub while it was downloaded. Run the same command again."
            )
    return path


def _digest_of(listed: Sequence[Any]) -> str:
    """Return the sha256 of the weights as the Hub tells it; "" where it does not."""
    for file in listed:
        if file.rfilename == WEIGHTS and getattr(file, "lfs", None):
            return str(file.lfs.sha256)
    return ""


def _verified(name: HubName, path: Path, how: str, digest: str = "") -> Path:
    """Compare the weights with their hash, and say where they are from.

    Args:
        name: of the model.
        path: of the weights.
        how: they were had.
        digest: their sha256 by the Hub; "": the one that the cache names them by, if it does.

    Raises:
        CheckpointError: they differ.
    """
    # Snapshots link to files named by their hash, one step away; a shared store may lie behind.
    blob = path.readlink().name if path.is_symlink() else ""
    known = [text for text in (digest, blob) if SHA256.fullmatch(text)]
    if not known:
        # A cache without links, and no answer of the Hub.
        how = f"{how}, whose sha256 is not known here"
    elif set(known) != {file_digest(path)}:
        raise CheckpointError(
            f"{name}: the copy in {path.parent} is damaged (its sha256 differs). Delete "
            f"{path.parents[2]} and run the same command again."
        )
    console.note(f"{name}: {how} (revision {path.parent.name[:12]})")
    return path


def repo_of(path: Path) -> str:
    """Return the ``USER/NAME`` of a file in the cache of the Hub; "" for other files."""
    parts = path.parts
    if len(parts) < 4 or parts[-3] != "snapshots" or not parts[-4].startswith("models--"):
        return ""
    return parts[-4].removeprefix("models--").replace("--", "/")


def push(folder: Path, name: HubName, *, private: bool = False, message: str = "") -> str:
    """Upload a folder of shared weights as one commit; return the address of its page.

    The repository is created where there is none. A model or a card of others stays as it is.

    Args:
        folder: with the three files of ``runs.share``.
        name: repository, and the branch, which is created if it is missing.
        private: for a repository that is created.
        message: of the commit.

    Raises:
        CheckpointError: the Hub cannot be reached or refuses.
        ConfigError: the repository holds another model; a commit in place of a branch; or
            huggingface_hub is not installed.
    """
    if COMMIT.fullmatch(name.revision):
        raise ConfigError(
            f"{name}: a commit never changes, so nothing can be pushed to one. Name a branch, or "
            f"{PREFIX}{name.repo} for the main one."
        )
    hub = _library()
    api = hub.HfApi()
    try:
        _refuse_foreign(hub, name)
        api.create_repo(name.repo, private=private, exist_ok=True)
        if name.revision:
            api.create_branch(name.repo, branch=name.revision, exist_ok=True)
        done = api.create_commit(
            name.repo,
            [hub.CommitOperationAdd(file, str(folder / file)) for file in PUSHED],
            commit_message=message or "CamoXpert weights",
            revision=name.revision or None,
        )
    except ConfigError:
        raise
    except Exception as error:
        unreachable = why_unreachable(error)
        if unreachable:
            raise CheckpointError(f"{name} was not pushed: {unreachable}.") from error
        raise _not_allowed(name, error) from error
    return (
        f"{api.endpoint}/{name.repo}"
        + (f"/tree/{name.revision}" if name.revision else "")
        + (f" (commit {str(done.oid)[:12]})")
    )


def _refuse_foreign(hub: Any, name: HubName) -> None:
    """Raise ConfigError if a push would replace the model, or the card, of another library.

    What the branch holds counts, and where it is missing what main holds, of which it is made.
    """
    api = hub.HfApi()
    try:
        info = _info_of(api, name)
    except Exception as error:
        if type(error).__name__ == "RepositoryNotFoundError":
            return
        raise
    held = {str(file.rfilename): file for file in info.siblings or () if file.rfilename in PUSHED}
    if not held:
        return
    told, written = "", bool(held.keys() - {CARD})
    with tempfile.TemporaryDirectory(prefix="camoxpert-push-") as scratch:
        for file in sorted(held.keys() & {SETTINGS, CARD}, reverse=True):
            # Those that could not be ours are not downloaded.
            if not 0 <= (held[file].size or 0) <= MOST_BYTES[SETTINGS]:
                continue
            path = Path(hub.hf_hub_download(name.repo, file, revision=info.sha, local_dir=scratch))
            library, words = (read_json(path), "") if file == SETTINGS else _read_card(path)
            told = str(library.get("library_name") or told)
            if told == LIBRARY:
                return
            written |= bool(words.strip())
    if not told and not written:
        # The page of the Hub on which a repository is created writes a licence.
        return
    what = f"a model of {told}" if told else "files that CamoXpert did not share"
    raise ConfigError(
        f"{name} holds {what}, and a push would replace {', '.join(sorted(held))}. Nothing was "
        "pushed. Name another repository."
    )


def _info_of(api: Any, name: HubName) -> Any:
    """Return what the Hub says of a branch, or of main where it is missing."""
    try:
        return api.model_info(
            name.repo, revision=name.revision or None, files_metadata=True, timeout=WAIT
        )
    except Exception as error:
        if type(error).__name__ != "RevisionNotFoundError" or not name.revision:
            raise
    return api.model_info(name.repo, files_metadata=True, timeout=WAIT)


def _read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter of a model card, {} if there is none, and the text after it."""
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    if found is None:
        return {}, text
    try:
        front = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}, text
    return front if isinstance(front, dict) else {}, text[found.end() :]


def why_unreachable(error: BaseException) -> str:
    """Return why the Hub gave no answer, in words; "" for an error that is an answer."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 8:
        chain.append(inner)
    if any(type(link).__name__ == "OfflineModeIsEnabled" for link in chain):
        return "HF_HUB_OFFLINE is set"
    status = _status(error)
    if status is not None:
        busy = status >= 500 or status == 429
        return f"the Hub cannot answer now (HTTP {status})" if busy else ""
    for link in chain:
        foreign = type(link).__module__.partition(".")[0] in TRANSPORT
        if foreign or isinstance(link, (ConnectionError, TimeoutError)):
            return f"the Hugging Face Hub cannot be reached ({type(link).__name__})"
    return ""


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _refused(name: HubName, error: Exception) -> CheckpointError:
    """Return the error for what the Hub answered in place of a model."""
    kind, status = type(error).__name__, _status(error)
    login = "`hf auth login`, or a token in HF_TOKEN,"
    if kind == "RevisionNotFoundError":
        return CheckpointError(
            f"{name.repo} on the Hub has no revision {name.revision}. Give a branch, a tag or a "
            f"commit of it, or {PREFIX}{name.repo} for the newest."
        )
    if kind == "GatedRepoError":
        return CheckpointError(
            f"{name}: its owner lets in those who ask. Ask for access on its page, "
            f"https://huggingface.co/{name.repo}; then {login} tells the Hub who you are."
        )
    if kind == "RepositoryNotFoundError" or status in (401, 403, 404):
        return CheckpointError(
            f"There is no model {name.repo} on the Hub, or it is private. Check the name; for a "
            f"private one {login} tells the Hub who you are."
        )
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{name}: the Hub does not give it ({kind}: {reason}).")


def _not_allowed(name: HubName, error: Exception) -> CheckpointError:
    """Return the error for a push that the Hub refused."""
    reason = " ".join(str(error).split())[:200]
    if _status(error) in (401, 403, 404) or type(error).__name__ == "LocalTokenNotFoundError":
        return CheckpointError(
            f"{name} was not pushed: the Hub does not let you write there. Log in with `hf auth "
            "login`, or set HF_TOKEN, with a token that may write, and check that the owner "
            f"{name.repo.partition('/')[0]} is you or an organisation of yours ({reason})."
        )
    return CheckpointError(f"{name} was not pushed ({type(error).__name__}: {reason}).")
