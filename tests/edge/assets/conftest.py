"""What the tests of assets share: small sites, built where nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from edge.assets.build import Options, Result, build

Site = Mapping[str, str | bytes]

TEXT = "the quick brown fox jumps over the lazy dog; " * 40
SITE: Site = {
    "index.html": '<!doctype html><link rel="stylesheet" href="css/app.css"><script type="module" src="js/app.js"></script>',
    "css/app.css": "@import 'base.css';\nbody { background: url(../img/a.svg) }\n",
    "css/base.css": f"/* {TEXT} */ a {{ color: red }}\n",
    "img/a.svg": f'<svg xmlns="http://www.w3.org/2000/svg"><desc>{TEXT}</desc></svg>',
    "js/app.js": 'import { b } from "./b.js";\nconsole.log(b, new URL("../img/a.svg", import.meta.url).href);\n',
    "js/b.js": f"export const b = '{TEXT}';\n",
}


class Workshop:
    """A source, an output and a cache beside each other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = root / "source"
        self.out = root / "out"
        self.cache = root / "cache"
        self.source.mkdir(parents=True, exist_ok=True)

    def write(self, site: Site) -> None:
        for name, content in site.items():
            path = self.source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def build(self, site: Site | None = None, **options: object) -> Result:
        if site is not None:
            self.write(site)
        return build(self.source, self.out, self.cache, Options(**{"workers": 1, **options}))

    def built(self, result: Result, path: str) -> bytes:
        return (self.out / result.manifest.files[path].file).read_bytes()

    def text(self, result: Result, path: str) -> str:
        return self.built(result, path).decode()

    def tree(self) -> dict[str, bytes]:
        return tree(self.out)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def workshops(tmp_path: Path) -> Callable[[str], Workshop]:
    return lambda name: Workshop(tmp_path / name)
