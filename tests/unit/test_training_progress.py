"""What a person who waits for judging sees."""

from __future__ import annotations

from finetune.training.progress import JudgingProgress


def test_judging_shows_its_stages(capsys):
    with JudgingProgress(quiet=False) as progress:
        assert capsys.readouterr().err == "", "no bar before a stage begins"
        assert list(progress.track("test: first stage", [4, 5, 6])) == [4, 5, 6]
        stopped = progress.track("test: baselines", ["ease", "popular"])
        assert [next(stopped), next(stopped)] == ["ease", "popular"]
    out, err = capsys.readouterr()
    assert out == "", "standard output is for results"
    first, second = err.strip().split("\n")
    assert "judge  test: first stage" in first
    assert "3/3" in first
    assert "judge  test: baselines" in second
    assert "1/2" in second, "the second is not done before the next is asked for"


def test_judging_is_silent_if_asked(capsys):
    with JudgingProgress(quiet=True) as progress:
        assert list(progress.track("test: first stage", [4, 5, 6])) == [4, 5, 6]
    assert capsys.readouterr() == ("", "")
