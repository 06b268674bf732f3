"""Disks that misbehave on purpose: ext4 on loop devices, over a file or over nbdkit.

nbdkit serves a disk whose faults a test chooses, nbdfuse shows it as a file, a loop device makes a
block device of that file. Each disk takes away whatever it has made, also after a failure.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.root.processes import end, run, wait_until

_MIB: Final = 1024 * 1024


class Disk:
    """An ext4 file system of `size_mib` on a loop device over the file `image`, mounted at will.

    `directory` holds the disk's own files and is made. `mkfs` are more arguments of mkfs.ext4.
    """

    def __init__(self, directory: Path, size_mib: int, *, mkfs: Sequence[str] = ()) -> None:
        self.directory = directory
        self.size_mib = size_mib
        self._mkfs = tuple(mkfs)
        self.mount_point: Path | None = None
        self._device = ""
        directory.mkdir(parents=True)

    _loop_options: Sequence[str] = ()

    # -- what lies below the file system; a disk of another kind says it differently

    def _attach_image(self) -> Path:
        """Makes the file that the loop device is over; returns it."""
        image = self.directory / "image"
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(self.size_mib * _MIB)
        return image

    def _detach_image(self) -> None:
        """Undoes `_attach_image`; may be called twice."""

    # -- from outside

    def mount(self, mount_point: Path, *options: str) -> None:
        """Attaches what is not, makes the file system the first time, and mounts it."""
        new = not self._device and not (self.directory / "made").exists()
        if not self._device:
            image = self._attach_image()
            device = run("losetup", "--find", "--show", *self._loop_options, image)
            self._device = device.strip()
        if new:
            run("mkfs.ext4", "-q", "-F", "-m", "0", *self._mkfs, self._device)
            (self.directory / "made").touch()
        mount_point.mkdir(parents=True, exist_ok=True)
        run("mount", "-o", ",".join(("rw", *options)), self._device, mount_point)
        self.mount_point = mount_point

    def turn_read_only(self) -> None:
        """The kernel finds the file system damaged, and makes it read-only under its users. It
        must have been mounted with errors=remount-ro."""
        name = Path(self._device).name
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("1", encoding="ascii")

    def unmount(self, *, lazily: bool = False) -> None:
        """Unmounts; the device stays. Nothing when it is not mounted."""
        mount_point, self.mount_point = self.mount_point, None
        if mount_point is not None:
            run("umount", *(["--lazy"] if lazily else []), mount_point)

    def check(self) -> None:
        """Repairs the unmounted file system as a boot would: e2fsck, journal and all."""
        done = subprocess.run(
            ["e2fsck", "-f", "-y", self._device], capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: corrected

    def detach(self) -> None:
        """Unmounts and takes the device away; what the medium holds stays. May be called twice."""
        self.unmount()
        device, self._device = self._device, ""
        if device:
            run("losetup", "--detach", device)
            wait_until(lambda: not _is_attached(device), f"{device} is still attached")
        self._detach_image()

    def remove(self) -> None:
        """Takes everything away, whatever state a test has left it in."""
        device, self._device = self._device, ""
        with ExitStack() as stack:  # each step happens, also after one that fails
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(self._detach_image)
            if device:
                stack.callback(
                    wait_until, lambda: not _is_attached(device), f"{device} is still attached"
                )
                stack.callback(run, "losetup", "--detach", device)
            stack.callback(self.unmount, lazily=True)


class FaultyDisk(Disk):
    """A disk served by nbdkit: `plugin` and `filters` are its arguments, "{directory}" in them
    stands for the disk's directory."""

    # Past the page cache of the file that nbdfuse shows: what was read once is read again.
    _loop_options = ("--direct-io=on",)

    def __init__(
        self,
        directory: Path,
        size_mib: int,
        *,
        filters: Sequence[str],
        plugin: Sequence[str] = ("memory", "{size_mib}M"),
        settings: Sequence[str] = (),
    ) -> None:
        super().__init__(directory, size_mib)
        arguments = [*filters, *plugin, *settings]
        self._arguments = [
            part.format(directory=directory, size_mib=size_mib) for part in arguments
        ]
        self._server: subprocess.Popen[bytes] | None = None
        self._viewer: subprocess.Popen[bytes] | None = None

    def cut_power(self) -> None:
        """The disk is gone at once, with everything that was not flushed."""
        assert self._server is not None
        self._server.kill()
        self._server.wait()

    def remove(self) -> None:
        """As for every disk, without waiting until a slow one has written what nobody will read."""
        if self._server is not None:
            self.cut_power()
        super().remove()

    def _attach_image(self) -> Path:
        socket, view = self.directory / "socket", self.directory / "view"
        socket.unlink(missing_ok=True)
        view.mkdir(exist_ok=True)
        log = (self.directory / "log").open("ab")
        with log:
            self._server = subprocess.Popen(
                ["nbdkit", "--foreground", "--exit-with-parent", "-U", socket, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            wait_until(socket.is_socket, "nbdkit does not listen")
            image = view / "disk"
            self._viewer = subprocess.Popen(
                ["nbdfuse", image, "--unix", socket],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(image.exists, "nbdfuse shows no disk")
        return image

    def _detach_image(self) -> None:
        viewer, self._viewer = self._viewer, None
        if viewer is not None:
            view = self.directory / "view"
            # Not os.path.ismount, which calls a view whose server has died no mount.
            if str(view) in mounts_below(self.directory):
                run("fusermount3", "-u", "-z", view)
            end(viewer)
        server, self._server = self._server, None
        if server is not None:
            end(server)


def disk_with_errors(directory: Path, size_mib: int) -> FaultyDisk:
    """A disk whose reads fail with EIO while DIRECTORY/fail-reads exists, its writes while
    DIRECTORY/fail-writes does."""
    return FaultyDisk(
        directory,
        size_mib,
        filters=["--filter=error"],
        settings=[
            "error=EIO",
            "error-pread-rate=100%",
            "error-pread-file={directory}/fail-reads",
            "error-pwrite-rate=100%",
            "error-pwrite-file={directory}/fail-writes",
        ],
    )


def disk_with_volatile_cache(directory: Path, size_mib: int) -> FaultyDisk:
    """A disk whose cache keeps everything until it is flushed, and loses it with the power."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    disk = FaultyDisk(
        directory,
        size_mib,
        filters=["--filter=cache"],
        plugin=("file", "{directory}/medium"),
        settings=["cache=writeback"],
    )
    with (directory / "medium").open("wb") as medium:
        medium.truncate(size_mib * _MIB)
    return disk


def slow_disk(directory: Path, size_mib: int, bytes_per_s: int) -> FaultyDisk:
    """A disk that reads and writes `bytes_per_s` in all, as a memory card does."""
    return FaultyDisk(
        directory,
        size_mib,
        filters=["--filter=rate"],
        settings=[f"rate={bytes_per_s * 8}", "burstiness=0.1"],
    )


def _is_attached(device: str) -> bool:
    return Path(f"/sys/block/{Path(device).name}/loop/backing_file").exists()


def mounts_below(directory: Path) -> list[str]:
    """Mount points below `directory`."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        points = [line.split()[4] for line in lines]
    return [point for point in points if point.startswith(f"{directory}/")]


def loops_below(directory: Path) -> list[str]:
    """Loop devices over files below `directory`."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it was just detached
            if backing.read_text(encoding="utf-8").startswith(f"{directory}/"):
                found.append(f"/dev/{backing.parts[3]}")
    return found
