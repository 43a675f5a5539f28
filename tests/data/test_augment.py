import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from merge_jax.data import crop_flip_rotate

KEY = jax.random.key(3)
# One program for a shape, where without jit each operation is one.
changed_by = jax.jit(crop_flip_rotate, static_argnames=("padding", "flip", "degrees"))


def noise(batch=32, height=24, width=31, channels=3, dtype=np.uint8):
    """Images without black pixels whose neighbours differ, so that a shift by one pixel shows everywhere."""
    return np.random.default_rng(0).integers(1, 256, (batch, height, width, channels)).astype(dtype)


def draws(key, batch, padding, degrees):
    """Returns what the function draws from `key`: top, left, mirrored, angle in degrees, each [batch]."""
    crop_key, flip_key, angle_key = jax.random.split(key, 3)
    top, left = jax.random.randint(crop_key, (2, batch), -padding, padding + 1)
    mirrored = jax.random.bernoulli(flip_key, 0.5, (batch,))
    angle = jax.random.uniform(angle_key, (batch,), minval=-degrees, maxval=degrees)
    return [np.asarray(drawn) for drawn in (top, left, mirrored, angle)]


def one_by_one(images, padding, top, left, mirrored, angle):
    """Returns the images padded, cropped and mirrored with NumPy, and rotated with Pillow."""
    height, width = images.shape[1:3]
    changed = []
    for i, image in enumerate(images):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        rows, columns = padding + top[i], padding + left[i]
        cropped = padded[rows : rows + height, columns : columns + width]
        changed.append(rotated(cropped[:, ::-1] if mirrored[i] else cropped, float(angle[i])))
    return np.stack(changed)


def rotated(image, angle):
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(image, -1, 0)]
    return np.stack([channel.rotate(angle, Image.Resampling.NEAREST) for channel in channels], axis=-1)


def share_of_pixels_that_differ(a, b):
    return (np.asarray(a) != np.asarray(b)).any(axis=-1).mean()


@pytest.mark.parametrize("size", [(24, 31), pytest.param((32, 32), marks=pytest.mark.slow), (7, 7)])
@pytest.mark.parametrize(("padding", "degrees"), [(4, 15.0), (0, 180.0), (9, 60.0)])
def test_images_are_cropped_mirrored_and_rotated_as_numpy_and_pillow_do(size, padding, degrees):
    images = noise(64, *size)
    changed = changed_by(KEY, images, padding=padding, degrees=degrees)
    expected = one_by_one(images, padding, *draws(KEY, len(images), padding, degrees))
    # A place on the border of two pixels falls to either by the last bit: ours are of float32, Pillow's of fixed point.
    # That is one pixel in some thousands; any other shift would change nearly every pixel of noise.
    assert share_of_pixels_that_differ(changed, expected) < 0.01


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_without_a_rotation_no_pixel_differs(dtype):
    images = noise(dtype=dtype)
    changed = changed_by(KEY, images, padding=5, degrees=0)
    np.testing.assert_array_equal(changed, one_by_one(images, 5, *draws(KEY, len(images), 5, 0.0)))


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_without_any_change_the_images_come_back(size):
    images = noise(8, *size)
    np.testing.assert_array_equal(changed_by(KEY, images, padding=0, flip=False, degrees=0), images)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_the_dtype_is_kept(dtype):
    images = jnp.asarray(noise(), dtype)
    assert changed_by(KEY, images).dtype == dtype


def test_a_compiled_change_is_the_same():
    images = noise()
    without_rotation = functools.partial(crop_flip_rotate, degrees=0)
    np.testing.assert_array_equal(jax.jit(without_rotation)(KEY, images), without_rotation(KEY, images))
    # The compiler may round sines otherwise, which shows on borders of pixels alone.
    assert share_of_pixels_that_differ(jax.jit(crop_flip_rotate)(KEY, images), crop_flip_rotate(KEY, images)) < 0.01


def test_a_key_gives_the_same_images_again_and_another_key_others():
    images = noise()
    first, again = (changed_by(KEY, images) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = changed_by(jax.random.key(4), images)
    assert share_of_pixels_that_differ(first, other) > 0.9


def test_the_images_of_a_batch_are_changed_each_in_its_own_way():
    image = noise(1)
    changed = np.asarray(changed_by(KEY, np.repeat(image, 32, axis=0)))
    assert len({one.tobytes() for one in changed}) == 32


def test_half_of_the_images_are_mirrored():
    images = noise(2000, 2, 3, 1)
    changed = np.asarray(changed_by(KEY, images, padding=0, degrees=0))
    mirrored = (changed == images[:, :, ::-1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed[~mirrored], images[~mirrored])
    assert 0.45 < mirrored.mean() < 0.55  # 4.5 standard deviations.


def test_every_offset_within_the_padding_comes_equally_often():
    # One pixel says where its image has gone: down and to the right where the crop starts up and to the left.
    images = np.zeros((3000, 9, 9, 1), np.uint8)
    images[:, 4, 4] = 1
    changed = changed_by(KEY, images, padding=2, flip=False, degrees=0)
    _, rows, columns, _ = np.nonzero(changed)
    assert len(rows) == 3000
    for offsets in (rows - 4, columns - 4):
        values, counts = np.unique(offsets, return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert counts.min() > 500  # Of 600 expected: 4.5 standard deviations.
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.1


def test_angles_fill_both_sides_of_their_range():
    # A pixel far right of the centre says by how much its image was rotated; anticlockwise is up, at smaller rows.
    images = np.zeros((100, 201, 201, 1), np.uint8)
    images[:, 99:102, 188:191] = 1
    changed = np.asarray(changed_by(KEY, images, padding=0, flip=False, degrees=20))
    rows = np.array([np.nonzero(image)[0].mean() for image in changed])
    columns = np.array([np.nonzero(image)[1].mean() for image in changed])
    angles = np.rad2deg(np.arctan2(100 - rows, columns - 100))
    np.testing.assert_allclose(angles, draws(KEY, 100, 0, 20.0)[3], atol=0.5)
    assert -20.2 < angles.min() < -18
    assert 18 < angles.max() < 20.2


def test_corners_and_margins_are_black():
    images = np.full((64, 16, 16, 3), 200, np.uint8)
    changed = np.asarray(changed_by(KEY, images, padding=4, degrees=45))
    assert set(np.unique(changed)) == {0, 200}
    rotated_only = np.asarray(changed_by(KEY, images, padding=0, degrees=45))
    assert (rotated_only[:, 0, 0] == 0).all(axis=-1).mean() > 0.8
    assert (rotated_only[:, 4:12, 4:12] == 200).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": -1}, r"padding must be 0 or more and degrees in \[0, 180\], got -1 and 15"),
        ({"degrees": -1.0}, "got 4 and -1"),
        ({"degrees": 181.0}, "got 4 and 181"),
        ({"degrees": float("nan")}, "got 4 and nan"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        crop_flip_rotate(KEY, noise(), **options)


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8), (1, 1, 8, 8, 3)])
def test_what_is_no_batch_of_images_is_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, C\], got shape \[" + str(shape[0])):
        crop_flip_rotate(KEY, np.zeros(shape, np.uint8))
