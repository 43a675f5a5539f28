"""What the tests of several data sets share."""

import io
import re

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
