"""Evaluates a run of train.py: accuracy through real greedy decoding, and the time to an answer at batch 1. And looks into it.

    python eval.py --ckpt out/demo                             the test split of the run's data, the silent pathway
    python eval.py --ckpt out/demo --pathway st cot            through both pathways
    python eval.py --ckpt DIR --data svamp gsm-hard --json FILE    other data; the figures for programs
    python eval.py --ckpt out/demo --ask "question"            both pathways side by side; without a question: lines of stdin
    python eval.py --ckpt out/demo --lens "question"           what every layer holds of its silent thoughts; without a question:
                                                               how often that is an intermediate result of the problems' CoT
    python eval.py --ckpt DIR DIR --plot FILE                  the losses of several runs; with --lens "question" its picture, too

The first half (options from dataclasses, reading a run, Wilson's interval, tables) serves train.py, too.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
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
from safetensors import safe_open
from safetensors.torch import load_file

import dart
from dart import option
from data import (DATASETS, Parser, Problem, Tokenizer, complain, load, normalise, one_line_errors, printable, read_json, replacing,
                  run_program, sync, write_atomically, write_json)  # fmt: skip
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
        if field.type in (int, float) and not (low <= value <= high and value < (2**63 if field.type is int else math.inf)):
            most = f" and at most {high}" if high < math.inf else ""
            raise ValueError(f"--{field.name} {value}: not a number of at least {low}{most}")
    return options


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


def digest(parts):
    """The sha256 of some bytes, one part after the other."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def tensors_digest(tensors):
    """The sha256 of {name: tensor}."""
    return digest(part for name in sorted(tensors) for part in (
        f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode(),
        tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))  # fmt: skip


def check_digest(path):
    """ValueError for a file of `train.save_tensors` that is not what was written; other files state no checksum."""
    with safe_open(path, framework="pt") as file:
        about = (file.metadata() or {}).get("about")
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        if about is None or json.loads(about).get("sha256") == tensors_digest(load_file(path)):
            return
    raise ValueError(f"{path}: damaged: its checksum is not that of its tensors")


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
    check_digest(stored)
    if options.complete:
        model = Transformer(config, adapters, torch.float32, device, compute_dtype=dtype, random_init=False)
    else:
        base = model_directory or options.model
        if not base or not Path(base).is_dir():
            raise FileNotFoundError(f"{base!r}: no such directory; --model says where the base weights of {directory} are")
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


def merged_copy(method, name, compiled=False):
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
            model, tokenizer = merged_copy(method, name), method.tokenizer
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
    whole training, and of one pathway alone: the paper's Table 2 fits only if one sequence a step is counted.
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
def states_at(model, ids, silent, positions):
    """The outputs of all layers at P positions of one row of ids: [L, P, n]."""
    ids, positions = (torch.tensor(some, device=model.embed_tokens.device) for some in (ids, positions))
    return model(ids[None], silent, at=(torch.zeros_like(positions), positions))[1]


@torch.no_grad()
def logit_lens(model, states, k):
    """What the model would say next if each layer were its last: final norm and head on states [L, P, n] -> the k likeliest tokens,
    (probabilities [L, P, k], ids [L, P, k])."""
    return model.logits(model.norm(states)).float().softmax(-1).topk(min(k, len(model.head)))


def silent_states(method, question):
    """(ids, states [L, C + separator, n]) of the silent tokens and the separator behind a question; the last one is z_N."""
    pathway, tokenizer = method.pathways[method.answers_through], method.tokenizer
    prompt = pathway.prompt(question, tokenizer)
    positions = list(range(len(prompt) - len(pathway.separator(tokenizer)) - pathway.n_fill, len(prompt)))
    return [prompt[i] for i in positions], states_at(method.model, prompt, pathway.silent, positions)


def teacher_state(method, question, max_new_tokens):
    """The state at z_N of the CoT pathway behind steps that it wrote itself: [L, 1, n]. None where there is no such pathway, or it
    writes no separator."""
    if "cot" not in method.pathways:
        return None
    pathway, tokenizer = method.pathways["cot"], method.tokenizer
    prompt, separator = pathway.prompt(question, tokenizer), pathway.separator(tokenizer)
    (written,) = dart.generate(method.model, tokenizer, pathway, [prompt], max_new_tokens)
    ends = [i for i in range(len(separator), len(written) + 1) if written[i - len(separator) : i] == separator]
    ids = (prompt + written)[: len(prompt) + ends[-1]] if ends else []
    return states_at(method.model, ids, False, [len(ids) - 1]) if ends else None


def lens(method, question, max_new_tokens, k):
    """The logit lens on one question: (columns, distances).

    columns: {position: the k likeliest tokens of each layer, [L][k] of (text, probability)}, of the silent tokens, the separator's tokens
    up to z_N, and the CoT pathway's z_N. distances [L]: between the two z_N, in units of sigma (here that of the one
    state); [] where there is one alone.
    """
    tokenizer, model = method.tokenizer, method.model
    ids, states = silent_states(method, question)
    n_fill, distances = method.pathways[method.answers_through].n_fill, []
    names = [f"{i + 1} {'<st>' if i < n_fill else printable(tokenizer, token)}" for i, token in enumerate(ids)]
    teacher = teacher_state(method, question, max_new_tokens)
    if teacher is not None:
        distances = [dart.distill_loss(t[None], s[None]).item() for t, s in zip(teacher, states[:, -1:], strict=True)]
        names, states = [*names, f"CoT's {printable(tokenizer, ids[-1])}"], torch.cat((states, teacher), dim=1)
    shares, tokens = logit_lens(model, states, k)  # [L, P, k]
    columns = {name: [[(printable(tokenizer, i), p) for i, p in zip(*layer, strict=True)]
                      for layer in zip(tokens[:, at].tolist(), shares[:, at].tolist(), strict=True)]
               for at, name in enumerate(names)}  # fmt: skip
    return columns, distances


def lens_table(columns, distances, width, colours=False):
    """What `lens` returns as text: in each cell the tokens with their probabilities in %, and as many columns side by side as fit into the
    width."""
    blocks, left = [[]], 0
    for name, layers in columns.items():
        cells = [[f"{token} {100 * p:.0f}" for token, p in layer] for layer in layers]
        size = max(len(name), *(len(text) for layer in cells for text in layer))
        if blocks[-1] and left + size + 1 > width - 16:
            blocks, left = [*blocks, []], 0
        blocks[-1].append((name.ljust(size), [[text.ljust(size) for text in layer] for layer in cells], layers))
        left += size + 1
    lines = []
    for block in blocks:
        lines.append(" ".join(["layer", *(name for name, _, _ in block), "distance" * bool(distances)]))
        for layer, distance in enumerate(distances or [None] * len(block[0][1])):
            for rank in range(len(block[0][1][layer])):
                row = [(cells[layer][rank], layers[layer][rank][1]) for _, cells, layers in block]
                row = [shade(text, p) if colours else text for text, p in row]
                first, last = (f"{layer + 1:5}", f"{distance:8.3f}" if distances else "") if rank == 0 else (" " * 5, "")
                lines.append(" ".join([first, *row, last]))
        lines.append("")
    return "\n".join(line.rstrip() for line in lines)


def shade(text, p):
    """A text on a grey that is the lighter the likelier it is, for a terminal of 256 colours."""
    return f"\x1b[48;5;{232 + round(23 * p)}m\x1b[38;5;{15 if p < 0.5 else 16}m{text}\x1b[0m"


LAST = re.compile(r"\d*\.?\d+|[^\W\d_]+")  # numbers and words: the last one of a step is its result


def words_of(problem):
    """The numbers and words of a problem that are no intermediate result: those of question and answer."""
    return {*LAST.findall(problem.question), *LAST.findall(problem.answer)}


def results_of(problem):
    """The results of a CoT's steps but the last, where neither question nor answer has them."""
    return {found[-1] for found in map(LAST.findall, problem.steps[:-1]) if found} - words_of(problem)


def probe(method, problems, k, rotations=10):
    """How often an intermediate result of the gold CoT is among the k likeliest tokens of a state: one dictionary a layer, and one of any
    layer. Raises ValueError where no problem has such a result.

    "<st>": at any of the silent tokens; "z_N"; "CoT's z_N": at the CoT pathway's, behind the gold steps. A result counts by the text of
    its first token, where no word of question and answer begins with it. "... control": the same for results of other problems (by rotations of
    a shuffled order) that are not this one's. top: the mean probability of the likeliest token at <st> (at z_N where C is 0). distance: of
    the two z_N in units of sigma, as in equation (4), over all problems.
    """
    tokenizer, model, cot = method.tokenizer, method.model, method.pathways.get("cot")
    n_fill = method.pathways[method.answers_through].n_fill
    text = functools.cache(lambda i: tokenizer.decode([i]).strip())
    first = functools.cache(lambda result: text(tokenizer.encode(result, bos=False, eos=False, continued=True)[0]))
    likely, top, students, teachers = [], [], [], []  # one a problem
    for problem in problems:
        _, states = silent_states(method, problem.question)
        places = {"<st>": states[:, :n_fill]} if n_fill else {}
        places["z_N"] = states[:, -1:]
        if cot:
            row = cot.row(problem, tokenizer)
            places["CoT's z_N"] = states_at(model, row.ids.tolist(), False, [row.y - 1])
            students.append(places["z_N"])
            teachers.append(places["CoT's z_N"])
        lenses = {place: logit_lens(model, some, k) for place, some in places.items()}
        likely.append({place: [set(map(text, layer)) for layer in ids.flatten(1).tolist()] for place, (_, ids) in lenses.items()})
        top.append(lenses[next(iter(places))][0][..., 0].mean(1))  # [L]
    results, order = [results_of(problem) for problem in problems], np.random.default_rng(0).permutation(len(problems))
    begin = [set(map(first, words_of(problem))) for problem in problems]
    gold = [(i, result) for i in order for result in sorted(results[i]) if first(result) not in begin[i]]
    control = [(i, result) for shift in range(1, min(rotations + 1, len(problems))) for i, j in zip(order, np.roll(order, shift), strict=True)
               for result in sorted(results[j] - results[i]) if first(result) not in begin[i]]  # fmt: skip
    if not gold or not control:
        raise ValueError(f"--lens: {len(gold)} intermediate results in the problems, {len(control)} for the control; with a question it shows "
                         f"what there is")  # fmt: skip
    rows, L = [], len(top[0])
    for title, layers in [*((layer + 1, [layer]) for layer in range(L)), ("any", range(L))]:
        row = {"layer": title, "n": len(gold)}
        for place in likely[0]:
            for name, pairs in ((place, gold), (f"{place} control", control)):
                row[name] = statistics.mean(any(first(result) in likely[i][place][layer] for layer in layers) for i, result in pairs)
        rows.append(row)
    for layer, row in enumerate(rows[:-1]):
        row["top"] = statistics.mean(one[layer].item() for one in top)
        if cot:
            row["distance"] = dart.distill_loss(*(torch.cat([one[layer : layer + 1] for one in some], dim=1)
                                                  for some in (teachers, students))).item()  # fmt: skip
    return rows


def probe_table(rows):
    """The rows of `probe` in Markdown: the shares of results / of the control in %."""
    places = [name for name in rows[0] if f"{name} control" in rows[0]]
    return markdown([
        {"layer": row["layer"], "n": row["n"], **{place: f"{100 * row[place]:.1f} / {100 * row[f'{place} control']:.1f}" for place in places},
         "top %": f"{100 * row['top']:.1f}" if "top" in row else "-", "distance": f"{row['distance']:.3f}" if "distance" in row else "-"}
        for row in rows])  # fmt: skip


def loss_curves(directory):
    """{loss: ([steps], [values])} of a run's log.jsonl. ValueError where that is no log, or of no step yet."""
    path, curves = Path(directory) / "log.jsonl", {}
    try:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            names = itertools.takewhile(lambda name: name != "lr", list(line)[1:] if "lr" in line else ())
            for name in names:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(int(line["step"]))
                values.append(float(line[name]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: not the log of a run ({error})") from None
    if not curves:
        raise ValueError(f"{path}: there is no loss in it yet")
    return curves


def figure_of(directories, columns=None):
    """The losses of runs, and the likeliest tokens of `lens`'s columns as a heat map. Raises ValueError for what cannot be drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    rows = 1 + bool(columns)
    figure = Figure(figsize=(max(8, 0.8 * len(columns or ())), 4 * rows), layout="constrained")
    axes = figure.subplots(rows, squeeze=False)[:, 0]
    for i, directory in enumerate(directories):
        for (name, curve), style in zip(loss_curves(directory).items(), ("-", "--", ":"), strict=False):
            axes[0].plot(*curve, style, color=f"C{i}", label=f"{directory} {name}")
    axes[0].set(xlabel="step", ylabel="loss", yscale="log")
    axes[0].legend()
    if columns:
        table = list(zip(*columns.values(), strict=True))  # [L][P] of the k likeliest
        axes[1].imshow([[likely[0][1] for likely in layer] for layer in table], aspect="auto", origin="lower", cmap="Greys", vmin=0, vmax=1)
        for y, layer in enumerate(table):
            for x, ((token, p), *_) in enumerate(layer):
                axes[1].text(x, y, token.replace("$", r"\$"), ha="center", va="center", color="white" if p > 0.5 else "black")
        axes[1].set_xticks(range(len(columns)), [name.replace("$", r"\$") for name in columns], rotation=45)
        axes[1].set_yticks(range(len(table)), range(1, len(table) + 1))
        axes[1].set(ylabel="layer")
    return figure


def plot(path, directories, columns=None):
    """Writes `figure_of` as the image that the file's name says."""
    figure = figure_of(directories, columns)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png")


# ------------------------------------------------------------------------------------------------------------ program


@dataclass
class Options:
    ckpt: tuple = option((), "directory of the run; of several with --plot")
    best: bool = option(False, "its weights with the best accuracy on the validation split, not its last ones")
    data: tuple = option((), "data sets: names, directories or files as for train.py; none: the run's own")
    data_dir: str = option("", "where the data sets lie, if not where they were in training")
    split: str = option("test", "which split of them", choices=("train", "valid", "test"))
    pathway: tuple = option((), "pathways to answer through (dart: st, cot; codi: codi, cot); none: the method's own way to answer")
    limit: int = option(0, "largest number of problems of each set; 0: all")
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
    top_k: int = option(3, "number of likeliest tokens of each state (--lens)", low=1, high=1000)
    plot: str = option("", "file for an image of the runs' losses, and of --lens \"question\" (needs matplotlib)")


def evaluate_pathway(method, pathway_name, sets, options):
    """(figures, one dictionary a data set; records, one a problem) of one pathway. sets: name -> problems."""
    model = merged_copy(method, pathway_name, options.compile)
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


def check_together(options):
    """ValueError unless the options go together and there is a place for each new file."""
    asks, looks = options.ask is not None, options.lens is not None
    of_one, only_drawn = asks or options.lens not in (None, "-"), options.plot and not looks and not asks
    if not options.ckpt:
        raise ValueError("--ckpt DIR is missing: the directory of a run")
    if len(options.ckpt) > 1 and not only_drawn:
        raise ValueError("--ckpt takes several runs only with --plot alone")
    if asks and (looks or options.plot) or options.lens == "-" and options.plot or only_drawn and options.json:
        raise ValueError("--ask, --lens without a question, and --plot do not go together, nor --plot alone with --json")
    if (options.examples or options.pathway) and (asks or looks or only_drawn):
        raise ValueError("--examples and --pathway go with the evaluation only")
    if (options.data or options.limit) and (of_one or only_drawn):
        raise ValueError("--data and --limit go with the evaluation, and with --lens without a question")
    files = [Path(path).resolve() for path in (options.json, options.examples, options.plot) if path]
    for path in files:
        if path.exists() or not path.parent.is_dir():
            raise ValueError(f"{path}: " + ("exists already" if path.exists() else "its directory does not exist"))
        if files.count(path) > 1:
            raise ValueError(f"{path}: would be two files at once")


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
    """Answers each question through all pathways, and prints a table with passes and milliseconds, tokenisation included. Returns (figures,
    the number of questions that could not be asked): of each such line of standard input it says why, in one line, and goes on."""
    models, figures, refused = {name: merged_copy(method, name, options.compile) for name in reversed(method.pathways)}, [], 0
    for question in questions:
        try:
            check_room(method, [Problem(question, [], "")], options.max_new_tokens)
        except ValueError as error:
            if options.ask != "-":
                raise
            complain(error)
            refused += 1
            continue
        rows = []
        for name, model in models.items():
            pathway, seconds = method.pathways[name], 0.0
            for _ in range(1 if figures else 2):  # the first one is the warm-up
                start = time.perf_counter()
                (found,) = dart.answer(model, method.tokenizer, pathway, [question], options.max_new_tokens)
                seconds = time.perf_counter() - start
            rows.append({"pathway": name, "answer": pathway.read(found.text).strip(), "passes": found.passes, "ms": 1000 * seconds,
                         "written": found.text})  # fmt: skip
        table = [row | {"answer": cell(row["answer"]), "ms": f"{row['ms']:.1f}", "written": cell(row["written"])} for row in rows]
        print(f"{cell(normalise(question))}\n\n{markdown(table)}\n", flush=True)
        figures += [{"question": question, **row} for row in rows]
    return figures, refused


def cell(text):
    """A model's text as it can stand in a table: on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split())).replace("|", r"\|")


def look(method, sets, options):
    """The lens on a question, or on data sets: prints what it shows, and returns its figures."""
    pathway = method.pathways[method.answers_through]
    if pathway.thoughts or pathway.steps:
        raise ValueError(f"--lens: {method.options.method} does not answer in one pass")
    if options.lens == "-":
        figures = [{"data": name, **row} for name, problems in sets.items() for row in probe(method, problems, options.top_k)]
        for name in sets:
            print(f"{name}: results among the {options.top_k} likeliest tokens / control, in %\n\n"
                  f"{probe_table([row for row in figures if row['data'] == name])}\n")  # fmt: skip
        return figures
    check_room(method, [Problem(options.lens, [], "")], options.max_new_tokens)
    columns, distances = lens(method, options.lens, options.max_new_tokens, options.top_k)
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(lens_table(columns, distances, shutil.get_terminal_size((140, 0)).columns, colours), end="")
    if options.plot:
        plot(options.plot, options.ckpt, columns)
    return [{"question": options.lens, "columns": columns, "distances": distances}]


def main(argv=None):
    with one_line_errors():
        options = parse_options(Options, argv, __doc__)
        check_together(options)
        if options.plot and options.lens is None:
            return plot(options.plot, options.ckpt)
        method, run = load_run(options.ckpt[0], options.model, pick_device(options.device), options.dtype, options.best)
        options.max_new_tokens = options.max_new_tokens or run.max_new_tokens
        options.pathway = options.pathway or (method.answers_through,)
        if unknown := [name for name in options.pathway if name not in method.pathways]:
            raise ValueError(f"--pathway {unknown[0]}: {run.method} has {' and '.join(method.pathways)}")
        names = () if options.ask is not None or options.lens not in (None, "-") else options.data or (run.data,)
        sets = {name: load(name, options.split, run.seed, options.data_dir or run.data_dir)[: options.limit or None] for name in names}
        for problems in sets.values():
            check_room(method, problems, options.max_new_tokens)
        records, refused = [], 0
        if options.ask is not None:
            figures, refused = ask(method, questions_of(options.ask), options)
        elif options.lens is not None:
            figures = look(method, sets, options)
    if options.ask is None and options.lens is None:
        figures, records = evaluate_run(method, sets, options)
    with one_line_errors():
        if options.json:
            write_json(options.json, figures)
        if options.examples:
            write_atomically(options.examples, "".join(json.dumps(record) + "\n" for record in records))
        if refused:
            raise ValueError(f"{refused} of the questions could not be asked")


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
    pathway, read = method.pathways[name], ""
    others = " and ".join(f"`{other}`" for other, way in method.pathways.items() if other != name and not way.thoughts)
    inputs = 'ids = tokenizer(question, return_tensors="pt").input_ids'
    if pathway.steps:
        prompted, read = f"; the model writes steps, `{dart.SEPARATOR}` and the answer.", f".rpartition({dart.SEPARATOR!r})[2]"
    elif pathway.n_fill:
        prompted = f", and right behind it {pathway.n_fill} times `<st>` and `{dart.SEPARATOR}`; the model goes on with the answer."
        inputs = f'prompt = question + "<st>" * {pathway.n_fill} + "{dart.SEPARATOR}"\n' + inputs.replace("question", "prompt")
    else:  # as a text, tokens might be merged across the seam
        separator = pathway.separator(method.tokenizer)
        prompted = f", and behind its ids those of `{dart.SEPARATOR}`, {separator}; the model goes on with the answer."
        inputs += f"\nids = ids.new_tensor([ids[0].tolist() + {separator}])"
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
        out = Path(asked.out).resolve()
        temporary = out.with_name(f"{out.name}.tmp")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"{out}: exists already")
        if temporary.exists():
            raise ValueError(f"{temporary}: is left of an export that was cut off, or another one goes on: remove it")
        method, run = load_run(asked.run, asked.model, dtype=asked.dtype, best=asked.best)
        name = asked.pathway or method.answers_through
        pathway = method.pathways.get(name)
        if pathway is None or pathway.thoughts:
            raise ValueError(f"--pathway {name}: " + ("continuous thoughts are no tokens: no plain model has them" if pathway else
                                                      f"{run.method} has {' and '.join(method.pathways)}"))  # fmt: skip
        tokenizer, with_st = method.tokenizer, pathway.n_fill > 0
        files, st_id = tokenizer.export(with_st)
        tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
        temporary.mkdir(parents=True)
        try:
            model = method.model.merge(silent=pathway.silent)
            weights = export_hf(model, temporary, st_id if with_st and model.extra_rows is not None else None, tokens)
            for file, text in (files | {"README.md": card(method, name, run.max_new_tokens)}).items():
                (temporary / file).write_text(text, encoding="utf-8")
            for path in temporary.iterdir():
                path.chmod((temporary / "config.json").stat().st_mode)  # safetensors' files are for their owner alone
                sync(path)
            os.replace(temporary, out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        print(f"{asked.out}: a plain {method.model.config.model_type} model, {weights:,} weights; "
              f"its README.md says how to prompt it")  # fmt: skip


if __name__ == "__main__":
    run_program(main)
