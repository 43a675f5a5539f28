import hashlib
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from merge_jax.data import load_tfds_questions, load_tfds_texts
from merge_jax.data.text import imdb, squad
from merge_jax.data.text.text_set import Question
from tests.data.common import serve

IMDB_URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
LABELS = {"neg": 0, "pos": 1}
IMDB = {
    "aclImdb/README": "not a review",
    "aclImdb/train/labeledBow.feat": "0 9:7",
    "aclImdb/train/neg/0_2.txt": "Dull.<br /><br />Very dull.\n",
    "aclImdb/train/neg/1_1.txt": "  Bad",
    "aclImdb/train/pos/0_9.txt": "Très bien ☺",
    "aclImdb/train/unsup/0_0.txt": "Who knows?",
    "aclImdb/test/neg/0_3.txt": "No.",
    "aclImdb/test/pos/0_10.txt": "Yes! ",
}
PASSAGE = "Né à Paris, the poet lived in Paris, and died in Nice."


def manual(data_dir, name):
    path = data_dir / "downloads" / "manual" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def put_imdb(data_dir, files=IMDB):
    """The official layout; `files` are texts by name, or pairs of them."""
    path = manual(data_dir, "aclImdb_v1.tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("aclImdb/train/neg/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, text in files.items() if isinstance(files, dict) else files:
            content = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def by_text(texts):
    """Examples whatever their order, which TFDS draws."""
    return sorted(zip(texts.texts, texts.labels.tolist(), strict=True))


def expected_imdb(split, files=IMDB):
    parts = [(name.split("/"), text) for name, text in files.items()]
    return sorted((text.strip(), LABELS[part[2]]) for part, text in parts if part[1] == split and part[2] in LABELS)


def answer(text, start):
    return {"text": text, "answer_start": start}


def squad_file(*questions, passage=PASSAGE):
    """The official layout of a file of SQuAD v2; a question is an id, a text and its answers."""
    asked = []
    for id_, question, answers in questions:
        asked.append({"id": id_, "question": question, "answers": answers, "is_impossible": not answers})
        if not answers:
            asked[-1]["plausible_answers"] = [answer("poet", 16)]
    paragraph = {"context": passage, "qas": asked}
    return json.dumps({"version": "v2.0", "data": [{"title": "Poets", "paragraphs": [paragraph]}]}).encode()


TRAIN = squad_file(("a", "Où est-il né ?", [answer("Paris", 5)]), ("b", "Who was his aunt?", []))
DEV = squad_file(("c", "Where did he die?", [answer("Nice", 49), answer("in Nice", 46), answer("Nice", 49)]))


def put_squad(data_dir, train=TRAIN, dev=DEV, version="v2.0"):
    for part, content in (("train", train), ("dev", dev)):
        manual(data_dir, f"{part}-{version}.json").write_bytes(content)


def test_imdb_is_read_from_its_archive_and_official_tfds_reads_what_was_prepared(tmp_path, capsys):
    put_imdb(tmp_path)
    loaded = load_tfds_texts(data_dir=tmp_path)
    assert capsys.readouterr().out == ""
    assert (loaded.name, loaded.classes) == ("imdb_reviews", ("neg", "pos"))
    for split, texts in (("train", loaded.train), ("test", loaded.test)):
        assert by_text(texts) == expected_imdb(split)
        assert texts.labels.dtype == np.int32
    splits = tfds.data_source("imdb_reviews", data_dir=tmp_path)
    assert set(splits) == {"train", "test", "unsupervised"}
    official = sorted((example["text"].decode(), int(example["label"])) for example in splits["train"])
    assert official == expected_imdb("train")
    [unsupervised] = splits["unsupervised"]
    assert (unsupervised["text"], unsupervised["label"]) == (b"Who knows?", -1)


def test_an_archive_of_ones_own_needs_no_texts_without_labels(tmp_path):
    put_imdb(tmp_path, {name: text for name, text in IMDB.items() if "unsup" not in name})
    assert by_text(load_tfds_texts("imdb_reviews", tmp_path).train) == expected_imdb("train")


def test_of_two_members_of_one_name_the_later_counts(tmp_path):
    put_imdb(tmp_path, [("aclImdb/test/pos/0_10.txt", "No!"), *IMDB.items()])
    assert by_text(load_tfds_texts(data_dir=tmp_path).test) == expected_imdb("test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {name: text for name, text in IMDB.items() if "test" not in name},
            r"has no texts in \['aclImdb/test/neg/', 'aclImdb/test/pos/'\], found \['aclImdb/train/neg', 'aclI",
        ),
        ({name.replace("aclImdb", "imdb"): text for name, text in IMDB.items()}, r"has no texts in \['aclImdb/train/n"),
        (IMDB | {"aclImdb/train/pos/0_9.txt": b"Tr\xe8s bien"}, r"aclImdb/train/pos/0_9.txt is not UTF-8 \(.* 0xe8"),
    ],
    ids=["no test", "other folder", "latin"],
)
def test_a_wrong_archive_is_named_and_leaves_nothing_behind(files, message, tmp_path):
    path = put_imdb(tmp_path, files)
    with pytest.raises(ValueError, match=f"{path}:? {message}") as caught:
        load_tfds_texts(data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("imdb_reviews/plain_text/[0-9]*"))


@pytest.mark.parametrize("cut", [8, 200], ids=["no trailer", "half"])
def test_a_truncated_archive_is_named(cut, tmp_path):
    path = put_imdb(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=f"^the archive {path} is truncated or broken .*; replace it with a whole one"):
        load_tfds_texts(data_dir=tmp_path)


def know(monkeypatch, builder_class, contents):
    """Has TFDS take these contents by URL for the official ones."""
    infos = {
        url: checksums.UrlInfo(len(content), hashlib.sha256(content).hexdigest(), url.rsplit("/", 1)[1])
        for url, content in contents.items()
    }
    monkeypatch.setattr(builder_class, "url_infos", infos)


def test_a_missing_archive_is_downloaded_and_has_to_be_the_official_one(tmp_path, monkeypatch):
    contents = {IMDB_URL: put_imdb(tmp_path / "elsewhere").read_bytes()}
    asked = serve(monkeypatch, contents)
    with pytest.raises(ValueError, match=rf"^{IMDB_URL} cannot be downloaded \(Artifact .* has wrong checksum"):
        load_tfds_texts(data_dir=tmp_path / "wrong")
    know(monkeypatch, imdb._builder_class(), contents)
    assert by_text(load_tfds_texts(data_dir=tmp_path).train) == expected_imdb("train")
    assert asked == [IMDB_URL] * 2


def test_without_a_network_the_error_names_url_and_place(tmp_path, monkeypatch):
    serve(monkeypatch, {})
    place = tmp_path / "downloads" / "manual" / "aclImdb_v1.tar.gz"
    with pytest.raises(ValueError, match=rf"^{IMDB_URL} cannot be downloaded \(no network\); .* put it at {place}$"):
        load_tfds_texts(data_dir=tmp_path)


def test_squad_is_read_from_its_files_and_official_tfds_reads_what_was_prepared(tmp_path, capsys, monkeypatch):
    asked = serve(monkeypatch, {})
    put_squad(tmp_path)
    loaded = load_tfds_questions(data_dir=tmp_path)
    assert capsys.readouterr().out == ""
    assert asked == []
    assert loaded.name == "squad/v2.0"
    assert sorted(loaded.train, key=lambda question: question.question) == [
        Question("Où est-il né ?", PASSAGE, ("Paris",), 5),
        Question("Who was his aunt?", PASSAGE, (), -1),
    ]
    assert list(loaded.test) == [Question("Where did he die?", PASSAGE, ("Nice", "in Nice", "Nice"), 49)]
    assert loaded.train[0].passage is loaded.train[1].passage
    [official] = tfds.data_source("squad/v2.0", split="validation", data_dir=tmp_path)
    assert official["id"] == b"c"
    assert list(official["answers"]["answer_start"]) == [49, 46, 49]
    assert not official["is_impossible"]


def test_the_first_squad_has_its_name_too(tmp_path):
    put_squad(tmp_path, version="v1.1", train=squad_file(("a", "Who?", [answer("poet", 16)])))
    for name in ("squad/v1.1", "squad"):
        loaded = load_tfds_questions(name, tmp_path)
        assert loaded.name == name
        assert list(loaded.train) == [Question("Who?", PASSAGE, ("poet",), 16)]


@pytest.mark.parametrize(("given", "start"), [(4, 5), (7, 5), (25, 30), (31, 30), (900, 30), (-3, 5)])
def test_an_answer_that_is_off_is_taken_from_the_nearest_place(given, start, tmp_path):
    put_squad(tmp_path, train=squad_file(("a", "Where?", [answer("Paris", given)])))
    assert load_tfds_questions(data_dir=tmp_path).train[0].start == start


def test_an_answer_that_is_nowhere_is_named(tmp_path):
    put_squad(tmp_path, dev=squad_file(("a", "Where?", [answer("Rome", 5)])))
    with pytest.raises(ValueError, match=r"^squad validation: the answer 'Rome' of question 0 is not in its passage$"):
        load_tfds_questions(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TRAIN[:-20], r"is truncated or no file of SQuAD v2.0 \(JSONDecodeError: "),
        (b"", r"is truncated or no file of SQuAD v2.0 \(JSONDecodeError: Expecting value"),
        (b"\xff\xfe", r"is truncated or no file of SQuAD v2.0 \(UnicodeDecodeError: "),
        (b"{}", r"is truncated or no file of SQuAD v2.0 \(KeyError: 'data'\)"),
        (b'{"data": [{"paragraphs": 3}]}', r"is truncated or no file of SQuAD v2.0 \(TypeError: "),
        (b'{"data": ["x"]}', r"is truncated or no file of SQuAD v2.0 \(AttributeError: "),
        (TRAIN.replace(b"is_impossible", b"possible"), r"is truncated or .* \(KeyError: 'is_impossible'\)"),
        (b'{"data": []}', "has no questions"),
        (squad_file(("a", "Who?", []), ("b", "Who?", []), ("a", "Where?", [])), "has 1 ids .* such as 'a'$"),
    ],
)
def test_a_wrong_file_of_squad_is_named_and_leaves_nothing_behind(content, message, tmp_path):
    put_squad(tmp_path, dev=content)
    path = manual(tmp_path, "dev-v2.0.json")
    with pytest.raises(ValueError, match=f"^{path} {message}") as caught:
        load_tfds_questions(data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("squad/v2.0/[0-9]*"))


def test_missing_files_of_squad_are_downloaded_or_their_place_named(tmp_path, monkeypatch):
    put_squad(tmp_path)
    place = manual(tmp_path, "dev-v2.0.json")
    place.unlink()
    url = f"{SQUAD_URL}dev-v2.0.json"
    serve(monkeypatch, {})
    with pytest.raises(ValueError, match=rf"^{url} cannot be downloaded \(no network\); .* put it at {place}$"):
        load_tfds_questions(data_dir=tmp_path)
    asked = serve(monkeypatch, {url: DEV})
    with pytest.raises(ValueError, match=rf"^{url} cannot be downloaded \(Artifact .* has wrong checksum"):
        load_tfds_questions(data_dir=tmp_path)
    know(monkeypatch, squad._builder_class(), {url: DEV, f"{SQUAD_URL}train-v2.0.json": b"which lies there"})
    assert len(load_tfds_questions(data_dir=tmp_path).test) == 1
    assert asked == [url] * 2


def test_other_files_than_the_prepared_ones_are_refused(tmp_path):
    put_squad(tmp_path)
    load_tfds_questions(data_dir=tmp_path)
    path = manual(tmp_path, "dev-v2.0.json")
    path.write_bytes(TRAIN)
    with pytest.raises(ValueError, match=f"another archive than {path}; remove the folder {tmp_path}/squad/v2.0/3.0.0"):
        load_tfds_questions(data_dir=tmp_path)
    # TFDS itself leaves no record, and takes the official files alone, which these are not.
    (tmp_path / "squad" / "v2.0" / "3.0.0" / "archive.sha256").unlink()
    with pytest.raises(ValueError, match=f"another archive than {manual(tmp_path, 'train-v2.0.json')}"):
        load_tfds_questions(data_dir=tmp_path)


def extracted(monkeypatch, folder, files):
    """Has TFDS find an archive downloaded and extracted, which takes TensorFlow."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def download_and_extract(self, urls):
        return {key: str(folder) for key in urls} if isinstance(urls, dict) else str(folder)

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download_and_extract)


def test_another_set_with_several_texts_is_read(tmp_path, monkeypatch):
    rows = {"train": '"3","Goal","He scored."\n"1","War","It began."\n', "test": '"4","Chip","It is fast."\n'}
    extracted(monkeypatch, tmp_path / "raw", {f"ag_news_csv/{split}.csv": text for split, text in rows.items()})
    with pytest.raises(
        ValueError,
        match=r"ag_news_subset needs features \['text'\], .* found \{'description': 'Text', .*the option `text`",
    ):
        load_tfds_texts("ag_news_subset", tmp_path)
    loaded = load_tfds_texts("ag_news_subset", tmp_path, text=("title", "description"))
    assert by_text(loaded.train) == [("Goal He scored.", 2), ("War It began.", 0)]
    assert by_text(loaded.test) == [("Chip It is fast.", 3)]
    assert loaded.classes == ("World", "Sports", "Business", "Sci/Tech")
    assert by_text(load_tfds_texts("ag_news_subset", tmp_path, text="title").test) == [("Chip", 3)]


def glue(train_label="1"):
    return {
        "SST-2/train.tsv": f"sentence\tlabel\nso good\t{train_label}\nso bad\t0\n",
        "SST-2/dev.tsv": "sentence\tlabel\nfine\t1\n",
        "SST-2/test.tsv": "index\tsentence\n0\twho knows\n",
    }


def test_validation_is_tested_on_where_the_labels_of_the_test_are_hidden(tmp_path, monkeypatch):
    extracted(monkeypatch, tmp_path / "raw", glue())
    loaded = load_tfds_texts("glue/sst2", tmp_path, text="sentence")
    assert by_text(loaded.train) == [("so bad", 0), ("so good", 1)]
    assert by_text(loaded.test) == [("fine", 1)]
    assert (loaded.name, loaded.classes) == ("glue/sst2", ("negative", "positive"))


def test_a_label_that_is_hidden_from_training_is_named(tmp_path, monkeypatch):
    extracted(monkeypatch, tmp_path / "raw", glue(train_label="-1"))
    with pytest.raises(
        ValueError, match=r"^glue/sst2 train: labels must lie in \[0, 2\), got -1 at .* \(1 of 2 are out"
    ):
        load_tfds_texts("glue/sst2", tmp_path, text="sentence")


def test_mocked_sets_are_read_as_prepared_ones(tmp_path):
    put_imdb(tmp_path)
    load_tfds_texts(data_dir=tmp_path)
    with tfds.testing.mock_data(num_examples=7, data_dir=str(tmp_path)):
        mocked = load_tfds_texts(data_dir=tmp_path)
    assert len(mocked.train.texts) == len(mocked.test.labels) == 7


def test_unknown_sets_are_named_with_near_misses(tmp_path):
    for load in (load_tfds_texts, load_tfds_questions):
        with pytest.raises(ValueError, match=r"^unknown data set 'imdb_review'; did you mean 'imdb_reviews'.*$"):
            load("imdb_review", tmp_path)
        with pytest.raises(
            ValueError, match=r"^unknown data set 'squad/v3.0'; did you mean 'squad/v2.0' or 'squad/v1.1'"
        ):
            load("squad/v3.0", tmp_path)
        with pytest.raises(ValueError, match=r"^unknown data set 'glue/sst3'; did you mean 'glue/sst2'"):
            load("glue/sst3", tmp_path)


def test_sets_of_another_kind_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^mnist needs features \['text'\], which are Text, .* found \{'image': 'Image'"
    ):
        load_tfds_texts("mnist", tmp_path)
    with pytest.raises(
        ValueError, match=r"^imdb_reviews needs features \['sentence'\], .* found \{'label': 'ClassLabel'"
    ):
        load_tfds_texts(data_dir=tmp_path, text="sentence")
    with pytest.raises(ValueError, match=r"^imdb_reviews needs features \[\], "):
        load_tfds_texts(data_dir=tmp_path, text=())
    with pytest.raises(ValueError, match=r"^imdb_reviews needs features 'question' and 'context', .* found \{'label':"):
        load_tfds_questions("imdb_reviews", tmp_path)


def test_a_set_whose_archive_takes_tensorflow_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # Also where it is installed.

    def download_and_extract(self, urls):
        raise ImportError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download_and_extract)
    with pytest.raises(ValueError, match=rf"^glue/sst2 needs TensorFlow.* prepare it once where .* into {tmp_path}$"):
        load_tfds_texts("glue/sst2", tmp_path, text="sentence")
    assert capsys.readouterr().out == ""
