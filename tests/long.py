"""Kills at random moments, run by hand: python -m pytest tests/long.py (an hour on two cores).

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
    "lora": (f"{LORA} --lora_rank 4 --rem_rank 4", 1, 10),
    "two processes": ("--steps 30", 2, 10),
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


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_and_resumed_a_run_is_the_same(name, tmp_path):
    words, processes, kills = RUNS[name]
    began, rng = time.monotonic(), random.Random(name)
    assert start(tmp_path / "whole", words, processes).wait() == 0
    usual, killed, turn = time.monotonic() - began, 0, 0
    while killed < kills:
        out, turn = tmp_path / str(turn), turn + 1
        while True:
            process = start(out, words, processes)
            try:
                code = process.wait(timeout=rng.uniform(0.2, 1.0) * usual)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                continue
            assert code == 0
            break
        assert log(out) == log(tmp_path / "whole")
        for file in ("adapter", "best", "checkpoint"):
            ours, theirs = (
                dart.load_weights(run / f"{file}.safetensors")[0]
                for run in (out, tmp_path / "whole")
            )
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), file
    table = subprocess.check_output(["ps", "-Aww", "-o", "args="], text=True)
    assert not [line for line in table.splitlines() if str(tmp_path) in line]
