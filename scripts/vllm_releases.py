"""vLLM's releases on the package registry: which there are, and their files under build/vllm."""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/vllm"
SOURCE = (".py", ".json", ".jinja")  # of a wheel; its libraries are for another device


class UnreachableError(Exception):
    """pip did not get what it was asked for."""


def pip(*arguments: str) -> str:
    options = ("--disable-pip-version-check", "--retries", "1", "--timeout", "30")
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, *options], capture_output=True, text=True
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UnreachableError(f"pip {arguments[0]}: {(said or ['no answer'])[0]}")
    return done.stdout


def minor_of(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def newest(package: str, minor: str | None = None) -> str | None:
    """The newest release, of a minor if one is given; None if there is none."""
    listed = re.search(r"^Available versions: (.+)$", pip("index", "versions", package), re.M)
    if listed is None:
        raise UnreachableError(f"pip index versions {package}: lists none")
    versions = listed[1].split(", ")
    return next((v for v in versions if minor is None or minor_of(v) == minor), None)


def unpacked(package: str, version: str, everything: bool = False) -> Path:
    """A folder with the files of a release's wheel, its source or everything. Downloads once."""
    folder = BUILD / f"{package}-{version}"
    if folder.is_dir():
        return folder
    BUILD.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=BUILD, prefix=".download-") as scratch:
        pip(
            "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:",
            "--dest", scratch, f"{package}=={version}",
        )  # fmt: skip
        with ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            names = [n for n in wheel.namelist() if everything or n.endswith(SOURCE)]
            wheel.extractall(Path(scratch, "files"), names)
        try:
            Path(scratch, "files").rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder
