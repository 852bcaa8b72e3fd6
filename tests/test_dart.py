"""dart.py: layouts, losses, steps, answers and runs, against slow and obvious versions."""

import dataclasses
import json
import math
import os
import resource
import shutil
import statistics
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import dart
import data
import eval as evaluation
import train
from data import Problem, collate
from model import MODELS, ModelConfig, Transformer, export_hf

TOKENIZER = data.demo_tokenizer()
FAMILIES = ("llama", "qwen2", "gpt2")
PROBLEMS = [
    Problem("sam has 7 pens gets 5 packs of 4 ?", ["<<7+5=12>>", "<<12%4=0>>"], "0"),
    Problem("ann has 9 eggs ?", ["<<9-2=7>>", "<<7%4=3>>"], "3"),
    Problem("bob has 9 eggs ?", ["<<9%4=1>>"], "1"),
    Problem("eve has 1 caps gets 2 packs ?", ["<<1+2=3>>", "<<3+3=6>>", "<<6%5=1>>"], "1 1"),
]
QUESTIONS = [problem.question for problem in PROBLEMS + data.demo_problems(0)["test"][:8]]


def config(family="llama"):
    shape = dict(vocab_size=59, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    shape |= dict(num_attention_heads=4, num_key_value_heads=4 if family == "gpt2" else 2)
    tied = family == "qwen2"
    return ModelConfig(
        family, **shape, head_dim=4, max_position_embeddings=80, tie_word_embeddings=tied
    )


def make(name="dart", family="llama", seed=0, tokenizer=TOKENIZER, **changes):
    """A method around a tiny random model, whose LoRA and REM are not the identity any more."""
    small = dict(n_st=3, lora_rank=0, lora_dropout=0.0, rem_rank=4, rem_alpha=8.0, dtype="fp32")
    small |= dict(distill_weight=2.0, n_latents=2, max_stage=2, max_new_tokens=12)
    torch.manual_seed(seed)
    method = dart.build(
        dart.Options(**small | dict(method=name) | changes), tokenizer, config(family)
    )
    with torch.no_grad():
        for parameter_name, p in method.named_parameters():
            if parameter_name.endswith(("r2", "lora_b", "bias")):
                p.normal_(0, 0.1)
    return method


def micro_batches(method, sizes, seed=0):
    parts, start = [], 0
    for size in sizes:
        some = PROBLEMS[start : start + size]
        batches = {
            name: collate([pathway.example(p, TOKENIZER) for p in some], TOKENIZER.eos_id)
            for name, pathway in method.pathways.items()
        }
        parts.append(dart.MicroBatch(batches, size / len(PROBLEMS), seed + start))
        start += size
    return parts


def gradients(method):
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def step(method, sizes=(4,), seed=0):
    """(losses, gradients, the passes) of one training step on PROBLEMS."""
    method.zero_grad()
    calls = []

    def forward(name, micro, sync):
        calls.append((name, sync))
        torch.manual_seed(micro.seed)
        return method(name, micro.batches[name])

    losses = method.training_step(forward, micro_batches(method, sizes, seed))
    return {name: loss.item() for name, loss in losses.items()}, gradients(method), calls


def assert_same_gradients(ours, theirs):
    """To 1e-5 of a tensor's norm; some, such as that of GPT-2's key bias, are only rounding."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * largest, name


# ------------------------------------------------------------------------------------- layouts


def layout(pathway, problem, tokenizer=TOKENIZER):
    """An example as text: token/N is learned with the weight 1/N, * stands behind z_N, ~ is a
    continuous thought, #i an id that is no token's."""
    example = pathway.example(problem, tokenizer)
    batch, words = collate([example], 0), []
    weight = dict(zip(batch.target_col.tolist(), batch.weights.tolist(), strict=True))
    thoughts = range(batch.latent_start, batch.latent_start + batch.n_latents)
    for i, token in enumerate(example.ids.tolist()):
        text = (
            tokenizer.decode([token]).replace(" ", "_") if token < tokenizer.size else f"#{token}"
        )
        text = "~" if i in thoughts else text
        text += f"/{round(1 / weight[i])}" if i in weight else ""
        words.append(text + "*" * (i == batch.z_n))
    return " ".join(words)


Q0 = "<bos> sam has 7 pens gets 5 packs of 4 ?"
Q2 = "<bos> bob has 9 eggs ?"
COT0 = f"{Q0} <</9 7/9 +/9 5/9 =/9 12/9 >>/9 Answer/9 :/9* 0/2 <eos>/2"
COT2 = f"{Q2} <</9 9/9 %/9 4/9 =/9 1/9 >>/9 Answer/9 :/9* 1/2 <eos>/2"
EMPTY2 = f"{Q2} Answer/2 :/2* 1/2 <eos>/2"
NO_COT2 = f"{Q2} Answer :* 1/2 <eos>/2"


@pytest.mark.parametrize(
    "method, problem, want",
    [
        (make(), 0, {"cot": COT0, "st": f"{Q0} <st> <st> <st> Answer :* 0/2 <eos>/2"}),
        (make(), 2, {"cot": EMPTY2, "st": f"{Q2} <st> <st> <st> Answer :* 1/2 <eos>/2"}),
        (make(n_st=0, last_step="keep"), 2, {"cot": COT2, "st": NO_COT2}),
        (make("cot"), 2, {"cot": COT2}),
        (make("cot", last_step="drop"), 0, {"cot": COT0}),
        (make("no-cot"), 2, {"no-cot": NO_COT2}),
        (make("pause"), 2, {"pause": f"{Q2} #59 #59 #59 Answer :* 1/2 <eos>/2"}),
        (make("icot"), 2, {"icot": NO_COT2}),
        (make("coconut"), 2, {"coconut": f"{Q2} #59 ~ ~ ~ ~ #60 Answer :* 1/2 <eos>/2"}),
        (make("codi"), 2, {"cot": EMPTY2, "codi": f"{Q2} #59 ~ ~ #60 Answer :* 1/2 <eos>/2"}),
    ],
)
def test_layout_of_a_method(method, problem, want):
    pathways = method.pathways.items()
    assert {name: layout(pathway, PROBLEMS[problem]) for name, pathway in pathways} == want
    assert method.inference_pathway == list(want)[-1]


@pytest.mark.parametrize(
    "name, stage, u, want",
    [
        ("icot", 0, 0.0, COT2),
        ("icot", 5, 0.0, f"{Q2} 1/4 >>/4 Answer/4 :/4* 1/2 <eos>/2"),
        ("icot", 4, 1 - math.exp(-4.1), f"{Q2} 1/4 >>/4 Answer/4 :/4* 1/2 <eos>/2"),
        ("icot", 30, 0.0, EMPTY2),
        ("icot", dart.FINAL_STAGE, 0.9, NO_COT2),
        ("coconut", 0, 0.9, COT2.replace("? ", "? #59 #60 ")),
        ("coconut", 1, 0.9, EMPTY2.replace("? ", "? #59 ~ ~ #60 ")),
        ("coconut", dart.FINAL_STAGE, 0.9, NO_COT2.replace("? ", "? #59 ~ ~ ~ ~ #60 ")),
    ],
)
def test_layout_at_a_stage(name, stage, u, want):
    assert layout(make(name).training_pathway(name, stage, u), PROBLEMS[2]) == want


def test_coconut_leaves_out_a_step_at_each_stage():
    pathway = make("coconut").training_pathway("coconut", 1, 0.0)
    want = "#59 ~ ~ #60 <</9 12/9 %/9 4/9 =/9 0/9 >>/9 Answer/9 :/9* 0/2 <eos>/2"
    assert layout(pathway, PROBLEMS[0]) == f"{Q0} {want}"


def merging_tokenizer(directory, family):
    """A tokenizer.json whose longer tokens are such as lie across the seams of an example."""
    spelling = {byte: character for character, byte in data.byte_spelling().items()}
    vocab, merges = {spelling[byte]: byte for byte in range(256)}, []
    for word in ("?a", "?<<", ".Answer", " Answer", ":-", ":-."):
        word = "".join(spelling[byte] for byte in word.encode())
        for i in range(2, len(word) + 1):
            if word[:i] not in vocab:
                vocab[word[:i]] = len(vocab)
                merges.append(f"{word[: i - 1]} {word[i - 1]}")
    llama = family == "llama"
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
    added = [
        data.added_token(len(vocab) + i, t) for i, t in enumerate(special[: 3 if llama else 2])
    ]
    pattern = data.LLAMA3_PATTERN if llama else data.QWEN2_PATTERN
    split = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    first = {"single": [{"SpecialToken": {"id": special[0]}}]}
    raw = {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        "normalizer": None if llama else {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, by_bytes]},
        "added_tokens": added,
        "post_processor": first if llama else None,
    }
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    return data.Tokenizer.from_pretrained(directory)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layout_where_the_tokenizer_would_merge_across_the_seams(family, tmp_path):
    """Negative, decimal, with two blanks, and sentences as in ProsQA: z_N is : all the same."""
    tokenizer = merging_tokenizer(tmp_path, family)
    merged = tokenizer.encode("?a ?<< c.Answer:-.5 Answer:-5", bos=False, eos=False)
    merged = [tokenizer.decode([i]) for i in merged]
    assert {"?<<", "?a", ".Answer", ":-.", " Answer", ":-"} <= {*merged}

    silent = tokenizer.reserved or (tokenizer.size,)
    cot, full = (dart.Pathway(steps=True, drop_last_step=drop) for drop in (True, False))
    st = dart.Pathway(silent=True, n_silent=2, special_ids=silent)
    name = "<|reserved_special_token_0|>" if tokenizer.reserved else f"#{silent[0]}"
    bos, z = (
        "<|begin_of_text|> " * (family == "llama"),
        "A/{0} n/{0} s/{0} w/{0} e/{0} r/{0} :/{0}*",
    )
    middle, end = f"{name} {name} A n s w e r :*", "<|end_of_text|>"

    numbers = Problem(" 1  b?", ["<<1-2=-1>>", "<<-1/2=-.5>>"], "-.5")
    steps = " ".join(f"{token}/17" for token in "< < 1 - 2 = - 1 > >".split())
    y = f"-/4 ./4 5/4 {end}/4"
    assert layout(cot, numbers, tokenizer) == f"{bos}1 _ b ? {steps} {z.format(17)} {y}"
    assert layout(st, numbers, tokenizer) == f"{bos}1 _ b ? {middle} {y}"

    prosqa = Problem("a?", ["a is b.", "b is c."], "a.")
    steps = " ".join(f"{token}/22" for token in "a _ i s _ b . _ b _ i s _ c .".split())
    y = f"a/3 ./3 {end}/3"
    assert layout(full, prosqa, tokenizer) == f"{bos}a ? {steps} {z.format(22)} {y}"
    assert layout(st, prosqa, tokenizer) == f"{bos}a ? {middle} {y}"


@pytest.mark.parametrize("name", dart.METHODS)
def test_prompt_is_the_start_of_the_example_whatever_the_blanks(name):
    for pathway in make(name).pathways.values():
        prompt = pathway.prompt("  sam has  7\tpens ? ", TOKENIZER)
        example = pathway.example(Problem("sam has 7 pens ?", ["<<7+5=12>>"], "0"), TOKENIZER)
        assert prompt.ids.tolist() == example.ids[: example.z_start].tolist()
        with pytest.raises(ValueError, match="the question is empty"):
            pathway.prompt("  ", TOKENIZER)


@pytest.mark.parametrize(
    "name, reserved, changes, want",  # want: (new embeddings, are they trained?)
    [
        ("dart", (7,), {}, (0, False)),
        ("dart", (), {}, (1, False)),
        ("dart", (), {"lora_rank": 0}, (1, True)),
        ("pause", (7,), {}, (1, True)),
        ("coconut", (7, 8), {}, (2, True)),
        ("codi", (7, 8), {}, (0, False)),
        ("codi", (7,), {}, (2, False)),
        ("cot", (), {}, (0, False)),
    ],
)
def test_special_tokens_are_reserved_new_or_trained(name, reserved, changes, want):
    method = dart.METHODS[name]
    options = dart.Options(**{"method": name} | changes)
    adapters = method.adapters(SimpleNamespace(reserved=reserved), options)
    n, trained = adapters.new_embeddings, adapters.train_new_embeddings
    assert (n, n > 0 and trained) == want


@pytest.mark.parametrize("name, count", [("dart", 44_040_192), ("codi", 98_574_336)])
def test_trained_parameters_are_the_papers(name, count):
    tokenizer = SimpleNamespace(reserved=(128_002, 128_003))
    adapters = dart.METHODS[name].adapters(tokenizer, dart.Options(method=name))
    model = Transformer(MODELS["llama-3.2-1b"], adapters, device="meta", init=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# -------------------------------------------------------------------------------------- stages


def test_icot_removes_tokens_at_regular_intervals():
    """8 an epoch of 100 steps: one more every 12 steps, and from 39 on all of them."""
    method, end = make("icot"), dart.FINAL_STAGE
    stages = [method.stage(i, 100) for i in (0, 11, 12, 23, 24, 467, 468, 469)]
    assert stages == [0, 0, 1, 1, 2, 38, end, end]
    assert make("icot", remove_all_beyond=2).stage(3, 1) == end  # one a step, at the fastest


def test_icot_smoothing_is_exponential():
    n, pathway = 10_000, make("icot", removal_smoothing=1.0).training_pathway
    ahead = [pathway("icot", 3, i / n).skip_tokens - 3 for i in range(n)]
    for k in range(4):
        want = math.exp(-k) / sum(math.exp(-j) for j in range(100))
        assert ahead.count(k) / n == pytest.approx(want, abs=2 / n)
    without = make("icot", removal_smoothing=0.0)
    assert without.training_pathway("icot", 3, 0.999).skip_tokens == 3


def test_coconut_stages_take_their_epochs():
    method = make("coconut", max_stage=3, epochs_per_stage=2.0)
    stages = [method.stage(i, 10) for i in (0, 19, 20, 39, 40, 79, 80)]
    assert stages == [0, 0, 1, 1, 2, 3, dart.FINAL_STAGE]
    assert make().stage(5, 10) is None


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


def slow_pass(method, pathway, problem):
    """(-log p of each token of Z, of Y, states [T][L, n], index of z_N) of one example alone."""
    model, example = method.model, pathway.example(problem, TOKENIZER)
    ids, columns = example.ids.tolist(), torch.arange(len(example.ids))
    x = slow_embeddings(model, ids, example.latent_start, example.n_latents)
    hidden, states = model(x, pathway.silent, capture=(0 * columns, columns))
    log_p = model.logits(hidden)[0].log_softmax(dim=-1)
    nll = [-log_p[i - 1, ids[i]] for i in range(example.z_start, len(ids))]
    n = example.y_start - example.z_start
    return nll[:n], nll[n:], states.unbind(1), example.y_start - 1


def equations_1_and_2(z, y):
    return (mean(z) if z else 0) + mean(y)


def l1(t, s):
    return mean([abs(a - b) for a, b in zip(t, s, strict=True)])


def l1_sum(t, s):
    return len(t) * l1(t, s)


def smooth_l1(t, s):
    distances = [abs(a - b) for a, b in zip(t, s, strict=True)]
    return mean([d * d / 2 if d < 1 else d - 0.5 for d in distances])


def equation_4(teachers, students, distance):
    """teachers, students: [example][token] of states [L, n]; sigma is no part of the graph."""
    per_layer = []
    for layer in range(len(teachers[0][0])):
        sigma = statistics.stdev(v for ts in teachers for t in ts for v in t[layer].tolist())
        pairs = [zip(ts, ss, strict=True) for ts, ss in zip(teachers, students, strict=True)]
        distances = [mean([distance(t[layer], s[layer]) for t, s in pair]) for pair in pairs]
        per_layer.append(mean(distances) / sigma)
    return mean(per_layer)


def test_equation_3_is_a_product_of_weights():
    """K = W_K W_R h and V = W_V W_R h, with W_R = (alpha/d) R2 R1^T + I, and nothing else."""
    method, ids = make(), torch.arange(20)[None]
    silent = method.model(ids, silent=True)
    with torch.no_grad():
        for layer in method.model.layers:
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                w_r = 8.0 / 4 * linear.rem.r2 @ linear.rem.r1.T + torch.eye(16)
                linear.weight.copy_(linear.weight @ w_r)
        torch.testing.assert_close(method.model(ids), silent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, family, changes, distance",
    [
        ("dart", "llama", {}, l1),
        ("dart", "qwen2", {"lora_rank": 3, "n_st": 0}, l1),
        ("dart", "gpt2", {"distill_weight": 0.0, "last_step": "keep"}, l1),
        ("dart", "gpt2", {"attach_teacher": True}, l1),
        ("dart", "llama", {"rem_is_lora": True, "distill_norm": "smooth-l1"}, smooth_l1),
        ("dart", "llama", {"distill_at": "y_1", "distill_norm": "l1-sum"}, l1_sum),
        ("dart", "llama", {"distill_at": "z_N+Y", "rem_rank": 0}, l1),
        ("codi", "llama", {"lora_rank": 3}, smooth_l1),
        ("codi", "gpt2", {"distill_norm": "l1", "attach_teacher": True}, l1),
    ],
)
def test_distilling_step_is_equation_5(name, family, changes, distance):
    """Losses and gradients. Detached, the teacher gets no gradient of the distillation."""
    method = make(name, family, **changes)
    losses, fast_gradients, _ = step(method)
    cot, other = method.pathways
    totals, states = {cot: [], other: []}, {cot: [], other: []}
    for pathway in method.pathways:
        for problem in PROBLEMS:
            z, y, columns, z_n = slow_pass(method, method.pathways[pathway], problem)
            totals[pathway].append(equations_1_and_2(z, y))
            places = {"z_N": [z_n], "y_1": [z_n + 1], "z_N+Y": range(z_n, len(columns))}
            chosen = [columns[i] for i in places[method.options.distill_at]]
            if pathway == cot and not method.options.attach_teacher:
                chosen = [state.detach() for state in chosen]
            states[pathway].append(chosen)
    slow = {pathway: mean(values) for pathway, values in totals.items()}
    slow["distill"] = equation_4(states[cot], states[other], distance)
    assert losses == pytest.approx({key: loss.item() for key, loss in slow.items()}, rel=1e-5)
    method.zero_grad()
    (slow[cot] + slow[other] + method.options.distill_weight * slow["distill"]).backward()
    assert_same_gradients(fast_gradients, gradients(method))


@pytest.mark.parametrize(
    "name, family, stage",
    [
        ("cot", "llama", None),
        ("no-cot", "qwen2", None),
        ("pause", "gpt2", None),
        ("icot", "llama", 4),
        ("icot", "llama", dart.FINAL_STAGE),
        ("coconut", "gpt2", 0),
        ("coconut", "llama", 1),
        ("coconut", "qwen2", dart.FINAL_STAGE),
    ],
)
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_pass_of_another_method_is_its_cross_entropy(name, family, stage, lora_rank):
    method = make(name, family, lora_rank=lora_rank)
    pathways = [method.training_pathway(name, stage, u) for u in (0.0, 0.5, 0.99, 0.1)]
    pairs = list(zip(pathways, PROBLEMS, strict=True))
    batch = collate([path.example(p, TOKENIZER) for path, p in pairs], TOKENIZER.eos_id)
    loss, _ = method(name, batch)
    slow = mean([equations_1_and_2(*slow_pass(method, path, p)[:2]) for path, p in pairs])
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    found = []
    for value in (loss, slow):
        method.zero_grad()
        value.backward()
        found.append(gradients(method))
    assert_same_gradients(*found)


def test_distill_loss_by_hand():
    """Two layers, two examples, two dimensions; sigma is sqrt(20/3), and twice that."""
    teacher = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 6.0], [10.0, 14.0]]])
    student = torch.tensor([[[1.0, 2.0], [5.0, 4.0]], [[2.0, 6.0], [10.0, 6.0]]])
    sigma, loss = math.sqrt(20 / 3), dart.distill_loss
    l1 = ((0 + 1 + 0 + 3) / 4 / sigma + (0 + 0 + 0 + 8) / 4 / (2 * sigma)) / 2
    assert loss(teacher, student).item() == pytest.approx(l1, rel=1e-6)
    assert loss(10 * teacher, 10 * student).item() == pytest.approx(l1, rel=1e-6)
    assert loss(teacher, student, norm="l1-sum").item() == pytest.approx(2 * l1, rel=1e-6)
    smooth = ((0 + 0.5 + 0 + 2.5) / 4 / sigma + (0 + 0 + 0 + 7.5) / 4 / (2 * sigma)) / 2
    assert loss(teacher, student, norm="smooth-l1").item() == pytest.approx(smooth, rel=1e-6)
    weights, sigmas = torch.tensor([0.75, 0.25]), torch.tensor([1.0, 4.0])
    weighted = ((0.75 * 1 + 0.25 * 3) / 2 / 1 + 0.25 * 8 / 2 / 4) / 2
    found = loss(teacher, student, sigmas, weights=weights).item()
    assert found == pytest.approx(weighted, rel=1e-6)


def test_sigma_is_that_of_all_micro_batches_together():
    x = torch.randn(3, 10, 8) * torch.tensor([1.0, 5.0, 0.1])[:, None, None] + 3
    want = torch.stack([layer.std() for layer in x])
    for sizes in ([10], [3, 1, 6]):
        found = dart.global_std(list(x.requires_grad_().split(sizes, dim=1)))
        torch.testing.assert_close(found, want)
        assert not found.requires_grad


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 6), (2, 3, 4)])
def test_distill_loss_of_one_row_or_of_constant_states_is_finite(shape):
    for teacher in (torch.ones(shape), torch.arange(math.prod(shape)).float().view(shape)):
        loss = dart.distill_loss(teacher, teacher + 1)
        assert loss.isfinite() and loss > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_computed_in_fp32_and_in_chunks(dtype):
    """The vocabulary is said to be so large that logits of four tokens may be held at a time."""
    torch.manual_seed(0)
    head, sizes = torch.randn(59, 16, dtype=dtype), []

    def logits(hidden):
        sizes.append(len(hidden))
        return F.linear(hidden, head)

    model = SimpleNamespace(logits=logits, config=SimpleNamespace(vocab_size=2**23))
    hidden = torch.randn(9, 16).to(dtype).requires_grad_()
    targets, weights = torch.randint(59, (9,)), torch.rand(9)
    loss = dart.cross_entropy(model, hidden, targets, weights)
    log_p = F.linear(hidden, head).double().log_softmax(dim=-1)
    want = -sum(w * log_p[i, t] for i, (t, w) in enumerate(zip(targets, weights, strict=True)))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(value, hidden)[0].float() for value in (loss, want))
    assert (ours - theirs).norm() <= (1e-6 if dtype == torch.float32 else 0.01) * theirs.norm()
    assert sizes[:3] == [4, 4, 1] and sorted(sizes[3:]) == [1, 4, 4]  # again, backwards


# --------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("name", dart.METHODS)
@pytest.mark.parametrize("attached", [False, True])
def test_several_micro_batches_are_one(name, attached):
    method = make(name, attach_teacher=attached, lora_rank=3)
    losses, whole, _ = step(method)
    for sizes in ((3, 1), (1, 1, 1, 1)):
        again, parts, _ = step(method, sizes)
        assert again == pytest.approx(losses, rel=1e-6)
        assert_same_gradients(parts, whole)


@pytest.mark.parametrize("attached", [False, True])
def test_step_runs_the_teacher_once_and_gives_gradients_at_the_end(attached):
    passes = [("cot", False), ("cot", False), ("st", False), ("st", True)]
    assert step(make(attach_teacher=attached), (2, 2))[2] == passes
    assert step(make("pause"), (2, 2))[2] == [("pause", False), ("pause", True)]


def test_dropout_acts_in_both_passes_by_the_seed_of_the_micro_batch():
    method = make(lora_rank=4, lora_dropout=0.5)
    first, same, other = (step(method, seed=seed)[0] for seed in (1, 1, 2))
    assert first == same
    assert first["cot"] != other["cot"] and first["st"] != other["st"]
    method.eval()
    assert step(method, seed=1)[0] == step(method, seed=2)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", dart.METHODS)
def test_bf16_step_trains_every_adapter_in_fp32(name, family):
    method = make(name, family, dtype="bf16", lora_rank=2)
    losses, found, _ = step(method, (2, 2))
    assert all(map(math.isfinite, losses.values()))
    assert found.keys() == {key for key, p in method.named_parameters() if p.requires_grad}
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())


# ------------------------------------------------------------------------------------- answers


@torch.no_grad()
def slow_greedy(model, prompt, silent, limit):
    """No cache and no batch: the whole row again for every token."""
    x = slow_embeddings(model, prompt.ids.tolist(), prompt.latent_start, prompt.n_latents)
    ids = []
    while len(ids) < limit and TOKENIZER.eos_id not in ids:
        ids.append(int(model.logits(model(x, silent))[0, -1].argmax()))
        x = torch.cat((x, model.embed(torch.tensor([ids[-1:]]))), dim=1)
    return ids


def make_talkative(name):
    """A method whose answers end after different numbers of tokens, or not at all."""
    method = make(name, lora_rank=3, seed=3)
    with torch.no_grad():
        head = method.model.lm_head
        head[TOKENIZER.eos_id] = 2.5 * torch.randn(16, generator=torch.manual_seed(1)) / 4
    return method.eval()


@pytest.mark.parametrize("name", dart.METHODS)
def test_generate_in_a_batch_is_slow_greedy_decoding(name):
    """Also after the weights were merged."""
    method = make_talkative(name)
    for pathway_name, pathway in method.pathways.items():
        prompts = [pathway.prompt(question, TOKENIZER) for question in QUESTIONS]
        want = [slow_greedy(method.model, prompt, pathway.silent, 10) for prompt in prompts]
        ends = [ids[-1] == TOKENIZER.eos_id for ids in want]
        assert any(ends) and not all(ends) and len({len(ids) for ids in want}) > 1
        for model in (method.model, evaluation.merged_copy(method, pathway_name)):
            arguments = model, TOKENIZER, pathway
            assert dart.generate(*arguments, prompts, 10) == want
            assert [dart.generate(*arguments, [prompt], 10)[0] for prompt in prompts] == want


def test_generate_refuses_weights_merged_for_the_other_pathway():
    method = make()
    prompts = [method.pathways["cot"].prompt(QUESTIONS[0], TOKENIZER)]
    method.model.merge(silent=True)
    with pytest.raises(ValueError, match="merged for the silent pathway"):
        dart.generate(method.model, TOKENIZER, method.pathways["cot"], prompts, 4)


@pytest.mark.parametrize("name", ["dart", "codi"])
def test_answer_keeps_the_order_of_questions_and_counts_passes(name):
    method = make_talkative(name)
    for pathway in (None, "cot"):
        chosen = method.pathways[pathway or name.replace("dart", "st")]
        prompts = [chosen.prompt(question, TOKENIZER) for question in QUESTIONS]
        rows = dart.generate(method.model, TOKENIZER, chosen, prompts, 12)
        texts = [TOKENIZER.decode([i for i in row if i != TOKENIZER.eos_id]) for row in rows]
        passes = [len(row) + (chosen.n_latents or 0) for row in rows]
        for size in (1, 5, 64):
            answers = method.answer(QUESTIONS, pathway, batch_size=size)
            assert answers == list(zip(texts, passes, strict=True))
    assert max(len(ids) for ids in rows) == 12 == method.options.max_new_tokens
    assert all(passes <= 2 for _, passes in method.answer(QUESTIONS, "cot", max_new_tokens=2))


def test_answer_is_without_dropout_and_leaves_the_mode_alone():
    method = make(lora_rank=4, lora_dropout=0.5)
    want = method.eval().answer(QUESTIONS)
    assert method.train().answer(QUESTIONS) == want and method.model.training


def test_extract_answer_takes_what_follows_the_last_separator():
    cot, st = dart.Pathway(steps=True), dart.Pathway()
    assert cot.extract_answer("<<1+2=3>>Answer:3") == "3"
    assert cot.extract_answer("Answer:1 Answer: -2.5") == " -2.5"
    assert cot.extract_answer("<<1+2=3>>3") == ""
    assert st.extract_answer("3") == "3"


def test_evaluate_scores_the_extracted_answer_of_every_problem():
    method = make_talkative("dart")
    for name, right in (("st", True), ("cot", False)):  # no separator is in what this CoT writes
        answers = method.answer(QUESTIONS, name)
        problems = [Problem(q, [], a.text) for q, a in zip(QUESTIONS, answers, strict=True)]
        pathway = method.pathways[name]
        records = dart.evaluate(method.model, TOKENIZER, pathway, problems, 12, batch_size=5)
        want = [
            dict(question=p.question, gold=p.answer, text=p.answer, answer=p.answer * right)
            | dict(exact=right, numeric=right, passes=a.passes)
            for p, a in zip(problems, answers, strict=True)
        ]
        assert all(p.answer for p in problems) and records == want


# ---------------------------------------------------------------------------------------- runs


def train_in_process(out, *words):
    train.main(["--out", str(out), "--batch_size", "8", "--device", "cpu", "--compare", *words])
    return out


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("dart") / "demo"
    return train_in_process(out, "--steps", "2", "--eval_size", "8")


def write_base(directory, seed):
    torch.manual_seed(seed)
    directory.mkdir()
    export_hf(Transformer(config()).merge(), directory)
    return directory


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory):
    """A run on a base model that lies elsewhere."""
    directory = tmp_path_factory.mktemp("dart-lora")
    words = "--preset llama-3.2-1b --tokenizer demo --data demo --dtype fp32 --steps 2"
    words += " --lora_rank 2 --rem_rank 2 --n_st 3 --eval_size 0 --max_new_tokens 8"
    base = write_base(directory / "base", 0)
    return train_in_process(directory / "run", *words.split(), "--model", str(base))


@pytest.fixture(params=["demo_run", "lora_run"])
def run(request, tmp_path):
    """A copy of a run, to be damaged."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "run")


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def test_load_run_gives_the_weights_that_were_saved(run):
    tensors, about = dart.load_weights(run / "adapter.safetensors")
    assert about["progress"]["step"] == 2
    method, options = dart.load_run(run)
    whole = options.lora_rank == 0
    state = method.model.state(whole)
    assert state.keys() == tensors.keys() and not method.training
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert set(state) == {n for n, p in method.model.named_parameters() if p.requires_grad or whole}
    assert dart.load_run(run, dtype="bf16")[0].model.compute_dtype == torch.bfloat16

    other = {name: tensor + 1 for name, tensor in tensors.items()}
    dart.save_weights(run / "best.safetensors", other, **about)
    best = dart.load_run(run, best=True)[0].model.state(whole)
    assert all(torch.equal(best[name], tensor) for name, tensor in other.items())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def resave(edit=lambda tensors: None, **changes):
    def damage(path):
        tensors, about = dart.load_weights(path)
        edit(tensors)
        dart.save_weights(path, tensors, **about | {"run": about["run"] | changes})

    return damage


def rename_one(tensors):
    tensors["layers.9.weight"] = tensors.pop(max(tensors))


def drop_a_row(tensors):
    tensors[max(tensors)] = tensors[max(tensors)][1:]


def put_a_nan(tensors):
    tensors[max(tensors)].view(-1)[3] = math.nan


DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "a bit": (flip_a_bit, "checksum"),
    "text": (lambda path: path.write_text('{"weights": 1}' * 9), "damaged"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com"), "Git LFS"),
    "foreign": (lambda path: save_file({"w": torch.ones(3)}, path), "not the weights of a run"),
    "gone": (lambda path: path.unlink(), "no such file"),
    "not finite": (resave(put_a_nan), "is not finite"),
    "renamed": (resave(rename_one), "layers.9.weight|other tensors"),
    "shape": (resave(drop_a_row), "has shape"),
    "seed": (resave(seed=1), r"seed 1 \(here 0\)"),
    "checkpoint": (
        lambda path: shutil.copy(path.with_name("checkpoint.safetensors"), path),
        "other tensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_run_refuses_other_weights_and_names_the_file(run, damage):
    make_damage, message = DAMAGES[damage]
    make_damage(run / "adapter.safetensors")
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"adapter.safetensors: .*({message})"
    ):
        dart.load_run(run)


@pytest.mark.parametrize(
    "part, field, value",
    [
        ("options", "n_st", 5),
        ("options", "rem_alpha", 16.0),
        ("options", "lora_alpha", 16.0),
        ("model_config", "norm_eps", 1e-6),
        ("model_config", "rope_theta", 5e5),
    ],
)
def test_load_run_refuses_an_edited_configuration(demo_run, tmp_path, part, field, value):
    """In one place, or in all places of config.json; the weights know better."""
    run = shutil.copytree(demo_run, tmp_path / "run")
    for place, file in ((part, "config.json"), ("run", "adapter.safetensors")):
        change(run / "config.json", lambda saved, place=place: saved[place].update({field: value}))
        with pytest.raises(ValueError, match=f"{file}: of another run: {field}"):
            dart.load_run(run)


@pytest.mark.parametrize("field", ["options", "model_config", "run"])
def test_load_run_refuses_half_a_configuration(run, field):
    change(run / "config.json", lambda saved: saved.pop(field))
    with pytest.raises(ValueError, match=f"config.json: .*{field}"):
        dart.load_run(run)


def test_load_run_refuses_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run of train.py"):
        dart.load_run(tmp_path)


def test_load_run_refuses_other_words(run):
    def swap(words):
        i, j = words.index("sam"), words.index("ann")
        words[i], words[j] = words[j], words[i]

    change(run / "words.json", swap)
    with pytest.raises(ValueError, match="config.json: of another run: tokenizer files"):
        dart.load_run(run)


def test_load_run_takes_the_base_from_elsewhere_but_no_other_one(lora_run, tmp_path):
    moved = shutil.copytree(lora_run.parent / "base", tmp_path / "moved")
    want, _ = dart.load_run(lora_run)
    method, _ = dart.load_run(lora_run, base=moved)
    assert method.answer(QUESTIONS) == want.answer(QUESTIONS)
    other = write_base(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="config.json: of another run: base weights"):
        evaluation.main(["--ckpt", str(lora_run), "--model", str(other), "--limit", "2"])


def test_load_weights_sees_an_old_or_a_new_file_as_a_whole(tmp_path):
    path, stop = tmp_path / "a.safetensors", threading.Event()
    for number in (1, 2):
        tensors = {f"w{i}": torch.full((200,), float(number)) for i in range(20)}
        dart.save_weights(tmp_path / str(number), tensors, step=number, run={})

    def replace_all_the_time():
        for number in iter(lambda: 1 + stop.is_set(), None):
            for source in ("1", "2"):
                shutil.copy(tmp_path / source, tmp_path / "new")
                os.replace(tmp_path / "new", path)
            if number == 2:
                return

    shutil.copy(tmp_path / "1", path)
    thread = threading.Thread(target=replace_all_the_time)
    thread.start()
    try:
        seen = [dart.load_weights(path) for _ in range(100)]
    finally:
        stop.set()
        thread.join()
    for tensors, about in seen:
        assert all((tensor == about["step"]).all() for tensor in tensors.values())
    assert {about["step"] for _, about in seen} == {1, 2}


def test_save_weights_that_fails_leaves_the_old_file(tmp_path):
    path, (soft, hard) = tmp_path / "a.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    dart.save_weights(path, {"w": torch.ones(4)}, step=1, run={})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as if the disk were full
    try:
        with pytest.raises(OSError):
            dart.save_weights(path, {"w": torch.ones(4000)}, step=2, run={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert dart.load_weights(path)[1]["step"] == 1 and os.listdir(tmp_path) == [path.name]


OTHERS = dict(n_st=2, last_step="drop", rem_rank=3, rem_alpha=1.0, rem_is_lora=True)
OTHERS |= dict(distill_weight=0.5, distill_norm="l1-sum", distill_at="y_1", attach_teacher=True)
OTHERS |= dict(n_latents=3, latents_per_step=1, max_stage=1, epochs_per_stage=0.5)
OTHERS |= dict(removal_per_epoch=2.0, removal_smoothing=1.0, remove_all_beyond=4)


@pytest.mark.parametrize("name", dart.METHODS)
def test_fingerprint_holds_the_options_that_the_method_reads(name):
    """Those that it does not read change nothing, neither the fingerprint nor the training."""

    def behaviour(method):
        examples = [
            method.training_pathway(key, method.stage(i, 2), 0.9).example(p, TOKENIZER).ids.tolist()
            for key in method.pathways
            for i in (0, 1, 3, 8, 40)
            for p in PROBLEMS
        ]
        return step(method)[0], [method.stage(i, 2) for i in range(90)], examples

    def fingerprint(method):
        return dart.fingerprint(method.options, method.model, TOKENIZER)

    method, uses = make(name), dart.METHODS[name].uses
    other = make(name, **{key: value for key, value in OTHERS.items() if key not in uses})
    assert fingerprint(other) == fingerprint(method) and behaviour(other) == behaviour(method)
    assert fingerprint(make(name, data_dir="elsewhere")) == fingerprint(method)
    for key in uses:
        assert fingerprint(make(name, **{key: OTHERS[key]}))[key] != fingerprint(method)[key]


# ------------------------------------------------------------------------------------ extension


class PerWord(dart.Pathway):
    """As many silent tokens as the question has words."""

    def prompt(self, question, tokenizer):
        longer = dataclasses.replace(self, n_silent=len(question.split()))
        return dart.Pathway.prompt(longer, question, tokenizer)


class PerWordDART(dart.DART):
    def make_pathways(self):
        pathways = super().make_pathways()
        fields = vars(pathways["st"])
        return pathways | {"st": PerWord(**fields)}


def test_a_new_method_is_an_entry_of_methods(tmp_path, monkeypatch, capsys):
    """Here with a pathway whose C depends on the question: in training, answers and lens."""
    monkeypatch.setitem(dart.METHODS, "per-word", PerWordDART)
    out = train_in_process(tmp_path / "run", "--method", "per-word", "--steps", "1")
    assert "? <st> <st> <st> <st> <st> <st> <st> <st> <st> <st> Answer" in capsys.readouterr().out
    method, _ = dart.load_run(out)
    for question, n in (("sam has 7 pens ?", 5), ("sam ?", 2)):
        want = f"<bos> {question} {'<st> ' * n}Answer :* 0/2 <eos>/2"
        assert layout(method.pathways["st"], Problem(question, [], "0")) == want
        ids, states, n_silent = evaluation.silent_states(method, question)
        assert (len(ids), n_silent, states.shape) == (n + 2, n, (4, n + 2, 64))
    together = method.answer(QUESTIONS)
    assert together == [method.answer([question])[0] for question in QUESTIONS]
    evaluation.main(["--ckpt", str(out), "--lens", "sam ?"])
    assert "| 2 <st> " in (printed := capsys.readouterr().out) and "3 <st>" not in printed
