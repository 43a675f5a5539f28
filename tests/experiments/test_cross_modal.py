"""The experiment across modalities, and the data that it takes."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import merge_jax as mj
from experiments import cross_modal
from merge_jax.data import Streamed, channel_statistics, take
from merge_jax.study.cli import parse
from tests.smoke import run

LITTLE = [
    *("--seeds", "1", "--steps", "4", "--source-steps", "4", "--report-every", "2", "--checkpoint-every", "2"),
    # Where every step transfers, the target's step is compiled once.
    *("--validation", "20", "--batch-size", "8", "--cycle", "1", "--stop", "1.0", "--num-heads", "2"),
    *("--image-size", "16"),
    *("--target-model.layers", "1", "--target-model.fusion-layers", "1", "--source-model.layers", "1"),
]
FEW = ["--labels", "30"]
VQA, RETRIEVAL = [*LITTLE, *FEW], [*LITTLE, *FEW, "--target-task", "retrieval"]


def build(*options):
    return cross_modal.build(parse(cross_modal.PRESETS, "", "", list(map(str, options))))


def routes_of(scenario):
    roles = {"source": scenario.source or scenario.target, "target": scenario.target}
    params = {role: jax.eval_shape(model.init, jax.random.key(0))[0] for role, model in roles.items()}
    return {
        (row.target.split("/query")[0], row.source.split("/query")[0])
        for row in scenario.methods["share"].transfer.describe(params["source"], params["target"])
    }


def write_vqa(folder, images=14, answers=("red", "blue")):
    """Writes the files of VQA v2.0 with a question on each of a few images."""
    for number, name in enumerate(("train2014", "val2014")):
        (folder / name).mkdir(parents=True)
        questions, annotations = [], []
        for i in range(1, images + 1):
            colour = answers[i % len(answers)]
            file = folder / name / f"COCO_{name}_{i:012d}.jpg"
            Image.new("RGB", (20, 24), {"red": (255, 0, 0), "blue": (0, 0, 255)}.get(colour, (0, 255, 0))).save(file)
            key = {"question_id": 100 * number + i, "image_id": i}
            questions.append({**key, "question": "what colour is it?"})
            given = [{"answer": colour, "answer_confidence": "yes", "answer_id": a} for a in range(1, 11)]
            annotations.append(
                {
                    **key,
                    **{"question_type": "what colour", "answer_type": "other", "multiple_choice_answer": colour},
                    "answers": given,
                }
            )
        common = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": name}
        path = folder / f"v2_OpenEnded_mscoco_{name}_questions.json"
        path.write_text(json.dumps({**common, "task_type": "Open-Ended", "questions": questions}))
        path = folder / f"v2_mscoco_{name}_annotations.json"
        path.write_text(json.dumps({**common, "annotations": annotations}))
    return folder


def write_coco(folder, images=14):
    """Writes the files of MSCOCO 2017 with two captions of each of a few images."""
    (folder / "annotations").mkdir(parents=True)
    for name in ("train2017", "val2017"):
        (folder / name).mkdir()
        listed, annotations = [], []
        for i in range(1, images + 1):
            Image.new("RGB", (20, 24), (8 * i, 0, 0)).save(folder / name / f"{i:012d}.jpg")
            listed.append({"id": i, "file_name": f"{i:012d}.jpg"})
            annotations += [{"image_id": i, "id": 10 * i + j, "caption": f"picture {i} told {j}"} for j in range(2)]
        path = folder / "annotations" / f"captions_{name}.json"
        path.write_text(json.dumps({"info": {}, "licenses": [], "images": listed, "annotations": annotations}))
    return folder


@pytest.mark.slow
def test_a_vision_model_gives_its_attention_to_the_words_of_a_question(tmp_path):
    words = [*VQA, "--methods", "mergenet_warm", "--first-seed", "2"]
    (result,), records = run("cross_modal", tmp_path / "run", *words)
    of_target = result["test_metrics"]["target"]
    assert result["target_test"] == of_target["accuracy"]
    assert {"loss", "accuracy_relational", "accuracy_non_relational"} < set(of_target)
    assert len(result["answers"]["target"]) == 6
    first, last = [record for record in records if record["run"] == "mergenet_warm-seed2"]
    assert first["adapter/change"] > 0
    assert "target/validation_accuracy" in last
    assert records[-1]["adapter/gate/text_encoder/layer_0/attention/query/kernel"] != 0
    assert (tmp_path / "run" / "samples.png").stat().st_size > 0
    assert (tmp_path / "run" / "gates.png").stat().st_size > 0
    assert (tmp_path / "run" / "vocabulary.json").exists()
    assert (
        f"merge-jax export {tmp_path / 'run/checkpoints/mergenet_warm-seed2'} "
        in (tmp_path / "run" / "report.html").read_text()
    )
    assert "accuracy non relational" in (tmp_path / "run" / "table.txt").read_text()


@pytest.mark.slow
def test_a_text_model_gives_to_the_vision_of_retrieval(tmp_path):
    options = ["text_to_vision", *RETRIEVAL, "--methods", "mergenet_warm", "--source-task", "sentiment"]
    options += ["--source", "live"]
    (result,), records = run("cross_modal", tmp_path / "run", *options)
    scores = result["test_metrics"]["target"]
    recalls = [f"{way}_recall_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert result["target_test"] == pytest.approx(np.mean([scores[name] for name in recalls]))
    assert records[-1]["adapter/gate/image_encoder/layer_0/attention/query/kernel"] != 0
    assert all("triangle" in text or "square" in text or "circle" in text for text in result["answers"]["target"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "receiving", "giving"),
    [
        ([], "text_encoder", "encoder"),
        (["text_to_vision"], "image_encoder", "encoder"),
        (["within"], "text_encoder", "image_encoder"),
        (["within", "--direction", "text_to_vision"], "image_encoder", "text_encoder"),
        (["--source-task", "retrieval"], "text_encoder", "image_encoder"),
        (["--target-task", "sentiment"], "encoder", "encoder"),
        (["--target-task", "shapes", "--source-task", "qa", "--direction", "text_to_vision"], "encoder", "encoder"),
    ],
)
def test_blocks_of_one_modality_meet_those_of_the_other(options, receiving, giving):
    preset = [option for option in options[:1] if not option.startswith("-")]
    scenario = build(*preset, *LITTLE, *options[len(preset) :], "--labels", "40", "--methods", "share")
    assert routes_of(scenario) == {(f"{receiving}/layer_0/attention", f"{giving}/layer_0/attention")}


@pytest.mark.parametrize("options", [VQA, pytest.param(RETRIEVAL, marks=pytest.mark.slow)], ids=["vqa", "retrieval"])
def test_images_of_a_split_are_in_no_other(options):
    role = build(*options, "--methods", "vanilla").target
    one, other = role.splits(0), role.splits(1)
    rows = [{int(row) for row in part["image"].rows} for part in (one.train, one.validation)]
    assert (len(rows[0]), len(rows[1])) == (30, 20)
    assert not rows[0] & rows[1]
    assert {int(row) for row in other.train["image"].rows} != rows[0]
    np.testing.assert_array_equal(one.test["tokens"], other.test["tokens"])
    assert isinstance(one.train["image"], Streamed)


@pytest.mark.slow
def test_vqa_is_read_from_its_official_files_and_a_model_gives_to_itself(tmp_path):
    data = write_vqa(tmp_path / "vqa")
    options = ["--target-data", data, "--validation", "3", "--labels", "None", "--methods", "mergenet_warm"]
    (result,), _ = run("cross_modal", tmp_path / "run", "within", *LITTLE, *options)
    assert set(result["answers"]["target"]) <= {"red", "blue"}
    assert "accuracy_other" in result["test_metrics"]["target"]
    assert result["source_test"] is None
    assert result["adapter_parameters"] > 0
    assert (tmp_path / "run" / "samples.png").exists()


@pytest.mark.slow
def test_mscoco_is_read_from_its_official_files(tmp_path):
    data = write_coco(tmp_path / "coco")
    options = ["--target-data", data, "--validation", "11", "--labels", "None", "--methods", "vanilla"]
    options += ["--batch-size", "4"]
    (result,), _ = run("cross_modal", tmp_path / "run", "within", *LITTLE, "--target-task", "retrieval", *options)
    assert all(text.startswith("picture") for text in result["answers"]["target"])


@pytest.mark.slow
def test_a_text_encoder_starts_from_weights_of_hugging_face(tmp_path):
    scenario = build(*VQA, "--methods", "vanilla")
    params, _ = scenario.target.init(jax.random.key(5))
    mj.save_safetensors(tmp_path / "model.safetensors", mj.models.to_huggingface(params["text_encoder"]))
    assert scenario.attach is not None
    scenario.attach(tmp_path)
    options = ["--target-text-weights", tmp_path / "model.safetensors", "--vocabulary", tmp_path / "vocabulary.json"]
    loaded, _ = build(*VQA, "--methods", "vanilla", *options).target.init(jax.random.key(6))
    for path, leaf in mj.flatten(loaded).items():
        given = np.array_equal(leaf, mj.flatten(params)[path])
        assert given or not path.startswith("text_encoder/"), path
    assert not np.array_equal(loaded["answer"]["kernel"], params["answer"]["kernel"])


@pytest.mark.slow
def test_a_vision_transformer_starts_from_weights_of_hugging_face(tmp_path):
    options = [*RETRIEVAL, "--methods", "vanilla"]
    scenario = build(*options)
    params, _ = scenario.target.init(jax.random.key(5))
    mj.save_safetensors(tmp_path / "model.safetensors", mj.models.to_huggingface(params["image_encoder"]))
    learned_with = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(learned_with))
    started = build(*options, "--target-vision-weights", tmp_path)
    loaded, _ = started.target.init(jax.random.key(6))
    for path, leaf in mj.flatten(loaded).items():
        given = np.array_equal(leaf, mj.flatten(params)[path])
        assert given or not path.startswith("image_encoder/"), path
    assert not np.array_equal(loaded["image_projection"]["kernel"], params["image_projection"]["kernel"])
    # Pixels are scaled as when the weights learned, and not by the statistics of this data.
    batch = take(started.target.splits(0).train, np.arange(4))
    mean, std = map(np.array, channel_statistics(batch["image"].table[np.arange(1000)]))
    pixels = np.asarray(batch["image"][:], np.float32)
    learned_pixels = (pixels / 255 - learned_with["image_mean"]) / learned_with["image_std"]
    same_pixels = np.asarray(255 * (learned_pixels * std + mean), np.float32)

    def loss(of, image):
        return float(of.methods["vanilla"].task.loss_fn(loaded, {}, {**batch, "image": image}, jax.random.key(0))[0])

    assert loss(started, pixels) == pytest.approx(loss(scenario, same_pixels), rel=1e-5)
    assert loss(started, pixels) != pytest.approx(loss(scenario, pixels), rel=1e-3)


def test_answers_that_are_not_covered_are_refused_or_left_out(tmp_path, capsys):
    data = write_vqa(tmp_path / "vqa", answers=("red", "blue", "red"))
    options = ["within", *LITTLE, "--target-data", data, "--validation", "3", "--methods", "vanilla"]
    options += ["--batch-size", "4"]
    build(*options)
    with pytest.raises(
        ValueError,
        match=r"the vocabulary of 1 answers covers none of the answers of 5 of 14 questions; the commonest missing are "
        r"'blue': take more by --num-answers, or --uncovered skip",
    ):
        build(*options, "--num-answers", "1")
    role = build(*options, "--num-answers", "1", "--uncovered", "skip").target
    assert "5 of 14 questions; the commonest missing are 'blue': not learned from" in capsys.readouterr().err
    splits = role.splits(0)
    assert len(splits.train["tokens"]) + len(splits.validation["tokens"]) == 9
    assert len(splits.test["tokens"]) == 14


def test_images_that_cannot_be_read_are_refused_or_left_out(tmp_path, capsys):
    data = write_vqa(tmp_path / "vqa")
    broken = data / "train2014" / "COCO_train2014_000000000003.jpg"
    broken.write_text("no image")
    options = ["within", *LITTLE, "--target-data", data, "--validation", "3", "--methods", "vanilla"]
    with pytest.raises(ValueError, match=r"COCO_train2014_000000000003\.jpg"):
        build(*options)
    role = build(*options, "--unreadable", "skip").target
    assert "COCO_train2014_000000000003.jpg" in capsys.readouterr().err
    assert len(role.splits(0).train["tokens"]) == 10
    (data / "train2014" / "COCO_train2014_000000000004.jpg").unlink()
    with pytest.raises(ValueError, match=r"COCO_train2014_00000000000[34]\.jpg"):
        build(*options)


def test_captions_that_are_too_long_are_counted_or_refused(capsys):
    options = [*RETRIEVAL, "--methods", "vanilla", "--max-length", "8"]
    build(*options)
    assert "scene_captions: " in (error := capsys.readouterr().err)
    assert "texts were longer, and lost their end" in error
    with pytest.raises(ValueError, match=r"text 0 has \d+ tokens, but max_length 8 leaves 6"):
        build(*options, "--too-long", "error")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--target-data", "vqa"],
            r"unknown data 'vqa' of vqa; .*synthetic.*, or give a folder of VQA v2.0 such as ./vqa",
        ),
        (["--target-data", "./none"], "none"),
        (
            ["--labels", "9999"],
            r"labels, the number of training images, must lie in \[1, 3980\], what sort_of_clevr",
        ),
        (
            ["--source-task", "itself", "--validation", "4000"],
            r"--validation must lie in \[1, 3999\], for 4000 training images of sort_of_clevr",
        ),
        (["--image-size", "None"], "vqa needs --image-size, which its images are scaled to"),
        (["--target-model.patch-size", "5"], "patches of 5 do not fill images of 16x16"),
        (["--target-model.vision", "vit_base"], "vit_base has fixed sizes"),
        (["--target-model.text", "bert_base"], "bert_base has fixed sizes: leave out num_layers, or take a small"),
        (
            ["--target-task", "retrieval", "--validation", "9"],
            r"--validation: scene_captions has, held out of its training images, 9 images and 9 captions; recall among "
            "the first 10 needs as many of each",
        ),
        (["--num-shapes", "7"], r"num_shapes must be a whole number in \[2, 6\], got 7"),
        (["--source-task", "sentiment"], r"routes by depth need a source with attention to vision; small_bert .* text"),
        (["--target-task", "shapes"], r"routes by depth need a target with attention to text; tiny_vit .* vision"),
        (["--routes", "text_encoder/layer_9/attention=encoder/layer_0/attention"], "text_encoder/layer_9/attention"),
        (
            ["--source-text-weights", "w.safetensors"],
            r"w.safetensors are of a text encoder, which small_vit \(shapes\)",
        ),
        (
            ["--source-vision-weights", "w"],
            r"weights w are for the vision transformer of .*, which small_vit \(shapes\)",
        ),
        (["--target-vision-weights", "none.safetensors"], "the weights cannot be read: .*none.safetensors"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    def check():
        scenario = build(*VQA, "--methods", "share", *options)
        roles = [role for role in (scenario.source, scenario.target) if role is not None]
        params = [jax.eval_shape(role.init, jax.random.key(0))[0] for role in roles]
        scenario.methods["share"].transfer.init(jax.random.key(0), *params)

    with pytest.raises(ValueError, match=message):
        check()


def test_a_target_that_is_its_own_source_has_no_other():
    with pytest.raises(ValueError, match="a target that is its own source has none that is live: leave out --source"):
        parse(cross_modal.PRESETS, "", "", ["within", "--source", "live"]).check()
    with pytest.raises(ValueError, match="its own source starts from its own weights: use --target-text-weights"):
        parse(cross_modal.PRESETS, "", "", ["within", "--source-text-weights", "bert"]).check()
