"""Count the memory and the work of a whole run of p3o.py, phase by phase, without a GPU.

    python tests/own/memory.py                  # the default run, three sizes of GPT-2
    python tests/own/memory.py --sizes 124M --micro-batches 4

`p3o.run` itself runs, but without numbers: floating-point tensors have a shape and no content
(torch's meta device). Whole numbers and masks are real; the tokens that a model draws are made up.
Each tensor that appears or disappears is recorded. A model of CUDA's caching allocator says how
much memory would be reserved, and a few assumptions about GPUs how long it would take.
"""

import argparse
import contextlib
import math
import sys
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils._foreach_utils as foreach
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from allocator import OutOfMemory, replay

import p3o
from data.preferences import Example, Pair

aten = torch.ops.aten
SIZES = {"124M": (768, 12, 12), "355M": (1024, 24, 16), "1.5B": (1600, 48, 25)}  # of GPT-2
EOS = 50256  # GPT-2's; p3o.py adds a padding token
GB = 2**30  # as cards are sold
CARDS = 8, 16, 24, 80
CONTEXT = 0.6 * GB  # of a card's memory, for CUDA's context and cuBLAS; an assumption
PAIRS = 160_800  # in Anthropic HH
# peak TFLOP/s of products (TF32 if the GPU has it) and of attention (fp32 out of three TF32
# products), peak GB/s, and µs that Python and the driver take to launch an operator (assumed)
GPUS = {
    "H200": (494, 165, 4800, 12),
    "RTX 4080 16 GB": (48.7, 16.2, 717, 12),
    "RTX 4060 Ti 16 GB": (22.1, 7.4, 288, 12),
    "T4": (8.1, 8.1, 300, 20),
}
REACHED = 0.6, 0.75  # share of the peak rates, of operations and of bytes; assumed
STAGES = {"1 SFT": "train_sft", "2 reward": "train_reward", "2 gain": "set_gain"} | {
    "3": "train_policy",
    "3 sampling": "sample_by_parts",
    "evaluation": "evaluate",
}
INDEXING = aten.index, aten.index_put_, aten._index_put_impl_
FEW_ROWS = aten.embedding, aten.index, aten.searchsorted, aten._index_put_impl_  # of the first


# ---- Running without numbers ---------------------------------------------------------------
def tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from tensors(part)


def each(function: Callable[[Tensor], Any], x: Any) -> Any:
    """Return x with each of its tensors replaced."""
    if isinstance(x, list | tuple):
        return type(x)(each(function, part) for part in x)
    return function(x) if isinstance(x, Tensor) else x


def like(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.ones(x.shape, dtype=x.dtype)  # "is this number larger?" nobody knows: yes


def attention(query, key, value, attn_mask, dropout_p, is_causal, scale, **options) -> Tensor:
    """Do what CUDA does in fp32: a kernel that never holds a (T, T) matrix, but takes masks so."""
    if attn_mask is not None:
        attn_mask = torch.where(attn_mask.to("meta"), 0.0, -math.inf)  # (N, 1, T, length)
        if attn_mask.shape[-1] % 8:  # aligned by a copy
            padded = F.pad(attn_mask, (0, -attn_mask.shape[-1] % 8))
            attn_mask = padded[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    needs_sum = torch.is_grad_enabled()
    arguments = query, key, value, attn_mask, needs_sum, dropout_p, is_causal
    return aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]


class Recorder(TorchDispatchMode):
    """Runs operators on shapes, and records what they allocate, free and compute."""

    def __init__(self, cfg: p3o.Config, random: bool) -> None:
        super().__init__()
        self.cfg = cfg
        self.random = random  # do answers end at random, or at the limit?
        self.phase = "load"
        self.step = 0  # of sampling
        self.events = []  # (phase, number of a storage, its bytes; 0 when it is freed)
        self.alive = {}
        # phase → (operations in products, in attention, bytes) of an operator → how often
        self.work = defaultdict(Counter)
        self.known = {}  # an operator and the shapes of its arguments → the shapes of its results

    def note(self, tensor: Tensor) -> bool:
        """Record the tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or storage.nbytes() == 0:
            return False
        number = len(self.events)
        self.events.append((self.phase, number, storage.nbytes()))

        def freed(_: Any) -> None:
            del self.alive[key]
            self.events.append((self.phase, number, 0))

        self.alive[key] = weakref.ref(storage, freed)
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.run(func, args, kwargs or {})
        new = [self.note(tensor) for tensor in tensors(out)]
        if (any(new) or func._schema.is_mutable) and "empty" not in func.__name__:  # not a view
            touched = [*tensors(args), *tensors(out)]
            if func.overloadpacket in FEW_ROWS:
                touched = touched[1:]
            moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in touched)
            operations = 0
            if func.overloadpacket in flop_registry:
                operations = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            attention = "attention" in func.__name__
            key = (0, operations, moved) if attention else (operations, 0, moved)
            self.work[self.phase][key] += 1
        return out

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if not any(x.is_meta for x in tensors(args)):
            if str(kwargs.get("device")) != "meta":
                return func(*args, **kwargs)
            out = func(*args, **kwargs | {"device": "cpu"})
            return out.to("meta") if out.is_floating_point() else out
        if func is aten.searchsorted.Tensor:
            return self.draw(len(args[1]))
        if func is aten._local_scalar_dense.default:
            return 1.0
        if func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        if func is aten._fused_adamw_.default:  # works in place
            return None
        if func is aten.masked_select.default:
            return args[0].new_empty(int(args[1].sum()))
        if func.overloadpacket in INDEXING:
            indices = []
            for index in args[1]:  # a mask is known, and so is the number of its elements
                is_mask = index is not None and index.dtype == torch.bool
                indices += index.nonzero().unbind(-1) if is_mask else [index]
            args = args[0], indices, *args[2:]
        shapes = each(lambda x: x.to("meta"), args)
        schema = func._schema
        if schema.is_mutable or any(result.alias_info for result in schema.returns):
            return func(*shapes, **kwargs)
        if func is aten._unsafe_view.default:
            return func(*shapes, **kwargs)
        key = func, str(each(lambda x: (x.shape, x.stride(), x.dtype), args)), str(kwargs)
        if key not in self.known:
            self.known[key] = func(*shapes, **kwargs)
        return each(like, self.known[key])

    def draw(self, rows: int) -> Tensor:
        """Return tokens (rows, 1). At random, all lengths up to the limit are equally likely."""
        left = self.cfg.response_tokens - self.step
        self.step += 1
        ends = torch.rand(rows, 1) * left < 1
        return torch.where(ends, EOS, 0) if self.random else torch.zeros_like(ends).long()


def pretend(cfg: p3o.Config, shape: tuple[int, int, int], record: Any) -> None:
    """Run `p3o.run` on a GPT-2 of this shape, without numbers if `record` is a Recorder.

    Any other object has its attribute `phase` set, and its method `note` called for each weight.
    """
    real = not isinstance(record, Recorder)
    config = transformers.GPT2Config(
        **dict(zip(("n_embd", "n_layer", "n_head"), shape, strict=True)),
        vocab_size=EOS + 2,
        activation_function="gelu_pytorch_tanh",  # as in p3o.load_base
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS + 1,
        num_labels=1,
    )

    def before_forward(model: Any, args: tuple, kwargs: dict) -> None:
        if record.phase.startswith("3 sampling"):
            which = "decode" if args[0].shape[1] == 1 else "prefill"
            record.phase = f"3 sampling, {which}"
            record.step *= which == "decode"
        elif record.phase.startswith("3"):
            record.phase = "3 updates" if torch.is_grad_enabled() else "3 scoring"
        elif args[0].shape[1] > 1:
            record.step = 0

    def load(
        folder: Any = None, kind: Any = transformers.AutoModelForCausalLM, **options: Any
    ) -> Any:
        with torch.random.fork_rng(), torch.device(p3o.DEVICE if real else "meta"):
            torch.manual_seed(0)  # the policy starts as its reference
            model = kind.from_config(config).eval()
        for weight in model.parameters():
            record.note(weight)
        model.base_model.register_forward_pre_hook(before_forward, with_kwargs=True)
        return model

    def in_phase(phase: str, plain: Callable) -> Callable:
        def function(*args: Any) -> Any:
            before = record.phase
            if not (phase == "3 sampling" and not before.startswith("3")):
                record.phase = phase
            out = plain(*args)
            record.phase = before
            return out

        return function

    n = max(cfg.pairs, 2 * cfg.batch)
    examples = []
    for i in torch.randperm(n).tolist():
        prompt, chosen, rejected = cfg.prompt_tokens, cfg.response_tokens, cfg.response_tokens
        if record.random:
            prompt = prompt // 8 + (prompt - prompt // 8) * (2 * i + 1) // (2 * n)
            chosen, rejected = torch.randint(1, cfg.response_tokens + 1, (2,)).tolist()
        examples.append(Example([0] * prompt, [0] * chosen, [1] * rejected, Pair("", "", "")))
    tokenizer = SimpleNamespace(decode=lambda *args, **options: "")
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as out:
        stand_ins = {
            "load_base": lambda cfg: (load(), tokenizer),
            "load_examples": lambda *args: (examples, examples[: cfg.minibatch]),
            "open_out": lambda *args: contextlib.nullcontext(Path(out)),
            "load": load,
            "save": lambda folder, *args: folder.mkdir(),
            "report": lambda *args: {},
            "GAIN_PROMPTS": p3o.AT_ONCE * cfg.micro_batch,  # one part
        } | {name: in_phase(phase, getattr(p3o, name)) for phase, name in STAGES.items()}
        for name in ("fit_tokens", "save_checkpoint", *(["self_check"] if not real else [])):
            stand_ins[name] = lambda *args: None
        for name, value in stand_ins.items():
            stack.enter_context(patch.object(p3o, name, value))
        stack.enter_context(contextlib.redirect_stdout(None))
        if not real:
            device = property(lambda model: torch.device("cpu"))  # whole numbers are there
            stack.enter_context(patch.object(transformers.PreTrainedModel, "device", device))
            optim = sys.modules[torch.optim.Optimizer.__module__]
            for module, kind in ((foreach, "foreach"), (optim, "fused")):  # as on CUDA
                name = f"_get_{kind}_kernels_supported_devices"
                stack.enter_context(patch.object(module, name, lambda: ["meta"]))
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
            stack.enter_context(record)
        p3o.run(cfg)


# ---- Tables --------------------------------------------------------------------------------
def fits(events: list, card: int) -> bool:
    with contextlib.suppress(OutOfMemory):
        return bool(replay(events, card * GB - CONTEXT))
    return False


def table(*rows: list) -> None:
    """Print a Markdown table, the first row as its head."""
    head, *body = rows
    for row in (head, ["---"] * len(head), *body):
        print("|", " | ".join(map(str, row)), "|")
    print()


def seconds(work: Counter, gpu: str) -> float:
    """Return the time of these operators: the host's, or the GPU's if that is longer."""
    products, attention, bandwidth, launch = GPUS[gpu]
    busy = 0.0
    for (in_products, in_attention, moved), often in work.items():
        computing = (in_products / products + in_attention / attention) / REACHED[0] / 1e12
        busy += often * max(computing, moved / bandwidth / REACHED[1] / 1e9)
    return max(busy, sum(work.values()) * launch * 1e-6)


def totals(work: Counter) -> tuple[int, float, float]:
    """Return how many operators these are, their operations in 10¹² and their bytes in 10¹²."""
    operations = sum((a + b) * often for (a, b, _), often in work.items())
    moved = sum(key[2] * often for key, often in work.items())
    return sum(work.values()), operations / 1e12, moved / 1e12


def time_tables(name: str, records: dict[bool, Recorder], cfg: p3o.Config) -> None:
    """Print the work of an iteration, its seconds, and the hours of a run on Anthropic HH."""
    for random, record in records.items():
        shares = {"1 SFT": 1 / 2, "2 reward": 1 / 2} | {  # of two updates
            "3 sampling, prefill": 1 / 2,  # of two iterations
            "3 sampling, decode": 1 / 2,
            "3 scoring": 1 / 2,
            "3 updates": cfg.inner_epochs / 2,
        }
        rows = [["phase", "operators", "10¹² operations", "TB moved", *GPUS]]
        for phase, share in shares.items():
            times = [f"{share * seconds(record.work[phase], gpu):.2f} s" for gpu in GPUS]
            count, operations, moved = (share * x for x in totals(record.work[phase]))
            rows.append([phase, f"{count:,.0f}", f"{operations:.1f}", f"{moved:.2f}", *times])
        hours = {"1 SFT": [], "2 reward": [], "3 P3O": [], "whole run": []}
        for gpu in GPUS:
            spent = {phase: shares[phase] * seconds(record.work[phase], gpu) for phase in shares}
            iteration = sum(time for phase, time in spent.items() if phase[0] == "3")
            steps = cfg.epochs * PAIRS / cfg.batch
            stages = [steps * spent["1 SFT"], steps * spent["2 reward"], cfg.iterations * iteration]
            for stage, time in zip(hours, [*stages, sum(stages)], strict=True):
                hours[stage].append(f"{time / 3600:.1f} h")
        print(f"{name}, answers {'end at random' if random else 'at their limit'}; an update\n")
        table(*rows, *([f"**{stage}**", "", "", "", *times] for stage, times in hours.items()))


def main(argv: list[str]) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    args = parser.parse_args(argv)
    default = p3o.Config()
    phases = defaultdict(list)
    reserved = []
    timed = {}
    for name in args.sizes:
        for random in (False, True):
            torch.manual_seed(0)
            sums = []
            fitting = dict.fromkeys(CARDS, "none")
            for micro_batch in args.micro_batches:
                cfg = replace(default, iterations=2, inner_epochs=1, micro_batch=micro_batch)
                record = Recorder(cfg, random)
                pretend(cfg, SIZES[name], record)
                peaks = replay(record.events)
                most = max(both[1] for both in peaks.values()) / GB
                sums.append(f"{most:.1f}")
                for card in CARDS:
                    if fits(record.events, card):
                        fitting[card] = micro_batch
                if micro_batch == default.micro_batch and not random:
                    for phase, (live, _) in peaks.items():
                        phases[phase].append(f"{live / GB:.2f}")
                    phases["reserved"].append(f"{most:.2f}")
                if micro_batch == default.micro_batch and name == "124M":
                    timed[random] = record
            answers = "end at random" if random else "at their limit"
            reserved.append([name, answers, *sums, *fitting.values()])
            print(name, answers, *sums, *fitting.values(), file=sys.stderr)
    print("GB in use at most, answers at their limit\n")
    table(["phase", *args.sizes], *([phase, *row] for phase, row in phases.items() if phase != "3"))
    print("GB reserved at --micro-batch …, and the largest that fits\n")
    micro_batches = [f"{m}" for m in args.micro_batches]
    table(["model", "answers", *micro_batches, *(f"{card} GB" for card in CARDS)], *reserved)
    if timed:
        time_tables("124M", timed, default)


if __name__ == "__main__":
    main(sys.argv[1:])
