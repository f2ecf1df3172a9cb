"""Files that a CSV names: inside the CSV's own folder, unless the user said that they may lie
elsewhere."""

from __future__ import annotations

from pathlib import Path

from camoxpert.errors import DataError


def listed_file(
    table: Path, text: str | None, line: int, *, allow_outside: bool = False
) -> tuple[Path, str]:
    """Return the file that a row names, and a name for it that stays inside any folder.

    Links are followed before the place is judged: a link that leads out of the folder is outside.

    Args:
        table: the CSV; paths are relative to its folder.
        text: what the row says.
        line: number of the row in the file, for messages.
        allow_outside: also take absolute paths, ``..`` and links that lead out.

    Raises:
        DataError: the row names nothing, or a file outside.
    """
    root = table.parent.resolve()
    written = Path(text or "")
    try:
        file = (root / written).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        # Links in a circle, a zero byte.
        raise DataError(f"{table}, line {line}: {text!r} is no path ({error}).") from error
    inside = not written.is_absolute() and file.is_relative_to(root)
    if not text or file == root or not (inside or allow_outside):
        raise DataError(
            f"{table}, line {line}: {text!r} is not a path inside the CSV's own folder: paths are "
            f"relative to it and may not lead outside its own folder. Put the CSV beside the "
            f"images, or say --allow-outside if you trust this CSV."
        )
    if inside:
        return file, file.relative_to(root).with_suffix("").as_posix()
    parts = [part for part in written.parts if part not in ("..", written.anchor)]
    return file, Path(*parts).with_suffix("").as_posix()
