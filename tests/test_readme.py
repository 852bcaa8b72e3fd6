"""README.md: its commands run as they stand (on a smaller built-in task), its options are known, what it quotes is there. CPU, no network."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dart
import data
import eval as evaluation
import train
from model import Transformer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|&& |; do |[A-Z_]+=\S+ )((?:python|torchrun) [^&;|\n]+)", re.MULTILINE)


def commands(text):
    return [shlex.split(command) for command in COMMAND.findall(text.replace("\\\n", " "))]


IN_BLOCKS = [(text.startswith("# needs: "), command) for kind, text in BLOCKS if kind == "sh" for command in commands(text)]
IN_PROSE = [command for text in re.findall(r"`([^`]+)`", PROSE) for command in commands(" ".join(text.split()))]


def program(command):
    """(script, its arguments) of a command; (None, ...) for those that are no program of ours."""
    words = [word for word in command if word != "-q" and not re.match("--(nnodes|nproc|rdzv|max-restarts)", word)][1:]
    return (words[0], words[1:]) if words and words[0] in PROGRAMS else (None, words)


PROGRAMS = {"train.py": train.main, "eval.py": evaluation.main, "model.py": evaluation.export, "data.py": data.main}
PARSE = {"train.py": train.read_options, "eval.py": lambda words: evaluation.parse_options(evaluation.Options, words, "")}


def test_every_option_in_a_command_is_known():
    known = [program(command) for _, command in IN_BLOCKS] + [program(command) for command in IN_PROSE]
    assert len(IN_BLOCKS) > 15 and len(IN_PROSE) > 10 and sum(script is not None for script, _ in known) > 20
    for script, words in known:
        if script in PARSE and "..." not in words and "--help" not in words:
            PARSE[script]([word.replace("$s", "1") for word in words])


def test_every_option_that_is_named_exists():
    flags = {field for cls in (train.Options, evaluation.Options) for field in cls.__dataclass_fields__}
    others = {"help", "tokenizer", "memory", "plain", "model", "batches", "repeats", "vocab", "n"}  # of data.py and the benchmarks
    torchruns = {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "max-restarts"}
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README))
    assert named - flags - others - torchruns == set() and len(named) > 40


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty directory, and a built-in task of few problems and steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "HELD_OUT", {"test": 24, "valid": 8})
    monkeypatch.setattr(train, "TRAIN_SAMPLE", 8)
    monkeypatch.setattr(evaluation.Options.__dataclass_fields__["latency"], "default", 2)
    monkeypatch.setitem(train.PRESETS, "demo", train.PRESETS["demo"] | dict(steps=2, batch_size=8, eval_every=2, jobs=1, device="cpu"))
    return tmp_path


def test_the_commands_run_as_they_stand(small, capsys):
    """Those that are not marked, in their order; what has a placeholder (NAME, DIR) or needs what a mark says is left out. And the answer
    of an exported run is what transformers makes of it, where that is installed."""
    ran = []
    for command in [command for marked, command in IN_BLOCKS if not marked] + IN_PROSE:
        script, words = program(command)
        placeholder = any(word == "..." or re.search("[A-Z]{3}", word) for word in words)
        if script in (None, "data.py") or placeholder or "--help" in words or "--suite" in words or [script, *words] in ran:
            continue
        if script == "eval.py" and ("--ckpt" not in words or "--compile" in words):  # which takes a minute, and has tests of its own
            continue
        if "--plot" in words and importlib.util.find_spec("matplotlib") is None:
            continue
        ran.append([script, *words])
        PROGRAMS[script]([word if before != "--steps" else "3" for before, word in zip(["", *words], words, strict=False)])
    out = capsys.readouterr().out
    assert len(ran) >= 8 and {script for script, *_ in ran} == {"train.py", "eval.py", "model.py"}, ran
    assert "| dart   | st " in out and "5 Answer" in out and "likeliest tokens / control" in out and "plain llama model" in out
    assert (small / "out" / "demo-hf" / "model.safetensors").is_file()


def test_the_python_that_serves_an_exported_run(small, capsys):
    pytest.importorskip("transformers", reason="is what it is about")
    train.main(["--compare"])
    evaluation.export(["export", "out/demo", "out/demo-hf"])
    (code,) = (text for kind, text in BLOCKS if kind == "python" and "transformers" in text)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=small)
    method, _ = evaluation.load_run("out/demo")
    question = re.search('question = "(.*)"', code)[1]
    (ours,) = dart.answer(method.model, method.tokenizer, method.pathways["st"], [question], 24)
    assert done.returncode == 0 and done.stdout == ours.text + "\n", done.stderr


def test_the_method_that_is_shown_can_be_trained(small, monkeypatch):
    (code,) = (text for kind, text in BLOCKS if kind == "python" and "class " in text)
    monkeypatch.setattr(dart, "METHODS", dict(dart.METHODS))
    exec(code, vars(dart) | {"METHODS": dart.METHODS})
    field = dart.Options.__dataclass_fields__["method"]
    monkeypatch.setattr(train.Options.__dataclass_fields__["method"], "metadata",
                        {**field.metadata, "choices": (*field.metadata["choices"], "silent-only")})  # fmt: skip
    train.main(["--method", "silent-only", "--compare"])
    method, _ = evaluation.load_run("out/demo")
    assert list(method.pathways) == ["st"] and type(method).__name__ == "SilentOnly"


def test_the_lines_of_the_equations_are_in_the_files():
    quoted = re.findall(r"`(\w+\.py)`: `(.+?)`", README)
    assert len(quoted) >= 5
    for name, line in quoted:
        assert line in [own.strip() for own in (ROOT / name).read_text(encoding="utf-8").splitlines()], line


def test_the_files_are_as_long_as_it_says():
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE):
        assert int(lines) == pytest.approx(len((ROOT / name).read_text(encoding="utf-8").splitlines()), rel=0.05), name


def test_every_method_data_set_preset_and_suite_is_named():
    names = [*dart.METHODS.keys() - {"dart"}, *data.DATASETS, *train.PRESETS, *train.SUITES]
    assert [name for name in names if f"`{name}`" not in README and f"--method {name}" not in README and f"--preset {name}" not in README] == []


def test_the_model_of_the_built_in_task_is_as_large_as_it_says():
    model = Transformer(train.MODELS["demo"])
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights" in README
