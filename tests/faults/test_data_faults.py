"""Data workers are killed or hang: the epoch keeps its batches, or ends with an error."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from camoxpert import console
from camoxpert.config import AugmentConfig, DataConfig
from camoxpert.data import supervise
from camoxpert.data.files.manifest import Manifest, load_train
from camoxpert.data.loader import Loader, LoaderPlan, build_eval_loader, build_loader
from camoxpert.data.samples.augment import Operators
from camoxpert.data.samples.datasets import EvalDataset, PairDataset
from camoxpert.errors import DataError
from camoxpert.synthesis.toy import generate_toy

STRONG = AugmentConfig(vflip=0.5, rotate=60, blur=0.3, noise=0.3)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    # Imported here once: a worker that imports it takes longer than the tests wait.
    Operators()
    root = tmp_path_factory.mktemp("data")
    generate_toy(root, num_train=24, num_test=0, size=32, seed=0)
    return load_train([root])


@pytest.fixture(autouse=True)
def looks_often(monkeypatch) -> None:
    """Check for dead workers every half second instead of every five."""
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.5)


@pytest.fixture
def loader_of(manifest: Manifest) -> Iterator[Callable[..., Loader]]:
    made = []

    def build(num_workers: int, **options: Any) -> Loader:
        data = DataConfig(img_size=32, augment=STRONG, start_method="fork", **options)
        loader = build_loader(manifest, data, LoaderPlan(num_workers), batch_size=2, seed=1)
        made.append(loader)
        return loader

    yield build
    for loader in made:
        loader.close()


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Collect the warnings of the test."""
    texts: list[str] = []
    with console.heard_by(texts.append):
        yield texts


def digest(batch: Any) -> str:
    pixels = batch.images.numpy().tobytes() + batch.masks.numpy().tobytes()
    return hashlib.sha1(pixels + repr((batch.names, batch.indices)).encode()).hexdigest()


def epoch_of(loader: Loader, epoch: int, start: int = 0) -> list[str]:
    loader.set_epoch(epoch, start_batch=start)
    return [digest(batch) for batch in loader]


def kill(loader: Any, worker: int = 0) -> None:
    process = loader.running[0]._workers[worker]
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def put_state(latch: supervise.Latch, seen: Any) -> None:
    seen.put(latch.is_set())


def locks_of_workers(iterator: Any) -> list[Any]:
    """Return the locks that all workers share, but that for reading, which only we take."""
    event, results = iterator._workers_done_event, iterator._worker_result_queue
    locks = [value for value in vars(event).values() if hasattr(value, "acquire")]
    locks = [lock for lock in locks if not isinstance(lock, Semaphore)]
    return [*locks, results._wlock]


class StillWaiting(Exception):
    pass


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise StillWaiting in code that has not ended after some seconds."""

    def late(*_: Any) -> None:
        raise StillWaiting

    handler = signal.signal(signal.SIGALRM, late)
    # The test runner's own time limit uses the same timer.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


class TestDeath:
    @pytest.mark.parametrize("persistent", [True, False])
    @pytest.mark.parametrize("start", [0, 3])
    def test_the_batches_of_the_epoch_stay_the_same(
        self, loader_of, persistent, start, told
    ) -> None:
        expected = [epoch_of(loader_of(0), epoch) for epoch in range(2)]
        loader = loader_of(2, persistent_workers=persistent)
        loader.set_epoch(0, start_batch=start)
        found = []
        for number, batch in enumerate(loader):
            found.append(digest(batch))
            if number == 2:
                kill(loader)
        assert found == expected[0][start:]
        assert len(told) == 1 and "A data worker died" in told[0] and "waited for" in told[0]
        assert epoch_of(loader, 1) == expected[1] and len(told) == 1
        # Control: the batches after the death depend on where the sampler was set.
        assert len(set(found)) == len(found)

    def test_one_a_epoch_and_then_an_error(self, loader_of, told) -> None:
        loader = loader_of(2)
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches = iter(loader)
            next(batches)
            kill(loader)
            assert len(list(batches)) == 11, "an epoch survives one death"
        assert len(told) == 2
        loader.set_epoch(2)
        batches = iter(loader)
        next(batches)
        kill(loader)
        with pytest.raises(DataError, match="--num-workers 0") as caught:
            while len(told) == 2:
                next(batches)
            kill(loader, 1)
            list(batches)
        assert "shared memory" in str(caught.value) and "waited for" in str(caught.value)
        assert not loader.running, "nobody is left behind"

    @pytest.mark.parametrize("goes_on", [True, False])
    def test_locks_that_the_dead_hold_are_not_waited_for(self, loader_of, told, goes_on) -> None:
        """A killed worker keeps the locks it held; some of them it takes for every batch."""
        expected = epoch_of(loader_of(0), 0)
        loader = loader_of(2)
        loader.set_epoch(0)
        batches = iter(loader)
        found = [digest(next(batches))]
        (iterator,) = loader.running
        workers = list(iterator._workers)
        for lock in locks_of_workers(iterator):
            assert lock.acquire(timeout=10)
        kill(loader)
        with interrupted_after(30):
            if goes_on:
                found += [digest(batch) for batch in batches]
            batches.close()
        assert found == expected[: len(found)] and len(found) == (12 if goes_on else 1)
        assert len(told) == goes_on
        assert not any(worker.join(5) or worker.is_alive() for worker in workers)

    def test_control_the_event_of_the_library_is_waited_for(self, loader_of, monkeypatch) -> None:
        monkeypatch.setattr(supervise, "without_event_lock", multiprocessing.get_context)
        loader = loader_of(2)
        batches = iter(loader)
        next(batches)
        (iterator,) = loader.running
        locks = locks_of_workers(iterator)
        assert len(locks) == 2, "one more than with Latch"
        for lock in locks:
            assert lock.acquire(timeout=10)
        kill(loader)
        with pytest.raises(StillWaiting), interrupted_after(2):
            list(batches)
        for lock in locks:
            lock.release()

    @pytest.mark.parametrize("killed", [True, False])
    def test_a_message_that_nobody_finishes(self, loader_of, told, killed) -> None:
        """A worker killed or hung while its pipe was full leaves half a message in it."""
        expected = epoch_of(loader_of(0), 0)
        loader = loader_of(2, worker_timeout=2.0)
        loader.set_epoch(0)
        batches = iter(loader)
        found = [digest(next(batches))]
        (iterator,) = loader.running
        results = iterator._worker_result_queue
        assert results._wlock.acquire(timeout=10)
        os.write(results._writer.fileno(), struct.pack("!i", 5000) + b"the beginning")
        if killed:
            kill(loader)
        with interrupted_after(30):
            found += [digest(batch) for batch in batches]
        assert found == expected
        assert len(told) == 1 and ("died" if killed else "did not answer in time") in told[0]

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_a_latch_is_seen_by_other_processes(self, method) -> None:
        context = supervise.without_event_lock(method)
        latch, seen = context.Event(), context.Queue()
        for value in (False, True):
            process = context.Process(target=put_state, args=(latch, seen))
            process.start()
            assert seen.get(timeout=60) is value
            process.join()
            latch.set()
        assert latch.is_set()

    def test_kept_workers_that_die_between_epochs(self, loader_of, told) -> None:
        loader = loader_of(2)
        expected = [epoch_of(loader_of(0), epoch) for epoch in range(2)]
        assert epoch_of(loader, 0) == expected[0]
        kill(loader)
        assert epoch_of(loader, 1) == expected[1] and len(told) == 1

    def test_a_sample_that_kills_is_named(self, loader_of, manifest, monkeypatch, told) -> None:
        """A restart does not help here: it is tried once, not repeatedly."""
        honest = PairDataset._decoded
        first = loader_of(0)._sampler.batch_indices(0)[0]

        def deadly(self: PairDataset, place: int) -> Any:
            if place == first:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(self, place)

        monkeypatch.setattr(PairDataset, "_decoded", deadly)
        with pytest.raises(DataError) as caught:
            epoch_of(loader_of(1), 0)
        assert len(told) == 1
        assert manifest.pairs[first].name in str(caught.value)
        assert manifest.pairs[first].name in told[0]

    def test_it_is_noticed_only_while_waiting_for_a_batch(self, loader_of, monkeypatch) -> None:
        """A signal handler that raises in an optimizer step would leave half an update behind."""

        def step_in_which_a_worker_dies() -> None:
            loader = loader_of(2)
            batches = iter(loader)
            next(batches)
            os.kill(loader.running[0]._workers[0].pid, signal.SIGKILL)
            try:
                deadline = time.monotonic() + 0.5
                while time.monotonic() < deadline:
                    pass
                assert len(list(batches)) == 11
            finally:
                monkeypatch.undo()
                loader.close()

        # torch's handler is there from the start, as it is after any other DataLoader.
        for _ in DataLoader(range(2), num_workers=1, multiprocessing_context="fork"):
            pass
        assert signal.getsignal(signal.SIGCHLD) not in (signal.SIG_DFL, signal.SIG_IGN, None)
        step_in_which_a_worker_dies()
        # Control: workers that the handler knows interrupt the step.
        monkeypatch.setattr(supervise, "unwatch", lambda iterator: None)
        with pytest.raises(RuntimeError, match="is killed by signal"):
            step_in_which_a_worker_dies()

    def test_evaluation_continues(self, manifest: Manifest, told) -> None:
        def read(num_workers: int, deaths: int) -> list[tuple[str, ...]]:
            loader = build_eval_loader(
                manifest,
                DataConfig(img_size=32, start_method="fork"),
                batch_size=2,
                num_workers=num_workers,
            )
            found = []
            for number, batch in enumerate(loader):
                found.append((*batch.names, hashlib.sha1(batch.images.numpy()).hexdigest()))
                if number == 1 and deaths:
                    kill(loader)
                    deaths -= 1
            return found

        assert read(2, 1) == read(0, 0) and len(told) == 1

    def test_an_error_of_our_own_keeps_its_traceback(self, loader_of, monkeypatch, told) -> None:
        def wrong(self: PairDataset, place: int) -> Any:
            raise RuntimeError("our own mistake")

        monkeypatch.setattr(PairDataset, "_decoded", wrong)
        with pytest.raises(RuntimeError, match="our own mistake"):
            epoch_of(loader_of(1), 0)
        assert not told

    def test_an_epoch_that_is_left_early_leaves_nothing_to_the_next(self, loader_of) -> None:
        loader = loader_of(2)
        expected = epoch_of(loader_of(0), 1)
        loader.set_epoch(0)
        batches = iter(loader)
        next(batches)
        processes = list(loader.running[0]._workers)
        batches.close()
        assert not any(process.is_alive() for process in processes)
        assert epoch_of(loader, 1) == expected


class TestHang:
    @pytest.fixture
    def hangs_at(self, monkeypatch, tmp_path: Path) -> Callable[..., None]:
        """Return a function that hangs the worker reading sample 7, the first few times."""

        def set_up(times: int, dataset: type = PairDataset, method: str = "_decoded") -> None:
            honest = getattr(dataset, method)

            def stuck(self: Any, place: int) -> Any:
                if place == 7:
                    for time_ in range(times):
                        try:
                            (tmp_path / str(time_)).touch(exist_ok=False)
                        except FileExistsError:
                            continue
                        time.sleep(1000)
                return honest(self, place)

            monkeypatch.setattr(dataset, method, stuck)

        return set_up

    def test_once_the_batches_stay_the_same(self, loader_of, hangs_at, told) -> None:
        expected = epoch_of(loader_of(0), 0)
        hangs_at(1)
        loader = loader_of(2, worker_timeout=2.0)
        assert epoch_of(loader, 0) == expected
        assert len(told) == 1 and "did not answer" in told[0]

    def test_twice_the_samples_are_named(self, loader_of, manifest, hangs_at) -> None:
        hangs_at(2)
        loader = loader_of(2, worker_timeout=2.0)
        with pytest.raises(DataError, match=r"data\.worker_timeout") as caught:
            epoch_of(loader, 0)
        assert manifest.pairs[7].name in str(caught.value)

    def test_evaluation(self, manifest: Manifest, hangs_at) -> None:
        hangs_at(2, EvalDataset, "__getitem__")
        loader = build_eval_loader(
            manifest,
            DataConfig(img_size=32, worker_timeout=1.0, start_method="fork"),
            batch_size=8,
            num_workers=1,
        )
        with pytest.raises(DataError, match="waited for") as caught:
            list(loader)
        names = [pair.name for pair in manifest.pairs]
        assert ", ".join(names[:4]) + " and 4 more" in str(caught.value)

    def test_slow_is_not_hung(self, loader_of, monkeypatch, told) -> None:
        """Several checks of the workers pass before the timeout; 0 waits without limit."""
        honest = PairDataset._decoded

        def slow(self: PairDataset, place: int) -> Any:
            if place == 7:
                time.sleep(1.2)
            return honest(self, place)

        expected = epoch_of(loader_of(0), 0)
        monkeypatch.setattr(PairDataset, "_decoded", slow)
        for seconds in (5.0, 0.0):
            loader = loader_of(1, worker_timeout=seconds)
            assert epoch_of(loader, 0) == expected
        assert not told


@pytest.mark.slow
def test_pinned_batches_of_the_dead_end_the_process_in_two_paragraphs(
    manifest: Manifest, tmp_path: Path
) -> None:
    """On CUDA a thread of torch's reads what workers send: it neither prints a traceback nor keeps
    the process from ending."""
    root = manifest.pairs[0].image.parents[2]
    script = Path(__file__).with_name("pinned_workers.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"},
    )
    assert done.returncode == 3 and done.stdout == "DataError\n", done.stderr
    said = [line for line in done.stderr.splitlines() if line and "Warning" not in line]
    assert "Traceback" not in done.stderr and said[0].startswith("warning     A data worker died")


def test_it_is_said_on_stderr(loader_of, capfd) -> None:
    loader = loader_of(1)
    batches = iter(loader)
    next(batches)
    kill(loader)
    assert len(list(batches)) == 11
    assert "warning     A data worker died" in capfd.readouterr().err
