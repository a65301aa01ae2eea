"""The cluster file, read as strictly as a run file: one frozen `ClusterSpec`, or every problem at once."""

import json
from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from openmoe.clusters.spec import ClusterSpec, impossible
from openmoe.pipelines import storage
from openmoe.platform.run_file import spec_source, spec_yaml
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_errors import Problem, SpecError, problems_of, show


def load(path_or_name: str, overrides: Sequence[str] = ()) -> ClusterSpec:
    """Reads a cluster file.

    Args:
      path_or_name: a path, or the bare name of a cluster file shipped with the package ("local").
      overrides: "key.path=value" each, the value in YAML; they win over the file.

    Raises:
      SpecError: with every problem of the file and the overrides.
    """
    source = spec_source.read(path_or_name, spec_source.CLUSTER_FILE)
    for override in overrides:
        source.override(override)
    found = [Problem(*problem) for problem in impossible(source.values)]
    try:
        spec = ClusterSpec.model_validate_json(json.dumps(source.values))
    except ValidationError as error:
        found = [*problems_of(error, ClusterSpec.model_json_schema()), *found]
    refused = {problem.path for problem in source.problems}
    problems = [*source.problems, *(problem for problem in dict.fromkeys(found) if problem.path not in refused)]
    if problems:
        raise SpecError(problems, source.where, source.origins)
    return spec


def dump(spec: ClusterSpec) -> str:
    """The settings that are not defaults, as a cluster file that `load` reads back equal."""
    return spec_yaml.dump(spec.model_dump(mode="json", exclude_defaults=True))


def local_paths(run: RunSpec) -> list[Problem]:
    """Paths of a run file that the machines of a cloud cannot read."""
    return [
        Problem(key, f"{show(path)} is on one machine only; the cluster's hosts share nothing but gs://")
        for key, path in _paths(run)
        if not storage.is_remote(path)
    ]


def _paths(run: RunSpec) -> Iterator[tuple[str, str]]:
    yield "run_dir", run.run_dir
    yield "data_dir", run.data_dir
    if run.sample_corpus is not None:
        yield "sample_corpus", run.sample_corpus
    if not run.data.tokenizer.startswith("builtin:"):
        yield "data.tokenizer", run.data.tokenizer
    for index, source in enumerate(run.data.sources):
        for number, path in enumerate(source.paths):
            yield f"data.sources.{index}.paths.{number}", path
