"""DART: Distilling Autoregressive Reasoning to Silent Thought (Jiang et al., EMNLP 2025), and what it is compared with.

    CoT pathway   Q | steps, the last one dropped | Answer: | Y EOS      the weights as they are
    ST pathway    Q | <st> x C                    | Answer: | Y EOS      the same weights, with REM on keys and values
    learned       -   in the CoT pathway only  . . . . . .    in both

The CoT pathway learns to write the steps and then the answer, the ST pathway to answer at once; and in every layer the
ST pathway's state at z_N, the last token of the separator, is pulled to the CoT pathway's. Later only the ST pathway
answers: one forward pass over question, <st> and separator, then the answer.

Two of the methods that DART is compared with, Coconut and CODI, have continuous thoughts in its place: hidden states that
are fed back as the next inputs, one after the other (`think`).

Symbols are the paper's: Q question, S the C tokens <st>, Z = [steps; separator], z_N its last token, Y answer, L layers,
n hidden size, h~ teacher (CoT) and h^ student (ST) state at z_N, sigma, lambda. Its equations are called here (1) L_CoT, (2) L_ST,
(3) REM, (4) L_distill, (5) their sum. B is a number of rows.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from data import Row, normalise, score
from model import Adapters, KVCache

SEPARATOR = "Answer:"  # z_t..z_N; Y follows without a space, which in Llama 3 would be a token between z_N and Y


def option(default, text, **limits):
    """A field of a dataclass of options: its help text, and what `eval.check_options` holds it to: `choices`, or `low` (0 if not given)
    and `high` of a number."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass
class Options:
    """The options of a method. The defaults are the paper's (Section 3, Appendix C), and where it says nothing those of
    the README's table."""

    method: str = option("dart", "training method", choices=("dart", "cot", "no-cot", "pause", "icot", "coconut", "codi"))
    n_st: int = option(20, "number C of silent tokens (dart, pause)", high=10_000)
    last_step: str = option("auto", "the last step of the CoT in training; auto: dart and codi drop it, the others keep it",
                            choices=("auto", "drop", "keep"))  # fmt: skip
    distill_weight: float = option(20.0, "lambda of equation (5) (dart, codi); 0 leaves the distillation out")
    distill_norm: str = option("auto", "of the difference of two states: mean or sum of absolute values, or mean smooth L1; "
                               "auto: l1, in codi smooth-l1", choices=("auto", "l1", "l1-sum", "smooth-l1"))  # fmt: skip
    distill_at: str = option("z_N", "tokens whose states are compared: the separator's last, the answer's first, or the "
                             "separator's last and the answer with EOS", choices=("z_N", "y_1", "z_N+Y"))  # fmt: skip
    attach_teacher: bool = option(False, "let the distillation loss train the CoT pathway, too (dart, codi)")
    lora_rank: int = option(128, "LoRA rank on q, k, v, o (codi: in the MLP, too); 0: no LoRA, all weights are trained",
                           high=8192)  # fmt: skip
    lora_alpha: float = option(32.0, "LoRA is scaled by lora_alpha / lora_rank")
    lora_dropout: float = option(0.1, "dropout on LoRA's input", high=0.99)
    rem_rank: int = option(128, "rank d of REM (dart); 0: no REM", high=8192)
    rem_alpha: float = option(32.0, "REM is scaled by rem_alpha / rem_rank")
    rem_is_lora: bool = option(False, "a second LoRA on k and v, in the ST pathway only, in place of REM (dart)")
    n_thoughts: int = option(6, "continuous thoughts (codi)", low=1, high=1000)
    thoughts_per_step: int = option(2, "continuous thoughts for each step that is left out (coconut)", low=1, high=1000)
    max_stage: int = option(3, "stages that each leave out one step more, before all are left out (coconut)", low=1, high=1000)
    epochs_per_stage: float = option(3.0, "epochs of a stage (coconut)", low=0.001)
    removal_per_epoch: float = option(8.0, "tokens of the CoT removed in an epoch (icot)", low=0.001)
    removal_smoothing: float = option(4.0, "k more tokens are removed from a row with a probability that falls as "
                                      "exp(-this k); 0: none (icot)")  # fmt: skip
    remove_all_beyond: int = option(39, "once this many tokens would be removed, remove all (icot)")


# ---------------------------------------------------------------------------------------------------------- pathways


@dataclass(frozen=True)
class Pathway:
    """What stands between question and answer, and whether it is read with REM."""

    steps: bool = False  # the steps of the CoT, which the model writes itself
    drop_last_step: bool = False  # in training: the last step mostly spells the answer, which would be copied from it
    skip_steps: int = 0  # in training: leave out this many steps from the front,
    skip_tokens: int = 0  # this many tokens from the front of the CoT
    n_fill: int = 0  # C silent tokens ...
    fill_id: int = -1  # ... of this id
    silent: bool = False  # REM on
    marks: tuple = ()  # ids before and after ...
    thoughts: int = 0  # ... this many continuous thoughts (their places hold the first mark's id, which is not read there)

    def prompt(self, question, tokenizer):
        """The ids before the first one that the model writes itself. ValueError for a question that is empty, or that the
        tokenizer cannot encode."""
        asked = tokenizer.encode(normalise(question), bos=True, eos=False)
        if len(asked) == (tokenizer.bos_id is not None):
            raise ValueError(f"the question is empty: {question[:60]!r}")
        ids = asked + [self.fill_id] * self.n_fill
        if self.marks:
            ids += [self.marks[0]] * (1 + self.thoughts) + [self.marks[1]]
        return ids if self.steps else ids + self.separator(tokenizer)

    def separator(self, tokenizer):
        return tokenizer.encode(SEPARATOR, bos=False, eos=False, continued=True)

    def start(self, prompt_length, tokenizer):
        """The index of the first thought."""
        return prompt_length - (0 if self.steps else len(self.separator(tokenizer))) - 1 - self.thoughts

    def row(self, problem, tokenizer):
        """The row that is learned: prompt, Z where the model writes it, Y and EOS. The pieces are encoded one by one, so
        that z_N is where we put it, whatever the tokenizer would merge across the seams."""
        prompt, z = self.prompt(problem.question, tokenizer), []
        if self.steps:
            steps = problem.steps[self.skip_steps : -1 if self.drop_last_step else None]
            z = tokenizer.encode(" ".join(steps), bos=False, eos=False, continued=True)[self.skip_tokens :]
            z += self.separator(tokenizer)
        y = tokenizer.encode(problem.answer, bos=False, eos=True, continued=True)
        return Row(np.array(prompt + z + y, dtype=np.int32), len(prompt), len(prompt) + len(z),
                   self.start(len(prompt), tokenizer) if self.marks else 0, self.thoughts)  # fmt: skip

    def read(self, text):
        """The answer in what the model wrote: all of it, or what follows the last separator ('' where there is none)."""
        if not self.steps:
            return text
        return text.rpartition(SEPARATOR)[2] if SEPARATOR in text else ""


# ------------------------------------------------------------------------------------------------ continuous thoughts


def think(model, ids, start, end, thoughts, cache=None, at=None):
    """A pass over rows with continuous thoughts (Coconut, CODI): in the place of ids[b, start_b : start_b + thoughts], each
    one is the hidden state before it, through the model's projector where it has one.

    ids [B, T], rows of the lengths end [B]; start [B], thoughts > 0; at: as in `Transformer.forward` -> (hidden [B, R, n] from
    the last thought on, first [B]: that thought's index in its row, states at `at`). The thoughts come one after the other, through the
    cache, and so do the gradients. Padding may stand at positions behind all rows.
    """
    rows, first = torch.arange(len(ids), device=ids.device), start + thoughts - 1
    positions = first[:, None] + torch.arange(int((end - first).max()), device=ids.device)  # [B, R]; beyond `end`: padding
    if cache is None:
        cache = KVCache(model.config, len(ids), int(positions.max()) + 1, model.compute_dtype, ids.device)
    embed_thought = model.projector or (lambda hidden: hidden)
    hidden = model(ids[:, : int(start.max())], cache=cache)[rows, start - 1]  # [B, n]
    for i in range(thoughts - 1):
        hidden = model(embed_thought(hidden)[:, None], positions=(start + i)[:, None], cache=cache)[:, 0]
    x = model.embed(ids.gather(1, positions.clamp(max=ids.shape[1] - 1))).to(hidden.dtype)
    x = torch.cat((embed_thought(hidden)[:, None], x[:, 1:]), dim=1)  # [B, R, n]
    if at is None:
        return model(x, positions=positions, cache=cache), first, None
    row, col = at
    hidden, states = model(x, positions=positions, cache=cache, at=(row, col - first[row]))
    return hidden, first, states


# ------------------------------------------------------------------------------------------------------------ losses


LOGITS = 2**25  # at most this many are held at a time in training


def cross_entropy(model, hidden, batch, first=0):
    """Equations (1) and (2): per row, the mean over Z, where it is learned, plus the mean over Y; then the mean over the
    rows. hidden [B, T, n], from the index `first` (or [B]) on -> scalar. Logits are computed for the K learned tokens only."""
    first = first if isinstance(first, int) else first[batch.row]
    hidden = hidden[batch.row, batch.col - 1 - first]  # [K, n]
    target, weight = batch.ids[batch.row, batch.col], batch.weight / len(batch.ids)
    if model.plain:
        return (F.cross_entropy(model.logits(hidden).float(), target, reduction="none") * weight).sum()
    return ChunkedCrossEntropy.apply(hidden, model.head, target, weight, max(1, LOGITS // len(model.head)))


class ChunkedCrossEntropy(torch.autograd.Function):
    """sum_k weight_k CE(head hidden_k, target_k), some rows at a time: their gradient is computed beside their loss, so that never
    more than a chunk of the logits [K, V] is there. (A checkpoint of each chunk would compute its logits twice.)

    hidden [K, n], head [V, n], target [K], weight [K], chunk: a number of rows -> scalar
    """

    @staticmethod
    def forward(ctx, hidden, head, target, weight, chunk):
        train_hidden, train_head = ctx.needs_input_grad[:2]
        cast, loss = head.to(hidden.dtype), torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if train_hidden else None
        d_head = torch.zeros_like(head) if train_head else None
        for rows in (slice(start, start + chunk) for start in range(0, len(hidden), chunk)):
            logits = F.linear(hidden[rows], cast).float()
            log_z = logits.logsumexp(1, keepdim=True)
            at = target[rows, None]
            loss += ((log_z - logits.gather(1, at))[:, 0] * weight[rows]).sum()
            d_logits = logits.sub_(log_z).exp_()  # softmax - onehot, times the weight
            d_logits.scatter_add_(1, at, torch.full_like(at, -1, dtype=d_logits.dtype)).mul_(weight[rows, None])
            d_logits = d_logits.to(hidden.dtype)
            if train_hidden:
                d_hidden[rows] = d_logits @ cast
            if train_head:
                d_head += (d_logits.T @ hidden[rows]).to(head.dtype)
        ctx.save_for_backward(d_hidden, d_head)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        d_hidden, d_head = (None if part is None else part * d_loss for part in ctx.saved_tensors)
        return d_hidden, d_head, None, None, None


def global_std(states):
    """sigma(h~) of equation (4): per layer, the standard deviation over the rows and the hidden dimension.

    states: the [L, B, n] of each of this process's micro-batches -> [L], over those of all processes: the loss does not
    depend on how a batch is split.
    """
    x = torch.cat(states, dim=1).detach().float().flatten(1)  # [L, rows * n]
    count = all_reduce(torch.tensor(float(x.shape[1]), device=x.device))
    mean = all_reduce(x.sum(1)) / count
    return (all_reduce((x - mean[:, None]).square().sum(1)) / (count - 1).clamp(min=1)).sqrt()


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The tensor, with the sum (or other) of all processes' in it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def distill_loss(teacher, student, sigma=None, attached=False, norm="l1", weight=None):
    """Equation (4): (1/L) sum_l mean |h~_l - h^_l| / sigma_l, a scalar. The mean, over B and n, stands for the L1 norm.

    teacher, student [L, B, n]; sigma [L], where None that of the teacher given here. The teacher gets no gradient
    unless it is `attached`; sigma never does, and is kept off 0. norm: the alternatives of Options.distill_norm. weight [B],
    with the sum 1, replaces the mean over B. (In training B stands for the P states that are compared.)
    """
    sigma = global_std([teacher]) if sigma is None else sigma
    teacher, student = (teacher if attached else teacher.detach()).float(), student.float()
    if norm == "smooth-l1":
        distance = F.smooth_l1_loss(student, teacher, reduction="none").mean(2)  # [L, B]
    else:
        distance = (teacher - student).abs().sum(2) / (1 if norm == "l1-sum" else teacher.shape[2])
    distance = distance.mean(1) if weight is None else distance @ weight  # [L]
    return (distance / sigma.clamp(min=1e-6)).mean()


# ----------------------------------------------------------------------------------------------------------- methods

ALL = 10**9  # the stage of a method that leaves out all of the CoT


class Method(nn.Module):
    """A way of training, around the model. A subclass says which pathways there are and what a step passes through.

    pathways: name -> Pathway. Questions are answered through the last one, `answers_through`.
    """

    drops_last_step = False  # by default
    norm = "l1"  # of the distillation, by default
    train_special = False  # are the rows of its special ids trained, though the base is frozen?

    @classmethod
    def special(cls, options):
        """The number of its special ids: silent tokens, or marks of thoughts."""
        return 0

    @classmethod
    def adapters(cls, tokenizer, options, **more):
        """The model.Adapters that this method asks of the model: special ids are those that the tokenizer has in reserve,
        if it has so many, else rows behind the vocabulary."""
        rows = cls.special(options)
        if len(tokenizer.reserved) >= rows and not cls.train_special:
            rows = 0
        return Adapters(lora_rank=options.lora_rank, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout,
                        extra_rows=rows, train_extra_rows=cls.train_special or not options.lora_rank, **more)  # fmt: skip

    def __init__(self, model, tokenizer, options):
        super().__init__()
        self.model, self.tokenizer, self.options = model, tokenizer, options
        V, rows = model.config.vocab_size, model.adapters.extra_rows
        self.special_ids = tuple(range(V, V + rows)) if rows else tokenizer.reserved[: self.special(options)]
        self.fill_id = self.special_ids[0] if self.special_ids else -1
        self.drop = options.last_step == "drop" or (options.last_step == "auto" and self.drops_last_step)
        self.pathways = self.make_pathways()
        self.answers_through = list(self.pathways)[-1]

    def stage(self, step, steps_per_epoch):
        """How much of the CoT is left out in the step (0, 1, ...): None for methods that always keep it, else 0, 1, ... up to ALL. Where it
        changes, the optimizer starts anew."""
        return None

    def training_pathway(self, name, stage, draw):
        """The Pathway that a row is laid out by; draw: the row's random number in [0, 1)."""
        return self.pathways[name]

    def compared(self, batch):
        """The P tokens whose states are compared (Options.distill_at): (row [P], col [P], weight [P] with the sum 1)."""
        row, col, count = torch.arange(len(batch.at), device=batch.at.device), batch.at, torch.ones_like(batch.at)
        if self.options.distill_at == "y_1":
            col = col + 1
        elif self.options.distill_at == "z_N+Y":
            y = batch.col > batch.at[batch.row]
            row, col, count = torch.cat((row, batch.row[y])), torch.cat((col, batch.col[y])), batch.end - batch.at
        return row, col, 1 / (count[row] * len(batch.at))

    def forward(self, name, batch, teacher=None, sigma=None):
        """One pass through the pathway `name`: (losses, states that are compared [L, P, n]). A loss is a mean over the B rows;
        the cross-entropy goes by the pathway's name, and 'distill' is there where there is a teacher."""
        *at, weight = self.compared(batch)
        if batch.thoughts:
            hidden, first, states = think(self.model, batch.ids, batch.start, batch.end, batch.thoughts, at=at)
        else:
            first = 0 if self.model.plain else batch.tail
            hidden, states = self.model(batch.ids, self.pathways[name].silent, at=at, tail=first)
        losses = {name: cross_entropy(self.model, hidden, batch, first)}
        if teacher is not None:
            norm = self.norm if self.options.distill_norm == "auto" else self.options.distill_norm
            losses["distill"] = distill_loss(teacher, states, sigma, self.options.attach_teacher, norm, weight)
        return losses, states

    def passes(self, run_pass, micro_batches):
        """The passes of one optimizer step over this process's micro-batches, each with `batches`, {pathway: Batch}.

        Yields (micro-batch, {name: loss}) for the caller to back-propagate before it asks for the next. `run_pass` is
        `forward` with one more argument: sync=True in the step's last pass, where the processes add up their gradients.
        """
        (name,) = self.pathways
        for micro in micro_batches:
            yield micro, run_pass(name, micro.batches[name], sync=micro is micro_batches[-1])[0]

    def total(self, losses):
        """Equation (5)."""
        return sum(self.options.distill_weight * loss if name == "distill" else loss for name, loss in losses.items())


class NoCoT(Method):
    """Fine-tuning without steps: Q | Answer: | Y EOS."""

    def make_pathways(self):
        return {"no-cot": Pathway()}


class Pause(Method):
    """PauseFT (Goyal et al. 2024): Q | <pause> x C | Answer: | Y EOS, the embedding of <pause> trained."""

    train_special = True

    @classmethod
    def special(cls, options):
        return int(options.n_st > 0)

    def make_pathways(self):
        return {"pause": Pathway(n_fill=self.options.n_st, fill_id=self.fill_id)}


class CoT(Method):
    """Fine-tuning on the steps: Q | steps | Answer: | Y EOS, with the loss of equation (1)."""

    def make_pathways(self):
        return {"cot": Pathway(steps=True, drop_last_step=self.drop)}


class ICoT(Method):
    """Stepwise internalisation (iCoT-SI, Deng et al. 2024): Q | steps but their first s tokens | Answer: | Y EOS. s grows by
    one at regular intervals, some rows are a few tokens ahead, and in the end none is left."""

    def stage(self, step, steps_per_epoch):
        s = step // max(1, round(steps_per_epoch / self.options.removal_per_epoch))
        return s if s < self.options.remove_all_beyond else ALL

    def training_pathway(self, name, stage, draw):
        """P(k tokens more) is proportional to exp(-removal_smoothing k)."""
        if stage == ALL:
            return self.pathways[name]
        smoothing = self.options.removal_smoothing
        ahead = int(min(float(-np.log1p(-draw)) / smoothing, ALL)) if smoothing else 0
        return Pathway(steps=True, drop_last_step=self.drop, skip_tokens=stage + ahead)

    def make_pathways(self):
        return {"icot": Pathway()}


class Coconut(Method):
    """Continuous thoughts (Hao et al. 2024): Q | <bot> | c k thoughts | <eot> | steps but the first k | Answer: | Y EOS. k
    grows by one at each stage; after max_stage of them all steps are left out, and the thoughts stay."""

    train_special = True

    @classmethod
    def special(cls, options):
        return 2

    def stage(self, step, steps_per_epoch):
        k = int(step / steps_per_epoch / self.options.epochs_per_stage)
        return k if k <= self.options.max_stage else ALL

    def training_pathway(self, name, stage, draw):
        if stage == ALL:
            return self.pathways[name]
        return Pathway(steps=True, drop_last_step=self.drop, skip_steps=stage, marks=self.special_ids,
                       thoughts=stage * self.options.thoughts_per_step)  # fmt: skip

    def make_pathways(self):
        thoughts = self.options.max_stage * self.options.thoughts_per_step
        return {"coconut": Pathway(marks=self.special_ids, thoughts=thoughts)}


class DART(Method):
    """Both pathways, equations (1) and (2), and the distillation between them, (4) (Section 3)."""

    drops_last_step = True

    @classmethod
    def special(cls, options):
        return int(options.n_st > 0)

    @classmethod
    def adapters(cls, tokenizer, options):
        return super().adapters(tokenizer, options, rem_rank=options.rem_rank, rem_alpha=options.rem_alpha,
                                rem_is_lora=options.rem_is_lora)  # fmt: skip

    def make_pathways(self):
        return {"cot": Pathway(steps=True, drop_last_step=self.drop),
                "st": Pathway(n_fill=self.options.n_st, fill_id=self.fill_id, silent=True)}  # fmt: skip

    def passes(self, run_pass, micro_batches):
        """All passes of the teacher, sigma over the whole batch, then all of the student. A detached teacher's graph is gone
        before the student's is built; an attached one's stays until the student's pass of the same rows."""
        (teacher, student), attached, taught = self.pathways, self.options.attach_teacher, []
        for micro in micro_batches:
            losses, h = run_pass(teacher, micro.batches[teacher], sync=False)
            taught.append((losses, h) if attached else ({}, h.detach()))
            if not attached:
                yield micro, losses
        distill = self.options.distill_weight > 0
        sigma = global_std([h for _, h in taught]) if distill else None
        for micro, (kept, h) in zip(micro_batches, taught, strict=True):
            losses, _ = run_pass(student, micro.batches[student], h if distill else None, sigma, sync=micro is micro_batches[-1])
            yield micro, kept | losses


class CODI(DART):
    """Continuous thoughts by distillation in one stage (Shen et al. 2025): the teacher's CoT beside Q | <bot> | thoughts | <eot>
    | Answer: | Y EOS, each thought through a projector; LoRA in the MLP, too."""

    norm = "smooth-l1"

    @classmethod
    def special(cls, options):
        return 2

    @classmethod
    def adapters(cls, tokenizer, options):
        return super(DART, cls).adapters(tokenizer, options, lora_mlp=True, projector=True)

    def make_pathways(self):
        return {"cot": Pathway(steps=True, drop_last_step=self.drop),
                "codi": Pathway(marks=self.special_ids, thoughts=self.options.n_thoughts)}  # fmt: skip


METHODS = {"dart": DART, "cot": CoT, "no-cot": NoCoT, "pause": Pause, "icot": ICoT, "coconut": Coconut, "codi": CODI}

# --------------------------------------------------------------------------------------------------------- answering


class Answer(NamedTuple):
    text: str  # what the model wrote, up to EOS
    passes: int  # forward passes that it took: the tokens written, EOS among them, and the continuous thoughts


@torch.no_grad()
def generate(model, tokenizer, pathway, prompts, max_new_tokens):
    """Greedy decoding. prompts: B lists of ids, of any lengths, made by the pathway -> B lists of ids, each up to its EOS, which is
    included, or max_new_tokens. What a row gets does not depend on the others."""
    silent, eos_id = pathway.silent, tokenizer.eos_id
    if model.merged not in (None, "silent" if silent else "cot"):
        raise ValueError(f"the weights were merged for the {model.merged} pathway")
    device, B = model.embed_tokens.device, len(prompts)
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]
    T = int(length.max())
    ids = torch.tensor([prompt + [eos_id] * (T - len(prompt)) for prompt in prompts], device=device)  # [B, T]
    cache = KVCache(model.config, B, T + max_new_tokens, model.compute_dtype, device)
    if pathway.thoughts:
        hidden, first, _ = think(model, ids, pathway.start(length, tokenizer), length, pathway.thoughts, cache)
    else:
        first = min(map(len, prompts)) - 1
        hidden = model(ids, silent=silent, cache=cache, tail=first)
    hidden = hidden[torch.arange(B, device=device), length - 1 - first]  # [B, n]
    written, done = [], torch.zeros(B, dtype=torch.bool, device=device)
    for position in range(max_new_tokens):
        written.append(model.logits(hidden).argmax(-1))  # [B]
        done |= written[-1] == eos_id
        if done.all() or position == max_new_tokens - 1:
            break
        hidden = model(written[-1][:, None], silent, (length + position)[:, None], cache, end=T + position + 1)[:, 0]
    rows = torch.stack(written, dim=1).tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def answer(model, tokenizer, pathway, questions, max_new_tokens=256, batch_size=64):
    """list[Answer] to a list of questions through a pathway, in batches of about one length."""
    prompts = [pathway.prompt(question, tokenizer) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [None] * len(prompts)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = generate(model, tokenizer, pathway, [prompts[i] for i in chosen], max_new_tokens)
            for i, row in zip(chosen, rows, strict=True):
                text = tokenizer.decode(row[:-1] if row[-1] == tokenizer.eos_id else row)
                answers[i] = Answer(text, len(row) + pathway.thoughts)
    finally:
        model.train(training)
    return answers


def evaluate(model, tokenizer, pathway, problems, max_new_tokens=256, batch_size=64):
    """Answers every problem and scores it: one dictionary a problem, with the whole text that was written and the answer
    read in it."""
    answers = answer(model, tokenizer, pathway, [p.question for p in problems], max_new_tokens, batch_size)
    records = []
    for problem, (text, passes) in zip(problems, answers, strict=True):
        answered = pathway.read(text).strip()
        strict, tolerant = score(answered, problem.answer)
        records.append({"question": problem.question, "gold": problem.answer, "text": text, "answer": answered,
                        "strict": strict, "tolerant": tolerant, "passes": passes,
                        "tokens": passes - pathway.thoughts})  # fmt: skip
    return records
