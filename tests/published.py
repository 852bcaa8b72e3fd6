"""Against the published files themselves, which are not part of this repository. Not collected with the other tests:

    pip install transformers && PUBLISHED=DIR python -m pytest -q tests/published.py

DIR holds datasets/ (as `python data.py` fills it: what is there is tested), tokenizers/{llama3,llama2,qwen2,gpt2}, and
checkpoints/{stories260K,gpt-nano-sort,tiny-gpt2,arithmetic-llama}, the two first in their authors' own formats, which are
converted here. The references are tokenizers, tiktoken, sentencepiece and transformers.
"""

import base64
import json
import os
import random
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tiktoken.load import load_tiktoken_bpe
from transformers.convert_slow_tokenizer import bytes_to_unicode

import dart
import data
from model import KVCache, Transformer

DIR = Path(os.environ["PUBLISHED"])
PRESENT = [(name, split) for name, (_, splits) in data.DATASETS.items() for split in splits
           if (DIR / "datasets" / name / splits[split].file).is_file()]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- data sets


@pytest.mark.parametrize("name, split", PRESENT)
def test_the_published_files_are_read(name, split):
    published = data.DATASETS[name][1][split]
    data._check(name, published, DIR / "datasets" / name / published.file)
    problems = data.load(name, split, data_dir=DIR / "datasets")
    assert len(problems) == published.count
    kinds = {data.answer_kind(problem.answer) for problem in problems}
    assert kinds == {{"prosqa": "sentence", "commonsenseqa-cot": "letter"}.get(name, "number")}
    assert all(data.score(problem.answer, problem.answer) == (True, True) for problem in problems)


def test_gsm8k_and_gsm8k_aug_have_the_same_test_split():
    """The steps of the one are the calculations of the other, and the file is read as its lines are, taken apart slowly."""
    problems = data.load("gsm8k-aug", "test", data_dir=DIR / "datasets")
    assert problems == data.load("gsm8k", "test", data_dir=DIR / "datasets")
    for line, problem in zip((DIR / "datasets/gsm8k-aug/test.txt").read_text().splitlines(), problems, strict=True):
        question, rest = line.split("||")
        steps, answer = rest.split("#### ")
        assert problem == (" ".join(filter(None, question.split(" "))), steps.split(), answer)
    assert sum(not p.steps for p in problems) == 18 and sum(len(p.steps) <= 1 for p in problems) == 83


# --------------------------------------------------------------------------------------------------------- tokenizers


def llama3_json():
    """tokenizer.json of Llama 3, from its ranks: every way to split a token into two is a merge."""
    lines = (DIR / "tokenizers/llama3/tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    spelling = bytes_to_unicode()
    spelled = {token: "".join(spelling[byte] for byte in token) for token in ranks}
    merges = [(spelled[token[:i]], spelled[token[i:]]) for token in ranks for i in range(1, len(token))
              if token[:i] in ranks and token[i:] in ranks]  # fmt: skip
    special = data.Tokenizer.from_pretrained(DIR / "tokenizers/llama3").backend.added
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    pattern = tokenizers.Regex(data.LLAMA3_PATTERN)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(pattern, "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens(sorted(special, key=special.get))
    template = {"single": "<|begin_of_text|> $A", "special_tokens": [("<|begin_of_text|>", special["<|begin_of_text|>"])]}
    theirs.post_processor = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(),
                                                            tokenizers.processors.TemplateProcessing(**template)])  # fmt: skip
    return theirs


def hugging_face(family):
    if family == "llama3":
        return llama3_json()
    if family == "gpt2":
        return tokenizers.Tokenizer.from_file(str(DIR / "tokenizers/gpt2/tokenizer.json"))
    return transformers.AutoTokenizer.from_pretrained(DIR / "tokenizers" / family).backend_tokenizer


@pytest.fixture(scope="module", params=["llama3", "qwen2", "gpt2"])
def pair(request, tmp_path_factory):
    """(family, our tokenizers of the published files and of the tokenizer.json, Hugging Face's)"""
    theirs, files, directory = hugging_face(request.param), DIR / "tokenizers" / request.param, tmp_path_factory.mktemp("json")
    theirs.save(str(directory / "tokenizer.json"))
    if (files / "tokenizer_config.json").is_file():
        (directory / "tokenizer_config.json").write_bytes((files / "tokenizer_config.json").read_bytes())
    other = tmp_path_factory.mktemp("files")
    for path in files.iterdir():
        if path.name != "tokenizer.json":
            (other / path.name).symlink_to(path)
    ours = [data.Tokenizer.from_pretrained(path) for path in (other, directory)]
    assert ours[0].kind != ours[1].kind
    theirs.encode_special_tokens = True
    return request.param, ours, theirs


def texts_of_the_data():
    texts = {"Answer:"}
    for name, split in PRESENT:
        for problem in data.load(name, split, data_dir=DIR / "datasets"):
            texts |= {problem.question, " ".join(problem.steps), problem.answer}
    return sorted(texts)


def adversarial_texts():
    """Every character in three surroundings; runs; sequences that belong together; random mixtures; names of special tokens."""
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    texts = [form.format(*characters[i : i + 97], c=characters[i]) for i in range(0, len(characters), 97)
             for form in ("{} " * min(97, len(characters) - i), "a{}" * min(97, len(characters) - i), "{c}{c} 1{c}\n{c}")]  # fmt: skip
    texts += [unit * n for unit in (" ", "a", "7", "\n", "\t ", "é", "ab", "=", "\u0301", "👍🏽") for n in (1, 3, 100, 9_999)]
    texts += ["👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☂️ 1️⃣", "e\u0301 Å \u212b ﬁ", "I'LL we'Re 'ſ ſ 'S", "a\r\n\r\n b\r", "\x00\x1b[0m\x7f\x85\u2028\ufeff",
              "<|begin_of_text|>a<|eot_id|> <|endoftext|><|im_start|>b <s></s><unk> <|reserved_special_token_0|>"]  # fmt: skip
    rng = random.Random(0)
    classes = {}
    for c in characters:
        classes.setdefault(unicodedata.category(c), []).append(c)
    for _ in range(20_000):
        some = [rng.choice(classes[category]) for category in rng.choices(list(classes), k=3)] + list("a '1\n")
        texts.append("".join(rng.choices(some, k=rng.randint(1, 30))))
    return texts


@pytest.mark.parametrize("texts", [texts_of_the_data, adversarial_texts])
def test_ids_are_those_of_hugging_face(pair, texts):
    family, ours, theirs = pair
    texts = texts()
    if family == "qwen2":  # for marks newer than Unicode 9 their library's tables of combining classes lack an entry
        nfc = tokenizers.normalizers.NFC()
        same = [text for text in texts if nfc.normalize_str(text) == unicodedata.normalize("NFC", text)]
        assert len(same) > 0.99 * len(texts)
        texts = same
    expected = [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    assert len(texts) > 5_000
    for tokenizer in ours:
        for text, ids in zip(texts, expected, strict=True):
            assert tokenizer.encode(text, bos=False, eos=False) == ids, text[:200]
            assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if family == "qwen2" else text)


def test_every_token_is_found(pair):
    """A token's own text gives the ids that Hugging Face gives it, reached by merges or not."""
    family, ours, theirs = pair
    texts = [theirs.decode([i], skip_special_tokens=False) for i in range(ours[0].size)]
    for tokenizer in ours:
        for text, encoding in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
            assert tokenizer.encode(text, bos=False, eos=False) == encoding.ids, text


def test_special_ids(pair):
    family, ours, theirs = pair
    want = {"llama3": (128_000, 128_001, (128_002, 128_003), 128_256), "qwen2": (None, 151_645, (), 151_646), "gpt2": (None, 50_256, (), 50_257)}
    for tokenizer in ours:
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.reserved, tokenizer.size) == want[family]
        bos = theirs.encode("a").ids[:-1]
        assert tokenizer.encode("a", bos=True, eos=False) == bos + tokenizer.encode("a", bos=False, eos=False)


def test_llama3_agrees_with_tiktoken():
    tokenizer = data.Tokenizer.from_pretrained(DIR / "tokenizers/llama3")
    ranks = load_tiktoken_bpe(str(DIR / "tokenizers/llama3/tokenizer.model"))
    theirs = tiktoken.Encoding("llama3", pat_str=data.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in texts_of_the_data():
        assert tokenizer.encode(text, bos=False, eos=False) == theirs.encode_ordinary(text)
    config = json.loads((DIR / "tokenizers/llama3.2-1b/tokenizer_config.json").read_text())
    for i, token in config["added_tokens_decoder"].items():
        assert tokenizer.decode([int(i)]) == token["content"]


def test_llama2_agrees_with_sentencepiece():
    tokenizer = data.Tokenizer.from_pretrained(DIR / "tokenizers/llama2")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(DIR / "tokenizers/llama2/tokenizer.model"))
    for text in texts_of_the_data() + adversarial_texts():
        ids = tokenizer.encode(text, bos=False, eos=False)
        after = tokenizer.encode(text, bos=False, eos=False, continued=True)
        assert ids == theirs.encode(text)
        text = text.replace("\u2581", " ")  # which SentencePiece spells a blank with: it cannot come back
        assert tokenizer.decode(ids) == text == tokenizer.decode([29871, *after])  # 29871 is the blank that a text begins with


@pytest.mark.parametrize("texts", [texts_of_the_data, adversarial_texts])
@pytest.mark.parametrize("family", ["llama3", "llama2", "qwen2", "gpt2"])
def test_exported_tokenizers_have_the_same_ids(tmp_path, family, texts):
    """As transformers reads them, BOS and <st> included."""
    ours = data.Tokenizer.from_pretrained(DIR / "tokenizers" / family)
    files, st_id = ours.export(True)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.convert_tokens_to_ids("<st>")) == (ours.bos_id, ours.eos_id, st_id)
    nfc, special = tokenizers.normalizers.NFC(), set(theirs.get_added_vocab())
    texts = [text for text in texts() if not any(name in text for name in special) and not text.startswith((" ", "\u2581"))
             and (family != "qwen2" or nfc.normalize_str(text) == unicodedata.normalize("NFC", text))]  # fmt: skip
    assert len(texts) > 5_000
    after = ours.encode("Answer:", bos=False, eos=False, continued=True)
    for text, ids in zip(texts, theirs([text + "<st><st>Answer:" for text in texts]).input_ids, strict=True):
        assert ids == [*ours.encode(text, bos=True, eos=False), st_id, st_id, *after], text[:200]


# -------------------------------------------------------------------------------------------------------- checkpoints


def save_llama(directory, config, tensors):
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: torch.tensor(tensor).contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def stories260k(directory):
    """llama2.c's format -> a Hugging Face directory with a SentencePiece model of its vocabulary."""
    raw = (DIR / "checkpoints/stories260K/stories260K.bin").read_bytes()
    n, m, L, h, g, V, T = struct.unpack("7i", raw[:28])
    values, position = np.frombuffer(raw, dtype="<f4", offset=28).copy(), 0

    def take(*shape):
        nonlocal position
        position += int(np.prod(shape))
        return values[position - int(np.prod(shape)) : position].reshape(shape)

    def split_half(w, heads):  # rows in the order of neighbouring pairs -> first halves, then second halves
        return w.reshape(heads, n // h // 2, 2, n).swapaxes(1, 2).reshape(-1, n)

    tensors = {"model.embed_tokens.weight": take(V, n)}
    e = n // h
    shapes = [("input_layernorm", (n,)), ("self_attn.q_proj", (n, n)), ("self_attn.k_proj", (g * e, n)), ("self_attn.v_proj", (g * e, n)),
              ("self_attn.o_proj", (n, n)), ("post_attention_layernorm", (n,)), ("mlp.gate_proj", (m, n)), ("mlp.down_proj", (n, m)),
              ("mlp.up_proj", (m, n))]  # fmt: skip
    for name, shape in shapes:
        for i, w in enumerate(take(L, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                w = split_half(w, h if name.endswith("q_proj") else g)
            tensors[f"model.layers.{i}.{name}.weight"] = w
    tensors["model.norm.weight"] = take(n)
    save_llama(directory, {"model_type": "llama", "vocab_size": V, "hidden_size": n, "intermediate_size": m, "num_hidden_layers": L,
                           "num_attention_heads": h, "num_key_value_heads": g, "max_position_embeddings": T, "rms_norm_eps": 1e-5,
                           "tie_word_embeddings": True}, tensors)  # fmt: skip
    vocabulary, position, pieces = (DIR / "checkpoints/stories260K/tok512.bin").read_bytes(), 4, b""
    for i in range(V):
        score, length = struct.unpack_from("<fi", vocabulary, position)
        text = vocabulary[position + 8 : position + 8 + length]
        position += 8 + length
        kind = {0: 2, 1: 3, 2: 3}.get(i, 6 if i < 259 else 1)  # unknown, control, byte, normal
        if kind == 6:
            text = b"<0x%02X>" % (i - 3)
        text = {0: b"<unk>", 1: b"<s>", 2: b"</s>"}.get(i, text.replace(b" ", "▁".encode()))
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        pieces += b"\x0a" + bytes([len(piece)]) + piece
    trainer = b"\x18\x02" + b"\x98\x02\x01"  # model_type BPE, byte_fallback
    (directory / "tokenizer.model").write_bytes(pieces + b"\x12" + bytes([len(trainer)]) + trainer + b"\x1a\x02\x20\x00")


STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, "
         "red ball. She wanted to play with it, but it was too high")  # fmt: skip


def test_stories260k_tells_its_story(tmp_path):
    stories260k(tmp_path)
    model, tokenizer = Transformer.from_pretrained(tmp_path), data.Tokenizer.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == 260_032
    ids = dart.generate(model, tokenizer, dart.Pathway(), [[tokenizer.bos_id]], 90)[0]
    assert tokenizer.decode(ids).startswith(STORY)
    story = tokenizer.encode(STORY, bos=False, eos=False)
    assert story == ids[: len(story)]  # the tokenizer finds the very pieces that the model wrote
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    rows = torch.tensor([[1, *ids]])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(rows)), theirs(rows).logits, rtol=1e-4, atol=1e-4)


def test_gpt_nano_sort_has_its_reference_activations(tmp_path):
    def load(name):
        raw = json.loads((DIR / "checkpoints/gpt-nano-sort" / name).read_text())
        return {key: np.frombuffer(base64.b64decode(value["data"]), dtype=np.float32).reshape(value["shape"]).copy()
                for key, value in raw.items() if "data" in value}  # fmt: skip

    tensors, partials = load("gpt-nano-sort-model.json"), load("gpt-nano-sort-t0-partials.json")
    config = {"model_type": "gpt2", "vocab_size": 3, "n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 11,
              "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False}  # fmt: skip
    for name in tensors:
        if tensors[name].ndim == 2 and ".h." in name:  # out x in there, in x out in a checkpoint of GPT-2
            tensors[name] = tensors[name].T
    save_llama(tmp_path, config, tensors)
    model = Transformer.from_pretrained(tmp_path)
    ids = torch.tensor(partials["idx"]).long()
    with torch.no_grad():
        hidden, states = model(ids, at=every_token(ids))
    for layer in range(3):
        torch.testing.assert_close(states[layer].view_as(hidden), torch.tensor(partials[f"block{layer}"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden, torch.tensor(partials["ln_f"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.logits(hidden), torch.tensor(partials["lm_head"]), rtol=1e-5, atol=1e-5)


def every_token(ids):
    """(rows, columns) of all tokens."""
    return [part.flatten() for part in torch.meshgrid(*map(torch.arange, ids.shape), indexing="ij")]


@pytest.mark.parametrize("name", ["tiny-gpt2", "arithmetic-llama"])
def test_hugging_face_directories_as_they_are(name):
    directory = DIR / "checkpoints" / name
    model, theirs = Transformer.from_pretrained(directory), transformers.AutoModelForCausalLM.from_pretrained(directory).float()
    ids = torch.randint(0, model.config.vocab_size, (2, 400), generator=torch.Generator().manual_seed(0))
    outputs = []
    for layer in theirs.transformer.h if name == "tiny-gpt2" else theirs.model.layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        hidden, states = model(ids, at=every_token(ids))
        logits = theirs(ids).logits
    for ours, want in ((model.logits(hidden), logits), *zip(states.view(-1, *hidden.shape), outputs, strict=True)):
        assert ((ours - want).abs().max() / want.abs().max()) <= 1e-5
    cache = KVCache(model.config, 2, 400)
    with torch.no_grad():
        model(ids[:, :399], cache=cache)
        last = model(ids[:, 399:], positions=torch.tensor([[399], [399]]), cache=cache)
    assert ((model.logits(last)[:, 0] - logits[:, -1]).abs().max() / logits.abs().max()) <= 1e-5
