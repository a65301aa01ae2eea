"""The shipped Prometheus files hold: syntax, metrics that exist, when alerts fire. Prometheus's own tool judges."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "docs" / "monitoring"

# Seven runs, a sample a minute: what each does, and which of them is named at minute 40.
SERIES = {
    'ray_openmoe_step{run="trains"}': "0+1x60",
    'ray_openmoe_step{run="hangs"}': "0+1x20 20x40",
    'ray_openmoe_step{run="hung-shortly"}': "0+1x31 31x29",
    'ray_openmoe_step{run="finished"}': "0+5x20 100x40",
    'ray_openmoe_step{run="vanished", worker="1"}': "0+1x20 _x40",
    'ray_openmoe_step{run="resumed", worker="1"}': "0+1x20 20x40",  # Ray may show a dead worker's last figures
    'ray_openmoe_step{run="resumed", worker="2"}': "_x25 15+1x35",
    'ray_openmoe_incarnation{run="resumed", worker="1"}': "1x60",
    'ray_openmoe_incarnation{run="resumed", worker="2"}': "_x25 2x35",
    'ray_openmoe_incarnation{run="shaken"}': "3x5 4x5 5x5 6x5 7x5 8x35",
}
RUNS = ("trains", "hangs", "hung-shortly", "finished", "vanished", "resumed")


def fired(name, minute, *alerts):
    expected = [
        {"exp_labels": {"run": run, "severity": severity}, "exp_annotations": {"summary": summary}}
        for run, severity, summary in alerts
    ]
    return {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": expected}


def no_progress(run, step):
    return (run, "page", f"run {run} has taken no step for 10 minutes; it was at step {step}")


@pytest.fixture(scope="module")
def promtool(needs):
    """Returns the function that runs Prometheus's own tool."""
    needs(shutil.which("promtool"), "promtool, to check the shipped rules: apt-get install prometheus")

    def run(*arguments):
        result = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
        return result.returncode, result.stdout + result.stderr

    return run


def test_the_configuration_and_its_rules_are_accepted(promtool):
    code, said = promtool("check", "config", FILES / "prometheus.yml")
    assert code == 0, said
    assert "SUCCESS: 2 rules found" in said


def test_a_run_without_a_step_for_ten_minutes_raises_an_alert_and_no_other_run_does(promtool, tmp_path):
    last = {f'ray_openmoe_last_step{{run="{run}"}}': "100x60" for run in RUNS}
    series = [{"series": name, "values": values} for name, values in {**SERIES, **last}.items()]
    expected = [
        fired("OpenMoENoProgress", 29),
        fired("OpenMoENoProgress", 32, no_progress("hangs", 20), no_progress("vanished", 20)),
        fired("OpenMoENoProgress", 40, no_progress("hangs", 20), no_progress("vanished", 20)),
        fired("OpenMoERestartsOften", 24),
        fired("OpenMoERestartsOften", 40, ("shaken", "ticket", "run shaken was restarted 5 times within an hour")),
    ]
    test = {"interval": "1m", "input_series": series, "alert_rule_test": expected}
    file = tmp_path / "alerts_test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(FILES / "alerts.yml")], "tests": [test]}))
    code, said = promtool("test", "rules", file)
    assert code == 0, said


def test_the_dashboard_and_the_alerts_ask_only_for_metrics_that_workers_report(promtool, tmp_path):
    panels = json.loads((FILES / "grafana.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(expressions) == 9
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions)]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    code, said = promtool("check", "rules", file)
    assert code == 0, said
    reported = set(re.findall(r'gauge\(\s*"(\w+)"', (ROOT / "platform" / "train" / "worker.py").read_text()))
    asked = " ".join(expressions) + (FILES / "alerts.yml").read_text()
    assert set(re.findall(r"ray_openmoe_(\w+)", asked)) == reported
