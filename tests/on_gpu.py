"""Try p3o.py on a GPU: all that we want to know from one, in one call of at most eight minutes.

    python tests/on_gpu.py                  # all parts
    python tests/on_gpu.py phases trl       # some of them

Each part runs in a process of its own, with a time limit, so that none can spoil the others. The
models of 124M have random weights: these parts measure speed, memory and rounding, not learning.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "own"))
import memory
from allocator import replay

import p3o

ROOT = Path(__file__).resolve().parents[1]
CUDA = p3o.DEVICE == "cuda"
GB = 2**30
LIMITS = {"same": 60, "phases": 130, "small": 130, "rounding": 40, "trl": 110}  # seconds
SHAPE = memory.SIZES["124M"]
CFG = p3o.Config(iterations=2)


# ---- The parts -----------------------------------------------------------------------------
def models(shape: tuple[int, int, int]) -> tuple:
    """Return a random policy and reward model on the CPU, with the tiny vocabulary."""
    torch.manual_seed(0)
    dim, layers, heads = shape
    config = GPT2Config(
        vocab_size=1000,
        n_embd=dim,
        n_layer=layers,
        n_head=heads,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
        num_labels=1,
    )
    policy = AutoModelForCausalLM.from_config(config).eval()
    return policy, AutoModelForSequenceClassification.from_config(config).eval()


def same(shape: tuple[int, int, int] = SHAPE, tokens: int = 64) -> None:
    """Are log-probs and scores those of the CPU, and the samples those of the scored policy?"""
    here = models(shape)
    there = [model.to(p3o.DEVICE) for model in models(shape)]
    prompts = [list(range(2, 2 + n)) for n in (5, 20, 40, 64)]
    ids, mask = p3o.sample(there[0], prompts, 2, tokens)
    again = []
    for model, precision in ((here, "highest"), (there, "highest"), (there, "high")):
        torch.set_float32_matmul_precision(precision)
        with torch.no_grad():
            device = model[0].device
            again.append(
                [
                    p3o.sequence_logprobs(model[0], ids.to(device), mask.to(device)).cpu(),
                    p3o.reward_scores(model[1], ids.to(device), mask.to(device)).cpu(),
                ]
            )
    print("| largest difference to the CPU in fp32 | log π(y|x), nats | score |")
    print("| --- | --- | --- |")
    for name, values in zip(("GPU, fp32", "GPU, TF32"), again[1:], strict=True):
        off = [(x - y).abs().max().item() for x, y in zip(values, again[0], strict=True)]
        print(f"| {name} | {off[0]:.1e} | {off[1]:.1e} |")
        if name == "GPU, fp32":
            p3o.self_check("GPU = CPU", max(off) < 1e-2)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(1)
    here_drawn = p3o.sample(here[0], prompts, 2, tokens)[0]
    torch.manual_seed(1)
    drawn = p3o.sample(there[0], prompts, 2, tokens)[0].cpu()
    width = min(drawn.shape[-1], here_drawn.shape[-1])
    share = (drawn[..., :width] == here_drawn[..., :width]).float().mean()
    print(f"tokens drawn on the GPU as on the CPU: {share:.1%}")
    # if tokens are drawn from the scored policy, log π − E log π has mean 0 (and a known variance)
    many, mask = p3o.sample(there[0], [prompts[1]] * 64, 2, tokens)
    with torch.no_grad():
        hidden = there[0].base_model(many.flatten(0, 1)).last_hidden_state[:, :-1]  # (N, T−1, D)
        every = there[0].get_output_embeddings()(hidden).log_softmax(-1)  # (N, T−1, V)
        expected = (every.exp() * every).sum(-1)  # (N, T−1)
        variance = (every.exp() * every**2).sum(-1) - expected**2  # (N, T−1)
        found = p3o.response_logprobs(there[0], many, mask).flatten(0, 1)  # (N, T−1)
    counted = mask.flatten(0, 1)[:, 1:]  # (N, T−1)
    z = ((found - expected)[counted].sum() / variance[counted].sum().sqrt()).item()
    print(f"log π of the drawn tokens, from what is expected: {z:+.1f} standard errors")
    p3o.self_check("sampled = scored", abs(z) < 4)


class Meter:
    """Measures the seconds and the memory of each phase."""

    random = False

    def __init__(self) -> None:
        self.seconds = defaultdict(float)
        self.peaks = defaultdict(lambda: (0, 0))
        self.now = "load"
        self.last = time.perf_counter()

    def note(self, weight: torch.Tensor) -> None:
        pass

    @property
    def phase(self) -> str:
        return self.now

    @phase.setter
    def phase(self, phase: str) -> None:
        if phase == self.now:
            return
        if CUDA:
            torch.cuda.synchronize()
            used = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.peaks[self.now] = tuple(map(max, self.peaks[self.now], used))
            torch.cuda.reset_peak_memory_stats()
        self.seconds[self.now] += time.perf_counter() - self.last
        self.last = time.perf_counter()
        self.now = phase


def phases(shape: tuple[int, int, int] = SHAPE, cfg: p3o.Config = CFG) -> None:
    """Measure each phase's memory and time, beside those that memory.py counts."""
    measured = {}
    for precision in ("high", "highest"):
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(0)
        if CUDA:
            torch.cuda.empty_cache()
        measured[precision] = Meter()
        memory.pretend(cfg, shape, measured[precision])
        measured[precision].phase = "end"
        seconds = measured[precision].seconds
        print(f"{precision}: { ({key: round(value, 2) for key, value in seconds.items()}) }")
    tf32, exact = measured["high"], measured["highest"]
    print("GB in use and reserved", {k: [x / GB for x in v] for k, v in tf32.peaks.items()})
    record = memory.Recorder(cfg, False)
    memory.pretend(cfg, shape, record)
    counted = replay(record.events)
    print(
        "| phase | GB in use | counted | reserved | counted | s, TF32 | s, fp32 | H200 by count |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for phase in counted:
        sizes = [
            x / GB for pair in zip(tf32.peaks[phase], counted[phase], strict=True) for x in pair
        ]
        times = [
            tf32.seconds[phase],
            exact.seconds[phase],
            memory.seconds(record.work[phase], "H200"),
        ]
        print(f"| {phase} |", " | ".join(f"{x:.2f}" for x in (*sizes, *times)), "|")


def small() -> None:
    """The small run, in a folder that must be new."""
    out = Path(os.environ.get("OUT", "runs")) / f"on-gpu-{os.getpid()}"
    begin = time.perf_counter()
    p3o.main(["--small", "--out", str(out)])
    print(f"the small run took {time.perf_counter() - begin:.0f} s")


def rounding(shape: tuple[int, int, int] = SHAPE, pairs: int = 16, tokens: int = 128) -> None:
    """How much do log π(y|x), and log-ratios after one small update, depend on the precision?"""
    policy = models(shape)[0].to(p3o.DEVICE)
    torch.manual_seed(0)
    prompts = torch.randint(2, 1000, (pairs, 128)).tolist()
    ids, mask = p3o.sample(policy, prompts, 2, tokens)
    with torch.no_grad():
        steps = [torch.randn_like(weight).sign() * CFG.p3o_lr for weight in policy.parameters()]

        def logprobs(precision: str, bf16: bool) -> torch.Tensor:
            torch.set_float32_matmul_precision(precision)
            with torch.autocast(p3o.DEVICE, torch.bfloat16, enabled=bf16):
                return p3o.sequence_logprobs(policy, ids, mask)  # (B, 2)

        kinds = {"fp32": ("highest", False), "TF32": ("high", False), "bf16": ("highest", True)}
        old = {name: logprobs(*kind) for name, kind in kinds.items()}
        for weight, step in zip(policy.parameters(), steps, strict=True):
            weight += step
        print("| products in | log π off by, rms | u moves by, rms | pairs beyond ε |")
        print("| --- | --- | --- | --- |")
        for name, kind in kinds.items():
            u = (logprobs(*kind) - old[name]).diff()  # (B, 1)
            off, move = ((x**2).mean().sqrt().item() for x in (old[name] - old["fp32"], u))
            beyond = (u.abs() > CFG.clip_range).float().mean().item()
            print(f"| {name} | {off:.4f} | {move:.4f} | {beyond:.2f} |")


def trl() -> None:
    """Two iterations at 124M beside TRL; the first is not counted."""
    import benchmark

    benchmark.main(["--size", "gpt2", "--rounds", "1", "--iterations", "2", "--pairs", "64"])


# ---- One after the other -------------------------------------------------------------------
def guarded(name: str, command: list[str], limit: float) -> bool:
    """Run a command for at most so many seconds; print how it ended."""
    print(f"\n## {name}, at most {limit} s", flush=True)
    begin = time.perf_counter()
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
        ended = f"status {status}" if status else "done"
    except subprocess.TimeoutExpired:
        ended = "stopped at its limit"
    print(f"{name}: {ended} after {time.perf_counter() - begin:.0f} s", flush=True)
    return ended == "done"


def main(argv: list[str]) -> None:
    if argv[:1] == ["only"]:
        globals()[argv[1]]()
        return
    names = argv or list(LIMITS)
    if unknown := set(names) - set(LIMITS):
        sys.exit(f"on_gpu.py: no part {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    device = torch.cuda.get_device_name() if CUDA else "no GPU: on the CPU"
    print(f"{device}, torch {torch.__version__}", flush=True)
    os.environ["TQDM_DISABLE"] = "1"
    done = [
        guarded(name, [sys.executable, "-u", __file__, "only", name], LIMITS[name])
        for name in names
    ]
    print(f"\n{sum(done)} of {len(done)} parts are done")
    sys.exit(not all(done))


if __name__ == "__main__":
    main(sys.argv[1:])
