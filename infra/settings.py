"""`weft.toml` and its environment overrides, read once into one frozen value.

Promise: a key that is not a setting, and a value that is not allowed, are errors that name the source, the
key and what is allowed; paths come back absolute, relative ones taken from the file's folder. Left to others:
which settings a process cannot do without (`required=`), and reading any file that a setting names.

A variable `WEFT_<SECTION>__<KEY>` overrides a key (`WEFT_STORE__READERS=8`, `WEFT_REGIONS__US_EAST__URL=…`,
`WEFT__REGION=us-east`); names without `__` are not settings. Lists are written with commas or as JSON, tables
as JSON.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeGuard, TypeVar, cast, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
import orjson
from msgspec import Meta, Struct, structs

ENV_PREFIX: Final = "WEFT_"
ENV_SEPARATOR: Final = "__"

# Never "none". A symmetric one is a wish to be spelled out: whoever can verify with it can sign with it.
ALGORITHMS: Final = (
    "ES256", "ES384", "ES512", "EdDSA", "Ed25519", "Ed448", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512",
    "HS256", "HS384", "HS512",
)  # fmt: skip
NEVER_PUBLIC: Final = ("/api", "/v1", "/peer")
LEASE_HEARTBEATS: Final = 3
"""A holder's lease, and so what counts as out of reach, in heartbeats."""
FAILOVER_LEASES_MIN: Final = 2
"""A silence that moves a group is at least so many leases: clocks drift, and heartbeats come late after a pause."""
_NAMED_TABLES: Final = (["regions"], ["models", "providers"])

AnyStruct = TypeVar("AnyStruct", bound=Struct)


class SettingsError(Exception):
    """A setting that cannot be; the text is one line naming the source, the key and what is allowed."""


# The kinds of value. A description completes "allowed: …"; `extra["parse"]` checks and normalises what was
# read.


def host_port(listen: str) -> tuple[str, int]:
    """`127.0.0.1:8500` or `[::1]:8500` in two parts; ValueError when it is neither."""
    host, colon, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        raise ValueError("no host and port")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("no port from 0 to 65535")
    return (host[1:-1] if bracketed else host), int(port)


def _listen(value: str) -> str:
    host_port(value)
    return value


def _url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("not an http(s) address")
    _ = parts.port  # raises ValueError for a port that is none
    return value.rstrip("/")


def _url_or_nothing(value: str) -> str:
    return _url(value) if value else ""


def _key_url(value: str) -> str:
    """Kept to the letter: some providers tell policies apart by query, and an address may well end in a slash."""
    parts = urlsplit(value)
    if value and (parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment):
        raise ValueError("not an http(s) address")
    _ = parts.port  # raises ValueError for a port that is none
    return value


def _network(value: str) -> str:
    return str(ipaddress.ip_network(value))


def _public(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("no leading slash")
    if any(value == root or value.startswith(root + "/") for root in NEVER_PUBLIC):
        raise ValueError("never public")
    return value


Text = Annotated[str, Meta(min_length=1, description="text that is not empty")]
Name = Annotated[
    str,
    Meta(
        pattern=r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z",
        description="lower-case letters, digits and inner dashes",
    ),
]
Network = Annotated[
    str, Meta(description="an address or a network such as 10.0.0.0/8 or fd00::/8", extra={"parse": _network})
]
Url = Annotated[str, Meta(description="an http:// or https:// address without a query", extra={"parse": _url})]
OptionalUrl = Annotated[
    str,
    Meta(description="an http:// or https:// address, or nothing", extra={"parse": _url_or_nothing}),
]
KeyUrl = Annotated[
    str,
    Meta(description="an https:// address (http:// of this machine too), or nothing", extra={"parse": _key_url}),
]
Listen = Annotated[str, Meta(description="host:port, the port from 0 to 65535", extra={"parse": _listen})]
Seconds = Annotated[float, Meta(gt=0, le=86_400, description="seconds, over 0 and at most 86400")]
SecondsOrNone = Annotated[float, Meta(ge=0, le=86_400, description="seconds, from 0 to 86400")]
Interval = Annotated[float, Meta(ge=0, le=31 * 86_400, description="seconds, from 0 (never) to 2678400")]
Lifetime = Annotated[float, Meta(gt=0, le=3_660 * 86_400, description="seconds, over 0 and at most 316224000")]
Bytes = Annotated[int, Meta(ge=1024, le=1 << 40, description="a number of bytes, at least 1024")]
BytesOrNone = Annotated[int, Meta(ge=0, le=1 << 40, description="a number of bytes, or 0")]
Count = Annotated[int, Meta(ge=1, le=1 << 31, description="a whole number, at least 1")]
CountOrNone = Annotated[int, Meta(ge=0, le=1 << 31, description="a whole number, 0 or more")]
Processes = Annotated[int, Meta(ge=1, le=256, description="a whole number from 1 to 256")]
Attempts = Annotated[int, Meta(ge=1, le=100, description="a whole number from 1 to 100")]
TableName = Annotated[
    str,
    Meta(pattern=r"\A[A-Za-z0-9_.-]{3,255}\Z", description="3 to 255 letters, digits, dashes, dots and underscores"),
]
BucketName = Annotated[
    str,
    Meta(
        pattern=r"\A([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])?\Z",
        description="3 to 63 lower-case letters, digits, dots and inner dashes, or nothing",
    ),
]
QueuePrefix = Annotated[
    str,
    Meta(pattern=r"\A[A-Za-z0-9_-]{0,40}\Z", description="up to 40 letters, digits, dashes and underscores"),
]
AwsRegion = Annotated[
    str, Meta(pattern=r"\A([a-z]{2,4}(-[a-z]+)+-[0-9]+)?\Z", description="an AWS region such as eu-west-1, or nothing")
]
PublicPrefix = Annotated[
    str,
    Meta(description="path prefixes that begin with / (never /api, /v1 or /peer)", extra={"parse": _public}),
]
Algorithm = Annotated[
    Literal[
        "ES256", "ES384", "ES512", "EdDSA", "Ed25519", "Ed448", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512",
        "HS256", "HS384", "HS512",
    ],
    Meta(description="among " + ", ".join(ALGORITHMS)),
]  # fmt: skip


class RegionSettings(Struct, frozen=True):
    url: Url
    """Where peers and edges reach the region; may be a load balancer."""


class ServerSettings(Struct, frozen=True):
    listen: Listen = "127.0.0.1:8500"
    body_bytes_max: Bytes = 16 * 1024 * 1024
    drain_s: SecondsOrNone = 10.0


class StoreSettings(Struct, frozen=True):
    engine: Literal["sqlite", "dynamodb"] = "sqlite"
    path: Path = Path("data")
    """The folder of SQLite's files and of bodies."""
    table: TableName = "weft-threads"
    bucket: BucketName = ""
    queue_prefix: QueuePrefix = "weft-"
    """Before `REGION-to-TARGET`, the names of the queues."""
    aws_region: AwsRegion = ""
    """Empty: from where AWS's own tools take it."""
    endpoint_url: OptionalUrl = ""
    """Another address than AWS's own."""
    collect_every_s: Interval = 86_400.0
    """How often bodies that nothing names any more are taken out of the bucket; 0: never."""
    kms_key: str = ""
    """What objects are encrypted with; empty: as the bucket says."""
    aws_connect_s: Seconds = 2.0
    aws_read_s: Seconds = 10.0
    aws_call_s: Seconds = 20.0
    """One call with all its attempts."""
    aws_attempts: Attempts = 4
    aws_connections_max: Count = 64
    """Of each AWS service."""
    readers: Processes = 4
    """Connections that read; one more writes."""
    queue_max: Count = 4096
    """Writes that may wait."""
    queue_deadline_s: Seconds = 5.0
    body_file_bytes: Bytes = 256 * 1024
    """A larger message body is a file of its own."""
    feed_rows_max: Count = 1_000_000
    scrub_every_s: Interval = 86_400.0
    """How often all that is stored is recomputed from its entries; 0: never."""


class SyncSettings(Struct, frozen=True):
    durability: Literal["region", "quorum", "all"] = "region"
    failover: Literal["manual", "auto"] = "manual"
    failover_after_s: Seconds = 10.0
    peer_key_file: Path = Path("peer.key")
    batch_bytes_max: Bytes = 1024 * 1024
    requests_in_flight: Count = 4
    heartbeat_s: Seconds = 1.0
    pending_wait_s: SecondsOrNone = 1.0
    """How long a deletion or a narrowed visibility waits for the other regions."""
    write_timeout_s: Seconds = 10.0
    repair_every_s: Seconds = 60.0
    """How often a holder compares its groups with each other region."""
    notices_max: Count = 100_000
    """Live revocations that operators may make, and as many purges."""
    purge_life_s: Seconds = 3_600.0
    """How long a purge waits for regions that are out of reach; one that comes later has its edges drop everything."""


class EdgeSettings(Struct, frozen=True):
    listen: Listen = "127.0.0.1:8400"
    origins: tuple[Url, ...] = ()
    workers: Processes = 1
    public: tuple[PublicPrefix, ...] = ()
    trusted_proxies: tuple[Network, ...] = ()
    """Whose word on where a request comes from counts (X-Forwarded-*, Forwarded)."""
    assets: Path | None = None
    coherent_ttl_s: SecondsOrNone = 5.0
    coherent_bytes_max: Bytes = 64 * 1024 * 1024
    cache_bytes_max: Bytes = 256 * 1024 * 1024
    cache_entry_bytes_max: Bytes = 8 * 1024 * 1024
    """A larger answer is passed through and not kept."""
    cache_outage_s: SecondsOrNone = 60.0
    """How long past its time an answer may stand in for an origin that does not answer."""
    drain_s: SecondsOrNone = 10.0
    origin_timeout_s: Seconds = 30.0
    fastpath_bytes_max: BytesOrNone = 64 * 1024 * 1024
    """Answers ready to be repeated to the same bytes; 0: none, each request takes the slow path, to the same answer."""
    header_deadline_s: Seconds = 10.0
    body_deadline_s: Seconds = 30.0
    """From then on a body must have come at 1 KiB a second on average."""
    keepalive_s: Seconds = 75.0
    """How long an idle connection is kept."""
    write_deadline_s: Seconds = 30.0
    """How long a client may leave an answer unread."""
    connections_max: Count = 16_384
    connections_per_address_max: CountOrNone = 0
    """0: only the limit of all together."""


class IssuerSettings(Struct, frozen=True):
    issuer: Text
    audience: Text
    jwks_url: KeyUrl = ""
    jwks_file: Path | None = None
    algorithms: tuple[Algorithm, ...] = ("ES256", "EdDSA", "RS256")


class AuthSettings(Struct, frozen=True):
    issuers: tuple[IssuerSettings, ...] = ()
    token_life_max_s: Lifetime = 366 * 86_400.0
    """The longest life of any issuer's tokens: revocations are remembered so long, and an hour more."""


class ProviderSettings(Struct, frozen=True):
    base_url: Url
    api_key_env: str = ""
    """The name of the variable that holds the key; the key itself is never a setting."""


class ModelsSettings(Struct, frozen=True):
    providers: dict[Name, ProviderSettings] = {}


class ReposSettings(Struct, frozen=True):
    root: Path | None = None


class LogSettings(Struct, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(Struct, frozen=True):
    region: str = ""
    """One of `regions`; empty only where there are none (an edge before any HTTP server)."""
    regions: dict[Name, RegionSettings] = {}
    server: ServerSettings = ServerSettings()
    store: StoreSettings = StoreSettings()
    sync: SyncSettings = SyncSettings()
    edge: EdgeSettings = EdgeSettings()
    auth: AuthSettings = AuthSettings()
    models: ModelsSettings = ModelsSettings()
    repos: ReposSettings = ReposSettings()
    log: LogSettings = LogSettings()


def load(path: Path, environ: Mapping[str, str], *, required: Sequence[str] = ()) -> Settings:
    """The settings of the file at `path`, overridden by `environ`.

    `required` names dotted keys that this process cannot do without (`"region"`, `"edge.origins"`). Raises
    SettingsError.
    """
    source = str(path)
    tree = _read(path)
    variables = _overlay(tree, environ)
    settings = _Reader(source, Path(os.path.abspath(path)).parent, variables).struct(Settings, tree, "")
    _agree(settings, source)
    for key in required:
        value: object = settings
        for part in key.split("."):
            value = getattr(value, part)
        if value in ("", (), None):
            raise SettingsError(f"{source}: {key} is required for this command")
    return settings


def _agree(settings: Settings, source: str) -> None:
    """The rules that hold between keys."""
    if settings.region or settings.regions:
        if not settings.region:
            raise SettingsError(f"{source}: region is required; allowed: {', '.join(sorted(settings.regions))}")
        if settings.region not in settings.regions:
            allowed = ", ".join(sorted(settings.regions)) or "none, there is no [regions.NAME] table"
            raise SettingsError(f"{source}: region is {_shown(settings.region)}; allowed: {allowed}")
    sync = settings.sync
    least_s = FAILOVER_LEASES_MIN * LEASE_HEARTBEATS * sync.heartbeat_s
    if sync.failover == "auto" and sync.failover_after_s < least_s:
        raise SettingsError(
            f"{source}: sync.failover_after_s is {sync.failover_after_s:g}; allowed: at least {least_s:g}, which is "
            f"{FAILOVER_LEASES_MIN} leases of {LEASE_HEARTBEATS} times sync.heartbeat_s ({sync.heartbeat_s:g}) each, "
            "so that a holder knows that it is silent before it is replaced"
        )
    if settings.store.engine == "dynamodb" and not settings.store.bucket:
        raise SettingsError(f"{source}: store.bucket is required with store.engine 'dynamodb'; allowed: an S3 bucket")
    for index, issuer in enumerate(settings.auth.issuers):
        if bool(issuer.jwks_url) == (issuer.jwks_file is not None):
            raise SettingsError(f"{source}: auth.issuers[{index}] needs one of jwks_url and jwks_file")
        if not issuer.algorithms:
            raise SettingsError(
                f"{source}: auth.issuers[{index}].algorithms is empty; allowed: {', '.join(ALGORITHMS)}"
            )


class _Text(str):
    """A value that came from a variable: text whose type is still to be understood."""

    __slots__ = ()


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError(f"{path}: not valid TOML: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise SettingsError(f"{path}: not UTF-8 text") from exc
    except OSError as exc:
        raise SettingsError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def _overlay(tree: dict[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Lay the variables over `tree`; which key came from which variable."""
    variables: dict[str, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or ENV_SEPARATOR not in variable:
            continue
        # WEFT_STORE__PATH is store.path, WEFT__REGION is region.
        parts = variable.removeprefix(ENV_PREFIX).removeprefix("_").lower().split(ENV_SEPARATOR)
        node = tree
        path: list[str] = []
        for part in parts[:-1]:
            path.append(_spelt(part, node, path))
            below: object = node.setdefault(path[-1], {})
            if not isinstance(below, dict):
                raise SettingsError(f"{variable}: {'.'.join(path)} is not a table")
            node = cast("dict[str, Any]", below)
        path.append(_spelt(parts[-1], node, path))
        node[path[-1]] = _Text(environ[variable])
        variables[".".join(path)] = variable
    return variables


def _spelt(part: str, node: Mapping[str, Any], above: list[str]) -> str:
    """An operator's own name may have dashes, which a variable's cannot."""
    return part.replace("_", "-") if above in _NAMED_TABLES and part not in node else part


class _Reader:
    """Builds structs from plain tables, one key at a time, so that an error can name its key."""

    def __init__(self, source: str, folder: Path, variables: Mapping[str, str]) -> None:
        self._source = source
        self._folder = folder
        self._variables = variables

    def struct(self, kind: type[AnyStruct], value: object, key: str) -> AnyStruct:
        table = self._table(value, key)
        fields = {field.name: field for field in structs.fields(kind)}
        for name in table:
            if name not in fields:
                where = _join(key, name)
                raise SettingsError(f"{self._blame(where)}: {where} is not a setting; allowed: {', '.join(fields)}")
        made: dict[str, object] = {}
        for name, field in fields.items():
            where = _join(key, name)
            if name in table:
                made[name] = self._value(field.type, table[name], where)
            elif field.required:
                raise SettingsError(f"{self._blame(where)}: {where} is required; allowed: {_allowed(field.type)}")
            elif isinstance(field.default, Path):
                made[name] = self._folder / field.default
            elif _is_struct(field.type):
                made[name] = self.struct(field.type, {}, where)
        return kind(**made)

    def _value(self, annotation: Any, value: object, key: str) -> object:
        kind = _bare(annotation)
        if _is_struct(kind):
            return self.struct(kind, value, key)
        if get_origin(kind) is dict:
            name_kind, item_kind = get_args(kind)
            return {
                self._leaf(name_kind, name, f"{key} name"): self._value(item_kind, item, _join(key, name))
                for name, item in self._table(value, key).items()
            }
        if get_origin(kind) is tuple:
            item_kind = get_args(kind)[0]
            items = self._list(value, key, annotation)
            return tuple(self._value(item_kind, item, f"{key}[{index}]") for index, item in enumerate(items))
        if kind is Path:
            if not isinstance(value, str) or not value:
                raise self._refusal(annotation, value, key)
            return self._folder / Path(value).expanduser()
        return self._leaf(annotation, value, key)

    def _leaf(self, annotation: Any, value: object, key: str) -> object:
        from_variable = isinstance(value, _Text)
        try:
            plain = str(value) if from_variable else value
            converted: object = msgspec.convert(plain, annotation, strict=not from_variable)
            meta = _meta(annotation)
            return meta.extra["parse"](converted) if meta is not None and meta.extra else converted
        except ValueError as exc:  # msgspec's ValidationError is one
            raise self._refusal(annotation, value, key) from exc

    def _table(self, value: object, key: str) -> dict[str, Any]:
        found = _json(value) if isinstance(value, _Text) else value
        if not isinstance(found, dict):
            raise SettingsError(f"{self._blame(key)}: {key} is {_shown(value)}; allowed: a table")
        return cast("dict[str, Any]", found)

    def _list(self, value: object, key: str, annotation: Any) -> list[Any]:
        found: object = value
        if isinstance(value, _Text):
            parts = [_Text(part.strip()) for part in value.split(",") if part.strip()]
            found = _json(value) if value.lstrip().startswith("[") else parts
        if not isinstance(found, list):
            raise self._refusal(annotation, value, key)
        return cast("list[Any]", found)

    def _refusal(self, annotation: Any, value: object, key: str) -> SettingsError:
        return SettingsError(f"{self._blame(key)}: {key} is {_shown(value)}; allowed: {_allowed(annotation)}")

    def _blame(self, key: str) -> str:
        """The variable that set `key`, a table around it or something in it, else the file."""
        for name, variable in self._variables.items():
            if key == name or key.startswith((name + ".", name + "[")) or name.startswith(key + "."):
                return variable
        return self._source


def _json(text: str) -> object:
    try:
        return orjson.loads(str(text))  # it takes no subclass
    except orjson.JSONDecodeError:
        return None


def _is_struct(kind: Any) -> TypeGuard[type[Struct]]:
    return isinstance(kind, type) and issubclass(kind, Struct)


def _meta(annotation: Any) -> Meta | None:
    return next((part for part in get_args(annotation) if isinstance(part, Meta)), None)


def _bare(annotation: Any) -> Any:
    """The type without its description and without None."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) is UnionType:
        return next(part for part in get_args(annotation) if part is not NoneType)
    return annotation


def _allowed(annotation: Any) -> str:
    meta = _meta(annotation)
    if meta is not None and meta.description:
        return meta.description
    kind = _bare(annotation)
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return "a list of tables" if _is_struct(item) else f"a list of {_allowed(item)}"
    return {Path: "a path", str: "text"}.get(kind, "a table")


def _shown(value: object) -> str:
    text = repr(str(value) if isinstance(value, _Text) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
