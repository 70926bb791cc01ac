"""nginx as a peer: one worker on a processor of its own, set up as its documentation recommends for speed.

Promise: no access log, no limit on a connection's requests, sendfile and an open file cache, kept-alive connections to
an upstream; everything it writes stays in the folder it is given. Skips the contestant where nginx is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tests.bench.harness import Skipped
from tests.bench.servers import child
from tests.bench.wrk import on
from tests.support.ports import free_ports

_CONFIGURATION: Final = """\
{user}
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; multi_accept on; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  tcp_nodelay on;
  keepalive_timeout 75s;
  keepalive_requests 1000000000;
  open_file_cache max=1000 inactive=60s;
  open_file_cache_valid 60s;
  default_type application/json;
  client_body_temp_path {folder}/client;
  proxy_temp_path {folder}/temp;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  {http}
  server {{
    listen 127.0.0.1:{port} reuseport;
    {server}
  }}
}}
"""


def upstream(port: int) -> str:
    """For `http`: the server behind, by the name `origin`."""
    return f"upstream origin {{ server 127.0.0.1:{port}; keepalive 64; keepalive_requests 1000000000; }}"


@asynccontextmanager
async def nginx(folder: Path, processor: int, *, server: str, http: str = "") -> AsyncGenerator[int]:
    """A running nginx; its port. `server` and `http` are directives for those blocks."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        raise Skipped("nginx is not installed")
    folder.mkdir(parents=True)
    [port] = free_ports(1)
    # Started by root its worker would be another user, who may not read the case's folder.
    user = "user root;" if os.geteuid() == 0 else ""
    configuration = folder / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(user=user, folder=folder, port=port, http=http, server=server))
    command = [*on(processor), binary, "-e", "stderr", "-g", "daemon off;", "-c", str(configuration)]
    async with child(command, port, folder / "log", path="/"):
        yield port
