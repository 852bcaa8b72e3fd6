"""Makes tests/fixtures: tiny random models of the three families with what Hugging Face transformers computes for them.

    pip install transformers && python tests/make_fixtures.py

Each directory holds config.json and model.safetensors as `save_pretrained` writes them, and expected.safetensors: ids
[1, 320], and at some positions the logits [P, V] and the output of every decoder layer [L, P, n], before the final norm.
Every weight is drawn large enough to matter; the context that the rope is scaled for is short, so that it does, too.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

T = 320
POSITIONS = [*range(0, T, 16), *range(T - 12, T)]
ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=128)  # fmt: skip
SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=512)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=ROPE, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=512),
}


def make(directory, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = ("norm" in name or "ln_" in name) * ("weight" in name) + 0.2 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) * (0.5 if "emb" in name or "wte" in name else 0.2)
    outputs = []
    layers = model.transformer.h if config.model_type == "gpt2" else model.model.layers
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    ids = torch.randint(0, config.vocab_size, (1, T))
    with torch.no_grad():
        logits = model(ids).logits[0, POSITIONS]
    states = torch.stack([out[0, POSITIONS] for out in outputs])
    model.save_pretrained(directory)
    expected = {"ids": ids, "positions": torch.tensor(POSITIONS), "logits": logits, "states": states}
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, directory / "expected.safetensors")


if __name__ == "__main__":
    for name, config in CONFIGS.items():
        directory = Path(__file__).parent / "fixtures" / name
        directory.mkdir(parents=True, exist_ok=True)
        make(directory, config)
        (directory / "generation_config.json").unlink(missing_ok=True)
