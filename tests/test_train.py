"""train.py: options, run directories, resuming, accumulation and several processes. CPU, no network; the larger part runs
inside this process, what needs torchrun in others."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import dart
import eval as evaluation
import train
from model import Block

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
QUICK = ["--compare", "--steps", "6", "--batch_size", "16", "--log_every", "1", "--eval_every", "3", "--eval_size", "8",
         "--save_every", "3", "--device", "cpu", "--jobs", "1", "--max_new_tokens", "4"]  # fmt: skip


LAST = "checkpoint-00000006.safetensors"
FAST = {"icot": ["--removal_per_epoch", "113", "--remove_all_beyond", "3"],  # schedules that end within few steps of 16
        "coconut": ["--epochs_per_stage", "0.014", "--thoughts_per_step", "1"]}  # fmt: skip


def run(out, *more):
    train.main([*QUICK, "--out", str(out), *more])
    return log(out)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(records):
    return [{k: r[k] for k in ("st", "distill", *dart.METHODS) if k in r} for r in records]


@pytest.fixture
def adapters_run():
    """Options of a LoRA + REM run from a Hugging Face directory, on the built-in problems."""
    return ["--preset", "llama-3.2-1b", "--model", str(FIXTURES / "llama"), "--tokenizer", "demo", "--data", "demo",
            "--lora_rank", "4", "--rem_rank", "4", "--n_st", "2", "--max_new_tokens", "8", "--dtype", "fp32"]  # fmt: skip


# ------------------------------------------------------------------------------------------------ a whole run


def test_a_comparison_from_the_command_line(tmp_path):
    """What `python train.py` does, for a few steps: the yardsticks, DART, the table; then eval.py on what it left."""
    out = tmp_path / "run"
    command = [sys.executable, "train.py", *QUICK, "--compare", "no-cot", "pause", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<st> <st> <st> <st> Answer : " in done.stdout and "1/9 1/9" in done.stdout  # the first batch's picture
    table = (out / "table.md").read_text()
    assert table in done.stdout and "Guessing a remainder" in table
    result = json.loads((out / "result.json").read_text())
    assert [(r["method"], r["pathway"], r["n"]) for r in result["table"]] == [
        ("no-cot", "no-cot", 500), ("pause", "pause", 500), ("dart", "st", 500), ("dart", "cot", 500)]  # fmt: skip
    names = {".lock", "config.json", "adapter.safetensors", "best.safetensors", "log.jsonl", "result.json", "words.json"}
    names |= {f"checkpoint-0000000{step}.{end}" for step in (3, 6) for end in ("json", "safetensors")}
    assert {p.name for p in out.iterdir()} == names | {"table.md", "no-cot", "pause"}
    assert {p.name for p in (out / "pause").iterdir()} == names
    records = log(out)
    assert [r["step"] for r in records if "cot" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "valid" in r] == [3, 6]

    command = [sys.executable, "eval.py", "--ckpt", str(out), "--pathway", "st", "cot", "--latency", "3",
               "--json", str(tmp_path / "e.json"), "--examples", str(tmp_path / "e.jsonl")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = {r["pathway"]: r for r in json.loads((tmp_path / "e.json").read_text())}
    for row in result["table"][2:]:
        assert again[row["pathway"]]["strict"] == row["strict"] and again[row["pathway"]]["passes"] == row["passes"]
    assert again["cot"]["speedup_over_cot"] == 1.0 and f"{100 * again['st']['strict']:.1f} (" in done.stdout
    examples = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert len(examples) == 1000 and sum(e["strict"] for e in examples if e["pathway"] == "st") == 500 * again["st"]["strict"]


def test_losses_fall_on_every_method(tmp_path):
    for method in dart.METHODS:
        records = run(tmp_path / method, "--method", method, "--steps", "20", "--eval_size", "0", *FAST.get(method, []))
        for name in losses(records)[0]:
            if name != "distill":
                assert records[19][name] < 0.75 * records[0][name], (method, name)


def suite(out, *more):
    train.main([*QUICK, "--suite", "table3", "--out", str(out), "--log_every", "6", *more])


def test_a_suite_trains_every_row_with_every_seed_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    three = {row: train.SUITES["table3"][row] for row in ("No-CoT", "w/ LoRA-REM", "w/ L_distill on [z_N; Y]")}
    monkeypatch.setitem(train.SUITES, "table3", three)

    def interrupted(options, step, steps, original=train.learning_rate):
        if options.rem_is_lora and options.seed == 4 and step == 4:  # in the fourth run
            raise KeyboardInterrupt
        return original(options, step, steps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learning_rate", interrupted)
        suite(tmp_path, "--seeds", "2", "--seed", "3")
    assert not (tmp_path / "table.md").exists() and capsys.readouterr().out.count("step 6/6") == 3
    suite(tmp_path, "--seeds", "2", "--seed", "3")
    assert capsys.readouterr().out.count("step 6/6") == 3
    folders = {"No-CoT": "No-CoT", "w/ LoRA-REM": "w-LoRA-REM", "w/ L_distill on [z_N; Y]": "w-L_distill-on-z_N-Y"}
    table = json.loads((tmp_path / "table.json").read_text())["demo"]
    assert [row["row"] for row in table] == list(folders)
    for row in table:
        seeds = [tmp_path / folders[row["row"]] / seed for seed in "34"]
        results = [json.loads((seed / "result.json").read_text()) for seed in seeds]
        strict = []
        for seed, directory in zip((3, 4), seeds, strict=True):  # each is tested on its own seed's split
            method, options = evaluation.load_run(directory)
            found = dart.evaluate(method.model, method.tokenizer, list(method.pathways.values())[-1], data.demo_problems(seed)["test"], 4)
            strict.append(sum(record["strict"] for record in found) / 500)
        assert row["strict"] == pytest.approx(np.mean(strict)) and row["strict_sd"] == pytest.approx(np.std(strict, ddof=1))
        assert row["strict_interval"] == pytest.approx(evaluation.wilson(round(500 * sum(strict)), 1000)) and row["n"] == 1000
        assert row["trained_parameters"] == results[0]["trained_parameters"] and row["tokens"] <= row["passes"]
        assert row["flops"] == {name: np.mean([r["flops"][name] for r in results]) for name in results[0]["flops"]}
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("table3, demo on demo, seeds 3 to 4") and "w/ LoRA-REM" in text
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(train, "evaluate_pathway", None)
    suite(tmp_path, "--seeds", "2", "--seed", "3")  # nothing is left to do
    assert (tmp_path / "table.md").read_text() == text


def test_the_papers_figures_stand_beside_ours_where_there_are_some():
    def paper(table, preset, name, row):
        rows = list(train.SUITES[table])
        accuracies, times = train.PAPER[table, preset, name]
        assert len(rows) == len(accuracies) == len(times)
        return accuracies[rows.index(row)], times[rows.index(row)]

    assert paper("table1", "llama-3.2-1b", "multiarith", "DART") == (84.8, 33)
    assert paper("table1", "llama-3.2-1b", "gsm8k-aug", "CODI") == (55.6, 143)
    assert paper("table1", "llama-3.2-1b", "svamp", "iCoT") == (40.9, 34)
    assert paper("table4", "llama-3.2-1b", "commonsenseqa-cot", "DART") == (75.1, 34)
    assert paper("table5", "qwen2.5-1.5b", "gsm8k-aug", "No-CoT") == (33.3, 95)
    assert paper("table3", "llama-3.2-1b", "gsm8k-aug", "w/o REM") == (36.2, None)
    one = {"n": 4, "strict": 0.5, "tolerant": 0.75, "passes": 8.0, "tokens": 2.0, "ms": 1.0, "ms_p90": 2.0, "trained_parameters": 7,
           "peak_memory": 2**30, "seconds": 3.0, "flops": {"cot": 3e15, "st": 1e15}}  # fmt: skip
    text, figures = evaluation.suite_table({"DART": ([one], 42.6, 37), "more": ([one, one | {"strict": 1.0}], None, None)})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert cells[2] == ["DART", "50.0", "4", "15.0-85.0", "75.0", "42.6", "2.0", "8.0", "1.0", "2.0", "37", "4.00e+15", "1.00e+15",
                        "7", "1.00", "3"]  # fmt: skip
    assert cells[3][:6] == ["more", "75.0 ± 35.4", "8", "40.9-92.9", "75.0", "-"]
    assert figures[0]["paper_accuracy"] == 42.6 and figures[1]["strict_sd"] == pytest.approx(0.35355, rel=1e-4)


def test_every_row_of_every_suite_is_a_run(tmp_path):
    for name, rows in train.SUITES.items():
        argv = ["--suite", name, "--seeds", "2", "--out", str(tmp_path)]
        runs = train.suite_runs(train.read_options(argv), argv)
        outs = [one.out for some in runs.values() for one in some]
        assert runs.keys() == rows.keys() and len(set(outs)) == 2 * len(rows) and all(Path(out).parent.parent == tmp_path for out in outs)


@pytest.mark.parametrize("suite", train.SUITES)
def test_every_row_of_every_suite_has_room_on_the_built_in_task(suite):
    problems = data.demo_problems(0)["test"][:20]
    for (one,) in train.suite_runs(train.read_options(["--suite", suite]), ["--suite", suite]).values():
        method = train.build(one, "cpu")
        evaluation.check_room(method, problems, one.max_new_tokens)


def test_the_test_sets_of_a_suite_are_looked_at_before_the_training(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*QUICK, "--suite", "table5", "--test_data", "demo", "svampp", "--out", str(tmp_path / "suite")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "svampp" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_method_is_not_compared_with_itself(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "train_one", lambda one, *_: trained.append(one.method) or {})
    monkeypatch.setattr(train, "conclude", lambda *_: None)
    train.main(["--method", "no-cot", "--jobs", "1", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert trained == ["pause", "no-cot"]


def test_a_recipe_may_have_values_of_a_methods_own():
    for argv, own in ([], 20.0), (["--distill_weight", "3"], 3.0):
        rows = train.suite_runs(train.read_options(["--suite", "table1", *argv]), ["--suite", "table1", *argv])
        assert rows["CODI"][0].distill_weight == train.read_options(["--method", "codi", *argv]).distill_weight == own
        assert rows["DART"][0].distill_weight == train.read_options(argv).distill_weight == (5.0 if own == 20.0 else 3.0)


def test_options_of_time_and_memory_change_no_loss(tmp_path, adapters_run, monkeypatch):
    """Their effect is tested with the model; here, that they reach it."""
    compiled, entered = [], []
    real, forward = torch.compile, Block.forward
    monkeypatch.setattr(torch, "compile", lambda module, **how: compiled.append(module) or real(module, backend="eager", **how))
    monkeypatch.setattr(Block, "forward", lambda self, *inputs: entered.append(self.self_attn.plain) or forward(self, *inputs))
    more = [*adapters_run, "--lora_dropout", "0", "--eval_size", "0", "--steps", "1"]
    want, calls = losses(run(tmp_path / "run", *more)), len(entered)
    assert not any(entered)
    for flag in ("plain", "activation_checkpointing", "compile"):
        entered.clear()
        found = losses(run(tmp_path / flag, *more, f"--{flag}"))
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in zip(found, want, strict=True))
        assert all(entered) == (flag == "plain") and (len(entered) == 2 * calls) == (flag == "activation_checkpointing")
        assert bool(compiled) == (flag == "compile")


def test_answers_are_timed_with_fused_projections(tmp_path):
    run(tmp_path)
    model = evaluation.merged_copy(evaluation.load_run(tmp_path)[0], "st")
    assert model.layers[0].self_attn.qkv_proj is not None and model.layers[0].mlp.gate_up_proj is not None


def test_lora_and_rem_from_a_hugging_face_directory(tmp_path, adapters_run):
    records = run(tmp_path / "run", *adapters_run, "--steps", "25", "--lr", "1e-2")
    assert np.mean([r["cot"] + r["st"] for r in records[-6:] if "cot" in r]) < 0.8 * (records[0]["cot"] + records[0]["st"])
    saved = load_file(tmp_path / "run" / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"lora_a", "lora_b", "r1", "r2"}
    assert len(saved) == 3 * (4 * 2 + 2 * 2) and all(tensor.dtype == torch.float32 for tensor in saved.values())
    method, _ = evaluation.load_run(tmp_path / "run")
    base = load_file(FIXTURES / "llama" / "model.safetensors")
    assert torch.equal(method.model.layers[1].mlp.up_proj.weight, base["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("tokenizer", ["tokenizer-llama3", "tokenizer-qwen2"])
def test_data_and_tokenizer_of_ones_own_without_validation(tmp_path, capsys, tokenizer):
    """Records in .jsonl, a tokenizer.json, a base in several files; the run is evaluated from its own copy of the tokenizer."""
    shutil.copytree(FIXTURES / "llama-shards", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    problems = [{"question": f"How many are {i} and {i}?", "steps": [f"{i}+{i}={2 * i}", "so it is"], "answer": 2 * i} for i in range(30)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    options = ["--preset", "llama-3.2-1b", "--model", str(tmp_path / "base"), "--random_init", "--tokenizer", str(FIXTURES / tokenizer),
               "--data", str(tmp_path), "--batch_size", "8", "--steps", "3", "--log_every", "1", "--max_new_tokens", "8"]  # fmt: skip
    with pytest.raises(SystemExit):
        train.main([*options, "--out", str(tmp_path / "none")])
    assert "neither valid.txt nor valid.jsonl is in it (--eval_size 0 trains without validation)" in capsys.readouterr().err
    train.main([*options, "--out", str(tmp_path / "run"), "--eval_size", "0"])
    printed = capsys.readouterr().out
    assert "tokenizer: tokenizer.json, 423 ids" in printed and "validation" not in printed
    assert json.loads((tmp_path / "run" / "result.json").read_text())["valid"] == {}
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (FIXTURES / tokenizer / "tokenizer.json").read_bytes()
    (tmp_path / "train.jsonl").rename(tmp_path / "others.jsonl")
    evaluation.main(["--ckpt", str(tmp_path / "run"), "--latency", "0", "--data", str(tmp_path), str(tmp_path / "others.jsonl")])
    assert capsys.readouterr().out.count("| 30 | 0.0 (0.0-11.4)") == 2


def test_the_saved_run_is_the_trained_model(tmp_path, monkeypatch, adapters_run):
    """Both pathways' losses of the model in memory, at the end, and of the one that is loaded from the run's files; with
    an appended row for <st>, which has to be among them."""
    words = [word if word != "<st>" else "<free>" for word in data.DEMO_WORDS]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "words.json").write_text(json.dumps(words))
    kept = []
    monkeypatch.setattr(train, "save_checkpoint", lambda run, old=train.save_checkpoint: (kept.append(run.method), old(run)))
    for more in (["--model", str(FIXTURES / "gpt2")], ["--lora_rank", "0"], ["--method", "pause"], ["--random_init"]):
        out = tmp_path / "-".join(more).replace("/", "")
        run(out, *adapters_run, "--tokenizer", str(tmp_path / "tokenizer"), "--lr", "1e-2", *more)
        method, _ = evaluation.load_run(out)
        assert method.model.adapters.extra_rows == 1 and method.special_ids == (96,)
        problems = data.load("demo", "valid", 0)[:8]
        for name, pathway in method.pathways.items():
            batch = data.collate([pathway.row(problem, method.tokenizer) for problem in problems], 1)
            with torch.no_grad():
                theirs, ours = (m.eval()(name, batch)[0][name].item() for m in (kept[-1], method))
            assert ours == theirs, more


def test_bf16_holds_the_frozen_base_in_bf16_and_what_is_trained_in_fp32(tmp_path, adapters_run):
    run(tmp_path / "lora", *adapters_run, "--dtype", "bf16")
    run(tmp_path / "all", "--dtype", "bf16")
    for name, base in (("lora", torch.bfloat16), ("all", torch.float32)):
        method, _ = evaluation.load_run(tmp_path / name)
        assert method.model.compute_dtype == torch.bfloat16 and method.model.embed_tokens.dtype == base
        trained = load_file(tmp_path / name / LAST)
        assert all(tensor.dtype == torch.float32 for tensor in trained.values())


# ---------------------------------------------------------------------- same result whatever the layout of a step


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "train.py", *QUICK, *arguments]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_equal_one_and_one_with_accumulation(tmp_path):
    """All methods: `long.py`. The same global batches: 20 steps' losses to 1e-5, and each of 7 validation problems counted once; with dropout,
    too, where the micro-batches are the same. (The learning rate is small because the L1 loss has a kink: where rounding decides on its
    side, later steps differ by more.)"""
    same = ["--steps", "20", "--lr", "3e-4", "--eval_every", "10", "--eval_size", "7", "--seed", "3", "--attach_teacher"]
    dropout = [*same, "--lora_rank", "4", "--lora_dropout", "0.3", "--micro_batch_size", "4"]
    torchrun(2, *dropout, "--out", str(tmp_path / "two"))
    pairs = [(run(tmp_path / "one", *dropout), log(tmp_path / "two")),
             (run(tmp_path / "at once", *same), run(tmp_path / "accumulated", *same, "--micro_batch_size", "3"))]  # fmt: skip
    assert losses(pairs[0][0]) != losses(pairs[1][0])
    for one, other in pairs:
        assert len(one) == len(other) and other[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
        for a, b in zip(losses(one), losses(other), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert [r["valid"] for r in one if "valid" in r] == [r["valid"] for r in other if "valid" in r]


# ------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("method, dtype", [("dart", "fp32"), ("dart", "bf16"), ("icot", "fp32"), ("coconut", "fp32"),
                                           ("codi", "fp32")])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path, monkeypatch, method, dtype):
    """With dropout, so that random numbers matter; stopped right after the checkpoint of step 3, and once more after
    step 5, of which nothing was saved. icot's and coconut's optimizers start anew on the way."""
    options = ["--method", method, "--dtype", dtype, "--lora_rank", "4", "--lora_dropout", "0.3", *FAST.get(method, [])]
    whole = run(tmp_path / "whole", *options)
    for stop in (3, 5):
        def interrupted(*arguments, original=train.learning_rate, stop=stop):
            if arguments[1] == stop:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "learning_rate", interrupted)
            run(tmp_path / "cut", *options, *(["--resume"] if stop == 5 else []))
    resumed = run(tmp_path / "cut", *options, "--resume")
    assert losses(resumed) == losses(whole)
    assert [r.get("grad_norm") for r in resumed] == [r.get("grad_norm") for r in whole]
    assert [r["step"] for r in resumed] == [r["step"] for r in whole]
    for name in ("adapter.safetensors", "best.safetensors", LAST):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(tmp_path):
    whole = run(tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        if path.name != "config.json":
            path.unlink()
    assert losses(run(tmp_path / "run", "--resume")) == losses(whole)
    evaluation.load_run(tmp_path / "run")


def test_a_finished_run_is_not_trained_again(tmp_path):
    run(tmp_path / "run", "--compare", "no-cot")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
    run(tmp_path / "run", "--compare", "no-cot", "--resume")
    assert len(log(tmp_path / "run")) == 8 and before == {p: p.read_bytes() for p in before}


def test_a_resumption_with_other_options_is_refused_with_their_names(tmp_path, capsys):
    run(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--resume", "--lr", "1e-4", "--seed", "9")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--lr 0.003 (now 0.0001)" in message and "--seed 0 (now 9)" in message


def test_the_optimizer_starts_anew_where_the_stage_changes(tmp_path):
    """icot here removes a token a step, and from the fourth on all: the last checkpoint's optimizer is three steps old."""
    run(tmp_path, "--method", "icot", *FAST["icot"])
    assert json.loads((tmp_path / LAST).with_suffix(".json").read_text())["optimizer_step"] == 3


def test_rows_are_laid_out_by_stage_and_some_are_ahead(tmp_path):
    options = train.read_options(["--method", "icot", "--removal_per_epoch", "29", "--removal_smoothing", "0.5", "--out", str(tmp_path)])
    prepared = train.prepare(options, "cpu")
    batch = np.arange(64)
    for step, stage in ((1, 0), (2, 1), (3, 2)):
        (micro,) = train.make_micro_batches(prepared, step, batch, 0, 1, "cpu")
        gone = prepared.lengths[batch, 0] - micro.batches["icot"].end.numpy()
        assert gone.min() == stage and len(set(gone)) > 2 and 0.25 < (gone == stage).mean() < 0.55  # 1 - exp(-0.5) = 0.39
        halves = [train.make_micro_batches(prepared, step, batch, rank, 2, "cpu")[0].batches["icot"].end.tolist() for rank in (0, 1)]
        assert halves[0] + halves[1] == micro.batches["icot"].end.tolist()


@pytest.mark.parametrize("preset", train.PRESETS)
@pytest.mark.parametrize("method", ["icot", "coconut"])
def test_the_schedules_of_every_recipe_end(preset, method):
    options = train.read_options(["--preset", preset, "--method", method, *([] if preset == "demo" else ["--model", "x"])])
    per_epoch = 1820 // 64 if preset == "demo" else 385_620 // 128
    steps, cls = options.steps or options.epochs * per_epoch, dart.METHODS[method]
    staged = cls.__new__(cls)
    torch.nn.Module.__init__(staged)
    staged.options = options
    assert staged.stage(0, per_epoch) == 0 and staged.stage(int(0.9 * steps), per_epoch) == dart.ALL


@pytest.mark.parametrize("method, little, enough", [("codi", 21, 26), ("coconut", 32, 33)])
def test_rows_with_thoughts_need_room_for_them_and_for_padding(tmp_path, capsys, monkeypatch, method, little, enough):
    options = ["--method", method, *FAST.get(method, []), "--out", str(tmp_path / "run"), "--max_new_tokens", "8"]
    for positions in (little, enough):
        monkeypatch.setitem(train.MODELS, "demo", dataclasses.replace(train.MODELS["demo"], max_position_embeddings=positions))
        if positions == little:
            with pytest.raises(SystemExit):
                train.main([*QUICK, *options])
            assert f"positions, but the model has {little}" in capsys.readouterr().err
        else:
            train.main([*QUICK, *options])


def test_a_run_that_knew_fewer_options_can_be_read_resumed_and_overwritten(tmp_path):
    run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("distill_norm", "schedule", "test_data", "suite"):
        del config["options"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert evaluation.load_run(tmp_path)[1].distill_norm == "auto"
    run(tmp_path, "--resume")
    run(tmp_path, "--overwrite")


@pytest.mark.parametrize("method, steps", [("icot", "3"), ("coconut", "5")])
def test_a_schedule_that_would_not_end_is_refused(tmp_path, capsys, method, steps):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--method", method, *FAST[method], "--steps", steps)
    assert f"--method {method}: after {steps} steps" in capsys.readouterr().err and not (tmp_path / "run").exists()
    run(tmp_path / "run", "--method", method, *FAST[method], "--steps", str(int(steps) + 1))


def test_a_line_of_the_log_that_was_cut_off_does_not_hinder_resuming(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    monkeypatch.setattr(train, "validate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.undo()
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('3\n{"step": 3, "los')
    assert losses(run(tmp_path / "cut", "--resume"))[:3] == losses(whole)[:3]


def test_a_broken_result_of_a_finished_run_is_named(tmp_path, capsys):
    run(tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--resume")
    assert stop.value.code == 2 and "result.json: not JSON" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ run directories


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_that_holds_something_is_left_alone(tmp_path, capsys):
    run(tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run")
    assert stop.value.code == 2 and "--resume continues it, --overwrite replaces it" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"], ["--compare", "no-cot", "--overwrite"]])
def test_what_is_no_run_is_never_touched(tmp_path, capsys, more):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    shutil.copytree(FIXTURES / "llama", tmp_path / "model")  # it has a config.json, too
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    for name in ("other", "model", "odd", "file"):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / name, *more)
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: --out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "wrong", [["--batch_size", "1821"], ["--n_st", "80"], ["--compare", "pause", "--max_new_tokens", "80"]]
)
def test_a_run_is_not_given_up_for_one_that_cannot_start(tmp_path, wrong):
    """... and one that could not start leaves nothing that stands in the way of the corrected command."""
    run(tmp_path / "run")
    before = contents(tmp_path)
    for out, more in (("run", ["--overwrite"]), ("new", [])):
        with pytest.raises(SystemExit):
            run(tmp_path / out, *wrong, *more)
    assert contents(tmp_path) == before
    run(tmp_path / "new")


def test_overwriting_replaces_the_run_and_nothing_else(tmp_path):
    run(tmp_path / "run", "--steps", "6")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    records = run(tmp_path / "run", "--steps", "3", "--overwrite")
    assert max(r["step"] for r in records) == 3 and (tmp_path / "run" / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--no_such_option"], "unrecognized arguments: --no_such_option"),
        (["--step", "3"], "--step"),  # no abbreviations
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--lr", "-1"], "--lr -1.0: not a number of at least 0"),
        (["--warmup", "5"], "--warmup 5.0: not a number of at least 0 and at most 1"),
        (["--eval_size", "-1"], "--eval_size -1: not a number of at least 0"),
        (["--max_new_tokens", "80"], "but the model has 80 positions"),
        (["--lr", "nan"], "--lr nan"),
        (["--seed", str(2**80)], "and at most 4294967295"),
        (["--steps", "1" + "0" * 400], "--steps 1"),
        (["--epochs", "1" + "0" * 400, "--steps", "0"], "--epochs 1"),
        (["--epochs", "1000000", "--batch_size", "1"], "--epochs 1000000: 1820000000 steps"),
        (["--log_every", str(10**400)], "--log_every 1"),
        (["--batch_size", "0"], "--batch_size 0: not a number of at least 1"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--preset", "llama-4"], "--preset llama-4: there are llama-3.2-1b"),
        (["--preset", "gpt2"], "--model DIR is missing"),
        (["--preset", "gpt2", "--random_init", "--data_dir", "/nowhere"], "train.txt: no such file; `python data.py gsm8k-aug` fetches"),
        (["--data", "svamp"], "svamp has no train split, only test"),
        (["--preset", "gpt2", "--model", "/nowhere", "--data", "demo", "--tokenizer", "demo"], "/nowhere/config.json: no such"),
        (["--preset", "gpt2", "--random_init", "--data", "demo"], "--tokenizer DIR is missing"),
        (["--preset", "gpt2", "--random_init", "--data", "/nowhere"], "--data /nowhere: neither a directory nor one of demo, gsm8k-aug"),
        (["--model", "/nowhere"], "--model goes with"),
        (["--compare", "magic"], "--compare magic: each once, of dart"),
        (["--compare", "cot", "cot"], "--compare cot: each once, of dart"),
        (["--resume", "--overwrite"], "contradict"),
        (["--suite", "table1", "--overwrite"], "--suite goes with neither"),
        (["--suite", "table1", "--compare=cot"], "--suite goes with neither"),
        (["--suite", "table1", "--method", "cot"], "--suite goes with neither"),
        (["--seeds", "3"], "--seeds and --test_data go with --suite"),
        (["--test_data", "demo"], "--seeds and --test_data go with --suite"),
        (["--suite", "table2"], "invalid choice: 'table2'"),
        (["--batch_size", "1821"], "there are only 1820 problems"),
        (["--preset", "gpt2", "--model", str(FIXTURES / "gpt2"), "--data", "demo"], "no tokenizer"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_wrong_data_line_is_one_line_and_exit_code_2(tmp_path, capsys, adapters_run):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("sam has 7 pens ?||<<7+5=12>> #### 0\n" * 20)
    (tmp_path / "valid.txt").write_text("sam has 7 pens ?||<<7+5=12>> ### 0\n")
    adapters_run[adapters_run.index("--data") + 1] = str(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *adapters_run)
    assert stop.value.code == 2 and "valid.txt:1: not of the form" in capsys.readouterr().err


def test_rows_longer_than_the_model_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--n_st", "80")
    assert "positions, but the model has 80 positions" in capsys.readouterr().err


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name}" in text for name in train.Options.__dataclass_fields__)


def test_epochs_replace_the_steps_of_a_recipe():
    assert train.read_options([]).steps == 1500
    assert train.read_options(["--epochs", "2"]).steps == train.read_options(["--epochs=2"]).steps == 0
    assert train.read_options(["--epochs", "2", "--steps", "7"]).steps == 7


def test_help_shows_the_defaults_of_the_recipe(capsys):
    for preset, lr in (([], "0.003"), (["--preset", "gpt2"], "0.002")):
        with pytest.raises(SystemExit):
            train.main([*preset, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"or constant (default: {lr})" in text


# ------------------------------------------------------------------------------------------- schedule, optimizer


def test_the_gradient_is_clipped(tmp_path):
    """AdamW's first step does not depend on the gradient's scale; but the moments that it keeps do."""
    for clip, low, high in (("0", 5.0, 1e4), ("0.01", 0.0, 0.01001)):
        run(tmp_path / clip, "--steps", "1", "--grad_clip", clip)
        moments = load_file(tmp_path / clip / "checkpoint-00000001.safetensors")
        norm = sum(t.double().square().sum() for n, t in moments.items() if n.startswith("exp_avg.")).sqrt() / (1 - 0.9)
        assert low < norm < high



def test_the_learning_rate_warms_up_and_falls_to_zero():
    options = train.Options(lr=2.0, warmup=0.1)
    rates = [train.learning_rate(options, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(2 / 11) and rates[:11] == sorted(rates[:11]) and max(rates) == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[55] == pytest.approx(1.0) and rates[99] < 0.001


def test_weight_decay_is_for_matrices_only():
    options = train.read_options([])
    method = train.build(options, "cpu")
    optimizer = train.make_optimizer(method.model, options)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    named = dict(method.model.named_parameters())
    assert {name for name, p in named.items() if id(p) not in decayed} == {name for name in named if "norm" in name}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)


def test_the_presets_are_the_papers():
    """Appendix C and Section 3; what the paper leaves open as in the README's table."""
    for preset, epochs, lr in (("llama-3.2-1b", 10, 8e-4), ("llama-3.2-3b", 10, 5e-4), ("qwen2.5-1.5b", 10, 5e-4),
                               ("gpt2", 40, 2e-3)):  # fmt: skip
        o = train.read_options(["--preset", preset, "--model", str(ROOT), "--data", str(ROOT)])
        assert (o.epochs, o.lr, o.steps) == (epochs, lr, 0)
        assert (o.method, o.n_st, o.distill_weight, o.attach_teacher, o.last_step) == ("dart", 20, 20.0, False, "auto")
        assert (o.lora_rank, o.lora_alpha, o.rem_rank, o.rem_alpha, o.warmup, o.dtype) == (128, 32, 128, 32, 0.03, "bf16")
        assert (o.batch_size, o.weight_decay, o.grad_clip, o.lora_dropout) == (128, 0.1, 2.0, 0.1)
