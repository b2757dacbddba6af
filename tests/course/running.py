"""Runs of the tests against many files: each in a process of its own, with limits."""

import contextlib
import functools
import gc
import importlib
import json
import multiprocessing.connection
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from source import ROOT, SOURCE, TESTS

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SLOWER = 10  # a busy machine may take as many seconds for one of processor time
LARGEST_FILE = 2**28  # bytes that the code may write to a file, such as stderr


class Job(NamedTuple):
    """A run of the tests with another text in the place of one of the project's files."""

    text: str
    options: list  # of pytest
    file: str = "p3o.py"


class Result(NamedTuple):
    passed: list[str]  # names of tests, with their parameters
    failed: dict[str, str]  # name: the first line of the message
    trouble: str = ""  # why there is no report of the tests
    stopped: bool = False  # a limit stopped it, so it says nothing about the file


class Recorder:
    """A plugin of pytest that records which tests pass and what the others say."""

    def __init__(self) -> None:
        self.result = Result([], {})

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.split("::")[-1]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.result.failed[name] = message.strip().split("\n")[0][:300]
        elif report.passed and report.when == "call":
            self.result.passed.append(name)

    pytest_collectreport = pytest_runtest_logreport


@functools.cache
def import_once() -> None:
    """Import what every run of the tests needs. Then forget p3o.py: each run loads its own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a core for each process
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a forked process cannot use a GPU
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(ROOT))
    for name in ("p3o", *(f"transformers.models.{m}.modeling_{m}" for m in ("gpt2", "llama"))):
        importlib.import_module(name)
    sys.path.remove(str(ROOT))
    for name in list(sys.modules):
        if name.split(".")[0] in ("p3o", "data"):
            del sys.modules[name]
    gc.freeze()  # pytest collects garbage at its end, and need not look through all of this


def run_one(job: Job, folder: Path, seconds: int) -> None:
    """Run the tests in this process and write their result into `folder`."""
    os.setsid()  # what the file starts can then be killed with it
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, hard))
    with open(os.devnull, "w") as nowhere, (folder / "errors.txt").open("w") as errors:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    (folder / "p3o.py").write_text(SOURCE)
    if job.file != "p3o.py":
        shutil.copytree(ROOT / "data", folder / "data")
    (folder / job.file).write_text(job.text)
    recorder = Recorder()
    options = ["-s", "--tb=short", "-p", "no:cacheprovider", f"--file={folder / 'p3o.py'}"]
    pytest.main([*options, *job.options], plugins=[recorder])
    (folder / "result.json").write_text(json.dumps(recorder.result))
    os._exit(0)  # without waiting for threads that the file has started


def result_of(folder: Path, exit_code: int, seconds: int) -> Result:
    """Return what `run_one` wrote, or why it wrote nothing."""
    report = folder / "result.json"
    if exit_code == -signal.SIGXCPU:
        return Result([], {}, f"stopped after {seconds} seconds of processor time", True)
    if exit_code == -signal.SIGKILL:
        return Result([], {}, "killed, perhaps for lack of memory", True)
    if not report.exists():
        return Result([], {}, "no report: it ended the process")
    result = Result(*json.loads(report.read_text()))
    if result.passed or result.failed:
        return result
    with (folder / "errors.txt").open(errors="replace") as file:
        errors = file.read(100_000)
    reason = re.search("cannot be imported: .{,300}", errors)
    return Result([], {}, f"the file {reason[0]}" if reason else f"no test ran: {errors[-1000:]}")


def kill(process: multiprocessing.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def run_tests(jobs: list[Job], seconds: int = 3600, at_once: int = CORES) -> Iterator[Result]:
    """Run the tests for each job, each in its own process, `at_once` at a time.

    Yields the results in the order of the jobs. Stops a job that takes more than `seconds` of
    processor time, or SLOWER times as long by the clock. The processes are forked from this one,
    so that none has to import the large packages.
    """
    if not jobs:
        return
    import_once()
    fork = multiprocessing.get_context("fork")
    results = {}  # number of the job: result
    running = {}  # sentinel: number of the job, process, deadline; the oldest first
    started = finished = 0
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(len(jobs))]
        try:
            while finished < len(jobs):
                if finished in results:
                    yield results.pop(finished)
                    finished += 1
                elif started < len(jobs) and len(running) < at_once:
                    folders[started].mkdir()
                    arguments = jobs[started], folders[started], seconds
                    process = fork.Process(target=run_one, args=arguments)
                    process.start()
                    deadline = time.monotonic() + SLOWER * seconds
                    running[process.sentinel] = started, process, deadline
                    started += 1
                else:
                    oldest = next(iter(running))
                    left = max(running[oldest][-1] - time.monotonic(), 0)
                    ended = multiprocessing.connection.wait(running, left)
                    number, process, _ = running.pop(ended[0] if ended else oldest)
                    late = Result([], {}, f"stopped after {SLOWER * seconds} seconds", True)
                    if ended:
                        process.join()
                        late = result_of(folders[number], process.exitcode, seconds)
                    kill(process)  # and what it started
                    results[number] = late
                    shutil.rmtree(folders[number], ignore_errors=True)
        finally:
            for _, process, _ in running.values():
                kill(process)


def files_with(pattern: str) -> list[str]:
    """Return the test files whose text matches. Other files need not be imported."""
    files = sorted(TESTS.glob("test_*.py"))
    return [str(file) for file in files if re.search(pattern, file.read_text())]


def tests_of(number: int) -> list[str]:
    """Return the options of pytest that choose a problem's tests."""
    return ["-m", f"problem_{number}", *files_with(rf"\bproblem_{number}\b")]
