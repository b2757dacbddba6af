"""Preference pairs as text, read from a hub name, a file or a directory.

A row says which of two responses to a prompt was preferred. Three formats are in use, all read:

    chosen, rejected            two dialogues that share their beginning, as Anthropic HH has them
    prompt, chosen, rejected    the prompt, and two responses that follow it
    either, in messages         lists of {"role": ..., "content": ...} in the place of text
"""

import glob
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
from tqdm import tqdm

SHIPPED_DATA = Path(__file__).resolve().parent
HUMAN = "\n\nHuman:"  # how Anthropic HH marks its turns
ASSISTANT = "\n\nAssistant:"
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TRAIN_SPLITS = ("train", "train_prefs", "train_pref")
TEST_SPLITS = ("test", "test_prefs", "test_pref", "validation", "valid", "val", "dev", "eval")


class Pair(NamedTuple):
    """A prompt and two responses to it, as text; a response continues its prompt to the letter."""

    prompt: str
    chosen: str
    rejected: str


class InputError(Exception):
    """Something that the user can mend, told in one line."""


class Unusable(Exception):
    """Why a row makes no pair."""


def load_pairs(source: str, tokenizer: Any = None) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, from a hub name, a file, or a directory with train.* and test.*:
    .jsonl, .json, .csv or .parquet, gzipped or not. Where nothing is held out, about every tenth
    prompt is, with all its rows. The tokenizer's chat template, if any, turns messages into text.
    """
    splits = load_splits(source)
    train = usable_pairs(splits["train"], f"{source}, train", tokenizer)
    heldout = usable_pairs(splits.get("test", []), f"{source}, test", tokenizer)
    if not heldout:
        # NOTE by prompt: answers to one prompt are alike, and would give each other away
        tenths = [zlib.crc32(pair.prompt.encode()) % 10 for pair in train]
        heldout = [pair for pair, tenth in zip(train, tenths, strict=True) if tenth == 0]
        train = [pair for pair, tenth in zip(train, tenths, strict=True) if tenth != 0]
    if not train or len(heldout) < 2:  # one figure has no interval
        raise InputError(f"{source}: too few usable rows to train on some and hold out others")
    return train, heldout


def try_hub(*sources: str) -> None:
    """One try to reach the hub, if a source is not on disk: the library would make six.

    Without it, what was fetched before still loads, and what was not fails at once.
    """
    if all(Path(source).expanduser().exists() for source in sources):
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # offline, in the words of whatever network this is
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def load_splits(source: str) -> dict[str, list[dict]]:
    """Return the rows of "train" and, if there is one, of "test". Raises InputError."""
    path = Path(source).expanduser().absolute()
    meant_as_path = path.suffix or source.startswith((".", "/", "~"))
    if meant_as_path and not path.exists():
        raise InputError(f"--data {source}: no such file or directory")
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if reader_of(file))
            splits = named_splits({file.name.split(".")[0]: file for file in files}, source)
            print(f"reading {' and '.join(file.name for file in splits.values())}")
            return {split: read_file(file) for split, file in splits.items()}
        if path.is_file():
            return {"train": read_file(path)}
        # HH comes source by source, and what is measured on a few rows takes the first
        loaded = datasets.load_dataset(source).shuffle(seed=0, keep_in_memory=True)
        splits = named_splits(loaded, source)
        return {split: rows.to_list() for split, rows in splits.items()}
    except InputError:
        raise
    except Exception as error:  # of many kinds: no network, no such name, a broken file
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        advice = "--data takes local files, and --small needs none"
        raise InputError(f"cannot load {source!r}: {reason.splitlines()[0]}; {advice}") from None


def named_splits(found: dict[str, Any], source: str) -> dict[str, Any]:
    """Pick "train" and "test" under the names that are in use for them. Raises InputError."""
    picked = {}
    for split, names in (("train", TRAIN_SPLITS), ("test", TEST_SPLITS)):
        usable = [name for name in names if name in found]
        if usable:
            picked[split] = found[usable[0]]
    if "train" not in picked:
        wanted = f"one of {', '.join(TRAIN_SPLITS)}, and perhaps one of {', '.join(TEST_SPLITS)}"
        raise InputError(f"{source} holds {', '.join(found) or 'no data'}; it needs {wanted}")
    return picked


def reader_of(file: Path) -> str | None:
    """Return the name of the library's reader of this kind of file, by its ending."""
    return READERS.get(Path(file.name.lower().removesuffix(".gz")).suffix)


def read_file(file: Path) -> list[dict]:
    reader = reader_of(file)
    if not reader:
        raise InputError(f"{file.name}: the name must end in {', '.join(READERS)} (or .gz)")
    # NOTE the CSV reader would take an answer "None" or "NA" for a missing one
    options = {"keep_default_na": False} if reader == "csv" else {}
    path = glob.escape(str(file))  # brackets and stars are part of the name
    return datasets.load_dataset(reader, data_files=path, split="train", **options).to_list()


def usable_pairs(rows: list[dict], where: str, tokenizer: Any = None) -> list[Pair]:
    """Split every row; drop, count and report those that cannot be used."""
    pairs = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(tqdm(rows, "reading", leave=False, delay=2), 1):
        try:
            pairs.append(split_row(row, tokenizer))
        except Unusable as reason:
            dropped[str(reason)] += 1
        except InputError as error:
            raise InputError(f"{where} row {number}: {error}") from None
    for reason, count in dropped.items():
        print(f"{where}: {count} of {len(rows)} rows dropped: {reason}")
    return pairs


def split_row(row: dict, tokenizer: Any = None) -> Pair:
    """The pair of a row in any of the formats. Raises Unusable or InputError."""
    prompt = row.get("prompt") or ""
    chosen = row.get("chosen")
    rejected = row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        pair = split_texts(prompt, chosen, rejected)
    elif is_messages(chosen) and is_messages(rejected):
        pair = split_messages(prompt, chosen, rejected, tokenizer)
    else:
        raise InputError(
            "chosen, rejected and prompt, if any, must be text or lists of messages, "
            'each with its "role" and "content"'
        )
    if not pair.prompt.strip():
        raise Unusable("no shared prompt")
    if HUMAN in pair.chosen + pair.rejected:
        raise Unusable("a new human turn in a response")
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise Unusable("empty response")
    if pair.chosen == pair.rejected:
        raise Unusable("equal responses")
    return pair


def split_texts(prompt: str, chosen: str, rejected: str) -> Pair:
    """Without a prompt, both dialogues are split after the last "Assistant:" that they share."""
    if prompt:
        return Pair(prompt, chosen, rejected)
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071
    if ASSISTANT not in shared:
        raise Unusable("no shared prompt")
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    return Pair(chosen[:end], chosen[end:], rejected[end:])


def is_messages(value: Any) -> bool:
    """Whether it is a list of messages, each with its role and its text."""
    if not isinstance(value, list) or not value:
        return False
    for message in value:
        if not isinstance(message, dict):
            return False
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return False
    return True


def split_messages(prompt: Any, chosen: list, rejected: list, tokenizer: Any) -> Pair:
    """Without a list of messages as prompt, it is the messages with which both begin."""
    if not is_messages(prompt):
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = chosen[:shared]
        chosen = chosen[shared:]
        rejected = rejected[shared:]
    if not prompt:
        raise Unusable("no shared prompt")
    if len(chosen) > 1 or len(rejected) > 1:
        raise Unusable("a new human turn in a response")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise Unusable("a response that is not an assistant's")
    if getattr(tokenizer, "chat_template", None):
        return Pair(
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
            templated_response(prompt, chosen, tokenizer),
            templated_response(prompt, rejected, tokenizer),
        )
    return Pair(
        "".join(map(hh_turn, prompt)) + ASSISTANT,
        " " + chosen[0]["content"].strip(),
        " " + rejected[0]["content"].strip(),
    )


def templated_response(prompt: list[dict], response: list[dict], tokenizer: Any) -> str:
    """What the chat template adds to a prompt for this response, up to EOS."""
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(prompt + response, tokenize=False)
    if not whole.startswith(start):
        raise InputError("the tokenizer's chat template does not continue its own prompt")
    # NOTE EOS is put on with the token ids, for all formats alike; a second one would never be said
    return whole[len(start) :].split(tokenizer.eos_token)[0]


def hh_turn(message: dict) -> str:
    """A message as Anthropic HH would write it."""
    markers = {"user": HUMAN, "assistant": ASSISTANT}
    marker = markers.get(message["role"], f"\n\n{message['role'].title()}:")
    return f"{marker} {message['content'].strip()}"


class Example(NamedTuple):
    """A preference pair as token ids, with its text."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    text: Pair


def tokenize(
    pairs: list[Pair], tokenizer: Any, prompt_tokens: int, response_tokens: int
) -> list[Example]:
    """Turn text into the token ids that all stages share; drop pairs that truncation made equal.

    Raises InputError if fewer than two pairs are left.
    """
    examples = []
    for pair in tqdm(pairs, "tokenizing", leave=False, delay=2):
        prompt = tokenize_prompt(pair.prompt, tokenizer, prompt_tokens)
        chosen = tokenize_response(pair.chosen, tokenizer, response_tokens)
        rejected = tokenize_response(pair.rejected, tokenizer, response_tokens)
        if chosen != rejected:
            examples.append(Example(prompt, chosen, rejected, pair))
    dropped = len(pairs) - len(examples)
    if dropped:
        print(f"dropped {dropped} of {len(pairs)} pairs: equal once truncated")
    if len(examples) < 2:  # a figure's interval takes two values
        raise InputError("too few pairs are left; raise --response-tokens")
    return examples


def tokenize_prompt(text: str, tokenizer: Any, limit: int) -> list[int]:
    """Encode a prompt; one that is too long loses its oldest turns, then its first tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    while len(ids) > limit and HUMAN in text[1:]:
        text = text[text.index(HUMAN, 1) :]  # the oldest turn starts at 0, the next one here
        ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[-limit:]


def tokenize_response(text: str, tokenizer: Any, limit: int) -> list[int]:
    """Append EOS unless the response was truncated: a policy must learn to stop, too."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id][:limit]
