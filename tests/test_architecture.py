"""The rules of CONTRIBUTING.md that a machine can hold: who imports whom, names, sizes, package lists."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("platform", "model", "pipelines", "clusters")
# Copied into exports and run by transformers; not imported here, so the rules about imports are not for them.
EXPORTED = sorted((ROOT / "model" / "hf_export").glob("*.py"))
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path not in EXPORTED)

ALLOWED = {
    "model": {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "etils", "tensorstore", "msgpack", "fsspec"},
    "pipelines": {
        "numpy",
        "pyarrow",
        "sentencepiece",
        "array_record",
        "fsspec",
        "gcsfs",
        "aiohttp",
        "google",
        "zstandard",
        "ray",
    },
    "clusters": {"yaml", "pydantic", "psutil"},
}
CONFIG_MODULES = (
    "openmoe.model.config",
    "openmoe.model.counts",
    "openmoe.model.optimizer_config",
    "openmoe.model.parameter_names",
    "openmoe.pipelines.config",
    "openmoe.platform.commands.cli",
    "openmoe.platform.run_file.spec",
    "openmoe.platform.jobs.job_store",
    "openmoe.platform.jobs.cron",
    "openmoe.clusters.spec",
    "openmoe.clusters.twin",
)
# Inside platform, imports go leftwards: pure <- files <- everything else, which reaches the outside world.
PURE = (
    "run_file.run_length", "run_file.spec", "run_file.spec_checks", "run_file.spec_errors", "run_file.spec_optimizer",
    "run_file.spec_paths", "run_file.spec_sections", "run_file.spec_source", "run_file.spec_yaml",
    "run_file.validate_memory",
    "planner.plan", "planner.plan_assumptions", "planner.plan_choice", "planner.plan_hardware", "planner.plan_page",
    "planner.plan_program", "planner.plan_time", "planner.plan_work", "planner.layouts",
    "jobs.attempt_end", "jobs.cluster_fit", "jobs.cron", "jobs.job", "jobs.job_events", "jobs.placement", "jobs.story",
    "commands.facts",
    "ablations.ablation",
    "train.cadence", "train.health", "train.saturation",
    "run.goodput", "run.ledger", "run.lineage", "run.slices", "run.stragglers", "run.verdict",
)  # fmt: skip
FILES = (
    "home",
    "run_file.validate", "run_file.validate_data",
    "jobs.cluster_file", "jobs.controller_lock", "jobs.job_store", "jobs.story_records", "jobs.wheel",
    "commands.tables",
    "data.data_figures", "data.data_plan", "data.data_report", "data.data_summary",
    "ablations.ablation_report",
    "train.checkpoints", "train.compile_cache", "train.evaluation", "train.event_files", "train.health_watch",
    "train.init_from", "train.init_source", "train.memory_kills", "train.milestones", "train.notice", "train.pace",
    "train.prefetch", "train.profiling", "train.recorder", "train.replay", "train.restore", "train.sampling",
    "train.saver", "train.stacks", "train.train_loop", "train.train_step", "train.wandb_curves", "train.watchdog",
    "train.compile_ahead",
    "run.attempt_log", "run.goodput_records", "run.instances", "run.journal", "run.ledger_data", "run.report",
    "run.rewind", "run.run_dir",
    "dashboard.accounts", "dashboard.curves", "dashboard.follow", "dashboard.incidents", "dashboard.summary",
    "dashboard.views", "dashboard.watch",
)  # fmt: skip
HEAVY = ("jax", "ray", "pyarrow", "numpy", "orbax", "flax", "sentencepiece")


def imports(path):
    """All modules a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_importing(*modules):
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name == m or name.startswith(m + ".") for name in imports(path) for m in modules)
    }


@pytest.mark.parametrize("folder", ALLOWED)
def test_folder_imports_only_what_the_design_allows(folder):
    allowed = ALLOWED[folder] | set(sys.stdlib_module_names)
    for path in (path for path in SOURCES if path.is_relative_to(ROOT / folder)):
        for name in imports(path):
            top = name.split(".")[0]
            if top == "openmoe":
                assert name.split(".")[1:2] in ([folder], []), f"{path}: imports {name}"
            else:
                assert top in allowed, f"{path}: imports {name}"


@pytest.mark.parametrize(("layer", "below"), [(PURE, PURE), (FILES, [*PURE, *FILES])], ids=["pure", "files"])
def test_imports_inside_platform_go_leftwards(layer, below):
    prefix = "openmoe.platform."
    modules = {str(p.relative_to(ROOT / "platform"))[:-3].replace("/", ".") for p in (ROOT / "platform").rglob("*.py")}
    for name in layer:
        path = ROOT / "platform" / f"{name.replace('.', '/')}.py"
        found = {m.removeprefix(prefix) for m in imports(path) if m.startswith(prefix)} & modules
        assert found <= set(below), f"{name}: imports {sorted(found - set(below))}"
        assert not {m for m in imports(path) if m.split(".")[0] == "ray"}, f"{name}: imports ray"


def test_ray_train_ray_data_and_ray_jobs_are_each_called_in_one_file():
    assert files_importing("ray.train") == {"platform/run/worker_group.py"}
    assert files_importing("ray.data") == {"pipelines/ray_tasks.py"}
    assert files_importing("ray.job_submission", "ray.dashboard") == {"platform/jobs/ray_jobs.py"}


def test_pytorch_is_for_exports_alone():
    assert files_importing("torch", "transformers", "safetensors", "openmoe.model.hf_export") == set()


def test_nothing_imports_the_internals_of_ray():
    for path in SOURCES:
        private = [name for name in imports(path) if name.startswith("ray.") and "._" in name]
        assert not private, f"{path}: {private}"


def test_configuration_and_help_import_nothing_heavy():
    code = f"import sys, {', '.join(CONFIG_MODULES)}; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_file_carries_the_name_of_a_standard_module():
    folders = [*FOLDERS, "runs", "benchmarks", "tests"]
    files = {p for folder in folders for p in (ROOT / folder).rglob("*.py") if "bad" not in p.parts}
    clashes = [str(p.relative_to(ROOT)) for p in files if p.stem in sys.stdlib_module_names]
    assert not clashes


def test_platform_folder_does_not_shadow_the_standard_module():
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform; print(platform.system())"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() in ("Linux", "Darwin")


def test_platform_is_the_standard_module_under_pytest():
    import platform

    assert platform.python_version().startswith("3.")
    assert not str(platform.__file__).startswith(str(ROOT))


def test_platform_is_the_standard_module_in_ray_workers(ray_local):
    def probe():
        import platform

        return platform.__file__, platform.python_version()

    file, version = ray_local.get(ray_local.remote(probe).remote())
    assert version.startswith("3.")
    assert not file.startswith(str(ROOT))


def test_package_list_is_the_tree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    with_init = {
        p.parent.relative_to(ROOT) for folder in [*FOLDERS, "runs"] for p in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == {"openmoe." + ".".join(p.parts) for p in with_init} | {"openmoe.platform"}


def test_tests_have_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_type_checkers_see_the_folders_and_never_the_root():
    links = {p.name: p.resolve() for p in (ROOT / ".venv" / "typing" / "openmoe").iterdir()}
    assert links == {name: ROOT / name for name in [*FOLDERS, "runs"]}


@pytest.mark.parametrize("path", [*SOURCES, *EXPORTED], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{path}:{node.lineno} {node.name}"


def test_lock_files_carry_no_addresses():
    for name in ("requirements.lock", "requirements-uv.lock", "requirements-interop.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text
        assert "--hash=sha256:" in text


def test_the_readme_names_every_file_of_the_code_once():
    named = re.findall(r"^    ((?:platform|model|pipelines|clusters)/\S+\.py) ", (ROOT / "README.md").read_text(), re.M)
    files = [str(p.relative_to(ROOT)) for p in [*SOURCES, *EXPORTED] if p.name != "__init__.py"]
    assert sorted(named) == sorted(files)
