"""Local paths of a run file, made absolute: what reads them need not run in the folder where it was written."""

from dataclasses import replace
from pathlib import Path

from openmoe.pipelines import storage
from openmoe.platform.run_file.spec import RunSpec

_BUILTIN = "builtin:"


def absolute(path: str) -> str:
    """Returns a local path as seen from everywhere; gs:// stays as it is."""
    return path if storage.is_remote(path) else str(Path(path).absolute())


def with_absolute_paths(spec: RunSpec) -> RunSpec:
    """Returns the spec with its local paths made absolute."""
    data = replace(
        spec.data,
        tokenizer=spec.data.tokenizer if spec.data.tokenizer.startswith(_BUILTIN) else absolute(spec.data.tokenizer),
        sources=tuple(replace(source, paths=tuple(map(absolute, source.paths))) for source in spec.data.sources),
    )
    paths = {key: absolute(getattr(spec, key)) for key in ("run_dir", "data_dir")}
    for key in ("sample_corpus", "init_from"):
        if given := getattr(spec, key):
            paths[key] = absolute(given)
    cache = spec.cluster.compile_cache
    cluster = spec.cluster.model_copy(update={"compile_cache": cache if cache in (None, "none") else absolute(cache)})
    return spec.model_copy(update={**paths, "data": data, "cluster": cluster})
