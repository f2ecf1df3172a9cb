"""What the program says about a fault stays, and so does the code that each kind ends with."""

from __future__ import annotations

from camoxpert import errors
from frozen import error_texts, store

SOURCE = """
def f(path, error):
    if path:
        raise ConfigError(f"{path} is a folder: {error!r:>5}. Give a file, not "
                          "a folder, please.")
    fault = errors.DataError("No " + path + " here.")
    raise ConfigError(str(error))
    raise ValueError("Not one of ours.")
"""


def test_texts() -> None:
    message = error_texts.changes(store.read("errors")["texts"], error_texts.collect()["texts"])
    assert not message, message


def test_exit_codes() -> None:
    message = store.differences(
        store.read("errors")["exit_codes"], error_texts.collect()["exit_codes"], "errors"
    )
    assert not message, message


def test_no_class_is_left_out() -> None:
    own = {n for n, c in vars(errors).items() if isinstance(c, type) and n != "CamoXpertError"}
    assert own == set(error_texts.CLASSES)


def test_what_is_read_from_a_source() -> None:
    assert error_texts.texts_in(SOURCE) == {
        "ConfigError: {} is a folder: {}. Give a file,": 1,
        "DataError: No {} here.": 1,
    }


def test_the_control_is_another_text() -> None:
    """Also one text fewer of two equal ones is a change."""
    before = error_texts.texts_in(SOURCE + SOURCE)
    after = error_texts.texts_in(SOURCE + SOURCE.replace("a folder:", "no file:"))
    assert error_texts.changes(before, before) == ""
    lines = error_texts.changes(before, after).splitlines()
    assert lines[0] == "gone: ConfigError: {} is a folder: {}. Give a file,"
    assert lines[1] == "new: ConfigError: {} is no file: {}. Give a file,"
    assert len(lines) == 3
