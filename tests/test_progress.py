"""Lines that `Stages` writes to a log."""

from flexolmo_jax.progress import Stages


def test_a_log_gets_a_line_now_and_then(capsys):
    with Stages("flexolmo x", every=0.0) as stages:
        stages.say("first", 0, 4, None)
        stages.say("second", 1, 4, 30.4)
        stages.say("third", 2, 4, 150.0)
        stages.say("fourth", 3, 4, 7300.0)
    assert capsys.readouterr().err.splitlines() == [
        "flexolmo x: first (0 of 4 done)",
        "flexolmo x: second (1 of 4 done, about 30 s left)",
        "flexolmo x: third (2 of 4 done, about 2 min left)",
        "flexolmo x: fourth (3 of 4 done, about 2 h left)",
    ]
    with Stages("flexolmo x", every=1000.0) as stages:
        for done in range(3):
            stages.say("often", done, 3, None)
    assert capsys.readouterr().err.splitlines() == ["flexolmo x: often (0 of 3 done)"]
