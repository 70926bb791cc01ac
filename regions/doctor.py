"""`weft doctor`'s examination: settings, keys, data, disk, ports, and a running cluster seen from outside.

Promise: each finding names what was looked at, what is wrong and what to do about it; nothing is changed, and
one thing that is wrong does not hide the next. Left to others: showing the findings (`regions.commands`).
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import aiohttp
import apsw
import jwt
import msgspec

from infra import settings
from infra.cluster import unusable
from infra.development import DataFolder, NoCluster
from infra.identity import IdentityKeyError, load_peer_key
from infra.settings import Settings, SettingsError, host_port
from origin.store.sqlite import SchemaTooNew, check_schema
from regions import on_aws
from regions.operator import SECONDS_MAX, Operated, QueueStatus, Seen, look
from regions.status import Group, groups_of
from regions.topology import Topology, TopologyError

Level = Literal["ok", "warning", "failed"]

DISK_FAIL_BYTES: Final = 64 * 1024 * 1024
DISK_WARN_BYTES: Final = 1024 * 1024 * 1024
CLOCK_WARN_S: Final = 2.0
CLOCK_FAIL_S: Final = 5.0
"""Tokens between processes, and users' tokens, are taken with so much leeway."""
LAG_WARN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `fix` is empty when there is nothing to do."""

    check: str
    level: Level
    detail: str
    fix: str = ""


async def examine(folder: DataFolder, config: Path | None, environ: Mapping[str, str]) -> list[Finding]:
    """Look at the deployment that `config` describes, or at the development cluster in `folder`."""
    findings: list[Finding] = []
    files = [config] if config is not None else sorted(folder.settings.glob("*.toml"))
    if not files:
        fix = f"weft up --data {folder.path}"
        return [Finding("settings", "warning", f"{folder.settings} holds no settings yet", fix)]
    loaded: dict[Path, Settings] = {}
    for path in files:
        findings += _examine_settings(path, environ, loaded)
    key_files = {it.sync.peer_key_file for it in loaded.values() if it.region}
    for path in sorted(key_files):
        findings.append(_examine_peer_key(path))
    if config is None:
        findings.append(_examine_issuer(folder))
    for it in loaded.values():
        if it.region and it.store.engine == "sqlite":
            findings += [_examine_schema(it), _examine_disk(it)]
        if it.region and it.store.engine == "dynamodb":
            found = await on_aws.examine(it)
            findings += [Finding(f"{one.resource}: {one.action}", one.level, one.detail, one.fix) for one in found]
    if any(finding.level == "failed" for finding in findings):
        return findings
    try:
        cluster = Operated.configured(next(iter(loaded.values()))) if config else Operated.running(folder)
    except NoCluster as error:
        if folder.description.exists():
            fix = f"stop what runs there and start it again: weft up --data {folder.path}"
            return [*findings, Finding("cluster", "failed", str(error), fix)]
        return [*findings, Finding("cluster", "ok", "not running"), *_examine_ports(loaded)]
    seen = await look(cluster)
    for each in seen:
        findings += _examine_region(each)
    findings += [_examine_group(group) for group in groups_of(seen)]
    if config is None:
        findings += await _examine_tokens(folder, seen)
    return findings


def _examine_settings(path: Path, environ: Mapping[str, str], loaded: dict[Path, Settings]) -> Iterator[Finding]:
    check = f"settings {path}"
    try:
        found = settings.load(path, environ)
        if found.region:
            Topology.of(found.region, {name: region.url for name, region in found.regions.items()})
    except SettingsError as error:
        yield Finding(check, "failed", str(error), "change that key; docs/settings.md has them all")
        return
    except TopologyError as error:
        yield Finding(check, "failed", str(error), "give one of the regions another name")
        return
    loaded[path] = found
    missing = [issuer.jwks_file for issuer in found.auth.issuers if issuer.jwks_file and not issuer.jwks_file.is_file()]
    if missing:
        yield Finding(check, "failed", f"{missing[0]} does not exist", "put the issuer's JWKS there")
    else:
        yield Finding(check, "ok", f"region {found.region or 'none'} of {len(found.regions)}")


def _examine_peer_key(path: Path) -> Finding:
    check = f"key {_shown(path)}"
    try:
        load_peer_key(path)
    except IdentityKeyError as error:
        return Finding(check, "failed", str(error), "copy peer.key from another region, the same for all")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Finding(check, "failed", f"others may read it (mode {mode:03o})", f"chmod 600 {_shown(path)}")
    return Finding(check, "ok", "readable, and by its owner only")


def _examine_issuer(folder: DataFolder) -> Finding:
    check = f"key {folder.issuer_key}"
    fix = f"start the cluster again: weft up --data {folder.path}"
    try:
        token = folder.user_token()
        keys: list[dict[str, str]] = msgspec.json.decode(folder.jwks.read_bytes())["keys"]
    except (NoCluster, IdentityKeyError, OSError, ValueError, KeyError, TypeError) as error:
        return Finding(check, "failed", str(error), fix)
    if jwt.get_unverified_header(token).get("kid") not in [key.get("kid") for key in keys]:
        return Finding(check, "failed", f"{folder.jwks} is of another key: no token would be believed", fix)
    return Finding(check, "ok", "agrees with its JWKS")


def _examine_schema(loaded: Settings) -> Finding:
    check = f"data {_shown(loaded.store.path)}"
    try:
        check_schema(loaded.store.path)
    except SchemaTooNew as error:
        return Finding(check, "failed", str(error), "use the Weft that wrote it, or a newer one")
    except (apsw.Error, OSError) as error:
        return Finding(check, "failed", f"can't be read: {error}", "restore the region from a backup")
    return Finding(check, "ok", "of a schema this Weft reads")


def _examine_disk(loaded: Settings) -> Finding:
    path = loaded.store.path
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    check, detail = f"disk {_shown(loaded.store.path)}", f"{free / 1024**3:,.1f} GiB free"
    if not os.access(path, os.W_OK):
        return Finding(check, "failed", f"{path} can't be written", "give its folder to the user Weft runs as")
    if free < DISK_FAIL_BYTES:
        return Finding(check, "failed", detail, "make room: writes are refused when none is left")
    if free < DISK_WARN_BYTES:
        return Finding(check, "warning", detail, "make room before writes are refused")
    return Finding(check, "ok", detail)


def _examine_ports(loaded: Mapping[Path, Settings]) -> list[Finding]:
    addresses: dict[str, tuple[str, int]] = {}
    for it in loaded.values():
        if it.region:
            addresses[f"{it.region}.region"] = host_port(it.server.listen)
        if it.edge.origins:
            addresses[f"{it.region}.edge"] = host_port(it.edge.listen)
    fix = "stop what listens there, or choose other ports: weft up --port"
    findings = [Finding("ports", "failed", reason, fix) for reason in unusable(addresses)]
    return findings or [Finding("ports", "ok", f"all {len(addresses)} free")]


def _examine_region(seen: Seen) -> Iterator[Finding]:
    name = seen.place.name
    if seen.region_fault:
        fix = f"see whether it runs, and its log; it should answer at {seen.place.region}"
        yield Finding(f"region {name}", "failed", seen.region_fault, fix)
    else:
        yield Finding(f"region {name}", "ok", f"ready at {seen.place.region}")
    if seen.place.edge is not None:
        fix = f"see whether it runs, and its log; it should answer at {seen.place.edge}"
        yield (
            Finding(f"edge {name}", "failed", seen.edge_fault, fix)
            if seen.edge_fault
            else Finding(f"edge {name}", "ok", f"ready at {seen.place.edge}")
        )
    if seen.clock_s is not None:
        off = abs(seen.clock_s)
        level: Level = "failed" if off > CLOCK_FAIL_S else "warning" if off > CLOCK_WARN_S else "ok"
        detail = f"{off:.0f} s {'ahead of' if seen.clock_s > 0 else 'behind'} this machine"
        if level == "ok":
            yield Finding(f"clock {name}", level, "agrees with this machine's")
        else:
            yield Finding(f"clock {name}", level, detail, "synchronise the clocks (NTP)")
    if seen.status is not None:
        yield from _examine_replication(name, seen)
        scrub = seen.status.scrub
        if scrub.damaged:
            detail = f"{scrub.damaged} damaged: {scrub.findings[0]}"
            yield Finding(f"scrub {name}", "failed", detail, "`weft repair --scrub` mends what a region has whole")
        elif scrub.last_error:
            yield Finding(f"scrub {name}", "failed", scrub.last_error, f"see the log of {name}")


def _examine_group(group: Group) -> Finding:
    check, held = f"group {group.group}", f"held by {group.holder} in epoch {group.epoch}"
    fix = f"if it does not come back: weft promote REGION --group {group.group}"
    if group.held is None:
        return Finding(check, "failed", f"{held}, which does not answer", fix)
    if not group.held:
        return Finding(check, "failed", f"{held}, which may not write: epoch {group.promised} is promised", fix)
    if not group.lease:
        return Finding(check, "failed", f"{held}, which hears no majority of the regions", "see what is out of reach")
    return Finding(check, "ok", held)


def _examine_replication(name: str, seen: Seen) -> Iterator[Finding]:
    assert seen.status is not None
    for peer, link in seen.status.peers.items():
        check = f"replication {name} to {peer}"
        if link.parked:
            fix = "read last_error in `weft status --json`, then `weft repair`"
            yield Finding(check, "failed", f"{link.parked} threads are parked: {link.last_error}", fix)
        elif not link.reachable:
            detail = f"{peer} can't be reached from {name}: {link.last_error or link.breaker}"
            yield Finding(check, "failed", detail, f"check the network, and regions.{peer}.url at {name}")
        elif link.oldest_s > LAG_WARN_S:
            detail = f"{link.backlog_threads} threads wait, the oldest for {link.oldest_s:,.0f} s"
            yield Finding(check, "warning", detail, f"see the log of {name} for what holds it up")
        else:
            yield Finding(check, "ok", f"{link.backlog_threads} threads wait")
        if link.queue is not None:
            yield _examine_queue(f"queue {name} to {peer}", link.queue)


def _examine_queue(check: str, queue: QueueStatus) -> Finding:
    if queue.fault:
        fix = "see `weft doctor --config` of that region; until then each of its servers sends all that is owed"
        return Finding(check, "failed", queue.fault, fix)
    if queue.dead:
        fix = "see the region's log for why they were given up, then `weft repair --redrive`"
        return Finding(check, "warning", f"{queue.dead} messages were given up (what they say stays owed)", fix)
    return Finding(check, "ok", f"{queue.waiting + queue.leased} messages")


async def _examine_tokens(folder: DataFolder, seen: list[Seen]) -> list[Finding]:
    """Whether each edge believes the tokens that `weft token` makes."""
    findings: list[Finding] = []
    headers = {"Authorization": f"Bearer {folder.user_token()}"}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SECONDS_MAX)) as http:
        for place in (each.place for each in seen if not each.edge_fault and each.place.edge):
            try:
                async with http.get(f"{place.edge}/api/auth/verify", headers=headers) as answer:
                    fault = "" if answer.status == 200 else f"answered {answer.status} to a fresh token"
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                fault = str(error) or type(error).__name__
            fix = f"start the cluster again: weft up --data {folder.path}" if fault else ""
            detail = fault or "believes the tokens of this folder"
            findings.append(Finding(f"tokens at {place.name}", "failed" if fault else "ok", detail, fix))
    return findings


def _shown(path: Path) -> str:
    """A path for people: settings' relative ones come with their `..`."""
    return os.path.normpath(path)
