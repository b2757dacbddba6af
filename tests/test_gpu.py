"""p3o.py on a GPU, without one: fake_cuda.py raises where CUDA would, and counts the waiting."""

import copy

import pytest
import torch
from fake_cuda import fake_cuda, on_gpu, tensors_in
from toys import encode, status, train

import p3o

GPU = "cuda"


@pytest.fixture
def gpu():
    with fake_cuda(p3o) as kernels:
        yield kernels


# ---- The run -------------------------------------------------------------------------------
def tensors_of(*values) -> list[torch.Tensor]:
    """Return all tensors among arguments or results, those of models included."""
    models = [value for value in values if isinstance(value, torch.nn.Module)]
    return tensors_in(values) + [weight for model in models for weight in model.parameters()]


def all_on_the_gpu(name: str):
    """Return a function of p3o.py that checks where its arguments and results are."""
    plain = getattr(p3o, name)

    def checked(*args, **options):
        given = (*args, *options.values())
        assert all(map(on_gpu, tensors_of(*given))), f"{name} is given a CPU tensor or model"
        result = plain(*args, **options)
        left = tensors_of(*given) + tensors_in(result)
        assert all(map(on_gpu, left)), f"{name} returns or leaves a tensor on the CPU"
        return result

    return checked


def test_the_whole_run_is_on_the_gpu_also_when_it_is_resumed(quick, gpu, out, monkeypatch, capsys):
    """A tensor on the CPU would stop a run on CUDA; a model there would make it slow."""
    for name in (
        *("collate", "sample", "sample_by_parts", "response_logprobs", "reward_scores"),
        *("bradley_terry_loss", "p3o_loss"),
        *("train_sft", "train_reward", "set_gain", "train_policy", "evaluate"),
    ):
        monkeypatch.setattr(p3o, name, all_on_the_gpu(name))
    save_checkpoint = p3o.save_checkpoint
    saved = []

    def stop_at_the_second(*args):
        save_checkpoint(*args)
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(p3o, "save_checkpoint", stop_at_the_second)
    assert status(quick) == 1
    said = capsys.readouterr().err
    assert said.endswith("interrupted; the same command resumes\n"), said
    assert status(quick) == 0, capsys.readouterr().err
    assert len((out / "p3o.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("clip", ["joint", "separate", "none"])
def test_each_form_of_the_loss_is_on_the_gpu(clip, gpu):
    """The run above takes only one of them."""
    logprobs = torch.zeros(3, 2, device=GPU, requires_grad=True)
    given = [torch.rand(3, 2, device=GPU) for _ in range(3)]
    loss, metrics = p3o.p3o_loss(logprobs, *given, beta=0.1, clip=clip)
    loss.backward()
    assert all(map(on_gpu, [loss, *metrics.values(), logprobs.grad]))
    assert not gpu.syncs, f"a loss reads values:\n{gpu.report(gpu.syncs)}"


# ---- How often the host waits for the GPU --------------------------------------------------
@pytest.mark.parametrize(
    "stage, one_more, options, most",
    [
        ("sft", "update", dict(epochs=2), 11),
        ("sft", "micro-batch", dict(micro_batch=4), 7),
        ("reward", "update", dict(epochs=2), 9),
        ("reward", "micro-batch", dict(micro_batch=4), 6),
        ("p3o", "update", dict(inner_epochs=2), 9),
        ("p3o", "sampled token", dict(response_tokens=4), 2),
        ("p3o", "iteration", dict(iterations=2), 45),
    ],
)
def test_a_step_waits_for_the_gpu_no_more_often(stage, one_more, options, most, tiny, gpu):
    """While the host waits, it starts no kernels, and small models are bound by that."""
    policy, reward_model, *_, cfg, _ = tiny
    sizes = dict(batch=8, epochs=1, pairs=8, minibatch=8, micro_batch=8, response_tokens=3)
    sizes |= dict(iterations=1, inner_epochs=1)
    reference = copy.deepcopy(policy).to(GPU)
    counts = []
    for changed in ({}, options):
        model = copy.deepcopy(reward_model if stage == "reward" else policy).to(GPU)
        gpu.syncs.clear()
        changed = vars(cfg) | sizes | changed
        train(stage, model, reference, encode(tiny, 8), p3o.Config(**changed))
        counts.append(gpu.syncs.copy())
    added = counts[1] - counts[0]
    said = (
        f"stage {stage}: one more {one_more} waits {added.total()} times, not {most}, for the GPU"
    )
    assert added.total() <= most, f"{said}:\n{gpu.report(added)}"


# ---- The fake GPU itself -------------------------------------------------------------------
CPU_ROW = torch.tensor([1.0, 2.0, 3.0])
CPU_MASK = torch.tensor([True, False, True])


def backward(row):
    """Add a CPU row to a gradient."""
    weight = row.clone().requires_grad_()
    weight.register_hook(lambda gradient: gradient + CPU_ROW)
    weight.sum().backward()


def step(row):
    """Keep a moment of the optimizer on the CPU."""
    weight = row.clone().requires_grad_()
    optimizer = p3o.make_optimizer([{"params": [weight]}])
    for _ in range(2):
        weight.sum().backward()
        optimizer.step()
        optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].cpu()


@pytest.mark.parametrize(
    "work",
    {
        "two operands": lambda row: row + CPU_ROW,
        "a CPU tensor and a GPU number": lambda row: CPU_ROW + row.sum(),
        "a CPU number that is written": lambda row: torch.tensor(0.0).add_(row.sum()),
        "products": lambda row: row @ CPU_ROW,
        "concatenation": lambda row: torch.cat([row, CPU_ROW]),
        "a CPU mask to fill": lambda row: row.masked_fill(CPU_MASK, 0.0),
        "a CPU mask to scatter": lambda row: row.masked_scatter(CPU_MASK, row),
        "CPU ids to embed": lambda row: torch.nn.functional.embedding(
            torch.tensor([0]), row[:, None]
        ),
        "a GPU index of a CPU tensor": lambda row: CPU_ROW[row.argmax()[None]],
        "CPU values to put": lambda row: row.index_put((row > 0,), CPU_ROW),
        "the backward pass": backward,
        "numpy": lambda row: row.numpy(),
        "a CPU generator": lambda row: torch.rand(2, device=GPU, generator=torch.Generator()),
        "a CPU generator in place": lambda row: row.uniform_(generator=torch.Generator()),
        "an optimizer's state": step,
    }.items(),
    ids=lambda item: item[0],
)
def test_the_fake_gpu_raises_where_cuda_does(work, gpu):
    with pytest.raises((RuntimeError, TypeError), match="GPU"):
        work[1](CPU_ROW.to(GPU))


@pytest.mark.parametrize(
    "work",
    {
        "a CPU number": lambda row: row * torch.tensor(2.0) + torch.tensor(1.0),
        "a CPU number to fill": lambda row: row.masked_fill(row > 1, torch.tensor(0.0)),
        "CPU indices": lambda row: row[torch.tensor([2, 0])],
        "a CPU mask as index": lambda row: row[CPU_MASK],
        "put at CPU indices": lambda row: row.index_put((torch.tensor([0]),), torch.tensor(5.0)),
        "copy from the CPU": lambda row: row.copy_(CPU_ROW),
        "made there": lambda row: torch.zeros(2, device=row.device),
        "made there from data": lambda row: torch.as_tensor(CPU_ROW, device=GPU),
        "like another": lambda row: row.new_tensor([1.0]) + CPU_ROW.to(row).to(torch.float64),
        "padded rows": lambda row: torch.nn.utils.rnn.pad_sequence([row, row[1:]]),
        "a view": lambda row: row.view(1, 3)[:, 1:].T,
        "a copy of a model": lambda row: copy.deepcopy(torch.nn.Linear(2, 2).to(GPU)).weight,
    }.items(),
    ids=lambda item: item[0],
)
def test_the_fake_gpu_allows_what_cuda_allows(work, gpu):
    out = work[1](CPU_ROW.to(GPU))
    assert out.device == torch.device("cuda:0")
    assert out.cpu().device == CPU_ROW.device == torch.device("cpu")


@pytest.mark.parametrize(
    "syncs, work",
    [
        (0, lambda row: (row + 1).masked_scatter(row > 1, row).softmax(-1).argmax()),
        (0, lambda row: torch.nn.utils.rnn.pad_sequence([row, row[1:]]) + row[0]),
        (0, lambda row: torch.arange(3, device=GPU) + torch.tensor(1)),
        (1, lambda row: row.sum().item()),
        (1, lambda row: bool(row.sum() > 1)),
        (1, lambda row: row.tolist()),
        (1, lambda row: row[row > 1]),
        (2, lambda row: row[: row.argmax()][torch.tensor([0])]),
        (1, lambda row: (row > 1).nonzero()),
        (1, lambda row: torch.tensor([1, 2], device=GPU)),
        (1, lambda row: row.cpu()),
    ],
)
def test_the_fake_gpu_counts_what_the_host_waits_for(syncs, work, gpu):
    row = CPU_ROW.to(GPU)
    gpu.syncs.clear()
    work(row)
    assert gpu.syncs.total() == syncs
