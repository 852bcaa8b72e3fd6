"""eval.py: intervals, tables, loading a run, the command line's errors. CPU, no network."""

import dataclasses
import importlib.util
import io
import json
import statistics
import sys
import types

import numpy as np
import pytest
import torch

import dart
import data
import eval as evaluation
import train
from data import DEMO_WORDS
from model import MODELS, Transformer


HAVE_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


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
            model = evaluation.merged_copy(method, name)
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
        (lambda run, tmp: ["--ckpt", str(run), str(run)], "several runs only with --plot alone"),
        (lambda run, tmp: ["--ckpt", str(run), "--ask", ""], "the question is empty"),
        (lambda run, tmp: ["--ckpt", str(run), "--lens", ""], "the question is empty"),
        (lambda run, tmp: ["--ckpt", str(run), "--lens", "zebra ?"], "'zebra' is not in the vocabulary"),
        (lambda run, tmp: ["--ckpt", str(run), "--lens", "--ask"], "do not go together"),
        (lambda run, tmp: ["--ckpt", str(run), "--lens", "--plot", str(tmp / "p.png")], "do not go together"),
        (lambda run, tmp: ["--ckpt", str(run), "--lens", "--examples", str(tmp / "e")], "--examples and --pathway go with the evaluation"),
        (lambda run, tmp: ["--ckpt", str(run), "--lens", "a", "--pathway", "cot"], "--examples and --pathway go with the evaluation"),
        (lambda run, tmp: ["--ckpt", str(run), "--lens", "a", "--data", "demo"], "--data and --limit go with"),
        (lambda run, tmp: ["--ckpt", str(run), "--plot", str(tmp / "p.png"), "--json", str(tmp / "j")], "nor --plot alone with --json"),
        (lambda run, tmp: ["--ckpt", str(run), "--json", str(tmp / "j"), "--examples", str(tmp / "j")], "would be two files"),
        (lambda run, tmp: ["--ckpt", str(run), "--lens", "--limit", "1"], "0 for the control"),
        (lambda run, tmp: ["--ckpt", str(run), "--plot", str(run / "config.json")], "exists already"),
        (lambda run, tmp: ["--ckpt", str(tmp), "--plot", str(tmp / "p.png")], "log.jsonl" if HAVE_MATPLOTLIB else "pip install matplotlib"),
        (lambda run, tmp: ["--ckpt", str(run), "--pathway", "no-cot"], "--pathway no-cot: dart has cot and st"),
        (lambda run, tmp: ["--ckpt", str(run), "--data", "/nowhere.txt"], "/nowhere.txt: no such data file"),
        (lambda run, tmp: ["--ckpt", str(run), "--split", "dev"], "invalid choice: 'dev'"),
        (lambda run, tmp: ["--ckpt", str(run), "--json", str(tmp / "no" / "dir.json")], "its directory does not exist"),
        (lambda run, tmp: ["--ckpt", str(run), "--json", str(run / "config.json")], "config.json: exists already"),
        (lambda run, tmp: ["--ckpt", str(run), "--max_new_tokens", "80"], "the model has 80 positions"),
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
    assert stop.value.code == 2 and message in captured.err
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")


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


def test_compiled_answers_are_the_same(monkeypatch):
    compiled_answers("dart", monkeypatch)  # of codi: long.py


def compiled_answers(name, monkeypatch):
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
        plain, compiled = (evaluation.merged_copy(method, pathway_name, compiled) for compiled in (False, True))
        for size in (1, 4, 3):
            want, found = (dart.answer(model, tokenizer, pathway, questions, 5, size) for model in (plain, compiled))
            assert found == want
        assert graphs and (len(graphs) <= 6 or name == "codi")
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- into silent thought

QUESTION = "sam has 7 pens gets 5 packs of 4 ?"


@pytest.fixture(scope="module")
def method(a_run):
    """The run, its weights much larger, so that the layers differ."""
    method, _ = evaluation.load_run(a_run)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in method.model.layers.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return method


def slow_states(method, ids, silent):
    """The output of every layer on a row, by hooks: [L, T, n]."""
    found = []
    hooks = [layer.register_forward_hook(lambda _, __, out: found.append(out[0])) for layer in method.model.layers]
    with torch.no_grad():
        hidden = method.model(torch.tensor([ids]), silent)
    for hook in hooks:
        hook.remove()
    return torch.stack(found), method.model.logits(hidden)[0].softmax(-1)


def cot_ids(method, question, written):
    return method.pathways["cot"].prompt(question, method.tokenizer) + written


def test_the_lens_shows_what_each_layer_would_say(method, monkeypatch):
    """Against hooks and a loop; the last layer says what the model does. The CoT pathway's z_N is behind the last separator it wrote."""
    tokenizer, model = method.tokenizer, method.model
    written = tokenizer.encode("Answer: <<7+5=12>> Answer: 3", bos=False, eos=True)
    monkeypatch.setattr(dart, "generate", lambda *_: [written])
    columns, distances = evaluation.lens(method, QUESTION, 24, 3)
    assert list(columns) == ["1 <st>", "2 <st>", "3 <st>", "4 <st>", "5 Answer", "6 :", "CoT's :"]
    prompt = method.pathways["st"].prompt(QUESTION, tokenizer)
    student, says = slow_states(method, prompt, True)
    teacher, _ = slow_states(method, cot_ids(method, QUESTION, written), False)
    assert tokenizer.decode(prompt[-6:]) == "<st> <st> <st> <st> Answer:"
    want = [student[:, i] for i in range(len(prompt) - 6, len(prompt))] + [teacher[:, -3]]
    for layers, states in zip(columns.values(), want, strict=True):
        for tokens, state in zip(layers, states, strict=True):
            shares = model.logits(model.norm(state)).softmax(-1)
            best = sorted(range(59), key=lambda i: -shares[i])[:3]
            assert [text for text, _ in tokens] == [tokenizer.decode([i]) for i in best]
            assert [p for _, p in tokens] == pytest.approx([shares[i].item() for i in best], rel=1e-4)
    for i, name in enumerate(list(columns)[:6]):
        assert columns[name][-1][0][1] == pytest.approx(says[len(prompt) - 6 + i].max().item(), rel=1e-4)
    far = [((t - s).abs().mean() / t.std()).item() for t, s in zip(teacher[:, -3], student[:, -1], strict=True)]
    assert distances == pytest.approx(far, rel=1e-4) and min(far) > 0.1
    monkeypatch.setattr(dart, "generate", lambda *_: [written[2:6]])  # no separator
    columns, distances = evaluation.lens(method, QUESTION, 24, 1)
    assert list(columns)[-1] == "6 :" and distances == []


def test_results_are_those_of_the_steps_but_the_last():
    problem = data.Problem("Ann has 12 pens and .5 more", ["<<6*2=12>>", "<<12+.5=12.5>>", "<<3*2.0=6.25>>", "so half", "<<1=1>>"], "6.25")
    assert evaluation.results_of(problem) == {"12.5", "half"}
    assert evaluation.results_of(data.Problem("a", ["<<6*2=12>>"], "12")) == set()
    assert evaluation.results_of(data.Problem("a", [], "12")) == set()


@pytest.mark.parametrize("k", [1, 5])
def test_how_often_a_result_is_among_the_likely_tokens(method, k):
    """Against loops over problems, layers and positions."""
    problems = data.demo_problems(0)["valid"][:12]
    rows, tokenizer, L = evaluation.probe(method, problems, k, rotations=3), method.tokenizer, 4
    seen, top, pairs = [], [], []
    for problem in problems:
        prompt, row = method.pathways["st"].prompt(problem.question, tokenizer), method.pathways["cot"].row(problem, tokenizer)
        student, teacher = slow_states(method, prompt, True)[0], slow_states(method, row.ids.tolist(), False)[0]
        assert tokenizer.decode(row.ids[: row.y].tolist()).endswith("Answer:")
        at = {"<st>": student[:, -6:-2], "z_N": student[:, -1:], "CoT's z_N": teacher[:, row.y - 1 : row.y]}
        shares = {place: method.model.logits(method.model.norm(states)).softmax(-1) for place, states in at.items()}
        seen.append({place: [{tokenizer.decode([i]) for p in range(x.shape[1]) for i in x[layer, p].topk(k)[1].tolist()} for layer in range(L)]
                     for place, x in shares.items()})  # fmt: skip
        top.append(shares["<st>"].max(2)[0].mean(1))
        pairs.append((teacher[:, row.y - 1], student[:, -1]))

    def share(place, wanted, layers):
        return statistics.mean(any(result in seen[i][place][layer] for layer in layers) for i, result in wanted)

    first = [problem.steps[0][2:-2].split("=")[1] for problem in problems]
    gold = [(i, r) for i, r in enumerate(first) if r not in problems[i].question.split() and r != problems[i].answer]
    order, control = np.random.default_rng(0).permutation(12), []
    for shift in (1, 2, 3):
        for place in range(12):
            i, j = order[place], order[place - shift]
            if (j, first[j]) in gold and first[j] not in (*problems[i].question.split(), problems[i].answer):
                control += [(i, first[j])] if (i, first[j]) not in gold else []
    assert 6 < len(gold) < 12 and len(control) > 12
    for layers, row in zip([[0], [1], [2], [3], range(4)], rows, strict=True):
        assert row["n"] == len(gold) and row["layer"] == (layers[0] + 1 if len(layers) == 1 else "any")
        for place in ("<st>", "z_N", "CoT's z_N"):
            assert row[place] == pytest.approx(share(place, gold, layers))
            assert row[f"{place} control"] == pytest.approx(share(place, control, layers))
        if len(layers) == 1:
            teacher, student = (torch.stack([pair[i][layers[0]] for pair in pairs]) for i in (0, 1))
            assert row["distance"] == pytest.approx(((teacher - student).abs().mean() / teacher.std()).item(), rel=1e-4)
            assert row["top"] == pytest.approx(torch.stack(top)[:, layers[0]].mean().item(), rel=1e-4)
    assert any(row[name] > 0 for row in rows for name in ("<st>", "<st> control"))


def test_all_tokens_hold_every_result(method):
    rows = evaluation.probe(method, data.demo_problems(0)["valid"][:9], 59)
    assert all(row["z_N"] == row["<st> control"] == 1.0 for row in rows)


def test_the_lens_as_text():
    columns = {"1 <st>": [[("a", 0.25), ("bb", 0.1)], [("c", 1.0), ("d", 0.0)]], "2 :": [[("e", 0.5), ("f", 0.5)], [("g", 0.9), ("h", 0.1)]]}
    assert evaluation.lens_table(columns, [0.5, 0.25], 100) == (
        "layer 1 <st> 2 :  distance\n"
        "    1 a 25   e 50    0.500\n"
        "      bb 10  f 50\n"
        "    2 c 100  g 90    0.250\n"
        "      d 0    h 10\n")  # fmt: skip
    narrow = evaluation.lens_table(columns, [], 24)
    assert narrow.splitlines()[0] == "layer 1 <st>" and narrow.splitlines()[6] == "layer 2 :"
    coloured = evaluation.lens_table(columns, [], 100, colours=True)
    assert "\x1b[48;5;255m\x1b[38;5;16mc 100 \x1b[0m" in coloured and "\x1b[48;5;232m\x1b[38;5;15md 0   \x1b[0m" in coloured


@pytest.mark.parametrize("terminal", [False, True])
def test_colours_are_for_terminals(a_run, capsys, monkeypatch, terminal):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    evaluation.main(["--ckpt", str(a_run), "--lens", QUESTION])
    assert ("\x1b[" in capsys.readouterr().out) == terminal


def test_the_lens_on_the_command_line(a_run, tmp_path, capsys):
    evaluation.main(["--ckpt", str(a_run), "--lens", QUESTION, "--top_k", "2", "--json", str(tmp_path / "q.json")])
    out, (figures,) = capsys.readouterr().out, json.loads((tmp_path / "q.json").read_text())
    assert out.startswith("layer 1 <st>") and out.count("\n") == 1 + 4 * 2
    assert figures["question"] == QUESTION and [len(layer) for layer in figures["columns"]["6 :"]] == [2] * 4
    evaluation.main(["--ckpt", str(a_run), "--lens", "--limit", "20", "--json", str(tmp_path / "d.json")])
    out, rows = capsys.readouterr().out, json.loads((tmp_path / "d.json").read_text())
    assert [row["layer"] for row in rows] == [1, 2, 3, 4, "any"] and rows[0]["data"] == "demo" and out.count("\n") == 10


@pytest.mark.parametrize("name", ["cot", "codi", "coconut"])
def test_methods_that_answer_in_several_passes_have_no_lens(name):
    options, tokenizer = dart.Options(method=name, lora_rank=0), data.demo_tokenizer()
    model = Transformer(MODELS["demo"], dart.METHODS[name].adapters(tokenizer, options))
    with pytest.raises(ValueError, match=f"{name} does not answer in one pass"):
        evaluation.look(dart.METHODS[name](model, tokenizer, options), {}, evaluation.Options(lens=QUESTION))


def test_a_question_is_asked_through_both_pathways(a_run, tmp_path, capsys):
    evaluation.main(["--ckpt", str(a_run), "--ask", f"  {QUESTION} ", "--json", str(tmp_path / "a.json")])
    lines, rows = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "a.json").read_text())
    assert lines[0] == QUESTION and [line.split()[1] for line in (lines[2], *lines[4:6])] == ["pathway", "st", "cot"]
    method, run = evaluation.load_run(a_run)
    for row, name in zip(rows, ("st", "cot"), strict=True):
        (found,) = dart.answer(method.model, method.tokenizer, method.pathways[name], [QUESTION], run.max_new_tokens)
        assert (row["pathway"], row["passes"], row["written"]) == (name, found.passes, " ".join(found.text.split()))
        assert row["answer"] == method.pathways[name].read(found.text).strip() and row["ms"] > 0


def test_what_a_model_writes_does_not_break_the_table(a_run, capsys, monkeypatch):
    monkeypatch.setattr(dart, "answer", lambda *_: [dart.Answer("one\ntwo | \x1b[31mred", 3)])
    evaluation.main(["--ckpt", str(a_run), "--ask", QUESTION])
    assert r"| one two \| \x1b[31mred |" in capsys.readouterr().out


def test_questions_of_standard_input(a_run, tmp_path, capsys, monkeypatch):
    """One that cannot be asked is named, and the others are answered; then the exit code is 2."""
    content = f"{QUESTION}\n\n  \nzebra ?\n\xff\nann has 3 eggs buys 4 packs of 5 ?".encode("latin-1")
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--ckpt", str(a_run), "--ask", "--json", str(tmp_path / "a.json")])
    out, errors = capsys.readouterr()
    assert stop.value.code == 2 and out.count("| cot ") == 2 and "ann has 3 eggs" in out
    assert [line[:6] for line in errors.splitlines()] == ["error:"] * 3 and "2 of the questions" in errors and "'zebra'" in errors
    assert len(json.loads((tmp_path / "a.json").read_text())) == 4  # what was answered is kept
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"")))
    evaluation.main(["--ckpt", str(a_run), "--ask"])
    assert capsys.readouterr().out == ""


def test_the_curves_of_a_log(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "cot": 2.0, "st": 1.5, "lr": 0.1, "grad_norm": 3}\n{"step": 1, "valid": {"st": 0.5}}\n'
        '{"step": 2, "skipped": [1]}\n{"step": 3, "cot": 1.0, "st": 0.5, "lr": 0.1}\n')  # fmt: skip
    assert evaluation.loss_curves(tmp_path) == {"cot": ([1, 3], [2.0, 1.0]), "st": ([1, 3], [1.5, 0.5])}
    for text in ("", "3\n", "[]\n", '{"lr": 3}\n', '{"step": 1, "a": "x", "lr": 1}\n', '{"x": 1, "a": 2, "lr": 1}\n', "{", "[" * 10**5):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(ValueError, match="log.jsonl"):
            evaluation.loss_curves(tmp_path)


def test_an_image_of_losses_and_of_the_lens(a_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="draws")
    evaluation.main(["--ckpt", str(a_run), str(a_run), "--plot", str(tmp_path / "losses.png")])
    evaluation.main(["--ckpt", str(a_run), "--lens", QUESTION, "--plot", str(tmp_path / "lens.svg")])
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "lens.svg").read_text()
    for name, message in (("p.xyz", "xyz"), ("p.png", "log.jsonl")):
        directory = a_run if name == "p.xyz" else tmp_path
        with pytest.raises(SystemExit) as stop:
            evaluation.main(["--ckpt", str(directory), "--plot", str(tmp_path / name)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lens.svg", "losses.png"]
    columns = {"1 <st>": [[("a", 0.25), ("b", 0.1)], [("c", 1.0), ("d", 0.0)]], "2 :": [[("e", 0.5)], [("$", 0.9)]], "CoT's :": [[("g", 0.75)], [("h", 0)]]}
    losses, heat = evaluation.figure_of([a_run, a_run], columns).axes
    assert heat.images[0].get_array().tolist() == [[0.25, 0.5, 0.75], [1.0, 0.9, 0.0]]
    assert [(t.get_position(), t.get_text()) for t in heat.texts][:4] == [((0, 0), "a"), ((1, 0), "e"), ((2, 0), "g"), ((0, 1), "c")]
    curves = evaluation.loss_curves(a_run)
    assert [line.get_ydata().tolist() for line in losses.lines] == 2 * [values for _, values in curves.values()]


def test_without_matplotlib_that_is_said(a_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        evaluation.main(["--ckpt", str(a_run), "--plot", str(tmp_path / "p.png")])
    assert "pip install matplotlib" in capsys.readouterr().err
