"""What `openmoe up` leaves behind when it is killed, and what the next one makes of it; the rest is in tests/faults."""

from openmoe.platform.jobs import up


def test_the_dashboard_of_an_up_that_was_killed_ends_before_the_next_one_asks_for_its_port(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENMOE_HOME", str(tmp_path / "home"))
    home = tmp_path / "home"
    with up.dashboard(home, 0) as left, up.dashboard(tmp_path / "other", 0) as of_another_home, up.dashboard(home, 0):
        left.wait(timeout=60)  # or TimeoutExpired
        assert of_another_home.poll() is None
