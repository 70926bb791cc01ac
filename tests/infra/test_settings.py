from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from infra.settings import RegionSettings, Settings, SettingsError, host_port, load

WHOLE = """
region = "us-east"
[regions.us-east]
url = "http://127.0.0.1:8500"
[regions.eu-west]
url = "http://127.0.0.1:8501/"
[server]
listen = "127.0.0.1:8500"
[store]
engine = "sqlite"
path = "data/us-east"
table = "weft-threads"
[sync]
durability = "region"
failover = "manual"
peer_key_file = "peer.key"
[edge]
listen = "127.0.0.1:8400"
origins = ["http://127.0.0.1:8500"]
workers = 1
public = []
assets = "dist"
[[auth.issuers]]
issuer = "https://login.example"
audience = "weft"
jwks_url = "https://login.example/.well-known/jwks.json"
algorithms = ["ES256", "EdDSA", "RS256"]
[models.providers.openai]
base_url = "https://api.example/v1"
api_key_env = "OPENAI_API_KEY"
[repos]
root = "/srv/repos"
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "weft.toml"
        path.write_text(text)
        return path

    return write


def refused(path: Path, environ: dict[str, str] | None = None, required: tuple[str, ...] = ()) -> str:
    with pytest.raises(SettingsError) as caught:
        load(path, environ or {}, required=required)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "weft.toml")


def test_the_documented_file_is_read_whole(write: Write) -> None:
    path = write(WHOLE)
    settings = load(path, {"HOME": "/root", "WEFT_REQUIRE_ALL": "1"})
    assert settings.region == "us-east"
    assert settings.regions["eu-west"] == RegionSettings(url="http://127.0.0.1:8501")
    assert settings.store.path == path.parent / "data/us-east"
    assert settings.sync.peer_key_file == path.parent / "peer.key"
    assert settings.edge.assets == path.parent / "dist"
    assert settings.edge.origins == ("http://127.0.0.1:8500",)
    assert settings.auth.issuers[0].algorithms == ("ES256", "EdDSA", "RS256")
    assert settings.models.providers["openai"].api_key_env == "OPENAI_API_KEY"
    assert settings.repos.root == Path("/srv/repos")


def test_an_empty_file_is_all_defaults_and_a_proxy_needs_little_more(write: Write) -> None:
    settings = load(write(""), {})
    assert settings.region == ""
    assert settings.server.listen == "127.0.0.1:8500"
    assert settings.server.body_bytes_max == 16_777_216
    assert settings.store.path.is_absolute()
    assert settings.edge.assets is None
    proxy = load(write('[edge]\npublic = ["/"]\norigins = ["http://127.0.0.1:9000"]\n'), {})
    assert proxy.edge.public == ("/",)


def test_settings_cannot_be_changed(write: Write) -> None:
    settings = load(write(""), {})
    with pytest.raises(AttributeError):
        settings.region = "x"  # type: ignore[misc]


def test_relative_paths_are_relative_to_the_file_and_not_to_the_caller(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write('[store]\npath = "data"\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(Path("../weft.toml"), {}).store.path == tmp_path / "data"
    assert load(Path("../weft.toml"), {"WEFT_STORE__PATH": "other"}).store.path == tmp_path / "other"


def test_a_path_may_begin_at_home(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert load(write('[store]\npath = "~/threads"\n'), {}).store.path == Path("/home/ada/threads")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[store]\npth = "x"',
            "weft.toml: store.pth is not a setting; allowed: engine, path, table, bucket, queue_prefix, ",
        ),
        ("[stores]", "weft.toml: stores is not a setting; allowed: region, regions, server, store, "),
        ("[regions.a]\nurls = 1", "weft.toml: regions.a.urls is not a setting; allowed: url"),
        ("[[auth.issuers]]\nx = 1", "weft.toml: auth.issuers[0].x is not a setting; allowed: issuer, "),
        ("[store]\nreaders = 0", "weft.toml: store.readers is 0; allowed: a whole number from 1 to 256"),
        (
            "[store]\nreaders = true",
            "weft.toml: store.readers is True; allowed: a whole number from 1 to 256",
        ),
        ('[store]\nreaders = "4"', "weft.toml: store.readers is '4'; allowed: a whole number from 1 to 256"),
        ('[store]\nengine = "mysql"', "weft.toml: store.engine is 'mysql'; allowed: sqlite, dynamodb"),
        ('[store]\nbucket = "My_Bucket"', "weft.toml: store.bucket is 'My_Bucket'; allowed: 3 to 63 lower-case"),
        ('[store]\ntable = "a b"', "weft.toml: store.table is 'a b'; allowed: 3 to 255 letters"),
        ('[store]\naws_region = "mars"', "weft.toml: store.aws_region is 'mars'; allowed: an AWS region such as"),
        (
            '[store]\nengine = "dynamodb"',
            "weft.toml: store.bucket is required with store.engine 'dynamodb'; allowed: an S3 bucket",
        ),
        ('[store]\npath = ""', "weft.toml: store.path is ''; allowed: a path"),
        ("store = 3", "weft.toml: store is 3; allowed: a table"),
        ('[sync]\ndurability = "most"', "weft.toml: sync.durability is 'most'; allowed: region, quorum, all"),
        ("[sync]\nheartbeat_s = 0", "weft.toml: sync.heartbeat_s is 0; allowed: seconds, over 0 and at most"),
        ("[sync]\nheartbeat_s = inf", "weft.toml: sync.heartbeat_s is inf; allowed: seconds, over 0"),
        ("[sync]\nheartbeat_s = nan", "weft.toml: sync.heartbeat_s is nan; allowed: seconds, over 0"),
        (
            '[server]\nlisten = "8500"',
            "weft.toml: server.listen is '8500'; allowed: host:port, the port from",
        ),
        ('[server]\nlisten = "h:70000"', "weft.toml: server.listen is 'h:70000'; allowed: host:port"),
        (
            '[edge]\norigins = ["ftp://x"]',
            "weft.toml: edge.origins[0] is 'ftp://x'; allowed: an http:// or https:// address",
        ),
        ('[edge]\norigins = "http://x"', "weft.toml: edge.origins is 'http://x'; allowed: a list of an http"),
        ('[edge]\npublic = ["/v1/x"]', "weft.toml: edge.public[0] is '/v1/x'; allowed: path prefixes that"),
        ('[edge]\npublic = ["img"]', "weft.toml: edge.public[0] is 'img'; allowed: path prefixes that begin"),
        (
            '[regions."a b"]\nurl = "http://x"',
            "weft.toml: regions name is 'a b'; allowed: lower-case letters",
        ),
        ("[regions.a]", "weft.toml: regions.a.url is required; allowed: an http:// or https:// address"),
        ('region = "x"', "weft.toml: region is 'x'; allowed: none, there is no [regions.NAME] table"),
        ('[regions.a]\nurl="http://x"', "weft.toml: region is required; allowed: a"),
        (
            'region = "c"\n[regions.b]\nurl="http://x"\n[regions.a]\nurl="http://x"',
            "weft.toml: region is 'c'; allowed: a, b",
        ),
        (
            '[[auth.issuers]]\nissuer="i"\naudience="a"\njwks_file="j"\nalgorithms=["none"]',
            "weft.toml: auth.issuers[0].algorithms[0] is 'none'; allowed: among ES256, ",
        ),
        (
            '[[auth.issuers]]\nissuer="i"\naudience="a"\njwks_url="file:///keys.json"',
            "weft.toml: auth.issuers[0].jwks_url is 'file:///keys.json'; allowed: an https:// address (http:// of",
        ),
        (
            '[[auth.issuers]]\nissuer="i"\naudience="a"',
            "weft.toml: auth.issuers[0] needs one of jwks_url and jwks_file",
        ),
        (
            '[[auth.issuers]]\nissuer="i"\naudience="a"\njwks_file="j"\nalgorithms=[]',
            "weft.toml: auth.issuers[0].algorithms is empty; allowed: ES256",
        ),
        ('[log]\nlevel = "loud"', "weft.toml: log.level is 'loud'; allowed: debug, info, warning, error"),
        ("x = ", "weft.toml: not valid TOML: "),
    ],
)
def test_a_mistake_is_one_line_with_the_key_the_value_and_what_is_allowed(
    write: Write, text: str, message: str
) -> None:
    assert refused(write(text)).startswith(message)


def test_the_address_of_keys_is_kept_to_the_letter(write: Write) -> None:
    url = "https://login.example/keys/?p=policy"
    settings = load(write(f'[[auth.issuers]]\nissuer="i"\naudience="a"\njwks_url="{url}"'), {})
    assert settings.auth.issuers[0].jwks_url == url


def test_a_file_that_is_missing_or_not_text_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "weft.toml"
    assert refused(path) == "weft.toml: cannot be read: No such file or directory"
    path.write_bytes(b"\xff\xfe")
    assert refused(path) == "weft.toml: not UTF-8 text"
    assert "Is a directory" in refused(tmp_path)


def test_variables_override_the_file_and_take_the_type_of_their_key(write: Write) -> None:
    settings = load(
        write(WHOLE),
        {
            "WEFT__REGION": "eu-west",
            "WEFT_STORE__ENGINE": "dynamodb",
            "WEFT_STORE__BUCKET": "weft-bodies",
            "WEFT_STORE__READERS": "8",
            "WEFT_SYNC__HEARTBEAT_S": "0.25",
            "WEFT_REGIONS__EU_WEST__URL": "https://eu.example",
            "WEFT_REGIONS__AP_SOUTH__URL": "https://ap.example",
            "WEFT_EDGE__ORIGINS": "http://a:1, http://b:2",
            "WEFT_EDGE__PUBLIC": '["/img", "/css"]',
            "WEFT_MODELS__PROVIDERS__OPENAI__BASE_URL": "https://other.example/v1",
            "WEFT_AUTH__ISSUERS": '[{"issuer":"i","audience":"a","jwks_file":"keys.json"}]',
        },
    )
    assert settings.region == "eu-west"
    assert settings.store.engine == "dynamodb"
    assert settings.store.readers == 8
    assert settings.sync.heartbeat_s == 0.25
    assert {name: region.url for name, region in settings.regions.items()} == {
        "us-east": "http://127.0.0.1:8500",
        "eu-west": "https://eu.example",
        "ap-south": "https://ap.example",
    }
    assert settings.edge.origins == ("http://a:1", "http://b:2")
    assert settings.edge.public == ("/img", "/css")
    assert settings.models.providers["openai"].base_url == "https://other.example/v1"
    assert [issuer.issuer for issuer in settings.auth.issuers] == ["i"]


def test_a_list_can_be_emptied_by_a_variable(write: Write) -> None:
    assert load(write(WHOLE), {"WEFT_EDGE__ORIGINS": ""}).edge.origins == ()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WEFT_STORE__PTH", "x", "WEFT_STORE__PTH: store.pth is not a setting; allowed: engine, path"),
        ("WEFT_STOR__PATH", "x", "WEFT_STOR__PATH: stor is not a setting; allowed: region"),
        ("WEFT_STORE__READERS", "many", "WEFT_STORE__READERS: store.readers is 'many'; allowed: a whole"),
        ("WEFT_STORE__READERS__X", "1", "WEFT_STORE__READERS__X: store.readers is not a table"),
        ("WEFT_EDGE__ORIGINS", "http://a,b", "WEFT_EDGE__ORIGINS: edge.origins[1] is 'b'; allowed: an http"),
        ("WEFT_EDGE__ORIGINS", "[oops", "WEFT_EDGE__ORIGINS: edge.origins is '[oops'; allowed: a list of"),
        ("WEFT_AUTH__ISSUERS", '[{"x":1}]', "WEFT_AUTH__ISSUERS: auth.issuers[0].x is not a setting"),
        ("WEFT_REGIONS", "x", ""),
    ],
)
def test_a_mistake_in_a_variable_is_blamed_on_the_variable(
    write: Write, variable: str, value: str, message: str
) -> None:
    path = write('[store]\nreaders = 4\n[regions.a]\nurl="http://x"\n')
    if not message:
        assert load(path, {variable: value, "WEFT__REGION": "a"}).region == "a"
        return
    assert refused(path, {variable: value}).startswith(message)


def test_a_silence_shorter_than_two_leases_is_refused_where_it_would_move_groups(write: Write) -> None:
    text = '[sync]\nheartbeat_s = 2\nfailover_after_s = 11.9\nfailover = "{}"\n'
    message = refused(write(text.format("auto")))
    assert message.startswith("weft.toml: sync.failover_after_s is 11.9; allowed: at least 12")
    assert "sync.heartbeat_s (2)" in message
    assert load(write(text.format("auto")), {"WEFT_SYNC__FAILOVER_AFTER_S": "12"}).sync.failover_after_s == 12
    assert load(write(text.format("manual")), {}).sync.failover_after_s == 11.9, "nobody is replaced by itself"


def test_what_a_command_cannot_do_without_is_named(write: Write) -> None:
    assert refused(write(""), required=("region",)) == "weft.toml: region is required for this command"
    assert refused(write(""), required=("edge.origins",)) == "weft.toml: edge.origins is required for this command"
    assert load(write(WHOLE), {}, required=("region", "edge.origins", "repos.root")).region == "us-east"


@pytest.mark.parametrize(
    ("listen", "parts"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:8500", ("::1", 8500)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_an_address_splits_into_host_and_port(listen: str, parts: tuple[str, int]) -> None:
    assert host_port(listen) == parts


@pytest.mark.parametrize(
    "listen", ["", ":80", "host", "host:", "host:-1", "::1:80", "host:8e3", "host:٨", "host:65536"]
)
def test_what_is_no_address_is_a_value_error(listen: str) -> None:
    with pytest.raises(ValueError, match="no "):
        host_port(listen)


def test_every_setting_has_a_word_on_what_is_allowed() -> None:
    """A field whose kind the reader cannot describe would fail with a useless message."""
    from infra.settings import _allowed, _bare, _is_struct  # type: ignore[attr-defined]

    def walk(kind: type[msgspec.Struct], where: str) -> list[str]:
        found: list[str] = []
        for field in msgspec.structs.fields(kind):
            bare = _bare(field.type)
            if _is_struct(bare):
                found += walk(bare, f"{where}{field.name}.")
            elif not _allowed(field.type) or (_allowed(field.type) == "a table" and "dict" not in str(bare)):
                found.append(where + field.name)
        return found

    assert walk(Settings, "") == []
