"""What happens when a run is killed, stopped, starved or given wrong files: a test a promise.

A run of a test is a process of its own, forked from one that has imported torch once. A fault hits
it at the n-th time that it opens, renames or removes a file of some name. `long.py` has more.
"""

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import FIXTURES, ROOT, log, same
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import dart
import data
import train

QUICK = "--compare --steps 6 --batch_size 8 --eval_size 7 --eval_every 3 --save_every 2".split()
QUICK += "--log_every 1 --device cpu --max_new_tokens 4".split()
CHECKPOINT = "checkpoint.safetensors"
KILL = partial(signal.raise_signal, signal.SIGKILL)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo"])


@dataclass
class At:
    """Does `what` when a file is opened, renamed or removed (an event of sys.addaudithook), before
    that is done, at the n-th file whose name ends so."""

    event: str
    name: str
    n: int
    what: Callable

    def __call__(self, event, arguments):
        if event == self.event and str(arguments[0]).endswith(self.name):
            self.n -= 1
            if self.n == 0:
                self.what()


def program(argv, fault):
    """train.py, in a process that was forked; a fault hits it before torchrun restarts it."""
    torch.set_num_threads(1)
    if fault and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        sys.addaudithook(fault)
    sys.argv = ["train.py", *argv]
    data.run_program(train.main)


def work(argv, output, errors, fault, processes, restarts):
    if output == "closed":  # as by `train.py | true`
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(output, os.O_WRONLY)
    os.dup2(writer, 1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    if not processes:
        return program(argv, fault)
    torchrun = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        max_restarts=restarts,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.1,
    )
    elastic_launch(torchrun, program)(argv, fault)


class Ended(NamedTuple):
    code: int
    output: str
    errors: str

    def refused(self, *words):
        """Whether it ended with exit code 2 and one line that has these words."""
        assert self.code == 2 and self.errors.startswith("error: "), self
        assert self.errors.count("\n") == 1 and all(word in self.errors for word in words), self
        return True


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """run(out, *options) -> Ended: train.py on a few problems of the built-in task. processes: of
    torchrun, which restarts them so often; output: a path, or closed; wait=False: the process."""
    directory = tmp_path_factory.mktemp("data")
    for split, n in (("train", 64), ("valid", 8), ("test", 8)):
        lines = [json.dumps(p._asdict()) for p in data.demo_problems(0)[split][:n]]
        (directory / f"{split}.jsonl").write_text("\n".join(lines))

    def run(out, *more, fault=None, processes=0, restarts=0, output="", wait=True):
        quick = QUICK[1:] if "--suite" in more else QUICK  # a suite has no --compare
        argv = [*quick, "--data", str(directory), "--out", str(out), *more]
        files = tmp_path_factory.mktemp("output")
        for name in ("output", "errors"):
            (files / name).touch()
        output = output or str(files / "output")
        arguments = (argv, output, str(files / "errors"), fault, processes, restarts)
        process = FORKS.Process(target=work, args=arguments)
        process.start()
        if not wait:
            return process
        process.join()
        return Ended(process.exitcode, *((files / n).read_text() for n in ("output", "errors")))

    run.data = directory
    return run


def saved_step(out):
    return dart.load_weights(out / CHECKPOINT)[1]["progress"]["step"]


def contents(directory):
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


LORA = ["--lora_rank", "4", "--lora_dropout", "0.3"]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run that nothing happens to, with dropout."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out, *LORA).code == 0
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """It again, but for the end."""
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "result.json").unlink()
    return tmp_path / "copy"


# -------------------------------------------------------------------------------- sudden ends


def test_killed_before_any_rename_and_resumed_a_run_is_the_same(run, tmp_path, whole):
    def killed(n):
        out = tmp_path / str(n)
        code = run(out, *LORA, fault=At("os.rename", "", n, KILL)).code
        assert code in (0, -signal.SIGKILL) and run(out, *LORA, "--resume").code == 0
        assert same(out, whole), n
        return code != 0

    with ThreadPoolExecutor(2) as pool:
        pairs = (pool.map(killed, (n, n + 1)) for n in itertools.count(1, 2))
        assert 2 * sum(itertools.takewhile(bool, map(all, pairs))) >= 12


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(run, tmp_path, whole, number, code):
    """It comes when step 4 is logged, behind four lines, one of them a validation's."""
    fault = At("open", "log.jsonl", 5, partial(signal.raise_signal, number))
    ended = run(tmp_path / "run", *LORA, fault=fault)
    name = signal.Signals(number).name
    assert ended.errors == f"error: {name} after step 5; --resume goes on from there\n"
    assert ended.code == code and saved_step(tmp_path / "run") == 5
    assert run(tmp_path / "run", *LORA, "--resume").code == 0
    assert same(tmp_path / "run", whole)


def interrupt_twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_a_second_sigint_ends_at_once(run, tmp_path):
    ended = run(tmp_path / "run", fault=At("open", "log.jsonl", 6, interrupt_twice))
    assert (ended.code, ended.errors) == (130, "error: interrupted\n")
    assert saved_step(tmp_path / "run") == 4 and log(tmp_path / "run")[-1]["step"] == 4


def test_a_signal_when_a_run_is_done_keeps_the_next_one_from_starting(run, tmp_path):
    fault = At("os.rename", "result.json.tmp", 1, partial(signal.raise_signal, signal.SIGTERM))
    ended = run(tmp_path / "run", "--compare", "no-cot", "--jobs", "1", fault=fault)
    assert (ended.code, ended.errors) == (143, "error: SIGTERM when a run was trained\n")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "no-cot"}


def terminate_rank_1():
    if os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_to_one_process_stops_all_and_saves(run, tmp_path):
    fault = At("open", "/proc/self/status", 4, terminate_rank_1)  # by `peak_memory`, in each step
    run(tmp_path / "run", fault=fault, processes=2)
    assert saved_step(tmp_path / "run") == log(tmp_path / "run")[-1]["step"] == 5


def test_a_half_written_line_of_the_log_is_cut_off(run, copy, whole):
    with open(copy / "log.jsonl", "a") as file:
        file.write('{"step": 6, "co')
    assert run(copy, *LORA, "--resume").code == 0 and same(copy, whole)


def test_a_kill_while_a_run_is_replaced_leaves_no_result_of_another(run, copy, whole):
    shutil.copy(whole / "result.json", copy)
    more = ["--lr", "1e-3", "--overwrite"]
    assert run(copy, *more, fault=At("os.remove", "log.jsonl", 1, KILL)).code == -signal.SIGKILL
    assert run(copy, "--lr", "1e-3", "--resume").code == 0
    assert dart.load_run(copy)[1].n_st == 8 and saved_step(copy) == 6


def test_a_kill_before_a_run_is_replaced_leaves_the_old_one(run, copy, whole):
    shutil.copy(whole / "result.json", copy)
    more = ["--lr", "1e-3", "--overwrite"]
    assert run(copy, *more, fault=At("os.remove", "result.json", 1, KILL)).code == -signal.SIGKILL
    assert run(copy, "--lr", "1e-3", "--resume").refused("lr 0.003 (here 0.001)")


# -------------------------------------------------------------------------- runs side by side


def alive(out):
    """Command lines of processes that have to do with a directory."""
    table = subprocess.check_output(["ps", "-Aww", "-o", "args="], text=True)
    return [line for line in table.splitlines() if str(out) in line]


def wait_for(condition, process=None):
    """Until the condition holds; the process must not end before."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end and (process is None or process.is_alive())
        time.sleep(0.05)


def holds(path, text):
    return path.is_file() and text in path.read_text()


def test_runs_side_by_side_end_with_their_parent_and_go_on(run, tmp_path):
    """It is killed, and when they go on, terminated. Meanwhile no other command may be in any of
    their directories."""
    out, steps = tmp_path / "run", {}
    folders = (out, out / "no-cot")
    more = ["--jobs", "2", "--batch_size", "2", "--eval_size", "0", "--save_every", "1"]
    more += ["--steps", "5000", "--compare", "no-cot", "--resume"]
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        parent = run(out, *more, wait=False)
        for folder in folders:
            step = steps.get(folder, 0) + 3
            wait_for(lambda: holds(folder / "log.jsonl", f'"step": {step},'), parent)
            assert run(folder, *more[:-3], "--resume").refused("another process is training in it")
        assert alive(out)
        os.kill(parent.pid, number)
        parent.join()
        assert parent.exitcode == code
        wait_for(lambda: not alive(out))
        for folder in folders:
            steps[folder] = saved_step(folder)
            assert [line["step"] for line in log(folder)] == list(range(1, steps[folder] + 1))
            assert not (folder / "result.json").exists()


def test_processes_of_torchrun_end_with_it(run, tmp_path):
    """They hold the lock as long as they live."""

    def unlocked():
        with contextlib.suppress(ValueError):
            os.close(train.lock(tmp_path / "run"))
            return True

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [ROOT / "train.py", *QUICK, "--steps=5000", f"--data={run.data}"]
    with open(tmp_path / "screen", "w") as screen:
        command.append(f"--out={tmp_path / 'run'}")
        torchrun = subprocess.Popen(command, stdout=screen, stderr=screen)
    wait_for(lambda: holds(tmp_path / "run" / "log.jsonl", '"step": 3,'))
    assert not unlocked()
    torchrun.kill()
    torchrun.wait()
    wait_for(unlocked)
    assert saved_step(tmp_path / "run") == log(tmp_path / "run")[-1]["step"] < 5000


@pytest.mark.parametrize("method", ["dart", "coconut"])
def test_two_processes_are_one(run, tmp_path, method):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--method", method, "--epochs_per_stage", "0.001", "--steps", "3"]
    assert run(one, *more).code == 0 and run(two, *more, processes=2).code == 0
    for ours, theirs in zip(log(two), log(one), strict=True):
        assert ours.pop("valid", None) == theirs.pop("valid", None)
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (dart.load_weights(out / "adapter.safetensors")[0] for out in (two, one))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------ faults of the machine


def test_a_full_disk_loses_nothing(run, tmp_path, whole):
    """From step 5 on no file may be longer than 20,000 bytes."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    ended = run(tmp_path / "run", *LORA, fault=At("open", "log.jsonl", 6, limit), restarts=0)
    out = tmp_path / "run"
    assert "step 6/6" in ended.output and saved_step(out) == 4
    assert ended.code == 1 and ended.errors.startswith("error: step 6: could not be written")
    assert ended.errors.count("\n") == 1 and not list(out.glob("*.tmp"))
    assert run(out, *LORA, "--resume").code == 0 and same(out, whole)


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(run, tmp_path):
    """The first step's update, of learning rate 1e18, makes the second step's loss infinite."""
    more = ["--lr", "1e18", "--eval_size", "0", "--save_every", "1"]
    ended = run(tmp_path / "run", *more)
    prepared = train.prepare(train.read_options([*QUICK, *more, "--data", str(run.data)]), "cpu")
    problems = list(train.global_batches(prepared))[1].tolist()
    assert ended.code == 1 and ended.errors.count("\n") == 1
    assert ended.errors.startswith("error: step 2: ") and f"problems {problems}" in ended.errors
    assert saved_step(tmp_path / "run") == 1


def test_torchrun_restarts_a_run_with_resume_and_it_goes_on(run, tmp_path):
    """Of two processes rank 0 is killed when it would log step 5; restarted, it goes on from 4."""
    assert run(tmp_path / "one").code == 0
    fault, out = At("open", "log.jsonl", 6, KILL), tmp_path / "two"
    ended = run(out, "--resume", fault=fault, processes=2, restarts=1)
    assert ended.code == 0, ended
    assert ended.output.count("step 4/6") == 1 and ended.output.count("step 5/6") == 1
    assert "find_unused_parameters" not in ended.errors
    for line, wanted in zip(log(out), log(tmp_path / "one"), strict=True):
        assert line.keys() == wanted.keys()
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, rel=1e-5), (name, line)


# --------------------------------------------------------------------------------- wrong files


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[-3] ^= 4
    if how == "edited":
        content = re.sub(rb'(progress\\": \{\\"step\\": )\d', rb"\g<1>9", content)
        assert content != path.read_bytes()
    path.write_bytes(content[: {"truncated": -100, "empty": 0}.get(how)])


@pytest.mark.parametrize("how", ["truncated", "flipped", "edited", "empty"])
def test_a_damaged_checkpoint_is_named_and_left_alone(run, copy, how):
    damage(copy / CHECKPOINT, how)
    before = contents(copy)
    assert run(copy, *LORA, "--resume").refused(f"{CHECKPOINT}: damaged")
    assert contents(copy) == before


def test_a_checkpoint_of_another_run_is_refused(run, copy, tmp_path):
    assert run(tmp_path / "other", *LORA, "--lr", "1e-4").code == 0
    shutil.copy(tmp_path / "other" / CHECKPOINT, copy)
    assert run(copy, *LORA, "--resume").refused(CHECKPOINT, "lr 0.0001 (here 0.003)")


@pytest.mark.parametrize("finished", [False, True])
def test_a_resumption_with_other_options_is_refused_with_their_names(run, copy, whole, finished):
    if finished:
        shutil.copy(whole / "result.json", copy)
    before = contents(copy)
    ended = run(copy, *LORA, "--resume", "--lr", "1e-4", "--seed", "9")
    assert ended.refused("lr 0.003 (here 0.0001)", "seed 0 (here 9)")
    assert contents(copy) == before


def test_a_resumption_with_other_data_is_refused(run, copy, tmp_path):
    other = shutil.copytree(run.data, tmp_path / "data")
    lines = (other / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join([*lines[1:], lines[0]]))
    assert run(copy, *LORA, "--resume", "--data", str(other)).refused("of another run: data ")


def test_a_resumption_with_other_base_weights_is_refused(run, tmp_path):
    base = shutil.copytree(FIXTURES / "llama", tmp_path / "base")
    more = ["--preset", "llama-3.2-1b", "--model", str(base), "--tokenizer", "demo", "--n_st", "2"]
    assert run(tmp_path / "run", *more).code == 0
    (tmp_path / "run" / "result.json").unlink()
    damage(base / "model.safetensors", "flipped")
    assert run(tmp_path / "run", *more, "--resume").refused("base weights '")


# ---------------------------------------------------------------------------- run directories


def test_two_commands_cannot_be_in_one_directory(run, copy, whole):
    """Nor in that of a comparison of which another run goes on."""
    shutil.copytree(whole, copy / "no-cot")
    before = contents(copy)
    with open(copy / "no-cot" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ended = run(copy, "--compare", "no-cot", "--overwrite")
    assert ended.refused("no-cot: another process is training in it")
    assert contents(copy) == before


def test_a_lock_lasts_as_long_as_the_processes_started_under_it(tmp_path):
    handle = train.lock(tmp_path)
    child = subprocess.Popen(["sleep", "600"], close_fds=False)
    os.close(handle)
    with pytest.raises(ValueError, match="another process is training in it"):
        train.lock(tmp_path)
    child.kill()
    child.wait()
    os.close(train.lock(tmp_path))


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_what_is_no_run_is_never_touched(run, tmp_path, more):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    shutil.copytree(FIXTURES / "llama", tmp_path / "model")  # it has a config.json, too
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    for name in ("other", "model", "file"):
        assert run(tmp_path / name, *more).refused(f"--out {tmp_path / name}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "more",
    [
        ["--lr", "1e-4"],  # without --overwrite
        ["--overwrite", "--batch_size", "65"],
        ["--overwrite", "--n_st", "80"],
        ["--overwrite", "--compare", "coconut", "--epochs_per_stage", "9"],
    ],
)
def test_a_run_is_not_given_up_for_one_that_cannot_start(run, copy, more):
    before = contents(copy)
    assert run(copy, *more).refused()
    assert contents(copy) == before


@pytest.mark.parametrize("make, name", [(os.mkdir, "vocab.json"), (os.mkfifo, "log.jsonl")])
def test_what_is_in_the_way_of_a_file_is_found_before_anything_is_deleted(run, copy, make, name):
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    before = contents(copy)
    for how in ("--overwrite", "--resume"):
        assert run(copy, how).refused(f"{name} is not a file")
    assert contents(copy) == before


def test_overwriting_replaces_the_run_and_nothing_else(run, copy, whole):
    (copy / "notes.txt").write_text("mine")
    (copy / "log.jsonl").write_text('{"step": 0}\n')
    (copy / "test.json").write_text("{}")
    assert run(copy, *LORA, "--overwrite").code == 0
    assert (copy / "notes.txt").read_text() == "mine"
    (copy / "notes.txt").unlink()
    assert same(copy, whole)


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "too long/" * 1000])
def test_a_directory_that_cannot_be_made_is_named(run, tmp_path, place):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / place).refused(place.strip("/").split("/")[0])


def test_files_may_be_read_by_those_whom_the_umask_lets(whole):
    mask = os.umask(0o022)
    os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in whole.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


# ------------------------------------------------------------------------------ one-line errors


def test_what_is_wrong_is_one_line_and_exit_code_2(run, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1 ?", "steps": []}\n')
    for more, words in (
        (["--no_such_option"], ["--no_such_option"]),
        (["--data", str(tmp_path)], ["train.jsonl:1", "answer"]),
        (["--preset", "gpt2", "--model", "openai/gpt2"], ["hf download openai/gpt2"]),
    ):
        assert run(tmp_path / "run", *more).refused(*words)


def test_ctrl_c_while_modules_are_imported_ends_without_a_word():
    for program in ("train.py", "eval.py", "data.py"):
        command = [sys.executable, str(ROOT / program), "--help"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        modules = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in modules.read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
        assert (process.returncode, output, errors) == (-signal.SIGINT, b"", b"")


def test_an_output_that_is_closed_or_full_ends_the_run_without_a_traceback(run, tmp_path):
    ended = run(tmp_path / "closed", output="closed")
    assert (ended.code, ended.errors) == (1, "")
    assert run(tmp_path / "full", output="/dev/full").refused("No space left on device")
