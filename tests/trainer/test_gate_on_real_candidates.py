"""The gate on candidates that the product's own machinery made: a slice of ``benchmarks/gate.py``."""

import sys
from pathlib import Path

import pytest

from align3gr.demo.defaults import DemoOptions
from align3gr.demo.world import WorldSize
from benchmarks.gate import collapsed, gate_facts, inverted


@pytest.mark.slow
@pytest.mark.timeout(900)  # a base policy and two rounds first: about a minute on a quiet core
def test_planted_bad_candidates_are_refused_and_the_reference_is_not_promoted(tmp_path: Path) -> None:
    size = WorldSize(items=500, learners=500, evaluated=10)
    options = DemoOptions(seed=1, size=size, sft_epochs=5)
    said: list[str] = []
    facts = gate_facts(tmp_path / "home", options, planted=3, itself=1, jitter=0, tell=said.append)
    sys.stderr.write("\n".join(said))
    assert (facts["refused"], facts["named"], facts["planted"]) == (3, 3, 3), facts["by_kind"]
    assert (facts["promoted_itself"], facts["reference_moved"]) == (0, 0)
    assert facts["gate_users"] >= 100


def test_inverted_and_collapsed_samples_prefer_what_they_say() -> None:
    import numpy as np
    import pyarrow as pa

    row = {"sample_id": "s", "history": ["h"], "chosen": "liked", "rejected": ["bad", "worse", "third"]}
    table = pa.Table.from_pylist([row])
    turned = inverted(table).to_pylist()
    assert [(one["chosen"], one["rejected"]) for one in turned] == [("bad", ["liked"]), ("worse", ["liked"])]
    items = [f"i{number}" for number in range(10)]
    (one,) = collapsed(table, ["h", "p"], ["p", *items], np.random.default_rng(0)).to_pylist()
    assert one["chosen"] == "p"
    assert len(one["rejected"]) == 5
    assert set(one["rejected"]) <= set(items)
