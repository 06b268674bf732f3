"""What /proc says is read right, and what commands and daemons use is counted once and whole."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import processes
from bench.processes import (
    Command,
    Cpu,
    MeasurementFailed,
    measure,
    parse_busy_seconds,
    parse_peak_bytes,
    parse_stat,
)

TICKS = os.sysconf("SC_CLK_TCK")
BURN_S = 0.2
BURN = f"import time\nwhile time.process_time() < {BURN_S}: pass"
# For each connection, a child that uses CPU time; the client waits until it has ended.
DAEMON = f"""
import socket, subprocess, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    subprocess.run([sys.executable, "-c", {BURN!r}], check=True)
    connection.close()
"""
CLIENT = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.recv(1)
"""


def command(code: str, *arguments: str, label: str = "client") -> Command:
    return Command(label, [sys.executable, "-c", code, *arguments], os.environ)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[int, str]]:
    place = str(tmp_path / "socket")
    process = subprocess.Popen([sys.executable, "-c", DAEMON, place], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid, place
        process.kill()


def test_cpu_time_counts_children_and_survives_any_process_name() -> None:
    numbers = " ".join(["0"] * 10 + [str(seconds * TICKS) for seconds in (1, 2, 30, 40)])
    text = f"123 (a) b (c d)) S {numbers} 20 0 1 0"
    # Field 14 is the first of the four: after the name come the state and ten others.
    assert parse_stat(text) == Cpu(user=31.0, system=42.0)


def test_our_own_stat_line_agrees_with_the_kernels_other_answer() -> None:
    used = parse_stat(Path("/proc/self/stat").read_text())
    times = os.times()
    assert used.user == pytest.approx(times.user + times.children_user, abs=0.5)
    assert used.system == pytest.approx(times.system + times.children_system, abs=0.5)


def test_the_peak_is_in_bytes_and_nothing_for_a_process_without_memory() -> None:
    assert parse_peak_bytes("Name:\tx\nVmPeak:\t  9 kB\nVmHWM:\t   123 kB\n") == 123 * 1024
    assert parse_peak_bytes("Name:\tx\nState:\tZ (zombie)\n") == 0


def test_idle_and_waiting_for_the_disk_are_not_busy() -> None:
    values = [seconds * TICKS for seconds in (1, 2, 4, 800, 1600, 8, 16, 32, 64, 64)]
    text = "cpu  " + " ".join(map(str, values)) + "\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert parse_busy_seconds(text) == 1 + 2 + 4 + 8 + 16 + 32


def test_cpu_adds_and_subtracts() -> None:
    assert Cpu(3, 2) + Cpu(1, 1) == Cpu(4, 3)
    assert Cpu(3, 2) - Cpu(1, 1) == Cpu(2, 1)
    assert Cpu(3, 2).total == 5


def test_commands_run_at_once_and_each_is_counted(tmp_path: Path) -> None:
    # Each waits for the other's file: one after the other they would never end.
    code = (
        "import os, sys, time\nopen(sys.argv[1], 'w').close()\n"
        "while not os.path.exists(sys.argv[2]): time.sleep(0.01)\n" + BURN
    )
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    leg = measure(
        [command(code, one, two, label="one"), command(code, two, one, label="two")], {}, tmp_path
    )
    assert list(leg.cpu) == list(leg.peak_bytes) == ["one", "two"]
    assert all(used.total >= BURN_S for used in leg.cpu.values())
    assert all(peak > 2**20 for peak in leg.peak_bytes.values())
    assert leg.seconds >= BURN_S
    assert leg.cpu_total == leg.cpu["one"].total + leg.cpu["two"].total


def test_a_daemons_children_count_as_the_daemon(tmp_path: Path, daemon: tuple[int, str]) -> None:
    pid, place = daemon
    leg = measure([command(CLIENT, place)], {"daemon": pid}, tmp_path)
    assert leg.cpu["daemon"].total >= BURN_S - 2 / TICKS
    assert leg.cpu["client"].total < leg.cpu["daemon"].total
    again = measure([command("pass")], {"daemon": pid}, tmp_path)
    assert again.cpu["daemon"].total < BURN_S / 2, "what was before the leg is not counted again"


def test_the_largest_process_below_a_daemon_is_its_peak(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "child = 'import sys; held = bytearray(80 * 2**20); '\n"
        "child += 'print(1, flush=True); sys.stdin.read()'\n"
        "with subprocess.Popen([sys.executable, '-c', child], stdin=-1, stdout=-1) as process:\n"
        "    process.stdout.readline(); print('ready', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        assert parent.stdout.readline() == b"ready\n"
        children = processes._descendants(parent.pid)
        assert [processes._peak_bytes(pid) > 80 * 2**20 for pid in children] == [True]
        assert processes._peak_bytes(parent.pid) < 80 * 2**20
        parent.stdin.close()


def test_a_failing_command_is_reported_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; sys.exit('no such shelf')"
    with pytest.raises(MeasurementFailed, match="client ended with 1: no such shelf"):
        measure([command(code)], {}, tmp_path)


def test_a_command_that_never_ends_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LEG_TIMEOUT_S", 1.0)
    code = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
    waiting = command(code + "import signal; signal.pause()", str(tmp_path / "pid"))
    with pytest.raises(MeasurementFailed, match=r"not done after .* client"):
        measure([waiting], {}, tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_daemon_that_is_gone_is_reported(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    with pytest.raises(MeasurementFailed, match="ended during the measurement"):
        measure([command("pass")], {"daemon": process.pid}, tmp_path)
