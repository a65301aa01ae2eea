"""The wheel that Ray jobs carry: the code that runs here, and nothing else."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from openmoe.platform.jobs import wheel

ROOT = Path(__file__).resolve().parents[3]
UV = Path(sys.executable).parent / "uv"


def names(path):
    with zipfile.ZipFile(path) as archive:
        return sorted(n for n in archive.namelist() if ".dist-info/" not in n)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources: setuptools leaves a build folder beside what it builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in wheel.FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def released(source):
    """The wheel of `make wheel`."""
    options = ["-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source / "dist")]
    build = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(build, check=True, cwd=source, capture_output=True)
    [path] = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(released, tmp_path_factory):
    """The released wheel as users install it, in a folder of its own."""
    site = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--offline", "--no-deps", "--python", sys.executable, "--target", str(site)]
    subprocess.run([UV, "pip", "install", *options, str(released)], check=True)
    return site


def packed_by(site, folder):
    """Packs the `openmoe` that lies in `site`, in a process that sees that one."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        f"sys.path.insert(0, {str(site)!r}); from pathlib import Path; from openmoe.platform.jobs import wheel;"
        f"assert wheel.__file__.startswith({str(site)!r}), wheel.__file__;"
        f"print(wheel.built_wheel(Path({str(folder)!r})))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=folder)
    return Path(out.stdout.strip())


def test_it_has_the_files_of_the_released_wheel(released, tmp_path):
    assert names(wheel.built_wheel(tmp_path)) == names(released)
    assert "openmoe/platform/run/driver.py" in names(released)


def test_packed_from_an_installed_distribution_it_has_the_same_files(installed, released, tmp_path):
    again = packed_by(installed, tmp_path)
    assert names(again) == names(released)
    with zipfile.ZipFile(again) as ours, zipfile.ZipFile(released) as theirs:
        assert all(ours.read(name) == theirs.read(name) for name in names(released))


def test_it_installs_as_ray_does_and_fetches_nothing(tmp_path):
    path = wheel.built_wheel(tmp_path)
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", f"--target={target}", str(path)]
    subprocess.run(pip, check=True, capture_output=True, env={"PATH": "/nowhere"})
    [distribution] = importlib.metadata.distributions(path=[str(target)])
    assert (distribution.name, distribution.requires) == ("openmoe", None)
    assert {p.name for p in target.iterdir()} == {"openmoe", f"openmoe-{distribution.version}.dist-info"}
    content = (target / "openmoe" / "platform" / "jobs" / "wheel.py").read_bytes()
    assert content == (ROOT / "platform" / "jobs" / "wheel.py").read_bytes()


def test_the_controllers_folder_keeps_the_wheel_of_the_code_that_runs_alone(tmp_path):
    for name in ("openmoe-0.1.0+0123456789abcdef-py3-none-any.whl", "mine.whl"):
        (tmp_path / name).write_bytes(b"")
    built = wheel.only_wheel(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {built.name, "mine.whl"}
    assert wheel.only_wheel(tmp_path) == built == wheel.built_wheel(tmp_path)


def test_the_same_code_is_packed_once_and_changed_code_gets_another_name(installed, tmp_path):
    first = packed_by(installed, tmp_path)
    written_ns = first.stat().st_mtime_ns
    assert packed_by(installed, tmp_path) == first
    assert first.stat().st_mtime_ns == written_ns
    assert first.name.startswith("openmoe-0.1.0+")
    changed = installed / "openmoe" / "model" / "config.py"
    before = changed.read_bytes()
    changed.write_bytes(before + b"# changed\n")
    try:
        assert packed_by(installed, tmp_path).name != first.name
    finally:
        changed.write_bytes(before)
    assert len(list(tmp_path.iterdir())) == 2
