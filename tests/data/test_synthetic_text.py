import hashlib
import re

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from merge_jax.data.text import synthetic_text
from merge_jax.data.text.synthetic_text import synthetic_questions, synthetic_reviews, synthetic_topics

TEXT_SETS = {"synthetic_reviews": (synthetic_reviews, 2, 20), "synthetic_topics": (synthetic_topics, 4, 25)}


def words(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


@pytest.fixture(scope="module", params=list(TEXT_SETS))
def text_set(request):
    make, num_classes, longest = TEXT_SETS[request.param]
    return make(3000, 500, 0), request.param, num_classes, longest


@pytest.fixture(scope="module")
def reviews():
    return synthetic_reviews(3000, 500, 0)


@pytest.fixture(scope="module")
def questions():
    return synthetic_questions(3000, 500, 0)


def test_text_sets_are_balanced_and_disjoint_and_say_that_they_are_synthetic(text_set):
    made, name, num_classes, longest = text_set
    assert made.name == name
    assert len(made.classes) == num_classes
    texts = [*made.train.texts, *made.test.texts]
    assert (len(made.train.texts), len(made.test.texts)) == (3000, 500)
    assert len(set(texts)) == 3500
    assert max(len(words(text)) for text in texts) <= longest
    for part in (made.train, made.test):
        assert part.labels.dtype == np.int32
        counts = np.bincount(part.labels, minlength=num_classes)
        np.testing.assert_array_equal(counts, len(part.texts) // num_classes)
        # In no order: a batch of any part has all classes.
        assert len(np.unique(part.labels[:50])) == num_classes


def sentiment(review):
    """What a reader makes of it: the main clause decides, and a negation turns its word round."""
    clauses = review.lower().removesuffix(".").split(", ")
    if len(clauses) == 2 and not clauses[1].startswith("but "):
        clauses = [clause for clause in clauses if not re.match("although |though |while ", clause)]
    clause = f" {clauses[-1]} "
    good = re.search(
        " (good|great|charming|clever|moving|strong|warm|funny|fresh|gripping|lovely|bright|triumph|delight|success"
        "|treat|pleasure|joy) ",
        clause,
    )
    negated = re.search(" (not|never|hardly|far from) ", clause)
    return int((good is not None) != (negated is not None))


def test_reviews_mean_what_their_labels_say(reviews):
    assert reviews.classes == ("negative", "positive")
    for part in (reviews.train, reviews.test):
        assert [sentiment(text) for text in part.texts] == part.labels.tolist()
    assert sentiment("The plot is hardly a disappointment.") == 1
    assert sentiment("Although the cast is weak, this film is funny.") == 1


def test_no_word_alone_tells_the_class_of_a_review(reviews):
    counts = CountVectorizer(binary=True)
    train, test = counts.fit_transform(reviews.train.texts), counts.transform(reviews.test.texts)
    model = LogisticRegression().fit(train, reviews.train.labels)
    assert model.score(test, reviews.test.labels) < 0.65
    present, labels = train.toarray(), reviews.train.labels
    for column in np.flatnonzero(present.sum(axis=0) > 100):
        assert 0.3 < labels[present[:, column] > 0].mean() < 0.7


def test_topics_can_be_told_and_share_words_with_reviews(reviews):
    topics = synthetic_topics(1000, 400, 0)
    assert topics.classes == ("world", "sport", "business", "science")
    counts = CountVectorizer()
    model = LogisticRegression().fit(counts.fit_transform(topics.train.texts), topics.train.labels)
    assert model.score(counts.transform(topics.test.texts), topics.test.labels) > 0.9
    shared = {w for text in topics.train.texts for w in words(text)} & {
        w for t in reviews.train.texts for w in words(t)
    }
    assert len(shared) > 30


def test_questions_are_disjoint_and_a_third_have_no_answer(questions):
    assert questions.name == "synthetic_questions"
    assert (len(questions.train), len(questions.test)) == (3000, 500)
    everything = [*questions.train, *questions.test]
    assert len({question.passage for question in everything}) == 3500
    assert max(len(words(f"{each.question} {each.passage}")) for each in everything) <= 29
    for part in (questions.train, questions.test):
        assert sum(not each.answers for each in part) == len(part) // 3
        assert 5 < sum(not each.answers for each in part[:30]) < 20


FACTS = {
    "lives": r"(?P<who>\w+) lives in (?P<value>.+)",
    "works": r"(?P<who>\w+) works as a (?P<value>.+)",
    "has": r"(?P<who>\w+) has a (?P<value>.+) (?P<detail>\w+)",
    "found": r"(?P<who>\w+) found the (?P<detail>\w+) (?P<value>\w+)",
}
ASKED = {
    r"where does (?P<who>\w+) live\?": "lives",
    r"what is the work of (?P<who>\w+)\?": "works",
    r"what colour is the (?P<detail>\w+) of (?P<who>\w+)\?": "has",
    r"how did (?P<who>\w+) find the (?P<detail>\w+)\?": "found",
    r"who lives in (?P<value>.+)\?": "lives",
    r"who works as a (?P<value>.+)\?": "works",
    r"who has a (?P<value>.+) (?P<detail>\w+)\?": "has",
    r"who found the (?P<detail>\w+) (?P<value>\w+)\?": "found",
}


def read_answers(question):
    """The answers that a reader finds: of every sentence of the asked kind, what is asked for if the rest agrees."""
    asked, kind = next((found, kind) for ask, kind in ASKED.items() if (found := re.fullmatch(ask, question.question)))
    wanted = "value" if "value" not in asked.groupdict() else "who"
    for fact in re.finditer(r"[^ .][^.]*(?=\.)", question.passage):
        found = re.fullmatch(FACTS[kind], fact[0])
        if found and all(found[key] == value for key, value in asked.groupdict().items()):
            yield found[wanted], fact.start() + found.start(wanted)


def test_questions_have_the_answer_that_their_passage_gives_and_no_other(questions):
    kinds = set()
    for each in [*questions.train, *questions.test]:
        found = list(read_answers(each))
        if not each.answers:
            assert found == []
            assert each.start == -1
        else:
            assert found == [(each.answers[0], each.start)]
            assert each.passage[each.start : each.start + len(each.answers[0])] == each.answers[0]
            assert len(each.answers) == 1
        assert len(re.findall(r"\.", each.passage)) == 3
        kinds.add((each.question.split()[0], bool(each.answers)))
    assert kinds == {(word, found) for word in ("where", "what", "how", "who") for found in (True, False)}


def test_questions_share_words_with_reviews(reviews, questions):
    asked = {word for each in questions.train for word in words(f"{each.question} {each.passage}")}
    assert len(asked & {word for text in reviews.train.texts for word in words(text)}) > 30


def digest(made):
    def flat(part):
        return list(zip(part.texts, part.labels.tolist(), strict=True)) if hasattr(part, "texts") else list(part)

    return hashlib.sha256(repr((flat(made.train), flat(made.test))).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (synthetic_reviews, "e9fbe5b96a513de0"),
        (synthetic_topics, "84e6a9178c0aa89a"),
        (synthetic_questions, "20583775c1c09e3e"),
    ],
)
def test_texts_depend_on_the_seed_alone(make, expected):
    assert digest(make(50, 20, 3)) == digest(make(50, 20, 3)) == expected
    assert digest(make(50, 20, 4)) != expected


@pytest.mark.parametrize("make", [synthetic_reviews, synthetic_topics, synthetic_questions])
def test_sizes_are_checked(make):
    with pytest.raises(ValueError, match="num_train must be a whole number of at least 1, got 0"):
        make(0, 5, 0)
    with pytest.raises(ValueError, match=r"num_test must be a whole number of at least 1, got 2.5"):
        make(5, 2.5, 0)


def test_more_texts_than_the_templates_give_are_refused(monkeypatch):
    for pool in ("_WORKS", "_PARTS", "_DEGREES", "_NEGATIONS", "_OPENINGS", "_CONCESSIONS"):
        monkeypatch.setattr(synthetic_text, pool, getattr(synthetic_text, pool)[:1])
    for pool in ("_ADJECTIVES", "_NOUNS"):
        monkeypatch.setattr(synthetic_text, pool, tuple(part[:1] for part in getattr(synthetic_text, pool)))
    assert len(synthetic_reviews(60, 20, 0).train.texts) == 60
    with pytest.raises(ValueError, match=r"no more different texts than about \d+; ask for fewer"):
        synthetic_reviews(6000, 20, 0)
