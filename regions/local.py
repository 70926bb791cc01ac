"""A whole cluster on one machine: its folder, its settings files, and the processes `weft up` keeps running.

Promise: everything lies below one data folder and outlives a restart; settings files are written anew when the
options change, and only then, so that what an operator adds to them stays; keys and data are never touched.
Left to others: running the processes (`infra.cluster`) and what is said about it (`regions.commands`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from infra import settings
from infra.cluster import Child, replace_file
from infra.development import AUDIENCE, ISSUER, ClusterPlaces, DataFolder, RegionPlace
from infra.identity import TOKEN_ALGORITHM, write_issuer_key, write_peer_key
from infra.settings import Settings, host_port
from origin.store.sqlite import check_schema, schema_version
from regions.topology import Topology

REGIONS: Final = ("us-east", "eu-west", "ap-south")
PORT: Final = 8400
REGION_PORTS: Final = 100
"""The region servers' ports lie so far above the edges'; and so many regions there may be at most."""
PORT_MAX: Final = 65_535 - 2 * REGION_PORTS
HOST: Final = "127.0.0.1"
GENERATION: Final = 1
"""Of the settings files written here: raise it when they change, and those on disk are written anew."""

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Which regions, where. Made from the options of `weft up`; ValueError says what is wrong with them."""

    folder: DataFolder
    names: tuple[str, ...]
    port: int = PORT

    def __post_init__(self) -> None:
        for name in self.names:
            if _NAME.fullmatch(name) is None:
                raise ValueError(
                    f"region {name!r}: allowed are lower-case letters, digits and inner dashes, at most 63"
                )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"a region is named twice: {', '.join(self.names)}")
        if not 1 <= len(self.names) <= REGION_PORTS:
            raise ValueError(f"1 to {REGION_PORTS} regions, not {len(self.names)}")
        Topology.of(self.names[0], {name: self.region_url(name) for name in self.names})

    def edge_url(self, name: str) -> str:
        return f"http://{HOST}:{self.port + self.names.index(name)}"

    def region_url(self, name: str) -> str:
        return f"http://{HOST}:{self.port + REGION_PORTS + self.names.index(name)}"


def check_data(plan: Plan) -> None:
    """Raises SchemaTooNew when a region's data was written by a newer Weft."""
    for name in plan.names:
        check_schema(plan.folder.region(name))


def is_new(plan: Plan) -> bool:
    """True when none of the regions holds data yet."""
    return all(schema_version(plan.folder.region(name)) is None for name in plan.names)


def strangers(plan: Plan) -> list[str]:
    """Regions with data in the folder that the plan does not start."""
    found = plan.folder.regions.iterdir() if plan.folder.regions.is_dir() else ()
    return sorted(path.name for path in found if path.name not in plan.names and schema_version(path) is not None)


def write_files(plan: Plan, environ: Mapping[str, str]) -> dict[str, Settings]:
    """Make what is missing (keys, settings files, folders); every region's settings, as its processes see them."""
    folder = plan.folder
    write_peer_key(folder.peer_key)
    write_issuer_key(folder.keys)
    folder.settings.mkdir(parents=True, exist_ok=True)
    loaded: dict[str, Settings] = {}
    for name in plan.names:
        folder.region(name).mkdir(parents=True, exist_ok=True)
        path = folder.settings_of(name)
        first_line, text = _settings_text(plan, name)
        if not path.exists() or path.read_text(encoding="utf-8").partition("\n")[0] != first_line:
            replace_file(path, text.encode())
        loaded[name] = settings.load(path, environ, required=("region", "edge.origins"))
    return loaded


def _settings_text(plan: Plan, name: str) -> tuple[str, str]:
    """The first line, which says what the file was made from, and the whole file."""
    first = f"# weft up --regions {','.join(plan.names)} --port {plan.port} (settings {GENERATION})"
    regions = "\n".join(f'[regions.{other}]\nurl = "{plan.region_url(other)}"' for other in plan.names)
    text = f"""{first}
# Yours to change: `weft up` writes this file anew only when the line above is no longer what it would write.
region = "{name}"

{regions}

[server]
listen = "{plan.region_url(name).removeprefix("http://")}"

[store]
engine = "sqlite"
path = "../regions/{name}"

[sync]
peer_key_file = "../keys/{plan.folder.peer_key.name}"

[edge]
listen = "{plan.edge_url(name).removeprefix("http://")}"
origins = ["{plan.region_url(name)}"]

[[auth.issuers]]
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
jwks_file = "../keys/{plan.folder.jwks.name}"
algorithms = ["{TOKEN_ALGORITHM}"]
"""
    return first, text


def children(plan: Plan, loaded: Mapping[str, Settings]) -> list[Child]:
    """The processes: region servers, then edges, which stop first."""
    regions = [_child(plan, name, "region", loaded[name].server.listen, stage=0) for name in plan.names]
    return regions + [_child(plan, name, "edge", loaded[name].edge.listen, stage=1) for name in plan.names]


def _child(plan: Plan, name: str, kind: str, listen: str, *, stage: int) -> Child:
    # -P: a folder named `infra` where `weft up` was typed is not ours.
    command = (sys.executable, "-P", "-m", "infra", kind)
    return Child(
        name=f"{name}.{kind}",
        argv=(*command, "--config", os.path.abspath(plan.folder.settings_of(name))),
        ready_url=f"{address(listen)}/readyz",
        listens=host_port(listen),
        stage=stage,
        environ={"PYTHONUNBUFFERED": "1"},
    )


def address(listen: str) -> str:
    """The URL under which this machine reaches a process that listens so."""
    host, port = host_port(listen)
    host = _EVERYWHERE.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def places(plan: Plan, loaded: Mapping[str, Settings], pids: Mapping[str, int]) -> ClusterPlaces:
    """What `cluster.json` says."""
    return ClusterPlaces(
        regions=tuple(
            RegionPlace(
                name=name,
                edge=address(loaded[name].edge.listen),
                region=address(loaded[name].server.listen),
                pids={kind: pids[f"{name}.{kind}"] for kind in ("edge", "region")},
                data=os.path.abspath(loaded[name].store.path),
            )
            for name in plan.names
        ),
        issuer=ISSUER,
        audience=AUDIENCE,
        jwks=os.path.abspath(plan.folder.jwks),
    )


def places_json(plan: Plan, loaded: Mapping[str, Settings], pids: Mapping[str, int]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(places(plan, loaded, pids)), indent=2) + b"\n"


def names_from(text: str) -> tuple[str, ...]:
    """Region names as they are given on the command line, separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
