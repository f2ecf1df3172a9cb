"""A cache is used only if it matches the data, the settings and the code."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.printed import complained

from camoxpert import console, stop
from camoxpert.config import AugmentConfig, DataConfig
from camoxpert.data.cache import build, choice
from camoxpert.data.cache.build import find_cache, open_cache
from camoxpert.data.cache.choice import cache_bytes, cache_name, choose_cache, default_folder
from camoxpert.data.cache.table import PixelCache
from camoxpert.data.files.image_io import read_pair
from camoxpert.data.files.manifest import load_train
from camoxpert.data.loader import CacheReader, LoaderPlan, build_loader, device_batches
from camoxpert.data.samples.augment import SampleTransform, square_pair
from camoxpert.data.samples.sampler import EpochSampler
from camoxpert.errors import DataError
from camoxpert.synthesis.toy import generate_toy

STRONG = AugmentConfig(vflip=0.5, rotate=60, blur=0.3, noise=0.3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generate_toy(tmp_path / "data", num_train=20, num_test=0, size=40, seed=0)
    return tmp_path / "data"


def settings(folder: Path, side: int = 32, **options: object) -> DataConfig:
    return DataConfig(img_size=side, cache_dir=str(folder), max_pixels=10**6, **options)


def opened(data: Path, folder: Path, *, side: int = 32, mode: str = "disk", **options: object):
    """Return a cache of ``data``, the printed lines and the number of pairs decoded."""
    decoded = []
    honest = build.decode_pair

    def counted(*arguments, **options):
        decoded.append(1)
        return honest(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, console.remembering() as lines:
        patch.setattr(build, "decode_pair", counted)
        found = open_cache(load_train([data]), settings(folder, side, **options), mode=mode)
    return found, "\n".join(lines), len(decoded)


class TestContent:
    @pytest.mark.parametrize("mode", ["disk", "ram"])
    def test_rows_are_the_decoded_pairs(self, data: Path, tmp_path: Path, mode) -> None:
        found, _, decoded = opened(data, tmp_path / "caches", mode=mode)
        manifest = load_train([data])
        assert decoded == 20 and found.pixels.shape == (20, 32, 32, 4)
        for row, pair in zip(found.of(manifest), manifest.pairs, strict=True):
            expected = square_pair(*read_pair(pair.image, pair.mask), 32)
            assert np.array_equal(found.pixels[row], expected)
            assert found.sizes[row].tolist() == [40, 40]

    def test_a_part_of_the_data_finds_its_rows(self, data: Path, tmp_path: Path) -> None:
        found, _, _ = opened(data, tmp_path)
        manifest = load_train([data])
        part = dataclasses.replace(manifest, pairs=manifest.pairs[5:2:-1])
        assert found.of(part).tolist() == [5, 4, 3]

    def test_the_data_set_is_not_touched(self, data: Path, tmp_path: Path) -> None:
        before = sorted((str(p), p.stat().st_mtime_ns) for p in data.rglob("*"))
        opened(data, tmp_path / "caches")
        assert sorted((str(p), p.stat().st_mtime_ns) for p in data.rglob("*")) == before

    def test_it_travels_to_workers_by_name(self, data: Path, tmp_path: Path) -> None:
        found, _, _ = opened(data, tmp_path)
        packed = pickle.dumps(found)
        assert len(packed) < found.pixels.nbytes / 4
        assert np.array_equal(pickle.loads(packed).pixels, found.pixels)
        memory = PixelCache(np.ones((1, 2, 2, 4), np.uint8), np.ones((1, 2)), {})
        assert np.array_equal(pickle.loads(pickle.dumps(memory)).pixels, memory.pixels)


class TestJudgement:
    def test_miss_then_hit(self, data: Path, tmp_path: Path) -> None:
        _, said, decoded = opened(data, tmp_path)
        assert "miss: nothing was built" in said and decoded == 20
        _, said, decoded = opened(data, tmp_path)
        assert "hit" in said and decoded == 0

    def test_a_changed_file_is_named(self, data: Path, tmp_path: Path) -> None:
        opened(data, tmp_path)
        pair = load_train([data]).pairs[7]
        os.utime(pair.mask, ns=(1, 1))
        _, said, decoded = opened(data, tmp_path)
        assert f"stale: files 1 changed (toy/{pair.name})" in said.replace("data/", "toy/")
        assert decoded == 20
        assert "hit" in opened(data, tmp_path)[1]

    def test_new_and_missing_files_are_named(self, data: Path, tmp_path: Path) -> None:
        opened(data, tmp_path)
        pair = load_train([data]).pairs[3]
        pair.image.rename(pair.image.with_name("other" + pair.image.suffix))
        pair.mask.rename(pair.mask.with_name("other" + pair.mask.suffix))
        _, said, _ = opened(data, tmp_path)
        assert "1 new" in said and "1 gone" in said and pair.name in said

    def test_a_part_of_its_pairs_is_a_hit(self, data: Path, tmp_path: Path) -> None:
        """A clean list leaves pairs out: the cache still holds them, and nothing is rebuilt."""
        whole, _, _ = opened(data, tmp_path)
        manifest = load_train([data])
        part = dataclasses.replace(manifest, pairs=manifest.pairs[3:9])
        found, verdict = find_cache(part, settings(tmp_path))
        assert not verdict
        assert np.array_equal(found.pixels[found.of(part)], whole.pixels[3:9])

    def test_a_worker_does_not_open_another_cache_by_its_name(self, data, tmp_path) -> None:
        found, _, _ = opened(data, tmp_path)
        packed = pickle.dumps(found)
        os.utime(load_train([data]).pairs[0].image, ns=(1, 1))
        opened(data, tmp_path)
        with pytest.raises(DataError, match="was replaced by another run"):
            pickle.loads(packed)
        assert found.pixels.shape[0] == 20, "what is already mapped stays"

    def test_another_size_has_its_own_cache(self, data: Path, tmp_path: Path) -> None:
        opened(data, tmp_path, side=32)
        _, said, decoded = opened(data, tmp_path, side=64)
        assert "miss" in said and decoded == 20
        assert opened(data, tmp_path, side=32)[2] == 0

    @pytest.mark.parametrize(
        ("key", "value"), [("format", 0), ("max_pixels", 7), ("versions", {"opencv": "1"})]
    )
    def test_other_settings_or_code_make_it_stale(self, data, tmp_path, key, value) -> None:
        found, _, _ = opened(data, tmp_path)
        table = found.path.parent / "table.json"
        table.write_text(json.dumps(json.loads(table.read_text()) | {key: value}))
        _, said, decoded = opened(data, tmp_path)
        assert "stale" in said and decoded == 20

    @pytest.mark.parametrize(
        "harm", ["truncate", "flip", "table", "no checksums", "sizes", "vanish", "longer"]
    )
    def test_damage_is_found_and_repaired(self, data: Path, tmp_path: Path, harm) -> None:
        found, _, _ = opened(data, tmp_path)
        expected = np.array(found.pixels)
        folder, pixels = found.path.parent, found.path
        del found
        if harm == "truncate":
            os.truncate(pixels, pixels.stat().st_size // 2)
        elif harm == "longer":
            os.truncate(pixels, pixels.stat().st_size + 1)
        elif harm == "flip":
            content = bytearray(pixels.read_bytes())
            content[len(content) // 3] ^= 1
            pixels.write_bytes(content)
        elif harm == "table":
            (folder / "table.json").write_text('{"format": ')
        elif harm == "no checksums":
            table = json.loads((folder / "table.json").read_text())
            del table["checksums"]
            (folder / "table.json").write_text(json.dumps(table))
        elif harm == "sizes":
            (folder / "sizes.npy").write_bytes(b"")
        else:
            pixels.unlink()
        again, said, decoded = opened(data, tmp_path)
        assert "corrupt" in said and decoded == 20
        assert np.array_equal(again.pixels, expected)

    def test_strict(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="--strict-cache: there is no usable cache"):
            opened(data, tmp_path, strict_cache=True)
        opened(data, tmp_path)
        assert "hit" in opened(data, tmp_path, strict_cache=True)[1]
        os.utime(load_train([data]).pairs[0].image, ns=(1, 1))
        with pytest.raises(DataError, match="stale"):
            opened(data, tmp_path, strict_cache=True)


class TestBuilding:
    def test_killed_half_way_it_is_not_used_and_continues(self, data: Path, tmp_path: Path) -> None:
        script = textwrap.dedent(
            f"""
            import os, signal
            from camoxpert import console
            from camoxpert.config import DataConfig
            from camoxpert.data.cache.build import open_cache
            from camoxpert.data.files.manifest import load_train

            def track(items, description, total):
                for done, item in enumerate(items):
                    yield item
                    if done == 8:
                        os.kill(os.getpid(), signal.SIGKILL)

            console.track = track
            data = DataConfig(img_size=32, cache_dir={str(tmp_path)!r}, max_pixels=10**6)
            open_cache(load_train([{str(data)!r}]), data, mode="disk")
            """
        )
        done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert "did not finish" in find_cache(load_train([data]), settings(tmp_path))[1]
        found, said, decoded = opened(data, tmp_path)
        assert "9 of 20 pairs are already decoded" in said and decoded == 11
        fresh, _, _ = opened(data, tmp_path / "fresh")
        assert np.array_equal(found.pixels, fresh.pixels)
        assert np.array_equal(found.sizes, fresh.sizes)

    def test_a_half_built_cache_of_other_files_is_started_over(
        self, data, tmp_path, monkeypatch
    ) -> None:
        class Stopped(Exception):
            pass

        def stop_at_second() -> None:
            calls.append(1)
            if len(calls) == 2:
                raise Stopped

        calls: list[int] = []
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(stop, "check", stop_at_second)
            opened(data, tmp_path)
        os.utime(load_train([data]).pairs[0].image, ns=(5, 5))
        _, _, decoded = opened(data, tmp_path)
        assert decoded == 20

    def test_two_processes_build_it_once(self, data: Path, tmp_path: Path) -> None:
        script = textwrap.dedent(
            f"""
            import time
            from camoxpert import console
            from camoxpert.config import DataConfig
            from camoxpert.data.cache.build import open_cache
            from camoxpert.data.files.manifest import load_train

            def track(items, description, total):
                for item in items:
                    print("decoded", item, flush=True)
                    time.sleep(0.1)
                    yield item

            console.track = track
            data = DataConfig(img_size=32, cache_dir={str(tmp_path)!r}, max_pixels=10**6)
            open_cache(load_train([{str(data)!r}]), data, mode="disk")
            """
        )
        command = [sys.executable, "-c", script]
        first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        time.sleep(0.05)
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = [process.communicate(timeout=60)[0] for process in (first, second)]
        assert sum(text.count("decoded ") for text in said) == 20
        assert (first.returncode, second.returncode) == (0, 0)

    def test_every_unreadable_file_is_named(self, data: Path, tmp_path: Path) -> None:
        pairs = load_train([data]).pairs
        pairs[4].image.write_bytes(b"")
        pairs[9].mask.write_bytes(b"<html>")
        with pytest.raises(DataError, match="2 files cannot be decoded") as caught:
            opened(data, tmp_path)
        assert pairs[4].image.name in str(caught.value) and pairs[9].mask.name in str(caught.value)
        assert "did not finish" in find_cache(load_train([data]), settings(tmp_path))[1]

    def test_a_full_disk_is_known_before_writing(self, data, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(build, "free_disk", lambda folder: 1000)
        with pytest.raises(DataError, match=r"GB free\. Give another folder with --cache-dir"):
            opened(data, tmp_path)
        assert not list(tmp_path.glob("*/pixels.u8"))

    def test_a_folder_that_cannot_be_written(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match=r"cannot be written"):
            opened(data, tmp_path / "file")


class TestMemory:
    def test_too_large_for_memory(self, data: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(build, "available_memory", lambda: 1000)
        with pytest.raises(DataError, match="--cache ram needs"):
            opened(data, tmp_path, mode="ram")

    def test_a_cache_in_this_process_needs_forked_workers(self, train, capsys) -> None:
        words = ["--cache", "ram", "data.start_method=spawn", "--num-workers", "1", "--dry-run"]
        assert train(*words) == 2
        assert "do not share" in complained(capsys)


class TestChoice:
    def test_a_cache_that_is_there_is_used_on_a_full_disk(
        self, train, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        words = ["--cache-dir", str(tmp_path / "c"), "--no-test", "--no-report", "--epochs", "2"]
        assert train(*words) == 0
        monkeypatch.setattr(choice, "free_disk", lambda folder: None)
        capsys.readouterr()
        assert train(*words, "--seed", "9", "--dry-run") == 0
        assert "hit" in capsys.readouterr().out
        assert train(*words, "--seed", "9", "--img-size", "64", "--strict-cache") == 3
        quick = ("--img-size", "64", "--data-fraction", "0.5", "--dry-run")
        assert train(*words, *quick) == 0
        assert train(*words, *quick, "--strict-cache") == 3, "a quick run is asked for it, too"

    def choose(self, monkeypatch, *, disk: int | None, memory: int | None, epochs: int = 5, **k):
        monkeypatch.setattr(choice, "free_disk", lambda folder: disk)
        monkeypatch.setattr(choice, "available_memory", lambda: memory)
        manifest = k.pop("manifest")
        return choose_cache(manifest, settings(Path("x")), epochs=epochs, **k)

    def test_auto(self, data: Path, monkeypatch) -> None:
        manifest = load_train([data])
        much = 1 << 40
        for disk, memory, expected in (
            (much, much, "disk"),
            (1000, much, "ram"),
            (None, much, "ram"),
            (1000, 1000, "none"),
            (None, None, "none"),
        ):
            found = self.choose(monkeypatch, disk=disk, memory=memory, manifest=manifest)
            assert found[0] == expected and found[1]
        one = self.choose(monkeypatch, disk=much, memory=much, epochs=1, manifest=manifest)
        assert one[0] == "none"
        assert choose_cache(manifest, settings(Path("x"), cache="ram"), epochs=1)[0] == "ram"

    def test_every_process_would_keep_its_own_copy_in_memory(self, data, monkeypatch) -> None:
        manifest = load_train([data])
        needed = cache_bytes(manifest, 32)
        for processes, expected in ((1, "ram"), (2, "ram"), (3, "none")):
            found, why = self.choose(
                monkeypatch, disk=None, memory=4 * needed, manifest=manifest, processes=processes
            )
            assert found == expected
            assert processes != 2 or "in each of 2 processes" in why

    def test_names_tell_data_and_size(self, data: Path) -> None:
        manifest = load_train([data])
        assert cache_name(manifest, 32) != cache_name(manifest, 64)
        assert "-32-" in cache_name(manifest, 32)

    def test_the_folder(self, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CAMOXPERT_CACHE", str(tmp_path))
        assert default_folder() == tmp_path
        monkeypatch.delenv("CAMOXPERT_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        assert default_folder() == Path("/elsewhere/camoxpert")


def contents(loader, epoch: int, start: int = 0) -> list[bytes]:
    loader.set_epoch(epoch, start_batch=start)
    return [
        batch.images.numpy().tobytes() + batch.masks.numpy().tobytes() + repr(batch.names).encode()
        for batch, _ in device_batches(loader, torch.device("cpu"))
    ]


@pytest.mark.parametrize("on_device", [False, True])
def test_samples_are_the_same_bit_for_bit_however_they_are_read(data, tmp_path, on_device) -> None:
    """Cached on disk, in memory or not; 0 to 4 workers, persistent or not; resumed or not."""
    manifest = load_train([data])
    caches = {mode: opened(data, tmp_path, mode=mode, side=48)[0] for mode in ("disk", "ram")}

    def loader(cache: str, workers: int, **options: object):
        config = DataConfig(
            img_size=32, multi_scale=(1.0, 2.0), source_size=48, augment=STRONG, **options
        )
        plan = LoaderPlan(workers, cache=caches.get(cache), on_device=on_device)
        return build_loader(manifest, config, plan, batch_size=8, seed=1)

    plain = loader("none", 0)
    expected = [contents(plain, epoch) for epoch in range(3)]
    assert len({len(batch) for epoch in expected for batch in epoch}) > 2, "several sizes"
    for cache, workers, options in (
        ("none", 1, {}),
        ("disk", 0, {}),
        ("disk", 1, {"persistent_workers": False}),
        ("disk", 4, {}),
        ("ram", 0, {}),
        ("ram", 1, {}),
        ("disk", 1, {"start_method": "spawn"}),
    ):
        read = loader(cache, workers, **options)
        assert isinstance(read, CacheReader) == (on_device and workers == 0)
        assert [contents(read, epoch) for epoch in range(2)] == expected[:2]
        assert contents(read, 2, start=1) == expected[2][1:], "resumed in the middle of an epoch"
        read.close()


def test_a_reader_that_is_left_early_ends_its_thread(data: Path, tmp_path: Path) -> None:
    import threading

    found, _, _ = opened(data, tmp_path)
    sampler = EpochSampler(20, seed=0, batch_size=2, targets=(32,))
    transform = SampleTransform(img_size=32, augment=None, seed=0)
    reader = CacheReader(load_train([data]), found, sampler, transform)
    before = threading.active_count()
    iterator = iter(reader)
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    assert threading.active_count() == before
    assert len(list(reader)) == len(reader) == 10


def test_training_is_the_same_with_and_without_it(train, tmp_path: Path) -> None:
    weights = []
    for mode in ("none", "disk", "disk", "ram"):
        name = f"{mode}-{len(weights)}"
        words = ["--cache", mode, "--run-name", name, "--epochs", "2", "--no-test", "--no-report"]
        assert train(*words, "--cache-dir", str(tmp_path / "caches")) == 0
        path = tmp_path / name / "checkpoints" / "best.pt"
        weights.append(torch.load(path, weights_only=True)["model"])
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_what_is_said_at_the_start(train, tmp_path: Path, capsys) -> None:
    words = ["--cache", "disk", "--cache-dir", str(tmp_path / "c"), "--no-test", "--no-report"]
    assert train(*words, "--dry-run") == 0
    assert "training would decode into it first" in capsys.readouterr().out
    assert not (tmp_path / "c").exists(), "a dry run writes nothing"
    for more in ([], ["--dry-run"]):
        assert train(*words, "--epochs", "2", "--strict-cache", *more) == 3
        assert "--strict-cache" in capsys.readouterr().err
    assert train(*words, "--epochs", "2") == 0
    assert "miss: nothing was built" in capsys.readouterr().out
    assert train(*words, "--epochs", "3", "--strict-cache") == 0
    assert "hit" in capsys.readouterr().out
    assert train("--strict-cache", "--cache", "none") == 2


def test_training_on_device_changes_and_several_sizes(train, capsys) -> None:
    words = ["--augment-on", "device", "--multi-scale", "1.0", "2.0", "--epochs", "2"]
    assert train(*words, "--no-test", "--no-report") == 0
    said = capsys.readouterr().out
    assert "where the step runs: as asked; training sizes 32, 64 px" in said


def test_memory_of_batches_is_used_again_and_never_too_early(data: Path, tmp_path: Path) -> None:
    found, _, _ = opened(data, tmp_path)
    sampler = EpochSampler(20, seed=0, batch_size=4, targets=(32,))
    reader = CacheReader(
        load_train([data]), found, sampler, SampleTransform(img_size=32, augment=None, seed=0)
    )

    def keys(start: int) -> list[tuple[int, int, int]]:
        return [(0, index, 32) for index in range(start, start + 4)]

    first = reader.read(keys(0))
    view, address = first.pixels[1:3, ..., 3], first.pixels.data_ptr()
    expected = view.clone()
    del first
    second = reader.read(keys(4))
    assert second.pixels.data_ptr() != address, "a view of the first batch is still in use"
    assert torch.equal(view, expected)
    del view
    third = reader.read(keys(8))
    assert third.pixels.data_ptr() == address
    assert torch.equal(third.pixels, torch.from_numpy(np.array(found.pixels[8:12])))
