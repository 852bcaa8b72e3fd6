"""Against the published files, which are not part of this repository. Run by hand:

    pip install transformers && PUBLISHED=DIR python -m pytest -q tests/published.py

DIR holds datasets/ (as `python data.py` fills it: what is there is tested), tokenizers/{llama3,
llama2,qwen2,gpt2} and checkpoints/{tiny-gpt2,arithmetic-llama}, Hugging Face directories. The
references are sentencepiece, tokenizers and transformers.
"""

import base64
import os
import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers

import data
from data import Tokenizer
from model import KVCache, Transformer
from test_data import write_sentencepiece_json

DIR = Path(os.environ["PUBLISHED"])
SETS = [(name, split) for name, splits in data.DATASETS.items() for split in splits]
SETS = [
    pair
    for pair in SETS
    if (DIR / "datasets" / pair[0] / data.DATASETS[pair[0]][pair[1]].file).is_file()
]


def load(name, split):
    return data.load(name, split, data_dir=DIR / "datasets")


# ------------------------------------------------------------------------------------ data sets


@pytest.mark.parametrize("name, split", SETS)
def test_published_data_are_read(name, split):
    """With the right checksum and count: `load` compares them."""
    problems = load(name, split)
    kind = {"prosqa": "sentence", "commonsenseqa-cot": "letter"}.get(name, "number")
    assert {data.answer_kind(problem.answer) for problem in problems} == {kind}
    assert all(data.score(p.answer, p.answer) == (True, True) for p in problems)


def test_gsm8k_and_gsm8k_aug_have_the_same_test_split():
    """The steps of the one are the calculations within the other's solutions."""
    problems = load("gsm8k-aug", "test")
    assert problems == load("gsm8k", "test")
    assert (
        sum(not p.steps for p in problems) == 18 and sum(len(p.steps) <= 1 for p in problems) == 83
    )


# ----------------------------------------------------------------------------------- tokenizers


def llama3_json(ranks):
    """Hugging Face's tokenizer of Llama 3's ranks: every way to split a token in two is a merge."""
    spell = {byte: character for character, byte in data.byte_spelling().items()}
    spelled = {token: "".join(map(spell.get, token)) for token in ranks}
    merges = [
        (spelled[token[:i]], spelled[token[i:]])
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    bpe = tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
    theirs, pre = tokenizers.Tokenizer(bpe), tokenizers.pre_tokenizers
    cut = pre.Split(tokenizers.Regex(data.LLAMA3_PATTERN), "isolated")
    theirs.pre_tokenizer = pre.Sequence([cut, pre.ByteLevel(False, use_regex=False)])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    added = Tokenizer.from_pretrained(DIR / "tokenizers/llama3").added
    theirs.add_special_tokens(sorted(added, key=added.get))
    return theirs


def hugging_face(family, temporary):
    directory, bos = DIR / "tokenizers" / family, {"llama3": "<|begin_of_text|>", "llama2": "<s>"}
    if family == "llama3":
        lines = map(bytes.split, (directory / "tokenizer.model").read_bytes().splitlines())
        theirs = llama3_json({base64.b64decode(token): int(rank) for token, rank in lines})
    elif family == "llama2":
        (temporary / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
        write_sentencepiece_json(temporary)
        theirs = tokenizers.Tokenizer.from_file(str(temporary / "tokenizer.json"))
    else:
        return transformers.AutoTokenizer.from_pretrained(directory).backend_tokenizer
    first = [(bos[family], theirs.token_to_id(bos[family]))]
    template = tokenizers.processors.TemplateProcessing
    theirs.post_processor = template(single=f"{bos[family]} $A", special_tokens=first)
    return theirs


@pytest.fixture(scope="module", params=["llama3", "llama2", "qwen2", "gpt2"])
def family(request, tmp_path_factory):
    """(name, tokenizers of ours: of the published files, of these with a tokenizer.json, and of
    the tokenizer.json alone; Hugging Face's)"""
    theirs = hugging_face(request.param, tmp_path_factory.mktemp("theirs"))
    published, both, alone = (tmp_path_factory.mktemp(name) for name in ("files", "both", "json"))
    for path in (DIR / "tokenizers" / request.param).iterdir():
        for directory in (published, both, alone):
            if path.name == "tokenizer_config.json" or (
                directory != alone and path.name != "tokenizer.json"
            ):
                (directory / path.name).write_bytes(path.read_bytes())
    for directory in (both, alone):
        theirs.save(str(directory / "tokenizer.json"))
    directories = [published, both] + [alone] * (request.param != "llama2")
    theirs.encode_special_tokens = True
    return request.param, [Tokenizer.from_pretrained(path) for path in directories], theirs


def texts_of_the_data():
    """The texts of all problems, but of large training sets."""
    texts = {"Answer:"}
    for name, split in SETS:
        for problem in load(name, split)[:2000]:
            texts |= {problem.question, " ".join(problem.steps), problem.answer}
    return sorted(texts)


def adversarial_texts():
    """Every character in three surroundings; runs; what belongs together; mixtures; names."""
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    texts, rng, classes = [], random.Random(0), {}
    for i in range(0, len(characters), 97):
        some, c = characters[i : i + 97], characters[i]
        texts += [" ".join(some), "a".join(some), f"a{c}{c} 1{c}\n{c}"]
    runs = (" ", "a", "7", "\n", "\t ", "é", "ab", "=", "\u0301", "👍🏽")
    texts += [f"b{unit * n}" for unit in runs for n in (1, 3, 100, 9_999)]
    texts += [
        "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☂️ 1️⃣",
        "e\u0301 Å \u212b ﬁ",
        "I'LL we'Re 'ſ ſ 'S",
        "a\r\n\r\n b\r",
        "\x00\x1b[0m\x7f\x85\ufeff",
    ]
    texts += ["<|begin_of_text|>a<|eot_id|> <|endoftext|><|im_start|>b <s></s><unk>"]
    for c in characters:
        classes.setdefault(unicodedata.category(c), []).append(c)
    for _ in range(20_000):
        some = [rng.choice(classes[kind]) for kind in rng.choices(list(classes), k=3)]
        texts.append("".join(rng.choices([*some, *"a '1\n"], k=rng.randint(1, 30))))
    return texts


def composed_alike(text):
    """Their tables of Unicode may be older than Python's."""
    theirs = tokenizers.normalizers.NFC().normalize_str(text)
    return theirs == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("source", [texts_of_the_data, adversarial_texts])
def test_ids_are_those_of_the_authors(family, source):
    name, ours, theirs = family
    texts = [text for text in source() if name != "qwen2" or composed_alike(text)]
    texts += [ours[0].decode([i]) for i in range(ours[0].size)] * (name in ("llama3", "gpt2"))
    if name == "llama2":
        path = DIR / "tokenizers/llama2/tokenizer.model"
        expected = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(texts)
    else:
        expected = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    assert len(texts) > 5_000
    for tokenizer in ours:
        for text, ids in zip(texts, expected, strict=True):
            assert tokenizer.encode(text, bos=False, eos=False) == ids, text[:200]
            text = unicodedata.normalize("NFC", text) if name == "qwen2" else text
            assert tokenizer.decode(ids) == (
                text.replace("\u2581", " ") if name == "llama2" else text
            )


def test_special_ids(family):
    name, ours, theirs = family
    special = {
        "llama3": (128_000, 128_001, (128_002, 128_003), 128_256),
        "llama2": (1, 2, (), 32_000),
        "qwen2": (None, 151_645, (), 151_646),
        "gpt2": (None, 50_256, (), 50_257),
    }
    for tokenizer in ours:
        found = tokenizer.bos_id, tokenizer.eos_id, tokenizer.reserved, tokenizer.size
        assert found == special[name]


@pytest.mark.parametrize("source", [texts_of_the_data, adversarial_texts])
def test_exported_tokenizers_have_the_same_ids(family, source, tmp_path):
    """As transformers reads them, BOS and <st> included."""
    name, (_, ours, *_), _ = family
    files, st_id = ours.export(with_st=True)
    for file, content in files.items():
        if file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = theirs.bos_token_id, theirs.eos_token_id, theirs.convert_tokens_to_ids("<st>")
    assert found == (ours.bos_id, ours.eos_id, st_id)
    added = set(theirs.get_added_vocab())
    texts = [
        t for t in source() if t and not any(word in t for word in added) and t[0] not in " \u2581"
    ]
    texts = [text for text in texts if name != "qwen2" or composed_alike(text)]
    assert len(texts) > 5_000
    behind = [st_id, st_id, *ours.encode("Answer:", bos=False, eos=False, continued=True)]
    rows = theirs([text + "<st><st>Answer:" for text in texts]).input_ids
    for text, ids in zip(texts, rows, strict=True):
        assert ids == ours.encode(text, bos=True, eos=False) + behind, text[:200]


# ---------------------------------------------------------------------------------- checkpoints


def every_token(ids):
    """(rows, columns) of all tokens."""
    return ids.new_ones(ids.shape).nonzero(as_tuple=True)


@pytest.mark.parametrize("name", ["tiny-gpt2", "arithmetic-llama"])
@torch.no_grad()
def test_models_have_the_states_and_logits_of_hugging_face(name):
    def error(ours, expected):
        return (ours - expected).abs().max() / expected.abs().max()

    directory = DIR / "checkpoints" / name
    model = Transformer.from_pretrained(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).float()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 400), generator=generator)
    outputs = theirs(ids, output_hidden_states=True)
    hidden, states = model(ids, capture=every_token(ids))
    assert error(model.logits(hidden), outputs.logits) <= 1e-5
    for ours, expected in zip(states[:-1], outputs.hidden_states[1:-1], strict=True):
        assert error(ours.view_as(expected), expected) <= 1e-5
    assert error(hidden, outputs.hidden_states[-1]) <= 1e-5
    cache = KVCache(model, 2, 400)
    model(ids[:, :399], cache=cache)
    last = model(ids[:, 399:], positions=torch.tensor([[399], [399]]), cache=cache)
    assert error(model.logits(last)[:, 0], outputs.logits[:, -1]) <= 1e-5
