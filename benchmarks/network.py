"""Hosts on one machine: network namespaces joined by a cable or a switch, at a rate of one's choice.

Two hosts have a veth pair between them, more hang on a bridge that lives in a namespace of its own.
Everything is inside namespaces named `links-<pid>-...`, so deleting those leaves nothing behind, and
what a killed run left is found by its dead pid and deleted by the next one. What a host sends is
shaped by `tc ... tbf`; latency is that of the kernel (netem is missing from many).

Frames are jumbo (9000 bytes) unless asked otherwise: then TCP's payload reaches 98 to 100% of the
rate, where 1500 bytes leave 95% to it (measured 2026-11-23). The shaper counts the headers of every
frame; the counters of the interface count one header for each packet of up to 64 KB, because the
kernel cuts packets into frames after them (GSO), so they show the payload within 0.2%.

Where namespaces are not permitted the hosts are plain processes that talk over the loopback
interface, unshaped.
"""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PREFIX = "links"
CABLE = "wire"
"""The interface of every host that leads to the others."""
SMALLEST_BURST_BYTES = 192 * 1024
"""Three packets of 64 KB: with less, tbf drops what the kernel has not cut into frames yet."""
BURST_S = 2e-3
"""Above 800 Mbit/s the bucket holds as much; 10 Gbit/s needs it (97% of the rate with 1 ms less)."""
QUEUE_S = 0.1
COMMAND_TIMEOUT_S = 20
_context = multiprocessing.get_context("fork")


class Failed(RuntimeError):
    """A process of a host ended, raised, or did not answer in time."""


class Worker:
    """A process on a host, and the pipe to it. It blocks in `recv` while it has nothing to do."""

    def __init__(self, process: BaseProcess, pipe: Any, label: str) -> None:
        self.process, self.pipe, self.label = process, pipe, label

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


class Network:
    """Hosts 0 to n-1. Use as a context manager: afterwards no process and no namespace is left."""

    def __init__(self, hosts: int, mtu: int = 9000) -> None:
        self.hosts, self.mtu = hosts, mtu
        self.cores = sorted(os.sched_getaffinity(0))
        self.addresses = [f"10.199.78.{k + 1}" for k in range(hosts)]
        self.interface = CABLE
        self.rate: float | None = None
        self.congestion_control = ""
        self.why_unshaped: str | None = None
        """Why rates cannot be had here; None where they can."""
        self._names = [f"{PREFIX}-{os.getpid()}-{k}" for k in range(hosts)]
        self._switch = f"{PREFIX}-{os.getpid()}-switch"
        self._namespaces: list[str] = []
        self._workers: list[Worker] = []

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> None:
        reason = _add_namespaces([*self._names, self._switch][: self.hosts + (self.hosts > 2)])
        if reason:
            self.why_unshaped, self.interface = reason, "lo"
            self.addresses = ["127.0.0.1"] * self.hosts
            return
        self._namespaces = [*self._names, self._switch]
        if self.hosts == 2:
            a, b = self._names
            _run("ip", "link", "add", CABLE, "netns", a, "type", "veth", "peer", "name", CABLE, "netns", b)  # fmt: skip
        else:
            _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge", "mtu", str(self.mtu), "up")
            for k, name in enumerate(self._names):
                port = f"port{k}"
                _run("ip", "link", "add", CABLE, "netns", name, "type", "veth", "peer", "name", port, "netns", self._switch)  # fmt: skip
                _run("ip", "-n", self._switch, "link", "set", port, "mtu", str(self.mtu), "master", "bridge", "up")  # fmt: skip
        for name, address in zip(self._names, self.addresses):
            # No IPv6 address: its announcements would be counted as traffic.
            for device in (CABLE, "lo"):
                _run("ip", "-n", name, "link", "set", device, "addrgenmode", "none", check=False)
            _run("ip", "-n", name, "link", "set", CABLE, "mtu", str(self.mtu), "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", CABLE)
        self.congestion_control = self._choose_cubic()
        self.why_unshaped = self._try_shaper()

    def _choose_cubic(self) -> str:
        """TCP as Linux has it by default, wherever this machine is set to something else."""
        for name, address in zip(self._names, self.addresses):
            subnet = address.rpartition(".")[0] + ".0/24"
            done = _run("ip", "-n", name, "route", "replace", subnet, "dev", CABLE, "congctl", "cubic", check=False)  # fmt: skip
            if done.returncode:
                return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
        return "cubic"

    def _try_shaper(self) -> str | None:
        try:
            self.shape(1e9)
            self.shape(None)
        except (OSError, subprocess.SubprocessError) as error:
            return f"tc cannot shape here: {getattr(error, 'stderr', '') or error}".strip()
        return None

    def shape(self, bits_per_s: float | None, host: int | None = None) -> None:
        """Every host, or this one, sends at most at this rate from now on; None: as fast as it can."""
        if not self._namespaces:
            assert bits_per_s is None, self.why_unshaped
            return
        for name in self._names if host is None else [self._names[host]]:
            qdisc = ("tc", "-n", name, "qdisc")
            if bits_per_s is None:
                _run(*qdisc, "delete", "dev", CABLE, "root", check=False)
                continue
            burst_bytes = max(SMALLEST_BURST_BYTES, int(bits_per_s / 8 * BURST_S))
            _run(*qdisc, "replace", "dev", CABLE, "root", "tbf", "rate", f"{int(bits_per_s)}bit",
                 "burst", str(burst_bytes), "latency", f"{int(QUEUE_S * 1e3)}ms")  # fmt: skip
        self.rate = bits_per_s

    def counters(self) -> list[tuple[int, int]]:
        """(sent, received) bytes of every host's interface since it was made.

        Over loopback all hosts share one interface, and each is given its share of the sum.
        """
        if not self._namespaces:
            folder = Path("/sys/class/net/lo/statistics")
            both = [int((folder / f).read_text()) // self.hosts for f in ("tx_bytes", "rx_bytes")]
            return [(both[0], both[1])] * self.hosts
        found = []
        for name in self._names:
            # The same counters as /sys/class/net/wire/statistics inside the namespace.
            line = _run("ip", "netns", "exec", name, "grep", f"{CABLE}:", "/proc/net/dev").stdout
            fields = line.partition(":")[2].split()
            found.append((int(fields[8]), int(fields[0])))
        return found

    def start(self, host: int, label: str, function: Callable, *args: Any) -> Worker:
        """Fork a process on a host, pinned to a core, that runs `function(pipe, *args)`.

        It dies with this process, whatever ends that. More hosts than cores share them in turn.
        """
        ours, theirs = _context.Pipe()
        place = (
            self._names[host] if self._namespaces else None,
            self.cores[host % len(self.cores)],
        )
        process = _context.Process(target=_enter, args=(place, os.getpid(), ours, theirs, function, args))  # fmt: skip
        process.start()
        theirs.close()
        worker = Worker(process, ours, label)
        self._workers.append(worker)
        return worker

    def drop(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.kill()
            self._workers.remove(worker)

    def close(self) -> None:
        """Kill what was started, then delete the namespaces. Deaf to signals meanwhile."""
        heard = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with contextlib.suppress(ValueError):  # not the main thread
                heard[number] = signal.signal(number, signal.SIG_IGN)
        self.drop(list(self._workers))
        for name in self._namespaces or [*self._names, self._switch]:
            _delete_namespace(name)
        for number, handler in heard.items():
            signal.signal(number, handler)

    def measure_tcp(self, seconds: float = 2.0) -> list[float]:
        """Payload bits/s that every host received, each sending to the next one, all at once."""
        workers = [
            self.start(k, f"TCP stream of host {k}", _stream, address, seconds)
            for k, address in enumerate(self.addresses)
        ]
        try:
            ports = gather(workers, 20)
            for k, worker in enumerate(workers):
                after = (k + 1) % self.hosts
                worker.pipe.send((self.addresses[after], ports[after]))
            return gather(workers, seconds + 30)
        finally:
            self.drop(workers)


def gather(workers: list[Worker], timeout_s: float) -> list[Any]:
    """One answer of each; raises Failed, naming the first that raised, ended or is late."""
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(answers) < len(workers):
        left = [k for k in range(len(workers)) if k not in answers]
        pipes = [workers[k].pipe for k in left]
        ready = multiprocessing.connection.wait(pipes, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(workers[k].label for k in left)
            raise Failed(f"no answer within {timeout_s:.0f} s from {late}")
        for k in left:
            worker = workers[k]
            if worker.pipe not in ready:
                continue
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, OSError) as error:
                worker.process.join(5)
                code = worker.process.exitcode
                raise Failed(f"{worker.label} died (exit code {code})") from error
            if kind == "error":
                raise Failed(f"{worker.label}: {value}")
            answers[k] = value
    return [answers[k] for k in range(len(workers))]


def remove_stale() -> None:
    """Delete the namespaces of earlier runs whose process is gone, and what still runs in them."""
    if shutil.which("ip") is None:
        return
    for line in _run("ip", "netns", "list", check=False).stdout.splitlines():
        found = re.match(rf"{PREFIX}-(\d+)-(\d+|switch)\b", line)
        if found and not Path(f"/proc/{found[1]}").exists():
            _delete_namespace(found[0])


def _enter(
    place: tuple[str | None, int],
    parent: int,
    ours: Any,
    pipe: Any,
    function: Callable,
    args: tuple,
) -> None:
    """First of all in a forked process: die with the parent, move to the host, then work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then kills
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig, clone_newnet = 1, 0x40000000
    libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the line above
        os._exit(1)
    ours.close()
    namespace, core = place
    os.sched_setaffinity(0, {core})
    try:
        if namespace is not None:
            with open(f"/run/netns/{namespace}") as file:
                if libc.setns(file.fileno(), clone_newnet):
                    raise OSError(ctypes.get_errno(), f"setns to {namespace}")
        function(pipe, *args)
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send(("error", f"{type(error).__name__}: {error}"))
        os._exit(1)


def _stream(pipe: Any, address: str, seconds: float) -> None:
    """Receive from one host while sending to another; answers the port, then payload bits/s."""
    with socket.create_server((address, 0)) as server:
        server.settimeout(20)
        pipe.send(("ok", server.getsockname()[1]))
        target = pipe.recv()
        sender = threading.Thread(target=_send, args=(target, seconds), daemon=True)
        sender.start()
        stream, _ = server.accept()
        buffer = bytearray(1 << 20)
        began, got = time.perf_counter(), 0
        counted_from = began + 0.2 * seconds  # by then the shaper's bucket and TCP's start are past
        first: float | None = None
        last = began
        while size := stream.recv_into(buffer):
            last = time.perf_counter()
            if first is not None:
                got += size
            elif last >= counted_from:
                first = last
    assert first is not None
    pipe.send(("ok", 8 * got / (last - first)))


def _send(target: tuple[str, int], seconds: float) -> None:
    with socket.create_connection(target, timeout=20) as stream:
        data = bytes(1 << 18)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            stream.sendall(data)


def _add_namespaces(names: list[str]) -> str | None:
    """None, or why it cannot be done."""
    if os.uname().sysname != "Linux" or shutil.which("ip") is None or shutil.which("tc") is None:
        return "no `ip` and `tc` commands (iproute2)"
    for name in names:
        made = _run("ip", "netns", "add", name, check=False)
        if made.returncode:
            for other in names:
                _delete_namespace(other)
            return f"`ip netns add` is not permitted: {made.stderr.strip()}"
    return None


def _delete_namespace(name: str) -> None:
    if not Path(f"/run/netns/{name}").exists():
        return
    for pid in _run("ip", "netns", "pids", name, check=False).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _run("ip", "netns", "delete", name, check=False)


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=check, timeout=COMMAND_TIMEOUT_S
    )
