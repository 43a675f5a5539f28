"""Converts texts to token arrays by BERT's WordPiece, and extracts answers from passages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unicodedata import combining

import numpy as np

from merge_jax.checks import check_at_least_one, check_choice
from merge_jax.data.arrays import Arrays
from merge_jax.data.text.text_set import Question

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["MODEL_VOCABULARIES", "Encoded", "EncodedQuestions", "WordPiece", "decode_spans"]

MODEL_VOCABULARIES = ("tokenizer.json", "vocab.txt")
"""Files of a model's folder that have its vocabulary, the better one first: it says itself how to split a text."""

_NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_SPECIAL = (*_NEEDED, "[MASK]")
_PADDING = 0
# Encodings hold every token as a string, which would fill the memory for a whole set of long texts.
_CHUNK = 1000


@dataclass(frozen=True)
class Encoded:
    """Texts as arrays.

    Attributes:
      arrays: `{"tokens": int32 [N, L], "label": int32 [N]}`.
      truncated: the number of truncated texts.
    """

    arrays: Arrays
    truncated: int


@dataclass(frozen=True)
class EncodedQuestions:
    """Questions on passages as arrays.

    Attributes:
      arrays: as `WordPiece.encode_questions` describes them.
      truncated: the number of truncated passages.
      cut_off: the number of questions whose answer was wholly or partly truncated; those with `arrays["kept"]` False.
    """

    arrays: Arrays
    truncated: int
    cut_off: int


class WordPiece:
    """BERT's tokenizer, by the library `tokenizers`; created by `from_vocabulary` or `train`.

    A literal `[SEP]` in the input is tokenised as text, never as the special token.

    Source: Devlin et al., "BERT" (2019); the library's training merges the most frequent pair of pieces.
    """

    def __init__(self, tokenizer: "Tokenizer", source: str) -> None:
        """Takes a tokenizer of the library; `source` identifies it in errors.

        Raises:
          ValueError: it lacks special tokens, `[PAD]` is not 0, or it parses special tokens in a text.
        """
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        missing = [token for token in _NEEDED if token not in vocabulary]
        if missing:
            raise ValueError(f"{source} lacks the special tokens {', '.join(missing)}")
        if vocabulary["[PAD]"] != _PADDING:
            raise ValueError(f"{source} must give [PAD] the id 0, which the models mask, got {vocabulary['[PAD]']}")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        read = set(tokenizer.encode(" ".join(_NEEDED), add_special_tokens=False).ids)
        if read & {vocabulary[token] for token in ("[PAD]", "[CLS]", "[SEP]")}:
            raise ValueError(f"{source} must split '[SEP]' in a text into pieces, but reads it as the special token")
        self._tokenizer = tokenizer
        self._first = vocabulary["[CLS]"]
        self._separator = vocabulary["[SEP]"]
        self._size = max(vocabulary.values()) + 1

    @classmethod
    def from_vocabulary(cls, path: Path | str, lowercase: bool = True) -> "WordPiece":
        """Returns the tokenizer of a BERT `vocab.txt`, one token per line, or of a `tokenizer.json` (by suffix).

        From a Hugging Face model folder, reads `tokenizer.json`, or else `vocab.txt`. `lowercase` also strips accents,
        like uncased BERT; it applies only to a `vocab.txt`, since a `tokenizer.json` specifies this itself.

        Raises:
          ValueError: the file is missing, unreadable or not WordPiece; a token is duplicate or empty; special tokens
            are missing, or `[PAD]` is not 0.
        """
        library = _library()
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in MODEL_VOCABULARIES if (path / name).is_file()]
            if not found:
                raise ValueError(f"the folder {path} has neither {' nor '.join(MODEL_VOCABULARIES)}")
            path = found[0]
        if not path.is_file():
            raise ValueError(f"the vocabulary {path} is missing or not a file")
        if path.suffix != ".json":
            return cls(_tokenizer(_read_vocabulary(path), lowercase), str(path))
        try:
            tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises various types for unreadable files.
            raise ValueError(f"the tokenizer {path} cannot be read: {error}") from error
        if not isinstance(tokenizer.model, library.models.WordPiece):
            raise ValueError(f"the tokenizer {path} must be a WordPiece, got {type(tokenizer.model).__name__}")
        return cls(tokenizer, str(path))

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int, lowercase: bool = True) -> "WordPiece":
        """Returns a tokenizer trained on texts, deterministically; `lowercase` also strips accents.

        The first ids are `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]` and `[MASK]`. It has fewer than `vocab_size` tokens if no
        more pieces of words can be merged.

        Raises:
          ValueError: the texts have no letters, or the vocabulary is too small for all letters.
        """
        library = _library()
        check_at_least_one(vocab_size=vocab_size)

        def learnt(size: int, first: list[str]) -> dict[str, int]:
            tokenizer = _tokenizer({token: i for i, token in enumerate(_SPECIAL)}, lowercase)
            tokenizer.train_from_iterator(
                texts, library.trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
            )
            return tokenizer.get_vocab(with_added_tokens=True)

        # The library numbers the letters inside words in hash map order, which differs at every call, and breaks ties
        # by these numbers. So we first collect only the letters, and then pass them in order.
        letters = sorted(set(learnt(0, list(_SPECIAL))) - set(_SPECIAL))
        if not letters:
            raise ValueError(f"there is no letter to learn from in {len(texts)} texts")
        if vocab_size < len(_SPECIAL) + len(letters):
            raise ValueError(
                f"vocab_size must be at least {len(_SPECIAL) + len(letters)}, for {len(_SPECIAL)} special tokens and"
                f" {len(letters)} letters, at the start of a word and inside it, got {vocab_size}"
            )
        return cls(_tokenizer(learnt(vocab_size, [*_SPECIAL, *letters]), lowercase), "the learnt vocabulary")

    @property
    def vocab_size(self) -> int:
        """The number of tokens, which is the number of rows of a model's embedding table."""
        return self._size

    @property
    def words(self) -> dict[str, int]:
        """The tokens with their ids."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def separator(self) -> int:
        """The id of `[SEP]`."""
        return self._separator

    def save(self, path: Path | str) -> None:
        """Writes a `tokenizer.json`, which `from_vocabulary` reads.

        Raises:
          ValueError: the name does not end in `.json`.
        """
        if Path(path).suffix != ".json":
            raise ValueError(f"a tokenizer is saved as .json, got {path}")
        Path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")

    def encode_texts(
        self, texts: Sequence[str], labels: np.ndarray, max_length: int, *, too_long: str = "truncate"
    ) -> Encoded:
        """Returns `{"tokens": int32 [N, max_length], "label": int32 [N]}`: `[CLS] text [SEP]`, padded with 0.

        Raises:
          ValueError: there are no texts; labels are not integers `[N]`; a text has no tokens, such as an empty one, or
            is too long under `too_long="error"`.
        """
        _check_options(max_length, 3, too_long)
        labels = np.asarray(labels)
        if not len(texts):
            raise ValueError("there are no texts to encode")
        if labels.shape != (len(texts),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels of {len(texts)} texts must be whole numbers [{len(texts)}], got {labels.dtype} of shape"
                f" {labels.shape}"
            )
        tokens = np.full((len(texts), max_length), _PADDING, np.int32)
        truncated = 0
        for index, encoding in enumerate(self._encodings(texts)):
            ids, room = encoding.ids, max_length - 2
            if not ids:
                raise ValueError(f"text {index} has no tokens: {_shown(texts[index])}")
            if len(ids) > room:
                if too_long == "error":
                    raise ValueError(f"text {index} has {len(ids)} tokens, but max_length {max_length} leaves {room}")
                truncated += 1
            row = [self._first, *ids[:room], self._separator]
            tokens[index, : len(row)] = row
        return Encoded({"tokens": tokens, "label": labels.astype(np.int32)}, truncated)

    def encode_questions(
        self, questions: Sequence[Question], max_length: int, *, too_long: str = "truncate"
    ) -> EncodedQuestions:
        """Returns `[CLS] question [SEP] passage [SEP]`, padded with 0; only the passage is truncated if needed.

        With L = `max_length`, the arrays are

        - "tokens": int32 `[N, L]`;
        - "start", "end": int32 `[N]`, the positions of the first and the last token of the first answer. Both are 0
          (`[CLS]`) if a question has no answer or its answer was truncated;
        - "offset": int32 `[N, L, 2]`, the character range in the passage of each of its tokens, end exclusive; (0, 0)
          elsewhere;
        - "example": int32 `[N]`, the question's index;
        - "kept": bool `[N]`, False if the answer was truncated. Such questions would wrongly teach "no answer", so
          leave them out of training, but not out of a test.

        Raises:
          ValueError: there are no questions; a question, a passage or an answer has no tokens; an answer is not at its
            position in the passage; a question leaves no room for its passage; a passage is too long under
            `too_long="error"`.
        """
        _check_options(max_length, 5, too_long)
        if not len(questions):
            raise ValueError("there are no questions to encode")
        size = len(questions)
        arrays = {
            "tokens": np.full((size, max_length), _PADDING, np.int32),
            "start": np.zeros(size, np.int32),
            "end": np.zeros(size, np.int32),
            "offset": np.zeros((size, max_length, 2), np.int32),
            "example": np.arange(size, dtype=np.int32),
            "kept": np.ones(size, np.bool_),
        }
        truncated = 0
        encodings = zip(
            self._encodings([question.question for question in questions]),
            self._encodings([question.passage for question in questions]),
            strict=True,
        )
        for index, (asked, passage) in enumerate(encodings):
            question = questions[index]
            _check_answer(index, question)
            for noun, encoding, text in (
                ("question", asked, question.question),
                ("the passage of question", passage, question.passage),
            ):
                if not encoding.ids:
                    raise ValueError(f"{noun} {index} has no tokens: {_shown(text)}")
            begin = len(asked.ids) + 2
            room = max_length - begin - 1
            if room < 1:
                raise ValueError(
                    f"question {index} has {len(asked.ids)} tokens and leaves no room for its passage in max_length"
                    f" {max_length}"
                )
            count = min(len(passage.ids), room)
            if count < len(passage.ids):
                if too_long == "error":
                    raise ValueError(
                        f"the passage of question {index} has {len(passage.ids)} tokens, but max_length {max_length}"
                        f" leaves {room}"
                    )
                truncated += 1
            row = [self._first, *asked.ids, self._separator, *passage.ids[:count], self._separator]
            arrays["tokens"][index, : len(row)] = row
            offsets = _offsets(passage, question.passage)
            arrays["offset"][index, begin : begin + count] = offsets[:count]
            if question.answers:
                first, last = _answer_tokens(index, question, offsets)
                if last < count:
                    arrays["start"][index], arrays["end"][index] = begin + first, begin + last
                else:
                    arrays["kept"][index] = False
        return EncodedQuestions(arrays, truncated, int(np.sum(~arrays["kept"])))

    def _encodings(self, texts: Sequence[str]) -> "Iterator[Encoding]":
        for first in range(0, len(texts), _CHUNK):
            chunk = texts[first : first + _CHUNK]
            different = list(dict.fromkeys(chunk))  # Questions share their passages.
            encoded = self._tokenizer.encode_batch(different, add_special_tokens=False)
            by_text = dict(zip(different, encoded, strict=True))
            yield from (by_text[text] for text in chunk)


def decode_spans(logits: np.ndarray, arrays: Arrays, passages: Sequence[str], max_answer_tokens: int = 30) -> list[str]:
    """Returns the likeliest answer to each question, "" for none.

    The answer is `argmax_{s <= e} logits[s, 0] + logits[e, 1]` over the passage's tokens, with `e - s` below
    `max_answer_tokens`; none if `logits[0, 0] + logits[0, 1]`, the score of `[CLS]`, is as high. Ties go to the
    shorter, then the earlier answer. The answer is the literal substring of the passage.

    Args:
      logits: `[N, L, 2]`, for the start and the end.
      arrays: from `encode_questions`, or N rows of them; uses "offset" and "example".
      passages: the passages of all questions; row i uses `passages[arrays["example"][i]]`.
      max_answer_tokens: the maximum number of tokens in an answer.

    Source: the rule of BERT (2019), section 4.3, with a threshold of 0.

    Raises:
      ValueError: shapes do not fit, a passage is missing, or logits are not numbers.
    """
    check_at_least_one(max_answer_tokens=max_answer_tokens)
    logits = np.asarray(logits, np.float32)
    offsets, examples = arrays["offset"], arrays["example"]
    if logits.shape != offsets.shape:
        raise ValueError(f"logits must have the shape of the offsets, {offsets.shape}, got {logits.shape}")
    if np.isnan(logits).any():
        raise ValueError(f"logits must be numbers, got {np.isnan(logits).sum()} nan of {logits.size}")
    if examples.size and examples.max() >= len(passages):
        raise ValueError(f"there must be a passage for each question, up to {examples.max()}, got {len(passages)}")
    size, length = logits.shape[:2]
    # Only a token of a passage ends after its first character.
    scores = np.where(offsets[..., 1:] > 0, logits, -np.inf)
    best = logits[:, 0].sum(axis=-1)
    first, last = np.zeros(size, int), np.zeros(size, int)
    rows = np.arange(size)
    for extra in range(min(max_answer_tokens, length)):
        spans = scores[:, : length - extra, 0] + scores[:, extra:, 1]
        start = spans.argmax(axis=1)
        better = spans[rows, start] > best
        best = np.where(better, spans[rows, start], best)
        first, last = np.where(better, start, first), np.where(better, start + extra, last)
    # If nothing beats [CLS], its offsets, (0, 0), yield "".
    return [
        passages[int(example)][offset[s, 0] : offset[e, 1]]
        for example, offset, s, e in zip(examples, offsets, first, last, strict=True)
    ]


def _library() -> ModuleType:
    import tokenizers  # Not at the top: only texts need this slow import.

    return tokenizers


def _tokenizer(vocabulary: dict[str, int], lowercase: bool) -> Any:
    library = _library()
    tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the vocabulary {path} is not UTF-8: {error}") from error
    vocabulary: dict[str, int] = {}
    # Not splitlines, which also splits at characters that are tokens.
    for number, token in enumerate(content.removesuffix("\n").split("\n")):
        if not token:
            raise ValueError(f"line {number + 1} of the vocabulary {path} is empty")
        if token in vocabulary:
            raise ValueError(f"{path} has the token {token!r} twice, in lines {vocabulary[token] + 1} and {number + 1}")
        vocabulary[token] = number
    return vocabulary


def _check_options(max_length: int, least: int, too_long: str) -> None:
    check_at_least_one(max_length=max_length)
    if max_length < least:
        raise ValueError(
            f"max_length must be at least {least}, the special tokens and what they enclose, got {max_length}"
        )
    check_choice("choice of too_long", too_long, ("truncate", "error"))


def _check_answer(index: int, question: Question) -> None:
    if not question.answers:
        if question.start != -1:
            raise ValueError(f"question {index} has no answer, so its start must be -1, got {question.start}")
        return
    answer, passage, start = question.answers[0], question.passage, question.start
    found = passage[start : start + len(answer)] if start >= 0 else ""
    if found != answer:
        raise ValueError(
            f"the answer of question {index}, {_shown(answer)}, is not in its passage at {start}, where"
            f" {_shown(found)} stands"
        )


def _offsets(encoding: "Encoding", passage: str) -> np.ndarray:
    offsets = np.array(encoding.offsets, np.int32)
    if not passage.isascii():
        # The library drops an accent that is a separate character at the end of a word, but it is part of the text.
        for row, (_, end) in enumerate(offsets):
            while end < len(passage) and combining(passage[end]):
                end += 1
            offsets[row, 1] = end
    return offsets


def _answer_tokens(index: int, question: Question, offsets: np.ndarray) -> tuple[int, int]:
    end = question.start + len(question.answers[0])
    inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > question.start))
    if not inside.size:
        raise ValueError(f"the answer of question {index} has no tokens: {_shown(question.answers[0])}")
    return int(inside[0]), int(inside[-1])


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
