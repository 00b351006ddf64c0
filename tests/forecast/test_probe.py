"""A probe instead of published hardware: what is taken from it, and what is no probe."""

import json
from pathlib import Path

import pytest

from unisono.errors import ConfigError
from unisono.forecast.architecture import NAMED
from unisono.forecast.ask import machine_of
from unisono.forecast.network import wire
from unisono.forecast.outlook import uncertainty
from unisono.forecast.probe import (
    LinkFit,
    ModelTimes,
    Probe,
    Sharing,
    device_of,
    fabric_of,
    read,
)
from unisono.forecast.search import Job, Machine, search


def fit(collective: str, ranks: int, nodes: int, latency_s: float, rate: float) -> LinkFit:
    return LinkFit(collective=collective, axis="world", ranks=ranks, nodes=nodes, latency_s=latency_s, bytes_per_s=rate, error=0.1)  # type: ignore[arg-type]  # fmt: skip


def example(nodes: int = 1, **changes: object) -> Probe:
    values = {
        "device": "made up", "ranks": 4 * nodes, "nodes": nodes, "memory_bytes": 16e9,
        "memory_bytes_per_s": 1e11, "matmul_flops": {"fp32": 5e12},
        "model": ModelTimes(model="gpt2", parameters=124_000_000, micro_batch=4, sequence=256,
                            dtype="fp32", forward_s=0.3, backward_s=0.7, optimizer_s=0.05,
                            peak_memory_bytes=4_000_000_000, spread=0.02),
        "links": (fit("all_reduce", 4, 1, 60e-6, 1e9), fit("all_gather", 4, 1, 30e-6, 2e9)),
    }  # fmt: skip
    return Probe(**{**values, **changes})  # type: ignore[arg-type]


def test_it_is_saved_and_read(tmp_path: Path) -> None:
    probe = example()
    probe.save(tmp_path / "probe.json")
    assert read(tmp_path / "probe.json") == probe


def write(path: Path, **changes: object) -> Path:
    raw = {**example().model_dump(), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 7}, "version"),
        ({"device": ...}, "device: field required"),
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"memory_bytes": float("nan")}, "memory_bytes"),
        ({"matmul_flops": {"int2": 1e12}}, "matmul_flops.int2"),
        ({"matmul_flops": {"fp32": float("inf")}}, "matmul_flops.fp32"),
        ({"surprise": 1}, "surprise"),
        ({"links": [{"collective": "gossip"}]}, "links.0"),
    ],
)
def test_a_foreign_file_is_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(write(tmp_path / "p.json", **changes))
    assert "\n" not in str(caught.value)
    assert "unisono probe" in str(caught.value)


@pytest.mark.parametrize("text", ["", '{"version": 1, "devi', "\x00\x01", "[]", "3"])
def test_a_torn_file_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"torn or no JSON|no probe") as caught:
        read(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "absent.json")


def test_the_measured_run_is_foretold_as_measured(tmp_path: Path) -> None:
    """At the probe's own micro-batch, forward and backward are what was timed."""
    probe = example()
    probe.save(tmp_path / "p.json")
    machine = machine_of("", tmp_path / "p.json", None, None, 4)
    job = Job(NAMED["gpt2"], 256, 4, micro_batch=4, dtype="fp32", recompute="none")
    (option,) = search(job, machine, 1).options
    assert option.step.compute == pytest.approx(0.3 + 0.7)
    twice = search(Job(NAMED["gpt2"], 256, 8, micro_batch=8, dtype="fp32", recompute="none"), machine, 1)  # fmt: skip
    assert 1.5 < twice.options[0].step.compute < 2.1
    assert uncertainty(option, machine) == pytest.approx(0.02)


def test_collectives_take_as_long_as_their_fit_says() -> None:
    f = fabric_of(example(), None)
    w = wire(f, 4)
    assert w.all_reduce(1e6) == pytest.approx(60e-6 + 2 * 3 / 4 * 1e6 / 1e9)
    assert w.all_gather(1e6) == pytest.approx(30e-6 + 3 / 4 * 1e6 / 2e9)
    assert w.all_to_all(1e6) > 0, "not fitted: the all-reduce's"
    assert device_of(example()).per_node == 4


def test_what_a_collective_takes_from_the_compute_is_the_contention() -> None:
    shared = Sharing(collective="all_reduce", ranks=4, message_bytes=1, bytes_per_s=1e9, compute_speed=0.5, transfer_speed=0.5)  # fmt: skip
    assert fabric_of(example(), None).contention is None, "not measured: the constant"
    assert fabric_of(example(sharing=(shared,)), None).contention == pytest.approx(1.0)
    job = Job(NAMED["gpt2"], 256, 16, micro_batch=4, dtype="fp32", recompute="none")
    seen = [example(sharing=sharing) for sharing in ((), (shared,))]
    plain, contended = (
        {o.run: o.step.communication for o in search(job, Machine(device_of(p), fabric_of(p, None), p), 4).options}
        for p in seen
    )  # fmt: skip
    both = [run for run in plain if run in contended and run.strategy == "ddp"]
    assert both and all(contended[run] > plain[run] for run in both)


def test_what_was_not_measured_must_be_stated(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    example().save(file)
    with pytest.raises(ConfigError, match=r"--link: .* saw one node of 4 ranks"):
        machine_of("", file, None, None, 64)
    linked = machine_of("", file, 1.25e9, None, 64)
    assert linked.fabric.node["all_gather"].bytes_per_s == 1.25e9
    with pytest.raises(ConfigError, match="--per-node: found 8"):
        machine_of("", file, None, 8, 4)
    with pytest.raises(ConfigError, match="--hardware or --probe"):
        machine_of("H100", file, None, None, 4)


def test_several_nodes_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    many = example(nodes=2, links=(fit("all_reduce", 8, 2, 200e-6, 2e8),))
    many.save(file)
    machine = machine_of("", file, None, None, 1024)
    assert machine.fabric.node["all_reduce"].bytes_per_s == 2e8
