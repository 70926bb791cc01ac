"""A disk whose power can be cut: what a run wrote and synced under one folder, and what of it may survive at any cut.

Promise: while a `Recorder` is entered, everything SQLite (through an apsw VFS over the real one) and Python's own file
calls do below the folder is done for real and noted in order. `Disk` plays the notes up to any point and says what may
then be found after the power came back: what was synced is there; of each write, change of size and change of a
folder that was not synced, any part may be, torn at sectors, whatever came before or after it. One recorded run gives
thousands of cuts. Left to others: hardware that lies about syncs, and damage to what was synced.

Stricter than common file systems, as POSIX allows: syncing a file does not keep its name (SQLite's own VFS syncs the
folder once after it made a journal), and a folder's name is kept only by syncing the folder that it lies in.
"""

from __future__ import annotations

import io
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from unittest import mock

import apsw

SECTOR: Final = 512
JOURNALS: Final = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_SUPER_JOURNAL


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `kind` is write, truncate, sync (of `file`); enter, remove, rename, sync folder (of
    `folder`); or mark, a moment the test names by `data`."""

    kind: str
    file: int = 0
    folder: int = 0
    name: str = ""
    to: str = ""
    offset: int = 0
    data: Any = b""


# ---------------------------------------------------------------- what may survive


@dataclass(slots=True)
class _File:
    synced: bytearray = field(default_factory=bytearray)
    pending: list[Event] = field(default_factory=list)


@dataclass(slots=True)
class _Folder:
    synced: dict[str, int] = field(default_factory=dict)
    pending: list[Event] = field(default_factory=list)


class Disk:
    """What lies on the disk after the events played so far. Files and folders are numbers; the root is 0."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._folders: dict[int, _Folder] = {0: _Folder()}

    def play(self, event: Event) -> None:
        match event.kind:
            case "write" | "truncate":
                self._files[event.file].pending.append(event)
            case "sync":
                file = self._files[event.file]
                file.synced = _written(file.synced, file.pending)
                file.pending.clear()
            case "enter" | "remove" | "rename":
                if event.kind == "enter" and event.file:
                    self._files.setdefault(event.file, _File())
                elif event.kind == "enter":
                    self._folders.setdefault(-event.offset, _Folder())
                self._folders[event.folder].pending.append(event)
            case "sync folder":
                folder = self._folders[event.folder]
                _listed(folder.synced, folder.pending)
                folder.pending.clear()

    def survivor(self, rng: random.Random, to: Path) -> None:
        """Write to the folder `to` one of the states that a power cut now may leave."""
        self._lay(0, rng, to)

    def _lay(self, number: int, rng: random.Random, to: Path) -> None:
        to.mkdir(exist_ok=True)
        folder = self._folders[number]
        names = dict(folder.synced)
        _listed(names, _some(folder.pending, rng))
        for name, node in names.items():
            if node > 0:
                file = self._files[node]
                kept = [_torn(event, rng) for event in _some(file.pending, rng)]
                (to / name).write_bytes(_written(bytearray(file.synced), [each for event in kept for each in event]))
            else:
                self._lay(node, rng, to / name)


def _some(pending: list[Event], rng: random.Random) -> list[Event]:
    """Which of the unsynced events took place."""
    match rng.randrange(4):
        case 0:
            return []
        case 1:
            return pending
        case 2:
            return pending[: rng.randrange(len(pending) + 1)]
        case _:
            share = rng.random()
            return [event for event in pending if rng.random() < share]


def _torn(event: Event, rng: random.Random) -> list[Event]:
    """A write as it reached the disk: as a rule whole, now and then only some of its sectors."""
    if event.kind != "write" or rng.random() < 0.8:
        return [event]
    start, end = event.offset, event.offset + len(event.data)
    edges = [start, *range((start // SECTOR + 1) * SECTOR, end, SECTOR), end]
    return [
        Event("write", event.file, offset=low, data=event.data[low - start : high - start])
        for low, high in pairwise(edges)
        if rng.random() < 0.5
    ]


def _written(content: bytearray, events: list[Event]) -> bytearray:
    for event in events:
        if event.kind == "truncate":
            del content[event.offset :]
            content.extend(bytes(event.offset - len(content)))
        else:
            content.extend(bytes(max(0, event.offset - len(content))))
            content[event.offset : event.offset + len(event.data)] = event.data
    return content


def _listed(names: dict[str, int], events: list[Event]) -> None:
    for event in events:
        if event.kind == "remove":
            names.pop(event.name, None)
        elif event.kind == "rename":
            names.pop(event.name, None)
            names[event.to] = event.file
        else:
            names[event.name] = event.file or -event.offset


# ---------------------------------------------------------------- recording


class Recorder:
    """Notes what happens below `root` while it is entered. `deaf` to the syncs of a path: the disk ignores them."""

    def __init__(self, root: Path, *, deaf: Callable[[Path], bool] = lambda path: False) -> None:
        self.root = root
        self.events: list[Event] = []
        self._deaf = deaf
        self._nodes: dict[Path, int] = {root: 0}
        self._count = 0
        self._unnoted: set[Path] = set()
        """Files Python writes, whose content is noted when it is synced or named anew."""
        self._patches: list[Any] = []

    def mark(self, data: object) -> None:
        self.events.append(Event("mark", data=data))

    def __enter__(self) -> Recorder:
        self._vfs = _RecordingVfs(self)
        for module, name in ((os, "fsync"), (os, "mkdir"), (os, "replace"), (os, "unlink"), (io, "open")):
            patch = mock.patch.object(module, name, getattr(self, f"_{name}")(getattr(module, name)))
            patch.start()
            self._patches.append(patch)
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self._patches:
            patch.stop()
        self._vfs.unregister()

    # ------------------------------------------------------------ notes

    def covers(self, path: Path) -> bool:
        return path.is_relative_to(self.root)

    def made(self, path: Path, *, folder: bool = False) -> None:
        self._count += 1
        self._nodes[path] = -self._count if folder else self._count
        # A folder's number goes in `offset`, a file's in `file`.
        place = {"offset": self._count} if folder else {"file": self._count}
        self.events.append(Event("enter", folder=self._nodes[path.parent], name=path.name, **place))

    def wrote(self, path: Path, offset: int, data: bytes) -> None:
        self.events.append(Event("write", self._nodes[path], offset=offset, data=data))

    def truncated(self, path: Path, size: int) -> None:
        self.events.append(Event("truncate", self._nodes[path], offset=size))

    def synced(self, path: Path) -> None:
        if not self._deaf(path):
            node = self._nodes[path]
            self.events.append(Event("sync folder", folder=node) if node <= 0 else Event("sync", node))

    def removed(self, path: Path) -> None:
        del self._nodes[path]
        self.events.append(Event("remove", folder=self._nodes[path.parent], name=path.name))

    def _note_content(self, path: Path) -> None:
        if path in self._unnoted:
            self._unnoted.discard(path)
            with open(path, "rb") as file:
                self.wrote(path, 0, file.read())

    # ------------------------------------------------------------ Python's own calls

    def _fsync(self, real: Callable[..., None]) -> Callable[..., None]:
        def fsync(descriptor: int) -> None:
            real(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if self.covers(path):
                if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    self._note_content(path)
                self.synced(path)

        return fsync

    def _mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def mkdir(path: Any, *args: Any, **more: Any) -> None:
            real(path, *args, **more)
            if self.covers(Path(path)):
                self.made(Path(path), folder=True)

        return mkdir

    def _replace(self, real: Callable[..., None]) -> Callable[..., None]:
        def replace(source: Any, target: Any) -> None:
            real(source, target)
            old, new = Path(source), Path(target)
            if not self.covers(new):
                return
            assert old.parent == new.parent, "only within a folder is a change of name one event"
            self._nodes[new] = node = self._nodes.pop(old)
            if old in self._unnoted:
                self._unnoted.discard(old)
                self._unnoted.add(new)
                self._note_content(new)
            self.events.append(Event("rename", node, self._nodes[new.parent], old.name, new.name))

        return replace

    def _unlink(self, real: Callable[..., None]) -> Callable[..., None]:
        def unlink(path: Any, **more: Any) -> None:
            real(path, **more)
            if Path(path) in self._nodes:
                self.removed(Path(path))

        return unlink

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def open_(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            file = real(path, mode, *args, **more)
            if isinstance(path, Path) and self.covers(path) and mode != "rb":
                assert mode == "wb", "only whole files are written here"
                self.made(path)
                self._unnoted.add(path)
            return file

        return open_


class _RecordingVfs(apsw.VFS):
    """The system's own VFS, and for as long as it is registered the default one."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__("recording", "unix", makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        path = Path(name.filename() if isinstance(name, apsw.URIFilename) else name or "")
        if not self._recorder.covers(path):
            return apsw.VFSFile("unix", name, flags)
        new = not path.exists()
        # As unixOpen decides it: whether the file was there does not matter.
        names_too = bool(flags[0] & JOURNALS and flags[0] & apsw.SQLITE_OPEN_CREATE)
        file = _RecordingFile(self._recorder, name, flags, path, names_too=names_too)
        if new:
            self._recorder.made(path)
        return file

    def xDelete(self, filename: str, syncdir: bool) -> None:
        path = Path(filename)
        if not path.exists():
            return  # SQLite takes that for deleted; as an exception it would come out of its next call
        super().xDelete(filename, syncdir)
        if self._recorder.covers(path):
            self._recorder.removed(path)
            if syncdir:
                self._recorder.synced(path.parent)


class _RecordingFile(apsw.VFSFile):
    def __init__(self, recorder: Recorder, name: Any, flags: list[int], path: Path, *, names_too: bool) -> None:
        self._recorder, self._path, self._names_too = recorder, path, names_too
        super().__init__("unix", name, flags)

    def xLock(self, level: int) -> None:
        try:
            super().xLock(level)
        except apsw.IOError:
            # A reader that closes last tries to lock all and can't. SQLite shrugs; as another exception than this
            # one it would come out of `close`.
            raise apsw.BusyError from None

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._recorder.wrote(self._path, offset, bytes(data))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self._recorder.truncated(self._path, newsize)

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self._recorder.synced(self._path)
        if self._names_too:
            # As unixSync does for UNIXFILE_DIRSYNC.
            self._recorder.synced(self._path.parent)
            self._names_too = False
