import pytest

from ktray import cli
from ktray.distributed.explain import explain
from ktray.errors import KtrayError


def command(argv, run=lambda r, s, d: None, plan=lambda r, s: None):
    return cli.main("distill", "purpose", run, plan, argv)


def test_help_lists_every_key(capsys):
    assert command(["--help"]) == 0
    out = capsys.readouterr().out
    for key in ("train.lr=0.002", "teacher.adapt=auto  (probe|finetune|text|auto)", "gallery.data", "letters"):
        assert key in out


def test_recipe_and_overrides_reach_the_job():
    seen = []
    assert command(["--recipe", "digits", "seed=7"], lambda r, s, d: seen.append(r)) == 0
    assert (seen[0].task.name, seen[0].seed) == ("digits", 7)
    assert command(["--plan", "seed=1"], plan=lambda r, s: seen.append(r)) == 0
    assert seen[1].seed == 1


def test_an_error_is_one_line_with_cause_and_remedy_and_no_traceback(capsys):
    def fail(recipe, say, debug):
        raise KtrayError("The disk is full", "Free space.")

    assert command([], fail) == 1
    err = capsys.readouterr().err
    assert err == "error: The disk is full. Free space.\n"
    assert command(["--debug"], fail) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--frobnicate"], ["seed=x"], ["sead=1"], ["--recipe"]])
def test_bad_command_lines_exit_1(argv, capsys):
    assert command(argv) == 1
    assert capsys.readouterr().err.startswith("error: ")


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

    def fail(recipe, say, debug):
        raise OSError("no answer from http://user:hunter22@host, hunter22hunter was refused")

    assert command([], fail) == 1
    err = capsys.readouterr().err
    assert "no answer from http://" in err
    assert "hunter22" not in err
