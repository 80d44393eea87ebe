"""Lines that are written to a log."""

from flexolmo_jax import progress
from flexolmo_jax.progress import Stages, byte_progress


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    """The time left is that of the stages before, 10, 150 and 7300 seconds on average."""
    clock = iter([0.0, 1.0, 10.0, 300.0, 21900.0, *[30000.0] * 4])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Stages("flexolmo x", every=0.0) as stages:
        for done, stage in enumerate(("first", "second", "third", "fourth")):
            stages.say(stage, done, 4)
    assert capsys.readouterr().err.splitlines() == [
        "flexolmo x: first (0 of 4 done)",
        "flexolmo x: second (1 of 4 done, about 30 s left)",
        "flexolmo x: third (2 of 4 done, about 5 min left)",
        "flexolmo x: fourth (3 of 4 done, about 2 h left)",
    ]
    with Stages("flexolmo x", every=1000.0) as stages:
        for done in range(3):
            stages.say("often", done, 3)
    assert capsys.readouterr().err.splitlines() == ["flexolmo x: often (0 of 3 done)"]


def test_long_work_on_bytes_writes_a_line_each_minute(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 60.0, 90.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with byte_progress("Tokenized", 10_000_000_000, done=1_000_000_000) as advance:
        for count in (1_000_000, 599_000_000, 0, 700_000_000):
            advance(count)
    assert capsys.readouterr().err.splitlines() == [
        "Tokenized: 1.6 GB of 10.0 GB, 10.0 MB/s, about 14 min left",
        "Tokenized: 2.3 GB of 10.0 GB, 10.0 MB/s, about 13 min left",
    ]
