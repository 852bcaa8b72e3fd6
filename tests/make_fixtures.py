"""Makes tests/fixtures: tiny models and tokenizers, and what Hugging Face's libraries do with them.

    pip install transformers
    python tests/make_fixtures.py [NAME ...]        all of them, or those named; runs come last

Models: random weights, all large enough to matter, as `save_pretrained` writes them; and for ids
[1, 320] at some positions the logits [P, V] and the output of every decoder layer [L, P, n].
Tokenizers: byte-level BPE, trained on the lines below; and the ids of some texts, names of special
tokens read as text. Runs: LoRA and REM on random weights; and what transformers makes of each when
it is exported, as each pathway, in fp32 and bf16: the checksums of the JSON files that it read, the
ids of prompts, the logits of their last four tokens, and the greedy answers.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))
import dart
import eval as evaluation
from data import LLAMA3_PATTERN, QWEN2_PATTERN, Tokenizer, write_json
from model import ModelConfig

FIXTURES = Path(__file__).parent / "fixtures"

T = 320
POSITIONS = [*range(0, T, 16), *range(T - 12, T)]
ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0)
ROPE |= dict(high_freq_factor=4.0, original_max_position_embeddings=128)  # short: it matters at 320
SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
SHAPE |= dict(num_attention_heads=4, max_position_embeddings=512)
# six heads on two for keys and values, together wider than the model; no rope scaling; in shards
WIDE = SHAPE | dict(num_attention_heads=6, hidden_size=24, num_key_value_heads=2, head_dim=8)
GPT2 = dict(vocab_size=96, n_positions=512)
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
MODELS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=ROPE, **UNTIED),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=1, **TIED),
    "llama-shards": LlamaConfig(**WIDE, **TIED),
    "qwen2-untied": Qwen2Config(**SHAPE, num_key_value_heads=4, **UNTIED),
    "gpt2": GPT2Config(**GPT2, n_embd=32, n_layer=3, n_head=4),
    "gpt2-untied": GPT2Config(**GPT2, n_embd=24, n_layer=2, n_head=2, n_inner=40, **UNTIED),
}


def make_model(directory, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        mean = ("norm" in name or "ln_" in name) and name.endswith("weight")
        scale = 0.5 if "emb" in name or "wte" in name else 0.2
        parameter.data = mean + scale * torch.randn_like(parameter)
    outputs = []
    for layer in model.transformer.h if config.model_type == "gpt2" else model.model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    ids = torch.randint(0, config.vocab_size, (1, T))
    with torch.no_grad():
        logits = model(ids).logits[0, POSITIONS]
    outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
    states = torch.stack([output[0, POSITIONS] for output in outputs])
    shard = "40KB" if directory.name.endswith("shards") else "5GB"
    model.save_pretrained(directory, max_shard_size=shard)
    (directory / "generation_config.json").unlink(missing_ok=True)
    expected = dict(ids=ids, positions=torch.tensor(POSITIONS), logits=logits, states=states)
    expected = {name: tensor.contiguous() for name, tensor in expected.items()}
    save_file(expected, directory / "expected.safetensors")


END, BEGIN, RESERVED = "<|endoftext|>", "<|begin_of_text|>", "<|reserved_special_token_0|>"
TOKENIZERS = {  # pattern (None: GPT-2's), special tokens, whether one is put first, plain words
    "tokenizer-llama3": (LLAMA3_PATTERN, [BEGIN, "<|end_of_text|>", RESERVED], True, []),
    "tokenizer-qwen2": (QWEN2_PATTERN, [END, "<|im_end|>"], False, ["<tool_call>"]),
    "tokenizer-gpt2": (None, [END], False, []),
}
LINES = """\
Answer: 744. <<800*7/100=56>> <<800-56=744>> Answer:
How many apples does she have left, and how much money?
The answer isn't here; we've sold 12,345 of them.
naïve café, Zoë's größte Übung — 10 € für 3½ Stück
日本語のテキストと数字 123
русский текст и ещё немного""".split("\n")
LINES += ["\n\n\tif x == 1:\r\n    return  y"]
TEXTS = LINES + ["", " ", "   a", "a" * 300, "7" * 50, " " * 300 + "x", "\n" * 40]
TEXTS += ["I'LL we'Re 'S ſ 'ſ", "e\u0301 Å \u212b ﬁ ①²Ⅷ", "👩‍👩‍👧‍👦🏽 🇩🇪 ☂️"]
TEXTS += ["\x00\x07\x1b\x7f\x85\xa0\u2028\ufeff", "שלום مرحبا हिन्दी ไทย ١٢٣"]
TEXTS += ["<tool_call> a<tool_call>b", f"a{BEGIN}<|end_of_text|>b {END}<|im_end|> {RESERVED}"]


def make_tokenizer(directory, pattern, special, first, words):
    llama3 = pattern == LLAMA3_PATTERN
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=llama3))
    tokenizer.normalizer = normalizers.NFC() if words else None
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        cut = pre_tokenizers.Sequence([split, cut])
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    how = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(LINES * 3, trainers.BpeTrainer(vocab_size=420, **how))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    if first:
        bos = special[0], tokenizer.token_to_id(special[0])
        template = dict(single=f"{special[0]} $A", special_tokens=[bos])
        template = processors.TemplateProcessing(**template)
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    raw = json.loads(tokenizer.to_str())
    if llama3:  # as in Llama-3's own file, every way to split a token is a merge
        vocab = raw["model"]["vocab"]
        splits = ((t[:i], t[i:]) for t in sorted(vocab, key=vocab.get) for i in range(1, len(t)))
        raw["model"]["merges"] = [[a, b] for a, b in splits if a in vocab and b in vocab]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    tokenizer.encode_special_tokens = True
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    eos = special[-1] if words else special[first]
    (directory / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    (directory / "expected.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}))


RUNS = {  # model, tokenizer, embeddings without a token; <st> is ...
    "run-llama": ("llama", "tokenizer-llama3", 5),  # ... a reserved token
    "run-qwen2": ("qwen2", "tokenizer-qwen2", 7),  # ... one of those embeddings
    "run-gpt2": ("gpt2", "tokenizer-gpt2", 0),  # ... a new embedding
}
QUESTIONS = ["How many apples does Zoë have left?"]
QUESTIONS += ["She sold 12,345 of them; what's 3½ times as much?"]


def make_run(directory, family, tokenizer, spare):
    tokenizer = Tokenizer.from_pretrained(FIXTURES / tokenizer)
    config = ModelConfig.from_pretrained(FIXTURES / family)
    shape = dict(vocab_size=tokenizer.size + spare, num_hidden_layers=2)
    options = dict(model=family, random_init=True, dtype="fp32", max_new_tokens=8, n_st=3)
    options = dart.Options(**options, lora_rank=2, lora_alpha=2.0, rem_rank=2, rem_alpha=2.0)
    torch.manual_seed(1)
    method = dart.build(options, tokenizer, dataclasses.replace(config, **shape))
    for name, p in method.model.named_parameters():
        if name.endswith(("lora_b", "r2")) or p.dim() == 1:
            p.data.add_((0.1 if p.dim() == 1 else 1.0) * torch.randn_like(p))
    tokenizer.save(directory)
    run = dart.fingerprint(options, method.model, tokenizer)
    dart.save_weights(directory / "adapter.safetensors", method.model.state(whole=True), run=run)
    about = dict(options=vars(options), model_config=vars(method.model.config), run=run)
    write_json(directory / "config.json", about)
    expected, logits = {"questions": QUESTIONS}, {}
    for key in ("st fp32", "st bf16", "cot fp32", "cot bf16"):
        expected[key], found = read_by_transformers(directory, *key.split())
        logits |= {f"{key} {i}": tensor for i, tensor in enumerate(found)}
    (directory / "expected.json").write_text(json.dumps(expected))
    save_file(logits, directory / "expected.safetensors")


def read_by_transformers(run, pathway, dtype):
    with tempfile.TemporaryDirectory() as parent:
        hf = Path(parent) / "hf"
        evaluation.export(dart.load_run(run, dtype=dtype)[0], hf, pathway)
        model = AutoModelForCausalLM.from_pretrained(hf)
        tokenizer = AutoTokenizer.from_pretrained(hf)
        contents = {path.name: path.read_bytes() for path in sorted(hf.glob("*.json"))}
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    prompts = [q + ("<st>" * 3 + "Answer:") * (pathway == "st") for q in QUESTIONS]
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    ids, answers, logits = [ids[0].tolist() for ids in prompts], [], []
    for prompt in prompts:
        with torch.no_grad():
            logits.append(model(prompt).logits[0, -4:].contiguous())
        how = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=8)
        answers.append(model.generate(prompt, **how)[0, prompt.shape[1] :].tolist())
    return dict(files=files, ids=ids, answers=answers), logits


if __name__ == "__main__":
    kinds = ((make_model, MODELS), (make_tokenizer, TOKENIZERS), (make_run, RUNS))
    for name in sys.argv[1:] or (*MODELS, *TOKENIZERS, *RUNS):
        (FIXTURES / name).mkdir(parents=True, exist_ok=True)
        for make, arguments in kinds:
            if name in arguments:
                given = arguments[name]
                make(FIXTURES / name, *(given if isinstance(given, tuple) else (given,)))
