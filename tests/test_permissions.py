"""The tests' own way to be forbidden something."""

import pytest
from permissions import permissions_count


@pytest.fixture
def locked(tmp_path):
    """A file of mode 0 and a folder of mode 0 with a file in it."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").write_text("x")
    for name in ("file", "folder"):
        (tmp_path / name).chmod(0)
    yield tmp_path / "file", tmp_path / "folder" / "inner"
    (tmp_path / "folder").chmod(0o700)


def test_nothing_of_mode_0_can_be_read(locked) -> None:
    with permissions_count():
        for path in locked:
            with pytest.raises(PermissionError):
                path.read_text()


def test_what_was_allowed_before_is_allowed_again(locked) -> None:
    def readable(path) -> bool:
        try:
            return path.read_text() == "x"
        except PermissionError:
            return False

    before = [readable(path) for path in locked]
    with pytest.raises(KeyError), permissions_count():
        raise KeyError
    assert [readable(path) for path in locked] == before
