"""One DART training step of ours beside the same step written the ordinary way on transformers and peft.

    python tests/bench_train.py --data FILE --tokenizer DIR                  FILE: GSM8K-Aug's format; DIR: Llama 3's
    python tests/bench_train.py --data FILE --tokenizer DIR --dtype bf16 --vocab 128256

`ordinary`: REM by hooks, all hidden states, all logits, one backward pass, random batches padded to the longest row;
`tuned`: the same in our batches, whose rows are of about one length. First both must have the same losses and gradients (fp32,
without dropout); then the same problems are trained on in turns. The floor is the time that the products of the plain computation
need (forward, the gradients of all inputs, of LoRA's and REM's weights, logits of learned tokens alone; no padding), at the rate at
which this machine does those of a layer; ours leaves out a part of the last layer. The last line is JSON.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import dart
import data
import eval as evaluation
import train
from model import MODELS, ModelConfig, Transformer

# Llama-3.2-1B's proportion of body to head, small enough for a CPU
LLAMAS = ("llama-3.2-1b", "llama-3.2-3b")
SMALL = ModelConfig("llama", 32064, 512, 2048, 16, 8, 2, 64, 4096, 1e-5, True, 5e5)


class Modulo:
    """A tokenizer whose ids are folded into a smaller vocabulary: only the lengths are real."""

    def __init__(self, tokenizer, size):
        self.tokenizer, self.size = tokenizer, size
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id % size
        self.reserved = [i % size for i in tokenizer.reserved]

    def encode(self, text, **how):
        return [i % self.size for i in self.tokenizer.encode(text, **how)]


def hugging_face(config):
    """A LlamaForCausalLM of the same architecture, with weights of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "llama3", **config.rope_scaling}
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings, rope_parameters=rope,
        max_position_embeddings=config.max_position_embeddings, attn_implementation="sdpa"))  # fmt: skip


class Ours:
    def __init__(self, options, config, tokenizer, problems, device, dropout):
        recipe = dict(lora_dropout=dropout, batch_size=options.rows, micro_batch_size=options.rows, dtype=options.dtype)
        self.options = train.Options(**train.PRESETS["llama-3.2-1b"] | recipe)
        self.device, cls = device, dart.DART
        torch.manual_seed(0)
        dtype = evaluation.DTYPES[options.dtype]
        model = Transformer(config, cls.adapters(tokenizer, self.options), dtype, device)
        model.activation_checkpointing = options.activation_checkpointing
        if options.plain:
            model.be_plain()
        if options.compile:
            model.compile()
        method = cls(model, tokenizer, self.options)
        with torch.no_grad():  # not 0, as at the start, or most gradients were 0
            for name, p in model.named_parameters():
                if name.endswith(("lora_b", "r2")):
                    p.normal_(0, 0.02)
        rows = {name: [pathway.row(problem, tokenizer) for problem in problems] for name, pathway in method.pathways.items()}
        lengths = np.array([[len(row.ids) for row in some] for some in rows.values()]).T
        optimizer = train.make_optimizer(model, self.options)
        self.run = train.Run(self.options, method, optimizer, problems, rows, lengths, [], 1, 1, {}, train.Progress())
        self.parameters = [p for p in method.parameters() if p.requires_grad]

    def backward(self, batch):
        micro_batches = train.make_micro_batches(self.run, 1, batch, 0, 1, self.device)
        return train.train_step(self.run.method, self.run.method, micro_batches, len(batch))

    def step(self, batch):
        losses = self.backward(batch)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.grad_clip)
        self.run.optimizer.step()
        self.run.optimizer.zero_grad()
        return losses

    def flops(self, batches):
        """What the batches cost without padding."""
        micro = (micro for batch in batches for micro in train.make_micro_batches(self.run, 1, batch, 0, 1, self.device))
        return sum(sum(one.flops.values()) for one in micro)

    def gradients(self):
        return {name: p.grad for name, p in self.run.method.model.named_parameters() if p.grad is not None}


class Ordinary:
    """The same model, from `ours`, and the same step."""

    def __init__(self, ours):
        from peft import LoraConfig, get_peft_model

        self.options, self.run, self.device, source = ours.options, ours.run, ours.device, ours.run.method.model
        bf16 = ours.options.dtype == "bf16"
        self.model = hugging_face(source.config)
        self.model.to(self.device, torch.bfloat16 if bf16 else torch.float32)
        self.model = get_peft_model(self.model, LoraConfig(
            r=self.options.lora_rank, lora_alpha=self.options.lora_alpha, lora_dropout=self.options.lora_dropout,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))  # fmt: skip
        self.autocast = torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=bf16)
        self.silent, self.rem, self.last = False, torch.nn.ParameterDict(), None
        theirs = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, p in source.named_parameters():
                if name.endswith(("r1", "r2")):
                    self.rem[name.replace(".", "/")] = p.clone()
                else:
                    theirs[self.name(name)].copy_(p)
        self.rem.to(self.device)
        layers = self.model.base_model.model.model.layers
        for i, layer in enumerate(layers):
            for which in "kv":
                r1, r2 = (self.rem[f"layers/{i}/self_attn/rem_{which}/{r}"] for r in ("r1", "r2"))
                getattr(layer.self_attn, f"{which}_proj").register_forward_pre_hook(self.hook(r1, r2))
        layers[-1].register_forward_hook(self.keep_last)
        self.parameters = [p for p in (*self.model.parameters(), *self.rem.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.options.lr, fused=True)

    @staticmethod
    def name(ours):
        name = "base_model.model.model." + ours
        for a, b in {"lora.lora_a": "lora_A.default.weight", "lora.lora_b": "lora_B.default.weight"}.items():
            name = name.replace(a, b)
        if name.endswith("_proj.weight") and "self_attn" in name:
            name = name.replace("_proj.weight", "_proj.base_layer.weight")
        return name + ".weight" * name.endswith("embed_tokens")

    def hook(self, r1, r2):
        scale = self.options.rem_alpha / self.options.rem_rank
        return lambda _, inputs: (inputs[0] + scale * (inputs[0] @ r1) @ r2.T,) if self.silent else None

    def keep_last(self, _, __, output):
        self.last = output if isinstance(output, torch.Tensor) else output[0]

    def forward(self, name):
        """(cross-entropy, states at z_N [L, B, n]) of a pathway. The last of `hidden_states` has gone through the final norm."""
        self.silent, (ids, mask, weight, at) = name == "st", self.batch[name]
        out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        logits, targets = out.logits[:, :-1].float(), ids[:, 1:].masked_fill(weight[:, 1:] == 0, -100)
        nll = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none", ignore_index=-100)
        states = torch.stack([*out.hidden_states[1:-1], self.last])
        return (nll * weight[:, 1:].reshape(-1)).sum() / len(ids), states[:, torch.arange(len(ids)), at].float()

    def backward(self, batch):
        self.batch = {}
        for name, rows in self.run.rows.items():
            some = data.collate([rows[i] for i in batch], self.run.method.tokenizer.eos_id).to(self.device)
            weight = torch.zeros(some.ids.shape, device=self.device)
            weight[some.row, some.col] = some.weight
            mask = torch.arange(some.ids.shape[1], device=self.device) < some.end[:, None]
            self.batch[name] = some.ids, mask.long(), weight, some.at
        with self.autocast:
            (cot, teacher), (st, student) = self.forward("cot"), self.forward("st")
        teacher = teacher.detach()
        distill = ((teacher - student).abs().mean((1, 2)) / teacher.flatten(1).std(1)).mean()
        (cot + st + self.options.distill_weight * distill).backward()
        return {"cot": cot.detach(), "st": st.detach(), "distill": distill.detach()}

    def step(self, batch):
        losses = self.backward(batch)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def gradients(self):
        found = {name: p.grad for name, p in self.model.named_parameters()}
        return {name: self.rem[name.replace(".", "/")].grad if name.endswith(("r1", "r2")) else found[self.name(name)]
                for name, p in self.run.method.model.named_parameters() if p.requires_grad}  # fmt: skip


def check(ours, ordinary, batch):
    """Losses and gradients agree to 1e-4; returns the largest relative differences."""
    losses, theirs = ours.backward(batch), ordinary.backward(batch)
    loss = max(abs(losses[name].item() / theirs[name].item() - 1) for name in theirs)
    wanted, found = ordinary.gradients(), ours.gradients()
    assert wanted.keys() == found.keys() and all(wanted[name].abs().max() > 0 for name in wanted)
    gradient = max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)
    assert loss < 1e-4 and gradient < 1e-4, f"not the same step: losses differ by {loss:.1e}, gradients by {gradient:.1e}"
    return {"loss": loss, "gradient": gradient}


def synchronised(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(config, tokens, dtype, device):
    """FLOP/s of the products of a layer's frozen weights with so many tokens, forwards and back."""
    n, e = config.hidden_size, config.head_dim
    kv, q, m = config.num_key_value_heads * e, config.num_attention_heads * e, config.intermediate_size
    shapes = [(n, q), (n, kv), (n, kv), (q, n), (n, m), (n, m), (m, n)]
    pairs = [(torch.randn(tokens, a, dtype=dtype, device=device), torch.randn(b, a, dtype=dtype, device=device)) for a, b in shapes]
    grads = [torch.randn(tokens, b, dtype=dtype, device=device) for _, b in shapes]

    def products():
        for (x, weight), grad in zip(pairs, grads, strict=True):
            F.linear(x, weight)
            grad @ weight

    seconds = []
    for _ in range(12):
        start = synchronised(device)
        products()
        seconds.append(synchronised(device) - start)
    return 4 * tokens * sum(a * b for a, b in shapes) / statistics.median(seconds[2:])


def padding(rows, batches):
    """The share of padding in both pathways' batches."""
    lengths = [np.array([[len(rows[name][i].ids) for i in batch] for batch in batches]) for name in rows]
    return 1 - sum(some.sum() for some in lengths) / sum((some.max(1) * some.shape[1]).sum() for some in lengths)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="file of problems in GSM8K-Aug's format")
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer")
    parser.add_argument("--model", default="small", choices=("small", *LLAMAS), help="whose shapes")
    parser.add_argument("--vocab", type=int, default=0, help="another vocabulary size")
    parser.add_argument("--dtype", default="fp32", choices=tuple(evaluation.DTYPES))
    parser.add_argument("--rows", type=int, default=16, help="problems in a step")
    parser.add_argument("--batches", type=int, default=8, help="batches that are timed, of short to long rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.1, help="LoRA's")
    for flag in ("plain", "compile", "activation_checkpointing"):
        parser.add_argument(f"--{flag}", action="store_true", help="ours: as the option of train.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", choices=("ours", "ordinary"), help="only the peak memory of a step, in this process")
    options = parser.parse_args()
    config = SMALL if options.model == "small" else MODELS[options.model]
    config = dataclasses.replace(config, vocab_size=options.vocab or config.vocab_size)
    problems, device = data.read_gsm8k_aug(options.data), options.device
    tokenizer = Modulo(data.Tokenizer.from_pretrained(options.tokenizer), config.vocab_size)

    ours = Ours(options, config, tokenizer, problems, device, options.dropout)
    every = data.epoch_batches(ours.run.lengths, options.rows, 0, 0)
    every.sort(key=lambda batch: ours.run.lengths[batch].sum())
    at = (np.arange(options.batches) + 0.5) * len(every) / options.batches
    grouped = [every[int(i)] for i in at]
    mixed = np.split(np.random.default_rng(0).permutation(np.concatenate(grouped)), len(grouped))
    if options.memory:
        subject, batches = (ours, grouped) if options.memory == "ours" else (Ordinary(ours), mixed)
        if options.memory == "ordinary":
            ours.run.method, ours.run.optimizer, ours.parameters = argparse.Namespace(tokenizer=tokenizer), None, None
        batch = max(batches, key=lambda batch: ours.run.lengths[batch].max())
        train.reset_peak_memory(device)
        start = train.peak_memory(device)
        subject.step(batch)
        subject.step(batch)
        print(json.dumps({"start": start, "peak": train.peak_memory(device)}))
        return

    fp32 = argparse.Namespace(**vars(options) | {"dtype": "fp32"})
    plain = Ours(fp32, config, tokenizer, problems, device, 0.0)
    agreement = check(plain, Ordinary(plain), grouped[len(grouped) // 2])
    print(f"the same step: losses to {agreement['loss']:.1e}, gradients to {agreement['gradient']:.1e} (fp32, no dropout)")
    del plain
    ordinary = Ordinary(ours)
    variants = {"ours": (ours, grouped), "tuned": (ordinary, grouped), "ordinary": (ordinary, mixed)}
    seconds = {name: [] for name in variants}
    for repeat in range(options.repeats + 1):  # the first one is the warm-up
        total = dict.fromkeys(variants, 0.0)
        for i in range(len(grouped)):
            for name, (subject, batches) in variants.items():
                start = synchronised(device)
                subject.step(batches[i])
                total[name] += synchronised(device) - start
        for name in variants:
            seconds[name] += [total[name]] * (repeat > 0)
    tokens = int(ours.run.lengths[np.concatenate(grouped)].sum())
    rate = matmul_rate(config, tokens // (2 * len(grouped)), evaluation.DTYPES[options.dtype], device)
    flops, rows = ours.flops(grouped), options.rows * len(grouped)
    floor = flops / rate
    result = {"options": vars(options), "torch": torch.__version__, "threads": torch.get_num_threads(), **agreement,
              "tokens": tokens, "flops": flops, "matmul_rate": rate, "floor_examples_per_s": rows / floor}  # fmt: skip
    table = []
    for name, (_, batches) in variants.items():
        time_of = statistics.median(seconds[name])
        figures = {"examples/s": rows / time_of, "tokens/s": tokens / time_of, "padding": padding(ours.run.rows, batches),
                   "of the floor": floor / time_of, "ours / this": time_of / statistics.median(seconds["ours"]),
                   "spread": (max(seconds[name]) - min(seconds[name])) / time_of}  # fmt: skip
        if name != "tuned":
            command = [sys.executable, __file__, *sys.argv[1:], "--memory", name]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            figures |= json.loads(lines[-1])
        result[name] = figures
        table.append({"": name, "examples/s": f"{figures['examples/s']:.2f}", "tokens/s": f"{figures['tokens/s']:,.0f}",
                      "padding %": f"{100 * figures['padding']:.1f}", "% of the floor": f"{100 * figures['of the floor']:.0f}",
                      "ours / this": f"{figures['ours / this']:.2f}", "spread %": f"{100 * figures['spread']:.0f}",
                      "peak GiB": f"{figures['peak'] / 2**30:.2f}" if "peak" in figures else "-",
                      "above start": f"{(figures['peak'] - figures['start']) / 2**30:.2f}" if "peak" in figures else "-"})  # fmt: skip
    print(f"floor: {flops / rows / 1e9:.1f} GFLOP an example at {rate / 1e9:.0f} GFLOP/s = {rows / floor:.2f} examples/s")
    print(evaluation.markdown(table))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
