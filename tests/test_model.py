"""model.py: parity with Hugging Face, LoRA and REM, merging, the KV cache, loading, export."""

import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import dart
from model import MODELS, Adapters, KVCache, ModelConfig, Transformer, export_hf, rope_frequencies
from model import tensor_digest

FAMILIES = ("llama", "qwen2", "gpt2")
NAMES = (*FAMILIES, "llama-shards", "qwen2-untied", "gpt2-untied")
ADAPTERS = Adapters(lora_rank=3, lora_alpha=6, rem_rank=2, rem_alpha=3)
ROPE = json.loads((FIXTURES / "llama/config.json").read_text())["rope_parameters"]
IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))

each_family = pytest.mark.parametrize("family", FAMILIES)
each_pathway = pytest.mark.parametrize("silent", [False, True])


def relative(found, want):
    """The largest error, in units of the largest value."""
    return ((found - want).abs().max() / want.abs().max()).item()


def adapted(fixture, adapters=ADAPTERS, **kwargs):
    """A fixture's model whose LoRA and REM do something."""
    torch.manual_seed(0)
    model = Transformer.from_pretrained(FIXTURES / fixture, adapters, **kwargs)
    for name, p in model.named_parameters():
        if name.endswith(("lora_b", "r2")):
            p.data.normal_(0, 0.1)
    return model.eval()


@torch.no_grad()
def logits_of(model, ids=IDS, silent=False):
    return model.logits(model(ids, silent))


# ------------------------------------------------------------- parity, configuration, sizes, scales


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_states_are_those_of_transformers(name):
    want = load_file(FIXTURES / name / "expected.safetensors")
    model, columns = Transformer.from_pretrained(FIXTURES / name), want["positions"]
    ids = torch.cat((want["ids"].flip(1), want["ids"]))
    assert ids.shape == (2, 320)
    hidden, states = model(ids, capture=(torch.ones_like(columns), columns))
    assert relative(model.logits(hidden)[1, columns], want["logits"]) <= 1e-5
    for found, layer in zip(states, want["states"], strict=True):
        assert relative(found, layer) <= 1e-5


@each_family
@pytest.mark.parametrize("kind", ["dtype", "compute_dtype"])
def test_bf16_agrees_with_fp32_within_its_rounding(family, kind):
    want = logits_of(adapted(family), silent=True)
    model = adapted(family, dtype=torch.bfloat16 if kind == "dtype" else torch.float32)
    model.compute_dtype = torch.bfloat16
    for _ in range(2):  # and merged
        error = logits_of(model, silent=True).float() - want
        assert 1e-4 < error.square().mean().sqrt() / want.square().mean().sqrt() < 0.03
        model.merge()


def test_rope_of_llama_3_2_slows_the_slow_rotations():
    found, plain = rope_frequencies(MODELS["llama-3.2-1b"]), 5e5 ** (-torch.arange(0, 64, 2) / 64)
    keep = (8192 * plain[16] / (2 * torch.pi) - 1) / 3  # 1.84 turns: on the ramp from 1 to 4
    want = torch.stack((plain[0], plain[16] * (keep + (1 - keep) / 32), plain[31] / 32))
    torch.testing.assert_close(found[[0, 16, 31]], want)


def test_rope_of_late_positions_is_exact_beside_bf16():
    model, seen = adapted("llama", dtype=torch.bfloat16), []
    model.layers[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[1].rope[0]))
    model(torch.tensor([300 * [5]]))
    want = (torch.arange(300)[:, None] * model.frequencies).cos()
    torch.testing.assert_close(seen[0][0, 0, :, : want.shape[1]], want)


def write_config(directory, family, **changes):
    """A fixture's config.json with other values; ... stands for a field that is absent."""
    raw = json.loads((FIXTURES / family / "config.json").read_text()) | changes
    kept = {name: value for name, value in raw.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


REFUSED = [
    ("llama", dict(model_type="mistral", rope_theta=2e4, partial_rotary_factor=0.5)),
    ("llama", dict(attention_bias=True, mlp_bias=True, hidden_act="gelu", head_dim=7)),
    ("llama", dict(original_max_position_embeddings=64, quantization_config={"bits": 4})),
    ("llama", dict(hidden_size="32", num_hidden_layers=0, vocab_size=10**30, rms_norm_eps=True)),
    ("llama", dict(num_key_value_heads=3, tie_word_embeddings="no", intermediate_size=...)),
    ("qwen2", dict(use_sliding_window=True, layer_types=["sliding_attention"])),
    ("gpt2", dict(activation_function="gelu", scale_attn_by_inverse_layer_idx=True)),
    ("gpt2", dict(scale_attn_weights=False, n_embd=33, n_layer=..., num_attention_heads=8)),
    ("llama", dict(is_causal=False)),
]


@pytest.mark.parametrize("family, changes", REFUSED)
def test_config_of_another_computation_is_refused_by_name(tmp_path, family, changes):
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"config.json.*{name.removeprefix('rms_')}"):
            ModelConfig.from_pretrained(write_config(tmp_path, family, **{name: value}))


def test_config_of_another_rope_is_refused_by_name(tmp_path):
    """4.0 is the high factor, too: the ramp between them would divide by zero."""
    for name, value in {"rope_type": "yarn", "factor": 0, "low_freq_factor": 4.0}.items():
        write_config(tmp_path, "llama", rope_parameters=ROPE | {name: value})
        with pytest.raises(ValueError, match=name):
            ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("parameters", [..., "with theta", "without theta"])
def test_config_may_spell_rope_the_older_way(tmp_path, parameters):
    """Alone, or the same under both names."""
    scaling = {name: value for name, value in ROPE.items() if name != "rope_theta"}
    parameters = {"with theta": ROPE, "without theta": scaling}.get(parameters, ...)
    old = dict(rope_theta=ROPE["rope_theta"], rope_scaling=scaling, rope_parameters=parameters)
    found = ModelConfig.from_pretrained(write_config(tmp_path, "llama", **old))
    assert found == ModelConfig.from_pretrained(FIXTURES / "llama")


DEFAULTS = [
    ("llama", "num_key_value_heads tie_word_embeddings", (2048, 1e-6, 4, False, 1e4)),
    ("qwen2", "rope_parameters", (32768, 1e-6, 1, True, 1e4)),
    ("gpt2", "n_inner tie_word_embeddings", (1024, 1e-5, 4, True, 1e4)),
]
ALWAYS = "max_position_embeddings rms_norm_eps n_positions layer_norm_epsilon "


@pytest.mark.parametrize("family, missing, want", DEFAULTS)
def test_config_without_some_fields_has_hugging_faces_defaults(tmp_path, family, missing, want):
    missing = dict.fromkeys((ALWAYS + missing).split(), ...)
    c = ModelConfig.from_pretrained(write_config(tmp_path, family, **missing))
    found = c.max_position_embeddings, c.norm_eps, c.num_key_value_heads
    assert (*found, c.tie_word_embeddings, c.rope_theta) == want


def test_config_that_is_ambiguous_or_no_file_is_refused(tmp_path):
    text = (FIXTURES / "llama" / "config.json").read_text()
    texts = {
        "twice": text.replace("{", '{"hidden_size": 8, ', 1),
        "Git LFS pointer": LFS,
        "JSON": "",
    }
    for message, text in texts.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json.*{message}"):
            ModelConfig.from_pretrained(tmp_path)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def count(model, trained=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def meta(name, adapters=Adapters(), **changes):
    return Transformer(replace(MODELS[name], **changes), adapters, device="meta", init=False)


def test_models_have_the_published_sizes():
    assert count(meta("llama-3.2-1b")) == 1_235_814_400
    assert count(meta("llama-3.2-3b")) == 3_212_749_824
    assert count(meta("qwen2.5-1.5b")) == 1_543_714_304
    assert count(meta("gpt2")) == 124_439_808
    assert count(meta("smollm2-135m")) == 134_515_008
    thetas = [config.rope_theta for config in MODELS.values() if config.model_type != "gpt2"]
    assert thetas == [5e5, 5e5, 1e6, 1e5, 1e4]
    assert [c.norm_eps for c in MODELS.values()] == [1e-5, 1e-5, 1e-6, 1e-5, 1e-5, 1e-5]


def test_methods_train_as_many_weights_as_the_paper_says():
    """In its percentages the head counts beside the embeddings."""
    tokenizer, models = SimpleNamespace(reserved=(128002, 128003)), {}
    for method in ("cot", "dart", "codi"):
        adapters = dart.METHODS[method].adapters(tokenizer, dart.Options(method=method))
        models[method] = meta("llama-3.2-1b", adapters, tie_word_embeddings=False)
    trained = {method: count(model, trained=True) for method, model in models.items()}
    assert trained == {"cot": 27_262_976, "dart": 44_040_192, "codi": 98_574_336}
    layers = [type(layer).__name__ for layer in models["codi"].projector]
    assert layers == ["Linear", "GELU", "Linear", "LayerNorm"]
    shares = [f"{trained[method] / count(models[method]):.2%}" for method in ("cot", "dart")]
    assert shares == ["1.79%", "2.86%"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_init_weights_draws_each_at_its_scale(family, tied):
    sizes = dict(vocab_size=200, intermediate_size=256, tie_word_embeddings=tied)
    model = Transformer(replace(MODELS["demo"], model_type=family, **sizes))
    scales = {"embed_tokens": 1 / 8 if tied else 0.5, "down_proj.weight": 1 / 16 / 8**0.5}
    scales |= {"o_proj.weight": 1 / 8 / 8**0.5}  # 8: two residual branches in each of four layers
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scale = [value for ending, value in scales.items() if name.endswith(ending)] or [1 / 8]
            assert p.std().item() == pytest.approx(scale[0], rel=0.06), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_lora_and_rem_start_uniform_within_one_by_the_root_of_fan_in():
    adapters = Adapters(lora_rank=64, lora_on=("q_proj", "down_proj"), rem_rank=64)
    for name, p in Transformer(MODELS["demo"], adapters).named_parameters():
        if name.endswith(("lora_a", "r1")):
            bound = (192 if "down_proj" in name else 64) ** -0.5
            assert 0.99 * bound < p.abs().max() <= bound, name


@each_family
@each_pathway
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_training_flops_are_those_that_torch_counts(family, silent, lora_rank):
    """Matrix products to the last one, where all weights are trained. Where the base is frozen,
    the first layer's input needs no gradient: that is what torch counts less."""
    model = Transformer.from_pretrained(FIXTURES / family, Adapters(lora_rank, rem_rank=2))
    with FlopCounterMode(display=False) as counter:
        model.logits(model(IDS[:, :25], silent)[:, [3, 20, 24]]).sum().backward()
    counts = counter.get_flop_counts()["Global"].items()
    counted = sum(flops for op, flops in counts if str(op) in ("aten.mm", "aten.addmm"))
    n, n_kv, layers = 32, 8 * model.config.num_key_value_heads, 3
    pairs = 12 * n * layers * 2 * (25 * 26 / 2)  # of a token and one that it sees
    q, k = n * n + 3 * n, 2 * n if silent else n * n_kv + 3 * n
    saved = 2 * 50 * (q + 2 * k) if lora_rank else 0
    assert model.training_flops([25, 25], 6, silent) - pairs - saved == counted
    second = Transformer.from_pretrained(FIXTURES / family, Adapters(rem_rank=2, rem_is_lora=True))
    plain = Transformer.from_pretrained(FIXTURES / family)
    assert second.training_flops([25, 25], 6) == plain.training_flops([25, 25], 6)


# ------------------------------------------------------------------------------- LoRA, REM, merging


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_projection_is_the_papers_formula(family):
    """W_K (W_R x) + b_K and LoRA's (alpha/r) B A on the same W_R x; without W_R in the CoT pass."""
    k, x = adapted(family).layers[0].self_attn.k_proj, torch.randn(32)
    b = 0 if family == "llama" else k.bias
    w = k.weight + 6 / 3 * k.lora.lora_b @ k.lora.lora_a
    w_r = 3 / 2 * k.rem.r2 @ k.rem.r1.T + torch.eye(32)
    torch.testing.assert_close(k(x), w @ x + b)
    torch.testing.assert_close(k(x, silent=True), w @ (w_r @ x) + b)


@each_family
def test_rem_starts_as_the_identity_and_changes_the_silent_pass_only(family):
    """The other pass stays the same to the last bit."""
    base = logits_of(Transformer.from_pretrained(FIXTURES / family))
    model = Transformer.from_pretrained(FIXTURES / family, ADAPTERS)
    assert torch.equal(logits_of(model), base)
    assert torch.equal(logits_of(model, silent=True), base)
    for name, p in model.named_parameters():
        if ".rem." in name:
            p.data.normal_()
    assert torch.equal(logits_of(model), base)
    assert relative(logits_of(model, silent=True), base) > 1e-2


@each_family
@pytest.mark.parametrize("more", [{}, {"rem_on": ("q_proj", "k_proj", "v_proj")}])
def test_rem_is_on_keys_and_values_or_on_what_one_tuple_says(family, more):
    model = adapted(family, Adapters(rem_rank=2, **more))
    before = {name: p.clone() for name, p in model.named_parameters()}
    want = logits_of(model, silent=True)
    after = dict(model.merge().named_parameters())
    changed = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(more.get("rem_on", ("k_proj", "v_proj")))
    assert relative(logits_of(model), want) <= 1e-5


def test_gradients_reach_lora_and_in_the_silent_pass_rem_but_not_the_base():
    model = adapted("qwen2")
    for silent, trained in ((False, {"lora"}), (True, {"lora", "rem"})):
        model(IDS, silent).square().mean().backward()
        for name, p in model.named_parameters():
            reached = p.grad is not None and p.grad.abs().max() > 0
            assert reached == bool(trained & {*name.split(".")}), name


@each_family
@each_pathway
@pytest.mark.parametrize("rem_is_lora", [False, True])
def test_merged_is_the_unmerged_pathway(family, silent, rem_is_lora):
    """An ordinary model of its family. Merging again changes nothing, or is refused."""
    model = adapted(family, replace(ADAPTERS, rem_is_lora=rem_is_lora))
    want = logits_of(model, silent=silent)
    assert relative(logits_of(model, silent=not silent), want) > 1e-2
    once = {name: p.clone() for name, p in model.merge(silent).named_parameters()}
    assert relative(logits_of(model, silent=silent), want) <= 1e-5
    assert once.keys() == dict(Transformer(model.config).named_parameters()).keys()
    model.merge(silent)
    assert all(torch.equal(once[name], p) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match=f"merged for the {'silent' if silent else 'cot'}"):
        model.merge(not silent)


def test_adapters_stay_in_fp32_beside_bf16_weights():
    """In the merged model only what turns positions, and the projector."""
    adapters = replace(ADAPTERS, new_embeddings=1, projector=True)
    model = adapted("llama", adapters, dtype=torch.bfloat16)
    added = {"lora", "rem", "projector", "new_embeddings"}
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if added & {*name.split(".")} else torch.bfloat16), name
    assert model(IDS, silent=True).dtype == torch.bfloat16
    assert {p.dtype for p in model.merge().layers.parameters()} == {torch.bfloat16}
    assert model.frequencies.dtype == model.projector[0].weight.dtype == torch.float32


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_on_loras_input_has_the_rate_that_was_given(rate):
    adapters = Adapters(lora_rank=32, lora_alpha=32, lora_dropout=rate)
    lora = adapted("llama", adapters).train().layers[0].self_attn.q_proj.lora
    lora.lora_a.data, lora.lora_b.data = torch.eye(32), torch.eye(32)
    y = lora(torch.ones(2000, 32))
    kept = (y != 0).float()
    assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / y.numel()) ** 0.5
    torch.testing.assert_close(y, kept / (1 - rate))


@each_pathway
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_dropout_draws_another_mask_each_call_in_training(silent, lora_rank):
    """LoRA's in both passes; that of a second LoRA instead of REM in the silent one."""
    adapters = Adapters(lora_rank, lora_dropout=0.5, rem_rank=4, rem_is_lora=not lora_rank)
    model = adapted("llama", adapters)
    assert torch.equal(logits_of(model, silent=silent), logits_of(model, silent=silent))
    model.train()
    same = torch.equal(logits_of(model, silent=silent), logits_of(model, silent=silent))
    assert same == (lora_rank == 0 and not silent)


# ----------------------------------------------------- the KV cache, and what makes a pass cheaper


@torch.no_grad()
@each_family
@each_pathway
def test_cache_decodes_rows_of_any_lengths_as_a_pass_without_it(family, silent):
    """Rows padded on the right; each goes on at its own position, over what the padding left."""
    model, lengths, ids = adapted(family), torch.tensor([5, 17, 11]), IDS.view(4, 20)[:3]
    ids = torch.cat((ids, ids), dim=1)[:, :23]
    want, cache = model(ids, silent), KVCache(model, 3, 23)
    prompts = ids[:, :17].where(torch.arange(17) < lengths[:, None], 0)
    found = [model(prompts, silent, cache=cache)[range(3), lengths - 1]]
    for step in range(6):
        at = (lengths + step)[:, None]
        found.append(model(ids.gather(1, at), silent, at, cache)[:, 0])
    for row, length in enumerate(lengths):
        assert relative(torch.stack(found)[:, row], want[row, length - 1 : length + 6]) <= 1e-5


@each_family
@each_pathway
def test_gradients_flow_through_the_cache(family, silent):
    """Three passes, of 10, 1 and 29 tokens, each behind the others, have the gradients of one."""
    model = adapted(family, Adapters(rem_rank=2))

    def gradients(hidden):
        grads = torch.autograd.grad(hidden.square().mean(), model.parameters(), allow_unused=True)
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    want, cache = gradients(model(IDS, silent)), KVCache(model, 2, 40)
    parts = [model(IDS[:, :10], silent, cache=cache)]
    parts.append(model(IDS[:, 10:11], silent, torch.tensor([[10]]), cache))
    parts.append(model(IDS[:, 11:], silent, cache=cache))
    assert relative(gradients(torch.cat(parts, dim=1)), want) <= 1e-5


def test_a_row_longer_than_the_models_positions_is_refused():
    model = Transformer(replace(MODELS["demo"], max_position_embeddings=8))
    cache = KVCache(model, 1, 10**9)  # takes only what it can use
    model(IDS[:1, :8] % 59, cache=cache)
    for ids, cache in ((IDS[:, :9], None), (IDS[:1, :1], cache)):
        with pytest.raises(ValueError, match="9 tokens, but the model has 8 positions"):
            model(ids % 59, cache=cache)


EVERY = Adapters(lora_rank=4, rem_rank=4, lora_on=("q_proj", "o_proj", "down_proj"))
CAPTURE = torch.tensor([0, 1, 1]), torch.tensor([18, 10, 19])


def outputs_and_gradients(model, silent, first_needed=0, ids=IDS[:, :20]):
    """The last five hidden states, those captured, and the gradient of both."""
    torch.manual_seed(5)  # of dropout
    model.zero_grad()
    hidden, states = model(ids, silent, capture=CAPTURE, first_needed=first_needed)
    hidden = hidden[:, 15 - first_needed :]
    (hidden.square().mean() + states.square().mean()).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return hidden.detach(), states.detach(), torch.cat(gradients)


def assert_same(found, want):
    for ours, theirs in zip(found, want, strict=True):
        assert ours.shape == theirs.shape and relative(ours, theirs) <= 1e-5


@each_family
@each_pathway
def test_first_needed_changes_no_number(family, silent):
    """Nor what a cache holds."""
    model = adapted(family, EVERY)
    want = outputs_and_gradients(model, silent)
    assert_same(outputs_and_gradients(model, silent, first_needed=10), want)
    cache = KVCache(model, 2, 40)
    model(IDS[:, :20], silent, cache=cache, first_needed=15)
    found = model(IDS[:, 20:39], silent, cache=cache, first_needed=10)
    found = torch.cat((found, model(IDS[:, 39:], silent, torch.tensor([[39], [39]]), cache)), dim=1)
    assert relative(found, model(IDS, silent)[:, 30:]) <= 1e-5


@each_family
@each_pathway
def test_activation_checkpointing_changes_no_number(family, silent):
    model, entered = adapted(family, replace(EVERY, lora_dropout=0.3)).train(), []
    want = outputs_and_gradients(model, silent, first_needed=10)
    model.activation_checkpointing = True
    model.layers[0].register_forward_pre_hook(lambda *_: entered.append(True))
    assert_same(outputs_and_gradients(model, silent, first_needed=10), want)
    assert len(entered) == 2  # once more in the backward pass


def test_compiled_layers_change_no_number(monkeypatch):
    """A second length has no graph of its own."""
    graphs, lengths = [], (IDS[:, :20] % 59, IDS[:, :33] % 59)
    backend = lambda graph, _: graphs.append(graph) or graph
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    model = Transformer(replace(MODELS["demo"], num_hidden_layers=1), EVERY)
    want = [outputs_and_gradients(model, True, 10, ids) for ids in lengths]
    model.compile_layers()
    for ids, plain in zip(lengths, want, strict=True):
        assert_same(outputs_and_gradients(model, True, 10, ids), plain)
        assert len(graphs) == 1


def test_new_embedding_is_the_mean_of_all_and_is_never_predicted():
    """Several, which must differ, are drawn as the embeddings are spread."""
    adapters = Adapters(lora_rank=1, new_embeddings=1, train_new_embeddings=True)
    model, ids = adapted("gpt2", adapters), torch.tensor([[1, 96, 5]])
    torch.testing.assert_close(model.new_embeddings[0], model.embed_tokens.mean(dim=0))
    want = torch.stack((model.embed_tokens[1], model.new_embeddings[0], model.embed_tokens[5]))
    assert torch.equal(model.embed(ids)[0], want)
    assert torch.equal(model(ids), model(want[None]))  # ids or embeddings
    assert logits_of(model, ids).shape == (1, 3, 96)
    model(ids).square().mean().backward()
    assert model.new_embeddings.grad.abs().max() > 0
    several = adapted("gpt2", Adapters(new_embeddings=1000))
    new, old = several.new_embeddings, several.embed_tokens
    assert torch.equal(several.embed(torch.tensor([96 + 7])), new[7:8])
    torch.testing.assert_close(new.mean(dim=0), old.mean(dim=0), rtol=0, atol=0.1)
    torch.testing.assert_close(new.std(dim=0), old.std(dim=0), rtol=0.15, atol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_state_goes_to_another_model(whole):
    """Without the frozen base, unless it is `whole`; with new embeddings that are frozen, too."""
    adapters = replace(ADAPTERS, new_embeddings=2, projector=True)
    model, other = adapted("qwen2", adapters), adapted("qwen2", adapters)
    added = {"lora", "rem", "projector", "new_embeddings"}
    names = {name for name, _ in model.named_parameters() if whole or added & {*name.split(".")}}
    assert model.state(whole).keys() == names
    for name in names:
        dict(model.named_parameters())[name].data.normal_()
    other.load_state(model.state(whole), "a.safetensors", whole)
    assert torch.equal(logits_of(other, IDS + 2, True), logits_of(model, IDS + 2, True))


def test_state_that_does_not_fit_is_refused():
    model, name = adapted("qwen2"), "layers.0.self_attn.q_proj.lora.lora_a"
    state = model.state()
    bad = {"more and 0": state | {"more": torch.ones(1)}}
    bad[f"{name} and 0"] = {key: tensor for key, tensor in state.items() if key != name}
    bad[f"{name} has shape"] = state | {name: torch.ones(3)}
    bad[f"{name} is not finite"] = state | {name: torch.ones(3, 32) / 0}
    for message, tensors in bad.items():
        with pytest.raises(ValueError, match=f"a.safetensors: {message}"):
            model.load_state(tensors, "a.safetensors")


# --------------------------------------------------------------------------------- loading, export


def tensors_of(name):
    paths = (FIXTURES / name).glob("model*.safetensors")
    return {key: tensor for path in paths for key, tensor in load_file(path).items()}


def load(directory, name, tensors):
    """The model of a fixture's config.json and these tensors, in one file."""
    shutil.copy(FIXTURES / name / "config.json", directory)
    save_file(tensors, directory / "model.safetensors")
    return Transformer.from_pretrained(directory)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("model.layers.1.mlp.up_proj.weight", None, "is missing"),
        ("lm_head.weight", None, "is missing"),
        ("model.layers.3.mlp.up_proj.weight", torch.ones(48, 32), "has no place"),
        ("model.norm.weight", torch.ones(31), "has shape"),
        ("model.norm.weight", torch.ones(32).int(), "is torch.int32"),
        ("model.norm.weight", torch.arange(32) / 0, "is not finite"),
    ],
)
def test_loading_names_a_tensor_that_does_not_fit(tmp_path, name, value, message):
    tensors = tensors_of("llama") | {name: value}
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match=f"{tmp_path}.*{name.removeprefix('model.')}.* {message}"):
        load(tmp_path, "llama", tensors)


@pytest.mark.parametrize("family, prefix", [("qwen2", "model."), ("gpt2", "transformer.")])
def test_loading_takes_a_tied_head_under_either_name(tmp_path, family, prefix):
    """Or under both, as long as they say the same."""
    name = {"qwen2": "embed_tokens.weight", "gpt2": "wte.weight"}[family]
    want, tensors = logits_of(Transformer.from_pretrained(FIXTURES / family)), tensors_of(family)
    table = tensors.pop(prefix + name)
    for both in ({prefix + name}, {"lm_head.weight"}, {prefix + name, "lm_head.weight"}):
        stored = {key: table.clone() for key in both}
        assert torch.equal(logits_of(load(tmp_path, family, tensors | stored)), want)
    for other in ("lm_head.weight", name):
        with pytest.raises(ValueError, match="is there twice"):
            load(tmp_path, family, tensors | {prefix + name: table, other: table + 1e-3})


def test_loading_takes_gpt2_without_its_prefix_and_ignores_its_masks(tmp_path):
    tensors = {name.removeprefix("transformer."): t for name, t in tensors_of("gpt2").items()}
    model = load(tmp_path, "gpt2", tensors | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)})
    want = Transformer.from_pretrained(FIXTURES / "gpt2")
    assert torch.equal(logits_of(model), logits_of(want)) and model.base_digest == want.base_digest
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # as Llama 2's have
    load(tmp_path, "llama", tensors_of("llama") | old)


def test_loading_makes_one_digest_of_shards_and_of_a_single_file(tmp_path):
    """It changes with one bit."""
    one = load(tmp_path, "llama-shards", tensors_of("llama-shards")).base_digest
    assert one == Transformer.from_pretrained(FIXTURES / "llama-shards").base_digest
    flipped = tensors_of("llama-shards")
    flipped["model.layers.2.mlp.up_proj.weight"].view(torch.int32)[3, 4] ^= 1
    assert load(tmp_path, "llama-shards", flipped).base_digest != one
    x = torch.zeros(2, 3).half()
    assert len({tensor_digest(x), tensor_digest(x.T), tensor_digest(x.bfloat16())}) == 3


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model-00002"])
@pytest.mark.parametrize("end", [0, 4, -3, b"[]", b"\xff", b'{"weight_map": {"a": "../b"}}', None])
def test_loading_names_a_file_that_is_cut_off_or_broken_or_missing(tmp_path, file, end):
    shutil.copytree(FIXTURES / "llama-shards", tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob(f"{file}*")
    if end is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:end] if isinstance(end, int) else end)
    with pytest.raises(FileNotFoundError if end is None else ValueError, match=file):
        Transformer.from_pretrained(tmp_path)


def test_loading_knows_a_pointer_and_an_index_that_lists_a_tied_head(tmp_path):
    shutil.copytree(FIXTURES / "llama-shards", tmp_path, dirs_exist_ok=True)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["lm_head.weight"] = sorted(raw["weight_map"].values())[0]
    index.write_text(json.dumps(raw))
    want = logits_of(Transformer.from_pretrained(FIXTURES / "llama-shards"))
    assert torch.equal(logits_of(Transformer.from_pretrained(tmp_path)), want)
    (tmp_path / "model.safetensors").write_text(LFS)
    with pytest.raises(ValueError, match="model.safetensors: a Git LFS pointer, not the file"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="the adapter must be merged first"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_read_back_as_it_was(tmp_path, name, dtype):
    model, tokens = adapted(name, dtype=getattr(torch, dtype)), {"eos_token_id": 8}
    with pytest.raises(ValueError, match="only a merged model"):
        export_hf(model, tmp_path)
    assert export_hf(model.merge(), tmp_path, tokens=tokens) == count(model)
    again = Transformer.from_pretrained(tmp_path, dtype=model.compute_dtype)
    assert torch.equal(logits_of(again), logits_of(model)) and again.config == model.config
    stored = {key: t.dtype for key, t in load_file(tmp_path / "model.safetensors").items()}
    assert stored == dict.fromkeys(tensors_of(name), model.compute_dtype)
    assert b'"__metadata__":{"format":"pt"}' in (tmp_path / "model.safetensors").read_bytes()
    raw, more = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json")))
    assert raw["torch_dtype"] == dtype and raw["eos_token_id"] == more["eos_token_id"] == 8


@pytest.mark.parametrize("name", NAMES)
def test_export_is_an_ordinary_model_of_transformers(tmp_path, name):
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    model = adapted(name)
    want = logits_of(model, silent=True)
    export_hf(model.merge(), tmp_path)
    theirs, about = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(about.values())  # missing, unexpected, ...
    assert relative(theirs(IDS).logits, want) <= 1e-5


@pytest.mark.parametrize("name", ["qwen2", "qwen2-untied", "gpt2", "gpt2-untied"])
@pytest.mark.parametrize("st_id", [96, 5])
@pytest.mark.parametrize("trained", [False, True])
def test_export_puts_a_new_embedding_at_its_id(tmp_path, name, st_id, trained):
    """After the vocabulary or within it. It scores the mean of all tokens: where it is not the mean
    embedding, a tied head becomes one of its own."""
    model, ids = adapted(name, Adapters(new_embeddings=1)), torch.tensor([[1, 7, 96, 96, 8]])
    if trained:
        model.new_embeddings.data.fill_(3.0)
    want = logits_of(model, ids)
    export_hf(model.merge(), tmp_path, st_id)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings == (model.config.tie_word_embeddings and not trained)
    found = logits_of(again, ids.where(ids < 96, st_id))
    mean = want.mean(dim=-1, keepdim=True)
    want = torch.cat((want[..., :st_id], mean, want[..., st_id + 1 :]), dim=-1)
    assert relative(found, want) <= 1e-5
