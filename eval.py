"""Evaluates a run of train.py: accuracy through real greedy decoding, and the time to an answer at batch 1. And looks into it.

    python eval.py --ckpt out/demo                             the test split of the run's data, the silent pathway
    python eval.py --ckpt out/demo --pathway st cot            through both pathways
    python eval.py --ckpt DIR --data svamp gsm-hard --json FILE    other data; the figures for programs
    python eval.py --ckpt out/demo --ask "question"            both pathways side by side; without a question: lines of stdin
    python eval.py --ckpt out/demo --lens "question"           what every layer holds of its silent thoughts; without a question:
                                                               how often that is an intermediate result of the problems' CoT
    python eval.py --ckpt DIR DIR --plot FILE                  the losses of several runs; with --lens "question" its picture, too

The first half (options from dataclasses, one-line errors, reading a run, Wilson's interval, tables) serves train.py, too.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import dart
from dart import option
from data import (DATASETS, Parser, Problem, Tokenizer, complain, load, normalise, one_line_errors, printable,
                  run_program)  # fmt: skip
from model import ModelConfig, Transformer, export_hf, tensors_of

# ------------------------------------------------------------------------------- options and errors, for train.py, too


def parse_options(cls, argv, doc, defaults=None):
    """An instance of a dataclass whose fields are `dart.option`s, from the command line.

    defaults: {name: value} that stand in for the class's own. Raises ValueError in one line.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        default = (defaults or {}).get(field.name, field.default)
        how = dict(default=default, help=f"{field.metadata['help']} (default: {default!r})")
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif field.type is tuple:
            how["nargs"] = "*"
        elif field.type == (str | None):  # a text that may be left out
            how |= {"nargs": "?", "const": "-", "help": field.metadata["help"]}
        else:
            how.update(type=field.type, choices=field.metadata.get("choices"))
        parser.add_argument(f"--{field.name}", **how)
    values = vars(parser.parse_args(argv))
    return check_options(cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}))


def check_options(options):
    """The options themselves; ValueError where one is of the wrong type or beyond its limits."""
    for field in dataclasses.fields(options):
        value, limits = getattr(options, field.name), field.metadata
        types = (int, float) if field.type is float else field.type
        if not isinstance(value, types) or (isinstance(value, bool) and field.type is not bool):
            raise ValueError(f"--{field.name} {value!r}: not of the type {getattr(field.type, '__name__', 'str')}")
        if limits.get("choices") and value not in limits["choices"]:
            raise ValueError(f"--{field.name} {value!r}: there are {', '.join(limits['choices'])}")
        low, high = limits.get("low", 0), limits.get("high", math.inf)
        if field.type in (int, float) and not (low <= value <= high and value < math.inf):
            most = f" and at most {high}" if high < math.inf else ""
            raise ValueError(f"--{field.name} {value}: not a number of at least {low}{most}")
    return options


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


@contextlib.contextmanager
def replacing(path):
    """A name beside `path`, for a file to be written there; it takes the place of `path` when it is on the disk. Readers see the old file
    or the whole new one, and where anything fails nothing is left of the new one."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # there are file systems that cannot do this to a directory
        _sync(Path(path).parent)


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- statistics


def wilson(right, n):
    """Wilson's 95 % interval of a share right / n: (low, high)."""
    z, p = 1.959964, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def markdown(rows):
    """A table of dictionaries with the same keys, aligned, in Markdown."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# --------------------------------------------------------------------------------------------------------------- runs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class RunOptions(dart.Options):
    """What an evaluation must know of the training."""

    model: str = option("", "directory of the base model: config.json, model.safetensors")
    random_init: bool = option(False, "random weights; --model may then be a name, or a directory with only config.json")
    data: str = option("gsm8k-aug", f"data set: demo (the built-in task), {', '.join(DATASETS)}, or a directory of one's own")
    data_dir: str = option("datasets", "where `python data.py NAME` put the data sets")
    dtype: str = option("bf16", "of the computation and of frozen weights", choices=tuple(DTYPES))
    seed: int = option(0, "of weights, data order and dropout", high=2**32 - 1)
    max_new_tokens: int = option(256, "tokens an answer may have, CoT included", low=1)

    @property
    def complete(self):
        """Do the run's own files hold all weights? (Else the base model is needed beside them.)"""
        return self.lora_rank == 0 or self.random_init


def read_run(directory):
    """(RunOptions, ModelConfig) of a directory that train.py wrote. FileNotFoundError, or ValueError with the path."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: not a run of train.py: there is no config.json in it")
    saved = read_json(path)
    try:
        values = {field.name: saved["options"].get(field.name, field.default) for field in dataclasses.fields(RunOptions)}
        return check_options(RunOptions(**values)), ModelConfig(**saved["model_config"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not the configuration of a run ({error})") from None


def load_run(directory, model_directory=None, device="cpu", dtype=None, best=False):
    """(method, RunOptions) of a directory that train.py wrote, ready for evaluation.

    model_directory: where the base weights are now, if not where they were; dtype: the run's where None; best: the weights that had the
    best accuracy on the validation split, in place of the last ones.
    Raises FileNotFoundError or ValueError, naming the file.
    """
    directory = Path(directory)
    stored = directory / ("best.safetensors" if best else "adapter.safetensors")
    options, config = read_run(directory)
    if not stored.is_file():
        raise FileNotFoundError(f"{directory}: nothing to load: the run has not written {stored.name} yet")
    dtype = DTYPES[dtype or options.dtype]
    tokenizer = Tokenizer.from_pretrained(directory)
    cls = dart.METHODS[options.method]
    adapters = cls.adapters(tokenizer, options)
    outline = Transformer.outline(config, adapters, len(tensors_of(stored)))
    outline.load_adapter_state(stored, options.complete)  # compares, before memory is taken
    if options.complete:
        model = Transformer(config, adapters, torch.float32, device, compute_dtype=dtype, random_init=False)
    else:
        base = model_directory or options.model
        if not Path(base).is_dir():
            raise FileNotFoundError(f"{base}: no such directory; --model says where the base weights of {directory} are")
        if ModelConfig.from_pretrained(base) != config:
            raise ValueError(f"{base}: not the model that {directory} was trained on")
        model = Transformer.from_pretrained(base, adapters, dtype, device)
    model.load_adapter_state(stored, options.complete)
    check_vocabulary(tokenizer, model)
    return cls(model, tokenizer, options).eval(), options


def check_vocabulary(tokenizer, model):
    if tokenizer.size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.size} ids, the model {model.config.vocab_size} embeddings")


def check_room(method, problems, max_new_tokens):
    """ValueError for a problem that a pathway cannot encode, or has no room for in the model's positions."""
    room = method.model.config.max_position_embeddings
    for name, pathway in method.pathways.items():
        for problem in problems:
            need = len(pathway.prompt(problem.question, method.tokenizer)) + max_new_tokens - 1
            if need > room:
                raise ValueError(f"{need} tokens for question and answer ({name}, --max_new_tokens {max_new_tokens}), but "
                                 f"the model has {room} positions: {problem.question[:60]!r}")  # fmt: skip


def pick_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return name


# -------------------------------------------------------------------------------------------------------- evaluation


def merged(method, name, compiled=False):
    """A copy of the method's model with LoRA and REM folded into the weights, for the pathway `name`, `compile_forward`ed or not."""
    model = copy.deepcopy(method.model).merge(silent=method.pathways[name].silent).fuse()
    return compile_forward(model) if compiled else model


def compile_forward(model):
    """torch.compile of a merged model: the first pass over a prompt and the passes that follow it are a graph each, for one row and for
    several. As nothing of the model changes any more, it is not looked at again before each pass (where torch knows how to)."""
    unguarded = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)
    model.forward = torch.compile(model.forward, dynamic=True, options=unguarded and {"guard_filter_fn": unguarded})
    return model


def latency(model, tokenizer, pathway, questions, max_new_tokens):
    """Seconds to an answer at batch 1, one for each question: prefill and greedy decoding, synchronised. Tokenisation is
    left out; the first questions are answered once before, as a warm-up."""
    prompts = [pathway.prompt(question, tokenizer) for question in questions]
    synchronise = torch.cuda.synchronize if model.embed_tokens.is_cuda else lambda: None
    seconds = []
    for i, prompt in enumerate(prompts[:5] + prompts):
        synchronise()
        start = time.perf_counter()
        dart.generate(model, tokenizer, pathway, [prompt], max_new_tokens)
        synchronise()
        if i >= len(prompts[:5]):
            seconds.append(time.perf_counter() - start)
    return seconds


def summary(records, seconds):
    """The figures of one pathway on one set of problems: records of `dart.evaluate` and seconds of `latency`, or []."""
    figures = {"n": len(records)}
    if records:
        for kind in ("passes", "tokens"):
            figures[kind] = sum(record[kind] for record in records) / len(records)
        for kind in ("strict", "tolerant"):
            right = sum(record[kind] for record in records)
            figures[kind], figures[f"{kind}_interval"] = right / len(records), wilson(right, len(records))
    if seconds:
        figures["ms"] = 1000 * statistics.median(seconds)
        figures["ms_p90"] = 1000 * sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1]
    return figures


def accuracy_text(figures, kind="strict"):
    low, high = figures[f"{kind}_interval"]
    return f"{100 * figures[kind]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def compare_runs(directories, test, train, device):
    """(table in Markdown, figures) of several runs through every pathway, on test problems and some training problems."""
    rows, figures = [], []
    for directory in directories:
        method, run = load_run(directory, device=device)
        for name, pathway in reversed(method.pathways.items()):
            model, tokenizer = merged(method, name), method.tokenizer
            found, known = (dart.evaluate(model, tokenizer, pathway, problems, run.max_new_tokens) for problems in (test, train))
            seconds = latency(model, tokenizer, pathway, [problem.question for problem in test[:50]], run.max_new_tokens)
            row = {"method": run.method, "pathway": name, **summary(found, seconds), "train": summary(known, [])["strict"]}
            figures.append(row)
            rows.append({"method": run.method, "answers through": name, "test % (95 %)": accuracy_text(row), "n": row["n"],
                         "train %": f"{100 * row['train']:.1f}", "passes": f"{row['passes']:.1f}",
                         "ms": f"{row['ms']:.1f}"})  # fmt: skip
    return markdown(rows) + "\n", figures


def suite_table(rows):
    """(table in Markdown, figures) of a table of the paper.

    rows: {row: (figures of each seed, the paper's accuracy and ms, or None)}; the figures of a seed are `summary`'s on one data
    set and result.json's of its training. The interval is Wilson's for all seeds' answers together. FLOP are those of the
    whole training, and of one pathway alone: the paper's Table 2 can only be had by counting one sequence in a step.
    """
    lines, figures = [], []
    for row, (seeds, accuracy, ms) in rows.items():
        accuracies = [100 * one["strict"] for one in seeds]
        n, right = sum(one["n"] for one in seeds), sum(one["strict"] * one["n"] for one in seeds)
        low, high = wilson(round(right), n)
        mean = {key: statistics.mean(one[key] for one in seeds) for key in
                ("strict", "tolerant", "passes", "tokens", "ms", "ms_p90", "trained_parameters", "peak_memory",
                 "seconds")}  # fmt: skip
        flops = {name: statistics.mean(one["flops"][name] for one in seeds) for name in seeds[0]["flops"]}
        spread = statistics.stdev(accuracies) if len(seeds) > 1 else None
        figures.append({"row": row, **mean, "strict_sd": spread and spread / 100, "n": n, "strict_interval": (low, high),
                        "flops": flops, "seeds": len(seeds), "paper_accuracy": accuracy, "paper_ms": ms})  # fmt: skip
        lines.append({
            "row": row, "%": f"{100 * mean['strict']:.1f}" + (f" ± {spread:.1f}" if spread is not None else ""), "n": n,
            "95 %": f"{100 * low:.1f}-{100 * high:.1f}", "tolerant %": f"{100 * mean['tolerant']:.1f}", "paper %": accuracy or "-",
            "tokens": f"{mean['tokens']:.1f}", "passes": f"{mean['passes']:.1f}", "ms": f"{mean['ms']:.1f}",
            "p90": f"{mean['ms_p90']:.1f}", "paper ms": ms or "-", "FLOP": f"{sum(flops.values()):.2e}",
            "one pathway": f"{list(flops.values())[-1]:.2e}", "trained": f"{mean['trained_parameters']:,.0f}",
            "GiB": f"{mean['peak_memory'] / 2**30:.2f}", "s": f"{mean['seconds']:.0f}"})  # fmt: skip
    return markdown(lines) + "\n", figures


# ---------------------------------------------------------------------------------------------- into silent thought


@torch.no_grad()
def layers_at(model, ids, silent, positions):
    """The outputs of all layers [L, P, n] at some positions of one row."""
    ids, positions = (torch.tensor([some], device=model.embed_tokens.device) for some in (ids, positions))
    return model(ids, silent, at=positions)[1][:, 0]


@torch.no_grad()
def logit_lens(model, states, k):
    """What the model would say next if a layer were its last: final norm and head on states [..., n] -> (probabilities [..., k],
    ids [..., k]) of the most likely tokens."""
    return model.logits(model.norm(states)).float().softmax(-1).topk(min(k, len(model.head)))


def thoughts_of(method, prompt):
    """The silent pathway's positions in its prompt, up to z_N: those of the silent tokens, and those of the separator."""
    pathway = list(method.pathways.values())[-1]
    z_t = len(prompt) - len(pathway.separator(method.tokenizer))
    return list(range(z_t - pathway.n_fill, z_t)), list(range(z_t, len(prompt)))


def written_steps(method, question, max_new_tokens):
    """(ids, index of z_N) of the CoT pathway's own CoT: what it reads before it answers. None where it writes no separator."""
    pathway, tokenizer = method.pathways["cot"], method.tokenizer
    prompt, separator = pathway.prompt(question, tokenizer), pathway.separator(tokenizer)
    (written,) = dart.generate(method.model, tokenizer, pathway, [prompt], max_new_tokens)
    ends = [i for i in range(len(separator), len(written) + 1) if written[i - len(separator) : i] == separator]
    return (prompt + written, len(prompt) + ends[-1] - 1) if ends else None


def lens(method, question, max_new_tokens, k):
    """The logit lens on one question: columns, one a position, of the last one z_N, and then the CoT pathway's z_N, each {"position",
    "layers": the k likely tokens [L][k] as (text, probability)}; and the distance of the two z_N in each layer [L], in units of
    sigma (here the standard deviation of this one state), or [] where there is no CoT pathway or it writes no separator."""
    tokenizer, model = method.tokenizer, method.model
    prompt = list(method.pathways.values())[-1].prompt(question, tokenizer)
    silent, separator = thoughts_of(method, prompt)
    names = [f"<st> {i}" for i in range(1, len(silent) + 1)] + [printable(tokenizer, prompt[i]) for i in separator]
    states, distances = layers_at(model, prompt, list(method.pathways.values())[-1].silent, silent + separator), []
    cot = written_steps(method, question, max_new_tokens) if "cot" in method.pathways else None
    if cot:
        teacher = layers_at(model, cot[0], False, [cot[1]])  # [L, 1, n]
        distances = [dart.distill_loss(t[None], s[None]).item() for t, s in zip(teacher, states[:, -1:], strict=True)]
        names, states = [*names, f"CoT's {names[-1]}"], torch.cat((states, teacher), dim=1)
    shares, ids = (some.transpose(0, 1).tolist() for some in logit_lens(model, states, k))  # [P][L][k]
    return [{"position": name, "layers": [[(printable(tokenizer, i), p) for i, p in zip(*cell, strict=True)]
                                          for cell in zip(some, these, strict=True)]}
            for name, some, these in zip(names, ids, shares, strict=True)], distances  # fmt: skip


def lens_table(columns, distances, width=100, colours=False):
    """The columns of `lens` as text, as many side by side as fit into the width; probabilities in %."""
    blocks, left = [[]], 0
    for column in columns:
        cells = [[f"{token} {100 * p:.0f}" for token, p in layer] for layer in column["layers"]]
        size = max(len(column["position"]), *(len(text) for layer in cells for text in layer)) + 1
        if blocks[-1] and left + size > width - 16:
            blocks, left = [*blocks, []], 0
        blocks[-1].append((column, cells, size))
        left += size
    lines = []
    for block in blocks:
        lines += ["layer  " + " ".join(column["position"].ljust(size) for column, _, size in block) + " distance" * bool(distances)]
        for layer in range(len(block[0][1])):
            for rank in range(len(block[0][1][0])):
                row = [(cells[layer][rank].ljust(size), column["layers"][layer][rank][1]) for column, cells, size in block]
                head = f"{layer + 1:5}  " if rank == 0 else " " * 7
                tail = f" {distances[layer]:8.3f}" if distances and rank == 0 else ""
                lines.append(head + " ".join(shade(text, p) if colours else text for text, p in row) + tail)
        lines.append("")
    return "\n".join(line.rstrip() for line in lines)


def shade(text, p):
    """A text on a grey that is the lighter the more likely it is, for a terminal of 256 colours."""
    return f"\x1b[48;5;{232 + round(23 * p)}m\x1b[38;5;{15 if p < 0.5 else 16}m{text}\x1b[0m"


LAST = re.compile(r"\d*\.?\d+|[^\W\d_]+")  # a number or a word: what a step comes to is its last


def results_of(problem):
    """The results of a CoT's steps but the last, without those that stand in the question or are the answer."""
    known = {*LAST.findall(problem.question), *LAST.findall(problem.answer)}
    return {found[-1] for found in map(LAST.findall, problem.steps[:-1]) if found} - known


def probe(method, problems, k, shifts=10):
    """How often an intermediate result of the gold CoT is among the k likely tokens, and what is known of the layers besides: one
    dictionary a layer, and at last one of all layers together.

    Looked at are the silent tokens ("<st>", at any of them), z_N, and the CoT pathway's z_N behind the gold steps ("CoT's z_N"). A result
    counts by its first token's text. "... control": the same, for the results of other problems (the mean of some
    rotations of their order) that are neither results, nor in question and answer, of the problem looked at. top: the mean probability of the likeliest
    token at <st>. distance: between the two z_N in units of sigma, as in equation (4), over all problems.
    """
    tokenizer, model, pathway = method.tokenizer, method.model, list(method.pathways.values())[-1]
    seen, top, teachers, students = [], [], [], []
    text = functools.cache(lambda i: tokenizer.decode([i]).strip())
    for problem in problems:
        prompt = pathway.prompt(problem.question, tokenizer)
        silent, separator = thoughts_of(method, prompt)
        states = {"<st>": layers_at(model, prompt, pathway.silent, silent)} if silent else {}
        states["z_N"] = layers_at(model, prompt, pathway.silent, separator[-1:])
        if "cot" in method.pathways:
            row = method.pathways["cot"].row(problem, tokenizer)
            states["CoT's z_N"] = layers_at(model, row.ids.tolist(), False, [row.y - 1])
            teachers.append(states["CoT's z_N"])
            students.append(states["z_N"])
        likely = {place: logit_lens(model, some, k) for place, some in states.items()}  # [L, P, k]
        seen.append({place: [set(map(text, layer)) for layer in ids.flatten(1).tolist()] for place, (_, ids) in likely.items()})
        top.append(list(likely.values())[0][0][..., 0].mean(1))
    results = [results_of(problem) for problem in problems]
    first = functools.cache(lambda result: text(tokenizer.encode(result, bos=False, eos=False, continued=True)[0]))
    order = np.random.default_rng(0).permutation(len(problems))
    pairs = [(i, result) for i in order for result in results[i]]
    control = []
    for shift in range(1, min(shifts, len(problems) - 1) + 1):
        for i, j in zip(order, np.roll(order, shift), strict=True):
            known = results[i] | {*LAST.findall(problems[i].question), *LAST.findall(problems[i].answer)}
            control += [(i, result) for result in results[j] - known]
    if not pairs or not control:
        raise ValueError("the problems have no intermediate results to look for")
    rows, layers = [], len(top[0])
    for some in [[layer] for layer in range(layers)] + [range(layers)]:
        row = {"layer": some[0] + 1 if len(some) == 1 else "any", "n": len(pairs)}
        for place in seen[0]:
            for name, asked in ((place, pairs), (f"{place} control", control)):
                row[name] = statistics.mean(any(first(result) in seen[i][place][layer] for layer in some) for i, result in asked)
        if len(some) == 1:
            row["top"] = statistics.mean(one[some[0]].item() for one in top)
            if teachers:
                row["distance"] = dart.distill_loss(*(torch.cat(states, dim=1)[some] for states in (teachers, students))).item()
        rows.append(row)
    return rows


def probe_table(rows):
    """The rows of `probe` in Markdown: "a / b" are the shares of results and of the control in %."""
    places = [name for name in rows[0] if f"{name} control" in rows[0]]
    return markdown([
        {"layer": row["layer"], "n": row["n"], **{place: f"{100 * row[place]:.1f} / {100 * row[f'{place} control']:.1f}" for place in places},
         "top %": f"{100 * row['top']:.1f}" if "top" in row else "-", "distance": f"{row['distance']:.3f}" if "distance" in row else "-"}
        for row in rows])  # fmt: skip


def plot(path, directories, columns=()):
    """An image: the losses of the runs, from their log.jsonl, and the heat map of `lens`'s columns. ValueError where there is no matplotlib
    or nothing to draw."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    shown = bool(columns)
    figure, axes = plt.subplots(1 + shown, squeeze=False, figsize=(max(7, 0.8 * len(columns)), 4 * (1 + shown)), layout="constrained")
    for i, directory in enumerate(directories):
        lines = [json.loads(line) for line in (Path(directory) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if "lr" in line]
        names = list(itertools.takewhile(lambda name: name != "lr", list(lines[0])[1:])) if lines else []
        for name, style in zip(names, ("-", "--", ":", "-."), strict=False):
            axes[0, 0].plot([line["step"] for line in lines], [line[name] for line in lines], style, color=f"C{i}", label=f"{directory} {name}")
    axes[0, 0].set(xlabel="step", ylabel="loss", yscale="log")
    axes[0, 0].legend()
    if columns:
        shares = np.array([[layer[0][1] for layer in column["layers"]] for column in columns]).T  # [L, P]
        axes[1, 0].imshow(shares, aspect="auto", origin="lower", cmap="Greys", vmin=0, vmax=1)
        for x, column in enumerate(columns):
            for y, layer in enumerate(column["layers"]):
                axes[1, 0].text(x, y, layer[0][0].replace("$", r"\$"), ha="center", va="center", color="C0")
        axes[1, 0].set_xticks(range(len(columns)), [column["position"] for column in columns], rotation=45)
        axes[1, 0].set_yticks(range(len(shares)), range(1, len(shares) + 1))
        axes[1, 0].set(ylabel="layer")
    with replacing(path) as temporary:
        plt.savefig(temporary, format=Path(path).suffix[1:] or "png")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------ program


@dataclass
class Options:
    ckpt: tuple = option((), "directory of the run; of several with --plot")
    best: bool = option(False, "its weights with the best accuracy on the validation split, not its last ones")
    data: tuple = option((), "data sets: names, directories or files as for train.py; none: the run's own")
    data_dir: str = option("", "where the data sets lie, if not where they were in training")
    split: str = option("test", "which split of them", choices=("train", "valid", "test"))
    pathway: tuple = option((), "pathways to answer through (dart: st, cot; codi: codi, cot); none: the method's own way to answer")
    limit: int = option(0, "at most so many problems of each set; 0: all")
    latency: int = option(50, "questions timed one by one at batch 1; 0: none")
    batch_size: int = option(64, "problems answered at once, for the accuracy", low=1)
    max_new_tokens: int = option(0, "tokens an answer may have; 0: as in the run")
    model: str = option("", "directory of the base weights, if not the one of the run")
    dtype: str = option("", "fp32 or bf16; as in the run where it is not given", choices=("", *DTYPES))
    device: str = option("auto", "cpu, cuda, or auto", choices=("auto", "cpu", "cuda"))
    compile: bool = option(False, "torch.compile the model: a minute or so before the first answers, which then take less time")
    examples: str = option("", "file for one line of JSON for each problem and pathway")
    json: str = option("", "file for the figures as JSON")
    ask: str | None = option(None, "answer a question through all pathways, side by side; without one: each line of standard input")
    lens: str | None = option(None, "the tokens that each layer's states at the silent tokens come nearest to (logit lens), for a question; "
                              "without one: how often they are intermediate results of the data sets' CoT")  # fmt: skip
    top_k: int = option(3, "so many tokens of a state are looked at (--lens)", low=1, high=1000)
    plot: str = option("", "file for an image of the runs' losses, and of --lens \"question\" (needs matplotlib)")


def evaluate_pathway(method, pathway_name, sets, options):
    """(figures, one dictionary a data set; records, one a problem) of one pathway. sets: name -> problems."""
    model = merged(method, pathway_name, options.compile)
    tokenizer, pathway = method.tokenizer, method.pathways[pathway_name]
    figures, records = [], []
    for name, problems in sets.items():
        timed = [problem.question for problem in problems[: options.latency]]
        seconds = latency(model, tokenizer, pathway, timed, options.max_new_tokens)
        found = []
        if pathway_name in options.pathway:
            found = dart.evaluate(model, tokenizer, pathway, problems, options.max_new_tokens, options.batch_size)
        records += [{"data": name, "pathway": pathway_name, "id": i, **record} for i, record in enumerate(found)]
        figures.append({"data": name, "pathway": pathway_name, **summary(found, seconds)})
    return figures, records


def report(row):
    """One line of the table for people."""
    text = {"data": row["data"], "pathway": row["pathway"], "n": row["n"], "strict % (95 %)": accuracy_text(row),
            "tolerant % (95 %)": accuracy_text(row, "tolerant"), "passes": f"{row['passes']:.1f}"}  # fmt: skip
    for key, title, form in (("ms", "ms", ".1f"), ("ms_p90", "p90", ".1f"), ("speedup_over_cot", "CoT / this", ".2f")):
        text[title] = f"{row[key]:{form}}" if key in row else "-"
    return text


def check_files(options):
    """ValueError unless there is one run (several to be drawn), and a place for each new file."""
    if not options.ckpt or (len(options.ckpt) > 1 and not (options.plot and options.lens is None)):
        raise ValueError("--ckpt DIR is missing: the directory of a run" if not options.ckpt else
                         "--ckpt takes several runs only with --plot, and without --lens")  # fmt: skip
    for path in map(Path, filter(None, (options.json, options.examples, options.plot))):
        if path.exists() or not path.parent.is_dir():
            raise ValueError(f"{path}: " + ("exists already" if path.exists() else "its directory does not exist"))
    if options.ask is not None and options.lens is not None:
        raise ValueError("--ask or --lens, not both")


def evaluate_run(method, sets, options):
    """(figures, records) of all pathways that were asked for; prints a table."""
    rows, records, cot_ms = [], [], {}
    for name, pathway in method.pathways.items():
        asked = name in options.pathway
        if asked or (pathway.steps and options.latency):  # the written CoT is timed in any case, to compare with
            figures, more = evaluate_pathway(method, name, sets, options)
            if pathway.steps:
                cot_ms = {row["data"]: row.get("ms") for row in figures}
            rows, records = rows + figures * asked, records + more
    for row in rows:
        if cot_ms.get(row["data"]):
            row["speedup_over_cot"] = cot_ms[row["data"]] / row["ms"]
    print(markdown([report(row) for row in rows]))
    return rows, records


def ask(method, questions, options):
    """Answers each question through all pathways, and prints a table with passes and milliseconds, tokenisation included. Returns its
    figures. Of a question that cannot be asked it says so, in one line, and goes on; at the end ValueError says how many there were."""
    models, figures, refused = {name: merged(method, name, options.compile) for name in reversed(method.pathways)}, [], 0
    for question in questions:
        try:
            check_room(method, [Problem(question, [], "")], options.max_new_tokens)
        except ValueError as error:
            refused += complain(error) is None
            continue
        rows = []
        for name, model in models.items():
            pathway, seconds = method.pathways[name], 0.0
            for _ in range(1 if figures else 2):  # the first one is the warm-up
                start = time.perf_counter()
                (found,) = dart.answer(model, method.tokenizer, pathway, [question], options.max_new_tokens)
                seconds = time.perf_counter() - start
            rows.append({"pathway": name, "answer": pathway.read(found.text).strip(), "passes": found.passes,
                         "ms": f"{1000 * seconds:.1f}", "written": " ".join(found.text.split())})  # fmt: skip
        print(f"{normalise(question)}\n\n{markdown(rows)}\n", flush=True)
        figures += [{"question": question, **row, "ms": float(row["ms"])} for row in rows]
    if refused:
        raise ValueError(f"{refused} of the questions could not be asked")
    return figures


def look(method, sets, options):
    """The lens on a question, or on data sets: prints what it shows, and returns its figures."""
    if list(method.pathways.values())[-1].thoughts or list(method.pathways.values())[-1].steps:
        raise ValueError(f"--lens: {method.options.method} has no pathway with silent tokens")
    if options.lens == "-":
        figures = [{"data": name, **row} for name, problems in sets.items() for row in probe(method, problems, options.top_k)]
        for name in sets:
            print(f"{name}: results among the {options.top_k} likeliest tokens / control, in %\n\n"
                  f"{probe_table([row for row in figures if row['data'] == name])}\n")  # fmt: skip
        return figures
    check_room(method, [Problem(options.lens, [], "")], options.max_new_tokens)
    columns, distances = lens(method, options.lens, options.max_new_tokens, options.top_k)
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(lens_table(columns, distances, shutil.get_terminal_size((140, 0)).columns, colours), end="")
    if options.plot:
        plot(options.plot, options.ckpt, columns)
    return [{"question": options.lens, "columns": columns, "distances": distances}]


def main(argv=None):
    with one_line_errors():
        options = parse_options(Options, argv, __doc__)
        check_files(options)
        if options.plot and options.lens is None:
            return plot(options.plot, options.ckpt)
        method, run = load_run(options.ckpt[0], options.model, pick_device(options.device), options.dtype, options.best)
        options.max_new_tokens = options.max_new_tokens or run.max_new_tokens
        options.pathway = options.pathway or (list(method.pathways)[-1],)
        if unknown := [name for name in options.pathway if name not in method.pathways]:
            raise ValueError(f"--pathway {unknown[0]}: {run.method} has {' and '.join(method.pathways)}")
        names = () if options.ask or options.lens not in (None, "-") else options.data or (run.data,)
        sets = {name: load(name, options.split, run.seed, options.data_dir or run.data_dir)[: options.limit or None] for name in names}
        for problems in sets.values():
            check_room(method, problems, options.max_new_tokens)
        records = []
        if options.ask is not None:
            figures = ask(method, questions_of(options.ask), options)
        elif options.lens is not None:
            figures = look(method, sets, options)
    if options.ask is None and options.lens is None:
        figures, records = evaluate_run(method, sets, options)
    with one_line_errors():
        if options.json:
            write_atomically(options.json, json.dumps(figures, indent=1) + "\n")
        if options.examples:
            write_atomically(options.examples, "".join(json.dumps(record) + "\n" for record in records))


def questions_of(text):
    """A question, or ("-") those that are lines of standard input, empty ones left out."""
    if text != "-":
        return [text]
    return (line for line in (line.decode(errors="surrogateescape") for line in sys.stdin.buffer) if line.strip())


# ------------------------------------------------------------------------------------------------------------ export

CARD = """---
library_name: transformers
---
A plain {family} checkpoint: a run of the method `{method}` of a reference implementation of DART (Jiang et al., EMNLP 2025), as its
pathway `{name}`. {folded} folded into the weights.

The prompt is the question, without outer blanks and with single ones inside{prompted}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
question = "..."
{inputs}
output = model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens={new})
print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True){read})
```
{lost}"""


def card(method, name, new):
    """README.md of an exported model: how to prompt it, and what it can no longer do."""
    pathway, read, others = method.pathways[name], "", " and ".join(f"`{other}`" for other in method.pathways if other != name)
    inputs = 'ids = tokenizer(question, return_tensors="pt").input_ids'
    if pathway.steps:
        prompted, read = f"; the model writes steps, `{dart.SEPARATOR}` and the answer.", f".rpartition({dart.SEPARATOR!r})[2]"
    elif pathway.n_fill:
        prompted = f", and right behind it {pathway.n_fill} times `<st>` and `{dart.SEPARATOR}`; the model goes on with the answer."
        inputs = f'prompt = question + "<st>" * {pathway.n_fill} + "{dart.SEPARATOR}"\n' + inputs.replace("question", "prompt")
    else:  # as a text, tokens might be merged across the seam
        separator = pathway.separator(method.tokenizer)
        prompted = f", and behind its ids those of `{dart.SEPARATOR}`, {separator}; the model goes on with the answer."
        inputs = f"ids = torch.tensor([tokenizer(question).input_ids + {separator}])  # import torch"
    return CARD.format(family=method.model.config.model_type, method=method.options.method, name=name, prompted=prompted, inputs=inputs,
                       folded="LoRA and REM (where there are any) are" if pathway.silent else "LoRA (where there is any) is",
                       new=new, read=read, lost=f"\nThese weights cannot be switched to the pathway {others} any more; the run can be "
                       "exported as that one, too.\n" if others else "")  # fmt: skip


def export(argv=None):
    """The program `python model.py export`."""
    parser = Parser("model.py", description="Writes a run as a plain Hugging Face checkpoint: LoRA and REM folded into its weights, "
                    "the tokenizer with <st>, a model card.", allow_abbrev=False)  # fmt: skip
    parser.add_argument("export", choices=("export",))
    parser.add_argument("run", metavar="RUN_DIR", help="directory of the run")
    parser.add_argument("out", metavar="HF_DIR", help="new directory")
    parser.add_argument("--pathway", help="which of its pathways (dart: st, cot); default: the one that it answers through")
    parser.add_argument("--model", help="directory of the base weights, if not the one of the run")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights; default: as in the run")
    parser.add_argument("--best", action="store_true", help="its weights with the best accuracy on the validation split")
    with one_line_errors():
        asked = parser.parse_args(argv)
        out, temporary = Path(asked.out), Path(f"{asked.out}.tmp")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"{out}: exists already")
        method, run = load_run(asked.run, asked.model, dtype=asked.dtype, best=asked.best)
        name = asked.pathway or list(method.pathways)[-1]
        pathway = method.pathways.get(name)
        if pathway is None or pathway.thoughts:
            raise ValueError(f"--pathway {name}: " + ("continuous thoughts are no tokens: no plain model has them" if pathway else
                                                      f"{run.method} has {' and '.join(method.pathways)}"))  # fmt: skip
        tokenizer, silent = method.tokenizer, pathway.n_fill > 0
        files, st_id = tokenizer.export(silent)
        tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
        temporary.mkdir(parents=True)
        try:
            model = method.model.merge(silent=pathway.silent)
            export_hf(model, temporary, st_id if silent and model.extra_rows is not None else None, tokens)
            for file, text in (files | {"README.md": card(method, name, run.max_new_tokens)}).items():
                (temporary / file).write_text(text, encoding="utf-8")
            for path in temporary.iterdir():
                path.chmod((temporary / "config.json").stat().st_mode)  # safetensors' files are for their owner alone
                _sync(path)
            os.replace(temporary, out)
        except BaseException:
            shutil.rmtree(temporary)
            raise
        print(f"{out}: a plain {method.model.config.model_type} model, {sum(p.numel() for p in model.parameters()):,} weights; "
              f"its README.md says how to prompt it")  # fmt: skip


if __name__ == "__main__":
    run_program(main)
