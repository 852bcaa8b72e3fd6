"""model.py: parity with Hugging Face transformers, REM, LoRA, merging, the KV cache, loading. CPU, no network."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from model import MODELS, Adapters, KVCache, ModelConfig, Transformer, dropout, rope_frequencies, rope_table, rotate

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("llama", "qwen2", "gpt2")
MODEL_FIXTURES = (*FAMILIES, "llama-shards", "qwen2-untied", "gpt2-untied")
ADAPTERS = Adapters(lora_rank=3, lora_alpha=6, rem_rank=2, rem_alpha=3)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def expected(family):
    return load_file(FIXTURES / family / "expected.safetensors")


def adapted(family, adapters=ADAPTERS, seed=0):
    """A fixture's model with adapters that are not zero any more."""
    torch.manual_seed(seed)
    model = Transformer.from_pretrained(FIXTURES / family, adapters)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("lora_b", "r2")):
                p.normal_(0, 0.1)
    return model.eval()


# ------------------------------------------------------------------------------------- parity with transformers


@pytest.mark.parametrize("family", MODEL_FIXTURES)
def test_logits_and_every_layer_agree_with_transformers(family):
    want = expected(family)
    model = Transformer.from_pretrained(FIXTURES / family)
    assert want["ids"].shape[1] >= 300
    with torch.no_grad():
        hidden, states = model(want["ids"], at=(want["positions"] * 0, want["positions"]))
        logits = model.logits(hidden)[0, want["positions"]]
    assert relative(logits, want["logits"]) <= 1e-5
    for ours, theirs in zip(states, want["states"], strict=True):
        assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("family", MODEL_FIXTURES)
def test_bf16_agrees_within_what_bf16_allows(family):
    want = expected(family)
    model = Transformer.from_pretrained(FIXTURES / family, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model.logits(model(want["ids"])).float()[0, want["positions"]]
    rms = ((logits - want["logits"]).square().mean() / want["logits"].square().mean()).sqrt()
    assert 1e-4 < rms < 0.03  # 2^-9 a rounding, some tens of roundings on the way; and it really is bf16


def test_the_fixtures_cover_tied_and_untied_heads_and_four_sizes_of_groups():
    configs = [ModelConfig.from_pretrained(FIXTURES / family) for family in MODEL_FIXTURES]
    assert {c.num_attention_heads // c.num_key_value_heads for c in configs} == {1, 2, 3, 4}
    assert {(c.model_type, c.tie_word_embeddings) for c in configs} == {(f, tied) for f in FAMILIES for tied in (True, False)}


def test_norms_and_rope_are_computed_in_fp32_on_bf16_input():
    """One rounding, at the end: no further from the fp32 result than half a bf16 step."""
    model = Transformer.from_pretrained(FIXTURES / "llama", dtype=torch.bfloat16)
    torch.manual_seed(0)
    x = torch.randn(1, 4, 300, 8).bfloat16()
    rope = rope_table(torch.arange(300)[None], model.frequencies)
    torch.testing.assert_close(rotate(x, rope), rotate(x.float(), rope).bfloat16(), rtol=0, atol=0)
    x = torch.randn(7, 32).bfloat16()
    for norm in (model.norm, Transformer.from_pretrained(FIXTURES / "gpt2", dtype=torch.bfloat16).norm):
        torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), rtol=0, atol=0)
    assert model.frequencies.dtype == torch.float32 and model.merge().frequencies.dtype == torch.float32


def test_rotation_is_that_of_complex_numbers():
    x, frequencies = torch.randn(2, 3, 7, 8), torch.rand(4)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [5, 9, 1, 0, 3, 300, 2]])
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * (positions[:, None, :, None] * frequencies))
    want = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x, rope_table(positions, frequencies)), want, rtol=1e-5, atol=1e-5)


def test_the_fixture_would_notice_a_missing_rope_scaling():
    want = expected("llama")
    model = Transformer.from_pretrained(FIXTURES / "llama")
    model.frequencies = rope_frequencies(dataclasses.replace(model.config, rope_scaling=None))
    with torch.no_grad():
        logits = model.logits(model(want["ids"]))[0, want["positions"]]
    assert relative(logits, want["logits"]) > 1e-2


def test_rope_frequencies_of_llama_3_2():
    """Fast rotations stay, slow ones are 32 times slower, between them is a ramp (worked out by hand for three)."""
    frequencies = rope_frequencies(MODELS["llama-3.2-1b"])
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.equal(frequencies[0], torch.tensor(1.0))  # 8192 / (2 pi) = 1304 turns
    assert frequencies[31] == pytest.approx(plain[31].item() / 32, rel=1e-6)  # 0.004 turns
    turns = 8192 * plain[16].item() / (2 * torch.pi)  # 1.84: on the ramp from 1 to 4
    ramp = (turns - 1) / 3
    assert 0.2 < ramp < 0.4
    assert frequencies[16] == pytest.approx(plain[16].item() * (ramp + (1 - ramp) / 32), rel=1e-5)


# --------------------------------------------------------------------------------------- the paper's own integers


def count(model, *endings):
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(endings))


def test_parameter_counts_of_the_paper():
    adapters = Adapters(lora_rank=128, rem_rank=128)
    model = Transformer(MODELS["llama-3.2-1b"], adapters, device="meta", random_init=False)
    assert count(model, "lora_a", "lora_b") == 27_262_976
    assert count(model, "r1", "r2") == 16_777_216
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 44_040_192
    base = sum(p.numel() for p in model.parameters()) - trained
    assert base == 1_235_814_400
    untied = base + 128_256 * 2_048  # the paper's 2.86 % and 1.79 % count the head a second time
    assert f"{100 * trained / (untied + trained):.2f} {100 * 27_262_976 / (untied + 27_262_976):.2f}" == "2.86 1.79"


@pytest.mark.parametrize(
    "name, parameters", [("llama-3.2-3b", 3_212_749_824), ("qwen2.5-1.5b", 1_543_714_304), ("gpt2", 124_439_808)]
)
def test_parameter_counts_of_the_other_models(name, parameters):
    model = Transformer(MODELS[name], device="meta", random_init=False)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("adapters", [Adapters(rem_rank=2), Adapters(lora_rank=3, rem_rank=2)])
def test_training_flops_are_those_that_torch_counts(family, silent, adapters):
    """Matrix products as they are run. In the first layer a frozen base passes no gradient to its input, and with LoRA there
    its three projections and what stands before them save one product each: those are taken off here."""
    model = Transformer.from_pretrained(FIXTURES / family, adapters)
    if adapters.lora_rank == 0:
        model.requires_grad_(True)
    model.be_plain()
    ids, learned = expected(family)["ids"][:, :50].view(2, 25), torch.tensor([3, 20, 24])
    with FlopCounterMode(display=False) as counter:
        model.logits(model(ids, silent=silent)[:, learned]).sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = model.training_flops([25, 25], 0) - model.training_flops([50], 0)  # linear in the tokens but for the pairs
    c = model.config
    per_pair = 12 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    assert attention == per_pair * (2 * 25 * 26 / 2 - 50 * 51 / 2)
    want = model.training_flops([25, 25], 6, silent) - per_pair * 25 * 26
    if adapters.lora_rank:
        n, kv, q = c.hidden_size, c.num_key_value_heads * c.head_dim, c.num_attention_heads * c.head_dim
        saved = n * q + 3 * n  # q: the gradient of its input through W and through A
        saved += 2 * (2 * n if silent else n * kv + 3 * n)  # k, v: of REM's input through R1, or as q
        assert 2 * 50 * saved >= want - counted >= 0
    else:
        assert counted == want


# ------------------------------------------------------------------------------------------------- REM and LoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_rem_and_lora_start_as_the_identity(family):
    ids = expected(family)["ids"][:, :40]
    base = Transformer.from_pretrained(FIXTURES / family)
    model = Transformer.from_pretrained(FIXTURES / family, ADAPTERS).eval()
    with torch.no_grad():
        assert torch.equal(model(ids), base(ids))
        assert torch.equal(model(ids, silent=True), base(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_rem_changes_the_silent_pathway_only(family):
    model, ids = adapted(family), expected(family)["ids"][:, :40]
    with torch.no_grad():
        before, silent = model(ids), model(ids, silent=True)
        for name, p in model.named_parameters():
            if name.endswith(("r1", "r2")):
                p.normal_()
        assert torch.equal(model(ids), before)
        assert relative(model(ids, silent=True), silent) > 1e-3


def test_rem_is_the_papers_formula():
    """W_R = (alpha/d) R2 R1^T + I before W_K (column convention of Section 3.2), against its literal matrix form."""
    model = adapted("llama")
    rem, x = model.layers[0].self_attn.rem_k, torch.randn(5, 32)
    w_r = (3 / 2) * rem.r2 @ rem.r1.T + torch.eye(32)
    torch.testing.assert_close(rem(x, lambda x: x), (w_r @ x.T).T)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_r2_first_and_then_r1(family):
    model, ids = Transformer.from_pretrained(FIXTURES / family, ADAPTERS), expected(family)["ids"][:, :20]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rems = [rem for layer in model.layers for rem in (layer.self_attn.rem_k, layer.self_attn.rem_v)]
    for r1_moves in (False, True):
        optimizer.zero_grad()
        model.logits(model(ids, silent=True)).square().mean().backward()
        for rem in rems:
            assert rem.r2.grad.abs().max() > 0
            assert (rem.r1.grad.abs().max() > 0) == r1_moves
        optimizer.step()


def test_the_plain_pathway_gives_rem_no_gradient_and_lora_freezes_the_base():
    model = adapted("llama")
    model(expected("llama")["ids"][:, :20]).square().mean().backward()
    for name, p in model.named_parameters():
        is_rem, is_lora = name.endswith(("r1", "r2")), name.endswith(("lora_a", "lora_b"))
        assert (p.grad is not None) == is_lora, name
        assert p.requires_grad == (is_rem or is_lora), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("silent", [True, False])
def test_merged_equals_unmerged_and_merging_twice_changes_nothing(family, silent):
    model, ids = adapted(family), expected(family)["ids"][:, :300]
    biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith("bias")}
    with torch.no_grad():
        before = model.logits(model(ids, silent=silent))
        model.merge(silent)
        assert relative(model.logits(model(ids, silent=silent)), before) <= 1e-5
        once = {name: p.clone() for name, p in model.named_parameters()}
        model.merge(silent)
    base = {name for name, _ in Transformer.from_pretrained(FIXTURES / family).named_parameters()}
    assert set(once) == base  # an ordinary model of its family: no parameter more
    assert all(torch.equal(once[name], p) for name, p in model.named_parameters())
    assert all(torch.equal(biases[name], once[name]) for name in biases)
    with pytest.raises(ValueError, match="merged for the"):
        model.merge(not silent)


def test_merging_rem_touches_keys_and_values_only():
    model = adapted("gpt2", Adapters(rem_rank=2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge()
    changed = {name.split(".")[-2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"k_proj", "v_proj"}


def test_adapters_stay_in_fp32_and_small_updates_are_not_lost():
    model = Transformer.from_pretrained(FIXTURES / "llama", ADAPTERS, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith(("lora_a", "lora_b", "r1", "r2")) else torch.bfloat16), name
    a = model.layers[0].self_attn.q_proj.lora.lora_a
    before = a.detach().clone()
    with torch.no_grad():
        a += 1e-5
    assert not torch.equal(a, before) and model(torch.tensor([[1, 2]]), silent=True).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------ KV cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("silent", [True, False])
def test_decoding_with_the_cache_equals_decoding_without(family, silent):
    """Three rows of different lengths, padded on the right: every row continues at its own position."""
    model, torch_ids = adapted(family), expected(family)["ids"][0]
    lengths, new = (5, 17, 11), 6
    rows = [torch_ids[i * 30 : i * 30 + n + new] for i, n in enumerate(lengths)]
    prompts = torch.zeros(3, max(lengths), dtype=torch.long)
    for prompt, row, n in zip(prompts, rows, lengths, strict=True):
        prompt[:n] = row[:n]
    cache = KVCache(model.config, 3, max(lengths) + new)
    with torch.no_grad():
        got = [model(prompts, silent=silent, cache=cache)[range(3), [n - 1 for n in lengths]]]
        for step in range(new):
            token = torch.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])[:, None]
            position = torch.tensor(lengths)[:, None] + step
            got.append(model(token, silent=silent, cache=cache, positions=position)[:, 0])
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            want = model(row[None], silent=silent)[0, n - 1 :]
            assert relative(torch.stack(got)[:, b], want) <= 1e-5


def test_several_tokens_at_once_into_the_cache_equal_one_after_the_other():
    model, ids = adapted("llama"), expected("llama")["ids"][:, :24]
    cache = KVCache(model.config, 1, 24)
    with torch.no_grad():
        model(ids[:, :10], cache=cache)
        got = model(ids[:, 10:], cache=cache, positions=torch.arange(10, 24)[None])
        assert relative(got, model(ids)[:, 10:]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_right_of_a_token_does_not_matter(family):
    model, ids = adapted(family), expected(family)["ids"][:, :30]
    other = ids.clone()
    other[:, 20:] = 7
    with torch.no_grad():
        a, b = model(ids, silent=True)[:, :20], model(other, silent=True)[:, :20]
        assert relative(a, b) <= 1e-6
        assert relative(a, model(ids[:, :20], silent=True)) <= 1e-5


def test_states_at_an_index_are_the_layers_outputs_there():
    model, ids = adapted("llama"), expected("llama")["ids"][:, :60].view(3, 20)
    outputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        hidden, states = model(ids, silent=True, at=torch.tensor([[0, 1, 2], [3, 19, 0]]))
    assert states.shape == (3, 3, 32)
    for layer, out in enumerate(outputs):
        for row, index in enumerate((3, 19, 0)):
            assert torch.equal(states[layer, row], out[row, index])
    torch.testing.assert_close(model.norm(states[-1]), hidden[range(3), [3, 19, 0]])


# ---------------------------------------------------------------------------------------------------- extra rows


def test_an_extra_row_is_the_mean_embedding_and_is_never_predicted():
    model = Transformer.from_pretrained(FIXTURES / "gpt2", Adapters(extra_rows=1, lora_rank=1))
    torch.testing.assert_close(model.extra_rows[0], model.embed_tokens.mean(0))
    ids = torch.tensor([[1, 96, 5]])
    want = torch.stack([model.embed_tokens[1], model.extra_rows[0], model.embed_tokens[5]])
    torch.testing.assert_close(model.embed(ids)[0], want)
    assert torch.equal(model(ids), model(want[None]))  # ids or their embeddings, the positions are added to both
    assert model.logits(model(ids)).shape == (1, 3, 96)
    assert not model.extra_rows.requires_grad and "extra_rows" in model.adapter_state()
    trained = Transformer.from_pretrained(FIXTURES / "gpt2", Adapters(extra_rows=1, train_extra_rows=True, lora_rank=1))
    trained(ids).sum().backward()
    assert trained.extra_rows.grad.abs().max() > 0


def test_adapter_state_goes_to_a_file_and_back(tmp_path):
    model = adapted("qwen2")
    save_file(model.adapter_state(), tmp_path / "a.safetensors")
    other = Transformer.from_pretrained(FIXTURES / "qwen2", ADAPTERS)
    other.load_adapter_state(tmp_path / "a.safetensors")
    ids = expected("qwen2")["ids"][:, :20]
    with torch.no_grad():
        assert torch.equal(other.eval()(ids, silent=True), model(ids, silent=True))
    with pytest.raises(ValueError, match="other adapters"):
        Transformer.from_pretrained(FIXTURES / "qwen2", Adapters(lora_rank=3)).load_adapter_state(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has the shape"):
        wide = Transformer.from_pretrained(FIXTURES / "qwen2", dataclasses.replace(ADAPTERS, lora_rank=4))
        wide.load_adapter_state(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------------- configuration


def write_config(directory, family, **changes):
    raw = json.loads((FIXTURES / family / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))
    return directory


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("llama", "model_type", "mistral"),
        ("llama", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
        ("llama", "rope_scaling", [1]),
        ("llama", "rope_theta", 20000.0),
        ("llama", "original_max_position_embeddings", 64),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "hidden_act", "gelu"),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "hidden_size", "absent"),
        ("llama", "num_hidden_layers", 0),
        ("llama", "hidden_size", "32"),
        ("llama", "vocab_size", 10**30),
        ("llama", "rms_norm_eps", 10**400),
        ("llama", "rms_norm_eps", True),
        ("llama", "num_key_value_heads", 3),
        ("llama", "tie_word_embeddings", "false"),
        ("llama", "partial_rotary_factor", 0.5),
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("gpt2", "activation_function", "gelu"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "n_embd", 33),
    ],
)
def test_a_configuration_that_would_compute_something_else_is_refused_by_name(tmp_path, family, field, value):
    names = {"rope_parameters": "rope type", "rope_scaling": "rope|not a model", "rms_norm_eps": "norm_eps"}
    with pytest.raises(ValueError, match="config.json.*" + f"({names.get(field, field)})"):
        ModelConfig.from_pretrained(write_config(tmp_path, family, **{field: value}))


def test_the_older_spelling_of_rope_in_a_configuration(tmp_path):
    new = ModelConfig.from_pretrained(FIXTURES / "llama")
    rope = json.loads((FIXTURES / "llama" / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    assert ModelConfig.from_pretrained(write_config(tmp_path, "llama", rope_theta=theta)) == new  # said twice, the same
    old = write_config(tmp_path, "llama", rope_parameters="absent", rope_theta=theta, rope_scaling=rope)
    assert ModelConfig.from_pretrained(old) == new


def test_factors_of_the_rope_must_be_in_order(tmp_path):
    rope = json.loads((FIXTURES / "llama" / "config.json").read_text())["rope_parameters"]
    with pytest.raises(ValueError, match="low_freq_factor is not below"):
        ModelConfig.from_pretrained(write_config(tmp_path, "llama", rope_parameters=rope | {"low_freq_factor": 4.0}))


def test_a_configuration_with_zeros_or_nulls(tmp_path):
    for field, message in (("num_attention_heads", "config.json"), ("rope_parameters", "factor is 0")):
        value = 0 if field != "rope_parameters" else {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1,
                                                      "high_freq_factor": 4, "original_max_position_embeddings": 64}  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_pretrained(write_config(tmp_path, "llama", **{field: value}))
    heads = ModelConfig.from_pretrained(write_config(tmp_path, "llama", num_key_value_heads=None)).num_key_value_heads
    assert heads == 4


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"model_type": 3}', '{"model_type": "llama"}', "\xff"])
def test_a_broken_configuration_is_a_value_error_with_its_path(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        Transformer.from_pretrained(tmp_path)
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
        (lambda t: t.update({"model.layers.9.extra": torch.zeros(1)}), "layers.9.extra has no place"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), "norm.weight has the shape"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}), "not a floating-point"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    tensors = load_file(FIXTURES / "llama" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    whole = (FIXTURES / "llama" / "model.safetensors").read_bytes()
    for size in (0, 4, 1000, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Transformer.from_pretrained(tmp_path)


def read_index(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index.pop("model.norm.weight"), r"index.json: model.norm.weight is in model-0000\d-of-00003"),
        (lambda index: index.update({"model.norm.bias": index["model.norm.weight"]}), "index.json: model.norm.bias is in"),
        (lambda index: index.update({"x": "../llama/model.safetensors"}), "files beside it.*Invalid name"),
        (lambda index: index.update({"x": ".."}), "no such file"),
        (lambda index: index.update({"x": "model-00004-of-00004.safetensors"}), "model-00004-of-00004.safetensors: no such"),
        (lambda index: index.update({"x": 3}), "files beside it"),
        (lambda index: index.clear(), "model.embed_tokens.weight is missing"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_named(tmp_path, change, message):
    shutil.copytree(FIXTURES / "llama-shards", tmp_path, dirs_exist_ok=True)
    index = read_index(tmp_path)
    assert len(set(index.values())) == 3
    change(index)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "\xff", "[" * 100000])
def test_a_broken_index_is_named(tmp_path, text):
    shutil.copytree(FIXTURES / "llama-shards", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="index.json: not an index"):
        Transformer.from_pretrained(tmp_path)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    shutil.copy(FIXTURES / "gpt2" / "config.json", tmp_path)
    tensors = load_file(FIXTURES / "gpt2" / "model.safetensors")
    save_file({**tensors, "wte.weight": tensors["transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="wte.weight is there with and without"):
        Transformer.from_pretrained(tmp_path)


MEASURE_LOADING = """
import re, sys, torch, model
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
loaded = model.Transformer.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((peak() - before) / sum(p.numel() * p.element_size() for p in loaded.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory where Linux has it")
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, dtype):
    """The peak of a whole process over what it had before, by the model's size: 167 MB in fp32, two shards."""
    config = {"model_type": "llama", "vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1536,
              "num_hidden_layers": 8, "num_attention_heads": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    meta = Transformer(ModelConfig.from_pretrained(tmp_path), device="meta", random_init=False)
    tensors = {"lm_head.weight" if name == "lm_head" else f"model.{name.replace('embed_tokens', 'embed_tokens.weight')}":
               torch.ones(p.shape) for name, p in meta.named_parameters()}  # fmt: skip
    shards = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for i, shard in enumerate(shards):
        save_file(shard, tmp_path / f"{i}.safetensors")
    index = {name: f"{i}.safetensors" for i, shard in enumerate(shards) for name in shard}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    command = [sys.executable, "-c", MEASURE_LOADING, str(tmp_path), dtype]
    ratio = float(subprocess.check_output(command, cwd=FIXTURES.parent.parent, text=True))
    assert 0.9 < ratio < 1.2


def test_gpt2_loads_with_and_without_prefix_and_ignores_the_mask_buffers(tmp_path):
    shutil.copy(FIXTURES / "gpt2" / "config.json", tmp_path)
    tensors = load_file(FIXTURES / "gpt2" / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, tmp_path / "model.safetensors")
    ids = expected("gpt2")["ids"][:, :20]
    with torch.no_grad():
        assert torch.equal(Transformer.from_pretrained(tmp_path)(ids), Transformer.from_pretrained(FIXTURES / "gpt2")(ids))


@pytest.mark.parametrize("change", [lambda head: head[:-1], lambda head: head + 1e-3])
def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path, change):
    shutil.copy(FIXTURES / "qwen2" / "config.json", tmp_path)
    tensors = load_file(FIXTURES / "qwen2" / "model.safetensors")
    for head, fits in ((tensors["model.embed_tokens.weight"].clone(), True), (change(tensors["model.embed_tokens.weight"]), False)):
        save_file({**tensors, "lm_head.weight": head.clone()}, tmp_path / "model.safetensors")
        if fits:
            Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
        else:
            with pytest.raises(ValueError, match="lm_head.weight is not the embedding, though tie_word_embeddings"):
                Transformer.from_pretrained(tmp_path)


def test_a_row_longer_than_the_models_positions_is_refused():
    model = Transformer(dataclasses.replace(MODELS["demo"], max_position_embeddings=8))
    with pytest.raises(ValueError, match="8 positions"):
        model(torch.zeros(1, 9, dtype=torch.long))


# ------------------------------------------------------------------------------------------------- faster, the same


EVERY = Adapters(lora_rank=4, rem_rank=4, lora_mlp=True, extra_rows=1)


def outputs_and_gradients(model, ids, silent, tail=0):
    torch.manual_seed(5)  # of dropout
    model.zero_grad()
    hidden, states = model(ids, silent, at=torch.tensor([[0, 1, 2, 3], [3, 5, 4, 6]])[:, : len(ids)], tail=tail)
    (hidden.square().mean() + states.square().mean()).backward()
    return [hidden, states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(found, want):
    assert len(found) == len(want)
    for a, b in zip(found[:2], want[:2], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    a, b = (torch.cat([gradient.flatten() for gradient in some[2:]]) for some in (found, want))
    assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("silent", [False, True])
def test_activation_checkpointing_changes_nothing_but_memory(family, silent):
    model, ids = adapted(family, dataclasses.replace(EVERY, lora_dropout=0.3)).train(), torch.arange(18).view(2, 9)
    want = outputs_and_gradients(model, ids, silent)
    model.activation_checkpointing, entered = True, []
    model.layers[0].register_forward_pre_hook(lambda *_: entered.append(torch.is_grad_enabled()))
    assert_same(outputs_and_gradients(model, ids, silent), want)
    assert len(entered) == 2  # once more for the backward pass
    with torch.no_grad():
        model(ids, silent)
    assert len(entered) == 3


def compiled_layers(family):  # a test of long.py
    """A graph for each pathway, with and without a gradient of the input, and with and without a tail: for all layers, lengths and
    numbers of rows."""
    torch._dynamo.reset()
    model, graphs = adapted(family, EVERY), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    cases = [(torch.randint(50, (B, T)), silent, tail) for B, T in ((2, 9), (4, 12), (3, 31), (2, 8)) for silent in (False, True)
             for tail in (0, 3)]  # fmt: skip
    want = [outputs_and_gradients(model, *case) for case in cases]
    model.compile(backend=backend, fullgraph=True)
    for case, plain in zip(cases, want, strict=True):
        assert_same(outputs_and_gradients(model, *case), plain)
    assert 2 <= len(graphs) <= 8
    cache, count = KVCache(model.config, 2, 12), len(graphs)
    with torch.no_grad():
        model(cases[0][0], cache=cache)
        model(torch.zeros(2, 1, dtype=torch.long), positions=torch.tensor([[9], [4]]), cache=cache)
    assert len(graphs) == count
    model = adapted(family, dataclasses.replace(EVERY, lora_dropout=0.5)).train()
    model.compile(backend=backend, fullgraph=True)
    assert not torch.equal(model(cases[0][0]), model(cases[0][0]))
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_last_layer_of_the_last_tokens_and_fused_projections(family, fused):
    model, ids = adapted(family, EVERY), torch.arange(27).view(3, 9)
    with torch.no_grad():
        want, states = model.merge()(ids, at=torch.tensor([[0, 1, 2], [8, 5, 6]]))
        if fused:
            model.fuse()
        torch.testing.assert_close(model(ids), want, rtol=1e-5, atol=1e-5)
        cache = KVCache(model.config, 3, 10)
        found, also = model(ids, cache=cache, tail=5, at=torch.tensor([[0, 1, 2], [8, 5, 6]]))
        torch.testing.assert_close(found, want[:, 5:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(also, states, rtol=1e-5, atol=1e-5)
        found = model(ids[:, 4:5], positions=torch.tensor([[4]] * 3), cache=cache)  # the cache is that of all tokens
    torch.testing.assert_close(found[:, 0], want[:, 4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("silent", [False, True])
def test_trained_weights_in_one_product(family, silent, monkeypatch):
    model, products, linear = adapted(family, Adapters(rem_rank=4)), [], F.linear
    monkeypatch.setattr(F, "linear", lambda *inputs: products.append(1) or linear(*inputs))
    many, few = torch.arange(600).view(4, 150) % 90, torch.arange(18).view(2, 9)
    counts = []
    for ids in (many, few):
        found = outputs_and_gradients(model, ids, silent)
        counts.append(len(products))
        model.plain = False
        assert_same(found, outputs_and_gradients(copy.deepcopy(model).be_plain(), ids, silent))
        counts.append(len(products) - counts[-1])
        products.clear()
    gpt2 = family == "gpt2"
    assert counts == [layers * len(model.layers) for layers in ((4, 6, 6, 6) if gpt2 else (4, 7, 7, 7))]


def test_a_dropout_is_not_folded_into_weights():
    model = adapted("llama", Adapters(rem_rank=4, rem_is_lora=True, lora_dropout=0.5)).train()
    ids = torch.arange(600).view(4, 150) % 90
    torch.manual_seed(0)
    first, second = model(ids, silent=True), model(ids, silent=True)
    assert not torch.equal(first, second) and torch.equal(model(ids), model(ids))


def test_only_a_merged_model_is_fused():
    with pytest.raises(ValueError, match="merged"):
        adapted("llama", EVERY).fuse()


def test_trained_weights_in_bf16_with_rem():
    model = Transformer(MODELS["demo"], Adapters(rem_rank=4), torch.bfloat16)
    assert model(torch.arange(600).view(10, 60) % 59, silent=True).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_a_share_and_scales_the_rest(p):
    torch.manual_seed(0)
    x = torch.ones(301, 1001, requires_grad=True)
    y = dropout(x, p)
    kept = (y != 0).float()
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    for a, b in ((kept[:, :-1], kept[:, 1:]), (kept[:-1], kept[1:]), (kept[:150], kept[150:300])):  # neighbours, rows, halves
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.02
    torch.testing.assert_close(y, kept / (1 - p))
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / (1 - p))
    assert dropout(x.bfloat16(), p).dtype == torch.bfloat16 and not torch.equal(dropout(x, p), y)
