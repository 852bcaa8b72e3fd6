"""Problems, tokenizers, rows and batches. Nothing here knows a model or a training method.

A problem is (question, steps, answer). A row is one problem laid out as token ids for one pathway; a batch is some
rows padded on the right. Which rows make which batch is a pure function of (seed, epoch), whatever the number of
processes.
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
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


def load(name_or_path, split, seed=0):
    """list[Problem] of a data set.

    name_or_path: 'demo' (the built-in task, its split drawn by `seed`), a directory that holds `split`.txt, or a file
    (which is then every split). split: 'train', 'valid' or 'test'. Files are in GSM8K-Aug's format, see `read_gsm8k_aug`.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"no split {split!r}; there are train, valid and test")
    if name_or_path == "demo":
        return demo_problems(seed)[split]
    path = Path(name_or_path)
    if path.is_dir():
        path = path / f"{split}.txt"
    return read_gsm8k_aug(path)


def read_gsm8k_aug(path):
    """A file of GSM8K-Aug (Deng et al. 2023): one problem a line, `question||<<step>> <<step>> #### answer`.

    There may be no step. Raises ValueError with file and line number, FileNotFoundError where there is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if lines[-1].strip() == "":
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    if lines[0].startswith("version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the data; fetch the file itself")
    problems = []
    for number, line in enumerate(lines, 1):
        question, bar, rest = line.partition("||")
        steps, hashes, answer = rest.rpartition("####")
        steps, question, answer = steps.split(), normalise(question), answer.strip()
        fault = None
        if not bar or not hashes:
            fault = "not of the form 'question||<<step>> <<step>> #### answer'"
        elif not question or not answer:
            fault = "the question is empty" if not question else "the answer is empty"
        elif bad := [step for step in steps if not (step.startswith("<<") and step.endswith(">>"))]:
            fault = f"the step {bad[0]!r} is not of the form <<...>>"
        if fault:
            raise ValueError(f"{path}:{number}: {fault}")
        problems.append(Problem(question, steps, answer))
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

NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?")


def parse_number(text):
    """The last number in a text as a float, None where there is none. Commas are dropped, 1/2 is read as 0.5, and a
    minus behind a digit is an operator: '$1,234.' -> 1234, '10-5' -> 5."""
    found = NUMBER.findall(text.replace(",", ""))
    if not found:
        return None
    numerator, _, denominator = found[-1].partition("/")
    if denominator and float(denominator) == 0:
        return None
    return float(numerator) / float(denominator or 1)


def score(text, gold):
    """(strict, tolerant): the answer's text is the gold text; or says the same number to 1e-6 relative, or, where the
    gold answer is no number, the same words whatever their case and final dot."""
    strict = text.strip() == gold.strip()
    want, got = parse_number(gold), parse_number(text)
    if want is None:
        return strict, text.strip().rstrip(".").lower() == gold.strip().rstrip(".").lower()
    return strict, strict or (got is not None and abs(got - want) <= 1e-6 * abs(want))


# -------------------------------------------------------------------------------------------------------- tokenizers

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                  r"\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Words:
    """The built-in task's vocabulary: a token is a word, a number or a sign. Spaces are not tokens."""

    def __init__(self, words):
        self.words = words
        self.ids = {word: i for i, word in enumerate(words)}

    def encode_ordinary(self, text):
        tokens = re.findall(r"<<|>>|\d+|[^\W\d]+|[^\w\s]", text)
        if unknown := [token for token in tokens if token not in self.ids]:
            raise ValueError(f"{unknown[0]!r} is not in the vocabulary of the tokenizer's words.json")
        return [self.ids[token] for token in tokens]

    def decode(self, ids):
        text = re.sub(r" ?(<<|>>|[-+%=:]) ?", r"\1", " ".join(self.words[i] for i in ids))
        return text.replace(">><<", ">> <<")


class Tokenizer:
    """Text to ids and back. bos_id and st_id (a reserved id that stands for <st>) are None where there is none."""

    def __init__(self, backend, files, size, eos_id, bos_id=None, st_id=None):
        self.backend, self.files, self.size = backend, files, size  # files: name -> bytes, to be saved with a run
        self.eos_id, self.bos_id, self.st_id = eos_id, bos_id, st_id

    @classmethod
    def from_pretrained(cls, directory):
        """The tokenizer of a directory: words.json (the built-in task's), Llama-3's tokenizer.model (tiktoken ranks), or
        GPT-2's vocab.json and merges.txt. Raises FileNotFoundError or ValueError, naming the file."""
        directory = Path(directory)
        for names, read in ((("words.json",), _words), (("tokenizer.model",), _llama3),
                            (("vocab.json", "merges.txt"), _gpt2)):  # fmt: skip
            if all((directory / name).is_file() for name in names):
                files = {name: (directory / name).read_bytes() for name in names}
                try:
                    return read(files)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{directory}: {' with '.join(names)}: {error}") from None
        raise FileNotFoundError(f"{directory}: no tokenizer: neither tokenizer.model (Llama 3), nor vocab.json and "
                                f"merges.txt (GPT-2), nor words.json")  # fmt: skip

    def save(self, directory):
        for name, content in self.files.items():
            (Path(directory) / name).write_bytes(content)

    def encode(self, text, *, bos, eos):
        """list of ids. bos and eos have no default, so that neither is forgotten nor doubled; a tokenizer without a BOS
        puts none. Names of special tokens inside the text are text."""
        ids = self.backend.encode_ordinary(text)
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


def demo_tokenizer():
    return _words({"words.json": json.dumps(DEMO_WORDS).encode()})


def _words(files):
    words = json.loads(files["words.json"])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or len(set(words)) < len(words):
        raise ValueError("not a list of different strings")
    if "<bos>" not in words or "<eos>" not in words:
        raise ValueError("<bos> or <eos> is missing")
    ids = {word: i for i, word in enumerate(words)}
    return Tokenizer(Words(words), files, len(words), ids["<eos>"], ids["<bos>"], ids.get("<st>"))


def _llama3(files):
    """Lines `base64(token) rank`; 256 special tokens follow the ranks. The first reserved one becomes <st>."""
    try:
        lines = [line.split() for line in files["tokenizer.model"].splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        raise ValueError("not Llama-3's format, 'base64 rank' on each line") from None
    n = len(ranks)
    if sorted(ranks.values()) != list(range(n)) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("the ranks are not 0, 1, 2, ... of different tokens with every single byte among them")
    special = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
               7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}  # fmt: skip
    reserved = iter(range(256))
    names = [special.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)]
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={f"<|{name}|>": n + i for i, name in enumerate(names)})  # fmt: skip
    return Tokenizer(encoding, files, n + 256, eos_id=n + 1, bos_id=n, st_id=n + 2)


def _gpt2(files):
    """vocab.json: token -> id, merges.txt: pairs in the order of their ids; bytes are spelled as printable characters."""
    vocab = json.loads(files["vocab.json"])
    end = "<|endoftext|>"
    if end not in vocab or vocab[end] != len(vocab) - 1:
        raise ValueError(f"{end} is not the last of the ids: not GPT-2's vocabulary")
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items() if token != end}
    merges = [line.split() for line in files["merges.txt"].decode().splitlines() if line and line[0:2] != "#v"]
    if sorted(ranks.values()) != list(range(256 + len(merges))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(f"{len(ranks)} tokens are not the 256 bytes and the {len(merges)} merges of merges.txt")
    for i, pair in enumerate(merges):
        if vocab.get("".join(pair)) != 256 + i:
            raise ValueError(f"merge {i} of merges.txt, {' '.join(pair)!r}, does not have the id {256 + i}")
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={end: vocab[end]})
    return Tokenizer(encoding, files, len(vocab), eos_id=vocab[end])


# -------------------------------------------------------------------------------------------------- rows and batches


class Row(NamedTuple):
    """One problem as a pathway sees it: ids [T]; ids[z:y] is what is learned of Z, ids[y:] is Y. So z_N, the last token
    of the separator, is at y - 1; z = y where nothing of Z is learned."""

    ids: np.ndarray
    z: int
    y: int


@dataclass
class Batch:
    """Rows padded on the right to T tokens, and the K tokens that are learned.

    ids [B, T]; row, col, weight [K]: token ids[row, col] counts with `weight`; at [B]: the index of z_N.
    """

    ids: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    weight: torch.Tensor
    at: torch.Tensor

    def to(self, device):
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def collate(rows, pad_id):
    """list[Row] -> Batch. Each token of a piece (Z, Y) weighs 1 / the piece's length: the two means of equation (1).

    The padding needs no mask: attention is causal, and no padded token is learned."""
    ids = np.full((len(rows), max(len(row.ids) for row in rows)), pad_id, dtype=np.int64)
    weight = np.zeros(ids.shape, dtype=np.float32)
    for i, (tokens, z, y) in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        weight[i, z:y] = 1 / max(y - z, 1)
        weight[i, y : len(tokens)] = 1 / (len(tokens) - y)
    row, col = weight.nonzero()
    arrays = ids, row, col, weight[row, col], np.array([row.y - 1 for row in rows])
    return Batch(*map(torch.from_numpy, arrays))


WINDOW, GROUP = 256, 16  # in global batches: rows are sorted by length within a window, and again within a group


def epoch_batches(lengths, batch_size, seed, epoch):
    """The global batches of one epoch: a list of index arrays [batch_size], a pure function of the arguments.

    lengths [N, P]: the tokens of each problem in each of P pathways, N >= batch_size. The problems are shuffled, windows of WINDOW batches
    sorted by their length in the last pathway, groups of GROUP batches therein by that in the first, cut into batches,
    and the batches shuffled: the rows of a batch are of about one length in every pathway, so that little is padding.
    What does not fill a batch waits for another epoch's shuffle.
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


def picture(row, tokenizer, width=100):
    """A row as text: each token, and below it what it weighs in the loss ('.' where it is not learned)."""
    cells = []
    for i, token in enumerate(row.ids.tolist()):
        if token == tokenizer.st_id or token >= tokenizer.size:
            text = "<st>"
        else:
            text = tokenizer.decode([token])
        length = row.y - row.z if row.z <= i < row.y else len(row.ids) - row.y
        cells.append((text.replace(" ", "_") if text.isprintable() else ascii(text)[1:-1],
                      "." if i < row.z else f"1/{length}"))  # fmt: skip
    lines, top, bottom = [], "", ""
    for token, weight in cells:
        size = max(len(token), len(weight)) + 1
        if len(top) + size > width:
            lines += [top.rstrip(), bottom.rstrip()]
            top, bottom = "", ""
        top, bottom = top + token.ljust(size), bottom + weight.ljust(size)
    return "\n".join([*lines, top.rstrip(), bottom.rstrip()])
