"""The experiment across tasks, and the data that it takes."""

import json
import re
from functools import partial

import jax
import numpy as np
import pytest

import merge_jax as mj
import merge_jax.study.models.tasks
import merge_jax.study.models.texts
from experiments import cross_task
from merge_jax.data import WordPiece
from merge_jax.study.cli import parse
from merge_jax.study.sources import plan_source
from tests import helpers
from tests.smoke import run

LITTLE = [
    *("--seeds", "1", "--steps", "4", "--source-steps", "4", "--report-every", "2", "--checkpoint-every", "2"),
    # Where every step transfers, the target's step is compiled once.
    *("--labels", "40", "--validation", "20", "--batch-size", "8", "--cycle", "1", "--stop", "1.0", "--num-heads", "2"),
]
IMAGES = ["smoke", *LITTLE, "--methods", "share"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A tenth of the texts and questions that are drawn, which are encoded for each scenario."""
    drawn = {
        "sentiment": partial(mj.data.synthetic_reviews, 200, 100, seed=0),
        "topic": partial(mj.data.synthetic_topics, 200, 100, seed=0),
        "qa": partial(mj.data.synthetic_questions, 400, 100, seed=0),
    }
    monkeypatch.setattr(merge_jax.study.models.texts, "_SYNTHETIC", drawn)


@pytest.fixture
def shallow(monkeypatch):
    """The small models with half of their layers, which compile in half of the time."""
    for name, layers in {"small_bert": 2, "small_distilbert": 1}.items():
        monkeypatch.setattr(mj.models, name, partial(getattr(mj.models, name), num_layers=layers))


def build(*options):
    return cross_task.build(parse(cross_task.PRESETS, "", "", list(map(str, options))))


def check(*options):
    """Builds a scenario, and lets its transfer check its routes."""
    scenario = build(*options)
    params = [jax.eval_shape(role.init, jax.random.key(0))[0] for role in (scenario.source, scenario.target)]
    scenario.methods["share"].transfer.init(jax.random.key(0), *params)


def write_texts(folder, name="texts", rows=60):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.tsv"
    lines = [f"item {i} is {'good' if i % 2 else 'bad'} \t{i % 2}" for i in range(rows)]
    path.write_text("sentence\tgrade\n" + "\n".join(lines) + "\n")
    return path


def write_questions(folder, rows=60):
    path = folder / "squad.json"
    paragraphs = []
    for i in range(rows):
        passage = f"The colour of item {i} is {'red' if i % 2 else 'blue'}."
        answers = [{"text": passage[-4:-1].strip(), "answer_start": len(passage) - 4}] if i % 3 else []
        asked = {"id": str(i), "question": f"what is item {i}?", "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": passage, "qas": [asked]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def test_texts_too_are_a_pool_without_labels(tmp_path):
    path = write_texts(tmp_path, rows=100)
    files = ("--target-data", path, "--target-text", "sentence", "--target-label", "grade", "--source-data", "target")
    options = ("topic", *LITTLE, *files, "--target-task", "sentiment", "--source-task", "sentiment", "--labels", "20")
    target = build(*options, "--methods", "kd", "--unlabelled", "30").target
    pool, splits = target.pool(0), target.splits(0)
    np.testing.assert_array_equal(pool["tokens"][:20], splits.train["tokens"])
    assert list(pool) == ["tokens"]
    assert len(pool["tokens"]) == 50
    of_no_other = {tuple(row) for part in (splits.validation, splits.test) for row in part["tokens"]}
    assert not of_no_other & {tuple(row) for row in pool["tokens"]}
    with pytest.raises(ValueError, match="20 are labelled, which leaves 40: give fewer"):
        build(*options, "--unlabelled", "41")
    with pytest.raises(ValueError, match="unlabelled texts are for classifiers, and "):
        build("reverse", *LITTLE, "--unlabelled", "5")


def test_blocks_meet_by_depth():
    scenario = build(*LITTLE, "--methods", "share")
    params = {role: jax.eval_shape(getattr(scenario, role).init, jax.random.key(0))[0] for role in ("source", "target")}
    rows = scenario.methods["share"].transfer.describe(params["source"], params["target"])
    routes = {row.target.split("/attention")[0]: row.source.split("/attention")[0] for row in rows}
    assert routes == {"encoder/layer_0": "encoder/layer_1", "encoder/layer_1": "encoder/layer_3"}


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_several_tasks_are_several_sources(tmp_path):
    options = [*LITTLE, "--source-task", "qa", "topic", "--source", "live", "--methods", "share"]
    _, (first, last) = run("cross_task", tmp_path / "run", *options)
    assert {"source/validation_qa_f1", "source/validation_topic_accuracy", "source/qa_loss"} <= last.keys()
    assert first["adapter/change"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_files_of_ones_own_are_data_and_the_reverse_direction_runs(tmp_path):
    texts, questions = write_texts(tmp_path), write_questions(tmp_path)
    options = [
        *(*LITTLE, "--source-task", "sentiment", "--source-data", texts, "--source-text", "sentence"),
        *("--source-label", "grade", "--target-task", "qa", "--target-data", questions, "--labels", "20"),
        *("--validation", "8", "--methods", "vanilla", "--source", "live"),
    ]
    (result,), records = run("cross_task", tmp_path / "run", *options)
    assert 0 <= result["target_test"] <= 1
    assert {"source/validation_accuracy", "target/validation_f1"} <= records[-1].keys()


def test_what_is_held_out_is_never_learned_from():
    for task in ("sentiment", "qa"):
        role = build(*LITTLE, "--target-task", task, "--methods", "vanilla").target
        splits = [role.splits(seed) for seed in (0, 1)]
        for one in splits:
            parts = [{row.tobytes() for row in arrays["tokens"]} for arrays in (one.train, one.validation, one.test)]
            assert len(parts[0]) == 40
            assert not parts[0] & parts[1]
            assert not parts[0] & parts[2]
        assert not np.array_equal(splits[0].train["tokens"], splits[1].train["tokens"])
        np.testing.assert_array_equal(splits[0].test["tokens"], splits[1].test["tokens"])


@pytest.mark.parametrize("task", ["parity", "parity_and_size"])
def test_labels_of_digits_are_those_of_the_task(task):
    scenario = build(*IMAGES, "--target-task", task)
    digits, target = scenario.source.splits(3).test["label"], scenario.target.splits(3).test["label"]
    expected = digits % 2 if task == "parity" else digits % 2 + 2 * (digits >= 5)
    np.testing.assert_array_equal(target, expected)


@pytest.mark.usefixtures("shallow")
def test_weights_of_hugging_face_are_where_a_model_starts(tmp_path, capsys):
    scenario = build(*LITTLE, "--methods", "vanilla")
    params, _ = scenario.source.init(jax.random.key(5))
    weights = {name: tensor for name, tensor in mj.models.to_huggingface(params).items() if "qa_outputs" not in name}
    mj.save_safetensors(tmp_path / "model.safetensors", weights)
    scenario.attach(tmp_path)
    options = ["--source-weights", tmp_path / "model.safetensors", "--vocabulary", tmp_path / "vocabulary.json"]
    started = build(*LITTLE, "--methods", "vanilla", *options).source
    loaded, _ = started.init(jax.random.key(6))
    for path, leaf in mj.flatten(loaded).items():
        assert np.array_equal(leaf, mj.flatten(params)[path]) == (path != "qa_outputs/kernel"), path
    assert "not in it, so as they start: qa_outputs" in capsys.readouterr().err


def write_encoder(folder, tokens, width=24, num_layers=3, num_heads=3, **config):
    """Writes an encoder of no usual size as Hugging Face saves it."""
    encoder = mj.models.TextEncoder(tokens.vocab_size, width, num_layers, num_heads, 40, 64, separator=tokens.separator)
    params = helpers.jitted_init(encoder, 5, np.ones((1, 4), np.int32))["params"]
    mj.save_safetensors(folder / "model.safetensors", mj.models.to_huggingface(params))
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": num_heads, "hidden_act": "gelu", **config}))
    return params


@pytest.mark.slow
def test_a_file_with_its_config_tells_the_sizes_of_a_source(tmp_path):
    build(*LITTLE, "--methods", "vanilla").attach(tmp_path)
    tokens = WordPiece.from_vocabulary(tmp_path / "vocabulary.json")
    params = write_encoder(tmp_path, tokens)
    options = ["--source", "frozen", "--source-from", tmp_path, "--vocabulary", tmp_path / "vocabulary.json"]
    scenario = build(*LITTLE, "--methods", "share", *options)
    assert scenario.source.name.startswith(f"{tmp_path.name} (")
    config = parse(cross_task.PRESETS, "", "", [*LITTLE, "--methods", "share", *map(str, options)])
    read = mj.flatten(plan_source(scenario, config).read(0).params)
    for path, leaf in mj.flatten(params).items():
        np.testing.assert_array_equal(read[f"encoder/{path}"], leaf)
    rows = scenario.methods["share"].transfer.describe(
        *(jax.eval_shape(role.init, jax.random.key(0))[0] for role in (scenario.source, scenario.target))
    )
    assert {row.source.split("/attention")[0] for row in rows} == {"encoder/layer_0", "encoder/layer_2"}


def pretrained_options(folder, texts):
    """Writes an encoder without a classifier and its vocabulary, and returns options that take it as the source."""
    tokens = WordPiece.train(texts.read_text().split("\n"), 60)
    params = write_encoder(folder, tokens, width=12, num_layers=6, num_heads=6)
    tokens.save(folder / "tokenizer.json")
    data = ["--target-data", texts, "--target-text", "sentence", "--target-label", "grade", "--max-length", "8"]
    return params, ["pretrained", "--source-from", folder, *data, *LITTLE[:-4], "--labels", "20"]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("mean", ""),
        ("cls", r"warning: .* was trained with another vector of a text: --pooler first, not mean\n"),
        (
            "max",
            r"warning: .*modules\.json: .* made by max; .* one of mean, cls; the run takes --pooler mean\n",
        ),
    ],
)
def test_a_source_with_another_pooling_is_warned_of(mode, message, tmp_path, capsys):
    _, options = pretrained_options(tmp_path, write_texts(tmp_path / "data"))
    layers = [{"type": "models.Transformer", "path": ""}, {"type": "models.Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(layers))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    options += ["--methods", "vanilla"]
    plan_source(build(*options), parse(cross_task.PRESETS, "", "", [*map(str, options)]))
    assert re.fullmatch(message, capsys.readouterr().err)


@pytest.mark.slow
def test_the_head_of_a_pretrained_encoder_is_fitted_to_the_labels_of_the_target(tmp_path, capsys):
    params, options = pretrained_options(tmp_path, write_texts(tmp_path / "data"))
    options += ["--methods", "kd"]
    scenario, config = build(*options), parse(cross_task.PRESETS, "", "", [*map(str, options)])
    config.check()
    source = scenario.source
    assert capsys.readouterr().err == ""  # The vocabulary is the folder's, and no layer is as it starts.
    read = plan_source(scenario, config).read(1).params
    for path, leaf in mj.flatten(params).items():
        np.testing.assert_array_equal(mj.flatten(read)[f"encoder/{path}"], leaf)
    splits, learned = source.splits(1), scenario.target.splits(1)
    for part in ("train", "validation", "test"):  # It sees no label that the target does not.
        np.testing.assert_array_equal(getattr(splits, part)["tokens"], getattr(learned, part)["tokens"])
    assert len(splits.train["tokens"]) == 20
    assert source.evaluate(read, {}, splits.train)["accuracy"] == 1.0
    # Features of the mean: a text's words decide, and these two differ by one.
    assert source.evaluate(read, {}, splits.test)["accuracy"] > 0.9


def test_layers_of_a_pretrained_encoder_go_to_those_of_half_of_it(tmp_path):
    _, options = pretrained_options(tmp_path, write_texts(tmp_path / "data"))
    scenario = build(*options, "--methods", "share")
    source, target = (jax.eval_shape(role.init, jax.random.key(0))[0] for role in (scenario.source, scenario.target))
    rows = scenario.methods["share"].transfer.describe(source, target)
    found = {row.target: row.source for row in rows}
    assert found.keys() == mj.flatten(target).keys()  # Every leaf of the target gets something.
    for path, of in found.items():
        layer = {f"encoder/layer_{i}/": f"encoder/layer_{(0, 2, 5)[i]}/" for i in range(3)}
        prefix = next((one for one in layer if path.startswith(one)), "")
        assert of == layer.get(prefix, "") + path.removeprefix(prefix)


@pytest.mark.parametrize(("words", "message"), [
    (["--source-task", "qa", "topic", "--source-data", "target"], "source_data target is for one source"),
    (["--fit-source-head"], "fit_source_head is for a source that is read, --source frozen; this one is pretrained"),
])  # fmt: skip
def test_options_of_a_read_source_are_for_one(words, message):
    with pytest.raises(ValueError, match=message):
        parse(cross_task.PRESETS, "", "", words).check()


@pytest.mark.parametrize(("route", "message"), [
    ("encoder/layer_0/attention=encoder/layer_0/attention", "route the kernels of query, key, value and output one by"),
    ("encoder/layer_9/up/*=encoder/layer_0/up/*", "encoder/layer_9"),
])  # fmt: skip
def test_a_refit_by_routes_that_do_not_fit_is_refused_before_anything_is_compiled(route, message):
    with pytest.raises(ValueError, match=message):
        build(*LITTLE, "--methods", "refit", "--routes", route)


def test_a_head_is_fitted_to_labels_of_texts_alone(tmp_path):
    options = ["--source", "frozen", "--source-from", tmp_path, "--fit-source-head"]
    with pytest.raises(ValueError, match="a last layer is fitted to the labels of texts: qa has none to fit it to"):
        build(*LITTLE, *options)


@pytest.mark.parametrize(("options", "message"), [
    (["--max-length", "65", "--vocabulary", "own/vocabulary.json"], "max_length must be at most 64, the positions of"),
    (["--vocabulary", "other/vocabulary.json"], r"has a vocabulary of \d+ tokens, the texts are in one of \d+: --"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(tmp_path, options, message):
    for name in ("own", "other", "encoder"):
        (tmp_path / name).mkdir()
    build(*LITTLE, "--methods", "vanilla").attach(tmp_path / "own")
    build(*LITTLE, "--methods", "vanilla", "--vocabulary-size", "90").attach(tmp_path / "other")
    write_encoder(tmp_path / "encoder", WordPiece.from_vocabulary(tmp_path / "own" / "vocabulary.json"))
    options = [tmp_path / word if word.endswith(".json") else word for word in options]
    with pytest.raises(ValueError, match=message):
        build(*LITTLE, "--methods", "share", "--source", "frozen", "--source-from", tmp_path / "encoder", *options)


@pytest.mark.slow
@pytest.mark.parametrize("names", [mj.models.to_huggingface, lambda params: params], ids=["theirs", "ours"])
@pytest.mark.usefixtures("shallow")
def test_a_frozen_text_source_is_a_file_of_either_names(tmp_path, names):
    scenario = build(*LITTLE, "--methods", "vanilla")
    params, _ = scenario.source.init(jax.random.key(5))
    mj.save_safetensors(tmp_path / "model.safetensors", names(params))
    scenario.attach(tmp_path)
    options = [
        *(*LITTLE, "--methods", "share", "--source", "frozen", "--source-from", tmp_path / "model.safetensors"),
        *("--vocabulary", tmp_path / "vocabulary.json"),
    ]
    scenario, config = build(*options), parse(cross_task.PRESETS, "", "", [*map(str, options)])
    read = mj.flatten(plan_source(scenario, config).read(0).params)
    for path, leaf in mj.flatten(params).items():
        np.testing.assert_array_equal(read[path], leaf)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_an_answering_model_gives_its_attention_to_classifiers_of_two_runs(tmp_path):
    """Texts of the second would give another vocabulary; the source brings its own, and must not notice."""
    (first,), records = run("cross_task", tmp_path / "first", *LITTLE, "--methods", "share")
    assert 0 <= first["target_test"] <= 1
    begun, ended = [record for record in records if record["run"] == "share-seed0"]
    assert begun["adapter/transferred"] == 1
    assert "target/validation_accuracy" in ended
    source = [record for record in records if record["run"] == "source-seed0"]
    assert "target/validation_f1" in source[-1]
    texts = write_texts(tmp_path)
    options = [
        *(*LITTLE, "--methods", "share", "--source", "frozen", "--source-from", tmp_path / "first"),
        *("--target-data", texts, "--target-text", "sentence", "--target-label", "grade", "--labels", "20"),
    ]
    (second,), records = run("cross_task", tmp_path / "second", *options)
    assert {record["run"] for record in records} == {"share-seed0"}
    assert second["source_test"] == first["source_test"]
    kept = [(tmp_path / name / "vocabulary.json").read_text() for name in ("first", "second")]
    assert kept[0] == kept[1]
    build(*LITTLE, "--target-data", texts, *options[-6:]).attach(tmp_path)  # What would have been learned.
    assert (tmp_path / "vocabulary.json").read_text() != kept[0]
    with pytest.raises(ValueError, match=r"is not that of the source, .*: leave it out"):
        build(*options, "--vocabulary", tmp_path / "vocabulary.json")


def test_what_is_cut_is_counted_or_refused(tmp_path, capsys):
    texts = write_texts(tmp_path)
    options = [
        *LITTLE,
        "--target-data",
        texts,
        "--target-text",
        "sentence",
        "--target-label",
        "grade",
        "--labels",
        "20",
    ]
    build(*options, "--methods", "vanilla", "--validation", "8", "--max-length", "20")
    assert "texts" not in capsys.readouterr().err
    # A text has five words or more with both ends, a passage nine; in 12 places no passage is whole.
    build(*options, "--methods", "vanilla", "--validation", "8", "--max-length", "18")
    error = capsys.readouterr().err
    assert "passages were longer, and lost their end" in error
    assert "questions lost their answer: not learned from" in error
    with pytest.raises(ValueError, match="tokens, but max_length 18 leaves"):
        build(*options, "--methods", "vanilla", "--validation", "8", "--max-length", "18", "--too-long", "error")


def test_bad_options_are_refused_by_name(tmp_path):
    texts = write_texts(tmp_path)
    rare = tmp_path / "rare.tsv"
    rare.write_text(texts.read_text() + "one more\t2\n")
    own = ["--target-data", texts, "--target-text", "sentence", "--target-label", "grade"]
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n")
    for options, message in [
        (
            ["--labels", "9999"],
            r"labels, the number of labelled training examples, must lie in \[1, 180\], as synthetic_reviews keeps",
        ),
        (
            ["--validation", "5000"],
            r"validation must lie in \[1, 399\], for 400 training examples of synth",
        ),
        (["--target-model", "resnet18"], "unknown text model 'resnet18'"),
        (["--target-data", tmp_path / "none.tsv"], "none.tsv"),
        (["--target-data", "none.tsv"], "none.tsv is missing or not a file"),
        ([*own[:1], rare, *own[2:]], "each class of rare needs at least three texts; '2' has 1"),
        (["--target-data", "imdb_revews"], "imdb_reviews"),
        ([*own[:-1], "grad"], "grade"),
        ([*own[:3], "sentense", *own[4:]], "sentence"),
        (["--vocabulary", tmp_path / "vocab.txt"], r"lacks the special tokens \[SEP\]"),
        (["--vocabulary-size", "7"], "vocab_size must be at least"),
        (["--target-model", "distilbert_base", "--max-length", "513"], "max_length must be at most 512, the positions"),
        (["--routes", "encoder/layer_9/attention=encoder/layer_0/attention"], "encoder/layer_9/attention"),
    ]:
        with pytest.raises(ValueError, match=message):
            check(*LITTLE, "--methods", "share", *options)
    with pytest.raises(ValueError, match="source_task must name one or more of sentiment"):
        parse(cross_task.PRESETS, "", "", ["--source-task"]).check()
    with pytest.raises(ValueError, match="a source task appears twice"):
        parse(cross_task.PRESETS, "", "", ["--source-task", "qa", "qa"]).check()


@pytest.mark.parametrize("words", [["--source-weights"], ["--target-weights"], ["--source", "frozen", "--source-from"]])
def test_weights_of_another_model_are_told_before_texts_are_read(words, tmp_path, monkeypatch):
    sizes = {"width": 8, "num_heads": 2, "hidden": 8, "max_length": 8, "num_segments": 2, "separator": 3}
    encoder = mj.models.TextEncoder(20, num_layers=6, **sizes)
    params = helpers.jitted_init(encoder, 0, np.zeros((1, 4), np.int32))["params"]
    mj.save_safetensors(tmp_path / "model.safetensors", mj.models.to_huggingface(params))
    monkeypatch.setattr(merge_jax.study.models.tasks, "load_text", lambda *arguments: pytest.fail("texts are read"))
    options = ["--source-model", "small_bert", "--target-model", "small_bert", "--methods", "vanilla"]
    with pytest.raises(ValueError, match=r"model\.safetensors has 6 layers, the model has 4$"):
        build(*options, *words, tmp_path / "model.safetensors", "--vocabulary", tmp_path / "unread")


@pytest.mark.slow
def test_weights_and_vocabulary_that_do_not_fit_are_refused(tmp_path):
    params, _ = build(*LITTLE, "--methods", "vanilla").source.init(jax.random.key(5))
    mj.save_safetensors(tmp_path / "model.safetensors", mj.models.to_huggingface(params))
    build(*LITTLE, "--vocabulary-size", "300").attach(tmp_path)
    vocabulary = ["--vocabulary", tmp_path / "vocabulary.json"]
    with pytest.raises(ValueError, match=r"has a vocabulary of [0-9]+ tokens, the model has one of 300: --vocabulary"):
        build(*LITTLE, "--source-weights", tmp_path / "model.safetensors", *vocabulary)
    with pytest.raises(ValueError, match="the weights cannot be read: there is no file or folder"):
        build(*LITTLE, "--target-weights", tmp_path / "none.safetensors", *vocabulary)
    with pytest.raises(ValueError, match=r"model.safetensors need the vocabulary they were trained with"):
        build(*LITTLE, "--source-weights", tmp_path / "model.safetensors")
