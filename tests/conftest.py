import copy
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = (
    "1"  # models are tiny; threads that wait for a busy core take minutes
)

import pytest
import torch
import transformers
from problems import PROBLEMS

transformers.logging.set_verbosity_error()
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

QUICK = dict(
    batch=64, epochs=1, iterations=2, pairs=16, minibatch=8, inner_epochs=2, eval_prompts=16
)


def pytest_addoption(parser):
    parser.addoption("--file", help="the file under test (default: p3o.py)")


def pytest_configure(config):
    """Load the file under test as `p3o`, whatever it is called, and name the problems of the
    course."""
    path = Path(config.getoption("--file") or ROOT / "p3o.py").resolve()
    if not path.is_file():
        raise pytest.UsageError(f"--file {path}: no such file")
    # `data` comes from beside the file, if it is there, else from beside the tests
    sys.path[:0] = [str(path.parent), str(ROOT), str(TESTS)]
    spec = importlib.util.spec_from_file_location("p3o", path)
    sys.modules["p3o"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise pytest.UsageError(f"{path.name} cannot be imported: {reason}") from None

    # `tests` is the suite of p3o.py; a folder in it keeps the tests of its own tools
    config.addinivalue_line("norecursedirs", "comparison")
    config.addinivalue_line("norecursedirs", "course")
    config.addinivalue_line("norecursedirs", "own")
    config.addinivalue_line("filterwarnings", "error")
    # float(loss) is as good as loss.item()
    config.addinivalue_line("filterwarnings", "ignore:Converting a tensor with requires_grad=True")
    config.addinivalue_line(
        "markers", "resuming: needs train_policy's checkpoint, no problem's task"
    )
    config.addinivalue_line("markers", "padding: what it costs, which no problem asks for")
    for number, (function, what) in enumerate(PROBLEMS.items(), 1):
        config.addinivalue_line("markers", f"problem_{number}: {function}: {what}")


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """The shipped held-out rows."""
    lines = (ROOT / "data" / "test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def tiny(rows):
    """A policy with random weights, a reward model that shares its body, tokenizer,
    configuration, pairs."""
    from transformers import GPT2ForSequenceClassification

    import p3o
    from data.preferences import split_row

    torch.manual_seed(0)
    cfg = p3o.Config(**p3o.SMALL | QUICK)
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


@pytest.fixture(scope="session")
def quick_data(rows, tmp_path_factory):
    """A file of 200 preference rows."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:200]))
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    """The output directory of `quick`."""
    return tmp_path / "out"


def quick_options(data: Path, out: Path) -> list[str]:
    options = ["--small", "--data", str(data), "--out", str(out)]
    for key, value in QUICK.items():
        options += ["--" + key.replace("_", "-"), str(value)]
    return options


@pytest.fixture
def quick(quick_data, out) -> list[str]:
    """Command-line options of a run that takes about a second."""
    return quick_options(quick_data, out)


@pytest.fixture(scope="session")
def finished_once(quick_data, tmp_path_factory) -> Path:
    from toys import status

    out = tmp_path_factory.mktemp("finished") / "out"
    assert status(quick_options(quick_data, out)) == 0
    return out


@pytest.fixture
def finished(finished_once, quick, out) -> list[str]:
    """The options of `quick`, whose run is there already."""
    shutil.copytree(finished_once, out)
    return quick
