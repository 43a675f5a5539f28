import itertools
import subprocess
import sys

import numpy as np
import pytest

from merge_jax.data.text.text_set import Question
from merge_jax.data.text.tokens import WordPiece, decode_spans

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", ".", "?", "the", "cafe", "is", "in", "zurich", "where"),
    *("good", "un", "##like", "##ly", "sep", "pad", "a", "##b", "中", "e"),
]
ID = {word: i for i, word in enumerate(WORDS)}
TEXTS = [
    "a good film",
    "not a good film at all",
    "Café ÉCOLE naïve",
    "the the then",
    "x y z q w e r",
    "then or than",
] * 3


def write(path, words):
    path.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return path


@pytest.fixture
def vocabulary(tmp_path):
    return WordPiece.from_vocabulary(write(tmp_path / "vocab.txt", WORDS))


def ids(*words):
    return [ID[word] for word in words]


def test_texts_are_enclosed_and_padded(vocabulary):
    encoded = vocabulary.encode_texts(["The café is GOOD.", "unlikely", "nowhere"], np.array([2, 0, 1]), 8)
    tokens = encoded.arrays["tokens"]
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(
        tokens,
        [
            [*ids("[CLS]", "the", "cafe", "is", "good", ".", "[SEP]"), 0],
            [*ids("[CLS]", "un", "##like", "##ly", "[SEP]"), 0, 0, 0],
            [*ids("[CLS]", "[UNK]", "[SEP]"), 0, 0, 0, 0, 0],
        ],
    )
    assert encoded.arrays["label"].dtype == np.int32
    np.testing.assert_array_equal(encoded.arrays["label"], [2, 0, 1])
    assert encoded.truncated == 0
    assert (vocabulary.vocab_size, vocabulary.separator) == (len(WORDS), ID["[SEP]"])


def test_a_cased_vocabulary_keeps_case_and_accents(tmp_path):
    cased = WordPiece.from_vocabulary(write(tmp_path / "vocab.txt", [*WORDS[:5], "The", "café", "cafe"]), False)
    tokens = cased.encode_texts(["The café", "the cafe"], np.zeros(2, int), 4).arrays["tokens"]
    np.testing.assert_array_equal(tokens, [[2, 5, 6, 3], [2, 1, 7, 3]])


def test_a_long_text_loses_its_end_and_is_counted(vocabulary):
    encoded = vocabulary.encode_texts(["the the the good", "the good", "the the good"], np.zeros(3, int), 4)
    np.testing.assert_array_equal(
        encoded.arrays["tokens"], [ids("[CLS]", "the", w, "[SEP]") for w in ("the", "good", "the")]
    )
    assert encoded.truncated == 2
    with pytest.raises(ValueError, match=r"^text 1 has 3 tokens, but max_length 4 leaves 2$"):
        vocabulary.encode_texts(["the good", "the the good"], np.zeros(2, int), 4, too_long="error")


def test_more_texts_than_a_chunk_stay_in_order(vocabulary, monkeypatch):
    monkeypatch.setattr("merge_jax.data.text.tokens._CHUNK", 2)
    tokens = vocabulary.encode_texts(["the", "is", "the", "in", "good"], np.arange(5), 3).arrays["tokens"]
    np.testing.assert_array_equal(tokens[:, 1], ids("the", "is", "the", "in", "good"))


def test_special_tokens_in_a_text_are_plain_text(vocabulary):
    tokens = vocabulary.encode_texts(["[SEP] good [PAD]"], np.zeros(1, int), 9).arrays["tokens"]
    np.testing.assert_array_equal(tokens, [ids("[CLS]", "[", "sep", "]", "good", "[", "pad", "]", "[SEP]")])
    question = Question("[SEP] where?", "[CLS] in [SEP] the cafe", ("the cafe",), 15)
    arrays = vocabulary.encode_questions([question], 24).arrays
    assert (arrays["tokens"] == vocabulary.separator).sum() == 2
    assert (arrays["tokens"] == ID["[CLS]"]).sum() == 1


def test_a_tokenizer_that_has_more_of_its_own_mind_is_tamed(vocabulary, tmp_path):
    """As the published ones of BERT, which know special tokens by their letters, and some of which pad and truncate."""
    import tokenizers

    path = tmp_path / "tokenizer.json"
    vocabulary.save(path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", ID["[SEP]"]), ("[CLS]", ID["[CLS]"]))
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(4)
    assert ID["[SEP]"] in tokenizer.encode("a [SEP]", add_special_tokens=False).ids
    tokenizer.save(str(path))
    texts = ["[SEP] good [PAD]", "the good cafe is in zurich", "a"]
    expected, found = (
        made.encode_texts(texts, np.zeros(3, int), 12).arrays["tokens"]
        for made in (vocabulary, WordPiece.from_vocabulary(path))
    )
    np.testing.assert_array_equal(found, expected)


def test_a_vocabulary_has_characters_at_which_python_splits_lines(tmp_path):
    path = write(tmp_path / "vocab.txt", [*WORDS, "\u2028", "\x85", "film"])
    tokens = WordPiece.from_vocabulary(path).encode_texts(["film"], np.zeros(1, int), 3).arrays["tokens"]
    assert tokens[0, 1] == len(WORDS) + 2


@pytest.mark.parametrize(
    ("texts", "labels", "options", "message"),
    [
        (["good", ""], [0, 1], {}, "text 1 has no tokens: ''"),
        (["good", " \t\n"], [0, 1], {}, r"text 1 has no tokens: ' \\t\\n'"),
        ([], [], {}, "there are no texts to encode"),
        (["good"], [0, 1], {}, r"labels of 1 texts must be whole numbers \[1\], got int64 of shape \(2,\)"),
        (["good"], [0.5], {}, "must be whole numbers .* got float64"),
        (["good"], [0], {"max_length": 2}, "max_length must be at least 3, .* got 2"),
        (["good"], [0], {"max_length": 4.0}, "max_length must be a whole number of at least 1, got 4.0"),
        (["good"], [0], {"too_long": "truncated"}, "unknown choice of too_long 'truncated'; did you mean 'truncate'?"),
    ],
)
def test_texts_that_cannot_be_encoded_are_named(texts, labels, options, message, vocabulary):
    with pytest.raises(ValueError, match=message):
        vocabulary.encode_texts(texts, np.array(labels), **{"max_length": 8, **options})


# Characters that become fewer or more when they lose their case and accents, and that take several bytes.
PASSAGE = "İn Zürich ist Cafe\u0301 Größe 中文 good \U0001f600 the E\u0301cole\u0301 unlikely."
ANSWERS = ("İn", "Zürich", "Cafe\u0301", "Größe", "中", "中文", "\U0001f600", "the E\u0301cole\u0301", "unlikely", ".")


@pytest.mark.parametrize("answer", [*ANSWERS, PASSAGE])
def test_offsets_cut_the_answer_out_as_it_is_written(answer):
    vocabulary = WordPiece.train([PASSAGE], 100)
    question = Question("where?", PASSAGE, (answer,), PASSAGE.index(answer))
    arrays = vocabulary.encode_questions([question], 64).arrays
    start, end = arrays["start"][0], arrays["end"][0]
    offset = arrays["offset"][0]
    assert offset.dtype == np.int32
    assert PASSAGE[offset[start, 0] : offset[end, 1]] == answer
    logits = np.zeros((1, 64, 2), np.float32)
    logits[0, start, 0] = logits[0, end, 1] = 1
    assert decode_spans(logits, arrays, [PASSAGE], 64) == [answer]


def test_offsets_cover_every_letter_of_the_passage_and_nothing_else():
    vocabulary = WordPiece.train([PASSAGE], 60)
    arrays = vocabulary.encode_questions([Question("where?", PASSAGE, (), -1)], 64).arrays
    separators = np.flatnonzero(arrays["tokens"][0] == vocabulary.separator)
    offset = arrays["offset"][0]
    inside = offset[separators[0] + 1 : separators[1]]
    covered = "".join(PASSAGE[start:end] for start, end in inside)
    assert covered == PASSAGE.replace(" ", "")
    assert (np.delete(offset, np.s_[separators[0] + 1 : separators[1]], axis=0) == 0).all()


def test_questions_become_tokens_and_positions(vocabulary):
    questions = [
        Question("where is the cafe?", "The café is in Zürich.", ("Zürich", "in Zürich"), 15),
        Question("where?", "The café is good.", (), -1),
    ]
    encoded = vocabulary.encode_questions(questions, 16)
    arrays = encoded.arrays
    first = ids("[CLS]", "where", "is", "the", "cafe", "?", "[SEP]", "the", "cafe", "is", "in", "zurich", ".", "[SEP]")
    second = ids("[CLS]", "where", "?", "[SEP]", "the", "cafe", "is", "good", ".", "[SEP]")
    np.testing.assert_array_equal(arrays["tokens"], [[*row, *[0] * (16 - len(row))] for row in (first, second)])
    np.testing.assert_array_equal(arrays["start"], [11, 0])
    np.testing.assert_array_equal(arrays["end"], [11, 0])
    np.testing.assert_array_equal(arrays["example"], [0, 1])
    np.testing.assert_array_equal(arrays["kept"], [True, True])
    np.testing.assert_array_equal(arrays["offset"][1, 4:9], [[0, 3], [4, 8], [9, 11], [12, 16], [16, 17]])
    assert {name: array.dtype for name, array in arrays.items()} == {
        **dict.fromkeys(("tokens", "start", "end", "offset", "example"), np.int32),
        "kept": np.bool_,
    }
    assert (encoded.truncated, encoded.cut_off) == (0, 0)


def test_only_the_passage_is_cut_and_lost_answers_are_marked(vocabulary):
    passage = "The café is in Zürich."
    questions = [
        Question("where is?", passage, ("café",), 4),
        Question("where is?", passage, ("Zürich",), 15),
        Question("where is?", passage, ("in Zürich",), 12),
        Question("where?", "good", ("good",), 0),
        Question("where is?", passage, (), -1),
    ]
    encoded = vocabulary.encode_questions(questions, 10)
    row = ids("[CLS]", "where", "is", "?", "[SEP]", "the", "cafe", "is", "in", "[SEP]")
    for index in (0, 1, 2, 4):
        np.testing.assert_array_equal(encoded.arrays["tokens"][index], row)
    np.testing.assert_array_equal(encoded.arrays["kept"], [True, False, False, True, True])
    np.testing.assert_array_equal(encoded.arrays["start"], [6, 0, 0, 4, 0])
    np.testing.assert_array_equal(encoded.arrays["end"], [6, 0, 0, 4, 0])
    assert (encoded.truncated, encoded.cut_off) == (4, 2)
    with pytest.raises(ValueError, match="passage of question 0 has 6 tokens, but max_length 10 leaves 4"):
        vocabulary.encode_questions(questions, 10, too_long="error")


def test_an_answer_inside_of_a_word_is_the_whole_token(vocabulary):
    arrays = vocabulary.encode_questions([Question("where?", "the unlikely cafe", ("likel",), 6)], 16).arrays
    first, last = arrays["offset"][0, arrays["start"][0], 0], arrays["offset"][0, arrays["end"][0], 1]
    assert "the unlikely cafe"[first:last] == "likely"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            Question("where?", "the cafe", ("cafe",), 3),
            "answer of question 1, 'cafe', is not .* at 3, where ' caf' stands",
        ),
        (
            Question("where?", "the cafe", ("cafe",), 60),
            "question 1, 'cafe', is not in its passage at 60, where '' stands",
        ),
        (Question("where?", "the cafe", ("af",), -3), "question 1, 'af', is not in its passage at -3"),
        (Question("where?", "the cafe", (), 0), "question 1 has no answer, so its start must be -1, got 0"),
        (Question("where?", "the  cafe", (" ",), 4), "the answer of question 1 has no tokens: ' '"),
        (Question(" ", "the cafe", (), -1), "question 1 has no tokens: ' '"),
        (Question("where?", "", (), -1), "the passage of question 1 has no tokens: ''"),
        (Question("the " * 14, "cafe", (), -1), "question 1 has 14 tokens and leaves no room .* max_length 16"),
    ],
)
def test_questions_that_cannot_be_encoded_are_named(question, message, vocabulary):
    good = Question("where?", "the cafe", ("cafe",), 4)
    with pytest.raises(ValueError, match=message):
        vocabulary.encode_questions([good, question], 16)


def test_no_questions_and_no_room_are_refused(vocabulary):
    with pytest.raises(ValueError, match="no questions to encode"):
        vocabulary.encode_questions([], 16)
    with pytest.raises(ValueError, match="max_length must be at least 5"):
        vocabulary.encode_questions([Question("where?", "the cafe", (), -1)], 4)


def spans_one_by_one(logits, arrays, passages, most):
    """What the docstring of decode_spans says, one span after the other."""
    answers = []
    for z, offset, example in zip(logits, arrays["offset"], arrays["example"], strict=True):
        passage_tokens = [i for i in range(len(z)) if offset[i, 1] > 0]
        spans = [(s, e) for s, e in itertools.product(passage_tokens, repeat=2) if 0 <= e - s < most]
        s, e = max(spans, key=lambda span: z[span[0], 0] + z[span[1], 1])
        found = z[s, 0] + z[e, 1] > z[0, 0] + z[0, 1]
        answers.append(passages[example][offset[s, 0] : offset[e, 1]] if found else "")
    return answers


@pytest.mark.parametrize("most", [1, 2, 4, 30])
def test_spans_are_the_best_of_all(most, vocabulary):
    passages = ["The café is in Zürich.", "good", "the cafe. Unlikely the good cafe is in Zürich"]
    arrays = vocabulary.encode_questions([Question("where is the cafe?", p, (), -1) for p in passages], 24).arrays
    rng = np.random.default_rng(0)
    rows = rng.integers(3, size=200)
    arrays = {name: array[rows] for name, array in arrays.items()}
    logits = rng.normal(size=(200, 24, 2)).astype(np.float32)
    logits[:, 0] += 1
    expected = spans_one_by_one(logits, arrays, passages, most)
    assert decode_spans(logits, arrays, passages, most) == expected
    assert 0 < expected.count("") < 200


def test_no_answer_wins_a_tie_and_the_rest_of_the_text_does_not_count(vocabulary):
    passage = "the cafe is good"
    arrays = vocabulary.encode_questions([Question("where is?", passage, (), -1)], 16).arrays
    logits = np.zeros((1, 16, 2), np.float32)
    assert decode_spans(logits, arrays, [passage]) == [""]
    logits[0, 1:5] = logits[0, 9:] = 9  # The question, the separators and the padding.
    assert decode_spans(logits, arrays, [passage]) == [""]
    logits[0, 6, 0] = logits[0, 8, 1] = 0.5
    assert decode_spans(logits, arrays, [passage]) == ["cafe is good"]
    # An end before its start is no span.
    logits[0, 5:9] = [[0, 2], [0, 0], [0, 0], [3, 0]]
    assert decode_spans(logits, arrays, [passage]) == ["good"]


def test_logits_that_do_not_fit_are_named(vocabulary):
    arrays = vocabulary.encode_questions([Question("where?", "good", (), -1)] * 2, 8).arrays
    logits = np.zeros((2, 8, 2), np.float32)
    with pytest.raises(ValueError, match=r"shape of the offsets, \(2, 8, 2\), got \(2, 8\)"):
        decode_spans(logits[..., 0], arrays, ["good"] * 2)
    with pytest.raises(ValueError, match="a passage for each question, up to 1, got 1"):
        decode_spans(logits, arrays, ["good"])
    with pytest.raises(ValueError, match="max_answer_tokens must be a whole number of at least 1, got 0"):
        decode_spans(logits, arrays, ["good"] * 2, 0)
    logits[1, 3, 0] = np.nan
    with pytest.raises(ValueError, match="logits must be numbers, got 1 nan of 32"):
        decode_spans(logits, arrays, ["good"] * 2)


def saved(vocabulary, path):
    vocabulary.save(path)
    return path.read_text(encoding="utf-8")


def test_training_is_the_same_at_every_call_and_in_another_process(tmp_path):
    # Ties everywhere, which the library breaks by the order of a hash map that is seeded anew for every training.
    first = saved(WordPiece.train(TEXTS, 70), tmp_path / "0.json")
    assert all(saved(WordPiece.train(TEXTS, 70), tmp_path / "1.json") == first for _ in range(5))
    code = f"import sys; from merge_jax.data import WordPiece; WordPiece.train({TEXTS!r}, 70).save(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "2.json")], check=True)
    assert (tmp_path / "2.json").read_text(encoding="utf-8") == first


def test_a_trained_vocabulary_has_its_size_and_the_special_tokens_first(tmp_path):
    vocabulary = WordPiece.train(TEXTS, 64)
    assert vocabulary.vocab_size == 64
    assert vocabulary.separator == 3
    content = saved(vocabulary, tmp_path / "tokenizer.json")
    positions = [
        content.index(f'"{token}":{i}') for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    ]
    assert positions == sorted(positions)
    tokens = vocabulary.encode_texts(["the film"], np.zeros(1, int), 8).arrays["tokens"][0]
    assert (tokens > 4).sum() == 2  # The most frequent words are tokens.
    assert WordPiece.train(["ab ab"], 1000).vocab_size < 20


def test_a_saved_vocabulary_is_read_again(tmp_path):
    vocabulary = WordPiece.train(TEXTS, 64)
    vocabulary.save(tmp_path / "tokenizer.json")
    again = WordPiece.from_vocabulary(tmp_path / "tokenizer.json")
    texts = [*TEXTS, "[SEP] É"]
    expected, found = (v.encode_texts(texts, np.zeros(len(texts), int), 12).arrays for v in (vocabulary, again))
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    assert (again.vocab_size, again.separator) == (vocabulary.vocab_size, vocabulary.separator)
    with pytest.raises(ValueError, match=r"a tokenizer is saved as .json, got .*vocab.txt"):
        vocabulary.save(tmp_path / "vocab.txt")


def test_a_folder_of_a_model_has_its_vocabulary(tmp_path):
    write(tmp_path / "vocab.txt", WORDS)
    assert WordPiece.from_vocabulary(tmp_path).words == ID
    # What is there too, since it also says how a text is split.
    vocabulary = WordPiece.train(TEXTS, 64)
    vocabulary.save(tmp_path / "tokenizer.json")
    assert WordPiece.from_vocabulary(tmp_path).words == vocabulary.words


def test_a_vocabulary_too_small_for_the_letters_or_without_any_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 9, for 5 special .* and 4 letters, .* got 8"):
        WordPiece.train(["ab bba"], 8)
    assert WordPiece.train(["ab bba"], 9).vocab_size == 9
    with pytest.raises(ValueError, match="no letter to learn from in 2 texts"):
        WordPiece.train([" ", ""], 50)
    with pytest.raises(ValueError, match="vocab_size must be a whole number of at least 1, got 0"):
        WordPiece.train(TEXTS, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*WORDS, "in", "the"], "vocab.txt has the token 'in' twice, in lines 13 and 26"),
        ([word for word in WORDS if word not in ("[CLS]", "[UNK]")], r"lacks the special tokens \[UNK\], \[CLS\]"),
        (WORDS[1:] + WORDS[:1], r"must give \[PAD\] the id 0, which the models mask, got 24"),
        ([*WORDS[:7], "", *WORDS[7:]], "line 8 of the vocabulary .*vocab.txt is empty"),
    ],
)
def test_a_wrong_vocabulary_is_named(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        WordPiece.from_vocabulary(write(tmp_path / "vocab.txt", words))


def test_files_that_are_no_vocabulary_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"the folder {tmp_path} has neither tokenizer.json nor vocab.txt"):
        WordPiece.from_vocabulary(tmp_path)
    with pytest.raises(ValueError, match=r"the vocabulary .*none.txt is missing or not a file"):
        WordPiece.from_vocabulary(tmp_path / "none.txt")
    path = tmp_path / "vocab.txt"
    path.write_bytes("[PAD]\nä".encode("latin-1"))
    with pytest.raises(ValueError, match=f"the vocabulary {path} is not UTF-8"):
        WordPiece.from_vocabulary(str(path))
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=f"the tokenizer {path} cannot be read"):
        WordPiece.from_vocabulary(path)


def test_tokenizers_that_would_not_do_are_named(tmp_path):
    import tokenizers

    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(ValueError, match=f"{path} must be a WordPiece, got WordLevel"):
        WordPiece.from_vocabulary(path)
    # Nothing splits the brackets from the word.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ID, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match=r"must split '\[SEP\]' in a text into pieces"):
        WordPiece.from_vocabulary(path)
