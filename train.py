"""Trains DART, or a method that it is compared with.

    python train.py                                            the built-in task: DART beside No-CoT and PauseFT, minutes
    torchrun --nproc_per_node=8 train.py --preset llama-3.2-1b --model DIR --out DIR

A run directory holds config.json (options, architecture, versions), adapter.safetensors (what was trained) and best.safetensors
(the same, where it was best on the validation split), the tokenizer, log.jsonl, result.json, and of the last checkpoints
checkpoint-STEP.safetensors and .json (all that --resume needs).

Exit codes: 0 done; 1 a fault stopped the training; 2 something given is wrong; 130 and 143 SIGINT and SIGTERM
stopped it, after saving.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import dart
import data
from dart import option
from data import (Parser, end, one_line_errors, read_json, replacing, run_program, sync, write_atomically,
                  write_json)  # fmt: skip
from eval import (DTYPES, RunOptions, check_room, check_vocabulary, compare_runs, digest, evaluate_pathway, load_run, parse_options,
                  pick_device, read_run, suite_table, tensors_digest)  # fmt: skip
from eval import Options as EvalOptions
from model import MODELS, ModelConfig, Transformer

# ----------------------------------------------------------------------------------------------------------- options


MOST_STEPS = 99_999_999  # the names of checkpoints have eight digits


@dataclass
class Options(RunOptions):
    """The defaults are those of Llama-3.2-1B: the paper's, and CODI's (Shen et al. 2025) where the paper says nothing."""

    preset: str = option("demo", "recipe; every option that is given replaces the recipe's")
    tokenizer: str = option("", "directory of the tokenizer, if not the model's, or 'demo', the built-in task's")
    out: str = option("", "directory of the run; out/PRESET where it is not given")
    resume: bool = option(False, "continue the run in --out from its last checkpoint")
    overwrite: bool = option(False, "replace the run in --out")
    compare: tuple = option((), "methods trained first with the same options, into folders of --out, for a table")
    suite: str = option("", "a table of the paper: all its rows are trained, into folders of --out, and compared",
                        choices=("", "table1", "table3", "table4", "table5", "figure2"))  # fmt: skip
    seeds: int = option(1, "seeds for each row of the suite, counted up from --seed", low=1, high=1000)
    jobs: int = option(1, "runs of a comparison or a suite trained side by side on a CPU; 0: one a core")
    test_data: tuple = option((), "data sets that the rows of the suite are compared on; none: --data")
    epochs: int = option(10, "passes over the training data", low=1, high=10**6)
    steps: int = option(0, "optimizer steps; 0: as many as --epochs take", high=MOST_STEPS)
    batch_size: int = option(128, "problems in an optimizer step, over all processes", low=1)
    micro_batch_size: int = option(0, "problems in a forward pass of a process; 0: all of its share")
    activation_checkpointing: bool = option(False, "keep only the input of each layer for the backward pass, and compute the rest "
                                            "anew there: less memory, more time (passes without continuous thoughts)")  # fmt: skip
    compile: bool = option(False, "torch.compile of the layers (passes without continuous thoughts)")
    plain: bool = option(False, "train without the shortcuts that save time and memory (on a CPU, dropout draws other numbers)")
    lr: float = option(8e-4, "highest learning rate: linear warm-up, then a cosine to 0, or constant")
    schedule: str = option("cosine", "of the learning rate after warm-up", choices=("cosine", "constant"))
    warmup: float = option(0.03, "share of the steps that warm up", high=1)
    weight_decay: float = option(0.1, "AdamW's, on matrices only")
    beta2: float = option(0.999, "AdamW's", high=0.99999)
    grad_clip: float = option(2.0, "largest norm of the gradient; 0: no limit")
    eval_every: int = option(0, "steps between evaluations on the validation split; 0: once an epoch")
    eval_size: int = option(500, "largest number of validation problems; 0: none, for data without a validation split")
    log_every: int = option(10, "steps between lines of the log", low=1)
    save_every: int = option(500, "steps between checkpoints", low=1)
    save_minutes: float = option(10.0, "also save when the last checkpoint is this many minutes old; 0: never")
    keep_checkpoints: int = option(2, "number of latest checkpoints to keep", low=1)
    skip_nonfinite: int = option(0, "number of steps with a non-finite loss or gradient to leave out before such a step ends the run")
    device: str = option("auto", "cpu, cuda, or auto", choices=("auto", "cpu", "cuda"))


PRESETS = {
    "llama-3.2-1b": dict(epochs=10, lr=8e-4, epochs_per_stage=2.0),  # Coconut's stages must fit into the epochs
    "llama-3.2-3b": dict(epochs=10, lr=5e-4, epochs_per_stage=2.0),
    "qwen2.5-1.5b": dict(epochs=10, lr=5e-4, epochs_per_stage=2.0),
    "gpt2": dict(epochs=40, lr=2e-3),
    # The built-in task trains all weights of a tiny model from scratch: there is nothing pretrained to freeze.
    "demo": dict(model="demo", tokenizer="demo", data="demo", random_init=True, compare=("no-cot", "pause"), jobs=0, steps=1500,
                 batch_size=64, lr=3e-3, weight_decay=1.0, beta2=0.98, grad_clip=1.0, dtype="fp32", lora_rank=0,
                 rem_rank=32, n_st=4, n_thoughts=4, max_stage=2, epochs_per_stage=12.0, removal_per_epoch=0.3,
                 remove_all_beyond=14, distill_weight=5.0, eval_every=500, max_new_tokens=24, save_every=500, log_every=50),
}  # fmt: skip
METHOD_PRESETS = {  # what a method has of its own in a recipe
    ("gpt2", "codi"): dict(lr=3e-3, distill_weight=1.0),
    ("demo", "codi"): dict(distill_weight=20.0),
    ("demo", "coconut"): dict(lr=1e-3),
    ("demo", "icot"): dict(lr=2e-3),
}


SUITES = {  # table of the paper -> row -> the options that make it
    "table1": {"CoT": dict(method="cot"), "Coconut": dict(method="coconut"), "CODI": dict(method="codi"),
               "No-CoT": dict(method="no-cot"), "iCoT": dict(method="icot"), "PauseFT": dict(method="pause"), "DART": {}},
    "table3": {"No-CoT": dict(method="no-cot"), "DART": {}, "w/o ST": dict(n_st=0), "w/o REM": dict(rem_rank=0),
               "w/ LoRA-REM": dict(rem_is_lora=True), "w/o L_distill": dict(distill_weight=0.0),
               "w/ L_distill on y_1": dict(distill_at="y_1"), "w/ L_distill on [z_N; Y]": dict(distill_at="z_N+Y")},
    "table4": {"CoT": dict(method="cot"), "No-CoT": dict(method="no-cot"), "DART": {}},
    "table5": {"No-CoT": dict(method="no-cot"), "DART": {}},
    "figure2": {f"C = {n}": dict(n_st=n) for n in (0, 2, 4, 8, 12, 16, 20, 24, 32, 40)},
}  # fmt: skip
PAPER = {  # (table, preset, data set) -> the paper's accuracies in % and times in ms (an A10), in the order of the rows
    ("table1", "llama-3.2-1b", "gsm8k-aug"): ([58.8, 50.6, 55.6, 32.5, 19.0, 32.1, 42.6], [425, 390, 143, 36, 36, 37, 37]),
    ("table1", "llama-3.2-1b", "gsm-hard"): ([13.4, 11.2, 12.8, 7.1, 4.4, 7.3, 10.9], [477, 483, 153, 57, 57, 60, 60]),
    ("table1", "llama-3.2-1b", "svamp"): ([59.9, 53.1, 61.1, 40.6, 40.9, 40.4, 50.5], [227, 181, 141, 34, 34, 35, 35]),
    ("table1", "llama-3.2-1b", "multiarith"): ([97.2, 96.5, 96.1, 61.3, 39.0, 59.2, 84.8], [218, 217, 132, 33, 33, 33, 33]),
    ("table3", "llama-3.2-1b", "gsm8k-aug"): ([32.5, 42.6, 36.8, 36.2, 40.8, 33.7, 31.5, 33.7], [None] * 8),
    ("table4", "llama-3.2-1b", "prosqa"): ([98.8, 94.0, 99.4], [882, 129, 130]),
    ("table4", "llama-3.2-1b", "commonsenseqa-cot"): ([68.5, 65.4, 75.1], [1471, 34, 34]),
    ("table5", "gpt2", "gsm8k-aug"): ([16.2, 24.7], [18, 19]),
    ("table5", "qwen2.5-1.5b", "gsm8k-aug"): ([33.3, 42.2], [95, 95]),
    ("table5", "llama-3.2-3b", "gsm8k-aug"): ([40.8, 46.6], [62, 62]),
}


def read_options(argv, method=None):
    """Options from the command line, for `method` where it is given; ValueError for what is unknown or contradictory."""
    argv = sys.argv[1:] if argv is None else argv
    given = {word.partition("=")[0] for word in argv}
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo")
    first.add_argument("--method", default="dart")
    preset, asked = vars(first.parse_known_args(argv)[0]).values()
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    recipe = PRESETS[preset] | METHOD_PRESETS.get((preset, method or asked), {})
    options = parse_options(Options, argv, __doc__, {"preset": preset, **recipe})
    options.method = method or options.method
    if "--epochs" in given and "--steps" not in given:
        options.steps = 0
    options.out = options.out or f"out/{preset}" + f"-{options.suite}" * bool(options.suite)
    if options.random_init and not options.model:
        options.model = preset
    if preset == "demo" and options.model != "demo":
        raise ValueError("--model goes with the recipe of a pretrained model, such as --preset llama-3.2-1b")
    if not options.model:
        raise ValueError("--model DIR is missing: the base model (or --random_init, for its shape alone)")
    if options.data not in ("demo", *data.DATASETS) and not Path(options.data).is_dir():
        raise ValueError(f"--data {options.data}: neither a directory nor one of demo, {', '.join(data.DATASETS)}")
    if unknown := [name for name in options.compare if name not in dart.METHODS or options.compare.count(name) > 1]:
        raise ValueError(f"--compare {unknown[0]}: each once, of {', '.join(dart.METHODS)}")
    if options.suite and ("--method" in given or options.compare and "--compare" in given or options.overwrite):
        raise ValueError("--suite goes with neither --method, --compare nor --overwrite; it continues what is there")
    if not options.suite and (options.seeds > 1 or options.test_data):
        raise ValueError("--seeds and --test_data go with --suite")
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite contradict each other")
    for name in ("model", "tokenizer", "data", "data_dir"):  # the run must find them again, from wherever it is evaluated
        value = getattr(options, name)
        if value and Path(value).is_dir() and not (name == "data" and value in ("demo", *data.DATASETS)):
            setattr(options, name, str(Path(value).resolve()))
    return options


# ------------------------------------------------------------------------------------------------- processes, folders


PATIENCE = timedelta(minutes=10)  # so long a process waits for the others


def start_processes(options):
    """(rank, number of processes, device). Under torchrun each process takes the GPU of its local rank."""
    device, rank, world = pick_device(options.device), 0, 1
    if "RANK" in os.environ:
        if device == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local >= torch.cuda.device_count():  # which other processes of this machine do not meet
                end(f"a process for GPU {local}, but there are {torch.cuda.device_count()} on this machine", 2)
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=torch.device(device), **meeting_point())
        else:
            dist.init_process_group("gloo", **meeting_point())
        rank, world = dist.get_rank(), dist.get_world_size()
    if options.batch_size % world:
        raise ValueError(f"--batch_size {options.batch_size} is not a multiple of the {world} processes")
    return rank, world, device


def meeting_point():
    """Where the processes find each other. torchrun may reuse a store over its restarts, with the addresses of dead processes in it; hence
    the prefix."""
    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # the torchruns of several machines count their restarts each by itself
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return dict(store=store, rank=rank, world_size=world, timeout=PATIENCE)


LOCK = ".lock"
CHECKPOINTS = ("checkpoint-????????.safetensors", "checkpoint-????????.json")
# The files of a run beside config.json, which says what they are.
RUN_FILES = ("adapter.safetensors", "best.safetensors", "log.jsonl", "result.json", "test.json", "table.md", "words.json",
             "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "merges.txt",
             *CHECKPOINTS)  # fmt: skip
TRAIN_SAMPLE = 500  # so many training problems are answered for the table of a comparison
# Options that may differ between a run and its resumption: they change no loss, but for rounding (and micro_batch_size LoRA's dropout).
FREE_TO_CHANGE = ("out", "resume", "overwrite", "compare", "device", "data_dir", "suite", "seeds", "jobs", "test_data",
                  "activation_checkpointing", "micro_batch_size", "save_every", "save_minutes", "keep_checkpoints", "skip_nonfinite")
ELSEWHERE = ("preset", "model", "tokenizer", "data")  # may be elsewhere: what is in them must be the same


def check_out(options):
    """Raises ValueError unless options.out is new, empty (but for the folders of --compare), or a run that may be resumed
    or overwritten. Writes nothing."""
    out, inside = Path(options.out), set()
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"--out {out}: is not a directory")
        inside = {path.name for path in out.iterdir()} - {*options.compare, "config.json.tmp", LOCK}
    if not inside:
        return
    try:
        read_run(out)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--out {out}: holds something, but no run of train.py ({error})") from None
    if not options.resume and not options.overwrite:
        raise ValueError(f"--out {out}: holds a run already; --resume continues it, --overwrite replaces it")
    theirs, ours = read_json(out / "config.json")["options"], json.loads(json.dumps(dataclasses.asdict(options)))
    theirs = json.loads(json.dumps(dataclasses.asdict(Options()))) | theirs  # what an older run does not name was so
    changed = [name for name in ours if name not in FREE_TO_CHANGE and ours[name] != theirs[name]]
    if options.resume and changed:
        listed = ", ".join(f"--{name} {theirs[name]!r} (now {ours[name]!r})" for name in changed)
        raise ValueError(f"--resume: the run in {out} was started with {listed}")


def continue_after_restart(options, rank, device):
    """Where torchrun has started its processes anew, the run that they had begun is continued, whatever the command says. Rank 0 knows it (not
    by the count of restarts: of several machines each counts its own)."""
    begun = False
    if rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(ValueError, AttributeError, OSError):  # `check_out` will name what is wrong
            begun = read_json(Path(options.out) / "config.json").get("started_by") == started_by()
    if dart.all_reduce(torch.tensor(int(begun), device=device), dist.ReduceOp.MAX):
        options.resume, options.overwrite = True, False


def started_by():
    """What a torchrun's processes have in common, on one machine: when its own was started, too, for numbers of processes come again."""
    began = ""
    with contextlib.suppress(OSError):
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}, process {os.getppid()} {began} {os.environ.get('TORCHELASTIC_RUN_ID', '')}".strip()


def lock(out):
    """Creates the directory if needed, and locks it until the returned handle is closed. ValueError if another process holds it."""
    out = Path(out)
    new = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    for path in new:
        with contextlib.suppress(OSError):
            sync(path.parent)
    handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # NFS locks only what may be written to
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
            return handle
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise
        raise ValueError(f"--out {out}: another process is training in it") from None
    return handle


def claim(run, world):
    """Takes the directory for this run, after `prepare` and `lock`: nothing old is deleted before. Interrupted anywhere, it leaves a
    directory that can still be resumed or overwritten."""
    options, out = run.options, Path(run.options.out)
    check_out(options)
    if options.resume and max(saved_steps(out), default=0) != run.progress.step:
        raise ValueError(f"--out {out}: another process has trained in it meanwhile")
    config, about = out / "config.json", describe(run, world)
    if not options.resume or not config.is_file():
        with replacing(config) as temporary:  # it is on the disk before anything is given up for it
            temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            for path in files_of(out, RUN_FILES):
                path.unlink()
    elif (before := read_json(config).get("versions")) != about["versions"]:
        print(f"{out} was begun with {before}, this is {about['versions']}: rounding may differ", flush=True)
    run.method.tokenizer.save(out)


def files_of(out, names):
    """The files of these names in a directory, half-written ones too."""
    return [path for name in names for end in ("", ".tmp") for path in Path(out).glob(name + end)]


def describe(run, world):
    """config.json: all that says what this run is."""
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git here, or no repository
        here = Path(__file__).parent
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, stderr=subprocess.DEVNULL, text=True).strip()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    config = dataclasses.asdict(run.method.model.config)
    return {"options": dataclasses.asdict(run.options), "model_config": config,
            "versions": versions, "commit": commit, "processes": world, "started_by": started_by()}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- checkpoints


@dataclass
class Progress:
    """How far a run is. With weights and optimizer state it is all that the rest depends on, for learning rate, data position and
    random numbers (seeded at each step) are functions of the step."""

    step: int = 0
    optimizer_step: int = 0  # since the optimizer started anew
    skipped: int = 0  # steps that were left out, as their loss was not finite
    best: float = -1.0  # the best accuracy on the validation split so far
    tokens: int = 0  # useful ones, of all processes
    seconds: float = 0.0  # of training
    flops: dict = field(default_factory=dict)  # pathway -> floating-point operations


def save_tensors(tensors, path, step, **about):
    """A safetensors file, with the step and other facts in its header, that is there as a whole or not at all. OSError where it cannot be
    written."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {"about": json.dumps({"step": step, **about})})  # one entry: their order is not fixed
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from None


def identity(method, problems, valid, options):
    """What a checkpoint is of, {field: value}: it is taken up by no other run."""
    files = [] if options.random_init else sorted(Path(options.model).glob("*.safetensors"))
    same = {name: value for name, value in dataclasses.asdict(options).items() if name not in (*FREE_TO_CHANGE, *ELSEWHERE)}
    digests = {"base weights": digest(block for path in files for block in blocks(path)),
               "tokenizer": digest(f"{name} {content}".encode() for name, content in method.tokenizer.files.items()),
               "data": digest(repr(problem).encode() for problem in problems),
               "validation data": digest(repr(problem).encode() for problem in valid)}  # fmt: skip
    config, adapters = map(dataclasses.asdict, (method.model.config, method.model.adapters))
    return json.loads(json.dumps({**same, **config, **adapters, **digests}))


def blocks(path):
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        yield from iter(partial(file.read, 2**20), b"")


def checkpoint_path(out, step):
    return Path(out) / f"checkpoint-{step:08d}.json"


def saved_steps(out):
    """The steps of the checkpoints in a directory: those whose .json is there."""
    names = (re.fullmatch(r"checkpoint-(\d{8})\.json", path.name) for path in Path(out).glob("checkpoint-*") if path.is_file())
    return sorted(int(name[1]) for name in names if name)


def save_checkpoint(run):
    """adapter.safetensors, checkpoint-STEP.safetensors (weights and optimizer state), and then the .json that makes it one: progress, what
    run it is of, and the checksum of both. Older ones go. OSError where it cannot be written: then the others are still there."""
    out, progress, state = Path(run.options.out), run.progress, run.optimizer.state
    tensors = dict(run.method.model.adapter_state(run.options.complete))
    save_tensors(tensors, out / "adapter.safetensors", progress.step, sha256=tensors_digest(tensors))
    for name, parameter in run.method.model.named_parameters():
        if parameter in state:
            tensors |= {f"{moment}.{name}": state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")}
            progress.optimizer_step = int(state[parameter]["step"])
    path = checkpoint_path(out, progress.step)
    path.unlink(missing_ok=True)
    save_tensors(tensors, path.with_suffix(".safetensors"), progress.step)
    content = {**dataclasses.asdict(progress), "run": run.identity}
    write_json(path, {"checksum": checksum(path, content), **content})
    kept = saved_steps(out)[-run.options.keep_checkpoints :]
    for old in files_of(out, CHECKPOINTS):
        if not old.name.startswith(tuple(f"checkpoint-{step:08d}." for step in kept)):
            old.unlink()


def checksum(path, content):
    return digest([json.dumps(content, sort_keys=True).encode(), *blocks(path.with_suffix(".safetensors"))])


def read_checkpoint(path):
    """(Progress, what run it is of) of a checkpoint-STEP.json and the tensors beside it. ValueError unless both are whole."""
    try:
        content = read_json(path)
        if content.pop("checksum") != checksum(path, content):
            raise ValueError("its checksum is another")
        owner, progress, fresh = dict(content.pop("run")), Progress(**content), vars(Progress())
        odd = [name for name, value in vars(progress).items() if type(value) is not type(fresh[name])]
        if odd or not all(type(value) is float for value in progress.flops.values()):
            raise ValueError(f"{(odd or ['flops'])[0]} is not what it must be")
        return progress, owner
    except (KeyError, TypeError, AttributeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"{path}: damaged, or not all there ({error})") from None


def is_whole(path):
    with contextlib.suppress(ValueError):
        return bool(read_checkpoint(path))
    return False


@torch.no_grad()
def load_checkpoint(run):
    """Takes up the newest checkpoint in the run's directory, where there is one. ValueError where it is damaged (with the newest whole
    one's name) or of another run (with what differs)."""
    steps = saved_steps(run.options.out)
    if not steps:
        return
    path, *others = (checkpoint_path(run.options.out, step) for step in reversed(steps))
    try:
        progress, owner = read_checkpoint(path)
    except ValueError as error:
        whole = next(filter(is_whole, others), None)
        how = f"{whole.name} is whole: without the damaged one --resume goes on from there" if whole else \
              "there is no other: --overwrite starts anew"  # fmt: skip
        raise ValueError(f"{error}; {how}") from None
    if differing := [name for name in run.identity | owner if run.identity.get(name) != owner.get(name)]:
        listed = ", ".join(f"{name} {owner.get(name)!r} (here {run.identity.get(name)!r})" for name in differing)
        raise ValueError(f"{path}: is of another run: {listed}")
    if progress.step != steps[-1] or progress.flops.keys() != run.progress.flops.keys():
        raise ValueError(f"{path}: is of step {progress.step}, and of {', '.join(progress.flops)}")
    try:
        with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
            for name, parameter in run.method.model.named_parameters():
                if parameter.requires_grad or name in file.keys():
                    parameter.copy_(_like(parameter, file.get_tensor(name)))
                if parameter.requires_grad and progress.optimizer_step:
                    moments = {m: _like(parameter, file.get_tensor(f"{m}.{name}")) for m in ("exp_avg", "exp_avg_sq")}
                    since = torch.tensor(float(progress.optimizer_step), device=parameter.device)
                    run.optimizer.state[parameter] = {"step": since, **moments}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path.with_suffix('.safetensors')}: not the tensors of this run ({error})") from None
    run.progress = progress


def _like(parameter, tensor):
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise ValueError(f"{tensor.dtype} {list(tensor.shape)} in the place of {parameter.dtype} {list(parameter.shape)}")
    return tensor.to(parameter.device)


# ---------------------------------------------------------------------------------------------- faults and signals


class Halt(Exception):
    """The end of a training before its last step, in one line. code: the program's exit code; own: is it this process's alone?"""

    def __init__(self, text, code=1, own=False):
        super().__init__(text, code, own)
        self.code, self.own = code, own

    def __str__(self):
        return self.args[0]


RECEIVED = []  # signals, in this process


def asked_to_stop():
    """The signal that asks this process to stop, 0 where there is none. A run beside others also stops when their common parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        return int(signal.SIGTERM)
    return int(RECEIVED[0]) if RECEIVED else 0


@contextlib.contextmanager
def heed_signals(also=None):
    """Within, SIGTERM and SIGINT are only noted, for the step to be finished and saved; a second SIGINT ends at once, also where Python
    waits for something else. also: is called with the number of each."""

    def note(number, _):
        if also is not None:
            also(number)
        elif number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGINT and number in RECEIVED:
            raise KeyboardInterrupt
        RECEIVED.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


NO_MEMORY = "DefaultCPUAllocator|out of memory|ALLOC_FAILED|Cannot allocate memory"


def explain(error, rank, world):
    """A fault of the machine as a Halt; any other error itself."""
    if isinstance(error, Halt):
        return error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(NO_MEMORY, str(error)):
        return Halt("out of memory: a smaller --micro_batch_size or --activation_checkpointing need less, also with --resume, which goes "
                    "on from the last checkpoint", own=True)  # fmt: skip
    if isinstance(error, OSError):
        return Halt(f"{error}; --resume goes on from the last checkpoint", own=True)
    if world > 1 and (isinstance(error, dist.DistError) or re.search("gloo|nccl|connection|timed out", str(error), re.IGNORECASE)):
        return Halt(f"process {rank} has lost the others of this run: one has ended, or did not answer in time ({error}); --resume, or "
                    f"torchrun with --max-restarts, goes on from the last checkpoint", own=True)  # fmt: skip
    return error


# ---------------------------------------------------------------------------------------------------------- training


def build(options, device):
    """The training method around its model."""
    cls, tokenizer = dart.METHODS[options.method], find_tokenizer(options)
    adapters = cls.adapters(tokenizer, options)
    torch.manual_seed(options.seed)
    compute = DTYPES[options.dtype]
    dtype = compute if options.lora_rank else torch.float32  # weights that are trained are held in fp32
    if options.random_init:
        known = options.model in MODELS and not Path(options.model).is_dir()
        config = MODELS[options.model] if known else ModelConfig.from_pretrained(options.model)
        model = Transformer(config, adapters, dtype, device, compute)
    else:
        model = Transformer.from_pretrained(options.model, adapters, dtype, device, compute)
    check_vocabulary(tokenizer, model)
    model.activation_checkpointing = options.activation_checkpointing
    if options.plain:
        model.be_plain()
    if options.compile:
        model.compile()
    return cls(model, tokenizer, options)


def load(options, split):
    return data.load(options.data, split, options.seed, options.data_dir)


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
    if options.schedule == "constant":
        return options.lr
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def make_optimizer(model, options):
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, options.beta2), fused=True)


def train_step(wrapped, method, micro_batches, share):
    """The gradients of one optimizer step. Returns {name: loss}, this process's mean over its `share` rows.

    wrapped: the method, or DDP around it, which averages the gradients over the processes in the last pass."""

    seeds = {id(batch): micro.seed for micro in micro_batches for batch in micro.batches.values()}

    def run_pass(name, batch, *more, sync):
        torch.manual_seed(seeds[id(batch)])
        with contextlib.nullcontext() if sync or wrapped is method else wrapped.no_sync():
            return wrapped(name, batch, *more)

    totals = {}
    for micro, losses in method.passes(run_pass, micro_batches):
        part = micro.rows / share
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
        accuracies[name] = dart.all_reduce(right).item() / len(problems)
    return accuracies


STATUS = Path("/proc/self/status")  # where Linux has a peak that can be set back


def reset_peak_memory(device):
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif STATUS.is_file():
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes: of the GPU's memory, or of the whole process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    if STATUS.is_file():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def kept_of(line, step):
    """Is a line of log.jsonl of a step up to this one, and not this one's validation? False for what is no such line, as the last of an
    interrupted run may be."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        record = json.loads(line)
        return 0 <= int(record["step"]) <= step and not (record["step"] == step and "valid" in record)
    return False


class Log:
    """log.jsonl, and one line on the screen: live on a terminal, one after the other elsewhere, and with its label where there are
    other runs beside. Rank 0 alone writes."""

    def __init__(self, path, rank, step, label):
        """Keeps the lines up to `step`, except that step's validation, which is repeated."""
        self.path, self.rank, self.label, self.live = path, rank, label and f"{label}: ", sys.stdout.isatty() and not label
        self.pending, self.size = b"", 0  # what could not be written yet, behind so many bytes
        if rank == 0:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if step and path.is_file() else []
            write_atomically(path, "".join(f"{line}\n" for line in lines if kept_of(line, step)))
            self.size = path.stat().st_size

    def write(self, record, text, done=False):
        """A line for the file, and one for the screen, which the next one replaces unless it is `done`."""
        if self.rank == 0:
            self.pending += f"{json.dumps(record)}\n".encode()
            try:
                with open(self.path, "ab") as file:
                    file.truncate(self.size)  # what a full disk took of a line
                    file.write(self.pending)
                self.size, self.pending = self.size + len(self.pending), b""
            except OSError as error:
                self.show(f"not in the log: {error}")
            self.show(text, done)

    def sync(self):
        """Before a checkpoint: a resumed run does not make the lines before it again."""
        with contextlib.suppress(OSError):
            sync(self.path)

    def show(self, text, done=True):
        if self.rank == 0 and not self.live:
            print(f"{self.label}{text}\n", end="", flush=True)  # one write, whatever other runs write meanwhile
        elif self.rank == 0:  # a line that were wider than the terminal could not be replaced by the next
            text = text if done else text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{text}", end="\n" if done else "", flush=True)


class Meter:
    """Speed, padding and memory of the training; padding and memory since the start or the resumption."""

    def __init__(self, run, device):
        self.run, self.device, self.began = run, device, time.perf_counter() - run.progress.seconds
        self.mine = self.padded = 0
        reset_peak_memory(device)

    @contextlib.contextmanager
    def pause(self):
        """What goes on within is no training time."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        self.run.progress.seconds = before - self.began
        yield
        self.began += time.perf_counter() - before

    def count(self, micro_batches, world):
        progress = self.run.progress
        for micro in micro_batches:
            self.mine += micro.tokens
            progress.tokens += micro.tokens * world  # the other processes' rows are of about the same lengths
            self.padded += sum(batch.ids.numel() for batch in micro.batches.values())
            for name, flops in micro.flops.items():
                progress.flops[name] += flops * world

    def totals(self):
        seconds = time.perf_counter() - self.began
        return {"seconds": seconds, "tokens_per_s": self.run.progress.tokens / seconds, "peak_memory": peak_memory(self.device),
                "padding": 1 - self.mine / max(self.padded, 1)}  # fmt: skip

    def record(self, losses, norm, lr):
        """(dictionary for log.jsonl, line for the screen)"""
        totals, step, steps = self.totals(), self.run.progress.step, self.run.steps
        left = totals["seconds"] / step * (steps - step)
        text = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        text = (f"step {step}/{steps}  {text}  lr {lr:.1e}  |g| {norm:.2f}  {totals['tokens_per_s']:,.0f} tokens/s  "
                f"padding {100 * totals['padding']:.1f} %  peak {totals['peak_memory'] / 2**30:.2f} GiB  "
                f"left {left // 60:.0f}:{left % 60:02.0f}")  # fmt: skip
        return {"step": step, **losses, "lr": lr, "grad_norm": norm, **totals}, text


@dataclass
class Run:
    """What `prepare` makes ready and `train` uses."""

    options: Options
    method: dart.Method
    optimizer: torch.optim.Optimizer
    problems: list  # to train on
    rows: dict  # pathway -> list of Row, one for each of them, at the first stage
    lengths: np.ndarray  # [N, P] tokens of these rows
    valid: list
    steps: int
    per_epoch: int  # steps
    identity: dict
    progress: Progress


def prepare(options, device):
    """Loads everything, and takes up the last checkpoint. Raises ValueError or OSError for what a user can mend; writes
    nothing."""
    train, valid = load(options, "train"), []
    if options.eval_size:
        try:
            valid = load(options, "valid")[: options.eval_size]
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{error} (--eval_size 0 trains without validation)") from None
    if len(train) < options.batch_size:
        raise ValueError(f"--batch_size {options.batch_size}: there are only {len(train)} problems to train on")
    method, per_epoch = build(options, device), len(train) // options.batch_size
    steps = options.steps or options.epochs * per_epoch
    if steps > MOST_STEPS:
        raise ValueError(f"--epochs {options.epochs}: {steps} steps, more than {MOST_STEPS}")
    stage, last = method.stage(0, per_epoch), method.stage(steps - 1, per_epoch)
    if last not in (None, dart.ALL):
        raise ValueError(f"--method {options.method}: after {steps} steps ({steps / per_epoch:.1f} epochs) a part of the CoT "
                         f"would still be there (stage {last}): more steps, or a faster schedule")  # fmt: skip
    rows = {name: [method.training_pathway(name, stage, 0.0).row(problem, method.tokenizer) for problem in train]
            for name in method.pathways}  # fmt: skip
    lengths = np.array([[len(row.ids) for row in some] for some in rows.values()]).T
    longest = lengths.max()
    if thinking := [row for some in rows.values() for row in some if row.start]:  # padding may stand behind all rows (`dart.think`)
        later = max(pathway.thoughts for pathway in method.pathways.values()) if stage is not None else 0
        longest = max(longest, max(row.start for row in thinking) + max(len(row.ids) - row.start for row in thinking) + later)
    if longest > method.model.config.max_position_embeddings:
        raise ValueError(f"--data {options.data}: a row needs {longest} positions, but the model has "
                         f"{method.model.config.max_position_embeddings} positions")  # fmt: skip
    asked = valid
    if options.compare:
        asked = asked + train[:TRAIN_SAMPLE] + load(options, "test")
    for name in options.test_data:
        asked = asked + data.load(name, "test", options.seed, options.data_dir)
    check_room(method, asked, options.max_new_tokens)
    optimizer = make_optimizer(method.model, options)
    progress = Progress(flops=dict.fromkeys(method.pathways, 0.0))
    run = Run(options, method, optimizer, train, rows, lengths, valid, steps, per_epoch, identity(method, train, valid, options), progress)
    if options.resume:
        load_checkpoint(run)
    return run


class Micro(NamedTuple):
    """A forward pass's share of a global batch."""

    batches: dict  # pathway -> Batch
    seed: int  # of dropout
    rows: int
    tokens: int  # useful ones, of all pathways
    flops: dict  # pathway -> what it costs


def global_batches(run, first):
    """The global batches, each an index array, from step `first` on to the last."""
    for epoch in range(first // run.per_epoch, math.ceil(run.steps / run.per_epoch)):
        batches = data.epoch_batches(run.lengths, run.options.batch_size, run.options.seed, epoch)
        start = epoch * run.per_epoch
        yield from batches[max(first - start, 0) : run.steps - start]


def stage_of(run, step):
    """The method's stage. Steps are counted from 1 here, from 0 in `Method.stage`."""
    return run.method.stage(step - 1, run.per_epoch)


def make_micro_batches(run, step, batch, rank, world, device):
    """This process's rows of a global batch, cut into forward passes: list of Micro. As far as these are the same rows on another number
    of processes, so are their random numbers."""
    method, stage, share = run.method, stage_of(run, step), len(batch) // world
    draws = np.random.default_rng((run.options.seed, step, 1)).random(len(batch))
    size, pad, micro_batches = run.options.micro_batch_size or share, method.tokenizer.eos_id, []
    for start in range(rank * share, (rank + 1) * share, size):
        chosen = slice(start, min(start + size, (rank + 1) * share))
        batches, tokens, flops = {}, 0, {}
        for name, rows in run.rows.items():
            some = [rows[i] for i in batch[chosen]]
            if stage is not None:
                pathways = [method.training_pathway(name, stage, draw) for draw in draws[chosen]]
                some = [pathway.row(run.problems[i], method.tokenizer) for pathway, i in zip(pathways, batch[chosen], strict=True)]
            lengths, learned = [len(row.ids) for row in some], sum(len(row.ids) - row.z for row in some)
            batches[name] = data.collate(some, pad).to(device)
            tokens += sum(lengths)
            flops[name] = method.model.training_flops(lengths, learned, method.pathways[name].silent)
        seed = int(np.random.SeedSequence((run.options.seed, step, start)).generate_state(1)[0])
        micro_batches.append(Micro(batches, seed, len(some), tokens, flops))
    return micro_batches


def train(run, rank, world, device, label=""):
    """The training loop. Leaves the run's files behind; returns what result.json says. Raises Halt where it ends before its last step."""
    options, method, optimizer, out, progress = run.options, run.method, run.optimizer, Path(run.options.out), run.progress
    # else DDP orders its buckets anew after the first step, and a resumed run of three or more processes would add up in another order
    wrapped = DistributedDataParallel(method, find_unused_parameters=True) if world > 1 else method
    parameters = [p for p in method.parameters() if p.requires_grad]
    log, meter, saved = Log(out / "log.jsonl", rank, progress.step, label), Meter(run, device), progress.step
    tried = time.monotonic()  # when a checkpoint was last written, or should have been
    best = {}  # the best accuracy so far, where it could not be written yet: (step, its weights)
    eval_every = options.eval_every or run.per_epoch

    def evaluation():
        if not run.valid:
            return {}
        with meter.pause():
            accuracies = validate(method, run.valid, options, rank, world)
            text = "  ".join(f"{name} {100 * share:.1f} %" for name, share in accuracies.items())
            log.write({"step": progress.step, "valid": accuracies}, f"step {progress.step}  validation: {text}", done=True)
            accuracy = accuracies[method.answers_through]
            if rank == 0 and accuracy > max([progress.best, *best]):
                best.clear()
                best[accuracy] = progress.step, {name: p.cpu().clone() for name, p in method.model.adapter_state(options.complete).items()}
            save_best()
        return accuracies

    def save_best():
        for accuracy, (step, state) in list(best.items()):
            if save("best.safetensors", save_tensors, state, out / "best.safetensors", step, sha256=tensors_digest(state)):
                progress.best = accuracy
                best.clear()

    def save(what, write, *arguments, **more):
        """Writes a file; where that fails, the training goes on until its last step. Returns whether it is there."""
        try:
            write(*arguments, **more)
        except OSError as error:
            if progress.step == run.steps:
                raise Halt(f"{what} could not be written ({error}); --resume goes on from step {saved}", own=True) from None
            log.show(f"step {progress.step}: {what} could not be written ({error}); going on, and --resume would from step {saved}")
            return False
        return True

    if progress.step and progress.step % eval_every == 0 and progress.step < run.steps:
        evaluation()  # for what came after the checkpoint is lost
    for step, batch in enumerate(global_batches(run, progress.step), progress.step + 1):
        micro_batches = make_micro_batches(run, step, batch, rank, world, device)
        if step > 1 and stage_of(run, step) != stage_of(run, step - 1):
            optimizer.state.clear()
            progress.optimizer_step = 0
        if step == 1:
            log.show("the first problem of the first batch: each token, and what it weighs in the loss")
            for name, some in run.rows.items():
                log.show(f"{name}\n{data.picture(some[batch[0]], method.tokenizer)}")
        losses = train_step(wrapped, method, micro_batches, len(batch) // world)
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.grad_clip or math.inf)
        finite = bool(torch.stack([norm, *losses.values()]).isfinite().all())
        flags = torch.tensor([asked_to_stop(), not finite], device=device)  # of all processes
        stop, bad = dart.all_reduce(flags, dist.ReduceOp.MAX).tolist()
        if bad:
            text = f"step {step}: a loss or the gradient is not finite ({'  '.join(f'{k} {v:.3g}' for k, v in losses.items())}  |g| " \
                   f"{norm:.3g}), problems {' '.join(map(str, batch))} (the first one is 0)"  # fmt: skip
            if progress.skipped == options.skip_nonfinite:
                raise Halt(f"{text}; nothing of it was saved, --resume goes on from step {saved}")
            progress.skipped += 1
            log.write({"step": step, "skipped": batch.tolist()}, f"{text}: left out", done=True)
        else:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step - 1, run.steps)
            optimizer.step()
        optimizer.zero_grad()
        progress.step = step
        meter.count(micro_batches, world)
        last = step == run.steps
        if not bad and (step % options.log_every == 0 or last):
            losses = {name: dart.all_reduce(loss).item() / world for name, loss in losses.items()}
            log.write(*meter.record(losses, norm.item(), optimizer.param_groups[0]["lr"]))
        old = options.save_minutes and time.monotonic() - tried > 60 * options.save_minutes
        due = step % options.save_every == 0 or (run.valid and step % eval_every == 0)  # an evaluation may take long
        if rank == 0 and (due or old or stop or last):
            with meter.pause():
                if not all(p.isfinite().all() for p in parameters):
                    raise Halt(f"step {step}: a weight is not finite after it; nothing of it was saved, --resume goes on from step {saved}",
                               own=True)  # fmt: skip
                save_best()
                log.sync()
                saved, tried = step if save("the checkpoint", save_checkpoint, run) else saved, time.monotonic()
        if stop:
            raise Halt(f"{signal.Signals(stop).name} after step {step}; --resume goes on from step {saved}", 128 + stop)
        if step % eval_every == 0 and not last:
            evaluation()
    result = {"method": options.method, "steps": run.steps, **meter.totals(), "flops": progress.flops,
              "valid": evaluation(), "skipped": progress.skipped,
              "trained_parameters": sum(p.numel() for p in parameters)}  # fmt: skip
    if rank == 0:
        save("result.json", write_json, out / "result.json", result)
    return result


def conclude(options, runs, result, device):
    """The table of a comparison on the test split: printed, and left in the run's directory."""
    out, train, test = Path(options.out), load(options, "train"), load(options, "test")
    text, figures = compare_runs([one.out for one in runs], test, train[:TRAIN_SAMPLE], device)
    if options.data == "demo":
        result = {**result, "chance": data.demo_chance(test)}
        text += f"\nGuessing a remainder is right in {100 * result['chance']:.1f} % of the test problems.\n"
    write_atomically(out / "table.md", text)
    write_json(out / "result.json", {**result, "table": figures})
    print(f"\n{text}\nThe run is in {out}, this table in {out / 'table.md'}; python eval.py --ckpt {out} evaluates it again.")


def suite_runs(options, argv):
    """{row: its runs, one a seed} of a table of the paper. Each has a folder, and goes on where it was stopped."""
    runs = {}
    for row, changes in SUITES[options.suite].items():
        one, folder = read_options(argv, changes.get("method", "dart")), re.sub(r"\W+", "-", row).strip("-")
        runs[row] = [dataclasses.replace(one, **changes, suite="", compare=(), resume=True, seed=seed,
                                         out=str(Path(options.out) / folder / str(seed)))
                     for seed in range(options.seed, options.seed + options.seeds)]  # fmt: skip
    return runs


def evaluated(one, names, device):
    """{data set: figures} of a trained run, through the pathway that it answers through; kept in its test.json."""
    path = Path(one.out) / "test.json"
    figures = read_json(path) if path.is_file() else {}
    if missing := [name for name in names if name not in figures]:
        method, run = load_run(one.out, device=device)
        sets = {name: data.load(name, "test", one.seed, one.data_dir) for name in missing}
        how = EvalOptions(pathway=(method.answers_through,), max_new_tokens=run.max_new_tokens)
        figures |= {row["data"]: row for row in evaluate_pathway(method, method.answers_through, sets, how)[0]}
        write_json(path, figures)
    return figures


def conclude_suite(options, runs, device):
    """The table of a suite for each data set: printed, and left in table.md and table.json of --out."""
    out, names, texts, tables = Path(options.out), options.test_data or (options.data,), [], {}
    figures = {row: [(evaluated(one, names, device), read_json(Path(one.out) / "result.json")) for one in some]
               for row, some in runs.items()}  # fmt: skip
    for name in names:
        paper = PAPER.get((options.suite, options.preset, name), ([None] * len(figures),) * 2)
        rows = {row: ([tested[name] | trained for tested, trained in some], *published)
                for (row, some), *published in zip(figures.items(), *paper, strict=True)}  # fmt: skip
        text, tables[name] = suite_table(rows)
        last = options.seed + options.seeds - 1
        texts.append(f"{options.suite}, {options.preset} on {name}, seeds {options.seed} to {last}\n\n{text}")
    write_atomically(out / "table.md", "\n".join(texts))
    write_json(out / "table.json", tables)
    print("\n" + "\n".join(texts))
    with contextlib.suppress(ImportError):  # Figure 2 as an image, where there is matplotlib
        if options.suite == "figure2":
            draw_figure2(tables, out / "figure2.png")


def draw_figure2(tables, path):
    """Accuracy and time to an answer over C, for each data set."""
    from matplotlib.figure import Figure

    figure = Figure()
    left = figure.subplots()
    right = left.twinx()
    for name, rows in tables.items():
        n_st = [int(row["row"].removeprefix("C = ")) for row in rows]
        spread = [100 * (row["strict_sd"] or 0) for row in rows]
        left.errorbar(n_st, [100 * row["strict"] for row in rows], spread, label=name)
        right.plot(n_st, [row["ms"] for row in rows], linestyle=":")
    left.set(xlabel="C, number of silent tokens", ylabel="accuracy (%)")
    right.set(ylabel="time to an answer (ms, dotted)", ylim=(0, None))
    left.legend()
    figure.savefig(path)


# ------------------------------------------------------------------------------------------------------------ program


def attempt(function, *arguments, rank, world, device):
    """What a function returns. Where it raises ValueError or OSError in any of the processes, all raise Halt, the first of those with its text."""
    result = error = None
    try:
        result = function(*arguments)
    except (ValueError, OSError) as caught:
        error = caught
    failing = int(dart.all_reduce(torch.tensor(world if error is None else rank, device=device), dist.ReduceOp.MIN))
    if failing < world:
        raise Halt(str(error) if rank == failing else "", 2)
    return result


def check_same(run, device):
    """ValueError unless all processes have prepared the same."""
    seen = int(digest([json.dumps([run.identity, run.progress.step, run.steps]).encode()])[:15], 16)
    high, low = dart.all_reduce(torch.tensor([seen, -seen], device=device), dist.ReduceOp.MAX).tolist()
    if high != -low:
        raise ValueError(f"--out {run.options.out}: the processes see different checkpoints, data or weights (this one is at step "
                         f"{run.progress.step}): they need the same files")  # fmt: skip


def begin(run, rank, world):
    """Rank 0 takes the directory; returns the handle of its lock."""
    if rank:
        return None
    handle = lock(run.options.out)
    try:
        claim(run, world)
    except BaseException:
        os.close(handle)
        raise
    print(f"\n{run.options.method}: {run.steps} steps of {run.options.batch_size} of the {len(run.lengths)} problems, "
          f"in {run.options.out}; {run.method.tokenizer}\n", end="", flush=True)  # fmt: skip
    return handle


def result_of(out):
    """What a finished run's result.json says; None where it is not finished. ValueError where that is damaged."""
    path = Path(out) / "result.json"
    if not path.is_file():
        return None
    result = read_json(path)
    if not isinstance(result, dict) or not {"steps", "flops", "valid"} <= result.keys():
        raise ValueError(f"{path}: not the result of a run; without it --resume evaluates the run again")
    return result


def train_one(options, rank, world, device, label=""):
    """Prepares, claims the directory, trains. Returns what result.json says, of a finished run just that; or the Halt that kept it from its
    end."""
    handle, where = None, dict(rank=rank, world=world, device=device)
    try:
        if options.resume and (result := attempt(result_of, options.out, **where)):
            return result
        if stop := asked_to_stop():
            raise Halt(f"{signal.Signals(stop).name} before the start", 128 + stop)
        run = attempt(prepare, options, device, **where)
        attempt(check_same, run, device, **where)
        handle = attempt(begin, run, rank, world, **where)  # when all have read what they need of the directory
        with heed_signals():
            result = train(run, rank, world, device, label)
            if world > 1:
                dist.barrier()
            return result
    except (Halt, OSError, RuntimeError, MemoryError) as error:
        if isinstance(halt := explain(error, rank, world), Halt):
            return halt
        raise
    finally:
        if handle is not None:
            os.close(handle)


def train_side_by_side(runs, out, jobs):
    """Trains runs in `jobs` processes, the last one first, as it takes longest in a comparison; yields what `train_one` returns, in their
    order. They share the cores, and the signals."""

    def pass_on(number):  # the terminal sends SIGINT to all processes, others only to this one
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL if number == signal.SIGINT and number in RECEIVED else signal.SIGTERM)

    threads, context = max(1, torch.get_num_threads() // jobs), multiprocessing.get_context("spawn")
    with heed_signals(pass_on), ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        labels = [one.method if one.out == out else str(Path(one.out).relative_to(out)) for one in runs]
        futures = [pool.submit(train_one, one, 0, 1, "cpu", label) for one, label in zip(runs[::-1], labels[::-1], strict=True)]
        try:
            for result in (future.result() for future in futures[::-1]):
                if RECEIVED and isinstance(result, Halt):
                    result.code = 128 + RECEIVED[0]  # whatever was passed on
                yield result
        except BrokenProcessPool:
            if RECEIVED:
                yield Halt(f"{signal.Signals(RECEIVED[0]).name}; --resume goes on from the last checkpoints", 128 + RECEIVED[0])
            yield Halt("a run was killed, for lack of memory perhaps: with --jobs 1 they go on one after the other, with --resume from "
                       "their last checkpoints")  # fmt: skip
        finally:
            pool.shutdown(cancel_futures=True)


def plan(options, argv, rank, device):
    """(suite: row -> its runs; all runs, in their order), once all that can be known of them before the training is checked."""
    suite = suite_runs(options, argv) if options.suite else {}
    if suite and (Path(options.out) / "config.json").exists():
        raise ValueError(f"--out {options.out}: holds a run; a suite is in a directory of its own")
    beside = [dataclasses.replace(read_options(argv, name), out=str(Path(options.out) / name), compare=())
              for name in options.compare if name != options.method]  # fmt: skip
    runs = [one for seeds in suite.values() for one in seeds] or [*beside, options]
    for name in options.test_data:
        data.load(name, "test", options.seed, options.data_dir)
    for one in runs:
        continue_after_restart(one, rank, device)
        check_out(one)
        if rank == 0 and Path(one.out).is_dir():
            os.close(lock(one.out))  # ValueError where a run of a comparison goes on, before any other is touched
    return suite, runs


def train_all(runs, options, rank, world, device):
    """Trains them; returns the last one's result. Where one has no end, neither has the program."""
    jobs = min(len(runs), options.jobs or torch.get_num_threads()) if device == "cpu" and world == 1 else 1
    one_by_one = (train_one(one, rank, world, device) for one in runs)
    with heed_signals() if world > 1 else contextlib.nullcontext():  # torchrun signals to all when one is lost
        for result in train_side_by_side(runs, options.out, jobs) if jobs > 1 else one_by_one:
            if isinstance(result, Halt):
                if not result.own:  # rank 0 may still be saving
                    leave(world)
                end(result, result.code, show=bool(str(result)) and (rank == 0 or result.own or result.code == 2))
    leave(world)  # without it a process sometimes aborts at its end
    if RECEIVED:
        end(f"{signal.Signals(RECEIVED[0]).name} when all was trained", 128 + RECEIVED[0], show=rank == 0)
    return result


def main(argv=None):
    RECEIVED.clear()
    with contextlib.ExitStack() as held:
        with one_line_errors():
            options = read_options(argv)
            rank, world, device = start_processes(options)
            suite, runs = plan(options, argv, rank, device)
            if suite and rank == 0:
                held.callback(os.close, lock(options.out))
        result = train_all(runs, options, rank, world, device)
        with one_line_errors():
            if rank == 0 and suite:
                conclude_suite(options, suite, device)
            elif rank == 0 and options.compare:
                conclude(options, runs, result, device)


def leave(world):
    """The end of several processes: together, as far as the others are still there."""
    if world > 1:
        with contextlib.suppress(RuntimeError):
            dist.barrier()
            dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
