"""What is said of where numbers come from is true."""

import importlib.util
import shutil
import subprocess

from linearize.evaluation import environment


def test_the_commit_is_that_of_the_code_and_says_whether_files_differ(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    file = shutil.copy(environment.__file__, tmp_path / "environment.py")
    spec = importlib.util.spec_from_file_location("copied_environment", file)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    git("init")
    git("commit", "--allow-empty", "-m", "Begin")
    assert copied.commit() is None
    git("add", "environment.py")
    git("commit", "-m", "Add the code")
    found = copied.commit()
    assert len(found) == 12 and int(found, 16) >= 0
    with open(file, "a") as code:
        code.write("# changed")
    assert copied.commit() == f"{found}-dirty"
