"""Kill the small run at random moments: the same command, given again, ends in the weights of a run
left alone.

python tests/tools/kill.py     # ten runs, each killed once, one a core at a time; some 10 minutes
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "p3o.py"
STAGES = ("sft", "reward", "p3o")


def start(out: Path, seed: int) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "--small", "--seed", str(seed), "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, env=environment, **quiet)


def result(out: Path) -> tuple[list[bytes], list[dict], str]:
    """The bytes of the three models, the metrics but for their timings, and the summary."""
    weights = []
    rows = []
    for stage in STAGES:
        weights.append((out / stage / "model.safetensors").read_bytes())
        for line in (out / f"{stage}.jsonl").read_text().splitlines():
            row = json.loads(line)
            del row["seconds"]
            rows.append(row)
    return weights, rows, (out / "summary.json").read_text()


def reached(out: Path) -> str:
    """How far a killed run had come."""
    for stage in reversed(STAGES):
        if (out / f"{stage}.jsonl").exists():
            steps = len((out / f"{stage}.jsonl").read_text().splitlines())
            return f"{stage}, {steps} steps"
    return "before the first step"


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--times", type=int, default=10)
    about = "of the runs, and of the moments at which they are killed"
    parser.add_argument("--seed", type=int, default=0, help=about)
    args = parser.parse_args()

    def try_one(number: int, moment: float) -> tuple[str, bool]:
        out = folder / str(number)
        process = start(out, args.seed)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        when = f"killed after {moment:4.1f} s ({reached(out)})"
        same = start(out, args.seed).wait() == 0 and result(out) == expected
        return f"{when}, run again: {'the same' if same else 'OTHER'}", same

    moments = random.Random(args.seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        began = time.perf_counter()
        if start(folder / "whole", args.seed).wait():
            sys.exit("the run that was to be left alone failed")
        seconds = time.perf_counter() - began
        expected = result(folder / "whole")
        print(f"left alone: {seconds:.0f} s", flush=True)
        chosen = [moments.uniform(0, seconds) for _ in range(args.times)]
        for line, same in pool.map(try_one, range(args.times), chosen):
            wrong += not same
            print(line, flush=True)
    print(f"{args.times - wrong} of {args.times} ended in the same weights and metrics")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
