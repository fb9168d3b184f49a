"""The progress line: nothing before the first step, then figures and what is left."""

import io

from deepseek_jax.training.progress import Progress, progress_text


def test_figures():
    values = {"loss": 3.14159, "mtp_loss": 4.0, "tokens_per_s": 4321.0, "mfu": 0.412, "max_vio": [0.5, 1.5]}
    assert progress_text(values) == "loss 3.142, MTP 4.000, 4,321 tok/s, MFU 41.2%, MaxVio 1.00"
    assert progress_text({"loss": None, "max_vio": []}) == ""


def test_line():
    out = io.StringIO()
    progress = Progress(10, initial=4, file=out)
    progress.write("compiling")
    assert out.getvalue() == "compiling\n"  # no bar that stands still at 0%
    progress.update(5, {"loss": 2.5})
    assert (
        "5/10" in out.getvalue() and "loss 2.500" in out.getvalue()
    )  # at once, although this is no terminal
    progress.update(7, {"loss": 2.0, "tokens_per_s": 100.0}, seconds_left=75)
    progress.write("saved")
    progress.close()
    assert "saved" in out.getvalue() and "7/10" in out.getvalue()
    assert "loss 2.000, 100 tok/s, 01:15 left" in out.getvalue()


def test_closed_without_a_step():
    out = io.StringIO()
    Progress(10, file=out).close()
    assert out.getvalue() == ""
