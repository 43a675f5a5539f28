"""Matches rows of two embeddings that are the same token."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from merge_jax.transfers.rows import Rows

__all__ = ["match_vocabulary"]

_MARKS = {"##": "the inside of words by '##'", "Ġ": "their starts by 'Ġ'", "▁": "their starts by '▁'"}
_SHARE = 0.05  # Of a vocabulary's tokens; in some vocabularies another's mark is a plain letter.


def match_vocabulary(
    source: Sequence[str] | Mapping[str, int],
    target: Sequence[str] | Mapping[str, int],
    *,
    source_rows: int | None = None,
    target_rows: int | None = None,
) -> Rows:
    """Returns the rows of two word embeddings that are the same token, by its string: `rows=` of a `Route`.

    A target token that the source lacks keeps its row. Strings are compared exactly, capitals included.

    >>> match_vocabulary(["the", "cat", "sat"], {"a": 0, "cat": 1, "the": 2}).made
    (1, 2)

    Args:
      source: tokens of the source in the order of their numbers, or the numbers by token (`tokenizer.get_vocab()`).
      target: the same of the target's.
      source_rows: rows of the source's table, if it is padded to more than its tokens; by default as many as tokens.
      target_rows: the same of the target's table.

    Raises:
      ValueError: a token that appears twice, numbers that are not 0, 1, ..., no shared token, fewer rows than tokens,
        or vocabularies that mark words differently, such as `##ing` and `Ġthe`.
    """
    matched = Rows.by_name(source, target)
    marks = {"source": _mark(source), "target": _mark(target)}
    if marks["source"] != marks["target"]:
        how = ", ".join(f"the {role}'s marks {_MARKS.get(mark, 'neither')}" for role, mark in marks.items())
        raise ValueError(
            f"the vocabularies mark words differently ({how}), so that one string is not one token: convert one to"
            " the other's form"
        )
    target_size, source_size = matched.counts
    for role, rows, size in (("source", source_rows, source_size), ("target", target_rows, target_size)):
        if rows is not None and rows < size:
            raise ValueError(f"{role}_rows is {rows}, but the {role} has {size} tokens")
    return replace(matched, counts=(target_rows or target_size, source_rows or source_size))


def _mark(tokens: Iterable[str]) -> str:
    """Returns how a vocabulary marks the insides or starts of words; empty if it does not."""
    tokens = list(tokens)
    counts = {mark: sum(token.startswith(mark) for token in tokens) for mark in _MARKS}
    mark = max(counts, key=lambda one: counts[one])
    return mark if counts[mark] > _SHARE * len(tokens) else ""
