"""data.py: the GSM8K-Aug reader, the built-in task, scoring, tokenizers, rows, batches and their order."""

import base64
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data import Problem, Row, Tokenizer

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
        ("q||First he adds. #### 1\n", ":1: the step 'First'"),
        ("q||<<1=1>> #### 1\n\nq||<<1=1>> #### 1\n", ":2: not of the form"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        ("q\xff||<<1=1>> #### 1\n", "not UTF-8"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape("train.txt") + ".*" + message):
        data.load(path, "train")


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="valid.txt"):
        data.load(tmp_path, "valid")
    with pytest.raises(ValueError, match="dev"):
        data.load("demo", "dev")


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
        ("Jack is a boompus.", "jack is a boompus", False, True),
        ("", "C", False, False),
    ],
)
def test_scoring(text, gold, strict, tolerant):
    assert data.score(text, gold) == (strict, tolerant)


# ---------------------------------------------------------------------------------------------------- tokenizers


def merge_ranks(*merges):
    """Every byte, in order, and then some merges: bytes -> rank."""
    return {**{bytes([i]): i for i in range(256)}, **{merge: 256 + i for i, merge in enumerate(merges)}}


@pytest.fixture
def llama3(tmp_path):
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
    assert (tokenizer.size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.st_id) == (n + 256, n, n + 1, n + 2)
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
    assert (tokenizer.size, tokenizer.bos_id, tokenizer.st_id) == (263, None, None)
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
        ({"tokenizer.model": "\x0a\x0esentencepiece"}, "not Llama-3's format"),
        ({"tokenizer.model": "YQ== 0\nYg== 5\n"}, "ranks are not"),
        ({"words.json": '["a", "a"]'}, "different strings"),
        ({"words.json": '["a"]'}, "<bos>"),
        ({"words.json": "["}, "words.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "endoftext"),
        ({"vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": ""}, "not the 256 bytes"),
        ({"vocab.json": json.dumps({"a" * i: i - 1 for i in range(1, 257)} | {"<|endoftext|>": 256}), "merges.txt": ""},
         "not the 256 bytes"),
        ({"vocab.json": '{"a": 0, "<|endoftext|>": 0}', "merges.txt": ""}, "last of the ids"),
        ({"vocab.json": '{" ": 0, "<|endoftext|>": 1}', "merges.txt": ""}, "vocab.json"),
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
    with pytest.raises(ValueError, match="merge 0 of merges.txt, 's w'"):
        Tokenizer.from_pretrained(gpt2)


# ---------------------------------------------------------------------------------------------- rows and batches


def test_collate_weighs_each_piece_by_its_length():
    rows = [Row(np.array([5, 6, 7, 8, 9, 1], np.int32), 2, 4), Row(np.array([5, 9, 1], np.int32), 1, 1)]
    batch = data.collate(rows, pad_id=1)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 1], [5, 9, 1, 1, 1, 1]]
    dense = torch.zeros(2, 6)
    dense[batch.row, batch.col] = batch.weight
    assert dense.tolist() == [[0, 0, 0.5, 0.5, 0.5, 0.5], [0, 0.5, 0.5, 0, 0, 0]]
    assert batch.at.tolist() == [3, 0]  # z_N is the token before Y


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
