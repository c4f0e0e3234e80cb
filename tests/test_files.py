import errno
import json
import multiprocessing
import tempfile
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import (
    atomic_write,
    checksum,
    expand_home,
    lock,
    read_json,
    read_rows,
    user_cache_folder,
    write_json,
    write_text,
)


def test_an_error_in_the_middle_keeps_the_old_file_and_leaves_nothing_over(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("half of the n")
        raise RuntimeError("disk on fire")
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_the_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "data.bin"
    with atomic_write(path) as file:
        file.write(b"all of it")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"all of it"


def test_missing_and_damaged_json_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        read_json(tmp_path / "none.json")
    (tmp_path / "windows.json").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')  # as an editor saves it
    assert read_json(tmp_path / "windows.json") == {"a": 1}
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"torn\.json is damaged"):
        read_json(tmp_path / "torn.json")


def test_names_that_are_no_utf_8_can_be_written(tmp_path):
    write_text(tmp_path / "a.txt", "caf\udce9 ü\n")
    assert (tmp_path / "a.txt").read_bytes() == "caf\\xe9 ü\n".encode()


def test_rows_come_back_in_order(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in range(3)))
    assert read_rows(tmp_path / "rows.jsonl") == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_checksum_is_of_the_chunks_joined():
    assert checksum(b"ab", b"c") == checksum(b"abc")
    # FIPS 180-2, appendix B.1
    assert checksum(b"abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def _try_lock(path, answer):
    try:
        with lock(path, busy="somebody is at work"):
            answer.put("free")
    except UserError as error:
        answer.put(error.message)


def test_a_lock_keeps_another_process_out_and_is_free_afterwards(tmp_path):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with lock(tmp_path / "lock"):
        other = context.Process(target=_try_lock, args=(tmp_path / "lock", answer))
        other.start()
        assert answer.get(timeout=60) == "somebody is at work"
        other.join()
    _try_lock(tmp_path / "lock", answer)
    assert answer.get(timeout=60) == "free"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_goes_on(tmp_path, monkeypatch, capsys, number):
    def flock(file, operation):
        raise OSError(number, "not here")

    monkeypatch.setattr("fcntl.flock", flock)
    with lock(tmp_path / ".lock"):  # a short wait for others needs no word
        assert capsys.readouterr().out == ""
    with lock(tmp_path / ".lock", busy="in use"):
        said = capsys.readouterr().out
    assert f"{tmp_path} has no locks (not here); let no second process" in said


def no_home(monkeypatch):
    """HOME is not set and the user's number has no entry in /etc/passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)


def test_without_a_home_the_cache_is_temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache_folder() == tmp_path / ".cache"
    no_home(monkeypatch)
    assert user_cache_folder() == Path(tempfile.gettempdir(), "cache-54321")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path


def test_a_tilde_is_the_home_and_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/a") == f"{tmp_path}/a" and expand_home("~") == str(tmp_path)
    assert expand_home("a/~/b~") == "a/~/b~" and expand_home("~nobody-here/a") == "~nobody-here/a"
    no_home(monkeypatch)
    with pytest.raises(UserError, match="~/a: this user has no home folder"):
        expand_home("~/a")
