"""Mutated input of every kind: each ends in success, or in a ValueError or OSError with a message (which the programs turn into
one line and exit code 2), soon, in little memory, and nothing is written. CPU, no network."""

import base64
import contextlib
import copy
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save, save_file
from test_data import PUBLISHED, train_sentencepiece

import dart
import data
import eval as evaluation
import model
import train
from data import Tokenizer
from model import MODELS, Adapters, ModelConfig, Transformer

FIXTURES = Path(__file__).parent / "fixtures"
INPUTS = dict(train=300, eval=300, data=300, config=500, model=500, tokenizer=500, problems=800, run=250, question=200, checkpoint=300, resume=25)
SECONDS, MEMORY = 20, 2**30  # that an input may take: far more than any does

# ------------------------------------------------------------------------------------------------------------ mutations

DEEP = [f"@{depth}@" for depth in (3, 500, 880, 930, 945, 955, 960, 965, 970, 975, 980, 985, 990, 100_000)]  # lists within lists
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**20, 2**30, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -1.5, 1e-300,
    1e308, float("nan"), float("inf"), "", "x", "32", "llama", "../x", "..", "/etc/passwd", "a/b", "\x00", "\ud800",
    "%3999999999d", "{}", "\n", "é" * 300, "z" * 70_000, [], {}, [None], [[]], {"": None}, {"type": "x"}, [1, "a"], *DEEP,
]


def dumps(value):
    return re.sub(r'"@(\d+)@"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), json.dumps(value)).encode()


def places(value):
    """(container, key) of everything in a JSON value."""
    found, todo = [], [value]
    while todo:
        one = todo.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        todo += [one[key] for key in keys]
    return found


def change_json(rng, content):
    """Some values replaced, left out, exchanged or added."""
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        few = rng.random() < 0.7  # the places near the top count for more
        at = places(value)
        if not at or rng.random() < 0.02:
            return dumps(copy.deepcopy(rng.choice(VALUES)))
        one, key = rng.choice(at[:40] if few else at)
        other, there = rng.choice(at)
        what = rng.randrange(8)
        if what == 0:
            del one[key]
        elif what == 1:
            one[key] = json.loads(json.dumps(other[there]))
        elif what == 2 and isinstance(one, dict):
            one[rng.choice(["", "x", "é", "a/b", "\x00", str(there)])] = copy.deepcopy(rng.choice(VALUES))
        elif what == 3 and isinstance(one, dict) and type(key) is str:
            one[key + rng.choice(["", "x", "1", "."])] = one.pop(key)
        elif what == 4 and type(one[key]) in (int, float) and abs(one[key]) < 1e300:
            one[key] = rng.choice([-one[key], one[key] + 1, one[key] * 2, float(one[key]), str(one[key]), one[key] * 10**6])
        else:
            one[key] = copy.deepcopy(rng.choice(VALUES))
    return dumps(value)


def change_bytes(rng, content):
    """Some bytes flipped, left out, inserted or doubled; or an end cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at, size = rng.randrange(len(content) + 1), rng.choice([1, 1, 3, 40, 400])
        what = rng.randrange(6)
        if what == 0:
            content[at : at + size] = rng.randbytes(size)
        elif what == 1 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            del content[at : at + size]
        elif what == 3:
            content[at:at] = content[(start := rng.randrange(len(content) + 1)) : start + size]
        elif what == 4:
            content[at:at] = rng.choice(
                [
                    b"\x00",
                    b"\xff\xfe",
                    b'"',
                    b"{",
                    b"[" * 2000,
                    b"\n", b" ", b"9" * 5000, b"||", b"####", b"<<" * 30, b"\xed\xa0\x80", b"\\ud800", b"-", b"NaN", b"1e999",
                ]
            )
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def change_tensors(rng, content):
    """A safetensors file whose header or tensors are others; at times the file is a valid one."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = content[8 : 8 + size], content[8 + size :]
    what = rng.randrange(8)
    if what == 0:
        return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1])) + header + body
    if what == 1:
        return change_bytes(rng, content)
    if what == 2:
        header = change_bytes(rng, header)
    elif what == 3:  # a name twice
        header = header.rstrip()[:-1] + b"," + header.strip()[1:]
    elif what < 6:
        header = json.loads(header)
        for entry in rng.sample(sorted(header), rng.choice([1, 1, 3])):
            if not isinstance(entry := header[entry], dict) or "shape" not in entry:
                continue
            start, end = entry["data_offsets"]
            entry["shape"] = rng.choice(
                [entry["shape"], entry["shape"][::-1], [2**62, 4], [2**40], [], [0], [-1], [1, *entry["shape"]], None]
            )
            entry["dtype"] = rng.choice(
                [entry["dtype"]] * 3 + ["I32", "U32", "BF16", "F64", "F8_E4M3", "F4", "C64", "BOOL", "X", None, 3]
            )
            offsets = [[start, end]] * 8 + [[end, start], [0, 2**63], [start, end + 1], [-1, end], [0, 0], [start], None]
            entry["data_offsets"] = rng.choice(offsets)
        header = json.dumps(header).encode()
    elif what == 6:
        header = change_json(rng, header)
    else:
        return save(change_parsed(rng, content))
    return struct.pack("<Q", len(header)) + header + body


def change_parsed(rng, content):
    """The tensors of a file, some with another type, shape or name."""
    tensors = load(content)
    for name in rng.sample(sorted(tensors), rng.choice([1, 1, 3])):
        tensor = tensors.pop(name)
        dtype = rng.choice(
            [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
        )
        more = rng.choice(
            [
                {}, {name: tensor.to(dtype)}, {name: tensor * float("nan")}, {name + "x": tensor}, {name: tensor[..., :0]},
                {name: tensor[..., None].clone()}, {name: tensor.sum()}, {"lm_head.weight": tensor.clone(), name: tensor},
            ]
        )
        tensors |= more
    return tensors


def change_file(rng, path):
    """A file's content, mutated by what it is."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return change_tensors(rng, content)
    if path.suffix == ".json" and rng.random() < 0.8:
        return change_json(rng, content)
    return change_bytes(rng, content)


# ---------------------------------------------------------------------------------------------------------------- limits


def peaks():
    """The most memory so far that was used, and that was asked for, in bytes."""
    status = Path("/proc/self/status").read_text()
    return [1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmHWM", "VmPeak")]


@pytest.fixture(autouse=True)
def memory():
    """No surface may take MEMORY."""
    if not Path("/proc/self/status").exists():
        yield
        return
    before = peaks()
    yield
    used, asked = (after - was for after, was in zip(peaks(), before, strict=True))
    assert used < MEMORY and asked < 4 * MEMORY  # threads ask for more than they use


class Hang(BaseException):
    pass


def hang(*_):
    raise Hang(f"no end after {SECONDS} s")


@contextlib.contextmanager
def bounded():
    old = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def tree(directory):
    """All that is in a directory, with its time of change and size."""
    found = (
        (path, os.stat(path)) for at, _, names in os.walk(directory) for path in (at, *(os.path.join(at, name) for name in names))
    )
    return {path: (about.st_mtime_ns, about.st_size) for path, about in found}


def ends_well(function, named="", directory=None):
    """Calls a function; true where it succeeds. Else it must be a ValueError or OSError whose message has `named` in it."""
    before = tree(directory) if directory else None
    with bounded():
        try:
            function()
            error = None
        except (ValueError, OSError) as caught:
            error = caught
    assert before is None or tree(directory) == before
    assert error is None or (str(error).strip() and str(named) in str(error)), (error, named)
    return error is None


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty directory, beside the working directory; all in one that is watched."""
    (tmp_path / "here").mkdir()
    (tmp_path / "case").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "case"


def fuzz_directory(surface, sources, place, function, only=""):
    """INPUTS[surface] directories, each a copy of one of the sources with one or two of its files mutated or left out. Most inputs
    must be refused, but some accepted, or the mutations would say nothing."""
    rng, succeeded = random.Random(surface), 0
    for i in range(INPUTS[surface]):
        source = sources[i % len(sources)]
        shutil.rmtree(place)
        place.mkdir()
        names = sorted(path.name for path in source.iterdir() if path.name != "expected.safetensors")
        for name in names:
            os.link(source / name, place / name)
        names = [name for name in names if only in name]
        for name in rng.sample(names, min(len(names), rng.choice([1, 1, 1, 2]))):
            (place / name).unlink()
            if rng.random() < 0.97:
                (place / name).write_bytes(change_file(rng, source / name))
        try:
            succeeded += ends_well(functools.partial(function, place), place, place.parent)
        except BaseException as error:
            error.add_note(f"{surface}, input {i} of {source.name}")
            raise
    assert INPUTS[surface] / 50 < succeeded < INPUTS[surface] * 0.9


# -------------------------------------------------------------------------------------------------------------- surfaces


def arguments(rng, options):
    """A command line of some options, with values that fit and values that don't."""
    line = []
    for field in rng.sample(options, rng.choice([1, 1, 2, 5])):
        fitting = [field.default] * 12 if rng.random() < 0.7 else []
        values = [
            *fitting, *(field.metadata.get("choices") or ()), "", "-", "--", "1e9", "nan", "-inf", "x" * 5000, "9" * 5000,
            10**400, "\x00", "\ud800", "%s", "@/etc/passwd", "../x", "１２", "0x10", " 1", "1_0", *range(-1, 3), 2**31, 2**63, 10**30, 0.5,
            1e308, 1e-320,
        ]
        flag = rng.choice(["--"] * 12 + ["-", "---", "", "--no-"]) + field.name[: rng.choice([None] * 8 + [3])]
        more = [str(value) for value in rng.choices(values, k=rng.choice([0, 1, 1, 1, 1, 2]))]
        line += [f"{flag}={more[0]}"] if more and rng.random() < 0.3 else [flag, *more]
    return rng.choices(line, k=len(line)) if rng.random() < 0.1 else line


@pytest.mark.parametrize("surface", ["train", "eval"])
def test_command_lines(surface, place, capsys):
    cls, read = {
        "train": (train.Options, train.read_options),
        "eval": (evaluation.Options, lambda argv: evaluation.parse_options(evaluation.Options, argv, "")),
    }[surface]
    rng, succeeded = random.Random(surface), 0
    for _ in range(INPUTS[surface]):
        succeeded += ends_well(lambda line=arguments(rng, dataclasses.fields(cls)): read(line), directory=place.parent)
    assert 10 < succeeded < INPUTS[surface] - 10


def test_the_command_line_of_data(place, capsys, monkeypatch):
    """As a program: one line and exit code 2."""
    monkeypatch.setattr(data, "fetch", lambda name, data_dir: None)
    monkeypatch.setattr(data, "demo_problems", functools.cache(data.demo_problems))
    rng = random.Random("data")
    words = [
        "stats", "stats", "svamp", "demo", "gsm8k", "/etc/passwd", "..", "", "\x00", "é", "--tokenizer", "--data_dir",
        str(place), "-x", "--", "x" * 5000, str(FIXTURES / "tokenizer-gpt2"), str(FIXTURES / "llama" / "model.safetensors"),
    ]
    codes = []
    for _ in range(INPUTS["data"]):
        line, before = rng.choices(words, k=rng.choice([0, 1, 2, 2, 3, 5])), tree(place.parent)
        with bounded():
            try:
                data.main(line)
                codes.append(0)
            except SystemExit as stop:
                codes.append(stop.code)
        said = capsys.readouterr().err
        assert (said.count("\n"), said.startswith("error: ")) == ((1, True) if codes[-1] == 2 else (0, False)), line
        assert tree(place.parent) == before
    assert set(codes) == {0, 2}


def test_configurations(place):
    fuzz_directory(
        "config", [FIXTURES / name for name in ("llama", "qwen2", "gpt2", "gpt2-untied")], place, ModelConfig.from_pretrained,
        "config",
    )


IDS = torch.tensor([[1, 2, 3]])


@torch.no_grad()
def load_and_run(directory):
    Transformer.from_pretrained(directory, Adapters(lora_rank=2, rem_rank=2))(IDS, silent=True)


def test_models(place):
    fuzz_directory(
        "model",
        [FIXTURES / name for name in ("llama", "qwen2", "llama-shards", "gpt2-untied", "llama-shards")],
        place,
        load_and_run,
    )


TEXTS = ["", "Answer: 12", "<<3*4=12>>", " héllo\n 日本 👩‍👩‍👧 \x00\x85", "<|endoftext|><s> <tool_call>", "sam has 7 pens ?"]


def read_tokenizer(directory):
    tokenizer = Tokenizer.from_pretrained(directory)
    str(tokenizer)
    for text in TEXTS:
        for continued in (False, True):
            ids = [tokenizer.eos_id]
            with contextlib.suppress(ValueError):  # the text has no ids
                ids = tokenizer.encode(text, bos=True, eos=True, continued=continued)
            assert all(0 <= i < tokenizer.size for i in ids)
            tokenizer.decode(ids).encode()
    tokenizer.decode([*range(tokenizer.size), tokenizer.size, 10**9]).encode()
    with contextlib.suppress(ValueError):  # a SentencePiece model that cannot be exported
        files, st_id = tokenizer.export(True)
        assert all(json.loads(text) for text in files.values()) and 0 <= st_id <= tokenizer.size


@pytest.fixture
def tokenizers(tmp_path_factory, monkeypatch):
    """A directory of every kind of tokenizer."""
    monkeypatch.setattr(data, "LLAMA3_RANKS", 258)
    root = tmp_path_factory.mktemp("tokenizers")
    for name in ("words", "sentencepiece", "llama3", "gpt2", "qwen2"):
        (root / name).mkdir()
    (root / "words" / "words.json").write_text(json.dumps(data.DEMO_WORDS))
    (root / "sentencepiece" / "tokenizer.model").write_bytes(train_sentencepiece())
    tokens = [*(bytes([i]) for i in range(256)), b"An", b"12"]
    (root / "llama3" / "tokenizer.model").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    for name in ("gpt2", "qwen2"):
        raw, config = (
            json.loads((FIXTURES / f"tokenizer-{name}" / f"tokenizer{end}.json").read_text()) for end in ("", "_config")
        )
        vocab, merges = raw["model"]["vocab"], {"".join(pair): pair for pair in reversed(raw["model"]["merges"])}
        if name == "qwen2":
            config |= {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {t["id"]: t for t in raw["added_tokens"]}}
        else:
            vocab |= {"<|endoftext|>": 420}
        (root / name / "vocab.json").write_text(json.dumps(vocab))
        (root / name / "merges.txt").write_text(
            "".join(f"{a} {b}\n" for a, b in sorted(merges.values(), key=lambda p: vocab["".join(p)]))
        )
        (root / name / "tokenizer_config.json").write_text(json.dumps(config))
        (root / name / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in raw["added_tokens"]}))
    found = [*root.iterdir(), *(FIXTURES / f"tokenizer-{name}" for name in ("gpt2", "llama3", "qwen2"))]
    for directory in found:
        read_tokenizer(directory)
    return sorted(found)


def test_tokenizers(place, tokenizers):
    fuzz_directory("tokenizer", tokenizers, place, read_tokenizer)


def test_problems(place, monkeypatch):
    monkeypatch.setattr(
        data,
        "DATASETS",
        {name: (reader, {"test": splits["test"]._replace(count=2)}) for name, (reader, splits) in data.DATASETS.items()},
    )
    tokenizer = Tokenizer.from_pretrained(FIXTURES / "tokenizer-gpt2")
    line = "Ann has 12 pens, and 3.5 more. How many?||<<12+3=15>> <<15+.5=15.5>> #### 15.5\n"
    own = {"question": "Two  and two?", "steps": ["2+2", "is 4"], "answer": 4}
    contents = {
        "gsm8k-aug": line * 2,
        "own.txt": line * 2,
        "own.jsonl": json.dumps(own) + "\n" + json.dumps(own),
        "own.json": json.dumps([own, own]),
    }
    contents |= {name: json.dumps([record] * 2) for name, (record, _) in PUBLISHED.items()}
    rng, succeeded = random.Random("problems"), 0
    for i in range(INPUTS["problems"]):
        name, content = list(contents.items())[i % len(contents)]
        is_own = name.startswith("own")
        path = place / (name if is_own else f"{name}/{data.DATASETS[name][1]['test'].file}")
        path.parent.mkdir(exist_ok=True)
        mutate = change_json if rng.random() < 0.7 and content.startswith("[") else change_bytes
        path.write_bytes(mutate(rng, content.encode()))
        call = lambda name=path if is_own else name: data.stats(data.load(name, "test", data_dir=place), tokenizer)  # noqa: E731
        succeeded += ends_well(call, path.name, place.parent)
    assert INPUTS["problems"] / 20 < succeeded < INPUTS["problems"] * 0.9


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs: all weights of a small model, trained for a step; and adapters on a model that lies elsewhere."""
    root = tmp_path_factory.mktemp("runs")
    train.main(
        ["--compare", "--steps", "1", "--batch_size", "4", "--eval_size", "1", "--device", "cpu", "--out", str(root / "demo")]
    )
    (root / "adapters").mkdir()
    base = FIXTURES / "llama"
    config, tokenizer = ModelConfig.from_pretrained(base), data.demo_tokenizer()
    options = evaluation.RunOptions(model=str(base), lora_rank=2, rem_rank=2, n_st=3, dtype="fp32", data="demo")
    adapted = Transformer.from_pretrained(base, dart.DART.adapters(tokenizer, options))
    tokenizer.save(root / "adapters")
    save_file(adapted.adapter_state(), root / "adapters" / "adapter.safetensors")
    saved = {"options": dataclasses.asdict(options), "model_config": dataclasses.asdict(config)}
    (root / "adapters" / "config.json").write_text(json.dumps(saved))
    for path in (path for name in ("result.json", "log.jsonl", "best.safetensors", "checkpoint-*") for path in (root / "demo").glob(name)):
        path.unlink()
    return [root / "demo", root / "adapters"]


def test_checkpoints(place, tmp_path, capsys):
    """Damaged ones, and others whose checksum is right, though what is in them is not."""
    options = ["--compare", "--steps", "2", "--batch_size", "4", "--eval_size", "0", "--save_every", "1", "--device", "cpu",
               "--keep_checkpoints", "1", "--out"]  # fmt: skip
    train.main([*options, str(tmp_path / "run")])
    source = tmp_path / "run" / "checkpoint-00000002.json"
    run = train.prepare(train.read_options([*options, str(place)]), "cpu")
    rng, succeeded = random.Random("checkpoint"), 0
    for _ in range(INPUTS["checkpoint"]):
        for path in place.iterdir():
            path.unlink()
        paths = [place / source.name, (place / source.name).with_suffix(".safetensors")]
        changed = rng.choice([(0,), (1,), (0, 1)])
        for i, path in enumerate(paths):
            content = change_file(rng, source.with_name(path.name)) if i in changed else source.with_name(path.name).read_bytes()
            path.write_bytes(content)
        with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):
            if rng.random() < 0.8 and "checksum" in (content := json.loads(paths[0].read_text())):
                content.pop("checksum")
                paths[0].write_text(json.dumps({"checksum": train.checksum(paths[0], content), **content}))
        succeeded += ends_well(lambda: train.load_checkpoint(run), source.stem, place.parent)
        if run.progress.step:  # it was taken up: then the training must be able to go on
            assert run.progress.step == 2 and all(type(flops) is float for flops in run.progress.flops.values())
            run.progress = train.Progress(flops=dict.fromkeys(run.method.pathways, 0.0))
    assert INPUTS["checkpoint"] / 100 < succeeded < INPUTS["checkpoint"] * 0.9


def test_resumptions(place, tmp_path, capsys):
    """A run of two steps, one of its files mutated, through the program: success, or one line and an exit code, and nothing is written
    beside it."""
    options = ["--compare", "--steps", "2", "--batch_size", "4", "--eval_size", "1", "--eval_every", "1", "--save_every", "1", "--device", "cpu",
               "--keep_checkpoints", "1", "--max_new_tokens", "4", "--lora_rank", "1", "--out"]  # fmt: skip
    train.main([*options, str(tmp_path / "run")])
    names, rng, codes = sorted(path.name for path in (tmp_path / "run").iterdir()), random.Random("resume"), []
    for _ in range(INPUTS["resume"]):
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "run", place)
        changed = rng.choice(names)
        if changed != "result.json":
            (place / "result.json").unlink()
        if rng.random() < 0.1:
            (place / changed).unlink(missing_ok=True)
            (place / changed).symlink_to(tmp_path / "here") if rng.random() < 0.5 else os.mkfifo(place / changed)
        elif (place / changed).stat().st_size:
            (place / changed).write_bytes(change_file(rng, place / changed))
        beside, code = tree(tmp_path / "here"), 0
        capsys.readouterr()
        with bounded():
            try:
                train.main([*options, str(place), "--resume"])
            except SystemExit as stop:
                code = stop.code
        said = capsys.readouterr().err
        assert (said.count("\n"), said.startswith("error: ")) == ((1, True) if code else (0, False)), (changed, said)
        assert code in (0, 1, 2) and tree(tmp_path / "here") == beside
        codes.append(code)
    assert set(codes) >= {0, 2}


QUESTION = "sam has 7 pens gets 5 packs of 4 ?"


def test_runs(place, runs):
    def answer(directory):
        method, _ = evaluation.load_run(directory)
        name, pathway = list(method.pathways.items())[-1]
        with contextlib.suppress(ValueError):  # of a word that its tokenizer does not have, or of no room
            dart.answer(method.model, method.tokenizer, pathway, [QUESTION], 2)

    fuzz_directory("run", runs, place, answer)


def test_questions(place):
    rng = random.Random("question")
    config = dataclasses.replace(MODELS["demo"], vocab_size=512, num_hidden_layers=2)
    small = Transformer(config, Adapters(rem_rank=2, extra_rows=2)).eval()
    pathways = [
        dart.Pathway(), dart.Pathway(steps=True), dart.Pathway(n_fill=3, fill_id=512, silent=True),
        dart.Pathway(marks=(512, 513), thoughts=2), dart.Pathway(steps=True, marks=(512, 513), thoughts=1),
    ]
    (place / "tokenizer.model").write_bytes(train_sentencepiece())
    tokenizers = [
        data.demo_tokenizer(),
        Tokenizer.from_pretrained(place),
        *(Tokenizer.from_pretrained(FIXTURES / f"tokenizer-{name}") for name in ("gpt2", "llama3", "qwen2")),
    ]
    pieces = [
        QUESTION, "sam has 7", " ", "\t", "\n", "\x00",
        "\x1b[2J",
        "\ud800", "\udfff", "👩‍👩‍👧‍👦", "e\u0301", "\u202e", "\ufeff", "Answer:", "<<1+1=2>>", "<st>", "<eos>", "<|endoftext|>",
        "</s>", "|" * 50, "9" * 60, "日本語", "\u2028", "\x85", "%s", "\u2581", "\ufffd", "\U0010ffff",
    ]
    long = [
        "\n" * 1_200_000 + "x", "\xa0" * 1_200_000, "x" * 10**7, "7 " * 10**5, "sam " * 10**5, "\x00" * 4 * 10**5,
        "\u3000" * 4 * 10**5,
    ]
    questions = ["", " ", "\n\n", *long]
    questions += [
        "".join(rng.choices(pieces, k=rng.choice([1, 1, 2, 2, 3, 4]))) for _ in range(INPUTS["question"] - len(questions))
    ]
    succeeded = 0
    for i, question in enumerate(questions):
        for tokenizer in tokenizers if i < 10 else [tokenizers[i % 5]]:
            pathway = pathways[i // 5 % 5]
            ask = lambda p=pathway, t=tokenizer, q=question: dart.answer(small, t, p, [q, QUESTION][: 1 + i % 2], 3)  # noqa: E731
            well = ends_well(ask, directory=place.parent)
            assert not well or not (any("\ud800" <= c <= "\udfff" for c in question) or not question.strip())
            succeeded += well
    assert INPUTS["question"] / 4 < succeeded < INPUTS["question"] * 0.9


# --------------------------------------------------------------------------------------------------- what was found so


def config_of(directory, family, **changes):
    shutil.copytree(FIXTURES / family, directory, dirs_exist_ok=True)
    (directory / "config.json").write_text(json.dumps(json.loads((FIXTURES / family / "config.json").read_text()) | changes))
    return directory


@pytest.mark.parametrize(
    "family, field, value, message",
    [
        ("llama", "num_hidden_layers", 1000, "layers.3.input_layernorm.weight is missing"),
        ("llama", "num_hidden_layers", 2**30, "num_hidden_layers"), ("llama", "vocab_size", 2**24, "has the shape"),
        ("llama", "vocab_size", 2**24 + 1, "vocab_size"), ("llama", "intermediate_size", 2**22, "has the shape"),
        ("llama", "head_dim", 2**14, "has the shape"),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 10**29}, "rope_theta"),
        ("gpt2", "n_positions", 2**31 - 1, "has the shape"), ("gpt2", "n_embd", "%3999999999d", "n_embd"),
    ],
)
def test_a_configuration_takes_no_memory_that_its_files_do_not_ask_for(place, monkeypatch, family, field, value, message):
    built = []
    monkeypatch.setattr(
        model.Block, "__init__", lambda *args, real=model.Block.__init__, **how: built.append(1) or real(*args, **how)
    )
    assert not ends_well(lambda: Transformer.from_pretrained(config_of(place, family, **{field: value})), message)
    assert len(built) <= 100


def test_a_model_larger_than_the_machine_is_refused(place):
    directory = config_of(place, "llama", vocab_size=2**24, hidden_size=2**20)
    assert not ends_well(lambda: Transformer(ModelConfig.from_pretrained(directory)), "of the machine")


@pytest.mark.parametrize(
    "which, part, field, value",
    [
        (0, "model_config", "num_hidden_layers", 1000), (0, "model_config", "vocab_size", 2**24),
        (0, "model_config", "hidden_size", 2**20), (0, "options", "rem_rank", 8192), (0, "options", "rem_rank", 10**9),
        (1, "options", "lora_rank", 8192), (1, "options", "lora_rank", 10**9), (1, "options", "n_st", 10**12),
        (1, "model_config", "num_hidden_layers", 1000),
    ],
)
def test_a_run_takes_no_memory_that_its_file_does_not_ask_for(place, runs, monkeypatch, which, part, field, value):
    shutil.copytree(runs[which], place, dirs_exist_ok=True)
    config = json.loads((place / "config.json").read_text())
    config[part][field] = value
    (place / "config.json").write_text(json.dumps(config))
    devices = []
    monkeypatch.setattr(model, "_check_memory", lambda config, adapters, dtype, device: devices.append(device))
    assert not ends_well(lambda: evaluation.load_run(place), place)
    assert set(devices) <= {"meta"}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"options": {"n_st": ' + "9" * 5000 + "}}"])
def test_json_that_python_gives_up_on_is_named(place, text):
    (place / "config.json").write_text(text)
    assert not ends_well(lambda: evaluation.read_run(place), "config.json: not JSON")


@pytest.mark.parametrize("line", ["q||" + "<<" * 200_000 + "#### 1", "q||#### " + "1" * 200_000 + "x"])
def test_a_long_line_is_read_in_one_go(place, line):
    (place / "a.txt").write_text(line)
    ends_well(lambda: data.stats(data.load(place / "a.txt", "test")), "a.txt:1")


def test_steps_are_cut_out():
    assert data._cut_steps("<<1>> x<<2>>>") == (["<<1>>", "<<2>>"], " x>")
    assert data._cut_steps("<<>>1>> <<a <<b\n<<3>>") == (["<<>>1>>", "<<3>>"], " <<a <<b\n")
    assert data._cut_steps("<<>>") == ([], "<<>>")


def test_tokens_without_end_are_refused(place):
    vocab = json.loads((FIXTURES / "tokenizer-gpt2" / "tokenizer.json").read_text())
    vocab["model"]["vocab"]["a" * 300_000] = 421
    (place / "tokenizer.json").write_text(json.dumps(vocab))
    assert not ends_well(lambda: Tokenizer.from_pretrained(place), "the tokens are too long")


def test_a_word_that_is_half_a_character_is_refused(place):
    (place / "words.json").write_text(json.dumps([*data.DEMO_WORDS, "\ud800"]))
    assert not ends_well(lambda: Tokenizer.from_pretrained(place), place)


def test_a_cache_has_no_more_room_than_the_model_has_positions():
    assert model.KVCache(MODELS["demo"], 1, 10**12).k[0].shape[1] == MODELS["demo"].max_position_embeddings


def test_removal_in_a_row_stays_a_number():
    options = dart.Options(method="icot", lora_rank=0, removal_smoothing=5e-324)
    method = dart.ICoT(Transformer(MODELS["demo"]), data.demo_tokenizer(), options)
    assert method.training_pathway("icot", 3, 0.5).skip_tokens == dart.ALL + 3


@pytest.mark.parametrize("name, most", [("lora_rank", 8192), ("rem_rank", 8192), ("n_st", 10_000), ("n_thoughts", 1000)])
def test_options_that_take_memory_have_a_limit(name, most):
    evaluation.parse_options(dart.Options, [f"--{name}", str(most)], "")
    assert not ends_well(lambda: evaluation.parse_options(dart.Options, [f"--{name}", str(most + 1)], ""), f"--{name}")


def test_a_piece_that_is_no_text_is_refused(place):
    proto = train_sentencepiece()
    assert proto.count(b"\n\x01y\x15") == 1
    (place / "tokenizer.model").write_bytes(proto.replace(b"\n\x01y\x15", b"\n\x01\xff\x15"))
    assert not ends_well(lambda: Tokenizer.from_pretrained(place), "tokenizer.model: 'utf-8'")
