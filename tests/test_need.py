"""scripts/need.sh on machines that lack things: a PATH of a few programs, the others pretended."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "need.sh"
REAL = ("cat", "chmod", "head", "mkdir", "sed", "touch")
# pretends to install: puts a program of the package's name (g++: c++) on the PATH
APT = """
echo "$@" >>apt.log
[ "$1" = update ] && exit 0
for name; do case $name in
    g++) touch bin/c++; chmod +x bin/c++ ;;
    make | chromium) touch bin/$name; chmod +x bin/$name ;;
    python3.*-venv) touch ensurepip ;;
    libatomic1) touch libatomic ;;
    libnuma1) touch libnuma ;;
    python3-dev) touch headers ;;
esac; done
"""
PYTHON = """
case $2 in
    *ensurepip*) [ -e ensurepip ] ;;
    *libnuma*) [ -e libnuma ] ;;
    *Python.h*) [ -e headers ] ;;
    *print*) echo python3.11-venv ;;
    pip) exit 1 ;;
    *sync_playwright*) [ -e libnss3 ] ;;
esac
"""
PLAYWRIGHT = """
[ -e libatomic ] || { echo "node: libatomic.so.1: cannot open" >&2; exit 127; }
[ "$1" = --version ] || [ -e download-works ]
"""
NPM = "mkdir -p fonts; echo '<dir>/tmp/fonts</dir>' >fonts/fonts.conf"
NODE = "echo 'echo \"$LD_LIBRARY_PATH $@\"' >chromium; chmod +x chromium"


class Machine:
    """A folder to run the script in, and the programs on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name in REAL:
            (folder / "bin" / name).symlink_to(str(shutil.which(name)))
        (folder / ".venv" / "bin").mkdir(parents=True)
        self.has("uname", "case $1 in -s) echo Linux ;; -m) echo x86_64 ;; esac")
        self.has("id", "echo 1000")
        self.has("python3", PYTHON)

    def has(self, name: str, script: str = "", *, under: str = "bin") -> None:
        path = self.folder / under / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def has_file(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    def becomes_debian(self, apt: str = APT) -> None:
        self.has("id", "echo 0")
        self.has("apt-get", apt)

    def has_playwright(self) -> None:
        self.has("playwright", PLAYWRIGHT, under=".venv/bin")
        self.has("python", PYTHON, under=".venv/bin")

    def need(self, *names: str) -> tuple[int, str]:
        done = subprocess.run(
            ["/bin/sh", str(SCRIPT), *names],
            cwd=self.folder,
            env={"PATH": str(self.folder / "bin")},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def apt_calls(self) -> list[str]:
        log = self.folder / "apt.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("browser", ["chromium", "chromium-browser", "google-chrome"])
def test_what_is_there_stays(machine: Machine, browser: str) -> None:
    machine.becomes_debian()
    machine.has_playwright()
    machine.has_file("ensurepip", "libatomic", "libnuma", "headers")
    for name in ("make", "c++", browser):
        machine.has(name)
    assert machine.need("make", "python", "compiler", "vllm", "browser") == (0, "")
    assert machine.apt_calls() == []


def test_root_with_apt_installs(machine: Machine) -> None:
    machine.becomes_debian()
    machine.has_playwright()
    code, output = machine.need("make", "python", "compiler", "vllm", "browser")
    assert code == 0, output
    calls = machine.apt_calls()
    assert calls.count("update -qq") == 1
    packages = (
        "make",
        "python3.11-venv",
        "g++",
        "libnuma1 python3-dev",
        "libatomic1",
        "chromium fonts-liberation",
    )
    assert [call.split("recommends ")[1] for call in calls[1:]] == list(packages)
    assert output.count("\n") == 6
    assert "need: the tests against real engines need a C++ compiler: installing g++" in output
    assert "need: the tests of the HTML pages need a browser: installing chromium" in output


@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        ("make", ["sudo apt-get install make"]),
        ("python", ["sudo apt-get install python3.11-venv", "make PYTHON="]),
        ("compiler", ["sudo apt-get install g++", "dnf install gcc-c++", "xcode-select"]),
        ("vllm", ["sudo apt-get install libnuma1 python3-dev", "dnf install numactl-libs"]),
        ("browser", ["sudo apt-get install libatomic1", "libatomic.so.1: cannot open"]),
    ],
)
@pytest.mark.parametrize("apt", [None, "exit 100"], ids=["no root", "apt fails"])
def test_others_are_told_what_to_type(
    machine: Machine, name: str, instructions: list[str], apt: str | None
) -> None:
    machine.has_playwright()
    if apt is not None:
        machine.becomes_debian(apt)
    code, output = machine.need(name)
    assert code == 1
    for words in instructions:
        assert words in output
    if name in ("compiler", "vllm", "browser"):
        assert "make test-fast runs without" in output


def test_all_that_is_missing_is_told_at_once(machine: Machine) -> None:
    code, output = machine.need("python", "compiler")
    assert code == 1
    assert "python3.11-venv" in output
    assert "g++" in output


def test_browser_from_playwright(machine: Machine) -> None:
    machine.has_playwright()
    machine.has_file("libatomic", "download-works", "libnss3")
    code, output = machine.need("browser")
    assert (code, output.count("\n")) == (0, 1), output
    assert not (machine.folder / ".venv/bin/chromium").exists()


@pytest.mark.parametrize("downloaded", [False, True])
def test_browser_from_npm(machine: Machine, downloaded: bool) -> None:
    """Where playwright's download fails, or its browser lacks a library of the system."""
    machine.has_playwright()
    machine.has_file("libatomic", *(["download-works"] if downloaded else []))
    machine.has("npm", NPM)
    machine.has("node", NODE)
    code, output = machine.need("browser")
    assert code == 0, output
    chromium = machine.folder / ".venv/bin/chromium"
    started = subprocess.run([chromium, "--headless"], capture_output=True, text=True, check=True)
    libraries, argument = started.stdout.split()
    assert (Path(libraries).name, argument) == ("lib", "--headless")
    fonts = (machine.folder / ".venv/chromium/fonts.conf").read_text()
    assert fonts == f"<dir>{machine.folder}/.venv/chromium/fonts/fonts</dir>\n"
    assert machine.need("browser") == (0, "")


def test_no_browser_anywhere(machine: Machine) -> None:
    machine.has_playwright()
    machine.has_file("libatomic")
    code, output = machine.need("browser")
    assert code == 1
    assert "sudo apt-get install chromium fonts-liberation" in output
    assert "make test waits for it; make test-fast runs without" in output


def test_no_python(machine: Machine) -> None:
    (machine.folder / "bin/python3").unlink()
    code, output = machine.need("python")
    assert code == 1
    assert "python3 not found" in output
    assert "make PYTHON=/path/to/python3" in output


def test_old_python(machine: Machine) -> None:
    machine.has("python3", "exit 1")
    code, output = machine.need("python")
    assert code == 1
    assert "python3 is older than Python 3.10" in output


def test_unknown_name(machine: Machine) -> None:
    assert machine.need("coffee") == (2, "need: unknown name: coffee\n")


def test_tests_look_for_the_same_browsers() -> None:
    names = "chromium chromium-browser google-chrome"
    assert names in SCRIPT.read_text()
    assert (
        ", ".join(f'"{name}"' for name in names.split())
        in (ROOT / "tests" / "conftest.py").read_text()
    )


def pins(name: str) -> dict[str, set[str]]:
    """Package -> its versions, of a file with a pin per line."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if "==" in line.split("#")[0].split(";")[0]:
            package, version = line.split(";")[0].split()[0].split("==")
            versions.setdefault(package, set()).add(version)
    return versions


@pytest.mark.parametrize("name", ["locks/core.txt", "locks/dev.txt"])
def test_locks_have_the_versions_of_constraints_and_a_hash_on_every_line(name):
    lines = [n for n in (ROOT / name).read_text().splitlines() if not n.startswith("#")]
    assert lines and all("==" in line and "--hash=sha256:" in line for line in lines)
    pinned, locked = pins("constraints.txt"), pins(name)
    assert "torch" not in locked
    assert {p: v for p, v in locked.items() if p in pinned and v != pinned[p]} == {}
    dev = pins("locks/dev.txt")
    assert all(versions == dev[package] for package, versions in locked.items())
