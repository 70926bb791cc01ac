"""The cached listing over aiohttp's low-level server (no application, no router) and PyJWT: `aiohttp_listing.py TASK PORT`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import uvloop
from aiohttp import web
from tokens import Tokens


async def serve(task_file: str, port: int) -> None:
    task = json.loads(Path(task_file).read_text())
    tokens = Tokens(task)
    pages = {(task["subject"], f"{task['path']}?{task['query']}"): Path(task["body"]).read_bytes()}
    headers = {"Content-Type": "application/json", "Cache-Control": "private, no-cache", "ETag": task["etag"]}

    async def listing(request: web.BaseRequest) -> web.StreamResponse:
        claims = tokens.claims(request.headers.get("Authorization"))
        if claims is None:
            return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"})
        page = pages.get((claims["sub"], request.path_qs))
        if page is None:
            return web.Response(status=404)
        return web.Response(body=page, headers=headers)

    server = web.Server(listing, access_log=None)
    await asyncio.get_running_loop().create_server(server, "127.0.0.1", port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2])))
