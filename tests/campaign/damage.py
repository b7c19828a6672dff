"""What disks, people and other programs do to files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random


def flip(path: Path, random: Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def flip_unnoticed(path: Path, random: Random) -> None:
    """Flip one bit and keep the times, as a disk does."""
    before = path.stat()
    flip(path, random)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path, random: Random) -> None:
    """Cut off the end."""
    os.truncate(path, random.randrange(path.stat().st_size))


def empty(path: Path, _: Random) -> None:
    """Leave nothing in it."""
    path.write_bytes(b"")


def grow(path: Path, random: Random) -> None:
    """Put something at the end."""
    path.write_bytes(path.read_bytes() + random.randbytes(random.randrange(1, 9)))


def zero(path: Path, random: Random) -> None:
    """Put zeros in place of a part, as a file system after a crash."""
    content = bytearray(path.read_bytes())
    start = random.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def delete(path: Path, _: Random) -> None:
    """Remove it."""
    path.unlink()


def to_directory(path: Path, _: Random) -> None:
    """Put a directory in its place."""
    path.unlink()
    path.mkdir()


def to_link(path: Path, _: Random) -> None:
    """Put a link to a copy in its place."""
    aside = path.parents[2] / f"elsewhere-{path.name}"
    shutil.move(path, aside)
    path.symlink_to(aside)


def to_pipe(path: Path, _: Random) -> None:
    """Put a pipe in its place."""
    path.unlink()
    os.mkfifo(path)


def swap(path: Path, random: Random) -> None:
    """Exchange it with a neighbour."""
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
    if not others:
        return flip(path, random)
    other = random.choice(others)
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)
    return None


Damage = Callable[[Path, Random], None]
ALL: tuple[Damage, ...] = (
    *(flip, flip, flip_unnoticed, truncate, empty, grow, zero, delete, to_directory, to_link, to_pipe, swap),
)
