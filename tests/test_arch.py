"""The structure that the design promises, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import unisono

SOURCE = Path(unisono.__file__).parent
FILES = {str(p.relative_to(SOURCE)): ast.parse(p.read_text()) for p in sorted(SOURCE.rglob("*.py"))}


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every dotted name in an expression, `a.b.c`, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node), node.lineno


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a file; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """Modules and packages of ours: unisono.sync.exact gives sync and sync.exact."""
    found = set()
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "unisono":
            found |= {".".join(parts[1:k]) for k in range(2, len(parts) + 1)}
    return found


@pytest.mark.parametrize("path", FILES)
def test_every_module_says_what_it_is(path: str) -> None:
    assert ast.get_docstring(FILES[path])


def test_the_environment_is_read_in_three_files() -> None:
    readers = {
        path
        for path, tree in FILES.items()
        for name, _ in names(tree)
        if name in ("os.environ", "os.getenv", "os.putenv", "environb", "os.environb")
    }
    assert readers == {"world.py", "launch/local.py", "cli.py"}
    assert not any("os.environ" in set(imports(t)) for t in FILES.values())


FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "torch.distributed.rpc", "torch.multiprocessing"}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "dist.rpc"}  # fmt: skip


@pytest.mark.parametrize("path", FILES)
def test_nothing_is_unpickled_or_evaluated(path: str) -> None:
    tree = FILES[path]
    assert not set(imports(tree)) & FORBIDDEN_MODULES
    used = {name for name, _ in names(tree)}
    assert not used & FORBIDDEN_NAMES
    assert not [n for n in used if "_object" in n.rpartition(".")[2] and "dist" in n]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.keyword) and node.arg == "shell":
            raise AssertionError(f"{path}:{node.value.lineno}: a shell")


def test_no_model_is_unpickled() -> None:
    """Wherever transformers loads weights, only from safetensors."""
    found = 0
    for path, tree in FILES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if not (name.startswith("AutoModel") and name.endswith(".from_pretrained")):
                continue
            found += 1
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            safe = given.get("use_safetensors") == "True" or given.get(None) == "local"
            assert safe, f"{path}:{node.lineno}"
    assert found >= 9


def test_only_synchronization_communicates() -> None:
    users = {
        path for path, tree in FILES.items() if any(m.startswith("torch.distributed") for m in imports(tree))
    }  # fmt: skip
    outside = {p for p in users if not p.startswith("sync/")}
    assert outside == {"world.py", "replicas.py"}
    used = {name for name, _ in names(FILES["replicas.py"]) if name.startswith("dist.")}
    assert used == {"dist.is_initialized"}


DOWNWARDS = {
    "errors": set(),
    "clock": set(),
    "codes": set(),
    "files": {"errors"},
    "config": {"errors"},
    "world": {"errors"},
    "launch": {"errors", "world"},
    "mesh": set(),
    "sync": {"errors", "clock", "codes", "mesh", "sync"},
    "data": {"errors", "files", "config", "data"},
    "model": {"errors", "files", "config", "model"},
    "attention": {"errors", "config", "attention", "data.blocks", "sync.ledger", "sync.link"},
    "generate": {"errors", "attention.choose", "model.quantize", "train.checkpoint", "guard"},
    "guard": {"errors", "files", "evaluate.refusals", "evaluate.toxicity"},
    "monitor": {"errors", "files", "guard", "evaluate.toxicity"},
    "evaluate": {
        "errors",
        "files",
        "world",
        "evaluate",
        "attention.choose",
        "data.preferences",
        "data.problems",
        "model.quantize",
        "sync.ledger",
        "train.checkpoint",
        "train.together",
        "observe.report",
        "observe.screen",
    },
    "replicas": {"errors", "sync", "observe"},
    "plan": {"errors", "codes", "config", "mesh", "world", "train.scaling"},
    "forecast": {"errors", "codes", "config", "forecast"},
    "observe": {
        "errors",
        "clock",
        "files",
        "config",
        "plan",
        "forecast",
        "model.quantize",
        "observe",
        "train.trial",
        "sync.ledger",
        "sync.board",
        "sync.pairs",
    },
}
"""What each part may import of ours. `train`, `probe`, `verify` and `cli` stand above all of it."""


@pytest.mark.parametrize("part", DOWNWARDS)
def test_imports_point_downwards(part: str) -> None:
    allowed = DOWNWARDS[part]
    files = [t for p, t in FILES.items() if p == f"{part}.py" or p.startswith(f"{part}/")]
    assert files
    for tree in files:
        for name in own_imports(tree):
            top = name.split(".")[0]
            whole = {a for a in allowed if a.split(".")[0] == top}
            fine = top in allowed or any(
                name in (a, top) or name.startswith(f"{a}.") for a in whole
            )
            assert fine, f"{part} imports {name}"


def test_nothing_imports_the_command() -> None:
    importers = {path for path, tree in FILES.items() if "cli" in own_imports(tree)}
    assert importers == {"__main__.py"}


@pytest.mark.parametrize("path", FILES)
def test_no_global_state(path: str) -> None:
    for node in ast.walk(FILES[path]):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"


def test_no_junk_drawers() -> None:
    drawers = {"utils", "util", "common", "base", "core", "helpers", "helper", "misc", "manager"}
    stems = {part.removesuffix(".py") for path in FILES for part in path.split("/")}
    assert not stems & drawers


# --- what communicates says so

SENDS = {"all_to_all", "all_gather", "all_reduce", "broadcast", "barrier", "each", "new_group",
         "broadcast_model", "check_replicas", "attempt", "all_to_all_single", "find_culprit", "take_step",
         "set_up", "advance", "joined"}  # fmt: skip


def communicates(function: ast.FunctionDef) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            if last in SENDS:
                return True
            if last == "sum" and ("group" in name or "votes" in name):
                return True
            if last == "finish" and ("sync" in name or "_exact" in name):
                return True
    return False


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def test_functions_that_communicate_say_so() -> None:
    checked, silent = [], []
    for path, tree in FILES.items():
        if path == "cli.py":
            continue
        for name, function in public_functions(tree):
            if communicates(function):
                checked.append(name)
                if "Collective" not in (ast.get_docstring(function) or ""):
                    silent.append(f"{path}: {name}")
    assert not silent
    assert {"Exact.finish", "Reference.finish", "DDP.finish", "Group.sum", "check_replicas"} <= set(checked)  # fmt: skip


def test_strategies_that_make_groups_say_so() -> None:
    for path in ("exact", "reference", "ddp"):
        for node in FILES[f"sync/{path}.py"].body:
            if isinstance(node, ast.ClassDef) and "__init__" in ast.unparse(node) and "Group(" in ast.unparse(node):  # fmt: skip
                assert "Collective: every rank makes it" in (ast.get_docstring(node) or "")


def test_public_names_are_frozen() -> None:
    assert sorted(unisono.__all__) == ["World", "join", "replicate"]
    for name in unisono.__all__:
        assert getattr(unisono, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        unisono.Trainer  # noqa: B018
