"""One table of evaluations, and what holds for each of them."""

import functools
import itertools

import numpy as np
import pytest

from merge_jax import objectives
from merge_jax.data import Streamed
from tests.objectives.test_contracts import (
    ANSWERS,
    BOTH,
    ENCODERS,
    NET,
    ORDER,
    SIZE,
    SPANS,
    VOCABULARY,
    entries,
    variables_of,
)


class Reads:
    """A table that knows which rows were read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __getitem__(self, rows):
        self.read.append(np.asarray(rows).tolist())
        return self.array[rows]


def decode(logits, arrays):
    return [VOCABULARY[one[:, 0].argmax()] for one in logits]


EMBEDDING = [
    functools.partial(
        ENCODERS.apply, method=lambda encoders, x, train, kind=kind: getattr(encoders, kind)(x, train=train)
    )
    for kind in ("image", "text")
]
# What makes one, with something around every apply function; its model, the model's inputs, and the other entries.
EVALUATIONS = {
    "classifier": (
        lambda around, **options: objectives.evaluate_classifier(around(NET.apply), **options),
        *(NET, ("image",), ("label",)),
    ),
    "spans": (
        lambda around, **options: objectives.evaluate_spans(around(SPANS.apply), decode, ANSWERS, **options),
        *(SPANS, ("tokens",), ("start", "end", "example")),
    ),
    "vqa": (
        lambda around, **options: objectives.evaluate_vqa(around(NET.apply), VOCABULARY, ANSWERS, **options),
        *(NET, BOTH, ("answers", "example")),
    ),
    "answers": (
        lambda around, **options: objectives.predict_answers(around(NET.apply), VOCABULARY, **options),
        *(NET, BOTH, ()),
    ),
    "retrieval": (
        lambda around, **options: objectives.evaluate_retrieval(*map(around, EMBEDDING), ks=(1, 2), **options),
        *(ENCODERS, BOTH, ("group", "image_id", "caption_id")),
    ),
}
every_evaluation = pytest.mark.parametrize("name", EVALUATIONS)


@functools.cache
def evaluated(name, batch_size):
    """Returns the evaluation of arrays, the arrays, what it gives, and the sizes of the batches that it compiled."""
    (make, model, inputs, names), sizes = EVALUATIONS[name], []

    def counted(apply_fn):
        def apply(variables, *inputs, train):
            sizes.append(len(inputs[0]))
            return apply_fn(variables, *inputs, train=train)

        return apply

    evaluate = functools.partial(make(counted, batch_size=batch_size), *variables_of(model, inputs))
    arrays = entries(*inputs, *names)
    return evaluate, arrays, evaluate(arrays), sizes


def assert_same(found, expected):
    assert found == (expected if isinstance(expected, list) else pytest.approx(expected, rel=1e-5))


@every_evaluation
def test_padding_does_not_count_and_one_compilation_serves_all_batches(name):
    *_, found, sizes = evaluated(name, 4)
    assert_same(found, evaluated(name, 64)[2])
    assert set(sizes) == {4}
    assert len(sizes) == (2 if name == "retrieval" else 1)


@every_evaluation
def test_the_order_of_examples_does_not_matter_in_an_evaluation(name):
    evaluate, arrays, expected, _ = evaluated(name, 4)
    found = evaluate({entry: array[ORDER] for entry, array in arrays.items()})
    assert_same(found, [expected[i] for i in ORDER] if name == "answers" else expected)


@every_evaluation
def test_streamed_inputs_are_read_once_and_no_more_than_a_batch_at_a_time(name):
    evaluate, arrays, expected, _ = evaluated(name, 4)
    entry = next(iter(arrays))
    table = Reads(arrays[entry][::-1])
    assert evaluate(arrays | {entry: Streamed(table, np.arange(SIZE)[::-1])}) == expected
    rows = list(itertools.chain(*table.read))
    assert max(map(len, table.read)) == 4
    assert len(rows) == len(set(rows)) == (5 if name == "retrieval" else 6)


@every_evaluation
def test_what_cannot_be_evaluated_is_refused(name):
    evaluate, arrays, *_ = evaluated(name, 4)
    for entry in arrays:
        with pytest.raises(ValueError, match=f"^the batch has no '{entry}'; "):
            evaluate({other: array for other, array in arrays.items() if other != entry})
        with pytest.raises(
            ValueError, match=rf"^all entries must have the same number of examples, got .*'{entry}': 5"
        ):
            evaluate(arrays | {entry: arrays[entry][:5]})
    with pytest.raises(ValueError, match=r"^cannot evaluate on no (examples|pairs)$"):
        evaluate({entry: array[:0] for entry, array in arrays.items()})
    with pytest.raises(ValueError, match=r"^batch_size must be a whole number of at least 1, got 0$"):
        EVALUATIONS[name][0](lambda apply_fn: apply_fn, batch_size=0)
