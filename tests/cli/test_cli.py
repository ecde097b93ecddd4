import io
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from badloss_jax.cli import main
from badloss_jax.core.progress import Progress
from badloss_jax.report.tables import as_markdown, as_text
from tests.conftest import ENVIRONMENT, overrides


@pytest.mark.parametrize(
    "command",
    ["", "run", "score", "summary", "report", "attacks", "plan", "prepare", "bench", "bench train", "bench buffer"],
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: badloss")
    assert max(map(len, shown.splitlines())) <= 121


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["runn"], "invalid choice: 'runn'"),
        (["run", "--workdir", "x"], "required: --config"),
        (["run", "--config", "configs/digits.py"], "required: --workdir"),
        (
            ["run", "--config", "configs/digits.py", "--workdir", "x", "--confg.seed=1"],
            "unknown argument '--confg.seed=1'",
        ),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--config", "none.py"], "config file none.py does not exist"),
        (["run", "--config", "configs/digits.py", "--config.sed=1"], "did you mean 'seed'?"),
        (["run", "--config", "configs/cifar10.py", "--config.data.dir=/none"], "'/none' is not a folder"),
        (["run", "--config", "configs/digits.py", "--config.attacks.manifest=/none"], "manifest /none does not exist"),
        (["score"], "holds no run"),
        (["report"], "holds no finished run"),
    ],
)
def test_errors_fit_a_screen_and_start_nothing(arguments, message, capsys, tmp_path):
    workdir = tmp_path / "work"
    assert main([*arguments, "--workdir", str(workdir)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("badloss: error: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert len(shown.err) < 1000
    assert not workdir.exists()


def test_a_user_without_a_home_is_told_to_name_one(monkeypatch, capsys):
    """As pods run as some number: nobody knows a folder of theirs."""

    def unknown(_):
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert main(["plan", "--config", "configs/digits.py", "--quick"]) == 2
    assert "export HOME=FOLDER" in capsys.readouterr().err


def test_report_renders_the_same_page_again(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    made = ("report.html", "report.md", "roc.png", "trajectories.png")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in made}
    for name in made:
        (tmp_path / "run" / name).unlink()
    assert main(["report", "--workdir", str(tmp_path / "run")]) == 0
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out
    for name in made:
        assert (tmp_path / "run" / name).read_bytes() == before[name], name


def test_detection_alone_is_reported_and_scored_again(defended, tmp_path, capsys):
    shutil.copytree(defended[0], tmp_path / "run")
    assert main(["report", "--workdir", str(tmp_path / "run")]) == 0
    assert main(["score", "--workdir", str(tmp_path / "run"), "--config.rejection.fraction=0.2"]) == 0
    shown = capsys.readouterr().out
    assert "scored by" in shown
    assert "loss/fraction" in shown
    assert main(["score", "--workdir", str(tmp_path / "run"), "--config.scoring.kinds=()"]) == 2
    assert "scoring.kinds is empty" in capsys.readouterr().err
    assert main(["summary", str(tmp_path / "run")]) == 1
    assert "it is not of a whole run" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_attacks_are_shown_as_a_picture(tmp_path, capsys):
    names = "--config.attacks.names=('patch','blend_p','narcissus')"
    arguments = ["attacks", "--config", "configs/digits.py", names, "--config.attacks.narcissus.ratio=0.1",
                 "--config.attacks.narcissus.surrogate_epochs=1", "--config.attacks.narcissus.steps=2"]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "a.png")]) == 0
    assert "narcissus" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 3 * 3 * 80
        assert len(picture.convert("L").getcolors()) > 20
    assert main([*arguments, "--out", str(tmp_path / "a.jpg")]) == 2
    assert "expected a file name that ends in .png" in capsys.readouterr().err
    assert main(["attacks", "--config", "configs/digits.py", "--config.attacks.names=()", "--out", "a.png"]) == 2
    assert "there is no trigger to show" in capsys.readouterr().err


def test_batch_not_divisible_by_the_devices(tmp_path):
    arguments = ["run", "--config", "configs/digits.py", "--workdir", str(tmp_path / "w"), *overrides()]
    done = subprocess.run(
        [sys.executable, "-m", "badloss_jax", *arguments, "--config.recording.batch_size=30"],
        env=ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "4"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "recording.batch_size = 30 is not divisible by the 4 devices" in done.stderr
    assert not (tmp_path / "w").exists()


FEWER = overrides(scoring__kinds="('loss',)", retraining__variants="('loss/fraction',)", controls="()")


@pytest.mark.slow
def test_run_and_score_on_four_devices(tmp_path):
    """The command as a person types it, in a pipe: plain lines, a table, exit code 0."""
    arguments = ["--workdir", str(tmp_path / "w")]
    environment = ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-m", "badloss_jax"]
    done = subprocess.run([*command, "run", "--config", "configs/digits.py", *arguments, *FEWER],
                          env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr
    assert "[1/3] recording  900 examples in" in done.stderr
    assert "on 4 cpu devices" in done.stderr
    assert "undefended" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert "Report: " in done.stdout
    again = subprocess.run([*command, "score", *arguments, "--config.scoring.loss.k=7"],
                           env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "rescored" in again.stdout
    assert "scoring.loss.k: 5 -> 7" in again.stdout


def test_progress_shows_a_rate_and_an_eta_in_a_terminal_and_lines_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), "\r"), (io.StringIO(), "ETA")):
        progress = Progress(stream, seconds_between_lines=0)
        progress.phase("[1/7] recording")
        progress.begin(100)
        progress.advance(40, "epoch 2/5")
        progress.say("epoch 2/5  loss 0.5")
        progress.end()
        assert expected in stream.getvalue()
        assert "[1/7] recording  40 examples in" in stream.getvalue()


def test_progress_says_how_long_a_step_took_of_which_nothing_else_can_be_said():
    stream = io.StringIO()

    def fail():
        with Progress(stream, 0.001).waiting("compiling the step"):
            while "..." not in stream.getvalue():
                pass
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert stream.getvalue().splitlines()[0] == "compiling the step ... 0:00"
    assert "compiling the step  " not in stream.getvalue()  # it did not end well

    with Progress(stream).waiting("timing the step"):
        pass
    assert stream.getvalue().splitlines()[-1] == "timing the step  0:00"


def test_summary(tmp_path, capsys):
    model = {"clean_accuracy": 0.5, "attack_success_rate": {"patch": 1.0}}
    for seed in (0, 1, 2):
        (tmp_path / str(seed)).mkdir()
        retrained = model | {"clean_accuracy": 0.4 + 0.02 * seed}
        variant = {"detection": {"auroc": {"overall": 0.9 + 0.02 * seed}}, "removed_share": 0.4,
                   "clean_removed_share": 0.3, "recall": {"a": 0.5, "b": 0.7}, "retrained": retrained}  # fmt: skip
        results = {"schema_version": 1, "config": {"seed": seed, "probes": {"count": 9 if seed == 2 else 8}},
                   "undefended": model, "variants": {"loss/fraction": variant, "logits/alpha": {}}}  # fmt: skip
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(results))
    assert main(["summary", str(tmp_path / "0" / "results.json"), str(tmp_path / "1")]) == 0
    *_, undefended, loss = capsys.readouterr().out.splitlines()
    assert undefended == "| undefended | 0.0 | 0.0 |  |  | 50.0 | 100.0 | 100.0 |"
    assert loss == "| loss/fraction | 40.0 | 30.0 | 0.910 ± 0.014 | 60.0 | 41.0 ± 1.4 | 100.0 | 100.0 |"
    for others, message in (("2", "these differ in probes.count: 8 -> 9"), ("0", "differ in nothing")):
        assert main(["summary", str(tmp_path / "0"), str(tmp_path / others)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "1" / "results.json").write_text('{"schema_version": 2}')
    assert main(["summary", str(tmp_path / "1")]) == 1
    assert "cannot be used" in capsys.readouterr().err
    assert main(["summary", str(tmp_path / "3")]) == 2
    assert "is 3 the folder of a finished run?" in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_tables():
    rows = [["model", "CA"], ["a|<b>", "1.0 %"]]
    assert as_text(rows).splitlines() == ["model     CA", "------------", "a|<b>  1.0 %"]
    assert as_markdown([["a"], ["![x](http://e/`)\\"]]).splitlines()[-1] == "| \\!\\[x\\](http://e/\\`)\\\\ |"
    assert as_markdown(rows) == "| model | CA |\n| --- | --- |\n| a\\|&lt;b> | 1.0 % |"
