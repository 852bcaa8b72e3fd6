"""Faults, layouts and compilation at length: minutes, so that it is a command of its own, `python -m pytest tests/long.py`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import dart
from test_eval import compiled_answers
from test_faults import ROOT, RUN, agent, at, close, curve, port, python, run, same, script, steps, wait_for, whole  # noqa: F401
from test_model import compiled_layers
from test_train import QUICK, log, losses, torchrun
from test_train import run as quick_run

HALF = """
original = train.save_file
def half(tensors, path, about):
    original(tensors, path, about)
    if count({n}):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
train.save_file = half
"""


def test_thirty_kills(tmp_path):
    """At random calls of what a run does, before or after it, with half a file written, and at random times; each run is resumed until it is
    through, then a new one is begun, until there were 30 kills. By turns of DART, and of Coconut, whose optimizer starts anew on the way."""
    methods = [[], ["--method", "coconut", "--epochs_per_stage", "0.08", "--thoughts_per_step", "1"]]
    steps = ["--steps", "30", "--save_every", "1", "--eval_every", "4"]
    for i, method in enumerate(methods):
        assert run(tmp_path / f"whole{i}", *steps, *method) == 0
    draw, kills, runs = random.Random(0), 0, 0
    while kills < 30:
        out, whole, more = tmp_path / f"run{runs}", tmp_path / f"whole{runs % 2}", [*steps, *methods[runs % 2]]
        runs += 1
        code = None
        while code != 0:
            if draw.random() < 0.3 and kills < 30:  # at any time: while torch is loaded, data are read, ...
                process = subprocess.Popen([sys.executable, "train.py", *RUN, *more, "--out", str(out), "--resume"], cwd=ROOT,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                           env={**os.environ, "OMP_NUM_THREADS": "1"})  # on two, rounding is another  # fmt: skip
                time.sleep(draw.uniform(1, 6))
                process.kill()
                errors, code = process.communicate()[1], process.returncode
            else:
                where = draw.choice(["train.save_file", "os.replace", "os.fsync", "train.train_step", "train.validate", "train.claim",
                                     "train.write_atomically", "train.load_checkpoint", "os.open"])  # fmt: skip
                n, after = draw.randint(1, 24), draw.random() < 0.5
                fault = "" if kills == 30 else HALF.format(n=n) if draw.random() < 0.2 else at(where, (n, after))
                done = python(script(tmp_path / "killed.py", fault), out, *more, "--resume")
                errors, code = done.stderr, done.returncode
            assert code in (0, -signal.SIGKILL), errors
            kills += code != 0
        same(out, whole)
    print(f"{kills} kills in {runs} runs")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_is_really_full(tmp_path, whole):  # noqa: F811
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    try:
        fill = f"subprocess = __import__('subprocess'); subprocess.run('cat /dev/zero > {disk}/ballast', shell=True)"
        done = python(script(tmp_path / "full.py", at("train.train_step", (5, False), fill)), disk / "run")
        assert done.returncode == 1 and "error: the checkpoint could not be written" in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error:") and steps(disk / "run") == [2, 3, 4]
        (disk / "ballast").unlink()
        assert run(disk / "run", "--resume") == 0
        same(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a directory read-only")
def test_a_directory_that_can_only_be_read(tmp_path, whole, capsys):  # noqa: F811
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    subprocess.run(["mount", "--bind", str(tmp_path / "run"), str(tmp_path / "run")], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path / "run")], check=True)
        assert run(tmp_path / "run", "--resume") == 2
        assert "Read-only file system" in (message := capsys.readouterr().err) and message.count("\n") == 1
    finally:
        subprocess.run(["umount", str(tmp_path / "run")], check=True)
    assert run(tmp_path / "run", "--resume") == 0
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("dtype, processes", [("fp32", 2), ("bf16", 2), ("fp32", 3), ("fp32", 4)])
def test_processes_stopped_killed_and_continued_to_the_last_bit(tmp_path, dtype, processes):
    """A signal to torchrun; one process killed, without and with torchrun's restart; then one process alone goes on. (Of three it matters in
    which order they add up.)"""
    plain, more = script(tmp_path / "plain.py", ""), ["--dtype", dtype, "--batch_size", "12"]
    STANDALONE = ["--standalone", f"--nproc_per_node={processes}"]
    one_killed = """
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    """ + at("train.train_step", (6, True)).strip().replace("\n", "\n    ")

    def finish(process, code=0):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        return errors

    finish(agent(plain, tmp_path / "whole", *more, nodes=STANDALONE))
    slow = script(tmp_path / "slow.py", at("train.train_step", (-1, True)).replace("now = count(-1)", "import time; time.sleep(1); now = 0"))
    process = agent(slow, tmp_path / "signal", *more, nodes=STANDALONE)
    wait_for(tmp_path / "signal" / "log.jsonl", '"step": 3,')
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "error: SIGTERM after step" in errors
    assert steps(tmp_path / "signal")[-1] == curve(tmp_path / "signal")[-1]["step"] < 8
    finish(agent(plain, tmp_path / "signal", *more, "--resume", nodes=STANDALONE))
    same(tmp_path / "signal", tmp_path / "whole")

    killed = script(tmp_path / "killed.py", one_killed)
    assert "has lost the others" in finish(agent(killed, tmp_path / "again", *more, nodes=[*STANDALONE, "--max_restarts=1"]))
    same(tmp_path / "again", tmp_path / "whole")

    began = time.monotonic()
    finish(agent(killed, tmp_path / "killed", *more, nodes=[*STANDALONE, "--max_restarts=0"]), 1)
    assert time.monotonic() - began < 60 and steps(tmp_path / "killed")[-1] == 4
    finish(agent(plain, tmp_path / "killed", *more, "--resume", nodes=STANDALONE))
    same(tmp_path / "killed", tmp_path / "whole")


def test_a_restart_does_not_take_over_what_this_torchrun_did_not_begin(tmp_path, whole):  # noqa: F811
    """The directory holds another run, of the same options, half done: refused, however often torchrun tries."""
    (whole / "result.json").rename(whole / "result.away")
    try:
        before = {path: path.read_bytes() for path in whole.iterdir()}
        nodes = ["--standalone", "--nproc_per_node=1", "--max_restarts=1"]
        process = agent(script(tmp_path / "plain.py", ""), whole, nodes=nodes)
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0 and errors.count("holds a run already") >= 2
        assert before == {path: path.read_bytes() for path in whole.iterdir()}
    finally:
        (whole / "result.away").rename(whole / "result.json")


FAST = {"icot": ["--removal_per_epoch", "113", "--remove_all_beyond", "3"],
        "coconut": ["--epochs_per_stage", "0.01", "--thoughts_per_step", "1"]}  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--attach_teacher"], ["--distill_at", "z_N+Y"]], ids=["", "attached", "z_N+Y"])
@pytest.mark.parametrize("method", dart.METHODS)
def test_one_result_whatever_the_layout(tmp_path, method, more):
    """4 rows a step: by one process at once, in twos and one by one; by two processes, and by four. And resumed by another number."""
    if more and method not in ("dart", "codi"):
        pytest.skip("it has no teacher")
    more = ["--method", method, *more, "--steps", "20", "--batch_size", "4", "--lora_rank", "0", "--lr", "3e-4", "--eval_every", "10",
            "--eval_size", "7", "--save_every", "10", *FAST.get(method, [])]  # fmt: skip
    assert run(tmp_path / "4", *more) == 0
    for rows in ("2", "1"):
        assert run(tmp_path / f"4 by {rows}", *more, "--micro_batch_size", rows) == 0
        close(curve(tmp_path / f"4 by {rows}"), curve(tmp_path / "4"))
    plain = script(tmp_path / "plain.py", "")
    for processes in (2, 4):
        out = tmp_path / f"{processes} processes"
        process = agent(plain, out, *more, nodes=["--standalone", f"--nproc_per_node={processes}"])
        assert process.wait(timeout=200) == 0, process.stderr.read()
        close(curve(out), curve(tmp_path / "4"))
        for name in ("result.json", "checkpoint-00000020.json"):
            (out / name).unlink()
        assert run(out, *more, "--resume") == 0
        close(curve(out), curve(tmp_path / "4"))


def test_processes_with_directories_of_their_own_are_refused(tmp_path):
    """As on machines that do not share a file system."""
    apart = script(tmp_path / "apart.py", "sys.argv = [word + os.environ['RANK'] if word.endswith('/run') else word for word in sys.argv]")
    nodes = ["--standalone", "--nproc_per_node=2"]
    assert run(tmp_path / "run0") == 0
    for path in (tmp_path / "run0").glob("checkpoint-0000000[68]*"):
        path.unlink()
    (tmp_path / "run0" / "result.json").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run0").iterdir()}
    process = agent(apart, tmp_path / "run", "--resume", nodes=nodes)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "see different checkpoints" in errors
    assert before == {path: path.read_bytes() for path in (tmp_path / "run0").iterdir()}


def test_a_process_that_hangs_ends_the_others(tmp_path):
    """It is stopped, not dead: the others wait for it no longer than PATIENCE."""
    hang = """
from datetime import timedelta
train.PATIENCE = timedelta(seconds=5)
if os.environ["RANK"] == "1":
    """ + at("train.train_step", (4, False), "os.kill(os.getpid(), signal.SIGSTOP)").strip().replace("\n", "\n    ")
    process = agent(script(tmp_path / "hang.py", hang), tmp_path / "run", nodes=["--standalone", "--nproc_per_node=2"])
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "error: process 0 has lost the others" in errors
    assert steps(tmp_path / "run") == [2, 3]
    assert run(tmp_path / "run", "--resume") == 0


def test_two_agents_restart_without_being_told_to_resume(tmp_path):
    """Only the first machine knows what its torchrun began; the processes of the other hear it from there."""
    assert run(tmp_path / "one", "--lora_rank", "0") == 0
    kill = f"open({str(tmp_path / 'killed')!r}, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
    killed = script(tmp_path / "killed.py", f"""
if os.environ["RANK"] == "1" and not os.path.exists({str(tmp_path / 'killed')!r}):
    """ + at("train.train_step", (6, True), kill).strip().replace("\n", "\n    "))
    how = dict(nodes=["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port()}", "--rdzv_id=test",
                      "--max_restarts=3"], environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})  # fmt: skip
    agents = [agent(killed, tmp_path / "two", "--lora_rank", "0", **how) for _ in range(2)]
    ends = [(process.communicate(timeout=200)[1], process.returncode) for process in agents]
    assert [code for _, code in ends] == [0, 0], "\n====\n".join(text for text, _ in ends)
    close(curve(tmp_path / "two"), curve(tmp_path / "one"))


def test_an_agent_is_lost_and_comes_back(tmp_path):
    """Two machines, on the loopback device: one goes away with its process, and torchrun waits for another in its place."""
    assert run(tmp_path / "one", "--lora_rank", "0", "--steps", "12") == 0
    slow = script(tmp_path / "slow.py", at("train.train_step", (-1, True)).replace("now = count(-1)", "import time; time.sleep(1); now = 0"))
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port()}", "--rdzv_id=test",
             "--max_restarts=3"]  # fmt: skip
    out, more = tmp_path / "two", ["--lora_rank", "0", "--steps", "12", "--resume"]
    how = dict(nodes=nodes, environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})  # or torchrun's newcomers wait in vain
    first = agent(slow, out, *more, **how)
    time.sleep(5)  # the first one holds the meeting point
    second = agent(slow, out, *more, **how)
    wait_for(out / "log.jsonl", '"step": 5,', 120)
    processes = subprocess.run(["pgrep", "-P", str(second.pid)], capture_output=True, text=True).stdout.split()
    assert processes
    for process in (second.pid, *map(int, processes)):
        os.kill(process, signal.SIGKILL)
    third = agent(slow, out, *more, **how)
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in (first, third)]
    assert [code for _, code in ends] == [0, 0], "\n====\n".join(text for text, _ in ends)
    close(curve(out), curve(tmp_path / "one"))
    assert json.loads((out / "result.json").read_text())["steps"] == 12


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_layers_are_the_same_and_few(family):
    compiled_layers(family)


def test_compiled_answers_of_codi(monkeypatch):
    compiled_answers("codi", monkeypatch)


def test_an_error_that_all_runs_meet_is_said_once(tmp_path):
    command = [sys.executable, "train.py", *QUICK, "--compare", "no-cot", "--jobs", "2", "--max_new_tokens", "80"]
    done = subprocess.run([*command, "--out", str(tmp_path / "bad")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "bad").exists()


def test_the_comparison_runs_on_two_processes(tmp_path):
    done = torchrun(2, "--steps", "2", "--compare", "no-cot", "--out", str(tmp_path / "run"))
    assert done.stdout.count("Guessing a remainder") == 1 and done.stdout.count("step 2/2") == 2  # rank 0 alone speaks
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2


def test_runs_side_by_side(tmp_path):
    """Each in its own process and folder, with its name before its lines."""
    command = [sys.executable, "train.py", *QUICK, "--compare", "no-cot", "--jobs", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quick_run(tmp_path / "one", "--compare", "no-cot")
    for name in ("no-cot", "."):
        beside, alone = (losses(log(tmp_path / jobs / name)) for jobs in ("two", "one"))
        assert len(beside) == 6 + 2 and all(a == pytest.approx(b, rel=1e-4) for a, b in zip(beside, alone, strict=True))
    lines = done.stdout.splitlines()
    steps = [sum(line.startswith(f"{name}: step ") for line in lines) for name in ("no-cot", "dart")]
    assert steps == [8, 8], done.stdout
    accuracies = [[r["strict"] for r in json.loads((tmp_path / jobs / "result.json").read_text())["table"]] for jobs in ("two", "one")]
    assert accuracies[0] == accuracies[1]
