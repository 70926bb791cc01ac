"""The peer of the thread API: the least that appends a message over HTTP, aiohttp on a pool of asyncpg.

It reads the same request as Weft's API, takes the message out and inserts it as one row; nobody is
authenticated, nothing is checked, indexed for search, fed to followers or marked for other regions. Run as
`python -m tests.bench.postgres_handler SOCKET_FOLDER POSTGRES_PORT PORT`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final

import orjson
from aiohttp import web

from tests.bench.postgres import INSERT, Postgres

POOL: Final = 32


async def serve(host: str, postgres_port: int, port: int) -> None:
    pool = await Postgres(host, postgres_port).pool(POOL)

    async def append(request: web.Request) -> web.Response:
        [message] = orjson.loads(await request.read())["messages"]
        seq = await pool.fetchval(INSERT, request.match_info["id"], orjson.dumps(message).decode())
        return web.Response(body=b'{"seq":%d}' % seq, content_type="application/json")

    app = web.Application()
    app.router.add_post("/api/threads/{id}/messages", append)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
