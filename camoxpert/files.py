"""Files: atomic writes, locks, JSON and symlink checks, for every part of the program."""

from __future__ import annotations

import csv
import difflib
import errno
import hashlib
import io
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from camoxpert import stop

if TYPE_CHECKING:
    from filelock import FileLock

# What flock answers on a file system without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Reading the umask means setting it, which is only safe before there are threads.
UMASK = os.umask(0o022)
os.umask(UMASK)


def write_whole(path: Path, write: Callable[[IO[bytes]], object], *, durable: bool = False) -> Path:
    """Write a file atomically, under a temporary name first: readers see the old or the new one.

    Args:
        path: the file; its folder is created.
        write: receives the open file.
        durable: wait until the content is on the disk, so that a power cut cannot leave an empty
            file under the new name. Takes milliseconds.

    Raises:
        OSError: no space, no permission; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        # mkstemp makes private files; results are as private as the user's others.
        temporary.chmod(0o666 & ~UMASK)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def path_text(text: str) -> str:
    """Return a path that was read from a file in the form that the file system's encoding needs.

    Differs from ``text`` only where that encoding is not UTF-8, as in the C locale.
    """
    try:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        # Half of a surrogate pair, from an escape in a file: no path at all.
        return text


def expand_user(text: str) -> str:
    """Return a path with the home folder for a leading ``~``; other text as it is."""
    text = path_text(text)
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        # There is no such user: a file may be called so.
        return text


def no_path(path: str | Path, what: str) -> str:
    """Return a sentence about a URL or ``-`` given as a path; "" for any other text."""
    text = str(path)
    # Path turns http://host into http:/host.
    if re.match(r"(https?|ftp|s3|gs|hf):/", text, re.IGNORECASE):
        url = re.sub(r":/(?!/)", "://", text, count=1)
        return f"{url} is a URL. Nothing is downloaded: fetch it first, then give the {what}."
    if text == "-":
        return f"- would be standard input, which is not read. Give the name of a {what}."
    return ""


def why_missing(path: str | Path, what: str = "file or folder") -> str:
    """Return a sentence about a path that does not exist: a URL, ``-``, a lost link, or a typo."""
    text = str(path)
    place = Path(path)
    elsewhere = no_path(path, what)
    if elsewhere:
        return elsewhere
    if place.is_symlink():
        return (
            f"{text} is a link to {place.readlink()}, which does not exist. Was its content "
            f"fetched (git annex get, dvc pull)?"
        )
    folder = place.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1, cutoff=0.7)
    hint = f" Did you mean {folder / near[0]}?" if near else ""
    if not folder.exists():
        hint = f" There is no folder {folder} either."
    return f"There is no {what} {text}.{hint}"


def require_writable(folder: Path) -> None:
    """Raise OSError unless a file can be written into a folder; leaves nothing behind.

    Writing tells what permissions do not: a full disk, a read-only mount, a quota.

    Args:
        folder: need not exist; then its nearest existing parent is tried.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "this is not a folder", str(place))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # The name of a temporary file says nothing.
        raise OSError(error.errno, error.strerror, str(place)) from error


def why_unwritable(error: OSError) -> str:
    """Return what the system refused, and where."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def append_here(path: Path) -> IO[str]:
    """Open a text file at its end, without following a symlink; replace one if found.

    Otherwise a symlink left in a results folder would redirect the lines into another file.
    """
    if path.is_symlink():
        path.unlink()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o644), "a", encoding="utf-8", newline="")


def leads_outside(root: Path, path: Path) -> bool:
    """Return whether a file in ``root`` would be written elsewhere, by ``..`` or a linked folder.

    The file itself may be a symlink, which ``write_whole`` replaces; so may ``root``.
    """
    return not path.parent.resolve().is_relative_to(root.resolve())


def write_bytes(path: Path, data: bytes, *, durable: bool = False) -> Path:
    """Write bytes atomically; see ``write_whole``."""
    return write_whole(path, lambda file: file.write(data), durable=durable)


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str] | None = None
) -> Path:
    """Write dictionaries as CSV, atomically.

    Args:
        path: the file.
        rows: all with the same keys.
        fields: the columns; None takes those of the first row.
    """
    text = io.StringIO(newline="")
    columns = fields if fields is not None else list(rows[0]) if rows else []
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    # File names may hold bytes that are not UTF-8: they are written as they were read.
    return write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: Any, *, durable: bool = True) -> Path:
    """Write JSON atomically; NaN and infinity become null."""
    text = json.dumps(finite(value), indent=1, allow_nan=False)
    return write_bytes(path, text.encode(), durable=durable)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if it is missing, damaged or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read records up to the first torn line (the process died while writing it)."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def finite(value: Any) -> Any:
    """Return a copy that JSON can hold: NaN and infinity become None, numpy scalars Python's."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "item") and callable(value.item) and getattr(value, "ndim", None) == 0:
        return finite(value.item())
    return value


def try_lock(path: Path) -> FileLock | None:
    """Lock a file for this process; return the lock to release, or None if another process has it.

    The kernel drops the lock when the process dies, however it dies, and forked children do not
    keep it: data workers outlive a killed parent by seconds. (Releases of filelock before 3.31
    keep it open in them, so the same command would find its own dead run locked.) On a file system
    without locks every process gets one.

    Raises:
        OSError: the file cannot be created, or is a symlink.
    """
    from filelock import FileLock, Timeout

    # Soft locks stay behind when a process is killed.
    held = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return held


@contextmanager
def lock(path: Path, *, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file for the block, waiting for it in steps that a signal can end.

    Args:
        path: the lock file; see ``try_lock``.
        waiting: called once if another process has the lock.

    Raises:
        OSError: as ``try_lock``.
    """
    held = try_lock(path)
    if held is None:
        waiting()
    while held is None:
        stop.check()
        time.sleep(0.1)
        held = try_lock(path)
    try:
        yield
    finally:
        held.release()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
