"""Features of references on disk: what is found, what is not and why."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camoxpert.data.cache.stages import StageCache
from camoxpert.data.cache.support import Reference, SupportCache
from camoxpert.data.files.image_io import write_png
from camoxpert.errors import DataError


class Facts(NamedTuple):
    encoder: str = "fake"
    weights: str = "aa"
    side: int = 32
    version: int = 1


class Fake(nn.Module):
    """Mean colour under the mask, and a count of calls."""

    width = 3

    def __init__(self, facts: Facts | None = None) -> None:
        super().__init__()
        self.facts = facts or Facts()
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def digest(self) -> str:
        return hashlib.sha256(str(self.facts).encode()).hexdigest()

    @property
    def frozen(self) -> bool:
        return not self.weight.requires_grad

    def encode(self, images: list[Tensor], masks: list[Tensor]) -> Tensor:
        self.calls += len(images)
        return torch.stack(
            [image[:, mask[0]].float().mean(1) for image, mask in zip(images, masks, strict=True)]
        )


@pytest.fixture
def references(tmp_path: Path) -> list[Reference]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(3):
        image, mask = tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"
        write_png(image, rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
        block = np.zeros((20, 24), np.uint8)
        block[4:12, 5 : 15 + number] = 255
        write_png(mask, block)
        made.append(Reference(image, mask))
    return made


def opened(folder: Path | None, encoder: Fake | None = None) -> SupportCache:
    return SupportCache(encoder or Fake(), folder)


def test_a_second_look_encodes_nothing(references: list[Reference], tmp_path: Path) -> None:
    first, second = opened(tmp_path / "c"), opened(tmp_path / "c")
    features = first.features(references)
    assert dict(first.stats.misses) == {"miss: not made yet": 3} and first.encoder.calls == 3
    assert torch.equal(second.features(references), features)
    assert second.encoder.calls == 0 and second.stats.hits == 3 and not second.stats.misses
    assert second.stats.saved_seconds > 0
    assert "3 hits, 0 misses" in second.stats.describe() and "saved" in second.stats.describe()
    # By content: elsewhere, and under another name, it is the same reference.
    moved = Reference(tmp_path / "moved.png", tmp_path / "moved_mask.png")
    references[0].image.rename(moved.image)
    references[0].mask.rename(moved.mask)
    assert torch.equal(second.features([moved])[0], features[0])
    assert second.encoder.calls == 0


def test_whatever_features_depend_on_misses_and_says_why(
    references: list[Reference], tmp_path: Path
) -> None:
    folder, one = tmp_path / "c", references[0]
    opened(folder).features(references)

    def why(encoder: Fake | None = None) -> str:
        cache = opened(folder, encoder)
        cache.features([one])
        assert cache.encoder.calls == 1
        (reason,) = cache.stats.misses
        return reason

    facts = Facts()
    assert why(Fake(facts._replace(weights="bb"))) == "miss: other weights of the encoder"
    assert why(Fake(facts._replace(encoder="it"))) == "miss: another encoder"
    assert why(Fake(facts._replace(side=64))) == "miss: another image size"
    assert why(Fake(facts._replace(version=2))) == "miss: another version of the code"
    write_png(one.mask, np.full((20, 24), 255, np.uint8))
    assert why() == "miss: another mask"
    # Another crop is another image.
    write_png(one.image, np.zeros((18, 24, 3), np.uint8))
    write_png(one.mask, np.full((18, 24), 255, np.uint8))
    assert why() == "miss: not made yet"
    # The negative control: everything is as before.
    cache = opened(folder)
    cache.features([one, *references[1:]])
    assert cache.stats.hits == 3 and cache.encoder.calls == 0


@pytest.mark.parametrize("turned", [False, True])
def test_the_reason_is_the_most_similar_entry_in_whatever_order_a_folder_is_listed(
    references: list[Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turned: bool
) -> None:
    folder, facts = tmp_path / "c", Facts()
    for known in (facts, facts._replace(weights="bb"), facts._replace(encoder="it")):
        opened(folder, Fake(known)).features(references[:1])
    listed = Path.glob

    def glob(self: Path, pattern: str) -> list[Path]:
        return sorted(listed(self, pattern), reverse=turned)

    monkeypatch.setattr(Path, "glob", glob)
    cache = opened(folder, Fake(facts._replace(side=64)))
    cache.features(references[:1])
    assert list(cache.stats.misses) == ["miss: another image size"]


def test_the_same_reference_again_is_read_once(
    references: list[Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    opened(folder).features(references)
    cache = opened(folder)
    first = cache.features(references)
    hashed: list[Path] = []
    monkeypatch.setattr("camoxpert.data.cache.support.file_digest", hashed.append)
    monkeypatch.setattr(StageCache, "find", None)
    assert torch.equal(cache.features(references), first) and not hashed
    assert cache.stats.hits == 6
    # A file that changes is another reference.
    write_png(references[0].mask, np.full((20, 24), 255, np.uint8))
    with pytest.raises(TypeError):
        cache.features(references[:1])
    assert hashed == [references[0].mask]


def test_a_damaged_entry_is_made_again(references: list[Reference], tmp_path: Path) -> None:
    folder = tmp_path / "c"
    features = opened(folder).features(references[:1])
    (entry,) = folder.rglob("*.bin")
    whole = entry.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        entry.write_bytes(damage)
        cache = opened(folder)
        assert torch.equal(cache.features(references[:1]), features)
        assert dict(cache.stats.misses) == {"corrupt: rebuilt": 1}
        assert entry.read_bytes()[16:] != damage[16:], "repaired"
    again = opened(folder)
    again.features(references[:1])
    assert again.stats.hits == 1


def test_nothing_is_found_or_kept_while_weights_are_trained(
    references: list[Reference], tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    opened(folder).features(references[:2])
    before = sorted(folder.rglob("*.bin"))
    encoder = Fake()
    encoder.weight.requires_grad = True
    cache = opened(folder, encoder)
    cache.features(references)
    assert encoder.calls == 3 and cache.stats.hits == 0
    assert dict(cache.stats.misses) == {"miss: weights of the encoder are being trained": 3}
    assert sorted(folder.rglob("*.bin")) == before


def test_without_a_folder_nothing_is_written(references: list[Reference]) -> None:
    cache = opened(None)
    cache.features(references)
    cache.features(references)
    assert cache.encoder.calls == 6 and dict(cache.stats.misses) == {"miss: not cached": 6}


def test_a_reference_that_shows_nothing_is_named(
    references: list[Reference], tmp_path: Path
) -> None:
    one = references[0]
    write_png(one.mask, np.zeros((20, 24), np.uint8))
    with pytest.raises(DataError, match=r"0_mask\.png .* marks nothing"):
        opened(tmp_path / "c").features([one])
    with pytest.raises(DataError, match="cannot be read"):
        opened(tmp_path / "c").features([Reference(tmp_path / "no.png", one.mask)])


def test_a_mask_of_another_size_is_resized_where_that_is_allowed(
    references: list[Reference], tmp_path: Path
) -> None:
    """As the training pairs that references are taken from: --resize bilinear."""
    one = references[0]
    mask = cv2.imread(str(one.mask), 0)
    larger = tmp_path / "larger.png"
    doubled = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(larger), doubled)
    cache = opened(tmp_path / "c")
    with pytest.raises(DataError, match="its mask"):
        cache.features([Reference(one.image, larger)])
    found = cache.features([Reference(one.image, larger, any_size=True)])
    torch.testing.assert_close(found, cache.features([one]))
