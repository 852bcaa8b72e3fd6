"""The transformer: Llama, Qwen2 and GPT-2 by hand, with LoRA and REM inside the attention.

One set of weights serves both of DART's pathways: `forward(ids)` is the ordinary model (with LoRA):
the CoT pathway. `forward(ids, silent=True)` also sends the input of every key and value projection
through REM: the ST pathway. `merge()` folds LoRA and REM into the weights, for inference.

Shapes: B rows, T tokens, n hidden size, h query heads, g key/value heads, e head size, L layers,
V vocabulary, r LoRA rank, d REM rank. Weights keep the names and the orientation of a Hugging Face
Llama checkpoint; GPT-2's are renamed and transposed, its fused c_attn is cut into three.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import read_bytes, read_json, replacing, write_json

# -------------------------------------------------------------------------------- configuration

LLAMA3_ROPE = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3_ROPE |= dict(original_max_position_embeddings=8192.0)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, under the field names of a Hugging Face Llama `config.json`."""

    model_type: str  # llama, qwen2 (biases on q, k, v) or gpt2 (learned positions, LayerNorm, GELU)
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-5  # rms_norm_eps, or layer_norm_epsilon
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or Llama 3's four factors

    @classmethod
    def from_pretrained(cls, directory):
        """Reads `directory/config.json` (Hugging Face format).

        FileNotFoundError where there is none; ValueError, naming the field, for a configuration
        that this code would compute otherwise than its authors meant."""
        path = Path(directory) / "config.json"
        raw = read_json(path)
        try:
            return cls(**(read_gpt2 if raw.get("model_type") == "gpt2" else read_llama)(raw))
        except KeyError as error:
            raise ValueError(f"{path}: the field {error} is missing") from None
        except (TypeError, AttributeError, ArithmeticError, RecursionError, ValueError) as error:
            raise ValueError(f"{path}: not a model configuration: {error}") from None

    def __post_init__(self):
        expect(vars(self), model_type=("llama", "qwen2", "gpt2"), tie_word_embeddings=(True, False))
        for name, kind in type(self).__annotations__.items():
            value = getattr(self, name)
            if kind is int and (type(value) is not int or not 0 < value < 2**24):
                raise ValueError(f"{name} is {value!r}, not a whole number from 1 to 2^24")
        numbers = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta}
        for name, value in (numbers | (self.rope_scaling or {})).items():
            if type(value) not in (int, float) or not 0 < value < 2**63:
                raise ValueError(f"{name} is {value!r}, not a positive number")
        rope = self.rope_scaling or LLAMA3_ROPE
        if set(rope) != set(LLAMA3_ROPE) or rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise ValueError(f"rope_scaling is {rope}: not Llama 3's, or low is not below high")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")
        if self.model_type != "gpt2" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs")


def expect(raw, **supported):
    """Refuses a configuration whose field, where it is given, is not what the code computes."""
    for name, values in supported.items():
        if name in raw and raw[name] not in values:
            raise ValueError(f"{name} = {raw[name]!r} is not supported (only {values})")


def read_llama(raw):
    """A Llama's or Qwen2's config.json -> the fields of ModelConfig."""
    scaling, parameters = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    rope = {name: raw[name] for name in ("rope_theta", *LLAMA3_ROPE) if name in raw}
    for part in (parameters, scaling):
        for name, value in part.items():
            if rope.setdefault(name, value) != value:
                raise ValueError(f"{name} is {value!r} in one place, {rope[name]!r} in another")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    expect(
        raw | rope | {"rope_type": rope_type, "layer_types": set(raw.get("layer_types") or ())},
        model_type=("llama", "qwen2"),
        hidden_act=("silu",),
        mlp_bias=(False,),
        is_causal=(True,),
        attention_bias=(False,) if raw.get("model_type") == "llama" else (True, False),
        quantization_config=(None,),
        use_sliding_window=(False,),
        layer_types=(set(), {"full_attention"}),
        partial_rotary_factor=(1.0, None),
        rope_type=("default", "llama3"),
    )
    heads, llama = raw["num_attention_heads"], raw["model_type"] == "llama"
    positions = 2048 if llama else 32768  # Hugging Face's defaults
    same = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {name: raw[name] for name in same} | dict(
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        max_position_embeddings=raw.get("max_position_embeddings", positions),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta", 10000.0),
        rope_scaling={k: float(rope[k]) for k in LLAMA3_ROPE} if rope_type == "llama3" else None,
    )


GPT2_FIELDS = dict(vocab_size="vocab_size", hidden_size="n_embd", intermediate_size="n_inner")
GPT2_FIELDS |= dict(num_hidden_layers="n_layer", num_attention_heads="n_head")
GPT2_FIELDS |= dict(max_position_embeddings="n_positions", norm_eps="layer_norm_epsilon")
GPT2_FIELDS |= dict(tie_word_embeddings="tie_word_embeddings")


def read_gpt2(raw):
    """A GPT-2's config.json -> the fields of ModelConfig."""
    expect(
        raw,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
        quantization_config=(None,),
    )
    n, heads = raw["n_embd"], raw["n_head"]
    if divmod(n, heads)[1]:
        raise ValueError(f"n_embd {n} is not a multiple of n_head {heads}")
    raw = dict(tie_word_embeddings=True, n_positions=1024, layer_norm_epsilon=1e-5) | raw
    raw["n_inner"] = raw.get("n_inner") or 4 * n
    fields = {ours: raw[theirs] for ours, theirs in GPT2_FIELDS.items()}
    same = {name: (value,) for name, value in fields.items()}
    expect(raw, **same)  # a field under our name, too, agrees
    return dict(**fields, model_type="gpt2", num_key_value_heads=heads, head_dim=n // heads)


LLAMA3 = dict(norm_eps=1e-5, rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
QWEN = dict(norm_eps=1e-6, rope_theta=1e6)
MODELS = {  # type, V, hidden, MLP, layers, heads, those of keys and values, head size, positions
    "llama-3.2-1b": ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, **LLAMA3),
    "llama-3.2-3b": ModelConfig("llama", 128256, 3072, 8192, 28, 24, 8, 128, 131072, **LLAMA3),
    "qwen2.5-1.5b": ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, 131072, **QWEN),
    "smollm2-135m": ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=1e5),
    "gpt2": ModelConfig("gpt2", 50257, 768, 3072, 12, 12, 12, 64, 1024),
    "demo": ModelConfig("llama", 59, 64, 192, 4, 4, 4, 16, 80, tie_word_embeddings=False),
}


@dataclass(frozen=True)
class Adapters:
    """What is added to the base weights; nothing by default. LoRA freezes the base."""

    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_on: tuple = ("q_proj", "k_proj", "v_proj", "o_proj")
    rem_rank: int = 0
    rem_alpha: float = 32.0
    rem_on: tuple = ("k_proj", "v_proj")
    rem_is_lora: bool = False  # instead of REM, a second LoRA in the ST pathway (Table 3)
    new_embeddings: int = 0  # with the ids V, V + 1, ...
    train_new_embeddings: bool = False
    projector: bool = False  # from a hidden state to the embedding it becomes (CODI)


# --------------------------------------------------------------------------------- LoRA and REM


class LoRA(nn.Module):
    """x -> (alpha/r) x A^T B^T (Hu et al. 2022). A is [r, in]; B [out, r], 0 at the start. Like REM
    it is held in fp32 and cast to x's dtype at use."""

    def __init__(self, n_in, n_out, rank, alpha, dropout, device):
        super().__init__()
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_a = uniform_parameter(rank, n_in, n_in, device)
        self.lora_b = nn.Parameter(torch.zeros(n_out, rank, device=device))

    def forward(self, x):  # [..., in] -> [..., out]
        x = F.dropout(x, self.dropout, self.training)
        x = self.scale * F.linear(x, self.lora_a.to(x.dtype))  # [..., r]
        return F.linear(x, self.lora_b.to(x.dtype))

    def delta(self):  # what it adds to the weight: [out, in]
        return self.scale * self.lora_b @ self.lora_a


class REM(nn.Module):
    """Reasoning Evolvement Module, equation (3): x -> x W_R^T with W_R = (alpha/d) R2 R1^T + I.
    R1, R2 are [n, d]; R2 is 0 at the start, so that REM starts as the identity."""

    def __init__(self, n, rank, alpha, device):
        super().__init__()
        self.scale = alpha / rank
        self.r1 = uniform_parameter(n, rank, n, device)
        self.r2 = nn.Parameter(torch.zeros(n, rank, device=device))

    def forward(self, x):  # [..., n] -> [..., n]
        shift = self.scale * (x @ self.r1.to(x.dtype))  # [..., d]
        return x + shift @ self.r2.to(x.dtype).T

    def merged(self, weight):  # W W_R: [out, n] -> [out, n]
        return weight + self.scale * (weight @ self.r2) @ self.r1.T


def uniform_parameter(rows, columns, fan_in, device):
    """The initialisation that LoRA's authors use for A."""
    values = torch.empty(rows, columns, device=device)
    return nn.Parameter(values.uniform_(-1, 1) / math.sqrt(fan_in))


class Linear(nn.Module):
    """y = x W^T + b, with LoRA and, in the ST pathway (silent), REM, where the adapters have them
    on the projection of this name. W is [out, in]."""

    def __init__(self, name, n_in, n_out, bias, adapters, dtype, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(n_out, dtype=dtype, device=device)) if bias else None
        self.lora = self.rem = self.silent_lora = None
        rank, alpha, dropout = adapters.lora_rank, adapters.lora_alpha, adapters.lora_dropout
        if rank and name in adapters.lora_on:
            self.lora = LoRA(n_in, n_out, rank, alpha, dropout, device)
        rank, alpha = adapters.rem_rank, adapters.rem_alpha
        if rank and name in adapters.rem_on and adapters.rem_is_lora:
            self.silent_lora = LoRA(n_in, n_out, rank, alpha, dropout, device)
        elif rank and name in adapters.rem_on:
            self.rem = REM(n_in, rank, alpha, device)

    def forward(self, x, silent=False):  # [..., in] -> [..., out]
        if silent and self.rem is not None:
            x = self.rem(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        if self.lora is not None:
            y = y + self.lora(x)
        if silent and self.silent_lora is not None:
            y = y + self.silent_lora(x)
        return y

    def merge(self, silent):
        """W' = (W + (alpha/r) B A) W_R, in fp32; the bias stays, and the adapters are gone."""
        weight = self.weight.float()
        if self.lora is not None:
            weight = weight + self.lora.delta()
        if silent and self.silent_lora is not None:
            weight = weight + self.silent_lora.delta()
        if silent and self.rem is not None:
            weight = self.rem.merged(weight)
        self.lora = self.rem = self.silent_lora = None
        self.weight.copy_(weight)


# --------------------------------------------------------------------------------------- layers


class Norm(nn.Module):
    """RMSNorm (Llama, Qwen2), or LayerNorm where there is a bias (GPT-2); in fp32."""

    def __init__(self, config, dtype, device):
        super().__init__()
        n, gpt2, self.eps = config.hidden_size, config.model_type == "gpt2", config.norm_eps
        self.weight = nn.Parameter(torch.ones(n, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(n, dtype=dtype, device=device)) if gpt2 else None

    def forward(self, x):  # [..., n] -> [..., n]
        n = x.shape[-1:]
        if self.bias is None:
            y = F.rms_norm(x.float(), n, self.weight.float(), self.eps)
        else:
            y = F.layer_norm(x.float(), n, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def rope_frequencies(config):
    """Radians per position of each of the e/2 rotations, fp32 [e/2]; Llama 3 slows the slow ones
    (the `llama3` rope type of Hugging Face's configurations)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = (config.rope_scaling[name] for name in LLAMA3_ROPE)
    turns = context * frequencies / (2 * math.pi)  # in the context of the first training
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: stays; 0: `factor` times slower
    return keep * frequencies + (1 - keep) * frequencies / factor


def rotate(x, cos, sin):
    """Turns the pairs (x_i, x_{i + e/2}) by their position's angles, in fp32: the split-half order
    of Hugging Face checkpoints. x [B, heads, T, e] -> like x; cos, sin [B or 1, 1, T, e], the first
    half of sin with a minus."""
    y = x.float()
    return (y * cos + y.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of every layer for B rows, each with positions of its own.

    Rows are padded on the right: a token at position p lies at index p. A query at p sees the
    indices 0..p, so that what padding wrote is overwritten before it is seen."""

    def __init__(self, model, rows, length):
        config, kind = model.config, dict(dtype=model.compute_dtype, device=model.device)
        length = min(length, config.max_position_embeddings)  # `forward` refuses longer rows
        shape = (2, rows, length, config.num_key_value_heads, config.head_dim)
        self.kv = [[*torch.zeros(shape, **kind)] for _ in model.layers]  # per layer: [k, v]
        self.length = 0  # of the longest row so far

    def update(self, layer, places, *kv):
        """Writes k, v [B, g, T, e] at places = (rows [B, 1], positions [B or 1, T]); returns all so
        far, each [B, g, length, e]. Gradients flow through it: a new tensor takes the old one's
        place."""
        write = torch.index_put if torch.is_grad_enabled() else torch.index_put_
        for i, x in enumerate(kv):
            self.kv[layer][i] = write(self.kv[layer][i], places, x.transpose(1, 2))
        return [x[:, : self.length].transpose(1, 2) for x in self.kv[layer]]


class Pass(NamedTuple):
    """What all layers of one forward pass share."""

    silent: bool
    places: tuple  # (rows [B, 1], positions [B or 1, T]) of the tokens
    rope: tuple | None  # (cos, sin), each [B or 1, 1, T, e], see `rotate`
    mask: torch.Tensor | None  # [B, 1, T, kv_length] of what is seen; None: causal
    cache: KVCache | None


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values."""

    def __init__(self, config, adapters, index, dtype, device):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.grouped = config.num_key_value_heads < config.num_attention_heads
        n, n_q = config.hidden_size, config.num_attention_heads * config.head_dim
        n_kv = config.num_key_value_heads * config.head_dim
        kind, bias = (adapters, dtype, device), config.model_type != "llama"
        self.q_proj = Linear("q_proj", n, n_q, bias, *kind)
        self.k_proj = Linear("k_proj", n, n_kv, bias, *kind)
        self.v_proj = Linear("v_proj", n, n_kv, bias, *kind)
        self.o_proj = Linear("o_proj", n_q, n, config.model_type == "gpt2", *kind)

    def forward(self, x, shared, first):
        """x [B, T, n] -> [B, T - first, n], of the tokens from `first` on."""
        B, T, _ = x.shape
        q = self.q_proj(x, shared.silent).view(B, T, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(x, shared.silent).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x, shared.silent).view(B, T, -1, self.head_dim).transpose(1, 2)
        if shared.rope is not None:
            q, k = rotate(q, *shared.rope), rotate(k, *shared.rope)  # [B, h, T, e], [B, g, T, e]
        if shared.cache is not None:
            k, v = shared.cache.update(self.index, shared.places, k, v)
        mask, causal = shared.mask, shared.mask is None
        y = F.scaled_dot_product_attention(
            q[:, :, first:], k, v, mask, is_causal=causal, enable_gqa=self.grouped
        )  # [B, h, T - first, e]
        return self.o_proj(y.transpose(1, 2).reshape(B, T - first, -1), shared.silent)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); GPT-2: down(gelu(up(x))), the GELU in its tanh form."""

    def __init__(self, config, adapters, dtype, device):
        super().__init__()
        n, m, gpt2 = config.hidden_size, config.intermediate_size, config.model_type == "gpt2"
        kind = (gpt2, adapters, dtype, device)
        self.gate_proj = None if gpt2 else Linear("gate_proj", n, m, *kind)
        self.up_proj = Linear("up_proj", n, m, *kind)
        self.down_proj = Linear("down_proj", m, n, *kind)

    def forward(self, x, silent):  # [..., n] -> [..., n]
        up = self.up_proj(x, silent)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(up, approximate="tanh"), silent)
        return self.down_proj(F.silu(self.gate_proj(x, silent)) * up, silent)


class Block(nn.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config, adapters, index, dtype, device):
        super().__init__()
        self.input_layernorm = Norm(config, dtype, device)
        self.self_attn = Attention(config, adapters, index, dtype, device)
        self.post_attention_layernorm = Norm(config, dtype, device)
        self.mlp = MLP(config, adapters, dtype, device)

    def forward(self, x, shared, first):  # [B, T, n] -> [B, T - first, n]
        x = x[:, first:] + self.self_attn(self.input_layernorm(x), shared, first)
        return x + self.mlp(self.post_attention_layernorm(x), shared.silent)


# ---------------------------------------------------------------------------------- transformer


class Transformer(nn.Module):
    """A decoder-only language model; see the head of this file.

    dtype: of the base weights; LoRA and REM are always fp32. init=False leaves the base weights for
    the caller to fill.
    """

    def __init__(self, config, adapters=Adapters(), dtype=torch.float32, device="cpu", init=True):
        super().__init__()
        self.config, self.adapters = config, adapters
        self.compute_dtype = dtype  # may differ: weights that are trained stay in fp32
        self.merged = None  # after merge(): 'silent' or 'cot', the pathway that the weights are now
        self.activation_checkpointing = False  # keep only a layer's input for the backward pass
        self.compiled = None  # see compile_layers()
        self.base_digest = None  # of the files that the weights came from
        V, n, gpt2 = config.vocab_size, config.hidden_size, config.model_type == "gpt2"
        kind = dict(dtype=dtype, device=device)
        self.embed_tokens = nn.Parameter(torch.empty(V, n, **kind))
        self.embed_positions = self.lm_head = self.projector = self.new_embeddings = None
        if gpt2:
            positions = torch.empty(config.max_position_embeddings, n, **kind)
            self.embed_positions = nn.Parameter(positions)
        L = config.num_hidden_layers
        self.layers = nn.ModuleList(Block(config, adapters, i, **kind) for i in range(L))
        self.norm = Norm(config, **kind)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Parameter(torch.empty(V, n, **kind))
        if adapters.lora_rank:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(is_adapter(name))
        if adapters.new_embeddings:
            rows = torch.zeros(adapters.new_embeddings, n, device=device)
            self.new_embeddings = nn.Parameter(rows, adapters.train_new_embeddings)
        if adapters.projector:  # in fp32 (Shen et al. 2025)
            layers = nn.Linear(n, n, device=device), nn.GELU(), nn.Linear(n, n, device=device)
            self.projector = nn.Sequential(*layers, nn.LayerNorm(n, device=device))
        self.frequencies = None if gpt2 else rope_frequencies(config).to(device)  # [e/2]
        if init:
            self.init_weights()

    @property
    def device(self):
        return self.embed_tokens.device

    @property
    def head(self):  # [V, n]
        return self.embed_tokens if self.lm_head is None else self.lm_head

    @torch.no_grad()
    def init_weights(self):
        """Random base weights: N(0, 1/fan_in), the projections back into the residual stream by
        sqrt(2L) smaller. Embeddings that are no head are drawn larger, N(0, 1/4): weight decay
        would shrink them before they learn."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                into_residual = name.endswith(("o_proj", "down_proj"))
                shrink = math.sqrt(2 * len(self.layers)) if into_residual else 1
                module.weight.normal_(0, 1 / math.sqrt(module.weight.shape[1]) / shrink)
        std = 1 / math.sqrt(self.config.hidden_size)
        self.embed_tokens.normal_(0, std if self.lm_head is None else 0.5)
        for table in (self.embed_positions, self.lm_head):
            if table is not None:
                table.normal_(0, std)
        self.init_new_embeddings()

    @torch.no_grad()
    def init_new_embeddings(self):
        """The mean of the embeddings; several, which must differ, are drawn around it."""
        if self.new_embeddings is not None:
            table = self.embed_tokens.float()
            self.new_embeddings.copy_(table.mean(dim=0).expand_as(self.new_embeddings))
            if len(self.new_embeddings) > 1:
                noise = torch.randn_like(self.new_embeddings)
                self.new_embeddings.add_(table.std(dim=0) * noise)

    def compile_layers(self):
        """torch.compile: one graph serves all layers and lengths, in passes without a cache."""
        self.compiled = [torch.compile(layer, dynamic=True) for layer in self.layers]

    def embed(self, ids):  # [B, T] -> [B, T, n]
        if self.new_embeddings is None:
            return F.embedding(ids, self.embed_tokens)
        V = self.config.vocab_size
        new = F.embedding((ids - V).clamp(min=0), self.new_embeddings)
        old = F.embedding(ids.clamp(max=V - 1), self.embed_tokens)
        return torch.where((ids >= V)[..., None], new.to(old.dtype), old)

    def forward(self, ids, silent=False, positions=None, cache=None, capture=None, first_needed=0):
        """ids [B, T], or embeddings [B, T, n] -> hidden states after the final norm
        [B, T - first_needed, n].

        silent: the ST pathway (REM on). cache: a KVCache, to be written and read.
        positions [B, T]: of the tokens in their rows; None: the next ones after the cache. With a
        cache a row's positions begin at 0 and leave no gap.
        capture: (rows [P], columns [P]) of tokens; then it returns (hidden, states [L, P, n]), the
        output of every decoder layer there, before the final norm. Nothing else of it is kept.
        first_needed: the first index whose state is needed; for those before it the last layer
        makes keys and values only.
        ValueError for rows longer than the model's positions.
        """
        x = ids if ids.is_floating_point() else self.embed(ids)
        start, most = cache.length if cache else 0, self.config.max_position_embeddings
        kv_length = start + x.shape[1]
        if kv_length > most:
            raise ValueError(f"a row of {kv_length} tokens, but the model has {most} positions")
        columns, rope = torch.arange(kv_length, device=x.device), None
        positions = columns[None, start:] if positions is None else positions
        mask = columns <= positions[:, None, :, None] if start else None  # [B, 1, T, kv_length]
        if self.frequencies is None:
            x = x + F.embedding(positions, self.embed_positions)
        else:
            angles = positions[:, None, :, None] * self.frequencies.to(x.device)  # [.., T, e/2]
            cos, sin = angles.cos(), angles.sin()
            rope = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        x, states = x.to(self.compute_dtype), []
        places = torch.arange(len(x), device=x.device)[:, None], positions
        shared = Pass(silent, places, rope, mask, cache)
        if cache is not None:
            cache.length = kv_length

        layers = self.layers if self.compiled is None or cache is not None else self.compiled
        for i, layer in enumerate(layers):
            first = first_needed if i == len(layers) - 1 else 0
            if first:
                mask = columns <= positions[:, None, first:, None]  # [.., T - first, kv_length]
                shared = shared._replace(mask=mask)
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, shared, first)
            if capture is not None:
                states.append(x[capture[0], capture[1] - first])  # [P, n]
        hidden = self.norm(x)
        return hidden if capture is None else (hidden, torch.stack(states))

    def logits(self, hidden):  # [..., n] -> [..., V]
        """Scores of the vocabulary; a new embedding is only ever read, never predicted."""
        return F.linear(hidden, self.head.to(hidden.dtype))

    @torch.no_grad()
    def merge(self, silent=True):
        """Folds LoRA and (silent) REM into the weights: an ordinary model of its family, in
        `compute_dtype`, that does what the pathway did. A second call changes nothing. Returns
        the model. ValueError where the weights are already those of the other pathway."""
        pathway = "silent" if silent else "cot"
        if self.merged not in (None, pathway):
            raise ValueError(f"the weights were merged for the {self.merged} pathway")
        for module in self.modules():
            if isinstance(module, Linear):
                module.merge(silent)
        self.merged = pathway
        projector, self.projector = self.projector, None  # is no part of it, and stays in fp32
        self.to(self.compute_dtype)
        self.projector = projector
        return self.requires_grad_(False)

    def state(self, whole=False):
        """{name: tensor} that a run must keep: what is trained, and new embeddings; whole: the
        frozen rest, too, where it can be had from nowhere else."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if whole or parameter.requires_grad or name == "new_embeddings"
        }

    @torch.no_grad()
    def load_state(self, tensors, path, whole=False):
        """Takes over what `state` gave. ValueError, with the path, for other names or shapes."""
        own = self.state(whole)
        if odd := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(f"{path}: {odd[0]} and {len(odd) - 1} other tensors too many or few")
        for name, parameter in own.items():
            check_tensor(path, name, tensors[name], parameter.shape)
            parameter.copy_(tensors[name])

    def training_flops(self, lengths, learned, silent=False):
        """Floating-point operations (2 for a multiply-add) of a forward and a backward pass over
        rows of these lengths [B], with logits for `learned` tokens: the matrix products, of frozen
        weights without their own gradient, and attention between tokens that see each other."""
        lengths, config = np.asarray(lengths, dtype=np.float64), self.config
        width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
        total = 3 * 4 * width * (lengths * (lengths + 1) / 2).sum()
        for name, p in self.layers.named_parameters():
            if p.dim() == 2 and (silent or not (".rem." in name or ".silent_lora." in name)):
                total += (3 if p.requires_grad else 2) * 2 * lengths.sum() * p.numel()
        head = (3 if self.head.requires_grad else 2) * 2 * learned * self.head.numel()
        return float(total + head)

    def kept_bytes(self, tokens, silent=False, thoughts=0):
        """Bytes that a pass over so many tokens, padding among them, keeps for its backward pass:
        in each layer the inputs of what is not linear, and of what is trained."""
        config, mlp, size = self.config, self.layers[0].mlp, self.compute_dtype.itemsize
        n, m = config.hidden_size, config.intermediate_size
        linears = [module for module in self.layers[0].modules() if isinstance(module, Linear)]
        loras = [x for x in linears if x.lora] + [x for x in linears if silent and x.silent_lora]
        values = 2 * n + n  # of the norms, of attention
        # q, k and v of all heads, and what comes out; keys and values anew for each thought
        values += (4 + 2 * thoughts) * config.num_attention_heads * config.head_dim
        values += 3 * m if mlp.gate_proj else m
        if mlp.up_proj.lora or not self.adapters.lora_rank:
            values += n + m
        values += sum(x.weight.shape[1] for x in linears if silent and x.rem)
        total = values * size + (2 * n * 4 if size < 4 else 0)  # norms are in fp32
        if self.adapters.lora_dropout:
            total += sum(x.weight.shape[1] for x in loras) * (size + 1)  # and what is dropped
        if self.activation_checkpointing and not thoughts:  # inputs of layers, and one layer
            return int(tokens * (config.num_hidden_layers * n * size + 1.5 * total))
        return tokens * config.num_hidden_layers * total

    @classmethod
    def from_pretrained(cls, directory, adapters=Adapters(), dtype=torch.float32, device="cpu"):
        """The model of a Hugging Face directory: config.json, and model.safetensors or the shards
        of an index. FileNotFoundError or ValueError, naming the file and the field or tensor."""
        config = ModelConfig.from_pretrained(directory)
        model = cls(config, adapters, dtype, device, init=False)
        model.base_digest = load_checkpoint(model, directory)
        model.init_new_embeddings()
        return model


def is_adapter(name):
    """Whether the parameter of this name is not the base model's."""
    parts = {"lora", "rem", "silent_lora", "new_embeddings", "projector"}
    return not parts.isdisjoint(name.split("."))


# ----------------------------------------------------------------------- Hugging Face's weights

GPT2_NAMES = dict(embed_tokens="wte", embed_positions="wpe", layers="h", norm="ln_f")
GPT2_NAMES |= dict(input_layernorm="ln_1", self_attn="attn", post_attention_layernorm="ln_2")
GPT2_NAMES |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), "c_attn")
GPT2_NAMES |= dict(o_proj="c_proj", up_proj="c_fc", down_proj="c_proj")
IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # causal masks, rope
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def checkpoint_layout(model):
    """{name of a tensor in a Hugging Face checkpoint, without prefix: its parameters}. Of GPT-2's
    c_attn these are three, side by side in the last dimension."""
    layout = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        parts = name.split(".")
        if parts[-1] in ("embed_tokens", "embed_positions", "lm_head"):
            parts.append("weight")
        if model.config.model_type == "gpt2":
            parts = [GPT2_NAMES.get(part, part) for part in parts]
            parameter = parameter.T if name.endswith("_proj.weight") else parameter  # [in, out]
        layout.setdefault(".".join(parts), []).append(parameter)
    return layout


@torch.no_grad()
def load_checkpoint(model, directory):
    """Fills the base weights in one pass over the tensors of the directory's files. A tensor
    without a place is refused, but for IGNORED; one that comes twice, as a tied head may, is equal.
    Returns the digest of all tensors. FileNotFoundError or ValueError, naming file and tensor."""
    layout = checkpoint_layout(model)
    embedding = next(iter(layout))
    places = {"lm_head.weight": layout[embedding]} | layout  # a tied head is the embedding
    filled, digests = {}, {}
    for path in weight_files(directory):
        with open_safetensors(path) as file:
            for stored in sorted(file.keys()):
                name = stored.removeprefix("transformer.").removeprefix("model.")
                if name.endswith(IGNORED):
                    continue
                if name not in places:
                    raise ValueError(f"{path}: the tensor {stored} has no place in this model")
                parameters, tensor = places[name], file.get_tensor(stored)
                *shape, size = parameters[0].shape
                check_tensor(path, stored, tensor, [*shape, size * len(parameters)])
                digests[name] = tensor_digest(tensor)
                name = embedding if parameters is layout[embedding] else name
                if name in filled and not torch.equal(parameters[0], tensor.to(parameters[0])):
                    raise ValueError(f"{path}: {stored} is there twice, or not the embedding")
                for parameter, part in zip(parameters, tensor.split(size, dim=-1), strict=True):
                    parameter.copy_(part)
                filled[name] = stored
    if missing := layout.keys() - filled.keys():
        raise ValueError(f"{directory}: the tensor {min(missing)} is missing")
    return digest_of(digests)


def check_tensor(path, name, tensor, shape):
    """ValueError unless a stored tensor can be a parameter's value."""
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{path}: {name} is {tensor.dtype}, not a floating-point tensor")
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: {name} is not finite")


def tensor_digest(tensor):
    """The sha256 of a tensor's type, shape and bytes."""
    sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def digest_of(digests):
    """One digest of {name: digest}."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def weight_files(directory):
    """The paths of model.safetensors, or of the shards in its index."""
    path = Path(directory) / "model.safetensors"
    if path.with_name("adapter_config.json").is_file():
        raise ValueError(f"{directory}: adapter_config.json: the adapter must be merged first")
    if path.is_file():
        return [path]
    index = Path(f"{path}.index.json")
    if not index.is_file():
        raise FileNotFoundError(f"{path}: no such file, nor {index.name}; no other format is read")
    try:
        return sorted({index.with_name(name) for name in read_json(index)["weight_map"].values()})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{index}: not an index of files beside it ({error!r})") from None


def open_safetensors(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        if path.stat().st_size < 1000:
            read_bytes(path)  # names a Git LFS pointer
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


# --------------------------------------------------------------------------------------- export


def config_json(config):
    """The fields of a Hugging Face `config.json`, as versions 4 and 5 of transformers read them."""
    if config.model_type == "gpt2":
        raw = {theirs: getattr(config, ours) for ours, theirs in GPT2_FIELDS.items()}
        more = dict(architectures=["GPT2LMHeadModel"], activation_function="gelu_new")
        return {"model_type": "gpt2"} | more | raw
    raw = asdict(config)
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]
    raw |= {"architectures": [name], "hidden_act": "silu", "rms_norm_eps": raw.pop("norm_eps")}
    if scaling := raw["rope_scaling"]:
        context = int(scaling["original_max_position_embeddings"])
        scaling |= {"rope_type": "llama3", "original_max_position_embeddings": context}
    return raw


@torch.no_grad()
def export_hf(model, directory, st_id=None, tokens=None):
    """Writes a merged model into a directory as Hugging Face's libraries read it: config.json,
    generation_config.json, model.safetensors. Returns the number of weights.

    st_id: where the first new embedding goes, below V or V itself; None: nowhere. tokens: token ids
    for the configurations. ValueError for a model that is not merged; OSError.
    """
    if model.merged is None:
        raise ValueError("only a merged model has the weights of a checkpoint")
    config, tokens, directory = model.config, tokens or {}, Path(directory)
    embed, head = model.embed_tokens, model.head
    prefix = "transformer." if config.model_type == "gpt2" else "model."
    if st_id is not None:
        # <st> is never written: its row of the head is the mean of all rows. Where its embedding
        # is that mean, too, the head stays tied.
        new = model.new_embeddings[:1].to(embed.dtype)
        mean = head.float().mean(dim=0, keepdim=True).to(head.dtype)
        tied = config.tie_word_embeddings and torch.equal(new, mean)
        embed = torch.cat((embed[:st_id], new, embed[st_id + 1 :]))
        head = torch.cat((head[:st_id], mean, head[st_id + 1 :]))
        config = replace(config, vocab_size=len(embed), tie_word_embeddings=tied)
    layout = checkpoint_layout(model)
    layout[next(iter(layout))] = [embed]
    layout.pop("lm_head.weight", None)
    weights = {prefix + name: torch.cat(parts, dim=-1).cpu() for name, parts in layout.items()}
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = head.cpu()
    with replacing(directory / "model.safetensors") as temporary:
        save_file(weights, temporary, {"format": "pt"})
    dtype = str(embed.dtype).removeprefix("torch.")
    write_json(directory / "config.json", config_json(config) | {"torch_dtype": dtype} | tokens)
    write_json(directory / "generation_config.json", {"do_sample": False} | tokens)
    return sum(weight.numel() for weight in weights.values())
