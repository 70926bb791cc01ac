"""The doors under /peer: who is let in, who proves what, and what is refused rather than misread."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from infra import settings
from infra.identity import (
    IDENTITY_HEADER,
    SERVER_IDENTITY_HEADER,
    WIRE,
    WIRE_HEADER,
    IdentitySigner,
    IdentityVerifier,
    Principal,
    write_peer_key,
)
from infra.queues import QueueFault, QueueState
from infra.server import Lifecycle
from origin.store.replication import GroupRow
from regions import peer_client
from regions.app import Region, open_region, region_app
from regions.notices import Notices
from regions.peer_client import HttpPeers, PeerRefused, PeerUnreachable
from regions.peer_wire import DIGEST_HEADER, Hello, HelloAnswer, content_digest
from regions.topology import Topology
from regions.work import Work
from tests.support.linkproxy import link_proxy

Client = TestClient[web.Request, web.Application]

SETTINGS = """
region = "us-east"
[regions.us-east]
url = "http://127.0.0.1:1"
[regions.eu-west]
url = "http://127.0.0.1:2"
[store]
path = "data"
[sync]
peer_key_file = "peer.key"
"""


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[tuple[Region, Client]]:
    """The region server us-east, alone: its peer does not answer."""
    (tmp_path / "weft.toml").write_text(SETTINGS)
    write_peer_key(tmp_path / "peer.key")
    loaded = settings.load(tmp_path / "weft.toml", {})
    lifecycle = Lifecycle()
    async with (
        open_region(loaded, lifecycle=lifecycle) as opened,
        TestClient(TestServer(region_app(opened, loaded, lifecycle))) as client,
    ):
        yield opened, client


@pytest.fixture
def region(running: tuple[Region, Client]) -> Client:
    return running[1]


@pytest.fixture
def signer(tmp_path: Path, region: Client) -> IdentitySigner:
    return IdentitySigner(write_peer_key(tmp_path / "peer.key"), "region:eu-west")


RECORD = Topology.of("us-east", {"us-east": "http://127.0.0.1:1", "eu-west": "http://127.0.0.1:2"}).record


def hello(**changes: object) -> bytes:
    message = Hello(
        config_version=1_000_001,
        region="eu-west",
        incarnation="x",
        record=RECORD,
        groups=(),
        held=(),
    )
    return msgspec.msgpack.encode(msgspec.structs.replace(message, **changes))


async def knock(region: Client, token: str | None, body: bytes) -> tuple[int, bytes]:
    headers = {DIGEST_HEADER: content_digest(body)} | ({} if token is None else {IDENTITY_HEADER: token})
    async with region.post("/peer/hello", data=body, headers=headers) as response:
        return response.status, await response.read()


async def test_a_member_with_the_clusters_key_is_answered_with_a_proof(
    region: Client, signer: IdentitySigner, tmp_path: Path
) -> None:
    headers = {IDENTITY_HEADER: signer.service_token("region:us-east"), DIGEST_HEADER: content_digest(hello())}
    async with region.post("/peer/hello", data=hello(), headers=headers) as response:
        assert response.status == 200
        proof = IdentityVerifier(write_peer_key(tmp_path / "peer.key").public_key(), "region:eu-west")
        assert proof.verify(response.headers[SERVER_IDENTITY_HEADER]).issuer == "region:us-east"
        assert msgspec.msgpack.decode(await response.read(), type=HelloAnswer).region == "us-east"


async def test_nobody_else_is_let_in(region: Client, signer: IdentitySigner, tmp_path: Path) -> None:
    key = write_peer_key(tmp_path / "peer.key")
    user = IdentitySigner(key, "edge:us-east").identity_token(Principal("https://login.test", "ann"), "region:us-east")
    forger = IdentitySigner(write_peer_key(tmp_path / "other.key"), "region:eu-west")
    for token, status in (
        (None, 401),
        ("nonsense", 401),
        (forger.service_token("region:us-east"), 401),
        (signer.service_token("region:ap-south"), 401),
        (user, 403),
        (IdentitySigner(key, "edge:us-east").service_token("region:us-east"), 403),
        (IdentitySigner(key, "region:mars").service_token("region:us-east"), 403),
    ):
        assert (await knock(region, token, hello()))[0] == status, token


async def test_a_region_can_not_speak_for_another(region: Client, signer: IdentitySigner) -> None:
    status, _ = await knock(region, signer.service_token("region:us-east"), hello(region="us-east"))
    assert status == 403


async def test_a_newer_wire_is_refused_by_name(region: Client, signer: IdentitySigner) -> None:
    status, body = await knock(region, signer.service_token("region:us-east"), hello(wire=WIRE + 1))
    assert (status, b"wire version" in body) == (426, True)


async def test_a_newer_wire_is_refused_on_the_feed_and_the_status_too(region: Client, signer: IdentitySigner) -> None:
    headers = {IDENTITY_HEADER: signer.service_token("region:us-east"), WIRE_HEADER: str(WIRE + 1)}
    for path in ("/peer/feed", "/peer/status"):
        async with region.get(path, headers=headers) as response:
            assert response.status == 426


async def test_a_message_that_can_not_be_read_is_refused(region: Client, signer: IdentitySigner) -> None:
    token = signer.service_token("region:us-east")
    for body in (b"", b"\xc1", msgspec.msgpack.encode({"wire": 1})):
        assert (await knock(region, token, body))[0] == 400


async def test_a_message_that_was_damaged_on_the_way_is_to_be_sent_again(
    region: Client, signer: IdentitySigner
) -> None:
    """Well-formed, and not what was sent: stored, it would be acknowledged to someone who wrote something else."""
    token = signer.service_token("region:us-east")
    for digest in (content_digest(hello()), ""):
        headers = {IDENTITY_HEADER: token, DIGEST_HEADER: digest}
        damaged = hello(incarnation="another")
        async with region.post("/peer/hello", data=damaged, headers=headers) as response:
            assert (response.status, "not the one that was sent" in await response.text()) == (422, True)


async def test_status_is_for_operators_and_edges_but_not_for_users(
    region: Client, signer: IdentitySigner, tmp_path: Path
) -> None:
    key = write_peer_key(tmp_path / "peer.key")
    operator = IdentitySigner(key, "operator:local").service_token("region:us-east")
    async with region.get("/peer/status", headers={IDENTITY_HEADER: operator}) as response:
        status = await response.json()
    assert (status["region"], status["peers"]["eu-west"]["reachable"]) == ("us-east", False)
    user = IdentitySigner(key, "edge:us-east").identity_token(Principal("https://login.test", "ann"), "region:us-east")
    async with region.get("/peer/status", headers={IDENTITY_HEADER: user}) as response:
        assert response.status == 403


async def test_only_an_operator_revokes_and_purges(region: Client, tmp_path: Path) -> None:
    key = write_peer_key(tmp_path / "peer.key")
    operator = IdentitySigner(key, "operator:local").service_token("region:us-east")
    edge = IdentitySigner(key, "edge:us-east")
    user = edge.identity_token(Principal("https://login.test", "ann"), "region:us-east")
    other = IdentitySigner(key, "region:eu-west").service_token("region:us-east")
    order = {"kind": "token", "issuer": "https://login.test", "name": "j1"}

    async def announce(token: str, body: object) -> tuple[int, str]:
        async with region.post("/peer/announce", json=body, headers={IDENTITY_HEADER: token}) as response:
            return response.status, await response.text()

    for token in (user, other, edge.service_token("region:us-east"), "nonsense"):
        assert (await announce(token, order))[0] in (401, 403)
    for body, status in (([], 400), ({**order, "scope": "all"}, 400), ({**order, "name": ""}, 409)):
        assert (await announce(operator, body))[0] == status
    async with region.get("/metrics") as response:
        assert 'weft_notices{kind="revocation"} 0.0' in await response.text()
    status, answer = await announce(operator, order)
    assert (status, msgspec.json.decode(answer)["pending_regions"]) == (200, ["eu-west"])
    async with region.get("/metrics") as response:
        assert 'weft_notices{kind="revocation"} 1.0' in await response.text()


class Impostor:
    """A server that listens at a member's address."""

    def __init__(self, token: str, damage: bool) -> None:
        self.token = token
        self.damage = damage

    async def answer(self, _: web.Request) -> web.Response:
        body = HelloAnswer(
            region="us-east", incarnation="i", standing="voter", founders={}, record=RECORD, groups=(), held=(),
            position=0, known="", knew_another=False,
        )  # fmt: skip
        sent = msgspec.msgpack.encode(body)
        headers = {SERVER_IDENTITY_HEADER: self.token, DIGEST_HEADER: content_digest(sent)}
        return web.Response(body=sent.replace(b"us-east", b"vs-east") if self.damage else sent, headers=headers)


async def call_impostor(tmp_path: Path, token: str, *, damage: bool = False) -> None:
    key = write_peer_key(tmp_path / "peer.key")
    app = web.Application()
    app.router.add_post("/peer/hello", Impostor(token, damage).answer)
    async with TestServer(app) as server:
        topology = Topology.of(
            "eu-west", {"us-east": f"http://127.0.0.1:{server.port}", "eu-west": "http://127.0.0.1:2"}
        )
        peers = HttpPeers(
            topology, IdentitySigner(key, "region:eu-west"), IdentityVerifier(key.public_key(), "region:eu-west")
        )
        try:
            message = msgspec.msgpack.decode(hello(), type=Hello)
            await peers.call("us-east", "/peer/hello", message, HelloAnswer, seconds_max=2.0)
        finally:
            await peers.close()


async def test_an_answer_without_the_right_proof_is_not_believed(tmp_path: Path) -> None:
    key = write_peer_key(tmp_path / "peer.key")
    stranger = IdentitySigner(write_peer_key(tmp_path / "other.key"), "region:us-east")
    for token in (
        "",
        stranger.service_token("region:eu-west"),
        IdentitySigner(key, "region:ap-south").service_token("region:eu-west"),
        IdentitySigner(key, "region:us-east").service_token("region:ap-south"),
    ):
        with pytest.raises(PeerUnreachable) as failure:
            await call_impostor(tmp_path, token)
        assert failure.value.sent
    await call_impostor(tmp_path, IdentitySigner(key, "region:us-east").service_token("region:eu-west"))


async def test_an_answer_that_was_damaged_on_the_way_is_not_believed(tmp_path: Path) -> None:
    token = IdentitySigner(write_peer_key(tmp_path / "peer.key"), "region:us-east").service_token("region:eu-west")
    with pytest.raises(PeerUnreachable, match="damaged") as failure:
        await call_impostor(tmp_path, token, damage=True)
    assert failure.value.sent


async def test_a_region_that_does_not_answer_at_all_was_not_sent_to(tmp_path: Path) -> None:
    key = write_peer_key(tmp_path / "peer.key")
    topology = Topology.of("eu-west", {"us-east": "http://127.0.0.1:1", "eu-west": "http://127.0.0.1:2"})
    peers = HttpPeers(
        topology, IdentitySigner(key, "region:eu-west"), IdentityVerifier(key.public_key(), "region:eu-west")
    )
    try:
        with pytest.raises(PeerUnreachable) as failure:
            message = msgspec.msgpack.decode(hello(), type=Hello)
            await peers.call("us-east", "/peer/hello", message, HelloAnswer, seconds_max=2.0)
        assert not failure.value.sent
    finally:
        await peers.close()


async def test_connections_that_a_fault_left_dead_go_with_the_first_timeout(
    region: Client, signer: IdentitySigner, tmp_path: Path
) -> None:
    """Else each of them takes a request into silence, long after the way is whole again."""
    key = write_peer_key(tmp_path / "peer.key")
    message = msgspec.msgpack.decode(hello(), type=Hello)
    with link_proxy({"way": ("127.0.0.1", region.port)}) as proxy:
        topology = Topology.of(
            "eu-west", {"us-east": f"http://127.0.0.1:{proxy.ports['way']}", "eu-west": "http://127.0.0.1:2"}
        )
        peers = HttpPeers(topology, signer, IdentityVerifier(key.public_key(), "region:eu-west"))

        async def call(seconds_max: float) -> HelloAnswer:
            return await peers.call("us-east", "/peer/hello", message, HelloAnswer, seconds_max=seconds_max)

        try:
            await asyncio.gather(*(call(10.0) for _ in range(4)))
            assert proxy.statistics()["way"]["connections"] == 4
            proxy.change("way", silence="lose")
            proxy.heal()
            with pytest.raises(PeerUnreachable, match="no answer") as failure:
                await call(0.5)
            assert failure.value.sent
            for _ in range(3):
                await call(5.0)
        finally:
            await peers.close()


async def test_a_connection_that_is_never_made_carried_nothing(
    signer: IdentitySigner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that drops what it is sent, as behind a partition: told "perhaps it was written", clients would wait."""
    monkeypatch.setattr(peer_client, "CONNECT_SECONDS", 0.2)
    key = write_peer_key(tmp_path / "peer.key")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first, socket.socket() as second:
        for waiting in (first, second):  # its queue of connections, which nobody takes
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        topology = Topology.of(
            "eu-west", {"us-east": f"http://127.0.0.1:{full.getsockname()[1]}", "eu-west": "http://127.0.0.1:2"}
        )
        peers = HttpPeers(topology, signer, IdentityVerifier(key.public_key(), "region:eu-west"))
        try:
            with pytest.raises(PeerUnreachable) as failure:
                message = msgspec.msgpack.decode(hello(), type=Hello)
                await peers.call("us-east", "/peer/hello", message, HelloAnswer, seconds_max=5.0)
            assert not failure.value.sent
        finally:
            await peers.close()


async def test_a_peer_that_refuses_says_why(region: Client, signer: IdentitySigner, tmp_path: Path) -> None:
    key = write_peer_key(tmp_path / "peer.key")
    topology = Topology.of("eu-west", {"us-east": f"http://127.0.0.1:{region.port}", "eu-west": "http://127.0.0.1:2"})
    peers = HttpPeers(topology, signer, IdentityVerifier(key.public_key(), "region:eu-west"))
    try:
        with pytest.raises(PeerRefused, match="wire version"):
            message = msgspec.msgpack.decode(hello(wire=WIRE + 1), type=Hello)
            await peers.call("us-east", "/peer/hello", message, HelloAnswer, seconds_max=2.0)
    finally:
        await peers.close()


async def test_only_an_edge_that_follows_may_confirm_and_is_granted_a_lease(region: Client, tmp_path: Path) -> None:
    key = write_peer_key(tmp_path / "peer.key")

    async def confirm(who: str, body: object) -> tuple[int, bytes]:
        headers = {IDENTITY_HEADER: IdentitySigner(key, who).service_token("region:us-east")}
        async with region.post("/peer/feed/confirm", data=msgspec.json.encode(body), headers=headers) as response:
            return response.status, await response.read()

    said = {"follower": "a", "position": 0}
    assert (await confirm("region:eu-west", said))[0] == 403
    assert (await confirm("edge:us-east", said))[0] == 409
    headers = {IDENTITY_HEADER: IdentitySigner(key, "edge:us-east").service_token("region:us-east")}
    async with region.get("/peer/feed", params={"follower": "x" * 65}, headers=headers) as refused:
        assert refused.status == 400
    async with region.get("/peer/feed", params={"follower": "a"}, headers=headers) as feed:
        assert b'"hello"' in await feed.content.readline()
        status, body = await confirm("edge:us-east", said)
        assert (status, msgspec.json.decode(body)) == (200, {"position": 0, "lease_s": 1.5})
        assert (await confirm("edge:eu-west", said))[0] == 409, "another's name"
        for bad in ({}, {"follower": "a"}, {"follower": "a", "position": "0"}, []):
            assert (await confirm("edge:us-east", bad))[0] == 400


async def test_those_who_follow_forget_all_when_a_group_moves(
    region: Client, signer: IdentitySigner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread and listing that an edge keeps says who orders it, and the move is no change of a thread."""
    monkeypatch.setattr(Notices, "informed", True)  # it has no peers to hear from
    edge = IdentitySigner(write_peer_key(tmp_path / "peer.key"), "edge:us-east")
    headers = {IDENTITY_HEADER: edge.service_token("region:us-east")}
    async with region.get("/peer/feed", headers=headers) as feed:
        assert b'"hello"' in await feed.content.readline()
        moved = hello(groups=(GroupRow(group="us-east", epoch=1_001, holder="eu-west", promised=1_001),))
        assert (await knock(region, signer.service_token("region:us-east"), moved))[0] == 200
        lines: list[dict[str, Any]] = []
        async with asyncio.timeout(10):
            while [line["type"] for line in lines].count("heartbeat") < 4:
                lines.append(msgspec.json.decode(await feed.content.readline()))
        again = [line["reset"] for line in lines if line["type"] == "hello"]
        assert again == [True], "once, and once only"
        # What is revoked is told anew after each hello: an edge answers nobody before it knows.
        behind = [line["type"] for line in lines].index("hello")
        assert "notices" in [line["type"] for line in lines[behind:]]


class QueuedBy:
    """A `Work` whose queue has dead letters, until they are sent back."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.queue = QueueState(1, 2, 3)
        self.fault = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    async def state(self) -> QueueState:
        if self.fault:
            raise QueueFault(self.fault)
        return self.queue

    async def redrive(self) -> int:
        if self.fault:
            raise QueueFault(self.fault)
        moved, self.queue = self.queue.dead, QueueState(4, 2, 0)
        return moved


async def test_an_operator_sees_queues_and_sends_dead_letters_back(
    running: tuple[Region, Client], signer: IdentitySigner, tmp_path: Path
) -> None:
    region, client = running
    target = region.node.replicator.targets["eu-west"]
    target.work = work = QueuedBy(target.work)
    operator = IdentitySigner(write_peer_key(tmp_path / "peer.key"), "operator:weft")
    headers = {IDENTITY_HEADER: operator.service_token("region:us-east")}

    async def queue() -> Any:
        async with client.get("/peer/status", headers=headers) as answer:
            return (await answer.json())["peers"]["eu-west"]["queue"]

    async def repair(**asked: bool) -> Any:
        async with client.post("/peer/repair", json=asked, headers=headers) as answer:
            return await answer.json()

    assert await queue() == {"waiting": 1, "leased": 2, "dead": 3}
    assert (await repair())["redriven"] == 0
    assert (await repair(redrive=True))["redriven"] == 3
    assert (await queue())["dead"] == 0
    work.fault = "sqs:GetQueueUrl on q: gone"
    assert await queue() == {"fault": work.fault}
    answer = await repair(redrive=True)
    assert (answer["redriven"], answer["faults"]["redrive"]) == (0, work.fault)
