"""dart.py: layouts, losses, steps, answers and runs, against slow and obvious versions."""

import dataclasses
import json
import math
import os
import shutil
import statistics
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES
from safetensors.torch import save_file

import dart
import data
import eval as evaluation
import train
from data import Problem, collate
from model import ModelConfig, Transformer, export_hf

TOKENIZER = data.demo_tokenizer()
END = dart.FINAL_STAGE
PROBLEMS = [
    Problem("sam has 7 pens gets 5 packs of 4 ?", ["<<7+5=12>>", "<<12%4=0>>"], "0"),
    Problem("ann has 9 eggs ?", ["<<9-2=7>>", "<<7%4=3>>"], "3"),
    Problem("bob has 9 eggs ?", ["<<9%4=1>>"], "1"),
    Problem("eve has 1 caps gets 2 packs ?", ["<<1+2=3>>", "<<3+3=6>>", "<<6%5=1>>"], "1 1"),
]
U = (0.0, 0.5, 0.99, 0.1)  # of each problem, where a stage is drawn
QUESTIONS = [problem.question for problem in PROBLEMS + data.demo_problems(0)["test"][:4]]


def config(family="llama"):
    shape = dict(vocab_size=59, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    shape |= dict(num_attention_heads=4, num_key_value_heads=4 if family == "gpt2" else 2)
    shape |= dict(head_dim=4, max_position_embeddings=80)
    return ModelConfig(family, **shape, tie_word_embeddings=family == "qwen2")


def make(name="dart", family="llama", **changes):
    """A method around a tiny random model, whose LoRA and REM are not the identity any more."""
    options = dict(n_st=3, lora_rank=0, lora_dropout=0.0, rem_rank=4, rem_alpha=8.0, dtype="fp32")
    options |= dict(distill_weight=2.0, n_latents=2, max_stage=2, max_new_tokens=6, method=name)
    torch.manual_seed(0)
    method = dart.build(dart.Options(**options | changes), TOKENIZER, config(family))
    method.model.compute_dtype = torch.get_default_dtype()
    method.to(method.model.compute_dtype)
    for key, p in method.named_parameters():
        if key.endswith(("r2", "lora_b", "_proj.bias")):
            torch.nn.init.normal_(p, 0, 0.1)
    return method


def gradients(method):
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def step(method, sizes=(4,), seed=0, stage=END):
    """(losses, gradients, passes) of a training step on PROBLEMS in micro-batches of some sizes."""
    examples, parts, calls, start = {}, [], [], 0
    for name in method.pathways:
        pairs = [(method.training_pathway(name, stage, u), p) for u, p in zip(U, PROBLEMS)]
        examples[name] = [pathway.example(problem, TOKENIZER) for pathway, problem in pairs]
    for size in sizes:
        batches = {name: collate(some[start : start + size], 1) for name, some in examples.items()}
        parts.append(dart.MicroBatch(batches, size / len(PROBLEMS), seed + start))
        start += size

    def forward(name, micro, sync):
        calls.append((name, sync))
        torch.manual_seed(micro.seed)
        return method(name, micro.batches[name])

    method.zero_grad()
    losses = method.training_step(forward, parts)
    return {name: loss.item() for name, loss in losses.items()}, gradients(method), calls


@pytest.fixture
def in_fp64(monkeypatch):
    """Everything is computed in fp64, where rounding hides nothing (weights of the losses are fp32:
    1e-7)."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same_gradients(ours, theirs):
    """To 1e-6 of a tensor's norm; some, such as that of GPT-2's key bias, are only rounding."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-6 * max(gradient.norm(), largest / 50), name


# ------------------------------------------------------------------------------------- layouts


def layout(pathway, problem, tokenizer=TOKENIZER):
    """An example as text: token/N is learned with the weight 1/N, * stands behind z_N, ~ is a
    continuous thought, #i an id that is no token's."""
    example = pathway.example(problem, tokenizer)
    batch, words = collate([example], 0), []
    weights = dict(zip(batch.target_col.tolist(), batch.weights.tolist(), strict=True))
    for i, token in enumerate(example.ids.tolist()):
        text = f"#{token}" if token >= tokenizer.size else tokenizer.decode([token])
        text = "~" if 0 <= i - batch.latent_start < batch.n_latents else text.replace(" ", "_")
        text += f"/{1 / weights[i]:.0f}" if i in weights else ""
        words.append(text + "*" * (i == batch.z_n))
    return " ".join(words)


Q0 = "<bos> sam has 7 pens gets 5 packs of 4 ?"
Q2 = "<bos> bob has 9 eggs ?"
STEP0 = f"{Q0} <</9 7/9 +/9 5/9 =/9 12/9 >>/9 Answer/9 :/9* 0/2 <eos>/2"
STEP2 = f"{Q2} <</9 9/9 %/9 4/9 =/9 1/9 >>/9 Answer/9 :/9* 1/2 <eos>/2"
SECOND0 = f"{Q0} #59 ~ ~ #60 <</9 12/9 %/9 4/9 =/9 0/9 >>/9 Answer/9 :/9* 0/2 <eos>/2"
EMPTY2 = f"{Q2} Answer/2 :/2* 1/2 <eos>/2"
NONE2 = f"{Q2} Answer :* 1/2 <eos>/2"
ONE_MEAN0 = f"{Q0} <</11 7/11 +/11 5/11 =/11 12/11 >>/11 Answer/11 :/11* 0/11 <eos>/11"


@pytest.mark.parametrize(
    "name, changes, stage, problem, want",
    [
        ("dart", {}, END, 0, [STEP0, f"{Q0} <st> <st> <st> Answer :* 0/2 <eos>/2"]),
        ("dart", {"n_st": 1}, END, 2, [EMPTY2, f"{Q2} <st> Answer :* 1/2 <eos>/2"]),
        ("dart", {"n_st": 0, "last_step": "keep"}, END, 2, [STEP2, NONE2]),
        ("cot", {}, END, 2, [STEP2]),
        ("cot", {"last_step": "drop"}, END, 2, [EMPTY2]),
        ("no-cot", {}, END, 2, [NONE2]),
        ("pause", {}, END, 2, [f"{Q2} #59 #59 #59 Answer :* 1/2 <eos>/2"]),
        ("icot", {}, 0, 2, [STEP2]),
        ("icot", {}, 5, 2, [f"{Q2} 1/4 >>/4 Answer/4 :/4* 1/2 <eos>/2"]),
        ("icot", {}, END, 2, [NONE2]),
        ("coconut", {}, 0, 2, [STEP2.replace("? ", "? #59 #60 ")]),
        ("coconut", {}, 1, 0, [SECOND0]),
        ("coconut", {}, END, 2, [NONE2.replace("? ", "? #59 ~ ~ ~ ~ #60 ")]),
        ("codi", {}, END, 0, [ONE_MEAN0, f"{Q0} #59 ~ ~ #60 Answer/4 :/4* 0/4 <eos>/4"]),
        ("codi", {"codi_form": "dart"}, END, 2, [EMPTY2, NONE2.replace("? ", "? #59 ~ ~ #60 ")]),
    ],
)
def test_layout(name, changes, stage, problem, want):
    method = make(name, **changes)
    pathways = [method.training_pathway(key, stage, 0.0) for key in method.pathways]
    assert [layout(pathway, PROBLEMS[problem]) for pathway in pathways] == want
    if stage == END:  # what is trained in the end is what answers
        assert pathways == list(method.pathways.values())


@pytest.mark.parametrize("pattern", [data.LLAMA3_PATTERN, data.QWEN2_PATTERN])
def test_layout_where_the_tokenizer_would_merge_across_the_seams(pattern):
    """Negative, decimal, with two blanks, and sentences as in ProsQA: z_N is : all the same."""
    words = (b"?a", b"?<<", b".Answer", b" Answer", b":-.")
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [word[:i] for word in words for i in range(2, len(word) + 1)]
    ranks = {token: i for i, token in enumerate(tokens)}
    names = ["<eos>", "<bos>", "<st>"] if pattern == data.LLAMA3_PATTERN else ["<eos>"]
    added = [data.added_token(len(tokens) + i, name) for i, name in enumerate(names)]
    tokenizer = data.BytePair({}, pattern, ranks, added, False, "<bos>", "<eos>")
    merged = tokenizer.encode("1?<< b?a c.Answer:-. Answer", bos=False, eos=False)
    assert {word.decode() for word in words} <= {tokenizer.decode([i]) for i in merged}

    def learned(text):
        return " ".join(f"{token}/{len(text.split())}" for token in text.split())

    special = tokenizer.reserved or (tokenizer.size,)
    cot, full = (dart.Pathway(steps=True, drop_last_step=drop) for drop in (True, False))
    st = dart.Pathway(silent=True, n_silent=2, special_ids=special)
    bos, silent = "<bos> ", "<st> <st>"
    if not tokenizer.reserved:
        bos, silent = "", "#{0} #{0}".format(*special)
    numbers = Problem(" 1  b?", ["<<1-2=-1>>", "<<-1/2=-.5>>"], "-.5")
    z, y = learned("< < 1 - 2 = - 1 > > A n s w e r :"), learned("- . 5 <eos>")
    assert layout(cot, numbers, tokenizer) == f"{bos}1 _ b ? {z}* {y}"
    assert layout(st, numbers, tokenizer) == f"{bos}1 _ b ? {silent} A n s w e r :* {y}"
    sentences = Problem("b?", ["a is b.", "b is c."], "a.")
    z, y = learned("a _ i s _ b . _ b _ i s _ c . A n s w e r :"), learned("a . <eos>")
    assert layout(full, sentences, tokenizer) == f"{bos}b ? {z}* {y}"
    statement = sentences._replace(question="a is b.")  # the separator stands right behind it
    want = f"{bos}a _ i s _ b . A n s w e r :* {y}"
    assert layout(dart.Pathway(), statement, tokenizer) == want


@pytest.mark.parametrize("name, n, frozen", [("dart", 1, 1), ("pause", 1, 0), ("codi", 2, 1)])
def test_special_tokens_are_in_reserve_or_new_embeddings(name, n, frozen):
    for n_reserved, lora_rank in ((0, 2), (n - 1, 2), (n, 2), (n, 0)):
        tokenizer = SimpleNamespace(reserved=(7, 8)[:n_reserved])
        adapters = dart.METHODS[name].adapters(tokenizer, dart.Options(lora_rank=lora_rank))
        assert adapters.new_embeddings == (0 if frozen and n_reserved == n else n)
        assert adapters.train_new_embeddings == (not frozen or lora_rank == 0)


@pytest.mark.parametrize("rem_is_lora", [False, True])
def test_adapters_have_the_ranks_scales_and_dropout_of_the_options(rem_is_lora):
    rates = dict(lora_rank=5, lora_alpha=7.0, lora_dropout=0.3, rem_rank=4, rem_alpha=6.0)
    k = make(**rates, rem_is_lora=rem_is_lora).model.layers[1].self_attn.k_proj
    rem = k.silent_lora if rem_is_lora else k.rem
    for adapter, scale, rank in ((k.lora, 7 / 5, 5), (rem, 6 / 4, 4)):
        assert adapter.scale == scale and {min(p.shape) for p in adapter.parameters()} == {rank}
        assert getattr(adapter, "dropout", 0.3) == 0.3  # REM has none


def test_stages_of_icot_and_coconut_come_at_regular_intervals():
    """iCoT removes 8 tokens an epoch of 100 steps: one every 12 steps, and from 39 on all."""
    stages = [make("icot").stage(i, 100) for i in (0, 11, 12, 23, 24, 467, 468, 469)]
    assert stages == [0, 0, 1, 1, 2, 38, END, END]
    assert make("icot", remove_all_beyond=2).stage(3, 1) == END  # one a step, at the fastest
    assert [make("icot").stage(i, 110) for i in (13, 14)] == [0, 1]  # 13.75 steps
    method = make("coconut", max_stage=3, epochs_per_stage=2.0)
    stages = [method.stage(i, 10) for i in (0, 19, 20, 39, 40, 79, 80)]
    assert stages == [0, 0, 1, 1, 2, 3, END] and make().stage(5, 10) is None
    method = make("coconut", max_stage=3, epochs_per_stage=2.0, cot_epochs=5.0)
    stages = [method.stage(i, 10) for i in (0, 49, 50, 69, 70, 109, 110)]
    assert stages == [0, 0, 1, 1, 2, 3, END]


def test_icot_smoothing_is_exponential():
    n, method = 10_000, make("icot", removal_smoothing=1.0)
    ahead = [method.training_pathway("icot", 3, i / n).skip_tokens - 3 for i in range(n)]
    for k in range(4):
        want = math.exp(-k) / sum(math.exp(-j) for j in range(100))
        assert ahead.count(k) / n == pytest.approx(want, abs=2 / n)


# --------------------------------------------------------------------- losses, slow and obvious


def mean(values):
    return sum(values) / len(values)


def slow_embeddings(model, ids, latent_start, n_latents):
    """[1, T, n]: each thought is the state before it, the whole prefix again for each."""
    project = model.projector or (lambda hidden: hidden)
    x = model.embed(torch.tensor([ids[:latent_start]]))
    for _ in range(n_latents):
        x = torch.cat((x, project(model(x)[:, -1:])), dim=1)
    rest = torch.tensor([ids[latent_start + n_latents :]], dtype=torch.long)
    return torch.cat((x, model.embed(rest)), dim=1)


def equations_1_and_2(method, pathway, problem):
    """(1/N sum over Z + 1/M sum over Y of -log p, states [T][L, n], z_N's index), one example."""
    model, example = method.model, pathway.example(problem, TOKENIZER)
    ids, columns = example.ids.tolist(), torch.arange(len(example.ids))
    x = slow_embeddings(model, ids, example.latent_start, example.n_latents)
    hidden, states = model(x, pathway.silent, capture=(0 * columns, columns))
    loss, pieces = 0, (range(example.z_start, example.y_start), range(example.y_start, len(ids)))
    if pathway.one_mean:
        states = torch.cat((states[:-1], model.norm(states[-1:])))
        pieces = (range(example.z_start, len(ids)),)
    for piece in pieces:
        log_p = [model.logits(hidden[0, i - 1]).log_softmax(dim=-1)[ids[i]] for i in piece]
        loss = loss - (mean(log_p) if piece else 0)
    return loss, states.unbind(1), example.y_start - 1


DISTANCES = {
    "l1": mean,
    "l1-sum": sum,
    "smooth-l1": lambda distances: mean([d * d / 2 if d < 1 else d - 0.5 for d in distances]),
}


def equation_4(teachers, students, norm):
    """teachers, students: [example][token] of states [L, n]; sigma is no part of the graph."""
    total, L = 0, len(teachers[0][0])
    for i in range(L):
        sigma = statistics.stdev(
            x for some in teachers for state in some for x in state[i].tolist()
        )
        for ts, ss in zip(teachers, students, strict=True):
            tokens = [DISTANCES[norm]([*(t[i] - s[i]).abs()]) for t, s in zip(ts, ss, strict=True)]
            total = total + mean(tokens) / sigma / len(teachers) / L
    return total


@pytest.mark.parametrize(
    "name, family, stage, changes, norm",
    [
        ("dart", "llama", END, {}, "l1"),
        ("dart", "qwen2", END, {"lora_rank": 3, "n_st": 0, "rem_is_lora": True}, "l1"),
        ("dart", "gpt2", END, {"attach_teacher": True, "last_step": "keep"}, "l1"),
        ("dart", "llama", END, {"distill_at": "y_1", "distill_norm": "l1-sum"}, "l1-sum"),
        ("dart", "llama", END, {"distill_at": "z_N+Y", "rem_rank": 0}, "l1"),
        ("codi", "llama", END, {"lora_rank": 3}, "smooth-l1"),
        ("codi", "gpt2", END, {"distill_norm": "l1", "attach_teacher": True}, "l1"),
        ("codi", "llama", END, {"codi_form": "dart", "lora_rank": 3}, "smooth-l1"),
        ("cot", "llama", END, {"lora_rank": 3}, None),
        ("pause", "gpt2", END, {"lora_rank": 3}, None),
        ("icot", "llama", 4, {}, None),
        ("coconut", "gpt2", 0, {}, None),
        ("coconut", "llama", 1, {"lora_rank": 3}, None),
        ("coconut", "qwen2", END, {}, None),
    ],
)
def test_step_is_equation_5(in_fp64, name, family, stage, changes, norm):
    """Losses and gradients. Detached, the teacher gets no gradient of the distillation."""
    method = make(name, family, **changes)
    found, fast, _ = step(method, stage=stage)
    slow, states, options = {}, [], method.options
    for key in method.pathways:
        losses, examples = [], []
        for problem, u in zip(PROBLEMS, U, strict=True):
            pathway = method.training_pathway(key, stage, u)
            loss, columns, z_n = equations_1_and_2(method, pathway, problem)
            places = {"z_N": [z_n], "y_1": [z_n + 1], "z_N+Y": range(z_n, len(columns))}
            examples.append([columns[i] for i in places[options.distill_at]])
            losses.append(loss)
        slow[key] = mean(losses)
        states.append(examples)
    total = sum(slow.values())
    if norm:
        if not options.attach_teacher:
            states[0] = [[state.detach() for state in example] for example in states[0]]
        slow["distill"] = equation_4(*states, norm)
        total = total + options.distill_weight * slow["distill"]
    assert found == pytest.approx({key: loss.item() for key, loss in slow.items()}, rel=1e-6)
    method.zero_grad()
    total.backward()
    assert_same_gradients(fast, gradients(method))


def test_distill_loss_by_hand():
    """Two layers, two examples, two dimensions; sigma is sqrt(20/3), and twice that."""
    teacher = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 6.0], [10.0, 14.0]]])
    student = torch.tensor([[[1.0, 2.0], [5.0, 4.0]], [[2.0, 6.0], [10.0, 6.0]]])
    sigma, loss = math.sqrt(20 / 3), dart.distill_loss
    l1 = ((0 + 1 + 0 + 3) / 4 / sigma + (0 + 0 + 0 + 8) / 4 / (2 * sigma)) / 2
    assert loss(teacher, student).item() == pytest.approx(l1, rel=1e-6)
    for scale in (10, 1e-4):
        assert loss(scale * teacher, scale * student).item() == pytest.approx(l1, rel=1e-6)
    assert loss(teacher, student, norm="l1-sum").item() == pytest.approx(2 * l1, rel=1e-6)
    smooth = ((0 + 0.5 + 0 + 2.5) / 4 / sigma + (0 + 0 + 0 + 7.5) / 4 / (2 * sigma)) / 2
    assert loss(teacher, student, norm="smooth-l1").item() == pytest.approx(smooth, rel=1e-6)
    weighted = ((0.75 * 1 + 0.25 * 3) / 2 / 1 + 0.25 * 8 / 2 / 4) / 2
    sigmas, weights = torch.tensor([1.0, 4.0]), torch.tensor([0.75, 0.25])
    assert loss(teacher, student, sigmas, weights=weights).item() == pytest.approx(weighted)


def test_sigma_is_that_of_all_micro_batches_together():
    x = torch.randn(3, 10, 8) * torch.tensor([1.0, 5.0, 0.1])[:, None, None] + 3
    for sizes in ([10], [3, 1, 6]):
        found = dart.global_std(list(x.requires_grad_().split(sizes, dim=1)))
        torch.testing.assert_close(found, torch.stack([layer.std() for layer in x.detach()]))
    x = x.bfloat16()
    assert torch.equal(dart.global_std([x]), dart.global_std([x.float()]))  # in fp32


def test_distill_loss_of_one_row_or_of_constant_states_is_finite():
    for shape in ((2, 1, 1), (2, 1, 6), (2, 3, 4)):
        loss = dart.distill_loss(torch.ones(shape), torch.zeros(shape))
        assert loss.isfinite() and loss > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_cross_entropy_is_computed_in_fp32_and_in_chunks(dtype, tolerance):
    """The vocabulary is said to be so large that logits of four tokens may be held at a time."""
    torch.manual_seed(0)
    head, hidden, sizes = torch.randn(59, 16).to(dtype), torch.randn(9, 16).to(dtype), []
    targets, weights = torch.randint(59, (9,)), torch.rand(9)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=dart.LOGITS // 4))
    model.logits = lambda hidden: sizes.append(len(hidden)) or F.linear(hidden, head)
    loss = dart.cross_entropy(model, hidden.requires_grad_(), targets, weights)
    log_p = F.linear(hidden, head).double().log_softmax(dim=-1)
    want = -sum(w * log_p[i, t] for i, (t, w) in enumerate(zip(targets, weights, strict=True)))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(value, hidden)[0].float() for value in (loss, want))
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert sorted(sizes) == [1, 1, 4, 4, 4, 4]  # once more for the backward pass


@pytest.mark.parametrize("name, attached", [*((n, False) for n in dart.METHODS), ("dart", True)])
def test_several_micro_batches_are_one(in_fp64, name, attached):
    """And all passes of the teacher come first; the very last pass adds up over processes."""
    method = make(name, attach_teacher=attached, lora_rank=3)
    losses, whole, _ = step(method)
    for sizes in ((3, 1), (1, 1, 1, 1)):
        again, parts, calls = step(method, sizes)
        assert again == pytest.approx(losses, rel=1e-6)
        assert_same_gradients(parts, whole)
        names = [key for key in method.pathways for _ in sizes]
        assert calls == [*((key, False) for key in names[:-1]), (names[-1], True)]


def test_thoughts_go_with_activation_checkpointing():
    method = make("codi")
    want = step(method)[:2]
    method.model.activation_checkpointing = True
    torch.testing.assert_close(step(method)[:2], want)


def test_dropout_acts_in_both_passes_by_the_seed_of_the_micro_batch():
    method = make(lora_rank=4, lora_dropout=0.5)
    first, same, other = (step(method, seed=seed)[0] for seed in (1, 1, 2))
    assert first == same and first["cot"] != other["cot"] and first["st"] != other["st"]
    assert step(method.eval(), seed=1)[0] == step(method, seed=2)[0]


# ------------------------------------------------------------------------------------- answers


@torch.no_grad()
def slow_greedy(model, prompt, silent, limit):
    """No cache and no batch: the whole row again for every token."""
    ids = []
    x = slow_embeddings(model, prompt.ids.tolist(), prompt.latent_start, prompt.n_latents)
    while len(ids) < limit and TOKENIZER.eos_id not in ids:
        ids.append(int(model.logits(model(x, silent))[0, -1].argmax()))
        x = torch.cat((x, model.embed(torch.tensor([ids[-1:]]))), dim=1)
    return ids


def make_talkative(name, **changes):
    """A method whose answers end after different numbers of tokens: behind every fifth token of
    the vocabulary EOS is likely."""
    family, direction = "gpt2" if name == "dart" else "llama", torch.tensor([1.0, -1.0] * 8)
    method = make(name, family, lora_rank=3, rem_alpha=80.0, **changes)
    method.model.embed_tokens.data[3::5] += 6 * direction
    method.model.head.data[TOKENIZER.eos_id] = direction / 2
    return method.eval()


@pytest.mark.parametrize("name", dart.METHODS)
def test_generate_in_a_batch_is_slow_greedy_decoding(name):
    """Also after the weights were merged."""
    method = make_talkative(name)
    for key, pathway in method.pathways.items():
        prompts = [pathway.prompt(question, TOKENIZER) for question in QUESTIONS]
        want = [slow_greedy(method.model, prompt, pathway.silent, 5) for prompt in prompts]
        for model in (method.model, evaluation.answerer(method, key).model):
            arguments = model, TOKENIZER, pathway
            assert dart.generate(*arguments, prompts, 5) == want
            assert [dart.generate(*arguments, [prompt], 5)[0] for prompt in prompts] == want
        assert len({len(ids) for ids in want}) > 1


def test_generate_refuses_weights_merged_for_the_other_pathway():
    method = make()
    model, pathway = method.model.merge(silent=True), method.pathways["cot"]
    with pytest.raises(ValueError, match="merged for the silent pathway"):
        dart.generate(model, TOKENIZER, pathway, [pathway.prompt("sam", TOKENIZER)], 4)


@pytest.mark.parametrize("name", ["dart", "codi"])
def test_answer_keeps_order_and_mode_and_is_without_dropout(name):
    method = make_talkative(name, lora_dropout=0.5)
    for key, pathway in method.pathways.items():
        prompts = [pathway.prompt(question, TOKENIZER) for question in QUESTIONS]
        rows = dart.generate(method.eval().model, TOKENIZER, pathway, prompts, 6)
        texts = [TOKENIZER.decode([i for i in row if i != TOKENIZER.eos_id]) for row in rows]
        want = [(text, len(row) + pathway.n_latents) for text, row in zip(texts, rows)]
        for size in (1, 3):
            assert method.train().answer(QUESTIONS, key, batch_size=size) == want
    assert method.answer(QUESTIONS) == want and method.model.training  # of the last pathway
    assert {passes for _, passes in method.answer(QUESTIONS, "cot", max_new_tokens=1)} == {1}
    with pytest.raises(ValueError, match="positions"):
        method.answer([500 * "sam "])
    assert method.model.training


def test_an_empty_question_is_refused_without_a_first_token_too():
    tokenizer = data.Tokenizer.from_pretrained(FIXTURES / "tokenizer-gpt2")
    assert len(dart.Pathway().prompt("a", tokenizer).ids) > 1
    with pytest.raises(ValueError, match="question is empty"):
        dart.Pathway().prompt("  ", tokenizer)


def test_extract_answer_takes_what_follows_the_last_separator():
    cot = dart.Pathway(steps=True)
    assert cot.extract_answer("Answer:1 Answer: -2.5") == " -2.5"
    assert cot.extract_answer("<<1+2=3>>3") == "" and dart.Pathway().extract_answer("3") == "3"


@pytest.mark.parametrize("name, right", [("st", True), ("cot", False)])
def test_evaluate_scores_the_extracted_answer_of_every_problem(name, right):
    """The gold answer is what the model writes; in what this CoT writes there is no separator."""
    method = make_talkative("dart")
    answers, pathway = method.answer(QUESTIONS, name), method.pathways[name]
    problems = [Problem(q, [], text or "0") for q, (text, _) in zip(QUESTIONS, answers)]
    records = dart.evaluate(method.model, TOKENIZER, pathway, problems, 6, batch_size=3)
    for record, problem, (text, passes) in zip(records, problems, answers, strict=True):
        exact = right and text != ""
        want = dict(question=problem.question, gold=problem.answer, text=text, passes=passes)
        assert record == want | dict(answer=text * right, exact=exact, numeric=exact)


# ---------------------------------------------------------------------------------------- runs

ADAPTER, CONFIG = "adapter.safetensors", "config.json"
TRAIN = "--compare --data demo --steps 2 --batch_size 8 --eval_size 8 --device cpu --out"
LORA = "--preset llama-3.2-1b --tokenizer demo --dtype fp32 --lora_rank 2 --rem_rank 2 --n_st 3"


def test_build_keeps_trained_weights_in_fp32_and_counts_the_ids():
    options = dart.Options(method="no-cot", lora_rank=0, dtype="bf16")
    model = dart.build(options, TOKENIZER, config()).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.compute_dtype == torch.bfloat16
    assert options.whole and not dart.Options(lora_rank=2).whole
    assert dart.Options(lora_rank=2, random_init=True).whole
    with pytest.raises(ValueError, match="59 ids, the model 58 embeddings"):
        dart.build(options, TOKENIZER, dataclasses.replace(config(), vocab_size=58))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The directory of two runs: demo trains all weights; lora those beside the ones in base."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("base", "other"):
        (out / name).mkdir()
        export_hf(Transformer(config()).merge(), out / name)
    train.main(f"{TRAIN} {out}/demo".split())
    train.main(f"{TRAIN} {out}/lora {LORA} --max_new_tokens 6 --model {out}/base".split())
    return out


@pytest.mark.parametrize("kind", ["demo", "lora"])
def test_load_run_gives_the_weights_that_were_saved(kind, runs, tmp_path):
    run = shutil.copytree(runs / kind, tmp_path / "run")
    last, about = dart.load_weights(run / ADAPTER)
    best = {name: tensor + 1 for name, tensor in last.items()}
    dart.save_weights(run / "best.safetensors", best, **about)
    for want in (last, best):
        method, options = dart.load_run(run, best=want is best)
        state = method.model.state(whole=kind == "demo")
        assert state.keys() == want.keys() and not method.training and options.method == "dart"
        assert all(torch.equal(state[name], tensor) for name, tensor in want.items())


def replace_bytes(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


def changed(change=lambda content: None, **run):
    """Other content, in a file that is whole."""

    def damage(path):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        else:
            content, about = dart.load_weights(path)
            change(content)
            dart.save_weights(path, content, **about | {"run": about["run"] | run})

    return damage


@pytest.mark.parametrize(
    "file, damage, message",
    [
        (ADAPTER, lambda path: os.truncate(path, 10_000), "damaged"),
        (ADAPTER, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "checksum"),
        (ADAPTER, lambda path: replace_bytes(path, b'step\\": 2', b'step\\": 1'), "checksum"),
        (ADAPTER, os.remove, "no such file"),
        (ADAPTER, lambda path: save_file({"w": torch.ones(3)}, path), "not the weights of a run"),
        (ADAPTER, lambda path: os.replace(path.with_stem("checkpoint"), path), "other tensors"),
        (ADAPTER, changed(lambda w: w["norm.weight"].fill_(math.nan)), "norm.weight is not finite"),
        (ADAPTER, changed(lambda w: w.update(odd=w.pop("norm.weight"))), "norm.weight and 1 other"),
        (ADAPTER, changed(lambda w: w.update({"norm.weight": torch.ones(3)})), "has shape"),
        (ADAPTER, changed(seed=1), r"of another run: seed 1 \(here 0\)"),
        (CONFIG, os.remove, "not a run"),
        (CONFIG, changed(lambda saved: saved.pop("run")), "'run'"),
        ("words.json", changed(lambda words: words.insert(30, words.pop(31))), "tokenizer files"),
    ],
)
def test_load_run_refuses_what_is_not_the_runs(file, damage, message, runs, tmp_path):
    run = shutil.copytree(runs / "demo", tmp_path / "run")
    damage(run / file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        dart.load_run(run)
    assert str(run) in str(error.value) and file.replace("words", "config") in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [("n_st", 5), ("rem_alpha", 16), ("lora_alpha", 16), ("norm_eps", 1e-6), ("rope_theta", 5e5)],
)
def test_load_run_refuses_an_edited_configuration(field, value, runs, tmp_path):
    """In one place, or in all places of config.json: the weights know better."""
    run = shutil.copytree(runs / "demo", tmp_path / "run")
    first = "model_config" if field in ModelConfig.__annotations__ else "options"
    for place, file in ((first, CONFIG), ("run", ADAPTER)):
        changed(lambda saved, place=place: saved[place].update({field: value}))(run / CONFIG)
        with pytest.raises(ValueError, match=f"{file}: of another run: {field}"):
            dart.load_run(run)


def test_load_run_takes_the_base_from_elsewhere_but_no_other_one(runs, tmp_path):
    moved, run = shutil.copytree(runs / "base", tmp_path / "moved"), runs / "lora"
    answers = dart.load_run(run)[0].answer(QUESTIONS)
    assert dart.load_run(run, base=moved)[0].answer(QUESTIONS) == answers
    with pytest.raises(ValueError, match=r"config.json \(with the base .*\): of another run: base"):
        evaluation.main(f"--ckpt {run} --model {runs / 'other'} --limit 2".split())


def test_load_weights_sees_an_old_or_a_new_file_as_a_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    for step in (0, 1):
        tensors = {f"w{i}": torch.full((200,), float(step)) for i in range(20)}
        dart.save_weights(tmp_path / f"{step}", tensors, step=step, run={})

    def replace_again_and_again():
        for i in range(600):
            shutil.copy(tmp_path / f"{i % 2}", tmp_path / "new")
            os.replace(tmp_path / "new", path)

    shutil.copy(tmp_path / "1", path)
    thread = threading.Thread(target=replace_again_and_again, daemon=True)
    thread.start()
    while thread.is_alive():
        tensors, about = dart.load_weights(path)
        assert all((tensor == about["step"]).all() for tensor in tensors.values())


OTHERS = dict(n_st=2, rem_rank=3, rem_alpha=1.0, rem_is_lora=True)
OTHERS |= dict(distill_weight=0.5, distill_norm="l1-sum", distill_at="y_1", attach_teacher=True)
OTHERS |= dict(n_latents=3, latents_per_step=1, max_stage=1, epochs_per_stage=0.5)
OTHERS |= dict(cot_epochs=1.0, codi_form="dart")
OTHERS |= dict(removal_per_epoch=2.0, removal_smoothing=1.0, remove_all_beyond=4)


@pytest.mark.parametrize("name", dart.METHODS)
def test_fingerprint_holds_the_options_that_change_the_training(name):
    def seen(**changes):
        method = make(name, **changes)
        stages = [method.stage(i, 20) for i in range(90)]
        pathways = [method.training_pathway(key, s, 0.9) for key in method.pathways for s in stages]
        norms = {key: gradient.norm().item() for key, gradient in step(method)[1].items()}
        fingerprint = dart.fingerprint(method.options, method.model, TOKENIZER)
        return fingerprint, (norms, stages, pathways)

    method, plain = dart.METHODS[name], seen()
    others = OTHERS | dict(last_step="keep" if method.drops_last_step else "drop")
    unused = {key: value for key, value in others.items() if key not in method.uses}
    assert seen(**unused, data_dir="elsewhere") == plain
    for key in method.uses:
        fingerprint, behaviour = seen(**{key: others[key]})
        assert fingerprint[key] != plain[0][key] and behaviour != plain[1]


class PerWord(dart.Pathway):
    """As many silent tokens as the question has words."""

    def prompt(self, question, tokenizer):
        fields = vars(self) | {"n_silent": len(question.split())}
        return dart.Pathway(**fields).prompt(question, tokenizer)


class PerWordDART(dart.DART):
    def make_pathways(self):
        return super().make_pathways() | {"st": PerWord(silent=True, special_ids=self.special_ids)}


def test_a_new_method_is_an_entry_of_methods(tmp_path, monkeypatch, capsys):
    """Here with a pathway whose C depends on the question: in training, answers and lens."""
    monkeypatch.setitem(dart.METHODS, "per-word", PerWordDART)
    out = tmp_path / "run"
    train.main(f"{TRAIN} {out} --method per-word".split())
    assert f"? {10 * '<st> '}Answer" in capsys.readouterr().out
    method, _ = dart.load_run(out)
    ids, states, n_silent = evaluation.silent_states(method, "sam has 7 pens ?")
    assert (len(ids), n_silent, states.shape) == (7, 5, (4, 7, 64))
    assert method.answer(QUESTIONS) == [method.answer([question])[0] for question in QUESTIONS]
    evaluation.main(["--ckpt", str(out), "--lens", "sam ?"])
    assert "| 2 <st> " in (printed := capsys.readouterr().out) and "3 <st>" not in printed
