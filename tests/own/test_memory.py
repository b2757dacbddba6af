"""memory.py, allocator.py and on_gpu.py, on tiny models."""

import re
import sys

import memory
import on_gpu
import pytest
import torch
from allocator import Allocator, OutOfMemory, replay
from torch.profiler import profile

import p3o

MB = 2**20
SHAPE = (64, 2, 2)
CFG = p3o.Config(
    iterations=2,
    inner_epochs=1,
    batch=4,
    pairs=4,
    minibatch=4,
    micro_batch=2,
    prompt_tokens=24,
    response_tokens=6,
)


# ---- What is counted -----------------------------------------------------------------------
class Plain:
    """Lets `pretend` compute with numbers."""

    random = False
    phase = ""

    def note(self, weight: torch.Tensor) -> None:
        pass


def allocated_by(cfg: p3o.Config) -> int:
    """Return the bytes that a run with numbers has in use at most, by torch's own profiler."""
    with profile(profile_memory=True) as profiler:
        memory.pretend(cfg, SHAPE, Plain())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_run_without_numbers_allocates_what_a_run_with_numbers_does(micro_batch):
    cfg = memory.replace(CFG, micro_batch=micro_batch)
    record = memory.Recorder(cfg, False)
    memory.pretend(cfg, SHAPE, record)
    counted = max(live for live, _ in replay(record.events).values())
    assert allocated_by(cfg) == pytest.approx(counted, rel=0.01)


def test_every_phase_is_counted_and_the_products_have_the_operations_of_the_formula():
    record = memory.Recorder(CFG, False)
    memory.pretend(CFG, SHAPE, record)
    assert {phase for phase, _, _ in record.events} >= {
        *("1 SFT", "2 reward", "2 gain", "3 sampling, prefill", "3 sampling, decode"),
        *("3 scoring", "3 updates", "evaluation"),
    }
    operations = sum(a * often for (a, _, _), often in record.work["1 SFT"].items())
    body = 12 * SHAPE[1] * SHAPE[0] ** 2  # weights in products
    head = SHAPE[0] * (memory.EOS + 2)
    rows = 2 * CFG.batch  # of two updates; the last token of a row predicts nothing
    length = CFG.prompt_tokens + CFG.response_tokens - 1
    expected = 6 * rows * (length * body + CFG.response_tokens * head)
    assert operations == expected


def test_a_decoding_step_takes_12_operators_a_layer():
    counts = []
    for layers in (1, 2):
        record = memory.Recorder(CFG, False)
        memory.pretend(CFG, (64, layers, 2), record)
        counts.append(sum(record.work["3 sampling, decode"].values()))
    # two normalisations, four products, GELU, attention, two sums, keys and values appended
    assert counts[1] - counts[0] == 12 * CFG.iterations * (CFG.response_tokens - 1)


def test_answers_that_end_take_less():
    used = []
    for random in (False, True):
        record = memory.Recorder(CFG, random)
        memory.pretend(CFG, SHAPE, record)
        used.append(max(both[0] for both in replay(record.events).values()))
    assert used[1] < used[0]


# ---- The allocator -------------------------------------------------------------------------
def test_the_allocator_rounds_splits_merges_and_gives_back():
    allocator = Allocator()
    small = allocator.allocate(1)
    assert small.key[0] == 512
    assert allocator.reserved == 2 * MB
    first, second = allocator.allocate(4 * MB), allocator.allocate(5 * MB)  # one segment
    assert allocator.reserved == 22 * MB
    large = allocator.allocate(21 * MB + 1)  # the next multiple of 2 MiB
    assert allocator.reserved == 44 * MB
    allocator.release(first)
    allocator.release(second)
    whole = allocator.allocate(20 * MB)  # both were merged with the rest
    assert allocator.reserved == 44 * MB
    allocator.release(large)
    allocator.release(allocator.allocate(21 * MB))  # a cached block, not split for 1 MiB
    assert allocator.reserved == 44 * MB
    allocator.capacity = 52 * MB
    again = allocator.allocate(28 * MB)  # only if the 22 MiB are given back
    assert allocator.reserved == 50 * MB
    with pytest.raises(OutOfMemory):
        allocator.allocate(4 * MB)
    for block in (small, whole, again):
        allocator.release(block)


def test_live_and_reserved_bytes_of_a_phase():
    events = [("a", 0, MB), ("a", 1, 30 * MB), ("b", 1, 0), ("b", 2, 20 * MB)]
    assert replay(events) == {"a": (31 * MB, 32 * MB), "b": (21 * MB, 32 * MB)}
    with pytest.raises(OutOfMemory):
        replay(events, 31 * MB)


# ---- The commands --------------------------------------------------------------------------
def test_the_tables(capsys, monkeypatch):
    monkeypatch.setattr(memory, "SIZES", {"124M": (64, 1, 1)})
    monkeypatch.setattr(p3o, "Config", lambda **given: memory.replace(CFG, **given))
    memory.main(["--sizes", "124M", "--micro-batches", "2"])
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| 124M \| (at their limit|end at random) \|", printed, re.M)) == 2
    assert len(re.findall(r"^\| \*\*whole run\*\* \|", printed, re.M)) == 2


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(capfd, monkeypatch):
    python = [sys.executable, "-c"]
    assert not on_gpu.guarded("fails", [*python, "raise SystemExit(3)"], 20)
    assert not on_gpu.guarded("hangs", [*python, "while True: pass"], 0.5)
    assert on_gpu.guarded("works", [*python, "print('hello')"], 20)
    printed = capfd.readouterr().out
    assert "fails: status 3" in printed
    assert "hangs: stopped at its limit" in printed
    assert "hello" in printed
    assert sum(on_gpu.LIMITS.values()) <= 480
    assert all(callable(getattr(on_gpu, part)) for part in on_gpu.LIMITS)


@pytest.mark.filterwarnings("ignore")
def test_the_parts_run_on_the_cpu(capsys):
    on_gpu.same(SHAPE, tokens=8)
    on_gpu.rounding(SHAPE, pairs=2, tokens=8)
    on_gpu.phases(SHAPE, CFG)
    printed = capsys.readouterr().out
    assert "check: GPU = CPU: ok" in printed
    assert "check: sampled = scored: ok" in printed
    assert "| fp32 | 0.0000 |" in printed
    assert "| 3 updates |" in printed
