"""The transformer: Llama, Qwen2 and GPT-2 by hand, with LoRA and REM inside the attention.

One set of weights serves both of DART's pathways. `Transformer.forward(ids, silent=False)` is the ordinary model
(with LoRA, where there is LoRA): the CoT pathway. `silent=True` also sends the input of every key and value projection
through REM: the ST pathway. `Transformer.merge()` folds LoRA and REM into the weights, for inference.

Shapes: B rows, T tokens, n hidden size, h query heads, g key/value heads, e head size, L layers,
V vocabulary, r LoRA rank, d REM rank. Weights keep the orientation and the order of a Hugging Face checkpoint's
tensors; modules go by Llama's names there, GPT-2's, too, whose fused c_attn is cut into three.
"""

import json
import math
import os
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

# ---------------------------------------------------------------------------------------------------- configuration

# Upper limits, far above any real model's; they keep products within 64 bits.
MOST = dict(vocab_size=2**24, hidden_size=2**20, intermediate_size=2**22, num_hidden_layers=2**10, num_attention_heads=2**14,
            num_key_value_heads=2**14, head_dim=2**14, max_position_embeddings=2**31 - 1)  # fmt: skip
LLAMA3_ROPE = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192.0)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, under the field names of a Hugging Face Llama `config.json`.

    `norm_eps` is rms_norm_eps or layer_norm_epsilon; `rope_scaling` is None or Llama-3's dictionary of factors.
    """

    model_type: str  # 'llama', 'qwen2' (llama with biases on q, k, v) or 'gpt2' (learned positions, LayerNorm, GELU)
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None

    @classmethod
    def from_pretrained(cls, directory):
        """Reads `directory/config.json` (Hugging Face format).

        Raises ValueError, naming the field, for a configuration that this code would compute otherwise than its
        authors meant, and FileNotFoundError where there is no such file.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a model directory holds config.json and its weights")
        try:
            if path.stat().st_size > 2**26:
                raise ValueError("too large")
            raw = json.loads(path.read_text(encoding="utf-8"))
            return (_read_gpt2 if raw.get("model_type") == "gpt2" else _read_llama)(raw)
        except KeyError as error:
            raise ValueError(f"{path}: the field {error} is missing") from None
        except (TypeError, AttributeError, ArithmeticError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a model configuration ({error})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __post_init__(self):
        if self.model_type not in ("llama", "qwen2", "gpt2"):
            raise ValueError(f"model_type {self.model_type!r} is not one of llama, qwen2, gpt2")
        for name, most in MOST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}, not a whole number from 1 to {most}")
        for name, value in {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta, **(self.rope_scaling or {})}.items():
            if type(value) not in (int, float) or not 0 < value < 2**63:
                raise ValueError(f"{name} is {value!r}, not a positive number")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings is {self.tie_word_embeddings!r}, not true or false")
        if self.rope_scaling is not None and set(self.rope_scaling) != set(LLAMA3_ROPE):
            raise ValueError(f"rope_scaling holds {sorted(self.rope_scaling)}, not {sorted(LLAMA3_ROPE)}")
        if self.rope_scaling is not None and self.rope_scaling["low_freq_factor"] >= self.rope_scaling["high_freq_factor"]:
            raise ValueError("low_freq_factor is not below high_freq_factor")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")  # fmt: skip
        if self.model_type != "gpt2" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs")


# fmt: off
MODELS = {  # model_type, V, n, MLP size, L, h, g, e, positions
    "llama-3.2-1b": ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, True, 5e5, LLAMA3_ROPE),
    "llama-3.2-3b": ModelConfig("llama", 128256, 3072, 8192, 28, 24, 8, 128, 131072, 1e-5, True, 5e5, LLAMA3_ROPE),
    "qwen2.5-1.5b": ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, 131072, 1e-6, True, 1e6),
    "gpt2":         ModelConfig("gpt2", 50257, 768, 3072, 12, 12, 12, 64, 1024, 1e-5, True),
    "demo":         ModelConfig("llama", 59, 64, 192, 4, 4, 4, 16, 80, 1e-5, False),
}
# fmt: on


@dataclass(frozen=True)
class Adapters:
    """What is added to the base weights. Nothing by default.

    LoRA (Hu et al. 2022) on q, k, v and o, and with `lora_mlp` on the MLP, too, freezes the base. REM (Section 3.2) stands
    before k and v; with `rem_is_lora` a second LoRA on k and v stands in for it (Table 3). `extra_rows` are embeddings
    behind the vocabulary's last, with the ids V, V + 1, ..., frozen or trained (`init_extra_rows`). `projector`: a
    module from a hidden state to the embedding it becomes (CODI).
    """

    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_mlp: bool = False
    rem_rank: int = 0
    rem_alpha: float = 32.0
    rem_is_lora: bool = False
    extra_rows: int = 0
    train_extra_rows: bool = False
    projector: bool = False


ADAPTED = ("lora_a", "lora_b", "r1", "r2")  # parameters that are not of the base


# ------------------------------------------------------------------------------------------------------------ layers


def _add_product(y, a, b):
    """y [..., out] + a [..., k] b [k, out], in one operation."""
    return torch.addmm(y.flatten(0, -2), a.flatten(0, -2), b.to(y.dtype)).view_as(y)


def dropout(x, p):
    """F.dropout. On a CPU, where that draws one number after the other, four come of 64 random bits, and p is rounded to a
    multiple of 2^-16."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return x.masked_fill(bits[: x.numel()].view(x.shape) < round(p * 2**16) - 2**15, 0.0).div_(1 - p)


def _uniform(rows, fan_in, device):  # the initialisation that LoRA's authors use for A
    values = torch.empty(rows, fan_in, device=device)
    return values if values.is_meta else values.uniform_(-1, 1) / math.sqrt(fan_in)


class LoRA(nn.Module):
    """y + (alpha/r) x A^T B^T (Hu et al. 2022), where y is a projection of x. A is [r, in], B [out, r] and 0 at the start;
    held in fp32, cast to x's dtype at use."""

    plain = False

    def __init__(self, n_in, n_out, rank, alpha, dropout, device=None):
        super().__init__()
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_a = nn.Parameter(_uniform(rank, n_in, device))
        self.lora_b = nn.Parameter(torch.zeros(n_out, rank, device=device))

    def forward(self, x, y):  # [..., in], [..., out] -> [..., out]
        if self.training and self.dropout:
            x = (F.dropout if self.plain else dropout)(x, self.dropout)
        return _add_product(y, F.linear(x, self.lora_a.to(x.dtype)), self.scale * self.lora_b.T)

    def merged(self, weight):  # [out, in] -> [out, in]
        return weight + self.scale * self.lora_b @ self.lora_a


class Linear(nn.Module):
    """y = x W^T + b, and LoRA where there is. Weights are cast to x's dtype at use.

    W is [out, in], or [in, out] where `conv1d` (GPT-2's orientation).
    """

    def __init__(self, n_in, n_out, bias=False, conv1d=False, lora=Adapters(), dtype=None, device=None):
        super().__init__()
        self.n_in, self.n_out, self.conv1d = n_in, n_out, conv1d
        shape = (n_in, n_out) if conv1d else (n_out, n_in)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(n_out, dtype=dtype, device=device)) if bias else None
        self.lora = None
        if lora.lora_rank:
            self.lora = LoRA(n_in, n_out, lora.lora_rank, lora.lora_alpha, lora.lora_dropout, device)

    @property
    def matrix(self):  # [out, in]
        return self.weight.T if self.conv1d else self.weight

    def forward(self, x):  # [..., in] -> [..., out]
        y = F.linear(x, self.matrix.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return y if self.lora is None else self.lora(x, y)

    def merge(self, rem=None):
        """W' = W + (alpha/r) B A, and with REM that times W_R of equation (3), in fp32; the bias stays. LoRA is gone after it."""
        weight = self.matrix.float()
        for module in (self.lora, rem):
            weight = weight if module is None else module.merged(weight)
        self.lora = None
        self.weight.copy_(weight.T if self.conv1d else weight)

    @classmethod
    def fused(cls, *parts):
        """The merged projections of one input as a single one: their outputs, one after the other."""
        one, outputs = parts[0], sum(part.n_out for part in parts)
        whole = cls(one.n_in, outputs, one.bias is not None, dtype=one.weight.dtype, device="meta")
        whole.weight = nn.Parameter(torch.cat([part.matrix for part in parts]), requires_grad=False)
        if one.bias is not None:
            whole.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
        return whole


class REM(nn.Module):
    """Reasoning Evolvement Module, equation (3): x -> x W_R^T with W_R = (alpha/d) R2 R1^T + I, in front of a projection. R1, R2 are
    [n, d]; R2 is 0 at the start, so REM starts as the identity."""

    def __init__(self, linear, adapters, device=None):
        super().__init__()
        n, d = linear.n_in, adapters.rem_rank
        self.scale = adapters.rem_alpha / d
        self.r1 = nn.Parameter(_uniform(d, n, device).T.contiguous())
        self.r2 = nn.Parameter(torch.zeros(n, d, device=device))

    def forward(self, x, linear):  # [..., n] -> [..., out]
        return linear(_add_product(x, x @ self.r1.to(x.dtype), self.scale * self.r2.T))

    def merged(self, weight):  # [out, n] -> [out, n]
        return weight + self.scale * (weight @ self.r2) @ self.r1.T


class SecondLoRA(LoRA):
    """What stands in for REM in Table 3: another LoRA on a projection, in the ST pathway only."""

    def __init__(self, linear, adapters, device=None):
        super().__init__(linear.n_in, linear.n_out, adapters.rem_rank, adapters.rem_alpha, adapters.lora_dropout, device)

    def forward(self, x, linear):  # [..., n] -> [..., out]
        return super().forward(x, linear(x))


class Projector(nn.Module):
    """From a hidden state to the next input embedding (CODI, Shen et al. 2025): linear, GELU, linear, layer norm, in fp32."""

    def __init__(self, n, device=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n, n, device=device), nn.GELU(), nn.Linear(n, n, device=device),
                                    nn.LayerNorm(n, device=device))  # fmt: skip

    def forward(self, x):  # [..., n] -> [..., n]
        return self.layers(x.float()).to(x.dtype)


def projections(x, parts, rems, plain=False):  # [..., in] -> one [..., out] for each part
    """The projections of one input, some through a REM (else None).

    In training from scratch, where there are more tokens than outputs, the weights, REM folded in, are joined into one product; not
    where it is to be `plain`, nor where a dropout stands in between.
    """
    trained = torch.is_grad_enabled() and all(part.lora is None and part.weight.requires_grad for part in parts)
    many = x[..., 0].numel() >= max(part.n_out for part in parts)
    if plain or not (trained and many) or any(isinstance(rem, SecondLoRA) for rem in rems):
        return [part(x) if rem is None else rem(x, part) for part, rem in zip(parts, rems, strict=True)]
    weights = [part.matrix if rem is None else rem.merged(part.matrix.float()) for part, rem in zip(parts, rems, strict=True)]
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts]).to(x.dtype)
    whole = torch.cat([weight.to(x.dtype) for weight in weights])
    return F.linear(x, whole, bias).split([part.n_out for part in parts], dim=-1)


class Norm(nn.Module):
    """RMSNorm (Llama, Qwen2), or LayerNorm where there is a bias (GPT-2); in fp32."""

    def __init__(self, config, dtype=None, device=None):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype, device=device))
        self.bias = None
        if config.model_type == "gpt2":
            self.bias = nn.Parameter(torch.zeros(config.hidden_size, dtype=dtype, device=device))

    def forward(self, x):  # [..., n] -> [..., n]
        if self.bias is None:
            y = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
        else:
            y = F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def rope_frequencies(config):
    """Radians per position of each of the e/2 rotations, fp32 [e/2]; with Llama-3's scaling of the slow ones."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = (config.rope_scaling[name] for name in LLAMA3_ROPE)
    turns = context * frequencies / (2 * math.pi)  # full turns within the context that the model was first trained on
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, stays as it is; 0: slow, `factor` times slower
    return keep * frequencies + (1 - keep) * frequencies / factor


def rope_table(positions, frequencies):  # [B, T], [e/2] -> two of [B, 1, T, e]
    """(cos, cos) and (-sin, sin) of the angles at these positions."""
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, rope):
    """Turns the pairs (x_i, x_{i + e/2}) by their position's angles: the split-half order of Hugging Face checkpoints.

    x [B, heads, T, e], rope: the `rope_table` of its positions -> [B, heads, T, e], computed in fp32.
    """
    cos, sin = rope
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


class KVCache:
    """Keys and values of every layer for B rows. Each row has its own positions.

    Rows are padded on the right, so row b's token at position p lies at index p. Whatever a row's padding left behind
    its last token is overwritten before any query can see it: a query at position p sees the indices 0..p. Where gradients
    are recorded, writing makes a new tensor, so that they flow through the cache.
    """

    def __init__(self, config, rows, length, dtype=torch.float32, device=None):
        length = min(length, config.max_position_embeddings)  # a longer row is refused by `Transformer.forward`
        shape = (rows, length, config.num_key_value_heads, config.head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]  # L of [B, length, g, e]
        self.v = [torch.zeros_like(k) for k in self.k]

    def update(self, layer, positions, k, v, end):
        """Writes k, v [B, g, T, e] at positions [B, T] (None: 0..T-1) and returns all of 0..end-1 as [B, g, end, e]."""
        rows, whole = torch.arange(len(k), device=k.device)[:, None], []
        for kept, new in ((self.k, k.transpose(1, 2)), (self.v, v.transpose(1, 2))):
            if positions is not None:
                write = torch.index_put if torch.is_grad_enabled() else torch.index_put_
                kept[layer] = write(kept[layer], (rows, positions), new)
            elif torch.is_grad_enabled():
                kept[layer] = torch.cat((new, kept[layer][:, end:]), dim=1)
            else:
                kept[layer][:, :end] = new
            whole.append(kept[layer][:, :end].transpose(1, 2))
        return whole


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values, LoRA on all four projections and REM before k and v."""

    plain = False

    def __init__(self, config, adapters, index, dtype=None, device=None):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.grouped = config.num_key_value_heads < config.num_attention_heads
        n, n_q = config.hidden_size, config.num_attention_heads * config.head_dim
        n_kv = config.num_key_value_heads * config.head_dim
        gpt2 = config.model_type == "gpt2"
        kind = dict(conv1d=gpt2, lora=adapters, dtype=dtype, device=device)
        bias = config.model_type != "llama"
        self.q_proj = Linear(n, n_q, bias, **kind)
        self.k_proj = Linear(n, n_kv, bias, **kind)
        self.v_proj = Linear(n, n_kv, bias, **kind)
        self.o_proj = Linear(n_q, n, gpt2, **kind)
        self.rem_k = self.rem_v = None
        self.qkv_proj, self.sizes = None, (n_q, n_kv, n_kv)  # after fuse(): in the place of q_proj, k_proj, v_proj
        if adapters.rem_rank:
            rem = SecondLoRA if adapters.rem_is_lora else REM
            self.rem_k, self.rem_v = rem(self.k_proj, adapters, device), rem(self.v_proj, adapters, device)

    def forward(self, x, silent, rope, cache, positions, end, mask, tail):
        """x [B, T, n] -> [B, T - tail, n]. rope: `rope_table` of the positions [B or 1, 1, T, e]; mask [B, 1, T, end] or [T - tail, T] of
        what is seen, None: all before; the rest as in `Transformer.forward`."""
        B, T, _ = x.shape
        if self.qkv_proj is not None:
            q, k, v = self.qkv_proj(x).split(self.sizes, dim=2)
        else:
            rems = (None, self.rem_k, self.rem_v) if silent else (None, None, None)
            q, k, v = projections(x, (self.q_proj, self.k_proj, self.v_proj), rems, self.plain)
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))  # [B, heads, T, e]
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(self.index, positions, k, v, end)  # [B, g, end, e]
        y = F.scaled_dot_product_attention(q[:, :, tail:], k, v, mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T - tail, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), or down(gelu(up(x))) in GPT-2, whose GELU is the tanh approximation."""

    plain = False

    def __init__(self, config, adapters, dtype=None, device=None):
        super().__init__()
        n, m, gpt2 = config.hidden_size, config.intermediate_size, config.model_type == "gpt2"
        kind = dict(bias=gpt2, conv1d=gpt2, lora=adapters if adapters.lora_mlp else Adapters(), dtype=dtype, device=device)
        self.gate_up_proj = None  # after fuse(): in the place of gate_proj, up_proj
        self.gate_proj = None if gpt2 else Linear(n, m, **kind)
        self.up_proj = Linear(n, m, **kind)
        self.down_proj = Linear(m, n, **kind)

    def forward(self, x):  # [..., n] -> [..., n]
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        elif self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        else:
            gate, up = projections(x, (self.gate_proj, self.up_proj), (None, None), self.plain)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config, adapters, index, dtype=None, device=None):
        super().__init__()
        self.input_layernorm = Norm(config, dtype, device)
        self.self_attn = Attention(config, adapters, index, dtype, device)
        self.post_attention_layernorm = Norm(config, dtype, device)
        self.mlp = MLP(config, adapters, dtype, device)

    def forward(self, x, silent, rope, cache, positions, end, mask, tail):  # [B, T, n] -> [B, T - tail, n]
        x = x[:, tail:] + self.self_attn(self.input_layernorm(x), silent, rope, cache, positions, end, mask, tail)
        return x + self.mlp(self.post_attention_layernorm(x))


# ------------------------------------------------------------------------------------------------------- transformer


class Transformer(nn.Module):
    """A decoder-only language model; see the head of this file.

    dtype: that of the base weights and of the computation (`compute_dtype`, where it is to differ: weights that are
    themselves trained stay in fp32). LoRA and REM are always fp32. The base is frozen where there is LoRA.
    random_init=False leaves the base weights for the caller to fill. ValueError where there is not so much memory.
    """

    def __init__(self, config, adapters=Adapters(), dtype=torch.float32, device=None, compute_dtype=None,
                 random_init=True):  # fmt: skip
        super().__init__()
        _check_memory(config, adapters, dtype, device)
        self.config, self.adapters, self.compute_dtype = config, adapters, compute_dtype or dtype
        self.merged = None  # after merge(): 'silent' or 'cot', the pathway that the weights now are
        self.plain, self.compiled = False, None  # see be_plain(), compile()
        self.activation_checkpointing = False  # keep a layer's input alone for the backward pass (not with a cache)
        kind = dict(dtype=dtype, device=device)
        V, n, gpt2 = config.vocab_size, config.hidden_size, config.model_type == "gpt2"
        self.embed_tokens = nn.Parameter(torch.empty(V, n, **kind))
        self.embed_positions = nn.Parameter(torch.empty(config.max_position_embeddings, n, **kind)) if gpt2 else None
        self.layers = nn.ModuleList(Block(config, adapters, i, **kind) for i in range(config.num_hidden_layers))
        self.norm = Norm(config, **kind)
        self.lm_head = None if config.tie_word_embeddings else nn.Parameter(torch.empty(V, n, **kind))
        for name, parameter in self.named_parameters():
            if adapters.lora_rank and not name.endswith(ADAPTED):
                parameter.requires_grad_(False)
        self.extra_rows = None
        if adapters.extra_rows:
            rows = torch.zeros(adapters.extra_rows, n, device=device)
            self.extra_rows = nn.Parameter(rows, requires_grad=adapters.train_extra_rows)
        self.projector = Projector(n, device) if adapters.projector else None
        self.frequencies = None if gpt2 else rope_frequencies(config).to(device or "cpu")
        if random_init:
            self.init_weights()

    @classmethod
    def from_pretrained(cls, directory, adapters=Adapters(), dtype=torch.float32, device=None, compute_dtype=None):
        """The model of a Hugging Face directory: config.json, and model.safetensors or the shards of an index.

        Raises FileNotFoundError or ValueError, naming the file and the field or tensor.
        """
        config, files = ModelConfig.from_pretrained(directory), _weight_files(directory)
        _load_base(cls.outline(config, adapters, len(files)), files, directory)  # compares, before memory is taken
        model = cls(config, adapters, dtype, device, compute_dtype, random_init=False)
        _load_base(model, files, directory)
        model.init_extra_rows()
        return model

    @classmethod
    def outline(cls, config, adapters, tensors):
        """The model without its numbers (on the device 'meta'), to be compared with the headers of files that hold so many
        tensors. Of more layers than these could fill, there is one."""
        layers = min(config.num_hidden_layers, tensors + 1)
        return cls(replace(config, num_hidden_layers=layers), adapters, device="meta", random_init=False)

    @torch.no_grad()
    def init_weights(self):
        """Random base weights: N(0, 1/fan_in), the projections back into the residual stream by 1/sqrt(2L) smaller; the
        embeddings of a tied head as a head, others N(0, 1/4), or weight decay has them before they have learned."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                std = 1 / math.sqrt(module.n_in)
                if name.endswith(("o_proj", "down_proj")):
                    std /= math.sqrt(2 * len(self.layers))
                module.weight.normal_(0, std)
        head = 1 / math.sqrt(self.config.hidden_size)
        self.embed_tokens.normal_(0, head if self.lm_head is None else 0.5)
        for table in (self.embed_positions, self.lm_head):
            if table is not None:
                table.normal_(0, head)
        self.init_extra_rows()

    @torch.no_grad()
    def init_extra_rows(self):
        """The mean of the embeddings; where there are several rows, which must differ, drawn around it as they are."""
        if self.extra_rows is not None:
            table = self.embed_tokens.float()
            self.extra_rows.copy_(table.mean(0).expand_as(self.extra_rows))
            if len(self.extra_rows) > 1:
                self.extra_rows.add_(table.std(0) * torch.randn_like(self.extra_rows))

    def compile(self, **how):
        """torch.compile of each layer: one graph serves all layers and lengths. With a cache they stay as they are."""
        self.compiled = [torch.compile(layer, dynamic=True, **how) for layer in self.layers]

    def embed(self, ids):  # [B, T] -> [B, T, n]
        if self.extra_rows is None:
            return F.embedding(ids, self.embed_tokens)
        V = self.config.vocab_size
        extra = F.embedding((ids - V).clamp(min=0), self.extra_rows).to(self.embed_tokens.dtype)
        return torch.where((ids >= V)[..., None], extra, F.embedding(ids.clamp(max=V - 1), self.embed_tokens))

    def forward(self, ids, silent=False, positions=None, cache=None, at=None, tail=0, end=None):
        """ids [B, T], or the embeddings themselves [B, T, n], -> hidden states after the final norm [B, T - tail, n].

        silent: the ST pathway (REM on).
        positions [B, T]: each token's position in its row, for decoding with a cache; 0..T-1 where None.
        cache: a KVCache, to be written and read.
        end: the largest position + 1, if known; otherwise it is read from the device, which waits.
        at: (rows [P], columns [P]) of some tokens; then also returns the output of every decoder layer there, before
        the final norm: (hidden, states [L, P, n]). Nothing else of the layers is kept.
        tail: the first index whose hidden state is asked for (not with positions, and `at` must not be below it); of the tokens
        before, the last layer computes keys and values only.
        """
        T = ids.shape[1]
        assert not (tail and positions is not None)
        mask, where = None, torch.arange(T, device=ids.device)[None]
        if positions is None:
            end = T
        else:
            end, where = end or int(positions.max()) + 1, positions
            mask = torch.arange(end, device=ids.device) <= positions[:, None, :, None]  # [B, 1, T, end]
        if end > self.config.max_position_embeddings:
            raise ValueError(f"a row of {end} tokens, but the model has {self.config.max_position_embeddings} positions")
        rope = None
        if self.frequencies is not None:
            self.frequencies = self.frequencies.to(ids.device)
            rope = rope_table(where, self.frequencies)
        x = ids if ids.is_floating_point() else self.embed(ids)
        if self.embed_positions is not None:
            x = x + F.embedding(where, self.embed_positions)
        x, states = x.to(self.compute_dtype), []
        for i, layer in enumerate(self.compiled if self.compiled and cache is None else self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                layer = partial(checkpoint, layer, use_reentrant=False)
            first = tail if i == len(self.layers) - 1 else 0
            if first:
                mask = where <= where[0, first:, None]  # [T - tail, T]
            x = layer(x, silent, rope, cache, positions, end, mask, first)
            if at is not None:
                states.append(x[at[0], at[1] - first])  # [P, n]
        hidden = self.norm(x)
        return hidden if at is None else (hidden, torch.stack(states))

    @property
    def head(self):  # [V, n]
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden):  # [..., n] -> [..., V]
        """Scores of the V tokens of the vocabulary; an extra row is only ever read, never predicted."""
        return F.linear(hidden, self.head.to(hidden.dtype))

    @torch.no_grad()
    def merge(self, silent=True):
        """Folds LoRA and (silent) REM into the weights: after it the model is an ordinary one of its family, in
        `compute_dtype`, and does what the pathway did. A second call changes nothing. Returns the model.

        Raises ValueError where the weights are already those of the other pathway.
        """
        pathway = "silent" if silent else "cot"
        if self.merged not in (None, pathway):
            raise ValueError(f"the weights were merged for the {self.merged} pathway; load them again for the other")
        for layer in self.layers:
            attention = layer.self_attn
            rem = {attention.k_proj: attention.rem_k, attention.v_proj: attention.rem_v} if silent else {}
            attention.rem_k = attention.rem_v = None
            for module in layer.modules():
                if isinstance(module, Linear):
                    module.merge(rem.get(module))
        self.merged = pathway
        projector, self.projector = self.projector, None  # is no part of the ordinary model, and stays in fp32
        self.to(self.compute_dtype)
        self.projector = projector
        return self.requires_grad_(False)

    @torch.no_grad()
    def fuse(self):
        """After merge(): q, k and v as one product, gate and up as one, for faster answers. Returns the model, whose weights no longer
        go by a checkpoint's names. ValueError before merge()."""
        if self.merged is None:
            raise ValueError("only a merged model can be fused")
        for layer in self.layers:
            attention, mlp = layer.self_attn, layer.mlp
            attention.qkv_proj = Linear.fused(attention.q_proj, attention.k_proj, attention.v_proj)
            attention.q_proj = attention.k_proj = attention.v_proj = None
            if mlp.gate_proj is not None:
                mlp.gate_up_proj = Linear.fused(mlp.gate_proj, mlp.up_proj)
                mlp.gate_proj = mlp.up_proj = None
        return self

    def be_plain(self):
        """From now on training takes none of the shortcuts: one product for each projection, F.dropout (which draws other random
        numbers on a CPU), all logits at once, all of the last layer (dart.py). Returns the model."""
        for module in self.modules():
            module.plain = True
        return self

    def training_flops(self, lengths, learned, silent=False):
        """Floating-point operations (two for a multiply-add) of a plain forward and backward pass over rows of the given lengths
        [B], with logits for `learned` tokens: the matrix products, of frozen weights without their own gradient, and the
        attention between the pairs of tokens that see each other. Norms and the like are left out."""
        lengths, config = np.asarray(lengths, dtype=np.float64), self.config
        width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
        total = 3 * 4 * width * (lengths * (lengths + 1) / 2).sum()
        for name, p in self.layers.named_parameters():
            if p.dim() == 2 and (silent or ".rem_" not in name):
                total += (3 if p.requires_grad else 2) * 2 * lengths.sum() * p.numel()
        return float(total + (3 if self.head.requires_grad else 2) * 2 * learned * self.head.numel())

    def adapter_state(self, complete=False):
        """What a run must keep, name -> tensor: all that is trained, and the extra rows; complete: the frozen rest, too,
        where it can be had from nowhere else."""
        return {name: p.detach() for name, p in self.named_parameters() if complete or p.requires_grad or name == "extra_rows"}

    def load_adapter_state(self, path, complete=False):
        """Reads a safetensors file of `adapter_state`; on the device 'meta' only compares its header. Raises ValueError for a
        missing, extra or mis-shaped tensor."""
        own, stored = self.adapter_state(complete), tensors_of(path)
        if odd := sorted(set(stored) ^ set(own)):
            raise ValueError(f"{path}: {odd[0]} and {len(odd) - 1} other tensors are on one side only: the file is "
                             f"of a model with other adapters")  # fmt: skip
        for name, tensor in own.items():
            _check(tensor, stored[name])
        for name, tensor in own.items():
            _copy(tensor, stored[name])


# ----------------------------------------------------------------------------------------------------------- loading


def _expect(raw, **supported):
    """Refuses a configuration whose field, where it is given, is not what the code computes."""
    for name, values in supported.items():
        if name in raw and raw[name] not in values:
            raise ValueError(f"{name} = {raw[name]!r} is not supported (only {', '.join(map(repr, values))})")


def _read_llama(raw):
    layer_types = sorted(set(raw.get("layer_types") or ["full_attention"]))
    _expect(raw | {"layer_types": layer_types}, model_type=("llama", "qwen2"), hidden_act=("silu",), mlp_bias=(False,),
            attention_bias=(False,) if raw.get("model_type") == "llama" else (True, False), quantization_config=(None,),
            use_sliding_window=(False,), layer_types=(["full_attention"],))  # fmt: skip
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    _expect(raw | rope, partial_rotary_factor=(1.0, None))
    if raw.get("rope_parameters") and rope != raw["rope_parameters"]:
        raise ValueError("rope_scaling and rope_parameters are both there, and differ")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope type {rope_type!r} is not supported (only 'default', 'llama3')")
    for name in {"rope_theta", "original_max_position_embeddings"} & raw.keys() & rope.keys():
        if raw[name] != rope[name]:
            raise ValueError(f"{name} is {raw[name]!r}, but {rope[name]!r} among the parameters of the rope")
    heads = raw["num_attention_heads"]
    return ModelConfig(
        model_type=raw["model_type"], vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"], num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=heads,
        num_key_value_heads=heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        max_position_embeddings=raw["max_position_embeddings"], norm_eps=raw["rms_norm_eps"],
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        rope_scaling={name: float((raw | rope)[name]) for name in LLAMA3_ROPE} if rope_type == "llama3" else None,
    )  # fmt: skip


def _read_gpt2(raw):
    _expect(raw, activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,), quantization_config=(None,))  # fmt: skip
    n, heads = raw["n_embd"], raw["n_head"]
    if type(n) is not int or type(heads) is not int:  # a text % heads could be of any length
        raise ValueError(f"n_embd {n!r} or n_head {heads!r} is not a whole number")
    if n % heads:
        raise ValueError(f"n_embd {n} is not a multiple of n_head {heads}")
    return ModelConfig(
        model_type="gpt2", vocab_size=raw["vocab_size"], hidden_size=n, intermediate_size=raw.get("n_inner") or 4 * n,
        num_hidden_layers=raw["n_layer"], num_attention_heads=heads, num_key_value_heads=heads, head_dim=n // heads,
        max_position_embeddings=raw["n_positions"], norm_eps=raw["layer_norm_epsilon"],
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
    )  # fmt: skip


GPT2_NAMES = {"embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "input_layernorm": "ln_1",
              "post_attention_layernorm": "ln_2", "self_attn": "attn", "up_proj": "c_fc", "norm": "ln_f",
              "q_proj": "c_attn", "k_proj": "c_attn", "v_proj": "c_attn", "o_proj": "c_proj", "down_proj": "c_proj"}  # fmt: skip


def _checkpoint_names(model):
    """For each base parameter: its name in a Hugging Face checkpoint, without the model's prefix, and which third of
    GPT-2's c_attn it is (None elsewhere)."""
    for name, parameter in model.named_parameters():
        parts, third = name.split("."), None
        if parts[-1] in (*ADAPTED, "extra_rows") or parts[0] == "projector":
            continue
        if parts[-1] in ("embed_tokens", "embed_positions", "lm_head"):
            parts.append("weight")
        if model.config.model_type == "gpt2":
            if GPT2_NAMES.get(parts[-2]) == "c_attn":
                third = "qkv".index(parts[-2][0])
            parts = [GPT2_NAMES.get(part, part) for part in parts]
        yield ".".join(parts), parameter, third


def _open_safetensors(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


class Stored(NamedTuple):
    """A tensor as a safetensors file's header has it; dtype: F32 and the like."""

    path: Path
    name: str
    shape: list
    dtype: str


def tensors_of(path):
    """{tensor name: Stored} of a safetensors file. FileNotFoundError, or ValueError with the path."""
    with _open_safetensors(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {name: Stored(path, name, part.get_shape(), part.get_dtype()) for name, part in parts.items()}


def _weight_files(directory):
    """{tensor name: Stored}, of model.safetensors, or of the shards that an index lists."""
    path = Path(directory) / "model.safetensors"
    if path.is_file():
        return tensors_of(path)
    index = Path(f"{path}.index.json")
    if not index.is_file():
        raise FileNotFoundError(f"{path}: no such file, nor {index.name} (weights in other formats are not read)")
    try:
        if index.stat().st_size > 2**26:
            raise ValueError("too large")
        listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        paths = {shard: index.with_name(shard) for shard in sorted(set(listed.values()))}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of files beside it ({error!r})") from None
    files = {}
    for shard, path in paths.items():
        stored = tensors_of(path)
        if odd := {name for name in listed if listed[name] == shard} ^ set(stored):
            raise ValueError(f"{index}: {min(odd)} is in {shard} or in its list here, but not in both")
        files |= stored
    return files


FLOATS = ("F64", "F32", "F16", "BF16")


def _check(parameter, stored, third=None):
    """ValueError unless a stored tensor (or that third of its last dimension) can be the parameter's value."""
    want = list(parameter.shape) if third is None else [*parameter.shape[:-1], 3 * parameter.shape[-1]]
    if stored.shape != want:
        raise ValueError(f"{stored.path}: {stored.name} has the shape {stored.shape}, the configuration asks for {want}")
    if stored.dtype not in FLOATS:
        raise ValueError(f"{stored.path}: {stored.name} is {stored.dtype}, not a floating-point tensor ({', '.join(FLOATS)})")


@torch.no_grad()
def _copy(parameter, stored, third=None):
    """parameter <- a stored tensor that was checked; nothing on the device 'meta'. The file is mapped for this tensor alone,
    or the pages of all that was read before would count as memory in use."""
    if parameter.is_meta:
        return
    with _open_safetensors(stored.path) as file:
        part, size = file.get_slice(stored.name), parameter.shape[-1]
        parameter.copy_(part[:] if third is None else part[..., third * size : (third + 1) * size])


def _check_memory(config, adapters, dtype, device):
    """ValueError where the machine, or the GPU, has less memory than the weights take."""
    device = torch.device(device or "cpu")
    if device.type == "meta":
        return
    one = Transformer(replace(config, num_hidden_layers=1), adapters, dtype, "meta", random_init=False)
    whole, layer = (sum(p.numel() * p.element_size() for p in module.parameters()) for module in (one, one.layers))
    need = whole + (config.num_hidden_layers - 1) * layer
    gpu = device.type == "cuda"
    have = torch.cuda.mem_get_info(device)[1] if gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ValueError(f"the weights of this configuration take {need / 2**30:.1f} GiB, more than the {have / 2**30:.1f} GiB "
                         f"of the {'GPU' if gpu else 'machine'}")  # fmt: skip


def _load_base(model, files, directory):
    """Fills the base weights from the directory's `_weight_files`, or only compares them with the headers, on the device 'meta'.
    Every tensor is used, or known to say nothing new."""
    prefix = "transformer." if model.config.model_type == "gpt2" else "model."
    stored, used = {}, set()
    for name in files:
        if stored.setdefault(name.removeprefix(prefix), name) != name:
            raise ValueError(f"{directory}: {name} is there with and without {prefix!r}")
    for name, parameter, third in _checkpoint_names(model):
        if name not in stored:
            raise ValueError(f"{directory}: the tensor {'' if name == 'lm_head.weight' else prefix}{name} is missing")
        _check(parameter, files[stored[name]], third)
        _copy(parameter, files[stored[name]], third)
        used.add(name)
    ignorable = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # causal masks, rope: computed here
    for name in stored.keys() - used:
        tensor, tied = files[stored[name]], name == "lm_head.weight" and model.config.tie_word_embeddings
        if tied and not _same(model.embed_tokens, tensor):
            raise ValueError(f"{tensor.path}: {name} is not the embedding, though tie_word_embeddings is true")
        if not tied and not name.endswith(ignorable):
            raise ValueError(f"{tensor.path}: the tensor {tensor.name} has no place in this model")


def _same(parameter, stored, rows=8192):
    """Is a stored tensor the parameter [V, n]? Some rows are read at a time; on the device 'meta' shape and type are all."""
    if stored.shape != list(parameter.shape) or stored.dtype not in FLOATS:
        return False
    for start in range(0, 0 if parameter.is_meta else len(parameter), rows):
        with _open_safetensors(stored.path) as file:
            part, mine = file.get_slice(stored.name)[start : start + rows], parameter[start : start + rows]
        if not torch.equal(part.to(mine), mine):
            return False
    return True


# ------------------------------------------------------------------------------------------------------------ export


def write_config(config):
    """The fields of a Hugging Face `config.json`, as transformers of version 4, too, and vLLM know them."""
    if config.model_type == "gpt2":
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size, "n_embd": config.hidden_size,
                "n_inner": config.intermediate_size, "n_layer": config.num_hidden_layers, "n_head": config.num_attention_heads,
                "n_positions": config.max_position_embeddings, "layer_norm_epsilon": config.norm_eps,
                "activation_function": "gelu_new", "tie_word_embeddings": config.tie_word_embeddings}  # fmt: skip
    raw = asdict(config)
    raw |= {"architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]],
            "hidden_act": "silu", "rms_norm_eps": raw.pop("norm_eps")}  # fmt: skip
    if scaling := raw["rope_scaling"]:
        context = int(scaling["original_max_position_embeddings"])
        raw["rope_scaling"] = {"rope_type": "llama3", **scaling, "original_max_position_embeddings": context}
    return raw


@torch.no_grad()
def export_hf(model, directory, st_id=None, tokens=None, shard_bytes=5 * 10**9):
    """Writes a merged model into a directory as Hugging Face's libraries read it: config.json, generation_config.json, and
    model.safetensors or, above `shard_bytes`, shards and their index.

    st_id: where the embedding of the model's extra row goes, below V or V itself; None: nowhere. tokens: {"bos_token_id": ..., ...},
    for both configurations. Returns the number of weights. Raises ValueError for a model that is not merged, or `fuse`d, and OSError.
    """
    if model.merged is None or model.layers[0].self_attn.q_proj is None:
        raise ValueError("only a merged model, not a fused one, has the weights of a checkpoint")
    config, tokens = model.config, tokens or {}
    head, embed, V = model.head, model.embed_tokens, model.config.vocab_size
    if st_id is not None:
        row = model.extra_rows[:1].to(embed.dtype)
        if st_id == V:  # a new token's score is the mean of all: it is never the largest
            head = torch.cat((head, head.float().mean(0, keepdim=True).to(head.dtype)))
        embed = torch.cat((embed[:st_id], row, embed[st_id + 1 :]))
        # a row that is not trained is the mean itself, and need not be told from the head's
        tied = config.tie_word_embeddings and not model.adapters.train_extra_rows
        config = replace(config, vocab_size=len(embed), tie_word_embeddings=tied)
    prefix, parts = "transformer." if config.model_type == "gpt2" else "model.", {}
    for name, parameter, _ in _checkpoint_names(model):  # c_attn's thirds in their order
        parts.setdefault(prefix + name, []).append(parameter)
    parts.pop(f"{prefix}lm_head.weight", None)
    parts[prefix + ("wte.weight" if config.model_type == "gpt2" else "embed_tokens.weight")] = [embed]
    if not config.tie_word_embeddings:
        parts["lm_head.weight"] = [head]
    shards, size = [[]], 0
    for name, some in parts.items():
        more = sum(part.nbytes for part in some)
        if shards[-1] and size + more > shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += more
    directory, files = Path(directory), ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        index = {"metadata": {"total_size": sum(part.nbytes for some in parts.values() for part in some)},
                 "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names}}  # fmt: skip
        _write_json(directory / "model.safetensors.index.json", index)
    for file, names in zip(files, shards, strict=True):
        save_file({name: torch.cat(parts[name], dim=-1).cpu() for name in names}, directory / file, {"format": "pt"})
    dtype = {"torch_dtype": str(embed.dtype).removeprefix("torch.")}
    _write_json(directory / "config.json", write_config(config) | dtype | tokens)
    _write_json(directory / "generation_config.json", {"do_sample": False, **tokens})
    return sum(part.numel() for some in parts.values() for part in some)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":  # python model.py export RUN_DIR HF_DIR
    import eval as evaluation  # the one place that looks up: a run is what train.py writes and eval.py reads

    evaluation.run_program(evaluation.export)
