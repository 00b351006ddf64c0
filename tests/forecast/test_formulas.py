"""Every formula of the forecast against a case worked by hand, and what must be monotone."""

import math
from dataclasses import replace

import pytest

from unisono.errors import ConfigError
from unisono.forecast.architecture import NAMED, Architecture, named, of_model
from unisono.forecast.compute import eager_bytes, kept_bytes, layer_work, optimizer_s, saved_bytes
from unisono.forecast.constants import DEFAULT, Constants
from unisono.forecast.cost import (
    Mesh,
    Run,
    Step,
    exposed_head,
    exposed_tail,
    overlap,
    slowest,
    step,
    trained_values,
)
from unisono.forecast.hardware import Device, device, devices, find
from unisono.forecast.memory import fits, least_recompute, memory
from unisono.forecast.network import COLLECTIVES, Fabric, Line, fabric, wire
from unisono.forecast.price import critical_batch_tokens, token_cost

TINY = Architecture("tiny", 2, 8, 2, 2, 4, 32, False, 10, True)
"""A layer: 4 x 8 x 8 in attention, 2 x 8 x 32 in the MLP; a table of 10 x 8."""

PLAIN = Constants(
    matmul=1.0, matmul_tf32=1.0, matmul_fp32=1.0, matmul_fp8=1.0, flash=1.0, flash_width=0.0, traffic=0.0,
    passes=0.0, launches=0, contention=0.0, jitter=0.0, jitter_s=0.0, step_s=0.0, optimizer_bytes=0.0,
)  # fmt: skip
"""Only products cost."""

UNIT = Device("unit", "", {"bf16": 1e6, "fp32": 5e5}, 1.0, 1e9, 1e6, 100.0, 4, 1e6, 1e6, "made up")


def lines(hop_s: float, rate: float) -> dict[str, Line]:
    return dict.fromkeys(COLLECTIVES, Line(hop_s, rate))


# --- counts


def test_parameters_and_operations_of_a_layer() -> None:
    assert TINY.layer_parameters == 4 * 64 + 2 * 256
    assert TINY.parameters == 2 * (768 + 16) + 80
    per_token = 2 * (2 * 768 + 4 * 16 * 8 / 2) + 2 * 10 * 8
    assert TINY.model_flops(tokens=5, sequence=16) == 3 * 5 * per_token


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2", 124), ("gpt2-xl", 1557), ("llama-7b", 6738), ("llama2-70b", 68976), ("llama3-8b", 8030),
     ("llama3.1-405b", 405853), ("mistral-7b", 7241), ("bert-base", 109), ("tinyllama-1.1b", 1100)],
)  # fmt: skip
def test_named_architectures_have_their_published_size(name: str, millions: int) -> None:
    assert NAMED[name].parameters / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("meta-llama/Llama-2-7b-hf", "llama2-7b"), ("openai-community/gpt2", "gpt2"),
     ("meta-llama/Meta-Llama-3-8B", "llama3-8b"), ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
     ("LLAMA-7B", "llama-7b")],
)  # fmt: skip
def test_hub_names_are_known(spelling: str, name: str) -> None:
    found = named(spelling)
    assert found is not None
    assert found.name == name


def test_fields_in_any_dialect_and_what_is_missing() -> None:
    a = of_model({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 100})  # fmt: skip
    assert (a.gated, a.tied, a.kv_heads, a.head_size) == (True, False, 4, 16)
    b = of_model({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}, vocab=50)
    assert (b.ffn, b.vocab, b.tied, b.positions) == (256, 50, True, 1024)
    with pytest.raises(ConfigError, match="num_hidden_layers: missing"):
        of_model({"model_type": "llama", "hidden_size": 64})
    with pytest.raises(ConfigError, match="hidden_size: found -3"):
        of_model({"hidden_size": -3})
    with pytest.raises(ConfigError, match=r"nearest: .*llama-7b"):
        of_model("lama-7b")


# --- hardware


def test_devices_have_facts_with_sources() -> None:
    for d in devices().values():
        assert d.source
        assert d.peak("bf16") > 1e12
        assert 0.3 < d.achievable <= 1
        assert d.memory_bytes >= 16e9
        assert d.node_bytes_per_s > 1e9


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("H100-80GB", "H100"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("A100 (DGX A100)", "A100 80GB"),
     ("V100-SXM2-16GB", "V100 16GB"), ("TPU v5p", "TPU v5p"), ("nvidia h200", "H200"), ("TPU v4-32", "TPU v4"), ("8 x A100", "A100 80GB"),
     ("A100-40GB PCIe", "A100 PCIe 40GB"), ("L40S", "L40S")],
)  # fmt: skip
def test_devices_are_found_in_any_spelling(spelling: str, name: str) -> None:
    assert device(spelling).name == name
    assert find("L40") is None  # no L4


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'H101' is not known; nearest: H100"):
        device("H101")
    assert find("") is None


def test_a_dtype_without_a_rate_takes_the_next() -> None:
    assert device("V100").peak("bf16") == 125e12  # runs as fp16
    with pytest.raises(ConfigError, match="dtype: found 'int3'"):
        device("H100").peak("int3")


# --- network


def test_a_slow_network_takes_of_compute_by_its_bytes() -> None:
    here = Fabric(4, lines(0.0, 100.0), lines(0.0, 20.0), 0.0)
    near, far = wire(here, 4), wire(here, 8)
    assert near.busy(80, "all_gather") == near.all_gather(80)
    assert far.busy(80, "all_reduce") == pytest.approx(far.all_reduce(80) / 5)
    measured = wire(replace(here, contention=0.5), 8)
    assert measured.busy(80, "all_reduce") == measured.all_reduce(80), "on this very link"


def test_collectives_inside_a_node() -> None:
    w = wire(Fabric(4, lines(1.0, 10.0), lines(9.0, 9.0), 5.0), 4)
    assert w.all_gather(40) == 3 * 1.0 + 3 / 4 * 40 / 10
    assert w.reduce_scatter(40) == w.all_gather(40)
    assert w.all_reduce(40) == 2 * w.all_gather(40)
    assert wire(Fabric(4, lines(1, 10), lines(9, 9), 5), 1).all_reduce(1e9) == 0


def test_collectives_between_nodes_share_the_network() -> None:
    f = Fabric(4, lines(1.0, 100.0), lines(2.0, 10.0), 3.0)
    ring = wire(f, 8)  # two nodes: six hops inside, two between; the slower link decides
    assert ring.all_gather(80) == 6 * 1 + 2 * 2 + 7 / 8 * 80 / 10
    assert ring.latency_s["all_reduce"] == min(2 * 10, 2 * 3 * 1 + 2 * 1 * 3)
    apart = wire(f, 2, stride=4)  # four such groups use the same network
    assert apart.all_gather(80) == 2 * 2 + 1 / 2 * 80 / (10 / 4)


def test_more_bandwidth_is_never_slower_and_more_nodes_never_faster() -> None:
    slow, fast = (fabric(device("H100").with_node(8, gbit)) for gbit in (100, 400))
    for size, stride in ((8, 1), (16, 1), (64, 1), (8, 8), (16, 2)):
        for nbytes in (1e3, 1e6, 1e9):
            assert wire(fast, size, stride).all_reduce(nbytes) <= wire(slow, size, stride).all_reduce(nbytes)  # fmt: skip
    times = [wire(slow, n).all_gather(1e8) for n in (8, 16, 32, 64, 128)]
    assert times == sorted(times)


# --- compute


def test_a_layer_by_hand() -> None:
    w = layer_work(TINY, UNIT, tokens=10, sequence=5, dtype="bf16", constants=PLAIN)
    products = 2 * 10 * 768 / 1e6
    scores = 4 * 10 * 5 * 8 / 2 / 1e6
    assert w.forward == pytest.approx(products + scores)
    assert w.backward == pytest.approx(2 * products + 2.5 * scores)
    assert w.head_forward == pytest.approx(2 * 10 * 10 * 8 / 1e6)
    assert w.head_backward == 2 * w.head_forward
    assert w.again == 0
    full = layer_work(TINY, UNIT, tokens=10, sequence=5, dtype="bf16", recompute="full", constants=PLAIN)  # fmt: skip
    assert full.again == full.forward


def test_memory_traffic_by_hand() -> None:
    c = replace(PLAIN, passes=2.0)
    w = layer_work(TINY, UNIT, tokens=10, sequence=5, dtype="bf16", constants=c)
    bare = layer_work(TINY, UNIT, tokens=10, sequence=5, dtype="bf16", constants=PLAIN)
    assert saved_bytes(TINY, 5, True) == 18 * 8 + 4 * 32 == 34 * 8
    assert saved_bytes(TINY, 5, False) == 34 * 8 + 5 * 2 * 5  # Korthikanti 2022
    assert w.forward - bare.forward == pytest.approx(2 * 10 * 272 / 1e6)
    assert w.backward - bare.backward == pytest.approx(2 * 2 * 10 * 272 / 1e6)
    assert kept_bytes(TINY, 5, True, "full") == 2 * 8
    assert kept_bytes(TINY, 5, True, "selective") == 2 * (8 + 2 * 4 * 4)
    assert eager_bytes(TINY) == 0
    llama = NAMED["llama-7b"]
    assert eager_bytes(llama) == 72 * 4096 + 20 * 128 * 64


def test_wider_models_and_more_tokens_use_a_device_better() -> None:
    def rate(hidden: int, tokens: int) -> float:
        a = Architecture("x", 1, hidden, 8, 8, hidden // 8, 4 * hidden, False, 1000, True)
        w = layer_work(a, device("A100"), tokens=tokens, sequence=128, dtype="bf16")
        return 6 * tokens * a.layer_parameters / (w.forward + w.backward)

    assert rate(512, 4096) < rate(1024, 4096) < rate(4096, 4096)
    assert rate(1024, 256) < rate(1024, 1024) < rate(1024, 8192)


def test_newer_kernels_and_unfused_graphs() -> None:
    def forward(device: Device, stack: str) -> float:
        c = replace(PLAIN, flash=0.25, flash_new=0.5, unfused_passes=9.0)
        return layer_work(TINY, device, tokens=64, sequence=16, dtype="bf16", stack=stack, constants=c).forward  # type: ignore[arg-type]  # fmt: skip

    new = replace(UNIT, peak_flops={**UNIT.peak_flops, "fp8": 2e6})
    attention = 4 * 64 * 16 * 8 / 2 / 1e6
    assert forward(new, "eager") - forward(new, "fused") == pytest.approx(attention * (4 - 2))
    assert forward(UNIT, "eager") == forward(UNIT, "fused") == forward(new, "eager")
    once = 64 * saved_bytes(TINY, 16, True) / UNIT.memory_bytes_per_s
    more = (9.0 - PLAIN.early_passes) * once
    assert forward(UNIT, "unfused") - forward(UNIT, "early") == pytest.approx(more)


def test_the_optimizer_moves_its_bytes() -> None:
    c = replace(PLAIN, optimizer_bytes=38.0)
    assert optimizer_s(TINY, UNIT, 1e6, "fused", c) == 38.0
    assert optimizer_s(TINY, UNIT, 1e6, "early", c) > 38.0


# --- one step


def test_overlap_is_the_recursion_and_its_closed_forms() -> None:
    assert overlap([1, 2, 3], [4, 1, 1]) == 7
    assert overlap([1, 2, 9], [1, 1, 1]) == 10
    for compute, buckets, each in ((12.0, 4, 1.0), (12.0, 4, 3.0), (12.0, 4, 5.0), (1.0, 1, 2.0)):
        ready = [(k + 1) / buckets * compute for k in range(buckets)]
        end = overlap(ready, [each] * buckets)
        assert exposed_tail(compute, buckets, each) == pytest.approx(end - compute)
        # The mirror image: part k of the forward pass waits for transfer k.
        at = 0.0
        for k in range(buckets):
            at = max(at, (k + 1) * each) + compute / buckets
        assert exposed_head(compute, buckets, each) == pytest.approx(at - compute)


def test_the_slowest_of_many() -> None:
    assert slowest(1) == 0
    assert slowest(2) == pytest.approx(0.5642, abs=0.03)  # 1 / sqrt(pi)
    assert [slowest(n) for n in (2, 8, 64, 1024)] == sorted(slowest(n) for n in (2, 8, 64, 1024))


FABRIC = Fabric(4, lines(0.0, 1e6), lines(0.0, 1e6), 0.0)


def run(mesh: Mesh = Mesh(), **changes: object) -> Run:  # noqa: B008
    base = Run(TINY, 16, 4, 1, mesh, bucket_bytes=1e9)
    return replace(base, **changes)  # type: ignore[arg-type]


def total(this: Run, link: Fabric = FABRIC, c: Constants = PLAIN) -> Step:
    return step(this, UNIT, link, c)


def test_one_device_only_computes() -> None:
    s = total(run())
    w = layer_work(TINY, UNIT, tokens=64, sequence=16, dtype="bf16", constants=PLAIN)
    assert (
        s.total
        == s.compute
        == pytest.approx(2 * (w.forward + w.backward) + w.head_forward + w.head_backward)
    )


def test_ddp_exposes_one_bucket_and_the_table() -> None:
    s = total(run(Mesh(replica=4)))
    layers, table = 2 * 768 * 4, 80 * 4
    assert s.communication == pytest.approx(2 * 3 / 4 * (layers + table) / 1e6)
    finer = total(run(Mesh(replica=4), bucket_bytes=layers / 8))
    assert finer.communication == pytest.approx(2 * 3 / 4 * (layers / 8 + table) / 1e6)


def test_zero_sends_what_ddp_sends_and_zero2_reduces_every_micro_batch() -> None:
    mesh = Mesh(replica=4)
    one = total(run(mesh, strategy="zero1", weight_bytes=4)).communication
    assert one == pytest.approx(total(run(mesh)).communication)
    twice = total(run(mesh, strategy="zero2", accumulation=2, weight_bytes=4)).communication
    once = total(run(mesh, strategy="zero1", accumulation=2, weight_bytes=4)).communication
    assert twice > once


def test_fsdp_hides_what_a_layer_can_hide() -> None:
    w = layer_work(TINY, UNIT, tokens=64, sequence=16, dtype="bf16", constants=PLAIN)
    s = total(run(Mesh(shard=4), strategy="fsdp"))
    gather = 3 / 4 * 768 * 2 / 1e6
    scatter = 3 / 4 * 768 * 4 / 1e6
    ends = 3 / 4 * 80 * (2 + 4) / 1e6
    assert gather < w.forward and gather + scatter < w.backward
    assert s.communication == pytest.approx(ends)
    slow = Fabric(4, lines(0.0, 1e4), lines(0.0, 1e4), 0.0)
    exposed = 2 * (100 * gather - w.forward) + 2 * (100 * (gather + scatter) - w.backward)
    assert total(run(Mesh(shard=4), strategy="fsdp"), slow).communication == pytest.approx(
        exposed + 100 * ends
    )


def test_sharded_embeddings_travel_once_a_step_where_gradients_do() -> None:
    often = total(run(Mesh(shard=4), strategy="fsdp", accumulation=3))
    once = total(run(Mesh(shard=4), strategy="fsdp", accumulation=3, scatter_once=True))
    scatter = 3 / 4 * 80 * 4 / 1e6
    assert often.communication - once.communication == pytest.approx(2 * scatter)
    copied = total(run(Mesh(2, 2), strategy="fsdp"))  # all-reduce of half the embeddings' gradients
    ends = 1 / 2 * 80 * (2 + 4) / 1e6 + 2 * 1 / 2 * 40 * 4 / 1e6
    assert copied.communication == pytest.approx(ends)


def test_context_ranks_sum_their_gradients() -> None:
    """They hold the same weights and see other tokens: as many bytes as replicas send."""
    alone = total(run(Mesh(context=4)))
    assert alone.communication == pytest.approx(total(run(Mesh(replica=4))).communication)
    sharded = memory(run(Mesh(2, 2, context=2), strategy="fsdp"))
    assert sharded.weights == memory(run(Mesh(1, 4), strategy="fsdp")).weights


def test_a_pipeline_has_a_bubble_and_tensor_ranks_talk() -> None:
    bubble = total(run(Mesh(pipeline=2), accumulation=4)).bubble
    assert bubble > 0
    per_batch = [total(run(Mesh(pipeline=2), accumulation=k)).bubble / k for k in (2, 8, 32)]
    assert per_batch == sorted(per_batch, reverse=True)
    s = total(run(Mesh(tensor=2)))
    assert s.tensor == pytest.approx(2 * 4 * 2 * 1 / 2 * 64 * 8 * 2 / 1e6)


@pytest.mark.parametrize("mesh", [Mesh(8), Mesh(1, 8), Mesh(2, 4), Mesh(2, 1, 2, 2), Mesh(2, 2, 2)])
@pytest.mark.parametrize("strategy", ["ddp", "exact", "zero1", "zero2", "fsdp"])
def test_more_bandwidth_and_less_latency_are_never_slower(mesh: Mesh, strategy: str) -> None:
    for k in (1, 4):
        one = Run(NAMED["gpt2"], 1024, 4, k, mesh, strategy)  # type: ignore[arg-type]
        times = []
        for rate in (1e8, 1e9, 1e10, 1e11, 1e12):
            link = Fabric(4, lines(1e-5, rate), lines(2e-5, rate / 4), 3e-5)
            times.append(step(one, device("A100"), link).total)
        assert times == sorted(times, reverse=True)
        lazy = step(one, device("A100"), Fabric(4, lines(1e-4, 1e10), lines(2e-4, 1e10), 1e-3))
        quick = step(one, device("A100"), Fabric(4, lines(1e-6, 1e10), lines(2e-6, 1e10), 1e-5))
        assert quick.total <= lazy.total


def test_parts_add_up_and_none_is_negative() -> None:
    s = step(Run(NAMED["llama-7b"], 2048, 2, 4, Mesh(4, 8, 2, 1, 1), "fsdp"), device("H100"), fabric(device("H100")))  # fmt: skip
    parts = [getattr(s, name) for name in s.__dataclass_fields__]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(s.total)


def test_waiting_grows_with_ranks() -> None:
    shares = []
    for n in (1, 8, 64, 512):
        s = step(Run(NAMED["gpt2"], 1024, 8, 1, Mesh(n)), device("A100"), fabric(device("A100")))
        shares.append(s.waiting / s.total)
    assert shares[0] == 0
    assert shares == sorted(shares)


# --- memory


def test_sixteen_bytes_a_parameter_and_who_shares_them() -> None:
    params = 2 * TINY.layer_parameters + TINY.embedding_parameters

    def states(strategy: str, mesh: Mesh, **more: object) -> float:
        m = memory(run(mesh, strategy=strategy, gradient_bytes=2, **more))
        return (m.weights + m.gradients + m.optimizer) / params

    four = Mesh(replica=4)
    assert states("ddp", four) == 16  # Rajbhandari 2020
    assert states("zero1", four) == states("exact", four) == 4 + 12 / 4
    assert states("zero2", four) == 2 + 14 / 4
    assert states("fsdp", Mesh(shard=4)) == 16 / 4
    assert states("fsdp", Mesh(2, 2)) == 16 / 2
    assert states("ddp", Mesh(4, tensor=2)) == 16 / 2
    assert states("ddp", four, weight_bytes=4) == 4 + 4 + 8
    whole = states("fsdp", Mesh(shard=4), scatter_once=True, accumulation=2, weight_bytes=4)
    assert whole == 4 / 4 + 4 + 8 / 4


def test_fsdp_holds_two_layers_and_the_embeddings_whole() -> None:
    m = memory(run(Mesh(shard=4), strategy="fsdp"))
    assert m.buffers == 2 * (2 * 768 + 80) + 4 * 768
    tied = memory(run(Mesh(pipeline=2)))  # either end needs the table
    assert tied.weights == 2 * (768 + 80)


def test_recomputation_and_smaller_micro_batches_hold_less() -> None:
    def held(**changes: object) -> float:
        return memory(replace(Run(NAMED["llama-7b"], 2048, 4, 1, Mesh(shard=8), "fsdp"), **changes)).total  # type: ignore[arg-type]  # fmt: skip

    assert held(recompute="full") < held(recompute="selective") < held()
    assert held(micro_batch=1) < held(micro_batch=2) < held()
    one = memory(Run(NAMED["llama-7b"], 2048, 4, 1, Mesh(shard=8), "fsdp", recompute="full"))
    layer = 4 * 2048 * saved_bytes(NAMED["llama-7b"], 2048, True)
    assert one.activations == pytest.approx(32 * 4 * 2048 * 2 * 4096 + layer)


def test_least_recompute_fits_exactly() -> None:
    big = Run(NAMED["llama-7b"], 2048, 8, 1, Mesh(shard=8), "fsdp")
    assert not fits(big, 80e9)
    chosen = least_recompute(big, 80e9)
    assert chosen.recompute == "selective"
    assert memory(chosen).total == pytest.approx(DEFAULT.usable_memory * 80e9)
    assert least_recompute(big, 1e12).recompute == "none"


# --- money


def test_the_critical_batch_of_published_sizes() -> None:
    # 2 B tokens: 418 k tokens; 10 B: 0.89 M (notes of the collection, from Zhang 2024).
    assert critical_batch_tokens(2e9) == pytest.approx(418e3, rel=0.01)
    assert critical_batch_tokens(10e9) == pytest.approx(0.89e6, rel=0.01)
    assert token_cost(5.0, 5.0) == 2
    assert math.isclose(token_cost(0, 1), 1)


def test_adapters_are_what_peft_counts() -> None:
    """41,943,040 values of r = 16 on all linear layers of Llama 3 8B, as peft prints it."""
    base = NAMED["llama3-8b"]
    model = base.with_adapters(16, None, ())
    assert model.adapters == 41_943_040
    assert model.parameters == base.parameters
    some = base.with_adapters(8, ("q_proj", "v_proj"), ("lm_head",))
    assert some.adapters == 32 * 8 * (4096 + 4096 + 4096 + 1024) + 128256 * 4096
    for targets, whole, field in ((("wqkv",), (), "target_modules"), (None, ("q_proj",), "modules_to_save")):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"lora\.{field}: found '(wqkv|q_proj)'.*known: "):
            base.with_adapters(8, targets, whole)


def test_adapters_leave_a_third_less_to_compute_and_little_to_send_or_keep() -> None:
    whole = Run(NAMED["llama3-8b"], 4096, 1, 1, Mesh(replica=8), "exact", weight_bytes=4)
    adapted = replace(whole, model=whole.model.with_adapters(16, None, ()))
    gpu = device("H100")
    full, light = (step(run, gpu, fabric(gpu)) for run in (whole, adapted))
    assert 0.6 < light.compute / full.compute < 0.85, "4 products of 6; attention and traffic stay"
    assert light.communication < 0.1 * full.communication
    assert light.optimizer < 0.01 * full.optimizer
    kept, before = memory(adapted), memory(whole)
    assert kept.weights == before.weights
    share = adapted.model.adapters / trained_values(whole)
    assert kept.gradients == pytest.approx(share * before.gradients)
    assert kept.optimizer == pytest.approx(share * before.optimizer)
    assert trained_values(adapted) == 41_943_040


def test_4_bits_leave_an_eighth_of_the_frozen_matrices_and_cost_their_expansion() -> None:
    """A 65B model's weights in nf4 with double quantization: 0.5 + 0.127 / 8 bytes (QLoRA, section 3)."""
    gpu = device("H100")
    model = NAMED["llama3-8b"].with_adapters(16, None, ())
    whole = Run(model, 4096, 1, 1, Mesh(replica=8), "exact", weight_bytes=4)
    for double, each in ((False, 0.5 + 0.5 / 8), (True, 0.5 + 0.127 / 8)):
        run = replace(whole, model=model.in_4_bits(double))
        matrices = 32 * model.layer_parameters
        assert run.model.quantized == pytest.approx(each, rel=1e-3)
        less = memory(whole).weights - memory(run).weights
        assert less == pytest.approx((4 - each) * matrices, rel=1e-3)
        assert memory(run).buffers - memory(whole).buffers == 2 * 4096 * 14336
        before, after = (step(r, gpu, fabric(gpu)).compute for r in (whole, run))
        moved = 2 * (each + 2) * matrices / gpu.memory_bytes_per_s
        assert after - before == pytest.approx(moved, rel=1e-3)
