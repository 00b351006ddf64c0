"""The configuration's own documentation, read from the literals under its fields."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unisono import config as config_module


@dataclass(frozen=True)
class FieldDoc:
    name: str
    """Dotted, as in YAML and overrides."""
    kind: str
    default: str
    """Empty when the field must be given."""
    text: str


def fields() -> Iterator[FieldDoc]:
    """Every field that a configuration can have, in the order of the source."""
    tree = ast.parse(Path(config_module.__file__).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    yield from _of(classes["Config"], "")
    yield from _of(classes["DataConfig"], "data.")
    yield from _of(classes["TokenizerConfig"], "tokenizer.")
    yield from _of(classes["LoraConfig"], "lora.")
    yield from _of(classes["DpoConfig"], "dpo.")
    yield from _of(classes["RewardConfig"], "reward.")
    yield from _of(classes["MeshConfig"], "mesh.")
    yield from _of(classes["ContextConfig"], "context.")
    yield from _of(classes["AttentionConfig"], "attention.")


def _of(section: ast.ClassDef, prefix: str) -> Iterator[FieldDoc]:
    for node, after in zip(section.body, [*section.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
        value = node.value
        if isinstance(value, ast.Call):  # Field(default, bounds)
            value = value.args[0] if value.args else None
        default = "" if value is None else ast.unparse(value)
        yield FieldDoc(prefix + node.target.id, ast.unparse(node.annotation), default, text)
