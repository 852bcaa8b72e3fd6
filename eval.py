"""Evaluates a run of train.py: accuracy through real greedy decoding, and the time to an answer at batch 1.

    python eval.py --ckpt out/demo                             the test split of the run's data, the silent pathway
    python eval.py --ckpt out/demo --pathway st cot            through both pathways
    python eval.py --ckpt DIR --data svamp gsm-hard --json FILE    other data; the figures for programs

The first half (options from dataclasses, one-line errors, reading a run, Wilson's interval, tables) serves train.py, too.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import dart
from dart import option
from data import DATASETS, Parser, Tokenizer, load, one_line_errors, run_program
from model import ModelConfig, Transformer, tensors_of

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
            raise ValueError(f"--{field.name} {value!r}: not of the type {field.type.__name__}")
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


# ------------------------------------------------------------------------------------------------------------ program


@dataclass
class Options:
    ckpt: str = option("", "directory of the run")
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


def main(argv=None):
    with one_line_errors():
        options = parse_options(Options, argv, __doc__)
        if not options.ckpt:
            raise ValueError("--ckpt DIR is missing: the directory of a run")
        for path in map(Path, filter(None, (options.json, options.examples))):
            if path.exists() or not path.parent.is_dir():
                raise ValueError(f"{path}: " + ("exists already" if path.exists() else "its directory does not exist"))
        method, run = load_run(options.ckpt, options.model, pick_device(options.device), options.dtype, options.best)
        options.max_new_tokens = options.max_new_tokens or run.max_new_tokens
        options.pathway = options.pathway or (list(method.pathways)[-1],)
        if unknown := [name for name in options.pathway if name not in method.pathways]:
            raise ValueError(f"--pathway {unknown[0]}: {run.method} has {' and '.join(method.pathways)}")
        sets = {name: load(name, options.split, run.seed, options.data_dir or run.data_dir)[: options.limit or None]
                for name in options.data or (run.data,)}  # fmt: skip
        for problems in sets.values():
            check_room(method, problems, options.max_new_tokens)
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
    with one_line_errors():
        if options.json:
            write_atomically(options.json, json.dumps(rows, indent=1) + "\n")
        if options.examples:
            write_atomically(options.examples, "".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    run_program(main)
