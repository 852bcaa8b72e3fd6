"""What the README shows is true: its code runs, its commands are accepted, its names exist."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import dart
import data
import eval as evaluation
import model
import train

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
CODE = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [text for kind, text in BLOCKS if kind == "sh"]
MODULES = {"dart": dart, "data": data, "model": model, "train": train}
TOKENIZER = data.demo_tokenizer()


def make_method(name="dart", **changes):
    torch.manual_seed(0)
    recipe = dict(random_init=True, lora_rank=0, rem_rank=4, n_st=8, dtype="fp32") | changes
    method = dart.build(dart.Options(method=name, **recipe), TOKENIZER, model.MODELS["demo"])
    for parameter_name, p in method.named_parameters():
        if parameter_name.endswith("r2"):  # else REM is still the identity
            p.data.normal_(0, 0.1)
    return method


def micro_batches(method, problems):
    batches = {}
    for name, pathway in method.pathways.items():
        batches[name] = data.collate([pathway.example(p, TOKENIZER) for p in problems], 1)
    return [dart.MicroBatch(batches, 1.0, 0)]


def training_step(method, problems):
    def forward(pathway, micro, sync):
        return method(pathway, micro.batches[pathway])

    return method.training_step(forward, micro_batches(method, problems))


PROBLEMS = data.demo_problems(0)["train"][:5]


def gradients(method):
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    return found


def test_dart_in_24_lines_is_what_is_trained():
    (code,) = [code for code in CODE if "def dart_loss" in code]
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) <= 24
    namespace = {}
    exec(code, namespace)
    method = make_method()
    losses = training_step(method, PROBLEMS)
    want = losses["cot"] + losses["st"] + 20.0 * losses["distill"]
    ours, examples = gradients(method), {}
    for name, pathway in method.pathways.items():
        examples[name] = [pathway.example(problem, TOKENIZER) for problem in PROBLEMS]
    loss = namespace["dart_loss"](method.model, examples["cot"], examples["st"], 20.0)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    for name, gradient in gradients(method).items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_the_functions_of_the_equations_run_in_training():
    rows = re.findall(r"^\| \((\d)\) .* \| (.*?) \|$", README, re.MULTILINE)
    assert [number for number, _ in rows] == list("12345")
    names = re.findall(r"`(\w+)\.([\w.]+)`", " ".join(text for _, text in rows))
    assert len(names) == 6
    ran, method = set(), make_method()
    sys.setprofile(lambda frame, event, _: ran.add(frame.f_code) if event == "call" else None)
    try:
        training_step(method, PROBLEMS)
    finally:
        sys.setprofile(None)
    for module, name in names:
        function = MODULES[module]
        for part in name.split("."):
            function = getattr(function, part)
        assert function.__code__ in ran, (module, name)


def test_methods_are_added_as_shown(monkeypatch):
    (code,) = [code for code in CODE if "class Wider" in code]
    monkeypatch.setattr(dart, "METHODS", dict(dart.METHODS))
    exec(code, {})
    wider = make_method("wider")
    assert list(training_step(wider, PROBLEMS)) == ["cot", "st", "distill"]
    assert wider.model.layers[0].self_attn.q_proj.rem.r2.grad.norm() > 0
    for question, n in (("sam has 7 pens ?", 1), ("sam has 7 pens gets 5 packs of 4 ?", 3)):
        ids, _, n_silent = evaluation.silent_states(wider, question)
        assert n_silent == n and len(ids) == n + 2


def test_the_layouts_are_those_that_are_printed():
    pathways = make_method().pathways
    problem = data.Problem("sam has 7 pens gets 5 packs of 4 ?", ["<<7+5=12>>", "<<12%4=0>>"], "0")
    for pathway in pathways.values():
        assert data.picture(pathway.example(problem, TOKENIZER), TOKENIZER) in README


def test_commands_have_options_that_exist(tmp_path, monkeypatch):
    """Those that need more than this machine has are only read."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(COMMANDS).replace("\\\n", " ")
    programs = re.findall(r"(?<!_)(train|eval)\.py(.*)$", lines, re.MULTILINE)
    assert [name for name, _ in programs].count("train") == 5 and len(programs) >= 10
    for name, words in programs:
        if name == "train":
            assert train.read_options(shlex.split(words)).method == "dart"
        else:
            options = data.parse_options(evaluation.Options, shlex.split(words))
            assert evaluation.asked_for(options) in evaluation.READS


def test_commands_run(tmp_path, monkeypatch, capsys):
    """The main job for a few steps, and all commands that look at its run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        train, "PRESETS", train.PRESETS | {"demo": f"{train.PRESETS['demo']} --compare"}
    )
    train.main(["--steps", "3", "--eval_size", "5", "--max_new_tokens", "4"])
    commands = re.findall(r"^python eval\.py (--ckpt out/demo .*)$", README, re.MULTILINE)
    assert len(commands) >= 4
    for words in commands:
        evaluation.main([*shlex.split(words)])
    assert os.path.exists("out/demo-hf/model.safetensors")
    (code,) = [code for code in CODE if "load_run" in code]
    exec(code, {})
    assert "Answer(text=" in capsys.readouterr().out
