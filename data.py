"""Problems, tokenizers, rows and batches. Nothing here knows a model or a training method.

    python data.py gsm8k-aug svamp                     downloads data sets into datasets/ and checks them
    python data.py stats svamp --tokenizer DIR         says what is in them

A problem is (question, steps, answer). A row is one problem laid out as token ids for one pathway; a batch is some
rows padded on the right. Which rows make which batch is a pure function of (seed, epoch), whatever the number of
processes.
"""

import argparse
import base64
import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import ssl
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import tiktoken
import torch

# ---------------------------------------------------------------------------------------------------------- problems


class Problem(NamedTuple):
    question: str
    steps: list[str]
    answer: str


def normalise(question):
    """The one form of a question, in training and in evaluation: no outer space, single spaces inside."""
    return re.sub(r"[ \t]+", " ", question).strip()


def load(name_or_path, split, seed=0, data_dir="datasets"):
    """list[Problem] of a data set.

    name_or_path: 'demo' (the built-in task, its split drawn by `seed`); a name in DATASETS, whose files lie in
    data_dir/name; a directory that holds `split`.txt or `split`.jsonl; or a file, which is then every split. Files that
    end in .txt are in GSM8K-Aug's format (`read_gsm8k_aug`), others hold records {"question", "steps", "answer"}
    (`read_records`). split: 'train', 'valid' or 'test'. Raises FileNotFoundError, or ValueError with file, line and field.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"no split {split!r}; there are train, valid and test")
    if name_or_path == "demo":
        return demo_problems(seed)[split]
    if name_or_path in DATASETS:
        return load_published(name_or_path, split, data_dir)
    path = Path(name_or_path)
    if path.is_dir():
        path = next((path / f"{split}{end}" for end in (".txt", ".jsonl") if (path / f"{split}{end}").is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{name_or_path}: neither {split}.txt nor {split}.jsonl is in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file, and no data set of that name: {', '.join(['demo', *DATASETS])}")
    return read_gsm8k_aug(path) if path.suffix == ".txt" else read_records(path)


def _text(path):
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the data; fetch the file itself")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def _lines(text):
    """(number, line) of each line, the last ones left out where they are blank."""
    return enumerate(text.rstrip().split("\n"), 1)


def _problem(where, question, steps, answer):
    problem = Problem(normalise(question), [step.strip() for step in steps], answer.strip())
    for name, texts in zip(Problem._fields, ([problem.question], problem.steps, [problem.answer]), strict=True):
        if not all(texts):
            raise ValueError(f"{where}: the {name} is empty" if name != "steps" else f"{where}: a step is empty")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: the {name} holds half a character (a lone surrogate)") from None
    return problem


STEP = re.compile(r"(<<.+?(?:>>|$))", re.MULTILINE)  # one without an end goes to the end of its line: none is read twice


def _cut_steps(text):
    """(the steps <<...>> of a text, the rest of it)"""
    steps, rest = [], ""
    for part in STEP.split(text):
        if part.startswith("<<") and part.endswith(">>") and len(part) > 4:
            steps.append(part)
        else:
            rest += part
    return steps, rest


def read_gsm8k_aug(path):
    """A file of GSM8K-Aug (Deng et al. 2023): one problem a line, `question||<<step>> <<step>> #### answer`.

    There may be no step. Raises ValueError with file and line number.
    """
    problems = []
    for number, line in _lines(_text(path)):
        question, bar, rest = line.partition("||")
        steps, hashes, answer = rest.rpartition("####")
        if not bar or not hashes:
            raise ValueError(f"{path}:{number}: not of the form 'question||<<step>> <<step>> #### answer'")
        steps, left = _cut_steps(steps)
        if left := left.strip():
            raise ValueError(f"{path}:{number}: {left[:40]!r} is not in a step of the form <<...>>")
        problems.append(_problem(f"{path}:{number}", question, steps, answer))
    return problems


def own_record(get):
    """{"question": text, "steps": [text, ...], "answer": text or number}; there may be no steps."""
    return get("question", str), get("steps", str, many=True, default=[]), get("answer", str, float)


def read_records(path, make=own_record):
    """A file of records, as a JSON list or as one JSON object a line. make(get) turns a record into (question, steps,
    answer), where get is `_field` of it. Raises ValueError with file, line (or number of the record) and field."""
    text, problems = _text(path), []
    is_list = text.lstrip().startswith("[")
    for where, part in [(path, text)] if is_list else ((f"{path}:{number}", line) for number, line in _lines(text)):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        for number, record in enumerate(value if is_list else [value], 1):
            where = f"{path}: record {number}" if is_list else where
            if not isinstance(record, dict):
                raise ValueError(f"{where}: not a JSON object")
            problems.append(_problem(where, *make(functools.partial(_field, where, record))))
    if not problems:
        raise ValueError(f"{path}: there is no record in it")
    return problems


def _field(where, record, name, *kinds, many=False, default=None):
    """A field of a record as text, or (many) as a list of texts. kinds: str, and float, a number, which is written out:
    51.0 as 51, 2e-06 as 0.000002."""

    def as_text(v):
        if str in kinds and isinstance(v, str):
            return v
        if float in kinds and type(v) in (int, float) and abs(v) < math.inf:
            return str(int(v)) if v == int(v) else f"{Decimal(repr(v)):f}"
        raise TypeError

    value = record.get(name, default)
    try:
        if not many:
            return as_text(value)
        if isinstance(value, list):
            return [as_text(v) for v in value]
        raise TypeError
    except TypeError:
        found = f"{value!r:.60}" if name in record else "missing"
        wanted = ("a list of " if many else "") + " or ".join({str: "text", float: "a number"}[kind] for kind in kinds)
        raise ValueError(f"{where}: the field {name!r} is {found}, not {wanted}") from None


# ------------------------------------------------------------------------------------------------ published data sets


def gsm8k(get):
    """GSM8K (Cobbe et al. 2021): the solution's calculations are the steps, as in GSM8K-Aug."""
    solution, hashes, answer = get("answer", str).rpartition("####")
    return get("question", str), _cut_steps(solution)[0], answer if hashes else ""


def gsm_hard(get):
    """GSM-HARD (Gao et al. 2023): GSM8K's test questions with large numbers."""
    return get("input", str), [], get("target", float)


def svamp(get):
    """SVAMP (Patel et al. 2021)."""
    body = get("Body", str).strip()
    return f"{body}{'' if body.endswith('.') else '.'} {get('Question', str)}", [], get("Answer", float)


def multiarith(get):
    """MultiArith (Roy and Roth 2015)."""
    return get("sQuestion", str), [], "".join(get("lSolutions", float, many=True)[:1])


def commonsenseqa_cot(get):
    """CommonsenseQA-CoT (Shen et al. 2025): the rationale as sentences in `steps`, or in one text, `cot`."""
    steps = get("steps", str, many=True, default=[]) or re.split(r"(?<=[.!?])\s+", get("cot", str, default="").strip())
    return get("question", str), [step for step in steps if step], get("answer", str)


class Published(NamedTuple):
    """One split of a data set: the file's name, its number of problems (Table 7), where it is, its size in bytes, and its sha256 or, of
    40 digits, git's SHA-1; None where they are not known."""

    file: str
    count: int
    url: str | None
    size: int | None = None
    digest: str | None = None


RAW = "https://raw.githubusercontent.com/"
ICOT = "da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761/data/gsm8k/"
GSM8K = RAW + "openai/grade-school-math/b0bb162abedc65e1fdd8e93ed090fd7598ee68bc/grade_school_math/data/"
COCONUT = RAW + "facebookresearch/coconut/"
ZERO_SHOT = RAW + "kojima-takeshi188/zero_shot_cot/2824685e25809779dbd36900a69825068e9f51ef/dataset/"

# name -> (reader, {split: Published}); the addresses are those of one commit each, so that the files cannot change
DATASETS = {
    "gsm8k-aug": (read_gsm8k_aug, {
        "train": Published("train.txt", 385_620, "https://media.githubusercontent.com/media/" + ICOT + "train.txt", 87_805_358,
                           "0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c"),
        "valid": Published("valid.txt", 500, RAW + ICOT + "valid.txt", 143_419,
                           "04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87"),
        "test": Published("test.txt", 1_319, RAW + ICOT + "test.txt", 388_019,
                          "e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8")}),
    "gsm8k": (functools.partial(read_records, make=gsm8k), {
        "train": Published("train.jsonl", 7_473, GSM8K + "train.jsonl", 4_166_206,
                           "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        "test": Published("test.jsonl", 1_319, GSM8K + "test.jsonl", 749_738,
                          "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14")}),
    "gsm-hard": (functools.partial(read_records, make=gsm_hard), {
        "test": Published("gsmhardv2.jsonl", 1_319, RAW + "reasoning-machines/pal/9a51009fc45ab99b35955b49d89ba6091a904036/"
                          "datasets/gsmhardv2.jsonl", 1_138_151,
                          "2032b0188a49ac0ec38cbe1e695e7d62d6dddc44bbb64f920728aca710e9ddef")}),
    "svamp": (functools.partial(read_records, make=svamp), {
        "test": Published("SVAMP.json", 1_000, RAW + "arkilpatel/SVAMP/7827fb803c3f6b017086f75024515b15bf31900f/SVAMP.json",
                          339_970, "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e")}),
    "multiarith": (functools.partial(read_records, make=multiarith), {
        "test": Published("MultiArith.json", 600, ZERO_SHOT + "MultiArith/MultiArith.json", 254_012,
                          "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4")}),
    "prosqa": (read_records, {
        "train": Published("prosqa_train.json", 17_886, COCONUT + "27273cb8cca4bb763c041a63b036d0c3b7cbbb48/data/"
                           "prosqa_train.json", None, "cf26632b9d3f4e812966563eed769b1cfe40c624"),
        "valid": Published("prosqa_valid.json", 300, COCONUT + "f248913ad54b0eb08480f491618c8dde012fb167/data/"
                           "prosqa_valid.json", 518_208,
                           "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249"),
        "test": Published("prosqa_test.json", 500, COCONUT + "f248913ad54b0eb08480f491618c8dde012fb167/data/prosqa_test.json",
                          856_611, "82ddc0afe6ee30eb31bb16fa208e293e55278a20fa987098d48519cae7e12680")}),
    "commonsenseqa-cot": (functools.partial(read_records, make=commonsenseqa_cot), {
        "train": Published("train.jsonl", 8_096, None),
        "test": Published("commonsenseqa_local.jsonl", 1_221, RAW + "J1mL1/causal-latent-cot/"
                          "4f2f11fc2a0ed4281f48144e5bfb77c382885bb6/data/commonsenseqa_local.jsonl", 249_335,
                          "adc4fe1f91d671f4c38025e688c787c8146fc866a76abddd7844ca9c90648701")}),
}  # fmt: skip
BY_HAND = """{path} is not to be had over plain HTTP; with the package `datasets`, this writes it:
python -c "from datasets import load_dataset; load_dataset('zen-E/CommonsenseQA-GPT4omini', split='train').to_json('{path}')"
"""


def load_published(name, split, data_dir):
    """A split of a set in DATASETS, as a whole: ValueError where the number of its problems is another."""
    reader, splits = DATASETS[name]
    if split not in splits:
        raise ValueError(f"{name} has no {split} split, only {' and '.join(splits)}")
    path = Path(data_dir) / name / splits[split].file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `python data.py {name}` fetches it (--data_dir says where to)")
    problems = reader(path)
    if len(problems) != splits[split].count:
        raise ValueError(f"{path}: {len(problems)} problems, not the {splits[split].count} of {name}; as a set of its own it is "
                         f"to be named by its path")  # fmt: skip
    return problems


# The built-in task: two-step word problems whose second step is a remainder, so that the answer tells nothing of how
# to come by it. `sam has 7 pens gets 5 packs of 4 ?` -> `<<7+5=12>> <<12%4=0>>` -> `0`.
NAMES = ("sam", "ann", "bob", "eve")
ITEMS = ("pens", "eggs", "nuts", "caps")
VERBS = {"+": ("buys", "finds", "gets"), "-": ("loses", "sells", "eats")}
DEMO_WORDS = ["<bos>", "<eos>", "<st>", "Answer", ":", "<<", ">>", "+", "-", "%", "=", "?", "has", "packs", "of",
              *NAMES, *ITEMS, *VERBS["+"], *VERBS["-"], *map(str, range(30))]  # fmt: skip
MIN_OCCURRENCES = 4  # of every single fact of a held-out problem, in the training split
HELD_OUT = {"test": 500, "valid": 200}


def demo_problems(seed):
    """The 2,520 problems (x op y, in packs of p) with one wording each: split name -> list[Problem].

    The splits share no arithmetic content, but each single fact of a held-out problem (x op y, and v % p) occurs at
    least MIN_OCCURRENCES times in training: what is held out is the composition. `seed` draws wording and split.
    """
    rng = np.random.default_rng(seed)
    contents = [(x, op, y, p) for x in range(1, 21) for op in "+-" for y in range(1, 10) if op == "+" or y < x
                for p in range(2, 10)]  # fmt: skip
    contents = [contents[i] for i in rng.permutation(len(contents))]
    facts, count = {}, {}
    for x, op, y, p in contents:
        value = x + y if op == "+" else x - y
        facts[x, op, y, p] = ((x, op, y), (value, p))
        for fact in facts[x, op, y, p]:
            count[fact] = count.get(fact, 0) + 1
    splits = {"train": [], "valid": [], "test": []}
    for content in contents:
        split = next((name for name, size in HELD_OUT.items() if len(splits[name]) < size), "train")
        if split != "train" and all(count[fact] > MIN_OCCURRENCES for fact in facts[content]):
            for fact in facts[content]:
                count[fact] -= 1
        else:
            split = "train"
        x, op, y, p = content
        value = facts[content][1][0]
        name, item, verb = (str(rng.choice(words)) for words in (NAMES, ITEMS, VERBS[op]))
        question = f"{name} has {x} {item} {verb} {y} packs of {p} ?"
        steps = [f"<<{x}{op}{y}={value}>>", f"<<{value}%{p}={value % p}>>"]
        splits[split].append(Problem(question, steps, str(value % p)))
    return splits


def demo_chance(problems):
    """The accuracy of guessing: a remainder below p, the question's last number, each as likely as the other."""
    return float(np.mean([1 / int(problem.question.split()[-2]) for problem in problems]))


# ----------------------------------------------------------------------------------------------------------- scoring

NUMBER = re.compile(r"(?:(?<![\d).])-)?(?:\d+ (?=\d+/\d))?(?:\d+(?:\.\d*)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+)?(?: ?/ ?\d+)?")
LETTER = re.compile(r"(?:.*\b(?i:answer is|answer):?)?\W*([A-Z])(?:\W*|(?:\s*[.:)\n]|\s+-\s)(?!.*\b[A-Z]\b).*)", re.DOTALL)


def parse_number(text):
    """The last number in a text as a float, None where there is none.

    Read are 1,234 and $1,234. (1234), -$5 (-5), .5 and 5. (0.5, 5), 1/2 and 2 1/2 (0.5, 2.5), 2.5e-3; a minus right behind a
    digit or a bracket is an operator: 10-5 is 5. Words for numbers are not read, nor units: 50% is 50.
    """
    found = NUMBER.findall(_bare(text))
    if not found:
        return None
    sign = -1 if found[-1].startswith("-") else 1
    left, _, denominator = found[-1].lstrip("-").partition("/")
    whole, _, numerator = left.strip().rpartition(" ")
    if denominator and float(denominator) == 0:
        return None
    return sign * (float(whole or 0) + float(numerator) / float(denominator or 1))


def _bare(text):
    """Without currency signs and the commas of thousands; other signs of a minus are one."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[$€£¥]", "", re.sub("[\u2212\u2013]", "-", text))


def answer_kind(gold):
    """What a gold answer is: 'number', 'letter' (of a choice), or 'sentence'."""
    if re.fullmatch(r"[A-Z]", gold):
        return "letter"
    return "number" if NUMBER.fullmatch(_bare(gold).rstrip(" %")) else "sentence"


def score(text, gold):
    """(strict, tolerant). Strict: the answer's text is the gold text, outer space aside. Tolerant, by the kind of the gold
    answer:

    number    the last number is the same; where the gold one is not whole, to a relative 1e-6, but no more than 0.01
              (GSM-HARD has gold answers of 17 digits)
    letter    the text is the letter, may be in brackets, behind 'the answer is', or before a dot, a colon and its choice
    sentence  the words are the same whatever their case and final dot

    What cannot be read is wrong.
    """
    strict, kind = text.strip() == gold.strip(), answer_kind(gold.strip())
    if kind == "number":
        want, got = parse_number(gold), parse_number(text)
        if strict or got is None or want is None or math.isinf(want):
            return strict, strict
        return False, abs(got - want) <= (0 if want.is_integer() else min(1e-6 * abs(want), 0.01))
    if kind == "letter":
        found = LETTER.fullmatch(text.strip())
        return strict, found is not None and found[1] == gold.strip()
    return strict, text.lower().rstrip(". \n").split() == gold.lower().rstrip(". \n").split()


# -------------------------------------------------------------------------------------------------------- tokenizers

# How a byte-level BPE cuts a text before it merges.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                  r"\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_RANKS = 128_000
LONGEST = 500_000  # characters of a text: tiktoken's patterns break down beyond a million blanks in a row
RESERVED = ("<st>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")  # stand for <st> and the like where they are


WORD = r"<<|>>|\d+|[^\W\d]+|[^\w\s]"


class Words:
    """The built-in task's vocabulary: a token is a word, a number or a sign. Spaces are not tokens."""

    words = ()  # see Tiktoken

    def __init__(self, vocabulary):
        self.vocabulary, self.size = vocabulary, len(vocabulary)
        self.ids = {word: i for i, word in enumerate(vocabulary)}
        self.added = {word: self.ids[word] for word in ("<bos>", "<eos>", "<st>") if word in self.ids}

    def encode(self, text, continued):
        tokens = re.findall(WORD, text)
        if unknown := [token for token in tokens if token not in self.ids]:
            raise ValueError(f"{unknown[0]!r} is not in the vocabulary of the tokenizer's words.json")
        return [self.ids[token] for token in tokens]

    def decode(self, ids):
        text = re.sub(r" ?(<<|>>|[-+%=:]) ?", r"\1", " ".join(self.vocabulary[i] for i in ids))
        return text.replace(">><<", ">> <<")

    def export(self):
        tight = [{"type": "Replace", "pattern": {"Regex": f" ?{sign} ?"}, "content": sign.strip("\\")}
                 for sign in ("<<", ">>", "-", r"\+", "%", "=", ":")]  # fmt: skip
        spaced = [{"type": "Replace", "pattern": {"Regex": "^"}, "content": " "}, {"type": "Fuse"}]
        apart = [{"type": "Replace", "pattern": {"String": ">><<"}, "content": ">> <<"},
                 {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
        return {"normalizer": None, "model": {"type": "WordLevel", "vocab": self.ids, "unk_token": "<unk>"},
                "pre_tokenizer": {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Removed", "invert": True},
                "decoder": {"type": "Sequence", "decoders": [*spaced, *tight, *apart]}}  # fmt: skip


class Tiktoken:
    """A byte-level BPE. ranks: bytes -> id, added: name -> id of the added tokens, of which only the `words` are found in a
    text: the names of special tokens are text. nfc: a text is brought into Unicode's composed form first."""

    def __init__(self, pattern, ranks, added, words=(), nfc=False):
        self.pattern, self.ranks, self.added, self.nfc, self.size = pattern, ranks, added, nfc, len(ranks) + len(added)
        if sorted([*ranks.values(), *added.values()]) != list(range(self.size)):
            raise ValueError(f"the ids of the {self.size} tokens are not 0 to {self.size - 1}")
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("the vocabulary lacks one of the 256 bytes")
        self.words, longest_first = words, sorted(filter(None, words), key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
        self.decode = self.encoding.decode

    def encode(self, text, continued):
        ids = []
        for i, part in enumerate(self.cut.split(text) if self.cut else [text]):
            part = part if i % 2 else unicodedata.normalize("NFC", part) if self.nfc else part
            ids += [self.added[part]] if i % 2 else self.encoding.encode_ordinary(part)
        return ids

    def export(self):
        """Every split of a token into two tokens is listed as a merge, as in Llama 3's file: that is how tiktoken merges."""
        spelling = {byte: character for character, byte in _spelling().items()}
        vocab = {"".join(map(spelling.get, token)): i for token, i in sorted(self.ranks.items(), key=lambda item: item[1])}
        by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.pattern == GPT2_PATTERN}
        cut = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        if not by_bytes["use_regex"]:
            cut = {"type": "Sequence", "pretokenizers": [cut, by_bytes]}
        return {"normalizer": {"type": "NFC"} if self.nfc else None, "pre_tokenizer": by_bytes if by_bytes["use_regex"] else cut,
                "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": _splits(vocab)},
                "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}}  # fmt: skip


class SentencePiece:
    """A SentencePiece model. It puts a space before a text, but not before one that is `continued`."""

    words = ()  # see Tiktoken

    def __init__(self, proto):
        if not proto:
            raise ValueError("the file is empty")
        try:
            # The added bytes are a second normalizer_spec, {add_dummy_prefix: false}: protobuf merges it into the first.
            self.start, self.go_on = (sentencepiece.SentencePieceProcessor(model_proto=proto + more)
                                      for more in (b"", b"\x1a\x02\x18\x00"))  # fmt: skip
        except RuntimeError:
            raise ValueError("neither lines 'base64 rank' (Llama 3) nor a SentencePiece model (Llama 2)") from None
        self.decode, self.size = self.start.decode, self.start.vocab_size()
        self.decode(list(range(self.size)))  # ValueError where a piece is no text

        unknown = [i for i in range(self.size) if self.start.is_control(i) or self.start.is_unknown(i)]
        self.added = {self.start.id_to_piece(i): i for i in unknown}

    def encode(self, text, continued):
        return (self.go_on if continued else self.start).encode(text)

    def export(self):
        model, vocab = self.start, {self.start.id_to_piece(i): i for i in range(self.size)}
        merged = [piece for piece, i in vocab.items() if not (piece in self.added or model.is_byte(i) or model.is_unused(i))]
        merged.sort(key=lambda piece: -model.get_score(vocab[piece]))
        if not all(model.get_score(vocab[piece]).is_integer() for piece in merged):  # as of a unigram model
            raise ValueError("only SentencePiece's BPE models can be exported")
        if model.decode(model.encode(text := "a  \u212b")) != text or model.encode("a") == self.go_on.encode("a"):
            raise ValueError("only SentencePiece models that leave texts as they are, behind one blank, can be exported")
        blank = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
        return {"normalizer": None, "pre_tokenizer": blank,
                "model": {"type": "BPE", "unk_token": model.id_to_piece(model.unk_id()), "fuse_unk": True, "byte_fallback": True,
                          "vocab": vocab, "merges": _splits(merged)},
                "decoder": {"type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
                    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}  # fmt: skip


class Tokenizer:
    """Text to ids and back. bos_id is None where there is none; reserved: ids that may stand for <st> and the like.

    kind: what was read; files: name -> bytes, to be saved with a run.
    """

    def __init__(self, kind, backend, files, eos_id, bos_id=None, reserved=()):
        self.kind, self.backend, self.files, self.size = kind, backend, files, backend.size
        self.eos_id, self.bos_id, self.reserved = eos_id, bos_id, tuple(reserved)

    @classmethod
    def from_pretrained(cls, directory):
        """The tokenizer of a directory: the first of READERS that is there, with tokenizer_config.json and
        added_tokens.json beside it.

        Raises FileNotFoundError or ValueError, naming the file: a tokenizer that would give other ids here than to its
        authors is refused.
        """
        directory = Path(directory)
        for names, read in READERS:
            if all((directory / name).is_file() for name in names):
                paths = [directory / name for name in (*names, "tokenizer_config.json", "added_tokens.json")]
                if large := [path for path in paths if path.is_file() and path.stat().st_size > LARGEST]:
                    raise ValueError(f"{large[0]}: more than {LARGEST} bytes are no tokenizer's")
                files = {path.name: path.read_bytes() for path in paths if path.is_file()}
                try:
                    return read(files)
                except KeyError as error:
                    raise ValueError(f"{directory}: {' with '.join(names)}: the field {error} is missing") from None
                except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
                    raise ValueError(f"{directory}: {' with '.join(names)}: {error}") from None
        raise FileNotFoundError(f"{directory}: no tokenizer: {', nor '.join(' with '.join(names) for names, _ in READERS)}")

    def __str__(self):
        bos = "no BOS" if self.bos_id is None else f"BOS {self.bos_id}"
        st = f"{len(self.reserved)} in reserve" if self.reserved else "none in reserve for <st>"
        return f"tokenizer: {self.kind}, {self.size} ids, {bos}, EOS {self.eos_id}, {st}"

    def save(self, directory):
        for path, content in ((Path(directory) / name, content) for name, content in self.files.items()):
            if not path.is_file() or path.is_symlink() or path.read_bytes() != content:
                with replacing(path) as temporary:
                    temporary.write_bytes(content)

    def encode(self, text, *, bos, eos, continued=False):
        """list of ids. bos and eos have no default, so that neither is forgotten nor doubled; a tokenizer without a BOS
        puts none. Names of special tokens inside the text are text. continued: other text stands right before this.

        Raises ValueError for a text that has no ids here, holds half a character, or is longer than LONGEST characters."""
        if len(text) > LONGEST:
            raise ValueError(f"a text of {len(text)} characters, but at most {LONGEST} are read: {text[:60]!r}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the text holds half a character (a lone surrogate): {text[:60]!r}") from None
        ids = self.backend.encode(text, continued)
        return [self.bos_id] * (bos and self.bos_id is not None) + ids + [self.eos_id] * eos

    def decode(self, ids):
        """The text of ids. A model may have more embeddings than the tokenizer has ids: such an id reads as U+FFFD."""
        known = [[]]
        for i in ids:
            if i < self.size:
                known[-1].append(i)
            else:
                known.append([])
        return "\ufffd".join(self.backend.decode(part) for part in known)

    def export(self, with_st):
        """This tokenizer as Hugging Face's libraries read one: ({file name: text}, id of <st>). A text that does not begin with a blank
        gets the ids of bos=True there; what stands behind a special token in it is encoded as `continued`.

        with_st: <st> is a special token, the first reserved one by another name, else one behind all others. Raises ValueError for a
        SentencePiece model of which these files cannot say the same.
        """
        names = {i: name for name, i in self.backend.added.items()}
        st_id = self.reserved[0] if self.reserved else self.size
        if with_st:
            names[st_id] = "<st>"
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": i, "content": name, **flags, "special": name not in self.backend.words} for i, name in sorted(names.items())]
        bos, eos = names.get(self.bos_id), names[self.eos_id]
        first = [{"SpecialToken": {"id": bos, "type_id": 0}}] * (bos is not None)
        template = {"type": "TemplateProcessing", "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [*first, *({"Sequence": {"id": text, "type_id": 0}} for text in "AB")],
                    "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}} if first else {}}  # fmt: skip
        whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": template}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": eos,
                  "additional_special_tokens": ["<st>"] * with_st, "clean_up_tokenization_spaces": False}  # fmt: skip
        texts = json.dumps(whole | self.backend.export(), ensure_ascii=False), json.dumps(config, indent=1) + "\n"
        return dict(zip(("tokenizer.json", "tokenizer_config.json"), texts, strict=True)), st_id


def demo_tokenizer():
    return _words({"words.json": json.dumps(DEMO_WORDS).encode()})


def _json(files, name):
    try:
        return json.loads(files.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from None


def _words(files):
    words = _json(files, "words.json")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or len(set(words)) < len(words):
        raise ValueError("not a list of different strings")
    "".join(words).encode()  # ValueError where one holds half a character
    if "<bos>" not in words or "<eos>" not in words:
        raise ValueError("<bos> or <eos> is missing")
    ids = {word: i for i, word in enumerate(words)}
    return Tokenizer("words.json", Words(words), files, ids["<eos>"], ids["<bos>"], [ids["<st>"]] if "<st>" in ids else [])


def _finish(kind, backend, files, added, bos, *usual):
    """The Tokenizer around a backend. added: name -> id of its special tokens; bos: the name of the one put first; the end
    token is tokenizer_config.json's, or the first of the `usual` ones that is there."""
    config = _json(files, "tokenizer_config.json")
    eos = config.get("eos_token") or next((name for name in usual if name in added), None)
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos not in added:
        raise ValueError(f"the end token {eos!r} is not among the added ones (tokenizer_config.json: eos_token)")
    if unknown := _json(files, "added_tokens.json").keys() - added:
        raise ValueError(f"added_tokens.json: {min(unknown)!r} is in no other file")
    if config.get("add_bos_token") and bos is None:
        raise ValueError("tokenizer_config.json: add_bos_token is not supported here")
    bos = None if config.get("add_bos_token") is False else added.get(bos)
    return Tokenizer(kind, backend, files, added[eos], bos, [added[name] for name in RESERVED if name in added])


def _tokenizer_model(files):
    """Llama-3's tokenizer.model, lines `base64(token) rank`, 256 special tokens behind them; or a SentencePiece model."""
    content = files["tokenizer.model"]
    if not re.match(rb"[\w+/=]+ \d+\n", content):
        backend = SentencePiece(content)
        pieces = backend.start
        bos, eos = (pieces.id_to_piece(i) if i >= 0 else None for i in (pieces.bos_id(), pieces.eos_id()))
        return _finish("SentencePiece (tokenizer.model)", backend, files, backend.added, bos, eos)
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number} is not of the form 'base64 rank'") from None
    n = len(ranks)
    if n != LLAMA3_RANKS:
        raise ValueError(f"{n} ranks, not the {LLAMA3_RANKS} of Llama 3: which pattern goes with them is not known")
    special = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
               7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}  # fmt: skip
    reserved = iter(range(256))
    names = [f"<|{special.get(i) or f'reserved_special_token_{next(reserved)}'}|>" for i in range(256)]
    added = {name: n + i for i, name in enumerate(names)}
    backend = Tiktoken(LLAMA3_PATTERN, ranks, added)
    return _finish("Llama-3's ranks (tokenizer.model)", backend, files, added, names[0], names[1])


def _tokenizer_json(files):
    """Hugging Face's tokenizer.json, where it is a byte-level BPE: pattern, vocabulary, merges and added tokens are its own."""
    raw = _json(files, "tokenizer.json")
    model, normalizer, cut = raw["model"], raw["normalizer"], raw["pre_tokenizer"] or {"type": None}
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"model.type {model['type']!r} is not supported (only 'BPE')")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise ValueError(f"model.{name} = {model[name]!r} is not supported")
    if normalizer and normalizer["type"] != "NFC":
        raise ValueError(f"normalizer {normalizer['type']!r} is not supported (only none and 'NFC')")
    *split, last = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or bool(split) == last.get("use_regex", True):
        raise ValueError("pre_tokenizer: only ByteLevel, without a prefixed space, and Split with ByteLevel are supported")
    pattern = split[0].get("pattern", {}).get("Regex") if split else GPT2_PATTERN
    if split and (pattern not in (LLAMA3_PATTERN, QWEN2_PATTERN) or split[0]["behavior"] != "Isolated" or split[0]["invert"]
                  or len(split) > 1):  # fmt: skip
        raise ValueError(f"pre_tokenizer: only Llama 3's and Qwen2's patterns are supported, not {split}")
    added, words = _added(raw["added_tokens"], normalizer)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks = _ranks({token: i for token, i in model["vocab"].items() if token not in added}, merges, model.get("ignore_merges"))
    post = raw["post_processor"] or {}
    first = [part["single"][0] for part in (post, *post.get("processors", ())) if part.get("type") == "TemplateProcessing"]
    bos = next((part["SpecialToken"]["id"] for part in first if "SpecialToken" in part), None)
    backend = Tiktoken(pattern, ranks, added, words, nfc=bool(normalizer))
    return _finish("tokenizer.json", backend, files, added, bos, "<|end_of_text|>", "<|endoftext|>")


def _vocab_and_merges(files):
    """GPT-2's or Qwen2's vocab.json, token -> id, and merges.txt, pairs in the order of their ids. GPT-2's vocabulary ends in
    its end token, Qwen2's special tokens are in tokenizer_config.json."""
    vocab, config = _json(files, "vocab.json"), _json(files, "tokenizer_config.json")
    family = config.get("tokenizer_class") or ("GPT2Tokenizer" if "<|endoftext|>" in vocab else "Qwen2Tokenizer")
    family = family.removesuffix("Fast").removesuffix("Tokenizer")
    if family not in ("GPT2", "Qwen2") or config.get("add_prefix_space"):
        raise ValueError("tokenizer_config.json: only GPT2Tokenizer and Qwen2Tokenizer without a prefixed space are supported")
    tokens = [{**token, "id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()]
    added, words = _added(tokens, family == "Qwen2")
    if "<|endoftext|>" in vocab:
        added["<|endoftext|>"] = vocab["<|endoftext|>"]
    elif not added:
        raise ValueError("tokenizer_config.json with the special tokens (added_tokens_decoder) is missing")
    lines = files["merges.txt"].decode().splitlines()
    merges = [tuple(line.split(" ")) for line in lines[lines[:1] != [] and lines[0].startswith("#version") :] if line]
    ranks = _ranks({token: i for token, i in vocab.items() if token not in added}, merges)
    backend = Tiktoken(GPT2_PATTERN if family == "GPT2" else QWEN2_PATTERN, ranks, added, words, nfc=family == "Qwen2")
    return _finish(f"{family}'s vocab.json and merges.txt", backend, files, added, None, "<|endoftext|>")


def _added(tokens, nfc):
    """(name -> id, names of those that are ordinary words) of the added tokens in Hugging Face's files."""
    words = [token for token in tokens if not token["special"]]
    for token in words:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or (nfc and token["normalized"]):
            raise ValueError(f"the added token {token['content']!r} with lstrip, rstrip, single_word or normalized is not "
                             f"supported")  # fmt: skip
    return {token["content"]: token["id"] for token in tokens}, {token["content"] for token in words}


def _ranks(vocab, merges, ignore_merges=False):
    """Bytes -> id, from tokens that spell bytes as printable characters.

    tiktoken merges the two neighbours whose union has the lowest id, whatever list they are in, and takes a piece that is a
    token as it is. Going through `merges` in their order gives the same where the ids of the unions never fall, and each
    token's bytes come to that token through them; or where (ignore_merges: Hugging Face, too, takes such a piece as it is)
    every way to split the token is among the merges. Raises ValueError otherwise.
    """
    if sum(len(token) ** 2 for token in vocab) > 2**26:  # far beyond any vocabulary; the time below goes with it
        raise ValueError("the tokens are too long")
    byte_of, last, pairs = _spelling(), -1, set(merges)
    for number, pair in enumerate(merges):
        union = "".join(pair)
        if len(pair) != 2 or not {*pair, union} <= vocab.keys():
            raise ValueError(f"merge {number}, {' '.join(pair)!r}, is not of two tokens into a third")
        if vocab[union] < last:
            raise ValueError(f"merge {number}, {' '.join(pair)!r}, has the id {vocab[union]} after {last}: the order of the "
                             f"merges is not that of the ids")  # fmt: skip
        last = vocab[union]
    for token in vocab:
        if not set(token) <= byte_of.keys():
            raise ValueError(f"the token {token!r} is not spelled in bytes")
        splits = {(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab}
        if not (ignore_merges and splits <= pairs) and len(token) > 1 and _last_merge(token, vocab) not in pairs:
            raise ValueError(f"the merges do not make the token {token!r}, or not by themselves")
    return {bytes(map(byte_of.get, token)): i for token, i in vocab.items()}


def _spelling():
    """Character -> byte, as GPT-2 spells bytes: printable ones as themselves, the others as characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _splits(tokens):
    """The merges `a b` of all tokens, in their order: every way to split one into two that are tokens, too."""
    known = set(tokens)
    return [f"{token[:i]} {token[i:]}" for token in tokens for i in range(1, len(token)) if {token[:i], token[i:]} <= known]


def _last_merge(token, vocab):
    """The pieces that tiktoken has just before it forms this token: merges into tokens of lower ids only."""
    parts = tuple(token)
    while True:
        unions = [(vocab.get(a + b, vocab[token]), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        best, i = min(unions)
        if best >= vocab[token]:
            return parts
        parts = (*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :])


# What a directory may hold, and how it is read: the built-in task's words, Llama 2's and 3's own files, Hugging Face's.
READERS = [(("words.json",), _words), (("tokenizer.model",), _tokenizer_model), (("tokenizer.json",), _tokenizer_json),
           (("vocab.json", "merges.txt"), _vocab_and_merges), (("original/tokenizer.model",), _tokenizer_model)]  # fmt: skip


# -------------------------------------------------------------------------------------------------- rows and batches


class Row(NamedTuple):
    """One problem as a pathway sees it: ids [T]; ids[z:y] is what is learned of Z, ids[y:] is Y. So z_N, the last token
    of the separator, is at y - 1; z = y where nothing of Z is learned. ids[start : start + thoughts] stand for continuous
    thoughts, which are no tokens."""

    ids: np.ndarray
    z: int
    y: int
    start: int = 0
    thoughts: int = 0


@dataclass
class Batch:
    """Rows padded on the right to T tokens, and the K tokens that are learned.

    ids [B, T]; row, col, weight [K]: token ids[row, col] counts with `weight`; at [B]: the index of z_N; end [B]: the rows'
    lengths; start [B]: the index of the first of the `thoughts`, of which every row has as many. tail: the first index
    whose hidden state says anything of a learned token.
    """

    ids: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    weight: torch.Tensor
    at: torch.Tensor
    end: torch.Tensor
    start: torch.Tensor
    tail: int
    thoughts: int = 0

    def to(self, device):
        return Batch(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in vars(self).values()))


def collate(rows, pad_id):
    """list[Row] -> Batch. Each token of a piece (Z, Y) weighs 1 / the piece's length: the two means of equation (1).

    The padding needs no mask: attention is causal, and no padded token is learned."""
    ids = np.full((len(rows), max(len(row.ids) for row in rows)), pad_id, dtype=np.int64)
    weight = np.zeros(ids.shape, dtype=np.float32)
    for i, (tokens, z, y, *_) in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        weight[i, z:y] = 1 / max(y - z, 1)
        weight[i, y : len(tokens)] = 1 / (len(tokens) - y)
    row, col = weight.nonzero()
    at, end, start = np.array([(row.y - 1, len(row.ids), row.start) for row in rows]).T
    arrays = ids, row, col, weight[row, col], at, end, start
    tail = min(row.z for row in rows) - 1
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays), tail, rows[0].thoughts)


WINDOW, GROUP = 256, 16  # in global batches: rows are sorted by length within a window, and again within a group


def epoch_batches(lengths, batch_size, seed, epoch):
    """The global batches of one epoch: a list of index arrays [batch_size], a pure function of the arguments.

    lengths [N, P]: the tokens of each problem in each of P pathways, N >= batch_size. The problems are shuffled, windows
    of WINDOW batches sorted by their length in the last pathway, groups of GROUP batches therein by that in the first, cut
    into batches, and the batches shuffled: the rows of a batch are of about one length in every pathway, so that little is
    padding. What does not fill a batch waits for another epoch's shuffle.
    """
    rng = np.random.default_rng((seed, epoch))
    lengths = np.asarray(lengths)
    order = rng.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    batches = []
    for window in np.split(order, range(WINDOW * batch_size, len(order), WINDOW * batch_size)):
        window = window[np.argsort(lengths[window, -1], kind="stable")]
        for group in np.split(window, range(GROUP * batch_size, len(window), GROUP * batch_size)):
            group = group[np.argsort(lengths[group, 0], kind="stable")]
            batches += np.split(group, len(group) // batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def printable(tokenizer, token):
    """A token's text without a blank or anything that would not be seen in it."""
    text = tokenizer.decode([token])
    return text.replace(" ", "_") if text.isprintable() else ascii(text)[1:-1]


def picture(row, tokenizer, width=100):
    """A row as text: each token, and below it what it weighs in the loss ('.' where it is not learned)."""
    cells = []
    for i, token in enumerate(row.ids.tolist()):
        if row.start and row.start - 1 <= i <= row.start + row.thoughts:  # between two marks
            text = {row.start - 1: "<bot>", row.start + row.thoughts: "<eot>"}.get(i, "<thought>")
        elif token in tokenizer.reserved or token >= tokenizer.size:
            text = "<st>"
        else:
            text = printable(tokenizer, token)
        length = row.y - row.z if row.z <= i < row.y else len(row.ids) - row.y
        cells.append((text, "." if i < row.z else f"1/{length}"))
    lines, top, bottom = [], "", ""
    for token, weight in cells:
        size = max(len(token), len(weight)) + 1
        if len(top) + size > width:
            lines += [top.rstrip(), bottom.rstrip()]
            top, bottom = "", ""
        top, bottom = top + token.ljust(size), bottom + weight.ljust(size)
    return "\n".join([*lines, top.rstrip(), bottom.rstrip()])


# ------------------------------------------------------------------------------------------- downloads, statistics


def fetch(name, data_dir, timeout=30.0, attempts=5):
    """Downloads what is missing of a published data set into data_dir/name, and checks all of it.

    A broken download is taken up where it broke, also by a later call. A file appears under its name when it is whole and
    right. Raises ValueError or OSError, naming file or address.
    """
    by_hand = []
    for split, published in DATASETS[name][1].items():
        path = Path(data_dir) / name / published.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            _check(name, published, path)
        elif published.url is None:
            print(BY_HAND.format(path=path), end="")
            by_hand.append(str(path))
            continue
        else:
            part = path.with_name(path.name + ".part")
            _download(published, part, timeout, attempts)
            try:
                _check(name, published, part)
            except ValueError:
                part.unlink()
                raise
            os.replace(part, path)
        print(f"{path}: {published.count} problems ({split}), {path.stat().st_size / 1e6:.1f} MB", flush=True)
    if by_hand:
        raise FileNotFoundError(f"{name}: all but {' and '.join(by_hand)} is there")


def _check(name, published, path):
    """ValueError unless the file is the published one: size and checksum where they are known, the number of problems."""
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the data")
    if published.size not in (None, len(content)):
        raise ValueError(f"{path}: {len(content)} bytes, the published file has {published.size}")
    if published.digest:
        git = len(published.digest) == 40  # git hashes a header, too
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content) if git else hashlib.sha256(content)
        if digest.hexdigest() != published.digest:
            raise ValueError(f"{path}: the checksum is not that of the published file; it is damaged or another")
    count = len(DATASETS[name][0](path))
    if count != published.count:
        raise ValueError(f"{path}: {count} problems, the published file has {published.count}")


def _download(published, part, timeout, attempts):
    """The bytes of an address into the file `part`, what is there already left out. An answer that cannot be the rest of the
    file, or all of it, is not written."""
    for attempt in range(1, attempts + 1):
        have = part.stat().st_size if part.exists() else 0
        if have and have == published.size:
            return
        try:
            request = urllib.request.Request(published.url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=timeout) as response:
                part_of = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
                if response.status == 206 and (part_of is None or int(part_of[1]) != have):
                    raise ConnectionError("the server sends another part than was asked for")
                length = part_of[2] if part_of else response.headers["Content-Length"]
                whole = int(length) if length else published.size
                if have and published.size not in (None, whole):
                    raise ConnectionError(f"the server has {whole} bytes, the published file has {published.size}")
                have = have if response.status == 206 else 0  # else the server starts from the beginning
                with open(part, "ab" if have else "wb") as file:
                    while block := response.read1(1 << 18):  # what is there, so that a stall loses nothing
                        have += len(block)
                        if published.size and have > published.size:
                            raise ConnectionError(f"the server has more than the {published.size} bytes of the published file")
                        file.write(block)
                        _progress(part, have, whole)
            if whole is None or have == whole:
                return
            fault = f"the connection broke after {have} of {whole} bytes"
        except urllib.error.HTTPError as error:
            fault = f"the server answers {error.code} {error.reason}"
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
                return  # it was complete
            if error.code == 416:  # what is there is not the beginning of what is published
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise ValueError(f"{published.url}: {fault}") from None
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError,
                ValueError) as error:  # fmt: skip
            fault = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt < attempts:
            time.sleep(min(2.0**attempt, timeout) / 4)
    raise ValueError(f"{published.url}: {fault}, {attempts} times; the same command goes on from here")


def _progress(path, have, total):
    if sys.stderr.isatty():
        share = f" of {total / 1e6:.1f}" if total else ""
        print(f"\r\x1b[K{path.name}: {have / 1e6:.1f}{share} MB", end="\r", file=sys.stderr, flush=True)


def stats(problems, tokenizer=None):
    """What there is to know of a list of problems before training on it, as text."""
    steps = [len(problem.steps) for problem in problems]
    kinds = Counter(answer_kind(problem.answer) for problem in problems)
    histogram = "  ".join(f"{n}: {count}" for n, count in sorted(Counter(steps).items()))
    lines = [f"{len(problems)} problems",
             f"steps per problem: mean {np.mean(steps):.3f}  ({histogram})",
             f"empty CoT: {steps.count(0)}; empty without its last step: {sum(n <= 1 for n in steps)}",
             "answers: " + ", ".join(f"{count} {kind}s" for kind, count in kinds.most_common())]  # fmt: skip
    if tokenizer is not None:
        pieces = {"question": [problem.question for problem in problems], "steps": [" ".join(p.steps) for p in problems],
                  "steps but the last": [" ".join(p.steps[:-1]) for p in problems],
                  "answer": [problem.answer for problem in problems]}  # fmt: skip
        for piece, texts in pieces.items():
            lengths = [len(tokenizer.encode(text, bos=False, eos=False, continued=piece != "question")) for text in texts]
            lines.append(f"tokens in {piece}: mean {np.mean(lengths):.1f}  95 % up to {np.percentile(lengths, 95):.0f}  "
                         f"longest {max(lengths)}")  # fmt: skip
    return "\n".join(lines)


def show_stats(name, data_dir, tokenizer):
    """Prints `stats` of each split that is there. FileNotFoundError where none is."""
    missing, splits = [], list(DATASETS[name][1] if name in DATASETS else ("train", "valid", "test"))
    for split in splits[:1] if Path(name).is_file() else splits:
        try:
            print(f"{name}, {split}: {stats(load(name, split, data_dir=data_dir), tokenizer)}\n")
        except FileNotFoundError as error:
            missing.append(error)
    if len(missing) == len(splits):
        raise missing[0]
    for error in missing:
        print(f"not there: {error}")


# ------------------------------------------------------------------------------- files and errors, for all programs


LARGEST = 2**26  # bytes of a JSON file that is read as a whole


def read_json(path):
    """ValueError, or OSError, with the path."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise FileNotFoundError(f"{path}: no such file")
        if Path(path).stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


@contextlib.contextmanager
def replacing(path):
    """A name beside `path`, for a file to be written there; it takes the place of `path` when it is on the disk. Readers see the old file
    or the whole new one, and where anything fails nothing is left of the new one."""
    temporary = Path(f"{path}.tmp")
    temporary.unlink(missing_ok=True)  # it may be a link to elsewhere
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # there are file systems that cannot do this to a directory
        sync(Path(path).parent)


def sync(path):
    """Brings a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_atomically(path, json.dumps(value, indent=1) + "\n")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the options)")


@contextlib.contextmanager
def one_line_errors():
    """What a user can get wrong (ValueError, OSError) ends in one line on stderr, of one process a machine, and exit
    code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        end(error, 2, show=os.environ.get("LOCAL_RANK", "0") == "0")


def complain(error):
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def end(error, code, show=True):
    if show:
        complain(error)
    sys.exit(code)


def run_program(main):
    try:
        main()
    except KeyboardInterrupt:
        end("interrupted", 130)


# --------------------------------------------------------------------------------------------------------- program


def main(argv=None):
    parser = Parser("data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("names", nargs="+", metavar="[stats] NAME",
                        help=f"of {', '.join(DATASETS)}; stats: of 'demo' or a path, too")  # fmt: skip
    parser.add_argument("--data_dir", default="datasets", help="where the data sets lie (default: 'datasets')")
    parser.add_argument("--tokenizer", help="stats: directory of a tokenizer, to count tokens with")
    with one_line_errors():
        options = parser.parse_args(argv)
        if options.names[0] == "stats":
            if not options.names[1:]:
                raise ValueError("stats of what? Name a data set, or a path")
            tokenizer = Tokenizer.from_pretrained(options.tokenizer) if options.tokenizer is not None else None
            for name in options.names[1:]:
                show_stats(name, options.data_dir, tokenizer)
        else:
            if unknown := [name for name in options.names if name not in DATASETS]:
                raise ValueError(f"no data set {unknown[0]!r}; there are {', '.join(DATASETS)}")
            for name in options.names:
                fetch(name, options.data_dir)


if __name__ == "__main__":
    run_program(main)
