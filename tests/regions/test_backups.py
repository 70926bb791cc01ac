"""`weft backup` and `weft restore`: which stores, where to, and what they refuse."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from infra.cluster import FolderLock
from infra.development import DataFolder
from origin.store.sqlite import SqliteStore
from regions import local
from regions.backups import backup_command, restore_command
from regions.local import Plan
from tests.support.builders import create, messages
from tests.support.ports import free_port_block

NAMES = ("us-east", "eu-west")


def run(command: Any, *arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(command, [str(it) for it in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A cluster of two regions, not running, with 3 threads in one and 4 in the other."""
    plan = Plan(DataFolder(tmp_path / "data"), NAMES, free_port_block())
    local.write_files(plan, {})

    async def fill() -> None:
        for count, name in enumerate(NAMES, 3):
            store = await SqliteStore.open(plan.folder.region(name), region=name, members=NAMES)
            for number in range(count):
                await store.write(create(f"{name}-{number}", group=name, messages=messages(2)))
            await store.close()

    asyncio.run(fill())
    return plan


async def threads(folder: Path, name: str) -> int:
    store = await SqliteStore.open(folder, region=name, members=NAMES)
    try:
        assert store.standing == "learner"
        return (await store.statistics()).threads
    finally:
        await store.close()


def test_a_whole_cluster_there_and_back(plan: Plan, tmp_path: Path) -> None:
    said = run(backup_command, tmp_path / "copy", "--data", plan.folder.path).stdout
    assert "us-east: 3 threads, 9 entries" in said and "eu-west: 4 threads, 12 entries" in said
    assert {path.name for path in (tmp_path / "copy").iterdir()} == set(NAMES)
    said = run(restore_command, tmp_path / "copy", "--data", tmp_path / "new").stdout
    assert "us-east: 3 threads" in said and "eu-west: 4 threads" in said
    new = DataFolder(tmp_path / "new")
    assert [asyncio.run(threads(new.region(name), name)) for name in NAMES] == [3, 4]


def test_one_region_of_it_as_json(plan: Plan, tmp_path: Path) -> None:
    arguments = ("--data", plan.folder.path, "--region", "eu-west", "--json")
    [made] = json.loads(run(backup_command, tmp_path / "copy", *arguments).stdout)["regions"]
    assert (made["region"], made["threads"], made["entries"]) == ("eu-west", 4, 12)
    [back] = json.loads(run(restore_command, tmp_path / "copy", "--data", tmp_path / "new", "--json").stdout)["regions"]
    assert back["restored_from"] == made["incarnation"] < back["incarnation"]
    assert Path(back["path"]) == DataFolder(tmp_path / "new").region("eu-west")
    assert asyncio.run(threads(Path(back["path"]), "eu-west")) == 4


def test_one_region_out_of_a_clusters_backup(plan: Plan, tmp_path: Path) -> None:
    run(backup_command, tmp_path / "copy", "--data", plan.folder.path)
    run(restore_command, tmp_path / "copy", "--data", tmp_path / "new", "--region", "us-east")
    assert [path.name for path in DataFolder(tmp_path / "new").regions.iterdir()] == ["us-east"]


def test_a_region_by_its_settings(plan: Plan, tmp_path: Path) -> None:
    config = tmp_path / "weft.toml"
    text = plan.folder.settings_of("us-east").read_text().replace('"../', '"data/')
    config.write_text(text)
    run(backup_command, tmp_path / "copy", "--config", config)
    config.write_text(text.replace("data/regions/us-east", "elsewhere"))
    run(restore_command, tmp_path / "copy", "--config", config)
    assert asyncio.run(threads(tmp_path / "elsewhere", "us-east")) == 3


def test_what_makes_no_sense_is_misuse(plan: Plan, tmp_path: Path) -> None:
    config = plan.folder.settings_of("us-east")
    for command in (backup_command, restore_command):
        result = run(command, tmp_path, "--region", "us-east", "--config", config, status=2)
        assert "not both" in result.stderr
    assert "does not exist" in run(restore_command, tmp_path / "nothing", status=2).stderr


def test_what_can_not_be_is_one_line_that_says_why(plan: Plan, tmp_path: Path) -> None:
    data, copy = plan.folder.path, tmp_path / "copy"
    run(backup_command, copy, "--data", data)
    for arguments, why in (
        ((backup_command, copy, "--data", data), "exists and is not an empty folder"),
        (
            (backup_command, tmp_path / "a", "--data", data, "--region", "mars"),
            "no data of region 'mars', only of eu-west",
        ),
        ((backup_command, tmp_path / "a", "--data", tmp_path / "no"), "holds no region's data"),
        ((restore_command, copy, "--data", data), "is not empty"),
        ((restore_command, copy, "--data", tmp_path / "b", "--region", "mars"), "not 'mars'"),
        ((restore_command, tmp_path, "--data", tmp_path / "b"), "holds no backup"),
    ):
        stderr = run(*arguments, status=1).stderr
        assert why in stderr and stderr.count("\n") == 1, stderr
    assert {path.name for path in tmp_path.iterdir()} - {"b"} == {"data", "copy"}


def test_a_cluster_that_runs_is_not_restored_into(plan: Plan, tmp_path: Path) -> None:
    run(backup_command, tmp_path / "copy", "--data", plan.folder.path)
    with FolderLock(tmp_path / "new" / "cluster.lock"):
        result = run(restore_command, tmp_path / "copy", "--data", tmp_path / "new", status=1)
    assert "in use by process" in result.stderr
    assert not DataFolder(tmp_path / "new").regions.exists()


def test_of_a_cluster_with_one_damaged_copy_nothing_is_restored(plan: Plan, tmp_path: Path) -> None:
    run(backup_command, tmp_path / "copy", "--data", plan.folder.path)
    database = tmp_path / "copy" / "us-east" / "weft.db"
    database.write_bytes(database.read_bytes()[:-1] + b"x")
    result = run(restore_command, tmp_path / "copy", "--data", tmp_path / "new", status=1)
    assert f"{database} has other bytes" in result.stderr
    assert not DataFolder(tmp_path / "new").regions.exists()


def test_help_has_an_example() -> None:
    for command in (backup_command, restore_command):
        assert f"Example: weft {command.name} " in run(command, "--help").stdout
