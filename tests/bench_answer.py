"""The time to an answer: ours beside `transformers.generate`, on the same weights and prompts.

    python tests/bench_answer.py --data FILE --tokenizer DIR [--model small] [--dtype bf16]

FILE: problems in GSM8K-Aug's format. The weights are random, so the lengths of answers are given:
two tokens, for CoT as many more as the mean CoT and the separator have. First both must write the
same tokens (in fp32); then they take turns. Milliseconds are those of a batch; the floor is the
bytes of the weights times the passes, at the rate at which this machine reads memory. The last line
is JSON.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch
from bench_train import LLAMAS, SMALL, Modulo, dart, data, evaluation, hugging_face, synchronised
from model import MODELS, Adapters, Transformer


def hugging_face_model(model):
    """The merged model as a LlamaForCausalLM."""
    theirs = hugging_face(model.config, model.device).to(model.compute_dtype).eval()
    names = {
        name: name if name == "lm_head" else f"model.{name}" for name, _ in model.named_parameters()
    }
    state = {
        names[name] + ("" if name.endswith("weight") else ".weight"): p
        for name, p in model.named_parameters()
        if name != "new_embeddings"
    }
    missing, odd = theirs.load_state_dict(state, strict=False)
    assert not odd and set(missing) <= {"lm_head.weight"}, (missing, odd)
    return theirs


def generate(model, prompts, eos_id, new):
    """Greedy decoding by `generate`, padded on the left."""
    prompts = [prompt.ids.tolist() for prompt in prompts]
    T = max(map(len, prompts))
    ids = torch.tensor(
        [[eos_id] * (T - len(prompt)) + prompt for prompt in prompts], device=model.device
    )
    mask = torch.tensor(
        [[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
    )
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=eos_id,
        eos_token_id=eos_id,
    )
    rows = out[:, T:].tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def bandwidth(device):
    """Bytes a second of reading a tensor that no cache holds."""
    x = torch.ones(2**28 if device == "cpu" else 2**31, dtype=torch.uint8, device=device).view(
        torch.float32
    )
    seconds = []
    for _ in range(8):
        start = synchronised(device)
        x.sum()
        seconds.append(synchronised(device) - start)
    return x.numel() * 4 / statistics.median(seconds[2:])


def options_given():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--data", required=True, help="file of problems in GSM8K-Aug's format")
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer")
    models = ("demo", "small", *LLAMAS)
    parser.add_argument("--model", default="demo", choices=models, help="whose shapes")
    parser.add_argument("--dtype", default="fp32", choices=tuple(dart.DTYPES))
    parser.add_argument("--questions", type=int, default=30, help="timed at batch 1")
    parser.add_argument(
        "--batches", type=int, default=4, help="2 or more, timed at batch 64; 0: none"
    )
    parser.add_argument("--compile", action="store_true", help="ours: as the option of eval.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def compare(ways, prompts, size, new, exact, device):
    """Seconds a batch of ours, of `generate` as the questions come, and sorted by length, as ours
    takes them: they take turns. First both must write the same (exact)."""
    by_length = sorted(prompts, key=lambda prompt: len(prompt.ids))
    starts = range(0, len(prompts), size)
    mixed, in_order = ([some[i : i + size] for i in starts] for some in (prompts, by_length))
    for batch in mixed[:2]:
        found = ways["ours"](batch)
        assert all(len(row) == new for row in found), "it ends early: another seed"
        assert not exact or found == ways["generate"](batch), "not the same tokens"
    runs = {"ours": in_order, "generate": mixed, "sorted": in_order}
    seconds = {who: [] for who in runs}
    for i in range(-2, len(mixed)):  # two to warm up
        for who, batches in runs.items():
            start = synchronised(device)
            ways["generate" if who == "sorted" else who](batches[i % len(batches)])
            seconds[who] += [synchronised(device) - start] * (i >= 0)
    return seconds


def figures(seconds, passes, floor):
    """Milliseconds a batch, and how many times as long `generate` takes."""
    ours = seconds["ours"]
    row = {"passes": passes, "ms": 1e3 * statistics.median(ours)}
    row |= {"p90": 1e3 * statistics.quantiles(ours, n=10)[-1], "mean": 1e3 * statistics.mean(ours)}
    for who, name in (("generate", "generate / ours"), ("sorted", "sorted generate / ours")):
        row[name] = statistics.mean(seconds[who]) / statistics.mean(ours)
    return row | {"floor": 1e3 * passes * floor}


def main():
    options = options_given()
    config = SMALL if options.model == "small" else MODELS[options.model]
    size = dict(max_position_embeddings=4096, vocab_size=max(config.vocab_size, 2048))
    config = dataclasses.replace(config, tie_word_embeddings=True, **size)
    problems, dtype = data.read_problems(Path(options.data)), dart.DTYPES[options.dtype]
    problems = problems[: max(options.questions, 64 * options.batches)]
    tokenizer = Modulo(data.Tokenizer.from_pretrained(options.tokenizer), config.vocab_size)
    torch.manual_seed(0)
    model = Transformer(config, Adapters(), dtype, options.device).eval().merge()
    reference = hugging_face_model(model)
    model.merged = None  # with neither LoRA nor REM both pathways have the same weights
    if options.compile:
        model.forward = torch.compile(model.forward, dynamic=True)
    silent = dart.Pathway(n_silent=20, special_ids=tokenizer.reserved[:1], silent=True)
    pathways = {"DART": silent, "No-CoT": dart.Pathway(), "CoT": dart.Pathway(steps=True)}
    texts = [" ".join(problem.steps) for problem in problems]
    steps = [len(tokenizer.encode(t, bos=False, eos=False, continued=True)) for t in texts]
    passes = {"DART": 2, "No-CoT": 2, "CoT": round(statistics.mean(steps)) + 4}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rate, rows = bandwidth(options.device), []

    for size in (1, 64) if options.batches else (1,):
        asked = problems[: options.questions if size == 1 else 64 * options.batches]
        for name, pathway in pathways.items():
            new, eos = passes[name], tokenizer.eos_id
            ways = {
                "ours": lambda batch: dart.generate(model, tokenizer, pathway, batch, new),
                "generate": lambda batch: generate(reference, batch, eos, new),
            }
            prompts = [pathway.prompt(problem.question, tokenizer) for problem in asked]
            seconds = compare(ways, prompts, size, new, options.dtype == "fp32", options.device)
            rows.append({"batch": size, "method": name} | figures(seconds, new, weights / rate))

    texts = [
        {k: f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in r.items()} for r in rows
    ]
    print(evaluation.table(texts, {key: (key, str) for key in texts[0]}))
    about = {"options": vars(options), "bandwidth": rate, "weights": weights}
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    main()
