"""Synthetic texts from templates, for machines without data: results on them do not apply to real language.

Reviews, topics and questions share words, so that knowledge can transfer between them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from merge_jax.checks import check_at_least_one
from merge_jax.data.text.text_set import LabelledTexts, Question, QuestionSet, TextSet

__all__ = ["synthetic_questions", "synthetic_reviews", "synthetic_topics"]

_Item = TypeVar("_Item")

_WORKS = ("film", "book", "play", "concert", "song", "show", "novel", "game", "speech", "story")
_PARTS = ("plot", "cast", "acting", "music", "ending", "script", "dialogue", "pace", "opening", "hero")
# Opposites are at the same position: index 0 is negative, index 1 is positive.
_ADJECTIVES = (
    ("bad", "poor", "dull", "clumsy", "boring", "weak", "cold", "silly", "stale", "tedious", "awful", "flat"),
    (
        "good",
        "great",
        "charming",
        "clever",
        "moving",
        "strong",
        "warm",
        "funny",
        "fresh",
        "gripping",
        "lovely",
        "bright",
    ),
)
_NOUNS = (
    ("failure", "disappointment", "mess", "bore", "waste of time", "disaster"),
    ("triumph", "delight", "success", "treat", "pleasure", "joy"),
)
_DEGREES = ("very", "really", "truly", "quite", "rather", "so")
_NEGATIONS = ("not", "never", "hardly", "far from")
_OPENINGS = ("", "", "in the end ", "to be honest ", "for me ", "this time ", "on the whole ")
_CONCESSIONS = ("although", "though", "while")
# Half of the reviews have two clauses of opposite sentiment, and a third of the clauses negate the opposite word, so
# that no single word determines the class.
_MIXED_RATE = 1 / 2
_NEGATED_RATE = 1 / 3

_TIMES = ("on Monday", "on Friday", "last night", "this week", "this time", "in the end", "after a long wait")
_EVENTS = ("result", "moment", "surprise", "start", "success", "failure")


class _Topic(NamedTuple):
    agents: tuple[str, ...]
    actions: tuple[str, ...]
    objects: tuple[str, ...]


_TOPICS = {
    "world": _Topic(
        ("the president", "the minister", "the army", "the parliament", "a rebel group", "the embassy"),
        ("signed", "rejected", "debated", "condemned", "announced", "broke"),
        ("peace treaty", "election", "border law", "ceasefire", "hostage deal", "record of the war"),
    ),
    "sport": _Topic(
        ("the striker", "the coach", "the home team", "the champion", "a young goalkeeper", "the referee"),
        ("won", "lost", "missed", "celebrated", "announced", "broke"),
        ("cup final", "match", "season", "penalty", "transfer deal", "record of the league"),
    ),
    "business": _Topic(
        ("the bank", "the airline", "an oil company", "the investor", "a car maker", "the retailer"),
        ("bought", "sold", "reported", "raised", "announced", "rejected"),
        ("quarterly profit", "share price", "merger", "loan", "supply deal", "record of the market"),
    ),
    "science": _Topic(
        ("the astronomer", "a biologist", "the laboratory", "the space agency", "a software team", "the engineer"),
        ("discovered", "launched", "tested", "measured", "announced", "reported"),
        ("new planet", "satellite", "vaccine", "computer chip", "research deal", "record of the climate"),
    ),
}

_PEOPLE = (
    *("Anna", "Ben", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Karim", "Lucy"),
    *("Maria", "Noah", "Olga", "Pablo", "René", "Sara", "Tom", "Zoë"),
)
_PLACES = (
    *("Paris", "London", "Madrid", "Oslo", "Cairo", "Lima", "Delhi", "Zürich", "Boston", "Kyoto", "Prague", "Dublin"),
    *("New York", "São Paulo", "Cape Town", "Hong Kong"),
)
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "dark green", "light blue", "grey", "brown")
_THINGS = ("car", "boat", "bicycle", "house", "piano", "coat", "horse", "lamp", "sofa", "kite")
_JOBS = ("teacher", "baker", "pilot", "nurse", "film critic", "farmer", "reporter", "singer", "coach", "biologist")
_IMPRESSIONS = tuple(word for words in _ADJECTIVES for word in words)


class _Kind(NamedTuple):
    """A kind of fact: `{0}` is a person, `{1}` and `{2}` are drawn from `pools`; questions ask for the last one."""

    statement: str
    ask_value: str
    ask_person: str
    pools: tuple[tuple[str, ...], tuple[str, ...]]


_KINDS = (
    _Kind("{0} lives {1} {2}.", "where does {0} live?", "who lives {1} {2}?", (("in",), _PLACES)),
    _Kind("{0} works as {1} {2}.", "what is the work of {0}?", "who works as {1} {2}?", (("a",), _JOBS)),
    _Kind("{0} has a {2} {1}.", "what colour is the {1} of {0}?", "who has a {2} {1}?", (_THINGS, _COLOURS)),
    _Kind("{0} found the {1} {2}.", "how did {0} find the {1}?", "who found the {1} {2}?", (_WORKS, _IMPRESSIONS)),
)


class _Fact(NamedTuple):
    kind: _Kind
    person: str
    detail: str
    value: str


def synthetic_reviews(num_train: int, num_test: int, seed: int) -> TextSet:
    """Returns one-sentence reviews of at most 20 words and marks, half negative and half positive.

    "The plot is hardly a disappointment." is positive, and so is "Although the cast is weak, this film is funny.": the
    main clause decides. No single word determines the class. No text repeats, in train and test together.

    Source: our own templates, so that a run needs no download.

    Raises:
      ValueError: a number is below 1, or there are too few different texts.
    """
    return _text_set("synthetic_reviews", ("negative", "positive"), _review, num_train, num_test, seed)


def synthetic_topics(num_train: int, num_test: int, seed: int) -> TextSet:
    """Returns one-sentence news of at most 25 words and marks, on the world, sport, business or science.

    The topics are balanced. Half of the sentences also mention a bystander from another topic; half end with a remark
    in the words of the reviews. The words determine the topic, in any order. No text repeats, in train and test
    together.

    Source: our own templates, so that a run needs no download.

    Raises:
      ValueError: a number is below 1, or there are too few different texts.
    """
    return _text_set("synthetic_topics", tuple(_TOPICS), _news, num_train, num_test, seed)


def synthetic_questions(num_train: int, num_test: int, seed: int) -> QuestionSet:
    """Returns questions on passages of three facts about two people, at most 29 words and marks together.

    Half of the passages state the same kind of fact about both people. A third of the questions have no answer: half of
    these ask for a kind of fact that the passage lacks, the others about someone else, or for a description that fits
    nobody. No passage repeats, in train and test together. Works, and opinions on them, use the words of the reviews.

    Source: our own templates, so that a run needs no download.

    Raises:
      ValueError: a number is below 1, or there are too few different passages.
    """
    asks = (_ask_value, _ask_person, _ask_in_vain)
    train, test = _draw(
        lambda rng, number: asks[number](rng), lambda question: question.passage, len(asks), num_train, num_test, seed
    )
    return QuestionSet("synthetic_questions", *(tuple(question for question, _ in part) for part in (train, test)))


def _review(rng: np.random.Generator, label: int) -> str:
    if rng.random() < _MIXED_RATE:
        concession = _pick(rng, _CONCESSIONS)
        subjects = (f"the {_pick(rng, _PARTS)}", f"this {_pick(rng, _WORKS)}")
        first = int(rng.integers(2))
        side, main = _clause(rng, subjects[first], 1 - label), _clause(rng, subjects[1 - first], label)
        orders = (f"{concession} {side}, {main}", f"{side}, but {main}", f"{main}, {concession} {side}")
        return _sentence(_pick(rng, orders))
    part, work = _pick(rng, _PARTS), _pick(rng, _WORKS)
    subject = _pick(rng, (f"the {part}", f"this {work}", f"the {part} of the {work}"))
    return _sentence(_pick(rng, _OPENINGS) + _clause(rng, subject, label))


def _clause(rng: np.random.Generator, subject: str, sentiment: int) -> str:
    negated = rng.random() < _NEGATED_RATE
    adjective, noun = (_pick(rng, words[1 - sentiment if negated else sentiment]) for words in (_ADJECTIVES, _NOUNS))
    if negated:
        return f"{subject} is {_pick(rng, _NEGATIONS)} {_pick(rng, (adjective, f'a {noun}'))}"
    return f"{subject} is {_pick(rng, (adjective, f'{_pick(rng, _DEGREES)} {adjective}', f'a {noun}'))}"


def _news(rng: np.random.Generator, label: int) -> str:
    topics = tuple(_TOPICS.values())
    topic = topics[label]
    text = (
        f"{_pick(rng, topic.agents)} {_pick(rng, topic.actions)} the {_pick(rng, topic.objects)} {_pick(rng, _TIMES)}"
    )
    if rng.random() < 1 / 2:
        other = _pick(rng, _pick(rng, topics[:label] + topics[label + 1 :]).agents)
        text = _pick(rng, (f"while {other} looked on, {text}", f"{text} while {other} looked on"))
    if rng.random() < 1 / 2:
        text += f", {_with_article(_pick(rng, _IMPRESSIONS))} {_pick(rng, _EVENTS)}"
    return _sentence(text)


def _ask_value(rng: np.random.Generator) -> Question:
    facts, _ = _facts(rng)
    fact = _pick(rng, facts)
    before, _, _ = fact.kind.statement.partition("{2}")
    start = len(before.format(fact.person, fact.detail))
    return _question(facts, fact.kind.ask_value.format(*fact[1:]), fact.value, facts.index(fact), start)


def _ask_person(rng: np.random.Generator) -> Question:
    facts, _ = _facts(rng)
    fact = _pick(rng, facts)
    return _question(facts, fact.kind.ask_person.format(*fact[1:]), fact.person, facts.index(fact), 0)


def _ask_in_vain(rng: np.random.Generator) -> Question:
    facts, stranger = _facts(rng)
    present = {fact.kind for fact in facts}
    absent = [kind for kind in _KINDS if kind not in present]
    fact = _pick(rng, facts)
    if rng.random() < 1 / 2:
        # A kind of fact that the passage lacks.
        kind = _pick(rng, absent)
        detail, value = (_pick(rng, pool) for pool in kind.pools)
        ask = _pick(rng, (kind.ask_value, kind.ask_person))
        return _question(facts, ask.format(fact.person, detail, value))
    known = {other.value for other in facts}
    value = _pick(rng, [value for value in fact.kind.pools[1] if value not in known])
    having = [other.person for other in facts if other.kind is fact.kind]
    asked = [
        fact.kind.ask_value.format(stranger, fact.detail),
        fact.kind.ask_person.format(fact.person, fact.detail, value),
        # If both people have such a fact, the question would be ambiguous.
        *(fact.kind.ask_value.format(other.person, fact.detail) for other in facts if other.person not in having),
    ]
    return _question(facts, _pick(rng, asked))


def _facts(rng: np.random.Generator) -> tuple[list[_Fact], str]:
    """Returns three facts about two people, in any order, and another person's name; no value repeats.

    In half of them, one kind of fact concerns both people.
    """
    one, two, stranger = (_PEOPLE[i] for i in rng.permutation(len(_PEOPLE))[:3])
    first, second, third = (_KINDS[i] for i in rng.permutation(len(_KINDS))[:3])
    facts: list[_Fact] = []
    for person, kind in ((one, first), (two, second), (two, _pick(rng, (first, third)))):
        known = {fact.value for fact in facts}
        value = _pick(rng, [value for value in kind.pools[1] if value not in known])
        facts.append(_Fact(kind, person, _pick(rng, kind.pools[0]), value))
    return [facts[i] for i in rng.permutation(len(facts))], stranger


def _question(
    facts: list[_Fact], question: str, answer: str | None = None, number: int = 0, start: int = 0
) -> Question:
    """Returns a question whose answer begins at character `start` of the fact with this index."""
    statements = [fact.kind.statement.format(*fact[1:]) for fact in facts]
    passage = " ".join(statements)
    if answer is None:
        return Question(question, passage, (), -1)
    return Question(question, passage, (answer,), sum(len(statement) + 1 for statement in statements[:number]) + start)


def _text_set(
    name: str,
    classes: tuple[str, ...],
    make: Callable[[np.random.Generator, int], str],
    num_train: int,
    num_test: int,
    seed: int,
) -> TextSet:
    parts = _draw(make, str, len(classes), num_train, num_test, seed)
    train, test = (
        LabelledTexts(tuple(text for text, _ in part), np.array([label for _, label in part], np.int32))
        for part in parts
    )
    return TextSet(name, train, test, classes)


def _draw(
    make: Callable[[np.random.Generator, int], _Item],
    text_of: Callable[[_Item], str],
    num_labels: int,
    num_train: int,
    num_test: int,
    seed: int,
) -> tuple[list[tuple[_Item, int]], list[tuple[_Item, int]]]:
    """Returns items with different texts and their balanced labels (within 1, the first ones more)."""
    check_at_least_one(num_train=num_train, num_test=num_test)
    rng = np.random.default_rng(seed)
    train: list[tuple[_Item, int]] = []
    test: list[tuple[_Item, int]] = []
    known: set[str] = set()
    for label in range(num_labels):
        for_train, for_test = (len(range(label, number, num_labels)) for number in (num_train, num_test))
        items = [(_new(make, text_of, rng, label, known), label) for _ in range(for_train + for_test)]
        # Short texts soon run out. Drawing the test texts afterwards would make them longer.
        items = _shuffled(rng, items)
        train += items[:for_train]
        test += items[for_train:]
    return _shuffled(rng, train), _shuffled(rng, test)


def _new(
    make: Callable[[np.random.Generator, int], _Item],
    text_of: Callable[[_Item], str],
    rng: np.random.Generator,
    label: int,
    known: set[str],
) -> _Item:
    for _ in range(1000):
        item = make(rng, label)
        if text_of(item) not in known:
            known.add(text_of(item))
            return item
    raise ValueError(f"the templates give no more different texts than about {len(known)}; ask for fewer")


def _shuffled(rng: np.random.Generator, items: list[_Item]) -> list[_Item]:
    return [items[i] for i in rng.permutation(len(items))]


def _pick(rng: np.random.Generator, choices: Sequence[_Item]) -> _Item:
    return choices[int(rng.integers(len(choices)))]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
