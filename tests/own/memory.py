"""Count the memory of a whole run of p3o.py, phase by phase, without a GPU.

    python tests/own/memory.py                  # the default run, three sizes of GPT-2

`p3o.run` itself runs, but without numbers: floating-point tensors have a shape and no content
(torch's meta device). Whole numbers and masks are real; the tokens that a model draws are made up.
Each storage that appears or disappears is recorded, and a model of CUDA's caching allocator says
how much of the GPU's memory would be reserved for them.
"""

import bisect
import contextlib
import math
import sys
import tempfile
import weakref
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._foreach_utils as foreach
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, GPT2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o
from data.preferences import Example, Pair

aten = torch.ops.aten
SIZES = {"124M": (768, 12, 12), "355M": (1024, 24, 16), "1.5B": (1600, 48, 25)}
EOS = 50256  # GPT-2's; p3o.py adds a padding token
GIB = 2**30


# ---- Running without numbers ---------------------------------------------------------------
class Recorder(TorchDispatchMode):
    """Runs operators on shapes and records what they allocate, free and compute."""

    def __init__(self, cfg: p3o.Config, random: bool) -> None:
        super().__init__()
        self.cfg = cfg
        self.random = random
        self.phase = "load"
        self.step = 0  # of sampling
        self.events = []  # (phase, number of a storage, its bytes; 0 when it is freed)
        self.storages = {}
        self.work = defaultdict(
            Counter
        )  # phase → (operations, those of attention, bytes) → how often
        self.known = {}  # results' shapes, by operator and arguments' shapes

    def note(self, tensor: Tensor) -> bool:
        """Record the tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages or storage.nbytes() == 0:
            return False
        number = len(self.events)
        self.events.append((self.phase, number, storage.nbytes()))

        def freed(_: Any) -> None:
            del self.storages[key]
            self.events.append((self.phase, number, 0))

        self.storages[key] = weakref.ref(storage, freed)
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.run(func, args, kwargs or {})
        new = [self.note(x) for x in tree_leaves(out) if isinstance(x, Tensor)]
        if (any(new) or func._schema.is_mutable) and "empty" not in func.__name__:
            self.work[self.phase][work(func, args, out)] += 1
        return out

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is aten._fused_sdp_choice.default:
            return SDPBackend.EFFICIENT_ATTENTION.value  # CUDA's choice in fp32
        if str(kwargs.get("device")) == "meta" and not any(x.is_meta for x in tensors):
            out = func(*args, **kwargs | {"device": "cpu"})
            return out.to("meta") if out.is_floating_point() else out
        if not any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
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
        schema = func._schema
        fresh = not schema.is_mutable and all(r.alias_info is None for r in schema.returns)
        index = func.overloadpacket in (aten.index, aten.index_put_, aten._index_put_impl_)
        if not fresh or index or func is aten._unsafe_view.default:
            if index:  # a mask's indices are known
                chosen = []
                for i in args[1]:
                    is_mask = i is not None and i.dtype == torch.bool
                    chosen += i.nonzero().unbind(-1) if is_mask else [i]
                args = args[0], chosen, *args[2:]
            return func(*tree_map(shape_only, args), **kwargs)
        key = func, tree_map(signature, args).__repr__(), str(kwargs)
        if key not in self.known:
            self.known[key] = func(*tree_map(shape_only, args), **tree_map(shape_only, kwargs))
        return tree_map(like, self.known[key])

    def draw(self, rows: int) -> Tensor:
        """Return tokens (rows, 1); at random, each length up to the limit is equally likely."""
        left = self.cfg.response_tokens - self.step
        self.step += 1
        ends = torch.rand(rows, 1) * left < 1
        return torch.where(ends, EOS, 0) if self.random else torch.zeros_like(ends).long()


def shape_only(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x


def signature(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


def like(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.is_floating_point():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.ones(x.shape, dtype=x.dtype)  # a comparison of unknown numbers: say yes


def work(func: Any, args: tuple, out: Any) -> tuple[int, int, int]:
    """Return an operator's operations in products, in attention, and bytes read and written."""
    tensors = [x for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
    return 0, 0, sum(x.numel() * x.element_size() for x in tensors)


def pretend(cfg: p3o.Config, shape: tuple[int, int, int], random: bool) -> Recorder:
    """Run `p3o.run` on a GPT-2 of this shape; return the record."""
    dim, layers, heads = shape
    config = GPT2Config(
        vocab_size=EOS + 2,
        n_embd=dim,
        n_layer=layers,
        n_head=heads,
        activation_function="gelu_pytorch_tanh",  # as in p3o.load_base
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS + 1,
        num_labels=1,
    )
    record = Recorder(cfg, random)

    def before_forward(model: Any, args: tuple, kwargs: dict) -> None:
        if record.phase.startswith("3 sampling"):
            record.phase = f"3 sampling, {'decode' if args[0].shape[1] == 1 else 'prefill'}"
        if record.phase in ("3 scoring", "3 updates"):
            record.phase = "3 updates" if torch.is_grad_enabled() else "3 scoring"

    def load(folder: Any = None, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
        with torch.device("meta"):
            model = kind.from_config(config).eval()
        for weight in model.parameters():
            record.note(weight)
        model.base_model.register_forward_pre_hook(before_forward, with_kwargs=True)
        return model

    def in_phase(name: str, phase: str, after: str | None = None) -> Any:
        plain = getattr(p3o, name)

        def function(*args: Any) -> Any:
            before = record.phase
            record.step = 0
            if name != "sample" or before.startswith("3"):
                record.phase = phase
            out = plain(*args)
            record.phase = after if after and before.startswith("3") else before
            return out

        return function

    n = max(cfg.pairs, 2 * cfg.batch)
    examples = []
    for i in torch.randperm(n).tolist():
        prompt, chosen, rejected = cfg.prompt_tokens, cfg.response_tokens, cfg.response_tokens
        if random:
            prompt = prompt // 8 + (prompt - prompt // 8) * (2 * i + 1) // (2 * n)
            chosen, rejected = torch.randint(1, cfg.response_tokens + 1, (2,)).tolist()
        examples.append(Example([0] * prompt, [0] * chosen, [1] * rejected, Pair("", "", "")))
    tokenizer = SimpleNamespace(decode=lambda *args, **options: "")
    nothing = lambda *args: None
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as out:
        for where, name, value in [
            (p3o, "load_base", lambda cfg: (load(), tokenizer)),
            (p3o, "load_examples", lambda *args: (examples, examples[: cfg.minibatch])),
            (p3o, "open_out", lambda *args: contextlib.nullcontext(Path(out))),
            (p3o, "load", load),
            (p3o, "save", lambda folder, *args: folder.mkdir()),
            (p3o, "GAIN_PROMPTS", cfg.minibatch),
            (p3o, "report", lambda *args: {}),
            *((p3o, name, nothing) for name in ("fit_tokens", "self_check", "save_checkpoint")),
            (p3o, "train_sft", in_phase("train_sft", "1 SFT")),
            (p3o, "train_reward", in_phase("train_reward", "2 reward")),
            (p3o, "set_gain", in_phase("set_gain", "2 gain")),
            (p3o, "train_policy", in_phase("train_policy", "3")),
            (p3o, "sample", in_phase("sample", "3 sampling", "3 scoring")),
            (p3o, "evaluate", in_phase("evaluate", "evaluation")),
            (foreach, "_get_foreach_kernels_supported_devices", lambda: ["meta"]),
            (
                sys.modules[torch.optim.Optimizer.__module__],
                "_get_fused_kernels_supported_devices",
                lambda: ["meta"],
            ),
        ]:
            stack.enter_context(patch.object(where, name, value))
        stack.enter_context(record)
        stack.enter_context(contextlib.redirect_stdout(None))
        p3o.run(cfg)
    return record


# ---- The caching allocator -----------------------------------------------------------------
class OutOfMemory(Exception):
    pass


class Block:
    def __init__(self, segment: int, start: int, size: int, small: bool) -> None:
        self.key = size, segment, start  # best fit first, then the lowest address
        self.small = small
        self.before = self.after = None
        self.free = True


class Allocator:
    """CUDA's caching allocator as torch documents it, on one stream."""

    def __init__(self, capacity: float = math.inf) -> None:
        self.capacity = capacity
        self.reserved = 0
        self.segments = 0
        self.cached = {True: [], False: []}  # free blocks, small and large, sorted

    def allocate(self, size: int) -> Block:
        size = max(512, -(-size // 512) * 512)
        small = size <= 2**20
        free = self.cached[small]
        at = bisect.bisect_left(free, (size, -1, -1), key=lambda block: block.key)
        if at < len(free):
            block = free.pop(at)
        else:
            block = self.segment(size, small)
        whole, segment, start = block.key
        rest = whole - size
        if rest >= 512 if small else rest > 2**20:  # split
            block.key = size, segment, start
            tail = Block(segment, start + size, rest, small)
            tail.before, tail.after = block, block.after
            if tail.after:
                tail.after.before = tail
            block.after = tail
            bisect.insort(free, tail, key=lambda block: block.key)
        block.free = False
        return block

    def segment(self, size: int, small: bool) -> Block:
        """Take a new segment from the GPU: 2 MiB, 20 MiB, or a multiple of 2 MiB."""
        size = (
            2 * 2**20 if small else 20 * 2**20 if size < 10 * 2**20 else -(-size // 2**21) * 2**21
        )
        if self.reserved + size > self.capacity:
            for free in self.cached.values():  # give unused segments back
                for block in [b for b in free if not b.before and not b.after]:
                    free.remove(block)
                    self.reserved -= block.key[0]
            if self.reserved + size > self.capacity:
                raise OutOfMemory
        self.reserved += size
        self.segments += 1
        return Block(self.segments, 0, size, small)

    def release(self, block: Block) -> None:
        free = self.cached[block.small]
        block.free = True
        for other in (block.before, block.after):  # merge with free neighbours
            if other and other.free:
                free.remove(other)
                first, second = sorted([block, other], key=lambda block: block.key[2])
                size, segment, start = first.key
                first.key = size + second.key[0], segment, start
                first.after = second.after
                if first.after:
                    first.after.before = first
                block = first
        bisect.insort(free, block, key=lambda block: block.key)


def replay(events: list, capacity: float = math.inf) -> dict[str, tuple[int, int]]:
    """Return the peak of live bytes and of reserved bytes in each phase."""
    allocator = Allocator(capacity)
    blocks = {}
    live = 0
    peaks = defaultdict(lambda: (0, 0))
    for phase, number, size in events:
        if size:
            blocks[number] = allocator.allocate(size), size
            live += size
        else:
            block, size = blocks.pop(number)
            allocator.release(block)
            live -= size
        peaks[phase] = max(peaks[phase][0], live), max(peaks[phase][1], allocator.reserved)
    return peaks


if __name__ == "__main__":
    import time

    for micro in map(int, sys.argv[2].split(",")):
        t = time.process_time()
        cfg = p3o.Config(iterations=2, inner_epochs=1, micro_batch=micro)
        c = pretend(cfg, SIZES[sys.argv[1]], sys.argv[3] == "random")
        print(micro, sys.argv[3], len(c.events), time.process_time() - t)
        for k, v in replay(c.events).items():
            print(f"  {k:22} live {v[0] / GIB:.2f} reserved {v[1] / GIB:.2f}")
        print(time.process_time() - t)
