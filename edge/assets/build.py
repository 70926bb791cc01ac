"""`weft assets build`: a folder of files as their authors wrote them becomes a folder that can be cached for good.

Promise: scan, resolve, name, encode, write; the manifest last, in one step. Nothing is written if a reference is
broken; a build that ends anywhere leaves every page that was there, and all it loads, whole; one with nothing changed
touches no file; the output depends on the input, the options and the versions of the tools alone. Left to others:
each of these steps, and telling people (`cli.py`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Final, Protocol

from msgspec import Struct

from edge.assets import manifest as manifests
from edge.assets import scan as scanning
from edge.assets.actions import Actions, key_of, versions
from edge.assets.encode import CODINGS, OPTIONS, SUFFIXES, encode, tool_versions
from edge.assets.graph import Issue, Node, Severity, resolve
from edge.assets.kinds import Kind, content_type, is_hashed, is_minified, kind_of, worth_encoding
from edge.assets.link import Built, Linker
from edge.assets.manifest import Asset, Encoded, Manifest, Releases
from edge.assets.scan import Scanned
from infra.clock import SYSTEM_CLOCK, Clock

BATCH_BYTES: Final = 1 << 20
POOL_BYTES_MIN: Final = 2 << 20
"""With less to scan, starting processes costs more than they save."""
KEEP: Final = 3
TEMPORARY: Final = ".weft-new-"
_SHOWN_DOT_FOLDERS: Final = frozenset({".well-known"})


class BuildError(Exception):
    """It can't be built; the text says why and what to change."""


class BrokenReferences(BuildError):
    """What refers to what is not there; nothing was written."""

    def __init__(self, issues: Sequence[Issue]) -> None:
        super().__init__(f"{len(issues)} broken reference{'s' if len(issues) != 1 else ''}")
        self.issues = tuple(issues)


class Progress(Protocol):
    def __call__(self, step: str, done: int, total: int) -> None:
        """`done` of `total` bytes of a step are through."""
        ...


class Options(Struct, frozen=True):
    base: str = "/cdn/"
    """Where the output is served: a path, or an address."""
    minify: bool = True
    codings: tuple[str, ...] = CODINGS
    strict: bool = False
    """Warnings are errors."""
    keep: int = KEEP
    """How many releases before this one keep their files."""
    workers: int = 0
    """0: as many as there are processors."""


class Result(Struct, frozen=True):
    manifest: Manifest
    before: Manifest | None
    issues: tuple[Issue, ...]
    files_written: int
    files_removed: int
    files_encoded: int
    """Whose encodings had to be made; the others were remembered."""


def build(
    source: Path,
    out: Path,
    cache: Path,
    options: Options,
    *,
    progress: Progress = lambda step, done, total: None,
    clock: Clock = SYSTEM_CLOCK,
) -> Result:
    """Build `source` into `out`. BuildError, ManifestError, CacheError, CollisionError, EncodingError, OSError."""
    source, out, cache = (Path(os.path.realpath(path)) for path in (source, out, cache))
    _check_folders(source, out, cache)
    paths, issues = _sources(source)
    actions = Actions(cache, clock=clock)
    try:
        return _Build(source, out, options, actions, progress, issues).run(paths)
    finally:
        actions.close()


class _Build:
    def __init__(
        self, source: Path, out: Path, options: Options, actions: Actions, progress: Progress, issues: list[Issue]
    ) -> None:
        self._source = source
        self._out = out
        self._options = options
        self._actions = actions
        self._progress = progress
        self._issues = issues
        self._workers = options.workers or len(os.sched_getaffinity(0))
        self._files: dict[str, str] = {}
        """A source file of each digest."""
        self._encoded = 0

    def run(self, paths: Sequence[str]) -> Result:
        nodes = self._nodes(paths)
        self._issues += resolve(nodes, self._options.base)
        self._stop_if_broken()
        linker = Linker(nodes, self._options.base, self._actions, self._read)
        linker.run()
        self._issues += linker.issues
        self._stop_if_broken()
        encodings = self._encodings(linker)
        manifest = Manifest(
            manifests.VERSION,
            self._options.base,
            {path: _asset(path, built, encodings[path]) for path, built in linker.built.items()},
        )
        self._out.mkdir(parents=True, exist_ok=True)
        with _only_one(self._out):
            return self._write(manifest, linker, nodes)

    # Looking

    def _nodes(self, paths: Sequence[str]) -> dict[str, Node]:
        self._actions.load_files(str(self._source))
        self._actions.load_files(str(self._out))
        digests: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for path in paths:
            place = os.path.join(self._source, path)
            digests[path] = self._actions.digest_of(place)
            sizes[path] = os.stat(place).st_size
            self._files[digests[path]] = place
        scans = self._scans(digests, sizes)
        return {path: Node(path, digests[path], sizes[path], scans[path]) for path in paths}

    def _scans(self, digests: dict[str, str], sizes: dict[str, int]) -> dict[str, Scanned]:
        tools = versions(scanning.TOOLS)
        found: dict[str, Scanned] = {}
        keys: dict[str, str] = {}
        for path, digest in digests.items():
            if kind_of(path) in (Kind.PLAIN, Kind.MAP):
                found[path] = Scanned()
                continue
            minify = self._options.minify and not is_hashed(path) and not is_minified(path)
            keys[path] = key_of("scan", scanning.REVISION, tools, kind_of(path).value, minify, digest)
            known = self._actions.get(keys[path], Scanned)
            if known is not None and (not known.text_digest or self._actions.blobs.has(known.text_digest)):
                found[path] = known
        missing = [path for path in digests if path not in found]
        total, done = sum(sizes[path] for path in missing), 0
        for batch, results in self._scanned(missing, sizes, total):
            for path, (scanned, text) in zip(batch, results, strict=True):
                if text is not None:
                    digest = self._actions.blobs.put(text)
                    scanned = _with_text(scanned, digest)
                self._actions.put(keys[path], scanned)
                found[path] = scanned
                done += sizes[path]
            self._progress("scan", done, total)
        for scanned in found.values():
            if scanned.text_digest:
                self._actions.used_blob(scanned.text_digest)
        return found

    def _scanned(
        self, paths: list[str], sizes: dict[str, int], total: int
    ) -> Iterator[tuple[list[str], list[tuple[Scanned, bytes | None]]]]:
        """Largest first, so that no process is left with the longest work at the end."""
        ordered = sorted(paths, key=lambda path: (-sizes[path], path))
        work = [(batch, [os.path.join(self._source, path) for path in batch]) for batch in _batches(ordered, sizes)]
        if self._workers == 1 or total < POOL_BYTES_MIN:
            for batch, places in work:
                yield batch, scan_files(batch, places, self._options.minify)
            return
        # Parsing and minifying hold the interpreter's lock; spawned processes share nothing that could be held.
        with ProcessPoolExecutor(min(self._workers, len(work)), mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(scan_files, batch, places, self._options.minify): batch for batch, places in work}
            for future in as_completed(futures):
                yield futures[future], future.result()

    def _stop_if_broken(self) -> None:
        broken = [issue for issue in self._issues if issue.severity is Severity.ERROR or self._options.strict]
        if broken:
            raise BrokenReferences(broken)

    def _read(self, digest: str) -> bytes:
        """The bytes of `digest`: a source file, or what was made of one."""
        place = self._files.get(digest)
        if place is None:
            data = self._actions.blobs.get(digest)
            if data is None:
                raise BuildError("the build's cache lost what it held a moment ago; build again")
            return data
        data = Path(place).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise BuildError(f"{place} changed while it was built; build again")
        return data

    # Encoding

    def _encodings(self, linker: Linker) -> dict[str, dict[str, Encoded]]:
        tools = tool_versions()
        keys: dict[str, str] = {}
        known: dict[str, dict[str, Encoded]] = {}
        missing: dict[str, Built] = {}
        for path, built in linker.built.items():
            if not worth_encoding(path) or not self._options.codings:
                continue
            keys[path] = key = key_of("encode", OPTIONS, tools, self._options.codings, built.summary.sha256)
            found = known.get(key) or self._actions.get(key, dict[str, Encoded])
            if found is not None and all(self._actions.blobs.has(item.sha256) for item in found.values()):
                known[key] = found
            else:
                missing.setdefault(key, built)
        self._encode(missing, linker, known)
        for encodings in known.values():
            for item in encodings.values():
                self._actions.used_blob(item.sha256)
        return {path: known[keys[path]] if path in keys else {} for path in linker.built}

    def _encode(self, missing: dict[str, Built], linker: Linker, known: dict[str, dict[str, Encoded]]) -> None:
        codings = self._options.codings
        total = sum(built.summary.size for built in missing.values()) * len(codings)
        done = 0
        self._encoded = len(missing)
        made: dict[str, dict[str, Encoded]] = {key: {} for key in missing}

        def one(built: Built, coding: str) -> Encoded | None:
            encoded = encode(linker.final(built), coding)
            return None if encoded is None else Encoded(len(encoded), self._actions.blobs.put(encoded))

        # Brotli takes most of the time, and the largest file most of that.
        order = sorted(
            ((key, built, coding) for key, built in missing.items() for coding in codings),
            key=lambda job: (job[2] != "br", -job[1].summary.size, job[0]),
        )
        with ThreadPoolExecutor(self._workers) as pool:
            jobs: dict[Future[Encoded | None], tuple[str, Built, str]] = {}
            try:
                for key, built, coding in order:
                    jobs[pool.submit(one, built, coding)] = (key, built, coding)
                for future in as_completed(jobs):
                    key, built, coding = jobs[future]
                    item = future.result()
                    if item is not None:
                        made[key][coding] = item
                    done += built.summary.size
                    self._progress("encode", done, total)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for key, found in made.items():
            known[key] = {coding: found[coding] for coding in codings if coding in found}
            self._actions.put(key, known[key])

    # Writing

    def _write(self, manifest: Manifest, linker: Linker, nodes: dict[str, Node]) -> Result:
        before = manifests.read(self._out)
        releases = manifests.read_releases(self._out)
        written = self._write_files(manifest, linker)
        others = [release for release in releases if release != manifest]
        if before is not None and before != manifest:
            others = [before, *(release for release in others if release != before)]
        kept, dropped = others[: self._options.keep], others[self._options.keep :]
        removed = 0
        # The files of a release go only after nothing names it as the current one, and its record goes last: a build
        # that ends between leaves names without files, never files without a name.
        self._write_releases(others)
        written += self._write_pages(manifest, linker, nodes)
        written += self._replace(self._out / manifests.MANIFEST, manifests.encode(manifest))
        if dropped or (before is not None and before != manifest):
            removed = self._remove(manifest, kept, [*dropped, *([before] if before is not None else [])])
        self._write_releases(kept)
        return Result(manifest, before, tuple(self._issues), written, removed, self._encoded)

    def _write_files(self, manifest: Manifest, linker: Linker) -> int:
        written = done = 0
        total = sum(asset.size for asset in manifest.files.values())
        for path, asset in sorted(manifest.files.items()):
            built = linker.built[path]
            written += self._place(asset.file, asset.sha256, lambda built=built: linker.final(built))
            for coding, item in asset.encodings.items():
                digest = item.sha256
                written += self._place(asset.file + SUFFIXES[coding], digest, lambda digest=digest: self._read(digest))
            done += asset.size
            self._progress("write", done, total)
        return written

    def _place(self, name: str, digest: str, read: Callable[[], bytes]) -> int:
        """Have the file `name` hold the bytes of `digest`; how many files that wrote."""
        place = self._out / name
        try:
            if not place.is_symlink() and self._actions.digest_of(str(place)) == digest:
                return 0
        except OSError:
            pass
        data = read()
        if hashlib.sha256(data).hexdigest() != digest:
            raise BuildError(f"what {name} is made of changed while it was built; build again")
        place.parent.mkdir(parents=True, exist_ok=True)
        _replace(place, data)
        self._actions.learn(str(place), digest)
        return 1

    def _write_pages(self, manifest: Manifest, linker: Linker, nodes: dict[str, Node]) -> int:
        """Pages under their own names too, for servers that read no manifest. All they refer to is there already."""
        return sum(
            self._place(path, asset.sha256, lambda path=path: linker.final(linker.built[path]))
            for path, asset in sorted(manifest.files.items())
            if nodes[path].is_page
        )

    def _write_releases(self, releases: Sequence[Manifest]) -> None:
        place = self._out / manifests.RELEASES
        if releases:
            self._replace(place, manifests.encode(Releases(manifests.VERSION, tuple(releases))))
        else:
            place.unlink(missing_ok=True)

    def _replace(self, place: Path, data: bytes) -> int:
        try:
            if place.read_bytes() == data:
                return 0
        except OSError:
            pass
        _replace(place, data)
        return 1

    def _remove(self, manifest: Manifest, kept: Sequence[Manifest], dropped: Sequence[Manifest]) -> int:
        needed = set[str]().union(*(manifests.files_of(release) for release in (manifest, *kept)))
        needed |= {path for path in manifest.files if kind_of(path) is Kind.HTML}
        gone = set[str]().union(
            *(
                manifests.files_of(release) | {path for path in release.files if kind_of(path) is Kind.HTML}
                for release in dropped
            )
        )
        folders: set[Path] = set()
        removed = 0
        for name in sorted(gone - needed):
            place = self._out / name
            if place.exists():
                place.unlink()
                removed += 1
            folders |= set(place.parents)
        for folder in sorted((folder for folder in folders if self._out in folder.parents), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return removed


def scan_files(paths: list[str], places: list[str], minify: bool) -> list[tuple[Scanned, bytes | None]]:
    """What is in some files; runs in a process of its own."""
    return [
        scanning.scan(Path(place).read_bytes(), path, minify=minify and not is_hashed(path))
        for path, place in zip(paths, places, strict=True)
    ]


def _with_text(scanned: Scanned, digest: str) -> Scanned:
    return Scanned(
        scanned.refs, scanned.folder_url, scanned.mapped, scanned.unparsed, scanned.differs, text_digest=digest
    )


def _asset(path: str, built: Built, encodings: dict[str, Encoded]) -> Asset:
    summary = built.summary
    return Asset(built.file, content_type(path), summary.size, summary.sha256, summary.integrity, encodings)


def _batches(paths: Iterable[str], sizes: dict[str, int]) -> list[list[str]]:
    batches: list[list[str]] = []
    size = BATCH_BYTES
    for path in paths:
        if size + sizes[path] > BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(path)
        size += sizes[path]
    return batches


def _check_folders(source: Path, out: Path, cache: Path) -> None:
    if not source.is_dir():
        raise BuildError(f"{source} is no folder")
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is no folder")
    for one, other, what in (
        (out, source, "the output would be built into the next one"),
        (source, out, "the source would be served"),
        (cache, out, "the cache would be served"),
        (cache, source, "the cache would be built"),
    ):
        if one == other or other in one.parents:
            raise BuildError(f"{one} is inside {other}: {what}; take folders beside each other")


def _sources(root: Path) -> tuple[list[str], list[Issue]]:
    """The files below `root`, and what is left out: hidden files, and what is neither file nor folder."""
    paths: list[str] = []
    issues: list[Issue] = []
    for folder, folders, files in os.walk(root):
        above = os.path.relpath(folder, root)
        prefix = "" if above == "." else above + "/"
        for name in sorted(folders):
            if os.path.islink(os.path.join(folder, name)):
                text = "a link to a folder is not followed"
                issues.append(Issue(Severity.WARNING, "left-out", prefix + name, 0, text))
        folders[:] = sorted(name for name in folders if not name.startswith(".") or name in _SHOWN_DOT_FOLDERS)
        for name in files:
            if name.startswith("."):
                continue
            path = prefix + name
            if not _is_plain(name):
                raise BuildError(f"the name {path!r} has a backslash, a control character or bytes that are not UTF-8")
            place = os.path.realpath(os.path.join(folder, name))
            if root not in Path(place).parents:
                raise BuildError(f"{path} is a link that leads out of {root}")
            if stat.S_ISREG(os.stat(place).st_mode):
                paths.append(path)
            else:
                issues.append(Issue(Severity.WARNING, "left-out", path, 0, "neither a file nor a folder"))
    return sorted(paths), issues


def _is_plain(name: str) -> bool:
    return "\\" not in name and not any(
        ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in name
    )


@contextmanager
def _only_one(folder: Path) -> Generator[None]:
    """One build writes at a time. The lock is on the folder itself, so that it leaves nothing in there."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left in folder.rglob(TEMPORARY + "*"):
            left.unlink()  # by a build that was ended
        yield
    finally:
        os.close(handle)


def _replace(place: Path, data: bytes) -> None:
    temporary = place.with_name(f"{TEMPORARY}{hashlib.sha256(place.name.encode()).hexdigest()[:16]}")
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        file.write(data)
    os.replace(temporary, place)
