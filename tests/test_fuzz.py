"""Damaged files of every kind, read by train.py and eval.py: success, or one line and code 2."""

import copy
import json
import os
import random
import shutil

import pytest
from test_data import FIXTURES, RECORDS, write_sentencepiece, write_vocab_and_merges

import data
import eval as evaluation
import train

INPUTS = 30  # of each kind
STRANGE = [None, True, -1, 0, 1, 7, 0.5, 1e308, float("nan"), 2**63, 10**400, "", "x", "\ud800"]
STRANGE += ["\x1b[2J\n", "../x", "9" * 3000, [], {}, [None], {"": None}, [[1, "a"]], ["a", "b"]]
PIECES = [b"\0", b"\xff\xfe", b'"', b"{", b"[" * 5000, b"\n", b"9" * 5000, b"||", b"####", b"<<"]
PIECES += [b"\xed\xa0\x80", b"\\ud800", b"-", b"NaN", b"1e999", b",", b"}", b"version https://git"]
OPTIONS = """
--preset gpt2 --lora_rank 2 --rem_rank 2 --n_st 2 --steps 2 --save_every 1 --batch_size 2
--eval_size 2 --eval_every 1 --log_every 1 --max_new_tokens 2 --dtype fp32 --device cpu
""".split()
PROBLEM = {"question": "How many are 1 and 2?", "steps": ["<<1+2=3>>", "<<3*2=6>>"], "answer": "6"}


def change_bytes(rng, content):
    """Some bytes replaced, left out, put in or doubled, or the end cut off."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, size = rng.randrange(len(content) + 1), rng.choice([1, 1, 3, 40])
        before, after = content[:at], content[at:]
        changes = [rng.randbytes(size) + after[size:], after[size:], rng.choice(PIECES) + after]
        content = before + rng.choice([*changes, after[:size] + after, b""])
    return content


def change_json(rng, content):
    """A value replaced or left out, mostly near the top."""
    value, places = json.loads(content), []
    parts = [value]
    for part in parts:
        numbered = enumerate(part if isinstance(part, list) else ())
        for key, inner in part.items() if isinstance(part, dict) else numbered:
            places.append((part, key))
            parts.append(inner)
    part, key = rng.choice(places[: 40 if rng.random() < 0.7 else None])
    if rng.random() < 0.2:
        del part[key]
    else:
        part[key] = copy.deepcopy(rng.choice([*STRANGE, *parts[1:6], rng.choice(parts)]))
    return json.dumps(value).encode()


def change_file(rng, path):
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        return change_json(rng, content)
    if path.suffix == ".safetensors" and rng.random() < 0.5:
        end = 8 + int.from_bytes(content[:8], "little")
        header = rng.choice([change_bytes, change_json])(rng, content[8:end])
        return len(header).to_bytes(8, "little") + header + content[end:]
    return change_bytes(rng, content)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Directories: a base model with its tokenizer, a run trained on it, data, tokenizers."""
    root = tmp_path_factory.mktemp("root")
    for name in ("data", "random", "records", "lines", "vocab", "sentencepiece", "words"):
        (root / name).mkdir()
    for split in ("train", "valid", "test"):
        (root / "data" / f"{split}.jsonl").write_text(3 * (json.dumps(PROBLEM) + "\n"))
    (root / "records" / "test.json").write_text(json.dumps(RECORDS[::2]))
    (root / "lines" / "test.txt").write_text(3 * "1 and 2?||<<1+2=3>> <<3*2=6>> #### 6\n")
    write_vocab_and_merges(root / "vocab", "qwen2")
    write_sentencepiece(root / "sentencepiece")
    words = "<bos> <eos> <st> How many are 1 and 2 ? << >> + * = 3 6 Answer :".split()
    (root / "words" / "words.json").write_text(json.dumps(words))
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    config |= {"vocab_size": 430, "num_hidden_layers": 2}
    (root / "random" / "config.json").write_text(json.dumps(config))
    options = [*OPTIONS, "--data", str(root / "data")]
    made = ["--random_init", "--model", str(root / "random"), "--out", str(root / "made")]
    train.main([*options, *made, "--tokenizer", str(FIXTURES / "tokenizer-llama3")])
    evaluation.main(["--ckpt", str(root / "made"), "--export", str(root / "base")])
    train.main([*options, "--model", str(root / "base"), "--out", str(root / "run")])
    return root


def arguments(kind, root, place):
    """(program, its arguments) that read the files of `place`."""
    options = [*OPTIONS, "--data", str(root / "data"), "--model"]
    ask = ["--latency", "0", "--device", "cpu", "--ckpt"]
    if kind == "run":
        return evaluation.main, [*ask, str(place)]
    if kind in ("records", "lines"):
        return evaluation.main, [*ask, str(root / "run"), "--data", str(place)]
    if kind == "run to resume":
        (place / "result.json").unlink()
        return train.main, [*options, str(root / "base"), "--out", str(place), "--resume"]
    options += [str(place if kind == "base" else root / "base"), "--tokenizer", str(place)]
    return train.main, [*options, "--out", str(place / "out")]


FILES = {  # that are damaged, of a directory in which there are others
    "base": ["config.json", "model.safetensors", "tokenizer.json"],
    "run": ["config.json", "adapter.safetensors", "tokenizer.json"],
    "run to resume": ["config.json", "checkpoint.safetensors", "log.jsonl"],
}


@pytest.mark.parametrize("kind", [*FILES, "records", "lines", "vocab", "sentencepiece", "words"])
def test_damaged_files_end_in_one_line_or_do_no_harm(tmp_path, root, capsys, kind):
    rng, codes = random.Random(kind), []
    for i in range(INPUTS):
        place = tmp_path / str(i)
        shutil.copytree(root / kind.split()[0], place)
        main, argv = arguments(kind, root, place)
        changed = place / rng.choice(FILES.get(kind) or sorted(os.listdir(root / kind)))
        changed.write_bytes(change_file(rng, changed))
        try:
            data.run_program(lambda main=main, argv=argv: main(argv))
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code)
        said = capsys.readouterr().err
        line = (codes[-1], said.count("\n"), said[:7])
        assert line in ((0, 0, ""), (2, 1, "error: ")), (i, changed.name, said)
    assert set(codes) == {0, 2}
