"""Preference pairs: read from a hub name, a file or a directory, and turned into token ids.

A row says which of two responses to a prompt was preferred. Three formats are in use, all read:

    chosen, rejected            two dialogues that share their beginning, as Anthropic HH has them
    prompt, chosen, rejected    the prompt, and two responses that follow it
    either, in messages         lists of {"role": ..., "content": ...} in place of text

Messages go through the tokenizer's chat template, if it has one. What the models are trained on is
what the tokenizer and its template give for the whole text.
"""

import bisect
import glob
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable
from datetime import datetime
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
    """A prompt and two responses as text; a response continues its prompt to the letter.

    `messages` is the prompt as a list of messages, if a chat template made the text of it.
    """

    prompt: str
    chosen: str
    rejected: str
    messages: tuple | None = None


class Example(NamedTuple):
    """A preference pair as token ids, with its text."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    text: Pair


class InputError(Exception):
    """Something that the user can mend, told in one line."""


class Unusable(Exception):
    """Why a row makes no pair."""


# ---- All of it -----------------------------------------------------------------------------
def load_examples(
    source: str,
    tokenizer: Any,
    prompt_tokens: int,
    response_tokens: int,
    started: str | None = None,
) -> tuple[list[Example], list[Example]]:
    """Return training and held-out pairs as token ids: `load_pairs`, then `tokenize`."""
    train, heldout = load_pairs(source, tokenizer, started)
    limits = prompt_tokens, response_tokens
    examples = tokenize(train, tokenizer, *limits, started)
    return examples, tokenize(heldout, tokenizer, *limits, started)


def first_start(out: str) -> str:
    """Return when the run in the directory `out` was started first, if there is one, or now.

    A chat template may print the date. A run that is resumed on another day needs the same text.
    Raises InputError for a directory that holds another kind of config.json.
    """
    config = Path(out) / "config.json"
    if config.exists():
        try:
            return json.loads(config.read_text())["started"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{config} is not that of a run; choose another --out") from None
    return datetime.now().isoformat()


def checksum(examples: list[Example]) -> int:
    """Return a number that stands for the rows, whatever a chat template makes of them."""
    rows = []
    for example in examples:
        prompt, chosen, rejected, messages = example.text
        rows.append((messages or prompt, chosen, rejected))
    return zlib.crc32(repr(rows).encode())


# ---- Rows ----------------------------------------------------------------------------------
def load_pairs(
    source: str, tokenizer: Any = None, started: str | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Return training and held-out pairs. Raises InputError.

    `source` is a hub name, a file, or a directory with train.* and test.*: .jsonl, .json, .csv or
    .parquet, gzipped or not. If nothing is held out, about every tenth prompt is, with all its
    rows. If a chat template is used, the token that ends its assistant's turns becomes the
    tokenizer's EOS, and a template that prints the date prints that of `started` (ISO 8601).
    """
    splits = load_splits(source)
    chat = Chat(tokenizer, started)
    train = usable_pairs(splits["train"], f"{source}, train", chat)
    heldout = usable_pairs(splits.get("test", []), f"{source}, test", chat)
    if not heldout:
        # NOTE by prompt: answers to one prompt are alike, and would give each other away
        # of messages themselves, so that no chat template and no date changes the choice
        keys = [repr(pair.messages) if pair.messages else pair.prompt for pair in train]
        tenths = [zlib.crc32(key.encode()) % 10 for key in keys]
        heldout = [pair for pair, tenth in zip(train, tenths, strict=True) if tenth == 0]
        train = [pair for pair, tenth in zip(train, tenths, strict=True) if tenth != 0]
    if not train or len(heldout) < 2:  # an interval takes two values
        raise InputError(f"{source}: too few usable rows to train on some and hold out others")
    return train, heldout


def try_hub(*sources: str) -> None:
    """Try once to reach the hub, if a source is not on disk: the library would try six times.

    If it cannot be reached, what was fetched before still loads, and the rest fails at once.
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


def usable_pairs(rows: list[dict], where: str, chat: "Chat") -> list[Pair]:
    """Split every row; drop, count and report those that cannot be used.

    Raises InputError if that is all of them.
    """
    pairs = []
    dropped: Counter[str] = Counter()
    for row in tqdm(rows, "reading", leave=False, delay=2):
        try:
            pairs.append(split_row(row, chat))
        except Unusable as reason:
            dropped[str(reason)] += 1
    if rows and not pairs:
        (reason, count), *_ = dropped.most_common()
        columns = ", ".join(rows[0])
        raise InputError(
            f"{where}: no row can be used; {count} of {len(rows)}: {reason} "
            f"(the columns are {columns})"
        )
    for reason, count in dropped.most_common():
        print(f"{where}: {count} of {len(rows)} rows dropped: {reason}")
    return pairs


def split_row(row: dict, chat: "Chat | None" = None) -> Pair:
    """Return the pair of a row in any of the formats. Raises Unusable."""
    chat = chat or Chat()
    prompt = parsed(row.get("prompt") or "")
    chosen = parsed(row.get("chosen"))
    rejected = parsed(row.get("rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        pair = split_texts(prompt, chat.until_eos(chosen), chat.until_eos(rejected))
    elif is_messages(chosen) and is_messages(rejected):
        pair = split_messages(prompt, chosen, rejected, chat)
    else:
        raise Unusable(
            "chosen, rejected and prompt, if any, must be text or lists of messages, "
            'each with its "role" and "content"'
        )
    if not pair.prompt.strip():
        raise Unusable("no shared prompt")
    if not pair.messages and HUMAN in pair.chosen + pair.rejected:
        raise Unusable("a new human turn in a response")
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise Unusable("empty response")
    if pair.chosen == pair.rejected:
        raise Unusable("equal responses")
    return pair


def parsed(value: Any) -> Any:
    """Return the messages that a text spells out as JSON, and anything else as it is."""
    if isinstance(value, str) and re.match(r'\s*\[\s*\{\s*"', value):
        try:
            messages = json.loads(value)
        except ValueError:
            return value
        if is_messages(messages):
            return messages
    return value


def split_texts(prompt: str, chosen: str, rejected: str) -> Pair:
    """Without a prompt, both dialogues are split after the last "Assistant:" that they share."""
    if prompt:
        if chosen.startswith(prompt) and rejected.startswith(prompt):  # repeated
            chosen = chosen[len(prompt) :]
            rejected = rejected[len(prompt) :]
        return Pair(prompt, chosen, rejected)
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071
    if ASSISTANT not in shared:
        raise Unusable("no shared prompt")
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    return Pair(chosen[:end], chosen[end:], rejected[end:])


def is_messages(value: Any) -> bool:
    """Return whether it is a list of messages, each with its role and its text."""
    if not isinstance(value, list) or not value:
        return False
    for message in value:
        if not isinstance(message, dict):
            return False
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return False
    return True


def split_messages(prompt: Any, chosen: list, rejected: list, chat: "Chat") -> Pair:
    """Without a list of messages as prompt, it is the messages with which both begin."""
    if is_messages(prompt):
        repeated = len(prompt)
        if chosen[:repeated] == prompt and rejected[:repeated] == prompt:
            chosen = chosen[repeated:]
            rejected = rejected[repeated:]
    else:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = chosen[:shared]
        chosen = chosen[shared:]
        rejected = rejected[shared:]
    if not prompt or not chosen or not rejected:
        raise Unusable("no shared prompt")
    if len(chosen) > 1 or len(rejected) > 1:
        raise Unusable("a new human turn in a response")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise Unusable("a response that is not an assistant's")
    if chat.template:
        start = chat.render(prompt, add_generation_prompt=True)
        texts = [chat.response(prompt, start, response) for response in (chosen, rejected)]
        return Pair(start, *texts, tuple(prompt))
    return Pair(
        "".join(map(hh_turn, prompt)) + ASSISTANT,
        " " + chosen[0]["content"].strip(),
        " " + rejected[0]["content"].strip(),
    )


def hh_turn(message: dict) -> str:
    """Return a message as Anthropic HH would write it."""
    markers = {"user": HUMAN, "assistant": ASSISTANT}
    marker = markers.get(message["role"], f"\n\n{message['role'].title()}:")
    return f"{marker} {message['content'].strip()}"


# ---- The chat template ---------------------------------------------------------------------
class Chat:
    """A tokenizer's chat template, if any. It prints the date of `started` as today's."""

    def __init__(self, tokenizer: Any = None, started: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = getattr(tokenizer, "chat_template", None)
        if isinstance(self.template, dict):  # several, by name
            self.template = self.template.get("default", self.template)
        if isinstance(self.template, str):
            day = datetime.fromisoformat(started) if started else datetime.now()
            call = r"strftime_now\((['\"])(.*?)\1\)"
            self.template = re.sub(call, lambda c: repr(day.strftime(c[2])), self.template)
        self.turns_end_with_eos = False

    def render(self, messages: list[dict], **options: Any) -> str:
        """Return the template's text. Raises Unusable, in the template's words, if it refuses."""
        if not isinstance(self.template, str):
            raise Unusable("none of the tokenizer's chat templates is called default")
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, **options
            )
        except Exception as error:  # templates raise whatever they like
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise Unusable(f"the chat template refuses it: {reason}") from None

    def response(self, prompt: list[dict], start: str, response: list[dict]) -> str:
        """Return what the template adds to the prompt's text for this response, up to EOS."""
        if not self.turns_end_with_eos:
            self.end_turns_with_eos(prompt)
        whole = self.render(prompt + response)
        if not whole.startswith(start):
            raise Unusable("the chat template does not continue its own prompt")
        # NOTE EOS is appended as a token id, for all formats alike, and must not be there twice
        return self.until_eos(whole[len(start) :])

    def end_turns_with_eos(self, prompt: list[dict]) -> None:
        """Make the token that ends an assistant's turn in the template the tokenizer's EOS.

        Otherwise the model would have to say that token and EOS to stop, and sampling would go on
        after the turn.
        """
        probe = [*prompt, {"role": "assistant", "content": "Probe"}]
        after = self.render(probe).rpartition("Probe")[2]
        unlike = (self.tokenizer.unk_token_id, self.tokenizer.bos_token_id)
        for token in self.tokenizer.encode(after, add_special_tokens=False):
            if token in self.tokenizer.added_tokens_decoder and token not in unlike:
                name = self.tokenizer.convert_ids_to_tokens(token)
                if name != self.tokenizer.eos_token:
                    self.tokenizer.eos_token = name
                    print(f"EOS is {name}, which ends a turn in the chat template")
                break
        self.turns_end_with_eos = True

    def until_eos(self, response: str) -> str:
        """Return the response without an EOS that it spells out, and without what follows."""
        eos = getattr(self.tokenizer, "eos_token", None)
        return response.split(eos)[0] if eos else response


# ---- Token ids -----------------------------------------------------------------------------
def tokenize(
    pairs: list[Pair],
    tokenizer: Any,
    prompt_tokens: int,
    response_tokens: int,
    started: str | None = None,
) -> list[Example]:
    """Turn text into the token ids that all stages share; drop pairs that truncation made equal.

    A prompt's ids followed by a response's are the ids of the whole text. Raises InputError if
    fewer than two pairs are left.
    """
    chat = Chat(tokenizer, started)
    leading = leading_ids(tokenizer)
    examples = []
    dropped: Counter[str] = Counter()
    for pair in tqdm(pairs, "tokenizing", leave=False, delay=2):
        try:
            examples.append(encode_pair(pair, chat, leading, prompt_tokens, response_tokens))
        except Unusable as reason:
            dropped[str(reason)] += 1
    for reason, count in dropped.most_common():
        print(f"{count} of {len(pairs)} pairs dropped: {reason}")
    if len(examples) < 2:  # an interval takes two values
        raise InputError("too few pairs are left; raise --prompt-tokens or --response-tokens")
    return examples


def leading_ids(tokenizer: Any) -> list[int]:
    """Return what the tokenizer itself puts before a text: BOS, for some, or nothing."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    for start in range(len(whole)):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def encode_pair(
    pair: Pair, chat: Chat, leading: list[int], prompt_tokens: int, response_tokens: int
) -> Example:
    """Return a pair's ids. Raises Unusable."""

    def encode(text: str) -> list[int]:
        ids = chat.tokenizer.encode(text, add_special_tokens=False)
        # a template writes its BOS itself, and so may a text
        return ids if pair.messages or ids[: len(leading)] == leading else leading + ids

    def fits(text: str) -> bool:
        return len(encode(text)) <= prompt_tokens

    text = pair.prompt
    prompt = encode(text)
    if len(prompt) > prompt_tokens:
        text = shorten_messages(pair, chat, fits) if pair.messages else shorten_text(text, fits)
        prompt = encode(text)
    responses = []
    for response in (pair.chosen, pair.rejected):
        whole = encode(text + response)
        ids = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            # a token straddles the boundary, so a sampled response cannot begin as the text does
            ids = chat.tokenizer.encode(response, add_special_tokens=False)
        # EOS is appended unless the response is truncated: a policy must learn to stop, too
        responses.append([*ids, chat.tokenizer.eos_token_id][:response_tokens])
    if responses[0] == responses[1]:
        raise Unusable("equal once truncated")
    if len(prompt) > prompt_tokens:  # one turn alone is too long
        prompt = leading + prompt[len(prompt) - prompt_tokens + len(leading) :]
    return Example(prompt, *responses, pair)


def shorten_text(text: str, fits: Callable[[str], bool]) -> str:
    """Drop the oldest turns of a dialogue until it fits, but never the last one."""
    starts = [0] + [turn.start() for turn in re.finditer(HUMAN, text) if turn.start() > 0]
    kept = bisect.bisect_left(starts, True, key=lambda start: fits(text[start:]))
    return text[starts[min(kept, len(starts) - 1)] :]


def shorten_messages(pair: Pair, chat: Chat, fits: Callable[[str], bool]) -> str:
    """Drop the oldest turns until the template's text fits, but never the system message.

    If the last user message alone is too long, it loses its beginning. Raises Unusable.
    """
    messages = list(pair.messages)
    system = messages[:1] if messages[0]["role"] == "system" else []
    if messages == system:
        raise Unusable("the system message alone is longer than --prompt-tokens")
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"] or [len(system)]

    def rendered(start: int, cut: int = 0) -> str:
        first = messages[start] | {"content": messages[start]["content"][cut:]}
        return chat.render([*system, first, *messages[start + 1 :]], add_generation_prompt=True)

    kept = bisect.bisect_left(starts, True, key=lambda start: fits(rendered(start)))
    if kept < len(starts):
        return rendered(starts[kept])
    cuts = range(1, len(messages[starts[-1]]["content"]))
    cut = bisect.bisect_left(cuts, True, key=lambda cut: fits(rendered(starts[-1], cut)))
    if cut == len(cuts):
        raise Unusable("the chat template alone is longer than --prompt-tokens")
    return rendered(starts[-1], cuts[cut])
