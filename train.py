"""Trains DART, or a method that it is compared with.

    python train.py                                     the built-in task: DART beside No-CoT and
                                                        PauseFT, minutes
    torchrun --nproc_per_node=8 train.py --preset llama-3.2-1b --model DIR --out DIR
    ... --resume                                        continues a run, or begins it
    ... --suite table1 --seeds 3                        all rows of a table of the paper
    ... --dry_run                                       says what a command would train, and stops

A run directory holds config.json (options, architecture, digests), adapter.safetensors (what was
trained), best.safetensors (the same where it was best on the validation split), the tokenizer,
log.jsonl, result.json, and checkpoint.safetensors, all that --resume needs.

Exit codes: 0 done; 1 a fault stopped the training; 2 something given is wrong; 130 and 143 SIGINT
and SIGTERM stopped it, after saving.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C ends the program without a word while modules are imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "RANK" in os.environ:  # torchrun's: it may be gone when they are
        os.environ["DART_PARENT"] = str(os.getppid())

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import itertools
import json
import math
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP remarks on unused parameters

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import dart
import data
import eval as evaluation
from data import end, option, read_json, write_json, write_text
from model import MODELS, ModelConfig

# ------------------------------------------------------------------------------------- options


@dataclass
class Options(dart.Options):
    """The defaults are those of Llama-3.2-1B: the paper's, and CODI's where it is silent."""

    preset: str = option("demo", "recipe, where nothing is given", lambda: MODELS, group="command")
    out: str = option("", "directory of the run; by default out/PRESET")
    resume: bool = option(False, "continue the run in --out, or begin it")
    overwrite: bool = option(False, "replace the run in --out")
    compare: tuple = option((), "methods trained beside it, into folders of --out; or none")
    suite: str = option("", "a table of the paper: all its rows", lambda: {"": {}, **SUITES})
    seeds: int = option(1, "seeds for each row of the suite, counted up from --seed", low=1)
    jobs: int = option(1, "runs side by side on a CPU; 0: one a core")
    test_data: tuple = option((), "data sets that the suite is compared on; none: --data")
    device: str = option("auto", "cpu, cuda, or auto", "auto cpu cuda")
    dry_run: bool = option(False, "say what each run would train, and what it takes; no training")

    epochs: int = option(10, "passes over the training data", low=1, group="the optimizer")
    steps: int = option(0, "optimizer steps; 0: as many as --epochs take")
    batch_size: int = option(128, "problems in a step, over all processes", low=1)
    lr: float = option(8e-4, "highest learning rate")
    schedule: str = option("cosine", "of the rate, after the warm-up", "cosine constant")
    warmup: float = option(0.03, "share of the steps that warm up", high=1)
    weight_decay: float = option(0.1, "AdamW's, on matrices only")
    beta2: float = option(0.999, "AdamW's", high=0.99999)
    grad_clip: float = option(2.0, "largest norm of the gradient; 0: no limit")

    eval_every: int = option(0, "steps between validations; 0: an epoch", group="evaluation, files")
    eval_size: int = option(500, "validation problems at most; 0: no validation")
    log_every: int = option(10, "steps between lines of the log", low=1)
    save_every: int = option(500, "steps between checkpoints", low=1)

    micro_batch_size: int = option(0, "problems in a pass; 0: all", group="speed, memory")
    activation_checkpointing: bool = option(False, "less memory, more time")
    compile: bool = option(False, "torch.compile of the layers")


# Options of a run that may differ when it is resumed: they change no loss but for rounding
# (micro_batch_size the draws of dropout, too).
FREE = ("out", "resume", "overwrite", "compare", "suite", "seeds", "jobs", "test_data", "device")
FREE += ("preset", "micro_batch_size", "activation_checkpointing", "compile", "dry_run")
FREE += ("save_every", "log_every")

# Recipes are words of a command line; behind the preset's come those of "PRESET METHOD".
# Coconut and iCoT train all weights, as in the paper (Section 4.2), at constant rates like their
# authors': 1e-5 on models of 1 B (Shen et al. 2025), on GPT-2 1e-4 (Hao et al. 2024) and 5e-5
# (Deng et al. 2024). Coconut learns CoT alone for half of its epochs.
FULL = "--lora_rank 0 --schedule constant --weight_decay 0.01 "
COCONUT = FULL + "--lr 1e-5 --cot_epochs 5 --epochs_per_stage 1"
PRESETS = {
    "llama-3.2-1b": "--epochs 10 --lr 8e-4",
    "llama-3.2-3b": "--epochs 10 --lr 5e-4",
    "qwen2.5-1.5b": "--epochs 10 --lr 5e-4",
    "gpt2": "--epochs 40 --lr 2e-3",
    # A laptop's, or minutes of a GPU, there with --dtype bf16.
    "smollm2-135m": """--data calls --dtype fp32 --steps 400 --batch_size 32 --lr 1e-3 --warmup 0.2
        --weight_decay 0.01 --lora_rank 32 --lora_dropout 0 --rem_rank 32 --n_st 6 --log_every 20
        --eval_every 100 --eval_size 200 --save_every 100 --max_new_tokens 40""",
    "gpt2 codi": "--lr 3e-3 --distill_weight 1",
    "gpt2 coconut": FULL + "--lr 1e-4 --cot_epochs 20 --epochs_per_stage 3",
    "gpt2 icot": FULL + "--lr 5e-5",
    # The built-in task trains all weights of a tiny model: there is nothing pretrained to freeze.
    "demo": """--model demo --tokenizer demo --data demo --random_init --dtype fp32 --jobs 0
        --compare no-cot pause --steps 3000 --batch_size 64 --lr 3e-3 --weight_decay 1 --beta2 0.98
        --grad_clip 1 --lora_rank 0 --rem_rank 32 --n_st 8 --n_latents 4 --max_stage 2
        --epochs_per_stage 12 --removal_per_epoch 0.3 --remove_all_beyond 14 --distill_weight 5
        --log_every 50 --eval_every 500 --max_new_tokens 24""",
    "demo codi": "--distill_weight 20",
    "demo coconut": "--lr 1e-3",
    "demo icot": "--lr 2e-3",
}
for preset in ("llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b"):
    PRESETS |= {f"{preset} coconut": COCONUT, f"{preset} icot": FULL + "--lr 1e-5"}
# The rows of the paper's tables, the options that make them, and the paper's accuracies in %, after
# a slash ms on an A10, for each base model and data set. MultiArith has 180 problems in CODI's
# paper, from which some of Table 1's rows are, and 600 here.
TABLES = """
table1 | | | llama-3.2-1b:gsm8k-aug llama-3.2-1b:gsm-hard llama-3.2-1b:svamp llama-3.2-1b:multiarith
table1 | CoT                      | --method cot         | 58.8/425 13.4/477 59.9/227 97.2/218
table1 | Coconut                  | --method coconut     | 50.6/390 11.2/483 53.1/181 96.5/217
table1 | CODI                     | --method codi        | 55.6/143 12.8/153 61.1/141 96.1/132
table1 | No-CoT                   | --method no-cot      | 32.5/36  7.1/57   40.6/34  61.3/33
table1 | iCoT                     | --method icot        | 19.0/36  4.4/57   40.9/34  39.0/33
table1 | PauseFT                  | --method pause       | 32.1/37  7.3/60   40.4/35  59.2/33
table1 | DART                     | --method dart        | 42.6/37  10.9/60  50.5/35  84.8/33
table3 | | | llama-3.2-1b:gsm8k-aug
table3 | No-CoT                   | --method no-cot      | 32.5
table3 | DART                     | --method dart        | 42.6
table3 | w/o ST                   | --n_st 0             | 36.8
table3 | w/o REM                  | --rem_rank 0         | 36.2
table3 | w/ LoRA-REM              | --rem_is_lora        | 40.8
table3 | w/o L_distill            | --distill_weight 0   | 33.7
table3 | w/ L_distill on y_1      | --distill_at y_1     | 31.5
table3 | w/ L_distill on [z_N; Y] | --distill_at z_N+Y   | 33.7
table4 | | | llama-3.2-1b:prosqa llama-3.2-1b:commonsenseqa-cot
table4 | CoT                      | --method cot         | 98.8/882 68.5/1471
table4 | No-CoT                   | --method no-cot      | 94.0/129 65.4/34
table4 | DART                     | --method dart        | 99.4/130 75.1/34
table5 | | | gpt2:gsm8k-aug qwen2.5-1.5b:gsm8k-aug llama-3.2-3b:gsm8k-aug
table5 | No-CoT                   | --method no-cot      | 16.2/18  33.3/95  40.8/62
table5 | DART                     | --method dart        | 24.7/19  42.2/95  46.6/62
"""
SUITES, PAPER = {}, {}  # table -> {row: words of a command line}; (table, where, row) -> figure
for line in TABLES.strip().splitlines():
    suite, row, words, figures = map(str.strip, line.split("|"))
    if not row:
        places = figures.split()
        continue
    SUITES.setdefault(suite, {})[row] = words
    PAPER |= {(suite, place, row): f for place, f in zip(places, figures.split(), strict=True)}
SUITES["figure2"] = {f"C = {n}": f"--n_st {n}" for n in (0, 2, 4, 8, 12, 16, 20, 24, 32, 40)}


def read_options(argv):
    """Options from the command line; ValueError for what is unknown or contradictory."""
    known = data.parse_options(Options, [word for word in argv if word not in ("-h", "--help")])
    words = PRESETS.get(known.preset, "") + " " + PRESETS.get(f"{known.preset} {known.method}", "")
    recipe = dataclasses.asdict(data.parse_options(Options, words.split()))
    recipe |= {"preset": known.preset, "out": f"out/{known.preset}"}
    given = {word.partition("=")[0] for word in argv}
    if "--epochs" in given:
        recipe["steps"] = 0
    presets = "".join(f"  {name:21} {' '.join(words.split())}\n" for name, words in PRESETS.items())
    about = f"{__doc__}\nPresets, and what else they say for a method:\n{presets}"
    options = data.parse_options(Options, argv, about, recipe)
    options.argv = argv  # for the runs of a comparison or suite
    if options.compare == ("none",):
        options.compare = ()
    if options.suite and "--out" not in given:
        options.out += f"-{options.suite}"
    if options.random_init and not options.model:
        options.model = options.preset
    if not options.model:
        raise ValueError("--model DIR is missing: the base model")
    if (options.preset == "demo") != (options.model == "demo"):
        raise ValueError("--model and a pretrained model's --preset go together")
    if unknown := set(options.compare) - set(dart.METHODS):
        raise ValueError(f"--compare {min(unknown)}: there are {', '.join(dart.METHODS)}")
    if options.suite and ({"--method", "--compare", "--overwrite"} & given):
        raise ValueError("--suite goes with neither --method, --compare nor --overwrite")
    if options.seeds > 1 and not options.suite:
        raise ValueError("--seeds goes with --suite alone")
    if options.rem_is_lora and not options.rem_rank:
        raise ValueError("--rem_is_lora needs a --rem_rank")
    for pair in ("--resume", "--overwrite"), ("--steps", "--epochs"):
        if given >= {*pair}:
            raise ValueError(f"{' and '.join(pair)} contradict each other")
    names = {"", *data.BUILT_IN, *data.DATASETS, *(MODELS if options.random_init else ())}
    for name in dart.PATHS:  # absolute: valid in any directory
        value = getattr(options, name)
        if value not in names and Path(value).exists():
            setattr(options, name, str(Path(value).resolve()))
    return options


# ------------------------------------------------------------------------- processes and signals

TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others
PARENT = int(os.environ.get("DART_PARENT", 0))  # torchrun, or the train.py that started this
IS_CHILD = bool(PARENT) and "RANK" not in os.environ
RECEIVED = []  # the signals that ask this process to stop


def start_processes(device):
    """The device, cpu or cuda. Under torchrun the processes meet, each on its local rank's GPU."""
    device = evaluation.pick_device(device)
    if "RANK" not in os.environ:
        return device
    backend, how = {"cpu": "gloo", "cuda": "nccl"}[device], dict(timeout=TIMEOUT)
    if device == "cuda":
        n, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if n > there:
            raise ValueError(f"--nproc_per_node={n}: only {there} GPUs are there")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    try:
        store, how["rank"], how["world_size"] = next(rendezvous("env://", **how))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun may keep a store over its restarts, with addresses of dead processes in it
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, store=store, **how)
    except RuntimeError as error:
        raise ValueError(f"the processes do not meet: {error}") from None
    return device


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def noting_signals():
    """Within, SIGTERM and SIGINT are noted, for the step to be finished and saved; a second SIGINT
    ends at once."""

    def note(number, _):
        if number == signal.SIGINT and number in RECEIVED:
            raise KeyboardInterrupt
        RECEIVED.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch_parent(parent):
    """A run beside others, or of torchrun, stops, as by SIGTERM, when what started it has gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def train_side_by_side(commands, jobs):
    """Trains runs as processes of their own, `jobs` at a time, the last one first, as it takes the
    longest. They share the locks of this one, and end with it."""
    threads = max(1, torch.get_num_threads() // jobs)
    env = os.environ | {"DART_PARENT": str(os.getpid()), "OMP_NUM_THREADS": str(threads)}
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    waiting, running = list(commands), []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                command = [sys.executable, __file__, *waiting.pop()]
                running.append(subprocess.Popen(command, env=env, close_fds=False))
            time.sleep(0.05)
            if bad := [process for process in running if process.poll()]:
                if (code := bad[0].returncode) > 0:  # it has said why
                    sys.exit(code)
                what = f"train.py {' '.join(bad[0].args[2:])}"
                end(f"killed by {signal.Signals(-code).name}: {what}", 1)
            running = [process for process in running if process.returncode is None]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


# ------------------------------------------------------------------------------- run directories

RUN_FILES = ["result.json", "test.json", "table.md", "table.json", "eval.json"]  # in this order
RUN_FILES += data.BESIDE
RUN_FILES += ["adapter.safetensors", "best.safetensors", "checkpoint.safetensors", "log.jsonl"]
RUN_FILES += [name for names in data.READERS for name in names]


def check_directory(options):
    """config.json of the run in --out, None where there is nothing but folders of other runs.
    ValueError for anything else, or a run that is neither to be resumed nor replaced."""
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is not a directory")
    inside = {path.name for path in out.iterdir()} if out.exists() else set()
    if inside <= {*dart.METHODS, ".lock", "config.json.tmp"}:
        return None
    try:
        *_, saved = dart.read_run(out)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--out {out}: holds something, but no run ({error})") from None
    if not options.resume and not options.overwrite:
        raise ValueError(f"--out {out}: holds a run; --resume continues, --overwrite replaces it")
    if odd := [name for name in RUN_FILES if (out / name).exists() and not (out / name).is_file()]:
        raise ValueError(f"--out {out}: {odd[0]} is not a file")
    return saved


def lock(out):
    """Creates the directory and locks it, until the handle that it returns is closed, and those of
    the processes that are started meanwhile."""
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    os.set_inheritable(handle, True)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another process is training in it") from None
    except OSError:  # a file system without locks
        pass
    return handle


def claim_directory(run):
    """Writes config.json. What is there of another run goes once that is on the disk, so that at
    any moment the directory can be resumed or replaced."""
    options, out = run.options, run.out
    if options.resume and (out / "config.json").exists():
        return run.method.tokenizer.save(out)
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    about = {"options": dataclasses.asdict(options), "run": run.fingerprint}
    about |= {"model_config": dataclasses.asdict(run.model.config)}
    about |= {"versions": versions, "commit": commit, "processes": run.world}
    write_json(out / "config.json", about)
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    run.method.tokenizer.save(out)


# ----------------------------------------------------------------------------- runs and checkpoints


@dataclass
class Progress:
    """How far a run is. With weights and moments it is all that the rest depends on: learning rate,
    batches and random numbers are functions of the step."""

    step: int = 0
    best: float = -1.0  # accuracy on the validation split
    valid: dict = field(default_factory=dict)  # pathway -> the last such accuracy
    tokens: int = 0  # useful ones, of all processes
    seconds: float = 0.0  # of training
    flops: dict = field(default_factory=dict)  # pathway -> floating-point operations


@dataclass
class Run:
    """What `prepare` makes ready and `train` uses."""

    options: Options
    method: dart.Method
    optimizer: torch.optim.Optimizer
    problems: list  # to train on
    examples: dict  # pathway -> list of Example, one for each of them, at the first stage
    valid: list  # problems
    steps: int
    steps_per_epoch: int
    fingerprint: dict
    rank: int
    world: int  # number of processes
    progress: Progress = field(default_factory=Progress)

    @property
    def model(self):
        return self.method.model

    @property
    def out(self):
        return Path(self.options.out)


def split_problems(options):
    """(problems to train on, problems to validate on). Of a single file the last are held out."""
    load = partial(data.load, options.data, seed=options.seed, data_dir=options.data_dir)
    problems, n = load("train"), options.eval_size
    if data.is_single_file(options.data):
        first = max(0, len(problems) - n)
        return problems[:first], problems[first:]
    return problems, load("valid")[:n] if n else []


def build_method(options, device):
    """The method around its model, with the first weights; device meta: without any."""
    source, config = options.tokenizer or options.model, None
    demo = source == "demo"
    tokenizer = data.demo_tokenizer() if demo else data.Tokenizer.from_pretrained(source)
    if options.random_init or device == "meta":
        known = options.random_init and options.model in MODELS
        config = MODELS[options.model] if known else ModelConfig.from_pretrained(options.model)
    torch.manual_seed(options.seed)
    method = dart.build(options, tokenizer, config, device)
    method.model.activation_checkpointing = options.activation_checkpointing
    if options.compile:
        method.model.compile_layers()
    return method


def prepare(options, device):
    """The Run of some options, at its first step. device meta: without weights, to check them.
    ValueError or OSError for what a user can mend; writes nothing."""
    if not (options.random_init and options.model in MODELS or Path(options.model).is_dir()):
        fetch = f"hf download {options.model} --local-dir DIR"
        raise ValueError(f"--model {options.model}: no such directory; a hub's model: {fetch}")
    problems, valid = split_problems(options)
    (rank, world), size = rank_and_world(), options.batch_size
    if len(problems) < size or size % world:
        found = f"{len(problems)} problems beside {len(valid)} of --eval_size"
        raise ValueError(f"--batch_size {size}: {found}, {world} processes")
    per_epoch = len(problems) // size
    steps = options.steps or options.epochs * per_epoch
    method = build_method(options, device)
    stage, last = method.stage(0, per_epoch), method.stage(steps - 1, per_epoch)
    if last not in (None, dart.FINAL_STAGE):
        raise ValueError(f"--method {options.method}: its schedule takes more than {steps} steps")
    examples, longest = {}, 0
    for name in method.pathways:
        pathway = method.training_pathway(name, stage, 0.0)
        examples[name] = [pathway.example(problem, method.tokenizer) for problem in problems]
        later = method.pathways[name].n_latents - pathway.n_latents  # thoughts of later stages
        longest = max(longest, later + max(len(example.ids) for example in examples[name]))
        if pathway.steps and empty_cots(problems, pathway.drop_last_step) == len(problems):
            kept = len(problems) - empty_cots(problems, False)
            raise ValueError(f"all CoTs are empty; with --last_step keep {kept} would not be")
    evaluation.check_room(method, longest, valid, options.max_new_tokens)
    fingerprint = dart.fingerprint(options, method.model, method.tokenizer)
    fingerprint = {name: value for name, value in fingerprint.items() if name not in FREE}
    fingerprint["data"] = problems_digest((problems, valid))
    found = (problems, examples, valid, steps, per_epoch, fingerprint, rank, world)
    return Run(options, method, make_optimizer(method.model, options), *found)


def problems_digest(problems):
    return hashlib.sha256(repr(problems).encode()).hexdigest()


def empty_cots(problems, drop_last_step):
    """How many of the problems have no step to learn."""
    return sum(len(problem.steps) <= drop_last_step for problem in problems)


def make_optimizer(model, options):
    """AdamW, with weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = dict(params=[p for p in parameters if p.dim() >= 2])
    others = dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)
    decay, betas = options.weight_decay, (0.9, options.beta2)
    return torch.optim.AdamW([matrices, others], weight_decay=decay, betas=betas)


def save_checkpoint(run):
    """adapter.safetensors (weights), and then checkpoint.safetensors (weights and moments). OSError
    where they cannot be written: then the old ones are still there."""
    tensors, moments = run.model.state(run.options.whole), {}
    for i, state in run.optimizer.state_dict()["state"].items():
        moments |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    about = dict(run=run.fingerprint, progress=dataclasses.asdict(run.progress))
    dart.save_weights(run.out / "adapter.safetensors", tensors, **about)
    dart.save_weights(run.out / "checkpoint.safetensors", tensors | moments, **about)


def save_best(run):
    """best.safetensors, and its accuracy in run.progress. OSError."""
    accuracy = run.progress.valid[run.method.inference_pathway]
    progress = dataclasses.replace(run.progress, best=accuracy)
    about = dict(run=run.fingerprint, progress=dataclasses.asdict(progress))
    dart.save_weights(run.out / "best.safetensors", run.model.state(run.options.whole), **about)
    run.progress.best = accuracy


def load_checkpoint(run):
    """Takes up the checkpoint in the run's directory, if there is one, and cuts the log there.
    ValueError where it is damaged, or of another run."""
    path, log = run.out / "checkpoint.safetensors", run.out / "log.jsonl"
    if path.is_file():
        tensors, about = dart.load_weights(path)
        dart.check_same_run(path, about["run"], run.fingerprint)
        run.progress = Progress(**about["progress"])
        optimizer = run.optimizer.state_dict()
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, i, kind = name.split(".")
            optimizer["state"].setdefault(int(i), {})[kind] = tensors.pop(name)
        run.optimizer.load_state_dict(optimizer)
        run.model.load_state(tensors, path, run.options.whole)
    if log.is_file() and run.rank == 0:
        lines = log.read_text(errors="replace").splitlines()
        kept = [line for line in lines if step_of(line) <= run.progress.step]
        write_text(log, "".join(f"{line}\n" for line in kept))


def step_of(line):
    """The step of a line of log.jsonl; of a damaged one infinity."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return int(json.loads(line)["step"])
    return math.inf


# ------------------------------------------------------------------------------------- training


def learning_rate(options, step, steps):
    """Linear warm-up, then half a cosine down to 0 (Appendix C), or constant; step 0, 1, ..."""
    warm = options.warmup * steps
    if step < warm:
        return options.lr * (step + 1) / (warm + 1)
    if options.schedule == "constant":
        return options.lr
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def global_batches(run):
    """The global batches, each an index array, from the next step on to the last."""
    lengths = np.array([[len(e.ids) for e in some] for some in run.examples.values()]).T
    how = lengths, run.options.batch_size, run.options.seed
    epochs = (data.epoch_batches(*how, epoch) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    return itertools.islice(batches, run.progress.step, run.steps)


def stage_of(run, step):
    """The method's stage at a step; steps are counted from 1."""
    return run.method.stage(step - 1, run.steps_per_epoch)


def micro_batches(run, step, indices):
    """This process's share of a global batch as a list of MicroBatch, counted in run.progress.
    Random numbers go by step and place in the global batch: with the same micro-batches they are
    the same on any number of processes."""
    options, method, share = run.options, run.method, len(indices) // run.world
    stage, size = stage_of(run, step), options.micro_batch_size or share
    u = np.random.default_rng((options.seed, step, 1)).random(len(indices))
    parts, stop = [], (run.rank + 1) * share
    for start in range(run.rank * share, stop, size):
        chosen, batches = range(start, min(start + size, stop)), {}
        for name, pathway in method.pathways.items():
            examples = [run.examples[name][indices[i]] for i in chosen]
            if stage is not None:
                pathways = [method.training_pathway(name, stage, u[i]) for i in chosen]
                pairs = zip(pathways, [run.problems[indices[i]] for i in chosen], strict=True)
                examples = [way.example(problem, method.tokenizer) for way, problem in pairs]
            batch = data.collate(examples, method.tokenizer.eos_id)
            lengths, learned = batch.lengths.numpy(), len(batch.weights)
            # The lengths of the other processes are about the same.
            flops = run.model.training_flops(lengths, learned, pathway.silent) * run.world
            run.progress.flops[name] = run.progress.flops.get(name, 0.0) + flops
            run.progress.tokens += int(lengths.sum()) * run.world
            batches[name] = batch.to(run.model.device)
        seed = np.random.SeedSequence((options.seed, step, start)).generate_state(1)[0]
        parts.append(dart.MicroBatch(batches, len(chosen) / share, int(seed)))
    return parts


def train(run):
    """The training loop. Leaves the run's files behind."""
    options, method, optimizer, progress = run.options, run.method, run.optimizer, run.progress
    parameters = [p for p in method.parameters() if p.requires_grad]
    eval_every = options.eval_every or run.steps_per_epoch
    began, wrapped = time.perf_counter() - progress.seconds, method
    if run.world > 1:  # without find_unused_parameters a resumed run's buckets had another order
        wrapped = DistributedDataParallel(method, find_unused_parameters=True)

    def forward(pathway, micro, sync):
        torch.manual_seed(micro.seed)
        wrapped.require_backward_grad_sync = sync
        return wrapped(pathway, micro.batches[pathway])

    for step, indices in enumerate(global_batches(run), progress.step + 1):
        batch = micro_batches(run, step, indices)
        if step > 1 and stage_of(run, step) != stage_of(run, step - 1):
            optimizer.state.clear()
        losses = method.training_step(forward, batch)
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.grad_clip or math.inf)
        finite = bool(torch.stack([norm, *losses.values()]).isfinite().all())
        flags = torch.tensor([next(iter(RECEIVED), 0), not finite], device=norm.device)
        stop, bad = dart.all_reduce(flags, dist.ReduceOp.MAX).tolist()  # any one stops all
        if bad:
            text = " ".join(f"{name} {loss:.3g}" for name, loss in losses.items())
            text = f"step {step}: not finite: {text} |g| {norm:.3g}, problems {indices.tolist()}"
            end(f"{text}; --resume goes on from the last checkpoint", 1)
        lr = learning_rate(options, step - 1, run.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        progress.step, progress.seconds = step, time.perf_counter() - began

        last = step == run.steps
        if step % options.log_every == 0 or last:
            log_step(run, losses, norm.item(), lr)
        else:
            show_live(run, step_text(run, losses))
        evaluated = run.valid and (step % eval_every == 0 or last)
        if evaluated:
            validate(run)
        if step % options.save_every == 0 or evaluated or stop or last:
            save(run, save_checkpoint, run)
        if stop:
            name = signal.Signals(stop).name
            end(f"{name} after step {step}; --resume goes on from there", 128 + stop)
        began = time.perf_counter() - progress.seconds  # the rest was no training
    result = {"method": options.method, "steps": run.steps, **dataclasses.asdict(progress)}
    result["trained_parameters"] = sum(p.numel() for p in parameters)
    result |= {"peak_memory": peak_memory(run.model.device), "run": run.fingerprint}
    save(run, write_json, run.out / "result.json", result)


def save(run, write, *arguments):
    """Rank 0 writes a file. Where that fails the training goes on, but for its last step."""
    try:
        if run.rank == 0:
            write(*arguments)
    except (OSError, SafetensorError) as error:
        message = f"step {run.progress.step}: could not be written: {error}; --resume"
        if run.progress.step == run.steps:
            end(f"{message} goes on from the last checkpoint", 1)
        show(run, f"{message} would go on from the last checkpoint; the training goes on")


def validate(run):
    """Accuracies on the validation problems, of which each process answers its share. Weights that
    are better than any before go into best.safetensors."""
    options, method, progress = run.options, run.method, run.progress
    for name, pathway in method.pathways.items():
        problems, new = run.valid[run.rank :: run.world], options.max_new_tokens
        how, live = (run.model, method.tokenizer, pathway, problems, new), partial(show_live, run)
        records = dart.evaluate(*how, show=live)
        right = torch.tensor(float(sum(record["numeric"] for record in records)))
        progress.valid[name] = dart.all_reduce(right.to(run.model.device)).item() / len(run.valid)
    text = "  ".join(f"{name} {100 * share:.1f} %" for name, share in progress.valid.items())
    log(run, {"valid": progress.valid}, f"step {progress.step}  validation: {text}")
    if progress.valid[method.inference_pathway] > progress.best:
        save(run, save_best, run)


def reset_peak_memory(device):
    """From here on `peak_memory` counts; on a CPU only under Linux."""
    if torch.device(device).type == "cuda":
        return torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes: of the GPU's memory, or of the whole process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux, where ru_maxrss may be that of the parent
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def log_step(run, losses, norm, lr):
    """Logs the losses, a mean over all processes, speed and memory."""
    losses = {name: dart.all_reduce(loss).item() / run.world for name, loss in losses.items()}
    seconds, peak = run.progress.seconds, peak_memory(run.model.device)
    speed = run.progress.tokens / seconds
    record = dict(lr=lr, grad_norm=norm, seconds=seconds, peak_memory=peak, tokens_per_s=speed)
    text = f"{step_text(run, losses)}  lr {lr:.1e}  |g| {norm:.2f}  {speed:,.0f} tokens/s"
    log(run, losses | record, f"{text}  peak {peak / 2**30:.2f} GiB")


def step_text(run, losses):
    step, seconds = run.progress.step, run.progress.seconds
    left = seconds / step * (run.steps - step)
    text = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    return f"step {step}/{run.steps}  left {left // 60:.0f}:{left % 60:02.0f}  {text}"


def log(run, record, text):
    """Rank 0 writes a line of log.jsonl, and one on the screen."""
    if run.rank:
        return
    try:
        data.append_line(run.out / "log.jsonl", {"step": run.progress.step} | record)
    except OSError as error:
        text = f"not in the log: {error}"
    show(run, text)


def show(run, text):
    if run.rank == 0:
        data.show(f"{run.out}: {text}" if IS_CHILD else text)


def show_live(run, text):
    if run.rank == 0 and not IS_CHILD:
        data.show_live(text)


# -------------------------------------------------------------------------- comparisons, suites

TRAIN_SAMPLE, TIMED = 500, 50  # training problems, and questions one by one, for a table
COMPARED = ("row", "pathway", "exact", "exact_interval", "n", "train", "passes", "ms")


def plan(options):
    """{row: the Options of its runs, one a seed}: of a suite, of a comparison, or of one run."""
    out, argv, rows = Path(options.out), [*options.argv, "--compare"], {}
    if not options.suite:
        for method in options.compare:
            rows[method] = [read_options([*argv, f"--method={method}", f"--out={out / method}"])]
        rows.pop(options.method, None)
        return rows | {options.method: [read_options(argv)]}
    folders = {row: re.sub(r"\W+", "-", row).strip("-") for row in SUITES[options.suite]}
    own = {*folders.values(), ".lock", "table.md", "table.json", "figure2.png"}
    if out.is_dir() and (odd := {path.name.removesuffix(".tmp") for path in out.iterdir()} - own):
        raise ValueError(f"--out {out}: holds {min(odd)}, which is not of this suite")
    for row, words in SUITES[options.suite].items():
        argv = [*options.argv, "--compare", "--suite=", "--seeds=1", "--resume", *words.split()]
        for seed in range(options.seed, options.seed + options.seeds):
            place = [f"--seed={seed}", f"--out={out / folders[row] / str(seed)}"]
            rows.setdefault(row, []).append(read_options([*argv, *place]))
    return rows


SAMPLED = 200  # steps whose batches are looked at


def planned(run, row=None):
    """The cost of a run, as a row of a table. Tokens and FLOP, of all pathways, are scaled up from
    evenly spaced steps."""
    run = dataclasses.replace(run, progress=Progress())
    options, apart = run.options, math.ceil(run.steps / SAMPLED)
    for step, indices in enumerate(global_batches(run), 1):
        if (step - 1) % apart == 0:
            micro_batches(run, step, indices)  # counts tokens and FLOP in run.progress
    sizes = [(p.numel(), p.requires_grad) for p in run.method.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    plan = dict(row=row, lr=options.lr, schedule=options.schedule, steps=run.steps)
    plan |= dict(trained_parameters=trained, weights=sum(size for size, _ in sizes))
    plan |= dict(problems=len(run.problems), peak_memory=expected_memory(run))
    tokens, flops = run.progress.tokens, sum(run.progress.flops.values())
    per_sample = run.steps / math.ceil(run.steps / apart)
    return plan | dict(tokens=tokens * per_sample, all_flops=flops * per_sample)


def expected_memory(run):
    """Bytes at the peak of a step, of one process: weights, gradients and moments, what the larger
    pass over the longest problems keeps, and a piece of the logits with its gradient."""
    model, options, config = run.model, run.options, run.model.config
    rows = options.micro_batch_size or options.batch_size // run.world
    kept = []
    for name, pathway in run.method.pathways.items():
        tokens = rows * max(len(example.ids) for example in run.examples[name])
        kept.append(model.kept_bytes(tokens, pathway.silent, pathway.n_latents))
    trained = sum(p.numel() for p in run.method.parameters() if p.requires_grad)
    logits = min(max(dart.LOGITS, config.vocab_size), tokens * config.vocab_size)
    passes = sum(kept) if options.attach_teacher else max(kept)
    return sum(p.nbytes for p in run.method.parameters()) + 12 * trained + passes + 8 * logits


def checked_run(options, device):
    """`prepare`, if the directory is empty, or holds this run and --resume is given, or any run and
    --overwrite. ValueError or OSError."""
    saved, run = check_directory(options), prepare(options, device)
    if saved is not None and options.resume:
        dart.check_same_run(run.out / "config.json", saved["run"], run.fingerprint)
    return run


def train_one(options, device):
    """Trains a run to its end, unless --resume finds it done."""
    result = Path(options.out) / "result.json"
    if options.resume and result.is_file():
        run = checked_run(options, "meta")
        return dart.check_same_run(result, read_json(result).get("run", {}), run.fingerprint)
    run = checked_run(options, device)
    if options.resume:
        load_checkpoint(run)
    if run.world > 1:
        seen = [None] * run.world
        dist.all_gather_object(seen, (run.fingerprint, run.progress.step, run.steps))
        if any(what != seen[0] for what in seen):
            raise ValueError("the processes see different data, weights or checkpoints")
    if run.rank == 0:
        claim_directory(run)
    n, size, plan = len(run.problems), options.batch_size, planned(run)
    text = f"{options.method}: {run.steps} steps of {size} of {n} problems, into {run.out}"
    show(run, f"{text}; {len(run.valid)} others are for validation")
    text = f"{plan['trained_parameters']:,} of {plan['weights']:,} weights are trained; in all"
    text += f" about {plan['tokens']:.1e} tokens, {plan['all_flops']:.1e} FLOP"
    show(run, f"{text}, {plan['peak_memory'] / 2**30:.2f} GiB of memory")
    empty = empty_cots(run.problems, run.method.drop_last_step)
    if "cot" in run.method.pathways and empty > n / 10:
        none = empty_cots(run.problems, False)
        show(run, f"{empty} of {n} CoTs are empty ({none} with --last_step keep)")
    width = shutil.get_terminal_size((100, 0)).columns
    for name, examples in run.examples.items():
        picture = data.picture(examples[0], run.method.tokenizer, width)
        show(run, f"{name}: the first problem, and what its tokens weigh in the loss\n{picture}")
    reset_peak_memory(device)
    with noting_signals():
        train(run)


def measured(options, names, device):
    """{data set: {pathway: figures}} of a trained run: its result.json, and accuracies on test
    splits and on training problems; kept in its test.json, by the digest of the problems."""
    path, load = Path(options.out) / "test.json", partial(data.load, data_dir=options.data_dir)
    tests = {name: load(name, "test", options.seed) for name in names}
    digests = {name: problems_digest(problems) for name, problems in tests.items()}
    kept = read_json(path) if path.is_file() else {}
    if missing := [name for name in names if digests[name] not in kept]:
        method, _ = dart.load_run(options.out, options.model, device)
        result = read_json(path.with_name("result.json"))
        result.pop("run", None)
        train = split_problems(options)[0][:TRAIN_SAMPLE]
        for pathway in reversed(method.pathways):
            answerer = evaluation.answerer(method, pathway)
            known, _ = evaluation.measure(answerer, train)
            for name in missing:
                found, _ = evaluation.measure(answerer, tests[name])
                found = result | found | {"train": known["exact"]}
                kept.setdefault(digests[name], {})[pathway] = found
        write_json(path, kept)
    return {name: kept[digests[name]] for name in names}


def make_tables(options, rows, device):
    """{data set: rows of figures}: each row's means over its seeds, through each pathway, with the
    paper's figures beside those of a suite. Times are those of the first seed."""
    tables, names, answerers = {}, options.test_data or (options.data,), []
    for runs in zip(*rows.values(), strict=True):  # of one seed
        if len({read_json(Path(run.out) / "config.json")["run"]["data"] for run in runs}) > 1:
            raise ValueError(f"--data {options.data}: has changed since the first run read it")
    for first, *_ in rows.values():  # on the CPU: all of a table might not fit into a GPU
        method, _ = dart.load_run(first.out, first.model)
        answerers += [evaluation.answerer(method, name) for name in reversed(method.pathways)]
    figures = {row: [measured(run, names, device) for run in runs] for row, runs in rows.items()}
    for name in names:
        tables[name], test = [], data.load(name, "test", options.seed, options.data_dir)
        questions = [problem.question for problem in test[:TIMED]]
        times = iter(evaluation.time_in_turns(answerers, questions, device))
        for row, seeds in figures.items():
            published = PAPER.get((options.suite, f"{options.preset}:{name}", row), "-")
            for i, pathway in enumerate(seeds[0][name]):
                mean = evaluation.over_seeds([found[name][pathway] for found in seeds])
                mean |= {"row": row, "pathway": pathway, "paper": "-" if i else published}
                tables[name].append(mean | next(times))
    return tables


def write_tables(options, tables, device):
    """Prints tables of figures, and leaves them in table.md and table.json of --out."""
    out, texts = Path(options.out), []
    for name, rows in tables.items():
        place = data.printable(name)
        texts.append(f"{options.suite or 'comparison'}, {options.preset} on {place}\n")
        columns = evaluation.COLUMNS
        columns = {key: columns[key] for key in (columns if options.suite else COMPARED)}
        texts.append(f"{evaluation.table(rows, columns)}\n\n{evaluation.timing(device)}\n")
        if name == "demo":
            chance = 100 * data.demo_chance(data.load("demo", "test", options.seed))
            texts.append(f"Guessing a remainder is right in {chance:.1f} % of the problems.\n")
    write_text(out / "table.md", "\n".join(texts))
    write_json(out / "table.json", tables)
    data.show("\n" + "\n".join(texts) + f"\nThe table is in {out / 'table.md'}.")
    if options.suite == "figure2" and importlib.util.find_spec("matplotlib"):
        evaluation.save_figure(out / "figure2.png", evaluation.draw_figure2, tables)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if IS_CHILD or "RANK" in os.environ:
        parent = PARENT or os.getppid()
        threading.Thread(target=watch_parent, args=[parent], daemon=True).start()
    with contextlib.ExitStack() as held:
        run_command(read_options(argv), held)


def check_comparison(options, runs):
    """Can all runs of a comparison or suite be trained, and their test problems be answered?
    ValueError or OSError."""
    if data.is_single_file(options.data) and not options.test_data:
        raise ValueError(f"--test_data is missing: {options.data} is what is trained on")
    names = options.test_data or (options.data,)
    tests = {name: data.load(name, "test", options.seed, options.data_dir) for name in names}
    for run in runs if not options.dry_run else ():
        method = checked_run(run, "meta").method
        for name, problems in tests.items():
            try:
                evaluation.check_room(method, 0, problems, run.max_new_tokens)
            except ValueError as error:
                raise ValueError(f"{name}, test: {error}") from None


def run_command(options, held):
    """Checks all runs of a command before the first one trains, trains them and compares them; held
    keeps their locks."""
    device = start_processes(options.device)
    (rank, _), rows = rank_and_world(), plan(options)
    runs = [run for seeds in rows.values() for run in seeds]
    if len(runs) > 1:
        check_comparison(options, runs)
    elif options.test_data and not IS_CHILD:
        raise ValueError("--test_data goes with --compare and --suite alone")
    check_directory(runs[-1])
    writes = rank == 0 and not options.dry_run
    if writes and not IS_CHILD:
        for out in {options.out, *(run.out for run in runs)}:
            held.callback(os.close, lock(Path(out)))
    if options.overwrite and len(runs) > 1:  # now, or a later --resume would meet old runs
        for run in runs if writes else ():
            for name in (*RUN_FILES, "config.json"):  # it is a run until the last one is gone
                (Path(run.out) / name).unlink(missing_ok=True)
        if dist.is_initialized():
            dist.barrier()

    jobs = min(len(runs), options.jobs or torch.get_num_threads())
    if options.dry_run:
        plans = [planned(checked_run(seeds[0], "meta"), row) for row, seeds in rows.items()]
        if rank == 0:
            data.show(evaluation.table(plans))
    elif device == "cpu" and not dist.is_initialized() and jobs > 1:
        train_side_by_side([run.argv for run in runs], jobs)
    else:
        for run in runs:
            train_one(run, device)
            if RECEIVED:
                end(f"{signal.Signals(RECEIVED[0]).name} when a run was trained", 128 + RECEIVED[0])
    if dist.is_initialized():  # the others need not wait for the tables
        dist.barrier()
        dist.destroy_process_group()
    if writes and len(runs) > 1:
        write_tables(options, make_tables(options, rows, device), device)
    if writes and not options.suite and not IS_CHILD:
        data.show(f"The run is in {options.out}. Next: python eval.py --ckpt {options.out}")


if __name__ == "__main__":
    data.run_program(main)
