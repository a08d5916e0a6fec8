"""The libraries of the server's page, fetched from npm and verified.

    python scripts/vendor.py            compares the files here with the lock file
    python scripts/vendor.py --fetch    packs the locked versions with npm and writes the files

`vendor/lock.json` holds for every package its version, npm's SHA-512 of the packed archive, and for
every file that is taken from it, as it is, where it comes from and its own SHA-512. So a fetch that
differs by one byte from what was reviewed is refused. A new version is a change of the lock by
hand: version and integrity (`npm view NAME@VERSION dist.integrity`), then --fetch --accept, which
writes the sums of the files.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

VENDOR = Path(__file__).parents[1] / "src" / "dropbydrop" / "serve" / "page" / "vendor"


def integrity(data: bytes) -> str:
    """SHA-512 as npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


def read_lock(folder: Path) -> dict[str, Any]:
    lock: dict[str, Any] = json.loads((folder / "lock.json").read_text())
    return lock


def differences(folder: Path) -> list[str]:
    """What in a vendor folder is not as its lock says: files changed, absent or not named."""
    known = {"lock.json": ""}
    for package in read_lock(folder)["packages"].values():
        known |= {name: entry["integrity"] for name, entry in package["files"].items()}
    found = {path.name: path for path in folder.iterdir()}
    wrong = [f"{name}: not in lock.json" for name in sorted(found.keys() - known.keys())]
    for name, wanted in sorted(known.items()):
        if name not in found:
            wrong.append(f"{name}: absent")
        elif wanted and integrity(found[name].read_bytes()) != wanted:
            wrong.append(f"{name}: differs from its SHA-512 in lock.json")
    return wrong


def packed(name: str, version: str, wanted: str, folder: Path) -> Path:
    """The archive that npm has of a package, verified."""
    order = ["npm", "pack", f"{name}@{version}", "--silent", "--ignore-scripts"]
    done = subprocess.run(order, cwd=folder, capture_output=True, text=True, check=True)
    archive = folder / done.stdout.split()[-1]
    if (got := integrity(archive.read_bytes())) != wanted:
        sys.exit(f"{name} {version}: npm sent {got}, locked is {wanted}; nothing was written")
    return archive


def fetch(folder: Path, accept: bool) -> None:
    """Write all files of the lock, or none."""
    lock, files = read_lock(folder), {}
    with tempfile.TemporaryDirectory() as work:
        for name, package in lock["packages"].items():
            archive = packed(name, package["version"], package["integrity"], Path(work))
            with tarfile.open(archive) as tar:
                for target, entry in package["files"].items():
                    member = tar.extractfile(f"package/{entry['from']}")
                    assert member is not None
                    files[target] = data = member.read()
                    if accept:
                        entry["integrity"] = integrity(data)
                    elif entry["integrity"] != integrity(data):
                        sys.exit(f"{target}: not the locked file; nothing was written")
    for target, data in files.items():
        (folder / target).write_bytes(data)
    if accept:
        (folder / "lock.json").write_text(json.dumps(lock, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fetch", action="store_true", help="pack with npm and write the files")
    parser.add_argument("--accept", action="store_true", help="with --fetch: lock what came")
    args = parser.parse_args()
    if args.fetch:
        fetch(VENDOR, args.accept)
    if wrong := differences(VENDOR):
        sys.exit("\n".join(wrong))
    print(f"{VENDOR}: all files are as locked")


if __name__ == "__main__":
    main()
