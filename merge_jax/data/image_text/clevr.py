"""CLEVR, questions about rendered scenes, from its folder or as in TFDS, without TensorFlow."""

import contextlib
import functools
import io
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from merge_jax.checks import check_at_least_one
from merge_jax.data.image_text.image_text_set import VisualQuestions, VisualQuestionSet
from merge_jax.data.image_text.json_files import columns, entry, files_in, parse_json, read_json
from merge_jax.data.image_text.vqa_files import AskedOfFiles
from merge_jax.data.images.image_files import BAR, check_inside, check_unreadable, open_image, read_image, read_rows
from merge_jax.data.tfds import check_unpacked, fetch, one_line, open_split, quiet_tfds, root_folder
from merge_jax.paths import near_misses

__all__ = ["load_clevr"]

_URL = "https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip"
_FOLDER = "CLEVR_v1.0"
_QUESTIONS = "questions/CLEVR_{}_questions.json"
_SCENES = "scenes/CLEVR_{}_scenes.json"
_IMAGES = "images/{}"
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_ATTRIBUTES = ("color", "material", "shape", "size")
_OBJECT = {**dict.fromkeys(_ATTRIBUTES, str), "rotation": float, "3d_coords": list, "pixel_coords": list}
# Maximum unpacked bytes of an archive member: questions take 0.7 GB, images 0.2 MB.
_LARGEST_JSON, _LARGEST_IMAGE = 2**31, 2**26
# By the last function of a question's program; other functions keep their names.
_KINDS = {
    **dict.fromkeys(("equal_integer", "less_than", "greater_than"), "compare integer"),
    **dict.fromkeys((f"query_{attribute}" for attribute in _ATTRIBUTES), "query attribute"),
    **dict.fromkeys((f"equal_{attribute}" for attribute in _ATTRIBUTES), "compare attribute"),
}


def load_clevr(data_dir: Path | str | None = None, *, image_size: int, unreadable: str = "error") -> VisualQuestionSet:
    """Returns CLEVR v1.0 (Johnson et al. 2017); its validation split is the test set, since test answers are hidden.

    If `data_dir` is the folder `CLEVR_v1.0` of the archive, or holds it, reads that folder. Question kinds are then
    those of the paper's scores: "exist", "count", "compare integer", "query attribute" or "compare attribute".

    Otherwise, reads the TFDS set `clevr`, prepared in `data_dir` at the first call: the archive, `CLEVR_v1.0.zip` of 18
    GB, is read from `<data_dir>/downloads/manual/` if it is there, and downloaded otherwise. Your own archive may hold
    fewer images. Official TFDS reads the prepared set. An existing set is used without comparing it to the archive,
    which would take minutes (our choice). TFDS stores no kinds, and stores questions with the images, so each call
    reads the whole set once; from a folder, only questions and headers are read.

    Images are read on access. Each question has one answer.

    Args:
      data_dir: the folder of all TFDS sets, by default TFDS's own, `~/tensorflow_datasets`; or of `CLEVR_v1.0`.
      image_size: S; the central square of every image is scaled to S x S pixels (bilinear).
      unreadable: "error" stops at a missing or unreadable image of the folder. "skip" reads every image once, and drops
        unreadable ones with their questions. TFDS images are checked by header and checksum when prepared.

    Raises:
      ValueError: a file is missing, broken or has another layout, or cannot be downloaded; a question has no answer, or
        its image is missing; an image is unreadable.
    """
    check_at_least_one(image_size=image_size)
    check_unreadable(unreadable)
    root = root_folder(data_dir)
    for folder in (root, root / _FOLDER):
        if (folder / "questions").is_dir():
            return _from_folder(folder, image_size, unreadable)
    with quiet_tfds():
        builder = _builder_class()(data_dir=str(root))
        builder.download_and_prepare(file_format="array_record")
    train, test = (_from_records(builder, split, image_size) for split in ("train", "validation"))
    return VisualQuestionSet("clevr", train, test)


def _from_folder(folder: Path, image_size: int, unreadable: str) -> VisualQuestionSet:
    splits = ("train", "val")
    root, files = files_in(folder, [_QUESTIONS.format(split) for split in splits])
    folders = [root / _IMAGES.format(split) for split in splits]
    for images in folders:
        check_inside(root, images)
    # All questions before the first image, since they are fast to read and most likely wrong.
    read = [_questions(file) for file in files]
    train, test = (part.on_images(images, image_size, unreadable) for images, part in zip(folders, read, strict=True))
    return VisualQuestionSet("clevr", train, test)


def _questions(file: Path) -> AskedOfFiles:
    content = read_json(file, _function_alone)
    asked = _asked(content, file, True)
    kinds = [_kind(question.get("program")) for question in content["questions"]]
    known = [kind for kind in kinds if kind is not None]
    answers = [(answer,) for answer in asked["answer"]]
    all_known = known if len(known) == len(kinds) else None
    return AskedOfFiles(asked["image_filename"], asked["question"], answers, all_known)


def _asked(content: Any, name: object, answered: bool) -> dict[str, list[Any]]:
    keys = ("image_filename", "question", *(("answer",) if answered else ()))
    asked = columns(content, "questions", dict.fromkeys(keys, str), name)
    for key in keys:
        for position, text in enumerate(asked[key]):
            if not text.strip():
                raise ValueError(f"{name}, questions {position}: the entry {key!r} is empty")
    if answered:
        asked["answer"] = [sys.intern(answer) for answer in asked["answer"]]
    return asked


def _function_alone(entries: dict[str, Any]) -> Any:
    """Replaces a program's function object by its name: programs fill most of the 0.7 GB."""
    function = entries.get("function")
    return sys.intern(function) if isinstance(function, str) and "question" not in entries else entries


def _kind(program: Any) -> str | None:
    last = program[-1] if isinstance(program, list) and program else None
    return _KINDS.get(last, last) if isinstance(last, str) else None


@dataclass(frozen=True)
class _RecordImages:
    """A `Table` of the images in the records of TFDS."""

    source: Any
    name: str
    image_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.source), self.image_size, self.image_size, 3)

    @property
    def dtype(self) -> Any:
        return np.dtype(np.uint8)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return read_rows(self.shape, rows, self._read)

    def _read(self, row: int) -> np.ndarray:
        example = self.source[row]
        name = f"{example['file_name'].decode()} of {self.name}"
        return read_image(io.BytesIO(example["image"]), "RGB", self.image_size, name)


def _from_records(builder: Any, split: str, image_size: int) -> VisualQuestions:
    import tensorflow_datasets as tfds

    source = open_split(builder, split, decoders={"image": tfds.decode.SkipDecoding()})
    image: list[int] = []
    questions: list[str] = []
    answers: list[tuple[str]] = []
    for row in tqdm(range(len(source)), desc=f"reading the questions of clevr {split}", **BAR):
        asked = source[row]["question_answer"]
        questions.extend(question.decode() for question in asked["question"])
        answers.extend((sys.intern(answer.decode()),) for answer in asked["answer"])
        image.extend([row] * len(asked["question"]))
    table = _RecordImages(source, f"clevr {split}", image_size)
    return VisualQuestions(table, np.array(image, np.int32), questions, answers)


@functools.cache
def _builder_class() -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    official: Any = tfds.builder_cls("clevr")

    # Keeps the official name, so that TFDS finds the set; TFDS refuses to register a second builder of that name.
    with registered.skip_registration():

        class FromArchive(official):
            """The official builder without its uses of TensorFlow: unpacking the archive and listing folders."""

            name = official.name
            # TFDS looks for checksums beside a class's code, and accepts any file without them.
            url_infos = official.url_infos
            sources = (_URL,)

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
                [archive] = fetch(self, dl_manager)
                with _opened(archive) as file:
                    members = file.namelist()
                splits = [split for split in _SPLITS if _member(_QUESTIONS, split) in members]
                if not {"train", "val"} <= set(splits):
                    expected = [_member(_QUESTIONS, split) for split in ("train", "val")]
                    raise ValueError(f"the archive {archive} needs {expected}, found {members[:20]}")
                return {_SPLITS[split]: self._generate_examples(archive, split) for split in splits}

            def _generate_examples(self, archive: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
                with _opened(archive) as file:
                    yield from _examples(archive, file, split)

    return FromArchive


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"the archive {archive} is truncated or broken ({one_line(error)}); replace it with a whole one"
        ) from error


def _unpacked(archive: Path, file: zipfile.ZipFile, member: str, limit: int) -> bytes:
    check_unpacked(archive, member, file.getinfo(member).file_size, limit)
    return file.read(member)


def _member(path: str, split: str) -> str:
    return f"{_FOLDER}/{path.format(split)}"


def _examples(archive: Path, file: zipfile.ZipFile, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the official builder's examples of a split, by image name."""
    folder = _member(_IMAGES, split) + "/"
    members = set(file.namelist())
    images = sorted(name.removeprefix(folder) for name in members if name.startswith(folder) and name != folder)
    questions: dict[str, list[dict[str, str]]] = {image: [] for image in images}
    name = f"{archive}: {_member(_QUESTIONS, split)}"
    annotations = _unpacked(archive, file, _member(_QUESTIONS, split), _LARGEST_JSON)
    asked = _asked(parse_json(annotations, name, _function_alone), name, split != "test")
    # Test answers are hidden; TFDS stores empty ones.
    answers = asked.get("answer", [""] * len(asked["question"]))
    for image, question, answer in zip(asked["image_filename"], asked["question"], answers, strict=True):
        if image not in questions:
            raise ValueError(f"{name}: the image {image!r} of a question is missing; {near_misses(image, images)}")
        questions[image].append({"question": question, "answer": answer})
    objects = _objects(archive, file, split) if _member(_SCENES, split) in members else {}
    for image in images:
        content = _unpacked(archive, file, folder + image, _LARGEST_IMAGE)
        open_image(io.BytesIO(content), f"{archive}: {folder}{image}").close()
        yield (
            image,
            {
                "image": content,
                "file_name": image,
                "question_answer": questions[image],
                "objects": objects.get(image, []),
            },
        )


def _objects(archive: Path, file: zipfile.ZipFile, split: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the objects of each image, as from the official builder."""
    name = f"{archive}: {_member(_SCENES, split)}"
    annotations = _unpacked(archive, file, _member(_SCENES, split), _LARGEST_JSON)
    content = parse_json(annotations, name, _without_relations)
    scenes = columns(content, "scenes", {"image_filename": str, "objects": list}, name)
    for position, objects in enumerate(scenes["objects"]):
        for number, found in enumerate(objects):
            for key, kind in _OBJECT.items():
                entry(found, key, kind, name, ("scenes", position), ("objects", number))
    return {
        image: [{key: found[key] for key in _OBJECT} for found in objects]
        for image, objects in zip(scenes["image_filename"], scenes["objects"], strict=True)
    }


def _without_relations(entries: dict[str, Any]) -> dict[str, Any]:
    """Drops large entries of a scene that no record contains."""
    entries.pop("relationships", None)
    return entries
