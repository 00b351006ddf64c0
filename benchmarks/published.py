"""Published runs as settings of the cost model: which rows state enough, and what they state.

A row qualifies if it is a transformer language model (decoder or encoder) trained by data parallelism
alone (DDP, ZeRO, FSDP, HSDP; no tensor, pipeline, context or expert axis) on a device of our table, and
states: number of devices, layers and hidden size (or a well-known model's name), sequence length, precision, micro-batch or global batch,
and a steady-state throughput or step time. Not qualified, because what they do is not stated in numbers
or is another method: offload to the host, compressed gradients, local SGD, parts of the weights trained
(LoRA, PEFT), figures that the collection itself flags as inconsistent or as a layer-reduced proxy.
Nothing here looks at a forecast.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from unisono.forecast.architecture import Architecture, named
from unisono.forecast.compute import Recompute
from unisono.forecast.cost import Mesh, Run
from unisono.forecast.hardware import Device, find
from unisono.forecast.memory import fits, largest_micro_batch, least_recompute

Row = Mapping[str, str]

BINNED = re.compile(r"DeepLearningExamples.*PyTorch/LanguageModeling/BERT")
"""Sources whose long sequences are batched with others of like length (NVIDIA's LDDL, bins of 64 tokens;
scripts/configs/pretrain_config.sh: phase 1 unbinned, phase 2 bin_size_64): the length that the row states
is the longest, and how long a sequence is in the mean is stated nowhere."""


@dataclass(frozen=True)
class Published:
    """One qualified row."""

    id: str
    source: str
    curve: str
    device: Device
    run: Run
    tokens_per_s: float
    """Per device, as published."""
    recompute_stated: bool


def source_of(row: Row) -> str:
    """The repository or paper, without file, line and version."""
    text = row.get("source", "")
    found = re.match(
        r"(?:github\.com/|https?://github\.com/)?([\w.-]+/[\w.-]+?)(?:@|[\s#]|$)", text
    )
    return found[1].lower() if found else re.split(r"[,(\"]", text)[0].strip().lower()


def number(text: str | None) -> float | None:
    """The first number in a messy cell: 1,024, ~250k, 7B, 4.1e3; None where there is none."""
    found = re.search(r"(\d[\d,]*\.?\d*(?:e[+-]?\d+)?)\s*([kKmMbBtT]?)\b", (text or "").strip())
    if not found:
        return None
    scale = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2].lower()]
    return float(found[1].replace(",", "")) * scale


def whole(row: Row, name: str) -> int | None:
    """A count; None where the cell states none above 0."""
    value = number(row.get(name))
    return round(value) if value is not None and 1 <= value < 1e13 else None


def read(row: Row) -> Published | str:
    """The setting that a row states, or why it does not qualify, in a few words."""
    everything = " ".join(str(v) for v in row.values()).lower()
    notes, strategy = row.get("notes", "").lower(), row.get("strategy", "").lower()
    if row.get("domain", "llm") not in ("llm", "bert", ""):
        return f"domain {row['domain']}"
    if any((whole(row, axis) or 1) > 1 for axis in ("tp", "pp", "cp", "ep")):
        return "not data parallel alone"
    if not re.search(r"ddp|fsdp|hsdp|zero|data.?parallel|dp\b|horovod", strategy):
        return "strategy not stated"
    if row.get("dp_dominated", "yes") == "no":
        return "not data parallel alone"
    if "diloco" in strategy or re.search(r"1-bit|powersgd|compress", strategy):
        return "compressed or local"
    if re.search(r"\b(lora|peft|qlora)\b", everything) and "sft)" not in strategy:
        return "parts of the weights trained"
    if re.search(r"offload(?!.{0,4}(false|no\b))", notes):
        return "offload to the host"
    if re.search(r"inconsistent|proxy|layer-reduced|outlier|misprint", notes):
        return "flagged by the collection"
    if row.get("metric_scope", "steady_state") not in ("steady_state", ""):
        return "not steady state"
    device = find(row.get("gpu", ""))
    if device is not None and device.name == "H100" and re.search(r"hbm2e|500 ?w\b", everything):
        device = find("H100 96GB")
    if device is None:
        return "device unknown"
    count, sequence = whole(row, "gpu_count"), whole(row, "seq_len")
    layers, hidden = whole(row, "n_layers"), whole(row, "hidden")
    dtype = dtype_of(row.get("precision", ""))
    known = named(row.get("model", ""))
    if layers and hidden:
        model = shape(row, layers, hidden)
    elif known is not None:
        model = known
    else:
        return "shape not stated"
    if not (count and sequence):
        return "sequence or number of devices not stated"
    if sequence > 128 and BINNED.search(row.get("source", "")):
        return "sequences binned by length"
    if dtype is None:
        return "precision not stated"
    micro, batch = whole(row, "micro_batch"), whole(row, "global_batch_sequences")
    if batch is None and (tokens := whole(row, "global_batch_tokens")):
        batch = round(tokens / sequence)
    if not micro and not batch:
        return "batch not stated"
    device = in_its_node(device, row)
    run = setting(row, model, device, dtype, count, sequence, micro, batch)
    if isinstance(run, str):
        return run
    measured = throughput(row, run, count)
    if not measured:
        return "throughput not stated"
    return Published(
        row.get("id", ""), source_of(row), row.get("curve_id", ""), device, run, measured,
        bool(row.get("activation_checkpointing", "").strip()),
    )  # fmt: skip


def alike_in_curves(rows: Sequence[Published]) -> list[Published]:
    """Where recomputation is not stated, a curve keeps what its smallest count needs to fit."""
    smallest: dict[tuple[object, ...], Published] = {}
    for row in rows:
        key = curve_of(row)
        if key not in smallest or row.run.mesh.size < smallest[key].run.mesh.size:
            smallest[key] = row
    return [
        replace(
            row,
            run=replace(row.run, recompute=base.recompute, recompute_share=base.recompute_share),
        )
        if row.curve and not row.recompute_stated
        else row
        for row in rows
        for base in [smallest[curve_of(row)].run]
    ]


def curve_of(row: Published) -> tuple[object, ...]:
    run = row.run
    return (
        row.source,
        row.curve,
        row.device.name,
        run.model.layers,
        run.model.hidden,
        run.sequence,
        run.dtype,
    )


def dtype_of(text: str) -> str | None:
    """Of the matrix products."""
    text = text.lower()
    for pattern, dtype in (
        ("fp4|nvfp4", "fp4"), ("fp8|mxfp8|float8", "fp8"), ("tf32", "tf32"), ("bf16|bfloat16", "bf16"),
        ("fp16|float16|half|amp|mixed|16.bit", "fp16"), ("fp32|float32|single", "fp32"),
    ):  # fmt: skip
        if re.search(pattern, text):
            return dtype
    return None


def shape(row: Row, layers: int, hidden: int) -> Architecture:
    """The architecture; what is not stated is the family's usual."""
    name = row.get("model", "")
    bert = row.get("domain") == "bert" or "bert" in name.lower()
    family = re.search(r"llama|intern|mistral|qwen|gemma|yi|olmo|granite", name, re.IGNORECASE)
    heads = whole(row, "n_heads") or max(1, hidden // (128 if hidden >= 2048 else 64))
    ffn = whole(row, "ffn") or (round(8 / 3 * hidden) if family else 4 * hidden)
    usual = 30522 if bert else 128256 if re.search(r"llama.?-?3", name, re.I) else 32000 if family else 50257  # fmt: skip
    model = Architecture(
        name, layers, hidden, heads, whole(row, "n_kv_heads") or heads, max(1, hidden // heads), ffn,
        bool(family), whole(row, "vocab") or usual, not family, not bert, 0, 0.15 if bert else 1.0,
    )  # fmt: skip
    stated = number(row.get("params_total"))
    if stated and not bert:  # two or three matrices in the MLP: whichever the stated size says
        other = replace(model, gated=not model.gated)
        if abs(other.parameters / stated - 1) < abs(model.parameters / stated - 1) - 0.05:
            return other
    return model


def setting(
    row: Row, model: Architecture, device: Device, dtype: str, count: int, sequence: int,
    micro: int | None, batch: int | None,
) -> Run | str:  # fmt: skip
    """Strategy, mesh, batch, recomputation and software stack of a row."""
    strategy, notes = row.get("strategy", "").lower(), row.get("notes", "").lower()
    text = f"{strategy} {row.get('source', '').lower()} {row.get('model', '').lower()} {notes}"
    year = whole(row, "year") or 2024
    kind, mesh = layout(row, strategy, notes, count, device)
    fused = row.get("compile", "").lower().startswith("y") or bool(
        re.search(
            r"maxtext|paxml|jax|levanter|tpu|megatron|nemo|deepspeed|internevo|compile|apex", text
        )
    )
    unfused = "tensorflow 1" in strategy and "xla" not in strategy
    amp = "amp" in row.get("precision", "").lower() or "megatron" in text or "nemo" in text
    gradient = 4 if dtype in ("fp32", "tf32") or amp else 2
    flash = "flash" in text or (year >= 2023 and dtype not in ("fp32", "tf32"))
    stated = row.get("activation_checkpointing", "").lower()
    recompute = recomputation(stated)
    run = Run(
        model, sequence, micro or 1, 1, mesh, kind, dtype, gradient, recompute,
        bucket_bytes=bucket(text, gradient),
        stack="fused" if fused else "unfused" if unfused else "early" if year < 2022 else "eager",
        flash=flash,
    )  # fmt: skip
    if batch:
        each = batch / count
        micro = micro or largest_micro_batch(run, max(1, round(each)), device.memory_bytes)
        if not micro:
            return "no micro-batch fits"
        accumulation = max(1, round(each / micro))
    else:
        steps = re.search(r"(?:\bga|accum\w*)\D{0,20}(\d+)", notes)
        accumulation = int(steps[1]) if steps else 1
    run = replace(run, micro_batch=micro or 1, accumulation=accumulation)
    if not stated and not fits(run, device.memory_bytes):
        run = least_recompute(run, device.memory_bytes)
    return run


def recomputation(stated: str) -> Recompute:
    """From `full`, `selective op`, `none`, `yes`, `every 2nd layer` and the like."""
    if re.match(r"no|off|false|0", stated):
        return "none"
    if re.search(r"select|\bop\b|sac|partial|every", stated):
        return "selective"
    return "full" if re.search(r"full|yes|true|\bon\b|\b1\b|all|block|layer", stated) else "none"


def bucket(text: str, gradient_bytes: int) -> float:
    """The framework's default: DeepSpeed 5e8 and Megatron 4e7 values, InternEvo 512, Horovod 128 MiB."""
    for pattern, size in (
        ("internevo", 512 * 2**20), ("deepspeed|zero", 5e8 * gradient_bytes),
        ("megatron|nemo", 4e7 * gradient_bytes), ("horovod", 128 * 2**20),
    ):  # fmt: skip
        if re.search(pattern, text):
            return size
    return 25 * 2**20


def layout(row: Row, strategy: str, notes: str, count: int, device: Device) -> tuple[str, Mesh]:
    """Our strategy's name and the mesh."""
    named_stage = re.search(r"zero[\W_]{0,2}(?:stage)?[\W_]{0,2}([123])", strategy)
    stage = whole(row, "zero_stage") or (int(named_stage[1]) if named_stage else None)
    if "shard_grad_op" in strategy:
        stage = 2
    group = re.search(r"(?:shard group|within)\s+(\d+)", f"{notes} {strategy}")
    inside = min(count, int(group[1])) if group else None
    hybrid = bool(re.search(r"hsdp|hybrid.?shard", strategy))
    if hybrid or ("fsdp" in strategy and stage != 2) or stage == 3:
        if inside is None and hybrid:
            inside = min(count, device.per_node)
        shard = inside or count
        return "fsdp", Mesh(count // shard, shard)
    if stage in (1, 2) or "zero" in strategy or "distributed" in strategy:
        name = "exact" if "distributed" in strategy else "zero2" if stage == 2 else "zero1"
        return name, Mesh(count // inside, inside) if inside else Mesh(count)
    return "ddp", Mesh(count)


def in_its_node(device: Device, row: Row) -> Device:
    """The device in the node and on the network that the row states, where it states them."""
    per_node = whole(row, "gpus_per_node")
    if per_node and device.per_node > 16:  # one link domain larger than the node
        per_node = None
    return device.with_node(per_node, node_gbit(row.get("inter_node_link", ""), per_node or device.per_node))  # fmt: skip


def node_gbit(text: str, per_node: int) -> float | None:
    """Gbit/s that a node sends, from `4 x 100 Gbit/s RoCE per node` and the like."""
    rate = r"(\d+(?:\.\d+)?)\s*(?:gbit/s|gbps|gb/s)"
    text = text.lower()
    if found := re.search(rate + r" effective", text):
        return float(found[1])
    if found := re.search(r"(\d+)\s*x\s*(?:[a-z]+\s+){0,3}" + rate, text):
        return int(found[1]) * float(found[2])
    if found := re.search(r"(\d+)\s*x\s*omni-path", text):
        return int(found[1]) * 100.0
    if found := re.search(rate, text):
        each = "per gpu" in text[found.end() :].partition("(")[0]
        return float(found[1]) * (per_node if each else 1)
    return None


def throughput(row: Row, run: Run, count: int) -> float | None:
    """Published tokens/s of one device."""
    each = number(row.get("tokens_per_s_per_gpu"))
    if each:
        return each
    step = number(row.get("step_time_s"))
    return run.tokens / step / count if step else None
