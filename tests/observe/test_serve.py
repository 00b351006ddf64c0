"""The live page: three paths, this host only, and an end with the run however that comes."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fake_run import metrics_row, write_lines, write_run
from opened import Opened

from jobs import job_fields, write_corpus
from unisono import files
from unisono.cli import SERVE_PORT, _with_port
from unisono.observe import report, serve
from unisono.observe.serve import Server, serving


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "run")
    (run / "receipt.json").unlink()
    return run


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    server = Server(run, 0)
    yield server
    server.stop()


def get(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:  # fmt: skip
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read().decode()


def test_it_shows_the_run_as_it_goes(server: Server, run: Path) -> None:
    status, headers, page = get(server.url)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "data-live" in page and "connect-src &#39;self&#39;" in page
    status, headers, text = get(f"{server.url}data.json")
    assert json.loads(text)["runs"][0]["step"] == 200
    again = get(f"{server.url}data.json", **{"If-None-Match": headers["ETag"]})
    assert again[0] == 304 and not again[2]
    write_lines(run / "metrics.jsonl", [metrics_row(201)])
    status = 304
    while status == 304:  # files are not read again at once
        status, _, text = get(f"{server.url}data.json", **{"If-None-Match": headers["ETag"]})
    assert status == 200 and json.loads(text)["runs"][0]["step"] == 201


def test_it_serves_nothing_else(server: Server, run: Path) -> None:
    for path in ("run.json", "../run.json", "%2e%2e/run.json", "/etc/passwd", "data.json/x"):
        assert get(server.url + path)[0] == 404
    request = urllib.request.Request(server.url, data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(request, timeout=30)


def test_only_this_host_is_answered(server: Server) -> None:
    port = int(server.url.rstrip("/").rpartition(":")[2])
    listening = [c for c in psutil.Process(server._process.pid).net_connections() if c.status == "LISTEN"]  # fmt: skip
    assert [tuple(c.laddr) for c in listening] == [("127.0.0.1", port)]
    for host, status in (
        (f"localhost:{port}", 200),
        ("localhost:9000", 200),  # ssh -L 9000:127.0.0.1:8642
        ("evil.example", 403),
        (f"evil.example:{port}", 403),
        ("localhost.evil.example", 403),
        ("", 403),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/data.json", headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()


def test_metrics_for_prometheus(server: Server, run: Path) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    from prometheus_client.parser import text_string_to_metric_families

    write_lines(run / "metrics.jsonl", [{"step": 300, "train/loss": 1.25, "note": "text"}])
    status, _, text = get(f"{server.url}metrics")
    assert status == 200
    found = {m.name: m.samples[0].value for m in text_string_to_metric_families(text)}
    assert found["unisono_step"] == 300 and found["unisono_train_loss"] == 1.25
    assert found["unisono_perf_tokens_per_second"] == pytest.approx(12_000, abs=600)
    assert "unisono_note" not in found


def test_metrics_reads_what_is_new_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = serve.Page(run)
    assert page._newest_values()["step"] == 200
    parsed: list[bytes] = []
    row = files._row
    monkeypatch.setattr(files, "_row", lambda line: parsed.append(line) or row(line))
    write_lines(run / "metrics.jsonl", [{"step": 201, "train/loss": 1.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 202')
    assert page._newest_values()["step"] == 201 and len(parsed) == 1
    with (run / "metrics.jsonl").open("a") as file:
        file.write("}\n")
    found = page._newest_values()
    assert (found["step"], found["train/loss"], len(parsed)) == (202, 1.0, 2)
    files.truncate_after(run / "metrics.jsonl", lambda row: row["step"] <= 10)  # as a resume does
    assert page._newest_values()["step"] == 10


def test_a_long_run_is_not_read_all_the_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, reads = [100.0], []
    for clock in ("monotonic", "thread_time"):
        monkeypatch.setattr(serve.time, clock, lambda: now[0])

    def read(paths: list[Path]) -> dict:
        reads.append(now[0])
        now[0] += 0.5  # a long one
        return {}

    monkeypatch.setattr(serve.report, "read", read)
    page = serve.Page(run)
    for _ in range(100):
        write_lines(run / "metrics.jsonl", [metrics_row(201)])
        page._fresh()
        now[0] += 0.1
    assert len(reads) == 2, "at most a tenth of 10 seconds"


def test_without_the_extra_metrics_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    handler = object.__new__(serve.Handler)
    handler.page, handler.path = serve.Page(run), "/metrics"
    handler.headers = {"Host": "127.0.0.1:1"}
    assert handler._respond() == (404, "text/plain", b"not installed: pip install 'unisono[prometheus]'\n")  # fmt: skip


def test_a_run_that_has_not_begun_is_answered_later(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", 0)
    try:
        assert get(server.url)[0] == 503
        write_run(tmp_path / "run")
        assert get(server.url)[0] == 200
    finally:
        server.stop()


def test_a_port_that_is_taken_is_one_warning(run: Path) -> None:
    said: list[str] = []
    warned: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with serving(run, port, said.append, warned.append) as server:
            assert server is None
    assert said == [] and len(warned) == 1
    assert f"port {port}" in warned[0] and "training goes on" in warned[0]
    with serving(run, None, said.append, warned.append) as server:
        assert server is None and said == []


PARENT = """
import sys
from pathlib import Path
from unisono.observe.serve import Server
server = Server(Path(sys.argv[1]), 0)
print(server._process.pid, server.url, flush=True)
sys.stdin.read()
"""


def test_it_dies_with_a_run_that_is_killed(run: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().split()
        assert get(url)[0] == 200
        beside = psutil.Process(int(pid))
        parent.kill()
        psutil.wait_procs([beside], timeout=30)
        assert not psutil.pid_exists(int(pid)) or beside.status() == psutil.STATUS_ZOMBIE
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(url, timeout=30)


def test_a_crash_of_the_page_is_not_the_runs_and_is_said(run: Path) -> None:
    warned: list[str] = []
    with serving(run, 0, str, warned.append) as server:
        os.kill(server._process.pid, signal.SIGKILL)
        server._thread.join(30)
        [line] = warned
        assert (
            f"the live page at {server.url} has ended (killed by signal 9); training goes on"
            in line
        )
        assert str(run) in line
    assert len(warned) == 1


def test_an_end_with_the_run_is_no_warning(run: Path) -> None:
    warned: list[str] = []
    with serving(run, 0, str, warned.append) as server:
        assert get(server.url)[0] == 200
    assert warned == [] and not server._thread.is_alive()


def test_the_port_may_be_left_out() -> None:
    default = f"--serve={SERVE_PORT}"
    assert _with_port(["train", "x", "--serve"]) == ["train", "x", default]
    assert _with_port(["train", "x", "--serve", "a=1"]) == ["train", "x", default, "a=1"]
    assert _with_port(["train", "x", "--serve", "80"]) == ["train", "x", "--serve", "80"]
    assert _with_port(["train", "--serve=80", "x"]) == ["train", "--serve=80", "x"]


def test_the_live_page_updates_and_says_the_end(browser: Any, run: Path) -> None:
    from playwright.sync_api import expect

    server = Server(run, 0)
    try:
        shown = Opened(browser, server.url)
        page = shown.page
        assert "step 200" in page.locator(".state").inner_text()
        page.get_by_role("button", name="6", exact=True).click()
        write_lines(run / "metrics.jsonl", [metrics_row(201)])
        expect(page.locator(".state")).to_contain_text("step 201")
        assert page.get_by_role("button", name="6", exact=True).get_attribute("aria-pressed") == "true"  # fmt: skip
        # Nothing that a reader looks at moves.
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        before = page.evaluate("scrollY")
        assert before > 1000
        write_lines(run / "metrics.jsonl", [metrics_row(202)])
        expect(page.locator(".state")).to_contain_text("step 202")
        assert page.evaluate("scrollY") == before
        assert shown.wrong == []
        assert {u for u in shown.asked if not u.startswith("data:")} <= {server.url, f"{server.url}data.json"}  # fmt: skip
    finally:
        server.stop()
    expect(page.locator("#made")).to_contain_text("has ended")


def training(folder: Path, **fields: Any) -> "subprocess.Popen[str]":
    """A run into folder/run, with its live page."""
    config = folder / "job.yaml"
    config.write_text(yaml.safe_dump(job_fields(write_corpus(folder), folder / "run", max_steps=100_000, **fields)))  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "unisono", "train", str(config), "--serve=0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
    )


def url_at_step(process: "subprocess.Popen[str]", step: int) -> str:
    """Of the live page, once the run has come so far."""
    assert process.stdout is not None
    url = ""
    for line in process.stdout:
        if line.startswith("live page: "):
            url = line.split()[-1]
        if line.startswith(f"step {step}/"):
            break
    return url


def test_the_page_of_a_run_that_was_killed_says_so_and_stays_whole(
    browser: Any, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    with training(tmp_path) as process:
        try:
            url = url_at_step(process, 20)
            shown = Opened(browser, url)
            page, state = shown.page, shown.page.locator(".state")
            expect(page.locator("#made")).to_contain_text("live, ")
            expect(page.locator("svg .line").first).to_be_visible()
            assert "last seen" not in state.inner_text() and shown.wrong == []
            beside = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            assert psutil.wait_procs(beside, timeout=30)[1] == []
        finally:
            process.kill()
    expect(page.locator("#made")).to_contain_text("no answer since")
    expect(state).to_have_class("state gone")
    expect(state).to_have_text(
        re.compile(r"^not finished: step \d+ of 100,000, last seen \d\d:\d\d:\d\d$")
    )
    # What was there stays, drawn and alive.
    drawings = page.locator("svg:visible")
    assert drawings.count() >= 4
    assert "NaN" not in "".join(drawings.evaluate_all("all => all.map(x => x.outerHTML)"))
    page.locator("svg[aria-label^='Loss']").hover(position={"x": 300, "y": 100})
    assert "step" in shown.tip()
    # The browser itself notes each request that nobody answers; the page adds nothing to that.
    unanswered = "error: Failed to load resource: net::ERR_CONNECTION_REFUSED"
    assert [line for line in shown.wrong if line != unanswered] == []


def test_training_with_serve(tmp_path: Path) -> None:
    """Two replicas: a page while they train, and nothing left behind after SIGTERM."""
    output = tmp_path / "run"
    with training(tmp_path, replicas=2) as process:
        try:
            assert process.stdout is not None
            url = url_at_step(process, 20)
            status, _, text = get(f"{url}data.json")
            assert status == 200
            shown = json.loads(text)["runs"][0]
            assert shown["step"] >= 10 and shown["state"]["kind"] == "open"
            assert shown["timeline"]["steps"][0]["num_ranks"] == 2
            below = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.stdout.read()
            assert process.wait(60) == 75
            assert psutil.wait_procs(below, timeout=30)[1] == []
        finally:
            process.kill()
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(url, timeout=30)
    assert report.view(output)["timeline"]
