"""The bug hunt: a run with a bug for each student, its source, and the answers."""

import csv
import io
import os
import random
import re
import shutil
import string
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from problems import PROBLEMS
from running import CORES
from source import NUMBERS, ROOT, SOURCE, right, starter, with_bodies, wrong_body
from wrong import SICK, Sick

LETTERS = dict(zip(sorted(sick.diagnosis for sick in SICK), string.ascii_uppercase, strict=False))
OPTIONS = ["--small"]
ANSWERS = ["name", "diagnosis", "line"]


def hunted(secret: str, name: str, known: int) -> tuple[Sick, str, range]:
    """Return a student's bug, the source to find it in, and its line numbers there.

    The source shows the first `known` problems solved and no other. Secret and name draw the bug
    and the style of each solution, so comparing with a neighbor or with p3o.py does not show the
    bug, and nobody without the secret can repeat the draw.
    """
    rng = random.Random(f"{secret}\n{name}")
    sick = rng.choice([sick for sick in SICK if NUMBERS[sick.wrong.problem] <= known])
    bodies = {}
    for problem in list(PROBLEMS)[:known]:
        styles = [style for style in right() if style.split("__")[0] == problem]
        bodies[problem] = right()[rng.choice(styles)]
    wrong = bodies[sick.wrong.problem] = wrong_body(sick.wrong)
    source = with_bodies(starter(known + 1), bodies)
    before = source[: source.index(wrong)] + wrong.split(sick.wrong.new)[0]
    first = before.count("\n") + 1
    return sick, source, range(first, first + sick.wrong.new.count("\n") + 1)


def sick_run(sick: Sick | None, out: Path) -> None:
    """Make a small run with a bug, or without. What it prints goes to output.txt in `out`."""
    source = SOURCE
    if sick:
        source = with_bodies(source, {sick.wrong.problem: wrong_body(sick.wrong)})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "p3o.py"
        file.write_text(source)
        command = [sys.executable, file, *OPTIONS, "--out", out]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{out}: the run failed: {result.stderr.splitlines()[-1]}")
    # the directory's name is the answer
    (out / "output.txt").write_text(result.stdout.replace(str(out), "runs/small"))


def hunt(folder: Path, names: list[str], known: int, secret: str) -> None:
    """Write each student's symptoms, each student's source, and key.csv with all answers."""
    if not names:
        raise ValueError("name the students, or give their --answers")
    if not secret:
        raise ValueError("give a --secret: without one, students could draw their bugs themselves")
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no file name; use a name without a slash")
    drawn = {name: hunted(secret, name, known) for name in names}
    runs = {"healthy": None} | {LETTERS[sick.diagnosis]: sick for sick, _, _ in drawn.values()}

    def run_once(letter: str) -> None:
        out = folder / "runs" / letter
        if not (out / "output.txt").exists():
            sick_run(runs[letter], out)

    def give_symptoms(letter: str, name: str) -> None:
        target = folder / "symptoms" / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("output.txt", "sft.jsonl", "reward.jsonl", "p3o.jsonl"):
            shutil.copy(folder / "runs" / letter / file, target)

    for part in ("runs", "sources"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(CORES) as pool:
        for done, _ in enumerate(pool.map(run_once, runs), 1):
            print(f"{done} of {len(runs)} runs done", flush=True)  # their names are the answers
    give_symptoms("healthy", "healthy")
    with (folder / "key.csv").open("w", newline="") as file:
        key = csv.writer(file)
        key.writerow(["name", "diagnosis", "first_line", "last_line", "function", "it_should_be"])
        for name, (sick, source, lines) in drawn.items():
            letter = LETTERS[sick.diagnosis]
            give_symptoms(letter, name)
            (folder / "sources" / f"{name}.py").write_text(source)
            wrong = sick.wrong
            key.writerow([name, letter, lines[0], lines[-1], wrong.problem, wrong.old.strip()])


def hunt_results(key: Path, answers: Path, table: Path | None = None) -> None:
    """Print for each student whether the diagnosis and the line are right, and write a table."""
    text = answers.read_text(encoding="utf-8-sig")  # Excel writes such a mark
    separator = ";" if ";" in text.split("\n")[0] else ","
    options = dict(delimiter=separator, skipinitialspace=True)
    reader = csv.DictReader(io.StringIO(text, newline=""), **options)
    found = {row.get("name"): row for row in reader}
    if not set(ANSWERS) <= set(reader.fieldnames or ()):
        raise ValueError(f"{answers} needs the columns {', '.join(ANSWERS)}")
    rows = []
    with key.open(newline="") as file:
        for row in csv.DictReader(file):
            answer = found.get(row["name"], {})
            # a letter alone, or with a reason after a mark: "H", "(H)", "H - the scores fall"
            given = (answer.get("diagnosis") or "").strip().upper()
            letter = re.match(r"\W*([A-Z])(?=\W*$|\s*[-–—:;.,)*])", given)
            diagnosis = bool(letter) and letter[1] == row["diagnosis"]
            line = (answer.get("line") or "").strip()
            lines = range(int(row["first_line"]), int(row["last_line"]) + 1)
            inside = line.isdecimal() and int(line) in lines
            verdicts = ["right" if good else "wrong" for good in (diagnosis, inside)]
            rows.append([row["name"], *verdicts, diagnosis + inside])
            print(
                f"{row['name']}: diagnosis {verdicts[0]}, line {verdicts[1]}: {rows[-1][-1]} of 2"
            )
    for name in sorted(found.keys() - {row[0] for row in rows}):
        print(f"{name}: no such student in {key}", file=sys.stderr)
    if table:
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="") as out:
            csv.writer(out).writerows([[*ANSWERS, "points"], *rows])


def diagnoses() -> str:
    return "".join(f"- **{letter}** {text}\n" for text, letter in LETTERS.items())


def hunt_answers() -> str:
    """Return the instructor's page: what each bug does to a run, and its line."""

    def lines(text: str, sign: str) -> str:
        return "".join(f"{sign}{line}\n" for line in text.strip("\n").splitlines())

    page = "# The bug hunt: answers\n\n"
    page += "Figures are ranges over four runs each. Another machine rounds differently and gives "
    page += "others, about as far apart as seeds are.\n"
    for sick in sorted(SICK, key=lambda sick: sick.diagnosis):
        page += f"\n## {LETTERS[sick.diagnosis]} {sick.diagnosis}\n\n"
        page += f"`{sick.wrong.problem}`. {sick.symptom}\n\n"
        page += f"```diff\n{lines(sick.wrong.new, '-')}{lines(sick.wrong.old, '+')}```\n"
    return page
