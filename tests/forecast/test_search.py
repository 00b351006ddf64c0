"""The search, the outlook and the knee: what is tried, what fits, what is recommended."""

from dataclasses import replace

import pytest

from unisono.config import Config
from unisono.errors import ConfigError
from unisono.forecast.architecture import NAMED
from unisono.forecast.constants import DEFAULT, UNCERTAINTY
from unisono.forecast.cost import Mesh
from unisono.forecast.hardware import device
from unisono.forecast.network import Fabric, Line, fabric, wire
from unisono.forecast.outlook import (
    as_json,
    job_of,
    knee,
    outlook,
    parse_devices,
    parse_link,
    parse_tokens,
    uncertainty,
)
from unisono.forecast.search import (
    Job,
    Machine,
    counts,
    meshes,
    name_of,
    overrides,
    required_link,
    runs_here,
    search,
)
from unisono.forecast.show import at_knee, bends


def machine(name: str = "H100", **node: float) -> Machine:
    d = device(name).with_node(**node)  # type: ignore[arg-type]
    return Machine(d, fabric(d))


LLAMA = Job(NAMED["llama-7b"], 2048, 1024)


def test_every_option_fits_divides_and_is_ranked() -> None:
    found = search(LLAMA, machine(), 64)
    speeds = [o.tokens_per_s for o in found.options]
    assert speeds == sorted(speeds, reverse=True)
    names = [o.name for o in found.options]
    assert len(names) == len(set(names))
    for o in found.options:
        mesh = o.run.mesh
        assert mesh.size == 64
        assert o.memory.total <= DEFAULT.usable_memory * 80e9
        assert NAMED["llama-7b"].heads % mesh.tensor == 0 and mesh.tensor <= 8
        assert o.run.accumulation * o.run.micro_batch * mesh.data >= o.batch
    assert "ddp 64" in [m.name for m in found.misfits]
    assert all("GB" in m.reason for m in found.misfits)


@pytest.mark.parametrize("name", ["gpt2", "llama-7b", "llama3-70b"])
def test_the_search_stays_small(name: str) -> None:
    """Two seconds at 20 us a step are a hundred thousand steps."""
    job = Job(NAMED[name], 8192, 1024)
    evaluated = sum(search(job, machine(), n).evaluated for n in counts(1, 1024))
    assert 100 < evaluated < 30_000


def test_counts_cover_a_range_and_keep_its_ends() -> None:
    assert counts(1, 16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert counts(5, 20) == [5, 6, 8, 12, 16, 20]


def test_meshes_respect_the_model() -> None:
    grouped = Job(NAMED["llama3-8b"], 8192, 64)
    for mesh in meshes(grouped, device("H100"), 64):
        assert mesh.size == 64
        assert NAMED["llama3-8b"].kv_heads % mesh.tensor == 0
        assert NAMED["llama3-8b"].layers % mesh.pipeline == 0
    assert all(m.context == 1 for m in meshes(LLAMA, device("H100"), 64))


def test_the_batch_stays_until_replicas_need_more() -> None:
    job = Job(NAMED["gpt2"], 1024, 32)
    assert {o.batch for o in search(job, machine(), 16).options} == {32}
    (widest,) = [o for o in search(job, machine(), 64).options if o.name == "exact 64"]
    assert widest.batch == 64
    weak = search(replace(job, per_device=8), machine(), 64)
    assert {o.batch for o in weak.options} == {512}


def test_faster_links_are_never_worse() -> None:
    speeds = [search(LLAMA, machine(node_gbit=g), 64).options[0].tokens_per_s for g in (10, 100, 1600, 3200)]  # fmt: skip
    assert speeds == sorted(speeds)


def test_what_unisono_runs_is_said_as_overrides() -> None:
    found = search(LLAMA, machine(), 64)
    ours = next(o for o in found.options if runs_here(o.run))
    assert ours.run.mesh.pipeline == 1
    items = overrides(ours).split()
    fields = {"model": "llama-7b", "data": {"path": "x"}, "output_dir": "y"}
    from unisono.config import apply_overrides, parse

    config = parse(apply_overrides(fields, items))
    assert config.sync in ("exact", "ddp", "sharded")
    assert config.global_batch_size == ours.batch
    assert (config.mesh.tensor if config.mesh else 1) == ours.run.mesh.tensor
    assert not runs_here(replace(ours.run, mesh=Mesh(8, pipeline=2)))
    assert name_of(replace(ours.run, strategy="fsdp", mesh=Mesh(2, 8, 4))) == "hsdp 2 x 8, tensor 4"


def test_the_required_link_gives_what_it_promises() -> None:
    job, here = Job(NAMED["gpt2"], 1024, 512), machine("A100", node_gbit=10)
    option = next(o for o in search(job, here, 16).options if o.name == "exact 16")
    assert option.step.communication / option.step.total > 0.05
    rate = required_link(option, here)
    assert rate is not None
    assert rate > here.device.node_bytes_per_s
    better = replace(here, fabric=replace(here.fabric, node={k: Line(v.hop_s, rate) for k, v in here.fabric.node.items()}))  # fmt: skip
    again = next(o for o in search(replace(job, bucket_bytes=option.run.bucket_bytes, micro_batch=option.run.micro_batch), better, 16).options if o.name == "exact 16")  # fmt: skip
    assert again.step.communication / again.step.total == pytest.approx(0.05, rel=0.01)


def test_no_link_helps_against_latency() -> None:
    here = machine("A100")
    slow = Machine(here.device, Fabric(8, here.fabric.link, {k: Line(0.1, v.bytes_per_s) for k, v in here.fabric.node.items()}, 0.1))  # fmt: skip
    option = search(Job(NAMED["gpt2"], 1024, 64), slow, 16).options[0]
    assert required_link(option, slow) is None


def test_an_outlook_adds_up() -> None:
    found = outlook(Job(NAMED["gpt2"], 1024, 512), machine("A100", node_gbit=25), counts(1, 256), 1e9, 2.0)  # fmt: skip
    for p in found.points:
        assert p.hours == pytest.approx(1e9 / p.option.tokens_per_s / 3600)
        assert p.usd == pytest.approx(p.hours * p.devices * 2.0)
        assert p.kwh == pytest.approx(p.hours * p.devices * 0.4)
        assert p.low < p.option.tokens_per_s < p.high
        assert 0 < p.efficiency <= 1
    bend = knee(found)
    kept = [bend.efficiency[k] or 10**9 for k in ("95%", "90%", "85%")]
    assert kept == sorted(kept)
    assert kept[0] < 256, "25 Gbit/s a node is too little for 256 devices"
    over = [p.devices for p in found.points if p.option.batch * 1024 > found.critical_tokens]
    assert bend.batch_passes_critical == (over[0] if over else None)
    plain = as_json(found)
    assert len(plain["points"]) == len(found.points)
    assert plain["points"][0]["parts_s"]["compute"] > 0


def test_efficiency_is_against_smaller_numbers_that_were_not_asked_for() -> None:
    job, slow = Job(NAMED["gpt2"], 1024, 512), machine("A100", node_gbit=1)
    every = outlook(job, slow, [1, 8, 64], 1e9, 2.0).points[-1].efficiency
    alone = outlook(job, slow, [64], 1e9, 2.0)
    assert alone.points[0].efficiency == pytest.approx(every, rel=0.02)
    assert every < 0.5
    assert knee(alone).efficiency["85%"] == 0
    assert at_knee(alone, knee(alone)).devices == 64
    assert any("none of them has 85% efficiency" in line for line in bends(alone, knee(alone)))


def test_nothing_fits_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"nothing fits on 2 x V100 16GB: needs [\d.]+ GB of 14\.7 GB"
    ):
        outlook(Job(NAMED["llama3.1-405b"], 4096, 64), machine("V100"), [1, 2], 1e9, None)


def test_a_configuration_becomes_a_job() -> None:
    raw = {"model": {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "intermediate_size": 96},
           "tokenizer": {"vocab_size": 512}, "data": {"path": "x"}, "output_dir": "y",
           "wire": "bfloat16", "micro_batch_size": 4, "bucket_mb": 2}  # fmt: skip
    job = job_of(Config.model_validate(raw))
    assert (job.model.vocab, job.gradient_bytes, job.micro_batch, job.dtype) == (512, 2, 4, "fp32")
    assert job.bucket_bytes == 2 * 2**20
    found = search(job, machine("A100"), 4)
    assert {o.run.micro_batch for o in found.options} == {4}


def test_published_hardware_is_less_certain_than_nothing_measured() -> None:
    option = search(LLAMA, machine(), 8).options[0]
    assert uncertainty(option, machine()) == UNCERTAINTY


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("100Gbit", 12.5e9), ("12.5GB/s", 12.5e9), ("800 Mbit/s", 1e8), ("1gbps", 1.25e8), ("2 TB/s", 2e12)],
)  # fmt: skip
def test_links_in_any_spelling(text: str, bytes_per_s: float) -> None:
    assert parse_link(text) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    ("parse", "bad", "message"),
    [(parse_link, "fast", "--link: found 'fast'"), (parse_link, "0Gbit", "--link"),
     (parse_link, "1.2.3Gbit", "--link"), (parse_devices, "many", "--devices: found 'many'"),
     (parse_devices, "8..2", "--devices"), (parse_devices, "0", "--devices"),
     (parse_tokens, "lots", "--tokens: found 'lots'"), (parse_tokens, "0", "--tokens")],
)  # fmt: skip
def test_bad_options_are_one_line(parse, bad: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(bad)
    assert "\n" not in str(caught.value)


def test_devices_and_tokens() -> None:
    assert parse_devices("16,8") == (8, 16)
    assert parse_devices("1..4") == (1, 2, 3, 4)
    assert parse_tokens("20B") == 20e9
    assert parse_tokens("3e8") == 3e8


# --- other mathematics


def slow(devices: int = 8, **job: object) -> tuple[Job, Machine]:
    """A device a node, 1 Gbit/s between them."""
    return Job(NAMED["gpt2"], 1024, 64, **job), machine("A100", per_node=1, node_gbit=1)  # type: ignore[arg-type]


def test_other_mathematics_stands_apart_and_is_never_what_is_recommended() -> None:
    job, here = slow()
    found = search(job, here, 8)
    assert [o.run.strategy for o in found.others] == ["quantized"] * 3 + ["streaming"] * 3
    assert not any(o.is_exact for o in found.others) and all(o.is_exact for o in found.options)
    speeds = [o.tokens_per_s for o in found.others]
    assert speeds == sorted(speeds)
    (point,) = outlook(job, here, [8], 1e9, 2.0).points
    assert point.option.is_exact and point.best.is_exact
    assert speeds[0] > 1.5 * point.option.tokens_per_s, "half the bytes"
    assert (point.within.name, point.within.loss_cost) == ("quantized int4 8", 0.003)
    assert "no rung keeps 95% busy within a loss of 0.50%" in point.within_why
    plain = as_json(outlook(job, here, [8], 1e9, 2.0))["points"][0]
    assert plain["exact"] and plain["strategy"] == point.option.name
    assert [o["exact"] for o in plain["other_mathematics"]] == [False] * 6
    assert not plain["within_loss_budget"]["exact"]


def test_the_loss_budget_decides_and_exact_comes_first() -> None:
    def taken(budget: float | None, gbit: float) -> str:
        job, _ = slow(loss_budget=budget)
        here = machine("A100", per_node=1, node_gbit=gbit)
        (point,) = outlook(job, here, [2], 1e9, 2.0).points
        return point.within.name

    assert taken(0.5, 1000) == "exact 2", "busy enough"
    assert taken(0.5, 1) == "streaming every 10 2"
    assert taken(0.001, 1) == "quantized int8 2"
    assert taken(0.0, 1) == "exact bfloat16 2"
    assert taken(None, 1) == "exact 2"
    assert not search(slow(loss_budget=None)[0], slow()[1], 2).others


def test_settings_of_other_mathematics_are_those_of_train() -> None:
    from unisono.config import apply_overrides, parse

    fields = {"model": "gpt2", "data": {"path": "x"}, "output_dir": "y", "bf16": True}
    job, here = slow()
    for option in search(job, here, 4).others:
        config = parse(apply_overrides(fields, overrides(option).split()))
        run = option.run
        assert config.wire == run.wire and runs_here(run)
        if run.strategy == "streaming":
            assert config.sync == "streaming" and config.streaming.sync_every == run.sync_every
            assert config.streaming.num_fragments == run.num_fragments
            assert config.streaming.fragment_sync_delay == 1
        else:
            assert config.sync == ("exact" if run.wire == "bfloat16" else "quantized")


def test_memory_of_other_mathematics() -> None:
    """Beside what exact holds with its optimizer on shards: masters 1/n, feedback (n-1)/n of 4 bytes a value;
    beside what one device holds: outer weights, momentum, feedback, a fragment and its sum."""
    job, here = slow()
    job = replace(job, micro_batch=1, recompute="none")
    four = search(job, here, 4)
    exact = next(o for o in four.options if o.name == "exact 4").memory
    by = {o.name: o.memory for o in four.others}
    values = exact.weights / 4
    assert exact.synchronization == 0
    assert by["quantized int8 4"].synchronization == pytest.approx(values)
    assert by["quantized int4 4"].synchronization == pytest.approx(values * (1 + 3))
    assert by["quantized int8 4"].optimizer == pytest.approx(exact.optimizer)
    streaming = by["streaming every 30 4"]
    assert streaming.optimizer == pytest.approx(4 * exact.optimizer)
    table = 50257 * 768
    assert streaming.synchronization == pytest.approx(4 * (3 * values + 2 * table))


def test_codes_cost_time_and_an_all_to_all_leaves_a_node_once_for_each_of_its_ranks() -> None:
    from unisono.forecast import coding

    job, here = slow()
    gpu, cpu = here.device, replace(here.device, is_cpu=True)
    # 2 ranks, 13.5 M values: 19.2 and 41.4 ms on the core of benchmarks/results/codec.json.
    assert coding.step_s("int8", 13_520_256, 2, cpu) == pytest.approx(0.01917, rel=0.02)
    assert coding.step_s("int4", 13_520_256, 2, cpu) == pytest.approx(0.04145, rel=0.02)
    assert coding.step_s("int8", 1e9, 8, gpu) < 0.2
    (free,) = [o for o in search(job, replace(here, device=gpu), 2).others if o.run.wire == "int8"]
    (paid,) = [o for o in search(job, replace(here, device=cpu), 2).others if o.run.wire == "int8"]
    assert paid.step.communication > free.step.communication
    crowded = machine("A100", per_node=8, node_gbit=10)
    whole = wire(crowded.fabric, 16)
    assert whole.all_to_all(1e9) == pytest.approx(8 * whole.all_gather(1e9), rel=0.01)


def test_streaming_is_a_step_alone_and_a_share_of_what_travels() -> None:
    """With time for nothing to hide: (n-1) codes of all values in H steps, 0.516 bytes each."""
    job, _ = slow()
    here = machine("A100", per_node=1, node_gbit=0.01)
    option = next(o for o in search(job, here, 2).others if o.run.sync_every == 10)
    step = option.step
    values = NAMED["gpt2"].parameters
    wire_s = values * 132 / 256 / here.fabric.node["all_gather"].bytes_per_s / 10
    alone_s = step.total - step.communication
    # A fragment has one step of every two to hide behind.
    assert step.communication == pytest.approx(wire_s - alone_s / 2, rel=0.05)
