"""Makes tests/fixtures: tiny models and tokenizers, with what Hugging Face's libraries compute with them.

    pip install transformers && python tests/make_fixtures.py        (run-*, too, from the others)

Each directory of a model (random weights) holds config.json and model.safetensors as `save_pretrained` writes them, and expected.safetensors: ids
[1, 320], and at some positions the logits [P, V] and the output of every decoder layer [L, P, n], before the final norm.
Every weight is drawn large enough to matter; the context that the rope is scaled for is short, so that it does, too.

Each directory of a tokenizer (byte-level BPE, trained on the lines below) holds tokenizer.json, tokenizer_config.json, and
expected.json: texts, and their ids when special tokens within are read as text.

Each run-* is a run directory (LoRA and REM on random weights) with expected.json and expected.safetensors: what transformers makes of it
when it is exported: for each pathway the checksums of the JSON files that it read, the ids of some prompts, the logits of their last four
(in bf16, too), and the greedy answers.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))
import dart
import data
import eval as evaluation
from model import ModelConfig, Transformer

FIXTURES = Path(__file__).parent / "fixtures"

T = 320
POSITIONS = [*range(0, T, 16), *range(T - 12, T)]
ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=128)  # fmt: skip
SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=512)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=ROPE, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True),
    # six heads on two for keys and values, together wider than the model; no rope scaling, tied; in several files
    "llama-shards": LlamaConfig(**SHAPE | dict(num_attention_heads=6, hidden_size=24), num_key_value_heads=2, head_dim=8,
                                tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SHAPE, num_key_value_heads=4, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=512),
    "gpt2-untied": GPT2Config(vocab_size=96, n_embd=24, n_layer=2, n_head=2, n_positions=512, n_inner=40,
                              tie_word_embeddings=False),
}  # fmt: skip


def make(directory, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = ("norm" in name or "ln_" in name) * ("weight" in name) + 0.2 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) * (0.5 if "emb" in name or "wte" in name else 0.2)
    outputs = []
    layers = model.transformer.h if config.model_type == "gpt2" else model.model.layers
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    ids = torch.randint(0, config.vocab_size, (1, T))
    with torch.no_grad():
        logits = model(ids).logits[0, POSITIONS]
    states = torch.stack([out[0, POSITIONS] for out in outputs])
    model.save_pretrained(directory, max_shard_size="40KB" if directory.name.endswith("shards") else "5GB")
    expected = {"ids": ids, "positions": torch.tensor(POSITIONS), "logits": logits, "states": states}
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, directory / "expected.safetensors")


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")  # fmt: skip
TOKENIZERS = {  # pattern (None: GPT-2's own), the special tokens, the one put first, others that are ordinary words
    "tokenizer-llama3": (LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"], True, []),
    "tokenizer-qwen2": (LLAMA3.replace("{1,3}", ""), ["<|endoftext|>", "<|im_end|>"], False, ["<tool_call>"]),
    "tokenizer-gpt2": (None, ["<|endoftext|>"], False, []),
}
LINES = ["Answer: 744. <<800*7/100=56>> <<800-56=744>> Answer:", "How many apples does she have left, and how much money?",
         "The answer isn't here; we've sold 12,345 of them.", "naïve café, Zoë's größte Übung — 10 € für 3½ Stück",
         "日本語のテキストと数字 123", "русский текст и ещё немного", "\n\n\tif x == 1:\r\n    return  y"]  # fmt: skip
TEXTS = LINES + ["", " ", "   a", "a" * 300, "7" * 50, " " * 300 + "x", "\n" * 40, "I'LL we'Re 'S ſ 'ſ", "e\u0301 Å \u212b ﬁ ①²Ⅷ",
                 "👩‍👩‍👧‍👦🏽 🇩🇪 ☂️", "\x00\x07\x1b\x7f\x85\xa0\u2028\ufeff", "שלום مرحبا हिन्दी ไทย ١٢٣", "<tool_call> a<tool_call>b",
                 "a<|begin_of_text|><|end_of_text|>b <|endoftext|><|im_end|> <|reserved_special_token_0|>"]  # fmt: skip


def make_tokenizer(directory, pattern, special, first, words):
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern == LLAMA3))
    tokenizer.normalizer = normalizers.NFC() if words else None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LINES * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    if first:
        template = {"single": f"{special[0]} $A", "special_tokens": [(special[0], tokenizer.token_to_id(special[0]))]}
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(**template)])
    raw = json.loads(tokenizer.to_str())
    if pattern == LLAMA3:  # as in Llama-3's own file, every way to split a token is a merge
        vocab = raw["model"]["vocab"]
        raw["model"]["merges"] = [[token[:i], token[i:]] for token in sorted(vocab, key=vocab.get) for i in range(1, len(token))
                                  if token[:i] in vocab and token[i:] in vocab]  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.encode_special_tokens = True
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    (directory / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[-1] if words else special[first]}))
    (directory / "expected.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}))


# Of the models and tokenizers above; embeddings that the tokenizer has no ids for. With a reserved id for <st>, a row among those, and a new
# one.
RUNS = {"run-llama": ("llama", "llama3", 5), "run-qwen2": ("qwen2", "qwen2", 7), "run-gpt2": ("gpt2", "gpt2", 0)}
QUESTIONS = ["How many apples does Zoë have left?", "She sold 12,345 of them; what's 3½ times as much?"]


def make_run(directory, arguments):
    family, tokenizer, more = arguments
    tokenizer = data.Tokenizer.from_pretrained(FIXTURES / f"tokenizer-{tokenizer}")
    config = dataclasses.replace(ModelConfig.from_pretrained(FIXTURES / family), vocab_size=tokenizer.size + more, num_hidden_layers=2)
    options = evaluation.RunOptions(model=family, random_init=True, lora_rank=2, lora_alpha=2.0, rem_rank=2, rem_alpha=2.0,
                                    n_st=3, dtype="fp32", max_new_tokens=8)  # fmt: skip
    torch.manual_seed(1)
    model = Transformer(config, dart.DART.adapters(tokenizer, options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_b", "r2")) or parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tokenizer.save(directory)
    save_file({name: p.contiguous() for name, p in model.adapter_state(complete=True).items()}, directory / "adapter.safetensors")
    saved = {"options": dataclasses.asdict(options), "model_config": dataclasses.asdict(config)}
    (directory / "config.json").write_text(json.dumps(saved))
    expected, logits = {"questions": QUESTIONS}, {}
    for pathway in ("st", "cot"):
        for dtype in ("fp32", "bf16"):
            with tempfile.TemporaryDirectory() as hf:
                evaluation.export(["export", str(directory), hf, "--pathway", pathway, "--dtype", dtype])
                theirs, words = AutoModelForCausalLM.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
                digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(hf).glob("*.json"))}
            some = {"files": digests, "ids": [], "answers": []}
            for i, question in enumerate(QUESTIONS):
                ids = words(question + ("<st>" * 3 + "Answer:") * (pathway == "st"), return_tensors="pt").input_ids
                with torch.no_grad():
                    logits[f"{pathway} {dtype} {i}"] = theirs(ids).logits[0, -4:]
                answer = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)[0, ids.shape[1] :]
                some["ids"].append(ids[0].tolist())
                some["answers"].append(answer.tolist())
            expected[f"{pathway} {dtype}"] = some
    (directory / "expected.json").write_text(json.dumps(expected, indent=1))
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, directory / "expected.safetensors")


if __name__ == "__main__":
    for table, function in ((CONFIGS, make), (TOKENIZERS, lambda at, args: make_tokenizer(at, *args)), (RUNS, make_run)):
        for name, arguments in table.items():
            directory = FIXTURES / name
            directory.mkdir(parents=True, exist_ok=True)
            function(directory, arguments)
            (directory / "generation_config.json").unlink(missing_ok=True)
