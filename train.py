"""Trains DART, or a method that it is compared with.

    python train.py                                            the built-in task: DART beside No-CoT and PauseFT, minutes
    torchrun --nproc_per_node=8 train.py --preset llama-3.2-1b --model DIR --data DIR --out DIR

A run directory holds config.json (options, architecture, versions), adapter.safetensors (what was trained), the
tokenizer, log.jsonl, result.json, and trainer.safetensors (all that --resume needs).
"""

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import dart
import data
from dart import option
from eval import (DTYPES, accuracy_text, latency, load_run, markdown, merged, one_line_errors, parse_options, pick_device,
                  read_json, summary, write_atomically)  # fmt: skip
from model import MODELS, ModelConfig, Transformer

# ----------------------------------------------------------------------------------------------------------- options


@dataclass
class Options(dart.Options):
    """The defaults are the paper's for Llama-3.2-1B, and CODI's (Shen et al. 2025) where the paper says nothing."""

    preset: str = option("demo", "recipe; every option that is given replaces the recipe's")
    model: str = option("", "directory of the base model: config.json, model.safetensors")
    tokenizer: str = option("", "directory of the tokenizer, if not the model's")
    random_init: bool = option(False, "random weights; --model may then be a name, or a directory with only config.json")
    data: str = option("", "directory with train.txt and valid.txt in GSM8K-Aug's format, or 'demo', the built-in task")
    out: str = option("", "directory of the run (default: out/PRESET)")
    resume: bool = option(False, "continue the run in --out from its last checkpoint")
    overwrite: bool = option(False, "replace the run in --out")
    compare: tuple = option((), "methods trained first with the same options, into folders of --out, for a table")
    epochs: int = option(10, "passes over the training data", low=1)
    steps: int = option(0, "optimizer steps; 0: as many as --epochs take")
    batch_size: int = option(128, "problems in an optimizer step, over all processes", low=1)
    micro_batch_size: int = option(0, "problems in a forward pass of a process; 0: all of its share")
    lr: float = option(8e-4, "highest learning rate: linear warm-up, then a cosine to 0")
    warmup: float = option(0.03, "share of the steps that warm up")
    weight_decay: float = option(0.1, "AdamW's, on matrices only")
    beta2: float = option(0.999, "AdamW's")
    grad_clip: float = option(2.0, "largest norm of the gradient; 0: no limit")
    dtype: str = option("bf16", "of the computation and of frozen weights", choices=tuple(DTYPES))
    seed: int = option(0, "of weights, data order and dropout")
    eval_every: int = option(0, "steps between evaluations on the validation split; 0: once an epoch")
    eval_size: int = option(500, "at most so many validation problems")
    max_new_tokens: int = option(256, "tokens an answer may have, CoT included", low=1)
    log_every: int = option(10, "steps between lines of the log", low=1)
    save_every: int = option(500, "steps between checkpoints", low=1)
    device: str = option("auto", "cpu, cuda, or auto", choices=("auto", "cpu", "cuda"))


PRESETS = {
    "llama-3.2-1b": dict(epochs=10, lr=8e-4),
    "llama-3.2-3b": dict(epochs=10, lr=5e-4),
    "qwen2.5-1.5b": dict(epochs=10, lr=5e-4),
    "gpt2": dict(epochs=40, lr=2e-3),
    # The built-in task trains all weights of a tiny model from scratch: there is nothing pretrained to freeze.
    "demo": dict(model="demo", tokenizer="demo", data="demo", random_init=True, compare=("no-cot", "pause"), steps=1500,
                 batch_size=64, lr=3e-3, weight_decay=1.0, beta2=0.98, grad_clip=1.0, dtype="fp32", lora_rank=0,
                 rem_rank=32, n_st=4, distill_weight=5.0, eval_every=500, max_new_tokens=24, save_every=500, log_every=50),
}  # fmt: skip


def read_options(argv):
    """Options from the command line; ValueError for what is unknown or contradictory."""
    preset = parse_options(Options, argv, __doc__).preset
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    options = parse_options(Options, argv, __doc__, PRESETS[preset])
    options.out = options.out or f"out/{preset}"
    if options.random_init and not options.model:
        options.model = preset
    if preset == "demo" and options.model != "demo":
        raise ValueError("--model goes with the recipe of a pretrained model, such as --preset llama-3.2-1b")
    if not options.model:
        raise ValueError("--model DIR is missing: the base model (or --random_init, for its shape alone)")
    if not options.data:
        raise ValueError("--data DIR is missing: a directory with train.txt and valid.txt")
    if options.data != "demo" and not Path(options.data).is_dir():
        raise ValueError(f"--data {options.data}: not a directory with train.txt and valid.txt")
    if unknown := [name for name in options.compare if name not in dart.METHODS]:
        raise ValueError(f"--compare {unknown[0]}: there are {', '.join(dart.METHODS)}")
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite contradict each other")
    return options


# ------------------------------------------------------------------------------------------------- processes, folders


def start_processes(options):
    """(rank, number of processes, device). Under torchrun each process takes the GPU of its local rank."""
    device, rank, world = pick_device(options.device), 0, 1
    if "RANK" in os.environ:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=torch.device(device))
        else:
            dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    if options.batch_size % world:
        raise ValueError(f"--batch_size {options.batch_size} is not a multiple of the {world} processes")
    return rank, world, device


RUN_FILES = ("config.json", "adapter.safetensors", "trainer.safetensors", "log.jsonl", "result.json", "table.md",
             "words.json", "tokenizer.model", "vocab.json", "merges.txt")  # fmt: skip
FREE_TO_CHANGE = ("out", "resume", "overwrite", "compare", "device")  # between a run and its resumption


def claim(options, config):
    """Makes options.out the directory of this run. Raises ValueError rather than touch anything that is there, unless it
    is a run that may be resumed or overwritten."""
    out = Path(options.out)
    old = out / "config.json"
    if out.exists() and not old.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists, and is not a run of train.py")
    if old.is_file() and options.resume:
        theirs, ours = read_json(old).get("options", {}), dataclasses.asdict(options)
        ours = json.loads(json.dumps(ours))
        changed = [k for k in ours if k not in FREE_TO_CHANGE and ours[k] != theirs.get(k)]
        if changed:
            listed = ", ".join(f"--{k} {theirs.get(k)!r} (now {ours[k]!r})" for k in changed)
            raise ValueError(f"--resume: the run in {out} was started with {listed}")
        return
    if old.is_file() and not options.overwrite:
        raise ValueError(f"--out {out}: holds a run already; --resume continues it, --overwrite replaces it")
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(old, json.dumps(config, indent=1) + "\n")


def describe(options, model_config, world):
    """config.json: all that says what this run is."""
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git here, or no repository
        here = Path(__file__).parent
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, stderr=subprocess.DEVNULL, text=True).strip()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    return {"options": dataclasses.asdict(options), "model_config": dataclasses.asdict(model_config),
            "versions": versions, "commit": commit, "processes": world}  # fmt: skip


def save_tensors(tensors, path, metadata):
    """A safetensors file that is there as a whole or not at all."""
    temporary = f"{path}.tmp"
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def save_checkpoint(out, method, optimizer, step, complete):
    """trainer.safetensors: weights and optimizer state after `step` steps. The rest of a run's state is a function of
    the step: learning rate, data position, and the random numbers, which are seeded at each step."""
    tensors = dict(method.model.adapter_state(complete))
    save_tensors(tensors, out / "adapter.safetensors", {"step": str(step)})
    for name, parameter in method.model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    save_tensors(tensors, out / "trainer.safetensors", {"step": str(step)})


@torch.no_grad()
def load_checkpoint(out, method, optimizer):
    """Takes up the state that `save_checkpoint` left; returns its step, 0 where there is none."""
    path = out / "trainer.safetensors"
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            for name, parameter in method.model.named_parameters():
                if name in file.keys():
                    parameter.copy_(file.get_tensor(name))
                if parameter.requires_grad:
                    moments = {m: file.get_tensor(f"{m}.{name}").to(parameter.device) for m in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint of this run ({error})") from None
    return step


# ---------------------------------------------------------------------------------------------------------- training


def build(options, device):
    """(method, complete): the training method around its model; complete: whether all weights belong to the run."""
    cls = dart.METHODS[options.method]
    tokenizer = find_tokenizer(options)
    adapters = cls.adapters(tokenizer, options)
    torch.manual_seed(options.seed)
    compute = DTYPES[options.dtype]
    dtype = compute if options.lora_rank else torch.float32  # weights that are trained are held in fp32
    if options.random_init:
        model = Transformer(find_config(options), adapters, dtype, device, compute)
    else:
        model = Transformer.from_pretrained(options.model, adapters, dtype, device, compute)
    if tokenizer.size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.size} ids, the model {model.config.vocab_size} embeddings")
    return cls(model, tokenizer, options), options.lora_rank == 0 or options.random_init


def find_config(options):
    if options.model in MODELS and options.random_init:
        return MODELS[options.model]
    return ModelConfig.from_pretrained(options.model)


def find_tokenizer(options):
    source = options.tokenizer or options.model
    if source == "demo":
        return data.demo_tokenizer()
    if not Path(source).is_dir():
        raise ValueError(f"--tokenizer DIR is missing: {source} is no directory")
    return data.Tokenizer.from_pretrained(source)


def learning_rate(options, step, steps):
    """Linear warm-up over the first share of the steps, then half a cosine down to 0 (Appendix C)."""
    warm = options.warmup * steps
    if step < warm:
        return options.lr * (step + 1) / (warm + 1)
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def make_optimizer(model, options):
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, options.beta2), fused=True)


def train_step(wrapped, method, micro_batches, share):
    """The gradients of one optimizer step. Returns {name: loss}, this process's mean over its `share` rows.

    wrapped: the method, or DDP around it, which averages the gradients over the processes in the last pass."""

    def forward(*arguments, sync):
        with contextlib.nullcontext() if sync or wrapped is method else wrapped.no_sync():
            return wrapped(*arguments)

    totals = {}
    for i, losses in enumerate(method.passes(forward, micro_batches)):
        part = len(micro_batches[i % len(micro_batches)]["rows"]) / share
        (part * method.total(losses)).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0.0) + part * loss.detach()
    return totals


def validate(method, problems, options, rank, world):
    """{pathway: tolerant accuracy} on all problems, each process answering its share of them."""
    accuracies = {}
    for name, pathway in method.pathways.items():
        records = dart.evaluate(method.model, method.tokenizer, pathway, problems[rank::world], options.max_new_tokens)
        right = torch.tensor(float(sum(record["tolerant"] for record in records)), device=method.model.embed_tokens.device)
        if world > 1:
            dist.all_reduce(right)
        accuracies[name] = right.item() / len(problems)
    return accuracies


def peak_memory(device):
    """Bytes: of the GPU's memory, or of the whole process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Log:
    """log.jsonl, and one line on the screen: live on a terminal, one after the other elsewhere. Rank 0 alone writes."""

    def __init__(self, path, rank, step):
        self.path, self.rank, self.live = path, rank, sys.stdout.isatty()
        if rank == 0:
            lines = path.read_text().splitlines() if step and path.is_file() else []
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_atomically(path, "".join(line + "\n" for line in kept))

    def write(self, record, text, done=False):
        """A line for the file, and one for the screen, which the next one replaces unless it is `done`."""
        if self.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            self.show(text, done)

    def show(self, text, done=True):
        if self.rank == 0 and not self.live:
            print(text, flush=True)
        elif self.rank == 0:  # a line that were wider than the terminal could not be replaced by the next
            text = text if done else text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{text}", end="\n" if done else "", flush=True)


@dataclass
class Run:
    """What `prepare` makes ready and `train` uses."""

    options: Options
    method: dart.Method
    complete: bool  # the run's files hold all weights
    optimizer: torch.optim.Optimizer
    rows: dict  # pathway -> list of Row, one for each training problem
    lengths: np.ndarray  # [N, P] tokens of each problem in each pathway
    valid: list
    start: int
    steps: int


def prepare(options, device):
    """Loads everything, and takes up the last checkpoint. Raises ValueError or OSError for what a user can mend."""
    train, valid = (data.load(options.data, split, options.seed) for split in ("train", "valid"))
    method, complete = build(options, device)
    rows = {name: [pathway.row(problem, method.tokenizer) for problem in train] for name, pathway in method.pathways.items()}
    lengths = np.array([[len(row.ids) for row in some] for some in rows.values()]).T
    longest = lengths.max()
    if longest > method.model.config.max_position_embeddings:
        raise ValueError(f"--data {options.data}: a row of {longest} tokens, but the model has "
                         f"{method.model.config.max_position_embeddings} positions")  # fmt: skip
    if len(train) < options.batch_size:
        raise ValueError(f"--batch_size {options.batch_size}: there are only {len(train)} problems to train on")
    steps = options.steps or options.epochs * (len(train) // options.batch_size)
    optimizer = make_optimizer(method.model, options)
    start = load_checkpoint(Path(options.out), method, optimizer) if options.resume else 0
    return Run(options, method, complete, optimizer, rows, lengths, valid[: options.eval_size], start, steps)


def global_batches(run, first):
    """The global batches, each an index array, from step `first` on to the last."""
    per_epoch = len(run.lengths) // run.options.batch_size
    for epoch in range(first // per_epoch, math.ceil(run.steps / per_epoch)):
        batches = data.epoch_batches(run.lengths, run.options.batch_size, run.options.seed, epoch)
        start = epoch * per_epoch
        yield from batches[max(first - start, 0) : run.steps - start]


def make_micro_batches(run, mine, device):
    """This process's rows of a global batch, cut into forward passes: list of {pathway: Batch, 'rows': indices}."""
    size, pad = run.options.micro_batch_size or len(mine), run.method.tokenizer.eos_id
    return [{"rows": rows} | {name: data.collate([some[i] for i in rows], pad).to(device) for name, some in run.rows.items()}
            for rows in np.split(mine, range(size, len(mine), size))]  # fmt: skip


def train(run, rank, world, device):
    """The training loop. Leaves the run's files behind; returns what result.json says."""
    options, method, optimizer, out = run.options, run.method, run.optimizer, Path(run.options.out)
    wrapped = DistributedDataParallel(method) if world > 1 else method
    parameters = [p for p in method.parameters() if p.requires_grad]
    log, meter = Log(out / "log.jsonl", rank, run.start), Meter(run, device)
    eval_every = options.eval_every or len(run.lengths) // options.batch_size
    accuracies = {}
    for step, batch in enumerate(global_batches(run, run.start), run.start + 1):
        mine = batch[rank::world]
        micro_batches = make_micro_batches(run, mine, device)
        if step == 1:
            log.show(first_rows(method, {name: some[batch[0]] for name, some in run.rows.items()}))
        torch.manual_seed(int(np.random.SeedSequence((options.seed, step, rank)).generate_state(1)[0]))  # for dropout
        losses = train_step(wrapped, method, micro_batches, len(mine))
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step - 1, run.steps)
        optimizer.step()
        optimizer.zero_grad()
        meter.count(batch, micro_batches)
        last = step == run.steps
        if step % options.log_every == 0 or last:
            losses = {name: mean_over_processes(loss, world) for name, loss in losses.items()}
            log.write(*meter.record(step, losses, norm.item(), optimizer.param_groups[0]["lr"]))
        before = time.perf_counter()
        if step % eval_every == 0 or last:
            accuracies = validate(method, run.valid, options, rank, world)
            text = "  ".join(f"{name} {100 * share:.1f} %" for name, share in accuracies.items())
            log.write({"step": step, "valid": accuracies}, f"step {step}  validation: {text}", done=True)
        if (step % options.save_every == 0 or last) and rank == 0:
            save_checkpoint(out, method, optimizer, step, run.complete)
        meter.began += time.perf_counter() - before  # evaluations and checkpoints are no training time
    result = {"method": options.method, "steps": run.steps, "valid": accuracies, **meter.totals(),
              "trained_parameters": sum(p.numel() for p in parameters)}  # fmt: skip
    if rank == 0:
        write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def mean_over_processes(value, world):
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world


class Meter:
    """Speed, padding and memory since the start or the resumption of a run."""

    def __init__(self, run, device):
        self.run, self.device, self.began = run, device, time.perf_counter()
        self.tokens = self.mine = self.padded = 0

    def count(self, batch, micro_batches):
        self.tokens += int(self.run.lengths[batch].sum())
        for micro in micro_batches:
            self.mine += int(self.run.lengths[micro["rows"]].sum())
            self.padded += sum(batch.ids.numel() for name, batch in micro.items() if name != "rows")

    def totals(self):
        seconds = time.perf_counter() - self.began
        return {"seconds": seconds, "tokens_per_s": self.tokens / seconds, "peak_memory": peak_memory(self.device),
                "padding": 1 - self.mine / max(self.padded, 1)}  # fmt: skip

    def record(self, step, losses, norm, lr):
        """(dictionary for log.jsonl, line for the screen)"""
        totals, steps = self.totals(), self.run.steps
        left = totals["seconds"] / (step - self.run.start) * (steps - step)
        text = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        text = (f"step {step}/{steps}  {text}  lr {lr:.1e}  |g| {norm:.2f}  {totals['tokens_per_s']:,.0f} tokens/s  "
                f"padding {100 * totals['padding']:.1f} %  peak {totals['peak_memory'] / 2**30:.2f} GiB  "
                f"left {left // 60:.0f}:{left % 60:02.0f}")  # fmt: skip
        return {"step": step, **losses, "lr": lr, "grad_norm": norm, **totals}, text


def first_rows(method, rows):
    """The picture of one problem's tokens and loss weights in every pathway."""
    pictures = (f"{name}\n{data.picture(row, method.tokenizer)}" for name, row in rows.items())
    return "the first problem of the first batch: each token, and what it weighs in the loss\n" + "\n".join(pictures)


# ------------------------------------------------------------------------------------------------------------ program


def comparison(directories, options, device):
    """The table of several runs on the test split: (rows for people, rows for programs), through each one's pathways."""
    train, test = (data.load(options.data, split, options.seed) for split in ("train", "test"))
    splits = {"train": train[:500], "test": test}
    rows, figures = [], []
    for directory in directories:
        method, run = load_run(directory, device=device)
        for name, pathway in reversed(method.pathways.items()):
            model, tokenizer = merged(method, name), method.tokenizer
            found = {split: dart.evaluate(model, tokenizer, pathway, problems, options.max_new_tokens)
                     for split, problems in splits.items()}  # fmt: skip
            seconds = latency(model, tokenizer, pathway, [p.question for p in test[:50]], options.max_new_tokens)
            row = {"method": run.method, "pathway": name, **summary(found["test"], seconds),
                   "train": summary(found["train"], [])["strict"]}  # fmt: skip
            figures.append(row)
            rows.append({"method": row["method"], "answers through": name, "test % (95 %)": accuracy_text(row),
                         "n": row["n"], "train %": f"{100 * row['train']:.1f}", "passes": f"{row['passes']:.1f}",
                         "ms": f"{row['ms']:.1f}"})  # fmt: skip
    return rows, figures


def main(argv=None):
    with one_line_errors():
        options = read_options(argv)
        rank, world, device = start_processes(options)
        runs = [options] + [dataclasses.replace(options, method=name, out=str(Path(options.out) / name), compare=())
                            for name in options.compare]  # fmt: skip
        if options.compare:
            data.load(options.data, "test", options.seed)  # will be needed at the end: better to fail now
        for one in runs:
            if rank == 0:
                claim(one, describe(one, find_config(one), world))
        if world > 1:
            dist.barrier()  # the others look at the directories only after rank 0 has claimed them
    runs = [*runs[1:], options]
    for one in runs:
        finished = Path(one.out) / "result.json"
        if finished.is_file():  # only where a run is resumed
            result = read_json(finished)
            continue
        with one_line_errors():
            run = prepare(one, device)
            if rank == 0:
                run.method.tokenizer.save(one.out)
        if rank == 0:
            print(f"\n{one.method}: {run.steps} steps of {one.batch_size} of the {len(run.lengths)} problems, {one.out}")
        result = train(run, rank, world, device)
    if rank == 0 and options.compare:
        conclude(options, runs, result, device)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def conclude(options, runs, result, device):
    """Prints the table of a comparison, and leaves it in the run's directory."""
    rows, figures = comparison([one.out for one in runs], options, device)
    text = markdown(rows) + "\n"
    if options.data == "demo":
        chance = data.demo_chance(data.load("demo", "test", options.seed))
        text += f"\nGuessing a remainder is right in {100 * chance:.1f} % of the test problems.\n"
        result = {**result, "chance": chance}
    out = Path(options.out)
    write_atomically(out / "table.md", text)
    write_atomically(out / "result.json", json.dumps({**result, "table": figures}, indent=1) + "\n")
    print(f"\n{text}\nThe run is in {out}, this table in {out / 'table.md'}; python eval.py --ckpt {out} answers with it.")


if __name__ == "__main__":
    main()
