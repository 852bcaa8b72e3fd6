"""Evaluates a run of train.py: accuracy by greedy decoding, and the time to an answer at batch 1.

    python eval.py --ckpt out/demo                             its test split, the silent pathway
    python eval.py --ckpt out/demo --pathway st cot            through both pathways
    python eval.py --ckpt DIR --data svamp gsm-hard --json FILE    other data; figures for programs
    python eval.py --ckpt out/demo --ask "question"            both pathways side by side
    python eval.py --ckpt out/demo --lens "question"           what every layer holds of its silent
                                                               thoughts
    python eval.py --ckpt out/demo --lens                      how often that is a result of the CoT
    python eval.py --ckpt DIR DIR --plot FILE                  the losses of several runs; or the
                                                               table of a suite
    python eval.py --ckpt out/demo --export HF_DIR             a plain Hugging Face checkpoint

--ask without a question reads lines of standard input: a question each, or {"question": "..."}.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends the program without a word while modules are imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import copy
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import statistics
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import dart
from data import Problem, Tokenizer, append_line, end, is_single_file, load, normalise, option
from data import parse_json, parse_options, printable, read_json, replacing, run_program, show
from data import show_live, token_text, write_bytes, write_json, write_text
from model import Transformer, export_hf


@dataclass
class Options:
    ckpt: tuple = option((), "directory of the run; of several with --plot")
    best: bool = option(False, "the weights that were best on the validation split")
    model: str = option("", "directory of the base weights, if they were moved")
    data: tuple = option((), "data sets, directories or files; none: the run's own")
    data_dir: str = option("", "where the data sets lie, if they were moved")
    split: str = option("test", "of the data sets", "train valid test")
    limit: int = option(0, "most problems of each set; 0: all")
    pathway: tuple = option((), "pathways to answer through; none: the method's own")
    latency: int = option(50, "questions that are timed, one by one")
    batch_size: int = option(64, "problems answered at once", low=1)
    max_new_tokens: int = option(0, "tokens that an answer may have; 0: as in the run")
    dtype: str = option("", "fp32 or bf16; as in the run", {"": None, **dart.DTYPES})
    device: str = option("auto", "cpu, cuda, or auto", "auto cpu cuda")
    compile: bool = option(False, "torch.compile: a minute before the first answers")
    examples: str = option("", "new file: a line of JSON for each problem and pathway")
    json: str = option("", "new file: the figures as JSON")
    ask: str | None = option(None, "answer a question through all pathways")
    lens: str | None = option(None, "each layer's likeliest tokens, for a question or the data")
    top_k: int = option(3, "likeliest tokens of each state (--lens)", low=1)
    plot: str = option("", "new file: an image of losses, or of --lens (needs matplotlib)")
    export: str = option("", "new directory for a plain Hugging Face checkpoint")


# -------------------------------------------------------------------------- figures and tables


def wilson(right, n):
    """Wilson's 95 % interval of a share right / n: (low, high)."""
    z, p = 1.959964, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def percent(share):
    return f"{100 * share:.1f}"


def both(shares):
    return " / ".join(map(percent, shares))


COLUMNS = {  # of all tables: key -> (title, how its values are written)
    "row": ("row", str),
    "data": ("data", str),
    "pathway": ("answers through", str),
    "exact": ("exact %", percent),
    "exact_sd": ("± %", percent),
    "exact_interval": ("95 %", lambda interval: "-".join(map(percent, interval))),
    "layer": ("layer", str),
    "n": ("n", str),
    "<st>": ("<st>", both),
    "z_N": ("z_N", both),
    "CoT's z_N": ("CoT's z_N", both),
    "distance": ("distance", "{:.3f}".format),
    "numeric": ("numeric %", percent),
    "train": ("train %", percent),
    "answer": ("answer", str),
    "passes": ("passes", "{:.1f}".format),
    "ms": ("ms", "{:.1f}".format),
    "ms_p90": ("p90", "{:.1f}".format),
    "speedup": ("CoT / this", "{:.2f}".format),
    "paper": ("paper: % / ms", str),
    "trained_parameters": ("trained", "{:,.0f}".format),
    "weights": ("of weights", "{:,}".format),
    "problems": ("problems", "{:,}".format),
    "steps": ("steps", "{:,.0f}".format),
    "lr": ("lr", "{:g}".format),
    "schedule": ("schedule", str),
    "tokens": ("tokens", "{:.2e}".format),
    "all_flops": ("FLOP", "{:.2e}".format),
    "one_pathway": ("one pathway", "{:.2e}".format),
    "peak_memory": ("GiB", lambda size: f"{size / 2**30:.2f}"),
    "seconds": ("s", "{:.0f}".format),
    "written": ("written", str),
}


def table(rows, columns=COLUMNS):
    """Rows of figures as a table in Markdown: those columns that are in any of them."""
    keys = [key for key in columns if any(key in row for row in rows)]
    lines = [[columns[key][0] for key in keys]]
    for row in rows:
        lines.append([columns[key][1](row[key]) if key in row else "-" for key in keys])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def over_seeds(figures):
    """The figures of several seeds as one row: means, and the interval of all answers together.
    FLOP are also given of one pathway alone: the paper's Table 2 fits only if one sequence a step
    is counted."""
    numbers = [key for key, value in figures[0].items() if isinstance(value, (int, float))]
    row = {key: statistics.mean(one[key] for one in figures) for key in numbers}
    row["n"] = sum(one["n"] for one in figures)
    row["exact_interval"] = wilson(round(sum(one["exact"] * one["n"] for one in figures)), row["n"])
    if len(figures) > 1:
        row["exact_sd"] = statistics.stdev(one["exact"] for one in figures)
    row["all_flops"] = statistics.mean(sum(one["flops"].values()) for one in figures)
    row["one_pathway"] = statistics.mean(list(one["flops"].values())[-1] for one in figures)
    return row


# ------------------------------------------------------------------------------------ measuring


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_room(method, longest, problems, max_new_tokens):
    """ValueError where a row of `longest` tokens, or a problem and its answer, does not fit into
    the model's positions, or a question has no ids."""
    room = method.model.config.max_position_embeddings
    for pathway in method.pathways.values():
        for problem in problems:
            prompt = pathway.prompt(problem.question, method.tokenizer)
            longest = max(longest, len(prompt.ids) + max_new_tokens - 1)
    if longest > room:
        raise ValueError(f"a problem takes {longest} tokens, but the model has {room} positions")


class Answerer(NamedTuple):
    """What answers: a model whose weights are merged for one pathway."""

    name: str  # of the pathway
    model: Transformer
    tokenizer: Tokenizer
    pathway: dart.Pathway
    max_new_tokens: int


def answerer(method, name, max_new_tokens=None, compiled=False):
    """The Answerer of the pathway `name`, with a copy of the model."""
    pathway, new = method.pathways[name], max_new_tokens or method.options.max_new_tokens
    model = copy.deepcopy(method.model).merge(silent=pathway.silent)
    if compiled:
        model.forward = torch.compile(model.forward, dynamic=True)
    return Answerer(name, model, method.tokenizer, pathway, new)


def measure(answerer, problems, batch_size=64):
    """(figures, records) on problems: accuracies with Wilson's interval, and forward passes an
    answer; records of `dart.evaluate`."""
    name, *how, new = answerer
    records = dart.evaluate(*how, problems, new, batch_size, show_live)
    n, figures = len(records), {"pathway": name, "n": len(records)}
    for kind in ("exact", "numeric"):
        right = sum(record[kind] for record in records)
        figures |= {kind: right / n, f"{kind}_interval": wilson(right, n)}
    figures["passes"] = statistics.mean(record["passes"] for record in records)
    return figures, records


def time_in_turns(answerers, questions, device):
    """Times to an answer at batch 1, prefill and greedy decoding without tokenisation, for each
    answerer: {ms: the median, ms_p90}. They take turns, question by question, so that what else
    the machine does hits all alike. The first questions are answered once before, as a warm-up."""
    seconds = [[] for _ in answerers]
    synchronize = torch.cuda.synchronize if "cuda" in str(device) else lambda: None
    for i, question in enumerate((*questions[:5], *questions)):
        for times, (_, model, tokenizer, pathway, new) in zip(seconds, answerers, strict=True):
            prompt, home = [pathway.prompt(question, tokenizer)], model.device
            model.to(device)
            synchronize()
            start = time.perf_counter()
            dart.generate(model, tokenizer, pathway, prompt, new)
            synchronize()
            times += [time.perf_counter() - start] * (i >= len(questions[:5]))
            model.to(home)
    ranks = [(sorted(times), math.ceil(0.9 * len(times)) - 1) for times in seconds]
    return [{"ms": 1e3 * statistics.median(t), "ms_p90": 1e3 * t[at]} for t, at in ranks]


def timing(device):
    """What `time_in_turns` measures, as a sentence."""
    threads = torch.get_num_threads()
    where = device if "cuda" in str(device) else f"{threads} thread{'s' * (threads > 1)} of the CPU"
    return f"ms: the median time to an answer at batch 1, on {where}."


def evaluate_run(method, sets, options):
    """(figures, records) of all data sets and pathways that were asked for. Prints a table."""
    rows, all_records, device = [], [], method.model.device
    names = options.pathway or (method.inference_pathway,)
    answerers = [answerer(method, name, options.max_new_tokens, options.compile) for name in names]
    for name, problems in sets.items():
        questions = [problem.question for problem in problems[: options.latency]]
        times = time_in_turns(answerers, questions, device) if questions else [{}] * len(names)
        for one, ms in zip(answerers, times, strict=True):
            figures, records = measure(one, problems, options.batch_size)
            rows.append({"data": name} | figures | ms)
            all_records += [{"data": name, "pathway": one.name} | record for record in records]
    cot = {row["data"]: row.get("ms") for row in rows if row["pathway"] == "cot"}
    for row in rows:
        if cot.get(row["data"]):
            row["speedup"] = cot[row["data"]] / row["ms"]
    show(f"{table(rows)}\n\n{timing(device)}" if options.latency else table(rows))
    return rows, all_records


def ask_all(method, options):
    """Answers --ask, or each line of standard input. Returns figures, and the number of lines that
    could not be asked. ValueError where --ask itself cannot."""
    names, how = reversed(method.pathways), (options.max_new_tokens, options.compile)
    answerers = [answerer(method, name, *how) for name in names]
    rows, refused = [], 0
    if options.ask:
        return ask(method, answerers, options.ask), 0
    for line in sys.stdin.buffer:
        try:
            text = line.decode("utf-8-sig", errors="surrogateescape").strip()
            rows += ask(method, answerers, question_of(text)) if text else []
        except ValueError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
            refused += 1
    return rows, refused


def question_of(line):
    """A line's question: the line, or where it is a JSON object, as a question of several lines
    must be, its field "question"."""
    if not line.startswith("{"):
        return line
    question = parse_json(line, "standard input").get("question")
    if not isinstance(question, str):
        raise ValueError("standard input: no text in the field 'question'")
    return question


def ask(method, answerers, question):
    """Prints the answers to a question through all pathways, side by side -> a row for each."""
    check_room(method, 0, [Problem(question, [], "")], answerers[0].max_new_tokens)
    rows = []
    for name, *how, new in answerers:
        dart.answer(*how, [question], new)  # a warm-up
        start = time.perf_counter()
        ((text, passes),) = dart.answer(*how, [question], new)
        ms = 1000 * (time.perf_counter() - start)
        answer = method.pathways[name].extract_answer(text).strip()
        row = {"question": question, "pathway": name, "answer": answer, "passes": passes}
        rows.append(row | {"ms": ms, "written": text})
    cells = [row | {k: one_cell(row[k]) for k in ("answer", "written")} for row in rows]
    print(f"{one_cell(normalise(question))}\n\n{table(cells)}\n", flush=True)
    return rows


def one_cell(text):
    return printable(" ".join(text.split())).replace("|", r"\|")


# -------------------------------------------------------------------------- into silent thought


@torch.no_grad()
def states_at(model, ids, silent, columns):
    """The outputs of all layers at P tokens of one row of ids: [L, P, n]."""
    ids, columns = (torch.tensor(values, device=model.device) for values in (ids, columns))
    return model(ids[None], silent, capture=(torch.zeros_like(columns), columns))[1]


@torch.no_grad()
def logit_lens(model, states, k):
    """What the model would say next if each layer were its last: final norm and head on states
    [L, P, n] -> the k likeliest tokens, (probabilities [L, P, k], ids [L, P, k])."""
    probabilities = model.logits(model.norm(states)).float().softmax(dim=-1)
    return probabilities.topk(min(k, probabilities.shape[-1]))


def silent_states(method, question):
    """(ids, states [L, P, n], C) of the C silent tokens and the separator behind a question; the
    last one is z_N."""
    pathway = method.pathways[method.inference_pathway]
    ids = pathway.prompt(question, method.tokenizer).ids.tolist()
    n_silent = sum(i in pathway.special_ids[:1] for i in ids)
    first = len(ids) - len(dart.separator_ids(method.tokenizer)) - n_silent
    columns = list(range(first, len(ids)))
    return ids[first:], states_at(method.model, ids, pathway.silent, columns), n_silent


def teacher_state(method, question, max_new_tokens):
    """The state at z_N of the CoT pathway behind steps that it wrote itself, [L, 1, n]. None where
    there is no such pathway, or it writes no separator."""
    pathway, separator = method.pathways.get("cot"), dart.separator_ids(method.tokenizer)
    if pathway is None:
        return None
    prompt = pathway.prompt(question, method.tokenizer)
    (ids,) = dart.generate(method.model, method.tokenizer, pathway, [prompt], max_new_tokens)
    ids = prompt.ids.tolist() + ids
    for stop in range(len(ids), len(prompt.ids), -1):
        if ids[:stop][-len(separator) :] == separator:
            return states_at(method.model, ids[:stop], False, [stop - 1])
    return None


def lens(method, question, max_new_tokens, k):
    """The logit lens on one question: (columns, distances).

    columns: {token: the k likeliest tokens of each layer, [L][k] of (text, probability)}, of the
    silent tokens, the separator and the CoT pathway's z_N. distances [L]: between the two z_N, in
    units of sigma (of this one state); empty where there is one alone.
    """
    tokenizer, model = method.tokenizer, method.model
    ids, states, n_silent = silent_states(method, question)
    texts = n_silent * ["<st>"] + [token_text(tokenizer, i) for i in ids[n_silent:]]
    names = [f"{i} {text}" for i, text in enumerate(texts, 1)]
    teacher, distances = teacher_state(method, question, max_new_tokens), []
    if teacher is not None:
        pairs = zip(teacher[:, None], states[:, None, -1:], strict=True)  # of [1, 1, n]
        distances = [dart.distill_loss(t, s).item() for t, s in pairs]
        names.append(f"CoT's {token_text(tokenizer, ids[-1])}")
        states = torch.cat((states, teacher), dim=1)
    shares, tokens = (values.transpose(0, 1).tolist() for values in logit_lens(model, states, k))
    columns = {}
    for name, layers, probabilities in zip(names, tokens, shares, strict=True):  # each [L][k]
        texts = [[token_text(tokenizer, i) for i in layer] for layer in layers]
        columns[name] = [list(zip(*pair, strict=True)) for pair in zip(texts, probabilities)]
    return columns, distances


def lens_table(columns, distances, width):
    """What `lens` returns as tables: a row a layer, the last one above, in each cell the likeliest
    tokens with their probabilities, as many columns side by side as fit into the width."""
    rows = []
    for i, layer in enumerate(zip(*columns.values(), strict=True), 1):
        cells = ["  ".join(f"{token} {p:.0%}" for token, p in cell) for cell in layer]
        rows.insert(0, {"layer": i} | dict(zip(columns, cells, strict=True)))
        if distances:
            rows[0]["distance"] = f"{distances[i - 1]:.3f}"
    blocks, left = [], 0
    for name in [*rows[0]][1:]:
        size = 3 + max(map(len, (name, *(row[name] for row in rows))))
        left -= size
        if left < 0:
            blocks, left = [*blocks, ["layer"]], width - 9 - size
        blocks[-1].append(name)
    headed = [{name: (name, str) for name in block} for block in blocks]
    return "\n\n".join(table(rows, columns) for columns in headed)


WORDS = re.compile(r"\d*\.?\d+|[^\W\d_]+")  # numbers and words: a step's last one is its result
CONTROLS = 10  # other problems


def results_of(problem):
    """(results of all steps but the last that are not in question or answer; the words of these
    two)"""
    known = {*WORDS.findall(problem.question), *WORDS.findall(problem.answer)}
    found = [WORDS.findall(step) for step in problem.steps[:-1]]
    return {words[-1] for words in found if words} - known, known


def lens_hit_rate(method, problems, k):
    """How often an intermediate result of the gold CoT is among the k likeliest tokens of a state:
    a row a layer, and one of any layer. ValueError where no problem has such a result.

    Of the places "<st>" (any of them), "z_N" and "CoT's z_N" (behind the gold steps) a row has the
    share of results, and of a control: results of the next CONTROLS problems that are not this
    one's. A result counts by the text of its first token, where no word of question and answer
    begins with it. distance: of the two z_N, as in equation (4).
    """
    tokenizer, model, cot = method.tokenizer, method.model, method.pathways.get("cot")
    text = functools.cache(lambda i: tokenizer.decode([i]).strip())
    encode = functools.partial(tokenizer.encode, bos=False, eos=False, continued=True)

    def first_tokens(words):
        return {text(encode(word)[0]) for word in words}

    results, known = zip(*(map(first_tokens, results_of(problem)) for problem in problems))
    n, layers = len(problems), [*range(1, model.config.num_hidden_layers + 1), "any"]
    sought = []  # of each problem, its results and the control
    for i in range(n):
        gold, others = results[i] - known[i], range(i + 1, i + min(CONTROLS + 1, n))
        sought.append((gold, [w for j in others for w in results[j % n] - known[i] - gold]))
    looked_for = np.array([[*map(len, words)] for words in sought]).sum(axis=0)
    if not looked_for.all():
        raise ValueError("--lens: the problems have no intermediate results; give it a question")
    hits, pairs = {}, []  # place -> [2, L + 1]; states at both z_N, (CoT's, silent), [L, 1, n]
    for problem, both_kinds in zip(problems, sought, strict=True):
        _, states, n_silent = silent_states(method, problem.question)
        places = {"<st>": states[:, :n_silent]} if n_silent else {}
        places["z_N"] = states[:, -1:]
        if cot:
            example = cot.example(problem, tokenizer)
            ids, z_n = example.ids.tolist(), example.y_start - 1
            places["CoT's z_N"] = states_at(model, ids, False, [z_n])
            pairs.append((places["CoT's z_N"], places["z_N"]))
        for place, states in places.items():
            ids = logit_lens(model, states, k)[1].flatten(1).tolist()  # [L][P * k]
            likely = [set(map(text, layer)) for layer in ids]
            likely.append(set().union(*likely))
            found = [[sum(w in layer for w in words) for layer in likely] for words in both_kinds]
            hits[place] = hits.get(place, 0) + np.array(found)
    rows = [{"layer": layer, "n": int(looked_for[0])} for layer in layers]
    for i, row in enumerate(rows):
        row |= {place: (found[:, i] / looked_for).tolist() for place, found in hits.items()}
        if cot and row["layer"] != "any":
            t, s = (torch.cat(states, dim=1)[i : i + 1] for states in zip(*pairs, strict=True))
            row["distance"] = dart.distill_loss(t, s).item()
    return rows


def run_lens(method, sets, options):
    """The lens on a question, or on data sets: prints what it shows, and returns its figures."""
    pathway, k = method.pathways[method.inference_pathway], options.top_k
    if pathway.n_latents or pathway.steps:
        raise ValueError(f"--lens: {method.options.method} does not answer in one pass")
    rows = []
    if not options.lens:
        for name, problems in sets.items():
            rates = lens_hit_rate(method, problems, k)
            print(f"{name}: results among the {k} likeliest tokens / control, in %\n")
            print(f"{table(rates)}\n")
            rows += [{"data": name} | row for row in rates]
        return rows
    new = options.max_new_tokens or method.options.max_new_tokens
    check_room(method, 0, [Problem(options.lens, [], "")], new)
    columns, distances = lens(method, options.lens, new, k)
    print(lens_table(columns, distances, shutil.get_terminal_size((100, 0)).columns))
    if options.plot:
        save_figure(options.plot, draw_lens, options.lens, columns)
    return [{"question": options.lens, "columns": columns, "distances": distances}]


# ---------------------------------------------------------------------------------------- plots


def save_figure(path, draw, *arguments):
    """Writes the image that draw(figure, ...) makes, in the format of the file's name."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None

    figure = Figure(layout="constrained")
    draw(figure, *arguments)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png")


def draw_losses(figure, directories):
    """The losses of runs, one colour each, and below them the accuracies on validation splits."""
    curves = [log_curves(directory) for directory in directories]
    rows = 1 + any(valid for _, valid in curves)
    figure.set_size_inches(8, 3.5 * rows)
    panels = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    for i, (directory, kinds) in enumerate(zip(directories, curves, strict=True)):
        for axes, found in zip(panels, kinds, strict=False):
            for (name, curve), style in zip(found.items(), ("-", "--", ":"), strict=False):
                axes.plot(*curve, style, color=f"C{i}", label=f"{directory} {name}")
    panels[0].set(ylabel="loss", yscale="log")
    if rows == 2:
        panels[1].set(ylabel="validation accuracy (%)", ylim=(0, 103))
    panels[-1].set(xlabel="step")
    for axes in panels:
        axes.legend(fontsize="small")


def log_curves(directory):
    """({loss: (steps, values)}, {pathway: (steps, accuracies in %)}) of a run's log.jsonl.
    ValueError where it is none."""
    path, losses, valid = Path(directory) / "log.jsonl", {}, {}
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = parse_json(text, path)
            names = list(line)[1 : list(line).index("lr")] if "lr" in line else []
            found = [(losses, name, line[name]) for name in names]
            found += [(valid, name, 100 * x) for name, x in line.get("valid", {}).items()]
            for curves, name, value in found:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(int(line["step"]))
                values.append(float(value))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not the log of a run ({error})") from None
    if not losses:
        raise ValueError(f"{path}: there is no loss in it yet")
    return losses, valid


def plain(text):
    """A text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def draw_lens(figure, question, columns):
    """The likeliest token of `lens`'s columns as a heat map, the first layer at the bottom."""
    layers = list(zip(*columns.values(), strict=True))  # [L][P] of the k likeliest
    widest = max(len(cell[0][0]) for layer in layers for cell in layer)
    width = 2.5 + len(columns) * max(0.5, 0.1 * widest)
    figure.set_size_inches(width, 2 + 0.25 * len(layers))
    axes = figure.subplots()
    shares = [[cell[0][1] for cell in layer] for layer in layers]
    image = axes.imshow(shares, aspect="auto", origin="lower", cmap="Greys", vmin=0, vmax=1)
    figure.colorbar(image, label="probability")
    for y, layer in enumerate(layers):
        for x, ((token, p), *_) in enumerate(layer):
            kind = dict(color="white" if p > 0.5 else "black", fontsize=9)
            axes.text(x, y, plain(token), ha="center", va="center", **kind)
    axes.set_xticks(range(len(columns)), map(plain, columns), rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), range(1, len(layers) + 1))
    axes.set(ylabel="layer")
    axes.set_title(plain(textwrap.fill(one_cell(question), int(8 * width))), fontsize=10)


def draw_table(figure, tables):
    """A suite's table.json: a bar for each row, its 95 % interval, and a mark at the paper's."""
    figure.set_size_inches(8, 1 + 3 * len(tables))
    panels = figure.subplots(len(tables), squeeze=False)[:, 0]
    for axes, (name, rows) in zip(panels, tables.items(), strict=True):
        labels = [f"{row['row']}\n{row['pathway']}" for row in rows]
        exact = np.array([row["exact"] for row in rows])
        reach = 100 * np.abs(np.array([row["exact_interval"] for row in rows]).T - exact)
        axes.bar(range(len(rows)), 100 * exact, yerr=reach, color="lightgrey", capsize=3)
        axes.set_xticks(range(len(rows)), map(plain, labels), rotation=45, ha="right")
        axes.set(ylabel="exact match (%)", ylim=(0, 105), title=plain(name))
        paper = {i: row["paper"] for i, row in enumerate(rows) if row["paper"] != "-"}
        if paper:
            accuracies = [float(figures.partition("/")[0]) for figures in paper.values()]
            axes.plot([*paper], accuracies, "D", color="C3", label="paper")
            axes.legend()


def draw_figure2(figure, tables):
    """Figure 2: accuracy and time to an answer over C, for each data set."""
    left = figure.subplots()
    right = left.twinx()
    for name, rows in tables.items():
        rows = [row for row in rows if row["pathway"] == "st"]
        n_st = [int(row["row"].removeprefix("C = ")) for row in rows]
        exact = np.array([row["exact"] for row in rows])
        reach = np.abs(np.array([row["exact_interval"] for row in rows]).T - exact)  # 95 %
        left.errorbar(n_st, 100 * exact, 100 * reach, capsize=3, label=name)
        right.plot(n_st, [row["ms"] for row in rows], linestyle=":")
    left.set(xlabel="C, number of silent tokens", ylabel="accuracy (%)")
    right.set(ylabel="time to an answer (ms, dotted)", ylim=(0, None))
    left.legend()


# --------------------------------------------------------------------------------------- export

CARD = """---
library_name: transformers
---
A plain {family} checkpoint: a run of the method `{method}` of a reference implementation of DART
(Jiang et al., EMNLP 2025), as its pathway `{name}`, LoRA and REM folded into the weights.
{base}

The prompt is the question, stripped and with single blanks{prompted}.

```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

# AutoTokenizer would cut texts as the family's own tokenizer does, whatever stands in the files
tokenizer = PreTrainedTokenizerFast.from_pretrained(DIRECTORY)
model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
question = "..."
{inputs}
output = model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens={new})
print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True){read})
```
"""


def model_card(method, name):
    """README.md of an exported model: how to prompt it."""
    pathway, tokenizer, separator = method.pathways[name], method.tokenizer, dart.SEPARATOR
    prompts = [pathway.prompt(q, tokenizer).ids.tolist() for q in (separator, 9 * separator)]
    counts = {sum(i in pathway.special_ids[:1] for i in ids) for ids in prompts}
    inputs, read = 'ids = tokenizer(question, return_tensors="pt").input_ids', ""
    if pathway.steps:
        prompted = f"; the model writes steps, `{separator}` and the answer"
        read = f".rpartition({separator!r})[2]"
    elif len(counts) > 1:
        raise ValueError("the question says how many <st>: no card can say how to prompt")
    elif counts != {0}:
        (n,) = counts
        prompted = f", directly followed by {n} times `<st>` and `{separator}`"
        inputs = f'prompt = question + "<st>" * {n} + "{separator}"\n{inputs}'
        inputs = inputs.replace("tokenizer(question", "tokenizer(prompt")
    else:  # as a text, tokens might be merged across the seam
        ids = dart.separator_ids(tokenizer)
        prompted = f", its ids followed by those of `{separator}`, {ids}"
        inputs += f"\nids = ids.new_tensor([ids[0].tolist() + {ids}])"
    what = dict(family=method.model.config.model_type, method=method.options.method, name=name)
    base = Path(method.options.model).name
    what["base"] = f"The base model was `{base}`: its licence holds, its chat template does not."
    if method.options.random_init:
        what["base"] = "It was trained from random weights."
    new = method.options.max_new_tokens
    return CARD.format(**what, prompted=prompted, inputs=inputs, new=new, read=read)


def export(method, directory, name):
    """Writes a run as a plain Hugging Face checkpoint, for one of its pathways: weights, tokenizer
    and a model card, there as a whole or not at all. ValueError or OSError."""
    pathway, tokenizer, out = method.pathways[name], method.tokenizer, Path(directory).resolve()
    if pathway.n_latents:
        raise ValueError(f"--pathway {name}: continuous thoughts are no tokens of a plain model")
    files, st_id = tokenizer.export(with_st=pathway.n_silent > 0)
    files["README.md"] = model_card(method, name).encode()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ids["pad_token_id"] = tokenizer.eos_id
    model = method.model.merge(silent=pathway.silent)
    st_id = st_id if pathway.n_silent and model.new_embeddings is not None else None
    temporary = out.with_name(f"{out.name}.tmp")
    temporary.mkdir(parents=True)
    try:
        weights = export_hf(model, temporary, st_id, ids)
        for file, content in files.items():
            write_bytes(temporary / file, content)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    text = f"{directory}: a plain {model.config.model_type} model, {weights:,} weights"
    print(f"{text}; its README.md says how to prompt it")


# -------------------------------------------------------------------------------------- program


READS = {  # what is asked for -> the options that it reads, beside those of every call
    "": "data data_dir split limit pathway latency batch_size max_new_tokens compile examples json",
    "ask": "ask max_new_tokens compile json",
    "lens": "lens top_k max_new_tokens json plot",
    "lens without a question": "lens top_k max_new_tokens json data data_dir split limit",
    "plot": "plot",
    "export": "export pathway",
}


def asked_for(options):
    """The key of READS. ValueError unless the options go together and each new file has a place."""
    given = {f.name for f in dataclasses.fields(Options) if getattr(options, f.name) != f.default}
    mode = next((name for name in ("ask", "lens", "export", "plot") if name in given), "")
    mode = "lens without a question" if options.lens == "" else mode
    allowed = {"ckpt", *READS[mode].split()}
    allowed |= {"best", "model", "dtype", "device"} if mode != "plot" else set()
    if odd := given - allowed:
        raise ValueError(f"--{min(odd)} does not go with {f'--{mode}' if mode else 'accuracies'}")
    if not options.ckpt or (len(options.ckpt) > 1 and mode != "plot"):
        raise ValueError("--ckpt DIR: one directory of a run, or several for --plot alone")
    if mode == "export" and len(options.pathway) > 1:
        raise ValueError("--export writes one pathway: --pathway has several")
    files = [options.json, options.examples, options.plot, options.export]
    files = [Path(file).resolve() for file in files if file]
    for file in files:
        there = file.parent.is_dir() and os.access(file.parent, os.W_OK)
        if file.exists() or not there or files.count(file) > 1:
            raise ValueError(f"{file}: exists already, cannot be written, or is named twice")
    return mode


def remember(options, figures):
    """Adds a line to eval.json of the run: when it was, what was asked for, and the figures."""
    line = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "options": dataclasses.asdict(options)}
    try:
        append_line(Path(options.ckpt[0]) / "eval.json", line | {"figures": figures})
    except OSError as error:
        show(f"not in the run's eval.json: {error}")


def main(argv=None):
    options = parse_options(Options, argv, __doc__)
    mode = asked_for(options)
    if mode == "plot":
        path = Path(options.ckpt[0])
        if len(options.ckpt) > 1 or (path / "config.json").exists() or not path.is_dir():
            return save_figure(options.plot, draw_losses, options.ckpt)
        try:
            return save_figure(options.plot, draw_table, read_json(path / "table.json"))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}/table.json: not the table of a suite ({error!r})") from None
    device = pick_device(options.device)
    method, run = dart.load_run(options.ckpt[0], options.model, device, options.dtype, options.best)
    if unknown := [name for name in options.pathway if name not in method.pathways]:
        raise ValueError(f"--pathway {unknown[0]}: there are {', '.join(method.pathways)}")
    if mode == "export":
        return export(method, options.export, (*options.pathway, method.inference_pathway)[0])
    names = options.data or (run.data,) if "data" in READS[mode].split() else ()
    if names and not options.data and is_single_file(run.data):
        raise ValueError(f"--data is missing: {run.data} is what the run was trained on")
    where = options.data_dir or run.data_dir
    sets = {name: load(name, options.split, run.seed, where) for name in names}
    sets = {name: problems[: options.limit or None] for name, problems in sets.items()}
    for problems in sets.values():
        check_room(method, 0, problems, options.max_new_tokens or run.max_new_tokens)
    records, refused = [], 0
    if mode == "ask":
        figures, refused = ask_all(method, options)
    elif mode:
        figures = run_lens(method, sets, options)
    else:
        figures, records = evaluate_run(method, sets, options)
        remember(options, figures)
    if options.json:
        write_json(options.json, figures)
    if options.examples:
        write_text(options.examples, "".join(json.dumps(record) + "\n" for record in records))
    if refused:
        end(f"{refused} of the questions could not be asked", 2)


if __name__ == "__main__":
    run_program(main)
