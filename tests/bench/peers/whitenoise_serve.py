"""WhiteNoise before an application that knows nothing: `ROOT=<folder> python -m uvicorn whitenoise_serve:app`.

It is a WSGI middleware; uvicorn runs it as it runs any."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from whitenoise import WhiteNoise


def nothing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("404 Not Found", [("Content-Length", "0")])
    return [b""]


app = WhiteNoise(nothing, root=os.environ["ROOT"], prefix="cdn/", max_age=31_536_000)
