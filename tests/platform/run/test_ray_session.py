"""A Ray of one machine: what it lacks for a run is said at once."""

import signal

import pytest

from openmoe.platform.run import ray_session
from openmoe.platform.run_file.spec import ClusterConfig

TPU = {"accelerator": "tpu", "accelerator_type": "TPU-V4", "topology": "2x2x1"}


@pytest.mark.parametrize(
    ("settings", "resources", "found"),
    [
        ({"accelerator": "cpu", "num_workers": 2, "devices_per_worker": 8}, {"CPU": 3.0}, None),
        ({"accelerator": "gpu", "num_workers": 2, "devices_per_worker": 2}, {"CPU": 3.0, "GPU": 4.0}, None),
        ({"accelerator": "gpu", "num_workers": 2, "devices_per_worker": 2}, {"CPU": 3.0, "GPU": 3.0}, "finds 3 "),
        ({"accelerator": "gpu", "num_workers": 1, "devices_per_worker": 1}, {"CPU": 3.0}, "finds 0 "),
        ({**TPU, "num_workers": 1, "devices_per_worker": 4}, {"CPU": 3.0, "TPU": 4.0}, None),
        ({**TPU, "num_workers": 2, "devices_per_worker": 4}, {"CPU": 3.0, "TPU": 4.0}, "finds 4 "),
    ],
)
def test_devices_that_one_machine_will_never_have_are_named(settings, resources, found):
    problem = ray_session.lacking(ClusterConfig(**settings), resources)
    assert (found in problem) if found else problem == ""


@pytest.fixture
def interruptible():
    """SIGINT interrupts, as in a terminal: workers of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_request_to_stop_waits_until_ray_has_started_and_a_second_one_does_not(interruptible):
    reached = []

    def start(requests):
        with ray_session.signals_wait():
            for _ in range(requests):
                signal.raise_signal(signal.SIGINT)
            reached.append(requests)

    start(0)
    for requests in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            start(requests)
    assert (reached, signal.getsignal(signal.SIGINT)) == ([0, 1], signal.default_int_handler)
    with ray_session.signals_wait():
        signal.signal(signal.SIGINT, print)  # as Ray does with SIGTERM
    assert signal.getsignal(signal.SIGINT) is print
