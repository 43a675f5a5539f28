"""Random image augmentation on the device, from a key."""

import jax
import jax.numpy as jnp

__all__ = ["crop_flip_rotate"]


def crop_flip_rotate(
    key: jax.Array, images: jax.Array, *, padding: int = 4, flip: bool = True, degrees: float = 15.0
) -> jax.Array:
    """Returns images `[B, H, W, C]` of the same dtype, each cropped, mirrored and rotated at random; `key` is consumed.

    In this order, as in the usual CIFAR recipe: a crop of the same size out of the image padded with `padding` black
    pixels on every side; a horizontal flip with probability 1/2; a rotation about the centre by an angle in [-degrees,
    degrees], anticlockwise, with the nearest pixel and black corners. The three are one gather of source pixels.

    Raises:
      ValueError: a negative padding or angle, or images that are not of rank 4.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [B, H, W, C], got shape {list(images.shape)}")
    if padding < 0 or not 0 <= degrees <= 180:
        raise ValueError(f"padding must be 0 or more and degrees in [0, 180], got {padding} and {degrees}")
    batch, height, width = images.shape[:3]
    crop_key, flip_key, angle_key = jax.random.split(key, 3)
    top, left = jax.random.randint(crop_key, (2, batch), -padding, padding + 1)
    mirrored = jax.random.bernoulli(flip_key, 0.5 if flip else 0.0, (batch,))
    angles = jnp.deg2rad(jax.random.uniform(angle_key, (batch,), minval=-degrees, maxval=degrees))

    def change(image: jax.Array, top: jax.Array, left: jax.Array, mirrored: jax.Array, angle: jax.Array) -> jax.Array:
        # Pixel centres of the result, relative to the image centre; y points down.
        y, x = jnp.meshgrid(jnp.arange(height) + 0.5 - height / 2, jnp.arange(width) + 0.5 - width / 2, indexing="ij")
        rows = jnp.floor(jnp.sin(angle) * x + jnp.cos(angle) * y + height / 2).astype(jnp.int32)
        columns = jnp.floor(jnp.cos(angle) * x - jnp.sin(angle) * y + width / 2).astype(jnp.int32)
        inside = _within(rows, height) & _within(columns, width)
        columns = jnp.where(mirrored, width - 1 - columns, columns)
        rows, columns = rows + top, columns + left
        inside &= _within(rows, height) & _within(columns, width)
        pixels = image[jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)]
        return jnp.where(inside[..., None], pixels, jnp.zeros((), image.dtype))

    return jax.vmap(change)(images, top, left, mirrored, angles)


def _within(positions: jax.Array, size: int) -> jax.Array:
    return (positions >= 0) & (positions < size)
