"""What several files of tests share."""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models of the tests are too small for more

import dart

TIMES = ("seconds", "tokens_per_s", "peak_memory")


def log(out):
    """The lines of log.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name not in TIMES} for line in lines]


def same(out, other):
    """Whether two runs are the same to the last bit, but for times."""
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}
    assert log(out) == log(other)
    for name in ("adapter", "best", "checkpoint"):
        pair = [dart.load_weights(run / f"{name}.safetensors") for run in (out, other)]
        (ours, about), (theirs, wanted) = pair
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), name
        for facts in (about, wanted):
            facts["progress"].pop("seconds")
        assert about == wanted, name
    return True
