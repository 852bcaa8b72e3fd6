"""What happens when a run is killed, stopped, starved or fed damaged files: a short version of each fault. `long.py` has the matrix."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train

ROOT = Path(__file__).parent.parent
RUN = ["--compare", "--steps", "8", "--batch_size", "16", "--log_every", "1", "--eval_every", "3", "--eval_size", "8", "--save_every", "2",
       "--device", "cpu", "--jobs", "1", "--lora_rank", "4", "--lora_dropout", "0.3", "--keep_checkpoints", "3"]  # fmt: skip
TIMES = ("tokens_per_s", "seconds", "peak_memory", "padding")


def run(out, *more):
    """Trains in this process; returns the exit code."""
    try:
        train.main([*RUN, "--out", str(out), *more])
    except SystemExit as stop:
        return stop.code
    return 0


def curve(out):
    """The log without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def tensors(out):
    return {path.name: path.read_bytes() for path in Path(out).glob("*.safetensors")}


def steps(out):
    return train.saved_steps(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    assert run(out) == 0 and steps(out) == [4, 6, 8]
    return out


def same(out, whole):
    """Is a run, killed and resumed, the one that nothing happened to, to the last bit?"""
    assert curve(out) == curve(whole)
    assert tensors(out) == tensors(whole)
    assert not list(Path(out).glob("*.tmp"))


def script(path, fault):
    """A train.py to which `fault` (code; `count(n)` is true at its n-th call) is done."""
    path.write_text(f"""
import os, resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
import train
from data import run_program
calls = [0]
def count(n):
    calls[0] += 1
    return calls[0] == n
{fault}
if __name__ == "__main__":
    run_program(train.main)
""")
    return path


def at(where, moment, what="os.kill(os.getpid(), signal.SIGKILL)"):
    """Code that does `what` before the n-th call of a function, or `after` it (`moment`: (n, after))."""
    n, after = moment
    return f"""
import eval as evaluation
owner, name = {where.rpartition(".")[0]}, {where.rpartition(".")[2]!r}
def replaced(*arguments, original=getattr(owner, name), **more):
    now = count({n})
    if now and not {after}:
        {what}
    result = original(*arguments, **more)
    if now and {after}:
        {what}
    return result
setattr(owner, name, replaced)
"""


def python(path, out, *more, **how):
    return subprocess.run([sys.executable, str(path), *RUN, "--out", str(out), *more], capture_output=True, text=True, cwd=ROOT, **how)


# ---------------------------------------------------------------------------------------------------- sudden ends


@pytest.mark.parametrize("where, moment", [("train.save_file", (5, True)), ("os.replace", (8, True))],
                         ids=["in a save", "between the two files of a checkpoint"])  # at other moments: long.py  # fmt: skip
def test_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path, whole, where, moment):
    done = python(script(tmp_path / "killed.py", at(where, moment)), tmp_path / "run")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert run(tmp_path / "run", "--resume") == 0
    same(tmp_path / "run", whole)


def test_a_kill_while_the_directory_is_claimed_leaves_one_that_can_be_used(tmp_path, whole):
    done = python(script(tmp_path / "killed.py", at("os.replace", (1, False))), tmp_path / "run")
    assert done.returncode == -signal.SIGKILL and {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json.tmp"}
    assert run(tmp_path / "run") == 0
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, whole, monkeypatch, capsys, number, code):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        patch.setattr(train, "train_step", lambda *a, old=train.train_step:
                      (next(calls) == 5 and os.kill(os.getpid(), number), old(*a))[1])  # fmt: skip
        assert run(tmp_path / "run") == code
    message = capsys.readouterr().err
    assert message == f"error: {signal.Signals(number).name} after step 5; --resume goes on from step 5\n"
    assert steps(tmp_path / "run")[-1] == 5 and signal.getsignal(number) is before
    assert run(tmp_path / "run", "--resume") == 0
    assert curve(tmp_path / "run") == curve(whole)


def test_a_second_sigint_ends_at_once(tmp_path):
    twice = "os.kill(os.getpid(), 2); os.kill(os.getpid(), 2); raise SystemExit('went on')"
    done = python(script(tmp_path / "twice.py", at("train.learning_rate", (1, False), twice)), tmp_path / "run")
    assert done.returncode == -signal.SIGINT and "went on" not in done.stderr
    assert steps(tmp_path / "run") == []


def wait_for(path, text, seconds=60):
    """Until a file holds a text."""
    until = time.monotonic() + seconds
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < until, f"{path} does not come to {text!r}"
        time.sleep(0.05)


def test_runs_side_by_side_end_when_their_parent_is_gone(tmp_path):
    command = [sys.executable, "train.py", *RUN, "--steps", "5000", "--compare", "no-cot", "--jobs", "2", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name in (".", "no-cot"):
        wait_for(tmp_path / "run" / name / "log.jsonl", '"step": 1,')
    process.kill()
    process.wait()
    for name in (".", "no-cot"):
        for _ in range(600):
            with contextlib.suppress(ValueError):  # another process is training in it
                os.close(train.lock(tmp_path / "run" / name))
                break
            time.sleep(0.1)
        assert steps(tmp_path / "run" / name)[-1] == curve(tmp_path / "run" / name)[-1]["step"] < 5000


def test_a_signal_reaches_runs_side_by_side(tmp_path, whole):
    command = [sys.executable, "train.py", *RUN, "--steps", "2000", "--compare", "no-cot", "--jobs", "2", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for name in (".", "no-cot"):
        wait_for(tmp_path / "run" / name / "log.jsonl", '"step": 1,')
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143 and message.startswith("error: SIGTERM after step") and message.count("\n") == 1
    for name in (".", "no-cot"):
        assert steps(tmp_path / "run" / name)[-1] == curve(tmp_path / "run" / name)[-1]["step"]


# ---------------------------------------------------------------------------------------------- faults of the machine


def test_a_full_disk_loses_nothing(tmp_path, whole):
    """No file may grow beyond 2,000 bytes from the fifth step on."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    done = python(script(tmp_path / "full.py", at("train.train_step", (5, False), limit)), tmp_path / "run")
    assert done.returncode == 1 and done.stderr.startswith("error: the checkpoint could not be written"), done.stderr
    assert "--resume goes on from step 4" in done.stderr and done.stderr.count("\n") == 1
    assert "step 6: the checkpoint could not be written" in done.stdout and "--resume would from step 4" in done.stdout
    assert steps(tmp_path / "run") == [2, 3, 4] and not list((tmp_path / "run").glob("*.tmp"))
    assert run(tmp_path / "run", "--resume") == 0
    same(tmp_path / "run", whole)


def raises(error):
    raise error


@pytest.mark.parametrize("fault", [
    lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: raises(RuntimeError("CUDA error: out of memory")),
    lambda: raises(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling ...")), lambda: raises(OSError(12, "Cannot allocate memory"))],
    ids=["torch", "numpy", "cuda", "cublas", "system"])  # fmt: skip
def test_lack_of_memory_is_one_sentence_with_what_helps(tmp_path, whole, monkeypatch, capsys, fault):
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        patch.setattr(train, "train_step", lambda *a, old=train.train_step: old(*a) if next(calls) < 5 else fault())
        assert run(tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory: ") and message.count("\n") == 1
    assert all(flag in message for flag in ("--micro_batch_size", "--activation_checkpointing", "--resume"))
    assert run(tmp_path / "run", "--resume") == 0
    same(tmp_path / "run", whole)


def poison(step, calls=1):
    """A train_step whose gradient is not finite at a step."""
    seen = iter(range(1, 1000))

    def poisoned(wrapped, method, *rest, old=train.train_step):
        losses = old(wrapped, method, *rest)
        if step <= next(seen) < step + calls:
            method.model.layers[1].self_attn.q_proj.lora.lora_a.grad[0, 0] = float("nan")
        return losses

    return poisoned


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", poison(5))
        assert run(tmp_path / "run") == 1
    message = capsys.readouterr().err
    batch = list(train.global_batches(train.prepare(train.read_options(RUN), "cpu"), 4))[0]
    assert message.startswith("error: step 5: a loss or the gradient is not finite") and message.count("\n") == 1
    assert f"problems {' '.join(map(str, batch))} (the" in message and "--resume goes on from step 4" in message
    assert all(t.isfinite().all() for path in (tmp_path / "run").glob("*.safetensors") for t in load_file(path).values())
    assert run(tmp_path / "run", "--resume") == 0
    same(tmp_path / "run", whole)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    """Which a learning rate of 1e30 brings about."""
    assert run(tmp_path / "run", "--lr", "1e30", "--lora_rank", "0", "--eval_size", "0") == 1
    assert "a loss or the gradient is not finite" in (message := capsys.readouterr().err) and "|g| nan" in message
    assert not steps(tmp_path / "run") or steps(tmp_path / "run")[-1] < 8


def test_some_such_steps_may_be_left_out(tmp_path, monkeypatch, capsys):
    """Two in a row, with the count kept over a resumption, the step's weights as before; a third ends the run."""
    more = ["--skip_nonfinite", "2", "--keep_checkpoints", "8", "--save_every", "1", "--eval_size", "0"]
    for out, calls, code in (("two", 2, 0), ("three", 3, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", poison(5, calls))
            assert run(tmp_path / out, *more) == code
    assert json.loads((tmp_path / "two" / "result.json").read_text())["skipped"] == 2
    assert [line["step"] for line in curve(tmp_path / "two") if "skipped" in line] == [5, 6]
    assert len([line for line in curve(tmp_path / "two") if "cot" in line]) == 6
    first, second = (load_file(tmp_path / "two" / f"checkpoint-0000000{step}.safetensors") for step in (4, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "left out" in capsys.readouterr().out and steps(tmp_path / "three")[-1] == 6
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", poison(1))  # after step 6, of which the two are remembered
        assert run(tmp_path / "three", *more, "--resume") == 1


def test_a_step_left_out_where_the_optimizer_starts_anew_can_be_resumed(tmp_path, monkeypatch):
    """coconut's second stage begins with step 3."""
    more = ["--method", "coconut", "--epochs_per_stage", "0.014", "--thoughts_per_step", "1", "--skip_nonfinite", "1", "--save_every", "1",
            "--keep_checkpoints", "8", "--eval_size", "0"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", poison(3))
        assert run(tmp_path / "run", *more) == 0
    before = curve(tmp_path / "run")
    for path in [tmp_path / "run" / "result.json", *(train.checkpoint_path(tmp_path / "run", step) for step in range(4, 9))]:
        path.unlink()
    assert run(tmp_path / "run", *more, "--resume") == 0 and curve(tmp_path / "run") == before


def test_two_runs_cannot_be_in_one_directory(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    handle = train.lock(tmp_path / "run")
    assert run(tmp_path / "run", "--resume") == 2
    assert "another process is training in it" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    os.close(handle)
    assert run(tmp_path / "run", "--resume") == 0


def test_a_comparison_is_not_overwritten_while_one_of_its_runs_goes_on(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(whole, tmp_path / "run" / "no-cot")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    handle = train.lock(tmp_path / "run")
    assert run(tmp_path / "run", "--compare", "no-cot", "--overwrite") == 2 and "another process" in capsys.readouterr().err
    os.close(handle)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}


def test_a_run_that_another_process_took_further_meanwhile_is_left_alone(tmp_path, whole, monkeypatch, capsys):
    """It was resumed twice; the other one ended when this one had read the checkpoint."""
    shutil.copytree(whole, tmp_path / "run")
    for name in ("result.json", "checkpoint-00000008.json"):
        (tmp_path / "run" / name).unlink()
    late = whole / "checkpoint-00000008.json"
    monkeypatch.setattr(train, "claim", lambda run, world, old=train.claim: (shutil.copy(late, run.options.out), old(run, world)))
    assert run(tmp_path / "run", "--resume") == 2 and "has trained in it meanwhile" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a directory that even root cannot write to")
def test_a_directory_that_cannot_be_written_to_is_named(capsys):
    assert run("/proc/run") == 2
    message = capsys.readouterr().err
    assert "/proc/run" in message and message.count("\n") == 1


# ---------------------------------------------------------------------------------------------- damaged checkpoints


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:
        content[how if isinstance(how, int) else len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("end", ["safetensors", "json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path, whole, capsys, end, how):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    damage(tmp_path / "run" / f"checkpoint-00000008.{end}", how)
    if (end, how) != ("json", "gone"):  # without it there is no checkpoint
        assert run(tmp_path / "run", "--resume") == 2
        message = capsys.readouterr().err
        assert "checkpoint-00000008.json: damaged" in message and "checkpoint-00000006.json is whole" in message
        for path in (tmp_path / "run").glob("checkpoint-00000008.*"):
            path.unlink()
    assert run(tmp_path / "run", "--resume") == 0
    same(tmp_path / "run", whole)


def test_where_no_checkpoint_is_whole_that_is_said(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for path in (tmp_path / "run").glob("checkpoint-*.safetensors"):
        damage(path, "truncated")
    assert run(tmp_path / "run", "--resume") == 2 and "there is no other" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path, whole, capsys):
    """Of another method, of the same with other adapters, with other data."""
    for name, more, fields in (("pause", ["--method", "pause"], ("method 'pause' (here 'dart')", "rem_rank 0 (here 32)")),
                               ("rate", ["--lr", "1e-4"], ("lr 0.0001 (here 0.003)",)),
                               ("rank", ["--rem_rank", "8"], ("rem_rank 8 (here 32)",)), ("data", ["--seed", "5"], ("data '",))):  # fmt: skip
        assert run(tmp_path / name, "--steps", "2", "--eval_size", "0", *more) == 0
        shutil.copytree(whole, tmp_path / f"{name}2")
        (tmp_path / f"{name}2" / "result.json").unlink()
        for path in (tmp_path / name).glob("checkpoint-*"):
            shutil.copy(path, tmp_path / f"{name}2" / path.name.replace("00000002", "00000099"))
        capsys.readouterr()
        # its own name says another step, but that is not looked at before the owner
        assert run(tmp_path / f"{name}2", "--resume") == 2
        message = capsys.readouterr().err
        assert "is of another run" in message and all(field in message for field in fields), message


def test_another_base_model_in_the_same_place_is_refused(tmp_path, capsys):
    base = shutil.copytree(ROOT / "tests" / "fixtures" / "llama", tmp_path / "base")
    more = ["--preset", "llama-3.2-1b", "--model", str(base), "--tokenizer", "demo", "--data", "demo", "--rem_rank", "4", "--n_st", "2",
            "--max_new_tokens", "8", "--dtype", "fp32", "--steps", "3", "--save_every", "1"]  # fmt: skip
    assert run(tmp_path / "run", *more) == 0
    (tmp_path / "run" / "result.json").unlink()
    damage(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 2)
    assert run(tmp_path / "run", *more, "--resume") == 2
    assert "base weights '" in capsys.readouterr().err


def test_no_file_is_read_by_what_could_run_code():
    for name in ("dart.py", "model.py", "data.py", "train.py", "eval.py"):
        source = (ROOT / name).read_text()
        assert not re.search(r"pickle|torch\.(load|save)\b|\b(exec|__import__|marshal|shelve)\b|(?<!\.)\beval\(|allow_pickle", source), name


# ------------------------------------------------------------------------------------------ checkpoints, by and by


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files")
def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """... and so is its name, in the end: as many directories are synchronised."""
    seen = []
    monkeypatch.setattr(os, "fsync", lambda handle, real=os.fsync: (seen.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b, real=os.replace: (seen.append((str(a), str(b))), real(a, b)))
    assert run(tmp_path / "run", "--steps", "1", "--eval_size", "0") == 0
    files = [part for part in seen if isinstance(part, tuple)]
    assert {Path(name).name for _, name in files} == {"config.json", "words.json", "log.jsonl", "adapter.safetensors", "result.json",
                                                      "checkpoint-00000001.safetensors", "checkpoint-00000001.json"}  # fmt: skip
    new, log = str(tmp_path), str(tmp_path / "run" / "log.jsonl")  # and the directory's own name, and the log before what comes after it
    assert [part for part in seen if part not in (new, log)] == [part for a, b in files for part in (a, (a, b), str(tmp_path / "run"))]
    assert seen[0] == new and seen.index(log) < seen.index(files[-2]) and Path(files[-2][1]).name == "checkpoint-00000001.json"


def test_checkpoints_by_time_the_last_ones_and_the_best(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))  # each look is half a minute later
    more = ["--save_every", "100", "--save_minutes", "1.2", "--keep_checkpoints", "50"]
    assert run(tmp_path / "timed", *more, "--eval_size", "0") == 0 and steps(tmp_path / "timed") == [3, 6, 8]
    accuracies = iter((0.25, 0.5, 0.375, 0.5))
    monkeypatch.setattr(train, "validate", lambda *_: {"cot": 1.0, "st": next(accuracies)})
    out = tmp_path / "run"
    assert run(out, *more, "--save_minutes", "0", "--eval_every", "2") == 0
    assert steps(out) == [2, 4, 6, 8]  # before each evaluation
    best, content = load_file(out / "best.safetensors"), json.loads((out / "checkpoint-00000006.json").read_text())
    assert content["best"] == 0.5  # of step 4, whose weights those are
    assert not all(torch.equal(best[name], tensor) for name, tensor in load_file(out / "adapter.safetensors").items())
    from safetensors import safe_open

    with safe_open(out / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["about"])["step"] == 4


# -------------------------------------------------------------------------------------------------- several processes


def agent(path, out, *more, nodes=(), environment=()):
    """torchrun, with a script of ours in the place of train.py."""
    command = [sys.executable, "-m", "torch.distributed.run", *(nodes or ["--standalone"]), str(path), *RUN, "--out", str(out), *more]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)}, **how)


ONE_RANK = """
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    """


def close(found, wanted, tolerance=1e-5):
    """Curves of different numbers of processes."""
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for one, other in zip(found, wanted, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (name, one, other)


def test_a_lost_process_ends_the_others_and_torchrun_goes_on(tmp_path):
    """Rank 1 is killed in step 6; the command says nothing of resuming. The losses are those of one process."""
    assert run(tmp_path / "one", "--lora_rank", "0") == 0
    fault = at("train.train_step", (6, False)).strip().replace("\n", "\n    ")
    path = script(tmp_path / "killed.py", ONE_RANK + fault)
    process = agent(path, tmp_path / "two", "--lora_rank", "0", nodes=["--standalone", "--nproc_per_node=2", "--max_restarts=3"])
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "error: process 0 has lost the others of this run" in errors and "--resume" in errors
    assert output.count("step 3/8") == 1 and output.count("step 5/8") == 2  # from the checkpoint of step 4 on
    close(curve(tmp_path / "two"), curve(tmp_path / "one"))


def port():
    import socket

    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_two_agents_train_as_one(tmp_path):
    """Two machines, on the loopback device; only the process of rank 0 writes."""
    assert run(tmp_path / "one", "--lora_rank", "0", "--steps", "3", "--eval_size", "7") == 0
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port()}", "--rdzv_id=test"]
    path = script(tmp_path / "recorded.py", """
def write(what):
    if os.environ["RANK"] != "0":
        raise AssertionError(f"rank 1 writes {what}")
def watch(event, arguments):
    if event == "open" and "/two/" in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        write(arguments[0])
sys.addaudithook(watch)
train.save_file = lambda *arguments, real=train.save_file: (write(arguments[1]), real(*arguments))
""")
    agents = [agent(path, tmp_path / "two", "--lora_rank", "0", "--steps", "3", "--eval_size", "7", nodes=nodes) for _ in range(2)]
    for process in agents:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    close(curve(tmp_path / "two"), curve(tmp_path / "one"))


# ------------------------------------------------------------------------------------------------- less usual faults


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys):
    """An update may overflow though loss and gradient were finite."""
    monkeypatch.setattr(train, "learning_rate", lambda options, step, steps: 1e39 if step == 4 else 1e-3)
    assert run(tmp_path / "run", "--lora_rank", "0", "--save_every", "1", "--eval_size", "0") == 1
    assert "step 5: a weight is not finite" in (message := capsys.readouterr().err) and "goes on from step 4" in message
    assert steps(tmp_path / "run")[-1] == 4
    assert all(t.isfinite().all() for path in (tmp_path / "run").glob("*.safetensors") for t in load_file(path).values())


def test_a_lock_is_one_that_network_file_systems_have(tmp_path, monkeypatch):
    """They lock only what is open for writing. Where there are no locks at all, a run goes on."""

    def flock(handle, how, real=train.fcntl.flock):
        if train.fcntl.fcntl(handle, train.fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        return real(handle, how)

    monkeypatch.setattr(train.fcntl, "flock", flock)
    handle = train.lock(tmp_path / "new" / "run")
    with pytest.raises(ValueError, match="another process"):
        train.lock(tmp_path / "new" / "run")
    os.close(handle)
    monkeypatch.setattr(train.fcntl, "flock", lambda *_: raises(OSError(train.errno.ENOLCK, "No locks available")))
    os.close(train.lock(tmp_path / "new" / "run"))


def test_nothing_outside_is_written_through_a_link(tmp_path, whole):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    names = ["config.json.tmp", "result.json.tmp", "log.jsonl.tmp", "log.jsonl", "words.json", "adapter.safetensors.tmp", "best.safetensors",
             "checkpoint-00000008.json.tmp", "checkpoint-00000008.safetensors.tmp", "checkpoint-00000008.safetensors"]  # fmt: skip
    shutil.copytree(whole, tmp_path / "run")
    for name in ("result.json", "checkpoint-00000008.json"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "new").mkdir()
    for directory, some in (("run", names), ("new", names[:1])):
        for name in some:
            (tmp_path / directory / name).unlink(missing_ok=True)
            (tmp_path / directory / name).symlink_to(victim)
        assert run(tmp_path / directory, *["--resume"] * (directory == "run")) == 0
        assert victim.read_text() == "mine" and not (tmp_path / directory / "config.json").is_symlink()
        assert curve(tmp_path / directory)[-1] == curve(whole)[-1]


def test_a_line_of_the_log_that_did_not_fit_is_written_later(tmp_path, monkeypatch, capsys):
    """Of which a full disk took a part."""

    class Full:
        def __init__(self, path, how):
            self.file = open(path, how)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def truncate(self, size):
            self.file.truncate(size)

        def write(self, content):
            self.file.write(content[:5])
            self.file.flush()
            raise OSError(28, "No space left on device")

    log = train.Log(tmp_path / "log.jsonl", 0, 0, "run")
    log.write({"step": 1}, "one")
    with monkeypatch.context() as patch:
        patch.setitem(vars(train), "open", Full)
        log.write({"step": 2}, "two")
        log.write({"step": 3}, "three")
    assert capsys.readouterr().out.count("not in the log") == 2
    log.write({"step": 4}, "four")
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_the_best_weights_are_written_later_where_they_could_not_be(tmp_path, monkeypatch):
    accuracies = iter((0.25, 0.875, 0.5, 0.5))
    monkeypatch.setattr(train, "validate", lambda *_: {"cot": 1.0, "st": next(accuracies)})
    refused = []

    def save(tensors, path, step, real=train.save_tensors, **about):
        if path.name == "best.safetensors" and step == 4 and not refused:
            refused.append(step)
            raise OSError(28, "No space left on device")
        real(tensors, path, step, **about)

    monkeypatch.setattr(train, "save_tensors", save)
    assert run(tmp_path, "--eval_every", "2", "--keep_checkpoints", "9") == 0 and refused
    best, then = load_file(tmp_path / "best.safetensors"), load_file(tmp_path / "checkpoint-00000004.safetensors")
    assert all(torch.equal(tensor, then[name]) for name, tensor in best.items())
    assert json.loads((tmp_path / "checkpoint-00000006.json").read_text())["best"] == 0.875


def test_a_run_is_not_given_up_before_there_is_room_for_another(tmp_path, whole, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: raises(OSError(28, "No space left on device")))
    assert run(tmp_path / "run", "--overwrite") == 2 and "No space left" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_signal_in_the_last_validation_is_heeded(tmp_path, whole, monkeypatch, capsys):
    def validate(*arguments, real=train.validate):
        if (tmp_path / "run" / "checkpoint-00000008.json").is_file():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train, "validate", validate)
    assert run(tmp_path / "run") == 143 and "SIGTERM when all was trained" in capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").is_file() and curve(tmp_path / "run") == curve(whole)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes pipes")
@pytest.mark.parametrize("end", ["safetensors", "json"])
def test_a_pipe_in_the_place_of_a_checkpoint_is_not_waited_for(tmp_path, whole, capsys, end):
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run" / "result.json", tmp_path / "run" / f"checkpoint-00000008.{end}"):
        path.unlink()
    os.mkfifo(tmp_path / "run" / f"checkpoint-00000008.{end}")
    assert run(tmp_path / "run", "--resume") == (0 if end == "json" else 2)
    assert end == "json" or "checkpoint-00000006.json is whole" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adapter.safetensors", "best.safetensors"])
def test_weights_with_a_flipped_bit_are_not_evaluated(tmp_path, whole, capsys, name):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / name, (tmp_path / "run" / name).stat().st_size - 3)
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--ckpt", str(tmp_path / "run"), *["--best"] * (name[0] == "b")])
    assert stop.value.code == 2 and f"{name}: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "3", "{}"])
def test_a_result_that_is_none_is_named(tmp_path, whole, capsys, content):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text(content)
    assert run(tmp_path / "run", "--resume") == 2
    assert "result.json: not the result of a run" in (message := capsys.readouterr().err) and message.count("\n") == 1


def test_a_suite_is_not_put_into_a_run(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train.main(["--suite", "table3", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "a suite is in a directory of its own" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "words.json"])
def test_a_file_of_any_size_takes_no_memory(tmp_path, whole, capsys, name):
    shutil.copytree(whole, tmp_path / "run")
    os.truncate(tmp_path / "run" / name, 2**34)
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--ckpt", str(tmp_path / "run")])
    assert stop.value.code == 2 and name in (message := capsys.readouterr().err) and "more than 67108864 bytes" in message


def test_processes_that_see_different_things_do_not_begin(tmp_path, monkeypatch):
    """What they add up would be of different steps."""
    prepared = train.prepare(train.read_options([*RUN, "--out", str(tmp_path)]), "cpu")
    sent = []
    monkeypatch.setattr(train.dart, "all_reduce", lambda tensor, op=None: (sent.append(tensor), tensor)[1])
    train.check_same(prepared, "cpu")
    prepared.progress.step = 4
    monkeypatch.setattr(train.dart, "all_reduce", lambda tensor, op=None: torch.maximum(tensor, sent[0]))
    with pytest.raises(ValueError, match="different checkpoints, data or weights .this one is at step 4"):
        train.check_same(prepared, "cpu")


def test_what_one_process_meets_all_know(monkeypatch):
    """The first one that cannot go on says why, and nobody waits for it."""
    monkeypatch.setattr(train.dart, "all_reduce", lambda tensor, op: torch.tensor(1))
    for rank, text in ((0, ""), (1, "no such file"), (2, "")):
        with pytest.raises(train.Halt) as halt:
            train.attempt(lambda rank=rank: raises(ValueError("no such file")) if rank else 3, rank=rank, world=3, device="cpu")
        assert (str(halt.value), halt.value.code, halt.value.own) == (text, 2, False)


def test_only_what_this_torchrun_began_is_continued(tmp_path, monkeypatch):
    options = train.read_options([*RUN, "--out", str(tmp_path)])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for run_id, content, continued in ((None, None, False), ("a", None, True), ("a", {"started_by": "another"}, False), ("a", [], False)):
        if run_id:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        content = {"started_by": train.started_by()} if content is None else content
        (tmp_path / "config.json").write_text(json.dumps(content))
        options.resume = False
        train.continue_after_restart(options, 0, "cpu")
        assert options.resume == continued


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_problem_is_validated_once(monkeypatch, world):
    """However many there are to each process; those that are right are added up."""
    problems, right = [train.data.Problem(str(i), [], "") for i in range(9)], {"0", "3", "4", "8"}
    options = train.read_options(RUN)
    method, asked, sums = train.build(options, "cpu"), [], []
    monkeypatch.setattr(train.dart, "evaluate", lambda model, tokenizer, pathway, some, limit:
                        (asked.extend(some), [{"tolerant": p.question in right} for p in some])[1])  # fmt: skip
    monkeypatch.setattr(train.dart, "all_reduce", lambda tensor: (sums.append(tensor.item()), tensor)[1])
    for n in (1, 2, 5, 9):
        asked.clear()
        sums.clear()
        for rank in range(world):
            train.validate(method, problems[:n], options, rank, world)
        assert sorted(asked) == sorted(2 * problems[:n])  # through both pathways
        assert sum(sums) == 2 * sum(p.question in right for p in problems[:n])
