"""train.py: options, schedule, order and random numbers, steps, resumption, tables."""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, log, same
from torch.utils._python_dispatch import TorchDispatchMode

import dart
import data
import eval as evaluation
import train

SMALL = "--batch_size 8 --eval_size 6 --log_every 1 --max_new_tokens 4 --device cpu".split()


def options(*words):
    return train.read_options(["--compare", *SMALL, *words])


def main(out, *words):
    """A run of the built-in task in this process."""
    train.main(["--compare", *SMALL, "--out", str(out), *words])
    return out


def weights(out, file="adapter"):
    return dart.load_weights(out / f"{file}.safetensors")[0]


# ------------------------------------------------------------------------------------- options


FULL = dict(lora_rank=0, schedule="constant", weight_decay=0.01)


@pytest.mark.parametrize(
    "words, want",
    [
        ("--preset llama-3.2-1b", dict(lr=8e-4, epochs=10, n_st=20, distill_weight=20.0)),
        ("--preset llama-3.2-1b", dict(lora_rank=128, lora_alpha=32.0, rem_rank=128, dtype="bf16")),
        ("--preset llama-3.2-1b", dict(rem_alpha=32.0, lora_dropout=0.1, warmup=0.03)),
        ("--preset llama-3.2-1b", dict(batch_size=128, weight_decay=0.1, grad_clip=2.0)),
        ("--preset llama-3.2-3b", dict(lr=5e-4, epochs=10)),
        ("--preset qwen2.5-1.5b", dict(lr=5e-4, epochs=10, schedule="cosine")),
        ("--preset gpt2", dict(lr=2e-3, epochs=40)),
        # CODI's own scripts (Shen et al. 2025)
        ("--preset gpt2 --method codi", dict(lr=3e-3, distill_weight=1.0, codi_form="authors")),
        ("--preset llama-3.2-1b --method codi", dict(lr=8e-4, distill_weight=20.0, epochs=10)),
        ("--preset llama-3.2-1b --method codi", dict(n_latents=6, distill_norm="auto")),
        ("--preset gpt2 --lr 1e-4", dict(lr=1e-4)),
        # All weights are trained. Coconut: 1e-4, decay 0.01, 25 epochs of CoT before (GPT-2, Hao et
        # al. 2024), 1e-5 on 1 B models (Shen et al. 2025); iCoT: 5e-5 (GPT-2), 1e-5 (7 B).
        ("--preset gpt2 --method coconut", FULL | dict(lr=1e-4, cot_epochs=20.0)),
        ("--preset gpt2 --method icot", FULL | dict(lr=5e-5)),
        ("--preset llama-3.2-1b --method coconut", FULL | dict(lr=1e-5, max_stage=3)),
        ("--preset llama-3.2-1b --method coconut", dict(cot_epochs=5.0, epochs_per_stage=1.0)),
        ("--preset llama-3.2-1b --method icot", FULL | dict(lr=1e-5, remove_all_beyond=39)),
        ("--preset llama-3.2-1b --method icot", dict(removal_smoothing=4.0, removal_per_epoch=8.0)),
        ("--preset llama-3.2-1b --suite table1", dict(lora_rank=128, schedule="cosine")),
        ("--preset smollm2-135m", dict(data="calls", lora_rank=32, rem_rank=32)),
        ("--preset smollm2-135m", dict(distill_weight=20.0, distill_norm="auto")),  # the paper's
        ("", dict(method="dart", lr=3e-3, steps=3000, lora_rank=0, compare=("no-cot", "pause"))),
        ("", dict(weight_decay=1.0, beta2=0.98, batch_size=64, n_st=8, distill_weight=5.0)),
        ("--method codi", dict(distill_weight=20.0)),
        ("--preset gpt2 --method coconut", dict(epochs_per_stage=3.0, max_new_tokens=256)),
        ("--preset smollm2-135m", dict(lr=1e-3, batch_size=32, steps=400, warmup=0.2)),
        ("--epochs 3", dict(epochs=3, steps=0)),
        ("--compare none", dict(compare=())),
        ("--method icot", dict(lr=2e-3, removal_per_epoch=0.3)),
    ],
)
def test_options_of_a_preset(words, want):
    words = words.split() + (["--model", "/base"] if "preset" in words else [])
    found = train.read_options(words)
    assert {name: getattr(found, name) for name in want} == want


@pytest.mark.parametrize(
    "words, message",
    [
        ("--preset gpt3", "choose from 'llama-3.2-1b'"),
        ("--preset gpt2", "--model DIR is missing"),
        ("--model /base", "--preset go together"),
        ("--method cod", "invalid choice|there are"),
        ("--compare cod", "--compare cod"),
        ("--suite table1 --overwrite", "--suite goes with neither"),
        ("--suite table1 --method cot", "--suite goes with neither"),
        ("--seeds 2", "--seeds goes with --suite alone"),
        ("--resume --overwrite", "contradict"),
        ("--steps 5 --epochs 2", "contradict"),
        ("--rem_is_lora --rem_rank 0", "needs a --rem_rank"),
        ("--lr -1", "--lr -1"),
        ("--lr nan", "--lr nan"),
        ("--batch_size 0", "--batch_size 0"),
        ("--lora_dropout 1", "--lora_dropout"),
        ("--n_stt 4", "--n_stt"),
    ],
)
def test_options_that_are_wrong_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        train.read_options(words.split())


def test_a_directory_does_not_hide_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "svamp", "own"):
        (tmp_path / name).mkdir()
    found = [options("--data", name).data for name in ("demo", "svamp", "own", "./svamp")]
    assert found == ["demo", "svamp", str(tmp_path / "own"), str(tmp_path / "svamp")]
    assert options().model == "demo" and options().tokenizer == "demo"
    (tmp_path / "calls").touch()  # nor does a file
    assert len(train.split_problems(options("--data", "calls"))[0]) == 1500


def test_learning_rate_warms_up_and_falls_as_half_a_cosine():
    chosen = options("--lr", "1", "--warmup", "0.1")
    rates = [train.learning_rate(chosen, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    cosine = [0.5 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(10, 100)]
    assert rates[10:] == pytest.approx(cosine) and rates[10] == 1.0
    constant = options("--lr", "1", "--schedule", "constant", "--warmup", "0")
    assert {train.learning_rate(constant, step, 9) for step in range(9)} == {1.0}


# ------------------------------------------------------------------- order and random numbers


def prepared(*words):
    return train.prepare(options("--steps", "8", *words), "cpu")


def test_a_file_is_the_training_split_but_for_its_last_problems(tmp_path):
    problems = data.demo_problems(0)["train"][:30]
    lines = [json.dumps(problem._asdict()) for problem in problems]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    words = ("--data", str(tmp_path / "own.jsonl"), "--batch_size", "8", "--eval_size")
    run = prepared(*words, "10")
    assert (run.problems, run.valid) == (problems[:20], problems[20:])
    run = prepared(*words, "0")
    assert (run.problems, run.valid) == (problems, [])
    shutil.copy(tmp_path / "own.jsonl", tmp_path / "train.jsonl")  # a directory without valid
    chosen = options("--data", str(tmp_path), "--eval_size", "0")
    assert train.split_problems(chosen) == (problems, [])
    assert train.split_problems(options("--seed", "3"))[0] == data.load("demo", "train", 3)
    words += ("10", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run"), "--compare")
    train.main([*words])
    with pytest.raises(ValueError, match="--data is missing: .*own.jsonl is what the run was"):
        evaluation.main(["--ckpt", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="--test_data is missing: .*own.jsonl is what is"):
        train.main([*words, "cot", "--overwrite"])
    with pytest.raises(ValueError, match="--test_data goes with --compare and --suite alone"):
        train.main([*words, "--overwrite", "--test_data", "demo"])


def test_more_processes_than_gpus_are_refused_by_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--nproc_per_node=2: only 1 GPUs are there"):
        train.start_processes("auto")
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: {}[device])
    with pytest.raises(KeyError, match="cuda:1"):  # on a second machine, too
        train.start_processes("auto")


def test_empty_cots_are_counted_and_nothing_but_them_is_refused(tmp_path, capsys):
    """The built-in task's have two steps; here some have one, which DART drops, or none."""
    problems = data.demo_problems(0)["train"][:16]

    def write(*steps):
        records = [problem._replace(steps=problem.steps[:n]) for problem, n in zip(problems, steps)]
        lines = [json.dumps(record._asdict()) for record in records]
        (tmp_path / "own.jsonl").write_text("\n".join(lines))

    words = ["--data", str(tmp_path / "own.jsonl"), "--batch_size", "8", "--eval_size", "0"]
    words += ["--compare", "--steps", "1", "--device", "cpu", "--out"]
    write(*[2] * 10, *[1] * 4, 0, 0)
    train.main([*words, str(tmp_path / "run")])
    assert "6 of 16 CoTs are empty (2 with --last_step keep)" in capsys.readouterr().out
    write(*[1] * 14, 0, 0)
    with pytest.raises(ValueError, match="all CoTs are empty; with --last_step keep 14"):
        train.main([*words, str(tmp_path / "other")])
    train.main([*words, str(tmp_path / "keep"), "--last_step", "keep"])
    train.main([*words, str(tmp_path / "no-cot"), "--method", "no-cot"])


def test_every_process_takes_its_share_of_the_same_batch(monkeypatch):
    """Batches, stages' random numbers and dropout's seeds are those of one process."""
    words = ("--method", "icot", "--removal_per_epoch", "99", "--remove_all_beyond", "3")
    words += ("--micro_batch_size", "2")
    run, parts = prepared(*words), []
    indices = next(train.global_batches(run))
    whole = train.micro_batches(run, 3, indices)
    tokens, flops = run.progress.tokens, run.progress.flops["icot"]
    for rank in range(2):
        run.rank, run.world = rank, 2
        parts += train.micro_batches(run, 3, indices)
    assert len(whole) == len(parts) == 4 and run.progress.tokens == 3 * tokens
    assert run.progress.flops["icot"] == pytest.approx(3 * flops)
    monkeypatch.setattr(train, "rank_and_world", lambda: (0, 3))
    with pytest.raises(ValueError, match="--batch_size 8: .*, 3 processes"):
        prepared()
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.seed == theirs.seed and ours.share == 2 * theirs.share == 0.5
        assert torch.equal(ours.batches["icot"].ids, theirs.batches["icot"].ids)


def test_dropout_has_another_seed_in_every_step_and_micro_batch():
    run = prepared("--micro_batch_size", "4")
    indices = next(train.global_batches(run))
    seeds = [m.seed for step in range(1, 6) for m in train.micro_batches(run, step, indices)]
    run.options.seed, run.progress.flops = 1, {}
    micros = train.micro_batches(run, 1, indices)
    seeds += [m.seed for m in micros]
    counts = [(m.batches["st"].lengths, len(m.batches["st"].weights)) for m in micros]
    flops = sum(run.model.training_flops(*count, silent=True) for count in counts)
    assert run.progress.flops["st"] == flops
    assert len(set(seeds)) == len(seeds) == 12


def test_every_pass_begins_with_the_seed_of_its_micro_batch(tmp_path, monkeypatch):
    """In training mode, also behind a validation."""
    seen, forward = [], dart.Method.forward

    def note(method, pathway, batch):
        seen.append((pathway, torch.initial_seed(), method.model.training))
        return forward(method, pathway, batch)

    monkeypatch.setattr(dart.Method, "forward", note)
    words = ["--steps", "3", "--micro_batch_size", "4", "--eval_every", "1"]
    main(tmp_path / "run", *words)
    run, want = prepared(*words), []
    for step, indices in zip(range(1, 4), train.global_batches(run)):
        seeds = [micro.seed for micro in train.micro_batches(run, step, indices)]
        want += [(pathway, seed, True) for pathway in ("cot", "st") for seed in seeds]
    assert seen == want


def test_micro_batches_hold_the_examples_of_their_stage():
    """Here iCoT removes one token more in each step, and from the fourth on all but `Answer:`. How
    many more they are in some examples differs from step to step."""
    words = "--method icot --removal_per_epoch 227 --remove_all_beyond 3".split()

    def removed(run, step):
        (micro,) = train.micro_batches(run, step, range(8))
        lengths = micro.batches["icot"].lengths.tolist()
        return [len(e.ids) - n for e, n in zip(run.examples["icot"], lengths)]

    run = prepared(*words, "--removal_smoothing", "0")
    all_tokens = [e.y_start - e.z_start - 2 for e in run.examples["icot"][:8]]
    want = [8 * [0], 8 * [1], 8 * [2], all_tokens]
    assert [removed(run, step) for step in (1, 2, 3, 4)] == want
    run = prepared(*words, "--removal_smoothing", "0.3")
    ahead = [[n - step + 1 for n in removed(run, step)] for step in (1, 2, 3)]
    assert min(sum(ahead, [])) >= 0 and ahead[0] != ahead[1] != ahead[2]
    before, run.options.seed = removed(run, 2), 1
    assert removed(run, 2) != before


def test_global_batches_go_on_where_a_run_stopped():
    run = prepared("--steps", "500")
    batches = [batch.tolist() for batch in train.global_batches(run)]
    other = prepared("--seed", "1")
    assert not torch.equal(other.model.embed_tokens, run.model.embed_tokens)
    assert next(train.global_batches(other)).tolist() != batches[0]
    assert len(batches) == 500 and run.steps_per_epoch == 227
    assert train.prepare(options("--epochs", "3"), "meta").steps == 3 * 227
    assert sorted(sum(batches[:227], [])) != sorted(sum(batches[227:454], []))  # the rest differs
    assert len(set(sum(batches[:227], []))) == 227 * 8
    for step in (1, 227, 300):
        run.progress.step = step
        assert [batch.tolist() for batch in train.global_batches(run)] == batches[step:]


# --------------------------------------------------------------------------------------- steps


def test_steps_are_those_of_a_plain_loop(tmp_path):
    """AdamW with the betas given, weight decay on matrices only, clipping, the learning rate of
    each step, the losses of `dart.DART`."""
    words = "--steps 4 --grad_clip 0.5 --weight_decay 0.3 --beta2 0.9 --lr 0.01".split()
    out = main(tmp_path / "run", *words, "--eval_size", "0")
    run = prepared(*words)
    named = dict(run.method.model.named_parameters())
    matrices = [p for p in named.values() if p.dim() == 2]
    groups = [dict(params=matrices, weight_decay=0.3)]
    groups += [dict(params=[p for p in named.values() if p.dim() < 2], weight_decay=0.0)]
    optimizer, rates = torch.optim.AdamW(groups, betas=(0.9, 0.9), eps=1e-8), []
    for step, indices in enumerate(list(train.global_batches(run))):
        examples = ([run.examples[name][i] for i in indices] for name in ("cot", "st"))
        cot, st = (data.collate(some, 1) for some in examples)
        (loss_cot, h_cot), (loss_st, h_st) = run.method("cot", cot), run.method("st", st)
        distill = dart.distill_loss(h_cot.detach(), h_st)
        (loss_cot + loss_st + 5.0 * distill).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(run.options, step, 4)
        rates.append(group["lr"])
        optimizer.step()
        optimizer.zero_grad()
        assert log(out)[step]["distill"] == pytest.approx(distill.item(), rel=1e-5)
    for name, tensor in weights(out).items():
        torch.testing.assert_close(tensor, named[name], rtol=1e-4, atol=1e-5)
    assert [line["lr"] for line in log(out)] == rates
    free, far = (
        main(tmp_path / clip, "--steps", "1", "--eval_size", "0", "--grad_clip", clip)
        for clip in ("0", "1e9")
    )
    assert all(torch.equal(weights(free)[name], w) for name, w in weights(far).items())
    assert log(free)[0]["grad_norm"] == log(far)[0]["grad_norm"] > 0.5


def test_micro_batches_change_no_loss(tmp_path):
    words = ["--steps", "3", "--eval_size", "0"]
    whole = log(main(tmp_path / "whole", *words))
    for size in ("3", "1"):
        parts = log(main(tmp_path / size, *words, "--micro_batch_size", size))
        for ours, theirs in zip(parts, whole, strict=True):
            for name in ("cot", "st", "distill"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-6)


def test_the_optimizer_starts_anew_at_each_stage(tmp_path):
    words = ["--method", "coconut", "--max_stage", "2", "--epochs_per_stage", "0.01"]
    out = main(tmp_path / "run", *words, "--steps", "8", "--eval_size", "0")
    run = prepared(*words)
    stages = [train.stage_of(run, step) for step in range(1, 9)]
    assert stages == [0, 0, 0, 1, 1, 2, 2, dart.FINAL_STAGE]
    progress = dart.load_weights(out / "checkpoint.safetensors")[1]["progress"]
    assert progress["step"] == 8 and weights(out, "checkpoint")["optimizer.0.step"] == 1
    with pytest.raises(ValueError, match="schedule takes more than 7 steps"):
        prepared(*words, "--steps", "7")
    with pytest.raises(ValueError, match="but the model has 80 positions"):  # in the last stage
        prepared(*words, "--latents_per_step", "30", "--eval_size", "0")


def test_a_validation_counts_numbers_and_takes_no_time(tmp_path, monkeypatch):
    """Also at the end of a short run."""

    def evaluate(model, tokenizer, pathway, problems, *_, **more):
        clock[0] += 1000
        return len(problems) * [dict(exact=False, numeric=True)]

    def now():
        clock[0] += 1
        return clock[0]

    clock = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", now)
    monkeypatch.setattr(dart, "evaluate", evaluate)
    out = main(tmp_path / "run", "--steps", "5", "--eval_every", "2", "--method", "no-cot")
    result = train.read_json(out / "result.json")
    assert result["valid"] == {"no-cot": 1.0} and result["seconds"] < 1000 < 3000 < clock[0]


def test_best_weights_are_those_of_the_best_validation(tmp_path):
    words = ["--steps", "6", "--eval_every", "1", "--eval_size", "40", "--save_every", "1"]
    out = main(tmp_path / "run", *words)
    shares = [line["valid"]["st"] for line in log(out) if "valid" in line]
    _, about = dart.load_weights(out / "best.safetensors")
    assert about["progress"]["best"] == max(shares) and len(shares) == 6
    assert about["progress"]["step"] == 1 + shares.index(max(shares))
    method, _ = dart.load_run(out, best=True)
    valid = data.load("demo", "valid", 0)[:40]
    records = dart.evaluate(method.model, method.tokenizer, method.pathways["st"], valid, 4)
    assert np.mean([record["numeric"] for record in records]) == max(shares)


def test_weights_that_were_not_written_are_not_the_best(tmp_path, monkeypatch):
    def save(path, tensors, **about):
        if path.name == "best.safetensors" and about["progress"]["step"] == 1:
            raise OSError("the disk is full")
        write(path, tensors, **about)

    write = dart.save_weights
    monkeypatch.setattr(dart, "save_weights", save)
    words = ["--lr", "0", "--steps", "2", "--eval_every", "1", "--eval_size", "20"]
    out = main(tmp_path / "run", *words)  # both validations are equal
    assert dart.load_weights(out / "best.safetensors")[1]["progress"]["step"] == 2


# ---------------------------------------------------------------------------------- resumption

ICOT = "--method icot --removal_per_epoch 40 --remove_all_beyond 3 --steps 20"
ANEW = "--method icot --removal_per_epoch 227 --remove_all_beyond 1 --steps 6"  # at step 2
LORA = f"--preset llama-3.2-1b --model {FIXTURES / 'llama'} --tokenizer demo --data demo"
LORA += " --lora_rank 4 --rem_rank 4 --n_st 2 --dtype bf16 --lora_dropout 0.3 --steps 6"


@pytest.mark.parametrize(
    "words", ["--steps 6", ICOT, ANEW, LORA], ids=["dart", "icot", "optimizer-anew", "lora-bf16"]
)
def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path, monkeypatch, words):
    """It stops after three steps, of which the last one is not in a checkpoint."""
    words = [*words.split(), "--eval_every", "5", "--save_every", "2"]
    whole = main(tmp_path / "whole", *words)
    out, log_step = tmp_path / "run", train.log_step

    def stop(run, *arguments):
        log_step(run, *arguments)
        if run.progress.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "log_step", stop)
        main(out, *words, "--resume")
    assert len(log(out)) == 3
    assert same(main(out, *words, "--resume"), whole)
    before = (out / "result.json").read_text()
    main(out, *words, "--resume")
    assert (out / "result.json").read_text() == before


def test_options_that_a_method_does_not_read_may_differ(tmp_path):
    words = ["--method", "no-cot", "--steps", "2", "--resume"]
    out = main(tmp_path / "run", *words)
    main(out, *words, "--n_latents", "9", "--distill_weight", "3", "--micro_batch_size", "4")
    result = (out / "result.json").read_text()
    (out / "result.json").write_text(result.replace('"lr": 0.003', '"lr": 0.004'))
    with pytest.raises(ValueError, match="result.json: of another run: lr 0.004"):
        main(out, *words)
    with pytest.raises(ValueError, match="of another run: lr 0.003"):
        main(out, *words, "--lr", "0.1")
    names = "schedule warmup weight_decay beta2 grad_clip batch_size steps eval_every eval_size"
    fingerprint = prepared().fingerprint
    assert {*names.split(), "seed", "dtype"} <= fingerprint.keys()
    assert prepared("--eval_size", "5").fingerprint["data"] != fingerprint["data"]


# ----------------------------------------------------------------------- comparisons and suites


def test_a_comparison_ends_in_a_table(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--compare", "no-cot", "--steps", "2", "--jobs", "2"]
    train.main([*SMALL, "--out", str(out), *words])
    rows = json.loads((out / "table.json").read_text())["demo"]
    named = [(row["row"], row["pathway"]) for row in rows]
    assert named == [("no-cot", "no-cot"), ("dart", "st"), ("dart", "cot")]
    assert all(row["n"] == 500 and {"exact", "train", "passes", "ms"} <= row.keys() for row in rows)
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out and "Guessing a remainder is right in 23.0 %" in text


@pytest.mark.parametrize("method", ["dart", "coconut"])
def test_a_dry_run_says_what_the_run_takes_and_leaves_nothing(
    tmp_path, method, capsys, monkeypatch
):
    words = ["--method", method, "--steps", "6", "--epochs_per_stage", "0.004"]
    words += ["--micro_batch_size", "4"]
    out = main(tmp_path / "run", *words, "--dry_run")
    titles, _, cells = capsys.readouterr().out.splitlines()
    assert not out.exists() and "FLOP" in titles and f"| {method} " in cells
    plan = train.planned(train.checked_run(options(*words, "--out", str(out)), "meta"))
    once = len(bytearray(2**31))  # 2 GiB that the process held before, and the run does not
    result = train.read_json(main(out, *words) / "result.json")
    assert result["peak_memory"] < once
    for name in ("trained_parameters", "steps", "tokens"):
        assert plan[name] == result[name]
    assert plan["all_flops"] == pytest.approx(sum(result["flops"].values()))
    monkeypatch.setattr(train, "SAMPLED", 3)  # of six steps
    part = train.planned(prepared(*words))
    for name in ("tokens", "all_flops"):
        assert part[name] == pytest.approx(plan[name], rel=0.2)


class Memory(TorchDispatchMode):
    """Within, the bytes that tensors made here hold, and their peak."""

    def __init__(self, known):
        super().__init__()
        self.held, self.peak = weakref.WeakSet(known), 0
        self.now = 0

    def drop(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.held:
                self.held.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage.nbytes())
        return result


LORA_8 = "--method dart --lora_rank 8"
COSTS = ["--method no-cot", "--method dart", "--method dart --attach_teacher", "--method codi"]
COSTS += [LORA_8, f"{LORA_8} --rem_is_lora --dtype bf16", f"{LORA_8} --activation_checkpointing"]


@pytest.mark.parametrize("words", COSTS)
def test_the_expected_memory_is_what_a_step_takes(words):
    run = train.prepare(options("--batch_size", "64", *words.split()), "cpu")
    lengths = np.array([[len(e.ids) for e in some] for some in run.examples.values()])
    batch = max(train.global_batches(run), key=lambda indices: lengths[:, indices].max())

    def forward(pathway, micro, sync):
        return run.method(pathway, micro.batches[pathway])

    parameters = list(run.method.parameters())
    with Memory([p.untyped_storage() for p in parameters]) as memory:
        run.method.training_step(forward, train.micro_batches(run, 1, batch))
    fixed = sum(p.nbytes + 8 * p.numel() * p.requires_grad for p in parameters)
    assert train.expected_memory(run) == pytest.approx(fixed + memory.peak, rel=0.2)


def test_every_row_of_a_suite_is_checked_before_the_first_one_trains(tmp_path):
    out = tmp_path / "suite"
    with pytest.raises(ValueError, match="coconut: its schedule takes more than 40 steps"):
        train.main(["--suite", "table1", "--steps", "40", "--out", str(out)])
    assert not out.exists()


def test_a_missing_test_split_is_missed_before_the_training(tmp_path):
    lines = [json.dumps(p._asdict()) for p in data.demo_problems(0)["train"][:9]]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    words = ["--data", str(tmp_path), "--compare", "no-cot", "--steps", "2"]
    with pytest.raises(FileNotFoundError, match="test.jsonl: no such file"):
        train.main([*SMALL, *words, "--out", str(tmp_path / "out")])
    (tmp_path / "test.jsonl").write_text('{"question": "zebra", "answer": "1"}')
    with pytest.raises(ValueError, match=", test: 'zebra' is not in the vocabulary"):
        train.main([*SMALL, *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_is_replaced_can_be_resumed(tmp_path, monkeypatch):
    words = ["--compare", "no-cot", "--jobs", "1", "--out", str(tmp_path), "--steps"]
    train.main([*SMALL, *words, "1"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train", lambda run: signal.raise_signal(signal.SIGINT) or 1 / 0)
        patch.setattr(train, "noting_signals", contextlib.nullcontext)
        train.main([*SMALL, *words, "2", "--overwrite"])
    train.main([*SMALL, *words, "2", "--resume"])
    assert train.read_json(tmp_path / "result.json")["steps"] == 2


def test_a_run_beside_others_that_is_killed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text("kill -9 $$")
    monkeypatch.setattr(train.sys, "executable", "sh")
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="1"):
        train.train_side_by_side([["--out", "x"]], 1)
    assert capsys.readouterr().err == "error: killed by SIGKILL: train.py --out x\n"


def test_a_suite_goes_on_where_it_was_stopped(tmp_path, capsys):
    """On a test set that has changed it is measured anew."""
    for split in ("train", "valid", "test"):
        lines = [json.dumps(p._asdict()) for p in data.demo_problems(0)[split][:9]]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    words = [*SMALL, "--suite", "table5", "--steps", "2", "--seeds", "2", "--jobs", "1"]
    words += ["--data", str(tmp_path)]
    out = tmp_path / "suite"
    train.main([*words, "--out", str(out)])
    (out / "DART" / "1" / "result.json").unlink()
    kept = (out / "DART" / "0" / "adapter.safetensors").stat().st_mtime_ns
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:4]))
    capsys.readouterr()
    train.main([*words, "--out", str(out)])
    printed = capsys.readouterr().out
    assert kept == (out / "DART" / "0" / "adapter.safetensors").stat().st_mtime_ns
    assert str(out / "DART" / "1") in printed and str(out / "No-CoT" / "0") not in printed
    (rows,) = json.loads((out / "table.json").read_text()).values()
    assert [row["row"] for row in rows] == ["No-CoT", "DART", "DART"]
    assert all(row["n"] == 8 and "exact_sd" in row for row in rows)
    (out / "notes").touch()
    with pytest.raises(ValueError, match="holds notes, which is not of this suite"):
        train.main([*words, "--out", str(out)])


@pytest.mark.parametrize("preset", ["llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b", "gpt2"])
def test_coconut_and_icot_end_with_all_steps_left_out_and_time_to_learn_it(preset):
    """A fifth of Coconut's epochs or more, and half of iCoT's, at the full learning rate."""
    for method, share in (("coconut", 0.2), ("icot", 0.5)):
        words = ["--preset", preset, "--model", "x", "--method", method]
        chosen, cls = train.read_options(words), dart.METHODS[method]
        named = argparse.Namespace(options=chosen)
        stages = [cls.stage(named, 100 * epoch, 100) for epoch in range(chosen.epochs)]
        assert stages[0] == 0 and stages.count(dart.FINAL_STAGE) >= share * chosen.epochs
        assert train.learning_rate(chosen, 10**6 - 1, 10**6) == chosen.lr


@pytest.mark.parametrize("suite, rows", [("table1", 7), ("table3", 8), ("figure2", 10)])
def test_rows_of_a_suite_differ_as_they_should(suite, rows):
    plan = train.plan(train.read_options(["--suite", suite]))
    chosen = [one for (one,) in plan.values()]
    assert len(chosen) == rows and len({one.out for one in chosen}) == rows
    for row, one in zip(plan, chosen, strict=True):
        words = train.SUITES[suite][row].split()
        alone = train.read_options([*words, f"--out={one.out}", "--resume"])
        assert one == dataclasses.replace(alone, compare=())
        elsewhere = {"w/ L_distill on y_1": "y_1", "w/ L_distill on [z_N; Y]": "z_N+Y"}
        assert one.distill_at == elsewhere.get(row, "z_N")


def test_seeds_of_a_suite_are_counted_up_from_the_one_given():
    words = ["--suite", "table5", "--seed", "7", "--seeds", "3"]
    for runs in train.plan(train.read_options(words)).values():
        assert [(one.seed, Path(one.out).name) for one in runs] == [(7, "7"), (8, "8"), (9, "9")]


def test_tables_hold_means_over_seeds_and_the_papers_figures(tmp_path, monkeypatch):
    """The latter beside the ST pathway. `train` is the accuracy on some training problems."""
    exact = {"st test": 0.4, "st train": 0.6, "cot test": 0.7, "cot train": 0.9}
    words = "--preset gpt2 --model /base --suite table5 --data gsm8k-aug --seeds 2".split()
    words += ["--out", str(tmp_path)]
    chosen = train.read_options(words)
    runs = train.plan(chosen)["DART"]
    for i, one in enumerate(runs):
        Path(one.out).mkdir(parents=True)
        train.write_json(Path(one.out) / "result.json", {"seconds": i, "flops": {"st": 1.0}})
        train.write_json(Path(one.out) / "config.json", {"run": {"data": i}})

    def measure(answerer, problems):
        (seed, pathway), (split,) = answerer, set(problem.question for problem in problems)
        share = exact[f"{pathway} {split}"] + seed / 10
        return {"pathway": pathway, "exact": share, "n": len(problems)}, []

    def load(name, split, *_, **more):
        return 900 * [data.Problem(split, [], "")]

    method = type("Method", (int,), {"pathways": {"cot": 0, "st": 0}})  # a seed
    monkeypatch.setattr(evaluation, "answerer", lambda *answerer: answerer)
    monkeypatch.setattr(evaluation, "measure", measure)
    monkeypatch.setattr(evaluation, "time_in_turns", lambda some, *_: [{"ms": x} for x in some])
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(dart, "load_run", lambda out, *_: (method(Path(out).name), None))
    st, cot = train.make_tables(chosen, {"DART": runs}, "cpu")["gsm8k-aug"]
    for row, pathway, paper in ((st, "st", "24.7/19"), (cot, "cot", "-")):
        assert (row["row"], row["pathway"], row["paper"]) == ("DART", pathway, paper)
        assert row["exact"] == pytest.approx(exact[f"{pathway} test"] + 0.05)
        assert row["train"] == pytest.approx(exact[f"{pathway} train"] + 0.05)
        assert (row["n"], row["seconds"], row["ms"]) == (1800, 0.5, (0, pathway))
    seen, one = [], options("--seed", "5", "--out", str(tmp_path))
    monkeypatch.setattr(data, "load", lambda *where, **_: seen.append(where) or [])
    train.write_json(tmp_path / "test.json", {train.problems_digest([]): 1})
    assert train.measured(one, ["svamp"], "cpu") == {"svamp": 1} and seen == [("svamp", "test", 5)]
    with pytest.raises(ValueError, match="--data gsm8k-aug: has changed"):
        train.make_tables(chosen, {"DART": runs, "No-CoT": runs[::-1]}, "cpu")


def test_the_papers_figures_stand_beside_its_rows():
    for suite, place, row in train.PAPER:
        preset, name = place.split(":")
        assert preset in train.PRESETS and name in data.DATASETS and row in train.SUITES[suite]
    assert len(train.PAPER) == 7 * 4 + 8 + 3 * 2 + 2 * 3
    assert train.PAPER["table1", "llama-3.2-1b:svamp", "DART"] == "50.5/35"
    assert train.PAPER["table5", "gpt2:gsm8k-aug", "No-CoT"] == "16.2/18"
    figures = [[float(x) for x in cell.split("/")] for cell in train.PAPER.values()]
    percent, ms = 1238.9 + 287.8 + 501.2 + 203.8, 3837 + 2680 + 351  # Tables 1, 3, 4, 5; 1, 4, 5
    assert sum(cell[0] for cell in figures) == pytest.approx(percent)
    assert sum(sum(cell[1:]) for cell in figures) == ms
