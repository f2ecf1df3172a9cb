"""Names of images and masks are matched by one rule for all of them, or not at all."""

from __future__ import annotations

import pytest

from camoxpert.data.files.names import match_names, strip_suffix
from camoxpert.errors import DataError


@pytest.mark.parametrize(
    ("names", "others", "rule"),
    [
        (["1", "2"], ["1", "2", "9"], ""),
        (["0001", "0011"], ["0001_sal", "0011_sal"], "NAME_sal for NAME"),
        (["0001", "0002"], ["1", "2"], "zeros before numbers ignored"),
        (["0001", "0002"], ["1_sal", "2_sal"], "NAME_sal for NAME, zeros before numbers ignored"),
        (["Cat", "Dog"], ["cat", "dog"], "upper and lower case ignored"),
        (["1_img", "2_img"], ["1", "2"], "NAME for NAME_img"),
        (["1_sat", "2_sat"], ["1_mask", "2_mask"], "1_mask for 1_sat"),
        (["cat/1", "dog/2"], ["1", "2"], "sub-folders ignored"),
        (["a", "b", "c"], ["a_x", "c_x"], "NAME_x for NAME"),
    ],
)
def test_rules(names: list[str], others: list[str], rule: str) -> None:
    found = match_names(names, others, advice="")
    assert len(found.partner) == min(len(names), len(others))
    assert (found.rule == rule) if "1_mask" not in rule else "mask" in found.rule
    for name, other in found.partner.items():
        assert name[:1].lower().lstrip("0") in other.lower() or "/" in name


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["1", "2"], ["11", "12"]),
        (["cat", "dog"], ["cats", "dogs"]),
        (["animal-1", "animal-2"], ["camo_1", "camo_2"]),
        (["a", "b", "c"], ["a_x", "b_y", "c_z"]),
        (["a", "b"], ["c", "d"]),
        ([], ["a"]),
    ],
)
def test_names_that_do_not_belong_together(names: list[str], others: list[str]) -> None:
    assert match_names(names, others, advice="").partner == {}


def test_a_rule_is_never_used_for_some_of_the_files() -> None:
    found = match_names(["a", "b", "c"], ["a", "b_x", "d_x"], advice="")
    assert found.partner == {"a": "a"} and found.rule == ""


def test_several_affixes_are_an_error() -> None:
    with pytest.raises(DataError, match=r"NAME_edge, NAME_sal.*Choose"):
        match_names(["1", "2"], ["1_sal", "1_edge", "2_sal", "2_edge"], advice="Choose.")
    assert strip_suffix(["1_sal", "1_edge"], "_sal") == {"1": "1_sal"}
