"""dart.py: layouts, losses and steps against slow and obvious versions, and batched decoding. CPU, no network."""

import base64
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dart
import data
from data import Problem, collate
from model import MODELS, Adapters, Transformer

TOKENIZER = data.demo_tokenizer()
(COLON,) = TOKENIZER.encode(":", bos=False, eos=False)
PROBLEMS = [
    Problem("sam has 7 pens gets 5 packs of 4 ?", ["<<7+5=12>>", "<<12%4=0>>"], "0"),
    Problem("ann has 9 eggs eats 2 packs of 4 ?", ["<<9-2=7>>", "<<7%4=3>>"], "3"),
    Problem("bob has 9 eggs ?", ["<<9%4=1>>"], "1"),
    Problem("eve has 1 caps gets 2 gets 3 packs of 5 ?", ["<<1+2=3>>", "<<3+3=6>>", "<<6%5=1>>"], "1 1"),
]


def options(**changes):
    return dart.Options(**{"n_st": 3, "lora_rank": 0, "lora_dropout": 0.0, "rem_rank": 4, "distill_weight": 2.0, **changes})


def make(name="dart", seed=0, **changes):
    """A method around a small random model whose REM is not the identity any more."""
    chosen, cls = options(method=name, **changes), dart.METHODS[name]
    torch.manual_seed(seed)
    method = cls(Transformer(MODELS["demo"], cls.adapters(TOKENIZER, chosen)), TOKENIZER, chosen)
    with torch.no_grad():
        for parameter_name, p in method.model.named_parameters():
            if parameter_name.endswith(("r2", "lora_b")):
                p.normal_(0, 0.2)
    return method


def micros(method, problems, size):
    """The step's micro-batches, as the training program makes them."""
    rows = {name: [pathway.row(p, TOKENIZER) for p in problems] for name, pathway in method.pathways.items()}
    return [SimpleNamespace(batches={name: collate(some[start : start + size], TOKENIZER.eos_id) for name, some in rows.items()})
            for start in range(0, len(problems), size)]  # fmt: skip


def step(method, problems, size):
    """Losses and gradients of one step in micro-batches of `size` rows, which must divide the problems evenly."""
    method.zero_grad()
    parts = micros(method, problems, size)
    losses, calls = {}, []

    def run_pass(*arguments, sync):
        calls.append((arguments[0], sync))
        return method(*arguments)

    for _, some in method.passes(run_pass, parts):
        (method.total(some) / len(parts)).backward()
        for name, loss in some.items():
            losses[name] = losses.get(name, 0) + loss.item() / len(parts)
    return losses, {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}, calls


# ------------------------------------------------------------------------------------------------------- layouts


def pictures(method, problem, tokenizer=TOKENIZER):
    return {name: data.picture(pathway.row(problem, tokenizer), tokenizer) for name, pathway in method.pathways.items()}


def test_layouts_of_the_built_in_task():
    assert pictures(make("dart"), PROBLEMS[0]) == {
        "cot": """\
<bos> sam has 7 pens gets 5 packs of 4 ? <<  7   +   5   =   12  >>  Answer :   0   <eos>
.     .   .   . .    .    . .     .  . . 1/9 1/9 1/9 1/9 1/9 1/9 1/9 1/9    1/9 1/2 1/2""",
        "st": """\
<bos> sam has 7 pens gets 5 packs of 4 ? <st> <st> <st> Answer : 0   <eos>
.     .   .   . .    .    . .     .  . . .    .    .    .      . 1/2 1/2""",
    }
    assert pictures(make("no-cot"), PROBLEMS[3]) == {
        "no-cot": """\
<bos> eve has 1 caps gets 2 gets 3 packs of 5 ? Answer : 1   1   <eos>
.     .   .   . .    .    . .    . .     .  . . .      . 1/3 1/3 1/3"""
    }
    assert pictures(make("pause"), PROBLEMS[2]) == {
        "pause": """\
<bos> bob has 9 eggs ? <st> <st> <st> Answer : 1   <eos>
.     .   .   . .    . .    .    .    .      . 1/2 1/2"""
    }
    cot = """\
<bos> bob has 9 eggs ? <<  9   %   4   =   1   >>  Answer :   1   <eos>
.     .   .   . .    . 1/9 1/9 1/9 1/9 1/9 1/9 1/9 1/9    1/9 1/2 1/2"""
    assert pictures(make("cot"), PROBLEMS[2]) == {"cot": cot}
    assert pictures(make("dart", last_step="keep"), PROBLEMS[2])["cot"] == cot
    empty = """\
<bos> bob has 9 eggs ? Answer :   1   <eos>
.     .   .   . .    . 1/2    1/2 1/2 1/2"""  # one step, dropped: the row stays, the separator alone is Z
    assert pictures(make("dart"), PROBLEMS[2])["cot"] == pictures(make("cot", last_step="drop"), PROBLEMS[2])["cot"] == empty


def staged(method, problem, stage, draw=0.0):
    (name,) = method.pathways
    return data.picture(method.training_pathway(name, stage, draw).row(problem, TOKENIZER), TOKENIZER)


def test_layouts_of_icot():
    """The first s tokens of the CoT are gone; in the end all of it, and the separator is given."""
    method = make("icot")
    assert staged(method, PROBLEMS[2], 0) == pictures(make("cot"), PROBLEMS[2])["cot"]
    assert staged(method, PROBLEMS[2], 5) == """\
<bos> bob has 9 eggs ? 1   >>  Answer :   1   <eos>
.     .   .   . .    . 1/4 1/4 1/4    1/4 1/2 1/2"""
    assert staged(method, PROBLEMS[2], 4, draw=1 - math.exp(-4.1)) == staged(method, PROBLEMS[2], 5)  # one row is ahead
    assert staged(method, PROBLEMS[2], 30) == """\
<bos> bob has 9 eggs ? Answer :   1   <eos>
.     .   .   . .    . 1/2    1/2 1/2 1/2"""
    assert staged(method, PROBLEMS[2], dart.ALL) == pictures(make("no-cot"), PROBLEMS[2])["no-cot"]


def test_layouts_of_coconut_and_codi():
    """Thoughts between two marks, nothing learned of them; stage k without the first k steps; in the end without any."""
    method = make("coconut", max_stage=2, thoughts_per_step=2)
    assert staged(method, PROBLEMS[0], 0, 0.9) == """\
<bos> sam has 7 pens gets 5 packs of 4 ? <bot> <eot> <<   7    +    5    =    12   >>   <<   12
.     .   .   . .    .    . .     .  . . .     .     1/16 1/16 1/16 1/16 1/16 1/16 1/16 1/16 1/16
%    4    =    0    >>   Answer :    0   <eos>
1/16 1/16 1/16 1/16 1/16 1/16   1/16 1/2 1/2"""
    assert staged(method, PROBLEMS[0], 1) == """\
<bos> sam has 7 pens gets 5 packs of 4 ? <bot> <thought> <thought> <eot> <<  12  %   4   =   0
.     .   .   . .    .    . .     .  . . .     .         .         .     1/9 1/9 1/9 1/9 1/9 1/9
>>  Answer :   0   <eos>
1/9 1/9    1/9 1/2 1/2"""
    last = """\
<bos> sam has 7 pens gets 5 packs of 4 ? <bot> <thought> <thought> <thought> <thought> <eot> Answer
.     .   .   . .    .    . .     .  . . .     .         .         .         .         .     .
: 0   <eos>
. 1/2 1/2"""
    assert staged(method, PROBLEMS[0], dart.ALL) == pictures(method, PROBLEMS[0])["coconut"] == last
    assert pictures(make("codi", n_thoughts=4), PROBLEMS[0]) == {"cot": pictures(make("dart"), PROBLEMS[0])["cot"], "codi": last}
    ids = method.pathways["coconut"].row(PROBLEMS[0], TOKENIZER).ids.tolist()
    assert [ids.index(mark) for mark in (59, 60)] == [11, 16] and method.special_ids == (59, 60)


def test_the_schedule_of_icot():
    """Worked out: 100 steps an epoch, 8 tokens an epoch, so one more every 12 steps (100 / 8 = 12.5, rounded to even); where 39
    would be gone all of them are, that is from step 39 * 12 on."""
    method = make("icot", removal_per_epoch=8.0, remove_all_beyond=39)
    assert [method.stage(step, 100) for step in (0, 11, 12, 23, 24, 467, 468, 469)] == [0, 0, 1, 1, 2, 38, dart.ALL, dart.ALL]
    assert make("icot", removal_per_epoch=8.0, remove_all_beyond=2).stage(3, 1) == dart.ALL  # a token a step, at the fastest


def test_some_rows_of_icot_are_ahead_as_the_smoothing_says():
    method, n = make("icot", removal_smoothing=1.0), 20_000
    ahead = [method.training_pathway("icot", 3, i / n).skip_tokens - 3 for i in range(n)]
    for k in range(4):
        assert ahead.count(k) / n == pytest.approx((1 - math.exp(-1)) * math.exp(-k), abs=2e-4)
    assert {make("icot", removal_smoothing=0.0).training_pathway("icot", 3, i / 100).skip_tokens for i in range(100)} == {3}


def test_the_schedule_of_coconut():
    method = make("coconut", max_stage=3, epochs_per_stage=2.0)
    assert [method.stage(step, 10) for step in (0, 19, 20, 39, 40, 79, 80)] == [0, 0, 1, 1, 2, 3, dart.ALL]
    assert make("dart").stage(5, 10) is None


def test_the_picture_in_the_readme_is_what_the_code_prints():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for picture in pictures(make("dart", n_st=4), PROBLEMS[0]).values():
        assert f"\n{picture}\n" in readme


def test_layout_with_a_tokenizer_that_would_merge_across_the_seams(tmp_path, monkeypatch):
    """A Llama-3 file with tokens like '?<<' and ':-': each piece is encoded by itself, z_N is ':' all the same."""
    ranks = [bytes([i]) for i in range(256)] + [b"?<", b"?<<", b":-", b"r:", b"<<", b">>"]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    monkeypatch.setattr(data, "LLAMA3_RANKS", len(ranks))
    tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    pathways = dart.Pathway(steps=True, drop_last_step=True), dart.Pathway(n_fill=2, fill_id=tokenizer.reserved[0], silent=True)
    problem = Problem("A  b?", ["<<1-9=-8>>", "<<-8-1=-9>>"], "-9")
    cot, st = (data.picture(pathway.row(problem, tokenizer), tokenizer, width=200) for pathway in pathways)
    z = "<<   1    -    9    =    -    8    >>   A    n    s    w    e    r    :    "
    assert cot.split("\n")[0] == f"<|begin_of_text|> A _ b ? {z}-   9   <|end_of_text|>"
    assert cot.split("\n")[1] == f"{'.':18}. . . . {'1/15 ' * 15}1/3 1/3 1/3"
    assert st.split("\n")[0] == "<|begin_of_text|> A _ b ? <st> <st> A n s w e r : -   9   <|end_of_text|>"
    for pathway in pathways:
        row = pathway.row(problem, tokenizer)
        assert row.ids[row.y - 1] == ord(":") and row.ids[row.y] == ord("-")


def test_prompt_and_row_agree_whatever_the_spaces_of_the_question():
    for name in dart.METHODS:
        for pathway in make(name).pathways.values():
            prompt = pathway.prompt("  sam has  7 pens ?", TOKENIZER)
            row = pathway.row(Problem("sam has 7 pens ?", ["<<7+5=12>>"], "0"), TOKENIZER)
            assert prompt == row.ids[: len(prompt)].tolist() and row.z == len(prompt)


def test_the_silent_token_is_reserved_appended_or_trained():
    none, two = SimpleNamespace(reserved=(), size=59), SimpleNamespace(reserved=(7, 8), size=59)
    assert dart.DART.adapters(TOKENIZER, options()).extra_rows == 0
    assert dart.DART.adapters(none, options(lora_rank=3)) == Adapters(lora_rank=3, rem_rank=4, extra_rows=1)
    assert dart.DART.adapters(none, options()).train_extra_rows  # all weights are trained
    assert dart.DART.adapters(none, options(n_st=0)).extra_rows == 0
    for cls in (dart.CODI, dart.Coconut):  # marks before and after the thoughts
        assert [cls.adapters(t, options(lora_rank=3)).extra_rows for t in (none, TOKENIZER)] == [2, 2]
    assert dart.CODI.adapters(two, options(lora_rank=3)) == Adapters(lora_rank=3, lora_mlp=True, projector=True)
    assert not dart.CODI.adapters(none, options(lora_rank=3)).train_extra_rows
    assert dart.Coconut.adapters(two, options(lora_rank=3)).train_extra_rows
    rows = make("coconut").model.extra_rows
    assert not torch.equal(rows[0], rows[1])
    assert dart.Pause.adapters(TOKENIZER, options()).train_extra_rows
    assert dart.Pause.adapters(TOKENIZER, options(n_st=0)).extra_rows == 0
    assert make("dart").pathways["st"].fill_id == TOKENIZER.reserved[0]
    pause = make("pause")
    assert pause.pathways["pause"].fill_id == 59 == pause.model.config.vocab_size and pause.model.extra_rows.requires_grad
    assert pause.model.adapters.rem_rank == 0 and make("dart").model.adapters.rem_rank == 4


def test_what_counts_as_the_answer_of_a_text():
    cot, st = dart.Pathway(steps=True), dart.Pathway()
    assert cot.read("<<1+2=3>>Answer:3") == "3" and cot.read("Answer:1 Answer:2") == "2"
    assert cot.read("<<1+2=3>>3") == ""  # never came to the separator
    assert st.read("3") == "3"


# -------------------------------------------------------------------------------------------------------- losses


def test_distill_loss_by_hand():
    """Two layers, two rows, two dimensions. sigma: sample standard deviations sqrt(20/3) of 1, 3, 5, 7 and 2 x that."""
    teacher = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 6.0], [10.0, 14.0]]])
    student = torch.tensor([[[1.0, 2.0], [5.0, 4.0]], [[2.0, 6.0], [10.0, 6.0]]])
    sigma = math.sqrt(20 / 3)
    want = ((0 + 1 + 0 + 3) / 4 / sigma + (0 + 0 + 0 + 8) / 4 / (2 * sigma)) / 2
    assert dart.distill_loss(teacher, student).item() == pytest.approx(want, rel=1e-6)
    assert dart.distill_loss(10 * teacher, 10 * student).item() == pytest.approx(want, rel=1e-6)  # free of scale


def test_the_teacher_gets_a_gradient_only_when_attached_and_sigma_never():
    teacher, student = (torch.randn(3, 4, 8, requires_grad=True) for _ in range(2))
    dart.distill_loss(teacher, student).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0
    student.grad = None
    dart.distill_loss(teacher, student, attached=True).backward()
    torch.testing.assert_close(teacher.grad, -student.grad)  # were sigma attached, there would be more


@pytest.mark.parametrize("shape", [(2, 1, 6), (2, 1, 1), (2, 3, 4)])
def test_sigma_of_one_row_or_of_constant_states_is_finite(shape):
    for teacher in (torch.ones(shape), torch.arange(math.prod(shape)).float().view(shape)):
        loss = dart.distill_loss(teacher, teacher + 1)
        assert loss.isfinite() and loss > 0


def test_sigma_is_that_of_all_micro_batches_together():
    x = torch.randn(3, 10, 8) * torch.tensor([1.0, 5.0, 0.1])[:, None, None] + 3
    want = torch.stack([layer.std() for layer in x])
    torch.testing.assert_close(dart.global_std([x]), want)
    torch.testing.assert_close(dart.global_std([x[:, :3], x[:, 3:4], x[:, 4:]]), want)


def slow_losses(method, problems):
    """Equations (1), (2) and (4) row by row and token by token, without batches, padding or weights."""
    model, silent_states, cot_states, sums = method.model, [], [], {"cot": 0.0, "st": 0.0}
    for problem in problems:
        q = TOKENIZER.encode(problem.question, bos=True, eos=False)
        steps = TOKENIZER.encode(" ".join(problem.steps[:-1]), bos=False, eos=False)
        separator = TOKENIZER.encode("Answer:", bos=False, eos=False)
        y = TOKENIZER.encode(problem.answer, bos=False, eos=True)
        for name, middle, learned in (("cot", steps + separator, [steps + separator, y]),
                                      ("st", [TOKENIZER.reserved[0]] * 3 + separator, [y])):  # fmt: skip
            ids = torch.tensor([q + middle + y])
            z_n = len(q + middle) - 1
            assert ids[0, z_n] == COLON
            hidden, states = model(ids, silent=name == "st", at=torch.tensor([[0], [z_n]]))
            (cot_states if name == "cot" else silent_states).append(states[:, 0])
            log_p = torch.log_softmax(model.logits(hidden)[0], dim=-1)
            start = len(q) if name == "cot" else len(q + middle)
            for piece in learned:
                nll = [-log_p[start + i - 1, token] for i, token in enumerate(piece)]
                sums[name] = sums[name] + sum(nll) / len(nll)
                start += len(piece)
    teacher, student = torch.stack(cot_states, 1), torch.stack(silent_states, 1)  # [L, B, n]
    distill = sum((t - s).abs().mean() / t.std() for t, s in zip(teacher.detach(), student, strict=True)) / len(teacher)
    return {"cot": sums["cot"] / len(problems), "st": sums["st"] / len(problems), "distill": distill}


def test_a_step_of_dart_equals_the_slow_and_obvious_one():
    method = make("dart")
    losses, gradients, _ = step(method, PROBLEMS, 4)
    slow = slow_losses(method, PROBLEMS)
    assert losses == pytest.approx({name: loss.item() for name, loss in slow.items()}, rel=1e-5)
    method.zero_grad()
    (slow["cot"] + slow["st"] + 2.0 * slow["distill"]).backward()
    for name, p in method.named_parameters():
        assert (gradients[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name


@pytest.mark.parametrize("name", dart.METHODS)
@pytest.mark.parametrize("attached", [False, True])
def test_accumulation_equals_one_batch(name, attached):
    method = make(name, attach_teacher=attached)
    losses, gradients, _ = step(method, PROBLEMS, 4)
    for size in (1, 2):
        again, others, _ = step(method, PROBLEMS, size)
        assert again == pytest.approx(losses, rel=1e-5)
        for parameter in gradients:
            assert (others[parameter] - gradients[parameter]).norm() <= 1e-5 * gradients[parameter].norm(), parameter


@pytest.mark.parametrize("name", dart.METHODS)
def test_padding_changes_no_loss(name):
    """Together with a much longer row, each row's loss is what it is alone."""
    method = make(name)
    alone = [step(method, [problem], 1)[0] for problem in PROBLEMS]
    for key in method.pathways:
        together = step(method, PROBLEMS, 4)[0][key]
        assert together == pytest.approx(sum(losses[key] for losses in alone) / 4, rel=1e-5)


def same_gradients(ours, theirs):
    """To 1e-5 of the largest one of all: some, such as that of GPT-2's key bias, are zero but for rounding."""
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}")


def slow_thoughts(model, ids, start, thoughts):
    """Embeddings [T, n] of a row in which each thought is the state before it: the whole prefix again for each, no cache."""
    project = model.projector or (lambda h: h)
    x = model.embed(torch.tensor([ids[:start]]))
    for _ in range(thoughts):
        x = torch.cat((x, project(model(x)[:, -1:])), dim=1)
    return torch.cat((x, model.embed(torch.tensor([ids[start + thoughts :]]))), dim=1)[0]


FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("projector", [False, True])
def test_thoughts_through_the_cache_equal_those_of_the_whole_prefix(family, projector):
    """Rows of different lengths with thoughts at different places: states, and gradients with respect to all weights."""
    torch.manual_seed(0)
    adapters = Adapters(extra_rows=2, train_extra_rows=True, projector=projector)
    model = Transformer.from_pretrained(Path(__file__).parent / "fixtures" / family, adapters)
    rows = [torch.randint(0, 98, (n,)).tolist() for n in (17, 30, 23, 12)]
    start, end, thoughts = torch.tensor([4, 20, 11, 5]), torch.tensor([17, 30, 23, 12]), 3
    ids = torch.tensor([row + [1] * (30 - len(row)) for row in rows])
    at = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3], [7, 16, 22, 29, 15, 20, 8, 11]])  # from the last thought on
    hidden, first, states = dart.think(model, ids, start, end, thoughts, at=at)
    assert first.tolist() == [6, 22, 13, 7]
    fast = [hidden[b, : end[b] - first[b]] for b in range(4)]
    slow, slow_states = [], []
    for b, row in enumerate(rows):
        out, state = model(slow_thoughts(model, row, int(start[b]), thoughts)[None], at=(at[0, :2] * 0, at[1, 2 * b : 2 * b + 2]))
        slow.append(out[0, first[b] :])
        slow_states.append(state)
    for b in range(4):
        torch.testing.assert_close(fast[b], slow[b], rtol=1e-5, atol=1e-5 * slow[b].abs().max().item())
        torch.testing.assert_close(states[:, 2 * b : 2 * b + 2], slow_states[b], rtol=1e-5, atol=1e-5 * slow_states[b].abs().max().item())
    weights = [torch.randn_like(part) for part in fast]
    gradients = []
    for outs in (fast, slow):
        model.zero_grad()
        sum((out * w).sum() for out, w in zip(outs, weights, strict=True)).backward(retain_graph=True)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert not projector or "projector.layers.0.weight" in gradients[0]
    same_gradients(*gradients)


def slow_row(method, pathway, problem, at=0):
    """(loss of a row, states [L, n] at z_N + at), without batch, padding, cache or weights."""
    model, row = method.model, pathway.row(problem, TOKENIZER)
    ids = row.ids.tolist()
    x = slow_thoughts(model, ids, row.start, row.thoughts)[None] if row.thoughts else torch.tensor([ids])
    hidden, states = model(x, silent=pathway.silent, at=torch.tensor([[0], [row.y - 1 + at]]))
    log_p = torch.log_softmax(model.logits(hidden)[0], dim=-1)
    pieces = [range(row.z, row.y), range(row.y, len(ids))]
    return sum(-sum(log_p[i - 1, ids[i]] for i in piece) / len(piece) for piece in pieces if len(piece)), states[:, 0]


@pytest.mark.parametrize(
    "name, stage", [("cot", None), ("no-cot", None), ("pause", None), ("icot", 0), ("icot", 4), ("icot", dart.ALL),
                    ("coconut", 0), ("coconut", 1), ("coconut", 2), ("coconut", dart.ALL)]
)  # fmt: skip
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_a_step_of_the_other_methods_equals_the_slow_and_obvious_one(name, stage, lora_rank):
    method = make(name, max_stage=2, lora_rank=lora_rank, lora_alpha=3.0)
    pathways = [method.training_pathway(name, stage, draw) for draw in (0.0, 0.5, 0.99, 0.1)]
    batch = collate([pathway.row(p, TOKENIZER) for pathway, p in zip(pathways, PROBLEMS, strict=True)], TOKENIZER.eos_id)
    loss = method(name, batch)[0][name]
    slow = sum(slow_row(method, pathway, p)[0] for pathway, p in zip(pathways, PROBLEMS, strict=True)) / 4
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    gradients = []
    for value in (loss, slow):
        method.zero_grad()
        value.backward()
        gradients.append({name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None})
    assert bool(lora_rank) != ("model.embed_tokens" in gradients[0])
    same_gradients(*gradients)


def test_a_step_of_codi_equals_the_slow_and_obvious_one():
    """Cross-entropies of both pathways, and the smooth L1 distance at z_N over the teacher's standard deviation."""
    method = make("codi", n_thoughts=3, lora_rank=3, lora_alpha=3.0)
    losses, gradients, calls = step(method, PROBLEMS, 4)
    assert calls == [("cot", False), ("codi", True)]
    cot, codi = ([slow_row(method, pathway, p) for p in PROBLEMS] for pathway in method.pathways.values())
    teacher, student = (torch.stack([states for _, states in rows], 1) for rows in (cot, codi))
    distill = sum(F.smooth_l1_loss(s, t) / t.std() for t, s in zip(teacher.detach(), student, strict=True)) / len(teacher)
    slow = {"cot": sum(loss for loss, _ in cot) / 4, "codi": sum(loss for loss, _ in codi) / 4, "distill": distill}
    assert losses == pytest.approx({name: loss.item() for name, loss in slow.items()}, rel=1e-5)
    method.zero_grad()
    (slow["cot"] + slow["codi"] + 2.0 * distill).backward()
    assert any("projector" in name for name in gradients) and any("mlp.gate_proj.lora.lora_b" in name for name in gradients)
    same_gradients(gradients, {name: p.grad for name, p in method.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", dart.METHODS)
def test_every_method_on_every_family_in_bf16_with_lora(name, family):
    """A step gives every trained parameter a finite gradient; merged weights answer as unmerged ones do, up to bf16."""
    chosen, cls = options(method=name, lora_rank=2, lora_alpha=2.0, n_thoughts=2, max_stage=1), dart.METHODS[name]
    torch.manual_seed(0)
    directory = Path(__file__).parent / "fixtures" / family
    model = Transformer.from_pretrained(directory, cls.adapters(TOKENIZER, chosen), torch.bfloat16)
    method = cls(model, TOKENIZER, chosen)
    losses, gradients, _ = step(method, PROBLEMS, 2)
    assert all(math.isfinite(loss) for loss in losses.values())
    assert gradients.keys() == {key for key, p in method.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients.values())
    pathway = list(method.pathways.values())[-1]
    ids = torch.tensor([pathway.prompt(PROBLEMS[0].question, TOKENIZER)])
    with torch.no_grad():
        before = model.logits(model(ids, silent=pathway.silent)).float()
        after = model.merge(pathway.silent).logits(model(ids, silent=pathway.silent)).float()
    assert (after - before).square().mean().sqrt() < 0.05 * before.square().mean().sqrt()
    assert not [key for key, _ in model.named_parameters() if key.endswith(("lora_a", "lora_b", "r1", "r2"))]
    assert len(dart.answer(model, TOKENIZER, pathway, [p.question for p in PROBLEMS], 5, 3)) == 4


def test_the_projector_of_codi_by_hand():
    torch.manual_seed(0)
    model = Transformer(MODELS["demo"], Adapters(projector=True), torch.bfloat16)
    first, _, second, norm = model.projector.layers
    h = torch.randn(3, 64)
    y = torch.nn.functional.gelu(h @ first.weight.T + first.bias) @ second.weight.T + second.bias
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(model.projector(h), y)
    model.merge()
    torch.testing.assert_close(model.projector(h), y)  # stays in fp32


def test_the_parameters_of_codi_are_the_papers():
    """98,574,336 on Llama-3.2-1B: LoRA on all seven projections 90,177,536, projector 8,396,800; the marks are reserved ids."""
    reserved = SimpleNamespace(reserved=(128_002, 128_003), size=128_256)
    adapters = dart.CODI.adapters(reserved, dart.Options())
    model = Transformer(MODELS["llama-3.2-1b"], adapters, device="meta", random_init=False)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 98_574_336
    assert sum(n for name, n in trained.items() if name.startswith("projector")) == 8_396_800


@pytest.mark.parametrize("where, indices", [("y_1", [1]), ("z_N+Y", None)])
@pytest.mark.parametrize("norm", ["l1", "l1-sum", "smooth-l1"])
def test_distillation_elsewhere_and_in_other_norms(where, indices, norm):
    """The tokens of a row weigh the same together as those of another; sigma is that of all of them. Answers have 2 and 3."""
    method = make("dart", distill_at=where, distill_norm=norm)
    losses, _, _ = step(method, PROBLEMS, 4)
    per_row, all_teachers = [], []
    for problem in PROBLEMS:
        y = len(TOKENIZER.encode(problem.answer, bos=False, eos=True))
        pairs = [[slow_row(method, pathway, problem, i)[1].detach() for pathway in method.pathways.values()] for i in indices or range(y + 1)]
        per_row.append(pairs)
        all_teachers += [teacher for teacher, _ in pairs]
    sigma = torch.stack(all_teachers, 1).flatten(1).std(1)  # [L]

    def distance(t, s):
        d = F.smooth_l1_loss(s, t, reduction="none") if norm == "smooth-l1" else (t - s).abs()
        return d.sum(1) if norm == "l1-sum" else d.mean(1)

    rows = [sum(distance(t, s) for t, s in pairs) / len(pairs) for pairs in per_row]
    assert losses["distill"] == pytest.approx((sum(rows) / 4 / sigma).mean().item(), rel=1e-5)
    assert len({len(pairs) for pairs in per_row}) == (1 if indices else 2)
    for size in (1, 2):
        assert step(method, PROBLEMS, size)[0] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_cross_entropy_in_chunks(trained_head, chunk, monkeypatch):
    torch.manual_seed(0)
    linear, rows = F.linear, []
    monkeypatch.setattr(F, "linear", lambda x, weight: rows.append(len(x)) or linear(x, weight))
    hidden, head = torch.randn(40, 16, requires_grad=True), torch.randn(59, 16, requires_grad=trained_head)
    target, weight = torch.randint(59, (40,)), torch.rand(40)
    inputs = (hidden, head) if trained_head else (hidden,)
    plain = (F.cross_entropy(hidden @ head.T, target, reduction="none") * weight).sum()
    chunked = dart.ChunkedCrossEntropy.apply(hidden, head, target, weight, chunk)
    assert max(rows) == min(chunk, 40) and sum(rows) == 40
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(3 * chunked, inputs), torch.autograd.grad(3 * plain, inputs), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    with torch.no_grad():
        torch.testing.assert_close(dart.ChunkedCrossEntropy.apply(hidden, head, target, weight, chunk), plain, rtol=1e-6, atol=0)


def test_the_gradient_of_chunks_in_bf16_is_not_scaled():
    """A micro-batch's share of the step, here 1/3, is not rounded to bf16."""
    torch.manual_seed(0)
    hidden, head = torch.randn(400, 64).bfloat16().requires_grad_(), torch.randn(59, 64)
    target, weight = torch.randint(59, (400,)), torch.rand(400)
    found = torch.autograd.grad(dart.ChunkedCrossEntropy.apply(hidden, head, target, weight, 100) / 3, hidden)[0].double()
    exact = hidden.detach().double().requires_grad_()
    loss = (F.cross_entropy(exact @ head.bfloat16().double().T, target, reduction="none") * weight).sum() / 3
    (want,) = torch.autograd.grad(loss, exact)
    assert abs((found * want).sum() / (want * want).sum() - 1) < 5e-4


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 3}, {"rem_is_lora": True}, {"distill_at": "z_N+Y"}])
@pytest.mark.parametrize("name", dart.METHODS)
def test_the_shortcuts_change_no_result(name, changes, monkeypatch):
    monkeypatch.setattr(dart, "LOGITS", 59 * 5)  # five rows at a time
    method = make(name, n_thoughts=2, **changes)  # a longer chain of them multiplies rounding
    losses, gradients, _ = step(method, PROBLEMS, 2)
    method.model.be_plain()
    wanted, plain, _ = step(method, PROBLEMS, 2)
    assert losses == pytest.approx(wanted, rel=1e-5) and gradients.keys() == plain.keys()
    for key, gradient in gradients.items():
        assert (gradient - plain[key]).norm() <= 1e-5 * plain[key].norm(), key


def test_a_second_lora_in_the_place_of_rem():
    """It is in the ST pathway only, starts as nothing, and is folded into the weights."""
    chosen = options(rem_is_lora=True, lora_rank=3)
    adapters = dart.DART.adapters(TOKENIZER, chosen)
    model, ids = Transformer(MODELS["demo"], adapters).eval(), torch.arange(20)[None]
    assert torch.equal(model(ids), model(ids, silent=True))
    method = make("dart", rem_is_lora=True, lora_rank=3, rem_alpha=20.0, lora_dropout=0.5)
    model, plain = method.model.eval(), method.model(ids)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".rem_" in name and name.endswith("lora_b"):
                p.normal_(0, 0.2)
    silent = model(ids, silent=True)
    assert torch.equal(model(ids), plain) and (silent - plain).abs().max() > 1e-3
    attention = model.layers[0].self_attn
    assert attention.rem_k.dropout == 0.5
    x = torch.randn(5, 64)
    by_hand = attention.k_proj(x) + 20.0 / 4 * x @ attention.rem_k.lora_a.T @ attention.rem_k.lora_b.T
    torch.testing.assert_close(attention.rem_k(x, attention.k_proj), by_hand)
    with torch.no_grad():
        torch.testing.assert_close(model.merge()(ids), silent, rtol=1e-4, atol=1e-4)


def test_the_order_of_passes_and_one_pass_of_the_teacher():
    _, _, calls = step(make("dart"), PROBLEMS, 2)
    assert calls == [("cot", False), ("cot", False), ("st", False), ("st", True)]
    _, _, calls = step(make("dart", attach_teacher=True), PROBLEMS, 2)
    assert calls == [("cot", False), ("cot", False), ("st", False), ("st", True)]
    _, _, calls = step(make("pause"), PROBLEMS, 2)
    assert calls == [("pause", False), ("pause", True)]


@pytest.mark.parametrize("attached", [False, True])
def test_the_cot_pathway_is_pulled_only_by_an_attached_teacher(attached):
    """The gathered states at z_N enter nothing but the distillation, so their gradient is all the distillation's."""
    method = make("dart", attach_teacher=attached)
    original, teachers = method.model.forward, []

    def spy(ids, silent=False, **more):
        hidden, states = original(ids, silent=silent, **more)
        if not silent:
            states.retain_grad()
            teachers.append(states)
        return hidden, states

    method.model.forward = spy
    step(method, PROBLEMS, 4)
    (states,) = teachers  # the CoT pathway was run once
    assert (states.grad is not None and states.grad.abs().max() > 0) == attached


def test_without_the_distillation_loss():
    losses, gradients, _ = step(make("dart", distill_weight=0.0), PROBLEMS, 2)
    assert set(losses) == {"cot", "st"}
    full = step(make("dart"), PROBLEMS, 2)[0]
    assert {name: full[name] for name in losses} == pytest.approx(losses) and full["distill"] > 0
    assert any(name.endswith("r2") and gradient.abs().max() > 0 for name, gradient in gradients.items())


def test_only_the_state_at_z_n_is_distilled():
    """The distillation's gradient reaches the student's layer outputs at z_N's index, and nowhere else directly."""
    method = make("dart")
    part = micros(method, PROBLEMS, 4)[0].batches
    _, teacher = method("cot", part["cot"])
    outputs = []

    def keep(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    method.model.layers[-1].register_forward_hook(keep)
    losses, _ = method("st", part["st"], teacher.detach(), dart.global_std([teacher]))
    losses["distill"].backward()
    touched = outputs[0].grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[b, int(at) - part["st"].tail] for b, at in enumerate(part["st"].at)]


# ----------------------------------------------------------------------------------------------------- answering


def slow_greedy(model, prompt, pathway, limit):
    """No cache, no batch: the whole row again for every token."""
    x = slow_thoughts(model, prompt, pathway.start(len(prompt), TOKENIZER), pathway.thoughts) if pathway.thoughts else None
    x, ids = model.embed(torch.tensor([prompt])) if x is None else x[None], []
    while len(ids) < limit:
        ids.append(int(model.logits(model(x, silent=pathway.silent))[0, -1].argmax()))
        x = torch.cat((x, model.embed(torch.tensor([ids[-1:]]))), dim=1)
        if ids[-1] == TOKENIZER.eos_id:
            break
    return ids


@pytest.mark.parametrize("name", dart.METHODS)
def test_batched_decoding_equals_slow_decoding(name):
    method = make(name, seed=3)
    with torch.no_grad():  # EOS likely enough that rows end at different times
        method.model.lm_head[TOKENIZER.eos_id] = method.model.lm_head.mean(0) + 0.35 * torch.randn(64).sign()
    questions = [p.question for p in PROBLEMS + data.demo_problems(0)["test"][:12]]
    for pathway in method.pathways.values():
        prompts = [pathway.prompt(question, TOKENIZER) for question in questions]
        with torch.no_grad():
            want = [slow_greedy(method.model, prompt, pathway, 20) for prompt in prompts]
        assert dart.generate(method.model, TOKENIZER, pathway, prompts, 20) == want
        for size in (1, 3, 16):
            answers = dart.answer(method.model, TOKENIZER, pathway, questions, 20, batch_size=size)
            assert [a.passes for a in answers] == [len(ids) + pathway.thoughts for ids in want]
            texts = [TOKENIZER.decode([i for i in ids if i != TOKENIZER.eos_id]) for ids in want]
            assert [a.text for a in answers] == texts
    assert len({len(ids) for ids in want}) > 2 and sum(ids[-1] == TOKENIZER.eos_id for ids in want) > 1


def test_evaluation_scores_every_problem_once_and_leaves_the_mode_alone():
    method = make("dart").train()
    problems = data.demo_problems(0)["test"][:37]
    records = dart.evaluate(method.model, TOKENIZER, method.pathways["cot"], problems, 12, batch_size=10)
    assert method.model.training and [r["question"] for r in records] == [p.question for p in problems]
    for record in records:
        assert record["strict"] == (method.pathways["cot"].read(record["text"]).strip() == record["gold"])


def test_a_model_merged_for_one_pathway_does_not_answer_through_the_other():
    method = make("dart")
    method.model.merge(silent=True)
    prompt = method.pathways["cot"].prompt(PROBLEMS[0].question, TOKENIZER)
    with pytest.raises(ValueError, match="merged for the silent pathway"):
        dart.generate(method.model, TOKENIZER, method.pathways["cot"], [prompt], 4)


def test_dropout_is_off_when_answering():
    method = make("dart", lora_rank=4, lora_dropout=0.5).train()
    questions = [p.question for p in PROBLEMS]
    answers = [dart.answer(method.model, TOKENIZER, method.pathways["st"], questions, 8) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


def test_cross_entropy_is_computed_in_fp32_whatever_the_model_computes_in():
    method = make("no-cot")
    method.model.compute_dtype = torch.bfloat16
    batch = micros(method, PROBLEMS, 4)[0].batches["no-cot"]
    hidden = method.model(batch.ids)
    assert hidden.dtype == torch.bfloat16
    logits = method.model.logits(hidden[batch.row, batch.col - 1])
    want = -(logits.double().log_softmax(-1).gather(1, batch.ids[batch.row, batch.col][:, None])[:, 0] * batch.weight).sum()
    loss = dart.cross_entropy(method.model, hidden, batch)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item() / 4, rel=1e-6)


def test_lora_dropout_acts_in_training_and_in_both_pathways():
    method = make("dart", lora_rank=4, lora_dropout=0.5)
    part = micros(method, PROBLEMS, 4)[0].batches
    for name in part:
        torch.manual_seed(1)
        a, b = (method.train()(name, part[name])[0][name].item() for _ in range(2))
        c, d = (method.eval()(name, part[name])[0][name].item() for _ in range(2))
        assert a != b and c == d


def test_cross_entropy_is_that_of_full_logits():
    method = make("no-cot")
    batch = micros(method, PROBLEMS, 4)[0].batches["no-cot"]
    hidden = method.model(batch.ids)
    dense = F.cross_entropy(method.model.logits(hidden)[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none")
    weights = torch.zeros(batch.ids.shape)
    weights[batch.row, batch.col] = batch.weight
    torch.testing.assert_close(dart.cross_entropy(method.model, hidden, batch), (dense * weights[:, 1:]).sum() / 4)
