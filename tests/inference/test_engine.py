"""The pipeline: order, chunks, faults, memory."""

from __future__ import annotations

import pytest
import torch
from inference.fakes import FakeStages, Thing, names, things

from camoxpert import stop
from camoxpert.errors import DataError, Stopped
from camoxpert.inference import engine
from camoxpert.inference.batching import CLEAN_BATCHES, BatchSize, choose_batch_size
from camoxpert.inference.engine import Chunk, ChunkResult, Pipeline
from camoxpert.inference.local import Chunks, LocalEngine
from camoxpert.inference.timing import Timing


def run(stages: FakeStages, items: list[Thing], size: int, **options: int) -> list[ChunkResult]:
    with Pipeline(
        stages,
        Chunks(items, options.pop("chunk", size)),
        batch_size=options.pop("batch", None) or BatchSize(size),
        timing=Timing(),
        worker="here",
        **options,
    ) as pipeline:
        return list(pipeline.results())


def test_rows_come_in_order_with_the_values_of_their_items() -> None:
    stages = FakeStages()
    results = run(stages, things(7), 3)
    assert [result.number for result in results] == [0, 1, 2]
    rows = [row for result in results for row in result.rows]
    assert names(rows) == [f"t{n}" for n in range(7)]
    assert [row["found"] for row in rows] == [[2.0 * n] for n in range(7)]
    assert stages.passes == [[0, 1, 2], [3, 4, 5], [6]]
    assert set(rows[0]["seconds"]) == {"read", "forward", "write"} and rows[0]["worker"] == "here"


def test_a_slow_writer_does_not_change_the_order() -> None:
    results = run(FakeStages(), things(6, t0="slow"), 1)
    assert [result.number for result in results] == list(range(6))


def test_an_item_that_cannot_be_read_is_a_row_and_its_chunk_keeps_its_batch() -> None:
    stages = FakeStages()
    results = run(stages, things(4, t1="unreadable", t2="strange"), 4)
    rows = results[0].rows
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok"]
    assert rows[1]["reason"] == "t1 is damaged"
    assert rows[2]["reason"] == "it cannot be read: ZeroDivisionError: in a decoder"
    assert stages.passes == [[0, 3]]


def test_a_chunk_without_a_readable_item() -> None:
    results = run(FakeStages(), things(3, t0="unreadable", t1="unreadable"), 1)
    assert [row["status"] for result in results for row in result.rows] == [
        "failed", "failed", "ok"
    ]  # fmt: skip


def test_batches_do_not_cross_chunks() -> None:
    """A chunk that is repeated has the same batches, whatever is done before it."""
    stages = FakeStages()
    run(stages, things(6), 4, chunk=3)
    assert stages.passes == [[0, 1, 2], [3, 4, 5]]


def test_tiles_of_several_images_share_batches_and_shapes_do_not_mix() -> None:
    stages = FakeStages()
    items = [Thing("a", 1, (2, 2, 2)), Thing("b", 5, (2, 2)), Thing("c", 9, (4,))]
    (result,) = run(stages, items, 4, chunk=3)
    assert stages.passes == [[1, 1.5, 2, 5], [5.5], [9]]
    assert [row["found"] for row in result.rows] == [[2, 3, 4], [10, 11], [18]]


def test_inputs_of_different_shapes_fill_batches_of_their_own() -> None:
    stages = FakeStages()
    items = [Thing("a", 1, (2, 4)), Thing("b", 5, (2, 4)), Thing("c", 9, (2, 4))]
    (result,) = run(stages, items, 2, chunk=3)
    assert stages.passes == [[1, 5], [1.5, 5.5], [9], [9.5]]
    assert [row["found"] for row in result.rows] == [[2, 3], [10, 11], [18, 19]]


def test_outputs_that_cannot_be_written_end_the_run_after_the_chunks_before() -> None:
    done = []
    with Pipeline(
        FakeStages(),
        Chunks(things(9, t4="disk full"), 1),
        batch_size=BatchSize(1),
        timing=Timing(),
        worker="",
    ) as pipeline:
        results = pipeline.results()
        with pytest.raises(DataError, match="No space left"):
            while True:
                done.append(next(results).number)
    assert done == [0, 1, 2, 3]


class TestOutOfMemory:
    def test_the_batch_is_halved_and_the_same_images_are_tried_again(self) -> None:
        stages, size = FakeStages(most=3), BatchSize(8)
        results = run(stages, things(16), 8, batch=size)
        rows = [row for result in results for row in result.rows]
        assert [row["found"] for row in rows] == [[2.0 * n] for n in range(16)]
        # 8 fail, 4 fail, 2 fit; then batches of the new size at once.
        assert stages.passes[:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert max(map(len, stages.passes)) <= 3 and size.value == 2 and size.halvings >= 2

    def test_an_image_that_does_not_fit_alone_is_a_row(self) -> None:
        class OneTooLarge(FakeStages):
            def forward(self, inputs: torch.Tensor, samples=()) -> torch.Tensor:
                if (inputs == 5).any():
                    raise torch.OutOfMemoryError("no room")
                return super().forward(inputs)

        results = run(OneTooLarge(), things(8), 4)
        rows = {row["item"]: row for result in results for row in result.rows}
        assert len(rows) == 8 and rows["t5"]["status"] == "failed"
        assert "does not fit" in rows["t5"]["reason"]
        assert all(rows[f"t{n}"]["found"] == [2.0 * n] for n in range(8) if n != 5)

    def test_the_size_grows_back_once(self) -> None:
        size = BatchSize(8)
        size.halve(8)
        size.halve(4)
        assert size.value == 2
        for _ in range(CLEAN_BATCHES - 1):
            size.note_clean()
        assert size.value == 2
        size.note_clean()
        assert size.value == 4
        for _ in range(3 * CLEAN_BATCHES):
            size.note_clean()
        assert size.value == 4

    def test_a_size_that_never_failed_stays(self) -> None:
        size = BatchSize(8)
        for _ in range(3 * CLEAN_BATCHES):
            size.note_clean()
        assert size.value == 8


def test_few_large_images_are_read_ahead(monkeypatch) -> None:
    """Held memory, not the batch size, bounds how many images are open at once."""
    monkeypatch.setattr(engine, "HELD_BYTES", 250)
    stages = FakeStages()
    seen = []
    with Pipeline(
        stages, Chunks(things(64), 64), batch_size=BatchSize(64), timing=Timing(), worker=""
    ) as pipeline:
        for _ in pipeline.results():
            seen.append(len(stages.read_names))
    assert seen == [64] and stages.passes[0][:2] == [0, 1]


def test_work_is_asked_for_as_it_is_needed() -> None:
    """A source that hands out chunks on demand is not drained by its first worker."""
    taken = []

    class Source(Chunks):
        def take(self, *, wait: bool = True) -> Chunk | None:
            chunk = super().take(wait=wait)
            taken.append(chunk)
            return chunk

    with Pipeline(
        FakeStages(), Source(things(40), 2), batch_size=BatchSize(2), timing=Timing(), worker=""
    ) as pipeline:
        next(results := pipeline.results())
        assert len(taken) <= 6
        results.close()


def test_a_stop_ends_it_between_batches() -> None:
    done = []
    with stop.watch() as asked, pytest.raises(Stopped):
        for result in LocalEngine(FakeStages(), batch_size=1).results(things(50)):
            done.append(result.number)
            if len(done) == 3:
                asked.deadline = 0.0
    assert done == [0, 1, 2]


def test_shares_of_the_wall_add_up() -> None:
    local = LocalEngine(FakeStages(), batch_size=2)
    assert len(list(local.results(things(20)))) == 10
    (worker,) = local.summary()["workers"]
    assert sum(worker["loop_shares"].values()) == pytest.approx(1, abs=0.02)
    assert worker["images"] == 20 and worker["forward_passes"] == 10
    # On a CPU the loop computes the passes itself. Two clocks are read one after the other, and a
    # busy machine may stop the process between them.
    assert worker["device_busy_share"] == pytest.approx(worker["loop_shares"]["forward"], abs=0.1)
    assert len(worker["warm_up_seconds_per_input"]) == 2
    assert worker["forward_seconds_per_input"]["p50"] <= worker["forward_seconds_per_input"]["p95"]


def test_the_batch_size_of_a_cpu_is_fixed() -> None:
    """Scores must not depend on what else the machine does."""
    size, reason = choose_batch_size(lambda x: x, torch.zeros(1, 1), torch.device("cpu"))
    assert size == 8 and "cpu" in reason


def test_outputs_of_several_tensors_and_values_reach_their_items() -> None:
    """A forward pass sees the samples of its batch; each item gets what belongs to it."""

    class Several(FakeStages):
        as_list = False

        def forward(self, inputs: torch.Tensor, samples=()):
            means = inputs.mean((1, 2, 3))
            assert [float(s.inputs[0].mean()) for s in samples] == means.tolist()
            if self.as_list:
                return [f"made of {mean:g}" for mean in means.tolist()]
            return means, torch.stack([means, -means], 1)

        def finish(self, item: Thing, sample, outputs: list) -> dict:
            (found,) = outputs
            values = found if self.as_list else (float(found[0]), found[1].tolist())
            return {"status": "ok", "found": values, "seconds": {}}

    (result,) = run(Several(), things(5), 2, chunk=5)
    assert [row["found"] for row in result.rows] == [(n, [n, -n]) for n in range(5)]
    Several.as_list = True
    (result,) = run(Several(), things(3), 2, chunk=3)
    assert [row["found"] for row in result.rows] == [f"made of {n}" for n in range(3)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_a_failed_row(value: float) -> None:
    """A map of NaN would be saved as one of zeros: nothing is hidden here, and sure of it."""

    class Overflowing(FakeStages):
        several = False

        def forward(self, inputs: torch.Tensor, samples=()):
            means = torch.where(inputs.mean((1, 2, 3)) == 1, value, 0.0)
            return (means, torch.zeros(len(means))) if self.several else means

        def finish(self, item: Thing, sample, outputs: list) -> dict:
            return {"status": "ok", "seconds": {}}

    for several in (False, True):
        stages = Overflowing()
        stages.several = several
        (result,) = run(stages, things(3), 2, chunk=3)
        assert [row["status"] for row in result.rows] == ["ok", "failed", "ok"]
        assert "--precision fp32" in result.rows[1]["reason"]
