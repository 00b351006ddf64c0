"""The report page: its data from any state of a run, and the page in a real browser."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_run import metrics_row, timeline_row, write_lines, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opened import Opened

from unisono.errors import UnisonoError
from unisono.observe import charts, folder, recorded, report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "my-run")


# --- what the files say


def test_numbers_come_from_the_files(run: Path) -> None:
    shown = report.view(run)
    assert shown["name"] == "my-run" and shown["state"]["kind"] == "done"
    tiles = {t["label"]: t["value"] for t in shown["tiles"]}
    assert tiles["tokens/s"] == "12,600" and tiles["scaling efficiency"] == "90.0%"
    assert tiles["held-out loss"] == "4.000" and tiles["MFU"] == "41.0%"
    assert {r["phase"]: r["share"] for r in shown["time"]["rows"]}["waiting"] == 0.05
    assert sum(r["share"] for r in shown["time"]["rows"]) == pytest.approx(1)
    assert {c["id"] for c in shown["charts"]} == {
        "loss", "rate", "norm", "throughput", "exposed", "mfu", "noise", "memory",
    }  # fmt: skip
    assert shown["forecast"]["rows"][0] == {"part": "step", "forecast": 270.0, "measured": 280.0}
    assert {"part": "waiting", "forecast": 0.0, "measured": 15.0} in shown["forecast"]["rows"]
    assert ["peak memory", "362.4 MiB", "381.5 MiB", -0.05] in shown["forecast"]["facts"]
    assert shown["said"] == [
        {"what": "slow rank", "text": "rank 1 computes 6% longer; cost 5% of all steps"}
    ]
    assert [r["text"] for r in shown["memory"]["rows"]] == ["381.5 MiB"] * 2
    assert ["bucket mb", "1.3", "link of 18 Gbit/s"] in shown["plan"]
    assert shown["advice"][0]["do"] == "look at it"
    assert shown["missing"] == []


def test_what_kept_all_ranks_from_computing_is_never_negative(run: Path) -> None:
    """Rank 0's own metrics settle a step's waiting one step later; ranks.jsonl has it in its step."""
    rows = [metrics_row(s) | {"time/waiting_s": 0.1 * (-1) ** s} for s in range(1, 201)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    [chart] = [c for c in report.view(run)["charts"] if c["id"] == "exposed"]
    lines = {x["name"]: x["points"] for x in chart["lines"]}
    assert lines["waiting"] == [
        [s, pytest.approx(100 * 0.01 / 0.3, rel=1e-4)] for s in range(2, 201)
    ]
    assert lines.keys() == {"waiting", "data"}, "what nobody ever has is no line"
    (run / "ranks.jsonl").unlink()
    [chart] = [c for c in report.view(run)["charts"] if c["id"] == "exposed"]
    assert chart["note"].startswith("Rank 0 as it went")


def test_events_are_named_and_marked(run: Path) -> None:
    write_lines(
        run / "metrics.jsonl", [{"step": 40, "event": "step 40: jump: loss 9.000 after 4.000"}]
    )
    shown = report.view(run)
    assert shown["said"][-1] == {"what": "step 40", "text": "jump: loss 9.000 after 4.000"}
    assert shown["charts"][0]["marks"] == [[40, "jump: loss 9.000 after 4.000"]]


def test_removing_a_phase_gains_what_it_took(run: Path) -> None:
    rows = {r["phase"]: r for r in report.view(run)["time"]["rows"]}
    stepping = 1 - 0.01 - 0.07  # checkpoint and evaluation come between steps
    assert rows["waiting"]["gain"] == pytest.approx(0.05 / (stepping - 0.05), rel=1e-3)
    assert rows["evaluation"]["gain"] is None and rows["compute"]["gain"] is None


def test_the_timeline_says_who_came_last(run: Path) -> None:
    found = report.view(run)["timeline"]
    assert [s["step"] for s in found["steps"]] == [5, 6, 100]
    step = found["steps"][0]
    assert step["waits"] == [[0, 1, 20.0]]
    assert [c[7] for r in step["ranks"] for c in r["collectives"]] == [1, 1]


def test_bandwidth_counts_from_the_last_arrival(run: Path) -> None:
    found = report.view(run)["bandwidth"]
    # 1 MB sent by each of 2 ranks in an all-reduce is a tensor of 1 MB; 5 ms after rank 1 came.
    assert found["points"] == [{"operation": "all-reduce", "points": [[1_000_000, 200.0]] * 3}]
    assert [x["operation"] for x in found["lines"]] == ["all-reduce"]


def test_a_noise_scale_without_a_bound_is_not_drawn(run: Path) -> None:
    """And what the run said about its batch is on the page, so that both say the same."""
    rows = [metrics_row(s) for s in (1, 2, 3)]
    del rows[1]["batch/noise_scale_high_tokens"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    receipt = json.loads((run / "receipt.json").read_text())
    receipt |= {"step": 3, "batch_advice": {"lines": ["Batch: it pays"]}}
    (run / "receipt.json").write_text(json.dumps(receipt))
    shown = report.view(run)
    [chart] = [c for c in shown["charts"] if c["id"] == "noise"]
    assert chart["lines"][0]["points"] == [[1, 3001, 2500, 4000], [3, 3003, 2500, 4000]]
    assert shown["batch"] == ["Batch: it pays"]


def in_pairs(operation: str, sent_bytes: list[int]) -> list[dict[str, Any]]:
    """One step of 4 ranks in two groups of one name, of which the second is 50 ms later."""
    rows = [timeline_row(5, rank) for rank in range(4)]
    for rank, row in enumerate(rows):
        [c] = row["collectives"]
        first = rank // 2 * 2
        row["groups"] = {"shard": [first, first + 1]}
        come = 100 + 20 * (rank % 2) + 50 * (rank // 2)
        c |= {"operation": operation, "group": "shard", "sent_bytes": sent_bytes[rank % 2]}
        end = 125 + 50 * (rank // 2)
        c |= {"started_ms": come, "finished_ms": end, "waited_ms": end - come}
    return rows


def test_groups_of_one_name_are_told_apart() -> None:
    rows = in_pairs("all-reduce", [1_000_000, 1_000_000])
    shown = recorded.timeline(rows)
    assert shown
    [step] = shown["steps"]
    assert [c[7] for r in step["ranks"] for c in r["collectives"]] == [1, 1, 3, 3]
    assert step["waits"] == [[0, 1, 20.0], [2, 3, 20.0]]
    found = recorded.bandwidth(rows, {})
    assert found and found["points"][0]["points"] == [[1_000_000, 200.0]] * 2


def test_bandwidth_of_a_broadcast_is_of_the_whole_tensor() -> None:
    found = recorded.bandwidth(in_pairs("broadcast", [1_000_000, 0]), {})
    assert found and found["points"][0]["points"] == [[1_000_000, 200.0]] * 2


def test_a_row_that_is_added_while_the_file_is_read_is_not_torn(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = folder.read_lines

    def read_while_written(path: Path) -> Any:
        rows = list(read(path))
        write_lines(path, [metrics_row(300)])
        return rows

    monkeypatch.setattr(folder, "read_lines", read_while_written)
    assert report.view(run)["missing"] == []


def test_long_series_keep_their_extremes() -> None:
    rows = [{"step": k, "v": math.sin(k)} for k in range(1, 10_001)]
    rows[6000]["v"] = 50.0
    rows[7000]["v"] = None
    found = charts.series(rows, "v")
    assert len(found) <= charts.MOST_POINTS
    assert max(p[3] for p in found) == 50.0
    assert min(p[2] for p in found) == pytest.approx(-1, abs=1e-4)
    assert all(low <= mean <= high for _, mean, low, high in found)
    assert charts.series(rows[:20], "v") == [[k, folder.short(math.sin(k))] for k in range(1, 21)]


def test_a_page_of_ten_thousand_steps_and_many_ranks_is_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", steps=10_000, replicas=64)
    rows = [timeline_row(s, r) for s in range(200, 3000, 100) for r in range(64)]
    for row in rows:
        row["spans"] = [["compute", k / 10, k / 10 + 0.1] for k in range(100)]
        row["collectives"] = row["collectives"] * 30
    write_lines(run / "timeline.jsonl", rows)
    text = report.page(report.read([run]))
    assert len(text) < 400_000
    shown = report.view(run)["timeline"]
    assert shown["recorded"] == 31 and 1 <= len(shown["steps"]) < 31


def test_a_thousand_ranks_show_those_that_waited_most_and_least(tmp_path: Path) -> None:
    run = write_run(tmp_path / "wide", replicas=2)
    (run / "timeline.jsonl").unlink()
    write_lines(run / "timeline.jsonl", [timeline_row(5, r) for r in range(1000)])
    step = report.view(run)["timeline"]["steps"][0]
    assert step["num_ranks"] == 1000 and len(step["ranks"]) == recorded.MOST_RANKS
    assert 1 in [r["rank"] for r in step["ranks"]], "the one that all waited for"


# --- what is missing, torn, in progress, hostile

PARTS = {
    "run.json": "Configuration",
    "plan.json": "Plan and its reasons",
    "metrics.jsonl": "Loss and throughput",
    "receipt.json": "Receipt",
    "environment.json": "Versions and host",
    "forecast.json": "Forecast against measurement",
    "probe.json": "Bandwidth of the probe",
    "timeline.jsonl": "Timeline",
    "ranks.jsonl": "Time of every rank as it went",
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_missing_is_said(run: Path, name: str) -> None:
    (run / name).unlink()
    missing = report.view(run)["missing"]
    assert PARTS[name] in [what for what, _, _ in missing]
    assert all(what and why and how for what, why, how in missing)
    assert report.page(report.read([run]))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"', "nu\x00ll", "[" * 100_000])
@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_file_is_said_and_the_rest_is_shown(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    missing = [what for what, _, _ in report.view(run)["missing"]]
    assert PARTS[name] in missing or any(name in what for what in missing)


def test_a_torn_last_line_is_passed_over_and_said(run: Path) -> None:
    whole = report.view(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "train/loss": 1.')
    torn = report.view(run)
    assert torn["charts"] == whole["charts"]
    assert [what for what, _, _ in torn["missing"]] == ["1 line of metrics.jsonl"]


def test_a_run_in_progress(run: Path) -> None:
    for name in ("receipt.json", "forecast.json"):
        (run / name).unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines()[:60]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    shown = report.view(run)
    assert shown["state"] == {"kind": "open", "text": "not finished: step 60 of 200"}
    assert shown["time"]["source"] == "so far: mean over ranks"
    assert {r["phase"]: r["share"] for r in shown["time"]["rows"]}["waiting"] == pytest.approx(
        0.01 / 0.3, rel=1e-4
    )
    (run / "ranks.jsonl").unlink()
    shown = report.view(run)
    assert shown["time"]["source"] == "so far: rank 0"
    assert {r["phase"]: r["share"] for r in shown["time"]["rows"]}["waiting"] == pytest.approx(0.05)
    assert "30%" in [t["value"] for t in shown["tiles"]]


def test_a_receipt_of_before_a_resume_is_not_shown(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [metrics_row(s) for s in range(201, 221)])
    shown = report.view(run)
    assert shown["state"]["kind"] == "open"
    assert "it is older than the newest steps" in [why for _, why, _ in shown["missing"]]


def test_no_run_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UnisonoError, match="no run is there") as error:
            report.read([path])
        assert "\n" not in str(error.value)
    with pytest.raises(UnisonoError, match="at most 8"):
        report.read([tmp_path] * 9)
    run = write_run(tmp_path / "run")
    with pytest.raises(UnisonoError, match="cannot be written"):
        report.write([run], tmp_path / "no" / "folder.html")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.just(10**400) | st.sampled_from(["<script>", "</script>", "compute", 1e308, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def poisoned(value: Any, poison: Any, where: list[int]) -> Any:
    """A copy with something inside replaced; `where` chooses a way down."""
    if not where or not isinstance(value, dict | list) or not value:
        return poison
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[where[0] % len(keys)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = poisoned(value[key], poison, where[1:])
    return copy


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(list(PARTS)), VALUES, st.lists(st.integers(0, 50), min_size=1, max_size=4))
def test_nothing_in_a_file_breaks_the_page(
    tmp_path: Path, name: str, poison: Any, where: list[int]
) -> None:  # fmt: skip
    run = tmp_path / "run"
    if not run.exists():
        write_run(run, steps=12)
    file = run / name
    before = file.read_text()
    try:
        if name.endswith(".jsonl"):
            rows = [json.loads(x) for x in before.splitlines()]
            rows = poisoned(rows, poison, where)
            file.write_text("".join(json.dumps(r) + "\n" for r in (rows if isinstance(rows, list) else [rows])))  # fmt: skip
        else:
            file.write_text(json.dumps(poisoned(json.loads(before), poison, where)))
        data = report.read([run, run])
        text = report.as_json(data)
        assert "<" not in text
        json.loads(text)
    finally:
        file.write_text(before)


# --- several runs


def test_two_runs_give_the_curve_and_what_changed(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", replicas=1, learning_rate=0.001)
    two = write_run(tmp_path / "two", replicas=2, learning_rate=0.002)
    found = report.read([two, one])["compare"]
    assert [(f["name"], f["replicas"], f["efficiency"]) for f in found["scaling"]] == [
        ("one", 1, 1.0),
        ("two", 2, 1.0),
    ]
    assert [f["foretold"] for f in found["scaling"]] == [13000.0] * 2
    changed = {row[0]: row[1:] for row in found["changed"]}
    assert changed == {"learning_rate": ["0.002", "0.001"], "replicas": ["2", "1"]}
    assert [c["title"] for c in found["charts"]] == ["Loss, training", "Loss, held out", "Throughput"]  # fmt: skip
    assert [c["note"] for c in found["charts"]] == [
        "Equal to the fifth digit at all 200 points that they share.",
        "Equal to the fifth digit at all 4 points that they share.",
        "",
    ]
    rows = [metrics_row(s) | {"train/loss": 3 + 0.01 * (s == 7)} for s in range(1, 10)]
    (one / "metrics.jsonl").write_text(
        "".join(json.dumps({**r, "train/loss": 3.0}) + "\n" for r in rows)
    )
    (two / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert (
        report.read([two, one])["compare"]["charts"][0]["note"] == "At most 0.01 apart, at step 7."
    )
    assert report.read([one])["compare"] is None


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    assert [r["name"] for r in report.read(paths)["runs"]] == ["a/run", "b/run"]


# --- the command


def test_the_verb_writes_one_file(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from unisono.cli import app

    (run / "probe.json").unlink()
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == str(run / "report.html")
    assert "without bandwidth of the probe (probe.json is not there)" in result.output
    page = (run / "report.html").read_text()
    assert len(page) < 400_000
    assert not re.findall(r"(?:src|href)=\"(?!data:,)", page), "nothing from elsewhere"
    other = tmp_path / "elsewhere.html"
    result = CliRunner().invoke(app, ["report", str(run), "-o", str(other)])
    assert result.exit_code == 0 and other.exists()


def test_the_policy_admits_this_script_only(run: Path) -> None:
    page = report.page(report.read([run]))
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == 1 and report._hash(scripts[0]) in page
    assert "unsafe" not in page and "default-src &#39;none&#39;" in page


# --- in a browser


def opened(browser: Any, runs: list[Path], place: Path, **options: Any) -> Opened:
    file = place / "page.html"
    report.write(runs, file)
    return Opened(browser, file.as_uri(), **options)


PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 900}


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_are_drawn_without_errors_or_network(
    browser: Any, run: Path, tmp_path: Path, viewport: dict[str, int], scheme: str
) -> None:
    shown = opened(browser, [run], tmp_path, viewport=viewport, color_scheme=scheme)
    page = shown.page
    assert shown.wrong == []
    assert [u for u in shown.asked if not u.startswith(("file:", "data:"))] == []
    # Eight line charts, the timeline and the bandwidth.
    assert shown.count("figure svg") == 10
    assert page.locator("path.line").count() >= 10
    for path in page.locator("path").all():
        assert "NaN" not in (path.get_attribute("d") or "")
    assert shown.count("table.bars .track") == 8
    assert shown.count(".missing") == 0
    titles = [h.inner_text() for h in page.locator("h2").all()]
    assert titles == [
        "Where the time went", "Timeline of a step", "Learning", "Speed",
        "Forecast against measurement", "The link", "Batch size", "Memory", "Plan", "Environment",
    ]  # fmt: skip
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "nothing to scroll sideways"
    # No text of a chart leaves the screen, and none is too small to read.
    for box in page.locator("figure svg text").all():
        edges = box.bounding_box()
        assert edges is None or (edges["x"] >= -1 and edges["x"] + edges["width"] <= wide[1] + 1), box.inner_text()  # fmt: skip


def test_names_at_the_ends_of_lines_are_not_cut_off(
    browser: Any, run: Path, tmp_path: Path
) -> None:
    page = opened(browser, [run], tmp_path, viewport=DESK).page
    for chart in page.locator("figure svg").all():
        edge = chart.bounding_box()
        assert edge
        for text in chart.locator("text.label").all():
            box = text.bounding_box()
            assert box and box["x"] + box["width"] <= edge["x"] + edge["width"], text.inner_text()


def test_tooltips_by_pointer_and_keyboard(browser: Any, run: Path, tmp_path: Path) -> None:
    shown = opened(browser, [run], tmp_path, viewport=DESK)
    page = shown.page
    loss = page.locator("svg[aria-label^='Loss']")
    loss.hover(position={"x": 300, "y": 100})
    assert re.match(r"step \d+\ntraining \d", shown.tip())
    page.mouse.move(0, 0)
    assert shown.tip() == ""
    loss.focus()
    page.keyboard.press("Home")
    assert shown.tip().startswith("step 1\n")
    page.keyboard.press("ArrowRight")
    assert shown.tip().startswith("step 2\n")
    page.keyboard.press("End")
    assert re.match(r"step 200\ntraining [\d.]+\nheld out 4", shown.tip())
    page.keyboard.press("Escape")
    assert shown.tip() == ""
    page.locator("svg[aria-label^='Timeline']").focus()
    page.keyboard.press("Home")
    assert shown.tip() == "rank 0 on somewhere\ncompute 100 ms\nfrom 0 to 100 ms"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert "20.0 ms of it until rank 1 came" in shown.tip()
    assert shown.wrong == []


def test_what_was_named_is_shown_and_marked(browser: Any, run: Path, tmp_path: Path) -> None:
    write_lines(run / "metrics.jsonl", [{"step": 40, "event": "step 40: jump: loss 9 after 4"}])
    shown = opened(browser, [run], tmp_path, viewport=PHONE)
    text = shown.page.locator("main").inner_text()
    for words in ("rank 1 computes 6% longer; cost 5% of all steps", "jump: loss 9 after 4", "up to +6.0%", "look at it", "Peak by rank"):  # fmt: skip
        assert words in text
    loss = shown.page.locator("svg[aria-label^='Loss']")
    assert loss.locator(".mark").count() == 1
    loss.focus()
    shown.page.keyboard.press("Home")
    for _ in range(39):
        shown.page.keyboard.press("ArrowRight")
    assert shown.tip().endswith("jump: loss 9 after 4")
    assert shown.wrong == []


def test_steps_and_zoom_of_the_timeline(browser: Any, run: Path, tmp_path: Path) -> None:
    shown = opened(browser, [run], tmp_path, viewport=DESK)
    page = shown.page
    assert "Rank 0 stood still 20.0 ms for rank 1" in page.locator("main").inner_text()

    def last_tick() -> str:
        return page.locator("svg[aria-label^='Timeline'] text").all_inner_texts()[-4]

    page.get_by_role("button", name="6", exact=True).click()
    assert shown.count("svg[aria-label^='Timeline of step 6:']") == 1
    whole = page.locator("svg[aria-label^='Timeline']").inner_html()
    page.get_by_role("button", name="Zoom in").click()
    assert page.locator("svg[aria-label^='Timeline']").inner_html() != whole
    page.get_by_role("button", name="whole step").click()
    assert page.locator("svg[aria-label^='Timeline']").inner_html() == whole
    box = page.locator("svg[aria-label^='Timeline']").bounding_box()
    page.mouse.move(box["x"] + 600, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 900, box["y"] + 20)
    page.mouse.up()
    assert page.locator("svg[aria-label^='Timeline']").inner_html() != whole
    page.locator("svg[aria-label^='Timeline']").focus()
    for _ in range(4):
        page.keyboard.press("-")
    assert page.locator("svg[aria-label^='Timeline']").inner_html() == whole
    assert shown.wrong == []


def test_the_run_switch(browser: Any, tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"run-{n}", replicas=n, seed=n) for n in (1, 2, 4)]
    shown = opened(browser, paths, tmp_path, viewport=PHONE)
    page = shown.page
    assert page.locator("h1").inner_text() == "Side by side"
    curve = "svg[aria-label^='Throughput by number of replicas']"
    assert shown.count(f"{curve} circle.fill") == shown.count(f"{curve} circle.ring") == 3
    page.locator(curve).focus()
    page.keyboard.press("Home")
    assert (
        shown.tip()
        == "run-1\n6,300 tokens/s on 1\n100.0% of linear\n90.0% by its own receipt\nforetold 13,000"
    )
    assert "seed" in page.locator("main").inner_text()
    page.get_by_role("tab", name="run-2").click()
    assert page.locator("h1").inner_text().startswith("run-2")
    page.keyboard.press("ArrowRight")
    assert page.locator("h1").inner_text().startswith("run-4")
    assert page.get_by_role("tab", name="run-4").get_attribute("aria-selected") == "true"
    page.reload()
    assert page.locator("h1").inner_text().startswith("run-4"), "the address remembers"
    assert shown.wrong == []


def test_what_comes_from_a_run_is_inert(browser: Any, tmp_path: Path) -> None:
    evil = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
    run = write_run(tmp_path / "evil", model=evil, sync=evil)
    shutil.rmtree(tmp_path / "evil-2", ignore_errors=True)
    other = run.rename(tmp_path / "<img src=x onerror=hacked=1>")
    plan = json.loads((other / "plan.json").read_text())
    plan["reasons"]["bucket_mb"] = plan[evil] = evil
    (other / "plan.json").write_text(json.dumps(plan))
    row = timeline_row(101, 0)
    row["host"] = row["collectives"][0]["operation"] = evil
    write_lines(other / "timeline.jsonl", [row])
    receipt = json.loads((other / "receipt.json").read_text())
    receipt["advice"] = [{"what": evil, "do": evil}]
    (other / "receipt.json").write_text(json.dumps(receipt))
    shown = opened(browser, [other, other], tmp_path, viewport=DESK)
    page = shown.page
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert page.evaluate("window.hacked") is None
        assert shown.count("img") == 0 and shown.count("script") == 2
    page.get_by_role("tab").first.click()
    assert evil in page.locator("main").inner_text()
    # Even markup that got in could not run: the policy knows one script.
    page.evaluate("const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)")  # fmt: skip
    assert page.evaluate("window.hacked") is None
    assert len(shown.wrong) == 1 and "Content Security Policy" in shown.wrong[0]


@pytest.mark.parametrize("name", PARTS)
def test_a_page_without_a_part_is_drawn(browser: Any, run: Path, tmp_path: Path, name: str) -> None:
    (run / name).unlink()
    shown = opened(browser, [run], tmp_path, viewport=DESK)
    assert shown.wrong == []
    assert PARTS[name] in shown.page.locator(".missing").inner_text()


def test_a_page_of_a_run_of_one_row(browser: Any, tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    write_lines(run / "metrics.jsonl", [{"step": 1, "train/loss": 7.0, "train/grad_norm": 0.0}])
    shown = opened(browser, [run], tmp_path, viewport=DESK)
    assert shown.wrong == []
    assert shown.count("svg[aria-label^='Loss'] circle") == 1
    assert "NaN" not in shown.page.locator("main").inner_html()


def test_it_prints(browser: Any, run: Path, tmp_path: Path) -> None:
    shown = opened(browser, [run], tmp_path, viewport=DESK, color_scheme="dark")
    file = tmp_path / "page.pdf"
    shown.page.pdf(path=str(file), format="A4", print_background=True)
    assert file.stat().st_size > 20_000
    shown.page.emulate_media(media="print")
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"  # fmt: skip
    assert not shown.page.locator(".zoom").first.is_visible()
    assert shown.wrong == []
