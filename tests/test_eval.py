"""eval.py: intervals, tables, loading a run, the command line's errors. CPU, no network."""

import dataclasses
import json

import pytest
import torch

import dart
import data
import eval as evaluation
import train
from data import DEMO_WORDS
from model import MODELS, Transformer


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A DART run of two steps on the built-in task."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main(["--compare", "--steps", "2", "--batch_size", "8", "--eval_size", "4", "--device", "cpu", "--out", str(out)])
    return out


@pytest.mark.parametrize(
    "right, n, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (562, 1319, 0.3996, 0.4529), (1, 1, 0.2065, 1.0)],
)
def test_wilson_intervals(right, n, low, high):
    """Values of the closed form in Wilson (1927), worked out independently."""
    assert evaluation.wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_figures_of_a_set():
    records = [{"strict": i < 3, "tolerant": i < 4, "passes": 2 + i % 2, "tokens": 2} for i in range(10)]
    figures = evaluation.summary(records, [i / 1000 for i in range(1, 12)])
    assert (figures["n"], figures["strict"], figures["tolerant"], figures["passes"]) == (10, 0.3, 0.4, 2.5)
    assert (figures["ms"], figures["ms_p90"]) == (6.0, 10.0)
    assert "ms" not in evaluation.summary(records, [])


def test_markdown_tables():
    assert evaluation.markdown([{"a": 1, "name": "x"}, {"a": 22, "name": "y"}]) == (
        "| a  | name |\n|----|------|\n| 1  | x    |\n| 22 | y    |")  # fmt: skip


def test_the_merged_run_answers_as_the_trained_one(a_run):
    method, _ = evaluation.load_run(a_run)
    ids = torch.tensor([method.pathways["st"].prompt("sam has 7 pens gets 5 packs of 4 ?", method.tokenizer)])
    with torch.no_grad():
        for name, silent in (("st", True), ("cot", False)):
            model = evaluation.merged(method, name)
            torch.testing.assert_close(model(ids, silent=silent), method.model(ids, silent=silent), rtol=1e-4, atol=1e-5)
    assert method.model.merged is None  # the copy was merged, not the model


def test_latency_times_each_question_once_after_a_warm_up(a_run, monkeypatch):
    method, _ = evaluation.load_run(a_run)
    calls = []
    monkeypatch.setattr(evaluation.dart, "generate", lambda model, tokenizer, pathway, prompts, limit: calls.append(prompts))
    pathway, questions = method.pathways["st"], ["sam has 7 pens ?"] * 9
    seconds = evaluation.latency(method.model, method.tokenizer, pathway, questions, 8)
    assert len(seconds) == 9 and len(calls) == 9 + 5 and all(len(prompts) == 1 for prompts in calls)
    assert evaluation.latency(method.model, method.tokenizer, pathway, [], 8) == []


def test_another_data_file_and_a_limit(a_run, tmp_path, capsys):
    path = tmp_path / "mine.txt"
    path.write_text("sam has 7 pens gets 5 packs of 4 ?||<<7+5=12>> <<12%4=0>> #### 0\n" * 5)
    evaluation.main(["--ckpt", str(a_run), "--data", str(path), "demo", "--limit", "3", "--latency", "0",
                     "--json", str(tmp_path / "e.json")])  # fmt: skip
    rows = json.loads((tmp_path / "e.json").read_text())
    assert [(row["data"], row["n"]) for row in rows] == [(str(path), 3), ("demo", 3)]
    assert "speedup_over_cot" not in rows[0] and "ms" not in rows[0]
    assert capsys.readouterr().out.count("\n") == 4


def test_figures_are_those_of_the_examples(a_run, tmp_path, monkeypatch):
    """A model that writes what we say: strict and tolerant accuracy, and one line a problem, in the problems' order."""
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"sam has {i} pens ?||<<7+5=12>> #### {i}\n" for i in range(1, 7)))
    method, _ = evaluation.load_run(a_run)
    written = {"1": "1", "2": "2.0", "3": "no", "4": "4", "5": "6", "6": "6"}

    def generate(model, tokenizer, pathway, prompts, limit):
        texts = [written[method.tokenizer.decode(prompt).split()[3]] for prompt in prompts]
        return [[ord(c) for c in text] + [tokenizer.eos_id] for text in texts]

    monkeypatch.setattr(evaluation.dart, "generate", generate)
    monkeypatch.setattr(evaluation.Tokenizer, "decode", lambda self, ids, old=evaluation.Tokenizer.decode: (
        "".join(map(chr, ids)) if all(i > 31 for i in ids) and len(ids) < 4 else old(self, ids)))  # fmt: skip
    evaluation.main(["--ckpt", str(a_run), "--data", str(path), "--latency", "0", "--batch_size", "4",
                     "--json", str(tmp_path / "e.json"), "--examples", str(tmp_path / "e.jsonl")])  # fmt: skip
    (row,) = json.loads((tmp_path / "e.json").read_text())
    assert (row["n"], row["strict"], row["tolerant"]) == (6, 3 / 6, 4 / 6)
    examples = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [(e["id"], e["gold"], e["text"]) for e in examples] == [(i, str(i + 1), written[str(i + 1)]) for i in range(6)]


def broken(name, content):
    """A copy of a run with one file replaced (None: left out)."""
    def make(a_run, tmp_path):
        for path in a_run.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return ["--ckpt", str(tmp_path)]

    return make


def unknown_word(run, tmp_path):
    (tmp_path / "d.txt").write_text("zebra ?|| #### 1\n")
    return ["--ckpt", str(run), "--data", str(tmp_path / "d.txt")]


def changed_option(name, value):
    def make(a_run, tmp_path):
        config = json.loads((a_run / "config.json").read_text())
        config["options"][name] = value
        return broken("config.json", json.dumps(config).encode())(a_run, tmp_path)

    return make


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda run, tmp: [], "--ckpt DIR is missing"),
        (lambda run, tmp: ["--ckpt", "/nowhere"], "/nowhere: not a run"),
        (lambda run, tmp: ["--ckpt", str(run), "--pathway", "no-cot"], "--pathway no-cot: dart has cot and st"),
        (lambda run, tmp: ["--ckpt", str(run), "--data", "/nowhere.txt"], "/nowhere.txt: no such data file"),
        (lambda run, tmp: ["--ckpt", str(run), "--split", "dev"], "invalid choice: 'dev'"),
        (lambda run, tmp: ["--ckpt", str(run), "--json", str(tmp / "no" / "dir.json")], "its directory does not exist"),
        (lambda run, tmp: ["--ckpt", str(run), "--json", str(run / "config.json")], "config.json: exists already"),
        (lambda run, tmp: ["--ckpt", str(run), "--max_new_tokens", "60"], "the model has 64 positions"),
        (unknown_word, "'zebra' is not in the vocabulary"),
        (changed_option("rem_rank", "32"), "config.json: not the configuration of a run"),
        (changed_option("rem_rank", -1), "config.json: not the configuration of a run"),
        (changed_option("lora_rank", None), "config.json: not the configuration of a run"),
        (changed_option("method", "magic"), "config.json: not the configuration of a run"),
        (changed_option("n_st", 4.5), "config.json: not the configuration of a run"),
        (broken("words.json", b'"word"'), "different strings"),
        (broken("words.json", json.dumps(DEMO_WORDS + ["more"]).encode()), "the tokenizer has 60 ids"),
        (broken("config.json", b"{"), "config.json: not JSON"),
        (broken("config.json", b"{}"), "config.json: not the configuration of a run"),
        (broken("config.json", b"[]"), "config.json: not the configuration of a run"),
        (broken("adapter.safetensors", None), "adapter.safetensors"),
        (broken("adapter.safetensors", b"\x00" * 100), "not a whole safetensors file"),
        (broken("words.json", None), "no tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(a_run, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*arguments(a_run, tmp_path), "--latency", "0"])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err and captured.err.count("\n") == 1


def test_the_time_to_an_answer_has_its_thoughts_in_it(monkeypatch):
    """A forward pass of the model for each thought and each token."""
    options = dart.Options(method="codi", lora_rank=0, n_thoughts=5)
    tokenizer = data.demo_tokenizer()
    model = Transformer(MODELS["demo"], dart.CODI.adapters(tokenizer, options))
    method, calls = dart.CODI(model, tokenizer, options).eval(), []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    questions = [problem.question for problem in data.demo_problems(0)["test"][:3]]
    evaluation.latency(model, tokenizer, method.pathways["codi"], questions, 4)
    answers = dart.answer(model, tokenizer, method.pathways["codi"], questions, 4, batch_size=1)
    assert len(calls) == 3 * sum(answer.passes for answer in answers)  # as a warm-up, timed, and here


@pytest.mark.parametrize("name", ["dart", "codi"])
def test_compiled_answers_are_the_same(name, monkeypatch):
    """For DART few graphs, none broken: prompt and next token, of one row and of several."""
    options, tokenizer = dart.Options(method=name, lora_rank=0), data.demo_tokenizer()
    torch.manual_seed(0)
    config = dataclasses.replace(MODELS["demo"], num_hidden_layers=1)
    method = dart.METHODS[name](Transformer(config, dart.METHODS[name].adapters(tokenizer, options)), tokenizer, options)
    graphs, real = [], torch.compile
    how = {"backend": lambda graph, inputs: graphs.append(graph) or graph, "fullgraph": name == "dart"}
    monkeypatch.setattr(torch, "compile", lambda function, **more: real(function, **how, **more))
    questions = [problem.question for problem in data.demo_problems(0)["test"][:9]]
    questions[3] = "sam has 7 pens ?"  # a shorter one
    for pathway_name, pathway in method.pathways.items():
        torch._dynamo.reset()
        graphs.clear()
        plain, compiled = (evaluation.merged(method, pathway_name, compiled) for compiled in (False, True))
        for size in (1, 4, 3):
            want, found = (dart.answer(model, tokenizer, pathway, questions, 5, size) for model in (plain, compiled))
            assert found == want
        assert graphs and (len(graphs) <= 6 or name == "codi")
    torch._dynamo.reset()
