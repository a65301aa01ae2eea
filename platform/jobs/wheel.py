"""The wheel that goes along with a Ray job, so that a cluster needs our dependencies and not our code.

It is packed from the files of the `openmoe` that runs here, whether that is a source checkout or an installed
distribution, and differs from the wheel of `make wheel` in two things, both because of how Ray takes it in:

- it names no dependencies: Ray runs `pip install --target`, which looks at nothing that is installed and would
  fetch Ray, JAX and all others once more, on every node;
- its version ends in a digest of its files: Ray knows a wheel by its name alone and would keep running the
  code that it was given first.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from openmoe.pipelines import storage

FOLDERS = ("platform", "model", "pipelines", "clusters", "runs")
_TAG = "py3-none-any"
_DATED = (1980, 1, 1, 0, 0, 0)  # the same files give the same bytes


def built_wheel(folder: Path) -> Path:
    """Returns the wheel of the code that runs here; it is written to `folder` unless it is there already."""
    files = package_files()
    version = f"{importlib.metadata.version('openmoe')}+{_digest(files)}"
    path = folder / f"openmoe-{version}-{_TAG}.whl"
    if path.exists():
        return path
    storage.write_durable(str(path), _packed(files, version))
    return path


def only_wheel(folder: Path) -> Path:
    """Returns `built_wheel`, and removes those of other versions: with each job Ray has taken a copy of its own."""
    built = built_wheel(folder)
    for other in folder.glob("openmoe-*.whl"):
        if other != built:
            other.unlink(missing_ok=True)
    return built


def package_files() -> dict[str, bytes]:
    """Returns the content of every file of the package, by its name in a wheel ("openmoe/platform/commands/cli.py")."""
    files = {}
    for name in FOLDERS:
        found = importlib.util.find_spec(f"openmoe.{name}")
        [root, *_] = [Path(place) for place in (found.submodule_search_locations if found else None) or ()]
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in inside.parts):
                files[f"openmoe/{name}/{inside.as_posix()}"] = path.read_bytes()
    return files


def _digest(files: Mapping[str, bytes]) -> str:
    each = (f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted(files.items()))
    return hashlib.sha256("\n".join(each).encode()).hexdigest()[:16]


def _packed(files: Mapping[str, bytes], version: str) -> bytes:
    info = f"openmoe-{version}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: openmoe\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: openmoe\nRoot-Is-Purelib: true\nTag: {_TAG}\n".encode(),
    }
    everything = {**files, **about}
    record = [f"{name},sha256={_record_digest(content)},{len(content)}" for name, content in everything.items()]
    everything[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as wheel:
        for name, content in everything.items():
            entry = zipfile.ZipInfo(name, _DATED)
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, content, compress_type=zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _record_digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
