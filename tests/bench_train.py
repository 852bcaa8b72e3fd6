"""A DART training step of ours beside the same step, the ordinary way, on transformers and peft.

    python tests/bench_train.py --data FILE --tokenizer DIR
    python tests/bench_train.py --data FILE --tokenizer DIR --dtype bf16 --vocab 128256
    python tests/bench_train.py --model smollm2-135m --data calls --tokenizer DIR --rows 32

FILE: problems in GSM8K-Aug's format; DIR: the model's tokenizer. `ordinary`: REM by hooks, all hidden
states, all logits, one backward pass, random batches padded to the longest row; `tuned`: the same
in our batches, whose rows are of about one length. First both must have the same losses and
gradients (fp32, without dropout, with the smooth norm: at the kink of the L1 norm rounding turns a
gradient's sign); then the same problems are trained on in turns, with the L1 norm. The last line is
JSON.
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
LLAMAS = ("llama-3.2-1b", "llama-3.2-3b", "smollm2-135m")
SMALL = ModelConfig("llama", 32064, 512, 2048, 16, 8, 2, 64, 4096, rope_theta=5e5)


class Modulo:
    """A tokenizer whose ids are folded into a smaller vocabulary: only the lengths are real."""

    def __init__(self, tokenizer, size):
        self.tokenizer, self.size = tokenizer, size
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id % size
        self.reserved = [i % size for i in tokenizer.reserved] or [size - 1]  # for <st>

    def encode(self, text, **how):
        return [i % self.size for i in self.tokenizer.encode(text, **how)]


def hugging_face(config, device):
    """A LlamaForCausalLM of the same architecture, with weights of its own, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "llama3", **config.rope_scaling}
    theirs = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=rope,
        max_position_embeddings=config.max_position_embeddings,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        return LlamaForCausalLM(theirs)


class Ours:
    def __init__(self, options, config, tokenizer, problems, **more):
        recipe = dict(batch_size=options.rows, micro_batch_size=options.rows, dtype=options.dtype)
        name = "llama-3.2-1b" if options.model == "small" else options.model
        recipe |= dict(lora_dropout=options.dropout) | more
        preset = train.read_options(["--preset", name, "--model", "none"])
        self.options, cls = dataclasses.replace(preset, **recipe), dart.DART
        torch.manual_seed(0)
        adapters = cls.adapters(tokenizer, self.options)
        self.model = Transformer(config, adapters, dart.DTYPES[options.dtype], options.device)
        self.model.activation_checkpointing = options.activation_checkpointing
        if options.compile:
            self.model.compile_layers()
        method = cls(self.model, tokenizer, self.options)
        with torch.no_grad():  # not 0, as at the start, or most gradients were 0
            for name, p in self.model.named_parameters():
                if name.endswith(("lora_b", "r2")):
                    p.normal_(0, 0.02)
        examples = {
            name: [pathway.example(problem, tokenizer) for problem in problems]
            for name, pathway in method.pathways.items()
        }
        self.lengths = np.array([[len(e.ids) for e in some] for some in examples.values()]).T
        optimizer = train.make_optimizer(self.model, self.options)
        progress = train.Progress()
        found = (problems, examples, [], 1, 1, {}, 0, 1, progress)
        self.run = train.Run(self.options, method, optimizer, *found)
        self.parameters = [p for p in method.parameters() if p.requires_grad]

    def backward(self, batch):
        def forward(pathway, micro, sync):
            torch.manual_seed(micro.seed)
            return self.run.method(pathway, micro.batches[pathway])

        return self.run.method.training_step(forward, train.micro_batches(self.run, 1, batch))

    def step(self, batch):
        losses = self.backward(batch)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.grad_clip)
        self.run.optimizer.step()
        self.run.optimizer.zero_grad()
        return losses

    def gradients(self):
        named = self.model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}


class Ordinary:
    """The same model, from `ours`, and the same step."""

    def __init__(self, ours):
        from peft import LoraConfig, get_peft_model

        self.options, self.run, source = ours.options, ours.run, ours.model
        self.device, bf16 = source.device, ours.options.dtype == "bf16"
        self.model = hugging_face(source.config, self.device)
        self.model.to(torch.bfloat16 if bf16 else torch.float32)
        self.model = get_peft_model(
            self.model,
            LoraConfig(
                r=self.options.lora_rank,
                lora_alpha=self.options.lora_alpha,
                lora_dropout=self.options.lora_dropout,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            ),
        )
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
                place = f"layers/{i}/self_attn/{which}_proj/rem"
                r1, r2 = self.rem[f"{place}/r1"], self.rem[f"{place}/r2"]
                getattr(layer.self_attn, f"{which}_proj").register_forward_pre_hook(
                    self.hook(r1, r2)
                )
        layers[-1].register_forward_hook(self.keep_last)
        self.parameters = [
            p for p in (*self.model.parameters(), *self.rem.parameters()) if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.options.lr, fused=True)

    @staticmethod
    def name(ours):
        name = "base_model.model.model." + ours
        for a, b in {
            "lora.lora_a": "lora_A.default.weight",
            "lora.lora_b": "lora_B.default.weight",
        }.items():
            name = name.replace(a, b)
        if name.endswith("_proj.weight") and "self_attn" in name:
            name = name.replace("_proj.weight", "_proj.base_layer.weight")
        return name + ".weight" * name.endswith("embed_tokens")

    def hook(self, r1, r2):
        scale = self.options.rem_alpha / self.options.rem_rank
        return lambda _, inputs: (
            (inputs[0] + scale * (inputs[0] @ r1) @ r2.T,) if self.silent else None
        )

    def keep_last(self, _, __, output):
        self.last = output if isinstance(output, torch.Tensor) else output[0]

    def forward(self, name):
        """(cross-entropy, states at z_N [L, B, n]) of a pathway. The last of `hidden_states` has
        gone through the final norm."""
        self.silent, (ids, mask, weight, at) = name == "st", self.batch[name]
        out = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        logits, targets = (
            out.logits[:, :-1].float(),
            ids[:, 1:].masked_fill(weight[:, 1:] == 0, -100),
        )
        nll = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            targets.reshape(-1),
            reduction="none",
            ignore_index=-100,
        )
        states = torch.stack([*out.hidden_states[1:-1], self.last])
        loss = (nll * weight[:, 1:].reshape(-1)).sum()
        return loss, states[:, torch.arange(len(ids)), at].float()

    def backward(self, batch):
        self.batch = {}
        for name, examples in self.run.examples.items():
            some = data.collate([examples[i] for i in batch], self.run.method.tokenizer.eos_id)
            some = some.to(self.device)
            weight = torch.zeros(some.ids.shape, device=self.device)
            weight[some.target_row, some.target_col] = some.weights
            mask = torch.arange(some.ids.shape[1], device=self.device) < some.lengths[:, None]
            self.batch[name] = some.ids, mask.long(), weight, some.z_n
        with self.autocast:
            (cot, teacher), (st, student) = self.forward("cot"), self.forward("st")
        teacher = teacher.detach()
        distance = (teacher - student).abs()
        if self.options.distill_norm == "smooth-l1":
            distance = F.smooth_l1_loss(student, teacher, reduction="none")
        distill = (distance.mean((1, 2)) / teacher.flatten(1).std(1)).mean()
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
        return {
            name: self.rem[name.replace(".", "/")].grad
            if name.endswith(("r1", "r2"))
            else found[self.name(name)]
            for name, p in self.run.model.named_parameters()
            if p.requires_grad
        }


def check(ours, ordinary, batch):
    """Losses and gradients agree to 1e-4; returns the largest relative differences."""
    losses, theirs = ours.backward(batch), ordinary.backward(batch)
    loss = max(abs(losses[name].item() / theirs[name].item() - 1) for name in theirs)
    wanted, found = ordinary.gradients(), ours.gradients()
    assert wanted.keys() == found.keys() and all(wanted[name].abs().max() > 0 for name in wanted)
    gradient = max(
        ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted
    )
    assert loss < 1e-4 and gradient < 1e-4, (
        f"not the same step: losses differ by {loss:.1e}, gradients by {gradient:.1e}"
    )
    return {"loss": loss, "gradient": gradient}


def synchronised(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def padding(examples, batches):
    """The share of padding in both pathways' batches."""
    lengths = [
        np.array([[len(some[i].ids) for i in b] for b in batches]) for some in examples.values()
    ]
    return 1 - sum(x.sum() for x in lengths) / sum((x.max(1) * x.shape[1]).sum() for x in lengths)


def options_given():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--data", required=True, help="file of problems, or a built-in task")
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer")
    parser.add_argument("--model", default="small", choices=("small", *LLAMAS), help="whose shapes")
    parser.add_argument("--vocab", type=int, default=0, help="another vocabulary size")
    parser.add_argument("--dtype", default="fp32", choices=tuple(dart.DTYPES))
    parser.add_argument("--rows", type=int, default=16, help="problems in a step")
    parser.add_argument(
        "--batches", type=int, default=8, help="that are timed, of short to long rows"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.1, help="LoRA's")
    for flag in ("--compile", "--activation_checkpointing"):
        parser.add_argument(flag, action="store_true", help="ours: as the option of train.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    whose = dict(
        choices=("ours", "ordinary"), help="only the peak memory of a step, in this process"
    )
    parser.add_argument("--memory", **whose)
    return parser.parse_args()


def print_memory(options, ours, grouped, mixed):
    """The peak memory before and after two steps of the longest batch, as JSON."""
    subject, batches = (ours, grouped) if options.memory == "ours" else (Ordinary(ours), mixed)
    if options.memory == "ordinary":  # ours is given up
        ours.model = ours.run.optimizer = ours.parameters = None
        ours.run.method = argparse.Namespace(tokenizer=ours.run.method.tokenizer)
    batch = max(batches, key=lambda batch: ours.lengths[batch].max())
    train.reset_peak_memory(options.device)
    start = train.peak_memory(options.device)
    subject.step(batch)
    subject.step(batch)
    print(json.dumps({"start": start, "peak": train.peak_memory(options.device)}))


def memory_of(name):
    """GiB above the start of a step, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory", name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    memory = json.loads(lines.splitlines()[-1])
    return (memory["peak"] - memory["start"]) / 2**30


def time_steps(variants, repeats, device):
    """{name: seconds of all its batches, for each repeat}; they take turns, batch by batch."""
    seconds = {name: [] for name in variants}
    for repeat in range(repeats + 1):  # the first one is the warm-up
        total = dict.fromkeys(variants, 0.0)
        for i in range(len(variants["ours"][1])):
            for name, (subject, batches) in variants.items():
                start = synchronised(device)
                subject.step(batches[i])
                total[name] += synchronised(device) - start
        for name in variants:
            seconds[name] += [total[name]] * (repeat > 0)
    return seconds


def main():
    options = options_given()
    config = SMALL if options.model == "small" else MODELS[options.model]
    config = dataclasses.replace(config, vocab_size=options.vocab or config.vocab_size)
    problems = data.load(options.data, "train")
    tokenizer = Modulo(data.Tokenizer.from_pretrained(options.tokenizer), config.vocab_size)
    ours = Ours(options, config, tokenizer, problems)
    every = data.epoch_batches(ours.lengths, options.rows, 0, 0)
    every.sort(key=lambda batch: ours.lengths[batch].sum())
    at = (np.arange(options.batches) + 0.5) * len(every) / options.batches
    grouped = [every[int(i)] for i in at]
    mixed = np.split(np.random.default_rng(0).permutation(np.concatenate(grouped)), len(grouped))
    if options.memory:
        return print_memory(options, ours, grouped, mixed)

    fp32 = argparse.Namespace(**vars(options) | {"dtype": "fp32", "dropout": 0.0})
    plain = Ours(fp32, config, tokenizer, problems, distill_norm="smooth-l1")
    agreement = check(plain, Ordinary(plain), grouped[len(grouped) // 2])
    text = f"losses to {agreement['loss']:.1e}, gradients to {agreement['gradient']:.1e}"
    print(f"the same step: {text}", flush=True)
    del plain
    ordinary = Ordinary(ours)
    variants = {
        "ours": (ours, grouped),
        "tuned": (ordinary, grouped),
        "ordinary": (ordinary, mixed),
    }
    seconds = time_steps(variants, options.repeats, options.device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {"options": vars(options), "torch": torch.__version__}
    result["threads"] = torch.get_num_threads()
    for name, (_, batches) in variants.items():
        figures = {"problems/s": options.rows * len(grouped) / medians[name]}
        figures["padding"] = padding(ours.run.examples, batches)
        figures["this / ours"] = medians[name] / medians["ours"]
        figures["spread"] = (max(seconds[name]) - min(seconds[name])) / medians[name]
        figures |= {} if name == "tuned" else {"GiB above start": memory_of(name)}
        result[name] = figures
    table = [{"": name} | {k: f"{v:.2f}" for k, v in result[name].items()} for name in variants]
    print(evaluation.table(table, {key: (key, str) for key in table[0]}))
    print(json.dumps(result | agreement))


if __name__ == "__main__":
    main()
