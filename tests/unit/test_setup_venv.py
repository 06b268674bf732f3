"""Setting up: the right Python is picked, and where there is none, one command says what to do.

The script runs for real, on a PATH that holds a few tools and the Pythons and package managers of
the machine under test, each a small program that behaves like the one it is named after.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup-venv"
TOOLS = ("cat", "cksum", "dirname", "env", "sed", "sh", "touch", "rm")

# A version manager's shim for a Python that is not installed.
SHIM = "#!/bin/sh\necho 'command not found' >&2\nexit 127\n"
TOO_OLD = "#!/bin/sh\nexit 1\n"


def python(version: str, *, venv: bool) -> str:
    """A Python of `version` that is supported; asked to make an environment it fails with 7."""
    return f"""#!/bin/sh
case "$*" in
*maxsize*) exit 0 ;;
*ensurepip*) exit {0 if venv else 1} ;;
*version_info*) echo {version} ;;
--version) echo "Python {version}.0" ;;
"-m venv "*) exit 7 ;;
*) exit 99 ;;
esac
"""


def set_up(tmp_path: Path, programs: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the script where `programs` (name and text) and the plain tools are all there is."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (path / tool).symlink_to(found)
    ordinary_user = {
        "id": "#!/bin/sh\necho 1000\n",
        "uname": "#!/bin/sh\necho Linux\n",
        # The one command is for a machine as it is here, not for what runs the test.
        "apt-cache": "#!/bin/sh\necho '  Candidate: 3.11.2-1'\n",
    }
    for name, text in {**ordinary_user, **programs}.items():
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    return subprocess.run(
        [str(SCRIPT), str(tmp_path / "venv")],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_newest_python_that_runs_and_has_venv_is_picked(tmp_path: Path) -> None:
    result = set_up(
        tmp_path,
        {
            "python3.14": SHIM,
            "python3.13": python("3.13", venv=False),
            "python3.12": python("3.12", venv=True),
            "python3.11": python("3.11", venv=True),
        },
    )
    assert f"Making {tmp_path / 'venv'} with Python 3.12.0" in result.stderr
    assert result.returncode == 7


def test_a_supported_python_of_another_name_will_do(tmp_path: Path) -> None:
    result = set_up(tmp_path, {"python3.11": SHIM, "python3": python("3.13", venv=True)})
    assert "with Python 3.13.0" in result.stderr


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        ("apt-get", "sudo apt-get install -y python3-venv"),
        ("dnf", "sudo dnf install -y python3.12"),
        ("pacman", "sudo pacman -S --needed --noconfirm python"),
        ("zypper", "sudo zypper install -y python311"),
        ("brew", "brew install python@3.13"),
    ],
)
def test_without_python_the_one_command_for_this_system_is_printed(
    tmp_path: Path, manager: str, command: str
) -> None:
    result = set_up(tmp_path, {"python3.12": SHIM, "python3": TOO_OLD, manager: SHIM})
    assert result.returncode == 1
    assert [line.strip() for line in result.stderr.splitlines()][-1] == command
    assert not (tmp_path / "venv").exists()


def test_a_debian_whose_python_is_too_old_is_told_a_newer_one(tmp_path: Path) -> None:
    old = "#!/bin/sh\necho '  Candidate: 3.10.6-1'\n"
    result = set_up(tmp_path, {"apt-get": SHIM, "apt-cache": old, "python3": TOO_OLD})
    assert result.stderr.rstrip().endswith("sudo apt-get install -y python3.11-venv")


def test_root_is_told_a_command_without_sudo(tmp_path: Path) -> None:
    result = set_up(tmp_path, {"dnf": SHIM, "id": "#!/bin/sh\necho 0\n"})
    assert result.stderr.splitlines()[-1].strip() == "dnf install -y python3.12"


def test_python_without_venv_is_told_the_package_that_brings_it(tmp_path: Path) -> None:
    result = set_up(tmp_path, {"python3.12": python("3.12", venv=False), "apt-get": SHIM})
    assert result.returncode == 1
    assert "python3.12 cannot make virtual environments" in result.stderr
    assert result.stderr.rstrip().endswith("sudo apt-get install -y python3.12-venv")
