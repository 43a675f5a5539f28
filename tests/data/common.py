"""What the tests of several data sets share."""

import io
import re

import numpy as np
import requests


def exactly(message):
    return rf"\A{re.escape(message)}\Z"


def serve(monkeypatch, contents):
    """Has TFDS download these contents by URL, and fail for others; returns the list of URLs it asked for."""
    asked = []

    def get(session, url, **options):
        asked.append(url)
        if url not in contents:
            raise requests.ConnectionError("no network")
        response = requests.Response()
        response.status_code, response.url, response.raw = 200, url, io.BytesIO(contents[url])
        return response

    monkeypatch.setattr(requests.Session, "get", get)
    return asked


def pixels(seed, count, size=32, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8)


def by_content(images, labels):
    """Examples whatever their order, which TFDS draws."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def as_file(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format)
    file.seek(0)
    return file
