"""eval.py: figures, tables, the lens, plots, and the export to Hugging Face's format."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT
from pytest import approx
from safetensors.torch import load_file
from torch.testing import assert_close

import dart
import data
import eval as evaluation
import train
from data import Problem, Tokenizer
from model import MODELS, Transformer

QUESTION = "sam has 7 pens gets 5 packs of 4 ?"


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A DART run of three steps on the built-in task."""
    out = tmp_path_factory.mktemp("runs") / "run"
    small = "--seed 3 --steps 3 --batch_size 8 --eval_size 4 --log_every 1 --device cpu --compare"
    train.main([*small.split(), "--out", str(out)])
    return out


def tiny(method="dart", tokenizer=None, tied=False, says=(), family="llama", **options):
    """A method around a random model of two layers. says: a chain of ids; whatever stands before,
    the model writes behind each of them the next one. Without, it never writes <st> or EOS."""
    tokenizer = tokenizer or data.demo_tokenizer()
    given = dict(dtype="fp32", n_st=4, lora_rank=0, rem_rank=8, rem_alpha=2.0, max_new_tokens=24)
    options = dart.Options(method=method, **given | options)
    shape = dict(vocab_size=tokenizer.size, num_hidden_layers=2, tie_word_embeddings=tied)
    shape["model_type"] = family
    torch.manual_seed(0)
    method = dart.build(options, tokenizer, dataclasses.replace(MODELS["demo"], **shape)).eval()
    model = method.model
    for p in model.layers.parameters():
        p.data.add_(0.3 * torch.randn_like(p)).mul_(0.3 if says else 1)
    if says:
        model.embed_tokens.data = torch.randn_like(model.embed_tokens).sign()
        model.lm_head.data.mul_(0.1)
        for token, following in zip(says[:-1], says[1:]):
            model.lm_head.data[following] += model.embed_tokens.data[token]
    else:
        model.head.data[list(tokenizer.added.values())] = 0
    return method


def word_ids(text):
    return [data.DEMO_WORDS.index(word) for word in text.split()]


def prompt_ids(method, name, question=QUESTION):
    return method.pathways[name].prompt(question, method.tokenizer).ids.tolist()


def logits_of(model, ids, silent=False):
    """Of the last four tokens: [4, V]."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids]), silent))[0, -4:].float()


@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (5, 10), (562, 1319), (1, 1)])
def test_wilson_bounds_are_where_the_share_is_just_tenable(right, n):
    """Wilson's definition: both are 1.96 of their own standard deviations away from it."""
    z, share = statistics.NormalDist().inv_cdf(0.975), right / n
    low, high = evaluation.wilson(right, n)
    assert 0 <= low <= share <= high + 1e-9 <= 1 + 1e-9 and high - low > 0.05
    for p in (low, high):
        assert (share - p) ** 2 == approx(z * z * p * (1 - p) / n, abs=1e-8)


def test_table_has_the_columns_of_any_row():
    assert evaluation.table([{"data": "demo", "exact": 0.125}, {"ms": 2.25, "unknown": 1}]) == (
        "| data | exact % | ms  |\n"
        "| ---- | ------- | --- |\n"
        "| demo | 12.5    | -   |\n"
        "| -    | -       | 2.2 |"
    )
    row = dict(exact_sd=0.0123, exact_interval=(0.1, 0.256), n=8, passes=2.0, speedup=3.14159)
    row |= dict(all_flops=1.234e15, trained_parameters=12345678, peak_memory=2**29, seconds=59.7)
    cells = [cell.strip() for cell in evaluation.table([row]).splitlines()[-1].split("|")[1:-1]]
    assert cells == "1.2 10.0-25.6 8 2.0 3.14 12,345,678 1.23e+15 0.50 60".split()


def test_over_seeds_is_the_mean_and_one_interval():
    one = dict(exact=0.25, numeric=0.5, n=8, passes=2.0, ms=3.0, ms_p90=4.0, seconds=10.0)
    one |= dict(trained_parameters=7, peak_memory=100, flops={"cot": 5.0, "st": 3.0})
    other = one | dict(exact=0.75, ms=5.0, n=4, flops={"cot": 7.0, "st": 1.0})
    row = evaluation.over_seeds([one, other])
    assert (row["exact"], row["exact_sd"], row["ms"]) == (0.5, approx(0.125**0.5), 4.0)
    assert row["exact_interval"] == evaluation.wilson(5, 12)  # 2 of 8 and 3 of 4
    assert (row["n"], row["all_flops"], row["one_pathway"]) == (12, 8.0, 2.0)
    assert "exact_sd" not in evaluation.over_seeds([one])


def test_measure_counts_what_a_model_writes():
    method = tiny(says=word_ids("? 12 Answer : 7 <eos>"))
    problems = [Problem("sam has 7 pens ?", [], gold) for gold in ("7", "7.0", "8", "7")]
    figures, _ = evaluation.measure(evaluation.answerer(method, "st"), problems)
    expected = {"pathway": "st", "n": 4, "exact": 0.5, "numeric": 0.75, "passes": 2.0}
    expected["exact_interval"] = evaluation.wilson(2, 4)
    assert figures == expected | {"numeric_interval": evaluation.wilson(3, 4)}
    figures, records = evaluation.measure(evaluation.answerer(method, "cot"), problems, 3)
    assert (figures["exact"], figures["passes"]) == (0.5, 5.0)  # 12 Answer : 7 <eos>
    assert (records[0]["text"], records[0]["answer"]) == ("12 Answer:7", "7")
    assert method.model.merged is None  # each time a copy was


def test_times_are_taken_in_turns_behind_a_warm_up(monkeypatch):
    """By a clock that goes on by a prompt's length in each pass; one of two has <st>."""
    method, seen = tiny(), []
    answerers = [evaluation.answerer(method, name, 1) for name in ("st", "cot")]
    for one in answerers:
        layer = one.model.layers[0]
        layer.register_forward_hook(lambda layer, inputs, _: seen.append(inputs[0].shape[1]))
    monkeypatch.setattr(time, "perf_counter", lambda: float(sum(seen)))
    lengths = [13, 8, 18, 10, 15, 9, 17, 11, 16, 12, 14]  # BOS, question, four <st>, Answer, :
    times = evaluation.time_in_turns(answerers, ["sam " * (n - 7) for n in lengths], "cpu")
    assert times == [{"ms": 13e3, "ms_p90": 17e3}, {"ms": 7e3, "ms_p90": 11e3}]
    assert seen == [n - less for n in lengths[:5] + lengths for less in (0, 6)]


def test_evaluation_of_several_pathways_and_data_sets(a_run, tmp_path, capsys):
    """--best: here the last weights are damaged."""
    run, mine = shutil.copytree(a_run, tmp_path / "run"), str(tmp_path)
    (run / "adapter.safetensors").write_bytes(b"damaged")
    (tmp_path / "valid.txt").write_text("sam has 7 pens ?||<<7+5=12>> #### 12\n" * 5)
    argv = f"--ckpt {run} --pathway st cot --data {mine} demo --split valid --limit 3 --latency 1"
    argv += f" --json {mine}/e.json --examples {mine}/e.jsonl"
    evaluation.main(["--best", *argv.split()])
    rows = json.loads((tmp_path / "e.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    names = [(name, pathway) for name in (mine, "demo") for pathway in ("st", "cot")]
    assert [(row["data"], row["pathway"], row["n"]) for row in rows] == [(*n, 3) for n in names]
    timing = "ms: the median time to an answer at batch 1, on "
    assert capsys.readouterr().out.startswith(f"{evaluation.table(rows)}\n\n{timing}")
    kept = json.loads((run / "eval.json").read_text().splitlines()[-1])
    assert kept["figures"] == rows and kept["options"]["limit"] == 3
    for st, cot in (rows[:2], rows[2:]):
        assert (st["speedup"], cot["speedup"]) == (cot["ms"] / st["ms"], 1.0)
    method, _ = dart.load_run(run, best=True)
    for i, (name, pathway) in enumerate(names):
        problems = data.load(name, "valid", 3)[:3]  # of the run's seed
        _, expected = evaluation.measure(evaluation.answerer(method, pathway), problems)
        about = {"data": name, "pathway": pathway}
        assert records[3 * i : 3 * i + 3] == [about | record for record in expected]
    with pytest.raises(ValueError, match="adapter.safetensors"):
        evaluation.main(argv.split()[:2])
    short = "--best --limit 1 --latency 0 --max_new_tokens 1"
    evaluation.main([*argv.split()[:2], *short.split()])
    first, second = map(json.loads, (run / "eval.json").read_text().splitlines())
    assert (first["figures"], second["figures"][0]["passes"]) == (rows, 1)


def test_a_problem_and_its_answer_may_fill_the_positions():
    method = tiny()
    longest = max(len(prompt_ids(method, name)) for name in method.pathways)
    evaluation.check_room(method, 0, [Problem(QUESTION, [], "")], 81 - longest)
    assert len(method.answer([QUESTION], "st", 81 - longest)) == 1
    with pytest.raises(ValueError, match="takes 81 tokens, but the model has 80"):
        evaluation.check_room(method, 0, [Problem(QUESTION, [], "")], 82 - longest)


def test_ask_tells_milliseconds(monkeypatch):
    method, clock = tiny(says=word_ids("? 7 <eos>")), itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    (row,) = evaluation.ask(method, [evaluation.answerer(method, "st")], QUESTION)
    assert row["ms"] == 1000.0


def test_ask_answers_through_both_pathways(a_run, tmp_path, capsys):
    """Of standard input, questions that cannot be asked are named and counted."""
    evaluation.main(["--ckpt", str(a_run), "--ask", f"  {QUESTION} "])
    assert capsys.readouterr().out.startswith(f"{QUESTION}\n\n| answers through ")
    argv = ["--ckpt", str(a_run), "--ask", QUESTION, "--max_new_tokens", "1"]
    evaluation.main([*argv, "--json", str(tmp_path / "one.json")])
    rows = json.loads((tmp_path / "one.json").read_text())
    assert [row["passes"] for row in rows] == [1, 1]
    content = f"\xef\xbb\xbf{QUESTION}\r\n\n  \nzebra \x1b[2J?\n\xff\n{{}}\n"
    content = (content + '{"question": "ann has\\n3 eggs ?"}').encode("latin-1")
    argv = [sys.executable, evaluation.__file__, "--ckpt", str(a_run), "--ask", "--json", "a.json"]
    done = subprocess.run(argv, input=content, capture_output=True, cwd=tmp_path)
    errors = done.stderr.decode().splitlines()
    assert done.returncode == 2 and [error[:7] for error in errors] == ["error: "] * 4
    assert "'zebra'" in errors[0] and "'question'" in errors[2]
    assert errors[3] == "error: 3 of the questions could not be asked"
    rows, (method, _) = json.loads((tmp_path / "a.json").read_text()), dart.load_run(a_run)
    assert [row["pathway"] for row in rows] == ["st", "cot"] * 2
    for row, question in zip(rows, [QUESTION] * 2 + ["ann has\n3 eggs ?"] * 2):
        (answer,) = method.answer([question], row["pathway"])
        assert (row["written"], row["passes"]) == answer and row["question"] == question
        assert row["answer"] == method.pathways[row["pathway"]].extract_answer(answer.text).strip()


def test_standard_streams_may_be_closed_or_full(a_run):
    def ask(closed):
        words = f"{sys.executable} eval.py --ckpt {a_run} --ask {closed}; exit ${{PIPESTATUS[0]}}"
        how = dict(input=QUESTION, cwd=ROOT, text=True, capture_output=True)
        return subprocess.run(["bash", "-c", words], **how)

    codes = {"<&-": 0, ">&-": 0, "| true": 1, ">/dev/full": 2}
    with ThreadPoolExecutor(2) as pool:
        for done, code in zip(pool.map(ask, codes), codes.values(), strict=True):
            assert (done.returncode, done.stderr.count("\n")) == (code, code // 2), done
            assert done.stdout == ""


def test_ask_shows_hostile_text_harmlessly(capsys):
    tokenizer = Tokenizer.from_pretrained(FIXTURES / "tokenizer-gpt2")
    ids = tokenizer.encode("Answer:\x1b[31m|\n\r7", bos=False, eos=True)
    method = tiny(tokenizer=tokenizer, says=ids)
    rows = evaluation.ask(method, [evaluation.answerer(method, "st", 24)], "a|b \x1b[2J\x07?")
    out = capsys.readouterr().out
    assert rows[0]["written"] == "\x1b[31m|\n\r7"
    assert out.startswith("a\\|b \\x1b[2J\\x07?\n\n")
    assert r"| \x1b[31m\| 7 |" in out.replace("  ", "") and out.count("\n") == 6
    assert all(character.isprintable() or character == "\n" for character in out)


def slow_states(method, ids, silent):
    """The output of every layer on a row, by hooks: [L, T, n]."""
    found, model = [], copy.deepcopy(method.model)
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: found.append(output[0]))
    logits_of(model, ids, silent)
    return torch.stack(found)


def slow_distance(teacher, student):
    return approx(((teacher - student).abs().mean() / teacher.std()).item(), rel=1e-4)


def test_lens_sets_the_silent_z_n_beside_that_of_written_steps():
    """The CoT pathway's z_N ends its last separator; a layer says norm and head of its output."""
    method, k = tiny(says=word_ids("? Answer : Answer")), 2
    columns, distances = evaluation.lens(method, QUESTION, 5, k)
    places = ["1 <st>", "2 <st>", "3 <st>", "4 <st>", "5 Answer", "6 :", "CoT's :"]
    assert list(columns) == places
    cot = prompt_ids(method, "cot") + word_ids("Answer : Answer :")
    student = slow_states(method, prompt_ids(method, "st"), True)[:, -6:]
    teacher = slow_states(method, cot, False)[:, -1:]
    states = torch.cat((student, teacher), dim=1)  # [L, P, n]
    for layer, place in np.ndindex(2, 7):
        x = states[layer, place]
        x = x / (x.square().mean() + 1e-5).sqrt() * method.model.norm.weight
        shares = (method.model.lm_head @ x).softmax(dim=0).tolist()
        best = sorted(range(59), key=lambda i: -shares[i])[:k]
        cell = columns[places[place]][layer]
        assert [word_ids(text)[0] for text, _ in cell] == best
        assert [p for _, p in cell] == approx([shares[i] for i in best], rel=1e-4)
    assert distances == [slow_distance(t[0], s[-1]) for t, s in zip(teacher, student)]
    for method in (tiny(), tiny("no-cot")):  # that write no separator, or have no CoT pathway
        columns, distances = evaluation.lens(method, QUESTION, 5, k)
        assert list(columns)[-1].endswith(" :") and "CoT's :" not in columns and not distances


def test_lens_hit_rate_against_loops(monkeypatch):
    assert evaluation.results_of(Problem("q", ["<<3/2=1.5>>", "s"], "4"))[0] == {"1.5"}
    monkeypatch.setattr(evaluation, "CONTROLS", 3)
    method, problems, k = tiny(), data.load("demo", "valid")[:11], 5
    problems.append(Problem("sam has 7 pens ?", ["<<9+8=17>>", "<<17%9=11>>"], "4"))
    n, states = len(problems), []  # of each problem: {place: [L, P, n]}
    for problem in problems:
        st = slow_states(method, prompt_ids(method, "st", problem.question), True)
        example = method.pathways["cot"].example(problem, method.tokenizer)
        cot = slow_states(method, example.ids.tolist()[: example.y_start], False)
        states.append({"<st>": st[:, -6:-2], "z_N": st[:, -1:], "CoT's z_N": cot[:, -1:]})
    known = [{*problem.question.split(), problem.answer} for problem in problems]
    first = [problem.steps[0][2:-2].split("=")[1] for problem in problems]
    gold = [(i, first[i]) for i in range(n) if first[i] not in known[i]]
    control = []
    for i, shift in np.ndindex(n, 3):
        j = (i + shift + 1) % n
        if (j, first[j]) in gold and first[j] not in known[i] and (i, first[j]) not in gold:
            control.append((i, first[j]))
    assert 6 < len(gold) < 12 and len(control) > 12

    def share(pairs, place, layers):
        likely = [evaluation.logit_lens(method.model, s[place][layers], k)[1] for s in states]
        return statistics.mean(word_ids(word)[0] in likely[i] for i, word in pairs)

    rows = evaluation.lens_hit_rate(method, problems, k)
    assert [(row["layer"], row["n"]) for row in rows] == [(x, len(gold)) for x in (1, 2, "any")]
    for layers, row in zip(([0], [1], [0, 1]), rows):
        for place in ("<st>", "z_N", "CoT's z_N"):
            assert [*row[place]] == [share(some, place, layers) for some in (gold, control)]
        if row["layer"] != "any":
            t, s = (torch.cat([x[at][layers] for x in states]) for at in ("CoT's z_N", "z_N"))
            assert row["distance"] == slow_distance(t, s)
    assert any(sum(row["<st>"]) for row in rows)


CELLS = {  # token -> layer -> the likeliest tokens
    "1 <st>": [[("a", 0.25), ("bb", 0.1)], [("c", 1.0), ("d", 0.0)]],
    "2 :": [[("e", 0.5), ("f", 0.5)], [("$x$", 0.9), ("h", 0.1)]],
    "CoT's :": [[("g", 0.75), ("b", 0.1)], [("h", 0.5), ("b", 0.1)]],
}


def test_lens_table_fits_the_width():
    for width in range(26, 74):
        text = evaluation.lens_table(CELLS, [0.5, 0.25], width)
        assert max(map(len, text.splitlines())) <= width
        blocks = [block.splitlines() for block in text.split("\n\n")]
        headings = [re.split(r" *\| *", block[0])[1:-1] for block in blocks]
        assert all(heading[0] == "layer" for heading in headings)
        assert sum((heading[1:] for heading in headings), []) == [*CELLS, "distance"]
    assert text.endswith("\n| 1     | a 25%  bb 10% | e 50%  f 50%   | g 75%  b 10% | 0.500    |")


def test_lens_on_the_command_line(a_run, tmp_path, capsys):
    argv = ["--ckpt", str(a_run), "--top_k", "2", "--json"]
    evaluation.main([*argv, str(tmp_path / "q.json"), "--lens", QUESTION])
    evaluation.main([*argv, str(tmp_path / "d.json"), "--lens", "--limit", "20"])
    figures, rows = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "qd")
    out = capsys.readouterr().out
    assert [len(layer) for layer in figures[0]["columns"]["10 :"]] == [2] * 4
    assert [row["layer"] for row in rows] == [1, 2, 3, 4, "any"] and rows[0]["data"] == "demo"
    assert out.startswith("| layer | 1 <st> ") and "| layer | n " in out


@pytest.mark.parametrize("text", ["", "3", '{"step": 1, "cot": "x", "lr": 1}', "{", "[" * 10**5])
def test_damaged_log_is_refused(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match="log.jsonl"):
        evaluation.log_curves(tmp_path)


def test_plots_draw_the_figures(a_run, tmp_path):
    figure = pytest.importorskip("matplotlib.figure", reason="draws")
    losses, lens, accuracy, bars = (figure.Figure() for _ in range(4))
    evaluation.draw_losses(losses, [a_run, a_run])
    log = [json.loads(line) for line in (a_run / "log.jsonl").read_text().splitlines()]
    values = [[x[name] for x in log if name in x] for name in ("cot", "st", "distill")]
    curves = [line.get_xydata().T.tolist() for line in losses.axes[0].lines]
    assert curves == 2 * [[[1, 2, 3], some] for some in values]
    (valid,) = [line["valid"] for line in log if "valid" in line]
    found = {(line.get_xydata()[-1].tolist()[1]) for line in losses.axes[1].lines}
    assert found == {100 * share for share in valid.values()}
    evaluation.draw_lens(lens, "how many $?", CELLS)
    assert lens.axes[0].get_title() == r"how many \$?"
    assert lens.axes[0].images[0].get_array().tolist() == [[0.25, 0.5, 0.75], [1.0, 0.9, 0.5]]
    texts = {text.get_position(): text.get_text() for text in lens.axes[0].texts}
    assert (texts[2, 0], texts[0, 1], texts[1, 1]) == ("g", "c", r"\$x\$")
    rows = [dict(row=f"C = {n}", pathway="st", exact=n / 40, ms=30 + n) for n in (0, 20)]
    rows = [row | dict(exact_interval=(0, 0.75), paper="40.5/37") for row in rows]
    evaluation.draw_table(bars, {"svamp": rows})
    assert [bar.get_height() for bar in bars.axes[0].patches] == [0, 50]
    assert bars.axes[0].lines[-1].get_ydata().tolist() == [40.5, 40.5]
    both = [one for row in rows for one in (row, row | {"pathway": "cot", "exact": 0.7})]
    evaluation.draw_figure2(accuracy, {"svamp": both})
    left, right = (axes.lines[0].get_xydata().tolist() for axes in accuracy.axes)
    assert left == [[0, 0], [20, 50]] and right == [[0, 30], [20, 50]]
    for axes in (bars.axes[0], accuracy.axes[0]):
        ends = [segment[:, 1].tolist() for segment in axes.collections[0].get_segments()]
        assert ends == [[0, 75], [0, 75]]
    evaluation.main(["--ckpt", str(a_run), str(a_run), "--plot", str(tmp_path / "p.png")])
    evaluation.main(["--ckpt", str(a_run), "--plot", str(tmp_path / "p.svg"), "--lens", QUESTION])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "p.svg").read_text()


REFUSED = """
--plot new.png                           --ckpt DIR
--ckpt RUN RUN --plot new.png --lens x   --ckpt DIR
--ckpt RUN --ask x --lens x              --lens does not go with --ask
--ckpt RUN --lens --plot new.png         --plot does not go with --lens without a question
--ckpt RUN --lens x --examples new       --examples does not go with --lens
--ckpt RUN --ask x --pathway st          --pathway does not go with --ask
--ckpt RUN --export new --limit 1        --limit does not go with --export
--ckpt RUN --export x --pathway st cot   --export writes one pathway
--ckpt RUN --plot new.png --json new     --json does not go with --plot
--ckpt RUN --plot new.png --best         --best does not go with --plot
--ckpt RUN --json new --examples ./new   new: exists already
--ckpt RUN --json there                  there: exists already
--ckpt RUN --examples there              there: exists already
--ckpt RUN --plot there                  there: exists already
--ckpt RUN --export there                there: exists already
--ckpt RUN --json no/directory           directory: exists already, cannot be written
--ckpt RUN --pathway no-cot              --pathway no-cot: there are cot, st
--ckpt RUN --max_new_tokens 80           the model has 80 positions
--ckpt RUN --lens zebra                  'zebra' is not in the vocabulary
--ckpt RUN --data svamp --data_dir x     x/svamp/SVAMP.json: no such file
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_what_cannot_be_done_is_refused_and_nothing_written(a_run, line, tmp_path, monkeypatch):
    words, message = line.replace("RUN", str(a_run)).split("  ", 1)
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("precious")
    with pytest.raises((ValueError, FileNotFoundError), match=message.strip()):
        evaluation.main(words.split())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


RUNS = [(run, name) for run in ("run-llama", "run-qwen2", "run-gpt2") for name in ("st", "cot")]


def exported(method, directory, name):
    evaluation.export(copy.deepcopy(method), directory, name)
    return directory


def exported_ids(method, name, question):
    """A prompt as an exported model reads it: <st> may have another id."""
    silent, (_, st_id) = method.pathways[name].special_ids[:1], method.tokenizer.export(True)
    return [st_id if i in silent else i for i in prompt_ids(method, name, question)]


def check_logits(found, method, name, question, atol):
    """Against the run's own; a new <st> scores the mean of all tokens."""
    _, st_id = method.tokenizer.export(True)
    want = logits_of(method.model, prompt_ids(method, name, question), method.pathways[name].silent)
    others = [i for i in range(method.tokenizer.size) if i != st_id]
    assert_close(found[:, others], want[:, others], rtol=0, atol=atol)
    if name in ("st", "pause") and method.model.new_embeddings is not None:
        assert_close(found[:, st_id], want.mean(dim=1), rtol=0, atol=atol)


@pytest.mark.parametrize("run, name", RUNS)
def test_export_is_what_transformers_read_and_computes_what_the_run_does(run, name, tmp_path):
    expected = json.loads((FIXTURES / run / "expected.json").read_text())
    logits = load_file(FIXTURES / run / "expected.safetensors")
    method, _ = dart.load_run(FIXTURES / run)
    prompts = [method.pathways[name].prompt(q, method.tokenizer) for q in expected["questions"]]
    answers = dart.generate(method.model, method.tokenizer, method.pathways[name], prompts, 8)
    assert answers == expected[f"{name} fp32"]["answers"]
    for dtype, atol in (("fp32", 2e-5), ("bf16", 0.2)):
        want, hf = expected[f"{name} {dtype}"], tmp_path / dtype
        how = f"--pathway {name} --dtype {dtype} --export {hf}".split()
        evaluation.main(["--ckpt", str(FIXTURES / run), *how])
        contents = {path.name: path.read_bytes() for path in hf.glob("*.json")}
        assert want["files"] == {f: hashlib.sha256(c).hexdigest() for f, c in contents.items()}
        again = Transformer.from_pretrained(hf, dtype=dart.DTYPES[dtype]).eval()
        for i, question in enumerate(expected["questions"]):
            ids = exported_ids(method, name, question)
            theirs = logits[f"{name} {dtype} {i}"].float()
            assert want["ids"][i] == ids
            assert_close(logits_of(again, ids), theirs, rtol=0, atol=atol)
            check_logits(theirs, method, name, question, atol)


@pytest.mark.parametrize("run, name", RUNS)
def test_transformers_answer_as_the_run_does(run, name, tmp_path):
    """In a batch of several lengths, padded on the left, too; loaded as the card says."""
    pytest.importorskip("transformers", reason="reads what was exported")
    method, _ = dart.load_run(FIXTURES / run)
    hf, pathway = exported(method, tmp_path / "hf", name), method.pathways[name]
    questions = ["Why?", "How many apples does Zoë have left?", "They've 7 and 12,345 of 3½"]
    texts = [question + ("<st>" * 3 + "Answer:") * (name == "st") for question in questions]
    prompts = [pathway.prompt(question, method.tokenizer) for question in questions]
    answers = dart.generate(method.model, method.tokenizer, pathway, prompts, 8)
    code = re.search(r"```python\n(.*?)```", (hf / "README.md").read_text(), re.DOTALL)[1]
    exec(code.replace('"..."', repr(questions[1])), card := {"DIRECTORY": str(hf)})
    tokenizer, model = card["tokenizer"], card["model"]
    assert card["ids"][0].tolist() == exported_ids(method, name, questions[1])
    for question, text in zip(questions, texts):
        ids = tokenizer(text).input_ids
        assert ids == exported_ids(method, name, question)
        with torch.no_grad():
            check_logits(model(torch.tensor([ids])).logits[0, -4:], method, name, question, 2e-5)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    rows = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[: len(answer)] for row, answer in zip(rows, answers)] == answers


METHODS = [("dart", "st", 4), ("dart", "st", 0), ("dart", "cot", 4), ("codi", "cot", 4)]
METHODS += [("no-cot", "no-cot", 4), ("pause", "pause", 4)]


@pytest.mark.parametrize("name, pathway, n_st", METHODS)
def test_export_reads_back_and_its_card_says_how_to_prompt(name, pathway, n_st, tmp_path, capsys):
    """The card's Python, run as it stands, prints our answer."""
    chain = word_ids("? sam has 7 packs of 4 << 12 + 1 = 13 >> Answer : 9 <eos>")
    method = tiny(name, says=chain if pathway == "cot" else (), n_st=n_st, tied=name == "pause")
    if method.model.new_embeddings is not None:
        method.model.new_embeddings.data = torch.randn_like(method.model.new_embeddings)
    hf = exported(method, tmp_path / "hf", pathway)
    again, ids = Transformer.from_pretrained(hf), exported_ids(method, pathway, QUESTION)
    check_logits(logits_of(again, ids), method, pathway, QUESTION, 1e-4)
    assert not again.config.tie_word_embeddings  # no longer, where <st> was trained
    assert len({path.stat().st_mode for path in hf.iterdir()}) == 1
    pytest.importorskip("transformers", reason="reads what was exported")
    code = re.search(r"```python\n(.*?)```", (hf / "README.md").read_text(), re.DOTALL)[1]
    exec(code.replace('"..."', repr(QUESTION)), {"DIRECTORY": str(hf)})
    (answer,) = method.answer([QUESTION], pathway)
    assert capsys.readouterr().out.splitlines()[-1] == answer.text.rpartition("Answer:")[2]


def test_the_card_reads_texts_as_we_do_whatever_the_family(tmp_path):
    """transformers' AutoTokenizer goes by the model's type: Qwen2's cuts words.json's otherwise."""
    pytest.importorskip("transformers", reason="reads what was exported")
    method = tiny(family="qwen2", model="bases/Small-1B")
    hf = exported(method, tmp_path / "hf", "st")
    card = (hf / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"..."', repr(QUESTION))
    exec(code, found := {"DIRECTORY": str(hf)})
    assert found["ids"][0].tolist() == prompt_ids(method, "st")
    assert "base model was `Small-1B`" in card


@pytest.mark.parametrize("name", ["codi", "coconut", "cot"])
def test_methods_of_several_passes_have_no_lens_and_thoughts_no_export(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} does not answer in one pass"):
        evaluation.run_lens(tiny(name), {}, evaluation.Options(lens=QUESTION))
    if name != "cot":
        with pytest.raises(ValueError, match=f"{name}: continuous thoughts"):
            exported(tiny(name), tmp_path / "hf", name)
    assert not list(tmp_path.iterdir())


def test_export_onto_a_full_disk_is_one_line_and_leaves_nothing(a_run, tmp_path):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    command = [sys.executable, "eval.py", "--ckpt", str(a_run), "--export", str(tmp_path / "hf")]
    ended = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert ended.returncode == 2 and re.fullmatch("error: .*too large.*\n", ended.stderr)
    assert not list(tmp_path.iterdir())


def test_export_that_fails_leaves_nothing_behind(tmp_path):
    raw = json.loads((FIXTURES / "tokenizer-gpt2" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["vocab"] | {"<|endoftext|>": 420}))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, raw["merges"])))
    before = sorted(tmp_path.parent.iterdir()), sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="needs tokenizer.json beside the base"):
        exported(tiny(tokenizer=Tokenizer.from_pretrained(tmp_path)), tmp_path / "hf", "st")
    with pytest.raises(OSError):  # there is something
        exported(tiny(), tmp_path, "st")
    assert before == (sorted(tmp_path.parent.iterdir()), sorted(tmp_path.iterdir()))
