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
    theirs = hugging_face(model.config).to(model.device, model.compute_dtype).eval()
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="file of problems in GSM8K-Aug's format")
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer")
    parser.add_argument(
        "--model", default="demo", choices=("demo", "small", *LLAMAS), help="whose shapes"
    )
    parser.add_argument("--dtype", default="fp32", choices=tuple(dart.DTYPES))
    parser.add_argument("--questions", type=int, default=30, help="timed at batch 1")
    parser.add_argument("--batches", type=int, default=4, help="timed at batch 64; 0: none")
    parser.add_argument("--compile", action="store_true", help="ours: as the option of eval.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    config = SMALL if options.model == "small" else MODELS[options.model]
    config = dataclasses.replace(
        config,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        vocab_size=max(config.vocab_size, 2048),
    )
    problems, dtype = data.read_problems(Path(options.data)), dart.DTYPES[options.dtype]
    problems = problems[: max(options.questions, 64 * options.batches)]
    tokenizer = Modulo(data.Tokenizer.from_pretrained(options.tokenizer), config.vocab_size)
    torch.manual_seed(0)
    model = Transformer(config, Adapters(), dtype, options.device).eval().merge()
    reference = hugging_face_model(model)
    model.merged = None  # with neither LoRA nor REM both pathways have the same weights
    if options.compile:
        model.forward = torch.compile(model.forward, dynamic=True)
    pathways = {
        "DART": dart.Pathway(n_silent=20, special_ids=tokenizer.reserved, silent=True),
        "No-CoT": dart.Pathway(),
        "CoT": dart.Pathway(steps=True),
    }
    steps = [
        len(tokenizer.encode(" ".join(p.steps), bos=False, eos=False, continued=True))
        for p in problems
    ]
    new = {"DART": 2, "No-CoT": 2, "CoT": round(statistics.mean(steps)) + 4}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rate = bandwidth(options.device)
    results, table, sizes = [], [], (1, 64) if options.batches else (1,)
    for size in sizes:
        asked = problems[: options.questions if size == 1 else 64 * options.batches]
        for name, pathway in pathways.items():
            prompts = [pathway.prompt(problem.question, tokenizer) for problem in asked]
            by_length = sorted(prompts, key=lambda prompt: len(prompt.ids))
            mixed, sorted_ = (
                [some[i : i + size] for i in range(0, len(some), size)]
                for some in (prompts, by_length)
            )
            ways = {
                "ours": lambda batch: dart.generate(model, tokenizer, pathway, batch, new[name]),
                "generate": lambda batch: generate(reference, batch, tokenizer.eos_id, new[name]),
            }
            for batch in mixed[:2]:
                found = ways["ours"](batch)
                assert all(len(row) == new[name] for row in found), (
                    "a random model that ends early: another seed"
                )
                assert options.dtype != "fp32" or found == ways["generate"](batch), (
                    f"{name}, batch {size}: not the same tokens"
                )
            # Ours takes questions of about one length together, as `dart.answer` does; `generate`
            # as they come, and sorted.
            runs = {"ours": sorted_, "generate": mixed, "sorted": sorted_}
            seconds = {who: [] for who in runs}
            for i in range(-2, len(mixed)):
                for who, batches in runs.items():
                    start = synchronised(options.device)
                    ways["generate" if who == "sorted" else who](batches[i % len(batches)])
                    seconds[who] += [synchronised(options.device) - start] * (i >= 0)
            mine = 1e3 * statistics.mean(seconds["ours"])
            row = {
                "batch": size,
                "method": name,
                "passes": new[name],
                "ms": 1e3 * statistics.median(seconds["ours"]),
                "p90": 1e3 * statistics.quantiles(seconds["ours"], n=10)[-1],
                "mean": mine,
                "generate / ours": 1e3 * statistics.mean(seconds["generate"]) / mine,
                "sorted generate / ours": 1e3 * statistics.mean(seconds["sorted"]) / mine,
                "floor": 1e3 * new[name] * weights / rate,
            }
            results.append(row)
            table.append(
                {k: f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in row.items()}
            )
    print(evaluation.table(table, {key: (key, str) for key in table[0]}))
    of = {(row["method"], row["batch"]): row["mean"] for row in results}
    ratios = {
        f"{a} / {b}, batch {size}": of[a, size] / of[b, size]
        for size in sizes
        for a, b in (("DART", "No-CoT"), ("CoT", "DART"))
    }
    print(", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))
    print(
        json.dumps(
            {
                "options": vars(options),
                "bandwidth": rate,
                "weights": weights,
                "rows": results,
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
