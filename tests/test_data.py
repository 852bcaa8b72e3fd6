"""data.py: readers, data sets, the built-in task, scoring, tokenizers, batches, options, files."""

import base64
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import operator
import os
import re
import resource
import shutil
import signal
import socketserver
import sys
import threading
import unicodedata
from collections import Counter

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import FIXTURES

import data
from data import Example, Problem, Tokenizer, option


# ------------------------------------------------------------------------------------- problems

RECORDS = [  # in the published formats, written for the purpose; below each what it says
    {"question": "2 and  3?", "answer": "#### 1: <<2+3=5>>5.\n<<5*2=10>>10\n#### 1,010"},
    Problem("2 and 3?", ["<<2+3=5>>", "<<5*2=10>>"], "1,010"),  # GSM8K
    {"input": "What is half?", "code": "def solution(): ...", "target": -0.0000015},
    Problem("What is half?", [], "-0.0000015"),  # GSM-HARD
    {"ID": "x", "Body": "Ann has 5 pens. ", "Question": "How many?", "Answer": 5.0},
    Problem("Ann has 5 pens. How many?", [], "5"),  # SVAMP
    {"iIndex": 0, "lEquations": ["X=8.0"], "lSolutions": [8.0], "sQuestion": " How many? "},
    Problem("How many?", [], "8"),  # MultiArith
    {"question": "Is Max a wumpus?", "steps": ["Max is a rorpus."], "answer": "No.", "root": 0},
    Problem("Is Max a wumpus?", ["Max is a rorpus."], "No."),  # ProsQA; CommonsenseQA-CoT
    {"question": "Q: Where?\nA: here", "answer": "B", "cot": "Not here. So it is there."},
    Problem("Q: Where?\nA: here", ["Not here.", "So it is there."], "B"),  # CommonsenseQA-CoT
    {"question": "A has 2, gets 3 ?", "cot": "<<2+3=5>> <<5*2=10>>", "answer": "10"},
    Problem("A has 2, gets 3 ?", ["<<2+3=5>>", "<<5*2=10>>"], "10"),  # a copy of GSM8K-Aug
    {"question": "q", "cot": "", "answer": "10"},
    Problem("q", [], "10"),
    {"question": "q", "steps": ["two"], "answer": "<<1+1=2>> #### 2"},
    Problem("q", ["two"], "2"),
]
GOOD = '{"question": "q", "answer": "1"}'


@pytest.mark.parametrize("record, problem", [*zip(RECORDS[::2], RECORDS[1::2])])
def test_load_reads_every_published_format(tmp_path, record, problem):
    (tmp_path / "test.jsonl").write_text(2 * f"{json.dumps(record)}\n")
    (tmp_path / "valid.json").write_text(json.dumps([record] * 2))
    assert data.load(tmp_path, "test") == data.load(tmp_path, "valid") == [problem, problem]


def test_load_reads_gsm8k_aug(tmp_path):
    """With a byte order mark, Windows' line ends, blanks in a row and bars in a question."""
    lines = ["\ufeffA  cow   eats 3.||<<3*2=6>> <<6/4=1.5>> #### 1.5", "No step?|| #### 1,600"]
    lines.append(" a | b ||<<1-3=-2>> #### -2")
    (tmp_path / "train.txt").write_bytes("\r\n".join(lines).encode())
    problems = [Problem("A cow eats 3.", ["<<3*2=6>>", "<<6/4=1.5>>"], "1.5")]
    problems += [Problem("No step?", [], "1,600"), Problem("a | b", ["<<1-3=-2>>"], "-2")]
    assert data.load(tmp_path, "train") == problems


@pytest.mark.parametrize("file", ["test.jsonl", "test.json"])
def test_load_reads_own_data_from_a_directory_or_a_file(tmp_path, file):
    own = {"question": "Two  and two? ", "steps": ["2+2", " is 4"], "answer": 4.0, "id": None}
    records = [own, {"question": "é", "answer": "no"}]
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    text = lines if file.endswith("l") else json.dumps(records, indent=1)
    (tmp_path / file).write_bytes(f"\ufeff{text}\n".encode())
    problems = [Problem("Two and two?", ["2+2", "is 4"], "4"), Problem("é", [], "no")]
    assert data.load(tmp_path, "test") == data.load(tmp_path / file, "valid") == problems


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("a.txt", "", "empty"),
        ("a.txt", "q||<<1=1>> #### 1\nno bars #### 2\n", ":2: not of the form"),
        ("a.txt", "q||<<1=1>> ####  \n1", ":1: answer: empty"),
        ("a.txt", "q||First he adds. #### 1\n", ":1: not of the form"),
        ("a.txt", "q||#### 1\n\nq||#### 1\n", ":2: not of the form"),
        ("a.txt", "q||#### 1\nq\xff||#### 1\n", ":2: not UTF-8"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("a.json", "[]", "there is no record"),
        ("a.json", f"[{GOOD}, 3]", ": record 2: "),
        ("a.json", f'[{GOOD}, {{"question": "q"}}]', ": record 2: the field 'answer' is missing"),
        ("a.json", "[" * 100_000, ":1: not JSON"),
        ("a.jsonl", f'{GOOD}\n{{"question": "q"}}', ":2: the field 'answer' is missing"),
        ("a.jsonl", f"{GOOD}\n\n{GOOD}", ":2: not JSON"),
        ("a.jsonl", '{"question": "q", "steps": "s", "answer": "1"}', ":1: steps is 's', not a"),
        ("a.jsonl", '{"question": "q", "steps": [null], "answer": "1"}', ":1: steps is None"),
        ("a.jsonl", '{"question": "q", "rationale_steps": [], "answer": "1"}', "'rationale_steps'"),
        (
            "a.jsonl",
            '{"Body": "b", "Question": "q", "cot": "c", "Answer": 1}',
            "field 'cot' is not",
        ),
        ("a.jsonl", '{"question": "q", "steps": ["s"], "cot": "c", "answer": "1"}', "or there is"),
        ("a.jsonl", '{"question": "q", "question": "p", "answer": "1"}', ":1: not JSON"),
        ("a.txt", "q||<<1=1>> << >> #### 1", ":1: not of the form"),
        ("a.jsonl", '{"question": "q", "answer": true}', ":1: answer is True, not text or"),
        ("a.jsonl", '{"question": "q", "answer": 1e999}', ":1: answer is inf"),
        (
            "a.jsonl",
            '{"question": "q\\ud800", "answer": "1"}',
            ":1: question: empty, or half a character",
        ),
        ("a.jsonl", '{"sQuestion": "q", "lSolutions": [null]}', ":1: lSolutions is None"),
        ("a.jsonl", '{"sQuestion": "q", "lSolutions": "18"}', ":1: too many values"),
    ],
)
def test_load_names_file_line_and_field_of_what_is_malformed(tmp_path, file, text, message):
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / file}:") + ".*" + message[1:]):
        data.load(tmp_path / file, "train")


@pytest.mark.parametrize("name", ["valid.txt", "val.json", "dev.jsonl"])
def test_load_knows_the_names_of_a_validation_split(tmp_path, name):
    text = {"txt": "q||#### 1", "json": f"[{GOOD}]", "jsonl": GOOD}[name.split(".")[1]]
    (tmp_path / name).write_text(text)
    assert data.load(tmp_path, "valid") == [Problem("q", [], "1")]
    (tmp_path / "valid.jsonl").write_text(GOOD)
    with pytest.raises(ValueError, match=f"both valid.jsonl and {name}"):
        data.load(tmp_path, "valid")


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="valid.jsonl: no such file"):
        data.load(tmp_path, "valid")
    with pytest.raises(FileNotFoundError, match=r"nowhere: .* no data set \(demo, calls, gsm"):
        data.load("nowhere", "valid")
    with pytest.raises(ValueError, match="svamp has no train split"):
        data.load("svamp", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="gsm8k has no valid split; --eval_size 0"):
        data.load("gsm8k", "valid", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="SVAMP.json: no such file; python data.py svamp"):
        data.load("svamp", "test", data_dir=tmp_path)


# -------------------------------------------------------------------------- published data sets

CONTENT = b"".join(b"question %d||<<%d*2=%d>> #### %d\n" % (i, i, 2 * i, i) for i in range(50))
WHOLE = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT
BROKEN, OTHER = WHOLE[:-500], WHOLE.replace(b"question 7", b"question 8")
MISSING = b"HTTP/1.0 404 Not Found\r\n\r\n"


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while self.rfile.readline().strip():
            pass
        self.wfile.write(self.server.script.pop(0))


@pytest.fixture
def server(monkeypatch):
    """Serves a data set of one small file: the answers of `server.script`, in turn."""
    server = socketserver.TCPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/train.txt"
    digest = hashlib.sha256(CONTENT).hexdigest()[:32]
    server.published = data.Published("train.txt", 50, digest, url)
    monkeypatch.setitem(data.DATASETS, "gsm8k-aug", {"train": server.published})
    yield server
    server.shutdown()
    server.server_close()


def test_fetch_leaves_the_whole_file_or_nothing(tmp_path, server):
    command = ["gsm8k-aug", "--data_dir", str(tmp_path)]
    for answer, message in ((MISSING, ".*404"), (BROKEN, ".* bytes"), (OTHER, "the checksum")):
        server.script = [answer]
        with pytest.raises(ValueError, match=f"train.txt: {message}"):
            data.main(command)
        assert not server.script and not list((tmp_path / "gsm8k-aug").iterdir())
    server.script = [WHOLE]
    data.main(command)
    data.main(command)  # the file is there: one more request would have no answer
    assert [path.read_bytes() for path in (tmp_path / "gsm8k-aug").iterdir()] == [CONTENT]


def test_load_checks_a_published_file(tmp_path, server, monkeypatch):
    def load(digest, count):
        published = server.published._replace(digest=digest, count=count)
        monkeypatch.setitem(data.DATASETS, "gsm8k-aug", {"train": published})
        return data.load("gsm8k-aug", "train", data_dir=tmp_path)

    (tmp_path / "gsm8k-aug").mkdir()
    (tmp_path / "gsm8k-aug" / "train.txt").write_bytes(CONTENT)
    git = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()[:32]
    assert len(load(git, 50)) == len(load("-", 50)) == 50
    with pytest.raises(ValueError, match="train.txt: the checksum is not"):
        load(32 * "0", 50)
    for count in (49, 51):
        with pytest.raises(ValueError, match=f"train.txt: 50 problems, expected {count}"):
            load(git, count)


def test_datasets_have_the_sizes_of_table_7():
    counts = [p.count for splits in data.DATASETS.values() for p in splits.values()]
    assert counts[:7] == [385_620, 500, 1_319, 7_473, 1_319, 1_319, 1_000]
    assert counts[7:] == [600, 17_886, 300, 500, 8_096, 1_221]


def test_stats_count_steps_answers_and_tokens():
    problems = [Problem("sam has 7 pens", ["<<7+5=12>>", "<<12%4=0>>"], "0")]
    problems += [Problem("ann ?", ["<<7+5=12>>"], "12"), Problem("bob", [], "pens Answer")]
    text = data.stats(problems, data.demo_tokenizer())
    assert "3 problems" in text and "{'number': 2, 'sentence': 1}" in text
    assert "{0: 1, 1: 1, 2: 1}" in text and "1 with an empty CoT, 2 without the last step" in text
    tokens = ["mean 2.3, longest 4", "mean 7.0, longest 14", "mean 1.3, longest 2"]
    assert re.findall("mean .*", text) == tokens  # of the question, the steps, the answer


# ---------------------------------------------------------------------------- the built-in task


def arithmetic_of(problem):
    """(x, op, y, p) of a problem, from its question alone."""
    _, _, x, _, verb, y, _, _, p, _ = problem.question.split()
    return int(x), "+" if verb in data.VERBS["+"] else "-", int(y), int(p)


def test_demo_problems_hold_out_compositions_of_known_facts():
    splits = data.demo_problems(0)
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [1820, 200, 500]
    contents = [arithmetic_of(problem) for split in splits.values() for problem in split]
    assert len(set(contents)) == 2520  # so no two splits share one
    facts = Counter()
    for split in ("train", "valid", "test"):
        for problem in splits[split]:
            x, op, y, p = arithmetic_of(problem)
            value = x + y if op == "+" else x - y
            steps = [f"<<{x}{op}{y}={value}>>", f"<<{value}%{p}={value % p}>>"]
            assert (problem.steps, problem.answer) == (steps, str(value % p)) and value >= 1
            both = [(x, op, y), (value, p)]
            facts.update(both if split == "train" else ())
            assert split == "train" or all(facts[fact] >= 4 for fact in both)
    assert splits == data.demo_problems(0) and splits["test"] != data.demo_problems(1)["test"]
    p = np.array([arithmetic_of(problem)[3] for problem in splits["test"]])
    assert data.demo_chance(splits["test"]) == pytest.approx(np.mean(1 / p))


def test_calls_are_right_and_those_who_pass_news_on_do_so_in_one_split():
    splits = {split: data.load("calls", split, 3) for split in (*data.HELD_OUT, "train")}
    chains = {}
    assert {name: len(some) for name, some in splits.items()} == data.HELD_OUT | {"train": 1500}
    for split, problem in ((name, problem) for name, some in splits.items() for problem in some):
        told = dict(re.findall(r"(\w+) calls (\w+)", problem.question))
        chain = re.findall(r"\. (\w+) has news\. Who has it after three calls\?$", problem.question)
        for _ in range(3):
            chain.append(told[chain[-1]])
        steps = [f"<<{a} calls {b}>>" for a, b in itertools.pairwise(chain)]
        assert problem[1:] == (steps, chain[-1]) and len(set(chain)) == 4
        assert len(told) == 7 and told.keys() == set(told.values())
        chains.setdefault(split, set()).add(tuple(chain))
    assert not chains["train"] & (chains["valid"] | chains["test"])
    assert splits["test"] != data.load("calls", "test", 4)


# -------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "gold, right, wrong",
    [
        ("18", ["18", " 18\n", "18.0", "18 eggs", "The answer is...18"], ["", "71", "-18", "1,8"]),
        ("1450000", ["1,450,000", "1.45e6"], ["1,450"]),
        ("7", ["$7.", "7.0"], ["7/0", "seven"]),
        ("5", ["10-5", "(3)-5", "No.5", "25/5"], ["1e999", "-5"]),
        ("-5", ["\u20135", "\u22125", "-$5", "-€5", "-£5", "-¥5", "-4 2/2"], ["10-5"]),
        ("12345", ["12,345"], ["1,2345"]),
        ("0.5", [".5", "1/2", "1 / 2"], ["5"]),
        ("2.5", ["2 1/2"], ["1/2"]),
        ("-1234.5", ["-$1,234.50."], []),
        ("50%", ["50"], []),
        ("14053029", [], ["14053030"]),
        ("14053029.666666666", ["14053029.6667", "14053029.67"], ["14053029.7"]),
        ("9284017268534.4", ["9284017268534.41"], ["9284017268534.43"]),
        ("0.33333333333", ["0.3333333"], ["0.33333"]),
        ("2.0107e-06", ["0.0000020107"], []),
        ("1e999", ["1e999"], ["5", "1" + "0" * 400]),
        ("5 or 6 of them", [], ["about 5"]),
        ("Jack is a boompus.", ["jack is a  boompus", "Jack is a boompus. "], ["", "Jack is a"]),
        ("C", ["C", "C.", "(C)", "C: a habitat", "C - a habitat", "C\nBecause"], ["", "c", "D"]),
        ("C", ["The answer is C.", "Answer: C"], ["CD", "C or D", "C) or D)", "C bank"]),
    ],
)
def test_score(gold, right, wrong):
    """right: numeric match, and exact where it is the gold text; wrong: neither."""
    assert [data.score(text, gold) for text in right] == [(t.strip() == gold, True) for t in right]
    assert [data.score(text, gold) for text in wrong] == [(False, False)] * len(wrong)


# ----------------------------------------------------------------------------------- tokenizers

KINDS = ["llama3", "qwen2", "gpt2", "vocab-qwen2", "vocab-gpt2", "ranks", "sentencepiece", "words"]
LLAMA3 = 128_000  # ranks


def fixture_json(name, file="tokenizer.json"):
    return json.loads((FIXTURES / f"tokenizer-{name}" / file).read_text())


TEXTS = ["Answer:12345 <<1+2=3>>", "a\n\n  b", "<s></s><|begin_of_text|><|endoftext|>b", "-18"]
TEXTS += ["héllo  wörld", "日本 🙂👍🏽 \u2028", "", "a<unk> <|eot_id|><|im_end|>"]
TEXTS += fixture_json("gpt2", "expected.json")["texts"]
DEMO_TEXTS = ["sam has 7 pens gets 5 packs of 4 ?", "<<7+5=12>> <<12%4=0>>", "12", "Answer:"]


def write_vocab_and_merges(directory, name):
    """The files of a fixture's tokenizer.json in the older format."""
    raw, config = fixture_json(name), fixture_json(name, "tokenizer_config.json")
    vocab, added = raw["model"]["vocab"], raw["added_tokens"]
    if name == "gpt2":
        vocab |= {token["content"]: token["id"] for token in added}
    else:
        config |= {"added_tokens_decoder": {token["id"]: token for token in added}}
    lines = ["#version: 0.2", *map(" ".join, raw["model"]["merges"])]
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_llama3_ranks(path):
    """Bytes, some tokens, and such as no text has."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [b"An", b"sw", b"er", b"swer", b"Answer", b"12", b"123", b"1234", b":-"]
    never = map(bytes, itertools.product(range(0xC0, 0x100), repeat=3))
    tokens += itertools.islice(never, LLAMA3 - len(tokens))
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))


def write_sentencepiece(directory, **more):
    """A SentencePiece model with Llama 2's settings, and its tokenizer.json."""
    model, lines = io.BytesIO(), ["Answer: 12 <<3*4=12>> and how many apples she has left"] * 20
    options = dict(model_type="bpe", vocab_size=300, byte_fallback=True, split_digits=True)
    options |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    options |= dict(sentence_iterator=iter(lines), model_writer=model, minloglevel=2, num_threads=1)
    sentencepiece.SentencePieceTrainer.train(**options | more)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    write_sentencepiece_json(directory)


def write_sentencepiece_json(directory):
    """The tokenizer.json that says the same as a tokenizer.model, but that nothing is put first."""
    proto = (directory / "tokenizer.model").read_bytes()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    by_score = sorted(vocab, key=lambda text: -pieces.get_score(vocab[text]))
    cuts = [(text[:i], text[i:]) for text in by_score for i in range(1, len(text))]
    merges = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    bpe = dict(type="BPE", vocab=vocab, merges=merges, unk_token="<unk>")
    raw = dict(version="1.0", model=bpe | dict(byte_fallback=True, fuse_unk=True))
    raw["added_tokens"] = [data.added_token(i, t) for i, t in enumerate(("<unk>", "<s>", "</s>"))]
    (directory / "tokenizer.json").write_text(json.dumps(raw))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{kind: (directory, Tokenizer)} of every kind that is read."""
    found = {name: FIXTURES / f"tokenizer-{name}" for name in KINDS[:3]}
    found |= {kind: tmp_path_factory.mktemp(kind) for kind in KINDS[3:]}
    write_vocab_and_merges(found["vocab-qwen2"], "qwen2")
    write_vocab_and_merges(found["vocab-gpt2"], "gpt2")
    write_llama3_ranks(found["ranks"] / "tokenizer.model")
    write_sentencepiece(found["sentencepiece"])
    (found["words"] / "words.json").write_text(json.dumps(data.DEMO_WORDS))
    return {kind: (path, Tokenizer.from_pretrained(path)) for kind, path in found.items()}


def plain_ids(tokenizer, text):
    return tokenizer.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "gpt2", "vocab-qwen2", "vocab-gpt2"])
def test_tokenizer_gives_the_ids_of_hugging_face(tokenizers, kind):
    """Patterns, several merges for a token, NFC, added words, names of special tokens."""
    expected = fixture_json(kind.removeprefix("vocab-"), "expected.json")
    ids = [plain_ids(tokenizers[kind][1], text) for text in expected["texts"]]
    assert ids == expected["ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_decodes_what_it_encodes(tokenizers, kind):
    tokenizer = tokenizers[kind][1]
    for text in DEMO_TEXTS if kind == "words" else TEXTS:
        text = unicodedata.normalize("NFC", text) if "qwen2" in kind else text
        assert tokenizer.decode(plain_ids(tokenizer, text)) == text
    last, n = plain_ids(tokenizer, "7"), tokenizer.size  # a model may have more ids
    assert tokenizer.decode([*last, n, *last, n + 7]).replace(" ", "") == "7\ufffd7\ufffd"


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_tokenizer_reads_names_of_special_tokens_as_text(tokenizers, kind):
    tokenizer = tokenizers[kind][1]
    for name, i in tokenizer.added.items():
        assert (i in plain_ids(tokenizer, f"a {name} b")) == (name == "<tool_call>")
    ids = plain_ids(tokenizer, "7")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert tokenizer.encode("7", bos=True, eos=True) == [*bos, *ids, tokenizer.eos_id]
    with pytest.raises(TypeError):
        tokenizer.encode("7")


def test_tokenizer_knows_its_special_tokens(tokenizers):
    def about(kind):
        tokenizer = tokenizers[kind][1]
        return tokenizer.size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.reserved

    assert about("llama3") == (423, 420, 421, (422,))
    assert about("qwen2") == about("vocab-qwen2") == (423, None, 421, ())
    assert about("gpt2") == about("vocab-gpt2") == (421, None, 420, ())
    assert about("ranks") == (LLAMA3 + 256, LLAMA3, LLAMA3 + 1, (LLAMA3 + 2, LLAMA3 + 3))
    assert about("sentencepiece") == (300, 1, 2, ())
    assert about("words") == (len(data.DEMO_WORDS), 0, 1, (2,))


def test_tokenizer_of_llama3_ranks_merges_by_rank(tokenizers):
    tokenizer = tokenizers["ranks"][1]
    assert plain_ids(tokenizer, "Answer:12345") == [260, ord(":"), 262, ord("4"), ord("5")]
    assert plain_ids(tokenizer, "Answer:-") == [260, 264]  # pieces are encoded one by one
    names = {2: "reserved_special_token_0", 5: "reserved_special_token_2", 9: "eot_id"}
    names |= {11: "reserved_special_token_3", 255: "reserved_special_token_247"}
    assert {i: tokenizer.decode([LLAMA3 + i])[2:-2] for i in names} == names


def test_tokenizer_of_sentencepiece_puts_no_blank_before_what_continues(tokenizers):
    """Else the state at z_N, which is to hold the answer, would predict a blank."""
    path, tokenizer = tokenizers["sentencepiece"]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    assert all(plain_ids(tokenizer, text) == theirs.encode(text) for text in TEXTS)
    ids = tokenizer.encode("12", bos=False, eos=False, continued=True)
    assert plain_ids(tokenizer, "") + plain_ids(tokenizer, "12") == [theirs["▁"], *ids]


@pytest.mark.parametrize("text", ["sam has 3 zebra", "x" * 500_001, "half \ud800"])
def test_tokenizer_refuses_a_text_that_has_no_ids(text):
    with pytest.raises(ValueError, match="'zebra' is not in the|500001 characters|half a char"):
        data.demo_tokenizer().encode(text, bos=True, eos=True)


def test_tokenizer_configuration_names_the_ends(tmp_path):
    shutil.copytree(FIXTURES / "tokenizer-llama3", tmp_path, dirs_exist_ok=True)
    config = {"eos_token": {"content": "<|reserved_special_token_0|>"}, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 422)


def test_added_tokens_may_begin_alike_and_the_first_reserved_one_is_exported(tmp_path):
    raw = fixture_json("llama3")
    raw["added_tokens"] += [
        added(data.RESERVED[2], 423, True),
        added("[a", 424),
        added("[ab]", 425),
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert plain_ids(tokenizer, "[ab][a") == [425, 424]
    assert tokenizer.export(True)[1] == tokenizer.reserved[0] == 422


VARIANTS = {  # what published tokenizer.json files have beside the fixture's
    "digits": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            ],
        }
    },
    "empty normalizer": {"normalizer": {"type": "Sequence", "normalizers": []}},
    "normalized words": {"normalizer": {"type": "NFC"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_tokenizer_json_give_the_ids_of_hugging_face(tmp_path, variant):
    library = pytest.importorskip("tokenizers")
    raw = fixture_json("gpt2") | VARIANTS[variant]
    more = [added("<calc>", 421, normalized=True), added("[a]", 422), added("[PAD]", 423, True)]
    raw["added_tokens"] += more
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    ours = Tokenizer.from_pretrained(tmp_path)
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [
        "12 eggs <calc> a  1 b",
        "3.50<calc>[a]",
        "a\n 12\n\n 3",
        "x   ½ ²3 '1's 2's \u0664 -7 ",
    ]
    texts += [t for t in fixture_json("gpt2", "expected.json")["texts"] if "<|" not in t]
    for text in texts:  # theirs reads the names of special tokens
        assert plain_ids(ours, text) == theirs.encode(text, add_special_tokens=False).ids


def test_a_vocabulary_without_some_bytes_reads_texts_without_them(tmp_path):
    raw = fixture_json("gpt2")
    last = len(raw["model"]["vocab"]) - 1
    token = next(token for token, i in raw["model"]["vocab"].items() if i == last)
    raw["model"]["vocab"].pop(token)
    raw["model"]["merges"].pop()
    byte = raw["model"]["vocab"].pop("ÿ")
    raw["model"]["vocab"] = {t: i - (i > byte) for t, i in raw["model"]["vocab"].items()}
    raw["added_tokens"][0]["id"] = last - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(plain_ids(tokenizer, "12 é")) == "12 é"
    odd = b"\xf0\x9f\xbf\xbf".decode()
    assert tokenizer.decode(plain_ids(tokenizer, odd)) == odd
    tokenizer.lacks = {0xBF}
    with pytest.raises(ValueError, match="lacks the byte 191"):
        plain_ids(tokenizer, odd)


def test_added_tokens_beside_other_files(tokenizers, tmp_path):
    """added_tokens.json, and added_tokens_decoder alone; a special one is no part of a text."""
    write_vocab_and_merges(tmp_path, "gpt2")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 421, "<calc>": 422}')
    gpt2 = Tokenizer.from_pretrained(tmp_path)
    assert (gpt2.size, gpt2.eos_id) == (423, 420)
    a, b = plain_ids(gpt2, "a "), plain_ids(gpt2, " b")
    assert plain_ids(gpt2, "a <calc> b") == [*a, 422, *b]
    assert 421 not in plain_ids(gpt2, "a [PAD] b") and gpt2.decode([*a, 421]) == "a [PAD]"

    llama2 = tmp_path / "llama2"
    llama2.mkdir()
    shutil.copy(tokenizers["sentencepiece"][0] / "tokenizer.model", llama2)
    tokens = {"300": added("<|im_end|>", 0, True), "301": added("<calc>", 0)}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": tokens}
    (llama2 / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, plain = Tokenizer.from_pretrained(llama2), tokenizers["sentencepiece"][1]
    assert (tokenizer.size, tokenizer.eos_id) == (302, 300)
    b = plain.encode(" b", bos=False, eos=False, continued=True)
    ids = plain_ids(tokenizer, "a <calc> b")
    assert ids == [*plain_ids(plain, "a "), 301, *b] and tokenizer.decode(ids) == "a <calc> b"


@pytest.mark.parametrize("kind", ["vocab-qwen2", "sentencepiece", "words"])
def test_tokenizer_is_saved_as_it_was_read(tokenizers, kind, tmp_path):
    source, tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path)
    copies = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert copies == {path.name: path.read_bytes() for path in source.iterdir()}
    assert Tokenizer.from_pretrained(tmp_path).digest == tokenizer.digest


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "gpt2", "sentencepiece", "words"])
def test_exported_tokenizer_gives_the_same_ids(tokenizers, kind, tmp_path):
    """To our own reader, and to Hugging Face's, where <st> and what is behind it are ids, too."""
    tokenizer = tokenizers[kind][1]
    files, st_id = tokenizer.export(with_st=True)
    assert st_id == (tokenizer.reserved or [tokenizer.size])[0]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    special = re.compile(r"<(/?s|unk|\|.*\|)>")  # Hugging Face's library would not read it as text
    texts = DEMO_TEXTS if kind == "words" else TEXTS
    texts = [text for text in texts if text and text[0] != " " and not special.search(text)]
    for text in texts:
        assert plain_ids(again, text) == plain_ids(tokenizer, text)
    library = pytest.importorskip("tokenizers")
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    behind = tokenizer.encode("Answer:", bos=False, eos=False, continued=True)
    for text in texts:
        ids = tokenizer.encode(text, bos=True, eos=False)
        assert theirs.encode(text + "<st><st>Answer:").ids == [*ids, st_id, st_id, *behind]


def added(name, i, special=False, **flags):
    return data.added_token(i, name, special) | flags


def template(*names):
    """A post_processor that puts tokens around a text, None."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    parts = [{"SpecialToken": {"id": n, "type_id": 0}} if n else text for n in names]
    return {"type": "TemplateProcessing", "single": parts, "pair": [], "special_tokens": {}}


REFUSED = [  # what is changed in a tokenizer.json, by its path
    ("model.type", "Unigram", "model.type Unigram"),
    ("model.byte_fallback", True, "model.byte_fallback"),
    ("normalizer", {"type": "Lowercase"}, "normalizer Lowercase"),
    ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer .*Metaspace"),
    ("pre_tokenizer.pretokenizers.0.invert", True, "pre_tokenizer"),
    ("pre_tokenizer.pretokenizers.0.behavior", "Removed", "pre_tokenizer"),
    ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\w+"}, "pre_tokenizer"),
    ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "pre_tokenizer"),
    ("model.merges.3", ["q", "zzz"], "the merge 'q zzz'"),
    ("model.merges.150", ["Ġ", "ĠĠ"], "do not make the token 'ĠĠĠ'"),  # a second run's
    ("model.merges", [], "made by no merge"),
    ("model.merges.0", ["æĹ", "¥æľ¬è"], "not in the order"),
    ("model.vocab.a", 5, "ids of the 423 tokens are not 0 to 422"),
    ("model.vocab.日", 5, "'日' is not spelled in bytes"),
    ("added_tokens.1.content", "</s>", r"end token '<\|im_end\|>'"),
    ("added_tokens.2.lstrip", True, "added token '<tool_call>'"),
    ("added_tokens.2", added("é", 422, normalized=True), "not ASCII"),
    ("added_tokens.2.id", 421, "the id 421 is of both"),
    ("added_tokens.2.content", "<|im_end|>", "has two ids"),
    ("post_processor", {"type": "RobertaProcessing"}, "post_processor RobertaProcessing"),
    ("post_processor", template("a", "b", None), "post_processor a, b"),
    ("post_processor", template(None, "a"), "post_processor a"),
]


@pytest.mark.parametrize("path, value, message", REFUSED)
def test_tokenizer_json_that_means_something_else_is_refused(tmp_path, path, value, message):
    shutil.copytree(FIXTURES / "tokenizer-qwen2", tmp_path, dirs_exist_ok=True)
    raw, keys = fixture_json("qwen2"), [int(k) if k.isdigit() else k for k in path.split(".")]
    functools.reduce(operator.getitem, keys[:-1], raw)[keys[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}"):
        Tokenizer.from_pretrained(tmp_path)


MERGES = {"merges.txt": "", "vocab.json": '{"a": 0, "<|endoftext|>": 1}'}


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no tokenizer: words.json, nor"),
        ({"tokenizer.model": "\x0a\x0esentencepiece"}, "neither Llama 3's ranks nor a Sentence"),
        ({"tokenizer.model": "YQ== 0\nYg==\n"}, "tokenizer.model: "),
        ({"tokenizer.model": "YQ== 0\nYg== 5\n"}, "2 ranks, not Llama 3's"),
        ({"words.json": '["a"]'}, "words.json: .*'<eos>'"),
        ({"tokenizer.json": "[" * 100_000}, "tokenizer.json: not JSON"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: the field 'model' is missing"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "end token None"),
        (MERGES | {"merges.txt": "a b"}, "the merge 'a b'"),
        (MERGES | {"tokenizer_config.json": '{"tokenizer_class": "Bart"}'}, "Bart is not supp"),
        (MERGES | {"tokenizer_config.json": '{"add_prefix_space": true}'}, "add_prefix_space"),
        (MERGES | {"tokenizer_config.json": '{"add_bos_token": true}'}, "add_bos_token is not"),
        (MERGES | {"tokenizer_config.json": "{"}, "tokenizer_config.json: not JSON"),
        (MERGES | {"added_tokens.json": '{"<t>": 1}'}, "the token '<.endoftext.>' is not"),
        (MERGES | {"added_tokens.json": '{"<t>": 3}'}, "ids of the 3 tokens are not 0 to 2"),
    ],
)
def test_tokenizer_that_is_broken_or_unknown_is_named(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path}.*{message}"):
        Tokenizer.from_pretrained(tmp_path)


WORD = {"added_tokens": [added("<calc>", 300)]}
BESIDE = [  # a SentencePiece model
    ({"tokenizer_config.json": {"add_prefix_space": False}}, "this add_prefix_space is not"),
    ({"tokenizer_config.json": {"bos_token": {"content": "</s>"}}}, "bos_token '</s>'"),
    ({"tokenizer.json": {"model": {"vocab": {"<unk>": 0, "<s>": 2}}}}, "another vocabulary"),
    ({"tokenizer.json": WORD | {"normalizer": {"type": "Prepend"}}}, "added words beside"),
    ({"tokenizer.json": WORD, "tokenizer_config.json": {"legacy": True}}, "added words beside"),
]


@pytest.mark.parametrize("files, message", BESIDE)
def test_files_that_contradict_a_sentencepiece_model(tokenizers, tmp_path, files, message):
    shutil.copy(tokenizers["sentencepiece"][0] / "tokenizer.model", tmp_path)
    Tokenizer.from_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_no_export_of_a_tokenizer_that_changes_texts(tmp_path):
    write_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc")
    with pytest.raises(ValueError, match="no export"):
        Tokenizer.from_pretrained(tmp_path).export(True)


# -------------------------------------------------------------------------- examples and batches


def test_collate_weighs_each_piece_by_its_length():
    examples = [Example(np.array([5, 6, 7, 8, 9, 1]), 3, 4, 2, 0)]  # N = 1, M = 2
    examples.append(Example(np.array([5, 9, 1]), 1, 1, 1, 0))  # N = 0, M = 2
    batch = data.collate(examples, pad_id=3)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 1], [5, 9, 1, 3, 3, 3]]
    weights = torch.zeros(2, 6)
    weights[batch.target_row, batch.target_col] = batch.weights
    z, y = 1 / 1 / 2, 1 / 2 / 2  # 1/N and 1/M, divided by B
    assert weights.tolist() == [[0, 0, 0, z, y, y], [0, y, y, 0, 0, 0]]
    assert batch.z_n.tolist() == [3, 0] and batch.lengths.tolist() == [6, 3]
    assert batch.latent_start.tolist() == [2, 1] and batch.n_latents == 0
    assert batch.first_needed == 0 and data.collate(examples[:1], pad_id=3).first_needed == 2


def lengths_like_gsm8k(n):
    """[n, 2] tokens in the CoT and the ST pathway, spread as those of GSM8K-Aug."""
    means, spreads = [[4.0], [2.6]], [[0.37], [0.6]]
    question, steps = np.random.default_rng(0).lognormal(means, spreads, (2, n)).astype(int)
    return np.stack([question + steps, question + 20], axis=1)


def test_epoch_batches_are_a_function_of_seed_and_epoch():
    lengths = lengths_like_gsm8k(1000)
    batches = np.array(data.epoch_batches(lengths, 16, 3, 1))
    assert batches.shape == (62, 16) and len(np.unique(batches)) == batches.size  # nobody twice
    assert np.array_equal(batches, data.epoch_batches(lengths, 16, 3, 1))
    for other in ((4, 1), (3, 2), (2, 2)):
        assert not np.array_equal(batches, data.epoch_batches(lengths, 16, *other))


def test_epoch_batches_hold_little_padding_in_both_pathways():
    lengths = lengths_like_gsm8k(32 * 512)
    batches = data.epoch_batches(lengths, 32, 0, 0)
    useful = sum(lengths[batch].sum(axis=0) for batch in batches)
    padded = sum(32 * lengths[batch].max(axis=0) for batch in batches)
    assert (useful / padded > 0.95).all()
    mean = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(mean[:-1], mean[1:])[0, 1]) < 0.2  # in no order of length


def test_picture_shows_tokens_and_weights():
    tokenizer = data.demo_tokenizer()
    ids = tokenizer.encode("sam has 7", bos=True, eos=False) + [2, len(data.DEMO_WORDS)]
    ids += plain_ids(tokenizer, "Answer:") + [*plain_ids(tokenizer, "3"), tokenizer.eos_id]
    silent = Example(np.array(ids), 8, 8, 0, 0)
    assert data.picture(silent, tokenizer).split("\n") == [
        "<bos> sam has 7 <st> <st> Answer : 3   <eos>",
        ".     .   .   . .    .    .      . 1/2 1/2",
    ]
    latent = Example(np.array([0, 2, 2, 2, 2, *ids[6:]]), 5, 7, 2, 2)
    assert data.picture(latent, tokenizer, width=40).split("\n") == [
        "<bos> <bot> <thought> <thought> <eot>",
        ".     .     .         .         .",
        "Answer :   3   <eos>",
        "1/2    1/2 1/2 1/2",
    ]


# -------------------------------------------------------------------- options, files and errors


@dataclasses.dataclass
class Options:
    mode: str = option("a", "mode", "a b")
    n: int = option(3, "number", low=1)
    rate: float = option(0.5, "rate", high=1)
    fast: bool = option(False, "fast")
    sets: tuple = option((), "sets")
    ask: str | None = option(None, "question")


def test_parse_options_reads_every_kind_of_option():
    assert data.parse_options(Options, [], "") == Options()
    words = "--mode b --n 7 --rate=1 --fast --sets x y --ask"
    every = Options("b", 7, 1.0, True, ("x", "y"), "")
    assert data.parse_options(Options, words.split(), "") == every
    options = data.parse_options(Options, ["--ask", "q", "--no-fast"], "", {"n": 9})
    assert options == Options(n=9, ask="q")


WRONG = ["--mode c", "--n 0", "--n 1e3", "--n 99999999999999999999", "--n", "--rate -0.1"]


@pytest.mark.parametrize("words", [*WRONG, "--rate nan", "--rate 2", "--nn 3", "--rat 1"])
def test_parse_options_names_what_is_wrong(words):
    with pytest.raises(ValueError, match=words.split()[0]):
        data.parse_options(Options, words.split(), "")


@pytest.mark.parametrize("value", [True, 1.5, "3", None, [3], 0])
def test_check_options_refuses_values_of_another_type_or_size(value):
    with pytest.raises(ValueError, match="--n "):
        data.check_options(Options(n=value))


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff"])
def test_read_json_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json: not JSON"):
        data.read_json(tmp_path / "a.json")


def test_replacing_writes_the_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    data.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), data.replacing(path) as temporary:
        temporary.write_text("new, but only hal")
        assert path.read_text() == "old"
        1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    (tmp_path / "file.tmp").symlink_to(tmp_path / "elsewhere")  # is not followed
    with data.replacing(path) as temporary:
        temporary.chmod(0o600)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert path.read_text() == "" and sorted(os.listdir(tmp_path)) == ["file", "other"]
    synced = []
    monkeypatch.setattr(data, "sync", lambda where: synced.append((where, path.read_text())))
    data.write_text(path, "new")
    assert synced == [(tmp_path / "file.tmp", ""), (tmp_path, "new")]


class InductorError(RuntimeError):
    __module__ = "torch._inductor.exc"


def test_append_line_writes_a_whole_line_or_nothing(tmp_path):
    path = tmp_path / "log"
    data.append_line(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="log"):
            data.append_line(path, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    data.append_line(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


OOM = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
ENDS = {ValueError("nö\x1b[2J\n\u202e\x07"): 2, KeyboardInterrupt(): 130, OOM: 1}
ENDS |= {MemoryError(): 1, InductorError("no g++"): 1}


@pytest.mark.parametrize("error, code", ENDS.items())
def test_run_program_ends_in_one_line_that_no_terminal_obeys(capsys, error, code):
    def main():
        raise error

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with pytest.raises(SystemExit) as stop:
        data.run_program(main)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    said = capsys.readouterr().err
    assert stop.value.code == code and said.startswith("error: ") and said.count("\n") == 1
    assert said.rstrip("\n").isprintable() and (code != 2 or "nö" in said)


def test_a_live_line_fits_the_terminal_and_is_replaced(monkeypatch, capsys):
    data.show_live("not on a terminal")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "10")
    data.show_live("0123456789abc")
    data.show("0123456789abc stays")
    assert capsys.readouterr().out == "\r\x1b[K012345678\r\x1b[K0123456789abc stays\n"
