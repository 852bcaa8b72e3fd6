"""Evaluates a run of train.py: accuracy through real greedy decoding, and the time to an answer at batch 1.

    python eval.py --ckpt out/demo                             the test split of the run's data, the silent pathway
    python eval.py --ckpt out/demo --pathway st cot            through both pathways
    python eval.py --ckpt DIR --data FILE ... --json FILE      other data; the figures for programs

Also here, because train.py uses it, too: options from dataclasses, one-line errors, Wilson's interval, tables.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import dart
from dart import option
from data import Tokenizer, load
from model import ModelConfig, Transformer

# ----------------------------------------------------------------------------------------------- options and errors


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the options)")


def parse_options(cls, argv, doc, defaults=None):
    """An instance of a dataclass whose fields are `dart.option`s, from the command line.

    defaults: {name: value} that stand in for the class's own. Raises ValueError in one line.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        default = (defaults or {}).get(field.name, field.default)
        kind = dict(default=default, help=f"{field.metadata['help']} (default: {default!r})")
        if field.type is bool:
            kind["action"] = argparse.BooleanOptionalAction
        else:
            kind["choices"] = field.metadata.get("choices")
            kind["type"] = str if field.type is tuple else field.type
            if field.type is tuple:
                kind["nargs"] = "*"
        parser.add_argument(f"--{field.name}", **kind)
    values = vars(parser.parse_args(argv))
    for field in dataclasses.fields(cls):
        value = values[field.name]
        if field.type in (int, float) and not field.metadata.get("low", 0) <= value < math.inf:
            raise ValueError(f"--{field.name} {value}: not a number of at least {field.metadata.get('low', 0)}")
        if field.type is tuple:
            values[field.name] = tuple(value)
    return cls(**values)


@contextlib.contextmanager
def one_line_errors():
    """What a user can get wrong (ValueError, OSError) ends in one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def write_atomically(path, text):
    """A reader sees the old file or the whole new one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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


# -------------------------------------------------------------------------------------------------------- evaluation


def load_run(directory, model_directory=None, device="cpu", dtype=None):
    """(method, options of the run) of a directory that train.py wrote, ready for evaluation.

    model_directory: where the base weights are now, if not where they were; dtype: the run's where None.
    Raises FileNotFoundError or ValueError, naming the file.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: not a run of train.py: there is no config.json in it")
    if not (directory / "adapter.safetensors").is_file():
        raise FileNotFoundError(f"{directory}: nothing to load: the run has not written adapter.safetensors yet")
    saved = read_json(directory / "config.json")
    try:
        options = argparse.Namespace(**saved["options"])
        config = ModelConfig(**saved["model_config"])
        method = dart.METHODS[options.method]
        complete = options.lora_rank == 0 or options.random_init
        dtype = DTYPES[dtype or options.dtype]
        tokenizer = Tokenizer.from_pretrained(directory)
        adapters = method.adapters(tokenizer, options)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / 'config.json'}: not the configuration of a run ({error})") from None
    if complete:
        model = Transformer(config, adapters, dtype=torch.float32, device=device, compute_dtype=dtype, random_init=False)
    else:
        model = Transformer.from_pretrained(model_directory or options.model, adapters, dtype=dtype, device=device)
        if model.config != config:
            raise ValueError(f"{model_directory or options.model}: not the model that {directory} was trained on")
    model.load_adapter_state(directory / "adapter.safetensors", complete)
    return method(model, tokenizer, options).eval(), options


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return name


def merged(method, name):
    """A copy of the method's model with LoRA and REM folded into the weights, for the pathway `name`."""
    return copy.deepcopy(method.model).merge(silent=method.pathways[name].silent)


def latency(model, tokenizer, pathway, questions, max_new_tokens):
    """Seconds to an answer at batch 1, one for each question: prefill and greedy decoding, synchronised. Tokenisation is
    left out; the first questions are answered once before, as a warm-up."""
    prompts = [pathway.prompt(question, tokenizer) for question in questions]
    synchronise = torch.cuda.synchronize if model.embed_tokens.is_cuda else lambda: None
    seconds = []
    for i, prompt in enumerate(prompts[:5] + prompts):
        synchronise()
        start = time.perf_counter()
        dart.generate(model, [prompt], pathway.silent, tokenizer.eos_id, max_new_tokens)
        synchronise()
        if i >= len(prompts[:5]):
            seconds.append(time.perf_counter() - start)
    return seconds


def summary(records, seconds):
    """The figures of one pathway on one set of problems: records of `dart.evaluate`, seconds of `latency` or []."""
    n = len(records)
    figures = {"n": n, "passes": sum(r["passes"] for r in records) / n}
    for kind in ("strict", "tolerant"):
        right = sum(record[kind] for record in records)
        figures[kind], figures[f"{kind}_interval"] = right / n, wilson(right, n)
    if seconds:
        figures["ms"] = 1000 * statistics.median(seconds)
        figures["ms_p90"] = 1000 * sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1]
    return figures


def accuracy_text(figures, kind="strict"):
    low, high = figures[f"{kind}_interval"]
    return f"{100 * figures[kind]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


# ------------------------------------------------------------------------------------------------------------ program


@dataclass
class Options:
    ckpt: str = option("", "directory of the run")
    data: tuple = option((), "data sets: directories or files as for train.py; none: the run's own")
    split: str = option("test", "which split of them", choices=("train", "valid", "test"))
    pathway: tuple = option((), "pathways to answer through (dart: st, cot); none: the method's own way to answer")
    limit: int = option(0, "at most so many problems of each set; 0: all")
    latency: int = option(50, "questions timed one by one at batch 1; 0: none")
    batch_size: int = option(64, "problems answered at once, for the accuracy", low=1)
    max_new_tokens: int = option(0, "tokens an answer may have; 0: as in the run")
    model: str = option("", "directory of the base weights, if not the one of the run")
    dtype: str = option("", "fp32 or bf16; as in the run where it is not given", choices=("", *DTYPES))
    device: str = option("auto", "cpu, cuda, or auto", choices=("auto", "cpu", "cuda"))
    examples: str = option("", "file for one line of JSON for each problem and pathway")
    json: str = option("", "file for the figures as JSON")


def evaluate_set(method, name, problems, options):
    """(figures, one dictionary a pathway; records, one a problem and pathway) of one data set. All pathways are timed,
    those of --pathway are scored, too."""
    figures, records, ms, tokenizer = [], [], {}, method.tokenizer
    timed = [problem.question for problem in problems[: options.latency]]
    for pathway_name, pathway in method.pathways.items():
        model = merged(method, pathway_name)
        seconds = latency(model, tokenizer, pathway, timed, options.max_new_tokens)
        if timed:
            ms["cot" if pathway.steps else pathway_name] = 1000 * statistics.median(seconds)
        if pathway_name in options.pathway:
            found = dart.evaluate(model, tokenizer, pathway, problems, options.max_new_tokens, options.batch_size)
            records += [{"data": name, "pathway": pathway_name, "id": i, **record} for i, record in enumerate(found)]
            figures.append({"data": name, "pathway": pathway_name, **summary(found, seconds)})
    for row in figures:
        if "cot" in ms:
            row["speedup_over_cot"] = ms["cot"] / row["ms"]
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
        method, run = load_run(options.ckpt, options.model, pick_device(options.device), options.dtype)
        options.max_new_tokens = options.max_new_tokens or run.max_new_tokens
        options.pathway = options.pathway or (list(method.pathways)[-1],)
        if unknown := [name for name in options.pathway if name not in method.pathways]:
            raise ValueError(f"--pathway {unknown[0]}: {run.method} has {' and '.join(method.pathways)}")
        sets = {name: load(name, options.split, run.seed) for name in options.data or (run.data,)}
    rows, records = [], []
    for name, problems in sets.items():
        new = evaluate_set(method, name, problems[: options.limit or None], options)
        rows, records = rows + new[0], records + new[1]
    with one_line_errors():
        if options.json:
            write_atomically(options.json, json.dumps(rows, indent=1) + "\n")
        if options.examples:
            write_atomically(options.examples, "".join(json.dumps(record) + "\n" for record in records))
    print(markdown([report(row) for row in rows]))


if __name__ == "__main__":
    main()
