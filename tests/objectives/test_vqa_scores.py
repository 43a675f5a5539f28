import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import merge_jax as mj
from merge_jax.objectives.vqa import (
    answer_accuracy,
    answer_coverage,
    answer_indices,
    answer_vocabulary,
    normalize_answer,
    vqa_scores,
)

# Every entry of the official table, in alphabetical order.
CONTRACTIONS = """
    'ow'sat='ow's'at 'ows'at='ow's'at I'dve=I'd've Id've=I'd've Im=I'm Ive=I've aint=ain't arent=aren't cant=can't
    couldn'tve=couldn't've couldnt=couldn't couldnt've=couldn't've couldve=could've didnt=didn't doesnt=doesn't
    dont=don't hadn'tve=hadn't've hadnt=hadn't hadnt've=hadn't've hasnt=hasn't havent=haven't he'dve=he'd've hed=he'd
    hed've=he'd've hes=he's howd=how'd howll=how'll hows=how's isnt=isn't it'dve=it'd've itd=it'd itd've=it'd've
    itll=it'll let's=let's maam=ma'am mightn'tve=mightn't've mightnt=mightn't mightnt've=mightn't've mightve=might've
    mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at
    shant=shan't she'dve=she'd've she's=she's shed've=she'd've shouldn'tve=shouldn't've shouldnt=shouldn't
    shouldnt've=shouldn't've shouldve=should've somebody'd=somebodyd somebody'dve=somebody'd've
    somebodyd've=somebody'd've somebodyll=somebody'll somebodys=somebody's someone'dve=someone'd've someoned=someone'd
    someoned've=someone'd've someonell=someone'll someones=someone's something'dve=something'd've somethingd=something'd
    somethingd've=something'd've somethingll=something'll thats=that's there'dve=there'd've thered=there'd
    thered've=there'd've therere=there're theres=there's they'dve=they'd've theyd=they'd theyd've=they'd've
    theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't we'dve=we'd've wed've=we'd've werent=weren't
    weve=we've whatll=what'll whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's
    whereve=where've who'dve=who'd've whod=who'd whod've=who'd've wholl=who'll whos=who's whove=who've whyll=why'll
    whyre=why're whys=why's wont=won't wouldn'tve=wouldn't've wouldnt=wouldn't wouldnt've=wouldn't've wouldve=would've
    y'all'dve=y'all'd've y'alld've=y'all'd've y'allll=y'all'll yall=y'all yall'd've=y'all'd've yall'll=y'all'll
    you'dve=you'd've youd=you'd youd've=you'd've youll=you'll youre=you're youve=you've
"""
TABLE = dict(entry.split("=") for entry in CONTRACTIONS.split())
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]

LETTERS = st.text("aA1٣ ,.?-'/:\n\t\u00a0", max_size=12)
WORDS = st.lists(st.sampled_from([*TABLE, *NUMBERS, "a", "An", "the", "Cat", "2,000", "3.5", "p.m.", "a-b", "yes"]))
TEXTS = WORDS.map(" ".join) | LETTERS | st.text(max_size=12)


def normalized_by_hand(text):
    """One character and one word at a time."""
    text = re.sub("[\n\t]", " ", text).strip()
    digits = "0123456789"
    in_number = any(a in digits and b == "," and c in digits for a, b, c in zip(text, text[1:], text[2:], strict=False))
    pairs = set(itertools.pairwise(text))
    spaced = ""
    for letter in text:
        if letter not in MARKS:
            spaced += letter
        elif not in_number and (letter, " ") not in pairs and (" ", letter) not in pairs:
            spaced += " "
    kept, left = "", 32
    for letter, following in itertools.pairwise(f"{spaced}\n"):
        if letter == "." and following not in digits and left:
            left -= 1
        else:
            kept += letter
    words = []
    for word in kept.lower().split():
        number = NUMBERS.get(word, word)
        if number not in ("a", "an", "the"):
            words.append(TABLE.get(number, number))
    return " ".join(words)


def accuracy_by_hand(prediction, given):
    """The mean over the sets that lack one annotator, as the official definition has it for nine of ten."""
    prediction, *given = (re.sub("[\n\t]", " ", text).strip() for text in (prediction, *given))
    if len(given) == 1:
        return float(normalized_by_hand(prediction) == normalized_by_hand(given[0]))
    if any(text != given[0] for text in given):
        prediction, *given = map(normalized_by_hand, (prediction, *given))
    others = list(itertools.combinations(given, len(given) - 1))
    return sum(min(1.0, sum(text == prediction for text in some) / 3) for some in others) / len(others)


def test_every_entry_of_the_official_table_of_contractions():
    assert len(TABLE) == 120
    for word, whole in TABLE.items():
        # Those with a capital never match, since the text is in lower case by then.
        expected = word.lower() if word.startswith("I") else whole
        assert normalize_answer(word) == expected
        assert normalize_answer(f"{word} {word}") == f"{expected} {expected}"


@pytest.mark.parametrize(
    "word", ["shes", "lets", "somebodyd", "thatll", "couldntve", "yalldve", "im", "ive", "id", "shed", "well", "were"]
)
def test_words_that_are_not_in_the_table_stay(word):
    assert normalize_answer(word) == word


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("  an  apple\na\tday ", "apple day"),
        ("theory of a theatre", "theory of theatre"),
        # A mark becomes a space, unless it stands next to one anywhere; other marks keep their own rule.
        ("yes/no", "yes no"),
        ("yes/ no/maybe", "yes nomaybe"),
        ("red /blue/green", "red bluegreen"),
        ("red /blue-green", "red blue green"),
        ("t-shirt", "t shirt"),
        ("(big)", "big"),
        ("what?!", "what"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        # A space at the end is none.
        ("left/right/ ", "left right"),
        # A comma in a number takes all marks with it.
        ("1,000 t-shirts", "1000 tshirts"),
        ("1, 000", "1 000"),
        ("1,a", "1"),
        ("٣,٣", "٣ ٣"),
        # Periods.
        ("p.m.", "pm"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("a.5", "a.5"),
        ("5..5", "5.5"),
        ("ten.", "10"),
        ("." * 33 + "x", ".x"),
        # Not among the marks.
        ("10:30", "10:30"),
        ("50%", "50%"),
        ("dog's #1 & $2*", "dog's #1 & $2*"),
        ("“quoted”", "“quoted”"),
        # Numbers, only as whole words and up to ten.
        ("None", "0"),
        ("zero One two", "0 1 2"),
        ("twenty-one", "twenty 1"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        # Articles go, but not those that a contraction or number has.
        ("the", ""),
        ("a", ""),
        ("a-the-an", ""),
        ("Œuvre THE É", "œuvre é"),
    ],
)
def test_normalisation_by_hand(text, expected):
    assert normalize_answer(text) == expected


@given(TEXTS)
def test_normalisation_equals_an_independent_computation(text):
    assert normalize_answer(text) == normalized_by_hand(text)


@given(TEXTS)
def test_normalisation_of_what_is_normalised_changes_nothing(text):
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


@pytest.mark.parametrize(
    ("count", "annotators", "accuracy"),
    [
        (0, 10, 0),
        (1, 10, 0.3),
        (2, 10, 0.6),
        (3, 10, 0.9),
        (4, 10, 1),
        (10, 10, 1),
        # Few annotators: three others are wanted all the same.
        (4, 4, 1),
        (3, 3, 2 / 3),
        (2, 2, 1 / 3),
        (1, 2, 1 / 6),
        # One: exact match.
        (1, 1, 1),
        (0, 1, 0),
    ],
)
def test_accuracy_by_hand(count, annotators, accuracy):
    assert answer_accuracy(count, annotators) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("prediction", "given", "accuracy"),
    [
        ("yes", ["yes"] * 10, 1),
        # All the same: compared as they are, but for white space around.
        ("Yes", ["yes"] * 10, 0),
        ("0", ["none"] * 10, 0),
        ("none", ["none"] * 10, 1),
        (" t-shirt\n", ["t-shirt", "t-shirt ", "\tt-shirt", "t-shirt"], 1),
        # They differ: compared once normalised.
        ("Yes!", ["yes"] * 9 + ["no"], 1),
        ("0", ["none"] * 9 + ["one"], 1),
        ("none", ["0", "zero", "none", "2"], (3 * 2 / 3 + 1) / 4),
        ("no", ["yes"] * 9 + ["no"], 0.3),
        ("No", ["yes"] * 8 + ["a no", "no."], 0.6),
        # They differ only before normalisation.
        ("yes", ["Yes", "yes", "yes", "yes"], 1),
        # One.
        ("A cube.", ["cube"], 1),
        ("cube", ["The Cube"], 1),
        ("sphere", ["cube"], 0),
    ],
)
def test_scores_by_hand(prediction, given, accuracy):
    assert vqa_scores([prediction], [given]) == {"accuracy": pytest.approx(accuracy)}


@given(TEXTS, st.lists(TEXTS | st.sampled_from(["yes", "Yes", "no"]), min_size=1, max_size=10), st.integers(0, 10))
def test_scores_equal_an_independent_computation(prediction, given, copies):
    given = [*given, *[prediction] * copies]
    score = vqa_scores([prediction], [given])["accuracy"]
    assert score == pytest.approx(accuracy_by_hand(prediction, given))
    assert 0 <= score <= 1
    # The order of annotators says nothing, and no prediction beats what most gave.
    assert vqa_scores([prediction], [given[::-1]])["accuracy"] == pytest.approx(score)


@given(st.integers(1, 20), st.data())
def test_more_annotators_never_hurt_their_answer(annotators, data):
    count = data.draw(st.integers(0, annotators - 1))
    assert answer_accuracy(count, annotators) < answer_accuracy(count + 1, annotators) or count >= 4


def test_scores_of_a_set_are_means_over_all_and_of_each_kind():
    answers = [["red"], ["2"], ["yes"] * 10, ["yes"] * 9 + ["no"]]
    scores = mj.objectives.vqa_scores(["Red", "3", "yes", "no"], answers, kinds=["other", "number", "yes/no", "yes/no"])
    assert scores == {
        "accuracy": pytest.approx((1 + 0 + 1 + 0.3) / 4),
        "accuracy_number": 0,
        "accuracy_other": 1,
        "accuracy_yes/no": pytest.approx(1.3 / 2),
    }


def test_a_vocabulary_is_of_the_commonest_answers():
    answers = [["Yes", "yes.", "no"], ["a cat", "cat"], ["dog", "the"], ["Yes"], [], ["no"]]
    assert mj.objectives.answer_vocabulary(answers, 10) == ("yes", "cat", "no", "dog")
    assert mj.objectives.answer_vocabulary(answers, 2) == ("yes", "cat")
    assert mj.objectives.answer_vocabulary(answers[::-1], 2) == ("yes", "cat")


def test_indices_are_places_in_the_vocabulary():
    answers = [["Yes", "yes", "no"], ["the dog"], ["dog", "no!"], [], ["the"]]
    indices, covered = mj.objectives.answer_indices(answers, ("no", "Yes"))
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, [[1, 1, 0], [-1, -1, -1], [-1, 0, -1], [-1, -1, -1], [-1, -1, -1]])
    assert covered == 2 / 5
    assert answer_indices([], ["no"])[1] == 0
    assert answer_indices([[], []], ["no"])[0].shape == (2, 1)


@given(st.lists(st.lists(TEXTS, max_size=4), min_size=1, max_size=5), st.integers(1, 6))
def test_vocabulary_and_indices_go_together(answers, size):
    counted = [normalize_answer(answer) for given in answers for answer in given if normalize_answer(answer)]
    if not counted:
        return
    vocabulary = answer_vocabulary(answers, size)
    assert len(vocabulary) == min(size, len(set(counted)))
    left_out = set(counted) - set(vocabulary)
    assert all(counted.count(kept) >= counted.count(out) for kept in vocabulary for out in left_out)
    indices, covered = answer_indices(answers, vocabulary)
    for row, texts in zip(indices, answers, strict=True):
        for index, answer in itertools.zip_longest(row.tolist(), texts):
            normalized = "" if answer is None else normalize_answer(answer)
            assert (vocabulary[index] if index >= 0 else "") == (normalized if normalized in vocabulary else "")
    coverage = answer_coverage(answers, vocabulary)
    assert covered == pytest.approx(1 - coverage.uncovered / coverage.questions)
    assert left_out >= set(coverage.missing)


def test_what_a_vocabulary_lacks_is_said_in_a_sentence():
    answers = [["yes", "red"], ["red"], ["blue", "The red", "blue"], ["blue", "green"], ["no"], ["the"]]
    coverage = mj.objectives.answer_coverage(answers, ("yes", "no"))
    assert (coverage.size, coverage.questions, coverage.uncovered) == (2, 6, 4)
    assert coverage.missing == ("blue", "red", "green")
    assert str(coverage) == (
        "the vocabulary of 2 answers covers none of the answers of 4 of 6 questions;"
        " the commonest missing are 'blue', 'red', 'green'"
    )
    many = mj.objectives.answer_coverage([[letter] for letter in "bcdefgh"], ("x",))
    assert str(many).endswith("the commonest missing are 'b', 'c', 'd', 'e', 'f'")
    none = mj.objectives.answer_coverage(answers[5:], ("x",))
    assert str(none) == "the vocabulary of 1 answers covers none of the answers of 1 of 1 questions"
    full = mj.objectives.answer_coverage(answers[:5], ("yes", "no", "red", "green"))
    assert str(full) == "the vocabulary of 4 answers covers an answer of each of 5 questions"


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match=r"^every question needs one prediction, got 1 for 2 questions$"):
        vqa_scores(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"^every question needs one kind, got 2 for 1 questions$"):
        vqa_scores(["a"], [["a"]], ["x", "y"])
    with pytest.raises(ValueError, match=r"^cannot score no predictions$"):
        vqa_scores([], [])
    with pytest.raises(ValueError, match=r"^question 1 has no answers to score its prediction by$"):
        vqa_scores(["a", "b"], [["a"], []])
    message = r"^the answers to question 1 must be a sequence of texts, got the text 'yes'$"
    with pytest.raises(ValueError, match=message):
        vqa_scores(["yes", "yes"], [["yes"], "yes"])
    with pytest.raises(ValueError, match=message):
        answer_vocabulary([["yes"], "yes"], 3)
    with pytest.raises(ValueError, match=message):
        answer_indices([["yes"], "yes"], ["yes"])


def test_vocabularies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"^size must be a whole number of at least 1, got 0$"):
        answer_vocabulary([["yes"]], 0)
    with pytest.raises(ValueError, match=r"^there are no answers to 2 questions to make a vocabulary of$"):
        answer_vocabulary([[], ["the"]], 3)
    with pytest.raises(ValueError, match=r"^the vocabulary must be a sequence of at least one answer, got \(\)$"):
        answer_indices([["yes"]], ())
    with pytest.raises(ValueError, match=r"^the vocabulary must be a sequence of at least one answer, got 'yes'$"):
        answer_indices([["yes"]], "yes")
    with pytest.raises(ValueError, match=r"^the answers 'Yes' and 'yes' of the vocabulary are the same$"):
        answer_indices([["yes"]], ["Yes", "no", "yes"])
