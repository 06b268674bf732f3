"""The pages that people follow on a bad day are run, exactly as they are printed.

Each page gets a home and an embedded cluster of its own. A command that is meant to fail shows its
exit code on the page (`; echo "exit code $?"`), all others must succeed, and what the page shows is
what is printed.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.page_commands import Command, blocks, commands, run, same_output

from ckptd.client.sample import make_sample
from ckptd.config import check

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PYTHON_PAGE = ROOT / "docs" / "reference" / "python.md"
PRACTICE = ROOT / "docs" / "operating" / "README.md"
BAD_DAYS = sorted(set(PRACTICE.parent.glob("*.md")) - {PRACTICE})

# What a page prints and no test types, and why.
NOT_RUN = {
    "the demo has tests of its own, and tests do not run themselves": (
        "make demo   # the whole story in under a minute",
        "make test   # every test that an ordinary user can run, within ten minutes",
    ),
    "another machine": (
        "ckptd pki issue coordinator desk --dir ~/new-pki --out desk",
        "ckptd serve --config desk.yml",
        "scp -r pi1 pi1.local:",
        "ckptd pki issue worker node2 --out node2-new",
        "ssh pi1.local",
        "scp pi1.local:/srv/ckptd/recovery.bundle .",
        "curl --insecure https://127.0.0.1:9701/healthz",
        "curl --insecure --cert prometheus.pem --key prometheus.key https://pi1.local:9701/metrics",
    ),
    "needs root, and changes the system": (
        "sudo useradd --system --shell /usr/sbin/nologin ckptd",
        "sudo git clone CLONE_URL /opt/ckptd/src",
        "sudo python3 -m venv /opt/ckptd/0.1.0",
        "sudo /opt/ckptd/0.1.0/bin/pip install /opt/ckptd/src",
        "sudo ln -sfn 0.1.0 /opt/ckptd/current",
        "sudo install -d -o ckptd -m 0700 /etc/ckptd /srv/ckptd",
        "sudo install -o ckptd -m 0600 pi1/* /etc/ckptd",
        "sudo rm -r pi1",
        "sudo install -d -o ckptd -m 0700 /srv/ckptd",
        "sudo git -C /opt/ckptd/src pull",
        "sudo python3 -m venv /opt/ckptd/NEW_VERSION",
        "sudo /opt/ckptd/NEW_VERSION/bin/pip install /opt/ckptd/src",
        "sudo ln -sfn NEW_VERSION /opt/ckptd/current",
        "sudo rsync -aH /srv/ckptd/ /mnt/new/",
        "sudo umount /mnt/new",
        "sudo mount /dev/NEW_DISK /srv/ckptd",
    ),
    "systemd": (
        "sudo systemctl daemon-reload",
        "sudo systemctl enable --now ckptd",
        "sudo systemctl restart ckptd",
        "sudo systemctl stop ckptd",
        "sudo systemctl start ckptd",
        "journalctl -u ckptd -n 20",
    ),
    "serves until it is stopped; `local up` runs the same": (
        "sudo -u ckptd /opt/ckptd/current/bin/ckptd serve --init --config /etc/ckptd/ckptd.yml",
    ),
    "looks at the network with tools of the system": (
        "avahi-browse -rt _ckptd._tcp",
        "dns-sd -B _ckptd._tcp",
    ),
    "a line of a crontab": (
        "*/15 * * * * ckptd status > /tmp/ckptd-status 2>&1 "
        '|| mail -s "ckptd: look" me@example.org < /tmp/ckptd-status',
    ),
    "the last step of commands that are not run": ("ckptd verify --all",),
    "openssl need not be installed": (
        "openssl x509 -in node2.pem -noout -enddate -ext subjectAltName",
    ),
}


def faults(page: Path, setup: list[Command], home: Path) -> list[str]:
    """What differs between `page` and what running it in `home` gives."""
    found = []
    for outcome in run([*setup, *commands(page.read_text())], home):
        command, printed = outcome.command, "\n".join(outcome.output)
        if outcome.exit_code != 0:
            found.append(f"$ {command.text}\nends with {outcome.exit_code}:\n{printed}")
        elif not same_output(command.output, outcome.output):
            shown = "\n".join(command.output)
            found.append(f"$ {command.text}\nthe page shows:\n{shown}\nprinted is:\n{printed}")
    return found


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path: the practice cluster keeps everything below it."""
    place = Path(tempfile.mkdtemp(prefix="ckptd-page-"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.timeout(360)
def test_the_readme_does_what_it_says(home: Path) -> None:
    make_sample(home / "runs" / "my-model", layers=2)
    assert faults(README, [], home) == []


@pytest.mark.long
@pytest.mark.timeout(360)
@pytest.mark.parametrize("page", [*BAD_DAYS, PYTHON_PAGE], ids=lambda page: page.stem)
def test_a_page_can_be_followed_from_the_practice_cluster_on(page: Path, home: Path) -> None:
    assert faults(page, commands(PRACTICE.read_text()), home) == []


def test_what_is_printed_and_not_run_has_a_reason() -> None:
    pages = [README, PRACTICE, *BAD_DAYS, PYTHON_PAGE]
    printed = {
        line for page in pages for block in blocks(page.read_text(), "sh") for line in _lines(block)
    }
    excused = {line for lines in NOT_RUN.values() for line in lines}
    assert printed == excused


def test_no_block_of_commands_escapes_the_test() -> None:
    for page in [README, PRACTICE, *BAD_DAYS, PYTHON_PAGE]:
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, page
        assert set(fences[::2]) <= {"console", "python", "sh", "text", "yaml", "ini"}, page
        assert set(fences[1::2]) <= {""}, page
        assert not re.search(r"^ +```", page.read_text(), re.MULTILINE), page


def test_the_configs_that_are_printed_are_valid() -> None:
    printed = blocks(README.read_text(), "yaml")
    assert printed
    for text in printed:
        assert check(text)[1] == []


def test_a_page_that_is_wrong_is_noticed() -> None:
    printed = ["name@0123456789ab is protected: 1.5 MiB in 3 shards", "sent 10 B", "end"]
    assert same_output(["name@fedcba987654 is protected: 20 KiB in 1 shard", "..."], printed)
    assert same_output(["...", "end"], printed)
    assert same_output([], []) and same_output(["..."], [])
    assert not same_output(["name@fedcba987654 is degraded: 20 KiB in 1 shard", "..."], printed)
    assert not same_output(["...", "sent 10 B"], printed)
    assert not same_output([], printed)
    assert not same_output(["exit code 3"], ["exit code 4"])
    assert same_output(["from node1 3 B, node2 4 B"], ["from node3 1.00 GiB"])


def _lines(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.strip()]
