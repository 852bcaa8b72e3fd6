"""DART: Distilling Autoregressive Reasoning to Silent Thought (Jiang et al., EMNLP 2025), and what it is compared with.

    CoT pathway   Q | steps, the last one dropped | Answer: | Y EOS      the weights as they are
    ST pathway    Q | <st> x C                    | Answer: | Y EOS      the same weights, with REM on keys and values
    learned       -   in the CoT pathway only  . . . . . .    in both

The CoT pathway learns to write the steps and then the answer, the ST pathway to answer at once; and in every layer the
ST pathway's state at z_N, the last token of the separator, is pulled to the CoT pathway's. Later only the ST pathway
answers: one forward pass over question, <st> and separator, then the answer.

Symbols are the paper's: Q question, S the C tokens <st>, Z = [steps; separator], z_N its last token, Y answer, L layers,
n hidden size, h~ teacher (CoT) and h^ student (ST) state at z_N, sigma, lambda. Equations are counted as they stand in
the paper: (1) L_CoT, (2) L_ST, (3) the shift and REM, (4) L_distill, (5) their sum. B is a number of rows.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import Row, normalise, score
from model import Adapters, KVCache

SEPARATOR = "Answer:"  # z_t..z_N; Y follows without a space, which in Llama 3 would be a token between z_N and Y


def option(default, text, **limits):
    """A field of a dataclass of options: its help text, and `choices`, or `low` and `high` of a number (low is 0 where it
    is not given)."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass
class Options:
    """The options of a method. The defaults are the paper's (Section 3, Appendix C), and where it says nothing those of
    the README's table."""

    method: str = option("dart", "training method", choices=("dart", "no-cot", "pause", "cot"))
    n_st: int = option(20, "number C of silent tokens (dart, pause)")
    last_step: str = option("auto", "the last step of the CoT in training; auto: dart drops it, cot keeps it",
                            choices=("auto", "drop", "keep"))  # fmt: skip
    distill_weight: float = option(20.0, "lambda of equation (5); 0 leaves the distillation out")
    attach_teacher: bool = option(False, "let the distillation loss train the CoT pathway, too")
    lora_rank: int = option(128, "LoRA rank on q, k, v, o; 0: no LoRA, all weights are trained")
    lora_alpha: float = option(32.0, "LoRA is scaled by lora_alpha / lora_rank")
    lora_dropout: float = option(0.1, "dropout on LoRA's input", high=1)
    rem_rank: int = option(128, "rank d of REM (dart); 0: no REM")
    rem_alpha: float = option(32.0, "REM is scaled by rem_alpha / rem_rank")


# ---------------------------------------------------------------------------------------------------------- pathways


@dataclass(frozen=True)
class Pathway:
    """What stands between question and answer, and whether it is read with REM."""

    steps: bool = False  # the steps of the CoT, which the model writes itself
    drop_last_step: bool = False  # in training: the last step mostly spells the answer, which would be copied from it
    n_fill: int = 0  # C silent tokens ...
    fill_id: int = -1  # ... of this id
    silent: bool = False  # REM on

    def prompt(self, question, tokenizer):
        """The ids before the first one that the model writes itself."""
        ids = tokenizer.encode(normalise(question), bos=True, eos=False)
        if self.steps:
            return ids
        return ids + [self.fill_id] * self.n_fill + tokenizer.encode(SEPARATOR, bos=False, eos=False, continued=True)

    def row(self, problem, tokenizer):
        """The row that is learned: prompt, Z where the model writes it, Y and EOS. The pieces are encoded one by one, so
        that z_N is where we put it, whatever the tokenizer would merge across the seams."""
        prompt, z = self.prompt(problem.question, tokenizer), []
        if self.steps:
            steps = problem.steps[:-1] if self.drop_last_step else problem.steps
            z = tokenizer.encode(" ".join(steps), bos=False, eos=False, continued=True)
            z += tokenizer.encode(SEPARATOR, bos=False, eos=False, continued=True)
        y = tokenizer.encode(problem.answer, bos=False, eos=True, continued=True)
        return Row(np.array(prompt + z + y, dtype=np.int32), len(prompt), len(prompt) + len(z))

    def read(self, text):
        """The answer in what the model wrote: all of it, or what follows the last separator ('' where there is none)."""
        if not self.steps:
            return text
        return text.rpartition(SEPARATOR)[2] if SEPARATOR in text else ""


# ------------------------------------------------------------------------------------------------------------ losses


def cross_entropy(model, hidden, batch):
    """Equations (1) and (2): per row, the mean over Z, where it is learned, plus the mean over Y; then the mean over the
    rows. hidden [B, T, n] -> scalar. Logits are computed for the K learned tokens only."""
    logits = model.logits(hidden[batch.row, batch.col - 1]).float()  # [K, V]
    nll = F.cross_entropy(logits, batch.ids[batch.row, batch.col], reduction="none")  # [K]
    return (nll * batch.weight).sum() / len(batch.ids)


def global_std(states):
    """sigma(h~) of equation (4): per layer, the standard deviation over the rows and the hidden dimension.

    states: the [L, B, n] of each of this process's micro-batches -> [L], over those of all processes: the loss does not
    depend on how a batch is split.
    """
    x = torch.cat(states, dim=1).detach().float().flatten(1)  # [L, rows * n]
    count = _all_reduce(torch.tensor(float(x.shape[1]), device=x.device))
    mean = _all_reduce(x.sum(1)) / count
    return (_all_reduce((x - mean[:, None]).square().sum(1)) / (count - 1).clamp(min=1)).sqrt()


def _all_reduce(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def distill_loss(teacher, student, sigma=None, attached=False):
    """Equation (4): (1/L) sum_l mean |h~_l - h^_l| / sigma_l, a scalar. The mean, over B and n, stands for the L1 norm.

    teacher, student [L, B, n]; sigma [L], where None that of the teacher given here. The teacher gets no gradient
    unless it is `attached`; sigma never does, and is kept off 0.
    """
    sigma = global_std([teacher]) if sigma is None else sigma
    teacher = teacher if attached else teacher.detach()
    distance = (teacher.float() - student.float()).abs().mean(dim=(1, 2))  # [L]
    return (distance / sigma.clamp(min=1e-6)).mean()


# ----------------------------------------------------------------------------------------------------------- methods


class Method(nn.Module):
    """A way of training, around the model. A subclass says which pathways there are and what a step passes through.

    pathways: name -> Pathway. Questions are answered through the last one.
    """

    rem = False  # does the model have REM?
    fill = None  # the silent token: None, 'reserved' (an id the tokenizer can spare, if any), 'trained' (a row of its own)

    @classmethod
    def adapters(cls, tokenizer, options):
        """The model.Adapters that this method asks of the model."""
        own_row = options.n_st > 0 and (cls.fill == "trained" or (cls.fill == "reserved" and tokenizer.st_id is None))
        return Adapters(options.lora_rank, options.lora_alpha, options.lora_dropout,
                        options.rem_rank if cls.rem else 0, options.rem_alpha,
                        extra_rows=int(own_row), train_extra_rows=cls.fill == "trained")  # fmt: skip

    def __init__(self, model, tokenizer, options):
        super().__init__()
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.fill_id = model.config.vocab_size if model.adapters.extra_rows else tokenizer.st_id
        self.pathways = self.make_pathways()

    def forward(self, name, batch, teacher=None, sigma=None):
        """One pass through the pathway `name`: (losses, states at z_N [L, B, n]). A loss is a mean over the B rows; the
        cross-entropy goes by the pathway's name, and 'distill' is there where there is a teacher."""
        hidden, states = self.model(batch.ids, silent=self.pathways[name].silent, at=batch.at)
        losses = {name: cross_entropy(self.model, hidden, batch)}
        if teacher is not None:
            losses["distill"] = distill_loss(teacher, states, sigma, self.options.attach_teacher)
        return losses, states

    def passes(self, run_pass, micro_batches):
        """The passes of one optimizer step over this process's micro-batches, a list of {pathway: Batch}.

        Yields (micro-batch, {name: loss}) for the caller to back-propagate before it asks for the next. `run_pass` is
        `forward` with one more argument: sync=True in the step's last pass, where the processes add up their gradients.
        """
        (name,) = self.pathways
        for micro in micro_batches:
            yield micro, run_pass(name, micro[name], sync=micro is micro_batches[-1])[0]

    def total(self, losses):
        """Equation (5)."""
        return sum(self.options.distill_weight * loss if name == "distill" else loss for name, loss in losses.items())


class NoCoT(Method):
    """Fine-tuning without steps: Q | Answer: | Y EOS."""

    def make_pathways(self):
        return {"no-cot": Pathway()}


class Pause(Method):
    """PauseFT (Goyal et al. 2024): Q | <pause> x C | Answer: | Y EOS, the embedding of <pause> trained."""

    fill = "trained"

    def make_pathways(self):
        return {"pause": Pathway(n_fill=self.options.n_st, fill_id=self.fill_id)}


class CoT(Method):
    """Fine-tuning on the steps: Q | steps | Answer: | Y EOS, with the loss of equation (1)."""

    def make_pathways(self):
        return {"cot": Pathway(steps=True, drop_last_step=self.options.last_step == "drop")}


class DART(Method):
    """Both pathways, and the distillation between them (Section 3)."""

    rem = True
    fill = "reserved"

    def make_pathways(self):
        return {"cot": Pathway(steps=True, drop_last_step=self.options.last_step != "keep"),
                "st": Pathway(n_fill=self.options.n_st, fill_id=self.fill_id, silent=True)}  # fmt: skip

    def passes(self, run_pass, micro_batches):
        """All CoT passes, sigma over the whole batch, then all ST passes. A detached teacher's graph is gone before the
        ST pathway's is built; an attached one's stays until the ST pass of the same rows."""
        attached, teachers = self.options.attach_teacher, []
        for micro in micro_batches:
            losses, h = run_pass("cot", micro["cot"], sync=False)
            teachers.append((losses, h) if attached else ({}, h.detach()))
            if not attached:
                yield micro, losses
        distill = self.options.distill_weight > 0
        sigma = global_std([h for _, h in teachers]) if distill else None
        for micro, (kept, h) in zip(micro_batches, teachers, strict=True):
            losses, _ = run_pass("st", micro["st"], h if distill else None, sigma, sync=micro is micro_batches[-1])
            yield micro, kept | losses


METHODS = {"dart": DART, "no-cot": NoCoT, "pause": Pause, "cot": CoT}

# --------------------------------------------------------------------------------------------------------- answering


class Answer(NamedTuple):
    text: str  # what the model wrote, up to EOS
    passes: int  # forward passes that it took: the tokens written, EOS among them


@torch.no_grad()
def generate(model, prompts, silent, eos_id, max_new_tokens):
    """Greedy decoding. prompts: B lists of ids, of any lengths -> B lists of ids, each up to its EOS, which is included,
    or max_new_tokens. What a row gets does not depend on the others."""
    if model.merged not in (None, "silent" if silent else "plain"):
        raise ValueError(f"the weights were merged for the {model.merged} pathway")
    device, B = model.embed_tokens.device, len(prompts)
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]
    T = int(length.max())
    ids = torch.tensor([prompt + [eos_id] * (T - len(prompt)) for prompt in prompts], device=device)
    cache = KVCache(model.config, B, T + max_new_tokens, model.compute_dtype, device)
    hidden = model(ids, silent=silent, cache=cache)[torch.arange(B, device=device), length - 1]  # [B, n]
    written, done = [], torch.zeros(B, dtype=torch.bool, device=device)
    for position in range(max_new_tokens):
        written.append(model.logits(hidden).argmax(-1))  # [B]
        done |= written[-1] == eos_id
        if done.all() or position == max_new_tokens - 1:
            break
        hidden = model(written[-1][:, None], silent=silent, positions=(length + position)[:, None], cache=cache)[:, 0]
    rows = torch.stack(written, dim=1).tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def answer(model, tokenizer, pathway, questions, max_new_tokens=256, batch_size=64):
    """list[Answer] to a list of questions through a pathway, in batches of about one length."""
    prompts = [pathway.prompt(question, tokenizer) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [None] * len(prompts)
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = generate(model, [prompts[i] for i in chosen], pathway.silent, tokenizer.eos_id, max_new_tokens)
        for i, row in zip(chosen, rows, strict=True):
            answers[i] = Answer(tokenizer.decode(row[:-1] if row[-1] == tokenizer.eos_id else row), len(row))
    model.train(training)
    return answers


def evaluate(model, tokenizer, pathway, problems, max_new_tokens=256, batch_size=64):
    """Answers every problem and scores it: one dictionary a problem."""
    answers = answer(model, tokenizer, pathway, [p.question for p in problems], max_new_tokens, batch_size)
    records = []
    for problem, (text, passes) in zip(problems, answers, strict=True):
        strict, tolerant = score(pathway.read(text), problem.answer)
        records.append({"question": problem.question, "gold": problem.answer, "text": text, "strict": strict,
                        "tolerant": tolerant, "passes": passes})  # fmt: skip
    return records
