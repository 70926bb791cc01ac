"""The cached listing over Starlette, PyJWT and uvicorn: `TASK=<file> python -m uvicorn starlette_listing:app`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tokens import Tokens

TASK = json.loads(Path(os.environ["TASK"]).read_text())
TOKENS = Tokens(TASK)
PAGES = {(TASK["subject"], TASK["path"], TASK["query"]): Path(TASK["body"]).read_bytes()}
HEADERS = {"Cache-Control": "private, no-cache", "ETag": TASK["etag"]}


async def listing(request: Request) -> Response:
    claims = TOKENS.claims(request.headers.get("authorization"))
    if claims is None:
        return Response(status_code=401, headers={"WWW-Authenticate": "Bearer"})
    page = PAGES.get((claims["sub"], request.url.path, request.url.query))
    if page is None:
        return Response(status_code=404)
    return Response(page, media_type="application/json", headers=HEADERS)


app = Starlette(routes=[Route(TASK["path"], listing)])
