"""What a Ray on this machine needs is checked before it is started, and said in one line."""

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from openmoe.clusters import local_ray
from openmoe.clusters.local_ray import LocalRayError


def test_a_taken_dashboard_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LocalRayError, match=rf"cluster\.dashboard_port: 127\.0\.0\.1:{port} cannot be used"):
            local_ray.init_arguments(num_cpus=2, object_store_bytes=80_000_000, dashboard_port=port)


def test_an_object_store_larger_than_the_free_shared_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ray, "SHARED_MEMORY", tmp_path)
    with pytest.raises(LocalRayError, match=r"cluster\.object_store_bytes: .* bytes free, Ray's object store needs"):
        local_ray.check_shared_memory(10**18)


def test_a_machine_without_shared_memory_folder_is_not_refused(monkeypatch):
    monkeypatch.setattr(local_ray, "SHARED_MEMORY", Path("/no/such/folder"))
    local_ray.check_shared_memory(10**18)


def test_authentication_is_on_with_a_token_of_its_own(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    first, second = local_ray.environment(), local_ray.environment()
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


def test_the_dashboard_listens_on_this_machine_only():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = local_ray.init_arguments(num_cpus=2, object_store_bytes=80_000_000, dashboard_port=port)
    assert (arguments["dashboard_host"], arguments["dashboard_port"]) == ("127.0.0.1", port)
    assert not local_ray.init_arguments(num_cpus=2, object_store_bytes=80_000_000)["include_dashboard"]


def test_nobody_else_may_enter_the_folder_of_rays_logs_and_sockets(ray_local):
    folder = Path(local_ray.log_dir())
    assert (folder / "session_latest").exists()
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_a_folder_that_was_open_to_everybody_is_closed(tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray").chmod(0o777)
    local_ray.make_private(tmp_path / "ray")
    assert stat.S_IMODE((tmp_path / "ray").stat().st_mode) == 0o700


def test_a_folder_that_somebody_else_has_put_there_is_refused(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(LocalRayError, match="link: another user of this machine has made it"):
        local_ray.make_private(tmp_path / "link")
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(LocalRayError, match="theirs: another user of this machine has made it"):
        local_ray.make_private(tmp_path / "theirs")


def test_logs_of_a_ray_that_ended_a_week_ago_are_removed_and_no_others(tmp_path):
    now_s = 1_800_000_000.0
    with subprocess.Popen(["true"]) as ended:
        pass
    ages_days = {f"1_{ended.pid}": 8, f"2_{ended.pid}": 6, f"3_{os.getpid()}": 8, f"4_{ended.pid}": 9, "5_none": 8}
    for name, age_days in ages_days.items():
        logs = tmp_path / f"session_2026-11-26_17-49-22_{name}" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.out").write_text("")
        for path in (logs / "raylet.out", logs, logs.parent):
            os.utime(path, (now_s, now_s - 86_400 * age_days))
    busy = tmp_path / f"session_2026-11-26_17-49-22_4_{ended.pid}"
    os.utime(busy / "logs" / "raylet.out", (now_s, now_s - 60))
    (tmp_path / "session_latest").symlink_to(tmp_path / f"session_2026-11-26_17-49-22_1_{ended.pid}")
    assert local_ray.remove_old_sessions(tmp_path, now_s) == []
    (tmp_path / "session_latest").unlink()
    (tmp_path / "session_latest").symlink_to(busy)
    assert local_ray.remove_old_sessions(tmp_path, now_s) == [f"session_2026-11-26_17-49-22_1_{ended.pid}"]
    assert sorted(path.name.split("_", 3)[-1] for path in tmp_path.iterdir()) == sorted([*ages_days, "latest"])[1:]


def test_processes_of_a_ray_on_this_machine_look_for_garbage_seldom(ray_local):
    def threshold():
        import gc

        return gc.get_threshold()[0]

    assert ray_local.get(ray_local.remote(threshold).remote()) == 100_000


def test_a_ray_without_dashboard_answers_at_once_that_it_has_no_api_server(ray_local):
    """As Ray Train's PlacementGroupCleaner asks: any other error it takes for a server that is late."""

    def ask():
        from ray.util.state import get_actor
        from ray.util.state.exception import RayStateApiException

        try:
            get_actor("0" * 32, timeout=10)
        except RayStateApiException:
            return "late"
        except RuntimeError as error:
            return str(error).splitlines()[0]

    assert ray_local.get(ray_local.remote(ask).remote()) == "Module: none does not exist."
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
