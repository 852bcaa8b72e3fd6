"""data.py: the GSM8K-Aug reader, the built-in task, scoring, tokenizers, rows, batches and their order."""

import base64
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

import dart
import data
from data import Problem, Row, Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"

# ------------------------------------------------------------------------------------------------------ problems


def test_gsm8k_aug_lines(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(
        "\ufeffA  cow   eats 3.||<<3*2=6>> <<6/4=1.5>> #### 1.5\r\nNo step?|| #### 1,600\n a | b ||<<1-3=-2>> #### -2".encode()
    )
    want = [Problem("A cow eats 3.", ["<<3*2=6>>", "<<6/4=1.5>>"], "1.5"), Problem("No step?", [], "1,600"),
            Problem("a | b", ["<<1-3=-2>>"], "-2")]  # fmt: skip
    assert data.load(path, "train") == want
    assert data.load(tmp_path, "train") == want


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("q||<<1=1>> #### 1\nno bars #### 2\n", ":2: not of the form"),
        ("q||<<1=1>> 1\n", ":1: not of the form"),
        ("q||<<1=1>> ####  \n", ":1: the answer is empty"),
        (" ||<<1=1>> #### 1\n", ":1: the question is empty"),
        ("q||First he adds. #### 1\n", ":1: 'First he adds.' is not in a step"),
        ("q||<<>> #### 1\n", ":1: '<<>>' is not in a step"),
        ("q||<<1=1>>2 <<2=2>> #### 1\n", ":1: '2' is not in a step"),
        ("q||<<1=1>> #### 1\n\nq||<<1=1>> #### 1\n", ":2: not of the form"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        ("q||<<1=1>> #### 1\nq\xff||<<1=1>> #### 1\n", ":2: not UTF-8 .* at byte 19"),
        ('{"question": "q", "steps": [], "answer": "1"}\n', ":1: not of the form"),
        (" \n\n", "empty"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape("train.txt") + ".*" + message):
        data.load(path, "train")


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither valid.txt nor valid.jsonl"):
        data.load(tmp_path, "valid")
    with pytest.raises(FileNotFoundError, match="nowhere: no such data file, and no data set of that name: demo, gsm8k-aug"):
        data.load("nowhere", "valid")
    with pytest.raises(ValueError, match="dev"):
        data.load("demo", "dev")
    with pytest.raises(ValueError, match="svamp has no train split, only test"):
        data.load("svamp", "train", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="SVAMP.json: no such file; `python data.py svamp`"):
        data.load("svamp", "test", data_dir=tmp_path)


OWN = [{"question": "Two  and two? ", "steps": ["2+2", " is 4"], "answer": 4.0, "more": None},
       {"question": "é", "answer": "no"}]  # fmt: skip


@pytest.mark.parametrize("form", ["lines", "list", "lines with BOM and CRLF", "no final newline"])
def test_records_of_ones_own(tmp_path, form):
    text = json.dumps(OWN, indent=1) if form == "list" else "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in OWN)
    if "BOM" in form:
        text = "\ufeff" + text.replace("\n", "\r\n")
    (tmp_path / "test.jsonl").write_bytes((text.rstrip() if "final" in form else text).encode())
    want = [Problem("Two and two?", ["2+2", "is 4"], "4"), Problem("é", [], "no")]
    assert data.load(tmp_path, "test") == data.load(tmp_path / "test.jsonl", "train") == want


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "own.json: there is no record"),
        ('{"question": "q", "answer": "1"}\n{"question": "q"}', ":2: the field 'answer' is missing, not text or a number"),
        ('{"question": 3, "answer": "1"}', ":1: the field 'question' is 3, not text"),
        ('{"question": "q", "steps": "s", "answer": "1"}', ":1: the field 'steps' is 's', not a list of text"),
        ('{"question": "q", "steps": [1], "answer": "1"}', r":1: the field 'steps' is \[1\]"),
        ('{"question": "q", "steps": [""], "answer": "1"}', ":1: a step is empty"),
        ('{"question": " ", "answer": "1"}', ":1: the question is empty"),
        ('{"question": "q", "answer": ""}', ":1: the answer is empty"),
        ('{"question": "q", "answer": true}', ":1: the field 'answer' is True"),
        ('{"question": "q", "answer": NaN}', ":1: the field 'answer' is nan"),
        ('{"question": "q", "answer": 1e999}', ":1: the field 'answer' is inf"),
        ('{"question": "q\\ud800", "answer": "1"}', ":1: the question holds half a character"),
        ('{"question": "q", "answer": "1"', ":1: not JSON"),
        ('{"question": "q", "answer": "1"}\n\n{"question": "q", "answer": "1"}', ":2: not JSON"),
        ('{"question": "q", "answer": ' + "1" * 5000 + "}", ":1: not JSON"),
        ('[{"question": "q", "answer": "1"}, 3]', ": record 2: not a JSON object"),
        ('[{"question": "q", "answer": "1"}, {"question": "q"}]', ": record 2: the field 'answer'"),
        ('[{"question": "q"', "own.json: not JSON"),
        ("[" * 100_000, "own.json: not JSON"),
        ("q||<<1=1>> #### 1", ":1: not JSON"),
        ("3", ":1: not a JSON object"),
        ("", "empty"),
    ],
)
def test_a_malformed_record_is_named_with_its_place_and_field(tmp_path, text, message):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ValueError, match="own.json.*" + message if "own.json" not in message else message):
        data.load(tmp_path / "own.json", "test")


PUBLISHED = {  # name -> a record in the published format, written for the purpose, and what it says
    "gsm8k": ({"question": "How many  are 2 and 3?", "answer": "There are 2+3=<<2+3=5>>5.\nTwice: <<5*2=10>>10\n#### 1,010"},
              Problem("How many are 2 and 3?", ["<<2+3=5>>", "<<5*2=10>>"], "1,010")),
    "gsm-hard": ({"input": "What is half?", "code": "def solution(): ...", "target": -0.0000015},
                 Problem("What is half?", [], "-0.0000015")),
    "svamp": ({"ID": "x", "Body": "Ann has 5 pens", "Question": "How many pens?", "Equation": "( 5.0 )", "Answer": 5.0, "Type": "-"},
              Problem("Ann has 5 pens. How many pens?", [], "5")),
    "multiarith": ({"iIndex": 0, "lAlignments": [], "lEquations": ["X=8.0"], "lSolutions": [8.0], "sQuestion": " How many? "},
                   Problem("How many?", [], "8")),
    "prosqa": ({"question": "Is Max a wumpus or a yumpus?", "steps": ["Max is a rorpus.", "Every rorpus is a yumpus."],
                "answer": "Max is a yumpus.", "root": 0, "edges": [[0, 1]]},
               Problem("Is Max a wumpus or a yumpus?", ["Max is a rorpus.", "Every rorpus is a yumpus."], "Max is a yumpus.")),
    "commonsenseqa-cot": ({"question": "Question: Where?\nChoices:\nA: here\nB: there", "answer": "B", "id": "0",
                           "cot": "It isn't here. So it is there."},
                          Problem("Question: Where?\nChoices:\nA: here\nB: there", ["It isn't here.", "So it is there."], "B")),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_formats(tmp_path, monkeypatch, name):
    record, want = PUBLISHED[name]
    reader, splits = data.DATASETS[name]
    published = splits["test"]._replace(count=2)
    monkeypatch.setitem(data.DATASETS, name, (reader, {"test": published}))
    path = tmp_path / name / published.file
    path.parent.mkdir()
    for count in (2, 3):
        lines = [json.dumps(record)] * count
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")
        if count == 2:
            assert data.load(name, "test", data_dir=tmp_path) == [want, want]
        else:
            with pytest.raises(ValueError, match="3 problems, not the 2 of " + name):
                data.load(name, "test", data_dir=tmp_path)
    field = {"gsm8k": "answer", "gsm-hard": "target", "svamp": "Body", "multiarith": "lSolutions"}.get(name, "question")
    path.write_text(json.dumps({**record, field: [None]}))
    with pytest.raises(ValueError, match=rf":1: the field '{field}' is \[None\]"):
        data.load(name, "test", data_dir=tmp_path)


def test_other_details_of_the_published_formats(tmp_path):
    path = tmp_path / "file.jsonl"
    body = {"Body": "Ann has 5 pens. ", "Question": "How many?", "Answer": 5}
    path.write_text(json.dumps(body))
    assert data.read_records(path, data.svamp)[0].question == "Ann has 5 pens. How many?"
    path.write_text(json.dumps(PUBLISHED["multiarith"][0] | {"lSolutions": []}))
    with pytest.raises(ValueError, match=":1: the answer is empty"):
        data.read_records(path, data.multiarith)
    path.write_text(json.dumps({"question": "q", "answer": "no number signs"}))
    with pytest.raises(ValueError, match=":1: the answer is empty"):
        data.read_records(path, data.gsm8k)
    csqa = {"question": "q", "answer": "A"}
    for more, steps in (({"steps": ["One. Two", "Three."]}, ["One. Two", "Three."]), ({}, []), ({"cot": ""}, [])):
        path.write_text(json.dumps(csqa | more))
        assert data.read_records(path, data.commonsenseqa_cot)[0].steps == steps


def test_the_sizes_of_table_7():
    sizes = {name: {split: published.count for split, published in splits.items()} for name, (_, splits) in data.DATASETS.items()}
    assert sizes["gsm8k-aug"] == {"train": 385_620, "valid": 500, "test": 1_319}
    assert sizes["prosqa"] == {"train": 17_886, "valid": 300, "test": 500}
    assert sizes["commonsenseqa-cot"] == {"train": 8_096, "test": 1_221}
    assert [sizes[name] for name in ("gsm-hard", "svamp", "multiarith")] == [{"test": 1_319}, {"test": 1_000}, {"test": 600}]


def content(problem):
    """(x, op, y, p) of a built-in problem, from its question alone."""
    _, _, x, _, verb, y, _, _, p, _ = problem.question.split()
    return int(x), "+" if verb in data.VERBS["+"] else "-", int(y), int(p)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_built_in_task(seed):
    splits = data.demo_problems(seed)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1820, "valid": 200, "test": 500}
    contents = [content(problem) for split in splits.values() for problem in split]
    assert len(contents) == len(set(contents)) == 2520  # so the splits share no arithmetic content
    facts = Counter()
    for split, problems in splits.items():
        for problem in problems:
            x, op, y, p = content(problem)
            value = x + y if op == "+" else x - y
            assert value >= 1 and problem.answer == str(value % p)
            assert problem.steps == [f"<<{x}{op}{y}={value}>>", f"<<{value}%{p}={value % p}>>"]
            if split == "train":
                facts.update([(x, op, y), (value, p)])
    for problem in splits["valid"] + splits["test"]:
        x, op, y, p = content(problem)
        assert facts[x, op, y] >= 4 and facts[x + y if op == "+" else x - y, p] >= 4
    assert splits == data.demo_problems(seed) != data.demo_problems(seed + 1)
    assert 0.20 < data.demo_chance(splits["test"]) < 0.26


# ----------------------------------------------------------------------------------------------------- downloads

CONTENT = b"".join(b"question %d||<<%d*2=%d>> #### %d\n" % (i, i, 2 * i, 2 * i) for i in range(5000))


class Server(http.server.ThreadingHTTPServer):
    """Answers the requests one after the other as `script` says, and keeps the range that each asked for."""

    daemon_threads = True

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.ranges, self.address = list(script), [], f"http://127.0.0.1:{self.server_port}/train.txt"
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        todo, asked = self.server.script.pop(0), self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked[6:-1]) if asked and todo != "no ranges" else 0
        if isinstance(todo, int):
            return self.send_error(todo)
        if todo == "redirect":
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            return self.end_headers()
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = todo if isinstance(todo, bytes) else CONTENT[start:]
        start = 0 if isinstance(todo, bytes) else start
        self.send_response(206 if start else 200)
        body = body[:100] if todo == "capped" else body
        if start:
            self.send_header("Content-Range", f"bytes {start + (todo == 'other part')}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if todo != "no length":
            self.send_header("Content-Length", "abc" if todo == "bad length" else str(len(body)))
        self.end_headers()
        body = bytes(len(body)) if todo == "corrupt" else body
        self.wfile.write(body[: len(body) // 2] if todo in ("truncate", "stall") else body)
        self.wfile.flush()
        if todo == "stall":
            self.server.released.wait()


@pytest.fixture
def published(monkeypatch):
    """A data set of one file on a server, to be told its address; the pauses between two attempts are left out."""
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)

    def publish(server, **known):
        known = {"size": len(CONTENT), "digest": hashlib.sha256(CONTENT).hexdigest()} | known
        one = data.Published("train.txt", 5000, server and server.address, **known)
        monkeypatch.setitem(data.DATASETS, "gsm8k-aug", (data.read_gsm8k_aug, {"train": one}))

    return publish


HALF = f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize(
    "script, ranges",
    [
        (["whole"], [None]),
        (["redirect", "whole"], [None, None]),
        (["truncate", "whole"], [None, HALF]),
        (["truncate", "redirect", "whole"], [None, HALF, HALF]),
        (["stall", "whole"], [None, HALF]),
        (["truncate", 500, 503, "whole"], [None, HALF, HALF, HALF]),
        (["truncate", "no ranges"], [None, HALF]),
        (["truncate", 408, "other part", "whole"], [None, HALF, HALF, HALF]),
        (["truncate", "capped", "whole"], [None, HALF, f"bytes={len(CONTENT) // 2 + 100}-"]),
        (["bad length", "whole"], [None, None]),
        (["no length"], [None]),
    ],
)
@pytest.mark.parametrize("known", [{}, {"size": None, "digest": "git"}, {"size": None, "digest": None}])
def test_a_download_goes_on_where_it_broke(tmp_path, published, script, ranges, known):
    git = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    with Server(*script) as server:
        published(server, **(known | {"digest": git} if known.get("digest") else known))
        data.fetch("gsm8k-aug", tmp_path, timeout=0.5)
        assert server.ranges == ranges
        data.fetch("gsm8k-aug", tmp_path)  # is there: no request more
        assert server.ranges == ranges
    assert [path.name for path in (tmp_path / "gsm8k-aug").iterdir()] == ["train.txt"]
    assert (tmp_path / "gsm8k-aug" / "train.txt").read_bytes() == CONTENT
    assert len(data.load("gsm8k-aug", "train", data_dir=tmp_path)) == 5000


@pytest.mark.parametrize(
    "script, known, message",
    [
        ([404], {}, "train.txt: the server answers 404"),
        ([500] * 5, {}, "the server answers 500 .*, 5 times; the same command goes on"),
        (["corrupt"], {}, "checksum is not that"),
        ([CONTENT[:-20]], {}, "train.txt.part: 201650 bytes, the published file has"),
        ([CONTENT[: CONTENT.index(b"question 4000|")]], {"size": None, "digest": None}, "4000 problems, the published file has 5000"),
        ([b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"], {}, "Git LFS pointer"),
        ([b"<html>not here</html>"], {"size": None, "digest": None}, ":1: not of the form"),
    ],
)
def test_a_download_that_is_not_the_published_file_leaves_nothing_under_its_name(tmp_path, published, script, known, message):
    with Server(*script) as server:
        published(server, **known)
        with pytest.raises(ValueError, match=message):
            data.fetch("gsm8k-aug", tmp_path, timeout=0.5)
        assert not server.script
    assert not list((tmp_path / "gsm8k-aug").iterdir())


def test_what_broke_for_good_is_taken_up_by_the_next_call(tmp_path, published):
    with Server("truncate", *[500] * 4, "whole") as server:
        published(server)
        with pytest.raises(ValueError, match="500"):
            data.fetch("gsm8k-aug", tmp_path)
        assert [path.name for path in (tmp_path / "gsm8k-aug").iterdir()] == ["train.txt.part"]
        data.fetch("gsm8k-aug", tmp_path)
        assert server.ranges[-1] == HALF
    for known, ranges in (({}, []), ({"size": None}, [f"bytes={len(CONTENT)}-"])):
        with Server(*["whole"] * len(ranges)) as server:  # whole, but not renamed
            published(server, **known)
            os.rename(tmp_path / "gsm8k-aug" / "train.txt", tmp_path / "gsm8k-aug" / "train.txt.part")
            data.fetch("gsm8k-aug", tmp_path)
            assert server.ranges == ranges


@pytest.mark.parametrize("answer", [b"<html>log in</html>", CONTENT * 3])
def test_what_is_there_is_not_given_up_for_an_answer_of_another_size(tmp_path, published, answer):
    """A page of some network in between, or more than there should be: 200, and not the file."""
    with Server("truncate", *[answer] * 4, "whole") as server:
        published(server)
        with pytest.raises(ValueError, match="bytes, the published file has 201670, 5 times"):
            data.fetch("gsm8k-aug", tmp_path)
        assert (tmp_path / "gsm8k-aug" / "train.txt.part").read_bytes() == CONTENT[: len(CONTENT) // 2]
        data.fetch("gsm8k-aug", tmp_path)


def test_no_more_is_written_than_the_published_file_has(tmp_path, published):
    with Server(*[CONTENT * 3] * 5) as server:
        published(server)
        with pytest.raises(ValueError, match="the server has 605010 bytes, the published file has 201670, 5 times"):
            data.fetch("gsm8k-aug", tmp_path)
    assert (tmp_path / "gsm8k-aug" / "train.txt.part").stat().st_size <= len(CONTENT)


def test_a_beginning_longer_than_the_file_is_thrown_away(tmp_path, published):
    (tmp_path / "gsm8k-aug").mkdir()
    (tmp_path / "gsm8k-aug" / "train.txt.part").write_bytes(CONTENT + b"more")
    with Server("whole", "whole") as server:
        published(server)
        data.fetch("gsm8k-aug", tmp_path)
        assert server.ranges == [f"bytes={len(CONTENT) + 4}-", None]


def test_a_file_that_is_there_but_not_right_is_named_and_kept(tmp_path, published):
    (tmp_path / "gsm8k-aug").mkdir()
    (tmp_path / "gsm8k-aug" / "train.txt").write_bytes(CONTENT[:1000])
    published(None)
    with pytest.raises(ValueError, match="train.txt: 1000 bytes, the published file has"):
        data.fetch("gsm8k-aug", tmp_path)
    assert (tmp_path / "gsm8k-aug" / "train.txt").stat().st_size == 1000


def test_a_split_that_must_be_fetched_by_hand_is_said_in_two_lines(tmp_path, monkeypatch, capsys):
    reader, splits = data.DATASETS["commonsenseqa-cot"]
    test = splits["test"]._replace(size=None, digest=None, count=1)
    (tmp_path / "commonsenseqa-cot").mkdir()
    (tmp_path / "commonsenseqa-cot" / test.file).write_text(json.dumps(PUBLISHED["commonsenseqa-cot"][0]))
    monkeypatch.setitem(data.DATASETS, "commonsenseqa-cot", (reader, {**splits, "test": test}))
    with pytest.raises(SystemExit) as exit:
        data.main(["commonsenseqa-cot", "--data_dir", str(tmp_path)])
    out, error = capsys.readouterr()
    path = tmp_path / "commonsenseqa-cot" / "train.jsonl"
    assert exit.value.code == 2 and error == f"error: commonsenseqa-cot: all but {path} is there\n"
    assert len(out.splitlines()) == 3 and out.count(str(path)) == 2 and "(test)" in out.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["imagenet"], "no data set 'imagenet'; there are gsm8k-aug"),
        ([], "the following arguments are required"),
        (["stats"], "stats of what?"),
        (["stats", "demo", "--tokenizer", ""], ".: no tokenizer"),
        (["stats", "nowhere"], "nowhere: no such data file"),
        (["stats", "svamp"], "SVAMP.json: no such file"),
        (["stats", "demo", "--tokenizer", "nowhere"], "nowhere: no tokenizer"),
        (["svamp", "--resume"], "unrecognized arguments: --resume"),
    ],
)
def test_what_the_program_refuses_is_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        data.main([*arguments, "--data_dir", str(tmp_path)])
    out, error = capsys.readouterr()
    assert (exit.value.code, out, error.count("\n")) == (2, "", 1) and error.startswith("error: ") and message in error


def test_statistics(tmp_path, capsys):
    (tmp_path / "train.txt").write_text("a b c||<<1+1=2>> <<2*2=4>> #### 4\nd||<<1+1=2>> #### 1,000\ne|| #### no\n")
    (tmp_path / "words.json").write_text(json.dumps(["<bos>", "<eos>", *"abcde", "<<", ">>", *"+*=,", "no", "1", "2", "4", "000"]))
    data.main(["stats", str(tmp_path), "--tokenizer", str(tmp_path)])
    assert capsys.readouterr().out == f"""{tmp_path}, train: 3 problems
steps per problem: mean 1.000  (0: 1  1: 1  2: 1)
empty CoT: 1; empty without its last step: 2
answers: 2 numbers, 1 sentences
tokens in question: mean 1.7  95 % up to 3  longest 3
tokens in steps: mean 7.0  95 % up to 13  longest 14
tokens in steps but the last: mean 2.3  95 % up to 6  longest 7
tokens in answer: mean 1.7  95 % up to 3  longest 3

not there: {tmp_path}: neither valid.txt nor valid.jsonl is in it
not there: {tmp_path}: neither test.txt nor test.jsonl is in it
"""
    data.main(["stats", "demo", str(tmp_path / "train.txt")])
    assert capsys.readouterr().out.count("problems\n") == 3 + 1


def test_the_program_runs_by_itself(tmp_path):
    command = [sys.executable, "data.py", "stats", "svamp", "--data_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=FIXTURES.parent.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# ------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "text, gold, strict, tolerant",
    [
        ("18", "18", True, True),
        ("18", "18.0", False, True),
        ("1,450,000", "1450000", False, True),
        ("$7.", "7", False, True),
        ("-10", "10", False, False),
        ("10-5", "5", False, True),
        (".5", "0.5", False, True),
        ("1/2", "0.5", False, True),
        ("1/0", "1", False, False),
        ("3e3", "3000", False, True),
        ("", "0", False, False),
        ("18 eggs", "18", False, True),
        ("14053029.6667", "14053029.666666666", False, True),
        ("71", "72", False, False),
        ("3431580", "3431580.0", False, True),
        ("14053029.67", "14053029.666666666", False, True),
        ("14053029.7", "14053029.666666666", False, False),
        ("14053030", "14053029", False, False),
        ("9284017268534.41", "9284017268534.4", False, True),
        ("0.3333333", "0.33333333333", False, True),
        ("0.33333", "0.33333333333", False, False),
        ("5", "1e999", False, False),
        ("The answer is...18", "18", False, True),
        ("No.5", "5", False, True),
        ("2 1/2", "2.5", False, True),
        ("-2 1/2", "-2.5", False, True),
        ("1 / 2", "0.5", False, True),
        ("\u20135", "-5", False, True),
        ("-1895420.5", "-1895420.4999999998", False, True),
        ("0.0000020107", "2.0107e-06", False, True),
        ("1e-9", "0", False, False),
        ("0.0", "0", False, True),
        ("-$1,234.50.", "-1234.5", False, True),
        ("3,4", "34", False, False),
        ("\u22127", "-7", False, True),
        ("(3)-2", "2", False, True),
        ("2/5", "0.4", False, True),
        ("1e999", "1e999", True, True),
        ("1e999", "1" + "0" * 400, False, False),
        ("50", "50%", False, True),
        ("about 5", "5 or 6 of them", False, False),
        ("Jack is a boompus.", "jack is a boompus", False, True),
        ("Jack is  a boompus", "Jack is a boompus.", False, True),
        ("Jack is a boompus. ", "Jack is a boompus.", True, True),
        ("Jack is a zhorpus.", "Jack is a boompus.", False, False),
        ("", "Jack is a boompus.", False, False),
        ("", "C", False, False),
        ("c", "C", False, False),
        ("C", "C", True, True),
        ("C.", "C", False, True),
        ("(C)", "C", False, True),
        ("C: natural habitat", "C", False, True),
        ("The answer is C.", "C", False, True),
        ("Answer: C", "C", False, True),
        ("C - natural", "C", False, True),
        ("C\nBecause", "C", False, True),
        ("C or D", "C", False, False),
        ("C, D", "C", False, False),
        ("C) or D)", "C", False, False),
        ("I, for one, think so", "I", False, False),
        ("A bank", "A", False, False),
        ("D", "C", False, False),
        ("CD", "C", False, False),
    ],
)
def test_scoring(text, gold, strict, tolerant):
    assert data.score(text, gold) == (strict, tolerant)


# ---------------------------------------------------------------------------------------------------- tokenizers


def merge_ranks(*merges):
    """Every byte, in order, and then some merges: bytes -> rank."""
    return {**{bytes([i]): i for i in range(256)}, **{merge: 256 + i for i, merge in enumerate(merges)}}


@pytest.fixture
def llama3(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LLAMA3_RANKS", 256 + 11)
    ranks = merge_ranks(b"An", b"sw", b"er", b"swer", b"Answer", b"12", b"123", b"<<", b">>", b" <", b":-")
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    return tmp_path


@pytest.fixture
def gpt2(tmp_path):
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(i) for i in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [("A", "n"), ("s", "w"), ("e", "r"), ("sw", "er"), ("An", "swer"), ("Ġ", "1")]
    vocab = {token: i for i, token in enumerate(letters + ["".join(pair) for pair in merges] + ["<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tmp_path


TEXTS = ["Answer:12345 <<1+2=3>>", "héllo  wörld\n\n\tx", "a<|begin_of_text|><|endoftext|>b", "", "日本 🙂👍🏽 \u2028", "-18"]


def test_llama3_tokenizer(llama3):
    tokenizer = Tokenizer.from_pretrained(llama3)
    n = 256 + 11
    assert (tokenizer.size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.reserved) == (n + 256, n, n + 1, (n + 2, n + 3))
    assert tokenizer.encode("Answer:12345", bos=True, eos=True) == [n, 260, ord(":"), 262, ord("4"), ord("5"), n + 1]
    names = {9: "<|eot_id|>", 2: "<|reserved_special_token_0|>", 5: "<|reserved_special_token_2|>",
             11: "<|reserved_special_token_3|>", 255: "<|reserved_special_token_247|>"}  # fmt: skip
    assert {i: tokenizer.decode([n + i]) for i in names} == names
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert tokenizer.decode(ids) == text and max(ids, default=0) < n  # special names inside a text are text


def test_gpt2_tokenizer(gpt2):
    tokenizer = Tokenizer.from_pretrained(gpt2)
    vocab = json.loads((gpt2 / "vocab.json").read_text())
    assert (tokenizer.size, tokenizer.bos_id, tokenizer.reserved) == (263, None, ())
    ids = tokenizer.encode("Answer: 1", bos=True, eos=True)
    assert ids == [vocab["Answer"], vocab[":"], vocab["Ġ1"], vocab["<|endoftext|>"]]
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert tokenizer.decode(ids) == text and tokenizer.eos_id not in ids


@pytest.mark.parametrize(
    "pattern, text, want",
    [
        ("LLAMA3", "don'T  I'LL go!!\n x12345", ["don", "'T", " ", " I", "'LL", " go", "!!\n", " x", "123", "45"]),
        ("GPT2", "don't  I'LL go!!\n x12345", ["don", "'t", " ", " I", "'", "LL", " go", "!!", "\n", " x", "12345"]),
        ("LLAMA3", "a\r\n\r\nb   <<3*2=6>>", ["a", "\r\n\r\n", "b", "  ", " <<", "3", "*", "2", "=", "6", ">>"]),
        ("GPT2", "a\n\nb   <<3*2=6>>", ["a", "\n", "\n", "b", "  ", " <<", "3", "*", "2", "=", "6", ">>"]),
    ],
)
def test_the_patterns_cut_text_as_their_authors_do(pattern, text, want):
    """Each piece is one token where the ranks hold all of them; expectations worked out from the published patterns."""
    tokens = {piece.encode() for piece in want}
    partial = {token[:i] for token in tokens for i in range(2, len(token) + 1)}  # so that merging reaches every piece
    ranks = merge_ranks(*sorted(partial, key=lambda t: (len(t), t)))
    encoding = data.tiktoken.Encoding("t", pat_str=getattr(data, f"{pattern}_PATTERN"), mergeable_ranks=ranks, special_tokens={})
    assert [encoding.decode([i]) for i in encoding.encode_ordinary(text)] == want


def test_digits_are_merged_in_llama3_but_not_in_qwen2():
    ranks = merge_ranks(b"12", b"123", b"1234")
    for pattern, pieces in ((data.LLAMA3_PATTERN, 2), (data.QWEN2_PATTERN, 4), (data.GPT2_PATTERN, 1)):
        assert len(data.tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode("1234")) == pieces


def test_pieces_are_not_merged_across_a_seam(llama3):
    """In one string ':-' would be one token and the separator's last token no longer ':'."""
    tokenizer = Tokenizer.from_pretrained(llama3)
    whole = tokenizer.encode("Answer:-18", bos=False, eos=False)
    pieces = tokenizer.encode("Answer:", bos=False, eos=False) + tokenizer.encode("-18", bos=False, eos=False)
    assert whole[1] == 266 and pieces[:2] == [260, ord(":")]


def test_the_built_in_tokenizer_reads_back_every_problem():
    tokenizer = data.demo_tokenizer()
    for problem in data.demo_problems(0)["train"][:300]:
        for text in (problem.question, " ".join(problem.steps), problem.answer, "Answer:"):
            assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text
    with pytest.raises(ValueError, match="'zebra' is not in the vocabulary"):
        tokenizer.encode("sam has 3 zebra", bos=True, eos=True)


def train_sentencepiece(**more):
    """A SentencePiece model with Llama 2's settings."""
    model, lines = io.BytesIO(), ["Answer: 12 <<3*4=12>> and the question is how many she has left"] * 20
    how = dict(model_type="bpe", vocab_size=310, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
               remove_extra_whitespaces=False, minloglevel=2, num_threads=1)  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **how | more)
    return model.getvalue()


def export(tokenizer, directory, with_st=True):
    files, st_id = tokenizer.export(with_st)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return st_id


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "tokenizer-llama3", "tokenizer-qwen2", "tokenizer-gpt2"])
def test_an_exported_tokenizer_is_read_back(tmp_path, request, kind):
    """Of ranks, of vocabulary and merges, of each tokenizer.json: the same ids; <st> is reserved, or new and the last one."""
    source = FIXTURES / kind if kind.startswith("tokenizer") else request.getfixturevalue(kind)
    ours, out = Tokenizer.from_pretrained(source), tmp_path / "exported"
    out.mkdir()
    st_id = export(ours, out)
    again = Tokenizer.from_pretrained(out)
    assert again.kind == "tokenizer.json" and (again.bos_id, again.eos_id) == (ours.bos_id, ours.eos_id)
    assert again.backend.added["<st>"] == st_id == (ours.reserved[0] if ours.reserved else ours.size)
    assert again.size == ours.size + (st_id == ours.size)
    for text in (*TEXTS, *json.loads((FIXTURES / "tokenizer-gpt2" / "expected.json").read_text())["texts"]):
        assert again.encode(text, bos=True, eos=True) == ours.encode(text, bos=True, eos=True)
    assert export(ours, out, with_st=False) == st_id and Tokenizer.from_pretrained(out).size == ours.size


@pytest.mark.parametrize("kind", ["words", "sentencepiece"])
def test_an_exported_tokenizer_is_read_by_hugging_faces_library(tmp_path, kind):
    """Of the two kinds that are not read back here: ids, also behind <st>, and texts."""
    tokenizers = pytest.importorskip("tokenizers", reason="reads what was exported")
    if kind == "words":
        ours, texts = data.demo_tokenizer(), [text for p in data.demo_problems(0)["valid"] for text in (p.question, " ".join(p.steps), p.answer)]
    else:
        (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
        ours, texts = Tokenizer.from_pretrained(tmp_path), [text for text in TEXTS if text] + ["Answer: 12 <<3*4=12>>", "and  how many", "a"]
    st_id = export(ours, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts:
        ids = theirs.encode(text + "<st><st>Answer:").ids
        assert ids == [*ours.encode(text, bos=True, eos=False), st_id, st_id, *ours.encode("Answer:", bos=False, eos=False, continued=True)]
        assert theirs.decode(theirs.encode(text).ids) == text
    assert st_id == (2 if kind == "words" else ours.size)


@pytest.mark.parametrize(
    "how, message",
    [(dict(model_type="unigram", vocab_size=289), "only SentencePiece's BPE models"), (dict(add_dummy_prefix=False), "behind one blank"),
     (dict(remove_extra_whitespaces=True), "behind one blank"), (dict(normalization_rule_name="nmt_nfkc"), "behind one blank")],
)  # fmt: skip
def test_a_sentencepiece_model_that_files_cannot_say_is_not_exported(tmp_path, how, message):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**how))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path).export(True)


def test_an_id_that_only_the_model_has_is_read_as_unknown(llama3):
    tokenizer = Tokenizer.from_pretrained(llama3)
    assert tokenizer.decode([49, tokenizer.size, 50, tokenizer.size + 7]) == "1\ufffd2\ufffd"


def test_bos_and_eos_have_no_default():
    with pytest.raises(TypeError):
        data.demo_tokenizer().encode("sam")


def test_a_tokenizer_is_saved_as_it_was_read(llama3, tmp_path):
    (tmp_path / "copy").mkdir()
    Tokenizer.from_pretrained(llama3).save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == (llama3 / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no tokenizer"),
        ({"vocab.json": "{}"}, "no tokenizer"),
        ({"tokenizer.model": "\x0a\x0esentencepiece"}, "neither lines 'base64 rank' .* nor a SentencePiece model"),
        ({"tokenizer.model": ""}, "empty"),
        ({"tokenizer.model": "YQ== 0\nYg==\n"}, "line 2 is not"),
        ({"tokenizer.model": "YQ== 0\nY?== 1\n"}, "line 2 is not"),
        ({"tokenizer.model": "YQ== 0\nYg== 5\n"}, "2 ranks, not the 128000 of Llama 3"),
        ({"words.json": '["a", "a"]'}, "different strings"),
        ({"words.json": '["a"]'}, "<bos>"),
        ({"words.json": "["}, "words.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "tokenizer_config.json with the special tokens .* is missing"),
        ({"vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": ""}, "lacks one of the 256 bytes"),
        ({"vocab.json": '{" ": 0, "<|endoftext|>": 1}', "merges.txt": ""}, "vocab.json"),
        ({"vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": "a b"}, "merge 0, 'a b', is not of two tokens"),
        ({"vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": "a\n"}, "merge 0, 'a', is not of two tokens"),
        ({"vocab.json": '{"<|endoftext|>": 1}', "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "Bart"}'},
         "only GPT2Tokenizer and Qwen2Tokenizer"),
        ({"tokenizer.json": "[]"}, "tokenizer.json"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: the field 'model' is missing"),
        ({"vocab.json": "[]", "merges.txt": ""}, "vocab.json"),
    ],
)
def test_a_broken_tokenizer_is_named(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_merges_in_another_order_than_the_ids_are_refused(gpt2):
    lines = (gpt2 / "merges.txt").read_text().splitlines()
    (gpt2 / "merges.txt").write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(ValueError, match="merge 1, 'A n', has the id 256 after 257: the order of the merges is not"):
        Tokenizer.from_pretrained(gpt2)
    (gpt2 / "merges.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="the merges do not make the token 'Ġ1'"):
        Tokenizer.from_pretrained(gpt2)


TOKENIZERS = ("llama3", "qwen2", "gpt2")


def expected_ids(name):
    expected = json.loads((FIXTURES / f"tokenizer-{name}" / "expected.json").read_text())
    return list(zip(expected["texts"], expected["ids"], strict=True))


def in_order_of_the_list(text, merges):
    """Hugging Face's BPE, slowly: again and again the pair that stands first in the list is merged, leftmost first."""
    parts = list(text)
    while found := [(merges.index(pair), i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in merges]:
        _, i = min(found)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    return parts


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_that_tiktoken_would_do_otherwise_are_refused(ignore_merges):
    """Random lists of merges whose ids rise: what is accepted gives the ids that the list gives."""
    rng, seen = random.Random(0), Counter()
    for _ in range(400):
        tokens, merges = list("abc"), []
        for _ in range(rng.randint(1, 10)):
            pair = rng.choice(tokens), rng.choice(tokens)
            if len("".join(pair)) <= 6 and "".join(pair) not in tokens:
                tokens.append("".join(pair))
                merges.append(pair)
        if ignore_merges:  # as in Llama 3's file, mostly: all ways to split a token, in the order of the tokens
            merges = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in tokens and t[i:] in tokens
                      and rng.random() < 0.97]  # fmt: skip
        alphabet = data._spelling()
        vocab = {c: i for i, c in enumerate(alphabet)} | {t: 256 + i for i, t in enumerate(tokens[3:])}
        try:
            encoding = data.Tiktoken(data.GPT2_PATTERN, data._ranks(vocab, merges, ignore_merges), {}).encoding
        except ValueError:
            seen["refused"] += 1
            continue
        seen["accepted"] += 1
        for text in tokens + ["".join(rng.choices("abc", k=rng.randint(1, 25))) for _ in range(60)]:
            want = [text] if ignore_merges and text in tokens else in_order_of_the_list(text, merges)
            assert [encoding.decode([i]) for i in encoding.encode_ordinary(text)] == want, (text, merges)
    assert min(seen.values()) > 50, seen


def test_merges_known_to_go_wrong_are_refused():
    spelled = {c: i for i, c in enumerate(data._spelling())}
    with pytest.raises(ValueError, match="do not make the token 'abc'"):  # abc is a, bc in the list's order
        data._ranks(spelled | {"bc": 256, "ab": 257, "abc": 258}, [("b", "c"), ("a", "b"), ("ab", "c")])
    with pytest.raises(ValueError, match="do not make the token 'yz'"):  # x, yz are merged by tiktoken, by the list never
        data._ranks(spelled | {"yz": 256, "xyz": 257}, [("y", "z")][1:], ignore_merges=True)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_added_words_that_reach_beyond_themselves_are_refused(tmp_path, flag):
    shutil.copytree(FIXTURES / "tokenizer-qwen2", tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"][-1][flag] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="the added token '<tool_call>' with lstrip"):
        Tokenizer.from_pretrained(tmp_path)


def test_added_words_are_found_longest_first_and_before_normalisation():
    ranks = {bytes([i]): i for i in range(256)}
    added = {"<t": 256, "<t>": 257, "": 258, "<s>": 259}
    backend = data.Tiktoken(data.GPT2_PATTERN, ranks, added, ["<t", "<t>", ""], nfc=True)
    assert backend.encode("<t><t<s>", False) == [257, 256, *b"<s>"]
    assert backend.encode("<t>\u0338e\u0301", False) == [257, *"\u0338\u00e9".encode()]  # '>' and the stroke are not composed


@pytest.mark.parametrize(
    "name, files, message",
    [
        ("tokenizer-qwen2", {"tokenizer_config.json": "{"}, "tokenizer_config.json is not JSON"),
        ("tokenizer-qwen2", {"tokenizer_config.json": "[" * 100_000}, "tokenizer_config.json is not JSON"),
        ("tokenizer-qwen2", {"tokenizer_config.json": "[]"}, "tokenizer.json"),
        ("tokenizer-qwen2", {"added_tokens.json": '{"<tool>": 423}'}, "added_tokens.json: '<tool>' is in no other file"),
        ("tokenizer-gpt2", {"tokenizer_config.json": '{"add_bos_token": true}'}, "add_bos_token is not supported"),
    ],
)
def test_what_stands_beside_a_tokenizer_is_not_ignored(tmp_path, name, files, message):
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_the_configuration_names_the_end_token_and_says_whether_there_is_a_bos(llama3, llama2, tmp_path):
    (llama3 / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|eot_id|>"}, "add_bos_token": false}')
    tokenizer = Tokenizer.from_pretrained(llama3)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (267 + 9, None)
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.from_pretrained(tmp_path / "copy").eos_id == 267 + 9
    shutil.copytree(llama2, tmp_path / "llama2")
    (tmp_path / "llama2" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(ValueError, match="end token '<\\|im_end\\|>' is not among"):
        Tokenizer.from_pretrained(tmp_path / "llama2")


def check_parity(tokenizer, name):
    for text, ids in expected_ids(name):
        assert tokenizer.encode(text, bos=False, eos=False) == ids, text
        assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if name == "qwen2" else text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_json_gives_the_ids_of_hugging_face(name):
    """Fixtures made with `tokenizers`: patterns, multiple merges for a token, NFC, special tokens as text, added words."""
    tokenizer = Tokenizer.from_pretrained(FIXTURES / f"tokenizer-{name}")
    check_parity(tokenizer, name)
    assert str(tokenizer) == {
        "llama3": "tokenizer: tokenizer.json, 423 ids, BOS 420, EOS 421, 1 in reserve",
        "qwen2": "tokenizer: tokenizer.json, 423 ids, no BOS, EOS 421, none in reserve for <st>",
        "gpt2": "tokenizer: tokenizer.json, 421 ids, no BOS, EOS 420, none in reserve for <st>",
    }[name]
    x = tokenizer.encode("x", bos=False, eos=False)
    assert tokenizer.encode("x", bos=True, eos=True) == [420] * (name == "llama3") + x + [420 + (name != "gpt2")]
    text = dict(expected_ids(name))["<tool_call> a<tool_call>b"]
    assert (422 in text) == (name == "qwen2")  # a word that was added is one token, a special token's name is not


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_vocab_and_merges_give_the_ids_of_hugging_face(tmp_path, name, newline):
    raw = json.loads((FIXTURES / f"tokenizer-{name}" / "tokenizer.json").read_text())
    config = json.loads((FIXTURES / f"tokenizer-{name}" / "tokenizer_config.json").read_text())
    vocab = raw["model"]["vocab"]
    merges = raw["model"]["merges"]
    if name == "qwen2":
        config |= {"tokenizer_class": "Qwen2TokenizerFast", "added_tokens_decoder": {t["id"]: t for t in raw["added_tokens"]}}
        made = {}  # Qwen2's list names each token once
        for pair in merges:
            made.setdefault("".join(pair), pair)
        merges = list(made.values())
        text = dict(expected_ids(name))["7" * 50]
        assert len(text) == 50
    else:
        vocab |= {"<|endoftext|>": 420}
        config = {"model_max_length": 1024}  # all that GPT-2's file says
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (tmp_path / "merges.txt").write_bytes("".join(line + newline for line in lines).encode())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    check_parity(tokenizer, name)
    assert tokenizer.eos_id == {"qwen2": 421, "gpt2": 420}[name] and tokenizer.bos_id is None
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    check_parity(Tokenizer.from_pretrained(tmp_path / "copy"), name)


def change(raw, path, value):
    *path, last = path.split(".")
    for part in path:
        raw = raw[int(part) if part.isdigit() else part]
    raw[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model.type", "Unigram", "model.type 'Unigram'"),
        ("model.byte_fallback", True, "model.byte_fallback"),
        ("model.dropout", 0.1, "model.dropout"),
        ("model.end_of_word_suffix", "</w>", "model.end_of_word_suffix"),
        ("normalizer", {"type": "Lowercase"}, "normalizer 'Lowercase'"),
        ("pre_tokenizer", None, "pre_tokenizer"),
        ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer"),
        ("pre_tokenizer.pretokenizers.0", {"type": "Digits"}, "only Llama 3's and Qwen2's patterns"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"String": " "}, "only Llama 3's"),
        ("pre_tokenizer.pretokenizers.0.invert", True, "only Llama 3's"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\w+"}, "only Llama 3's"),
        ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "without a prefixed space"),
        ("model.merges.3", ["q", "zzz"], "merge 3, 'q zzz'"),
        ("model.merges", [], "the merges do not make the token"),
        ("model.vocab.a", 5, "ids of the 423 tokens are not"),
        ("model.vocab.b", "5", "tokenizer.json"),
        ("added_tokens.0.id", 500, "ids of the 423 tokens are not"),
        ("added_tokens.1.content", "</s>", r"end token '<\|im_end\|>' is not among"),
    ],
)
def test_a_tokenizer_json_that_means_something_else_is_refused(tmp_path, path, value, message):
    shutil.copytree(FIXTURES / "tokenizer-qwen2", tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["model"]["ignore_merges"] = False
    change(raw, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_what_a_directory_holds_decides(llama3, tmp_path):
    (llama3 / "original").mkdir()
    (llama3 / "tokenizer.model").rename(llama3 / "original" / "tokenizer.model")
    tokenizer = Tokenizer.from_pretrained(llama3)
    assert str(tokenizer) == "tokenizer: Llama-3's ranks (tokenizer.model), 523 ids, BOS 267, EOS 268, 2 in reserve"
    assert list(tokenizer.files) == ["tokenizer.model"]
    shutil.copytree(FIXTURES / "tokenizer-qwen2", llama3, dirs_exist_ok=True)
    assert Tokenizer.from_pretrained(llama3).kind == "tokenizer.json"


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama2")
    (directory / "tokenizer.model").write_bytes(train_sentencepiece())
    return directory


def test_sentencepiece(llama2):
    tokenizer = Tokenizer.from_pretrained(llama2)
    assert str(tokenizer) == "tokenizer: SentencePiece (tokenizer.model), 310 ids, BOS 1, EOS 2, none in reserve for <st>"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(llama2 / "tokenizer.model"))
    for text in [*TEXTS, "  two  spaces ", "</s> <s>"]:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == theirs.encode(text) and tokenizer.decode(ids) == text
    assert tokenizer.encode("a", bos=True, eos=True) == [1, *theirs.encode("a"), 2]


def test_sentencepiece_puts_no_space_between_separator_and_answer(llama2):
    """Else the state at z_N, which is to hold the answer, would predict a blank."""
    tokenizer = Tokenizer.from_pretrained(llama2)
    blank = tokenizer.encode("", bos=False, eos=False) + tokenizer.encode("12", bos=False, eos=False)
    ids = tokenizer.encode("12", bos=False, eos=False, continued=True)
    assert tokenizer.decode(ids) == "12" and len(ids) == 2 and len(blank) == 3
    row = dart.Pathway(steps=True).row(Problem("how many", ["<<3*4=12>>"], "12"), tokenizer)
    assert tokenizer.decode(row.ids.tolist()) == "how many<<3*4=12>>Answer:12"
    assert row.ids[row.y :].tolist() == [*ids, 2]


# ---------------------------------------------------------------------------------------------- rows and batches


def test_collate_weighs_each_piece_by_its_length():
    rows = [Row(np.array([5, 6, 7, 8, 9, 1], np.int32), 2, 4), Row(np.array([5, 9, 1], np.int32), 1, 1)]
    batch = data.collate(rows, pad_id=1)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 1], [5, 9, 1, 1, 1, 1]]
    dense = torch.zeros(2, 6)
    dense[batch.row, batch.col] = batch.weight
    assert dense.tolist() == [[0, 0, 0.5, 0.5, 0.5, 0.5], [0, 0.5, 0.5, 0, 0, 0]]
    assert batch.at.tolist() == [3, 0]  # z_N is the token before Y
    assert batch.tail == 0 and data.collate(rows[:1], pad_id=1).tail == 1  # the token before the first that is learned


def gsm8k_like_lengths(n):
    """[n, 2] tokens in the CoT and the ST pathway, spread as GSM8K-Aug's are: questions log-normal around 55 tokens, steps
    around 16, independent of them."""
    rng = np.random.default_rng(0)
    question = np.clip(rng.lognormal(4.0, 0.37, n), 15, 210).astype(int)
    steps = np.clip(rng.lognormal(2.6, 0.6, n), 0, 110).astype(int)
    return np.stack([question + steps + 4, question + 24], axis=1)


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    lengths = gsm8k_like_lengths(1000)
    a, b = data.epoch_batches(lengths, 16, 3, 1), data.epoch_batches(lengths, 16, 3, 1)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) and len(a) == 1000 // 16
    used = np.concatenate(a)
    assert len(set(used)) == len(used) == 62 * 16  # nobody twice, and less than one batch left over
    for other in (data.epoch_batches(lengths, 16, 4, 1), data.epoch_batches(lengths, 16, 3, 2)):
        assert not np.array_equal(np.concatenate(other), used)


def test_ranks_share_every_global_batch():
    batch = data.epoch_batches(gsm8k_like_lengths(100), 8, 0, 0)[0]
    shares = [batch[rank::4] for rank in range(4)]
    assert sorted(np.concatenate(shares)) == sorted(batch) and {len(share) for share in shares} == {2}


def test_buckets_keep_padding_under_five_percent_in_both_pathways():
    lengths = gsm8k_like_lengths(32 * 512)
    batches = data.epoch_batches(lengths, 32, 0, 0)

    def padding(batches):
        return 1 - sum(lengths[b].sum(0) for b in batches) / sum(len(b) * lengths[b].max(0) for b in batches)

    assert (padding(batches) < 0.05).all()
    assert (padding(np.split(np.random.default_rng(1).permutation(len(lengths)), 512)) > 0.3).all()
    mean = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(mean[:-1], mean[1:])[0, 1]) < 0.2  # short and long batches come in no order
