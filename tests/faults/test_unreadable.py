"""Files that cannot be read: named under ``error``, replaced and counted under ``skip``."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.printed import complained

from camoxpert import console, stop
from camoxpert.config import AugmentConfig, DataConfig, build_config
from camoxpert.data.cache.build import find_cache, open_cache
from camoxpert.data.cache.reader import CacheReader
from camoxpert.data.files.headers import unreadable_pairs
from camoxpert.data.files.manifest import Manifest, load_train
from camoxpert.data.files.pairing import Pair
from camoxpert.data.loader import LoaderPlan, build_eval_loader, build_loader, finish
from camoxpert.data.unreadable import Unreadable, allowed
from camoxpert.errors import DataError
from camoxpert.runtime.processes import World
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training.data import find_data

STRONG = AugmentConfig(vflip=0.5, rotate=60)
SIDE = 32


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def flip(path: Path) -> None:
    """Flip one bit of the pixels of a PNG, which makes its CRC wrong."""
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 4 + 20] ^= 0x10
    path.write_bytes(data)


HARMS: dict[str, tuple[Callable[[Pair], object], str]] = {
    "half a JPEG": (lambda pair: cut(pair.image, 0.5), "cut short"),
    "95 % of a JPEG": (lambda pair: cut(pair.image, 0.95), "cut short"),
    "half a PNG": (lambda pair: cut(pair.mask, 0.5), "cut short|cannot be read"),
    "wrong CRC": (lambda pair: flip(pair.mask), "checksum"),
    "empty": (lambda pair: pair.image.write_bytes(b""), "is empty"),
    "web page": (lambda pair: pair.image.write_bytes(b"<!DOCTYPE html><html>"), "a web page"),
    "no image": (lambda pair: pair.image.write_bytes(b"\x01" * 99), "not an image"),
    "missing": (lambda pair: pair.image.unlink(), "no file"),
    "other size": (lambda pair: shutil.copy(large_mask(pair), pair.mask), "must have the size"),
}


def large_mask(pair: Pair) -> Path:
    from PIL import Image

    path = pair.mask.parent.parent / "large.png"
    Image.open(pair.mask).resize((64, 64)).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generate_toy(tmp_path / "data", num_train=16, num_test=0, size=40, seed=0)
    return tmp_path / "data"


def config_of(folder: Path, unreadable: str = "error") -> DataConfig:
    return DataConfig(img_size=SIDE, cache_dir=str(folder), max_pixels=10**6, unreadable=unreadable)


def cache_of(manifest: Manifest, folder: Path, mode: str, unreadable: str = "skip"):
    return (
        None if mode == "none" else open_cache(manifest, config_of(folder, unreadable), mode=mode)
    )


def loader_of(manifest: Manifest, num_workers: int = 0, *, unreadable: str = "skip", **plan: Any):
    data = DataConfig(
        img_size=SIDE,
        augment=STRONG,
        max_pixels=10**6,
        unreadable=unreadable,
        max_unreadable=0.2,
    )
    return build_loader(manifest, data, LoaderPlan(num_workers, **plan), batch_size=4, seed=1)


def contents(loader: Any, epoch: int = 0) -> list[tuple[Any, ...]]:
    loader.set_epoch(epoch)
    batches = [finish(loader, batch, torch.device("cpu")) for batch in loader]
    loader.close()
    return [
        (
            b.images.numpy().tobytes(),
            b.masks.numpy().tobytes(),
            b.names,
            b.indices,
            b.sizes,
            b.replaced,
        )
        for b in batches
    ]


@pytest.mark.parametrize("kind", HARMS)
def test_named_or_replaced(data: Path, kind: str) -> None:
    manifest = load_train([data])
    harm, words = HARMS[kind]
    bad = manifest.pairs[5]
    harm(bad)
    with pytest.raises(DataError, match=words) as caught:
        contents(loader_of(manifest, unreadable="error"))
    assert bad.name in str(caught.value)
    batches = contents(loader_of(manifest))
    replaced = [fault for *_, faults in batches for fault in faults]
    assert [name for name, _ in replaced] == [bad.name] and replaced[0][1] == str(caught.value)
    names = [name for _, _, names, *_ in batches for name in names]
    indices = [index for *_, indices, _, _ in batches for index in indices]
    assert sorted(indices) == list(range(16)), "the plan of the epoch is as it was"
    assert names[indices.index(5)] == manifest.pairs[6].name and bad.name not in names


def test_the_same_batches_for_any_workers_and_any_cache(data: Path, tmp_path: Path) -> None:
    manifest = load_train([data])
    sound = contents(loader_of(manifest))
    bad = [manifest.pairs[i] for i in (3, 4, 15)]
    HARMS["half a JPEG"][0](bad[0])
    HARMS["wrong CRC"][0](bad[1])
    HARMS["missing"][0](bad[2])
    caches = {mode: cache_of(manifest, tmp_path / "c", mode) for mode in ("none", "ram", "disk")}
    for on_device in (False, True):
        expected = contents(loader_of(manifest, on_device=on_device))
        assert {name for *_, faults in expected for name, _ in faults} == {p.name for p in bad}
        for mode, cache in caches.items():
            for num_workers in (0, 2):
                loader = loader_of(manifest, num_workers, cache=cache, on_device=on_device)
                assert isinstance(loader, CacheReader) == bool(
                    cache and on_device and num_workers == 0
                )
                assert contents(loader) == expected, (mode, num_workers, on_device)
    # Wraps around: the first pair replaces the last, augmented by the last one's draw.
    place = next(b for b in expected if 15 in b[3])
    assert place[2][place[3].index(15)] == manifest.pairs[0].name
    # Control: only batches without a bad pair equal those of readable data.
    kept = contents(loader_of(manifest))
    for before, after in zip(sound, kept, strict=True):
        assert (before == after) == (not after[-1])


def test_too_many_in_a_row_are_an_error_wherever_they_are_read(data: Path, tmp_path: Path) -> None:
    manifest = load_train([data])
    for pair in manifest.pairs[2:6]:
        pair.image.write_bytes(b"")
    for mode in ("none", "disk"):
        for on_device in (False, True):
            options = {"cache": cache_of(manifest, tmp_path / "c", mode), "on_device": on_device}
            with pytest.raises(DataError, match="4 samples in a row") as caught:
                contents(loader_of(manifest, **options))
            assert manifest.pairs[2].image.name in str(caught.value)


def test_parts_and_copies_keep_what_was_replaced(data: Path) -> None:
    manifest = load_train([data])
    manifest.pairs[0].image.write_bytes(b"")
    for on_device in (False, True):
        loader = loader_of(manifest, on_device=on_device)
        raw = next(batch for batch in loader if batch.replaced)
        batch = finish(loader, raw, torch.device("cpu"))
        assert batch.replaced == raw.replaced and len(batch.replaced) == 1
        parts = batch.split(2)
        assert [fault for part in parts for fault in part.replaced] == batch.replaced
        assert batch.to(torch.device("cpu")).replaced == batch.replaced


class TestCache:
    def test_made_under_skip_it_is_an_error_under_error(self, data: Path, tmp_path: Path) -> None:
        manifest = load_train([data])
        bad = manifest.pairs[7]
        flip(bad.mask)
        cache = cache_of(manifest, tmp_path, "disk")
        assert cache.sizes[7].tolist() == [0, 0] and not cache.pixels[7].any()
        with pytest.raises(DataError, match="could not be decoded when the cache was made") as e:
            cache_of(manifest, tmp_path, "disk", unreadable="error")
        assert bad.mask.name in str(e.value)
        with pytest.raises(DataError, match=bad.mask.name):
            find_cache(manifest, config_of(tmp_path))
        # Controls: it is a hit under skip, and under error for the other pairs.
        assert find_cache(manifest, config_of(tmp_path, "skip"))[0] is not None
        part = dataclasses.replace(manifest, pairs=manifest.pairs[:7])
        assert find_cache(part, config_of(tmp_path))[0] is not None

    def test_a_repaired_file_makes_it_stale(self, data: Path, tmp_path: Path) -> None:
        manifest = load_train([data])
        mask = manifest.pairs[7].mask
        sound = mask.read_bytes()
        flip(mask)
        cache_of(manifest, tmp_path, "disk")
        mask.write_bytes(sound)
        os.utime(mask, ns=(5, 5))
        found, verdict = find_cache(manifest, config_of(tmp_path))
        assert found is None and "stale" in verdict
        cache = cache_of(manifest, tmp_path, "disk", unreadable="error")
        assert not cache.unreadable and cache.pixels[7].any()

    def test_a_row_that_went_bad_after_an_unfinished_build_is_emptied(
        self, data: Path, tmp_path: Path
    ) -> None:
        """A build under error fails at the end; one under skip reuses its rows."""
        manifest = load_train([data])
        flip(manifest.pairs[7].mask)
        with pytest.raises(DataError, match="1 files cannot be decoded"):
            cache_of(manifest, tmp_path, "disk", unreadable="error")
        cache = cache_of(manifest, tmp_path, "disk")
        assert list(cache.unreadable) == [(manifest.dataset, manifest.pairs[7].name)]


class TestEvaluation:
    def test_left_out_and_said(self, data: Path) -> None:
        manifest = load_train([data])
        for pair in manifest.pairs[4:8]:
            pair.image.write_bytes(b"")
        flip(manifest.pairs[9].mask)
        for num_workers in (0, 1):
            options = {"batch_size": 4, "num_workers": num_workers}
            batches = list(build_eval_loader(manifest, config_of(Path(), "skip"), **options))
            assert [len(batch.names) for batch in batches] == [4, 0, 3, 4]
            assert batches[1].images.shape == (0, 3, SIDE, SIDE)
            assert [name for b in batches for name, _ in b.unreadable] == [
                manifest.pairs[i].name for i in (4, 5, 6, 7, 9)
            ]
            with pytest.raises(DataError, match="is empty"):
                list(build_eval_loader(manifest, config_of(Path()), **options))


class TestBound:
    def test_by_hand(self) -> None:
        assert [allowed(count, 0.01) for count in (5, 199, 200, 4040)] == [1, 1, 2, 40]
        assert allowed(100, 0) == 1

    def test_each_name_is_told_once_and_counted_once(self) -> None:
        unreadable = Unreadable(200, 0.01)
        assert unreadable.note([]) == []
        assert unreadable.note([("a", "empty"), ("a", "empty")]) == [
            "a cannot be read and is replaced: empty"
        ]
        assert unreadable.note([("a", "empty")]) == []
        assert len(unreadable.note([("b", "cut short")])) == 1
        for _ in range(3):
            unreadable.note([("a", "empty"), ("b", "cut short")])
        with pytest.raises(DataError, match=r"3 of 200 training images.*allows only 2") as caught:
            unreadable.note([("c", "c.jpg is a web page")])
        assert "c.jpg is a web page" in str(caught.value)


def settings(data: Path, tmp_path: Path, **values: Any):
    base = {
        "data.roots": [str(data)],
        "data.img_size": SIDE,
        "data.cache_dir": str(tmp_path / "caches"),
        "data.num_workers": 0,
        "data.val_fraction": 0.25,
        "train.batch_size": 4,
        "train.epochs": 2,
        "model.pretrained": False,
    }
    return build_config(base | {f"data.{key}": value for key, value in values.items()})


class TestStart:
    @pytest.mark.parametrize("mode", ["none", "disk"])
    def test_one_line_and_the_same_data(self, data: Path, tmp_path: Path, mode: str) -> None:
        train, validation = (
            getattr(find_data(settings(data, tmp_path, cache="none"), World()), part)
            for part in ("train", "validation")
        )
        train.pairs[0].image.write_bytes(b"")
        hashes = {load_train([data]).content_hash()}
        with pytest.raises(DataError, match=r"(?s)1 of 16 pairs.*--unreadable skip"):
            find_data(settings(data, tmp_path, cache=mode), World())
        for _ in range(2):
            config = settings(data, tmp_path, cache=mode, unreadable="skip")
            with console.remembering() as lines:
                found = find_data(config, World())
            said = [line for line in lines if line.startswith("warning")]
            assert len(said) == 1 and train.pairs[0].name in said[0] and "1 of 16" in said[0]
            assert found.train.pairs == train.pairs and found.validation.pairs == validation.pairs
            hashes.add(found.data_hash)
            seed = config.train.seed
            loader = build_loader(found.train, config.data, found.loading, batch_size=4, seed=seed)
            assert [n for b in loader for n, _ in b.replaced] == [train.pairs[0].name]
        assert len(hashes) == 1

    @pytest.mark.parametrize("mode", ["none", "disk"])
    def test_more_than_the_bound_is_an_error(self, data: Path, tmp_path: Path, mode: str) -> None:
        config = settings(data, tmp_path, cache=mode, unreadable="skip")
        pairs = find_data(settings(data, tmp_path, cache="none"), World()).train.pairs
        # One fails in its header, the other only when decoded.
        pairs[0].image.write_bytes(b"")
        pairs[1].image.write_bytes(b"") if mode == "none" else flip(pairs[1].mask)
        with pytest.raises(DataError, match=r"2 of 12 training images.*allows only 1") as caught:
            find_data(config, World())
        assert pairs[1].name in str(caught.value)
        wider = settings(data, tmp_path, cache=mode, unreadable="skip", max_unreadable=0.2)
        assert find_data(wider, World()).data_hash

    def test_a_missing_file_has_a_hash_too(self, data: Path) -> None:
        manifest = load_train([data])
        sound = manifest.content_hash()
        manifest.pairs[0].image.unlink()
        assert manifest.content_hash() != sound
        assert len(unreadable_pairs(manifest)) == 1


class TestStopping:
    class Stopped(Exception):
        pass

    def stop_at(self, number: int) -> Callable[[], None]:
        calls = []

        def check_stop() -> None:
            calls.append(1)
            if len(calls) == number:
                raise self.Stopped

        return check_stop

    def test_a_build_that_is_stopped_continues(self, data, tmp_path, monkeypatch) -> None:
        from camoxpert.data.cache import build

        monkeypatch.setattr(build, "usable_cores", lambda: 1)
        config = settings(data, tmp_path, cache="disk")
        stops, seen = 0, []
        for number in range(1, 60):
            check = self.stop_at(number)
            monkeypatch.setattr(stop, "check", check)
            try:
                with console.remembering() as lines:
                    find_data(config, World())
                break
            except self.Stopped:
                stops += 1
            finally:
                seen += lines
        assert stops >= 6, "before, during and after the build"
        assert any(" of 16 pairs are already decoded" in line for line in seen)

    def test_the_check_of_headers_can_be_stopped(self, data, monkeypatch) -> None:
        from camoxpert.data.files import headers

        monkeypatch.setattr(headers, "CHECKED_AT_ONCE", 4)
        probed = []
        honest = headers.probe
        monkeypatch.setattr(
            headers, "probe", lambda path, **k: probed.append(path) or honest(path, **k)
        )
        monkeypatch.setattr(stop, "check", self.stop_at(3))
        with pytest.raises(self.Stopped):
            unreadable_pairs(load_train([data]))
        assert len(probed) == 2 * 2 * 4, "what was not asked for yet is not looked at"


def test_the_flag(train, data: Path, tmp_path: Path, capsys) -> None:
    load_train([data]).pairs[3].image.write_bytes(b"")
    words = ["--epochs", "2", "--no-test", "--no-report"]
    assert train(*words, data=data) == 3
    assert "--unreadable skip" in complained(capsys)
    assert train(*words, "--unreadable", "skip", "--dry-run", data=data) == 0
    assert "1 of 16 images cannot be read and are skipped" in capsys.readouterr().out


def test_a_run_tells_what_it_replaced(train, toy_data: Path, tmp_path: Path, capsys) -> None:
    """One broken picture: an error by default; with skip the run finishes, and reports it twice."""
    own = tmp_path / "data"
    shutil.copytree(toy_data, own)
    pictures = sorted((own / "TrainDataset" / "Imgs").iterdir())
    pictures[7].write_bytes(pictures[7].read_bytes()[:300])
    words = ("--epochs", "1", "--no-test", "--no-report", "--run-name", "x")
    assert train(*words, data=own, out=tmp_path / "runs") == 3
    assert pictures[7].name in capsys.readouterr().err
    assert train(*words, "--unreadable", "skip", data=own, out=tmp_path / "runs") == 0
    assert "warning" in capsys.readouterr().out
    text = (tmp_path / "runs" / "x" / "metrics.jsonl").read_text()
    assert f"{pictures[7].stem} cannot be read" in text or "validation images are left out" in text
