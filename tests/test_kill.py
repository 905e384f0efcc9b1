"""Runs killed with SIGKILL: a few here, a hundred in `make soak`."""

import kill


def test_killed_and_resumed_equals_never_killed(tmp_path):
    figures = kill.run(7, tmp_path)
    assert figures["kills"] == 7 and figures["while_writing"] >= 4 and figures["resumed"] >= 2
