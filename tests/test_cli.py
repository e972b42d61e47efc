import pytest

from ktray import cli
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
    assert cli.explain(outer) == str(inner)
    assert "No space" in cli.explain(OSError(28, "No space left on device"))
    assert cli.explain(ValueError("odd\nthing")).startswith("ValueError: odd thing")


def test_explain_digs_it_out_of_ray(cluster):
    import ray

    @ray.remote(num_cpus=0)
    def fail():
        raise KtrayError("Bad", "Mend.")

    with pytest.raises(KtrayError) as caught:
        ray.get(fail.remote())
    assert cli.explain(caught.value).endswith("Bad. Mend.")


def test_explain_names_the_worker_that_failed_and_not_those_that_lost_it():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")

    class Failed(Exception):
        def __init__(self, failures):
            super().__init__("Training failed due to worker errors")
            self.worker_failures = failures

    assert cli.explain(Failed({0: lost, 1: ValueError("bad rows"), 2: lost})).startswith("ValueError: bad rows")
    assert cli.explain(Failed({0: ValueError("odd"), 1: KtrayError("Bad", "Mend.")})) == "Bad. Mend."
    assert "Connection closed" in cli.explain(Failed({0: lost, 1: lost}))
    setup = RuntimeError("Training failed due to controller error")
    setup.controller_failure = ValueError("no route to rank 1")
    assert cli.explain(setup).startswith("ValueError: no route to rank 1")


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
