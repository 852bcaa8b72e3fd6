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
    return [{name: collate(some[start : start + size], TOKENIZER.eos_id) for name, some in rows.items()}
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
    pathways = dart.Pathway(steps=True, drop_last_step=True), dart.Pathway(n_fill=2, fill_id=tokenizer.st_id, silent=True)
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
    no_reserved = SimpleNamespace(st_id=None, size=59)
    assert dart.DART.adapters(TOKENIZER, options()).extra_rows == 0
    assert dart.DART.adapters(no_reserved, options()) == Adapters(0, 32.0, 0.0, 4, 32.0, extra_rows=1)
    assert dart.Pause.adapters(TOKENIZER, options()).train_extra_rows
    assert dart.Pause.adapters(TOKENIZER, options(n_st=0)).extra_rows == 0
    assert make("dart").pathways["st"].fill_id == TOKENIZER.st_id
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
                                      ("st", [TOKENIZER.st_id] * 3 + separator, [y])):  # fmt: skip
            ids = torch.tensor([q + middle + y])
            z_n = len(q + middle) - 1
            assert ids[0, z_n] == COLON
            hidden, states = model(ids, silent=name == "st", at=torch.tensor([[z_n]]))
            (cot_states if name == "cot" else silent_states).append(states[:, 0, 0])
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
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", dart.METHODS)
@pytest.mark.parametrize("attached", [False, True])
def test_accumulation_equals_one_batch(name, attached):
    method = make(name, attach_teacher=attached)
    losses, gradients, _ = step(method, PROBLEMS, 4)
    for size in (1, 2):
        again, others, _ = step(method, PROBLEMS, size)
        assert again == pytest.approx(losses, rel=1e-5)
        for parameter in gradients:
            torch.testing.assert_close(others[parameter], gradients[parameter], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", dart.METHODS)
def test_padding_changes_no_loss(name):
    """Together with a much longer row, each row's loss is what it is alone."""
    method = make(name)
    alone = [step(method, [problem], 1)[0] for problem in PROBLEMS]
    for key in ("cot", "st", "no-cot", "pause"):
        if key in alone[0]:
            together = step(method, PROBLEMS, 4)[0][key]
            assert together == pytest.approx(sum(losses[key] for losses in alone) / 4, rel=1e-5)


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
    part = micros(method, PROBLEMS, 4)[0]
    _, teacher = method("cot", part["cot"])
    outputs = []

    def keep(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    method.model.layers[-1].register_forward_hook(keep)
    losses, _ = method("st", part["st"], teacher.detach(), dart.global_std([teacher]))
    losses["distill"].backward()
    touched = outputs[0].grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[b, int(at)] for b, at in enumerate(part["st"].at)]


# ----------------------------------------------------------------------------------------------------- answering


def slow_greedy(model, prompt, silent, limit):
    """No cache, no batch: the whole row again for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(model.logits(model(torch.tensor([ids]), silent=silent))[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", dart.METHODS)
def test_batched_decoding_equals_slow_decoding(name):
    method = make(name, seed=3)
    with torch.no_grad():  # EOS likely enough that rows end at different times
        method.model.lm_head[TOKENIZER.eos_id] = method.model.lm_head.mean(0) + 0.35 * torch.randn(64).sign()
    questions = [p.question for p in PROBLEMS + data.demo_problems(0)["test"][:12]]
    for pathway in method.pathways.values():
        prompts = [pathway.prompt(question, TOKENIZER) for question in questions]
        with torch.no_grad():
            want = [slow_greedy(method.model, prompt, pathway.silent, 20) for prompt in prompts]
        assert dart.generate(method.model, prompts, pathway.silent, TOKENIZER.eos_id, 20) == want
        for size in (1, 3, 16):
            answers = dart.answer(method.model, TOKENIZER, pathway, questions, 20, batch_size=size)
            assert [a.passes for a in answers] == [len(ids) for ids in want]
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
        dart.generate(method.model, [prompt], False, TOKENIZER.eos_id, 4)


def test_dropout_is_off_when_answering():
    method = make("dart", lora_rank=4, lora_dropout=0.5).train()
    questions = [p.question for p in PROBLEMS]
    answers = [dart.answer(method.model, TOKENIZER, method.pathways["st"], questions, 8) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


def test_cross_entropy_is_computed_in_fp32_whatever_the_model_computes_in():
    method = make("no-cot")
    method.model.compute_dtype = torch.bfloat16
    batch = micros(method, PROBLEMS, 4)[0]["no-cot"]
    hidden = method.model(batch.ids)
    assert hidden.dtype == torch.bfloat16
    logits = method.model.logits(hidden[batch.row, batch.col - 1])
    want = -(logits.double().log_softmax(-1).gather(1, batch.ids[batch.row, batch.col][:, None])[:, 0] * batch.weight).sum()
    loss = dart.cross_entropy(method.model, hidden, batch)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item() / 4, rel=1e-6)


def test_lora_dropout_acts_in_training_and_in_both_pathways():
    method = make("dart", lora_rank=4, lora_dropout=0.5)
    part = micros(method, PROBLEMS, 4)[0]
    for name in part:
        torch.manual_seed(1)
        a, b = (method.train()(name, part[name])[0][name].item() for _ in range(2))
        c, d = (method.eval()(name, part[name])[0][name].item() for _ in range(2))
        assert a != b and c == d


def test_cross_entropy_is_that_of_full_logits():
    method = make("no-cot")
    batch = micros(method, PROBLEMS, 4)[0]["no-cot"]
    hidden = method.model(batch.ids)
    dense = F.cross_entropy(method.model.logits(hidden)[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none")
    weights = torch.zeros(batch.ids.shape)
    weights[batch.row, batch.col] = batch.weight
    torch.testing.assert_close(dart.cross_entropy(method.model, hidden, batch), (dense * weights[:, 1:]).sum() / 4)
