"""The development cluster of a data folder: where its parts lie, where its processes are, its users' tokens.

Promise: `weft up` and every command that looks for its cluster agree on the folder's layout because they
read it here, and `cluster.json` is a published format. Left to others: running the processes
(`infra.cluster`), and real identity providers: the key in such a folder makes anyone who reads it any user.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import (
    ISSUER_JWKS_FILE,
    ISSUER_KEY_FILE,
    PEER_KEY_FILE,
    USER_TOKEN_TTL_S,
    load_peer_key,
    mint_user_token,
)

DATA_FOLDER: Final = Path(".weft")
ISSUER: Final = "weft-development"
AUDIENCE: Final = "weft"
USER: Final = "developer"
"""Whose threads the `threads` commands work on when no token is given."""


class NoCluster(Exception):
    """No cluster runs in the folder, or its description can't be read; the text says what to do."""


class RegionPlace(msgspec.Struct, frozen=True):
    """Where one region of a running cluster is."""

    name: str
    edge: str
    region: str
    pids: dict[str, int]
    data: str


class ClusterPlaces(msgspec.Struct, frozen=True):
    """The content of `cluster.json`."""

    regions: tuple[RegionPlace, ...]
    issuer: str
    audience: str
    jwks: str


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The layout below one `--data` folder."""

    path: Path

    @property
    def description(self) -> Path:
        return self.path / "cluster.json"

    @property
    def lock(self) -> Path:
        return self.path / "cluster.lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def audit_log(self) -> Path:
        """Lines of JSON: what operators did that can lose something."""
        return self.path / "audit.log"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def peer_key(self) -> Path:
        return self.keys / PEER_KEY_FILE

    @property
    def issuer_key(self) -> Path:
        return self.keys / ISSUER_KEY_FILE

    @property
    def jwks(self) -> Path:
        return self.keys / ISSUER_JWKS_FILE

    @property
    def regions(self) -> Path:
        return self.path / "regions"

    @property
    def settings(self) -> Path:
        """The folder of the `weft.toml`s, named after their regions."""
        return self.path / "weft"

    def region(self, name: str) -> Path:
        return self.regions / name

    def settings_of(self, region: str) -> Path:
        return self.settings / f"{region}.toml"

    def places(self) -> ClusterPlaces:
        """The running cluster of this folder; NoCluster when there is none."""
        try:
            return msgspec.json.decode(self.description.read_bytes(), type=ClusterPlaces)
        except FileNotFoundError:
            raise NoCluster(
                f"no cluster is running in {self.path}: start one with `weft up --data {self.path}`"
            ) from None
        except (OSError, msgspec.MsgspecError) as error:
            raise NoCluster(f"{self.description} can't be read: {error}") from error

    def user_token(
        self,
        user: str = USER,
        *,
        team: str | None = None,
        email: str | None = None,
        ttl_s: int = USER_TOKEN_TTL_S,
        clock: Clock = SYSTEM_CLOCK,
    ) -> str:
        """A token for a user of this folder's cluster, running or not; NoCluster when it has no key yet."""
        if not self.issuer_key.exists():
            raise NoCluster(f"{self.path} holds no cluster's key yet: start one with `weft up --data {self.path}`")
        key = load_peer_key(self.issuer_key)
        return mint_user_token(key, ISSUER, AUDIENCE, user, team=team, email=email, ttl_s=ttl_s, clock=clock)
