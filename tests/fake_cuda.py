"""A GPU that does not exist: p3o.py computes on the CPU as if it were on one.

    with fake_cuda(p3o) as gpu:  # p3o.DEVICE is "cuda"
        p3o.run(cfg)
    print(gpu.report(gpu.syncs))  # each line of p3o.py that waits for the GPU, and how often

A tensor's storage is marked if it would be on the GPU, so a view has the mark of its base. Two
layers read and write the marks. `Calls` sees what Python calls: it answers `tensor.device`, and it
carries out `.to()` and `device=`, which move and create tensors. `Kernels` sees each operator below
autograd, the backward pass and the optimizer included. It raises where CUDA would raise, because
operands are on different devices, and marks the result. All values are the CPU's.

A sync is a moment at which the host waits for the GPU: a value or a mask is read, or data are
copied from one side to the other. Syncs are counted by line of p3o.py.

What it cannot see:
- an operator, a dtype or a size that CUDA does not support, or an index out of range;
- CUDA's kernels: rounding, TF32, whether they are deterministic, speed;
- torch.cuda, which says that there is no GPU: its generators, its allocator, out of memory;
- the device in a file: torch.save writes "cpu", and a `map_location` is not missed;
- streams, pinned memory, several GPUs, other threads; non_blocking=True, which counts as a sync.
"""

import contextlib
import linecache
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
GPU = torch.device("cuda:0")
aten = torch.ops.aten
group_by_cpp = torch._C._group_tensors_by_device_and_dtype
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# beside the element-wise operators, these take a 0-dim CPU tensor for a number
TAKES_NUMBER = (*INDEXING, aten.fill_, aten.masked_fill, aten.masked_fill_)


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def on_gpu(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "on_gpu", False)


def device_of(tensor: Tensor) -> torch.device:
    return GPU if on_gpu(tensor) else tensor.device


def mark(tree: Any, gpu: bool) -> Any:
    """Put all tensors of `tree` on the GPU or on the CPU; return it."""
    for tensor in tensors_in(tree):
        tensor.untyped_storage().on_gpu = gpu and tensor.device.type != "meta"
    return tree


class Kernels(TorchDispatchMode):
    """Below autograd: raise if operands are on different devices, else mark what comes out."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file
        self.syncs = Counter()  # by line number of the file
        self.calls_are_on_gpu = False  # where operators without operands make their result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands = tensors_in((args, kwargs))
        gpu = any(map(on_gpu, operands)) if operands else self.calls_are_on_gpu
        if func is aten.copy_.default:  # between any devices
            gpu = on_gpu(args[0])
            self.count(gpu != on_gpu(args[1]))
        elif gpu:
            self.check(func, args, operands)
            self.count(self.waits(func, args))
        out = func(*args, **kwargs)
        return mark(out, True) if gpu else out

    def check(self, func: Any, args: tuple, operands: list[Tensor]) -> None:
        """Raise unless each operand is on the GPU, or is one that CUDA accepts from the CPU."""
        name = func.overloadpacket
        indices = tensors_in(args[1]) if name in INDEXING else []
        takes_number = torch.Tag.pointwise in func.tags or name in TAKES_NUMBER
        for number, operand in enumerate(operands):
            written = number == 0 and func._schema.is_mutable
            accepted = takes_number and operand.dim() == 0 and not written
            accepted = accepted or any(operand is index for index in indices)
            if not on_gpu(operand) and not accepted:
                what = f"{func} on the GPU: operand {number}, {list(operand.shape)}, is on the CPU"
                raise RuntimeError(f"{what}, at {self.where()}")

    def waits(self, func: Any, args: tuple) -> int:
        """Return how often an operator on the GPU waits: to read a value, or to copy an index."""
        if (
            func.overloadpacket in INDEXING
        ):  # what a mask chooses is counted on the GPU, and the number is read
            indices = tensors_in(args[1])
            return sum(not on_gpu(index) or index.dtype == torch.bool for index in indices)
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        return int(not reads.isdisjoint(func.tags))

    def count(self, syncs: int | bool) -> None:
        if syncs:
            self.syncs[self.line()] += syncs

    def line(self) -> int:
        """Return the line of the file that we are in, or 0."""
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        return frame.f_lineno if frame else 0

    def where(self, line: int | None = None) -> str:
        line = line or self.line()
        return f"line {line}: {linecache.getline(self.file, line).strip()}"

    def report(self, counts: Counter) -> str:
        return "\n".join(f"{count:5} × {self.where(line)}" for line, count in counts.most_common())


class Calls(TorchFunctionMode):
    """Above autograd: what names a device, asks for one, or moves a tensor."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        gpu = any(map(on_gpu, tensors_in(args)))
        asked = getattr(func, "__self__", None)  # of which property this is the getter
        if asked is Tensor.device:
            return device_of(args[0])
        if asked is Tensor.is_cuda:
            return gpu
        if func in (Tensor.to, Tensor.type_as, Tensor.cpu, Tensor.cuda):
            return self.move(func, *args, **kwargs)
        if func is Tensor.__deepcopy__:
            return mark(func(*args), gpu)
        if gpu and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"a GPU tensor cannot become numpy, at {self.kernels.where()}")
        self.kernels.count(gpu and func is Tensor.tolist)

        device = kwargs.get("device")
        if device is None and func is Tensor.new_tensor:
            device = device_of(args[0])
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if kwargs.get("generator") and (gpu or to_gpu):
            raise RuntimeError(f"a CPU generator cannot draw on a GPU, at {self.kernels.where()}")
        if to_gpu:
            kwargs["device"] = CPU
        self.kernels.calls_are_on_gpu = to_gpu or (gpu and device is None)
        out = func(*args, **kwargs)
        self.kernels.calls_are_on_gpu = False
        if to_gpu and func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):  # from CPU data
            out = out.clone() if out is args[0] else out
            self.kernels.count(out.numel() > 0)
        return out if device is None else mark(out, to_gpu)

    def move(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """.to() and the like: a copy if the device changes."""
        copy = kwargs.pop("copy", False)
        if func in (Tensor.cpu, Tensor.cuda):
            args = (GPU if func is Tensor.cuda else CPU,)
        elif args and isinstance(args[0], Tensor):  # .to(other)
            args = (device_of(args[0]), args[0].dtype)
        here = on_gpu(tensor)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        there = here if device is None else device.type == "cuda"
        where = None if there else device  # None: where it is; else the CPU, or meta
        self.kernels.count(here != there)
        copy = copy or here != there
        out = tensor.to(device=where, dtype=dtype, copy=copy, memory_format=layout)
        return out if out is tensor else mark(out, there)


def grouped(lists: list[list[Tensor]], with_indices: bool = False) -> dict:
    """What the optimizer and clip_grad_norm_ ask in C++, where no layer is asked."""
    groups = {}
    for (_, dtype), group in group_by_cpp(lists, with_indices).items():
        groups[device_of(tensors_in(group)[0]), dtype] = group
    return groups


@contextlib.contextmanager
def fake_cuda(p3o: ModuleType) -> Iterator[Kernels]:
    """Inside, p3o's models are on a fake GPU. Yields what counts the syncs."""
    kernels = Kernels(p3o.__file__)
    device = mock.patch.object(p3o, "DEVICE", "cuda")
    groups = mock.patch.object(torch._C, group_by_cpp.__name__, grouped)
    with device, groups, kernels, Calls(kernels):
        yield kernels
