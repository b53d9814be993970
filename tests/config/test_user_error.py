"""Exit codes of every script."""

import subprocess
import sys

import pytest

from config.user_error import UserError, run_main


def fail(error):
    raise error


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: fail(UserError("--lr -1:\n has to be above 0")))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --lr -1: has to be above 0\n"


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_code_of_main_is_the_exit_code(result, code):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: result)
    assert stop.value.code == code


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_a_message_that_the_terminal_cannot_show_is_escaped(tmp_path):
    script = "import sys; sys.path.insert(0, 'src'); from config.user_error import *\n"
    script += "def main(): raise UserError('no file \\udcff\\u00e4')\nrun_main(main)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""}
    )
    assert (done.returncode, done.stderr) == (2, b"error: no file \\udcff\\xe4\n")


def test_a_place_without_permission_is_the_users(capsys) -> None:
    def main() -> None:
        raise PermissionError(13, "Permission denied", "/root/private")

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: /root/private: permission denied; give a place that can be read and written\n"
    )
