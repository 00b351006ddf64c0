"""Ask a model many requests, over replicas, and keep every answer on disk as it comes.

Batches are a function of the requests alone: sorted by length, cut at BATCH_ROWS and BATCH_TOKENS, and
dealt out to the ranks in turn. So every request is computed in the same batch whatever the number of
replicas and whatever was answered before a stop, and figures are the same to the last bit where a
replica has the same number of threads.

Each rank appends to a file of its own, `answers-RANK.jsonl`, a line an answer; a torn line is passed
over. After a barrier rank 0 reads all files: the folder has to be seen by every rank. No tensor
travels.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from unisono.errors import ConfigError, UnisonoError
from unisono.evaluate import model as model_module
from unisono.evaluate.items import Answer, Generation, Likelihood, Request, key_of
from unisono.evaluate.model import Loaded, Source
from unisono.files import JsonLines, read_lines, write_json
from unisono.sync.ledger import Group
from unisono.train.together import attempt

BATCH_ROWS = 16
BATCH_TOKENS = 4096
"""Of a batch, padding counted; one request may be longer."""
IDENTITY = "eval.json"
Batch = Sequence[tuple[str, Request]]


def batches_of(requests: Mapping[str, Request]) -> list[Batch]:
    """Likelihoods first, longest first: memory that runs out does so at once."""
    rows = sorted(requests.items(), key=lambda kr: (_limit(kr[1]), -len(kr[1].tokens), kr[0]))
    batches: list[Batch] = []
    batch: list[tuple[str, Request]] = []
    for key, request in rows:
        if batch:
            longest = len(batch[0][1].tokens) + max(0, _limit(request))
            full = len(batch) == BATCH_ROWS or longest * (len(batch) + 1) > BATCH_TOKENS
            if full or _limit(batch[0][1]) != _limit(request):
                batches.append(batch)
                batch = []
        batch.append((key, request))
    return [*batches, batch] if batch else batches


def ask(
    source: Source,
    requests: Sequence[Request],
    folder: Path,
    group: Group,
    load: Callable[[], Loaded],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Answer]:
    """Collective: every answer by key, known ones from `folder`; only rank 0 is sure to have all.

    `load` is called when there is something to ask. Raises ConfigError when the folder holds another
    model's answers. Every rank must call with the same requests.
    """
    wanted = {key_of(request): request for request in requests}
    attempt(group, lambda: _own(folder, source), mine=group.rank == 0)
    known = _read(folder)
    left = [b for b in batches_of(wanted) if any(key not in known for key, _ in b)]
    group.barrier()  # everyone has read before anyone adds: all see the same batches left

    def work() -> None:
        if not left:
            return
        loaded = load()
        with JsonLines(folder / f"answers-{group.rank}.jsonl") as file:
            for round_, batch in enumerate(left[group.rank :: group.size]):
                for (key, _), answer in zip(batch, _answer(loaded, batch), strict=True):
                    file.append({"key": key, **vars(answer)})
                progress(min(len(left), (round_ + 1) * group.size), len(left))

    attempt(group, work)
    known = _read(folder)
    missing = sum(key not in known for key in wanted)
    if missing and group.rank == 0:
        raise UnisonoError(
            f"{folder}: {missing} of {len(wanted)} answers are not there; does every replica see this folder?"
        )
    return {key: known[key] for key in wanted if key in known}


def _answer(loaded: Loaded, batch: Batch) -> list[Answer]:
    asked = [request for _, request in batch]
    if isinstance(asked[0], Likelihood):
        return model_module.likelihoods(loaded, [r for r in asked if isinstance(r, Likelihood)])
    return model_module.generations(loaded, [r for r in asked if isinstance(r, Generation)])


def _limit(request: Request) -> int:
    return request.most if isinstance(request, Generation) else -1


def _own(folder: Path, source: Source) -> None:
    """Make the folder this model's. Raises ConfigError when it is another's."""
    identity = folder / IDENTITY
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = json.loads(identity.read_bytes()).get("digest")
    except FileNotFoundError:
        write_json(identity, {"model": source.name, "digest": source.digest})
        return
    except (ValueError, AttributeError):
        found = "unreadable"
    if found != source.digest:
        raise ConfigError(
            f"{identity}: answers of another model ({found}, not {source.digest}); choose another --output"
        )


def _read(folder: Path) -> dict[str, Answer]:
    """Answers by key; a line that is no answer is no answer: it will be asked again."""
    known = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for row in read_lines(path):
            key, tokens, logp, text, ended = (row.get(n) for n in ("key", "tokens", "logp", "text", "ended"))  # fmt: skip
            if (
                isinstance(key, str) and isinstance(tokens, int) and isinstance(logp, float)
                and isinstance(text, str) and isinstance(ended, bool)
            ):  # fmt: skip
                known[key] = Answer(tokens, logp, text, ended)
    return known
