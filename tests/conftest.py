"""What all tests share: the file under test, tiny models, and one small run of the command."""

import contextlib
import copy
import importlib.util
import inspect
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: more threads only wait for each other
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # tests make CPU tensors; Windows would drop an ""

import pytest
from problems import PROBLEMS

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# sizes of a run that takes about a second
QUICK = dict(
    batch=64,
    epochs=1,
    response_tokens=12,
    iterations=3,
    pairs=8,
    minibatch=4,
    inner_epochs=2,
    eval_prompts=16,
)
GAIN_PROMPTS = 16  # of such a run: the gain of 128 prompts would take half of its time


def pytest_addoption(parser):
    parser.addoption("--file", help="the file under test (default: p3o.py)")


def pytest_configure(config):
    """Load the file under test as `p3o`, whatever its name, and declare the markers."""
    path = Path(config.getoption("--file") or ROOT / "p3o.py").resolve()
    if not path.is_file():
        raise pytest.UsageError(f"--file {path}: no such file")
    # `data` comes from beside the file if it is there, else from beside the tests
    sys.path[:0] = [str(path.parent), str(ROOT), str(TESTS)]
    spec = importlib.util.spec_from_file_location("p3o", path)
    module = importlib.util.module_from_spec(spec)
    # with -n, this process only hands out the tests: it needs no torch
    hands_out = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    try:
        if hands_out:
            compile(path.read_text(), path.name, "exec")
        else:
            sys.modules["p3o"] = module
            spec.loader.exec_module(module)
            sys.modules["transformers"].logging.set_verbosity_error()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise pytest.UsageError(f"{path.name} cannot be imported: {reason}") from None

    # `tests` is the suite of p3o.py; each folder in it keeps the tests of its own tools
    for folder in ("comparison", "course", "own"):
        config.addinivalue_line("norecursedirs", folder)
    config.addinivalue_line("filterwarnings", "error")
    # float(loss) is as good as loss.item()
    config.addinivalue_line("filterwarnings", "ignore:Converting a tensor with requires_grad=True")
    for marker in (
        "resuming: needs train_policy's checkpoint, which no problem asks for",
        "padding: speed, memory and infinite logits, on which no problem's points depend",
    ):
        config.addinivalue_line("markers", marker)
    for number, (function, what) in enumerate(PROBLEMS.items(), 1):
        config.addinivalue_line("markers", f"problem_{number}: {function}: {what}")


# ---- Models --------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """The shipped held-out rows."""
    lines = (ROOT / "data" / "test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def tiny(rows):
    """A policy with random weights, a reward model with the same body, tokenizer, configuration,
    pairs."""
    import torch
    from transformers import GPT2ForSequenceClassification

    import p3o
    from data.preferences import split_row

    torch.manual_seed(0)
    cfg = p3o.Config(**p3o.SMALL | QUICK | dict(response_tokens=40))
    pairs = [split_row(row) for row in rows]
    policy, tokenizer = p3o.load_base(cfg)
    policy.config.num_labels = 1
    reward_model = GPT2ForSequenceClassification(policy.config)
    reward_model.transformer.load_state_dict(policy.transformer.state_dict())
    return policy.eval(), reward_model.eval(), tokenizer, cfg, pairs


@pytest.fixture
def prompts(tiny):
    """64 held-out prompts as token ids."""
    from toys import encode

    return [example.prompt for example in encode(tiny, 64)]


@pytest.fixture(scope="session")
def toy():
    """A model small enough to enumerate; copy it before changing it."""
    from toys import toy_model

    return toy_model(0)


@pytest.fixture
def fresh():
    """Makes an independent copy of a model, so that a test may train it."""
    return copy.deepcopy


# ---- A small run of the command ------------------------------------------------------------
@pytest.fixture(scope="session")
def quick_data(rows, tmp_path_factory):
    """A file of 200 preference rows."""
    from toys import write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows[:200])


@pytest.fixture
def out(tmp_path) -> Path:
    """The output directory of `quick`."""
    return tmp_path / "out"


def quick_options(data: Path, out: Path) -> list[str]:
    options = ["--small", "--data", str(data), "--out", str(out)]
    for key, value in QUICK.items():
        options += ["--" + key.replace("_", "-"), str(value)]
    return options


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a quick run have little to do for its gain, and a checkpoint every other iteration."""
    import p3o

    monkeypatch.setattr(p3o, "GAIN_PROMPTS", GAIN_PROMPTS)
    monkeypatch.setattr(p3o, "CHECKPOINT_EVERY", 2)


@pytest.fixture
def quick(quick_data, out, monkeypatch) -> list[str]:
    """Command-line options of a run that takes about a second."""
    shorten(monkeypatch)
    return quick_options(quick_data, out)


@dataclass(repr=False)
class Run:
    """A finished run, and what was seen on the way."""

    out: Path
    printed: str
    given: dict[str, dict[str, Any]]  # by function: its arguments, as they are after the run
    at_first: dict[str, dict[str, Any]]  # by function: copies of the models that it was given
    stopped: Path  # a copy of the directory from when the policy was about to be saved


@pytest.fixture(scope="session")
def run(quick_data, tmp_path_factory) -> Run:
    """The run of `quick`, made once: copy its directory before changing it."""
    import torch
    from toys import status

    import p3o

    folder = tmp_path_factory.mktemp("finished")
    seen = Run(folder / "out", "", {}, {}, folder / "stopped")

    def watch(name, monkeypatch):
        plain = getattr(p3o, name)

        def watched(*args, **options):
            arguments = inspect.signature(plain).bind(*args, **options).arguments
            models = {k: v for k, v in arguments.items() if isinstance(v, torch.nn.Module)}
            if name == "save":
                if arguments["folder"].name == "p3o":
                    shutil.copytree(seen.out, seen.stopped)
            else:
                seen.given[name] = dict(arguments)
                seen.at_first[name] = copy.deepcopy(models)
            return plain(*args, **options)

        monkeypatch.setattr(p3o, name, watched)

    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        shorten(monkeypatch)
        for name in ("train_sft", "train_reward", "set_gain", "train_policy", "evaluate", "save"):
            watch(name, monkeypatch)
        assert status(quick_options(quick_data, seen.out)) == 0
    seen.printed = printed.buffer.getvalue().decode()
    return seen


@pytest.fixture
def finished(run, quick, out) -> list[str]:
    """The options of `quick`; its run is there already."""
    shutil.copytree(run.out, out)
    return quick


@pytest.fixture
def stopped(run, quick, out) -> list[str]:
    """The options of `quick`; its run stopped when the policy was about to be saved."""
    shutil.copytree(run.stopped, out)
    return quick
