import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ktray
from ktray import cli
from ktray.distributed.explain import explain
from ktray.errors import KtrayError
from ktray.jobs.definitions import JOBS, Job
from ktray.reporting import log
from ktray.reporting.progress import Progress
from ktray.tracking.tags import commit

ROOT = Path(__file__).resolve().parents[1]


def command(argv, run=lambda r, s, d: None, plan=lambda r, s: None):
    return cli.main(Job("distill", "purpose", run, plan), argv)


def test_help_lists_every_key(capsys):
    assert command(["--help"]) == 0
    out = capsys.readouterr().out
    for key in ("train.warmup=0.1", "teacher.adapt=auto  (probe|finetune|lora|text|auto)", "gallery.data", "letters"):
        assert key in out


def test_recipe_and_overrides_reach_the_job():
    seen = []
    assert command(["--recipe", "digits", "seed=7"], lambda r, d: seen.append(r)) == 0
    assert (seen[0].task.name, seen[0].seed) == ("digits", 7)
    assert command(["--plan", "seed=1"], plan=lambda r: seen.append(r)) == 0
    assert seen[1].seed == 1


def test_an_error_is_one_line_with_cause_and_remedy_and_no_traceback(capsys):
    def fail(recipe, debug):
        raise KtrayError("The disk is full", "Free space.")

    assert command([], fail) == 2
    err = capsys.readouterr().err
    assert err == "error: The disk is full. Free space.\n"
    assert command(["--debug"], fail) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--frobnicate"], "Unknown option '--frobnicate'"),
        (["--plann"], "Unknown option '--plann'. Did you mean '--plan'?"),
        (["-x"], "Unknown option '-x'"),
        (["--pla"], "Unknown option '--pla'"),  # no abbreviations: a later option could change what they mean
        (["--plan=yes"], "Argument --plan: ignored explicit argument"),
        (["--quiet", "--verbose"], "Argument --verbose: not allowed with argument --quiet"),
        (["seed=x"], "Recipe key 'seed' does not accept 'x'"),
        (["sead=1"], "Did you mean 'seed'?"),
        (["letters"], "'letters' is not a key=value pair"),
        (["--recipe"], "--recipe needs a name or a file"),
        (["--recipe="], "--recipe needs a name or a file"),
        (["--recipe", "--plan"], "--recipe needs a name or a file"),
    ],
)
def test_bad_command_lines_exit_2(argv, message, capsys):
    def never(*_):
        raise AssertionError("it ran")

    assert command(argv, never, never) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_ctrl_c_exits_4(capsys):
    def interrupted(recipe, debug):
        raise KeyboardInterrupt

    assert command([], interrupted) == 4
    assert capsys.readouterr().err == "interrupted; the same command resumes this job\n"


def test_options_and_keys_may_stand_in_any_order():
    found = cli.parse(["seed=1", "--recipe", "digits", "store=a", "--plan", "--recipe=mine.yaml", "seed=2"])
    assert found.overrides == ["seed=1", "store=a", "seed=2"]
    assert found.recipes == ["digits", "mine.yaml"]
    assert (found.plan, found.dry_submit, found.debug, found.help, found.quiet) == (True, False, False, False, False)


def test_explain_digs_the_users_error_out_of_wrappers():
    inner = KtrayError("Teacher file missing", "Set teacher.checkpoint.")
    outer = RuntimeError("worker died\nlong text")
    outer.__cause__ = inner
    assert explain(outer) == str(inner)
    assert "No space" in explain(OSError(28, "No space left on device"))
    assert explain(ValueError("odd\nthing")).startswith("ValueError: odd thing")


def test_explain_digs_it_out_of_ray(cluster):
    import ray

    @ray.remote(num_cpus=0)
    def fail():
        raise KtrayError("Bad", "Mend.")

    with pytest.raises(KtrayError) as caught:
        ray.get(fail.remote())
    assert explain(caught.value).endswith("Bad. Mend.")


class Died(Exception):
    pass


Died.__name__ = "WorkerHealthCheckFailedError"
GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
NCCL = RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error")


@pytest.mark.parametrize(
    ("failures", "rank", "text"),
    [
        ({0: GLOO, 1: KtrayError("Bad image", "Mend it.")}, 1, "Bad image. Mend it."),
        ({0: NCCL, 1: ZeroDivisionError("division by zero"), 2: NCCL}, 1, "ZeroDivisionError: division by zero"),
        ({0: GLOO, 1: GLOO, 2: Died("a worker died")}, 2, "a worker died"),
        ({0: Died("a worker died"), 1: IndexError("row 7")}, 1, "IndexError: row 7"),
        ({0: ConnectionResetError("peer"), 1: ValueError("one"), 2: ValueError("two")}, 1, "ValueError: one"),
        ({0: ValueError("odd"), 1: KtrayError("Bad", "Mend.")}, 1, "Bad. Mend."),
        ({0: GLOO, 1: GLOO}, 0, "Connection closed by peer"),
    ],
)
def test_of_several_workers_the_one_is_told_that_the_others_failed_by(failures, rank, text):
    from ray.train import WorkerGroupError

    error = RuntimeError("stage failed")
    error.__cause__ = WorkerGroupError("many lines", failures)
    told = explain(error)
    assert told.startswith(f"rank {rank} of the training workers: ")
    assert text in told


def test_what_a_controller_or_a_health_check_wraps_is_told():
    from ray.train import ControllerError

    assert "no such file: x" in explain(ControllerError(ValueError("no such file: x")))


SHORT = {"--only": "bench.only=[{}]", "--quick": "bench.quick=true"}


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["--only", "read,embed"], ["bench.only=[read,embed]"]),
        (["--only=read", "--quick", "store=x"], ["bench.only=[read]", "bench.quick=true", "store=x"]),
        (["bench.quick=false", "--quick"], ["bench.quick=true", "bench.quick=false"]),  # what is spelled out wins
    ],
)
def test_a_jobs_own_options_stand_for_overrides(words, overrides):
    assert cli.parse(words, SHORT).overrides == overrides


def test_an_option_without_its_value_or_of_another_job_is_refused():
    with pytest.raises(KtrayError, match=r"--only needs a value.*bench\.only=\[VALUE\]"):
        cli.parse(["--quick", "--only"], SHORT)
    with pytest.raises(KtrayError, match="Unknown option '--quick'"):
        cli.parse(["--quick"])


def test_an_error_shows_no_credentials(capsys, monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", "hunter22hunter")

    def fail(recipe, debug):
        raise OSError("no answer from http://user:hunter22@host, hunter22hunter was refused")

    assert command([], fail) == 1
    err = capsys.readouterr().err
    assert "no answer from http://" in err
    assert "hunter22" not in err


def test_version(capsys):
    assert command(["--version"]) == 0
    shown = capsys.readouterr().out
    assert re.fullmatch(rf"ktray {re.escape(ktray.__version__)}( \(commit [0-9a-f]{{12}}\))?\n", shown)
    assert (commit() or "")[:12] in shown
    assert cli.entry(["--version"]) == 0
    assert capsys.readouterr().out == shown


def lines(recipe, debug):
    log.logger.info("step 1")
    logging.getLogger("ktray.training").info("of the library")
    logging.getLogger("ktray.training").debug("in detail")
    logging.getLogger("ktray.training").warning("careful")
    with Progress("train", 10):
        pass
    with log.ending():
        log.logger.info("folder    here")
    log.result("100% correct %s")


def test_what_a_job_writes(capsys):
    assert command([], lines) == 0
    out, err = capsys.readouterr()
    assert out == "step 1\nof the library\nfolder    here\n100% correct %s\n"
    assert err.splitlines()[0] == "careful"
    assert "train: done" in err


def test_quiet_shows_only_warnings_and_the_result(capsys):
    assert command(["--quiet"], lines) == 0
    assert capsys.readouterr() == ("folder    here\n100% correct %s\n", "careful\n")

    def fail(recipe, debug):
        log.logger.info("step 1")
        raise KtrayError("The disk is full", "Free space.")

    assert command(["--quiet"], fail) == 2
    assert capsys.readouterr() == ("", "error: The disk is full. Free space.\n")
    assert command(["--quiet", "--plan"], plan=lambda recipe: log.logger.info("costs nothing")) == 0
    assert capsys.readouterr().out == "costs nothing\n"
    assert command([], lines) == 0  # nothing of it is left for the next
    assert "step 1" in capsys.readouterr().out


def test_a_key_that_only_another_job_reads_is_told(capsys):
    assert command(["budget.usd=0.01", "seed=1"], lambda r, d: None) == 0
    assert capsys.readouterr().err == "WARNING: budget.usd has no effect here: only jobs/tune.py reads it\n"
    assert command(["--recipe", "digits"], lambda r, d: None) == 0  # a recipe may have keys for several jobs
    assert capsys.readouterr().err == ""


def test_a_python_without_the_packages_says_so(tmp_path):
    done = process(sys.executable, "-S", "jobs/distill.py", "--plan", PYTHONPATH="", PYTHONNOUSERSITE="1")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* has no package '\w+', which ktray needs\. Use the Python .*\n", done.stderr)


def test_verbose_shows_keys_and_details(capsys):
    assert command(["--verbose", "seed=7"], lines) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"ktray {ktray.__version__}")
    assert "\nrecipe    seed=7 (default 0)\n" in out
    assert "step 1\nof the library\nin detail\n" in out
    assert "\ndistill   ended after 0s\n" in out
    assert "recipe    train.ema" not in out  # as the schema has it
    assert "recipe    tune." not in out  # the built-in task sets some, and this job does not read them


def test_handlers_of_libraries_do_not_double_lines(capsys, caplog):
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stdout)
    root.addHandler(handler)
    try:
        assert command([], lines) == 0
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr().out.count("step 1") == 1
    with caplog.at_level(logging.INFO, "ktray"):  # outside a job, pytest and other programs see the records
        log.logger.info("seen")
    assert caplog.messages == ["seen"]


def test_ktray_lists_the_jobs(capsys):
    assert cli.entry(["--help"]) == 0
    out = capsys.readouterr().out
    named = re.findall(r"^    ([a-z]+) +[A-Z]", out, re.MULTILINE)
    assert named == [*JOBS, "chart"]
    assert sorted(JOBS) == sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
    assert cli.entry(["-h"]) == 0
    assert cli.entry([]) == 2  # no result


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["distil"], "error: No job is named 'distil'. Did you mean 'distill'? `ktray --help` lists the jobs.\n"),
        (["--debug", "distill"], "error: Unknown option '--debug' before the job's name. `ktray --help` lists"),
        (["distill", "--only", "read"], "error: Unknown option '--only'"),
    ],
)
def test_ktray_refuses_what_it_does_not_know(argv, message, capsys):
    assert cli.entry(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)


def test_ktray_chart_is_the_chart(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.entry(["chart", "--help"])
    assert ended.value.code == 0
    assert "usage: ktray chart" in capsys.readouterr().out


def process(*words, **environment):
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.mark.parametrize("words", [["--help"], ["seed=1", "--dry-submit", "--quiet"], ["--frobnicate"]])
def test_ktray_and_the_script_are_the_same(words):
    # As the installed command does: what pyproject.toml names is called, and its value is the exit code.
    module, _, function = re.search(r'^ktray = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1].partition(":")
    call = f"import sys; from {module} import {function}; sys.exit({function}())"
    installed = process(sys.executable, "-c", call, "distill", *words, PYTHONPATH=str(ROOT))
    script = process(sys.executable, "jobs/distill.py", *words, PYTHONPATH="")
    assert (script.returncode, script.stdout, script.stderr) == (
        installed.returncode,
        installed.stdout,
        installed.stderr,
    )
    assert script.returncode == (2 if words == ["--frobnicate"] else 0)
    if "--dry-submit" in words:
        assert script.stdout.splitlines()[-1].endswith("-- python jobs/distill.py seed=1 --quiet")


def test_help_into_a_closed_pipe_is_no_error():
    both = f"{sys.executable} jobs/distill.py --help | head -1"
    done = process("bash", "-c", both, PYTHONPATH="")
    assert done.stdout.startswith("usage: python jobs/distill.py")
    assert done.stderr == ""


@pytest.mark.slow
def test_the_first_line_of_a_job_is_its_own(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/doctor.py"), f"store={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert re.match(r"ok +versions +ktray ", done.stdout), done.stdout
    assert "logging.cc" not in done.stdout
