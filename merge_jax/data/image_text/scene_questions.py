"""Sort-of-CLEVR: questions about six shapes, individually or in relation to each other."""

from functools import partial

import numpy as np

from merge_jax.data.image_text.image_text_set import VisualQuestions, VisualQuestionSet
from merge_jax.data.image_text.scenes import CELLS, COLOURS, KINDS, Scene, Scenes, arrange, draw_scenes

__all__ = ["sort_of_clevr"]

_RADIUS = 5
_MIDDLE = CELLS // 2
_NUMBERS = ("one", "two", "three", "four", "five", "six")
_SORTS = 3


def sort_of_clevr(
    num_train: int,
    num_test: int,
    seed: int,
    *,
    image_size: int = 75,
    num_shapes: int = 6,
    relational: int = 10,
    non_relational: int = 10,
) -> VisualQuestionSet:
    """Returns questions about images of shapes, `num_train` and `num_test` images of `image_size` pixels a side.

    Each image has a square or a circle, equally likely, in each of the colours red, green, blue, orange, grey and
    yellow, or in `num_shapes` of them, separated by white. `non_relational` questions ask for an object's shape, and
    whether it is left or right, or at the top or bottom. `relational` ones ask for the shape of the object nearest to
    or farthest from it, or how many objects share its shape, including itself. There are three sorts of each per
    colour, drawn without repetition, so at most 18 of a kind. All answers are one word. Without the image, guessing is
    right for at most 5/16 of the counts and 1/2 of the others (with six shapes; counts of fewer shapes are easier to
    guess). No image repeats, in train and test together.

    Source: Santoro et al., arXiv:1706.01427, section 3.2 and appendix, with 9,800 and 200 images and 10 questions of
    each kind; sizes, positions and colours follow kimhc6028/relational-networks. Our choices: there may be fewer
    shapes, which a small model learns sooner; questions are English instead of bits, and positions are named instead of
    yes or no; squares cannot overlap; edges are smooth; no question repeats on an image; and an image is redrawn if an
    answer would be a tie, as with two objects equally near, or one in the middle.

    Raises:
      ValueError: a number of images is below 1, the image size is below 16, the number of shapes is not in [2, 6], a
        number of questions is not in [0, 3 num_shapes], or both are 0.
    """
    if not isinstance(num_shapes, int) or isinstance(num_shapes, bool) or not 2 <= num_shapes <= len(COLOURS):
        raise ValueError(f"num_shapes must be a whole number in [2, {len(COLOURS)}], got {num_shapes!r}")
    most = _SORTS * num_shapes
    counts = {"relational": relational, "non_relational": non_relational}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= most:
            raise ValueError(f"{name} must be a whole number in [0, {most}], got {count!r}")
    if not any(counts.values()):
        raise ValueError("relational and non_relational are both 0; there is nothing to ask")
    rng = np.random.default_rng(seed)
    train, test = draw_scenes(rng, [partial(_scene, num_shapes)], num_train, num_test, image_size)
    return VisualQuestionSet("sort_of_clevr", _ask(rng, train, counts), _ask(rng, test, counts))


def _scene(num_shapes: int, rng: np.random.Generator) -> Scene:
    colours = [tuple(COLOURS)[i] for i in np.sort(rng.permutation(len(COLOURS))[:num_shapes])]
    kinds = rng.integers(2, size=num_shapes)
    looks = [(colour, KINDS[kind], _RADIUS) for colour, kind in zip(colours, kinds, strict=True)]
    while True:
        scene = arrange(rng, looks)
        if _decided(scene):
            return scene


def _decided(scene: Scene) -> bool:
    """Returns whether each object is on one side of the middle, with a unique nearest and farthest object."""
    # The first of each row is 0, the distance to itself.
    distances = np.sort(_squared_distances(scene), axis=1)
    # With two objects, each has only one neighbour: the first comparison is empty.
    ties = (distances[:, 1:2] == distances[:, 2:3]).any() or (distances[:, -2] == distances[:, -1]).any()
    return not ties and all(_MIDDLE not in (shape.x, shape.y) for shape in scene)


def _squared_distances(scene: Scene) -> np.ndarray:
    places = np.array([(shape.x, shape.y) for shape in scene])
    return ((places[:, None] - places[None]) ** 2).sum(axis=-1)


def _ask(rng: np.random.Generator, scenes: Scenes, counts: dict[str, int]) -> VisualQuestions:
    image: list[int] = []
    asked: list[tuple[str, str]] = []
    kinds: list[str] = []
    for number, scene in enumerate(scenes.scenes):
        for kind, questions in (("relational", _relational(scene)), ("non_relational", _non_relational(scene))):
            asked += [questions[i] for i in rng.permutation(len(questions))[: counts[kind]]]
            image += [number] * counts[kind]
            kinds += [kind] * counts[kind]
    return VisualQuestions(
        scenes.images,
        np.array(image, np.int32),
        tuple(question for question, _ in asked),
        tuple((answer,) for _, answer in asked),
        tuple(kinds),
    )


def _non_relational(scene: Scene) -> list[tuple[str, str]]:
    """Returns all questions on single objects, with their answers."""
    questions: list[tuple[str, str]] = []
    for colour, kind, _, x, y in scene:
        questions += [
            (f"what is the shape of the {colour} object?", kind),
            (f"is the {colour} object on the left or on the right?", "left" if x < _MIDDLE else "right"),
            (f"is the {colour} object at the top or at the bottom?", "top" if y < _MIDDLE else "bottom"),
        ]
    return questions


def _relational(scene: Scene) -> list[tuple[str, str]]:
    """Returns all questions on objects among others, with their answers."""
    distances = _squared_distances(scene)
    farthest = distances.argmax(axis=1)
    nearest = (distances + np.diag([2 * CELLS**2] * len(scene))).argmin(axis=1)
    kinds = [shape.kind for shape in scene]
    questions: list[tuple[str, str]] = []
    for number, (colour, kind, *_) in enumerate(scene):
        questions += [
            (f"what is the shape of the object nearest to the {colour} object?", kinds[nearest[number]]),
            (f"what is the shape of the object farthest from the {colour} object?", kinds[farthest[number]]),
            (f"how many objects have the shape of the {colour} object?", _NUMBERS[kinds.count(kind) - 1]),
        ]
    return questions
