"""Problems, tokenizers, examples and batches. Nothing here knows a model or a training method.

    python data.py gsm8k-aug svamp          downloads what is missing into datasets/, checks it,
                                            and says what is in it; --tokenizer DIR counts tokens

A problem is (question, steps, answer). An example is a problem laid out as token ids for a pathway;
a batch is some examples, padded on the right. Which examples make which batch is a pure function of
(seed, epoch), whatever the number of processes. Last come the helpers that all programs share.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends the program without a word while modules are imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import shutil
import sys
import unicodedata
import urllib.request
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import tiktoken
import torch
from safetensors import SafetensorError

# ------------------------------------------------------------------------------------- problems


class Problem(NamedTuple):
    question: str
    steps: list[str]
    answer: str


def normalise(question):
    """The one form of a question, in training and in evaluation: single spaces, none outside."""
    return re.sub(r"[ \t]+", " ", question).strip()


def load(name_or_path, split, seed=0, data_dir="datasets"):
    """list[Problem] of a data set.

    name_or_path: a name in BUILT_IN, split by `seed`; a name in DATASETS, whose files lie in
    data_dir/name; a directory that holds split.txt, split.jsonl or split.json (val and dev are
    names of valid, too); or a file, which is every split. .txt: `from_line`, else `from_record`,
    a JSON list or a value a line. split: train, valid or test.
    FileNotFoundError, or ValueError with file, line and field.
    """
    if name_or_path in BUILT_IN:
        return BUILT_IN[name_or_path](seed)[split]
    path, published = Path(name_or_path), None
    if name_or_path in DATASETS:
        if split not in DATASETS[name_or_path]:
            how = "; --eval_size 0 trains without" if split == "valid" else ""
            raise ValueError(f"{name_or_path} has no {split} split{how}")
        published = DATASETS[name_or_path][split]
        path = Path(data_dir) / name_or_path / published.file
        if not path.is_file():
            how = f"python data.py {name_or_path} gets it"
            how = how if published.url else BY_HAND.format(path)
            raise FileNotFoundError(f"{path}: no such file; {how}")
    elif path.is_dir():
        names = ("valid", "val", "dev") if split == "valid" else (split,)
        files = [path / f"{name}{end}" for name in names for end in (".jsonl", ".txt", ".json")]
        there = [file for file in files if file.is_file()]
        if len(there) > 1:
            raise ValueError(f"{path}: both {there[0].name} and {there[1].name}")
        path = (there or files)[0]
    elif not path.is_file():
        names = ", ".join([*BUILT_IN, *DATASETS])
        raise FileNotFoundError(f"{path}: no such file or directory, and no data set ({names})")
    return read_problems(path, published)


def read_problems(path, published=None):
    """list[Problem] of a file; ValueError where it is not the published one."""
    content, problems = read_bytes(path), []
    if published is not None:
        published.check(path, content)
    try:
        text = content.decode("utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text") from None
    read = from_line if path.suffix == ".txt" else from_record
    for where, record in records_of(path, text):
        try:
            problems.append(make_problem(*read(record)))
        except KeyError as error:
            raise ValueError(f"{where}: the field {error} is missing") from None
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{where}: {error}") from None
    if not problems:
        raise ValueError(f"{path}: empty: there is no record in it")
    if published is not None and len(problems) != published.count:
        raise ValueError(f"{path}: {len(problems)} problems, expected {published.count}")
    return problems


def records_of(path, text):
    """(place, record) of each problem in a file's text: a line of a .txt, else a JSON value."""
    if path.suffix != ".txt" and text.startswith("["):
        for number, record in enumerate(parse_json(text, f"{path}:1"), 1):
            yield f"{path}: record {number}", record
    else:
        for number, line in enumerate(text.split("\n") if text else (), 1):
            where = f"{path}:{number}"
            yield where, line if path.suffix == ".txt" else parse_json(line, where)


def make_problem(question, steps, answer):
    problem = Problem(normalise(question), [step.strip() for step in steps], answer.strip())
    texts = {"question": problem[:1], "steps": problem.steps, "answer": problem[2:]}
    for name, values in texts.items():
        if not all(values) or re.search("[\ud800-\udfff]", "".join(values)):
            raise ValueError(f"{name}: empty, or half a character (a lone surrogate)")
    return problem


STEP = re.compile(r"<<(?!\s*>>).+?>>")


def from_line(line):
    """A line of GSM8K-Aug (Deng et al. 2023) -> (question, steps, answer). ValueError."""
    question, bar, rest = line.partition("||")
    steps, hashes, answer = rest.rpartition("####")
    if not bar or not hashes or STEP.sub("", steps).strip():
        raise ValueError("not of the form 'question||<<step>> <<step>> #### answer'")
    return question, STEP.findall(steps), answer


FIELDS = {  # the field that tells whose a record is -> all that such a record may have
    "sQuestion": "sQuestion lSolutions lEquations lAlignments iIndex",  # MultiArith (Roy 2015)
    "Body": "Body Question Answer ID Equation Type",  # SVAMP (Patel et al. 2021)
    "input": "input target code",  # GSM-HARD (Gao et al. 2023)
    # GSM8K (Cobbe et al. 2021); CommonsenseQA-CoT (Shen et al. 2025); one's own; ProsQA (Hao et
    # al. 2024), with the graph behind a question
    "question": "question steps cot answer id idx idx_to_symbol edges root target neg_target",
}


def from_record(record):
    """A record -> (question, steps, answer). KeyError, TypeError or ValueError."""
    record = dict(record)
    fields = next((FIELDS[name] for name in FIELDS if name in record), FIELDS["question"])
    if unknown := record.keys() - fields.split():
        raise ValueError(f"the field {min(unknown)!r} is not known; there are {fields}")

    def text(name):
        return as_text(name, record[name])

    if "sQuestion" in record:
        (solution,) = record["lSolutions"]
        return text("sQuestion"), [], as_text("lSolutions", solution)
    if "Body" in record:
        body = text("Body").strip().removesuffix(".")
        return f"{body}. {text('Question')}", [], text("Answer")
    if "input" in record:
        return text("input"), [], text("target")
    question, steps, answer = text("question"), record.get("steps", []), text("answer")
    if not isinstance(steps, list) or (steps and "cot" in record):
        raise ValueError(f"steps is {steps!r:.60}, not a list, or there is cot, too")
    if "cot" in record:  # calculations, or the sentences of a rationale
        cot = text("cot").strip()
        steps = STEP.findall(cot) or re.split(r"(?<=[.!?])\s+", cot) if cot else []
    if "####" in answer:  # calculations within a solution
        solution, _, answer = answer.rpartition("####")
        steps = steps or STEP.findall(solution)
    return question, [as_text("steps", step) for step in steps], answer


def as_text(name, value):
    """A field's text; a number is written out: 51.0 as 51, 2e-06 as 0.000002."""
    if isinstance(value, str):
        return value
    if type(value) in (int, float) and abs(value) < math.inf:
        return str(int(value)) if value == int(value) else f"{Decimal(repr(value)):f}"
    raise ValueError(f"{name} is {value!r:.60}, not text or a number")


# -------------------------------------------------------------------------- published data sets


class Published(NamedTuple):
    """A split of a published data set."""

    file: str
    count: int  # problems (Table 7)
    digest: str  # the first 32 digits of its sha256, or of git's SHA-1; - where it is not known
    url: str  # of one commit, so that the file cannot change; '' where there is none

    def check(self, path, content):
        """ValueError unless this is the published file's content."""
        sha256 = hashlib.sha256(content).hexdigest()
        git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if self.digest not in ("-", sha256[:32], git_sha1[:32]):
            raise ValueError(f"{path}: the checksum is not that of the published file")


ADDRESSES = """
gsm8k-aug da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761/data/gsm8k
gsm8k openai/grade-school-math/b0bb162abedc65e1fdd8e93ed090fd7598ee68bc/grade_school_math/data
gsm-hard reasoning-machines/pal/9a51009fc45ab99b35955b49d89ba6091a904036/datasets
svamp arkilpatel/SVAMP/7827fb803c3f6b017086f75024515b15bf31900f
multiarith kojima-takeshi188/zero_shot_cot/2824685e25809779dbd36900a69825068e9f51ef/dataset
prosqa facebookresearch/coconut/f248913ad54b0eb08480f491618c8dde012fb167/data
commonsenseqa-cot J1mL1/causal-latent-cot/4f2f11fc2a0ed4281f48144e5bfb77c382885bb6/data
"""  # repository, commit and folder on GitHub
TABLE = """
gsm8k-aug          train  train.txt                  385620  0a3909a9e7d8d2f7ad6b8c7b5608aa74
gsm8k-aug          valid  valid.txt                     500  04f9bddfe8ac4846571b1e2b612b289c
gsm8k-aug          test   test.txt                     1319  e464efa2713fbcf423bdbfb482c543a6
gsm8k              train  train.jsonl                  7473  17f347dc51477c50d4efb83959dbb7c5
gsm8k              test   test.jsonl                   1319  3730d312f6e3440559ace48831e51066
gsm-hard           test   gsmhardv2.jsonl              1319  2032b0188a49ac0ec38cbe1e695e7d62
svamp              test   SVAMP.json                   1000  5be77703a6d891ae476d7c082787ad36
multiarith         test   MultiArith/MultiArith.json    600  dc9db1b6cc68b1ecc2dec830d15aaf8c
prosqa             train  prosqa_train.json           17886  cf26632b9d3f4e812966563eed769b1c
prosqa             valid  prosqa_valid.json             300  c74e0de24f1e90ec48b1a993e6458a7b
prosqa             test   prosqa_test.json              500  82ddc0afe6ee30eb31bb16fa208e293e
commonsenseqa-cot  train  train.jsonl                  8096  -
commonsenseqa-cot  test   commonsenseqa_local.jsonl    1221  adc4fe1f91d671f4c38025e688c787c8
"""
DATASETS = {}  # name -> {split: Published}
for name, split, file, count, digest in map(str.split, TABLE.strip().splitlines()):
    folder = dict(map(str.split, ADDRESSES.strip().splitlines()))[name]
    url = f"https://raw.githubusercontent.com/{folder}/{file}"
    if (name, split) == ("gsm8k-aug", "train"):  # in Git's large file storage
        url = url.replace("//raw.", "//media.").replace(".com/", ".com/media/")
    url = "" if digest == "-" else url
    DATASETS.setdefault(name, {})[split] = Published(Path(file).name, int(count), digest, url)
BY_HAND = (  # what is not to be had over plain HTTP
    'with the package `datasets`, this writes it: python -c "from datasets import load_dataset; '
    "load_dataset('zen-E/CommonsenseQA-GPT4omini', split='train').to_json('{}')\""
)


def fetch(name, data_dir):
    """Downloads what is missing, and has an address, of a published data set into data_dir/name. A
    file appears under its name when it is whole and right. ValueError or OSError."""
    for published in DATASETS[name].values():
        path = Path(data_dir) / name / published.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or not (url := published.url):
            continue
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{url}: {error}; the same command tries it again") from None
        published.check(path, content)
        write_bytes(path, content)


def stats(problems, tokenizer=None):
    """What there is to know of problems before training on them, as text."""
    steps = [len(problem.steps) for problem in problems]
    kinds = Counter(answer_kind(problem.answer) for problem in problems)
    empty = sum(n <= 1 for n in steps)
    counts = dict(sorted(Counter(steps).items()))
    text = f"{len(problems)} problems, answers {dict(kinds)}, numbers of steps {counts}"
    text += f", {steps.count(0)} with an empty CoT, {empty} without the last step"
    for name in Problem._fields if tokenizer else ():
        values = (getattr(problem, name) for problem in problems)
        texts = (value if isinstance(value, str) else " ".join(value) for value in values)
        lengths = [len(tokenizer.encode(text, bos=False, eos=False)) for text in texts]
        text += f"\ntokens of the {name}: mean {np.mean(lengths):.1f}, longest {max(lengths)}"
    return text


# --------------------------------------------------------------------------- the built-in tasks

# Two-step word problems whose second step is a remainder, so that the answer tells nothing of how
# to come by it: `sam has 7 pens gets 5 packs of 4 ?` -> `<<7+5=12>> <<12%4=0>>` -> `0`.
NAMES = ("sam", "ann", "bob", "eve")
ITEMS = ("pens", "eggs", "nuts", "caps")
VERBS = {"+": ("buys", "finds", "gets"), "-": ("loses", "sells", "eats")}
DEMO_WORDS = "<bos> <eos> <st> Answer : << >> + - % = ? has packs of".split()
DEMO_WORDS += [*NAMES, *ITEMS, *VERBS["+"], *VERBS["-"], *map(str, range(30))]
MIN_OCCURRENCES = 4  # in training, of every single fact of a held-out problem
HELD_OUT = {"test": 500, "valid": 200}


def demo_problems(seed):
    """The 2,520 problems (x op y, in packs of p) with one wording each: {split: list[Problem]}.

    The splits share no arithmetic content, but each fact of a held-out problem (x op y, and v % p)
    occurs in training: what is held out is the composition. `seed` draws wording and split.
    """
    rng = np.random.default_rng(seed)
    contents = itertools.product(range(1, 21), "+-", range(1, 10), range(2, 10))
    contents = [(x, op, y, p) for x, op, y, p in contents if op == "+" or y < x]
    contents = [contents[i] for i in rng.permutation(len(contents))]
    facts = [((x, op, y), (x + y if op == "+" else x - y, p)) for x, op, y, p in contents]
    count = Counter(fact for pair in facts for fact in pair)
    splits = {"train": [], "valid": [], "test": []}
    for pair in facts:
        (x, op, y), (value, p) = pair
        split = next((name for name, n in HELD_OUT.items() if len(splits[name]) < n), "train")
        if split != "train" and all(count[fact] > MIN_OCCURRENCES for fact in pair):
            count.subtract(pair)
        else:
            split = "train"
        name, item, verb = (str(rng.choice(words)) for words in (NAMES, ITEMS, VERBS[op]))
        question = f"{name} has {x} {item} {verb} {y} packs of {p} ?"
        steps = [f"<<{x}{op}{y}={value}>>", f"<<{value}%{p}={value % p}>>"]
        splits[split].append(Problem(question, steps, str(value % p)))
    return splits


def demo_chance(problems):
    """The accuracy of guessing a remainder below p, the question's last number."""
    return float(np.mean([1 / int(problem.question.split()[-2]) for problem in problems]))


# Each is a token of its own.
PEOPLE = "Sam Ann Bob Max Tom Ben Jim Dan Kim Lee Pat Ray Jack Mary Paul Anna John Nick".split()
PEOPLE += "Mark Alex Adam Luke".split()


def call_problems(seed):
    """2,200 problems in plain English, who has news after three calls: {split: list[Problem]}.

    Seven people call each other in a ring. All that is needed is in the question, and no four
    people who pass the news on in a held-out problem do so in training. `seed` draws the
    problems."""
    rng, splits, held_out = np.random.default_rng(seed), {}, set()
    for split, n in (HELD_OUT | {"train": 1500}).items():
        problems = splits[split] = []
        while len(problems) < n:
            ring = [PEOPLE[i] for i in rng.permutation(len(PEOPLE))[:7]]
            calls = [f"{a} calls {b}" for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
            chain = tuple(ring[:4])
            if split == "train" and chain in held_out:
                continue
            if split != "train":
                held_out.add(chain)
            told = ", ".join(calls[i] for i in rng.permutation(7))
            question = f"Today {told}. {ring[0]} has news. Who has it after three calls?"
            problems.append(Problem(question, [f"<<{call}>>" for call in calls[:3]], ring[3]))
    return splits


BUILT_IN = {"demo": functools.cache(demo_problems), "calls": functools.cache(call_problems)}


def is_single_file(name_or_path):
    """Whether `load` reads one file for every split."""
    names = BUILT_IN.keys() | DATASETS.keys()
    return name_or_path not in names and Path(name_or_path).is_file()


# -------------------------------------------------------------------------------------- scoring

NUMBER = re.compile(
    r"(?:(?<![\d).])-)?"  # a minus behind a digit or a bracket is an operator
    r"(?:\d+ (?=\d+/\d))?"  # the whole part of 2 1/2
    r"(?:\d+(?:\.\d*)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+)?"
    r"(?: ?/ ?\d+)?"
)
LETTER = re.compile(
    r"(?:.*\b(?i:answer is|answer):?)?\W*([A-Z])"
    r"(?:\W*|(?:\s*[.:)\n]|\s+-\s)(?!.*\b[A-Z]\b).*)",  # and its choice, which names no other
    re.DOTALL,
)


def plain_number(text):
    """Without currency signs and the commas of thousands; other signs of a minus are one."""
    text = re.sub("[\u2212\u2013]", "-", text)
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[$€£¥]", "", text)


def parse_number(text):
    """The last number in a text as a float, None where there is none.

    Read are 1,234 and $1,234. (1234), -$5 (-5), .5 and 5. (0.5, 5), 1/2 and 2 1/2 (0.5, 2.5), 1e3;
    10-5 is 5. Words for numbers are not read, nor units: 50% is 50.
    """
    found = NUMBER.findall(plain_number(text))
    if not found:
        return None
    value, _, denominator = found[-1].lstrip("-").partition("/")
    whole, _, numerator = value.strip().rpartition(" ")
    if denominator and float(denominator) == 0:
        return None
    value = float(whole or 0) + float(numerator) / float(denominator or 1)
    return -value if found[-1].startswith("-") else value


def answer_kind(gold):
    """What a gold answer is: number, letter (of a choice) or sentence."""
    if re.fullmatch(r"[A-Z]", gold):
        return "letter"
    return "number" if NUMBER.fullmatch(plain_number(gold).rstrip(" %")) else "sentence"


def score(text, gold):
    """(exact match, numeric match). Exact: the text is the gold text, outer space aside. Numeric,
    by the kind of the gold answer:

    number    the last number is the same; to a relative 1e-6 where the gold one is not whole, but
              no more than 0.01 (GSM-HARD has gold answers of 17 digits)
    letter    the text is the letter, perhaps behind `the answer is`, or before a dot or a colon
    sentence  the words are the same whatever their case and final dot

    What cannot be read is wrong.
    """
    text, gold = text.strip(), gold.strip()
    exact, kind = text == gold, answer_kind(gold)
    if kind == "letter":
        found = LETTER.fullmatch(text)
        return exact, found is not None and found[1] == gold
    if kind == "sentence":
        return exact, text.lower().rstrip(". \n").split() == gold.lower().rstrip(". \n").split()
    want, got = parse_number(gold), parse_number(text)
    if exact or got is None or want is None or math.isinf(want):
        return exact, exact
    tolerance = 0 if want.is_integer() else min(1e-6 * abs(want), 0.01)
    return exact, abs(got - want) <= tolerance


# ----------------------------------------------------------------------------------- tokenizers

# How a byte-level BPE cuts a text before it merges.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# StarCoder's and SmolLM2's: single digits are cut out first, and the rest as in GPT-2.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
RESERVED = ("<st>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
MAX_CHARACTERS = 500_000  # of a text: tiktoken's patterns break down at a million blanks in a row


class Tokenizer:
    """Text to ids and back.

    ids: of all tokens; added: {name: id} of those beside the vocabulary, of which only `words` are
    read in a text; size: number of ids; bos_id: None where there is none; reserved: ids that may
    stand for <st> and the like; files: {name: bytes}, saved with a run.
    """

    prefix_space = False  # is a blank put before a text?

    def __init__(self, files, ids, tokens, bos, *usual):
        """tokens: the added ones, see `added_tokens`; bos: the name of what is put first, or None;
        usual: of the end token, where tokenizer_config.json has none."""
        if sorted(ids) != list(range(len(ids))):
            raise ValueError(f"the ids of the {len(ids)} tokens are not 0 to {len(ids) - 1}")
        config = json_of(files, "tokenizer_config.json")
        added = {token["content"]: token["id"] for token in tokens}
        eos = config.get("eos_token") or next((name for name in usual if name in added), None)
        eos, first = name_of(eos), name_of(config.get("bos_token"))
        if eos not in added:
            raise ValueError(f"the end token {eos!r} (tokenizer_config.json, {usual}) is not there")
        if config.get("add_bos_token") and bos is None:
            raise ValueError("tokenizer_config.json: add_bos_token is not supported here")
        if config.get("add_prefix_space") not in (None, self.prefix_space):
            raise ValueError("tokenizer_config.json: this add_prefix_space is not supported here")
        self.files, self.size, self.added, self.eos_id = files, len(ids), added, added[eos]
        self.tokenizer_json = json_of(files, "tokenizer.json") | {"added_tokens": tokens}
        self.bos_id = None if config.get("add_bos_token") is False else added.get(bos)
        if self.bos_id is not None and first not in (None, bos):
            raise ValueError(f"bos_token {first!r} (tokenizer_config.json) is not {bos!r}")
        self.reserved = tuple(added[name] for name in RESERVED if name in added)
        words = [token["content"] for token in tokens if not token["special"]]
        longest_first = sorted(filter(None, words), key=len, reverse=True)
        self.words = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.outside = {i: name for name, i in added.items()}  # what decode_ids does not know
        parts = (f"{name} ".encode() + content for name, content in sorted(files.items()))
        self.digest = hashlib.sha256(b"\0".join(parts)).hexdigest()

    @classmethod
    def from_pretrained(cls, directory):
        """The tokenizer of a directory: of the first of READERS whose files are there.

        FileNotFoundError or ValueError, naming the file: a tokenizer that would give other ids here
        than to its authors is refused."""
        directory = Path(directory)
        for names, read in READERS.items():
            if all((directory / name).is_file() for name in names):
                paths = [directory / name for name in (*names, *BESIDE)]
                files = {path.name: read_bytes(path) for path in paths if path.is_file()}
                try:
                    return read(files)
                except KeyError as error:
                    raise ValueError(f"{paths[0]}: the field {error} is missing") from None
                except (ValueError, TypeError, AttributeError, IndexError) as error:
                    raise ValueError(f"{paths[0]}: {error}") from None
        names = ", nor ".join(" with ".join(names) for names in READERS)
        raise FileNotFoundError(f"{directory}: no tokenizer: {names}")

    def save(self, directory):
        for name, content in self.files.items():
            write_bytes(Path(directory) / name, content)

    def encode(self, text, *, bos, eos, continued=False):
        """list of ids. bos and eos have no default, so that neither is forgotten nor doubled; where
        there is no BOS none is put. continued: other text stands right before this.

        ValueError for a text that has no ids here, or holds half a character, or is too long."""
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"a text of {len(text)} characters, at most {MAX_CHARACTERS} are read")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"half a character (a lone surrogate) in {text[:60]!r}")
        ids = [self.bos_id] * (bos and self.bos_id is not None)
        for i, part in enumerate(self.words.split(text)):  # text, word, text, word, ..., text
            ids += [self.added[part]] if i % 2 else self.encode_text(part, continued or i > 0)
        return ids + [self.eos_id] * eos

    def decode(self, ids):
        """The text of ids. A model may have more ids than its tokenizer: they read as U+FFFD."""
        text, run = "", []
        for i in ids:
            if i < self.size and i not in self.outside:
                run.append(i)
            else:
                text += self.decode_ids(run, bool(text)) + self.outside.get(i, "\ufffd")
                run = []
        return text + self.decode_ids(run, bool(text))

    def export(self, with_st):
        """({file name: bytes}, id of <st>): the tokenizer's files, with <st> in tokenizer.json, as
        Hugging Face's libraries read them. with_st: the first reserved token by another name, or a
        new one. ValueError where there is no tokenizer.json."""
        if "model" not in self.tokenizer_json:
            raise ValueError("the export needs tokenizer.json beside the base model's tokenizer")
        st_id = self.reserved[0] if self.reserved else self.size
        added = {token["id"]: token for token in self.tokenizer_json["added_tokens"]}
        if with_st:
            added[st_id] = added_token(st_id, "<st>")
        raw = self.tokenizer_json | {"added_tokens": [added[i] for i in sorted(added)]}
        names = {i: token["content"] for i, token in added.items()}
        bos, eos = names.get(self.bos_id), names[self.eos_id]
        raw["post_processor"] = put_first(bos, self.bos_id) if bos else None
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
        config |= {"bos_token": bos, "eos_token": eos, "pad_token": eos}
        config |= {"additional_special_tokens": ["<st>"] * with_st}
        config |= {"clean_up_tokenization_spaces": False}
        written = {"tokenizer.json": raw, "tokenizer_config.json": config}
        written = {name: json.dumps(content).encode() for name, content in written.items()}
        return self.files | written, st_id


class Words(Tokenizer):
    """words.json, the built-in task's list: a token is a word, a number or a sign. Blanks are no
    tokens; a text is written with one between words, and none beside a sign but between steps."""

    token = r"<<|>>|\d+|[^\W\d]+|[^\w\s]"
    blank_at_sign = r"(?!(?<=>>) <<)(?: (?=[-+%=:<>])|(?<=[-+%=:<>]) )"

    def __init__(self, files):
        self.list = json_of(files, "words.json")
        if not isinstance(self.list, list) or not all(isinstance(w, str) for w in self.list):
            raise ValueError("words.json is not a list of texts")
        self.ids = {word: i for i, word in enumerate(self.list)}
        special = [word for word in ("<bos>", "<eos>", "<st>") if word in self.ids]
        tokens = [added_token(self.ids[word], word) for word in special]
        super().__init__(files, range(len(self.list)), tokens, "<bos>", "<eos>")
        self.outside = {}
        parts = self.token, self.blank_at_sign + "|^ ", tokens, self.ids
        self.tokenizer_json = json.loads(WORDS_JSON % tuple(map(json.dumps, parts)))

    def encode_text(self, text, continued):
        words = re.findall(self.token, text)
        if unknown := [word for word in words if word not in self.ids]:
            raise ValueError(f"{unknown[0]!r} is not in the vocabulary, words.json")
        return [self.ids[word] for word in words]

    def decode_ids(self, ids, continued):
        return re.sub(self.blank_at_sign, "", " ".join(self.list[i] for i in ids))


# The same for Hugging Face's tokenizers: words are what the pattern finds; they are joined with a
# blank before each, of which some are taken away.
WORDS_JSON = """{"version": "1.0", "normalizer": null,
"pre_tokenizer": {"type": "Split", "pattern": {"Regex": %s}, "behavior": "Removed", "invert": true},
"decoder": {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"Regex": "^"}, "content": " "}, {"type": "Fuse"},
    {"type": "Replace", "pattern": {"Regex": %s}, "content": ""}]},
"added_tokens": %s, "model": {"type": "WordLevel", "vocab": %s, "unk_token": "<unk>"}}"""


def demo_tokenizer():
    return Words({"words.json": json.dumps(DEMO_WORDS).encode()})


class BytePair(Tokenizer):
    """A byte-level BPE on tiktoken. ranks: {bytes: id}; nfc: a text is brought into Unicode's
    composed form first; tokens: the added ones, see `added_tokens`."""

    def __init__(self, files, pattern, ranks, tokens, nfc, bos, *usual_eos):
        ids = [*ranks.values(), *(token["id"] for token in tokens)]
        super().__init__(files, ids, tokens, bos, *usual_eos)
        self.nfc, self.lacks = nfc, {byte for byte in range(256) if bytes([byte]) not in ranks}
        how = dict(pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.encoding = tiktoken.Encoding("bpe", **how)

    def encode_text(self, text, continued):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.lacks and (odd := self.lacks.intersection(text.encode())):
            raise ValueError(f"the vocabulary lacks the byte {min(odd)} of {text[:60]!r}")
        return self.encoding.encode_ordinary(text)

    def decode_ids(self, ids, continued):
        return self.encoding.decode(ids)


class SentencePiece(Tokenizer):
    """A SentencePiece model. It puts a blank before a text, but not before one that continues."""

    prefix_space = True

    def __init__(self, files):
        proto = files["tokenizer.model"]
        try:
            # The added bytes are a second normalizer_spec, {add_dummy_prefix: false}: protobuf
            # merges it into the first.
            processor = sentencepiece.SentencePieceProcessor
            self.model = processor(model_proto=proto)
            self.continued_model = processor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise ValueError("neither Llama 3's ranks nor a SentencePiece model") from None
        model, size = self.model, self.model.vocab_size()
        special = [i for i in range(size) if model.is_control(i) or model.is_unknown(i)]
        known = [added_token(i, model.id_to_piece(i)) for i in special]
        tokens = added_tokens(files, known)
        raw, config = json_of(files, "tokenizer.json"), json_of(files, "tokenizer_config.json")
        vocab, pieces = raw.get("model", {}).get("vocab"), map(model.id_to_piece, range(size))
        if isinstance(vocab, dict) and any(vocab.get(p) != i for i, p in enumerate(pieces)):
            raise ValueError("tokenizer.json has another vocabulary")
        legacy = raw.get("normalizer") or config.get("legacy")  # blanks behind added words, too
        if legacy and not all(token["special"] for token in tokens):
            raise ValueError("added words beside `normalizer` or `legacy` are not supported")
        names = {token["id"]: token["content"] for token in tokens}
        bos, eos = (names.get(i) for i in (model.bos_id(), model.eos_id()))
        super().__init__(files, {*range(size), *names}, tokens, bos, eos)
        self.outside = {i: name for i, name in names.items() if i >= size}
        # In the export a blank stands before the text alone, as here.
        blank = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
        self.tokenizer_json |= {"normalizer": None, "pre_tokenizer": blank | {"split": False}}

    def encode_text(self, text, continued):
        return (self.continued_model if continued else self.model).encode(text)

    def decode_ids(self, ids, continued):
        return (self.continued_model if continued else self.model).decode(ids)

    def export(self, with_st):
        if self.model.normalize("²  a\n") != "\u2581²\u2581\u2581a\n":
            raise ValueError("tokenizer.model changes texts before it cuts them: no export")
        return super().export(with_st)


def json_of(files, name):
    return parse_json(files.get(name, b"{}"), name)


def name_of(token):
    return token["content"] if isinstance(token, dict) else token


def added_token(i, name, special=True):
    """An added token as in a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, "special": special} | flags


def put_first(name, i):
    """The post_processor of a tokenizer.json that puts one token before a text."""
    kinds = ("SpecialToken", name), ("Sequence", "A"), ("Sequence", "B")
    token, *texts = ({kind: {"id": part, "type_id": 0}} for kind, part in kinds)
    special = {name: {"id": name, "ids": [i], "tokens": [name]}}
    single = {"type": "TemplateProcessing", "single": [token, texts[0]]}
    return single | {"pair": [token, *texts], "special_tokens": special}


def added_tokens(files, known=()):
    """The tokens beside the vocabulary, in the order of their ids, as all files together say:
    tokenizer.json, tokenizer_config.json, added_tokens.json, and those that are `known` without.
    ValueError where they contradict each other, or one is not read as it would be elsewhere."""
    config, tokens = json_of(files, "tokenizer_config.json"), {}
    names = [config.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")]
    special = {name_of(name) for name in names}
    found = [*json_of(files, "tokenizer.json").get("added_tokens", ())]
    decoder = config.get("added_tokens_decoder", {})
    found += [added_token(int(i), "") | token | {"id": int(i)} for i, token in decoder.items()]
    named = json_of(files, "added_tokens.json")
    found += [added_token(i, name, name in special) for name, i in named.items()]
    for token in found:
        name = tokens.setdefault(token["id"], token)["content"]
        if name != token["content"]:
            raise ValueError(f"the id {token['id']} is of both {name!r} and {token['content']!r}")
    tokens = {token["id"]: token for token in known} | tokens
    if len({token["content"] for token in tokens.values()}) < len(tokens):
        raise ValueError("an added token has two ids")
    for token in tokens.values():
        odd = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if odd and not token["special"]:
            raise ValueError(f"the added token {token['content']!r} has {odd[0]}: not supported")
    return [tokens[i] for i in sorted(tokens)]


def read_tokenizer_model(files):
    """Llama 3's tokenizer.model, lines `base64(token) rank` and behind them 256 special tokens; or
    a SentencePiece model."""
    lines = files["tokenizer.model"].splitlines()
    if not lines or not re.fullmatch(rb"[\w+/=]+ \d+", lines[0]):
        return SentencePiece(files)
    pairs = [line.split() for line in lines]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if len(ranks) != 128_000:
        raise ValueError(f"{len(ranks)} ranks, not Llama 3's: their pattern is not known")
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    special = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 10: "python_tag"}
    special |= {6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id"}
    names = [f"<|{special.get(i) or next(reserved)}|>" for i in range(256)]
    known = [added_token(len(ranks) + i, name) for i, name in enumerate(names)]
    tokens = added_tokens(files, known)
    return BytePair(files, LLAMA3_PATTERN, ranks, tokens, False, names[0], names[1])


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PRE_TOKENIZERS = {  # a pattern -> the pre_tokenizer of a tokenizer.json that cuts a text by it
    pattern: [SPLIT | {"pattern": {"Regex": pattern}}, BYTE_LEVEL | {"use_regex": False}]
    for pattern in (LLAMA3_PATTERN, QWEN2_PATTERN)
}
PRE_TOKENIZERS |= {GPT2_PATTERN: [BYTE_LEVEL]}
PRE_TOKENIZERS |= {DIGITS_PATTERN: [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
BPE_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def read_tokenizer_json(files, raw=None):
    """Hugging Face's tokenizer.json, where it is a byte-level BPE."""
    raw = raw or json_of(files, "tokenizer.json")
    model, normalizer, post = raw["model"], raw["normalizer"] or {}, raw["post_processor"] or {}
    if model.get("byte_fallback"):
        raise ValueError("model.byte_fallback: SentencePiece's; its tokenizer.model is needed here")
    odd = [f"model.type {model['type']}"] if model.get("type", "BPE") != "BPE" else []
    odd += [f"model.{name}" for name in BPE_OPTIONS if model.get(name)]
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    odd += [f"normalizer {step['type']}" for step in steps if step["type"] != "NFC"]
    cut = raw["pre_tokenizer"] or {}
    cut = cut.get("pretokenizers", [cut])
    cut = [{name: step[name] for name in step if name != "trim_offsets"} for step in cut]
    cut[-1] = {"use_regex": True} | cut[-1]
    pattern = next((p for p, known in PRE_TOKENIZERS.items() if known == cut), None)
    odd += [f"pre_tokenizer {json.dumps(cut)}"] if pattern is None else []
    processors = post.get("processors", [post] if post else [])
    parts = [part for step in processors for part in step.get("single", ())]
    first = [part["SpecialToken"]["id"] for part in parts if "SpecialToken" in part]
    kinds = {step["type"] for step in processors} - {"ByteLevel", "TemplateProcessing"}
    if kinds or len(first) > 1 or (first and "SpecialToken" not in parts[0]):
        odd.append(f"post_processor {', '.join([*kinds, *first])}")
    if odd:
        raise ValueError(f"{odd[0]} is not supported")
    tokens = added_tokens(files, raw["added_tokens"])
    added = {token["content"] for token in tokens}
    if steps and any(t["normalized"] and not t["content"].isascii() for t in tokens):
        raise ValueError("an added token that is not ASCII is normalized: not supported")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    usual = *(first or [None]), "<|end_of_text|>", "<|endoftext|>"
    return BytePair(files, pattern, byte_ranks(vocab, merges), tokens, bool(steps), *usual)


def read_vocab_and_merges(files):
    """GPT-2's or Qwen2's vocab.json and merges.txt. GPT-2's vocabulary ends in its end token; the
    special tokens of Qwen2 are in tokenizer_config.json. What they say in a tokenizer.json."""
    vocab, end_token = json_of(files, "vocab.json"), "<|endoftext|>"
    config = json_of(files, "tokenizer_config.json")
    family = config.get("tokenizer_class") or ("GPT2" if end_token in vocab else "Qwen2")
    qwen2 = family.startswith("Qwen2")
    if not family.startswith(("GPT2", "Qwen2")):
        raise ValueError(f"tokenizer_config.json: {family} is not supported")
    lines = files["merges.txt"].decode().splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    pattern = QWEN2_PATTERN if qwen2 else GPT2_PATTERN
    raw = {
        "model": {"vocab": vocab, "merges": merges},
        "normalizer": {"type": "NFC"} if qwen2 else None,
        "pre_tokenizer": {"pretokenizers": PRE_TOKENIZERS[pattern]},
        "added_tokens": [added_token(vocab[end_token], end_token)] if end_token in vocab else [],
        "post_processor": None,
    }
    return read_tokenizer_json(files, raw)


def byte_ranks(vocab, merges):
    """{bytes: id} of tokens that spell bytes as printable characters.

    tiktoken merges the two neighbours whose union has the lowest id; Hugging Face goes through the
    merges in their order. That is the same for vocabularies made by merging, as the published ones:
    the ids of the unions never fall, every token is a byte or a union, and what tiktoken makes of a
    union's bytes ends with a merge that is listed. ValueError otherwise."""
    byte_of, last, made = byte_spelling(), -1, set()
    for pair in merges:
        union = "".join(pair)
        if len(pair) != 2 or not {*pair, union} <= vocab.keys() or vocab[union] < last:
            raise ValueError(f"the merge {' '.join(pair)!r} is not in the order of the tokens' ids")
        last = vocab[union]
        made.add(union)
    for token in vocab:
        if not set(token) <= byte_of.keys() or (len(token) > 1 and token not in made):
            raise ValueError(f"the token {token!r} is not spelled in bytes, or made by no merge")
    listed = set(merges)
    for token in map("".join, merges[-4096:]):  # where merges are added to another's, they are here
        parts = list(token)
        while len(parts) > 2:
            ids = [vocab.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
            i = ids.index(min(ids))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if tuple(parts) not in listed:
            raise ValueError(f"the merges do not make the token {token!r} in the order of ids")
    return {bytes(map(byte_of.get, token)): i for token, i in vocab.items()}


def byte_spelling():
    """Character -> byte as GPT-2 spells bytes: printable ones as themselves, others from 256 on."""
    others = [i for i in range(256) if not chr(i).isprintable() or chr(i) == " "]
    return {chr(256 + others.index(i) if i in others else i): i for i in range(256)}


READERS = {  # the files of a directory -> how they are read
    ("words.json",): Words,
    ("tokenizer.model",): read_tokenizer_model,
    ("tokenizer.json",): read_tokenizer_json,
    ("vocab.json", "merges.txt"): read_vocab_and_merges,
    ("original/tokenizer.model",): read_tokenizer_model,
}
BESIDE = ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")


# -------------------------------------------------------------------------- examples and batches


class Example(NamedTuple):
    """One problem as a pathway sees it. ids[z_start:y_start] is what is learned of Z, ids[y_start:]
    is Y, so that z_N, the separator's last token, is at y_start - 1. ids[latent_start:][:n_latents]
    stand for continuous thoughts, which are no tokens. one_mean: see `divisors`."""

    ids: np.ndarray  # [T]
    z_start: int
    y_start: int
    latent_start: int
    n_latents: int
    one_mean: bool = False

    def divisors(self):
        """[T]: what each token's loss is divided by, N in Z and M in Y (equations 1 and 2), or
        N + M in both where there is one mean; 0 where nothing is learned."""
        N, M = self.y_start - self.z_start, len(self.ids) - self.y_start
        z, y = (N + M, N + M) if self.one_mean else (N, M)
        return np.repeat((0, z, y), (self.z_start, N, M))


class Batch(NamedTuple):
    """B examples padded on the right to T tokens, and the K tokens that are learned."""

    ids: torch.Tensor  # [B, T]
    target_row: torch.Tensor  # [K]: ids[target_row, target_col] is learned ...
    target_col: torch.Tensor  # [K]
    weights: torch.Tensor  # [K]: ... and its loss counts so much
    z_n: torch.Tensor  # [B], index of z_N
    lengths: torch.Tensor  # [B]
    latent_start: torch.Tensor  # [B], index of the first continuous thought ...
    n_latents: int  # ... and how many there are, in every example
    first_needed: int  # the first index whose hidden state says something of a learned token

    def to(self, device):
        return Batch(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in self))


def collate(examples, pad_id):
    """list[Example] -> Batch, in whose loss every example weighs 1/B. Attention is causal and no
    padding is learned, so that no mask is needed."""
    B, T = len(examples), max(len(example.ids) for example in examples)
    ids = np.full((B, T), pad_id, dtype=np.int64)
    weights = np.zeros((B, T), dtype=np.float32)
    for i, example in enumerate(examples):
        ids[i, : len(example.ids)] = example.ids
        divisors = example.divisors()
        weights[i, : len(divisors)] = (divisors > 0) / divisors.clip(min=1) / B
    row, col = weights.nonzero()
    per_example = [(e.y_start - 1, len(e.ids), e.latent_start) for e in examples]
    arrays = ids, row, col, weights[row, col], *np.array(per_example).T
    first_needed = min(example.z_start for example in examples) - 1
    return Batch(*map(torch.tensor, arrays), examples[0].n_latents, first_needed)


WINDOW, GROUP = 256, 16  # batches: sorted by length within a window, and again within a group


def epoch_batches(lengths, batch_size, seed, epoch):
    """The global batches of an epoch: a list of index arrays [batch_size], a pure function of the
    arguments.

    lengths [N, P]: the tokens of each problem in each of P pathways, N >= batch_size. The problems
    are shuffled, windows sorted by the length in the last pathway, groups in them by that in the
    first, cut into batches, and these shuffled: a batch is of about one length in every pathway, so
    that little is padding. What does not fill a batch waits for another epoch.
    """
    rng, lengths = np.random.default_rng((seed, epoch)), np.asarray(lengths)
    order = rng.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    batches = []
    for window in np.split(order, range(WINDOW * batch_size, len(order), WINDOW * batch_size)):
        window = window[np.argsort(lengths[window, -1], kind="stable")]
        for group in np.split(window, range(GROUP * batch_size, len(window), GROUP * batch_size)):
            group = group[np.argsort(lengths[group, 0], kind="stable")]
            batches += np.split(group, len(group) // batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def token_text(tokenizer, token):
    return printable(tokenizer.decode([token])).replace(" ", "_")


def picture(example, tokenizer, width=100):
    """An example as text: each token, and below it what it weighs in the loss (. where nothing)."""
    lines, top, bottom, divisors = [], "", "", example.divisors()
    for i, token in enumerate(example.ids.tolist()):
        thought = i - example.latent_start
        if example.n_latents and -1 <= thought <= example.n_latents:
            text = {-1: "<bot>", example.n_latents: "<eot>"}.get(thought, "<thought>")
        elif token in tokenizer.reserved or token >= tokenizer.size:
            text = "<st>"
        else:
            text = token_text(tokenizer, token)
        weight = f"1/{divisors[i]}" if divisors[i] else "."
        size = max(len(text), len(weight)) + 1
        if len(top) + size > width:
            lines += [top.rstrip(), bottom.rstrip()]
            top = bottom = ""
        top, bottom = top + text.ljust(size), bottom + weight.ljust(size)
    return "\n".join([*lines, top.rstrip(), bottom.rstrip()])


# -------------------------------------------------------------------- options, files and errors


def option(default, text, choices=None, low=0, high=math.inf, group=None):
    """A field of a dataclass of options: its help text, and its limits. choices: names in one
    string, a dictionary, or a function that returns one. group: what it and those behind it are."""
    limits = dict(help=text, choices=choices, low=low, high=high, group=group)
    return dataclasses.field(default=default, metadata=limits)


def choices_of(field):
    choices = field.metadata["choices"]
    choices = choices() if callable(choices) else choices
    return choices.split(" ") if isinstance(choices, str) else choices


AS_WRITTEN = argparse.RawDescriptionHelpFormatter


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the options)")


def parse_options(cls, argv, doc="", defaults=()):
    """An instance of a dataclass of `option`s, from the command line. ValueError."""
    how = dict(description=doc, formatter_class=AS_WRITTEN, usage="%(prog)s [OPTIONS]")
    group = parser = Parser(**how, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        default = dict(defaults).get(field.name, field.default)
        how = dict(default=default, help=f"{field.metadata['help']} (default: {default!r})")
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif field.type is tuple:
            how["nargs"] = "*"
        elif field.type == (str | None):  # a text that may be left out
            how |= {"nargs": "?", "const": ""}
        else:
            how |= {"type": field.type, "choices": choices_of(field)}
        group.add_argument(f"--{field.name}", **how)
    values = vars(parser.parse_args(argv))
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return check_options(cls(**values))


def check_options(options):
    """The options themselves; ValueError where one is of another type or beyond its limits."""
    for field in dataclasses.fields(options):
        value, limits = getattr(options, field.name), field.metadata
        types = (int, float) if field.type is float else field.type
        if not isinstance(value, types) or (isinstance(value, bool) and field.type is not bool):
            raise ValueError(f"--{field.name} {value!r}: not a {field.type}")
        if choices_of(field) and value not in choices_of(field):
            raise ValueError(f"--{field.name} {value!r}: there are {', '.join(choices_of(field))}")
        if field.type in (int, float) and not limits["low"] <= value <= min(limits["high"], 2**62):
            raise ValueError(f"--{field.name} {value}: from {limits['low']} to {limits['high']}")
    return options


def read_bytes(path):
    """The content of a file. FileNotFoundError; ValueError for a Git LFS pointer."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = Path(path).read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file")
    return content


def parse_json(text, where):
    """The value of a JSON text; ValueError, with `where`, also for a field that is there twice."""

    def unique(pairs):
        if len(fields := dict(pairs)) < len(pairs):
            raise ValueError("a field is there twice")
        return fields

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None


def read_json(path):
    return parse_json(read_bytes(path), path)


@contextlib.contextmanager
def replacing(path):
    """A name beside `path`, for a file to be written there; it takes the place of `path` once it is
    on the disk. A reader sees the old file or the new one, and a failure leaves the old one."""
    temporary = Path(f"{path}.tmp")
    temporary.unlink(missing_ok=True)  # it may be a link to elsewhere
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors' files are for their owner alone
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some file systems cannot do this to a directory
        sync(Path(path).parent)


def sync(path):
    """Brings a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path, content):
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path, text):
    write_bytes(path, text.encode())


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def append_line(path, record):
    """Adds a line of JSON to a file. OSError, and no part of a line, where that cannot be done."""
    with open(path, "ab", buffering=0) as file:
        size, line = file.tell(), json.dumps(record).encode() + b"\n"
        if file.write(line) < len(line):
            file.truncate(size)
            raise OSError(f"{path}: no room for a line")


def printable(text):
    """A text without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show(text):
    """A line on the screen, in one write, as other processes may write beside it. On a terminal it
    takes the place of a live one."""
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    print(f"{clear}{text}\n", end="", flush=True)


def show_live(text):
    """On a terminal a line that the next one replaces."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        print(f"\r\x1b[K{text[: width - 1]}", end="", flush=True)


def end(message, code, everywhere=False):
    """Ends the program with one line on stderr, of one process a machine, or of each."""
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        show_live("")
        print(f"error: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    sys.exit(code)


NO_MEMORY = "DefaultCPUAllocator|out of memory|Storage size calculation overflowed"
LOST = "(?i)gloo|nccl|connection"


def run_program(main):
    """Runs a program. What a user can get wrong ends in one line, exit code 2; a reader of the
    output that has gone, quietly."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = sys.stdin or open(os.devnull)  # as by <&-
    sys.stdout = sys.stdout or open(os.devnull, "w")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, SafetensorError) as error:
        end(error, 2)
    except KeyboardInterrupt:
        end("interrupted", 130)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            how = "a smaller --micro_batch_size (train.py) or --batch_size (eval.py)"
            end(f"out of memory: less is needed with {how}", 1, everywhere=True)
        if torch.distributed.is_initialized() and re.search(LOST, str(error)):
            end(f"this process has lost the others of the run ({error})", 1)
        if re.match(r"torch\._(dynamo|inductor)", type(error).__module__):
            end(f"--compile: {error}", 1)
        raise


def main(argv=None):
    parser = Parser("data.py", description=__doc__, formatter_class=AS_WRITTEN, allow_abbrev=False)
    parser.add_argument("names", nargs="+", help=f"{', '.join(DATASETS)}; or a path")
    parser.add_argument("--data_dir", default="datasets", help="where the data sets lie")
    parser.add_argument("--tokenizer", help="directory of a tokenizer, to count tokens with")
    options = parser.parse_args(argv)
    tokenizer = Tokenizer.from_pretrained(options.tokenizer) if options.tokenizer else None
    for name in options.names:
        splits = ("train",) if is_single_file(name) else ("train", "valid", "test")
        splits, missing = DATASETS.get(name, splits), []
        if name in DATASETS:
            fetch(name, options.data_dir)
        for split in splits:
            try:
                problems = load(name, split, data_dir=options.data_dir)
                print(f"{name}, {split}: {stats(problems, tokenizer)}", flush=True)
            except FileNotFoundError as error:
                missing.append(error)
        if missing and (name in DATASETS or len(missing) == len(splits)):
            raise missing[0]


if __name__ == "__main__":
    run_program(main)
