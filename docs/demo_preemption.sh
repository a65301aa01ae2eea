#!/usr/bin/env bash
# make demo-preemption: two fake TPU slices, one run. Its slice is taken away while it trains; it goes on, on the other.
# Every line with a $ is what you would type. Everything is kept in a folder of its own and removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
folder=$(mktemp -d /tmp/openmoe-demo.XXXXXX)
export OPENMOE_HOME=$folder/home
export JAX_COMPILATION_CACHE_DIR=$folder/compiled   # half of what one slice compiled, the other one loads: JAX keeps what rank 0 did
notice_s=${NOTICE_S:-0}

end() {
  kill "$controller" 2>/dev/null || true
  openmoe cluster down local >/dev/null 2>&1 || true
  rm -rf "$folder"
}
trap end EXIT
shown() { printf '\n$ %s\n' "$*"; "$@"; }
job() { openmoe jobs show "$id" --json | python -c "import json, sys; job = json.load(sys.stdin); print($1)"; }
placed() { cat "$folder"/run/journal/*.jsonl 2>/dev/null | grep -o '"hosts":\["slice-[a-z]*' | tail -1 | grep -o 'slice-[a-z]*' || true; }

shown openmoe cluster up local
openmoe controller run >"$folder/controller.log" 2>&1 &
controller=$!
shown openmoe submit twin "run_dir=$folder/run" "data_dir=$folder/data" "sample_corpus=$folder/corpus" \
  train.steps=40 train.checkpoint_every_steps=5 --cluster local
id=$(openmoe jobs list --json | python -c "import json, sys; print(json.load(sys.stdin)[0]['id'])")

openmoe jobs logs -f "$id" &
until [ "$(find "$folder/run/accepted" -name '*.json' 2>/dev/null | wc -l)" -ge 3 ]; do
  sleep 0.5
  [ "$(job "job['state']")" != failed ] || { openmoe jobs story "$id"; exit 1; }
done
shown openmoe cluster preempt local "$(placed)" --grace "$notice_s"
shown openmoe cluster status local
wait %2   # the log, to the end of the job
shown openmoe jobs story "$id"
[ "$(job "job['state']")" = succeeded ]
