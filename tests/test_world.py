"""The environment becomes a World, or one line that says what is wrong with it."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranks import run_ranks
from unisono.errors import ConfigError
from unisono.world import World, cache_folder, cores, from_env, launched

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_one_replica_without_a_launcher() -> None:
    world = from_env("cpu", environ={})
    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    assert world.is_main
    assert world.device == "cpu"
    assert world.threads == cores()
    assert not launched({})


def test_torchrun() -> None:
    world = from_env("cpu", timeout_s=5, environ=TORCHRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)
    assert not world.is_main
    assert world.timeout_s == 5
    assert launched(TORCHRUN)


def test_world_is_a_value() -> None:
    assert World(rank=1, size=2) == World(rank=1, size=2)
    with pytest.raises(AttributeError):
        World().rank = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("environ", "found", "expected"),
    [({}, None, max(1, cores() // 2)), ({"OMP_NUM_THREADS": "7"}, None, 7), ({}, 3, 3),
     ({"OMP_NUM_THREADS": "7"}, 3, 3), ({"OMP_NUM_THREADS": "x"}, None, max(1, cores() // 2))],
)  # fmt: skip
def test_threads(environ: dict, found: int | None, expected: int) -> None:
    assert from_env("cpu", found, environ={**TORCHRUN, **environ}).threads == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "4"}, "RANK=4: must be below WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK='-1': must be a whole number"),
        ({"RANK": "²"}, "RANK='²': must be a whole number"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE='four': must be a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='': must be a whole number"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK='1.5': must be a whole number"),
        ({"RANK": None}, "RANK is missing beside WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": None}, "WORLD_SIZE is missing beside RANK"),
        ({"WORLD_SIZE": None}, "RANK=3: must be below WORLD_SIZE=1"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing beside RANK and WORLD_SIZE"),
        ({"MASTER_PORT": None}, "MASTER_PORT is missing beside RANK and WORLD_SIZE"),
    ],
)
def test_a_torn_environment_is_refused(changes: dict, message: str) -> None:
    environ = {k: v for k, v in {**TORCHRUN, **changes}.items() if v is not None}
    with pytest.raises(ConfigError, match=f"environment:? {message}") as caught:
        from_env("cpu", environ=environ)
    assert "\n" not in str(caught.value)


def test_a_store_file_needs_no_master() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "UNISONO_STORE": "/tmp/x"}
    assert from_env("cpu", environ=environ).size == 2


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert from_env("auto", environ=TORCHRUN).device == "cpu"
    with pytest.raises(ConfigError, match=r"device: found 'cuda', but torch sees no GPU"):
        from_env("cuda", environ=TORCHRUN)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert from_env("auto", environ=TORCHRUN).device == "cuda:1"
    assert from_env("cpu", environ=TORCHRUN).device == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"replicas: 2 on this host, which has 1 GPU"):
        from_env("auto", environ=TORCHRUN)


@given(rows=st.integers(0, 100), size=st.integers(1, 17))
def test_shares_hold_every_row_once(rows: int, size: int) -> None:
    worlds = [World(rank=r, size=size) for r in range(size)]
    everything = list(range(rows))
    shares = [w.share(everything) for w in worlds]
    assert [x for s in shares for x in s] == everything
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_share_cuts_several_alike() -> None:
    x, y = World(rank=1, size=2).share(torch.arange(10).view(5, 2), list("abcde"))
    assert x.tolist() == [[4, 5], [6, 7], [8, 9]]
    assert y == ["c", "d", "e"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "unisono"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "unisono"


# --- who listens


def listening(pid: int | str = "self") -> list[str]:
    """Addresses, as the kernel writes them, on which a process waits for connections."""
    sockets = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            sockets.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found.append(local.split(":")[0])
    return found


def is_loopback(address: str) -> bool:
    """127.0.0.0/8 and ::1, in /proc's order of bytes."""
    return address.endswith("7F") if len(address) == 8 else address == "0" * 24 + "01000000"


def alone(world) -> tuple[list[str], str | None]:
    for name in ("RANK", "WORLD_SIZE", "UNISONO_STORE", "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name)
    from unisono.sync.ledger import Group, Ledger
    from unisono.world import joined

    with joined(from_env("cpu")) as mine:
        assert mine.size == 1
        Group("test", Ledger(), 60).barrier()
        return listening(), os.environ.get("GLOO_SOCKET_IFNAME")


def test_one_replica_listens_to_nobody_beyond_this_machine() -> None:
    """gloo would listen on the address of this host's name, which in a container is not loopback."""
    [(addresses, interface)] = run_ranks(alone, 1, join=False)
    assert all(map(is_loopback, addresses)), addresses
    assert interface == "lo"


def together(world) -> list[str]:
    from unisono.sync.ledger import Group, Ledger

    Group("test", Ledger(), 60).barrier()
    return listening()


def test_local_replicas_listen_to_nobody_beyond_this_machine() -> None:
    for addresses in run_ranks(together, 2):
        assert addresses, "gloo does listen, so the test sees it"
        assert all(map(is_loopback, addresses)), addresses


def open_to_all(world) -> list[str]:
    import socket

    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen()
        return listening()


def test_a_socket_open_to_all_would_be_seen() -> None:
    """The control of the two tests above."""
    [addresses] = run_ranks(open_to_all, 1, join=False)
    assert not all(map(is_loopback, addresses))


def over_the_master(world) -> tuple[int, str | None]:
    """As torchrun starts ranks: an address and a port, and no interface named."""
    import socket

    os.environ.pop("UNISONO_STORE")
    os.environ.pop("GLOO_SOCKET_IFNAME")
    from unisono.sync.ledger import Group, Ledger
    from unisono.world import join

    mine = join("cpu")
    assert (mine.rank, mine.size) == (world.rank, world.size)
    assert socket.gethostname() == mine.host
    total = Group("test", Ledger(), 60).sum(1.0)[0]
    return int(total), os.environ.get("GLOO_SOCKET_IFNAME")


def test_join_meets_at_the_masters_address() -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert run_ranks(over_the_master, 2, join=False, env=env) == [(2, "lo")] * 2
