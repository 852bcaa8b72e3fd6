"""Kills at random moments, run by hand: python -m pytest tests/long.py (half an hour, two cores).

A run is killed with SIGKILL again and again, each time resumed, until it ends. Its weights and its
log must be those of a run that nothing happened to, to the last bit, and no process may be left.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dart

ROOT = Path(__file__).parent.parent
BASE = ROOT / "tests" / "fixtures" / "llama"
QUICK = "--device cpu --batch_size 16 --eval_size 10 --eval_every 6 --save_every 5 --log_every 1"
LORA = f"--preset llama-3.2-1b --model {BASE} --tokenizer demo --data demo --steps 30 --n_st 4"
RUNS = {  # options, processes, kills
    "dart": ("--steps 30", 1, 50),
    "icot": ("--method icot --steps 30 --removal_per_epoch 40 --remove_all_beyond 6", 1, 10),
    "coconut": ("--method coconut --steps 30 --epochs_per_stage 0.05 --max_stage 2", 1, 10),
    "lora in bf16": (f"{LORA} --lora_rank 4 --rem_rank 4", 1, 10),
    "two processes": ("--steps 30", 2, 10),
    "comparison": ("--steps 30 --compare no-cot --jobs 2", 1, 5),
}
TIMES = ("seconds", "tokens_per_s", "peak_memory")


def start(out, words, processes):
    command = [sys.executable, str(ROOT / "train.py")]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, str(ROOT / "train.py")]
    command += ["--compare", *QUICK.split(), *words.split(), "--out", str(out), "--resume"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL)


def left_of(directory):
    """The processes that have the directory on their command line."""
    table = subprocess.check_output(["ps", "-Aww", "-o", "args="], text=True)
    return [line for line in table.splitlines() if str(directory) in line]


def log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name not in TIMES} for line in lines]


def check_same(run, other):
    assert log(run) == log(other)
    for file in ("adapter", "best", "checkpoint"):
        ours, theirs = (dart.load_weights(d / f"{file}.safetensors")[0] for d in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), file


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_and_resumed_a_run_is_the_same(name, tmp_path):
    words, processes, kills = RUNS[name]
    began, rng, whole = time.monotonic(), random.Random(name), tmp_path / "whole"
    assert start(whole, words, processes).wait() == 0
    usual, killed, turn = time.monotonic() - began, 0, 0
    while killed < kills:
        out, turn = tmp_path / str(turn), turn + 1
        while True:
            process = start(out, words, processes)
            try:
                assert process.wait(timeout=rng.uniform(0.2, 1.0) * usual) == 0
                break
            except subprocess.TimeoutExpired:
                if name == "comparison":  # its runs end by themselves
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
            ended = time.monotonic() + 60
            while left_of(tmp_path):
                assert time.monotonic() < ended
                time.sleep(0.1)
        for run in [path.parent for path in whole.rglob("adapter.safetensors")]:
            check_same(out / run.relative_to(whole), run)
    assert not left_of(tmp_path)
