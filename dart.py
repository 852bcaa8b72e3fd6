"""DART: Distilling Autoregressive Reasoning to Silent Thought (Jiang et al., EMNLP 2025).

Two pathways share one model in training. Below each part: is it learned?

    CoT pathway   Q | steps, the last one dropped | Answer: | Y EOS    the weights as they are
                  - | yes                         | yes     | yes
    ST pathway    Q | <st> x C                    | Answer: | Y EOS    the same weights, REM on keys
                  - | -                           | -       | yes      and values
                                                          ^ z_N

In every layer the ST pathway's hidden state at z_N, the separator's last token, is pulled to the
CoT pathway's. Later only the ST pathway runs: one forward pass over question, <st> and separator,
then the answer. The methods that DART is compared with follow behind it.

Symbols are the paper's: Q question, Z = [steps; separator] of N tokens, z_N its last one, S the C
tokens <st>, Y answer of M tokens, L layers, n hidden size, h~ teacher (CoT) and h^ student (ST)
state at z_N. Equations: (1) L_CoT, (2) L_ST, (3) REM (model.py), (4) L_distill, (5) their sum.
B examples in a batch, K learned tokens in it, V vocabulary.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import Example, Tokenizer, check_options, collate, normalise, option
from data import read_bytes, read_json, replacing, score
from model import Adapters, KVCache, ModelConfig, Transformer, digest_of, tensor_digest

# z_t..z_N. No space before Y: in Llama 3 it would be a token of its own, between z_N and Y.
SEPARATOR = "Answer:"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Options:
    """All that a run must know to be rebuilt. The defaults are the paper's (Section 3, Appendix C),
    and where it is silent those of the README's table "Paper vs. this code"."""

    method: str = option("dart", "training method", lambda: METHODS, group="the model and the data")
    model: str = option("", "directory of the base model: config.json, model.safetensors")
    tokenizer: str = option("", "directory of the tokenizer, if not the model's; or demo")
    random_init: bool = option(False, "random weights; --model may be a preset's name, too")
    data: str = option("gsm8k-aug", "a built-in task (demo, calls), a name, a directory or file")
    data_dir: str = option("datasets", "where `python data.py NAME` puts the data sets")
    dtype: str = option("bf16", "of the computation and of frozen weights", DTYPES)
    seed: int = option(0, "of weights, data order and dropout")
    max_new_tokens: int = option(256, "tokens that an answer may have, CoT included", low=1)

    n_st: int = option(20, "number C of silent tokens (dart, pause)", group="the pathways")
    last_step: str = option("auto", "of the CoT; auto: dart, codi drop it", "auto drop keep")

    lora_rank: int = option(128, "rank on q, k, v, o; 0: all weights train", group="LoRA and REM")
    lora_alpha: float = option(32.0, "LoRA is scaled by lora_alpha / lora_rank")
    lora_dropout: float = option(0.1, "dropout on LoRA's input, below 1", high=0.99)
    rem_rank: int = option(128, "rank d of REM (dart); 0: no REM")
    rem_alpha: float = option(32.0, "REM is scaled by rem_alpha / rem_rank")
    rem_is_lora: bool = option(False, "instead of REM, a second LoRA in the ST pathway (dart)")

    distill_weight: float = option(20.0, "lambda of equation (5)", group="distillation")
    distill_norm: str = option("auto", "auto: l1; codi: smooth-l1", "auto l1 l1-sum smooth-l1")
    distill_at: str = option("z_N", "tokens whose states are compared", "z_N y_1 z_N+Y")
    attach_teacher: bool = option(False, "let the distillation train the CoT pathway, too")

    n_latents: int = option(6, "continuous thoughts (codi)", low=1, group="thoughts and stages")
    codi_form: str = option("authors", "its losses: the authors', or as dart's", "authors dart")
    latents_per_step: int = option(2, "thoughts for each step that is left out (coconut)", low=1)
    max_stage: int = option(3, "steps left out, one a stage, before all are (coconut)", low=1)
    epochs_per_stage: float = option(3.0, "epochs of a stage (coconut)", low=1e-3)
    cot_epochs: float = option(0.0, "of stage 0, CoT; 0: as of the others (coconut)")
    removal_per_epoch: float = option(8.0, "CoT tokens removed in an epoch (icot)", low=1e-3)
    removal_smoothing: float = option(4.0, "P(k more are) falls as exp(-this k); 0: none (icot)")
    remove_all_beyond: int = option(39, "removed tokens from which on all are removed (icot)")

    @property
    def whole(self):
        """Do the run's own files hold all weights? Else the base model is needed beside them."""
        return self.random_init or not self.lora_rank


# ------------------------------------------------------------------------------------- pathways


@dataclass(frozen=True)
class Pathway:
    """What stands between question and answer, and whether it is read with REM.

    Question, steps, separator and answer are encoded one by one and joined as ids. So z_N is where
    we put it, whatever the tokenizer would merge across the seams.
    """

    silent: bool = False  # REM on
    n_silent: int = 0  # C tokens <st>
    n_latents: int = 0  # continuous thoughts
    special_ids: tuple = ()  # of <st>, or of <bot> and <eot> around the thoughts
    steps: bool = False  # the model writes steps and separator itself
    # in training only
    one_mean: bool = False  # one mean of the loss over Z and Y; the separator is learned
    drop_last_step: bool = False  # it mostly spells the answer, to be copied
    skip_steps: int = 0  # steps left out from the front
    skip_tokens: int = 0  # tokens left out from the front of the CoT

    def prompt(self, question, tokenizer):
        """The Example of all that stands before the first token that the model writes.

        ValueError for an empty question, or one that the tokenizer cannot encode."""
        ids = tokenizer.encode(normalise(question), bos=True, eos=False)
        if len(ids) == (tokenizer.bos_id is not None):
            raise ValueError(f"the question is empty: {question[:60]!r}")
        ids += self.n_silent * self.special_ids
        latent_start = len(ids) + 1
        if len(self.special_ids) == 2:
            bot, eot = self.special_ids
            ids += (1 + self.n_latents) * [bot] + [eot]  # ids of thoughts are not read
        if not self.steps:
            ids += separator_ids(tokenizer)
        ids = np.array(ids, dtype=np.int32)
        return Example(ids, len(ids), len(ids), latent_start, self.n_latents)

    def example(self, problem, tokenizer):
        """The Example that is learned: the prompt, Z where the model writes it, Y and EOS."""
        prompt = self.prompt(problem.question, tokenizer)
        z = []
        if self.steps:
            steps = problem.steps[self.skip_steps : -1 if self.drop_last_step else None]
            z = tokenizer.encode(" ".join(steps), bos=False, eos=False, continued=True)
            z = z[self.skip_tokens :] + separator_ids(tokenizer)
        y = tokenizer.encode(problem.answer, bos=False, eos=True, continued=True)
        ids = np.concatenate((prompt.ids, np.array(z + y, dtype=np.int32)))
        y_start, z_start = len(ids) - len(y), prompt.z_start
        if self.one_mean and not self.steps:
            z_start -= len(separator_ids(tokenizer))
        return prompt._replace(ids=ids, z_start=z_start, y_start=y_start, one_mean=self.one_mean)

    def extract_answer(self, text):
        """The answer in what the model wrote: what follows the last separator, if it writes one."""
        if not self.steps:
            return text
        return text.rpartition(SEPARATOR)[2] if SEPARATOR in text else ""


def separator_ids(tokenizer):
    return tokenizer.encode(SEPARATOR, bos=False, eos=False, continued=True)


# --------------------------------------------------------------------------------------- losses

LOGITS = 2**23  # held at a time, at most


def cross_entropy(model, hidden, targets, weights):
    """Equations (1) and (2): sum_k weights_k * -log p(targets_k); weights: 1/(BN), 1/(BM).

    hidden [K, n], the states before the targets; targets, weights [K] -> scalar. Logits are made
    for learned tokens only, some at a time, and made again for the backward pass: all at once
    they would take more memory than the rest of the step.
    """

    def chunk_loss(hidden, targets, weights):
        logits = model.logits(hidden).float()  # [rows, V]
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()

    rows = max(1, LOGITS // model.config.vocab_size)
    chunks = zip(hidden.split(rows), targets.split(rows), weights.split(rows), strict=True)
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)


def distill_loss(teacher, student, sigma=None, norm="l1", weights=None):
    """Equation (4): 1/L sum_l ||h~_l - h^_l||_1 / sigma(h~_l) -> scalar.

    teacher, student [L, P, n], the caller detaches the teacher; sigma [L], by default that of this
    teacher. The L1 norm is a mean over n, and there is a mean over P (or weights [P] of sum 1).
    norm: see Options.distill_norm.
    """
    teacher, student = teacher.float(), student.float()
    sigma = global_std([teacher]) if sigma is None else sigma
    loss = F.smooth_l1_loss if norm == "smooth-l1" else F.l1_loss
    distance = loss(student, teacher, reduction="none")  # [L, P, n]
    distance = distance.sum(dim=2) if norm == "l1-sum" else distance.mean(dim=2)  # [L, P]
    distance = distance.mean(dim=1) if weights is None else distance @ weights  # [L]
    return (distance / sigma.clamp(min=1e-6)).mean()


def global_std(states):
    """sigma of equation (4): per layer the standard deviation over the global batch and n.

    states: a list of [L, P_i, n], this process's micro-batches -> [L], over those of all processes:
    the loss does not depend on how a batch is split. No gradient goes through it.
    """
    x = torch.cat(states, dim=1).detach().float().flatten(1)  # [L, P * n]
    count = all_reduce(x.new_tensor(x.shape[1]))
    mean = all_reduce(x.sum(dim=1)) / count
    variance = all_reduce((x - mean[:, None]).square().sum(dim=1)) / (count - 1).clamp(min=1)
    return variance.sqrt()


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Sums a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


# ----------------------------------------------------------------------------------------- DART


class MicroBatch(NamedTuple):
    """What fits into one forward pass of each pathway."""

    batches: dict  # pathway name -> data.Batch, of the same problems
    share: float  # of this process's part of the global batch: the weight of its losses
    seed: int  # of dropout


class Method(nn.Module):
    """A way of training. A subclass names its pathways and writes out its step.

    pathways: name -> Pathway. Questions are answered through the last one, `inference_pathway`.
    """

    uses = ()  # the options that this method reads and others may not
    drops_last_step = False  # by default
    distill_norm = "l1"  # by default
    n_special_tokens = 0  # <st>, or <bot> and <eot>
    trains_special_tokens = False  # also where the base is frozen

    @classmethod
    def adapters(cls, tokenizer, options, **more):
        """The model.Adapters of this method. Its special tokens are ids that the tokenizer has in
        reserve, if there are enough and they stay frozen, else new embeddings."""
        n = cls.n_special_tokens
        if len(tokenizer.reserved) >= n and not cls.trains_special_tokens:
            n = 0
        trained = cls.trains_special_tokens or not options.lora_rank
        names = ("lora_rank", "lora_alpha", "lora_dropout", *cls.uses)  # in `uses`: REM's
        given = {name: getattr(options, name) for name in names if hasattr(Adapters, name)}
        return Adapters(new_embeddings=n, train_new_embeddings=trained, **given, **more)

    def __init__(self, model, tokenizer, options):
        super().__init__()
        self.model, self.tokenizer, self.options = model, tokenizer, options
        V, n = model.config.vocab_size, model.adapters.new_embeddings
        self.special_ids = tuple(range(V, V + n)) or tokenizer.reserved[: self.n_special_tokens]
        drops = {"drop": True, "keep": False, "auto": self.drops_last_step}
        self.drop_last_step = drops[options.last_step]
        self.pathways = self.make_pathways()
        self.inference_pathway = list(self.pathways)[-1]

    def distill_positions(self, batch):
        """The P tokens whose states are compared (Options.distill_at): (row, col, weights), each
        [P]; the weights' sum is 1."""
        first = batch.z_n + (self.options.distill_at == "y_1")
        last = batch.lengths - 1 if self.options.distill_at == "z_N+Y" else first
        columns = torch.arange(batch.ids.shape[1], device=first.device)
        chosen = (columns >= first[:, None]) & (columns <= last[:, None])  # [B, T]
        row, col = chosen.nonzero(as_tuple=True)
        return row, col, 1 / (chosen.sum(dim=1)[row] * len(chosen))

    def forward(self, pathway, batch):
        """One pass -> (loss, states): the cross-entropy, a mean over the examples, and all layers'
        states [L, P, n] at `distill_positions`."""
        *positions, _ = self.distill_positions(batch)
        before, silent = (batch.target_row, batch.target_col - 1), self.pathways[pathway].silent
        hidden, states = hidden_at(self.model, batch, before, positions, silent)
        targets = batch.ids[batch.target_row, batch.target_col]
        return cross_entropy(self.model, hidden, targets, batch.weights), states

    def training_step(self, forward, micro_batches):
        """Adds up the gradients of one optimizer step -> {loss: value}, this process's means.

        forward(pathway, micro_batch, sync): `Method.forward`, perhaps in several processes, which
        average their gradients in the backward pass of the one call with sync=True.
        """
        (name,) = self.pathways
        total = 0.0
        for micro in micro_batches:
            loss, _ = forward(name, micro, sync=micro is micro_batches[-1])
            (micro.share * loss).backward()
            total += micro.share * loss.detach()
        return {name: total}

    def stage(self, step, steps_per_epoch):
        """How much of the CoT is left out after `step` steps: 0, 1, ... FINAL_STAGE; None where
        nothing ever is. The optimizer starts anew where it changes."""
        return None

    def training_pathway(self, name, stage, u):
        """The Pathway of an example at a stage; u: its random number in [0, 1)."""
        return self.pathways[name]

    def cot_pathway(self, **more):
        return Pathway(steps=True, drop_last_step=self.drop_last_step, **more)

    def answer(self, questions, pathway=None, max_new_tokens=None, batch_size=64):
        """list[Answer] to a list of questions, through the pathway of that name."""
        pathway = self.pathways[pathway or self.inference_pathway]
        new = max_new_tokens or self.options.max_new_tokens
        return answer(self.model, self.tokenizer, pathway, questions, new, batch_size)


class DART(Method):
    """Both pathways, and the distillation between them (Section 3)."""

    uses = ("n_st", "last_step", "rem_rank", "rem_alpha", "rem_is_lora")
    uses += ("distill_weight", "distill_norm", "distill_at", "attach_teacher")
    drops_last_step = True
    n_special_tokens = 1

    def make_pathways(self):
        st = Pathway(silent=True, n_silent=self.options.n_st, special_ids=self.special_ids)
        return {"cot": self.cot_pathway(), "st": st}

    def training_step(self, forward, micro_batches):
        """Equation (5): L_CoT + L_ST + lambda L_distill.

        All passes of the teacher, then sigma over the whole batch, then those of the student. The
        teacher is detached, so its graph is gone before the student's is built.
        """
        teacher, student = self.pathways
        taught, totals = [], 0.0
        for micro in micro_batches:
            loss_cot, h_teacher = forward(teacher, micro, sync=False)
            if not self.options.attach_teacher:
                (micro.share * loss_cot).backward()
                loss_cot, h_teacher = loss_cot.detach(), h_teacher.detach()
            taught.append((micro, loss_cot, h_teacher))

        sigma = global_std([h_teacher for *_, h_teacher in taught])
        norm = self.options.distill_norm.replace("auto", self.distill_norm)
        for micro, loss_cot, h_teacher in taught:
            loss_st, h_student = forward(student, micro, sync=micro is micro_batches[-1])
            *_, weights = self.distill_positions(micro.batches[student])
            loss_distill = distill_loss(h_teacher, h_student, sigma, norm, weights)
            loss = loss_cot + loss_st + self.options.distill_weight * loss_distill
            (micro.share * loss).backward()
            totals += micro.share * torch.stack((loss_cot, loss_st, loss_distill)).detach()
        return dict(zip((teacher, student, "distill"), totals, strict=True))


# -------------------------------------------------------------------------------------- answers


def hidden_at(model, batch, tokens, capture, silent=False, cache=None):
    """A pass over a batch -> hidden states [K, n] after the final norm at tokens = (row, col), and
    every layer's states [L, P, n] at capture = (row, col), each [P]."""
    if batch.n_latents:
        return hidden_behind_latents(model, batch, tokens, capture, cache)
    first, (row, col) = batch.first_needed, tokens
    hidden, states = model(batch.ids, silent, cache=cache, capture=capture, first_needed=first)
    return hidden[row, col - first], states


class Answer(NamedTuple):
    text: str  # what the model wrote, up to EOS
    passes: int  # forward passes: the tokens written, EOS among them, and continuous thoughts


@torch.no_grad()
def generate(model, tokenizer, pathway, prompts, max_new_tokens):
    """Greedy decoding. prompts: B Examples of `Pathway.prompt`, of any lengths -> B lists of ids,
    each up to its EOS, which is included. Rows do not depend on each other,
    but the longest one and the longest answer must fit into the model's positions."""
    if model.merged not in (None, "silent" if pathway.silent else "cot"):
        raise ValueError(f"the weights were merged for the {model.merged} pathway")
    eos = tokenizer.eos_id
    batch = collate(prompts, eos).to(model.device)
    (B, T), rows = batch.ids.shape, torch.arange(len(prompts), device=model.device)
    cache, last = KVCache(model, B, T + max_new_tokens), (rows, batch.lengths - 1)
    hidden, _ = hidden_at(model, batch, last, last, pathway.silent, cache)  # [B, n]
    ids = model.logits(hidden).argmax(dim=-1)[:, None]  # [B, 1], one more column each pass
    while ids.shape[1] < max_new_tokens and not (ids == eos).any(dim=1).all():
        positions = batch.lengths[:, None] + ids.shape[1] - 1  # [B, 1]
        hidden = model(ids[:, -1:], pathway.silent, positions, cache)  # [B, 1, n]
        ids = torch.cat((ids, model.logits(hidden).argmax(dim=-1)), dim=1)
    return [row[: row.index(eos) + 1] if eos in row else row for row in ids.tolist()]


def answer(model, tokenizer, pathway, questions, max_new_tokens, batch_size=64, show=None):
    """list[Answer] to a list of questions, in batches of about one length. show: what is called
    with a line of text after each."""
    prompts = [pathway.prompt(question, tokenizer) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    answers = [None] * len(prompts)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = generate(model, tokenizer, pathway, [prompts[i] for i in chosen], max_new_tokens)
            for i, row in zip(chosen, rows, strict=True):
                text = tokenizer.decode(row[:-1] if row[-1] == tokenizer.eos_id else row)
                answers[i] = Answer(text, len(row) + pathway.n_latents)
            if show:
                show(f"{start + len(chosen)} of {len(order)} problems are answered")
    finally:  # after an error, too
        model.train(training)
    return answers


def evaluate(model, tokenizer, pathway, problems, max_new_tokens, batch_size=64, show=None):
    """Answers and scores problems (`data.score`) -> one dictionary a problem."""
    questions = [problem.question for problem in problems]
    answers = answer(model, tokenizer, pathway, questions, max_new_tokens, batch_size, show)
    records = []
    for problem, (text, passes) in zip(problems, answers, strict=True):
        answered = pathway.extract_answer(text).strip()
        exact, numeric = score(answered, problem.answer)
        asked = dict(question=problem.question, gold=problem.answer, text=text, answer=answered)
        records.append(dict(**asked, exact=exact, numeric=numeric, passes=passes))
    return records


# -------------------------------------------------------------- the methods DART is compared with

FINAL_STAGE = 10**9  # of a method that leaves out all of the CoT in the end


class NoCoT(Method):
    """Fine-tuning without steps: Q | Answer: | Y EOS."""

    def make_pathways(self):
        return {"no-cot": Pathway()}


class Pause(Method):
    """PauseFT (Goyal et al. 2024): Q | <pause> x C | Answer: | Y EOS, <pause> is trained."""

    uses = ("n_st",)
    n_special_tokens = 1
    trains_special_tokens = True

    def make_pathways(self):
        return {"pause": Pathway(n_silent=self.options.n_st, special_ids=self.special_ids)}


class CoT(Method):
    """Fine-tuning on the steps: Q | steps | Answer: | Y EOS, with the loss of equation (1)."""

    uses = ("last_step",)

    def make_pathways(self):
        return {"cot": self.cot_pathway()}


class ICoT(Method):
    """Stepwise internalisation (iCoT-SI, Deng et al. 2024): Q | steps but their first s tokens |
    Answer: | Y EOS. s grows at regular intervals until no step is left."""

    uses = ("last_step", "removal_per_epoch", "removal_smoothing", "remove_all_beyond")

    def stage(self, step, steps_per_epoch):
        s = step // max(1, round(steps_per_epoch / self.options.removal_per_epoch))
        return s if s < self.options.remove_all_beyond else FINAL_STAGE

    def training_pathway(self, name, stage, u):
        """Some examples are k tokens ahead: P(k) is proportional to exp(-removal_smoothing k)."""
        if stage == FINAL_STAGE:
            return self.pathways[name]
        smoothing = self.options.removal_smoothing
        ahead = min(-math.log1p(-u) / smoothing, FINAL_STAGE) if smoothing else 0
        return self.cot_pathway(skip_tokens=stage + int(ahead))

    def make_pathways(self):
        return {"icot": Pathway()}


class Coconut(Method):
    """Continuous thoughts (Hao et al. 2024): Q | <bot> | c k thoughts | <eot> | steps but the first
    k | Answer: | Y EOS. k grows by one at each stage; in the end all steps are left out."""

    uses = ("last_step", "latents_per_step", "max_stage", "epochs_per_stage", "cot_epochs")
    n_special_tokens = 2
    trains_special_tokens = True

    def stage(self, step, steps_per_epoch):
        epochs = self.options.epochs_per_stage
        later = step / steps_per_epoch - (self.options.cot_epochs or epochs)
        k = 1 + math.floor(later / epochs) if later >= 0 else 0
        return k if k <= self.options.max_stage else FINAL_STAGE

    def training_pathway(self, name, stage, u):
        if stage == FINAL_STAGE:
            return self.pathways[name]
        n = stage * self.options.latents_per_step
        return self.cot_pathway(skip_steps=stage, n_latents=n, special_ids=self.special_ids)

    def make_pathways(self):
        n = self.options.max_stage * self.options.latents_per_step
        return {"coconut": Pathway(n_latents=n, special_ids=self.special_ids)}


class CODI(DART):
    """Continuous thoughts by distillation (Shen et al. 2025): DART's step, with the CoT pathway as
    the teacher of Q | <bot> | thoughts | <eot> | Answer: | Y EOS. LoRA in the MLP, too.

    As in its authors' code an example's loss is one mean, for the student over separator and
    answer, and the last layer is compared after the final norm (codi_form dart: as DART does)."""

    uses = ("last_step", "n_latents", "codi_form")
    uses += ("distill_weight", "distill_norm", "distill_at", "attach_teacher")
    distill_norm = "smooth-l1"
    n_special_tokens = 2

    @classmethod
    def adapters(cls, tokenizer, options):
        everywhere = Adapters.lora_on + ("gate_proj", "up_proj", "down_proj")
        return super().adapters(tokenizer, options, lora_on=everywhere, projector=True)

    def make_pathways(self):
        n, one_mean = self.options.n_latents, self.options.codi_form == "authors"
        codi = Pathway(n_latents=n, special_ids=self.special_ids, one_mean=one_mean)
        return {"cot": self.cot_pathway(one_mean=one_mean), "codi": codi}

    def forward(self, pathway, batch):
        loss, states = super().forward(pathway, batch)
        if self.options.codi_form == "authors":
            states = torch.cat((states[:-1], self.model.norm(states[-1:])))
        return loss, states


METHODS = {"dart": DART, "cot": CoT, "no-cot": NoCoT, "pause": Pause, "icot": ICoT}
METHODS |= {"coconut": Coconut, "codi": CODI}


def hidden_behind_latents(model, batch, tokens, capture, cache=None):
    """`hidden_at` for examples with continuous thoughts: each thought is the hidden state before
    it, through the model's projector where it has one (CODI), as the next input embedding.

    They come one after the other, through the cache, and so do the gradients. What is asked for
    must not stand before the last thought.
    """
    last = batch.latent_start + batch.n_latents - 1  # [B], the last thought's index
    rows = torch.arange(len(last), device=last.device)
    after = torch.arange(int((batch.lengths - last).max()), device=last.device)
    positions = last[:, None] + after  # [B, R], of the last thought and what follows it
    if cache is None:
        cache = KVCache(model, len(rows), int(positions.max()) + 1)
    to_embedding = model.projector or nn.Identity()  # in fp32

    hidden = model(batch.ids[:, : int(batch.latent_start.max())], cache=cache)
    hidden = hidden[rows, batch.latent_start - 1]  # [B, n], at <bot>
    for i in range(batch.n_latents - 1):
        at = (batch.latent_start + i)[:, None]
        hidden = model(to_embedding(hidden.float())[:, None], positions=at, cache=cache)[:, 0]

    ids = batch.ids.gather(1, positions.clamp(max=batch.ids.shape[1] - 1))
    thought = to_embedding(hidden.float())[:, None]
    x = torch.cat((thought, model.embed(ids)[:, 1:]), dim=1)  # [B, R, n]
    row, col = tokens
    capture = capture[0], capture[1] - last[capture[0]]
    hidden, states = model(x, positions=positions, cache=cache, capture=capture)
    return hidden[row, col - last[row]], states


# ----------------------------------------------------------------------------------------- runs
# A run directory holds config.json (options, architecture, digests), the tokenizer, and files of
# weights. Each of these says in its header what run it is of, so that none passes for another's.

PATHS = ("model", "tokenizer", "data", "data_dir")  # may differ where their content is the same


def fingerprint(options, model, tokenizer):
    """What a run's weights depend on, {field: value}; without the options that its method does not
    read."""
    used = METHODS[options.method].uses
    unused = {name for method in METHODS.values() for name in method.uses} - {*used} | {*PATHS}
    values = dataclasses.asdict(options) | dataclasses.asdict(model.config)
    values["tokenizer files"] = tokenizer.digest
    if model.base_digest is not None:
        values["base weights"] = model.base_digest
    return json.loads(json.dumps({name: v for name, v in values.items() if name not in unused}))


def check_same_run(path, theirs, ours):
    """ValueError, with the fields that differ, unless `theirs` agrees with all of `ours`."""
    odd = [name for name, value in ours.items() if name not in theirs or theirs[name] != value]
    if odd:
        listed = ", ".join(f"{name} {theirs.get(name)!r} (here {ours[name]!r})" for name in odd)
        raise ValueError(f"{path}: of another run: {listed}")


def file_digest(tensors, about):
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return digest_of(digests | {"about": json.dumps(about)})


def save_weights(path, tensors, **about):
    """A safetensors file with facts and a digest in its header, there as a whole or not at all.
    OSError or SafetensorError where it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about["digest"] = file_digest(tensors, about)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"about": json.dumps(about)})


def load_weights(path):
    """({name: tensor}, facts) of a file of `save_weights`. It is read once, and what was read is
    checked: a file that is replaced meanwhile is the old or the new one as a whole.

    FileNotFoundError or ValueError, with the path."""
    content = read_bytes(path)
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        about = dict(json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["about"]))
        if about.pop("digest") != file_digest(tensors, about):
            raise ValueError("its checksum is not that of its content")
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not the weights of a run ({error})") from None
    return tensors, about


def read_run(directory):
    """(Options, ModelConfig, all of config.json) of a run. FileNotFoundError, or ValueError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: not a run of train.py: there is no config.json")
    saved = read_json(path)
    try:
        names = {field.name for field in dataclasses.fields(Options)}
        given = {name: value for name, value in saved["options"].items() if name in names}
        options = check_options(Options(**given))
        saved["run"] = dict(saved["run"])
        return options, ModelConfig(**saved["model_config"]), saved
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not the configuration of a run ({error!r})") from None


def build(options, tokenizer, model_config=None, device="cpu", dtype=None, init=True):
    """The method around its model: options.model's, or where there is a model_config one of random
    weights (init=False: that the caller fills). ValueError, FileNotFoundError."""
    cls = METHODS[options.method]
    adapters, compute = cls.adapters(tokenizer, options), DTYPES[dtype or options.dtype]
    kept = compute if options.lora_rank else torch.float32  # weights that are trained stay in fp32
    if model_config is not None:
        model = Transformer(model_config, adapters, kept, device, init)
    else:
        model = Transformer.from_pretrained(options.model, adapters, kept, device)
    model.compute_dtype = compute
    size = model.config.vocab_size
    if tokenizer.size > size:
        raise ValueError(f"the tokenizer has {tokenizer.size} ids, the model {size} embeddings")
    return cls(model, tokenizer, options)


def load_run(directory, base=None, device="cpu", dtype=None, best=False):
    """(method, Options) of a directory that train.py wrote, ready to answer.

    base: directory of the base weights, if they are no longer where they were; dtype: the run's by
    default; best: the weights that were best on the validation split, not the last ones.
    FileNotFoundError or ValueError, naming the file: nothing that is not the run's is accepted.
    """
    directory = Path(directory)
    options, model_config, saved = read_run(directory)
    tokenizer = Tokenizer.from_pretrained(directory)
    path = directory / ("best.safetensors" if best else "adapter.safetensors")
    tensors, about = load_weights(path)
    options.model, where = base or options.model, ""
    if not options.whole:
        model_config, where = None, f" (with the base {options.model})"
    method = build(options, tokenizer, model_config, device, dtype, init=False)
    ours = fingerprint(options, method.model, tokenizer)
    check_same_run(f"{directory / 'config.json'}{where}", saved["run"], ours)
    check_same_run(path, about["run"], saved["run"])
    method.model.load_state(tensors, path, options.whole)
    return method.eval(), options
