"""`python model.py export`: what transformers makes of exported runs (fixtures), and the same where it is installed. CPU, no network."""

import functools
import hashlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dart
import data
import eval as evaluation
import train
from model import MODELS, Adapters, ModelConfig, Transformer, export_hf, write_config

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
RUNS = ("run-llama", "run-qwen2", "run-gpt2")


def exported(run, directory, *more):
    evaluation.export(["export", str(run), str(directory), *more])
    return directory


def last_logits(method, pathway, question, count=4):
    """Of a run's model, LoRA and REM beside the weights."""
    pathway = method.pathways[pathway]
    with torch.no_grad():
        ids = torch.tensor([pathway.prompt(question, method.tokenizer)])
        return method.model.logits(method.model(ids, pathway.silent))[0, -count:].float()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("pathway", ["st", "cot"])
def test_transformers_makes_of_an_exported_run_what_it_is_here(tmp_path, run, pathway):
    """The files are those that transformers read; its ids, logits and greedy answers are ours; a new token is never the likeliest."""
    expected = json.loads((FIXTURES / run / "expected.json").read_text())
    logits = load_file(FIXTURES / run / "expected.safetensors")
    method, _ = evaluation.load_run(FIXTURES / run)
    way, V = method.pathways[pathway], method.tokenizer.size
    prompts = [way.prompt(question, method.tokenizer) for question in expected["questions"]]
    for dtype, most in (("fp32", 1e-5), ("bf16", 0.03)):
        want, hf = expected[f"{pathway} {dtype}"], exported(FIXTURES / run, tmp_path / dtype, "--pathway", pathway, "--dtype", dtype)
        assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in hf.glob("*.json")} == want["files"]
        again = Transformer.from_pretrained(hf, dtype=evaluation.DTYPES[dtype]).eval()
        for i, question in enumerate(expected["questions"]):
            st_id = method.tokenizer.export(True)[1]
            assert want["ids"][i] == [st_id if way.n_fill and token == method.fill_id else token for token in prompts[i]]
            theirs, ours = logits[f"{pathway} {dtype} {i}"].float(), last_logits(method, pathway, question)
            assert relative(theirs[:, :V], ours[:, :V]) < most and (dtype == "bf16" or (theirs[:, :V] - ours[:, :V]).abs().max() < 1e-4)
            with torch.no_grad():
                read = again.logits(again(torch.tensor([want["ids"][i]])))[0, -4:].float()
            assert relative(theirs, read) < most and (theirs.argmax(1) != st_id).all()
    assert dart.generate(method.model, method.tokenizer, way, prompts, 8) == expected[f"{pathway} fp32"]["answers"]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """method -> a run of two steps on the built-in task."""

    @functools.cache
    def make(method, *more):
        out = tmp_path_factory.mktemp("trained") / "run"
        train.main(["--compare", "--steps", "2", "--batch_size", "8", "--eval_size", "4", "--device", "cpu", "--method", method,
                    "--out", str(out), *more])  # fmt: skip
        return out

    return make


QUESTION = "sam has 7 pens gets 5 packs of 4 ?"


@pytest.mark.parametrize("method, pathway, more", [("dart", "st", ()), ("dart", "cot", ()), ("no-cot", "no-cot", ()), ("pause", "pause", ()),
                                                   ("dart", "st", ("--n_st", "0"))])  # fmt: skip
def test_the_card_says_how_to_prompt_an_exported_run(tmp_path, trained, method, pathway, more):
    """Its Python, run as it stands, prints our answer; loading says nothing of missing or unexpected weights."""
    transformers = pytest.importorskip("transformers", reason="reads what was exported")
    run = trained(method, *more)
    hf = exported(run, tmp_path / "hf", "--pathway", pathway)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, about = transformers.AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert not any(about.values())
    code = re.search(r"```python\n(.*?)```", (hf / "README.md").read_text(), re.DOTALL)[1]
    code = f"DIRECTORY = {str(hf)!r}\n" + code.replace('"..."', repr(QUESTION))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded, _ = evaluation.load_run(run)
    (ours,) = dart.answer(evaluation.merged_copy(loaded, pathway), loaded.tokenizer, loaded.pathways[pathway], [QUESTION], 24)
    assert done.returncode == 0 and done.stdout.rstrip("\n") == ours.text.rpartition("Answer:")[2], done.stderr
    assert "warn" not in done.stderr.lower()


@pytest.mark.parametrize("method, pathway", [("dart", "st"), ("dart", "cot"), ("pause", "pause"), ("codi", "cot")])
def test_an_exported_run_is_a_model_to_start_from(tmp_path, trained, method, pathway):
    """It is read here, too, and does what the pathway did: a trained embedding, in the place of the reserved one, as well."""
    run = trained(method)
    loaded, _ = evaluation.load_run(run)
    hf, way = exported(run, tmp_path / "hf", "--pathway", pathway), loaded.pathways[pathway]
    model, ids = Transformer.from_pretrained(hf).eval(), way.prompt(QUESTION, loaded.tokenizer)
    st_id = loaded.tokenizer.export(True)[1]
    with torch.no_grad():
        found = model.logits(model(torch.tensor([[st_id if way.n_fill and i == loaded.fill_id else i for i in ids]])))[0, -4:]
    torch.testing.assert_close(found, last_logits(loaded, pathway, QUESTION), rtol=1e-4, atol=1e-5)
    assert {path.stat().st_mode for path in hf.iterdir()} == {(hf / "config.json").stat().st_mode}


@pytest.mark.parametrize("family, st_id", [("qwen2", 96), ("qwen2", 5), ("gpt2", 96), ("qwen2-untied", 96), ("gpt2-untied", 5)])
@pytest.mark.parametrize("trains", [False, True])
def test_where_the_row_of_a_silent_token_goes(tmp_path, family, st_id, trains):
    """Behind the vocabulary or within it. A trained row is not the head's: then the head is a tensor of its own."""
    model = Transformer.from_pretrained(FIXTURES / family, Adapters(extra_rows=1, train_extra_rows=trains)).eval()
    if trains:
        model.extra_rows.data.fill_(3.0)
    ids, tied = torch.tensor([[1, 7, 96, 96, 8]]), model.config.tie_word_embeddings
    with torch.no_grad():
        want = model.logits(model(ids))[0]
        export_hf(model.merge(), tmp_path, st_id)
        again = Transformer.from_pretrained(tmp_path).eval()
        found = again.logits(again(ids.where(ids < 96, st_id)))[0]
    assert again.config.tie_word_embeddings == (tied and not trains) and found.shape[1] == max(96, st_id + 1)
    others = [i for i in range(96) if i != st_id]
    torch.testing.assert_close(found[:, others], want[:, others], rtol=1e-4, atol=1e-4)
    if st_id == 96:
        torch.testing.assert_close(found[:, 96], want.mean(1), rtol=1e-4, atol=1e-4)
    elif trains or not tied:  # its score is what it was
        torch.testing.assert_close(found[:, st_id], want[:, st_id], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_shards(tmp_path, family):
    for size in (10**9, 20_000, 1):
        directory = tmp_path / str(size)
        directory.mkdir()
        export_hf(Transformer.from_pretrained(FIXTURES / family).merge(), directory, shard_bytes=size)
        found = Transformer.from_pretrained(directory).state_dict()
        for name, tensor in Transformer.from_pretrained(FIXTURES / family).state_dict().items():
            assert torch.equal(found[name], tensor)
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        if size == 10**9:
            assert files == ["model.safetensors"]
            continue
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files and len(files) > 2
        assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
        stored = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
        sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in stored.values()]
        assert sum(sizes) == index["metadata"]["total_size"]
        assert all(total <= size or len(stored[name]) == 1 for name, total in zip(stored, sizes, strict=True))


def test_what_is_merged_twice_is_the_same_and_what_is_not_is_refused(tmp_path):
    adapters = Adapters(lora_rank=2, rem_rank=2)
    with pytest.raises(ValueError, match="only a merged model"):
        export_hf(Transformer.from_pretrained(FIXTURES / "llama", adapters), tmp_path)
    model = Transformer.from_pretrained(FIXTURES / "llama", adapters)
    contents = []
    for _ in range(2):
        export_hf(model.merge(), tmp_path)
        contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert contents[0] == contents[1]
    with pytest.raises(ValueError, match="only a merged model"):
        export_hf(model.fuse(), tmp_path)


@pytest.mark.parametrize("name", [*MODELS, "llama", "qwen2", "gpt2-untied"])
def test_a_configuration_that_is_written_is_read_as_it_was(tmp_path, name):
    config = MODELS[name] if name in MODELS else ModelConfig.from_pretrained(FIXTURES / name)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    assert ModelConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda trained, tmp: [trained("dart"), tmp / "hf", "--pathway", "no-cot"], "--pathway no-cot: dart has cot and st"),
        (lambda trained, tmp: [trained("codi"), tmp / "hf"], "--pathway codi: continuous thoughts are no tokens"),
        (lambda trained, tmp: [trained("dart"), trained("dart")], "exists already"),
        (lambda trained, tmp: [trained("dart"), trained("dart") / "config.json"], "exists already"),
        (lambda trained, tmp: [trained("dart"), trained("dart") / "config.json" / "hf"], "config.json"),
        (lambda trained, tmp: [FIXTURES / "llama", tmp / "hf"], "not the configuration of a run"),
        (lambda trained, tmp: [tmp, tmp / "hf"], "not a run of train.py"),
        (lambda trained, tmp: [trained("dart")], "HF_DIR"),
        (lambda trained, tmp: [trained("dart"), tmp / "hf", "--dtype", "fp8"], "fp8"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, trained, capsys, arguments, message):
    line = ["export", *map(str, arguments(trained, tmp_path))]
    with pytest.raises(SystemExit) as stop:
        evaluation.export(line)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", RUNS)
def test_a_second_round_has_the_same_silent_token(tmp_path, run):
    """Trained from what was exported, and exported again."""
    first = data.Tokenizer.from_pretrained(FIXTURES / run).export(True)[1]
    again = data.Tokenizer.from_pretrained(exported(FIXTURES / run, tmp_path / "hf"))
    files, st_id = again.export(True)
    names = [token["content"] for token in json.loads(files["tokenizer.json"])["added_tokens"]]
    assert st_id == first and names.count("<st>") == 1 and dart.DART.adapters(again, dart.Options()).extra_rows == 0


def test_where_an_export_goes(tmp_path, trained, monkeypatch, capsys):
    """A path that ends in a slash, an empty directory by its dot, a name that is taken up by half of another export."""
    run = trained("dart")
    for name in ("a/", "b"):
        assert (exported(run, f"{tmp_path}/{name}") and (tmp_path / name / "config.json")).is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    exported(run, ".")
    assert (tmp_path / "here" / "config.json").is_file()
    (tmp_path / "c.tmp").mkdir()
    with pytest.raises(SystemExit):
        exported(run, tmp_path / "c")
    assert "c.tmp: is left of an export" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c.tmp", "here"}


def test_the_card_offers_what_can_be_exported(trained):
    for method, name, offered in (("dart", "st", True), ("codi", "cot", False), ("no-cot", "no-cot", False)):
        loaded, _ = evaluation.load_run(trained(method))
        assert ("exported as that one, too" in evaluation.card(loaded, name, 24)) == offered


def test_a_failed_export_leaves_nothing_behind(tmp_path, trained, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit) as stop:
        evaluation.export(["export", str(trained("dart")), str(tmp_path / "hf")])
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_program_runs_by_itself(tmp_path):
    command = [sys.executable, str(ROOT / "model.py"), "export", str(FIXTURES / "run-gpt2"), str(tmp_path / "a" / "hf")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "plain gpt2 model" in done.stdout and (tmp_path / "a" / "hf" / "model.safetensors").is_file()
