"""Preference samples as text, in the columns that TRL's trainers read: prompt, chosen, rejected.

A prompt is written so that the policy's tokenizer, called as TRL calls it, reads exactly the tokens that the
policy would be asked with; that is checked for every sample. TRL's DPO trainer then adds an end token to
every answer, which ours does not have (docs/trl.md).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from policies.policy import Policy
from trainer.errors import TrainerError, UnusableFile

from .samples import Samples, encode_samples

Rows = Literal["pairs", "lists"]
"""A row a pair of chosen and rejected, which plain TRL trains on; or a row a sample, ``rejected`` a list."""

_AT_ONCE = 1024


@dataclass(frozen=True)
class ExportedPreferences:
    """What was written."""

    file: str
    policy: str
    samples: int
    rows: int
    refused: dict[str, int]
    """Samples of the table that the policy has no tokens for, by reason."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def export_preferences(
    table: pa.Table,
    policy: Policy,
    out: Path,
    *,
    rows: Rows = "pairs",
    max_rejected: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> ExportedPreferences:
    """Write a stage's table for ``policy`` to ``out``, JSON lines (.jsonl) or Parquet, whole or not at all.

    Columns: sample_id, prompt, chosen, rejected. ``progress`` is told (samples done, samples in all).
    Raises UnusableFile for another kind of file or one that exists, BrokenSamples as a stage does, and
    TrainerError when the tokenizer reads a prompt as other tokens than the policy.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UnusableFile(f"{out} is neither .jsonl nor .parquet; name one of these")
    if out.exists():
        raise UnusableFile(f"{out} exists already; choose another place, or remove it first")
    samples = encode_samples(table, policy.tokens, max_rejected)
    written = 0
    with _writer(out, rows) as write:
        for start in range(0, len(samples), _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, len(samples)))
            some = _rows(_texts(samples, policy, numbers), rows)
            write(some)
            written += some.num_rows
            if progress is not None:
                progress(numbers.stop, len(samples))
    return ExportedPreferences(str(out), policy.version, len(samples), written, samples.refused)


@dataclass(frozen=True)
class _Text:
    """One sample as text."""

    sample_id: str
    prompt: str
    chosen: str
    rejected: list[str]


def _texts(samples: Samples, policy: Policy, numbers: range) -> list[_Text]:
    """These samples as text; every prompt and chosen answer is read back and compared."""
    tokenizer = policy.tokenizer

    def text(ids: list[int]) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(ids))

    added = _tokens_in_front(policy)
    found = []
    for number in numbers:
        prompt = samples.prompts[number]
        chosen, *rejected = map(text, samples.answers[number])
        found.append(_Text(samples.ids[number], text(prompt[added:]), chosen, rejected))
    read = tokenizer([one.prompt + one.chosen for one in found])["input_ids"] if found else []
    for number, ids in zip(numbers, read, strict=True):
        if ids != samples.prompts[number] + samples.answers[number][0]:
            raise TrainerError(
                f"the tokenizer of policy {policy.version} reads the prompt of sample {samples.ids[number]} "
                "as other tokens than the policy: TRL cannot be given this policy's samples as text"
            )
    return found


def _tokens_in_front(policy: Policy) -> int:
    """How many of a prompt's first tokens the tokenizer writes by itself."""
    begin = list(policy.tokens.begin)
    front = policy.tokenizer("")["input_ids"]
    return len(begin) if begin and front[: len(begin)] == begin else 0


def _rows(texts: list[_Text], rows: Rows) -> pa.Table:
    if rows == "lists":
        columns = [[one.sample_id, one.prompt, one.chosen, one.rejected] for one in texts]
    else:
        columns = [[one.sample_id, one.prompt, one.chosen, other] for one in texts for other in one.rejected]
    schema = _schema(rows)
    return pa.table([list(column) for column in zip(*columns, strict=True)], schema=schema)


def _schema(rows: Rows) -> pa.Schema:
    rejected = pa.string() if rows == "pairs" else pa.list_(pa.string())
    texts = [pa.field(name, pa.string()) for name in ("sample_id", "prompt", "chosen")]
    return pa.schema([*texts, pa.field("rejected", rejected)])


@contextmanager
def _writer(out: Path, rows: Rows) -> Iterator[Callable[[pa.Table], None]]:
    """Takes tables; ``out`` is there only when all of them are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.partial")
    try:
        if out.suffix == ".parquet":
            with pq.ParquetWriter(temporary, _schema(rows), compression="zstd") as parquet:
                yield parquet.write_table
        else:
            with temporary.open("w", encoding="utf-8") as file:
                yield lambda table: file.writelines(
                    json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()
                )
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
