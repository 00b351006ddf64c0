"""lm-eval's own tasks, through the extra `lm-eval`: its figures, untouched, on one replica."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisono.errors import ConfigError, UnisonoError
from unisono.evaluate import model as model_module
from unisono.files import write_json


def harness(
    model: str, tasks: Sequence[str], limit: int | None, dtype: str, device: str, json_file: Path | None
) -> dict[str, Any]:  # fmt: skip
    """Run tasks by name, or by the path of a task's YAML file, and print lm-eval's table."""
    source = model_module.find(model)
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise ConfigError("--lm-eval: lm-eval is not installed: pip install 'unisono[lm-eval]'") from None  # fmt: skip
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = sorted({str(Path(t).parent) for t in tasks if t.endswith(".yaml")})
    names = [Path(t).stem if t.endswith(".yaml") else t for t in tasks]
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=source.path, dtype=dtype, device=device, batch_size=8),
            tasks=names, limit=limit, task_manager=TaskManager(include_path=folders or None),
        )  # fmt: skip
    except (KeyError, ValueError, OSError) as error:
        raise UnisonoError(f"--lm-eval {' '.join(tasks)}: {' '.join(str(error).split())[:300]}") from None  # fmt: skip
    print(make_table(found))
    kept = {k: found[k] for k in ("results", "n-samples", "versions") if k in found}
    if json_file is not None:
        write_json(json_file, kept)
    return kept
