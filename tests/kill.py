"""Kill the small run at random moments: the same command, given again, ends in the weights of a run left alone.

python tests/kill.py              # ten runs, each killed once, as many at a time as there are cores; some 10 minutes
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

SCRIPT = Path(__file__).resolve().parents[1] / "p3o.py"
STAGES = ("sft", "reward", "p3o")


def start(out: Path, seed: int) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "--small", "--seed", str(seed), "--out", out]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)


def result(out: Path) -> tuple[list[bytes], list[dict]]:
    """The bytes of the three models, and the metrics but for their timings."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    weights = [(out / stage / "model.safetensors").read_bytes() for stage in STAGES]
    return weights, [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the runs, and of the moments at which they are killed")
    args = parser.parse_args()
    moments, wrong = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        began, whole = time.perf_counter(), Path(folder) / "whole"
        if start(whole, args.seed).wait():
            sys.exit("the run that was to be left alone failed")
        expected, seconds = result(whole), time.perf_counter() - began
        print(f"left alone: {seconds:.0f} s")

        def try_one(number: int, moment: float) -> tuple[str, bool]:
            out = Path(folder) / str(number)
            process = start(out, args.seed)
            try:
                process.wait(timeout=moment)
                reached = "the end"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                metrics = out / "metrics.jsonl"
                last = metrics.read_text().splitlines()[-1:] if metrics.exists() else []
                reached = "{stage}, step {step}".format(**json.loads(last[0])) if last else "before the first step"
            same = start(out, args.seed).wait() == 0 and result(out) == expected
            return f"killed after {moment:4.1f} s ({reached}), run again: {'the same' if same else 'OTHER'}", same

        chosen = [moments.uniform(0, seconds) for _ in range(args.times)]
        for line, same in pool.map(try_one, range(args.times), chosen):
            wrong += not same
            print(line, flush=True)
    print(f"{args.times - wrong} of {args.times} ended in the same weights and metrics")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
